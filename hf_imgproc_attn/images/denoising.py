"""``imgproc-attn denoise``: filter photographs, boost the filter, and look at what was taken away.

Their own noise is removed, of an estimated strength, or noise is added, so that the result can be compared with the
clean picture.

The method noise of a filter is the noisy image minus the filtered one (Buades, Coll, Morel 2005): what it removes. A
good filter's looks like noise; structure in it is detail that was smoothed away, and what twicing filters once more.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import UsageError, did_you_mean
from ..markdown_tables import table_text
from ..output_paths import check_new_files, check_output_folder, write_or_keep
from ..records import git_state, package_versions, write_json
from .denoising_rules import RULES, estimate_noise, filter_settings
from .filters import IMAGE_NORMALISATIONS, ImageFilter
from .photographs import Photograph, load_photograph, save_photograph
from .windows import Image

FIGURE, RECORD = "denoising.png", "denoising.json"
BOOSTERS = {"filtered": "none", "twicing": "twicing", "sos": "sos"}
"""What is compared, by the name in tables and figure."""
ESTIMATES = ("noisy", *BOOSTERS)


class Comparison(NamedTuple):
    """One photograph at one noise level.

    photograph: as it was read.
    noise: standard deviation of the noise that was added, 0 if none was.
    sigma: that of the noise to be removed: what was added, or an estimate of what was there.
    estimates: ``[height, width]`` or ``[height, width, 3]`` each, by the names in :data:`ESTIMATES`.
    normalisation: of the filter, one of ``IMAGE_NORMALISATIONS``.
    """

    photograph: Photograph
    noise: float
    sigma: float
    estimates: dict[str, Image]
    normalisation: str = "softmax"

    @property
    def clean(self) -> Image | None:
        """The picture without noise, where it is known: where noise was added."""
        return self.photograph.pixels if self.noise else None

    @property
    def title(self) -> str:
        """Picture and noise, for the figure."""
        how = "" if self.normalisation == "softmax" else f", {self.normalisation}"
        return f"{self.photograph.name}, σ {'=' if self.noise else '≈'} {self.sigma:.3g}{how}"


def add_noise(image: Image, noise: float, seed: int) -> Image:
    """Add white Gaussian noise of standard deviation ``noise`` in grey values; nothing is clipped."""
    generator = np.random.default_rng(seed)
    noisy: Image = (image + generator.normal(0.0, noise, image.shape)).astype(np.float32)
    return noisy


def compare(
    photograph: Photograph, noise: float, preset: str, seed: int, normalisation: str = "softmax"
) -> Comparison:
    """Filter one photograph plainly and with each booster; one A, built from the noisy image, serves all.

    Args:
        photograph: what is filtered.
        noise: standard deviation of the noise that is added first; 0: none, its own is estimated.
        preset: a key of :data:`RULES`.
        seed: of the noise.
        normalisation: one of ``IMAGE_NORMALISATIONS``.

    Raises:
        UsageError: for a photograph that is too small, or without noise.
    """
    noisy = add_noise(photograph.pixels, noise, seed) if noise else photograph.pixels
    sigma = noise or estimate_noise(photograph)
    try:
        settings = filter_settings(preset, sigma, photograph.is_colour)
        image_filter = ImageFilter(noisy, **settings, normalisation=normalisation)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(f"{photograph.name}: {error}") from error
    filtered = {label: image_filter(boosting=boosting) for label, boosting in BOOSTERS.items()}
    return Comparison(photograph, noise, sigma, {"noisy": noisy, **filtered}, normalisation)


def measures(comparison: Comparison) -> dict[str, dict[str, float | None]]:
    """PSNR in dB (peak 255) and SSIM (Gaussian window of sigma 1.5, Wang et al. 2004) of each estimate, unclipped.

    Over all channels; None where no clean picture is known.
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    noisy, clean = comparison.estimates["noisy"].astype(np.float64), comparison.clean
    found: dict[str, dict[str, float | None]] = {}
    for label, estimate in comparison.estimates.items():
        psnr = ssim = None
        if clean is not None:
            pair = (clean.astype(np.float64), estimate.astype(np.float64))
            axis = -1 if comparison.photograph.is_colour else None
            options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": axis}
            psnr = round(float(peak_signal_noise_ratio(*pair, data_range=255)), 2)
            ssim = round(float(structural_similarity(*pair, data_range=255, **options)), 3)
        removed = round(float(np.std(noisy - estimate.astype(np.float64))), 2)
        found[label] = {"psnr": psnr, "ssim": ssim, "method_noise_std": removed}
    return found


