"""Memory and time of the loss: labelled rows in chunks, beside the logits of the whole batch.

    python bench/loss_memory.py [--quick]

"loss" starts from the hidden states (B, T, D) that enter the head and ends with their gradient; "step" is forward and
backward of a base of about 60M parameters with LoRA. The plain form is transformers' own loss. Memory is the peak of
what is allocated beyond the start: the running sum of all allocations and releases that torch.profiler saw. Losses and
gradients are asserted to be the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import common
import torch
from common import DTYPES, alternate, llama, median, ratio, rows
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from transformers.loss.loss_utils import ForCausalLMLoss

import graft
from graft.fast.cross_entropy import Finish, losses
from graft.fast.head import shifted

SHAPE = (8, 512)
WIDTH = 512
VOCABULARIES = (32_768, 151_936)
SHARES = (0.3, 1.0)
MOST = 1 / 6
"""Of the plain form's memory, at 30 % labels and a vocabulary of 32,768."""
CLOSE = {"fp32": 1e-5, "bf16": 2e-2}


def peak(run: Callable[[], Any]) -> int:
    """The most bytes that `run` had allocated at once, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = now = 0
    for _, size in changes:
        now += size
        most = max(most, now)
    return most


def check_peak() -> None:
    """What `peak` says of one tensor inside of another's life."""

    def run() -> None:
        first = torch.empty(1 << 20)
        torch.empty(1 << 21)
        del first

    assert peak(run) == 12 << 20, peak(run)


class Loss:
    """The loss alone."""

    def __init__(self, vocabulary: int, dtype: str, share: float, shape: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.hidden_BTD = torch.randn(*shape, WIDTH).to(DTYPES[dtype]).requires_grad_()
        self.weight_VD = (0.02 * torch.randn(vocabulary, WIDTH)).to(DTYPES[dtype])
        self.labels_BT = rows(*shape, vocabulary, labelled=share)["labels"]

    def plain(self) -> tuple[Tensor, ...]:
        loss = ForCausalLMLoss(F.linear(self.hidden_BTD, self.weight_VD), self.labels_BT, len(self.weight_VD))
        return loss, *torch.autograd.grad(loss, self.hidden_BTD)

    def ours(self) -> tuple[Tensor, ...]:
        target_M = shifted(self.labels_BT).flatten()
        index_N = (target_M != -100).nonzero()[:, 0]
        hidden_ND = self.hidden_BTD.flatten(0, 1).index_select(0, index_N)
        total = losses(hidden_ND, self.weight_VD, None, target_M[index_N], Finish(), summed=True)
        loss = total / len(index_N)
        return loss, *torch.autograd.grad(loss, self.hidden_BTD)


class Step:
    """A whole step, without the optimizer."""

    def __init__(self, vocabulary: int, dtype: str, share: float, shape: tuple[int, int], size: str) -> None:
        self.model: Any = llama(size, vocabulary, DTYPES[dtype])
        graft.attach(self.model, graft.LoRA(rank=16, targets="all-linear"))
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.batch = rows(*shape, vocabulary, labelled=share) | {"use_cache": False}
        del self.batch["attention_mask"]
        graft.labelled_loss(self.model, self.batch).backward()

    def plain(self) -> tuple[Tensor, ...]:
        loss = self.model(**self.batch).loss
        return loss, *torch.autograd.grad(loss, self.parameters)

    def ours(self) -> tuple[Tensor, ...]:
        loss = graft.labelled_loss(self.model, self.batch)
        return loss, *torch.autograd.grad(loss, self.parameters)


def measure(part: str, vocabulary: int, dtype: str, share: float, options: Any) -> dict[str, Any]:
    shape = (2, 16) if options.quick else SHAPE if part == "loss" else (4, 256)
    made: Loss | Step = Loss(vocabulary, dtype, share, shape)
    if part == "step":
        made = Step(vocabulary, dtype, share, shape, "tiny" if options.quick else "60M")
    for found, expected in zip(made.ours(), made.plain(), strict=True):
        assert (found - expected).float().norm() <= CLOSE[dtype] * expected.float().norm() + 1e-12
    bytes_ = {"plain": peak(made.plain), "ours": peak(made.ours)}
    seconds = alternate({"plain": made.plain, "ours": made.ours}, options.repeats)
    row = {"part": part, "vocabulary": vocabulary, "dtype": dtype, "labelled": share, "tokens": shape[0] * shape[1]}
    row |= {f"{name}_mb": round(size / 1e6, 1) for name, size in bytes_.items()}
    row |= {"memory": round(bytes_["ours"] / bytes_["plain"], 3)}
    row |= {f"{name}_s": round(median(times), 3) for name, times in seconds.items()}
    return row | {"time": round(ratio(seconds["ours"], seconds["plain"]), 3)}


SIZES = ("part", "vocabulary", "dtype", "labelled", "tokens")
COLUMNS = (*SIZES, "plain_mb", "ours_mb", "memory", "plain_s", "ours_s", "time")


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells: peaks in MB, seconds, and ratios."""
    titles = ["part", "vocabulary", "dtype", "labelled", "tokens", "plain MB", "ours MB", "memory ratio"]
    titles += ["plain s", "ours s", "time ratio"]
    return common.table(titles, [[row.get(key) for key in COLUMNS] for row in cells.values()])


def main() -> None:
    options = common.parser(__doc__).parse_args()
    common.begin(options)
    check_peak()
    results = common.Results("loss_memory", options)
    for part in ("loss", "step"):
        for vocabulary in (500,) if options.quick else VOCABULARIES:
            for dtype in DTYPES:
                for share in SHARES if part == "loss" and vocabulary == VOCABULARIES[0] else SHARES[:1]:
                    name = f"{part}/{vocabulary}/{dtype}/{share}"
                    if not results.done(name):
                        results.put(name, **measure(part, vocabulary, dtype, share, options))
                    print(
                        f"{name}: {json.dumps({key: results.cells[name].get(key) for key in COLUMNS[len(SIZES) :]})}",
                        flush=True,
                    )
    print(show(results.cells))
    asked = {name: row["memory"] for name, row in results.cells.items() if name.startswith(f"loss/{VOCABULARIES[0]}/")}
    over = [name for name, found in asked.items() if name.endswith("/0.3") and found > MOST]
    assert not over, f"{', '.join(over)}: more than a sixth of the plain form's memory"


if __name__ == "__main__":
    main()
