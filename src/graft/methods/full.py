"""Full fine-tuning: every parameter of the base trains, embeddings, norms, biases and heads too.

    theta <- theta - AdamW(grad L(theta))

The yardstick for every other method (Howard and Ruder 2018, arXiv 1801.06146). It trains the base itself and keeps the
originals beside it, so that `use(model, None)` and `detach` give the base back bit for bit; it cannot be routed beside
other adapters. Shapes are the base's own: linears (O, I), embeddings (V, D); a tied tensor counts once.

Shape legend: O out, I in, V vocabulary, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.errors import ConfigError
from graft.method import Build, SelectMethod


@dataclass(frozen=True, kw_only=True)
class FullFineTuning(SelectMethod):
    """Every parameter trains (Howard and Ruder 2018, arXiv 1801.06146); shapes are the base's own.

    Raises:
        ConfigError: a setting that would leave something out.
    """

    name: ClassVar[str] = "full"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "FULL"
    paper: ClassVar[str] = "Howard and Ruder 2018, arXiv 1801.06146"
    trains: ClassVar[str] = "every value of the base"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None or not self.head or self.modules_to_save:
            raise ConfigError("FullFineTuning: everything trains; to train a part take TopLayers")

    def chosen(self, build: Build) -> list[str]:
        return [name for name, _ in build.model.named_parameters() if not name.startswith("adapters.")]
