"""Reading and editing of activations: the only code that knows diffusers' insides.

    with record(pipe, [Site("unet.mid_block.attentions.0")], lambda site, x, context: print(site, x.shape)):
        pipe("a cat")

    with edit(pipe, {site: lambda x, context: centre - x}):  # moves every activation to the centre
        pipe("a cat")

Both put plain forward hooks on the user's own modules and take them off again. Hooks never count calls: the timestep is
the one the denoiser's forward was given. An edit that did not run raises `EraserNotAppliedError` before there is a
picture, whoever runs the modules: the pipeline, another one made of them, a copy, a loop of one's own, several threads.

Limits. Compile, attach, and only then make the first call (a model that was compiled does not look for new hooks; that
is noticed and raised). A block that gradient checkpointing runs again in the backward pass is outside any denoiser
forward, so its edit raises: leave checkpointing off for models with an edit. Contexts on one pipeline stack: a later
one sees the activations that an earlier one leaves; edits of one context on one block all see the same activations.
"""

from __future__ import annotations

from neuraleraser.site import Site
from neuraleraser.sites.denoiser_calls import DenoiserCall, denoiser_calls, replay
from neuraleraser.sites.discovery import (
    candidate_sites,
    cross_attention_sites,
    default_block_site,
    default_gate_site,
    default_image_site,
    edits_for,
    text_encoder_sites,
    text_streams,
)
from neuraleraser.sites.edit import Change, Edit, EditContext, EditFunction
from neuraleraser.sites.edits import HookedEdits, edit, record, remove_copied_hooks
from neuraleraser.sites.fingerprint import Fingerprint, find_difference, made_for
from neuraleraser.sites.finished import TEXT_ARGUMENTS, FinishedForward, Step, Text, text_of
from neuraleraser.sites.forwards import Begin
from neuraleraser.sites.guard import Call, Observer
from neuraleraser.sites.modules import components, denoiser, denoisers, is_denoiser, unwrap
from neuraleraser.sites.prediction import OnForward, edit_prediction
from neuraleraser.sites.routes import (
    CONTROL_IMAGE,
    IMAGE_ROUTES,
    INPAINTING,
    INVERTED_LATENTS,
    IP_ADAPTER,
    LEARNED_EMBEDDINGS,
    NAMED,
    PARAPHRASED,
    PROMPT_ROUTES,
    ROUTES,
    START_IMAGE,
)
from neuraleraser.sites.rows import Batch, Rows, Series, current_batch, generating_batch, match_rows
from neuraleraser.sites.schedulers import NoiseLevel, input_and_target, noise_level, scheduler_steps

__all__ = [
    "CONTROL_IMAGE",
    "IMAGE_ROUTES",
    "INPAINTING",
    "INVERTED_LATENTS",
    "IP_ADAPTER",
    "LEARNED_EMBEDDINGS",
    "NAMED",
    "PARAPHRASED",
    "PROMPT_ROUTES",
    "ROUTES",
    "START_IMAGE",
    "TEXT_ARGUMENTS",
    "Batch",
    "Begin",
    "Call",
    "Change",
    "DenoiserCall",
    "Edit",
    "EditContext",
    "EditFunction",
    "Fingerprint",
    "FinishedForward",
    "HookedEdits",
    "NoiseLevel",
    "Observer",
    "OnForward",
    "Rows",
    "Series",
    "Site",
    "Step",
    "Text",
    "candidate_sites",
    "components",
    "cross_attention_sites",
    "current_batch",
    "default_block_site",
    "default_gate_site",
    "default_image_site",
    "denoiser",
    "denoiser_calls",
    "denoisers",
    "edit",
    "edit_prediction",
    "edits_for",
    "find_difference",
    "generating_batch",
    "input_and_target",
    "is_denoiser",
    "made_for",
    "match_rows",
    "noise_level",
    "record",
    "remove_copied_hooks",
    "replay",
    "scheduler_steps",
    "text_encoder_sites",
    "text_of",
    "text_streams",
    "unwrap",
]
