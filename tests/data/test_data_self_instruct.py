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
