"""How the tests' Hub server describes repositories, files and commits in JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from tests.hub.card_rules import derived_tags, front_matter
from tests.hub.store import Blob, Commit, HubError, Repository, breach


def model_info(repository: Repository, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    """What the Hub knows about a model at a commit; ``blobs`` adds sizes and hashes of its files."""
    card = front_matter(_text(commit, "README.md")) or {}
    try:
        config = json.loads(_text(commit, "config.json"))
    except ValueError:
        config = {}
    paths = sorted(commit.files)
    return {
        "_id": hashlib.sha1(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": repository.id.partition("/")[0],
        "sha": commit.sha,
        "createdAt": repository.commits()[-1].date,
        "lastModified": repository.resolve().date,
        "private": repository.private,
        "disabled": False,
        "gated": False,
        "downloads": 0,
        "likes": 0,
        "trendingScore": 0,
        "usedStorage": sum(len(blob.content) for blob in commit.files.values()),
        "tags": derived_tags(card, config, paths),
        "siblings": [_sibling(path, commit.files[path], blobs) for path in paths],
        "config": {key: config[key] for key in ("architectures", "auto_map", "model_type") if key in config},
        "cardData": card,
        **{key: card[key] for key in ("pipeline_tag", "model-index") if key in card},
        **({"library_name": card.get("library_name", "transformers")} if card or config else {}),
    }


def brief(info: dict[str, Any], asked: set[str]) -> dict[str, Any]:
    """What a list of models says of one: no card, configuration or files unless these parameters ask for it."""
    hidden = {"model-index", *({"cardData", "config"} - asked)}
    if "full" not in asked:
        hidden |= {"author", "sha", "lastModified", "gated", "disabled", "siblings", "usedStorage"}
    return {key: value for key, value in info.items() if key not in hidden}


def chosen(info: dict[str, Any], expand: list[str] | None) -> dict[str, Any]:
    """The fields asked for with ``expand``, with the ones that are always there; all where nothing is asked for."""
    if expand is None:
        return info
    known = {*info, "pipeline_tag", "model-index", "library_name"}
    if unknown := set(expand) - known:
        raise breach(f"expand knows no {sorted(unknown)}")
    return {key: value for key, value in info.items() if key in ("_id", "id", "modelId", *expand)}


def commit_info(commit: Commit) -> dict[str, Any]:
    authors = [{"user": commit.author}]
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.message,
        "authors": authors,
        "date": commit.date,
    }


def tree(repository: Repository, commit: Commit, folder: str, recursive: bool, expand: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder ("" is the root); ``expand`` adds the commit that last changed each."""
    prefix = f"{folder.strip('/')}/" if folder else ""
    below = sorted(path for path in commit.files if path.startswith(prefix))
    if prefix and not below:
        raise HubError(404, f"{folder} does not exist on this revision", "EntryNotFound")
    folders = {path[:i] for path in below for i in range(len(prefix), len(path)) if path[i] == "/"}
    names = [n for n in sorted({*below, *folders}) if recursive or "/" not in n.removeprefix(prefix)]
    entries = [_folder(n, commit) if n in folders else _file(n, commit.files[n]) for n in names]
    if expand:
        for entry in entries:
            last = repository.last_change(entry["path"], commit.sha)
            entry["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
    return entries


def _text(commit: Commit, path: str) -> str:
    return commit.files[path].content.decode() if path in commit.files else ""


def _sibling(path: str, blob: Blob, blobs: bool) -> dict[str, Any]:
    if not blobs:
        return {"rfilename": path}
    sibling = {"rfilename": path, "size": len(blob.content), "blobId": blob.oid}
    return sibling | ({"lfs": _lfs(blob, "sha256")} if blob.lfs else {})


def _file(path: str, blob: Blob) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
    return entry | ({"lfs": _lfs(blob, "oid")} if blob.lfs else {})


def _lfs(blob: Blob, hash_key: str) -> dict[str, Any]:
    return {hash_key: blob.sha256, "size": len(blob.content), "pointerSize": len(blob.pointer)}


def _folder(path: str, commit: Commit) -> dict[str, Any]:
    content = [(name, blob.oid) for name, blob in sorted(commit.files.items()) if name.startswith(f"{path}/")]
    oid = hashlib.sha1(json.dumps(content).encode()).hexdigest()
    return {"type": "directory", "path": path, "size": 0, "oid": oid}
