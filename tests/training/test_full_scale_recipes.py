"""The recipes at full scale: each says what it costs and what was published, starts, and takes a few steps."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from hf_imgproc_attn.backbones import OF_TASK, TASKS
from hf_imgproc_attn.training_support.model_start import parse_overrides
from hf_imgproc_attn.training_support.trainer_arguments import build_training_arguments
from tests.helpers import ROOT
from tests.training.conftest import random_images

RECIPES = sorted((ROOT / "training" / "configs" / "full_scale").glob("*.yaml"))
STEPS = 20
EACH = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


def header(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def script_of(path: Path) -> tuple[Any, Any]:
    """The script that a recipe's header calls, and its task."""
    (task,) = (task for task in TASKS.values() if f"training/{task.script}.py" in header(path))
    return importlib.import_module(task.script), task


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny stand-ins for the data sets, by the column that a script looks for."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 3)):
        labels = datasets.ClassLabel(names=["a", "b"])
        features = datasets.Features(img=datasets.Image(), label=labels)
        for name, size in (("large", 240), ("small", 12)):
            columns = {"img": random_images(count, size), "label": [index % 2 for index in range(count)]}
            (root / name).mkdir(exist_ok=True)
            datasets.Dataset.from_dict(columns, features=features).to_parquet(root / name / f"{split}.parquet")
        words = [" ".join(rng.choice(["good", "bad", "film", "the", "of"], 40)) for _ in range(count)]
        (root / "text").mkdir(exist_ok=True)
        rows = {"text": words, "label": [index % 2 for index in range(count)]}
        features = datasets.Features(text=datasets.Value("string"), label=labels)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / "text" / f"{split}.parquet")
        lines = [f"{index % 2}.0\tP{index}\tP0\t{text}\t{words[0]}\n" for index, text in enumerate(words)]
        (root / "pairs").mkdir(exist_ok=True)
        (root / "pairs" / f"new_aan_pairs.{split}.tsv").write_text("".join(lines), encoding="utf-8")
    for split, count in (("train", 12), ("validation", 3)):
        pixels = [Image.fromarray(rng.integers(0, 151, (48, 60), dtype=np.uint8)) for _ in range(count)]
        features = datasets.Features(image=datasets.Image(), annotation=datasets.Image())
        columns = {"image": [picture.resize((60, 48)) for picture in random_images(count, 60)], "annotation": pixels}
        (root / "masks").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(root / "masks" / f"{split}.parquet")
    sizes = {"hidden_size": 192, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 768}
    ViTForImageClassification(ViTConfig(**sizes, image_size=224, patch_size=16)).save_pretrained(root / "deit")
    return {name: root / name for name in ("large", "small", "text", "pairs", "masks", "deit")}


@EACH
def test_a_header_says_what_it_is_what_it_costs_and_what_was_published(path: Path, tmp_path: Path) -> None:
    text = header(path)
    assert f"--config training/configs/full_scale/{path.name}" in text
    cost, published, _ = (
        text.split(f"\n# {part}: ")[1] for part in ("Cost (estimated, not run)", "Published", "Expected")
    )
    for part in ("forward", "FLOPs", "A100"):  # how it was reckoned
        assert part in cost.split("\n# Published")[0]
    for part in ("arXiv ", "seed", *(("to us",) if "2604.03190" not in published else ("72.16", "67.88"))):
        assert part in published.split("\n# Expected")[0]
    script, task = script_of(path)
    arguments = script.read_arguments(["--config", str(path), "--bf16", "false"])
    (defaults,) = (value for name, value in vars(script).items() if name.endswith("_TRAINER_DEFAULTS"))
    build_training_arguments(arguments, defaults, str(tmp_path))
    row = OF_TASK[task.name]
    parse_overrides(arguments.model, row.our_class(row.config))
    assert "seed" not in arguments.trainer, "recipes are run with several"


