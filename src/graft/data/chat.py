"""Conversations through a tokenizer's chat template: the text, and where each assistant turn begins and ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from graft.data.encode import Rendered
from graft.data.rows import Message
from graft.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def template_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own chat template."""
    try:
        return tokenizer.get_chat_template()
    except ValueError:
        raise ConfigError(
            "the tokenizer has no chat template; set data template kind to instruction, alpaca or plain, "
            "or give template chat_template"
        ) from None


def render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    where: str,
    prompt: bool = False,
) -> str:
    """The text of a conversation; with `prompt`, up to where the assistant speaks next."""
    from jinja2 import TemplateError

    template = template or template_text(tokenizer)
    turns = [{"role": m.role, "content": m.content} for m in messages]
    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses this conversation ({error}); mend or remove it") from None


def render_turns(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None, where: str, turns: str
) -> Rendered:
    """The whole conversation up to its last end token, and the span of each assistant turn ("all", or only the "last").

    A turn begins where the generation prompt of the conversation before it ends, and runs to the end token that the
    template writes after it. What a template writes beyond (a newline) belongs to no turn.
    """
    full = render(messages, tokenizer, template, where)
    spans = []
    for number, message in enumerate(messages):
        last = number == len(messages) - 1
        if message.role == "assistant" and (last or turns == "all"):
            start = _start(messages, number, full, tokenizer, template, where)
            stop = len(full) if last else _stop(messages, number, full, start, tokenizer, template, where)
            stop = _to_end_token(full, start, stop, tokenizer.eos_token)
            _check_said(message.content, full[start:stop], number, where)
            spans.append((start, stop))
    return Rendered(full[: spans[-1][1]], tuple(spans), begin=False)


def _check_said(content: str, trained: str, number: int, where: str) -> None:
    """Refuse a template that leaves out what the assistant said; templates may set white space anew."""
    if "".join(content.split()) not in "".join(trained.split()):
        raise DataError(
            f"{where}: the chat template leaves out some or all of turn {number + 1}, which would be trained; "
            "set another template chat_template, or remove from the turn what the template drops"
        )


def _start(
    messages: Sequence[Message],
    number: int,
    full: str,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    where: str,
) -> int:
    """Where assistant turn `number` begins in the full text."""
    before = messages[:number]
    prefix = render(before, tokenizer, template, where, prompt=True) if before else ""
    if before and full.startswith(prefix):
        return len(prefix)
    # A generation prompt that the finished text lacks (an opened <think>): the turn begins with its content.
    prefix = render(before, tokenizer, template, where) if before else ""
    found = full.find(messages[number].content.strip(), len(prefix)) if full.startswith(prefix) else -1
    if found < 0:
        raise DataError(
            f"{where}: the chat template rewrites earlier turns, so turn {number + 1} cannot be found; "
            "set template turns to last"
        )
    return found


def _stop(
    messages: Sequence[Message],
    number: int,
    full: str,
    start: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    where: str,
) -> int:
    """Where assistant turn `number`, which is not the last, ends in the full text."""
    upto = render(messages[: number + 1], tokenizer, template, where)
    if full.startswith(upto):
        return len(upto)
    # A template that treats the last turn apart: the turn ends with its content and the end token right after it.
    content = messages[number].content.strip()
    found = full.find(content, start)
    if found < 0:
        raise DataError(
            f"{where}: the chat template rewrites earlier turns, so turn {number + 1} cannot be found; "
            "set template turns to last"
        )
    stop = found + len(content)
    end = tokenizer.eos_token or ""
    gap = len(full[stop:]) - len(full[stop:].lstrip())
    return stop + gap + len(end) if end and full.startswith(end, stop + gap) else stop


def _to_end_token(full: str, start: int, stop: int, end: str | None) -> int:
    """`stop`, or right after the last end token of the turn if it has one."""
    found = full.rfind(end, start, stop) if end else -1
    return found + len(end) if end and found >= 0 else stop
