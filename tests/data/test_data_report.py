"""The report's numbers against counting by hand; every limit names its rows and its key."""

from __future__ import annotations

import json

import pytest
from transformers import PreTrainedTokenizerBase

from graft.data.encode import Example
from graft.data.report import Limits, Report, report
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import DataError


def one(
    index: int, question: str, answer: str, length: int = 6, prompt: int = 2, source: str = "train.jsonl"
) -> Example:
    row = Row(form="prompt", index=index, source=source, prompt=question, completion=answer)
    ids = [5 + (index + n) % 50 for n in range(length)]
    return Example(input_ids=ids, labels=[-100] * prompt + ids[prompt:], row=row)


def many(count: int = 20) -> list[Example]:
    return [one(n, f"q{n}", "a") for n in range(1, count + 1)]


def held(*questions: str) -> list[Example]:
    return [one(n, q, "a", source="dev.jsonl") for n, q in enumerate(questions, start=1)]


def test_numbers() -> None:
    train = [*many(4), one(5, "q1", "a"), one(6, "q1", "other"), one(7, "long", "a", 30), one(8, "late", "a", 12, 11)]
    found = report(train, held("q2", "new"), max_length=10)
    part = found.train
    assert (part.rows, part.tokens, part.longest) == (8, 6 * 6 + 30 + 12, 30)
    assert part.trained == 6 * 4 + 8 + 0
    assert [row.index for row in part.truncated] == [7, 8]
    assert [row.index for row in part.zero_labels] == [8]
    assert [row.index for row in part.duplicates] == [5] and part.other_answers == 1
    assert [row.where for row in found.leaked] == ["dev.jsonl row 1"]
    assert sum(count for _, _, count in part.histogram) == 8 and part.histogram[-1][:2] == (29, 32)
    for low, high, count in part.histogram:
        assert count == sum(low <= len(e) <= high for e in train)


def test_first_token_of_a_decoder_is_not_trained() -> None:
    single = one(1, "q", "a", length=1, prompt=0)
    assert report([single], max_length=5).train.trained == 0
    assert report([single], max_length=5, mode="seq2seq").train.trained == 1


def test_a_clean_report_passes() -> None:
    report(many(), held("new"), max_length=10).check()
    several = [one(n, "same question", f"answer {n}") for n in range(20)]  # E2E: several references, no fault
    report(several, max_length=10).check()


BAD = [
    (
        [*many(), one(21, "x", "a", 11)],
        held("n"),
        Limits(),
        "1 training row is longer than 10 tokens (longest 11): train.jsonl row 21; "
        "raise data.max_length or set data.truncate",
    ),
    (
        many(),
        [*held("n"), one(2, "x", "a", 11, source="dev.jsonl")],
        Limits(),
        "1 evaluation row is longer than 10 tokens (longest 11): dev.jsonl row 2;",
    ),
    (
        [*many(8), one(9, "x", "a", 11), one(10, "y", "a", 12)],
        None,
        Limits(truncate=True),
        "20.0% of the training rows would be cut at 10 tokens: "
        "train.jsonl rows 9, 10; raise data.max_length or data.limits.truncated (0.05)",
    ),
    (
        [*many(), one(21, "x", "a", 11, 10)],
        None,
        Limits(truncate=True),
        "1 training row is without a trained token: train.jsonl row 21; raise data.max_length",
    ),
    (
        [one(n, "q", "a") for n in range(1, 15)],
        None,
        Limits(),
        "93% of the training rows repeat an earlier row: "
        "train.jsonl rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more; "
        "remove them or raise data.limits.duplicates (0.5)",
    ),
    (
        many(),
        held("n", "q3", "q4"),
        Limits(),
        "2 evaluation rows are asked in training too: dev.jsonl rows 2, 3; "
        "remove them from one side or raise data.limits.leaked (0)",
    ),
]


@pytest.mark.parametrize(
    ("train", "evaluation", "limits", "message"), BAD, ids=["long", "long eval", "cut", "zero", "twice", "leak"]
)
def test_each_limit(train: list[Example], evaluation: list[Example] | None, limits: Limits, message: str) -> None:
    found = report(train, evaluation, max_length=10)
    with pytest.raises(DataError) as error:
        found.check(limits)
    assert message in str(error.value) and "\n" not in str(error.value)
    found.check(Limits(truncate=True, truncated=1, zero_labels=99, duplicates=1, leaked=99))


def test_no_rows() -> None:
    with pytest.raises(DataError, match="no training rows"):
        report([], max_length=10)
    with pytest.raises(DataError, match="no evaluation rows"):
        report(many(), [], max_length=10)


def full(tokenizer: PreTrainedTokenizerBase) -> Report:
    rows = [
        Row(
            form="prompt", index=n, source="t.jsonl", prompt=f"hello [b]{n}", completion="you", references=("you", "me")
        )
        for n in range(1, 6)
    ]
    examples = Template(kind="plain").examples(rows, tokenizer)
    return report(examples, examples[:1], tokenizer, max_length=64)


def test_table_marks_the_trained_text(bpe: PreTrainedTokenizerBase) -> None:
    text = str(full(bpe))
    assert "- hello [b]1[[ you<|im_end|>]]" in text and "- hello [b]5[[ you<|im_end|>]]" in text
    assert "questions also in training" in text and "further references, not trained" in text


def test_json(bpe: PreTrainedTokenizerBase) -> None:
    found = json.loads(json.dumps(full(bpe).to_dict()))
    assert found["train"]["rows"] == 5 and found["leaked"] == {"count": 1, "first": ["t.jsonl row 1"]}
    assert found["samples"][0] == [["hello [b]1", False], [" you<|im_end|>", True]]


def test_samples_of_other_modes(words: PreTrainedTokenizerBase) -> None:
    row = Row(form="label", index=1, source="a", text="the fox", label="yes")
    head = Template(mode="classification").fit([row])
    assert report(head.examples([row], words), tokenizer=words, max_length=9, mode="classification").samples == (
        (("[CLS] the fox [SEP]", False), ("yes", True)),
    )
    asked = Row(form="prompt", index=1, source="a", prompt="the fox", completion="is the dog")
    both = Template(kind="plain", mode="seq2seq").examples([asked], words)
    found = report(both, tokenizer=words, max_length=9, mode="seq2seq")
    assert found.train.tokens == len(both[0].input_ids) + len(both[0].labels)
    assert found.train.trained == len(both[0].labels) and found.samples[0][1][1]
