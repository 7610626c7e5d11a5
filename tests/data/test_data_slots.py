"""Templates that place pseudo-tokens: their ids among the others, in training and generation; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from graft.data.collate import flatten, pad, truncate
from graft.data.encode import text_of
from graft.data.report import report
from graft.data.rows import Row
from graft.data.tasks import Task
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.ids import IGNORED, SLOT

PLACED = ("{slots:3} {text} {slots:2}\nis it good? {slots:1}",)


def ask(text: str, completion: str = "yes", index: int = 1) -> Row:
    fields = {"text": text}
    return Row(form="prompt", index=index, source="a.jsonl", prompt=text, completion=completion, fields=fields)


def label(text: str, value: str) -> Row:
    return Row(form="label", index=1, source="a.jsonl", text=text, label=value, fields={"text": text, "label": value})


def plain(*templates: str, **more: Any) -> Template:
    return Template(kind="plain", task=Task(templates=templates or PLACED), **more)


def test_ids_are_those_of_the_pieces(bpe: PreTrainedTokenizerBase) -> None:
    """Text between pseudo-tokens is tokenized apart; the answer trains, and generation starts from the rest."""
    example = plain().example(ask("the quick fox"), bpe)
    pieces = [bpe(text, add_special_tokens=False).input_ids for text in (" the quick fox ", "\nis it good? ", " yes")]
    end = bpe.eos_token_id
    assert example.input_ids == [*[SLOT] * 3, *pieces[0], *[SLOT] * 2, *pieces[1], SLOT, *pieces[2], end]
    answer = [*pieces[2], end]
    assert example.labels == [IGNORED] * (len(example) - len(answer)) + answer
    assert plain().prompt_ids(ask("the quick fox"), bpe) == example.input_ids[: -len(answer)]
    assert plain().slots == 6 and Template().slots == 0 and plain("{text}?").slots == 0


@pytest.mark.parametrize("kind", ["instruction", "alpaca", "chat"])
def test_frames_keep_them(kind: str, bpe: PreTrainedTokenizerBase) -> None:
    template = Template(kind=kind, task=Task(templates=PLACED))
    row = ask("the quick fox")
    example, start = template.example(row, bpe), template.prompt_ids(row, bpe)
    assert example.input_ids.count(SLOT) == start.count(SLOT) == 6
    assert example.input_ids[: len(start)] == start
    bare = Template(kind=kind, task=Task(templates=(" {text} \nis it good? ",))).render_prompt(row, bpe)
    assert bpe.decode([i for i in start if i != SLOT]) == bare


def test_one_begin_token_stands_before_all(bos_bpe: PreTrainedTokenizerBase) -> None:
    ids = plain().prompt_ids(ask("the dog"), bos_bpe)
    assert ids[:4] == [bos_bpe.bos_token_id, SLOT, SLOT, SLOT] and ids.count(bos_bpe.bos_token_id) == 1


def test_everything_trained_but_pseudo_tokens(bpe: PreTrainedTokenizerBase) -> None:
    example = plain(train_on="all").example(ask("the dog"), bpe)
    assert example.labels == [IGNORED if i == SLOT else i for i in example.input_ids] and SLOT in example.input_ids


@pytest.mark.parametrize("mode", ["seq2seq", "classification"])
def test_special_tokens_stand_around(mode: str, words: PreTrainedTokenizerBase) -> None:
    """[CLS] P text P [SEP], and the number of the label or the decoder's target."""
    more: dict[str, Any] = {"label_names": ("bad", "good")} if mode == "classification" else {}
    template = plain("{slots:1} {text} {slots:2}", mode=mode, **more)
    row = label("the lazy dog", "good")
    example = template.example(row, words)
    text = words("the lazy dog", add_special_tokens=False).input_ids
    wanted = [words.bos_token_id, SLOT, *text, SLOT, SLOT, words.eos_token_id]
    assert example.input_ids == wanted
    if mode == "classification":
        assert example.labels == [1] and example.token_type_ids == [0] * len(wanted)
        assert pad([example], words, mode=mode)["token_type_ids"].shape == (1, len(wanted))
    else:
        assert template.prompt_ids(row, words) == wanted


