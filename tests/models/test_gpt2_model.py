"""GPT-2 variants as whole models: the stock model where they should be it, consistent with themselves elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.models.gpt2_cases import STOCK_OPTIONS, build, build_double, encoder_inputs, padded_batch, stock_and_ours
from tests.models.variants import (
    ALL_STOCK,
    BOOSTED,
    IMPLEMENTATIONS,
    SOME_STOCK,
    VARIANTS,
    assert_same_gradients,
    averages,
    gradients,
    heads_by_hand,
    recorded_call,
    token_ids,
)

pytestmark = pytest.mark.both_back_ends


@contextmanager
def recorded(module: torch.nn.Module, what: str) -> Iterator[list[torch.Tensor]]:
    """Collect the first input or the output of a module during the block."""
    found: list[torch.Tensor] = []

    def hook(_: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(args[0] if what == "input" else output)

    handle = module.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


# --------------------------------------------------------------------------------------------------------------------
# Two back-ends
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("variant,padding")
@pytest.mark.parametrize("options", ["default", "unscaled", "inverse_layer", "cross_attention"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_eager_equals_sdpa(variant: str, padding: str, options: str) -> None:
    if options != "default" and padding == "right":
        padding = "none"
    results = []
    for implementation in IMPLEMENTATIONS:
        model = build_double(variant, implementation, **STOCK_OPTIONS[options])
        inputs = {**padded_batch(padding), **encoder_inputs(model.config)}
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        real = inputs.get("attention_mask", torch.ones(2, 9)).bool()
        # What the padding itself predicts is nobody's output: the loss leaves it out.
        labels = inputs["input_ids"].masked_fill(~(real & real.roll(1, dims=1)), -100)
        output = model(**inputs, labels=labels)
        results.append((output.logits[real], gradients(model, output.loss)))
    (eager, eager_gradients), (sdpa, sdpa_gradients) = results
    torch.testing.assert_close(eager, sdpa, rtol=1e-10, atol=1e-11)
    assert_same_gradients(eager_gradients, sdpa_gradients)
    assert all(gradient.abs().max() > 0 for gradient in sdpa_gradients.values())


@pytest.mark.both_back_ends(False)  # the dense path's mask is another one
@pytest.mark.parametrize("variant", BOOSTED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_dropout_draws_one_mask_for_all_passes(variant: str, implementation: str) -> None:
    """Twicing with dropout on A is 2A' - A'A' of the dropped A', whatever the back-end."""
    model = build_double(variant, implementation, attn_pdrop=0.3).train()
    torch.manual_seed(3)
    got = model(token_ids()).logits
    torch.manual_seed(3)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(got, model(token_ids()).logits, rtol=1e-9, atol=1e-10)
    assert (got - model.eval()(token_ids()).logits).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------------------------
# Attentions and hidden states
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_attentions_are_the_operator_that_multiplies_v(variant: str, padding: str) -> None:
    model = build_double(variant, "eager")
    inputs = padded_batch(padding)
    real = inputs.get("attention_mask", torch.ones(2, 9)).bool()
    output, seen = recorded_call(model, **inputs, use_cache=False, output_attentions=True)
    heads, names = model.config.n_head, [f"transformer.h.{layer}.attn" for layer in range(model.config.n_layer)]
    assert len(output.attentions) == model.config.n_layer
    values = [seen[f"{name}.c_attn"].output.chunk(3, dim=-1)[2] for name in names]
    values = [value.view(2, 9, heads, -1).transpose(1, 2) for value in values]
    for layer, (name, operator) in enumerate(zip(names, output.attentions, strict=True)):
        spec = model.config.layer_specs[layer]
        rounds = (spec.boosting_steps,) if spec.boosting == "gradient_boosted" else ()
        assert operator.shape == (2, *rounds, heads, 9, 9)
        maps = operator.view(2, -1, heads, 9, 9)
        operator = maps.flatten(1, 2)
        assert operator.triu(1).transpose(1, 2)[real].abs().max() == 0
        sums = operator.sum(-1).transpose(1, 2)[real]
        if averages(spec):
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
        wanted = heads_by_hand(model.config, layer, maps, values, seen, name)
        torch.testing.assert_close(wanted[real], seen[f"{name}.c_proj"].input[real], rtol=0, atol=1e-12)
        hidden_keys = ~real[:, None, None, :] & real[:, None, :, None]
        assert operator.masked_select(hidden_keys).abs().sum() == 0


@pytest.mark.both_back_ends(False)
@pytest.mark.parametrize("variant", VARIANTS)
def test_which_layers_run_the_stock_code(variant: str) -> None:
    stock = [block.attn.filter.is_stock for block in build(variant).transformer.h]
    assert any(stock) == (variant in SOME_STOCK)
    assert all(stock) == (variant in ALL_STOCK)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("variant", ["bilateral", "bilateral_gaussian", "mixed_fixed"])
def test_attentions_are_the_formula(variant: str, shared: bool) -> None:
    """The second layer's A, written out from the parameters: content and position logits, a softmax, nothing else."""
    options = {"share_position_projections": True} if shared and variant != "bilateral_gaussian" else {}
    model = build_double(variant, "eager", **options)
    block = model.transformer.h[1]
    spec, attention_filter = model.config.layer_specs[1], block.attn.filter
    with recorded(block.attn.c_attn, "output") as projected, torch.no_grad():
        got = model(token_ids(), output_attentions=True, use_cache=False).attentions[1]
    query, key = (part.view(2, 9, 4, 5).transpose(1, 2) for part in projected[0].chunk(3, dim=-1)[:2])

    def scale(which: str) -> torch.Tensor:
        learned = getattr(attention_filter.scalar_bias, f"{which}_log_bandwidth")
        bandwidth = torch.tensor(getattr(model.config, f"{which}_bandwidth")) if learned is None else learned.exp()
        return 2 / bandwidth.double().view(-1, 1, 1) ** 2

    if spec.content_kernel == "gaussian":
        logits = -torch.cdist(query, key).square() * scale("content") / 2
    else:
        logits = query @ key.transpose(-1, -2) * scale("content")
    if spec.position_kernel == "gaussian":
        index = torch.arange(9.0, dtype=torch.float64)
        logits = logits - (index[:, None] - index).square() * scale("position") / 2
    else:
        projection = model.transformer.position_projection if options else attention_filter.position_projection
        normed = projection.norm(model.transformer.wpe.weight[:9])
        left, right = (layer(normed).view(9, 4, 5).transpose(0, 1) for layer in (projection.query, projection.key))
        logits = logits + left @ right.transpose(-1, -2) * scale("position")
    hidden = torch.ones(9, 9).triu(1).bool()
    wanted = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("preset", "plain"), [("twicing", "softmax"), ("bilateral_twicing", "bilateral")])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_boosted_attentions_are_the_polynomial_of_the_plain_ones(preset: str, plain: str, steps: int) -> None:
    """I - (I - A)^k of the first layer, where both models see the same input; k = 2 is 2A - A^2."""
    boosted, smooth = build_double(preset, "eager", boosting_steps=steps), build_double(plain, "eager")
    smooth.load_state_dict(boosted.state_dict())
    matrix, operator = (
        model(token_ids(), output_attentions=True, use_cache=False).attentions[0] for model in (smooth, boosted)
    )
    identity = torch.eye(9, dtype=matrix.dtype)
    torch.testing.assert_close(operator, identity - torch.matrix_power(identity - matrix, steps), rtol=0, atol=1e-12)
    if steps == 2:
        torch.testing.assert_close(operator, 2 * matrix - matrix @ matrix, rtol=0, atol=1e-12)


