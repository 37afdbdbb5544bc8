"""Which algorithm serves a call on a device: what was measured there, and nothing unmeasured that programs wait in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from hf_imgproc_attn.gpu import flash, measured
from hf_imgproc_attn.models.backend_call import Booster, Content, FilterCall
from hf_imgproc_attn.models.visibility import attention_visibility

choice = pytest.importorskip("hf_imgproc_attn.gpu.choice")

ROWS = (
    ("a GPU", True, False, 12, 2048, 64, ("two_calls FA4", "wavefront", "general")),
    ("a GPU", True, True, 12, 2048, 64, ("wavefront", "single_pass")),
    ("a GPU", False, False, 12, 2048, 64, ("wavefront", "general")),
    ("a GPU", True, False, 96, 16384, 64, ("single_pass",)),
)


def a_query(batch: int = 1, heads: int = 12, length: int = 2048, head_dim: int = 64) -> Any:
    """What a choice looks at of a query on a GPU."""
    return SimpleNamespace(shape=(batch, heads, length, head_dim), is_cuda=True, device="cuda", requires_grad=False)


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(name="a GPU", major=9, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)


@pytest.mark.usefixtures("a_gpu")
def test_what_was_not_measured_is_chosen_by_products() -> None:
    """And so never the wavefront, nor two calls: 132 heads fill the device, 12 and 133 do not."""
    chosen = [choice.choose(a_query(heads=heads), True) for heads in (12, 132, 133, 264)]
    assert chosen == ["general", "single_pass", "general", "single_pass"]
    assert choice.choose(a_query(), False) == "general"
    assert choice.choose(a_query(length=197), False) == "short"


@pytest.mark.usefixtures("a_gpu")
def test_what_was_measured_on_the_device_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURED", ROWS)
    assert choice.choose(a_query(), True) == "wavefront"
    assert choice.choose(a_query(), True, backward=True) == "wavefront"
    assert choice.choose(a_query(), True, backward=True, deterministic=True) == "single_pass"
    assert choice.choose(a_query(), False) == "general"  # it is causal only
    assert choice.choose(a_query(length=16384), True) == "general"  # too far in batch and heads
    assert choice.choose(a_query(), True, boosted=False) == "general"
    monkeypatch.setattr(measured, "MEASURED", tuple(("another", *row[1:]) for row in ROWS))
    assert choice.choose(a_query(), True) == "general"


def test_nearest_row_decides() -> None:
    def order(shape: tuple[int, ...], device: str = "a GPU") -> tuple[str, ...]:
        return measured.measured_order(device, shape, is_causal=True, backward=False, rows=ROWS)

    assert order((1, 12, 3000, 64)) == ROWS[0][-1]
    assert order((8, 12, 9000, 64)) == ("single_pass",)
    assert order((1, 12, 2048, 64), "another") == order((1, 25, 2048, 64)) == order((1, 12, 2048, 256)) == ()


@pytest.mark.usefixtures("a_gpu")
def test_two_calls_win_only_where_activated_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with mock.patch.object(torch.Tensor, "is_cuda", True):
        query = torch.zeros(1, 12, 2048, 64)
        seen = attention_visibility(None, shape=(1, 12, 2048, 2048), causal=True)
        call = FilterCall(query, query, query, Content("dot_product", 0.125), seen, booster=Booster("twicing"))
        assert not flash.wins(call)
        monkeypatch.setattr(measured, "MEASURED", ROWS)
        assert not flash.wins(call)
        monkeypatch.setattr(flash, "active", lambda: "FA4")
        assert flash.wins(call)
        assert not flash.wins(call._replace(booster=Booster("twicing", 3)))
        assert not flash.wins(call._replace(query=query.requires_grad_()))  # there the wavefront is first
        monkeypatch.setattr(flash, "active", lambda: "FA3")
        assert not flash.wins(call)


def test_what_is_not_installed_is_not_activated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "PACKAGES", {"FA3": "hf_imgproc_attn", "FA4": "no_such.package"})
    assert flash.installed() == ("FA3",)
    with pytest.raises(ValueError, match="flash implementation must be installed, one of FA3, got 'FA4'"):
        flash.activate("FA4")
    assert flash.active() is None
