"""The program from the outside, as a new user meets it: what it prints, what it refuses, that it leaves no debris."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import SafetensorError
from typer.testing import CliRunner

import graft
from graft.cli import app
from tiny import tiny

ASSETS = Path(graft.__file__).parent / "assets"
VERBS = ["data", "compare", "plan", "quickstart", "describe", "train", "evaluate", "chat", "merge", "convert", "schema"]
VERBS += ["measure"]
PROGRAM = [sys.executable, "-c", "from graft.cli import main; main()"]
ROWS = [
    {"prompt": "a red house", "references": ["It is red.", "A red one."]},
    {"prompt": "why not", "references": ["Because."]},
    {"prompt": "the cat sat on a mat and slept", "references": ["The cat slept."]},
]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with adapters for the embedded base, another base, and rows."""
    folder = tmp_path_factory.mktemp("shop")
    model = graft.load_base("embedded", precision="fp32")
    for seed, name in enumerate(["legal", "polite"]):
        adapter = graft.attach(model, graft.LoRA(rank=2, targets="all-linear"), name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        graft.save(model, name, folder / name, template={"kind": "chat"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    other = tiny("llama", vocab_size=4096, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    other.save_pretrained(folder / "other")
    transformers.AutoTokenizer.from_pretrained(ASSETS / "base").save_pretrained(folder / "other")
    return folder


@pytest.fixture(autouse=True)
def inside(shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test stands in a copy of the shop."""
    shutil.copytree(shop, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    for name in ("GRAFT_DEBUG", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "DATASETS_VERBOSITY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def call(*arguments: str, code: int = 0, given: str | None = None) -> tuple[str, str]:
    """(stdout, stderr) of a verb, which must end with this code."""
    done = CliRunner().invoke(app, list(arguments), input=given, env={"COLUMNS": "200"})
    crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
    assert not crashed and done.exit_code == code, (done.exit_code, done.output, done.exception)
    return done.stdout, done.stderr


def refused(*arguments: str) -> str:
    """The one line on stderr of a verb that is refused; nothing is printed or left behind."""
    before = sorted(Path().rglob("*"))
    _, err = call(*arguments, code=2)
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert sorted(Path().rglob("*")) == before
    return err


def program(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """The real program in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(Path(graft.__file__).parents[1]), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    return subprocess.run([*PROGRAM, *arguments], env=env, input=given, capture_output=True, text=True, timeout=120)


# ------------------------------------------------------------------------------------------------------ the program


def test_help_names_every_verb_and_imports_nothing_heavy() -> None:
    text = program("--help").stdout
    assert all(f" {verb} " in text for verb in VERBS)
    heavy = ("torch", "transformers", "pydantic", "numpy")
    code = f"import sys; from graft.cli import app; print([m for m in {heavy} if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": str(Path(graft.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.strip() == "[]"


OPTIONS = {
    "quickstart": {"--output", "--steps", "--fresh"},
    "describe": {"--adapter", "--json"},
    "data": {"--preview", "--endpoint", "--fresh", "--json"},
    "compare": {"--retry", "--workers", "--executor", "--matrix", "--json"},
    "plan": {"--length", "--device", "--probe", "--picture", "--json"},
    "train": {"--fresh", "--force", "--profile"},
    "evaluate": {"--data", "--adapter", "--metrics", "--column", "--split", "--limit", "--template", "--batch-size"}
    | {"--max-new-tokens", "--no-base", "--truncate", "--answers", "--precision", "--device", "--json"},
    "chat": {"--adapter", "--system", "--max-new-tokens", "--temperature", "--precision", "--device"},
    "merge": {"--untie", "--precision", "--into", "--device"},
    "convert": {"--base", "--to", "--from", "--alpha", "--parts", "--layers", "--rope-factor", "--device"},
    "schema": set(),
    "measure": set(),
}


def test_verbs_and_options_are_what_they_were() -> None:
    from typer.main import get_command

    found = {
        name: {option for parameter in command.params for option in parameter.opts if option.startswith("-")}
        for name, command in get_command(app).commands.items()  # type: ignore[attr-defined]
    }
    assert found == OPTIONS and list(found) == VERBS


def test_version_and_usage_errors() -> None:
    assert call("--version")[0].strip() == graft.__version__
    assert refused("trian") == "error: no such command 'trian'; did you mean 'train'; see graft --help\n"
    assert "no such option: --adaptr" in refused("chat", "embedded", "--adaptr", "x")
    assert refused("merge", "embedded") == "error: missing argument 'ADAPTER'; see graft merge --help\n"
    assert "'--steps'" in refused("quickstart", "--steps", "0") and "foo" in refused("measure", "foo")
    assert "--adaptr" in refused("--adaptr")
    assert "Usage: graft" in call(code=2)[0] and "intrinsic" in call("measure", code=2)[0]


def test_a_real_process_ends_with_2_and_one_line() -> None:
    done = program("describe", "nowhere/at/all")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: base nowhere/at/all: no such folder; give a folder, a hub name, or 'embedded'\n"
    for place in (["--debug", "describe"], ["describe", "--debug"]):
        debug = program(*place, "nowhere/at/all")
        assert debug.returncode != 0 and "Traceback" in debug.stderr and "ConfigError" in debug.stderr


# --------------------------------------------------------------------------------------------------------- describe


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safetensors.torch.load_file", None)  # no weights of the base are read
    out, _ = call("describe", "embedded")
    assert "attention.query" in out and "x 6 layers" in out and "5,475,584 parameters" in out
    data = json.loads(call("describe", "embedded", "--json")[0])
    assert data["total"] == 5_475_584 and data["adapters"] == []


def test_describe_with_an_adapter() -> None:
    data = json.loads(call("describe", "embedded", "--adapter", "legal", "--adapter", "p=polite", "--json")[0])
    each = 6 * 2 * (256 * 2 + (256 + 128) * 2 + 256 * 2 + (256 + 704) * 3)
    assert [(row["name"], row["saved"]) for row in data["adapters"]] == [("legal", each), ("p", each)]


def test_describe_refuses() -> None:
    assert "it is an adapter, give its base" in refused("describe", "./legal")
    Path("empty").mkdir()
    assert "no config.json in the folder" in refused("describe", "./empty")
    Path("empty/config.json").write_text("{")
    assert "base ./empty" in refused("describe", "./empty")
    Path("empty/config.json").write_text('{"model_type": "wonder"}')
    assert "base ./empty" in refused("describe", "./empty")
    assert "no such folder" in refused("describe", "embedded", "--adapter", "legall")
    assert "made for LlamaForCausalLM" in refused("describe", "./other", "--adapter", "legal")


# --------------------------------------------------------------------------------------------------------- evaluate


def evaluated(*more: str) -> dict[str, Any]:
    arguments = ["evaluate", "embedded", "--data", "rows.jsonl", "--max-new-tokens", "5", "--precision", "fp32"]
    return json.loads(call(*arguments, "--json", *more)[0])


def test_evaluate_adapters_beside_the_base() -> None:
    both = evaluated("--adapter", "legal", "--adapter", "p=polite", "--metrics", "loss,bleu", "--answers", "out.jsonl")
    assert list(both) == ["base", "legal", "p"] and all(set(found) == {"loss", "bleu"} for found in both.values())
    alone = evaluated("--adapter", "legal", "--no-base", "--metrics", "loss", "--batch-size", "1")
    assert list(alone) == ["legal"] and alone["legal"]["loss"] == pytest.approx(both["legal"]["loss"], abs=1e-5)
    assert len({round(found["loss"], 3) for found in both.values()}) == 3
    written = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["right"] for row in written] == [row["references"] for row in ROWS]
    assert set(written[0]["answers"]) == {"base", "legal", "p"}


def test_evaluate_prints_a_table() -> None:
    out, _ = call("evaluate", "embedded", "--data", "rows.jsonl", "--metrics", "loss,perplexity", "--limit", "2")
    head, base = out.splitlines()
    assert head.split() == ["loss", "perplexity"] and base.split()[0] == "base" and len(base.split()) == 3


def test_evaluate_takes_columns_and_templates() -> None:
    Path("odd.csv").write_text("question,answer\nwhy,because\n")
    columns = ["--column", "prompt=question", "--column", "completion=answer", "--metrics", "loss"]
    chat = evaluated("--data", "odd.csv", *columns)
    plain = evaluated("--data", "odd.csv", *columns, "--template", "plain")
    assert chat["base"]["loss"] != plain["base"]["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "row.jsonl"], "row.jsonl: no such file (did you mean 'rows.jsonl'?)"),
        (["--data", "empty.jsonl"], "empty.jsonl: no rows"),
        (["--data", "broken.jsonl"], "broken.jsonl line 2: not valid JSON"),
        (["--data", "long.jsonl"], "long.jsonl row 1: "),
        (["--data", "rows.jsonl", "--metrics", "blue"], "unknown metric 'blue' (did you mean 'bleu'?)"),
        (["--data", "rows.jsonl", "--metrics", "accuracy"], "accuracy and macro_f1 need a 'label' column"),
        (["--data", "rows.jsonl", "--column", "prompt=promt"], "no column 'promt'"),
        (["--data", "rows.jsonl", "--column", "prompt"], "--column prompt: expected OURS=THEIRS"),
        (["--data", "rows.jsonl", "--template", "chatt"], "template kind 'chatt' is unknown (did you mean 'chat'?)"),
        (["--data", "rows.jsonl", "--adapter", "nowhere"], "nowhere: no such folder"),
        (["--data", "rows.jsonl", "--adapter", "legal", "--adapter", "legal"], "the name 'legal' is taken"),
        (["--data", "rows.jsonl", "--adapter", "base=legal"], "'base' is what the bare base is called"),
        (["--data", "rows.jsonl", "--no-base"], "--no-base: name at least one --adapter"),
        (["--data", "rows.jsonl", "--precision", "fp8"], "unknown precision 'fp8'"),
        (["--data", "rows.jsonl", "--answers", "rows.jsonl"], "--answers rows.jsonl: it exists"),
        (["--data", "rows.jsonl", "--answers", "no/such/file"], "the folder no/such does not exist"),
        (["--data", "rows.jsonl", "--metrics", "loss", "--answers", "a.jsonl"], "no metric here needs answers"),
    ],
)
def test_evaluate_refuses(arguments: list[str], message: str) -> None:
    Path("empty.jsonl").write_text("")
    Path("broken.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"')
    Path("long.jsonl").write_text(json.dumps({"prompt": "word " * 900, "completion": "b"}))
    assert message in refused("evaluate", "embedded", *arguments)


# ------------------------------------------------------------------------------------------------- broken adapters


def flip(path: Path, place: int) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder: Path, how: str) -> None:
    tensors, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if how == "flipped":
        flip(tensors, -5)
    elif how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif how == "truncated, peft's":
        (folder / "graft.json").unlink()
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif how == "pickle":
        tensors.rename(folder / "adapter_model.bin")
    elif how == "no config":
        config.unlink()
    elif how == "unknown field":
        edit(config, wonder=3)
    elif how == "changes the maths":
        (folder / "graft.json").unlink()
        edit(config, use_qalora=True)
    elif how == "template":
        edit(folder / "graft.json", template={"kind": "tchat"})


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", "damaged"),
        ("truncated", "damaged"),
        ("truncated, peft's", "damaged or cut short"),
        ("pickle", "is a pickle"),
        ("no config", "no adapter_config.json here"),
        ("unknown field", "'wonder'"),
        ("changes the maths", "use_qalora"),
        ("template", "did you mean 'chat'?"),
    ],
)
def test_a_broken_adapter_is_refused_everywhere(how: str, message: str) -> None:
    spoil(Path("legal"), how)
    assert message in refused("chat", "embedded", "--adapter", "legal")
    assert message in refused("evaluate", "embedded", "--adapter", "legal", "--data", "rows.jsonl")
    assert message in refused("merge", "embedded", "legal", "out")
    assert message in refused("convert", "legal", "out", "--base", "embedded", "--to", "graft")


def test_the_wrong_base_is_refused_everywhere() -> None:
    for arguments in (
        ["chat", "./other", "--adapter", "legal"],
        ["evaluate", "./other", "--adapter", "legal", "--data", "rows.jsonl"],
        ["merge", "./other", "legal", "out"],
        ["convert", "legal", "out", "--base", "./other", "--to", "peft"],
    ):
        text = refused(*arguments)
        assert "made for LlamaForCausalLM" in text and "check=" not in text and text.endswith("load that base\n")


# ------------------------------------------------------------------------------------------------------------- chat


def chatted(*lines: str, arguments: Sequence[str] = ()) -> str:
    given = "".join(f"{line}\n" for line in lines)
    adapters = ["--adapter", "legal", "--adapter", "polite"]
    fast = ["--max-new-tokens", "6", "--precision", "fp32"]
    return call("chat", "embedded", *adapters, *fast, *arguments, given=given)[0]


def replies(out: str) -> list[tuple[str, str]]:
    """(speaker, text) of each answer."""
    found = []
    for line in out.splitlines():
        name, colon, text = line.partition(": ")
        if colon and name in ("base", "legal", "polite"):
            found.append((name, text))
    return found


def test_chat_switches_between_answers() -> None:
    out = chatted("hello", "/adapter polite", "/reset", "hello", "/base", "/reset", "hello", "/exit", "never read")
    assert [name for name, _ in replies(out)] == ["legal", "polite", "base"]
    assert len({text for _, text in replies(out)}) == 3
    assert "Now polite answers." in out and "never" not in out
    again = chatted("/base", "hello")
    assert replies(again)[0][1] == replies(out)[2][1]


def test_chat_remembers_until_reset() -> None:
    once, twice, anew = (
        replies(chatted("/base", *lines)) for lines in (["a cat"], ["a dog", "a cat"], ["/reset", "a cat"])
    )
    assert once[-1] == anew[-1] != twice[-1]
    assert replies(chatted("/base", "a dog", "/reset", "a cat"))[-1] == once[-1]


def test_chat_goes_on_after_mistakes() -> None:
    out = chatted("/adapter legall", "/wonder", "/adapters", "/help", "", "word " * 900, "hello")
    assert "no adapter 'legall' (did you mean 'legal'?)" in out and "unknown command /wonder" in out
    assert "* legal\n  polite\n  base\n" in out and "/adapter NAME" in out
    assert "error: the message has" in out and len(replies(out)) == 1


def test_chat_forgets_the_oldest_turns_aloud() -> None:
    long = "word " * 200
    out = chatted("/base", long, long, long)
    assert out.count("the oldest turns are forgotten") >= 1 and len(replies(out)) == 3


def test_chat_takes_a_system_message_and_seedless_sampling() -> None:
    assert replies(chatted("hello"))[0] != replies(chatted("hello", arguments=["--system", "You are a dog."]))[0]
    many = {replies(chatted("/base", "hello", arguments=["--temperature", "2"]))[0][1] for _ in range(3)}
    assert len(many) > 1


# ----------------------------------------------------------------------------------------------- merge and convert


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[2, 40, 41, 42, 4]])).logits.float()


