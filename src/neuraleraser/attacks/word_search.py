"""Black-box search for words: an attacker who can only draw, and score what is drawn.

Ours; coordinate search, as simple as such an attacker may be. Words stand behind a prompt. The first quarter of the
queries are words drawn at random. From the best of these, a query replaces one word, each in turn, by one drawn at
random, and keeps it where the score does not fall. SneakyPrompt (Yang et al., IEEE
S&P 2024, arXiv 2305.12082) searches words for a prompt with queries alone, too, by reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from neuraleraser.attacks.denoising import Context
from neuraleraser.errors import DataError, SettingsError
from neuraleraser.sampling import Images, generate
from neuraleraser.settings import Sampling, check_seed, check_whole

_LEAST_LETTERS = 3
_FRESH = 0.25
"""Share of the queries whose words are all drawn: one word, once it draws something clear, holds the others down."""


@dataclass(frozen=True)
class WordSearch:
    """Result of a search for words.

    Examples:
        >>> WordSearch(("a cat corroded", "a cat brown"), (0.9, 0.2), 20).prompts[0]
        'a cat corroded'
    """

    prompts: tuple[str, ...]
    """The best, best first."""
    scores: tuple[float, ...]
    """Mean score of each one's images."""
    queries: int
    """Prompts that were drawn and scored."""


def search_words(
    pipe: Any,
    prompt: str,
    score: Callable[[Images], Sequence[float]],
    *,
    applied: Context = nullcontext,
    words: Sequence[str] | None = None,
    count: int = 3,
    queries: int = 100,
    images: int = 2,
    sampling: Sampling | None = None,
    keep: int = 5,
    enough: float = float("inf"),
    seed: int = 0,
    on_query: Callable[[int, str, float], None] | None = None,
) -> WordSearch:
    """Search words which, behind a prompt, make images that score high, with nothing but queries.

    Args:
        pipe: The diffusers pipeline.
        prompt: What the words stand behind; it may be empty.
        score: Called with images uint8 [N, H, W, 3]; returns a number for each, high where they show the concept.
        applied: Context in which the method acts, as `Method.applied`; none: the base model.
        words: Candidates; None: `vocabulary_words(pipe)`. Leave out the words that name the concept, unless they may
            be found.
        count: Words behind the prompt.
        queries: Prompts that may be drawn.
        images: Images of each, of seeds seed, seed + 1, ...
        sampling: Steps, guidance, size and batch size; None: as `default_sampling` says.
        keep: Prompts that are returned, at most.
        enough: Mean score that ends the search.
        seed: Of the words and the images.
        on_query: Called as `on_query(query, prompt, score)`.

    Returns:
        The best prompts, their scores, and the queries.

    Raises:
        SettingsError: A setting is out of range, there are no candidates, or the score is not one number an image.
        DataError: A score is NaN or infinite.

    Examples:
        >>> found = search_words(pipe, "a cat", lambda images: images.mean((1, 2, 3)), queries=3, sampling=quick)
        >>> found.queries, len(found.prompts)
        (3, 3)
    """
    for name, value in (("count", count), ("queries", queries), ("images", images), ("keep", keep)):
        check_whole(name, value, 1, 1_000_000)
    check_seed(seed)
    known = tuple(vocabulary_words(pipe) if words is None else dict.fromkeys(words))
    if isinstance(words, str) or not known:
        raise SettingsError("there are no words to search among: pass a list of some as `words`")
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, float] = {}

    def draw() -> str:
        return known[int(torch.randint(len(known), (1,), generator=generator))]

    def query(chosen: Sequence[str]) -> float:
        text = " ".join([prompt, *chosen]).strip()
        if text not in scores:
            scores[text] = _score(score, generate(pipe, [text] * images, range(seed, seed + images), sampling))
            if on_query:
                on_query(len(scores) - 1, text, scores[text])
        return scores[text]

    with applied(pipe):
        chosen = [draw() for _ in range(count)]
        best, place, again = query(chosen), 0, 0
        # A prompt met again costs no query; many in a row: all there are have been met.
        while len(scores) < queries and best < enough and again < 100 * count:
            fresh, before = len(scores) < _FRESH * queries, len(scores)
            tried = [draw() if fresh or k == place else word for k, word in enumerate(chosen)]
            if (found := query(tried)) >= best:
                chosen, best = tried, found
            place, again = (place + 1) % count, 0 if len(scores) > before else again + 1
    order = sorted(scores, key=lambda text: -scores[text])[:keep]
    return WordSearch(tuple(order), tuple(scores[text] for text in order), len(scores))


def vocabulary_words(pipe: Any) -> list[str]:
    """Return the words that are one token each to a pipeline's tokenizer, in the order of the vocabulary.

    Of lower-case letters, three at least; what is a token only inside words is left out.

    Args:
        pipe: A pipeline with a tokenizer.

    Returns:
        The words.

    Raises:
        SettingsError: It has no tokenizer.

    Examples:
        >>> words = vocabulary_words(pipe)
        >>> "cat" in words, "a" in words
        (True, False)
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        raise SettingsError(f"{type(pipe).__name__} has no tokenizer: pass `words`")
    found = []
    for number in sorted(tokenizer.get_vocab().values()):
        word = tokenizer.decode([number]).strip()
        plain = len(word) >= _LEAST_LETTERS and word.isascii() and word.isalpha() and word.islower()
        if plain and tokenizer(word, add_special_tokens=False).input_ids == [number]:
            found.append(word)
    return found


def _score(score: Callable[[Images], Sequence[float]], images: Images) -> float:
    """Return the mean score of images."""
    values = torch.as_tensor(score(images), dtype=torch.float64)
    if list(values.shape) != [len(images)]:
        raise SettingsError(f"the score of {len(images)} images is {list(values.shape)}: return one number for each")
    if not torch.isfinite(values).all():
        raise DataError("the score has NaN or infinity: return finite numbers")
    return float(values.mean())
