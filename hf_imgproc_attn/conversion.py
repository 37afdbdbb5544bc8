"""Turn a stock GPT-2 or ViT checkpoint into a variant, with every tensor accounted for.

Initialisation of what the stock model lacks (arXiv 2506.10371 leaves it open, *choice*): for ``untied`` positions the
LayerNorm before the position projections is a copy of the layer's first norm, and U_Q, U_K start as that layer's W_Q,
W_K without bias (shared projections: layer 0's); bandwidths and class-token logits have their defaults. Where
positions are no longer added to the tokens, the stock class position is added to the class token's content; kernels
that need no position table leave the rest of it unused, buckets of offsets start at 0, which is no positions at all.
``softmax`` and ``twicing`` need no new parameter. ``learned`` starts as twicing (gamma 1), and ``gradient_boosted`` as
the stock model: the value projection of its second attention starts at 0, its queries, keys and gate at random.

Another residual scheme than ``standard`` is another function of the same weights, far from the stock model's: such a
conversion is a starting point for training, and the report and the log say so.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
)
from transformers.utils import cached_file, logging

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
from .models.spec_fields import preset_fields
from .output_paths import writing

logger = logging.get_logger(__name__)

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

# Fields of a stock configuration that say what it is or where it came from, not how the model is built.
_IDENTITY_FIELDS = ("model_type", "architectures", "auto_map", "transformers_version", "_name_or_path")

_PROBE_LENGTH = 32


@dataclass
class ConversionReport:
    """What a conversion did.

    Attributes:
        source: name or path of the stock checkpoint.
        architecture: the stock class.
        preset: the variant.
        mapped: parameter of the variant -> the source tensors it was made of.
        unused: source tensors, or rows of one, that nothing was made of.
        new: parameters of the variant that no source tensor went into, with their default values.
        max_difference: largest absolute difference of the outputs (logits, or hidden states of a bare model) on a
            probe.
        output_std: standard deviation of the stock outputs on the probe, to compare it with.
        warnings: what a user should know before using the model, one sentence each.
    """

    source: str
    architecture: str
    preset: str
    mapped: dict[str, list[str]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    max_difference: float = float("nan")
    output_std: float = float("nan")
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        changed = {name: made_of for name, made_of in self.mapped.items() if made_of != [name]}
        lines = [f"{self.architecture} {self.source} -> {self.preset}"]
        lines.append(f"  {len(self.mapped) - len(changed)} tensors copied")
        lines += [f"  {name} <- {' + '.join(made_of)}" for name, made_of in sorted(changed.items())]
        lines.append(f"  unused source tensors: {', '.join(self.unused) or 'none'}")
        lines.append(f"  new parameters at their defaults: {', '.join(self.new) or 'none'}")
        lines.append(
            f"  outputs on a random probe differ by at most {self.max_difference:.3g} "
            f"(standard deviation of the stock outputs {self.output_std:.3g})"
        )
        lines += [f"  warning: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def convert(
    model_or_path: PreTrainedModel | str | os.PathLike,
    preset: str,
    *,
    return_report: bool = False,
    **config_overrides: Any,
) -> Any:
    """Convert a stock GPT-2 or ViT (also a DeiT that was published as ViT) to a variant.

    Args:
        model_or_path: a stock model, or the path or Hub name of one.
        preset: name of the variant, see ``PRESETS``.
        return_report: also return a :class:`ConversionReport`.
        **config_overrides: configuration fields of the variant that win over the preset's and the checkpoint's, such
            as ``boosted_layers=[-2, -1]``; they must not change the shape of a tensor.

    Returns:
        The variant in evaluation mode, in the source's dtype; with ``return_report`` the pair (model, report).

    Raises:
        ValueError: for an unknown preset, an architecture that is not supported, a checkpoint with missing tensors, or
            overrides that change the shape of a tensor.
    """
    preset_fields(preset)
    source, stock, file_unused = _load_stock(model_or_path)
    variant_class = ARCHITECTURES[type(stock).__name__][1]
    fields = {key: value for key, value in stock.config.to_dict().items() if key not in _IDENTITY_FIELDS}
    config = variant_class.config_class.from_preset(preset, **{**fields, **config_overrides})
    implementation = stock.config._attn_implementation
    if implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
    variant = variant_class(config)
    report = ConversionReport(str(source), type(stock).__name__, preset)
    if config.residual != "standard":
        report.warnings.append(
            f"the residual scheme {config.residual!r} changes the function of the checkpoint, which was trained with "
            "'standard': train the model before using it"
        )
    for warning in report.warnings:
        logger.warning(warning)

    weights, report.mapped, used = _variant_weights(stock, variant)
    state = variant.state_dict()
    report.new = sorted(set(state) - set(weights))
    report.unused = sorted({*file_unused, *(set(stock.state_dict()) - used), *_unused_rows(stock, variant)})
    wrong = [name for name, tensor in weights.items() if name not in state or state[name].shape != tensor.shape]
    if wrong:
        raise ValueError(
            f"the overrides {config_overrides!r} change the shape of {', '.join(wrong)}: convert cannot do that"
        )
    variant.load_state_dict({**state, **weights})
    variant.to(stock.dtype)
    if getattr(stock, "generation_config", None) is not None:
        variant.generation_config = stock.generation_config
    variant.eval()
    report.max_difference, report.output_std = _probe(stock, variant)
    return (variant, report) if return_report else variant


def convert_checkpoint(source: str, preset: str, output_dir: str, **config_overrides: Any) -> ConversionReport:
    """Convert a checkpoint and save it, with its tokenizer or image processor where it has one.

    Args:
        source: path or Hub name of a stock checkpoint.
        preset: name of the variant.
        output_dir: a folder that does not exist yet or is empty.
        **config_overrides: as in :func:`convert`.

    Raises:
        ValueError: as :func:`convert`, and if ``output_dir`` holds files.
    """
    folder = Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"output must be a new or empty folder, got {output_dir!r}, which holds files")
    model, report = convert(source, preset, return_report=True, **config_overrides)
    with writing(folder):
        model.save_pretrained(folder)
        _copy_processor(source, folder)
    return report


def _copy_processor(source: str, folder: Path) -> None:
    """Save the source's tokenizer or image processor beside the model; a checkpoint without one is complete as it is.

    Asked by file: v5's ``AutoTokenizer`` invents an empty tokenizer where there is none.
    """
    for processor_class, names in (
        (AutoTokenizer, ("tokenizer.json", "tokenizer_config.json", "vocab.json")),
        (AutoImageProcessor, ("preprocessor_config.json",)),
    ):
        found = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in names)
        if any(path is not None for path in found):
            processor_class.from_pretrained(source).save_pretrained(folder)


def _load_stock(model_or_path: Any) -> tuple[Any, PreTrainedModel, list[str]]:
    """The source's name, the stock model and the tensors of its file that the stock class has no place for."""
    if isinstance(model_or_path, PreTrainedModel):
        _check_architecture(type(model_or_path).__name__, str(getattr(model_or_path.config, "model_type", None)))
        return model_or_path.config._name_or_path or "(a model in memory)", model_or_path, []
    config = AutoConfig.from_pretrained(model_or_path)
    names = config.architectures or []
    if len(names) != 1:
        raise ValueError(f"{model_or_path} must name one architecture in its config.json, got {names!r}")
    _check_architecture(names[0], config.model_type)
    stock_class = ARCHITECTURES[names[0]][0]
    if stock_class._keys_to_ignore_on_load_unexpected:
        stock_class = _listing_all_tensors(stock_class)
    model, info = stock_class.from_pretrained(model_or_path, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{model_or_path} lacks tensors of {names[0]}: {', '.join(sorted(info['missing_keys']))}")
    return model_or_path, model, list(info["unexpected_keys"])


def _listing_all_tensors(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class without its patterns of tensors to drop silently: stock GPT-2 hides the causal masks of old files."""

    def __init__(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        stock_class.__init__(self, *args, **kwargs)
        self._keys_to_ignore_on_load_unexpected = set()

    return type(stock_class.__name__, (stock_class,), {"__init__": __init__})


def _check_architecture(name: str, model_type: str) -> None:
    if name not in ARCHITECTURES or model_type not in ("gpt2", "vit"):
        raise ValueError(
            f"architecture must be a stock one of {', '.join(ARCHITECTURES)}, got {name} (model type {model_type})"
        )


def _variant_weights(
    stock: PreTrainedModel, variant: PreTrainedModel
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]], set[str]]:
    """The variant's tensors that are made from the stock model, what each is made of, and the source names used."""
    source, target = stock.state_dict(), variant.state_dict()
    prefix = "" if type(stock) is type(stock.base_model) else f"{stock.base_model_prefix}."
    weights, mapped = {}, {}
    special = _class_position(source, variant, prefix) | _position_projections(source, variant, prefix)
    for name in target:
        if name in special:
            weights[name], mapped[name] = special[name]
        elif name in source:
            weights[name], mapped[name] = source[name], [name]
    return weights, mapped, {name for made_of in mapped.values() for name in made_of}


def _class_position(
    source: dict[str, torch.Tensor], variant: PreTrainedModel, prefix: str
) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """Where patches are compared by position, the stock table loses its class entry to the class token's content."""
    table, token = f"{prefix}embeddings.position_embeddings", f"{prefix}embeddings.cls_token"
    if table not in source or variant.base_model.embeddings.adds_positions:
        return {}
    made = {token: (source[token] + source[table][:, :1], [token, table])}
    if variant.base_model.embeddings.position_embeddings is not None:
        made[table] = (source[table][:, 1:], [table])
    return made


def _unused_rows(stock: PreTrainedModel, variant: PreTrainedModel) -> list[str]:
    """The stock table's rows of the patches, where only that of the class token went into something."""
    embeddings = getattr(variant.base_model, "embeddings", None)
    if embeddings is None or embeddings.position_embeddings is not None:
        return []
    prefix = "" if type(stock) is type(stock.base_model) else f"{stock.base_model_prefix}."
    return [f"{prefix}embeddings.position_embeddings (rows of the patches)"]


def _position_projections(
    source: dict[str, torch.Tensor], variant: PreTrainedModel, prefix: str
) -> dict[str, tuple[torch.Tensor, list[str]]]:
    """U_Q, U_K and their norm, for every layer that has its own and for the model that shares one pair."""
    made: dict[str, tuple[torch.Tensor, list[str]]] = {}
    state = variant.state_dict()
    for layer in range(variant.config.num_hidden_layers):
        if f"{prefix}h.0.ln_1.weight" in source:
            norm, projection = f"{prefix}h.{layer}.ln_1", f"{prefix}h.{layer}.attn.c_attn.weight"
            own = f"{prefix}h.{layer}.attn.filter.position_projection"
            # Conv1D stores [in, out], with query, key and value side by side.
            query, key, _ = source[projection].T.chunk(3)
            names = (projection, projection)
        else:
            norm, attention = f"{prefix}layers.{layer}.layernorm_before", f"{prefix}layers.{layer}.attention"
            own = f"{attention}.filter.position_projection"
            names = (f"{attention}.q_proj.weight", f"{attention}.k_proj.weight")
            query, key = source[names[0]], source[names[1]]
        targets = [own, f"{prefix}position_projection"] if layer == 0 else [own]
        for target in targets:
            if f"{target}.query.weight" in state:
                made |= {
                    f"{target}.norm.{kind}": (source[f"{norm}.{kind}"], [f"{norm}.{kind}"])
                    for kind in ("weight", "bias")
                }
                made |= {f"{target}.query.weight": (query, [names[0]]), f"{target}.key.weight": (key, [names[1]])}
    return made


@torch.no_grad()
def _probe(stock: PreTrainedModel, variant: PreTrainedModel) -> tuple[float, float]:
    """Largest difference of the two models' outputs on a fixed random input, and the stock outputs' deviation."""
    generator = torch.Generator().manual_seed(0)
    config = stock.config
    if stock.main_input_name == "input_ids":
        length = min(_PROBE_LENGTH, config.n_positions)
        ids = torch.randint(config.vocab_size, (1, length), generator=generator)
        inputs = {"input_ids": ids, "use_cache": False}
    else:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(1, config.num_channels, height, width, generator=generator)
        inputs = {"pixel_values": pixels.to(stock.dtype)}
    was_training = stock.training
    outputs = []
    for model in (stock.eval(), variant):
        moved = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in inputs.items()}
        outputs.append(model(**moved)[0].float().cpu())
    stock.train(was_training)
    return float((outputs[0] - outputs[1]).abs().max()), float(outputs[0].std())
