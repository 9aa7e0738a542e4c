"""The pipeline call that a module runs in, read from the stack.

Hooks hang in modules, which do not know who runs them: a pipeline, another one of the same modules, a copy, a subclass
with a loop of its own. The call is a frame on this thread's stack whose `self` is a pipeline. Its local variables have
the names that all of diffusers' pipelines use.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from neuraleraser.families import known_names
from neuraleraser.sites.rows import Batch, CallFacts, current_batch

_LATENTS = ("latents", "intermediate_images")  # one row per image, in every pipeline that has one of them


@dataclass(frozen=True)
class Caller:
    """A pipeline that is running in this thread, and what its call says.

    variables: the local variables of its call, by name.
    """

    pipeline: DiffusionPipeline
    facts: CallFacts
    variables: Mapping[str, Any]


def find_caller() -> Caller | None:
    """Return the innermost pipeline that runs in this thread; None where modules are called outside any."""
    frame, pipeline, variables = sys._getframe(1), None, {}
    while frame is not None:
        if frame.f_code.co_varnames[:1] == ("self",):
            found = frame.f_locals.get("self")
            if isinstance(found, DiffusionPipeline):
                if pipeline is not None and found is not pipeline:
                    break  # one pipeline calls another: only the inner one draws
                pipeline = found
                variables = {**frame.f_locals, **variables}  # of a helper's and its call's, the helper's
                if frame.f_code.co_name == "__call__":
                    break
        frame = frame.f_back
    return None if pipeline is None else Caller(pipeline, _call_facts(pipeline, variables), variables)


def _call_facts(pipeline: DiffusionPipeline, variables: dict[str, Any]) -> CallFacts:
    """Return what the local variables of a pipeline's call say about its batch."""
    images = next((len(variables[n]) for n in _LATENTS if isinstance(variables.get(n), Tensor)), None)
    prompt, negative = variables.get("prompt_embeds"), variables.get("negative_prompt_embeds")
    return CallFacts(
        images=images,
        prompt_text=prompt if isinstance(prompt, Tensor) else None,
        negative_text=negative if isinstance(negative, Tensor) else None,
        guidance=_read_guidance_scale(pipeline, variables),
    )


def _read_guidance_scale(pipeline: DiffusionPipeline, variables: dict[str, Any]) -> float | None:
    """Return the scale of classifier-free guidance; not the distilled one, where there are both."""
    for name in known_names(lambda family: family.guidance_names):
        if isinstance(variables.get(name), (int, float)):
            return float(variables[name])
    given = variables.get("guidance_scale")
    if given is None:  # a loop of its own: what the last call left on the pipeline says nothing of it
        return None
    now = pipeline.__dict__.get("_guidance_scale", given)  # a callback may change it between steps
    return float(now) if isinstance(now, (int, float)) else None


class CallIdentity:
    """Identity of one drawing in one thread: pipeline, schedule and batch.

    Schedulers make a new tensor of timesteps for each drawing, so a call lasts as long as that tensor is the same.
    """

    def __init__(self, pipeline: Any, schedule: Any) -> None:
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.schedule = None if schedule is None else weakref.ref(schedule)
        self.batch: Batch | None = current_batch()

    def matches(self, pipeline: Any, schedule: Any) -> bool:
        """Return True if a forward run by `pipeline` with the timesteps `schedule` belongs to this drawing."""
        return (
            (self.pipeline() if self.pipeline else None) is pipeline
            and (self.schedule() if self.schedule else None) is schedule
            and self.batch is current_batch()
        )
