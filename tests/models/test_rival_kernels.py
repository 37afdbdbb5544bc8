"""Cosine contents, forget gates and mixed values: formulas by hand, back-ends, decoding, starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, apply_filter, convert
from hf_imgproc_attn.models.kernel_content import unit_vectors
from tests.models.helpers import logits_in_steps, make_filter, sharpen_
from tests.models.layer_cases import (
    BATCH,
    HEADS,
    LENGTH,
    TIGHT,
    WIDTH,
    assert_same,
    build,
    masks,
    random,
    run,
    tensors,
)
from tests.models.variants import gpt2_config, pad, token_ids, vit_config

CAUSAL = ("causal", "left", "right")

# --------------------------------------------------------------------------------------------------------------------
# Cosine
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "left", "dense"])
@pytest.mark.parametrize("position", ["none", "alibi"])
def test_cosine_is_the_formula(position: str, mask: str) -> None:
    """Of A by hand; every back-end gives the same gradients."""
    layer, inputs = build("cosine", position), tensors(position)
    dense = run(layer, inputs, "eager", need_weights=True, **masks()[mask])
    matrix = dense.pop("weights")
    tau = 2 * torch.exp(-2 * layer.scalar_bias.content_log_bandwidth.detach())
    query, key = (inputs[name] / inputs[name].norm(dim=-1, keepdim=True) for name in ("query", "key"))
    if position == "none":
        logits = torch.einsum("bhid,bhjd,h->bhij", query, key, tau).masked_fill(matrix == 0, float("-inf"))
        torch.testing.assert_close(matrix, logits.softmax(-1).nan_to_num(0.0), **TIGHT)
    for backend in ("reference", "sdpa", "blocked", "chunked"):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **masks()[mask]), dense)


@torch.no_grad()
def test_cosine_is_the_gaussian_of_unit_vectors() -> None:
    inputs = tensors("none")
    cosine, gaussian = build("cosine", "none"), build("gaussian", "none")
    gaussian.load_state_dict(cosine.state_dict())
    units = {**inputs, "query": unit_vectors(inputs["query"]), "key": unit_vectors(inputs["key"])}
    wanted, _ = gaussian(**units, implementation="eager")
    torch.testing.assert_close(cosine(**inputs, implementation="sdpa")[0], wanted, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_vectors_of_any_length_have_a_direction(size: float) -> None:
    x = torch.tensor([[3.0, -4.0], [0.0, 0.0]]) * size
    torch.testing.assert_close(unit_vectors(x), torch.tensor([[0.6, -0.8], [0.0, 0.0]]))


def test_unit_vectors_have_numerical_gradients() -> None:
    assert torch.autograd.gradcheck(unit_vectors, random(3, 4).requires_grad_())


@torch.no_grad()
def test_its_factor_starts_at_the_root_of_the_width() -> None:
    """Learned, fixed, and in another model, whose own factor it replaces."""
    for learned in (True, False):
        layer = make_filter("cosine", "none", learn_bandwidths=learned, head_dim=WIDTH)
        layer.scalar_bias.reset_parameters()
        inputs = tensors("none")
        query, key = unit_vectors(inputs["query"]), unit_vectors(inputs["key"])
        wanted = (query @ key.mT * WIDTH**0.5).softmax(-1) @ inputs["value"]
        torch.testing.assert_close(layer(**inputs, implementation="eager")[0], wanted, **TIGHT)
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4, intermediate_size=8)).eval()
    pixels = torch.randn(1, 3, 8, 8)
    plain = model(pixels).last_hidden_state
    filtered = apply_filter(model, content_kernel="cosine")(pixels).last_hidden_state
    assert (filtered - plain).abs().max() > 1e-4


# --------------------------------------------------------------------------------------------------------------------
# Forget gates
# --------------------------------------------------------------------------------------------------------------------


def with_tokens() -> dict[str, torch.Tensor]:
    return tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}


@pytest.mark.parametrize("mask", CAUSAL)
@pytest.mark.parametrize("boosting", ["none", "twicing"])
def test_forget_is_the_formula(boosting: str, mask: str) -> None:
    """The product of the gates between key and query, token by token; every back-end has the same gradients."""
    layer, inputs = make_filter("dot_product", "forget", boosting), with_tokens()
    dense = run(layer, inputs, "eager", **masks()[mask])
    for backend in ("reference", "sdpa", "blocked", "chunked"):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **masks()[mask]), dense)
    if boosting == "twicing":
        return
    scale = 2 * torch.exp(-2 * layer.scalar_bias.content_log_bandwidth.detach())
    seen = torch.ones(BATCH, LENGTH, LENGTH, dtype=torch.bool).tril()
    if mask != "causal":
        seen = seen & masks()[mask]["attention_mask"][:, 0]
    gates = torch.sigmoid(inputs["hidden_states"] @ layer.forget_gates.weight.T + layer.forget_gates.bias).detach()
    for b, h, i in ((b, h, i) for b in range(BATCH) for h in range(HEADS) for i in range(LENGTH)):
        if not seen[b, i].any():
            continue
        weights = torch.zeros(LENGTH, dtype=torch.float64)
        for j in range(i + 1):
            if seen[b, i, j]:
                kept = [gates[b, m, h] for m in range(j + 1, i + 1) if seen[b, -1, m] or mask == "causal"]
                passed = torch.stack(kept).prod() if kept else 1.0
                weights[j] = torch.exp(inputs["query"][b, h, i] @ inputs["key"][b, h, j] * scale[h]) * passed
        wanted = weights @ inputs["value"][b, h] / weights.sum()
        torch.testing.assert_close(dense["output"][b, h, i], wanted, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"boosting": "gradient_boosted"}, {"normalisation": "sigmoid"}], ids=str)
def test_forgetting_decodes_exactly_with_padding(more: dict[str, Any]) -> None:
    """Step by step through the cache, and as the row alone."""
    config = gpt2_config("softmax", position_kernel="forget", **more)
    model = sharpen_(ImgProcGPT2LMHeadModel(config).double().eval())
    inputs = pad(token_ids(length=7), row=1, length=5, side="left")
    real = inputs["attention_mask"].bool()
    whole = model(**inputs, use_cache=False).logits[real]
    torch.testing.assert_close(logits_in_steps(model, inputs, (0, 4, 5, 7))[real], whole, rtol=0, atol=1e-11)
    alone = model(token_ids(length=7)[1:, :5]).logits[0]
    torch.testing.assert_close(whole[7:], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["none", "gradient_boosted", "differential"])
@pytest.mark.parametrize("name", ["softmax", "sink", "sigmoid", "softpick"])
def test_forgetting_decodes_exactly_in_a_cache_of_fixed_size(name: str, boosting: str) -> None:
    """Where the own tokens are not the last ones: c_i is that of the token, which only a softmax would not notice."""
    config = gpt2_config("softmax", position_kernel="forget", normalisation=name, boosting=boosting)
    model = sharpen_(ImgProcGPT2LMHeadModel(config).double().eval())
    inputs = pad(token_ids(length=7), row=1, length=5, side="left")
    real = inputs["attention_mask"].bool()
    whole, cache = model(**inputs, use_cache=False).logits[real], StaticCache(config, max_cache_len=9)
    torch.testing.assert_close(logits_in_steps(model, inputs, (0, 4, 5, 7), cache)[real], whole, rtol=0, atol=1e-11)


@torch.no_grad()
def test_gates_start_open_in_a_converted_model() -> None:
    """It computes what the source without positions does."""
    torch.manual_seed(0)
    source = ImgProcGPT2LMHeadModel(gpt2_config("nope")).eval()
    model = convert(source, "nope", position_kernel="forget").eval()
    assert bool((model.transformer.h[0].attn.filter.forget_gates.bias == 16).all())
    torch.testing.assert_close(model(token_ids()).logits, source(token_ids()).logits, rtol=0, atol=1e-5)


def test_forget_is_refused_by_name() -> None:
    with pytest.raises(Exception, match="'forget' sums what the tokens between .* with a causal mask"):
        vit_config("softmax", position_kernel="forget")
    from transformers import GPT2Config, GPT2LMHeadModel

    stock = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9))
    with pytest.raises(ValueError, match="got 'forget': it projects the layer's input"):
        apply_filter(stock, position_kernel="forget")
    with pytest.raises(Exception, match="learn_feedback=True needs feedback 'neutreno' or 'pid'"):
        gpt2_config("value_residual", learn_feedback=True)


# --------------------------------------------------------------------------------------------------------------------
# Mixed values
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["none", "twicing", "exclusive"])
def test_value_residual_mixes_values_inside_the_filter(boosting: str) -> None:
    """lambda = 1 in the last layer: its own values have no influence; lambda = 0 everywhere: the model without it."""
    torch.manual_seed(0)
    model = sharpen_(ImgProcGPT2LMHeadModel(gpt2_config("value_residual", boosting=boosting)).double().eval())
    plain = ImgProcGPT2LMHeadModel(gpt2_config("softmax", boosting=boosting)).double().eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    shares = [p for name, p in model.named_parameters() if name.endswith("scalar_bias.value_residual")]
    assert len(shares) == model.config.n_layer - 1
    mixed = model(token_ids()).logits
    for share in shares:
        share.zero_()
    torch.testing.assert_close(model(token_ids()).logits, plain(token_ids()).logits, rtol=0, atol=1e-11)
    assert (mixed - model(token_ids()).logits).abs().max() > 1e-2
    shares[-1].fill_(1.0)
    before = model(token_ids()).logits
    attention = model.transformer.h[-1].attn
    attention.c_attn.weight[:, -model.config.n_embd :] += 1.0
    torch.testing.assert_close(model(token_ids()).logits, before, rtol=0, atol=1e-11)
