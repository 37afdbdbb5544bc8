"""Every variant that the tests of whole models run through, with inputs and comparisons."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn

from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.filter_spec import PRESETS
from tests.models.helpers import GPT2, VIT, tiny_gpt2_config, tiny_vit_config

IMPLEMENTATIONS = ("eager", "sdpa")

VOCABULARY = GPT2["vocab_size"]

# Beside the presets: layers that differ from each other, heads that differ from each other, several booster steps.
CUSTOM: dict[str, dict[str, Any]] = {
    "mixed": {
        "content_kernel": ["dot_product", "gaussian", "dot_product"],
        "position_kernel": ["untied", "gaussian", "none"],
        "boosting": ["none", "twicing", "twicing"],
        "boosting_steps": [2, 3, 2],
        "learn_bandwidths": True,
    },
    "mixed_fixed": {
        "position_kernel": ["none", "untied", "gaussian"],
        "boosting": ["twicing", "none", "none"],
        "content_bandwidth": [1.5, 2.5, 2.0, 3.0],
        "position_bandwidth": [3.0, 2.0, 5.0, 4.0],
    },
    "shared": {
        "position_kernel": "untied",
        "share_position_projections": True,
        "learn_bandwidths": True,
        "boosting": "twicing",
        "boosted_layers": [-1],
    },
    "mixed_kernels": {
        "content_kernel": ["dot_product", "elliptical", "elliptical"],
        "position_kernel": ["alibi", "relative_buckets", "gaussian"],
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 9,
        "boosting": ["twicing", "none", "twicing"],
        "learn_bandwidths": True,
    },
    "three_steps": {"boosting": "twicing", "boosting_steps": 3, "boosted_layers": [0, -1]},
}
VARIANTS = (*PRESETS, *CUSTOM)
ELLIPTICAL = tuple(name for name in VARIANTS if "elliptical" in {**PRESETS, **CUSTOM}[name].get("content_kernel", ()))
BOOSTED = tuple(name for name in VARIANTS if "boosting" in {**PRESETS, **CUSTOM}[name])


def gpt2_config(variant: str = "softmax", **overrides: Any) -> ImgProcGPT2Config:
    """A tiny GPT-2 of a variant, with an attention implementation if one is given."""
    if variant in PRESETS:
        return tiny_gpt2_config(variant, **overrides)
    return ImgProcGPT2Config(**{**GPT2, **CUSTOM[variant], **overrides})


def vit_config(variant: str = "softmax", **overrides: Any) -> ImgProcViTConfig:
    """A tiny ViT of a variant, on images of 20 x 12 pixels with two channels."""
    if variant in PRESETS:
        return tiny_vit_config(variant, **overrides)
    return ImgProcViTConfig(**{**VIT, **CUSTOM[variant], **overrides})


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> torch.Tensor:
    """Random tokens other than 0, which stands for padding, ``[batch, length]``."""
    return torch.randint(1, VOCABULARY - 1, (batch, length), generator=torch.Generator().manual_seed(seed))


def pad(ids: torch.Tensor, row: int, length: int, side: str) -> dict[str, torch.Tensor]:
    """Model inputs in which ``row`` keeps its first ``length`` tokens, padded with 0 on ``side``."""
    ids, mask = ids.clone(), torch.ones_like(ids)
    padding = ids.shape[1] - length
    kept = ids[row, :length].clone()
    hidden, real = (
        (slice(0, padding), slice(padding, None)) if side == "left" else (slice(length, None), slice(0, length))
    )
    ids[row, real] = kept
    ids[row, hidden], mask[row, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def images(batch: int = 2, height: int = 20, width: int = 12, seed: int = 2) -> torch.Tensor:
    """Random images, ``[batch, 2, height, width]``."""
    return torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every parameter; fails if one has none."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing, f"no gradient for {missing}"
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same_gradients(
    got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], rtol: float = 1e-8, atol: float = 1e-9
) -> None:
    """Every parameter's gradient agrees."""
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            got[name], gradient, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` fills once in a run, however many workers share the tests."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "done").touch()
    return folder
