"""README.md and the pages in docs/ do what they say: every code block runs, and printed output is the output shown.

The conventions, all of them enforced:

- The commands of the bash blocks run first, as they stand, in the order of `PAGES`, by bash, in one empty folder; a
  command that stands on several pages runs once, and long ones do less (`SHORTENED`). Then the python
  blocks, in the same folder and all in one fresh process. Those of a page go on from each other; those of README and
  gallery stand alone, so that a reader can copy any of them. A ```text block right after a python block is its output,
  exactly. The few commands that cannot run here stand in `ELSEWHERE`, each with its reason. What ```diff blocks change
  is checked in tests/test_recipes.py, ```yaml blocks, which are studies, in tests/study.
- Only packages that the README's own installation brings can be imported meanwhile. The processes are forked from one
  that has imported `KNOWN` so, with this environment: what takes most of a short command's time.
- The name of a stock checkpoint stands for a small folder of that name; ``you/…`` is published on, and loaded from, a
  Hub on the loopback.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_imgproc_attn.measure.precision import COMMAND as MEASURE_PRECISION
from hf_imgproc_attn.training_support.tokenizer import train_tokenizer
from tests.helpers import ROOT, interpreter_that_knows, run_command, site_pages
from tests.hub.server import HubServer

README = "README.md"
PAGES = (README, *(f"docs/{page}" for page in site_pages() if (ROOT / "docs" / page).exists()))
"""In the order of the site's navigation, in which they are read, and their commands run."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLATION = 'pip install ".[all]"'
EIGHT_GPUS = (
    "accelerate launch --config_file training/launch/eight_gpus_ddp.yaml training/train_causal_lm.py --preset twicing"
)
LENS_OF_REAL_MODELS = (
    "make lens ARGS=\"--force --model 'Llama of stories=stories260k' "
    "--model 'ViT on CIFAR-10=outputs/cifar10,photographs'\""
)
SHARED_TOKENS = (
    "torchrun --nproc_per_node 2 training/train_causal_lm.py --preset twicing --context_parallel 2 --block_size 128 "
    "--max_steps 5 --output_dir outputs/shared-tokens"
)
RECOVERY = (
    "python training/finetune_real.py sentence-transformers/all-MiniLM-L6-v2 --steps 40 --length 32 "
    "--learning_rate 3e-5 --output outputs/minilm.json"
)
RECOVERY_PLOT = "python training/finetune_real.py --records outputs/minilm.json --plot outputs/recovery.png"
ELSEWHERE = {
    INSTALLATION: "needs a package index; what it brings is checked here, tests/test_packaging.py installs a wheel",
    "make demo": "sets up an environment of its own; tests/training/test_demo.py runs it with few steps",
    "make test": "is what runs this file",
    "make quality": "is what CI runs first",
    SHARED_TOKENS: "takes half a minute; tests/training/test_sharded_runs.py trains a smaller model so",
    EIGHT_GPUS: "needs eight GPUs; tests/training/test_shipped_configs.py reads the file",
    RECOVERY: "takes minutes, and needs real weights; tests/training/test_finetune_real.py trains a tiny encoder so",
    RECOVERY_PLOT: "shows what the command before it wrote; tests/training/test_finetune_real.py draws such a record",
    "imgproc-attn study training/configs/studies/smoke.yaml": "takes two minutes; tests/study runs smaller studies",
    MEASURE_PRECISION: "takes minutes; tests/measure/test_precision.py runs it on small tokens",
    "imgproc-attn app openai-community/gpt2 outputs/vit": "serves until it is stopped; tests/lens/test_app.py does it",
    "imgproc-attn train-image --config training/configs/cifar10_vit.yaml --output_dir outputs/cifar10": (
        "reads CIFAR-10 from the Hub; tests/training/test_shipped_configs.py reads the file"
    ),
    LENS_OF_REAL_MODELS: "needs real weights; tests/lens/test_real_models.py reads the record that it made",
    "imgproc-attn gpu-check": "needs a GPU; tests/measure/test_gpu_check.py rehearses it",
    "imgproc-attn gpu-check --device cpu --output docs/gpu_rehearsal.json --force": "tests/measure/test_gpu_check.py",
    "imgproc-attn gpu-check --render": "writes into a checkout; tests/measure/test_gpu_report.py runs it",
}
"""Commands of the pages that do not run here, and why."""
SHORTENED = {
    f"imgproc-attn train-image --preset {preset} --output_dir outputs/{name}": " --max_steps 20"
    for preset, name in (("softmax", "digits-softmax"), ("bilateral_twicing", "digits"))
} | {
    "imgproc-attn train-lm --preset twicing --config_overrides boosted_layers=[-2,-1] --max_steps 30 "
    "--output_dir outputs/text": " --max_steps 10 --max_eval_samples 100",
    "imgproc-attn train-lm --preset twicing --max_steps 10 --output_dir outputs/words --push_to_hub --hub_model_id "
    "you/words": " --max_steps 5 --max_eval_samples 100",
    "imgproc-attn train-text-classification --preset bilateral --max_steps 30 --output_dir outputs/topics": (
        " --max_steps 10 --max_eval_samples 100"
    ),
    "torchrun --nproc_per_node 2 training/train_image_classification.py --max_steps 40 --output_dir "
    "outputs/two-processes": " --max_steps 10",
    "imgproc-attn train-image --model_name_or_path you/digits --num_train_epochs 1 --output_dir outputs/tuned": (
        " --max_steps 10"
    ),
    "imgproc-attn benchmark --quick --output outputs/benchmark.json": " --suite decode",
    "imgproc-attn robustness outputs/digits --baseline outputs/digits-softmax --severities 1 3 5 --max_samples 100": (
        " --severities 3 --max_samples 40"
    ),
    "imgproc-attn train-segmentation --preset bilateral_twicing --config_overrides segmentation_head=upsampling "
    "hidden_size=32 num_hidden_layers=2 --max_train_samples 200 --max_eval_samples 50 --max_steps 10 --output_dir "
    "outputs/segmentation": " --max_steps 4 --max_train_samples 50",
    "imgproc-attn train-recall --dataset_name noisy_recall --preset twicing --max_steps 20 --max_train_samples 2000 "
    "--max_eval_samples 100 --output_dir outputs/recall": " --max_steps 5 --max_train_samples 500",
    "imgproc-attn train-sequences --dataset_name topic_pairs --preset bilateral --config_overrides "
    "classifier_pooling=mean --max_length 64 --max_steps 20 --max_train_samples 500 --max_eval_samples 50 "
    "--output_dir outputs/pairs": " --max_steps 2 --max_train_samples 20 --max_eval_samples 5",
}
"""Commands that would take half a minute, and what is added to them."""
LONGEST = 600
"""Seconds that a single command may take, on a machine that has other work too."""
KNOWN = (
    "transformers.trainer",
    "transformers.pipelines",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vit.modeling_vit",
    "datasets",
    "hf_imgproc_attn",
)
MARK = "=== next block ==="
STANDING_ALONE = (README, "docs/gallery.md")
"""Pages whose python blocks know nothing of each other."""
RUNNER = f"""
import json, sys
names = {{}}
for path, line, text, scope in json.loads(sys.argv[1]):
    print({MARK!r})
    # Preceded by as many lines as in the file, so that a traceback shows the file's own.
    program = compile(chr(10) * (line - 1) + text, path, "exec")
    exec(program, names.setdefault(scope, {{"__name__": "__main__"}}))
"""
"""Runs programs: path and line of each, its text, and a name for what shares its variables."""


