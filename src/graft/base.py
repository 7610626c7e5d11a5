"""Load a base: which class, which precision, which device. Safetensors only; no code of a checkpoint is ever run."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from graft import vocabulary
from graft.errors import ConfigError
from graft.method import nearest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8", "nf4")
EMBEDDED = ("embedded", "quickstart")
"""Names of the small pretrained model that ships inside the package."""

_NEW: WeakKeyDictionary[PreTrainedModel, tuple[str, ...]] = WeakKeyDictionary()

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CLASSES = {
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
HEADS = tuple(_CLASSES)
"""Endings of the classes of the config that are neither causal nor encoder-decoders."""
TRAINED = ("Classification", "QuestionAnswering")
"""Endings of the auto classes whose task head an adapter trains."""

EDGE = 1 << 20
WORDS = (".json", ".jinja", ".txt", ".model", ".spm", ".tiktoken")
"""Endings of the files beside the weights: the config, the tokenizer, its templates, how answers are made."""


def load_base(
    path: str | Path, *, precision: str = "auto", device: str | None = None, num_labels: int | None = None
) -> PreTrainedModel:
    """A pretrained transformers model, in eval mode, ready for `graft.attach`.

    Args:
        path: a folder, a hub name, or "embedded" for the small model inside the package.
        precision: "fp32", "bf16", "fp16", "int8" or "nf4" (the last two need bitsandbytes); "auto" is bf16 where the
            device computes in it, else fp32.
        device: "cpu", "cuda", "cuda:1", ...; None is the GPU if there is one, else the CPU.
        num_labels: build a sequence classifier with so many outputs; its new head is random until it is trained.

    Raises:
        ConfigError: an unknown precision, a missing or broken checkpoint, one that has only pickled weights or wants to
            run its own code, or no bitsandbytes.
    """
    import transformers

    check(precision, device)
    config = load_config(path)
    where = device_of(device)
    place = _place(path)
    _refuse_pickles(place, path)
    name, extra = _class_name(config, num_labels)
    extra |= _precision(precision, where)
    if "quantization_config" in extra and name.endswith(TRAINED):
        extra["quantization_config"].llm_int8_skip_modules = list(vocabulary.TASK_HEADS)  # no codes: they train whole
    auto = getattr(transformers, name)
    with _quiet(), _one_line(path):
        if type(config) not in auto._model_mapping:
            raise ConfigError(
                f"base {path}: {type(config).__name__} has no {name.removeprefix('AutoModelFor')} model; "
                "give num_labels for a classifier, or load it with transformers and attach to it"
            )
        model, info = auto.from_pretrained(
            place,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head for other labels is made anew; all else is refused below, by name
            output_loading_info=True,
            **extra,
        )
    _check_complete(model, info, path, num_labels)
    if "quantization_config" not in extra:
        model.to(where)
    for module in model.modules():
        # bitsandbytes would repack 4-bit weights at the first forward without gradients, and train wrongly after it.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if str(path) in EMBEDDED:
        model.config._name_or_path = EMBEDDED[0]  # a name that another machine knows, not this one's path
    return model.eval()


def check(precision: str, device: str | None) -> None:
    """Refuse what `load_base` would, as far as it can be seen without a base.

    Raises:
        ConfigError: an unknown precision or device, or no bitsandbytes.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision: unknown precision {precision!r}; {nearest(precision, PRECISIONS)}")
    _precision(precision, device_of(device))


def skeleton(config: PretrainedConfig, num_labels: int | None = None) -> PreTrainedModel:
    """The model that `load_base` gives for this config, on the meta device: its modules and sizes without weights."""
    import transformers

    name, extra = _class_name(config, num_labels)
    config = copy.deepcopy(config)
    for key, value in extra.items():
        setattr(config, key, value)
    with torch.device("meta"), _quiet():
        return getattr(transformers, name).from_config(config)


