"""Training the canvas from nothing: the autoencoder, then the denoiser and the text encoder together.

    neuraleraser canvas train --folder runs/canvas

Each stage checkpoints every minute into the folder and goes on from there when run again; finished stages are
skipped. On two CPU cores the autoencoder takes about a quarter of an hour and the denoiser hours. Learning rates
decay only at the end of a run, so a longer run may start from a shorter one's weights.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from neuraleraser.canvas.data import Renders, render_set
from neuraleraser.canvas.muon import Muon
from neuraleraser.canvas.pipeline import (
    MAX_TOKENS,
    WEIGHTS,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    load_pipeline,
)
from neuraleraser.canvas.recipe import TrainCanvas
from neuraleraser.canvas.words import NONE, OBJECTS, caption
from neuraleraser.errors import DataError, FileError, SettingsError
from neuraleraser.io import tensor_file
from neuraleraser.io.atomic import replacing_folder
from neuraleraser.precision import has_bf16

CHECKPOINT_SECONDS = 60.0


def learning_rate(step: int, steps: int, peak: float, warm: int = 100, decay: float = 0.3) -> float:
    """Warm up, hold, then fall to nothing over the last `decay` of the run (trapezoid)."""
    fall = (steps - step) / max(1, round(steps * decay))
    return peak * min((step + 1) / warm, 1.0, max(fall, 0.0))


class TrainState:
    """A module with its optimiser, its running average and its checkpoint on disk.

    Give the module its memory format first: the fused optimiser walks a parameter and its moments in the order they
    lie in memory, and does not notice when the two differ.
    Goes on from the checkpoint if there is one; killed and made anew it ends in the same bits, provided that the
    caller's gradients are a function of `step`. Raises FileError for another module's checkpoint.
    """

    def __init__(self, module: nn.Module, path: Path, peak: float, steps: int, ema: float = 0.999) -> None:
        self.module, self.path, self.peak, self.steps, self.ema = module, path, peak, steps, ema
        self.params = dict(module.named_parameters())
        self.average = {k: p.detach().clone() for k, p in self.params.items()}
        inner = {k: p for k, p in self.params.items() if _is_inner(k, p)}
        outer = [p for k, p in self.params.items() if k not in inner]
        self.muon = Muon(list(inner.values()))
        self.momentum = dict(zip(inner, self.muon.momentum, strict=True))
        self.adam = torch.optim.AdamW(outer, lr=peak, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.step = 0
        self._saved = time.monotonic()
        if path.exists():
            self._load()

    def update(self) -> None:
        """One optimiser step from the gradients at hand; checkpoints when a minute has passed."""
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        lr = learning_rate(self.step, self.steps, self.peak)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        self.muon.step(lr)
        self.module.zero_grad(set_to_none=True)
        self.step += 1
        rate = min(self.ema, (1 + self.step) / (10 + self.step))
        weights = [p.detach() for p in self.params.values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - rate)  # pyright: ignore[reportPrivateImportUsage]
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS or self.step == self.steps:
            self.save()

    def save(self) -> None:
        """Write the checkpoint now: `param/` and `average/` of each parameter, and its `momentum/`, or `exp_avg/`
        and `exp_avg_sq/`."""
        tensors = {f"param/{k}": p.detach() for k, p in self.params.items()}
        tensors |= {f"average/{k}": v for k, v in self.average.items()}
        tensors |= {f"momentum/{k}": v for k, v in self.momentum.items()}
        for k, p in self.params.items():
            if k not in self.momentum:
                tensors |= {f"{name}/{k}": self.adam.state[p][name] for name in ("exp_avg", "exp_avg_sq")}
        tensor_file.save(self.path, "checkpoint", tensors, {"step": self.step})
        self._saved = time.monotonic()

    def _load(self) -> None:
        """Go on from the checkpoint. Raises FileError where it is of another module."""
        tensors, header = tensor_file.load(self.path, "checkpoint")
        expected = {
            f"{group}/{k}": p.shape
            for k, p in self.params.items()
            for group in ("param", "average", *(["momentum"] if k in self.momentum else ["exp_avg", "exp_avg_sq"]))
        }
        if {k: x.shape for k, x in tensors.items()} != expected or not isinstance(header.get("step"), int):
            raise FileError(f"{self.path} is a checkpoint of another module: delete it, or train in another folder")
        self.step = header["step"]
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(tensors[f"param/{k}"])
                self.average[k].copy_(tensors[f"average/{k}"])
                if k in self.momentum:
                    self.momentum[k].copy_(tensors[f"momentum/{k}"])
                    continue
                # On disk all is contiguous; `empty_like` has the parameter's own strides.
                self.adam.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": torch.empty_like(p).copy_(tensors[f"exp_avg/{k}"]),
                    "exp_avg_sq": torch.empty_like(p).copy_(tensors[f"exp_avg_sq/{k}"]),
                }

    def use_average(self) -> None:
        """Put the running average into the module (for use, not for more training)."""
        with torch.no_grad():
            for k, p in self.params.items():
                p.copy_(self.average[k])


def _is_inner(name: str, p: Tensor) -> bool:
    """True if a weight maps features to features, and so is Muon's; ends, embeddings, norms and biases are Adam's."""
    return p.ndim >= 2 and not any(word in name for word in ("conv_in", "conv_out", "embeddings.", "quant_conv"))


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 [B, S, S, 3] -> float32 [B, 3, S, S] in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def index_batches(n: int, size: int, start: int, seed: int) -> Iterator[np.ndarray]:
    """Index batches [size] from step `start` on: a pure function of (seed, step), each epoch its own permutation.

    The last `n % size` of an epoch's order are left out. Raises SettingsError if there is less than one batch.
    """
    if size > n:
        raise SettingsError(f"{n} renders are fewer than a batch of {size}: render more, or lower batch")
    per_epoch = n // size
    step = start
    while True:
        order = np.random.default_rng((seed, step // per_epoch)).permutation(n)
        for i in range(step % per_epoch, per_epoch):
            yield np.sort(order[i * size : (i + 1) * size])
            step += 1


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences of neighbours along height and along width."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def vae_loss(vae: AutoencoderKL, x: Tensor, noise: Tensor) -> Tensor:
    """Loss of `x` [B, 3, S, S] in the autoencoder, `noise` [B, 8, S/4, S/4] being the posterior's draw.

    Absolute and squared error of pixels, absolute error of their slopes, and a weak pull of the latents towards
    a unit normal.
    """
    posterior = vae.encode(x, return_dict=False)[0]
    z = posterior.mean + posterior.std * noise
    y = vae.decode(z, return_dict=False)[0].float()  # pyright: ignore[reportArgumentType]
    slopes = sum((a - b).abs().mean() for a, b in zip(_differences(y), _differences(x), strict=True))
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    return F.l1_loss(y, x) + F.mse_loss(y, x) + 0.2 * slopes + 1e-4 * kl


def _init_small_residuals(vae: AutoencoderKL) -> None:
    """Start with little noise in the latents and small residual branches: otherwise the first thousand steps
    go by before the autoencoder draws more than the mean colour."""
    head = vae.quant_conv
    assert head is not None and head.bias is not None
    with torch.no_grad():
        head.bias[8:] -= 6  # log-variance of the posterior
        head.weight[8:] *= 0.1
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(0.1)
                assert module.conv2.bias is not None
                module.conv2.bias.zero_()


def train_vae(renders: Renders, settings: TrainCanvas) -> AutoencoderKL:
    """Train the autoencoder on renders; sets its scaling factor so that latents have unit spread."""
    torch.manual_seed(settings.seed)
    vae = build_vae()
    _init_small_residuals(vae)
    vae.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = TrainState(vae, settings.folder / "vae.safetensors", 1e-3, settings.vae_steps, ema=0.998)
    stream = index_batches(len(renders.images), 32, run.step, settings.seed)
    with tqdm(total=settings.vae_steps, initial=run.step, desc="autoencoder", mininterval=5) as bar:
        while run.step < settings.vae_steps:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + run.step)
            # Convolutions are local: quarter-size crops teach as much a pixel and let more pictures in.
            top, left = (4 * int(torch.randint(0, 9, (), generator=generator)) for _ in range(2))
            x = to_tensor(renders.images[next(stream), top : top + 32, left : left + 32])
            x = x.to(memory_format=torch.channels_last)
            noise = torch.randn(len(x), 8, 8, 8, generator=generator)
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                loss = vae_loss(vae, x, noise)
            loss.backward()
            run.update()
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    run.use_average()
    vae.eval()
    spread = encode_renders(vae, renders.images[:2000]).std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


@torch.no_grad()
def encode_renders(vae: AutoencoderKL, images: np.ndarray, size: int = 100) -> Tensor:
    """Posterior means of renders, unscaled: uint8 [N, S, S, 3] -> bfloat16 [N, 8, S/4, S/4]."""
    out = []
    for i in tqdm(range(0, len(images), size), desc="latents", mininterval=5, disable=len(images) < 5000):
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
            x = to_tensor(images[i : i + size]).to(memory_format=torch.channels_last)
            out.append(vae.encode(x, return_dict=False)[0].mean.bfloat16())
    return torch.cat(out)


def time_weights() -> Tensor:
    """Frequency with which each timestep is trained on, float64 [1000], sums to 1.

    Velocity loss weighs the error of the clean image by snr + 1; capping that at 6 keeps nearly clean
    steps from taking the budget (after min-SNR weighting, Hang et al. 2023), by drawing them less often.
    """
    alphas = build_scheduler().alphas_cumprod.double()
    inverse = 1 - alphas  # = 1 / (snr + 1)
    w = torch.clamp(6 * inverse, max=1)
    return w / w.sum()


def denoiser_loss(net: nn.ModuleDict, z: Tensor, ids: Tensor, noise: Tensor, t: Tensor, alphas: Tensor) -> Tensor:
    """Velocity prediction (Salimans and Ho 2022, section 4): v = sqrt(a) noise - sqrt(1 - a) z.

    `net` holds "unet" and "text_encoder"; `z` and `noise` [B, 8, H, W], `ids` and `t` integers [B, tokens] and
    [B], `alphas` [1000] the scheduler's cumulative products. Returns the mean squared error.
    """
    a = alphas[t].view(-1, 1, 1, 1)
    noisy = a.sqrt() * z + (1 - a).sqrt() * noise
    target = a.sqrt() * noise - (1 - a).sqrt() * z
    text = net["text_encoder"](ids)[0]
    return F.mse_loss(net["unet"](noisy, t, text).sample.float(), target)


def draw_times(n: int, cumulative: np.ndarray, generator: torch.Generator) -> Tensor:
    """Timesteps int64 [n] by their `cumulative` weights [1000], one from each of n equal shares."""
    u = (torch.arange(n) + torch.rand(n, generator=generator)) / n
    return torch.from_numpy(np.searchsorted(cumulative, u.numpy()).clip(0, 999))


def draw_captions(renders: Renders, index: np.ndarray, rng: random.Random) -> list[str]:
    """A caption for each of the renders `index`; one in ten is empty, for classifier-free guidance."""
    contents = [renders.content(int(i)) for i in index]
    return ["" if rng.random() < 0.1 else caption(c.objects, c.style, rng) for c in contents]


def training_indices(renders: Renders, twice: Sequence[str]) -> np.ndarray:
    """Indices of the renders to draw batches from: all, and once more those that show an object of `twice` (or none at
    all, where "none" is among them)."""
    again = np.isin(renders.objects, [OBJECTS.index(o) for o in twice if o != NONE]).any(1)
    if NONE in twice:
        again |= (renders.objects < 0).all(1)
    return np.concatenate([np.arange(len(renders.images)), np.flatnonzero(again)])


def _latents(renders: Renders, vae: AutoencoderKL, path: Path) -> Tensor:
    """All renders encoded, unscaled: from `path` if it is there, else made and kept there."""
    if path.exists():
        latents = tensor_file.load(path, "latents")[0]["latents"]
        if len(latents) != len(renders.images):
            raise DataError(f"{path} holds {len(latents)} latents, expected {len(renders.images)}: delete it")
        return latents
    latents = encode_renders(vae, renders.images)
    tensor_file.save(path, "latents", {"latents": latents}, {})
    return latents


def train_denoiser(renders: Renders, vae: AutoencoderKL, settings: TrainCanvas) -> StableDiffusionPipeline:
    """Train UNet and text encoder together, with classifier-free guidance.

    Goes on from the checkpoint in `settings.folder`, and stops early after `settings.minutes`. Raises
    SettingsError if the loss is no longer a number; the checkpoint is then one from before.
    """
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer()
    unet, text_encoder = build_unet(), build_text_encoder(tokenizer)
    if settings.warm_start:
        shipped = load_pipeline()
        unet.load_state_dict(shipped.unet.state_dict())
        text_encoder.load_state_dict(shipped.text_encoder.state_dict())
    unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    net = nn.ModuleDict({"unet": unet, "text_encoder": text_encoder})
    run = TrainState(net, settings.folder / "denoiser.safetensors", settings.learning_rate, settings.steps)
    if run.step < settings.steps:
        latents = _latents(renders, vae, settings.folder / "latents.safetensors")
        # Backward through the fused attention kernel is three times slower than plain products on a CPU.
        unet.set_attn_processor(AttnProcessor())
        _denoise(net, run, renders, latents, float(vae.config["scaling_factor"]), tokenizer, settings)
        unet.set_attn_processor(AttnProcessor2_0())
    run.use_average()
    return assemble(unet.eval(), vae, text_encoder.eval(), tokenizer)


def _denoise(
    net: nn.ModuleDict,
    run: TrainState,
    renders: Renders,
    latents: Tensor,
    scale: float,
    tokenizer: CLIPTokenizer,
    settings: TrainCanvas,
) -> None:
    """The denoiser's steps, from `run.step` on. What a step sees is a pure function of (seed, step)."""
    loss_of = torch.compile(denoiser_loss) if settings.compile else denoiser_loss
    alphas = build_scheduler().alphas_cumprod.float()
    cumulative = np.cumsum(time_weights().numpy())
    order = training_indices(renders, settings.twice)
    stream = index_batches(len(order), settings.batch, run.step, settings.seed + 1)
    mean, started = None, time.monotonic()
    with tqdm(total=settings.steps, initial=run.step, desc="denoiser", mininterval=5) as bar:
        while run.step < settings.steps:
            index = order[next(stream)]
            texts = draw_captions(renders, index, random.Random(settings.seed * 7_777_777 + run.step))
            ids = tokenizer(
                texts, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
            ).input_ids
            generator = torch.Generator().manual_seed(settings.seed * 3_000_017 + run.step)
            z = latents[torch.from_numpy(index)].float() * scale
            noise = torch.randn(z.shape, generator=generator)
            t = draw_times(len(z), cumulative, generator)
            z, noise = (x.to(memory_format=torch.channels_last) for x in (z, noise))
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                loss = loss_of(net, z, ids, noise, t, alphas)
            if not math.isfinite(value := loss.item()):
                raise SettingsError(f"loss became {value} at step {run.step}: lower learning_rate and run again")
            loss.backward()
            run.update()
            bar.update()
            mean = value if mean is None else 0.99 * mean + 0.01 * value
            if run.step % 50 == 0:
                bar.set_postfix(loss=f"{mean:.4f}")
            if settings.minutes and time.monotonic() - started > settings.minutes * 60:
                run.save()
                return


