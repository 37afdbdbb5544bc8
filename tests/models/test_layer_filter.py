"""One layer's filter: eager against a formula written out here, SDPA against eager, outputs and every gradient."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.modeling_shared import check_attn_implementation
from tests.models.helpers import make_filter
from tests.models.layer_cases import (
    BATCH,
    BOOSTERS,
    CASES,
    HEADS,
    KERNELS,
    LENGTH,
    MASKS,
    PAIRS,
    PLACES,
    POSITIONS,
    TIGHT,
    WIDTH,
    Inputs,
    assert_same,
    build,
    masks,
    random,
    run,
    tensors,
)

# --------------------------------------------------------------------------------------------------------------------
# Eager against the formula
# --------------------------------------------------------------------------------------------------------------------


def kernel_by_hand(layer: AttentionFilter, inputs: Inputs, batch: int, head: int, classes: int) -> torch.Tensor:
    """log K of one row and head, entry by entry, from the definitions."""
    scalars = layer.scalar_bias
    content = scalars.content_log_bandwidth.exp()[head]
    spatial = layer.spec.position_kernel
    query, key = inputs["query"][batch, head], inputs["key"][batch, head]
    places = None if "coordinates" not in inputs else inputs["coordinates"][batch % len(inputs["coordinates"])]
    if layer.spec.content_kernel == "elliptical":
        moved = (inputs["value"] - inputs["previous_value"])[batch, head].abs().mean(0)
        query = query * moved / moved.max()
    if spatial == "rotary":
        query, key = (turned_by_hand(states, places, classes) for states in (query, key))
    logits = torch.zeros(LENGTH, LENGTH, dtype=torch.float64)
    left, right = None, None
    if spatial == "untied":
        states = inputs["position_states"][batch % len(inputs["position_states"])]
        if layer.position_projection is None:
            left, right = states[head].split(WIDTH, dim=-1)
        else:
            projection = layer.position_projection
            normed = (states - states.mean(-1, keepdim=True)) / (
                states.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
            normed = normed * projection.norm.weight + projection.norm.bias
            rows = slice(head * WIDTH, (head + 1) * WIDTH)
            left, right = (normed @ linear.weight[rows].T for linear in (projection.query, projection.key))
    for i, j in itertools.product(range(LENGTH), repeat=2):
        if layer.spec.content_kernel == "gaussian":
            logits[i, j] = -(query[i] - key[j]).square().sum() / content**2
        else:
            logits[i, j] = (query[i] * key[j]).sum() * 2 / content**2
        if spatial in ("none", "rotary"):
            continue
        if i < classes or j < classes:
            which = 2 if i < classes and j < classes else 0 if j < classes else 1
            logits[i, j] += scalars.class_token[head, which]
        elif spatial == "untied":
            position = scalars.position_log_bandwidth.exp()[head]
            logits[i, j] += (left[i - classes] * right[j - classes]).sum() * 2 / position**2
        elif spatial == "gaussian":
            position = scalars.position_log_bandwidth.exp()[head]
            logits[i, j] -= (places[i] - places[j]).square().sum() / position**2
        elif spatial == "alibi":  # three heads: the slopes of two, then the first of those of four
            logits[i, j] -= (2.0**-4, 2.0**-8, 2.0**-2)[head] * math.dist(places[i].tolist(), places[j].tolist())
        else:
            for axis, offset in enumerate((places[j] - places[i]).tolist()):
                logits[i, j] += scalars.relative_buckets[head, axis, bucket_by_hand(offset, places.shape[-1] > 1)]
    return logits


def turned_by_hand(states: torch.Tensor, places: torch.Tensor, classes: int) -> torch.Tensor:
    """Pairs of features as complex numbers, times exp(i p f); the first half of the features by row."""
    axes = places.shape[-1]
    blocks = []
    for axis, block in enumerate(states.chunk(axes, dim=-1)):
        first, second = block.chunk(2, dim=-1)
        frequencies = 10000.0 ** (-torch.arange(first.shape[-1]).double() / first.shape[-1])
        place = places[:, axis].clone()
        place[:classes] = 0
        turned = torch.complex(first, second) * torch.exp(1j * place[:, None] * frequencies)
        blocks += [turned.real, turned.imag]
    return torch.cat(blocks, dim=-1)


def bucket_by_hand(offset: float, bidirectional: bool) -> int:
    """Eight buckets, the last one from distance 9 at the latest."""
    count = 4 if bidirectional else 8
    first = count if bidirectional and offset > 0 else 0
    distance = abs(offset) if bidirectional else max(-offset, 0)
    exact = count // 2
    if distance < exact:
        return first + int(distance)
    place = math.log(distance / exact) / math.log(9 / exact) * (count - exact)
    return first + min(exact + math.floor(place + 1e-12), count - 1)


@torch.no_grad()
@pytest.mark.parametrize("classes", [0, 2])
@pytest.mark.parametrize(("content", "position"), PAIRS)
def test_eager_is_the_formula(content: str, position: str, classes: int) -> None:
    """Content kernel times position kernel, normalised, boosted: nothing else, in every row and head."""
    layer = build(content, position, "twicing", 3, num_class_tokens=classes)
    inputs = tensors(position, classes=classes, rows=BATCH)
    output, operator = layer(**inputs, implementation="eager", need_weights=True)
    identity = torch.eye(LENGTH, dtype=torch.float64)
    for batch, head in itertools.product(range(BATCH), range(HEADS)):
        matrix = kernel_by_hand(layer, inputs, batch, head, classes).softmax(-1)
        expected = identity - torch.linalg.matrix_power(identity - matrix, 3)
        torch.testing.assert_close(operator[batch, head], expected, **TIGHT)
        torch.testing.assert_close(output[batch, head], expected @ inputs["value"][batch, head], **TIGHT)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_bilateral_attention_is_self_attention_without_the_cross_terms(implementation: str) -> None:
    """(y_i + p_i)^T (y_j + p_j) = content + position + two cross terms; ``untied`` keeps the first two."""
    tokens, places = random(BATCH, LENGTH, 15), random(1, LENGTH, 15, seed=1)
    matrices = random(2, 15, 15, seed=2) / 2
    value = random(BATCH, HEADS, LENGTH, WIDTH, seed=3)

    def projected(which: int, states: torch.Tensor) -> torch.Tensor:
        return (states @ matrices[which]).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)

    content, position = ([projected(which, states) for which in (0, 1)] for states in (tokens, places))
    both = [projected(which, tokens + places) for which in (0, 1)]
    cross = content[0] @ position[1].mT + position[0] @ content[1].mT
    expected = ((both[0] @ both[1].mT - cross) * WIDTH**-0.5).softmax(-1) @ value
    layer = build("dot_product", "shared", learn_bandwidths=False)
    output, _ = layer(*content, value, position_states=torch.cat(position, -1), implementation=implementation)
    torch.testing.assert_close(output, expected, **TIGHT)


# --------------------------------------------------------------------------------------------------------------------
# SDPA against eager
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("content,position,boosting,steps")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("content", "position", "boosting", "steps"), CASES)
def test_sdpa_is_eager(content: str, position: str, boosting: str, steps: int, mask: str) -> None:
    """Outputs and every gradient: query, key, value, position states, bandwidths, projections."""
    layer, inputs = build(content, position, boosting, steps), tensors(position)
    options = masks()[mask]
    eager = run(layer, inputs, "eager", **options)
    blind = 4 if mask == "left" else 0  # of the first row; the float64 SDPA of those is tested elsewhere
    assert eager["output"][0, :, blind:].abs().min() > 0
    assert_same(run(layer, inputs, "sdpa", **options), eager)
    dead = [name for name, gradient in eager.items() if name != "d key" and gradient.abs().max() <= 1e-3]
    assert not dead


@pytest.mark.sampled("content,position,boosting")
@pytest.mark.parametrize("mask", ["none", "keys", "dense", "additive"])
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 3)])
@pytest.mark.parametrize(("content", "position"), PAIRS)
def test_sdpa_is_eager_with_class_tokens(
    content: str, position: str, boosting: str, steps: int, classes: int, mask: str
) -> None:
    """The class-token logits have a gradient too."""
    layer = build(content, position, boosting, steps, num_class_tokens=classes)
    inputs = tensors(position, classes=classes)
    eager = run(layer, inputs, "eager", **masks()[mask])
    assert_same(run(layer, inputs, "sdpa", **masks()[mask]), eager)
    assert ("d scalar_bias.class_token" in eager) == (KERNELS[position][0] not in ("none", "rotary"))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", PLACES)
def test_coordinates_of_class_tokens_are_not_seen(position: str, implementation: str) -> None:
    """They have no place on the grid, whatever the caller puts there."""
    layer, inputs = build("dot_product", position, num_class_tokens=2), tensors(position, classes=2)
    expected, _ = layer(**inputs, implementation=implementation)
    inputs["coordinates"][:, :2] += 5.0
    got, _ = layer(**inputs, implementation=implementation)
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("position", ["gaussian", "alibi", "buckets", "rotary"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_coordinates_of_any_dtype(implementation: str, position: str, contiguous: bool, dtype: torch.dtype) -> None:
    """Whole numbers mean the same in every dtype, and that they have no gaps is only a hint."""
    layer, inputs = build("gaussian", position, "twicing", 2), tensors(position)
    expected, _ = layer(**inputs, implementation="eager", is_causal=True)
    inputs["coordinates"] = inputs["coordinates"].to(dtype)
    got, _ = layer(**inputs, implementation=implementation, is_causal=True, contiguous=contiguous)
    torch.testing.assert_close(got, expected, **TIGHT)


@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize("position", ["untied", "shared", "gaussian", "alibi", "buckets", "rotary"])
def test_rows_may_have_positions_of_their_own(position: str, rows: int) -> None:
    """Positions shared by the batch are the same as positions given for each row."""
    layer, inputs = build("gaussian", position, "twicing", 2), tensors(position, rows=rows)
    eager = run(layer, inputs, "eager", is_causal=True)
    assert_same(run(layer, inputs, "sdpa", is_causal=True), eager)
    name = "coordinates" if "coordinates" in inputs else "position_states"
    for row in range(BATCH):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        one[name] = inputs[name][row % rows][None]
        for implementation in ("eager", "sdpa"):
            alone, _ = layer(**one, implementation=implementation, is_causal=True)
            torch.testing.assert_close(alone[0], eager["output"][row], **TIGHT)


@pytest.mark.parametrize("length", [1, 2, 7, 33])
@pytest.mark.parametrize("position", ["none", "untied", "gaussian", "alibi", "buckets", "rotary"])
def test_lengths(position: str, length: int) -> None:
    """One token, and lengths and widths that are no multiples of anything."""
    layer, inputs = build("gaussian", position, "twicing", 3), tensors(position, length=length)
    for is_causal in (False, True):
        eager = run(layer, inputs, "eager", is_causal=is_causal)
        assert_same(run(layer, inputs, "sdpa", is_causal=is_causal), eager)
    if length == 1:
        torch.testing.assert_close(eager["output"], inputs["value"], **TIGHT)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(
    ("content", "position"),
    [("gaussian", name) for name in ("none", "untied", "gaussian", "alibi", "buckets", "rotary")]
    + [("elliptical", "none")],
)
def test_fewer_key_heads(content: str, position: str, implementation: str) -> None:
    """Grouped queries: each key and value head serves the query heads of its group, in torch's own order."""
    layer = build(content, position, "twicing", 3, heads=6)
    inputs = tensors(position, key_heads=HEADS)
    inputs["query"] = 2 * random(BATCH, 6, LENGTH, KERNELS[position][2])
    if position == "untied":
        inputs["position_states"] = random(1, LENGTH, 6 * WIDTH, seed=3)
    got = run(layer, inputs, implementation, is_causal=True)
    full = {
        **inputs,
        **{name: inputs[name].repeat_interleave(2, 1) for name in ("key", "value", "previous_value")},
    }
    expected = run(layer, full, "eager", is_causal=True)
    for name in ("d key", "d value"):
        expected[name] = expected[name].unflatten(1, (HEADS, 2)).sum(2)
    assert_same(got, expected)
    query, key, value = (inputs[name] for name in ("query", "key", "value"))
    plain = make_filter(heads=6, head_dim=query.shape[-1], learn_bandwidths=False)
    torch_output = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    output, _ = plain(query, key, value, implementation=implementation)
    torch.testing.assert_close(output, torch_output, **TIGHT)


