"""Look into a model while it runs: the filter of each layer, and the tokens around it. The model is left as it was.

Three kinds of layers are seen at one place each, the call that a back-end would receive:

- stock attention, through a configuration of its own that names the lens as its attention implementation, as
  ``apply_filter`` does; the lens calls the function that the layer would have called;
- layers with a filter of ``apply_filter``;
- layers of this package's backbones.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.any_attention import PART
from ..models.any_layers import AttentionLayer
from ..models.backend_call import Content, FilterCall
from ..models.kernel_given import BiasPositions
from ..models.layer_filter import AttentionFilter
from ..models.visibility import Visibility, attention_visibility, padding_visibility

IMPLEMENTATION = "imgproc_lens"
_SEAT = "_imgproc_lens_seat"

SeeFilter = Callable[[int, FilterCall, torch.Tensor], None]
"""Is given a layer's index, its call, and what the model made of the values, ``[batch, heads, length, d]``."""


class BlockTokens(NamedTuple):
    """The tokens of one block, each ``[batch, length, hidden_size]``.

    entering: what the block is given.
    after_residual: what its second half reads: the entering tokens and the attention's output together.
    leaving: what the block returns.
    """

    entering: torch.Tensor
    after_residual: torch.Tensor
    leaving: torch.Tensor


SeeBlock = Callable[[int, BlockTokens], None]
"""Is given a layer's index, and the tokens of its block, once it has run."""


class NotUnderstoodError(ValueError):
    """A layer whose logits have a term that the lens does not know."""


@contextmanager
def observed(
    model: nn.Module, layers: list[AttentionLayer], see_filter: SeeFilter | None, see_block: SeeBlock | None = None
) -> Iterator[None]:
    """While the block runs, show what each layer's filter is called with, and the tokens around it.

    The model is in evaluation mode meanwhile. Afterwards, also after an error, it is what it was: configurations,
    hooks, modes and attributes.

    Args:
        model: the model.
        layers: its layers that are looked at.
        see_filter: is called for each of them; None: for none.
        see_block: is called for each whose block can be followed; None: for none.
    """
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        stack.enter_context(in_evaluation(model))
        for index, layer in enumerate(layers):
            if see_filter is not None:
                _watch_filter(stack, index, layer, see_filter)
            block = modules.get(block_name(layer, modules)) if see_block is not None else None
            if block is not None and see_block is not None:
                _watch_block(stack, index, block, layer.module, see_block)
        yield


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """While the block runs, the model is in evaluation mode; afterwards each module is in its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# --------------------------------------------------------------------------------------------------------------------
# Filters
# --------------------------------------------------------------------------------------------------------------------


def own_filter(module: nn.Module) -> AttentionFilter | None:
    """The filter of an attention module, of this package's backbones or of ``apply_filter``; None for stock ones."""
    part = getattr(module, PART, None)
    part = getattr(part, "original_module", part)
    found = getattr(module if part is None else part, "filter", None)
    return found if isinstance(found, AttentionFilter) and (part is not None or not found.is_stock) else None


def _watch_filter(stack: ExitStack, index: int, layer: AttentionLayer, see: SeeFilter) -> None:
    part = getattr(layer.module, PART, None)
    part = getattr(part, "original_module", part)
    kernel = own_filter(layer.module)
    if kernel is None:
        _watch_stock(stack, index, layer, see)
        return
    seen: dict[str, Any] = {}

    # Layers of our models add to what ``call`` returns; those of ``apply_filter`` use it directly.
    maker = "compose" if part is None else "call"

    def remember(*args: Any, **kwargs: Any) -> FilterCall:
        call: FilterCall = getattr(type(kernel), maker)(kernel, *args, **kwargs)
        seen.setdefault("call", call)
        return call

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.clear()
        seen["scaling"] = kwargs.get("scaling")

    def end(module: nn.Module, args: Any, output: Any) -> None:
        call = seen.pop("call", None)
        if call is None:
            return
        if part is not None and not (part.scales_by_itself or part.filter.has_metric) and seen["scaling"] is not None:
            # As the filtered layer does once the call is made.
            call = call._replace(content=call.content._replace(scale=float(seen["scaling"])))
        if not rounds:  # later rounds of gradient boosting come through the same module
            rounds.append(index)
            see(index, call, output[0])

    rounds: list[int] = []
    stack.callback(layer.module.register_forward_pre_hook(lambda module, args: rounds.clear()).remove)
    runner = kernel if part is None else part
    kernel.__dict__[maker] = remember
    stack.callback(lambda: kernel.__dict__.pop(maker, None))
    stack.callback(runner.register_forward_pre_hook(begin, with_kwargs=True).remove)
    stack.callback(runner.register_forward_hook(end).remove)


