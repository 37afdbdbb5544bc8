"""Every rule of the specification: field, rule and value are in the message."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2Model
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTModel
from tests.models.helpers import tiny_gpt2_config, tiny_vit_config

REFUSED = (ValueError, StrictDataclassFieldValidationError, StrictDataclassClassValidationError)
TINY = {"gpt2": tiny_gpt2_config, "vit": tiny_vit_config}
MODELS = {"gpt2": ImgProcGPT2Model, "vit": ImgProcViTModel}

# --------------------------------------------------------------------------------------------------------------------
# Every rule: field, rule and value are in the message
# --------------------------------------------------------------------------------------------------------------------

GAUSSIAN = {"position_kernel": "gaussian"}
TWICING = {"boosting": "twicing"}
BUCKETS = {"position_kernel": "relative_buckets"}
RULES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    # Wrong types: the strict dataclass names field, type and value.
    ({**TWICING, "boosting_steps": True}, ("boosting_steps", "int", "True")),
    ({**TWICING, "boosting_steps": 2.0}, ("boosting_steps", "int", "2.0")),
    ({**TWICING, "boosting_steps": [2, True, 2]}, ("boosting_steps", "True")),
    ({**TWICING, "boosted_layers": [True]}, ("boosted_layers", "True")),
    ({**TWICING, "boosted_layers": 1}, ("boosted_layers", "list", "1")),
    ({"content_kernel": None}, ("content_kernel", "str", "None")),
    ({"content_kernel": ("gaussian",) * 3}, ("content_kernel", "list", "tuple")),
    ({"content_kernel": ["gaussian", "gaussian", 3]}, ("content_kernel", "3")),
    ({"learn_bandwidths": 1}, ("learn_bandwidths", "bool", "1")),
    ({"learn_bandwidths": "yes"}, ("learn_bandwidths", "bool", "yes")),
    ({"position_kernel": "untied", "share_position_projections": 1}, ("share_position_projections", "bool", "1")),
    ({"content_bandwidth": "4"}, ("content_bandwidth", "float", "4")),
    ({"content_bandwidth": True}, ("content_bandwidth", "True")),
    ({"content_bandwidth": [1.0, 2.0, 3.0, True]}, ("content_bandwidth", "True")),
    ({**GAUSSIAN, "position_bandwidth": True}, ("position_bandwidth", "True")),
    ({"residual": ["standard"] * 3}, ("residual", "str", "standard")),
    # Unknown values.
    ({"content_kernel": "gauss"}, ("content_kernel must be one of dot_product, gaussian, elliptical", "'gauss'")),
    ({"content_kernel": ["gaussian", "gaussian", "Gaussian"]}, ("content_kernel must be one of", "'Gaussian'")),
    ({"position_kernel": "alibi2"}, ("position_kernel must be one of additive, untied, gaussian, alibi", "'alibi2'")),
    ({"boosting": "twice"}, ("boosting must be one of none, twicing, osher, learned, diffusion", "'twice'")),
    ({"residual": "stanard"}, ("residual must be one of standard, twicing, sos, osher", "'stanard'")),
    ({"feedback": "neutrino"}, ("feedback must be one of none, neutreno, pid", "'neutrino'")),
    # Lists of the wrong length.
    ({"content_kernel": ["gaussian"] * 2}, ("content_kernel", "one value for each of the 3 layers", "got 2")),
    ({"position_kernel": ["none"] * 4}, ("position_kernel", "one value for each of the 3 layers", "got 4")),
    ({"boosting": ["twicing"]}, ("boosting", "one value for each of the 3 layers", "got 1", "['twicing']")),
    ({"boosting": []}, ("boosting", "one value for each of the 3 layers", "got 0")),
    ({**TWICING, "boosting_steps": [2, 3]}, ("boosting_steps", "one value for each of the 3 layers", "[2, 3]")),
    ({"content_bandwidth": [1.0, 2.0]}, ("content_bandwidth", "one value for each of the 4 heads", "[1.0, 2.0]")),
    ({"content_bandwidth": []}, ("content_bandwidth", "one value for each of the 4 heads", "got 0")),
    (
        {**GAUSSIAN, "position_bandwidth": [1] * 5},
        ("position_bandwidth", "one value for each of the 4 heads", "got 5"),
    ),
    # Boosted layers and steps.
    ({**TWICING, "boosted_layers": [3]}, ("boosted_layers", "from -3 to 2", "got 3")),
    ({**TWICING, "boosted_layers": [-4]}, ("boosted_layers", "from -3 to 2", "got -4")),
    ({**TWICING, "boosted_layers": [0, -3]}, ("boosted_layers", "at most once", "[0, -3]")),
    ({**TWICING, "boosted_layers": [1, 1]}, ("boosted_layers", "at most once", "[1, 1]")),
    ({**TWICING, "boosted_layers": []}, ("boosted_layers", "at least one layer", "[]")),
    ({"boosted_layers": [1]}, ("boosted_layers needs a boosting", "[1]")),
    ({"boosting": ["twicing"] * 3, "boosted_layers": [1]}, ("boosted_layers must be None", "[1]")),
    ({**TWICING, "boosting_steps": [1, 2, 3], "boosted_layers": [1]}, ("boosted_layers must be None", "[1]")),
    ({**TWICING, "boosting_steps": 0}, ("boosting_steps must be an integer >= 1", "got 0")),
    ({**TWICING, "boosting_steps": -1}, ("boosting_steps must be an integer >= 1", "got -1")),
    ({**TWICING, "boosting_steps": 17}, ("boosting_steps", "<= 16", "got 17")),
    ({**TWICING, "boosting_steps": [2, 0, 2]}, ("boosting_steps must be an integer >= 1", "got 0")),
    ({"boosting_steps": 3}, ("boosting_steps has no effect with boosting='none'", "got 3")),
    ({"boosting_steps": 2}, ("boosting_steps has no effect with boosting='none'", "got 2")),
    ({"boosting": "learned", "boosting_steps": 2}, ("boosting_steps has no effect with boosting='learned'", "got 2")),
    (
        {"boosting": "gradient_boosted", "boosting_steps": 1},
        ("boosting_steps must be >= 2", "'gradient_boosted'", "1"),
    ),
    ({"boosting": "gradient_boosted", "boosting_steps": 17}, ("boosting_steps", "<= 16", "got 17")),
    (
        {"boosting": ["twicing", "none", "gradient_boosted"], "boosting_steps": [1, 2, 1]},
        ("boosting_steps must be >= 2", "'gradient_boosted'", "[1, 2, 1]"),
    ),
    *(
        (
            {"boosting": booster, "gradient_boosting_source": "input"},
            ("gradient_boosting_source needs boosting", "input"),
        )
        for booster in ("none", "twicing", ["twicing"] * 3)
    ),
    (
        {"boosting": "gradient_boosted", "gradient_boosting_source": "z"},
        ("gradient_boosting_source must be one of residual, input", "'z'"),
    ),
    ({"boosting": "gradient_boosted", "gradient_boosting_source": ["input"] * 3}, ("gradient_boosting_source", "str")),
    ({"boosting": "sos", "boosting_steps": 17}, ("boosting_steps", "<= 16", "got 17")),
    ({"boosting": ["none"] * 3, "boosting_steps": 3}, ("boosting_steps has no effect", "got 3")),
    # Positions.
    (
        {"position_kernel": ["additive", "none", "none"]},
        ("position_kernel", "all layers or none", "'additive', 'none'"),
    ),
    ({"position_bandwidth": 3.0}, ("position_bandwidth needs a position_kernel", "3.0", "'additive'")),
    ({"position_kernel": "none", "position_bandwidth": 3}, ("position_bandwidth needs a position_kernel", "'none'")),
    ({"share_position_projections": True}, ("share_position_projections", "'untied'", "'additive'")),
    ({**GAUSSIAN, "share_position_projections": True}, ("share_position_projections", "'untied'", "'gaussian'")),
    (
        {"position_kernel": "alibi", "position_bandwidth": 3.0},
        ("position_bandwidth needs a position_kernel", "'alibi'"),
    ),
    (
        {"content_kernel": "elliptical", "position_kernel": ["none", "none", "rotary"], "num_attention_heads": 5},
        ("'elliptical' cannot be combined with position_kernel 'rotary'", "'none', 'none', 'rotary'"),
    ),
    ({"position_kernel": "rotary"}, ("'rotary' turns pairs of features", "divisible by", "= 5")),
    (
        {"position_kernel": ["none", "rotary", "rotary"], "num_attention_heads": 20},
        ("'rotary' turns pairs of features", "divisible by", "= 1"),
    ),
    *(
        ({"position_kernel": "rotary", "num_attention_heads": 5, "rotary_base": bad}, ("rotary_base", f"got {bad!r}"))
        for bad in (1, 0.5, math.nan, math.inf)
    ),
    ({"rotary_base": 100.0}, ("rotary_base needs position_kernel 'rotary'", "100.0", "'additive'")),
    ({"relative_attention_num_buckets": 8}, ("relative_attention_num_buckets needs position_kernel", "8")),
    ({"relative_attention_max_distance": 8}, ("relative_attention_max_distance needs position_kernel", "8")),
    *(
        ({**BUCKETS, "relative_attention_num_buckets": bad}, ("num_buckets must be a multiple of 4", f"got {bad}"))
        for bad in (0, 2, 6, -4, 8192)
    ),
    ({**BUCKETS, "relative_attention_num_buckets": 2.0}, ("relative_attention_num_buckets", "int", "2.0")),
    ({**BUCKETS, "relative_attention_max_distance": 16}, ("max_distance must be larger than half", "16", "got 16")),
    ({**BUCKETS, "relative_attention_num_buckets": 256}, ("needs a relative_attention_max_distance", "got None")),
    # Gains, and what looks at the layers before.
    ({"neutreno_lambda": 0.5}, ("neutreno_lambda needs feedback='neutreno'", "0.5", "'none'")),
    ({"feedback": "pid", "neutreno_lambda": 0.5}, ("neutreno_lambda needs feedback='neutreno'", "'pid'")),
    ({"feedback": "neutreno", "pid_gains": [1, 0, 0]}, ("pid_gains needs feedback='pid'", "'neutreno'")),
    *(
        ({"feedback": "neutreno", "neutreno_lambda": bad}, ("neutreno_lambda must be a finite number", f"got {bad!r}"))
        for bad in (math.nan, math.inf, -math.inf, 10**400)
    ),
    *(
        ({"feedback": "pid", "pid_gains": bad}, ("pid_gains must be three finite numbers", f"got {bad!r}"))
        for bad in ([0.5, 0.1], [], [1, 2, 3, 4], [0.5, math.nan, 0.0], [math.inf, 0, 0])
    ),
    ({"learn_feedback": True}, ("learn_feedback=True needs feedback", "'none'")),
    ({"feedback": "neutreno", "learn_feedback": 1}, ("learn_feedback", "bool", "1")),
    ({"feedback": "neutreno", "neutreno_lambda": True}, ("neutreno_lambda", "True")),
    ({"feedback": "pid", "pid_gains": [True, 0, 0]}, ("pid_gains", "True")),
    *(
        ({name: value, "num_hidden_layers": 1}, (f"{name}={value!r}", "num_hidden_layers must be >= 2", "got 1"))
        for name, value in (
            ("feedback", "neutreno"),
            ("feedback", "pid"),
            ("residual", "twicing"),
            ("residual", "sos"),
            ("residual", "osher"),
            ("content_kernel", "elliptical"),
        )
    ),
    (
        {"content_kernel": ["elliptical", "gaussian", "gaussian"]},
        ("'elliptical' has no effect in layer 0", "'elliptical', 'gaussian', 'gaussian'"),
    ),
    # Bandwidths.
    *(
        ({**GAUSSIAN, name: value}, (f"{name} must be a finite number > 0", f"got {bad!r}"))
        for name in ("content_bandwidth", "position_bandwidth")
        for value, bad in [*((bad, bad) for bad in (math.nan, math.inf, 0, 0.0, -1)), ([1, 2, 3, -4.0], -4.0)]
    ),
    # Sizes.
    ({"num_attention_heads": 3}, ("num_attention_heads must divide hidden_size", "3 heads", "20")),
    ({"num_hidden_layers": 0}, ("num_hidden_layers must be >= 1", "got 0")),
    ({"num_hidden_layers": 0, **TWICING, "boosted_layers": [0]}, ("num_hidden_layers must be >= 1", "got 0")),
    ({"num_attention_heads": 0}, ("num_attention_heads must be >= 1", "got 0")),
    # Fields that Transformers has and we do not.
    ({"per_layer_config": {"0": {}}}, ("per_layer_config is not supported", "{'0': {}}")),
]
GPT2_NAMES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}


@pytest.mark.parametrize("backbone", list(TINY))
@pytest.mark.parametrize(("fields", "words"), RULES, ids=[str(fields) for fields, _ in RULES])
def test_every_rule_names_field_rule_and_value(backbone: str, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    """A wrong field is refused at construction; the message says which, why and what was got."""
    if backbone == "gpt2":
        fields = {GPT2_NAMES.get(name, name): value for name, value in fields.items()}
    with pytest.raises(REFUSED) as error:
        TINY[backbone]("softmax", **fields)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("bandwidth", [10**400, 1e-200, 1e-30, 1e200], ids=["10^400", "1e-200", "1e-30", "1e200"])
def test_bandwidths_outside_every_float_are_refused(tiny: Callable[..., Any], bandwidth: float) -> None:
    """2/h^2 must be a positive finite float32 number, or the logits are NaN or blind."""
    with pytest.raises(REFUSED, match="content_bandwidth must be "):
        tiny("softmax", content_bandwidth=bandwidth)


MISSPELT = [
    ("boosting_step", "boosting_steps"),
    ("boosting-steps", "boosting_steps"),
    ("Boosting_Steps", "boosting_steps"),
    ("boostingSteps", "boosting_steps"),
    ("boosting_layers", "boosted_layers"),
    ("boosted_layer", "boosted_layers"),
    ("boosted-layers", "boosted_layers"),
    ("bosting", "boosting"),
    ("contentkernel", "content_kernel"),
    ("content-kernel", "content_kernel"),
    ("positional_kernel", "position_kernel"),
    ("content_bandwith", "content_bandwidth"),
    ("position_bandwidths", "position_bandwidth"),
    ("learn_bandwidth", "learn_bandwidths"),
    ("share_position_projection", "share_position_projections"),
    ("residuals", "residual"),
    ("feedbacks", "feedback"),
    ("neutreno_lamda", "neutreno_lambda"),
    ("filter_backends", "filter_backend"),
    ("pid_gain", "pid_gains"),
    ("learn_feedbacks", "learn_feedback"),
    ("rotary_bases", "rotary_base"),
    ("relative_attention_num_bucket", "relative_attention_num_buckets"),
    ("relative_attention_max_distances", "relative_attention_max_distance"),
]


@pytest.mark.parametrize(("wrong", "meant"), MISSPELT)
def test_near_misses_of_our_fields(tiny: Callable[..., Any], wrong: str, meant: str) -> None:
    """Transformers would store a mistyped field and train another model than was asked for."""
    with pytest.raises(ValueError, match=f"{wrong}=7; did you mean {meant}"):
        tiny("softmax", **{wrong: 7})


def test_a_preset_is_no_field_of_a_configuration(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Stored like any unknown keyword, it would name a variant that the model is not."""
    config = tiny("softmax")
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"preset='rope'; presets are for from_preset\('rope'\)"):
        type(config)(preset="rope")
    with pytest.raises(ValueError, match="unknown configuration field preset='twicing'"):
        type(config).from_pretrained(tmp_path, preset="twicing")