def test_merge_writes_a_plain_model() -> None:
    out, _ = call("merge", "embedded", "legal", "merged", "--precision", "fp32")
    assert "its logits are the adapter's within" in out
    plain = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    model = graft.load_base("embedded", precision="fp32")
    base = logits(model)
    graft.load(model, "legal")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4) and not torch.allclose(
        base, logits(model), atol=1e-2
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template and tokenizer("a").input_ids
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    assert "merged exists" in refused("merge", "embedded", "legal", "merged")
    assert json.loads(call("describe", "./merged", "--json")[0])["adapters"] == []


def test_merge_keeps_the_precision_of_the_base() -> None:
    call("merge", "embedded", "legal", "merged")
    assert json.loads(Path("merged/config.json").read_text())["dtype"] == "bfloat16"


def test_merge_that_computes_something_else_is_refused() -> None:
    card = json.loads(Path("legal/graft.json").read_text())
    card["probe"]["logits"] = [-value for value in card["probe"]["logits"]]
    Path("legal/graft.json").write_text(json.dumps(card))
    assert "merged is not written, the merged model is another" in refused("merge", "embedded", "legal", "merged")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_merge_on_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(model: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert "merged: could not be written: " in refused("merge", "embedded", "legal", "new/merged")


def test_merge_refuses_what_cannot_merge() -> None:
    model = graft.load_base("embedded")
    graft.attach(model, graft.PromptTuning(length=2), "soft")
    graft.save(model, "soft", "soft")
    assert "'soft' (prompt" in refused("merge", "embedded", "soft", "merged")


def test_merge_of_a_composed_adapter_names_the_part_and_what_to_do() -> None:
    model = graft.load_base("embedded", precision="fp32")
    graft.attach(model, graft.Compose(graft.LoRA(rank=2), graft.PromptTuning(length=2)), "both")
    graft.attach(model, graft.MAM(length=2, hidden=4, size=2), "mam")
    graft.save(model, "both", "comp/adapter")
    graft.save(model, "mam", "mam/adapter")
    assert refused("merge", "embedded", "comp/adapter", "merged") == (
        "error: adapter 'comp' (compose) cannot be merged: its part 'comp/adapter/prompt_tuning' (prompt_tuning) is no "
        "change of weights, see model.embed_tokens; merge a part that can be, alone: 'comp/adapter/lora'\n"
    )
    assert "'mam/adapter/prefix_tuning'" in refused("merge", "embedded", "mam/adapter/", "merged")
    call("merge", "embedded", "comp/adapter/lora", "merged", "--precision", "fp32")
    with pytest.raises(graft.MergeError, match=r"its part 'both/prompt_tuning' .* alone: 'both/lora'$"):
        graft.merge(model, "both")
    with pytest.raises(graft.MergeError, match=r"'mam/prefix_tuning' .* nor can its other parts be$"):
        graft.merge(model, "mam")


def test_merge_errors_speak_the_options() -> None:
    pytest.importorskip("bitsandbytes")
    device = ("--device", "cpu")
    text = refused("merge", "embedded", "legal", "merged", "--precision", "nf4", *device)
    assert "merge into plain weights with --into bf16, or" in text
    assert "error: --into: bf16 is" in refused("merge", "embedded", "legal", "merged", "--into", "bf16", *device)
    assert "error: --into: 'x' is not one of" in refused("merge", "embedded", "legal", "merged", "--into", "x", *device)
    assert "error: --precision: unknown" in refused("merge", "embedded", "legal", "merged", "--precision", "nf5")
    assert "error: --device: unknown" in refused("merge", "embedded", "legal", "merged", "--device", "tpux")


def test_convert_to_peft_and_back() -> None:
    peft = pytest.importorskip("peft")
    call("convert", "legal", "plain", "--to", "peft", "--base", "embedded")
    assert sorted(path.name for path in Path("plain").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    model = graft.load_base("embedded", precision="fp32")
    graft.load(model, "legal")
    theirs = peft.PeftModel.from_pretrained(graft.load_base("embedded", precision="fp32"), "plain")
    assert torch.allclose(logits(theirs), logits(model), atol=1e-5)
    call("convert", "plain", "ours", "--to", "graft", "--base", "embedded")
    assert json.loads(Path("ours/graft.json").read_text())["template"]["kind"] == "chat"
    again = graft.load_base("embedded", precision="fp32")
    graft.load(again, "ours")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it
def test_a_classifier_of_pefts() -> None:
    peft = pytest.importorskip("peft")
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    model = graft.load_base("embedded", precision="fp32", num_labels=2)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(model, config).eval()
    theirs.save_pretrained("theirs")
    expected = logits(theirs)
    found = evaluated("--adapter", "theirs", "--data", "labels.jsonl")
    assert list(found) == ["base (random head)", "theirs"] and set(found["theirs"]) == {"loss", "accuracy", "macro_f1"}
    call("convert", "theirs", "ours", "--to", "graft", "--base", "embedded")
    for name in ("theirs", "ours"):
        call("merge", "embedded", name, f"merged-{name}", "--precision", "fp32")
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(f"merged-{name}", dtype=torch.float32)
        assert torch.allclose(logits(plain), expected, atol=1e-4)


def test_convert_refuses() -> None:
    model = graft.load_base("embedded")
    graft.attach(model, graft.Bottleneck(size=2), "deep")
    graft.save(model, "deep", "deep")
    assert "cannot be a peft folder" in refused("convert", "deep", "out", "--to", "peft", "--base", "embedded")
    assert "'onnx' is no form" in refused("convert", "legal", "out", "--to", "onnx", "--base", "embedded")
    assert "polite exists" in refused("convert", "legal", "polite", "--to", "graft", "--base", "embedded")
    assert "made for" in refused("convert", "legal", "out", "--to", "graft", "--base", "./other")


# --------------------------------------------------------------------------------------------------- data and train


def run_file(**changes: Any) -> str:
    """A run of a few seconds, in run.yaml."""
    settings: dict[str, Any] = {
        "base": "embedded",
        "precision": "fp32",
        "method": {"method": "lora", "rank": 2},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 3, "batch_size": 2},
        "output": "run",
    }
    Path("run.yaml").write_text(yaml.safe_dump(settings | changes))
    return "run.yaml"


def test_data_prints_its_report() -> None:
    out, _ = call("data", run_file())
    assert "rows" in out and "[[" in out and "Because." in out
    data = json.loads(call("data", "run.yaml", "--json", "data.limit=2")[0])
    assert data["train"]["rows"] == 2 and data["max_length"] == 512


def test_data_over_a_limit_shows_the_report_and_refuses() -> None:
    rows = Path("rows.jsonl").read_text()
    Path("rows.jsonl").write_text(rows + json.dumps({"prompt": "word " * 900, "references": ["x"]}) + "\n")
    out, err = call("data", run_file(), code=2)
    assert "rows too long" in out and err.startswith("error: 1 training row is longer than 512 tokens")
    assert "rows.jsonl row 4" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("trian.lr=1", "trian: unknown key; did you mean 'train'?"),
        ("train.epoch=1", "train.epoch: unknown key; did you mean 'epochs'?"),
        ("train.lr=fast", "train.lr"),
        ("train.batch_size=0", "train.batch_size"),
        ("method.rnak=4", "method.rnak"),
        ("method=lra", "did you mean 'lora'?"),
        ("method.targets=[attention.qery]", "did you mean 'attention.query'?"),
        ("data.train=row.jsonl", "did you mean 'rows.jsonl'?"),
        ("data.columns={prompt: question}", "no column 'question'"),
        ("data.template=chta", "did you mean 'chat'?"),
        ("base=./legal", "it is an adapter, give its base"),
        ("data.max_length=9000", "more than the 512 tokens"),
        ("train.lr", "expected key=value"),
    ],
)
def test_train_refuses_and_writes_nothing(change: str, message: str) -> None:
    assert message in refused("train", run_file(), change)


