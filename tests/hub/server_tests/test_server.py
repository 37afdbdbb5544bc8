"""The tests' Hub server, seen by the real client and by Transformers: every operation, and large files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
)
from huggingface_hub.errors import (
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.helpers import ROOT, prepared_python, run_command
from tests.hub.server import HubServer
from tests.hub.server_tests.samples import ID, WEIGHTS, outcome

# The client uploads large files in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


def test_a_folder_becomes_a_repository(
    hub: HubServer, api: HfApi, folder: Path, published: str, tmp_path: Path
) -> None:
    expected = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    stored = hub.repo(ID)
    assert {k: v for k, v in stored.files(published).items() if k != ".gitattributes"} == expected
    assert stored.head == published
    assert len(published) == 40

    info = api.model_info(ID, files_metadata=True)
    assert (info.sha, info.private, info.pipeline_tag) == (published, False, "image-classification")
    assert info.card_data is not None
    assert info.card_data.license == "apache-2.0"
    assert info.card_data.eval_results[0].metric_value == 0.5
    assert {"license:apache-2.0", "dataset:cifar10", "custom_code", "safetensors"} <= set(info.tags or [])
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    assert {k: v for k, v in sizes.items() if k != ".gitattributes"} == {k: len(v) for k, v in expected.items()}
    assert all(sibling.size is None for sibling in api.repo_info(ID).siblings or [])
    assert api.model_info(ID, expand=["sha"]).siblings is None

    entries = {entry.path: entry for entry in api.list_repo_tree(ID, recursive=True, expand=True)}
    assert set(entries) == {".gitattributes", "curves", *expected}
    assert entries["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert entries["config.json"].lfs is None
    assert entries["curves"].last_commit.oid == published
    assert entries[".gitattributes"].last_commit.title == "initial commit"
    assert [entry.path for entry in api.list_repo_tree(ID, "curves")] == ["curves/loss.csv"]
    assert [found.path for found in api.get_paths_info(ID, ["config.json", "none"])] == ["config.json"]

    cache = tmp_path / "cache"
    local = Path(api.snapshot_download(ID, revision=published, cache_dir=cache))
    assert {str(p.relative_to(local)): p.read_bytes() for p in local.rglob("*") if p.is_file()} == stored.files()
    verified = api.verify_repo_checksums(ID, revision=published, cache_dir=cache)
    assert (verified.checked_count, verified.mismatches, verified.missing_paths) == (5, [], [])
    hub.check()


def test_history_branches_and_tags(hub: HubServer, api: HfApi, published: str) -> None:
    api.create_tag(ID, tag="v1.0", tag_message="first")
    api.create_branch(ID, branch="draft/one")
    later = api.upload_file(path_or_fileobj=b"2", path_in_repo="two.txt", repo_id=ID, revision="draft/one").oid
    refs = api.list_repo_refs(ID)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": published, "draft/one": later}
    assert {ref.ref: ref.target_commit for ref in refs.tags} == {"refs/tags/v1.0": published}
    assert [commit.commit_id for commit in api.list_repo_commits(ID, revision="draft/one")][:2] == [later, published]
    assert "two.txt" in api.list_repo_files(ID, revision="draft/one")
    assert "two.txt" not in api.list_repo_files(ID, revision="v1.0")
    assert hub.repo(ID).tags == {"v1.0": published}

    assert outcome(lambda: api.create_tag(ID, tag="v1.0")) == 409
    api.create_tag(ID, tag="v1.0", exist_ok=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(ID, tag="v2", revision="nothing")
    with pytest.raises(RevisionNotFoundError):
        api.delete_tag(ID, tag="v3")
    api.delete_tag(ID, tag="v1.0")
    api.delete_branch(ID, branch="draft/one")
    assert outcome(lambda: api.delete_branch(ID, branch="main")) == 403
    assert (hub.repo(ID).tags, list(hub.repo(ID).branches)) == ({}, ["main"])
    hub.check()


def test_commits(hub: HubServer, api: HfApi, folder: Path, published: str) -> None:
    assert api.upload_folder(repo_id=ID, folder_path=folder).oid == published, "nothing changed: no commit"
    assert len(hub.repo(ID).commits()) == 2
    (folder / "config.json").write_text('{"model_type": "imgproc_vit", "depth": 2}')
    uploads = len(hub.requests("upload"))
    second = api.upload_folder(repo_id=ID, folder_path=folder, commit_message="deeper").oid
    assert len(hub.requests("upload")) == uploads, "the weights are there already"

    operations = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationDelete("curves/"),
        CommitOperationAdd("empty.safetensors", b""),
        CommitOperationAdd(".gitignore", b"*.tmp\n"),
        CommitOperationAdd("left.tmp", b"x"),
    ]
    third = api.create_commit(ID, operations, commit_message="third", commit_description="why", parent_commit=second)
    changed = set(hub.repo(ID).files(third.oid)) ^ set(hub.repo(ID).files(second))
    assert changed == {"copy.safetensors", "curves/loss.csv", "empty.safetensors", ".gitignore"}
    assert hub.repo(ID).files()["copy.safetensors"] == WEIGHTS
    titles = [(commit.title, commit.message) for commit in hub.repo(ID).commits()]
    assert titles[:2] == [("third", "why"), ("deeper", "")]

    add = [CommitOperationAdd("a.txt", b"a")]
    assert outcome(lambda: api.create_commit(ID, add, commit_message="late", parent_commit=second)) == 412
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("nothing.txt", ID)
    hub.check()


def test_lists_come_in_pages_and_large_objects_in_parts() -> None:
    with HubServer(page_size=2, part_size=1000) as small, small.reached_by_this_process():
        small.add_account("ann", token="hf_ann")
        api = HfApi(endpoint=small.url, token="hf_ann")
        api.create_repo(ID)
        for index in range(3):
            api.upload_file(path_or_fileobj=b"%d" % index, path_in_repo=f"{index}.txt", repo_id=ID)
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id=ID)
        assert api.list_repo_files(ID) == [".gitattributes", "0.txt", "1.txt", "2.txt", "model.bin"]
        assert len(api.list_repo_commits(ID)) == 5
        assert small.repo(ID).files()["model.bin"] == WEIGHTS
        assert len(small.requests("upload", "PUT")) == 3
        small.check()


def test_repositories_are_made_hidden_listed_and_deleted(hub: HubServer, api: HfApi, published: str) -> None:
    assert api.whoami()["name"] == "ann"
    assert api.create_repo("vit", exist_ok=True).repo_id == ID
    assert outcome(lambda: api.create_repo(ID)) == 409
    assert api.create_repo("lab/secret", private=True).repo_id == "lab/secret"
    bob = HfApi(endpoint=hub.url, token="hf_bob")
    assert [model.id for model in bob.list_models(author="ann", filter="custom_code")] == [ID]
    (listed,) = bob.list_models(search="vit")
    assert (listed.card_data, listed.siblings, listed.sha) == (None, None, None)
    (listed,) = bob.list_models(search="vit", full=True, cardData=True)
    assert listed.card_data is not None
    assert (listed.card_data.license, listed.sha) == ("apache-2.0", published)
    assert [model.id for model in api.list_models(search="secret", full=True)] == ["lab/secret"]
    assert list(api.list_models(filter=["custom_code", "gguf"])) == []
    assert list(bob.list_models(author="lab")) == []
    api.update_repo_settings(ID, visibility="private")
    with pytest.raises(RepositoryNotFoundError):
        bob.model_info(ID)
    api.auth_check(ID, write=True)
    api.delete_repo(ID)
    assert not api.repo_exists(ID)
    api.delete_repo(ID, missing_ok=True)
    hub.check()


def test_downloads(hub: HubServer, api: HfApi, published: str, tmp_path: Path) -> None:
    chosen: dict[str, Any] = {"cache_dir": tmp_path / "cache"}
    path = api.hf_hub_download(ID, "model.safetensors", **chosen)
    assert Path(path).read_bytes() == WEIGHTS
    (entry,) = hub.requests("download")
    assert (entry.status, entry.role) == (200, "none"), "the token stays with the Hub"
    assert Path(api.hf_hub_download(ID, "config.json", revision=published, **chosen)).parent == Path(path).parent
    assert api.file_exists(ID, "curves/loss.csv")
    assert not api.file_exists(ID, "no.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(ID, "no.txt", **chosen)
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(ID, "config.json", revision="v9", **chosen)
    hub.check()


def test_transformers_trains_pushes_and_loads(hub: HubServer, tmp_path: Path) -> None:
    def work(home: str, *arguments: str) -> dict[str, Any]:
        environment = {**hub.environment(tmp_path / home, token="hf_ann"), "PYTHONPATH": str(ROOT)}
        done = run_command(
            [prepared_python(), "-m", "tests.hub.server_tests.client_worker", *arguments],
            env=environment,
            timeout=300,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    trained = work("first", "train", str(tmp_path / "run"))
    stored = hub.repo("ann/trained")
    assert stored.private
    assert stored.head == trained["commit"]
    assert {"README.md", "config.json", "model.safetensors", "modeling_imgproc_vit.py"} <= set(stored.files())
    assert stored.files()["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert "model.safetensors" in hub.repo("ann/bare").files("draft")
    assert list(hub.repo("ann/bare").files()) == [".gitattributes"]

    loaded = work("second", "load", str(tmp_path / "run"), trained["commit"])
    assert loaded["home"] == f"transformers_modules.ann.trained.{trained['commit']}.modeling_imgproc_vit"
    assert loaded["logits"] == trained["logits"]
    assert sorted(loaded["labels"]) == ["cat", "dog", "eel"]
    hub.check()
