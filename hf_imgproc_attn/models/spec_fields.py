"""The filter specification: which filter each attention layer applies, as plain configuration values.

The fields that our configurations add to a stock one, and the named presets; what the values mean layer by layer is
in ``spec_axes``, the rules between fields in ``spec_rules``. None of the three imports torch or transformers, so
command lines can read them at no cost. (No postponed annotations here: the strict dataclasses check field types only
where the annotations are real objects.)
"""

import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .spec_axes import (
    ATTENTION_OUTPUTS,
    FILTER_BACKENDS,
    PUBLISHED_NEUTRENO_LAMBDAS,
    RUN_TIME_FIELDS,
    LayerSpec,
    layer_schedule,
)
from .spec_rules import check_filter_spec
from .spec_versions import FILTER_SPEC_VERSION, bring_up_to_date

PRESETS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "bilateral": {"position_kernel": "untied", "learn_bandwidths": True},
    "bilateral_gaussian": {"content_kernel": "gaussian", "position_kernel": "gaussian", "learn_bandwidths": True},
    "twicing": {"boosting": "twicing"},
    "bilateral_twicing": {"position_kernel": "untied", "learn_bandwidths": True, "boosting": "twicing"},
    "nlm": {"content_kernel": "gaussian", "position_kernel": "none", "learn_bandwidths": True},
    "elliptical": {"content_kernel": "elliptical"},
    "neutreno": {"feedback": "neutreno"},
    "pidformer": {"feedback": "pid"},
    "alibi": {"position_kernel": "alibi"},
    "t5_bias": {"position_kernel": "relative_buckets"},
    "rope": {"position_kernel": "rotary"},
    "nope": {"position_kernel": "none"},
    "tupe": {"position_kernel": "untied", "share_position_projections": True},
    "sos": {"boosting": "sos"},
    "learned_twicing": {"boosting": "learned"},
    "gradient_boosted": {"boosting": "gradient_boosted"},
    "boosted_residual": {"residual": "twicing"},
    "inversion": {"boosting": "inversion"},
    "dynamic_inversion": {"boosting": "dynamic_inversion"},
    "exclusive": {"boosting": "exclusive"},
    "local_linear": {"boosting": "local_linear"},
    "robust": {"boosting": "robust"},
    "gated": {"gate": "elementwise"},
    "sink": {"normalisation": "sink"},
    "sigmoid": {"normalisation": "sigmoid"},
    "softpick": {"normalisation": "softpick"},
    "qk_norm": {"content_kernel": "cosine", "learn_bandwidths": True},
    "value_residual": {"feedback": "value_residual"},
    "sinkhorn": {"normalisation": "sinkhorn"},
    "forgetting": {"position_kernel": "forget"},
    "differential": {"boosting": "differential"},
    "delta": {"boosting": "delta"},
}
"""Named variants: the fields in which each differs from the stock model."""

FILTER_FIELDS = (
    "content_kernel",
    "position_kernel",
    "content_bandwidth",
    "position_bandwidth",
    "learn_bandwidths",
    "share_position_projections",
    "relative_attention_num_buckets",
    "relative_attention_max_distance",
    "rotary_base",
    "boosting",
    "boosting_steps",
    "boosted_layers",
    "gradient_boosting_source",
    "robust_penalty",
    "robust_threshold",
    "residual",
    "feedback",
    "neutreno_lambda",
    "pid_gains",
    "learn_feedback",
    "gate",
    "normalisation",
    "sinkhorn_iterations",
)
"""The fields below, but for the version, which is never chosen."""

ConfigT = TypeVar("ConfigT", bound="FilterSpecMixin")


