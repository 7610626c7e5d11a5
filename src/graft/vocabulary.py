"""The one ordered vocabulary that turns module paths into roles, and the small override tables beside it.

Only `roles.py` reads it; it is the data half of that file. The first rule that fits wins. A rule sees the path, what
kind of module stands there, whether it lies inside a numbered layer, and the names beside it; it never sees a model's
class.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from torch import nn
from transformers import conversion_mapping

from graft.errors import ConfigError, SiteError
from graft.weights import is_embedding, is_linear

_CROSS = r"encoder_attn|cross_attn|cross_attention|crossattention|EncDecAttention|encoder_decoder_attention"
_SELF = r"self_attn|self_attention|attention|attn|SelfAttention|mixer"
# The second component is BERT's `attention.self`, GPT-Neo's and older ViT's `attention.attention`.
_IN_ATTENTION = rf"(?:^|\.)(?:{_CROSS}|{_SELF})\.(?:self\.|attention\.)?"
_IN_FFN = r"(?:^|\.)(?:mlp|feed_forward|ffn|DenseReluDense|block_sparse_moe|ff)\."
_NAME = r"(?:^|\.)"
_MOE = re.compile(r"(?:^|\.)(?:mlp|feed_forward|ffn|block_sparse_moe|moe)$")

UNBATCHED = ("relative_attention_bias",)
"""Embeddings of positions against positions: no rows reach them, so no route could."""

CROSS = re.compile(rf"(?:^|\.)(?:{_CROSS})(?:\.|_|$)")

# Experts are fused parameters or routed per token: no linear there sees every token, so none can be a site.
EXPERTS = re.compile(r"(?:^|\.)(?:experts|shared_experts?|residual_mlp)(?:\.|$)")
# Those that are linears one by one see only the tokens that the router sends them; the shared ones see all.
ROUTED = re.compile(r"(?:^|\.)experts\.")
TASK_HEADS = ("score", "classifier", "qa_outputs", "classification_head", "pre_classifier")
# peft trains these whole (`modules_to_save`, by the end of the name) and so never targets them or what is in them.
KEPT_HEADS = ("score", "classifier", "pre_classifier", "qa_outputs")
# Inside a head nothing has a role of its own: the head is one site.
HEAD_INSIDE = re.compile(rf"^(?:lm_head|cls|\w*predictions|{'|'.join(TASK_HEADS)})\.")


@dataclass(frozen=True)
class Rule:
    """One line of the vocabulary.

    `kind`: "linear", "embedding", "norm" or "any". `inside`: True only in a numbered layer, False only outside, None
    both. `beside`: a name that must stand next to the module.
    """

    pattern: re.Pattern[str]
    role: str
    kind: str = "linear"
    inside: bool | None = None
    beside: str | None = None


def _rule(pattern: str, role: str, kind: str = "linear", inside: bool | None = None, beside: str | None = None) -> Rule:
    return Rule(re.compile(rf"{pattern}$"), role, kind, inside, beside)


def _attention(names: str, part: str) -> Rule:
    return _rule(rf"{_IN_ATTENTION}(?:{names})", f"attention.{part}")


def _norm(names: str, part: str, inside: bool = True, beside: str | None = None) -> Rule:
    return _rule(rf"{_NAME}(?:{names})", f"norm.{part}", "norm", inside, beside)


RULES: tuple[Rule, ...] = (
    _attention(r"q_proj|query|q|q_lin|query_proj|q_attn|wq", "query"),
    _attention(r"k_proj|key|k|k_lin|key_proj|wk", "key"),
    _attention(r"v_proj|value|v|v_lin|value_proj|wv", "value"),
    _attention(r"c_attn|query_key_value|Wqkv|qkv_proj|qkv", "qkv"),
    _attention(r"(?:output\.)?(?:o_proj|out_proj|c_proj|dense|o|out_lin|wo|Wo)", "output"),
    _rule(rf"{_IN_FFN}(?:gate_up_proj|Wi)", "ffn.gate_up"),
    _rule(rf"{_IN_FFN}(?:gate_proj|w1|wi_0)", "ffn.gate"),
    _rule(rf"{_IN_FFN}(?:up_proj|w3|wi|wi_1|c_fc|fc1|fc_in|lin1|dense_h_to_4h)", "ffn.up"),
    _rule(rf"{_IN_FFN}(?:down_proj|w2|wo|Wo|c_proj|fc2|fc_out|lin2|dense_4h_to_h)", "ffn.down"),
    _rule(rf"{_NAME}(?:fc1|intermediate\.dense|ffn)", "ffn.up", inside=True),
    _rule(rf"{_NAME}(?:fc2|output\.dense|ffn_output)", "ffn.down", inside=True),
    _norm(r"q_norm|q_layernorm|query_layernorm|q_layer_norm", "query"),
    _norm(r"k_norm|k_layernorm|key_layernorm|k_layer_norm", "key"),
    _norm(
        r"encoder_attn_layer_norm|cross_attention_layer_norm|pre_cross_attn_layernorm|ln_cross_attn", "cross_attention"
    ),
    _norm(r"layer_norm", "cross_attention", beside="EncDecAttention"),
    _norm(r"layer_norm", "attention", beside="SelfAttention"),
    _norm(r"layer_norm", "ffn", beside="DenseReluDense"),
    _norm(r"post_self_attn_layernorm", "attention_post"),
    # Gemma 2 and OLMo 2 put a norm behind the attention too; Llama gives that name to the one before the feed-forward.
    _norm(r"post_attention_layernorm", "attention_post", beside="post_feedforward_layernorm"),
    _norm(r"post_feedforward_layernorm|post_mlp_layernorm", "ffn_post"),
    _norm(r"crossattention\.output\.LayerNorm", "cross_attention"),
    _norm(r"input_layernorm|self_attn_layer_norm|sa_layer_norm|pre_self_attn_layernorm", "attention"),
    _norm(r"attention\.(?:output\.)?LayerNorm|attention_layernorm|attention_norm|attn_norm", "attention"),
    _norm(r"ln_1|ln_attn|layernorm_before|norm_1|norm1|ln1|operator_norm", "attention"),
    _norm(r"post_attention_layernorm|pre_feedforward_layernorm|final_layer_norm|output\.LayerNorm", "ffn"),
    _norm(r"output_layer_norm|ffn_layer_norm|ff_layer_norm|full_layer_layer_norm|feedforward_layernorm", "ffn"),
    _norm(r"pre_ff_layernorm|pre_mlp_layernorm|ffn_norm|mlp_norm", "ffn"),
    _norm(r"ln_2|ln_mlp|layernorm_after|norm_2|norm2|ln2", "ffn"),
    _norm(r"embeddings\.LayerNorm|layernorm_embedding|word_embeddings_layernorm", "embedding", inside=False),
    _norm(r"norm|layer_norm|layernorm|final_layer_norm|final_layernorm|final_norm", "final", inside=False),
    _norm(r"ln_f|norm_f|ln|encoder\.LayerNorm", "final", inside=False),
    _rule(rf"{_NAME}(?:token_type_embeddings|segment_embeddings)", "token_type", "embedding", False),
    _rule(rf"{_NAME}(?:position_embeddings|embed_positions|wpe|rotary_emb|rotary_pos_emb)", "position", "any"),
    _rule(rf"{_NAME}(?:embed_tokens|word_embeddings|wte|embed_in|tok_embeddings)", "embedding", "embedding", False),
    _rule(rf"{_NAME}pooler\.dense", "pooler", "linear", False),
)

# model_type -> (path ending, role or None for "no role"), tried before the rules.
OVERRIDES: dict[str, tuple[tuple[re.Pattern[str], str | None], ...]] = {
    # Key and value fused, without the query: no role says so.
    "gpt2": ((re.compile(r"crossattention\.c_attn$"), None),),
    # It normalizes the relative positions; the stack is post-norm.
    "deberta-v2": ((re.compile(r"encoder\.LayerNorm$"), None),),
    # The norm behind the last layer has the name of one at the start.
    "lfm2": ((re.compile(r"embedding_norm$"), "norm.final"),),
    "roberta-prelayernorm": (
        (re.compile(r"intermediate\.LayerNorm$"), "norm.ffn"),
        (re.compile(r"^(?:roberta_prelayernorm\.)?LayerNorm$"), "norm.final"),
    ),
    # These routed blocks return their scores too, so nothing can act on what they give.
    "gpt_oss": ((re.compile(r"\.mlp$"), None),),
    "llama4": ((re.compile(r"\.feed_forward$"), None),),
    "llama4_text": ((re.compile(r"\.feed_forward$"), None),),
}

# model_type -> how a fused query/key/value output is laid out, read in and tested against the model's own code:
# "blocks": all query heads, then all key heads, then all value heads; "heads": per head its query, key and value;
# "falcon" and "bigcode": by their configs, "one_key" (all query heads, one key, one value) or another.
FUSED_LAYOUTS: dict[str, str] = {
    "gpt2": "blocks",
    "phi3": "blocks",
    "mpt": "blocks",
    "modernbert": "blocks",
    "persimmon": "heads",
    "gpt_bigcode": "bigcode",
    "gpt_neox": "heads",
    "bloom": "heads",
    "falcon": "falcon",
}

# model_types whose fused gate and up stand in that order; others are refused, for some have it the other way round.
GATE_FIRST = frozenset({"phi3", "glm", "glm4", "dia", "modernbert", "modernbert-decoder"})

# What (IA)^3 scales by the paper, and what peft scales instead: targets, and those of them whose input is scaled.
SCALED = (("attention.key", "attention.value", "ffn.down"), ("ffn.down",))
_QUERY_VALUE = (("attention.query", "attention.value", "ffn.down"), ("ffn.down",))
# peft's "output.dense" names the attention's output too.
_BOTH_OUTPUTS = (("attention.key", "attention.value", "attention.output", "ffn.down"), ("attention.output", "ffn.down"))
PEFT_SCALED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("bart", "gemma", "gemma2", "gemma3_text", "gptj", "gpt_neo", "llama4"), _QUERY_VALUE),
    **dict.fromkeys(("phi", "qwen2", "qwen3"), _QUERY_VALUE),
    **dict.fromkeys(("bert", "roberta", "deberta-v2"), _BOTH_OUTPUTS),
    "opt": (("attention.query", "attention.key", "ffn.down"), ("ffn.down",)),
    "mt5": (("attention.key", "attention.value", "wi_1"), ()),
    "mixtral": (("attention.key", "attention.value"), ()),
}

# What peft's LN_TUNING trains by default, by the ends of the paths; it has no default for any other model_type.
_TWO, _MORE = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
# By the type whose experts others are converted like (`_convert_peft_config_moe` of peft; it leaves qwen2_moe itself).
PEFT_EXPERTS: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
PEFT_NORMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), (*_TWO, "norm")),
    **dict.fromkeys(("gemma2", "gemma3_text"), (*_TWO, *_MORE, "norm")),
    **dict.fromkeys(("bloom", "falcon"), (*_TWO, "ln_f")),
    **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "phi": ("input_layernorm", "final_layernorm"),
}

# transformers lists it among the causal models, and it is one only where its config says `is_decoder`.
CAUSAL_BY_CONFIG = frozenset({"bert-generation"})


def name_roles(
    modules: dict[str, nn.Module], model_type: str, output: nn.Module | None, source: nn.Module | None
) -> dict[str, str]:
    """Path to role, for every module that has one.

    Args:
        modules: path to module, in the model's order.
        model_type: of the model's config.
        output: the output embedding, where the model has one.
        source: the input embedding; named where no rule found one.
    """
    # All that the rules look at; a load asks four times, and each adapter that is loaded asks again.
    places = [next((path for path, module in modules.items() if module is each), None) for each in (output, source)]
    key = model_type, *places, type(source), tuple((path, type(module)) for path, module in modules.items())
    if key not in _NAMED:
        if len(_NAMED) >= 16:
            _NAMED.clear()
        _NAMED[key] = _name_roles(modules, model_type, output, source)
    return dict(_NAMED[key])


_NAMED: dict[Any, dict[str, str]] = {}
_FOUND: ContextVar[dict[Any, Any] | None] = ContextVar("_FOUND", default=None)
P = ParamSpec("P")
T = TypeVar("T")


@contextlib.contextmanager
def unchanged() -> Iterator[None]:
    """Inside, no base gains, loses or replaces a module: what `once` finds in one holds until the end of the block."""
    token = _FOUND.set({} if _FOUND.get() is None else _FOUND.get())
    try:
        yield
    finally:
        _FOUND.reset(token)


def once(find: Callable[P, T]) -> Callable[P, T]:
    """Decorate what finds a list or dict of modules in a model: inside of `unchanged` it looks one time only."""

    @functools.wraps(find)
    def found(*args: P.args, **kwargs: P.kwargs) -> T:
        kept = _FOUND.get()
        if kept is None:
            return find(*args, **kwargs)
        key = find, args, *kwargs.items()
        if key not in kept:
            kept[key] = find(*args, **kwargs)
        return copy.copy(kept[key])

    return found


def _name_roles(
    modules: dict[str, nn.Module], model_type: str, output: nn.Module | None, source: nn.Module | None
) -> dict[str, str]:
    overrides = OVERRIDES.get(model_type, ())
    roles: dict[str, str | None] = {}
    for path, module in modules.items():
        fixed = [role for pattern, role in overrides if pattern.search(path)]
        if fixed:
            roles[path] = fixed[0]
        elif module is output or path in TASK_HEADS:
            roles[path] = "head"
        elif not (EXPERTS.search(path) or HEAD_INSIDE.match(path)):
            roles[path] = _by_rules(path, module, modules)
    if source is not None and is_embedding(source) and "embedding" not in roles.values():
        roles.update((path, "embedding") for path, module in modules.items() if module is source)
    for path, role in _whole(modules, roles).items():
        if roles.get(path) is None and not any(pattern.search(path) for pattern, _ in overrides):
            roles[path] = role
    return {path: role for path, role in roles.items() if role is not None}


def peft_norms(config: Any) -> tuple[str, ...] | None:
    """The norms that peft's LN_TUNING trains by default in a model with this config; None where it has no default."""
    return PEFT_NORMS.get(str(getattr(config, "model_type", "")))


