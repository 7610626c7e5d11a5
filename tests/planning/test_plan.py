"""What a plan says of a run: counts, the batch, changes that fit, and what `train` does with it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import graft
from graft import base
from graft.bank import bank_of
from graft.data.collate import check_packing
from graft.errors import ConfigError
from graft.planning import devices, gate, model, probe
from graft.planning.command import plan as verb
from graft.planning.memory import Memory, answering, bytes_of
from graft.planning.picture import draw, table, verdict
from graft.planning.plan import _changes, _kinds, _Needs, _needs, _notes, _price, _with, plan
from graft.planning.probe import peak
from graft.train.config import Run, make_run, settings_of
from graft.train.run import train
from graft.train.setup import open_model, padding_free, read_data
from tiny import MODELS, MT0_LARGE, tiny

MT0 = {
    "model_type": "mt5",
    "architectures": ["MT5ForConditionalGeneration"],
    **MT0_LARGE,
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
}
COUNTS = [
    ({"method": "lora", "rank": 8}, 1_231_940_608, 2_359_296),
    ({"method": "prompt-tuning", "length": 20}, 1_229_622_272, 40_960),
    ({"method": "p-tuning", "length": 20, "hidden": 128}, 1_229_902_080, 320_768),
    ({"method": "prefix-tuning", "length": 20}, 1_230_564_352, 983_040),
    ({"method": "ia3"}, 1_229_863_936, 282_624),
    ({"method": "full"}, 1_229_581_312, 1_229_581_312),
]


@pytest.fixture
def rows(tmp_path: Path) -> str:
    """A file of prompts with answers of several lengths."""
    file = tmp_path / "rows.jsonl"
    told = [{"prompt": f"Cat {i} sees", "completion": "a dog and runs" + " away" * (i % 5)} for i in range(24)]
    file.write_text("".join(json.dumps(row) + "\n" for row in told))
    return str(file)


@pytest.fixture
def run(rows: str, tmp_path: Path) -> Run:
    """A short training of the embedded base."""
    data = {"train": rows, "template": "plain"}
    return make_run(
        {"base": "embedded", "data": data, "output": str(tmp_path / "run"), "train": {"max_steps": 1, "batch_size": 2}}
    )


def made_up(path: str = "embedded", **more: Any) -> Run:
    return settings_of({"base": path, "data": {"train": "made up"}, "output": "none", **more}, [])


@pytest.mark.parametrize(("method", "total", "trainable"), COUNTS, ids=[str(each[0]["method"]) for each in COUNTS])
def test_the_counts_of_the_mt0_large_table(method: dict[str, Any], total: int, trainable: int, tmp_path: Path) -> None:
    """From a config.json alone, whose head is its own although the class's config says that it is tied."""
    (tmp_path / "config.json").write_text(json.dumps(MT0))
    own = model.Given(
        config=model.config_of(str(tmp_path)), tokenizer=None, data=model.made_up(made_up(), "seq2seq", 4)
    )
    run = made_up(str(tmp_path / "config.json"), method=method, peft_compat=method["method"] != "full")
    found = graft.describe(model.shapes_of(run, own, torch.float32))
    assert (found.total, found.trainable) == (total, trainable)


def test_a_folder_with_a_config_and_the_file_itself_are_planned_alike(tmp_path: Path) -> None:
    tiny("t5").config.save_pretrained(tmp_path)
    found = [plan(made_up(str(path)), length=12, device="24GB") for path in (tmp_path, tmp_path / "config.json")]
    assert found[0].training == found[1].training and found[0].inference == found[1].inference
    assert found[0].total == sum(p.numel() for p in tiny("t5").parameters()) + found[0].trainable
    with pytest.raises(ConfigError, match="no config of a model"):
        (tmp_path / "config.json").write_text("{")
        plan(made_up(str(tmp_path / "config.json")), length=12)


@pytest.mark.parametrize("kind", MODELS)
def test_packing_is_tried_on_a_small_model_of_the_same_class(kind: str) -> None:
    """The small one lets packed texts see each other exactly where the base itself does."""
    real = tiny(kind)
    if not hasattr(real, "lm_head") and not real.get_output_embeddings():
        pytest.skip("not of language")
    graft.attach(real, graft.LoRA(), "default")
    config = real.config
    config.architectures = [type(real).__name__]

    def isolates(model: Any) -> bool:
        try:
            check_packing(model)
        except ConfigError:
            return False
        return True

    assert isolates(model.small(config, made_up())) == isolates(real)


