"""In-context learning: demonstrations in front of the question, and no training.

A label is chosen by the likelihood of its word behind the prompt, all tokens of the word together. Calibrated, each
label's share of the probability is divided by the share that it has behind questions of the same pattern without
content: the mean over "N/A", "[MASK]" and the empty text in place of every column (contextual calibration, Zhao et al.
2021, arXiv 2102.09690, with its diagonal W and without b). Other rows are answered by generation. Without shots the
pattern stands alone.

Shapes: N rows, C label words.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from graft import roles
from graft.data.encode import Example, end_id
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate import metrics as measures
from graft.evaluate.batches import Progress, labels_of
from graft.evaluate.generate import Decoding, generate
from graft.evaluate.prefix import log_likelihoods, without_end
from graft.evaluate.run import Evaluation, Scores
from graft.evaluate.score import words_of
from graft.evaluate.shots import BETWEEN, answered, fitting, with_shots
from graft.ids import IGNORED

CONTENT_FREE = ("N/A", "[MASK]", "")
"""What stands in place of a question's columns, as in Zhao et al."""


@dataclass(frozen=True)
class FewShot(Evaluation):
    """An evaluation with what stood in front of every row."""

    shots: tuple[Row, ...] = ()


@dataclass(frozen=True)
class LabelScores:
    """How likely each label's word is behind each row's prompt."""

    words: list[str]
    log_NC: Tensor
    """Log-probabilities of the words, in nats."""
    log_prior_NC: Tensor | None
    """The logs of the words' shares behind questions without content of each row's pattern; None: they were not asked.
    In logs, for a share may be less than the least number of 32 bits."""

    def chosen(self, calibrated: bool = False) -> list[str]:
        """The word of each row."""
        scores_NC = self.log_NC
        if calibrated:
            if self.log_prior_NC is None:
                raise ConfigError("calibrated: the content-free questions were not asked; say calibrate=True")
            scores_NC = scores_NC - self.log_prior_NC
        return [self.words[int(best)] for best in scores_NC.argmax(-1)]


def few_shot(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    pool: Sequence[Row],
    template: Template,
    *,
    shots: int | str = 16,
    most: int | None = None,
    seed: int = 0,
    pattern: int | None = None,
    calibrate: bool = False,
    balanced: bool | None = None,
    entries: Sequence[Any] = (None,),
    metrics: Sequence[str] | None = None,
    batch_size: int = 16,
    decoding: Decoding | None = None,
    progress: Progress | None = None,
) -> FewShot:
    """The metrics of each entry with demonstrations in front of each row.

    Args:
        rows: what is asked, with labels or references.
        pool: where the demonstrations are drawn from; none of them may be among the rows.
        template: how a row becomes a prompt and an answer; its task has the patterns and the labels' words (without a
            verbalizer: the labels of pool and rows themselves).
        shots: how many demonstrations; "fit": as many as fit into the context with every row and its longest answer.
        most: the highest count that "fit" may take; None: whatever the pool has.
        seed: draws them.
        pattern: which of the task's prompts, from 0; None: each row's own, as in training.
        calibrate: divide by what labels get without content (label metrics alone).
        balanced: as many demonstrations of each label; None: if the rows have labels.
        entries: None for the bare base, or adapters.
        metrics: accuracy and macro_f1 (rows with labels), exact_match, bleu and rouge_l (others); None: all that fit.
        decoding: of generation; an answer ends at an empty line, which parts demonstrations.

    Raises:
        DataError: too few rows in the pool, demonstrations that do not fit, a row of the pool that is asked too, or a
            label without a word.
        ConfigError: settings that contradict each other, or words that cannot be told apart.
    """
    chosen = _check(model, rows, template, metrics, calibrate)
    labels = labels_of(entries)
    every = [*pool, *rows]
    template = one_pattern(with_words(template.fit(every, tokenizer), every), pattern)
    drawn = fitting(model, tokenizer, rows, pool, template, shots, seed, most=most, balanced=balanced, entries=entries)
    _check_apart(rows, drawn)
    more: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    if rows[0].form == "label":
        found = [label_scores(model, tokenizer, rows, drawn, template, e, calibrate, **more) for e in entries]
        answers = {label: each.chosen(calibrate) for label, each in zip(labels, found, strict=True)}
        right = [template.answer(row) for row in rows]
        return FewShot(_scores(measures.LABEL, chosen, answers, right), answers, tuple(drawn))
    asked, made = with_shots(rows, drawn, template)
    answers = generate(model, tokenizer, asked, made, entries, decoding=decoding, **more)
    if template.kind != "chat":
        answers = {label: [text.split(BETWEEN)[0].strip() for text in texts] for label, texts in answers.items()}
    references = [made.references(row) for row in asked]
    return FewShot(_scores(measures.TEXT, chosen, answers, references), answers, tuple(drawn))


