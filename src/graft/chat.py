"""Chat in a terminal: answers appear as they are written, and the adapter can change between two of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase, TextStreamer

from graft import roles
from graft.data.read import near
from graft.data.rows import Row
from graft.data.template import Template, chat_row
from graft.errors import DataError, GraftError
from graft.evaluate.batches import bank_or_none, context_of, quiet
from graft.evaluate.generate import Decoding, answer_ids, check_generates

HELP = "/adapter NAME  /base  /adapters  /reset  /help  /exit"
LEAST_ROOM = 16
"""Tokens that an answer must have room for, or the oldest turns are dropped."""


class _Writer(TextStreamer):
    """Hands each finished piece of text on, and keeps them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.write = write
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.pieces else text.lstrip()
        if text:
            self.pieces.append(text)
            self.write(text)


@dataclass
class Chat:
    """A conversation with a model and its adapters.

    Args:
        templates: the template of each adapter by name, and that of the base under None.
        entry: the adapter that answers, None for the base.
        system: a message that stands before every conversation.
        write: gets every piece of text that the user shall see.

    Raises:
        ConfigError: the model writes no text.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    templates: Mapping[str | None, Template]
    write: Callable[[str], None]
    entry: str | None = None
    system: str | None = None
    decoding: Decoding = field(default_factory=lambda: Decoding(max_new_tokens=256))
    turns: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_generates(self.model)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that can be taken."""
        bank = bank_or_none(self.model)
        return () if bank is None else bank.names

    @property
    def speaker(self) -> str:
        """What stands before an answer."""
        return self.entry or "base"

    def run(self, lines: Iterable[str]) -> None:
        """Answer line after line until /exit or the end; an error is said and the chat goes on."""
        for line in lines:
            line = line.strip()
            try:
                if line.startswith("/"):
                    if self.command(line):
                        return
                elif line:
                    self.reply(line)
            except GraftError as error:
                self.write(f"error: {error}\n")

    def command(self, line: str) -> bool:
        """Do what a line with a slash says; True if the chat ends."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/exit":
            return True
        if word == "/base":
            self._take(None)
        elif word == "/adapter" and rest in self.names:
            self._take(rest)
        elif word == "/adapter" and rest:
            self.write(f"no adapter '{rest}'{near(rest, self.names)}; there are: {', '.join(self.names) or 'none'}\n")
        elif word in ("/adapter", "/adapters"):
            marked = [f"{'*' if name == self.entry else ' '} {name or 'base'}\n" for name in (*self.names, None)]
            self.write("".join(marked))
        elif word == "/reset":
            self.turns.clear()
            self.write("The conversation starts anew.\n")
        elif word == "/help":
            self.write(f"{HELP}\n")
        else:
            self.write(f"unknown command {word}; {HELP}\n")
        return False

    def reply(self, text: str) -> str:
        """Answer one message, writing as it is made; Ctrl-C ends the answer and keeps what is there.

        Raises:
            DataError: the message alone is longer than the context.
        """
        self.turns.append({"role": "user", "content": text})
        template = self.templates[self.entry]
        try:
            prompt = self._fitting(template)
        except GraftError:
            self.turns.pop()
            raise
        self.write(f"{self.speaker}: ")
        writer = _Writer(self.tokenizer, self.write, skip_prompt=not roles.is_encoder_decoder(self.model))
        stopped = ""
        try:
            with quiet(self.model):
                answer_ids(self.model, self.tokenizer, [prompt], [self.entry], self.decoding, streamer=writer)
        except KeyboardInterrupt:
            stopped = " (stopped)"
        except BaseException:
            self.turns.pop()
            self.write("\n")
            raise
        answer = "".join(writer.pieces).strip()
        self.write(f"{'' if answer else '(no text)'}{stopped}\n")
        self.turns.append({"role": "assistant", "content": answer})
        return answer

    def _take(self, entry: str | None) -> None:
        self.entry = entry
        self.write(f"Now {self.speaker} answers.\n")

    def _fitting(self, template: Template) -> list[int]:
        """The prompt's tokens; the oldest exchanges are dropped, aloud, where the context is too short for all."""
        limit = context_of(self.model, self.tokenizer)
        room = 0 if roles.is_encoder_decoder(self.model) else min(LEAST_ROOM, self.decoding.max_new_tokens)
        while True:
            prompt = template.prompt_ids(self._row(template), self.tokenizer)
            if limit is None or len(prompt) + room <= limit:
                return prompt
            if len(self.turns) < 2 or not _holds_turns(template):
                raise DataError(f"the message has {len(prompt)} tokens and the context {limit}; write a shorter one")
            del self.turns[:2]
            self.write("(the oldest turns are forgotten: the context is full)\n")

    def _row(self, template: Template) -> Row:
        """The conversation as the template takes it: whole, or only the last message."""
        if _holds_turns(template):
            system = self.system or template.system
            first = [{"role": "system", "content": system}] if system else []
            return chat_row([*first, *self.turns])
        text = self.turns[-1]["content"]
        fields = {name: text for name in ("text", "prompt", "instruction")}
        # The answer is never shown to the model; a row without one is no row.
        return Row(form="prompt", index=1, source="chat", prompt=text, completion="-", fields=fields)


def _holds_turns(template: Template) -> bool:
    return template.kind == "chat" and template.task is None


def lines_of(source: TextIO, greeting: str) -> Iterator[str]:
    """The user's lines: asked for in a terminal, read as they are from a file or pipe."""
    if not source.isatty():
        yield from source
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  arrow keys and history in input()
    print(greeting)
    try:
        while True:
            yield input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
