"""The filter specification: presets, round trips, the error of every rule, the layer schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError

from hf_imgproc_attn.catalogue.matching import closest_preset, preset_in_words, preset_name
from hf_imgproc_attn.models import spec_axes, spec_fields
from hf_imgproc_attn.models.boost_depth import FEEDBACK, RESIDUAL
from hf_imgproc_attn.models.boost_operators import BOOSTING, SEQUENTIAL, extra_streams
from hf_imgproc_attn.models.configuration_imgproc_gpt2 import ImgProcGPT2Config
from hf_imgproc_attn.models.configuration_imgproc_vit import ImgProcViTConfig
from hf_imgproc_attn.models.kernel_content import CONTENT_COLUMNS, CONTENT_LOGITS
from hf_imgproc_attn.models.spec_axes import LayerSpec, is_stock_layer
from hf_imgproc_attn.models.spec_fields import PRESETS, FilterSpecMixin
from tests.helpers import RunPython
from tests.models.helpers import tiny_gpt2_config, tiny_vit_config
from tests.models.variants import PRESETS_OF

FIELDS = tuple(FilterSpecMixin.__dataclass_fields__)
LISTS: dict[str, dict[str, Any]] = {
    "kernels": {
        "content_kernel": ["gaussian", "dot_product", "gaussian"],
        "position_kernel": ["none", "untied", "gaussian"],
    },
    "boosting": {"boosting": ["none", "twicing", "twicing"], "boosting_steps": [2, 3, 1]},
    "bandwidths": {
        "position_kernel": "gaussian",
        "content_bandwidth": [1, 2.5, 3, 4.0],
        "position_bandwidth": [1.5] * 4,
    },
    "numbers": {"position_kernel": "untied", "content_bandwidth": 3, "position_bandwidth": 0.5},
    "boosted": {"boosting": "twicing", "boosting_steps": 4, "boosted_layers": [0, -1]},
    "shared": {"position_kernel": ["untied", "none", "untied"], "share_position_projections": True},
    "buckets": {
        "position_kernel": "relative_buckets",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
    },
    "gains": {"feedback": "pid", "pid_gains": [0, 0.25, -1]},
    "strength": {"feedback": "neutreno", "neutreno_lambda": 1},
    "rounds": {
        "boosting": ["twicing", "gradient_boosted", "gradient_boosted"],
        "boosting_steps": [1, 3, 2],
        "gradient_boosting_source": "input",
    },
    "normalisations": {"normalisation": ["sink", "sigmoid", "softpick"]},
    "gates": {"boosting": "inversion", "gate": ["headwise", "none", "elementwise"]},
    "learned_gains": {"feedback": "pid", "pid_gains": [0, 0, 0], "learn_feedback": True},
}
VARIANTS = [(preset, {}) for preset in PRESETS] + [("softmax", fields) for fields in LISTS.values()]

# --------------------------------------------------------------------------------------------------------------------
# Presets and round trips
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "fields"), VARIANTS, ids=[*PRESETS, *LISTS])
def test_json_round_trip(tiny: Callable[..., Any], tmp_path: Path, preset: str, fields: dict[str, Any]) -> None:
    """What is written to config.json gives back the same configuration, field types included."""
    if preset not in presets_of(tiny):
        return
    config = tiny(preset, **fields)
    config.save_pretrained(tmp_path)
    read = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    for loaded in (type(config).from_pretrained(tmp_path), type(config)(**read), type(config).from_dict(read)):
        assert type(loaded) is type(config)
        assert {name: getattr(loaded, name) for name in FIELDS} == {name: getattr(config, name) for name in FIELDS}
        assert loaded.layer_specs == config.layer_specs
        again, once = loaded.to_dict(), config.to_dict()
        assert {**again, "_name_or_path": ""} == {**once, "_name_or_path": ""}
    assert read["model_type"] == type(config).model_type


@pytest.mark.parametrize(("config_class", "stock_name"), [(ImgProcGPT2Config, "gpt2"), (ImgProcViTConfig, "vit")])
def test_defaults_are_the_stock_model(config_class: Any, stock_name: str) -> None:
    """Without arguments every stock field has its stock default and every layer is a stock layer."""
    ours = config_class().to_dict()
    stock_class = next(kind for kind in config_class.__mro__ if kind.__module__.startswith("transformers.models"))
    stock = stock_class().to_dict()
    assert stock["model_type"] == stock_name
    expected = {**stock, "model_type": f"imgproc_{stock_name}"}
    assert {name: ours[name] for name in expected} == expected  # a backbone may have fields for heads of ours
    config = config_class()
    assert all(is_stock_layer(config, spec) for spec in config.layer_specs)


def presets_of(tiny: Callable[..., Any]) -> tuple[str, ...]:
    return PRESETS_OF[str(tiny().model_type).removeprefix("imgproc_")]


# What the presets have of the later axes.
LATER = {
    "gated": {"gate": "elementwise"},
    **{name: {"normalisation": name} for name in ("sink", "sigmoid", "softpick", "sinkhorn")},
}

# Content, position, boosting and its steps, residual, feedback, learned bandwidths; see docs/framework.md, section 8.
TABLE = {
    "softmax": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "bilateral": ("dot_product", "untied", "none", 2, "standard", "none", True),
    "bilateral_gaussian": ("gaussian", "gaussian", "none", 2, "standard", "none", True),
    "twicing": ("dot_product", "additive", "twicing", 2, "standard", "none", False),
    "bilateral_twicing": ("dot_product", "untied", "twicing", 2, "standard", "none", True),
    "nlm": ("gaussian", "none", "none", 2, "standard", "none", True),
    "elliptical": ("elliptical", "additive", "none", 2, "standard", "none", False),
    "neutreno": ("dot_product", "additive", "none", 2, "standard", "neutreno", False),
    "pidformer": ("dot_product", "additive", "none", 2, "standard", "pid", False),
    "alibi": ("dot_product", "alibi", "none", 2, "standard", "none", False),
    "t5_bias": ("dot_product", "relative_buckets", "none", 2, "standard", "none", False),
    "rope": ("dot_product", "rotary", "none", 2, "standard", "none", False),
    "nope": ("dot_product", "none", "none", 2, "standard", "none", False),
    "tupe": ("dot_product", "untied", "none", 2, "standard", "none", False),
    "sos": ("dot_product", "additive", "sos", 3, "standard", "none", False),
    "learned_twicing": ("dot_product", "additive", "learned", 2, "standard", "none", False),
    "gradient_boosted": ("dot_product", "additive", "gradient_boosted", 2, "standard", "none", False),
    "boosted_residual": ("dot_product", "additive", "none", 2, "twicing", "none", False),
    "inversion": ("dot_product", "additive", "inversion", 2, "standard", "none", False),
    "dynamic_inversion": ("dot_product", "additive", "dynamic_inversion", 2, "standard", "none", False),
    "exclusive": ("dot_product", "additive", "exclusive", 2, "standard", "none", False),
    "local_linear": ("dot_product", "additive", "local_linear", 2, "standard", "none", False),
    "robust": ("dot_product", "additive", "robust", 3, "standard", "none", False),
    "gated": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "qk_norm": ("cosine", "additive", "none", 2, "standard", "none", True),
    "value_residual": ("dot_product", "additive", "none", 2, "standard", "value_residual", False),
    "sink": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "sigmoid": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "softpick": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "sinkhorn": ("dot_product", "additive", "none", 2, "standard", "none", False),
    "forgetting": ("dot_product", "forget", "none", 2, "standard", "none", False),
    "differential": ("dot_product", "additive", "differential", 2, "standard", "none", False),
    "delta": ("dot_product", "additive", "delta", 2, "standard", "none", False),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_the_papers(tiny: Callable[..., Any], preset: str) -> None:
    """The named variants, and whether they learn their bandwidths; nothing comes before layer 0."""
    if preset not in presets_of(tiny):
        with pytest.raises(Exception, match="'sinkhorn' scales|'forget' sums|'delta' corrects"):
            tiny(preset)
        return
    config = tiny(preset)
    *axes, learned = TABLE[preset]
    layer = LayerSpec(*axes, **LATER.get(preset, {}))
    assert config.layer_specs == [layer._replace(residual="standard"), layer, layer]
    assert config.learn_bandwidths is learned
    assert config.share_position_projections is (preset == "tupe")
    assert preset_name(config) == preset


def test_there_are_no_other_presets() -> None:
    assert set(PRESETS) == set(TABLE)


@pytest.mark.parametrize(
    ("preset", "written_out"),
    [
        ("twicing", {"boosting_steps": 2}),
        ("sos", {"boosting_steps": 3}),
        ("gradient_boosted", {"boosting_steps": 2, "gradient_boosting_source": "residual"}),
        ("pidformer", {"pid_gains": [0.5, 0.05, 0.05]}),
        ("t5_bias", {"relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
        ("rope", {"rotary_base": 10000}),
    ],
)
def test_a_preset_with_its_defaults_written_out_is_that_preset(
    tiny: Callable[..., Any], preset: str, written_out: dict[str, Any]
) -> None:
    config = tiny(preset, **written_out)
    assert preset_name(config) == preset
    assert config.layer_specs == tiny(preset).layer_specs


def test_published_strength_of_the_backbone() -> None:
    """NeuTRENO: 0.6 for images, 0.4 for text (Nguyen 2023)."""
    for make, strength, other in ((tiny_vit_config, 0.6, 0.4), (tiny_gpt2_config, 0.4, 0.6)):
        assert preset_name(make("neutreno", neutreno_lambda=strength)) == "neutreno"
        assert preset_name(make("neutreno", neutreno_lambda=other)) == "custom"
        assert closest_preset(make("neutreno", neutreno_lambda=other)) == ("neutreno", {"neutreno_lambda": other})


@pytest.mark.parametrize(
    ("preset", "fields", "name", "changes"),
    [
        ("neutreno", {"neutreno_lambda": 0.0, "learn_feedback": True}, "neutreno", None),
        ("pidformer", {"pid_gains": [0.0, 0.0, 0.0], "learn_feedback": True}, "pidformer", None),
        ("twicing", {"boosting_steps": 3, "boosted_layers": [-1]}, "twicing", None),
        ("twicing", {"boosting": "osher"}, "twicing", {}),
        ("twicing", {"boosting": "sos"}, "sos", {}),
        ("gradient_boosted", {"gradient_boosting_source": "input"}, "gradient_boosted", None),
        ("bilateral", {"share_position_projections": True, "learn_bandwidths": False}, "tupe", {}),
        ("tupe", {"content_bandwidth": 3.0}, "tupe", None),
        ("softmax", {"content_bandwidth": 3.0}, "softmax", None),
        ("bilateral", {"boosting": "sos"}, "custom", {**PRESETS["bilateral"], "boosting": "sos"}),
        ("softmax", {"boosting": ["none", "twicing", "twicing"]}, "custom", None),
    ],
    ids=str,
)
def test_a_varied_preset_keeps_its_name(
    tiny: Callable[..., Any], preset: str, fields: dict[str, Any], name: str, changes: dict[str, Any] | None
) -> None:
    """With the fields in which it differs; another kernel, booster or scheme makes another filter of it."""
    config, changes = tiny(preset, **fields), fields if changes is None else changes
    assert closest_preset(config) == (name, changes)
    assert preset_name(config) == ("custom" if changes else name)
    assert preset_in_words(config).startswith(f"{name} with " if changes else name)
    assert all(f"{field}={value!r}" in preset_in_words(config) for field, value in changes.items())


def test_overrides_win_over_the_preset(tiny: Callable[..., Any]) -> None:
    config = tiny("bilateral_twicing", learn_bandwidths=False, boosting_steps=3, boosted_layers=[-1])
    assert (config.learn_bandwidths, config.position_kernel) == (False, "untied")
    assert [spec.boosting for spec in config.layer_specs] == ["none", "none", "twicing"]
    assert preset_name(config) == "custom"
    assert PRESETS["bilateral_twicing"]["learn_bandwidths"] is True, "the table of presets must not change"
    assert spec_fields.preset_fields("twicing") is not PRESETS["twicing"]


@pytest.mark.parametrize("name", ["bilatral", "", "Softmax", None, 3, ["softmax"]])
def test_unknown_preset(tiny: Callable[..., Any], name: Any) -> None:
    with pytest.raises(ValueError, match="preset must be one of softmax, bilateral, .*, got ") as error:
        tiny(name)
    assert repr(name) in str(error.value)


def test_stock_names_of_sizes_work(tiny: Callable[..., Any]) -> None:
    """Fields can be given by the common Transformers names; the rules see the sizes that were given."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 6}
    config = type(tiny())(**sizes, content_bandwidth=[1.0, 2.0], boosting=["none", "twicing"])
    assert {name: getattr(config, name) for name in sizes} == sizes
    assert [spec.boosting for spec in config.layer_specs] == ["none", "twicing"]


