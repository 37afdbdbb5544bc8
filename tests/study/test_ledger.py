"""The ledger: whole files only, grown but never mixed, and no run for two processes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.study.ledger import Ledger
from hf_imgproc_attn.study.plan import Run, Study
from hf_imgproc_attn.study.study_file import read_study
from tests.study.conftest import TINY_TASK, WriteStudy


def a_record(run: Run, rows: int = 64, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "study": "tiny",
        "version": 1,
        "identity": json.loads(json.dumps(run.identity)),
        "task": run.task.name,
        "variant": run.variant.name,
        "seed": run.seed,
        "status": "finished",
        "metrics": {},
        "measured": {},
        "measurements": [],
        "parameters": {"total": 1},
        "operations": {"step_per_sample": 1, "training": 1},
        "seconds": {"training": 1.0, "measuring": 0.0},
        "data_fingerprint": {"train": {"rows": rows}},
        **changes,
    }


@pytest.fixture
def study(write_study: WriteStudy) -> Study:
    return read_study(write_study())


@pytest.fixture
def ledger(tmp_path: Path, study: Study) -> Ledger:
    """With one finished run."""
    ledger = Ledger(tmp_path / "ledger")
    ledger.open(study)
    ledger.write(study.runs[0], a_record(study.runs[0]))
    return ledger


def test_a_ledger_grows_by_variants_seeds_and_tasks(ledger: Ledger, study: Study, write_study: WriteStudy) -> None:
    grown = read_study(
        write_study(
            variants=["softmax", "twicing", "sos"],
            seeds=3,
            tasks={"digits": TINY_TASK, "more": {**TINY_TASK, "recipe": "digits_vit.yaml"}},
        )
    )
    ledger.open(grown)
    assert list(ledger.everything(grown)) == [study.runs[0].name]
    ledger.open(study)  # and the file with less still fits
    header = json.loads((ledger.folder / "study.json").read_text(encoding="utf-8"))
    assert sorted(header["tasks"]) == ["digits", "more"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "with version 1, not 2: results of two studies are never mixed"),
        ({"name": "other"}, "with name 'tiny', not 'other'"),
        ({"split": "validation"}, "with split 'test', not 'validation'"),
        (
            {"tasks": {"digits": {**TINY_TASK, "options": {**TINY_TASK["options"], "learning_rate": 0.5}}}},
            "task digits has options.learning_rate 0.001 there and 0.5 here",
        ),
    ],
)
def test_a_ledger_of_another_version_is_refused_and_left_alone(
    ledger: Ledger, write_study: WriteStudy, changes: dict[str, Any], message: str
) -> None:
    before = {path.name: path.read_bytes() for path in ledger.folder.glob("*.json")}
    with pytest.raises(UsageError, match=message):
        ledger.open(read_study(write_study(**changes)))
    assert {path.name: path.read_bytes() for path in ledger.folder.glob("*.json")} == before


def test_a_variant_that_means_something_else_now_is_refused(ledger: Ledger, write_study: WriteStudy) -> None:
    other = read_study(write_study(variants=[{"name": "softmax", "preset": "softmax", "fields": {"qkv_bias": False}}]))
    ledger.open(other)
    with pytest.raises(UsageError, match="run digits-softmax-seed0 has variant.fields.qkv_bias None there"):
        ledger.everything(other)


def test_runs_with_different_data_are_refused(ledger: Ledger, study: Study) -> None:
    ledger.write(study.runs[1], a_record(study.runs[1], rows=65))
    with pytest.raises(
        UsageError, match="digits-softmax-seed0 and digits-twicing-seed0 were made with different data"
    ):
        ledger.everything(study)


def test_a_damaged_or_nameless_ledger_is_refused(ledger: Ledger, study: Study) -> None:
    path = ledger.folder / f"{study.runs[0].name}.json"
    path.write_text('{"identity": {', encoding="utf-8")
    with pytest.raises(UsageError, match="cannot be read .*; remove it to repeat it"):
        ledger.everything(study)
    (ledger.folder / "study.json").unlink()
    with pytest.raises(UsageError, match="has runs but no study.json"):
        ledger.open(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "but its format is 2, not 1; remove it"),
        ({"seed": 1}, "must be the record of the run digits-softmax-seed0, but its seed is 1"),
        ({"metrics": None}, "but its metrics is None"),
        ({"measurements": ["fog"]}, "but its measurements are no mappings"),
        ({"status": "running"}, "but its status is 'running'"),
        ({"seconds": {"training": 1.0}}, "but it has no number of measuring"),
        ({"version": 2}, "run digits-softmax-seed0 is of a study with version 2, not 1: .* never mixed"),
        ({"study": "another"}, "run digits-softmax-seed0 is of a study with study 'another', not 'tiny'"),
    ],
)
def test_a_record_of_something_else_is_refused(
    ledger: Ledger, study: Study, changes: dict[str, Any], message: str
) -> None:
    ledger.write(study.runs[0], a_record(study.runs[0], **changes))
    with pytest.raises(UsageError, match=message):
        ledger.everything(study)


def test_a_header_without_tasks_is_refused(ledger: Ledger, study: Study) -> None:
    path = ledger.folder / "study.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "tasks": None}), encoding="utf-8")
    with pytest.raises(UsageError, match="must say the tasks of the study, got None"):
        ledger.check(study)


def test_a_task_without_runs_may_be_mended(tmp_path: Path, write_study: WriteStudy) -> None:
    ledger = Ledger(tmp_path / "ledger")
    ledger.open(read_study(write_study()))
    mended = read_study(write_study(tasks={"digits": {**TINY_TASK, "options": {"max_steps": 4}}}))
    ledger.open(mended)
    header = json.loads((ledger.folder / "study.json").read_text(encoding="utf-8"))
    assert header["tasks"]["digits"]["options"] == {"max_steps": 4}


def test_a_run_is_claimed_by_one_process_and_once(ledger: Ledger, study: Study, tmp_path: Path) -> None:
    run, other = study.runs[1], Ledger(tmp_path / "ledger")
    with ledger.claim(run) as mine:
        assert mine
        with other.claim(run) as theirs:
            assert not theirs
        with other.claim(study.runs[2]) as theirs:
            assert theirs
    with other.claim(run) as mine:
        assert mine
    with ledger.claim(study.runs[0]) as mine:
        assert not mine  # it is done


def test_what_a_killed_writer_left_is_no_run_and_goes(ledger: Ledger, study: Study) -> None:
    run = study.runs[1]
    left = ledger.folder / f".{run.name}.json.12345"
    left.write_text('{"half', encoding="utf-8")
    assert run.name not in ledger.names()
    assert run.name not in ledger.everything(study)
    with ledger.claim(run):
        assert not left.exists()


def test_a_ledger_that_cannot_be_written_is_one_line(ledger: Ledger, study: Study) -> None:
    ledger.running.write_text("", encoding="utf-8")  # a file where a folder is to be made
    with (
        pytest.raises(UsageError, match="ledger .*running' cannot be written: File exists"),
        ledger.claim(study.runs[1]),
    ):
        pass


def test_a_full_disk_leaves_no_half_record(ledger: Ledger, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(path: Path, *args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_text", no_room)
    with pytest.raises(OSError, match="No space left"):
        ledger.write(study.runs[1], a_record(study.runs[1]))
    assert study.runs[1].name not in ledger.names()
