"""Evaluation of entries side by side: which metrics the rows allow, and their values for each entry."""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from graft import roles
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate import metrics as measures
from graft.evaluate import score
from graft.evaluate.batches import BASE_LABEL, RANDOM_LABEL, Progress, labels_of, random_head
from graft.evaluate.generate import Decoding, generate, templates_of

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """What `examine` found."""

    scores: Scores
    """Label of the entry to metric to value."""
    answers: dict[str, list[str]]
    """Label of the entry to the generated text or chosen label of each row; empty if no metric needed them."""

    def __str__(self) -> str:
        """A table: a line for each entry, a column for each metric."""
        names = list(next(iter(self.scores.values())))
        lines = [["", *names], *([label, *(f"{found[n]:.4g}" for n in names)] for label, found in self.scores.items())]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = (
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
            for line in lines
        )
        return "\n".join("  ".join(cells).rstrip() for cells in shown)

    def write(self, path: str | Path, rows: Sequence[Row]) -> None:
        """Every answer beside what is right, a JSON object for each row; the file appears whole or not at all.

        Raises:
            DataError: there are no answers, or the disk refuses.
        """
        if not self.answers:
            raise DataError(f"{path}: no metric here needs answers, so there are none to write; take bleu or accuracy")
        new = Path(path).with_name(f".{Path(path).name}.{uuid.uuid4().hex[:8]}.new")
        try:
            with new.open("w", encoding="utf-8") as file:
                for number, row in enumerate(rows):
                    right = [str(row.label)] if row.form == "label" else list(row.references or (row.completion,))
                    answers = {label: texts[number] for label, texts in self.answers.items()}
                    shown = {"row": row.index, "question": row.question, "right": right, "answers": answers}
                    file.write(json.dumps(shown, ensure_ascii=False) + "\n")
            new.replace(path)
        except OSError as error:
            new.unlink(missing_ok=True)
            raise DataError(f"{path}: could not be written ({error.strerror})") from error


def default_metrics(rows: Sequence[Row], template: Template) -> list[str]:
    """What tells most about rows of this form."""
    if not rows:
        raise DataError("no rows to evaluate; give at least one")
    if template.mode == "classification":
        return ["loss", "accuracy", "macro_f1"]
    if rows[0].form == "label":
        return ["accuracy", "macro_f1"]
    if rows[0].form == "text":
        return ["loss", "perplexity"]
    rouge = ["rouge_l"] if measures.latin([template.references(row) for row in rows]) else []
    return ["loss", "perplexity", "exact_match", "bleu", *rouge]


def evaluate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template | Sequence[Template],
    entries: Sequence[Any] = (None,),
    metrics: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
) -> Scores:
    """The metrics of each entry, for example {"base": {"bleu": 0.2}, "e2e": {"bleu": 59.9}}.

    A classifier's base without a trained head of its own is called "base (random head)".

    Args:
        rows: rows with answers or labels; BLEU, ROUGE-L and exact match take all references of a row.
        template: how rows become text, one for all entries or one for each (see `Template`).
        entries: None for the base, a name, names, or a dict of name to weight.
        metrics: names of `metrics.NEEDS`; None for what fits the rows. Labels are chosen by a classification head, or
            else by the likelihood of each label's word as the answer.
        batch_size: rows in a batch, each of them once for each entry.

    Raises:
        DataError, ConfigError, RouteError: rows without what a metric needs, an unknown metric, an unknown adapter.
    """
    return examine(
        model,
        tokenizer,
        rows,
        template,
        entries,
        metrics,
        batch_size=batch_size,
        decoding=Decoding(max_new_tokens=max_new_tokens),
    ).scores


