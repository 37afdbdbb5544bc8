"""Differential attention: the formula, back-ends, what a cache keeps, where it starts, who refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertForMaskedLM,
    ImgProcGPT2LMHeadModel,
    ImgProcViTForImageClassification,
    convert,
)
from hf_imgproc_attn.models import backend_blocked_plan
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_blocked_difference import DifferenceFilter
from hf_imgproc_attn.models.backend_call import Difference, FilterCall
from hf_imgproc_attn.models.backend_table import choose_backend, run_filter
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from tests.models.helpers import filter_call, logits_in_steps, make_filter, sharpen_
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, images, pad, token_ids, vit_config


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


def difference_call(leaves: list[torch.Tensor], **options: Any) -> FilterCall:
    """A call of query, key, value, query and key of the second map, and lambda."""
    call = filter_call(*leaves[:3], **options)
    return call._replace(difference=Difference(leaves[3], leaves[4], leaves[5]))


@pytest.mark.grid(**{"heads,key_heads": [(2, 2), (4, 2)]}, mask=["none", "causal", "left", "past"], dropout=[0.0, 0.4])
def test_one_pass_over_blocks_is_the_difference(heads: int, key_heads: int, mask: str, dropout: float) -> None:
    """Output and gradients in blocks of three queries beside the dense form, with sinks and a bias for both maps.

    What keys and values of padding hold is NaN and reaches no gradient.
    """
    options: dict[str, Any] = {"is_causal": mask in ("causal", "past"), "dropout": dropout}
    if mask == "left":
        options["attention_mask"] = torch.arange(7).view(1, 1, 1, 7) >= torch.tensor([0, 2]).view(2, 1, 1, 1)
    shapes = ((heads, 7), (key_heads, 7), (key_heads, 7), (heads, 7), (heads, 7))
    leaves = [random(2, *shape, 3, seed=seed) for seed, shape in enumerate(shapes)]
    leaves += [random(heads, 1, 1, seed=6), random(1, heads, 7, 7, seed=7), random(heads, seed=8)]
    if mask == "left":
        for leaf in (leaves[1], leaves[2], leaves[4]):
            leaf[1, :, :2] = float("nan")
    if mask == "past":
        for index in (0, 3):
            leaves[index] = leaves[index][:, :, 3:]
        leaves[6] = leaves[6][:, :, 3:]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def call() -> FilterCall:
        given = difference_call(leaves, bias=leaves[6], **options)
        return given._replace(sinks=leaves[7]) if dropout else given

    torch.manual_seed(3)
    output = run_blocked(call(), block_rows=3, group_pairs=3)
    above = random(*output.shape, seed=9)
    found = torch.autograd.grad(output, leaves, above, retain_graph=True, allow_unused=True)
    # With create_graph the gradients come from the dense form, of the same dropout masks.
    dense = torch.autograd.grad(output, leaves, above, create_graph=True, allow_unused=True)
    for mine, exact in zip(found, dense, strict=True):
        assert mine is exact is None or bool(mine.isfinite().all())
        torch.testing.assert_close(mine, exact, **TIGHT)
    if not dropout:
        reference = run_filter(call(), "reference")
        torch.testing.assert_close(output, reference, **TIGHT)
        for mine, exact in zip(found, torch.autograd.grad(reference, leaves, above, allow_unused=True), strict=True):
            torch.testing.assert_close(mine, exact, **TIGHT)


def test_second_derivatives_and_other_transforms() -> None:
    leaves = [random(1, 2, 4, 3, seed=seed).requires_grad_() for seed in range(5)]
    leaves.append(random(2, 1, 1, seed=6).requires_grad_())
    assert torch.autograd.gradgradcheck(lambda *given: run_blocked(difference_call(list(given))), leaves)
    call = difference_call(leaves)
    found = torch.func.grad(lambda value: run_blocked(call._replace(value=value)).square().sum())(call.value)
    (exact,) = torch.autograd.grad(run_filter(call, "reference").square().sum(), call.value)
    torch.testing.assert_close(found, exact, **TIGHT)


@torch.no_grad()
def test_where_one_pass_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many scores on a CPU, with weights of softmax; elsewhere the two maps are two calls."""
    leaves = [random(1, 2, 200, 3, seed=seed) for seed in range(5)] + [random(2, 1, 1, seed=6)]
    call = difference_call(leaves)
    assert choose_backend(call) == "blocked"
    assert choose_backend(call._replace(difference=None)) == "sdpa"
    exact, seen = run_filter(call, "reference"), []
    original = DifferenceFilter.apply
    monkeypatch.setattr(DifferenceFilter, "apply", lambda *given: seen.append(given) or original(*given))
    for normalisation in ("softmax", "sigmoid"):
        given = call._replace(normalisation=Normalisation(normalisation))
        exact = run_filter(given, "reference")
        torch.testing.assert_close(run_filter(given, "auto"), exact, **TIGHT)
        torch.testing.assert_close(run_filter(given, "blocked"), exact, **TIGHT)
    assert len(seen) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    given = [random(1, 2, 40, 8, seed=seed).to(dtype).requires_grad_() for seed in range(5)]
    given.append(random(2, 1, 1, seed=6).float().requires_grad_())
    exact = [leaf.detach().double().requires_grad_() for leaf in given]
    output, reference = (
        run_filter(difference_call(leaves, is_causal=True), backend)
        for leaves, backend in ((given, "blocked"), (exact, "reference"))
    )
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), reference, rtol=rounding, atol=rounding * 1e-2)
    above = random(*output.shape, seed=9).to(dtype)
    mine = torch.autograd.grad(output, given, above)
    for found, gradient in zip(mine, torch.autograd.grad(reference, exact, above.double()), strict=True):
        torch.testing.assert_close(found.double(), gradient, rtol=rounding, atol=rounding * 1e-2)


