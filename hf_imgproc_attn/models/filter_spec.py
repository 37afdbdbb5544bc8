"""The filter specification: which filter each attention layer applies, as plain configuration values.

Self-attention is read as an image filter ``U = A V`` with ``A = D^-1 K`` (Abdullaev, Tkachenko, Nguyen 2025,
arXiv 2506.10371; Abdullaev, Nguyen 2025, arXiv 2503.00687). A layer is a composition of independent axes

    content kernel x position kernel -> filter A -> boosting -> feedback        (residual scheme around it)

and this file is the only place where the allowed values, their defaults, the named presets and the rules between
fields are written down. It imports neither torch nor transformers, so command lines can read it at no cost. (No
postponed annotations here: the strict dataclasses check field types only where the annotations are real objects.)
"""

import difflib
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

CONTENT_KERNELS = ("dot_product", "gaussian")
POSITION_KERNELS = ("additive", "untied", "gaussian", "none")
BOOSTINGS = ("none", "twicing")
RESIDUALS = ("standard",)
FEEDBACKS = ("none",)

FILTER_SPEC_VERSION = 1
"""Version of what the fields below mean, saved with every configuration. It goes up with each change that older code
would misread (a new value, a new field, another default); newer code reads all older versions."""

MAX_BOOSTING_STEPS = 16
"""More steps than this only amplify rounding: ``I - (I - A)^k`` is within 2^-k of its limit where A smooths at all."""

MIN_BANDWIDTH, MAX_BANDWIDTH = 1e-4, 1e8
"""Outside, 2/h^2 leaves the range in which float32 logits mean anything."""

PRESETS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "bilateral": {"position_kernel": "untied", "learn_bandwidths": True},
    "bilateral_gaussian": {"content_kernel": "gaussian", "position_kernel": "gaussian", "learn_bandwidths": True},
    "twicing": {"boosting": "twicing"},
    "bilateral_twicing": {"position_kernel": "untied", "learn_bandwidths": True, "boosting": "twicing"},
}
"""Named variants: the fields in which each differs from the stock model."""

FILTER_LAYER_TYPE = "imgproc_filter"
"""Name of the cache layer that filtered attention needs, as Transformers' ``layer_types`` list it."""

_FIELDS = (
    "content_kernel",
    "position_kernel",
    "content_bandwidth",
    "position_bandwidth",
    "learn_bandwidths",
    "share_position_projections",
    "boosting",
    "boosting_steps",
    "boosted_layers",
    "residual",
    "feedback",
)

ConfigT = TypeVar("ConfigT", bound="FilterSpecMixin")


class LayerSpec(NamedTuple):
    """The axes of one layer, with every default resolved."""

    content_kernel: str
    position_kernel: str
    boosting: str
    boosting_steps: int
    residual: str
    feedback: str

    @property
    def is_boosted(self) -> bool:
        """Whether the layer filters its residual too."""
        return self.boosting != "none"

    @property
    def compares_positions(self) -> bool:
        """Whether positions enter through the attention logits instead of being added to the tokens."""
        return self.position_kernel in ("untied", "gaussian")


