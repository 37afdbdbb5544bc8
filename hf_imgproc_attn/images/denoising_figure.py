"""The figure of ``imgproc-attn denoise``: estimates side by side, and what each filter removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image as Pillow

if TYPE_CHECKING:
    from .denoising import Comparison

_DPI = 100
_PANEL, _GAP, _CAPTION = 160, 8, 22
_LEFT, _TOP, _BOTTOM = 34, 62, 30
_GREYS = 64
"""Grey levels of the file: more would only store the noise."""


def save_figure(comparisons: Sequence[Comparison], rows: Sequence[dict[str, Any]], preset: str, path: Path) -> None:
    """Draw one row a photograph and noise level: the estimates, then the method noise of each filter.

    Every panel shows the same number of pixels from the middle of its photograph, one to one where it is large enough.
    Method noise is shown from -3 to 3 standard deviations of the added noise.

    Args:
        comparisons: what was filtered.
        rows: what was measured, in the same order.
        preset: for the title.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(comparisons[0].estimates)
    columns = [*labels, *(f"removed by {label}" for label in labels[1:])]
    columns[len(labels)] = "removed by filter"
    width = _LEFT + len(columns) * (_PANEL + _GAP)
    height = _TOP + len(comparisons) * (_PANEL + _CAPTION + _GAP) + _BOTTOM
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    figure.text(
        (_LEFT + _GAP) / width,
        1 - 20 / height,
        f"{preset}: noisy, filtered, boosted; at the right the method noise (noisy minus estimate)",
        fontsize=11,
        va="center",
    )
    side = min(_PANEL, *(min(comparison.clean.shape) for comparison in comparisons))
    for index, (comparison, row) in enumerate(zip(comparisons, rows, strict=True)):
        top = _TOP + index * (_PANEL + _CAPTION + _GAP)
        figure.text(
            16 / width,
            1 - (top + _PANEL / 2) / height,
            f"{comparison.image}, σ = {comparison.noise:g}",
            fontsize=10,
            rotation=90,
            ha="center",
            va="center",
        )
        noisy = comparison.estimates["noisy"]
        found = row["estimates"]
        panels = [
            (image, (0.0, 255.0), f"{found[label]['psnr']:.2f} dB   {found[label]['ssim']:.3f}")
            for label, image in comparison.estimates.items()
        ]
        for label in labels[1:]:
            spread = 3 * comparison.noise
            caption = f"std {found[label]['method_noise_std']:.1f}"
            panels.append((noisy - comparison.estimates[label], (-spread, spread), caption))
        for column, (image, (low, high), caption) in enumerate(panels):
            left = _LEFT + column * (_PANEL + _GAP)
            box = (left / width, 1 - (top + _PANEL) / height, _PANEL / width, _PANEL / height)
            axes = figure.add_axes(box)
            axes.imshow(_middle(image, side), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axes.set_axis_off()
            middle = (left + _PANEL / 2) / width
            figure.text(middle, 1 - (top + _PANEL + 11) / height, caption, fontsize=9, ha="center", va="center")
            if index == 0:
                figure.text(middle, 1 - (_TOP - 11) / height, columns[column], fontsize=10, ha="center", va="center")
    figure.text(
        (_LEFT + _GAP) / width,
        14 / height,
        "below estimates: PSNR and SSIM of the whole picture; below method noise: its standard deviation",
        fontsize=9,
        va="center",
    )
    canvas.draw()
    grey = Pillow.fromarray(np.asarray(canvas.buffer_rgba())).convert("L")
    step = 256 / _GREYS
    grey.point([round(int(level // step) * 255 / (_GREYS - 1)) for level in range(256)]).save(path, optimize=True)


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    return image[top : top + side, left : left + side]
