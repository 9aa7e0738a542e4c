"""Facts about an eraser in plain words: what its gates read and see, what they do not see, and what its parts cost."""

from __future__ import annotations

from collections.abc import Sequence

from neuraleraser.eraser.gate import Gate
from neuraleraser.eraser.header import EraserHeader
from neuraleraser.eraser.part import Part
from neuraleraser.eraser.plan import LOOKS
from neuraleraser.settings import FitSettings
from neuraleraser.sites import CONTROL_IMAGE, INPAINTING, IP_ADAPTER, NAMED, PARAPHRASED, ROUTES, START_IMAGE

ROUTE_WORDS = {
    NAMED: "its name in the prompt",
    PARAPHRASED: "other words for it in the prompt",
    START_IMAGE: "a start image",
    INPAINTING: "an image that is painted over in part",
    CONTROL_IMAGE: "a control image",
    IP_ADAPTER: "an image given to an IP-Adapter",
}
"""Words for each of `ROUTES`."""
GUIDED_COST = "two more forwards in each step for an image in which the image gate is or was open, none for others"
"""Cost of a guided correction."""


def routes_text(header: EraserHeader) -> str:
    """Return the routes that an eraser's gates see, and those that they do not, as sentences."""
    seen = [ROUTE_WORDS[route] for route in ROUTES if route in header.routes]
    unseen = [ROUTE_WORDS[route] for route in ROUTES if route not in header.routes]
    lines = [f"Its gates look for the concept where it comes in by {_listed(seen)}." if seen else "It sees no route."]
    if unseen:
        lines.append(f"They are not made to see what comes in by {_listed(unseen)}.")
    lines.append(
        "Embeddings that were learned and latents that were inverted look like any others, and nothing is known of "
        "them. To look for a concept is not to find it every time, nor to take it out."
    )
    return " ".join(lines)


def gate_name(gate: Gate) -> str:
    """Return "image gate" or "prompt gate"."""
    return "image gate" if gate.picture else "prompt gate"


def features_text(part: Part, header: EraserHeader) -> str:
    """Return where the features of a part's gate come from: learnt with labels for the concept, or those of an SAE."""
    gate = part.gate
    count = f"{len(gate.features)} feature{'' if len(gate.features) == 1 else 's'}"
    if part.guided is not None:
        return f"{count}, learnt with labels from pictures with the concept and without"
    labels = header.sae.get("labels", ())
    if not isinstance(labels, Sequence) or isinstance(labels, str) or not labels:
        return f"{count} of an SAE; the header names no labels that they were set with"
    return f"{count} of an SAE, set with labels: {', '.join(map(str, labels))}"


def seen_by_noise(gate: Gate, header: EraserHeader) -> list[tuple[float, float]]:
    """Return (timestep, share of the concept's pictures at which the image gate opens), the noisiest first; [] where
    the header does not say."""
    times = gate.times.flip(0).tolist()
    return list(zip(times, header.image_separation, strict=True)) if len(times) == len(header.image_separation) else []


def seen_text(gate: Gate, header: EraserHeader) -> str:
    """Return at which levels of noise an image gate sees, the noisiest first."""
    found = seen_by_noise(gate, header)
    if not found:
        return "not said"
    opens = ", ".join(f"t = {t:g} in {share:.0%}" for t, share in found if share > 0)
    shut = ", ".join(f"{t:g}" for t, share in found if share <= 0)
    seen = f"{opens} of the concept's pictures that it was made with" if opens else "no level of noise"
    return f"{seen}; shut at t = {shut}" if shut else seen


def least_strength_text(header: EraserHeader) -> str:
    """Return from which strength of image-to-image on an eraser takes its concept out of start images."""
    least = header.least_strength
    if least is None:
        return "no strength is known at which they lose the concept"
    if least == 1:
        return "its own pictures kept the concept at each strength that was tried"
    return f"its own pictures lost the concept, in the gate's eyes, from strength {least:g} on; below it some stays"


def tradeoff_rows(name: str, header: EraserHeader) -> list[tuple[str, str]]:
    """Return (fact, value) of the `false_openings` that a prompt gate was made with, and of what others would give."""
    made = header.settings
    rows = []
    if isinstance(made, FitSettings):
        text = f"made with {made.false_openings:g}, the share of images without the concept on which it may open"
        rows.append((f"{name}: false_openings", text))
    own = f"its {made.num_pairs} own images" if isinstance(made, FitSettings) else "its own images"
    for budget, seen, other in header.tradeoff:
        opens = f"would open on {seen:.1%} of {own} with the concept, {other:.1%} of those without"
        rows.append((f"{name}: with {budget:g}", opens))
    return rows


def sight_rows(parts: Sequence[Part], header: EraserHeader) -> list[tuple[str, str]]:
    """Return (fact, value) of each gate of an eraser and of its guided correction, for a table."""
    rows: list[tuple[str, str]] = []
    for part in parts:
        name, window = gate_name(part.gate), part.gate.window
        reads = "one position at a time" if window == 1 else f"windows of {window} x {window} positions"
        rows.append((name, f"{part.gate.site}, {reads}"))
        rows.append((f"{name}: features", features_text(part, header)))
        if part.guided is not None:
            rows.append(("start images", least_strength_text(header)))
            without, shown = part.guided.prompts
            rows.append((f"{name}: opens at", seen_text(part.gate, header)))
            first = " and ".join(f"{t:g}" for t in part.gate.times[:LOOKS].flip(0).tolist())
            rows.append((f"{name}: looks first", f"at start images noised to t = {first}, in one more forward a call"))
            rows.append(("guided correction", f"from {shown!r} to {without!r}, weight {part.guided.weight:g}"))
            rows.append(("guided correction: cost", GUIDED_COST))
        elif header.tradeoff:
            rows += tradeoff_rows(name, header)
    return rows


def _listed(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
