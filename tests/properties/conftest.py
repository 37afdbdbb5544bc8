"""Whether a run makes all examples; the workers of pytest-xdist know it from their options alone."""

from __future__ import annotations

import pytest

from tests.properties import strategies


def pytest_configure(config: pytest.Config) -> None:
    strategies.FULL = bool(config.getoption("--full"))
