"""The attention layers of any Transformers model that goes through the attention interface.

No name of a model or class is looked at: a module belongs to the interface if its code asks for
``ALL_ATTENTION_FUNCTIONS``, and layers are what stands in a ``ModuleList``.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any, NamedTuple

from torch import nn

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
"""Through this table Transformers' attention modules find the function that computes their attention."""

_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_HEAD_DIM = ("qk_head_dim", "head_dim", "attention_head_size", "key_value_proj_dim")


class AttentionLayer(NamedTuple):
    """A self-attention module of a model.

    name: of the module, as ``model.named_modules()`` has it.
    module: the module.
    stack: name of the list of blocks that it belongs to, such as ``"model.layers"``.
    place: its number among the layers of the stack.
    """

    name: str
    module: nn.Module
    stack: str
    place: int

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return _size(self.module, _HEADS, "number of heads")

    @property
    def head_dim(self) -> int:
        """Width of a query."""
        return _size(self.module, _HEAD_DIM, "width of a head")

    @property
    def scaling(self) -> float:
        """The factor on q.k."""
        for name in ("scaling", "scale"):
            value = getattr(self.module, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return float(value)
        return self.head_dim**-0.5


def _size(module: nn.Module, names: tuple[str, ...], what: str) -> int:
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    if names is _HEAD_DIM:
        hidden_size = getattr(getattr(module, "config", None), "hidden_size", None)
        if isinstance(hidden_size, int):
            return hidden_size // _size(module, _HEADS, "number of heads")
    raise ValueError(f"the {what} of {type(module).__name__} is not known: none of {', '.join(names)} is an integer")


@cache
def uses_interface(module_class: Hashable) -> bool:
    """Whether a class looks up its attention function in Transformers' table."""
    for base in module_class.__mro__:  # type: ignore[attr-defined]
        if base is nn.Module:
            break
        for member in vars(base).values():
            code = getattr(unwrapped(member), "__code__", None)
            if code is not None and INTERFACE in code.co_names:
                return True
    return False


def unwrapped(member: Any) -> Any:
    """The function inside its decorators, or what is no function as it is."""
    while hasattr(member, "__wrapped__"):
        member = member.__wrapped__
    return member


def described(thing: Any) -> str:
    """What was given in place of a model, for an error: a name as it is, anything else by its class."""
    if isinstance(thing, type):
        return f"the class {thing.__name__}"
    return repr(thing) if isinstance(thing, str) or thing is None else f"a {type(thing).__name__}"


def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The self-attention layers of a model, in order, stack by stack.

    Of several attention modules in one block the first is self-attention, the others look at another sequence: so it
    is in the decoders of encoder-decoder models. Modules outside any list of blocks are left out.
    """
    modules = dict(model.named_modules())
    layers: list[AttentionLayer] = []
    counts: dict[str, int] = {}
    blocks = set()
    for name, module in modules.items():
        if not uses_interface(type(module)):  # type: ignore[arg-type]
            continue
        block = _block(name, modules)
        if block is None or block in blocks:
            continue
        blocks.add(block)
        stack = _stack(name)
        layers.append(AttentionLayer(name, module, stack, counts.get(stack, 0)))
        counts[stack] = counts.get(stack, 0) + 1
    return layers


def _block(name: str, modules: dict[str, nn.Module]) -> str | None:
    """The innermost list element around a module whose neighbours are of one class; else the outermost element."""
    parts = name.split(".")
    elements = [
        end
        for end in range(1, len(parts) + 1)
        if parts[end - 1].isdigit() and isinstance(modules.get(".".join(parts[: end - 1])), nn.ModuleList)
    ]
    for end in reversed(elements):
        siblings = modules[".".join(parts[: end - 1])]
        if len({type(sibling) for sibling in siblings.children()}) == 1:
            return ".".join(parts[:end])
    return ".".join(parts[: elements[0]]) if elements else None


def _stack(name: str) -> str:
    """The name of the outermost list around a module."""
    parts = name.split(".")
    return ".".join(parts[: next(i for i, part in enumerate(parts) if part.isdigit())])
