"""Rules for the filter fields of a configuration, each on its own and against each other."""

import math
from typing import Any

from .spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    DEFAULT_MAX_DISTANCE,
    DEFAULT_NUM_BUCKETS,
    FEEDBACKS,
    GATES,
    GRADIENT_BOOSTING_SOURCES,
    KERNELS_WITH_BANDWIDTH,
    MAX_BANDWIDTH,
    MAX_BOOSTING_STEPS,
    MAX_SINKHORN_ITERATIONS,
    MIN_BANDWIDTH,
    MIN_ROBUST_THRESHOLD,
    NORMALISATIONS,
    POSITION_KERNELS,
    RESIDUALS,
    ROBUST_PENALTIES,
    STEPPED_BOOSTINGS,
    per_layer,
)
from .spec_versions import check_version

_SIZES = (
    "num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "max_position_embeddings", "n_inner",
    "intermediate_size", "type_vocab_size", "image_size", "patch_size", "num_channels", "encoder_stride",
)  # fmt: skip
_DROPOUTS = (
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout",
)  # fmt: skip


def check_filter_spec(config: Any) -> None:
    """Check the filter fields of a configuration against their rules and against each other.

    Args:
        config: any object with the fields of ``FilterSpecMixin``, ``num_hidden_layers``, ``num_attention_heads``
            and ``hidden_size``.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    check_version(config.filter_spec_version)
    check_architecture(config, config.must_be)
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    _check_sizes(config)
    _check_dropout(config)
    if config.hidden_size % num_heads:
        raise ValueError(
            f"num_attention_heads must divide hidden_size, got {num_heads} heads and hidden_size {config.hidden_size}"
        )
    for name, allowed in (
        ("content_kernel", CONTENT_KERNELS),
        ("position_kernel", POSITION_KERNELS),
        ("boosting", BOOSTINGS),
        ("residual", RESIDUALS),
        ("feedback", FEEDBACKS),
        ("gate", GATES),
        ("normalisation", NORMALISATIONS),
    ):
        _check_choice(name, getattr(config, name), allowed)
    for name in ("content_kernel", "position_kernel", "boosting", "boosting_steps", "gate", "normalisation"):
        per_layer(name, getattr(config, name), num_layers)
    _check_boosting(config, num_layers)
    _check_kernels(config, num_layers)
    _check_bandwidths(config, num_layers, num_heads)
    _check_normalisation(config, num_layers)
    _check_depth(config, num_layers)
    _check_gains(config)


def check_architecture(config: Any, must_be: dict[str, tuple[Any, str]]) -> None:
    """Refuse a configuration, stock or ours, of an architecture that is not supported.

    Args:
        config: any configuration.
        must_be: field -> the value that is supported, and why; a field that is not there has it.

    Raises:
        ValueError: naming the field, the value that is allowed and the one that it has.
    """
    for name, (allowed, reason) in must_be.items():
        value = getattr(config, name, allowed)
        if value != allowed:
            raise ValueError(f"{name} must be {allowed!r}, got {value!r}: {reason}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # An integer may be too large for any float.
    return is_number and abs(value) <= 1e300 and math.isfinite(value)


def _check_sizes(config: Any) -> None:
    """Sizes of the stock model, which PyTorch would refuse by its own words or take as an empty tensor."""
    for name in _SIZES:
        value = getattr(config, name, None)
        for size in value if isinstance(value, (list, tuple)) else [value]:
            if size is not None and not (_is_int(size) and 1 <= size < 2**31):
                raise ValueError(f"{name} must be >= 1 and below 2^31, got {value!r}")
        if isinstance(value, (list, tuple)) and len(value) != 2:
            raise ValueError(f"{name} must be one number or two, for height and width, got {value!r}")


def _check_dropout(config: Any) -> None:
    for name in _DROPOUTS:
        value = getattr(config, name, None)
        if value is not None and not (_is_finite(value) and 0 <= value <= 1):
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")
    for name in ("layer_norm_epsilon", "layer_norm_eps", "initializer_range"):
        value = getattr(config, name, None)
        if value is not None and not (_is_finite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {item!r}")


def _check_boosting(config: Any, num_layers: int) -> None:
    boostings = set(per_layer("boosting", config.boosting, num_layers))
    steps = config.boosting_steps
    for step in steps if isinstance(steps, list) else [steps]:
        if step is not None and (not _is_int(step) or not 1 <= step <= MAX_BOOSTING_STEPS):
            raise ValueError(f"boosting_steps must be an integer >= 1 and <= {MAX_BOOSTING_STEPS}, got {step!r}")
    if steps is not None and not boostings & set(STEPPED_BOOSTINGS):
        raise ValueError(
            f"boosting_steps has no effect with boosting={config.boosting!r}, only with one of "
            f"{', '.join(STEPPED_BOOSTINGS)}: leave it at None, got {steps!r}"
        )
    _check_gradient_boosting(config, num_layers)
    _check_robust(config, boostings)
    if "delta" in boostings and not config.hides_later_tokens:
        raise ValueError(
            "boosting 'delta' corrects each token's value by those of the tokens before it: it needs attention with a "
            f"causal mask, got {config.boosting!r}"
        )
    layers = config.boosted_layers
    if layers is None:
        return
    if isinstance(config.boosting, list) or isinstance(steps, list):
        raise ValueError(
            "boosted_layers must be None when boosting or boosting_steps is a list with one value per layer, "
            f"got boosted_layers={layers!r}"
        )
    if config.boosting == "none":
        raise ValueError(f"boosted_layers needs a boosting other than 'none', got boosted_layers={layers!r}")
    if not layers:
        raise ValueError("boosted_layers must name at least one layer (for no boosting set boosting='none'), got []")
    for layer in layers:
        if not _is_int(layer) or not -num_layers <= layer < num_layers:
            raise ValueError(
                f"boosted_layers must be integers from {-num_layers} to {num_layers - 1} "
                f"(the model has {num_layers} layers), got {layer!r}"
            )
    if len({layer % num_layers for layer in layers}) != len(layers):
        raise ValueError(f"boosted_layers must name every layer at most once, got {layers!r}")


def _check_gradient_boosting(config: Any, num_layers: int) -> None:
    boostings, source = per_layer("boosting", config.boosting, num_layers), config.gradient_boosting_source
    for booster, rounds in zip(boostings, per_layer("boosting_steps", config.boosting_steps, num_layers), strict=True):
        if booster == "gradient_boosted" and rounds == 1:
            raise ValueError(
                "boosting_steps must be >= 2 with boosting 'gradient_boosted', whose rounds they are (one round is "
                f"boosting 'none'), got {config.boosting_steps!r}"
            )
    if source is None:
        return
    if "gradient_boosted" not in boostings:
        raise ValueError(
            "gradient_boosting_source needs boosting 'gradient_boosted', got "
            f"gradient_boosting_source={source!r} with boosting={config.boosting!r}"
        )
    _check_choice("gradient_boosting_source", source, GRADIENT_BOOSTING_SOURCES)


def _check_robust(config: Any, boostings: set[str]) -> None:
    penalty, threshold = config.robust_penalty, config.robust_threshold
    for name, value in (("robust_penalty", penalty), ("robust_threshold", threshold)):
        if value is not None and "robust" not in boostings:
            raise ValueError(f"{name} needs boosting 'robust', got {name}={value!r} with boosting={config.boosting!r}")
    if penalty is not None:
        _check_choice("robust_penalty", penalty, ROBUST_PENALTIES)
    if threshold is None:
        return
    if penalty == "l1":
        raise ValueError(f"robust_threshold must be None with robust_penalty='l1', which has none, got {threshold!r}")
    if not _is_finite(threshold) or not MIN_ROBUST_THRESHOLD <= threshold <= MAX_BANDWIDTH:
        raise ValueError(
            f"robust_threshold must be a finite number from {MIN_ROBUST_THRESHOLD:g} to {MAX_BANDWIDTH:g}, "
            f"got {threshold!r}"
        )


def _check_kernels(config: Any, num_layers: int) -> None:
    positions = per_layer("position_kernel", config.position_kernel, num_layers)
    contents = per_layer("content_kernel", config.content_kernel, num_layers)
    if "additive" in positions and set(positions) != {"additive"}:
        raise ValueError(
            "position_kernel 'additive' adds positions to the token stream that all layers share: it must be used by "
            f"all layers or none, got {config.position_kernel!r}"
        )
    if config.needs_positions and set(positions) == {"none"}:
        raise ValueError(
            "position_kernel 'none' in every layer (as in presets nope and nlm) leaves this encoder, with no causal "
            f"mask, blind to the order of the words: use it in some layers at most, got {config.position_kernel!r}"
        )
    if config.share_position_projections and "untied" not in positions:
        raise ValueError(
            "share_position_projections=True needs position_kernel 'untied', got "
            f"position_kernel={config.position_kernel!r}"
        )
    if ("elliptical", "rotary") in zip(contents, positions, strict=True):
        raise ValueError(
            "content_kernel 'elliptical' cannot be combined with position_kernel 'rotary' in one layer: its diagonal "
            "metric would weigh features that the rotation mixes, got "
            f"content_kernel={config.content_kernel!r} with position_kernel={config.position_kernel!r}"
        )
    if "forget" in positions and not config.hides_later_tokens:
        raise ValueError(
            "position_kernel 'forget' sums what the tokens between query and key forget: it needs attention with a "
            f"causal mask, got {config.position_kernel!r}"
        )
    _check_rotary(config, positions)
    _check_buckets(config, positions)


def _check_normalisation(config: Any, num_layers: int) -> None:
    normalisations = per_layer("normalisation", config.normalisation, num_layers)
    iterations = config.sinkhorn_iterations
    if iterations is not None and "sinkhorn" not in normalisations:
        raise ValueError(
            f"sinkhorn_iterations needs normalisation 'sinkhorn', got sinkhorn_iterations={iterations!r} with "
            f"normalisation={config.normalisation!r}"
        )
    if iterations is not None and (not _is_int(iterations) or not 1 <= iterations <= MAX_SINKHORN_ITERATIONS):
        raise ValueError(
            f"sinkhorn_iterations must be an integer from 1 to {MAX_SINKHORN_ITERATIONS}, got {iterations!r}"
        )
    if "sinkhorn" in normalisations and config.hides_later_tokens:
        raise ValueError(
            "normalisation 'sinkhorn' scales rows and columns of A together, so that every token's weights depend on "
            f"later tokens: it needs attention without a causal mask, got {config.normalisation!r}"
        )
    contents = per_layer("content_kernel", config.content_kernel, num_layers)
    for content, normalisation in zip(contents, normalisations, strict=True):
        if content == "gaussian" and normalisation == "softpick":
            raise ValueError(
                f"normalisation {normalisation!r} cannot be combined with content_kernel 'gaussian' in one layer: its "
                "logits are distances with a minus, and what is not above 0 gets no weight, got "
                f"normalisation={config.normalisation!r} with content_kernel={config.content_kernel!r}"
            )


def _check_rotary(config: Any, positions: list[str]) -> None:
    base = config.rotary_base
    if base is not None and "rotary" not in positions:
        raise ValueError(
            f"rotary_base needs position_kernel 'rotary', got rotary_base={base!r} with "
            f"position_kernel={config.position_kernel!r}"
        )
    if base is not None and (not _is_finite(base) or base <= 1):
        raise ValueError(f"rotary_base must be a finite number > 1, got {base!r}")
    if "rotary" not in positions:
        return
    # One pair of features turns for each frequency and each axis of the grid: text has one axis, patches have two.
    head_dim, divisor = config.hidden_size // config.num_attention_heads, 2 * config.position_axes
    if head_dim % divisor:
        raise ValueError(
            f"position_kernel 'rotary' turns pairs of features along {config.position_axes} axes: the head width "
            f"must be divisible by {divisor}, got hidden_size / num_attention_heads = {head_dim}"
        )


def _check_buckets(config: Any, positions: list[str]) -> None:
    count, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    for name, value in (
        ("relative_attention_num_buckets", count),
        ("relative_attention_max_distance", distance),
    ):
        if value is None:
            continue
        if "relative_buckets" not in positions:
            raise ValueError(
                f"{name} needs position_kernel 'relative_buckets', got {name}={value!r} with "
                f"position_kernel={config.position_kernel!r}"
            )
        if not _is_int(value):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if count is not None and (count < 4 or count % 4 or count > 4096):
        raise ValueError(
            f"relative_attention_num_buckets must be a multiple of 4 from 4 to 4096 (half of them for each direction, "
            f"half of those for exact distances), got {count!r}"
        )
    exact = (count or DEFAULT_NUM_BUCKETS) // 2
    if distance is not None and not exact < distance <= 2**20:
        raise ValueError(
            f"relative_attention_max_distance must be larger than half of relative_attention_num_buckets, {exact}, "
            f"and at most {2**20}, got {distance!r}"
        )
    if distance is None and exact >= DEFAULT_MAX_DISTANCE:
        raise ValueError(
            f"relative_attention_num_buckets={count!r} needs a relative_attention_max_distance larger than {exact}, "
            f"got None (the default is {DEFAULT_MAX_DISTANCE})"
        )


def _check_bandwidths(config: Any, num_layers: int, num_heads: int) -> None:
    for name in ("content_bandwidth", "position_bandwidth"):
        _check_bandwidth(name, getattr(config, name), num_heads)
    kernels = per_layer("position_kernel", config.position_kernel, num_layers)
    if config.position_bandwidth is not None and not set(KERNELS_WITH_BANDWIDTH) & set(kernels):
        raise ValueError(
            "position_bandwidth needs a position_kernel with a bandwidth ('untied' or 'gaussian'), got "
            f"position_bandwidth={config.position_bandwidth!r} with position_kernel={config.position_kernel!r}"
        )


def _check_bandwidth(name: str, value: Any, num_heads: int) -> None:
    if value is None:
        return
    if isinstance(value, list) and len(value) != num_heads:
        raise ValueError(
            f"{name} as a list must have one value for each of the {num_heads} heads, got {len(value)}: {value!r}"
        )
    for item in value if isinstance(value, list) else [value]:
        if not _is_finite(item) or not MIN_BANDWIDTH <= item <= MAX_BANDWIDTH:
            raise ValueError(
                f"{name} must be a finite number > 0, from {MIN_BANDWIDTH:g} to {MAX_BANDWIDTH:g} (or a list of them, "
                f"one per head), got {item!r}"
            )


def _check_depth(config: Any, num_layers: int) -> None:
    """Refuse what compares layers where there is no earlier layer: it would silently do nothing."""
    contents = config.content_kernel if isinstance(config.content_kernel, list) else [config.content_kernel]
    for name, value, looks_back in (
        ("feedback", config.feedback, config.feedback != "none"),
        ("residual", config.residual, config.residual != "standard"),
        ("content_kernel", "elliptical", "elliptical" in contents),
    ):
        if looks_back and num_layers < 2:
            raise ValueError(
                f"{name}={value!r} compares a layer with the ones before it: num_hidden_layers must be >= 2, "
                f"got {num_layers}"
            )
    if (
        isinstance(config.content_kernel, list)
        and set(contents[1:]).isdisjoint({"elliptical"})
        and (contents[0] == "elliptical")
    ):
        raise ValueError(
            "content_kernel 'elliptical' has no effect in layer 0, which has no layer before it: use it in a later "
            f"layer too, got {config.content_kernel!r}"
        )


def _check_gains(config: Any) -> None:
    strength, gains = config.neutreno_lambda, config.pid_gains
    if config.learn_feedback and config.feedback not in ("neutreno", "pid"):
        raise ValueError(f"learn_feedback=True needs feedback 'neutreno' or 'pid', got feedback={config.feedback!r}")
    for name, value, feedback in (("neutreno_lambda", strength, "neutreno"), ("pid_gains", gains, "pid")):
        if value is not None and config.feedback != feedback:
            raise ValueError(
                f"{name} needs feedback={feedback!r}, got {name}={value!r} with feedback={config.feedback!r}"
            )
    if strength is not None and not _is_finite(strength):
        raise ValueError(f"neutreno_lambda must be a finite number, got {strength!r}")
    if gains is not None and (len(gains) != 3 or not all(_is_finite(gain) for gain in gains)):
        raise ValueError(f"pid_gains must be three finite numbers (P, I, D), got {gains!r}")
