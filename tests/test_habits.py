"""What contributors and CI run is one and the same, and a release leaves no file behind."""

from __future__ import annotations

import re

import yaml

import hf_imgproc_attn
from tests.helpers import ROOT


def recipe(target: str) -> list[str]:
    """The commands of a target of the Makefile, with the folder of its programs written out."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, re.MULTILINE)
    assert found is not None
    return [line.strip() for line in found[1].splitlines()]


def test_commits_are_checked_by_what_quality_runs() -> None:
    """And by nothing that would have to be downloaded first."""
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (repository,) = settings["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == recipe("quality")
    for hook in repository["hooks"]:
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_ci_runs_quality_and_tests() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("make ")] == ["make quality", "make test"]


def test_every_version_has_its_changes() -> None:
    """The newest version of the changelog is the package's; dates fall, and each version has its checkpoints."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    versions = [re.fullmatch(r"(\d+\.\d+\.\d+) \((\d{4}-\d\d-\d\d)\)", title) for title in titles[1:]]
    assert titles[0] == "Unreleased"
    assert all(versions)
    numbers, dates = zip(*(found.groups() for found in versions if found), strict=True)
    assert numbers[0] == hf_imgproc_attn.__version__
    assert list(dates) == sorted(dates, reverse=True)
    saved = {path.name.removeprefix("saved_by_") for path in (ROOT / "tests" / "fixtures").glob("saved_by_*")}
    assert saved == set(numbers)
