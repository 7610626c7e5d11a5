"""Texts that are the same but for case and punctuation, or nearly the same.

Nearly: the Jaccard index |A & B| / |A | B| of the sets of character 5-grams of the normalised texts reaches a
threshold. The pairs are found exactly, by prefix filtering (Bayardo et al. 2007, "Scaling up all pairs similarity
search"): with grams sorted from rare to frequent, two sets that are near share one of their first
|A| - ceil(t |A|) + 1.
"""

from __future__ import annotations

import math
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Sequence

GRAM = 5
QUOTES = "\"'“”‘’«»`"  # noqa: RUF001
OPENING = QUOTES + "([{¿¡"
CLOSING = QUOTES + ")]}.,;:!?"


def normalised(text: str) -> str:
    """Unicode's compatible form (NFKC) in lower case, without punctuation around words, single spaces.

    Other signs stay, and those at the other end of a word: "3 - 4" is not "3 + 4", "!a" is not "a", ".5" is not "5".
    """
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(filter(None, (word.lstrip(OPENING).rstrip(CLOSING) for word in words))) or " ".join(words)


def grams(text: str) -> set[str]:
    """The character 5-grams of a normalised text; a shorter one is its own."""
    return {text[i : i + GRAM] for i in range(max(1, len(text) - GRAM + 1))}


def jaccard(one: str, other: str) -> float:
    """|A & B| / |A | B| of two texts' 5-grams, after normalisation; 0 to 1."""
    a, b = grams(normalised(one)), grams(normalised(other))
    return len(a & b) / len(a | b)


def near_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Every pair (i, j), i < j, of normalised texts whose Jaccard index is at least `threshold`."""
    first: dict[str, int] = {}
    for number, text in enumerate(texts):
        if text in first:
            yield first[text], number
        else:
            first[text] = number
    numbers = list(first.values())
    sets = _ranked([texts[i] for i in numbers])
    index: dict[int, list[int]] = defaultdict(list)
    for x in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        size = len(sets[x])
        least = math.ceil(threshold * size - 1e-9)
        prefix = sets[x][: size - least + 1]
        candidates = {y for gram in prefix for y in index[gram] if len(sets[y]) >= least}
        mine = set(sets[x]) if candidates else set()
        for y in sorted(candidates):
            shared = len(mine.intersection(sets[y]))
            if shared >= threshold * (size + len(sets[y]) - shared) - 1e-9:
                yield min(numbers[x], numbers[y]), max(numbers[x], numbers[y])
        for gram in prefix:
            index[gram].append(x)


def _ranked(texts: Sequence[str]) -> list[array[int]]:
    """Each text's grams as numbers, the rarest first."""
    known: dict[str, int] = {}
    sets = [array("I", {known.setdefault(gram, len(known)) for gram in grams(text)}) for text in texts]
    counts = Counter(gram for each in sets for gram in each)
    rank = {gram: place for place, gram in enumerate(sorted(counts, key=lambda gram: (counts[gram], gram)))}
    return [array("I", sorted(rank[gram] for gram in each)) for each in sets]


class Groups:
    """Disjoint sets of numbers 0 to `size` - 1 that grow together (union-find)."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def of(self, number: int) -> int:
        """The group's smallest number."""
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        """Make one group of two."""
        low, high = sorted((self.of(one), self.of(other)))
        self._parent[high] = low

    def join_equal(self, keys: Sequence[Hashable]) -> None:
        """Join all numbers that have the same key; `keys` has one for each number."""
        first: dict[Hashable, int] = {}
        for number, key in enumerate(keys):
            self.join(first.setdefault(key, number), number)
