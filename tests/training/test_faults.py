"""Faults in the middle of a run: kills, losses that are no number, lost processes, silent data workers."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import train_causal_lm
import train_image_classification
from safetensors.torch import load_file

from hf_imgproc_attn.training_support.checkpoints import incomplete_because
from hf_imgproc_attn.training_support.trainer import ScriptTrainer
from tests.helpers import ROOT, run_command
from tests.training.conftest import TINY_GPT2, TINY_VIT

KILLS, KILLS_FULL = 2, 20
ALWAYS = ("killed images", "killed text", "dead rank", "silent rank", "nan skip", "silent data")
ONLY_FULL = ("nan stop", "dead data")
Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """What came of every case of `fault_worker.py`."""
    folder = tmp_path_factory.mktemp("faults")
    full = request.config.getoption("--full")
    cases = [*ALWAYS, *(ONLY_FULL if full else ())]
    result = run_command(
        [sys.executable, "-m", "tests.training.fault_worker", str(KILLS_FULL if full else KILLS), *cases],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "training")))},
        timeout=1200,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found: Report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert set(found) == set(cases)
    return found


@pytest.mark.long
@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("data", ["images", "text"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    data: str, report: Report, request: pytest.FixtureRequest
) -> None:
    """By SIGKILL in steps and while it saves, some checkpoints cut short after that: bitwise the same weights."""
    found = report[f"killed {data}"]
    whole, *kills, resumed = found["statuses"]
    assert (whole, resumed) == (0, 0), found["log"][-4000:]
    assert set(kills) == {-9}
    assert len(kills) >= (10 if request.config.getoption("--full") else 2)
    assert found["ended"] == ["finished", "finished"]
    assert found["weights"][0] == found["weights"][1]
    assert found["losses"][0] == found["losses"][1]
    for name in found["damages"]:
        assert not name or f"{name.split('/')[0]} is incomplete and is passed over" in found["log"]


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("case", ["dead rank", "silent rank"])
def test_a_lost_process_ends_the_others_with_one_line(case: str, report: Report) -> None:
    """Without a launcher that would end them: after ``--ddp_timeout`` where it is silent, at once where it is gone."""
    found = report[case]
    assert found["statuses"][0] == 2, found["log"]
    assert found["seconds"] < 60
    (line,) = found["errors"][0]
    assert "error: another of the 2 processes has ended, or has not answered for ddp_timeout seconds" in line
    assert f"{case.split()[0]}/checkpoint-10 is complete; with this mended, the same command with --resume" in line
    assert found["checkpoints"] == {"checkpoint-10": None, "checkpoint-5": None}
    assert found["random states"] == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.xdist_group("faults")
def test_processes_leave_a_step_out_together(report: Report) -> None:
    """The loss of one of them is no number: all skip the step, or stop, and one says so."""
    found = report["nan skip"]
    assert (found["statuses"], found["status"], found["left_out"]) == ([0, 0], "finished", [13])
    assert "left out, because loss or gradient was not finite: 1 steps (13)" in found["log"]
    if "nan stop" in report:
        stopped = report["nan stop"]
        assert (stopped["statuses"], stopped["status"]) == ([2, 2], "running")
        assert [len(lines) for lines in stopped["errors"]] == [1, 0]
        assert "in step 13, so training stopped before it could change the weights" in stopped["errors"][0][0]


@pytest.mark.xdist_group("faults")
def test_data_workers_that_give_nothing_end_the_run(report: Report) -> None:
    found = report["silent data"]
    assert found["status"] == 2
    words = "error: the data workers have given nothing for 2 s (data_timeout); data-hang/checkpoint-5 is complete"
    (error,) = (line for line in found["log"].splitlines() if line.startswith("error:"))
    assert words in error
    if "dead data" in report:
        assert report["dead data"]["status"] == 2
        (error,) = (line for line in report["dead data"]["log"].splitlines() if line.startswith("error:"))
        assert "error: a data worker has died" in error


def broken_at(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], kind: str) -> None:
    """In these steps the loss is no number, or infinite, or it is finite and a gradient is not."""
    before = ScriptTrainer.compute_loss

    def compute_loss(self: ScriptTrainer, *args: Any, **options: Any) -> Any:
        loss = before(self, *args, **options)
        if not (self.model.training and self.state.global_step + 1 in steps):
            return loss
        if kind == "gradient":
            parameter = next(iter(self.model.parameters()))
            zero = (parameter.flatten()[0] * 0).abs()
            return loss + zero.sqrt()  # whose derivative is infinite times zero
        return loss * float(kind)

    monkeypatch.setattr(ScriptTrainer, "compute_loss", compute_loss)


def words(folder: Path, more: str = "") -> list[str]:
    options = "--disable_tqdm true --use_cpu --eval_strategy no --save_strategy steps --save_steps 3 --max_steps 8 "
    options += "--preset twicing --max_eval_samples 20 --per_device_train_batch_size 4 --save_total_limit 9"
    return ["--config_overrides", *TINY_VIT, "--output_dir", str(folder), *options.split(), *more.split()]


@pytest.mark.parametrize("kind", ["nan", "inf", "gradient"])
def test_a_loss_that_is_no_number_stops_the_run_before_it_harms(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And it goes on from there where such steps may be left out."""
    broken_at(monkeypatch, (5, 7), kind)
    folder = tmp_path / "run"
    assert train_image_classification.main(words(folder)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    what = "a gradient is infinite or no number" if kind == "gradient" else f"the loss is {kind}"
    assert f"error: {what} in step 5, so training stopped before it could change the weights" in line
    assert f"{folder / 'checkpoint-3'} is complete" in line
    assert incomplete_because(folder / "checkpoint-3") is None
    assert not (folder / "model.safetensors").exists()

    assert train_image_classification.main(words(folder, "--resume --on_nan_loss skip")) == 0
    assert "left out, because loss or gradient was not finite: 2 steps (5, 7)" in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert (record["status"], record["steps"], record["steps_left_out"]) == ("finished", 8, [5, 7])
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())


