"""Fixtures of the tests of the models folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.models.helpers import tiny_gpt2_config, tiny_vit_config

TINY = {"gpt2": tiny_gpt2_config, "vit": tiny_vit_config}


@pytest.fixture(params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """A constructor of a tiny configuration, of each backbone."""
    return TINY[request.param]
