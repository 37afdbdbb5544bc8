"""What a conversion starts from: a stock model of a backbone, or a variant, in memory, in a folder or on the Hub."""

from __future__ import annotations

import json
import re
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .backbone_row import Backbone, Head
from .backbones import BACKBONES, of_config
from .errors import plain_message
from .models.spec_rules import check_architecture

ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    head.stock: (row.stock_class(head.stock), row.our_class(head.variant))
    for row in BACKBONES.values()
    for head in row.heads
    if head.stock is not None
}
"""Stock architecture -> (stock class, variant class)."""

_VARIANTS = [row.our_class(head.variant) for row in BACKBONES.values() for head in row.heads]
_SOURCES = ARCHITECTURES | {variant.__name__: (variant, variant) for variant in _VARIANTS}


class Source(NamedTuple):
    """The model that is converted.

    name: of the checkpoint.
    model: a stock model or a variant.
    variant_class: what it becomes.
    unused: tensors of its file that the model has no place for.
    """

    name: str
    model: PreTrainedModel
    variant_class: type[PreTrainedModel]
    unused: list[str]

    @property
    def is_variant(self) -> bool:
        """Whether it is one of our models already."""
        return hasattr(self.model.config, "layer_specs")


def load_source(model_or_path: Any) -> Source:
    """The model, loaded if it is a name.

    What a ``config.json`` does not tell, the file's tensors do: which architecture it is where none is named, and
    whether a bare model has a pooler (a ViT of DINO has none) and other parts that are optional.

    Raises:
        ValueError: for an architecture that is not supported, or a checkpoint with missing tensors.
        OSError: for weights that cannot be read.
    """
    if isinstance(model_or_path, PreTrainedModel):
        name = type(model_or_path).__name__
        _check_architecture(name, model_or_path.config)
        source = model_or_path.config._name_or_path or "(a model in memory)"
        return Source(source, model_or_path, _SOURCES[name][1], [])
    config = load_config(model_or_path)
    declared = config.architectures or []
    if len(declared) > 1:
        raise ValueError(f"architectures in config.json of {model_or_path} must name one class, got {declared!r}")
    options: dict[str, Any] = {}
    try:
        if not declared:
            declared = [_architecture_of(tensor_names(model_or_path), config)]
        (name,) = declared
        _check_architecture(name, config)
        loaded_class, variant_class = _SOURCES[name]
        if head_of(loaded_class).has_parts:
            options = optional_parts(of_config(config), tensor_names(model_or_path))
        if loaded_class._keys_to_ignore_on_load_unexpected and loaded_class is not variant_class:
            loaded_class = _listing_all_tensors(loaded_class)
        model, info = loaded_class.from_pretrained(model_or_path, output_loading_info=True, **options)
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise OSError(f"the weights of {str(model_or_path)!r} cannot be read, {plain_message(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # how the library, and our classes, speak of other shapes
            raise
        raise ValueError(f"the tensors of {model_or_path} have other shapes than its config.json says") from error
    if info["missing_keys"]:
        raise ValueError(f"{model_or_path} lacks tensors of {name}: {', '.join(sorted(info['missing_keys']))}")
    unused = {*info["unexpected_keys"], *_remade_tensors(model, tensor_names(model_or_path))}
    return Source(str(model_or_path), model, variant_class, sorted(unused))


def load_config(checkpoint: Any) -> Any:
    """The configuration of a checkpoint.

    Raises:
        ValueError: if there is none.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(checkpoint)!r} must be a checkpoint, and is none: {plain_message(error)}") from error


def _remade_tensors(model: PreTrainedModel, tensors: set[str]) -> set[str]:
    """Tensors of a file that the model makes anew and so does not read, which Transformers does not tell.

    Old BERT checkpoints hold their position indices, a constant that newer ones leave out.
    """
    made = {name for name, _ in model.named_buffers()} - set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    bare = {name.removeprefix(prefix) for name in made}
    return {tensor for tensor in tensors if tensor.removeprefix(prefix) in bare}


def new_variant(source: Source, config: Any) -> PreTrainedModel:
    """A variant with the parts that the source has beside what its configuration tells."""
    if not head_of(source.variant_class).has_parts:
        return source.variant_class(config)
    return source.variant_class(config, **optional_parts(of_config(config), set(source.model.state_dict())))


def head_of(model_class: type) -> Head:
    """The row of a model class, stock or ours, or of the one that it derives from."""
    found = heads_by_class()
    return next(found[kind.__name__] for kind in model_class.__mro__ if kind.__name__ in found)


def heads_by_class() -> dict[str, Head]:
    """Name of a model class of the table, stock or ours -> its row."""
    heads = [head for row in BACKBONES.values() for head in row.heads]
    return {name: head for head in heads for name in (head.variant, head.stock) if name is not None}


def optional_parts(row: Backbone, tensors: set[str]) -> dict[str, bool]:
    """The options of a bare model with exactly the parts that have tensors."""
    return {option: any(part in tensor for tensor in tensors) for option, part in row.optional_parts.items()}


def tensor_names(checkpoint: Any) -> set[str]:
    """The names in a checkpoint's files, in the order in which Transformers looks for files.

    Raises:
        OSError: if there are no weights.
    """
    for weights, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        path, index_path = (
            cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False) for name in (weights, index)
        )
        if path is not None and weights == SAFE_WEIGHTS_NAME:
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        if path is not None:
            return set(torch.load(path, map_location="meta", weights_only=True))
        if index_path is not None:
            with open(index_path, encoding="utf-8") as file:
                return set(json.load(file)["weight_map"])
    raise OSError(f"{str(checkpoint)!r} must hold weights, {SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}, got neither")


def _architecture_of(tensors: set[str], config: Any) -> str:
    """The class whose tensors these are."""
    row = of_config(config)

    def fits(told_by: tuple[str, ...]) -> bool:
        return all(any(re.search(pattern, tensor) for tensor in tensors) for pattern in told_by)

    refused = [name for name, told_by in row.refused.items() if fits(told_by)]
    if refused:
        return refused[0]
    is_ours = config.model_type == row.model_type
    names = (head.variant if is_ours else head.stock for head in row.heads if fits(head.told_by))
    return next(name for name in names if name is not None)


def _listing_all_tensors(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class without its patterns of tensors to drop silently: stock GPT-2 hides the causal masks of old files."""

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock_class.__init__(self, *args, **kwargs)
        self._keys_to_ignore_on_load_unexpected = set()

    return type(stock_class.__name__, (stock_class,), {"__init__": __init__})


def _check_architecture(name: str, config: Any) -> None:
    """Refuse what is no row of the table, and what a row's checkpoints may be beside what we have."""
    row = BACKBONES.get(str(getattr(config, "model_type", None)).removeprefix("imgproc_"))
    if name not in _SOURCES or row is None:
        raise ValueError(
            f"architecture must be a stock one of {', '.join(ARCHITECTURES)}, or a variant of one of them, got {name} "
            f"(model type {getattr(config, 'model_type', None)}); filtered=True (--filtered) puts the filter into the "
            "stock class, as it does for models of other types"
        )
    check_architecture(config, row.our_class(row.config).must_be)
