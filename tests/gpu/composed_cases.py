"""Calls that the Triton kernels serve by composition, in Triton's interpreter: part of ``interpreter_worker``.

Against the dense filter in float64, whose dropped weights are those of a generator written here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from hf_imgproc_attn.gpu import is_specialised
from hf_imgproc_attn.gpu.once import apply_once, once_forward
from hf_imgproc_attn.gpu.once_inputs import Once
from hf_imgproc_attn.gpu.places import position_tensors
from hf_imgproc_attn.models.backend_blocked_sinkhorn import as_softmax
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_reference import filter_logits, filter_matrix
from hf_imgproc_attn.models.backend_table import BACKENDS, SINKHORN_BACKENDS
from hf_imgproc_attn.models.kernel_forget import ForgetPositions
from hf_imgproc_attn.models.kernel_given import FeaturePositions
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.kernel_position import ClassTokens, GaussianPositions, Positions, UntiedPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from hf_imgproc_attn.models.visibility import attention_visibility
from tests.helpers import pairwise_cover

HEADS, DROPPED = 2, 0.25

QUICK: dict[str, tuple[Any, ...]] = {
    "booster": ("none", "learned 2"),
    "positions": ("gaussian", "relative_buckets", "untied"),
    "width": (16, 40),
    "value_width": (24, 8),
    "past": (0, 5),
    "length": (19,),
    "key_heads": (2, 1),
    "masked": (False, True),
    "is_causal": (True, False),
    "dropout": (0.0, DROPPED),
}
FULL: dict[str, tuple[Any, ...]] = {
    **QUICK,
    "booster": (*QUICK["booster"], "twicing 3", "sos 2", "diffusion 2", "twicing 4"),
    "positions": (*QUICK["positions"], "", "alibi", "features", "gaussian contents"),
    "value_width": (24, 8, 72),
    "past": (0, 5, 70),
    "length": (19, 70),
}
ALONE: list[tuple[Any, ...]] = [
    # Several tiles of queries and of keys.
    ("none", "alibi", 16, 24, 5, 66, 1, True, True, DROPPED),
    ("twicing 3", "relative_buckets", 16, 8, 5, 19, 2, False, True, DROPPED),
    ("diffusion 2", "", 24, 16, 0, 19, 2, True, True, 0.0),
    ("sos 2", "gaussian contents", 16, 24, 0, 19, 1, True, False, DROPPED),
    ("none", "", 256, 256, 3, 7, 2, False, True, 0.0),
    ("twicing 3", "features", 32, 16, 0, 30, 1, True, True, 0.0, "bfloat16"),
    ("sos 2", "untied", 16, 24, 5, 19, 2, False, True, 0.0, "float16"),
]
RIVALS: list[tuple[Any, ...]] = [
    ("twicing 3", "alibi", 16, 24, 5, 19, 1, True, True, DROPPED, "float32", "sink"),
    ("none", "gaussian contents", 16, 16, 0, 19, 2, True, False, 0.0, "float32", "sink"),
    ("twicing 2", "", 16, 16, 0, 70, 1, True, True, 0.0, "float32", "forget"),
    ("twicing 2", "", 16, 24, 5, 19, 2, True, True, 0.0, "float32", "sink forget"),
    ("learned 2", "gaussian contents", 16, 8, 0, 40, 1, True, False, 0.0, "float32", "sinkhorn"),
    ("twicing 2", "relative_buckets", 16, 24, 5, 40, 1, True, True, 0.0, "float32", "sigmoid"),
    ("none", "gaussian contents", 16, 16, 0, 19, 2, True, False, DROPPED, "float32", "sigmoid"),
    ("none", "gaussian", 16, 24, 5, 19, 1, True, True, DROPPED, "float32", "softpick"),
    ("twicing 2", "", 16, 16, 0, 40, 2, True, False, 0.0, "float32", "softpick"),
    ("twicing 3", "", 16, 24, 5, 19, 2, False, True, 0.0, "float32", "softpick forget"),
    *(
        ("twicing 2", "", 32, 32, 0, 33, 2, True, not rival.startswith("sinkhorn"), 0.0, "bfloat16", rival)
        for rival in ("sink", "forget", "sinkhorn fused", "sigmoid", "softpick")
    ),
]
"""What a cover of pairs need not have."""


class Case(NamedTuple):
    booster: str
    positions: str
    width: int
    value_width: int
    past: int
    length: int
    key_heads: int
    masked: bool
    is_causal: bool
    dropout: float
    dtype: str = "float32"
    rival: str = ""
    """Normalisation, or gates that forget; "fused" where the kernels for the whole booster serve it."""

    @property
    def batch(self) -> int:
        """Two samples where they hide different keys."""
        return 1 + self.masked


class GivenStreams:
    """Streams of a cache: constant rows before those of the call."""

    is_cached = True
    keeps_places_apart = False

    def __init__(self, past: int, width: int, dtype: torch.dtype) -> None:
        self.past_rows, self.width, self.dtype, self.stored = past, width, dtype, {}

    def append(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(self.stored))
        past = torch.randn(rows.shape[0], HEADS, self.past_rows, self.width, generator=generator)
        self.stored[name] = rows
        return torch.cat([past.to(rows.dtype), rows], dim=2)


def random(*shape: int, seed: int) -> torch.Tensor:
    """Numbers that bfloat16 holds."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().double()