def test_the_plan_takes_the_batch_that_training_takes(run: Run) -> None:
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    data = read_data(run, tokenizer, config)
    real = open_model(run, data, tokenizer)
    assert padding_free(run, data, real)
    found = plan(run)
    longest = sorted((len(example.input_ids) for example in data.train), reverse=True)
    assert found.rows == 2 and found.tokens <= sum(longest[:2])
    assert found.trainable == sum(p.numel() for p in bank_of(real)["default"].parameters())


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw"), ("full", "adamw"), ("full", "adafactor")])
def test_what_is_measured_by_two_real_steps(run: Run, method: str, optimizer: str) -> None:
    """With the second copy of the base under full fine-tuning, a sixth of it, and with what Adafactor's step makes."""
    changed = {"method": {"method": method}, "train": {"max_steps": 1, "batch_size": 2, "optimizer": optimizer}}
    run = make_run(run.model_dump() | changed)
    found = plan(run)
    seen = probe.probe(run)
    assert found.training.total == pytest.approx(seen.peak, rel=0.03)
    assert seen.steps == 1 and seen.seconds > 0
    assert not Path(run.output).exists()


def test_on_a_gpu_two_steps_are_taken_and_the_second_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first makes the optimizer's state and the kernels; the device is a stand-in."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: len(done))
    trainer: Any = SimpleNamespace(
        model=SimpleNamespace(train=lambda: None, parameters=list, zero_grad=lambda: None),
        create_optimizer=lambda: SimpleNamespace(step=lambda: done.append("optimizer")),
        args=SimpleNamespace(device=torch.device("cuda"), gradient_accumulation_steps=1, max_grad_norm=1.0),
        get_batch_samples=lambda batches, count, device: (list(batches), None),
        training_step=lambda *given: done.append("batch"),
        accelerator=SimpleNamespace(clip_grad_norm_=lambda *given: None),
        losses=[],
    )
    assert probe._measure(trainer, {}, 3, 0).peak == 5
    assert done == ["batch", "optimizer", "reset", "batch", "optimizer"]


@pytest.mark.parametrize("kind", ["embedded", "t5", "mt5", "bart", "gpt2", "gpt2_cls", "roberta"])
@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_quantized_bases_take_what_bitsandbytes_takes(precision: str, kind: str, tmp_path: Path) -> None:
    """T5 keeps `wo`, classifiers keep all of their heads, and GPT-2's Conv1D becomes a linear."""
    pytest.importorskip("bitsandbytes")
    path, labels = kind, 3 if kind in ("gpt2_cls", "roberta") else None
    if kind != "embedded":
        path = str(tmp_path)
        tiny(kind).save_pretrained(path)
    real = base.load_base(path, precision=precision, num_labels=labels)
    tensors = [*real.parameters()]
    for module in real.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        tensors += [each for each in (getattr(weight, name, None) for name in ("CB", "SCB")) if each is not None]
    run = made_up(path, precision=precision)
    names = ("a", "b", "c") if labels else ()
    mode = "classification" if labels else "seq2seq" if real.config.is_encoder_decoder else "causal"
    given = model.Given(config=base.load_config(path), tokenizer=None, data=model.made_up(run, mode, 4))
    given = replace(given, data=replace(given.data, template=replace(given.data.template, label_names=names)))
    shape = model.shapes_of(run, given, real.dtype)
    own = bytes_of(p for name, p in shape.named_parameters() if not name.startswith("adapters."))
    assert own - model.quantized_away(shape, precision) == bytes_of(tensors)
    kinds = {name: type(module) for name, module in real.named_modules()}
    coded = {name for name, module in shape.named_modules() if type(module) is model.Dequantized}
    assert coded == {name for name, each in kinds.items() if each.__name__ in ("Linear4bit", "Linear8bitLt")}