@dataclass(repr=False, kw_only=True)
class FilterSpecMixin:
    """Fields, validation and presets that our configurations add to a stock Transformers configuration.

    Args:
        content_kernel: ``"dot_product"`` or ``"gaussian"``; one value, or a list with one value a layer.
        position_kernel: ``"additive"`` (positions added to the tokens, the stock model), ``"untied"``, ``"gaussian"``
            or ``"none"``; one value, or a list with one value a layer. ``additive`` goes for all layers or none.
        content_bandwidth: h_y > 0, a number or a list with one number a head. None: 2/h_y^2 = the stock scaling.
        position_bandwidth: h_p > 0, likewise. None: as h_y for ``untied``; geometric over the heads from
            (4 head_dim)^(1/4) to the longest side of the grid, in index or patch units, for ``gaussian``.
        learn_bandwidths: whether the bandwidths are parameters (their logarithms are trained, one a head and layer).
        share_position_projections: ``untied`` only: one pair of position projections for all layers.
        boosting: ``"none"`` or ``"twicing"`` (the operator on V is I - (I - A)^steps); one value, or one a layer.
        boosting_steps: number of steps, an integer from 1 to 16, or a list with one a layer. 2 is 2A - A^2.
        boosted_layers: indices of the layers that are boosted, negative ones count from the end; None: all layers.
        residual: scheme across depth; ``"standard"`` is x + f(x).
        feedback: cross-layer feedback on the head output; ``"none"``.
        filter_spec_version: :data:`FILTER_SPEC_VERSION`; written by ``save_pretrained``, never chosen by a user.

    Raises:
        ValueError: for an unknown field that is a near miss of one of these names (wrong values are reported by
            ``huggingface_hub``'s strict dataclasses, with the field, the rule and the value).
    """

    content_kernel: str | list[str] = "dot_product"
    position_kernel: str | list[str] = "additive"
    content_bandwidth: float | int | list[float | int] | None = None
    position_bandwidth: float | int | list[float | int] | None = None
    learn_bandwidths: bool = False
    share_position_projections: bool = False
    boosting: str | list[str] = "none"
    boosting_steps: int | list[int] = 2
    boosted_layers: list[int] | None = None
    residual: str = "standard"
    feedback: str = "none"
    filter_spec_version: int = FILTER_SPEC_VERSION

    @classmethod
    def from_preset(cls: type[ConfigT], name: str, **overrides: Any) -> ConfigT:
        """Build a configuration from a named variant.

        Args:
            name: one of :data:`PRESETS`.
            **overrides: further configuration fields, of the variant or of the stock model; they win over the
                preset's.

        Raises:
            ValueError: if there is no such preset.
        """
        return cls(**{**preset_fields(name), **overrides})

    @classmethod
    def from_dict(cls: type[ConfigT], config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The stock ``from_dict`` (also of ``from_pretrained``): refuses near misses among the overrides, newer files.

        Raises:
            ValueError: for a near miss, or a ``filter_spec_version`` that this code does not know.
        """
        refuse_near_misses({key: value for key, value in kwargs.items() if key not in _FIELDS})
        # Configurations that were saved before there was a version are of the first one.
        check_version(config_dict.get("filter_spec_version", 1))
        config_dict = {**config_dict, "filter_spec_version": FILTER_SPEC_VERSION}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_near_misses(kwargs)
        if kwargs.get("per_layer_config"):
            raise ValueError(
                "per_layer_config is not supported: give kernel and boosting fields as lists with one value a layer, "
                f"got per_layer_config={kwargs['per_layer_config']!r}"
            )
        super().__post_init__(**kwargs)  # type: ignore[misc]  # the stock configuration's

    def validate_filter_spec(self) -> None:
        """Check the filter fields against their rules and against each other (run by the strict dataclass)."""
        check_filter_spec(self)

    @property
    def layer_specs(self) -> list[LayerSpec]:
        """The resolved axes of every layer, ``num_hidden_layers`` of them."""
        return layer_schedule(self)


def preset_fields(name: str) -> dict[str, Any]:
    """The configuration fields of a preset, as a new dictionary.

    Raises:
        ValueError: if there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])


def preset_name(config: Any) -> str:
    """The name of the preset whose filter fields ``config`` has, or ``"custom"``."""
    stock = {field: getattr(FilterSpecMixin, field) for field in _FIELDS}
    fields = {field: getattr(config, field) for field in _FIELDS}
    for name, changes in PRESETS.items():
        if fields == {**stock, **changes}:
            return name
    return "custom"


def check_version(version: Any) -> None:
    """Refuse a configuration that newer code has written: its fields may mean what this code does not know.

    Raises:
        ValueError: naming the version and the newest that is known.
    """
    if not _is_int(version) or version < 1:
        raise ValueError(f"filter_spec_version must be an integer >= 1, got {version!r}")
    if version > FILTER_SPEC_VERSION:
        raise ValueError(
            f"filter_spec_version must be <= {FILTER_SPEC_VERSION}, the newest that this code knows, got {version}: "
            "the checkpoint was saved by a newer hf_imgproc_attn; upgrade the package, or load it with "
            "trust_remote_code=True where the package is not imported"
        )


def refuse_near_misses(kwargs: dict[str, Any]) -> None:
    """Refuse unknown keywords that look like a mistyped filter field.

    Transformers stores unknown keywords silently, so ``boosting_step=3`` would train another model than was asked for.

    Raises:
        ValueError: naming the keyword and the field that was probably meant.
    """
    for key in kwargs:
        normalised = key.lower().replace("-", "_")
        matches = difflib.get_close_matches(normalised, _FIELDS, n=1, cutoff=0.8)
        if matches:
            raise ValueError(f"unknown configuration field {key}={kwargs[key]!r}; did you mean {matches[0]}?")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _per_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    if not isinstance(value, list):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name} as a list must have one value for each of the {num_layers} layers, got {len(value)}: {value!r}"
        )
    return value


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {item!r}")


