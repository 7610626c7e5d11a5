"""Graft: parameter-efficient fine-tuning of language models, and many adapters on one base.

Names are imported when they are first used, so that `import graft` is quick and needs no torch.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from graft.adapt import attach, detach, prepare, route, use
    from graft.adapter import Adapter
    from graft.base import load_base
    from graft.combining import combine
    from graft.description import describe
    from graft.errors import (
        AdapterFileError,
        BusyError,
        ConfigError,
        DataError,
        GraftError,
        MergeError,
        RouteError,
        SiteError,
        TrainingError,
    )
    from graft.fast.loss import labelled_loss, token_logprobs
    from graft.files import load, save
    from graft.ids import SLOT
    from graft.merging import merge, unmerge
    from graft.methods.adalora import AdaLoRA
    from graft.methods.bitfit import BitFit
    from graft.methods.bottleneck import Bottleneck
    from graft.methods.compose import Compose
    from graft.methods.dora import DoRA
    from graft.methods.full import FullFineTuning
    from graft.methods.glora import GLoRA
    from graft.methods.glora_search import extract_glora, search_glora
    from graft.methods.head import Head
    from graft.methods.ia3 import IA3
    from graft.methods.intrinsic import IntrinsicDimension
    from graft.methods.llama_adapter import LlamaAdapter
    from graft.methods.long_lora import LongLoRA
    from graft.methods.lora import LoRA
    from graft.methods.lora_fa import LoRAFA
    from graft.methods.mam import MAM
    from graft.methods.multi_lora import MultiLoRA
    from graft.methods.norm_tuning import NormTuning
    from graft.methods.p_tuning import PTuning
    from graft.methods.p_tuning_v2 import PTuningV2
    from graft.methods.prefix import PrefixTuning
    from graft.methods.prompt import PromptTuning
    from graft.methods.qlora import QLoRA
    from graft.methods.tied_lora import TiedLoRA
    from graft.methods.top_layers import TopLayers
    from graft.methods.trainable_tokens import TrainableTokens
    from graft.methods.unipelt import UniPELT
    from graft.methods.vera import VeRA
    from graft.train.trainer import GraftTrainer

__version__ = "0.1.0"

_HOMES = {
    "Adapter": "adapter",
    "AdapterFileError": "errors",
    "BusyError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "GraftError": "errors",
    "GraftTrainer": "train.trainer",
    "MergeError": "errors",
    "RouteError": "errors",
    "SLOT": "ids",
    "SiteError": "errors",
    "TrainingError": "errors",
    "attach": "adapt",
    "combine": "combining",
    "describe": "description",
    "extract_glora": "methods.glora_search",
    "detach": "adapt",
    "labelled_loss": "fast.loss",
    "load": "files",
    "load_base": "base",
    "merge": "merging",
    "prepare": "adapt",
    "route": "adapt",
    "save": "files",
    "search_glora": "methods.glora_search",
    "token_logprobs": "fast.loss",
    "unmerge": "merging",
    "use": "adapt",
}

__all__ = [
    "AdaLoRA",
    "Adapter",
    "AdapterFileError",
    "BitFit",
    "Bottleneck",
    "BusyError",
    "Compose",
    "ConfigError",
    "DataError",
    "DoRA",
    "FullFineTuning",
    "GLoRA",
    "GraftError",
    "GraftTrainer",
    "Head",
    "IA3",
    "IntrinsicDimension",
    "LlamaAdapter",
    "LoRA",
    "LoRAFA",
    "LongLoRA",
    "MAM",
    "MergeError",
    "MultiLoRA",
    "NormTuning",
    "PTuning",
    "PTuningV2",
    "PrefixTuning",
    "PromptTuning",
    "QLoRA",
    "RouteError",
    "SLOT",
    "SiteError",
    "TiedLoRA",
    "TopLayers",
    "TrainableTokens",
    "TrainingError",
    "UniPELT",
    "VeRA",
    "attach",
    "combine",
    "describe",
    "detach",
    "extract_glora",
    "labelled_loss",
    "load",
    "load_base",
    "merge",
    "prepare",
    "route",
    "save",
    "search_glora",
    "token_logprobs",
    "unmerge",
    "use",
]


def __getattr__(name: str) -> _typing.Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _HOMES:
        if name in ("attach", "load"):
            _importlib.import_module("graft.files")
        return _kept(name, getattr(_importlib.import_module(f"graft.{_HOMES[name]}"), name))
    if name[0].isupper():
        _importlib.import_module("graft.methods")
        registry = _importlib.import_module("graft.method").REGISTRY
        found = next((cls for cls in registry.values() if cls.__name__ == name), None)
        if found is not None:
            return _kept(name, found)
    raise AttributeError(f"module 'graft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _kept(name: str, value: _typing.Any) -> _typing.Any:
    globals()[name] = value
    return value
