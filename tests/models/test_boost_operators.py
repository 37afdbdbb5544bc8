"""The laws of boosting on three tokens, by hand: what almost every other test of a boosted filter relies on.

They run first, and while one of them is broken, other tests that fail are counted with it (``tests/conftest.py``).
"""

from __future__ import annotations

import pytest
import torch

from hf_imgproc_attn import filter_attention
from hf_imgproc_attn.models.boost_operators import BOOSTING, keep_rows

pytestmark = pytest.mark.elementary

A = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.5, 0.375], [0.25, 0.125, 0.625]], dtype=torch.float64)
V = torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64)
# Binary fractions, so that every product is exact.
AV = torch.tensor([[2.0], [2.625], [3.0]], dtype=torch.float64)
A2V = torch.tensor([[2.40625], [2.6875], [2.703125]], dtype=torch.float64)
A3V = torch.tensor([[2.55078125], [2.658203125], [2.626953125]], dtype=torch.float64)


def boosted(name: str, steps: int = 2, gain: torch.Tensor | None = None) -> torch.Tensor:
    return BOOSTING[name](lambda rows: A @ rows, keep_rows, V, V, steps, gain)


def test_no_boosting_is_a() -> None:
    assert torch.equal(A @ V, AV)
    assert torch.equal(boosted("none"), AV)


def test_twicing_is_two_a_minus_a_squared() -> None:
    assert torch.equal(boosted("twicing"), 2 * AV - A2V)


def test_twicing_of_three_steps_is_three_a_minus_three_a_squared_plus_a_cubed() -> None:
    assert torch.equal(boosted("twicing", 3), 3 * AV - 3 * A2V + A3V)


def test_diffusion_is_a_squared() -> None:
    assert torch.equal(boosted("diffusion"), A2V)


def test_sos_is_a_times_v_plus_the_last_output_minus_the_last_output() -> None:
    """u_2 = A(V + A V) - A V = A^2 V; u_3 = A(V + u_2) - u_2."""
    assert torch.equal(boosted("sos"), A2V)
    assert torch.equal(boosted("sos", 3), AV + A3V - A2V)


def test_learned_is_a_plus_gamma_times_a_minus_a_squared() -> None:
    gain = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert torch.equal(boosted("learned", gain=gain), AV + 0.5 * (AV - A2V))
    assert torch.equal(boosted("learned"), 2 * AV - A2V)


@pytest.mark.parametrize("backend", ["reference", "sdpa", "blocked"])
def test_every_back_end_applies_two_a_minus_a_squared(backend: str) -> None:
    nothing = torch.zeros(1, 1, 3, 1, dtype=torch.float64)
    bias, value = A.log()[None, None], V[None, None]
    for boosting, expected in (("none", AV), ("twicing", 2 * AV - A2V), ("diffusion", A2V)):
        got = filter_attention(nothing, nothing, value, position_bias=bias, boosting=boosting, backend=backend)
        torch.testing.assert_close(got[0, 0], expected, rtol=1e-14, atol=0)
