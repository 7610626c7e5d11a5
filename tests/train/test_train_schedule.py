"""The list of all batches: every example once an epoch, the right number of steps, and where a step stands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD
from transformers import get_scheduler

from graft.errors import ConfigError
from graft.train.plot import plot
from graft.train.progress import read_lines
from graft.train.schedule import Schedule, rate, warmup_steps

LENGTHS = [random.Random(0).randint(3, 30) for _ in range(23)]


def schedule(**more: Any) -> Schedule:
    return Schedule(LENGTHS, **{"batch_size": 4, **more})


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("pack", [None, 40])
def test_every_example_once_an_epoch(pack: int | None, group: bool) -> None:
    found = schedule(epochs=3.0, pack=pack, group=group)
    start = 0
    for end in found.ends:
        assert sorted(i for each in found.batches[start:end] for i in each) == list(range(23))
        start = end
    assert start == len(found) and len(found.ends) == 3
    assert found.batches == schedule(epochs=3.0, pack=pack, group=group).batches
    assert found.batches != schedule(epochs=3.0, pack=pack, group=group, seed=1).batches
    if pack:
        assert all(sum(LENGTHS[i] for i in each) <= pack for each in found.batches)


def test_steps() -> None:
    assert schedule().steps == 6 and schedule(accumulate=4).steps == 2 and schedule(epochs=0.5).steps == 3
    assert schedule(epochs=2.5).steps == 15
    found = schedule(max_steps=20, accumulate=2)
    assert found.steps == 20 and len(found) == 40 and len(found.ends) == 7
    assert schedule(max_steps=2, epochs=9.0).steps == 2


def test_where_a_step_stands() -> None:
    found = schedule(max_steps=20, accumulate=2)
    assert [i for step in range(20) for i in found.at(step)] == found.batches
    assert found.epoch(0) == 0.0 and found.epoch(3) == 1.0 and found.epoch(1) == pytest.approx(1 / 3)
    assert found.tokens(0) == sum(LENGTHS[i] for each in found.batches[:2] for i in each)
    assert sum(schedule().tokens(step) for step in range(6)) == sum(LENGTHS)
    largest = max(len(each) * max(LENGTHS[i] for i in each) for each in found.batches)
    longest = found.longest()
    assert len(longest) * max(LENGTHS[i] for i in longest) == largest


def test_the_heaviest_batch_of_an_encoder_decoder_has_two_sides() -> None:
    """Eight rows of 512 tokens in and 2 out beside eight of 500 in and 480 out."""
    sides = [(512, 2)] * 8 + [(500, 480)] * 8
    found = Schedule([max(each) for each in sides], batch_size=8, sides=sides)
    assert sorted(found.longest()) == [*range(8, 16)]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
def test_the_rate_is_transformers_and_never_lost(kind: str) -> None:
    """As transformers' (its first step has rate 0, ours is one step ahead while warming up), for every length."""
    theirs = get_scheduler("constant_with_warmup" if kind == "constant" else kind, SGD([torch.ones(1)]), 3, 20)
    factor = theirs.lr_lambdas[0]
    got = [rate(step, kind=kind, steps=20, warmup=3) for step in range(20)]
    assert got[:3] == pytest.approx([1 / 3, 2 / 3, 1.0]) and got[3:] == pytest.approx([factor(i) for i in range(3, 20)])
    for steps in range(1, 80):
        for warmup in {0, warmup_steps(0.03, steps), warmup_steps(0.99, steps), steps - 1}:
            found = [rate(step, kind=kind, steps=steps, warmup=warmup) for step in range(steps)]
            assert min(found) > 0 and max(found) == 1.0


def test_the_warm_up_in_steps() -> None:
    assert [warmup_steps(0.03, steps) for steps in (1, 2, 33, 34, 100)] == [0, 1, 1, 2, 3]
    assert warmup_steps(0, 9) == 0 and warmup_steps(8, 9) == 8 and warmup_steps(0.999, 9) == 8
    for steps in (8, 2):
        with pytest.raises(ConfigError, match=rf"train\.warmup: 8 steps, and the run has {steps}; use fewer"):
            warmup_steps(8, steps)


def test_metrics_that_a_kill_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    kept = [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in kept) + '{"step": 4, "lo')
    assert read_lines(file) == kept and read_lines(file, 2) == kept[:2] and read_lines(tmp_path / "none") == []


@pytest.mark.parametrize("count", [0, 1, 5])
def test_plot_of_few_lines(count: int, tmp_path: Path) -> None:
    plot([{"step": step, "loss": 2.0 - step} for step in range(count)], tmp_path / "loss.png", "x")
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1
