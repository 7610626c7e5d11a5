"""Print docs/methods.md, the table of all methods, from the registry: after a change run

python scripts/methods_table.py > methods.md && mv methods.md docs/methods.md
"""

from __future__ import annotations

from pathlib import Path

import graft.files_forms  # fills the registry of forms
import graft.methods  # noqa: F401  fills the registry of methods
from graft.forms.base import FORMS
from graft.method import REGISTRY, Method, SelectMethod

PAGES = Path(__file__).parents[1] / "docs" / "methods"
HEAD = """\
# The methods

Made from the registry by `scripts/methods_table.py`. The name is the one for YAML (`method: lora`) and the CLI;
`examples/<name>.yaml` trains each one on four rows in seconds, from the root of the repository:

    graft train examples/lora.yaml
"""
FOOT = """\
- **acts on**: `linear` the weights of linears (LoRA's of embeddings too); `module` the outputs of modules, or copies of
  their weights; `attention` the attention inside a layer; `input` tokens in front of or inside the text; `select` the
  base's own weights; `several` the places of its parts.
- **merges**: into the base's weights. `some`: it depends on its settings or parts; the page says on which.
- **routes**: each row of a batch may have another adapter beside it, in `forward`, `generate` and training.
- **peft**: the `peft_type` of the folder, where peft's form computes the same; else our own form, which peft refuses.
  Composed adapters have a folder for each part, in its own form.
- **trains**: with the default settings; a task head, where there is one, comes on top. I inputs and O outputs of a
  linear, r `rank`, n `count`, P `length`, S `size`, D the model's width, F the feed-forward's, L layers, H heads,
  K heads of keys and values, d the size of a head, V the vocabulary, H' the encoder's `hidden`.
"""


def page_of(cls: type[Method]) -> Path | None:
    """The method's page: the one of its name, or the one whose title names its class."""
    own = PAGES / f"{cls.name}.md"
    if own.is_file():
        return own
    titles = {page: page.read_text(encoding="utf-8").partition("\n")[0] for page in sorted(PAGES.glob("*.md"))}
    return next((page for page, title in titles.items() if cls.__name__ in title.strip("# ").split(", ")), None)


def row(cls: type[Method]) -> str:
    """One line of the table."""
    page = page_of(cls)
    merges = {True: "yes", False: "no"}[cls.merges] if isinstance(cls.merges, bool) else "some"
    kinds = [form.kind for form in FORMS.values() if cls in form.methods]
    cells = [
        f"[`{cls.name}`](methods/{page.name})" if page else f"`{cls.name}`",
        f"`{cls.__name__}`",
        cls.place,
        merges,
        "no" if issubclass(cls, SelectMethod) else "yes",
        f"`{kinds[0]}`" if kinds else "own",
        cls.trains,
        cls.paper,
    ]
    return "| " + " | ".join(cells) + " |"


def table() -> str:
    """The whole page."""
    head = "| name | class | acts on | merges | routes | peft | trains | paper |\n|---|---|---|---|---|---|---|---|"
    rows = [row(cls) for _, cls in sorted(REGISTRY.items())]
    return "\n".join([HEAD, head, *rows, "", FOOT])


if __name__ == "__main__":
    print(table(), end="")
