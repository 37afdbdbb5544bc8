"""Runs the Triton kernels in Triton's interpreter, on the CPU, and prints what it found as one line of JSON.

A process of its own: the interpreter must be chosen before Triton is imported, which other tests of a process may have
done. ``TRITON_INTERPRET=1`` is set by whoever starts it.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_imgproc_attn.gpu import refuses, supports
from hf_imgproc_attn.gpu.fused import choose, fused_attention, fused_backward, fused_forward
from hf_imgproc_attn.gpu.places import position_tensors
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.kernel_given import BiasPositions, FeaturePositions
from hf_imgproc_attn.models.kernel_position import BlockedPositions, ClassTokens, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import AlibiPositions, BucketPositions, bucket_boundaries
from hf_imgproc_attn.models.visibility import attention_visibility
from tests.gpu import composed_cases, model_cases, quick_interpreter  # noqa: F401  # which it changes
from tests.gpu.decode_cases import decoding
from tests.gpu.hub_cases import hub_kernel
from tests.gpu.schedules import schedules

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
    positions: str = ""
    """Kernel, and "patches" for two axes, with class tokens."""
    boosting: str = "twicing"
    key_heads: int = 2
    inverse: float = 1.0
    """Of the bandwidths, for the narrowest head."""


CASES = [
    Case("general", 37, 32, True, batch=1),
    Case("general", 70, 64, False, masked=True, batch=1, deterministic=True, positions="gaussian patches"),
    Case("general", 70, 40, True, masked=True, positions="relative_buckets", key_heads=1),
    Case("general", 1, 16, True, positions="gaussian"),
    Case("general", 40, 16, False, masked=True, positions="gaussian", inverse=6.0),
    Case("general", 33, 24, True, masked=True, positions="gaussian", boosting="none", key_heads=1),
    Case("general", 33, 16, True, deterministic=True, positions="relative_buckets", boosting="none", batch=1),
    Case("short", 50, 64, False, masked=True, positions="alibi patches", key_heads=1),
    Case("short", 129, 48, False, masked=True, batch=1, positions="gaussian"),
    Case("single_pass", 37, 32, True, positions="alibi", key_heads=1),
    Case("single_pass", 131, 64, True, masked=True, positions="gaussian", batch=1),
    Case("single_pass", 70, 16, True, positions="relative_buckets patches", batch=1),
    Case("wavefront", 131, 32, True, masked=True, positions="gaussian", key_heads=1),
    Case("wavefront", 70, 128, True, positions="relative_buckets patches", batch=1),
    Case("wavefront", 40, 16, True, deterministic=True, batch=1),
    Case("general", 70, 32, True, masked=True, dtype="bfloat16", batch=1, positions="gaussian"),
    Case("general", 40, 32, False, dtype="float16", positions="relative_buckets patches", boosting="none", batch=1),
    Case("short", 40, 32, False, masked=True, dtype="bfloat16", batch=1),
    Case("short", 40, 32, False, masked=True, dtype="float16", positions="gaussian patches", batch=1),
    Case("single_pass", 70, 32, True, masked=True, dtype="bfloat16", batch=1, positions="alibi"),
    Case("wavefront", 70, 32, True, masked=True, dtype="bfloat16", batch=1, positions="alibi"),
]
MORE = [
    Case("general", 33, 96, True, masked=True, deterministic=True),
    Case("general", 20, 128, False, batch=1),
    Case("general", 70, 16, False, batch=1, positions="alibi patches", boosting="none"),
    Case("short", 17, 32, False, batch=1),
    Case("short", 30, 16, False, masked=True, positions="relative_buckets patches"),
    Case("single_pass", 20, 128, True, batch=1),
    Case("general", 40, 32, False, masked=True, dtype="float16", batch=1),
    Case("single_pass", 40, 32, True, masked=True, dtype="float16", batch=1),
    Case("wavefront", 70, 32, True, dtype="float16", batch=1),
]
"""Only under ``--full``: what they have stands in other cases too, in other company."""


def inputs_of(case: Case) -> tuple[Tensors, torch.Tensor | None]:
    """Query, key, value as views into one projection, the output's gradient, and the mask of keys.

    The first third of the first item's keys is hidden, so that its first causal queries see nothing, and the last two
    of the other item's.
    """
    torch.manual_seed(case.length + case.head_dim)
    dtype, heads = getattr(torch, case.dtype), 2
    packed = torch.randn(case.batch, case.length, 3, heads, case.head_dim).to(dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    key, value = key[:, : case.key_heads], value[:, : case.key_heads]
    grad = torch.randn(case.batch, heads, case.length, case.head_dim).to(dtype)
    mask = None
    if case.masked:
        mask = torch.ones(case.batch, case.length, dtype=torch.bool)
        mask[0, 2 * ("patches" in case.positions) : case.length // 3] = False
        mask[1:, -2:] = False
    return [query, key, value, grad], mask


def parameters_of(case: Case) -> Tensors:
    """The position kernel's, then the class tokens'; float64 numbers that float32 holds."""
    kernel, *patches = case.positions.split()
    generator = torch.Generator().manual_seed(1)
    own = torch.rand(2, 1, 1, generator=generator) * 0.2 + 0.05
    if kernel == "gaussian":
        own = own * case.inverse**2
    elif kernel == "relative_buckets":
        own = torch.randn(2, 1 + len(patches), 8, generator=generator)
    return [own.double(), *([torch.randn(2, 3, generator=generator).double()] if patches else [])]


def positions_of(case: Case, parameters: Tensors) -> BlockedPositions:
    """Places of texts differ between the items of the batch; patches share theirs, and come behind class tokens."""
    kernel, *patches = case.positions.split()
    own, *class_logits = parameters
    if patches:
        grid = torch.cartesian_prod(torch.arange(40), torch.arange(5))[: case.length - 2]
        places = nn.functional.pad(grid, (0, 0, 2, 0)).unsqueeze(0)
    else:
        steps = torch.arange(1, case.batch + 1).view(-1, 1, 1)
        places = steps * torch.arange(case.length).view(1, -1, 1)
    places = places.to(own.dtype)
    class_tokens = ClassTokens(2, class_logits[0]) if patches else None
    if kernel == "gaussian":
        return GaussianPositions(places, places, own, class_tokens, 1.0, True, False)
    if kernel == "alibi":  # keys that are not known to be the queries' own
        return AlibiPositions(places, places.clone(), own, class_tokens, 1.0, False, False)
    boundaries = bucket_boundaries(4 if patches else 8, 12)
    return BucketPositions(places, places, own, class_tokens, boundaries, bool(patches))


def results(
    tensors: Tensors, attend: Callable[..., torch.Tensor], dtype: torch.dtype, parameters: Sequence[torch.Tensor] = ()
) -> Tensors:
    """Output, dQ, dK, dV, and gradients of the parameters."""
    *inputs, grad = tensors
    leaves = [tensor.to(dtype).detach().requires_grad_() for tensor in inputs]
    precise = torch.promote_types(dtype, torch.float32)
    leaves += [parameter.to(precise).detach().requires_grad_() for parameter in parameters]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def reference(
    mask: torch.Tensor | None, is_causal: bool, boosting: str, case: Case | None = None
) -> Callable[..., torch.Tensor]:
    """The formula, dense."""

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        usual = Case("", query.shape[2], query.shape[3], is_causal, boosting=boosting)
        call = call_of(query, key, value, mask, usual)
        if case is not None and parameters:
            call = call._replace(positions=(positions_of(case, list(parameters)),))
        return BACKENDS["reference"].run(call)

    return attend


def call_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, case: Case
) -> FilterCall:
    """A case's call without positions."""
    visibility = attention_visibility(
        None if mask is None else mask[:, None, None],
        shape=(*query.shape[:3], key.shape[2]),
        causal=case.is_causal,
    )
    return FilterCall(query, key, value, Content("dot_product", SCALE), visibility, booster=Booster(case.boosting))


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
    parameters = parameters_of(case) if case.positions else []

    def fused(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = {"is_causal": case.is_causal, "algorithm": case.algorithm, "boosting": case.boosting}
        positions = positions_of(case, list(own)) if own else None
        return fused_attention(query, key, value, mask, positions=positions, scale=SCALE, **options)

    got = results(tensors, fused, dtype, parameters)
    formula = reference(mask, case.is_causal, case.boosting, case)
    found: dict[str, Any] = {
        **case._asdict(),
        "errors": errors(got, results(tensors, formula, torch.float64, parameters)),
    }
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
    for algorithm in ("general", "single_pass", "wavefront"):
        (query, key, value, _), _ = inputs_of(Case(algorithm, 70, 32, True))
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[..., 40, :] += 1.0
        before = fused_attention(query, key, value, is_causal=True, algorithm=algorithm)
        after = fused_attention(*changed, is_causal=True, algorithm=algorithm)
        change = (after - before).abs().amax((0, 1, 3))
        found[algorithm] = [float(change[:40].max()), float(change[40:].min())]
    return found


def saved_tensors() -> dict[str, float]:
    """Largest difference between algorithms in what they leave for the backward, which may be another's."""
    found = {}
    for is_causal, others in ((True, ["single_pass", "wavefront"]), (False, ["short"])):
        (query, key, value, _), mask = inputs_of(Case("general", 40, 32, is_causal, masked=True))
        case = Case("general", 40, 32, is_causal, masked=True, positions="gaussian")
        inputs = (query, key, value, mask, None, *position_tensors(positions_of(case, parameters_of(case)), query)[2:])

        def forward(
            algorithm: str, inputs: tuple[Any, ...] = inputs, is_causal: bool = is_causal
        ) -> tuple[torch.Tensor, ...]:
            return fused_forward(*inputs, 1, 0, SCALE, is_causal, True, algorithm)

        wanted = forward("general")
        for other in others:
            got = forward(other)
            same_hidden = torch.equal(got[2].isinf(), wanted[2].isinf())
            differences = [float((a - b).nan_to_num(0.0).abs().max()) for a, b in zip(got, wanted, strict=True)]
            found[other] = max(differences) if same_hidden else float("inf")
    return found


def operator_checks() -> dict[str, str]:
    """PyTorch's own checks of both operators."""
    case = Case("general", 19, 16, True, masked=True, positions="gaussian")
    (query, key, value, grad), mask = inputs_of(case)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    scales = [parameter.float().requires_grad_() for parameter in parameters_of(case)]
    kind, class_tokens, coordinates, key_coordinates, scale, lookup = position_tensors(
        positions_of(case, scales), query
    )
    key_bias = torch.randn(query.shape[:3]).requires_grad_()
    leaf = None if scale is None else scale.detach().requires_grad_()
    places = [key_bias, coordinates, key_coordinates, leaf, lookup]
    options = (kind, class_tokens, SCALE, True, True, "general")
    found = torch.library.opcheck(fused_forward, (*leaves, mask, *places, *options))
    with torch.no_grad():
        out, residual, lse = fused_forward(*leaves, mask, *places, *options)
    places = [None if tensor is None else tensor.detach() for tensor in places]
    backward = (grad, query, key, value, mask, *places, out, residual, lse, *options, True, False)
    tests = ("test_schema", "test_faketensor")
    return {**found, **{f"backward {name}": text for name, text in _opcheck(backward, tests).items()}}


def _opcheck(arguments: tuple[Any, ...], tests: tuple[str, ...]) -> dict[str, str]:
    return torch.library.opcheck(fused_backward, arguments, test_utils=tests)


def compiled() -> dict[str, Any]:
    """A function that calls the operator, compiled in one graph: differences from eager and number of graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def layer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        assert supports(query, key, value, is_causal=True) is None
        return fused_attention(query.sin(), key, value, mask, is_causal=True).cos()

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
    nothing, patches = torch.zeros(2, 19, dtype=torch.bool), Case("general", 19, 16, False, positions="alibi patches")
    leaf = query.detach().requires_grad_()
    out = fused_attention(leaf, key, value, nothing)
    (gradient,) = torch.autograd.grad(out.sum(), leaf)  # a gradient without memory of its own, too
    refused = {}
    for name, call in {
        "shape": lambda: fused_attention(query, key[:, :, 1:], value),
        "dtype": lambda: fused_attention(query.double(), key.double(), value.double()),
        "width": lambda: fused_attention(*(torch.zeros(1, 1, 2, 136) for _ in range(3))),
        "mask": lambda: fused_attention(query, key, value, torch.ones(2, 19)),
        "algorithm": lambda: fused_attention(query, key, value, algorithm="fast"),
        "short": lambda: fused_attention(query, key, value, is_causal=True, algorithm="short"),
        "single_pass": lambda: fused_attention(query, key, value, algorithm="single_pass"),
        "wavefront": lambda: fused_attention(query, key, value, algorithm="wavefront"),
        "unboosted": lambda: fused_attention(query, key, value, boosting="none", algorithm="short"),
        "key_bias": lambda: fused_attention(query, key, value, key_bias=torch.zeros(2, 1, 19)),
        "places": lambda: fused_attention(
            query, key, value, positions=positions_of(patches._replace(length=18), parameters_of(patches))
        ),
        "boosting": lambda: fused_attention(query, key, value, boosting="sos"),
        "heads": lambda: fused_attention(torch.cat([query, query[:, :1]], 1), key, value),
        "forward mode": lambda: torch.func.jvp(lambda x: fused_attention(x, key, value), (query,), (query,)),
        "transform": lambda: torch.func.grad(lambda x: fused_attention(x, key, value).sum())(query),
        "twice": lambda: torch.autograd.grad(
            torch.autograd.grad(fused_attention(leaf, key, value).sum(), leaf, create_graph=True)[0].sum(), leaf
        ),
    }.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error)
    empty = fused_attention(*(torch.zeros(0, 2, 5, 16) for _ in range(3)))
    return {
        "hidden": [float(out.detach().abs().max()), float(gradient.abs().max())],
        "refused": refused,
        "empty": list(empty.shape),
        "chosen": [choose(query, False), choose(query, True), choose(torch.zeros(1, 1, 300, 16), False)],
    }


def contents() -> list[list[float]]:
    """Gaussian contents beside Gaussian positions, from the table: errors of the output and all gradients."""
    found = []
    for boosting, is_causal, class_tokens in (("twicing", False, True), ("none", True, False)):
        positions = "gaussian patches" if class_tokens else ""
        case = Case("", 40, 16, is_causal, masked=True, positions=positions, boosting=boosting, key_heads=1)
        tensors, mask = inputs_of(case)
        bandwidths = torch.tensor([0.5, 0.1]).view(2, 1, 1)
        parameters = [bandwidths, *(parameters_of(case) if positions else [])]

        def attend(name: str, case: Case = case, mask: torch.Tensor | None = mask) -> Callable[..., torch.Tensor]:
            def run(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
                usual = call_of(query, key, value, mask, case)
                places = (positions_of(case, list(own[1:])),) if own[1:] else ()
                return BACKENDS[name].run(usual._replace(content=Content("gaussian", own[0]), positions=places))

            return run

        got = results(tensors, attend("triton"), torch.float32, parameters)
        found.append(errors(got, results(tensors, attend("reference"), torch.float64, parameters)))
    return found


def hidden_rows(call: Callable[..., FilterCall], mask: torch.Tensor) -> list[float]:
    """The error where padded tokens hold NaN, of what other tokens get; with positions, and keys that heads share."""
    case = Case("general", 19, 16, False, masked=True, positions="gaussian")
    clean = call(mask[:, None, None], positions=(positions_of(case, parameters_of(case)),))
    clean = clean._replace(key=clean.key[:, :1], value=clean.value[:, :1])
    padding = ~mask[:, None, :, None]
    poisoned = {name: getattr(clean, name).masked_fill(padding, float("nan")) for name in ("query", "key", "value")}
    wanted = BACKENDS["reference"].run(clean).masked_fill(padding, 0.0)
    with warnings.catch_warnings():  # NumPy's, of the maximum of a row of NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        got = BACKENDS["triton"].run(clean._replace(**poisoned))
    return errors([got.masked_fill(padding, 0.0)], [wanted.double()])


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
    served += hidden_rows(call, mask)
    square = torch.ones(19, 19, dtype=torch.bool).tril(-1)
    double = {"query": query.double(), "key": key.double(), "value": value.double()}
    reasons = {
        "mask": refuses(call(square)),
        "float mask": refuses(call(torch.linspace(0, 1, 19).expand(2, 1, 1, 19))),
        "mask of heads": refuses(call(torch.rand(2, 2, 1, 19) > 0.5)),
        "bias": refuses(call(positions=(BiasPositions(torch.zeros(1, 2, 19, 19)),))),
        "dtype": refuses(call(**double)),
        "width": refuses(call(**dict.fromkeys(("query", "key", "value"), torch.zeros(1, 1, 2, 264)))),
        "columns": refuses(call(positions=(FeaturePositions(*(torch.zeros(1, 1, 19, 250),) * 2),))),
    }
    with torch.autograd.forward_ad.dual_level():
        for name, x in (("query", query), ("sinks", torch.zeros(2))):
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            reasons[f"tangent of {name}"] = refuses(call(**{name: dual}))
    return {"served": served, "reasons": reasons, "contents": contents()}


def main() -> None:
    warnings.simplefilter("error")
    # The interpreter of Triton 3.6 counts with arrays of one number.
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    # PyTorch's own, in its forward mode.
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    found = {
        "cases": [measure(case) for case in (*CASES, *(MORE if "--full" in sys.argv else ()))],
        **{part.__name__: part() for part in (causality, saved_tensors, operator_checks, compiled, edges, dispatch)},
        **schedules(),
        **decoding(),
        **hub_kernel(),
    }
    found["models"] = model_cases.found()
    found["composed"] = composed_cases.found("--full" in sys.argv)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
