"""Pictures over tokens: what one of them receives from where, and what the filter removes of each."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image as Pillow

from .report import LayerReport, Report

SEQUENTIAL, DIVERGING = "cividis", "PuOr"
"""Colours of what is positive, and of what has both signs (orange is negative); colour-blind people read them."""
TILES = 12
"""Heads that stand beside each other over an image; further ones stand below them."""


def draw_maps(report: Report, layer: LayerReport) -> Figure | None:
    """Kernels x heads: where the chosen token receives from, over the image or along the text."""
    if not layer.maps:
        return None
    if report.grid is None:
        return _text_maps(report, layer)
    return _tiles(report, layer.maps, report.token)


TILE = 96
"""Pixels of the longer side of a map over an image."""
OVERLAY = 0.65
"""How much of a map over an image is the map; the rest is the image in grey."""


def _tiles(report: Report, maps: dict[str, list[list[float]]], token: int | None) -> Figure:
    """A row a map and a tile a head over the image, which stands first; one picture a row, which is quick to draw."""
    rows, columns = report.grid or (1, 1)
    factor = max(1, TILE // max(rows, columns))
    shape = (rows * factor, columns * factor)
    image = _image_of(report, shape)
    heads = len(next(iter(maps.values())))
    strips = [
        (name, start, values[start : start + TILES])
        for name, values in maps.items()
        for start in range(0, heads, TILES)
    ]
    tiles = min(heads, TILES) + (image is not None)
    width, height = 1.25 * tiles * min(1.0, columns / rows) + 0.35, 1.3 * len(strips) * min(1.0, rows / columns) + 0.25
    figure = Figure(figsize=(width, height))  # laid out by hand, which takes a fraction of the time
    grid = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    space = 0.04 if heads <= TILES else 0.25  # for the numbers of heads above each strip
    figure.subplots_adjust(0.3 / width, 0.05 / height, 1.0 - 0.05 / width, 1.0 - 0.25 / height, hspace=space)
    for number, (axes, (name, start, values)) in enumerate(zip(grid, strips, strict=True)):
        pictures = [
            _coloured(np.array(each)[report.special :].reshape(rows, columns), image, shape) for each in values
        ]
        labels = [f"head {start + head}" for head in range(len(values))]
        if image is not None:
            pictures.insert(0, image)
            labels.insert(0, "input")
        missing = [np.ones((*shape, 3))] * (tiles - len(pictures))
        gap = np.ones((shape[0], 4, 3))
        axes.imshow(np.concatenate([part for each in (*pictures, *missing) for part in (each, gap)][:-1], axis=1))
        starts = np.arange(len(pictures)) * (shape[1] + 4)
        place = -1 if token is None else token - report.special
        if place >= 0:
            down, across = ((index + 0.5) * factor - 0.5 for index in (place // columns, place % columns))
            axes.plot(starts + across, [down] * len(starts), "+", color="red", markersize=6)
        is_named = number == 0 or heads > TILES
        axes.set_xticks(starts + shape[1] / 2, labels if is_named else [""] * len(starts), fontsize=7)
        axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_ylabel(name, fontsize=8)
    return figure


def _image_of(report: Report, shape: tuple[int, int]) -> Any:
    """The first image in colours from 0 to 1, ``[rows, columns, 3]``; None where the report has none."""
    if not report.picture:
        return None
    with Pillow.open(io.BytesIO(base64.b64decode(report.picture))) as picture:
        return np.asarray(picture.convert("RGB").resize((shape[1], shape[0]))) / 255.0


def _coloured(values: Any, image: Any, shape: tuple[int, int]) -> Any:
    """A map in colours, over the image in grey; negative weights have colours of their own."""
    most = np.abs(values).max() or 1.0
    has_negative = values.min() < -1e-9
    share = (values / most + 1.0) / 2.0 if has_negative else values / most
    colours = colormaps[DIVERGING if has_negative else SEQUENTIAL](share)[..., :3]
    factors = [whole // part for whole, part in zip(shape, values.shape, strict=True)]
    colours = colours.repeat(factors[0], axis=0).repeat(factors[1], axis=1)
    if image is None:
        return colours
    return OVERLAY * colours + (1.0 - OVERLAY) * image.mean(-1, keepdims=True)


def _text_maps(report: Report, layer: LayerReport) -> Figure:
    """One strip a kernel, heads below each other, the tokens as text below."""
    kernels, heads = list(layer.maps), len(layer.heads)
    figure = Figure(figsize=(11.0, len(kernels) * (0.55 + 0.16 * heads)), layout="constrained")
    grid = figure.subplots(len(kernels), 1, squeeze=False, sharex=True)
    for axes, kernel in zip(grid[:, 0], kernels, strict=True):
        weights = np.array(layer.maps[kernel])
        if weights.min() < -1e-9:
            most = np.abs(weights).max()
            image = axes.imshow(weights, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        else:
            image = axes.imshow(weights, cmap=SEQUENTIAL, aspect="auto")
        axes.axvline(report.token, color="red", linewidth=0.8)
        axes.set_ylabel(f"{kernel}\nhead", fontsize=7)
        axes.tick_params(labelsize=6)
        figure.colorbar(image, ax=axes, pad=0.01)
    _name_tokens(grid[-1, 0], report)
    return figure


MOST_NAMED = 128
"""Tokens that are named below a picture."""


def _name_tokens(axes: Any, report: Report) -> None:
    labels = report.labels or [str(i) for i in range(report.length)]
    if len(labels) <= MOST_NAMED:
        shown = [label.strip().replace("$", r"\$")[:10] or "·" for label in labels]
        axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=6)


def draw_removed(report: Report, layer: LayerReport) -> Figure | None:
    """Method noise |v - p(A) v| of each token."""
    if not layer.method_noise_map:
        return None
    values = np.array(layer.method_noise_map)
    if report.grid is None:
        figure = Figure(figsize=(11.0, 1.1 + 0.16 * len(values)), layout="constrained")
        grid = figure.subplots(1, 1, squeeze=False)
        image = grid[0, 0].imshow(values, cmap=SEQUENTIAL, aspect="auto")
        grid[0, 0].set_ylabel("head")
        grid[0, 0].set_xlabel("token")
        _name_tokens(grid[0, 0], report)
        figure.colorbar(image, ax=grid[0, 0], pad=0.01)
        return figure
    return _tiles(report, {"removed": values.tolist()}, None)
