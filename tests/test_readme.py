"""README.md does what it says: every code block runs, and printed output is the output shown.

The conventions, all of them enforced:

- The commands of the bash blocks run first, in order, in an empty folder; then the python blocks, in order, in one
  fresh process in the same folder. A ```text block right after a python block is its output, exactly.
- A command has one of the forms that `check_command` knows. Training commands run as shown, but for two steps; what
  takes minutes or installs something is checked for its parts, and runs elsewhere (the comments say where).
- The name of a stock checkpoint stands for a small folder of that name; ``you/…`` is published on, and loaded from, a
  Hub on the loopback.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

from hf_imgproc_attn import PRESETS
from tests.helpers import ROOT, RunPython
from tests.hub.server import HubServer

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL_RUN = ["--max_steps", "2", "--use_cpu", "true", "--max_train_samples", "512", "--max_eval_samples", "64"]
MARK = "=== next block ==="


class Block(NamedTuple):
    """A fenced block of the README."""

    line: int
    language: str
    text: str


def fenced_blocks() -> list[Block]:
    """All fenced blocks, in order."""
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(README.count("\n", 0, match.start()) + 2, match.group(1), match.group(2))
        for match in pattern.finditer(README)
    ]


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A Hub with the account ``you``."""
    with HubServer() as server:
        server.add_account("you", token="hf_you")
        yield server
    server.check()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with stand-ins for the Hub names, and the scripts at the place where a checkout has them."""
    from PIL import Image
    from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("readme")
    gpt2 = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "openai-community" / "gpt2")
    vit = ViTConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTForImageClassification(vit).save_pretrained(folder / "google" / "vit-base-patch16-224")
    Image.new("RGB", (8, 8)).save(folder / "zero.png")
    (folder / "training").symlink_to(ROOT / "training", target_is_directory=True)
    return folder


def check_command(line: str, workplace: Path, environment: dict[str, str]) -> None:
    """Run one command of a bash block, or check its parts where it takes minutes or installs something."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["pip", "install"]:
        # The installation itself: `make` in a fresh environment, and tests/test_packaging.py.
        (target,) = words[2:]
        extras = set(re.fullmatch(r"\.(?:\[([\w,]+)\])?", target).group(1).split(","))  # type: ignore[union-attr]
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        assert extras <= set(project["optional-dependencies"])
    elif words[0] == "make":
        # `make test` is what runs this file; `make demo` has its own test with small settings in tests/training.
        (target,) = words[1:]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif words[0] == "imgproc-attn":
        is_training = words[1].startswith("train-")
        run(
            [sys.executable, "-m", "hf_imgproc_attn.cli", *words[1:], *(SMALL_RUN if is_training else [])],
            workplace,
            environment,
        )
    elif words[0] == "torchrun":
        assert words[3].startswith("training/train_")
        run([sys.executable, "-m", "torch.distributed.run", *words[1:], *SMALL_RUN], workplace, environment)
    elif words[:3] == ["accelerate", "launch", "--config_file"]:
        # Needs the machines that the file describes.
        assert words[3].startswith("training/launch/")
        assert words[4].startswith("training/train_")
        assert (ROOT / words[3]).is_file()
        assert (ROOT / words[4]).is_file()
    else:
        pytest.fail(f"README.md shows a command that no test knows how to check: {line}")


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command that has to succeed."""
    result = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"


def test_commands_and_then_code(
    workplace: Path, hub: HubServer, run_python: RunPython, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {**hub.environment(tmp_path / "home", "hf_you"), "PYTHONPATH": str(ROOT)}
    blocks = fenced_blocks()
    for block in blocks:
        if block.language == "bash":
            for line in filter(None, block.text.replace("\\\n", " ").splitlines()):
                check_command(line, workplace, environment)

    programs = [block for block in blocks if block.language == "python"]
    code = "".join(f"print({MARK!r})\n{block.text}" for block in programs)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_python("-c", code, cwd=workplace)
    assert result.returncode == 0, result.stderr
    printed = dict(zip((block.line for block in programs), result.stdout.split(f"{MARK}\n")[1:], strict=True))
    shown = {
        before.line: after.text
        for before, after in pairwise(blocks)
        if before.language == "python" and after.language == "text"
    }
    assert shown
    assert {line: printed[line] for line in shown} == shown


def test_every_block_has_a_language_that_is_checked() -> None:
    blocks = fenced_blocks()
    assert README.count("```") == 2 * len(blocks)
    assert {block.language for block in blocks} == {"python", "bash", "text", "bibtex"}
    for before, after in pairwise(blocks):
        assert after.language != "text" or before.language == "python"


def test_every_preset_has_its_row_in_the_table_of_variants() -> None:
    section = README.partition("## What the variants are")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(PRESETS)


def test_sections_are_in_the_order_a_reader_needs() -> None:
    assert re.findall(r"^## (.*)$", README, re.MULTILINE) == [
        "Install",
        "Ten lines",
        "Two commands",
        "What the variants are",
        "Filters on images",
        "In your own model",
        "Training your own",
        "Converting",
        "Publishing",
        "Loading from the Hub",
        "What works with what",
        "Speed",
        "Citing",
    ]


def test_links_to_files_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_commands_that_no_test_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="curl"):
        check_command("curl https://example.org", tmp_path, {})
