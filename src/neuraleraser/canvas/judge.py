"""The canvas's two judges: what they are, how they are trained, calibrated and kept.

A judge sees one 64 px picture and gives 25 style logits (one style holds) and 20 object logits (each object is
there or not; "none" is what remains when no object is over its threshold). The two have different
architectures, so that what is chosen with one can be measured with the other. The second also measures how far
a picture lies from every kind of real render (`Artefact`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from neuraleraser.canvas.artefact_distance import (
    Artefact,
    Images,
    damage_images,
    fit_artefact,
    image_features,
    round_half,
)
from neuraleraser.canvas.judge_nets import Which, build_judge
from neuraleraser.canvas.words import OBJECTS, STYLES
from neuraleraser.errors import FileError
from neuraleraser.io import tensor_file
from neuraleraser.precision import has_bf16

if TYPE_CHECKING:
    from neuraleraser.canvas.data import Renders

Through = Callable[[Images], Images]
SIZE = 64
STEPS: dict[Which, int] = {"first": 2600, "second": 3600}
"""Training steps of 64 renders; on one core about seven minutes each."""
WEIGHTS = Path(__file__).parent / "weights"


def to_tensor(images: Images) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] in -1..1, channels last."""
    return torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2).div_(127.5).sub_(1)


def augment(x: Tensor, generator: torch.Generator, noise: float = 0.03) -> Tensor:
    """Return pictures [B, 3, S, S] changed as an autoencoder may change them: they show the same.

    Shifts up to 3 px, blur of sigma 0-0.8 px, brightness and contrast by 5 %, noise of sigma 0-`noise` of 0..1.
    """
    n, size = len(x), x.shape[-1]

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((n, 1, 1, 1), generator=generator)

    shift = torch.randint(0, 7, (n, 2), generator=generator).tolist()
    padded = F.pad(x, (3, 3, 3, 3), mode="replicate")
    x = torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(padded, shift, strict=True)])
    x = x.contiguous(memory_format=torch.channels_last)
    near = torch.exp(-0.5 / draw(0.05, 0.8).square())
    far = near**4
    whole = 1 + 2 * near + 2 * far
    for dims in ((2, 2, 0, 0), (0, 0, 2, 2)):
        p = F.pad(x, dims, mode="replicate")
        rows = dims[0] == 0
        a, b, c, d, e = (p.narrow(2 if rows else 3, k, size) for k in range(5))
        x = (c + near * (b + d) + far * (a + e)) / whole
    x = x * draw(0.95, 1.05) + draw(-0.1, 0.1)
    return x + 2 * draw(0, noise) * torch.randn(x.shape, generator=generator)


def object_targets(renders: Renders, index: NDArray[np.integer] | slice) -> Tensor:
    """float32 [B, 20]: 1 where the object is in the picture."""
    pairs = torch.from_numpy(renders.objects[index].astype(np.int64))
    return torch.zeros(len(pairs), len(OBJECTS) + 1).scatter_(1, pairs % (len(OBJECTS) + 1), 1)[:, :-1]


def judge_loss(net: nn.Module, x: Tensor, style: Tensor, present: Tensor) -> Tensor:
    """Cross entropy of the style plus the objects' summed binary cross entropies, both smoothed a little."""
    style_logits, object_logits, _ = net(x)
    soft = present * 0.98 + 0.005
    objects = F.binary_cross_entropy_with_logits(object_logits.float(), soft, reduction="none").sum(1).mean()
    return F.cross_entropy(style_logits.float(), style, label_smoothing=0.02) + objects


def train_judge(
    which: Which,
    renders: Renders,
    checkpoint: Path,
    steps: int | None = None,
    batch: int = 64,
    peak: float = 3e-3,
    seed: int = 0,
    compile: bool = False,
) -> nn.Module:
    """Train a judge on `renders`; goes on from `checkpoint` if it is there. Returned in evaluation mode."""
    # Here and not above: judging needs neither diffusers nor the renderer's dependencies, training does.
    from tqdm import tqdm

    from neuraleraser.canvas.train import TrainState, index_batches

    torch.manual_seed(seed)
    steps = STEPS[which] if steps is None else steps
    net = build_judge(which).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    run = TrainState(net, checkpoint, peak, steps, ema=0.998)
    loss_of = torch.compile(judge_loss) if compile else judge_loss
    stream = index_batches(len(renders.images), batch, run.step, seed)
    with tqdm(total=steps, initial=run.step, desc=f"{which} judge", mininterval=5) as bar:
        while run.step < steps:
            index = next(stream)
            generator = torch.Generator().manual_seed(seed * 5_000_011 + run.step)
            x = augment(to_tensor(renders.images[index]), generator)
            style = torch.from_numpy(renders.style[index].astype(np.int64))
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                loss = loss_of(net, x, style, object_targets(renders, index))
            loss.backward()
            run.update()
            bar.update()
            if run.step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
    run.use_average()
    measure_norms(net, renders, seed)
    return net.eval()


