"""The training scripts from end to end: learning, saving, resuming, refusing, several processes."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import train_causal_lm
import train_image_classification
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, ImgProcViTForImageClassification
from hf_imgproc_attn.cards.filters import recorded
from hf_imgproc_attn.records import weights_sha256
from hf_imgproc_attn.training_support.checkpoints import newest_complete_checkpoint
from tests.helpers import ROOT, prepared_python, run_command, started
from tests.training.conftest import TINY_GPT2, TINY_VIT, WriteText

IMAGE_SCRIPT = "train_image_classification.py"
TEXT_SCRIPT = "train_causal_lm.py"
SCRIPTS = {IMAGE_SCRIPT: train_image_classification, TEXT_SCRIPT: train_causal_lm}
TINY = {
    IMAGE_SCRIPT: ["--config_overrides", *TINY_VIT],
    TEXT_SCRIPT: ["--config_overrides", *TINY_GPT2, "--block_size", "32", "--tokenizer_vocab_size", "300"],
}
QUIET = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--eval_strategy", "no"]


def options(script: str, folder: Path, words: str) -> list[str]:
    return [*TINY[script], "--output_dir", str(folder), *QUIET, *words.split()]


def run_here(script: str, folder: Path, words: str) -> dict[str, Any]:
    """Run a script in this process and return its run record."""
    assert SCRIPTS[script].main(options(script, folder, words)) == 0
    return read_record(folder)


def read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return record


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("preset", ["softmax", "bilateral_gaussian", "bilateral_twicing"])
def test_image_classifier_learns_reloads_and_is_recorded(tmp_path: Path, preset: str) -> None:
    folder = tmp_path / "run"
    words = f"--preset {preset} --max_steps 100 --learning_rate 3e-3 --max_eval_samples 100"
    record = run_here(IMAGE_SCRIPT, folder, f"{words} --config_overrides hidden_size=32 intermediate_size=64")
    losses = [loss for _, loss in record["train_loss"]]
    assert losses[0] > 2
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]
    assert record["status"] == "finished"
    assert record["metrics"]["validation"]["accuracy"] > 0.2
    assert record["metrics"]["test"]["loss"] > 0
    assert record["data_fingerprint"]["train"]["rows"] == 1259
    assert record["data_fingerprint"]["test"]["rows"] == 100
    assert record["weights_sha256"] == weights_sha256(str(folder))
    assert record["training_seconds"] > 0
    assert (record["steps"], record["eval_history"]) == (100, [])
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model) is ImgProcViTForImageClassification
    assert record["filter_summary"] == recorded(model.filter_summary())
    assert bool(record["filter_summary"]["learned"]) == (preset != "softmax")
    assert record["parameters"]["total"] == model.num_parameters()
    assert record["model_config"]["hidden_size"] == model.config.hidden_size == 32
    assert (model.config.image_size, model.config.patch_size, model.config.id2label[7]) == (8, 2, "7")
    saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert "use_cache" not in saved


def test_language_model_learns_reloads_and_is_recorded(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = "--preset bilateral_twicing --max_steps 40 --learning_rate 1e-2 --max_eval_samples 50"
    record = run_here(TEXT_SCRIPT, folder, words)
    losses = [loss for _, loss in record["train_loss"]]
    assert losses[0] > 5
    assert losses[-1] < 0.85 * losses[0]
    validation = record["metrics"]["validation"]
    assert validation["word_perplexity"] > validation["perplexity"] > 1
    assert math.exp(validation["loss"]) == pytest.approx(validation["perplexity"], rel=1e-6)
    assert record["data_fingerprint"]["validation"]["rows"] == 50
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model) is ImgProcGPT2LMHeadModel
    assert record["filter_summary"] == recorded(model.filter_summary())
    assert model.config.use_cache
    assert record["model_config"]["use_cache"]
    assert model.config.n_positions == 32
    inputs = tokenizer("The", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=5, do_sample=False).shape == (1, inputs["input_ids"].shape[1] + 5)


def test_a_default_pipeline_stops_at_the_end_of_the_model(tmp_path: Path) -> None:
    """Pipelines ask for 256 tokens more than the prompt has, whatever a model has room for."""
    from transformers import pipeline

    folder = tmp_path / "run"
    run_here(TEXT_SCRIPT, folder, "--preset twicing --max_steps 1 --max_train_samples 200 --max_eval_samples 20")
    assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["max_length"] == 32
    generate = pipeline("text-generation", model=str(folder))
    tokens = generate("The import statement", return_tensors=True)[0]["generated_token_ids"]
    assert 3 < len(tokens) <= 32
    # A limit of the checkpoint's own that is lower stays; one that is higher does not.
    for limit, expected in ((20, 20), (500, 32)):
        start = AutoModelForCausalLM.from_pretrained(folder)
        start.generation_config.max_length = limit
        start.save_pretrained(tmp_path / f"start-{limit}")
        AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / f"start-{limit}")
        words = ["--model_name_or_path", str(tmp_path / f"start-{limit}"), "--max_steps", "1", *QUIET]
        words += [
            "--max_train_samples",
            "200",
            "--max_eval_samples",
            "20",
            "--output_dir",
            str(tmp_path / f"t{limit}"),
        ]
        assert train_causal_lm.main(words) == 0
        saved = json.loads((tmp_path / f"t{limit}" / "generation_config.json").read_text(encoding="utf-8"))
        assert saved["max_length"] == expected


def test_evaluations_during_training_are_recorded(tmp_path: Path) -> None:
    words = [*TINY[IMAGE_SCRIPT], "--output_dir", str(tmp_path / "run"), "--disable_tqdm", "true", "--use_cpu"]
    words += ["--max_steps", "9", "--eval_strategy", "steps", "--eval_steps", "4", "--save_strategy", "no"]
    assert train_image_classification.main([*words, "--max_eval_samples", "50"]) == 0
    record = read_record(tmp_path / "run")
    assert record["steps"] == 9
    assert [step for step, _ in record["eval_history"]] == [4, 8, 9]
    assert all(set(values) == {"loss", "accuracy"} for _, values in record["eval_history"])
    assert record["eval_history"][0][1]["loss"] != record["eval_history"][1][1]["loss"]
    assert record["eval_history"][2][1] == pytest.approx(record["metrics"]["validation"])
    assert set(record["metrics"]["test"]) == {"loss", "accuracy"}


def test_final_metrics_equal_an_evaluation_of_the_saved_model(tmp_path: Path) -> None:
    from hf_imgproc_attn.robustness.texts import text_perplexity
    from hf_imgproc_attn.training_support.text_data import TextSplit, load_text_splits

    folder = tmp_path / "run"
    record = run_here(TEXT_SCRIPT, folder, "--preset twicing --max_steps 2 --max_eval_samples 60")
    arguments = train_causal_lm.TextDataArguments(max_eval_samples=60)
    text: TextSplit = load_text_splits(arguments)["test"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for found in text_perplexity(model, tokenizer, text, block_size=32):
        assert record["metrics"]["test"][found["metric"]] == pytest.approx(found["value"], rel=1e-4)


def test_stock_checkpoint_is_fine_tuned_as_a_variant(tmp_path: Path, write_text: WriteText) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_imgproc_attn.training_support.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["a line of text"] * 3, 270)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=len(tokenizer), n_positions=32, bos_token_id=0)
    config.eos_token_id = tokenizer.eos_token_id
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "stock")
    tokenizer.save_pretrained(tmp_path / "stock")
    data = write_text("data", train=["a line of text"] * 40)
    words = [*QUIET, "--preset", "bilateral", "--model_name_or_path", str(tmp_path / "stock"), "--max_steps", "2"]
    words += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main(words) == 0
    record = read_record(tmp_path / "run")
    assert record["model_config"]["position_kernel"] == "untied"
    assert record["arguments"]["trainer"]["learning_rate"] == 5e-5
    assert set(record["metrics"]) == {"train", "validation"}


def test_no_validation_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    data = tmp_path / "data"
    data.mkdir()
    datasets.Dataset.from_dict({"text": ["some text"] * 9}).to_parquet(data / "train.parquet")
    common = [*TINY[TEXT_SCRIPT], "--dataset_name", str(data), "--validation_fraction", "0", "--max_steps", "1"]
    common += ["--disable_tqdm", "true", "--use_cpu", "--output_dir", str(tmp_path / "run")]
    assert train_causal_lm.main([*common, "--eval_strategy", "epoch"]) == 2
    assert "eval_strategy must be no" in capsys.readouterr().err
    assert train_causal_lm.main([*common, "--save_strategy", "no"]) == 0
    assert set(read_record(tmp_path / "run")["metrics"]) == {"train"}


def test_mistakes_leave_no_folder_behind_and_runs_are_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = "--preset twicing --max_steps 1"
    for wrong, message in [
        ("--dataset_name nowhere", "dataset_name must be digits"),
        ("--image_column_name pixels", "image_column_name must be a column of the train split (image, label)"),
        ("--config_overrides patch_size=0.5", "patch_size"),
    ]:
        assert train_image_classification.main(options(IMAGE_SCRIPT, folder, f"{words} {wrong}")) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "run.json").exists()
    run_here(IMAGE_SCRIPT, folder, words)
    before = (folder / "run.json").read_bytes()
    capsys.readouterr()
    assert train_image_classification.main(options(IMAGE_SCRIPT, folder, words)) == 2
    assert "pass --resume or choose another folder" in capsys.readouterr().err
    assert train_image_classification.main(options(IMAGE_SCRIPT, folder, words.replace("twicing", "softmax"))) == 2
    assert "holds another run, with preset 'twicing' instead of 'softmax'" in capsys.readouterr().err
    assert (folder / "run.json").read_bytes() == before


@pytest.mark.parametrize("allowed", [3000, 25_000], ids=["in the code and weights", "in the optimizer's state"])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, allowed: int) -> None:
    """From the second checkpoint on no file may be larger than ``allowed`` bytes; then there is room again."""
    import resource

    folder = tmp_path / "run"
    words = "--preset twicing --max_steps 60 --save_strategy steps --save_steps 10 --save_total_limit 1"
    command = [sys.executable, str(ROOT / "training" / IMAGE_SCRIPT), *options(IMAGE_SCRIPT, folder, words)]
    with started(command, env=environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint-10" / "trainer_state.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (allowed, allowed))
        _, error = process.communicate(timeout=120)
    assert process.returncode == 2, error
    last = error.splitlines()[-1]
    assert "the disk is full or a file too large" in last
    with pytest.warns(UserWarning, match="is incomplete and is passed over"):
        complete = newest_complete_checkpoint(folder)
    with pytest.warns(UserWarning, match="is incomplete and is passed over"):
        record = run_here(IMAGE_SCRIPT, folder, f"{words} --resume")
    assert complete is not None
    assert f"{complete} is complete" in last
    assert Path(record["resumed_from"]) == complete
    assert (record["status"], record["steps"]) == ("finished", 60)


BOTH = """
import {module} as script
for words in {runs}:
    assert script.main(words) == 0
