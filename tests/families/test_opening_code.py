"""No code that comes with a pipeline is run, whichever way it is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from helpers.pipelines import stable_diffusion
from neuraleraser.errors import FileError
from neuraleraser.families.opening import open_pipeline

CODE = "from pathlib import Path\nPath({path!r}).write_text('ran')\nclass Evil: pass\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    stable_diffusion().save_pretrained(tmp_path / "model", safe_serialization=True)
    return tmp_path / "model"


def change(folder: Path, **entries: object) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | entries))


@pytest.mark.parametrize("way", ["pipeline", "named pipeline", "component", "library", "path"])
def test_code_in_a_folder_is_not_run(way: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = CODE.format(path=str(tmp_path / "ran"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    if way == "pipeline":
        (folder / "pipeline.py").write_text(code)
        change(folder, _class_name=["pipeline", "Evil"])
    elif way == "named pipeline":
        (folder / "evil.py").write_text(code)
        change(folder, _class_name=["evil", "Evil"])
    elif way == "component":
        (folder / "unet" / "evil.py").write_text(code)
        change(folder, unet=["evil", "Evil"])
    elif way == "library":  # a module that can be imported
        (tmp_path / "evil_library.py").write_text(code)
        change(folder, unet=["evil_library", "Evil"])
    else:
        (folder / "unet" / "evil.py").write_text(code)
        change(folder, unet=["../unet/evil", "Evil"])
    with pytest.raises(FileError) as caught:
        open_pipeline(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists() and "evil_library" not in sys.modules


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/x", "a\0b", "/dev/null"])
def test_names_that_are_none(name: str):
    with pytest.raises(FileError, match="there is no pipeline"):
        open_pipeline(name)
