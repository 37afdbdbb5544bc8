"""Turn a checkpoint into a variant, with every tensor accounted for.

A stock checkpoint becomes a variant, and a variant another one or stock attention again; what each tensor is made of,
and where new ones start, is in ``conversion_weights``. Where a parameter allows it the function is kept; where it is
not, the report says what that costs (``conversion_probe``).

Another residual scheme than the one a checkpoint was trained with is another function of the same weights, far from
the source's: such a conversion is a starting point for training, and the report and the log say so.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from .catalogue.matching import preset_in_words
from .conversion_any import Applied, apply_to, becomes_filtered, last_layers
from .conversion_files import copy_processor, write_card
from .conversion_probe import Change, Inputs, can_be_probed, difference, measure, probe_inputs
from .conversion_source import ARCHITECTURES, Source, head_of, load_source, new_variant
from .conversion_stock import in_stock_class
from .conversion_weights import check_structure, unused_rows, variant_fields, variant_weights
from .filtered import applied_summary, in_words
from .models.any_filter import filtered_layers, is_filtered
from .models.modeling_imgproc_filtered import stock_class
from .models.spec_axes import STEPPED_BOOSTINGS
from .models.spec_fields import preset_fields
from .output_paths import writing

__all__ = ["ARCHITECTURES", "ConversionReport", "convert", "convert_checkpoint"]

logger = logging.get_logger(__name__)

LAST_LAYERS = [-2, -1]
"""What is boosted instead of all layers where that costs much; the authors' language model boosts these too."""


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: name or path of the checkpoint.
        architecture: its class.
        preset: the variant that was asked for.
        variant: what the filter is: its preset, with the fields in which it differs from that.
        source_preset: what the source was, likewise: ``softmax`` for a stock model.
        mapped: parameter of the variant -> the source tensors it was made of.
        unused: source tensors, or rows of one, that nothing was made of.
        new: parameters of the variant that no source tensor went into. They start at their defaults, or where the
            source's function is kept.
        kept: filter fields that a source variant handed on, since the axis they belong to is the same.
        boosting: the booster, its steps and its layers, in words; empty without one.
        layers: of a model that keeps its stock class: what each filtered layer has, as a table; else empty.
        max_difference: largest absolute difference of the outputs (logits, or hidden states of a bare model) on a
            probe.
        output_std: standard deviation of the source's outputs on the probe, to compare it with.
        change: what it costs: the rise of a language model's cross-entropy, or the predictions of a classifier that
            change; None for other models.
        license: the source's, as the Hub names it; empty where none is known, None where it was not asked for.
        warnings: what a user should know before using the model, one sentence each.
        advice: what costs less, where the change is large; else empty.
    """

    source: str
    architecture: str
    preset: str
    variant: str = ""
    source_preset: str = "softmax"
    mapped: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    boosting: str = ""
    layers: str = ""
    max_difference: float = float("nan")
    output_std: float = float("nan")
    change: Change | None = None
    license: str | None = None
    warnings: list[str] = field(default_factory=list)
    advice: str = ""

    def __str__(self) -> str:
        changed = {name: made_of for name, made_of in self.mapped.items() if made_of != [name]}
        lines = [f"{self.architecture} {self.source}, {self.source_preset} -> {self.variant or self.preset}"]
        if self.boosting:
            lines.append(f"  {self.boosting}")
        if self.kept:
            lines.append(
                f"  kept of the source: {', '.join(f'{name}={value!r}' for name, value in self.kept.items())}"
            )
        lines.append(f"  {len(self.mapped) - len(changed)} tensors copied")
        lines += [f"  {name} <- {' + '.join(made_of)}" for name, made_of in sorted(changed.items())]
        lines.append(f"  unused source tensors: {', '.join(self.unused) or 'none'}")
        lines.append(
            f"  new parameters, at their defaults or where the function is kept: {', '.join(self.new) or 'none'}"
        )
        lines += [f"  {line}" for line in self.layers.splitlines()]
        if math.isnan(self.output_std):
            lines.append("  outputs are not compared: no inputs of this kind of model are known")
        else:
            lines.append(
                f"  outputs on a random probe differ by at most {self.max_difference:.3g} "
                f"(standard deviation of the source's outputs {self.output_std:.3g})"
            )
        if self.change is not None:
            lines.append(f"  {self.change}")
        if self.license is not None:
            lines.append(f"  licence of the source: {self.license or 'none is known'}")
        lines += [f"  warning: {warning}" for warning in self.warnings]
        if self.advice:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)


def convert(
    model_or_path: PreTrainedModel | str | os.PathLike,
    preset: str,
    *,
    return_report: bool = False,
    samples: torch.Tensor | None = None,
    filtered: bool | None = None,
    **config_overrides: Any,
) -> Any:
    """Convert a model of one of the backbones (also a DeiT that was published as ViT) to a variant.

    A model of any other type keeps its stock class and gets the filter into its layers, as by ``apply_filter``.

    What allows it starts where the source's function is kept: gamma of ``learned``, and lambda or the gains of
    ``neutreno`` and ``pidformer``, which are learned (``learn_feedback``) from 0 on unless the overrides name a value.

    Args:
        model_or_path: a stock model or a variant, or the path or Hub name of one.
        preset: name of the variant, see ``PRESETS``.
        return_report: also return a :class:`ConversionReport`, for which the two models are compared.
        samples: what the report compares them on: token ids ``[texts, length]`` or pixel values
            ``[images, channels, height, width]``. None: texts that the source writes, or random inputs.
        filtered: True: models of the backbones keep their stock class too, and a variant that is converted to
            ``"softmax"`` gets it back. None: as their type says.
        **config_overrides: configuration fields of the variant that win over the preset's and the checkpoint's, such
            as ``boosted_layers=[-2, -1]``; they must not change the shape of a tensor. For a model that keeps its
            stock class arguments of ``apply_filter``, such as ``layers=[-2, -1]``.

    Returns:
        The variant in evaluation mode, in the source's dtype; with ``return_report`` the pair (model, report).

    Raises:
        ValueError: for an unknown preset, an architecture that is not supported, a checkpoint with missing tensors, a
            variant whose parameters cannot be made of the source's, or overrides that change the shape of a tensor.
        OSError: for weights that cannot be read.
    """
    preset_fields(preset)
    if becomes_filtered(model_or_path, filtered, preset):
        applied = apply_to(model_or_path, preset, config_overrides)
        report = _compare_filtered(applied, preset, config_overrides, samples) if return_report else None
        return applied.variant if report is None else (applied.variant, report)
    if filtered and config_overrides:
        raise ValueError(f"a stock class has no fields of filters, got {', '.join(config_overrides)}")
    source = load_source(model_or_path)
    if samples is not None:
        probe_inputs(source.model, source.name, samples)  # refuses wrong ones before the work
    variant, report = _convert(source, preset, config_overrides)
    if filtered:
        variant = in_stock_class(variant)
    for warning in report.warnings:
        logger.warning(warning)
    if not return_report:
        return variant
    was_training = source.model.training
    source.model.eval()
    try:
        report.max_difference, report.output_std = difference(source.model, variant)
        inputs = probe_inputs(source.model, source.name, samples)
        if inputs is not None:
            report.change = measure(source.model, variant, inputs)
            report.advice = _advice(source, preset, config_overrides, variant, report.change, inputs)
    finally:
        source.model.train(was_training)
    return variant, report


def _compare_filtered(
    applied: Applied, preset: str, arguments: dict[str, Any], samples: torch.Tensor | None
) -> ConversionReport:
    """The report of a model that keeps its stock class."""
    source, variant = applied.source, applied.variant
    inputs = probe_inputs(source, applied.name, samples)
    held, state = set(source.state_dict()), set(variant.state_dict())
    report = ConversionReport(
        applied.name,
        stock_class(variant).__name__,
        preset,
        in_words(variant) if is_filtered(variant) else "softmax",
        in_words(source) if is_filtered(source) else "softmax",
        mapped={name: [name] for name in sorted(held & state)},
        unused=sorted({*applied.unused, *(held - state)}),
        new=sorted(state - held),
        layers=str(filtered_layers(variant)),
    )
    if can_be_probed(source):
        report.max_difference, report.output_std = difference(source, variant)
    if inputs is not None:
        report.change = measure(source, variant, inputs)
        if report.change.is_large:
            if not is_filtered(variant):
                report.advice = STOCK_AGAIN
                return report
            fewer = last_layers(variant, preset, arguments)
            report.advice = _advice_in_words(None if fewer is None else measure(source, fewer, inputs), "layers")
    return report


def _convert(source: Source, preset: str, overrides: dict[str, Any]) -> tuple[PreTrainedModel, ConversionReport]:
    """The variant, and the report without what comparing the models tells."""
    stock: Any = source.model
    fields, kept = variant_fields(stock.config, preset, overrides)
    config: Any = source.variant_class.config_class(**fields)
    check_structure(stock.config, config, overrides)
    implementation = stock.config._attn_implementation
    if implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
    variant = new_variant(source, config)
    made = variant_weights(stock, variant)
    state, weights = variant.state_dict(), {name: tensor for name, (tensor, _) in made.items()}
    _check_shapes(stock.config, config, overrides, state, weights)
    variant.load_state_dict({**state, **weights})
    variant.to(stock.dtype)
    if getattr(stock, "generation_config", None) is not None:
        variant.generation_config = stock.generation_config
    report = ConversionReport(
        source.name,
        source.model.__class__.__name__,
        preset,
        preset_in_words(config),
        preset_in_words(stock.config) if source.is_variant else "softmax",
        mapped={name: made_of for name, (_, made_of) in made.items() if made_of},
        kept=kept,
        boosting=_boosting_in_words(config),
    )
    report.new = sorted(set(state) - set(report.mapped))
    used = {name for made_of in report.mapped.values() for name in made_of}
    report.unused = sorted({*source.unused, *(set(stock.state_dict()) - used), *unused_rows(stock, variant)})
    report.warnings = _warnings(source, variant, report)
    return variant.eval(), report


def convert_checkpoint(
    source: str, preset: str, output_dir: str, *, filtered: bool | None = None, **config_overrides: Any
) -> ConversionReport:
    """Convert a checkpoint and save it, with its tokenizer or image processor and its licence where it has one.

    Args:
        source: path or Hub name of a checkpoint, stock or a variant.
        preset: name of the variant.
        output_dir: a folder that does not exist yet or is empty.
        filtered: as in :func:`convert`.
        **config_overrides: as in :func:`convert`.

    Raises:
        ValueError: as :func:`convert`, and if ``output_dir`` holds files.
        OSError: as :func:`convert`.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output must be a new or empty folder, got {output_dir!r}, which holds files")
    model, report = convert(source, preset, return_report=True, filtered=filtered, **config_overrides)
    with writing(folder):
        model.save_pretrained(folder)
        copy_processor(source, folder, getattr(model.config, "num_channels", 3))
        summary = model.filter_summary() if hasattr(model, "filter_summary") else applied_summary(model)
        write_card(source, folder, report, summary)
    return report


