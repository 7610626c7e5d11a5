"""What a run came to, in Python and as `result.json`."""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from graft.errors import ConfigError
from graft.train.config import Run
from graft.train.setup import Data


@dataclass(frozen=True)
class Result:
    """What a finished run came to.

    Attributes:
        run: its settings.
        metrics: `loss` (the last logged), `eval_loss` and `eval_loss_before`, `eval_loss_best` and `kept_step`,
            `steps`, `epochs`, `tokens_per_second`, the seconds of the median step since the last start
            (`step_seconds`); with `train.compile` those of the first pass, which compiles (`compile_seconds`); with
            `data.general` the kept adapter's `forgetting_kl` and `general_loss`, `general_loss_before`, and
            `stopped_step` if the bound ended the run.
        peak_bytes: the most memory used: of the GPU, or of the process on a CPU.
        seconds: over all starts of the run.
        trainable, saved: values that trained, and values in the adapter folder.
        folder: the run's folder; the adapter is in `adapter`.
    """

    run: Run
    metrics: dict[str, float]
    peak_bytes: int
    seconds: float
    trainable: int
    saved: int
    folder: Path

    @property
    def adapter(self) -> Path:
        """The adapter's folder; with several adapters, the folder that has one for each."""
        return self.folder / "adapter"


def versions() -> dict[str, str]:
    """Of Graft, Python and the libraries that decide a result."""
    import accelerate
    import numpy
    import safetensors
    import transformers

    found = {"graft": sys.modules["graft"].__version__, "python": platform.python_version()}
    return found | {each.__name__: each.__version__ for each in (torch, transformers, accelerate, safetensors, numpy)}


def machine(device: torch.device) -> dict[str, Any]:
    """Where a run was: times of two machines are not comparable."""
    found = {"device": str(device), "threads": torch.get_num_threads()}
    return found | {"processor": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()}


def _cpu() -> str:
    """The model of the CPU, which Python knows for some systems alone."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def result_dict(result: Result, model: PreTrainedModel, data: Data) -> dict[str, Any]:
    total = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("adapters."))
    return {
        "settings": result.run.model_dump(mode="json"),
        "metrics": result.metrics,
        "seconds": result.seconds,
        "peak_bytes": result.peak_bytes,
        "counts": {"base": total, "trainable": result.trainable, "saved": result.saved},
        "data": {"sha256": data.hashes, "train_rows": len(data.train), "eval_rows": len(data.evaluation or ())},
        "adapters": list(data.names),
        "versions": versions(),
        "machine": machine(model.device),
        "folder": str(result.folder),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_result(run: Run, folder: Path) -> Result:
    try:
        stored = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        counts = stored["counts"]
        numbers = (stored["metrics"], stored["peak_bytes"], stored["seconds"], counts["trainable"], counts["saved"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / 'result.json'}: cannot be read ({error}); use --fresh") from None
    return Result(run, *numbers, folder)


def peak_bytes(device: torch.device) -> int:
    """The most memory used so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
