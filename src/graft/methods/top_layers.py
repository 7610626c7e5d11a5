"""Top layers: the last K blocks of the base train, and no graph is kept below them (Lee et al. 2019, arXiv 1911.03090).

    h_{l+1} = block_l(h_l),   theta_l trains for l >= L - K;   h_{L-K} (B, T, D) is detached

The norm behind the last block, an encoder's pooler and the task head train along; embeddings never do, nor does the
language model's head unless it is asked for and has a weight of its own. In encoder-decoders gradients reach a trained
encoder through the cross-attention of every decoder block, so frozen decoder blocks save nothing then; with no encoder
block trained the whole encoder runs without a graph.

Shape legend: B rows, T tokens, D width, L blocks, K trained blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from graft import roles
from graft.errors import ConfigError
from graft.method import Build, SelectMethod


@dataclass(frozen=True, kw_only=True)
class TopLayers(SelectMethod):
    """The last blocks of each stack train (Lee et al. 2019, arXiv 1911.03090); shapes are the base's own, (O, I).

    Args:
        count: K, for every stack.
        encoder, decoder: K for one stack, instead of `count`; a stack that is not named trains nothing.
        norm: whether the norm behind the last block trains along.
        lm_head: whether an output embedding with a weight of its own trains along.

    Raises:
        ConfigError: no count or contradicting ones, more blocks than there are, or a tied `lm_head`.
    """

    count: int | None = None
    encoder: int | None = None
    decoder: int | None = None
    norm: bool = True
    lm_head: bool = False

    name: ClassVar[str] = "top_layers"
    merges: ClassVar[bool] = True
    peft_type: ClassVar[str] = "SUBSET"
    paper: ClassVar[str] = "Lee et al. 2019, arXiv 1911.03090"
    trains: ClassVar[str] = "the last `count` blocks and the norm behind them"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [number for number in (self.count, self.encoder, self.decoder) if number is not None]
        if not given or (self.count is not None and len(given) > 1):
            raise ConfigError("TopLayers: give count, or encoder and decoder: how many of the last blocks train")
        if min(given) < 0 or not any(given):
            raise ConfigError(f"TopLayers: at least one block must train, not {min(given)}")
        if self.layers is not None or self.modules_to_save:
            raise ConfigError("TopLayers: layers and modules_to_save mean nothing here; count says which blocks train")

    def chosen(self, build: Build) -> list[str]:
        model = build.model
        depth = self.depth(build)
        stacks = roles.blocks(model)
        modules = [module for stack, found in stacks.items() for _, module in found[len(found) - depth[stack] :]]
        both = roles.is_encoder_decoder(model)
        for site in roles.sites(model):
            top = depth.get(site.stack, 0) if both else max(depth.values())
            if (site.role == "norm.final" and self.norm and top) or (site.role == "pooler" and "encoder" in depth):
                modules.append(site.module)
        modules += [site.module for site in roles.task_heads(model)] if self.head else []
        modules += [self._lm_head(model)] if self.lm_head else []
        wanted = {id(parameter) for module in modules for parameter in module.parameters()}
        return [name for name, parameter in model.named_parameters() if id(parameter) in wanted]

    def barriers(self, build: Build) -> list[str]:
        depth = self.depth(build)
        paths: list[str] = []
        for stack, found in roles.blocks(build.model).items():
            # The first block's input too: `enable_input_require_grads` would give the frozen blocks a graph.
            first = [0, len(found) - depth[stack]] if depth[stack] else [0]
            if stack == "decoder" and depth.get("encoder"):
                first = [0]
            paths += [found[i][0] for i in dict.fromkeys(first)]
        return paths

    def depth(self, build: Build) -> dict[str, int]:
        """How many blocks of each stack train.

        Raises:
            ConfigError: a stack that the model does not have, or more blocks than it has.
        """
        stacks = roles.blocks(build.model)
        asked = {"encoder": self.encoder, "decoder": self.decoder}
        for stack, number in asked.items():
            if number and stack not in stacks:
                raise ConfigError(f"TopLayers: {type(build.model).__name__} has no {stack}, it has {', '.join(stacks)}")
        depth = {stack: self.count if self.count is not None else asked[stack] or 0 for stack in stacks}
        for stack, number in depth.items():
            if number > len(stacks[stack]):
                raise ConfigError(f"TopLayers: {number} blocks of the {stack} asked, and it has {len(stacks[stack])}")
        if len(stacks) == 1 and getattr(build.model.config, "num_hidden_layers", 0) > sum(map(len, stacks.values())):
            raise ConfigError(f"TopLayers: {type(build.model).__name__} runs one block many times, so none is the top")
        return depth

    def _lm_head(self, model: nn.Module) -> nn.Module:
        head = model.get_output_embeddings()  # type: ignore[operator]
        tied = [site.path for site in roles.sites(model) if site.role == "embedding" and head is not None]
        tied = [path for path in tied if model.get_submodule(path).weight is head.weight]
        if head is None or tied:
            why = f"shares its weight with {tied[0]}" if tied else "does not exist"
            raise ConfigError(f"TopLayers: lm_head {why} in {type(model).__name__}, and embeddings stay frozen")
        return head
