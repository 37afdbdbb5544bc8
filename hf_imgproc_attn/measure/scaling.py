"""Memory and communication of training over many devices, on paper: the tables of docs/scaling.md.

``python -m hf_imgproc_attn.measure.scaling`` prints them. Bytes are those of training in float32 with AdamW: 4 for a
weight, 4 for its gradient, 8 for the optimizer's two moments. Activations are left out, since they depend on how much
is computed again.
"""

from __future__ import annotations

import torch

from ..markdown_tables import table_text
from ..models.spec_fields import PRESETS as PRESET_FIELDS

PRESETS = ("softmax", "bilateral", "bilateral_gaussian", "twicing", "bilateral_twicing", "learned_twicing")
"""The presets of the tables; the others have the passes of one of these."""
DEVICES = (1, 8, 64, 1024)
LENGTHS = (1024, 131_072, 1_048_576)
STATE_BYTES = 16
"""Of a parameter: weight, gradient and two moments in float32."""
_WEIGHT = 4
_SHARING_HEADS = (2, 4, 12)
_SHARED_LENGTHS = ((8192, 8), (131_072, 64), (1_048_576, 64), (1_048_576, 1024))
"""Tokens of a sequence, and devices that share them."""


def ddp_state_bytes(parameters: int) -> int:
    """What each device holds of weights, gradients and optimizer where every device has a copy (DDP)."""
    return STATE_BYTES * parameters


def fsdp_state_bytes(parameters: int, devices: int) -> float:
    """The same, sharded over the devices (FSDP2, ZeRO-3); rounding up to whole rows is left out."""
    return STATE_BYTES * parameters / devices


def fsdp_unit_bytes(unit_parameters: int) -> int:
    """What FSDP2 holds whole beside its share while it computes a unit: weights and gradients of one block."""
    return 2 * _WEIGHT * unit_parameters


def ddp_sent_bytes(parameters: int, devices: int) -> float:
    """What each device sends in a step: one ring all-reduce of the gradients, 2 (W - 1) / W of their bytes."""
    return 2 * (devices - 1) / devices * _WEIGHT * parameters


def fsdp_sent_bytes(parameters: int, devices: int) -> float:
    """Likewise with FSDP2: weights gathered for forward and backward, gradients scattered, (W - 1) / W each."""
    return 3 * (devices - 1) / devices * _WEIGHT * parameters


def attention_products(length: int, width: int, passes: int, causal: bool = True) -> float:
    """Floating-point operations of one layer's attention forward, for one sequence.

    Each of ``passes`` multiplies A by rows of ``width`` = heads x head_dim numbers; the logits are computed once, as
    ``blocked`` does: 2 N^2 width for the logits and 2 N^2 width a pass, half of both where A is causal.
    """
    return (2 + 2 * passes) * length**2 * width / (2 if causal else 1)


def context_received_bytes(length: int, width: int, rows: int, devices: int, bytes_each: int = 2) -> float:
    """What each device receives in one layer forward where devices share the tokens (context parallelism), a sequence.

    (W - 1) / W of N tokens, of each of which ``rows`` of ``width`` numbers are gathered (:func:`gathered_rows`). The
    gradients that a device receives in the backward pass are as many.
    """
    return rows * (devices - 1) / devices * length * width * bytes_each


def heads_sent_bytes(tokens: int, width: int, devices: int, bytes_each: int = 2) -> float:
    """What each device sends in one layer forward and backward where devices share the heads (tensor parallelism).

    Four ring all-reduces of ``width`` numbers for each token: after attention and after the MLP, and backward.
    """
    return 4 * 2 * (devices - 1) / devices * tokens * width * bytes_each


def passes(preset: str) -> int:
    """How often A is applied."""
    return 2 if "twicing" in preset else 1


def gathered_rows(preset: str) -> int:
    """What processes that share tokens gather of each: key, value, a position's key, what further passes filter."""
    return 1 + passes(preset) + (PRESET_FIELDS[preset].get("position_kernel") == "untied")


def gpt2_parameters(preset: str) -> tuple[int, int]:
    """Parameters of GPT-2 small as a preset, and of one of its blocks; no weights are made."""
    from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel

    with torch.device("meta"):
        model = ImgProcGPT2LMHeadModel(ImgProcGPT2Config.from_preset(preset))
    block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
    return model.num_parameters(), block


def tables() -> str:
    """The tables of docs/scaling.md, as Markdown."""
    sizes = {preset: gpt2_parameters(preset) for preset in PRESETS}
    state = [["preset", "parameters", "DDP", *(f"FSDP2, {n:,}" for n in DEVICES[1:]), "one unit whole"]]
    for preset, (total, block) in sizes.items():
        sharded = [_size(fsdp_state_bytes(total, n)) for n in DEVICES[1:]]
        state.append(
            [f"`{preset}`", f"{total:,}", _size(ddp_state_bytes(total)), *sharded, _size(fsdp_unit_bytes(block))]
        )
    sent = [["preset", *(f"{kind}, {n:,}" for kind in ("DDP", "FSDP2") for n in DEVICES[1:])]]
    for preset, (total, _) in sizes.items():
        cells = [_size(function(total, n)) for function in (ddp_sent_bytes, fsdp_sent_bytes) for n in DEVICES[1:]]
        sent.append([f"`{preset}`", *cells])
    length = [
        ["tokens", *(f"TFLOP, {n} pass{'es' * (n > 1)}" for n in (1, 2, 3)), *(f"heads, {n}" for n in _SHARING_HEADS)]
    ]
    for tokens in LENGTHS:
        work = [f"{attention_products(tokens, 768, n) / 1e12:,.3g}" for n in (1, 2, 3)]
        length.append([f"{tokens:,}", *work, *(_size(heads_sent_bytes(tokens, 768, n)) for n in _SHARING_HEADS)])
    context = [["preset", "rows", *(f"{tokens:,} of {n:,}" for tokens, n in _SHARED_LENGTHS)]]
    for preset in PRESETS:
        rows = gathered_rows(preset)
        sizes_of = [_size(2 * context_received_bytes(tokens, 768, rows, n)) for tokens, n in _SHARED_LENGTHS]
        context.append([f"`{preset}`", str(rows), *sizes_of])
    return "\n\n".join(table_text(head, rows) for head, *rows in (state, sent, length, context)) + "\n"


def _size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"


if __name__ == "__main__":
    print(tables(), end="")
