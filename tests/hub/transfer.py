"""The routes of the tests' Hub server by which files come and go: upload, commit, download."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from typing import Any
from urllib.parse import quote

from tests.hub.card_rules import check_card
from tests.hub.protocol import ID, REVISION, Grant, Reply, Request, Routes, json_reply
from tests.hub.store import Blob, HubError, Repository, breach, wants_lfs

ROUTES = Routes()


@ROUTES.add("POST", f"/api/models/{ID}/preupload/{REVISION}")
def preupload(request: Request, repo_id: str, revision: str) -> Reply:
    present, body = request.writable(repo_id).resolve(revision).files, request.json()
    ignored = body.get("gitIgnore")
    if ignored is None:
        ignored = present[".gitignore"].content.decode() if ".gitignore" in present else ""
    patterns = [line.strip("/ ") for line in ignored.splitlines() if line.strip() and not line.startswith("#")]
    answers = []
    for file in body.get("files", []):
        path, size = _checked_path(file.get("path")), file.get("size")
        if not isinstance(size, int) or len(base64.b64decode(file.get("sample", ""))) != min(size, 512):
            raise breach(f"preupload of {path}: the sample must be the first 512 bytes of the file's {size!r}")
        mode = "lfs" if wants_lfs(path, size) else "regular"
        answer: dict[str, Any] = {
            "path": path,
            "uploadMode": mode,
            "oid": present[path].remote_oid if path in present else None,
        }
        answer["shouldIgnore"] = any(fnmatch.fnmatch(p, rule) for rule in patterns for p in (path, *path.split("/")))
        answers.append(answer)
    return json_reply({"files": answers})


@ROUTES.add("POST", rf"/{ID}\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo_id: str) -> Reply:
    repository, body, hub = request.writable(repo_id), request.json(), request.hub
    if body.get("operation") != "upload" or body.get("hash_algo") != "sha256" or "basic" not in body["transfers"]:
        raise breach("the batch must be an upload with sha256 that allows the basic transfer")
    multipart, answers = "multipart" in body["transfers"], []
    for item in body["objects"]:
        oid, size = item["oid"], item["size"]
        answers.append(answer := {"oid": oid, "size": size})
        if oid in repository.lfs:
            continue
        href, header = f"{hub.storage_url}/upload/{hub.grant(repository, oid, size)}", {}
        if multipart and size > hub.part_size:
            numbers = range(1, -(-size // hub.part_size) + 1)
            header = {"chunk_size": str(hub.part_size)} | {str(n): f"{href}/{n}" for n in numbers}
        verify = {"href": f"{hub.url}/{repo_id}.git/info/lfs/objects/verify"}
        answer["actions"] = {"upload": {"href": href, "header": header}, "verify": verify}
    return json_reply({"transfer": "basic", "objects": answers})


@ROUTES.add("POST", rf"/{ID}\.git/info/lfs/objects/verify")
def lfs_verify(request: Request, repo_id: str) -> Reply:
    repository, body = request.writable(repo_id), request.json()
    content = repository.lfs.get(str(body.get("oid")))
    if content is None or len(content) != body.get("size"):
        raise breach(f"verify of an object that was not uploaded with this size: {body}")
    return json_reply({})


def _granted(request: Request, grant: str) -> Grant:
    if grant not in request.hub.grants:
        raise breach("the storage knows no such signature", 403)
    return request.hub.grants[grant]


@ROUTES.add("PUT", "/upload/(?P<grant>[0-9a-f]+)(?:/(?P<number>[0-9]+))?", on_storage=True)
def upload(request: Request, grant: str, number: str) -> Reply:
    granted = _granted(request, grant)
    if number:
        size = min(granted.part_size, granted.size - (int(number) - 1) * granted.part_size)
        if len(request.body) != size:
            raise breach(f"part {number} has {len(request.body)} bytes, expected {size}")
        granted.parts[int(number)] = request.body
    else:
        _keep(granted, request.body)
    return Reply(headers={"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})


@ROUTES.add("POST", "/upload/(?P<grant>[0-9a-f]+)", on_storage=True)
def upload_complete(request: Request, grant: str) -> Reply:
    granted, body = _granted(request, grant), request.json()
    parts = [{"partNumber": n, "etag": f'"{hashlib.md5(p).hexdigest()}"'} for n, p in sorted(granted.parts.items())]
    if body != {"oid": granted.oid, "parts": parts}:
        raise breach(f"the completed parts are not those uploaded: {body}")
    _keep(granted, b"".join(part for _, part in sorted(granted.parts.items())))
    return json_reply({})


def _keep(granted: Grant, content: bytes) -> None:
    if len(content) != granted.size:
        raise breach(f"upload of {len(content)} bytes, announced {granted.size}")
    if (sha256 := hashlib.sha256(content).hexdigest()) != granted.oid:
        raise breach(f"upload with sha256 {sha256}, announced {granted.oid}")
    granted.repository.lfs[granted.oid] = content


def _checked_path(path: Any) -> str:
    if not isinstance(path, str) or not path or {"", ".", "..", ".git"} & set(path.split("/")):
        raise breach(f"invalid path in a repository: {path!r}")
    return path


@ROUTES.add("POST", f"/api/models/{ID}/commit/{REVISION}", "create_pr hot_reload")
def commit(request: Request, repo_id: str, revision: str) -> Reply:
    repository = request.writable(repo_id)
    if request.flag("create_pr") or request.flag("hot_reload"):
        raise breach("this server has no pull requests", 501)
    if revision not in repository.branches:
        parent = repository.resolve(revision)
        raise breach(f"{revision} is no branch but names commit {parent.sha}")
    try:
        lines = [json.loads(line) for line in request.body.splitlines()]
        header, operations = lines[0]["value"], [(line["key"], line["value"]) for line in lines[1:]]
        if lines[0]["key"] != "header" or not header["summary"]:
            raise KeyError("header")
    except (ValueError, KeyError, IndexError, TypeError):
        raise breach("a commit is a header with a summary and one operation a line, in JSON") from None
    if header.get("parentCommit") not in (None, repository.branches[revision]):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    files = dict(repository.resolve(revision).files)
    for key, value in operations:
        _apply(key, value, files, repository)
    readme = files.get("README.md")
    if readme is not None and (errors := check_card(readme.content.decode())[0]):
        raise HubError(400, "Invalid metadata in README.md", body={"errors": [{"message": e} for e in errors]})
    author = request.account.name if request.account else ""
    made = repository.add_commit(revision, files, header["summary"], header.get("description", ""), author)
    url = f"{request.hub.url}/{repo_id}/commit/{made.sha}"
    return json_reply({"success": True, "commitOid": made.sha, "commitUrl": url, "hookOutput": ""})


def _apply(key: str, value: dict[str, Any], files: dict[str, Blob], repository: Repository) -> None:
    path = _checked_path(value.get("path", "").rstrip("/") if key == "deletedFolder" else value.get("path"))
    if key == "file":
        content = base64.b64decode(value["content"], validate=True)
        if wants_lfs(path, len(content)):
            raise breach(f"{path} must be uploaded as a large file")
        files[path] = Blob(content, lfs=False)
    elif key == "lfsFile":
        stored = repository.lfs.get(value["oid"])
        if stored is None or value.get("size", len(stored)) != len(stored) or value["algo"] != "sha256":
            raise breach(f"{path}: no object {value['oid']} of {value.get('size')} bytes was uploaded")
        files[path] = Blob(stored, lfs=True)
    elif key in ("deletedFile", "deletedFolder"):
        gone = [name for name in files if name == path or (key == "deletedFolder" and name.startswith(f"{path}/"))]
        if not gone:
            raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        for name in gone:
            del files[name]
    else:
        raise breach(f"unknown operation {key!r} in a commit")


def _content(request: Request, content: bytes, headers: dict[str, str]) -> Reply:
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = request.headers.get("range")
    if asked is None:
        return Reply(content, 200, headers, is_content=True)
    size, match = len(content), re.fullmatch(r"bytes=(\d*)-(\d*)", asked)
    first, last = match.groups() if match else ("", "")
    start = int(first) if first else max(size - int(last or 0), 0)
    end = min(int(last) if first and last else size - 1, size - 1)
    if not (first or last) or not 0 <= start <= end:
        raise HubError(
            416, f"range {asked!r} of {size} bytes", violation=True, headers={"Content-Range": f"bytes */{size}"}
        )
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return Reply(content[start : end + 1], 206, headers, is_content=True)


@ROUTES.add("GET HEAD", f"/{ID}/resolve/{REVISION}/(?P<path>.+)", "download")
def resolve(request: Request, repo_id: str, revision: str, path: str) -> Reply:
    repository = request.readable(repo_id)
    found = repository.resolve(revision)
    headers = {"X-Repo-Commit": found.sha}
    blob = found.files.get(path)
    if blob is None:
        raise HubError(404, "Entry not found", "EntryNotFound", headers=headers)
    if not blob.lfs:
        return _content(request, blob.content, {**headers, "ETag": f'"{blob.oid}"'})
    headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    grant = request.hub.grant(repository, blob.sha256, len(blob.content))
    headers["Location"] = f"{request.hub.storage_url}/download/{grant}/{quote(path)}"
    return Reply(b"", 302, headers)


@ROUTES.add("GET", "/download/(?P<grant>[0-9a-f]+)/(?P<path>.+)", on_storage=True)
def download(request: Request, grant: str, path: str) -> Reply:
    granted = _granted(request, grant)
    return _content(request, granted.repository.lfs[granted.oid], {"ETag": f'"{granted.oid}"'})
