"""Loading and saving of filtered models of any type.

A class below is what an Auto class finds in ``config.json``; what it returns is an object of the *stock* class with
its filters in place, so that pipelines, PEFT, ``generate`` and quantisers see what they know.
"""

from __future__ import annotations

import functools
from collections.abc import Container
from typing import Any, ClassVar

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .any_attention import PART
from .any_filter import apply_filter, filter_arguments, is_filtered, stack_names
from .configuration_imgproc_filtered import ImgProcFilteredConfig, refusals
from .modeling_adapters import load_with_copies

_NOT_GIVEN = frozenset(
    ("architectures", "dtype", "id2label", "label2id", "model_type", "transformers_version", "_name_or_path")
)
"""Of every configuration, and said by the saved one or elsewhere rather than by who loads it."""


class FilteredModel(PreTrainedModel):
    """What an Auto class loads a filtered model with; it has no objects of its own."""

    config_class = ImgProcFilteredConfig
    base_auto_class: ClassVar[str] = ""
    """The Auto class that knows the stock class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} has no objects: use from_pretrained, or apply_filter on a model")

    @classmethod
    def from_pretrained(cls, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """Load the stock class with its filters in place; arguments as of any ``from_pretrained``.

        Raises:
            ValueError: if the weights lack the filter's numbers, which would else be those that training starts from,
                or have those of another filter, which would be left out.
        """
        if not isinstance(config, PreTrainedConfig):
            config = ImgProcFilteredConfig.from_pretrained(args[0] if config is None else config)
        filtered, base = cls._filtered_class(config)
        # What a user says of the configuration is said of the model's own.
        given = {name: kwargs.pop(name) for name in list(kwargs) if name != "dtype" and hasattr(base, name)}
        for name, value in given.items():
            setattr(base, name, value)
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = filtered.from_pretrained(*args, config=base, output_loading_info=True, **kwargs)
        _refuse_other_numbers(model, info)
        _settle(model)
        return (model, info) if wants_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        filtered, base = cls._filtered_class(config)
        model = filtered._from_config(base, **kwargs)
        _settle(model)
        return model

    @classmethod
    def _filtered_class(cls, config: Any) -> tuple[Any, PreTrainedConfig]:
        """The stock class, made so that it has the filters before its weights are loaded, and its configuration."""
        base = config.base()
        if config.dtype is not None:  # of the weights; files of older versions have what the base once had beside it
            base.dtype = config.dtype
        # An Auto class has put what it was given into this configuration.
        for name, default in PreTrainedConfig().to_dict().items():
            value = getattr(config, name, default)
            if name not in _NOT_GIVEN and value != default:
                setattr(base, name, value)
        base.id2label = config.id2label
        base.label2id = config.label2id or {label: number for number, label in config.id2label.items()}
        if config._attn_implementation_internal is not None:
            base._attn_implementation = config._attn_implementation_internal
        if getattr(config, "_experts_implementation_internal", None) is not None:
            base._experts_implementation = config._experts_implementation_internal
        mapping = getattr(transformers, cls.base_auto_class)._model_mapping
        if type(base) not in mapping:
            raise ValueError(f"{cls.base_auto_class} knows no class for a model of type {base.model_type!r}")
        stock = mapping[type(base)]
        stock = stock[0] if isinstance(stock, (tuple, list)) else stock

        def start(self: Any, own: Any, *args: Any, **kwargs: Any) -> None:
            stock.__init__(self, own, *args, **kwargs)
            apply_filter(self, **_as_seen_from(self, config.filter_arguments))

        # Static, as the stock function: it is called on objects and on classes.
        load = staticmethod(functools.partial(load_with_copies, stock._load_pretrained_model))
        made = type(
            stock.__name__,
            (stock,),
            {"__init__": start, "__module__": stock.__module__, "_load_pretrained_model": load},
        )
        return made, base


def _refuse_other_numbers(model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse weights whose numbers are not those of the filter in ``config.json``.

    Args:
        model: with that filter.
        info: what ``from_pretrained`` says of the weights. Numbers of layers that the model does not have are no
            error: its class may be for a part of what was saved, such as the encoder.
    """
    advice = "they are not those of this filtered model. For a new filter load the stock model and call apply_filter"
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    lacking = sorted(name for name in {*info["missing_keys"], *mismatched} if f"{PART}." in name)
    if lacking:
        raise ValueError(
            f"the weights lack {len(lacking)} tensors of the filter that config.json names, such as {lacking[0]}: "
            f"{advice}"
        )
    bare, modules = f"{model.base_model_prefix}.", {name for name, _ in model.named_modules()}
    owners = {name: name.partition(f".{PART}.")[0] for name in info["unexpected_keys"] if f".{PART}." in name}
    left = sorted(
        name for name, owner in owners.items() if modules & {owner, f"{bare}{owner}", owner.removeprefix(bare)}
    )
    if left:
        raise ValueError(
            f"the weights have {len(left)} tensors of another filter than config.json names, such as {left[0]}: "
            f"{advice}"
        )


