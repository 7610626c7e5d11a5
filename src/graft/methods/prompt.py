"""Prompt tuning: P trained rows of embeddings in front of the input (Lester et al. 2021, arXiv 2104.08691).

    model input = [Pm; E(x)],   Pm (P, D)

The slots are tokens in the data (`graft.prepare`), so lengths, positions, masks and labels are the data's own. In
encoder-decoders they stand in the encoder's input. We differ from peft in three points: "random" is U(-0.5, 0.5) as in
the paper (peft: N(0, 1)), encoder-decoders hold P rows (peft: 2P, of which it uses P), and a pooler reads the first
real token (peft: the first slot). `peft_compat=True` gives peft's form of all three.

Shape legend: P virtual tokens, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.method import Build, InputDelta, Method, parameter
from graft.roles import Site

INITS = ("random", "vocab", "text", "labels")
FREQUENT = 5000
"""The paper samples rows among the first tokens of the vocabulary, which are the most frequent ones."""


@dataclass(frozen=True, kw_only=True)
class PromptTuning(Method):
    """Soft prompt in front of the input (Lester et al. 2021, arXiv 2104.08691); rows (P, D).

    Args:
        length: P, the number of virtual tokens; the count is P * D.
        init: "random", "vocab" (rows of frequent tokens), "text" (embeds `text`, repeated or cut to P), or "labels"
            (the mean embedding of each of `labels`, the rest from the vocabulary).
        text: the text for `init="text"`.
        labels: the label words for `init="labels"`.
        tokenizer: the model's tokenizer, for the last two.

    Raises:
        ConfigError: an unknown init, or one without what it needs.
    """

    length: int = 20
    init: str = "random"
    text: str | None = None
    labels: tuple[str, ...] | None = None
    tokenizer: Any = field(default=None, compare=False, repr=False, metadata={"json": False})

    name: ClassVar[str] = "prompt_tuning"
    place: ClassVar[str] = "input"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    paper: ClassVar[str] = "Lester et al. 2021, arXiv 2104.08691"
    trains: ClassVar[str] = "P D"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 1:
            raise ConfigError(f"PromptTuning: length must be at least 1, not {self.length}")
        if self.init not in INITS:
            raise ConfigError(f"PromptTuning: init is one of {', '.join(INITS)}, not {self.init!r}")
        needed = {"text": self.text, "labels": self.labels}.get(self.init, True)
        if not needed:
            raise ConfigError(f"PromptTuning: init={self.init!r} needs {self.init}=...")
        for given in ("text", "labels"):
            if getattr(self, given) is not None and self.init != given:
                raise ConfigError(f"PromptTuning: {given} is only read with init={given!r}, not {self.init!r}")
        if self.layers is not None:
            raise ConfigError("PromptTuning: layers has no meaning, the prompt stands at the input")

    def sites(self, build: Build) -> list[Site]:
        return [input_embedding(build.model)]

    def delta(self, site: Site, build: Build) -> InputDelta:
        rows_PD = self._rows(site, build.peft_compat)
        doubled = build.peft_compat and roles.is_encoder_decoder(build.model)
        delta = PromptDelta(self.length, torch.cat([rows_PD, rows_PD]) if doubled else rows_PD)
        delta.pools_after_slots = not build.peft_compat
        return delta

    def _rows(self, site: Site, peft_compat: bool) -> Tensor:
        weight_VD: Tensor = site.module.weight.detach()  # type: ignore[operator]
        if self.init == "random":
            rows_PD = parameter(self.length, weight_VD.shape[1], like=weight_VD).detach()
            return rows_PD.normal_() if peft_compat else rows_PD.uniform_(-0.5, 0.5)
        count = min(FREQUENT, weight_VD.shape[0])
        sampled = torch.randperm(count)[: self.length] if count >= self.length else torch.randint(count, (self.length,))
        if self.init == "vocab":
            return weight_VD[sampled.to(weight_VD.device)].float().clone()
        if self.init == "text":
            ids = text_ids(self)
            return weight_VD[torch.tensor(ids, device=weight_VD.device)].float().clone()
        if self.tokenizer is None:
            raise ConfigError("PromptTuning: init='labels' needs tokenizer=..., the model's tokenizer")
        rows_PD = weight_VD[sampled.to(weight_VD.device)].float().clone()
        if len(self.labels or ()) > self.length:
            raise ConfigError(f"PromptTuning: {len(self.labels or ())} labels do not fit into length={self.length}")
        for i, label in enumerate(self.labels or ()):
            ids = self.tokenizer(label, add_special_tokens=False)["input_ids"]
            rows_PD[i] = weight_VD[torch.tensor(ids, device=weight_VD.device)].float().mean(0)
        return rows_PD


class PromptDelta(InputDelta):
    """The prompt (P, D); peft's encoder-decoder form has 2P rows, of which the first P act."""

    def __init__(self, length: int, rows_PD: Tensor) -> None:
        super().__init__()
        self.slots = length
        self.prompt = nn.Parameter(rows_PD)

    @property
    def length(self) -> int:
        return self.slots

    def rows_PD(self) -> Tensor:
        return self.prompt[: self.slots]


def text_ids(method: Any) -> list[int]:
    """The token ids of a method's `text`, repeated or cut to its `length`.

    Raises:
        ConfigError: the method has no tokenizer, or the text no tokens.
    """
    name = type(method).__name__
    if method.tokenizer is None:
        raise ConfigError(f"{name}: init='text' needs tokenizer=..., the model's tokenizer")
    ids: list[int] = method.tokenizer(method.text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"{name}: text has no tokens")
    return (ids * (method.length // len(ids) + 1))[: method.length]


def input_embedding(model: nn.Module) -> Site:
    """The token embedding whose output soft prompts overwrite: the encoder's in encoder-decoders.

    Raises:
        SiteError: the model has none, or it derives its decoder's input from the encoder's ids.
    """
    if roles.is_encoder_decoder(model) and type(model).__name__.endswith("ForSequenceClassification"):
        raise SiteError(f"{type(model).__name__} makes its decoder's input of the encoder's ids: no slots can go there")
    found = [site for site in roles.sites(model) if site.role == "embedding"]
    if roles.is_encoder_decoder(model):
        found = [site for site in found if site.stack == "encoder"]
    if not found:
        raise SiteError(f"{type(model).__name__} has no token embedding that takes a soft prompt")
    return found[0]
