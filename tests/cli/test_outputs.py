"""The command line: outputs are checked before the work, and kept where they cannot be written after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.commands import FEW, refused
from helpers.erasers import GATE
from neuraleraser.cli import main
from neuraleraser.eraser import Eraser
from neuraleraser.errors import FileError
from neuraleraser.sae import SAE

pytestmark = pytest.mark.usefixtures("folder")


def tree() -> dict[str, bytes]:
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was opened")

    monkeypatch.setattr("neuraleraser.families.opening.open_pipeline", work)
    monkeypatch.setattr("neuraleraser.demo.open_pipeline", work)
    monkeypatch.setattr("neuraleraser.canvas.train.train", work)
    monkeypatch.setattr("neuraleraser.canvas.data.render_set", work)


BAD_FILES = ["dir", "pipe", "file/below", "/dev/null", "x" * 300]
BAD_FOLDERS = ["file", "pipe", "file/below", "/dev/null"]
TO_FILES = {
    "erase": ["erase", "cat", "--out"],
    "generate": ["generate", "a", "--out"],
    "record": ["generate", "a", "--record"],
    "calibrate": ["calibrate", "vg.safetensors", "--model", "m", "--out"],
    "profile": ["profile", "a", "--sae", "sae.safetensors", "--out"],
    "inspect": ["inspect", "sae.safetensors", "--comparison-png"],
    "train": ["train", "unet", "--out"],
    "canvas sheet": ["canvas", "sheet", "--out"],
}
TO_FOLDERS = {
    "collect": ["collect", "unet", "--out"],
    "reference": ["reference", "sae.safetensors", "unet", "--model", "m", "--prompts", "p.txt", "--out"],
    "convert": ["convert", "sae.safetensors"],
    "demo": ["demo", "--folder"],
    "train": ["train", "unet", "--out"],
    "tensorboard": ["train", "unet", "--tensorboard"],
    "canvas train": ["canvas", "train", "--folder"],
    "canvas render": ["canvas", "render", "--out"],
    "canvas judge": ["canvas", "judge", "--folder"],
    "canvas reference": ["canvas", "reference", "--out"],
}
CASES = [(verb, argv, out) for verb, argv in TO_FILES.items() for out in BAD_FILES if verb != "train"]
CASES += [(verb, argv, out) for verb, argv in TO_FOLDERS.items() for out in BAD_FOLDERS]
CASES += [("train", TO_FILES["train"], f"{out}/a.safetensors") for out in BAD_FOLDERS]


@pytest.mark.parametrize(("verb", "argv", "out"), CASES, ids=[f"{v} {o[:9]}" for v, _, o in CASES])
def test_an_output_that_cannot_be_written_is_said_before_the_work(
    verb: str, argv: list[str], out: str, no_work: None, capsys: pytest.CaptureFixture[str]
):
    before = tree()
    refused([*argv, out], capsys)
    assert tree() == before


READ = [
    ["generate", "a", "--erasers", "vg.safetensors", "--out", "vg.safetensors"],
    ["generate", "a", "--erasers", "vg.safetensors:0.5", "--out", "./vg.safetensors"],
    ["generate", "a", "--erasers", "vg.safetensors", "--record", "dir/../vg.safetensors"],
    ["generate", "a", "--model", "dir", "--out", "dir/sae.safetensors"],
    ["calibrate", "vg.safetensors", "--model", "m", "--out", "vg.safetensors"],
    ["profile", "a", "--sae", "sae.safetensors", "--out", "sae.safetensors"],
    ["inspect", "sae.safetensors", "--comparison-png", "sae.safetensors"],
    ["inspect", "dir", "--comparison-png", "dir/sae.safetensors"],
    ["inspect", "sae.safetensors", "--prompts", "p.txt", "--comparison-png", "p.txt"],
    ["erase", "a", "--reference", "dir", "--out", "dir/sae.safetensors"],
    ["reference", "dir", "unet", "--model", "m", "--prompts", "p.txt", "--out", "dir"],
    ["train", "unet", "--prompts", "p.txt", "--out", "p.txt"],
]


@pytest.mark.parametrize("argv", READ, ids=" ".join)
def test_what_is_read_is_never_replaced(argv: list[str], no_work: None, capsys: pytest.CaptureFixture[str]):
    before = tree()
    if argv[0] == "train":
        Path("sae.safetensors").rename("p.safetensors")
        before, argv = tree(), ["train", "unet", "--prompts", "p.safetensors", "--out", "p.safetensors"]
    assert "would replace what" in refused(argv, capsys)
    assert tree() == before


def test_two_outputs_are_two_files(no_work: None, capsys: pytest.CaptureFixture[str]):
    before = tree()
    for record in ("x", "./x", "x/below"):
        assert "collide" in refused(["generate", "a", "--out", "x", "--record", record], capsys)
    assert tree() == before


@pytest.mark.parametrize("name", ["eraser", "image", "sae"])
def test_a_result_is_kept_where_its_path_fails_after_the_work(
    name: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    """The folder of the output becomes a file while the work is done."""
    from neuraleraser import fitting, sampling

    def in_the_way(done: Any) -> Any:
        def then(*args: Any, **kwargs: Any) -> Any:
            made = done(*args, **kwargs)
            if not Path("late").exists():
                Path("late").write_text("in the way")
            return made

        return then

    if name == "eraser":
        monkeypatch.setattr(fitting, "calibrate", lambda pipe, eraser, *_, **__: in_the_way(lambda: eraser)())
        monkeypatch.setattr("neuraleraser.concepts.named_concept", lambda *_: None)
        monkeypatch.setattr("neuraleraser.concepts.neighbours_of", lambda *_: [])
        argv = ["calibrate", "vg.safetensors", "--model", model, "--out", "late/x.safetensors"]
    elif name == "image":
        monkeypatch.setattr(sampling, "generate", in_the_way(sampling.generate))
        argv = ["generate", "a", "--model", model, "--num-inference-steps", "1", "--out", "late/x.png"]
    else:
        import neuraleraser.sae as sae

        monkeypatch.setattr(sae, "measure_sae", in_the_way(sae.measure_sae))
        argv = ["train", GATE.path, "--model", model, "--prompts", "p.txt", "--n-features", "32", *FEW]
        argv += ["--vectors-per-image", "16", "--buffer-chunks", "2", "--out", "late.safetensors"]
        monkeypatch.setattr(SAE, "save", _failing_at(SAE.save, Path("late.safetensors")))
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    kept = Path(said.strip().splitlines()[-1].split("the result is kept in ")[1])
    assert kept.parent == Path.cwd() and kept.is_file()
    if kept.suffix == ".safetensors":
        assert SAE.load(kept).n_features == 32 if name == "sae" else Eraser.load(kept).name == "Van_Gogh"


def _failing_at(save: Any, path: Path) -> Any:
    def saving(self: Any, to: Any, header: Any = None) -> None:
        if Path(to) == path:
            raise FileError(f"{path} could not be written")
        save(self, to, header)

    return saving


NUMBERS = [
    ["generate", "a", "--seed", "-1"],
    ["generate", "a", "--seed", str(2**63)],
    ["generate", "a", "--seed", "99999999999999999999"],
    ["generate", "a", "--num-inference-steps", "2000"],
    ["generate", "a", "--guidance-scale", "nan"],
    ["generate", "a", "--guidance-scale", "-3"],
    ["generate", "a", "--guidance-scale", "inf"],
    ["erase", "cat", "--num-pairs", "0"],
    ["erase", "cat", "--rank", "0"],
    ["erase", "cat", "--num-context-pairs", "-1"],
    ["erase", "cat", "--guided-weight", "nan"],
    ["erase", "cat", "--guided-weight", "0"],
    ["erase", "cat", "--seed", "-1"],
    ["erase", "cat", "--seed", "10000"],
    ["erase", "cat", "--num-images", "0"],
    ["erase", "cat", "--num-inference-steps", "0"],
    ["erase", "cat", "--guidance-scale", "nan"],
    ["erase", "cat", "--batch-size", "0"],
    ["calibrate", "vg.safetensors", "--model", "m", "--num-pairs", "0"],
    ["doctor", "--model", "m", "--erasers", "vg.safetensors", "--num-images", "0"],
    ["doctor", "--model", "m", "--erasers", "vg.safetensors", "--num-inference-steps", "-4"],
    ["profile", "a", "--sae", "sae.safetensors", "--num-images", "0"],
    ["profile", "a", "--sae", "sae.safetensors", "--top", "-1"],
    ["collect", "unet", "--num-images", "-1"],
    ["collect", "unet", "--vectors-per-image", "0"],
    ["collect", "unet", "--seed", "-1"],
    ["collect", "unet", "--guidance-scale", "nan"],
    ["collect", "unet", "--batch-size", "0"],
    ["train", "unet", "--learning-rate", "nan"],
    ["train", "unet", "--binding-weight", "nan"],
    ["train", "unet", "--steps", "0"],
    ["train", "unet", "--n-features", "0"],
    ["train", "unet", "--seed", str(2**63)],
    ["train", "unet", "--checkpoint-every", "0"],
    ["inspect", "sae.safetensors", "--num-images", "0"],
    ["inspect", "sae.safetensors", "--seed", str(2**63)],
    ["demo", "--fit.num-pairs", "0"],
    ["demo", "--phrases"],
    ["canvas", "train", "--batch", "0"],
    ["canvas", "train", "--learning-rate", "nan"],
    ["canvas", "render", "--seeds", "0"],
    ["canvas", "render", "--size", "0"],
    ["canvas", "sheet", "--size", "-1"],
    ["canvas", "judge", "--renders", "0"],
    ["canvas", "reference", "--num-images", "501"],
]


@pytest.mark.parametrize("argv", NUMBERS, ids=" ".join)
def test_a_number_out_of_range_is_one_sentence(argv: list[str], no_work: None, capsys: pytest.CaptureFixture[str]):
    before = tree()
    assert ": pass " in refused(argv, capsys)
    assert tree() == before


def test_bytes_that_are_no_text_are_one_sentence(no_work: None, capsys: pytest.CaptureFixture[str]):
    for argv in (["generate", "a\udcff"], ["generate", "a\x1b[31m"], ["generate", "a " * 2000]):
        assert refused(argv, capsys).isprintable()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "the memory is not enough"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is not"),
        (torch.OutOfMemoryError("CUDA out of memory"), "the memory is not enough"),
        (OSError(28, "No space left on device"), "the disk does not take more"),
        (OSError(30, "Read-only file system"), "the disk does not take more"),
    ],
)
def test_a_machine_that_is_full_is_one_sentence(
    error: Exception, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("neuraleraser.families.opening.open_pipeline", full)
    assert says in refused(["sites"], capsys)


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), OSError(2, "No such file")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def bug(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("neuraleraser.families.opening.open_pipeline", bug)
    with pytest.raises(type(error)):
        main(["sites"])
