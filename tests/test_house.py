"""The house in order: short files, tests in the folder of the room that they test, and a name for one module alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = Path("src/neuraleraser")
MOST_LINES = 400
NO_ROOM = {"helpers"}
"""Folders of tests that stand for no room."""


def too_long(root: Path) -> list[str]:
    """Files of source and tests with more lines than a file may have."""
    found = []
    for path in sorted(p for folder in ("src", "tests") for p in (root / folder).rglob("*.py")):
        name, lines = path.relative_to(root).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            found.append(f"{name} has {lines} lines: split it along its themes")
    return found


def homeless(root: Path) -> list[str]:
    """Tests in folders that no room of the source has, and test files among the helpers."""
    found = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        folders = path.relative_to(root / "tests").parts[:-1]
        if folders and (len(folders) > 1 or not (root / SOURCE / folders[0] / "__init__.py").is_file()):
            found.append(f"{path.relative_to(root).as_posix()}: there is no room {'/'.join(folders)!r}")
    known = NO_ROOM | {p.parent.name for p in (root / SOURCE).glob("*/__init__.py")}
    return found + [
        f"tests/{folder.name} is no room and not among NO_ROOM"
        for folder in sorted((root / "tests").iterdir())
        if folder.name not in known and any(folder.glob("*.py"))
    ]


def shared_names(root: Path) -> list[str]:
    """Names of modules that two rooms have; a room's own `__init__`, and the verbs in `cli`, are apart."""
    rooms: dict[str, set[str]] = {}
    for path in (root / SOURCE).rglob("*.py"):
        room, *rest = path.relative_to(root / SOURCE).with_suffix("").parts
        if room != "cli" and path.stem != "__init__":
            rooms.setdefault(path.stem, set()).add(room if rest else "top level")
    return [f"{name} is in {', '.join(sorted(of))}" for name, of in sorted(rooms.items()) if len(of) > 1]


def test_no_file_is_long() -> None:
    assert too_long(ROOT) == []


def test_tests_are_in_the_folder_of_their_room() -> None:
    assert homeless(ROOT) == []


def test_no_name_is_in_two_rooms() -> None:
    assert shared_names(ROOT) == []


def test_a_house_in_disorder_is_seen(tmp_path: Path) -> None:
    files = {
        "src/neuraleraser/__init__.py": "",
        "src/neuraleraser/models.py": "",
        "src/neuraleraser/sites/__init__.py": "",
        "src/neuraleraser/sites/rows.py": "x = 1\n" * MOST_LINES,
        "src/neuraleraser/cli/__init__.py": "",
        "src/neuraleraser/cli/rows.py": "",
        "tests/test_house.py": "",
        "tests/helpers/planted.py": "",
        "tests/sites/test_rows.py": "x = 1\n" * MOST_LINES,
    }

    def write(**more: str) -> None:
        for name, text in (files | more).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text, encoding="utf-8")

    def disorder() -> list[str]:
        return too_long(tmp_path) + homeless(tmp_path) + shared_names(tmp_path)

    write()
    assert disorder() == []
    write(**{
        "src/neuraleraser/eraser/__init__.py": "",
        "src/neuraleraser/eraser/deep/rows.py": "",
        "src/neuraleraser/sites/models.py": "",
        "tests/sites/test_rows.py": "x = 1\n" * (MOST_LINES + 1),
        "tests/shed/test_x.py": "",
        "tests/helpers/test_planted.py": "",
        "tests/sites/deep/test_x.py": "",
    })  # fmt: skip
    assert disorder() == [
        "tests/sites/test_rows.py has 401 lines: split it along its themes",
        "tests/helpers/test_planted.py: there is no room 'helpers'",
        "tests/shed/test_x.py: there is no room 'shed'",
        "tests/sites/deep/test_x.py: there is no room 'sites/deep'",
        "tests/shed is no room and not among NO_ROOM",
        "models is in sites, top level",
        "rows is in eraser, sites",
    ]


RIDDLES = ("What", "Whether", "How", "Which", "Where", "Of")


def riddles(root: Path) -> list[str]:
    """Docstrings that open with a question word, by file and name."""
    found = []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                words = (ast.get_docstring(node) or "-").split()
                if words[0] in RIDDLES:
                    found.append(f"{path.name}: {getattr(node, 'name', 'module')}")
    return found


def test_docstrings_open_with_a_verb_or_a_noun(tmp_path: Path) -> None:
    assert riddles(Path(__file__).parents[1] / "src") == []
    (tmp_path / "x.py").write_text('"""Whether it is."""\n\n\ndef f():\n    """Return it."""\n')
    assert riddles(tmp_path) == ["x.py: module"]


def told(root: Path) -> list[str]:
    """Places in the source that use the word "told", which had ten meanings: a progress callback, a digest, a flag."""
    return [
        f"{path.relative_to(root).as_posix()}:{number}"
        for path in sorted((root / SOURCE).rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\btold\b", line)
    ]


def test_nothing_is_told(tmp_path: Path) -> None:
    assert told(ROOT) == []
    (tmp_path / SOURCE).mkdir(parents=True)
    (tmp_path / SOURCE / "x.py").write_text("untold = 1\non_step(told)\n", encoding="utf-8")
    assert told(tmp_path) == [f"{SOURCE.as_posix()}/x.py:2"]
