"""What ``output_attentions=True`` returns: the operator on V or the filter A, in the graph, and with a cache."""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTModel
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config, images, token_ids, vit_config

TIGHT = {"rtol": 0, "atol": 1e-12}
BOOSTED = ("twicing", "sos", "learned_twicing", "bilateral_twicing", "three_steps", "mixed_boosters")


def gpt2(variant: str, attention_output: str) -> ImgProcGPT2LMHeadModel:
    model = sharpen_(ImgProcGPT2LMHeadModel(gpt2_config(variant, attn_implementation="eager"))).eval().double()
    model.config.attention_output = attention_output
    return model


@torch.no_grad()
@pytest.mark.parametrize("variant", BOOSTED)
def test_the_filter_has_its_rows_at_every_step_of_cached_generation(variant: str) -> None:
    model = gpt2(variant, "filter")
    ids = token_ids()
    whole = model(ids, output_attentions=True, use_cache=False).attentions
    cache = model(ids[:, :5], use_cache=True).past_key_values
    for step in range(5, 9):
        got = model(ids[:, step : step + 1], past_key_values=cache, output_attentions=True).attentions
        for layer, full in zip(got, whole, strict=True):
            torch.testing.assert_close(layer, full[..., step : step + 1, : step + 1], **TIGHT)
            torch.testing.assert_close(layer.sum(-1), torch.ones_like(layer.sum(-1)), **TIGHT)


@torch.no_grad()
def test_generate_returns_the_filter() -> None:
    model = gpt2("twicing", "filter")
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "pad_token_id": 0}
    result = model.generate(token_ids(), output_attentions=True, **options)
    shapes = [tuple(layers[0].shape[-2:]) for layers in result.attentions]
    assert shapes == [(9, 9), (1, 10), (1, 11)]


@torch.no_grad()
def test_the_operator_is_a_polynomial_of_the_filter() -> None:
    ids = token_ids()
    matrices = gpt2("twicing", "filter")(ids, output_attentions=True, use_cache=False).attentions
    operators = gpt2("twicing", "operator")(ids, output_attentions=True, use_cache=False).attentions
    for matrix, operator in zip(matrices, operators, strict=True):
        torch.testing.assert_close(operator, 2 * matrix - matrix @ matrix, **TIGHT)


def test_a_cache_has_no_rows_for_the_operator_and_the_refusal_names_the_choice() -> None:
    model = gpt2("twicing", "operator")
    cache = model(token_ids()[:, :5], use_cache=True).past_key_values
    with pytest.raises(ValueError, match='use_cache=False, or config.attention_output = "filter"'):
        model(token_ids()[:, 5:], past_key_values=cache, output_attentions=True)


@pytest.mark.parametrize("attention_output", ["operator", "filter"])
@pytest.mark.parametrize("variant", ["twicing", "sos", "bilateral_gaussian", "learned_twicing"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_attentions_are_parts_of_the_graph(variant: str, attention_output: str, dtype: torch.dtype) -> None:
    """Saliency methods take the gradient of what is returned: here against a nudge of it, through a hook's eyes."""
    model = sharpen_(ImgProcViTModel(vit_config(variant, attn_implementation="eager"))).to(dtype)
    model.config.attention_output = attention_output
    result = model(images().to(dtype), output_attentions=True)
    for attentions in result.attentions:
        attentions.retain_grad()
    result.last_hidden_state.float().square().sum().backward()
    for attentions in result.attentions:
        assert attentions.grad is not None
        assert attentions.grad.abs().sum() > 0


@pytest.mark.parametrize("variant", ["twicing", "sos", "learned_twicing", "bilateral_twicing"])
def test_the_operator_is_part_of_the_graph_where_a_cache_is_filled(variant: str) -> None:
    """A decoder fills a cache unless it is told not to; its operators have the same gradients with and without."""
    model, gradients = gpt2(variant, "operator"), []
    for use_cache in (True, False):
        result = model(token_ids(), output_attentions=True, use_cache=use_cache)
        loss = result.logits.square().sum()
        gradients.append(torch.autograd.grad(loss, result.attentions))
        if use_cache:
            cache = result.past_key_values
    for cached, uncached in zip(*gradients, strict=True):
        assert uncached.abs().sum() > 0
        torch.testing.assert_close(cached, uncached, rtol=0, atol=1e-10)
    more = torch.cat((token_ids(), token_ids()[:, :2]), 1)
    with torch.no_grad():
        step = model(more[:, -2:], past_key_values=cache).logits
        torch.testing.assert_close(step, model(more, use_cache=False).logits[:, -2:], rtol=0, atol=1e-10)


def test_the_gradient_of_an_operator_is_that_of_the_product_with_v() -> None:
    """d loss / d operator = (d loss / d output) V^T: it explains how much each value's weight matters."""
    torch.manual_seed(0)
    model = sharpen_(ImgProcViTModel(vit_config("twicing", attn_implementation="eager"))).double()
    layer = model.layers[-1].attention
    seen = {}
    layer.v_proj.register_forward_hook(lambda module, inputs, output: seen.update(value=output))
    layer.o_proj.register_forward_hook(lambda module, inputs, output: seen.update(heads=inputs[0]))
    result = model(images().double(), output_attentions=True)
    seen["heads"].retain_grad()
    operator = result.attentions[-1]
    operator.retain_grad()
    result.last_hidden_state.square().sum().backward()

    def by_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (4, 5)).transpose(1, 2)

    expected = by_head(seen["heads"].grad) @ by_head(seen["value"]).mT
    torch.testing.assert_close(operator.grad, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", [gpt2_config, vit_config])
def test_it_is_chosen_at_run_time_and_never_saved(config: object) -> None:
    made = config("twicing")  # type: ignore[operator]
    assert made.attention_output == "operator"
    made.attention_output = "filter"
    assert "attention_output" not in made.to_json_string()
    with pytest.raises(ValueError, match="attention_output must be one of operator, filter, got 'rows'"):
        made.attention_output = "rows"
    with pytest.raises(ValueError, match="did you mean attention_output"):
        config("twicing", attention_outputs="filter")  # type: ignore[operator]
