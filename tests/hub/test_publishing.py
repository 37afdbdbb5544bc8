"""Publishing on a server that speaks the Hub's protocol: what arrives, what is refused, what faults leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from hf_imgproc_attn import cli
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.hub.client import HubError, connect
from hf_imgproc_attn.hub.publishing import Publication, prepare_repository, publish
from hf_imgproc_attn.hub.run_files import read_run
from hf_imgproc_attn.hub.travelling_code import ROOM
from hf_imgproc_attn.records import weights_sha256
from tests.helpers import ROOT, started
from tests.hub.conftest import READER, TOKEN, CopyOfRun
from tests.hub.server import HubServer

ID = "ann/digits"


def published(*arguments: Any, **options: Any) -> Publication:
    result = publish(*arguments, **options)
    assert result is not None
    return result


def state_of(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, **changes: Any) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_record(folder: Path, **changes: Any) -> None:
    edit_json(folder / "run.json", **changes)


def test_everything_arrives_in_one_commit_and_is_tagged(
    hub: HubServer, run: CopyOfRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, baseline = run("vit"), run("vit_softmax")
    # What must stay at home.
    (folder / "training_args.bin").write_bytes(b"pickle")
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"pickle")
    (folder / "README.md").write_text("mine", encoding="utf-8")
    before = state_of(folder)
    assert cli.main(["publish", str(folder), "--repo-id", ID, "--baseline", str(baseline)]) == 0
    assert state_of(folder) == before
    printed = capsys.readouterr().out
    assert f"hint: this run was not evaluated on disturbed data: imgproc-attn evaluate {folder}\n" in printed
    with pytest.raises(SystemExit, match="2"):
        cli.main(["publish", str(folder), "--repo-id", ID, "--baseline", f"{folder}/../{folder.name}", "--dry-run"])
    assert "baseline must be another run than the one that is published" in capsys.readouterr().err
    assert f"hint: the baseline was not evaluated on disturbed data: imgproc-attn evaluate {baseline}\n" in printed
    assert "warning: the card names no license" in printed
    repository = hub.repo(ID)
    commit, first = repository.commits()
    assert first.title == "initial commit"
    assert list(repository.tags.values()) == [commit.sha]
    (tag,) = repository.tags
    assert re.fullmatch(r"v\d+\.\d+\.\d+-[0-9a-f]{8}", tag)
    assert f"revision:  {commit.sha} (tag {tag})" in printed
    assert f"published: {hub.url}/{ID}" in printed
    assert "ImgProcViTForImageClassification loads without this package" in printed

    files = repository.files(tag)
    code = {path.name for path in ROOM.glob("*.py")} & {path.name for path in folder.glob("*.py")}
    assert {"modeling_imgproc_vit.py", "spec_fields.py"} <= code
    others = {".gitattributes", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    others |= {"run.json", "training_curves.png"}
    assert files.keys() == code | others
    for name in code | {"config.json", "model.safetensors"}:
        assert files[name] == (folder / name).read_bytes()
    assert files["training_curves.png"].startswith(b"\x89PNG")
    assert not repository.private
    assert TOKEN not in printed

    card = ModelCard(files["README.md"].decode())
    assert f'revision="{tag}"' in card.content
    assert {"hf_imgproc_attn", "bilateral_twicing"} <= set(card.data.tags)
    measured = json.loads((folder / "run.json").read_text(encoding="utf-8"))["metrics"]["test"]["accuracy"]
    assert any(result.metric_value == pytest.approx(measured) for result in card.data.eval_results)
    assert card.data.license is None
    routes = [entry.route for entry in hub.transcript]
    assert routes.index("validate_yaml") < routes.index("create_repo")


@pytest.mark.usefixtures("verified")
def test_no_local_path_is_published(hub: HubServer, run: CopyOfRun) -> None:
    folder = run("vit")
    published(folder, ID)
    for name, content in hub.repo(ID).files().items():
        assert str(folder.parent).encode() not in content, name
        assert str(ROOT).encode() not in content, name


def test_publishing_again_says_that_it_is_there(
    hub: HubServer, run: CopyOfRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("vit")
    first = published(folder, ID)
    assert not first.was_there
    asked = len(hub.transcript)
    monkeypatch.setenv("HF_TOKEN", READER)  # may not write, and need not
    assert cli.main(["publish", str(folder), "--repo-id", ID]) == 0
    printed = capsys.readouterr().out
    assert f"already there, nothing was written: {hub.url}/{ID}\nrevision:  {first.revision}" in printed
    assert "published:" not in printed.partition("already there")[2]
    assert {entry.method for entry in hub.transcript[asked:]} <= {"GET", "HEAD"}
    assert len(hub.repo(ID).commits()) == 2


@pytest.mark.usefixtures("verified")
def test_a_new_run_replaces_the_files_of_the_old_one(hub: HubServer, run: CopyOfRun) -> None:
    old, new = run("vit"), run("vit_softmax")
    weights = load_file(old / "model.safetensors")
    (old / "model.safetensors").unlink()
    names = sorted(weights)
    for part, keys in ((1, names[:5]), (2, names[5:])):
        save_file(
            {key: weights[key] for key in keys}, old / f"model-0000{part}-of-00002.safetensors", {"format": "pt"}
        )
    index = {
        "metadata": {"total_size": 0},
        "weight_map": {name: f"model-0000{1 if name in names[:5] else 2}-of-00002.safetensors" for name in names},
    }
    (old / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    edit_record(old, weights_sha256=weights_sha256(str(old)))
    first = published(old, ID)
    assert "model-00002-of-00002.safetensors" in hub.repo(ID).files(first.tag)
    second = published(new, ID)
    assert second.tag != first.tag
    left = hub.repo(ID).files(second.revision)
    assert not {name for name in left if name.startswith("model-0000")}
    assert "model.safetensors.index.json" not in left
    assert hub.repo(ID).tags == {first.tag: first.revision, second.tag: second.revision}


def test_private_on_a_branch_in_the_own_account(hub: HubServer, run: CopyOfRun) -> None:
    result = published(run("gpt2"), "words", private=True, revision="trial")
    assert result.repo_id == "ann/words"
    repository = hub.repo("ann/words")
    assert repository.private
    assert repository.branches["trial"] == result.revision
    assert len(repository.commits("main")) == 1
    files = repository.files(result.tag)
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_imgproc_gpt2.py"} <= set(
        files
    )
    assert result.model_class == "ImgProcGPT2LMHeadModel"


def test_dry_run_asks_nobody_and_writes_nothing(
    hub: HubServer, run: CopyOfRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("vit")
    before = state_of(folder)
    assert cli.main(["publish", str(folder), "--repo-id", ID, "--license", "mit", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert state_of(folder) == before
    assert hub.transcript == []
    assert "nothing was sent, and nothing written to the run's folder" in printed
    assert re.search(r"^ +[\d,]+  model.safetensors$", printed, re.MULTILINE)
    card = Path(next(line.partition(": ")[2] for line in printed.splitlines() if line.startswith("the card,")))
    text = card.read_text(encoding="utf-8")
    assert f'model="{ID}"' in text
    assert "license: mit\n" in text
    assert (card.parent / "training_curves.png").is_file()
    shutil.rmtree(card.parent)


# Bad input: refused before anything is sent


def spoil_no_folder(folder: Path) -> None:
    shutil.rmtree(folder)


def spoil_no_record(folder: Path) -> None:
    (folder / "run.json").unlink()


def spoil_unfinished(folder: Path) -> None:
    edit_record(folder, status="running")


def spoil_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def spoil_other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).add_(1)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def spoil_nan(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][1] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_record(folder, weights_sha256=weights_sha256(str(folder)))


def spoil_truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    edit_record(folder, weights_sha256=weights_sha256(str(folder)))


def spoil_code(folder: Path) -> None:
    with (folder / "spec_fields.py").open("a", encoding="utf-8") as file:
        file.write("import socket\n")


def spoil_missing_code(folder: Path) -> None:
    (folder / "modeling_imgproc_vit.py").unlink()


def spoil_imported_code(folder: Path) -> None:
    (folder / "kernel_content.py").unlink()  # no file that config.json names imports it itself


def spoil_config(folder: Path) -> None:
    edit_json(folder / "config.json", content_kernel="no kernel")


def spoil_shapes(folder: Path) -> None:
    edit_json(folder / "config.json", hidden_size=24)


def spoil_head(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["head.weight"] = weights.pop("classifier.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit_record(folder, weights_sha256=weights_sha256(str(folder)))


def spoil_processor(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()


def spoil_json(folder: Path) -> None:
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")


def spoil_code_that_is_no_python(folder: Path) -> None:
    with (folder / "modeling_shared.py").open("a", encoding="utf-8") as file:
        file.write("def\n")


def spoil_code_that_does_not_run(folder: Path) -> None:
    with (folder / "modeling_shared.py").open("a", encoding="utf-8") as file:
        file.write("undefined_name\n")


def spoil_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    del config["auto_map"]["AutoModelForMaskedImageModeling"]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_no_folder, "which is no folder"),
        (spoil_no_record, "run.json"),
        (spoil_unfinished, "the run must have finished, got status 'running'"),
        (spoil_no_weights, "has no weights"),
        (spoil_other_weights, "weights other than those its run.json was written for"),
        (spoil_nan, "weights that are not finite numbers: classifier.bias in model.safetensors"),
        (spoil_truncated, "truncated or corrupt"),
        (spoil_code, "spec_fields.py, line [0-9]+: imports socket"),
        (spoil_missing_code, "lacks modeling_imgproc_vit.py"),
        (spoil_auto_map, "lacks the auto_map entries AutoModelForMaskedImageModeling"),
        (spoil_imported_code, r"lacks files of its code: kernel_content.py \(imported by "),
        (spoil_config, "cannot be published: it cannot be loaded: .*content_kernel"),
        (spoil_shapes, "cannot be published: "),
        (spoil_head, r"the weights are not those of the configuration \(missing: .*classifier.weight.*head.weight\)"),
        (spoil_processor, "lacks preprocessor_config.json or processor_config.json"),
        (spoil_json, "preprocessor_config.json' cannot be read"),
        (spoil_code_that_is_no_python, "modeling_shared.py, line [0-9]+: is not Python"),
        (spoil_code_that_does_not_run, "it cannot be loaded: NameError: name 'undefined_name' is not defined"),
    ],
)
def test_a_run_with_something_wrong_is_refused(
    hub: HubServer, run: CopyOfRun, spoil: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("vit")
    spoil(folder)
    with pytest.raises(SystemExit) as stop:
        cli.main(["publish", str(folder), "--repo-id", ID])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
    assert hub.transcript == []


@pytest.mark.parametrize("repo_id", ["a/b/c", "ann/", "ann/x y", "../x"])
def test_no_name_of_a_repository(hub: HubServer, run: CopyOfRun, repo_id: str) -> None:
    with pytest.raises(HubError, match="repo_id must be NAME/ID, got "):
        publish(run("vit"), repo_id)


def test_endpoint_is_no_url(run: CopyOfRun) -> None:
    with pytest.raises(HubError, match="endpoint must be a URL such as .*, got 'somewhere'"):
        publish(run("vit"), ID, endpoint="somewhere")


def test_offline_mode_is_named(run: CopyOfRun) -> None:
    with pytest.raises(HubError, match="offline mode: unset HF_HUB_OFFLINE"):
        publish(run("vit"), ID)


# What the Hub refuses


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "there is no token"), (READER, "the token may only read"), ("hf_nobody", "does not know the token")],
)
def test_tokens_that_may_not_write(
    hub: HubServer, run: CopyOfRun, monkeypatch: pytest.MonkeyPatch, token: str | None, message: str
) -> None:
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match=message) as caught:
        publish(run("vit"), ID)
    assert token is None or token not in str(caught.value)
    with pytest.raises(KeyError):
        hub.repo(ID)


@pytest.mark.usefixtures("verified")
def test_somebody_elses_account(hub: HubServer, run: CopyOfRun) -> None:
    with pytest.raises(HubError, match="could not create the repository bob/digits"):
        publish(run("vit"), "bob/digits")


@pytest.mark.usefixtures("verified")
def test_a_repository_of_something_else(hub: HubServer, run: CopyOfRun) -> None:
    api_of = connect(hub.url)
    folder = run("vit")
    api_of.create_repo("ann/bert")
    api_of.upload_file(path_or_fileobj=b'{"model_type": "bert"}', path_in_repo="config.json", repo_id="ann/bert")
    api_of.create_repo("ann/data")
    api_of.upload_file(path_or_fileobj=b"1,2", path_in_repo="table.csv", repo_id="ann/data")
    api_of.create_repo("ann/card")
    api_of.upload_file(
        path_or_fileobj=b"---\nlicense: mit\n---\n# Soon\n", path_in_repo="README.md", repo_id="ann/card"
    )
    with pytest.raises(HubError, match="belongs to another model type: it holds bert, this run is imgproc_vit"):
        publish(folder, "ann/bert")
    with pytest.raises(HubError, match=r"ann/data holds files that are no checkpoint of ours \(table.csv\)"):
        publish(folder, "ann/data")
    with pytest.raises(HubError, match="ann/card is public, but private was asked for"):
        publish(folder, "ann/card", private=True)
    assert published(folder, "ann/card").repo_id == "ann/card"


# Faults


@pytest.mark.usefixtures("verified")
@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for(
    hub: HubServer, run: CopyOfRun, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once at every call that a publication makes and that the client itself does not repeat."""
    routes = ("info", "whoami", "validate_yaml", "create_repo", "branch", "refs", "tree", "commit", "tag")
    faults = [hub.fail(route, status=status, retry_after=0) for route in routes]
    result = published(run("vit"), ID, revision="trial")
    assert [fault.hits for fault in faults] == [1] * len(routes)
    assert hub.repo(ID).tags == {result.tag: result.revision}
    assert "could not" not in capsys.readouterr().out


