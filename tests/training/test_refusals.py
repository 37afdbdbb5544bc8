"""What the training scripts refuse: in one line, in the words of the command line, before any work."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import train_causal_lm
import train_image_classification
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig
from transformers import ViTForImageClassification as StockViT

from hf_imgproc_attn import cli
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.library_fields import configuration_fields, training_fields
from hf_imgproc_attn.training_support import block_size
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.block_size import check_block_size
from tests.helpers import ROOT, RunPython, prepared_python, run_command
from tests.training.conftest import TINY_GPT2, TINY_VIT

QUIET = ["--disable_tqdm", "true", "--save_strategy", "no", "--eval_strategy", "no"]

# The script, writing down which training samples each process takes.
SPY = """
import os, sys
import train_image_classification as script
from hf_imgproc_attn.training_support import image_pixels

take = image_pixels.PixelDataset.__getitem__
train = []

def seen(self, index):
    train[:] = train or [self]  # the training split is asked for first
    if self is train[0]:
        with open(f"rank{os.environ['RANK']}", "a") as file:
            print(index, file=file)
    return take(self, index)

image_pixels.PixelDataset.__getitem__ = seen
sys.exit(script.main())
"""


def one_line(capsys: pytest.CaptureFixture[str], script: Any, *words: str) -> str:
    """The one line on standard error of a script that has to refuse."""
    assert script.main([*words, *QUIET]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "%|" not in line]  # no bars
    assert len(lines) == 1, lines
    return str(lines[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train-image --learning_rat 1", "unknown option learning_rat; did you mean learning_rate?"),
        ("train-image --learning_rate fast", "argument --learning_rate: invalid float value: 'fast'"),
        ("train-lm --max_steps 1.5", "argument --max_steps: invalid int value: '1.5'"),
        ("train-lm --preset twiceing", "did you mean twicing?"),
        ("train-lm --hub_strategy end", "hub_strategy is not used by this script"),
        ("train-image --config_overrides hiden_size=64", "got 'hiden_size'; did you mean hidden_size?"),
        ("train-lm --config_overrides n_lyer=2", "got 'n_lyer'; did you mean n_layer?"),
        ("train-image --dataset_name ./nowhere", "dataset_name must be a local path or a Hub name, got './nowhere'"),
        ("train-lm --model_name_or_path /no/where", "model_name_or_path must be a local path or a Hub name"),
        ("evaluate run --splt test", "unrecognized arguments: --splt"),
        ("convert x --preset twiceing --output o", "did you mean twicing?"),
        ("convert x --preset twicing --output o --set boosting_step=3", "did you mean boosting_steps?"),
        ("covert x", "did you mean convert?"),
    ],
)
def test_typos_are_found_before_the_libraries_are_imported(run_python: RunPython, words: str, message: str) -> None:
    """Importing torch alone takes longer than this bound; the best of three leaves room for a busy machine."""
    code = (
        "import sys\nfrom hf_imgproc_attn import cli\n"
        f"try:\n    status = cli.main({words.split()!r})\nexcept SystemExit as stop:\n    status = stop.code\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)\nsys.exit(status)"
    )
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        result = run_python("-c", code, fresh=True)
        seconds.append(time.perf_counter() - started)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        (line,) = result.stderr.splitlines()
        assert message in line
    assert min(seconds) < 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train-image --learning_rate -1", "learning_rate must be a number >= 0, got -1.0"),
        ("train-image --learning_rate nan", "learning_rate must be a number >= 0, got nan"),
        ("train-lm --per_device_train_batch_size 0", "per_device_train_batch_size must be an integer >= 1, got 0"),
        ("train-lm --num_train_epochs=-1", "num_train_epochs must be a number > 0, got -1.0"),
        ("train-lm --max_steps 0", "max_steps must be -1 or an integer >= 1, got 0"),
        ("train-lm --seed -1", "seed must be an integer from 0 to 4294967295, got -1"),
        ("train-image --adam_beta2 1", "adam_beta2 must be at least 0 and below 1, got 1.0"),
        ("presets --foo", "unrecognized arguments: --foo"),
        ("benchmark --device tpu", "device must be cpu or cuda, got 'tpu'"),
        ("variants --mardown", "unrecognized arguments: --mardown; did you mean --markdown?"),
        ("denoise camera --noice=0", "unrecognized arguments: --noice=0; did you mean --noise?"),
    ],
)
def test_options_out_of_range_and_options_that_there_are_not(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of them trained nothing and called that finished, others ended in a traceback after seconds."""
    try:
        status = cli.main(words.split())
    except SystemExit as stop:
        status = int(str(stop.code))
    printed = capsys.readouterr()
    assert (status, printed.out) == (2, "")
    assert printed.err.removeprefix("imgproc-attn: ") == f"error: {message}\n"


