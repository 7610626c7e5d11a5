"""The report of a comparison: one HTML page that needs no network, and the same as CSV, JSON, Markdown, SVG and PNG."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template

from graft.compare import page, pictures
from graft.compare.field import FILE, Compared, read
from graft.compare.matrix_page import matrix_html
from graft.compare.table import Summary, csv_text, markdown, summarize, summary_json
from graft.disk import write_text


def write_report(folder: Path | str, cost: str = "trainable", level: float = 0.05) -> Summary:
    """Write the report of the comparison in a folder, beside its `compare.json`.

    The files are `report.html`, `report.csv`, `report.md`, `summary.json`, `pareto.svg`, `pareto.png`, `curves.svg` and
    `curves.png`; each is renamed into place, the page last.

    Args:
        folder: where `compare.json` is.
        cost: by which the cheapest of those that do not differ from the best is chosen; the keys of
            `graft.compare.table.COSTS`.
        level: the family-wise error rate of the tests.

    Returns:
        The table and the verdict, for `graft.compare.table.terminal`.

    Raises:
        ConfigError: an unknown cost.
        DataError: `compare.json` is missing or broken; nothing is written.
    """
    folder = Path(folder)
    summary = summarize(read(folder / FILE), cost, level)
    pictures.pareto(summary, [folder / "pareto.svg", folder / "pareto.png"])
    pictures.curves(summary, [folder / "curves.svg", folder / "curves.png"])
    write_text(folder / "report.csv", csv_text(summary))
    write_text(folder / "report.md", markdown(summary))
    write_text(folder / "summary.json", summary_json(summary))
    write_text(folder / "report.html", html(summary))
    return summary


def html(summary: Summary) -> str:
    """The page."""
    compared = summary.compared
    parts = {
        "table": ("The field", page.field(summary)),
        "front": ("Quality against cost", page.pareto(summary)),
        "learning": ("Learning curves", page.curves(summary)),
        "tests": ("Pairs", page.pairs(summary)),
        "matrix": ("Fine-tuning against in-context learning", _matrix(compared)),
        "methods": ("Each entry", page.entries(summary)),
        "same": ("The same for all", page.same_for_all(compared)),
    }
    shown = {name: part for name, part in parts.items() if part[1]}
    rows = compared.data.get("rows") or {}
    sizes = ", ".join(f"{count:,} rows for {name}" for name, count in rows.items() if isinstance(count, int))
    subtitle = f"{len(compared.entries)} entries on {compared.base}" + (f"; {sizes}" if sizes else "")
    return Template(_asset("report.html")).substitute(
        title=page.text(compared.title),
        subtitle=page.text(subtitle),
        css=_asset("report.css"),
        js=_asset("report.js"),
        data=page.embedded(page.data(summary)),
        verdict="\n".join(f"<p>{page.text(line)}</p>" for line in summary.verdict.lines),
        nav=" ".join(f'<a href="#{name}">{page.text(title)}</a>' for name, (title, _) in shown.items()),
        body="\n".join(page.section(name, title, body) for name, (title, body) in shown.items()),
    )


def _matrix(compared: Compared) -> str:
    """The matrix of fine-tuning against in-context learning, where the comparison has one."""
    return "" if compared.matrix is None else matrix_html(compared.matrix)


def _asset(name: str) -> str:
    return (resources.files("graft") / "assets" / "compare" / name).read_text(encoding="utf-8")
