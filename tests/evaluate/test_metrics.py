"""Metrics against their definitions, worked out by hand."""

from __future__ import annotations

import math

import pytest

from graft.errors import ConfigError, DataError
from graft.evaluate import metrics


def test_exact_match_takes_any_reference() -> None:
    assert metrics.exact_match([" a b\n", "c", "d"], [["x", "a b"], ["C"], ["d "]]) == pytest.approx(2 / 3)


def test_bleu_by_hand() -> None:
    # 6 tokens; matches of 1 to 4 words: 5 of 6, 3 of 5, 2 of 4, 1 of 3; same length as the reference.
    by_hand = 100 * math.exp(sum(math.log(p) for p in (5 / 6, 3 / 5, 2 / 4, 1 / 3)) / 4)
    assert metrics.bleu(["the cat sat on a mat"], [["the cat sat on the mat"]]) == pytest.approx(by_hand)


def test_bleu_takes_the_nearest_of_several_references_of_each_row() -> None:
    texts = ["the cat sat on the mat", "two dogs ran down the road"]
    several = [["nothing like it", "the cat sat on the mat", "so far away"], ["two dogs ran down the road"]]
    assert metrics.bleu(texts, several) == pytest.approx(100)
    assert metrics.bleu(texts, [several[0][:1], several[1]]) < 60
    short = metrics.bleu(["the cat sat on"], [["the cat sat on the mat"]])
    assert short == pytest.approx(100 * math.exp(1 - 6 / 4))  # the penalty for shortness alone


def test_bleu_of_nothing_is_zero() -> None:
    assert metrics.bleu(["", ""], [["a"], ["b"]]) == 0


def test_rouge_l_by_hand() -> None:
    # The longest common subsequence of the better reference is "the cat on mat": 4 of 5 and 4 of 6 words.
    score = metrics.rouge_l(["the cat on my mat"], [["dogs"], ["the cat sat on the mat"]][1:])
    assert score == pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6))
    assert metrics.rouge_l(["a b"], [["c d", "a b"]]) == 1


def test_rouge_l_refuses_what_it_cannot_read() -> None:
    with pytest.raises(DataError, match=r"rouge_l: .*use bleu"):
        metrics.rouge_l(["東京"], [["東京"]])


def test_accuracy_and_macro_f1_by_hand() -> None:
    right, chosen = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    f1_a, f1_b = 2 * 1 * (2 / 3) / (1 + 2 / 3), 2 * 0.5 * 1 / 1.5
    assert metrics.accuracy(chosen, right) == 0.75
    assert metrics.macro_f1(chosen, right) == pytest.approx((f1_a + f1_b) / 2)
    assert metrics.macro_f1(["a", "a"], ["b", "b"]) == 0


def test_perplexity() -> None:
    assert metrics.perplexity(math.log(7)) == pytest.approx(7)
    assert metrics.perplexity(1e9) == math.inf


def test_unknown_metrics_name_the_nearest() -> None:
    assert metrics.known_metrics(["bleu", "loss", "bleu"]) == ["bleu", "loss"]
    with pytest.raises(ConfigError, match=r"unknown metric 'blue' \(did you mean 'bleu'\?\)"):
        metrics.known_metrics(["blue"])
    with pytest.raises(ConfigError, match="name at least one of loss"):
        metrics.known_metrics([])
