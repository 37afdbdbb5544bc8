"""Fixtures of the tests of measuring."""

from __future__ import annotations

import io
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set like CIFAR-10, of a few images of noise."""
    import numpy as np
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    folder = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for split, count in (("train", 64), ("test", 20)):
        encoded = []
        for _ in range(count):
            stream = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(stream, "PNG")
            encoded.append({"bytes": stream.getvalue(), "path": None})
        table = pyarrow.table({"img": encoded, "label": [index % 10 for index in range(count)]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder
