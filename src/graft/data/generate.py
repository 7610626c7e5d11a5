"""Answers by a model behind an endpoint: each prompt is asked until it is answered, and only once over all starts."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from graft.data.endpoint import EMPTY, Again, Answer, Endpoint, body, digest
from graft.data.items import Item
from graft.data.journal import PROVENANCE, Journal
from graft.data.limits import Budget, Pace
from graft.data.recipe import GenerateSettings
from graft.data.similar import normalised
from graft.data.tasks import fill
from graft.errors import DataError, GraftError

Progress = Callable[[str, int, int], None]
LONGEST_BACKOFF = 60.0
FEW = 8
PATIENT = 10
"""Times the tries that count, after which a prompt is given up though the endpoint only asked to wait."""
"""So many failures without any answer show that the endpoint answers nothing (more, if more requests go at a time)."""
REFUSAL_SPAN = 200


@dataclass(frozen=True)
class Job:
    """One request: the item, which of its answers, and what is sent."""

    key: str
    item: Item
    sample: int
    request: dict[str, Any]
    asked: str
    """The prompt as the model gets it."""


@dataclass
class Generated:
    """The items with their answers, and what became of the requests."""

    items: list[Item]
    prompts: int
    failed: dict[str, str] = field(default_factory=dict)
    """Where ("reviews row 3"), and why."""
    dropped: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    cost: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for the report."""
        return {
            "requests": self.prompts,
            "answers": self.prompts - len(self.failed),
            "failed": self.failed,
            "dropped": dict(sorted(self.dropped.items())),
            "tokens": dict(sorted(self.tokens.items())),
            "models": dict(sorted(self.models.items())),
            "cost": round(self.cost, 9),
        }


def jobs_of(items: Sequence[Item], settings: GenerateSettings) -> list[Job]:
    """The requests that the items need; an item that stands twice in the mix is asked once."""
    found: dict[str, Job] = {}
    for item in items:
        if item.completion is None:
            asked = asked_of(item, settings)
            system = next((turn.content for turn in item.messages if turn.role == "system"), None)
            request = body(settings, asked, system)
            # An instruction's number moves when a request for earlier ones is answered late; its text does not.
            row = None if "seeds" in item.provenance else item.row.index
            for sample in range(settings.n):
                key = digest([request, settings.api, item.source, row, item.template, sample])
                found.setdefault(key, Job(key, item, sample, request, asked))
    return list(found.values())


def asked_of(item: Item, settings: GenerateSettings) -> str:
    """What the model is asked for an item."""
    own = item.messages[-1].content if item.messages else item.prompt
    if settings.prompt is None:
        return own
    return fill(settings.prompt, dataclasses.replace(item.row, fields={**item.row.fields, "prompt": own}))


def generate(
    items: Sequence[Item], settings: GenerateSettings, journal: Journal, *, progress: Progress | None = None
) -> Generated:
    """The items, those without an answer replaced by one for each answer that the model gave and the filters left.

    Args:
        items: those with an answer stay as they are.
        journal: answers that it has are not asked for again.
        progress: told what is done, how many of how many.

    Raises:
        DataError: more prompts than `max_failed` have no answer, or the endpoint refuses for good.
        ConfigError: the next request could pass `max_cost`.
    """
    jobs = jobs_of(items, settings)
    run = Run(settings, journal, len(jobs), "answers", progress)
    run.fetch(jobs)
    done = Generated([], len(jobs), cost=journal.cost)
    done.failed = {_where(job): run.failed[job.key] for job in jobs if job.key in run.failed}
    answers = _filtered(jobs, journal, settings, done)
    for item in items:
        if item.completion is not None:
            done.items.append(item)
            continue
        for job in jobs_of([item], settings):
            if job.key in answers:
                line = answers[job.key]
                said = {"sample": line["sample"]} | {name: line.get(name) for name in PROVENANCE}
                said = dict(item.provenance) | said
                # What continues a prompt may begin with white space that belongs to it, such as indentation.
                text = line["text"].strip() if settings.api == "chat" else line["text"].rstrip()
                done.items.append(dataclasses.replace(item, completion=text, provenance=said))
    return done


