"""Every booster on the weights of every normalisation, on every back-end: dense numbers, or a refusal.

FlexAttention has no backward pass on a CPU; the Triton kernels are in tests/gpu.

Content and position kernels take turns, so that each meets every normalisation. What is refused is in
:data:`NEVER`, with the mathematical reason; nothing else is.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import hf_imgproc_attn.gpu  # noqa: F401  # registers FlexAttention
from hf_imgproc_attn.models.spec_axes import BOOSTINGS, NORMALISATIONS, WEIGHTS_ONE_BY_ONE
from tests.models.layer_cases import (
    BATCH,
    HEADS,
    KERNELS,
    LENGTH,
    Inputs,
    assert_same,
    build,
    masks,
    random,
    run,
    tensors,
)

CONTENTS = ("dot_product", "gaussian", "elliptical", "cosine")
OF_TEXTS = ("none", "untied", "gaussian", "alibi", "buckets", "rotary")
OF_IMAGES = ("none", "untied", "patches", "alibi patches", "bucket patches", "rotary patches")
ONE_MAP = tuple(name for name in BOOSTINGS if name != "gradient_boosted")  # several attentions of other boosters
# The one of causal models, the other of all others.
PAIRS = [pair for pair in itertools.product(ONE_MAP, NORMALISATIONS) if pair != ("delta", "sinkhorn")]
READ_TOKENS = ("dynamic_inversion", "differential", "local_linear", "delta")
NEVER = {
    ("sdpa", "sigmoid"): "its weights share no sum over a row",
    ("sdpa", "softpick"): "no softmax has a weight of 0",
    ("sdpa", "local_linear"): "would be head_dim times as wide as values",
    ("sdpa", "robust"): "are no inner products",
    ("flex", "sigmoid"): "computes the weights of softmax only",
    ("flex", "softpick"): "computes the weights of softmax only",
    ("flex", "local_linear"): "looks at its weights one by one",
    ("flex", "robust"): "looks at its weights one by one",
    ("flex", "delta"): "computes all rows at the same time",
}
"""Back-end and value -> why."""


def kernels(boosting: str, normalisation: str) -> tuple[str, str]:
    """A content and a position kernel that go together."""
    turn = ONE_MAP.index(boosting) + NORMALISATIONS.index(normalisation)
    content = CONTENTS[turn % len(CONTENTS)]
    if content == "gaussian" and normalisation == "softpick":
        content = "dot_product"
    position = (OF_IMAGES if normalisation == "sinkhorn" else OF_TEXTS)[turn % 6]
    return content, "none" if content == "elliptical" and position.startswith("rotary") else position


def layer_of(boosting: str, normalisation: str) -> tuple[Any, Inputs, dict[str, Any]]:
    """A layer, its inputs and the mask: causal with padding on the left, or padding on the right."""
    content, position = kernels(boosting, normalisation)
    is_image = normalisation == "sinkhorn"
    options: dict[str, Any] = {"normalisation": normalisation, "position_axes": 1 + is_image}
    inputs = tensors(position)
    if boosting in READ_TOKENS:
        inputs["hidden_states"] = random(BATCH, LENGTH, HEADS * KERNELS[position][2], seed=11)
    return build(content, position, boosting, 2, **options), inputs, masks()["keys" if is_image else "left"]


@pytest.mark.parametrize(("boosting", "normalisation"), PAIRS)
def test_every_back_end_has_the_dense_numbers_or_a_reason(boosting: str, normalisation: str) -> None:
    """The output and the gradients of all inputs and parameters."""
    layer, inputs, mask = layer_of(boosting, normalisation)
    dense = run(layer, inputs, "eager", **mask)
    for backend in ("sdpa", "blocked", "chunked", "flex"):
        reasons = [NEVER[backend, name] for name in (boosting, normalisation) if (backend, name) in NEVER]
        if reasons:
            with pytest.raises(ValueError, match="|".join(reasons)):
                run(layer, inputs, "sdpa", backend=backend, **mask)
        elif backend == "flex":
            assert_same({"output": forward(layer, inputs, backend, **mask)}, {"output": dense["output"]})
        else:
            assert_same(run(layer, inputs, "sdpa", backend=backend, **mask), dense)


@torch.no_grad()
def forward(layer: Any, inputs: Inputs, backend: str, **mask: Any) -> torch.Tensor:
    """The output alone."""
    layer._config.filter_backend = backend
    output: torch.Tensor = layer(**inputs, implementation="sdpa", **mask)[0]
    return output


def test_each_kernel_meets_each_normalisation() -> None:
    """In the turns above; and the reasons name what the package has."""
    for normalisation in NORMALISATIONS:
        met = [kernels(boosting, normalisation) for boosting in ONE_MAP]
        refused = {"gaussian"} if normalisation == "softpick" else set()
        assert {content for content, _ in met} == set(CONTENTS) - refused
        assert {position for _, position in met} == set(OF_IMAGES if normalisation == "sinkhorn" else OF_TEXTS)
    assert {name for _, name in NEVER} <= {*NORMALISATIONS, *WEIGHTS_ONE_BY_ONE, "delta"}


@torch.no_grad()
def test_a_sink_beside_positions_is_traced_without_a_break() -> None:
    """By SDPA, which gets distances in full."""
    layer, inputs = build("gaussian", "gaussian", normalisation="sink"), tensors("gaussian")
    layer._config.filter_backend = "sdpa"
    traced = torch.compile(lambda: layer(**inputs, implementation="sdpa")[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(), layer(**inputs, implementation="eager")[0], rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("position", ["alibi", "buckets"])
def test_places_inside_blocks_can_be_traced(position: str) -> None:
    """Blocks break the graph; which term they compute is told before."""
    layer, inputs = build("dot_product", position), tensors(position)
    layer._config.filter_backend = "blocked"
    traced = torch.compile(lambda: layer(**inputs, implementation="sdpa")[0], backend="eager")
    torch.testing.assert_close(traced(), layer(**inputs, implementation="eager")[0], rtol=0, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("boosting", ["learned", "inversion", "exclusive", "differential", "delta"])
def test_boosters_inside_blocks_can_be_traced(boosting: str) -> None:
    """Those whose call differs from the layer's: the broken graph hands it on as it is."""
    layer, inputs, _ = layer_of(boosting, "softmax")
    layer._config.filter_backend = "blocked"
    causal = masks()["causal"]
    traced = torch.compile(lambda: layer(**inputs, implementation="sdpa", **causal)[0], backend="eager")
    torch.testing.assert_close(traced(), layer(**inputs, implementation="eager", **causal)[0], rtol=0, atol=1e-11)
