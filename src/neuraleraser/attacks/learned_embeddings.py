"""Textual inversion as an attack: embeddings, learned on pictures of a concept, that stand in for its words.

Concept inversion (Pham et al., "Circumventing Concept Erasure Methods", ICLR 2024) learns one embedding through the
erased model. Here they may be several, and an attacker who has the eraser's file may blind its gates as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuraleraser.attacks.denoising import Context, attacked, check_one_encoder, chosen, denoising_target
from neuraleraser.attacks.latents import latents_of
from neuraleraser.eraser import Gate
from neuraleraser.eraser.gate import time_bin
from neuraleraser.errors import SettingsError
from neuraleraser.sampling import Images
from neuraleraser.settings import MAX_COUNT, check_whole
from neuraleraser.sites import EditContext, Site, record

WORD = "<learned>"
"""Stands in prompts for the embeddings."""
_LEARNING_RATE = 0.1
"""Of Adam, in units of the vocabulary's spread."""
_MARGIN = 0.1
"""How far below its bound a blinded gate's evidence is pushed, as a share of the bound."""


def learn_embeddings(
    pipe: Any,
    images: Images,
    prompts: Sequence[str],
    *,
    applied: Context = nullcontext,
    gates: Sequence[Gate] = (),
    blinding: float = 0.0,
    count: int = 3,
    steps: int = 300,
    batch_size: int = 12,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Tensor:
    """Learn embeddings with which the denoiser predicts pictures of a concept.

    The loss is the denoiser's own: the squared error of its prediction, at noise levels drawn evenly. Gradients go
    through everything that `applied` attaches.

    Args:
        pipe: A pipeline with one text encoder, as Stable Diffusion 1 and 2 are.
        images: Pictures of the concept, uint8 [N, H, W, 3].
        prompts: A prompt for each, which holds the word "<learned>" where the embeddings stand.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        gates: Gates that the attacker knows.
        blinding: Weight of the loss for their evidence above their bounds.
        count: Embeddings, which stand one behind the other.
        steps: Steps of Adam.
        batch_size: Pictures in a step.
        seed: Of the words that it starts from, the noise and the order.
        on_step: Called as `on_step(step, loss)`.

    Returns:
        The embeddings [count, d], in the form that `pipe.load_textual_inversion` takes.

    Raises:
        SettingsError: The pipeline has several text encoders or none, there are no images, not as many prompts, a
            prompt lacks the word, or the count is below 1.
        DataError: The images are of another shape or type.

    Examples:
        >>> prompts = ["a picture of <learned>", "<learned>"]
        >>> vectors = learn_embeddings(pipe, images, prompts, count=2, steps=2, batch_size=2)
        >>> vectors.shape
        torch.Size([2, 128])
    """
    check_inversion(pipe, images, prompts, count)
    generator = torch.Generator().manual_seed(seed)
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    start = table[torch.randint(len(table), (count,), generator=generator)].float()
    spread = float(table.float().std())
    vectors = torch.nn.Parameter(start.clone())
    adam = torch.optim.Adam([vectors], lr=_LEARNING_RATE * spread)
    latents = latents_of(pipe, images).cpu()
    last = int(pipe.scheduler.config["num_train_timesteps"])
    evidence: list[Tensor] = []

    def on_activations(site: Site, x: Tensor, context: EditContext[None]) -> None:
        evidence.extend(_above_bound(gate, x, context) for gate in gates if gate.site == site)

    with ExitStack() as stack:
        predict = stack.enter_context(attacked(pipe, applied, learned_word(pipe, vectors)))
        if blinding and gates:
            stack.enter_context(record(pipe, {gate.site for gate in gates}, on_activations))
        for step in range(steps):
            some = torch.randint(len(latents), (batch_size,), generator=generator)
            times = torch.randint(last, (batch_size,), generator=generator)
            noise = torch.randn(latents[some].shape, generator=generator)
            noisy, target = denoising_target(pipe, latents[some], noise, times)
            evidence.clear()
            with torch.enable_grad():
                prediction = predict(noisy, times, chosen(prompts, some))
                loss = F.mse_loss(prediction, target.float())
                if evidence:
                    loss = loss + blinding * torch.stack(evidence).mean()
                adam.zero_grad(set_to_none=True)
                loss.backward()
            for group in adam.param_groups:
                group["lr"] = _LEARNING_RATE * spread * min(1.0, 1.2 * (1 - step / steps))
            adam.step()
            if on_step:
                on_step(step, float(loss.detach()))
    return vectors.detach().cpu()


@contextmanager
def learned_word(pipe: Any, vectors: Tensor | Sequence[Tensor]) -> Iterator[None]:
    """Context manager: prompts may hold the word "<learned>", in whose place these embeddings [count, d] stand.

    As with a textual inversion of diffusers, of several embeddings each is a token; but none is added to the model.

    Args:
        pipe: The diffusers pipeline.
        vectors: The embeddings; of a list, what it holds at each call.

    Returns:
        The context.

    Examples:
        >>> with learned_word(pipe, 0.1 * torch.randn(2, 128)):
        ...     drawn = generate(pipe, ["a cat <learned>"], [0], quick)
        >>> drawn.shape
        (1, 64, 64, 3)
    """
    known, table = pipe.tokenizer, pipe.text_encoder.get_input_embeddings()
    pipe.tokenizer = copy.deepcopy(known)
    tokens = [WORD, *(f"{WORD}_{k}" for k in range(1, len(vectors)))]
    pipe.tokenizer.add_tokens(tokens)  # diffusers reads the first as all of them
    first = pipe.tokenizer.convert_tokens_to_ids(WORD)

    def embed(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        return (args[0].clamp(max=first - 1),)

    def put(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        ids = given.pop()
        for k, vector in enumerate(vectors):
            output = torch.where((ids == first + k)[..., None], vector.to(output), output)
        return output

    given: list[Tensor] = []
    handles = table.register_forward_pre_hook(embed), table.register_forward_hook(put)
    try:
        yield
    finally:
        pipe.tokenizer = known
        for handle in handles:
            handle.remove()


def _above_bound(gate: Gate, x: Tensor, context: EditContext[None]) -> Tensor:
    """Return the mean share by which the evidence exceeds a little less than its bound."""
    low = gate.low[time_bin(gate.times, context.timestep)].to(x.device)
    evidence = gate.evidence(x, context.grid)
    usual = gate.low[gate.low < 1e6].median()
    return torch.where(low < 1e6, (evidence / low - 1 + _MARGIN).relu() * (low / usual).clamp(max=1), 0).mean()


def check_inversion(pipe: Any, images: Images, prompts: Sequence[str], count: int) -> None:
    """Raise SettingsError for a pipeline of another kind, or prompts or a count that do not fit."""
    check_one_encoder(pipe)
    check_whole("count", count, 1, MAX_COUNT)
    if not 0 < len(images) == len(prompts):
        raise SettingsError(f"{len(images)} images, {len(prompts)} prompts: pass a prompt for each, and some")
    for prompt in prompts:
        if WORD not in prompt:
            raise SettingsError(f"the prompt {prompt!r} does not hold {WORD}: put it where the concept stands")
