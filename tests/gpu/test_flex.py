"""FlexAttention as a back-end: on the CPU it computes what the dense reference computes, forward."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_imgproc_attn.gpu import flex
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.backend_table import BACKENDS
from hf_imgproc_attn.models.kernel_given import BiasPositions
from hf_imgproc_attn.models.visibility import attention_visibility

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


def test_what_it_cannot_do_is_refused_in_words() -> None:
    call = make_call("none", False, 4, "twicing")
    assert flex.refuses(call._replace(dropout=0.1)) == "drops nothing out, got dropout_p=0.1"
    call.query.requires_grad_()
    assert flex.refuses(call) == "has no backward pass on the CPU"
    with torch.no_grad():
        assert flex.refuses(call) is None
