"""The matrix as files: JSON, CSV, a heat map (PNG and SVG), and a fragment of HTML."""

from __future__ import annotations

import csv
import io
import json
import os
from html import escape
from pathlib import Path
from typing import Any

from graft.compare.cells import LEVEL
from graft.disk import write_text

LEAST = 0.2
"""A difference that has full colour, if none is larger: small ones shall look small."""
JSON, CSV, HTML, PICTURE = "matrix.json", "matrix.csv", "matrix.html", "matrix"


def write_page(found: dict[str, Any], folder: Path) -> None:
    """Write `matrix.json`, `matrix.csv`, `matrix.html`, `matrix.png` and `matrix.svg`, each whole.

    Args:
        found: see `cells.summary`.
        folder: it is there.
    """
    write_text(folder / JSON, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / CSV, _csv(found))
    write_text(folder / HTML, matrix_html(found))
    plot(found, folder / PICTURE)


def matrix_html(found: dict[str, Any]) -> str:
    """The matrix of each test and pattern, the accuracies and the notes as HTML without head, scripts or pictures.

    Args:
        found: see `cells.summary`.
    """
    parts = [
        '<section class="matrix"><h2>Fine-tuning against in-context learning</h2>',
        f"<p>{escape(_caption(found))}</p>",
    ]
    parts += [f"<p>{escape(note)}</p>" for note in found["notes"]]
    rows, columns = _axes(found)
    for test, pattern in _panels(found) if found["cells"] else ():
        parts.append(f"<h3>{escape(_title(found, test, pattern))}</h3>")
        parts.append('<div style="overflow-x:auto"><table><thead><tr><th>fine-tuning minus in-context learning</th>')
        parts += [f"<th>{escape(column)}</th>" for column in columns]
        parts.append("</tr></thead><tbody>")
        for row in rows:
            cells = "".join(_td(_cell(found, test, pattern, row, column)) for column in columns)
            parts.append(f"<tr><th>{escape(row)}</th>{cells}</tr>")
        parts.append("</tbody></table></div>")
    parts.append("<h3>Accuracies</h3>" + _table(found) + "</section>\n")
    return "".join(parts)


def plot(found: dict[str, Any], stem: Path) -> None:
    """A heat map for each test and pattern, `<stem>.png` and `<stem>.svg`, renamed into place.

    Cells with p < .05 have a frame; stars as in the caption. Without any cell there is no picture, and an old one goes.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = _axes(found)
    files = [stem.with_suffix(f".{kind}") for kind in ("png", "svg")]
    if not found["cells"]:
        for file in files:
            file.unlink(missing_ok=True)
        return
    tests, patterns = _tests(found), list(found["facts"]["patterns"])
    most = max((LEAST, *(abs(cell["difference"]) for cell in found["cells"])))
    width = 2.2 + len(patterns) * (0.6 + 1.15 * len(columns))
    height = 1.6 + len(tests) * (0.6 + 0.6 * len(rows))
    with rc_context({"svg.hashsalt": "graft", "svg.fonttype": "none"}):
        figure = Figure(figsize=(max(width, 6.5), height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)  # no window, whatever the machine's settings say
        grid = figure.subplots(len(tests), len(patterns), squeeze=False)
        image = None
        for test, line in zip(tests, grid, strict=True):
            for pattern, axes in zip(patterns, line, strict=True):
                cells = [[_cell(found, test, int(pattern), row, column) for column in columns] for row in rows]
                heights = [[float("nan") if cell is None else cell["difference"] for cell in each] for each in cells]
                image = axes.imshow(heights, cmap="PuOr", vmin=-most, vmax=most, aspect="auto")
                for y, each in enumerate(cells):
                    for x, cell in enumerate(each):
                        dark = cell is not None and abs(cell["difference"]) > 0.65 * most
                        axes.text(x, y, _text(cell), ha="center", va="center", fontsize=8, color="w" if dark else "k")
                        if cell is not None and cell["p"] is not None and cell["p"] < LEVEL:
                            box = Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, fill=False, linewidth=1.6, edgecolor="k")
                            axes.add_patch(box)
                axes.set_xticks(range(len(columns)), columns if test == tests[-1] else [])
                axes.set_yticks(range(len(rows)), rows if pattern == patterns[0] else [])
                axes.set_title(_title(found, test, int(pattern)), fontsize=9)
                axes.tick_params(length=0)
                axes.spines[:].set_visible(False)
        figure.supxlabel("fine-tuning", fontsize=10)
        figure.supylabel("in-context learning", fontsize=10)
        figure.suptitle("Accuracy of fine-tuning minus in-context learning (framed: Welch's p < .05)", fontsize=11)
        if image is not None:
            figure.colorbar(image, ax=grid, shrink=0.8, format="{x:+.2f}")
        for file in files:
            partial, kind = file.with_name(file.name + ".partial"), file.suffix[1:]
            figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
            os.replace(partial, file)


def _csv(found: dict[str, Any]) -> str:
    """A line for each accuracy of a seed."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["base", "approach", "pattern", "test", "out_of_domain", "seed", "accuracy"])
    for entry in found["accuracies"]:
        outside = found["facts"]["tests"][entry["test"]]["out_of_domain"]
        for seed, value in zip(entry["seeds"], entry["values"], strict=True):
            lines.writerow([entry["base"], entry["approach"], entry["pattern"], entry["test"], outside, seed, value])
    return text.getvalue()


