"""Padding in blocks: runs of hidden keys are written one by one, scattered ones by a mask; both as the dense truth."""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn.models.backend_blocked import run as run_blocked
from hf_imgproc_attn.models.backend_blocked_hidden import MOST_RUNS, KeyRuns, key_runs
from hf_imgproc_attn.models.backend_blocked_plan import Group
from hf_imgproc_attn.models.backend_reference import run as run_reference
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
