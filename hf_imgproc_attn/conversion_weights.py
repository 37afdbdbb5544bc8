"""What the tensors of a variant are made of, and where those start that the source does not have.

*Stock model to variant* (arXiv 2506.10371 leaves the start open, *choice*): for ``untied`` positions the LayerNorm
before the position projections is a copy of the layer's first norm, and U_Q, U_K start as that layer's W_Q, W_K
without bias (shared projections: layer 0's); bandwidths and class-token logits have their defaults. Where positions
are no longer added to the tokens, the stock class position is added to the class token's content; kernels that need no
position table leave the rest of it unused, buckets of offsets start at 0, which is no positions at all.

Where a parameter allows it, the variant starts as the source's own function: gamma of ``learned`` at 0 (at 1 where the
source is twiced, at -1 where it applies A twice), the factors of a feedback at 0 and learned, the attentions of
``gradient_boosted`` after the first with values that are 0, alpha and beta of ``inversion`` at 1 and 0, slopes of
``local_linear`` and beta of ``delta`` at 0, a gate with projections that are 0, where it is 1, a sink at a logit of
-10, which takes next to nothing, lambda of ``value_residual`` at 0, forget gates with a bias of 16.

*Variant to variant*: parameters of the same meaning are kept. A position table can be used again, as vectors that are
added or compared; where the source has none, or a pair of projections for every layer in place of a shared one, there
is nothing to make the target's of, and the conversion is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from .backbone_row import Attention
from .backbones import of_config
from .models.spec_axes import (
    CONVERTED_FORGET_BIAS,
    CONVERTED_SINK,
    NO_FEEDBACK_YET,
    LayerSpec,
    layer_schedule,
    uses_position_table,
)
from .models.spec_fields import FILTER_FIELDS, FilterSpecMixin, preset_fields

_VERSION = "filter_spec_version"
_IDENTITY_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")
"""Fields of a configuration that say what it is or where it came from, not how the model is built."""

_AXIS_SETTINGS = {
    "content_kernel": ("content_bandwidth",),
    "position_kernel": (
        "position_bandwidth",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "rotary_base",
    ),
    "boosting": ("boosting_steps", "boosted_layers", "gradient_boosting_source", "robust_penalty", "robust_threshold"),
    "feedback": ("neutreno_lambda", "pid_gains", "learn_feedback"),
    "normalisation": ("sinkhorn_iterations",),
}
"""Fields that belong to an axis: a variant's stay as they are where its axis does."""

Made = dict[str, tuple[torch.Tensor, list[str]]]
"""Parameter -> its value and the source tensors that it was made of."""


