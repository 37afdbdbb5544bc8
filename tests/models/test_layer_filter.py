"""One layer's filter: eager against a formula written out here, SDPA against eager, outputs and every gradient."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch

from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.modeling_shared import check_attn_implementation
from tests.models.helpers import make_filter

BATCH, HEADS, LENGTH, WIDTH = 2, 3, 11, 5
GRID = (3, 3)  # beside two class tokens: 11 tokens, rows and columns of patches
TIGHT = {"rtol": 0, "atol": 1e-11}
BOOSTERS = (
    ("none", 2),
    ("twicing", 1),
    ("twicing", 2),
    ("twicing", 3),
    ("learned", 2),
    ("diffusion", 3),
    ("sos", 3),
)
CONTENT = ("dot_product", "gaussian", "elliptical")
# name here -> position kernel, axes of the grid, width of a head that it can have
KERNELS = {
    "none": ("none", 1, WIDTH),
    "untied": ("untied", 1, WIDTH),
    "shared": ("untied", 1, WIDTH),
    "gaussian": ("gaussian", 1, WIDTH),
    "patches": ("gaussian", 2, WIDTH),
    "alibi": ("alibi", 1, WIDTH),
    "alibi patches": ("alibi", 2, WIDTH),
    "buckets": ("relative_buckets", 1, WIDTH),
    "bucket patches": ("relative_buckets", 2, WIDTH),
    "rotary": ("rotary", 1, 6),
    "rotary patches": ("rotary", 2, 8),
}
POSITIONS = tuple(KERNELS)
PLACES = tuple(name for name in POSITIONS if name not in ("none", "untied", "shared"))
PAIRS = tuple(
    (content, position)
    for content, position in itertools.product(CONTENT, POSITIONS)
    if content != "elliptical" or KERNELS[position][0] != "rotary"
)
# Every pair with some boosting; those of the first two content kernels and vectors or Gaussian places with all of it.
CASES = tuple(
    (content, position, boosting, steps)
    for (content, position), (boosting, steps) in itertools.product(PAIRS, BOOSTERS)
    if (content != "elliptical" and KERNELS[position][0] in ("none", "untied", "gaussian"))
    or (boosting, steps) in (("none", 2), ("twicing", 3))
)
CONSTANT = ("coordinates", "previous_value")  # no gradient flows into them
Inputs = dict[str, Any]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(content: str, position: str, boosting: str = "none", steps: int = 2, **options: Any) -> AttentionFilter:
    """A filter of :data:`KERNELS`; ``shared`` is ``untied`` with the model's projections."""
    kernel, axes, width = KERNELS[position]
    fixed: dict[str, Any] = {"share_position_projections": True} if position == "shared" else {}
    if kernel == "relative_buckets":  # few enough that offsets share some
        fixed |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
    return make_filter(
        content, kernel, boosting, steps, **{**fixed, "position_axes": axes, "head_dim": width, **options}
    )


def tensors(
    position: str, *, classes: int = 0, key_heads: int = HEADS, rows: int = 1, length: int = LENGTH, batch: int = BATCH
) -> Inputs:
    """Asymmetric inputs with logits of std about 2 and what the position kernel compares, for ``rows`` rows."""
    _, axes, width = KERNELS[position]
    inputs: Inputs = {
        "query": 2 * random(batch, HEADS, length, width) + 0.3,
        "key": 1.5 * random(batch, key_heads, length, width, seed=1) - 0.2,
        "value": random(batch, key_heads, length, width, seed=2) + 0.1,
        "previous_value": 0.5 * random(batch, key_heads, length, width, seed=4) + 0.2,
    }
    if position == "untied":
        inputs["position_states"] = random(rows, length - classes, HEADS * WIDTH, seed=3)
    if position == "shared":
        inputs["position_states"] = 1.4 * random(rows, HEADS, length - classes, 2 * WIDTH, seed=3)
    if position in PLACES and axes == 1:
        inputs["coordinates"] = torch.stack([torch.arange(length) * (row + 1) - 4 for row in range(rows)]).unsqueeze(
            -1
        )
    if position in PLACES and axes == 2:
        grid = torch.cartesian_prod(*(torch.arange(side) - (side - 1) / 2 for side in GRID))
        grid = torch.cat((torch.zeros(length - len(grid), 2), grid))
        inputs["coordinates"] = torch.stack([grid * (row + 1) for row in range(rows)])
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].double()
        inputs["coordinates"][:, :classes] = 0
    return inputs