def peft_experts(config: Any) -> tuple[str, ...]:
    """Last parts of names that peft's LORA takes for fused experts in a model with this config, whatever bears them."""
    kind = str(getattr(config, "model_type", ""))
    known: dict[str, str] = getattr(conversion_mapping, "_MODEL_TO_CONVERSION_PATTERN", {})
    return PEFT_EXPERTS.get("mixtral" if kind == "mixtral" else known.get(kind, ""), ())


def refuse_routed(paths: Iterable[str]) -> None:
    """Raise a SiteError for the first path inside of routed experts: no route knows which row its tokens are of."""
    for path in paths:
        if ROUTED.search(path):
            raise SiteError(
                f"targets: {path} is one of the routed experts, which see single tokens and no rows: take attention "
                "roles only, or exclude the experts"
            )


def layer_of(path: str, modules: dict[str, nn.Module]) -> int | None:
    """The first number in the path that indexes a list of modules: in `block.3.layer.1` it is 3."""
    for part in path.split("."):
        if part.isdigit():
            return int(part) if isinstance(modules.get(container_of(path)), nn.ModuleList) else None
    return None


@functools.lru_cache(4096)
def container_of(path: str) -> str:
    """What stands before the first number in the path."""
    parts = path.split(".")
    first = next(index for index, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[:first])


