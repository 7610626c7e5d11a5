"""Near duplicates against brute force, and hand-computed indices."""

from __future__ import annotations

import itertools
import random

import pytest

from graft.data.similar import Groups, grams, jaccard, near_pairs, normalised


def variants(count: int) -> list[str]:
    """Texts that share a good part of their words, at every degree."""
    chance = random.Random(1)
    words = [
        "a",
        "film",
        "that",
        "moves",
        "and",
        "bores",
        "in",
        "turn",
        "with",
        "much",
        "to",
        "say",
        "about",
        "small",
        "things",
    ]
    texts = []
    for _ in range(count):
        text = list(words)
        for _ in range(chance.randrange(7)):
            text[chance.randrange(len(text))] = chance.choice(["x", "dull", "fine", "moving", "", "grown"])
        texts.append(normalised(" ".join([*text, *text[: chance.randrange(2)]])))
    return texts


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
def test_near_pairs_are_those_of_brute_force(threshold: float) -> None:
    # Of the last ones, two share 2 of 3 grams, and the third is the rarest of each: only the longest prefix finds them.
    texts = [*variants(150), "", "abc", "abcd", "abcde", "1234567", "2345678", "23456", "34567"]
    sets = [grams(text) for text in texts]
    expected = {
        (i, j)
        for i, j in itertools.combinations(range(len(texts)), 2)
        if len(sets[i] & sets[j]) >= threshold * len(sets[i] | sets[j]) - 1e-9
    }
    first = {text: texts.index(text) for text in texts}
    found = set(near_pairs(texts, threshold))
    unique = {(i, j) for i, j in expected if first[texts[i]] == i and first[texts[j]] == j}
    equal = {(first[text], j) for j, text in enumerate(texts) if first[text] != j}
    assert found == unique | equal
    assert len(unique) > 5 or threshold == 1.0


def test_the_index_by_hand() -> None:
    # "abcdef": abcde, bcdef; "abcdeg": abcde, bcdeg; one of three.
    assert jaccard("abcdef", "Abcdeg!") == pytest.approx(1 / 3)
    assert jaccard("abc", "abc.") == 1.0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  A “fine”  Film, really?! ", "a fine film really"),
        ("3 - 4", "3 - 4"),
        ("3.5 isn't 35", "3.5 isn't 35"),
        ("ﬁne ＡＢＣ", "fine abc"),
        ("?!", "?!"),
    ],
)
def test_normalised(text: str, plain: str) -> None:
    assert normalised(text) == plain


def test_groups_grow_together() -> None:
    groups = Groups(6)
    groups.join(0, 3)
    groups.join(4, 3)
    groups.join_equal(["a", "b", "b", "c", "d", "e"])
    assert [groups.of(n) for n in range(6)] == [0, 1, 1, 0, 0, 5]