def made_new(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the tensors that `load_base` did not find in the checkpoint and made of random numbers."""
    return _NEW.get(model, ())


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a base.

    Raises:
        ConfigError: there is none, or it wants to run its own code.
    """
    from transformers import AutoTokenizer

    with _quiet(), _one_line(path, "tokenizer"):
        return AutoTokenizer.from_pretrained(_place(path), trust_remote_code=False)


def load_config(path: str | Path) -> PretrainedConfig:
    """The base's config, without its weights.

    Raises:
        ConfigError: a missing folder, no config.json, or a config that cannot be read.
    """
    from transformers import AutoConfig

    place = _place(path)
    if str(path) in EMBEDDED or _local(str(path)):
        if not Path(place).is_dir():
            raise ConfigError(f"base {path}: no such folder; give a folder, a hub name, or 'embedded'")
        if not (Path(place) / "config.json").is_file():
            hint = "; it is an adapter, give its base" if (Path(place) / "adapter_config.json").is_file() else ""
            raise ConfigError(f"base {path}: no config.json in the folder{hint}")
    with _quiet(), _one_line(path):
        return AutoConfig.from_pretrained(place, trust_remote_code=False)


def identity(path: str) -> str:
    """A short hash that changes with the base: of its config, a hub name's commit, the files of the tokenizer and of
    generation, and the sizes and edges of the files of weights (1 MB from each end: all of a big base takes too long).

    Raises:
        ConfigError: no such base.
    """
    config = load_config(path)
    place = Path(_place(path))
    known = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}  # not where it lies
    found = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    found.update(str(getattr(config, "_commit_hash", None)).encode())
    files = sorted([*place.glob("*.*"), *place.glob("additional_chat_templates/*")]) if place.is_dir() else []
    for file in files:
        if file.suffix in WORDS and file.name != "config.json":
            with file.open("rb") as words:
                found.update(file.name.encode() + hashlib.file_digest(words, "sha256").digest())
    for file in (each for each in files if each.suffix == ".safetensors"):
        size = file.stat().st_size
        found.update(f"{file.name}:{size}".encode())
        with file.open("rb") as weights:
            found.update(weights.read(EDGE))
            weights.seek(max(0, size - EDGE))
            found.update(weights.read(EDGE))
    return found.hexdigest()[:12]


def context_length(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> int | None:
    """The longest input in tokens that the model takes, or None if nothing says so."""
    text = config.get_text_config()
    known = []
    if not hasattr(text, "relative_attention_num_buckets"):
        known = [getattr(text, name, None) for name in ("max_position_embeddings", "n_positions")]
    if tokenizer is not None and tokenizer.model_max_length < 10**9:
        known.append(tokenizer.model_max_length)
    return min((int(length) for length in known if isinstance(length, int) and length > 0), default=None)


def computes_bf16(device: str | torch.device = "cpu") -> bool:
    """Whether the device has instructions for bf16, so that it is no slower than fp32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not there before torch 2.10
    if found:
        return any(bool(found.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    flags = Path("/proc/cpuinfo")
    words = set(flags.read_text(errors="replace").split()) if flags.is_file() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def device_of(device: str | None) -> torch.device:
    """The device that a setting names; None: the GPU if there is one.

    Raises:
        ConfigError: an unknown device, or a GPU that is not there.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device: unknown device {device!r}; use cpu, cuda or cuda:0") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} is asked for, but this machine has no GPU that torch can use; use cpu")
    if found.type == "cuda" and found.index is not None and found.index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"device: {device} is asked for, but the last GPU here is cuda:{count - 1}")
    return found


def device_kind(device: str | None) -> str:
    """What of a device decides results: "cuda" or "cpu", and whether it computes in bf16; no matter which GPU it is.

    Raises:
        ConfigError: see `device_of`.
    """
    found = device_of(device)
    return f"{found.type}, bf16: {computes_bf16(found)}"


def _place(path: str | Path) -> str:
    """What transformers is given: the packaged folder for the embedded names."""
    if str(path) in EMBEDDED:
        return str(resources.files("graft") / "assets" / "base")
    return str(Path(path).expanduser()) if _local(str(path)) else str(path)


