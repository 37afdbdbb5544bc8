"""Filters in the layers of any Transformers model whose attention goes through Transformers' attention interface.

Nothing of a model's code is copied and none of its weights is changed. A filtered layer gets one sub-module with the
filter's own parameters, and a configuration of its own whose attention implementation is ``IMPLEMENTATION``: the
model's code then hands query, key and value to ``filtered_attention``, after rotary embedding and after the cache.
All other layers run as before.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

from .any_attention import IMPLEMENTATION, PART, SEAT, before_layer
from .any_fields import FilterFields, StackConfig
from .any_layer import AppliedFilter, FilterSeat, SharedState
from .any_layers import AttentionLayer, attention_layers, described
from .cache_layer import check_cache_implementation
from .layer_filter import AttentionFilter
from .layer_parameters import FilterScalars
from .spec_fields import plain


class FilteredLayers(list[dict[str, Any]]):
    """One row a filtered layer; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no layer is filtered"
        names = list(self[0])
        cells = [names, *([str(row[name]) for name in names] for row in self)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        )


def apply_filter(
    model: nn.Module,
    preset: str | None = None,
    *,
    layers: Iterable[int] | int | None = None,
    stacks: str | Sequence[str] | None = None,
    num_special_tokens: int | None = None,
    **fields: Any,
) -> nn.Module:
    """Put a filter into the self-attention layers of a Transformers model, in place.

    Args:
        model: any model whose attention goes through Transformers' attention interface.
        preset: one of ``PRESETS``; its fields can be given, or replaced, by name.
        layers: indices into the self-attention layers of each stack, from either end; None: all.
        stacks: names of the stacks (lists of blocks), as :func:`stack_names` gives them; None: all.
        num_special_tokens: of images: leading tokens without a place on the grid of patches, where the configuration
            does not tell.
        **fields: ``content_kernel``, ``position_kernel`` (on top of the model's own positions), ``content_bandwidth``,
            ``position_bandwidth``, ``learn_bandwidths``, ``boosting``, ``boosting_steps``, ``feedback`` and what
            belongs to them, as the configurations of this package have them. A gain that is learned starts at 0, where
            the model computes what it did.

    Returns:
        The model.

    Raises:
        ValueError: for fields that need another projection or another block, layers or stacks that are not there, a
            model without such layers, or one that is filtered already. The model is then as it was.
    """
    _check_model(model)
    layers, stacks = _integers(layers), [stacks] if isinstance(stacks, str) else stacks
    num_special_tokens = plain(num_special_tokens)
    if num_special_tokens is not None and (
        isinstance(num_special_tokens, bool) or not isinstance(num_special_tokens, int) or num_special_tokens < 0
    ):
        raise ValueError(f"num_special_tokens must be an integer >= 0 or None, got {num_special_tokens!r}")
    wanted = FilterFields.of(preset, fields)
    chosen = _chosen(attention_layers(model), layers, stacks, type(model).__name__)
    _refuse_own_filters(chosen, type(model).__name__)
    prepared = []
    for stack_layers in chosen:
        config = StackConfig(wanted, stack_layers, model, num_special_tokens)
        shared, places = SharedState(), tuple(layer.place for layer in stack_layers)
        prepared += [
            (layer, AppliedFilter(layer, order, config.for_layer(layer)), shared, places)
            for order, layer in enumerate(stack_layers)
        ]
    # Not from the top: that file loads filtered models, by this function.
    from .modeling_imgproc_filtered import save_with_filters

    arguments = {"layers": layers, "stacks": stacks, "num_special_tokens": num_special_tokens}
    record = {**wanted.changed(), **{name: value for name, value in arguments.items() if value is not None}}
    for layer, part, shared, places in prepared:
        seat = FilterSeat(shared, record, layer.module.config, [], places)
        _attach(layer.module, part, seat)
    save_with_filters()
    _refuse_impossible_caches()
    _change_units(model, {FilterScalars.__name__}, set())
    return model


def _change_units(model: nn.Module, more: set[str], fewer: set[str]) -> None:
    """Tell what shards a model by the classes that it names (FSDP2) of the filters' numbers, which stay in float32."""
    known = getattr(model, "_no_split_modules", None)
    if known:
        model._no_split_modules = (set(known) | more) - fewer  # type: ignore[assignment]


