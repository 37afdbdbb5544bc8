"""Which checkpoint a run goes on from, and the filters of a saved model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hf_imgproc_attn import ImgProcGPT2LMHeadModel
from hf_imgproc_attn.cards.filters import recorded
from hf_imgproc_attn.training_support.checkpoints import (
    incomplete_because,
    newest_complete_checkpoint,
    saved_filters,
)
from tests.models.helpers import sharpen_
from tests.models.variants import gpt2_config


def write_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}), encoding="utf-8")
    save_file({"weight": np.arange(600.0)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(100.0)}, folder / name)
    return folder


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 50])


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json"),
    "cut state": (lambda folder: cut_text(folder / "trainer_state.json"), "trainer_state.json is cut off"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "cut weights": (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is cut off"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is cut off"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer.pt"),
    "cut optimizer": (lambda folder: cut(folder / "optimizer.pt"), "optimizer.pt is cut off"),
    "empty optimizer": (lambda folder: (folder / "optimizer.pt").write_bytes(b""), "optimizer.pt is cut off"),
    "no scheduler": (lambda folder: (folder / "scheduler.pt").unlink(), "no scheduler.pt"),
    "no random state": (lambda folder: (folder / "rng_state.pth").unlink(), "no rng_state.pth"),
    "empty folder": (lambda folder: empty(folder), "no trainer_state.json"),
}


def cut_text(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8")[:-3], encoding="utf-8")


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_incomplete_newest_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    older, newest = write_checkpoint(tmp_path / "checkpoint-9"), write_checkpoint(tmp_path / "checkpoint-10")
    assert newest_complete_checkpoint(tmp_path) == newest  # by number, not by name
    harm, reason = DAMAGES[damage]
    harm(newest)
    assert incomplete_because(newest) == reason
    with pytest.warns(UserWarning, match=rf"checkpoint-10 is incomplete and is passed over: {reason}"):
        assert newest_complete_checkpoint(tmp_path) == older


def test_sharded_weights_need_every_file(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "model.safetensors").rename(folder / names[0])
    assert incomplete_because(folder) == f"no {names[1]}"
    shutil.copy(folder / names[0], folder / names[1])
    assert incomplete_because(folder) is None


def test_every_process_has_its_random_state(tmp_path: Path) -> None:
    """As many as the run's record says; without a record, no gap."""
    folder = write_checkpoint(tmp_path / "checkpoint-1")
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert incomplete_because(folder) is None
    (tmp_path / "run.json").write_text(json.dumps({"device": {"processes": 3}}), encoding="utf-8")
    assert incomplete_because(folder) == "no rng_state_1.pth"
    for rank in (1, 2):
        shutil.copy(folder / "rng_state_0.pth", folder / f"rng_state_{rank}.pth")
    assert incomplete_because(folder) is None
    cut(folder / "rng_state_2.pth")
    assert incomplete_because(folder) == "rng_state_2.pth is cut off"
    (tmp_path / "run.json").unlink()
    (folder / "rng_state_2.pth").rename(folder / "rng_state_3.pth")
    assert incomplete_because(folder) == "no rng_state_2.pth"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", ["pytorch_model_fsdp_0", "optimizer_0"])
def test_folders_of_shards_are_whole(tmp_path: Path, name: str) -> None:
    """As FSDP2 writes them: a table of contents, and each process's share of the length that it says."""
    import torch.distributed.checkpoint as dcp

    folder = write_checkpoint(tmp_path / "checkpoint-1")
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").unlink()
    for part in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"weight": torch.arange(600.0)}, checkpoint_id=folder / part, no_dist=True)
    assert incomplete_because(folder) is None
    (share,) = (folder / name).glob("*.distcp")
    content = share.read_bytes()
    share.write_bytes(content[:-9])
    assert incomplete_because(folder) == f"{name} has a {share.name} that is cut off"
    share.unlink()
    assert incomplete_because(folder) == f"{name} has no {share.name}"
    share.write_bytes(content)
    cut(folder / name / ".metadata")
    assert incomplete_because(folder) == f"{name} has a .metadata that is cut off"
    (folder / name / ".metadata").unlink()
    assert incomplete_because(folder) == f"{name} has no .metadata"


def test_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-last").mkdir()
    (tmp_path / "checkpoint-3").write_text("a file", encoding="utf-8")
    assert newest_complete_checkpoint(tmp_path) is None
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None


def test_filters_are_read_from_the_files(tmp_path: Path) -> None:
    """Of several files, without any weights but the scalars; where these are missing there are no numbers."""
    model = sharpen_(ImgProcGPT2LMHeadModel(gpt2_config("bilateral")))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert saved_filters(tmp_path) == recorded(model.filter_summary())
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert saved_filters(tmp_path) is None
    ImgProcGPT2LMHeadModel(gpt2_config("twicing")).save_pretrained(tmp_path)
    assert saved_filters(tmp_path)["learned"] == []
