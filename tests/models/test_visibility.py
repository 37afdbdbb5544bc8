"""Masks of all pairs are understood where they say no more than padding and causality, and are never taken for it."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_imgproc_attn.models.visibility import Visibility, attention_visibility, causal_mask


def every_mask(length: int, key_length: int) -> torch.Tensor:
    rows = list(itertools.product((False, True), repeat=length * key_length))
    return torch.tensor(rows).view(-1, 1, length, key_length)


def shown(seen: Visibility) -> torch.Tensor:
    allowed = seen.allowed(torch.device("cpu"))
    return torch.ones(1, 1, 1, 1, dtype=torch.bool) if allowed is None else allowed


@pytest.mark.parametrize(
    ("length", "key_length", "causal"), [(2, 5, False), (2, 5, True), (3, 3, False), (3, 3, True), (3, 2, False)]
)
def test_every_small_mask_means_what_it_shows(length: int, key_length: int, causal: bool) -> None:
    """What is read off a mask is that mask, with the keys that no query sees and the queries that see none;
    padding is recognised in those that some padding makes, with causality or without, and in no others.
    """
    later = ~causal_mask(length, key_length, torch.device("cpu"))
    paddings = every_mask(1, key_length)
    made = [] if causal else [*paddings.expand(-1, 1, length, -1)]
    made += [*(paddings & ~later)] if length <= key_length else []
    forms = {tuple(mask.flatten().tolist()) for mask in made}
    for mask in every_mask(length, key_length):
        seen = attention_visibility(mask[None], shape=(1, 2, length, key_length), causal=causal)
        both = mask[None] & ~later if causal else mask[None]
        assert torch.equal(shown(seen).expand_as(both), both)
        assert torch.equal(shown(seen._replace(dense=None)).expand_as(both), both)
        for places, axis in ((seen.hidden, -2), (seen.blind, -1)):
            nobody = ~both.any(axis, keepdim=True)
            found = torch.zeros_like(nobody) if places is None else places.expand_as(nobody)
            assert torch.equal(found, nobody)
        assert not seen.causal or not bool((both & later).any())
        assert (seen.mask is None) == (tuple(both.flatten().tolist()) in forms)


PADDING = {"left": slice(0, 3), "right": slice(5, 8), "hole": slice(2, 4), "none": slice(0, 0)}


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDING)
def test_padding_of_each_sample_is_found(padding: str, causal: bool, dtype: torch.dtype) -> None:
    """In a batch, boolean or added to the logits, of a part of the queries too; what is added beside it is kept."""
    keys = torch.ones(2, 1, 1, 8, dtype=torch.bool)
    keys[0, ..., PADDING[padding]] = False
    for length in (8, 5):
        mask = keys & causal_mask(length, 8, keys.device) if causal else keys.expand(2, 1, length, 8)
        if dtype != torch.bool:
            mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
        seen = attention_visibility(mask, shape=(2, 3, length, 8))
        assert (seen.mask, seen.bias, seen.causal) == (None, None, causal)
        assert seen.keys is None if padding == "none" else torch.equal(seen.keys, keys)  # type: ignore[arg-type]
        if dtype != torch.bool:
            seen = attention_visibility(mask + 0.5, shape=(2, 3, length, 8))
            assert seen.bias is not None
            assert (seen.mask, float(seen.bias.amax())) == (None, 0.5)
            seen = attention_visibility(mask.requires_grad_(), shape=(2, 3, length, 8))
            assert seen.bias is not None
            assert seen.bias.requires_grad


def test_heads_that_see_other_keys_are_told_apart() -> None:
    keys = torch.ones(1, 2, 1, 6, dtype=torch.bool)
    keys[0, 1, 0, 2:] = False
    seen = attention_visibility(keys & causal_mask(6, 6, keys.device), shape=(1, 2, 6, 6))
    assert seen.keys is not None
    assert torch.equal(seen.keys, keys)


def test_texts_in_a_row_windows_and_prefixes_stay_what_they_are() -> None:
    """At a size at which no mask is like another one."""
    length = 12
    places = torch.arange(length)
    distance = places[:, None] - places
    past = distance >= 0
    cases = {
        "packed": past & ((places[:, None] < 5) == (places < 5)),
        "window": past & (distance < 4),
        "prefix": past | (places < 3),
        "text and images": past | ((places[:, None] > 7) & (places > 7)),
        "empty places of a static cache": torch.nn.functional.pad(past, (0, 4)),
    }
    for mask in cases.values():
        padded = mask[None, None].expand(2, 1, -1, -1).clone()
        padded[0, ..., :2] = False
        for given in (mask, padded):
            seen = attention_visibility(given, shape=(2, 1, *mask.shape))
            assert seen.mask is not None
            assert torch.equal(shown(seen), given.expand(seen.mask.shape))