def examine(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    template: Template | Sequence[Template],
    entries: Sequence[Any] = (None,),
    metrics: Sequence[str] | None = None,
    *,
    batch_size: int = 16,
    decoding: Decoding | None = None,
    truncate: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """`evaluate`, with the answers; `truncate` cuts rows that are longer than the context: their end where losses are
    measured, their prompts where labels are chosen by words (see `score.choose_words`)."""
    labels = labels_of(entries)
    templates = [each.fit(rows, tokenizer) for each in templates_of(template, len(labels))]
    chosen = default_metrics(rows, templates[0]) if metrics is None else measures.known_metrics(metrics)
    needs = {measures.NEEDS[name] for name in chosen}
    _check(model, rows, templates, needs)
    if "text" in needs:
        measures.check_references(chosen, [template.references(row) for template in templates for row in rows])
    if templates[0].mode == "classification":
        return _classify(model, tokenizer, rows, templates, entries, chosen, batch_size, truncate, progress)
    values: dict[str, Scores] = {}
    answers: dict[str, list[str]] = {}
    settings: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if "loss" in needs:
        examples = score.encode(rows, templates, tokenizer)
        found = score.losses(model, tokenizer, examples, entries, mode=templates[0].mode, cut=truncate, **settings)
        values["loss"] = {label: _losses(each) for label, each in zip(labels, found, strict=True)}
    if "label" in needs:
        words = score.choose_words(model, tokenizer, rows, templates, entries, cut=truncate, **settings)
        right = [[template.answer(row) for row in rows] for template in templates]
        answers = dict(zip(labels, words, strict=True))
        values["label"] = {
            label: {name: measure(w, r) for name, measure in measures.LABEL.items()}
            for label, w, r in zip(labels, words, right, strict=True)
        }
    if "text" in needs:
        answers = generate(model, tokenizer, rows, templates, entries, decoding=decoding, **settings)
        values["text"] = {
            label: {
                name: measures.TEXT[name](answers[label], [template.references(row) for row in rows])
                for name in chosen
                if name in measures.TEXT
            }
            for label, template in zip(labels, templates, strict=True)
        }
    scores = {label: {name: values[measures.NEEDS[name]][label][name] for name in chosen} for label in labels}
    return Evaluation(scores, answers)


def check_request(names: Sequence[str] | None, answers: str | Path | None) -> None:
    """Refuse, before a model is loaded, what cannot come out right.

    Raises:
        ConfigError: an unknown metric, or a file for answers that exists or whose folder does not.
    """
    if names is not None:
        measures.known_metrics(names)
    if answers is not None and Path(answers).exists():
        raise ConfigError(f"--answers {answers}: it exists; take another file, or remove it first")
    if answers is not None and not Path(answers).absolute().parent.is_dir():
        raise ConfigError(f"--answers {answers}: the folder {Path(answers).parent} does not exist")


def _losses(found: Sequence[score.Loss]) -> dict[str, float]:
    """The mean over all trained tokens."""
    tokens = sum(loss.tokens for loss in found)
    if not tokens:
        raise DataError("no row has a trained token, so there is no loss; look at the data with graft data")
    mean = sum(loss.total for loss in found) / tokens
    return {"loss": mean, "perplexity": measures.perplexity(mean)}


def _classify(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    templates: Sequence[Template],
    entries: Sequence[Any],
    chosen: Sequence[str],
    batch_size: int,
    cut: bool,
    progress: Progress | None,
) -> Evaluation:
    """Labels by the model's classification head."""
    examples = score.encode(rows, templates, tokenizer)
    found = score.class_scores(model, tokenizer, examples, entries, batch_size=batch_size, cut=cut, progress=progress)
    scores: Scores = {}
    answers: dict[str, list[str]] = {}
    named = {BASE_LABEL: RANDOM_LABEL} if random_head(model) else {}
    labels = [named.get(label, label) for label in labels_of(entries)]
    for label, template, scores_NC in zip(labels, templates, found, strict=True):
        names = template.label_names
        numbers = [template.label_number(row) for row in rows]
        if scores_NC.shape[1] != len(names):
            raise ConfigError(
                f"the head has {scores_NC.shape[1]} outputs and the data {len(names)} labels; load the right base"
            )
        answers[label] = [names[int(best)] for best in scores_NC.argmax(-1)]
        right = [names[number] for number in numbers]
        loss = -float(sum(scores_NC[n, number] for n, number in enumerate(numbers))) / len(rows)
        all_values = {"loss": loss, "perplexity": measures.perplexity(loss)}
        all_values |= {name: measure(answers[label], right) for name, measure in measures.LABEL.items()}
        scores[label] = {name: all_values[name] for name in chosen}
    return Evaluation(scores, answers)


def _check(model: Any, rows: Sequence[Row], templates: Sequence[Template], needs: set[str]) -> None:
    """Refuse what the rows, the model or the templates cannot give, before anything runs."""
    if not rows:
        raise DataError("no rows to evaluate; give at least one")
    modes = {template.mode for template in templates}
    if len(modes) > 1:
        raise ConfigError(f"the templates have different modes ({', '.join(sorted(modes))}); evaluate them apart")
    mode = modes.pop()
    if mode != "classification" and roles.is_encoder_decoder(model) != (mode == "seq2seq"):
        other = "seq2seq" if mode == "causal" else "causal"
        raise ConfigError(f"{type(model).__name__} needs a template of mode '{other}', not '{mode}'")
    check_rows(rows, mode, needs)


def check_rows(rows: Sequence[Row], mode: str, needs: Collection[str]) -> None:
    """Refuse metrics that these rows cannot have in a template's mode; `needs`: of `metrics.NEEDS`.

    Raises:
        ConfigError, DataError: one of them.
    """
    where = rows[0].source
    if mode == "classification" and "text" in needs:
        raise ConfigError("a classification head writes no text; take loss, accuracy and macro_f1")
    if "label" in needs and rows[0].form != "label":
        raise DataError(f"{where}: accuracy and macro_f1 need a 'label' column; take exact_match, bleu or rouge_l")
    if "text" in needs and rows[0].form == "text":
        raise DataError(f"{where}: plain text has no prompt to answer; take loss and perplexity")
