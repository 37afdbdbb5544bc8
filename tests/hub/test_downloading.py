"""Downloading from a server that speaks the Hub's protocol: complete, unchanged, or a clear sentence and no debris."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import AutoModelForImageClassification

from hf_imgproc_attn import cli
from hf_imgproc_attn.hub.client import HubError, connect
from hf_imgproc_attn.hub.downloading import list_checkpoints, pull
from tests.hub.conftest import CopyOfRun
from tests.hub.server import HubServer

ID = "ann/digits"
WEIGHTS = "model.safetensors"


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return connect(hub.url)


@pytest.fixture
def digits(hub: HubServer, api: HfApi, run: CopyOfRun) -> Path:
    """A run's files on the Hub, uploaded by the client alone; the folder they came from."""
    folder = run("vit")
    api.create_repo(ID)
    api.upload_folder(repo_id=ID, folder_path=folder)
    api.create_tag(ID, tag="v1")
    return folder


def blobs(cache: Path) -> dict[str, Path]:
    """Content hashes of all files of a cache, to find debris."""
    files = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in files}


def test_pull_fills_the_cache_that_from_pretrained_reads(
    hub: HubServer, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["pull", ID, "--revision", "v1"]) == 0
    printed = capsys.readouterr().out
    commit = hub.repo(ID).tags["v1"]
    folder = Path(next(line.split(None, 1)[1] for line in printed.splitlines() if line.startswith("folder:")))
    assert folder.name == commit
    assert f"revision: {commit}" in printed
    assert "note:" not in printed
    assert (folder / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()
    asked = len(hub.transcript)
    model = AutoModelForImageClassification.from_pretrained(ID, revision=commit, local_files_only=True)
    assert type(model).__name__ == "ImgProcViTForImageClassification"
    # All that the files need is there; Transformers looks for an adapter whatever it is told.
    later = [entry for entry in hub.transcript[asked:] if not entry.path.endswith("adapter_config.json")]
    assert later == []


def test_pull_to_a_folder(hub: HubServer, digits: Path, tmp_path: Path) -> None:
    download = pull(ID, output=tmp_path / "mine")
    assert download.folder == tmp_path / "mine"
    assert download.files == len(hub.repo(ID).files()) - 1  # a pickle of the Trainer, which was not asked for
    assert {path.name for path in (tmp_path / "mine").glob("*")} >= set(hub.repo(ID).files()) - {"training_args.bin"}
    assert (tmp_path / "mine" / "config.json").read_bytes() == (digits / "config.json").read_bytes()


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "held", ["another run", "an edited file", "files of another checkpoint", "a run of other names"]
)
def test_nothing_is_overwritten_without_being_asked(
    hub: HubServer, digits: Path, run: CopyOfRun, tmp_path: Path, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    mine, lost = tmp_path / "mine", ["model.safetensors"]
    if held == "another run":
        mine = run("vit_softmax")
        lost += ["config.json", "run.json"]
    elif held == "a run of other names":
        mine.mkdir()
        (mine / "run.json").write_text("{}", encoding="utf-8")
        lost = ["run.json"]
    elif held == "an edited file":
        pull(ID, output=mine)
        (mine / "model.safetensors").write_bytes(b"mine")
    else:
        mine.mkdir()
        (mine / "model.safetensors").mkdir()  # even this
    before, asked = state_of(mine), len(hub.requests("resolve"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["pull", ID, "--output", str(mine)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    what = "a training run" if "run" in held else "files that differ from those on the Hub"
    assert f"output '{mine}' holds {what} (" in error
    for name in lost:
        assert name in error.partition("(")[2]
    assert "would be overwritten): choose another folder, or pass --force" in error
    assert state_of(mine) == before
    weights = [entry for entry in hub.requests("resolve")[asked:] if entry.path.endswith(WEIGHTS)]
    assert weights == []


def test_a_run_of_the_users_is_kept_beside_a_checkpoint_without_a_record(
    hub: HubServer, api: HfApi, digits: Path, tmp_path: Path
) -> None:
    api.delete_file("run.json", ID)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "run.json").write_text("{}", encoding="utf-8")
    with pytest.raises(HubError, match="holds a training run: choose another folder"):
        pull(ID, output=mine)


def test_force_overwrites_and_the_same_files_are_no_obstacle(
    hub: HubServer, digits: Path, run: CopyOfRun, tmp_path: Path
) -> None:
    mine = run("vit_softmax")
    assert cli.main(["pull", ID, "--output", str(mine), "--force"]) == 0
    for name, content in hub.repo(ID).files().items():
        if name != "training_args.bin":
            assert (mine / name).read_bytes() == content, name
    pull(ID, output=mine)  # again, without force: nothing would be lost
    (mine / WEIGHTS).unlink()
    (mine / "notes.txt").write_text("mine", encoding="utf-8")
    pull(ID, output=mine)
    assert (mine / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()
    assert (mine / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_cut_download_goes_on(hub: HubServer, digits: Path) -> None:
    fault = hub.cut(after=2000, path=f"*{WEIGHTS}")
    download = pull(ID)
    assert fault.hits == 1
    assert (download.folder / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()


@pytest.mark.parametrize("reset", [False, True])
def test_a_download_that_is_always_cut_leaves_nothing_behind(
    hub: HubServer, digits: Path, tmp_path: Path, reset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_imgproc_attn.hub.client.ATTEMPTS", 2)
    hub.cut(after=2000, reset=reset, times=None, path=f"*{WEIGHTS}")
    with pytest.raises(HubError, match=f"could not download {ID} .after 2 attempts."):
        pull(ID)
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    hub.heal()
    assert (pull(ID).folder / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()


def test_a_byte_that_changed_on_the_way_is_found_and_fetched_again(hub: HubServer, digits: Path) -> None:
    fault = hub.flip_byte(at=4000, path=f"*{WEIGHTS}")
    download = pull(ID)
    assert fault.hits == 1
    assert (download.folder / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()


def test_a_byte_that_always_changes_is_refused_and_deleted(
    hub: HubServer, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.flip_byte(at=4000, times=None, path=f"*{WEIGHTS}")
    with pytest.raises(SystemExit):
        cli.main(["pull", ID])
    assert f"did not arrive unchanged: {WEIGHTS} differ from the Hub's checksums" in capsys.readouterr().err
    right = {hashlib.sha256(content).hexdigest() for content in hub.repo(ID).files().values()}
    left = {path for digest, path in blobs(tmp_path / "cache").items() if path.stat().st_size > 2000}
    assert left
    assert all(hashlib.sha256(path.read_bytes()).hexdigest() in right for path in left if path.parent.name == "blobs")
    assert not list((tmp_path / "cache").rglob(WEIGHTS))
    hub.heal()
    assert (pull(ID).folder / WEIGHTS).read_bytes() == (digits / WEIGHTS).read_bytes()


def test_pickles_stay_where_they_are(hub: HubServer, api: HfApi, digits: Path) -> None:
    for name in ("training_args.bin", "last-checkpoint/optimizer.pt"):
        api.upload_file(path_or_fileobj=b"pickle", path_in_repo=name, repo_id=ID)
    download = pull(ID)
    assert {path.suffix for path in download.folder.rglob("*")} & {".bin", ".pt"} == set()


def test_code_that_is_not_the_packages_is_remarked(hub: HubServer, api: HfApi, digits: Path) -> None:
    changed = (digits / "spec_fields.py").read_bytes() + b"import socket\n"
    api.upload_file(path_or_fileobj=changed, path_in_repo="spec_fields.py", repo_id=ID)
    differs, audited = pull(ID).remarks
    assert differs == "its code differs from this package's in spec_fields.py"
    assert audited.startswith("its code has what a model has no need for: spec_fields.py, line ")
    assert audited.endswith("imports socket")


def test_code_that_is_not_complete_is_remarked(hub: HubServer, api: HfApi, digits: Path) -> None:
    assert pull(ID).remarks == []
    api.delete_file("spec_versions.py", ID)
    remarks = pull(ID).remarks
    assert remarks
    assert all(
        text.startswith("its code is not complete, it lacks spec_versions.py (imported by ") for text in remarks
    )


def test_published_code_is_compared_when_the_package_loads_it(
    hub: HubServer, api: HfApi, digits: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("hf_imgproc_attn.hub.travelling_code"), "propagate", True)
    caplog.set_level("WARNING", logger="hf_imgproc_attn.hub.travelling_code")
    AutoModelForImageClassification.from_pretrained(ID, revision="v1")
    assert not [text for text in caplog.messages if "published with" in text]
    changed = (digits / "spec_fields.py").read_bytes() + b"# changed\n"
    api.upload_file(path_or_fileobj=changed, path_in_repo="spec_fields.py", repo_id=ID)
    AutoModelForImageClassification.from_pretrained(ID, revision="v1")
    assert not [text for text in caplog.messages if "published with" in text]
    AutoModelForImageClassification.from_pretrained(ID)
    (message,) = (text for text in caplog.messages if "published with" in text)
    assert f"the code published with '{ID}' differs from this package's in spec_fields.py" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ann/nothing"], "could not find ann/nothing: there is no such repository, or it is private"),
        ([ID, "--revision", "v9"], f"could not find {ID}: there is no such revision"),
        (["ann/bert"], "imgproc_bert or imgproc_filtered, got ann/bert: bert"),
        (["ann/empty"], "got ann/empty: None"),
        (["ann/bad"], "got ann/bad: a config.json that cannot be read"),
    ],
)
def test_what_cannot_be_pulled(
    hub: HubServer, api: HfApi, digits: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, config in (("bert", b'{"model_type": "bert"}'), ("empty", None), ("bad", b"{")):
        api.create_repo(f"ann/{name}")
        if config is not None:
            api.upload_file(path_or_fileobj=config, path_in_repo="config.json", repo_id=f"ann/{name}")
    with pytest.raises(SystemExit) as stop:
        cli.main(["pull", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_private_checkpoints_need_a_token(
    hub: HubServer, api: HfApi, digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.update_repo_settings(ID, private=True)
    assert pull(ID).repo_id == ID
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    with pytest.raises(HubError, match="it is private and the token does not open it"):
        pull(ID)


def test_list_shows_what_an_account_has_published(
    hub: HubServer, api: HfApi, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str, data: dict[str, Any], **options: Any) -> str:
        api.create_repo(name, **options)
        card = f"---\n{json.dumps(data)}\n---\n# x\n"
        return str(api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=name).oid)

    results = [
        {
            "task": {"type": "image-classification"},
            "dataset": {"type": "digits", "name": "digits"},
            "metrics": [{"type": "accuracy", "value": 0.9375, "name": "test accuracy"}],
        }
    ]
    model_index = [{"name": "x", "results": results}]
    tags = ["hf_imgproc_attn", "imgproc_vit", "twicing"]
    commit = put("ann/one", {"tags": tags, "model-index": model_index})
    put("ann/two", {"tags": ["hf_imgproc_attn", "imgproc_gpt2", "custom"]}, private=True)
    put("ann/other", {"tags": ["vit"]})
    assert cli.main(["list", "ann"]) == 0
    header, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["repository", "revision", "variant", "visible", "figures"]
    assert sorted(rows) == [
        ["ann/one", commit, "imgproc_vit", "twicing", "public", "test", "accuracy", "0.9375"],
        ["ann/two", hub.repo("ann/two").head, "imgproc_gpt2", "custom", "private", "none"],
    ]
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert [item.repo_id for item in list_checkpoints("ann")] == ["ann/one"]
    with pytest.raises(SystemExit):
        cli.main(["list", "bob"])
    assert "bob has published no checkpoint of this package" in capsys.readouterr().err
    with pytest.raises(HubError, match="NAME must be a user or an organisation, got 'ann/one'"):
        list(list_checkpoints("ann/one"))


def test_a_busy_hub_is_waited_for(hub: HubServer, digits: Path) -> None:
    faults = [hub.fail(route, status=429, retry_after=0) for route in ("info", "tree", "resolve")]
    assert pull(ID).repo_id == ID
    assert [fault.hits for fault in faults] == [1, 1, 1]
