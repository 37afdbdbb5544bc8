"""Padded batches in other models: their masks of all pairs are as good as being told where the padding is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_imgproc_attn import apply_filter
from hf_imgproc_attn.models import any_layer, visibility
from hf_imgproc_attn.models.visibility import Visibility
from tests.any_model.architectures import build, inputs, padding, text

pytestmark = pytest.mark.both_back_ends


def results(model: Any, given: dict[str, torch.Tensor], seen: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of the tokens that are no padding, and all gradients."""
    model.zero_grad()
    output = model(**given)[0]
    output[seen].square().sum().backward()
    return [output[seen].detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_padding_is_recognised_and_exact(
    name: str, left: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with full masks, forward and backward."""
    model, ids = build(name), text()
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    apply_filter(model, "twicing", boosting_steps=3)
    mask = padding(ids, left=left)
    given, seen = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    calls: list[Visibility] = []
    run = any_layer.run_filter
    monkeypatch.setattr(any_layer, "run_filter", lambda call, *args: calls.append(call.visibility) or run(call, *args))
    found = results(model, given, seen)
    assert [(call.mask, call.bias) for call in calls] == [(None, None)] * 3
    assert all(call.keys is not None and torch.equal(call.keys[:, 0, 0], seen) for call in calls)

    monkeypatch.setattr(visibility, "_as_padding", lambda *args: None)
    expected = results(model, given, seen)
    assert all(call.mask is not None for call in calls[3:])
    for part, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-11 * float(whole.abs().max()))


def test_windows_are_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of one model: those with a window keep their masks, the others are told of padding."""
    model, given = apply_filter(build("gemma3"), "twicing"), inputs("gemma3", padded=True)
    calls: list[Visibility] = []
    run = any_layer.run_filter
    monkeypatch.setattr(any_layer, "run_filter", lambda call, *args: calls.append(call.visibility) or run(call, *args))
    with torch.no_grad():
        model(**given, use_cache=False)
    kinds = ["sliding_attention" if call.mask is not None else "full_attention" for call in calls]
    assert kinds == model.config.layer_types
    assert len(set(kinds)) == 2