def test_train_refuses_a_missing_or_broken_file() -> None:
    assert "rum.yaml: no such file" in refused("train", "rum.yaml")
    Path("run.yaml").write_text("a: [")
    assert "run.yaml: not valid YAML" in refused("train", "run.yaml")


def test_train_then_use() -> None:
    call("train", run_file(), "name=mine")
    folder = next(path.parent for path in Path("run").rglob("graft.json") if "checkpoint" not in str(path))
    found = evaluated("--adapter", f"mine={folder}", "--metrics", "loss")
    assert set(found) == {"base", "mine"} and found["base"] != found["mine"]
    call("merge", "embedded", str(folder), "merged", "--precision", "fp32")


LABELLED = [{"text": text, "label": label} for text, label in (("so good", "yes"), ("bad", "no"), ("fine", "yes"))]


def test_a_classifier_from_training_to_a_plain_model() -> None:
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    call("train", run_file(data={"train": "labels.jsonl", "template": {"mode": "classification"}}))
    more = ["--data", "labels.jsonl", "--answers", "out.jsonl"]
    found = evaluated("--adapter", "run/adapter", *more)
    assert list(found) == ["base (random head)", "run"] and set(found["run"]) == {"loss", "accuracy", "macro_f1"}
    answers = [json.loads(line)["answers"] for line in Path("out.jsonl").read_text().splitlines()]
    assert {answer["run"] for answer in answers} <= {"yes", "no"}
    assert evaluated("--adapter", "run/adapter", "--data", "labels.jsonl") == found  # the head is seeded
    call("merge", "embedded", "run/adapter", "merged", "--precision", "fp32")
    arguments = ["evaluate", "./merged", "--data", "labels.jsonl", "--precision", "fp32", "--json"]
    assert json.loads(call(*arguments)[0])["base"] == pytest.approx(found["run"], abs=1e-4)
    assert "cannot generate text" in refused("chat", "embedded", "--adapter", "run/adapter", "--precision", "fp32")


