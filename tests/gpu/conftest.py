"""Triton exists for Linux only; elsewhere its tests have nothing to test."""

from __future__ import annotations

import sys

collect_ignore = [] if sys.platform == "linux" else ["test_triton.py", "test_hub_kernel.py"]
