"""What the commands need to know of filtered models of any type (``apply_filter``): telling and describing them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from .backbones import BACKBONES, OF_MODEL_TYPE
from .catalogue.matching import preset_in_words
from .errors import UsageError
from .models.any_attention import PART
from .models.any_filter import filter_arguments, filtered_layers, is_filtered
from .models.any_layer import AppliedFilter
from .models.any_layers import attention_layers
from .models.configuration_imgproc_filtered import FILTERED_MODEL_TYPE
from .models.layer_summary import FilterSummary, filter_summary
from .models.modeling_imgproc_filtered import own_auto_class, stock_class
from .models.spec_axes import PUBLISHED_NEUTRENO_LAMBDAS
from .models.spec_fields import FILTER_FIELDS, FilterSpecMixin


def is_foreign(config: Any) -> bool:
    """Whether a configuration is of a type that no backbone of this package has, filtered or not."""
    model_type = getattr(config, "model_type", None)
    return model_type not in BACKBONES and model_type not in OF_MODEL_TYPE


def auto_class_of(config: Any) -> str:
    """The Auto class that loads the model of a configuration, by the architecture named there; else ``AutoModel``."""
    base = config.base() if config.model_type == FILTERED_MODEL_TYPE else config
    declared = [getattr(transformers, name, None) for name in config.architectures or [] if isinstance(name, str)]
    return own_auto_class(base, declared) or "AutoModel"


def knows(auto_class: str, config: Any) -> bool:
    """Whether an Auto class has a model for a configuration, of a filtered model that of its base."""
    base = config.base() if config.model_type == FILTERED_MODEL_TYPE else config
    return type(base) in getattr(transformers, auto_class)._model_mapping


def is_loaded_by(model: nn.Module, auto_class: str) -> bool:
    """Whether an Auto class has the class of a model, of a type of our own too."""
    known = getattr(transformers, auto_class)._model_mapping.get(type(model.config), None)
    return stock_class(model) in (known if isinstance(known, (tuple, list)) else (known,))


def refuse_what_sees_ahead(model: nn.Module, field: str) -> None:
    """Refuse a model whose tokens see later ones where the next token is to be predicted: it would copy the answer.

    Transformers loads a BERT that is no decoder as a causal language model, and only warns.

    Args:
        model: any of Transformers; one whose attention does not go through the interface is taken as it is.
        field: what it was given as, with the value.

    Raises:
        UsageError: naming the field and the model's type.
    """
    layers = attention_layers(model)
    if layers and not any(getattr(layer.module, "is_causal", True) for layer in layers):
        raise UsageError(
            f"{field} must be a causal language model, got one of type {model.config.model_type} whose tokens see "  # type: ignore[union-attr]
            "later ones, which it would have to predict: set is_decoder to true in its config.json, where its type "
            "has that, or choose another task"
        )


def saved_model_type(model: Any) -> str:
    """The model type under which a model is saved."""
    return FILTERED_MODEL_TYPE if is_filtered(model) else str(model.config.model_type)


def filter_fields(arguments: dict[str, Any]) -> dict[str, Any]:
    """All fields of the filter that ``apply_filter`` was called for, those that are not given at their defaults.

    Args:
        arguments: what it was called with; the chosen layers are ``boosted_layers``, as in models of our own.
    """
    given = {**arguments, "boosted_layers": arguments.get("layers")}
    return {name: given.get(name, getattr(FilterSpecMixin, name)) for name in FILTER_FIELDS}


def in_words(model: PreTrainedModel) -> str:
    """The filter of a filtered model as its preset, with the fields in which it differs from that."""
    axes = 2 if getattr(model, "main_input_name", "") == "pixel_values" else 1
    fields = filter_fields(filter_arguments(model))
    fields["boosted_layers"] = None  # the table of layers tells
    return preset_in_words(SimpleNamespace(**fields, default_neutreno_lambda=PUBLISHED_NEUTRENO_LAMBDAS[axes]))


def recorded_config(model: Any) -> dict[str, Any]:
    """A model's configuration as a run record keeps it: of a filtered one with the fields of its filter."""
    config: dict[str, Any] = model.config.to_dict()
    return {**config, **filter_fields(filter_arguments(model))} if is_filtered(model) else config


def recorded_filter(model: Any) -> dict[str, Any]:
    """What a run record keeps of a filtered model: the stock class, how the filter was applied, and its layers."""
    return {
        "architecture": stock_class(model).__name__,
        "arguments": filter_arguments(model),
        "layers": [{name: str(value) for name, value in row.items()} for row in filtered_layers(model)],
    }


def applied_summary(model: nn.Module) -> FilterSummary:
    """The numbers of the filters of a filtered model, with the layers as the model counts them.

    In a model with several stacks the layers of the later ones follow those of the earlier.
    """
    rows: list[dict[str, Any]] = []
    learned: set[str] = set()
    for first, part in _with_first_layers(model):
        found = filter_summary(part)
        # Where the model's own scale is used, no bandwidth is.
        unused = () if part.scales_by_itself or part.filter.has_metric else ("h_y",)
        rows += [
            {**{name: value for name, value in row.items() if name not in unused}, "layer": first + part.index}
            for row in found.rows
        ]
        learned |= set(found.learned)
    return FilterSummary(rows, sorted(learned))


def _with_first_layers(model: nn.Module) -> Iterator[tuple[int, AppliedFilter]]:
    """Every filter, and how many filtered stacks' layers come before those of its own."""
    parts = []
    for module in model.modules():
        part: Any = getattr(module, PART, None)
        copies = getattr(part, "modules_to_save", None)  # PEFT's wrapper
        if copies is not None:
            active = part.active_adapter
            part = copies[active if isinstance(active, str) else active[0]]
        if isinstance(part, AppliedFilter):
            parts.append(part)
    longest: dict[str, int] = {}
    for part in parts:
        longest[part.stack] = max(longest.get(part.stack, 0), part.index + 1)
    starts = {stack: sum(list(longest.values())[:place]) for place, stack in enumerate(longest)}
    yield from ((starts[part.stack], part) for part in parts)
