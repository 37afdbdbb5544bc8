"""The delta rule: the formula, back-ends, its inverse, caches, where it starts, other models, who refuses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcGPT2LMHeadModel,
    ImgProcViTConfig,
    apply_filter,
    convert,
    filter_attention,
    filtered_layers,
    remove_filter,
)
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_chunked import run as run_chunked
from hf_imgproc_attn.models.backend_table import run_filter
from hf_imgproc_attn.models.boost_delta import DenseDelta, inverse_by_products
from hf_imgproc_attn.models.kernel_normalisation import NORMALISATIONS, Normalisation
from tests.models.helpers import filter_call, logits_in_steps, make_filter, sharpen_
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, pad, token_ids

EXACT = ("reference", "sdpa", "blocked", "chunked")
WEIGHTS = ("softmax", "sink", "sigmoid", "softpick")
CAUSAL = {"is_causal": True}


def delta(*given: torch.Tensor, rate: torch.Tensor | None = None, **options: Any) -> FilterCall:
    return filter_call(*given, boosting="delta", boosting_gain=rate, **{**CAUSAL, **options})


def weighted(call: FilterCall, name: str, sinks: torch.Tensor) -> FilterCall:
    """The call with other weights than those of softmax."""
    if name == "sink":
        return call._replace(sinks=sinks)
    return call._replace(normalisation=Normalisation(name))


def by_hand(logits: torch.Tensor, seen: torch.Tensor, value: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
    """Token by token: what the earlier corrected values say of a token is taken from its own, then A reads them."""
    output = torch.zeros(*logits.shape[:-1], value.shape[-1], dtype=logits.dtype)
    for b, h in torch.cartesian_prod(torch.arange(logits.shape[0]), torch.arange(logits.shape[1])).tolist():
        corrected = torch.zeros_like(value[b, h])
        for i in range(logits.shape[2]):
            visible = seen[b, h, i].nonzero().flatten().tolist()
            before = [j for j in visible if j < i]
            read = torch.zeros_like(corrected[0])
            if before:
                read = torch.softmax(logits[b, h, i, before], 0) @ corrected[before]
            corrected[i] = value[b, h, i] - rate[b, h, i] * read
            if visible:
                output[b, h, i] = torch.softmax(logits[b, h, i, visible], 0) @ corrected[visible]
    return output


@pytest.mark.parametrize("mask", ["causal", "left", "right"])
@pytest.mark.parametrize("content", ["dot_product", "gaussian", "elliptical"])
def test_every_back_end_is_the_formula(content: str, mask: str) -> None:
    """Outputs by hand, and every gradient by the dense form; rows that see no key give 0."""
    layer = make_filter(content, "none", "delta")
    inputs = tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}
    with torch.no_grad():
        layer.scalar_bias.delta.copy_(torch.tensor([0.3, -0.6, 1.5]))
        layer.token_rates.weight.copy_(0.3 * random(HEADS, HEADS * WIDTH, seed=12))
        tokens = layer.token_rates(inputs["hidden_states"]).squeeze(-1)
        rate = torch.tanh(layer.scalar_bias.delta.view(-1, 1) + tokens)
    options = masks()[mask]
    dense = run(layer, inputs, "eager", **options)
    with torch.no_grad():
        plain = make_filter(content, "none")
        plain.load_state_dict(layer.state_dict(), strict=False)
        given = {name: x for name, x in inputs.items() if name != "hidden_states"}
        matrix = plain(**given, implementation="eager", need_weights=True, **options)[1]
        value = inputs["value"].masked_fill(~(matrix > 0).any(-2).unsqueeze(-1), 0.0)
        torch.testing.assert_close(dense["output"], by_hand(matrix.log(), matrix > 0, value, rate), **TIGHT)
    for backend in EXACT:
        assert_same(run(layer, inputs, "sdpa", backend=backend, **options), dense)
    with pytest.raises(ValueError, match="computes all rows at the same time, and boosting='delta' needs those"):
        run(layer, inputs, "sdpa", backend="flex", **options)


@torch.no_grad()
def test_the_operator_multiplies_the_values() -> None:
    layer = make_filter("dot_product", "none", "delta")
    layer.scalar_bias.delta.copy_(torch.tensor([0.3, -0.6, 1.5]))
    inputs = tensors("none") | {"hidden_states": random(BATCH, LENGTH, HEADS * WIDTH, seed=11)}
    for mask in ("causal", "left"):
        output, operator = layer(**inputs, implementation="eager", need_weights=True, **masks()[mask])
        torch.testing.assert_close(operator @ inputs["value"], output, **TIGHT)
        assert not operator.triu(1).any()
        assert (operator < 0).any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("backend", EXACT)
def test_gradients_are_numerical_ones(backend: str, dropout: float, weights: str) -> None:
    """In blocks of two queries, two of four heads that share keys at a time, and with one dropout mask."""
    if backend == "sdpa" and (dropout or weights in ("sigmoid", "softpick")):
        call = delta(*(random(1, 1, 3, 2) for _ in range(3)), dropout=dropout)
        with pytest.raises(ValueError, match=r"a new dropout mask at every pass|weights of softmax only"):
            run_filter(weighted(call, weights, torch.zeros(1)), backend)
        return
    shapes = ((4, 5, 2), (2, 5, 2), (2, 5, 2), (4, 5, 1))
    leaves = [random(1, *shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    leaves.append(random(4, seed=8).requires_grad_(weights == "sink"))
    mask = torch.ones(1, 1, 1, 5, dtype=torch.bool)
    mask[..., 0] = False

    def filtered(*given: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        call = delta(*given[:3], rate=given[3], dropout=dropout, attention_mask=mask)
        call = weighted(call, weights, given[4])
        if backend == "chunked":
            return run_chunked(call, block_rows=2)
        return run_blocked(call, block_rows=2, group_pairs=2) if backend == "blocked" else run_filter(call, backend)

    # No gradient flows through softpick's largest logit, which counts by epsilon alone.
    assert torch.autograd.gradcheck(
        filtered, leaves, atol=1e-5, fast_mode=(backend, weights, dropout) != ("blocked", "softmax", 0.0)
    )
    if backend == "blocked" and not dropout and weights in ("softmax", "sigmoid"):
        assert torch.autograd.gradgradcheck(filtered, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("backend", "weights"),
    [(name, "softmax") for name in EXACT[1:]] + [("blocked", name) for name in WEIGHTS[1:]],
)
def test_long_texts_over_several_blocks_are_as_the_dense_form(backend: str, weights: str) -> None:
    """Over several blocks of the back-ends' own size, with a bias and padding: outputs and gradients."""
    length, heads = 150, 2
    given = [random(2, heads, length, 4, seed=seed) for seed in range(3)]
    given += [torch.tanh(random(2, heads, length, 1, seed=3)), random(1, heads, length, length, seed=4)]
    mask = torch.ones(2, 1, 1, length, dtype=torch.bool)
    mask[0, ..., :70], mask[1, ..., 140:] = False, False
    results = []
    for name in ("reference", backend):
        leaves = [x.clone().requires_grad_() for x in given]
        call = delta(*leaves[:3], rate=leaves[3], bias=leaves[4], attention_mask=mask)
        call = weighted(call, weights, random(heads, seed=5))
        output = run_chunked(call, block_rows=40) if name == "chunked" else run_filter(call, name)
        (output * random(*output.shape, seed=9)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_what_stands_at_padding_has_no_influence(weights: str) -> None:
    """NaN in keys, values and queries of padding reaches no gradient; on the right no output either."""
    exact = [name for name in EXACT if name != "sdpa" or weights in ("softmax", "sink")]

    def call_of(given: list[torch.Tensor], mask: str) -> FilterCall:
        call = delta(*given, attention_mask=masks()[mask]["attention_mask"])
        return weighted(call, weights, random(HEADS, seed=5))

    leaves = [random(BATCH, HEADS, LENGTH, WIDTH, seed=seed) for seed in range(3)]
    poisoned = [leaf.clone() for leaf in leaves]
    for leaf in poisoned:
        leaf[0, :, :4] = float("nan")
    results = []
    for given, backend in ((leaves, "reference"), *((poisoned, name) for name in exact)):
        given = [leaf.clone().requires_grad_() for leaf in given]
        output = run_filter(call_of(given, "left"), backend)
        (output * random(*output.shape, seed=9)).sum().backward()
        results.append([output.detach(), *(leaf.grad for leaf in given)])
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, **TIGHT)
    poisoned = [leaf.clone() for leaf in leaves]
    for leaf in poisoned:
        leaf[1, :, -3:] = float("nan")
    wanted = run_filter(call_of(leaves, "right"), "reference")
    for backend in exact:
        got = run_filter(call_of(poisoned, "right"), backend)
        torch.testing.assert_close(got[1, :, :-3], wanted[1, :, :-3], **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("normalisation", ["sigmoid", "softpick"])
def test_other_normalisations_have_another_matrix_before_the_own_token(normalisation: str) -> None:
    """A' has the normalisation's weights over the keys before: their number is one less."""
    logits, value, rate = random(1, 2, 6, 6), random(1, 2, 6, 5, seed=2), torch.tanh(random(1, 2, 6, 1, seed=3))
    weigh, u = NORMALISATIONS[normalisation], torch.zeros_like(value)
    wanted = torch.zeros_like(value)
    for i in range(6):
        row = logits[:, :, i : i + 1]
        read = weigh(row[..., :i], None, None, 0) @ u[:, :, :i] if i else 0.0
        u[:, :, i : i + 1] = value[:, :, i : i + 1] - rate[:, :, i : i + 1] * read
        wanted[:, :, i : i + 1] = weigh(row[..., : i + 1], None, None, 0) @ u[:, :, : i + 1]
    # Keys that are unit vectors make the queries the logits.
    key = torch.eye(6, dtype=torch.float64).expand(1, 2, -1, -1)
    call = delta(logits, key, value, rate=rate, scale=1.0)._replace(normalisation=Normalisation(normalisation))
    for backend in ("reference", "chunked", "blocked", "auto"):
        torch.testing.assert_close(run_filter(call, backend), wanted, **TIGHT)
    torch.testing.assert_close(run_blocked(call, block_rows=2), wanted, **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("weights", WEIGHTS[1:])
@pytest.mark.parametrize("backend", ["blocked", "auto"])
def test_a_cache_keeps_the_corrected_rows_of_other_weights(backend: str, weights: str) -> None:
    """Step by step with left padding, on sharpened weights, as the whole; where beta is not 0."""
    config = gpt2_config("delta", normalisation=weights, filter_backend=backend)
    model = sharpen_(ImgProcGPT2LMHeadModel(config), std=1.0).double().eval()
    inputs = pad(token_ids(length=7), row=1, length=5, side="left")
    real, cache, steps = inputs["attention_mask"].bool(), None, []
    whole = model(**inputs, use_cache=False).logits[real]
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        step = {name: tensor[:, start:stop] for name, tensor in inputs.items()}
        step["attention_mask"] = inputs["attention_mask"][:, :stop]
        output = model(**step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[real], whole, rtol=0, atol=1e-11)
    for layer in model.transformer.h:
        layer.attn.filter.scalar_bias.delta.zero_()
        layer.attn.filter.token_rates.weight.zero_()
    assert (model(**inputs, use_cache=False).logits[real] - whole).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Beside float64, outputs and gradients; fused calls round u once a block."""
    given = [random(1, 2, 150, 8, seed=seed).to(dtype) for seed in range(3)]
    results = []
    for backend, kind in (("reference", torch.float64), *((name, dtype) for name in EXACT)):
        leaves = [x.to(kind, copy=True).requires_grad_() for x in given]
        output = run_filter(delta(*leaves), backend)
        output.backward(random(*output.shape, seed=9).to(dtype).to(kind))
        results.append([output.detach().double(), *(leaf.grad.double() for leaf in leaves)])
    for backend, other in zip(EXACT, results[1:], strict=True):
        for got, wanted in zip(other, results[0], strict=True):
            limit = {"sdpa": 4.0}.get(backend, 1.5)
            assert (got - wanted).abs().max() < limit * torch.finfo(dtype).eps * wanted.abs().max()


@torch.no_grad()
def test_it_starts_as_plain_attention() -> None:
    """In a new model and in a converted one; a cache keeps u."""
    torch.manual_seed(0)
    source = ImgProcGPT2LMHeadModel(gpt2_config("softmax")).eval()
    model, report = convert(source, "delta", return_report=True)
    assert report.max_difference < 1e-6
    torch.testing.assert_close(model.eval()(token_ids()).logits, source(token_ids()).logits, rtol=0, atol=1e-6)
    layer = ImgProcGPT2LMHeadModel(gpt2_config("delta")).transformer.h[1].attn.filter
    assert layer.stream_names == ("boost.1",)
    assert not layer.scalar_bias.delta.any()
    assert not layer.token_rates.weight.any()


def test_beta_learns_from_the_start() -> None:
    torch.manual_seed(0)
    model = ImgProcGPT2LMHeadModel(gpt2_config("delta"))
    model(token_ids(), labels=token_ids()).loss.backward()
    ours = {name: p.grad for name, p in model.named_parameters() if "token_rates" in name or "bias.delta" in name}
    assert len(ours) == 6
    assert all(gradient is not None and bool(gradient.any()) for gradient in ours.values())


def stock(**fields: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=19, n_positions=24, bos_token_id=0, eos_token_id=0, **fields
    )
    return sharpen_(GPT2LMHeadModel(config)).double().eval()


def turn_on(model: torch.nn.Module) -> None:
    """Give each head a beta of its own."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("scalar_bias.delta"):
            parameter.data = torch.tensor([0.9, -0.4]).to(parameter) + 0.1 * number


@torch.no_grad()
def test_it_is_learned_in_any_causal_model_and_decodes_exactly() -> None:
    """One beta a head, which starts at 0; left padding; taken out again the model is what it was."""
    model = stock()
    tokens = torch.randint(1, 19, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    before = model(tokens, **given).logits
    apply_filter(model, "delta")
    assert all(row["parameters"] == 2 for row in filtered_layers(model))
    torch.testing.assert_close(model(tokens, **given).logits[mask.bool()], before[mask.bool()], rtol=0, atol=1e-10)
    turn_on(model)
    whole = model(tokens, **given).logits
    assert (whole - before).abs().max() > 1e-2
    stepwise = logits_in_steps(model, {"input_ids": tokens, **given}, (0, 5, 6, 8))
    torch.testing.assert_close(stepwise[mask.bool()], whole[mask.bool()], rtol=0, atol=1e-10)
    torch.testing.assert_close(whole[:1, 3:], model(tokens[:1, 3:]).logits, rtol=0, atol=1e-10)
    assert torch.equal(remove_filter(model)(tokens, **given).logits, before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ImgProcViTConfig.from_preset("delta"),
        lambda: ImgProcBertConfig.from_preset("delta"),
        lambda: apply_filter(
            BertModel(
                BertConfig(
                    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
                )
            ),
            "delta",
        ),
    ],
)
def test_models_without_a_causal_mask_refuse_it(make: Any) -> None:
    with pytest.raises(Exception, match="boosting 'delta' corrects each token's value by those of the tokens before"):
        make()


def test_the_function_refuses_masks_that_show_later_keys() -> None:
    query, key, value = (random(1, 2, 5, 4, seed=seed) for seed in range(3))
    for mask in (None, torch.ones(5, 5, dtype=torch.bool)):
        with pytest.raises(ValueError, match="boosting='delta' corrects each value by those before it"):
            filter_attention(query, key, value, attn_mask=mask, boosting="delta")
    below = filter_attention(query, key, value, attn_mask=torch.ones(5, 5).bool().tril(), boosting="delta")
    torch.testing.assert_close(below, filter_attention(query, key, value, is_causal=True, boosting="delta"), **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13])
def test_the_inverse_by_products_is_the_triangular_solve(length: int) -> None:
    """Rows that grow as those of ``sigmoid`` may, and whatever stands on and above the diagonal."""
    system, value = 1.5 * random(2, 3, length, length), random(2, 3, length, 4, seed=1)
    exact = torch.linalg.solve_triangular(system, value, upper=False, unitriangular=True)
    torch.testing.assert_close(inverse_by_products(system) @ value, exact, rtol=1e-10, atol=1e-10)


class Solve(torch.nn.Module):
    """u of a text without a cache."""

    def forward(self, before: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return DenseDelta(before, None, slice(0, before.shape[-1])).solve(value)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")  # torch's own, in its exporter
def test_an_exported_system_has_core_operators_and_every_length() -> None:
    """As many products as the longest length needs: two for each of 1, 2, 4 and 8 rows, one with the values."""
    longest = 9
    length = torch.export.Dim("length", min=2, max=longest)
    shapes = {"before": {2: length, 3: length}, "value": {2: length}}
    given = random(1, 2, 7, 7), random(1, 2, 7, 3, seed=1)
    exported = torch.export.export(Solve(), given, dynamic_shapes=shapes, strict=False)
    for size in (2, longest):
        other = random(1, 2, size, size, seed=2), random(1, 2, size, 3, seed=3)
        torch.testing.assert_close(exported.module()(*other), Solve()(*other), rtol=1e-9, atol=1e-9)
    targets = [node.target for node in exported.run_decompositions().graph.nodes if node.op == "call_function"]
    tags = {target: target.tags for target in targets if isinstance(target, torch._ops.OpOverload)}
    allowed = torch.ops.aten._assert_tensor_metadata.default
    assert all(torch.Tag.core in tag for target, tag in tags.items() if target is not allowed)
    assert targets.count(torch.ops.aten.bmm.default) == 2 * 4 + 1
