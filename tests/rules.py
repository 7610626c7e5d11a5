"""Rules on source: each is a function from a `File` to complaints, "line: what is wrong". `test_rules.py` runs them."""

from __future__ import annotations

import ast
import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SRC = Path(__file__).parents[1] / "src" / "graft"

# Floor -> modules and folders at the top of the package. A new one must be put here.
FLOORS = {
    0: ("errors", "settings", "disk", "ids", "weights", "vocabulary", "roles", "copies", "method"),
    1: (
        "routes",
        "hooks",
        "positions",
        "slots",
        "slot_hooks",
        "freeze",
        "adapter",
        "bank",
        "attend",
        "interface",
        "adapt",
        "texts",
        "fast",
    ),
    2: ("methods", "forms"),
    3: ("base", "files*", "probe", "description", "combining", "merging", "foreign"),
    4: ("data",),
    5: ("train", "align", "evaluate", "planning"),
    6: ("compare", "measure", "serve", "page", "cli*", "quickstart", "chat", "convert", "__main__"),
}
REGISTRY_FILLS_ITSELF = ("method", "methods")  # the one import upwards: the registry looks a method up by name
FILE_LINES, FUNCTION_LINES = 400, 60
API = {"attach", "detach", "use", "route", "prepare", "save", "load", "merge", "unmerge", "combine", "describe"}
API |= {"load_base", "Adapter", "labelled_loss", "token_logprobs"}
QUANTIZERS = {"bitsandbytes", "torchao"}
QUANTIZER_CLASSES = re.compile(r"Linear4bit|Linear8bit(Lt)?|Params4bit|Int8Params|(BitsAndBytes|TorchAo)Config")
UNPICKLERS = {"load", "loads", "Unpickler"}
UNSAFE_IMPORT = re.compile(r"(pickle|dill|cloudpickle|torch|joblib)\.(load|loads|Unpickler)|yaml\.(unsafe_|full_)?load")
SHAPES = re.compile(r"\([A-Za-z](, ?[\w ]+)+\)|_[A-Z]{2,3}\b")
PAPER = re.compile(r"arXiv|\b(19|20)\d\d\b|[Nn]o paper")


