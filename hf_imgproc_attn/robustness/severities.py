"""How strong each corruption is: the published settings of CIFAR-10-C and ImageNet-C, severities 1 to 5.

Source: D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
ICLR 2019 (arXiv 1903.12261); the numbers are those of the programs that made the data sets, ``make_cifar_c.py`` and
``corruptions.py`` of https://github.com/hendrycks/robustness. Small images need weaker settings, so there are two
tables. Where a setting depends on the side of the images, it is given as a part of it, so that images of 32 and of 224
pixels get the published values and others get the same in proportion.

No torch and no numpy are imported here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..errors import UsageError, did_you_mean

SEVERITIES = (1, 2, 3, 4, 5)
LARGEST_SMALL_SIDE = 96
"""Images up to this many pixels a side get the settings of CIFAR-10-C where none are asked for."""


class Corruption(NamedTuple):
    """One corruption.

    Attributes:
        family: ``noise``, ``blur``, ``weather`` or ``digital``.
        meaning: of its settings, in order.
        cifar: the settings of CIFAR-10-C, one a severity.
        imagenet: those of ImageNet-C.
        is_extra: not one of the 15 of the mean corruption error, but of the data sets' additional ones.
    """

    family: str
    meaning: str
    cifar: tuple[Any, ...]
    imagenet: tuple[Any, ...]
    is_extra: bool = False


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": Corruption(
        "noise",
        "standard deviation, pixels in [0, 1]",
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": Corruption(
        "noise",
        "photons of a white pixel (Poisson)",
        (500, 250, 100, 75, 50),
        (60, 25, 12, 5, 3),
    ),
    "impulse_noise": Corruption(
        "noise",
        "part of the values that become 0 or 1",
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": Corruption(
        "blur",
        "radius of the disk and standard deviation of its edge, pixels",
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": Corruption(
        "blur",
        "standard deviation of the blur, largest shift, repetitions",
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": Corruption(
        "blur",
        "radius and standard deviation of the trail, pixels",
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": Corruption(
        "blur",
        "zoom factors that are averaged: end and step of a range from 1, end excluded",
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "gaussian_blur": Corruption(
        "blur",
        "standard deviation, pixels",
        (0.4, 0.6, 0.7, 0.8, 1),
        (1, 2, 3, 4, 6),
        is_extra=True,
    ),
    "snow": Corruption(
        "weather",
        "mean and deviation of the flakes, zoom, threshold, radius and deviation of their trails, what is left of the "
        "picture",
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": Corruption(
        "weather",
        "weights of the picture and of the photograph of frost, and how much the photograph is reduced",
        ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    ),
    "fog": Corruption(
        "weather",
        "strength, and how fast the fractal's detail fades",
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": Corruption(
        "weather",
        "added to the value of HSV, in [0, 1]",
        (0.05, 0.1, 0.15, 0.2, 0.3),
        (0.1, 0.2, 0.3, 0.4, 0.5),
    ),
    "contrast": Corruption(
        "digital",
        "factor of the difference to the mean",
        (0.75, 0.5, 0.4, 0.3, 0.15),
        (0.4, 0.3, 0.2, 0.1, 0.05),
    ),
    # ImageNet-C's are multiples of 244 for images of 224 pixels.
    "elastic_transform": Corruption(
        "digital",
        "strength and standard deviation of the displacement, largest shift of a corner, in sides of the image",
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        tuple(
            tuple(part * 244 / 224 for part in parts)
            for parts in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
    ),
    "pixelate": Corruption(
        "digital",
        "factor of the size",
        (0.95, 0.9, 0.85, 0.75, 0.65),
        (0.6, 0.5, 0.4, 0.3, 0.25),
    ),
    "jpeg_compression": Corruption(
        "digital",
        "quality of the JPEG file",
        (80, 65, 58, 50, 40),
        (25, 18, 15, 10, 7),
    ),
}
"""Every corruption by its published name."""

TABLES = {"cifar10-c": "CIFAR-10-C", "imagenet-c": "ImageNet-C"}
"""The two tables of settings, and their names in results."""


def severity_setting(name: str, severity: int, table: str) -> Any:
    """The published setting of a corruption.

    Args:
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        table: a key of :data:`TABLES`.

    Raises:
        UsageError: for a name, a severity or a table that there is not.
    """
    check_corruption(name)
    check_severity(severity)
    if table not in TABLES:
        raise UsageError(f"table must be one of {', '.join(TABLES)}, got {table!r}")
    corruption = CORRUPTIONS[name]
    return (corruption.cifar if table == "cifar10-c" else corruption.imagenet)[severity - 1]


def check_corruption(name: str) -> None:
    """Refuse a corruption that there is not.

    Raises:
        UsageError: names the nearest one, or all.
    """
    if name not in CORRUPTIONS:
        hint = did_you_mean(name, CORRUPTIONS) or f"; there are {', '.join(CORRUPTIONS)}"
        raise UsageError(f"corruptions must be names of corruptions, got {name!r}{hint}")


def check_severity(severity: object) -> None:
    """Refuse what is no integer from 1 to 5.

    Raises:
        UsageError: naming it.
    """
    if isinstance(severity, bool) or severity not in SEVERITIES:
        raise UsageError(f"severities must be integers from 1 to 5, got {severity!r}")


def table_for(side: int) -> str:
    """The table of settings for images whose longer side has so many pixels."""
    return "cifar10-c" if side <= LARGEST_SMALL_SIDE else "imagenet-c"
