"""The lens: see what a trained attention filters. ``hf_imgproc_attn.lens(model, inputs)`` returns a ``Report``.

The package is the function: ``lens`` is a name for both, whichever is imported first. Nothing heavy is imported here.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .options import LensOptions
    from .report import HeadReport, LayerReport, Report
    from .run import inspect_model

__all__ = ["HeadReport", "LayerReport", "LensOptions", "Report", "inspect_model"]

_MODULE_OF = {
    "HeadReport": ".report",
    "LayerReport": ".report",
    "LensOptions": ".options",
    "Report": ".report",
    "inspect_model": ".run",
}


def __getattr__(name: str) -> Any:
    if name == "lens":
        return sys.modules[__name__]
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name], __name__), name)


class _Lens(types.ModuleType):
    """A module that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        """See :func:`hf_imgproc_attn.lens.run.inspect_model`."""
        from .run import inspect_model

        return inspect_model(*args, **kwargs)


sys.modules[__name__].__class__ = _Lens