# --------------------------------------------------------------------------------------------------------------------
# Schedule, registries, imports
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "boosted"),
    [
        ({}, [0, 1, 2]),
        ({"boosted_layers": [0]}, [0]),
        ({"boosted_layers": [-1]}, [2]),
        ({"boosted_layers": [-3, 1]}, [0, 1]),
        ({"boosted_layers": [2, -2]}, [1, 2]),
        ({"boosting": ["none", "twicing", "none"]}, [1]),
    ],
)
def test_layer_schedule(tiny: Callable[..., Any], fields: dict[str, Any], boosted: list[int]) -> None:
    """Negative indices count from the end; layers that are not boosted are stock layers."""
    config = tiny("twicing", **fields)
    specs = config.layer_specs
    assert [index for index, spec in enumerate(specs) if spec.is_boosted] == boosted
    assert [index for index, spec in enumerate(specs) if not is_stock_layer(config, spec)] == boosted
    if tiny is tiny_gpt2_config:
        expected = [spec_axes.FILTER_LAYER_TYPE if index in boosted else "full_attention" for index in range(3)]
        assert config.layer_types == expected


@pytest.mark.parametrize(
    ("boosting", "steps", "expected"),
    [
        ("twicing", None, ("twicing", 2)),
        ("osher", None, ("twicing", 2)),
        ("osher", 5, ("twicing", 5)),
        ("diffusion", None, ("diffusion", 2)),
        ("sos", None, ("sos", 3)),
        ("sos", 2, ("sos", 2)),
    ],
)
def test_default_steps_and_the_alias(
    tiny: Callable[..., Any], boosting: str, steps: int | None, expected: tuple[str, int]
) -> None:
    """Osher's iterative regularisation of a fixed linear filter is k-step twicing; the value is saved as given."""
    config = tiny("softmax", boosting=boosting, boosting_steps=steps)
    assert {(spec.boosting, spec.boosting_steps) for spec in config.layer_specs} == {expected}
    assert config.boosting == boosting
    mixed = tiny("softmax", boosting=["none", boosting, "sos"], boosting_steps=steps)
    assert (mixed.layer_specs[1].boosting, mixed.layer_specs[1].boosting_steps) == expected


