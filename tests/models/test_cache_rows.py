"""Growing tensors: the same rows as concatenation gives, without copying them at every step."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_imgproc_attn.models.cache_rows import GrowingRows


def chunks(count: int, sizes: tuple[int, ...] = (1, 3, 2), dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, sizes[index % len(sizes)], 4, generator=generator).to(dtype) for index in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_are_those_of_concatenation(dtype: torch.dtype) -> None:
    rows, stored, growing = chunks(120, dtype=dtype), None, GrowingRows()
    for index, new in enumerate(rows):
        stored = growing.append(stored, new)
        assert torch.equal(stored, torch.cat(rows[: index + 1], dim=-2))


def test_most_steps_copy_nothing() -> None:
    """Over 1,000 steps the memory changes place about log(1000) / log(5/4) times, not 1,000 times."""
    stored, growing, places = None, GrowingRows(), set()
    for new in chunks(1000, (1,)):
        stored = growing.append(stored, new)
        places.add(stored.data_ptr())
        assert growing.buffer is None or growing.buffer.shape[-2] <= stored.shape[-2] + max(64, stored.shape[-2] // 4)
    assert len(places) <= 20


def test_after_a_crop_the_rows_are_written_again_in_place() -> None:
    growing = GrowingRows()
    first, second, third = chunks(3, (5,))
    stored = growing.append(growing.append(None, first), second)
    place = stored.data_ptr()
    cropped = stored[..., :7, :]
    again = growing.append(cropped, third)
    assert torch.equal(again, torch.cat((first, second[..., :2, :], third), dim=-2))
    assert again.data_ptr() == place


@pytest.mark.parametrize("change", ["reorder", "repeat", "dtype", "copy", "prefix of another"])
def test_what_has_taken_the_place_of_the_rows_is_continued(change: str) -> None:
    growing = GrowingRows()
    first, second, third = chunks(3, (5,))
    stored = growing.append(growing.append(None, first), second)
    if change == "reorder":
        stored = stored.index_select(0, torch.tensor([1, 0]))
    elif change == "repeat":
        stored, third = stored.repeat_interleave(2, dim=0), third.repeat_interleave(2, dim=0)
    elif change == "dtype":
        stored, third = stored.double(), third.double()
    elif change == "copy":
        growing, stored = copy.deepcopy((growing, stored))
    else:
        stored = torch.cat((stored, third), dim=-2)[..., :10, :]
    before = stored.clone()
    assert torch.equal(growing.append(stored, third), torch.cat((before, third), dim=-2))


def test_a_slice_of_a_tensor_of_somebody_else_is_left_alone() -> None:
    """Its base has room, which is not ours to write to."""
    whole = torch.zeros(2, 3, 20, 4)
    growing = GrowingRows()
    (new,) = chunks(1, (2,))
    stored = growing.append(growing.append(None, whole[..., :5, :]), new)
    assert torch.equal(whole, torch.zeros_like(whole))
    assert torch.equal(stored[..., 5:, :], new)


def test_gradients_flow_through_what_is_stored() -> None:
    growing = GrowingRows()
    rows = [tensor.requires_grad_() for tensor in chunks(3)]
    stored = None
    for new in rows:
        stored = growing.append(stored, new)
    assert stored is not None
    (stored * torch.arange(stored.numel()).view_as(stored)).sum().backward()
    assert torch.equal(
        torch.cat([tensor.grad for tensor in rows], dim=-2), torch.arange(float(stored.numel())).view_as(stored)
    )


def test_a_graph_that_is_still_needed_is_not_written_into() -> None:
    growing = GrowingRows()
    first, second, third = chunks(3)
    first.requires_grad_()
    stored = growing.append(None, first)
    loss = (stored.square()).sum()
    with torch.no_grad():
        growing.append(growing.append(stored, second), third)
    loss.backward()
    assert torch.equal(first.grad, 2 * first)


def test_rows_of_inference_mode_can_be_continued_outside_it() -> None:
    growing = GrowingRows()
    first, second, third, fourth = chunks(4)
    with torch.inference_mode():
        stored = growing.append(growing.append(None, first), second)
    with torch.no_grad():
        stored = growing.append(stored, third)
        stored = growing.append(stored, fourth)
    assert torch.equal(stored, torch.cat((first, second, third, fourth), dim=-2))


def test_rows_of_another_batch_are_refused_as_concatenation_does() -> None:
    growing = GrowingRows()
    first, second, third = chunks(3)
    stored = growing.append(growing.append(None, first), second)
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        growing.append(stored, third[:1])


def test_rows_of_another_precision_are_not_rounded() -> None:
    growing = GrowingRows()
    first, second, third = chunks(3)
    stored = growing.append(growing.append(None, first), second)
    stored = growing.append(stored, third.double())
    assert torch.equal(stored[..., -third.shape[-2] :, :], third.double())
