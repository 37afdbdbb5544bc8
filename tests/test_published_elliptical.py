"""Elliptical attention against the published program's formulas, written out here in lines of their own.

The authors' vision code: values of this and of the preceding layer, per head; w = mean over all tokens, the class
token included, of |V_l - V_{l-1}|; m = w / max(w); softmax(q diag(m) k^T / sqrt(d)) V; layer 0 plain. Their language
code takes the same mean over all tokens, future ones too, and drops 1/sqrt(d) where m is used; ours differs there: a
running mean over the tokens up to i that are no padding, and 1/sqrt(d) everywhere. The tests show both.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTModel
from tests.models.helpers import make_filter, sharpen_, tiny_gpt2_config, tiny_vit_config
from tests.models.variants import IMPLEMENTATIONS, images, pad, token_ids

EXACT = {"rtol": 0, "atol": 1e-11}


@contextmanager
def recorded(modules: list[torch.nn.Module], side: str) -> Any:
    """What goes into or comes out of each module, in order."""
    seen: list[torch.Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(
                lambda _, inputs, output: seen.append(inputs[0] if side == "input" else output)
            )
            stack.callback(handle.remove)
        yield seen


def by_head(states: torch.Tensor, heads: int) -> torch.Tensor:
    batch, length, width = states.shape
    return states.reshape(batch, length, heads, width // heads).permute(0, 2, 1, 3)


def plain_softmax(logits: torch.Tensor) -> torch.Tensor:
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vit_layers_are_the_published_formula(implementation: str, masked: bool) -> None:
    """Every layer, from the queries, keys and values that the model itself computes there."""
    config = tiny_vit_config("elliptical", attn_implementation=implementation)
    model = sharpen_(ImgProcViTModel(config, add_pooling_layer=False)).double().eval()
    attentions = [layer.attention for layer in model.layers]
    seen = torch.ones(2, 16, dtype=torch.bool)
    if masked:
        seen[1, [3, 15]] = False
    with ExitStack() as stack:
        query, key, value = (
            stack.enter_context(recorded([getattr(layer, name) for layer in attentions], "output"))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = stack.enter_context(recorded([layer.o_proj for layer in attentions], "input"))
        model(images().double(), attention_mask=seen.long() if masked else None)
    for index in range(3):
        q, k, v = (by_head(states[index], 4) for states in (query, key, value))
        if index:
            difference = (v - by_head(value[index - 1], 4)).abs()
            for row in range(2):
                for head in range(4):
                    w = difference[row, head][seen[row]].mean(0)
                    q[row, head] = q[row, head] @ torch.diag(w / w.max())
        logits = (q @ k.mT / 5**0.5).masked_fill(~seen[:, None, None, :], float("-inf"))
        expected = (plain_softmax(logits) @ v).permute(0, 2, 1, 3).flatten(2)
        torch.testing.assert_close(mixed[index][seen], expected[seen], **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gpt2_layers_have_a_running_mean(implementation: str, side: str) -> None:
    """Token by token: the mean of |D_j| over the unmasked j <= i, in each row with its own padding."""
    config = tiny_gpt2_config("elliptical", attn_implementation=implementation)
    model = sharpen_(ImgProcGPT2LMHeadModel(config)).double().eval()
    ids = token_ids(batch=2, length=9)
    inputs = {"input_ids": ids} if side == "none" else pad(ids, row=1, length=6, side=side)
    seen = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    blocks = [block.attn for block in model.transformer.h]
    with (
        recorded([attention.c_attn for attention in blocks], "output") as projected,
        recorded([attention.c_proj for attention in blocks], "input") as mixed,
    ):
        model(**inputs)
    for index in range(3):
        q, k, v = (by_head(states, 4) for states in projected[index].chunk(3, dim=-1))
        previous = by_head(projected[max(index - 1, 0)].chunk(3, dim=-1)[2], 4)
        for row in range(2):
            for i in range(9):
                if not seen[row, i]:
                    continue
                earlier = [j for j in range(i + 1) if seen[row, j]]
                for head in range(4):
                    query = q[row, head, i]
                    if index:
                        w = torch.stack([(v - previous)[row, head, j].abs() for j in earlier]).mean(0)
                        query = query * w / w.max()
                    weights = plain_softmax(torch.stack([query @ k[row, head, j] / 5**0.5 for j in earlier]))
                    expected = sum(weight * v[row, head, j] for weight, j in zip(weights, earlier, strict=True))
                    got = mixed[index][row, i].view(4, 5)[head]
                    torch.testing.assert_close(got, expected, **EXACT)


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_published_language_code_leaks_and_ours_does_not(implementation: str) -> None:
    """The mean over all tokens moves the metric of the first query when the last token changes."""
    layer = make_filter("elliptical", learn_bandwidths=False)
    generator = torch.Generator().manual_seed(0)
    query, key, value, previous = torch.randn(4, 1, 3, 8, 5, generator=generator).double()
    changed = value.clone()
    changed[:, :, -1] *= 10

    def published(values: torch.Tensor) -> torch.Tensor:
        w = (values - previous).abs().mean(dim=2, keepdim=True)
        logits = (query * w / w.amax(-1, keepdim=True)) @ key.mT
        return plain_softmax(logits.masked_fill(~torch.ones(8, 8).tril().bool(), float("-inf"))) @ values

    def ours(values: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"implementation": implementation, "is_causal": True}
        return layer(query, key, values, previous_value=previous, **options)[0]

    early = slice(0, 7)
    assert (published(changed) - published(value))[:, :, early].abs().max() > 1e-2
    torch.testing.assert_close(ours(changed)[:, :, early], ours(value)[:, :, early], rtol=0, atol=1e-15)


@torch.no_grad()
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_that_did_not_move_leave_plain_attention(implementation: str, is_causal: bool) -> None:
    """0/0 is M = I, in single rows too: here up to the fourth token nothing has moved."""
    layer = make_filter("elliptical", learn_bandwidths=False)
    query, key, value, previous = torch.randn(4, 2, 3, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
    options: dict[str, Any] = {"implementation": implementation, "is_causal": is_causal}
    still, _ = layer(query, key, value, previous_value=value, **options)
    torch.testing.assert_close(still, plain, **EXACT)
    previous[:, :, :4] = value[:, :, :4]
    moved, _ = layer(query, key, value, previous_value=previous, **options)
    assert moved.isfinite().all()
    assert torch.allclose(moved[:, :, :4], plain[:, :, :4], **EXACT) == is_causal
    assert (moved - plain)[:, :, 4:].abs().max() > 0.1


def test_no_gradient_flows_through_the_metric() -> None:
    """The values get the gradient of A V with A held fixed; the preceding layer's values get none."""
    layer = make_filter("elliptical", learn_bandwidths=False)
    query, key, value, previous = (
        tensor.requires_grad_() for tensor in torch.randn(4, 1, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    )
    layer = layer.float()
    output, operator = layer(
        query, key, value, previous_value=previous, implementation="eager", is_causal=True, need_weights=True
    )
    output.sum().backward()
    torch.testing.assert_close(value.grad, operator.detach().sum(-2).unsqueeze(-1).expand_as(value))
    assert previous.grad is None
    with pytest.raises(ValueError, match="previous_value must be given for content_kernel='elliptical' in layer 1"):
        layer(query, key, value, implementation="sdpa")
