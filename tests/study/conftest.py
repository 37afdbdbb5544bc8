"""A study of tiny models that ends in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

WriteStudy = Callable[..., Path]

TINY_TASK: dict[str, Any] = {
    "task": "image-classification",
    "options": {
        "max_steps": 3,
        "per_device_train_batch_size": 16,
        "max_train_samples": 64,
        "max_eval_samples": 32,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "config_overrides": {
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
        },
    },
}  # fmt: skip


def tiny_study(**changes: Any) -> dict[str, Any]:
    """The content of a study of two variants, two seeds and one task."""
    content = {
        "name": "tiny",
        "version": 1,
        "baseline": "softmax",
        "seeds": 2,
        "variants": ["softmax", "twicing"],
        "tasks": {"digits": TINY_TASK},
    }
    return {name: value for name, value in {**content, **changes}.items() if value != "left out"}


@pytest.fixture
def write_study(tmp_path: Path) -> WriteStudy:
    """``write_study(field=value)`` -> the YAML file of the tiny study with such fields; ``"left out"`` removes one."""
    import yaml

    def write(*, file: str = "study.yaml", **changes: Any) -> Path:
        path = tmp_path / file
        path.write_text(yaml.safe_dump(tiny_study(**changes)), encoding="utf-8")
        return path

    return write
