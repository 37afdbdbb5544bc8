"""The distributions: what is inside, and that an installed wheel works away from the checkout."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest

import hf_imgproc_attn
from tests.helpers import ROOT, RunPython, run_command

# One worker builds and installs for all tests of this file.
pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of what git would see."""
    folder = tmp_path_factory.mktemp("distributions")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "data", "outputs", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--sdist",
        "--outdir",
        str(folder),
        str(source),
    ]
    result = run_command(build, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


@pytest.fixture(scope="session")
def installed(distributions: Path) -> Path:
    """The wheel, installed without its dependencies into a folder of its own."""
    target = distributions / "installed"
    (wheel,) = distributions.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    result = run_command([*pip, str(wheel)], timeout=300)
    assert result.returncode == 0, result.stderr
    return target


def test_wheel_holds_the_package_and_the_training_scripts(installed: Path) -> None:
    package = installed / "hf_imgproc_attn"
    assert (package / "py.typed").is_file()
    for folder, carried in (("hf_imgproc_attn", package), ("training", package / "training")):
        expected = {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.py")}
        expected |= {path.relative_to(ROOT / folder) for path in (ROOT / folder).rglob("*.yaml")}
        found = {path.relative_to(carried) for path in carried.rglob("*") if path.suffix in (".py", ".yaml")}
        assert expected
        assert expected <= found
    template = Path("model_cards") / "template.md"
    assert (package / template).read_bytes() == (ROOT / template).read_bytes()
    assert [path.name for path in (package / "model_cards").iterdir()] == ["template.md"]
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {
        "bin",
        "hf_imgproc_attn",
    }


def test_metadata(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    metadata = (info / "METADATA").read_text(encoding="utf-8")
    assert f"Version: {hf_imgproc_attn.__version__}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    requirements = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    runtime = {line.split()[1].split(">")[0] for line in requirements if "extra ==" not in line}
    assert runtime == {"torch", "transformers", "safetensors", "huggingface-hub"}
    assert {
        "train",
        "peft",
        "robustness",
        "study",
        "cluster",
        "viz",
        "hub",
        "kernels",
        "filters",
        "lens",
        "app",
        "docs",
        "all",
        "dev",
    } == {line.split()[1] for line in metadata.splitlines() if line.startswith("Provides-Extra")}
    scripts = configparser.ConfigParser()
    scripts.read(info / "entry_points.txt")
    assert dict(scripts["console_scripts"]) == {"imgproc-attn": "hf_imgproc_attn.cli:main"}
    assert (info / "licenses" / "LICENSE").is_file()


def test_sdist_is_complete(distributions: Path) -> None:
    (archive,) = distributions.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for name in (
        "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CITATION.cff", "CONTRIBUTING.md",
        "CHANGELOG.md", "mkdocs.yml", "docs/hooks.py", ".pre-commit-config.yaml",
        ".ci/run", "hf_imgproc_attn/py.typed", "training/train_causal_lm.py", "model_cards/template.md",
        "tests/test_packaging.py",
    ):  # fmt: skip
        assert name in names


def test_installed_command_runs_away_from_the_checkout(installed: Path, run_python: RunPython, tmp_path: Path) -> None:
    """Help of the command and of a script, then two training steps on the digits, all from the wheel's own files."""
    command = str(installed / "bin" / "imgproc-attn")
    where = run_python("-c", "import hf_imgproc_attn; print(hf_imgproc_attn.__file__)", path=installed, fresh=True)
    assert Path(where.stdout.strip()).is_relative_to(installed)
    shown = run_python(command, "--help", path=installed, fresh=True)
    assert shown.returncode == 0, shown.stderr
    assert "train-image" in shown.stdout
    shown = run_python(command, "train-image", "--help", path=installed, fresh=True)
    assert shown.returncode == 0, shown.stderr
    assert "--preset" in shown.stdout

    options = ["--preset", "bilateral_twicing", "--max_steps", "2", "--use_cpu", "true", "--output_dir", "run"]
    trained = run_python(command, "train-image", *options, path=installed, fresh=True)
    assert trained.returncode == 0, trained.stderr
    saved = json.loads((tmp_path / "cwd" / "run" / "config.json").read_text())
    assert (saved["model_type"], saved["boosting"], saved["position_kernel"]) == ("imgproc_vit", "twicing", "untied")
    assert (tmp_path / "cwd" / "run" / "model.safetensors").stat().st_size > 0


def test_package_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["hatch"]["version"]["path"] == "hf_imgproc_attn/__init__.py"
    assert f"version: {hf_imgproc_attn.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_make_tries_every_python_of_the_metadata() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert f">={named[0]}" == project["requires-python"]
    (tried,) = re.findall(r"^PYTHON \?= (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"python{version}" for version in named} <= set(tried.split())


def test_constraints_satisfy_every_requirement() -> None:
    """Each package that pyproject.toml names is pinned, to a version inside its own range."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pinned[requirement.name.lower()]), requirement


def test_makefile_refuses_an_old_python(tmp_path: Path) -> None:
    """`make` says what is missing where no Python is new enough, before it creates anything."""
    old = tmp_path / "python-old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    result = run_command(
        ["make", "setup", f"PYTHON={old} no-such-python"],
        cwd=tmp_path,
        env=environment,
        timeout=60,
    )
    assert result.returncode != 0
    assert "no Python >= 3.11" in result.stderr
    assert not (tmp_path / ".venv").exists()
