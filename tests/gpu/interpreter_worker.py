"""Runs the Triton kernels in Triton's interpreter, on the CPU, and prints what it found as one line of JSON.

A process of its own: the interpreter must be chosen before Triton is imported, which other tests of a process may have
done. ``TRITON_INTERPRET=1`` is set by whoever starts it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_imgproc_attn.gpu import refuses, supports
from hf_imgproc_attn.gpu.twicing import choose, twicing_attention, twicing_backward, twicing_forward
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.visibility import attention_visibility
from tests.models.helpers import dense_attention

Tensors = list[torch.Tensor]
SCALE = 0.3


class Case(NamedTuple):
    algorithm: str
    length: int
    head_dim: int
    is_causal: bool
    masked: bool = False
    dtype: str = "float32"
    batch: int = 2
    deterministic: bool = False


CASES = [
    Case("general", 37, 32, True),
    Case("general", 70, 64, False, masked=True, deterministic=True),
    Case("general", 33, 96, True, masked=True, deterministic=True),
    Case("general", 65, 128, False, batch=1),
    Case("general", 101, 40, True, masked=True),
    Case("general", 1, 16, True),
    Case("short", 17, 32, False),
    Case("short", 70, 64, False, masked=True),
    Case("short", 197, 48, False, masked=True, batch=1),
    Case("single_pass", 37, 32, True),
    Case("single_pass", 131, 64, True, masked=True),
    Case("single_pass", 70, 128, True, batch=1),
    *(
        Case(algorithm, 70, 32, is_causal, masked=True, dtype=dtype)
        for algorithm, is_causal in (("general", True), ("general", False), ("short", False), ("single_pass", True))
        for dtype in ("bfloat16", "float16")
    ),
]


def inputs_of(case: Case) -> tuple[Tensors, torch.Tensor | None]:
    """Query, key, value as views into one projection, the output's gradient, and the mask of keys.

    The first third of the first item's keys is hidden, so that its first causal queries see nothing, and the last two
    of the other item's.
    """
    torch.manual_seed(case.length + case.head_dim)
    dtype, heads = getattr(torch, case.dtype), 2
    packed = torch.randn(case.batch, case.length, 3, heads, case.head_dim).to(dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    grad = torch.randn(case.batch, heads, case.length, case.head_dim).to(dtype)
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, case.length, dtype=torch.bool)
        mask[0, : case.length // 3] = False
        mask[1:, -2:] = False
    return [query, key, value, grad], mask


def results(tensors: Tensors, attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> Tensors:
    """Output, dQ, dK, dV."""
    *inputs, grad = tensors
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def reference(mask: torch.Tensor | None, is_causal: bool, boosting: str) -> Callable[..., torch.Tensor]:
    """The formula, dense."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        allowed = None if mask is None else mask[:, None, None]
        options: dict[str, Any] = {"attention_mask": allowed, "is_causal": is_causal, "boosting": boosting}
        return dense_attention(query @ key.mT * SCALE, value, value, **options)[0]

    return attend


