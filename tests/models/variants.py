"""Every variant that the tests of whole models run through, with inputs and comparisons."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from filelock import FileLock
from torch import nn

from hf_imgproc_attn.backbones import BACKBONES
from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.spec_axes import LayerSpec
from hf_imgproc_attn.models.spec_fields import PRESETS
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
    "mixed_boosters": {
        "content_kernel": ["gaussian", "dot_product", "gaussian"],
        "boosting": ["learned", "diffusion", "gradient_boosted"],
        "boosting_steps": [2, 3, 3],
        "gradient_boosting_source": "input",
        "residual": "osher",
        "feedback": "neutreno",
    },
    "looking_back": {
        "position_kernel": "gaussian",
        "learn_bandwidths": True,
        "boosting": "osher",
        "boosting_steps": 3,
        "boosted_layers": [1],
        "residual": "sos",
        "feedback": "pid",
        "pid_gains": [0.4, -0.2, 0.3],
        "learn_feedback": True,
    },
    "normalisations": {
        "content_kernel": ["cosine", "dot_product", "cosine"],
        "feedback": "value_residual",
        "normalisation": ["sink", "sigmoid", "softpick"],
        "position_kernel": ["untied", "gaussian", "alibi"],
        "boosting": ["twicing", "none", "learned"],
        "gate": ["none", "none", "headwise"],
    },
    "one_pass": {
        "position_kernel": ["gaussian", "none", "untied"],
        "boosting": ["inversion", "dynamic_inversion", "exclusive"],
        "gate": ["elementwise", "headwise", "none"],
        "feedback": "neutreno",
    },
    "single_weights": {
        "position_kernel": ["gaussian", "none", "untied"],
        "boosting": ["local_linear", "robust", "local_linear"],
        "boosting_steps": [2, 4, 2],
        "gate": ["none", "headwise", "none"],
    },
}
PRESETS_OF = {
    name: tuple(preset for preset in PRESETS if preset not in row.refused_presets) for name, row in BACKBONES.items()
}
"""Name of a backbone -> the presets that its configuration does not refuse."""
RIVALS = (
    "inversion",
    "dynamic_inversion",
    "exclusive",
    "local_linear",
    "robust",
    "gated",
    "sink",
    "sigmoid",
    "softpick",
    "qk_norm",
    "value_residual",
    "sinkhorn",
    "forgetting",
    "differential",
    "delta",
)
"""Presets with one value: files of their own test each, and tests of whole models leave it at layers of ``CUSTOM``."""
VARIANTS = (*(name for name in PRESETS if name not in RIVALS), *CUSTOM)
ELLIPTICAL = tuple(name for name in VARIANTS if "elliptical" in {**PRESETS, **CUSTOM}[name].get("content_kernel", ()))
FEW_ROWS = ("one_pass", "single_weights")
BOOSTED = tuple(name for name in VARIANTS if "boosting" in {**PRESETS, **CUSTOM}[name] and name not in FEW_ROWS)
"""Variants that apply A more than once in some layer, for which a cache keeps streams."""
ALL_STOCK = ("softmax", "nope", "boosted_residual")
"""Variants whose every attention is the stock one."""
SOME_STOCK = (*ALL_STOCK, "three_steps")
"""Variants with a layer whose attention is the stock one."""


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


class Call(NamedTuple):
    """The first input and the output of a module."""

    input: Any
    output: Any


def recorded_call(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Call]]:
    """A model's output, and what went into and came out of each of its modules, by name."""
    seen: dict[str, Call] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda _, inputs, output: seen.__setitem__(name, Call(inputs[0] if inputs else None, output))

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        return model(*args, **kwargs), seen
    finally:
        for handle in handles:
            handle.remove()


def averages(spec: LayerSpec) -> bool:
    """Whether the rows of a layer's operator sum to 1."""
    return spec.boosting not in ("inversion", "dynamic_inversion") and spec.normalisation == "softmax"


def heads_by_hand(
    config: Any, layer: int, maps: torch.Tensor, values: list[torch.Tensor], seen: dict[str, Call], name: str
) -> torch.Tensor:
    """What the output projection of a layer reads, from the attentions that the model returned.

    Args:
        config: of the model.
        layer: its index.
        maps: ``[batch, maps, heads, length, length]``: one operator on V, or those of gradient boosting's rounds.
        values: V of this layer and all before it, ``[batch, heads, length, head_dim]``.
        seen: of the call.
        name: of the layer's attention module.
    """

    def merged(heads: torch.Tensor) -> torch.Tensor:
        return heads.transpose(1, 2).flatten(2)

    value = values[layer]
    if layer and config.feedback == "value_residual":
        share = seen[f"{name}.filter.scalar_bias"].output.value_residual
        value = (1 - share) * value + share * values[0]
    spec = config.layer_specs[layer]
    rows = maps[:, 0] @ value
    if spec.boosting == "exclusive":
        rows = rows - value * ((rows * value).sum(-1) / value.square().sum(-1)).unsqueeze(-1)
    if spec.boosting == "robust":  # Huber's, with the default threshold
        for _ in range(spec.boosting_steps):
            distances = (value[:, :, None] - rows[:, :, :, None]).norm(dim=-1)
            weights = maps[:, 0] * torch.where(distances > 1.0, 1.0 / distances, torch.ones_like(distances))
            rows = weights @ value / weights.sum(-1, keepdim=True)
    output = merged(rows)
    for number in range(1, maps.shape[1]):
        boosting = f"{name}.filter.gradient_boosting" + (f"_further.{number - 2}" if number > 1 else "")
        own = seen[f"{boosting}.value"].output.view(value.transpose(1, 2).shape).transpose(1, 2)
        correction = merged(maps[:, number] @ own)
        gate = seen[f"{boosting}.gate"]
        torch.testing.assert_close(gate.input, torch.cat((output, correction), dim=-1), rtol=0, atol=1e-12)
        output = output + gate.output.sigmoid() * correction
    errors = [values[0] - earlier for earlier in values[: layer + 1]]
    if layer and config.feedback == "neutreno":
        strength = {"imgproc_gpt2": 0.4, "imgproc_vit": 0.6}[config.model_type]
        output = output + strength * merged(errors[layer])
    if layer and config.feedback == "pid":
        gains = config.pid_gains or (0.5, 0.05, 0.05)
        if config.learn_feedback:
            learned = seen[f"{name}.filter.scalar_bias"].output.feedback_gains
            gains = [gain.view(-1, 1, 1) for gain in learned.unbind(-1)]
        terms = (errors[layer], sum(errors), errors[layer] - errors[layer - 1])
        output = output + merged(sum(gain * term for gain, term in zip(gains, terms, strict=True)))
    if spec.gate != "none":
        gate = 2 * seen[f"{name}.filter.gate.projection"].output.sigmoid()
        output = output * gate.repeat_interleave(output.shape[-1] // gate.shape[-1], dim=-1)
    return output


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
