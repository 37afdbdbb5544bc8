"""One layer's filter with random inputs: builders, masks and inputs that the tests of `layer_filter` share."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from hf_imgproc_attn.models.layer_filter import AttentionFilter
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
    layer: AttentionFilter,
    inputs: Inputs,
    implementation: str,
    upstream: torch.Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> dict[str, torch.Tensor]:
    """The output and the gradient of everything that can have one, for a random or a given upstream gradient."""
    layer._config.filter_backend = backend
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
