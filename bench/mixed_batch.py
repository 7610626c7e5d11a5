"""Many adapters in one batch: prefill and decode against the bare base and peft's `adapter_names`; DoRA; loading.

    python bench/mixed_batch.py                      # all of it, fp32 and bf16
    python bench/mixed_batch.py --dtype bf16 --part decode --adapters 16 64
    python bench/mixed_batch.py --quick              # a smoke test of a few seconds on a tiny shape

A random Llama of about 58M parameters, 64 rows, LoRA r=16 on all linears, one thread. Medians of `--repeats` steps, all
variants in turn in one process; ratios are medians of the ratios to the base of the same turn. Logits of every row are
compared with the loop over the groups and, for some adapters, with peft.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from common import DTYPES
from torch import Tensor

import graft
from graft.fast import mixed

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
RANKS = (4, 8, 16, 32)
CLOCK = time.perf_counter
Step = Callable[[], Any]


def model_of(options: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The base: always the same values. As transformers loads it: frozen by hand, its head would be much slower."""
    small = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 500}
    large = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 32000}
    config = transformers.LlamaConfig(
        **(small if options.quick else large), num_attention_heads=8, num_key_value_heads=4, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


@torch.no_grad()
def fill(model: Any, count: int, ranks: Sequence[int]) -> list[str]:
    """Attach adapters with random values; their names."""
    names = [f"a{i}" for i in range(count)]
    for i, name in enumerate(names):
        rank = ranks[i % len(ranks)]
        adapter = graft.attach(
            model, graft.LoRA(rank=rank, alpha=2 * rank, targets="all-linear"), name, trainable=False
        )
        randomise(adapter.parameters(), i)
    graft.use(model, None)
    return names


def randomise(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.normal_(0.0, 0.02, generator=generator)


def peft_of(base: Any, own: Any, names: list[str]) -> Any:
    """A peft model with the values of our adapters, all of one rank."""
    import peft

    found = None
    for name in names:
        rank = own.adapters[name].method.rank
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        if found is None:
            found = peft.get_peft_model(base, config, adapter_name=name, autocast_adapter_dtype=False)
        else:
            found.add_adapter(name, config, autocast_adapter_dtype=False)
    for path, module in found.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            for name in names:
                delta = own.adapters[name].at(path)
                module.lora_A[name].weight.data = delta.A.detach().to(own.dtype)
                module.lora_B[name].weight.data = delta.B.detach().to(own.dtype)
    return found.eval().requires_grad_(False)


def timed(steps: dict[str, Step], runs: int) -> dict[str, list[float]]:
    """Seconds of each step, in turn, after a warm-up."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for run in range(runs + 1):
        for name, step in steps.items():
            start = CLOCK()
            step()
            if run:
                found[name].append(CLOCK() - start)
    return found


def forward(model: Any, ids_BT: Tensor, cache: Any = None, **more: Any) -> Tensor:
    with torch.no_grad():
        more["logits_to_keep"] = 1
        out = model(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None, **more).logits
    if cache is not None and ids_BT.shape[1] == 1:
        cache.crop(-1)  # every decode step is the same one
    return out


def cached(model: Any, ids_BT: Tensor, **more: Any) -> Any:
    cache = transformers.DynamicCache(config=model.config)
    forward(model, ids_BT, cache, **more)
    return cache


class Case:
    """One row of the table: how many adapters the rows have, and of which ranks; 0: none of them acts."""

    def __init__(
        self, options: argparse.Namespace, dtype: torch.dtype, model: Any, title: str, rows: list[Any]
    ) -> None:
        self.title, self.rows, self.model = title, rows, model
        torch.manual_seed(1)
        self.ids_BT = torch.randint(5, model.config.vocab_size, (len(rows), options.tokens))
        self.next_BT = torch.randint(5, model.config.vocab_size, (len(rows), 1))
        self.route = graft.route(model, self.rows)
        self.close = {"atol": 2e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.08, "rtol": 0.05}

    def run(self, ids_BT: Tensor, cache: Any = None) -> Tensor:
        with self.route:
            return forward(self.model, ids_BT, cache)

    def check(self, bare: Any, ids_BT: Tensor, theirs: Tensor | None) -> None:
        """The same logits as the loop, as peft, and for rows of the base as the bare base, bit for bit."""
        found = self.run(ids_BT)
        with mixed.prefer("loop"):
            torch.testing.assert_close(found, self.run(ids_BT), **self.close)
        torch.testing.assert_close(self.run(ids_BT), found, rtol=0, atol=0)  # from what is kept
        of_base = [i for i, row in enumerate(self.rows) if row is None]
        assert torch.equal(found[of_base], forward(bare, ids_BT)[of_base])
        if theirs is not None:
            torch.testing.assert_close(found, theirs, **self.close)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, tuple[int, ...], Callable[[list[str]], list[Any]]]]:
    many = options.rows
    for count in options.adapters:
        yield f"{count}", count, (16,), lambda names: [names[i * len(names) // many] for i in range(many)]
    if options.only:
        return
    half = options.adapters[-1] // 4
    yield f"{half} shuffled", half, (16,), lambda names: [names[i * 7 % len(names)] for i in range(many)]
    yield f"{half}, ranks 4 to 32", half, RANKS, lambda names: [names[i * len(names) // many] for i in range(many)]
    yield (
        f"{half} beside rows of the base",
        half,
        (16,),
        lambda names: [names[i % len(names)] if i % 2 else None for i in range(many)],
    )
    yield "attached, none acts", half, (16,), lambda names: [None] * many


def mixed_batches(options: argparse.Namespace, label: str) -> None:
    dtype = DTYPES[label]
    for title, count, ranks, rows_of in cases(options):
        bare, model = model_of(options, dtype), model_of(options, dtype)
        names = fill(model, count, ranks)
        case = Case(options, dtype, model, title, rows_of(names))
        other = peft_of(model_of(options, dtype), model, names) if len(ranks) == 1 and None not in case.rows else None
        theirs = None if other is None else forward(other, case.ids_BT, adapter_names=case.rows)
        case.check(bare, case.ids_BT, theirs)
        for part in options.part:
            row(options, label, f"{part}, {title}", timed(steps_of(part, case, bare, other), options.repeats))


def steps_of(part: str, case: Case, bare: Any, other: Any) -> dict[str, Step]:
    """One prefill, or one decode step of each variant."""
    caches, ids = [None, None, None], case.ids_BT
    if part == "decode":
        caches, ids = [cached(bare, ids) for _ in caches], case.next_BT
    steps: dict[str, Step] = {"base": lambda: forward(bare, ids, caches[0]), "graft": lambda: case.run(ids, caches[1])}
    if other is not None:
        steps["peft"] = lambda: forward(other, ids, caches[2], adapter_names=case.rows)
    return steps


def dora(options: argparse.Namespace, label: str) -> None:
    """One row, one token after the other."""
    import peft

    bare, model = model_of(options, DTYPES[label]), model_of(options, DTYPES[label])
    adapter = graft.attach(model, graft.DoRA(rank=16, alpha=32, targets="all-linear"), "d", trainable=False)
    with torch.no_grad():
        randomise((p for n, p in adapter.named_parameters() if not n.endswith("magnitude")), 0)
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora=True)
    other = peft.get_peft_model(model_of(options, DTYPES[label]), config).eval().requires_grad_(False)
    ids, prompt = torch.tensor([[7]]), torch.arange(5, 15)[None]
    caches = [cached(each, prompt) for each in (bare, bare, bare)]
    every = zip(("base", "graft", "peft"), (bare, model, other), caches, strict=True)
    steps = {name: (lambda each=each, cache=cache: forward(each, ids, cache)) for name, each, cache in every}
    row(options, label, "decode of one row, DoRA", timed(steps, 4 * options.repeats))


def loading(options: argparse.Namespace) -> None:
    """Loading the same folder under many names: the first and the last five, milliseconds."""
    import peft

    own = model_of(options, torch.float32)
    count = options.adapters[-1]
    with tempfile.TemporaryDirectory() as folder:
        adapter = graft.attach(own, graft.LoRA(rank=16, targets="all-linear"), "a")
        with torch.no_grad():
            randomise(adapter.parameters(), 0)
        graft.save(own, "a", Path(folder) / "a")
        graft.detach(own)
        theirs = peft.PeftModel.from_pretrained(model_of(options, torch.float32), Path(folder) / "a", adapter_name="n0")
        for title, load in (
            ("graft", lambda name: graft.load(own, Path(folder) / "a", name)),
            ("peft", lambda name: theirs.load_adapter(str(Path(folder) / "a"), name)),
        ):
            seconds = []
            for i in range(1, count + 1):
                start = CLOCK()
                load(f"n{i}")
                seconds.append(CLOCK() - start)
            first, last = (round(1e3 * statistics.median(part), 1) for part in (seconds[:5], seconds[-5:]))
            options.results.put(f"loading {count}, {title}", case=f"loading, {title}", first=first, last=last)
            print(f"loading {count} adapters, {title}: the first {first} ms, the last {last} ms", flush=True)


def row(options: argparse.Namespace, label: str, title: str, seconds: dict[str, list[float]]) -> None:
    """Store one row of the table."""
    found: dict[str, Any] = {name: round(1e3 * statistics.median(values), 2) for name, values in seconds.items()}
    pairs = zip(seconds["graft"], seconds["base"], strict=True)
    found["of_base"] = round(statistics.median(a / b for a, b in pairs), 3)
    if "peft" in seconds:
        pairs = zip(seconds["graft"], seconds["peft"], strict=True)
        found["peft_of_graft"] = round(statistics.median(b / a for a, b in pairs), 2)
    options.results.put(f"{title}/{label}", case=title, dtype=label, repeats=len(seconds["graft"]), **found)
    print(f"{title}/{label}: {found}", flush=True)


COLUMNS = ("case", "dtype", "base", "graft", "of_base", "peft", "peft_of_graft")


def show(cells: dict[str, dict[str, Any]]) -> str:
    """The table of all cells: milliseconds of a step and ratios; of loading, the first and the last adapter."""
    titles = ["case", "dtype", "base ms", "Graft ms", "Graft / base", "peft ms", "peft / Graft"]
    steps = [row for row in cells.values() if "of_base" in row]
    loads = [row for row in cells.values() if "first" in row]
    text = common.table(titles, [[row.get(key) for key in COLUMNS] for row in steps])
    if loads:
        lines = [[row["case"], row["first"], row["last"]] for row in loads]
        text += "\n\n" + common.table(["one adapter more", "the first ms", "the last ms"], lines)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--part", nargs="+", choices=("prefill", "decode"), default=["prefill", "decode"])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cpu", action="store_true", help="time of the CPU, for a machine that is not idle")
    parser.add_argument("--only", action="store_true", help="leave out the other mixtures, DoRA and loading")
    parser.add_argument("--again", action="store_true", help="measured again in any case")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.quick:
        options.adapters, options.rows, options.tokens, options.repeats = [1, 8], 8, 4, 2
    torch.set_num_threads(options.threads)
    if options.cpu:
        global CLOCK
        CLOCK = time.process_time
    options.results = common.Results("mixed_batch", options)
    for label in options.dtype:
        mixed_batches(options, label)
        if not options.only:
            dora(options, label)
    if not options.only:
        loading(options)
    print(show(options.results.cells))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
