"""``run.json``: what a run was given, ran on and achieved, kept beside its checkpoint.

It is written when training starts, which marks the folder as this run's, and again when it ends.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.argument_parser import command_words
from hf_imgproc_attn.training_support.arguments import BUILT_IN_DATA, LOCAL_OR_HUB, Arguments
from hf_imgproc_attn.training_support.batches import OPTIONS as BATCH_OPTIONS
from hf_imgproc_attn.training_support.batches import Batches, check_same_steps

FILE_NAME = "run.json"
FORMAT = 1

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers", "safetensors", "numpy")
_IDENTITY_PARTS = ("model", "data")
# All that may change when a run goes on: how it is logged, evaluated, saved, published and fed. Every other option has
# a share in what is learned, so that a record could not state one value of it.
_MAY_CHANGE = {
    "output_dir", "run_name", "project", "logging_dir", "disable_tqdm", "report_to", "debug", "skip_memory_metrics",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter",
    "include_num_input_tokens_seen", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "batch_eval_metrics", "bf16_full_eval", "fp16_full_eval", "prediction_loss_only", "include_for_metrics",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model", "enable_jit_checkpoint",
    "restore_callback_states_from_checkpoint", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_revision",
    "hub_strategy", "hub_always_push", "hub_token", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "use_cpu", "local_rank", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps", "ddp_backend",
    "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_find_unused_parameters",
}  # fmt: skip
# Where the best checkpoint is loaded at the end, these decide which one that is.
_CHOOSES_THE_BEST = ("eval_strategy", "eval_steps", "eval_delay", "save_strategy", "save_steps", "bf16_full_eval",
                     "fp16_full_eval")  # fmt: skip
_LENGTH = ("max_steps", "num_train_epochs")
# Set by what the data turn out to be: compared when they are known.
_KNOWN_LATER = "dataloader_drop_last"
_EARLIER = "_earlier_trainer"
_PROCESSES = "_processes"
_SHARED_TOKENS = "context_parallel"
"""Of a run's data: how they are cut, like the options of a batch; no part of what the run is."""
_SESSION = ("command", "versions", "git", "device")

_ALWAYS_LOCAL = ("output_dir", "config", "resumed_from", "resume_from_checkpoint")
_START_OF_PATH = r"(?:file:|[A-Za-z]:[\\/]|\\\\|~|\.{1,2}(?:[\\/]|$)|/)"
_LOCAL = re.compile(_START_OF_PATH)
# Between quotes a path may hold white space.
_LOCAL_INSIDE = re.compile(rf"(?<=[\"']){_START_OF_PATH}[^\"']*|(?<=[\s\[({{,]){_START_OF_PATH}[^\s\])}},\"']*")
# The last component of a home is the name of its user.
_HOME = re.compile(r"(?:~[^\\/]*|(?:[A-Za-z]:)?[\\/](?:home|Users)[\\/][^\\/]+|/root)[\\/]*")


def check_output_dir(output_dir: str, record: dict[str, Any], resume: bool) -> None:
    """Check that a folder is free for a run, or holds the same run and that is to be resumed.

    Args:
        output_dir: folder of the run.
        record: from :func:`start_record`; takes over the earlier data fingerprint, training time, licence where this
            one names none, and sessions: one entry each time that training was started, since versions and devices
            may differ.
        resume: whether the user asked to go on with the run.

    Raises:
        UsageError: if the folder holds another run (names the option that differs), this run but ``resume`` is off,
            files that are no run, or no run although one is to be resumed.
    """
    folder, path = Path(output_dir), Path(output_dir) / FILE_NAME
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output_dir must be a folder, got {output_dir!r}, which is a file")
    if path.is_file():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            difference = _difference(earlier, record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"output_dir {output_dir!r} has a {FILE_NAME} that cannot be read: {error}") from error
        if difference is not None:
            raise UsageError(f"output_dir {output_dir!r} holds another run, {difference}; choose another folder")
        if not resume:
            raise UsageError(
                f"output_dir {output_dir!r} holds this run already; pass --resume or choose another folder"
            )
        _refuse_finished(output_dir, earlier, record)
        record |= {name: earlier[name] for name in ("data_fingerprint", "training_seconds") if name in earlier}
        _keep_licence(earlier, record)
        record[_EARLIER] = {**earlier["arguments"]["trainer"], _PROCESSES: _processes(earlier)}
        before = earlier.get("sessions") or [{name: earlier.get(name) for name in _SESSION}]
        record["sessions"] = [*before, {name: record[name] for name in _SESSION}]
    elif folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"output_dir must be empty or hold this run, got {output_dir!r}, which holds other files")
    elif resume:
        state = "is empty" if folder.is_dir() else "does not exist"
        raise UsageError(
            f"output_dir must hold the run that --resume goes on with, got {output_dir!r}, which {state}; without "
            "--resume a new run starts"
        )


