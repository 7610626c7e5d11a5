"""peft's P_TUNING: one tensor `prompt_embeddings`, what the encoder made, (P, D), in encoder-decoders (2P, D).

A folder does not hold the encoder: what is loaded is a plain prompt that acts the same, and trains on as one.

Shape legend: P pseudo-tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from graft import slot_hooks
from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import Config, Slot, Unheld
from graft.forms.virtual import FIELDS, VirtualForm, length_of, prompt_slot, virtual
from graft.method import Delta, Method
from graft.methods.p_tuning import EncodedDelta, PromptEncoder, PTuning


class PTuningForm(VirtualForm):
    """peft's P_TUNING."""

    kind = "P_TUNING"
    fields = FIELDS | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers"}
    fields |= {"encoder_dropout", "modules_to_save"}
    methods = (PTuning,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        settings: dict[str, Any] = {"length": length_of(config, model), **targets.kept(config, model)}
        encoder = targets.text_of(config.get("encoder_reparameterization_type", "MLP"))
        if encoder not in ("MLP", "LSTM"):
            raise AdapterFileError(f"encoder_reparameterization_type = {encoder!r} is not known; it is MLP or LSTM")
        hidden = config.get("encoder_hidden_size")
        if hidden is not None:
            settings["hidden"] = targets.value_of(config, "encoder_hidden_size", None, int)
        if encoder == "MLP":  # whose layers peft does not ask
            return PTuning(**settings)
        layers = targets.value_of(config, "encoder_num_layers", 2, int)
        dropout = targets.value_of(config, "encoder_dropout", 0.0, int, float) if layers > 1 else 0.0
        return PTuning(encoder="lstm", encoder_layers=layers, dropout=dropout, **settings)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, PTuning) and isinstance(adapter.shared, PromptEncoder)
        if slot_hooks.pooled(model) and not adapter.peft_compat:
            raise Unheld(
                "peft pools at the first virtual token, this prompt was made to pool behind it (peft_compat=True)"
            )
        width = adapter.shared.shape[1]
        return {
            "encoder_reparameterization_type": method.encoder.upper(),
            "encoder_hidden_size": method.width_of(width),
            "encoder_num_layers": method.encoder_layers,
            "encoder_dropout": method.dropout,
        } | virtual(model, config, method.length, width)

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        shared, method = adapter.shared, adapter.method
        assert isinstance(method, PTuning) and isinstance(shared, PromptEncoder)
        slot = prompt_slot(model, config, method.length, shared.expanded, shared.table)
        return super().slots(model, adapter, config) | {"prompt_embeddings": slot}

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, EncodedDelta), type(delta)
        return {}
