"""Position kernels inside the blocks of attention, against the same kernels as dense logits and autograd.

Blocks of 8 rows and groups of 2 pairs, so that a few dozen tokens cross several of both.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked_dense import dense_dropout_factors
from hf_imgproc_attn.models.backend_blocked_plan import make_plan
from hf_imgproc_attn.models.boost_operators import BOOSTING, extra_streams
from hf_imgproc_attn.models.kernel_position import BlockedPositions, ClassTokens, GaussianPositions, position_logits
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from tests.models.helpers import blocked_filter, dense_matrix, dropout_seed

BATCH, LENGTH, WIDTH, VALUE_WIDTH, SCALE = 2, 19, 5, 4, 0.6
EXACT = {"rtol": 1e-12, "atol": 1e-12}

FACTORS: dict[str, tuple[Any, ...]] = {
    "kernel": ("gaussian", "alibi", "buckets"),
    "axes": (1, 2),
    "is_causal": (True, False),
    "booster": (("none", 1), ("twicing", 2), ("sos", 3), ("diffusion", 3), ("learned", 2)),
    "mask": ("none", "padding", "full", "float"),
    "dropout": (0.0, 0.3),
    "heads": ((3, 3), (6, 2)),
    "classes": (0, 2),
    "places": ("shared", "own", "own queries"),
    "queries": (LENGTH, 6, 1),
    "cutting": ({"block_rows": 8, "group_pairs": 2}, {}, {"block_rows": 5, "group_pairs": 12}),
    "bias": (False, True),
}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Value = tuple[str, int]
"""A factor, and the place of one of its values."""


def newly_met(value: Value, chosen: list[Value], missing: set[frozenset[Value]]) -> int:
    return sum(frozenset((value, other)) in missing for other in chosen)


def pairwise(factors: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Few cases in which every two values of two factors meet: greedily, the value that meets most new ones."""
    columns = [[(name, index) for index in range(len(values))] for name, values in factors.items()]
    missing = {
        frozenset(pair)
        for first, second in itertools.combinations(columns, 2)
        for pair in itertools.product(first, second)
    }
    cases = []
    while missing:
        chosen = sorted(min(missing, key=sorted))
        for column in columns:
            if not set(column) & set(chosen):
                scores = [newly_met(value, chosen, missing) for value in column]
                chosen.append(column[scores.index(max(scores))])
        missing -= {frozenset(pair) for pair in itertools.combinations(chosen, 2)}
        cases.append({name: factors[name][index] for name, index in sorted(chosen, key=lambda item: item[0])})
    return cases


