"""The YAML files that are shipped: every name in them exists, and their headers say what they are for."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
import yaml

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcViTConfig
from hf_imgproc_attn.backbones import OF_TASK, TASKS
from hf_imgproc_attn.training_support.model_start import parse_overrides
from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments
from tests.helpers import ROOT, run_command

CONFIGS = sorted((ROOT / "training" / "configs").glob("*.yaml"))
LAUNCH = sorted((ROOT / "training" / "launch").glob("*.yaml"))


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_training_config_names_only_options_that_exist(path: Path, tmp_path: Path) -> None:
    text = header(path)
    assert f"--config training/configs/{path.name}" in text
    assert "expected" in text.lower()
    (task,) = (task for task in TASKS.values() if f"{task.script}.py" in text)
    script, row = importlib.import_module(task.script), OF_TASK[task.name]
    (defaults,) = (value for name, value in vars(script).items() if name.endswith("_TRAINER_DEFAULTS"))
    arguments = script.read_arguments(["--config", str(path)])
    args = build_training_arguments(arguments, defaults, str(tmp_path))
    parse_overrides(arguments.model, row.our_class(row.config))
    for name in yaml.safe_load(path.read_text(encoding="utf-8")):  # only what differs from the defaults
        if name in defaults:
            assert getattr(args, name) != defaults[name]


def test_there_are_configs_and_launch_files() -> None:
    names = {path.stem for path in CONFIGS}
    assert names == {
        "digits_vit", "pydoc_gpt2", "topics_bert", "cifar10_vit", "wikitext2_gpt2", "listops_short_bert",
        "noisy_recall_gpt2", "composed_vit_seg",
    }  # fmt: skip
    assert {path.stem for path in LAUNCH} == {
        "one_gpu", "eight_gpus_ddp", "eight_gpus_fsdp2", "eight_gpus_zero3", "two_nodes_ddp",
    }  # fmt: skip


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
def test_launch_file_is_accepted_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert f"--config_file training/launch/{path.name}" in header(path)
    distributed = {"one_gpu": "NO", "eight_gpus_fsdp2": "FSDP", "eight_gpus_zero3": "DEEPSPEED"}.get(
        path.stem, "MULTI_GPU"
    )
    assert config.distributed_type == distributed
    assert config.num_processes == {"one_gpu": 1, "two_nodes_ddp": 16}.get(path.stem, 8)


def test_zero3_leaves_to_the_trainer_what_the_options_say() -> None:
    """Every value that an option of the scripts sets is ``auto``; the file that the launch file names is there."""
    launch = yaml.safe_load((ROOT / "training" / "launch" / "eight_gpus_zero3.yaml").read_text(encoding="utf-8"))
    settings = json.loads((ROOT / launch["deepspeed_config"]["deepspeed_config_file"]).read_text(encoding="utf-8"))
    assert settings["zero_optimization"]["stage"] == 3
    names = ("gradient_clipping", "gradient_accumulation_steps", "train_batch_size", "train_micro_batch_size_per_gpu")
    assert {settings[name] for name in names} == {"auto"}
    assert settings["bf16"] == {"enabled": "auto"}
    # Else the weights of a checkpoint would load with DeepSpeed alone.
    assert settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", ["eight_gpus_torchrun.sh", "several_nodes.slurm"])
def test_launch_scripts_start_what_they_say(name: str, resumed: bool, tmp_path: Path) -> None:
    """With programs in place of torchrun and SLURM's that print what they were given."""
    programs = {"torchrun": 'echo torchrun "$@"', "srun": 'echo srun "$@"', "scontrol": "echo node7; echo node8"}
    for program, line in programs.items():
        path = tmp_path / program
        path.write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
        path.chmod(0o755)
    folder = tmp_path / "the run"
    folder.mkdir()
    if resumed:
        (folder / "run.json").write_text("{}", encoding="utf-8")
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "42", "GPUS": "4"}
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **job}
    command = ["bash", str(ROOT / "training" / "launch" / name), "training/train_causal_lm.py", "--preset", "twicing"]
    result = run_command(command, env={**environment, "OUTPUT_DIR": str(folder)}, timeout=30)
    assert result.returncode == 0, result.stderr
    options = f"training/train_causal_lm.py --preset twicing --output_dir {folder}{' --resume' if resumed else ''}"
    rendezvous = "--rdzv_id 42 --rdzv_backend c10d --rdzv_endpoint node7:29500"
    wanted = {
        "eight_gpus_torchrun.sh": f"torchrun --standalone --nproc_per_node 4 {options}",
        "several_nodes.slurm": "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc_per_node 4 --max_restarts 0 "
        f"{rendezvous} {options}",
    }
    assert result.stdout.strip() == wanted[name].strip()
    missing = run_command(command, env=environment, timeout=30)
    assert missing.returncode != 0
    assert "OUTPUT_DIR: is the folder of the run" in missing.stderr


def test_fsdp_wraps_blocks_that_the_models_have() -> None:
    from hf_imgproc_attn import ImgProcGPT2LMHeadModel, ImgProcViTForImageClassification

    text = (ROOT / "training" / "launch" / "eight_gpus_fsdp2.yaml").read_text(encoding="utf-8")
    wrapped = yaml.safe_load(text)["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"]
    language_model = ImgProcGPT2LMHeadModel(ImgProcGPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9))
    assert wrapped in {type(module).__name__ for module in language_model.modules()}
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    image_model = ImgProcViTForImageClassification(ImgProcViTConfig(**size, image_size=8, patch_size=4))
    names = {type(module).__name__ for module in image_model.modules()}
    assert sorted(name for name in names if name in text) == ["FilterScalars", "ImgProcViTLayer"]
    assert "FilterScalars" in {type(module).__name__ for module in language_model.modules()}
