"""Triton's interpreter in half of its time: importing this changes it, in processes that test kernels.

It does the same, but once: in each call of a device function, Triton looks through all that ``triton.language`` holds
for what the interpreter's functions have to take the place of, and finds that they are there since the launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from triton import language
from triton.runtime import interpreter

_put_in_place: Callable[[Any], Any] = interpreter._patch_lang
_done: set[Any] = set()
"""The modules in which the interpreter's functions are."""


class _Changes:
    """What a launch has to take back at its end; a call inside it, nothing."""

    def __init__(self, changes: Any = None) -> None:
        self._changes = changes

    def restore(self) -> None:
        if self._changes is not None:
            _done.clear()
            self._changes.restore()


@functools.cache
def _modules_of(function: Any) -> frozenset[str]:
    known = (language, language.core)
    return frozenset(each.__name__ for each in known if any(each is value for value in function.__globals__.values()))


def _put_in_place_once(function: Any) -> _Changes:
    modules = _modules_of(function)
    if modules and modules <= _done:
        return _Changes()
    changes = _put_in_place(function)
    _done.update(modules)
    return _Changes(changes)


interpreter._patch_lang = _put_in_place_once
