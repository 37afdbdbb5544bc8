"""The routes of the tests' Hub server for accounts, cards, repositories, listings, branches and tags."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlencode

from tests.hub import listing
from tests.hub.card_rules import check_card
from tests.hub.protocol import ID, REVISION, Reply, Request, Routes, json_reply
from tests.hub.store import Commit, HubError, Repository, breach

ROUTES = Routes()
_NAME = re.compile(r"(?!.*(--|\.\.))[\w][\w.-]{0,94}[\w]|\w")


@ROUTES.add("GET", "/api/whoami-v2")
def whoami(request: Request) -> Reply:
    account = request.account
    if account is None:
        raise HubError(401, "Invalid username or password.")
    token = {"displayName": "test", "role": account.role}
    orgs = [{"type": "org", "name": name, "roleInOrg": account.role} for name in account.orgs]
    user = {"type": "user", "id": account.name, "name": account.name, "fullname": account.name, "isPro": False}
    return json_reply({**user, "orgs": orgs, "auth": {"type": "access_token", "accessToken": token}})


@ROUTES.add("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Reply:
    body = request.json()
    if body.get("repoType") != "model" or not isinstance(body.get("content"), str):
        raise breach('validate-yaml takes {"repoType": "model", "content": text}')
    errors, warnings = check_card(body["content"])
    found = {"errors": [{"message": error} for error in errors], "warnings": [{"message": w} for w in warnings]}
    return json_reply(found, 400 if errors else 200)


def _named(request: Request, *known: str) -> tuple[str, dict[str, Any]]:
    body = request.json()
    if unknown := set(body) - {"name", "organization", "type", *known}:
        raise breach(f"unknown fields {sorted(unknown)}")
    if body.get("type", "model") != "model":
        raise breach(f"this server has only models, got type {body['type']!r}", 501)
    name = body.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise breach(f"invalid name of a repository: {name!r}")
    namespace = body.get("organization") or (request.account.name if request.account else "")
    return f"{namespace}/{name}", body


def _visibility(body: Mapping[str, Any]) -> bool | None:
    value = body.get("visibility")
    if value not in (None, "public", "private"):
        raise breach(f"visibility must be public or private, got {value!r}")
    return None if value is None else value == "private"


@ROUTES.add("POST", "/api/repos/create")
def create_repo(request: Request) -> Reply:
    repo_id, body = _named(request, "visibility")
    account = request.may_write(repo_id)
    url = f"{request.hub.url}/{repo_id}"
    if repo_id in request.hub.repositories:
        raise HubError(409, "You already created this model repo", body={"url": url})
    request.hub.repositories[repo_id] = Repository(repo_id, bool(_visibility(body)), account.name)
    return json_reply({"url": url, "name": repo_id, "id": repo_id})


@ROUTES.add("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Reply:
    repo_id, _ = _named(request)
    del request.hub.repositories[request.writable(repo_id).id]
    return json_reply({})


@ROUTES.add("PUT", f"/api/models/{ID}/settings")
def settings(request: Request, repo_id: str) -> Reply:
    repository, body = request.writable(repo_id), request.json()
    private = _visibility(body)
    if private is None or set(body) != {"visibility"}:
        raise breach(f"settings takes a visibility, got the fields {sorted(body)}")
    repository.private = private
    return json_reply({"private": private})


@ROUTES.add("GET", f"/api/models/{ID}/auth-check(?P<write>/write)?")
def auth_check(request: Request, repo_id: str, write: str) -> Reply:
    request.writable(repo_id) if write else request.readable(repo_id)
    return json_reply({})


def _paged(request: Request, items: list[Any]) -> Reply:
    start = int(request.query.get("cursor", ["0"])[0])
    end = start + min(int(request.query.get("limit", [request.hub.page_size])[0]), request.hub.page_size)
    headers = {}
    if end < len(items):
        query = urlencode({**request.query, "cursor": [str(end)]}, doseq=True)
        headers["Link"] = f'<{request.hub.url}{request.path}?{query}>; rel="next"'
    return json_reply(items[start:end], headers=headers)


@ROUTES.add("GET", "/api/models", "author filter search limit sort full cardData config expand pipeline_tag cursor")
def list_models(request: Request) -> Reply:
    account, wanted = request.account, {key: values[0] for key, values in request.query.items()}
    filters = request.query.get("filter", []) + request.query.get("pipeline_tag", [])
    visible = [r for r in request.hub.repositories.values() if not r.private or (account and account.owns(r.id))]
    found = []
    for repository in reversed(visible):
        info = listing.model_info(repository, repository.resolve(), blobs=False)
        named = wanted.get("author") in (None, info["author"]) and wanted.get("search", "") in repository.id
        if named and set(filters) <= set(info["tags"]):
            found.append(info)
    if (sort := wanted.get("sort")) not in (None, "lastModified", "createdAt", "downloads", "likes", "trendingScore"):
        raise breach(f"unknown sort {sort!r}")
    found.sort(key=lambda info: info[sort or "createdAt"], reverse=True)
    if expand := request.query.get("expand"):
        return _paged(request, [listing.chosen(info, expand) for info in found])
    asked = {name for name in ("full", "cardData", "config") if request.flag(name)}
    return _paged(request, [listing.brief(info, asked) for info in found])


@ROUTES.add("GET", f"/api/models/{ID}/refs", "include_prs")
def refs(request: Request, repo_id: str) -> Reply:
    repository = request.readable(repo_id)

    def listed(kind: str, names: Mapping[str, str]) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    found: dict[str, list[dict[str, str]]] = {
        "branches": listed("heads", repository.branches),
        "converts": [],
        "tags": listed("tags", repository.tags),
    }
    return json_reply(found | ({"pullRequests": []} if request.flag("include_prs") else {}))


@ROUTES.add("GET", f"/api/models/{ID}/commits/{REVISION}", "cursor expand[]")
def commits(request: Request, repo_id: str, revision: str) -> Reply:
    return _paged(request, [listing.commit_info(c) for c in request.readable(repo_id).history(revision)])


@ROUTES.add("GET", f"/api/models/{ID}/tree/{REVISION}(?:/(?P<folder>.+))?", "recursive expand cursor limit")
def tree(request: Request, repo_id: str, revision: str, folder: str) -> Reply:
    repository = request.readable(repo_id)
    entries = listing.tree(
        repository, repository.resolve(revision), folder, request.flag("recursive"), request.flag("expand")
    )
    return _paged(request, entries)


@ROUTES.add("POST", f"/api/models/{ID}/paths-info/{REVISION}")
def paths_info(request: Request, repo_id: str, revision: str) -> Reply:
    repository, form = request.readable(repo_id), parse_qs(request.body.decode())
    if not form.get("paths"):
        raise breach("paths-info takes a form with paths")
    expand = form.get("expand", ["false"])[0].lower() == "true"
    entries = listing.tree(repository, repository.resolve(revision), "", True, expand)
    return json_reply([entry for entry in entries if entry["path"] in form["paths"]])


def _new_reference(names: dict[str, str], name: Any, target: Commit) -> Reply:
    if not isinstance(name, str) or not re.fullmatch(r"(?!.*\.\.)[\w][\w./-]*", name):
        raise breach(f"invalid name of a reference: {name!r}")
    if name in names:
        raise HubError(409, f"Reference {name} already exists")
    names[name] = target.sha
    return json_reply({}, 201)


@ROUTES.add("POST", f"/api/models/{ID}/tag/{REVISION}")
def tag(request: Request, repo_id: str, revision: str) -> Reply:
    repository = request.writable(repo_id)
    return _new_reference(repository.tags, request.json().get("tag"), repository.resolve(revision))


@ROUTES.add("POST", f"/api/models/{ID}/branch/{REVISION}")
def branch(request: Request, repo_id: str, revision: str) -> Reply:
    repository = request.writable(repo_id)
    start = repository.resolve(request.json().get("startingPoint", "main"))
    return _new_reference(repository.branches, revision, start)


@ROUTES.add("DELETE", f"/api/models/{ID}/(?P<kind>tag|branch)/{REVISION}")
def delete_reference(request: Request, repo_id: str, kind: str, revision: str) -> Reply:
    repository = request.writable(repo_id)
    names = repository.tags if kind == "tag" else repository.branches
    if revision not in names:
        raise HubError(404, f"Reference {revision} not found", "RevisionNotFound")
    if names is repository.branches and revision == "main":
        raise HubError(403, "Cannot delete the branch main")
    del names[revision]
    return json_reply({})


@ROUTES.add("GET", f"/api/datasets/{ID}", "expand")
def dataset_info(request: Request, repo_id: str) -> Reply:
    if repo_id not in request.hub.datasets:
        raise HubError(404 if request.account else 401, "Repository not found", "RepoNotFound")
    known = {"id": repo_id, "author": repo_id.partition("/")[0], "private": False, "tags": [], "downloads": 0}
    return json_reply({**known, "cardData": request.hub.datasets[repo_id]})


# Last, because an id may hold one slash and so would match what follows an id without one.
@ROUTES.add("GET", f"/api/models/{ID}(?:/revision/{REVISION})?", "blobs securityStatus expand")
def info(request: Request, repo_id: str, revision: str) -> Reply:
    repository = request.readable(repo_id)
    found = listing.model_info(repository, repository.resolve(revision or "main"), blobs=request.flag("blobs"))
    return json_reply(listing.chosen(found, request.query.get("expand")))
