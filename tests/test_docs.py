"""Every python, bash and console block of README.md and docs/ runs, so that no documented feature can rot.

The blocks of one file run in order, in one empty folder; its python blocks share their names. In a console block the
lines after `$ ` are the commands, the rest is output and not compared. HTML comments on lines of their own steer:

    <!-- not run: reason -->     before a block: it is left out; the reason is mandatory
    <!-- file: run.yaml -->      before a block of any language: it is written to that file instead of being run
    <!-- exits: 2 -->            before a bash or console block: its exit code
    <!-- setup                   python that runs here unseen, up to the closing mark; `<!-- setup bash` for commands
    -->
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from forked import forked_graft

ROOT = Path(__file__).parents[1]
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]
RUN = {"python": "python", "py": "python", "bash": "bash", "sh": "bash", "shell": "bash", "console": "console"}
FENCE = re.compile(r"^ *(```+|~~~+) *([\w+-]*)")
COMMENT = re.compile(r"^ *<!--(.*?)(-->)? *$")
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Block:
    """A piece of a page: what kind it is, its text, the line where its text begins, and what was said before it."""

    kind: str
    text: str
    line: int
    said: dict[str, str] = field(default_factory=dict)


class PageError(ValueError):
    """A page's marks are wrong; the message begins with the line."""


def blocks(text: str) -> Iterator[Block]:
    """The blocks that run or are written to files, in order.

    Raises:
        PageError: a mark without its value, one before no block, or a block that does not end.
    """
    lines = text.splitlines()
    said: dict[str, str] = {}
    number = 0
    while number < len(lines):
        line, number = lines[number], number + 1
        if fence := FENCE.match(line):
            start = number
            while number < len(lines) and lines[number].strip() != fence[1]:
                number += 1
            if number == len(lines):
                raise PageError(f"{start}: the block does not end")
            code = textwrap.dedent("\n".join(lines[start:number])) + "\n"
            number += 1
            kind = RUN.get(fence[2].lower(), "")
            if "not run" not in said and (kind or "file" in said):
                yield Block(kind, code, start + 1, said)
            said = {}
        elif comment := COMMENT.match(line):
            start, body = number, [comment[1]]
            closed = bool(comment[2])
            while not closed and number < len(lines):
                closed = lines[number].rstrip().endswith("-->")
                body.append(lines[number].rstrip().removesuffix("-->"))
                number += 1
            if body[0].split()[:1] == ["setup"]:
                kind = RUN.get((body[0].split()[1:] or ["python"])[0], "python")
                yield Block(kind, textwrap.dedent("\n".join(body[1:])) + "\n", start + 1)
            else:
                said |= mark("\n".join(body), start)
        elif line.strip() and said:
            raise PageError(f"{number}: {said} stands before no block")
    if said:
        raise PageError(f"{number}: {said} stands before no block")


def mark(body: str, line: int) -> dict[str, str]:
    """What a comment says to this test; other comments say nothing."""
    key, _, value = (part.strip() for part in body.partition(":"))
    if key not in ("not run", "file", "exits"):
        return {}
    if not value:
        raise PageError(f"{line}: <!-- {key}: ... --> needs its {'reason' if key == 'not run' else 'value'}")
    return {key: value}


def commands(block: Block) -> str:
    """The bash text of a block: all of it, or what follows the prompts of a console block."""
    if block.kind == "bash":
        return block.text
    found, going_on = [], False
    for line in block.text.splitlines():
        if going_on or line.startswith("$ "):
            found.append(line if going_on else line[2:])
            going_on = line.endswith("\\")
    return "\n".join(found) + "\n"


@pytest.fixture(scope="module")
def forked() -> Iterator[str]:
    """A folder with the forking `graft`, where there is one."""
    if sys.platform != "linux":
        yield ""
        return
    with forked_graft() as folder:
        yield folder


def environment(scratch: Path, forked: str = "") -> dict[str, str]:
    """The shell of the blocks: the programs of `forked` and of this interpreter first, the sources importable, no
    network."""
    programs = Path(sys.executable).parent
    if not (programs / "graft").exists():  # the tests run from the sources, not installed
        (scratch / "graft").write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "from graft.cli import main; main()" "$@"\n', encoding="utf-8"
        )
        (scratch / "graft").chmod(stat.S_IRWXU)
    path = os.pathsep.join(filter(None, [forked, str(programs), str(scratch), os.environ["PATH"]]))
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}


def run_page(page: Path, folder: Path, env: dict[str, str]) -> None:
    """Run a page's blocks in the folder, which is the current one; the first failure names the page's line."""
    names: dict[str, object] = {"__name__": "__main__"}
    try:
        found = list(blocks(page.read_text(encoding="utf-8")))
    except PageError as error:
        pytest.fail(f"{page}:{error}", pytrace=False)
    for block in found:
        if "file" in block.said:
            target = folder / block.said["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.text, encoding="utf-8")
        elif block.kind == "python":
            run_python(page, block, names)
        else:
            run_bash(page, block, env)


def run_python(page: Path, block: Block, names: dict[str, object]) -> None:
    """Execute a block so that its tracebacks carry the page's lines."""
    try:
        exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), names)
    except (Exception, SystemExit) as error:
        frames = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(page)]
        line = frames[-1] if frames else getattr(error, "lineno", None) or block.line
        tail = "".join(traceback.format_exception(error)[-6:])
        pytest.fail(f"{page}:{line}: {type(error).__name__}: {error}\n{tail}", pytrace=False)


