"""peft's PROMPT_TUNING: one tensor `prompt_embeddings`, (P, D), in encoder-decoders (2P, D) of which P rows act.

Shape legend: P virtual tokens, D width.
"""

from __future__ import annotations

from torch import nn

from graft import slot_hooks
from graft.adapter import Adapter
from graft.errors import AdapterFileError
from graft.forms import targets
from graft.forms.base import Config, Slot, Unheld
from graft.forms.virtual import FIELDS, VirtualForm, length_of, prompt_slot, virtual
from graft.method import Delta, Method
from graft.methods.prompt import PromptDelta, PromptTuning


class PromptForm(VirtualForm):
    """peft's PROMPT_TUNING."""

    kind = "PROMPT_TUNING"
    fields = FIELDS | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"}
    fields |= {"modules_to_save"}
    methods = (PromptTuning,)

    def read(self, config: Config, model: nn.Module | None) -> Method:
        length, kept = length_of(config, model), targets.kept(config, model)
        init = targets.text_of(config.get("prompt_tuning_init", "RANDOM"))
        if init not in ("RANDOM", "SAMPLE_VOCAB", "TEXT"):
            raise AdapterFileError(f"prompt_tuning_init = {init!r} is not known; it is RANDOM, SAMPLE_VOCAB or TEXT")
        if model is not None or init == "RANDOM":
            return PromptTuning(length=length, **kept)
        if init == "SAMPLE_VOCAB":
            return PromptTuning(length=length, init="vocab", **kept)
        if config.get("tokenizer_kwargs"):
            raise AdapterFileError("tokenizer_kwargs is not supported; give PromptTuning the tokenizer itself")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(config["tokenizer_name_or_path"])
        text = config["prompt_tuning_init_text"]
        return PromptTuning(length=length, init="text", text=text, tokenizer=tokenizer, **kept)

    def write(self, model: nn.Module, adapter: Adapter, method: Method, config: Config) -> Config:
        assert isinstance(method, PromptTuning)
        if slot_hooks.pooled(model) and not adapter.peft_compat:
            raise Unheld(
                "peft pools at the first virtual token, this prompt was made to pool behind it (peft_compat=True)"
            )
        width = next(delta.prompt.shape[1] for _, delta in adapter.items() if isinstance(delta, PromptDelta))
        return {"prompt_tuning_init": "RANDOM"} | virtual(model, config, method.length, width)

    def slots(self, model: nn.Module, adapter: Adapter, config: Config) -> dict[str, Slot]:
        delta = next(delta for _, delta in adapter.items() if isinstance(delta, PromptDelta))
        slot = prompt_slot(model, config, delta.length, lambda: delta.prompt, delta.prompt)
        return super().slots(model, adapter, config) | {"prompt_embeddings": slot}

    def of_delta(self, delta: Delta) -> dict[str, Slot]:
        assert isinstance(delta, PromptDelta), type(delta)
        return {}