def label_scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    shots: Sequence[Row],
    template: Template,
    entry: Any = None,
    calibrate: bool = False,
    batch_size: int = 16,
    *,
    shared: bool = True,
    progress: Progress | None = None,
) -> LabelScores:
    """The likelihood of each label's word, behind the same demonstrations for all rows.

    Args:
        template: fitted, with one pattern or several.
        calibrate: ask the content-free questions too.
        shared: let the demonstrations go through the model once; False: with each row (the same numbers).

    Raises:
        DataError, ConfigError: as `few_shot`.
    """
    words = _words(template, rows, shots)
    first, place = _patterns(template, rows)
    asked = [*rows, *(_emptied(row, text) for row in first for text in CONTENT_FREE if calibrate)]
    prompts, made = with_shots(asked, shots, template)
    end = end_id(tokenizer)
    columns = []
    for word in words:
        examples = made.examples([answered(row, word, template) for row in prompts], tokenizer)
        columns.append([without_end(e, end) for e in examples] if made.mode == "causal" else examples)
    _check_words(words, [column[0] for column in columns])
    flat = [example for column in columns for example in column]
    found = log_likelihoods(
        model, tokenizer, flat, entry, mode=made.mode, batch_size=batch_size, shared=shared, progress=progress
    )
    log_NC = torch.tensor(found).view(len(words), len(asked)).T
    log_prior_NC = None
    if calibrate:
        log_shares = log_NC[len(rows) :].log_softmax(-1).unflatten(0, (len(first), len(CONTENT_FREE)))
        log_prior_NC = (log_shares.logsumexp(1) - math.log(len(CONTENT_FREE)))[place]
    return LabelScores(words, log_NC[: len(rows)], log_prior_NC)


def one_pattern(template: Template, pattern: int | None) -> Template:
    """The template with one of its task's prompts; `Template.to_dict` of it is `data.template` of a run.

    Raises:
        ConfigError: no such prompt.
    """
    if pattern is None:
        return template
    prompts = () if template.task is None else template.task.templates
    if not 0 <= pattern < len(prompts):
        raise ConfigError(f"pattern {pattern}: the template has {len(prompts)}, counted from 0")
    return dataclasses.replace(template, task=dataclasses.replace(template.task, templates=(prompts[pattern],)))  # type: ignore[type-var]


def with_words(template: Template, rows: Sequence[Row]) -> Template:
    """The template with a word for each label of these rows, if its task has no verbalizer.

    So what can be chosen is the same for every set that is asked with it.

    Raises:
        DataError: a label that is a number, which has no word of its own.
    """
    task = template.task
    if task is None or task.verbalizer:
        return template
    words = {str(row.label): template.answer(row) for row in rows if row.label is not None}
    return dataclasses.replace(template, task=dataclasses.replace(task, verbalizer=dict(sorted(words.items()))))


def _scores(known: Any, chosen: Sequence[str], answers: dict[str, list[str]], right: Sequence[Any]) -> Scores:
    return {label: {name: known[name](texts, right) for name in chosen} for label, texts in answers.items()}


