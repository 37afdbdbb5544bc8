"""What may change when a run is resumed, and what its record says of its sessions."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from hf_imgproc_attn import records
from hf_imgproc_attn.errors import UsageError
from tests.test_records import record_of

# Transformers 5.17 has the old name only, of which later ones make the new one.
HAS_NEW_NAME = hasattr(TrainingArguments, "activation_checkpointing")
CHECKPOINTING = "activation_checkpointing" if HAS_NEW_NAME else "gradient_checkpointing"


# One other value of every kind of option that is compared.
@pytest.mark.parametrize(
    "change",
    [
        "--per_device_train_batch_size 4", "--gradient_accumulation_steps 2", "--lr_scheduler_type cosine",
        "--warmup_steps 3", "--max_steps 9", "--num_train_epochs 7", "--weight_decay 0.5", "--max_grad_norm 0.5",
        "--data_seed 3", "--optim adafactor", "--adam_beta2 0.9", "--label_smoothing_factor 0.1", "--bf16 true",
        "--neftune_noise_alpha 5", "--ignore_data_skip true", "--train_sampling_strategy sequential",
        "--optim_args x=1", "--torch_compile true", f"--{CHECKPOINTING} true", "--auto_find_batch_size true",
        "--average_tokens_across_devices false", "--remove_unused_columns false",
    ],
)  # fmt: skip
def test_options_that_change_what_is_learned_cannot_change_on_the_way(tmp_path: Path, change: str) -> None:
    records.write_record(str(tmp_path), record_of(tmp_path, "--preset bilateral"))
    name = change.split()[0].removeprefix("--")
    with pytest.raises(UsageError, match=rf"holds another run, with {name} .* instead of "):
        records.check_output_dir(str(tmp_path), record_of(tmp_path, f"--preset bilateral {change}"), resume=True)


def test_names_of_options_are_names_of_options() -> None:
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert records._MAY_CHANGE - names <= {"logging_dir"}  # which older versions have
    assert set(records._CHOOSES_THE_BEST) <= records._MAY_CHANGE
    assert set(records._LENGTH) < names


def test_where_the_best_checkpoint_is_loaded_its_choice_cannot_change(tmp_path: Path) -> None:
    best = "--load_best_model_at_end true --eval_strategy steps --save_strategy steps --eval_steps 10 --save_steps 10"
    records.write_record(str(tmp_path), record_of(tmp_path, best))
    changed = record_of(tmp_path, best.replace("--eval_steps 10", "--eval_steps 5"))
    with pytest.raises(UsageError, match="with eval_steps 10 instead of 5"):
        records.check_output_dir(str(tmp_path), changed, resume=True)
    with pytest.raises(UsageError, match="holds another run, with "):
        records.check_output_dir(str(tmp_path), record_of(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("schedule", "may"),
    [
        ("constant", True),
        ("constant_with_warmup --warmup_steps 10", True),
        ("constant_with_warmup --warmup_steps 0.1", False),
        ("linear", False),
    ],
)
def test_a_run_may_become_longer_where_the_schedule_is_the_same(tmp_path: Path, schedule: str, may: bool) -> None:
    words = f"--lr_scheduler_type {schedule} --max_steps 5"
    records.write_record(str(tmp_path), record_of(tmp_path, words) | {"status": "finished"})
    longer = record_of(tmp_path, words.replace("--max_steps 5", "--max_steps 9"))
    if may:
        records.check_output_dir(str(tmp_path), longer, resume=True)
        return
    with pytest.raises(UsageError, match="with max_steps 5 instead of 9, over which the schedule .*to train longer"):
        records.check_output_dir(str(tmp_path), longer, resume=True)


def test_another_number_of_processes_is_another_batch(tmp_path: Path) -> None:
    record = record_of(tmp_path)
    records.write_record(str(tmp_path), {**record, "device": {**record["device"], "processes": 2}})
    with pytest.raises(UsageError, match="with 2 processes instead of 1"):
        records.check_output_dir(str(tmp_path), record_of(tmp_path), resume=True)


@pytest.mark.parametrize(
    ("words", "processes", "samples", "message"),
    [
        ("--per_device_train_batch_size 8", 1, 41, None),
        ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2", 1, 40, None),
        ("--per_device_train_batch_size 2", 4, 43, None),
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 2", 2, None, None),
        ("--per_device_train_batch_size 2", 4, None, "in 4 processes a stream is shared in another order"),
        ("--per_device_train_batch_size 4 --gradient_accumulation_steps 2", 1, 44, "in 1 processes x 4 samples x 2"),
        ("--per_device_train_batch_size 4", 1, 40, "with 2 processes instead of 1, which change the size of a batch"),
        ("--per_device_train_batch_size 5", 2, 40, "with per_device_train_batch_size 4 instead of 5"),
    ],
)
def test_another_cut_of_the_same_batch(
    tmp_path: Path, words: str, processes: int, samples: int | None, message: str | None
) -> None:
    """A run in two processes of four samples each goes on with steps of the same eight samples, or not at all."""
    started = record_of(tmp_path, "--per_device_train_batch_size 4")
    started["arguments"]["trainer"]["dataloader_drop_last"] = True
    records.write_record(str(tmp_path), {**started, "device": {**started["device"], "processes": 2}})
    record = record_of(tmp_path, words)
    record["device"]["processes"] = processes
    with contextlib.nullcontext() if message is None else pytest.raises(UsageError, match=message):
        goes_on(tmp_path, record, samples)


def goes_on(folder: Path, record: dict[str, Any], samples: int | None) -> None:
    records.check_output_dir(str(folder), record, resume=True)
    records.check_same_data(record, {}, True, samples)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    records.write_record(str(tmp_path), record_of(tmp_path) | {"status": "finished"})
    with pytest.raises(UsageError, match="holds this run, which is finished: there is nothing to resume"):
        records.check_output_dir(str(tmp_path), record_of(tmp_path), resume=True)


def test_what_the_data_decide_is_compared_when_they_are_known(tmp_path: Path) -> None:
    first = record_of(tmp_path)
    first["arguments"]["trainer"]["dataloader_drop_last"] = True
    records.write_record(str(tmp_path), first)
    record = record_of(tmp_path)
    records.check_output_dir(str(tmp_path), record, resume=True)
    records.check_same_data(record, {}, drop_last=True)
    assert not [name for name in record if name.startswith("_")]
    records.check_output_dir(str(tmp_path), record, resume=True)
    with pytest.raises(UsageError, match="started with dataloader_drop_last True, it cannot go on with False"):
        records.check_same_data(record, {}, drop_last=False)


def test_every_session_is_recorded_with_its_versions_and_device(tmp_path: Path) -> None:
    first = record_of(tmp_path)
    first["versions"] = {**first["versions"], "torch": "1.0"}
    records.write_record(str(tmp_path), first)
    for _ in range(2):
        record = record_of(tmp_path)
        records.check_output_dir(str(tmp_path), record, resume=True)
        records.check_same_data(record, {})
        records.write_record(str(tmp_path), record)
    assert [session["versions"]["torch"] for session in record["sessions"]] == ["1.0", *[torch.__version__] * 2]
    assert {tuple(sorted(session)) for session in record["sessions"]} == {("command", "device", "git", "versions")}


def test_a_card_tells_of_sessions_on_another_machine() -> None:
    from hf_imgproc_attn.cards.facts import environment

    device = {"name": "A", "type": "cpu", "platform": "Linux 6", "threads": 2, "processes": 1}
    git = {"revision": "0" * 40, "dirty": False}
    now = {
        "device": {**device, "name": "B"},
        "git": git,
        "versions": {"torch": "2"},
        "resumed_from": "run/checkpoint-20",
    }
    before = {"device": device, "git": git, "versions": {"torch": "1"}}
    facts = dict(environment({**now, "sessions": [before, now]}, None))
    text = facts["session 1, until checkpoint-20"]
    assert "A (cpu)" in text
    assert "torch 1" in text
    assert "git" not in text
    same = dict(environment({**now, "sessions": [now, now]}, None))
    assert same["session 1, until checkpoint-20"] == "the same device, versions and source"
    assert not [name for name in environment(now, None) if "session" in name[0]]


def test_a_licence_that_was_named_stays_until_another_is(tmp_path: Path) -> None:
    records.write_record(str(tmp_path), record_of(tmp_path, "--license mit"))
    record = record_of(tmp_path)
    records.check_output_dir(str(tmp_path), record, resume=True)
    assert record["arguments"]["run"]["license"] == "mit"
    assert record["command"] == ["--license", "mit"]
    records.write_record(str(tmp_path), record)
    record = record_of(tmp_path, "--license cc0-1.0")
    records.check_output_dir(str(tmp_path), record, resume=True)
    assert record["arguments"]["run"]["license"] == "cc0-1.0"
    assert record["command"] == ["--license", "cc0-1.0"]