def run(
    sources: Sequence[str],
    *,
    preset: str = "nlm",
    normalisations: Sequence[str] = ("softmax",),
    noise: Sequence[float] = (10, 25, 50),
    output: str | Path,
    crop: int | None = None,
    seed: int = 0,
    save: bool = False,
    force: bool = False,
    show: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Filter several photographs; write a figure, a record and on request the pictures, and return the record.

    Args:
        sources: see :func:`~hf_imgproc_attn.images.photographs.load_photograph`.
        preset: a key of :data:`RULES`.
        normalisations: each photograph is filtered with each of these, of ``IMAGE_NORMALISATIONS``.
        noise: standard deviations in grey values of the noise that is added, from 1 to 128; 0: none is added, and
            that of the picture itself is estimated.
        output: a folder, made if missing.
        crop: side of the square in the middle of each photograph; None: all of it.
        seed: of the noise, the same for every photograph and level.
        save: also write each noisy and filtered picture, as PNG with the bit depth and the transparency it came with.
        force: replace files of those names that are in the folder.
        show: what to call with lines of progress; None: they go to standard error.

    Raises:
        UsageError: naming the argument, the rule and the value; without ``force`` also the files that are there.
    """
    _check_arguments(sources, noise, output, seed)
    _check_normalisations(normalisations)
    for level in noise:
        filter_settings(preset, level)
    photographs = [load_photograph(source, crop) for source in sources]
    names = [photograph.name for photograph in photographs]
    if len(set(names)) < len(names):
        raise UsageError(f"every image must have a name of its own, got {', '.join(names)}")
    pictures = _check_pictures(names, noise, normalisations, sources, Path(output)) if save else []
    check_new_files([Path(output) / FIGURE, Path(output) / RECORD, *pictures], force)
    from .denoising_figure import save_figure

    git = git_state()  # of what runs: files may change meanwhile
    show = show or _to_standard_error
    comparisons, rows = [], []
    jobs = list(itertools.product(photographs, map(float, noise), normalisations))
    for number, (photograph, level, normalisation) in enumerate(jobs, start=1):
        start = time.perf_counter()
        comparison = compare(photograph, level, preset, seed, normalisation)
        comparisons.append(comparison)
        rows.append(_row(comparison))
        show(f"[{number}/{len(jobs)}] {_progress(comparison, rows[-1])} ({time.perf_counter() - start:.0f} s)")
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
        for comparison in comparisons if save else []:
            about = comparison.photograph.name, comparison.noise, comparison.normalisation
            for label, name in picture_names(*about).items():
                save_photograph(comparison.photograph, comparison.estimates[label], folder / name)

    write_or_keep(output, write)
    return record


def table_rows(record: dict[str, Any]) -> list[list[str]]:
    """The table of a record: a header and one row a photograph and noise level.

    ``PSNR / SSIM`` of each estimate; where no clean picture is known, the standard deviation of what was removed.
    """
    several = {row.get("normalisation", "softmax") for row in record["results"]} != {"softmax"}
    rows = [["image", "noise", *(["normalisation"] if several else []), *ESTIMATES]]
    for row in record["results"]:
        cells = [row["normalisation"]] if several else []
        for label in ESTIMATES:
            cell = row["estimates"][label]
            if row["noise"]:
                cells.append(f"{cell['psnr']:.2f} / {cell['ssim']:.3f}")
            else:
                cells.append("-" if label == "noisy" else f"{cell['method_noise_std']:.2f} removed")
        noise = f"{row['noise']:g}" if row["noise"] else f"{row['sigma']:.2f} (its own)"
        rows.append([row["image"], noise, *cells])
    return rows


def markdown_table(record: dict[str, Any]) -> str:
    """The same table in Markdown."""
    head, *rows = table_rows(record)
    return table_text(head, rows)


def _row(comparison: Comparison) -> dict[str, Any]:
    photograph = comparison.photograph
    return {
        "image": photograph.name,
        "shape": list(photograph.pixels.shape),
        "depth": photograph.depth,
        "noise": comparison.noise,
        "normalisation": comparison.normalisation,
        "sigma": round(comparison.sigma, 4),
        "estimates": measures(comparison),
    }


def _progress(comparison: Comparison, row: dict[str, Any]) -> str:
    found = row["estimates"]["filtered"]
    if comparison.noise:
        how = "" if comparison.normalisation == "softmax" else f", {comparison.normalisation}"
        return f"{row['image']}, noise {row['noise']:g}{how}: {found['psnr']:.2f} dB"
    return f"{row['image']}, its own noise {row['sigma']:.2f}: {found['method_noise_std']:.2f} removed"


def picture_names(name: str, noise: float, normalisation: str = "softmax") -> dict[str, str]:
    """Estimate -> the file it is saved in: the noisy picture where noise was added, and every filtered one."""
    level = (f"_{noise:g}" if noise else "") + ("" if normalisation == "softmax" else f"_{normalisation}")
    return {label: f"{name}{level}_{label}.png" for label in ESTIMATES if noise or label != "noisy"}


def _check_pictures(
    names: Sequence[str], noise: Sequence[float], normalisations: Sequence[str], sources: Sequence[str], folder: Path
) -> list[Path]:
    """The files of the pictures; refuses to save one picture over another, or over one that is read."""
    files = []
    taken = {Path(source).resolve() for source in sources} | {(folder / name).resolve() for name in (FIGURE, RECORD)}
    for about in itertools.product(names, noise, normalisations):
        for file in picture_names(*about).values():
            if (folder / file).resolve() in taken:
                raise UsageError(f"save would write {file} over another file: rename the image or change output")
            taken.add((folder / file).resolve())
            files.append(folder / file)
    return files


def _check_arguments(sources: Sequence[str], noise: Sequence[float], output: str | Path, seed: int) -> None:
    if not sources:
        raise UsageError("at least one image must be given")
    if not noise:
        raise UsageError("at least one noise level must be given")
    for level in noise:
        if level != 0 and not 1 <= level <= 128:  # NaN is refused too
            raise UsageError(
                f"noise must be 0 (none is added) or a standard deviation from 1 to 128 grey values, got {level}"
            )
    if len(set(noise)) < len(noise):
        raise UsageError(f"noise must name every level once, got {' '.join(f'{level:g}' for level in noise)}")
    if seed < 0:
        raise UsageError(f"seed must be an integer >= 0, got {seed}")
    check_output_folder(output)


def _check_normalisations(normalisations: Sequence[str]) -> None:
    if not normalisations or len(set(normalisations)) < len(normalisations):
        raise UsageError(f"normalisation must name every value once, got {' '.join(normalisations) or 'none'}")
    for name in normalisations:
        if name not in IMAGE_NORMALISATIONS:
            hint = did_you_mean(name, IMAGE_NORMALISATIONS)
            raise UsageError(f"normalisation must be one of {', '.join(IMAGE_NORMALISATIONS)}, got {name!r}{hint}")


def _to_standard_error(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
