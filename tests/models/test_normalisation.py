"""How logits become weights: each formula by hand, every back-end, what is refused, where a sink starts."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, apply_filter, convert
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_chunked import run as run_chunked
from hf_imgproc_attn.models.backend_reference import filter_matrix
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.backend_table import BACKENDS, run_filter
from hf_imgproc_attn.models.cache_streams import NO_STREAMS
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.kernel_normalisation import NORMALISATIONS, Normalisation
from hf_imgproc_attn.models.kernel_position import position_logits
from hf_imgproc_attn.models.layer_inputs import LayerInputs
from hf_imgproc_attn.models.visibility import Visibility, attention_visibility
from tests.models.helpers import filter_call, make_filter
from tests.models.layer_cases import BATCH, HEADS, LENGTH, TIGHT, WIDTH, assert_same, masks, random, run, tensors
from tests.models.variants import gpt2_config, token_ids, vit_config

ROW_BY_ROW = ("sink", "sigmoid", "softpick")
IN_BLOCKS: dict[str, Any] = {"chunked": run_chunked, "blocked": run_blocked}


def row_by_hand(name: str, logits: list[float], sink: float) -> list[float]:
    """Weights of the keys that one query sees."""
    if name == "sink":
        total = math.exp(sink) + sum(math.exp(x) for x in logits)
        return [math.exp(x) / total for x in logits]
    if name == "sigmoid":
        return [1 / (1 + math.exp(-x) * len(logits)) for x in logits]
    above = [math.exp(x) - 1 for x in logits]
    total = sum(map(abs, above)) + 1e-6 * max(1.0, *map(math.exp, logits))
    return [max(x, 0.0) / total for x in above]


@pytest.mark.parametrize("mask", ["none", "causal", "left", "dense"])
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_weights_are_the_formulas(name: str, mask: str) -> None:
    """Row by row, of the keys that are seen; rows that see none are 0."""
    logits, sinks = 2 * random(BATCH, HEADS, LENGTH, LENGTH), random(HEADS, seed=1)
    given = masks()[mask]
    visibility = attention_visibility(
        given.get("attention_mask"), shape=(BATCH, HEADS, LENGTH, LENGTH), causal=given.get("is_causal", False)
    )
    normalisation = Normalisation("softmax" if name == "sink" else name)
    matrix = filter_matrix(logits, visibility, sinks if name == "sink" else None, normalisation)
    allowed = visibility.allowed(logits.device)
    allowed = torch.ones_like(logits, dtype=torch.bool) if allowed is None else allowed.expand_as(logits)
    for b, h, i in itertools.product(range(BATCH), range(HEADS), range(LENGTH)):
        seen = allowed[b, h, i]
        expected = torch.zeros(LENGTH, dtype=torch.float64)
        if seen.any():
            weights = row_by_hand(name, logits[b, h, i][seen].tolist(), float(sinks[h]))
            expected[seen] = torch.tensor(weights, dtype=torch.float64)
        torch.testing.assert_close(matrix[b, h, i], expected, **TIGHT)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("name", [*ROW_BY_ROW, "sinkhorn"])
def test_no_logit_is_too_large_or_too_small(name: str, size: float) -> None:
    """In single precision, with its gradient."""
    logits = (random(1, 2, 7, 7).float() * size).requires_grad_()
    normalisation = Normalisation("softmax" if name == "sink" else name)
    sinks = torch.zeros(2) if name == "sink" else None
    matrix = filter_matrix(logits, Visibility(7, 7), sinks, normalisation)
    matrix.square().sum().backward()
    assert matrix.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (matrix >= 0).all()
    assert matrix.sum(-1).max() <= 1 + 1e-5 or name == "sigmoid"


# --------------------------------------------------------------------------------------------------------------------
# Back-ends
# --------------------------------------------------------------------------------------------------------------------

POSITIONS = {
    "sink": ["none", "untied", "alibi", "patches"],
    "sigmoid": ["none", "gaussian"],
    "softpick": ["none", "buckets"],
}


@pytest.mark.parametrize("mask", ["none", "causal", "left", "bias"])
@pytest.mark.parametrize(("name", "position"), [(n, p) for n, positions in POSITIONS.items() for p in positions])
def test_back_ends_agree(name: str, position: str, mask: str) -> None:
    """Outputs and all gradients of a twicing layer; who cannot compute it says so."""
    from tests.models.layer_cases import build

    layer, inputs = build("dot_product", position, "twicing", 2, normalisation=name), tensors(position)
    dense = run(layer, inputs, "eager", **masks()[mask])
    for backend in ("chunked", "blocked"):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **masks()[mask]), dense)
    fused = name == "sink"
    if fused:
        assert_same(run(layer, inputs, "sdpa", backend="sdpa", **masks()[mask]), dense)
    for backend in ("flex", "triton") if fused else ("sdpa", "flex", "triton"):
        if backend in BACKENDS:
            with pytest.raises(ValueError, match="cannot serve this call"):
                run(layer, inputs, "sdpa", backend=backend, **masks()[mask])
    assert_same(run(layer, inputs, "sdpa", backend="auto", **masks()[mask]), dense)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_blocks_of_rows_are_the_whole(name: str, is_causal: bool) -> None:
    """Blocks of three of eleven queries, with class tokens' positions, a bias and padding; outputs and gradients."""
    leaves = [random(2, 3, 11, 4, seed=seed).requires_grad_() for seed in range(3)]
    bias = random(1, 3, 11, 11, seed=4).requires_grad_()
    sinks = random(3, seed=5).requires_grad_() if name == "sink" else None
    mask = torch.ones(2, 1, 1, 11, dtype=torch.bool)
    mask[1, ..., :2] = False
    call = filter_call(*leaves, is_causal=is_causal, attention_mask=mask, boosting="twicing", boosting_steps=2)
    call = call._replace(
        positions=(BiasPositions(bias),),
        sinks=sinks,
        normalisation=Normalisation("softmax" if name == "sink" else name),
    )
    wanted = [*leaves, bias, *([] if sinks is None else [sinks])]
    upstream, exact = random(2, 3, 11, 4, seed=9), run_reference(call)
    dense = torch.autograd.grad(exact, wanted, upstream)
    for result in (run_chunked(call, block_rows=3), run_blocked(call, block_rows=3, group_pairs=2)):
        torch.testing.assert_close(result, exact, **TIGHT)
        torch.testing.assert_close(torch.autograd.grad(result, wanted, upstream), dense, **TIGHT)


