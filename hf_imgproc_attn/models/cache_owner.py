"""Whose rows a cache layer keeps: a filter may go on with its own, or with those of a copy of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class CacheOwner:
    """The layer of a model whose rows a cache layer keeps: another model with the same filter must not go on there.

    A copy of a cache has the same owner. One that is pickled does not know its owner any more, as is the model in
    another process, where it may go on.

    Args:
        module: the attention module. A cache keeps no model alive.
        places: which layers of the stack have the filter.
    """

    def __init__(self, module: nn.Module, places: tuple[int, ...] = ()) -> None:
        self._module: Callable[[], nn.Module | None] = weakref.ref(module)
        self._places = places

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheOwner:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _nobody, ()

    def differs_from(self, other: CacheOwner) -> str | None:
        """How the rows of this layer are not those of another one, in words; None if they may be."""
        mine, theirs = self._module(), other._module()
        if mine is None or theirs is None:
            return None
        if self._places != other._places:
            return f"with the filter in layers {_listed(self._places)} (here {_listed(other._places)})"
        return None if mine is theirs or _same_weights(mine, theirs) else "by another model"


def _nobody() -> None:
    return None


def _listed(places: tuple[int, ...]) -> str:
    return ", ".join(map(str, places))


def _same_weights(mine: nn.Module, theirs: nn.Module) -> bool:
    """Whether two layers are copies of one; tensors that are elsewhere, as when offloaded, are not compared."""
    first, second = mine.state_dict(), theirs.state_dict()
    if first.keys() != second.keys():
        return False
    return all(
        tensor.is_meta
        or second[name].is_meta
        or (tensor.dtype == second[name].dtype and torch.equal(tensor, second[name].to(tensor.device)))
        for name, tensor in first.items()
    )