def _patterns(template: Template, rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """The first row of each pattern that the rows use, and for each row the place of its pattern among these."""
    chosen = [0 if template.task is None else template.task.chosen(row, template.seed) for row in rows]
    used = list(dict.fromkeys(chosen))
    return [rows[chosen.index(pattern)] for pattern in used], [used.index(pattern) for pattern in chosen]


def _emptied(row: Row, text: str) -> Row:
    """The row with `text` in place of every column."""
    pair = None if row.pair is None else text
    return dataclasses.replace(row, text=text, pair=pair, fields=dict.fromkeys(row.fields, text))


def _words(template: Template, rows: Sequence[Row], shots: Sequence[Row]) -> list[str]:
    """Every word that a label can have.

    Raises:
        DataError: a label without a word. ConfigError: two labels of the rows, or of the shots, have one word.
    """
    for each in (rows, shots):  # which may name the same label in two ways, by number and by word
        label_of: dict[str, str] = {}
        for row in each:
            word, label = template.answer(row), str(row.label)
            if label_of.setdefault(word, label) != label:
                raise ConfigError(
                    f"template verbalizer: labels {label_of[word]!r} and {label!r} have the same word {word!r}; "
                    "likelihood cannot tell them apart, so give each its own"
                )
    words = list(words_of(template, [*rows, *shots]))
    if len(words) < 2:
        raise ConfigError(f"template verbalizer: {len(words)} word, so there is nothing to choose; give two or more")
    return words


def _check_words(words: Sequence[str], examples: Sequence[Example]) -> None:
    """Refuse a word that begins another one: it could never be less likely."""
    ids = [tuple(label for label in example.labels if label != IGNORED) for example in examples]
    for a, first in zip(words, ids, strict=True):
        for b, second in zip(words, ids, strict=True):
            if a != b and second[: len(first)] == first:
                raise ConfigError(
                    f"template verbalizer: {a!r} is the beginning of {b!r} in tokens, so it would always be likelier; "
                    "give words that begin differently"
                )


def _check_apart(rows: Sequence[Row], drawn: Sequence[Row]) -> None:
    """A demonstration must not tell a row its answer."""
    asked = {row.question: row for row in rows}
    for shot in drawn:
        if shot.question in asked:
            raise DataError(
                f"{shot.where}: drawn as a demonstration, and {asked[shot.question].where} asks the same; remove one"
            )


def _check(
    model: Any, rows: Sequence[Row], template: Template, metrics: Sequence[str] | None, calibrate: bool
) -> list[str]:
    """The metrics, or an error for what the rows, the template or the model cannot give."""
    if not rows:
        raise DataError("no rows to evaluate; give at least one")
    if template.mode == "classification":
        raise ConfigError("template mode 'classification': a head reads no demonstrations; take mode causal or seq2seq")
    if roles.is_encoder_decoder(model) != (template.mode == "seq2seq"):
        other = "seq2seq" if template.mode == "causal" else "causal"
        raise ConfigError(f"{type(model).__name__} needs a template of mode '{other}', not '{template.mode}'")
    if template.slots:
        raise ConfigError("template templates: pseudo-tokens in every demonstration have no meaning; take them out")
    form = rows[0].form
    if form == "text":
        raise DataError(f"{rows[0].source}: plain text has no question; in-context learning needs labels or answers")
    known = measures.LABEL if form == "label" else measures.TEXT
    chosen = list(known) if metrics is None else measures.known_metrics(metrics)
    wrong = next((name for name in chosen if name not in known), None)
    if wrong is not None:
        raise ConfigError(f"metrics: {wrong} does not fit few-shot rows of this form; take {', '.join(known)}")
    if calibrate and form != "label":
        raise ConfigError("calibrate: it corrects label likelihoods, and these rows have no labels; leave it out")
    return chosen
