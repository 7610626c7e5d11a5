"""LLaMA-Adapter: trained prompts that the top layers attend to beside the text (Zhang et al. 2023, arXiv 2303.16199).

    out = attention(q, K, V) + g * softmax(q k_p^T * scale) v_p,   k_p = W_k Pr + b_k,   v_p = W_v Pr + b_v

Pr (P, D) is N(0, 1) and g starts at zero. The two softmaxes are apart: a joint one would take mass from the text. W_k
and W_v are the layer's own, frozen, without what other adapters do to them; prompt keys are not rotated, every query
sees them, and they take no positions. q and the scale are the model's own. Where the model norms its keys (Qwen3),
prompt keys go through that norm too: q is normed to meet normed keys. A soft cap of scores (Gemma 2) and T5's position
bias are not applied to prompts. The gate is tanh(g) for each head as in the paper's code; `gate="per_layer",
tanh=False` is peft's. In GPT-2 peft adds the sum behind the output projection; `peft_compat=True` does so too.

Shape legend: B rows, H query heads, K key/value heads, T queries, P prompt rows, d head size, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import attend, roles
from graft.errors import ConfigError, SiteError
from graft.method import AttentionDelta, Build, Delta, Method, parameter
from graft.methods.prefix import HEAD_SIZES
from graft.roles import Site
from graft.weights import transposed

GATES = ("per_head", "per_layer")


@dataclass(frozen=True, kw_only=True)
class LlamaAdapter(Method):
    """Zero-gated prompts in the top layers' self-attention (Zhang et al. 2023, arXiv 2303.16199); rows (P, D).

    Args:
        length: P; the count is P * D for each layer, and the gates.
        layers: n for the top n layers (the decoder's in encoder-decoders), indices, or None for all.
        gate: "per_head" (H gates for each layer) or "per_layer" (one).
        tanh: whether the gate is tanh(g) or g.

    Raises:
        ConfigError: a value out of range.
        SiteError: an encoder, fewer layers than asked, or attention that does not go through transformers' interface.
    """

    length: int = 10
    layers: int | range | tuple[int, ...] | None = 30
    gate: str = "per_head"
    tanh: bool = True

    name: ClassVar[str] = "llama_adapter"
    place: ClassVar[str] = "attention"
    peft_type: ClassVar[str] = "ADAPTION_PROMPT"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2303.16199"
    trains: ClassVar[str] = "P D + H per adapted layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ConfigError(f"LlamaAdapter: length must be at least 1, not {self.length}")
        if self.gate not in GATES:
            raise ConfigError(f"LlamaAdapter: gate is one of {', '.join(GATES)}, not {self.gate!r}")

    def sites(self, build: Build) -> list[Site]:
        model = build.model
        both = roles.is_encoder_decoder(model)
        if not both and not roles.is_decoder(model):
            raise SiteError(
                f"LlamaAdapter: {type(model).__name__} is an encoder, and the method is one for a decoder's "
                "self-attention; take PrefixTuning"
            )
        depth = len(roles.blocks(model).get("decoder", ()))
        if isinstance(self.layers, int) and not 1 <= self.layers <= depth:
            raise SiteError(
                f"LlamaAdapter: layers={self.layers}, but {type(model).__name__} has {depth} layers; give 1 to {depth}"
            )
        found = [site for site in roles.select(model, ("attention",)) if site.role == "attention"]
        found = [site for site in found if not both or site.stack == "decoder"]
        if self.layers is not None:
            top = range(depth - self.layers, depth) if isinstance(self.layers, int) else self.layers
            missing = [layer for layer in top if not 0 <= layer < depth]
            if missing:
                raise SiteError(
                    f"LlamaAdapter: no layer {missing[0]} in {type(model).__name__}, it has 0 to {depth - 1}"
                )
            found = [site for site in found if site.layer in top]
        if not found:
            raise SiteError(f"LlamaAdapter: none of the layers {self.layers} of {type(model).__name__} has attention")
        for site in found:
            attend.check(model, site)
        return found

    def delta(self, site: Site, build: Build) -> Delta:
        base = Projections(site, build)
        if build.peft_compat and base.fused is not None and transposed(base.fused):
            return UnprojectedDelta(self, base)
        return LlamaAdapterDelta(self, base)


class Projections:
    """The frozen projections of one attention module; they are read around all hooks, so no adapter acts in them."""

    def __init__(self, site: Site, build: Build) -> None:
        inner = [other for other in roles.sites(build.model) if other.path.startswith(f"{site.path}.")]
        found = {other.role.rpartition(".")[2]: other for other in inner if other.role.startswith("attention.")}
        self.fused = found["qkv"].module if "qkv" in found else None
        self.modules: dict[str, nn.Module] = {}
        self.rows: dict[str, Tensor | None] = {}
        widths: dict[str, int] = {}
        for part in ("query", "key", "value"):
            own = found.get(part) or found.get("qkv")
            if own is None:
                raise SiteError(f"{site.path}: it has no {part} projection; LlamaAdapter cannot act there")
            rows = roles.part_rows(own, part, build.model.config) if part not in found else None
            self.modules[part], self.rows[part] = own.module, rows
            widths[part] = own.out_features if rows is None else len(rows)
            self.width = own.in_features
        self.size = next((getattr(site.module, name) for name in HEAD_SIZES if hasattr(site.module, name)), 0)
        if not self.size or widths["key"] != widths["value"]:
            raise SiteError(f"{site.path}: cannot tell its key/value heads; LlamaAdapter cannot act there")
        self.heads = widths["query"] // self.size
        norm = next((other.module for other in inner if other.role == "norm.key"), None)
        self.key_norm = None if build.peft_compat else norm

    @property
    def like(self) -> Tensor:
        """A tensor on the module's device."""
        return next(self.modules["key"].parameters())

    def part(self, part: str, x_PD: Tensor) -> Tensor:
        """One part of x_PD (..., D) as (..., heads, d)."""
        # `forward` and not the call: hooks are what adapters act through.
        y = self.modules[part].forward(x_PD)
        rows = self.rows[part]
        y = y if rows is None else y.index_select(-1, rows.to(y.device))
        return y.unflatten(-1, (-1, self.size))

    def keys(self, prompt_PD: Tensor) -> Tensor:
        """The keys of the prompt (P, K, d), normed where the model norms keys."""
        key_PKd = self.part("key", prompt_PD)
        if self.key_norm is None:
            return key_PKd
        if next(self.key_norm.parameters()).shape[-1] == self.size:
            return self.key_norm.forward(key_PKd)
        return self.key_norm.forward(key_PKd.flatten(-2)).unflatten(-1, (-1, self.size))


class PromptedDelta(Delta):
    """The prompt (P, D) and the gate (H) or (1) of one layer."""

    def __init__(self, method: LlamaAdapter, base: Projections) -> None:
        super().__init__()
        self.base = base
        self.tanh = method.tanh
        self.prompt = parameter(method.length, base.width, like=base.like)
        self.gate = parameter(base.heads if method.gate == "per_head" else 1, like=base.like)
        nn.init.normal_(self.prompt)

    def read(self, query_BHTd: Tensor, scale: float | None) -> Tensor:
        """What the queries read from the prompt, gated: (B, T, H, d)."""
        prompt_PD = self.prompt.to(query_BHTd.dtype)
        key_PKd, value_PKd = self.base.keys(prompt_PD), self.base.part("value", prompt_PD)
        groups = self.base.heads // value_PKd.shape[1]
        key_HPd, value_HPd = (rows.transpose(0, 1).repeat_interleave(groups, 0) for rows in (key_PKd, value_PKd))
        scores_BHTP = query_BHTd @ key_HPd.transpose(-1, -2) * (self.base.size**-0.5 if scale is None else scale)
        share_BHTP = scores_BHTP.to(torch.promote_types(scores_BHTP.dtype, torch.float32)).softmax(-1)
        gate_H11 = (self.gate.tanh() if self.tanh else self.gate)[:, None, None]
        return ((gate_H11 * share_BHTP).to(value_HPd.dtype) @ value_HPd).transpose(-3, -2)


class LlamaAdapterDelta(PromptedDelta, AttentionDelta):
    """The method itself: the sum joins the heads before the output projection."""

    def attend(self, call: Any, base: Any) -> tuple[Tensor, Tensor | None]:
        out_BTHd, weights = base(call)
        extra_BTHd = self.read(call.query_BHTD, call.options.get("scaling"))
        return out_BTHd + extra_BTHd.to(out_BTHd.dtype), weights


class UnprojectedDelta(PromptedDelta):
    """peft's form of GPT-2: the sum is added to the module's output, behind the output projection."""

    def after(self, x_BTI: Tensor, y_BTO: Tensor) -> Tensor:
        query_BHTd = self.base.part("query", x_BTI).transpose(-3, -2)
        return y_BTO + self.read(query_BHTd, None).flatten(-2).to(y_BTO.dtype)