def sdpa(mask: torch.Tensor | None, is_causal: bool, passes: int) -> Callable[..., torch.Tensor]:
    """PyTorch's attention, called once, or twice for twicing: what errors in half precision are compared with."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        length = query.shape[-2]
        allowed = torch.ones(query.shape[0], 1, length, length, dtype=torch.bool)
        allowed = allowed.tril() if is_causal else allowed
        allowed = allowed if mask is None else allowed & mask[:, None, None]
        sees = allowed.any(-1, keepdim=True)

        def smooth(stream: torch.Tensor) -> torch.Tensor:
            options: dict[str, Any] = {"attn_mask": allowed | ~sees, "scale": SCALE}
            return nn.functional.scaled_dot_product_attention(query, key, stream, **options) * sees

        out = smooth(value)
        return out if passes == 1 else out + smooth(value - out)

    return attend


def errors(got: Tensors, wanted: Tensors) -> list[float]:
    """Largest error over largest value, of each tensor; infinite where something is not a number."""
    found = []
    for mine, right in zip(got, wanted, strict=True):
        error = (mine.double() - right).abs().max() / right.abs().max().clamp(min=0.1)
        found.append(float(error) if error.isfinite() else float("inf"))
    return found


def measure(case: Case) -> dict[str, Any]:
    torch.use_deterministic_algorithms(case.deterministic)
    tensors, mask = inputs_of(case)
    dtype = getattr(torch, case.dtype)

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"is_causal": case.is_causal, "algorithm": case.algorithm}
        return twicing_attention(query, key, value, mask, scale=SCALE, **options)

    got = results(tensors, fused, dtype)
    found: dict[str, Any] = {"case": "-".join(map(str, case)), "dtype": case.dtype}
    found["errors"] = errors(got, results(tensors, reference(mask, case.is_causal, "twicing"), torch.float64))
    found["strides_follow"] = got[0].transpose(1, 2).is_contiguous()
    if case.dtype != "float32":
        for passes, boosting in ((1, "none"), (2, "twicing")):
            theirs = results(tensors, sdpa(mask, case.is_causal, passes), dtype)
            exact = results(tensors, reference(mask, case.is_causal, boosting), torch.float64)
            found[f"sdpa_{passes}_errors"] = errors(theirs, exact)
    torch.use_deterministic_algorithms(False)
    return found


def causality() -> dict[str, Any]:
    """How far a change of token 40 reaches: largest change of earlier outputs, least change of later ones."""
    found = {}
    for algorithm in ("general", "single_pass"):
        (query, key, value, _), _ = inputs_of(Case(algorithm, 70, 32, True))
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[..., 40, :] += 1.0
        before = twicing_attention(query, key, value, is_causal=True, algorithm=algorithm)
        after = twicing_attention(*changed, is_causal=True, algorithm=algorithm)
        change = (after - before).abs().amax((0, 1, 3))
        found[algorithm] = [float(change[:40].max()), float(change[40:].min())]
    return found


def saved_tensors() -> dict[str, float]:
    """Largest difference between algorithms in what they leave for the backward, which may be another's."""
    found = {}
    for is_causal, others in ((True, ["single_pass"]), (False, ["short"])):
        (query, key, value, _), mask = inputs_of(Case("general", 70, 32, is_causal, masked=True))
        wanted = twicing_forward(query, key, value, mask, SCALE, is_causal, "general")
        for other in others:
            got = twicing_forward(query, key, value, mask, SCALE, is_causal, other)
            same_hidden = torch.equal(got[2].isinf(), wanted[2].isinf())
            differences = [float((a - b).nan_to_num(0.0).abs().max()) for a, b in zip(got, wanted, strict=True)]
            found[other] = max(differences) if same_hidden else float("inf")
    return found


def operator_checks() -> dict[str, str]:
    """PyTorch's own checks of both operators."""
    (query, key, value, grad), mask = inputs_of(Case("general", 19, 16, True, masked=True))
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    forward = (*leaves, mask, SCALE, True, "general")
    found = torch.library.opcheck(twicing_forward, forward)
    out, residual, lse = (tensor.detach() for tensor in twicing_forward(*forward))
    backward = (grad, query, key, value, mask, out, residual, lse, SCALE, True, "general", False)
    tests = ("test_schema", "test_faketensor")
    return {**found, **{f"backward {name}": text for name, text in _opcheck(backward, tests).items()}}


def _opcheck(arguments: tuple[Any, ...], tests: tuple[str, ...]) -> dict[str, str]:
    return torch.library.opcheck(twicing_backward, arguments, test_utils=tests)