@torch.no_grad()
def measure_norms(net: nn.Module, renders: Renders, seed: int) -> None:
    """Measure the norms' means and variances anew for the averaged weights, on 4096 augmented renders.

    Training never reads them, so that they need no place in its checkpoints.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over what follows
    net.train()
    generator = torch.Generator().manual_seed(seed)
    for i in range(0, min(len(renders.images), 4096), 128):
        net(augment(to_tensor(renders.images[i : i + 128]), generator))
    net.eval()


@dataclass(frozen=True)
class TrainedJudge:
    """A trained and calibrated judge; `figures` tells how it did on renders that it never saw."""

    which: Which
    net: nn.Module
    temperatures: tuple[float, float]
    style_threshold: float
    object_thresholds: tuple[float, ...]
    artefact: Artefact | None
    artefact_threshold: float | None
    figures: dict[str, Any]

    @torch.no_grad()
    def __call__(self, images: Images, batch: int = 100) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 [N, 64, 64, 3] -> P(style) [N, 25], P(object) [N, 20], artefact distance [N] if it has one."""
        styles, objects, apart = [torch.zeros(0, len(STYLES))], [torch.zeros(0, len(OBJECTS))], [torch.zeros(0)]
        for i in range(0, len(images), batch):
            x = to_tensor(images[i : i + batch])
            style, present, maps = self.net(x)
            styles.append((style / self.temperatures[0]).softmax(1))
            objects.append((present / self.temperatures[1]).sigmoid())
            if self.artefact:
                apart.append(self.artefact(image_features(x, maps)))
        return torch.cat(styles), torch.cat(objects), torch.cat(apart) if self.artefact else None

    @torch.no_grad()
    def features(self, images: Images, batch: int = 100) -> Tensor:
        """uint8 [N, 64, 64, 3], N above 0 -> what the heads read, [N, 256] or [N, 160]."""
        net: Any = self.net
        parts = [to_tensor(images[i : i + batch]) for i in range(0, len(images), batch)]
        return torch.cat([net.pool(net(x)[2][-1]) for x in parts])


@torch.no_grad()
def _logits_and_features(
    net: nn.Module, images: Images, seed: int | None = None, noise: float = 0.03
) -> tuple[Tensor, Tensor, Tensor]:
    """Style logits, object logits and features of some renders, augmented if there is a seed."""
    generator = torch.Generator().manual_seed(seed or 0)
    found = []
    for i in range(0, len(images), 100):
        x = to_tensor(images[i : i + 100])
        x = x if seed is None else augment(x, generator, noise)
        style, present, maps = net(x)
        found.append((style, present, image_features(x, maps)))
    style, present, f = (torch.cat(parts) for parts in zip(*found, strict=True))
    return style, present, f


def best_threshold(p: Tensor, there: Tensor) -> float:
    """The probability [N] that best tells where `there` [N] holds (largest F1), half way to its neighbour.

    Kept within 0.2-0.8, since beyond it would rest on one picture or two.
    """
    p, order = p.double().sort(descending=True)
    hits = there[order].double().cumsum(0)
    best = int((2 * hits / (torch.arange(len(p)) + 1 + there.sum())).argmax())
    middle = (p[best] + p[min(best + 1, len(p) - 1)]) / 2
    return float(middle.clamp(0.2, 0.8))


def _temperature(loss_of: Any) -> float:
    """The temperature of least loss between 1/4 and 4 (Guo et al. 2017, arXiv 1706.04599)."""
    grid = torch.logspace(-2, 2, 81, base=2).tolist()
    return min(grid, key=lambda t: float(loss_of(t)))


