"""What padding costs: twicing on batches with and without it, and with the mask that other models hand to a filter.

Texts fill 7/8 of their rows, or in turn 3/4. The work that is left is less than that of full rows, so that a ratio
above 1 is the price of knowing what is hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from ...models.backend_call import Booster, Content, FilterCall
from ...models.backend_table import run_filter
from ...models.visibility import Visibility, attention_visibility, causal_mask, padding_visibility
from .attention import Shape
from .methods import padding
from .timing import Row, direction_rows

NONE = "no padding"
SHAPES = (
    Shape(2, 12, 1024),
    Shape(16, 12, 197, is_causal=False),
    Shape(16, 4, 64),
    Shape(16, 4, 64, is_causal=False),
)
"""GPT-2, ViT-B at 224 pixels, and samples that are short."""
QUICK = (Shape(2, 2, 24), Shape(2, 2, 9, is_causal=False))


def ways(shape: Shape) -> dict[str, Callable[[], Visibility]]:
    """Where padding is -> what a layer is told of it.

    A model finds out about its padding once for all layers, so that this is given. A mask of all pairs is looked at by
    every layer.

    Args:
        shape: of the comparison.
    """
    length, is_causal = shape.length, shape.is_causal
    right = padding(torch.empty(shape.size))
    sides = {"on the right": right, "on the left": right.flip(-1)}
    found = {name: padding_visibility(keys, length, is_causal) for name, keys in sides.items()}
    places: dict[str, Callable[[], Visibility]] = {NONE: lambda: Visibility(length, length, is_causal)}
    places |= {name: partial(Visibility, *seen) for name, seen in found.items()}
    pairs = right.expand(-1, -1, length, -1)
    if is_causal:
        pairs = pairs & causal_mask(length, length, right.device)
    places["on the right, as a mask of all pairs"] = lambda: attention_visibility(
        pairs, shape=(*shape.size[:3], length)
    )
    return places


def run_padded(shape: Shape, *, budget: float, say: Callable[[str], None] = print) -> Iterator[Row]:
    """Time twicing with all kinds of padding on one shape.

    Args:
        shape: of the comparison.
        budget: seconds for all rounds of a direction.
        say: told what is being timed.
    """
    generator = torch.Generator().manual_seed(0)
    *leaves, gradient = torch.randn((4, *shape.size), generator=generator)
    query, key, value = (leaf.requires_grad_() for leaf in leaves)
    content = Content("dot_product", shape.head_dim**-0.5)

    def attend(seen: Callable[[], Visibility]) -> torch.Tensor:
        return run_filter(FilterCall(query, key, value, content, seen(), booster=Booster("twicing", 2)), "auto")

    attentions = {name: partial(attend, seen) for name, seen in ways(shape).items()}
    place = ("padding", shape.name(torch.float32), shape.length)
    yield from direction_rows(place, attentions, NONE, (query, key, value), gradient, budget=budget, say=say)
