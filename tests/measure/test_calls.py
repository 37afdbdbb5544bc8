"""One layer's call stays short: the figures of ``measure.calls`` within their goals."""

from __future__ import annotations

import pytest

from hf_imgproc_attn import cli
from hf_imgproc_attn.measure import calls


def test_one_call_is_short() -> None:
    figures = calls.record(calls.layer_call()).figures()
    assert figures["functions"] <= 45
    assert figures["files"] < 10
    assert figures["depth"] <= 12


def test_it_is_packed_once_and_the_back_end_is_chosen_once() -> None:
    names = [function for _, function in calls.record(calls.layer_call()).calls]
    assert names.count("AttentionFilter.compose") == 1
    assert names.count("choose_backend") == 1


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["calls", "--list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert " functions, " in printed[0]
    assert any("AttentionFilter.compose" in line for line in printed[1:])
