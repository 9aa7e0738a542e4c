"""The split of what methods are made with from what they are tested on (docs/explanation/laws.md, law 12)."""

from __future__ import annotations

import hashlib

from neuraleraser.errors import SplitError
from neuraleraser.evaluation.method import Method
from neuraleraser.evaluation.protocol import HELD_OUT, HELD_OUT_GRID, EvaluationProtocol
from neuraleraser.settings import SELECTION_SEEDS
from neuraleraser.vocabulary import HELD_OUT as HELD_OUT_PHRASINGS
from neuraleraser.vocabulary import PHRASINGS

_HELD_OUT_NUMBERS = PHRASINGS[HELD_OUT_PHRASINGS]
_MOST_SEEDS = 5  # that a note lists


def check_split(method: Method, protocol: EvaluationProtocol) -> list[str]:
    """Raise SplitError if what the method was made with overlaps its cells; return what a reader should know.

    No seed and no prompt may be shared, and where held-out phrasings are tested, none may have been used; this covers
    the data of a reference as well. Said, and no error: labels of a reference that name the concept, data that is not
    known, a concept on which defaults were set, and seeds that a published protocol gives.
    """
    name, notes = method.concept, []
    vocabulary = protocol.vocabulary
    if vocabulary and name in vocabulary.development:
        notes.append(f"{name} is a development concept: defaults were chosen on it, so its figures are no test")
    made = method.made_with
    if made is None:
        return notes
    who = f"{method.name!r} of {name!r}"
    reserved = vocabulary.phrases_of(name)[HELD_OUT_PHRASINGS] if vocabulary and name in vocabulary else ()
    prompts = set(made.prompts)
    leaked = [f"the phrasing {number}" for number in sorted(set(made.phrasings) & set(_HELD_OUT_NUMBERS))]
    leaked += [repr(prompt) for prompt in sorted(prompts) if any(phrase in prompt for phrase in reserved)]
    shared: set[int] = set()
    for cell in (*protocol.cells[name], *protocol.lessons.get(name, ())):
        for first, last in made.seeds:
            if first <= cell.seed <= last and protocol.name:
                shared.add(cell.seed)
            elif first <= cell.seed <= last:
                raise SplitError(
                    f"{who} was made with the seeds {first} to {last}, and {cell.prompt!r} would be tested with seed "
                    f"{cell.seed}: make it with seeds of {SELECTION_SEEDS.start} to {SELECTION_SEEDS.stop - 1}"
                )
        if cell.prompt in prompts or hashlib.sha256(cell.prompt.encode()).hexdigest()[:8] in made.prompt_digests:
            raise SplitError(f"{who} was made with {cell.prompt!r}, which would test it: make it with other prompts")
        if leaked and cell.group in (HELD_OUT, HELD_OUT_GRID):
            raise SplitError(
                f"{who} was made with {leaked[0]}, which is held out for testing: "
                "make it with the first two phrasings of each concept only"
            )
    if shared:
        some = ", ".join(map(str, sorted(shared)[:_MOST_SEEDS])) + ", ..." * (len(shared) > _MOST_SEEDS)
        notes.append(f"{who} was made with seeds that {protocol.name} gives ({some}), on other prompts")
    if name in made.labels:
        notes.append(f"the reference that {who} was made with was labelled with this concept")
    if made.unknown:
        notes.append(f"{who}: {made.unknown}")
    return notes