def leaves_of(case: Case) -> list[torch.Tensor]:
    """Query, key, value, then the booster's gain and the parameters of the position kernel, if any."""
    keys = case.length + case.past
    leaves = [
        random(case.batch, HEADS, case.length, case.width, seed=1),
        random(case.batch, case.key_heads, keys, case.width, seed=2),
        random(case.batch, case.key_heads, keys, case.value_width, seed=3),
    ]
    if case.booster.startswith("learned"):
        leaves.append(torch.tensor([0.7, 1.3]).view(HEADS, 1, 1).double())
    kernel = case.positions
    if kernel in ("gaussian", "alibi", "gaussian contents"):
        leaves.append(torch.tensor([0.25, 0.0625]).view(HEADS, 1, 1).double())
    elif kernel == "relative_buckets":
        leaves.append(random(HEADS, 1, 8, seed=4))
    elif kernel == "untied":
        leaves += [random(1, HEADS, case.length, 16, seed=5), random(1, HEADS, keys, 16, seed=6)]
        leaves += [] if case.past else [random(HEADS, 3, seed=7)]
    elif kernel == "features":
        leaves += [random(1, 1, case.length, 5, seed=5), random(1, 1, keys, 5, seed=6)]
    if "sink" in case.rival.split():
        leaves.append(torch.tensor([-0.5, 2.0]).double())
    if "forget" in case.rival.split():
        leaves.append(-random(case.batch, HEADS, keys, 1, seed=9).abs())
    return leaves


def positions_of(case: Case, own: list[torch.Tensor]) -> tuple[Positions, ...]:
    keys, kernel = case.length + case.past, case.positions
    places = torch.arange(keys, dtype=torch.float64).view(1, keys, 1)
    new = places[:, case.past :]
    if kernel == "gaussian":
        return (GaussianPositions(new, places, own[0], None, 1.0, True, False),)
    if kernel == "alibi":
        return (AlibiPositions(new, places, own[0], None, 1.0, False, False),)
    if kernel == "relative_buckets":
        return (BucketPositions(new, places, own[0], None, bucket_boundaries(8, 12), False),)
    if kernel == "untied":
        scale, class_tokens = (
            torch.tensor([0.5, 0.25]).view(HEADS, 1, 1),
            None if case.past else ClassTokens(2, own[2]),
        )
        on_grid = (torch.arange(keys) >= 2 * (case.past == 0)).view(-1, 1)
        return (UntiedPositions(own[0] * on_grid[case.past :], own[1] * on_grid, scale.to(own[0]), class_tokens),)
    return (FeaturePositions(*own),) if kernel == "features" else ()


