"""The pages of docs/: all are in the navigation, links resolve, names, files and commands exist, examples run."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml

import neuraleraser
from neuraleraser.evaluation.columns import ATTACKS, ROUTES, TABLES
from neuraleraser.evaluation.measure import GROUP_FIGURES
from neuraleraser.evaluation.metrics import METRICS
from neuraleraser.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
OTHERS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
HISTORY = [DOCS / "LOG.md"]
"""Pages that speak of what was there once."""


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=name)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}(?: title=.*)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def prose(text: str) -> str:
    """The text without code blocks and comments."""
    return re.sub(r"^```.*?^```|<!--.*?-->", "", text, flags=re.DOTALL | re.MULTILINE)


def navigation(entry: Any) -> Iterator[str]:
    """The pages that an entry of the navigation leads to."""
    if isinstance(entry, str):
        yield entry
    else:
        for part in entry.values() if isinstance(entry, dict) else entry:
            yield from navigation(part)


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(navigation(config["nav"])) == sorted(str(page.relative_to(DOCS)) for page in PAGES)


def anchor(heading: str) -> str:
    """The anchor that Python-Markdown's toc gives a heading."""
    text = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", lambda match: match[1] or "", heading)
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", text).strip().lower())


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead to no file, or to no heading of it."""
    broken = []
    for target in re.findall(r"\[[^]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page.read_text()))):
        if re.match(r"https?:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", prose(file.read_text()), re.MULTILINE) if file.suffix == ".md" else []
        if not file.exists() or (fragment and fragment not in map(anchor, headings)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page) == []


def test_the_test_of_links_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Some `heading`, here\n\n[a](#some-heading-here) [b](#other) [c](page.md#some-heading-here)")
    assert broken_links(page) == ["#other"]
    page.write_text("[a](none.txt) [b](page.md) `[c](none.md)`\n```md\n[d](none.md)\n```\n")
    assert broken_links(page) == ["none.txt"]


def test_every_public_name_has_a_place_in_the_reference() -> None:
    found: dict[str, str] = {}
    for page in sorted((DOCS / "reference").glob("*.md")):
        for path in re.findall(r"^::: (neuraleraser\.\S+)$", page.read_text(), re.MULTILINE):
            home, _, public = path.rpartition(".")
            assert public not in found, f"{public} stands in {page.name} and as {found[public]}"
            found[public] = path
            value = getattr(importlib.import_module(home), public)
            if public in neuraleraser.__all__:
                room = importlib.import_module(f"neuraleraser.{neuraleraser._HOME[public]}")
                assert value is getattr(room, public), path
    assert set(neuraleraser.__all__) <= set(found)


def undescribed(name: str, function: Any) -> list[str]:
    """The ways in which a function's docstring does not describe its parameters, under `Args:`, in their order."""
    parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
    section = re.search(r"^Args:\n((?: {4}.*\n?)+)", inspect.getdoc(function) or "", re.MULTILINE)
    described = re.findall(r"^ {4}(\w+): ", section[1], re.MULTILINE) if section else []
    return [] if described == parameters else [f"{name} describes {described} of {parameters}"]


def test_the_reference_describes_every_parameter() -> None:
    wrong = []
    for page in (DOCS / "reference").glob("*.md"):
        for path in re.findall(r"^::: (neuraleraser\.\S+)$", page.read_text(), re.MULTILINE):
            home, _, public = path.rpartition(".")
            value = getattr(importlib.import_module(home), public)
            wrong += undescribed(public, value) if inspect.isfunction(value) else []
    assert wrong == []


def test_a_parameter_that_is_not_described_is_seen() -> None:
    def f(x: int, y: int) -> None:
        """Do it.

        Args:
            x: A number,
                of two lines.
        """

    assert undescribed("f", f) == ["f describes ['x'] of ['x', 'y']"]
    f.__doc__ = "Do it.\n\nArgs:\n    x: A number.\n    y: Another.\n\nReturns:\n    z: None.\n"
    assert undescribed("f", f) == []


def test_every_public_name_is_listed_with_its_file() -> None:
    listed: dict[str, str] = {}
    table = (DOCS / "reference/index.md").read_text().partition("## Public names")[2]
    for public, line, file in re.findall(r"^\| `(\w+)` \| (.*) \| `(\S+)` \|$", table, re.MULTILINE):
        assert public not in listed and len(line.split()) > 2, public
        listed[public] = file
    assert set(listed) == set(neuraleraser.__all__)
    for public, file in listed.items():
        assert re.search(rf"^(def|class) {public}\b", (ROOT / file).read_text(), re.MULTILINE), f"{public}: {file}"