def test_schedule_of_lists(tiny: Callable[..., Any]) -> None:
    config = tiny("softmax", **LISTS["kernels"], **LISTS["boosting"])
    assert [tuple(spec[:4]) for spec in config.layer_specs] == [
        ("gaussian", "none", "none", 2),
        ("dot_product", "untied", "twicing", 3),
        ("gaussian", "gaussian", "twicing", 1),
    ]
    assert [spec.compares_positions for spec in config.layer_specs] == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "stock"),
    [
        ({}, True),
        ({"position_kernel": "none"}, True),
        ({"content_kernel": "gaussian"}, False),
        ({"position_kernel": "untied"}, False),
        ({"boosting": "twicing"}, False),
        ({"boosting": "twicing", "boosting_steps": 1}, False),
        ({"position_kernel": "alibi"}, False),
        ({"learn_bandwidths": True}, False),
        ({"content_bandwidth": 2}, False),
        ({"feedback": "pid"}, False),
        ({"residual": "sos"}, True),
        ({"content_kernel": ["dot_product", "dot_product", "elliptical"]}, False),
    ],
)
def test_which_layers_are_stock(tiny: Callable[..., Any], fields: dict[str, Any], stock: bool) -> None:
    config = tiny("softmax", **fields)
    assert [is_stock_layer(config, spec) for spec in config.layer_specs] == [stock] * 3