# --------------------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("content,position,boosting,steps")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 2), ("twicing", 3)])
@pytest.mark.parametrize(
    ("content", "position"), [pair for pair in PAIRS if pair[1] not in ("shared", "patches", "rotary patches")]
)
def test_gradcheck(content: str, position: str, boosting: str, steps: int, implementation: str) -> None:
    """Against finite differences: the inputs, the position states and every parameter of the filter."""
    heads, width, length, classes = 2, 2, 4, 1
    layer = build(
        content, position, boosting, steps, heads=heads, head_dim=width, longest_side=3, num_class_tokens=classes
    )
    inputs: Inputs = {
        name: random(1, heads, length, width, seed=seed) for seed, name in enumerate(("query", "key", "value"))
    }
    if position == "untied":
        inputs["position_states"] = random(1, length - classes, heads * width, seed=3)
    constant = {"previous_value": random(1, heads, length, width, seed=4)}
    if position in PLACES:
        constant["coordinates"] = torch.arange(-1, length - 1).double().view(1, length, 1)
        constant["coordinates"] = constant["coordinates"].repeat(1, 1, KERNELS[position][1])
    names, parameters = (list(part) for part in zip(*layer.named_parameters(), strict=True))

    def output(*leaves: torch.Tensor) -> torch.Tensor:
        given = dict(zip(inputs, leaves[: len(inputs)], strict=True))
        own = dict(zip(names, leaves[len(inputs) :], strict=True))
        # No gradient flows through the metric, so that the numerical one must not see it move either.
        shift = given["value"].detach() - inputs["value"]
        moved = {"previous_value": constant["previous_value"] + shift}
        options = {**given, **constant, **moved, "implementation": implementation}
        return torch.func.functional_call(layer, own, args=(), kwargs=options)[0]

    leaves = [leaf.detach().clone().requires_grad_() for leaf in (*inputs.values(), *parameters)]
    assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-7, rtol=1e-6, fast_mode=True)


