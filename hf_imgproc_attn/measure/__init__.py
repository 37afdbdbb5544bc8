"""Measurements: time and memory (``benchmark``), rounding (``precision``), what only a GPU tells (``gpu_check``)."""