def _check_bandwidth(name: str, value: Any, num_heads: int) -> None:
    if value is None:
        return
    if isinstance(value, list) and len(value) != num_heads:
        raise ValueError(
            f"{name} as a list must have one value for each of the {num_heads} heads, got {len(value)}: {value!r}"
        )
    for item in value if isinstance(value, list) else [value]:
        is_number = isinstance(item, (int, float)) and not isinstance(item, bool)
        if not is_number or not MIN_BANDWIDTH <= item <= MAX_BANDWIDTH:
            raise ValueError(
                f"{name} must be a finite number > 0, from {MIN_BANDWIDTH:g} to {MAX_BANDWIDTH:g} (or a list of them, "
                f"one a head), got {item!r}"
            )


def _check_boosted_layers(config: Any, num_layers: int) -> None:
    layers = config.boosted_layers
    if layers is None:
        return
    if isinstance(config.boosting, list) or isinstance(config.boosting_steps, list):
        raise ValueError(
            "boosted_layers must be None when boosting or boosting_steps is a list with one value a layer, "
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


def check_filter_spec(config: Any) -> None:
    """Check the filter fields of a configuration against their rules and against each other.

    Args:
        config: any object with the fields of :class:`FilterSpecMixin`, ``num_hidden_layers``, ``num_attention_heads``
            and ``hidden_size``.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    check_version(config.filter_spec_version)
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be >= 1, got {getattr(config, name)}")
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
    ):
        _check_choice(name, getattr(config, name), allowed)
    kernels = _per_layer("position_kernel", config.position_kernel, num_layers)
    boostings = _per_layer("boosting", config.boosting, num_layers)
    for name in ("content_kernel", "boosting_steps"):
        _per_layer(name, getattr(config, name), num_layers)

    if "additive" in kernels and set(kernels) != {"additive"}:
        raise ValueError(
            "position_kernel 'additive' adds positions to the token stream that all layers share: it must be used by "
            f"all layers or none, got {config.position_kernel!r}"
        )
    steps = config.boosting_steps
    for step in steps if isinstance(steps, list) else [steps]:
        if not _is_int(step) or not 1 <= step <= MAX_BOOSTING_STEPS:
            raise ValueError(f"boosting_steps must be an integer >= 1 and <= {MAX_BOOSTING_STEPS}, got {step!r}")
    if set(boostings) <= {"none"} and steps != FilterSpecMixin.boosting_steps:
        raise ValueError(f"boosting_steps has no effect with boosting='none': leave it at 2, got {steps!r}")
    _check_boosted_layers(config, num_layers)

    for name in ("content_bandwidth", "position_bandwidth"):
        _check_bandwidth(name, getattr(config, name), num_heads)
    if config.position_bandwidth is not None and not {"untied", "gaussian"} & set(kernels):
        raise ValueError(
            "position_bandwidth needs a position_kernel with a bandwidth ('untied' or 'gaussian'), got "
            f"position_bandwidth={config.position_bandwidth!r} with position_kernel={config.position_kernel!r}"
        )
    if config.share_position_projections and "untied" not in kernels:
        raise ValueError(
            "share_position_projections=True needs position_kernel 'untied', got "
            f"position_kernel={config.position_kernel!r}"
        )


def layer_schedule(config: Any) -> list[LayerSpec]:
    """Resolve a configuration to one :class:`LayerSpec` a layer.

    Raises:
        ValueError: if a list field has not one value a layer.
    """
    num_layers = config.num_hidden_layers
    content = _per_layer("content_kernel", config.content_kernel, num_layers)
    position = _per_layer("position_kernel", config.position_kernel, num_layers)
    boosting = _per_layer("boosting", config.boosting, num_layers)
    steps = _per_layer("boosting_steps", config.boosting_steps, num_layers)
    selected = set(range(num_layers))
    if config.boosted_layers is not None:
        selected = {layer % max(num_layers, 1) for layer in config.boosted_layers}
    return [
        LayerSpec(
            content[i],
            position[i],
            boosting[i] if i in selected else "none",
            steps[i],
            config.residual,
            config.feedback,
        )
        for i in range(num_layers)
    ]


def is_stock_layer(config: Any, spec: LayerSpec) -> bool:
    """Whether a layer's attention is stock softmax attention, so that the stock code runs it."""
    return (
        spec.content_kernel == "dot_product"
        and not spec.compares_positions
        and not spec.is_boosted
        and spec.feedback == "none"
        and not config.learn_bandwidths
        and config.content_bandwidth is None
    )


def uses_position_table(config: Any) -> bool:
    """Whether the model has learned position vectors (``additive`` or ``untied`` in any layer)."""
    return any(spec.position_kernel in ("additive", "untied") for spec in layer_schedule(config))
