"""In-context learning against loops over whole sequences, without cache, and by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from speaking import adapted, rows_of, speaking
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import graft
from graft.base import load_base
from graft.data.encode import Example
from graft.data.rows import Row
from graft.data.template import Template
from graft.errors import ConfigError, DataError
from graft.evaluate import icl, prefix
from graft.evaluate import shots as drawing
from graft.evaluate.generate import Decoding, generate
from graft.evaluate.icl import LabelScores, few_shot, label_scores, one_pattern, with_words
from graft.evaluate.metrics import bleu
from graft.evaluate.shots import draw, fitting, with_shots

WORDS = {"good": "fine", "bad": "really awful", "none": "unclear"}
MOODS = Template.from_dict(
    {"kind": "plain", "templates": ["Review: {text}\nMood:", "{text} It was"], "verbalizer": WORDS}
)


@pytest.fixture
def pool(tmp_path: Path) -> list[Row]:
    """Eleven rows of three labels."""
    texts = [
        "a warm film",
        "dull",
        "no idea at all",
        "so kind",
        "cold",
        "who knows",
        "bright",
        "mean",
        "hm",
        "joy",
        "bah",
    ]
    records = [{"text": t, "label": list(WORDS)[n % 3]} for n, t in enumerate(texts)]
    return rows_of(tmp_path, records)


@pytest.fixture
def asked(tmp_path: Path) -> list[Row]:
    texts = ["a cat sat there and saw it all", "rain", "the end was very good", "an owl"]
    (tmp_path / "asked").mkdir()
    return rows_of(tmp_path / "asked", [{"text": t, "label": list(WORDS)[n % 3]} for n, t in enumerate(texts)])


def by_hand(model: Any, tokenizer: Any, text: str, answer: str, entry: Any = None) -> float:
    """The log-probability of `answer` behind `text`, one whole sequence at a time."""
    start, ids = tokenizer(text).input_ids, tokenizer(text + answer).input_ids
    assert ids[: len(start)] == start
    if hasattr(model, "adapters"):
        graft.use(model, entry)
    batch: dict[str, Any] = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }
    if hasattr(model, "adapters"):
        batch = graft.prepare(model, batch)
    with torch.no_grad():
        logits_TV = model(**batch, use_cache=False).logits[0]
    slots = len(logits_TV) - len(ids)
    logs = F.log_softmax(logits_TV.float(), -1)
    return sum(float(logs[slots + place - 1, ids[place]]) for place in range(len(start), len(ids)))


def written(shots: list[Row]) -> str:
    return "".join(f"Review: {row.text}\nMood: {WORDS[str(row.label)]}\n\n" for row in shots)


# ------------------------------------------------------------------------------------------------- draws


def test_draws_are_balanced_nested_and_the_seeds_own(pool: list[Row]) -> None:
    for shots in range(10):
        counts = Counter(row.label for row in draw(pool, shots, 3))
        assert sum(counts.values()) == shots and len({row.index for row in draw(pool, shots, 3)}) == shots
        assert max(counts.values(), default=0) - min((counts[label] for label in WORDS), default=0) <= 1
        assert {r.index for r in draw(pool, shots, 3)} <= {r.index for r in draw(pool, shots + 1, 3)}
    assert draw(pool, 7, 3) == draw(list(pool), 7, 3)
    assert len({tuple(row.index for row in draw(pool, 7, seed)) for seed in range(8)}) == 8
    orders = {tuple(row.label for row in draw(pool, 6, seed)) for seed in range(8)}
    assert len(orders) > 3, "labels must not stand in one order"


def test_draws_of_rows_as_they_come(pool: list[Row]) -> None:
    goods = [row for row in pool if row.label == "good"]
    counts = [Counter(r.label for r in draw(pool, 6, seed, balanced=False)) for seed in range(20)]
    assert any(max(c.values()) > 2 for c in counts)
    assert len(draw(pool, 11, 0, balanced=False)) == 11 and len(draw(goods, 4)) == 4


@pytest.mark.parametrize(
    ("shots", "balanced", "words"),
    [(12, False, "11 rows for 12 shots"), (11, True, "3 rows with label"), (-1, None, "-1"), ("two", None, "'two'")],
)
def test_impossible_draws_are_refused(pool: list[Row], shots: Any, balanced: bool | None, words: str) -> None:
    rows = pool[:-1] if balanced else pool
    with pytest.raises((DataError, ConfigError), match=words):
        for seed in range(6):
            draw([*rows, rows[0]] if balanced else rows, shots, seed, balanced=balanced)


# ------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gemma2", "bloom", "opt", "falcon", "gpt_neox"])
def test_likelihoods_equal_whole_sequences(
    name: str, tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    model = speaking(name)
    shots = draw(pool, 4, 1)
    template = one_pattern(MOODS, 0)
    found = label_scores(model, tokenizer, asked, shots, template, batch_size=3)
    plain = label_scores(model, tokenizer, asked, shots, template, batch_size=3, shared=False)
    right = [
        [by_hand(model, tokenizer, f"{written(shots)}Review: {row.text}\nMood:", f" {w}") for w in WORDS.values()]
        for row in asked
    ]
    assert found.words == list(WORDS.values())
    torch.testing.assert_close(found.log_NC, torch.tensor(right), rtol=0, atol=1e-4)
    torch.testing.assert_close(plain.log_NC, torch.tensor(right), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "shares"),
    [
        (graft.LoRA(targets="all-linear"), True),
        (graft.Bottleneck(size=4), True),
        (graft.IA3(), True),
        (graft.PrefixTuning(length=3), False),
        (graft.PromptTuning(length=3), False),
        (graft.UniPELT(), False),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_likelihoods_of_adapters(
    method: Any, shares: bool, tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    model = adapted(speaking("llama"), noise=0.2, one=method)
    shots, template = draw(pool, 4, 1), one_pattern(MOODS, 0)
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].numel()))
    found = label_scores(model, tokenizer, asked, shots, template, "one")
    tokens, read[:] = sum(read), []
    label_scores(model, tokenizer, asked, shots, template, "one", shared=False)
    assert (tokens < 0.4 * sum(read)) == shares
    hook.remove()
    right = [
        [by_hand(model, tokenizer, f"{written(shots)}Review: {r.text}\nMood:", f" {w}", "one") for w in WORDS.values()]
        for r in asked
    ]
    torch.testing.assert_close(found.log_NC, torch.tensor(right), rtol=0, atol=1e-4)
    base = label_scores(model, tokenizer, asked, shots, template)
    assert float((base.log_NC - found.log_NC).abs().max()) > 1e-3


def test_encoder_decoders_read_the_demonstrations_in_the_encoder(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    model = speaking("t5")
    template = Template.from_dict({**one_pattern(MOODS, 0).to_dict(), "mode": "seq2seq"})
    shots = draw(pool, 3, 0)
    found = label_scores(model, tokenizer, asked, shots, template)
    for row, scores in zip(asked, found.log_NC, strict=True):
        ids = tokenizer(f"{written(shots)}Review: {row.text}\nMood:", return_tensors="pt").input_ids
        for word, score in zip(WORDS.values(), scores, strict=True):
            labels = tokenizer(text_target=word).input_ids
            labels = torch.tensor([[*(i for i in labels if i != tokenizer.eos_token_id), tokenizer.eos_token_id]])
            with torch.no_grad():
                loss = model(input_ids=ids, labels=labels).loss * labels.numel()
            assert float(score) == pytest.approx(-float(loss), abs=1e-4)


def test_sliding_windows_are_asked_whole(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    """Their cache drops what later rows may need, so it is not shared."""
    model, shots, template = speaking("gemma2", sliding_window=16), draw(pool, 4, 1), one_pattern(MOODS, 0)
    rows, made = with_shots(asked, shots, template)
    examples = [prefix.without_end(each, tokenizer.eos_token_id) for each in made.examples(rows, tokenizer)]
    assert prefix._shared(model, tokenizer, examples, None, 4, None) is None
    assert prefix._shared(speaking("llama"), tokenizer, examples, None, 4, None) is not None
    found = label_scores(model, tokenizer, asked, shots, template)
    for row, scores in zip(asked, found.log_NC, strict=True):
        text = f"{written(shots)}Review: {row.text}\nMood:"
        right = [by_hand(model, tokenizer, text, f" {word}") for word in WORDS.values()]
        torch.testing.assert_close(scores, torch.tensor(right), rtol=0, atol=1e-4)


def test_bfloat16_shares_too(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    model = adapted(load_base("embedded", precision="bf16"), noise=0.02, one=graft.LoRA())
    for entry in (None, "one"):
        both = [
            label_scores(model, tokenizer, asked, draw(pool, 6), one_pattern(MOODS, 0), entry, shared=shared).log_NC
            for shared in (True, False)
        ]
        torch.testing.assert_close(*both, rtol=0, atol=0.15)


def test_calibration_by_hand() -> None:
    scores = LabelScores(["a", "b", "c"], torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]]).log(), None)
    assert scores.chosen() == ["a", "a"]
    prior = LabelScores(scores.words, scores.log_NC, torch.tensor([[0.6, 0.3, 0.1]] * 2).log())
    assert prior.chosen(calibrated=True) == ["c", "a"]  # .5/.6, .3/.3, .2/.1; .9/.6, .06/.3, .04/.1
    with pytest.raises(ConfigError, match="calibrate=True"):
        scores.chosen(calibrated=True)


def test_the_prior_is_the_mean_share_without_content(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    model, shots = speaking("llama"), draw(pool, 3, 2)
    found = label_scores(model, tokenizer, asked, shots, one_pattern(MOODS, 0), calibrate=True)
    shares = []
    for text in ("N/A", "[MASK]", ""):
        logs = [by_hand(model, tokenizer, f"{written(shots)}Review: {text}\nMood:", f" {w}") for w in WORDS.values()]
        shares.append(torch.tensor(logs).exp() / sum(torch.tensor(logs).exp()))
    assert found.log_prior_NC is not None
    for log_prior_C in found.log_prior_NC:
        torch.testing.assert_close(log_prior_C.exp(), sum(shares) / 3, rtol=0, atol=1e-4)
    best = (found.log_NC.exp() / found.log_prior_NC.exp()).argmax(-1)
    assert found.chosen(calibrated=True) == [found.words[int(each)] for each in best]
    asked_for = few_shot(model, tokenizer, asked, pool, MOODS, shots=3, seed=2, pattern=0, calibrate=True)
    assert asked_for.answers["base"] == found.chosen(calibrated=True)


def test_a_word_that_is_never_said_does_not_win(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its share without content is e to -150, which is no number of 32 bits; by hand in logs it is."""
    right = {"fine": [-1.0, -1.0, *[-2.0] * 3], "really awful": [-160.0, -130.0, *[-152.0] * 3]}
    monkeypatch.setattr(icl, "log_likelihoods", lambda *_, **__: [*right["fine"], *right["really awful"]])
    two = one_pattern(changed(verbalizer={"good": "fine", "bad": "really awful"}), 0)
    found = label_scores(speaking("llama"), tokenizer, asked[:2], [], two, calibrate=True)
    assert found.chosen() == ["fine", "fine"]
    assert found.chosen(calibrated=True) == ["fine", "really awful"]  # -160 + 150 < -1 + 0 < -130 + 150


