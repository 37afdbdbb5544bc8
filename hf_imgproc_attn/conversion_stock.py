"""A model of ours with stock attention as the stock model that it is, for processes that know nothing of filters."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .backbones import of_config
from .conversion_source import head_of, optional_parts
from .models.spec_fields import FILTER_FIELDS

_SAID_BY_THE_CLASS = ("model_type", "architectures", "auto_map", "transformers_version", "filter_spec_version")


def in_stock_class(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights in Transformers' own class; its checkpoint needs neither this package nor its code.

    Args:
        model: one of ours with the preset ``softmax``, whose parameters have the stock names.

    Returns:
        The stock model in evaluation mode, with tensors of its own, in the model's dtype.

    Raises:
        ValueError: for a class that Transformers does not have, or a field that its configuration does not have and
            that is not at its default.
    """
    head, row = head_of(type(model)), of_config(model.config)
    if head.stock is None:
        raise ValueError(
            f"{type(model).__name__} has no stock class in Transformers: convert without filtered=True (--filtered)"
        )
    config = _stock_config(model.config, row.stock_class(row.stock_config))
    if model.config._attn_implementation in ("eager", "sdpa"):
        config._attn_implementation = model.config._attn_implementation
    state = model.state_dict()
    stock: Any = row.stock_class(head.stock)(config, **(optional_parts(row, set(state)) if head.has_parts else {}))
    stock.load_state_dict(state)
    if getattr(model, "generation_config", None) is not None:
        stock.generation_config = model.generation_config
    return stock.to(model.dtype).eval()


def _stock_config(config: Any, stock_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The fields that the stock configuration has.

    Raises:
        ValueError: for another one that says something.
    """
    fields, known, defaults = config.to_dict(), stock_class().to_dict(), type(config)().to_dict()
    for name in (*_SAID_BY_THE_CLASS, *FILTER_FIELDS):
        fields.pop(name, None)
    for name, value in fields.items():
        if name not in known and not name.startswith("_") and value != defaults.get(name):
            raise ValueError(f"{name}={value!r} is no field of {stock_class.__name__}, which would lose it")
    return stock_class(**{name: value for name, value in fields.items() if name in known})
