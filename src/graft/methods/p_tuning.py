"""P-tuning: pseudo-tokens anywhere in the input, made by a small encoder while training (Liu et al. 2021).

    h = encoder(e),   e (P, D), h (P, D),   E[b, pos(b, i)] = h_i

(arXiv 2103.10385.) All P are encoded as one sequence in order; after training only h is left. The encoder is
Linear(D, H), ReLU, Linear(H, H), ReLU, Linear(H, D), or a bidirectional LSTM of width H with Linear(2H, 2H), ReLU,
Linear(2H, D); with H = D / 2 that is the paper's own. In encoder-decoders they stand in the encoder's input. We differ
from peft in three points: encoder-decoders hold P rows (peft: 2P, of which it uses P), a pooler reads the first real
token (peft: the first pseudo-token), and dropout is drawn once for a batch, not for each row. `peft_compat=True` gives
peft's form of the first two.

Shape legend: P pseudo-tokens (2P rows where peft has them), D width, H the encoder's width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from graft import roles
from graft.errors import ConfigError
from graft.fast.devices import autocast
from graft.method import Build, Expanded, InputDelta, Method
from graft.methods.prompt import input_embedding
from graft.roles import Site

ENCODERS = ("mlp", "lstm")


@dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Pseudo-tokens from a trained encoder (Liu et al. 2021, arXiv 2103.10385); the result is (P, D).

    Args:
        length: P, the number of pseudo-tokens, in front of the input or where the batch has `graft.SLOT`.
        encoder: "mlp" (P D + D H + H + H^2 + H + H D + D values train), or "lstm" (the paper's).
        hidden: H; None is D for "mlp" and D / 2 for "lstm", the paper's.
        encoder_layers: layers of the LSTM.
        dropout: between layers of the LSTM, while training.

    Raises:
        ConfigError: an unknown encoder or a value out of range.
    """

    length: int = 20
    encoder: str = "mlp"
    hidden: int | None = None
    encoder_layers: int = 2
    dropout: float = 0.0

    name: ClassVar[str] = "p_tuning"
    place: ClassVar[str] = "input"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "P_TUNING"
    paper: ClassVar[str] = "Liu et al. 2021, arXiv 2103.10385"
    trains: ClassVar[str] = "P D + 2 D H' + H'^2 + 2 H' + D; P D are saved"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder not in ENCODERS:
            raise ConfigError(f"PTuning: encoder is one of {', '.join(ENCODERS)}, not {self.encoder!r}")
        for name in ("length", "encoder_layers", "hidden"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"PTuning: {name} must be at least 1, not {value}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"PTuning: dropout must be in [0, 1), not {self.dropout}")
        if self.dropout and (self.encoder == "mlp" or self.encoder_layers < 2):
            raise ConfigError("PTuning: dropout acts between layers of the LSTM; take encoder='lstm' with two or more")
        if self.encoder == "mlp" and self.encoder_layers != 2:
            raise ConfigError("PTuning: encoder_layers are the LSTM's; an MLP has three linears, leave it out")
        if self.layers is not None:
            raise ConfigError("PTuning: layers has no meaning, the pseudo-tokens stand at the input")

    def width_of(self, width: int) -> int:
        """H on a model of that width."""
        return self.hidden or (width if self.encoder == "mlp" else max(width // 2, 1))

    def sites(self, build: Build) -> list[Site]:
        return [input_embedding(build.model)]

    def shared(self, sites: list[Site], build: Build) -> nn.Module:
        doubled = build.peft_compat and roles.is_encoder_decoder(build.model)
        return PromptEncoder(self, self.length * (2 if doubled else 1), sites[0].module.weight)  # type: ignore[arg-type]

    def delta(self, site: Site, build: Build) -> InputDelta:
        delta = EncodedDelta(self.length)
        delta.pools_after_slots = not build.peft_compat
        return delta

    def finish(self, shared: nn.Module | None) -> None:
        assert isinstance(shared, PromptEncoder)
        shared.drop()


class PromptEncoder(Expanded):
    """The embedding e (P, D) and the network that makes h of it; after `drop` the table h alone."""

    def __init__(self, method: PTuning, rows: int, like_VD: Tensor) -> None:
        super().__init__()
        width = like_VD.shape[1]
        self.shape = (rows, width)
        options: dict[str, Any] = {"device": like_VD.device, "dtype": torch.float32}
        self.table: nn.Parameter | None = None
        self.embedding: nn.Embedding | None = nn.Embedding(rows, width, **options)
        self.lstm: nn.LSTM | None = None
        hidden = method.width_of(width)
        if method.encoder == "lstm":
            self.lstm = nn.LSTM(
                width, hidden, method.encoder_layers, dropout=method.dropout, bidirectional=True, **options
            )
            widths = [2 * hidden, 2 * hidden, width]
        else:
            widths = [width, hidden, hidden, width]
        linears: list[nn.Module] = []
        for inner, outer in itertools.pairwise(widths):
            linears += [nn.Linear(inner, outer, **options), nn.ReLU()]
        self.mlp: nn.Sequential | None = nn.Sequential(*linears[:-1])

    @property
    def saved_numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def rows(self) -> Tensor:
        """The (P, D) rows of this forward: the LSTM's dropout acts while training."""
        if self.table is not None:
            return self.table
        assert self.embedding is not None and self.mlp is not None
        e_PD = self.embedding.weight
        # In fp32 whatever the autocast; cuDNN's LSTM has no backward in eval mode, and P steps need no cuDNN.
        with autocast(e_PD.device, None), torch.backends.cudnn.flags(enabled=False):
            return self.mlp(e_PD if self.lstm is None else self.lstm(e_PD)[0])

    def expanded(self) -> Tensor:
        """h (P, D) without dropout."""
        training = self.training
        self.eval()
        try:
            return self.rows()
        finally:
            self.train(training)

    def drop(self) -> None:
        """Keep h and forget the encoder."""
        if self.embedding is None:
            return
        trains = self.embedding.weight.requires_grad
        self.table = nn.Parameter(self.expanded().detach().clone(), requires_grad=trains)
        self.embedding = self.lstm = self.mlp = None


class EncodedDelta(InputDelta):
    """Pseudo-tokens whose rows live in the encoder; of peft's 2P in encoder-decoders the first P act."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.slots = length

    @property
    def length(self) -> int:
        return self.slots

    def rows_PD(self) -> Tensor:
        assert isinstance(self.shared, PromptEncoder)
        return self.shared.rows()[: self.slots]
