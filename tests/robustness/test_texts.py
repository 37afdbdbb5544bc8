"""Texts with changed words: exactly the part that is asked for; perplexity and accuracy on them."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.robustness.report import plain_text
from hf_imgproc_attn.robustness.settings import TEXT_CHANGES, TextSettings
from hf_imgproc_attn.robustness.text_changes import CHANGES, delete_words, misspell_words, swap_words
from hf_imgproc_attn.robustness.texts import count_measurements, evaluate_text_robustness, text_perplexity
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_setup import build_causal_lm
from hf_imgproc_attn.training_support.text_data import TextSplit, encode
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.training.conftest import TINY_GPT2

LINES = ["  the quick brown fox jumps over \n", "a lazy dog, \t twice;\n", "\n", "it sleeps\n"] * 50
WORDS = [line.split() for line in LINES]
TOTAL = sum(map(len, WORDS))


def one_edit_apart(before: str, after: str) -> bool:
    """Whether one letter was swapped with the next, dropped, put in or changed."""
    letters = set(after + before)
    parts = [(before[:i], before[i:]) for i in range(len(before) + 1)]
    edits = {left + right[1:] for left, right in parts if right}
    edits |= {left + right[1] + right[0] + right[2:] for left, right in parts if len(right) > 1}
    edits |= {left + letter + right for left, right in parts for letter in letters}
    edits |= {left + letter + right[1:] for left, right in parts if right for letter in letters}
    return after in edits and after != before


@pytest.mark.parametrize("fraction", [0.015, 0.025, 0.05, 1.0])
def test_swaps_and_typos_change_the_fraction_and_nothing_else(fraction: float) -> None:
    for change in (swap_words, misspell_words):
        changed = change(LINES, fraction, 1)
        pairs = [pair for old, new in zip(WORDS, changed, strict=True) for pair in zip(old, new.split(), strict=True)]
        different = [(before, after) for before, after in pairs if before != after]
        assert len(different) == round(fraction * TOTAL)
        for before, after in different:
            assert after == "AAA" if change is swap_words else one_edit_apart(before, after)
        for old, new in zip(LINES, changed, strict=True):
            assert [part for part in map(str, old) if part.isspace()] == [part for part in new if part.isspace()]


def test_typos_are_of_every_kind() -> None:
    changed = misspell_words(["abcdefgh"] * 400, 1.0, 0)
    lengths = [len(word) for word in changed]
    assert {7, 8, 9} == set(lengths)
    same_letters = [word for word in changed if sorted(word) == list("abcdefgh")]
    assert 60 < len(same_letters) < 140  # swapped with the next: a quarter
    assert all(misspell_words(["x"], 1.0, seed)[0] not in ("x", "") for seed in range(50))


@pytest.mark.parametrize("fraction", [0.015, 0.05, 0.5])
def test_deletions_take_words_away_and_keep_lines_and_order(fraction: float) -> None:
    left = delete_words(LINES, fraction, 1)
    assert [line.count("\n") for line in left] == [1] * len(LINES)
    assert sum(len(line.split()) for line in left) == TOTAL - round(fraction * TOTAL)
    for old, new in zip(WORDS, left, strict=True):
        remaining = iter(old)
        assert all(word in remaining for word in new.split())


@pytest.mark.parametrize("name", CHANGES)
def test_changes_repeat_with_the_seed(name: str) -> None:
    assert set(CHANGES) == set(TEXT_CHANGES)
    assert CHANGES[name](LINES, 0.05, 1) == CHANGES[name](LINES, 0.05, 1)
    assert CHANGES[name](LINES, 0.05, 1) != CHANGES[name](LINES, 0.05, 2)


@pytest.fixture(scope="module")
def reader() -> tuple:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["one two three\n", "four five\n"], 270)
    model, _ = build_causal_lm(ModelArguments(preset="twicing", config_overrides=TINY_GPT2), tokenizer, 64)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=1)
    return model, tokenizer


def test_text_perplexity_equals_one_pass_over_a_single_block(reader: tuple) -> None:
    model, tokenizer = reader
    text = TextSplit(["one two three\n", "four five\n"])
    ids = torch.from_numpy(encode(text, tokenizer, "")).long()[None]
    assert ids.shape[1] <= 64
    mean = model(input_ids=ids, labels=ids).loss.item()
    found = text_perplexity(model, tokenizer, text, block_size=64)
    token, word = found
    assert token["value"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert word["value"] == pytest.approx(math.exp(mean * (ids.shape[1] - 1) / 7), rel=1e-4)
    assert [entry["metric"] for entry in found] == ["perplexity", "word_perplexity"]
    assert [(entry["samples"], entry["unit"]) for entry in found] == [(ids.shape[1] - 1, "tokens"), (7, "words")]
    short = text_perplexity(model, tokenizer, text, block_size=4)
    assert short[0]["value"] != pytest.approx(token["value"], rel=1e-3)  # less context


def test_a_language_model_is_measured_with_every_change(reader: tuple) -> None:
    model, tokenizer = reader
    settings = TextSettings(fractions=(0.4, 1.0), seed=5)
    lines, seen = ["one two three", "four five\n"], []
    report = evaluate_text_robustness(model, tokenizer, lines, settings, block_size=64, on_result=seen.append)
    results = report["results"]
    assert seen == results
    assert len(results) == count_measurements(settings, is_classifier=False) == 14
    assert [result["disturbance"] for result in results[::2]] == [
        "clean", "word swap", "word swap", "word deletion", "word deletion", "typos", "typos"
    ]  # fmt: skip
    swapped = text_perplexity(model, tokenizer, TextSplit(["AAA AAA AAA\n", "AAA AAA\n"]), 64)
    for result, expected in zip(results[4:6], swapped, strict=True):
        about = {"family": "word swap", "disturbance": "word swap", "parameters": {"fraction": 1.0}, "seed": 5}
        assert result == about | expected
    clean = text_perplexity(model, tokenizer, TextSplit(["one two three\n", "four five\n"]), 64)
    assert [result["value"] for result in results[:2]] == [entry["value"] for entry in clean]
    assert results[7]["samples"] == 5 + 2 - 2  # words and ends of lines, without the two deleted
    assert set(report["definitions"]) == {"word swap", "word deletion", "typos", "fraction"}
    done = [result for result in results if result["disturbance"] != "typos"]
    seen.clear()
    again = evaluate_text_robustness(
        model, tokenizer, lines, settings, block_size=64, done=done, on_result=seen.append
    )
    assert again["results"] == results
    assert {result["disturbance"] for result in seen} == {"typos"}


def test_a_part_of_less_than_half_a_word_is_said_to_change_nothing(reader: tuple) -> None:
    """It would read as a model that no change of words disturbs."""
    settings = TextSettings(changes=("word_swap",), fractions=(0.05, 0.5))
    report = evaluate_text_robustness(*reader, ["one two three", "four five"], settings, block_size=64)
    said = {(entry["parameters"].get("fraction"), entry.get("unchanged", False)) for entry in report["results"]}
    assert said == {(None, False), (0.05, True), (0.5, False)}
    text = plain_text({"checkpoint": "a", **report})
    assert "Of so few words 5 % is less than half a word: no word was changed there." in text
    none = {"checkpoint": "a", **report, "results": [e for e in report["results"] if not e.get("unchanged")]}
    assert "half a word" not in plain_text(none)


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_any_text_classifier_is_measured(reader: tuple, model_type: str) -> None:
    """A stock model, with or without a padding token of its own."""
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

    _, tokenizer = reader
    torch.manual_seed(1)
    if model_type == "bert":
        size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
        model = BertForSequenceClassification(BertConfig(vocab_size=270, num_labels=3, **size))
    else:
        model = GPT2ForSequenceClassification(GPT2Config(vocab_size=270, n_embd=8, n_layer=1, n_head=2, num_labels=3))
    texts, labels = ["one two three", "four five", "two", "three one five four"] * 3, [0, 1, 2, 0] * 3
    with torch.no_grad():
        model.eval()
        logits = [model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0] for text in texts]
    right = [int(found.argmax()) == label for found, label in zip(logits, labels, strict=True)]
    settings = TextSettings(changes=("word_swap",), fractions=(0.5,))
    report = evaluate_text_robustness(model, tokenizer, texts, settings, labels=labels)
    clean, swapped = report["results"]
    assert clean["value"] == pytest.approx(sum(right) / 12)
    assert (swapped["metric"], swapped["samples"], swapped["unit"]) == ("accuracy", 12, "texts")


def test_a_classifier_whose_tokenizer_cannot_pad_reads_one_text_at_a_time(reader: tuple) -> None:
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reader[1].backend_tokenizer)
    assert tokenizer.pad_token_id is None
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model = BertForSequenceClassification(BertConfig(vocab_size=270, **size))
    report = evaluate_text_robustness(
        model, tokenizer, ["one two three", "four"], TextSettings(changes=(), fractions=()), labels=[0, 1]
    )
    assert report["results"][0]["samples"] == 2


def test_a_tokenizer_of_a_larger_model_is_refused(reader: tuple) -> None:
    from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=20, **size))
    language_model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2))
    for model, options in ((classifier, {"labels": [0]}), (language_model, {})):
        with pytest.raises(UsageError, match=r"must give tokens that the model has, 0 to 19, got \d+: it is another"):
            evaluate_text_robustness(model, reader[1], ["one two three"], **options)  # type: ignore[arg-type]


def test_models_without_finite_results_are_refused(reader: tuple) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    classifier = BertForSequenceClassification(BertConfig(vocab_size=270, **size))
    language_model = copy.deepcopy(reader[0])
    for model in (classifier, language_model):
        with torch.no_grad():
            model.get_input_embeddings().weight.fill_(math.nan)
    with pytest.raises(UsageError, match="must have finite logits, got others"):
        evaluate_text_robustness(classifier, reader[1], ["one two"], labels=[0])
    with pytest.raises(UsageError, match=r"must have finite losses, got others for \d+ of \d+ tokens"):
        evaluate_text_robustness(language_model, reader[1], ["one two"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"changes": ("shuffle",)}, "changes must be names among word_swap, deletion, typo, got 'shuffle'"),
        ({"changes": ("typos",)}, "did you mean typo\\?"),
        ({"fractions": (0.0,)}, "fractions must be > 0 and <= 1, got 0.0"),
        ({"fractions": (0.1, 0.1)}, "fractions must name every value once, got 0.1 0.1"),
        ({"seed": -1}, "seed must be an integer >= 0, got -1"),
    ],
)
def test_wrong_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TextSettings(**fields)


def test_wrong_texts_and_labels_are_refused(reader: tuple) -> None:
    model, tokenizer = reader
    for texts, options, message in (
        ("a text", {}, "texts must be a list of strings"),
        (["", " \n"], {}, "texts must have a word, got 2 texts without any"),
        (["a b"], {"block_size": 1}, "block_size must be an integer from 2 to 64"),
        (["a b"], {"block_size": 65}, "block_size must be an integer from 2 to 64"),
        (["a b"], {"labels": [0, 1]}, "labels must be one class index a text, 1, got 2"),
        (["a b"], {"labels": [9]}, "labels must be classes of the model, 0 to 1, got 9"),
    ):
        with pytest.raises(UsageError, match=message):
            evaluate_text_robustness(model, tokenizer, texts, **options)  # type: ignore[arg-type]
