"""Refusing what skips blocks: with diffusers' caches on, a block may hand back what it gave at another step."""

from __future__ import annotations

from torch import nn

from neuraleraser.errors import EraserNotAppliedError

# diffusers' hooks that move or cast a module's weights and change nothing of what it computes. All others are
# refused, unknown ones too: caches (first block, faster, mag, sea, Taylor, pyramid attention, text keys) skip
# blocks or replay old results, layer skip passes a block's input through, and context parallelism cuts an image's
# positions into shards that a gate would take for whole images.
_HARMLESS = {
    "group_offloading",
    "layer_execution_tracker",
    "lazy_prefetch_group_offloading",
    "layerwise_casting",
    "peft_autocast_disable",
}


def check_caches(name: str, component: nn.Module) -> None:
    """EraserNotAppliedError where `component`, the pipeline's `name`, carries a hook of diffusers that may skip a
    block.

    A skipped block's forward hooks still run, on activations that are not of this step: nothing else would tell.
    """
    for path, part in component.named_modules():
        for hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", ()):
            if hook not in _HARMLESS:
                raise EraserNotAppliedError(
                    f"{name}.{path} carries diffusers' hook {hook!r}, which may skip or replay blocks, so that an edit "
                    f"would act on activations of another step: call pipe.{name}.disable_cache(), or take it off."
                )