def make_mask(kind: str, heads: int, length: int) -> torch.Tensor | None:
    """Masks of every form; the full ones have rows that see nothing."""
    shapes = {"padding": (BATCH, 1, 1, LENGTH), "full": (BATCH, heads, length, LENGTH), "float": (length, LENGTH)}
    if kind == "none":
        return None
    seen = random(*shapes[kind], seed=7) > -0.5
    if kind == "padding":
        seen[0, ..., :2] = False
    elif kind == "full":
        seen[1, 2, length // 2] = False
    return seen if kind != "float" else torch.where(seen, random(*seen.shape, seed=8), float("-inf"))


def make_places(kind: str, axes: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer coordinates of queries and keys, for all rows of the batch or for each."""
    places = torch.arange(LENGTH).view(1, -1, 1) if axes == 1 else torch.cartesian_prod(*[torch.arange(5)] * 2)[None]
    keys = places[:, :LENGTH].double()
    if kind != "shared":
        keys = torch.cat((keys, keys * 2 - 7))
    queries = keys[:, LENGTH - length :]
    if kind == "own queries":
        keys = keys[:1] + 1
    return queries, keys


def make_positions(
    kernel: str, axes: int, heads: int, *, places: str = "shared", queries: int = LENGTH, classes: int = 0
) -> BlockedPositions:
    """A kernel whose logits are of the size of the content's, with parameters that need a gradient."""
    coordinates = make_places(places, axes, queries)
    class_tokens = ClassTokens(classes, random(heads, 3, seed=30).requires_grad_()) if classes else None
    parameter = (0.2 + random(heads, 1, 1, seed=31).abs() / 5).requires_grad_()
    if kernel == "gaussian":
        return GaussianPositions(*coordinates, parameter, class_tokens, 1.0, True, False)
    if kernel == "alibi":
        return AlibiPositions(*coordinates, parameter, class_tokens, 1.0, False, False)
    table = random(heads, axes, 8, seed=32).requires_grad_()
    return BucketPositions(*coordinates, table, class_tokens, bucket_boundaries(4, 9), True)


class Sides(NamedTuple):
    """Output and streams, and the leaves."""

    results: list[torch.Tensor]
    leaves: list[torch.Tensor]

    def gradients(self, create_graph: bool = False) -> list[torch.Tensor]:
        directions = [random(*result.shape, seed=20 + index) for index, result in enumerate(self.results)]
        options = {"retain_graph": True, "create_graph": create_graph}
        return list(torch.autograd.grad(self.results, self.leaves, directions, **options))


def copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def dense(case: dict[str, Any], tensors: list[torch.Tensor], positions: BlockedPositions) -> Sides:
    """The same with a dense A, formed by ``position_logits`` and differentiated by autograd."""
    leaves = copies([*tensors, *positions.parameters()])
    count = len(tensors)
    query, key, value, *rest = leaves[:count]
    bias = rest.pop(0) if case["bias"] else 0.0
    positions = positions.with_parameters(*leaves[count:])
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.shape[-2]
    logits = query @ key.mT * SCALE + bias + position_logits(positions, torch.float64)
    if case["is_causal"]:
        logits = logits.masked_fill(
            torch.ones(length, LENGTH, dtype=torch.bool).triu(LENGTH - length + 1), float("-inf")
        )
    mask = make_mask(case["mask"], query.shape[1], length)
    if mask is not None and mask.dtype != torch.bool:
        logits, mask = logits + mask.masked_fill(mask.isinf(), 0.0), ~mask.isinf()
    seen = logits > float("-inf")
    matrix = dense_matrix(logits, seen if mask is None else seen & mask)
    if case["dropout"]:
        one_pass = case["is_causal"] or case["booster"][1] == 1
        plan = make_plan(
            query, tensors[1], is_causal=case["is_causal"], scale=SCALE, dropout=case["dropout"], seed=dropout_seed(5),
            one_pass=one_pass, **case["cutting"],
        )  # fmt: skip
        matrix = matrix * dense_dropout_factors(plan, query)
    streams: list[torch.Tensor] = []

    def extend(index: int, rows: torch.Tensor) -> torch.Tensor:
        streams.append(rows)
        return torch.cat((rest[index], rows), dim=2) if rest else rows

    boosting, steps = case["booster"]
    own = value[:, :, LENGTH - length :]
    output = BOOSTING[boosting](lambda stream: matrix @ stream, extend, own, value, steps)
    return Sides([output, *streams], leaves)


def blocked(case: dict[str, Any], tensors: list[torch.Tensor], positions: BlockedPositions) -> Sides:
    leaves = copies([*tensors, *positions.parameters()])
    count = len(tensors)
    query, key, value, *rest = leaves[:count]
    bias = rest.pop(0) if case["bias"] else None
    boosting, steps = case["booster"]
    output, streams = blocked_filter(
        query,
        key,
        value,
        attention_mask=make_mask(case["mask"], query.shape[1], query.shape[2]),
        bias=bias,
        positions=positions.with_parameters(*leaves[count:]),
        is_causal=case["is_causal"],
        scale=SCALE,
        dropout=case["dropout"],
        seed=5,
        boosting=boosting,
        steps=steps,
        past=rest,
        **case["cutting"],
    )
    return Sides([output, *streams], leaves)


CASES = pairwise(FACTORS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_positions_in_blocks_are_the_dense_logits(case: dict[str, Any]) -> None:
    """Output, streams and every gradient, those of the parameters included, in float64."""
    (heads, key_heads), length = case["heads"], case["queries"]
    tensors = [
        2 * random(BATCH, heads, length, WIDTH, seed=0),
        random(BATCH, key_heads, LENGTH, WIDTH, seed=1),
        random(BATCH, key_heads, LENGTH, VALUE_WIDTH, seed=2),
    ]
    if case["bias"]:
        tensors.append(random(1, heads, length, LENGTH, seed=3))
    if length < LENGTH:
        past = LENGTH - length
        tensors += [
            random(BATCH, heads, past, VALUE_WIDTH, seed=4 + m) for m in range(extra_streams(*case["booster"]))
        ]
    options = {"places": case["places"], "queries": length, "classes": case["classes"]}
    positions = make_positions(case["kernel"], case["axes"], heads, **options)
    ours, expected = blocked(case, tensors, positions), dense(case, tensors, positions)
    torch.testing.assert_close(ours.results, expected.results, **EXACT)
    gradients = expected.gradients()
    torch.testing.assert_close(ours.gradients(), gradients, **EXACT)
    # Gradients that can be differentiated themselves are computed densely.
    torch.testing.assert_close(ours.gradients(create_graph=True), gradients, **EXACT)


def test_every_pair_of_options_meets() -> None:
    for a, b in itertools.combinations(FACTORS, 2):
        for left, right in itertools.product(FACTORS[a], FACTORS[b]):
            assert any(case[a] == left and case[b] == right for case in CASES)
