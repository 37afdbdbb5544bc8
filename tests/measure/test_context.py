"""``imgproc-attn context``: the same tokens at every length, against a loop over single tokens; what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel, cli
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.measure.context import choose_lengths, summarise, window_ends, window_losses

FIELDS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 12, "n_positions": 48}
FIELDS |= {"bos_token_id": 11, "eos_token_id": 11}


def model_of(preset: str | None = None) -> Any:
    torch.manual_seed(0)
    if preset is None:
        return GPT2LMHeadModel(GPT2Config(**FIELDS)).eval()
    return ImgProcGPT2LMHeadModel(ImgProcGPT2Config.from_preset(preset, **FIELDS)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    model_of().save_pretrained(folder)
    vocab = {letter: index for index, letter in enumerate("abcdefghijk")} | {"<|endoftext|>": 11}
    GPT2Tokenizer(vocab=vocab, merges=[]).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "novel.txt"
    path.write_text("".join(np.random.default_rng(0).choice(list("abcdefghijk"), 200)), encoding="utf-8")
    return path


@pytest.mark.parametrize("preset", [None, "twicing", "alibi"])
def test_losses_are_those_of_single_tokens_with_as_many_before_them(preset: str | None) -> None:
    model, rng = model_of(preset), np.random.default_rng(0)
    windows = [rng.integers(0, 11, 32) for _ in range(3)]
    found = window_losses(model, windows, [8, 20, 32], scored=5)
    for length, values in found.items():
        for window, value in zip(windows, values, strict=True):
            ids = torch.from_numpy(window[-length:])
            wanted = []
            for place in range(length - 5, length):
                logits = model(ids[None, :place]).logits[0, -1].double()
                wanted.append(-torch.log_softmax(logits, -1)[ids[place]].item())
            assert value == pytest.approx(np.mean(wanted), rel=1e-4)
    assert abs(found[8] - found[32]).max() > 1e-4, "the context matters"


def test_windows_are_spread_and_stay_inside_their_documents() -> None:
    tokens = {"a": np.arange(100), "b": np.arange(200, 260), "short": np.arange(500, 510)}
    windows = window_ends(tokens, 40, 6)
    ends = [window[-1] for window in windows]
    assert len(set(ends)) == 6
    assert max(ends) > 250
    for window in windows:
        assert np.array_equal(np.diff(window), np.ones(39)), "one piece of one document"
    with pytest.raises(UsageError, match="text must have room for two windows of 100 tokens, got 1"):
        window_ends(tokens, 100, 6)


def test_the_gain_is_paired_and_has_students_interval() -> None:
    base = np.array([1.0, 2.0, 3.0])
    first, second = summarise({8: base, 16: base - np.array([0.1, 0.2, 0.3])})
    assert (first["perplexity"], first["gain"]) == (pytest.approx(math.exp(2)), 0)
    assert second["gain"] == pytest.approx(0.2)
    half = 4.302653 * 0.1 / math.sqrt(3)  # the 97.5 % quantile of two degrees of freedom
    assert second["gain_interval"] == pytest.approx([0.2 - half, 0.2 + half])


def test_the_command_prints_a_table_and_writes_a_record(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "context.json"
    words = ["context", str(checkpoint), "--text", str(text), "--lengths", "8", "16", "48", "--windows", "5"]
    words += ["--scored", "4", "--output", str(output)]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["context", "8", "16", "48"]
    record = json.loads(output.read_text(encoding="utf-8"))
    assert (record["windows"], record["scored"], record["text"]["documents"]) == (5, 4, 1)
    assert [row["length"] for row in record["rows"]] == [8, 16, 48]
    assert record["rows"][0]["perplexity"] == pytest.approx(12, rel=0.2), "untrained, of 12 words"
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "--force replaces it" in capsys.readouterr().err


def test_lengths_follow_model_and_text() -> None:
    assert choose_lengths(None, _Long(), 300) == [128, 256]
    assert choose_lengths([60], model_of("alibi"), 100) == [60], "no table, so no end"
    with pytest.raises(UsageError, match="must not exceed the model's 48 positions, got 60"):
        choose_lengths([60], model_of(), 100)
    with pytest.raises(UsageError, match="lengths must be given: the shortest, 128, is more than the model's 48"):
        choose_lengths(None, model_of(), 100)


class _Long:
    """A model with 1024 positions, as far as its configuration goes."""

    config = GPT2Config(**{**FIELDS, "n_positions": 1024})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lengths 16 8", "lengths must be different numbers that ascend, got [16, 8]"),
        ("--lengths 8 8", "lengths must be different numbers that ascend"),
        ("--lengths 8 --scored 8", "scored must be at least 1 and less than the shortest length 8, got 8"),
        ("--windows 1", "windows must be an integer >= 2, got 1"),
        ("--lengths 8 --scored 2 --text nowhere.txt", "text must be a readable file, got 'nowhere.txt'"),
        ("--lengths 8 40 --scored 2 --text SHORT", "lengths must not exceed the 12 tokens of the longest document"),
        ("--lengths 8 --scored 2 --text EMPTY", "text must not be empty"),
        ("--lengths 8 --scored 2 --text BINARY", "text must be in UTF-8"),
        ("--lengths 8 --scored 2 --text SHORT --output .", "output must be a file, got '.'"),
    ],
)
def test_mistakes_are_one_line(
    checkpoint: Path, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {"SHORT": b"abcdefghijka", "EMPTY": b" \n", "BINARY": b"\xff\xfe\xfa"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        words = words.replace(name, str(tmp_path / name))
    with pytest.raises(SystemExit) as stop:
        cli.main(["context", str(checkpoint), *words.split()])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if "%|" not in line]) == 1


def test_what_is_no_language_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(SystemExit):
        cli.main(["context", str(tmp_path)])
    assert "checkpoint must be a causal language model with its tokenizer, got" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "scale", "message"),
    [
        ({"vocab_size": 8}, 1.0, "the tokenizer must give tokens that the model has, 0 to 7, got"),
        ({}, math.nan, "the model must have finite losses, got others"),
    ],
)
def test_a_model_that_cannot_read_the_text_is_one_line(
    checkpoint: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: Any, scale: float,
    message: str,
) -> None:  # fmt: skip
    model = GPT2LMHeadModel(GPT2Config(**{**FIELDS, **fields}))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    model.save_pretrained(tmp_path / "model")
    GPT2Tokenizer.from_pretrained(checkpoint).save_pretrained(tmp_path / "model")
    words = [str(tmp_path / "model"), "--text", str(text), "--lengths", "16", "32", "--windows", "2", "--scored", "4"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(["context", *words, "--output", str(tmp_path / "context.json")])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
