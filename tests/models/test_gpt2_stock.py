"""GPT-2: `softmax` is the stock model, and our filters honour its options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
)

from tests.models.gpt2_cases import HEADS, STOCK_OPTIONS, encoder_inputs, padded_batch, stock_and_ours
from tests.models.helpers import GPT2
from tests.models.variants import (
    IMPLEMENTATIONS,
    assert_same_gradients,
    gpt2_config,
    gradients,
    token_ids,
)

pytestmark = pytest.mark.both_back_ends

# Filters that are stock attention written in another way: they run our code and must give the stock model's numbers.
STOCK_IN_DISGUISE: dict[str, dict[str, Any]] = {
    "one_step": {"boosting": "twicing", "boosting_steps": 1},
    "learned_bandwidth": {"learn_bandwidths": True},
    "one_step_learned": {"boosting": "twicing", "boosting_steps": 1, "learn_bandwidths": True},
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("options", STOCK_OPTIONS)
def test_softmax_is_the_stock_model_to_the_bit(options: str, padding: str, implementation: str) -> None:
    stock, ours = stock_and_ours("lm", implementation, **STOCK_OPTIONS[options])
    inputs = {**padded_batch(padding), **encoder_inputs(stock.config)}
    wanted, got = stock(**inputs, labels=inputs["input_ids"]), ours(**inputs, labels=inputs["input_ids"])
    assert torch.equal(got.logits, wanted.logits)
    assert torch.equal(got.loss, wanted.loss)
    assert_same_gradients(gradients(ours, got.loss), gradients(stock, wanted.loss), rtol=0, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_softmax_equals_every_stock_head(head: str, implementation: str) -> None:
    stock, ours = stock_and_ours(head, implementation)
    labels = {
        "model": {},
        "lm": {"labels": token_ids()},
        "sequence": {"labels": torch.tensor([4, 2])},
        "token": {"labels": token_ids() % 5},
    }[head]
    inputs = {**padded_batch("right"), **labels, "output_hidden_states": True}
    inputs["output_attentions"] = implementation == "eager"
    wanted, got = stock(**inputs), ours(**inputs)
    assert got.keys() == wanted.keys()
    for name in ("loss", "logits", "last_hidden_state"):
        if name in wanted:
            assert torch.equal(got[name], wanted[name]), name
    for name in ("hidden_states", "attentions"):
        if name in wanted:
            assert len(got[name]) == len(wanted[name])
            assert all(torch.equal(left, right) for left, right in zip(got[name], wanted[name], strict=True)), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("head", ["lm", "token"])
def test_softmax_draws_dropout_like_the_stock_model(head: str, implementation: str) -> None:
    stock, ours = stock_and_ours(head, implementation, attn_pdrop=0.2, embd_pdrop=0.2, resid_pdrop=0.2)
    outputs = []
    for model in (stock, ours):
        torch.manual_seed(5)
        outputs.append(model.train()(token_ids()).logits)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["token_type_ids", "inputs_embeds", "mask_4d", "packed", "logits_to_keep"])
def test_softmax_equals_stock_for_other_inputs(name: str, implementation: str) -> None:
    stock, ours = stock_and_ours("lm", implementation)
    causal = torch.ones(9, 9).tril().bool()
    causal[5:, 1] = False
    inputs: dict[str, Any] = {
        "token_type_ids": {"input_ids": token_ids(), "token_type_ids": token_ids(seed=7)},
        "inputs_embeds": {"inputs_embeds": torch.randn(2, 9, stock.config.n_embd)},
        "mask_4d": {
            "input_ids": token_ids(),
            "attention_mask": torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min),
        },
        "packed": {"input_ids": token_ids(), "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])},
        "logits_to_keep": {"input_ids": token_ids(), "logits_to_keep": 3},
    }[name]
    assert torch.equal(ours(**inputs).logits, stock(**inputs).logits)


def test_names_and_shapes_of_the_softmax_preset_are_the_stock_ones() -> None:
    for stock_class, our_class, options in HEADS.values():
        stock, ours = stock_class(GPT2Config(**GPT2, **options)), our_class(gpt2_config(**options))
        shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (stock, ours)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("disguise", STOCK_IN_DISGUISE)
@pytest.mark.parametrize("options", STOCK_OPTIONS)
def test_stock_options_are_honoured_by_our_filters(options: str, disguise: str, implementation: str) -> None:
    stock, ours = stock_and_ours("lm", implementation, **STOCK_OPTIONS[options], **STOCK_IN_DISGUISE[disguise])
    assert not any(block.attn.filter.is_stock for block in ours.transformer.h)
    inputs = {**padded_batch("right"), **encoder_inputs(stock.config)}
    wanted, got = stock(**inputs), ours(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got.logits[real], wanted.logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("disguise", STOCK_IN_DISGUISE)
def test_upcasting_is_honoured_in_half_precision(disguise: str) -> None:
    """The logits are formed in float32: as near to the truth as the stock model that upcasts."""
    stock, ours = stock_and_ours("lm", "eager", reorder_and_upcast_attn=True, **STOCK_IN_DISGUISE[disguise])
    ids = token_ids(batch=8, length=20)
    rounded = [model.bfloat16()(ids).logits.float() for model in (stock, ours)]
    truth = stock.float()(ids).logits
    errors = [(logits - truth).square().mean() for logits in rounded]
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("value", [1.7, [1.3, 2.0, 2.5, 3.1]])
def test_content_bandwidth_is_a_temperature(value: float | list[float]) -> None:
    """2/h^2 replaces the stock factor on q.k, one per head: the stock model with rescaled queries."""
    stock, ours = stock_and_ours("lm", "sdpa", content_bandwidth=value)
    head_dim = stock.config.n_embd // stock.config.n_head
    bandwidths = torch.tensor(value if isinstance(value, list) else [value] * stock.config.n_head)
    factor = (2 / bandwidths**2 * head_dim**0.5).repeat_interleave(head_dim)
    with torch.no_grad():
        for block in stock.transformer.h:
            block.attn.c_attn.weight[:, : stock.config.n_embd] *= factor
            block.attn.c_attn.bias[: stock.config.n_embd] *= factor
    torch.testing.assert_close(ours(token_ids()).logits, stock(token_ids()).logits, rtol=1e-4, atol=1e-4)
