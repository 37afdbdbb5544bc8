"""``imgproc-attn robustness``: options here, without torch, and the work in :mod:`.evaluation`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .settings import ATTACKS, ImageSettings
from .severities import CORRUPTIONS, TABLES

OUTPUT = Path("outputs/robustness")
_IMAGE_OPTIONS = (
    "corruptions", "severities", "table", "frost_pictures", "sigmas", "attacks", "epsilons", "attack_samples", "steps",
    "restarts", "spsa_steps", "spsa_samples", "autoattack_steps", "autoattack_targets", "square_queries",
)  # fmt: skip


def add_command(commands: Any) -> None:
    """Add the sub-command to the parser of ``imgproc-attn``."""
    command = commands.add_parser(
        "robustness",
        help="measure a checkpoint under corruptions and attacks",
        description="Measure any checkpoint of Transformers, from a folder or the Hub, on disturbed data: image "
        "classifiers under the corruptions of CIFAR-10-C and ImageNet-C and under attacks. Writes a record, tables "
        "and a figure, the record after every measurement. What the numbers mean: docs/robustness.md.",
    )
    command.add_argument("checkpoint", help="a folder or a Hub name")
    data = command.add_argument_group("data (default: those that a run of this package names, else the embedded ones)")
    data.add_argument("--dataset_name", help="a Hub name or a local path, as for training")
    data.add_argument("--dataset_config_name", help="configuration of a Hub data set")
    data.add_argument("--image_column_name", help="column with the images (default: detected)")
    data.add_argument("--label_column_name", help="column with the labels (default: detected)")
    data.add_argument("--split", choices=("test", "validation"), help="(default: test where there is one)")
    data.add_argument("--max_samples", type=int, default=500, help="use at most so many rows (default: %(default)s)")
    _add_image_options(command)
    command.add_argument("--baseline", metavar="CHECKPOINT", help="another checkpoint, or the folder of its results, "
                         "for the mean corruption error")  # fmt: skip
    command.add_argument("--batch_size", type=int, help="images at once (default: 128)")
    command.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    command.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    command.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR", help="(default: %(default)s)")
    command.add_argument("--resume", action="store_true", help="go on with the same measurements where they ended")
    command.add_argument("--force", action="store_true", help="replace the results of earlier measurements in DIR")
    command.set_defaults(run_command=run_command)


def _add_image_options(command: argparse.ArgumentParser) -> None:
    images = command.add_argument_group("images")
    images.add_argument("--corruptions", nargs="*", metavar="NAME", help="all (default), none, or "
                        f"names among {', '.join(CORRUPTIONS)}")  # fmt: skip
    images.add_argument("--severities", nargs="+", type=int, metavar="N", help="1 to 5 (default: all)")
    images.add_argument(
        "--table", choices=tuple(TABLES), help="of the severities (default: by the size of the images)"
    )
    images.add_argument("--frost_pictures", metavar="DIR", help="photographs for frost, which is left out without")
    images.add_argument("--sigmas", nargs="*", type=number, metavar="SIGMA", help="of Gaussian noise, beside the "
                        "corruptions; pixels in [0, 1] (default: none)")  # fmt: skip
    images.add_argument("--attacks", nargs="*", metavar="NAME", help=f"{', '.join(ATTACKS)} (default: fgsm pgd)")
    images.add_argument("--epsilons", nargs="+", type=number, metavar="EPSILON", help="largest changes of a pixel in "
                        "[0, 1] (default: 2/255 4/255 8/255)")  # fmt: skip
    images.add_argument("--attack_samples", type=int, metavar="N", help="attack the first N images only")
    for name, text in (
        ("steps", "of PGD"),
        ("restarts", "of PGD"),
        ("spsa_steps", "of SPSA"),
        ("spsa_samples", "directions of each of SPSA's estimates"),
        ("autoattack_steps", "of each APGD of AutoAttack"),
        ("autoattack_targets", "classes that its targeted APGD tries"),
        ("square_queries", "evaluations that its Square attack may make an image"),
    ):
        default = getattr(ImageSettings, name)
        images.add_argument(f"--{name}", type=int, metavar="N", help=f"{text} (default: {default})")


def number(word: str) -> float:
    """``0.1`` or ``8/255``."""
    try:
        return float(Fraction(word))
    except (ValueError, ZeroDivisionError) as error:
        raise argparse.ArgumentTypeError(f"must be a number or a fraction such as 8/255, got {word!r}") from error


def image_settings(options: argparse.Namespace) -> ImageSettings:
    """The settings that the options ask for.

    Raises:
        UsageError: for a wrong one.
    """
    given: dict[str, Any] = {name: getattr(options, name) for name in _IMAGE_OPTIONS}
    given["corruptions"] = _corruptions(given["corruptions"], given["frost_pictures"])
    given["attacks"] = _or_none(given["attacks"], ("fgsm", "pgd"))
    given |= {"batch_size": options.batch_size, "seed": options.seed}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if value is not None:
            chosen[name] = tuple(value) if isinstance(value, list) else value
    return ImageSettings(**chosen)


def _corruptions(names: Sequence[str] | None, frost_pictures: str | None) -> tuple[str, ...]:
    if names is not None and list(names) != ["all"]:
        return _or_none(names, ())
    usable = [name for name in CORRUPTIONS if name != "frost" or frost_pictures is not None]
    return tuple(usable)


def _or_none(names: Sequence[str] | None, default: tuple[str, ...]) -> tuple[str, ...]:
    """The names; the word ``none`` alone, or an option without words, for no name."""
    if names is None:
        return default
    return () if list(names) == ["none"] else tuple(names)


def run_command(options: argparse.Namespace) -> int:
    """``imgproc-attn robustness``: print the tables, leave record, tables and figure.

    Raises:
        UsageError: for a wrong option, before anything is loaded.
    """
    settings = image_settings(options)
    if options.resume and options.force:
        raise UsageError("--resume and --force cannot be given together")
    if options.max_samples < 1:
        raise UsageError(f"max_samples must be an integer >= 1, got {options.max_samples}")
    from .evaluation import Data, run

    data = Data(**{name: getattr(options, name) for name in Data._fields})
    record = run(
        options.checkpoint,
        data,
        settings,
        baseline=options.baseline,
        device=options.device,
        output=options.output,
        resume=options.resume,
        force=options.force,
    )
    from .report import plain_text

    print(plain_text(record))
    print(f"\nrecord, tables and figure are in {options.output}")
    return 0
