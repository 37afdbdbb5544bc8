"""Train a GPT-2 to recall out of its context, MQAR, noisy recall or selective copying: softmax, twicing and others.

    python training/train_recall.py --preset twicing
    python training/train_recall.py --dataset_name noisy_recall --sequence_settings noise=0.4

Only the answers are learned and scored. ``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import INTERRUPTED, Arguments
from hf_imgproc_attn.training_support.sequence_arguments import SEQUENCE_TRAINER_DEFAULTS, RecallDataArguments

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[RecallDataArguments]) -> "Result":
    """Train one model.

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

    from hf_imgproc_attn.training_support.early_checks import check_model
    from hf_imgproc_attn.training_support.fitting import fit
    from hf_imgproc_attn.training_support.metrics import answer_metrics, answers
    from hf_imgproc_attn.training_support.model_setup import build_causal_lm
    from hf_imgproc_attn.training_support.sequence_data import TokenSequences, load_sequences, sequence_tokenizer
    from hf_imgproc_attn.training_support.trainer_setup import begin_run

    run = begin_run("recall", arguments, SEQUENCE_TRAINER_DEFAULTS, embedded=False)
    check_model("recall", arguments)
    data = load_sequences(arguments.data)
    tokenizer = sequence_tokenizer(data.vocabulary, for_classifier=False)
    model, tokenizer.model_max_length = build_causal_lm(arguments.model, tokenizer, data.longest)
    rows = {split: TokenSequences(part, tokenizer) for split, part in data.splits.items()}
    fingerprints = {split: part.fingerprint for split, part in data.splits.items()}
    return fit(
        run,
        model,
        rows,
        dict.fromkeys(rows, answer_metrics),
        fingerprints,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        preprocess_logits_for_metrics=answers,
    )


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[RecallDataArguments]:
    """The options of a command line; None: of this process."""
    return parse_arguments(argv, RecallDataArguments, SEQUENCE_TRAINER_DEFAULTS, str(__doc__).split("\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