def _as_seen_from(model: nn.Module, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a filter, with the stacks as this class of the model calls them: with a head or bare."""
    if not arguments.get("stacks") or not isinstance(arguments["stacks"], (str, list, tuple)):
        return arguments
    known, stacks = list(stack_names(model)), arguments["stacks"]

    def here(name: Any) -> Any:
        same = [each for each in known if each.endswith(f".{name}") or str(name).endswith(f".{each}")]
        return same[0] if name not in known and len(same) == 1 else name

    return {**arguments, "stacks": here(stacks) if isinstance(stacks, str) else [here(name) for name in stacks]}


def _settle(model: Any) -> None:
    """Make an object of the made class one of the stock class."""
    model.__class__ = type(model).__mro__[1]


def _door(auto_class: str) -> type[FilteredModel]:
    name = f"ImgProcFiltered{auto_class.removeprefix('AutoModel').removeprefix('AutoBackbone') or 'Model'}"
    return type(
        name,
        (FilteredModel,),
        {"base_auto_class": auto_class, "__module__": __name__, "__doc__": FilteredModel.__doc__},
    )


AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMultipleChoice",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForMaskedImageModeling",
    "AutoModelForSemanticSegmentation",
    "AutoModelForObjectDetection",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModelForImageTextToText",
)
"""The Auto classes that a filtered model can be loaded with."""

DOORS: dict[str, type[FilteredModel]] = {name: _door(name) for name in AUTO_CLASSES}
globals().update({door.__name__: door for door in DOORS.values()})


def stock_class(model: nn.Module) -> type:
    """The class of a model, without what FSDP derives of it."""
    return next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch.distributed"))


def own_auto_class(config: PreTrainedConfig, kinds: Container[Any]) -> str | None:
    """The first Auto class that loads one of some classes for a configuration; None where none does."""
    for name in DOORS:
        known = getattr(transformers, name)._model_mapping.get(type(config), None)
        if any(kind in kinds for kind in (known if isinstance(known, (tuple, list)) else (known,)) if kind):
            return name
    return None


def auto_map(model: nn.Module) -> dict[str, str]:
    """For ``config.json``: the Auto classes that know the model's type -> what they load it with.

    As of a stock model they are all, whichever class was saved: ``AutoModel`` loads the body of a causal language
    model, and ``AutoModelForSequenceClassification`` puts a new head on it.

    Raises:
        ValueError: if none loads the model's class.
    """
    stock: Any = stock_class(model)
    if own_auto_class(model.config, (stock,)) is None:
        raise ValueError(f"no Auto class that filtered models can be loaded with knows {stock.__name__}")
    configuration = f"{ImgProcFilteredConfig.__module__.rpartition('.')[2]}.{ImgProcFilteredConfig.__name__}"
    return {
        "AutoConfig": configuration,
        **{
            name: f"{__name__.rpartition('.')[2]}.{door.__name__}"
            for name, door in DOORS.items()
            if type(model.config) in getattr(transformers, name)._model_mapping
        },
    }


class _WithCode(ImgProcFilteredConfig):
    """When it is saved, Transformers copies this file, and what it imports, beside it."""

    _auto_class = "AutoConfig"


def save_with_filters() -> None:
    """Make every model's ``save_pretrained`` save the filters that are in it; called when the first one is applied.

    The whole class, because a filter may have been put into a part of a model, which knows nothing of the whole: the
    stock ``save_pretrained`` of the whole would lose it without a word.
    """
    stock = PreTrainedModel.save_pretrained
    if getattr(stock, "filters_of", None) is filter_arguments:
        return

    @functools.wraps(stock)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        save = functools.partial(stock, self)
        return _save_filtered(save, self, *args, **kwargs) if is_filtered(self) else save(*args, **kwargs)

    save_pretrained.filters_of = filter_arguments  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained


def _save_filtered(
    stock_save: Any, model: Any, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any
) -> None:
    """``save_pretrained`` of a filtered model: weights under their stock names, filters in ``config.json``, the code.

    Args:
        stock_save: the stock ``save_pretrained`` of the model.
        model: filtered.
        save_directory: the folder.
        *args: as of the stock ``save_pretrained``.
        push_to_hub: not here; call ``model.push_to_hub``, which saves by this function.
        **kwargs: as of the stock ``save_pretrained``.

    Raises:
        ValueError: for ``push_to_hub``, a class that no Auto class knows, or filters that cannot be saved together.
    """
    if push_to_hub:
        raise ValueError("push_to_hub=True is not for a filtered model: call model.push_to_hub(repo_id)")
    if getattr(model, "_hf_peft_config_loaded", False):  # the adapter alone is saved, and its base has the filters
        stock_save(save_directory, *args, **kwargs)
        return
    config, entries = saved_config(model), auto_map(model)
    stock_save(save_directory, *args, **kwargs)
    if not kwargs.get("is_main_process", True):
        return
    config.auto_map = entries
    config.architectures, config.dtype = [stock_class(model).__name__], model.config.dtype
    config.base_config["dtype"] = config.dtype  # which saving has set to that of the weights
    _WithCode().save_pretrained(save_directory)
    config.save_pretrained(save_directory)


def saved_config(model: Any) -> ImgProcFilteredConfig:
    """The configuration with which a filtered model is saved.

    Raises:
        ValueError: for a model without filters, or with some that cannot be saved together.
    """
    base = model.config.to_dict()
    auto_class = own_auto_class(model.config, (stock_class(model),)) or "AutoModel"
    return ImgProcFilteredConfig(
        base_model_type=model.config.model_type,
        base_config=base,
        filter_arguments=filter_arguments(model),
        architectures=[stock_class(model).__name__],
        id2label=model.config.id2label,
        label2id=model.config.label2id,
        **refusals(base, f"{auto_class}.from_pretrained(..., trust_remote_code=True)"),
    )