# --------------------------------------------------------------------------------------------------------------------
# Dropout, weights, implementations
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.sampled("position,implementation")
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("mask", ["none", "left", "dense"])
@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_dropout_of_boosted_filters(position: str, steps: int, mask: str, implementation: str) -> None:
    """One mask for all passes: what a seed leaves of A in one step is what several steps apply again and again."""
    inputs = tensors(position)
    identity = torch.eye(inputs["value"].shape[-2], dtype=torch.float64)
    inputs["value"] = identity.expand(*inputs["value"].shape[:-1], -1)
    applied = []
    for count in (1, steps):
        torch.manual_seed(11)
        layer = build("gaussian", position, "twicing", count)
        applied.append(layer(**inputs, implementation=implementation, dropout=0.4, **masks()[mask])[0])
    dropped, boosted = applied
    expected = identity - torch.linalg.matrix_power(identity - dropped, steps)
    torch.testing.assert_close(boosted, expected, **TIGHT)
    kept, _ = build("gaussian", position, "twicing", 1)(**inputs, implementation="eager", **masks()[mask])
    stays = dropped != 0
    torch.testing.assert_close(dropped[stays], (kept / 0.6)[stays], **TIGHT)
    share = (stays & (kept > 0)).sum() / (kept > 0).sum()
    assert 0.4 < share < 0.8


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["none", "untied", "shared", "gaussian", "patches", "alibi", "buckets"])
def test_dropout_of_plain_filters(position: str, implementation: str) -> None:
    """Entries of A are 0 or A / (1 - p): seen by filtering the identity, and right on average."""
    layer, inputs = build("gaussian", position), tensors(position, length=LENGTH)
    inputs["value"] = torch.eye(LENGTH, dtype=torch.float64)[:, :WIDTH].expand(BATCH, HEADS, -1, -1)
    matrix, _ = layer(**inputs, implementation=implementation)
    torch.manual_seed(0)
    dropped = torch.stack([layer(**inputs, implementation=implementation, dropout=0.25)[0] for _ in range(40)])
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], (matrix / 0.75).expand_as(dropped)[kept], **TIGHT)
    assert 0.72 < kept.double().mean() < 0.78


