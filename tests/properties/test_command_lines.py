"""Generated command lines with a mistake in each: one line on standard error and exit status 2, nothing written."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import hypothesis
import pytest
from hypothesis import strategies as st

from hf_imgproc_attn import cli
from hf_imgproc_attn.library_fields import training_fields
from tests.properties.strategies import examples

parser = cli.build_parser()
(COMMANDS,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
TRAINING = [name for name in cli.TRAINING_SCRIPTS if name != "evaluate"]
WORDS = ("", " ", "-", "--", "-1x", "nan", "1e", "0x", "é", "\udcff", "a b", "=", "no/such/folder/file", "[", "{", "'")
NUMBERS = {name: kind for name, kind in training_fields().items() if kind in ("int", "float")}


@st.composite
def own_options(draw: Any) -> list[str]:
    """A sub-command, and an option that there is not, one without its value, or with a value of another kind."""
    name = draw(st.sampled_from(sorted(set(COMMANDS) - set(cli.TRAINING_SCRIPTS))))
    actions = [action for action in COMMANDS[name]._actions if action.option_strings and action.dest != "help"]
    mistakes = ["unknown", "rest"]
    valued = [action for action in actions if action.nargs is None]
    typed = [action for action in valued if action.type in (int, float) or action.choices]
    mistakes += ["missing"] * 3 * bool(valued) + ["kind"] * 3 * bool(typed)
    mistake = draw(st.sampled_from(mistakes))
    if mistake == "unknown":
        return [name, draw(st.sampled_from(["--nothing", "--forc", "-q", "--output_dirr=1", "--\udcff", "--é=1"]))]
    if mistake == "rest":
        return [name, *["x"] * 40, "--nothing"]
    if mistake == "missing":
        return [name, draw(st.sampled_from(valued)).option_strings[-1]]
    return [
        name,
        draw(st.sampled_from(typed)).option_strings[-1],
        draw(st.sampled_from(WORDS[4:]).filter(not_a_number)),
    ]


@st.composite
def training_options(draw: Any) -> list[str]:
    """A training command with a number that is none, an unknown option, or a path that is no folder."""
    name = draw(st.sampled_from(TRAINING))
    mistake = draw(st.sampled_from(["number", "number", "unknown", "word", "preset", "path", "config", "override"]))
    word = draw(st.sampled_from(WORDS).filter(not_a_number))
    if mistake == "number":
        return [name, f"--{draw(st.sampled_from(sorted(NUMBERS)))}={word or 'x'}"]
    if mistake == "unknown":
        return [name, f"--{draw(st.sampled_from(['nothing', 'learning-rat', 'é', 'seeds']))}", word or "x"]
    if mistake == "word":
        return [name, word or "x"]
    if mistake == "preset":
        return [name, "--preset", word or "x"]
    if mistake == "path":
        option = draw(st.sampled_from(["dataset_name", "model_name_or_path"]))
        return [
            name,
            f"--{option}",
            draw(st.sampled_from(["./nowhere", "/no/such/file", "~/no/such/file", "./\udcff"])),
        ]
    if mistake == "config":
        return [name, "--config", draw(st.sampled_from(["nowhere.yaml", ".", "", "\udcff", "/"]))]
    value = draw(st.sampled_from(["boosting_steps", "=", "boosting_step=3", "=3", "\udcff=1", "é=1"]))
    return [name, "--config_overrides", value]


@pytest.fixture(scope="module", autouse=True)
def _one_parser() -> Iterator[None]:
    """The parser of all commands takes longer to build than to use."""
    with mock.patch.object(cli, "build_parser", return_value=parser):
        yield


def not_a_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word not in ("", "none", "null")
    return False


def check(command: list[str], folder: Path) -> None:
    out, error = io.StringIO(), io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            try:
                status = cli.main(command)
            except SystemExit as ending:
                status = int(ending.code or 0)
    finally:
        os.chdir(before)
    lines = error.getvalue().splitlines()
    assert status == 2, (command, status, out.getvalue()[-300:], lines[-3:])
    assert len(lines) == 1, lines
    assert lines[0].startswith(("error: ", "imgproc-attn: error: ")), lines
    lines[0].encode(errors="backslashreplace")
    assert not list(folder.iterdir()), list(folder.iterdir())


@examples(150, 5_000)
@hypothesis.given(own_options())
def test_mistakes_in_own_options_are_one_line(tmp_path_factory: pytest.TempPathFactory, command: list[str]) -> None:
    check(command, empty(tmp_path_factory))


@examples(100, 5_000)
@hypothesis.given(training_options())
def test_mistakes_in_training_options_are_one_line(
    tmp_path_factory: pytest.TempPathFactory, command: list[str]
) -> None:
    check(command, empty(tmp_path_factory))


def empty(factory: pytest.TempPathFactory) -> Path:
    folder = factory.getbasetemp() / "command-lines"
    folder.mkdir(exist_ok=True)
    return folder
