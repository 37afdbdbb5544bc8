"""Text: columns, splits, words, blocks that cover every token, word swap, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import TextDataArguments
from hf_imgproc_attn.training_support.text_data import (
    TextSplit,
    TokenBlocks,
    encode,
    load_text_splits,
)
from hf_imgproc_attn.training_support.tokenizer import load_tokenizer, train_tokenizer
from tests.training.conftest import WriteText

LINES = [f"line {number} of the text" for number in range(20)]


def load(folder: Path | str, **options: Any) -> dict[str, TextSplit]:
    return load_text_splits(TextDataArguments(dataset_name=str(folder), **options))


@pytest.mark.parametrize("column", ["text", "prose"])
def test_column_is_detected_and_the_end_of_train_held_out(write_text: WriteText, column: str) -> None:
    splits = load(write_text("data", column=column, train=LINES, test=["a b"]), validation_fraction=0.25)
    assert [line.rstrip("\n") for line in splits["train"].lines] == LINES[:15]
    assert [line.rstrip("\n") for line in splits["validation"].lines] == LINES[15:]
    assert splits["test"].lines == ["a b\n"]


def test_own_validation_split_is_used(write_text: WriteText) -> None:
    splits = load(write_text("data", train=LINES, validation=["x y"]))
    assert len(splits["train"].lines) == 20
    assert splits["validation"].lines == ["x y\n"]


@pytest.mark.parametrize(
    ("name", "content"), [("train.txt", "\n".join(LINES)), ("train.csv", "text\n" + "\n".join(LINES))]
)
def test_text_and_csv_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    for source in (tmp_path, tmp_path / name):
        assert [line.strip() for line in load(source, validation_fraction=0)["train"].lines] == LINES


def test_saved_data_set(tmp_path: Path) -> None:
    datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": LINES})).save_to_disk(tmp_path / "saved")
    assert len(load(tmp_path / "saved", validation_fraction=0)["train"].lines) == 20


def test_wrong_columns_and_empty_splits_are_refused(write_text: WriteText, tmp_path: Path) -> None:
    folder = write_text("data", column="prose", train=LINES)
    with pytest.raises(
        UsageError, match=r"text_column_name must be a column of the train split \(prose\), got 'text'"
    ):
        load(folder, text_column_name="text")
    rows = {"a": LINES, "b": LINES, "n": list(range(20))}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "two.parquet")
    with pytest.raises(UsageError, match=r"several possible text columns \(a, b\).*--text_column_name"):
        load(tmp_path / "two.parquet")
    with pytest.raises(UsageError, match="text_column_name must be a column of texts, got 'n'"):
        load(tmp_path / "two.parquet", text_column_name="n")
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "none.parquet")
    with pytest.raises(UsageError, match="no text column; its columns are n"):
        load(tmp_path / "none.parquet")
    with pytest.raises(UsageError, match="the test split of data set .* is empty"):
        load(write_text("empty", train=LINES, test=[]))
    with pytest.raises(UsageError, match="the test split of data set .* has no text in its 2 rows"):
        load(write_text("blank", train=LINES, test=["", " "]))
    (tmp_path / "data.xyz").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"dataset_name must be a file of type csv, .*, got .*data\.xyz"):
        load(tmp_path / "data.xyz")


def test_limits_take_the_first_lines(write_text: WriteText) -> None:
    splits = load(
        write_text("data", train=LINES, validation=LINES, test=LINES), max_train_samples=3, max_eval_samples=2
    )
    assert [len(splits[split].lines) for split in ("train", "validation", "test")] == [3, 2, 2]
    assert splits["train"].lines[0] == LINES[0] + "\n"


def test_words_count_one_end_of_sentence_a_line(write_text: WriteText) -> None:
    splits = load(write_text("data", train=["", " = Title = \n", "two\nlines here\r\n"]), validation_fraction=0)
    assert splits["train"].lines == ["\n", " = Title = \n", "two\nlines here\n"]
    assert splits["train"].num_words == 1 + 4 + 5
    assert splits["train"].fingerprint["words"] == 10


def test_manual_splits_are_by_topic() -> None:
    from pydoc_data.topics import topics

    splits = load("pydoc_topics")
    words = {split: text.num_words for split, text in splits.items()}
    share = {split: count / sum(words.values()) for split, count in words.items()}
    assert 0.7 < share["train"] < 0.9
    assert share["validation"] > 0.05
    assert share["test"] > 0.05
    # Every topic is in exactly one split, whole.
    joined = {split: "".join(text.lines) for split, text in splits.items()}
    for title in ("with", "assert", "numbers"):
        text = "".join(line + "\n" for line in topics[title].splitlines())
        assert sum(text in joined[split] for split in joined) == 1


@pytest.mark.parametrize("block_size", [2, 5, 64])
def test_blocks_predict_every_token_exactly_once(block_size: int) -> None:
    tokens = np.arange(100, 137, dtype=np.int32)
    blocks = TokenBlocks(tokens, block_size, padding=7)
    predicted = []
    for block in blocks:
        inputs, labels = block["input_ids"].tolist(), block["labels"].tolist()
        assert len(inputs) == len(labels) == block_size
        assert labels[0] == -100
        for position, label in enumerate(labels[1:], start=1):
            if label == -100:
                assert inputs[position] == 7
            else:
                assert inputs[position] == label
                assert inputs[position - 1] == label - 1  # its context is there
                predicted.append(label)
    assert predicted == list(range(101, 137))


def test_tokens_are_those_of_all_lines_behind_one_end_of_text() -> None:
    tokenizer = train_tokenizer(LINES, 300)
    text = TextSplit([line + "\n" for line in LINES])
    tokens = encode(text, tokenizer, "")
    assert tokens[0] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in tokens[1:]
    assert tokenizer.decode(tokens[1:]) == "".join(text.lines)


def test_trained_tokenizer_survives_saving_and_knows_every_byte(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(LINES, 300)
    assert 258 < len(tokenizer) <= 300
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "line 3 — 日本\t\n"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)


def test_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tokenizer_name '.*nowhere' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))