def test_fields_read_from_the_source_are_those_of_the_classes() -> None:
    import dataclasses

    from transformers import TrainingArguments

    from hf_imgproc_attn import ImgProcGPT2Config, ImgProcViTConfig

    assert set(training_fields()) == {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for config in (ImgProcGPT2Config, ImgProcViTConfig):
        names = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
        assert configuration_fields(config.model_type) >= names


@pytest.mark.parametrize("name", ["twiceing", "Bilateral", "softmx"])
def test_misspelt_presets_get_the_nearest_one(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hf_imgproc_attn import ImgProcViTConfig
    from hf_imgproc_attn.images.denoising import filter_settings

    with pytest.raises(ValueError, match=rf"got '{name}'; did you mean \w+\?"):
        ImgProcViTConfig.from_preset(name)
    with pytest.raises(UsageError, match=r"got 'nml'; did you mean nlm\?"):
        filter_settings("nml", 10)
    assert "; did you mean " in one_line(capsys, train_causal_lm, "--preset", name)


def test_checkpoints_of_the_other_type_are_refused_by_their_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ViT has no tokenizer and a GPT-2 no image processor: nobody should be told so."""
    fields = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    StockViT(ViTConfig(**fields, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    for script, name, expected in (
        (train_causal_lm, "vit", "imgproc_gpt2 or gpt2"),
        (train_image_classification, "gpt2", "imgproc_vit or vit"),
    ):
        words = ["--model_name_or_path", str(tmp_path / name), "--output_dir", str(tmp_path / "run")]
        line = one_line(capsys, script, *words)
        assert f"model_name_or_path must be a checkpoint of type {expected}, or of another that AutoModelFor" in line
        assert line.endswith(f"of type {name}")
    assert not (tmp_path / "run").exists()


def test_only_a_run_is_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = one_line(capsys, train_causal_lm, "--resume", "--output_dir", str(tmp_path / "run"))
    assert "output_dir must hold the run that --resume goes on with, got" in line
    assert not (tmp_path / "run").exists()


def test_blocks_without_room_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded text holds about 100,000 tokens."""
    tiny = ["--config_overrides", *TINY_GPT2, "--output_dir", str(tmp_path / "run")]
    line = one_line(capsys, train_causal_lm, "--block_size", "100000", *tiny)
    assert "block_size 100000 cuts the training text of" in line
    assert "fewer than one batch of 16" in line
    line = one_line(capsys, train_causal_lm, "--block_size", "1000000000", *tiny)
    assert "block_size must not exceed the" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("preset", "overrides", "gib", "refused"),
    [
        ("softmax", [], 1.0, True),
        ("softmax", [], 100.0, False),
        # Its dense bias alone is 4 heads x 50,000^2 x 4 bytes.
        ("alibi", [], 30.0, True),
        ("bilateral_gaussian", [], 30.0, False),
        ("softmax", ["n_layer=40", "n_embd=1024"], 30.0, True),
    ],
)
def test_blocks_that_the_memory_cannot_hold_are_refused(
    monkeypatch: pytest.MonkeyPatch, preset: str, overrides: list[str], gib: float, refused: bool
) -> None:
    monkeypatch.setattr(block_size, "_free_memory", lambda device: int(gib * 2**30))
    args = ModelArguments(preset=preset, config_overrides=overrides)
    where: Any = SimpleNamespace(train_batch_size=1, world_size=1, device=torch.device("cpu"))
    if not refused:
        check_block_size(args, 50_000, 200_000, 2048, where)
        return
    with pytest.raises(UsageError, match=rf"block_size 50000 needs at least .* GiB .* but {gib} GiB are free on cpu"):
        check_block_size(args, 50_000, 200_000, 2048, where)


def test_free_memory_is_known_on_the_cpu() -> None:
    free = block_size._free_memory(torch.device("cpu"))
    assert free is not None
    assert 2**20 < free < 2**50


SCRIPT = ROOT / "training" / "train_image_classification.py"


def torchrun(folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Start a script in two processes, as ``torchrun --nproc_per_node 2`` does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    return run_command(
        [prepared_python(), *launcher, str(script), *words, *QUIET],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'training'}:{ROOT}"},
        cwd=folder,
        timeout=240,
    )


def test_launch_of_processes_that_would_train_alone_is_refused(tmp_path: Path) -> None:
    done = torchrun(tmp_path, SCRIPT, "--use_cpu", "false")
    assert done.returncode != 0
    line = next(line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "2 processes were started (WORLD_SIZE), but on cpu each would train alone into one folder" in line
    assert "--use_cpu" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fake", "environment", "message"),
    [
        (None, {}, "report_to wandb: WandbCallback requires wandb to be installed. Run `pip install wandb`."),
        ("run = None\n", {}, "report_to wandb: there is no key; `wandb login`"),
        (
            "run = None\nclass UsageError(Exception): pass\ndef init(*a, **k): raise UsageError('key\\nis wrong')\n",
            {"WANDB_API_KEY": "0" * 40},
            "report_to wandb: key is wrong",
        ),
    ],
    ids=["not installed", "no key", "wrong key"],
)
def test_trackers_that_cannot_be_used_are_one_line(
    tmp_path: Path, fake: str | None, environment: dict[str, str], message: str
) -> None:
    library = tmp_path / "library"
    library.mkdir()
    if fake is not None:
        (library / "wandb/sdk/lib").mkdir(parents=True)
        (library / "wandb/__init__.py").write_text(fake, encoding="utf-8")
        (library / "wandb/sdk/lib/config_util.py").write_text("class ConfigError(Exception): pass\n", encoding="utf-8")
    words = ["--config_overrides", *TINY_VIT, "--max_steps", "1", "--report_to", "wandb"]
    done = run_command(
        [prepared_python(), str(SCRIPT), *words, "--output_dir", "run", *QUIET],
        env={**os.environ, "PYTHONPATH": f"{library}:{ROOT}", "HOME": str(tmp_path), **environment},
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {message}")
    if not environment:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["boosting_steps=true", "boosted_layers=[7]", "boosting=twice", "n_layer=x"])
def test_names_of_internal_validators_stay_inside(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(tmp_path / "gpt2")
    words = ["convert", str(tmp_path / "gpt2"), "--preset", "twicing", "--output", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as stop:
        cli.main([*words, "--set", setting])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    trained = one_line(capsys, train_causal_lm, "--config_overrides", setting, "--output_dir", str(tmp_path / "o"))
    for message in (line, trained):
        assert setting.partition("=")[0] in message
        for internal in ("Strict", "validate_", "validator", "Validation", "ValueError", "TypeError"):
            assert internal not in message


def test_two_processes_without_an_accelerator_train_one_model(tmp_path: Path) -> None:
    """The launch of the README, which asks for no CPU; each process takes its own half of every batch."""
    spy = tmp_path / "spy.py"
    spy.write_text(SPY, encoding="utf-8")
    words = ["--config_overrides", *TINY_VIT, "--max_steps", "3", "--max_eval_samples", "20", "--output_dir", "run"]
    done = torchrun(tmp_path, spy, *words, "--per_device_train_batch_size", "8")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["device"]["processes"] == 2
    first, second = (set((tmp_path / name).read_text(encoding="utf-8").split()) for name in ("rank0", "rank1"))
    assert len(first) == len(second) >= 24
    assert not first & second


@pytest.mark.parametrize(("name", "what"), [("cp", "context"), ("sp", "sequence"), ("tp", "tensor")])
def test_ways_of_sharing_that_filters_do_not_know(
    name: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a launch file of accelerate asks for them; ``blocked`` would look at each process's own tokens alone."""
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{name.upper()}_SIZE", "2")
    assert train_causal_lm.main(["--output_dir", str(tmp_path / "run"), "--use_cpu"]) == 2
    error = capsys.readouterr().err
    assert f"parallelism_config.{name}_size must be 1, got 2: this script knows no {what} parallelism" in error
