"""Answers of a local endpoint: what is asked and kept, and what happens when it is busy, broken or talks garbage."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Reply, Server, answer, prompt_of, serving

from graft.data.endpoint import Endpoint, retry_after
from graft.data.limits import OVERHEAD, Budget, Pace
from graft.data.make import Made, make
from graft.data.recipe import Recipe, make_recipe
from graft.data.rows import load_rows
from graft.errors import ConfigError, DataError

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kite", "lark"]
Script = Callable[[dict[str, Any], int], Reply]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    Path("animals.jsonl").write_text("".join(json.dumps({"name": name}) + "\n" for name in NAMES))


def settings(url: str, generate: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    asked = {"endpoint": url, "model": "m", "backoff": 0.001, "timeout": 20, **(generate or {})}
    source = {"data": "animals.jsonl", "templates": ["Describe the {name}."], "answer": "endpoint"}
    return {"sources": [source], "generate": asked, "output": "out", **more}


def recipe(url: str, generate: dict[str, Any] | None = None, **more: Any) -> Recipe:
    return make_recipe(settings(url, generate, **more))


def describe(body: dict[str, Any], before: int) -> Reply:
    return answer(f"It is fine: {prompt_of(body)[13:]}")


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


def served(script: Script, generate: dict[str, Any] | None = None, **more: Any) -> tuple[Made, Server]:
    with serving(script) as server:
        return make(recipe(server.url, generate, **more)), server


def test_each_row_is_asked_once_and_written_with_where_it_comes_from() -> None:
    given = {"system": "Be short.", "temperature": 0.5, "top_p": 0.9, "stop": ["\n"], "extra": {"top_k": 3}}
    made, server = served(describe, given)
    assert server.paths == ["/v1/chat/completions"] * 12 and set(server.asked.values()) == {1}
    body = min(server.bodies, key=prompt_of)
    assert body == {
        "model": "m",
        "max_tokens": 512,
        "top_k": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["\n"],
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Describe the ant."}],
    }
    rows = sorted(lines("out/train.jsonl"), key=lambda row: row["row"])
    assert [row["prompt"] for row in rows] == [f"Describe the {name}." for name in NAMES]
    assert [row["completion"] for row in rows] == [f"It is fine: {name}." for name in NAMES]
    one = rows[0]
    assert (one["source"], one["row"], one["template"], one["sample"]) == ("animals", 1, 1, 1)
    assert one["endpoint"] == f"{server.url}/chat/completions"
    assert (one["model_asked"], one["model"], one["finish_reason"], one["request_id"]) == ("m", "local-1", "stop", "r1")
    assert one["usage"] == {"prompt": 10, "completion": 5} and len(one["settings"]) == len(one["prompt_hash"]) == 16
    assert len({row["settings"] for row in rows}) == 1 and len({row["prompt_hash"] for row in rows}) == 12
    assert made.report["generate"]["tokens"] == {"completion": 60, "prompt": 120}
    assert {row.form for row in load_rows("out/train.jsonl")} == {"prompt"}


def test_completions_and_a_prompt_of_its_own() -> None:
    _, server = served(describe, {"api": "completions", "prompt": "Q: {prompt} ({name})\nA:"})
    assert set(server.paths) == {"/v1/completions"}
    assert "Q: Describe the ant. (ant)\nA:" in server.asked
    assert "Describe the ant." in {row["prompt"] for row in lines("out/train.jsonl")}


def test_the_key_is_sent_and_written_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    _, server = served(describe, {"key_env": "SOME_KEY"})
    assert {headers["authorization"] for headers in server.headers} == {"Bearer sk-secret"}
    assert not [file for file in Path("out").iterdir() if "sk-secret" in file.read_text()]
    with pytest.raises(DataError, match="status 401, 'no such key") as error:
        refuse = Reply(401, {"error": {"message": "no such key:\n sk-secret"}})
        served(lambda body, before: refuse, {"key_env": "SOME_KEY"}, output="b")
    assert "sk-secret" not in str(error.value) and "\n" not in str(error.value)
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(ConfigError, match="no SOME_KEY"):
        served(describe, {"key_env": "SOME_KEY"}, output="c")


FIRST = {
    "busy": Reply(429, {"error": "slow down"}, {"Retry-After": "0"}),
    "busy without a header": Reply(429, b""),
    "broken": Reply(500, b"<html>oops</html>"),
    "unavailable": Reply(503, {}),
    "dropped": Reply(drop=True),
    "not JSON": Reply(200, b"<html>ok</html>"),
    "cut JSON": Reply(200, b'{"choices": [{"mess'),
    "other JSON": Reply(200, {"result": "x"}),
    "a list": Reply(200, [1, 2]),
    "no choices": Reply(200, {"choices": []}),
    "a choice of another type": Reply(200, {"choices": ["x"]}),
    "content of another type": answer({"text": "x"}),
    "null": answer(None),
    "empty": answer(" \n"),
    "half a surrogate": answer("\ud800"),
    "broken off": answer("The half of", reason="error"),
    "aborted": answer("The half of", reason="abort"),
    "too deep": Reply(200, b"[" * 200_000),
    "huge": Reply(200, json.dumps(answer("x").body).encode() + b" " * 2**23),
}


@pytest.mark.parametrize("kind", FIRST)
def test_a_failed_try_is_made_again(kind: str) -> None:
    made, server = served(lambda body, before: describe(body, before) if before else FIRST[kind])
    assert set(server.asked.values()) == {2}
    assert made.report["train"] == 12 and made.report["generate"]["failed"] == {}
    assert {line["tries"] for line in lines("out/journal.jsonl")} == {2}


def test_a_late_answer_is_asked_for_again() -> None:
    gate = threading.Event()

    def late(body: dict[str, Any], before: int) -> Reply:
        if not before:
            gate.wait(20)
        return describe(body, before)

    with serving(late) as server:
        made = make(recipe(server.url, {"timeout": 0.3}, sources=[_one()]))
        gate.set()
    assert made.report["train"] == 1 and set(server.asked.values()) == {2}


def _one() -> dict[str, Any]:
    return {"data": "animals.jsonl", "templates": ["Describe the {name}."], "answer": "endpoint", "limit": 1}


@pytest.mark.parametrize(("status", "advice"), [(400, "settings"), (401, "key_env"), (404, "model"), (307, "moved")])
def test_a_refusal_for_good_ends_the_command_in_one_line(status: int, advice: str) -> None:
    with serving(lambda body, before: Reply(status, {"error": {"message": "no"}})) as server:
        with pytest.raises(DataError, match=f"status {status}, 'no'") as error:
            make(recipe(server.url, {"concurrency": 1}))
    assert advice in str(error.value) and sum(server.asked.values()) == 1 and not Path("out/train.jsonl").exists()


def test_a_long_wait_is_a_quota() -> None:
    with pytest.raises(DataError, match="asks to wait 86400 s"):
        served(lambda body, before: Reply(429, b"", {"Retry-After": "86400"}))


def test_few_failures_are_named_and_many_end_the_command() -> None:
    def script(body: dict[str, Any], before: int) -> Reply:
        bad = ("bee", "cat") if "again" not in Path.cwd().name else ()
        return Reply(200, b"?") if any(name in prompt_of(body) for name in bad) else describe(body, before)

    made, server = served(script, {"max_failed": 0.2, "retries": 1})
    assert made.report["generate"]["failed"] == {
        "animals row 2, template 1": "garbage: not JSON",
        "animals row 3, template 1": "garbage: not JSON",
    }
    assert made.report["train"] == 10 and server.asked["Describe the bee."] == 2
    assert "no answer: animals row 2" in str(made)
    with pytest.raises(DataError, match=r"2 of 12 prompts have no answer, most often: garbage: not JSON \(2\)"):
        served(script, {"max_failed": 0.1, "retries": 0, "concurrency": 1}, output="b")
    assert not Path("b/train.jsonl").exists() and not Path("b/report.json").exists()


def test_failed_prompts_are_asked_again_by_the_same_command() -> None:
    healed: list[bool] = []

    def script(body: dict[str, Any], before: int) -> Reply:
        return Reply(500, b"") if "bee" in prompt_of(body) and not healed else describe(body, before)

    with serving(script) as server:
        with pytest.raises(DataError, match="status 500"):
            make(recipe(server.url, {"retries": 0}))
        first = Counter(server.asked)
        healed.append(True)
        made = make(recipe(server.url, {"retries": 0}))
    assert made.report["train"] == 12
    assert all(server.asked[prompt] == 1 for prompt in first if "bee" not in prompt)


def test_nobody_there() -> None:
    with serving(describe) as server:
        pass
    with pytest.raises(DataError, match="no connection"):
        make(recipe(server.url, {"retries": 1}))
    with pytest.raises(DataError, match="none of the first 8 prompts has an answer, most often: no connection"):
        make(recipe(server.url, {"retries": 0, "concurrency": 1, "max_failed": 1}))


def animals(count: int) -> None:
    Path("animals.jsonl").write_text("".join(json.dumps({"name": f"ant {n}"}) + "\n" for n in range(count)))


def first_bad(count: int) -> tuple[set[str], Script]:
    """The first prompts that are asked, and a script that never answers them."""
    bad: set[str] = set()

    def script(body: dict[str, Any], before: int) -> Reply:
        bad.update([prompt_of(body)] if len(bad) < count else [])
        return answer(None) if prompt_of(body) in bad else describe(body, before)

    return bad, script


def test_a_bad_first_prompt_or_a_few_that_stay_bad_do_not_end_the_command() -> None:
    animals(50)
    bad, script = first_bad(2)
    with serving(script) as server:
        made = make(recipe(server.url, {"concurrency": 1, "retries": 0}))
        assert made.report["train"] == 48
        Path("out/report.json").unlink()
        made = make(recipe(server.url, {"concurrency": 2, "retries": 0}))  # asks for the two again
    assert made.report["train"] == 48 and server.asked == {prompt: 1 + (prompt in bad) for prompt in server.asked}


def test_the_next_start_asks_first_what_did_not_fail_before() -> None:
    animals(40)
    _, script = first_bad(10)
    given = {"concurrency": 1, "retries": 0, "max_failed": 0.3}
    with serving(script) as server:
        with pytest.raises(DataError, match="none of the first 8"):
            make(recipe(server.url, given))
        made = make(recipe(server.url, given))
        assert made.report["train"] == 30 and sum(server.asked.values()) == 48
        Path("out/report.json").unlink()
        made = make(recipe(server.url, given))  # ten more failures, but 30 answers are there
    assert made.report["train"] == 30 and sum(server.asked.values()) == 58


def test_a_limit_with_a_short_retry_after_delays_and_fails_nothing() -> None:
    """One request in each interval is let in, and 8 workers ask."""
    lock, let_in = threading.Lock(), [0.0]

    def script(body: dict[str, Any], before: int) -> Reply:
        with lock:
            if time.monotonic() < let_in[0] + 0.05:
                return Reply(429, b"", {"Retry-After": "0.05"})
            let_in[0] = time.monotonic()
        return describe(body, before)

    animals(24)
    made, _ = served(script)
    assert made.report["generate"]["failed"] == {} and made.report["train"] == 24


@pytest.mark.parametrize("header", [{}, {"Retry-After": "0"}, {"Retry-After": "3"}])
def test_who_is_always_busy_fails_after_the_last_try(starts: list[float], header: dict[str, str]) -> None:
    with pytest.raises(DataError, match="status 429"):
        served(lambda body, before: Reply(429, b"", header), {"backoff": 1}, sources=[_one()])
    wait = float(header.get("Retry-After", 0))
    assert len(starts) == 6
    for attempt, (before, after) in enumerate(itertools.pairwise(starts)):
        assert wait + 2**attempt / 2 <= after - before <= wait + 2**attempt


def test_so_many_requests_are_under_way_at_a_time() -> None:
    together = threading.Barrier(4)
    now, most, lock = [0], [0], threading.Lock()

    def script(body: dict[str, Any], before: int) -> Reply:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        together.wait(30)  # it breaks unless four are here at once
        with lock:
            now[0] -= 1
        return describe(body, before)

    made, _ = served(script, {"concurrency": 4, "retries": 0})
    assert made.report["train"] == 12 and most[0] == 4


def test_the_answers_of_one_prompt() -> None:
    outputs = {"ant": ["a", "b", "A."], "bee": ["c", "c", "c"]}

    def script(body: dict[str, Any], before: int) -> Reply:
        return answer(outputs.get(prompt_of(body)[13:-1], ["x", "y", "z"])[before])

    made, server = served(script, {"n": 3, "concurrency": 1})
    assert set(server.asked.values()) == {3}
    rows = Counter(row["row"] for row in lines("out/train.jsonl"))
    assert rows[1] == 2 and rows[2] == 1 and rows[3] == 3
    assert made.report["generate"]["dropped"] == {"repeats another answer": 3}
    made, _ = served(script, {"n": 3, "concurrency": 1, "duplicates": "all"}, output="b")
    assert sorted(row["completion"] for row in lines("b/train.jsonl")) == ["a", "b", "c", "x", "y", "z"]
    made, _ = served(script, {"n": 3, "concurrency": 1, "duplicates": "none"}, output="c")
    assert made.report["train"] == 36


def test_answers_that_teach_nothing_are_left_out() -> None:
    odd = {
        "ant": answer("Describe the ANT"),
        "bee": answer("A bee is", reason="length"),
        "cat": answer("I'm SORRY, but no."),
        "dog": answer("A dog", reason="content_filter"),
    }
    given = {"refusals": ["i'm sorry"]}
    made, _ = served(lambda body, before: odd.get(prompt_of(body)[13:-1]) or describe(body, before), given)
    assert made.report["generate"]["dropped"] == {
        "copy of the prompt": 1,
        "cut at max_tokens": 1,
        "refusal": 1,
        "stopped by the endpoint's filter": 1,
    }
    assert {row["row"] for row in lines("out/train.jsonl")} == set(range(5, 13))
    served(lambda body, before: answer("A bee is", reason="length"), {"keep_cut": True}, output="b")
    assert len(lines("b/train.jsonl")) == 12


def test_an_empty_answer_that_another_try_would_repeat_is_paid_once() -> None:
    refused = answer(None)
    refused.body["choices"][0]["message"]["refusal"] = "I cannot."
    odd = {
        "ant": answer(None, reason="length"),
        "bee": answer("", reason="content_filter"),
        "cat": refused,
    }
    made, server = served(
        lambda body, before: odd.get(prompt_of(body)[13:-1]) or describe(body, before), {"max_failed": 0.2}
    )
    assert set(server.asked.values()) == {1}
    assert made.report["generate"]["failed"] == {
        "animals row 1, template 1": "no text within max_tokens",
        "animals row 2, template 1": "stopped by the endpoint's filter",
    }
    assert made.report["generate"]["dropped"] == {"refusal": 1} and made.report["train"] == 9
    assert "I cannot." in {line.get("text") for line in lines("out/journal.jsonl")}


def test_a_continuation_keeps_its_indentation() -> None:
    for api, written in {"completions": "    return x + 1", "chat": "return x + 1"}.items():
        served(lambda body, before: answer("    return x + 1\n"), {"api": api}, output=api)
        assert {row["completion"] for row in lines(f"{api}/train.jsonl")} == {written}


def test_certificates_are_checked_however_https_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    client = httpx2.AsyncClient
    monkeypatch.setattr(httpx2, "AsyncClient", lambda **kw: given.append(kw) or client(**kw))
    for scheme in ("https", "HTTPS", "HttpS"):
        asked = recipe(f"{scheme}://api.example.com/v1").generate
        assert asked is not None
        Endpoint(asked)
        assert given.pop().get("verify", True) is True, scheme


PRICE = {"price_per_million": {"prompt": 1e6, "completion": 1e6}, "max_tokens": 10, "concurrency": 3}


def test_the_cost_stays_below_its_limit_and_goes_on_when_that_is_raised() -> None:
    with serving(describe) as server:
        with pytest.raises(ConfigError, match="max_cost") as error:
            make(recipe(server.url, PRICE | {"max_cost": 250}))
        asked = sum(server.asked.values())
        spent = sum(line["cost"] for line in lines("out/journal.jsonl"))
        assert 0 < asked < 12 and spent == 15 * asked <= 250 and f"{spent:g} of 250 is spent" in str(error.value)
        made = make(recipe(server.url, PRICE | {"max_cost": 1000}))
    assert set(server.asked.values()) == {1} and made.report["generate"]["cost"] == 180


def test_tries_that_may_be_charged_count() -> None:
    garbage = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2}}
    made, _ = served(lambda body, before: describe(body, before) if before else Reply(200, garbage), PRICE)
    assert made.report["generate"]["cost"] == 12 * (15 + 9)
    made, _ = served(lambda body, before: describe(body, before) if before else Reply(500, garbage), PRICE, output="b")
    assert made.report["generate"]["cost"] == 12 * 15


def test_a_request_waits_for_others_to_come_out_cheaper() -> None:
    async def scene() -> list[str]:
        told = []
        budget = Budget(recipe("http://x/v1", PRICE | {"max_cost": 200}).generate)  # type: ignore[arg-type]
        first = await budget.reserve(50)
        assert first == 50 + OVERHEAD + 10

        async def second() -> None:
            await budget.reserve(50)
            told.append("second")

        task = asyncio.create_task(second())
        await asyncio.sleep(0)
        told.append("settled")
        await budget.settle(first, 5)
        await task
        return told

    assert asyncio.run(scene()) == ["settled", "second"]


def test_pace_by_a_clock_of_our_own() -> None:
    pace, now, starts = Pace(3, None), 0.0, []
    for _ in range(8):
        while wait := pace.delay(now, 1):
            now += wait
        pace.start(now, 1)
        starts.append(now)
        now += 1
    assert starts == [0, 1, 2, 60, 61, 62, 120, 121]
    pace, now, starts = Pace(None, 100), 0.0, []
    for tokens in (60, 30, 20, 500, 10):
        while wait := pace.delay(now, tokens):
            now += wait
        pace.start(now, tokens)
        starts.append(now)
    assert starts == [0, 0, 60, 120, 180]  # 500 go alone
    pace = Pace(None, None)
    pace.hold(30)
    assert pace.delay(10, 1) == 20 and pace.delay(31, 1) == 0


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When requests start, by a clock that only sleeping moves."""
    from graft.data import generate

    clock = [0.0]
    starts: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        clock[0] += seconds
        await real(0)

    monkeypatch.setattr(generate.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(generate.asyncio, "sleep", sleep)
    start = Pace.start
    monkeypatch.setattr(Pace, "start", lambda self, now, tokens: starts.append(now) or start(self, now, tokens))
    return starts


def test_requests_per_minute_hold_back(starts: list[float]) -> None:
    served(describe, {"requests_per_minute": 5, "concurrency": 1})
    assert len(starts) == 12 and starts[:5] == [0.0] * 5 and starts[5] >= 60 and starts[10] >= 120


def test_nobody_asks_before_retry_after(starts: list[float]) -> None:
    busy = Reply(429, b"", {"Retry-After": "30"})

    def script(body: dict[str, Any], before: int) -> Reply:
        return busy if "bee" in prompt_of(body) and not before else describe(body, before)

    _, server = served(script, {"concurrency": 1})
    asked = [prompt_of(body) for body in server.bodies]
    again = asked.index("Describe the bee.") + 1
    assert asked[again] == "Describe the bee." and len(starts) == len(asked) == 13
    assert starts[:again] == [0.0] * again and starts[again:] == pytest.approx([30] * (13 - again), abs=0.01)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("7", 7.0), ("1.5", 1.5), ("soon", None), ("-3", None), ("Thu, 01 Jan 1970 00:01:40 GMT", 90.0)],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header, now=10.0) == seconds


