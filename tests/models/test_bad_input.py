"""Wrong input ends in one error that names the field, the rule and the value, before it does harm."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.bad_input_cases import CLASSES, gpt2, vit
from tests.models.variants import (
    IMPLEMENTATIONS,
    VARIANTS,
    images,
    token_ids,
    vit_config,
)

# --------------------------------------------------------------------------------------------------------------------
# Masks
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 8), (2, 10), (1, 9), (9,), (2, 9, 9), (2, 1, 9, 8), (2, 1, 8, 9), (2, 3, 9, 9), (3, 1, 9, 9), (18,)]
)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_gpt2_masks_of_a_wrong_shape(variant: str, shape: tuple[int, ...], implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 9\) .*, got {re.escape(str(shape))}"):
        gpt2(variant, implementation)(token_ids(), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "shape", [(2, 15), (2, 17), (16,), (2, 16, 16), (2, 1, 16, 15), (2, 3, 16, 16), (5, 1, 16, 16)]
)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_vit_masks_of_a_wrong_shape(variant: str, shape: tuple[int, ...], implementation: str) -> None:
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 16\) .*, got {re.escape(str(shape))}"):
        vit(variant, implementation)(images(), attention_mask=torch.ones(shape))


@pytest.mark.parametrize("length", [1, 9, 11])
def test_masks_must_cover_the_cached_tokens(length: int) -> None:
    model = gpt2("twicing")
    cache = model(token_ids()).past_key_values
    with pytest.raises(ValueError, match=rf"attention_mask must have shape \(2, 10\) .*, got \(2, {length}\)"):
        model(token_ids(length=1), attention_mask=torch.ones(2, length), past_key_values=cache)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing", "mixed"])
def test_four_dimensional_masks_of_integers(variant: str, implementation: str) -> None:
    """Ones and zeros that would be added to the logits."""
    with pytest.raises(ValueError, match=r"attention_mask .*bool.*float.*, got torch.int64"):
        gpt2(variant, implementation)(token_ids(), attention_mask=torch.ones(2, 1, 9, 9, dtype=torch.long).tril())
    with pytest.raises(ValueError, match=r"attention_mask .*bool.*float.*, got torch.int64"):
        vit(variant, implementation)(images(), attention_mask=torch.ones(2, 1, 16, 16, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------------------
# Positions and sizes
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["additive", "untied", ["gaussian", "untied", "none"]])
def test_text_longer_than_the_table(kernel: Any) -> None:
    model = gpt2(position_kernel=kernel)
    assert model(token_ids(length=24)).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"25 tokens .* longer than n_positions=24 .*position_kernel="):
        model(token_ids(length=25))
    cache = model(token_ids(length=20)).past_key_values
    with pytest.raises(ValueError, match=r"25 tokens .* longer than n_positions=24"):
        model(token_ids(length=5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"n_positions"):
        model.generate(token_ids(length=20), max_new_tokens=9, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("kernel", ["gaussian", "none", ["gaussian", "none", "none"]])
def test_text_of_any_length_where_there_is_no_table(kernel: Any) -> None:
    model = gpt2(position_kernel=kernel)
    assert model(token_ids(length=40)).logits.isfinite().all()
    positions = torch.arange(100, 109).unsqueeze(0)
    assert model(token_ids(), position_ids=positions).logits.isfinite().all()


@pytest.mark.parametrize("kernel", ["additive", "untied"])
@pytest.mark.parametrize(("first", "last"), [(16, 24), (-1, 7), (100, 108)])
def test_positions_outside_the_table(kernel: str, first: int, last: int) -> None:
    positions = torch.arange(first, last + 1).unsqueeze(0)
    rule = rf"position_ids must be from 0 to n_positions - 1 = 23 .*, got values from {first} to {last}"
    with pytest.raises(ValueError, match=rule):
        gpt2(position_kernel=kernel)(token_ids(), position_ids=positions)


@pytest.mark.parametrize("shape", [(9,), (2, 8), (3, 9), (2, 10), (2, 9, 1), (1, 1)])
@pytest.mark.parametrize("variant", ["softmax", "bilateral", "bilateral_gaussian"])
def test_positions_of_a_wrong_shape(variant: str, shape: tuple[int, ...]) -> None:
    rule = rf"position_ids must have shape \(2, 9\) or \(1, 9\), got {re.escape(str(shape))}"
    with pytest.raises(ValueError, match=rule):
        gpt2(variant)(token_ids(), position_ids=torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(12, 20), (24, 12), (20, 16), (4, 4)])
def test_images_of_another_size(variant: str, size: tuple[int, int]) -> None:
    rule = (
        rf"pixel_values must be images of 20 x 12 pixels, got {size[0]} x {size[1]}: .*interpolate_pos_encoding=True"
    )
    with pytest.raises(ValueError, match=rule):
        vit(variant)(images(height=size[0], width=size[1]))


def test_images_with_other_channels() -> None:
    with pytest.raises(ValueError, match=r"(?s)channel.*2.*3"):
        vit("bilateral")(torch.zeros(1, 3, 20, 12))


def test_images_without_a_batch() -> None:
    with pytest.raises(
        ValueError, match=r"pixel_values must .*\[batch, channels, height, width\].*, got .*\(?\[?2, 20, 12"
    ):
        vit("bilateral")(torch.zeros(2, 20, 12))
    with pytest.raises(ValueError, match=r"pixel_values .*, got None"):
        vit("bilateral")()


# --------------------------------------------------------------------------------------------------------------------
# Tokens and encoders
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_both_or_neither_of_tokens_and_embeddings(variant: str) -> None:
    model = gpt2(variant)
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds, got (neither|none)"):
        model()
    with pytest.raises(ValueError, match=r"exactly one of input_ids and inputs_embeds, got both"):
        model(token_ids(), inputs_embeds=torch.zeros(2, 9, 20))


@pytest.mark.parametrize("inputs", [{"input_ids": token_ids()[0]}, {"inputs_embeds": torch.zeros(9, 20)}])
def test_text_without_a_batch(inputs: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"must have shape \[batch, length\].*, got \[9"):
        gpt2("bilateral")(**inputs)


@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_an_encoder_for_a_model_without_cross_attention(variant: str) -> None:
    with pytest.raises(ValueError, match=r"encoder_hidden_states .*add_cross_attention=True, got False"):
        gpt2(variant)(token_ids(), encoder_hidden_states=torch.zeros(2, 4, 20))


# --------------------------------------------------------------------------------------------------------------------
# Attention back-ends
# --------------------------------------------------------------------------------------------------------------------

UNSUPPORTED = [
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "paged|flash_attention_2",
    "sdpaa",
    "flash",
    "",
]


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
@pytest.mark.parametrize("backbone", CLASSES)
def test_other_attention_implementations(backbone: str, variant: str, name: str, tmp_path: Path) -> None:
    model_class, config, *_ = CLASSES[backbone]
    rule = re.escape(f'Specified `attn_implementation="{name}"` is not supported. The only possible arguments are ')
    with pytest.raises(ValueError, match=rule):
        model_class(config(variant, attn_implementation=name))
    with pytest.raises(ValueError, match=rule):
        model_class._from_config(config(variant), attn_implementation=name)
    model = model_class(config(variant))
    with pytest.raises(ValueError, match=rule):
        model.set_attn_implementation(name)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rule):
        model_class.from_pretrained(tmp_path, attn_implementation=name)


@pytest.mark.parametrize(
    ("backbone", "variant"), [("gpt2", "bilateral_twicing"), ("vit", "softmax"), ("vit", "bilateral_twicing")]
)
@pytest.mark.parametrize("name", ["paged|eager", "paged|sdpa"])
def test_paged_attention_is_for_stock_decoders_alone(backbone: str, variant: str, name: str) -> None:
    """It is what continuous batching makes of `eager`, and Transformers 5.17 of `sdpa`, which newer versions keep."""
    model_class, config, *_ = CLASSES[backbone]
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.* is not supported"):
        model_class(config(variant, attn_implementation=name))
    if name in ALL_ATTENTION_FUNCTIONS:
        assert gpt2("softmax", implementation=name).config._attn_implementation == name
    else:
        assert name == "paged|sdpa"
        with pytest.raises(ValueError, match=r"paged\|sdpa.* is not supported"):
            gpt2("softmax", implementation=name)


@pytest.mark.parametrize("backbone", CLASSES)
def test_supported_implementations_can_be_exchanged(backbone: str) -> None:
    model_class, config, *_ = CLASSES[backbone]
    model = model_class(config("bilateral"))
    assert model.config._attn_implementation == "sdpa"
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
    model.set_attn_implementation({"": "eager"})
    assert model.config._attn_implementation == "eager"
    for flag in ("_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(model_class, flag) is False


# --------------------------------------------------------------------------------------------------------------------
# Images without a patch
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(3, 12), (20, 3), (0, 12), (1, 1)])
@pytest.mark.parametrize("variant", ["softmax", "bilateral", "alibi", "nope"])
def test_images_smaller_than_a_patch(variant: str, height: int, width: int) -> None:
    """One sentence in place of an error of a convolution or of an empty grid."""
    model = ImgProcViTForImageClassification(vit_config(variant)).eval()
    with pytest.raises(ValueError, match=rf"at least one patch of 4 x 4 pixels, got {height} x {width}"):
        model(images(height=height, width=width), interpolate_pos_encoding=True)


def test_a_configuration_of_images_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="at least one patch of 16 x 16 pixels, got 8 x 8"):
        ImgProcViTForImageClassification(vit_config("alibi", image_size=8, patch_size=16))