def start_record(task: str, arguments: Arguments[Any], training_args: Any) -> dict[str, Any]:
    """The record of a run that starts.

    ``argv`` is the command line as it was given, ``command`` the same run without a YAML file.

    Args:
        task: ``image-classification`` or ``causal-lm``.
        arguments: the parsed command line.
        training_args: the ``TrainingArguments`` made from it.
    """
    arguments = dataclasses.replace(
        arguments, model=_with_absolute_paths(arguments.model), data=_with_absolute_paths(arguments.data)
    )
    return {
        "format": FORMAT,
        "task": task,
        "status": "running",
        "argv": arguments.argv,
        "command": command_words(arguments),
        "arguments": {
            "model": vars(arguments.model).copy(),
            "data": vars(arguments.data).copy(),
            "run": vars(arguments.run).copy(),
            "trainer": trainer_options(training_args),
        },
        "seed": training_args.seed,
        "versions": package_versions(),
        "git": git_state(),
        "device": device_description(training_args.device, training_args.world_size),
    }


def check_same_data(
    record: dict[str, Any],
    fingerprints: dict[str, Any],
    drop_last: bool | None = None,
    train_samples: int | None = None,
) -> None:
    """Refuse to resume on other data than the run was started with, or cut into other batches.

    Args:
        record: as :func:`check_output_dir` left it.
        fingerprints: split -> fingerprint of the data.
        drop_last: whether the incomplete batch of an epoch is dropped; None: it is not compared.
        train_samples: of the training split; None: of unknown length.

    Raises:
        UsageError: names the split or option that changed.
    """
    earlier_trainer = record.pop(_EARLIER, {})
    before_cut = Batches.of(earlier_trainer, earlier_trainer.get(_PROCESSES))
    cut = Batches.of(record["arguments"]["trainer"], _processes(record))
    if before_cut is not None and cut is not None:
        check_same_steps(before_cut, cut, train_samples, bool(drop_last))
    before = earlier_trainer.get(_KNOWN_LATER, drop_last)
    if drop_last is not None and before != drop_last:
        raise UsageError(f"the run was started with {_KNOWN_LATER} {before}, it cannot go on with {drop_last}")
    for split, earlier in record.get("data_fingerprint", {}).items():
        if fingerprints.get(split) != earlier:
            raise UsageError(
                f"the {split} split must be the one that the run was started with ({earlier}), got "
                f"{fingerprints.get(split)}"
            )


def write_record(output_dir: str, record: dict[str, Any]) -> Path:
    """Write ``run.json``. Only one process may do so."""
    return write_json(Path(output_dir) / FILE_NAME, record)


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file, whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def public_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record as it may be published: no local paths, names of users or machines, and no secrets.

    Of a path the last component stays. ``local_paths`` names the options that held one, which could be taken for a Hub
    name afterwards.

    Args:
        record: the content of ``run.json``, or what this function made of it: then nothing changes any more.
    """
    public: dict[str, Any] = _public(record)
    given = [options for part in ("model", "data") if (options := record.get("arguments", {}).get(part))]
    local = {name for options in given for name in LOCAL_OR_HUB if _LOCAL.match(str(options.get(name)))}
    public["local_paths"] = sorted(local.union(record.get("local_paths", [])))
    if "platform" in public.get("device", {}):
        public["device"]["platform"] = _without_build(public["device"]["platform"])
    return public


def weights_sha256(folder: str) -> dict[str, str]:
    """SHA-256 of every weights file in a folder."""
    digests = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def package_versions(*further: str) -> dict[str, str | None]:
    """Versions of Python, this package, those that take part in training and ``further`` ones; None: not installed."""
    from hf_imgproc_attn import __version__

    versions: dict[str, str | None] = {"python": platform.python_version(), "hf_imgproc_attn": __version__}
    for name in (*_PACKAGES, *further):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    import torch

    versions["torch"] = torch.__version__  # with the kind of build, which the package's metadata may leave out
    return versions


def git_state() -> dict[str, Any] | None:
    """Revision of the repository that holds this package's source, and whether it has uncommitted changes.

    None outside a repository, and for an installed copy that merely lies in one.
    """
    folder = Path(__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], check=True, capture_output=True, text=True, timeout=30
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def device_description(device: Any, processes: int) -> dict[str, Any]:
    """What is computed on: a ``torch.device``, in so many processes."""
    import torch

    return {
        "type": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name(),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "platform": _without_build(f"{platform.system()} {platform.release()}"),
    }


def trainer_options(training_args: Any) -> dict[str, Any]:
    """The ``TrainingArguments`` as plain values; tokens are left out by the library."""
    return dict(json.loads(training_args.to_json_string()))


def _public(value: Any, name: str = "") -> Any:
    """A part of a record as it may be published; ``name`` is the option or field it belongs to."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if not (key.endswith("_token") and isinstance(item, str))}
        return {key: item if key in ("id2label", "label2id") else _public(item, key) for key, item in kept.items()}
    if isinstance(value, list):  # in a command line the value of an option follows its name
        names = [name, *(str(word).removeprefix("--") for word in value)]
        return [_public(item, before) for before, item in zip(names, value, strict=False)]
    return _public_text(value, name) if isinstance(value, str) else value