def _local(path: str) -> bool:
    """Whether this is a folder and not a hub name: it exists, or it cannot be a hub name."""
    return Path(path).expanduser().exists() or path.startswith((".", "/", "~")) or path.count("/") > 1


def _refuse_pickles(place: str, path: str | Path) -> None:
    folder = Path(place)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = [file.name for kind in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in sorted(folder.glob(kind))]
    what = f"only pickled weights ({pickles[0]}); convert them to safetensors" if pickles else "no *.safetensors in it"
    raise ConfigError(f"base {path}: {what}")


def _class_name(config: PretrainedConfig, num_labels: int | None) -> tuple[str, dict[str, Any]]:
    """The auto class, and what it is given beside the precision."""
    if num_labels is not None:
        if num_labels < 1:
            raise ConfigError(f"num_labels: at least 1, not {num_labels}")
        return "AutoModelForSequenceClassification", {"num_labels": num_labels}
    kind = next(iter(config.architectures or ()), "")
    for ending, name in _CLASSES.items():
        if kind.endswith(ending):
            return name, {}
    return ("AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"), {}


def _precision(precision: str, device: torch.device) -> dict[str, Any]:
    fast = torch.bfloat16 if computes_bf16(device) else torch.float32
    if precision in ("auto", *_DTYPES):
        return {"dtype": _DTYPES.get(precision, fast)}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"precision {precision}: bitsandbytes is not installed; pip install 'graftlm[quant]'")
    from transformers import BitsAndBytesConfig

    # Each int8 product warns that it computes in fp16, and each process that an optional CPU kernel is absent.
    for name in ("autograd._functions", "backends.cpu.ops"):
        logging.getLogger(f"bitsandbytes.{name}").setLevel(logging.ERROR)
    if precision == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=fast,
        )
    return {"quantization_config": quantization, "device_map": {"": str(device)}, "dtype": fast}


def _check_complete(model: PreTrainedModel, info: dict[str, Any], path: str | Path, num_labels: int | None) -> None:
    """transformers fills what a checkpoint lacks with random numbers; only a new classifier's head may be new."""
    inside = f"{model.base_model_prefix}."
    absent = sorted([*info["missing_keys"], *(str(key[0]) for key in info["mismatched_keys"])])
    missing = [key for key in absent if num_labels is None or key.startswith(inside)]
    pooler = [key for key in missing if num_labels is not None and ".pooler." in key]
    if len(missing) > len(pooler):
        raise ConfigError(
            f"base {path}: the checkpoint lacks {len(missing)} tensors of {type(model).__name__}, the first is "
            f"{missing[0]}; it is incomplete or of another kind"
        )
    _NEW[model] = tuple(absent)
    lost = sorted({key.rpartition(".")[0] for key in absent if "pooler" in key.split(".")})
    if lost:
        warnings.warn(
            f"base {path}: the checkpoint has no {lost[0]}; it is random unless an adapter brings it (modules_to_save)",
            stacklevel=3,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, load reports or warnings of transformers; what matters is checked here."""
    import logging as python_logging

    from transformers.utils import logging

    hub = python_logging.getLogger("huggingface_hub")
    level, bars, hub_level = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub.level
    logging.set_verbosity_error()
    hub.setLevel(python_logging.ERROR)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub.setLevel(hub_level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _one_line(path: str | Path, what: str = "base") -> Iterator[None]:
    """Turn what transformers, safetensors and the hub raise into one line."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # a dozen unrelated classes: OSError, ValueError, SafetensorError, hub errors
        text = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in text:
            text = "it needs code from its own repository, which is never run; use a model that transformers has"
        elif isinstance(error, OSError) and not Path(path).expanduser().exists():
            why = textwrap.shorten(text, 120, placeholder=" ...")
            text = f"neither a folder here nor on the hub, or the hub cannot be reached ({why})"
            if str(path).startswith((".", "/", "~")):
                text = "no such folder"
        raise ConfigError(f"{what} {path}: {textwrap.shorten(text, 300, placeholder=' ...')}") from error
