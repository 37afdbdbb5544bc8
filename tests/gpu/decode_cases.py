"""The decoding kernels in Triton's interpreter, against all tokens at once in float64; see ``interpreter_worker``."""

from __future__ import annotations

from typing import Any, NamedTuple
from unittest import mock

import torch

from hf_imgproc_attn.gpu import decode_call
from hf_imgproc_attn.gpu.decode import Cached, decode_attention, decode_forward
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.boost_operators import extra_streams
from hf_imgproc_attn.models.cache_streams import NoStreams
from hf_imgproc_attn.models.kernel_position import BlockedPositions, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from hf_imgproc_attn.models.visibility import attention_visibility
from tests.gpu import composed_cases, model_cases

SCALE = 0.3


class Decoding(NamedTuple):
    """``length`` new tokens behind ``past`` cached ones."""

    past: int
    length: int = 1
    boosting: str = "twicing"
    steps: int = 2
    widths: tuple[int, int] = (16, 16)
    key_heads: int = 2
    masked: bool = False
    positions: str = ""
    biased: bool = False
    is_causal: bool = True
    dtype: str = "float32"


CASES = [
    Decoding(150, masked=True, biased=True, widths=(24, 40)),
    Decoding(130, boosting="none", positions="gaussian", widths=(16, 8)),
    Decoding(20, 5, boosting="twicing", steps=4, key_heads=1, positions="alibi", masked=True, biased=True),
    Decoding(70, 16, boosting="sos", steps=3, positions="relative_buckets", is_causal=False),
    Decoding(40, 3, boosting="diffusion", steps=3, key_heads=1, positions="relative_buckets", biased=True),
    Decoding(1, 1, boosting="learned", widths=(40, 16), key_heads=4),
    Decoding(140, 2, masked=True, key_heads=1, dtype="bfloat16", positions="gaussian"),
    Decoding(60, dtype="float16"),
]


