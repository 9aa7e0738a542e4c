"""The list of mutations keeps up with the code: each applies, and names tests that exist."""

from __future__ import annotations

import ast
import importlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutate() -> Iterator[ModuleType]:
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("mutate")
    sys.path.remove(str(ROOT / "tools"))


@pytest.fixture(scope="module")
def mutations(mutate: ModuleType) -> ModuleType:
    return sys.modules["mutations"]


def test_every_mutation_applies_and_is_another_program(mutate: ModuleType, tmp_path: Path) -> None:
    for mutation in mutate.MUTATIONS:
        if callable(mutation.change):
            continue
        files = {text.file for text in mutation.change}
        for file in files:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, tmp_path / file)
        mutate.apply(mutation, tmp_path)
        for file in files:
            changed, before = ((folder / file).read_text(encoding="utf-8") for folder in (tmp_path, ROOT))
            assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(before)), mutation.name
        first = mutation.change[0]
        (tmp_path / first.file).write_text("rewritten = True\n")
        with pytest.raises(mutate.Stale, match=mutation.name):
            mutate.apply(mutation, tmp_path)


def test_every_mutation_names_tests_that_exist(mutate: ModuleType) -> None:
    names = [m.name for m in mutate.MUTATIONS]
    assert len(set(names)) == len(names) and all(m.what for m in mutate.MUTATIONS)
    for mutation in mutate.MUTATIONS:
        assert mutation.tests
        for test in mutation.tests:
            file, _, function = test.partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            found = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not function or function in found, f"{mutation.name}: {test}"


def test_weights_are_changed_in_the_copy_alone(mutations: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    (tmp_path / mutations.WEIGHTS).mkdir(parents=True)
    shipped = ROOT / mutations.WEIGHTS / "reference" / "sae.safetensors"
    copied = tmp_path / mutations.WEIGHTS / "reference" / "sae.safetensors"
    copied.parent.mkdir()
    copied.symlink_to(shipped)
    before = shipped.read_bytes()
    mutations.roll_labelled_rows(tmp_path)
    assert shipped.read_bytes() == before and not copied.is_symlink()
    old, new = load_file(shipped)["W_enc"], load_file(copied)["W_enc"]
    assert new[1:45].equal(old[:44]) and new[0].equal(old[44]) and new[45:].equal(old[45:])


def test_an_unknown_name_is_refused(mutate: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutate.main(["no-such-mutation"])
    assert "there is no mutation 'no-such-mutation'" in capsys.readouterr().err
    assert mutate.main(["--list", "targets"]) == 0
    assert "the text moves away" in capsys.readouterr().out