def test_a_cut_line_is_asked_again_and_a_broken_one_is_refused() -> None:
    with serving(describe) as server:
        make(recipe(server.url))
        whole = Path("out/train.jsonl").read_bytes()
        journal = Path("out/journal.jsonl")
        journal.write_bytes(journal.read_bytes()[:-20])
        Path("out/report.json").unlink()
        told: list[str] = []
        make(recipe(server.url), tell=told.append)
        assert sum(server.asked.values()) == 13 and "cut off" in told[0] and "11 answers are there" in told[1]
        assert len(Path("out/train.jsonl").read_bytes()) == len(whole)
        Path("out/report.json").unlink()
        journal.write_bytes(b"not mine\n" + journal.read_bytes())
        with pytest.raises(DataError, match=r"journal\.jsonl line 1"):
            make(recipe(server.url))


def test_another_model_is_another_recipe_and_another_address_is_not() -> None:
    with serving(describe) as server:
        make(recipe(server.url))
        with pytest.raises(ConfigError, match=r"generate.model: out was begun with 'm'"):
            make(recipe(server.url, {"model": "n"}))
        assert make(recipe("http://elsewhere/v1", {"max_failed": 0.5})).finished_before


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_kill_and_go_on(how: signal.Signals) -> None:
    """Stopped with requests under way: the same command asks only for what has no answer."""
    full = threading.Event()
    go = threading.Event()

    def script(body: dict[str, Any], before: int) -> Reply:
        if sum(server.asked.values()) >= 8 and not go.is_set():
            full.set()
            go.wait(60)
        return describe(body, before)

    with serving(script) as server:
        Path("r.yaml").write_text(json.dumps(settings(server.url, {"concurrency": 3})))
        program = "from graft.cli_data import data; data('r.yaml')"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        process = subprocess.Popen([sys.executable, "-c", program], env=env, stderr=subprocess.DEVNULL)
        assert full.wait(60)
        process.send_signal(how)
        process.wait(60)
        kept = {line["row"] for line in lines("out/journal.jsonl")}
        assert 0 < len(kept) <= 8 and not Path("out/report.json").exists()
        go.set()
        made = make(recipe(server.url, {"concurrency": 3}))
        assert made.report["train"] == 12
        for row, name in enumerate(NAMES, start=1):
            assert server.asked[f"Describe the {name}."] <= (1 if row in kept else 2)
        make(recipe(server.url, output="undisturbed"))
    rows = [sorted((r["row"], r["completion"]) for r in lines(f"{out}/train.jsonl")) for out in ("out", "undisturbed")]
    assert rows[0] == rows[1]