def test_attentions_under_sdpa_are_what_the_stock_model_gives() -> None:
    """Nothing, with a line in the log."""
    for model in (*stock_and_ours("lm", "sdpa"), build("twicing", "sdpa"), build("mixed", "sdpa")):
        assert not model(token_ids(), output_attentions=True).attentions


@pytest.mark.parametrize("how", ["argument", "config"])
def test_attentions_and_hidden_states_can_be_asked_for_in_two_ways(how: str) -> None:
    model = build("bilateral_twicing", "eager")
    flags = {"output_attentions": True, "output_hidden_states": True}
    if how == "config":
        for name, value in flags.items():
            setattr(model.config, name, value)
    output = model(token_ids(), **(flags if how == "argument" else {}))
    assert [weights.shape for weights in output.attentions] == [(2, 4, 9, 9)] * 3
    assert [states.shape for states in output.hidden_states] == [(2, 9, 20)] * 4


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_are_the_inputs_and_the_outputs_of_blocks(variant: str) -> None:
    model = build(variant)
    with recorded(model.transformer.h[1], "input") as second:
        output = model.transformer(token_ids(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[1], second[0])
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_return_dict_false_gives_the_same_in_a_tuple(variant: str) -> None:
    model = build(variant, "eager")
    inputs = {"input_ids": token_ids(), "labels": token_ids(), "output_hidden_states": True, "output_attentions": True}
    wanted = model(**inputs)
    loss, logits, cache, hidden_states, attentions, *_ = model(**inputs, return_dict=False)
    assert torch.equal(loss, wanted.loss)
    assert torch.equal(logits, wanted.logits)
    assert cache.get_seq_length() == 9
    for got, states in ((hidden_states, wanted.hidden_states), (attentions, wanted.attentions)):
        assert all(torch.equal(left, right) for left, right in zip(got, states, strict=True))


@pytest.mark.parametrize("variant", ["twicing", "bilateral_gaussian"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_heads_of_one_number(variant: str, implementation: str) -> None:
    model = build(variant, implementation, n_embd=2, n_head=2)
    assert model(token_ids()).logits.isfinite().all()
