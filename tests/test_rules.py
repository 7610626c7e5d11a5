"""The rules that are tests: floors, sizes, who may know which names, the public surface, what is never loaded.

`BAD` proves that each rule on source (`rules.py`) can fail, `GOOD` that it is not too eager. GRAFT_UPDATE_SNAPSHOT=1
records the CLI's verbs and options anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from rules import (
    API,
    RULES,
    SRC,
    File,
    floors,
    method_classes,
    method_docs,
    method_names,
    module_names,
    package,
    quantizers,
    sizes,
    unsafe_loads,
)

ROOT = Path(__file__).parents[1]
SNAPSHOT = ROOT / "tests" / "cli_snapshot.txt"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule: Callable[[File], Iterator[str]]) -> None:
    complaints = [f"src/graft/{file.path}:{complaint}" for file in package() for complaint in rule(file)]
    assert not complaints, f"{inspect.getdoc(rule)}\n" + "\n".join(complaints)


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_scripts_keep_sizes_and_load_safely(path: Path) -> None:
    file = File(path.name, path.read_text(encoding="utf-8"))
    assert not [*sizes(file), *unsafe_loads(file)]


BAD = [
    (floors, "roles.py", "from graft.bank import attach"),
    (floors, "roles.py", "def f():\n    from . import bank"),
    (floors, "methods/lora.py", "from ..files import save"),
    (floors, "bank.py", "import importlib\nimportlib.import_module('graft.files')"),
    (floors, "train/run.py", "from graft.cli import main"),
    (floors, "train/run.py", "from graft import attach"),
    (floors, "train/run.py", "import graft"),
    (floors, "bank.py", "from graft import route"),
    (floors, "helpers.py", "x = 1"),
    (floors, "route.py", "x = 1"),
    (sizes, "bank.py", "x = 1\n" * 401),
    (sizes, "bank.py", "class A:\n    def f(self):\n" + "        x = 1\n" * 60),
    (module_names, "bank.py", "kind = model.config.model_type"),
    (module_names, "files.py", "kind = config['model_type']"),
    (module_names, "methods/lora.py", "import re"),
    (module_names, "base.py", "from re import compile"),
    (method_names, "bank.py", "if isinstance(method, LoRA): pass"),
    (method_names, "cli.py", "from graft.methods import lora\nlora.LoRA(rank=8)"),
    (method_names, "plan.py", "if kind == 'LoRA': pass"),
    (method_names, "describe.py", "from graft.methods.lora import LoRA as Low"),
    (quantizers, "bank.py", "import bitsandbytes as bnb"),
    (quantizers, "plan.py", "def f():\n    from torchao.quantization import quantize_"),
    (quantizers, "train/run.py", "name = type(m).__name__ == 'Linear4bit'"),
    (quantizers, "methods/lora.py", "isinstance(m, bnb.nn.Linear8bitLt)"),
    (unsafe_loads, "files.py", "import pickle\npickle.load(f)"),
    (unsafe_loads, "files.py", "from pickle import loads"),
    (unsafe_loads, "files.py", "torch.load(path)"),
    (unsafe_loads, "files.py", "torch.load(path, weights_only=False)"),
    (unsafe_loads, "files.py", "torch.load(path, weights_only=1)"),
    (unsafe_loads, "files.py", "torch.load(path, weights_only=flag)"),
    (unsafe_loads, "files.py", "from torch import load"),
    (unsafe_loads, "base.py", "M.from_pretrained(p, trust_remote_code=True)"),
    (unsafe_loads, "base.py", "M.from_pretrained(p, **{'trust_remote_code': flag})"),
    (unsafe_loads, "data/rows.py", "np.load(p, allow_pickle=True)"),
    (unsafe_loads, "train/run.py", "yaml.load(text, Loader=yaml.Loader)"),
    (method_docs, "methods/foo.py", '"""(B, T, I)."""\nclass Foo(Method): pass'),
    (method_docs, "methods/foo.py", '"""Hu et al. 2021."""\nclass Foo(Method): pass'),
]
GOOD = [
    (floors, "bank.py", "from graft import roles\nfrom graft.routes import Route\nimport torch\nfrom . import weights"),
    (floors, "method.py", "import graft.methods"),
    (floors, "methods/dora.py", "from graft.methods.lora import LoRA\nfrom .lora import LoRADelta"),
    (floors, "files_forms.py", "from graft.files import save"),
    (floors, "forms/lora.py", "from graft.methods.lora import LoRA"),
    (module_names, "forms/lora.py", "import re"),
    (floors, "cli.py", "import graft\nfrom graft.train.run import run"),
    (floors, "__init__.py", "from graft.cli import main"),
    (sizes, "bank.py", "def f():\n" + "    x = 1\n" * 59),
    (module_names, "roles.py", "import re\nkind = config.model_type"),
    (module_names, "data/template.py", "import re"),
    (module_names, "files.py", '"""What model_type is for."""\nimport re'),
    (method_names, "files.py", "LoRA"),
    (method_names, "methods/dora.py", "class DoRA(LoRA): pass"),
    (method_names, "cli.py", "print('LoRA of rank 8 is trained')"),
    (quantizers, "weights.py", "import bitsandbytes\nLinear4bit"),
    (quantizers, "train/config.py", "precision: Literal['nf4', 'int8'] = 'nf4'"),
    (unsafe_loads, "train/state.py", "torch.load(path, weights_only=True)\nyaml.safe_load(t)\njson.load(f)"),
    (unsafe_loads, "base.py", "M.from_pretrained(p, trust_remote_code=False)"),
    (unsafe_loads, "files.py", "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass"),
    (method_docs, "methods/foo.py", '"""Hu et al. 2021, x_BTI."""\nclass Foo(Method): pass'),
    (method_docs, "methods/__init__.py", ""),
]


def case(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("rule", "path", "text"), BAD, ids=case)
def test_rule_can_fail(rule: Callable[[File], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(File(path, text, frozenset({"LoRA"}))))


@pytest.mark.parametrize(("rule", "path", "text"), GOOD, ids=case)
def test_rule_is_not_too_eager(rule: Callable[[File], Iterator[str]], path: str, text: str) -> None:
    assert not list(rule(File(path, text, frozenset({"LoRA"}))))


def test_method_classes_are_found() -> None:
    text = "class LoRA(Method): pass\nclass DoRA(lora.LoRA): pass\nclass _X(LoRA): pass\nclass LoRADelta(Delta): pass"
    assert method_classes([File("methods/lora.py", text)]) == {"LoRA", "DoRA"}


# ------------------------------------------------------------------------------------------------- the public surface


def surface(module: types.ModuleType, expected: Iterable[str]) -> Iterator[str]:
    """`__all__` is sorted and complete; each entry is no module, has a docstring and full type hints."""
    names = list(module.__all__)
    if names != sorted(set(names)):
        yield f"__all__ is not sorted or names something twice: {names}"
    yield from (f"{name} is missing from __all__" for name in sorted({*expected} - {*names}))
    loaded = {name for name, value in vars(module).items() if not isinstance(value, types.ModuleType)}
    public = {name for name in loaded if not name.startswith("_") and name != "annotations"}
    yield from (f"{name} is public but not in __all__" for name in sorted(public - {*names}))
    for name in names:
        value = getattr(module, name, None)
        if value is None:
            yield f"{name} is in __all__ and nowhere else"
            continue
        if isinstance(value, types.ModuleType):
            yield f"{name} is a module: the import of a file of that name hid it"
            continue
        if not name.startswith("__"):
            doc = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
            if not doc or doc.startswith(f"{name}("):  # what a dataclass without a docstring gets
                yield f"{name} has no docstring"
            yield from untyped(name, value)


def untyped(name: str, value: object) -> Iterator[str]:
    """Public functions and methods without full type hints."""
    members = vars(value) if inspect.isclass(value) else {}
    functions = {f"{name}.{member}": inspect.unwrap(m) for member, m in members.items() if not member.startswith("_")}
    for label, function in {name: value, **functions}.items():
        if not inspect.isfunction(function) or not function.__module__.startswith("graft"):
            continue
        signature = inspect.signature(inspect.unwrap(function))
        given = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        bare = [p.name for p in given if p.annotation is p.empty]
        if bare or signature.return_annotation is signature.empty:
            yield f"{label} lacks type hints: {', '.join(bare) or 'what it returns'}"


def test_all_is_sorted_complete_documented_and_typed() -> None:
    graft = importlib.import_module("graft")
    for file in package():  # a file may have the name of a function: once imported, it must not hide it
        module = file.path.removesuffix(".py").replace("/", ".")
        if not module.endswith(("__init__", "__main__")):
            importlib.import_module(f"graft.{module}")
    errors = importlib.import_module("graft.errors")
    expected = API | {name for name in vars(errors) if name.endswith("Error")} | package()[0].methods
    complaints = list(surface(graft, expected))
    assert not complaints, "\n".join(complaints)


def test_surface_can_complain() -> None:
    module = types.ModuleType("graft")
    module.__all__ = ["a", "B", "gone", "route"]
    exec("class B: pass\ndef a(x): 'A.'\ndef hidden(): pass\nimport json as route", vars(module))
    found = "\n".join(surface(module, {"a", "attach"}))
    wrong = ["is not sorted", "attach is missing", "hidden is public", "B has no docstring", "a lacks type hints"]
    for part in [*wrong, "gone is in __all__ and", "route is a module"]:
        assert part in found


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has imported after the code."""
    report = "\nimport sys, json; sys.stderr.write('\\n' + json.dumps(sorted(sys.modules)))"
    env = os.environ | {"PYTHONPATH": str(SRC.parent)}
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def has_cli() -> bool:
    return (SRC / "cli.py").exists() or (SRC / "cli" / "__init__.py").exists()


