"""The published programs, from their formulas: stock Transformers models whose attention is a few dense lines.

Outputs and every gradient of whole models, in training mode, where dropout acts on the attention matrix as in the
authors' vision programs. Where this package differs on purpose, a test says how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
from tests.models.helpers import GPT2, VIT, sharpen_
from tests.models.variants import gradients, images, token_ids

# The language models of both papers have 16 layers.
LANGUAGE = {**GPT2, "n_layer": 16, "n_embd": 12, "n_head": 3, "n_positions": 12}
Lines = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, softmax matrix, values) to the head output."""


def softmax_of(query: torch.Tensor, key: torch.Tensor, is_causal: bool) -> torch.Tensor:
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if is_causal:
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1) == 1, -torch.inf)
    return logits.softmax(dim=-1)


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Callable[[Lines, float], None]:
    """Registers lines as the attention ``published`` of stock models; dropout acts on the softmax matrix."""

    def register(lines: Lines, dropout: float = 0.0) -> None:
        calls = [0]

        def attention(
            module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
        ) -> tuple[torch.Tensor, None]:
            attn = nn.functional.dropout(softmax_of(query, key, hasattr(module, "c_attn")), dropout)
            output = lines(calls[0], attn, value)
            calls[0] += 1
            return output.transpose(1, 2), None

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "published", attention)

    return register


def models(kind: str, dropout: float = 0.0, **fields: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A stock model with the published attention, ours with the same weights, and an input; float64, training mode."""
    if kind == "language":
        sizes = {**LANGUAGE, "attn_pdrop": dropout}
        stock = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="published"))
        ours = ImgProcGPT2LMHeadModel(ImgProcGPT2Config(**sizes, **fields, attn_implementation="eager"))
        inputs = token_ids(length=11)
    else:
        sizes = {**VIT, "attention_probs_dropout_prob": dropout}
        stock = ViTForImageClassification(ViTConfig(**sizes, attn_implementation="published"))
        ours = ImgProcViTForImageClassification(ImgProcViTConfig(**sizes, **fields, attn_implementation="eager"))
        inputs = images().double()
    sharpen_(stock)
    ours.load_state_dict(stock.state_dict())
    return stock.double().train(), ours.double().train(), inputs


def outcome(model: nn.Module, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and the gradient of every parameter, with dropout from a fixed seed."""
    torch.manual_seed(11)
    logits = model(inputs).logits
    return {"logits": logits.detach(), **gradients(model, logits.sin().sum())}


def assert_same_program(stock: nn.Module, ours: nn.Module, inputs: torch.Tensor) -> None:
    wanted, got = outcome(stock, inputs), outcome(ours, inputs)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_twicing_for_images(published: Callable[..., None], dropout: float) -> None:
    """All layers: (2A - A^2) V with A after its dropout, one mask (Abdullaev, Nguyen 2025)."""
    published(lambda layer, attn, v: (2 * attn - attn @ attn) @ v, dropout)
    assert_same_program(*models("vision", dropout, boosting="twicing"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_twicing_for_text(published: Callable[..., None], dropout: float) -> None:
    """The last two of 16 layers are boosted; with dropout as in the vision program."""
    published(lambda layer, attn, v: (2 * attn - attn @ attn if layer >= 14 else attn) @ v, dropout)
    assert_same_program(*models("language", dropout, boosting="twicing", boosted_layers=[-2, -1]))


def test_dropout_of_twicing_for_text_differs_on_purpose(published: Callable[..., None]) -> None:
    """The authors' language program drops entries of 2A - A^2; here they are dropped from A, as in the vision one.

    So both backbones do the same, and what multiplies V in a training step is a twicing operator of one filter.
    """

    def lines(layer: int, attn: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(2 * attn - attn @ attn if layer >= 14 else attn, 0.3) @ v

    published(lines)
    stock, ours, inputs = models("language", 0.3, boosting="twicing", boosted_layers=[-2, -1])
    assert (outcome(stock, inputs)["logits"] - outcome(ours, inputs)["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("kind", "strength"), [("vision", 0.6), ("language", 0.4)])
def test_neutreno(published: Callable[..., None], kind: str, strength: float, dropout: float) -> None:
    """A V + lambda (V_0 - V) in every layer but the first, the second term not dropped out (Nguyen 2023)."""
    first: list[torch.Tensor] = []

    def lines(layer: int, attn: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            first.append(v)
            return attn @ v
        return attn @ v + strength * (first[-1] - v)

    published(lines, dropout)
    assert_same_program(*models(kind, dropout, feedback="neutreno"))
