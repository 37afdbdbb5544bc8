"""The run record, and which output folders are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_imgproc_attn import records
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import IMAGE_TRAINER_DEFAULTS, ImageDataArguments
from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments


def record_of(folder: Path, words: str = "", task: str = "image-classification") -> dict[str, Any]:
    arguments = parse_arguments(words.split(), ImageDataArguments, IMAGE_TRAINER_DEFAULTS, "")
    training_args = build_training_arguments(arguments, {"use_cpu": True, "report_to": "none"}, str(folder))
    return records.start_record(task, arguments, training_args)


def test_record_holds_what_a_run_needs_to_be_repeated(tmp_path: Path) -> None:
    words = "--preset twicing --seed 7 --max_steps 3"
    path = records.write_record(str(tmp_path), record_of(tmp_path, words))
    text = path.read_text(encoding="utf-8")
    record = json.loads(text)
    assert path == tmp_path / "run.json"
    assert record["arguments"]["model"]["preset"] == "twicing"
    assert record["arguments"]["trainer"]["max_steps"] == 3
    assert record["arguments"]["data"]["dataset_name"] == "digits"
    assert record["seed"] == 7
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["versions"]) >= {"python", "transformers", "datasets", "accelerate", "hf_imgproc_attn"}
    assert record["device"]["type"] == "cpu"
    assert record["device"]["name"]
    assert record["argv"][:2] == ["--preset", "twicing"]
    assert record["command"] == words.split()
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_data_set_paths_are_recorded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "mine"):
        (tmp_path / name).mkdir()
    assert record_of(tmp_path, "--dataset_name mine")["arguments"]["data"]["dataset_name"] == str(tmp_path / "mine")
    # The embedded data, whatever lies in the working directory.
    assert record_of(tmp_path)["arguments"]["data"]["dataset_name"] == "digits"


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    records.write_record(str(tmp_path), {"status": "running"})

    class Unwritable:
        def __str__(self) -> str:
            raise RuntimeError("cannot be written")

    with pytest.raises(RuntimeError, match="cannot be written"):
        records.write_record(str(tmp_path), {"status": Unwritable()})
    assert json.loads((tmp_path / "run.json").read_text(encoding="utf-8")) == {"status": "running"}


def test_git_state_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "repository" / "records.py"
    source.parent.mkdir()
    source.write_text("", encoding="utf-8")
    monkeypatch.setattr(records, "__file__", str(source))
    # Git is not installed everywhere, and a test folder may lie inside a repository of somebody else's.
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert records.git_state() is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *words], cwd=source.parent, check=True, capture_output=True)

    git("init")
    assert records.git_state() is None  # not one of the repository's files
    git("add", ".")
    git("commit", "-m", "first")
    state = records.git_state()
    assert state is not None
    assert len(state["revision"]) == 40
    assert state["dirty"] is False
    source.write_text("changed", encoding="utf-8")
    assert records.git_state() == {"revision": state["revision"], "dirty": True}


def test_weights_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert records.weights_sha256(str(tmp_path)) == {"model.safetensors": digest}


def test_free_folders_are_accepted(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        records.check_output_dir(str(folder), record_of(folder), resume=False)


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    for folder, state in ((tmp_path / "new", "does not exist"), (tmp_path, "is empty")):
        with pytest.raises(UsageError, match=f"output_dir must hold the run that --resume goes on with, .*{state}"):
            records.check_output_dir(str(folder), record_of(folder), resume=True)


def test_foreign_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    for resume in (False, True):
        with pytest.raises(
            UsageError, match=r"output_dir must be empty or hold this run, got '.*', which holds other"
        ):
            records.check_output_dir(str(tmp_path), record_of(tmp_path), resume)
        with pytest.raises(UsageError, match="output_dir must be a folder"):
            records.check_output_dir(str(tmp_path / "notes.txt"), record_of(tmp_path), resume)
    (tmp_path / "run.json").write_text("{", encoding="utf-8")
    with pytest.raises(UsageError, match=r"has a run\.json that cannot be read"):
        records.check_output_dir(str(tmp_path), record_of(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset twicing", "with preset 'bilateral' instead of 'twicing'"),
        ("--preset bilateral --dataset_name other", "with dataset_name 'digits' instead of 'other'"),
        ("--preset bilateral --config_overrides hidden_size=8", r"with config_overrides \[\] instead of"),
        ("--preset bilateral --horizontal_flip", "with horizontal_flip False instead of True"),
        ("--preset bilateral --seed 1", "with seed 42 instead of 1"),
        ("--preset bilateral --learning_rate 1e-4", "with learning_rate 5e-05 instead of 0.0001"),
    ],
)
def test_folder_of_another_run_is_refused(tmp_path: Path, words: str, message: str) -> None:
    records.write_record(str(tmp_path), record_of(tmp_path, "--preset bilateral"))
    for resume in (False, True):
        with pytest.raises(UsageError, match=f"holds another run, {message}"):
            records.check_output_dir(str(tmp_path), record_of(tmp_path, words), resume)
    with pytest.raises(UsageError, match="holds another run, of task image-classification"):
        records.check_output_dir(str(tmp_path), record_of(tmp_path, words, task="causal-lm"), resume=True)


def test_folder_of_the_same_run_needs_resume(tmp_path: Path) -> None:
    records.write_record(str(tmp_path), record_of(tmp_path, "--preset bilateral"))
    same = record_of(tmp_path, "--preset bilateral --logging_steps 2 --dataloader_num_workers 1 --resume")
    with pytest.raises(UsageError, match="holds this run already; pass --resume or choose another folder"):
        records.check_output_dir(str(tmp_path), same, resume=False)
    records.check_output_dir(str(tmp_path), same, resume=True)


def test_resuming_on_other_data_is_refused(tmp_path: Path) -> None:
    first = record_of(tmp_path) | {"data_fingerprint": {"train": {"rows": 3, "sha256": "x"}}, "training_seconds": 2.5}
    records.write_record(str(tmp_path), first)
    second = record_of(tmp_path)
    records.check_output_dir(str(tmp_path), second, resume=True)
    assert second["training_seconds"] == 2.5
    records.check_same_data(second, {"train": {"rows": 3, "sha256": "x"}})
    with pytest.raises(UsageError, match="the train split must be the one that the run was started with"):
        records.check_same_data(second, {"train": {"rows": 3, "sha256": "y"}})


SECRET = "hf_" + "AbCd1234" * 4
FULL_OF_SECRETS: dict[str, Any] = {
    "argv": [
        "--config", "/home/alice/thesis/recipe.yaml", "--output_dir", "outputs/alice/run", "--seed", "3",
        "--dataset_name=/mnt/lab-7/my data/birds", "--hub_token", "secret-1", "--hub_token=secret-2",
        "--config_overrides", "note=/home/alice/x", "hidden_size=8",
        "--fsdp_config", '{"file": "/home/alice smith/f"}',
        "--model_name_or_path", "you/model", "--learning_rate", "2e-3",
    ],
    "command": ["--output_dir", "/home/alice", "--tokenizer_name", "~alice/tok", "--deepspeed", "../alice/ds.json"],
    "arguments": {
        "model": {"model_name_or_path": r"C:\Users\alice\checkpoints\vit", "config_overrides": ["a=/home/alice/b"]},
        "data": {"dataset_name": "/mnt/lab-7/my data/birds", "dataset_config_name": None, "validation_fraction": 0.1},
        "run": {"config": "thesis/alice.d/recipe.yaml", "output_dir": "/home/alice/"},
        "trainer": {
            "output_dir": "/home/alice/run", "hub_token": SECRET, "push_to_hub_token": "secret-3", "deepspeed": None,
            "run_name": "/scratch/alice/run", "fsdp_config": {"path": "~/f.json", "min": 3}, "debug": [],
            "hub_model_id": "you/model", "logging_steps": 0.02, "project": f"a note with {SECRET} inside",
        },
    },
    "resumed_from": "outputs/alice/checkpoint-20",
    "device": {"name": "A processor", "platform": "Linux 6.1.0-13-alice-desktop", "threads": 4},
    "model_config": {
        "_name_or_path": "/home/alice/base", "bos_token_id": 0, "id2label": {"0": "/m/01", "1": "~"}, "hidden_size": 8,
    },
    "git": None,
    "source": "https://alice:password@example.org/data/set",
}  # fmt: skip


def test_public_record_has_no_paths_names_or_secrets() -> None:
    public = records.public_record(FULL_OF_SECRETS)
    text = json.dumps({**public, "model_config": {**public["model_config"], "id2label": {}}})
    for secret in ("alice", "secret", SECRET, "lab-7", "thesis", "scratch", "password", "my data", "smith", "mnt"):
        assert secret not in text
    for path in ("/home", "~", "..", "C:"):
        assert path not in text.replace("...", "")
    assert public["argv"] == [
        "--config", "recipe.yaml", "--output_dir", "run", "--seed", "3", "--dataset_name=birds", "--hub_token", "...",
        "--hub_token=...", "--config_overrides", "note=x", "hidden_size=8", "--fsdp_config", '{"file": "f"}',
        "--model_name_or_path", "you/model", "--learning_rate", "2e-3",
    ]  # fmt: skip
    assert public["command"] == ["--output_dir", ".", "--tokenizer_name", "tok", "--deepspeed", "ds.json"]
    assert public["arguments"]["data"] == {
        "dataset_name": "birds", "dataset_config_name": None, "validation_fraction": 0.1,
    }  # fmt: skip
    assert public["arguments"]["model"] == {"model_name_or_path": "vit", "config_overrides": ["a=b"]}
    trainer = public["arguments"]["trainer"]
    assert trainer["hub_model_id"] == "you/model"
    assert trainer["fsdp_config"] == {"path": "f.json", "min": 3}
    assert trainer["run_name"] == "run"
    assert "hub_token" not in trainer
    assert public["resumed_from"] == "checkpoint-20"
    assert public["device"] == {"name": "A processor", "platform": "Linux 6.1.0", "threads": 4}
    assert public["model_config"]["id2label"] == {"0": "/m/01", "1": "~"}  # names of classes, whatever they look like
    assert public["model_config"]["bos_token_id"] == 0
    assert public["source"] == "https://example.org/data/set"
    assert public["local_paths"] == ["dataset_name", "model_name_or_path"]


def test_public_record_changes_nothing_twice_nor_its_argument() -> None:
    before = json.dumps(FULL_OF_SECRETS)
    public = records.public_record(FULL_OF_SECRETS)
    assert json.dumps(FULL_OF_SECRETS) == before
    assert records.public_record(public) == public


def test_public_record_of_a_real_run_keeps_what_is_public(tmp_path: Path) -> None:
    record = record_of(tmp_path / "run", f"--preset twicing --output_dir {tmp_path / 'run'} --max_steps 3")
    public = records.public_record(record)
    assert str(tmp_path) in json.dumps(record)
    assert str(tmp_path) not in json.dumps(public)
    assert public.pop("local_paths") == []
    changed = {name for name in record if public[name] != record[name]}
    assert changed == {"argv", "command", "arguments"}
    assert public["arguments"]["trainer"] == {
        name: value for name, value in record["arguments"]["trainer"].items() if name != "hub_token"
    } | {"output_dir": "run"}
    assert public["arguments"]["data"] == record["arguments"]["data"]


def test_local_checkpoints_and_tokenizers_are_recorded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start").mkdir()
    record = record_of(tmp_path, "--model_name_or_path start")
    assert record["arguments"]["model"]["model_name_or_path"] == str(tmp_path / "start")
    assert record["command"] == ["--model_name_or_path", str(tmp_path / "start")]
    assert record["argv"] == ["--model_name_or_path", "start"]
    assert records.public_record(record)["local_paths"] == ["model_name_or_path"]
    record = record_of(tmp_path, "--model_name_or_path someone/start")
    assert record["arguments"]["model"]["model_name_or_path"] == "someone/start"
    assert records.public_record(record)["local_paths"] == []