@pytest.mark.parametrize("backend", ["chunked", "blocked"])
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_dropout_in_blocks_is_one_mask_for_all_passes(name: str, backend: str) -> None:
    """The operator that the identity reveals is a polynomial of one matrix, whose kept weights are scaled."""
    query, key = (random(1, 2, 9, 4, seed=seed) for seed in range(2))
    identity = torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)
    normalisation = Normalisation("softmax" if name == "sink" else name)
    sinks = torch.zeros(2, dtype=torch.float64) if name == "sink" else None

    def operator(boosting: str, dropout: float) -> torch.Tensor:
        torch.manual_seed(3)
        call = filter_call(query, key, identity, boosting=boosting, boosting_steps=2, dropout=dropout)
        return IN_BLOCKS[backend](call._replace(normalisation=normalisation, sinks=sinks), block_rows=4)

    dropped, whole = operator("none", 0.5), operator("none", 0.0)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * whole[kept], **TIGHT)
    assert 0.2 < float(kept.double().mean()) < 0.8
    torch.testing.assert_close(operator("twicing", 0.5), 2 * dropped - dropped @ dropped, **TIGHT)


@pytest.mark.parametrize("mask", ["none", "causal", "left"])
@pytest.mark.parametrize("name", ["sink", "sigmoid"])
@pytest.mark.parametrize("position", ["none", "patches"])
def test_gaussian_contents_are_compared_in_full(position: str, name: str, mask: str) -> None:
    """-|q - k|^2 / h^2, of which a softmax needs no |q|^2, and all back-ends here do."""
    from tests.models.layer_cases import build

    layer, inputs = build("gaussian", position, "twicing", 2, normalisation=name), tensors(position)
    dense = run(layer, inputs, "eager", **masks()[mask])
    for backend in ("chunked", "blocked", "auto", *(["sdpa"] if name == "sink" else [])):
        assert_same(run(layer, inputs, "sdpa", backend=backend, **masks()[mask]), dense)
    if mask == "causal" or position != "none":
        return
    plain = build("gaussian", "none", normalisation=name)
    _, matrix = plain(**inputs, implementation="eager", need_weights=True, **masks()[mask])
    scale = 2 * torch.exp(-2 * plain.scalar_bias.content_log_bandwidth.detach())
    sinks = torch.zeros(HEADS) if plain.scalar_bias.sink is None else plain.scalar_bias.sink.detach()
    for b, h, i in itertools.product(range(BATCH), range(HEADS), range(LENGTH)):
        seen = matrix[b, h, i] != 0
        distances = (inputs["query"][b, h, i] - inputs["key"][b, h]).square().sum(-1)[seen]
        weights = row_by_hand(name, (-distances * scale[h] / 2).tolist(), float(sinks[h]))
        torch.testing.assert_close(matrix[b, h, i][seen], torch.tensor(weights, dtype=torch.float64), **TIGHT)