def test_a_step_that_is_left_out_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither weights, by momentum or decay, nor the optimizer's state; a text model, gradients accumulated."""
    broken_at(monkeypatch, (3, 4), "nan")
    folder = tmp_path / "run"
    options = "--disable_tqdm true --use_cpu --eval_strategy no --save_strategy steps --save_steps 1 --max_steps 5"
    options += " --preset twicing --on_nan_loss skip --gradient_accumulation_steps 2 --save_total_limit 9"
    options += " --per_device_train_batch_size 2 --block_size 16 --tokenizer_vocab_size 260 --max_eval_samples 5"
    options += " --max_train_samples 60 --evaluate_test false"
    command = ["--config_overrides", *TINY_GPT2, "--output_dir", str(folder), *options.split()]
    assert train_causal_lm.main(command) == 0
    weights = [load_file(folder / f"checkpoint-{step}" / "model.safetensors") for step in range(1, 6)]
    same = [all(torch.equal(one[name], other[name]) for name in one) for one, other in itertools.pairwise(weights)]
    assert same == [False, True, True, False]
    states = [torch.load(folder / f"checkpoint-{step}" / "optimizer.pt")["state"] for step in (2, 4, 5)]
    assert [float(state[0]["step"]) for state in states] == [2, 2, 3]


def test_a_contradiction_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in {
        "--on_nan_loss skip --stop_diverged": "on_nan_loss must be stop with stop_diverged, got 'skip'",
        "--on_nan_loss go": "argument --on_nan_loss: invalid choice: 'go'",
        "--data_timeout -1": "data_timeout must be an integer >= 0, got -1",
    }.items():
        assert train_image_classification.main(words(tmp_path / "run", options)) == 2
        assert message in capsys.readouterr().err
