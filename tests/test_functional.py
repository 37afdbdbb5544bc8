"""The functional form: back-ends agree, plain calls are PyTorch's own, and every wrong argument is named."""

from __future__ import annotations

import re
import subprocess
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import hf_imgproc_attn
from hf_imgproc_attn import filter_attention
from hf_imgproc_attn.models import backend_measured, backend_table
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_measured import SAFE
from hf_imgproc_attn.models.backend_table import BACKENDS, Backend, choose_backend, order_elsewhere, register
from hf_imgproc_attn.models.kernel_given import FeaturePositions
from hf_imgproc_attn.models.kernel_position import GaussianPositions
from hf_imgproc_attn.models.visibility import Visibility
from tests.helpers import RunPython

BATCH, HEADS, LENGTH, WIDTH, FEATURES = 2, 4, 13, 6, 3
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(length: int = LENGTH, key_length: int | None = None, key_heads: int = HEADS) -> list[torch.Tensor]:
    key_length = key_length or length
    return [
        3 * random(BATCH, HEADS, length, WIDTH, seed=0),
        random(BATCH, key_heads, key_length, WIDTH, seed=1),
        random(BATCH, key_heads, key_length, WIDTH, seed=2),
    ]


TENSORS = {
    "none": {},
    "features": {
        "query_features": random(1, HEADS, LENGTH, FEATURES, seed=3),
        "key_features": random(BATCH, 1, LENGTH, FEATURES, seed=4),
    },
    "bias": {"position_bias": random(1, HEADS, LENGTH, LENGTH, seed=5)},
}
MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "padding": {"attn_mask": random(BATCH, 1, 1, LENGTH, seed=6) > -0.5},
    "float": {"attn_mask": random(LENGTH, LENGTH, seed=7)},
    "empty row": {"attn_mask": torch.ones(LENGTH, LENGTH, dtype=torch.bool).index_fill(0, torch.tensor(5), False)},
}


def run(tensors: list[torch.Tensor], named: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """The output, and the gradient of every tensor."""
    leaves = [x.clone().requires_grad_() for x in (*tensors, *named.values())]
    output = filter_attention(*leaves[:3], **dict(zip(named, leaves[3:], strict=True)), **options)
    return [output, *torch.autograd.grad(output, leaves, random(*output.shape, seed=8))]


# --------------------------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("named", TENSORS)
@pytest.mark.parametrize(("boosting", "steps"), [("none", 2), ("twicing", 2), ("twicing", 3)])
def test_back_ends_agree(named: str, mask: str, boosting: str, steps: int) -> None:
    options = {**MASKS[mask], "boosting": boosting, "boosting_steps": steps}
    expected = run(inputs(), TENSORS[named], backend="reference", **options)
    for backend in ("sdpa", "blocked", "auto"):
        torch.testing.assert_close(run(inputs(), TENSORS[named], backend=backend, **options), expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked", "auto"])
@pytest.mark.parametrize("mask", [name for name in MASKS if name != "empty row"])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_plain_is_scaled_dot_product_attention(backend: str, mask: str, scale: float | None) -> None:
    options = {**MASKS[mask], "scale": scale}
    expected = torch.nn.functional.scaled_dot_product_attention(*inputs(), **options)
    torch.testing.assert_close(filter_attention(*inputs(), backend=backend, **options), expected, **EXACT)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
@pytest.mark.parametrize("key_length", [9, 17])
def test_cross_attention_with_grouped_heads(backend: str, key_length: int) -> None:
    tensors = inputs(LENGTH, key_length, key_heads=2)
    mask = random(LENGTH, key_length, seed=3) > -1
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    output = filter_attention(*tensors, attn_mask=mask, enable_gqa=True, backend=backend)
    torch.testing.assert_close(output, expected, **EXACT)


def test_features_are_a_bias() -> None:
    """logits = scale q.k + a.b: the features are not scaled, and equal a bias of their products."""
    features = TENSORS["features"]
    bias = features["query_features"] @ features["key_features"].mT
    options = {"boosting": "twicing", "is_causal": True, "scale": 0.7}
    expected = filter_attention(*inputs(), position_bias=bias, backend="reference", **options)
    torch.testing.assert_close(filter_attention(*inputs(), **features, **options), expected, **EXACT)


def test_twicing_is_two_a_minus_a_squared() -> None:
    query, key, value = inputs()
    matrix = (query @ key.mT / WIDTH**0.5).softmax(-1)
    expected = (2 * matrix - matrix @ matrix) @ value
    torch.testing.assert_close(filter_attention(query, key, value, boosting="twicing"), expected, **EXACT)


def test_values_of_another_width() -> None:
    query, key, _ = inputs()
    value = random(BATCH, HEADS, LENGTH, 3, seed=2)
    options = {"boosting": "twicing", "is_causal": True}
    outputs = [
        filter_attention(query, key, value, backend=name, **options) for name in ("reference", "sdpa", "blocked")
    ]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], **EXACT)


