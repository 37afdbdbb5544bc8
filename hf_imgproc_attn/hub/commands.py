"""The commands ``publish``, ``pull`` and ``list`` of ``imgproc-attn``; the Hub's client is imported when they run."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import UsageError


def add_commands(commands: Any) -> None:
    """Add the sub-commands to ``commands``, the result of ``add_subparsers``."""
    publish = commands.add_parser(
        "publish",
        help="publish a finished run: weights, code, record and card, verified and tagged",
        description="Publish a finished run in one commit, load it back in a fresh process, tag it. The token is the "
        "Hub's own login (hf auth login) or HF_TOKEN.",
    )
    publish.add_argument("run", metavar="RUN", help="output folder of a training command")
    publish.add_argument("--repo-id", required=True, metavar="NAME/ID", help="the repository; created where missing")
    publish.add_argument("--private", action="store_true", help="create it as a private one")
    publish.add_argument("--revision", metavar="R", help="the branch to commit to (default: main)")
    publish.add_argument(
        "--baseline", metavar="RUN", help="a run of the same recipe, e.g. with --preset softmax, to stand beside it"
    )
    publish.add_argument(
        "--license",
        metavar="ID",
        help="of the checkpoint, as the Hub names it (default: that of the training command, the base model or the "
        "data, else none)",
    )
    publish.add_argument(
        "--force", action="store_true", help="replace edits of the card on the Hub that contradict this run"
    )
    publish.add_argument(
        "--dry-run", action="store_true", help="check the run, make its card in a temporary folder, send nothing"
    )
    _add_endpoint(publish)
    publish.set_defaults(run_command=run_publish)

    pull = commands.add_parser(
        "pull",
        help="download a published checkpoint and check it",
        description="Download a checkpoint into the Hub's cache or a folder, and compare it with the Hub's checksums.",
    )
    pull.add_argument("repo_id", metavar="NAME/ID")
    pull.add_argument("--revision", metavar="R", help="branch, tag or commit (default: the newest of main)")
    pull.add_argument("--output", metavar="DIR", help="a folder (default: the Hub's cache)")
    pull.add_argument(
        "--force", action="store_true", help="overwrite files in DIR that differ, or a run that is there"
    )
    _add_endpoint(pull)
    pull.set_defaults(run_command=run_pull)

    listing = commands.add_parser(
        "list",
        help="list the checkpoints that an account has published",
        description="List an account's checkpoints of this package, with the figures of their cards.",
    )
    listing.add_argument("name", metavar="NAME", help="a user or an organisation")
    _add_endpoint(listing)
    listing.set_defaults(run_command=run_list)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--endpoint", metavar="URL", help="another Hub (default: HF_ENDPOINT, else the public one)")


def run_publish(options: argparse.Namespace) -> int:
    """``imgproc-attn publish``."""
    from .publishing import publish

    publication = publish(
        options.run,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        endpoint=options.endpoint,
        baseline=options.baseline,
        license=options.license,
        dry_run=options.dry_run,
        force=options.force,
    )
    if publication is not None:
        print(publication)
    return 0


def run_pull(options: argparse.Namespace) -> int:
    """``imgproc-attn pull``."""
    from .downloading import pull

    download = pull(
        options.repo_id,
        revision=options.revision,
        endpoint=options.endpoint,
        output=options.output,
        force=options.force,
    )
    print(f"{download.repo_id} ({download.model_type}), {download.files} files as the Hub has them")
    for remark in download.remarks:
        print(f"note: {remark}")
    print(f"folder:   {download.folder}\nrevision: {download.revision}")
    return 0


def run_list(options: argparse.Namespace) -> int:
    """``imgproc-attn list``."""
    from .downloading import list_checkpoints

    rows = [["repository", "revision", "variant", "visible", "figures"]]
    for item in list_checkpoints(options.name, endpoint=options.endpoint):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in item.metrics.items()) or "none"
        rows.append([item.repo_id, item.revision, item.variant, "private" if item.private else "public", figures])
    if len(rows) == 1:
        raise UsageError(f"{options.name} has published no checkpoint of this package (that the token can see)")
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