def _filtered(
    jobs: Sequence[Job], journal: Journal, settings: GenerateSettings, done: Generated
) -> dict[str, dict[str, Any]]:
    """The answers that are kept, in the order of the jobs, so that the order in which they came does not matter."""
    kept: dict[str, dict[str, Any]] = {}
    seen: set[tuple[Any, ...]] = set()
    for job in jobs:
        line = journal.answers.get(job.key)
        if line is None:
            continue
        done.models[str(line.get("model"))] += 1
        done.tokens.update(line.get("usage") or {})
        text = normalised(line["text"])
        same = (
            (job.item.source, job.item.row.index, job.item.template, text) if settings.duplicates == "row" else (text,)
        )
        why = _fault(line, job, settings)
        if why is None and settings.duplicates != "none" and same in seen:
            why = "repeats another answer"
        if why is not None:
            done.dropped[why] += 1
            continue
        seen.add(same)
        kept[job.key] = line
    return kept


def _fault(line: dict[str, Any], job: Job, settings: GenerateSettings) -> str | None:
    """Why an answer cannot be trained on, if so."""
    text, prompt = normalised(line["text"]), normalised(job.asked)
    if line.get("finish_reason") == "length" and not settings.keep_cut:
        return "cut at max_tokens"
    if line.get("finish_reason") == "content_filter":
        return EMPTY["content_filter"]
    if text == prompt or (len(prompt) >= 20 and text.startswith(prompt)):
        return "copy of the prompt"
    start = line["text"].strip()[:REFUSAL_SPAN].casefold()
    if line.get("finish_reason") == "refusal" or any(phrase.casefold() in start for phrase in settings.refusals):
        return "refusal"
    return None


def _where(job: Job) -> str:
    parts = [f"{job.item.source} row {job.item.row.index}"]
    parts += [f"template {job.item.template}"] if job.item.template is not None else []
    return ", ".join([*parts, f"answer {job.sample + 1}"] if job.sample else parts)


