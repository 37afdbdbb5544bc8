"""Runs that go wrong, in processes forked from one that has imported everything; started by `test_faults.py`.

`python -m tests.training.fault_worker KILLS CASE ...` writes `report.json` into the current folder.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  # imported once, for all that are forked
import evaluate  # noqa: F401
import sklearn.datasets  # noqa: F401
import torch
import train_causal_lm
import train_image_classification
from transformers import TrainerCallback

from hf_imgproc_attn import ImgProcGPT2LMHeadModel, ImgProcViTForImageClassification  # noqa: F401
from hf_imgproc_attn.records import weights_sha256
from hf_imgproc_attn.training_support import fitting, trainer_setup  # noqa: F401
from hf_imgproc_attn.training_support.checkpoints import incomplete_because
from hf_imgproc_attn.training_support.image_pixels import PixelDataset
from hf_imgproc_attn.training_support.trainer import ScriptTrainer

COMMON = (
    "--disable_tqdm true --use_cpu --eval_strategy no --max_eval_samples 30 --logging_steps 5 --evaluate_test false"
)
IMAGES = (
    f"{COMMON} --preset bilateral_twicing --random_crop_padding 1 --horizontal_flip --per_device_train_batch_size 8 "
    "--config_overrides hidden_size=8 num_hidden_layers=2 num_attention_heads=2 intermediate_size=16 "
    "hidden_dropout_prob=0.1"
)
TEXT = (
    f"{COMMON} --preset twicing --block_size 16 --tokenizer_vocab_size 270 --max_train_samples 300 "
    "--per_device_train_batch_size 4 --config_overrides n_embd=8 n_layer=2 n_head=2 resid_pdrop=0.1 attn_pdrop=0.1"
)
SAVING = "--save_strategy steps --save_steps 5 --save_total_limit 2"
LIMIT = 120.0
Arm = Callable[[], None]


def forked(run: Callable[[], int], log: Path, environment: dict[str, str] | None = None) -> int:
    """Call ``run`` in a child, whose output goes into ``log``; the child's id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.environ.update(environment or {})
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = run()
    except SystemExit as ending:
        status = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child: int) -> int:
    """Its exit status, minus the signal that ended it; after ``LIMIT`` seconds it is killed and None of these."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return 1000


def command(script: Any, words: str, folder: Path, arm: Arm | None = None) -> Callable[[], int]:
    def run() -> int:
        if arm is not None:
            arm()
        return script.main([*words.split(), "--output_dir", str(folder)])

    return run


def with_callback(callback: TrainerCallback) -> None:
    """Every Trainer of this process has it too."""
    before = ScriptTrainer.__init__

    def init(self: ScriptTrainer, *args: Any, **options: Any) -> None:
        before(self, *args, **options)
        self.add_callback(callback)

    ScriptTrainer.__init__ = init  # type: ignore[method-assign]


class Killer(TrainerCallback):
    """SIGKILL in one of the steps that come next, at a place in it that the seed decides."""

    PLACES = ("on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end", "saving", "timer")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.place = self.PLACES[seed % len(self.PLACES)]
        self.step = self.files = -1
        sys.addaudithook(self.hear)
        for name in self.PLACES[:4]:
            setattr(self, name, lambda args, state, control, name=name, **rest: self.at(name, state.global_step))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step = state.global_step + self.random.randint(2, 8)
        self.files = self.random.randint(1, 8)

    def at(self, name: str, step: int) -> None:
        if step < self.step or self.step < 0:
            return
        if name == self.place:
            kill()
        if self.place == "timer" and name == "on_step_begin":
            self.place = "started"
            threading.Timer(self.random.uniform(0, 0.03), kill).start()

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and self.place == "saving" and self.step >= 0 and "checkpoint-" in str(args[0]):
            self.files -= 1
            if self.files <= 0:
                kill()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def damaged(folder: Path, rolls: random.Random) -> str:
    """Cut a file of the newest checkpoint short, whichever; its name."""
    newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest is None:
        return ""
    names = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    path = newest / rolls.choice(names)
    if path.is_file():
        os.truncate(path, rolls.randrange(path.stat().st_size))
    return str(path.relative_to(folder))


def killed_runs(name: str, script: Any, words: str, kills: int) -> dict[str, Any]:
    """A run that is never stopped, and one that is killed and resumed."""
    words = f"{words} {SAVING} --max_steps {30 if kills < 5 else 90}"
    whole, folder = Path(f"{name}-whole"), Path(f"{name}-killed")
    statuses = [ended(forked(command(script, words, whole), Path(f"{name}-whole.log")))]
    log, rolls, damages = Path(f"{name}-killed.log"), random.Random(name), []
    for seed in range(kills + 1):
        resume = " --resume" if (folder / "run.json").exists() else ""
        arm = (lambda seed=seed: with_callback(Killer(seed + len(name)))) if seed < kills else None
        statuses.append(ended(forked(command(script, words + resume, folder, arm), log)))
        if statuses[-1] == 0:
            break
        if rolls.random() < 0.5:
            damages.append(damaged(folder, rolls))
    records = [json.loads((path / "run.json").read_text()) for path in (whole, folder)]
    return {
        "statuses": statuses,
        "damages": damages,
        "weights": [weights_sha256(str(path)) for path in (whole, folder)],
        "losses": [record["metrics"]["validation"]["loss"] for record in records],
        "ended": [record["status"] for record in records],
        "log": log.read_text(),
    }


class Strikes(TrainerCallback):
    """What befalls one process of two in its third step."""

    def __init__(self, what: int) -> None:
        self.what = what

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12 and args.process_index == 1:
            os.kill(os.getpid(), self.what)


def no_number_in_one_process() -> None:
    """In its thirteenth step, before the gradients are exchanged."""
    before = ScriptTrainer.compute_loss

    def compute_loss(self: ScriptTrainer, *args: Any, **options: Any) -> Any:
        loss = before(self, *args, **options)
        if self.model.training and self.state.global_step == 12 and self.args.process_index == 1:
            return loss * torch.tensor(float("nan"))
        return loss

    ScriptTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def two_processes(name: str, words: str, arm: Arm) -> dict[str, Any]:
    """A launch of two, without a launcher that would end what goes on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = f"{IMAGES} --max_steps 20 {SAVING} {words}"
    begin, children, folder = time.monotonic(), [], Path(name)
    for rank in range(2):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {"MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        run = command(train_image_classification, words, folder, arm)
        children.append(forked(run, Path(f"{name}-{rank}.log"), environment))
    statuses = [ended(children[0])]
    seconds = time.monotonic() - begin
    os.kill(children[1], signal.SIGCONT)
    statuses.append(ended(children[1]))
    record = json.loads((folder / "run.json").read_text())
    return {
        "statuses": statuses,
        "seconds": seconds,
        "status": record["status"],
        "left_out": record.get("steps_left_out"),
        "errors": [
            [line for line in Path(f"{name}-{rank}.log").read_text().splitlines() if line.startswith("error:")]
            for rank in range(2)
        ],
        "checkpoints": {path.name: incomplete_because(path) for path in sorted(folder.glob("checkpoint-*"))},
        "random states": sorted(path.name for path in (folder / "checkpoint-10").glob("rng*")),
        "log": Path(f"{name}-0.log").read_text()[-3000:],
    }


def silent_data(words: str, strike: Callable[[], None]) -> dict[str, Any]:
    """One data worker that stops working in the middle."""

    def arm() -> None:
        before = PixelDataset.__getitem__

        def item(self: PixelDataset, index: int) -> Any:
            if torch.utils.data.get_worker_info() is not None and index % 50 == 7:
                strike()
            return before(self, index)

        PixelDataset.__getitem__ = item  # type: ignore[method-assign]

    folder = Path(f"data-{strike.__name__}")
    log = Path(f"{folder}.log")
    words = f"{IMAGES} --max_steps 60 {SAVING} --dataloader_num_workers 1 {words}"
    status = ended(forked(command(train_image_classification, words, folder, arm), log))
    return {"status": status, "log": log.read_text()}


def hang() -> None:
    time.sleep(LIMIT)


def main(argv: Sequence[str]) -> None:
    torch.set_num_threads(1)
    kills = int(argv[0])
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "killed images": lambda: killed_runs("images", train_image_classification, IMAGES, kills),
        "killed text": lambda: killed_runs("text", train_causal_lm, TEXT, kills),
        "dead rank": lambda: two_processes("dead", "", lambda: with_callback(Strikes(signal.SIGKILL))),
        "silent rank": lambda: two_processes(
            "silent", "--ddp_timeout 4", lambda: with_callback(Strikes(signal.SIGSTOP))
        ),
        "nan stop": lambda: two_processes("nan-stop", "", no_number_in_one_process),
        "nan skip": lambda: two_processes("nan-skip", "--on_nan_loss skip", no_number_in_one_process),
        "silent data": lambda: silent_data("--data_timeout 2", hang),
        "dead data": lambda: silent_data("", kill),
    }
    report = {}
    for name in argv[1:] or cases:
        report[name] = cases[name]()
        used = os.times()
        print(name, used.user + used.system + used.children_user + used.children_system, flush=True)
    Path("report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])