def _check_shapes(
    source: Any, config: Any, overrides: dict[str, Any], state: dict[str, Any], weights: dict[str, Any]
) -> None:
    wrong = [name for name, tensor in weights.items() if state[name].shape != tensor.shape]
    if not wrong:
        return
    shapes = ", ".join(f"{name} from {list(weights[name].shape)} to {list(state[name].shape)}" for name in wrong)
    allowed = {
        name: getattr(source, name)
        for name in overrides
        if hasattr(source, name) and getattr(source, name) != getattr(config, name)
    }
    given = ", ".join(f"{name}={overrides[name]!r}" for name in allowed or overrides)
    of_source = ", ".join(f"{name}={value!r}" for name, value in allowed.items())
    raise ValueError(
        f"{given} would change the shape of {shapes}: convert keeps shapes"
        + (f", only the checkpoint's {of_source} is allowed" if of_source else "")
    )


def _warnings(source: Source, variant: PreTrainedModel, report: ConversionReport) -> list[str]:
    warnings = []
    trained = getattr(source.model.config, "residual", "standard")
    wanted: Any = variant.config.residual
    if wanted != trained:
        warnings.append(
            f"the residual scheme {wanted!r} changes the function of the checkpoint, which was trained with "
            f"{trained!r}: train the model before using it"
        )
    layers = zip(getattr(source.model.config, "layer_specs", []), variant.config.layer_specs, strict=False)
    changed = [
        (old.gradient_boosting_source, new.gradient_boosting_source)
        for old, new in layers
        if old.boosting == new.boosting == "gradient_boosted"
    ]
    if changed and changed[0][0] != changed[0][1]:  # it is the same in all layers of a model
        warnings.append(
            f"gradient_boosting_source={changed[0][1]!r} changes the function of the checkpoint, whose later rounds "
            f"were trained with {changed[0][0]!r}: train the model before using it"
        )
    dropped = [name for name in report.unused if ".filter." in name or ".position_projection." in f".{name}"]
    if dropped:
        warnings.append(
            f"{len(dropped)} trained tensors of the source's filter have no place in {report.preset}: they are unused"
        )
    model: Any = source.model
    if head_of(type(model)).has_parts and model.pooler is None:
        warnings.append("the checkpoint has no pooler: load it with add_pooling_layer=False, or you get a random one")
    return warnings