def test_answers_hold_what_generating_holds() -> None:
    """The embedded base, four prompts of 48 tokens, 32 new ones."""
    real = base.load_base("embedded", precision="fp32")
    graft.attach(real, graft.IA3())
    ids_BT = torch.randint(5, 500, (4, 48), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
    real.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    seen = peak(lambda: real.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options))
    shape = base.skeleton(base.load_config("embedded")).float()
    graft.attach(shape, graft.IA3())
    found = answering(shape, 4, 48, 32, on_cpu=True)
    assert found.total - found.weights == pytest.approx(seen, rel=0.15)
    config = real.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    assert found.cache <= 2 * config.num_hidden_layers * 4 * (48 + 32) * heads * width * 4


def test_changes_that_make_it_fit_do(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    settings = {"base": str(tmp_path), "data": {"train": "x"}, "output": "none", "precision": "fp32"}
    run = make_run({**settings, "train": {"batch_size": 4}})
    need = plan(run, length=64, device="24GB").training.total - devices.CONTEXT
    tight = plan(run, length=64, device=f"{(need * 0.8 + devices.CONTEXT) / 0.95 / devices.USABLE / devices.GIB}GB")
    kinds = [set(change.settings) for change in tight.changes or ()]
    assert not tight.fits and {"train.batch_size", "train.accumulate"} in kinds and len(kinds) == 3
    for change in tight.changes or ():
        again = settings_of(
            json.loads(json.dumps({**settings, "train": {"batch_size": 4}})),
            [f"{key}={json.dumps(value)}" for key, value in change.settings.items()],
        )
        assert plan(again, length=64, device="24GB").training.total == change.total <= tight.room * 0.95
        assert again.train.batch_size * again.train.accumulate == 4 and change.price
    assert "it would with" in verdict(tight)
    hopeless = plan(run, length=64, device="0.01GB")
    assert hopeless.changes == () and "no setting that was tried" in verdict(hopeless)


def changes_of(run: Run, needed: Callable[[Run], int], room: int) -> list[dict[str, Any]]:
    """What is offered where `needed` is what each run needs."""

    def needs(of: Run) -> _Needs:
        return _Needs(Memory(weights=needed(of)), None, None, 8, 64, 1, 1, 64)

    where = devices.Device("x", room, False, True)
    return [dict(change.settings) for change in _changes(run, needs(run), needs, where)]


def test_a_change_that_fits_by_itself_is_found_although_accumulating_needs_more() -> None:
    """Gradients of the batches before stand beside a forward, so two batches may need more than one twice as large."""
    kept = {8: 200, 4: 250, 2: 225, 1: 212}
    run = made_up(train={"batch_size": 8}, precision="nf4")
    found = changes_of(run, lambda of: kept[of.train.batch_size] if of.train.gradient_checkpointing else 999, 220)
    assert found == [{"train.gradient_checkpointing": True}]
    kept[8] = 999
    found = changes_of(run, lambda of: kept[of.train.batch_size] if of.train.gradient_checkpointing else 999, 240)
    smaller = {"train.batch_size": 2, "train.accumulate": 4}
    assert found == [{"train.gradient_checkpointing": True} | smaller]


@pytest.mark.parametrize(("rows", "accumulate"), [(5, 1), (7, 1), (12, 3), (15, 1), (30, 2)])
def test_smaller_batches_make_the_same_steps(rows: int, accumulate: int) -> None:
    run = made_up(train={"batch_size": rows, "accumulate": accumulate}, precision="nf4")
    for fits in range(1, rows):
        (found, *_) = changes_of(run, lambda of, fits=fits: 1 + 99 * (of.train.batch_size > fits), 50)  # type: ignore[misc]
        now = found["train.batch_size"]
        assert now * found["train.accumulate"] == rows * accumulate
        assert now == max(n for n in range(1, fits + 1) if rows % n == 0)


def test_batches_of_evaluation_are_offered_where_they_are_what_does_not_fit() -> None:
    def needed(of: Run) -> int:
        return 1 + 99 * ((of.train.eval_batch_size or of.train.batch_size) > 4)

    data = {"train": "made up", "eval": 0.1}
    for settings, packing, wanted in [
        ({"batch_size": 4, "eval_batch_size": 8}, False, {"train.eval_batch_size": 4}),
        (
            {"batch_size": 8, "eval_batch_size": 16},
            False,
            {"train.batch_size": 4, "train.accumulate": 2, "train.eval_batch_size": 4},
        ),
        ({"batch_size": 8}, True, {"train.eval_batch_size": 4}),
    ]:
        run = settings_of(
            {
                "base": "embedded",
                "data": data | {"packing": packing},
                "output": "none",
                "train": settings,
                "precision": "nf4",
            },
            [],
        )
        assert changes_of(run, needed, 50)[0] == wanted
    without = made_up(train={"batch_size": 8}, data={"train": "made up", "packing": True}, precision="nf4")
    assert changes_of(without, needed, 50) == []  # packs have no rows to take fewer of


def test_where_steps_fit_only_the_evaluation_is_changed() -> None:
    run = made_up(train={"batch_size": 6}, data={"train": "made up", "eval": 0.1}, precision="nf4")

    def needs(of: Run) -> _Needs:
        step, evaluation = Memory(weights=10), Memory(weights=40 * (of.train.eval_batch_size or of.train.batch_size))
        return _Needs(step, evaluation, None, 8, 64, 1, 1, 64)

    where = devices.Device("x", 100, False, True)
    assert next(_changes(run, needs(run), needs, where)).settings == {"train.eval_batch_size": 2}


def test_a_price_says_how_many_steps_there_are() -> None:
    """10 rows in 4 epochs: 8 steps of at most 8 rows, and 12 batches of at most 4, 6 steps of two of them."""
    run = settings_of(
        {"base": "embedded", "data": {"train": "made up"}, "output": "none", "train": {"batch_size": 8, "epochs": 4}},
        [],
    )
    data = replace(model.made_up(run, "causal", 4), train=model.made_up(run, "causal", 4).train[:1] * 10)
    given = model.Given(config=base.load_config("embedded"), tokenizer=None, data=data)
    smaller = {"train.batch_size": 4, "train.accumulate": 2}
    now, found = (_needs(each, given, devices.room("24GB"), answers=False) for each in (run, _with(run, smaller)))
    assert (now.steps, found.steps) == (8, 6)
    assert _price(smaller, found, now) == "6 steps in place of 8, in more and smaller batches"


def test_the_price_of_checkpointing_does_not_go_by_the_lengths_of_rows(tmp_path: Path) -> None:
    """One long row among short ones, end to end: a smaller batch has the same work for each token."""
    file, words = tmp_path / "rows.jsonl", " a dog runs away and" * 20
    told = [{"prompt": "Cat sees", "completion": words if i == 0 else "a dog"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in told))
    settings = {"base": "embedded", "data": {"train": str(file), "template": "plain"}, "output": "none"}
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    needs = {}
    for rows, again in ((8, False), (8, True), (2, True)):
        run = make_run({**settings, "train": {"batch_size": rows, "gradient_checkpointing": again}})
        given = model.Given(config=config, tokenizer=tokenizer, data=read_data(run, tokenizer, config))
        needs[rows, again] = _needs(run, given, devices.room("24GB"), answers=False)
    changed = {"train.gradient_checkpointing": True}
    prices = [_price(changed, needs[rows, True], needs[8, False]) for rows in (8, 2)]
    assert all(30 <= int(price.removesuffix("% more arithmetic")) <= 36 for price in prices)


def test_both_sides_of_an_encoder_decoder_are_weighed() -> None:
    """Rows of 50 tokens in and 2 out beside rows of 48 in and 40 out, in training and in evaluation."""
    run = made_up(train={"batch_size": 8}, data={"train": "made up", "eval": 0.1})
    data = model.made_up(run, "seq2seq", 1)
    sizes = [(50, 2)] * 8 + [(48, 40)] * 8
    rows = [replace(data.train[0], input_ids=[1] * inside, labels=[1] * out) for inside, out in sizes]
    found = model.batches(
        run, replace(data, train=rows, evaluation=rows), tiny("t5"), SimpleNamespace(pad_token_id=0, eos_token_id=0)
    )
    assert [None if each is None else each["labels"].shape for each in found] == [(8, 40), (8, 40)]


def test_made_up_rows_are_evaluated_in_batches_of_their_own() -> None:
    run = made_up(data={"train": "made up", "eval": 0.1}, train={"batch_size": 1, "eval_batch_size": 32})
    found = plan(run, length=64, device="24GB")
    assert any("heaviest batch has 32 rows, 2,048 tokens" in note for note in found.notes)
    assert plan(made_up(), length=64, device="24GB").evaluation is None


@pytest.mark.parametrize("packing", [False, True])
def test_an_evaluation_that_needs_more_than_training_is_the_peak(
    packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short rows are trained, long ones evaluated; eight of them too where a training batch is one pack."""
    files = {}
    for name, words in (("train", 1), ("eval", 70)):
        told = [{"prompt": f"{name} {i} sees", "completion": "a dog " * words} for i in range(16)]
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in told))
    data = files | {"template": "plain", "packing": packing} | ({"max_length": 150} if packing else {})
    settings = {"base": "embedded", "precision": "fp32", "output": str(tmp_path / "run"), "train": {"batch_size": 8}}
    run = make_run(settings | {"data": data})
    found = plan(run)
    assert found.evaluation is not None and found.evaluation.total > 1.2 * found.training.total
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    rows = read_data(run, tokenizer, config)
    tokens = sum(len(example.input_ids) for example in (rows.evaluation or ())[:8])
    assert any(f"heaviest batch has 8 rows, {tokens:,} tokens" in note for note in found.notes)
    assert found.to_dict()["evaluation"]["total"] == found.need
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(table(found))
    (titles,) = [line.split() for line in console.export_text().splitlines() if line.startswith("at the peak")]
    assert titles[3:] == ["training", "evaluation", "answering"]
    between = (found.training.total + found.need) // 2
    monkeypatch.setattr(devices, "available", lambda: between)
    tight = plan(run, changes=0)
    assert not tight.fits and "does not fit" in verdict(tight)
    with pytest.raises(ConfigError, match=r"it would with train\.eval_batch_size="):
        train(run, console=Console(quiet=True))


def test_devices_are_known_by_name_or_size() -> None:
    assert devices.room("RTX 4090")[1] == int(24 * devices.GIB * devices.USABLE)
    assert devices.room("24GB")[1] == devices.room("a10")[1]  # a card by another name
    with pytest.raises(ConfigError, match=r"a100-80.*such as 24GB"):
        devices.room("a100-8O")
    assert 0 < devices.available() <= torch.iinfo(torch.int64).max


LIMITS = [
    pytest.param({}, 100, id="no group"),
    pytest.param({"memory.max": "60", "memory.current": "50"}, 10, id="its own root"),
    pytest.param({"memory.max": "max", "memory.current": "50"}, 100, id="no bound"),
    pytest.param(
        {"memory.max": "60", "memory.current": "50", "memory.stat": "inactive_file 3\nactive_file 4\nanon 9\n"},
        17,
        id="caches are given back",
    ),
    pytest.param({"job/step/memory.max": "60", "job/step/memory.current": "50"}, 10, id="nested"),
    pytest.param(
        {
            "job/memory.max": "60",
            "job/memory.current": "55",
            "job/step/memory.max": "90",
            "job/step/memory.current": "20",
        },
        5,
        id="an ancestor's is less",
    ),
    pytest.param(
        {
            "memory/job/step/memory.limit_in_bytes": "60",
            "memory/job/step/memory.usage_in_bytes": "50",
            "memory/job/step/memory.stat": "active_file 1\ntotal_active_file 3\ntotal_inactive_file 4\n",
        },
        17,
        id="version 1",
    ),
    pytest.param(
        {"memory/memory.limit_in_bytes": "60", "memory/memory.usage_in_bytes": "50"}, 10, id="version 1 in a container"
    ),
    pytest.param({"memory.max": "60", "memory.current": "70"}, 0, id="over its bound"),
]


@pytest.mark.parametrize(("files", "room"), LIMITS)
def test_a_container_bounds_the_memory(
    files: dict[str, str], room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 100 free bytes; the process is in the group job/step of both versions."""
    member = tmp_path / "cgroup"
    member.write_text("9:cpu:/\n4:memory,x:/job/step\n0::/job/step\n")
    for name, text in files.items():
        (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "fs" / name).write_text(text)
    monkeypatch.setattr(devices, "GROUPS", tmp_path / "fs")
    monkeypatch.setattr(devices, "MEMBER", member)
    monkeypatch.setattr(devices.psutil, "virtual_memory", lambda: SimpleNamespace(available=100))
    assert devices.available() == room
    member.unlink()
    assert devices.available() == 100


def test_where_bf16_is_emulated_a_base_is_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `load_base` has it; so bf16 is nothing to offer there, and it is where only the CPU has none."""
    monkeypatch.setattr(base, "computes_bf16", lambda device="cpu": False)
    found = {name: plan(made_up(), length=8, device=name) for name in ("t4", "a10")}
    assert {name: each.precision for name, each in found.items()} == {"t4": "fp32", "a10": "bf16"}
    weights = {name: each.training.weights for name, each in found.items()}
    assert weights["t4"] == pytest.approx(2 * weights["a10"], rel=0.01)  # the adapter is in fp32 in both
    offered = {name: list(_kinds(made_up(precision="fp32"), devices.room(name))) for name in ("t4", "a10")}
    assert {name: {"precision": "bf16"} in each for name, each in offered.items()} == {"t4": False, "a10": True}
    refused = plan(made_up(precision="bf16"), length=8, device="t4").notes
    assert any("t4 does not compute in bf16" in note for note in refused)


def test_what_the_allocator_has_cached_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run of a process: 2 GiB are free to the driver, 3 more to this process; nothing for CUDA itself."""
    known = {"mem_get_info": (2 << 30, 8 << 30), "memory_reserved": 4 << 30, "memory_allocated": 1 << 30}
    for name, value in (known | {"is_available": True, "get_device_name": "X"}).items():
        monkeypatch.setattr(torch.cuda, name, lambda *given, value=value: value)
    monkeypatch.setattr(base, "computes_bf16", lambda device="cpu": False)
    assert devices.room("cuda:0") == ("X", 5 << 30, False, False, 0)
    assert devices.room("24GB").context == devices.CONTEXT


def test_a_method_that_a_small_model_cannot_have_is_planned(rows: str) -> None:
    """Three top layers; and whatever fails, padding that is asked for stays."""
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    kinds, method = {}, {"method": "top_layers", "count": 3}
    for free in (None, False):
        data = {"train": rows, "template": "plain", "padding_free": free}
        run = make_run(
            {"base": "embedded", "data": data, "output": "none", "method": method, "train": {"batch_size": 4}}
        )
        given = model.Given(config=config, tokenizer=tokenizer, data=read_data(run, tokenizer, config))
        kinds[free], _ = model.batches(run, given.data, model.shapes_of(run, given, torch.float32), tokenizer)
        assert plan(run, given=given, device="24GB").fits
    assert len(kinds[None]["input_ids"]) == 1 and len(kinds[False]["input_ids"]) == 4


def test_a_classifier_has_rows_of_their_own(tmp_path: Path) -> None:
    """Also where its method needs the classifier's head, which the small model has not."""
    file = tmp_path / "labels.jsonl"
    file.write_text("".join(json.dumps({"text": f"cat {i} sees", "label": "ab"[i % 2]}) + "\n" for i in range(8)))
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    data = {"train": str(file), "template": {"mode": "classification"}}
    method = {"method": "lora", "targets": "all-linear", "modules_to_save": ["score"]}
    run = make_run({"base": "embedded", "data": data, "output": "none", "method": method, "train": {"batch_size": 4}})
    found = plan(run, given=model.Given(config=config, tokenizer=tokenizer, data=read_data(run, tokenizer, config)))
    assert found.rows == 4 and found.inference is None


def test_train_says_whether_it_fits_and_refuses_what_cannot(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "available", lambda: 1 << 23)
    console = Console(record=True, width=200, file=io.StringIO())
    with pytest.raises(ConfigError, match=r"needs .* MB at its peak.*--force") as error:
        train(run, console=console)
    assert "\n" not in str(error.value)
    assert "does not fit" in console.export_text() and not Path(run.output).exists()
    assert train(run, force=True, console=Console(quiet=True)).metrics["steps"] == 1


def test_a_plan_that_fails_stops_no_training_and_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no shapes\nof this")

    monkeypatch.setattr(gate, "plan", broken)
    console = Console(record=True, width=200, file=io.StringIO())
    assert train(run, console=console).metrics["steps"] == 1
    assert "memory is not predicted: no shapes of this" in console.export_text()


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"method": {"method": "lora", "init": "lora_ga"}}, "start from data"),
        ({"data.general": "x", "train.max_forgetting": 0.1, "train.on_forgetting": "regularise"}, "second forward"),
        ({"data.general": "x"}, "data.general"),
    ],
)
def test_what_is_not_predicted_is_a_note(settings: dict[str, Any], note: str) -> None:
    data = {"train": "made up", "eval": 0.1}
    run = settings_of(
        {"base": "embedded", "data": data, "output": "none", "train": {"batch_size": 4}},
        [f"{key}={json.dumps(value)}" for key, value in settings.items()],
    )
    where = devices.room("24GB")
    assert any(note in each for each in _notes(run, where))
    assert not any(note in each for each in _notes(made_up(), where))