def test_registries_have_the_allowed_keys() -> None:
    """A value that validation lets through has its function, and no function is unreachable."""
    # A cosine is the dot product of vectors that the layer makes.
    assert set(CONTENT_LOGITS) == set(CONTENT_COLUMNS) == set(spec_axes.CONTENT_KERNELS) - {"cosine"}
    # An alias, the boosters with several maps, the one that needs rows in order, those that look at weights.
    others = {"osher", "gradient_boosted", "differential", *SEQUENTIAL, *spec_axes.WEIGHTS_ONE_BY_ONE}
    assert set(BOOSTING) == set(spec_axes.BOOSTINGS) - others
    assert set(RESIDUAL) == set(spec_axes.RESIDUALS)
    assert set(FEEDBACK) == set(spec_axes.FEEDBACKS)
    streams = {name: extra_streams(name, 3) for name in (*BOOSTING, *SEQUENTIAL, "gradient_boosted")}
    streams = {name: count for name, count in streams.items() if count}
    assert streams == {"twicing": 2, "learned": 1, "diffusion": 2, "sos": 2, "delta": 1, "gradient_boosted": 4}


def test_filter_spec_needs_neither_torch_nor_transformers(run_python: RunPython) -> None:
    """Command lines read the presets at no cost."""
    heavy = "print([name for name in ('torch', 'transformers', 'numpy', 'huggingface_hub') if name in sys.modules])"
    result = run_python(
        "-c", f"import sys\nfrom hf_imgproc_attn.models.spec_fields import PRESETS, preset_fields\n{heavy}", fresh=True
    )
    assert result.stdout == "[]\n", result.stderr


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"boosting": "twicing", "boosting_steps": np.int64(3)}, {"boosting_steps": 3}),
        ({"boosting": "twicing", "boosting_steps": np.array([2, 3])}, {"boosting_steps": [2, 3]}),
        ({"boosting": np.str_("sos"), "boosted_layers": [np.int32(-1)]}, {"boosting": "sos", "boosted_layers": [-1]}),
        ({"content_kernel": np.array(["gaussian", "dot_product"])}, {"content_kernel": ["gaussian", "dot_product"]}),
        ({"content_bandwidth": np.float32(0.5)}, {"content_bandwidth": 0.5}),
        ({"content_bandwidth": [np.float64(1), 2]}, {"content_bandwidth": [1.0, 2]}),
        ({"position_kernel": "untied", "learn_bandwidths": np.True_}, {"learn_bandwidths": True}),
        ({"feedback": "pid", "pid_gains": np.array([0.5, 0.25, 0])}, {"pid_gains": [0.5, 0.25, 0.0]}),
    ],
)
def test_values_of_numpy_are_kept_as_plain_ones(fields: dict[str, Any], kept: dict[str, Any]) -> None:
    config = ImgProcGPT2Config(n_layer=2, n_head=2, n_embd=8, **fields)
    written = json.loads(config.to_json_string())
    assert {name: written[name] for name in kept} == kept
    assert {name: type(getattr(config, name)) for name in kept} == {name: type(value) for name, value in kept.items()}
    later = ImgProcGPT2Config(n_layer=2, n_head=2, n_embd=8)
    for name, value in fields.items():
        setattr(later, name, value)
    assert later.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("steps", [np.float64(2), np.True_, np.int64(0), np.array(["2"]), np.datetime64("2020")])
def test_values_of_numpy_are_refused_where_plain_ones_are(steps: Any) -> None:
    with pytest.raises((StrictDataclassError, ValueError), match="boosting_steps"):
        ImgProcGPT2Config(boosting="twicing", boosting_steps=steps)
