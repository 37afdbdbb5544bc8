"""How long the samples of a text are, and whether the text and the memory have room for them."""

from typing import TYPE_CHECKING

from hf_imgproc_attn.backbones import GPT2
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.models.spec_fields import PRESETS
from hf_imgproc_attn.training_support.arguments import ModelArguments
from hf_imgproc_attn.training_support.model_start import parse_overrides

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

DEFAULT_BLOCK_SIZE = 256


def check_block_size(
    args: ModelArguments,
    block_size: int | None,
    num_tokens: int,
    vocab_size: int,
    training_args: "TrainingArguments",
    context_parallel: int = 1,
) -> None:
    """Refuse blocks that the training text or the memory has no room for.

    Args:
        args: the model options.
        block_size: as the user gave it; None, and no more than the default, is never refused.
        num_tokens: of the training text.
        vocab_size: of the tokenizer.
        training_args: say how large a batch is, and where it is computed.
        context_parallel: processes that share the tokens of a block.

    Raises:
        UsageError: naming the block size and what is too small for it.
    """
    if block_size is None or block_size <= DEFAULT_BLOCK_SIZE:
        return
    if block_size > num_tokens:
        raise UsageError(f"block_size must not exceed the {num_tokens} tokens of the training text, got {block_size}")
    samples = -(-(num_tokens - 1) // (block_size - 1))
    batch = training_args.train_batch_size * training_args.world_size // context_parallel
    if samples < batch:
        raise UsageError(
            f"block_size {block_size} cuts the training text of {num_tokens} tokens into {samples} samples, fewer "
            f"than one batch of {batch}: choose smaller blocks or a smaller per_device_train_batch_size"
        )
    if args.model_name_or_path is not None:
        return  # its own positions are the limit
    batch = min(training_args.train_batch_size, samples)
    needed = _least_memory(args, block_size, vocab_size, batch / context_parallel)
    free = _free_memory(training_args.device)
    if free is not None and needed > free:
        raise UsageError(
            f"block_size {block_size} needs at least {needed / 2**30:.1f} GiB in training with "
            f"per_device_train_batch_size {batch}, but {free / 2**30:.1f} GiB are free on {training_args.device}"
        )


def _least_memory(args: ModelArguments, block_size: int, vocab_size: int, batch: float) -> int:
    """Bytes that a training step cannot do without: weights with their gradients and Adam's two moments, the logits
    with their softmax and gradient, and a few activations of every layer; for a bias, the dense logits of one sample.
    A batch may be a part of a sample.
    """
    overrides = parse_overrides(args, GPT2.our_class(GPT2.config))
    fields = {**PRESETS[args.preset or "softmax"], **GPT2.new_model, **overrides}
    width, layers, heads = (fields[name] for name in ("n_embd", "n_layer", "n_head"))
    if not all(isinstance(size, int) for size in (width, layers, heads)):
        return 0  # the configuration refuses it in its own words
    weights = (block_size + vocab_size) * width + 12 * layers * width**2
    logits = batch * block_size * vocab_size
    activations = 16 * batch * block_size * width * layers
    biased = fields.get("position_kernel") in ("alibi", "relative_buckets")
    bias = min(batch, 1) * heads * block_size**2 if biased else 0
    return int(4 * (4 * weights + 3 * logits + activations + bias))


def _free_memory(device: "torch.device") -> int | None:
    """Free bytes on a device; None where nobody knows."""
    import psutil
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available) if device.type == "cpu" else None
