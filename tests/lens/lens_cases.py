"""Models that the lens looks at, and what their layers compute."""

from __future__ import annotations

import inspect

import torch
from torch import nn

import hf_imgproc_attn
from hf_imgproc_attn.lens.observation import observed
from hf_imgproc_attn.models.any_layers import attention_layers
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import filter_logits, reference_attention
from tests.any_model.architectures import build, inputs
from tests.models.helpers import sharpen_, tiny_gpt2_config, tiny_vit_config
from tests.models.variants import images, pad, token_ids

STACKS = {"bart": "model.decoder.layers", "t5": "encoder.block", "whisper": "model.encoder.layers"}


def ours(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of the package, ``gpt2:PRESET`` or ``vit:PRESET``, in double precision with eager attention."""
    kind, preset = name.split(":")
    if kind == "gpt2":
        config = tiny_gpt2_config(preset, attn_implementation="eager")
        model: nn.Module = hf_imgproc_attn.ImgProcGPT2LMHeadModel(config)
        given = pad(token_ids(3, 12), 1, 8, "left")
    else:
        config = tiny_vit_config(preset, attn_implementation="eager")
        model = hf_imgproc_attn.ImgProcViTForImageClassification(config)
        given = {"pixel_values": images().double()}
    return sharpen_(model.double().eval()), given


def stock(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model of Transformers."""
    return build(name), inputs(name, padded=name in ("llama", "bert"))


def made(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    return ours(name) if ":" in name else stock(name)


def no_cache(model: nn.Module) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}


def operator_of(call: FilterCall) -> torch.Tensor:
    """p(A), dense."""
    operator = reference_attention(filter_logits(call), call, "operator")[1]
    assert operator is not None
    return operator


def calls_of(model: nn.Module, given: dict[str, torch.Tensor]) -> list[tuple[FilterCall, torch.Tensor]]:
    """What each layer filters and returns."""
    calls: list[tuple[FilterCall, torch.Tensor]] = []
    with (
        torch.no_grad(),
        observed(model, attention_layers(model), lambda index, call, output: calls.append((call, output))),
    ):
        model(**given, **no_cache(model))
    return calls
