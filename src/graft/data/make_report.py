"""What a recipe's data came from and what was left out: as plain data for `report.json`, and in words."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.data.generate import Generated
from graft.data.items import Item, templates_of
from graft.data.mixing import Taken
from graft.data.pool import Pool
from graft.data.recipe import Recipe

EXAMPLES = 10


def made_report(
    recipe: Recipe,
    pool: Pool,
    taken: dict[str, Taken],
    made: Generated,
    parts: tuple[list[Item], list[Item], int],
    inputs: dict[str, str],
) -> dict[str, Any]:
    """Plain data: what became of each source's rows. `parts` is training, evaluation and the number of groups."""
    train, evaluation, groups = parts
    count = Counter(item.source for item in [*train, *evaluation]), len(train) + len(evaluation)
    sources = []
    for source in recipe.sources:
        name, rows = source.called, pool.rows[source.called]
        templates: list[Any] = list(enumerate(templates_of(source, rows), start=1)) or [(None, None)]
        sources.append(
            {
                "name": name,
                "data": source.data,
                "rows": len(rows),
                "duplicates": sum(one.startswith(f"{name} row ") for one, _ in pool.duplicates),
                "against": sum(each[name] for each in pool.against.values()),
                "rendered": taken[name].there,
                "taken": taken[name].taken,
                "share_asked": taken[name].asked,
                "share": count[0][name] / count[1],
                "train": sum(item.source == name for item in train),
                "eval": sum(item.source == name for item in evaluation),
                "templates": [
                    {
                        "number": number,
                        "template": text if isinstance(text, str | None) else text.model_dump(),
                        "train": sum(item.source == name and item.template == number for item in train),
                        "eval": sum(item.source == name and item.template == number for item in evaluation),
                    }
                    for number, text in templates
                ],
            }
        )
    return {
        "train": len(train),
        "eval": len(evaluation),
        "sources": sources,
        "duplicates": {
            "kind": recipe.deduplicate,
            "dropped": len(pool.duplicates),
            "first": [list(pair) for pair in pool.duplicates[:EXAMPLES]],
        },
        "against": {data: sum(each.values()) for data, each in pool.against.items()},
        "split": {"groups": groups, "near": recipe.near},
        "characters": {"train": _lengths(train), "eval": _lengths(evaluation)},
        "generate": made.to_dict() if recipe.generate is not None else None,
        "sha256": inputs,
    }


def _lengths(items: Sequence[Item]) -> dict[str, Any]:
    """Smallest, median, mean and largest number of characters."""
    if not items:
        return {}
    found = {}
    for part in ("prompt", "completion"):
        sizes = [
            len(item.completion or "")
            if part == "completion"
            else sum(len(turn.content) for turn in item.messages) or len(item.prompt)
            for item in items
        ]
        found[part] = {
            "min": min(sizes),
            "median": statistics.median(sizes),
            "mean": round(statistics.fmean(sizes), 1),
            "max": max(sizes),
        }
    return found


def in_words(report: dict[str, Any], folder: Path, finished_before: bool) -> list[str]:
    """The report as lines to print."""
    lines = [f"{folder}: {'finished before; ' if finished_before else ''}{report['train']} rows for training"]
    lines[0] += f", {report['eval']} for evaluation" if report["eval"] else ""
    for source in report["sources"]:
        given = source["train"] + source["eval"]
        asked = source["share_asked"]
        wanted = "" if asked is None else f", asked {asked:.1%}"
        gone = f"{source['duplicates']} duplicates" if source["duplicates"] else ""
        leaks = f"{source['against']} test questions" if source["against"] else ""
        less = ", ".join(filter(None, [gone, leaks]))
        lines.append(
            f"- {source['name']}: {source['rows']} rows{f' less {less}' if less else ''}, "
            f"{source['rendered']} rendered, {given} written ({source['share']:.1%} of all{wanted})"
        )
    generated = report["generate"]
    if generated is not None:
        lines.append(f"- answers: {generated['answers']} of {generated['requests']} prompts")
        lines[-1] += f", cost {generated['cost']:g}" if generated["cost"] else ""
        lines += [f"  left out: {count} {why}" for why, count in generated["dropped"].items()]
        lines += [f"  no answer: {where} ({why})" for where, why in list(generated["failed"].items())[:EXAMPLES]]
    return lines
