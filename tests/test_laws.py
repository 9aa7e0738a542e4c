"""The laws of the design, one short test each (law 13: tests/eraser/test_routes.py); tests of each part go further."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import pipelines
from helpers.canvas_cells import notes_on, target_cells
from helpers.erasers import FAMILIES, SHUT, SITES, make_correction, make_eraser, make_gate, random
from helpers.scaling import scale
from neuraleraser.canvas import words
from neuraleraser.concepts import canvas_concept
from neuraleraser.eraser import CORRECTION_KINDS, Eraser, EraserHeader, Provenance, attach
from neuraleraser.errors import EraserNotAppliedError, FileError, SplitError
from neuraleraser.methods import EraserMethod
from neuraleraser.sae import SAE, TrainSettings, pool_batches, train
from neuraleraser.sampling import generate
from neuraleraser.settings import EvaluateSettings, Sampling
from neuraleraser.sites import Site, denoiser
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS

family = pytest.mark.parametrize("family", FAMILIES)


def hooks(pipe: Any) -> list[str]:
    """Everything that an eraser could have left behind."""
    found = [name for name in vars(pipe) if name == "progress_bar" or name.startswith("_neuraleraser")]
    for part in pipe.components.values():
        for path, module in part.named_modules() if isinstance(part, nn.Module) else ():
            found += [path for name, held in vars(module).items() if "hooks" in name and held]
            found += [
                path for name in vars(module) if name == "_compiled_call_impl" or name.startswith("_neuraleraser")
            ]
    return found


@family
def test_law_1_identity(family: str) -> None:
    pipe = pipelines.BUILDERS[family]()
    base = pipelines.run(pipe, 0, n=2)
    acting = make_eraser(family)
    with attach(pipe, acting):
        assert not torch.equal(pipelines.run(pipe, 0, n=2), base)
    assert not hooks(pipe) and torch.equal(pipelines.run(pipe, 0, n=2), base)
    with pytest.raises(ZeroDivisionError), attach(pipe, acting):
        pipelines.run(pipe, 0)
        raise ZeroDivisionError
    assert not hooks(pipe) and torch.equal(pipelines.run(pipe, 0, n=2), base)
    silent = [
        make_eraser(family, kind, seed=i + 1, name=kind, **SHUT) for i, kind in enumerate(sorted(CORRECTION_KINDS))
    ]
    no_feature = make_eraser(family, threshold=1e6, name="no feature")
    with attach(pipe, [*silent, no_feature, acting], [1.0, 1.0, 2.0, 0.0]) as trace:
        assert torch.equal(pipelines.run(pipe, 0, n=2), base)
    assert {name for names in trace.fired.values() for name in names} == {"Cats"}  # at strength 0 it is still seen


def test_law_2_the_edit() -> None:
    """Ablating features of an SAE that reconstructs badly subtracts what those features write, and no more."""
    d = 8
    decoder = nn.functional.normalize(random(16, d, seed=1), dim=1)
    sae = SAE(random(16, d, seed=2), random(16, seed=3), decoder, 9 * random(d, seed=4), torch.full((16,), 0.5))
    x, chosen = random(2, 6, d, seed=5), torch.tensor([0, 3])
    z = sae.encode(x)
    assert float((sae.decode(z) - x).norm() / x.norm()) > 0.5
    edited = x + scale(sae, Site("unet"), chosen, torch.tensor([1.0])).delta(x, torch.zeros(2))
    torch.testing.assert_close(edited, x - z[..., chosen] @ decoder[chosen], atol=1e-4, rtol=1e-4)


@family
@pytest.mark.parametrize("steps", [2, 5])
def test_law_3_time_is_data(family: str, steps: int) -> None:
    """The gate is open in one of two halves of time alone, whatever the number of steps."""
    pipe = pipelines.BUILDERS[family]()
    e = make_eraser(family, times=(0.0, 400.0))
    early = dataclasses.replace(e.gate, low=torch.tensor([1e6, 0.0]), high=torch.tensor([2e6, 1e-3]))
    with attach(pipe, Eraser(early, e.corrections, e.header)) as trace:
        pipelines.run(pipe, 0, steps=steps)
    times = [float(t) * (1e-3 if family == "flux" else 1.0) for t in pipe.scheduler.timesteps]
    late = [t for t in times if t > float(e.gate.times.mean())]
    assert trace.fired == {0: {"Cats": pytest.approx(late)}} and (steps == 2 or len(late) < len(times))
    unsorted = dataclasses.replace(e.gate, times=e.gate.times.flip(0))
    assert Eraser(unsorted, e.corrections, e.header).validation_error() is not None


@pytest.mark.parametrize("kind", sorted(CORRECTION_KINDS))
def test_law_4_features_stand_alone(kind: str) -> None:
    pipe = pipelines.stable_diffusion()
    e = make_eraser(kind=kind, low=0.0, high=20.0)
    with attach(pipe, e):
        one, other = (pipelines.run(pipe, 0, n=3, generator=seeded(0, *more)) for more in ((1, 2), (8, 9)))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(s) for s in seeds]


@family
def test_law_5_differentiable(family: str) -> None:
    pipe = pipelines.BUILDERS[family]()
    given = pipelines.embeds(pipe)
    given["prompt_embeds"].requires_grad_()
    e = make_eraser(family, low=0.0, high=50.0)  # half open: the gradient has to pass the gate as well
    with attach(pipe, e):
        pipelines.run(pipe, 0, grad=True, **given).square().sum().backward()
    slope = given["prompt_embeds"].grad.clone()
    given["prompt_embeds"].grad.zero_()
    pipelines.run(pipe, 0, grad=True, **given).square().sum().backward()
    assert slope.abs().sum() > 0 and not torch.equal(slope, given["prompt_embeds"].grad)


@family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_law_6_any_shape(family: str, dtype: torch.dtype) -> None:
    pipe = pipelines.BUILDERS[family]().to(dtype)
    settings: dict[str, Any] = {"height": 16, "width": 8, "guidance": 1.0}
    base = pipelines.run(pipe, 0, **settings)
    with attach(pipe, make_eraser(family, **SHUT)):
        assert torch.equal(pipelines.run(pipe, 0, **settings), base)
    for kind in sorted(CORRECTION_KINDS):
        with attach(pipe, make_eraser(family, kind, share=0.1)):
            out = pipelines.run(pipe, 0, **settings)
        assert out.dtype == dtype and bool(torch.isfinite(out).all()) and not torch.equal(out, base)


def test_law_7_seeds_per_image() -> None:
    pipe = pipelines.stable_diffusion()
    s = Sampling(num_inference_steps=2, batch_size=3)
    prompts, seeds = ["a", "b c", "d", "e f g"], [5, 6, 7, 8]
    with attach(pipe, make_eraser(low=0.0, high=20.0)):
        whole = generate(pipe, prompts, seeds, s)
        turned = generate(pipe, prompts[::-1], seeds[::-1], s)
        alone = [generate(pipe, [p], [k], s)[0] for p, k in zip(prompts, seeds, strict=True)]
    assert (turned[::-1] == whole).all() and all((a == w).all() for a, w in zip(alone, whole, strict=True))


def test_law_8_resume(tmp_path: Path) -> None:
    settings = TrainSettings(n_features=16, k=3, steps=6, checkpoint_every=2, log_every=1, init_vectors=32, bf16=False)
    bank = random(96, 4)
    through = train(pool_batches(bank, 32), settings)

    def killed(log: Any) -> None:
        if log.step >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(pool_batches(bank, 32), settings, tmp_path / "sae", killed)
    resumed = train(pool_batches(bank, 32), settings, tmp_path / "sae")
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


def test_law_9_files_from_strangers_are_data(tmp_path: Path) -> None:
    import pickle

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "run",)

    (tmp_path / "x.safetensors").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(FileError) as caught:
        Eraser.load(tmp_path / "x.safetensors")
    assert not (tmp_path / "run").exists() and "\n" not in str(caught.value)


@family
def test_law_10_fail_closed(family: str) -> None:
    pipe = pipelines.BUILDERS[family]()
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    images: list[Tensor] = []
    with pytest.raises(EraserNotAppliedError, match="did not run"), attach(pipe, make_eraser(family)):
        setattr(pipe, name, getattr(pipelines.BUILDERS[family](), name))
        images.append(pipelines.run(pipe, 0))
    broken = pipelines.BUILDERS[family]()
    next(iter(denoiser(broken).parameters())).data.fill_(float("nan"))
    with pytest.raises(EraserNotAppliedError, match="NaN"), attach(broken, make_eraser(family)):
        images.append(pipelines.run(broken, 0))
    assert not images


@family
def test_law_11_erasers_commute(family: str) -> None:
    pipe = pipelines.BUILDERS[family]()
    given = [make_eraser(family, kind, seed=40 * i, name=str(i)) for i, kind in enumerate(sorted(CORRECTION_KINDS))]
    with attach(pipe, given):
        one = pipelines.run(pipe, 0)
    with attach(pipe, given[::-1]):
        assert torch.equal(pipelines.run(pipe, 0), one)
    at, on, d = SITES[family]
    same = make_correction(on, d, "scaling")
    a, b = (Eraser(make_gate(at, d, seed=s), (same,), EraserHeader(str(s))) for s in (1, 2))
    with attach(pipe, a):
        once = pipelines.run(pipe, 0)
    with attach(pipe, [a, b], [1.0, 0.5]):  # b shares a's features and changes them less
        torch.testing.assert_close(pipelines.run(pipe, 0), once)


def test_law_12_split() -> None:
    for name in ("Van_Gogh", "Cats"):
        reserved = words.VOCABULARY.phrases_of(name)[HELD_OUT_PHRASINGS]
        pairs = canvas_concept(name).pairs
        assert not [p for p in pairs if any(phrase in p.positive for phrase in reserved)]
        cells = target_cells(name, EvaluateSettings())
        fair = make_eraser(name=name)
        notes_on(EraserMethod(fair), cells)
        seeds, prompts = (0, cells[0].seed), (f"a picture of {reserved[0]}",)
        references = (Provenance((seeds,)), Provenance(prompts=prompts), Provenance(phrasings=(2,)))
        leaks = [{"seeds": seeds}, {"prompts": prompts}, {"seeds": None}, *({"reference": r} for r in references)]
        for leak in leaks:
            leaky = replace(fair, header=replace(fair.header, **leak))
            with pytest.raises(SplitError):
                notes_on(EraserMethod(leaky), cells)
    for sealed in (*words.SEALED_STYLES, *words.SEALED_OBJECTS):
        with pytest.raises(SplitError):
            target_cells(sealed, EvaluateSettings())