"""


def half_way(folder: Path, copy: Path) -> None:
    """A copy of a run of eight steps as it was after the fourth."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-8"))
    record = {**read_record(copy), "status": "running"}
    (copy / "run.json").write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "extra"),
    [
        (IMAGE_SCRIPT, "--random_crop_padding 1 --horizontal_flip --max_train_samples 40"),
        # So few lines that there is a second epoch, and that the filled last block, with fewer tokens, takes part.
        (TEXT_SCRIPT, "--max_train_samples 50"),
    ],
)
def test_two_processes_give_the_losses_of_one_with_twice_the_batch(tmp_path: Path, script: str, extra: str) -> None:
    words = f"--preset bilateral_twicing --max_steps 8 --logging_steps 1 --learning_rate 1e-2 {extra}"
    words += " --max_eval_samples 51"
    saving = " --save_strategy steps --save_steps 4" if script == IMAGE_SCRIPT else ""
    one = run_here(script, tmp_path / "one", f"{words} --per_device_train_batch_size 8{saving}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    two_words = f"{words} --per_device_train_batch_size 4{saving}"
    runs = [options(script, tmp_path / "two", two_words)]
    if saving:
        half_way(tmp_path / "one", tmp_path / "from one to two")
        runs.append(options(script, tmp_path / "from one to two", f"{two_words} --resume"))
    else:  # each process reads its own rows of a stream
        lines = "\n".join(f"line {number} of them" for number in range(200))
        (tmp_path / "lines.txt").write_text(lines, encoding="utf-8")
        stream = f"--dataset_name {tmp_path / 'lines.txt'} --streaming --max_steps 3 --max_eval_samples 5"
        runs.append(options(script, tmp_path / "stream", stream))
    both = tmp_path / "both.py"
    both.write_text(BOTH.format(module=script.removesuffix(".py"), runs=runs), encoding="utf-8")
    result = run_command(
        [prepared_python(), *launcher, str(both)],
        env={**environment(), "PYTHONPATH": f"{ROOT / 'training'}:{ROOT}"},
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    two = read_record(tmp_path / "two")
    assert (one["device"]["processes"], two["device"]["processes"]) == (1, 2)
    assert len(one["train_loss"]) == 8
    for (_, single), (_, double) in zip(one["train_loss"], two["train_loss"], strict=True):
        assert double == pytest.approx(single, rel=1e-4)
    # Agreement of models that learn, not of models that stand still.
    losses = [loss for _, loss in one["train_loss"]]
    assert max(losses) - min(losses) > 0.05
    for split in ("validation", "test"):
        for name, value in one["metrics"][split].items():
            if name in ("loss", "accuracy", "perplexity", "word_perplexity"):
                assert two["metrics"][split][name] == pytest.approx(value, rel=1e-3)
    if not saving:
        stream_record = read_record(tmp_path / "stream")
        assert (stream_record["status"], stream_record["steps"]) == ("finished", 3)
    ours = load_file(tmp_path / "one" / "model.safetensors")
    others = ["two"]
    if saving:  # half of the steps in another number of processes, or in one that accumulates gradients
        half_way(tmp_path / "two", tmp_path / "from two to one")
        accumulated = "--per_device_train_batch_size 4 --gradient_accumulation_steps 2 --resume"
        run_here(script, tmp_path / "from two to one", f"{words} {accumulated}{saving}")
        others += ["from one to two", "from two to one"]
    for other in others:
        record, theirs = read_record(tmp_path / other), load_file(tmp_path / other / "model.safetensors")
        for (_, single), (_, same) in zip(one["train_loss"][-4:], record["train_loss"][-4:], strict=True):
            assert same == pytest.approx(single, rel=1e-4)
        assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) < 1e-3
    assert torch.cat([tensor.flatten() for tensor in ours.values()]).abs().max() > 0.1
