"""CIFAR-10 from Parquet files, without ``datasets``: columns of encoded images and of labels become 8-bit tensors."""

from __future__ import annotations

import importlib.util
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .parts import Refused

IMAGE_COLUMNS, LABEL_COLUMN = ("img", "image"), "label"


class Images(NamedTuple):
    """Pixels ``[images, 3, side, side]``, 8 bits, and labels ``[images]``."""

    pixels: torch.Tensor
    labels: torch.Tensor


def read(folder: Path | None) -> tuple[Images, Images]:
    """The train and test images of a folder with ``train-*.parquet`` and ``test-*.parquet``.

    Raises:
        Refused: if there is no such folder, file or column, or pyarrow or Pillow is missing.
    """
    if folder is None or not folder.is_dir():
        raise Refused(f"no data: --data must be a folder with train-*.parquet and test-*.parquet, got {folder}")
    missing = [name for name in ("pyarrow", "PIL", "numpy") if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"no data can be read: {', '.join(missing)} is not installed")
    return _split(folder, "train"), _split(folder, "test")


def _split(folder: Path, split: str) -> Images:
    import pyarrow.parquet

    files = sorted(folder.glob(f"{split}-*.parquet"))
    if not files:
        raise Refused(f"no data: {folder.name} has no {split}-*.parquet")
    encoded: list[bytes] = []
    labels: list[int] = []
    for file in files:
        table = pyarrow.parquet.read_table(file)
        column = next((name for name in IMAGE_COLUMNS if name in table.column_names), None)
        if column is None or LABEL_COLUMN not in table.column_names:
            raise Refused(f"no data: {file.name} needs columns img or image, and label, has {table.column_names}")
        encoded += [image["bytes"] if isinstance(image, dict) else image for image in table[column].to_pylist()]
        labels += table[LABEL_COLUMN].to_pylist()
    with ThreadPoolExecutor(8) as pool:  # Pillow decodes outside Python's lock
        pixels = list(pool.map(_decode, encoded, chunksize=512))
    return Images(torch.stack(pixels), torch.tensor(labels))


def _decode(encoded: bytes) -> torch.Tensor:
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(encoded)) as image:
        array: Any = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)
