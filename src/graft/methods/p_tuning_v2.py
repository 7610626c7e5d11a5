"""P-tuning v2: a prefix in every layer beside a trained task head (Liu et al. 2022, arXiv 2110.07602).

    attention = softmax(q [PK; K]^T / sqrt(d) + mask) [PV; V]

It is prefix tuning without the MLP, for classifying sequences and tokens: the head trains along, and dropout acts on
the rows (P, 2, K, d) of each layer. The hidden states stay T long, so a pooler reads the first token as ever.

Shape legend: P virtual tokens, K key/value heads, d head size, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from graft.methods.prefix import PrefixTuning


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Prefix tuning as P-tuning v2 has it (Liu et al. 2022, arXiv 2110.07602); table (P, 2 L K d), and the task head.

    Args:
        length: P; the paper takes 4 to 128, more for harder tasks.
        dropout: on the rows while training; the paper's code takes the model's own, which is 0.1 in BERT and RoBERTa.

    The others are those of prefix tuning; `hidden` is the MLP that the paper has as an option.
    """

    dropout: float = 0.1

    name: ClassVar[str] = "p_tuning_v2"
    paper: ClassVar[str] = "Liu et al. 2022, arXiv 2110.07602"