def call_of(case: Case, leaves: list[torch.Tensor]) -> FilterCall:
    """The case's call; one sample is padded in front, so that its first causal queries see nothing, one at the end."""
    query, key, value, *own = leaves
    keys, mask = case.length + case.past, None
    if case.masked:
        mask = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        mask[0, ..., : case.past + case.length // 3] = False
        mask[1, ..., -2:] = False
    name, _, steps = case.booster.partition(" ")
    gain = own.pop(0) if name == "learned" else None
    content = Content("dot_product", 0.3)
    if case.positions == "gaussian contents":
        content = Content("gaussian", own.pop(0))
    visibility = attention_visibility(mask, shape=(case.batch, HEADS, case.length, keys), causal=case.is_causal)
    call = FilterCall(query, key, value, content, visibility, positions_of(case, own))
    call = call._replace(booster=Booster(name, int(steps or 2), gain), dropout=case.dropout)
    rival = case.rival.split()
    if "forget" in rival:
        total = own[-1].cumsum(-2)
        call = call._replace(positions=(*call.positions, ForgetPositions(total[..., case.past :, :], total)))
    if "sink" in rival:
        call = call._replace(sinks=own[-1 - ("forget" in rival)])
    for name in ("sinkhorn", "sigmoid", "softpick"):
        if name in rival:
            call = call._replace(normalisation=Normalisation(name))
    return call._replace(streams=GivenStreams(case.past, case.value_width, query.dtype)) if case.past else call


def philox(seed: int, counters: np.ndarray) -> np.ndarray:
    """The first of four numbers of Philox-4x32 with 7 rounds (Salmon et al. 2011), for counters ``[4, ...]``."""
    low, high = seed & 0xFFFFFFFF, seed >> 32
    a, b, c, d = (x.astype(np.uint64) for x in counters)
    for _ in range(7):
        first, second = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, c = (second >> np.uint64(32)) ^ b ^ np.uint64(low), (first >> np.uint64(32)) ^ d ^ np.uint64(high)
        b, d = second & np.uint64(0xFFFFFFFF), first & np.uint64(0xFFFFFFFF)
        low, high = (low + 0x9E3779B9) & 0xFFFFFFFF, (high + 0xBB67AE85) & 0xFFFFFFFF
    return a


def kept(case: Case, seed: int) -> torch.Tensor:
    """Which weights dropout keeps: of a seed, a sample and head, and the places of query and key."""
    keys = case.length + case.past
    pairs, rows, columns = np.meshgrid(
        np.arange(case.batch * HEADS), case.past + np.arange(case.length), np.arange(keys), indexing="ij"
    )
    numbers = philox(seed, np.stack([columns, rows, pairs, np.zeros_like(rows)])) >> np.uint64(8)
    return torch.from_numpy(numbers.astype(np.int64) >= round(case.dropout * 2**24)).view(
        case.batch, HEADS, case.length, keys
    )


def exact(case: Case, call: FilterCall, seed: int) -> torch.Tensor:
    matrix = filter_matrix(filter_logits(call), call.visibility, call.sinks, call.normalisation)
    if case.dropout:
        matrix = matrix * kept(case, seed) / (1.0 - case.dropout)
    return call.boost(lambda rows: matrix @ rows, call.new_value, call.repeated()[1])


def results(case: Case, dtype: torch.dtype, how: str) -> list[torch.Tensor]:
    """Output, gradients and stored streams, of ``"triton"``, ``"sdpa"`` or the ``"exact"`` filter."""
    precise = torch.promote_types(dtype, torch.float32)
    leaves = [x.to(dtype if at < 3 else precise).requires_grad_() for at, x in enumerate(leaves_of(case))]
    call = call_of(case, leaves)
    torch.manual_seed(5)
    if how == "exact":
        out = exact(case, call, int(torch.randint(2**63 - 1, (1,))))
    else:
        backend = (SINKHORN_BACKENDS if "sinkhorn" in case.rival.split() else BACKENDS)[how]
        assert backend.refuses(call) is None
        asked = as_softmax(call, None) if "sinkhorn" in case.rival.split() else call
        assert how != "triton" or is_specialised(asked) == ("fused" in case.rival.split())
        out = backend.run(call)
    grad = random(case.batch, HEADS, case.length, case.value_width, seed=8).to(dtype)
    streams = getattr(call.streams, "stored", {}).values()
    return [x.detach() for x in (out, *torch.autograd.grad(out, leaves, grad), *streams)]


def errors(case: Case, how: str) -> list[float]:
    """The largest error over the largest value, of each tensor; infinite where something is not a number."""
    wanted = results(case, torch.float64, "exact")
    return errors_of(results(case, getattr(torch, case.dtype), how), wanted)


def errors_of(got: list[torch.Tensor], wanted: list[torch.Tensor]) -> list[float]:
    """Likewise, of tensors and exact ones."""
    found = []
    for mine, right in zip(got, wanted, strict=True):
        error = (mine.double() - right).abs().max() / right.abs().max().clamp(min=0.1)
        found.append(float(error) if error.isfinite() else float("inf"))
    return found


def measure(case: Case) -> dict[str, Any]:
    """Errors of a case, and in half precision those of the same steps by PyTorch's attention."""
    found: dict[str, Any] = {**case._asdict(), "errors": errors(case, "triton")}
    if case.dtype == "float32":
        return found
    # No fused call has these two.
    like = case._replace(rival="") if case.rival in ("sigmoid", "softpick") else case
    return {**found, "sdpa_errors": errors(like, "sdpa")}


def operator_checks() -> dict[str, str]:
    """PyTorch's own checks of the operator, with everything that it may be given."""
    case = Case("none", "gaussian", 16, 24, 3, 9, 1, True, True, DROPPED)
    leaves = [x.float().requires_grad_() for x in leaves_of(case)]
    call = call_of(case, leaves)
    query, key, value = leaves[:3]
    kind, class_tokens, coordinates, key_coordinates, parameters, lookup = position_tensors(
        call.positions[0], query, 12
    )
    mask, key_bias, seed = call.visibility.keys[:, 0, 0], torch.randn(2, HEADS, 12).requires_grad_(), torch.tensor([3])
    spans = torch.tensor([[1, 12], [0, 11]], dtype=torch.int32)
    own = parameters.detach().requires_grad_()
    given = (query, key, value, mask, spans, key_bias, coordinates, key_coordinates, own, lookup, seed)
    query_bias, sinks = torch.randn(2, HEADS, 9).requires_grad_(), torch.randn(HEADS).requires_grad_()
    options = (kind, class_tokens, 0.3, True, DROPPED, "sink")
    return torch.library.opcheck(once_forward, (*given, query_bias, sinks, *options))


@torch.no_grad()
def forgetting() -> dict[str, float]:
    """Gates without a gradient, on the kernels for the whole booster: errors of the output. They sum to 500 or so."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        case = Case("twicing 2", "", 16, 16, 0, 70, 1, True, True, 0.0, dtype, "forget")
        leaves = leaves_of(case)
        leaves[-1] = leaves[-1] * 10.0
        precise = torch.promote_types(getattr(torch, dtype), torch.float32)
        call = call_of(case, [x.to(getattr(torch, dtype) if at < 3 else precise) for at, x in enumerate(leaves)])
        assert is_specialised(call)
        right = exact(case, call_of(case, leaves), 0)
        found[dtype] = float((BACKENDS["triton"].run(call).double() - right).abs().max() / right.abs().max())
    return found


def extreme_sinks() -> list[float]:
    """Errors of the output and of all gradients, with 70 tokens of which the first 66 are padding."""
    given = [random(1, 3, 70, 16, seed=seed) for seed in range(3)]
    given.append(torch.tensor([-torch.inf, torch.finfo(torch.float32).max, 0.5], dtype=torch.float64))
    mask = (torch.arange(70) >= 66).view(1, 1, 1, 70)
    visibility, found = attention_visibility(mask, shape=(1, 3, 70, 70), causal=True), []
    for dtype, backend in ((torch.float32, "triton"), (torch.float64, "reference")):
        query, key, value, sinks = leaves = [x.to(dtype).requires_grad_() for x in given]
        call = FilterCall(query, key, value, Content("dot_product", 0.3), visibility, sinks=sinks)
        out = BACKENDS[backend].run(call)
        found.append([out.detach(), *torch.autograd.grad(out, leaves, random(1, 3, 70, 16, seed=8).to(dtype))])
    return errors_of(*found)


def compiled() -> dict[str, Any]:
    """Two applications, compiled in one graph: differences from eager and the number of graphs."""
    counter = CompileCounterWithBackend("aot_eager")

    def layer(query: torch.Tensor, key: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        once = Once(query.sin(), key, 0.3, is_causal=True, normalisation="sigmoid")
        return apply_once(once, x - apply_once(once, x)).cos()

    fast, differences = torch.compile(layer, backend=counter, fullgraph=True), []
    for length in (9, 11, 14):
        given = [random(1, HEADS, length, 16, seed=seed).float() for seed in range(3)]
        differences.append(float((fast(*given) - layer(*given)).abs().max()))
    return {"differences": differences, "graphs": counter.frame_count}


def lengths() -> float:
    """The difference between how many keys are visible, and a mask that says so; with positions' nearest keys."""
    case = Case("none", "gaussian", 16, 16, 0, 40, 2, True, False, 0.0)
    query, key, value, scale = (x.float() for x in leaves_of(case))
    once = Once(query, key, 0.3, positions=positions_of(case, [scale])[0])
    counts = torch.tensor([40, 7], dtype=torch.int32)
    masked = apply_once(once._replace(key_mask=torch.arange(40) < counts[:, None]), value)
    return float((apply_once(once._replace(key_mask=counts), value) - masked).abs().max())


def refused() -> dict[str, str]:
    """What the operator says to tensors that it would misread."""
    query, key, x = torch.zeros(2, 2, 5, 16), torch.zeros(2, 1, 7, 16), torch.zeros(2, 2, 7, 8)
    found = {}
    for name, changes, rows in (
        ("axes", {"key": key[0]}, x),
        ("shape", {"key": key[..., :8]}, x),
        ("length", {}, x[:, :, 1:]),
        ("heads", {"key": torch.zeros(2, 3, 7, 16)}, x),
        ("width", {}, torch.zeros(2, 2, 7, 264)),
        ("dtype", {}, x.half()),
        ("mask", {"key_mask": torch.ones(2, 5, dtype=torch.bool)}, x),
        ("bias", {"key_bias": torch.zeros(2, 1, 7)}, x),
        ("query bias", {"query_bias": torch.zeros(2, 2, 5)}, x),
        ("sinks", {"sinks": torch.zeros(2, 1)}, x),
        ("normalisation", {"normalisation": "sinkhorn"}, x),
        ("sinks of sigmoid", {"normalisation": "sigmoid", "sinks": torch.zeros(2)}, x),
        ("dropout", {"dropout": 1.0}, x),
        ("seed", {"dropout": 0.5}, x),
    ):
        try:
            apply_once(Once(query, key, 0.3)._replace(**changes), rows)
        except ValueError as error:
            found[name] = str(error)
    leaf = x.clone().requires_grad_()
    for name, derive in (
        ("forward mode", lambda: torch.func.jvp(lambda rows: apply_once(Once(query, key, 0.3), rows), (x,), (x,))),
        ("twice", lambda: torch.autograd.grad(gradient(leaf).sum(), leaf)),
    ):
        try:
            derive()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def gradient(x: torch.Tensor) -> torch.Tensor:
    """Of a number that is not linear in x, with a graph of it."""
    query, key = random(2, 2, 5, 16, seed=1).float(), random(2, 1, 7, 16, seed=2).float()
    out = apply_once(Once(query, key, 0.3), x)
    return torch.autograd.grad(out.square().sum(), x, create_graph=True)[0]


def cases(full: bool) -> list[Case]:
    """A pairwise cover of the short axes, or of the long ones, and cases that no cover needs to have."""
    return [Case(*row) for row in (*pairwise_cover(list((FULL if full else QUICK).values())), *ALONE, *RIVALS)]


def found(full: bool) -> dict[str, Any]:
    return {
        "cases": [measure(case) for case in cases(full)],
        "operator_checks": operator_checks(),
        "lengths": lengths(),
        "extreme_sinks": extreme_sinks(),
        "compiled": compiled(),
        "forgetting": forgetting(),
        "refused": refused(),
    }
