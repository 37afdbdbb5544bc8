"""Training data that are read as they are needed: order, shares of processes, going on, and what is refused."""

from __future__ import annotations

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
from safetensors.torch import load_file

from hf_imgproc_attn.training_support.arguments import TextDataArguments
from hf_imgproc_attn.training_support.data_loading import load_splits
from hf_imgproc_attn.training_support.streams import Stream
from hf_imgproc_attn.training_support.text_data import TokenBlocks, encode, load_text_splits, load_text_stream
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.training.conftest import TINY_GPT2

LINES = [f"{'word ' * (number % 7 + 1)}{number}" for number in range(60)]
TINY = ["--config_overrides", *TINY_GPT2, "--block_size", "16", "--tokenizer_vocab_size", "270", "--use_cpu"]
QUIET = ["--disable_tqdm", "true", "--eval_strategy", "no", "--per_device_train_batch_size", "4"]


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


@pytest.mark.parametrize("more", ["", "--shuffle_buffer 4 --max_train_samples 9"])
def test_a_run_goes_on_with_the_very_next_sample(folder: str, tmp_path: Path, more: str) -> None:
    """Bitwise the uninterrupted run, also over several passes."""
    words = [*TINY, *QUIET, "--dataset_name", folder, "--streaming", *more.split(), "--evaluate_test", "false"]
    words += ["--max_steps", "12", "--logging_steps", "1", "--save_strategy", "steps", "--save_steps", "7"]
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert train_causal_lm.main([*words, "--output_dir", str(whole)]) == 0
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("checkpoint-12"))
    record = json.loads((whole / "run.json").read_text(encoding="utf-8"))
    (half / "run.json").write_text(json.dumps({**record, "status": "running"}), encoding="utf-8")
    assert train_causal_lm.main([*words, "--output_dir", str(half), "--resume"]) == 0
    resumed = json.loads((half / "run.json").read_text(encoding="utf-8"))
    assert resumed["resumed_from"].endswith("checkpoint-7")
    assert resumed["train_loss"] == record["train_loss"]
    assert resumed["metrics"]["validation"]["loss"] == record["metrics"]["validation"]["loss"]
    ours, theirs = (load_file(run / "model.safetensors") for run in (whole, half))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert record["data_fingerprint"]["train"]["streamed"]


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