def masks(length: int = LENGTH) -> dict[str, dict[str, Any]]:
    """Keyword arguments of the filter for every kind of mask."""
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    left = torch.ones(BATCH, 1, 1, length, dtype=torch.bool)
    left[0, ..., :4] = False
    right = torch.ones(BATCH, 1, 1, length, dtype=torch.bool)
    right[1, ..., -3:] = False
    dense = torch.rand(BATCH, HEADS, length, length, generator=torch.Generator().manual_seed(7)) < 0.6
    dense[..., 0] = True
    low = torch.finfo(torch.float64).min
    return {
        "none": {},
        "causal": {"is_causal": True},
        "left": {"attention_mask": left & causal, "is_causal": True},
        "right": {"attention_mask": right & causal, "is_causal": True},
        "keys": {"attention_mask": right},
        "dense": {"attention_mask": dense},
        "additive": {"attention_mask": torch.zeros(dense.shape).double().masked_fill(~dense, low)},
        "bias": {"attention_mask": random(1, HEADS, length, length, seed=8).masked_fill(~dense[:1], low)},
    }


MASKS = tuple(masks())


def run(
    layer: AttentionFilter, inputs: Inputs, implementation: str, upstream: torch.Tensor | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    """The output and the gradient of everything that can have one, for a random or a given upstream gradient."""
    leaves = {name: value.detach().clone() for name, value in inputs.items()}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name not in CONSTANT)
    layer.zero_grad()
    output, weights = layer(**leaves, implementation=implementation, **options)
    output.backward((random(*output.shape, seed=9) if upstream is None else upstream).to(output.dtype))
    results = {"output": output.detach()}
    if weights is not None:
        results["weights"] = weights.detach()
    results |= {f"d {name}": leaf.grad for name, leaf in leaves.items() if name not in CONSTANT}
    results |= {f"d {name}": parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return results


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, msg=lambda text, name=name: f"{name}: {text}", **TIGHT)


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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("content", "position", "boosting", "steps"), [c for c in CASES if c[0] != "dot_product"])
def test_no_gradient_and_no_output_from_later_tokens(
    content: str, position: str, boosting: str, steps: int, implementation: str
) -> None:
    """Causality by perturbation: token t changes no output before t and every output from t on."""
    layer, inputs = build(content, position, boosting, steps), tensors(position)
    before, _ = layer(**inputs, implementation=implementation, is_causal=True)
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, 6] += 1.0
    if position == "untied":
        changed["position_states"][:, 6] = changed["position_states"][:, 6].flip(-1)
    after, _ = layer(**changed, implementation=implementation, is_causal=True)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6], rtol=0, atol=1e-14)
    assert (after - before)[:, :, 6:].abs().amax((0, 1, 3)).min() > 1e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_hidden_keys_have_no_influence(position: str, implementation: str, dtype: torch.dtype) -> None:
    """What a mask hides may hold anything, huge numbers too."""
    layer, inputs = build("gaussian", position, "twicing", 3), tensors(position)
    mask = masks()["left"]["attention_mask"]
    given = (
        mask if dtype == torch.bool else torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(dtype).min)
    )
    before = layer(**inputs, implementation=implementation, attention_mask=given)[0]
    inputs["key"][0, :, :4] *= 50
    inputs["value"][0, :, :4] = 1e9
    after = layer(**inputs, implementation=implementation, attention_mask=given)[0]
    torch.testing.assert_close(after[0, :, 4:], before[0, :, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Rows that see nothing, masks of other dtypes
# --------------------------------------------------------------------------------------------------------------------

MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", ["boolean", "smallest", "infinity"])
@pytest.mark.parametrize("position", ["none", "untied", "gaussian", "patches", "alibi", "bucket patches", "rotary"])
def test_rows_that_see_nothing_are_zero(position: str, hidden: str, dtype: torch.dtype, grad: bool) -> None:
    """As in the reference: 0, no NaN, no gradient; not an average over keys that the row may not see."""
    layer = build("gaussian", position, "twicing", 2).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["left"]["attention_mask"]
    if hidden != "boolean":
        low = torch.finfo(dtype).min if hidden == "smallest" else float("-inf")
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    for tensor in (inputs["query"], inputs["key"], inputs["value"]):
        tensor.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for implementation in ("eager", "sdpa"):
            output, _ = layer(**inputs, implementation=implementation, attention_mask=mask)
            assert output.isfinite().all()
            assert (output[0, :, :4] == 0).all(), f"{implementation}: {output[0, :, :4].abs().max()}"
            if grad:
                output.float().sum().backward()
                gradients = [inputs[name].grad for name in ("query", "key", "value")]
                gradients += [parameter.grad for parameter in layer.parameters()]
                assert all(gradient.isfinite().all() for gradient in gradients)
                assert (gradients[0][0, :, :4] == 0).all()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", ["none", "gaussian", "patches", "alibi", "buckets", "rotary"])
def test_masks_of_any_dtype(position: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """The dtype of an additive mask need not be the query's: eager takes it, so does SDPA, and they agree."""
    layer = build("gaussian", position, "twicing", 2).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["dense"]["attention_mask"]
    if mask_dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=mask_dtype).masked_fill(~mask, torch.finfo(mask_dtype).min)
    eager, _ = layer(**inputs, implementation="eager", attention_mask=mask)
    sdpa, _ = layer(**inputs, implementation="sdpa", attention_mask=mask)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=tolerance)


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_additive_masks_add_to_every_kernel(position: str, dtype: torch.dtype, learns: bool) -> None:
    """A bias a head beside hidden keys, in every form that the position kernel takes."""
    layer = build("dot_product", position, "twicing", 2, learn_bandwidths=learns).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["bias"]["attention_mask"]
    mask = torch.where(mask < -1e300, torch.finfo(dtype).min, mask).to(dtype)
    eager, _ = layer(**inputs, implementation="eager", attention_mask=mask)
    sdpa, _ = layer(**inputs, implementation="sdpa", attention_mask=mask)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=tolerance)
    without, _ = layer(**inputs, implementation="eager", attention_mask=masks()["bias"]["attention_mask"] > -1e300)
    assert (eager - without).abs().max() > 0.3


