"""Which arrangements of patches or words a model can tell apart, by the kernel of its positions.

The page "Which filter?" says it in a table.
"""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertForSequenceClassification,
    ImgProcViTConfig,
    ImgProcViTForImageClassification,
)
from tests.models.helpers import sharpen_
from tests.models.variants import images

pytestmark = pytest.mark.both_back_ends

PATCH, SIDE = 4, 5
BLIND = {"shuffled": ("none",), "mirrored": ("none", "gaussian", "alibi")}
BLIND |= dict.fromkeys(("upside down", "turned"), BLIND["mirrored"])
"""Arrangement of the same patches -> kernels of positions for which nothing has changed."""
PRESETS = {
    "none": "nope", "gaussian": "bilateral_gaussian", "alibi": "alibi", "relative_buckets": "t5_bias",
    "rotary": "rope", "untied": "bilateral", "additive": "softmax",
}  # fmt: skip
"""Kernel of positions -> a preset that has it."""


def arranged(pixels: torch.Tensor, change: str) -> torch.Tensor:
    """Square images ``[batch, channels, side, side]`` whose patches, each as it was, lie elsewhere."""
    batch, channels, side, _ = pixels.shape
    rows = side // PATCH
    grid = pixels.view(batch, channels, rows, PATCH, rows, PATCH).permute(2, 4, 0, 1, 3, 5)
    grid = {
        "mirrored": lambda: grid.flip(1),
        "upside down": lambda: grid.flip(0),
        "turned": lambda: grid.transpose(0, 1).flip(0),
        "shuffled": lambda: grid.flatten(0, 1)[torch.arange(rows**2).roll(1)].unflatten(0, (rows, rows)),
    }[change]()
    return grid.permute(2, 3, 0, 4, 1, 5).reshape(pixels.shape)


def changes_of_logits(before: torch.Tensor, after: torch.Tensor) -> float:
    """The largest change, in units of the largest logit."""
    return float((after - before).abs().max() / before.abs().max())


@pytest.mark.parametrize("position", PRESETS)
def test_a_kernel_of_distances_cannot_tell_left_from_right(position: str) -> None:
    """``gaussian`` and ``alibi`` know how far apart two patches are: a mirror or a turn leaves all distances."""
    config = ImgProcViTConfig.from_preset(
        PRESETS[position], hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32,
        image_size=PATCH * SIDE, patch_size=PATCH, num_channels=2, num_labels=5,
    )  # fmt: skip
    assert config.position_kernel == position
    model = sharpen_(ImgProcViTForImageClassification(config)).eval().double()
    pixels = images(height=PATCH * SIDE, width=PATCH * SIDE).double()
    with torch.no_grad():
        before = model(pixels).logits
        for change, blind in BLIND.items():
            found = changes_of_logits(before, model(arranged(pixels, change)).logits)
            assert found < 1e-6 if position in blind else found > 1e-3, change


@pytest.mark.parametrize("position", [name for name in PRESETS if name != "none"])
def test_it_cannot_tell_a_text_from_its_reverse(position: str) -> None:
    """In an encoder that averages over its tokens. In GPT-2 the causal mask tells what comes first."""
    config = ImgProcBertConfig.from_preset(
        PRESETS[position], vocab_size=31, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=32, max_position_embeddings=16, num_labels=5, classifier_pooling="mean",
    )  # fmt: skip
    model = sharpen_(ImgProcBertForSequenceClassification(config)).eval().double()
    tokens = torch.randint(1, 31, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = changes_of_logits(model(tokens).logits, model(tokens.flip(1)).logits)
    assert found < 1e-6 if position in BLIND["mirrored"] else found > 1e-3
