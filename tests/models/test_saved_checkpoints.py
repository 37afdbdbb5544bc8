"""Checkpoints saved by earlier versions load for ever, and those of newer code are refused by name.

``tests/fixtures/saved_by_X`` was written once, by version X, and is never written again: when a later version is
released, its own folder is added with

    python -m tests.models.test_saved_checkpoints tests/fixtures/saved_by_X

Each checkpoint is a configuration, weights, and the input and output of the model that was saved.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification

from hf_imgproc_attn import (
    PRESETS,
    ImgProcGPT2Config,
    ImgProcGPT2LMHeadModel,
    ImgProcViTConfig,
    ImgProcViTForImageClassification,
)
from hf_imgproc_attn.models.spec_versions import FILTER_SPEC_VERSION, bring_up_to_date
from tests.helpers import ROOT
from tests.models.helpers import sharpen_
from tests.models.variants import PRESETS_OF, gpt2_config, images, token_ids, vit_config

FIXTURES = ROOT / "tests" / "fixtures"
SAVED = sorted(path.parent for path in FIXTURES.glob("saved_by_*/*/config.json"))
AUTO = {"imgproc_gpt2": AutoModelForCausalLM, "imgproc_vit": AutoModelForImageClassification}


def inputs_of(model_type: str) -> dict[str, torch.Tensor]:
    return {"input_ids": token_ids()} if model_type == "imgproc_gpt2" else {"pixel_values": images()}


def save_all(folder: Path) -> None:
    """Write a folder of fixtures: all presets of both backbones, tiny, with sharpened weights."""
    for preset in PRESETS:
        made = []
        if preset in PRESETS_OF["gpt2"]:
            made.append(ImgProcGPT2LMHeadModel(gpt2_config(preset)))
        if preset in PRESETS_OF["vit"]:
            made.append(ImgProcViTForImageClassification(vit_config(preset)))
        for model in made:
            target = folder / f"{model.config.model_type}_{preset}"
            sharpen_(model).eval().save_pretrained(target)
            for path in target.glob("*.py"):
                path.unlink()  # the code that loads it is the package's
            inputs = inputs_of(model.config.model_type)
            with torch.no_grad():
                logits = model(**inputs).logits.contiguous()
            save_file({**inputs, "logits": logits}, target / "expected.safetensors")


def test_there_are_checkpoints_of_every_first_preset() -> None:
    names = {path.name for path in SAVED if path.parent.name == "saved_by_0.1.0"}
    first = ("softmax", "bilateral", "bilateral_gaussian", "twicing", "bilateral_twicing")
    assert names == {f"{model_type}_{preset}" for model_type in AUTO for preset in first}


@pytest.mark.parametrize("folder", SAVED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_a_checkpoint_of_an_earlier_version_gives_its_outputs(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["filter_spec_version"] >= 1
    assert config.filter_spec_version == FILTER_SPEC_VERSION
    model = AUTO[config.model_type].from_pretrained(folder).eval()
    expected = load_file(folder / "expected.safetensors")
    logits = expected.pop("logits")
    with torch.no_grad():
        torch.testing.assert_close(model(**expected).logits, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config_class", [ImgProcGPT2Config, ImgProcViTConfig])
def test_a_configuration_without_a_version_is_of_the_first(tmp_path: Path, config_class: Any) -> None:
    config_class.from_preset("twicing").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert values.pop("filter_spec_version") == FILTER_SPEC_VERSION
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    config = config_class.from_pretrained(tmp_path)
    assert config.boosting == "twicing"
    assert config.filter_spec_version == FILTER_SPEC_VERSION


@pytest.mark.parametrize(
    ("steps", "now"), [(3, [2, 3, 2]), ([1, 3, 5], [2, 3, 2]), (None, None), ([1, 3], [1, 3])], ids=str
)
def test_steps_of_other_layers_are_no_rounds(steps: Any, now: Any) -> None:
    """Before version 4 gradient boosting had two rounds, whatever the steps of the layers beside it were."""
    boosting = ["gradient_boosted", "twicing", "gradient_boosted"]
    saved = {"filter_spec_version": 3, "boosting": boosting, "boosting_steps": steps}
    assert bring_up_to_date(saved)["boosting_steps"] == now
    kept = bring_up_to_date({**saved, "filter_spec_version": 4})
    assert kept["boosting_steps"] == steps
    assert saved["boosting_steps"] == steps


@pytest.mark.parametrize("version", [FILTER_SPEC_VERSION + 1, 1000])
def test_a_newer_checkpoint_is_refused_by_name(tmp_path: Path, version: int) -> None:
    folder = Path(shutil.copytree(SAVED[0], tmp_path / "newer"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Newer code may also have kernels that this code would complain about in another way.
    values |= {"filter_spec_version": version, "content_kernel": "of_the_future"}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    message = f"filter_spec_version must be <= {FILTER_SPEC_VERSION}, the newest that this code knows, got {version}"
    with pytest.raises(ValueError, match=message):
        AutoConfig.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        AUTO[values["model_type"]].from_pretrained(folder)


@pytest.mark.parametrize("version", [0, -1, "1", True, 1.0, None])
def test_no_version(tmp_path: Path, version: Any) -> None:
    folder = Path(shutil.copytree(SAVED[0], tmp_path / "odd"))
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**values, "filter_spec_version": version}), encoding="utf-8")
    with pytest.raises(ValueError, match="filter_spec_version must be an integer >= 1, got"):
        AutoConfig.from_pretrained(folder)


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
