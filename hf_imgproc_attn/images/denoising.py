"""``imgproc-attn denoise``: noise a photograph, filter it, boost the filter, and look at what was taken away.

The method noise of a filter is the noisy image minus the filtered one (Buades, Coll, Morel 2005): what it removes. A
good filter's looks like noise; structure in it is detail that was smoothed away, and what twicing filters once more.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError, did_you_mean
from ..output_paths import check_output_folder, write_or_keep
from ..records import git_state, package_versions, write_json
from .filters import Image, ImageFilter, square_window
from .photographs import load_photograph

FIGURE, RECORD = "denoising.png", "denoising.json"
BOOSTERS = {"filtered": "none", "twicing": "twicing", "sos": "sos"}
"""What is compared, by the name in tables and figure."""
ESTIMATES = ("noisy", *BOOSTERS)


class Rule(NamedTuple):
    """How a preset's settings follow from the noise alone, its standard deviation sigma in grey values.

    content: h_y / sigma.
    position: h_p in pixels, or None.
    patch_size: side of the patches.
    window_radius: of the square search window.
    source: where the numbers come from.
    """

    content: float
    position: float | None
    patch_size: int
    window_radius: int
    source: str


RULES = {
    "nlm": Rule(
        1.2,
        None,
        7,
        10,
        "patches of 7 x 7 in windows of 21 x 21 as Buades, Coll, Morel 2005; h_y = 1.2 sigma chosen on other pictures "
        "(chelsea, coins, moon)",
    ),
    "bilateral_gaussian": Rule(
        3 * 2**0.5,
        1.8 * 2**0.5,
        1,
        5,
        "spatial sigma 1.8 and range sigma 3 times the noise's, within what Zhang, Gunturk 2008 recommend, chosen on "
        "other photographs (chelsea, coins, moon)",
    ),
}


class Comparison(NamedTuple):
    """One photograph at one noise level: ``[height, width]`` each, by the names in :data:`ESTIMATES`."""

    image: str
    noise: float
    clean: Image
    estimates: dict[str, Image]


def add_noise(image: Image, noise: float, seed: int) -> Image:
    """Add white Gaussian noise of standard deviation ``noise`` in grey values; nothing is clipped."""
    generator = np.random.default_rng(seed)
    noisy: Image = (image + generator.normal(0.0, noise, image.shape)).astype(np.float32)
    return noisy


def filter_settings(preset: str, noise: float) -> dict[str, Any]:
    """Arguments of :class:`~hf_imgproc_attn.images.filters.ImageFilter` by the preset's :class:`Rule`.

    Raises:
        UsageError: for a preset without a rule.
    """
    if preset not in RULES:
        hint = did_you_mean(preset, RULES)
        raise UsageError(f"preset must be one of {', '.join(RULES)} on images, got {preset!r}{hint}")
    rule = RULES[preset]
    return {
        "preset": preset,
        "content_bandwidth": rule.content * noise,
        "position_bandwidth": rule.position,
        "patch_size": rule.patch_size,
        "window": square_window(rule.window_radius),
    }


def compare(name: str, clean: Image, noise: float, preset: str, seed: int) -> Comparison:
    """Filter one noisy photograph plainly and with each booster; one A, built from the noisy image, serves all.

    Raises:
        UsageError: for a photograph that is too small.
    """
    noisy = add_noise(clean, noise, seed)
    try:
        image_filter = ImageFilter(noisy, **filter_settings(preset, noise))
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{name}: {error}") from error
    filtered = {label: image_filter(boosting=boosting) for label, boosting in BOOSTERS.items()}
    return Comparison(name, noise, clean, {"noisy": noisy, **filtered})


def measures(comparison: Comparison) -> dict[str, dict[str, float]]:
    """PSNR in dB (peak 255) and SSIM (Gaussian window of sigma 1.5, Wang et al. 2004) of each estimate, unclipped."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    clean = comparison.clean.astype(np.float64)
    found = {}
    for label, estimate in comparison.estimates.items():
        pair = (clean, estimate.astype(np.float64))
        ssim = structural_similarity(
            *pair, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        found[label] = {
            "psnr": round(float(peak_signal_noise_ratio(*pair, data_range=255)), 2),
            "ssim": round(float(ssim), 3),
            "method_noise_std": round(float(np.std(comparison.estimates["noisy"].astype(np.float64) - pair[1])), 2),
        }
    return found


def run(
    sources: Sequence[str],
    *,
    preset: str = "nlm",
    noise: Sequence[float] = (10, 25, 50),
    output: str | Path,
    crop: int | None = None,
    seed: int = 0,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Compare on several photographs and noise levels; write a figure and a record, and return the record.

    Args:
        sources: see :func:`~hf_imgproc_attn.images.photographs.load_photograph`.
        preset: a key of :data:`RULES`.
        noise: standard deviations in grey values, from 1 to 128.
        output: a folder, made if missing; a figure and a record of an earlier run in it are replaced.
        crop: side of the square in the middle of each photograph; None: all of it.
        seed: of the noise, the same for every photograph and level.
        show: what to call with lines of progress; None: they go to standard error.

    Raises:
        UsageError: naming the argument, the rule and the value.
    """
    _check_arguments(sources, noise, output, seed)
    for level in noise:
        filter_settings(preset, level)
    photographs = [load_photograph(source, crop) for source in sources]
    names = [name for name, _ in photographs]
    if len(set(names)) < len(names):
        raise UsageError(f"every image must have a name of its own, got {', '.join(names)}")
    from .denoising_figure import save_figure

    git = git_state()  # of what runs: files may change meanwhile
    show = show or _to_standard_error
    comparisons, rows = [], []
    jobs = [(name, clean, float(level)) for name, clean in photographs for level in noise]
    for number, (name, clean, level) in enumerate(jobs, start=1):
        start = time.perf_counter()
        comparison = compare(name, clean, level, preset, seed)
        comparisons.append(comparison)
        found = measures(comparison)
        rows.append({"image": name, "shape": list(clean.shape), "noise": level, "estimates": found})
        seconds = time.perf_counter() - start
        show(f"[{number}/{len(jobs)}] {name}, noise {level:g}: {found['filtered']['psnr']:.2f} dB ({seconds:.0f} s)")
    record = {
        "preset": preset,
        "rule": RULES[preset]._asdict(),
        "boosting": dict(BOOSTERS),
        "seed": seed,
        "crop": crop,
        "results": rows,
        "versions": package_versions("scikit-image", "matplotlib", "pillow"),
        "git": git,
    }

    def write(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_figure(comparisons, rows, preset, folder / FIGURE)
        write_json(folder / RECORD, record)

    write_or_keep(output, write)
    return record


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of a record: a header and one row a photograph and noise level, ``PSNR / SSIM`` of each estimate."""
    rows = [["image", "noise", *ESTIMATES]]
    for row in record["results"]:
        cells = (row["estimates"][label] for label in ESTIMATES)
        rows.append(
            [row["image"], f"{row['noise']:g}", *(f"{cell['psnr']:.2f} / {cell['ssim']:.3f}" for cell in cells)]
        )
    return rows


def markdown_table(record: dict[str, Any]) -> str:
    """The same table in Markdown."""
    header, *rows = (f"| {' | '.join(row)} |" for row in table_rows(record))
    return "\n".join([header, "|---|---|" + "---|" * len(ESTIMATES), *rows])


def _check_arguments(sources: Sequence[str], noise: Sequence[float], output: str | Path, seed: int) -> None:
    if not sources:
        raise UsageError("at least one image must be given")
    if not noise:
        raise UsageError("at least one noise level must be given")
    for level in noise:
        if not 1 <= level <= 128:  # NaN is refused too
            raise UsageError(f"noise must be a standard deviation from 1 to 128 grey values, got {level}")
    if len(set(noise)) < len(noise):
        raise UsageError(f"noise must name every level once, got {' '.join(f'{level:g}' for level in noise)}")
    if seed < 0:
        raise UsageError(f"seed must be an integer >= 0, got {seed}")
    check_output_folder(output)


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