def compiled() -> dict[str, Any]:
    """A function that calls the operator, compiled in one graph: differences from eager and number of graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert supports(query, key, value, is_causal=True) is None
        return twicing_attention(query.sin(), key, value, mask, is_causal=True).cos()

    fast = torch.compile(layer, backend=counter, fullgraph=True)
    differences = []
    for length in (19, 23, 27):
        tensors, mask = inputs_of(Case("general", length, 16, True, masked=True))
        got = results(tensors, lambda *inputs, mask=mask: fast(*inputs, mask), torch.float32)
        wanted = results(tensors, lambda *inputs, mask=mask: layer(*inputs, mask), torch.float32)
        differences.append(max(errors(got, [tensor.double() for tensor in wanted])))
    return {"differences": differences, "graphs": counter.frame_count}


def edges() -> dict[str, Any]:
    """What happens at the edges of the domain."""
    (query, key, value, _), _ = inputs_of(Case("general", 19, 16, False))
    nothing = torch.zeros(2, 19, dtype=torch.bool)
    leaf = query.detach().requires_grad_()
    out = twicing_attention(leaf, key, value, nothing)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)  # a gradient without memory of its own, too
    refused = {}
    for name, call in {
        "shape": lambda: twicing_attention(query, key[:, :, 1:], value),
        "dtype": lambda: twicing_attention(query.double(), key.double(), value.double()),
        "width": lambda: twicing_attention(*(torch.zeros(1, 1, 2, 136) for _ in range(3))),
        "mask": lambda: twicing_attention(query, key, value, torch.ones(2, 19)),
        "algorithm": lambda: twicing_attention(query, key, value, algorithm="fast"),
        "short": lambda: twicing_attention(query, key, value, is_causal=True, algorithm="short"),
        "single_pass": lambda: twicing_attention(query, key, value, algorithm="single_pass"),
        "twice": lambda: torch.autograd.grad(
            torch.autograd.grad(twicing_attention(leaf, key, value).sum(), leaf, create_graph=True)[0].sum(), leaf
        ),
    }.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error)
    empty = twicing_attention(*(torch.zeros(0, 2, 5, 16) for _ in range(3)))
    return {
        "hidden": [float(out.detach().abs().max()), float(gradient.abs().max())],
        "refused": refused,
        "empty": list(empty.shape),
        "chosen": [choose(query, False), choose(query, True), choose(torch.zeros(1, 1, 300, 16), False)],
    }


def dispatch() -> dict[str, Any]:
    """The back-end in the table: its error on calls that it serves, its reasons for those that it refuses."""
    (query, key, value, _), mask = inputs_of(Case("general", 19, 16, False, masked=True))
    served = []

    def call(keys: torch.Tensor | None = None, **changes: Any) -> FilterCall:
        shape = (2, 2, 19, 19)
        visibility = attention_visibility(keys, shape=shape)
        usual = FilterCall(query, key, value, Content("dot_product", SCALE), visibility, booster=Booster("twicing"))
        return usual._replace(**changes)

    for rows in (None, mask, mask[:1]):
        request = call(None if rows is None else rows[:, None, None])
        assert BACKENDS["triton"].refuses(request) is None
        exact = reference(rows, False, "twicing")(query.double(), key.double(), value.double())
        served += errors([BACKENDS["triton"].run(request)], [exact])
    square = torch.ones(19, 19, dtype=torch.bool).tril(-1)
    double = {"query": query.double(), "key": key.double(), "value": value.double()}
    reasons = {
        "mask": refuses(call(square)),
        "float mask": refuses(call(torch.linspace(0, 1, 19).expand(2, 1, 1, 19))),
        "bias": refuses(call(positions=(BiasPositions(torch.zeros(1, 2, 19, 19)),))),
        "dropout": refuses(call(dropout=0.1)),
        "steps": refuses(call(booster=Booster("twicing", 3))),
        "boosting": refuses(call(booster=Booster("none"))),
        "groups": refuses(call(key=key[:, :1], value=value[:, :1])),
        "dtype": refuses(call(**double)),
        "width": refuses(call(**dict.fromkeys(("query", "key", "value"), torch.zeros(1, 1, 2, 136)))),
    }
    return {"served": served, "reasons": reasons}


def main() -> None:
    warnings.simplefilter("error")
    found = {
        "cases": [measure(case) for case in CASES],
        **{part.__name__: part() for part in (causality, saved_tensors, operator_checks, compiled, edges, dispatch)},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
