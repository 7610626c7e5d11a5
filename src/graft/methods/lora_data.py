"""What LoRA's starts from data look at: the gradients of the base's weights, and the inputs of its linears.

The base runs alone and in eval mode, its weights stay frozen, and nothing of the model is left changed.

Shape legend: B rows, T tokens, N rows of inputs, I in, O out, R rank, K components.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graft import roles
from graft.adapt import route
from graft.errors import ConfigError, SiteError
from graft.roles import Site

log = logging.getLogger("graft")

EXACT = 512
"""The smaller side of a matrix up to which all singular vectors are computed."""


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first `count` singular triplets U, S, V^T: exact for a small matrix, else from a seeded randomised SVD."""
    if min(matrix.shape) <= max(EXACT, 4 * count):
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        devices = [matrix.device] if matrix.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=4 * count, niter=4)
        Vh = V.T
    return U[:, :count], S[:count], Vh[:count]


def gradients(model: Any, modules: Mapping[str, nn.Module], batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The mean gradient (O, I) in fp32 of each linear's weight over the batches, on the base alone, in eval mode.

    The weights stay frozen, and may be quantized: the products are taken from inputs and the outputs' gradients.

    Raises:
        ConfigError: a batch without a loss.
        SiteError: no gradient, or one that is not finite, reaches a linear.
    """
    sums: dict[str, Tensor] = {}

    def hook_of(path: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x_NI = args[0].detach().flatten(0, -2)
            y = output if output.requires_grad else output.detach().requires_grad_()

            def add(grad: Tensor) -> None:
                product_OI = grad.flatten(0, -2).float().T @ x_NI.float()
                sums[path] = sums[path] + product_OI if path in sums else product_OI

            y.register_hook(add)
            return y

        return hook

    with _base_alone(model), torch.enable_grad(), _hooked({modules[path]: hook_of(path) for path in modules}):
        for batch in batches:
            loss = getattr(model(**_on(model, batch)), "loss", None)
            if loss is None:
                raise ConfigError("LoRA: init='lora_ga' needs batches with labels, and the model gave no loss")
            if loss.requires_grad:
                loss.backward()
    for path in modules:
        if path not in sums or not bool(sums[path].any()):
            raise SiteError(f"{path}: no gradient reaches it in {len(batches)} batches, so LoRA-GA cannot start there")
        if not bool(sums[path].isfinite().all()):
            raise SiteError(f"{path}: its gradient is not finite, so LoRA-GA cannot start there; load the base in fp32")
    return {path: sums[path] / len(batches) for path in modules}


class Components:
    """The first principal components of rows that come in pieces (Ross et al. 2008), with the mean taken off.

    Attributes:
        vectors_KI: orthonormal, the largest value of each positive.
        values_K: their singular values.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self.spread = torch.zeros(())
        self.mean_I = self.values_K = self.vectors_KI = torch.zeros(0)

    def add(self, x_NI: Tensor) -> None:
        """Take more rows into account; none change nothing."""
        size = len(x_NI)
        if not size:
            return
        mean_I = x_NI.mean(0)
        rows = x_NI - mean_I
        spread = rows.square().sum()
        if self.seen:
            apart_I = self.mean_I - mean_I
            weight = self.seen * size / (self.seen + size)
            spread = spread + self.spread + weight * apart_I.square().sum()
            mean_I = mean_I + self.seen / (self.seen + size) * apart_I
            rows = torch.cat([self.values_K[:, None] * self.vectors_KI, rows, weight**0.5 * apart_I[None]])
        self.seen, self.spread, self.mean_I = self.seen + size, spread, mean_I
        _, self.values_K, vectors_KI = leading(rows, self.count)
        largest_K1 = vectors_KI.abs().argmax(1, keepdim=True)
        self.vectors_KI = vectors_KI * vectors_KI.gather(1, largest_K1).sign()

    @property
    def ratios_K(self) -> Tensor:
        """Each component's share of the variance."""
        return self.values_K.square() / self.spread.clamp(min=torch.finfo(torch.float32).tiny)

    def same(self, before_KI: Tensor, count: int, tau: float) -> bool:
        """Whether the first `count` vectors are those of before, to a cosine of `tau`."""
        if not len(before_KI) or len(before_KI) < count:
            return False
        return bool(((self.vectors_KI[:count] * before_KI[:count]).sum(1).abs() >= tau).all())


@torch.no_grad()
def eva(
    model: Any,
    sites: Mapping[str, Site],
    ranks: Mapping[str, int],
    batches: Sequence[dict[str, Any]],
    *,
    rho: float = 2.0,
    tau: float = 0.99,
) -> dict[str, Tensor]:
    """The directions (R, I) in which each site's inputs vary most, with ranks shared out by explained variance.

    Args:
        ranks: r of each site; their sum is shared out.
        batches: looked at until all directions that are needed keep to a cosine of `tau`.
        rho: no site gets more than rho times its r.

    Returns:
        For each path its directions; none, (0, I), where a site gets no share.

    Raises:
        SiteError: a site that no batch reaches.
    """
    leaders = _same_inputs(model, sites, batches[0])
    most = Counter[str]()
    for path, leader in leaders.items():
        most[leader] = max(most[leader], min(round(rho * ranks[path]), sites[path].in_features))
    found = {path: Components(count) for path, count in most.items()}
    both = roles.is_encoder_decoder(model)
    shares = dict(ranks)
    settled = False
    for batch in batches:
        before = {path: part.vectors_KI for path, part in found.items()}

        def hook_of(path: str, masks: dict[str, Any] = batch) -> Callable[..., None]:
            return lambda module, args, output: found[path].add(_counted(args[0], _mask(masks, sites[path], both)))

        with _base_alone(model), _hooked({sites[path].module: hook_of(path) for path in found}):
            model(**_on(model, batch))
        ratios = {path: found[leaders[path]].ratios_K for path in sites}
        shares = share_out(ratios, sum(ranks.values()))
        if all(found[leaders[path]].same(before[leaders[path]], shares[path], tau) for path in sites):
            settled = True
            break
    if not settled:
        log.warning("EVA: some directions still moved after %d batches; raise init_options batches", len(batches))
    return {path: found[leaders[path]].vectors_KI[: shares[path]] for path in sites}


def share_out(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """How many of each site's components are among the first `budget` of all, by their share of the variance."""
    owners = [path for path, ratios_K in ratios.items() for _ in ratios_K]
    order = torch.cat([ratios_K.cpu() for ratios_K in ratios.values()]).argsort(descending=True, stable=True)
    counts = Counter(owners[i] for i in order[:budget].tolist())
    return {path: counts[path] for path in ratios}


def _same_inputs(model: Any, sites: Mapping[str, Site], batch: dict[str, Any]) -> dict[str, str]:
    """For each path the first one that reads the very same tensor right before: queries, keys and values do."""
    leaders: dict[str, str] = {}
    last: list[Any] = [None, ""]

    def hook_of(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args[0] is not last[0]:
                last[:] = args[0], path
            leaders.setdefault(path, last[1])

        return hook

    with _base_alone(model), _hooked({site.module: hook_of(path) for path, site in sites.items()}):
        model(**_on(model, batch))
    missing = [path for path in sites if path not in leaders]
    if missing:
        raise SiteError(f"{missing[0]}: no input reaches it, so EVA cannot start there; exclude it")
    return {path: leaders[path] for path in sites}


def _mask(batch: dict[str, Any], site: Site, both: bool) -> Tensor | None:
    """The positions (B, T) of a site's input that count: real tokens, and of those that are predicted the labelled."""
    given: list[Any] = [batch.get("attention_mask")]
    labels: Any = batch.get("labels")
    if both and site.stack == "decoder" and site.role not in ("cross_attention.key", "cross_attention.value"):
        given = [batch.get("decoder_attention_mask"), None if labels is None else labels != -100]
    elif not both and labels is not None and labels.shape == batch["input_ids"].shape:
        given.append(labels != -100)
    masks = [mask.bool() for mask in given if mask is not None and mask.dim() == 2]
    return torch.stack(masks).all(0) if masks else None


def _counted(x: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The inputs as (N, I) in fp32; a mask of another size (a pooled input has no positions) counts for nothing."""
    x_NI = x.flatten(0, -2).float()
    return x_NI if mask_BT is None or mask_BT.numel() != len(x_NI) else x_NI[mask_BT.flatten().to(x.device)]


def _on(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


@contextlib.contextmanager
def _base_alone(model: Any) -> Iterator[None]:
    """No adapter acts and no dropout; every module is in its own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with route(model, [None]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def _hooked(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