@EACH
def test_a_recipe_starts_and_takes_a_few_steps(path: Path, tmp_path: Path, data: dict[str, Path]) -> None:
    """With its own widths, but for the number of layers, the batch, the data and the length of the evaluation."""
    script, task = script_of(path)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    count = (
        1 if "boosted_layers" not in recipe["config_overrides"] else len(recipe["config_overrides"]["boosted_layers"])
    )
    layers = f"n_layer={count}" if "n_layer" in recipe["config_overrides"] else f"num_hidden_layers={count}"
    words = ["--config", str(path), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--bf16", "false"]
    words += [
        "--disable_tqdm",
        "true",
        "--max_steps",
        str(STEPS),
        "--per_device_train_batch_size",
        "1",
        "--eval_strategy",
    ]
    words += ["no", "--save_strategy", "no", "--load_best_model_at_end", "false", "--dataloader_num_workers", "0"]
    if "model_name_or_path" in recipe:
        words += ["--model_name_or_path", str(data["deit"]), "--image_size", "64"]
    else:
        words += ["--config_overrides", layers]
    words += ["--max_eval_samples", "2", "--warmup_steps", "1", "--logging_steps", "1"]
    if recipe["dataset_name"] != "listops":
        kinds = {"image-classification": "large", "sequence-classification": "small", "semantic-segmentation": "masks"}
        kind = "pairs" if "text_pair_columns" in recipe else kinds.get(task.name, "text")
        words += ["--dataset_name", str(data[kind])]
        words += ["--dataset_config_name", "none"] if "dataset_config_name" in recipe else []
        words += ["--dataset_revision", "none"] if "dataset_revision" in recipe else []
        words += ["--tokenizer_name", "none"] if "tokenizer_name" in recipe else []
    else:
        words += ["--max_train_samples", "8", "--sequence_settings", "min_length=10", "max_length=60"]
    assert script.main(words) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["steps"] == STEPS
    assert all(math.isfinite(loss) for _, loss in record["train_loss"])
    assert set(record["metrics"]) >= {"validation", *(() if task.name == "semantic-segmentation" else ("test",))}
    for name, value in recipe["config_overrides"].items():
        if name != layers.split("=")[0]:
            assert record["model_config"][name] == value


def test_the_published_rows_of_the_ten_million_tokens() -> None:
    """Parameters as published, to a tenth of a million: the sizes are the right ones."""
    from hf_imgproc_attn import ImgProcGPT2Config

    recipe = yaml.safe_load((RECIPES[0].parent / "wikitext103_10m.yaml").read_text(encoding="utf-8"))
    sizes = {**recipe["config_overrides"], "vocab_size": 16384, "n_positions": 256}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    row = OF_TASK["causal-lm"]
    model_class = row.our_class(row.head("AutoModelForCausalLM").variant)
    for preset, width, millions in (("softmax", 256, 7.4), ("twicing", 256, 7.4), ("softmax", 288, 8.8)):
        config = ImgProcGPT2Config.from_preset(preset, **{**sizes, "n_embd": width})
        assert model_class(config).num_parameters() / 1e6 == pytest.approx(millions, abs=0.06)
    config = ImgProcGPT2Config.from_preset("gradient_boosted", **sizes)
    assert model_class(config).num_parameters() / 1e6 == pytest.approx(8.7, abs=0.06)


def test_a_limit_on_the_tokens_of_the_training_text(tmp_path: Path, data: dict[str, Path]) -> None:
    import train_causal_lm

    words = ["--dataset_name", str(data["text"]), "--max_train_tokens", "50", "--block_size", "8", "--max_steps", "1"]
    words += ["--output_dir", str(tmp_path / "run"), "--use_cpu", "--disable_tqdm", "true", "--save_strategy", "no"]
    words += ["--tokenizer_vocab_size", "300", "--config_overrides", "n_embd=8", "n_layer=1", "n_head=1"]
    assert train_causal_lm.main(words) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["data_fingerprint"]["train"]["tokens"] == 50
    assert train_causal_lm.main([*words, "--max_train_tokens", "1"]) == 2
