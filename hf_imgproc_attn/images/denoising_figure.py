"""The figure of ``imgproc-attn denoise``: clean and filtered pictures side by side, and what each filter removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image as Pillow

if TYPE_CHECKING:
    from .denoising import Comparison

_DPI = 100
_PANEL, _GAP, _CAPTION = 160, 8, 22
_LEFT, _TOP, _BOTTOM = 34, 62, 30
_LONGEST_TITLE = 20
"""Letters of a row's title that fit beside it; longer ones are written smaller."""
_GREYS, _COLOURS = 64, 128
"""Grey levels or colours of the file: more would only store the noise."""


class _Panel(NamedTuple):
    """One picture of the figure.

    column: its heading.
    image: what is shown, None where it is not known.
    low: the value that is black.
    high: the value that is white.
    caption: below it.
    """

    column: str
    image: np.ndarray | None
    low: float
    high: float
    caption: str


def save_figure(comparisons: Sequence[Comparison], rows: Sequence[dict[str, Any]], preset: str, path: Path) -> None:
    """Draw one row a photograph and noise level: clean, noisy and filtered pictures, then each filter's method noise.

    Every panel shows the same number of pixels from the middle of its photograph, one to one where it is large enough.
    Method noise is shown from -3 to 3 standard deviations of the noise. The clean column is left out where no row has
    a clean picture.

    Args:
        comparisons: what was filtered.
        rows: what was measured, in the same order.
        preset: for the title.
        path: of the PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = [_panels(comparison, row) for comparison, row in zip(comparisons, rows, strict=True)]
    if all(panels[0].image is None for panels in drawn):
        drawn = [panels[1:] for panels in drawn]
    width = _LEFT + len(drawn[0]) * (_PANEL + _GAP)
    height = _TOP + len(drawn) * (_PANEL + _CAPTION + _GAP) + _BOTTOM
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="white")
    canvas = FigureCanvasAgg(figure)

    def write(text: str, left: float, top: float, **options: Any) -> None:
        figure.text(left / width, 1 - top / height, text, va="center", **options)

    write(
        f"{preset}: filtered and boosted; at the right the method noise (noisy minus estimate)", _LEFT, 20, fontsize=11
    )
    side = min(_PANEL, *(min(comparison.photograph.pixels.shape[:2]) for comparison in comparisons))
    for index, (comparison, panels) in enumerate(zip(comparisons, drawn, strict=True)):
        top = _TOP + index * (_PANEL + _CAPTION + _GAP)
        size = 10 if len(comparison.title) <= _LONGEST_TITLE else 8
        write(comparison.title, 16, top + _PANEL / 2, fontsize=size, rotation=90, ha="center")
        for column, panel in enumerate(panels):
            left = _LEFT + column * (_PANEL + _GAP)
            if panel.image is not None:
                axes = figure.add_axes((left / width, 1 - (top + _PANEL) / height, _PANEL / width, _PANEL / height))
                _show(axes, panel, side)
            write(panel.caption, left + _PANEL / 2, top + _PANEL + 11, fontsize=9, ha="center")
            if index == 0:
                write(panel.column, left + _PANEL / 2, _TOP - 11, fontsize=10, ha="center")
    measured = "PSNR and SSIM of the whole picture; below method noise: its standard deviation"
    write(f"below estimates: {measured}", _LEFT, height - 14, fontsize=9)
    canvas.draw()
    _save(np.asarray(canvas.buffer_rgba()), any(c.photograph.is_colour for c in comparisons), path)


def _panels(comparison: Comparison, row: dict[str, Any]) -> list[_Panel]:
    """A row of the figure, the clean picture first."""
    found, clean = row["estimates"], comparison.clean
    panels = [_Panel("clean", clean, 0.0, 255.0, "" if clean is not None else "not known")]
    for label, image in comparison.estimates.items():
        caption = ""
        if clean is not None:
            caption = f"{found[label]['psnr']:.2f} dB   {found[label]['ssim']:.3f}"
        panels.append(_Panel(label, image, 0.0, 255.0, caption))
    noisy, spread = comparison.estimates["noisy"], 3 * comparison.sigma
    for label, image in list(comparison.estimates.items())[1:]:
        name = "filter" if label == "filtered" else label
        caption = f"std {found[label]['method_noise_std']:.1f}"
        panels.append(_Panel(f"removed by {name}", noisy - image, -spread, spread, caption))
    return panels


def _show(axes: Any, panel: _Panel, side: int) -> None:
    image = np.asarray(panel.image)
    top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
    shown = (image[top : top + side, left : left + side].astype(np.float64) - panel.low) / (panel.high - panel.low)
    axes.imshow(np.clip(shown, 0, 1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_axis_off()


def _save(drawn: np.ndarray, is_colour: bool, path: Path) -> None:
    """Write the figure with few grey levels, or a palette."""
    picture = Pillow.fromarray(drawn)
    if is_colour:
        picture.convert("RGB").quantize(_COLOURS, dither=Pillow.Dither.NONE).save(path, optimize=True)
        return
    step = 256 / _GREYS
    levels = [round(int(level // step) * 255 / (_GREYS - 1)) for level in range(256)]
    picture.convert("L").point(levels).save(path, optimize=True)
