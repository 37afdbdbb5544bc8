"""The operators in the form of a kernel of the Hub: its files, and that they stand by themselves."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from hf_imgproc_attn.gpu import hub_kernel
from tests.helpers import RunPython


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernel") / "kernel"
    hub_kernel.build(folder)
    return folder


def test_layout_is_that_of_the_hub(built: Path) -> None:
    assert {path.name for path in built.iterdir()} == {
        "build.toml", "flake.nix", "CARD.md", "LICENSE", "torch-ext", "build"
    }  # fmt: skip
    settings = tomllib.loads((built / "build.toml").read_text(encoding="utf-8"))
    assert (settings["general"]["name"], settings["general"]["backends"]) == (hub_kernel.NAME, ["cuda"])
    assert (built / "torch-ext" / settings["general"]["name"].replace("-", "_") / "__init__.py").is_file()
    variant = built / "build" / "torch-cuda"
    metadata = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))
    assert metadata.keys() == {"id", "name", "version", "license", "backend", "digest"}
    assert metadata["id"].isidentifier()
    assert metadata["digest"]["files"] == {
        path.relative_to(variant).as_posix(): hub_kernel.digest(path.read_text(encoding="utf-8"))
        for path in variant.rglob("*.py")
    }


def test_operators_are_registered_under_the_build_s_own_name(built: Path) -> None:
    for path in built.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert f'"{hub_kernel.NAMESPACE}::' not in text, path
        assert f"torch.ops.{hub_kernel.NAMESPACE}" not in text, path
    again = built.parent / "again"
    identifier = hub_kernel.build(again)
    assert identifier in (built / "build" / "torch-cuda" / "_ops.py").read_text(encoding="utf-8")


def test_it_is_imported_without_the_package_and_refuses_what_it_cannot_do(built: Path, run_python: RunPython) -> None:
    code = (
        "import sys, torch, imgproc_attention as kernel\n"
        "assert not any(name.startswith(('hf_imgproc_attn', 'transformers')) for name in sys.modules)\n"
        "query = torch.zeros(1, 1, 2, 16)\n"
        "try:\n"
        "    kernel.fused_attention(query, query, query)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "print(sorted(kernel.__all__)[-2:])\n"
    )
    result = run_python("-c", code, path=built / "build" / "torch-cuda")
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        "the Triton kernels need tensors on a GPU, got cpu\n['decode_attention', 'fused_attention']\n"
    )


def test_a_folder_that_is_not_empty_is_left_alone(built: Path) -> None:
    with pytest.raises(ValueError, match="the folder for the kernel must be empty or not there, got"):
        hub_kernel.build(built)


def test_what_a_kernel_may_not_import_is_found() -> None:
    with pytest.raises(ValueError, match="may import torch and Triton only, got transformers in models/"):
        hub_kernel.reached(("models/layer_filter.py", "models/modeling_shared.py"))
