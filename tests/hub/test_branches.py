"""Where a publication goes: what was asked for is looked up on the branch that was asked for, and is what is there.

That what was committed is downloaded and compared is the subject of ``test_publishing.py``; here it is taken as done.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from hf_imgproc_attn import cli
from hf_imgproc_attn.cards.merging import front_matter_of
from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.hub import publishing, repository
from hf_imgproc_attn.hub.client import HubError, connect
from hf_imgproc_attn.hub.publishing import Publication, publish
from tests.hub.conftest import READER, CopyOfRun
from tests.hub.server import HubServer

ID = "ann/digits"


pytestmark = pytest.mark.usefixtures("verified")


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return connect(hub.url)


def put(run: Path, hub: HubServer, verified: list[str], *, branch: str = "main", **options: Any) -> Publication:
    """Publish, and check that what was said is so."""
    result = publish(run, ID, revision=branch, **options)
    assert result is not None
    found = hub.repo(ID)
    assert found.branches[branch] == result.revision == verified[-1]
    assert found.tags[result.tag] == result.revision
    files = found.files(branch)
    for path in run.glob("*.safetensors"):
        assert files[path.name] == path.read_bytes()
    assert {name for name in files if name.endswith(".safetensors")} == {
        path.name for path in run.glob("*.safetensors")
    }
    return result


def test_another_branch_is_another_place(hub: HubServer, run: CopyOfRun, verified: list[str]) -> None:
    folder = run("vit")
    first = put(folder, hub, verified, branch="dev")
    second = put(folder, hub, verified)
    assert (first.was_there, second.was_there) == (False, False)
    assert second.tag == f"{first.tag}.2"
    assert hub.repo(ID).tags[first.tag] == first.revision, "a tag never moves"
    assert f'revision="{second.tag}"' in hub.repo(ID).files()["README.md"].decode()
    assert put(folder, hub, verified, branch="dev").was_there
    assert put(folder, hub, verified).was_there
    assert len(hub.repo(ID).tags) == 2


def test_a_run_that_was_replaced_comes_back(hub: HubServer, run: CopyOfRun, verified: list[str]) -> None:
    one, two = run("vit"), run("vit_softmax")
    first = put(one, hub, verified)
    second = put(two, hub, verified)
    third = put(one, hub, verified)
    assert len({first.revision, second.revision, third.revision}) == 3
    assert third.tag == f"{first.tag}.2"
    assert put(one, hub, verified) == third


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "spec_fields.py", "README.md", "run.json"])
def test_what_was_deleted_on_the_hub_comes_back(
    hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi, name: str
) -> None:
    folder = run("vit")
    first = put(folder, hub, verified)
    api.delete_file(name, ID)
    second = put(folder, hub, verified)
    assert not second.was_there
    assert name in hub.repo(ID).files()
    assert second.revision != first.revision


def test_what_was_put_beside_the_run_goes_if_it_is_in_the_way_and_that_is_said(
    hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("vit")
    put(folder, hub, verified)
    for name in ("LICENSE", "robustness.json", "pytorch_model.bin", "old.py"):
        api.upload_file(path_or_fileobj=b"{}", path_in_repo=name, repo_id=ID)
    put(folder, hub, verified)
    said = "deleting from the branch main, whose history keeps them: old.py, pytorch_model.bin, robustness.json\n"
    assert said in capsys.readouterr().out
    left = hub.repo(ID).files()
    assert "LICENSE" in left
    assert {"robustness.json", "pytorch_model.bin", "old.py"}.isdisjoint(left)


def test_an_older_release_branch(hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi) -> None:
    old, new = run("vit"), run("vit_softmax")
    first = put(old, hub, verified)
    api.create_branch(ID, branch="release/1", revision=first.revision)
    second = put(new, hub, verified)
    again = put(old, hub, verified, branch="release/1")
    assert again.was_there
    assert again.revision == first.revision
    third = put(new, hub, verified, branch="release/1")
    assert third.tag == f"{second.tag}.2"
    assert hub.repo(ID).head == second.revision


def test_an_upload_that_was_not_tagged_is_finished(
    hub: HubServer, run: CopyOfRun, verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("vit")
    fault = hub.fail("tag", status=400)
    with pytest.raises(HubError, match="could not tag"):
        publish(folder, ID)
    assert fault.hits == 1
    with monkeypatch.context() as patch:
        patch.setenv("HF_TOKEN", READER)
        with pytest.raises(HubError, match="the token may only read"):
            publish(folder, ID)
    result = put(folder, hub, verified)
    assert not result.was_there
    assert len(hub.repo(ID).commits()) == 2


@pytest.mark.parametrize("what", ["tag", "commit"])
def test_what_is_no_branch_is_refused(
    hub: HubServer, run: CopyOfRun, verified: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run("vit")
    first = put(folder, hub, verified)
    name = first.tag if what == "tag" else first.revision
    with pytest.raises(SystemExit) as stop:
        cli.main(["publish", str(folder), "--repo-id", ID, "--revision", name])
    assert stop.value.code == 2
    assert f"revision must be a branch to publish to, got '{name}', which is a {what}" in capsys.readouterr().err


def test_the_right_to_write_is_asked_before_anything_is_uploaded(
    hub: HubServer, run: CopyOfRun, verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = run("vit"), run("vit_softmax")
    put(folder, hub, verified)
    for token, message in (
        (READER, "the token may only read"),
        ("hf_bob", f"could not write to {ID}: the token may not"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        assert publish(folder, ID).was_there  # type: ignore[union-attr]
        asked = len(hub.transcript)
        with pytest.raises(HubError, match=message):
            publish(other, ID)
        assert {entry.method for entry in hub.transcript[asked:]} <= {"GET", "HEAD"}


def test_without_a_token_what_is_there_is_there(
    hub: HubServer, run: CopyOfRun, verified: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run("vit")
    put(folder, hub, verified)
    monkeypatch.delenv("HF_TOKEN")
    assert publish(folder, ID).was_there  # type: ignore[union-attr]
    with pytest.raises(HubError, match="there is no token"):
        publish(run("vit_softmax"), ID)


def test_files_that_the_repository_ignores_are_missed(hub: HubServer, run: CopyOfRun, api: HfApi) -> None:
    api.create_repo(ID)
    api.upload_file(path_or_fileobj=b"*.json\n", path_in_repo=".gitignore", repo_id=ID)
    api.upload_file(path_or_fileobj=b"x = 1\n", path_in_repo="modeling_imgproc_vit.py", repo_id=ID)
    with pytest.raises(HubError, match=r"does not hold what was sent: config.json, .*\(is there a .gitignore\?\)"):
        publish(run("vit"), ID)
    assert hub.repo(ID).tags == {}


def test_somebody_else_commits_meanwhile(
    hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = run("vit"), run("vit_softmax")
    put(one, hub, verified)
    create = repository.create

    def late(*arguments: Any, **options: Any) -> str:
        head = create(*arguments, **options)
        api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id=ID)
        return head

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "create", late)
        with pytest.raises(HubError, match="the Hub answered 412: A commit has happened since"):
            publish(two, ID)
    assert "notes.txt" in hub.repo(ID).files()
    put(two, hub, verified)

    def deletes(*arguments: Any, **options: Any) -> dict[str, Any]:
        api.delete_file("config.json", ID)
        return {"class": "x"}

    monkeypatch.setattr(publishing, "verify", deletes)
    with pytest.raises(HubError, match=r"the branch main has moved on to .* which does not hold it \(config.json\)"):
        publish(one, ID)


# The card


def edit_card(api: HfApi, hub: HubServer, *changes: tuple[str, str]) -> None:
    text = hub.repo(ID).files()["README.md"].decode()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=ID)


def test_edits_on_the_hub_survive_the_next_publications(
    hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = run("vit"), run("vit_softmax")
    put(one, hub, verified)
    edit_card(api, hub, ("---\n", "---\nlicense: mit\n"), ("## Limits", "## Intended use\n\nTeaching.\n\n## Limits"))
    edited = hub.repo(ID).head
    again = put(one, hub, verified)
    assert again.revision == edited, "the branch held the run: only a tag was missing"
    for folder in (two, one):
        put(folder, hub, verified)
        card = hub.repo(ID).files()["README.md"].decode()
        assert "## Intended use\n\nTeaching.\n\n## Limits" in card
        assert front_matter_of(card)["license"] == "mit"
    assert "license: mit (of the card on the Hub)" in capsys.readouterr().out


def test_an_edit_that_contradicts_the_run_is_not_thrown_away(
    hub: HubServer, run: CopyOfRun, verified: list[str], api: HfApi, capsys: pytest.CaptureFixture[str]
) -> None:
    put(run("vit"), hub, verified)
    edit_card(api, hub, ("## Results\n", "## Results\n\nDo not trust them.\n"))
    other, asked = run("vit_softmax"), len(hub.transcript)
    with pytest.raises(UsageError, match=r"has something else to say \(Results\)"):
        publish(other, ID)
    assert {entry.method for entry in hub.transcript[asked:]} <= {"GET", "HEAD"}
    assert cli.main(["publish", str(other), "--repo-id", ID, "--force"]) == 0
    assert "'Results' of README.md was edited on the Hub and is replaced" in capsys.readouterr().out


def test_a_licence_that_the_hub_does_not_know_creates_nothing(
    hub: HubServer, run: CopyOfRun, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["publish", str(run("vit")), "--repo-id", ID, "--license", "Apache 2"])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "the Hub does not take the card: " in error
    assert "got 'Apache 2'" in error
    assert len(error.splitlines()) == 1
    with pytest.raises(KeyError):
        hub.repo(ID)
