"""Intrinsic dimension: all of the base moves, in a random subspace of few dimensions (arXiv 1804.08838, 2012.13255).

    DID:    theta_i = theta_0,i + P_i x,              x (d) starts at 0
    SAID:   theta_i = theta_0,i + lambda_i P_i x,     x (d - m), lambda (m) starts at 1

theta_i are the m tensors of the base: weights (O, I), biases and norms (O), embeddings (V, D), a tied one once. P_i is
Fastfood's projection (`graft.methods.fastfood`), made of the seed and the tensor's name, so that a file holds x and
lambda alone. It is applied anew in every forward and once more in the backward pass, so the memory is that of one
tensor at a time: a linear gives y + x dW^T + db, a norm runs with the weights that it would have.

Two kinds of tables stay as they are, because no row of a batch reaches them: T5's `relative_attention_bias`, and tables
of positions that make their positions themselves (BART, OPT). We follow the papers in that a task head moves in the
same subspace with `head=False`; its random start is then part of the file. With `head=True` it trains whole beside it.

Shape legend: B rows, T tokens, I in, O out, V vocabulary, D width, d coordinates, m tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from graft import roles, vocabulary
from graft.copies import clean_copy
from graft.errors import ConfigError, SiteError
from graft.method import REPLACE, Build, Delta, Method, inside
from graft.methods.fastfood import GENERATOR, Projection
from graft.methods.lora import embed_scale
from graft.roles import Site
from graft.vocabulary import kind_of
from graft.weights import features, is_embedding, is_linear, quantized, transposed

KINDS = ("said", "did")


@dataclass(frozen=True, kw_only=True)
class IntrinsicDimension(Method):
    """All tensors move in a random subspace (Li et al. 2018, arXiv 1804.08838; Aghajanyan et al. 2020, 2012.13255).

    Args:
        size: d, the number of trained values: (d) coordinates, or with SAID (d - m) and (m) scales.
        kind: "said" (a trained scale for each of the m tensors) or "did".
        seed: of the projections.
        generator: the version of what makes projections of a seed; there is one so far.
        values: how many values of the base move, as a file says it; None takes any base.

    Raises:
        ConfigError: a size that leaves no coordinates, or a value out of range.
        SiteError: the model uses a weight otherwise than through a linear, an embedding or a norm, or has not as many
            values as `values` says: every projection depends on its tensor's size.
    """

    size: int = 1000
    kind: str = "said"
    seed: int = 0
    generator: int = GENERATOR
    values: int | None = None

    name: ClassVar[str] = "intrinsic"
    place: ClassVar[str] = "module"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "INTRINSIC"
    paper: ClassVar[str] = "Aghajanyan et al. 2020, arXiv 2012.13255"
    trains: ClassVar[str] = "`size`, in all"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ConfigError(f"IntrinsicDimension: kind is one of {', '.join(KINDS)}, not {self.kind!r}")
        if self.size < 1:
            raise ConfigError(f"IntrinsicDimension: size must be at least 1, not {self.size}")
        if self.seed < 0:
            raise ConfigError(f"IntrinsicDimension: seed must be at least 0, not {self.seed}")
        if self.generator != GENERATOR:
            raise ConfigError(
                f"IntrinsicDimension: generator {self.generator} is not known here, only {GENERATOR}; its projections "
                "would be others"
            )
        if self.layers is not None:
            raise ConfigError("IntrinsicDimension: layers has no meaning, all of the base moves")

    def sites(self, build: Build) -> list[Site]:
        model = build.model
        modules = {path: each for path, each in model.named_modules() if path.split(".")[0] != roles.BANK}
        known = {site.path: site for site in roles.sites(model, unnamed=True)}
        heads = tuple(site.path for site in roles.task_heads(model)) if self.head else ()
        found = []
        for path, module in modules.items():
            own = [name for name, parameter in module._parameters.items() if parameter is not None]
            if not own or inside(path, (*heads, *self.modules_to_save)) or _unreached(path, module, known.get(path)):
                continue
            _check(path, module, own[0], modules)
            found.append(known.get(path) or Site(path, roles.OTHER, vocabulary.layer_of(path, modules), module, 0, 0))
        return [site for site in found if not _idle(site, found)]

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        wanted = {id(parameter) for site in sites for parameter in site.module.parameters(recurse=False)}
        names = {
            id(parameter): name
            for name, parameter in build.model.named_parameters()
            if id(parameter) in wanted and not name.startswith(f"{roles.BANK}.")
        }
        if self.kind == "said" and self.size <= len(names):
            raise ConfigError(
                f"IntrinsicDimension: size={self.size} leaves no coordinates, SAID has a scale for each of the "
                f"{len(names)} tensors; take more, or kind='did'"
            )
        order = {key: number for number, key in enumerate(names)}
        numels: dict[int, int] = {}
        places: dict[str, int] = {}
        for site in sites:
            for name, parameter in site.module.named_parameters(recurse=False):
                places[f"{site.path}.{name}"] = order[id(parameter)]
                numels[order[id(parameter)]] = _numel(site.module, name, parameter)
        values = sum(numels.values())
        if self.values not in (None, values):
            raise SiteError(
                f"IntrinsicDimension: made where {self.values:,} values move, here they are {values:,} (more tokens in "
                "the embedding?), and the projections of other sizes are others; load the base that it was made on"
            )
        like = next(build.model.parameters())
        return Coordinates(self, list(names.values()), numels, places, like.device)

    def delta(self, site: Site, build: Build) -> Delta:
        head = inside(site.path, vocabulary.TASK_HEADS)  # asked first: the other looks at the whole model
        head = head and inside(site.path, tuple(each.path for each in roles.task_heads(build.model)))
        if head and not is_linear(site.module):
            raise SiteError(
                f"IntrinsicDimension: {site.path} of the task head is a {type(site.module).__name__} and no linear; "
                "leave head out, so that the head trains whole"
            )
        if head:
            return HeadDelta(site)
        return NormChange(site) if kind_of(site.module) == "norm" else Change(site)

    def saved_as(self, adapter: Any) -> Method:
        """With the number of values that move on this base."""
        return replace(self, values=sum(each.numel for each in adapter.shared.projections))


class Coordinates(nn.Module):
    """x and lambda, which train, and the projections of all tensors, which the seed makes again."""

    def __init__(
        self, method: IntrinsicDimension, names: list[str], numels: dict[int, int], places: dict[str, int], device: Any
    ) -> None:
        super().__init__()
        scaled = len(names) if method.kind == "said" else 0
        size = method.size - scaled
        self.places = places
        self.vector = nn.Parameter(torch.zeros(size, device=device))
        self.scales = nn.Parameter(torch.ones(scaled, device=device)) if scaled else None
        self.projections = nn.ModuleList(
            Projection(method.seed, name, numels[number], size, device) for number, name in enumerate(names)
        )

    def change(self, name: str) -> Tensor:
        """lambda_i P_i x of the parameter with this name, flat."""
        number = self.places[name]
        change: Tensor = self.projections[number](self.vector)
        return change if self.scales is None else change * self.scales[number]


class Change(Delta):
    """At a linear: y + x dW^T + db; at an embedding: y + dE[x]."""

    everywhere = True
    shared: Coordinates

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.path = site.path
        self.base = [site.module]  # in a list: the base owns it
        self.shapes = {name: _shape(site.module, name, p) for name, p in site.module.named_parameters(recurse=False)}

    def change(self, name: str) -> Tensor | None:
        """How far a parameter of the module has moved, in the parameter's own shape; None if there is no such one."""
        if name not in self.shapes:
            return None
        return self.shared.change(f"{self.path}.{name}").view(self.shapes[name])

    def change_OI(self) -> Tensor:
        """The change of the weight as (out, in)."""
        weight = self.change("weight")
        assert weight is not None
        return weight.T if transposed(self.base[0]) else weight

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        return self.recomputed(self.added, x_BTI, y_BTO)

    def added(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        module = self.base[0]
        if is_embedding(module):
            table = self.change("weight")
            assert table is not None
            rows = F.embedding(x_BTI, table, module.padding_idx) * embed_scale(module)  # type: ignore[arg-type]
            return y_BTO + rows.to(y_BTO.dtype)
        bias = self.change("bias")
        up = F.linear(x_BTI, self.change_OI().to(x_BTI.dtype), None if bias is None else bias.to(x_BTI.dtype))
        return y_BTO + up.to(y_BTO.dtype)

    def recomputed(self, run: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Run, and where gradients are taken keep no weight for the backward pass: it is made again there."""
        if not (torch.is_grad_enabled() and self.shared.vector.requires_grad):
            return run(x, y)
        out: Tensor = checkpoint(run, x, y, use_reentrant=False, preserve_rng_state=False)
        return out

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        bias = self.change("bias")
        return weight_OI + self.change_OI(), bias_O if bias is None or bias_O is None else bias_O + bias


class NormChange(Change):
    """At a norm: it runs again, in fp32, with the weight and bias that it would have."""

    from_base = True  # beside another change, what it differs from the base's norm is added

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.form = [clean_copy(site.module).to("meta")]  # its code alone; the values come from the base

    def added(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        dtype = self.shared.vector.dtype
        moved = {name: p.to(dtype) + self.change(name) for name, p in self.base[0].named_parameters()}  # type: ignore[operator]
        out: Tensor = functional_call(self.form[0], moved, (x_BTI.to(dtype),))
        return out.to(y_BTO.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.change("weight"), self.change("bias")
        assert weight is not None
        return weight_OI + weight, bias_O if bias is None or bias_O is None else bias_O + bias


class HeadDelta(Change):
    """At a linear of a task head: it answers from the random start that the file keeps, and its change."""

    order = REPLACE
    whole = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        for name, parameter in site.module.named_parameters(recurse=False):
            self.register_buffer(name, parameter.detach().float().clone())

    def now(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as they are: start and change."""
        state = dict(self.named_buffers())
        moved = {name: start + self.change(name) for name, start in state.items()}  # type: ignore[operator]
        weight = moved["weight"].T if transposed(self.base[0]) else moved["weight"]
        return weight, moved.get("bias")

    def added(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        weight_OI, bias_O = self.now()
        return F.linear(x_BTI.to(weight_OI.dtype), weight_OI, bias_O).to(y_BTO.dtype)

    def merged(self, weight_OI: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.now()


def _unreached(path: str, module: nn.Module, site: Site | None) -> bool:
    """A table that no row of a batch reaches: positions against positions, or positions that the table makes itself."""
    odd = type(module).forward is not nn.Embedding.forward
    return is_embedding(module) and (
        path.endswith(vocabulary.UNBATCHED) or (site is not None and site.role == "position" and odd)
    )


def _check(path: str, module: nn.Module, name: str, modules: dict[str, nn.Module]) -> None:
    """Refuse a module whose weight is used otherwise than through a linear, an embedding or a norm."""
    what = f"{path}.{name}" if path else name
    if vocabulary.EXPERTS.search(path):
        raise SiteError(f"IntrinsicDimension: {what} belongs to experts, which see some tokens only")
    if kind_of(module) in ("linear", "embedding", "norm"):
        return
    parameters = [p for p in module._parameters.values() if p is not None]
    others = [each for each in modules.values() if each is not module and kind_of(each) != "any"]
    elsewhere = {id(p) for each in others for p in each.parameters(recurse=False)}
    if any(id(p) not in elsewhere for p in parameters):
        kind = type(module).__name__
        raise SiteError(f"IntrinsicDimension: {what} belongs to a {kind}, which is no linear, embedding or norm")


def _idle(site: Site, found: list[Site]) -> bool:
    """A module that only owns what another one uses: T5's `shared` beside its stacks' tables, an LM head's bias."""
    if kind_of(site.module) == "any":
        return True
    weight = getattr(site.module, "weight", None)
    alike = [each for each in found if each is not site and getattr(each.module, "weight", None) is weight]
    return site.role == roles.OTHER and is_embedding(site.module) and any(each.role == "embedding" for each in alike)


def _shape(module: nn.Module, name: str, parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, and not of its packed code."""
    if name == "weight" and quantized(module):
        width, height = features(module)
        return height, width
    return tuple(parameter.shape)


def _numel(module: nn.Module, name: str, parameter: Tensor) -> int:
    return torch.Size(_shape(module, name, parameter)).numel()
