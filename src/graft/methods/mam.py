"""MAM, the mix-and-match adapter: a prefix in every attention and a parallel bottleneck beside every feed-forward.

    attention(q, [PK; K], [PV; V]),   FFN(n) + s Up f(Down n)   (He et al. 2022, arXiv 2110.04366)

PK, PV (P, K d) are made by an MLP while training; Down (S, D), Up (D, S) with s = 4. In encoder-decoders the encoder's,
the decoder's and the cross-attention have a prefix each.

Shape legend: P virtual tokens, K key/value heads, d head size, D width, S bottleneck size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft import roles
from graft.errors import ConfigError
from graft.method import Build, Method
from graft.methods.bottleneck import Bottleneck
from graft.methods.compose import head_of
from graft.methods.prefix import PLACES, PrefixTuning


@dataclass(frozen=True, kw_only=True)
class MAM(Method):
    """Prefix and parallel bottleneck as one adapter (He et al. 2022, arXiv 2110.04366); shapes as theirs, (P, D) rows.

    Args:
        length: P, the prefix's rows.
        hidden: width of the MLP that makes the prefix while training; None trains the rows themselves.
        size: S, the bottleneck's width.
        scale: s, the factor on the bottleneck.

    Raises:
        ConfigError: a value out of range, or `layers`.
    """

    length: int = 30
    hidden: int | None = 800
    size: int = 512
    scale: float = 4.0

    name: ClassVar[str] = "mam"
    place: ClassVar[str] = "several"
    starts_equal: ClassVar[bool] = False
    peft_type: ClassVar[str] = "MAM"
    paper: ClassVar[str] = "He et al. 2022, arXiv 2110.04366"
    trains: ClassVar[str] = "its prefix with the MLP, and 2 S D + D + S per layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None or self.modules_to_save:
            raise ConfigError("MAM: layers and modules_to_save are not for a recipe; write Compose with its parts")
        self._parts(both=False)

    def parts_of(self, build: Build) -> dict[str, Method]:
        return self._parts(both=roles.is_encoder_decoder(build.model)) | head_of(self, build)

    def _parts(self, *, both: bool) -> dict[str, Method]:
        where = PLACES if both else None
        prefix = PrefixTuning(length=self.length, hidden=self.hidden, where=where, head=False)
        bottleneck = Bottleneck(kind="parallel", size=self.size, scale=self.scale, head=False)
        return {"prefix_tuning": prefix, "bottleneck": bottleneck}
