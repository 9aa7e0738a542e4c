"""The card of an eraser: what its header holds, and no more than that."""

from __future__ import annotations

from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from helpers.erasers import make_eraser
from helpers.fake_hub import make_reference
from helpers.sae_files import sae
from neuraleraser import EraserHeader, FitSettings, model_card


def test_the_card_tells_what_the_header_holds() -> None:
    header = EraserHeader(
        "Van_Gogh",
        kind="style",
        base="someone/a-model",
        settings=FitSettings(rank=8),
        seeds=(0, 23),
        measured={"ua": {"value": 0.9, "n": 40, "low": 0.8, "high": 1.0}, "kept": 0.95},
    )
    card = model_card(header, "someone/van-gogh")
    assert card.data.base_model == "someone/a-model" and "concept-erasure" in card.data.tags
    for text in ("# Eraser: Van_Gogh", "the style Van_Gogh", "| ua | 0.9 | 0.8 to 1.0 | 40 |", "| kept | 0.95 |"):
        assert text in card.text
    for text in (r"| settings: rank | 8 |", r"\[0, 23\]", "## Limits", "load_eraser(pipe, 'someone/van-gogh')"):
        assert text in card.text
    assert "no measurement" not in card.text
    for unmeasured in (EraserHeader("Cats"), make_eraser().header):
        plain = model_card(unmeasured)
        assert "no measurement" in plain.text and plain.data.eval_results is None


def test_figures_are_results_that_the_hub_reads() -> None:
    measured = {"ua": {"value": 0.9, "n": 40}, "kept": 1, "n": {"value": True}, "x": {"value": "0.5"}, "none": {}}
    measured |= {"a\nb": 0.5, "<b>": 0.5, "huge": 1e300}
    card = ModelCard(str(model_card(EraserHeader("Cats", measured=measured), "someone/cats")))  # as the Hub reads it
    results = card.data.eval_results
    assert results is not None and card.data.model_name == "cats"
    assert {r.metric_type: r.metric_value for r in results} == {"ua": 0.9, "kept": 1}


def test_a_card_says_where_things_are() -> None:
    eraser = make_eraser()
    text = eraser.generate_model_card("someone/cats").text
    assert str(eraser.gate.site) in text and f"| correction | low_rank at {eraser.corrections[0].site} |" in text


@given(st.text(max_size=60))
def test_a_stranger_s_header_is_text_and_no_markup(text: str) -> None:
    hostile = text + "\n---\nlicense: mit\n# Head <script> | [x](y) `z`"
    measured = {"a": 1, hostile: 2, "b": {"value": hostile}}
    header = EraserHeader(hostile, kind=hostile, base=hostile, more={hostile: {hostile: hostile}}, measured=measured)
    other = EraserHeader("x", base="y", more={"k": {"i": "v"}}, measured={"a": 1, "!": 2, "b": {"value": "w"}})
    card, plain = str(model_card(header)), str(model_card(other))
    assert len(card.splitlines()) == len(plain.splitlines())
    assert "<script>" not in card and "[x](y)" not in card and "base_model" not in card
    assert ModelCard(card).data.to_dict() == ModelCard(plain).data.to_dict()
    assert [line[:2] for line in card.splitlines() if line[:1] == "#"] == ["# ", "##", "##", "##", "##"]
    heads = [line.replace(r"\|", "").count("|") for line in card.splitlines() if line.startswith("| ")]
    assert set(heads) == {5, 3}


@given(st.text(max_size=60))
def test_so_it_is_on_the_cards_of_saes_and_references(text: str) -> None:
    hostile = text + "\n---\n# Head <script> | [x](y) `z`"
    header = {"model": hostile, "site": hostile, "measures": {hostile: hostile, "l0": 3.5}, hostile: hostile}
    made = [sae(header=header), make_reference()]
    made[1].sae.header.update(header)
    for held, heads in zip(made, (4, 3), strict=True):
        card = held.generate_model_card("someone/x")
        assert "<script>" not in str(card) and "[x](y)" not in str(card) and card.data.base_model is None
        assert len([line for line in card.text.splitlines() if line.startswith("#")]) == heads
    assert "| l0 | 3.5 |" in made[0].generate_model_card("a/b").text
    named = sae(header={"model": "someone/a-model"}).generate_model_card("a/b")
    assert named.data.base_model == "someone/a-model" and "no measurement" in named.text


def test_a_long_value_is_cut() -> None:
    lines = str(model_card(EraserHeader("x", prompts=("a",) * 9999))).splitlines()
    assert max(map(len, lines)) < 500
