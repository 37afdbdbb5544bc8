"""Turn a checkpoint of any model type into a filtered one: its stock model, with filters in the layers.

No tensor changes and none is dropped; what is new are the numbers of the filter. What the filter costs is measured as
in every conversion, on the same model without it.
"""

from __future__ import annotations

import copy
from pickle import UnpicklingError
from typing import Any, NamedTuple

import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel

from . import filtered
from .conversion_source import load_config
from .errors import plain_message
from .models.any_filter import apply_filter, filtered_layers, is_filtered, remove_filter
from .models.configuration_imgproc_filtered import FILTERED_MODEL_TYPE
from .models.modeling_imgproc_filtered import auto_map


class Applied(NamedTuple):
    """A model without the filter that is asked for, and the same with it.

    name: of the checkpoint.
    source: the model as it is: stock, or with another filter. Its tensors are those of ``variant`` where it was loaded
        here.
    variant: with the filter.
    unused: tensors of the file that the model has no place for.
    """

    name: str
    source: PreTrainedModel
    variant: PreTrainedModel
    unused: list[str]


def becomes_filtered(model_or_path: Any, wanted: bool | None, preset: str) -> bool:
    """Whether a model or checkpoint keeps its stock class and gets filters, or becomes a model of ours.

    Args:
        model_or_path: as of ``convert``.
        wanted: what the user says; None: models of our backbones become ours.
        preset: the filter; with ``"softmax"`` a model of ours may get its stock class back.

    Raises:
        ValueError: if a model of ours is to be filtered, or what is named is no checkpoint.
    """
    config = model_or_path.config if isinstance(model_or_path, PreTrainedModel) else load_config(model_or_path)
    if isinstance(model_or_path, PreTrainedModel) and is_filtered(model_or_path):
        return True
    if wanted and hasattr(config, "layer_specs"):
        if preset == "softmax":
            return False
        raise ValueError(
            f"filtered=True is for stock models, got one of type {config.model_type}, which has a filter of its own: "
            "without it the filter is changed, and with preset softmax it becomes a stock model"
        )
    return filtered.is_foreign(config) if wanted is None else wanted


def apply_to(model_or_path: Any, preset: str, arguments: dict[str, Any]) -> Applied:
    """The model with the filter, and without it to compare.

    Args:
        model_or_path: a model of any type, or the path or Hub name of one. One that has a filter gets the new one in
            its place; ``preset="softmax"`` takes it out.
        preset: the filter.
        arguments: further ones of ``apply_filter``.

    Raises:
        ValueError: for a checkpoint with missing tensors, a class that no Auto class loads, or a filter that the model
            cannot have.
        OSError: for weights that cannot be read.
    """
    if isinstance(model_or_path, PreTrainedModel):
        name, unused = model_or_path.config._name_or_path or "(a model in memory)", list[str]()
        source, shared = model_or_path, {}
    else:
        name, (source, unused) = str(model_or_path), _load(model_or_path)
        shared = {id(tensor): tensor for tensor in (*source.parameters(), *source.buffers())}
    was_filtered = is_filtered(source)
    variant = copy.deepcopy(source, shared)
    if was_filtered:
        remove_filter(variant)
    if not (was_filtered and preset == "softmax" and not arguments):
        apply_filter(variant, preset, **arguments)
    auto_map(variant)  # what could not be saved is refused before the work
    return Applied(name, source.eval(), variant.eval(), unused)


def last_layers(model: PreTrainedModel, preset: str, arguments: dict[str, Any]) -> PreTrainedModel | None:
    """The same filter in the last two layers of each stack; None where it is in no more, or cannot be in these."""
    if arguments.get("layers") is not None or len(filtered_layers(model)) <= 2:
        return None
    fewer = remove_filter(copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()}))
    try:
        apply_filter(fewer, preset, **{**arguments, "layers": [-2, -1]})
    except ValueError:
        return None
    return fewer.eval()


def _load(checkpoint: Any) -> tuple[PreTrainedModel, list[str]]:
    """The model of a checkpoint, and the tensors of its file that it has no place for."""
    config = load_config(checkpoint)
    auto_class = filtered.auto_class_of(config)
    if config.model_type != FILTERED_MODEL_TYPE and config.architectures and len(config.architectures) != 1:
        raise ValueError(
            f"architectures in config.json of {checkpoint} must name one class, got {config.architectures!r}"
        )
    named = (config.architectures or [""])[0]
    if not filtered.knows(auto_class, config) or (named and auto_class == "AutoModel" and not _is_bare(config, named)):
        raise ValueError(
            f"architecture must be a class of Transformers that an Auto class loads, got {named or 'none'} (model "
            f"type {config.model_type})"
        )
    try:
        model, info = getattr(transformers, auto_class).from_pretrained(checkpoint, output_loading_info=True)
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise OSError(f"the weights of {str(checkpoint)!r} cannot be read, {plain_message(error)}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(f"the tensors of {checkpoint} have other shapes than its config.json says") from error
    if info["missing_keys"]:
        raise ValueError(f"{checkpoint} lacks tensors of {named}: {', '.join(sorted(info['missing_keys']))}")
    return model, sorted(info["unexpected_keys"])


def _is_bare(config: Any, named: str) -> bool:
    base = config.base() if config.model_type == FILTERED_MODEL_TYPE else config
    known = transformers.AutoModel._model_mapping.get(type(base), None)
    return named in [kind.__name__ for kind in (known if isinstance(known, (tuple, list)) else (known,)) if kind]
