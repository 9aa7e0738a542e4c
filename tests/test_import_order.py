"""Rooms: each imports only from rooms above it, and no room has a cycle inside. Read from the source by
`ast`, so that lazy imports inside functions and imports for type checkers count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "neuraleraser"
SOURCE = Path(__file__).parents[1] / "src" / PACKAGE

# From the top: a room may import from those before it.
ORDER = (
    "errors precision io settings vocabulary site judges canvas families prompts sites sae concepts eraser "
    "sampling activations fitting attacks evaluation methods assessment attacking auditing sealed atlas diagnosis "
    "demo cli studio __main__"
).split()
# Rooms of the plan that nothing fills yet; strike one from here when it is made.
LATER = {"atlas", "studio"}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name inside the package ("" for its own `__init__`) to file, for every module below `root`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and dotted name inside the package of everything that module `name` imports from the package."""
    home = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    if path.name != "__init__.py":
        home = home[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    if not name:  # what the package's own module names for type checkers it does not import
        tree.body = [node for node in tree.body if not _is_for_type_checkers(node)]
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                targets = [(alias.name, None) for alias in aliases]
            case ast.ImportFrom(module=module, names=aliases, level=level):
                start = home[: len(home) - level + 1] if level else []
                base = ".".join([*start, *([module] if module else [])])
                targets = [(base, alias.name) for alias in aliases]
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]) if ast.unparse(func).split(".")[
                -1
            ] in {"import_module", "__import__"}:
                targets = [(target, None)]
            case _:
                continue
        for base, member in targets:
            if base != PACKAGE and not base.startswith(f"{PACKAGE}."):
                continue
            inside = base[len(PACKAGE) + 1 :]
            deeper = f"{inside}.{member}".lstrip(".")
            yield node.lineno, deeper if member and deeper in known else inside


def _is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(root: Path) -> list[str]:
    """One sentence for each import that breaks the order, and for each cycle inside a room."""
    known = modules(root)
    found: list[str] = []
    inside: dict[str, dict[str, set[str]]] = {}
    for name, path in known.items():
        room = name.split(".")[0]
        if room and room not in ORDER:
            found.append(f"{name}: room {room!r} is not in the order")
            continue
        for line, target in imports(name, path, known):
            other = target.split(".")[0]
            where = f"{name or '__init__'}:{line} imports {target or PACKAGE}"
            if other and other not in ORDER:
                found.append(f"{where}, which is no room")
            elif not room:
                found.append(f"{where}: the package's own module imports no room, it names them")
            elif other == room:
                inside.setdefault(room, {}).setdefault(name, set()).add(target)
            elif not other:
                found.append(f"{where}: inside the package, import from the room itself")
            elif ORDER.index(other) > ORDER.index(room):
                found.append(f"{where}, which is below it")
    for room, graph in inside.items():
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as e:
            found.append(f"{room}: cycle {' -> '.join(reversed(e.args[1]))}")
    return found


def rooms(root: Path) -> set[str]:
    """The rooms on disk: modules and folders that hold Python, `__init__` apart."""
    return {name.split(".")[0] for name in modules(root)} - {""}


def test_each_room_imports_only_from_rooms_above_it():
    assert violations(SOURCE) == []


def test_the_order_and_the_rooms_on_disk_agree():
    assert len(set(ORDER)) == len(ORDER)
    assert rooms(SOURCE) == set(ORDER) - LATER


def tree(root: Path, files: dict[str, str]) -> Path:
    """A small package that keeps the order, with `files` laid over it."""
    good = {
        "__init__.py": "import importlib\n_HOME = {'FileError': 'errors'}\n",
        "errors.py": "class FileError(Exception): ...\n",
        "io/__init__.py": "",
        "io/tensor_file.py": "import torch\nfrom neuraleraser.errors import FileError\n",
        "canvas/__init__.py": "from neuraleraser.canvas.render import render\n",
        "canvas/words.py": "",
        "canvas/render.py": "from neuraleraser.canvas import words\nfrom neuraleraser.io import tensor_file\n",
        "families.py": "from . import errors\nfrom .canvas.words import x\n",
        "evaluation/__init__.py": "",
        "evaluation/cells.py": "from ..families import Family\nfrom . import results\n",
        "evaluation/results.py": "import neuraleraser.canvas.words\n",
        "methods/__init__.py": "from neuraleraser.evaluation.cells import x\n",
        "cli.py": "from neuraleraser.methods import x\n",
    }
    for name, text in (good | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def test_a_tree_that_keeps_the_order_passes(tmp_path: Path):
    assert violations(tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("errors.py", "import neuraleraser.io.tensor_file", "errors:1 imports io.tensor_file, which is below it"),
        (
            "canvas/words.py",
            "\nfrom neuraleraser.families import Family",
            "canvas.words:2 imports families, which is",
        ),
        ("canvas/words.py", "from ..families import Family", "canvas.words:1 imports families, which is below it"),
        ("canvas/__init__.py", "from .. import families", "canvas:1 imports families, which is below it"),
        (
            "evaluation/cells.py",
            "def f():\n    from neuraleraser import methods",
            "evaluation.cells:2 imports methods, which",
        ),
        (
            "evaluation/cells.py",
            "if TYPE_CHECKING:\n    import neuraleraser.methods as r",
            "imports methods, which is",
        ),
        ("evaluation/cells.py", "import_module('neuraleraser.methods')", "imports methods, which is below it"),
        (
            "evaluation/cells.py",
            "importlib.import_module('neuraleraser.methods')",
            "imports methods, which is below",
        ),
        ("families.py", "from neuraleraser import FileError", "import from the room itself"),
        ("families.py", "import neuraleraser", "import from the room itself"),
        ("families.py", "from neuraleraser.shed import x", "families:1 imports shed, which is no room"),
        ("shed.py", "", "room 'shed' is not in the order"),
        ("shed/deep/x.py", "", "room 'shed' is not in the order"),
        ("__init__.py", "from .io.tensor_file import save", "imports no room"),
        ("evaluation/results.py", "from neuraleraser.evaluation.cells import x", "evaluation: cycle evaluation."),
        ("evaluation/results.py", "from .cells import x", "evaluation: cycle evaluation."),
        (
            "evaluation/results.py",
            "from . import results",
            "evaluation: cycle evaluation.results -> evaluation.results",
        ),
        ("canvas/render.py", "from neuraleraser.canvas import render_all", "canvas: cycle canvas"),
    ],
)
def test_a_wrong_import_is_caught(tmp_path: Path, file: str, text: str, expected: str):
    found = violations(tree(tmp_path, {file: text}))
    assert len(found) == 1
    assert expected in found[0]


def canvas_importers(root: Path) -> set[str]:
    """Modules outside the canvas's room that import it."""
    known = modules(root)
    return {
        name
        for name, path in known.items()
        for _, target in imports(name, path, known)
        if target.split(".")[0] == "canvas" and name.split(".")[0] != "canvas"
    }


def test_the_canvas_is_one_family_among_others(tmp_path: Path):
    """Its family knows it, and so does the command line of its own verbs; nothing else does."""
    assert canvas_importers(SOURCE) == {"families.canvas", "cli.canvas"}
    assert canvas_importers(tree(tmp_path, {})) == {"families", "evaluation.results"}


def test_a_room_on_disk_that_the_order_lacks_is_seen(tmp_path: Path):
    root = tree(tmp_path, {"shed/x.py": ""})
    assert rooms(root) - set(ORDER) == {"shed"}
