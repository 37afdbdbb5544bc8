"""Runs whose processes share parameters (FSDP2) or tokens, from their start to their saved model.

They equal a run of one process, and go on in another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_imgproc_attn import ImgProcGPT2LMHeadModel
from tests.helpers import ROOT, prepared_python, run_command
from tests.models.variants import made_once
from tests.training.conftest import TINY_GPT2
from tests.training.test_training_runs import QUIET, TEXT_SCRIPT, read_record, run_here

once = pytest.mark.xdist_group("sharded runs")
WORDS = (
    "--preset bilateral_twicing --max_steps 4 --logging_steps 1 --learning_rate 1e-2 --max_train_samples 50 "
    "--max_eval_samples 4 --block_size 32 --tokenizer_vocab_size 300 --save_strategy steps --save_steps 2 "
    "--eval_strategy steps --eval_steps 2 --evaluate_test false"
)
KINDS = {"sharded": "SHARDED_STATE_DICT", "whole": "FULL_STATE_DICT"}
"""What checkpoints hold where parameters are shared."""
TOKENS = ("tokens", "tokens and whole")
"""Two processes share tokens: with a copy of the model each, or with shared parameters."""


def runs(processes: int, kinds: Sequence[str], name: str, *more: str) -> list[list[str]]:
    """Command lines of runs of eight samples a step; folders are called NAME and the kind."""
    lines = []
    for kind in kinds:
        groups = processes // 2 if kind in TOKENS else processes
        words = ["--config_overrides", *TINY_GPT2, *QUIET, *WORDS.split(), *more, "--output_dir", f"{name} {kind}"]
        words += ["--per_device_train_batch_size", str(8 // groups)]
        if kind in TOKENS:
            words += ["--context_parallel", "2", *(["--gradient_checkpointing"] if "whole" in kind else [])]
        if kind != "tokens":
            sharing = {
                "transformer_layer_cls_to_wrap": ["ImgProcGPT2Block"],
                "state_dict_type": KINDS[kind.split()[-1]],
            }
            Path(f"{kind}.json").write_text(json.dumps(sharing), encoding="utf-8")
            words += ["--fsdp", "--fsdp_config", f"{kind}.json"]
        lines.append(words)
    return lines


def launch(processes: int, phases: list[Any]) -> None:
    """Start the processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = run_command(
        [prepared_python(), *command, str(Path(__file__).with_name("sharded_worker.py")), json.dumps(phases)],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'training'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, "\n".join(line for line in result.stderr.splitlines() if line.startswith("[rank"))


def run_two() -> None:
    """In this folder: a run of one process, runs of two, and each going on in the other number."""
    kinds = list(KINDS)
    launch(
        2,
        [
            (True, runs(1, ["sharded"], "1"), [("1 sharded", "1 to 2 sharded")]),
            (
                False,
                [*runs(2, [*kinds, *TOKENS], "2"), *runs(2, ["sharded"], "1 to 2", "--resume")],
                [(f"2 {kind}", f"2 to {other} {kind}") for kind in (*kinds, "tokens") for other in (1, 4)],
            ),
            (True, runs(1, kinds, "2 to 1", "--resume"), []),
        ],
    )


def run_four() -> None:
    """Runs of two processes that go on in four, and the other way round."""
    kinds = list(KINDS)
    going_on = runs(4, [*kinds, "tokens"], "2 to 4", "--resume")
    launch(4, [(False, [*going_on, *runs(4, kinds, "4")], [(f"4 {kind}", f"4 to 2 {kind}") for kind in kinds])])
    launch(2, [(False, runs(2, kinds, "4 to 2", "--resume"), [])])


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs, and one that shards nothing: ``plain``."""

    def make(folder: Path) -> None:
        with contextlib.chdir(folder):
            run_two()
            if request.config.getoption("--full"):
                run_four()
            for name, resume in (("plain", ""), ("2 to 1 tokens", "--resume")):
                run_here(TEXT_SCRIPT, folder / name, f"{WORDS} --per_device_train_batch_size 8 {resume}")

    return made_once(tmp_path_factory, "sharded runs", make)


def same_run(folder: Path, plain: Path) -> None:
    """Losses and weights of the run that shards nothing, to rounding."""
    wanted, got = (read_record(place)["train_loss"] for place in (plain, folder))
    assert [step for step, _ in got] == [step for step, _ in wanted][-len(got) :] == [1, 2, 3, 4]
    for (_, theirs), (_, ours) in zip(wanted, got, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    theirs, ours = (load_file(place / "model.safetensors") for place in (plain, folder))
    assert max(float((theirs[name] - ours[name]).abs().max()) for name in theirs) < 1e-3


@once
@pytest.mark.parametrize("name", ["1 sharded", "2 sharded", "2 whole"])
def test_sharded_run_is_that_of_one_process_and_saves_a_whole_model(name: str, folders: Path) -> None:
    """Also where its checkpoints are shards, of which the Trainer would save no model at all."""
    folder = folders / name
    same_run(folder, folders / "plain")
    shards = sorted(path.name for path in (folder / "checkpoint-2" / "pytorch_model_fsdp_0").glob("*.distcp"))
    expected = [] if "whole" in name else [f"__{rank}_0.distcp" for rank in range(int(name[0]))]
    assert shards == expected
    model, record = AutoModelForCausalLM.from_pretrained(folder), read_record(folder)
    assert type(model) is ImgProcGPT2LMHeadModel
    assert record["status"] == "finished"
    assert record["filter_summary"] == read_record(folders / "1 sharded")["filter_summary"]


def goes_on(folder: Path, plain: Path) -> None:
    """As many processes as its name says, after the second step."""
    record = read_record(folder)
    assert Path(record["resumed_from"]).name == "checkpoint-2"
    assert record["device"]["processes"] == int(folder.name.split()[2])
    same_run(folder, plain)


@once
@pytest.mark.parametrize("name", ["1 to 2 sharded", "2 to 1 sharded", "2 to 1 whole", "2 to 1 tokens"])
def test_run_goes_on_in_another_number_of_processes(name: str, folders: Path) -> None:
    goes_on(folders / name, folders / "plain")


@once
@pytest.mark.parametrize("kind", TOKENS)
def test_run_that_shares_tokens_is_that_of_one_process(kind: str, folders: Path) -> None:
    """With labels shifted before texts are cut, and losses divided by the labels of all processes."""
    same_run(folders / f"2 {kind}", folders / "plain")
    assert read_record(folders / f"2 {kind}")["arguments"]["data"]["context_parallel"] == 2


@once
def test_every_other_number_of_processes(folders: Path, request: pytest.FixtureRequest) -> None:
    """With ``--full`` also four; else those above, and the folders that four would go on from are half way."""
    names = ["2 to 4 tokens", *(f"{way} {kind}" for way in ("2 to 4", "4 to 2") for kind in KINDS)]
    if request.config.getoption("--full"):
        for name in names:
            goes_on(folders / name, folders / "plain")
    else:
        assert [read_record(folders / name)["status"] for name in names[:2]] == ["running", "running"]


@once
def test_shards_of_a_checkpoint_are_merged_by_accelerate(folders: Path, tmp_path: Path) -> None:
    """As the page says; the weights of the last step are those of the saved model."""
    from accelerate.utils import merge_fsdp_weights

    run = folders / "2 sharded"
    merge_fsdp_weights(str(run / "checkpoint-4" / "pytorch_model_fsdp_0"), str(tmp_path))
    wanted, got = (load_file(place / "model.safetensors") for place in (run, tmp_path))
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