# --------------------------------------------------------------------------------------------------------------------
# Gradients
# --------------------------------------------------------------------------------------------------------------------


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
    assert torch.autograd.gradcheck(output, leaves, eps=1e-6, atol=1e-7, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------------
# Dropout, weights, implementations
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Scalars keep their precision
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cast",
    [
        lambda layer: layer.half(),
        lambda layer: layer.bfloat16(),
        lambda layer: layer.to(torch.float16),
        lambda layer: layer.to(dtype=torch.bfloat16),
        lambda layer: layer.half().float(),
        lambda layer: layer.half().bfloat16(),
        lambda layer: copy.deepcopy(layer).half(),
    ],
    ids=["half", "bfloat16", "to float16", "to bfloat16", "there and back", "twice", "copied"],
)
def test_scalars_stay_in_float32(cast: Any) -> None:
    """Casting the model does not round bandwidths and class-token logits; the projections are cast."""
    layer = build("gaussian", "untied", num_class_tokens=1).float()
    before = {name: parameter.detach().clone() for name, parameter in layer.scalar_bias.named_parameters()}
    assert len(before) == 3
    layer = cast(layer)
    for name, parameter in layer.scalar_bias.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.requires_grad


def test_scalars_follow_to_float64_and_back() -> None:
    layer = build("gaussian", "gaussian").float()
    before = layer.scalar_bias.position_log_bandwidth.detach().clone()
    assert layer.double().scalar_bias.position_log_bandwidth.dtype == torch.float64
    assert torch.equal(layer.half().scalar_bias.position_log_bandwidth, before)