@dataclass(repr=False, kw_only=True)
class FilterSpecMixin:
    """Fields, validation and presets that our configurations add to a stock Transformers configuration.

    Args:
        content_kernel: ``"dot_product"``, ``"gaussian"``, ``"elliptical"`` or ``"cosine"`` (the dot product of
            queries and keys of length 1); one value, or a list with one per layer.
        position_kernel: ``"additive"`` (positions added to the tokens, the stock model), ``"untied"``, ``"gaussian"``,
            ``"alibi"``, ``"relative_buckets"``, ``"rotary"``, ``"forget"`` (causal models only) or ``"none"``; one
            value, or a list with one per layer. ``additive`` is used by all layers or by none.
        content_bandwidth: h_y > 0, a number or a list with one number per head. None: 2/h_y^2 = the stock scaling,
            or sqrt(head_dim) for ``cosine``.
        position_bandwidth: h_p > 0, likewise, of ``untied`` and ``gaussian``. None: as h_y for ``untied``; geometric
            over the heads from (4 head_dim)^(1/4) to the longest side of the grid, in index or patch units, for
            ``gaussian``.
        learn_bandwidths: whether the bandwidths are parameters (their logarithms are trained, one per head and layer).
        share_position_projections: ``untied`` only: one pair of position projections for all layers.
        relative_attention_num_buckets: ``relative_buckets`` only: number of buckets, a multiple of 4. None: 32.
        relative_attention_max_distance: ``relative_buckets`` only: from this distance on all offsets share the last
            bucket, in index or patch units. None: 128.
        rotary_base: ``rotary`` only: base of the geometric frequencies, > 1. None: 10000.
        boosting: ``"none"``, ``"twicing"`` (the operator on V is I - (I - A)^steps), its alias ``"osher"``,
            ``"learned"`` (A + gamma A(I - A), one gamma per head), ``"diffusion"`` (A^steps), ``"sos"``,
            ``"gradient_boosted"``, ``"inversion"`` (alpha A + beta (I - A), one alpha and beta per head),
            ``"dynamic_inversion"`` (the same, per head and token) or ``"exclusive"`` (A V without its projection on
            the token's own value), ``"differential"`` (A_1 - lambda A_2, with a second map's own projections),
            ``"local_linear"`` (first-order kernel regression, with a learned slope per token),
            ``"robust"`` (a robust mean of the values in place of their mean) or, in causal models, ``"delta"`` (A on
            values without what the filter reads of them before, u = v - beta A' u); one value, or one per layer.
        boosting_steps: number of steps, an integer from 1 to 16, or a list with one per layer. None: 3 for ``sos`` and
            ``robust``, else 2, which for ``twicing`` is 2A - A^2. Of ``gradient_boosted`` they are the rounds M >= 2,
            that is the attentions in a layer.
        boosted_layers: indices of the layers that are boosted, negative ones count from the end; None: all layers.
        gradient_boosting_source: ``gradient_boosted`` only: what the rounds after the first make their keys and values
            of. ``"residual"``: of z - F, as their queries, which is what the authors' experiments run; ``"input"``: of
            z, the equation of arXiv 2604.03190v1. None: ``"residual"``.
        robust_penalty: ``robust`` only: ``"huber"``, ``"l1"`` or ``"mcp"``. None: ``"huber"``.
        robust_threshold: ``robust`` only: the distance of a value from which on ``huber`` weighs it less (None: 1) or
            ``mcp`` not at all (None: 4); not with ``l1``.
        residual: scheme across depth: ``"standard"`` is x + f(x), ``"twicing"``, ``"sos"``, ``"osher"``.
        feedback: cross-layer feedback on the head output: ``"none"``, ``"neutreno"``, ``"pid"``, or on the values:
            ``"value_residual"``, with one lambda a layer that is always learned.
        neutreno_lambda: ``neutreno`` only: its strength. None: the published 0.6 for images, 0.4 for text.
        pid_gains: ``pid`` only: the gains P, I, D. None: 0.5, 0.05, 0.05 (*choice*: none are published with code).
        learn_feedback: ``neutreno`` and ``pid`` only: whether lambda or the three gains are parameters of every head
            and layer, which start at the values above.
        gate: a learned factor on the head output, before the output projection: ``"none"``, ``"headwise"`` (one per
            head and token) or ``"elementwise"`` (one per feature and token); one value, or one per layer.
        normalisation: how logits become weights: ``"softmax"``, ``"sink"`` (one more key a head with a learned logit,
            whose value is 0), ``"sigmoid"``, ``"softpick"`` or, without a causal mask, ``"sinkhorn"``; one value, or
            one per layer.
        sinkhorn_iterations: ``sinkhorn`` only: steps over columns and rows, from 1 to 64. None: 3.
        filter_spec_version: written by ``save_pretrained``, never chosen by a user.

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
    relative_attention_num_buckets: int | None = None
    relative_attention_max_distance: int | None = None
    rotary_base: float | int | None = None
    boosting: str | list[str] = "none"
    boosting_steps: int | list[int] | None = None
    boosted_layers: list[int] | None = None
    gradient_boosting_source: str | None = None
    robust_penalty: str | None = None
    robust_threshold: float | int | None = None
    residual: str = "standard"
    feedback: str = "none"
    neutreno_lambda: float | int | None = None
    pid_gains: list[float | int] | None = None
    learn_feedback: bool = False
    gate: str | list[str] = "none"
    normalisation: str | list[str] = "softmax"
    sinkhorn_iterations: int | None = None
    filter_spec_version: int = FILTER_SPEC_VERSION

    position_axes: ClassVar[int] = 1
    """Axes of the grid that positions lie on: 1 for text, 2 for patches."""
    default_neutreno_lambda: ClassVar[float] = PUBLISHED_NEUTRENO_LAMBDAS[1]
    """The published strength for this kind of data."""
    needs_positions: ClassVar[bool] = False
    """Whether a model without any notion of positions would be blind to the order of its input."""
    hides_later_tokens: ClassVar[bool] = False
    """Whether the model's attention is causal."""
    sees_layer_input: ClassVar[bool] = True
    """Whether filters are handed the input of their layer, which some of their parts project."""
    must_be: ClassVar[dict[str, tuple[Any, str]]] = {}
    """Fields of the stock configuration that make another architecture of it: the value that is supported, and why."""

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
        """The stock ``from_dict`` (also of ``from_pretrained``): refuses misspelt fields and newer files.

        Raises:
            ValueError: for a near miss, or a ``filter_spec_version`` that this code does not know.
        """
        refuse_near_misses({key: value for key, value in kwargs.items() if key not in FILTER_FIELDS})
        return super().from_dict(bring_up_to_date(config_dict), **kwargs)  # type: ignore[misc]

    @property
    def filter_backend(self) -> str:
        """How the filter is computed, one of ``FILTER_BACKENDS``; ``"auto"`` chooses by shape.

        Set at run time, here or in ``from_pretrained(…, filter_backend=…)``, and never saved: another machine has
        other back-ends. Attention implementation ``eager`` is the dense reference whatever this says.

        Raises:
            ValueError: on setting an unknown back-end.
        """
        return str(self.__dict__.get("_filter_backend", "auto"))

    @filter_backend.setter
    def filter_backend(self, name: str) -> None:
        if name not in FILTER_BACKENDS:
            raise ValueError(f"filter_backend must be one of {', '.join(FILTER_BACKENDS)}, got {name!r}")
        self.__dict__["_filter_backend"] = name

    @property
    def attention_output(self) -> str:
        """What ``output_attentions=True`` returns of a boosted layer, one of ``ATTENTION_OUTPUTS``.

        ``"operator"`` is what multiplies V (for twicing 2A - A^2); it needs every row of A, which a cache does not
        keep. ``"filter"`` is A itself, whose rows are there at every step of cached generation. The output is computed
        from the returned tensor, so gradients with respect to it exist; the maps of ``gradient_boosted`` are stacked
        copies and have none. Set at run time, as ``filter_backend`` is, and never saved.

        Raises:
            ValueError: on setting another value.
        """
        return str(self.__dict__.get("_attention_output", "operator"))

    @attention_output.setter
    def attention_output(self, name: str) -> None:
        if name not in ATTENTION_OUTPUTS:
            raise ValueError(f"attention_output must be one of {', '.join(ATTENTION_OUTPUTS)}, got {name!r}")
        self.__dict__["_attention_output"] = name

    def to_dict(self) -> dict[str, Any]:
        """The stock ``to_dict`` without what is chosen at run time."""
        fields: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        for name in RUN_TIME_FIELDS:
            fields.pop(f"_{name}", None)
        return fields

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_near_misses(kwargs)
        if kwargs.get("per_layer_config"):
            raise ValueError(
                "per_layer_config is not supported: give kernel and boosting fields as lists, one value per layer, "
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


def plain(value: Any) -> Any:
    """A value with plain numbers, truth values, texts and lists in place of NumPy's, which JSON does not have."""
    if isinstance(value, list):
        return [plain(each) for each in value]
    return value.tolist() if type(value).__module__ == "numpy" and hasattr(value, "tolist") else value


def with_plain_numbers(config_class: type[ConfigT]) -> type[ConfigT]:
    """Decorate a configuration so that its filter fields take what :func:`plain` knows, before types are checked.

    Above ``@strict``, whose checks then see plain values; on construction, loading and assignment.
    """
    checked = config_class.__setattr__

    def set_field(self: Any, name: str, value: Any) -> None:
        checked(self, name, plain(value) if name in FILTER_FIELDS else value)

    config_class.__setattr__ = set_field  # type: ignore[method-assign]
    return config_class


def preset_fields(name: str) -> dict[str, Any]:
    """The configuration fields of a preset, as a new dictionary.

    Raises:
        ValueError: if there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        near = difflib.get_close_matches(str(name), list(PRESETS), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}{hint}")
    return dict(PRESETS[name])


def refuse_near_misses(kwargs: dict[str, Any]) -> None:
    """Refuse unknown keywords that look like a mistyped filter field.

    Transformers stores unknown keywords silently, so ``boosting_step=3``, or ``preset="twicing"`` in a constructor,
    would train another model than was asked for.

    Raises:
        ValueError: naming the keyword and the field that was probably meant.
    """
    if "preset" in kwargs:
        name = repr(kwargs["preset"])
        raise ValueError(f"unknown configuration field preset={name}; presets are for from_preset({name}) or --preset")
    for key in kwargs:
        if key in RUN_TIME_FIELDS:
            continue
        normalised = key.lower().replace("-", "_")
        matches = difflib.get_close_matches(normalised, (*FILTER_FIELDS, *RUN_TIME_FIELDS), n=1, cutoff=0.8)
        if matches:
            raise ValueError(f"unknown configuration field {key}={kwargs[key]!r}; did you mean {matches[0]}?")
