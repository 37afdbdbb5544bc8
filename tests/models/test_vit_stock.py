"""ViT: `softmax` is the stock model, and our filters honour its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import ViTConfig

from tests.models.helpers import VIT, sharpen_
from tests.models.variants import (
    IMPLEMENTATIONS,
    assert_same_gradients,
    gradients,
    images,
    vit_config,
)
from tests.models.vit_cases import HEADS, SQUARE, some_patches

pytestmark = pytest.mark.both_back_ends

STOCK_IN_DISGUISE: dict[str, dict[str, Any]] = {
    "one_step": {"boosting": "twicing", "boosting_steps": 1},
    "learned_bandwidth": {"learn_bandwidths": True},
    "one_step_learned": {"boosting": "twicing", "boosting_steps": 1, "learn_bandwidths": True},
}


def stock_and_ours(head: str = "classifier", implementation: str = "eager", **overrides: Any) -> tuple[Any, Any]:
    """The stock model and ours with the same weights; loading fails if a name or shape differs."""
    stock_class, our_class, options = HEADS[head]
    ours_only = {name: overrides.pop(name) for name in list(overrides) if not hasattr(ViTConfig(), name)}
    options = {**options, **SQUARE, **overrides, "attn_implementation": implementation}
    stock = sharpen_(stock_class(ViTConfig(**{**VIT, **options})))
    ours = our_class(vit_config(**options, **ours_only))
    ours.load_state_dict(stock.state_dict(), strict=not ours_only)
    return stock.eval(), ours.eval()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"patch_size": 6, "encoder_stride": 6}])
@pytest.mark.parametrize("head", HEADS)
def test_softmax_is_the_stock_model_to_the_bit(head: str, options: dict[str, Any], implementation: str) -> None:
    stock, ours = stock_and_ours(head, implementation, **options)
    patches = (12 // stock.config.patch_size) ** 2
    extra = {
        "model": {"bool_masked_pos": None},
        "classifier": {"labels": torch.tensor([4, 2])},
        "masked": {"bool_masked_pos": some_patches(patches=patches)},
    }[head]
    inputs = {"pixel_values": images(height=12), **extra, "output_hidden_states": True}
    inputs["output_attentions"] = implementation == "eager"
    wanted, got = stock(**inputs), ours(**inputs)
    assert got.keys() == wanted.keys()
    for name in ("loss", "logits", "reconstruction", "last_hidden_state", "pooler_output"):
        if name in wanted:
            assert torch.equal(got[name], wanted[name]), name
    for name in ("hidden_states", "attentions"):
        if name in wanted:
            assert len(got[name]) == len(wanted[name])
            assert all(torch.equal(left, right) for left, right in zip(got[name], wanted[name], strict=True)), name
    if "loss" in wanted:
        stock_gradients, our_gradients = gradients(stock, wanted.loss), gradients(ours, got.loss)
        assert_same_gradients(our_gradients, stock_gradients, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softmax_draws_dropout_like_the_stock_model(implementation: str) -> None:
    dropout = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    outputs = []
    for model in stock_and_ours("classifier", implementation, **dropout):
        torch.manual_seed(5)
        outputs.append(model.train()(images(height=12)).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_softmax_interpolates_like_the_stock_model(implementation: str) -> None:
    stock, ours = stock_and_ours("classifier", implementation)
    for height, width in ((12, 12), (24, 16), (8, 20), (14, 13)):
        pixels = images(height=height, width=width)
        wanted = stock(pixels, interpolate_pos_encoding=True).logits
        assert torch.equal(ours(pixels, interpolate_pos_encoding=True).logits, wanted)


def test_names_and_shapes_of_the_softmax_preset_are_the_stock_ones() -> None:
    for stock_class, our_class, options in HEADS.values():
        stock, ours = stock_class(ViTConfig(**{**VIT, **options})), our_class(vit_config(**options))
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (stock, ours)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("head", HEADS)
def test_stock_checkpoints_load_and_ours_load_as_stock(head: str, tmp_path: Any) -> None:
    """On disk ViT has older names than in memory, and the library renames them by the name of the class."""
    stock, ours = stock_and_ours(head)
    stock.save_pretrained(tmp_path / "stock")
    ours.save_pretrained(tmp_path / "ours")
    files = [torch_names(tmp_path / name) for name in ("stock", "ours")]
    assert files[0] == files[1]
    loaded, info = type(ours).from_pretrained(tmp_path / "stock", config=ours.config, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    back = type(stock).from_pretrained(tmp_path / "ours", config=stock.config)
    for model in (loaded, back):
        for name, value in stock.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name


def torch_names(folder: Any) -> list[str]:
    """Names of the tensors in a checkpoint."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        return sorted(file.keys())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("disguise", STOCK_IN_DISGUISE)
def test_our_filters_give_the_stock_numbers(disguise: str, implementation: str) -> None:
    stock, ours = stock_and_ours("classifier", implementation, **STOCK_IN_DISGUISE[disguise])
    assert not any(layer.attention.filter.is_stock for layer in ours.vit.layers)
    torch.testing.assert_close(ours(images(height=12)).logits, stock(images(height=12)).logits, rtol=1e-4, atol=1e-4)


def test_content_bandwidth_is_a_temperature() -> None:
    bandwidths = [1.3, 2.0, 2.5, 3.1]
    stock, ours = stock_and_ours("classifier", "sdpa", content_bandwidth=bandwidths)
    factor = (2 / torch.tensor(bandwidths) ** 2 * 5**0.5).repeat_interleave(5)
    with torch.no_grad():
        for layer in stock.vit.layers:
            layer.attention.q_proj.weight *= factor.unsqueeze(1)
            layer.attention.q_proj.bias *= factor
    torch.testing.assert_close(ours(images(height=12)).logits, stock(images(height=12)).logits, rtol=1e-4, atol=1e-4)
