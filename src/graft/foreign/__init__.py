"""Files of other libraries than peft: for each form a reader, and a writer where the form can be exact.

A reader attaches an adapter to a model, a writer writes one of a model's. Converted is what both sides compute alike;
anything else is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable

from graft.adapter import Adapter
from graft.foreign import adapter_hub, llama_adapter, long_lora, loralib

READERS: dict[str, Callable[..., Adapter]] = {
    "adapterhub": adapter_hub.read_adapter_hub,
    "loralib": loralib.read_loralib,
    "llama-adapter": llama_adapter.read_llama_adapter,
    "longlora": long_lora.read_long_lora,
}
WRITERS: dict[str, Callable[..., tuple[str, ...]]] = {
    "adapterhub": adapter_hub.write_adapter_hub,
    "loralib": loralib.write_loralib,
    "llama-adapter": llama_adapter.write_llama_adapter,
}
LABELS: dict[str, Callable[..., int | None]] = {"adapterhub": adapter_hub.labels_of, "loralib": loralib.labels_of}
"""Forms that may have a classification head: what gives the number of its outputs."""
OPTIONS = {"loralib": ("alpha", "parts"), "llama-adapter": ("layers",), "longlora": ("rope_factor",)}
"""What a form's files do not hold and its reader asks for."""
