"""FlexAttention as a back-end: on the CPU it computes what the dense reference computes, forward."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from hf_imgproc_attn.functional import filter_attention
from hf_imgproc_attn.gpu import flex
from hf_imgproc_attn.gpu.flex_scores import bucket_of
from hf_imgproc_attn.models import backend_sdpa
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS, run_filter
from hf_imgproc_attn.models.kernel_forget import ForgetPositions
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.kernel_position import GaussianPositions
from hf_imgproc_attn.models.kernel_relative import BucketKernel, bucket_boundaries, relative_buckets
from hf_imgproc_attn.models.visibility import Visibility, attention_visibility
from tests.models.helpers import layer_inputs, make_filter

LENGTH = 11


def make_call(mask: str, bias: bool, key_heads: int, boosting: str, dtype: torch.dtype = torch.float64) -> FilterCall:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    padding = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    padding[0, ..., :3] = False
    masks = {
        "none": None,
        "causal": None,
        "padding": padding,
        # Left padding leaves the first rows nothing to see.
        "both": padding & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(),
        "additive": random(1, 1, LENGTH, LENGTH),
    }
    shape = (2, 4, LENGTH, LENGTH)
    return FilterCall(
        random(2, 4, LENGTH, 8),
        random(2, key_heads, LENGTH, 8),
        random(2, key_heads, LENGTH, 6),
        Content("dot_product", 0.4),
        attention_visibility(masks[mask], shape=shape, causal=mask == "causal"),
        positions=(BiasPositions(random(1, 4, LENGTH, LENGTH)),) if bias else (),
        booster=Booster(boosting, 3),
    )


@pytest.mark.parametrize(
    ("mask", "bias", "key_heads"),
    [*product(("none", "causal", "padding", "both", "additive"), (False, True), (4, 2))],
)
@pytest.mark.parametrize("boosting", ["none", "twicing", "sos"])
def test_it_agrees_with_the_reference(mask: str, bias: bool, key_heads: int, boosting: str) -> None:
    call = make_call(mask, bias, key_heads, boosting)
    assert flex.refuses(call) is None
    torch.testing.assert_close(flex.run(call), BACKENDS["reference"].run(call), rtol=0, atol=1e-12)


def forget(length: int, key_length: int, dtype: torch.dtype, most: float = 1.0) -> ForgetPositions:
    """c_i - c_j of the last tokens, whose sums reach far."""
    kept = torch.rand(2, 4, key_length, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    total = (-most * kept).cumsum(-2).to(dtype)
    return ForgetPositions(total[..., key_length - length :, :], total)


def rival_call(mask: str, rival: str, boosting: str, content: str = "dot_product", heads: int = 2) -> FilterCall:
    """A call with a sink, gates that forget, or both; gates need a causal mask for their sense, not for their sum."""
    call = make_call(mask, False, heads, boosting)
    call = call._replace(content=Content(content, 0.4))
    if "sink" in rival.split():
        call = call._replace(sinks=torch.tensor([-1.0, 0.0, 1.5, 4.0], dtype=torch.float64))
    if "forget" in rival.split():
        call = call._replace(positions=(forget(LENGTH, LENGTH, torch.float64),))
    if "sinkhorn" in rival.split():
        call = call._replace(normalisation=Normalisation("sinkhorn", 3))
    return call


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "both", "additive"])
@pytest.mark.parametrize("rival", ["sink", "forget", "sink forget"])
@pytest.mark.parametrize(("boosting", "content"), [("none", "gaussian"), ("twicing", "dot_product")])
def test_sinks_and_gates_agree_with_the_reference(mask: str, rival: str, boosting: str, content: str) -> None:
    """A sink weighs what a whole row adds too: distances in full, gates up to the query's own token."""
    call = rival_call(mask, rival, boosting, content)
    assert flex.refuses(call) is None
    got = run_filter(call, "flex")
    torch.testing.assert_close(got, BACKENDS["reference"].run(call), rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "padding", "additive"])
def test_sinkhorn_is_a_softmax_with_a_number_for_each_key(mask: str) -> None:
    call = rival_call(mask, "sinkhorn", "twicing", "gaussian")
    torch.testing.assert_close(run_filter(call, "flex"), run_filter(call, "reference"), rtol=0, atol=1e-12)


