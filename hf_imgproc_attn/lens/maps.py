"""What one token receives from where, kernel by kernel, in every head."""

from __future__ import annotations

import base64
import importlib.util
import io

import torch

from ..models.backend_call import FilterCall
from ..models.backend_reference import filter_logits, filter_matrix
from .rows import apply_operator_by_rows, filter_rows, has_operator, position_rows, rows_of, some_samples
from .shares import mean_effects

PICTURE_SIDE = 96
"""Pixels of the longer side of the picture in a report."""


def small_picture(pixels: torch.Tensor) -> str:
    """A model's image ``[channels, height, width]``, from its darkest to its brightest number, as PNG in base64.

    Empty where Pillow is not installed, or for an image of NaN.
    """
    if importlib.util.find_spec("PIL") is None or not bool(pixels.isfinite().all()):
        return ""
    from PIL import Image

    image = pixels.detach().double().cpu()
    image = image if image.shape[0] in (1, 3) else image.mean(0, keepdim=True)
    spread = (image.max() - image.min()).clamp(min=1e-12)
    bytes_of = ((image - image.min()) / spread * 255).round().to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0)
    picture = Image.fromarray(bytes_of.numpy())
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def filter_maps(
    call: FilterCall, types: torch.Tensor | None, real: torch.Tensor | None, token: int
) -> dict[str, list[list[float]]]:
    """Rows of weights of the first sample, ``[heads][length]`` for each kernel.

    ``content``: the weights if positions counted for nothing, and ``position`` if content did. Where the layer has a
    position kernel these are its two kernels. Else they are told apart by mean effects over the batch (see
    ``shares``): position is the constant and the position part of the query with the position part of the keys,
    content is all but the positions. ``product``: A. ``operator``: what multiplies V, where that is not A.

    Args:
        call: of all samples.
        types: token types ``[batch, length]``, or None.
        real: boolean ``[batch, length]`` or None.
        token: the row, a query.
    """
    first = some_samples(call, slice(0, 1))
    row = rows_of(first, token, token + 1)
    dtype = torch.float64
    whole = next(rows for rows in filter_rows(first) if rows.start <= token < rows.stop)
    at = token - whole.start
    maps = {"product": _full(whole.weights[:, :, at : at + 1], call)}
    if first.positions:
        keys = row.key.shape[-2]
        logits = sum(position_rows(term, token, token + 1, keys, dtype) for term in first.positions)
        heads = logits.expand(1, call.query.shape[1], 1, keys)  # type: ignore[union-attr]
        maps["position"] = _full(filter_matrix(heads, row.visibility._replace(bias=None)), call)
        maps["content"] = _full(filter_matrix(filter_logits(row._replace(positions=())), row.visibility), call)
    elif call.query.shape[0] > 1:
        maps |= _by_means(call, row, types, real, token)
    if has_operator(call):
        # Row i of p(A) is column i of its transpose.
        unit = torch.zeros(1, call.query.shape[1], call.query.shape[-2], 1, dtype=dtype)
        unit[:, :, token] = 1.0
        maps["operator"] = apply_operator_by_rows(first, unit, transposed=True)[0, :, :, 0].tolist()
    order = ("content", "position", "product", "operator")
    return {name: maps[name] for name in order if name in maps}


def _by_means(
    call: FilterCall, row: FilterCall, types: torch.Tensor | None, real: torch.Tensor | None, token: int
) -> dict[str, list[list[float]]]:
    query = {name: part[:1, :, token : token + 1] for name, part in mean_effects(call.query, types, real).items()}
    keys = call.key.repeat_interleave(call.groups, dim=1)
    key = {name: part[:1, :, : row.key.shape[-2]] for name, part in mean_effects(keys, types, real).items()}
    scale = row.content.scale
    position = ((query["constant"] + query["position"]) * scale) @ key["position"].mT
    contents = query["constant"] + query["content"] + query["rest"]
    content = (contents * scale) @ (key["content"] + key["rest"]).mT
    visible = row.visibility._replace(bias=None)
    return {
        "position": _full(filter_matrix(position, visible), call),
        "content": _full(filter_matrix(content, visible), call),
    }


def _full(weights: torch.Tensor, call: FilterCall) -> list[list[float]]:
    """``[1, heads, 1, keys]`` to ``[heads][length]``, 0 for keys that come later."""
    missing = call.key.shape[-2] - weights.shape[-1]
    rows: list[list[float]] = torch.nn.functional.pad(weights[0, :, 0].double(), (0, missing)).tolist()
    return rows
