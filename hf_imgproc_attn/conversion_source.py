"""What a conversion starts from: a stock GPT-2 or ViT, or a variant of one, in memory, in a folder or on the Hub."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

from .models.modeling_imgproc_gpt2 import (
    ImgProcGPT2ForSequenceClassification,
    ImgProcGPT2ForTokenClassification,
    ImgProcGPT2LMHeadModel,
    ImgProcGPT2Model,
)
from .models.modeling_imgproc_vit import (
    ImgProcViTForImageClassification,
    ImgProcViTForMaskedImageModeling,
    ImgProcViTModel,
)

ARCHITECTURES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    stock.__name__: (stock, variant)
    for stock, variant in (
        (GPT2Model, ImgProcGPT2Model),
        (GPT2LMHeadModel, ImgProcGPT2LMHeadModel),
        (GPT2ForSequenceClassification, ImgProcGPT2ForSequenceClassification),
        (GPT2ForTokenClassification, ImgProcGPT2ForTokenClassification),
        (ViTModel, ImgProcViTModel),
        (ViTForImageClassification, ImgProcViTForImageClassification),
        (ViTForMaskedImageModeling, ImgProcViTForMaskedImageModeling),
    )
}
"""Stock architecture -> (stock class, variant class)."""

_SOURCES = ARCHITECTURES | {variant.__name__: (variant, variant) for _, variant in ARCHITECTURES.values()}
_MODEL_TYPES = {"gpt2": "", "vit": "", "imgproc_gpt2": "ImgProc", "imgproc_vit": "ImgProc"}
"""Model type -> what the names of its classes begin with, beside those of the stock library."""


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
    whether a bare ViT has a pooler (those of DINO have none) and a mask token.

    Raises:
        ValueError: for an architecture that is not supported, or a checkpoint with missing tensors.
        OSError: for weights that cannot be read.
    """
    if isinstance(model_or_path, PreTrainedModel):
        name = type(model_or_path).__name__
        _check_architecture(name, str(getattr(model_or_path.config, "model_type", None)))
        source = model_or_path.config._name_or_path or "(a model in memory)"
        return Source(source, model_or_path, _SOURCES[name][1], [])
    config = AutoConfig.from_pretrained(model_or_path)
    declared = config.architectures or []
    if len(declared) > 1:
        raise ValueError(f"architectures in config.json of {model_or_path} must name one class, got {declared!r}")
    options: dict[str, Any] = {}
    try:
        if not declared:
            _check_model_type(config.model_type)
            declared = [_architecture_of(tensor_names(model_or_path), config.model_type)]
        (name,) = declared
        _check_architecture(name, config.model_type)
        loaded_class, variant_class = _SOURCES[name]
        if name.endswith("ViTModel"):
            tensors = tensor_names(model_or_path)
            options["add_pooling_layer"] = any("pooler." in tensor for tensor in tensors)
            options["use_mask_token"] = any(tensor.endswith("mask_token") for tensor in tensors)
        if loaded_class._keys_to_ignore_on_load_unexpected and loaded_class is not variant_class:
            loaded_class = _listing_all_tensors(loaded_class)
        model, info = loaded_class.from_pretrained(model_or_path, output_loading_info=True, **options)
    except SafetensorError as error:
        raise OSError(f"the weights of {str(model_or_path)!r} cannot be read, the file is damaged: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # how the library, and our classes, speak of other shapes
            raise
        raise ValueError(f"the tensors of {model_or_path} have other shapes than its config.json says") from error
    if info["missing_keys"]:
        raise ValueError(f"{model_or_path} lacks tensors of {name}: {', '.join(sorted(info['missing_keys']))}")
    return Source(str(model_or_path), model, variant_class, list(info["unexpected_keys"]))


def new_variant(source: Source, config: Any) -> PreTrainedModel:
    """A variant with the parts that the source has beside what its configuration tells."""
    if not source.variant_class.__name__.endswith("ViTModel"):
        return source.variant_class(config)
    model: Any = source.model
    has_mask_token = model.embeddings.mask_token is not None
    return source.variant_class(config, add_pooling_layer=model.pooler is not None, use_mask_token=has_mask_token)


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


def _architecture_of(tensors: set[str], model_type: str) -> str:
    """The class whose tensors these are."""
    if model_type.endswith("gpt2"):
        names = {"score.weight": "GPT2ForSequenceClassification", "classifier.weight": "GPT2ForTokenClassification"}
        names["multiple_choice_head.summary.weight"] = "GPT2DoubleHeadsModel"
        # The language model's head is the token table, which is stored once; its body has a prefix of its own.
        has_prefix = any(tensor.startswith("transformer.") for tensor in tensors)
        default = "GPT2LMHeadModel" if has_prefix or "lm_head.weight" in tensors else "GPT2Model"
    else:
        names = {"classifier.weight": "ViTForImageClassification", "decoder.0.weight": "ViTForMaskedImageModeling"}
        default = "ViTModel"
    found = [architecture for tensor, architecture in names.items() if tensor in tensors]
    return _MODEL_TYPES[model_type] + (found[0] if found else default)


def _listing_all_tensors(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class without its patterns of tensors to drop silently: stock GPT-2 hides the causal masks of old files."""

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock_class.__init__(self, *args, **kwargs)
        self._keys_to_ignore_on_load_unexpected = set()

    return type(stock_class.__name__, (stock_class,), {"__init__": __init__})


def _check_model_type(model_type: str) -> None:
    if model_type not in _MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(_MODEL_TYPES)}, got {model_type!r}")


def _check_architecture(name: str, model_type: str) -> None:
    if name not in _SOURCES or model_type not in _MODEL_TYPES:
        raise ValueError(
            f"architecture must be a stock one of {', '.join(ARCHITECTURES)}, or a variant of one of them, got {name} "
            f"(model type {model_type})"
        )
