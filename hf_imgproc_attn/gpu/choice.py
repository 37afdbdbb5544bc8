"""Which of the fused kernels' algorithms serves a call, and how many programs it starts."""

from __future__ import annotations

from typing import Any

import torch
import triton

from . import triton_general, triton_short, triton_single_pass, triton_wavefront
from .checks import ALGORITHMS
from .measured import measured_order

FORWARD_PRODUCTS = {"single_pass": 3, "general": 4}
"""N x N products where one is computed after another; plain attention has 2."""
BACKWARD_PRODUCTS = {"single_pass": 7, "general": 8}
DETERMINISTIC_PRODUCTS = {"single_pass": 7, "general": 11}
CAUSAL_ONLY = ("single_pass", "wavefront")


def choose(
    query: torch.Tensor,
    is_causal: bool,
    algorithm: str = "auto",
    boosted: bool = True,
    backward: bool = False,
    deterministic: bool = False,
) -> str:
    """The algorithm for a call: what is asked for, else what was measured, else the one with the lowest floor.

    All leave the same W and log-sum-exp, so forward and backward may differ. By the floor, ``single_pass`` has one
    program a head, and each round of heads costs a device as much as a full one: it is chosen where that is still
    less than ``general`` (*choice*, by the number of products; not measured). ``wavefront``, whose programs wait for
    one another, is chosen only where a table of :mod:`.measured` says that it is the fastest on this very device.

    Args:
        query: ``[batch, heads, length, head_dim]``.
        is_causal: whether the filter is causal.
        algorithm: one of :data:`.checks.ALGORITHMS`.
        boosted: whether A is applied twice; once, ``general`` has no product too many.
        backward: whether it is for the gradients.
        deterministic: whether dQ must not depend on the order of additions; then ``wavefront`` leaves its gradient to
            ``single_pass``.

    Raises:
        ValueError: if the shape does not allow what is asked for.
    """
    _check(query, is_causal, algorithm, boosted)
    if not boosted:
        return "general"
    if algorithm != "auto":
        return "single_pass" if algorithm == "wavefront" and backward and deterministic else algorithm
    device = torch.cuda.get_device_properties(query.device) if query.is_cuda else None
    if device is not None:
        for name in measured_order(device.name, query.shape, is_causal=is_causal, backward=backward):
            is_unfit = name == "wavefront" and backward and deterministic
            if name in ALGORITHMS and _allows(query, is_causal, name) and not is_unfit:
                return name
    # Compiled for other generations, the kernels of 256 rows need more registers or shared memory than there are.
    roomy = device is None or device.major in (9, 10)
    if _allows(query, is_causal, "short") and (roomy or query.shape[2] <= triton_short.MAX_LENGTH // 2):
        return "short"
    if not is_causal or device is None or query.shape[3] > triton_single_pass.MAX_HEAD_DIM:
        return "general"
    products = FORWARD_PRODUCTS
    if backward:
        products = DETERMINISTIC_PRODUCTS if deterministic else BACKWARD_PRODUCTS
    items, at_once = query.shape[0] * query.shape[1], device.multi_processor_count
    rounds = -(-items // at_once)
    filled = products["single_pass"] * rounds * at_once < products["general"] * items
    return "single_pass" if filled else "general"


def _allows(query: torch.Tensor, is_causal: bool, algorithm: str) -> bool:
    """Whether an algorithm can do twicing of a shape."""
    if algorithm == "short":
        fits = query.shape[2] <= triton_short.MAX_LENGTH and query.shape[3] <= triton_short.MAX_HEAD_DIM
        return fits and not is_causal
    return is_causal or algorithm not in CAUSAL_ONLY


def _check(query: torch.Tensor, is_causal: bool, algorithm: str, boosted: bool) -> None:
    """Refuse an algorithm that does not do what is asked of it."""
    if not boosted and algorithm not in ("auto", "general"):
        raise ValueError(f"algorithm={algorithm!r} needs boosting='twicing', got boosting='none'")
    if algorithm == "auto" or _allows(query, is_causal, algorithm):
        return
    if algorithm in CAUSAL_ONLY:
        raise ValueError(f"algorithm={algorithm!r} needs is_causal=True, got is_causal=False")
    raise ValueError(
        f"algorithm='short' needs is_causal=False, length <= {triton_short.MAX_LENGTH} and head_dim <= "
        f"{triton_short.MAX_HEAD_DIM}, got is_causal={is_causal}, length={query.shape[2]}, head_dim={query.shape[3]}"
    )


def short_block(query: torch.Tensor) -> int:
    """All rows of a head, in one block or two halves of it."""
    return max(32, triton.next_power_of_2(query.shape[2]))


def heads_grid(query: torch.Tensor) -> tuple[int]:
    """One program a head."""
    return (query.shape[0] * query.shape[1],)


def programs_grid(query: torch.Tensor, block: str) -> Any:
    """One program a block of rows and head; one dimension, because the others end at 65535."""
    batch, heads, length, _ = query.shape
    return lambda meta: (triton.cdiv(length, meta[block]) * batch * heads,)


def slots_of(chosen: str, query: torch.Tensor) -> int:
    """Most blocks of keys that a head is cut into by an algorithm's gradient, each with sums of its own."""
    if chosen == "short":
        return 1
    kernel, block = {
        "single_pass": (triton_single_pass.single_pass_backward_kernel, "BLOCK"),
        "wavefront": (triton_wavefront.wavefront_backward_kernel, "BLOCK"),
        "general": (triton_general.key_value_gradient_kernel, "BLOCK_N"),
    }[chosen]
    smallest: int = min(config.kwargs[block] for config in kernel.configs)
    return -(-query.shape[2] // smallest)