def test_a_classifier_reads_its_template(words: PreTrainedTokenizerBase) -> None:
    template = plain("is the {text} lazy", mode="classification", label_names=("bad", "good"))
    assert template.example(label("dog", "bad"), words).input_ids == words("is the dog lazy").input_ids


def test_batches_and_the_report(bpe: PreTrainedTokenizerBase) -> None:
    rows = [ask("the quick fox"), ask("the dog", index=2)]
    examples = plain().examples(rows, bpe)
    assert (pad(examples, bpe)["input_ids"] == SLOT).sum(-1).tolist() == [6, 6]
    packed = flatten(examples)
    assert int((packed["input_ids"] == SLOT).sum()) == 12 and int((packed["labels"] == SLOT).sum()) == 0
    found = report(examples, None, bpe, max_length=50, mode="causal")
    assert found.samples[0][0] == ("{slots:3} the quick fox {slots:2}\nis it good? {slots:1}", False)
    assert text_of([SLOT, *bpe("a").input_ids], bpe) == "{slots:1}a"


def test_a_cut_takes_no_pseudo_token(bpe: PreTrainedTokenizerBase, words: PreTrainedTokenizerBase) -> None:
    example = plain().example(ask("the quick fox"), bpe)
    last = max(i for i, token in enumerate(example.input_ids) if token == SLOT)
    assert truncate(example, last + 1).input_ids == example.input_ids[: last + 1]
    with pytest.raises(DataError, match=rf"a.jsonl row 1: cut to {last} tokens it would lose pseudo-tokens"):
        truncate(example, last)
    template = plain("{text} {slots:1}", mode="classification", label_names=("bad", "good"))
    short = template.example(label("the lazy dog", "bad"), words)
    assert truncate(short, len(short), "classification") is short
    with pytest.raises(DataError, match=r"raise data\.max_length"):
        truncate(short, len(short) - 1, "classification")


@pytest.mark.parametrize("template", ["{slots}", "{slots:3}", "{{slots:3}} {slots:1}"])
def test_a_column_may_have_the_name(template: str) -> None:
    row = Row(form="prompt", index=1, source="a", prompt="p", completion="c", fields={"slots": "many"})
    expected = {
        "{slots}": ("many", 0),
        "{slots:3}": ("\ufdd0" * 3, 3),
        "{{slots:3}} {slots:1}": ("{slots:3} \ufdd0", 1),
    }
    made = plain(template)
    assert (made.render_prompt(row), made.slots) == expected[template]


@pytest.mark.parametrize("bad", ["{slots:0}", "{slots:x}", "{slots:-1}", "{slots:1.5}", "{text:3}", "{slots:3!r}"])
def test_bad_placeholders(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"placeholder|expected '}'|conversion"):
        Task(templates=(bad,))


def test_each_template_has_as_many() -> None:
    with pytest.raises(ConfigError, match="1 pseudo-tokens, the first template has 6"):
        plain(*PLACED, "{slots:1} {text}")
    both = plain(*PLACED, "{slots:6} {text}")
    assert both.slots == 6 and Template.from_dict(both.to_dict()) == both


def test_the_character_that_marks_them_is_none_of_the_data(bpe: PreTrainedTokenizerBase) -> None:
    row = ask("the \ufdd0 fox")
    for template, count in ((plain(), 6), (Template(kind="plain"), 0)):
        for make in (template.example, template.prompt_ids):
            with pytest.raises(DataError, match=rf"a.jsonl row 1: {count + 1} pseudo-tokens .* has {count}; U\+FDD0"):
                make(row, bpe)
    silent = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(DataError, match="0 pseudo-tokens in its text, the template has 6"):
        Template(task=Task(templates=PLACED), chat_template=silent).prompt_ids(ask("the fox"), bpe)


def test_nothing_else_has_changed(bpe: PreTrainedTokenizerBase, words: PreTrainedTokenizerBase) -> None:
    """Without pseudo-tokens the ids are the tokenizer's own."""
    template = Template(kind="plain", task=Task(templates=("{text}:",)))
    whole = bpe("the quick fox: yes", add_special_tokens=False).input_ids
    assert template.example(ask("the quick fox"), bpe).input_ids == [*whole, bpe.eos_token_id]
    seq = Template(kind="plain", mode="seq2seq", task=Task(templates=("{text}",)))
    assert seq.prompt_ids(ask("the lazy dog"), words) == words("the lazy dog").input_ids