def _table(found: dict[str, Any]) -> str:
    """Accuracies: a line for each approach and pattern, a column for each test."""
    tests = _tests(found)
    of = {(entry["label"], entry["pattern"], entry["test"]): entry for entry in found["accuracies"]}
    lines = []
    for label, pattern in dict.fromkeys((label, pattern) for label, pattern, _ in of):
        cells = ""
        for test in tests:
            entry = of.get((label, pattern, test))
            cells += "<td></td>" if entry is None else f"<td>{escape(_accuracy(entry))}</td>"
        lines.append(f"<tr><th>{escape(label)}</th><td>{pattern}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(test)}</th>" for test in tests)
    return (
        f'<div style="overflow-x:auto"><table><thead><tr><th></th><th>pattern</th>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _accuracy(entry: dict[str, Any]) -> str:
    if len(entry["values"]) < 2:
        return f"{entry['mean']:.3f}"
    return f"{entry['mean']:.3f} ({entry['low']:.3f} to {entry['high']:.3f})"


def _panels(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Tests in domain first, each with all patterns."""
    return [(test, int(pattern)) for test in _tests(found) for pattern in found["facts"]["patterns"]]


def _tests(found: dict[str, Any]) -> list[str]:
    tests = found["facts"]["tests"]
    return sorted(tests, key=lambda test: bool(tests[test]["out_of_domain"]))


def _axes(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The names of the rows and of the columns."""
    cells = found["cells"]
    return list(dict.fromkeys(cell["row"] for cell in cells)), list(dict.fromkeys(cell["column"] for cell in cells))


def _cell(found: dict[str, Any], test: str, pattern: int, row: str, column: str) -> dict[str, Any] | None:
    wanted = {"test": test, "pattern": pattern, "row": row, "column": column}
    return next((cell for cell in found["cells"] if wanted.items() <= cell.items()), None)


def _stars(p: float | None) -> str:
    return "" if p is None else "*" * sum(p < level for level in (0.001, 0.01, LEVEL))


def _text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "no result"
    more = ["no test"] * (cell["p"] is None) + ["near chance"] * cell["near_chance"]
    return f"{cell['difference']:+.3f}{_stars(cell['p'])}" + "".join(f"\n{each}" for each in more)


def _td(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "<td>no result</td>"
    style = ' style="outline:2px solid;outline-offset:-2px"' if cell["p"] is not None and cell["p"] < LEVEL else ""
    test = "no test" if cell["p"] is None else f"p = {cell['p']:.2g}"
    near = ", near chance" if cell["near_chance"] else ""
    return f"<td{style}>{cell['difference']:+.3f}{_stars(cell['p'])} ({test}{near})</td>"


def _title(found: dict[str, Any], test: str, pattern: int) -> str:
    place = "out of domain" if found["facts"]["tests"][test]["out_of_domain"] else "in domain"
    return f"{test} ({place}), pattern {pattern}"


def _caption(found: dict[str, Any]) -> str:
    settings, facts = found["settings"], found["facts"]
    sets = ", ".join(f"{name} ({each['rows']} rows)" for name, each in facts["tests"].items())
    patterns = "; ".join(f"pattern {number}: {text!r}" for number, text in facts["patterns"].items())
    return (
        f"{settings['shots']} examples, {settings['seeds']} seeds; tests: {sets}; {patterns}. Each cell: the mean "
        "accuracy of fine-tuning minus that of in-context learning; * p < .05, ** p < .01, *** p < .001 (Welch), "
        "framed below .05."
    )