KEPT_BY_ANY = ("learned_twicing", "neutreno", "pidformer", "inversion", "value_residual")
KEPT_BY_OWN = ("gradient_boosted", "dynamic_inversion", "differential", "local_linear", "gated")
KEPT_IF_CAUSAL = "delta"
"""Presets with which a stock checkpoint computes what it did: in any model, in ours alone, in causal ones."""
STOCK_AGAIN = "attention is stock again: weights that were trained with the filter do without it from now on"


def _boosting_in_words(config: Any) -> str:
    """Which layers are boosted, by which booster, how often."""
    boosted = {index: spec for index, spec in enumerate(config.layer_specs) if spec.is_boosted}
    if not boosted:
        return ""
    kinds: dict[str, None] = {}
    for spec in boosted.values():
        counted = "rounds" if spec.boosting == "gradient_boosted" else "steps"
        steps = f", {spec.boosting_steps} {counted}" if spec.boosting in STEPPED_BOOSTINGS else ""
        kinds[spec.boosting + steps] = None
    number = config.num_hidden_layers
    which = f"all {number}" if len(boosted) == number else f"{', '.join(map(str, boosted))} of 0 to {number - 1}"
    return f"boosted layers: {which} ({' and '.join(kinds)})"


def _advice(
    source: Source, preset: str, overrides: dict[str, Any], variant: Any, change: Change, inputs: Inputs
) -> str:
    """What costs less than a large change; where that is boosting fewer layers, it is measured."""
    if not change.is_large:
        return ""
    if preset == "softmax" and not overrides:
        return STOCK_AGAIN
    specs = variant.config.layer_specs
    single_values = not isinstance(variant.config.boosting, list) and not isinstance(
        variant.config.boosting_steps, list
    )
    if single_values and sum(spec.is_boosted for spec in specs) > len(LAST_LAYERS):
        fewer, _ = _convert(source, preset, {**overrides, "boosted_layers": LAST_LAYERS})
        return _advice_in_words(measure(source.model, fewer, inputs), "boosted_layers")
    return _advice_in_words(None, "boosted_layers")


def _advice_in_words(less: Change | None, field_name: str) -> str:
    """What is said of a large change; ``less``: that of the last two layers alone, ``field_name`` chooses them."""
    if less is not None:
        costs = (
            f"{less.changed} of {less.predictions} change"
            if less.rise is None
            else f"it rises by {less.rise:.3f} nats"
        )
        how = "boosted" if field_name == "boosted_layers" else "filtered"
        return f"{how} in its last two layers only ({field_name}={LAST_LAYERS}) {costs}"
    kept = KEPT_BY_ANY if field_name == "layers" else KEPT_BY_ANY + KEPT_BY_OWN
    return (
        f"this is a starting point for training; what starts as the source's function: {', '.join(kept)}, and with a "
        f"causal mask {KEPT_IF_CAUSAL}"
    )
