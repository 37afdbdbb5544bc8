"""Published checkpoints: which there are, and a download that is complete, unchanged and free of pickles."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..backbones import SAVED_MODEL_TYPES
from ..cards.merging import LIBRARY_TAG
from ..models.spec_fields import PRESETS
from ..output_paths import check_output_folder
from .client import HubError, connect, patiently
from .repository import check_repo_id, list_files, repository_model_type, same_content
from .run_files import RECORD
from .travelling_code import audit_folder, differing_files, missing_imports

_PICKLES = ["*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt", "*.h5", "*.msgpack", "*.npy", "*.npz"]
_DOWNLOADS = 2


@dataclass(frozen=True)
class Download:
    """A downloaded checkpoint.

    Attributes:
        folder: where it is.
        repo_id: ``NAME/ID``.
        revision: the commit, 40 hexadecimal digits.
        model_type: of the backbone, or that of filtered models of any other type.
        files: how many files were compared with the Hub's checksums.
        remarks: what is worth knowing about its code; empty where it is this package's.
    """

    folder: Path
    repo_id: str
    revision: str
    model_type: str
    files: int
    remarks: list[str]


@dataclass(frozen=True)
class Listing:
    """One published checkpoint, as its card describes it.

    Attributes:
        repo_id: ``NAME/ID``.
        revision: the newest commit.
        private: whether it is private.
        variant: preset or ``custom``, and backbone, from the card's tags.
        metrics: name -> value, as the card's model-index has them.
    """

    repo_id: str
    revision: str
    private: bool
    variant: str
    metrics: dict[str, Any]


def pull(
    repo_id: str,
    *,
    revision: str | None = None,
    endpoint: str | None = None,
    output: str | Path | None = None,
    force: bool = False,
) -> Download:
    """Download a checkpoint and compare every file with the Hub's checksums.

    The client accepts a download with a flipped byte (seen with huggingface_hub 2.4.0), and resumes one that was cut;
    here a file that differs is deleted, so that it can neither be used nor stay in the cache, and fetched once more.

    Args:
        repo_id: ``NAME/ID``.
        revision: branch, tag or commit; None: the newest commit of ``main``.
        endpoint: URL of the Hub; None: ``HF_ENDPOINT``, else the public one.
        output: a folder to download to; None: the Hub's cache, where ``from_pretrained`` finds it.
        force: overwrite files in ``output`` that differ from those of the Hub, or a run that is there.

    Raises:
        HubError: if there is no such checkpoint, it is none of ours, or it does not arrive unchanged; if ``output``
            cannot be written to, or (without ``force``) holds files that would be lost, naming them.
    """
    check_repo_id(repo_id)
    if output is not None:
        check_output_folder(output)
    api = connect(endpoint)
    info = patiently(f"find {repo_id}", lambda: api.model_info(repo_id, revision=revision))
    commit = str(info.sha)
    model_type = repository_model_type(api, repo_id, commit)
    if model_type not in SAVED_MODEL_TYPES:
        raise HubError(
            f"repo_id must be a checkpoint of type {' or '.join(SAVED_MODEL_TYPES)}, got {repo_id}: {model_type}"
        )
    options: dict[str, Any] = {} if output is None else {"local_dir": str(output)}
    if output is not None and not force:
        _check_overwrites(api, repo_id, commit, Path(output))
    wrong: list[str] = []
    for _ in range(_DOWNLOADS):
        folder = patiently(
            f"download {repo_id}",
            lambda: api.snapshot_download(repo_id, revision=commit, ignore_patterns=_PICKLES, **options),
        )
        wrong, files = _differing(api, repo_id, commit, options)
        if not wrong:
            return Download(Path(folder), repo_id, commit, model_type, files, _remarks(folder))
        for name in wrong:
            _delete(Path(folder) / name)
    raise HubError(
        f"{repo_id} at {commit} did not arrive unchanged: {', '.join(wrong)} differ from the Hub's checksums and were "
        "deleted; try again"
    )


def list_checkpoints(name: str, *, endpoint: str | None = None) -> Iterator[Listing]:
    """The checkpoints of this package that an account has published, private ones where the token opens them.

    Args:
        name: a user or an organisation.
        endpoint: as in :func:`pull`.

    Raises:
        HubError: if the Hub cannot be asked, or for the name of a repository.
    """
    if not name or "/" in name:
        raise HubError(f"NAME must be a user or an organisation, got {name!r}")
    api = connect(endpoint)
    # Not streamed: an error must come before the first row.
    models = patiently(
        f"list the models of {name}",
        lambda: list(api.list_models(author=name, filter=LIBRARY_TAG, full=True, cardData=True)),
    )
    for model in models:
        results = (model.card_data.eval_results if model.card_data is not None else None) or []
        metrics = {str(result.metric_name or result.metric_type): result.metric_value for result in results}
        variant = " ".join(tag for tag in model.tags or [] if tag in (*PRESETS, "custom", *SAVED_MODEL_TYPES))
        yield Listing(model.id, str(model.sha), bool(model.private), variant, metrics)


def _differing(api: HfApi, repo_id: str, commit: str, options: dict[str, Any]) -> tuple[list[str], int]:
    """Files that are not what the Hub says, and how many were compared. Pickles were left out on purpose."""
    found = patiently(
        f"ask for the checksums of {repo_id}",
        lambda: api.verify_repo_checksums(repo_id, revision=commit, **options),
    )
    missing = [path for path in found.missing_paths if not any(fnmatch(path, pattern) for pattern in _PICKLES)]
    return sorted([item["path"] for item in found.mismatches] + missing), found.checked_count


def _check_overwrites(api: HfApi, repo_id: str, commit: str, folder: Path) -> None:
    """Refuse to overwrite what differs from the download: an edited file, another checkpoint, a run of the user's."""
    if not folder.is_dir():
        return
    on_hub = list_files(api, repo_id, commit)
    wanted = {name: found for name, found in on_hub.items() if not any(fnmatch(name, p) for p in _PICKLES)}
    lost = [
        name
        for name, found in sorted(wanted.items())
        if os.path.lexists(folder / name) and not ((folder / name).is_file() and same_content(folder / name, *found))
    ]
    holds_run = (folder / RECORD).is_file() and (RECORD in lost or RECORD not in wanted)
    if lost or holds_run:
        what = "holds a training run" if holds_run else "holds files that differ from those on the Hub"
        names = f" ({', '.join(lost)} would be overwritten)" if lost else ""
        raise HubError(f"output {str(folder)!r} {what}{names}: choose another folder, or pass --force")


def _delete(path: Path) -> None:
    """A file of a snapshot; in a cache also the blob that the link leads to."""
    if path.is_symlink():
        path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _remarks(folder: str) -> list[str]:
    differing = differing_files(folder)
    remarks = [f"its code differs from this package's in {', '.join(differing)}"] if differing else []
    lacking = missing_imports(folder, [path.name for path in Path(folder).glob("*.py")])
    remarks += [f"its code is not complete, it lacks {finding}" for finding in lacking]
    return remarks + [f"its code has what a model has no need for: {finding}" for finding in audit_folder(folder)]
