"""A Hub on the loopback that this process may reach, and small finished runs to publish on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hf_imgproc_attn.hub import verification
from tests.hub.server import HubServer
from tests.models.variants import made_once
from tests.training.conftest import TINY_GPT2, TINY_VIT

TOKEN = "hf_ann_may_write"
READER = "hf_ann_may_read"

COMMON = ["--disable_tqdm", "true", "--use_cpu", "--save_strategy", "no", "--max_eval_samples", "40", "--seed", "3"]
IMAGE_RUN = [*COMMON, "--max_steps", "6", "--logging_steps", "2", "--config_overrides", *TINY_VIT]
TEXT_RUN = [*COMMON, "--max_steps", "3", "--block_size", "32", "--tokenizer_vocab_size", "300",
            "--max_train_samples", "300", "--config_overrides", *TINY_GPT2]  # fmt: skip

CopyOfRun = Callable[..., Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, prepared_processes: None, tmp_path: Path) -> Iterator[HubServer]:
    """The server; this process and its children are logged in as ann, who may write. Ends with the server's check."""
    with HubServer() as server:
        server.add_account("ann", token=TOKEN)
        server.add_account("ann", token=READER, role="read")
        server.add_account("bob", token="hf_bob")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        for name, value in server.environment(tmp_path / "home", TOKEN).items():
            if name.startswith("HF_"):
                monkeypatch.setenv(name, value)
        with server.reached_by_this_process():
            yield server
        server.check()
        assert not any(TOKEN in entry.path or READER in entry.path for entry in server.transcript)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of finished runs: ``vit`` and ``gpt2`` (bilateral_twicing), ``vit_softmax``."""

    def make(folder: Path) -> None:
        import train_causal_lm
        import train_image_classification

        for name, preset in (("vit", "bilateral_twicing"), ("vit_softmax", "softmax")):
            words = [*IMAGE_RUN, "--preset", preset, "--output_dir", str(folder / name)]
            assert train_image_classification.main(words) == 0
        words = [*TEXT_RUN, "--preset", "bilateral_twicing", "--output_dir", str(folder / "gpt2")]
        assert train_causal_lm.main(words) == 0

    return made_once(tmp_path_factory, "hub_runs", make)


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> CopyOfRun:
    """``run("vit")``: a copy of a finished run, to publish or to spoil."""

    def copy(name: str = "vit") -> Path:
        return Path(shutil.copytree(runs / name, tmp_path / "runs" / name))

    return copy


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Takes it as done that runs load and that commits come back unchanged, which costs seconds; the commits."""
    commits: list[str] = []

    def check(endpoint: str | None, *arguments: str) -> dict[str, Any]:
        if endpoint is not None:
            commits.append(arguments[1])
        return {"class": "ImgProcViTForImageClassification"}

    monkeypatch.setattr(verification, "_run_fresh_process", check)
    return commits
