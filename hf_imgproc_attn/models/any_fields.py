"""Which filter another model's layers get: the fields that need only query, key, value, places and earlier layers."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from huggingface_hub.dataclasses import type_validator
from torch import nn

from .any_layers import AttentionLayer
from .layer_grid import trained_grid
from .spec_axes import NO_FEEDBACK_YET, TOKEN_BOOSTINGS, LayerSpec, layer_schedule
from .spec_fields import FILTER_FIELDS, FilterSpecMixin, plain, preset_fields, refuse_near_misses
from .spec_rules import check_filter_spec

_POSITIONS = ("gaussian", "alibi", "relative_buckets")
_NEEDS = {
    "untied": "it projects positions, which the model does not",
    "rotary": "it turns queries and keys before the model does its own",
    "additive": "it is what the model does by itself",
    "forget": "it projects the layer's input, which attention functions of Transformers are not given",
    "none": "the model adds its own positions, which cannot be taken out",
}
_NOT_FOR_LAYERS = {
    "share_position_projections": "there are no position projections",
    "rotary_base": "rotary positions are the model's own",
    "residual": "it changes the blocks of the model",
    "boosted_layers": "choose layers by layers=",
    "gate": "it projects the layer's input, which attention functions of Transformers are not given",
}


_OF_IMAGES = ("image_size", "num_channels", "in_channels", "in_chans")
"""Fields of the configurations of stacks whose tokens are patches."""
MAX_SPECIAL_TOKENS = 16
"""More leading tokens than this before the patches are not class or register tokens."""


class FilterFields(NamedTuple):
    """Checked fields of a filter for another model's layers.

    values: all fields of ``FilterSpecMixin``.
    """

    values: dict[str, Any]

    @classmethod
    def of(cls, preset: str | None, fields: dict[str, Any]) -> FilterFields:
        """Fields of a preset and those given by name, which win.

        Raises:
            ValueError: for an unknown field, one that another model's layers cannot have, or no change at all.
        """
        known, fields = FILTER_FIELDS, {name: plain(value) for name, value in fields.items()}
        refuse_near_misses({name: value for name, value in fields.items() if name not in known})
        for name in fields:
            if name not in known:
                raise ValueError(f"fields must be among {', '.join(known)}, got {name!r}")
        _check_types(fields)
        wanted = {**({} if preset is None else preset_fields(preset)), **fields}
        for name, value in wanted.items():
            default = getattr(FilterSpecMixin, name)
            if name in _NOT_FOR_LAYERS and value != default:
                raise ValueError(f"{name}={value!r} is not for layers of another model: {_NOT_FOR_LAYERS[name]}")
        _check_positions(wanted)
        boostings = wanted.get("boosting", "none")
        for booster in boostings if isinstance(boostings, list) else [boostings]:
            if booster in ("gradient_boosted", *TOKEN_BOOSTINGS):
                raise ValueError(
                    f"boosting={booster!r} is not for layers of another model: it has projections of its own, of the "
                    "layer's input, which attention functions of Transformers are not given"
                )
        if wanted.get("feedback") in NO_FEEDBACK_YET and not {
            "neutreno_lambda",
            "pid_gains",
            "learn_feedback",
        } & set(wanted):
            # As in a conversion: factors that are learned and start at 0 leave the model what it was.
            wanted |= {"learn_feedback": True, **NO_FEEDBACK_YET[wanted["feedback"]]}
        values = {name: wanted.get(name, getattr(FilterSpecMixin, name)) for name in known}
        if values == {name: getattr(FilterSpecMixin, name) for name in known}:
            raise ValueError(f"nothing of the model would change: give a preset or fields, got preset={preset!r}")
        return cls(values)

    def changed(self) -> dict[str, Any]:
        """The fields that are not as in a stock model."""
        return {name: value for name, value in self.values.items() if value != getattr(FilterSpecMixin, name)}


_TYPES = {field.name: field.type for field in dataclasses.fields(FilterSpecMixin)}


def _check_types(fields: dict[str, Any]) -> None:
    """Refuse values of types that a field does not have, as the strict dataclasses of our own configurations do."""
    for name, value in fields.items():
        try:
            type_validator(name, value, _TYPES[name])
        except TypeError as error:
            kind = getattr(_TYPES[name], "__name__", None) if isinstance(_TYPES[name], type) else _TYPES[name]
            raise ValueError(f"{name} must be of the type {kind}, got {value!r}") from error


def _check_positions(wanted: dict[str, Any]) -> None:
    kernels = wanted.get("position_kernel")
    for kernel in kernels if isinstance(kernels, list) else [kernels]:
        if kernel is not None and kernel not in _POSITIONS:
            reason = _NEEDS.get(str(kernel), "it is unknown")
            raise ValueError(
                f"position_kernel must be one of {', '.join(_POSITIONS)} for layers of another model, got {kernel!r}: "
                f"{reason}"
            )


class StackConfig:
    """The chosen layers of one stack as a configuration that a filter's layer reads.

    Args:
        fields: what the filter is.
        layers: the layers; a list field has one value for each of them.
        model: whose table of positions tells how many tokens are no patches.
        num_special_tokens: of images: leading tokens that are no patches; None: the configuration tells.

    Raises:
        ValueError: for values that break a rule, or an image model whose grid is not known.
    """

    default_neutreno_lambda = 0.4
    sees_layer_input = False

    def __init__(
        self,
        fields: FilterFields,
        layers: Sequence[AttentionLayer],
        model: nn.Module,
        num_special_tokens: int | None,
    ) -> None:
        self.fields = fields.values
        self.__dict__.update(fields.values)
        first = layers[0]
        heads = {layer.num_heads for layer in layers}
        if len(heads) > 1 and any(
            isinstance(fields.values[f"{kind}_bandwidth"], list) for kind in ("content", "position")
        ):
            raise ValueError(f"bandwidths as lists need layers with one number of heads, got {sorted(heads)}")
        self.num_hidden_layers = len(layers)
        self._set_heads(first)
        self.filter_spec_version = FilterSpecMixin.filter_spec_version
        is_image = sees_patches(model, first)
        self.position_axes = 2 if is_image else 1
        self.hides_later_tokens = any(bool(getattr(layer.module, "is_causal", False)) for layer in layers)
        if self.hides_later_tokens and not all(getattr(layer.module, "is_causal", False) for layer in layers):
            _refuse_delta(fields.values["boosting"])
        if is_image:
            self.default_neutreno_lambda = 0.6
        stock = getattr(first.module, "config", None)
        self.sides: tuple[int, ...] = (getattr(stock, "max_position_embeddings", None) or 2048,)
        self.num_class_tokens = 0
        for layer in reversed(layers):
            self._set_heads(layer)
            check_filter_spec(self)
        _check_alike(fields.values, layers)
        sees_places = any(spec.position_kernel in _POSITIONS for spec in self.layer_specs)
        if is_image:
            self.sides = (1, 1)
            if sees_places:
                self.sides = _grid(stock)
                self.num_class_tokens = _special_tokens(model, first, self.sides, num_special_tokens)

    def _set_heads(self, layer: AttentionLayer) -> None:
        self.num_attention_heads, self.hidden_size = layer.num_heads, layer.num_heads * layer.head_dim

    def for_layer(self, layer: AttentionLayer) -> StackConfig:
        """The same with the heads of one layer: they differ in models of several resolutions."""
        config = copy.copy(self)
        config._set_heads(layer)
        return config

    def __getattr__(self, name: str) -> Any:
        """What the rules ask of a kind of configuration is as for any."""
        return getattr(FilterSpecMixin, name)

    @property
    def layer_specs(self) -> list[LayerSpec]:
        """The axes of each layer."""
        return layer_schedule(self)


def _refuse_delta(boosting: Any) -> None:
    """Refuse ``delta`` where only some of the chosen layers have a causal mask."""
    if "delta" in (boosting if isinstance(boosting, list) else [boosting]):
        raise ValueError(
            "boosting 'delta' needs attention with a causal mask in every chosen layer, and some have none: choose "
            f"layers, got {boosting!r}"
        )


def _check_alike(values: dict[str, Any], layers: Sequence[AttentionLayer]) -> None:
    """Refuse to compare the values of layers whose heads differ."""
    contents = values["content_kernel"]
    compares = values["feedback"] != "none" or "elliptical" in (contents if isinstance(contents, list) else [contents])
    heads = {(layer.num_heads, layer.head_dim) for layer in layers}
    if compares and len(heads) > 1:
        raise ValueError(
            "feedback and the content kernel 'elliptical' compare the values of layers, which must have the same "
            f"heads, got {', '.join(f'{count} of width {width}' for count, width in sorted(heads))}: choose others"
        )


def _grid(config: Any) -> tuple[int, int]:
    """Rows and columns of patches."""
    if getattr(config, "mask_ratio", None) is not None:
        raise ValueError(
            f"positions need tokens in the order of the grid of patches, and a model with mask_ratio in its "
            f"{type(config).__name__} shuffles them"
        )
    if getattr(config, "image_size", None) is None or getattr(config, "patch_size", None) is None:
        raise ValueError(
            f"positions need the grid of patches, and {type(config).__name__} has no image_size or no patch_size"
        )
    return trained_grid(config)


def sees_patches(model: nn.Module, layer: AttentionLayer) -> bool:
    """Whether a layer's tokens are the patches of an image: a model may have a stack of these and one of texts."""
    config = getattr(layer.module, "config", None)
    if any(getattr(config, name, None) is not None for name in _OF_IMAGES):
        return True
    names = (getattr(part, "main_input_name", None) for part in _around(model, layer.name))
    return next((name for name in names if name is not None), "") == "pixel_values"


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules around one, from the nearest to the whole model."""
    parts = name.split(".")
    for end in range(len(parts) - 1, -1, -1):
        yield model.get_submodule(".".join(parts[:end]))


def _special_tokens(model: nn.Module, layer: AttentionLayer, grid: tuple[int, ...], given: int | None) -> int:
    """Leading tokens that are no patches: what a table of positions has beyond the grid, and register tokens."""
    if given is not None:
        return given
    config = getattr(layer.module, "config", None)
    registers, patches = getattr(config, "num_register_tokens", None), math.prod(grid)
    # From near to far: a model of texts and images has a table for each.
    for name, table in (found for part in _around(model, layer.name) for found in part.named_parameters()):
        if "position" in name and table.ndim in (2, 3) and 0 <= table.shape[-2] - patches <= MAX_SPECIAL_TOKENS:
            return table.shape[-2] - patches + (registers or 0)
    if registers is not None:
        return 1 + int(registers)
    raise ValueError(
        f"positions need to know how many leading tokens are no patches, which {type(config).__name__} does not tell: "
        "give num_special_tokens (a class token: 1; a class and a distillation token: 2; none: 0)"
    )