@pytest.mark.parametrize("backend", ["reference", "blocked", "auto"])
def test_boosting_with_dropout(backend: str) -> None:
    """Reproducible by torch's seed, different between seeds, and A where nothing is dropped."""
    tensors = [x.requires_grad_() for x in inputs()]
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        output = filter_attention(*tensors, boosting="twicing", dropout_p=0.4, backend=backend)
        runs.append([output, *torch.autograd.grad(output.sum(), tensors)])
    torch.testing.assert_close(runs[0], runs[1], rtol=0, atol=0)
    assert not torch.allclose(runs[0][0], runs[2][0])
    plain = filter_attention(*tensors, boosting="twicing", backend=backend)
    tiny = filter_attention(*tensors, boosting="twicing", dropout_p=1e-12, backend=backend)
    torch.testing.assert_close(plain, tiny, **EXACT)


# --------------------------------------------------------------------------------------------------------------------
# What is refused
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": random(4, 13, 6, seed=0)}, "query must be [batch, heads, length, head_dim], got shape (4, 13, 6)"),
        ({"value": random(2, 4, 12, 6, seed=0)}, "must share the batch"),
        ({"key": random(2, 4, 13, 5, seed=0)}, "query and key their width"),
        ({"key": random(2, 4, 13, 6, seed=0).float()}, "key must have the dtype and device of query, torch.float64"),
        ({"value": torch.ones(2, 4, 13, 6, dtype=torch.int64)}, "value must be of a floating dtype"),
        ({"attn_mask": torch.ones(13, 12, dtype=torch.bool)}, "attn_mask must be broadcastable to (2, 4, 13, 13)"),
        ({"attn_mask": torch.ones(13, 13, dtype=torch.int32)}, "must be bool or float, got torch.int32"),
        ({"attn_mask": torch.ones(13, 13, dtype=torch.bool), "is_causal": True}, "attn_mask must be None"),
        ({"position_bias": random(3, 13, 13, seed=0)}, "position_bias must be broadcastable to (2, 4, 13, 13)"),
        ({"query_features": random(1, 1, 13, 2, seed=0)}, "must be given together"),
        (
            {"query_features": random(1, 1, 12, 2, seed=0), "key_features": random(1, 1, 13, 2, seed=0)},
            "query_features must be floating, [2 or 1, 4 or 1, 13, c], got (1, 1, 12, 2)",
        ),
        (
            {"query_features": random(1, 1, 13, 2, seed=0), "key_features": random(1, 1, 13, 3, seed=0)},
            "must have the same width, got 2 and 3",
        ),
        ({"boosting": "thricing"}, "boosting must be one of none, twicing"),
        ({"boosting": "inversion"}, "got 'inversion', whose factors are parameters of a layer"),
        ({"boosting": "dynamic_inversion"}, "got 'dynamic_inversion', whose factors are parameters of a layer"),
        ({"boosting": "twicing", "boosting_steps": 0}, "boosting_steps must be an integer >= 1 and <= 16, got 0"),
        ({"boosting": "twicing", "boosting_steps": 17}, "boosting_steps must be an integer >= 1 and <= 16, got 17"),
        ({"dropout_p": -0.1}, "dropout_p must be in [0, 1), got -0.1"),
        ({"backend": "cuda"}, "backend must be one of auto, reference, sdpa, blocked"),
        ({"backend": "sdpa", "boosting": "twicing", "dropout_p": 0.1}, "draws a new dropout mask at every pass"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {**dict(zip(("query", "key", "value"), inputs(), strict=True)), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        filter_attention(**arguments)


@pytest.mark.parametrize(("width", "depth"), [(0, 5), (6, 0)])
def test_heads_without_a_width_are_refused(width: int, depth: int) -> None:
    rows, values = random(2, 4, 13, width, seed=0), random(2, 4, 13, depth, seed=1)
    with pytest.raises(ValueError, match="query and value must have a width of at least 1"):
        filter_attention(rows, rows, values)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_numbers_of_numpy_and_fractions_are_numbers(backend: str) -> None:
    """Each kind of real number that is as large gives the same filter."""
    found = []
    for half in (0.5, np.float32(0.5), np.float16(0.5), Fraction(1, 2)):
        torch.manual_seed(0)
        found.append(filter_attention(*inputs(), scale=half, dropout_p=half, backend=backend))  # type: ignore[arg-type]
    assert all(torch.equal(each, found[0]) for each in found)


def test_wrong_lengths_and_heads() -> None:
    longer = inputs(5, 9)
    with pytest.raises(ValueError, match="is_causal needs as many queries as keys, got 5 queries and 9 keys"):
        filter_attention(*longer, is_causal=True)
    with pytest.raises(ValueError, match="boosting='twicing' applies A to its own output .* got 5 queries and 9 keys"):
        filter_attention(*longer, boosting="twicing")
    grouped = inputs(key_heads=2)
    with pytest.raises(ValueError, match="same number of heads unless enable_gqa, got 4, 2"):
        filter_attention(*grouped)
    with pytest.raises(ValueError, match="heads of query must be a multiple of those of key"):
        filter_attention(*inputs(key_heads=3), enable_gqa=True)
    query, key, value = grouped
    with pytest.raises(ValueError, match="heads of query must be a multiple of those of key, and neither be empty"):
        filter_attention(query[:, :0], key, value, enable_gqa=True)


# --------------------------------------------------------------------------------------------------------------------
# The table of back-ends
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _clean_table(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = {name: BACKENDS[name] for name in ("reference", "sdpa", "blocked")}
    monkeypatch.setattr(backend_table, "BACKENDS", plain)
    monkeypatch.setattr(backend_table, "SINKHORN_BACKENDS", dict(backend_table.SINKHORN_BACKENDS))


@pytest.mark.usefixtures("_clean_table")
@pytest.mark.parametrize("name", ["triton", "flex"])
def test_optional_back_ends(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}' is not available: the kernels need"):
        filter_attention(*inputs(), backend=name)
    backend = Backend(
        lambda call: call.value + call.content.scale,
        lambda call: "works without boosting only" if call.is_boosted else None,
    )
    register(name, backend)
    torch.testing.assert_close(filter_attention(*inputs(), backend=name, scale=2.0), inputs()[2] + 2.0)
    with pytest.raises(ValueError, match=f"backend='{name}' cannot serve this call: it works without boosting only"):
        filter_attention(*inputs(), backend=name, boosting="twicing")


def test_only_known_names_register() -> None:
    with pytest.raises(ValueError, match="back-end must be one of triton, flex, got 'mine'"):
        register("mine", BACKENDS["sdpa"])
    assert "mine" not in BACKENDS


def call_of(
    device: str = "cpu",
    length: int = 200,
    boosting: str = "twicing",
    *,
    causal: bool = True,
    extra: int = 0,
    dropout: float = 0.0,
) -> FilterCall:
    """Only shapes matter; nothing is computed."""
    query, value = torch.empty(2, 2, 4, length, WIDTH, device=device)
    features = torch.empty(1, 4, length, extra, device=device)
    return FilterCall(
        query,
        query,
        value,
        Content("dot_product", 1.0),
        Visibility(length, length, causal),
        positions=(FeaturePositions(features, features),) if extra else (),
        booster=Booster(boosting),
        dropout=dropout,
    )


@pytest.mark.usefixtures("_clean_table")
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"boosting": "none"}, "sdpa"),
        ({"boosting": "none", "extra": 8}, "blocked"),
        ({"boosting": "none", "dropout": 0.1}, "blocked"),
        ({}, "blocked"),
        ({"causal": False}, "blocked"),
        ({"length": 12}, "sdpa"),
        ({"length": 12, "dropout": 0.1}, "reference"),
        ({"length": 2000}, "blocked"),
        ({"length": 2000, "causal": False}, "sdpa"),
        ({"length": 2000, "causal": False, "dropout": 0.1}, "blocked"),
        ({"device": "meta"}, "sdpa"),
        ({"device": "meta", "dropout": 0.1}, "blocked"),
    ],
)
def test_auto_follows_the_table(given: dict[str, Any], expected: str) -> None:
    assert choose_backend(call_of(**given)) == expected