def test_numbers_of_tokens_form_no_bias_and_keep_their_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of 500 or so differ by less than bfloat16 can tell: the error is that of the products alone."""
    monkeypatch.setattr(backend_sdpa, "position_logits", None)
    length = 256
    given = [torch.randn(2, 4, length, 8, generator=torch.Generator().manual_seed(at)) for at in range(3)]
    errors = []
    for most in (0.0, 4.0):
        visibility, gates = Visibility(length, length, causal=True), forget(length, length, torch.float64, most)
        half = [x.bfloat16() for x in given]
        exact = FilterCall(*(x.double() for x in half), Content("dot_product", 0.4), visibility, (gates,))
        rounded = ForgetPositions(*(x.float() for x in gates))
        call = exact._replace(query=half[0], key=half[1], value=half[2], positions=(rounded,))
        error = flex.run(call).double() - BACKENDS["reference"].run(exact)
        errors.append(float(error.abs().max()))
    assert errors[0] < 2e-2
    assert errors[1] < 2 * errors[0]


def test_what_it_cannot_do_is_refused_in_words() -> None:
    call = make_call("none", False, 4, "twicing")
    assert flex.refuses(call._replace(dropout=0.1)) == "drops nothing out, got dropout_p=0.1"
    call.query.requires_grad_()
    assert flex.refuses(call) == "has no backward pass on the CPU"
    with torch.no_grad():
        assert flex.refuses(call) is None
    call = make_call("none", False, 4, "none")
    for name in ("sigmoid", "softpick"):
        refused = flex.refuses(call._replace(normalisation=Normalisation(name)))
        assert refused == f"computes the weights of softmax only, got normalisation={name!r}"
    with pytest.raises(ValueError, match="needs attention without a causal mask"):
        run_filter(rival_call("causal", "sinkhorn", "none"), "flex")
    refused = flex.refuses(call._replace(content=Content("dot_product", 0.4, 30.0)))
    assert refused == "knows no logits with a soft cap"


@pytest.mark.parametrize("position", ["gaussian", "alibi", "relative_buckets", "gaussian patches", "alibi patches"])
@pytest.mark.parametrize("boosting", ["none", "twicing"])
def test_positions_are_computed_inside_the_kernel(
    position: str, boosting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the places of one query and one key: no bias is formed, and the result is the reference's."""
    kernel, *patches = position.split()
    options = {"num_class_tokens": 2, "position_axes": 2, "longest_side": 4} if patches else {}
    if kernel == "relative_buckets":
        options |= {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 9}
    layer = make_filter("gaussian", kernel, boosting, head_dim=4, **options)
    length = 2 + 4 * 3 if patches else LENGTH
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    if patches:
        grid = torch.cartesian_prod(torch.arange(4), torch.arange(3))
        places = torch.nn.functional.pad(grid, (0, 0, 2, 0)).unsqueeze(0)
    else:
        places = torch.stack([torch.arange(length), 2 * torch.arange(length)]).unsqueeze(-1)
    inputs = layer_inputs(length, coordinates=places, is_causal=not patches)
    with torch.no_grad():
        expected, _ = layer(*given, inputs._replace(backend="reference"))
        monkeypatch.setattr(backend_sdpa, "position_logits", None)  # what would form a bias
        got, _ = layer(*given, inputs._replace(backend="flex"))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_buckets_of_one_offset_are_those_of_the_table() -> None:
    offsets = torch.arange(-40, 41)
    boundaries = bucket_boundaries(8, 20)
    for bidirectional in (False, True):
        kernel = BucketKernel(boundaries, bidirectional, 1, 16)
        expected = relative_buckets(offsets, boundaries, bidirectional)
        assert torch.equal(bucket_of(offsets, kernel), expected)


def test_a_learned_scalar_needs_a_backward_pass_too() -> None:
    """Bandwidths, gains and class-token logits are inputs as much as queries are."""
    for options in ({"content_kernel": "gaussian"}, {"position_kernel": "gaussian"}, {"boosting": "learned"}):
        layer = make_filter(**options)
        given = [torch.zeros(1, 3, 4, 5, dtype=torch.float64) for _ in range(3)]
        places = torch.arange(4).view(1, 4, 1)
        with pytest.raises(ValueError, match="has no backward pass on the CPU"):
            layer(*given, layer_inputs(4, coordinates=places, backend="flex"))


def blocks_of(mask: BlockMask) -> dict[str, list[list[int]]]:
    """The blocks that each block of rows, or of columns, is listed with."""
    found = {}
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, indices = getattr(mask, f"{kind}_num_blocks")[0, 0], getattr(mask, f"{kind}_indices")[0, 0]
        found[kind] = [sorted(row[:count].tolist()) for count, row in zip(counts, indices, strict=True)]
    return found


@pytest.mark.parametrize(("length", "key_length"), [(5, 5), (300, 300), (256, 384), (130, 400), (257, 513)])
def test_the_block_mask_of_causality_is_the_one_that_torch_finds(length: int, key_length: int) -> None:
    """In a mask of all pairs, which ours does without."""
    past = key_length - length
    wanted = create_block_mask(lambda b, h, i, j: j <= i + past, None, None, length, key_length, device="cpu")
    got = flex.causal_block_mask(length, key_length, torch.device("cpu"))
    assert blocks_of(got) == blocks_of(wanted)
    assert (got.seq_lengths, got.shape, got.BLOCK_SIZE) == (wanted.seq_lengths, wanted.shape, wanted.BLOCK_SIZE)
    assert flex.causal_block_mask(length, key_length, torch.device("cpu")) is got