class Block(NamedTuple):
    """A fenced block; ``line`` is its first one in the file."""

    page: str
    line: int
    language: str
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = text_of(page)
    pattern = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text.count("\n", 0, match.start()) + 2, match.group(1), match.group(2))
        for match in pattern.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in fenced_blocks(page)]


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
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    folder = tmp_path_factory.mktemp("pages")
    gpt2 = GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "openai-community" / "gpt2")
    vit = ViTConfig(
        num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=8, image_size=8, patch_size=4
    )
    ViTForImageClassification(vit).save_pretrained(folder / "google" / "vit-base-patch16-224")
    llama = LlamaConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(llama).save_pretrained(folder / "meta-llama" / "Llama-3.2-1B")
    train_tokenizer(["import a name from a module"], 280).save_pretrained(folder / "meta-llama" / "Llama-3.2-1B")
    Image.new("RGB", (8, 8)).save(folder / "zero.png")
    (folder / "training").symlink_to(ROOT / "training", target_is_directory=True)
    return folder


def commands() -> list[str]:
    """The commands of all bash blocks, in order, each once."""
    lines = (line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def installed_by_the_readme() -> set[str]:
    """The distributions that the README's installation brings, by their normalised names."""
    (extras,) = re.fullmatch(r'pip install "\.\[([\w,]+)\]"', INSTALLATION).groups()  # type: ignore[union-attr]
    found: set[str] = set()
    waiting = [Requirement(f"{PROJECT['name']}[{extras}]")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == PROJECT["name"]:
            texts = [*PROJECT["dependencies"]]
            for extra in requirement.extras:
                texts += PROJECT["optional-dependencies"][extra]
        elif name in found:
            continue
        else:
            found.add(name)
            try:
                texts = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # for another system
                continue
        for inner in map(Requirement, texts):
            wanted = any(
                inner.marker is None or inner.marker.evaluate({"extra": e}) for e in ("", *requirement.extras)
            )
            if wanted:
                waiting.append(inner)
    return found


@pytest.fixture(scope="module")
def readme_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with this checkout, on which nothing else can be imported than what the README installs."""
    brought = installed_by_the_readme() | {"pip", "setuptools", canonicalize_name(PROJECT["name"])}
    strangers = [
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not any(canonicalize_name(name) in brought for name in distributions) and module.isidentifier()
    ]
    assert {"pytest", "mypy"} <= set(strangers)
    folder = tmp_path_factory.mktemp("only")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({strangers!r}))\n")
    return f"{folder}{os.pathsep}{ROOT}"


def run(command: str, folder: Path, environment: dict[str, str]) -> None:
    """Run a command, which has to succeed, as a user's shell does."""
    result = run_command(["bash", "-c", command], cwd=folder, env=environment, timeout=LONGEST)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, f"{command}\n{result.stderr}"


@pytest.mark.long
def test_commands_and_then_code(workplace: Path, hub: HubServer, readme_path: str, tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    environment = {
        **hub.environment(tmp_path / "home", "hf_you"),
        "PYTHONPATH": readme_path,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
    }
    with interpreter_that_knows(KNOWN, environment) as python:
        # The file that an installation makes for the command is run in tests/test_packaging.py.
        scripts.mkdir()
        started_by = {"python": "", "imgproc-attn": "-m hf_imgproc_attn.cli", "torchrun": "-m torch.distributed.run"}
        for name, words in started_by.items():
            (scripts / name).write_text(f'#!/bin/sh\nexec {python} {words} "$@"\n', encoding="utf-8")
            (scripts / name).chmod(0o755)
        for command in commands():
            if command not in ELSEWHERE:
                run(command + SHORTENED.get(command, ""), workplace, environment)
        printed = run_blocks(workplace, python, environment)
    two = json.loads((workplace / "outputs/two-processes/run.json").read_text(encoding="utf-8"))
    assert two["device"]["processes"] == 2
    shown = {
        before: after.text
        for before, after in pairwise(BLOCKS)
        if before.language == "python" and after.language == "text"
    }
    assert shown
    assert {block: printed[block] for block in shown} == shown


def run_blocks(folder: Path, python: str, environment: dict[str, str]) -> dict[Block, str]:
    """What the python blocks print, all in one process."""
    programs = [block for block in BLOCKS if block.language == "python"]
    scopes = [f"{block.page}:{block.line}" if block.page in STANDING_ALONE else block.page for block in programs]
    code = json.dumps(
        [
            (str(ROOT / block.page), block.line, block.text, scope)
            for block, scope in zip(programs, scopes, strict=True)
        ]
    )
    result = run_command([python, "-c", RUNNER, code], cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return dict(zip(programs, result.stdout.split(f"{MARK}\n")[1:], strict=True))


def test_what_does_not_run_here_is_there() -> None:
    """Commands that need another machine name targets and files that exist, and none is excused that is not shown."""
    makefile = text_of("Makefile")
    assert {*ELSEWHERE, *SHORTENED} <= set(commands())
    assert commands()[0] == INSTALLATION
    for command in ELSEWHERE:
        words = command.split()
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE)
        for word in words:
            if word.startswith("training/"):
                assert (ROOT / word).is_file()


def test_the_installation_brings_every_extra_that_users_need() -> None:
    brought = installed_by_the_readme()
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra not in ("all", "dev", "docs"):
            named = {canonicalize_name(Requirement(text).name) for text in requirements}
            assert named <= {*brought, canonicalize_name(PROJECT["name"])}, extra
    assert "pytest" not in brought


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_that_is_checked(page: str) -> None:
    blocks = fenced_blocks(page)
    assert text_of(page).count("```") == 2 * len(blocks)
    assert {block.language for block in blocks} <= {"python", "bash", "text", "bibtex", "math", "diff", "yaml"}
    for before, after in pairwise([Block(page, 0, "", ""), *blocks]):
        assert after.language != "text" or before.language == "python"


@pytest.mark.parametrize("page", PAGES)
def test_image_processors_are_imported_as_the_oldest_transformers_has_them(page: str) -> None:
    """5.17 has ``AutoImageProcessor`` at its top only beside torchvision, which nothing here needs."""
    programs = [ast.parse(block.text) for block in fenced_blocks(page) if block.language == "python"]
    for node in (node for program in programs for node in ast.walk(program)):
        if isinstance(node, ast.ImportFrom) and node.module == "transformers":
            assert "AutoImageProcessor" not in {name.name for name in node.names}, node.lineno


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """To files of the repository and, in pages, to headings."""
    for path, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text_of(page)):
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{path}#{anchor}"


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in a link."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_readme_is_short_and_in_the_order_a_reader_needs() -> None:
    text = text_of(README)
    assert len(text.splitlines()) <= 230
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Install",
        "Ten lines",
        "Two commands",
        "Does it help?",
        "Gallery",
        "Pages",
        "Citing",
    ]


def test_every_page_is_linked() -> None:
    """By the README, in the order of the navigation; those for contributors by CONTRIBUTING.md."""
    linked = re.findall(r"^\| \[[^\]]+\]\(([^)]+)\) \|", text_of(README), re.MULTILINE)
    for_contributors = re.findall(r"\((docs/contributing/[^)]+)\)", text_of("CONTRIBUTING.md"))
    assert (*linked, *for_contributors) == PAGES[1:]
