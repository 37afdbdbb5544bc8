"""One of the processes of `test_sharded_runs.py`, started by torchrun: trains language models, as the words say.

Its argument is a list of phases. In each one some runs are made, by one process alone or by all together, and then
folders are copied as they were half way. accelerate shards models on GPUs alone; what it does there is done here on
CPUs.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import train_causal_lm
from accelerate import state
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def shard_on_cpus() -> None:
    """Make accelerate's state what it is on GPUs."""
    begin = state.AcceleratorState.__init__

    def with_plugin(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = with_plugin  # type: ignore[method-assign]


def train(words: list[str]) -> None:
    """One run; with FSDP the parameters of its blocks must be shards at the end."""
    result = train_causal_lm.train(train_causal_lm.read_arguments(words))
    if "--fsdp" not in words:
        return
    parameters = list(result.trainer.model.transformer.h.parameters())
    held = sum(parameter.to_local().numel() for parameter in parameters if isinstance(parameter, DTensor))
    whole = sum(parameter.numel() for parameter in parameters)
    if not whole / 1.5 <= held * dist.get_world_size() <= 1.5 * whole:
        raise ValueError(f"this process has {held} of {whole} numbers")


def half_way(folder: str, copy: str) -> None:
    """A copy of a run of four steps as it was after the second."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("checkpoint-4"))
    path = Path(copy, "run.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "status": "running"}))


def main() -> None:
    """Do what the argument says."""
    gc.freeze()  # the Trainer collects what is left over at each start, among all that was imported
    shard_on_cpus()
    launched, rank = dict(os.environ), int(os.environ["RANK"])
    for alone, runs, copies in json.loads(sys.argv[1]):
        if alone and rank > 0:
            continue
        os.environ.update(ALONE if alone else {name: launched[name] for name in ALONE})
        if alone:  # the others wait for it where all come together
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        for words in runs:
            before = set(os.environ)
            train(words)
            for name in set(os.environ) - before:  # by which the next run would be sharded too
                del os.environ[name]
        dist.destroy_process_group()
        state.AcceleratorState._reset_state(reset_partial_state=True)
        if rank == 0:
            for folder, copy in copies:
                half_way(folder, copy)


if __name__ == "__main__":
    main()
