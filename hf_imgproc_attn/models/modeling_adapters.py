"""A fault of Transformers 5.17, the oldest supported version, in loading adapters, mended for models with filters.

A folder of an adapter has the numbers of a filter under the names that they have in the model; in a model with that
adapter they are in PEFT's copy of the module (``modules_to_save``), under longer names. Later versions rename them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers.core_model_loading import WeightRenaming


def load_with_copies(load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A model class's ``_load_pretrained_model``, which finds what PEFT's copies of modules are called in files.

    Args:
        load: the stock function.
        *args: what it is given; where an adapter is loaded, model and settings come by name.
        **kwargs: the same.
    """
    model, settings = kwargs.get("model"), kwargs.get("load_config")
    if model is not None and settings is not None:
        known = list(settings.weight_mapping or ())
        sources = [source for each in known for source in each.source_patterns]
        lost = [WeightRenaming(name, to) for name, to in _names_of_copies(model) if name not in sources]
        kwargs["load_config"] = replace(settings, weight_mapping=[*known, *lost])
    return load(*args, **kwargs)


def _names_of_copies(model: nn.Module) -> Iterator[tuple[str, str]]:
    """In a file -> in the model: each tensor of the copies that belong to the adapter that was added last."""
    for name, module in model.named_modules():
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and len(copies):
            adapter = list(copies)[-1]
            for tensor in copies[adapter].state_dict():
                yield f"{name}.{tensor}", f"{name}.modules_to_save.{adapter}.{tensor}"
