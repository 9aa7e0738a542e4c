"""Routes by which a concept may enter a picture besides the prompt, as a running call shows them.

A start image, a mask or an adapter's image is an argument of the call, so it can be seen. An embedding that was learned
and latents that were inverted look like any others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMED = "named"
PARAPHRASED = "paraphrased"
START_IMAGE = "start image"
INPAINTING = "inpainting"
CONTROL_IMAGE = "control image"
IP_ADAPTER = "IP-Adapter"
INVERTED_LATENTS = "inverted latents"
"""Noise that a picture was run backwards to. A call does not show it, so it is not among `ROUTES`."""
LEARNED_EMBEDDINGS = "learned embeddings"
"""Embeddings that were learned in place of a concept's words. A call does not show them either."""
PROMPT_ROUTES = (NAMED, PARAPHRASED)
"""Routes through the words of a prompt."""
IMAGE_ROUTES = (START_IMAGE, INPAINTING)
"""Routes of a picture that comes in, on which image gates are measured."""
ROUTES = (*PROMPT_ROUTES, START_IMAGE, INPAINTING, CONTROL_IMAGE, IP_ADAPTER)


def routes_of(pipeline: Any, arguments: Mapping[str, Any]) -> frozenset[str]:
    """Return the routes besides the prompt that a pipeline's call uses, from its arguments by name."""
    given = {name for name, value in arguments.items() if value is not None}
    routes = set()
    if "image" in given:
        controls = any(name in pipeline.components for name in ("controlnet", "adapter", "t2i_adapter"))
        routes.add(CONTROL_IMAGE if controls and "control_image" not in arguments else START_IMAGE)
    if "control_image" in given:
        routes.add(CONTROL_IMAGE)
    if "mask_image" in given:
        routes.add(INPAINTING)
    if given & {"ip_adapter_image", "ip_adapter_image_embeds"}:
        routes.add(IP_ADAPTER)
    return frozenset(routes)
