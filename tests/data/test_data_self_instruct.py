"""New instructions: what is asked, what is taken from an answer and what is left out, and going on after a stop."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from rouge_score import rouge_scorer
from serving import Reply, answer, prompt_of, serving

from graft.data import self_instruct
from graft.data.items import templates_of
from graft.data.make import Made, make, preview
from graft.data.recipe import make_recipe
from graft.data.self_instruct import instructions
from graft.errors import ConfigError, DataError

SEEDS = ["Name three rivers of Asia.", "Translate the sentence to French.", "Sort these numbers.", "Why do cats purr?"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    Path("seeds.jsonl").write_text("".join(json.dumps({"instruction": text}) + "\n" for text in SEEDS))


def invented(url: str, asked: dict[str, Any], output: str = "out", **generate: Any) -> Made:
    source = {"data": "seeds.jsonl", "answer": "endpoint", "self_instruct": {"shots": 3, **asked}}
    generate = {"endpoint": url, "model": "m", "backoff": 0.001, **generate}
    return make(make_recipe({"sources": [source], "generate": generate, "output": output}))


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def writer(body: dict[str, Any], before: int) -> Reply:
    """Four instructions of random words for each prompt (always the same), and an answer to anything else."""
    prompt = prompt_of(body)
    if not prompt.startswith("Come up"):
        return answer(f"Done: {prompt}")
    chance = random.Random(prompt)
    words = [f"w{n}" for n in range(12)]
    return answer("\n".join(f"Task {n}: {' '.join(chance.sample(words, 6))}" for n in range(4, 8)))


def test_new_instructions_take_the_place_of_seeds() -> None:
    with serving(writer) as server:
        made = invented(server.url, {"count": 10, "requests": 16})
    rows = sorted(lines("out/train.jsonl"), key=lambda row: row["row"])
    assert len(rows) == 10 and all(row["completion"] == f"Done: {row['prompt']}" for row in rows)
    assert all(len(set(row["seeds"])) == 3 and set(row["seeds"]) <= {1, 2, 3, 4} for row in rows)
    first = next(prompt_of(body) for body in server.bodies)
    assert first.count("Task") == 4 and sum(seed in first for seed in SEEDS) == 3
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    kept: list[str] = []
    for row in rows:
        scores = [scorer.score(other, row["prompt"])["rougeL"].fmeasure for other in [*SEEDS, *kept]]
        assert max(scores) < 0.7
        kept.append(row["prompt"])
    journal = [line for line in lines("out/journal.jsonl") if line["source"] == "seeds instructions"]
    offered = [
        text for line in sorted(journal, key=lambda line: line["row"]) for text in instructions(line["text"], "chat")
    ]
    expected: list[str] = []
    for text in offered:  # the same, plainly
        if all(scorer.score(other, text)["rougeL"].fmeasure < 0.7 for other in [*SEEDS, *expected]):
            expected.append(text)
    assert kept == expected[:10]
    if len(expected) < len(offered):
        assert made.report["generate"]["dropped"]["like another instruction"] > 0


def test_stopped_between_and_gone_on() -> None:
    def script(body: dict[str, Any], before: int) -> Reply:
        done = prompt_of(body).startswith("Come up") or healed
        return writer(body, before) if done else Reply(500, b"")

    healed: list[bool] = []
    with serving(script) as server:
        with pytest.raises(DataError, match="status 500"):
            invented(server.url, {"count": 5, "requests": 8}, retries=0)
        asked = server.asked.copy()
        healed.append(True)
        invented(server.url, {"count": 5, "requests": 8}, retries=0)
        after = server.asked.copy()
        invented(server.url, {"count": 5, "requests": 8}, output="whole")
    assert all(after[prompt] == count for prompt, count in asked.items() if prompt.startswith("Come up"))
    rows = [sorted((row["row"], row["prompt"]) for row in lines(f"{out}/train.jsonl")) for out in ("out", "whole")]
    assert rows[0] == rows[1]


def test_fewer_than_asked_are_reported() -> None:
    said = (
        "Task 4: Name three rivers of Europe!\n5. Draw a picture of a cat.\nTask 6: Go on.\n"
        "Task 7: How tall are the oldest trees?"
    )
    with serving(lambda body, before: answer(said if prompt_of(body).startswith("Come up") else "x")) as server:
        made = invented(server.url, {"count": 5, "requests": 1})
    assert [row["prompt"] for row in lines("out/train.jsonl")] == ["How tall are the oldest trees?"]
    assert made.report["generate"]["dropped"] == {
        "instruction for more than text": 1,
        "instruction not of 4 to 150 words": 1,
        "like another instruction": 1,
    }
    assert "left out: 1 like another instruction" in str(made)


def test_a_bound_by_common_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    chance, words = random.Random(3), [f"w{n}" for n in range(8)]
    texts = [" ".join(chance.sample(words, chance.randrange(4, 8))) for _ in range(60)]
    pool = self_instruct._Pool(texts[:30], 0.7)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    found = [pool.like(text) is not None for text in texts[30:]]
    assert found == [max(scorer.score(o, t)["rougeL"].fmeasure for o in texts[:30]) >= 0.7 for t in texts[30:]]
    assert True in found and False in found


@pytest.mark.parametrize(
    ("text", "api", "found"),
    [
        ("Task 9: Do this.\nTask 10: Do that: now.", "chat", ["Do this.", "Do that: now."]),
        ("1. One here\n\n**Task 2:** Two\n- 3. Three", "chat", ["One here", "Two", "Three"]),
        ("Sure! Here they are.\n1. One", "chat", ["One"]),
        (" Write a poem.\nTask 10: Sing", "completions", ["Write a poem.", "Sing"]),
        ("Task X: no\nTask", "chat", []),
        ("**Task 9**: Why so?\n### Task #10: **How?**\n_TASK 11_ - Who?", "chat", ["Why so?", "How?", "Who?"]),
        ("9) Why?\n(10) How?\nTask 11 – Who?\n12] What?", "chat", ["Why?", "How?", "Who?", "What?"]),
        (
            '1. "Go" in French?\n2. __init__ or not\n3: 3-4 words',
            "chat",
            ['"Go" in French?', "__init__ or not", "3-4 words"],
        ),
        ("3-4 sentences will do.\n2.5 litres\n12:30 is noon\n7 rivers: name them", "chat", []),
        ("Task 9:\n", "chat", [""]),
    ],
)
def test_lines_with_numbers_are_instructions(text: str, api: str, found: list[str]) -> None:
    assert list(instructions(text, api)) == found


def test_refused_and_shown() -> None:
    with pytest.raises(ConfigError, match="9 shots of 4 seeds"), serving(writer) as server:
        invented(server.url, {"count": 5, "shots": 9})
    source = {"data": "seeds.jsonl", "answer": "endpoint", "self_instruct": {"count": 2}}
    generate = {"endpoint": "http://x/v1", "model": "m"}
    recipe = {"sources": [source], "generate": generate, "output": "new"}
    assert "Task 1: Name three rivers" in preview(make_recipe(recipe), 2)
    with pytest.raises(ConfigError, match="neither task nor templates"):
        make_recipe(recipe | {"sources": [source | {"task": "topic"}]})


def test_answers_without_instructions_end_the_command_early() -> None:
    seeds = {"data": "seeds.jsonl", "answer": "endpoint", "self_instruct": {"shots": 3, "count": 5}}
    Path("own.jsonl").write_text('{"prompt": "Say hi", "completion": "hi"}\n')
    with serving(lambda body, before: answer("I would rather not.")) as server:
        generate = {"endpoint": server.url, "model": "m"}
        given = {"sources": [seeds, {"data": "own.jsonl"}], "generate": generate, "output": "out"}
        for _ in range(2):
            with pytest.raises(DataError, match=r"no new instruction .* 16 requests .* 16 answer without instructions"):
                make(make_recipe(given))
    assert sum(server.asked.values()) == 16


def test_a_source_without_rows_has_no_templates() -> None:
    assert templates_of(make_recipe({"sources": [{"data": "x.jsonl"}], "output": "out"}).sources[0], []) == []


def test_failed_requests_for_instructions_count_over_all_of_them() -> None:
    """One of 16 is a twentieth of 20 and more of 16; what is asked later moves up when it succeeds."""
    healed: list[bool] = []

    def script(body: dict[str, Any], before: int) -> Reply:
        if prompt_of(body).startswith("Come up"):
            return Reply(500, b"") if sum(server.asked.values()) == 1 else writer(body, before)
        stop = not healed and sum(not asked.startswith("Come up") for asked in server.asked) > 6
        return Reply(400, b"") if stop else writer(body, before)

    with serving(script) as server:
        asked = {"count": 30, "requests": 20}
        with pytest.raises(DataError, match="status 400"):
            invented(server.url, asked, retries=0, concurrency=1)
        paid = {line["key"]: line for line in lines("out/journal.jsonl") if "text" in line}
        before = server.asked.copy()
        healed.append(True)
        invented(server.url, asked, retries=0)
    done = [prompt for prompt in before if not prompt.startswith("Come up")]
    assert len(paid) == sum(before.values()) - 2 and len(done) == 7
    assert [server.asked[prompt] for prompt in done] == [1] * 6 + [2]  # the last one was refused
    rows = lines("out/train.jsonl")
    assert len(rows) == len({row["prompt"] for row in rows}) == 30
    assert all(row["completion"] == f"Done: {row['prompt']}" for row in rows)


def test_a_failed_request_for_instructions_is_reported() -> None:
    def script(body: dict[str, Any], before: int) -> Reply:
        return Reply(500, b"") if sum(server.asked.values()) == 1 else writer(body, before)

    with serving(script) as server:
        made = invented(server.url, {"count": 9, "requests": 20}, retries=0, concurrency=1)
    assert made.report["generate"]["failed"] == {}
    assert made.report["generate"]["dropped"]["request for instructions without an answer"] == 1
    assert made.report["train"] == 9


def test_a_batch_without_any_answer_does_not_end_the_inventing() -> None:
    """16 requests fail in the second batch, and 20 of 400 may."""

    def requests() -> int:
        return sum(count for prompt, count in server.asked.items() if prompt.startswith("Come up"))

    def script(body: dict[str, Any], before: int) -> Reply:
        bad = prompt_of(body).startswith("Come up") and 16 < requests() <= 32
        return Reply(500, b"") if bad else writer(body, before)

    with serving(script) as server:
        made = invented(server.url, {"count": 120, "requests": 400, "rouge": 0.9}, retries=0, concurrency=1)
    assert made.report["generate"]["dropped"]["request for instructions without an answer"] == 16
    assert requests() > 32
