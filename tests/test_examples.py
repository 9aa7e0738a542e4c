"""The examples in the reference, one for each public name, run and show what they say."""

from __future__ import annotations

import doctest
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import neuraleraser
from helpers.published_saes import saeuron
from helpers.sae_files import image_sae
from helpers.small_judges import SMALL, ClipByHeart, install_detector, small_classifier, small_clip
from neuraleraser import attacks, methods
from neuraleraser.activations import activation_matrix
from neuraleraser.concepts import Concept
from neuraleraser.judges import NO_CONCEPT, unlearncanvas
from neuraleraser.sampling import generate

PAGES = Path(__file__).parents[1] / "docs/reference"
INDEX = PAGES / "index.md"
SLOW = {"make_reference"}
"""Names whose examples take longer than a few seconds."""
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def entries() -> dict[str, Any]:
    """All that the pages show, every public name, and the methods of public classes that have examples."""
    found = {name: getattr(neuraleraser, name) for name in neuraleraser.__all__}
    for page in PAGES.glob("*.md"):
        for home, name in re.findall(r"^::: (neuraleraser\.\S+)\.(\w+)$", page.read_text(), re.MULTILINE):
            found[name] = getattr(import_module(home), name)
    for name, value in list(found.items()):
        for part in vars(value) if isinstance(value, type) else ():
            method = getattr(value, part)
            if not part.startswith("_") and callable(method) and ">>> " in (method.__doc__ or ""):
                found[f"{name}.{part}"] = method
    return found


ENTRIES = entries()


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the page says is there."""
    (block,) = re.findall(r"^```python\n(.*?)^```", INDEX.read_text(), re.DOTALL | re.MULTILINE)
    rooms = (neuraleraser, methods, attacks)
    names = {name: getattr(room, name) for room in rooms for name in room.__all__}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("example"))
        exec(compile(block, str(INDEX), "exec"), names)
        yield names


@pytest.fixture(scope="module")
def files(namespace: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Small stand-ins for what would have to be downloaded, in a folder."""
    folder, package = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("package")
    pipe, quick, site = (namespace[name] for name in ("pipe", "quick", "site"))
    saeuron(folder / "saeuron", activation_matrix(pipe, ["a cat", "a dog"], [0, 1], [site], 64, quick)[site])
    image_sae(folder / "image-sae.safetensors")
    small_classifier(folder / "style50.pth", 51)
    small_classifier(folder / "style50_cls.pth", 20)
    small_clip(folder / "small-clip")
    clip = ClipByHeart("object", images_for_clip(pipe, quick))
    with pytest.MonkeyPatch.context() as patch:
        for room in ("judges.clip", "fitting.clip_judge"):
            patch.setattr(f"neuraleraser.{room}.Clip", lambda model, device: clip)
        install_detector(patch, package)
        patch.setattr(unlearncanvas, "VIT_LARGE", SMALL)
        yield folder


def images_for_clip(pipe: Any, sampling: Any) -> dict[str, Any]:
    """The images of the examples with CLIP, by what they show."""
    names = ("a cat", "a dog")
    images = {name: [generate(pipe, [name] * 8, range(8), sampling)] for name in names}
    prompts = {name: [pair.positive for pair in Concept.from_phrase(name).pairs[:8]] for name in names}
    prompts[NO_CONCEPT] = [pair.negative for pair in Concept.from_phrase("a cat").pairs[:8]]
    for name, some in prompts.items():
        images.setdefault(name, []).append(generate(pipe, some, range(70_000, 70_008), sampling))
    return {name: [image for part in parts for image in part] for name, parts in images.items()}


def problems(name: str, text: str | None, names: dict[str, Any]) -> str:
    """What is wrong with the examples in a docstring, "" if nothing is."""
    text = text or ""
    test = doctest.DocTestParser().get_doctest(text, dict(names), name, None, None)
    if "Examples:\n" not in text.partition(">>> ")[0]:  # what the pages show as examples
        return f"{name} has no section 'Examples:'"
    if not any(example.want for example in test.examples):
        return f"{name} has no example that shows a result"
    if any(doctest.SKIP in example.options for example in test.examples):
        return f"{name} has an example that does not run"
    found: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=found.append)
    return "".join(found)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in sorted(ENTRIES)]
)
def test_the_example_of(
    name: str, namespace: dict[str, Any], files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    try:
        wrong = problems(name, ENTRIES[name].__doc__, namespace)
    finally:
        neuraleraser.unload_erasers(namespace["pipe"])
    assert not wrong, wrong


def test_an_example_that_is_missing_wrong_or_skipped_is_seen() -> None:
    def said(example: str, **names: Any) -> str:
        return problems("x", f"Add.\n\nExamples:\n{example}", names)

    assert problems("x", None, {}) == problems("x", "Add.\n\n>>> 1 + 1\n2\n", {}) == "x has no section 'Examples:'"
    assert said("") == said(">>> y = 1 + 1\n") == "x has no example that shows a result"
    assert said(">>> 1 + 1  # doctest: +SKIP\n2\n") == "x has an example that does not run"
    assert said(">>> 1 + y\n2\n", y=1) == ""
    assert "Expected:\n    3\nGot:\n    2" in said(">>> 1 + 1\n3\n")
    assert "NameError" in said(">>> 1 + y\n2\n")
