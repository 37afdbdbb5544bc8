"""The recipes in docs/contributing/ work: their changes are made in a copy of the repository, where the tests pass.

A recipe's changes are its ```diff blocks. A line ``--- path`` names the file that the lines below change: those that
begin with a blank or ``-`` stand there, one after the other and nowhere else, and become those that begin with a blank
or ``+``; a line ``@@`` begins the next place in the same file. A line ``+++ path`` names a new file.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT, RunPython

RECIPES = ROOT / "docs" / "contributing"
TOYS = {"content-kernel": "half_gaussian", "position-kernel": "log_distance", "booster": "smoothstep"}
"""page -> what it adds, a preset of that name too."""
CHANGED = ("hf_imgproc_attn", "tests", "docs")
LINKED = ("training", "model_cards", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "mkdocs.yml", "pyproject.toml")


def apply(page: str, root: Path) -> set[str]:
    """Make the changes of a recipe below ``root``; returns the files that were changed."""
    text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
    changed = set()
    for block in re.findall(r"^```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        for part in re.split(r"^(?=--- |\+\+\+ )", block, flags=re.MULTILINE)[1:]:
            head, _, body = part.partition("\n")
            path = root / head[4:]
            changed.add(head[4:])
            if head.startswith("+++"):
                assert not path.exists(), f"{page}.md makes {head[4:]}, which is there"
                path.write_text("".join(line[1:] for line in body.splitlines(keepends=True)), encoding="utf-8")
                continue
            for place in body.split("@@\n"):
                lines = place.splitlines(keepends=True)
                assert {line[0] for line in lines} <= set(" -+")
                before = "".join(line[1:] for line in lines if line[0] != "+")
                after = "".join(line[1:] for line in lines if line[0] != "-")
                source = path.read_text(encoding="utf-8")
                found = f"\n{source}".count(f"\n{before}")
                assert found == 1, f"{page}.md: these lines are {found} times in {head[4:]}, should be once:\n{before}"
                path.write_text(f"\n{source}".replace(f"\n{before}", f"\n{after}")[1:], encoding="utf-8")
    return changed


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    """A copy of the repository with all recipes carried out, and the files that each has changed."""
    root = tmp_path_factory.mktemp("recipes")
    for folder in CHANGED:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "fixtures"))
    for name in LINKED:
        (root / name).symlink_to(ROOT / name)
    return root, {page: apply(page, root) for page in TOYS}


def test_what_was_added_passes_the_tests(copy: tuple[Path, dict[str, set[str]]], run_python: RunPython) -> None:
    """Those that the recipes write, and those that run through the presets and the values of an axis."""
    root, _ = copy
    chosen = [
        "tests/models/test_half_gaussian.py",
        "tests/models/test_log_distance.py",
        "tests/models/test_spec_fields.py",
        # Of the many that run through the presets: agreement of back-ends, decoding with padding, conversion.
        "tests/models/test_gpt2_model.py::test_eager_equals_sdpa",
        "tests/models/test_vit_model.py::test_eager_equals_sdpa",
        "tests/models/test_gpt2_generation.py::test_cached_logits_with_padding",
        "tests/test_conversion.py::test_there_and_back",
        "tests/test_propositions.py::test_4_every_booster_that_is_an_operator_is_covered",
        "tests/test_propositions.py::test_4_spectrum_of_the_boosted_operator",
        "tests/catalogue/test_table.py",
        "tests/test_docs.py",
        "tests/test_flat_room.py",
    ]
    names = " or ".join(
        [*TOYS.values(), "registries", "every_value_of_an_axis", "every_preset", "is_covered", "flat_room"]
    )
    result = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen, "-k", names, cwd=root, path=root)
    assert result.returncode == 0, result.stdout[-5000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None
    assert int(passed[1]) > 80


def test_every_file_of_a_recipe_is_in_its_list(copy: tuple[Path, dict[str, set[str]]]) -> None:
    for page, changed in copy[1].items():
        text = (RECIPES / f"{page}.md").read_text(encoding="utf-8")
        listed = set(re.findall(r"`([\w/.]+)`", "".join(re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE))))
        for path in changed:
            assert "tests/" if path.startswith("tests/") else path.removeprefix("hf_imgproc_attn/") in listed, path
        assert all((copy[0] / "hf_imgproc_attn" / name).exists() or (copy[0] / name).exists() for name in listed)
