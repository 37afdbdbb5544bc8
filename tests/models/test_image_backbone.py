"""Our ViT as a backbone: feature maps of chosen layers, and UperNet of Transformers on top of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoBackbone, UperNetConfig, UperNetForSemanticSegmentation

from hf_imgproc_attn import ImgProcViTBackbone, ImgProcViTConfig, ImgProcViTForImageClassification, ImgProcViTModel
from tests.models.helpers import sharpen_
from tests.models.variants import VARIANTS, images, vit_config


def build(variant: str = "twicing", **fields: Any) -> ImgProcViTBackbone:
    return sharpen_(ImgProcViTBackbone(vit_config(variant, **fields))).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_feature_maps_are_hidden_states_on_the_grid_without_the_class_token(variant: str) -> None:
    backbone = build(variant, out_features=["stem", "stage2", "stage3"])
    assert (backbone.channels, backbone.out_indices) == ([20, 20, 20], [0, 2, 3])
    output = backbone(images(height=24, width=16), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    states = [backbone.layernorm(output.hidden_states[index]) for index in (0, 2, 3)]
    for found, tokens in zip(output.feature_maps, states, strict=True):
        assert found.shape == (2, 20, 6, 4)
        for row, column in ((0, 0), (2, 3), (5, 1)):
            torch.testing.assert_close(found[:, :, row, column], tokens[:, 1 + 4 * row + column])
    model = ImgProcViTModel(backbone.config, add_pooling_layer=False).eval()
    model.load_state_dict(backbone.state_dict())
    last = model(images(height=24, width=16), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(output.feature_maps[-1].flatten(2).mT, last[:, 1:])
    assert backbone(images()).hidden_states is None


def test_the_default_is_the_last_layer_however_many_there_are() -> None:
    config = vit_config()
    assert "out_features" not in config.to_dict()
    config.num_hidden_layers = 2
    assert AutoBackbone.from_config(config).out_features == ["stage2"]
    config.out_indices = [-2, -1]
    assert config.out_features == ["stage1", "stage2"]


def test_stages_are_chosen_on_loading_and_saved(tmp_path: Path) -> None:
    classifier = sharpen_(ImgProcViTForImageClassification(vit_config("bilateral"))).eval()
    classifier.save_pretrained(tmp_path / "classifier")
    loaded = ImgProcViTBackbone.from_pretrained(tmp_path / "classifier", out_indices=[1, 3]).eval()
    assert loaded.out_features == ["stage1", "stage3"]
    states = classifier.vit(images()).last_hidden_state
    torch.testing.assert_close(loaded(images()).feature_maps[1].flatten(2).mT, states[:, 1:], rtol=1e-4, atol=1e-5)
    loaded.save_pretrained(tmp_path / "backbone")
    saved = json.loads((tmp_path / "backbone" / "config.json").read_text())
    assert (saved["out_features"], saved["out_indices"]) == (["stage1", "stage3"], [1, 3])
    again = ImgProcViTBackbone.from_pretrained(tmp_path / "backbone").eval()
    torch.testing.assert_close(again(images()).feature_maps[0], loaded(images()).feature_maps[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_features": ["stage4"]}, "out_features must be a subset of stage_names"),
        ({"out_features": ["stage2", "stage1"]}, "same order as stage_names"),
        ({"out_features": ["stage1"], "out_indices": [2]}, "should correspond to the same stages"),
    ],
)
def test_stages_that_do_not_exist_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit_config(**fields)


@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "neutreno", "gradient_boosted"])
def test_upernet_trains_on_our_backbone_and_is_saved(variant: str, tmp_path: Path) -> None:
    stages = ["stage1", "stage2", "stage3"]
    config = UperNetConfig(
        backbone_config=vit_config(variant, out_features=stages, num_channels=3), num_labels=4, hidden_size=8,
        auxiliary_in_channels=20, auxiliary_channels=4, pool_scales=(1, 2),
    )  # fmt: skip
    torch.manual_seed(0)
    model = UperNetForSemanticSegmentation(config)
    assert type(model.backbone) is ImgProcViTBackbone
    pixels = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 4, (2, 24, 16), generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(4):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(value.grad is not None for name, value in model.backbone.named_parameters() if ".q_proj" in name)
    logits = model.eval()(pixels).logits
    assert logits.shape == (2, 4, 24, 16)
    model.save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded.backbone.config) is ImgProcViTConfig
    torch.testing.assert_close(loaded(pixels).logits, logits, rtol=1e-4, atol=1e-4)
    # As Trainer reads it on resuming: the names in the file are those of Transformers 4.
    resumed = UperNetForSemanticSegmentation(config).eval()
    resumed.load_state_dict(load_file(tmp_path / "model.safetensors"))
    torch.testing.assert_close(resumed(pixels).logits, logits, rtol=1e-4, atol=1e-4)