def _refuse_impossible_caches() -> None:
    """Make every filtered model refuse the caches that cannot be, before any work begins.

    The whole class, as for saving: a filter may have been put into a part of a model. Continuous batching runs in a
    thread of its own; its cache keeps keys and values in pages that texts share, are moved and copied, and has no
    place for further rows. Offloading needs an accelerator, and without one Transformers fails without saying why.
    """
    start, prepare = GenerationMixin.init_continuous_batching, GenerationMixin._prepare_cache_for_generation
    if getattr(start, "filters_of", None) is is_filtered:
        return

    @functools.wraps(start)
    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        for _, part in _parts(self):
            raise ValueError(
                "continuous batching keeps its cache in pages, which have no place for the rows of the filter of "
                f"{part.layer_name}: use generate() with a padded batch"
            )
        return start(self, *args, **kwargs)

    @functools.wraps(prepare)
    def _prepare_cache_for_generation(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_filtered(self):
            check_cache_implementation(generation_config.cache_implementation, self.device.type)
        return prepare(self, generation_config, *args, **kwargs)

    init_continuous_batching.filters_of = is_filtered  # type: ignore[attr-defined]
    GenerationMixin.init_continuous_batching = init_continuous_batching
    GenerationMixin._prepare_cache_for_generation = _prepare_cache_for_generation


def is_filtered(model: nn.Module) -> bool:
    """Whether a model, or a part of it, has a filter."""
    return any(True for _ in _parts(model))


def filter_arguments(model: nn.Module) -> dict[str, Any]:
    """What :func:`apply_filter` has to be called with for the same filters of this model.

    Args:
        model: the model that the filters were applied to, a part of it, or a model that it is a part of: stacks are
            then named as they are seen from there.

    Raises:
        ValueError: if the model has no filter, or its parts have filters that one call cannot give the whole.
    """
    parts = {id(module): part for module, part in _parts(model)}
    if not parts:
        raise ValueError("the model has no filter")
    found = attention_layers(model)
    filtered = [layer for layer in found if id(layer.module) in parts]
    all_arguments = [getattr(layer.module, SEAT).arguments for layer in filtered]
    arguments = dict(all_arguments[0]) if all_arguments else {}
    if all(parts[id(layer.module)].layer_name == layer.name for layer in filtered):
        return arguments
    stacks = list(dict.fromkeys(layer.stack for layer in filtered))
    chosen = _chosen(found, arguments.get("layers"), stacks, type(model).__name__)
    fits = {id(layer.module) for members in chosen for layer in members} == set(parts)
    if not (fits and all(each == arguments for each in all_arguments)):
        raise ValueError(
            f"the parts of this {type(model).__name__} have filters that one apply_filter cannot give the whole: "
            "save it after remove_filter(model) and apply_filter(model, ...), with stacks=... for a part"
        )
    return {**arguments, "stacks": stacks}


def _attach(module: nn.Module, part: AppliedFilter, seat: FilterSeat) -> None:
    tensor = next(module.parameters(), None)
    if tensor is not None:
        # The filter's scalars are never less precise than single.
        part.to(_device_of(module, tensor), torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    part.train(module.training)
    own = copy.copy(module.config)
    own._attn_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]
    seat.owner(module)  # now: not while a step is compiled
    seat.hooks += [
        module.register_forward_pre_hook(before_layer, with_kwargs=True),
        module.register_load_state_dict_pre_hook(_refuse_other_numbers),
    ]
    setattr(module, SEAT, seat)
    module.config = own
    setattr(module, PART, part)


def _device_of(module: nn.Module, tensor: torch.Tensor) -> Any:
    """Where a module computes; what Accelerate has offloaded is elsewhere in between, and ``meta`` until then."""
    hooks = (getattr(each, "_hf_hook", None) for each in module.modules() if tensor.is_meta)
    every = (each for hook in hooks for each in getattr(hook, "hooks", (hook,)))
    found = (getattr(each, "execution_device", None) for each in every)
    return next((device for device in found if device is not None), tensor.device)


def _refuse_other_numbers(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before tensors are loaded: refuse the numbers of another filter, also where unexpected ones are let pass.

    So PEFT loads its adapters, and would leave out what does not fit without a word.
    """
    start = f"{prefix}{PART}."
    given = {name.removeprefix(start) for name in state_dict if name.startswith(start)}
    own = {name for name, _ in getattr(module, PART).named_parameters()}
    if given - own:
        kinds, errors = sorted({name.rpartition(".")[2] for name in given - own}), rest[-1]
        errors.append(
            f"{', '.join(kinds)} in {prefix}{PART} are numbers of another filter than the model has: put the filter "
            "that they were saved with into the model before they are loaded"
        )


def remove_filter(model: nn.Module) -> nn.Module:
    """Take the filters out of a model again, in place; their parameters are gone.

    Raises:
        ValueError: if there is none.
    """
    found = list(_parts(model))
    if not found:
        raise ValueError("the model has no filter to remove")
    for module, _ in found:
        seat: FilterSeat = getattr(module, SEAT)
        for hook in seat.hooks:
            hook.remove()
        module.config = seat.stock_config
        delattr(module, PART)
        delattr(module, SEAT)
    _change_units(model, set(), {FilterScalars.__name__})
    return model


def filtered_layers(model: nn.Module) -> FilteredLayers:
    """What the filtered layers of a model have, one row a layer; empty where there is none."""
    rows = FilteredLayers()
    for _, part in _parts(model):
        spec = part.filter.spec
        rows.append(
            {
                "stack": part.stack,
                "layer": part.index,
                "content": spec.content_kernel,
                "positions": "its own" if spec.position_kernel == "additive" else f"its own + {spec.position_kernel}",
                "boosting": spec.boosting
                if spec.boosting in ("none", "learned")
                else f"{spec.boosting} ({spec.boosting_steps})",
                "feedback": spec.feedback,
                "parameters": sum(parameter.numel() for parameter in part.parameters()),
            }
        )
    return rows


def stack_names(model: nn.Module) -> dict[str, int]:
    """The stacks of a model (lists of blocks with self-attention) and how many layers each has."""
    return {name: len(members) for name, members in _by_stack(attention_layers(model)).items()}


def _by_stack(layers: list[AttentionLayer]) -> dict[str, list[AttentionLayer]]:
    """The layers of each stack, in order."""
    stacks: dict[str, list[AttentionLayer]] = {}
    for layer in layers:
        stacks.setdefault(layer.stack, []).append(layer)
    return stacks


def _parts(model: nn.Module) -> Iterator[tuple[nn.Module, AppliedFilter]]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a model, which is loaded already, got {described(model)}")
    for module in model.modules():
        part = getattr(module, PART, None)
        part = getattr(part, "original_module", part)  # PEFT's wrapper, where modules_to_save names the filter
        if isinstance(part, AppliedFilter):
            yield module, part


def _check_model(model: Any) -> None:
    """Refuse a wrapper that saves something else, what is no model, and what has a filter."""
    if hasattr(model, "peft_config") and not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"model is a {type(model).__name__}, which saves its adapter alone and would lose the filter: call "
            "apply_filter first, save that model, and get_peft_model after it"
        )
    if any(_parts(model)):
        raise ValueError("the model is filtered already: call remove_filter(model) first")


def _refuse_own_filters(chosen: list[list[AttentionLayer]], owner: str) -> None:
    """Layers of this package that have a filter do not go through the interface: another one would never be called."""
    for layer in (layer for stack_layers in chosen for layer in stack_layers):
        own = getattr(layer.module, "filter", None)
        if isinstance(own, AttentionFilter) and not own.is_stock:
            raise ValueError(
                f"{layer.name} of {owner} has a filter of its own, which the model's configuration chooses"
            )


def _integers(layers: Any) -> Any:
    """Layers as plain integers, which can be saved; what is none is left to be refused."""
    if isinstance(layers, (str, bytes)) or not (hasattr(layers, "__iter__") or hasattr(layers, "__index__")):
        return layers
    if hasattr(layers, "tolist"):  # an array or a tensor, of NumPy or torch
        return layers.tolist()
    if not hasattr(layers, "__iter__"):
        return layers if isinstance(layers, bool) else operator.index(layers)
    return [
        operator.index(index) if hasattr(index, "__index__") and not isinstance(index, (bool, torch.Tensor)) else index
        for index in layers
    ]


def _chosen(
    found: list[AttentionLayer], layers: Any, stacks: str | Sequence[str] | None, model: str
) -> list[list[AttentionLayer]]:
    """The chosen layers of each chosen stack, in order."""
    by_stack = _by_stack(found)
    if not by_stack:
        raise ValueError(
            f"{model} has no self-attention layer that goes through Transformers' attention interface: no filter can "
            "be put into it"
        )
    if stacks is not None and (not isinstance(stacks, (list, tuple)) or not stacks):
        raise ValueError(f"stacks must be one or more of {', '.join(by_stack)}, got {stacks!r}")
    for name in stacks or ():
        if not isinstance(name, str) or name not in by_stack:
            raise ValueError(f"stacks must be among {', '.join(by_stack)}, got {name!r}")
    names = list(by_stack) if stacks is None else list(dict.fromkeys(stacks))
    wanted = layers if layers is None or isinstance(layers, (list, tuple)) else [layers]
    chosen = []
    for name in names:
        members = by_stack[name]
        if wanted is None:
            chosen.append(members)
            continue
        for index in wanted:
            if isinstance(index, bool) or not isinstance(index, int) or not -len(members) <= index < len(members):
                raise ValueError(
                    f"layers must be integers from {-len(members)} to {len(members) - 1} ({name} has {len(members)} "
                    f"self-attention layers), got {index!r}"
                )
        places = {index % len(members) for index in wanted}
        if len(places) != len(wanted) or not places:
            raise ValueError(f"layers must name at least one layer, and every layer once, got {layers!r}")
        chosen.append([members[place] for place in sorted(places)])
    return chosen