def test_near_misses_are_refused_when_a_folder_is_loaded(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """An override beside a saved configuration is as easily mistyped."""
    config = tiny("twicing")
    config.save_pretrained(tmp_path)
    assert type(config).from_pretrained(tmp_path, boosting_steps=3).boosting_steps == 3
    with pytest.raises(ValueError, match="boosting_step=3; did you mean boosting_steps"):
        type(config).from_pretrained(tmp_path, boosting_step=3)


@pytest.mark.parametrize(
    "stock",
    [
        "position_embedding_type",
        "task_specific_params",
        "classifier_dropout",
        "layer_scale",
        "contents",
        "kernel_size",
    ],
)
def test_other_unknown_fields_are_stored_as_transformers_does(tiny: Callable[..., Any], stock: str) -> None:
    """Old files have fields that we do not know; only near misses of ours are refused."""
    assert getattr(tiny("softmax", **{stock: 0.25}), stock) == 0.25


# --------------------------------------------------------------------------------------------------------------------
# Assignment after construction
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("boosting_steps", True),
        ("content_kernel", 3),
        ("learn_bandwidths", 1),
        ("content_bandwidth", "x"),
        ("boosted_layers", 1),
    ],
)
def test_types_are_checked_on_assignment(tiny: Callable[..., Any], field: str, value: Any) -> None:
    config = tiny("twicing")
    before = getattr(config, field)
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        setattr(config, field, value)
    assert getattr(config, field) == before