def test_labels_as_words() -> None:
    Path("labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LABELLED))
    assert set(evaluated("--data", "labels.jsonl")["base"]) == {"accuracy", "macro_f1"}
    assert set(evaluated("--data", "labels.jsonl", "--metrics", "loss,accuracy,bleu")["base"]) == {
        "loss",
        "accuracy",
        "bleu",
    }


def test_an_encoder_decoder_from_training_to_a_plain_model() -> None:
    ids = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "decoder_start_token_id": 1}
    tiny("t5", **ids).save_pretrained("t5")
    transformers.AutoTokenizer.from_pretrained(ASSETS / "base").save_pretrained("t5")
    call("train", run_file(base="./t5"))
    arguments = ["./t5", "--adapter", "run/adapter", "--precision", "fp32", "--max-new-tokens", "5"]
    found = json.loads(call("evaluate", *arguments, "--data", "rows.jsonl", "--json")[0])
    assert set(found["run"]) == {"loss", "perplexity", "exact_match", "bleu", "rouge_l"}
    assert found["run"]["loss"] != found["base"]["loss"]
    out, _ = call("chat", *arguments, given="hello\n/base\nhello\n")
    assert "run: " in out and "base: " in out
    call("merge", "./t5", "run/adapter", "merged", "--precision", "fp32")
    assert transformers.AutoModelForSeq2SeqLM.from_pretrained("merged").config.is_encoder_decoder


