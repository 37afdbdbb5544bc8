"""The axes of the filter: their allowed values, and which values each layer of a model has.

Self-attention is read as an image filter ``U = A V`` with ``A = D^-1 K`` (Abdullaev, Tkachenko, Nguyen 2025,
arXiv 2506.10371; Abdullaev, Nguyen 2025, arXiv 2503.00687). A layer is a composition of independent axes

    content kernel x position kernel -> normalisation -> filter A -> boosting -> feedback -> gate

with a residual scheme around it.

Neither torch nor transformers is imported here, so that command lines can read it at no cost.
"""

from typing import Any, NamedTuple

CONTENT_KERNELS = ("dot_product", "gaussian", "elliptical", "cosine")
POSITION_KERNELS = ("additive", "untied", "gaussian", "alibi", "relative_buckets", "rotary", "forget", "none")
BOOSTINGS = (
    *("none", "twicing", "osher", "learned", "diffusion", "sos", "gradient_boosted"),
    *("inversion", "dynamic_inversion", "exclusive", "differential", "local_linear", "robust"),
    "delta",
)
RESIDUALS = ("standard", "twicing", "sos", "osher")
NORMALISATIONS = ("softmax", "sink", "sigmoid", "softpick", "sinkhorn")
FEEDBACKS = ("none", "neutreno", "pid", "value_residual")
GATES = ("none", "headwise", "elementwise")

FILTER_BACKENDS = ("auto", "reference", "sdpa", "blocked", "chunked", "triton", "flex")
"""How a filter is computed, chosen at run time: what a model computes does not depend on it."""

ATTENTION_OUTPUTS = ("operator", "filter")
"""What ``output_attentions=True`` returns: the operator that multiplies V, or A."""

RUN_TIME_FIELDS = ("filter_backend", "attention_output")
"""Fields of a configuration that are chosen at run time and never saved."""

STEPPED_BOOSTINGS = ("twicing", "osher", "diffusion", "sos", "gradient_boosted", "robust")
"""Boosters that take a number of steps; of ``gradient_boosted`` they are the rounds, two at least."""

ROBUST_PENALTIES = ("huber", "l1", "mcp")
"""What ``robust`` makes of a value's distance to its estimate, the default first."""

ROBUST_THRESHOLDS = {"huber": 1.0, "mcp": 4.0}
"""Default distances from which on values lose weight, or have none; ``l1`` has no such distance."""

MIN_ROBUST_THRESHOLD = 0.02
"""Smaller ones are hard to tell from ``l1``, and from rounding in single precision."""

GRADIENT_BOOSTING_SOURCES = ("residual", "input")
"""What the later rounds of ``gradient_boosted`` make their keys and values of, the default first."""

TOKEN_BOOSTINGS = ("dynamic_inversion", "differential", "local_linear")
"""Boosters with a projection of the layer's input of their own, beside query, key and value."""

WEIGHTS_ONE_BY_ONE = ("local_linear", "robust")
"""Boosters that look at single weights of A, for which no fused attention can be called."""

DEFAULT_SINKHORN_ITERATIONS, MAX_SINKHORN_ITERATIONS = 3, 64

CONVERTED_FORGET_BIAS = 16.0
"""The bias from which forget gates start in a trained model: each token then takes 1e-7 of what is before it."""

NEW_VALUE_RESIDUAL = 0.5
"""lambda of ``value_residual`` in a new model; in a trained one it starts at 0, where the model stays what it was."""

CONVERTED_SINK = -10.0
"""The logit from which a sink starts in a trained model, which so stays what it was but for 5e-5 of a row's weight."""

KERNELS_WITH_BANDWIDTH = ("untied", "gaussian")
"""Position kernels that have a bandwidth, ``position_bandwidth``."""

COORDINATE_KERNELS = ("gaussian", "alibi", "relative_buckets", "rotary")
"""Position kernels that use a token's place on the grid: without a position table, inputs may be of any length."""

COMPARING_KERNELS = ("untied", "gaussian", "alibi", "relative_buckets")
"""Position kernels that are a term of the attention logits; class tokens have learned logits there."""

MAX_BOOSTING_STEPS = 16
"""More steps than this only amplify rounding: ``I - (I - A)^k`` is within 2^-k of its limit where A smooths at all."""

MIN_BANDWIDTH, MAX_BANDWIDTH = 1e-4, 1e8
"""Outside, 2/h^2 leaves the range in which float32 logits mean anything."""

PUBLISHED_NEUTRENO_LAMBDAS = {1: 0.4, 2: 0.6}
"""Axes of the grid of positions -> the published strength for such data: text, images."""

