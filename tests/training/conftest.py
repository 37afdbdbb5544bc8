"""Small data sets on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WriteImages = Callable[..., Path]
WriteText = Callable[..., Path]

TINY_VIT = ["hidden_size=16", "num_hidden_layers=2", "num_attention_heads=2", "intermediate_size=32"]
TINY_GPT2 = ["n_embd=16", "n_layer=2", "n_head=2"]


def random_images(count: int, size: int = 8, seed: int = 0) -> list[Any]:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in pixels]


@pytest.fixture
def write_images(tmp_path: Path) -> WriteImages:
    """``write_images("name", train=[labels], test=[labels], size=8, names=("img", "label"))`` -> a parquet folder."""
    import datasets

    def write(name: str, size: int = 8, names: tuple[str, str] = ("img", "label"), **splits: list[int]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        features = datasets.Features(
            {names[0]: datasets.Image(), names[1]: datasets.ClassLabel(names=["a", "b", "c"])}
        )
        for seed, (split, labels) in enumerate(splits.items()):
            columns = {names[0]: random_images(len(labels), size, seed), names[1]: labels}
            datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
        return folder

    return write


@pytest.fixture
def write_text(tmp_path: Path) -> WriteText:
    """``write_text("name", train=[lines], column="text")`` -> a parquet folder."""
    import datasets

    def write(name: str, column: str = "text", **splits: list[str]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for split, lines in splits.items():
            datasets.Dataset.from_dict({column: lines}).to_parquet(folder / f"{split}.parquet")
        return folder

    return write
