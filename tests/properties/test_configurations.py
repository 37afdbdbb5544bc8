"""Generated configurations: a model that runs and is saved as it was asked for, or one line that names a field."""

from __future__ import annotations

import json
import math
from typing import Any

import hypothesis
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import strategies as st

from hf_imgproc_attn import (
    ImgProcBertConfig,
    ImgProcBertModel,
    ImgProcGPT2Config,
    ImgProcGPT2Model,
    ImgProcViTConfig,
    ImgProcViTModel,
)
from hf_imgproc_attn.errors import plain_message
from hf_imgproc_attn.models import spec_axes
from hf_imgproc_attn.models.spec_fields import FILTER_FIELDS, PRESETS, plain
from tests.properties.strategies import anything, examples

GPT2 = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 12, "bos_token_id": 0}
BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 17}
VIT = {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 1}
del VIT["vocab_size"]
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (ImgProcGPT2Config, ImgProcGPT2Model, {**GPT2, "eos_token_id": 0}),
    "vit": (ImgProcViTConfig, ImgProcViTModel, VIT),
    "bert": (ImgProcBertConfig, ImgProcBertModel, {**BERT, "max_position_embeddings": 12}),
}
CHOICES = {
    "content_kernel": spec_axes.CONTENT_KERNELS,
    "position_kernel": spec_axes.POSITION_KERNELS,
    "boosting": spec_axes.BOOSTINGS,
    "residual": spec_axes.RESIDUALS,
    "feedback": spec_axes.FEEDBACKS,
    "gate": spec_axes.GATES,
    "normalisation": spec_axes.NORMALISATIONS,
    "robust_penalty": (None, *spec_axes.ROBUST_PENALTIES),
    "gradient_boosting_source": (None, *spec_axes.GRADIENT_BOOSTING_SOURCES),
}
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.one_of(st.sampled_from(values), st.lists(st.sampled_from(values), max_size=3))
       for name, values in CHOICES.items()},
    "content_bandwidth": st.one_of(st.floats(0.1, 9), st.lists(st.floats(0.1, 9), max_size=3)),
    "position_bandwidth": st.one_of(st.floats(0.1, 9), st.lists(st.integers(1, 9), max_size=3)),
    "learn_bandwidths": st.booleans(),
    "share_position_projections": st.booleans(),
    "relative_attention_num_buckets": st.sampled_from([4, 8, 32, 6]),
    "relative_attention_max_distance": st.sampled_from([2, 16, 128]),
    "rotary_base": st.sampled_from([2, 100.0, 10_000]),
    "boosting_steps": st.one_of(st.integers(1, 5), st.lists(st.integers(1, 4), max_size=3)),
    "boosted_layers": st.lists(st.integers(-3, 3), max_size=3),
    "neutreno_lambda": st.floats(0, 1),
    "pid_gains": st.lists(st.floats(0, 1), min_size=2, max_size=4),
    "learn_feedback": st.booleans(),
    "robust_threshold": st.floats(0.1, 4),
    "sinkhorn_iterations": st.integers(1, 5),
}  # fmt: skip
STOCK = {
    "gpt2": ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions", "n_inner", "resid_pdrop", "attn_pdrop",
             "layer_norm_epsilon", "initializer_range", "scale_attn_weights", "use_cache", "activation_function",
             "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
    "vit": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "image_size", "patch_size",
            "num_channels", "qkv_bias", "hidden_dropout_prob", "layer_norm_eps", "hidden_act", "encoder_stride"),
    "bert": ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
             "max_position_embeddings", "type_vocab_size", "hidden_act", "attention_probs_dropout_prob",
             "layer_norm_eps", "is_decoder", "add_cross_attention", "pad_token_id"),
}  # fmt: skip


@st.composite
def configurations(draw: Any) -> tuple[str, dict[str, Any], set[str]]:
    """Backbone, fields, and those of them that were drawn."""
    backbone = draw(st.sampled_from(sorted(MODELS)))
    fields = dict(draw(st.sampled_from(list(PRESETS.values()))))
    drawn = set(fields)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["plausible", "plausible", "odd", "stock", "misspelt"]))
        if kind == "stock":
            name = draw(st.sampled_from(STOCK[backbone]))
            fields[name] = draw(st.one_of(anything, st.sampled_from([1, 2, 4, 8, 16])))
        else:
            name = draw(st.sampled_from(FILTER_FIELDS))
            value = draw(PLAUSIBLE.get(name, anything) if kind == "plausible" else anything)
            if kind == "misspelt":
                place = draw(st.integers(1, len(name) - 1))
                name = draw(st.sampled_from([name[:place] + name[place + 1 :], name + "s", name.replace("_", "-")]))
            fields[name] = value
        drawn.add(name)
    return backbone, fields, drawn


def too_large(fields: dict[str, Any]) -> bool:
    """A model that is right and does not fit into a test."""
    return any(type(value) is int and value > 1_000 for value in fields.values())


def check(case: tuple[str, dict[str, Any], set[str]]) -> None:
    """Refused in one line by name; or built, kept as given, read back from JSON, and running without a NaN."""
    backbone, fields, drawn = case
    configuration, model_class, sizes = MODELS[backbone]
    torch.default_generator.manual_seed(0)  # torch.manual_seed notes down where it was called, for each device
    model = None
    try:
        config = configuration(**{**sizes, **fields})
        if too_large(fields):
            return
        model = model_class(config).eval()
    except (ValueError, StrictDataclassError) as error:
        message = plain_message(error)
        assert len(message.splitlines()) == 1, message
        assert "Traceback" not in message
        assert any(name in message for name in (*drawn, *FILTER_FIELDS, *config_names(configuration), "images")), (
            message
        )
        return
    for name in drawn:
        kept, given = getattr(config, name), fields[name]
        given = plain(given) if name in FILTER_FIELDS else given  # NumPy's numbers are kept as Python's
        assert type(kept) is type(given), (name, given, kept)
        assert kept == given, (name, given, kept)
    again = configuration.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.layer_specs == config.layer_specs
    runs(backbone, model, config)


def config_names(configuration: Any) -> list[str]:
    """The stock model's fields, and the other names that it has for them."""
    return [*configuration.__dataclass_fields__, *configuration.attribute_map]


def runs(backbone: str, model: Any, config: Any) -> None:
    """Finite hidden states for a batch of two."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if backbone == "vit":
            side = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
            got = model(torch.randn(2, config.num_channels, *side, generator=generator)).last_hidden_state
        else:
            length = min(6, config.max_position_embeddings)
            ids = torch.randint(config.vocab_size, (2, length), generator=generator)
            got = model(input_ids=ids).last_hidden_state
    wild = config.initializer_range > 1 or not math.isfinite(config.initializer_range)
    assert wild or got.isfinite().all()
    assert got.shape[0] == 2


@examples(250, 10_000)
@hypothesis.given(configurations())
def test_configurations_run_or_are_refused(case: tuple[str, dict[str, Any], set[str]]) -> None:
    check(case)