def variant_fields(source: Any, preset: str, overrides: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the variant's configuration.

    Args:
        source: configuration of the source.
        preset: what it is converted to.
        overrides: fields that win over all others.

    Returns:
        All fields, and those of the filter that a source variant hands on.
    """
    left_out = {*_IDENTITY_FIELDS, *FILTER_FIELDS, _VERSION}
    fields = {name: value for name, value in source.to_dict().items() if name not in left_out}
    chosen = {**preset_fields(preset), **overrides}
    stock = {name: getattr(FilterSpecMixin, name) for name in FILTER_FIELDS}
    kept = {
        name: getattr(source, name)
        for axis, names in _AXIS_SETTINGS.items()
        for name in names
        if name not in chosen
        and getattr(source, axis, stock[axis]) == chosen.get(axis, stock[axis])
        and getattr(source, name, stock[name]) != stock[name]
    }
    feedback = chosen.get("feedback", "none")
    if feedback != getattr(source, "feedback", "none") and not {"neutreno_lambda", "pid_gains"} & set(overrides):
        start = NO_FEEDBACK_YET.get(feedback, {})
        if start and overrides.get("learn_feedback", True):
            chosen = {**start, "learn_feedback": True, **chosen}
    return {**fields, **kept, **chosen}, kept


def check_structure(source: Any, variant: Any, overrides: dict[str, Any]) -> None:
    """Refuse overrides that make another backbone of the checkpoint: its tensors would be cut, or stay at random.

    Raises:
        ValueError: naming the field, its value and the one that is allowed.
    """
    for name in ("num_hidden_layers", "num_attention_heads"):
        if getattr(source, name) != getattr(variant, name):
            aliases = {name, variant.attribute_map.get(name, name)}
            given = next((key for key in overrides if key in aliases), name)
            raise ValueError(
                f"{given} must be the checkpoint's {getattr(source, name)}, for which its tensors are made, got "
                f"{getattr(variant, name)}"
            )
    pairs = getattr(source, "classifier_pairs", False)
    if getattr(variant, "classifier_pairs", False) != pairs:
        raise ValueError(
            f"classifier_pairs must be the checkpoint's {pairs}, for which its head is made, got {not pairs}"
        )
    is_variant = hasattr(source, "layer_specs")
    if uses_position_table(variant) and is_variant and not uses_position_table(source):
        raise ValueError(
            f"position_kernel={variant.position_kernel!r} needs a table of positions, which the source does not have, "
            f"since its position_kernel is {source.position_kernel!r}: choose a preset whose positions need no table "
            "(position_kernel 'gaussian', 'alibi', 'relative_buckets', 'rotary' or 'none')"
        )
    if (
        is_variant
        and "untied" in {spec.position_kernel for spec in source.layer_specs}
        and (variant.share_position_projections and not source.share_position_projections)
    ):
        raise ValueError(
            "share_position_projections=True needs one pair of position projections, and each layer of the source has "
            "trained one of its own: convert with share_position_projections=False"
        )


def variant_weights(stock: PreTrainedModel, variant: PreTrainedModel) -> Made:
    """The variant's tensors that are made of the source's, or that start where the source's function is kept.

    The latter are made of no tensor: their list is empty.
    """
    source, target = stock.state_dict(), variant.state_dict()
    prefix = base_prefix(stock)
    sources, targets = _schedule(stock.config), layer_schedule(variant.config)
    tables = _position_tables(source, stock, variant, prefix)
    projections = _position_projections(source, target, of_config(variant.config).attention, len(targets), prefix)
    starts = _starts(target, sources, targets)
    other_positions = {
        layer
        for layer, (old, new) in enumerate(zip(sources, targets, strict=True))
        if old.position_kernel != new.position_kernel
    }
    other_feedback = getattr(stock.config, "feedback", "none") != variant.config.feedback
    made: Made = {}
    for name in target:
        # The same name is another quantity where h_p is in other units, or other factors belong to the feedback.
        renamed = (name.endswith("position_log_bandwidth") and _layer_of(name) in other_positions) or (
            name.endswith("feedback_gains") and other_feedback
        )
        if name in tables:
            made[name] = tables[name]
        elif name.endswith("mask_token") and not _is_usable(source.get(name), variant):
            continue
        elif name in source and not renamed:
            made[name] = (source[name], [name])
        elif name in projections:
            made[name] = projections[name]
        elif name in starts:
            made[name] = (starts[name], [])
    return made


def _is_usable(mask_token: torch.Tensor | None, variant: PreTrainedModel) -> bool:
    """Whether a mask token has a direction, or gets one: masked patches of 0 have no gradient that can be used."""
    return mask_token is not None and (bool(mask_token.any()) or variant.base_model.embeddings.adds_positions)


def base_prefix(model: PreTrainedModel) -> str:
    """What the names of the backbone's parameters begin with in a model with a head."""
    return "" if type(model) is type(model.base_model) else f"{model.base_model_prefix}."


def unused_rows(stock: PreTrainedModel, variant: PreTrainedModel) -> list[str]:
    """The table's rows of the patches, where only that of the class token went into something."""
    embeddings: Any = getattr(variant.base_model, "embeddings", None)
    if not hasattr(embeddings, "cls_token") or embeddings.position_embeddings is not None or not _has_class_row(stock):
        return []
    return [f"{base_prefix(stock)}embeddings.position_embeddings (rows of the patches)"]


def _schedule(config: Any) -> list[LayerSpec]:
    if hasattr(config, "layer_specs"):
        specs: list[LayerSpec] = config.layer_specs
        return specs
    return [LayerSpec("dot_product", "additive", "none", 2, "standard", "none")] * config.num_hidden_layers


def _layer_of(name: str) -> int:
    """The layer that a parameter's name speaks of: the first number in it."""
    return next(int(part) for part in name.split(".") if part.isdigit())


def _has_class_row(model: PreTrainedModel) -> bool:
    """Whether a ViT's table has a row for the class token too, as where positions are added."""
    return all(spec.position_kernel == "additive" for spec in _schedule(model.config))


def _position_tables(
    source: dict[str, torch.Tensor], stock: PreTrainedModel, variant: PreTrainedModel, prefix: str
) -> Made:
    """ViT: where patches are compared by position, the class row of the table is part of the class token's content."""
    table, token = f"{prefix}embeddings.position_embeddings", f"{prefix}embeddings.cls_token"
    if table not in source or _has_class_row(stock) == variant.base_model.embeddings.adds_positions:
        return {}
    rows = source[table]
    if variant.base_model.embeddings.adds_positions:
        return {table: (torch.cat((torch.zeros_like(rows[:, :1]), rows), dim=1), [table])}
    made = {token: (source[token] + rows[:, :1], [token, table])}
    if variant.base_model.embeddings.position_embeddings is not None:
        made[table] = (rows[:, 1:], [table])
    return made


def _position_projections(
    source: dict[str, torch.Tensor],
    target: dict[str, torch.Tensor],
    places: Attention,
    num_layers: int,
    prefix: str,
) -> Made:
    """U_Q, U_K and their norm, for every layer that has its own and for the model that shares one pair."""
    made: Made = {}
    shared = f"{prefix}position_projection"
    for layer in range(num_layers):
        norm, own = prefix + places.norm_of(layer), f"{prefix}{places.filter.format(layer)}.position_projection"
        names = [prefix + name.format(layer) for name in (places.query, places.key)]
        query, key = source[names[0]], source[names[1]]
        if names[0] == names[1]:
            # Conv1D stores [in, out], with query, key and value side by side.
            query, key, _ = query.T.chunk(3)
        for wanted in [own, shared] if layer == 0 else [own]:
            if f"{wanted}.query.weight" not in target:
                continue
            parts = ("norm.weight", "norm.bias", "query.weight", "key.weight")
            if f"{shared}.query.weight" in source:
                made |= {f"{wanted}.{part}": (source[f"{shared}.{part}"], [f"{shared}.{part}"]) for part in parts}
                continue
            made |= {
                f"{wanted}.norm.{kind}": (source[f"{norm}.{kind}"], [f"{norm}.{kind}"]) for kind in ("weight", "bias")
            }
            made |= {f"{wanted}.query.weight": (query, [names[0]]), f"{wanted}.key.weight": (key, [names[1]])}
    return made


def _starts(
    target: dict[str, torch.Tensor], sources: list[LayerSpec], targets: list[LayerSpec]
) -> dict[str, torch.Tensor]:
    """Where parameters start that the source does not have, so that the layer computes what the source's does.

    gamma of ``learned`` is a function of the source's booster: A + gamma A(I - A).
    """
    starts = {}
    for name, parameter in target.items():
        if name.endswith("filter.gate.projection.weight"):
            starts[name] = torch.zeros_like(parameter)
        if name.endswith(("scalar_bias.value_residual", "filter.forget_gates.weight")):
            starts[name] = torch.zeros_like(parameter)
        if name.endswith("filter.forget_gates.bias"):
            starts[name] = torch.full_like(parameter, CONVERTED_FORGET_BIAS)
        if name.endswith("scalar_bias.sink"):
            starts[name] = torch.full_like(parameter, CONVERTED_SINK)
        if not name.endswith("scalar_bias.boosting_gain"):
            continue
        old = sources[_layer_of(name)]
        gamma = 0.0
        if old.boosting_steps == 2:
            gamma = {"twicing": 1.0, "diffusion": -1.0, "sos": -1.0}.get(old.boosting, 0.0)
        starts[name] = torch.full_like(parameter, gamma)
    return starts
