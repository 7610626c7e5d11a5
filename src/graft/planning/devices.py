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
GROUPS, MEMBER = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux says what the groups of processes may take, and in which of them this one is."""


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
            or a size ("24GB"), which is that of a GPU as it is sold.

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
        return Device(f"{size:g} GB", int(size * GIB * USABLE), False, True)
    if name not in GPUS:
        raise ConfigError(f"device: {device!r} is not known; {nearest(name, GPUS)}, or give its memory, such as 24GB")
    return Device(name, int(GPUS[name] * GIB * USABLE), False, name not in EMULATES_BF16)


def available() -> int:
    """Bytes of this machine's memory that a process can have now, within what its container may take."""
    return min([int(psutil.virtual_memory().available), *_bounds()])


def _bounds() -> list[int]:
    """Bytes that are left in each group of processes that this one is in, an ancestor's bound holding for all below."""
    found = []
    with contextlib.suppress(OSError):  # no Linux
        for line in MEMBER.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds and "memory" not in kinds.split(","):
                continue
            names = ("max", "current", "") if not kinds else ("limit_in_bytes", "usage_in_bytes", "total_")
            root = GROUPS / "memory" if kinds else GROUPS
            place = root / path.strip("/")
            found += [_left(each, *names) for each in (place, *place.parents) if each.is_relative_to(root)]
    return [each for each in found if each is not None]


def _left(group: Path, most: str, used: str, prefix: str) -> int | None:
    """Bytes up to a group's bound, its files' cache counted as free; None where it has none."""
    try:
        left = int((group / f"memory.{most}").read_text()) - int((group / f"memory.{used}").read_text())
    except (OSError, ValueError):  # "max": no bound
        return None
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        left += sum(int(counts.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
    return max(0, left)
