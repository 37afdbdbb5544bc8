"""Heads that several processes share (tensor parallelism): which are here, and how Transformers' plan cuts a GPT-2.

Each process has some heads of every layer: their queries, keys, values and rows of A. A filter needs nothing from the
others. What it learns for each head is small and stays whole in every process: a process reads its own heads' numbers,
and their gradients are summed over the processes, so that all hold the same parameters after every step.

Linear layers are cut by the styles that Transformers has for them. Those here are for GPT-2's ``Conv1D``, whose weight
``[in, out]`` is transposed and holds queries, keys and values side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import distributed, nn

from .spec_axes import CONV_IN, CONV_OUT, CONV_QKV, HEADS

try:
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard  # no public name; Transformers takes it too
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
except ImportError:  # torch without distributed computing
    TensorParallelLayer = object


class HeadShare(NamedTuple):
    """Which part of the heads is in this process.

    group: of the processes that share the heads.
    rank: of this process in it.
    size: how many they are.
    """

    group: Any
    rank: int
    size: int

    def mine(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """The part of this process of something that all processes have whole, with one entry a head along ``dim``.

        The gradient is that of all heads, the same in every process.
        """
        return self.whole(x).chunk(self.size, dim)[self.rank]

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        """The same for something that all heads read."""
        same: torch.Tensor = _SummedGradient.apply(x, self.group)
        return same

    def part(self, values: list[float]) -> list[float]:
        """The same of numbers, one a head."""
        count = len(values) // self.size
        return values[self.rank * count : (self.rank + 1) * count]


class _SummedGradient(torch.autograd.Function):
    """The identity, whose gradient is summed over a group of processes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.contiguous().clone()
        distributed.all_reduce(grad, group=ctx.group)
        return grad, None


def share_of(mesh: Any) -> HeadShare:
    """The share of this process in the heads of a model that is cut over a mesh of devices.

    Raises:
        ValueError: for a mesh of several axes, none of which is called ``tp``.
    """
    names = mesh.mesh_dim_names or ()
    if mesh.ndim > 1 and "tp" not in names:
        raise ValueError(f"heads are shared over the mesh's axis 'tp', got axes {names}")
    group = mesh.get_group("tp" if mesh.ndim > 1 else 0)
    return HeadShare(group, distributed.get_rank(group), distributed.get_world_size(group))


def share_of_module(module: nn.Module) -> HeadShare | None:
    """The share of this process in the heads of an attention module whose weights are cut, or None if none is."""
    for parameter in module.parameters():
        shared: Any = parameter
        if hasattr(shared, "device_mesh") and any(place.is_shard() for place in shared.placements):
            return share_of(shared.device_mesh)
    return None


def share_heads(layer: Any, share: HeadShare) -> None:
    """Make a filter one of the heads that are in this process.

    Args:
        layer: an ``AttentionFilter``, of all heads.
        share: which heads are here.

    Raises:
        ValueError: for a number of heads that the processes cannot share, or a filter with projections of its own
            that are not cut.
    """
    if layer.num_heads % share.size:
        raise ValueError(f"{layer.num_heads} heads cannot be shared by {share.size} processes: choose a divisor")
    for name, field in _WHOLE.items():
        module = getattr(layer, name)
        if module is not None and any(True for _ in module.parameters()):
            raise ValueError(
                f"tensor parallelism knows no plan for {field} of layer {layer.layer_idx} ({layer.kind}): use FSDP2, "
                "or a variant without it"
            )
    layer.heads = layer.scalar_bias.heads = share
    layer.num_heads //= share.size
    layer.positions.bandwidths = share.part(layer.positions.bandwidths)
    layer.positions.slopes = share.part(layer.positions.slopes)
    layer._content_bandwidths = share.part(layer._content_bandwidths)


_WHOLE = {
    "forget_gates": "position_kernel 'forget'",
    "second_map": "boosting 'differential'",
    "token_rates": "boosting 'delta'",
    "gate": "the gate",
    "gradient_boosting": "boosting 'gradient_boosted'",
    "weight_booster": "the projection of its boosting",
}
"""Parts of a filter that project the layer's input, with the field that asks for them."""


class _Heads(TensorParallelLayer):
    """Of an attention module of this package: its filter and its own sizes are those of the heads that are here."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        share = share_of(mesh)
        share_heads(module.filter, share)
        for name in ("num_heads", "num_attention_heads", "split_size", "all_head_size"):
            if hasattr(module, name):
                setattr(module, name, getattr(module, name) // share.size)
        return module


class _Conv1D(TensorParallelLayer):
    """Some outputs of a ``Conv1D``, or some of its inputs, in each process.

    Args:
        axis: of the weight ``[in, out]`` that is cut.
        parts: how many tensors stand side by side along the outputs; each is cut.
    """

    def __init__(self, axis: int, parts: int = 1) -> None:
        self.axis, self.parts = axis, parts

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        if self.parts > 1 and torch.__version__ < "2.13":
            raise ValueError(
                "tensor parallelism of GPT-2 cuts queries, keys and values that stand side by side, which needs torch "
                f"2.13 or newer to put them together again, got {torch.__version__}"
            )
        whole = module._parameters[param]
        if whole is None:
            return
        if self.axis == 0:  # inputs are cut: the bias is added once, after the sum
            placement: Any = Replicate() if param == "bias" else Shard(0)
        else:
            axis = whole.ndim - 1
            placement = Shard(axis) if self.parts == 1 else _StridedShard(axis, split_factor=self.parts)
        shared = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(shared, requires_grad=whole.requires_grad)

    def transform_inputs_pre_forward(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> tuple[Any, Any]:
        rows = args[0]
        if self.axis == 1:  # every process has a part of the gradient of what they all read
            rows = DTensor.from_local(rows, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])
        return (rows, *args[1:]), kwargs

    @contextlib.contextmanager
    def context_around_forward(self, module: Any, mesh: Any) -> Iterator[None]:
        parameters, width = dict(module._parameters), module.nf
        weight, bias = (parameters[name].to_local() for name in ("weight", "bias"))
        if self.axis == 0:
            bias = torch.zeros_like(bias)
        module._parameters.update(weight=weight, bias=bias)
        module.nf = weight.shape[1]
        try:
            yield
        finally:
            module._parameters.update(parameters)
            module.nf = width

    def transform_output_post_forward(self, module: Any, output: torch.Tensor, mesh: Any) -> torch.Tensor:
        if self.axis == 1:
            return output
        summed = DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
        rows: torch.Tensor = summed.to_local() + module.bias.to_local()
        return rows


if TensorParallelLayer is not object:
    ALL_PARALLEL_STYLES.register(HEADS, _Heads())
    ALL_PARALLEL_STYLES.register(CONV_QKV, _Conv1D(1, parts=3))
    ALL_PARALLEL_STYLES.register(CONV_OUT, _Conv1D(1))
    ALL_PARALLEL_STYLES.register(CONV_IN, _Conv1D(0))
