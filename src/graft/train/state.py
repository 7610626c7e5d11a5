"""What a checkpoint holds beside the adapter folder: the exact state of training, and where checkpoints stand."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals

from graft.adapter import Adapter
from graft.bank import bank_of
from graft.disk import PARTIAL
from graft.errors import TrainingError

STATE = "training_state.safetensors"
"""Every tensor of the adapters in training, as it is; the adapter folder beside it may hold a smaller, final form."""

PREFIX = "checkpoint-"


def trained(model: nn.Module) -> list[Adapter]:
    """The adapters that train now."""
    return [adapter for adapter in bank_of(model) if adapter.trainable]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapters that train, the very ones: parameters, buffers, and what they select of the base."""
    found: dict[str, Tensor] = {}
    for adapter in trained(model):
        found |= {f"{adapter.name}/own/{key}": value for key, value in adapter.state_dict().items()}
        found |= {f"{adapter.name}/base/{key}": value.detach() for key, value in adapter.selected.items()}
    return found


def starting(model: nn.Module) -> dict[str, Tensor]:
    """A copy of `tensors`; for what is selected of the base, the originals that the adapter keeps anyway."""
    kept: dict[str, Tensor] = {}
    for adapter in trained(model):
        kept |= {f"{adapter.name}/own/{key}": value.clone() for key, value in adapter.state_dict().items()}
        kept |= {f"{adapter.name}/base/{key}": adapter.other[key] for key in adapter.selected}
    return kept


def write(model: nn.Module, file: Path) -> None:
    """The tensors to a safetensors file; those that share memory are written twice."""
    save_file({key: value.cpu().contiguous().clone() for key, value in tensors(model).items()}, file)


def read(model: nn.Module, file: Path) -> None:
    """The tensors of a file into the model, bit for bit.

    Raises:
        TrainingError: the file is missing, broken, or of another adapter.
    """
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{file}: cannot be read ({error}); remove this checkpoint or use --fresh") from None
    put(model, stored, str(file))


def check(checkpoint: Path, optimizer: bool = True) -> None:
    """Whether Trainer can go on from its own files in a checkpoint; `optimizer`: the optimizer's must be there.

    Raises:
        TrainingError: one is missing or broken.
    """
    needed = (OPTIMIZER_NAME, SCHEDULER_NAME) if optimizer else ()
    stored = {*(checkpoint / name for name in needed), *checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")}
    for file in [checkpoint / TRAINER_STATE_NAME, *sorted(stored)]:
        try:
            if file.name == TRAINER_STATE_NAME:
                TrainerState.load_from_json(str(file))
            else:
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # unpickling raises anything
            text = "it is missing" if not file.exists() else " ".join(str(error).split())[:100]
            raise TrainingError(f"{file}: cannot be read ({text}); delete {checkpoint} or use --fresh") from None


@torch.no_grad()
def put(model: nn.Module, stored: dict[str, Tensor], where: str) -> None:
    """Copy stored tensors into those of the model."""
    here = tensors(model)
    wrong = set(stored) ^ set(here)
    wrong |= {key for key in here if key in stored and stored[key].shape != here[key].shape}
    if wrong:
        raise TrainingError(f"{where}: made for another adapter ({len(wrong)} tensors differ, one is {min(wrong)})")
    for key, value in here.items():
        value.copy_(stored[key])


def finite(model: nn.Module) -> bool:
    """Whether every tensor of the adapters that train is finite."""
    return all(bool(value.isfinite().all()) for value in tensors(model).values() if value.is_floating_point())


def random_states() -> tuple[Any, ...]:
    """The states of python's, numpy's and torch's generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_states(states: tuple[Any, ...]) -> None:
    """Put `random_states` back."""
    python, numpy, cpu, cuda = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextmanager
def same_random() -> Iterator[None]:
    """Whatever happens inside draws no random number."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit() and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    return int(checkpoint.name.removeprefix(PREFIX))


def prune(folder: Path, keep: int | None, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best; a half-removed one has lost its name before."""
    found = checkpoints(folder)
    for path in found[: -keep or None] if keep else []:
        if step_of(path) != best:
            remove(path)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, so that a kill half-way leaves none that looks whole."""
    gone = checkpoint.with_name(f"{checkpoint.name}.gone{PARTIAL}")  # a new one of this step may be half-written
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(f"{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
