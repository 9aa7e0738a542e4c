"""The table of references on the Hub, and what is fetched by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from helpers import pipelines
from helpers.published_saes import saeuron, unbox
from neuraleraser.activations import activation_matrix
from neuraleraser.concepts import Concept, Pair
from neuraleraser.errors import FileError
from neuraleraser.families import FAMILIES, PublishedSAE
from neuraleraser.fitting.published_references import fetch_reference, fetch_sae, published_sae
from neuraleraser.settings import Sampling
from neuraleraser.sites import Site

PUBLISHED = [sae for family in FAMILIES for sae in family.published]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
S = Sampling(num_inference_steps=2, batch_size=2)
X = Concept("x", "object", (Pair("x x", "b c"), Pair("x x d", "b c d")))
Y = Concept("y", "object", (Pair("y", "b"), Pair("y d", "b d")))


def test_what_is_published_is_found_by_model_and_site():
    for entry in PUBLISHED:
        assert published_sae(entry.models[0], entry.site) is entry
        assert published_sae("someone/else", entry.site) is None
        assert published_sae(entry.models[0], Site("unet.conv_in")) is None
    assert len({(model, p.site) for p in PUBLISHED for model in p.models}) == sum(len(p.models) for p in PUBLISHED)


def test_only_files_that_are_read_are_fetched():
    for entry in PUBLISHED:
        assert entry.files and all("*" not in name and "/" not in name for name in entry.files)
        assert entry.revision is None or len(entry.revision) == 40


@pytest.mark.parametrize("publish", [saeuron, unbox])
def test_a_published_reference_is_fetched_read_and_kept(publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe, site = pipelines.stable_diffusion(), Site("unet.down_blocks.1.attentions.0")
    files = tuple(name for entry in PUBLISHED for name in entry.files)
    theirs = PublishedSAE(("a/b",), site, "c/d", "deep/inside", files, "a paper")
    x = activation_matrix(pipe, ["a b", "c d", "e f"], range(3), [site], 64, S)[site]
    hub = tmp_path / COMMIT
    publish(hub / "deep" / "inside", x)
    asked: list[dict[str, Any]] = []

    def download(repo: str, **given: Any) -> str:
        asked.append({"repo": repo, **given})
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    known = fetch_reference(pipe, theirs, X, [Y], tmp_path / "kept", 3, S)
    assert known.site == site and known.sae.n_features == 64 and known.sae.header["source"] == "c/d: a paper"
    assert known.sae.header["revision"] == COMMIT
    assert known.provenance.sae == "c/d: a paper", "so that nobody takes its own training data for known"
    shown = zip(known.prompts, known.labels, strict=True)
    assert all(names == ({"y"} if "y" in prompt.split() else set()) for prompt, names in shown)
    exact = [f"deep/inside/{name}" for name in files]
    assert asked == [{"repo": "c/d", "repo_type": "model", "revision": None, "allow_patterns": exact}]
    for entry, given, expected in ((theirs, "v1", "v1"), (replace(theirs, revision="a" * 40), None, "a" * 40)):
        assert fetch_sae(entry, given) == (hub / "deep" / "inside", COMMIT)
        assert asked.pop()["revision"] == expected
    again = fetch_reference(pipe, theirs, X, [Y], tmp_path / "kept", 3, S)
    assert len(asked) == 1 and again.sae.W_enc.equal(known.sae.W_enc)
    with pytest.raises(FileError, match="has no folder 'elsewhere'"):
        fetch_sae(replace(theirs, folder="elsewhere"))


def test_no_network_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("cannot\nreach it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileError, match=r"'bcywinski/SAeUron_coco' could not be fetched from the Hub: cannot reach it$"
    ):
        fetch_sae(PUBLISHED[0])
