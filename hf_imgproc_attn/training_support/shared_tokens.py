"""Training texts that several processes share token by token (``--context_parallel``), exactly as in one process.

Processes in a row make a group. A group gets one batch, and each of its processes some tokens of every text in it
(:mod:`hf_imgproc_attn.context_parallel`); groups share the rows, as processes do otherwise. Labels are shifted before
they are cut. The Trainer divides each process's sum of losses by the labels of all of them, times the number of
processes, over which DDP and FSDP2 average the gradients: what comes out is the gradient of the whole batch. Texts
that are evaluated are not shared.
"""

import contextlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.model_start import as_usage_errors

if TYPE_CHECKING:
    from torch.utils.data import DataLoader
    from transformers import PreTrainedModel, TrainingArguments

    from hf_imgproc_attn.training_support.arguments import Arguments

_OPTION = "context_parallel"
_DROPOUT = ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob")
"""What configurations call dropout on attention weights."""


def check_shared_tokens(arguments: "Arguments[Any]", training_args: "TrainingArguments") -> None:
    """Refuse what is not exact, or not known, where processes share tokens; before any data are read.

    Args:
        arguments: the parsed command line, with ``data.context_parallel``.
        training_args: of the run.

    Raises:
        UsageError: naming the option.
    """
    size, processes = arguments.data.context_parallel, training_args.world_size
    if size == 1:
        return
    if processes % size:
        raise UsageError(f"{_OPTION} must divide the number of processes, {processes}, got {size}")
    if arguments.data.block_size is not None:
        check_even(arguments.data.block_size, size)
    given = {
        "streaming": (arguments.data.streaming, False),
        "peft": (arguments.model.peft, None),
        "deepspeed": (training_args.deepspeed, None),
        "torch_compile": (training_args.torch_compile, False),
        "label_smoothing_factor": (training_args.label_smoothing_factor, 0.0),
        "average_tokens_across_devices": (training_args.average_tokens_across_devices, True),
    }
    for name, (value, allowed) in given.items():
        if value != allowed:
            raise UsageError(f"{name} must be {allowed} with {_OPTION} {size}, got {value}")


def check_shareable(model: torch.nn.Module, size: int) -> None:
    """Refuse a model whose tokens cannot be shared; it may be one without memory.

    Raises:
        UsageError: naming the filter's field, or the dropout.
    """
    from hf_imgproc_attn.context_parallel import filters_that_share

    if size == 1:
        return
    with as_usage_errors(_OPTION):
        filters = filters_that_share(model)
    rates = {name: getattr(model.config, name, None) or 0.0 for name in _DROPOUT}
    for name, rate in rates.items():
        if rate and any(layer.spec.boosting != "none" for layer in filters):
            raise UsageError(
                f"{name} must be 0 with {_OPTION} {size} where attention is boosted, got {rate}: "
                f"--config_overrides {name}=0"
            )


def check_even(block_size: int, size: int) -> None:
    """Refuse texts that cannot be cut into parts of one length.

    Raises:
        UsageError: naming both numbers.
    """
    if block_size % size:
        raise UsageError(f"block_size must be a multiple of {_OPTION} {size}, got {block_size}")


class SharedTokens:
    """The group of this process, and its share of the batches.

    Args:
        model: is trained.
        training_args: of the run.
        size: processes that share the tokens of a text.

    Raises:
        UsageError: for a model whose tokens cannot be shared.
    """

    def __init__(self, model: "PreTrainedModel", training_args: "TrainingArguments", size: int) -> None:
        check_shareable(model, size)
        self._model, self._size = model, size
        self._groups, self._index = training_args.world_size // size, training_args.process_index // size
        self._group, _ = torch.distributed.new_subgroups(size)

    def deal(self, loader: "DataLoader[Any]") -> "DataLoader[Any]":
        """The loader, which gives all processes of a group the same batches.

        Raises:
            UsageError: for a loader that does not deal whole batches to processes.
        """
        sampler: Any = loader.batch_sampler  # accelerate's BatchSamplerShard
        if not hasattr(sampler, "process_index") or sampler.split_batches:
            raise UsageError(f"accelerator_config must leave split_batches and dispatch_batches off with {_OPTION}")
        sampler.num_processes, sampler.process_index = self._groups, self._index
        return loader

    def part(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tokens of this process, ``[batch, N / size]`` each, with the labels of the next ones."""
        from hf_imgproc_attn.context_parallel import share_tokens

        part = share_tokens(batch, self._group)
        del part["num_items_in_batch"]  # the Trainer counts over all batches of a step
        return part

    def shared(self) -> contextlib.AbstractContextManager[None]:
        """In this block the model computes what it does with all tokens of its texts."""
        from hf_imgproc_attn.context_parallel import context_parallel

        return context_parallel(self._model, self._group)