@pytest.mark.parametrize(
    ("settings", "noted"),
    [
        ({"method": {"method": "lora", "layers": 1}}, True),
        ({"method": {"method": "lora", "layers": 1}, "train.trunk_cache": False}, False),
        ({"method": {"method": "lora"}}, False),
    ],
)
def test_states_that_may_be_kept_are_a_note(settings: dict[str, Any], noted: bool) -> None:
    given = {"base": "embedded", "data": {"train": "made up"}, "output": "none", "train": {"batch_size": 4}}
    run = settings_of(given, [f"{key}={json.dumps(value)}" for key, value in settings.items()])
    notes = plan(run, length=8, device="24GB", answers=False).notes
    assert any("train.trunk_cache" in each for each in notes) == noted


@pytest.mark.parametrize(("method", "precision"), [("qlora", "nf4"), ("dora", "fp32"), ("p-tuning", "fp32")])
def test_methods_that_ask_about_the_weights_are_planned(method: str, precision: str) -> None:
    """For a quantized base, and for autocast around their products."""
    found = plan(made_up(precision=precision, method={"method": method}), length=8, device="24GB")
    assert found.fits and found.training.activations > 0


def test_autocast_is_planned() -> None:
    """Activations of half the size; the weights stay."""
    found = [
        plan(made_up(precision="fp32", train={"compute": each}), length=64, device="a10") for each in ("fp32", "bf16")
    ]
    assert found[0].training.weights == found[1].training.weights
    assert found[1].training.activations < 0.9 * found[0].training.activations