DEFAULT_PID_GAINS = (0.5, 0.05, 0.05)
NO_FEEDBACK_YET: dict[str, dict[str, Any]] = {
    "neutreno": {"neutreno_lambda": 0.0},
    "pid": {"pid_gains": [0.0, 0.0, 0.0]},
}
"""The factors from which feedback that is learned starts in a trained model, which so stays what it was."""
DEFAULT_NUM_BUCKETS, DEFAULT_MAX_DISTANCE = 32, 128
DEFAULT_ROTARY_BASE = 10000.0

FILTER_LAYER_TYPE = "imgproc_filter"
"""Name of the cache layer that filtered attention needs, as Transformers' ``layer_types`` list it."""


class LayerSpec(NamedTuple):
    """The axes of one layer, with every default resolved and aliases replaced by what they stand for."""

    content_kernel: str
    position_kernel: str
    boosting: str
    boosting_steps: int
    residual: str
    feedback: str
    gradient_boosting_source: str = GRADIENT_BOOSTING_SOURCES[0]
    gate: str = "none"
    normalisation: str = "softmax"

    @property
    def is_boosted(self) -> bool:
        """Whether the layer filters its residual too."""
        return self.boosting != "none"

    @property
    def compares_positions(self) -> bool:
        """Whether positions enter as a term of the attention logits.

        ``additive`` adds them to the tokens instead, ``rotary`` turns queries and keys by them.
        """
        return self.position_kernel in COMPARING_KERNELS


def per_layer(name: str, value: Any, num_layers: int) -> list[Any]:
    """One value per layer of a field that is a single value or a list.

    Raises:
        ValueError: if a list has not one value per layer.
    """
    if not isinstance(value, list):
        return [value] * num_layers
    if len(value) != num_layers:
        raise ValueError(
            f"{name} as a list must have one value for each of the {num_layers} layers, got {len(value)}: {value!r}"
        )
    return value


def default_steps(boosting: str) -> int:
    """Number of steps or rounds where none is given: 3 for ``sos`` (two are A^2) and ``robust``, else 2."""
    return 3 if boosting in ("sos", "robust") else 2


def layer_schedule(config: Any) -> list[LayerSpec]:
    """Resolve a configuration to one :class:`LayerSpec` a layer.

    Layer 0 has the ``standard`` residual scheme and no feedback: there is nothing before it.

    Raises:
        ValueError: if a list field has not one value per layer.
    """
    num_layers = config.num_hidden_layers
    content = per_layer("content_kernel", config.content_kernel, num_layers)
    position = per_layer("position_kernel", config.position_kernel, num_layers)
    boosting = per_layer("boosting", config.boosting, num_layers)
    steps = per_layer("boosting_steps", config.boosting_steps, num_layers)
    gate = per_layer("gate", config.gate, num_layers)
    normalisation = per_layer("normalisation", config.normalisation, num_layers)
    selected = set(range(num_layers))
    if config.boosted_layers is not None:
        selected = {layer % max(num_layers, 1) for layer in config.boosted_layers}
    specs = []
    for i in range(num_layers):
        # For a fixed linear A Osher's iterative regularisation is k-step twicing.
        booster = {"osher": "twicing"}.get(boosting[i], boosting[i]) if i in selected else "none"
        specs.append(
            LayerSpec(
                content[i],
                position[i],
                booster,
                default_steps(booster) if steps[i] is None else steps[i],
                config.residual if i else "standard",
                config.feedback,
                config.gradient_boosting_source or GRADIENT_BOOSTING_SOURCES[0],
                gate[i],
                normalisation[i],
            )
        )
    return specs


def is_stock_layer(config: Any, spec: LayerSpec) -> bool:
    """Whether a layer's attention is stock softmax attention, so that the stock code runs it."""
    return (
        spec.content_kernel == "dot_product"
        and spec.position_kernel in ("additive", "none")
        and not spec.is_boosted
        and spec.feedback == "none"
        and spec.gate == "none"
        and spec.normalisation == "softmax"
        and not needs_previous_value(config)
        and not config.learn_bandwidths
        and config.content_bandwidth is None
    )


def needs_previous_value(config: Any) -> bool:
    """Whether layers compare their values with the preceding layer's, as the elliptical metric does."""
    kernels = config.content_kernel
    return "elliptical" in (kernels if isinstance(kernels, list) else [kernels])


def uses_position_table(config: Any) -> bool:
    """Whether the model has learned position vectors (``additive`` or ``untied`` in any layer)."""
    return any(spec.position_kernel in ("additive", "untied") for spec in layer_schedule(config))


HEADS, CONV_QKV, CONV_OUT, CONV_IN = "imgproc_heads", "imgproc_conv1d_qkv", "imgproc_conv1d_out", "imgproc_conv1d_in"
"""Names of the styles of tensor parallelism that are in ``layer_heads``: an attention module; a ``Conv1D`` of which
queries, keys and values, or other outputs, or inputs are cut."""
