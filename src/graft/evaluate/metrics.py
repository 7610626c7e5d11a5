"""Metrics: plain functions of predictions and right answers. Shares and scores run from 0 to 1, BLEU from 0 to 100."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graft.data.read import near
from graft.errors import ConfigError, DataError

NEEDS = {
    "loss": "loss",
    "perplexity": "loss",
    "exact_match": "text",
    "bleu": "text",
    "rouge_l": "text",
    "accuracy": "label",
    "macro_f1": "label",
}
"""What each metric is computed from: the loss of the right answers, generated text, or a chosen label."""


def known_metrics(names: Sequence[str]) -> list[str]:
    """The names in their order, each once.

    Raises:
        ConfigError: an unknown name, with the nearest known one; or none at all.
    """
    for name in names:
        if name not in NEEDS:
            raise ConfigError(f"metrics: unknown metric '{name}'{near(name, NEEDS)}; known: {', '.join(NEEDS)}")
    if not names:
        raise ConfigError(f"metrics: name at least one of {', '.join(NEEDS)}")
    return list(dict.fromkeys(names))


def perplexity(loss: float) -> float:
    """e to the mean loss of a token (nats); infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def exact_match(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The share of texts that equal one of their references, white space at both ends aside."""
    hits = sum(
        text.strip() in {right.strip() for right in rights} for text, rights in zip(texts, references, strict=True)
    )
    return hits / len(texts)


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU with all references of each row (sacrebleu: 13a tokens, mixed case, exponential smoothing)."""
    from sacrebleu.metrics import BLEU

    most = max(len(rights) for rights in references)
    streams = [[rights[k] if k < len(rights) else None for rights in references] for k in range(most)]
    return float(BLEU(force=True).corpus_score(list(texts), streams).score)


def check_references(names: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    """Refuse metrics that read nothing of the references, before a model has answered.

    Raises:
        DataError: ROUGE-L, and references without Latin letters or digits, of which rouge-score sees nothing.
    """
    if "rouge_l" in names and not latin(references):
        raise DataError(
            "rouge_l: rouge-score reads only Latin letters and digits and the references have none; use bleu"
        )


def latin(references: Sequence[Sequence[str]]) -> bool:
    """Whether any reference has a Latin letter or a digit."""
    return any(char.isascii() and char.isalnum() for rights in references for right in rights for char in right)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L F1 against each row's best reference (rouge-score, stemmed).

    Raises:
        DataError: references without Latin letters or digits, of which rouge-score sees nothing.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(["rouge_l"], references)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score_multi(list(rights), text)["rougeL"].fmeasure
        for text, rights in zip(texts, references, strict=True)
    ]
    return float(sum(scores) / len(scores))


def accuracy(chosen: Sequence[str], right: Sequence[str]) -> float:
    """The share of labels that are right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(list(right), list(chosen)))


def macro_f1(chosen: Sequence[str], right: Sequence[str]) -> float:
    """F1 of each label that is right or chosen somewhere, averaged with equal weight; 0 for one never right."""
    from sklearn.metrics import f1_score

    return float(f1_score(list(right), list(chosen), average="macro", zero_division=0.0))


TEXT: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], float]] = {
    "exact_match": exact_match,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
LABEL: dict[str, Callable[[Sequence[str], Sequence[str]], float]] = {"accuracy": accuracy, "macro_f1": macro_f1}
