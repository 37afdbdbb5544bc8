"""Generated calls of ``filter_attention``: a right answer, or one line that names an argument."""

from __future__ import annotations

from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st

from hf_imgproc_attn import filter_attention
from hf_imgproc_attn.models.boost_operators import BOOSTING
from tests.properties.strategies import anything, examples

NAMES = (
    "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa", "boosting",
    "boosting_steps", "query_features", "key_features", "position_bias", "backend",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8,
    torch.float8_e4m3fn,
)  # fmt: skip
BACKENDS = ("auto", "reference", "sdpa", "blocked", "chunked", "triton", "flex", "", "cuda", None)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (values > 0 if dtype == torch.bool else values.to(dtype)).to(device)


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """A call that is right, with none to three of its arguments replaced by something odd."""
    batch, heads, length, width, depth = (draw(st.integers(0, 3).map(lambda n, m=m: n or m)) for m in (1, 2, 4, 4, 4))
    length = draw(st.sampled_from([1, 2, 5, 9]))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    boosting = draw(st.sampled_from(["none", *BOOSTING]))
    key_length = length if draw(st.booleans()) or boosting != "none" else draw(st.sampled_from([1, 3, 7]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    seeds = iter(range(99))
    call: dict[str, Any] = {
        "query": tensor((batch, heads * groups, length, width), dtype, next(seeds)),
        "key": tensor((batch, heads, key_length, width), dtype, next(seeds)),
        "value": tensor((batch, heads, key_length, depth), dtype, next(seeds)),
        "boosting": boosting,
    }
    shape = (batch, heads * groups, length, key_length)
    if groups > 1:
        call["enable_gqa"] = True
    if draw(st.booleans()):
        call["boosting_steps"] = draw(st.integers(1, 5))
    if draw(st.booleans()):
        call["scale"] = draw(st.sampled_from([0.0, 1.0, -0.5, 2, 30.0]))
    mask = draw(st.sampled_from(["none", "none", "causal", "bool", "float", "rows"]))
    if mask == "causal" and length == key_length:
        call["is_causal"] = True
    elif mask in ("bool", "float", "rows"):
        lead = draw(st.sampled_from([(), (1, 1), (batch, 1), shape[:2]]))
        kind = torch.bool if mask in ("bool", "rows") else torch.float32
        call["attn_mask"] = tensor((*lead, *((1,) if mask == "rows" else (length,)), key_length), kind, next(seeds))
    if draw(st.booleans()):
        call["backend"] = draw(st.sampled_from(BACKENDS[:5]))
    if draw(st.integers(0, 3)) == 0:
        width = draw(st.integers(1, 3))
        call["query_features"] = tensor((1, shape[1], length, width), dtype, next(seeds))
        call["key_features"] = tensor((batch, 1, key_length, width), dtype, next(seeds))
    if draw(st.integers(0, 3)) == 0:
        call["position_bias"] = tensor((1, shape[1], length, key_length), torch.float32, next(seeds))
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(NAMES))
        kind = draw(st.sampled_from(["anything", "shape", "dtype", "device", "missing"]))
        old = call.get(name)
        if kind == "missing" and name not in NAMES[:3]:
            call.pop(name, None)
        elif isinstance(old, torch.Tensor) and kind == "shape":
            sizes = list(old.shape)
            how = draw(st.sampled_from(["zero", "more", "drop", "add", "transpose"]))
            place = draw(st.integers(0, max(len(sizes) - 1, 0)))
            if how in ("zero", "more") and sizes:
                sizes[place] = 0 if how == "zero" else sizes[place] + 1
            elif how == "drop":
                sizes = sizes[1:]
            elif how == "add":
                sizes = [1, *sizes]
            dtype = old.dtype
            call[name] = tensor(tuple(sizes), dtype, 7) if how != "transpose" else old.transpose(0, -1)
        elif isinstance(old, torch.Tensor) and kind == "dtype":
            call[name] = tensor(tuple(old.shape), draw(st.sampled_from(DTYPES)), 8)
        elif isinstance(old, torch.Tensor) and kind == "device":
            call[name] = old.to("meta")
        elif name == "backend":
            call[name] = draw(st.sampled_from(BACKENDS))
        else:
            call[name] = draw(anything)
    return call


def check(call: dict[str, Any]) -> None:
    """Refused in one line by name; or the answer of the dense reference, of the right shape, without a NaN."""
    try:
        got = filter_attention(**call)
    except ValueError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert any(name in message for name in (*NAMES, "is_causal", "heads")), message
        return
    query, value = call["query"], call["value"]
    assert got.shape == (*query.shape[:3], value.shape[-1])
    assert (got.dtype, got.device) == (value.dtype, value.device)
    if got.device.type == "meta":
        return
    sensible = abs(float(call.get("scale") or 1.0)) < 1e3  # logits overflow elsewhere, as in PyTorch's own attention
    if sensible and not call.get("dropout_p"):
        assert got.isfinite().all()
        wanted = filter_attention(**{**call, "backend": "reference"})
        loose = 1e-4 if value.dtype in (torch.float32, torch.float64) else 0.1
        torch.testing.assert_close(
            got, wanted, rtol=loose, atol=loose * max(1.0, float(wanted.abs().max() if wanted.numel() else 0))
        )


@examples(300, 10_000)
@hypothesis.given(calls())
def test_calls_are_answered_or_refused(call: dict[str, Any]) -> None:
    check(call)