def fit_judge(
    which: Which, net: nn.Module, train: Renders, held: Renders, through: Through | None = None, fit: int = 10_000
) -> TrainedJudge:
    """Make a trained net a judge: temperatures and thresholds from the even renders of `held`, figures from the odd.

    The artefact distance is fitted to `fit` renders of `train` and all that are empty: slightly augmented, half
    of them clean too, and a quarter as they come out of `through`, the autoencoder whose pictures will be judged.
    """
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(round_half(p))
    even = np.arange(0, len(held.images), 2)
    # As the autoencoder shows them, or augmented: clean renders are judged with hardly an error, which leaves a
    # temperature and a threshold nothing to go by.
    shown, seed = (through(held.images[even]), None) if through else (held.images[even], 11)
    style_logits, object_logits, _ = _logits_and_features(net, shown, seed)
    style, there = torch.from_numpy(held.style[even].astype(np.int64)), object_targets(held, even)
    t1 = _temperature(lambda t: F.cross_entropy(style_logits / t, style))
    t2 = _temperature(lambda t: F.binary_cross_entropy_with_logits(object_logits / t, there))
    p_style, p_object = (style_logits / t1).softmax(1), (object_logits / t2).sigmoid()
    style_threshold = best_threshold(p_style.flatten(), F.one_hot(style, len(STYLES)).flatten())
    object_thresholds = tuple(best_threshold(p_object[:, k], there[:, k]) for k in range(len(OBJECTS)))
    artefact, threshold = None, None
    if which == "second":
        artefact = _fit_distance(net, train, through, fit)
        threshold = float(artefact(_logits_and_features(net, held.images[even])[2]).quantile(0.99))
    draft = TrainedJudge(which, net, (t1, t2), style_threshold, object_thresholds, artefact, threshold, {})
    figures = validate(draft, held, np.arange(1, len(held.images), 2), through)
    return TrainedJudge(**{**vars(draft), "figures": figures})


def _fit_distance(net: nn.Module, train: Renders, through: Through | None, fit: int) -> Artefact:
    """Fit the artefact distance to features of real renders: noisy, clean and, with `through`, autoencoded."""
    empty = train.objects[:, 0] < 0
    index = np.union1d(np.arange(min(fit, len(empty))), np.flatnonzero(empty))
    some, few = index[::2], index[::4]
    found = [
        _logits_and_features(net, train.images[index], seed=12, noise=0.01)[2],
        _logits_and_features(net, train.images[some])[2],
    ]
    if through:
        found.append(_logits_and_features(net, through(train.images[few]))[2])
    chosen = np.concatenate([index, some, few] if through else [index, some])
    kind = 2 * train.style[chosen].astype(np.int64) + empty[chosen]
    return fit_artefact(torch.cat(found), torch.from_numpy(kind))


def validate(
    judge: TrainedJudge, renders: Renders, index: NDArray[np.integer], through: Through | None = None
) -> dict[str, Any]:
    """Figures on some renders: accuracies (0..1) and, if it measures them, the share taken for artefacts.

    An object is right where its probability is the largest and above its threshold; two, where both are above
    theirs; none, where none is.
    """
    images = np.asarray(renders.images[index])
    style, there = torch.from_numpy(renders.style[index].astype(np.int64)), object_targets(renders, index).bool()
    figures: dict[str, Any] = {"renders": len(index)} | _accuracies(judge, images, style, there)
    made = damage_images(images)
    if through:
        made["autoencoded"] = through(images)
        figures["autoencoded"] = _accuracies(judge, made["autoencoded"], style, there)
    if judge.artefact:
        figures["flagged"] = {name: artefact_share(judge, x) for name, x in made.items()}
    return figures


def _accuracies(judge: TrainedJudge, images: Images, style: Tensor, there: Tensor) -> dict[str, Any]:
    """Return accuracies on images of known style, [N], and objects, bool [N, 20]."""
    p_style, p_object, _ = judge(images)
    over = p_object > torch.tensor(judge.object_thresholds)
    count, right = there.sum(1), p_style.argmax(1) == style
    hit = (there & over).any(1) & there.gather(1, p_object.argmax(1, keepdim=True))[:, 0]

    def share(x: Tensor) -> float | None:
        return round(x.double().mean().item(), 5) if len(x) else None

    return {
        "style": share(right),
        "object": share(hit[count == 1]),
        "both_objects": share((over | ~there).all(1)[count == 2]),
        "no_object": share(~over.any(1)[count == 0]),
        "exact_objects": share((over == there).all(1)),
        "by_style": {name: share(right[style == i]) for i, name in enumerate(STYLES)},
        "object_by_style": {name: share(hit[(count == 1) & (style == i)]) for i, name in enumerate(STYLES)},
        "by_object": {name: share(hit[(count == 1) & there[:, k]]) for k, name in enumerate(OBJECTS)},
    }