def _shipped_vae() -> AutoencoderKL:
    """The autoencoder whose latents the shipped denoiser draws: another's would mean nothing to it."""
    shipped, vae = load_pipeline().vae, build_vae()  # made anew: one that was opened would save where it lay
    vae.load_state_dict(shipped.state_dict())
    vae.register_to_config(scaling_factor=float(shipped.config["scaling_factor"]))
    return vae.eval()


def save_pipeline(pipe: StableDiffusionPipeline, folder: Path = WEIGHTS / "pipeline") -> None:
    """Save in diffusers' layout as fp16 safetensors, beside the old one first, then in its place.

    Leaves `pipe` in float32 with the rounded weights: what was measured is what was saved.
    """
    with replacing_folder(folder) as temp_folder:
        pipe.to(dtype=torch.float16)
        pipe.save_pretrained(temp_folder, safe_serialization=True)
        pipe.to(dtype=torch.float32)


def train(settings: TrainCanvas) -> StableDiffusionPipeline:
    """The whole recipe, from renders to a saved pipeline in `settings.folder`."""
    torch.set_float32_matmul_precision("high")
    renders = render_set(settings.renders, seed=1, folder=settings.folder)
    vae = _shipped_vae() if settings.warm_start else train_vae(renders, settings)
    pipe = train_denoiser(renders, vae, settings)
    save_pipeline(pipe, settings.folder / "pipeline")
    return pipe