def run_bash(page: Path, block: Block, env: dict[str, str]) -> None:
    """Run a block in a shell that stops at the first failing command."""
    text, expected = commands(block), int(block.said.get("exits", "0"))
    shell = ["bash", "-euo", "pipefail", "-c", text]
    try:
        done = subprocess.run(
            shell, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"{page}:{block.line}: not done after {LIMIT_SECONDS} s\n{text}", pytrace=False)
    if done.returncode != expected:
        tail = "\n".join([*done.stdout.splitlines()[-15:], *done.stderr.splitlines()[-25:]])
        pytest.fail(f"{page}:{block.line}: exit code {done.returncode}, not {expected}\n{text}{tail}", pytrace=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forked: str) -> None:
    folder, scratch = tmp_path / "work", tmp_path / "bin"
    folder.mkdir()
    scratch.mkdir()
    monkeypatch.chdir(folder)
    run_page(page, folder, environment(scratch, forked))


# ----------------------------------------------------------------------------------------------------- the test itself

PAGE = """# Title
<!-- an ordinary comment -->
<!-- setup
kept = 40
-->
Words.

```python
kept += 1
```

1. In a list:

   ~~~bash
   test "$(cat a/run.yaml)" = "rank: 8"
   ~~~

<!-- file: a/run.yaml -->

```yaml
rank: 8
```
<!-- setup bash
printf x > unseen
-->
<!-- not run: needs the network -->
```bash
exit 9
```
```text
never run
```
<!-- exits: 2 -->
```console
$ cat unseen && \\
  exit 2
$ exit 3
x
```
```py
from pathlib import Path
assert kept == 41 and Path("unseen").read_text() == "x"
```
"""


def page_of(tmp_path: Path, text: str) -> Path:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_blocks_are_found_and_marked() -> None:
    found = list(blocks(PAGE))
    assert [(b.kind, b.line) for b in found] == [
        ("python", 4),
        ("python", 9),
        ("bash", 15),
        ("", 21),
        ("bash", 24),
        ("console", 35),
        ("python", 41),
    ]
    assert found[2].text == 'test "$(cat a/run.yaml)" = "rank: 8"\n'
    assert commands(found[5]) == "cat unseen && \\\n  exit 2\nexit 3\n"


def test_a_good_page_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    yaml_first = PAGE.replace("1. In a list:", "<!-- file: a/run.yaml -->\n```yaml\nrank: 8\n```\n1. In a list:")
    run_page(page_of(tmp_path, yaml_first), tmp_path, environment(tmp_path))
    assert (tmp_path / "a/run.yaml").read_text() == "rank: 8\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n```python\nx = 1\nx.y\n```\n", r"page.md:4: AttributeError"),
        ("```python\nx = (\n```\n", r"page.md:2: SyntaxError"),
        ("```python\nraise SystemExit(2)\n```\n", r"page.md:2: SystemExit"),
        ("\n```bash\ntrue\nfalse\ntrue\n```\n", r"page.md:3: exit code 1, not 0"),
        ("```console\n$ echo why >&2; exit 4\n```\n", r"(?s)page.md:2: exit code 4, not 0.*why"),
        ("<!-- exits: 2 -->\n```bash\ntrue\n```\n", r"page.md:3: exit code 0, not 2"),
        ("<!-- not run: -->\n```bash\nfalse\n```\n", r"page.md:1: .*needs its reason"),
        ("<!-- not run -->\n```bash\nfalse\n```\n", r"page.md:1: .*needs its reason"),
        ("<!-- not run: slow -->\nWords.\n```bash\nfalse\n```\n", r"page.md:2: .*before no block"),
        ("<!-- setup\nundefined\n-->\n", r"page.md:2: NameError"),
        ("```python\nx = 1\n", r"page.md:1: the block does not end"),
    ],
)
def test_a_bad_page_fails_by_line(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(pytest.fail.Exception, match=message):
        run_page(page_of(tmp_path, text), tmp_path, environment(tmp_path))


def test_the_shell_has_graft(tmp_path: Path) -> None:
    assert shutil.which("graft", path=environment(tmp_path)["PATH"])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each command is started anew")
def test_a_forked_command_is_the_program(tmp_path: Path, forked: str) -> None:
    """Arguments, folder, environment, streams and exit codes are those of a `graft` that is started anew."""
    script = """
        cd "$(mktemp -d -p .)"
        graft --version | tee "a file" && ls
        COLUMNS=50 graft merge --help
        graft no-such-verb || echo "code $?"
        graft merge 2>&1 || echo "code $?"
    """
    answers = []
    assert shutil.which("graft", path=environment(tmp_path, forked)["PATH"]) == f"{forked}/graft"
    for env in (environment(tmp_path), environment(tmp_path, forked)):
        done = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True)
        answers.append((done.returncode, done.stdout, done.stderr))
    assert answers[0] == answers[1] and answers[0][1].count("code 2") == 2
