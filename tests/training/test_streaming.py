"""Training data that are read as they are needed: order, shares of processes, going on, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
import train_causal_lm
import train_image_classification
from safetensors.torch import load_file

from hf_imgproc_attn.training_support.arguments import ImageDataArguments, TextDataArguments
from hf_imgproc_attn.training_support.data_loading import load_splits
from hf_imgproc_attn.training_support.image_data import load_image_splits
from hf_imgproc_attn.training_support.image_pixels import build_image_processor, load_pixels
from hf_imgproc_attn.training_support.image_streams import load_image_stream
from hf_imgproc_attn.training_support.streams import Stream
from hf_imgproc_attn.training_support.text_data import TokenBlocks, encode, load_text_splits, load_text_stream
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.training.conftest import TINY_GPT2, TINY_VIT, WriteImages, random_images

LINES = [f"{'word ' * (number % 7 + 1)}{number}" for number in range(60)]
TINY = ["--config_overrides", *TINY_GPT2, "--block_size", "16", "--tokenizer_vocab_size", "270", "--use_cpu"]
QUIET = ["--disable_tqdm", "true", "--eval_strategy", "no", "--per_device_train_batch_size", "4"]


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` sleeps five seconds after each pass over Parquet files in an order of its own."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(params=["parquet", "jsonl", "txt", "csv", "saved"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same lines, in a folder or file of each kind."""
    rows, path = datasets.Dataset.from_dict({"text": LINES}), tmp_path / f"lines.{request.param}"
    if request.param == "saved":
        rows.save_to_disk(path)
    elif request.param == "txt":
        path.write_text("\n".join(LINES), encoding="utf-8")
    else:
        getattr(rows, {"jsonl": "to_json"}.get(request.param, f"to_{request.param}"))(path)
    return str(path)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Lines in a training and a validation split."""
    (tmp_path / "data").mkdir()
    for split, lines in (("train", LINES[:50]), ("validation", LINES[50:])):
        datasets.Dataset.from_dict({"text": lines}).to_parquet(tmp_path / "data" / f"{split}.parquet")
    return str(tmp_path / "data")


def process(rank: int = 0, processes: int = 1) -> Any:
    return SimpleNamespace(process_index=rank, world_size=processes)


def test_a_stream_has_the_blocks_of_the_whole(data: str) -> None:
    """But for the last, filled one: the stream goes on with another pass."""
    arguments = TextDataArguments(dataset_name=data, validation_fraction=0.0)
    tokenizer = train_tokenizer(LINES, 270)
    whole = TokenBlocks(encode(load_text_splits(arguments)["train"], tokenizer, ""), 16, tokenizer.pad_token_id)
    text, others = load_text_stream(TextDataArguments(dataset_name=data, streaming=True), 0)
    assert others == {}
    streamed = list(itertools.islice(text.blocks(tokenizer, 16, process()), len(whole) + 3))
    for block, index in zip(streamed, range(len(whole) - 1), strict=False):
        assert block["input_ids"].tolist() == whole[index]["input_ids"].tolist()
        assert block["labels"].tolist() == whole[index]["labels"].tolist()
    joined = torch.cat([streamed[0]["input_ids"][:1], *(block["input_ids"][1:] for block in streamed)]).tolist()
    start = tokenizer.eos_token_id
    assert joined.count(start) == 2  # where each pass begins
    second = joined[joined.index(start, 1) :]
    assert len(second) > 16
    assert joined[: len(second)] == second


def rows_of(stream: Stream, rank: int, processes: int, passes: int) -> list[list[str]]:
    return [[row["text"] for row in rows] for rows in itertools.islice(stream.passes(rank, processes), passes)]


@pytest.mark.parametrize("buffer", [0, 8])
def test_processes_share_the_rows_of_every_pass(folder: str, buffer: int) -> None:
    arguments = TextDataArguments(dataset_name=folder, streaming=True)
    stream = Stream(load_splits(arguments, "", streaming=True)["train"], folder, 3, buffer)
    shares = [rows_of(stream, rank, 2, 2) for rank in range(2)]
    for first, second in zip(*shares, strict=True):
        assert not set(first) & set(second)
        assert sorted(first + second) == sorted(LINES[:50])
    alone = rows_of(stream, 0, 1, 2)
    assert alone == rows_of(stream, 0, 1, 2)
    assert (alone[0] == LINES[:50], alone[0] == alone[1]) == (not buffer, not buffer)
    if buffer:
        assert alone != rows_of(stream._replace(seed=4), 0, 1, 2)


def goes_on(script: Any, words: list[str], tmp_path: Path) -> dict[str, Any]:
    """A run that goes on after its seventh step is bitwise the uninterrupted one, whose record is returned."""
    words = [*words, *QUIET, "--streaming", "--evaluate_test", "false", "--max_steps", "12", "--logging_steps", "1"]
    words += ["--save_strategy", "steps", "--save_steps", "7"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert script.main([*words, "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("checkpoint-12"))
    record: dict[str, Any] = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    (half / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    assert script.main([*words, "--output_dir", str(half), "--resume"]) == 0
    resumed = json.loads((half / "run.json").read_text(encoding="utf-8"))
    assert resumed["resumed_from"].endswith("checkpoint-7")
    assert resumed["train_loss"] == record["train_loss"]
    ours, theirs = (load_file(run / "model.safetensors") for run in (whole, half))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    return record


@pytest.mark.parametrize("more", ["", "--shuffle_buffer 4 --max_train_samples 9"])
def test_a_run_goes_on_with_the_very_next_text(folder: str, tmp_path: Path, more: str) -> None:
    """Also over several passes."""
    record = goes_on(train_causal_lm, [*TINY, "--dataset_name", folder, *more.split()], tmp_path)
    assert record["data_fingerprint"]["train"]["streamed"]
    assert record["metrics"]["validation"]["loss"] > 0


def test_a_run_goes_on_with_the_very_next_image(write_images: WriteImages, tmp_path: Path) -> None:
    """Several passes, each with other crops and another order."""
    path = str(write_images("images", train=[0, 1, 2, 0, 1] * 4, test=[0, 1, 2]))
    more = ["--random_crop_padding", "1", "--horizontal_flip", "--shuffle_buffer", "4", "--use_cpu"]
    record = goes_on(
        train_image_classification, ["--config_overrides", *TINY_VIT, "--dataset_name", path, *more], tmp_path
    )
    assert len({loss for _, loss in record["train_loss"]}) == 12


def test_a_stream_has_the_pixels_of_the_whole(write_images: WriteImages) -> None:
    path = str(write_images("images", train=[0, 1, 2, 0, 1], test=[2, 1]))
    processor = build_image_processor((8, 8), 3)
    arguments = ImageDataArguments(dataset_name=path, validation_fraction=0.0)
    whole = load_pixels(load_image_splits(arguments), processor, arguments, 0)
    streaming = dataclasses.replace(arguments, streaming=True)
    images, others = load_image_stream(streaming, 0)
    streamed = list(itertools.islice(images.pixels(processor, streaming, process()), 7))
    for index, item in enumerate(streamed):
        wanted = whole["train"][index % 5]
        assert torch.equal(item["pixel_values"], wanted["pixel_values"])
        assert item["labels"] == wanted["labels"]
    assert others.label_names == ["a", "b", "c"]
    assert load_pixels(others, processor, streaming, 0)["test"].fingerprint == whole["test"].fingerprint
    assert list(load_image_splits(streaming).rows) == ["test"]  # what is evaluated later
    halves = [images.pixels(processor, streaming, process(rank, 2)) for rank in range(2)]
    taken = [itertools.islice(half, count) for half, count in zip(halves, (3, 2), strict=True)]
    assert sorted(item["labels"] for half in taken for item in half) == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits", "streaming must be off for digits, which is in memory"),
        ("words", "label_column_name must be a column whose classes the data set names (ClassLabel) with streaming"),
    ],
)
def test_images_that_cannot_be_streamed(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "words":
        rows = {"image": random_images(3), "label": ["a", "b", "a"]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "words.parquet")
        name = str(tmp_path / "words.parquet")
    words = ["--dataset_name", name, "--streaming", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert train_image_classification.main([*words, "--use_cpu", *QUIET]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--streaming", "max_steps must be given with streaming, since nobody knows how long a stream is, got -1"),
        ("--streaming --max_steps 2 --dataloader_num_workers 1", "dataloader_num_workers must be 0 with streaming"),
        ("--streaming --max_steps 2 --lens_every 1", "lens_every must not be given with streaming, got 1"),
        ("--streaming --max_steps 2 --max_train_tokens 9", "max_train_tokens must be none with streaming, got 9"),
        ("--streaming --max_steps 2 --validation_fraction 0.2", "validation_fraction must be 0 with streaming"),
        ("--shuffle_buffer 4", "shuffle_buffer must be 0 without streaming, got 4"),
        ("--streaming --max_steps 2 --dataset_name pydoc_topics", "streaming must be off for pydoc_topics"),
        ("--streaming --max_steps 2 --text_column_name words", "text_column_name must be a column of the train split"),
    ],
)
def test_what_a_stream_cannot_give_is_one_line(
    folder: str, tmp_path: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--dataset_name", folder, *words.split(), "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main([*TINY, *QUIET, *given]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]
    assert message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("lines", "message"), [([], "is empty"), (["", " "], "have no text")])
def test_streams_without_rows_or_text_are_refused(
    lines: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = datasets.Features(text=datasets.Value("string"))
    path = str(tmp_path / "lines.parquet")
    datasets.Dataset.from_dict({"text": lines}, features=features).to_parquet(path)
    words = ["--dataset_name", path, "--streaming", "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main([*TINY, *QUIET, *words]) == 2
    assert message in capsys.readouterr().err