def artefact_share(judge: TrainedJudge, images: Images) -> float:
    """The share of `images` farther from all that is real than 99 % of held-out renders; 0 without a distance."""
    apart = judge(images)[2]
    if apart is None or judge.artefact_threshold is None:
        return 0.0
    return round((apart > judge.artefact_threshold).double().mean().item(), 5)


def judge_path(which: Which) -> Path:
    """Return the path of the shipped judge."""
    return WEIGHTS / f"judge-{which}.safetensors"


def save_judge(judge: TrainedJudge, path: Path) -> None:
    """Save in fp16 (the norms' running figures in fp32)."""
    tensors = {
        f"net/{k}": v if "running" in k else v.half()
        for k, v in judge.net.state_dict().items()
        if not k.endswith("num_batches_tracked")
    }
    if judge.artefact:
        tensors |= {f"artefact/{k}": v.half() for k, v in vars(judge.artefact).items()}
    kept = {k: v for k, v in vars(judge).items() if k not in ("net", "artefact")}
    tensor_file.save(path, "judge", tensors, {**kept, "styles": STYLES, "objects": OBJECTS})


def load_judge(path: Path) -> TrainedJudge:
    """Open a judge's file. Raises FileError if it is damaged or knows other styles or objects than the canvas."""
    tensors, header = tensor_file.load(path, "judge")
    if header.get("styles") != [*STYLES] or header.get("objects") != [*OBJECTS]:
        raise FileError(f"{path} judges other styles or objects than this canvas has: train the judge again")
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "artefact": {}}
    try:
        for name, x in tensors.items():
            kind, key = name.split("/", 1)
            parts[kind][key] = x.float()
        if header["which"] not in STEPS:
            raise ValueError(header["which"])
        net = build_judge(header["which"])
        net.load_state_dict(parts["net"] | {k: v for k, v in net.state_dict().items() if k.endswith("tracked")})
        artefact = Artefact(**parts["artefact"]) if parts["artefact"] else None
        net = net.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
        judge = TrainedJudge(
            header["which"],
            net,
            (float(header["temperatures"][0]), float(header["temperatures"][1])),
            float(header["style_threshold"]),
            tuple(map(float, header["object_thresholds"])),
            artefact,
            None if artefact is None else float(header["artefact_threshold"]),
            dict(header["figures"]),
        )
        if len(judge.object_thresholds) != len(OBJECTS):
            raise ValueError(judge.object_thresholds)
        judge(np.zeros((1, SIZE, SIZE, 3), np.uint8))  # shows whether its shapes fit together
        return judge
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, RuntimeError) as e:
        raise FileError(f"{path} is not a whole judge ({type(e).__name__}): train it again") from e


def through_vae(vae: Any) -> Through:
    """Pictures as diffusers' autoencoder `vae` gives them back: uint8 [N, S, S, 3] -> the same."""

    @torch.no_grad()
    def through(images: Images) -> Images:
        made = []
        for i in range(0, len(images), 50):
            with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16()):
                y = vae.decode(vae.encode(to_tensor(images[i : i + 50])).latent_dist.mean).sample
            y = ((y.float() + 1) * 127.5 + 0.5).clamp(0, 255)
            made.append(y.permute(0, 2, 3, 1).numpy().astype(np.uint8))
        return np.concatenate(made)

    return through


def train_judges(train: Renders, held: Renders, folder: Path, out: Path = WEIGHTS) -> None:
    """The whole recipe, for judges of the shipped pipeline's pictures: train on `train`, calibrate on half of
    `held`, measure on the other, save into `out`. Goes on from checkpoints in `folder`."""
    from neuraleraser.canvas.pipeline import load_pipeline

    through = through_vae(load_pipeline().vae)
    for which in STEPS:
        net = train_judge(which, train, folder / f"judge-{which}.safetensors")
        save_judge(fit_judge(which, net, train, held, through), out / judge_path(which).name)
