"""Runs trainings one after another, each in a fork that dies where it is told; prints how each one ended.

`python killed.py '[["run.yaml", "begin:3"], ["run.yaml", "save:6"], ["run.yaml", "int:9"], ["run.yaml", ""]]'`:
SIGKILL as step 3 begins; SIGKILL as the checkpoint of step 6 is about to be renamed into place; SIGINT at the end of
step 9; and to the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerCallback

import graft.files  # noqa: F401
from graft.errors import GraftError
from graft.train import saving
from graft.train.config import load_run
from graft.train.run import train


class Death(TrainerCallback):
    """Sends this process a signal at one place."""

    def __init__(self, how: str) -> None:
        self.how, _, step = how.partition(":")
        self.step = int(step or -1)
        if self.how == "save":
            self.replace = os.replace
            saving.os.replace = self.at_rename  # type: ignore[assignment]

    def at_rename(self, source: Any, target: Any) -> None:
        if str(target).endswith(f"checkpoint-{self.step}"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.replace(source, target)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.how == "begin" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.how in ("int", "term") and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT if self.how == "int" else signal.SIGTERM)


def attempt(file: str, how: str) -> int:
    """The exit code of one training in a fork; minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            train(load_run(file), console=Console(quiet=True), callbacks=[Death(how)])
            code = 0
        except BaseException as error:
            if not isinstance(error, GraftError):
                traceback.print_exc()
            print(error, file=sys.stderr)
            code = getattr(error, "exit_code", 2)
        finally:
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps([attempt(file, how) for file, how in json.loads(sys.argv[1])]))
