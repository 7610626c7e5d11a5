"""Starts of LoRA that are computed from the base's weights, its gradients, or its inputs.

    PiSSA       U S V^T = W       A0 = sqrt(S_r / s) V_r^T   B0 = U_r sqrt(S_r / s)   Meng et al., arXiv 2404.02948
    OLoRA       Q R = W           A0 = R_r                   B0 = Q_r                 Büyükakyüz, arXiv 2406.01775
    LoRA-GA     U S V^T = dL/dW   A0 = c V_[1..r]^T          B0 = c U_[r+1..2r]       Wang et al., arXiv 2407.05000
    EVA         U S V^T = X       A = V_r^T                  B = 0                    Paischer et al., arXiv 2410.07170
    orthogonal  Q R = random      A from odd rows of Q       B from even rows, so that B A = 0, as in peft

The first three do not start at zero. Their papers take s B0 A0 out of the base's weight; here the base is never edited,
and the delta is s (B A - B0 A0) with A0 and B0 frozen: the same outputs and gradients, on a base that others share.

LoRA-GA: c = O^(1/4) / sqrt(gamma). peft (0.21) multiplies B by the singular values and scales B alone; so do we under
`peft_compat`. EVA: X are the centred inputs at the positions whose label counts, seen batch by batch; the ranks are
shared out again by explained variance, at most rho r for a site.

Shape legend: B rows, T tokens, N rows of inputs, I in, O out, R rank, K components.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graft import vocabulary
from graft.bank import bank_of
from graft.errors import ConfigError
from graft.method import nearest
from graft.methods.lora_data import eva, gradients, leading
from graft.weights import weight_OI

Pair = tuple[Tensor, Tensor]
"""A (R, I) and B (O, R)."""

RANDOM = ("kaiming", "gaussian", "random")
OPTIONS: dict[str, dict[str, float]] = {
    "lora_ga": {"batches": 8, "gamma": 16.0},
    "eva": {"batches": 16, "rho": 2.0, "tau": 0.99},
}
"""The starts that need data, and their settings."""
TAKEN_OFF = ("pissa", "olora", "lora_ga")
"""The starts whose product is taken off again."""
_filled: ContextVar[bool] = ContextVar("_filled", default=False)


@contextlib.contextmanager
def filled() -> Iterator[None]:
    """Inside, new pairs that would start at random start at zero: each of their values comes from a file."""
    token = _filled.set(True)
    try:
        yield
    finally:
        _filled.reset(token)


def is_filled(init: str) -> bool:
    """Whether a pair with this start is left at zero, for a file to fill."""
    return init in RANDOM and _filled.get()


def check(name: str, init: str, options: Mapping[str, float], ranks: Sequence[int], alphas: Sequence[float]) -> None:
    """Refuse a start that is not known or does not fit the other settings.

    Args:
        name: of the method, for messages.

    Raises:
        ConfigError: says which setting is wrong.
    """
    kind = kind_of(init)
    known = (*RANDOM, "pissa", "pissa_niter_<k>", "olora", "orthogonal", *OPTIONS)
    if kind not in known:
        raise ConfigError(f"{name}: init is one of {', '.join(known)}, not {init!r}")
    if kind == "pissa" and min(alphas) < 0:
        raise ConfigError(f"{name}: init={init!r} takes roots of singular values over alpha; alpha must be positive")
    if kind == "orthogonal" and any(rank % 2 for rank in ranks):
        raise ConfigError(f"{name}: init='orthogonal' needs even ranks, not {next(r for r in ranks if r % 2)}")
    allowed = OPTIONS.get(kind, {})
    for key, value in options.items():
        if key not in allowed:
            hint = nearest(key, allowed) if allowed else f"init={init!r} has none"
            raise ConfigError(f"{name}: init_options: {key!r} is no setting of this start; {hint}")
        low, high = {"rho": (1, None), "tau": (0, 1), "batches": (1, None)}.get(key, (1e-9, None))
        number = isinstance(value, int | float) and math.isfinite(value) and (key != "batches" or value % 1 == 0)
        if not number or value < low or (high is not None and value > high):
            raise ConfigError(f"{name}: init_options: {key} = {value!r} is out of range")


def kind_of(init: str) -> str:
    """The start without its number of iterations."""
    kind, middle, count = init.partition("_niter_")
    return kind if kind == "pissa" and middle and count.isdigit() else "" if middle else init


def from_base(delta: Any, init: str) -> None:
    """Let a delta begin from the weight of its own linear.

    Raises:
        SiteError: its rank is higher than that of the weight.
    """
    make = partial(from_weight, init, scale=delta.scale)
    delta.begin(weight_OI(delta.site.module).detach().float(), make, take_off=kind_of(init) in TAKEN_OFF)


def from_weight(init: str, weight_OI: Tensor, rank: int, scale: float) -> Pair:
    """The pair of a start that needs nothing but the weight (fp32).

    Raises:
        ConfigError: the rank is higher than that of the weight.
    """
    kind = kind_of(init)
    if kind == "orthogonal":
        return orthogonal(weight_OI, rank)
    if kind == "olora":
        return olora(weight_OI, rank)
    count = init.partition("_niter_")[2]
    return pissa(weight_OI, rank, scale, int(count) if count else None)


def pissa(weight_OI: Tensor, rank: int, scale: float, iterations: int | None = None) -> Pair:
    """A0 (R, I) and B0 (O, R) whose product, times `scale`, is the best approximation of the weight of that rank.

    Args:
        scale: s, alpha / rank.
        iterations: None for the exact decomposition, else power iterations of a randomised one.

    Raises:
        ConfigError: the rank is higher than that of the weight.
    """
    _fits(weight_OI, rank, "singular values")
    if iterations is None:
        U_OK, S_K, Vh_KI = torch.linalg.svd(weight_OI, full_matrices=False)
    else:
        U_OK, S_K, V_IK = torch.svd_lowrank(weight_OI, rank, niter=iterations)
        Vh_KI = V_IK.T
    root_R = (S_K[:rank] / scale).sqrt()
    return root_R[:, None] * Vh_KI[:rank], U_OK[:, :rank] * root_R


def olora(weight_OI: Tensor, rank: int) -> Pair:
    """The first rows of R and columns of Q of the weight's QR decomposition.

    Raises:
        ConfigError: the rank is higher than that of the weight.
    """
    _fits(weight_OI, rank, "rows of R")
    Q_OK, R_KI = torch.linalg.qr(weight_OI)
    return R_KI[:rank].clone(), Q_OK[:, :rank].clone()


def orthogonal(weight_OI: Tensor, rank: int) -> Pair:
    """Random A and B (fp32), neither of them zero, whose product is; of the weight only the shape counts."""
    out_features, in_features = weight_OI.shape
    like: dict[str, Any] = {"device": weight_OI.device, "dtype": torch.float32}
    Q_RR = torch.linalg.qr(torch.randn(rank, rank, **like))[0]
    A_RI = (torch.randn(in_features, rank // 2, **like) @ Q_RR[0::2]).T / 10
    B_OR = torch.randn(rank // 2, out_features, **like).T @ Q_RR[1::2] / 10
    return A_RI.contiguous(), B_OR.contiguous()


def lora_ga(gradient_OI: Tensor, rank: int, gamma: float = 16.0, *, as_peft: bool = False) -> Pair:
    """A0 and B0 along the first 2 R singular directions of a weight's gradient: A0 the first half, B0 the second.

    Args:
        as_peft: B0 times its singular values too, and A0 unscaled.

    Raises:
        ConfigError: the gradient has fewer than 2 R directions.
    """
    _fits(gradient_OI, 2 * rank, "singular directions")
    U_OK, S_K, Vh_KI = leading(gradient_OI, 2 * rank)
    factor = gradient_OI.shape[0] ** 0.25 / gamma**0.5
    A_RI, B_OR = Vh_KI[:rank], factor * U_OK[:, rank:]
    return (A_RI, B_OR * S_K[rank:]) if as_peft else (factor * A_RI, B_OR)


# ------------------------------------------------------------------------------------------------- an adapter


def start(method: Any, model: Any, adapter: Any, batches: Sequence[dict[str, Any]]) -> None:
    """Let the deltas of an adapter that wait for data take their pairs from it; see `LoRA.start`."""
    waiting = _waiting(adapter)
    if not waiting:
        return
    if not batches:
        raise ConfigError(f"{type(method).__name__}: init={method.init!r} starts from data and got no batches")
    options = OPTIONS[method.init] | method.init_options
    if method.init == "lora_ga":
        make = partial(lora_ga, gamma=options["gamma"], as_peft=adapter.peft_compat)
        found = gradients(model, {path: delta.site.module for path, delta in waiting.items()}, batches)
        for path, delta in waiting.items():
            delta.begin(found[path], make, take_off=True)
        return
    sites = {path: delta.site for path, delta in waiting.items()}
    ranks = {path: delta.rank for path, delta in waiting.items()}
    for path, A_RI in eva(model, sites, ranks, batches, rho=options["rho"], tau=options["tau"]).items():
        if len(A_RI):
            _turn(method, waiting[path], A_RI)
        else:
            bank_of(model).drop(adapter, path)


def refuse_waiting(method: Any, adapter: Any) -> None:
    """Raise ConfigError if the adapter is to start from data that it has not seen."""
    if _waiting(adapter):
        raise ConfigError(
            f"{type(method).__name__}: init={method.init!r} starts from data and has seen none; train with "
            "GraftTrainer, or call adapter.method.start(model, adapter, batches) first"
        )


def saved_as(method: Any, adapter: Any) -> Any:
    """The plain LoRA that a pair with a start is saved as; see `LoRA.saved_as`."""
    if method.init in RANDOM:
        return method
    plain = dataclasses.replace(method, init="kaiming", init_options={})
    deltas = {site.path: delta for site, delta in adapter.items() if hasattr(delta, "waits")}
    if any(delta.A0 is not None for delta in deltas.values()):
        more = math.sqrt(2) if method.rslora else 2
        return dataclasses.replace(
            plain,
            rank=2 * method.rank,
            alpha=more * method.alpha,
            rank_pattern={key: 2 * rank for key, rank in method.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in method.alpha_pattern.items()},
        )
    if method.init != "eva" or any(delta.waits for delta in deltas.values()):
        return plain
    names = {path: path.replace(".", r"\.") for path in (*deltas, *adapter.dropped)}
    alphas = {path: _alpha(method, path, delta.rank) for path, delta in deltas.items()}
    exclude = method.exclude
    if isinstance(exclude, str) and adapter.dropped:
        exclude = "|".join([f"(?:{exclude})", *(names[path] for path in adapter.dropped)])
    return dataclasses.replace(
        plain,
        exclude=exclude if isinstance(exclude, str) else (*exclude, *adapter.dropped),
        rank_pattern={names[path]: delta.rank for path, delta in deltas.items() if delta.rank != method.rank},
        alpha_pattern={names[path]: alpha for path, alpha in alphas.items() if alpha != method.alpha},
    )


def _alpha(method: Any, path: str, rank: int) -> float:
    """A site's alpha at another rank than the one it was given for: alpha / rank stays."""
    given = vocabulary.pattern_value(method.rank_pattern, path, method.rank)
    return vocabulary.pattern_value(method.alpha_pattern, path, method.alpha) * rank / given


@torch.no_grad()
def _turn(method: Any, delta: Any, A_RI: Tensor) -> None:
    """Start from these rows of A, for each part of a fused linear, and a zero B; rank and scale follow."""
    rank = delta.rank = len(A_RI)
    delta.scale = _alpha(method, delta.site.path, rank) / (math.sqrt(rank) if method.rslora else rank)
    delta.A.data = A_RI.to(delta.A).repeat(max(1, len(delta.rows)), 1)
    delta.B.data = delta.B.new_zeros(len(delta.B), rank)
    delta.waits = False


def _waiting(adapter: Any) -> dict[str, Any]:
    return {site.path: delta for site, delta in adapter.items() if getattr(delta, "waits", False)}


def _fits(matrix_OI: Tensor, count: int, what: str) -> None:
    if count > min(matrix_OI.shape):
        raise ConfigError(f"a {tuple(matrix_OI.shape)} matrix has {min(matrix_OI.shape)} {what}, {count} are needed")
