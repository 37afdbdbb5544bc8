"""Twicing as two calls of PyTorch's own attention, by a flash implementation that the user has activated.

At width 128 and great lengths a hand-written flash kernel may do two passes sooner than the kernels of this package do
one. PyTorch has a switch for the whole process, ``torch.nn.attention.activate_flash_attention_impl``; forward and
backward must run under the same one, so that nothing here turns it: a user does, with :func:`activate`. The choice
looks only whether it is on, and whether the table of :mod:`.measured` says that this is fastest on the device.
"""

from __future__ import annotations

import importlib.util

import torch
from torch.nn import attention

from ..models.backend_call import FilterCall
from ..models.backend_sdpa import refuses as sdpa_refuses
from .measured import measured_order

PACKAGES = {"FA3": "flash_attn_interface", "FA4": "flash_attn.cute"}
"""PyTorch's name of an implementation -> what has to be installed for it."""


def algorithm(implementation: str) -> str:
    """What the table of measured algorithms calls two calls of an implementation."""
    return f"two_calls {implementation}"


def installed() -> tuple[str, ...]:
    """The implementations that PyTorch knows and whose package is there."""
    known: list[str] = getattr(attention, "list_flash_attention_impls", list)()
    return tuple(name for name in known if name in PACKAGES and _is_there(PACKAGES[name]))


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def active() -> str | None:
    """The implementation that is activated in this process, or None for PyTorch's default."""
    name: str | None = getattr(attention, "current_flash_attention_impl", lambda: None)()
    return name


def activate(implementation: str) -> None:
    """Let PyTorch's attention run by an implementation from now on, in the whole process.

    Raises:
        ValueError: if it is not installed, or this version of PyTorch has no such switch.
    """
    there = installed()
    if implementation not in there:
        raise ValueError(
            f"flash implementation must be installed, one of {', '.join(there) or 'none'}, got {implementation!r}"
        )
    attention.activate_flash_attention_impl(implementation)


def wins(call: FilterCall) -> bool:
    """Whether two calls of the activated implementation were measured to be the fastest for a call's shape."""
    implementation = active()
    is_plain = call.own_softmax is None and not call.has_columns and call.query.is_cuda and call.visibility.is_square
    if implementation is None or not is_plain or (call.booster.name, call.booster.steps) != ("twicing", 2):
        return False
    order = measured_order(
        torch.cuda.get_device_properties(call.query.device).name,
        call.query.shape,
        is_causal=call.visibility.hides_later_keys,
        backward=torch.is_grad_enabled() and call.query.requires_grad,
    )
    return order[:1] == (algorithm(implementation),) and sdpa_refuses(call) is None