def test_scalars_cast_with_their_gradient_can_be_trained() -> None:
    """A model that is cast after a backward pass keeps these gradients, in the parameters' dtype."""
    layer, inputs = build("gaussian", "gaussian").float(), tensors("gaussian")
    layer(**{name: tensor.float() for name, tensor in inputs.items()}, implementation="sdpa")[0].sum().backward()
    before = [parameter.grad.clone() for parameter in layer.scalar_bias.parameters()]
    layer.bfloat16()
    for parameter, gradient in zip(layer.scalar_bias.parameters(), before, strict=True):
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert torch.equal(parameter.grad, gradient)
    torch.optim.AdamW(layer.parameters()).step()


def test_names_keep_scalars_out_of_weight_decay() -> None:
    """``Trainer`` leaves parameters with "bias" in their name alone."""
    layer = build("gaussian", "untied", num_class_tokens=1)
    scalars = [name for name, parameter in layer.named_parameters() if parameter.shape[0] == HEADS]
    assert len(scalars) == 3
    assert all("bias" in name for name in scalars)


# --------------------------------------------------------------------------------------------------------------------
# Half precision
# --------------------------------------------------------------------------------------------------------------------


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square of the error over that of the exact values."""
    return float((got.detach().double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


HALF_PAIRS = [
    *itertools.product(("dot_product", "gaussian"), ("none", "shared", "gaussian", "rotary")),
    *itertools.product(("elliptical",), ("none", "alibi")),
    *itertools.product(("dot_product",), ("alibi", "buckets")),
]


def half_inputs(position: str, dtype: torch.dtype) -> Inputs:
    """Inputs that ``dtype`` holds exactly, 129 tokens of width 32, logits of std 2."""
    length, width = 129, 32
    inputs: Inputs = {
        name: random(1, HEADS, length, width, seed=i) for i, name in enumerate(("query", "key", "value"))
    }
    inputs["query"] *= 2
    if position == "shared":
        inputs["position_states"] = random(1, HEADS, length, 2 * width, seed=3)
    inputs["previous_value"] = 0.5 * random(1, HEADS, length, width, seed=4)
    inputs = {name: tensor.to(dtype).double() for name, tensor in inputs.items()}
    if position in PLACES:
        inputs["coordinates"] = (torch.arange(length) - length // 2).double().view(1, -1, 1)
    return inputs


def plain_errors(inputs: Inputs, upstream: torch.Tensor, dtype: torch.dtype, is_causal: bool) -> dict[str, float]:
    """Errors of torch's own attention in ``dtype`` on the same query, key and value: output and gradients."""
    results = []
    for precision in (dtype, torch.float64):
        leaves = {n: inputs[n].to(precision, copy=True).requires_grad_() for n in ("query", "key", "value")}
        output = torch.nn.functional.scaled_dot_product_attention(*leaves.values(), is_causal=is_causal)
        output.backward(upstream.to(precision))
        results.append({"output": output.detach()} | {f"d {name}": leaf.grad for name, leaf in leaves.items()})
    return {name: relative_error(results[0][name], results[1][name]) for name in results[0]}