needs_cli = pytest.mark.skipif(not has_cli(), reason="graft.cli is not written yet")
HELP = "import sys; sys.argv = ['graft', '--help']\nfrom graft.cli import main\ntry: main()\nexcept SystemExit: pass"


@pytest.mark.parametrize("code", ["import graft", pytest.param(HELP, marks=needs_cli)], ids=["import", "help"])
def test_light_imports(code: str) -> None:
    heavy = {"torch", "transformers", "datasets", "peft", "sklearn", "scipy", "matplotlib"} & modules_after(code)
    assert not heavy, f"imported: {sorted(heavy)}"
    assert "colorsys" in modules_after("import colorsys"), "the check itself must see an import"


def command_lines(command: object, path: str = "graft") -> Iterator[str]:
    """One line for each verb, argument and option."""
    yield path
    for parameter in getattr(command, "params", []):
        if parameter.name in ("install_completion", "show_completion"):
            continue
        names = " / ".join(", ".join(group) for group in (parameter.opts, parameter.secondary_opts) if group)
        value = "" if getattr(parameter, "is_flag", False) else " VALUE" if names.startswith("-") else ""
        many = " ..." if parameter.nargs == -1 or getattr(parameter, "multiple", False) else ""
        need = " (required)" if parameter.required else ""
        yield f"{path}  {names}{value}{many}{need}"
    for name, verb in sorted(getattr(command, "commands", {}).items()):
        yield from command_lines(verb, f"{path} {name}")