def children_of(module: nn.Module) -> list[str]:
    """Names of the direct children."""
    return [name for name, _ in module.named_children()]


def kind_of(module: nn.Module) -> str:
    """The kind that rules speak of: "linear", "embedding", "norm", or "any"."""
    if is_linear(module):
        return "linear"
    if is_embedding(module):
        return "embedding"
    return "norm" if "norm" in type(module).__name__.lower() and not children_of(module) else "any"


def _by_rules(path: str, module: nn.Module, modules: dict[str, nn.Module]) -> str | None:
    kind = kind_of(module)
    inside = layer_of(path, modules) is not None
    parent = path.rpartition(".")[0]
    for rule in RULES:
        if rule.kind not in (kind, "any") or rule.inside not in (inside, None):
            continue
        if rule.beside is not None and f"{parent}.{rule.beside}" not in modules:
            continue
        if rule.pattern.search(path):
            cross = rule.role.startswith("attention") and CROSS.search(path)
            return f"cross_{rule.role}" if cross else rule.role
    return None


def _whole(modules: dict[str, nn.Module], roles: dict[str, str | None]) -> dict[str, str]:
    """Sub-layers, named by what is in them: an attention holds the query, a feed-forward both of its ends."""
    whole: dict[str, str] = {}
    for path, role in roles.items():
        parent = path.rpartition(".")[0]
        if role is not None and re.fullmatch(r"(cross_)?attention\.(query|qkv)", role):
            whole[parent] = role.rpartition(".")[0]
        elif role == "ffn.down" and not parent.rpartition(".")[2].isdigit():
            beside = {roles.get(f"{parent}.{name}") for name in children_of(modules[parent])}
            if beside & {"ffn.up", "ffn.gate_up"}:
                whole[parent] = "ffn"
    routed = {path: "ffn" for path, module in modules.items() if _MOE.search(path) and "experts" in children_of(module)}
    return whole | routed


def pattern_value(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that fits a module's path, by peft's rule: the end of the path, after a dot.

    Raises:
        ConfigError: a pattern that is no regular expression.
    """
    for key, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({key})$", path)
        except re.error as error:
            raise ConfigError(f"{key!r} is no regular expression for a module's name: {error}") from None
        if found:
            return value
    return default
