"""The faults of the tests' Hub server, as the real client meets them."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest
from huggingface_hub import (
    HfApi,
    constants,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
)

from tests.helpers import ROOT, run_command, started
from tests.hub.server import HubServer
from tests.hub.server_tests.samples import ID, WEIGHTS, outcome

# What the client talks with: httpx before huggingface-hub 2.
httpx = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
# The client uploads large files in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.mark.parametrize(("route", "status"), [("upload", 500), ("preupload", 429), ("lfs_batch", 503)])
def test_a_failure_that_the_client_retries(hub: HubServer, api: HfApi, folder: Path, route: str, status: int) -> None:
    fault = hub.fail(route, status=status, retry_after=0)
    api.create_repo(ID)
    sha = api.upload_folder(repo_id=ID, folder_path=folder).oid
    assert hub.repo(ID).files(sha)["model.safetensors"] == WEIGHTS
    assert fault.hits == 1
    assert [entry.status for entry in hub.requests(route)][:2] == [status, 200]
    hub.check()


@pytest.mark.parametrize("route", ["create_repo", "info", "commit", "tag"])
def test_a_failure_that_the_client_does_not_retry(hub: HubServer, api: HfApi, published: str, route: str) -> None:
    hub.fail(route, status=429, retry_after=7)
    calls = {
        "create_repo": lambda: api.create_repo("ann/new"),
        "info": lambda: api.model_info(ID),
        "commit": lambda: api.upload_file(path_or_fileobj=b"a", path_in_repo="a", repo_id=ID),
        "tag": lambda: api.create_tag(ID, tag="v1"),
    }
    with pytest.raises(HfHubHTTPError, match="429 Too Many Requests") as caught:
        calls[route]()
    assert caught.value.response.headers["Retry-After"] == "7"
    calls[route]()


def test_the_hub_is_down_until_it_is_healed(hub: HubServer, api: HfApi, published: str, tmp_path: Path) -> None:
    hub.fail(status=503, times=None)
    for _ in range(3):
        assert outcome(lambda: api.model_info(ID)) == 503
    hub.heal()
    assert outcome(lambda: api.model_info(ID)) == 200


def test_a_commit_whose_reply_is_lost_is_made_once(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(ID)
    hub.lose_reply("commit")
    with pytest.raises(httpx.RemoteProtocolError):
        api.upload_folder(repo_id=ID, folder_path=folder)
    made = hub.repo(ID).head
    assert hub.repo(ID).files()["model.safetensors"] == WEIGHTS
    assert api.upload_folder(repo_id=ID, folder_path=folder).oid == made
    assert hub.requests("commit")[0].status == 0
    hub.check()


def test_a_cut_download(hub: HubServer, api: HfApi, published: str, tmp_path: Path) -> None:
    hub.cut(after=100, path="*.safetensors")
    path = api.hf_hub_download(ID, "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert [(entry.status, entry.fault) for entry in hub.requests("download")] == [(200, "cut"), (200, None)]


def test_a_reset_download(hub: HubServer, api: HfApi, published: str, tmp_path: Path) -> None:
    hub.cut(after=100, reset=True)
    with pytest.raises(httpx.ReadError):
        api.hf_hub_download(ID, "model.safetensors", cache_dir=tmp_path)
    assert hub.requests("download")[-1].fault == "reset"
    assert Path(api.hf_hub_download(ID, "model.safetensors", cache_dir=tmp_path)).read_bytes() == WEIGHTS


def test_a_cut_download_resumes_where_it_ended(
    hub: HubServer, api: HfApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    api.create_repo(ID)
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id=ID)
    hub.cut(after=2500)
    assert Path(api.hf_hub_download(ID, "model.bin", cache_dir=tmp_path)).read_bytes() == WEIGHTS
    assert [(entry.status, entry.range) for entry in hub.requests("download")] == [(200, None), (206, "bytes=2000-")]
    hub.check()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_byte_is_found_by_the_checksums_alone(
    hub: HubServer, api: HfApi, published: str, tmp_path: Path, name: str
) -> None:
    hub.flip_byte(at=5, path=f"*/{name}")
    local = Path(api.snapshot_download(ID, cache_dir=tmp_path))
    got, sent = (local / name).read_bytes(), hub.repo(ID).files()[name]
    assert [i for i in range(len(sent)) if got[i] != sent[i]] == [5]
    found = api.verify_repo_checksums(ID, cache_dir=tmp_path)
    assert [mismatch["path"] for mismatch in found.mismatches] == [name]


def test_a_client_killed_in_the_middle_of_an_upload(hub: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    api.create_repo(ID)
    (folder / "model.safetensors").write_bytes(WEIGHTS * 2000)  # more than the sockets hold
    fault = hub.stall("upload")
    worker = [sys.executable, "-m", "tests.hub.server_tests.client_worker", "upload", str(folder)]
    environment = {**hub.environment(tmp_path / "home", token="hf_ann"), "PYTHONPATH": str(ROOT)}
    with started(worker, env=environment, cwd=tmp_path) as process:
        assert fault.reached.wait(60)
        process.kill()
    assert len(hub.repo(ID).commits()) == 1, "nothing was committed"
    again = run_command(worker, env=environment, timeout=60, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["commit"] == hub.repo(ID).head
    assert [(entry.status, entry.fault) for entry in hub.requests("upload")] == [(0, "stall"), (200, None)]
    hub.check()


def test_a_released_upload_goes_on(hub: HubServer, api: HfApi, folder: Path) -> None:
    api.create_repo(ID)
    fault = hub.stall("upload")
    future = api.upload_folder(repo_id=ID, folder_path=folder, run_as_future=True)
    assert fault.reached.wait(60)
    assert not future.done()
    hub.heal()
    assert future.result(60).oid == hub.repo(ID).head
    hub.check()


def test_a_fault_names_a_route(hub: HubServer) -> None:
    with pytest.raises(ValueError, match="route must match one of .*'commit'.*, got 'comit'"):
        hub.fail("comit")
    with pytest.raises(ValueError, match='role must be "write" or "read", got \'admin\''):
        hub.add_account("eve", token="hf_eve", role="admin")