# --------------------------------------------------------------------------------------------------------------------
# Sinkhorn
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_sinkhorn_is_doubly_stochastic_and_its_twicing_keeps_more() -> None:
    """Rows sum to 1 exactly, columns in the limit; of a symmetric kernel A is symmetric there."""
    points = 0.4 * random(9, 4)
    logits = -torch.cdist(points, points).square()[None, None]
    matrix = filter_matrix(logits, Visibility(9, 9), None, Normalisation("sinkhorn", 200))[0, 0]
    ones = torch.ones(9, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(-1), ones, **TIGHT)
    torch.testing.assert_close(matrix.sum(-2), ones, rtol=0, atol=1e-9)
    torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-9)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    assert eigenvalues.min() > 0  # a Gaussian kernel is positive
    boosted = torch.linalg.eigvalsh(2 * matrix - matrix @ matrix)
    assert (boosted >= eigenvalues - 1e-12).all()
    assert boosted.max() < 1 + 1e-9
    few = filter_matrix(logits, Visibility(9, 9), None, Normalisation("sinkhorn", 1))[0, 0]
    torch.testing.assert_close(few.sum(-1), ones, **TIGHT)
    assert (few.sum(-2) - ones).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("content", ["dot_product", "gaussian", "cosine"])
@pytest.mark.parametrize("position", ["untied", "bucket patches", "patches"])
def test_sinkhorn_gets_each_logit_in_full(content: str, position: str) -> None:
    """K is exp of all terms, scaled to columns first: a number that is added to a row changes its share of them."""
    from tests.models.layer_cases import build

    layer, inputs = build(content, position, normalisation="sinkhorn", position_axes=2), tensors(position)
    query, key, places = inputs["query"], inputs["key"], layer.positions
    scale = 2 * torch.exp(-2 * layer.scalar_bias.content_log_bandwidth.detach()).view(-1, 1, 1)
    if content == "gaussian":
        logits = -torch.cdist(query, key).square() * scale / 2
    else:
        length = query.norm(dim=-1, keepdim=True) * key.norm(dim=-1, keepdim=True).mT if content == "cosine" else 1.0
        logits = query @ key.mT / length * scale
    given = LayerInputs(position_states=inputs.get("position_states"))
    vectors = layer._position_vectors(given, NO_STREAMS, query)
    coordinates = (inputs.get("coordinates"),) * 2
    terms = places.terms(layer.scalar_bias(), vectors, coordinates, contiguous=False, causal=False, like=query)
    kernel = (logits + sum(position_logits(term, torch.float64) for term in terms)).exp()
    for _ in range(3):
        kernel = kernel / kernel.sum(-2, keepdim=True)
        kernel = kernel / kernel.sum(-1, keepdim=True)
    output, matrix = layer(**inputs, implementation="eager", need_weights=True)
    torch.testing.assert_close(matrix, kernel, **TIGHT)
    torch.testing.assert_close(output, kernel @ inputs["value"], **TIGHT)