@dataclass(frozen=True)
class File:
    """A source file: its path inside the package, its text, and the class names of all methods."""

    path: str
    text: str
    methods: frozenset[str] = frozenset()

    @functools.cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def top(self) -> str:
        """The module or folder at the top of the package that this file belongs to."""
        return Path(self.path).parts[0].removesuffix(".py")

    @property
    def floor(self) -> int | None:
        return floor_of(self.top)

    def words(self) -> Iterator[tuple[int, str, bool]]:
        """(line, word, is a string) of each name, attribute, keyword and string; docstrings are prose and left out."""
        prose = {
            id(node.body[0].value)
            for node in ast.walk(self.tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and ast.get_docstring(node, clean=False) is not None
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
                yield node.lineno, node.value, True
            elif isinstance(node, ast.Name | ast.Attribute | ast.ClassDef):
                yield node.lineno, getattr(node, "id", None) or getattr(node, "attr", None) or node.name, False
            elif isinstance(node, ast.keyword) and node.arg:
                yield node.value.lineno, node.arg, False
            elif isinstance(node, ast.alias):
                yield node.lineno, node.name.rpartition(".")[2], False

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name) of each import, wherever it stands; relative ones resolved, constant dynamic ones too."""
        package = ["graft", *Path(self.path).parts[:-1]]
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                start = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*start, *([node.module] if node.module else [])])
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
            elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
                yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def floor_of(top: str) -> int | None:
    """The floor of a module or folder at the top of the package; None if the map does not have it."""
    return next((n for n, names in FLOORS.items() if any(fnmatch.fnmatch(top, name) for name in names)), None)


def called(call: ast.Call) -> str:
    """The last name of what is called: `load` for `torch.load(...)`."""
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def floors(file: File) -> Iterator[str]:
    """A file imports only from its own floor or lower ones, and names inside from where they live."""
    if file.path == "__init__.py":  # lazy: it names everything and imports nothing
        return
    if file.top in API:
        yield f"1: graft.{file.top} is a function; a module of that name hides it once it is imported"
    if file.floor is None:
        yield f"1: {file.top} is not in the map FLOORS of tests/rules.py"
        return
    for line, name in file.imports():
        root, _, rest = name.partition(".")
        if root != "graft":
            continue
        top = rest.partition(".")[0]
        floor = floor_of(top) if top else None
        if floor is None:
            if file.floor < 6:
                yield f"{line}: {name} from the package itself; import it from the file where it lives"
        elif floor > file.floor and (file.top, top) != REGISTRY_FILLS_ITSELF:
            yield f"{line}: floor {file.floor} imports {name} of floor {floor}"


def sizes(file: File) -> Iterator[str]:
    """No file over 400 lines, no function over 60."""
    if (lines := len(file.text.splitlines())) > FILE_LINES:
        yield f"{lines}: {lines} lines, {FILE_LINES} are allowed"
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES:
            yield f"{node.lineno}: {node.name} has {lines} lines, {FUNCTION_LINES} are allowed"


def module_names(file: File) -> Iterator[str]:
    """Regexes on module names and `model_type` only where the vocabulary is; files have names of their own."""
    if file.path in ("roles.py", "vocabulary.py") or file.top == "foreign":
        return
    yield from (f"{line}: model_type" for line, word, _ in file.words() if re.search(r"\bmodel_type\b", word))
    if file.floor is not None and file.floor <= 3 and not file.top.startswith(("files", "forms")):
        yield from (f"{line}: import re" for line, name in file.imports() if name.split(".")[0] == "re")


def method_names(file: File) -> Iterator[str]:
    """No method's class outside methods/, forms/, foreign/, files*.py and __init__.py; in messages it is prose."""
    if file.path == "__init__.py" or file.top in ("methods", "forms", "foreign") or file.top.startswith("files"):
        return
    yield from (f"{line}: {word}" for line, word, _ in file.words() if word in file.methods)


def quantizers(file: File) -> Iterator[str]:
    """Quantizer imports and classes only in weights.py and base.py."""
    if file.path in ("weights.py", "base.py"):
        return
    yield from (f"{line}: import of {name}" for line, name in file.imports() if name.split(".")[0] in QUANTIZERS)
    yield from (f"{line}: {word}" for line, word, _ in file.words() if QUANTIZER_CLASSES.fullmatch(word))


def unsafe_loads(file: File) -> Iterator[str]:
    """No pickle, no torch.load but with weights_only=True, no code from the hub, no yaml.load."""
    for line, name in file.imports():
        if UNSAFE_IMPORT.fullmatch(name):
            yield f"{line}: import of {name}"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner, attr = node.value.id, node.attr
            if owner in ("pickle", "dill", "cloudpickle", "joblib") and attr in UNPICKLERS:
                yield f"{node.lineno}: {owner}.{attr}"
            if owner == "yaml" and attr in ("load", "load_all", "unsafe_load", "full_load"):
                yield f"{node.lineno}: yaml.{attr}; use yaml.safe_load"
        if isinstance(node, ast.Call):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if ast.unparse(node.func) in ("torch.load", "torch.serialization.load") and not is_(
                given.get("weights_only"), True
            ):
                yield f"{node.lineno}: torch.load without weights_only=True"
            if "trust_remote_code" in given and not is_(given["trust_remote_code"], False):
                yield f"{node.lineno}: trust_remote_code"
            if "allow_pickle" in given and not is_(given["allow_pickle"], False):
                yield f"{node.lineno}: allow_pickle"
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if is_(key, "trust_remote_code") and not is_(value, False):
                    yield f"{node.lineno}: trust_remote_code"


def is_(node: ast.expr | None, value: object) -> bool:
    """Whether the node is this very constant."""
    return isinstance(node, ast.Constant) and type(node.value) is type(value) and node.value == value


def method_docs(file: File) -> Iterator[str]:
    """The docstrings of a file with a method have its paper (or 'no paper') and shapes."""
    if file.top != "methods" or not method_classes([file]):
        return
    text = (ast.get_docstring(file.tree) or "") + "".join(
        ast.get_docstring(node) or "" for node in file.tree.body if isinstance(node, ast.ClassDef)
    )
    if not PAPER.search(text):
        yield "1: the docstring names no paper (author and year), nor says 'no paper'"
    if not SHAPES.search(text):
        yield "1: the docstring has no shapes, like (B, T, I) or x_BTI"


RULES: list[Callable[[File], Iterator[str]]] = [
    floors,
    sizes,
    module_names,
    method_names,
    quantizers,
    unsafe_loads,
    method_docs,
]


def method_classes(files: Iterable[File]) -> frozenset[str]:
    """Names of the public classes that descend from Method."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for file in files
        for node in file.tree.body
        if isinstance(node, ast.ClassDef)
    }
    found = {"Method"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return frozenset(name for name in found - {"Method"} if not name.startswith("_"))


@functools.cache
def package() -> tuple[File, ...]:
    """Every source file of the package."""
    texts = {path.relative_to(SRC).as_posix(): path.read_text(encoding="utf-8") for path in sorted(SRC.rglob("*.py"))}
    names = method_classes(File(path, text) for path, text in texts.items() if path.startswith("methods/"))
    return tuple(File(path, text, names) for path, text in texts.items())
