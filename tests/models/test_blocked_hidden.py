"""Padding in blocks: runs of hidden keys are written one by one, scattered ones by a mask; both as the dense truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hf_imgproc_attn.models import backend_blocked_passes
from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_blocked_hidden import MOST_RUNS, KeyRuns, key_runs
from hf_imgproc_attn.models.backend_blocked_passes import Inputs
from hf_imgproc_attn.models.backend_blocked_plan import Group
from hf_imgproc_attn.models.backend_call import FilterCall
from hf_imgproc_attn.models.backend_reference import run as run_reference
from hf_imgproc_attn.models.kernel_normalisation import Normalisation
from hf_imgproc_attn.models.kernel_position import BlockedPositions, ClassTokens, GaussianPositions
from hf_imgproc_attn.models.kernel_relative import BucketPositions, bucket_boundaries
from tests.models.helpers import filter_call
from tests.models.layer_cases import random

LENGTH, HEADS = 26, 2
PADDING = {
    "left": ([0, 1, 2, 3, 4, 5, 6, 7, 8], [0]),
    "right": ([24, 25], [17, 18, 19, 20, 21, 22, 23, 24, 25]),
    "one sample": ([], [0, 1, 2]),
    "both ends and a hole": ([0, 1, 11, 12, 25], [5]),
    "scattered": (list(range(0, LENGTH, 2)), list(range(1, LENGTH - 1, 2))),
    "nothing is left": (list(range(LENGTH)), [3]),
}


def shown(padding: str) -> torch.Tensor:
    mask = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
    for sample, places in enumerate(PADDING[padding]):
        mask[sample, ..., places] = False
    return mask


def test_runs_are_the_hidden_keys() -> None:
    """Every key of each sample, and none where they are many or differ between heads."""
    for padding in PADDING:
        hidden = ~shown(padding)
        runs = key_runs(hidden, LENGTH)
        if padding == "scattered":
            assert hidden[0].sum() > MOST_RUNS
            assert runs is None
            continue
        assert isinstance(runs, KeyRuns)
        group = Group(0, slice(0, 2), slice(0, HEADS), slice(0, 2 * HEADS))
        for first in (0, 4):
            filled = torch.ones(2 * HEADS, LENGTH - first, 3)
            runs.fill_(filled, group, 0.0, first)
            expected = (~hidden[..., first:]).float().mT.expand(2, HEADS, -1, 3).flatten(0, 1)
            assert torch.equal(filled, expected)
    assert key_runs(hidden.expand(2, HEADS, 1, LENGTH), LENGTH) is None
    assert key_runs(hidden[..., :1], LENGTH) is None


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize(("boosting", "steps", "block_rows", "group_pairs"), [("none", 1, 7, 4), ("twicing", 3, 9, 2)])
def test_padded_batches_are_the_dense_truth(
    padding: str, is_causal: bool, boosting: str, steps: int, block_rows: int, group_pairs: int
) -> None:
    """Outputs and gradients, with NaN in hidden keys and values: groups of whole samples and of one."""
    mask = shown(padding)
    given = [random(2, HEADS, LENGTH, 4, seed=seed) for seed in range(3)]
    for tensor in given[1:]:
        tensor.masked_fill_(~mask.mT, float("nan"))
    results = []
    for run in (run_reference, run_blocked):
        own = [tensor.clone().requires_grad_() for tensor in given]
        call = filter_call(
            *own, boosting=boosting, boosting_steps=max(steps, 1), attention_mask=mask, is_causal=is_causal
        )
        blocks = {} if run is run_reference else {"block_rows": block_rows, "group_pairs": group_pairs}
        output = run(call, **blocks)
        # Rows whose own value is NaN have an output that is, too; nobody looks at it.
        seen = mask.mT if boosting != "none" else torch.ones_like(mask.mT)
        output = output.masked_fill(~seen, 0.0)
        results.append([output, *torch.autograd.grad(output, own, random(*output.shape, seed=9))])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("content", [1.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("has_bias", [False, True])
def test_many_samples_share_a_group(content: float, has_bias: bool, is_causal: bool) -> None:
    """More than are written run by run; what stands in hidden keys and values, moderate or not, moves nothing."""
    samples = MOST_RUNS + 3
    mask = torch.ones(samples, 1, 1, LENGTH, dtype=torch.bool)
    for sample in range(1, samples):
        mask[sample, ..., LENGTH - sample :] = False
        mask[sample, ..., : sample // 3] = False
    given = [random(samples, HEADS, LENGTH, 4, seed=seed) for seed in range(3)]
    bias = random(samples, HEADS, LENGTH, LENGTH, seed=4) if has_bias else None
    hidden = [given[0], *(tensor.masked_fill(~mask.mT, content) for tensor in given[1:])]
    results = []
    for run, tensors in ((run_reference, given), (run_blocked, hidden)):
        own = [tensor.clone().requires_grad_() for tensor in tensors]
        call = filter_call(
            *own, boosting="twicing", boosting_steps=3, attention_mask=mask, is_causal=is_causal, bias=bias
        )
        blocks = {} if run is run_reference else {"block_rows": 9, "group_pairs": samples * HEADS}
        output = run(call, **blocks).masked_fill(~mask.mT, 0.0)
        gradients = torch.autograd.grad(output, own, random(*output.shape, seed=9))
        results.append([output, gradients[0], *(gradient.masked_fill(~mask.mT, 0.0) for gradient in gradients[1:])])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


class OfScores(TorchDispatchMode):
    """Operations that write as many numbers as there are scores."""

    def __init__(self, scores: int) -> None:
        super().__init__()
        self.scores = scores
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and out.numel() == self.scores:
            self.names.append(str(func))
        return out


@pytest.mark.parametrize("is_causal", [True, False])
def test_short_samples_that_share_products_take_no_pass_for_their_padding(is_causal: bool) -> None:
    """What is hidden comes with the product: as many passes over the scores as without padding."""
    samples = MOST_RUNS + 3
    mask = torch.arange(LENGTH) < LENGTH - torch.arange(samples).view(-1, 1, 1, 1)
    given = [random(samples, HEADS, LENGTH, 4, seed=seed) for seed in range(3)]
    passes = []
    for seen in (None, mask):
        call = filter_call(*given, boosting="twicing", attention_mask=seen, is_causal=is_causal)
        with OfScores(samples * HEADS * LENGTH**2) as counted:
            run_blocked(call, block_rows=LENGTH, group_pairs=samples * HEADS)
        passes.append(counted.names)
    assert passes[0] == passes[1]
    assert len(passes[0]) >= 3


@pytest.mark.parametrize(("content", "copies"), [(1.0, 0), (1e30, 2), (float("nan"), 2)])
def test_moderate_numbers_stay_where_a_key_is_hidden(
    content: float, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values are copied, to be overwritten, only if they could overflow."""
    cleaned, clean = [], Inputs._clean
    monkeypatch.setattr(Inputs, "_clean", lambda own, x, hidden: cleaned.append(x) or clean(own, x, hidden))
    mask = shown("both ends and a hole")
    tensors = [random(2, HEADS, LENGTH, 4, seed=seed).masked_fill(~mask.mT, content) for seed in range(3)]
    run_blocked(filter_call(*tensors, boosting="none", attention_mask=mask, is_causal=True), group_pairs=2 * HEADS)
    assert len(cleaned) == copies


