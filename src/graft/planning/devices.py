"""How much memory a device has."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import torch

from graft import base
from graft.errors import ConfigError
from graft.method import nearest

GIB = 2**30
GPUS: dict[str, float] = {
    "gtx1080ti": 11,
    "rtx2080ti": 11,
    "rtx3060": 12,
    "rtx3080": 10,
    "rtx3090": 24,
    "rtx4060": 8,
    "rtx4070": 12,
    "rtx4080": 16,
    "rtx4090": 24,
    "rtx5080": 16,
    "rtx5090": 32,
    "t4": 16,
    "p100": 16,
    "v100-16": 16,
    "v100-32": 32,
    "a10": 24,
    "l4": 24,
    "a30": 24,
    "a40": 48,
    "a6000": 48,
    "l40s": 48,
    "a100-40": 40,
    "a100-80": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "mi250": 64,
    "mi300x": 192,
}
"""Memory as it is sold, in GiB; of a two-part card that of one part."""
USABLE = 0.94
"""Of what is sold: error correction and the driver take the rest."""
CONTEXT = 600 * 2**20
"""What CUDA, its libraries and the allocator's rounding take beside tensors; not measured here."""


EMULATES_BF16 = ("gtx1080ti", "rtx2080ti", "t4", "p100", "v100-16", "v100-32")
"""GPUs that have no instructions for bf16: a base loads in fp32 there."""


class Device(NamedTuple):
    """Where a run would be.

    Attributes:
        room: bytes that a process may take there.
        bf16: whether it computes in bf16.
        context: bytes that its libraries will take beside tensors.
    """

    name: str
    room: int
    on_cpu: bool
    bf16: bool
    context: int = CONTEXT


def room(device: str | None) -> Device:
    """A device by its name.

    Args:
        device: None for this machine's (its GPU, if there is one), a GPU's name ("a100-80", "rtx4090"), "cpu", "cuda",
            or a size ("24GB"), which is that of a GPU.

    Raises:
        ConfigError: no such device is known.
    """
    name = (device or ("cuda" if torch.cuda.is_available() else "cpu")).lower().replace(" ", "").replace("_", "-")
    if name == "cpu":
        return Device("this machine's memory", available(), True, base.computes_bf16("cpu"), 0)
    if name.startswith("cuda") and torch.cuda.is_available():
        gc.collect()
        cached = torch.cuda.memory_reserved(name) - torch.cuda.memory_allocated(name)
        free = torch.cuda.mem_get_info(name)[0] + cached  # asking has made the context, so it is taken already
        return Device(torch.cuda.get_device_name(name), free, False, base.computes_bf16(name), 0)
    with contextlib.suppress(ValueError):
        size = float(name.removesuffix("gib").removesuffix("gb"))
        return Device(f"{size:g} GB", int(size * GIB), False, True)
    if name not in GPUS:
        raise ConfigError(f"device: {device!r} is not known; {nearest(name, GPUS)}, or give its memory, such as 24GB")
    return Device(name, int(GPUS[name] * GIB * USABLE), False, name not in EMULATES_BF16)


def available() -> int:
    """Bytes of this machine's memory that a process can have now, within what its container may take."""
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())  # "max" where there is no bound
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    return min(free, max(0, most - used + int(counts.get("inactive_file", 0))))
