"""FlexAttention as a back-end: on the CPU it computes what the dense reference computes, forward."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_imgproc_attn.gpu import flex
from hf_imgproc_attn.models.backend_table import BACKENDS, Request

LENGTH = 11


def make_request(mask: str, bias: bool, key_heads: int, boosting: str, dtype: torch.dtype = torch.float64) -> Request:
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
    return Request(
        random(2, 4, LENGTH, 8),
        random(2, key_heads, LENGTH, 8),
        random(2, key_heads, LENGTH, 6),
        masks[mask],
        random(1, 4, LENGTH, LENGTH) if bias else None,
        mask == "causal",
        0.4,
        0.0,
        boosting,
        3,
    )


@pytest.mark.parametrize(
    ("mask", "bias", "key_heads"),
    [*product(("none", "causal", "padding", "both", "additive"), (False, True), (4, 2))],
)
@pytest.mark.parametrize("boosting", ["none", "twicing", "sos"])
def test_it_agrees_with_the_reference(mask: str, bias: bool, key_heads: int, boosting: str) -> None:
    request = make_request(mask, bias, key_heads, boosting)
    assert flex.refuses(request) is None
    torch.testing.assert_close(flex.run(request), BACKENDS["reference"].run(request), rtol=0, atol=1e-12)


def test_what_it_cannot_do_is_refused_in_words() -> None:
    request = make_request("none", False, 4, "twicing")
    assert flex.refuses(request._replace(dropout_p=0.1)) == "drops nothing out, got dropout_p=0.1"
    request.query.requires_grad_()
    assert flex.refuses(request) == "has no backward pass on the CPU"
    with torch.no_grad():
        assert flex.refuses(request) is None
