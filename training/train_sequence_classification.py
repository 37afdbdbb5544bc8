"""Train a BERT classifier of long sequences, of pixels or of pairs of texts: softmax, bilateral, twicing and others.

    python training/train_sequence_classification.py --preset bilateral_twicing
    python training/train_sequence_classification.py --dataset_name listops --config training/configs/lra_listops.yaml
    python training/train_sequence_classification.py --preset twicing --dataset_name PATH_OR_HUB_NAME_OF_IMAGES
    python training/train_sequence_classification.py --dataset_name PATH_OR_HUB_NAME --text_pair_columns text1,text2

``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import INTERRUPTED, Arguments
from hf_imgproc_attn.training_support.sequence_arguments import SEQUENCE_TRAINER_DEFAULTS, SequenceDataArguments

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[SequenceDataArguments]) -> "Result":
    """Train one classifier.

    Args:
        arguments: the parsed command line.

    Returns:
        The output folder, the metrics of every evaluated split and the run record.

    Raises:
        UsageError: for arguments, data or an output folder that cannot be used.
    """
    require_extras("train")
    # Imported here so that --help does not wait for them.
    from hf_imgproc_attn.training_support.early_checks import check_model
    from hf_imgproc_attn.training_support.fitting import fit
    from hf_imgproc_attn.training_support.metrics import classification_metrics
    from hf_imgproc_attn.training_support.model_setup import build_text_classifier
    from hf_imgproc_attn.training_support.sequence_data import classified_rows, load_sequences
    from hf_imgproc_attn.training_support.trainer_setup import begin_run

    run = begin_run("sequence-classification", arguments, SEQUENCE_TRAINER_DEFAULTS, embedded=False)
    check_model("sequence-classification", arguments)
    data = load_sequences(arguments.data)
    tokenizer = data.tokenizer(for_classifier=True)
    # The first token is a special one.
    model, tokenizer.model_max_length = build_text_classifier(
        arguments.model, tokenizer, data.label_names, data.longest + 1, pairs=arguments.data.is_pairs
    )
    rows = {split: classified_rows(part, tokenizer) for split, part in data.splits.items()}
    _, collator = rows["train"]
    fingerprints = {split: part.fingerprint for split, part in data.splits.items()}
    metrics = dict.fromkeys(rows, classification_metrics)
    sequences = {split: part for split, (part, _) in rows.items()}
    return fit(run, model, sequences, metrics, fingerprints, data_collator=collator, processing_class=tokenizer)


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[SequenceDataArguments]:
    """The options of a command line; None: of this process."""
    return parse_arguments(argv, SequenceDataArguments, SEQUENCE_TRAINER_DEFAULTS, str(__doc__).split("\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
