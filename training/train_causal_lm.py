"""Train or fine-tune a GPT-2 language model on text: softmax, bilateral, twicing and the other presets.

    python training/train_causal_lm.py --preset bilateral_twicing
    python training/train_causal_lm.py --preset twicing --dataset_name PATH_OR_HUB_NAME --tokenizer_name NAME

``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import (
    EMBEDDED_TEXT,
    INTERRUPTED,
    TEXT_TRAINER_DEFAULTS,
    Arguments,
    TextDataArguments,
)

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[TextDataArguments]) -> "Result":
    """Train one language model.

    Args:
        arguments: the parsed command line.

    Returns:
        The output folder, the metrics of every evaluated split and the run record.

    Raises:
        UsageError: for arguments, data or an output folder that cannot be used.
    """
    require_extras("train")
    # Imported here so that --help does not wait for them.
    from transformers import default_data_collator

    from hf_imgproc_attn.training_support.block_size import check_block_size
    from hf_imgproc_attn.training_support.early_checks import check_model
    from hf_imgproc_attn.training_support.fitting import fit
    from hf_imgproc_attn.training_support.metrics import language_model_metrics, token_losses
    from hf_imgproc_attn.training_support.model_setup import build_causal_lm
    from hf_imgproc_attn.training_support.shared_tokens import check_even, check_shared_tokens
    from hf_imgproc_attn.training_support.streams import check_streaming
    from hf_imgproc_attn.training_support.text_data import TokenBlocks, encode, load_text_splits, load_text_stream
    from hf_imgproc_attn.training_support.tokenizer import choose_tokenizer
    from hf_imgproc_attn.training_support.trainer_setup import begin_run

    embedded = arguments.data.dataset_name == EMBEDDED_TEXT
    run = begin_run("causal-lm", arguments, TEXT_TRAINER_DEFAULTS, embedded=embedded)
    check_shared_tokens(arguments, run.training_args)
    check_model("causal-lm", arguments)
    check_streaming(arguments.data, run.training_args, arguments.run.lens_every)
    stream = None
    if arguments.data.streaming:
        stream, texts = load_text_stream(arguments.data, run.training_args.seed)
        lines, length = stream.lines, sys.maxsize
    else:
        texts = load_text_splits(arguments.data)
        lines = texts["train"].lines
    tokenizer = choose_tokenizer(arguments.data, arguments.model.model_name_or_path, lines)
    tokens = {split: encode(text, tokenizer, f"tokenising {split}") for split, text in texts.items()}
    if stream is None:
        tokens["train"] = tokens["train"][: arguments.data.max_train_tokens]
        length = len(tokens["train"])
    shared_by = arguments.data.context_parallel
    check_block_size(arguments.model, arguments.data.block_size, length, len(tokenizer), run.training_args, shared_by)
    model, block_size = build_causal_lm(arguments.model, tokenizer, arguments.data.block_size)
    check_even(block_size, shared_by)
    blocks: dict[str, Any] = {
        split: TokenBlocks(ids, block_size, tokenizer.pad_token_id) for split, ids in tokens.items()
    }
    metrics = {split: language_model_metrics(text.num_words) for split, text in texts.items()}
    fingerprints = {split: {**text.fingerprint, "tokens": len(blocks[split].tokens)} for split, text in texts.items()}
    if stream is not None:
        blocks["train"] = stream.blocks(tokenizer, block_size, run.training_args)
        fingerprints["train"] = blocks["train"].fingerprint
    return fit(
        run,
        model,
        blocks,
        metrics,
        fingerprints,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=token_losses,
    )


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[TextDataArguments]:
    """The options of a command line; None: of this process."""
    return parse_arguments(argv, TextDataArguments, TEXT_TRAINER_DEFAULTS, str(__doc__).split("\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