def test_each_pattern_has_its_own_prior(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    """Rows of several patterns are calibrated as they are where each pattern is asked alone."""
    model, shots = speaking("llama"), draw(pool, 3, 2)
    mixed = changed(seed=1)
    used = [int(not mixed.render_prompt(row).startswith("Review: ")) for row in asked]
    assert set(used) == {0, 1}
    prompts = ["Review: {}\nMood:", "{} It was"]
    front = "".join(mixed.render(row).text + "\n\n" for row in shots)
    priors = []
    for prompt in prompts:
        shares = []
        for text in ("N/A", "[MASK]", ""):
            logs = [by_hand(model, tokenizer, front + prompt.format(text), f" {w}") for w in WORDS.values()]
            shares.append(torch.tensor(logs).softmax(-1))
        priors.append((sum(shares) / 3).log())
    found = label_scores(model, tokenizer, asked, shots, mixed, calibrate=True).log_prior_NC
    assert found is not None and float((priors[0] - priors[1]).abs().max()) > 0.1
    torch.testing.assert_close(found, torch.stack([priors[n] for n in used]), rtol=0, atol=1e-3)


def test_labels_that_nothing_predicts_take_the_plain_way(tokenizer: PreTrainedTokenizerBase, asked: list[Row]) -> None:
    """An answer that begins a text of a tokenizer without begin token, and labels that are not the last tokens."""
    model, ids = speaking("llama"), tokenizer(" fine and really awful").input_ids
    whole = Example(input_ids=ids, labels=list(ids), row=asked[0])
    inside = Example(input_ids=ids, labels=[-100, *ids[1:-1], -100], row=asked[0])
    part = Example(input_ids=ids, labels=[-100, *ids[1:]], row=asked[0])
    for example in (whole, inside):
        assert prefix._shared(model, tokenizer, [part, example], None, 2, None) is None
        found = prefix.log_likelihoods(model, tokenizer, [part, example])
        assert found == prefix.log_likelihoods(model, tokenizer, [part, example], shared=False)
    assert prefix._shared(model, tokenizer, [part], None, 2, None) is not None


def test_chat_is_asked_for_the_answer_alone(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    """Whatever was trained: with `train_on: all` the likelihood would be of the whole conversation."""
    model = speaking("llama", max_position_embeddings=512)
    chat = {**one_pattern(MOODS, 0).to_dict(), "kind": "chat"}
    both = [Template.from_dict({**chat, "train_on": which}) for which in ("completion", "all")]
    one, other = (label_scores(model, tokenizer, asked, draw(pool, 2), each) for each in both)
    torch.testing.assert_close(one.log_NC, other.log_NC)


# ------------------------------------------------------------------------------------------------- evaluations


def test_words_are_those_of_the_pool_too(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    """Without a verbalizer and without shots a set of two labels is still a choice of three."""
    plain = Template.from_dict({"kind": "plain", "templates": ["Mood of {text}:"]})
    two = [row for row in asked if row.label != "none"]
    with_three = few_shot(speaking("llama"), tokenizer, asked, pool, plain, shots=0)
    some = few_shot(speaking("llama"), tokenizer, two, pool, plain, shots=0)
    own = few_shot(speaking("llama"), tokenizer, two, [], plain, shots=0)
    kept = [answer for answer, row in zip(with_three.answers["base"], asked, strict=True) if row.label != "none"]
    assert some.answers["base"] == kept
    named = with_words(plain, pool).task
    assert named is not None and dict(named.verbalizer) == {"bad": "bad", "good": "good", "none": "none"}
    assert set(own.answers["base"]) <= {"good", "bad"} and with_words(MOODS, pool) is MOODS


def test_pool_and_rows_may_name_labels_in_two_ways(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    """As the built-in tasks do: numbers on one side, words on the other, and one word for both."""
    numbers = {str(number): word for number, word in enumerate(WORDS.values())}
    both, number_of = changed(verbalizer={**numbers, **WORDS}), {label: n for n, label in enumerate(WORDS)}
    numbered = [dataclasses.replace(row, label=number_of[str(row.label)]) for row in asked]
    model, given = speaking("llama"), {"shots": 3, "pattern": 0}
    one = few_shot(model, tokenizer, asked, pool, MOODS, **given)  # type: ignore[arg-type]
    other = few_shot(model, tokenizer, numbered, pool, both, **given)  # type: ignore[arg-type]
    assert other.answers == one.answers and other.scores == one.scores
    with pytest.raises(ConfigError, match="labels 'good' and '0' have the same word"):
        few_shot(model, tokenizer, [*asked, *numbered], pool, both, **given)  # type: ignore[arg-type]


def test_entries_side_by_side(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    model = adapted(speaking("llama"), one=graft.LoRA(targets="all-linear"))
    found = few_shot(model, tokenizer, asked, pool, MOODS, shots=3, pattern=1, entries=(None, "one"))
    assert list(found.scores) == ["base", "one"] and list(found.scores["one"]) == ["accuracy", "macro_f1"]
    right = [WORDS[str(row.label)] for row in asked]
    hits = sum(a == b for a, b in zip(found.answers["one"], right, strict=True))
    assert found.scores["one"]["accuracy"] == hits / len(asked)
    assert [row.index for row in found.shots] == [row.index for row in draw(pool, 3)]
    alone = few_shot(model, tokenizer, asked, [], MOODS, shots=0, pattern=1)
    assert alone.shots == () and set(alone.answers["base"]) <= set(WORDS.values())


def test_the_pattern_without_shots_is_what_training_shows(tokenizer: PreTrainedTokenizerBase, asked: list[Row]) -> None:
    for pattern in (0, 1):
        template = one_pattern(MOODS, pattern)
        rows, made = with_shots(asked, [], template)
        told = Template.from_dict(json.loads(json.dumps(template.to_dict())))
        for row, plain in zip(asked, rows, strict=True):
            assert made.example(plain, tokenizer).input_ids == told.example(row, tokenizer).input_ids


def test_chat_shows_demonstrations_as_turns(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    template = Template.from_dict({**one_pattern(MOODS, 0).to_dict(), "kind": "chat", "system": "Be brief."})
    shots = draw(pool, 2)
    rows, made = with_shots(asked[:1], shots, template)
    turns = [{"role": "system", "content": "Be brief."}]
    for row in shots:
        turns += [{"role": "user", "content": f"Review: {row.text}\nMood:"}]
        turns += [{"role": "assistant", "content": WORDS[str(row.label)]}]
    turns += [{"role": "user", "content": f"Review: {asked[0].text}\nMood:"}]
    right = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert made.render_prompt(rows[0], tokenizer) == right
    example = made.example(rows[0], tokenizer)
    assert tokenizer.decode([i for i in example.labels if i >= 0]).startswith(WORDS[str(asked[0].label)])
    model = speaking("llama", max_position_embeddings=512)
    found = few_shot(model, tokenizer, asked, pool, template, shots=2)
    assert set(found.answers["base"]) <= set(WORDS.values())


def test_answers_are_written_behind_the_demonstrations(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = ["red", "blue", "green", "black", "white"]
    rows = rows_of(tmp_path, [{"prompt": f"say {c}", "references": [c, f"{c} it is"]} for c in colours])
    asked, pool, model = rows[:2], rows[2:], speaking("llama")
    short = Decoding(max_new_tokens=6)
    found = few_shot(model, tokenizer, asked, pool, Template(kind="plain"), shots=2, seed=1, decoding=short)
    front = "".join(f"{row.prompt} {row.completion}\n\n" for row in draw(pool, 2, 1))
    (tmp_path / "by_hand").mkdir()
    whole = [{"prompt": front + row.prompt, "references": list(row.references)} for row in asked]
    right = generate(model, tokenizer, rows_of(tmp_path / "by_hand", whole), Template(kind="plain"), decoding=short)
    assert found.answers == right and list(found.scores["base"]) == ["exact_match", "bleu", "rouge_l"]
    assert found.scores["base"]["bleu"] == bleu(right["base"], [row.references for row in asked])
    monkeypatch.setattr(icl, "generate", lambda *_, **__: {"base": ["red\n\nsay blue blue", " blue it is "]})
    cut = few_shot(model, tokenizer, asked, pool, Template(kind="plain"), shots=2, metrics=["exact_match"])
    assert cut.answers == {"base": ["red", "blue it is"]} and cut.scores == {"base": {"exact_match": 1.0}}


# ------------------------------------------------------------------------------------------------- the context


def test_what_does_not_fit_is_refused_or_fitted(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]
) -> None:
    model, template = speaking("llama"), one_pattern(MOODS, 0)  # 128 tokens

    def most(extra: int) -> int:
        """The longest nested draw by hand, beside `extra` pseudo-tokens."""
        fits = [
            count
            for count in range(10)
            if all(
                len(tokenizer(f"{written(draw(pool, count))}Review: {r.text}\nMood: {w}").input_ids) + 1 + extra <= 128
                for r in asked
                for w in WORDS.values()
            )
        ]
        return max(fits)

    kept = fitting(model, tokenizer, asked, pool, template, "fit")
    assert 3 < len(kept) == most(0) < 9
    assert few_shot(model, tokenizer, asked, pool, template, shots="fit").shots == tuple(kept)
    with pytest.raises(DataError, match=rf"behind 9 demonstrations .* the context has 128; {most(0)} would fit"):
        few_shot(model, tokenizer, asked, pool, template, shots=9)
    adapted(model, soft=graft.PromptTuning(length=40))
    assert len(fitting(model, tokenizer, asked, pool, template, "fit", entries=("soft",))) == most(40) < most(0)
    with pytest.raises(DataError, match="none would fit"):
        few_shot(speaking("llama", max_position_embeddings=16), tokenizer, asked, pool, template, shots=1)


def test_a_wrong_word_must_fit_too(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    """The right words are short; a longer one is asked as well, and none is asked over the context."""
    long = "really awful and of no use at all to anybody who ever saw it"
    template = one_pattern(changed(verbalizer={**WORDS, "bad": long}), 0)
    good = [row for row in asked if row.label == "good"]
    goods = [row for row in pool if row.label == "good"]
    model = speaking("llama")
    kept = fitting(model, tokenizer, good, goods * 9, template, "fit")
    lengths = [
        len(tokenizer(f"{written(draw(goods * 9, len(kept) + more))}Review: {row.text}\nMood: {long}").input_ids) + 1
        for more in (0, 1)
        for row in good
    ]
    assert max(lengths[: len(good)]) <= 128 < max(lengths[len(good) :])
    assert few_shot(model, tokenizer, good, goods * 9, template, shots="fit").shots == tuple(kept)
    over = draw(goods * 9, len(kept) + 1)
    for shared in (True, False):
        with pytest.raises(DataError, match=r"row \d: 1\d\d tokens, the context has 128"):
            label_scores(model, tokenizer, good, over, template, shared=shared)


def test_fit_takes_no_more_than_the_most(
    tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of a large pool it never renders much more than fits."""
    many = [dataclasses.replace(row, index=n) for n, row in enumerate(pool * 300)]
    rendered: list[int] = []

    def counted(rows: Any, drawn: Any, template: Template) -> Any:
        rendered.append(len(drawn) * len(rows))
        return with_shots(rows, drawn, template)

    monkeypatch.setattr(drawing, "with_shots", counted)
    model, template = speaking("llama"), one_pattern(MOODS, 0)
    whole = fitting(model, tokenizer, asked, many, template, "fit")
    assert len(whole) > 4 and max(rendered) <= len(asked) * len(whole)
    assert fitting(model, tokenizer, asked, many, template, "fit", most=4) == draw(many, 4)
    assert fitting(model, tokenizer, asked, many, template, "fit", most=99) == whole
    endless = copy.deepcopy(tokenizer)
    endless.model_max_length = int(1e30)
    assert len(fitting(speaking("bloom"), endless, asked, many, template, "fit", most=7)) == 7
    assert len(few_shot(model, tokenizer, asked, pool, MOODS, shots="fit", most=2).shots) == 2
    with pytest.raises(ConfigError, match="at least 1"):
        fitting(model, tokenizer, asked, pool, template, "fit", most=0)


def test_as_many_as_the_pool_has(tokenizer: PreTrainedTokenizerBase, pool: list[Row], asked: list[Row]) -> None:
    model = speaking("llama", max_position_embeddings=2048)
    assert len(fitting(model, tokenizer, asked, pool, one_pattern(MOODS, 0), "fit", balanced=False)) == len(pool)
    endless = copy.deepcopy(tokenizer)
    endless.model_max_length = int(1e30)
    with pytest.raises(ConfigError, match="no longest input"):
        few_shot(speaking("bloom"), endless, asked, pool, MOODS, shots="fit")
    assert len(few_shot(speaking("bloom"), endless, asked, pool, MOODS, shots=9).shots) == 9


# ------------------------------------------------------------------------------------------------- refusals


def changed(**settings: Any) -> Template:
    return Template.from_dict({**MOODS.to_dict(), **settings})


@pytest.mark.parametrize(
    ("template", "given", "words"),
    [
        (changed(verbalizer={"good": "fine", "none": "so so"}), {}, "row 2: label 'bad' has no word"),
        (changed(verbalizer={**WORDS, "none": "fine"}), {}, "labels 'good' and 'none' have the same word 'fine'"),
        (changed(verbalizer={**WORDS, "none": "really"}), {}, "'really' is the beginning of 'really awful'"),
        (changed(), {"pattern": 2}, "pattern 2: the template has 2"),
        (changed(), {"metrics": ["bleu"]}, "bleu does not fit"),
        (changed(), {"metrics": ["loss"]}, "loss does not fit"),
        (changed(mode="seq2seq"), {}, "mode 'causal'"),
        (changed(templates=["{slots:2} {text}"]), {}, "pseudo-tokens"),
        (Template(kind="plain", mode="classification"), {}, "reads no demonstrations"),
    ],
)
def test_refusals(
    template: Template,
    given: dict[str, Any],
    words: str,
    tokenizer: PreTrainedTokenizerBase,
    pool: list[Row],
    asked: list[Row],
) -> None:
    with pytest.raises((ConfigError, DataError), match=words):
        few_shot(speaking("llama"), tokenizer, asked, pool, template, **{"shots": 3, "pattern": None, **given})


def test_rows_that_cannot_be_asked(tokenizer: PreTrainedTokenizerBase, pool: list[Row], tmp_path: Path) -> None:
    model = speaking("llama", max_position_embeddings=512)
    with pytest.raises(DataError, match=r"row 4: drawn as a demonstration, and .* asks the same"):
        few_shot(model, tokenizer, pool[3:4], pool, MOODS, shots=9)
    with pytest.raises(DataError, match="no rows to evaluate"):
        few_shot(model, tokenizer, [], pool, MOODS)
    texts = rows_of(tmp_path, [{"text": "one"}, {"text": "two"}])
    with pytest.raises(DataError, match="plain text has no question"):
        few_shot(model, tokenizer, texts, texts, Template(kind="plain"), shots=1)
    pairs = rows_of(tmp_path, [{"prompt": "a", "completion": "b\n\nc"}, {"prompt": "d", "completion": "e"}])
    with pytest.raises(ConfigError, match="calibrate"):
        few_shot(model, tokenizer, pairs[1:], pairs[:1], Template(kind="plain"), shots=1, calibrate=True)
    with pytest.raises(DataError, match="row 1: its answer has an empty line"):
        few_shot(model, tokenizer, pairs[1:], pairs[:1], Template(kind="plain"), shots=1)


def test_inputs_that_begin_each_other_share_a_forward() -> None:
    inputs = [(1, 2), (1, 2, 3), (1,), (2, 1), (1, 3), (1, 2, 3)]
    hosts, place = prefix._hosts(inputs)
    assert sorted(hosts) == [(1, 2, 3), (1, 3), (2, 1)]
    assert all(hosts[p][: len(each)] == each for each, p in zip(inputs, place, strict=True))
