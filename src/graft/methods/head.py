"""Head: a task head trained alone on frozen features (linear probing; Alain and Bengio 2016, arXiv 1610.01644).

    logits = head'(h),   h the frozen model's hidden states (B, T, D) or (B, D)

The head (`score`, `classifier`, `qa_outputs`) is a trained copy; the original stays frozen beside it, so that adapters
with different heads share one base. It is what every other method adds to itself unless it says `head=False`.

Shape legend: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft import roles
from graft.errors import ConfigError, SiteError
from graft.method import Build, Method
from graft.roles import Site


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """Only the task head trains (Alain and Bengio 2016, arXiv 1610.01644); as many values as the head has.

    Raises:
        ConfigError: `head=False` or `layers`, which leave nothing or mean nothing.
        SiteError: the model has no task head.
    """

    name: ClassVar[str] = "head"
    place: ClassVar[str] = "module"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "HEAD"
    paper: ClassVar[str] = "Alain and Bengio 2016, arXiv 1610.01644"
    trains: ClassVar[str] = "every value of the head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.head or self.layers is not None:
            raise ConfigError("Head: head=False would leave nothing to train, and layers has no meaning")

    def sites(self, build: Build) -> list[Site]:
        if not roles.task_heads(build.model):
            raise SiteError(f"Head: {type(build.model).__name__} has no task head; load it with a classification head")
        return []