@pytest.mark.parametrize("mask", ["causal", "both"])
def test_causal_calls_leave_blocks_out(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding is hidden in the scores, so that all rows of a batch share one block mask."""
    given = []

    def attention(*arguments: Any) -> Any:
        given.append(arguments[4])
        return flex._dense(*arguments)

    monkeypatch.setattr(flex, "_attention", lambda device_type: attention)
    flex.run(make_call(mask, False, 4, "twicing"))
    assert len(given) == 3
    assert isinstance(given[0], BlockMask)
    assert all(blocks is given[0] for blocks in given)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """What a GPU runs, but for the kernels: compiled, and counted."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    attention = flex.compiled_attention(counter)
    monkeypatch.setattr(flex, "_attention", lambda device_type: attention)
    with torch.no_grad():
        yield counter
    torch.compiler.reset()


def position_call(length: int) -> FilterCall:
    query, key, value = torch.randn(3, 2, 2, length, 8).unbind()
    places = torch.arange(length, dtype=torch.float32).view(1, length, 1)
    positions = GaussianPositions(places, places, torch.rand(2, 1, 1), None, 1.0, True, False)
    content, visibility = Content("dot_product", 0.3), Visibility(length, length, causal=True)
    return FilterCall(query, key, value, content, visibility, positions=(positions,))


def test_a_new_length_does_not_compile_anew(counted: CompileCounterWithBackend) -> None:
    """PyTorch stops compiling after 8 times, and computes densely without a word."""
    for length in range(9, 21):
        call = position_call(length)
        torch.testing.assert_close(flex.run(call), BACKENDS["reference"].run(call))
    assert counted.frame_count <= 3


def test_sinks_and_gates_compile_into_one_graph_for_all_lengths(counted: CompileCounterWithBackend) -> None:
    for length in range(9, 15):
        call = position_call(length)
        gates = torch.randn(2, 2, length, 1)
        call = call._replace(positions=(ForgetPositions(gates, gates),), sinks=torch.tensor([0.5, -0.5]))
        torch.testing.assert_close(flex.run(call), BACKENDS["reference"].run(call))
    assert counted.frame_count <= 3


def test_more_kinds_of_calls_than_are_compiled_for_are_an_error(
    counted: CompileCounterWithBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex, "MAX_KINDS", 1)
    call = position_call(5)
    flex.run(call)
    flex.run(call)
    with pytest.raises(RuntimeError, match="filter_backend='flex' compiles at most 1 kinds of calls in one process"):
        flex.run(call._replace(positions=()))


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", ["none", "left", "right", "all of one"])
def test_who_sees_whom_is_told_from_the_places(padded: str, causal: bool, past: int) -> None:
    """Without a mask of all pairs: the same as the mask says, but that rows which see nothing see everything."""
    length, key_length = 5, 5 + past
    keys = torch.ones(2, 1, 1, key_length, dtype=torch.bool)
    keys[0, ..., {"left": slice(0, 6), "right": slice(-2, None), "all of one": slice(None)}.get(padded, slice(0))] = (
        False
    )
    visibility = Visibility(length, key_length, causal, keys=None if padded == "none" else keys)
    allowed = visibility.allowed(torch.device("cpu"))
    dense = torch.ones(2, 1, length, key_length, dtype=torch.bool)
    dense = dense if allowed is None else dense & allowed
    see, hidden_rows = flex.visible_places(visibility, torch.device("cpu"))
    b, i, j = torch.meshgrid(torch.arange(2), torch.arange(length), torch.arange(key_length), indexing="ij")
    got = torch.ones(2, length, key_length, dtype=torch.bool) if see is None else see(b, torch.zeros_like(b), i, j)
    nothing = ~dense.any(-1, keepdim=True)
    assert torch.equal(got, (dense | nothing)[:, 0])
    if hidden_rows is not None:
        assert torch.equal(hidden_rows.expand_as(nothing), nothing)
    else:
        assert not nothing.any()


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, in its forward mode
def test_what_is_not_differentiated_backwards_is_refused_in_words() -> None:
    """Forward mode, and the transforms of ``torch.func``; a tangent anywhere in the call."""
    call = make_call("none", False, 4, "twicing")
    tangent, message = torch.ones_like(call.query), "has derivatives in backward mode alone"
    for derive in (
        lambda run: torch.func.jvp(run, (call.query,), (tangent,)),
        lambda run: torch.func.vmap(run)(call.query.unsqueeze(0)),
    ):
        with pytest.raises(ValueError, match=message):
            derive(lambda query: run_filter(call._replace(query=query), "flex"))
    with torch.autograd.forward_ad.dual_level():
        sinks = torch.autograd.forward_ad.make_dual(torch.zeros(4), torch.ones(4))
        assert message in str(flex.refuses(call._replace(sinks=sinks)))


def test_leaves_with_gradients_are_served_without_gradients() -> None:
    """Parameters require gradients, whatever ``no_grad`` says."""
    leaves = [x.requires_grad_() for x in torch.randn(3, 2, 2, 9, 8).unbind()]
    with torch.no_grad():
        got, wanted = (filter_attention(*leaves, boosting="twicing", backend=name) for name in ("flex", "reference"))
    torch.testing.assert_close(got, wanted)