class Run:
    """Workers that take jobs until there are none, or until something ends the run.

    Args:
        total: jobs that may come in all, over which `max_failed` counts.
        what: they are, for the progress.

    Attributes:
        failed: the keys of jobs without an answer, and why.
    """

    def __init__(
        self, settings: GenerateSettings, journal: Journal, total: int, what: str, progress: Progress | None
    ) -> None:
        self.settings, self.journal, self.total, self.what = settings, journal, total, what
        self.progress = progress or (lambda what, done, total: None)
        self.failed: dict[str, str] = {}
        self.stopped: GraftError | None = None
        self.enough = False
        self.done = self.answered = 0
        self.pace = Pace(settings.requests_per_minute, settings.tokens_per_minute)

    def fetch(self, jobs: Sequence[Job]) -> None:
        """Ask for what the journal does not have, last for what failed before. Raises as `generate`."""
        missing = [job for job in jobs if job.key not in self.journal.answers]
        missing.sort(key=lambda job: job.key in self.journal.failed)
        self.done += len(jobs) - len(missing)
        if missing:
            asyncio.run(self._all(missing))
        self._check()

    async def _all(self, jobs: Sequence[Job]) -> None:
        """Ask for all; the first error that no retry mends is raised when the requests under way are answered."""
        waiting = iter(jobs)
        self.budget = Budget(self.settings, self.journal.cost)
        async with Endpoint(self.settings) as endpoint:
            count = min(self.settings.concurrency, len(jobs))
            await asyncio.gather(*(self._work(waiting, endpoint) for _ in range(count)))
        if self.stopped is not None:
            raise self.stopped

    def _check(self) -> None:
        """Refuse a run in which too many prompts have no answer.

        Raises:
            DataError: with the commonest reason.
        """
        if self.enough:
            why, count = Counter(self.failed.values()).most_common(1)[0]
            if not self._too_many():
                raise DataError(
                    f"generate: none of the first {len(self.failed)} prompts has an answer, most often: {why} "
                    f"({count}); mend that and give the same command"
                )
            raise DataError(
                f"generate: {len(self.failed)} of {self.total} prompts have no answer, most often: {why} ({count}), "
                f"and {self.answered} have one now (generate.max_failed is {self.settings.max_failed:g}); give the "
                "same command to ask for what is missing"
            )

    def _too_many(self) -> bool:
        return len(self.failed) > self.settings.max_failed * self.total

    def _ended(self) -> bool:
        return self.stopped is not None or self.enough

    async def _work(self, waiting: Iterator[Job], endpoint: Endpoint) -> None:
        for job in waiting:
            try:
                await self._job(job, endpoint)
            except GraftError as error:
                self.stopped = self.stopped or error
            if self._ended():
                return
            self.done += 1
            self.progress(self.what, self.done, self.total)

    async def _job(self, job: Job, endpoint: Endpoint) -> None:
        """Try until it is answered or the tries are used up.

        An endpoint that says when to come back, and answered others meanwhile, is busy: that counts as no try. All
        wait then, but not for ever the same prompt's sake: it may be the one that the endpoint cannot take.
        """
        counted, others, most = 0, self.answered, self.settings.retries + 1
        for tries in itertools.count(1):
            try:
                line = await self._try(job, endpoint, tries)
            except Again as again:
                if self._ended():
                    return
                counted += again.wait is None or self.answered == others
                others = self.answered
                if again.final or counted >= most or tries >= PATIENT * most:
                    self.failed[job.key] = again.why
                    break
                await self._back_off(max(0, counted - 1), again.wait, hold=tries <= most)
                if self._ended():
                    return
            else:
                self.answered += 1
                self.journal.add(line)
                return
        self.journal.add(self._name(job) | {"failed": self.failed[job.key], "time": _now()})
        hopeless = not self.journal.answers and len(self.failed) >= max(FEW, self.settings.concurrency)
        self.enough = self.enough or hopeless or self._too_many()

    async def _try(self, job: Job, endpoint: Endpoint, tries: int) -> dict[str, Any]:
        size = len(json.dumps(job.request, ensure_ascii=False).encode("utf-8", "replace"))
        reserved = await self.budget.reserve(size)
        spent = 0.0
        try:
            tokens = size // 4 + self.settings.max_tokens
            while wait := self.pace.delay(time.monotonic(), tokens):
                await asyncio.sleep(min(wait, 1.0))
                if self._ended():
                    raise Again("not asked")
            entry = self.pace.start(time.monotonic(), tokens)
            try:
                answer = await endpoint.ask(job.request)
            except Again as again:
                spent = self._charge(again, reserved)
                raise
            spent = self._price(answer.usage, reserved)
            entry[1] = float(sum(answer.usage.values())) or entry[1]
            return self._line(job, answer, endpoint, tries) | ({"cost": spent} if spent else {})
        finally:
            await self.budget.settle(reserved, spent)

    def _price(self, usage: dict[str, int], reserved: float) -> float:
        """By the endpoint's count of tokens; without one, the most that it can be."""
        return self.budget.price(usage["prompt"], usage["completion"]) if usage else reserved

    def _charge(self, again: Again, reserved: float) -> float:
        """What a failed try may have cost, which is written down so that later starts know."""
        spent = self._price(again.usage, reserved) if again.paid else 0.0
        if spent:
            self.journal.add({"charged": again.why, "cost": spent, "time": _now()})
        return spent

    async def _back_off(self, attempt: int, wait: float | None, hold: bool) -> None:
        """Twice as long after each try, by chance up to half less, so that not all come back at once.

        What the endpoint asks to wait comes before that; `hold`: for all.
        """
        longest = min(LONGEST_BACKOFF, self.settings.backoff * 2.0**attempt)
        until = time.monotonic() + longest * random.uniform(0.5, 1.0)
        if wait is not None:
            until += wait
            if hold:
                self.pace.hold(time.monotonic() + wait)
        while not self._ended() and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 1.0))

    def _name(self, job: Job) -> dict[str, Any]:
        item = job.item
        return {
            "key": job.key,
            "source": item.source,
            "row": item.row.index,
            "template": item.template,
            "sample": job.sample + 1,
        }

    def _line(self, job: Job, answer: Answer, endpoint: Endpoint, tries: int) -> dict[str, Any]:
        unprompted = {name: each for name, each in job.request.items() if name not in ("messages", "prompt")}
        return self._name(job) | {
            "text": answer.text,
            "endpoint": endpoint.url,
            "model_asked": self.settings.model,
            "model": answer.model,
            "settings": digest([unprompted, self.settings.api, self.settings.system, self.settings.prompt]),
            "prompt_hash": digest(job.request.get("messages", job.asked)),
            "finish_reason": answer.finish_reason,
            "usage": answer.usage,
            "time": _now(),
            "request_id": answer.request_id,
            "tries": tries,
        }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
