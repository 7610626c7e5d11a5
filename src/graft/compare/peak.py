"""The most memory that a run used: of the GPU, or of the process on a CPU, counted anew for each run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

from graft.train.result import peak_bytes

CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def reset(device: torch.device) -> None:
    """Begin to count."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()  # before it no GPU has an index
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError):  # glibc: what earlier runs left goes back to the system
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")  # Linux: the peak of this process is what it holds now


def read(device: torch.device) -> int:
    """Bytes since `reset`; where the system cannot count anew, since the process began."""
    if device.type != "cpu":
        return peak_bytes(device)
    try:
        found = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(found.split()[1]) * 1024
    except (OSError, StopIteration):
        return peak_bytes(device)