@torch.no_grad()
def test_sinkhorn_of_a_padded_text_is_that_of_the_text_alone() -> None:
    logits = random(1, 2, 8, 8)
    seen = torch.ones(1, 1, 1, 8, dtype=torch.bool)
    seen[..., 5:] = False
    visibility = attention_visibility(seen, shape=(1, 2, 8, 8))
    padded = filter_matrix(logits, visibility, None, Normalisation("sinkhorn"))
    alone = filter_matrix(logits[..., :5, :5], Visibility(5, 5), None, Normalisation("sinkhorn"))
    torch.testing.assert_close(padded[..., :5, :5], alone, **TIGHT)
    assert padded[..., 5:].abs().max() == 0


@pytest.mark.parametrize("iterations", [0, 65, True, 2.5])
def test_iterations_out_of_range_are_refused_by_name(iterations: Any) -> None:
    with pytest.raises(Exception, match="sinkhorn_iterations"):
        vit_config("sinkhorn", sinkhorn_iterations=iterations)


def test_sinkhorn_is_refused_where_tokens_are_hidden_by_causality() -> None:
    """By name, of a model, of a call, and of blocks of rows."""
    with pytest.raises(Exception, match="needs attention without a causal mask"):
        gpt2_config("softmax", normalisation="sinkhorn")
    assert vit_config("softmax", normalisation="sinkhorn", sinkhorn_iterations=5).sinkhorn_iterations == 5
    query, key, value = (random(1, 2, 5, 4, seed=seed) for seed in range(3))
    call = filter_call(query, key, value, is_causal=True)._replace(normalisation=Normalisation("sinkhorn"))
    with pytest.raises(ValueError, match="without a causal mask"):
        run_filter(call, "auto")
    with pytest.raises(ValueError, match="needs attention without a causal mask"):
        run_filter(call, "chunked")
    fewer = filter_call(query[..., :2, :], key, value)._replace(normalisation=Normalisation("sinkhorn"))
    with pytest.raises(ValueError, match="as many queries as keys, got 2 and 5"):
        run_filter(fewer, "reference")


# --------------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_sink_starts_where_the_function_is_kept() -> None:
    """-10 in converted and filtered models, 0 in new ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 12, "vocab_size": 61}
    stock = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    wanted = stock(token_ids()).logits
    model, report = convert(stock, "sink", return_report=True)
    assert report.max_difference < 1e-4
    torch.testing.assert_close(model.eval()(token_ids()).logits, wanted, rtol=0, atol=1e-4)
    applied = apply_filter(stock, "sink")
    torch.testing.assert_close(applied(token_ids()).logits, wanted, rtol=0, atol=1e-4)
    for made in (model, applied):
        sinks = [parameter for name, parameter in made.named_parameters() if name.endswith("scalar_bias.sink")]
        assert len(sinks) == 2
        assert all(bool((sink == -10).all()) for sink in sinks)
    new = ImgProcGPT2LMHeadModel(gpt2_config("sink"))
    assert all(not parameter.any() for name, parameter in new.named_parameters() if name.endswith(".sink"))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sink", "sigmoid", "softpick"])
def test_other_models_decode_exactly(name: str) -> None:
    """With left padding: a step at a time through the model's own cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = apply_filter(LlamaForCausalLM(config).double().eval(), name)
    ids, mask = token_ids(length=7) % 40, torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = model(ids, attention_mask=mask, position_ids=places).logits[mask.bool()]
    cache, steps = None, []
    for start, stop in ((0, 4), (4, 5), (5, 7)):
        given = {"attention_mask": mask[:, :stop], "past_key_values": cache, "use_cache": True}
        output = model(ids[:, start:stop], position_ids=places[:, start:stop], **given)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1)[mask.bool()], whole, rtol=0, atol=1e-10)


def test_every_name_has_its_function() -> None:
    from hf_imgproc_attn.models import spec_axes

    assert set(NORMALISATIONS) == set(spec_axes.NORMALISATIONS) - {"softmax", "sink"}
    layer = make_filter("dot_product", "none", normalisation="sink", head_dim=WIDTH)
    assert layer.scalar_bias.sink is not None
