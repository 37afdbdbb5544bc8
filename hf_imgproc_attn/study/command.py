"""``imgproc-attn study`` on the command line."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, require_extras
from ..output_paths import check_output_folder

if TYPE_CHECKING:
    from .driver import Engine
    from .ledger import Ledger
    from .plan import Study

ENGINES = ("local", "ray")
_OF_RUNS = {
    "budget": None, "jobs": 1, "threads": 1, "shard": "1/1", "engine": "local", "address": None, "cpus": None,
    "gpus": None,
}  # fmt: skip
"""Options on how runs are done, and what each is where it is not given."""


def add_command(commands: Any) -> None:
    """Add the sub-command to the parser of ``imgproc-attn``."""
    command = commands.add_parser(
        "study",
        help="train variants with several seeds and compare them, with intervals",
        description="Train every variant of a study with every seed on every task, from one start and in one order of "
        "batches, and write a table with intervals. One file a run is kept in the ledger; the same command goes on "
        "after it was stopped, however that was.",
    )
    command.add_argument("study", type=Path, metavar="STUDY.yaml", help="what is compared (docs/study.md)")
    command.add_argument(
        "--ledger", type=Path, metavar="DIR", help="folder of the results (default: outputs/study/NAME)"
    )
    command.add_argument("--report", action="store_true", help="train nothing; write the table of what the ledger has")
    command.add_argument(
        "--budget", type=float, metavar="MINUTES", help="begin no run that would not end in this time"
    )
    command.add_argument("--jobs", type=int, metavar="N", help="runs side by side (default: 1)")
    command.add_argument("--threads", type=int, metavar="N", help="CPU threads of a run (default: 1)")
    command.add_argument("--shard", metavar="i/n", help="do only each n-th run, from the i-th on")
    command.add_argument(
        "--engine", choices=ENGINES, help="where runs are done: here, or on a Ray cluster (default: local)"
    )
    command.add_argument("--address", metavar="ADDRESS", help="of the Ray cluster (default: one of this machine)")
    command.add_argument("--cpus", type=int, metavar="N", help="of one run on Ray (default: 1)")
    command.add_argument("--gpus", type=float, metavar="N", help="of one run on Ray (default: 0)")
    command.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="TASK.OPTION=VALUE",
        help="where data lie on this machine: dataset_name, dataset_config_name or tokenizer_name of a task",
    )
    command.set_defaults(run_command=run_command)

    findings = commands.add_parser(
        "findings",
        help="write the page on which claims hold, from the ledgers",
        description="Write a Markdown page with the claims of the papers and what the ledgers of studies say of each.",
    )
    findings.add_argument("page", type=Path, help="the Markdown file to write; it is replaced")
    findings.add_argument(
        "--ledgers", type=Path, metavar="DIR", help="a ledger for each study (default: training/results/study)"
    )
    findings.add_argument(
        "--evidence",
        type=Path,
        metavar="PAGE",
        help="also replace the table of evidence in this page (which-filter.md)",
    )
    findings.set_defaults(run_command=run_findings)


def run_command(options: argparse.Namespace) -> int:
    """``imgproc-attn study``."""
    from .driver import parse_shard, run_study
    from .ledger import HEADER, Ledger

    require_extras("train", "study")
    _take_options_of_runs(options)
    shard = parse_shard(options.shard)
    if options.engine == "ray":
        require_extras("cluster")
    _check_ray_options(options)
    for name in ("jobs", "threads", "budget", "cpus"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UsageError(f"--{name} must be > 0, got {value}")
    from .study_file import read_study

    study = read_study(options.study, options.data)
    folder = check_output_folder(options.ledger or Path("outputs/study") / study.name, "ledger")
    ledger = Ledger(folder)
    import torch

    from .run import be_quiet

    be_quiet()
    torch.set_num_threads(options.threads)  # small models gain nothing from a second one
    if options.report:
        if not (folder / HEADER).is_file():
            raise UsageError(f"ledger must be the folder of a study, got {str(folder)!r}, which has no {HEADER}")
        ledger.open(study)
        return _show(study, ledger)
    study, progress = run_study(
        study,
        ledger,
        _engine(options, study, ledger),
        budget_minutes=options.budget,
        shard=shard,
        side_by_side=options.jobs,
    )
    _show(study, ledger)
    return 1 if progress.errors else 0


def _take_options_of_runs(options: argparse.Namespace) -> None:
    """Give those that were left out their values; with --report, which does no run, refuse those that were given."""
    given = [name for name in _OF_RUNS if getattr(options, name) is not None]
    if options.report and given:
        name = given[0]
        raise UsageError(f"--{name} is for runs, and --report does none, got {getattr(options, name)}")
    for name, value in _OF_RUNS.items():
        if name not in given:
            setattr(options, name, value)


def _check_ray_options(options: argparse.Namespace) -> None:
    """Refuse what only one of the engines has, and a number of GPUs that there cannot be."""
    if options.engine == "ray":
        if options.jobs != 1 or options.threads != 1:
            raise UsageError("--jobs and --threads are not for --engine ray, where --cpus says what a run gets")
        if options.gpus is not None and not 0 <= options.gpus < math.inf:
            raise UsageError(f"--gpus must be >= 0, got {options.gpus}")
        return
    for name in ("address", "cpus", "gpus"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is for --engine ray, got {getattr(options, name)}")


def run_findings(options: argparse.Namespace) -> int:
    """``imgproc-attn findings``."""
    require_extras("train", "study")
    from .findings import LEDGERS, write_findings

    ledgers = options.ledgers or LEDGERS
    write_findings(options.page, ledgers)
    if options.evidence is not None:
        from .evidence import write_evidence

        write_evidence(options.evidence, ledgers)
    return 0


def _engine(options: argparse.Namespace, study: Study, ledger: Ledger) -> Engine:
    """Who does the runs."""
    from .driver import InThisProcess
    from .engines import Workers
    from .ray_engine import RayTasks

    if options.engine == "ray":
        return RayTasks(study, ledger, options.address, options.cpus or 1, options.gpus or 0)
    if options.jobs > 1:
        return Workers(options.study, options.data, ledger.folder, options.jobs, options.threads)
    return InThisProcess(study, ledger)


def _show(study: Study, ledger: Ledger) -> int:
    """Write the report and print its tables."""
    from .report import shown, write_report

    print(f"\n{shown(study, ledger, write_report(study, ledger))}")
    return 0
