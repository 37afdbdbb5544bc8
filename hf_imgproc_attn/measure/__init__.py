"""Measurements: time and memory (``benchmark``), rounding (``precision``)."""
