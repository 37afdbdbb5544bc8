"""Checkpoints and a look at them, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, ImgProcViTForImageClassification
from hf_imgproc_attn.cli import main
from hf_imgproc_attn.lens import Report, inspect_model
from tests.any_model.architectures import build
from tests.models.helpers import sharpen_, tiny_gpt2_config, tiny_vit_config


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stock Llama, a boosted GPT-2, a bilateral ViT and a T5, without tokenizers."""
    folder = tmp_path_factory.mktemp("checkpoints")
    sharpen_(ImgProcGPT2LMHeadModel(tiny_gpt2_config("bilateral_twicing", n_layer=2)), std=0.5).save_pretrained(
        folder / "gpt2"
    )
    sharpen_(
        ImgProcViTForImageClassification(tiny_vit_config("bilateral_gaussian", num_channels=1, num_hidden_layers=2))
    ).save_pretrained(folder / "vit")
    build("llama", num_hidden_layers=2).float().save_pretrained(folder / "llama")
    build("t5").float().save_pretrained(folder / "t5")
    return folder


@pytest.fixture(scope="session")
def look(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes of a stock and a boosted model."""
    output = tmp_path_factory.mktemp("look") / "new"
    names = [str(checkpoints / name) for name in ("llama", "gpt2")]
    arguments = ["--data", "random", "--length", "12", "--samples", "3", "--output", str(output)]
    assert main(["lens", *names, *arguments]) == 0
    return output


@pytest.fixture(scope="session")
def report(checkpoints: Path) -> Report:
    """Of the bilateral ViT."""
    from hf_imgproc_attn.lens.inputs import load_model, show

    model = load_model(str(checkpoints / "vit"))
    return inspect_model(model, show(model, str(checkpoints / "vit"), samples=3).inputs)
