"""Templates: which tokens are trained, against masks and tokens found in other ways; and every wrong setting."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from graft.data.rows import Message, Row
from graft.data.tasks import TASKS, Task
from graft.data.template import Example, Template, chat_row
from graft.errors import ConfigError, DataError

TURNS = (
    ("system", "be nice"),
    ("user", "hello there"),
    ("assistant", "I am fine"),
    ("user", "how are you?"),
    ("assistant", "\nthank you  "),
)
THINKING = (  # Qwen3's habit: only the last turn keeps its thoughts, and an empty one is put in
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENED = THINKING.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\nwell{% endif %}")
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat(turns: tuple[tuple[str, str], ...] = TURNS, **more: Any) -> Row:
    messages = tuple(Message(*turn) for turn in turns)
    return Row(form="chat", index=1, source="a.jsonl", messages=messages, completion=messages[-1].content, **more)


def ask(prompt: str, completion: str, index: int = 1, **more: Any) -> Row:
    fields = {"prompt": prompt, "completion": completion, **more}
    return Row(form="prompt", index=index, source="a.jsonl", prompt=prompt, completion=completion, fields=fields)


def label(text: str, value: int | str, index: int = 1, pair: str | None = None) -> Row:
    fields = {"text": text, "label": value} if pair is None else {"premise": text, "hypothesis": pair, "label": value}
    return Row(form="label", index=index, source="a.jsonl", text=text, pair=pair, label=value, fields=fields)


def trained(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = [[]]
    for token, value in zip(example.input_ids, example.labels, strict=True):
        assert value in (token, -100)
        runs[-1:] = [[*runs[-1], token]] if value != -100 else [runs[-1], []] if runs[-1] else [[]]
    return [tokenizer.decode(run) for run in runs if run]


# Chat -----------------------------------------------------------------------------------------------------------


def test_mask_equals_the_templates_own(bpe: PreTrainedTokenizerBase) -> None:
    """`{% generation %}` in the template lets transformers mark the assistant's tokens: another way to the mask."""
    row = chat()
    example = Template().example(row, bpe)
    messages = [m._asdict() for m in row.messages]
    own = bpe.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert example.input_ids == own["input_ids"][: len(example)]  # all but the newline after the last end token
    assert bpe.decode(own["input_ids"][len(example) :]) == "\n"
    mask = own["assistant_masks"][: len(example)]
    assert [label != -100 for label in example.labels] == [bool(m) for m in mask]
    assert trained(example, bpe) == ["I am fine<|im_end|>", "\nthank you  <|im_end|>"]


def test_last_turn_only_and_everything(bpe: PreTrainedTokenizerBase) -> None:
    assert trained(Template(turns="last").example(chat(), bpe), bpe) == ["\nthank you  <|im_end|>"]
    whole = Template(train_on="all").example(chat(), bpe)
    assert whole.labels == whole.input_ids == Template().example(chat(), bpe).input_ids
    assert whole.labels is not whole.input_ids


def test_generation_starts_from_the_trained_prefix(bpe: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase) -> None:
    for tokenizer in (bpe, base):
        for row in (chat(), ask("hello", " you are fine"), ask("hello", "\n\nyou"), ask("", "you")):
            for kind in ("chat", "plain", "instruction", "alpaca"):
                if kind != "chat" and row.form == "chat":
                    continue
                template = Template(kind=kind, turns="last" if kind == "chat" else "all")
                example = template.example(row, tokenizer)
                prompt = template.prompt_ids(row, tokenizer)
                assert example.input_ids[: len(prompt)] == prompt
                assert set(example.labels[: len(prompt)]) <= {-100}
                assert -100 not in example.labels[len(prompt) :]
                eos = tokenizer.eos_token_id
                assert example.labels[-1] == eos and example.labels[-2] != eos


def test_straddling_token_is_cut(bpe: PreTrainedTokenizerBase) -> None:
    """A blank at the prompt's end and the next word are one token in the whole text; the prompt's tokens must stand."""
    row = ask("the quick brown ", "fox", 1)
    example = Template(kind="plain").example(row, bpe)
    whole = bpe("the quick brown fox").input_ids
    prompt = bpe("the quick brown ").input_ids
    assert whole[: len(prompt)] != prompt  # ' fox' is one token: the case is real
    assert example.input_ids == [*prompt, *bpe("fox").input_ids, bpe.eos_token_id]