@pytest.mark.parametrize("backbone", ["gpt2", "bert", "vit"])
def test_whole_models_in_blocks_are_the_reference(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass over blocks of three queries: outputs, gradients and, of texts, steps through a cache, with padding."""
    monkeypatch.setattr(backend_blocked_plan, "BLOCK_ROWS", 3)
    monkeypatch.setattr(backend_blocked_plan, "WHOLE_SCORES", 0)
    sizes: dict[str, Any] = {"boosting": "differential", "hidden_size": 12, "num_attention_heads": 3}
    sizes |= {"num_hidden_layers": 2, "vocab_size": 61, "pad_token_id": 0} if backbone != "vit" else {}
    given: dict[str, torch.Tensor] = pad(token_ids(), row=1, length=6, side="left")
    if backbone == "gpt2":
        model: Any = ImgProcGPT2LMHeadModel(gpt2_config(boosting="differential", n_embd=15, n_head=3))
    elif backbone == "bert":
        model = ImgProcBertForMaskedLM(ImgProcBertConfig(**sizes, intermediate_size=16))
    else:
        model, given = ImgProcViTForImageClassification(vit_config(**sizes)), {"pixel_values": images().double()}
    sharpen_(model).double().eval()
    for name, share in model.named_parameters():
        if name.endswith("scalar_bias.differential"):
            share.data.add_(0.5)
    shown = given["attention_mask"].bool() if "attention_mask" in given else torch.ones(2, dtype=torch.bool)
    results = []
    for implementation, backend in (("eager", "auto"), ("sdpa", "blocked")):
        model.config._attn_implementation, model.config.filter_backend = implementation, backend
        logits = model(**given).logits[shown]
        used = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found = torch.autograd.grad(logits.square().sum(), used, allow_unused=True)
        results.append([logits, *(grad for grad in found if grad is not None)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)
    if backbone == "gpt2":
        with torch.no_grad():
            steps = logits_in_steps(model, given, (0, 4, 5, 9))
        torch.testing.assert_close(steps[shown], results[0][0], rtol=1e-9, atol=1e-9)


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
