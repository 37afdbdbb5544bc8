"""Every back-end of a layer gives what the dense reference gives: outputs, all gradients, cached decoding, dropout."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.spec_axes import FILTER_BACKENDS
from tests.models.layer_cases import (
    BOOSTERS,
    LENGTH,
    MASKS,
    PAIRS,
    POSITIONS,
    TIGHT,
    Inputs,
    assert_same,
    build,
    masks,
    run,
    tensors,
)
from tests.models.variants import gpt2_config, images, token_ids, vit_config

FAST = ("sdpa", "blocked")


def choose(layer: AttentionFilter, backend: str) -> AttentionFilter:
    layer._config.filter_backend = backend
    return layer


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("boosting", "steps"), BOOSTERS)
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_boosters_and_masks(backend: str, boosting: str, steps: int, mask: str) -> None:
    layer, inputs = build("gaussian", "gaussian", boosting, steps), tensors("gaussian")
    expected = run(layer, inputs, "eager", **masks()[mask])
    assert_same(run(choose(layer, backend), inputs, "sdpa", **masks()[mask]), expected)


@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 2), ("learned", 2)])
@pytest.mark.parametrize(("content", "position"), PAIRS)
@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_kernels(backend: str, content: str, position: str, boosting: str, steps: int) -> None:
    causal = not position.endswith("patches")
    classes = 0 if causal else 2
    layer = build(content, position, boosting, steps, num_class_tokens=classes)
    inputs, options = tensors(position, classes=classes), masks()["left" if causal else "keys"]
    expected = run(layer, inputs, "eager", **options)
    assert_same(run(choose(layer, backend), inputs, "sdpa", **options), expected)


@pytest.mark.parametrize("position", POSITIONS)
def test_flex_attention_forward(position: str) -> None:
    layer, inputs = build("gaussian", position, "twicing", 2), tensors(position)
    options = masks()["left" if not position.endswith("patches") else "keys"]
    with torch.no_grad():
        expected, _ = layer(**inputs, implementation="eager", **options)
        got, _ = choose(layer, "flex")(**inputs, implementation="sdpa", **options)
    torch.testing.assert_close(got, expected, **TIGHT)


def pieces_of(inputs: Inputs, start: int, stop: int) -> Inputs:
    """The tokens from ``start`` to ``stop``: the length is the last axis but one of everything."""
    return {name: value[..., start:stop, :] for name, value in inputs.items()}


@pytest.mark.grid(
    sizes=[(LENGTH,), (4, 1, LENGTH - 5), (3, *[1] * (LENGTH - 3))],
    position=["none", "untied", "gaussian", "alibi"],
    backend=[*FAST, "reference", "auto"],
    **{"boosting,steps": BOOSTERS},
)
def test_cached_pieces(backend: str, position: str, boosting: str, steps: int, sizes: tuple[int, ...]) -> None:
    """A prompt read at once, in pieces and token by token: the streams that one back-end keeps serve the next one."""
    layer, inputs = build("elliptical", position, boosting, steps), tensors(position)
    expected, _ = layer(**inputs, implementation="eager", is_causal=True)
    choose(layer, backend)
    cache, outputs, start = DynamicCache(config=gpt2_config("twicing", n_layer=2)), [], 0
    for size in sizes:
        piece = pieces_of(inputs, start, start + size)
        outputs.append(layer(**piece, implementation="sdpa", is_causal=True, past_key_values=cache)[0])
        start += size
    torch.testing.assert_close(torch.cat(outputs, dim=-2), expected, **TIGHT)


@pytest.mark.parametrize("order", [("blocked", "sdpa"), ("sdpa", "blocked"), ("reference", "blocked")])
def test_streams_of_one_backend_are_those_of_another(order: tuple[str, str]) -> None:
    layer, inputs = build("gaussian", "none", "twicing", 3), tensors("none")
    caches = []
    for backend in order:
        caches.append(DynamicCache(config=gpt2_config("twicing")))
        choose(layer, backend)(**inputs, implementation="sdpa", is_causal=True, past_key_values=caches[-1])
    first, second = (cache.layers[0].streams for cache in caches)
    assert first.keys() == second.keys() == {"boost.1", "boost.2"}
    for name, rows in first.items():
        torch.testing.assert_close(second[name], rows, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", ["none", "untied", "gaussian"])
def test_half_precision_is_as_good_as_two_fused_calls(position: str, dtype: torch.dtype) -> None:
    layer, inputs = build("dot_product", position, "twicing", 2), tensors(position, length=67)
    exact, _ = layer(**inputs, implementation="eager", is_causal=True)
    half = {name: value if name == "coordinates" else value.to(dtype) for name, value in inputs.items()}
    layer = layer.to(dtype)
    errors = {}
    for backend in FAST:
        output, _ = choose(layer, backend)(**half, implementation="sdpa", is_causal=True)
        assert output.dtype == dtype
        errors[backend] = (output.double() - exact).abs().max()
    assert errors["blocked"] <= 1.2 * errors["sdpa"]


def test_what_a_backend_cannot_do_is_refused_in_words() -> None:
    layer, inputs = build("dot_product", "none", "twicing", 2), tensors("none")
    options: dict[str, Any] = {**inputs, "implementation": "sdpa"}
    with pytest.raises(ValueError, match="filter_backend='sdpa' cannot serve this call: it draws a new dropout mask"):
        choose(layer, "sdpa")(**options, dropout=0.1)
    with pytest.raises(ValueError, match="filter_backend='flex' cannot serve this call: it drops nothing out"):
        choose(layer, "flex")(**options, dropout=0.1)
    with pytest.raises(ValueError, match="filter_backend='triton' .* a CUDA device"):
        choose(layer, "triton")(**options)
    cache = DynamicCache(config=gpt2_config("twicing"))
    with pytest.raises(ValueError, match="filter_backend='flex' cannot .* does not hand out the streams"):
        choose(layer, "flex")(**options, is_causal=True, past_key_values=cache)


def test_kernels_are_not_given_logits_of_all_pairs() -> None:
    """A kernel that would take the tensors as they are and know nothing of a bias refuses it, on any device."""
    layer, inputs = build("dot_product", "none", "twicing", 2), tensors("none")
    bias = torch.eye(inputs["query"].shape[2]).view(1, 1, *(inputs["query"].shape[2],) * 2)
    with pytest.raises(ValueError, match="filter_backend='triton' cannot serve this call: it takes masks of padded"):
        choose(layer, "triton")(**inputs, implementation="sdpa", attention_mask=bias)
    choose(layer, "auto")(**inputs, implementation="sdpa", attention_mask=bias)


def test_a_backend_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that came with a checkpoint has no kernels beside it."""
    monkeypatch.delitem(BACKENDS, "triton", raising=False)
    layer = choose(build("dot_product", "none", "twicing", 2), "triton")
    with pytest.raises(ValueError, match="filter_backend='triton' is not available: the kernels need a CUDA device"):
        layer(**tensors("none"), implementation="sdpa")


