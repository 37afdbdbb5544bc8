"""What a model card tells of a run's filter: its preset and fields, and what it has learned.

Everything is read from a record that may be published (``records.public_record``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ..catalogue.matching import closest_preset, preset_name, written_out_defaults
from ..models.spec_axes import COMPARING_KERNELS, PUBLISHED_NEUTRENO_LAMBDAS
from ..models.spec_fields import PRESETS, FilterSpecMixin
from ..models.spec_versions import bring_up_to_date
from .filters import NOTHING_LEARNED, in_markdown, lens_in_markdown

_LAYER_FACTS = ("stack", "layer", "content", "positions", "boosting", "feedback", "parameters")


def variant_of(record: dict[str, Any]) -> str:
    """The preset whose filter the model has, or varies in some fields; else ``custom``."""
    return closest_preset(_configuration(record))[0]


def is_stock(record: dict[str, Any]) -> bool:
    """Whether the filter is that of the stock model."""
    return preset_name(_configuration(record)) == "softmax"


def filter_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The fields of the filter specification; one that an older record lacks is at its default."""
    config = bring_up_to_date(record["model_config"])
    return {name: config.get(name, getattr(FilterSpecMixin, name)) for name in FilterSpecMixin.__annotations__}


def changed_fields(record: dict[str, Any]) -> list[list[str]]:
    """Fields of the filter with their values and those of the preset in which the model differs from it.

    A model without a preset, ``custom``, is compared with the stock model.
    """
    config = _configuration(record)
    name, changes = closest_preset(config)
    defaults = {} if name == "custom" else written_out_defaults(config)
    rows = []
    for field, value in changes.items():
        before = PRESETS.get(name, {}).get(field, getattr(FilterSpecMixin, field))
        rows.append([field, str(value), str(defaults.get(field) if before is None else before)])
    return rows


def _configuration(record: dict[str, Any]) -> SimpleNamespace:
    """The filter's fields, and the strength that its kind of data has by default."""
    fields = filter_fields(record)
    fields["default_neutreno_lambda"] = PUBLISHED_NEUTRENO_LAMBDAS[2 if _has_class_token(record) else 1]
    return SimpleNamespace(**fields)


def _has_class_token(record: dict[str, Any]) -> bool:
    """Whether the model is a ViT, of images and with a class token."""
    return "image_size" in record["model_config"]


def filtered_layers(record: dict[str, Any]) -> list[list[str]]:
    """The filtered layers of a model that keeps its stock class, below a header; empty for other models."""
    layers = record.get("applied_filter", {}).get("layers", [])
    names = [name for name in _LAYER_FACTS if layers and name in layers[0]]
    return [names, *([str(layer[name]) for name in names] for layer in layers)] if layers else []


def filter_numbers(record: dict[str, Any]) -> str:
    """The filters' bandwidths, gains and logits at the end of the training, in Markdown; older records have none.

    Below them what the attention did with samples at the end, where the run looked (``lens_every``).
    """
    seen = record.get("lens_history")
    return "\n\n".join([_filter_numbers(record), *([lens_in_markdown(seen)] if seen else [])])


def _filter_numbers(record: dict[str, Any]) -> str:
    if "filter_summary" in record:
        return in_markdown(record["filter_summary"])
    fields = filter_fields(record)
    learns = (
        fields["learn_bandwidths"]
        or fields["learn_feedback"]
        or "learned" in _as_list(fields["boosting"])
        or "relative_buckets" in _as_list(fields["position_kernel"])
        or (_has_class_token(record) and compares_positions(record))
    )
    return "What the filters have learned beside their projections is not recorded." if learns else NOTHING_LEARNED


def compares_positions(record: dict[str, Any]) -> bool:
    """Whether positions enter through the attention logits of a layer instead of being added to the tokens."""
    return bool(set(COMPARING_KERNELS) & set(_as_list(filter_fields(record)["position_kernel"])))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