@torch.no_grad()
def bandwidth_direction(layer: AttentionFilter, inputs: Inputs, is_causal: bool) -> torch.Tensor:
    """How the exact output moves with log h: this upstream gradient makes a gradient of h that does not cancel."""
    ends = []
    for step in (1e-5, -1e-5):
        moved = copy.deepcopy(layer)
        for parameter in moved.scalar_bias.parameters():
            parameter.add_(step)
        ends.append(moved(**inputs, implementation="eager", is_causal=is_causal)[0])
    direction = ends[0] - ends[1]
    return direction / direction.square().mean().sqrt()


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 2), ("twicing", 3)])
@pytest.mark.parametrize(("content", "position"), HALF_PAIRS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_costs_little_more_than_in_plain_attention(
    dtype: torch.dtype, content: str, position: str, boosting: str, steps: int, learns: bool
) -> None:
    """Errors against float64, in units of the error of torch's attention in the same dtype.

    Bounds, with the largest value measured over six seeds in brackets. SDPA: output 2 (1.9) for one pass, 2.6 (2.5)
    boosted; gradients of query, key and value 2 (1.9). What exceeds 1 in one pass is the rounding of the query after
    it was scaled. Gradient of the bandwidths: the dtype's epsilon, 0.8 % (0.5 %) in bfloat16, 0.1 % (0.08 %) in
    float16. Eager computes in float32 and rounds once: 1.0 (0.94). Rotary rounds both query and key after the turn, in
    every implementation: output 3 (2.8) for one pass, 4 (3.6) boosted, gradients 3.2 (3.0), eager 2.8 (2.7).
    """
    is_causal = steps != 2
    inputs = half_inputs(position, dtype)
    options = {"head_dim": 32, "longest_side": 129, "learn_bandwidths": learns}
    layer = build(content, position, boosting, steps, **options).to(dtype).double()
    upstream = bandwidth_direction(layer, inputs, is_causal) if learns else random(*inputs["query"].shape, seed=9)
    upstream = upstream.to(dtype)
    plain = plain_errors(inputs, upstream, dtype, is_causal)
    exact = run(layer, inputs, "eager", upstream, is_causal=is_causal)
    coordinates = {"coordinates": inputs["coordinates"].float()} if position in PLACES else {}
    given = {name: tensor.to(dtype) for name, tensor in inputs.items()} | coordinates
    layer = layer.to(dtype)
    got = run(layer, given, "sdpa", upstream, is_causal=is_causal)
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    one_pass, boosted, gradient, dense = (3, 4, 3.2, 2.8) if position == "rotary" else (2, 2.6, 2, 1)
    assert errors["output"] <= (one_pass if boosting == "none" else boosted) * plain["output"]
    for name in ("d query", "d key", "d value"):
        assert errors[name] <= gradient * plain[name], name
    for name, error in errors.items():
        if "bandwidth" in name:
            assert error <= torch.finfo(dtype).eps, name
    eager, _ = layer(**given, implementation="eager", is_causal=is_causal)
    assert relative_error(eager, exact["output"]) <= dense * plain["output"]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize(("content", "position"), HALF_PAIRS)
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_is_as_accurate_as_half_precision(
    given: torch.dtype, content: str, position: str, grad: bool
) -> None:
    """Autocast runs SDPA in bfloat16 whatever comes in: columns must be made for the dtype that SDPA will see."""
    inputs = half_inputs(position, torch.bfloat16)
    plain = plain_errors(inputs, inputs["value"], torch.bfloat16, is_causal=True)
    layer = build(content, position, head_dim=32, longest_side=129).to(torch.bfloat16).double()
    exact, _ = layer(**inputs, implementation="eager", is_causal=True)
    leaves = {name: tensor.to(torch.float32 if name == "coordinates" else given) for name, tensor in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(grad):
        output, _ = layer.float()(**leaves, implementation="sdpa", is_causal=True)
    assert relative_error(output.detach(), exact.detach()) <= (3 if position == "rotary" else 2) * plain["output"]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", ["none", "shared", "gaussian", "alibi", "buckets", "rotary"])
def test_autocast_leaves_float64_alone(position: str, implementation: str) -> None:
    """As it does in torch's own operations."""
    layer, inputs = build("gaussian", position, "twicing", 2), tensors(position)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = layer(**inputs, implementation=implementation)
    torch.testing.assert_close(output, layer(**inputs, implementation="eager")[0], **TIGHT)
