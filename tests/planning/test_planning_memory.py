"""The memory of a step from shapes: against what a real step allocates, as PyTorch's profiler sees it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, T5Config

import graft
from graft import base
from graft.fast.loss import fast_loss
from graft.planning.memory import bytes_of, evaluating, optimizer_bytes, standing, training
from graft.planning.probe import alive, peak
from graft.planning.shapes import Shapes, kernels
from graft.train.guards import checkpointing
from graft.train.state import starting

LLAMA = LlamaConfig(
    vocab_size=2000,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    architectures=["LlamaForCausalLM"],
    pad_token_id=0,
)
T5 = T5Config(
    vocab_size=2000,
    d_model=128,
    d_kv=32,
    d_ff=352,
    num_layers=2,
    num_heads=4,
    dropout_rate=0.0,
    decoder_start_token_id=0,
    architectures=["T5ForConditionalGeneration"],
)
METHODS: dict[str, Callable[[], Any]] = {
    "full": graft.FullFineTuning,
    "lora": lambda: graft.LoRA(rank=8, targets="all-linear"),
    "ia3": graft.IA3,
    "bottleneck": lambda: graft.Bottleneck(size=16),
    "prompt": lambda: graft.PromptTuning(length=10),
    "prefix": lambda: graft.PrefixTuning(length=10),
    "top_layers": lambda: graft.TopLayers(count=1),
}


LONG = (4, 96)
DTYPES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "autocast": (torch.float32, torch.bfloat16),
}


def real(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    cls = getattr(transformers, config.architectures[0])
    model: PreTrainedModel = cls(copy.deepcopy(config)).to(dtype)
    return model


def batch_of(config: Any, rows: int = 4, tokens: int = 96) -> dict[str, Tensor]:
    ids = torch.randint(5, config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def cells() -> Iterator[Any]:
    """Each method in both dtypes, one of them checkpointed; on T5 in one of the four ways; some under autocast."""
    for number, method in enumerate(METHODS):
        for dtype in ("fp32", "bf16"):
            again = (number % 2 == 0) == (dtype == "bf16")
            yield pytest.param(LLAMA, method, dtype, again, LONG, id=f"llama-{method}-{dtype}-{again}")
        dtype, again = ("fp32", "bf16")[number % 2], number // 2 % 2 == 0
        yield pytest.param(T5, method, dtype, again, LONG, id=f"t5-{method}-{dtype}-{again}")
    for config, method, again, shape in (
        (LLAMA, "full", False, LONG),
        (LLAMA, "full", False, (1, 4)),  # gradients are most of it, and what autocast kept is gone when they are there
        (LLAMA, "full", True, LONG),
        (LLAMA, "lora", False, LONG),
        (LLAMA, "top_layers", True, LONG),
        (T5, "bottleneck", False, LONG),
    ):
        name = f"{config.model_type}-{method}-autocast-{again}-{shape[1]}"
        yield pytest.param(config, method, "autocast", again, shape, id=name)


def measured(model: Any, batch: dict[str, Tensor], compute: torch.dtype | None) -> int:
    """Beside what stands there, of a second step's forward and backward."""
    inputs = graft.prepare(model, batch)
    model.train()

    def step() -> None:
        with torch.autocast("cpu", dtype=compute, enabled=compute is not None):
            loss = fast_loss(model, inputs)
            loss = model(**inputs).loss if loss is None else loss
        loss.backward()

    step()
    model.zero_grad()
    return peak(step)


@pytest.mark.parametrize(("config", "method", "dtype", "again", "shape"), list(cells()))
def test_what_a_step_allocates(config: Any, method: str, dtype: str, again: bool, shape: tuple[int, int]) -> None:
    """Within 5 % of the bytes beside what stands, and exactly all that stands, whoever holds it."""
    kind, compute = DTYPES[dtype]
    before = alive()
    model = real(config, kind)
    graft.attach(model, METHODS[method](), "a")
    stands = alive() - before
    with checkpointing(model, again):
        wanted = measured(model, batch_of(config, *shape), compute)
    kept = bytes_of([*standing(model), *starting(model).values()]) - bytes_of(standing(model))
    hollow = base.skeleton(config).to(kind)
    graft.attach(hollow, METHODS[method](), "a")
    with checkpointing(hollow, again):
        found, _ = training(
            hollow, batch_of(config, *shape), optimizer="sgd", accumulate=1, on_cpu=True, compute=compute
        )
    assert found.weights == stands
    assert found.total - found.weights == pytest.approx(wanted + kept, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adafactor_needs_more_for_its_step_than_a_short_batch_does(dtype: str) -> None:
    """Beside all gradients it makes the largest tensor of all, here the embedding, several times in fp32."""
    config, kind = copy.deepcopy(LLAMA), DTYPES[dtype][0]
    config.vocab_size = 20_000
    model, hollow = real(config, kind), base.skeleton(config).to(kind)
    for each in (model, hollow):
        graft.attach(each, graft.FullFineTuning(), "a")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = transformers.optimization.Adafactor(trained, lr=1e-3, relative_step=False, scale_parameter=False)
    batch = batch_of(config, 1, 4)

    def step() -> None:
        fast_loss(model, batch).backward()  # type: ignore[union-attr]
        optimizer.step()
        model.zero_grad()

    step()
    wanted = peak(step) + bytes_of([*standing(model), *starting(model).values()]) - bytes_of(standing(model))
    found, _ = training(hollow, batch, optimizer="adafactor", accumulate=1, on_cpu=True)
    assert found.total - found.weights - found.optimizer == pytest.approx(wanted, rel=0.01)
    assert found.gradients == bytes_of(trained)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [LLAMA, T5], ids=["llama", "t5"])