@pytest.mark.grid(position=POSITIONS, mask=["none", "causal", "right", "dense"], **{"boosting,steps": BOOSTERS})
def test_returned_weights_are_the_operator_that_was_applied(
    position: str, boosting: str, steps: int, mask: str
) -> None:
    """Their product with V is the output, their rows sum to 1; SDPA returns none."""
    layer, inputs = build("dot_product", position, boosting, steps), tensors(position)
    options = {**masks()[mask], "need_weights": True}
    output, operator = layer(**inputs, implementation="eager", **options)
    torch.testing.assert_close(operator @ inputs["value"], output, **TIGHT)
    torch.testing.assert_close(operator.sum(-1), torch.ones_like(operator[..., 0]), **TIGHT)
    assert layer(**inputs, implementation="sdpa", **options)[1] is None
    assert layer(**inputs, implementation="eager", **masks()[mask])[1] is None


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa", "Eager", ""])
def test_other_implementations_are_refused_by_name(name: str) -> None:
    start = f'Specified `attn_implementation="{name}"` is not supported. The only possible arguments are '
    expected = start + '`attn_implementation="eager"`, `attn_implementation="sdpa"`.'
    with pytest.raises(ValueError, match="is not supported. The only possible arguments are") as error:
        check_attn_implementation(name)
    assert str(error.value) == expected
    with pytest.raises(ValueError, match="is not supported. The only possible arguments are"):
        build("gaussian", "none")(**tensors("none"), implementation=name)


@pytest.mark.parametrize("position", ["untied", *PLACES])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_missing_positions_are_one_clear_error(position: str, implementation: str) -> None:
    """A backbone that forgets to pass them must not get an attribute error of ``None``."""
    name = "position_states" if position == "untied" else "coordinates"
    with pytest.raises(ValueError, match=f"^{name} must be given for position_kernel="):
        build("gaussian", position)(**tensors("none"), implementation=implementation)


def test_stock_settings_are_stock_attention() -> None:
    """Dot product, no position kernel, nothing learned: torch's attention to the last bit."""
    layer, inputs = make_filter(learn_bandwidths=False), tensors("none")
    del inputs["previous_value"]
    assert layer.is_stock
    assert list(layer.parameters()) == []
    output, _ = layer(**inputs, implementation="sdpa", is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs.values(), is_causal=True)
    assert torch.equal(output, expected)