@pytest.mark.usefixtures("verified")
def test_an_upload_that_fails_once(hub: HubServer, run: CopyOfRun) -> None:
    fault = hub.fail("upload", status=500)
    result = published(run("vit"), ID)
    assert fault.hits == 1
    assert hub.repo(ID).tags == {result.tag: result.revision}


@pytest.mark.usefixtures("verified")
def test_a_commit_whose_reply_is_lost_is_made_once(hub: HubServer, run: CopyOfRun) -> None:
    fault = hub.lose_reply("commit")
    result = published(run("vit"), ID)
    assert fault.hits == 1
    assert [commit.sha for commit in hub.repo(ID).commits()][:-1] == [result.revision]


def test_killed_in_the_middle_of_an_upload(hub: HubServer, run: CopyOfRun) -> None:
    folder = run("vit")
    fault = hub.stall("upload")
    command = [sys.executable, "-m", "hf_imgproc_attn.cli", "publish", str(folder), "--repo-id", ID]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with started(command, env=environment) as process:
        assert fault.reached.wait(120)
        process.send_signal(signal.SIGKILL)
    assert hub.repo(ID).tags == {}
    assert len(hub.repo(ID).commits()) == 1
    result = published(folder, ID)
    assert hub.repo(ID).tags == {result.tag: result.revision}
    assert len(hub.repo(ID).commits()) == 2


