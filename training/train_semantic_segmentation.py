"""Train or fine-tune a Vision Transformer that gives every pixel a class: softmax, bilateral and the other presets.

    python training/train_semantic_segmentation.py --preset bilateral_twicing
    python training/train_semantic_segmentation.py --preset twicing --dataset_name PATH_OR_HUB_NAME --max_steps 500

``--help`` lists the options.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_imgproc_attn.errors import exit_code, require_extras
from hf_imgproc_attn.training_support.argument_parser import parse_arguments
from hf_imgproc_attn.training_support.arguments import EMBEDDED_MASKS, INTERRUPTED, Arguments
from hf_imgproc_attn.training_support.mask_arguments import MASK_TRAINER_DEFAULTS, MaskDataArguments

if TYPE_CHECKING:
    from hf_imgproc_attn.training_support.trainer_setup import Result


def train(arguments: Arguments[MaskDataArguments]) -> "Result":
    """Train one segmentation model, and draw what it says of some images that it was not trained on.

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
    from hf_imgproc_attn.training_support.image_pixels import EpochCallback
    from hf_imgproc_attn.training_support.mask_data import load_mask_splits
    from hf_imgproc_attn.training_support.mask_model import build_segmenter
    from hf_imgproc_attn.training_support.mask_pictures import draw_run
    from hf_imgproc_attn.training_support.mask_pixels import MaskCollator, load_masked_pixels
    from hf_imgproc_attn.training_support.metrics import SegmentationMetrics, pixel_results
    from hf_imgproc_attn.training_support.trainer_setup import adapt_to_data, begin_run

    embedded = arguments.data.dataset_name == EMBEDDED_MASKS
    run = begin_run("semantic-segmentation", arguments, MASK_TRAINER_DEFAULTS, embedded=embedded)
    check_model("semantic-segmentation", arguments)
    splits = load_mask_splits(arguments.data)
    adapt_to_data(run, len(splits.rows["train"]), "validation" in splits.rows)  # before images are decoded
    model, processor = build_segmenter(arguments.model, splits, arguments.data)
    pixels = load_masked_pixels(splits, processor, arguments.data, run.training_args.seed)
    fingerprints = {split: dataset.fingerprint for split, dataset in pixels.items()}
    return fit(
        run,
        model,
        pixels,
        {split: SegmentationMetrics() for split in pixels},
        fingerprints,
        on_saved=lambda folder: draw_run(folder, pixels, arguments.data.pictures),
        data_collator=MaskCollator(processor),
        processing_class=processor,
        preprocess_logits_for_metrics=pixel_results,
        callbacks=[EpochCallback(pixels["train"])],
    )


def read_arguments(argv: Sequence[str] | None = None) -> Arguments[MaskDataArguments]:
    """The options of a command line; None: of this process."""
    return parse_arguments(argv, MaskDataArguments, MASK_TRAINER_DEFAULTS, str(__doc__).split("\n")[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: train(read_arguments(argv)), INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