class _Seat(NamedTuple):
    """What a stock layer under the lens has: where to tell, and what it would have called."""

    see: Callable[[FilterCall, torch.Tensor], None]
    implementation: str | None
    name: str


def _watch_stock(stack: ExitStack, index: int, layer: AttentionLayer, see: SeeFilter) -> None:
    module = layer.module
    config = module.config
    own = copy.copy(config)
    own._attn_implementation_internal = IMPLEMENTATION  # type: ignore[union-attr]

    def restore() -> None:
        module.config = config
        module.__dict__.pop(_SEAT, None)

    stack.callback(restore)
    implementation = getattr(config, "_attn_implementation", None)
    module.__dict__[_SEAT] = _Seat(lambda call, output: see(index, call, output), implementation, layer.name)
    module.config = own


def lens_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What Transformers calls in a stock layer under the lens: the layer's own function, and a look at its call."""
    seat: _Seat = module.__dict__[_SEAT]
    attend = _function_of(module, seat.implementation)
    output, weights = attend(module, query, key, value, attention_mask, **kwargs)
    call = stock_call(module, (query, key, value), attention_mask, seat.name, kwargs)
    seat.see(call, output.transpose(1, 2))
    return output, weights


def _function_of(module: nn.Module, implementation: str | None) -> Callable[..., Any]:
    if implementation not in (None, "eager"):
        return ALL_ATTENTION_FUNCTIONS[implementation]
    for base in type(module).__mro__:
        function = getattr(sys.modules.get(base.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise NotUnderstoodError(f"the eager attention function of {type(module).__name__} is not found")


def stock_call(
    module: nn.Module,
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    name: str,
    options: dict[str, Any],
) -> FilterCall:
    """The call of a stock layer, from what Transformers hands to its attention function.

    Args:
        module: the attention module.
        projected: query, key and value, ``[batch, heads, length, d]``.
        mask: boolean or additive with four axes, ``[batch, length]``, or None.
        name: of the layer, for messages.
        options: the keywords of the attention function.

    Raises:
        NotUnderstoodError: for terms of the logits that no filter here has, or a call that is no self-attention.
    """
    query, key, value = projected
    if options.get("cache") is not None:
        raise NotUnderstoodError(f"{name} keeps its cache in pages")
    length, key_length = query.shape[-2], key.shape[-2]
    if length != key_length:
        raise NotUnderstoodError(
            f"{name} has {key_length} keys for {length} queries, which is no filter of its tokens"
        )
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if mask is None:
        visibility = Visibility(length, key_length, causal and length > 1)
    elif mask.ndim == 2:
        visibility = padding_visibility((mask[:, None, None, :] != 0), length, causal)
    else:
        shape = (query.shape[0], query.shape[1], length, key_length)
        visibility = attention_visibility(mask[..., :key_length], shape=shape)
    bias = options.get("position_bias")
    positions = () if bias is None else (BiasPositions(bias[..., :key_length]),)
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    content = Content("dot_product", scaling, options.get("softcap"))
    return FilterCall(query, key, value, content, visibility, positions, sinks=options.get("s_aux"))


AttentionInterface.register(IMPLEMENTATION, lens_attention)


# --------------------------------------------------------------------------------------------------------------------
# Blocks
# --------------------------------------------------------------------------------------------------------------------


def block_name(layer: AttentionLayer, modules: dict[str, nn.Module]) -> str:
    """The name of the list element that holds an attention module, the innermost one among neighbours of one class."""
    parts = layer.name.split(".")
    found = ""
    for end in range(1, len(parts)):
        parent = modules.get(".".join(parts[:end]))
        if isinstance(parent, nn.ModuleList) and parts[end].isdigit():
            alike = len({type(sibling) for sibling in parent.children()}) == 1
            if alike or not found:
                found = ".".join(parts[: end + 1])
    return found


def first_tensor(values: Any, named: dict[str, Any] | None = None) -> torch.Tensor | None:
    """The first tensor among what a module was given or has returned."""
    given = values if isinstance(values, (tuple, list)) else (values,)
    for value in (*given, *((named or {}).get(name) for name in ("hidden_states", "x"))):
        if isinstance(value, torch.Tensor):
            return value
    return None


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return False
    return one is other or (one.numel() == other.numel() and one.data_ptr() == other.data_ptr())


class _Step(NamedTuple):
    """One part of a block that has run: its name, what it was given and returned, whether the attention is in it."""

    name: str
    given: torch.Tensor | None
    returned: torch.Tensor | None
    attends: bool


def _watch_block(stack: ExitStack, index: int, block: nn.Module, attention: nn.Module, see: SeeBlock) -> None:
    steps: list[_Step] = []
    entering: list[torch.Tensor | None] = []

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        steps.clear()
        entering[:] = [first_tensor(args, kwargs)]

    def step_of(name: str, attends: bool) -> Callable[..., None]:
        def after(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            # Of parts within parts the outermost counts that is called as a whole.
            steps[:] = [step for step in steps if not step.name.startswith(f"{name}.")]
            steps.append(_Step(name, first_tensor(args, kwargs), first_tensor(output), attends))

        return after

    def end(module: nn.Module, args: Any, output: Any) -> None:
        given, leaving = entering[0], first_tensor(output)
        middle = None if given is None else _after_residual(given, _as_one(steps, holder))
        steps.clear()
        entering.clear()
        if given is not None and middle is not None and leaving is not None and given.shape == leaving.shape:
            see(index, BlockTokens(given, middle, leaving))

    stack.callback(block.register_forward_pre_hook(begin, with_kwargs=True).remove)
    lists = (nn.ModuleList, nn.ModuleDict)
    holder = next(
        name
        for name, part in block.named_modules()
        if part is not block and not isinstance(part, lists) and any(module is attention for module in part.modules())
    )
    inside = {module for module in attention.modules() if module is not attention}
    for name, part in block.named_modules():
        if part is not block and part not in inside:
            hook = step_of(name, any(module is attention for module in part.modules()))
            stack.callback(part.register_forward_hook(hook, with_kwargs=True).remove)
    stack.callback(block.register_forward_hook(end).remove)


def _as_one(steps: list[_Step], holder: str) -> list[_Step]:
    """The steps, with those of the part that holds the attention as one, also where they are called one by one."""
    mine = [step for step in steps if f"{step.name}.".startswith(f"{holder}.")]
    if not mine:
        return steps
    start = next(i for i, step in enumerate(steps) if step is mine[0])
    rest = [step for step in steps[start:] if not f"{step.name}.".startswith(f"{holder}.")]
    return [*steps[:start], _Step(holder, mine[0].given, mine[-1].returned, attends=True), *rest]


def _after_residual(entering: torch.Tensor, steps: list[_Step]) -> torch.Tensor | None:
    """The tokens after the attention's residual connection, from the order in which a block's parts ran.

    What follows the attention directly (a scale, a norm of its output, dropout) is followed. The first part that reads
    something new reads the sum. If none does, the attention's part adds its own residual (BERT, T5), or the MLP reads
    the entering tokens as the attention does (parallel blocks), whose sum is formed here.
    """
    place = next((i for i, step in enumerate(steps) if step.attends), None)
    if place is None:
        return None
    attended = current = steps[place].returned
    earlier = [entering, *(step.returned for step in steps[:place])]
    for step in steps[place + 1 :]:
        if _same(step.given, current):
            current = step.returned
        elif any(_same(step.given, tensor) for tensor in earlier):
            current = _shaped(current, entering)
            return None if current is None else entering + current
        elif (found := _shaped(step.given, entering)) is not None:
            return found
    return _shaped(attended, entering)


def _shaped(tokens: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Tokens in the shape of others, which some blocks flatten; None if they are something else."""
    if tokens is None or tokens.numel() != like.numel() or tokens.shape[-1] != like.shape[-1]:
        return None
    return tokens.view_as(like)