def test_train_says_what_is_not_predicted(run: Run) -> None:
    run = make_run(run.model_dump() | {"method": run.method, "train": {"max_steps": 1, "compile": True}})
    tokenizer, config = base.load_tokenizer("embedded"), base.load_config("embedded")
    console = Console(record=True, width=200, file=io.StringIO())
    gate.check_room(run, config, tokenizer, read_data(run, tokenizer, config), force=False, console=console)
    assert "note: train.compile is not in the prediction" in console.export_text()


def test_the_verb(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()
    app.command()(verb)
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(json.loads(run.model_dump_json()) | {"method": "lora"}))
    shown = CliRunner().invoke(app, [str(file), "--json", "--picture", str(tmp_path / "bars.png")])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout[shown.stdout.index("{") :])
    parts = {key: value for key, value in found["training"].items() if key != "total"}
    assert found["fits"] and sum(parts.values()) == found["training"]["total"]
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")
    assert "fits:" in CliRunner().invoke(app, ["base=embedded", "--length", "16"]).stdout
    monkeypatch.setattr(devices, "available", lambda: 1 << 23)
    assert "not probed" in CliRunner().invoke(app, [str(file), "--probe"]).stdout
    for arguments in (["base=embedded"], [str(file), str(file)], [str(file), "--probe", "--device", "h100"]):
        assert isinstance(CliRunner().invoke(app, arguments).exception, ConfigError)


def test_a_picture_is_renamed_into_place(tmp_path: Path) -> None:
    draw(plan(made_up(), length=8, device="rtx4090"), tmp_path / "bars.png")
    assert [each.name for each in tmp_path.iterdir()] == ["bars.png"]
