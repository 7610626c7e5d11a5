"""New instructions from a few (Self-Instruct, Wang et al. 2022, arXiv 2212.10560).

Each request shows the model `shots` instructions of the seeds and asks for more. A new one is kept if its ROUGE-L
(F-measure) with every seed and every kept one is below `rouge`, and if its length and its words pass the paper's kind
of filter. Unlike the paper, the examples are all seeds (there: six seeds and two new ones), so that a request does not
depend on the answers before it: requests run side by side, and a stopped command asks for the very same.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rouge_score import rouge_scorer, tokenize

from graft.data.endpoint import body, digest
from graft.data.generate import Job, Progress, Run
from graft.data.items import Item
from graft.data.journal import Journal
from graft.data.recipe import Recipe, SelfInstructSettings, SourceSettings
from graft.data.rows import Row
from graft.errors import ConfigError, DataError

BATCH = 16
"""Requests between two looks at how many instructions are there; it decides what is asked, so it is no setting."""
WORDS = (4, 150)
BEYOND_TEXT = (
    *("image", "images", "graph", "graphs", "picture", "pictures", "file", "files"),
    *("map", "maps", "draw", "plot"),
)
"""Words of tasks that a language model cannot do; the list of the paper's code."""
NUMBERED = re.compile(
    r"[\W_]*(?:task\W*)?\d+[\s*_]*(?:[.:)\]](?!\d)|[-\u2013\u2014](?=\s))[\s*]*(?P<text>.*)", re.IGNORECASE
)
"""A line with a number, "Task 9: ...", "**9.** ...", "9) ..." or "Task 9 - ...", and none such as "2.5 litres"."""


def invent(
    source: SourceSettings,
    settings: SelfInstructSettings,
    seeds: Sequence[Row],
    recipe: Recipe,
    journal: Journal,
    progress: Progress | None = None,
) -> tuple[list[Row], Counter[str]]:
    """(the new instructions as rows, how many were left out for what reason).

    There are fewer than `settings.count` if `settings.requests` were made before, or a batch gave none.

    Raises:
        DataError: there is none, or as for `generate`.
    """
    if recipe.generate is None or len(seeds) < settings.shots:
        raise ConfigError(f"sources {source.called}: {settings.shots} shots of {len(seeds)} seeds; lower shots")
    pool = _Pool([_instruction(row) for row in seeds], settings.rouge)
    rows: list[Row] = []
    dropped: Counter[str] = Counter()
    run = Run(recipe.generate, journal, settings.requests, "instructions", progress)
    asked = 0
    for start in range(0, settings.requests, BATCH):
        numbers = range(start, min(start + BATCH, settings.requests))
        shown = [_drawn(source, settings, seeds, recipe.seed, number) for number in numbers]
        jobs = [_job(source, recipe, each, number) for number, each in zip(numbers, shown, strict=True)]
        run.fetch(jobs)
        asked, before = asked + len(jobs), len(rows)
        for job, examples in zip(jobs, shown, strict=True):
            line = journal.answers.get(job.key)
            if line is None:
                continue
            found = list(instructions(line["text"], recipe.generate.api))
            dropped["answer without instructions"] += not found
            for text in found:
                why = _fault(text) or pool.like(text)
                if why is not None:
                    dropped[why] += 1
                elif len(rows) < settings.count:
                    pool.add(text)
                    fields = {"prompt": text, "seeds": [row.index for row in examples]}
                    rows.append(Row(form="prompt", index=len(rows) + 1, source=source.data, prompt=text, fields=fields))
        answered = any(job.key in journal.answers for job in jobs)
        if len(rows) == settings.count or (answered and len(rows) == before):
            break
    dropped["request for instructions without an answer"] = len(run.failed)
    dropped = +dropped
    if not rows:
        why = ", ".join(f"{count} {what}" for what, count in dropped.items())
        raise DataError(
            f"sources {source.called}: no new instruction came of {asked} requests (left out: {why}); "
            f"{journal.path} has the answers"
        )
    return rows, dropped


def request_text(shown: Sequence[Row], api: str) -> str:
    """What the model is asked: some instructions, and for more of them."""
    lines = [f"Task {n}: {' '.join(_instruction(row).split())}" for n, row in enumerate(shown, start=1)]
    if api == "completions":
        return "\n".join(["Come up with a series of tasks:", *lines, f"Task {len(lines) + 1}:"])
    more = f"Write 8 new tasks, unlike these, each on a line that begins with 'Task {len(lines) + 1}:' and so on."
    return "\n".join(["Come up with a series of tasks:", *lines, "", more])


def instructions(text: str, api: str) -> Iterator[str]:
    """The instructions in an answer: lines with a number (`NUMBERED`); a completion begins with one without."""
    for number, line in enumerate(text.strip().splitlines()):
        found = NUMBERED.match(line)
        if found is not None:
            yield found["text"].strip(" *")
        elif number == 0 and api == "completions":
            yield line.strip()


class _Pool:
    """Instructions that a new one is compared with."""

    def __init__(self, texts: Sequence[str], limit: float) -> None:
        self._scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
        self._limit, self._texts = limit, [(text, self._count(text)) for text in texts]

    def add(self, text: str) -> None:
        self._texts.append((text, self._count(text)))

    def like(self, text: str) -> str | None:
        """Why not to add it. Common words bound the longest common subsequence, which is long to find."""
        mine = self._count(text)
        for other, theirs in self._texts:
            bound = 2 * (mine & theirs).total() / max(1, mine.total() + theirs.total())
            if bound >= self._limit and self._scorer.score(other, text)["rougeL"].fmeasure >= self._limit:
                return "like another instruction"
        return None

    @staticmethod
    def _count(text: str) -> Counter[str]:
        return Counter(tokenize.tokenize(text, None))


def _fault(text: str) -> str | None:
    words = text.split()
    if not WORDS[0] <= len(words) <= WORDS[1]:
        return f"instruction not of {WORDS[0]} to {WORDS[1]} words"
    if any(word.casefold().strip(".,;:!?\"'()") in BEYOND_TEXT for word in words):
        return "instruction for more than text"
    return None


def _drawn(
    source: SourceSettings, settings: SelfInstructSettings, seeds: Sequence[Row], seed: int, number: int
) -> list[Row]:
    return random.Random(f"seeds {seed} {source.called} {number}").sample(list(seeds), settings.shots)


def _job(source: SourceSettings, recipe: Recipe, shown: Sequence[Row], number: int) -> Job:
    assert recipe.generate is not None
    asked = request_text(shown, recipe.generate.api)
    request: dict[str, Any] = body(recipe.generate.model_copy(update={"system": None}), asked)
    row = Row(form="prompt", index=number + 1, source=source.data)
    key = digest([request, recipe.generate.api, source.called, "instructions", number])
    return Job(key, Item(source=f"{source.called} instructions", row=row), 0, request, asked)


def _instruction(row: Row) -> str:
    found = row.fields.get("instruction")
    return found if isinstance(found, str) else row.prompt