@pytest.mark.parametrize("content", [1.0, 1e30])
def test_backward_asks_no_more_whether_numbers_are_moderate(content: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward pass has asked of the same tensors; where it was not so, both copy keys and values."""
    asked, cleaned, ask, clean = [], [], backend_blocked_passes.is_moderate, Inputs._clean
    monkeypatch.setattr(backend_blocked_passes, "is_moderate", lambda x: asked.append(x) or ask(x))
    monkeypatch.setattr(Inputs, "_clean", lambda own, x, hidden: cleaned.append(x) or clean(own, x, hidden))
    mask = shown("both ends and a hole")
    given = [random(2, HEADS, LENGTH, 4, seed=seed).masked_fill(~mask.mT, content) for seed in range(3)]
    leaves = [x.requires_grad_() for x in given]
    call = filter_call(*leaves, attention_mask=mask, is_causal=True)
    output = run_blocked(call, group_pairs=2 * HEADS)
    counts = len(asked), len(cleaned)
    direction = random(*output.shape, seed=3).masked_fill(~mask.mT, 0.0)
    found = torch.autograd.grad(output, leaves, direction)
    assert (len(asked), len(cleaned)) == (counts[0], 2 * counts[1])
    assert counts == ((3, 0) if content == 1.0 else (1, 2))
    expected = torch.autograd.grad(run_reference(call), leaves, direction)
    for got, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-10)


def products(call: FilterCall, own: list[torch.Tensor], group_pairs: int) -> tuple[int, int]:
    """What torch counts, forward and backward."""
    counts = []
    with FlopCounterMode(display=False) as counter:
        output = run_blocked(call, block_rows=4, group_pairs=group_pairs)
        counts.append(counter.get_total_flops())
        torch.autograd.grad(output, own, torch.ones_like(output))
    return counts[0], counter.get_total_flops() - counts[0]


@pytest.mark.parametrize(
    ("padding", "is_causal", "share"),
    [
        # Blocks of 4 rows see 4, 8, 12 and 16 keys: 40 in all.
        ((8, 16), True, (4 + 8) / 40),
        ((6, 16), True, (2 / 4 * 2 + 6 + 10) / 40),
        ((0, 8), True, (4 + 8 + 8 + 8) / 40),
        ((3, 9), False, 6 / 16),
        ((16, 16), True, 0.0),
    ],
)
def test_padding_is_not_computed(padding: tuple[int, int], is_causal: bool, share: float) -> None:
    """The products of a sample are those of the keys that it sees, and of queries that see one."""
    given = [random(2, HEADS, 16, 4, seed=seed) for seed in range(3)]
    mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
    mask[0] = False
    mask[0, ..., slice(*padding)] = True
    counts = []
    for seen, group_pairs in ((None, HEADS), (mask, HEADS), (mask, 2 * HEADS)):
        own = [tensor.clone().requires_grad_() for tensor in given]
        call = filter_call(*own, boosting="twicing", attention_mask=seen, is_causal=is_causal)
        counts.append(products(call, own, group_pairs))
    full, apart, together = counts
    assert apart == tuple(pytest.approx(whole * (1 + share) / 2) for whole in full)
    assert together == full  # the other sample sees everything


def positions_of(kind: str) -> BlockedPositions:
    places = torch.arange(LENGTH, dtype=torch.float64).view(1, LENGTH, 1)
    classes = ClassTokens(3, random(HEADS, 3, seed=21).requires_grad_())
    if kind == "gaussian":
        scale = (0.01 + random(HEADS, 1, 1, seed=20).abs() / 20).requires_grad_()
        return GaussianPositions(places, places, scale, classes, 1.0, True, False)
    table = random(HEADS, 1, 8, seed=20).requires_grad_()
    return BucketPositions(places, places, table, classes, bucket_boundaries(4, 9), True)


KINDS: dict[str, dict[str, Any]] = {
    "gaussian": {"positions": "gaussian"},
    "buckets": {"positions": "buckets"},
    "sinks": {"sinks": True},
    "sigmoid": {"normalisation": "sigmoid"},
    "softpick": {"normalisation": "softpick"},
    "bias": {"bias": True},
}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("padding", ["left", "right", "nothing is left"])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_weights_leave_padding_out(kind: str, padding: str, is_causal: bool) -> None:
    """Groups of one sample, whose blocks begin and end where its keys do; outputs and all gradients."""
    fields, mask = KINDS[kind], shown(padding)
    results = []
    for run in (run_reference, run_blocked):
        own = [random(2, HEADS, LENGTH, 4, seed=seed).requires_grad_() for seed in range(3)]
        positions = positions_of(fields["positions"]) if "positions" in fields else None
        bias = random(2, HEADS, LENGTH, LENGTH, seed=4).requires_grad_() if "bias" in fields else None
        call = filter_call(
            *own, boosting="twicing", attention_mask=mask, is_causal=is_causal, positions=positions, bias=bias
        )
        extra = [] if bias is None else [bias]
        if positions is not None:
            extra = list(positions.parameters())
        if "sinks" in fields:
            extra = [random(HEADS, seed=5).requires_grad_()]
            call = call._replace(sinks=extra[0])
        if "normalisation" in fields:
            call = call._replace(normalisation=Normalisation(fields["normalisation"]))
        cut = {} if run is run_reference else {"block_rows": 7, "group_pairs": HEADS}
        output = run(call, **cut)
        results.append([output, *torch.autograd.grad(output, [*own, *extra], random(*output.shape, seed=9))])
    for exact, found in zip(*results, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)