@pytest.mark.parametrize("backbone", list(TINY))
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("boosting_steps", 0, "boosting_steps must be an integer >= 1"),
        ("boosted_layers", [9], "boosted_layers must be integers from -3 to 2"),
        ("content_kernel", "foo", "content_kernel must be one of"),
        ("content_kernel", ["gaussian"], "content_kernel as a list must have one value for each of the 3 layers"),
        ("content_bandwidth", -1.0, "content_bandwidth must be a finite number"),
        ("position_bandwidth", 2.0, "position_bandwidth needs a position_kernel"),
        ("share_position_projections", True, "share_position_projections=True needs"),
    ],
)
def test_rules_are_checked_when_the_model_is_built(backbone: str, field: str, value: Any, message: str) -> None:
    """Fields set one by one may contradict each other for a moment, but no model is built from them."""
    config = TINY[backbone]("twicing")
    setattr(config, field, value)
    with pytest.raises(REFUSED, match=message):
        MODELS[backbone](config)


def test_the_backend_is_chosen_at_run_time_and_never_saved(tiny: Callable[..., Any], tmp_path: Path) -> None:
    config = tiny("twicing", filter_backend="blocked")
    assert config.filter_backend == "blocked"
    assert tiny("twicing").filter_backend == "auto"
    config.save_pretrained(tmp_path)
    assert "backend" not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert not any("backend" in key for key in config.to_dict())
    assert type(config).from_pretrained(tmp_path).filter_backend == "auto"
    assert type(config).from_pretrained(tmp_path, filter_backend="sdpa").filter_backend == "sdpa"
    assert copy.deepcopy(config).filter_backend == "blocked"
    config.filter_backend = "reference"
    assert config.filter_backend == "reference"
    for wrong in ("fast", "", None, 3):
        with pytest.raises(
            ValueError, match="filter_backend must be one of auto, reference, sdpa, blocked, chunked, triton"
        ):
            config.filter_backend = wrong
    with pytest.raises(ValueError, match="filter_backend must be one of"):
        tiny("twicing", filter_backend="fast")