@needs_cli
def test_cli_is_frozen() -> None:
    typer = importlib.import_module("typer")
    cli = importlib.import_module("graft.cli")
    app = next(value for value in vars(cli).values() if isinstance(value, typer.Typer))
    lines = list(command_lines(typer.main.get_command(app)))
    if os.environ.get("GRAFT_UPDATE_SNAPSHOT") == "1":
        SNAPSHOT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = SNAPSHOT.read_text(encoding="utf-8").splitlines() if SNAPSHOT.exists() else []
    gone, new = [line for line in known if line not in lines], [line for line in lines if line not in known]
    changes = "\n".join([*(f"- {line}" for line in gone), *(f"+ {line}" for line in new)])
    assert lines == known, f"the CLI changed; if that is wanted, GRAFT_UPDATE_SNAPSHOT=1 records it\n{changes}"


def test_command_lines_see_verbs_and_options() -> None:
    typer = importlib.import_module("typer")
    app = typer.Typer()

    @app.callback()
    def main() -> None: ...

    @app.command()
    def train(
        run: str,
        overrides: list[str] = typer.Argument(None),  # noqa: B008
        steps: int = 3,
        fresh: bool = False,
    ) -> None: ...

    lines = list(command_lines(typer.main.get_command(app)))
    assert lines[:3] == ["graft", "graft train", "graft train  run (required)"]
    options = ["overrides ...", "--steps VALUE", "--fresh / --no-fresh"]
    assert lines[3:] == [f"graft train  {option}" for option in options]
