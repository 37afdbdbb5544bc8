"""One layer's filter: rows that see nothing, masks of every dtype, hidden and later keys."""

from __future__ import annotations

import pytest
import torch

from tests.models.layer_cases import CASES, POSITIONS, build, masks, tensors

# --------------------------------------------------------------------------------------------------------------------
# SDPA against eager
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("content", "position", "boosting", "steps"), [c for c in CASES if c[0] != "dot_product"])
def test_no_gradient_and_no_output_from_later_tokens(
    content: str, position: str, boosting: str, steps: int, implementation: str
) -> None:
    """Causality by perturbation: token t changes no output before t and every output from t on."""
    layer, inputs = build(content, position, boosting, steps), tensors(position)
    before, _ = layer(**inputs, implementation=implementation, is_causal=True)
    changed = {name: value.clone() for name, value in inputs.items()}
    for name in ("query", "key", "value"):
        changed[name][:, :, 6] += 1.0
    if position == "untied":
        changed["position_states"][:, 6] = changed["position_states"][:, 6].flip(-1)
    after, _ = layer(**changed, implementation=implementation, is_causal=True)
    torch.testing.assert_close(after[:, :, :6], before[:, :, :6], rtol=0, atol=1e-14)
    assert (after - before)[:, :, 6:].abs().amax((0, 1, 3)).min() > 1e-6


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64])
def test_hidden_keys_have_no_influence(position: str, implementation: str, dtype: torch.dtype) -> None:
    """What a mask hides may hold anything, huge numbers too."""
    layer, inputs = build("gaussian", position, "twicing", 3), tensors(position)
    mask = masks()["left"]["attention_mask"]
    given = (
        mask if dtype == torch.bool else torch.zeros(mask.shape).double().masked_fill(~mask, torch.finfo(dtype).min)
    )
    before = layer(**inputs, implementation=implementation, attention_mask=given)[0]
    inputs["key"][0, :, :4] *= 50
    inputs["value"][0, :, :4] = 1e9
    after = layer(**inputs, implementation=implementation, attention_mask=given)[0]
    torch.testing.assert_close(after[0, :, 4:], before[0, :, 4:], rtol=0, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)


# --------------------------------------------------------------------------------------------------------------------
# Rows that see nothing, masks of other dtypes
# --------------------------------------------------------------------------------------------------------------------

MASK_DTYPES = (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", ["boolean", "smallest", "infinity"])
@pytest.mark.parametrize("position", ["none", "untied", "gaussian", "patches", "alibi", "bucket patches", "rotary"])
def test_rows_that_see_nothing_are_zero(position: str, hidden: str, dtype: torch.dtype, grad: bool) -> None:
    """As in the reference: 0, no NaN, no gradient; not an average over keys that the row may not see."""
    layer = build("gaussian", position, "twicing", 2).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["left"]["attention_mask"]
    if hidden != "boolean":
        low = torch.finfo(dtype).min if hidden == "smallest" else float("-inf")
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    for tensor in (inputs["query"], inputs["key"], inputs["value"]):
        tensor.requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        for implementation in ("eager", "sdpa"):
            output, _ = layer(**inputs, implementation=implementation, attention_mask=mask)
            assert output.isfinite().all()
            assert (output[0, :, :4] == 0).all(), f"{implementation}: {output[0, :, :4].abs().max()}"
            if grad:
                output.float().sum().backward()
                gradients = [inputs[name].grad for name in ("query", "key", "value")]
                gradients += [parameter.grad for parameter in layer.parameters()]
                assert all(gradient.isfinite().all() for gradient in gradients)
                assert (gradients[0][0, :, :4] == 0).all()


@pytest.mark.parametrize("mask_dtype", MASK_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("position", ["none", "gaussian", "patches", "alibi", "buckets", "rotary"])
def test_masks_of_any_dtype(position: str, dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """The dtype of an additive mask need not be the query's: eager takes it, so does SDPA, and they agree."""
    layer = build("gaussian", position, "twicing", 2).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["dense"]["attention_mask"]
    if mask_dtype != torch.bool:
        mask = torch.zeros(mask.shape, dtype=mask_dtype).masked_fill(~mask, torch.finfo(mask_dtype).min)
    eager, _ = layer(**inputs, implementation="eager", attention_mask=mask)
    sdpa, _ = layer(**inputs, implementation="sdpa", attention_mask=mask)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=tolerance)


@pytest.mark.parametrize("learns", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_additive_masks_add_to_every_kernel(position: str, dtype: torch.dtype, learns: bool) -> None:
    """A bias a head beside hidden keys, in every form that the position kernel takes."""
    layer = build("dot_product", position, "twicing", 2, learn_bandwidths=learns).to(dtype)
    inputs = {name: tensor.to(dtype) for name, tensor in tensors(position).items()}
    if "coordinates" in inputs:
        inputs["coordinates"] = inputs["coordinates"].to(torch.promote_types(dtype, torch.float32))
    mask = masks()["bias"]["attention_mask"]
    mask = torch.where(mask < -1e300, torch.finfo(dtype).min, mask).to(dtype)
    eager, _ = layer(**inputs, implementation="eager", attention_mask=mask)
    sdpa, _ = layer(**inputs, implementation="sdpa", attention_mask=mask)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.08}[dtype]
    torch.testing.assert_close(sdpa, eager, rtol=0, atol=tolerance)
    without, _ = layer(**inputs, implementation="eager", attention_mask=masks()["bias"]["attention_mask"] > -1e300)
    assert (eager - without).abs().max() > 0.3