class Recorded(NoStreams):
    """Keeps the rows that a booster hands on."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        self.rows.append(rows)
        return rows


def _positions(case: Decoding, heads: int, dtype: torch.dtype, new_only: bool) -> BlockedPositions | None:
    places = torch.arange(case.past + case.length, dtype=dtype).view(1, -1, 1) * 2
    own = places[:, -case.length :] if new_only else places
    numbers = torch.arange(1, heads + 1, dtype=dtype).view(-1, 1, 1) * 0.02
    if case.positions == "gaussian":
        return GaussianPositions(own, places, numbers, None, 1.0, True, False)
    if case.positions == "alibi":
        return AlibiPositions(own, places, numbers, None, 1.0, False, False)
    if case.positions == "relative_buckets":
        table = torch.sin(torch.arange(heads * 16, dtype=dtype)).view(heads, 1, 16)
        return BucketPositions(own, places, table, None, bucket_boundaries(8, 12), True)
    return None


def measure(case: Decoding) -> list[float]:
    """Errors of the output and of each stream's new rows, relative to the largest value."""
    generator = torch.Generator().manual_seed(case.past)
    dtype, heads, tokens = getattr(torch, case.dtype), 4, case.past + case.length
    width, value_width = case.widths

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    # Queries as views into a projection, keys and values as views into buffers that have room for more.
    query = random(2, tokens, heads, width).transpose(1, 2)
    key = random(2, case.key_heads, tokens + 7, width)[:, :, :tokens]
    value = random(2, case.key_heads, tokens + 7, value_width)[:, :, :tokens]
    bias = torch.randn(2, heads, tokens, generator=generator) if case.biased else None
    gain = torch.linspace(0.5, 1.5, heads).view(heads, 1, 1) if case.boosting == "learned" else None
    mask = None
    if case.masked:
        mask = torch.ones(2, tokens, dtype=torch.bool)
        mask[0, : case.past // 3] = False
        mask[1, -1] = False
        padding = ~mask[:, None, :, None]
        key, value = key.masked_fill(padding, float("nan")), value.masked_fill(padding, float("nan"))
    call = FilterCall(
        query.double(),
        key.double(),
        value.double(),
        Content("dot_product", SCALE),
        attention_visibility(
            None if mask is None else mask[:, None, None],
            shape=(2, heads, tokens, tokens),
            causal=case.is_causal,
        )._replace(bias=None if bias is None else bias.double()[:, :, None]),
        positions=tuple(term for term in [_positions(case, heads, torch.float64, False)] if term is not None),
        booster=Booster(case.boosting, case.steps, None if gain is None else gain.double()),
        streams=Recorded(),
    )
    truth, streams = BACKENDS["reference"].run(call), call.streams.rows
    # A cache holds what was rounded, NaN of padding included.
    past = [rows.to(dtype)[:, :, : case.past] for rows in streams]
    if mask is not None:
        past = [rows.masked_fill(~mask[:, None, : case.past, None], float("nan")) for rows in past]
    out, rows = decode_attention(
        query[:, :, case.past :],
        Cached(key, value, past),
        boosting=case.boosting,
        steps=case.steps,
        gain=gain,
        scale=SCALE,
        is_causal=case.is_causal,
        key_mask=mask,
        positions=_positions(case, heads, torch.float32, True),
        key_bias=bias,
    )
    assert len(rows) == extra_streams(case.boosting, case.steps)
    seen = torch.ones(2, 1, case.length, 1) if mask is None else mask[:, None, case.past :, None].double()
    wanted = [truth[:, :, case.past :], *(stream[:, :, case.past :].nan_to_num() * seen for stream in streams)]
    got = [out, *(row.nan_to_num() * seen for row in rows)]
    return [_error(mine, right) for mine, right in zip(got, wanted, strict=True)]


def _error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    found = (got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=0.1)
    return float(found) if found.isfinite() else float("inf")


class HandedOut(composed_cases.GivenStreams):
    """Streams whose cached rows can be asked for, as those of this package's caches."""

    batch = 1

    def past(self, name: str) -> torch.Tensor | None:
        number = int(name.rpartition(".")[2]) - 1
        generator = torch.Generator().manual_seed(number)
        rows = torch.randn(self.batch, composed_cases.HEADS, self.past_rows, self.width, generator=generator)
        return rows.to(self.dtype) if number < 3 else None


def calls() -> list[float]:
    """Errors of calls of the back-end with a cache: content as a number for each key, feature columns, gains."""
    found = []
    for row in (
        ("twicing 3", "gaussian contents", 16, 24, 70, 2, 1, True, True, 0.0),
        ("sos 2", "untied", 16, 24, 5, 1, 2, False, True, 0.0),
        ("learned 2", "alibi", 24, 16, 33, 3, 1, True, True, 0.0),
    ):
        case = composed_cases.Case(*row)
        leaves = composed_cases.leaves_of(case)
        exact, mine = (
            composed_cases.call_of(case, [leaf.to(dtype) for leaf in leaves])
            for dtype in (torch.float64, torch.float32)
        )
        mine = mine._replace(streams=HandedOut(case.past, case.value_width, torch.float32))
        mine.streams.batch = case.batch
        assert decode_call.applies(mine)
        assert not decode_call.applies(mine._replace(dropout=0.1))
        for name in ("query", "value"):
            assert not decode_call.applies(mine._replace(**{name: getattr(mine, name).clone().requires_grad_()}))
        learned = Content("gaussian", torch.ones(composed_cases.HEADS, 1, 1, requires_grad=True))
        assert not decode_call.applies(mine._replace(content=learned))
        wanted = composed_cases.exact(case, exact, 0)
        found.append(_error(BACKENDS["triton"].run(mine), wanted))
        hidden = torch.zeros(()) if mine.visibility.keys is None else ~mine.visibility.keys[..., -case.length :].mT
        for name, rows in exact.streams.stored.items():
            got = mine.streams.stored[name]
            found.append(_error(got.masked_fill(hidden.bool(), 0.0), rows.masked_fill(hidden.bool(), 0.0)))
    return found


def refusals() -> dict[str, str]:
    """Why calls are refused that the kernels would misread."""
    query, key, stream = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 9, 16), torch.zeros(1, 4, 8, 16)
    cached, found = Cached(key, key, [stream]), {}
    places, scale = torch.arange(9.0).view(1, 9, 1), torch.ones(4, 1, 1, requires_grad=True)
    many, wide = torch.zeros(1, 2, 20, 16), torch.zeros(1, 1, 3, 264)
    for name, new, given, options in (
        ("gradient", query.clone().requires_grad_(), cached, {}),
        (
            "bandwidth",
            query,
            cached,
            {"positions": GaussianPositions(places[:, 8:], places, scale, None, 1.0, True, True)},
        ),
        ("booster", query, cached, {"boosting": "exclusive"}),
        ("steps", query, cached, {"steps": 5}),
        ("streams", query, cached, {"steps": 3}),
        ("dtype", query, Cached(key, key, [stream.half()]), {}),
        ("shape", query, Cached(key, key, [stream[:, :, 1:]]), {}),
        ("tokens", torch.zeros(1, 4, 17, 16), Cached(many, many), {"boosting": "none"}),
        ("width", wide[:, :, :1], Cached(wide, wide), {"boosting": "none"}),
    ):
        try:
            decode_attention(new, given, **options)
        except ValueError as error:
            found[name] = str(error)
    return found


def in_a_model() -> list[float]:
    """Errors of a padded GPT-2 that decodes with its cache: its second chunk and its single token come here."""
    with mock.patch.object(decode_call, "run", wraps=decode_call.run) as run:
        found = model_cases.decoded()
    return [*found, float(run.call_count)]


def operator_checks() -> dict[str, str]:
    """PyTorch's own checks of the operator, but for gradients, which it has none of."""
    query, key, stream = torch.zeros(1, 4, 2, 16), torch.zeros(1, 2, 9, 24), torch.zeros(1, 4, 7, 24)
    mask, bias, none = torch.ones(1, 9, dtype=torch.bool), torch.zeros(1, 4, 9), None
    given = (query, key[..., :16], key, [stream], torch.ones(4, 1, 1), mask, bias, none, none, none, none)
    options = (0, 0, SCALE, True, "learned")
    return torch.library.opcheck(decode_forward, (*given, *options), test_utils=("test_schema", "test_faketensor"))


def decoding() -> dict[str, Any]:
    """Errors of every case, and refusals."""
    return {
        "decoding": {
            "errors": {str(number): [case.dtype, *measure(case)] for number, case in enumerate(CASES)},
            "calls": calls(),
            "model": in_a_model(),
            "operator": operator_checks(),
            "refused": refusals(),
        }
    }