@pytest.mark.parametrize("room", ["methods", "attacks"])
def test_every_method_and_attack_is_listed_and_described_on_its_page(room: str) -> None:
    page = (DOCS / f"reference/{room}.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| .* \| `src/(\S+)\.py` \|$", page, re.MULTILINE)
    published = [n for n in importlib.import_module(f"neuraleraser.{room}").__all__ if n not in neuraleraser.__all__]
    constants = [n for n in published if n.isupper()]
    assert [name for name, _ in listed] == sorted({*published} - {*constants})
    for name, file in listed:
        assert f"::: {file.replace('/', '.')}.{name}\n" in page, name


def test_every_figure_is_explained() -> None:
    page = (DOCS / "reference/measuring.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert listed == [(c.name, c.head, c.meaning) for table in (*TABLES, ROUTES, ATTACKS) for c in table.columns]
    grouped = [f"{name}_{suffix}" for suffix, (_, figures) in GROUP_FIGURES.items() for name in figures]
    assert [figure for figure in (*METRICS, *grouped) if f"| `{figure}` |" not in page] == []


def test_default_sampling_is_as_the_page_says() -> None:
    page = (DOCS / "how-to/own-model.md").read_text()
    rows = re.findall(r"^\| .+ \| `(\w+)` \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) > 8
    for name, steps, guidance in rows:
        call = inspect.signature(getattr(diffusers, name).__call__).parameters
        usual = (call["num_inference_steps"].default, call["guidance_scale"].default)
        assert usual == (int(steps), float(guidance)), name
    stated = re.findall(r"^\| (`.+`) \| \| (\d+) \| ([\d.]+) \|$", page, re.MULTILINE)
    distilled = {model: (int(n), float(g)) for models, n, g in stated for model in re.findall(r"`(\S+)`", models)}
    assert distilled == {model: how for family in FAMILIES for model, how in family.distilled.items()}


@pytest.mark.parametrize("page", [p for p in [*PAGES, *OTHERS] if p not in HISTORY], ids=name)
def test_files_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"`((?:src|tests|docs|tools|benchmarks)/[\w./-]*)`", page.read_text())
    here = [file for file in named if (ROOT / file.split("/")[0]).is_dir()]  # an sdist has no benchmarks
    assert [file for file in here if not (ROOT / file).exists()] == []


@pages
def test_python_compiles_and_imports_what_there_is(page: Path) -> None:
    """New files that pages show are there in tests/test_extension.py alone."""
    titles = re.findall(r'title="src/(\S+)\.py"', "".join(p.read_text() for p in PAGES))
    new = {title.replace("/", ".") for title in titles}
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block, page.name)):
            if not isinstance(node, ast.ImportFrom) or node.module in new:
                continue
            if str(node.module).startswith("neuraleraser"):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert missing == [], node.module


def verbs() -> dict[str, set[str]]:
    """The verbs of each group of commands, by the name that the source has for it."""
    found: dict[str, set[str]] = {"app": set(), "canvas": set()}
    for file in (ROOT / "src/neuraleraser/cli").glob("*.py"):
        for group, verb in re.findall(r"^@verb\((\w+), \"(\w+)\"\)", file.read_text(), re.MULTILINE):
            found[group].add(verb)
    return found


def test_every_verb_is_in_the_reference() -> None:
    page = (DOCS / "reference/command-line.md").read_text()
    groups = verbs()
    expected = groups["app"] | {f"canvas {verb}" for verb in groups["canvas"]}
    assert set(re.findall(r"^\| `([\w ]+)` \|", page, re.MULTILINE)) == expected


@pages
def test_commands_exist(page: Path) -> None:
    groups = verbs()
    settings = ("cli/*.py", "settings.py", "canvas/recipe.py", "sae/train_settings.py")
    source = "".join(f.read_text() for pattern in settings for f in (ROOT / "src/neuraleraser").glob(pattern))
    lines = [line.partition("  #")[0].split() for block in blocks(page, "sh") for line in block.splitlines()]
    for first, *words in (line for line in lines if line):
        if first == "make":
            assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(), words
        if first == "neuraleraser":
            group, verb = ("canvas", words[1]) if words[0] == "canvas" else ("app", words[0])
            assert verb in groups[group], words
            for option in (word[2:].replace("-", "_") for word in words if word.startswith("--")):
                assert re.search(rf"^    {option}: ", source, re.MULTILINE), words


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the Python blocks of a page, one after the other, in one namespace."""
    for block in blocks(DOCS / page, "python"):
        exec(compile(block, page, "exec"), names)
    return names


@pytest.mark.slow
def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("tutorial.md", {"__name__": "page"})
    assert all((tmp_path / file).exists() for file in ("van-gogh.safetensors", "after.png", "runs/few/report.html"))
    assert list(names["trace"].fired) == [0] and (names["before"][0] != names["after"][0]).any()
    figures = [names["report"].of(m.name, "Van_Gogh").figures["ua"] for m in names["methods"]]
    assert figures[0].value > 0.9 and figures[1].value == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "Van_Gogh ('named', 'paraphrased', 'start image', 'inpainting')" and printed[2] == "True", (
        printed
    )