def test_what_an_evaluation_allocates(config: Any, dtype: str) -> None:
    """A forward without gradients, the optimizer's state and the adapter as it began beside it."""
    kind, compute = DTYPES[dtype]
    model, hollow = real(config, kind).eval(), base.skeleton(config).to(kind)
    for each in (model, hollow):
        graft.attach(each, graft.LoRA(rank=8, targets="all-linear"), "a")
    batch = batch_of(config, 8, 200)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=compute, enabled=compute is not None):
            fast_loss(model, batch)

    forward()
    found = evaluating(hollow, batch, optimizer="adamw", on_cpu=True, compute=compute)
    assert found.activations + found.logits == pytest.approx(peak(forward), rel=0.05)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert found.weights == bytes_of(standing(model)) and found.other == bytes_of(starting(model).values())
    assert found.gradients == 0 and found.optimizer == optimizer_bytes(trained, "adamw")


def test_gradients_of_the_batches_before_stand_beside_a_forward() -> None:
    """Accumulating, as one batch but for the gradients, which are there at the moment that needs most."""
    found = []
    for accumulate in (1, 2):
        shape = base.skeleton(LLAMA)
        graft.attach(shape, graft.LoRA(rank=64, targets="all-linear"), "a")
        found.append(training(shape, batch_of(LLAMA), optimizer="sgd", accumulate=accumulate, on_cpu=True))
    (one, work), (two, same) = found
    model = real(LLAMA, torch.float32)
    graft.attach(model, graft.LoRA(rank=64, targets="all-linear"), "a")
    measured(model, batch_of(LLAMA), None)  # leaves gradients behind
    inputs = graft.prepare(model, batch_of(LLAMA))
    seen = peak(lambda: fast_loss(model, inputs).backward())  # type: ignore[union-attr]
    stands = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    kept = bytes_of(starting(model).values())
    assert two.total - two.weights == pytest.approx(stands + seen + kept, rel=0.03)
    assert one.total < two.total and work == same


def test_a_start_from_gradients_holds_them_all() -> None:
    """LoRA-GA's, in fp32, where they are more than a step holds."""
    totals = {}
    for init in ("kaiming", "lora_ga"):
        shape = base.skeleton(LLAMA).to(torch.bfloat16)
        graft.attach(shape, graft.LoRA(rank=4, targets="all-linear", init=init), "a")
        found, _ = training(shape, batch_of(LLAMA, 1, 4), optimizer="sgd", accumulate=1, on_cpu=True)
        totals[init] = found.total
    linears = [m for n, m in shape.named_modules() if type(m) is torch.nn.Linear and "layers" in n]
    assert totals["lora_ga"] == found.weights + sum(4 * m.weight.numel() for m in linears) > totals["kaiming"]


def test_state_of_optimizers_is_what_they_keep() -> None:
    """After a step of each, tensors of more than one value."""
    parameters = [torch.nn.Parameter(torch.ones(6, 4)), torch.nn.Parameter(torch.ones(5))]
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": transformers.optimization.Adafactor}
    for name, kind in kinds.items():
        optimizer: Any = kind(parameters, lr=1e-3, **({"relative_step": False} if name == "adafactor" else {}))
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [
            v for each in optimizer.state.values() for v in each.values() if isinstance(v, Tensor) and v.numel() > 1
        ]
        assert optimizer_bytes(parameters, name) == sum(v.numel() * v.element_size() for v in state), name


def test_bytes_live_as_long_as_their_tensors() -> None:
    """Two tensors of which one goes, a view, and a product's arithmetic."""
    with Shapes() as shapes:
        first = torch.empty(1 << 10, device="meta")
        view = first[1:]
        second = torch.empty(1 << 11, device="meta")
        assert shapes.total == 4 * ((1 << 10) + (1 << 11))
        del first, second
        assert shapes.total == 4 << 10
        del view
        assert shapes.total == 0 and shapes.peak == 12 << 10
        _ = torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta")
    assert shapes.arithmetic == 2 * 3 * 5 * 7


def test_integers_are_real_and_floats_are_shapes() -> None:
    """So that what reads token ids, lengths and masks goes on as it would."""
    with Shapes():
        places = torch.arange(4, device="meta")
        assert places.tolist() == [0, 1, 2, 3]
        assert (places.to("meta") > 1).nonzero()[:, 0].tolist() == [2, 3]
        rows = torch.empty(6, 2, device="meta").index_select(0, places)
    assert rows.is_meta and rows.shape == (4, 2)


def test_the_peak_is_that_of_live_tensors() -> None:
    """4 MB, 8 MB beside them for a moment, then 4 MB alone."""

    def run() -> None:
        first = torch.empty(1 << 20)
        torch.empty(1 << 21)
        del first

    assert peak(run) == 12 << 20


@pytest.mark.parametrize("on_cpu", [True, False])
def test_sums_of_two_dtypes_copy_on_a_cpu(on_cpu: bool) -> None:
    """16 bits to 32: the operand once more in 32 bits, while it is added."""
    with kernels(on_cpu), Shapes() as shapes:
        wide = torch.empty(1 << 10, device="meta")
        wide += torch.empty(1 << 10, device="meta", dtype=torch.bfloat16)
    assert shapes.peak == (6 << 10) + (4 << 10) * on_cpu


def test_gradients_of_one_weight_are_summed_in_place() -> None:
    """A weight that is used twice: two gradients at once, not their sum as a third."""

    def step(device: str) -> None:
        weight = torch.ones(64, 32, device=device, requires_grad=True)
        x = torch.ones(2, 32, device=device)
        ((x @ weight.T) @ weight).sum().backward()

    with Shapes() as shapes:
        step("meta")
    assert shapes.peak == pytest.approx(peak(lambda: step("cpu")), rel=0.05)