@pytest.mark.usefixtures("_clean_table")
def test_kernels_come_first_where_they_were_measured_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a measurement the safe choice stands; a kernel that refuses is passed over."""
    register("triton", Backend(lambda call: call.value, lambda call: "has no dropout" if call.dropout else None))
    assert order_elsewhere("cuda", call_of("meta")) == SAFE
    row = ("twicing", True, False, 256, WIDTH, ("triton", "sdpa"))
    monkeypatch.setattr(backend_measured, "MEASURED", (row,))
    assert order_elsewhere("cuda", call_of("meta"))[:2] == ("triton", "sdpa")
    assert order_elsewhere("cuda", call_of("meta", causal=False)) == SAFE
    assert order_elsewhere("cuda", call_of("meta", boosting="none")) == SAFE
    assert order_elsewhere("cuda", call_of("meta", extra=2)) == SAFE
    assert order_elsewhere("cpu", call_of("cpu")) == SAFE
    assert choose_backend(call_of("meta", dropout=0.1)) == "blocked"


def test_positions_by_place_get_no_large_bias_anywhere() -> None:
    places = torch.empty(1, 4000, 1, device="meta")
    gaussian = GaussianPositions(places, places, torch.empty(4, 1, 1, device="meta"), None, 4.0, True, True)
    for device in ("cuda", "meta"):
        assert order_elsewhere(device, call_of("meta", 4000)._replace(positions=(gaussian,)))[0] == "blocked"
    short = call_of("cpu", 1500, causal=False)._replace(
        positions=(gaussian._replace(coordinates=torch.zeros(1, 1500, 1), key_coordinates=torch.zeros(1, 1500, 1)),)
    )
    assert choose_backend(short) == "blocked"
    assert choose_backend(short._replace(booster=Booster("none"))) == "blocked"


def test_exported_lazily(run_python: RunPython) -> None:
    assert hf_imgproc_attn.filter_attention is filter_attention
    code = "import sys, hf_imgproc_attn as p; assert 'torch' not in sys.modules; assert p.filter_attention.__module__"
    done: subprocess.CompletedProcess[str] = run_python("-c", code, fresh=True)
    assert done.returncode == 0, done.stderr