def test_template_that_rewrites_earlier_turns(bpe: PreTrainedTokenizerBase) -> None:
    template = Template(chat_template=THINKING)
    assert trained(template.example(chat(), bpe), bpe) == [
        "I am fine<|im_end|>",
        "<think>\n\n</think>\n\n\nthank you  <|im_end|>",
    ]
    opened = Template(chat_template=OPENED)  # the generation prompt opens a thought that the data do not have
    assert trained(opened.example(chat(TURNS[:3]), bpe), bpe) == ["I am fine<|im_end|>"]
    counted = Template(chat_template="{{ messages | length }}" + NO_END)
    with pytest.raises(DataError, match=r"a\.jsonl row 1: the chat template rewrites earlier turns"):
        counted.example(chat(), bpe)


@pytest.mark.parametrize("text", ["{{ messages[0].content }}", NO_END.replace("m['content']", "m['content'][:4]")])
def test_template_that_drops_the_answer(bpe: PreTrainedTokenizerBase, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl row 1: the chat template leaves out some or all of turn"):
        Template(chat_template=text).example(chat(TURNS[1:3]), bpe)


def test_end_token_is_added_when_the_template_has_none(bpe: PreTrainedTokenizerBase) -> None:
    example = Template(chat_template=NO_END).example(chat(TURNS[:3]), bpe)
    assert trained(example, bpe) == [" I am fine\n<|im_end|>"]
    assert example.input_ids.count(bpe.eos_token_id) == 1


def test_completion_that_ends_with_the_end_token(bpe: PreTrainedTokenizerBase) -> None:
    for completion in ("you<|im_end|>", "you<|im_end|><|im_end|>", "you"):
        example = Template(kind="plain").example(ask("hello", completion), bpe)
        assert trained(example, bpe) == [" you<|im_end|>"]


def test_one_begin_token(bos_bpe: PreTrainedTokenizerBase) -> None:
    bos = bos_bpe.bos_token_id
    for prompt in ("hello", "<s>hello", ""):
        example = Template(kind="plain").example(ask(prompt, "you"), bos_bpe)
        assert example.input_ids[0] == bos and example.input_ids.count(bos) == 1 and example.labels[0] == -100
        assert Template(kind="plain").prompt_ids(ask(prompt, "you"), bos_bpe).count(bos) == 1
    chat_template = "{{ '<s><s>' }}" + NO_END  # a template that doubles it
    example = Template(chat_template=chat_template).example(chat(TURNS[:3]), bos_bpe)
    assert example.input_ids.count(bos) == 1 and trained(example, bos_bpe) == [" I am fine\n<|im_end|>"]
    text = Row(form="text", index=1, source="a.jsonl", text="hello there")
    assert Template(train_on="all").example(text, bos_bpe).labels[0] == bos
    assert trained(Template().example(text, bos_bpe), bos_bpe) == ["hello there<|im_end|>"]


def test_many_rows_equal_one_by_one(bpe: PreTrainedTokenizerBase) -> None:
    rows = [chat(), ask("hello", "you"), chat(TURNS[:3]), ask("the ", "fox")]
    assert Template().examples(rows, bpe) == [Template().example(row, bpe) for row in rows]
    assert Template().examples([], bpe) == []


def test_system_message_and_chat_row(bpe: PreTrainedTokenizerBase) -> None:
    template = Template(system="be kind")
    text = template.render_prompt(chat_row([{"role": "user", "content": "hello"}]), bpe)
    assert text == "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert "be kind" not in template.render_prompt(chat(), bpe)


# Plain ----------------------------------------------------------------------------------------------------------


def test_plain_kinds(bpe: PreTrainedTokenizerBase) -> None:
    row = Row(form="instruction", index=1, source="a", prompt="Do {this}", context="with {prompt}", completion="Done")
    bare = Row(form="instruction", index=1, source="a", prompt="Do {this}", completion="Done")
    assert (
        Template(kind="instruction").render(row).text == "Instruction: Do {this}\nInput: with {prompt}\nResponse: Done"
    )
    assert Template(kind="alpaca").render_prompt(bare).endswith("### Instruction:\nDo {this}\n\n### Response:\n")
    assert Template(kind="alpaca").render(row).text.endswith("### Input:\nwith {prompt}\n\n### Response:\nDone")
    assert Template(kind="plain").render(bare).text == "Do {this} Done"
    assert Template(kind="plain", separator=" => ").render(bare).text == "Do {this} => Done"
    assert Template(kind="plain").render(ask("a:\n", "b")).text == "a:\nb"
    assert Template(kind="plain").render(chat(TURNS[:3])).text == "be nice\n\nhello there I am fine"
    with pytest.raises(DataError, match="one question and one answer"):
        Template(kind="plain").render(chat())


# Tasks ----------------------------------------------------------------------------------------------------------


def test_every_prompt_is_used_and_fixed_by_the_seed() -> None:
    task, rows = TASKS["sentiment"], [label("fine", "positive", i) for i in range(1, 1001)]
    prompts = [task.prompt(row, seed=3) for row in rows]
    assert prompts == [task.prompt(row, seed=3) for row in rows] != [task.prompt(row, seed=4) for row in rows]
    counts = Counter(prompts)
    assert len(counts) == len(task.templates) and min(counts.values()) > 140
    assert task.prompt(rows[0], seed=0) == "Someone wrote: fine\nTheir opinion is"  # so on every machine, for ever


@pytest.mark.parametrize("name", TASKS)
def test_known_tasks_fill_and_answer(name: str) -> None:
    task = TASKS[name]
    for index in range(20):
        row = label("p", 0, index, pair="h" if name == "nli" else None)
        assert "p" in task.prompt(row) and "{" not in task.prompt(row)
    assert task.words == {"sentiment": ("negative", "positive"), "nli": ("yes", "maybe", "no"), "topic": ()}[name]


def test_own_templates_from_yaml(bpe: PreTrainedTokenizerBase) -> None:
    template = Template.from_dict(
        {"kind": "plain", "templates": ["Review: {text}\nSentiment:"], "verbalizer": {0: "negative", 1: "positive"}}
    )
    example = template.example(label("fine {text}", 1), bpe)
    assert bpe.decode(example.input_ids) == "Review: fine {text}\nSentiment: positive<|im_end|>"
    assert trained(example, bpe) == [" positive<|im_end|>"] and template.references(label("x", 0)) == ("negative",)
    e2e = Template.from_dict({"kind": "plain", "templates": ["Say {prompt} in {n} words:"]})
    assert e2e.render(ask("a", "b", n=3)).text == "Say a in 3 words: b"


def test_fit_finds_task_names_and_chat_template(bpe: PreTrainedTokenizerBase) -> None:
    fitted = Template().fit([label("a", "positive")], bpe)
    assert fitted.task == TASKS["sentiment"] and fitted.chat_template == bpe.chat_template
    assert Template().fit([label("a", "neutral", pair="b")], bpe).task == TASKS["nli"]
    assert Template().fit([label("a", "sports")], bpe).task == TASKS["topic"]
    head = Template(mode="classification").fit([label("a", "x"), label("a", "w")], bpe)
    assert head.label_names == ("w", "x") and head.task is None
    with pytest.raises(DataError, match="no prompt is known for labels 0, 1"):
        Template().fit([label("a", 0), label("b", 1)], bpe)


def test_json_round_trip(bpe: PreTrainedTokenizerBase) -> None:
    rows = [label("a", "positive"), label("b", "negative")]
    for template in (
        Template().fit(rows, bpe),
        Template(mode="classification").fit(rows, bpe),
        Template(kind="alpaca", train_on="all", separator="", seed=4),
        Template(kind="chat", turns="last", system="s", chat_template="x"),
    ):
        assert Template.from_dict(json.loads(json.dumps(template.to_dict()))) == template
    assert Template.from_dict(None) == Template() and Template.from_dict("alpaca").kind == "alpaca"


# Encoder-decoder and classification -------------------------------------------------------------------------------


def test_encoder_decoder(words: PreTrainedTokenizerBase) -> None:
    template = Template(kind="plain", mode="seq2seq")
    example = template.example(ask("the quick fox", "is fine"), words)
    assert words.decode(example.input_ids) == "[CLS] the quick fox [SEP]"
    assert example.labels == words(text_target="is fine").input_ids and example.labels[-1] == words.eos_token_id
    assert example.labels.count(words.eos_token_id) == 1 and template.prompt_ids(ask("the", "is"), words)[-1] == 3


def test_classification_with_pairs(words: PreTrainedTokenizerBase) -> None:
    template = Template(mode="classification", label_names=("no", "yes"))
    example = template.example(label("the fox", "yes", pair="the dog"), words)
    own = words("the fox", "the dog")
    assert (example.input_ids, example.token_type_ids) == (own["input_ids"], own["token_type_ids"])
    assert example.labels == [1] and set(own["token_type_ids"]) == {0, 1}
    with pytest.raises(DataError, match="label 'maybe' is not among template label_names"):
        template.example(label("the fox", "maybe"), words)
    with pytest.raises(DataError, match="no label"):
        template.example(ask("a", "b"), words)
    numbers = Template(mode="classification").fit([label("a", 2), label("b", 0)])
    assert numbers.label_names == ("0", "1", "2") and numbers.label_number(label("a", 2)) == 2


# Bad input --------------------------------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"kind": "alpacca"}, "kind 'alpacca' is unknown .did you mean 'alpaca'"),
    ({"knd": "chat"}, "unknown key 'knd' .did you mean 'kind'"),
    ({"train_on": "prompt"}, "use completion, all"),
    ({"mode": "seq2seq", "train_on": "all"}, "no meaning in mode 'seq2seq'"),
    ({"task": "sentimnt"}, "did you mean 'sentiment'"),
    ({"task": "nli", "templates": ["{text}"]}, "task or templates, not both"),
    ({"verbalizer": {0: "a"}}, "needs templates or a task"),
    ({"templates": "{text}"}, "expected a list of prompts"),
    ({"templates": []}, "give at least one prompt"),
    ({"templates": ["{text"]}, "expected '}'"),
    ({"templates": ["{}"]}, "only the name of a column"),
    ({"templates": ["{text:>9}"]}, "only the name of a column"),
    ({"templates": ["{text}"], "verbalizer": ["a"]}, "expected label: word pairs"),
    ({"seed": "x"}, "seed: expected a whole number"),
    ({"system": 3}, "system: expected text"),
    ({"label_names": "abc"}, "expected a list of names"),
    ({"templates": ["{text}"], "verbalizer": {0: False}}, "word for 0 is False, not text; put quotes around it"),
    ({"templates": ["{text}"], "verbalizer": {0: 1}}, "word for 0 is 1, not text; put quotes around it"),
    ({"templates": ["{text}"], "verbalizer": {True: "good"}}, "label True is no text or number; put quotes"),
    ({"mode": "classification", "label_names": [False, True]}, "label_names: False is no text .*; put quotes"),
    ({"kind": "plain", "system": "s"}, "system: it has no meaning with kind 'plain'"),
    ({"kind": "alpaca", "turns": "last"}, "turns: it has no meaning with kind 'alpaca'"),
    ({"kind": "chat", "mode": "seq2seq", "turns": "last"}, "turns: it has no meaning with mode 'seq2seq'"),
    ({"kind": "chat", "separator": "x"}, "separator: it has no meaning with kind 'chat'"),
    ({"kind": "plain", "mode": "seq2seq", "separator": "x"}, "separator: it has no meaning with mode 'seq2seq'"),
    ({"label_names": ["a"]}, "label_names: it has no meaning with mode 'causal'"),
    ({"mode": "classification", "kind": "alpaca"}, "kind: 'alpaca' has no meaning with mode 'classification'"),
    ({"mode": "classification", "task": "sentiment"}, "template task and verbalizer: they have no meaning with mode"),
    ({"mode": "classification", "verbalizer": {0: "a"}}, "verbalizer: it needs templates or a task beside it"),
    ({"kind": "plain", "chat_template": "x"}, "chat_template: it has no meaning with kind 'plain'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS, ids=[message for _, message in BAD_SETTINGS])
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        Template.from_dict(settings)
    assert "\n" not in str(error.value)


def test_bad_rows(bpe: PreTrainedTokenizerBase, bos_bpe: PreTrainedTokenizerBase) -> None:
    verbal = Task(templates=("{text}",), verbalizer={"0": "no"})
    text = Row(form="text", index=1, source="a.jsonl", text="x")
    cases: list[tuple[Template, Row, type[Exception], str]] = [
        (
            Template(task=Task(templates=("{txt}",))),
            label("a", "b"),
            DataError,
            "'{txt}' is not a column .did you mean 'text'",
        ),
        (Template(task=Task(templates=("{text.x}",))), label("a", "b"), DataError, "'{text.x}' is not a column"),
        (Template(task=Task(templates=("{n}",))), ask("a", "b", n=None), DataError, "'{n}' is empty"),
        (Template(task=verbal), label("a", 1), DataError, "label '1' has no word"),
        (Template(task=TASKS["topic"]), label("a", 1), DataError, "label 1 is a number without a word"),
        (Template(task=verbal), text, DataError, "not a column|neither a label"),
        (Template(), label("a", "b"), DataError, "needs words: set template task"),
        (Template(task=verbal), chat(), ConfigError, "do not apply to conversations"),
    ]
    for template, row, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            template.example(row, bpe)
        assert "a.jsonl row 1" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="plain text has no prompt"):
        Template().render_prompt(text, bpe)
    with pytest.raises(ConfigError, match="has no chat template; set data template kind"):
        Template().example(ask("a", "b"), bos_bpe)
    with pytest.raises(ConfigError, match="pass it"):
        Template().render_prompt(ask("a", "b"))
    refusing = Template(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"row 1: the chat template refuses this conversation \(roles must alternate"):
        refusing.example(chat(), bpe)


def test_no_end_token(words: PreTrainedTokenizerBase) -> None:
    import copy

    tokenizer = copy.deepcopy(words)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="no end token"):
        Template(kind="plain").example(ask("the", "fox"), tokenizer)