BAD = [
    ({"endpoint": "localhost:8000"}, "expected an address"),
    ({"endpoint": "http://me:pass@host/v1"}, "without user, password"),
    ({"endpoint": "http://host/v1?key=1"}, "without user, password"),
    ({"max_cost": 1}, "price_per_million"),
    ({"api": "completions", "system": "x"}, "generate.system"),
    ({"extra": {"messages": []}}, "generate.extra: messages"),
    ({"temperture": 1}, "did you mean 'temperature'"),
    ({"n": 0}, "generate.n"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        recipe("http://x/v1", given)
    assert message in str(error.value) and "pass@" not in str(error.value)


def test_mixed_with_annotated_rows() -> None:
    Path("own.jsonl").write_text('{"prompt": "Say hi", "completion": "hi"}\n')
    with serving(describe) as server:
        given = settings(server.url)
        given["sources"].append({"data": "own.jsonl"})
        made = make(make_recipe(given))
    assert made.report["train"] == 13 and sum(server.asked.values()) == 12
    assert "hi" in {row["completion"] for row in lines("out/train.jsonl")}


def test_one_prompt_that_is_always_put_off_holds_nobody_for_ever() -> None:
    """Others are answered meanwhile, so it is the prompt and not the endpoint."""
    animals(150)

    def script(body: dict[str, Any], before: int) -> Reply:
        bad = prompt_of(body) == prompts[0]
        return Reply(429, b"", {"Retry-After": "0.01"}) if bad else describe(body, before)

    prompts = ["Describe ant 0."]
    with serving(lambda body, before: (prompts.__setitem__(0, prompt_of(body)), answer("x"))[1]) as server:
        make(recipe(server.url, {"concurrency": 1}, output="first", size=1))
    made, server = served(script, {"retries": 1, "max_failed": 0.1})
    assert list(made.report["generate"]["failed"].values()) == ["status 429"] and made.report["train"] == 149
    assert 2 <= server.asked[prompts[0]] <= 20
