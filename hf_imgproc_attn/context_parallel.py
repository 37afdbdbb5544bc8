"""Long texts over several processes: each has some tokens of every text (context parallelism), exactly.

    torch.distributed.init_process_group("gloo")          # as torchrun starts it; "nccl" on GPUs
    with context_parallel(model):
        for batch in batches:                             # the same batch in every process
            part = share_tokens(batch)                    # the tokens of this process
            loss = model(**part).loss                     # its part of the whole batch's mean
            loss.backward()
            add_gradients(model)                          # those of the whole batch, in every process
            optimizer.step()
            optimizer.zero_grad()

How it computes: :mod:`hf_imgproc_attn.shared_context`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .models.any_filter import is_filtered
from .models.any_layers import attention_layers
from .models.layer_filter import AttentionFilter
from .shared_context import SharedContext

IGNORED_LABEL = -100


@contextmanager
def context_parallel(model: nn.Module, group: Any = None) -> Iterator[None]:
    """In this block the model is called with some tokens of every text, and computes what it does with all of them.

    Process r of R in the group gives the tokens from r N / R to (r + 1) N / R, as :func:`share_tokens` cuts them, and
    gets their outputs. ``attention_mask`` ``[batch, N / R]`` tells which of them are padding. All processes have to
    run forward and backward, with or without gradient checkpointing.

    Args:
        model: a GPT-2 or BERT of this package, or a model for texts with a filter in every self-attention layer.
        group: the processes that share the tokens; None: all.

    Raises:
        ValueError: for another model, or a filter that looks at more than keys, values and places. A call in the block
            raises it for caches, positions of its own, dropout on attention weights, or parts of different length.
    """
    filters = filters_that_share(model)
    causal = any(bool(getattr(layer.module, "is_causal", False)) for layer in attention_layers(model))
    causal = causal or bool(getattr(model.config, "hides_later_tokens", False))
    context = SharedContext(group, causal)
    names = inspect.signature(model.forward).parameters

    def prepare(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return (), _prepared(context, given, "use_cache" in names)

    stock = [module for module in model.modules() if getattr(module, "is_stock", False)]
    hook = model.register_forward_pre_hook(prepare, with_kwargs=True)
    try:
        for module in stock:  # stock attention would see the tokens of one process
            module.is_stock = False  # type: ignore[assignment]
        for layer in filters:
            layer.context = context
        yield
    finally:
        hook.remove()
        for module in stock:
            module.is_stock = True  # type: ignore[assignment]
        for layer in filters:
            layer.context = None


def share_tokens(batch: Mapping[str, torch.Tensor], group: Any = None, *, next_token: bool = True) -> dict[str, Any]:
    """The tokens of this process.

    Args:
        batch: what the model would be called with, the same in every process: tensors ``[batch, N]``. ``labels`` are
            the words themselves, or -100 where none counts.
        group: as for :func:`context_parallel`.
        next_token: whether each token predicts the next one, in causal language models, or itself.

    Returns:
        Tensors ``[batch, N / R]``. With labels also ``num_items_in_batch``, how many of the whole batch count, so that
        the sum of the processes' losses is the loss of the whole batch; and ``shift_labels``, the next word of each,
        where that is predicted.

    Raises:
        ValueError: for tensors of another shape, or a length that is no multiple of the number of processes.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
    if any(len(shape) != 2 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        raise ValueError(f"batch must hold tensors of one shape [batch, length], got {shapes}")
    whole = dict(batch)
    if "labels" in whole and next_token:
        whole["shift_labels"] = nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)
    part: dict[str, Any] = {}
    for name, tensor in whole.items():
        if tensor.shape[1] % size:
            raise ValueError(
                f"the length must be a multiple of the {size} processes that share it, got {tensor.shape[1]} tokens: "
                "pad them on the right, with -100 as labels"
            )
        part[name] = tensor.chunk(size, dim=1)[rank].contiguous()
    if "labels" in whole:
        counted = whole.get("shift_labels", whole["labels"]) != IGNORED_LABEL
        part["num_items_in_batch"] = counted.sum().clamp(min=1)
    return part


def add_gradients(model: nn.Module, group: Any = None) -> None:
    """Sum the gradients of the processes' parts, so that all have those of the whole batch.

    DDP and FSDP2 over the same processes average instead: multiply the loss by their number, and leave this out.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = grad.contiguous()
            dist.all_reduce(parameter.grad, group=group)


def filters_that_share(model: nn.Module) -> list[AttentionFilter]:
    """The filters of a model whose every self-attention layer has one.

    Raises:
        ValueError: naming what cannot share its tokens.
    """
    filters = [module for module in model.modules() if isinstance(module, AttentionFilter)]
    layers = attention_layers(model)
    if not filters or (is_filtered(model) and len(filters) != len(layers)):
        lacking = [
            layer.name for layer in layers if not any(isinstance(m, AttentionFilter) for m in layer.module.modules())
        ]
        raise ValueError(
            f"context_parallel needs a filter in every self-attention layer of {type(model).__name__}, since stock "
            f"attention sees the tokens of one process only; without one: {', '.join(lacking) or 'all'}"
        )
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        raise ValueError(f"context_parallel shares the tokens of texts, {type(model).__name__} has none")
    for layer in filters:
        spec = layer.spec
        for field, refused in _REFUSED.items():
            if getattr(spec, field) in refused:
                raise ValueError(
                    f"context_parallel cannot serve {field}={getattr(spec, field)!r} of layer {layer.layer_idx}: "
                    f"{refused[getattr(spec, field)]}"
                )
    return filters


_REFUSED = {
    "position_kernel": {"forget": "its gates are summed over the tokens before"},
    "normalisation": {"sinkhorn": "it needs every row of A"},
    "boosting": {"delta": "it corrects each token by those before it, one after another"},
}
"""Field -> values that look at more than keys, values and places, with the reason."""


def _prepared(context: SharedContext, given: dict[str, Any], has_cache: bool) -> dict[str, Any]:
    """The arguments of a call, with the places of its tokens among those of all processes.

    Raises:
        ValueError: for arguments that mean something else where tokens are shared.
    """
    for name in ("past_key_values", "position_ids"):
        if given.get(name) is not None:
            raise ValueError(f"{name} must be None inside context_parallel, which knows the places of the tokens")
    if given.get("use_cache"):
        raise ValueError("use_cache must be False inside context_parallel, got True: there is nothing to decode")
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError("give exactly one of input_ids and inputs_embeds, got neither")
    batch, length = tokens.shape[:2]
    sizes = torch.empty(context.size, 2, dtype=torch.long, device=tokens.device)
    own = torch.tensor([batch, length], device=tokens.device)
    dist.all_gather(list(sizes.unbind(0)), own, group=context.group)
    if (sizes != own).any():
        raise ValueError(f"each process must give [batch, length] tokens of one shape, got {sizes.tolist()}")
    context.length, context.keys = length, None
    mask = given.pop("attention_mask", None)
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"attention_mask must have shape {(batch, length)}, got {tuple(mask.shape)}")
    # Every process takes part, so that one without padding does not leave the others waiting.
    seen = torch.ones(batch, length, device=tokens.device) if mask is None else (mask != 0).float()
    parts = torch.empty(context.size, batch, length, device=tokens.device)
    dist.all_gather(list(parts.unbind(0)), seen.contiguous(), group=context.group)
    keys = parts.movedim(0, 1).flatten(1) != 0
    if not bool(keys.all()):
        context.keys = keys[:, None, None, :]
    given["position_ids"] = torch.arange(context.start, context.start + length, device=tokens.device)[None]
    if has_cache:
        given["use_cache"] = False
    return given
