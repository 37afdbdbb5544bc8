"""Every value of the axes that is newer than the two modifications, as one layer: what is there to be differentiated.

``test_gradients`` compares each on each back-end with finite differences, or says why it is refused; what Triton's
interpreter makes of the same layers is in ``tests/gpu``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_imgproc_attn.models.boost_depth import LayerState
from hf_imgproc_attn.models.layer_filter import AttentionFilter
from hf_imgproc_attn.models.layer_tokens import filter_tokens
from hf_imgproc_attn.models.spec_axes import (
    BOOSTINGS,
    CONTENT_KERNELS,
    FEEDBACKS,
    GATES,
    NORMALISATIONS,
    POSITION_KERNELS,
    ROBUST_PENALTIES,
    default_steps,
)
from tests.models.helpers import layer_inputs, make_filter

Fields = dict[str, Any]
SECOND_LAYER: Fields = {"num_layers": 2, "layer_idx": 1, "boosting": "twicing"}
"""Has a layer before it, to compare its values with."""
VALUES: dict[str, Fields] = {
    "cosine": {"content_kernel": "cosine"},
    "forget": {"position_kernel": "forget"},
    "sink": {"normalisation": "sink", "boosting": "twicing"},
    "sigmoid": {"normalisation": "sigmoid", "boosting": "twicing"},
    "softpick": {"normalisation": "softpick", "boosting": "twicing"},
    "sinkhorn": {"normalisation": "sinkhorn", "boosting": "twicing", "sinkhorn_iterations": 2},
    "inversion": {"boosting": "inversion"},
    "dynamic_inversion": {"boosting": "dynamic_inversion"},
    "exclusive": {"boosting": "exclusive"},
    "differential": {"boosting": "differential"},
    "local_linear": {"boosting": "local_linear"},
    **{f"robust {penalty}": {"boosting": "robust", "robust_penalty": penalty} for penalty in ROBUST_PENALTIES},
    "delta": {"boosting": "delta"},
    "headwise": {"gate": "headwise"},
    "elementwise": {"gate": "elementwise", "boosting": "inversion"},
    "value_residual": {"feedback": "value_residual", **SECOND_LAYER},
    "neutreno": {"feedback": "neutreno", "learn_feedback": True, **SECOND_LAYER},
    "pid": {"feedback": "pid", "learn_feedback": True, **SECOND_LAYER},
}
FIRST: dict[str, set[str]] = {
    "content_kernel": {"dot_product", "gaussian", "elliptical"},
    "position_kernel": {"additive", "untied", "gaussian", "alibi", "relative_buckets", "rotary", "none"},
    "boosting": {"none", "twicing", "osher", "learned", "diffusion", "sos", "gradient_boosted"},
    "normalisation": {"softmax"},
    "gate": {"none"},
    "feedback": {"none"},
}
"""What there was before, of which ``test_7_gradients`` takes every combination."""
AXES: dict[str, tuple[str, ...]] = {
    "content_kernel": CONTENT_KERNELS,
    "position_kernel": POSITION_KERNELS,
    "boosting": BOOSTINGS,
    "normalisation": NORMALISATIONS,
    "gate": GATES,
    "feedback": FEEDBACKS,
}

ONE_DIRECTION: dict[tuple[str, bool], str] = {
    ("delta", False): "boosting 'delta' corrects .* by those of the tokens before it: it needs .* a causal mask",
    ("forget", False): "position_kernel 'forget' sums what the tokens between .* forget: it needs .* a causal mask",
    (
        "sinkhorn",
        True,
    ): "normalisation 'sinkhorn' scales rows and columns .* without a causal mask",
}
"""Value and whether attention is causal -> why there is no such model."""
ONE_BY_ONE = {
    "local_linear": "boosting='local_linear' looks at its weights one by one",
    **{f"robust {penalty}": "boosting='robust' looks at its weights one by one" for penalty in ROBUST_PENALTIES},
}
IN_ORDER = {"delta": "computes all rows at the same time, and boosting='delta' needs those before for each"}
REFUSED: dict[str, dict[str, str]] = {
    "reference": {},
    "blocked": {},
    "chunked": {},
    "sdpa": {
        "sigmoid": "got normalisation='sigmoid': its weights share no sum over a row",
        "softpick": "got normalisation='softpick': it gives keys below 0 no weight at all",
        **ONE_BY_ONE,
    },
    "flex": {
        "sigmoid": "computes the weights of softmax only, got normalisation='sigmoid'",
        "softpick": "computes the weights of softmax only, got normalisation='softpick'",
        **ONE_BY_ONE,
        **IN_ORDER,
    },
    "triton": {**ONE_BY_ONE, **IN_ORDER},
}
"""Back-end -> value -> why it cannot serve it."""

HEADS, WIDTH, LENGTH = 2, 3, 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Filtered(nn.Module):
    """A filter with everything that happens to its output, and what it is computed of as leaves."""

    def __init__(self, attention_filter: AttentionFilter) -> None:
        super().__init__()
        self.filter = attention_filter

    def forward(self, leaves: list[torch.Tensor], backend: str, is_causal: bool) -> torch.Tensor:
        """The heads side by side, ``[1, length, heads * width]``.

        Args:
            leaves: the layer's input, query, key and value, and where it has feedback what earlier layers handed on.
            backend: a name of the table.
            is_causal: whether tokens see no later ones.
        """
        hidden_states, query, key, value, *earlier = leaves
        names = ("first_value", "previous_value", "feedback_sum")[: len(earlier)]
        state = LayerState(**dict(zip(names, earlier, strict=True)))
        inputs = layer_inputs(LENGTH, is_causal=is_causal, backend=backend)._replace(state=state)
        return filter_tokens(self.filter, hidden_states, (query, key, value), inputs)[0]


def differentiated(
    name: str, is_causal: bool, dtype: torch.dtype = torch.float64
) -> tuple[Callable[..., torch.Tensor], list[torch.Tensor]]:
    """A function of a back-end and leaves, and the leaves: inputs of the layer and all of its parameters.

    Args:
        name: of :data:`VALUES`.
        is_causal: whether it is a layer of a causal model, or of one of images.
        dtype: of the leaves.

    Raises:
        ValueError: if there is no such model.
    """
    fields = {"position_axes": 1 if is_causal else 2, **VALUES[name]}
    steps = default_steps(fields.get("boosting", "none"))
    torch.manual_seed(0)  # of biases, which are perturbed and not drawn anew
    layer = Filtered(make_filter(**fields, boosting_steps=steps, heads=HEADS, head_dim=WIDTH, longest_side=4))
    earlier = {"value_residual": 1, "neutreno": 1, "pid": 3}.get(VALUES[name].get("feedback", "none"), 0)
    inputs = [random(1, LENGTH, HEADS * WIDTH, seed=9)]
    inputs += [random(1, HEADS, LENGTH, WIDTH, seed=seed) for seed in range(3 + earlier)]
    names, parameters = zip(*layer.to(dtype).named_parameters(), strict=True)
    leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in (*inputs, *parameters)]

    def output(backend: str, *given: torch.Tensor) -> torch.Tensor:
        own = dict(zip(names, given[len(inputs) :], strict=True))
        options = (list(given[: len(inputs)]), backend, is_causal)
        result: torch.Tensor = torch.func.functional_call(layer, own, options)
        return result

    return output, leaves