def test_the_package_fills_the_table() -> None:
    """Triton comes for Linux only."""
    expected = set(FILTER_BACKENDS) if find_spec("triton") else set(FILTER_BACKENDS) - {"triton"}
    assert {*BACKENDS, "auto"} == expected


@pytest.mark.parametrize("backend", ["auto", *FAST])
@pytest.mark.parametrize("variant", ["twicing", "bilateral_twicing", "sos", "learned_twicing", "mixed_boosters"])
@pytest.mark.parametrize("backbone", ["gpt2", "vit"])
def test_whole_models(backbone: str, variant: str, backend: str) -> None:
    """The choice is made at run time, on the model that is there, and changes nothing but rounding."""
    from hf_imgproc_attn import ImgProcGPT2LMHeadModel, ImgProcViTForImageClassification

    torch.manual_seed(0)
    if backbone == "gpt2":
        model: Any = ImgProcGPT2LMHeadModel(gpt2_config(variant, attn_implementation="sdpa"))
        inputs = token_ids()
    else:
        model = ImgProcViTForImageClassification(vit_config(variant, attn_implementation="sdpa"))
        inputs = images().double()
    model = model.double().eval()
    results = []
    for name in ("reference", backend):
        model.config.filter_backend = name
        results.append(model(inputs).logits)
    torch.testing.assert_close(results[1], results[0], **TIGHT)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
@pytest.mark.parametrize("kind", ["torch.func", "dual tensors"])
@pytest.mark.parametrize(("backbone", "variant"), [("gpt2", "twicing"), ("gpt2", "bilateral"), ("vit", "twicing")])
def test_auto_serves_forward_mode(backbone: str, variant: str, kind: str) -> None:
    """Fused calls, which it would take for so few scores, have no forward mode."""
    from hf_imgproc_attn import ImgProcGPT2Model, ImgProcViTModel

    torch.manual_seed(0)
    model: Any
    if backbone == "gpt2":
        model = ImgProcGPT2Model(gpt2_config(variant, attn_implementation="sdpa"))
        name, given = "inputs_embeds", model.wte(token_ids()).detach().double()
    else:
        model = ImgProcViTModel(vit_config(variant, attn_implementation="sdpa"))
        name, given = "pixel_values", images().double()
    model = model.double().eval().requires_grad_(False)
    given.requires_grad_()
    direction = torch.randn(given.shape, generator=torch.Generator().manual_seed(1), dtype=given.dtype)

    def call(x: torch.Tensor) -> torch.Tensor:
        return model(**{name: x}).last_hidden_state

    if kind == "torch.func":
        change = torch.func.jvp(call, (given.detach(),), (direction,))[1]
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = call(torch.autograd.forward_ad.make_dual(given.detach(), direction))
            change = torch.autograd.forward_ad.unpack_dual(dual).tangent
    (grad,) = torch.autograd.grad(call(given).square().sum() / 2, given)
    torch.testing.assert_close((change * call(given)).sum(), (grad * direction).sum(), **TIGHT)
