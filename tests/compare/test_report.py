"""The report: whole, safe against markup in labels, without network, and its pictures."""

from __future__ import annotations

import json
import struct
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_comparison import METHODS, comparison, entry, many, run, write

from graft.compare import report
from graft.compare.field import read
from graft.compare.pictures import curves_of, front
from graft.compare.report import write_report
from graft.compare.table import summarize, summary_json
from graft.errors import DataError

FILES = ["csv", "html", "md"]
NAMES = {
    "compare.json",
    "summary.json",
    *(f"report.{kind}" for kind in FILES),
    *(f"{name}.{kind}" for name in ("pareto", "curves") for kind in ("svg", "png")),
}
MARKUP = """<script>alert(1)</script><img src=x onerror='a'>&amp;"$x_1$'"""
EMPTY = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """The elements of a page; it fails where they are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def data(self) -> dict[str, Any]:
        """The embedded numbers, read without NaN."""
        text = next(text for tag, text in self.texts if tag == "script" and text.startswith("{"))
        found: dict[str, Any] = json.loads(text, parse_constant=lambda name: pytest.fail(name))
        return found


def page_of(folder: Path, found: dict[str, Any]) -> Page:
    """The page alone."""
    return Page(report.html(summarize(read(write(folder, found) / "compare.json"))))


def whole(folder: Path, found: dict[str, Any]) -> Page:
    """The page, with every other file."""
    write_report(write(folder, found))
    assert {path.name for path in folder.iterdir()} == NAMES
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def test_every_file_is_written_whole(tmp_path: Path) -> None:
    page = whole(tmp_path, comparison())
    for name in ("pareto", "curves"):
        assert ElementTree.parse(tmp_path / f"{name}.svg").getroot().tag.endswith("svg")
        head = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">II", head[16:])) > 400
    assert all(one.get("scope") in ("col", "row") for one in page.all("th"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [str(one["href"]) for one in page.all("a")]
    assert all(link[1:] in ids for link in links if link.startswith("#")) and "./runs/65536-0/" in links


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, comparison())
    assert not [a for _, a in page.tags if "src" in a or str(a.get("href", "")).startswith(("http", "//"))]
    assert not page.all("link")
    style = "".join(text for tag, text in page.texts if tag == "style")
    assert (
        "url(" not in style and "@import" not in style and "prefers-color-scheme" in style and "@media print" in style
    )
    assert any("default-src 'none'" in str(one.get("content")) for one in page.all("meta"))


def test_the_verdict_and_numbers_are_in_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, comparison())
    summary = json.loads(summary_json(summarize(read(tmp_path / "compare.json"))))
    texts = [text for tag, text in page.texts if tag == "p"]
    assert all(line in texts for line in summary["verdict"]["lines"])
    found = page.data()
    assert [point["label"] for point in found["points"]] == [row["label"] for row in summary["rows"]]
    assert [point["values"]["quality"] for point in found["points"]] == [row["quality"] for row in summary["rows"]]
    assert {curve["label"] for curve in found["curves"]} == {row["label"] for row in summary["rows"][:9]}
    assert sum(attributes.get("data-value") == "65536.0" for attributes in page.all("td")) >= 1


@pytest.mark.parametrize(("metric", "shown"), [("loss", "1.93"), ("accuracy", "-1.93")])
def test_the_rates_tried_show_the_metric_itself(metric: str, shown: str, tmp_path: Path) -> None:
    """A score is the higher the better; of a loss it is the negative."""
    made = comparison() | {"search": {"metric": metric}}
    page = page_of(tmp_path, made)
    values = {attributes.get("data-value") for attributes in page.all("td")}
    assert shown in values and not values & ({"-1.93", "1.93"} - {shown})
    assert any(attributes.get("data-words") == metric for attributes in page.all("th"))


def test_a_pair_without_variance_is_undecided(tmp_path: Path) -> None:
    made = comparison()
    made["entries"] = [entry(label, [run(seed, 5.0 + k, 10, 10) for seed in range(2)]) for k, label in enumerate("ab")]
    page = page_of(tmp_path, made)
    texts = {text.strip() for _, text in page.texts}
    assert "undecided" in texts and any("no test can tell" in text for tag, text in page.texts if tag == "td")


def test_labels_with_markup_are_text(tmp_path: Path) -> None:
    made = comparison() | {"title": MARKUP, "base": MARKUP, "metric": "bleu"}
    made["entries"][0] |= {"label": MARKUP, "method": MARKUP, "settings": {MARKUP: {MARKUP: [MARKUP]}}, "why": MARKUP}
    made["entries"][0]["tried"][0] |= {"why": MARKUP}
    made["entries"][0]["runs"][0] |= {"folder": 'runs/"><script>', "why": MARKUP}
    made["entries"][1]["runs"][0] |= {"folder": "javascript:alert(1)"}
    page = page_of(tmp_path, made)
    clean = page_of(tmp_path / "clean", comparison())
    assert len(page.all("script")) == len(clean.all("script")) == 2 and not page.all("img")
    assert not [a for _, a in page.tags if any(key.startswith("on") for key in a)]
    assert not [a for a in page.all("a") if str(a["href"]).startswith("javascript")]
    assert MARKUP in [point["label"] for point in page.data()["points"]]
    assert sum(MARKUP in text for _, text in page.texts) > 5


def test_thirty_methods(tmp_path: Path) -> None:
    page = whole(tmp_path, comparison(2, many(30)))
    assert len(page.data()["points"]) == 34
    assert any(str(a.get("class")) == "long" for a in page.all("details"))


@pytest.mark.parametrize("count", [1, 30])
def test_one_seed(count: int, tmp_path: Path) -> None:
    page = page_of(tmp_path, comparison(1, many(count)))
    assert any("No test against" in text for tag, text in page.texts if tag == "p")


def test_one_method_alone(tmp_path: Path) -> None:
    made = comparison() | {"entries": [entry("lora", [run(seed, 5.0 + seed, 10, 10) for seed in range(3)])]}
    page = page_of(tmp_path, made)
    assert any("nothing to test" in text for _, text in page.texts)


def test_all_failed(tmp_path: Path) -> None:
    page = whole(tmp_path, comparison() | {"entries": [entry("a", [], status="failed", why="no memory", lr=None)]})
    assert any("no run has a value" in text for _, text in page.texts)


def test_only_what_must_be_there(tmp_path: Path) -> None:
    made = {"version": 1, "metric": "accuracy", "entries": [{"label": "a", "runs": [{"quality": {"accuracy": 0.5}}]}]}
    assert page_of(tmp_path, made).data()["points"][0]["values"]["quality"] == 0.5


def test_odd_letters_in_pictures(tmp_path: Path) -> None:
    """Dollars are no formula, a leading underscore hides nothing, and a missing glyph is no error."""
    made = comparison(1)
    whole(tmp_path / "plain", made)
    for one, label in zip(made["entries"], ("$\\frac$", "_hidden", "模型", "ab", ""), strict=False):
        one["label"] = label
    whole(tmp_path / "odd", made)
    for name in ("pareto.svg", "curves.svg"):
        plain, odd = (ElementTree.parse(tmp_path / each / name).getroot() for each in ("plain", "odd"))
        assert _texts(odd) == _texts(plain) > 3, name


def _texts(picture: ElementTree.Element) -> int:
    """How many texts a picture of matplotlib has; an empty one is none."""
    return sum(group.get("id", "").startswith("text_") for group in picture.iter())


def test_the_same_comparison_gives_the_same_files(tmp_path: Path) -> None:
    for name in "ab":
        write_report(write(tmp_path / name, comparison(2, METHODS[:3])))
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_a_broken_comparison_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text("{}")
    with pytest.raises(DataError, match="version None"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["compare.json"]


def test_a_matrix_has_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "matrix_html", lambda found: f"<p>cells: {found['cells']}</p>")
    page = page_of(tmp_path / "a", comparison() | {"matrix": {"cells": 3}})
    assert ("p", "cells: 3") in page.texts and any(a.get("href") == "#matrix" for a in page.all("a"))
    assert not [a for a in page_of(tmp_path / "b", comparison()).all("a") if a.get("href") == "#matrix"]


def test_front_against_every_pair() -> None:
    points = [(1.0, 5.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 9.0), (1.0, 5.0), (4.0, 8.0), (0.0, 1.0)]

    def beaten(p: tuple[float, float], sign: int) -> bool:
        return any(q[0] <= p[0] and sign * q[1] >= sign * p[1] and q != p for q in points)

    for sign in (1, -1):
        right = {place for place, point in enumerate(points) if not beaten(point, sign)}
        assert set(front(points, sign > 0)) == right


def test_curves_are_means_over_the_finished_seeds(tmp_path: Path) -> None:
    lines = [[{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "eval_loss": 5.0}], [{"step": 1, "loss": 4.0}]]
    runs = [run(seed, 5.0, 10, 10, curve=curve) for seed, curve in enumerate(lines)]
    runs.append(run(2, 5.0, 10, 10, status="failed", curve=[{"step": 1, "loss": 99.0}]))
    made = comparison() | {"entries": [entry("a", runs, status="partial")]}
    summary = summarize(read(write(tmp_path, made) / "compare.json"))
    assert curves_of(summary.rows[0].entry, "loss") == [(1, 3.0, 2.0, 4.0), (2, 1.0, 1.0, 1.0)]
    assert curves_of(summary.rows[0].entry, "eval_loss") == [(2, 5.0, 5.0, 5.0)]
