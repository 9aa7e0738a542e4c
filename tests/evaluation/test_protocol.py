"""What is drawn, and that nothing is tested with what it was made with, or sealed (law 12)."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace

import pytest

from helpers.canvas_cells import base_cells, canvas_cells, canvas_protocol, fragment_cells, notes_on, target_cells
from helpers.erasers import open_eraser
from neuraleraser.canvas import words
from neuraleraser.concepts import canvas_concept
from neuraleraser.demo import _with_concepts
from neuraleraser.diagnosis import FIRST_SEED
from neuraleraser.eraser import Provenance
from neuraleraser.errors import ConceptError, SplitError
from neuraleraser.evaluation.protocol import (
    CEILING,
    EMPTY,
    FRAGMENTS,
    GRID,
    HALF,
    HALF_CEILING,
    HELD_OUT,
    HELD_OUT_GRID,
    IMAGE_TO_IMAGE,
    INVERTED,
    INVERTED_CONTROL,
    LEARNED,
    MAIN_GROUPS,
    NEUTRAL,
    STRENGTHS,
    TARGET,
    TWO_OBJECTS,
)
from neuraleraser.evaluation.vocabulary_cells import AttackForm
from neuraleraser.methods import EraserMethod, string_filters
from neuraleraser.settings import (
    MAX_ATTACK_IMAGES,
    SEALED_SEEDS,
    SELECTION_SEEDS,
    TEST_SEEDS,
    DemoSettings,
    EvaluateSettings,
)
from neuraleraser.vocabulary import FUNCTION_WORDS

FULL = EvaluateSettings(fragment_prompts=1000, embedding_steps=1)
CONCEPTS = tuple(n for n in (*words.VOCABULARY.open_styles, *words.VOCABULARY.open_objects) if n != words.PLAIN)


def everything() -> list:
    return canvas_protocol(CONCEPTS, FULL).all_cells()


def test_the_grid_is_every_open_style_with_every_open_object():
    cells = base_cells(2)
    assert len(cells) == 2 * 19 * 14
    assert {c.group for c in cells} == {GRID}
    assert set(Counter((c.style, c.objects) for c in cells).values()) == {2}


def test_no_two_cells_share_a_seed_but_those_of_one_picture():
    """Different cells of one group never share noise; across groups they do not either."""
    by_seed: dict[int, set] = {}
    for c in everything():
        by_seed.setdefault(c.seed, set()).add((c.style, frozenset(c.objects), c.group, c.prompt))
    assert all(len(cells) == 1 for cells in by_seed.values())


def test_a_picture_s_place_on_disk_is_its_own():
    places = Counter((c.style, "+".join(c.objects), c.seed) for c in everything())
    assert max(places.values()) == 1


def test_more_rounds_add_cells_and_change_none():
    assert base_cells(1) == base_cells(3)[: len(base_cells(1))]


def test_selection_test_and_sealed_seeds_are_disjoint():
    assert not set(SELECTION_SEEDS) & set(TEST_SEEDS) and not set(SEALED_SEEDS) & {*SELECTION_SEEDS, *TEST_SEEDS}
    assert all(c.seed in TEST_SEEDS for c in everything())
    assert all(c.seed in SEALED_SEEDS for c in canvas_protocol(["Bears"], FULL, sealed=True).all_cells())


def test_sealed_concepts_are_in_no_cell_of_others():
    closed = {*words.SEALED_STYLES, *words.SEALED_OBJECTS}
    phrases = [p for name in closed for p in words.VOCABULARY.phrases_of(name)]
    for c in everything():
        assert not closed & {c.style, *c.objects}
        assert not any(f" {p} " in f" {c.prompt} " for p in phrases), c.prompt


@pytest.mark.parametrize("name", ["Bricks", "Bears"])
def test_a_sealed_concept_has_no_cells_but_on_purpose(name: str):
    with pytest.raises(SplitError, match=f"{name}: sealed"):
        target_cells(name, FULL)
    with pytest.raises(SplitError, match=f"{name}: sealed"):
        canvas_protocol([name], FULL)
    kind = "styles" if name in words.STYLES else "objects"
    with pytest.raises(SplitError, match=f"{name}: sealed"):
        canvas_protocol(["Cats"], replace(FULL, **{kind: (name,)}))
    opened = canvas_protocol([name], FULL, sealed=True)
    assert len([c for c in opened.cells[name] if c.group == GRID]) == 3 * 25 * 20
    assert any(c.asks_for(name) for c in opened.cells[name])


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_no_prompt_that_tests_an_eraser_makes_one(name: str):
    concept = canvas_concept(name)
    made = {p.positive for p in (*concept.pairs, *concept.context_pairs)}
    assert not made & {c.prompt for c in (*base_cells(1), *target_cells(name, FULL))}


def test_a_style_s_own_cells():
    s = replace(FULL, target_rounds=2, held_out_rounds=1, start_image_rounds=1, fragment_prompts=7)
    cells = target_cells("Van_Gogh", s)
    assert Counter(c.group for c in cells) == {
        TARGET: 28, HELD_OUT: 14, IMAGE_TO_IMAGE: 14, NEUTRAL: 14, EMPTY: 14, HALF: 5, INVERTED: 5, FRAGMENTS: 7,
        LEARNED: 28,
    }  # fmt: skip
    named = (TARGET, HELD_OUT, IMAGE_TO_IMAGE)
    assert all((c.style == "Van_Gogh") == (c.group in named) for c in cells)
    assert {c.group: c.route for c in cells} == {
        TARGET: "named", HELD_OUT: "paraphrased", IMAGE_TO_IMAGE: "start image", NEUTRAL: "start image",
        EMPTY: "start image", HALF: "inpainting", INVERTED: "inverted latents", FRAGMENTS: "fragments",
        LEARNED: "learned embeddings",
    }  # fmt: skip


CEILINGS = (CEILING, HALF_CEILING, INVERTED_CONTROL)


def started_cells(name: str) -> list:
    """Cells that start from pictures, and their ceilings."""
    s = replace(FULL, start_image_rounds=3)
    return [c for c in (*target_cells(name, s), *canvas_cells(s).ceilings(name)) if c.start]


@pytest.mark.parametrize(("name", "count"), [("Van_Gogh", 14), ("Cats", 19)])
def test_every_group_starts_from_the_same_pictures_of_the_concept(name: str, count: int):
    cells = started_cells(name)
    starts = {group: [c.start for c in cells if c.group == group] for group in {c.group for c in cells}}
    assert set(starts) == {IMAGE_TO_IMAGE, NEUTRAL, EMPTY, HALF, INVERTED, *CEILINGS} and not set(starts) & set(
        MAIN_GROUPS
    )
    assert starts[IMAGE_TO_IMAGE] == starts[NEUTRAL] == starts[EMPTY] == starts[CEILING]
    assert starts[HALF] == starts[HALF_CEILING]
    assert starts[INVERTED] == starts[INVERTED_CONTROL] and len(starts[INVERTED]) == count
    assert {(s.shows, s.seed) for s in starts[INVERTED]} == {(s.shows, s.seed) for s in starts[HALF]}
    assert Counter(s.strength for s in starts[NEUTRAL]) == dict.fromkeys(STRENGTHS, count)
    pictures = {(s.shows, s.strength) for s in starts[NEUTRAL]}
    assert len(pictures) == 3 * count and all(name in shown for shown, _ in pictures)
    assert {s.strength for s in starts[HALF]} == {1.0} and len(starts[HALF]) == count
    assert abs(sum(1 if s.half == "left" else -1 for s in starts[HALF])) <= 4
    assert {s.seed for s in starts[HALF]} <= {s.seed for s in starts[NEUTRAL]}


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_only_one_prompt_over_a_start_image_names_the_concept(name: str):
    filters = string_filters(words.VOCABULARY, name)
    for c in started_cells(name):
        asks = c.group == IMAGE_TO_IMAGE
        assert c.asks_for(name) == asks == any(f(c.prompt) != c.prompt for f in filters), c
        assert (c.prompt == "") == (c.group in (EMPTY, INVERTED, INVERTED_CONTROL)) == (not c.style and not c.objects)


def test_prompts_over_start_images():
    def prompts(name: str, group: str) -> set[str]:
        return {c.prompt for c in started_cells(name) if c.group == group}

    assert "a picture of a cat" in prompts("Van_Gogh", NEUTRAL) and prompts("Van_Gogh", HALF) <= prompts(
        "Van_Gogh", NEUTRAL
    )
    assert "a cat as a plain picture" in prompts("Van_Gogh", CEILING) and len(prompts("Van_Gogh", CEILING)) == 14
    assert {"an empty scene as a mosaic", "a picture of an empty scene"} <= prompts("Cats", NEUTRAL)
    assert {"an empty scene in mosaic style", "an empty scene"} <= prompts("Cats", CEILING)


def test_ceilings_are_of_the_base_alone():
    protocol = canvas_protocol(["Van_Gogh", "Cats"], FULL)
    assert not any(c.group in CEILINGS for cells in protocol.cells.values() for c in cells)
    assert sum(c.group == CEILING for c in protocol.base_only) == 3 * (14 + 19)


def test_by_default_start_images_add_less_than_a_quarter():
    for name in ("Van_Gogh", "Cats"):
        with_pictures, without = (
            len(canvas_protocol([name], EvaluateSettings(start_image_rounds=n)).all_cells()) for n in (3, 0)
        )
        assert EvaluateSettings().start_image_rounds == 3 and with_pictures < 1.25 * without


def test_doctor_draws_with_seeds_of_no_cell():
    rounds = {name: 15 for name in ("start_image_rounds", "held_out_rounds", "target_rounds")}
    cells = canvas_protocol(CONCEPTS, replace(FULL, **rounds)).all_cells()
    assert not {c.seed for c in cells} & {*range(FIRST_SEED, FIRST_SEED + 1000)}
    assert len({c.seed for c in cells}) == len(cells)


FORMS: tuple[AttackForm, ...] = ("word", "word and name", "company")


def attacked_cells(name: str, count: int = MAX_ATTACK_IMAGES) -> list:
    cells = canvas_cells(FULL)
    return [c for i, form in enumerate(FORMS) for c in cells.attacked(name, form, i, count, form)]


def test_attacks_have_seeds_and_places_on_disk_of_their_own():
    rounds = dict.fromkeys(("start_image_rounds", "held_out_rounds", "target_rounds", "held_out_grid_rounds"), 15)
    attacked = [c for name in CONCEPTS for c in attacked_cells(name)]
    others = canvas_protocol(CONCEPTS, replace(FULL, **rounds))
    taken = {c.seed for c in (*others.all_cells(), *(c for some in others.lessons.values() for c in some))}
    assert len({c.seed for c in attacked}) == len(attacked) == len(CONCEPTS) * 3 * MAX_ATTACK_IMAGES
    assert not taken & {c.seed for c in attacked} and {c.seed for c in attacked} <= set(TEST_SEEDS)
    assert not {c.seed for c in attacked} & {*range(FIRST_SEED, FIRST_SEED + 1000)}


@pytest.mark.parametrize("name", ["Van_Gogh", "Cats"])
def test_prompts_of_attacks(name: str):
    word, named, company = (canvas_cells(FULL).attacked(name, "x", 0, 20, form) for form in FORMS)
    v, alone = words.VOCABULARY, string_filters(words.VOCABULARY, name)[0]
    assert all("<learned>" in c.prompt and not c.asks_for(name) and alone(c.prompt) == c.prompt for c in word)
    assert all(c.prompt.startswith("<learned> ") and c.asks_for(name) and v.is_named_in(c.prompt) for c in named)
    assert len({c.prompt for c in company}) == 4 and all(alone(c.prompt) == c.prompt for c in company)
    assert not any("<learned>" in c.prompt or c.asks_for(name) for c in company)
    made = canvas_concept(name)
    texts = {t for p in (*made.pairs, *made.context_pairs) for t in (p.positive, p.negative)}
    assert not texts & {c.prompt for c in (*word, *named, *company)}
    assert {(c.route, c.group) for c in (*word, *named, *company)} == {("attack", "attack by x")}
    with pytest.raises(SplitError, match="Bears: sealed"):
        canvas_cells(FULL).attacked("Bears", "x", 0, 20, "word")


def test_an_object_s_own_cells_have_it_beside_every_other_in_both_orders():
    cells = [c for c in target_cells("Cats", replace(FULL, two_object_rounds=1)) if c.group == TWO_OBJECTS]
    assert len(cells) == len(words.VOCABULARY.open_objects) - 1
    assert all("Cats" in c.objects and len(set(c.objects)) == 2 for c in cells)
    assert {c.objects.index("Cats") for c in cells} == {0, 1}
    assert len({c.style for c in cells}) > 8


def test_held_out_cells_use_held_out_phrasings_of_the_concept_only():
    seen, held = words.VOCABULARY.phrases_of("Cats")[:2], words.VOCABULARY.phrases_of("Cats")[2:]
    for c in target_cells("Cats", FULL):
        if c.group == HELD_OUT:
            assert any(p in c.prompt for p in held) and not any(p in c.prompt for p in seen)


@pytest.mark.parametrize(("name", "count"), [("Van_Gogh", 162), ("Superstring", 98), ("Cats", 72)])
def test_fragments_are_one_or_two_words_of_the_phrasings_in_neutral_company(name: str, count: int):
    cells = fragment_cells(name, 1000)
    assert len(cells) == count
    content = {w for p in words.VOCABULARY.phrases_of(name) for w in p.split()} - FUNCTION_WORDS
    for c in cells:
        neutral = words.OBJECT_PHRASES[c.objects[0]][0] if c.objects else "a picture of"
        rest = c.prompt.removeprefix(neutral).lstrip(", ").split()
        assert 1 <= len(rest) <= 2 and set(rest) <= content
        assert c.style == "" and not c.asks_for(name)
    assert len({c.prompt for c in cells}) == (count if name in words.STYLES else count // 2)
    few = fragment_cells(name, 10)
    assert len(few) == 10 and set(few) < set(cells)


@pytest.mark.parametrize("name", CONCEPTS)
def test_no_fragment_is_a_whole_phrasing_so_no_filter_knows_it(name: str):
    filters = string_filters(words.VOCABULARY, name)
    for c in fragment_cells(name, 1000):
        padded = f" {c.prompt.lower().replace(',', '')} "
        assert not any(f" {p.lower()} " in padded for p in words.VOCABULARY.phrases_of(name))
        assert all(f(c.prompt) == c.prompt for f in filters)


def test_an_unknown_concept_has_no_cells():
    with pytest.raises(ConceptError, match="'Unicorns'"):
        target_cells("Unicorns", FULL)


def test_a_fair_eraser_passes_and_what_a_reader_should_know_is_said():
    eraser = open_eraser()
    known = replace(eraser, header=replace(eraser.header, reference=Provenance(((0, 900),), labels=("Cats",))))
    assert notes_on(EraserMethod(known), everything()) == []
    (note,) = notes_on(EraserMethod(eraser), everything())
    assert "does not say what its reference was made with" in note
    labelled = replace(eraser, header=replace(eraser.header, reference=Provenance(labels=("Cats", "Van_Gogh"))))
    (note,) = notes_on(EraserMethod(labelled), everything())
    assert "labelled with this concept" in note
    foreign = replace(eraser, header=replace(eraser.header, reference=Provenance(sae="a Hub id")))
    assert "trained elsewhere (a Hub id)" in notes_on(EraserMethod(foreign), everything())[0]
    dev = replace(known, header=replace(known.header, concept="Cartoon"))
    (note,) = notes_on(EraserMethod(dev), everything())
    assert "Cartoon is a development concept" in note


def test_controls_are_made_with_nothing_and_may_know_every_phrasing():
    assert [note for f in string_filters(words.VOCABULARY, "Van_Gogh") for note in notes_on(f, everything())] == []


DIGEST = hashlib.sha256(b"a cat as a Van Gogh painting").hexdigest()[:8]


@pytest.mark.parametrize("where", ["header", "reference"])
@pytest.mark.parametrize(
    ("leak", "message"),
    [
        ({"seeds": (0, 10_000)}, "made with the seeds 0 to 10000"),
        ({"seeds": (TEST_SEEDS.start, TEST_SEEDS.start)}, "made with the seeds 10000"),
        ({"prompts": ("a cat as a Van Gogh painting",)}, "'a cat as a Van Gogh painting', which would test it"),
        ({"prompts": ("a lighthouse like The Starry Night",)}, "lighthouse like The Starry Night', which is held out"),
        ({"prompt_digests": ("01234567", DIGEST)}, "'a cat as a Van Gogh painting', which would test it"),
        ({"phrasings": (0, 3)}, "the phrasing 3, which is held out"),
    ],
)
def test_an_overlap_is_refused_in_the_eraser_s_own_data_and_in_its_reference_s(where: str, leak: dict, message: str):
    eraser = open_eraser()
    if where == "reference" or not hasattr(eraser.header, next(iter(leak))):
        ranges = {"seeds": ((1, 2), leak["seeds"])} if "seeds" in leak else {}
        header = replace(eraser.header, reference=Provenance(**{**leak, **ranges}))
    else:
        header = replace(eraser.header, **leak)
    with pytest.raises(SplitError, match=message):
        notes_on(EraserMethod(replace(eraser, header=header)), [*base_cells(1), *target_cells("Van_Gogh", FULL)])


def test_a_header_without_seeds_is_refused():
    eraser = open_eraser()
    with pytest.raises(SplitError, match="does not say which seeds"):
        notes_on(EraserMethod(replace(eraser, header=replace(eraser.header, seeds=None))), everything())


def test_held_out_grid_is_a_group_of_its_own():
    assert {c.group for c in base_cells(1, 3)} == {HELD_OUT_GRID}


def test_the_demo_draws_what_fits_its_batches():
    """A style's target images fill one batch: a filter that acts on them alone costs no second one."""
    demo = DemoSettings()
    assert demo.phrases == ("Van Gogh style", "cat")
    s = _with_concepts(demo.evaluate, [("", canvas_concept("Van_Gogh")), ("", canvas_concept("Cats"))])
    cells = canvas_protocol(["Van_Gogh"], s).cells["Van_Gogh"]
    target = [c for c in cells if c.asks_for("Van_Gogh") and c.group in (GRID, TARGET)]
    assert s.sampling is not None and len(target) == s.sampling.batch_size
