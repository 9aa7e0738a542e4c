"""Control: a filter that takes the concept's phrases out of the prompt, before the untouched model sees it.

It knows the phrases it is given and nothing else, so it must fail where a concept enters by other words, embeddings or
pictures. Where it scores as well as a method that reads activations, a table says nothing for that method.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from neuraleraser.errors import ConceptError, SettingsError
from neuraleraser.methods.changed_prompts import PromptControl
from neuraleraser.vocabulary import PHRASINGS, SEEN, Vocabulary


@dataclass(frozen=True)
class StringFilter(PromptControl):
    """Replaces phrases of a concept in prompts.

    Of several phrases that start at one place the longest counts, in whole words and in any case.

    Attributes:
        concept: Name of the concept.
        kind: "style" or "object".
        phrases: Each phrase with its replacement, used if it stands alone: "an empty scene" for an object; "" for a
            style, which is dropped together with its comma. Beside another object ("X and ", " and X") an object is
            dropped.
        others: Phrases of other concepts, which are never touched, even if one of the concept's lies within.

    Examples:
        >>> filter = StringFilter("Van_Gogh", "style", {"in Van Gogh style": ""})
        >>> filter("a cat in Van Gogh style")
        'a cat'
        >>> with filter.applied(pipe):
        ...     plain = generate(pipe, prompts, [0, 1], quick)
    """

    concept: str
    kind: str
    phrases: Mapping[str, str]
    others: Sequence[str] = ()
    name: str = "string-filter"
    made_with: None = None

    def __post_init__(self) -> None:
        if not self.phrases or not all(phrase.strip() for phrase in self.phrases):
            raise SettingsError(
                f"the phrases are {list(self.phrases)}: pass one or more of {self.concept!r}, none empty"
            )

    @property
    def key(self) -> str:
        """Digest of the phrases."""
        text = repr((sorted(self.phrases.items()), sorted(self.others)))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __call__(self, prompt: str) -> str:
        """Return the prompt without the concept.

        Args:
            prompt: The prompt.

        Returns:
            The prompt in which the concept's phrases are replaced.
        """
        own = [match for match in self._pattern.finditer(prompt) if match[0].lower() in self._own]
        for match in reversed(own):
            before, after = prompt[: match.start()], prompt[match.end() :]
            prompt = _joined(before, self._own[match[0].lower()], after)
        return prompt

    @cached_property
    def _own(self) -> dict[str, str]:
        return {phrase.lower(): instead for phrase, instead in self.phrases.items()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        every = sorted({*self._own, *(phrase.lower() for phrase in self.others)}, key=len, reverse=True)
        return re.compile(rf"\b(?:{'|'.join(map(re.escape, every))})\b", re.IGNORECASE)


def _joined(before: str, instead: str, after: str) -> str:
    """Return a prompt around which a phrase was taken out."""
    if not instead:  # a style: dropped with its comma
        left, right = before.rstrip(" ,"), after.lstrip(" ,")
        both = before.rstrip().endswith(",") and after.lstrip().startswith(",")
        return f"{left}{', ' if both else ' '}{right}" if left and right else left or right
    if re.search(r"\sand\s+$", before):  # an object beside another
        return re.sub(r"\s+and\s+$", "", before) + after
    if re.match(r"\s+and\s", after):
        return before + re.sub(r"^\s+and\s+", "", after)
    return before + instead + after


def string_filters(vocabulary: Vocabulary, name: str) -> list[StringFilter]:
    """Return two string filters of a concept of a vocabulary.

    "string-filter-all" knows every phrasing there is, of all concepts; "string-filter-seen" knows those that erasers
    are made with. An object's phrase is replaced as in the pairs that erasers are made with.

    Args:
        vocabulary: The vocabulary.
        name: Name of the concept in it.

    Returns:
        The two filters.

    Raises:
        ConceptError: The vocabulary does not have the name.

    Examples:
        >>> from neuraleraser.canvas.words import VOCABULARY
        >>> every, seen = string_filters(VOCABULARY, "Van_Gogh")
        >>> every("a cat as a Van Gogh painting")
        'a cat'
    """
    v = vocabulary
    if name not in v:
        raise ConceptError(f"the {v.name} has no concept {name!r}: pass one of its styles or objects")
    kind = "object" if name in v.objects else "style"
    filters = []
    for label, numbers in (("string-filter-all", PHRASINGS), ("string-filter-seen", PHRASINGS[SEEN])):
        known = {concept: [v.phrases_of(concept)[i] for i in numbers] for concept in (*v.objects, *v.styles)}
        instead = [v.empty_phrases[i] if kind == "object" else "" for i in numbers]
        others = [phrase for concept, phrases in known.items() if concept != name for phrase in phrases]
        filters.append(StringFilter(name, kind, dict(zip(known[name], instead, strict=True)), others, label))
    return filters
