"""Fixtures of the tests of the Hub server itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from tests.hub.server import HubServer
from tests.hub.server_tests.samples import CARD, ID, WEIGHTS


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server with a writer ann, a reader of the same name, and a stranger bob; this process may reach it."""
    with HubServer() as server:
        server.add_account("ann", token="hf_ann", orgs=["lab"])
        server.add_account("ann", token="hf_reader", role="read")
        server.add_account("bob", token="hf_bob")
        with server.reached_by_this_process():
            yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_ann")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a card, a configuration, weights and a file in a sub-folder."""
    made = tmp_path / "model"
    (made / "curves").mkdir(parents=True)
    (made / "README.md").write_text(CARD)
    (made / "config.json").write_text('{"model_type": "imgproc_vit", "auto_map": {}}')
    (made / "model.safetensors").write_bytes(WEIGHTS)
    (made / "curves" / "loss.csv").write_text("step,loss\n")
    return made


@pytest.fixture
def published(api: HfApi, folder: Path) -> str:
    """The commit of that folder in ann/vit."""
    api.create_repo(ID)
    return str(api.upload_folder(repo_id=ID, folder_path=folder).oid)