def test_a_tied_head_is_merged_only_when_asked() -> None:
    model = graft.load_base("embedded", precision="fp32")
    adapter = graft.attach(model, graft.LoRA(rank=2, targets=["lm_head"]), "head")
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    graft.save(model, "head", "head")
    text = refused("merge", "embedded", "head", "merged", "--precision", "fp32")
    assert "shares its weight" in text and "merge with --untie to" in text
    call("merge", "embedded", "head", "merged", "--precision", "fp32", "--untie")
    plain = transformers.AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)


def test_ctrl_c_while_training_keeps_a_checkpoint() -> None:
    run_file(train={"max_steps": 5000, "batch_size": 2, "epochs": 5000})
    env = os.environ | {"PYTHONPATH": str(Path(graft.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([*PROGRAM, "train", "run.yaml"], env=env, stdout=-1, stderr=-1, text=True) as process:
        metrics = Path("run/metrics.jsonl")
        until = time.monotonic() + 60
        while time.monotonic() < until and not (metrics.exists() and metrics.read_text().count("\n") >= 1):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert list(Path("run/checkpoints").glob("checkpoint-*")), err


def test_schema() -> None:
    found = json.loads(call("schema")[0])
    assert {"base", "method", "data", "train", "output"} <= set(found["properties"])
