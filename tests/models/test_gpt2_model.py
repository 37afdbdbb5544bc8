"""GPT-2 variants as whole models: the stock model where they should be it, consistent with themselves elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2ForTokenClassification,
    ImgProcGPT2LMHeadModel,
    ImgProcGPT2Model,
)
from tests.models.helpers import GPT2, sharpen_
from tests.models.variants import (
    ALL_STOCK,
    BOOSTED,
    ELLIPTICAL,
    IMPLEMENTATIONS,
    SOME_STOCK,
    VARIANTS,
    VOCABULARY,
    assert_same_gradients,
    gpt2_config,
    gradients,
    heads_by_hand,
    pad,
    recorded_call,
    token_ids,
)

STOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "unscaled": {"scale_attn_weights": False},
    "inverse_layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True},
    "cross_attention": {"add_cross_attention": True},
    "all": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
        "reorder_and_upcast_attn": True,
        "add_cross_attention": True,
    },
}

HEADS = {
    "model": (GPT2Model, ImgProcGPT2Model, {}),
    "lm": (GPT2LMHeadModel, ImgProcGPT2LMHeadModel, {}),
    "sequence": (GPT2ForSequenceClassification, ImgProcGPT2ForSequenceClassification, {"num_labels": 5}),
    "token": (GPT2ForTokenClassification, ImgProcGPT2ForTokenClassification, {"num_labels": 5}),
}

# Filters that are stock attention written in another way: they run our code and must give the stock model's numbers.
STOCK_IN_DISGUISE: dict[str, dict[str, Any]] = {
    "one_step": {"boosting": "twicing", "boosting_steps": 1},
    "learned_bandwidth": {"learn_bandwidths": True},
    "one_step_learned": {"boosting": "twicing", "boosting_steps": 1, "learn_bandwidths": True},
}


def build(variant: str = "softmax", implementation: str = "eager", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """A sharpened language model in evaluation mode."""
    config = gpt2_config(variant, attn_implementation=implementation, **overrides)
    return sharpen_(ImgProcGPT2LMHeadModel(config)).eval()


def build_double(variant: str, implementation: str = "sdpa", **overrides: Any) -> ImgProcGPT2LMHeadModel:
    """The same in float64."""
    return build(variant, implementation, **overrides).double()


def padded_batch(kind: str) -> dict[str, torch.Tensor]:
    """Two rows of nine tokens; the second has six where it is padded."""
    return {"input_ids": token_ids()} if kind == "none" else pad(token_ids(), row=1, length=6, side=kind)


def encoder_inputs(config: GPT2Config) -> dict[str, torch.Tensor]:
    """Four encoder states a row, one of them masked, where the model attends to an encoder."""
    if not config.add_cross_attention:
        return {}
    states = torch.randn(2, 4, config.n_embd, generator=torch.Generator().manual_seed(8))
    return {"encoder_hidden_states": states, "encoder_attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def stock_and_ours(head: str = "lm", implementation: str = "eager", **overrides: Any) -> tuple[Any, Any]:
    """The stock model and ours with the same weights; loading fails if a name or shape differs."""
    stock_class, our_class, options = HEADS[head]
    ours_only = {name: overrides.pop(name) for name in list(overrides) if not hasattr(GPT2Config(), name)}
    config = GPT2Config(**{**GPT2, "pad_token_id": 0, **options, **overrides}, attn_implementation=implementation)
    stock = sharpen_(stock_class(config))
    our_config = gpt2_config(attn_implementation=implementation, pad_token_id=0, **options, **overrides, **ours_only)
    ours = our_class(our_config)
    ours.load_state_dict(stock.state_dict(), strict=not ours_only)
    return stock.eval(), ours.eval()


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
# The stock model
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Two back-ends
# --------------------------------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-12)
        wanted = heads_by_hand(model.config, layer, maps, values, seen, name)
        torch.testing.assert_close(wanted[real], seen[f"{name}.c_proj"].input[real], rtol=0, atol=1e-12)
        hidden_keys = ~real[:, None, None, :] & real[:, None, :, None]
        assert operator.masked_select(hidden_keys).abs().sum() == 0


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


# --------------------------------------------------------------------------------------------------------------------
# Causality, padding, positions
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_changes_nothing_before_it(variant: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    ids = token_ids(batch=1, length=9)
    before = model(ids).logits
    for position in (0, 4, 8):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 7) % VOCABULARY
        difference = (model(changed).logits - before).abs().amax(-1)[0]
        assert difference[:position].sum() < 1e-12
        assert difference[position:].min() > 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_changes_nothing_for_real_tokens(variant: str, side: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    inputs = pad(token_ids(), row=1, length=6, side=side)
    alone = model(token_ids()[1:, :6]).logits[0]
    torch.testing.assert_close(
        model(**inputs).logits[1][inputs["attention_mask"][1].bool()], alone, rtol=0, atol=1e-10
    )
    boolean = model(**{**inputs, "attention_mask": inputs["attention_mask"].bool()}).logits
    torch.testing.assert_close(boolean, model(**inputs).logits)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["boolean", "additive", "infinite", "one_row", "per_head"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_four_dimensional_masks_hide_what_the_flat_mask_hides(variant: str, kind: str, implementation: str) -> None:
    model = build_double(variant, implementation)
    inputs = pad(token_ids(), row=1, length=6, side="right")
    if kind == "one_row":
        inputs = {name: value[1:] if name != "input_ids" else value for name, value in inputs.items()}
        inputs["input_ids"] = inputs["input_ids"][1:].expand(2, -1)
    allowed = torch.ones(9, 9).tril().bool() & inputs["attention_mask"].bool()[:, None, None, :]
    lowest = float("-inf") if kind == "infinite" else torch.finfo(torch.float64).min
    additive = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, lowest)
    masks = {
        "boolean": allowed,
        "additive": additive,
        "infinite": additive,
        "one_row": allowed,
        "per_head": allowed.expand(-1, model.config.n_head, -1, -1),
    }
    got = model(**{**inputs, "attention_mask": masks[kind]}).logits
    flat = {**inputs, "attention_mask": inputs["attention_mask"].expand(2, -1)}
    torch.testing.assert_close(got[:, :6], model(**flat).logits[:, :6], rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ELLIPTICAL])
def test_additive_mask_values_are_added_to_the_logits(variant: str, implementation: str) -> None:
    """Moderate values are a bias on the logits, as in the stock model: log 3 counts a key three times.

    Not so in the elliptical metric, where three copies of a token are three tokens.
    """
    plain = dict.fromkeys(("boosting_steps", "boosted_layers", "gradient_boosting_source"))
    model = build_double(variant, implementation, boosting="none", **plain)
    ids = token_ids(batch=1, length=6)
    tripled = torch.cat((ids[:, :1], ids[:, :1], ids), dim=1)
    allowed, all_allowed = torch.ones(6, 6).tril().bool(), torch.ones(8, 8).tril().bool()
    all_allowed[:3, :3] = True
    mask, all_mask = (
        torch.zeros(1, 1, *seen.shape).double().masked_fill(~seen, torch.finfo(torch.float64).min)
        for seen in (allowed, all_allowed)
    )
    mask[..., 0] += torch.log(torch.tensor(3.0, dtype=torch.float64))
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4, 5]])
    wanted = model(tripled, attention_mask=all_mask, position_ids=positions).logits[:, 2:]
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_sequences_do_not_see_each_other(variant: str, implementation: str) -> None:
    """position_ids that start again mean several texts in one row, as data collators without padding make them."""
    model = build_double(variant, implementation)
    ids = token_ids(batch=1, length=9)
    packed = model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False).logits
    apart = torch.cat([model(part).logits for part in (ids[:, :4], ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["additive", "untied"])
def test_position_ids_select_rows_of_the_table(kernel: str) -> None:
    model = build_double("softmax", position_kernel=kernel)
    order = torch.tensor([5, 0, 7, 23, 2, 2, 11, 3, 9])
    mask = torch.ones(2, 9)  # without one the library would take positions that jump for packed texts
    got = model(token_ids(), position_ids=order.unsqueeze(0), attention_mask=mask).logits
    with torch.no_grad():
        model.transformer.wpe.weight[:9] = model.transformer.wpe.weight[order]
    torch.testing.assert_close(got, model(token_ids()).logits, rtol=0, atol=1e-11)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stretched_positions_are_a_narrower_gaussian(implementation: str) -> None:
    model = build_double("bilateral_gaussian", implementation)
    got = model(token_ids(), position_ids=torch.arange(9).unsqueeze(0) * 2, attention_mask=torch.ones(2, 9)).logits
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.filter.scalar_bias.position_log_bandwidth -= torch.log(torch.tensor(2.0))
    torch.testing.assert_close(got, model(token_ids()).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kernel", ["gaussian", "none"])
def test_relative_kernels_do_not_see_a_shift(kernel: str, implementation: str) -> None:
    model = build_double("softmax", implementation, position_kernel=kernel)
    mask = torch.ones(2, 9)
    shifted = model(token_ids(), position_ids=torch.arange(9).unsqueeze(0) + 40, attention_mask=mask).logits
    torch.testing.assert_close(shifted, model(token_ids()).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kernel", ["gaussian", "none"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_kernels_without_a_table_go_past_n_positions(kernel: str, implementation: str) -> None:
    model = build_double("softmax", implementation, position_kernel=kernel)
    assert model.transformer.wpe is None
    ids = token_ids(batch=1, length=60)
    whole = model(ids).logits
    torch.testing.assert_close(whole[:, :20], model(ids[:, :20]).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("variant", VARIANTS)
def test_position_ids_of_one_row_serve_every_row(variant: str) -> None:
    model = build(variant)
    positions = torch.arange(9).unsqueeze(0)
    wanted = model(token_ids(), position_ids=positions.expand(2, -1)).logits
    assert torch.equal(model(token_ids(), position_ids=positions).logits, wanted)
    assert torch.equal(model(token_ids()).logits, wanted)


# --------------------------------------------------------------------------------------------------------------------
# Other inputs
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_embeddings_may_be_given_in_place_of_tokens(variant: str) -> None:
    model = build(variant)
    embedded = model.transformer.wte(token_ids())
    wanted = model(token_ids()).logits
    assert torch.equal(model(inputs_embeds=embedded).logits, wanted)
    types = token_ids(seed=7)
    typed = model(token_ids(), token_type_ids=types).logits
    torch.testing.assert_close(typed, model(inputs_embeds=embedded + model.transformer.wte(types)).logits)
    assert (typed - wanted).abs().max() > 0.1


@pytest.mark.parametrize("keep", [1, 4, torch.tensor([0, 7])])
@pytest.mark.parametrize("variant", ["softmax", "bilateral_twicing"])
def test_logits_to_keep(variant: str, keep: int | torch.Tensor) -> None:
    model = build(variant)
    rows = keep if isinstance(keep, torch.Tensor) else slice(-keep, None)
    torch.testing.assert_close(model(token_ids(), logits_to_keep=keep).logits, model(token_ids()).logits[:, rows])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_see_nothing_give_no_nan(variant: str, implementation: str) -> None:
    """A row that is all padding, single queries without a key: finite forward and backward, the others untouched."""
    model = build(variant, implementation)
    ids = token_ids()
    flat = torch.ones(2, 9, dtype=torch.long)
    flat[0] = 0
    some = torch.ones(9, 9).tril().bool().repeat(2, 1, 1, 1)
    some[0, 0, 3] = some[0, 0, 8] = False
    some[1, 0, :, 5] = False
    some[1, 0, 5] = False
    floats = [torch.zeros(some.shape).masked_fill(~some, low) for low in (torch.finfo(torch.float32).min, -torch.inf)]
    alone = model(ids[1:]).logits[0]
    for mask in (flat, some, *floats):
        output = model(ids, attention_mask=mask, labels=ids)
        assert output.logits.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(model, output.loss).values())
        if mask is flat:
            torch.testing.assert_close(output.logits[1], alone, rtol=1e-4, atol=1e-4)
        else:
            torch.testing.assert_close(output.logits[1, :5], alone[:5], rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Embeddings, tying, heads
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_resizing_the_vocabulary_keeps_the_old_logits(variant: str, tmp_path: Any) -> None:
    model = build(variant)
    wanted = model(token_ids()).logits
    model.resize_token_embeddings(VOCABULARY + 6)
    assert model.lm_head.weight is model.transformer.wte.weight
    got = model(token_ids()).logits
    torch.testing.assert_close(got[..., :VOCABULARY], wanted)
    assert got.shape[-1] == model.config.vocab_size == VOCABULARY + 6
    model.save_pretrained(tmp_path)
    again = ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    torch.testing.assert_close(again(token_ids()).logits, got)


def test_untied_embeddings_stay_apart(tmp_path: Any) -> None:
    model = build("bilateral", tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    again = ImgProcGPT2LMHeadModel.from_pretrained(tmp_path)
    torch.testing.assert_close(again(token_ids()).logits, model(token_ids()).logits)
    assert not torch.equal(again.lm_head.weight, again.transformer.wte.weight)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("head", ["lm", "sequence", "token"])
def test_a_few_steps_lower_the_loss(head: str, variant: str) -> None:
    torch.manual_seed(0)
    _, our_class, options = HEADS[head]
    model = our_class(gpt2_config(variant, pad_token_id=0, **options)).train()
    inputs = padded_batch("right")
    labels = {
        "lm": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100),
        "sequence": torch.tensor([4, 2]),
        "token": token_ids() % 5,
    }[head]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sequence_classification_reads_the_last_real_token(variant: str, side: str) -> None:
    config = gpt2_config(variant, pad_token_id=0, num_labels=3)
    model = sharpen_(ImgProcGPT2ForSequenceClassification(config)).eval().double()
    inputs = pad(token_ids(), row=1, length=6, side=side)
    alone = model(token_ids()[1:, :6]).logits
    torch.testing.assert_close(model(**inputs).logits[1:], alone, rtol=0, atol=1e-10)
