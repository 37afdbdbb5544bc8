"""Committed runs, as fixtures."""

from __future__ import annotations

import pytest

from hf_imgproc_attn.cards.rendering import RunResults, load_results
from tests.cards.card_cases import RESULTS


@pytest.fixture
def images() -> RunResults:
    return load_results(RESULTS / "vit_digits_bilateral.json")


@pytest.fixture
def text() -> RunResults:
    return load_results(RESULTS / "gpt2_pydoc_twicing.json")


@pytest.fixture
def stock() -> RunResults:
    return load_results(RESULTS / "vit_digits_softmax.json")
