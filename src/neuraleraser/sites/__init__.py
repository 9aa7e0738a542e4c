"""Where activations are read and edited: the only code that knows diffusers' insides.

    with record(pipe, [Site("unet.mid_block.attentions.0")], on=lambda site, x, call: print(site, x.shape)):
        pipe("a cat")

    with edit(pipe, {site: lambda x, call: centre - x}):   # add to every activation what leads to the centre
        pipe("a cat")

Both hang plain forward hooks on the user's own modules and take them off again. Hooks never count calls:
the timestep is the one the denoiser's forward was given. An edit that did not run raises `NotApplied`
before the pipeline returns an image.

Limits. Attach before the first compiled call (a compiled model does not look for new hooks; that is noticed
and raised). A block that gradient checkpointing runs again in the backward pass is outside any denoiser
forward, so its edit raises: leave checkpointing off for models with an edit. Contexts on one pipeline stack:
a later one sees the activations that an earlier one leaves; edits of one context on one block all see the
same activations.
"""

from __future__ import annotations

from neuraleraser.sites.attach import Edits, edit, record
from neuraleraser.sites.calls import DenoiserCall, denoiser_calls, replay
from neuraleraser.sites.candidates import candidate_sites, cross_attention_sites, text_encoder_sites, text_streams
from neuraleraser.sites.hooks import Call, Edit
from neuraleraser.sites.model import differs, made_for
from neuraleraser.sites.noise import noised, scheduler_steps
from neuraleraser.sites.place import DENOISERS, Site, denoiser

__all__ = [
    "DENOISERS",
    "Call",
    "DenoiserCall",
    "Edit",
    "Edits",
    "Site",
    "candidate_sites",
    "cross_attention_sites",
    "denoiser",
    "denoiser_calls",
    "differs",
    "edit",
    "made_for",
    "noised",
    "record",
    "replay",
    "scheduler_steps",
    "text_encoder_sites",
    "text_streams",
]
