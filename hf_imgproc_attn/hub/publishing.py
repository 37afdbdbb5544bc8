"""From a finished run to a published checkpoint that has been downloaded again and found to be the same.

The order matters. Everything that can be wrong with the run is found before the Hub is asked; the branch that was
asked for is looked at, and where it holds the run already nothing is written; else the right to write and the card are
checked before anything is uploaded. One commit holds all files; it is downloaded into an empty cache by a process
without this package, and compared; only then is it tagged. Whatever goes wrong on the way, a tag never names something
half-published and never moves, and the same call goes on from where it ended.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..cards.merging import MergedCard, merge_card
from ..errors import UsageError
from .client import HubError, connect, patiently
from .licences import Licence, find_licence
from .repository import (
    MAIN,
    Files,
    Found,
    branches_and_tags,
    check_card,
    check_may_write,
    check_purpose,
    check_repo_id,
    commit_files,
    create,
    differences,
    full_name,
    list_files,
    look_at,
    read_text,
    stale_files,
)
from .run_files import CARD, CURVES, Contents, RunFolder, contents, read_run
from .verification import check_loads, verify


@dataclass(frozen=True)
class Publication:
    """What has been published.

    Attributes:
        repo_id: ``NAME/ID``.
        url: of the repository.
        revision: the commit, 40 hexadecimal digits; nobody can change what it names.
        tag: the tag on it.
        model_class: class that a process without this package loads.
        was_there: whether it had been published before, and nothing was written.
    """

    repo_id: str
    url: str
    revision: str
    tag: str
    model_class: str
    was_there: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        done = "already there, nothing was written:" if self.was_there else "published:"
        return (
            f"{self.model_class} loads without this package and gives the run's own outputs\n"
            f"{done} {self.url}\nrevision:  {self.revision} (tag {self.tag})"
        )


@dataclass(frozen=True)
class _Plan:
    """What a branch is to hold.

    Attributes:
        files: all of them, with the card.
        tag: for the commit that holds them.
        card: merged with the one that is there.
        holds: whether the branch's newest commit holds them already.
        is_tagged: whether ``tag`` is on that commit already.
    """

    files: Files
    tag: str
    card: MergedCard
    holds: bool
    is_tagged: bool


def publish(
    run: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    baseline: str | Path | None = None,
    license: str | None = None,  # noqa: A002  # the Hub's name of the field
    dry_run: bool = False,
    force: bool = False,
) -> Publication | None:
    """Publish a finished training run: weights, code, record, curves and card, verified and tagged.

    Nothing is written into the run's folder.

    Args:
        run: folder of a finished run.
        repo_id: ``NAME/ID``; without ``NAME/`` the account of the token.
        private: create the repository as a private one.
        revision: the branch to commit to, created where it is missing; None: ``main``.
        endpoint: URL of the Hub; None: ``HF_ENDPOINT``, else the public one.
        baseline: folder or results file of a run of the same recipe, to stand beside it in the card.
        license: of the licence, as the Hub knows it; None: what :func:`.licences.find_licence` finds.
        dry_run: make the card, in a temporary folder, and list the files; the Hub is not asked.
        force: replace sections of the card that were edited on the Hub where this run has something else to say.

    Returns:
        What was published, or was there already; None after a dry run.

    Raises:
        UsageError: if the run or its baseline cannot be published (see :func:`.run_files.read_run`), or would replace
            edits of the card.
        HubError: if the Hub refuses, or what comes back from it is not what was sent.
    """
    from ..cards.rendering import load_results

    check_repo_id(repo_id)
    checked = read_run(run)
    if baseline is not None and Path(baseline).resolve() == Path(run).resolve():
        raise UsageError(f"baseline must be another run than the one that is published, got {str(baseline)!r}")
    other = None if baseline is None else load_results(baseline)
    _print_hints(checked, other, baseline)
    api = None if dry_run else connect(endpoint)  # an endpoint that is no URL is found before the model is loaded
    check_loads(checked)
    licence = find_licence(checked.results.record, license, ask_hub=not dry_run)
    if api is None:
        _show(contents(checked, repo_id, other, licence.keys), repo_id, licence)
        return None
    branch = revision or MAIN
    repo_id = full_name(api, repo_id)
    found = look_at(api, repo_id, branch)
    check_purpose(api, repo_id, found, checked.config["model_type"], private=private)
    made = contents(checked, repo_id, other, licence.keys)
    published_card = None if found.head is None else read_text(api, repo_id, CARD, found.head)
    plan = _plan(made, found, published_card, licence, force)
    for remark in [*_licence_remarks(plan.card.front_matter, licence), *plan.card.notes]:
        print(remark, flush=True)
    return _carry_out(api, repo_id, found, plan, checked.folder, branch=branch, private=private)


def _carry_out(
    api: HfApi, repo_id: str, found: Found, plan: _Plan, folder: Path, *, branch: str, private: bool
) -> Publication:
    """Commit, verify and tag, each where it has not been done yet."""
    commit = found.head if plan.holds else None
    if not (plan.holds and plan.is_tagged):
        check_may_write(api, repo_id, found)
    if commit is None:
        check_card(api, plan.card.text)
        head = create(api, repo_id, found, private=private, branch=branch)
        if stale := stale_files(found.files, plan.files):
            print(f"deleting from the branch {branch}, whose history keeps them: {', '.join(stale)}")
        print(f"uploading to {api.endpoint}/{repo_id}, branch {branch}:\n{file_table(plan.files)}", flush=True)
        commit = commit_files(api, repo_id, plan.files, branch=branch, head=head, title=plan.tag)
        print(f"committed as {commit}; verifying in a fresh process", flush=True)
    else:
        print(f"{repo_id}, branch {branch}, holds this run already; verifying it", flush=True)
    loaded = verify(api, repo_id, commit, folder, is_tagged=plan.is_tagged)
    if not plan.is_tagged:
        patiently(
            f"tag {repo_id} as {plan.tag}",
            lambda: api.create_tag(repo_id, tag=plan.tag, revision=commit, exist_ok=True),
        )
    _check_still_there(api, repo_id, branch, commit, plan)
    was_there = plan.holds and plan.is_tagged
    return Publication(repo_id, f"{api.endpoint}/{repo_id}", commit, plan.tag, loaded["class"], was_there)


def prepare_repository(
    api: HfApi,
    repo_id: str,
    model_type: str,
    *,
    private: bool,
    branch: str = MAIN,
) -> str:
    """Make sure that a token may write, that the repository is there, and that it is for this type of model.

    For a run that is going to be published when it ends, so that what would be refused then costs no training.

    Args:
        api: from :func:`.client.connect`.
        repo_id: ``NAME/ID``, or ``ID`` in the account of the token.
        model_type: of the checkpoint to come.
        private: what a new repository becomes; an existing public one is refused then.
        branch: is created where it is missing.

    Returns:
        The full ``NAME/ID``.

    Raises:
        HubError: without a token that may write, or for a repository that holds something else.
    """
    repo_id = full_name(api, repo_id)
    found = look_at(api, repo_id, branch)
    check_may_write(api, repo_id, found)
    check_purpose(api, repo_id, found, model_type, private=private)
    create(api, repo_id, found, private=private, branch=branch)
    return repo_id


def _plan(made: Contents, found: Found, published_card: str | None, licence: Licence, force: bool) -> _Plan:
    """Whether the branch holds the run, under one of the tags that its content may have, or what it is to hold.

    The tag of a content is its hash; where the same content was published before, in another commit, a number follows.
    """
    family = [name for name in found.tags if name == made.tag or name.startswith(f"{made.tag}.")]
    new = next(name for name in _numbered(made.tag) if name not in found.tags)
    at_head = [name for name in family if found.tags[name] == found.head]
    given = frozenset(("license", "license_name", "license_link")) if licence.is_given else frozenset[str]()

    def merged(pinned: str) -> tuple[MergedCard, Files]:
        card = merge_card(made.card(pinned), published_card, revision=pinned, given=given, force=force)
        return card, {**made.files, CARD: card.text.encode()}

    if found.head is not None and not differences(found.files, made.files):
        for pinned in dict.fromkeys([*at_head, *family, new]):
            card, files = merged(pinned)
            if not differences(found.files, files):
                tag = at_head[0] if at_head else pinned if pinned == new else new
                return _Plan(files, tag, card, True, bool(at_head))
    card, files = merged(new)
    return _Plan(files, new, card, False, False)


def _numbered(tag: str) -> Iterator[str]:
    yield tag
    number = 2
    while True:
        yield f"{tag}.{number}"
        number += 1


def _check_still_there(api: HfApi, repo_id: str, branch: str, commit: str, plan: _Plan) -> None:
    """Refuse to call published what somebody else has replaced, or whose tag somebody else has put, meanwhile."""
    branches, tags = branches_and_tags(api, repo_id)
    if tags.get(plan.tag) != commit:
        raise HubError(f"the tag {plan.tag} of {repo_id} is not on {commit}, but on {tags.get(plan.tag)}")
    now = branches.get(branch)
    wrong = [] if now in (None, commit) else differences(list_files(api, repo_id, str(now)), plan.files)
    if now is None or wrong:
        raise HubError(
            f"the run is in {repo_id} at {commit}, but the branch {branch} has moved on to {now} meanwhile, which "
            f"does not hold it ({', '.join(wrong[:3])}): somebody else writes there"
        )


def _licence_remarks(front_matter: dict[str, Any], licence: Licence) -> list[str]:
    """What to print about the licence of a card; a warning where it names none."""
    remarks = [f"note: {remark}" for remark in licence.remarks]
    named = front_matter.get("license")
    if not named:
        if not licence.is_pending:
            remarks.append(f"warning: the card names no license: {licence}; pass --license ID")
    elif named == licence.keys.get("license"):
        remarks.append(f"license: {licence}")
    else:
        remarks.append(f"license: {named} (of the card on the Hub)")
    return remarks


def _print_hints(run: RunFolder, other: Any, baseline: str | Path | None) -> None:
    """Which command would measure what the card is going to lack."""
    if run.results.robustness is None:
        print(f"hint: this run was not evaluated on disturbed data: imgproc-attn evaluate {run.folder}")
    if other is not None and other.robustness is None and Path(str(baseline)).is_dir():
        print(f"hint: the baseline was not evaluated on disturbed data: imgproc-attn evaluate {baseline}")


def _show(made: Contents, repo_id: str, licence: Licence) -> None:
    """The dry run: card and curves in a temporary folder, which the user may look at and throw away."""
    card = merge_card(made.card(made.tag), None, revision=made.tag)
    files: Files = {**made.files, CARD: card.text.encode()}
    folder = Path(tempfile.mkdtemp(prefix="hf_imgproc_attn_card_"))
    for name in (CARD, CURVES):
        if isinstance(content := files.get(name), bytes):
            (folder / name).write_bytes(content)
    print(f"would publish {repo_id} as {made.tag}:\n{file_table(files)}")
    for remark in _licence_remarks(card.front_matter, licence):
        print(remark)
    print(f"the card, to look at: {folder / CARD}")
    print("nothing was sent, and nothing written to the run's folder; edits of a card on the Hub would be kept")


def file_table(files: Files) -> str:
    """The files of a publication with their sizes, one a line."""
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size for name, content in files.items()
    }
    return "\n".join(f"  {size:>13,}  {name}" for name, size in sorted(sizes.items()))
