"""The code that travels with a checkpoint: what it may do, and the report where it is not the package's."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from hf_imgproc_attn import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.hub.travelling_code import ROOM, audit, audit_folder, differing_files, missing_imports
from tests.models.helpers import tiny_gpt2_config

LOGGER = "hf_imgproc_attn.hub.travelling_code"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved checkpoint with its code."""
    torch.manual_seed(0)
    ImgProcGPT2LMHeadModel(tiny_gpt2_config("twicing")).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def warnings_of_a_load(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """Transformers' loggers do not propagate to the root."""
    monkeypatch.setattr(logging.getLogger(LOGGER), "propagate", True)
    caplog.set_level("WARNING", logger=LOGGER)
    return caplog


def test_what_travels_reads_no_file_opens_no_connection_and_runs_no_text() -> None:
    assert audit_folder(ROOM) == []
    assert len(list(ROOM.glob("*.py"))) > 10


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("import socket", "imports socket"),
        ("import urllib.request", "imports urllib.request"),
        ("from subprocess import run", "imports subprocess.run"),
        ("import numpy as np", "imports numpy"),
        ("import pickle", "imports pickle"),
        ("import importlib", "imports importlib"),
        ("import sys as innocent", "imports sys under another name, innocent"),
        ("from sys import modules", "imports sys.modules"),
        ("sys.modules['os'].remove(path)", "uses sys.modules"),
        ("sys.modules.get('os')", "uses sys.modules"),
        ("sys.modules.get(name)", "uses sys.modules"),
        ("sys.exit(1)", "uses sys.exit"),
        ("from os import system", "imports os.system"),
        ("import os as innocent", "imports os under another name, innocent"),
        ("import torch.utils.cpp_extension", "imports torch.utils.cpp_extension"),
        ("from torch import hub", "imports torch.hub"),
        ("from torch.hub import load", "imports torch.hub.load"),
        ("from huggingface_hub.hf_api import HfApi", "imports huggingface_hub.hf_api.HfApi"),
        ("os.remove(path)", "uses os.remove"),
        ("os.environ['HF_TOKEN']", "uses os.environ"),
        ("torch.load(path)", "uses torch.load"),
        ("torch.jit.load(path)", "uses torch.jit.load"),
        ("save = torch.save", "uses torch.save"),
        ("path.write_text('x')", "uses path.write_text"),
        ("open('x')", "uses open"),
        ("eval('1')", "uses eval"),
        ("exec('x = 1')", "uses exec"),
        ("__import__('os')", "uses __import__"),
        ("torch.ops.load_library('x.so')", "uses torch.ops.load_library"),
        ("def f(:", "is not Python"),
    ],
)
def test_what_a_model_has_no_need_for_is_found(line: str, what: str) -> None:
    first, *rest = audit(f"import torch\n{line}\n")
    assert first.startswith(f"line 2: {what}")
    assert all(finding.startswith("line 2: uses sys.") for finding in rest)


@pytest.mark.parametrize(
    "line",
    [
        "import re; re.compile('x')",
        "torch.compile(model)",
        "model.eval()",
        "from torch import nn",
        "import os; name: os.PathLike = x",
        "from transformers import GPT2Model",
        "import sys; sys.modules.get('peft.utils.constants')",
        "from .spec_fields import PRESETS",
    ],
)
def test_what_models_do_is_allowed(line: str) -> None:
    assert audit(f"import torch\n{line}\n") == []


def test_imports_that_are_not_there_are_found_directly_or_not(saved: Path) -> None:
    start = ["modeling_imgproc_gpt2.py"]
    assert missing_imports(saved, start) == []
    for name in ("kernel_content.py", "spec_axes.py"):
        (saved / name).unlink()
    found = missing_imports(saved, start)
    assert {finding.partition(" ")[0] for finding in found} == {"kernel_content.py", "spec_axes.py"}
    for finding in found:
        name, importer = finding.removesuffix(")").split(" (imported by ")
        assert f"from .{name.removesuffix('.py')} import" in (saved / importer).read_text(encoding="utf-8")
    (saved / "a.py").write_text("from . import b, c\nfrom .d.e import f\n", encoding="utf-8")
    (saved / "c.py").write_text("from .a import x\n", encoding="utf-8")
    assert missing_imports(saved, ["a.py"]) == ["b.py (imported by a.py)", "d.py (imported by a.py)"]


def test_saved_code_is_the_packages(saved: Path, warnings_of_a_load: pytest.LogCaptureFixture) -> None:
    assert differing_files(saved) == []
    assert len(list(saved.glob("*.py"))) > 10
    ImgProcGPT2LMHeadModel.from_pretrained(saved)
    assert warnings_of_a_load.messages == []


def test_changed_code_is_reported_when_the_package_loads_it(
    saved: Path, warnings_of_a_load: pytest.LogCaptureFixture
) -> None:
    with (saved / "spec_fields.py").open("a", encoding="utf-8") as file:
        file.write("# changed\n")
    shutil.copy(saved / "spec_fields.py", saved / "helper.py")
    assert differing_files(saved) == ["helper.py (not a file of the package)", "spec_fields.py"]
    ImgProcGPT2LMHeadModel.from_pretrained(saved)
    (message,) = warnings_of_a_load.messages
    assert "differs from this package's in helper.py (not a file of the package), spec_fields.py" in message
    assert str(saved) in message


def test_a_checkpoint_without_code_has_nothing_to_report(
    saved: Path, warnings_of_a_load: pytest.LogCaptureFixture
) -> None:
    config = json.loads((saved / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]
    (saved / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (saved / "spec_fields.py").write_text("# changed\n", encoding="utf-8")
    ImgProcGPT2LMHeadModel.from_pretrained(saved)
    assert warnings_of_a_load.messages == []
