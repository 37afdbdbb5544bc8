"""What the tests' Hub server refuses: to whom, which cards, and which breaches of the protocol it keeps."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
)

from tests.hub.card_rules import check_card
from tests.hub.server import HubServer
from tests.hub.server_tests.samples import CARD, ID, WEIGHTS, lines, outcome, raw

# The client uploads large files in a way that its HTTP library calls old.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


DENIED = {  # token -> the status of reading, of committing, of creating a repository in ann's namespace
    None: (401, 401, 401),
    "hf_wrong": (401, 401, 401),
    "hf_bob": (404, 404, 403),
    "hf_reader": (200, 403, 403),
    "hf_ann": (200, 200, 200),
}


@pytest.mark.parametrize("token", DENIED)
def test_access_to_a_private_repository(hub: HubServer, api: HfApi, token: str | None) -> None:
    api.create_repo(ID, private=True)
    client = HfApi(endpoint=hub.url, token=token or False)
    add = [CommitOperationAdd("a.txt", b"a")]
    got = (
        outcome(lambda: client.model_info(ID)),
        outcome(lambda: client.create_commit(ID, add, commit_message="a")),
        outcome(lambda: client.create_repo("ann/other")),
    )
    assert got == DENIED[token]
    assert ("a.txt" in hub.repo(ID).files()) == (token == "hf_ann")
    hub.check()  # It is no breach to be refused.


def test_a_public_repository_can_be_read_but_not_written_by_all(hub: HubServer, published: str) -> None:
    nobody = HfApi(endpoint=hub.url, token=False)
    assert nobody.model_info(ID).sha == published
    assert outcome(lambda: nobody.create_tag(ID, tag="v1")) == 401
    assert outcome(lambda: HfApi(endpoint=hub.url, token="hf_bob").create_tag(ID, tag="v1")) == 403
    assert outcome(lambda: HfApi(endpoint=hub.url, token="hf_wrong").model_info(ID)) == 401
    assert {entry.role for entry in hub.requests("tag")} == {"none", "write"}
    assert hub.repo(ID).tags == {}


def test_the_transcript_holds_no_token(hub: HubServer, api: HfApi, published: str) -> None:
    assert [entry.route for entry in hub.transcript if entry.method == "PUT"] == ["upload"]
    assert not any(token in str(hub.transcript) for token in hub.state.accounts)
    assert raw(hub, "GET", "/api/hf_ann")[0] == 404
    assert "hf_ann" not in str(hub.transcript) + str(hub.violations)
    with pytest.raises(AssertionError, match="a token is in an address"):
        hub.check()


def test_environment_of_a_client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_developer")
    monkeypatch.setenv("https_proxy", "http://proxy")
    found = hub.environment(tmp_path)
    assert "HF_TOKEN" not in found
    assert "https_proxy" not in found
    assert found["PATH"] == os.environ["PATH"]
    assert (found["HF_ENDPOINT"], found["HF_HUB_OFFLINE"], found["HF_HOME"]) == (hub.url, "0", str(tmp_path))
    assert hub.environment(tmp_path, token="hf_ann")["HF_TOKEN"] == "hf_ann"


RESULT = "model-index: [{name: m, results: [%s]}]"
WRONG_CARDS = {
    "a: [": "YAML Metadata Error",
    "license: mit\nlicense: mit": "duplicated mapping key license",
    "[a, b]": "must be a mapping, got list",
    "license: apache": '"license" must be one of',
    "tags: one": '"tags" must be a list of strings',
    "tags: [1]": '"tags" must be a list of strings',
    "datasets: [{a: 1}]": '"datasets" must be a string or a list of strings',
    "base_model: /home/me/run": '"base_model" with value',
    "pipeline_tag: seeing": '"pipeline_tag" must be one of',
    "library_name: 3": '"library_name" must be a string',
    "model-index: {name: m}": '"model-index" must be an array',
    "model-index: [{results: []}]": '"model-index[0].name" must be a string',
    RESULT % "{dataset: {type: a, name: b}, metrics: []}": '"model-index[0].results[0].task" must be a mapping',
    RESULT % "{task: {type: a}, dataset: {type: a}, metrics: []}": ".dataset.name",
    RESULT
    % "{task: {type: a}, dataset: {type: a, name: b}, metrics: [{type: c}]}": "finite number or a string, got None",
    RESULT % "{task: {type: a}, dataset: {type: a, name: b}, metrics: [{type: c, value: .nan}]}": "finite number",
}


@pytest.mark.parametrize("front_matter", WRONG_CARDS)
def test_a_wrong_card_is_refused(front_matter: str) -> None:
    errors, warnings_ = check_card(f"---\n{front_matter}\n---\ntext")
    assert WRONG_CARDS[front_matter] in "\n".join(errors)
    assert warnings_ == []


def test_cards_through_the_client(hub: HubServer, api: HfApi) -> None:
    """As they are uploaded: ``ModelCard.validate`` asks the real Hub in huggingface-hub 1, whatever the endpoint."""
    readme = {"path_in_repo": "README.md", "repo_id": ID}
    api.create_repo(ID)
    api.upload_file(path_or_fileobj=CARD.encode(), **readme)
    with pytest.raises(ValueError, match="pipeline_tag"):
        api.upload_file(
            path_or_fileobj=CARD.replace("image-classification\nmodel", "seeing\nmodel").encode(), **readme
        )
    with pytest.raises(ValueError, match='Invalid metadata in README.md.\n- "license" must be one of'):
        api.upload_file(path_or_fileobj=b"---\nlicense: x\n---\n", **readme)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# Tiny\n", **readme)
    hub.check()


API = f"/api/models/{ID}"
SHA = "0" * 64
BATCH: dict[str, Any] = {"operation": "upload", "hash_algo": "sha256", "transfers": ["basic"]}
TEXT = {"content": base64.b64encode(b"text").decode(), "encoding": "base64"}
BREACHES: dict[str, tuple[int, str, str, Any]] = {
    "unknown route": (404, "GET", "/api/nothing", None),
    "xet": (404, "GET", f"{API}/xet-write-token/main", None),
    "method": (404, "PATCH", API, None),
    "spaces": (404, "GET", "/api/spaces/ann/app", None),
    "unknown parameter": (400, "GET", f"{API}?verbose=1", None),
    "not JSON": (400, "POST", "/api/repos/create", b"{"),
    "unknown field": (400, "POST", "/api/repos/create", {"name": "a", "colour": "red"}),
    "name": (400, "POST", "/api/repos/create", {"name": "a--b"}),
    "kind of repository": (501, "POST", "/api/repos/create", {"name": "a", "type": "space"}),
    "visibility": (400, "PUT", f"{API}/settings", {"visibility": "hidden"}),
    "sample": (400, "POST", f"{API}/preupload/main", {"files": [{"path": "a", "size": 9, "sample": "YQ=="}]}),
    "batch": (400, "POST", f"/{ID}.git/info/lfs/objects/batch", {"operation": "download"}),
    "batch without sizes": (
        400,
        "POST",
        f"/{ID}.git/info/lfs/objects/batch",
        {**BATCH, "objects": [{"oid": SHA}]},
    ),
    "verify": (400, "POST", f"/{ID}.git/info/lfs/objects/verify", {"oid": SHA, "size": 1}),
    "commit without header": (400, "POST", f"{API}/commit/main", b'{"key": "file", "value": {}}'),
    "commit of an object not uploaded": (
        400,
        "POST",
        f"{API}/commit/main",
        lines(("lfsFile", {"path": "a.bin", "oid": SHA, "size": 1, "algo": "sha256"})),
    ),
    "weights as a regular file": (
        400,
        "POST",
        f"{API}/commit/main",
        lines(("file", {"path": "a.safetensors", **TEXT})),
    ),
    "path": (400, "POST", f"{API}/commit/main", lines(("file", {"path": "../a", **TEXT}))),
    "base64": (400, "POST", f"{API}/commit/main", lines(("file", {"path": "a", "content": "%"}))),
    "operation": (400, "POST", f"{API}/commit/main", lines(("move", {"path": "a"}))),
    "pull request": (501, "POST", f"{API}/commit/main?create_pr=1", lines()),
    "name of a tag": (400, "POST", f"{API}/tag/main", {"tag": "a b"}),
    "paths": (400, "POST", f"{API}/paths-info/main", b""),
}


@pytest.mark.parametrize("breach", BREACHES)
def test_a_breach_of_the_protocol_is_refused_and_kept(hub: HubServer, published: str, breach: str) -> None:
    status, method, path, body = BREACHES[breach]
    before = (hub.repo(ID).head, set(hub.state.repositories))
    assert raw(hub, method, path, body, "hf_ann")[0] == status
    assert (hub.repo(ID).head, set(hub.state.repositories)) == before
    assert len(hub.violations) == 1
    assert hub.violations[0].startswith(f"{method} {path.partition('?')[0]}: ")
    with pytest.raises(AssertionError, match="the client broke the protocol"):
        hub.check()


@pytest.mark.parametrize(
    ("body", "message"),
    [(b"short", "upload of 5 bytes, announced 2560"), (WEIGHTS[::-1], "upload with sha256 .*, announced")],
)
def test_an_upload_must_be_what_was_announced(hub: HubServer, api: HfApi, body: bytes, message: str) -> None:
    api.create_repo(ID)
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    asked = {**BATCH, "objects": [{"oid": oid, "size": len(WEIGHTS)}]}
    status, _, answer = raw(hub, "POST", f"/{ID}.git/info/lfs/objects/batch", asked, "hf_ann")
    href = json.loads(answer)["objects"][0]["actions"]["upload"]["href"]
    assert status == 200
    assert raw(hub, "PUT", href, body)[0] == 400
    assert raw(hub, "PUT", f"{href[:-1]}", body)[0] == 403, "another signature"
    assert raw(hub, "PUT", href, body, "hf_ann")[0] == 400, "a token does not belong there"
    assert hub.violations[-1].endswith("a token was sent to the storage")
    assert hub.repo(ID).lfs == {}
    assert len(hub.violations) == 3
    with pytest.raises(AssertionError, match=message):
        hub.check()
    assert raw(hub, "PUT", href, iter([WEIGHTS[:1000], WEIGHTS[1000:]]))[0] == 200, "in chunks"
    assert list(hub.repo(ID).lfs.values()) == [WEIGHTS]


def test_parts_must_be_what_was_announced() -> None:
    with HubServer(part_size=1000) as hub, hub.reached_by_this_process():
        hub.add_account("ann", token="hf_ann")
        HfApi(endpoint=hub.url, token="hf_ann").create_repo(ID)
        oid = hashlib.sha256(WEIGHTS).hexdigest()
        asked = {**BATCH, "objects": [{"oid": oid, "size": len(WEIGHTS)}], "transfers": ["basic", "multipart"]}
        answer = json.loads(raw(hub, "POST", f"/{ID}.git/info/lfs/objects/batch", asked, "hf_ann")[2])
        upload = answer["objects"][0]["actions"]["upload"]
        assert set(upload["header"]) == {"chunk_size", "1", "2", "3"}
        sent = [raw(hub, "PUT", upload["header"][str(n + 1)], WEIGHTS[1000 * n :][:1000]) for n in range(3)]
        assert [status for status, _, _ in sent] == [200, 200, 200]
        hub.check()
        assert raw(hub, "PUT", upload["header"]["3"], b"x" * 1000)[0] == 400, "a part that is too long"
        parts = [{"partNumber": n + 1, "etag": headers["etag"]} for n, (_, headers, _) in enumerate(sent)]
        assert raw(hub, "POST", upload["href"], {"oid": oid, "parts": parts[:2]})[0] == 400, "a part is missing"
        assert hub.repo(ID).lfs == {}
        assert raw(hub, "POST", upload["href"], {"oid": oid, "parts": parts})[0] == 200
        assert hub.repo(ID).lfs == {oid: WEIGHTS}
        assert len(hub.violations) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "curves/loss.csv"])
def test_ranges(hub: HubServer, api: HfApi, published: str, name: str) -> None:
    content = hub.repo(ID).files()[name]
    path = f"/{ID}/resolve/main/{name}"
    status, headers, body = raw(hub, "GET", path)
    assert headers["x-repo-commit"] == published
    if name.endswith(".safetensors"):
        assert (status, headers["x-linked-size"]) == (302, str(len(content)))
        assert headers["x-linked-etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
        path = headers["location"]
    else:
        assert (status, body) == (200, content)
    size = len(content)
    for asked, expected in (("2-5", content[2:6]), ("3-", content[3:]), ("-4", content[-4:]), ("0-99999", content)):
        status, headers, body = raw(hub, "GET", path, Range=f"bytes={asked}")
        assert (status, body) == (206, expected)
        start = content.find(expected) if asked != "-4" else size - 4
        assert headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/{size}"
    hub.check()
    for count, asked in enumerate((f"{size}-", "5-2", "-", "-0", "a-b"), start=1):
        status, headers, _ = raw(hub, "GET", path, Range=f"bytes={asked}")
        assert (status, headers["content-range"]) == (416, f"bytes */{size}")
        assert len(hub.violations) == count


def test_head_has_headers_alone(hub: HubServer, published: str) -> None:
    status, headers, body = raw(hub, "HEAD", f"/{ID}/resolve/v9/config.json")
    assert (status, headers["x-error-code"], body) == (404, "RevisionNotFound", b"")
    status, headers, body = raw(hub, "HEAD", f"/{ID}/resolve/main/none")
    assert (status, headers["x-error-code"], headers["x-repo-commit"]) == (404, "EntryNotFound", published)
    status, headers, body = raw(hub, "HEAD", f"/{ID}/resolve/main/curves/loss.csv")
    assert (status, headers["content-length"], body) == (200, "10", b"")
    hub.check()


def test_a_wrong_card_cannot_be_committed(hub: HubServer, published: str) -> None:
    wrong = {
        "path": "README.md",
        "content": base64.b64encode(b"---\nlicense: x\n---\n").decode(),
        "encoding": "base64",
    }
    status, _, body = raw(hub, "POST", f"{API}/commit/main", lines(("file", wrong)), "hf_ann")
    assert (status, hub.repo(ID).head) == (400, published)
    assert '"license" must be one of' in json.loads(body)["errors"][0]["message"]
