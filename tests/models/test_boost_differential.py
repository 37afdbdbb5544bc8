"""Differential attention: the formula, back-ends, what a cache keeps, where it starts, who refuses it."""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, convert
from hf_imgproc_attn.models.backend_call import Difference
from hf_imgproc_attn.models.backend_table import run_filter
from tests.models.helpers import filter_call, make_filter
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, token_ids


@pytest.mark.parametrize("mask", ["none", "left", "dense"])
@pytest.mark.parametrize("content", ["dot_product", "cosine", "elliptical"])
def test_it_is_the_difference_of_two_maps(content: str, mask: str) -> None:
    """The operator by hand, and all gradients on every back-end."""
    layer = make_filter(content, "none", "differential")
    inputs = tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}
    options = masks()[mask]
    dense = run(layer, inputs, "eager", need_weights=True, **options)
    operator = dense.pop("weights")
    torch.testing.assert_close(operator @ inputs["value"], dense["output"], **TIGHT)
    for backend in ("reference", "sdpa", "blocked", "chunked"):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **options), dense)
    if content != "dot_product":
        return
    scale = 2 * torch.exp(-2 * layer.scalar_bias.content_log_bandwidth.detach()).view(-1, 1, 1)
    second = (projection(inputs["hidden_states"]) for projection in (layer.second_map.query, layer.second_map.key))
    pairs = [
        (inputs["query"], inputs["key"]),
        tuple(x.view(BATCH, LENGTH, HEADS, WIDTH).transpose(1, 2) for x in second),
    ]
    allowed = options.get("attention_mask", torch.ones(LENGTH, LENGTH, dtype=torch.bool))
    first, other = (
        (query @ key.mT * scale).masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num(0.0)
        for query, key in pairs
    )
    torch.testing.assert_close(operator, first - layer.scalar_bias.differential.view(-1, 1, 1) * other, **TIGHT)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_gradients_are_numerical_ones(backend: str) -> None:
    leaves = [random(1, 2, 4, 3, seed=seed).requires_grad_() for seed in range(5)]
    share = random(2, 1, 1, seed=6).requires_grad_()

    def filtered(*given: torch.Tensor) -> torch.Tensor:
        call = filter_call(*given[:3], is_causal=True)
        return run_filter(call._replace(difference=Difference(given[3], given[4], given[5])), backend)

    assert torch.autograd.gradcheck(filtered, [*leaves, share])


@torch.no_grad()
def test_it_starts_as_plain_attention_in_a_converted_model() -> None:
    torch.manual_seed(0)
    source = ImgProcGPT2LMHeadModel(gpt2_config("softmax")).eval()
    model, report = convert(source, "softmax", boosting="differential", return_report=True)
    assert report.max_difference < 1e-6
    torch.testing.assert_close(model.eval()(token_ids()).logits, source(token_ids()).logits, rtol=0, atol=1e-6)
    layer = model.transformer.h[0].attn.filter
    assert layer.stream_names == ("second.key",)
    assert not layer.scalar_bias.differential.any()


def test_the_share_learns_from_the_start() -> None:
    torch.manual_seed(0)
    model = ImgProcGPT2LMHeadModel(gpt2_config("softmax", boosting="differential"))
    model(token_ids(), labels=token_ids()).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if name.endswith("scalar_bias.differential")]
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
