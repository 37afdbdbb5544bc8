"""Softmax with a sink from one fused call without the sink: no wider queries and keys, no key more.

With o and L the output of plain attention and its row log-sum-exp, b the logit of the sink and w = sigmoid(L - b),

    out = w o,     d out: g -> w g in the backward of plain attention, D_i = out_i . g_i,     db = -sum_i (1 - w_i) D_i

What flows into L changes only the number D_i that plain attention's backward subtracts, from o . (w g) to out . g; it
computes that number from the output that it is handed, which therefore is ``out`` here (FlashAttention-2, Dao 2023,
equation 4). The fused call of CPUs is torch's own; elsewhere, and where a graph is traced or transformed,
``backend_sdpa`` takes one more key.
"""

from __future__ import annotations

from typing import Any

import torch

from .backend_call import is_transformed
from .kernel_content import working_dtype


def has_fused_sinks(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether the fused call can serve.

    Args:
        tensors: query, key, value, ``[batch, heads, length, d]``, and the sinks.
    """
    query, _, value, _ = tensors
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if any(tensor.stride(-1) != 1 for tensor in tensors[:3]) or query.dtype == torch.float16:
        return False
    if query.shape[-1] != value.shape[-1] or not query.numel() or not value.numel():
        return False
    return not is_transformed(tensors)


class SinkAttention(torch.autograd.Function):
    """``apply(query, key, value, sinks, is_causal, scale)`` -> ``[batch, heads, length, d]``.

    query: ``[batch, heads, length, d]``.
    key: ``[batch, heads, key_length, d]``.
    value: the same.
    sinks: ``[heads]``.
    is_causal: whether query i sees no key after key i.
    scale: of products, > 0 where causal.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        is_causal: bool,
        scale: float,
    ) -> torch.Tensor:
        attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        plain, log_sum = attend(query, key, value, 0.0, is_causal, scale=scale)
        output = (plain * _kept(log_sum, sinks)).to(value.dtype)
        ctx.options = is_causal, scale
        ctx.save_for_backward(query, key, value, sinks, output, log_sum)
        return output

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, sinks, output, log_sum = ctx.saved_tensors
        is_causal, scale = ctx.options
        if torch.is_grad_enabled():  # create_graph=True: the gradients are to be differentiated themselves
            query, key, value, sinks = own = tuple(x.view_as(x) for x in (query, key, value, sinks))
            needed = [x for x, needs in zip(own, ctx.needs_input_grad, strict=False) if needs]
            found = iter(
                torch.autograd.grad(
                    _dense(query, key, value, sinks, is_causal, scale), needed, grad, create_graph=True
                )
            )
            return (*(next(found) if needs else None for needs in ctx.needs_input_grad[:4]), None, None)
        kept = _kept(log_sum, sinks)
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        through = (grad * kept).to(grad.dtype)
        gradients = backward(through, query, key, value, output, log_sum, 0.0, is_causal, scale=scale)
        d_sinks = None
        if ctx.needs_input_grad[3]:
            row_term = (grad.to(kept.dtype) * output).sum(-1, keepdim=True)
            d_sinks = -((1.0 - kept) * row_term).sum((0, 2, 3)).to(sinks.dtype)
        return (*gradients, d_sinks, None, None)


def _kept(log_sum: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """w, ``[batch, heads, length, 1]``, in the precision of the log-sum-exp."""
    return torch.sigmoid(log_sum - sinks.to(log_sum.dtype).view(-1, 1)).unsqueeze(-1)


def _dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor, is_causal: bool, scale: float
) -> torch.Tensor:
    """The same as one softmax with one more key."""
    dtype = working_dtype(query.dtype)
    logits = torch.matmul(query.to(dtype), key.to(dtype).mT) * scale
    if is_causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
        logits = logits.masked_fill(future, float("-inf"))
    column = sinks.to(dtype).view(-1, 1, 1).expand(*logits.shape[:-1], 1)
    weights = torch.cat((logits, column), dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights, value.to(dtype)).to(value.dtype)