def _public_text(text: str, name: str) -> str:
    if assignment := re.fullmatch(r"((?:--)?(\w+)=)(.*)", text, re.DOTALL):
        return assignment[1] + _public_text(assignment[3], assignment[2])
    if name.endswith("_token"):
        return "..."
    if name in _ALWAYS_LOCAL or _LOCAL.match(text):
        return _last_component(text)
    text = re.sub(r"\bhf_[A-Za-z0-9]{16,}", "...", text)  # what the Hub's tokens look like
    text = re.sub(r"://[^/@\s]+@", "://", text)
    return _LOCAL_INSIDE.sub(lambda path: _last_component(path[0]), text)


def _last_component(path: str) -> str:
    parts = [part for part in re.split(r"[\\/]+", path) if part not in ("", ".", "..", "~", "file:")]
    return parts[-1] if parts and not _HOME.fullmatch(path) else "."


def _without_build(system: str) -> str:
    """``Linux 6.1.0`` of ``Linux 6.1.0-name-of-a-machine``: the release of a kernel may name who built it."""
    return re.sub(r"^(\w+(?: [\d.]*\d)?).*", r"\1", system)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # elsewhere the platform module knows it
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _with_absolute_paths(options: Any) -> Any:
    """Data, a tokenizer or a checkpoint given by a relative path are the same from another working directory."""
    names = [name for name in LOCAL_OR_HUB if hasattr(options, name)]
    given = {name: value for name in names if (value := getattr(options, name)) and Path(value).expanduser().exists()}
    paths = {
        name: str(Path(value).expanduser().resolve()) for name, value in given.items() if value not in BUILT_IN_DATA
    }
    return dataclasses.replace(options, **paths)


def _difference(earlier: dict[str, Any], record: dict[str, Any]) -> str | None:
    """The first option in which two records are not the same run, in words."""
    if earlier["task"] != record["task"]:
        return f"of task {earlier['task']}"
    before, now = earlier["arguments"], json.loads(json.dumps(record["arguments"], default=str))
    for part in _IDENTITY_PARTS:
        for name, value in now[part].items():
            if name == _SHARED_TOKENS:
                continue
            if name in before[part] and before[part][name] != value:  # older versions had fewer options
                return f"with {name} {before[part][name]!r} instead of {value!r}"
    started, wanted = before["trainer"], now["trainer"]
    free = _MAY_CHANGE | {_KNOWN_LATER}
    if started.get("load_best_model_at_end"):
        free -= set(_CHOOSES_THE_BEST)
    if not _depends_on_length(started):
        free |= set(_LENGTH)
    cuts = [Batches.of(entry["arguments"]["trainer"], _processes(entry)) for entry in (earlier, record)]
    same_batch = None not in cuts and len({cut.samples for cut in cuts if cut is not None}) == 1
    if same_batch:
        free |= set(BATCH_OPTIONS)
    for name in sorted(started.keys() & wanted.keys() - free):
        if started[name] != wanted[name]:
            return f"with {name} {started[name]!r} instead of {wanted[name]!r}{_hint(name, started)}"
    processes, wanted_processes = _processes(earlier), _processes(record)
    if None not in (processes, wanted_processes) and processes != wanted_processes and not same_batch:
        return (
            f"with {processes} processes instead of {wanted_processes}, which change the size of a batch: keep "
            f"processes x {' x '.join(BATCH_OPTIONS)}"
        )
    return None


def _processes(record: dict[str, Any]) -> int | None:
    """Among how many processes, or groups that share tokens, a session dealt its rows, where its record says so."""
    count: int | None = record.get("device", {}).get("processes")
    shared = record["arguments"]["data"].get(_SHARED_TOKENS) or 1
    return None if count is None else count // shared


def _keep_licence(earlier: dict[str, Any], record: dict[str, Any]) -> None:
    """What the user once named stays as long as nothing else is named."""
    named = earlier["arguments"].get("run", {}).get("license")
    if named is not None and record["arguments"]["run"]["license"] is None:
        record["arguments"]["run"]["license"] = named
        record["command"] = [*record["command"], "--license", named]


def _depends_on_length(trainer: dict[str, Any]) -> bool:
    """Whether the learning rate of a step depends on how many steps are to come."""
    warmup = trainer.get("warmup_steps") or 0
    if trainer.get("lr_scheduler_type") == "constant":
        return False
    return trainer.get("lr_scheduler_type") != "constant_with_warmup" or 0 < warmup < 1


def _hint(name: str, trainer: dict[str, Any]) -> str:
    if name not in _LENGTH:
        return ""
    return (
        f", over which the schedule {trainer.get('lr_scheduler_type')} spreads the learning rate (to train longer, "
        "start a new run from the checkpoint, --model_name_or_path)"
    )


def _refuse_finished(output_dir: str, earlier: dict[str, Any], record: dict[str, Any]) -> None:
    """Refuse to go on with a run that is finished, unless it is to become longer.

    Its record would state the loss and the time of no step at all.
    """
    before, now = earlier["arguments"]["trainer"], record["arguments"]["trainer"]
    if earlier.get("status") == "finished" and all(before.get(name) == now.get(name) for name in _LENGTH):
        raise UsageError(
            f"output_dir {output_dir!r} holds this run, which is finished: there is nothing to resume; choose another "
            "folder to train it again"
        )