def test_what_comes_back_changed_is_not_tagged(hub: HubServer, run: CopyOfRun) -> None:
    folder = run("vit")
    hub.flip_byte(at=4000, times=None, path="*model.safetensors")
    with pytest.raises(HubError, match="not verified and has no tag: the download differs .* in model.safetensors"):
        publish(folder, ID)
    assert hub.repo(ID).tags == {}
    hub.heal()
    result = published(folder, ID)
    assert hub.repo(ID).tags == {result.tag: result.revision}
    assert len(hub.repo(ID).commits()) == 2


def test_a_byte_that_changes_once_is_fetched_again(hub: HubServer, run: CopyOfRun) -> None:
    fault = hub.flip_byte(at=4000, path="*model.safetensors")
    published(run("vit"), ID)
    assert fault.hits == 1


@pytest.mark.usefixtures("verified")
def test_a_hub_that_is_down_ends_in_one_sentence(
    hub: HubServer, run: CopyOfRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.fail(status=503, retry_after=0, times=None)
    with pytest.raises(SystemExit):
        cli.main(["publish", str(run("vit")), "--repo-id", ID])
    error = capsys.readouterr().err
    assert "could not look at ann/digits (after 6 attempts): the Hub answered 503" in error
    assert len(error.splitlines()) == 1


def test_a_run_is_read_without_a_hub(run: CopyOfRun) -> None:
    checked = read_run(run("vit"))
    assert checked.config["model_type"] == "imgproc_vit"
    config = {**checked.config, "model_type": "vit"}
    (checked.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        UsageError,
        match="must have a model_type among imgproc_gpt2, imgproc_vit, imgproc_bert, imgproc_filtered, got 'vit'",
    ):
        read_run(checked.folder)


def test_preparing_takes_the_accounts_name(hub: HubServer) -> None:
    assert prepare_repository(connect(hub.url), "digits", "imgproc_vit", private=False) == ID
