"""Training data that are read as they are needed (``--streaming``), a part of the rows in each process.

A stream has no length and never ends: after the last row comes another pass, in another order where rows are shuffled.
Its order is a function of the seed, the buffer and the number of processes alone, so that a run which goes on reads
past the samples that it has seen and finds the next one.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import IterableDataset

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import BUILT_IN_DATA, StreamedDataArguments

if TYPE_CHECKING:
    from transformers import TrainingArguments

FIRST_ROWS = 1000
"""Of a stream: what tells it from another one."""
MOST_IDLE = 1000
"""Passes without a sample: a few short texts make one block only when they were read often."""


def check_streaming(args: StreamedDataArguments, training_args: "TrainingArguments", lens_every: int | None) -> None:
    """Refuse what a stream cannot give, before anything is read.

    Args:
        args: the data options.
        training_args: of the run.
        lens_every: as the user gave it.

    Raises:
        UsageError: naming the option.
    """
    if not args.streaming:
        return
    if args.dataset_name in BUILT_IN_DATA:
        raise UsageError(f"streaming must be off for {args.dataset_name}, which is in memory")
    if training_args.max_steps <= 0:
        raise UsageError(
            f"max_steps must be given with streaming, since nobody knows how long a stream is, got "
            f"{training_args.max_steps}"
        )
    if training_args.dataloader_num_workers:
        raise UsageError(
            "dataloader_num_workers must be 0 with streaming, since each process reads its own rows in order, got "
            f"{training_args.dataloader_num_workers}"
        )
    if lens_every is not None:
        raise UsageError(f"lens_every must not be given with streaming, got {lens_every}")


class Stream(NamedTuple):
    """The rows of a training split, in their own order.

    rows: a ``datasets.IterableDataset``.
    name: of the data set, for messages.
    seed: of the order in the buffer.
    buffer: rows of which the next one is drawn; 0: the order of the data.
    """

    rows: Any
    name: str
    seed: int
    buffer: int

    def first(self, count: int) -> list[dict[str, Any]]:
        """The first rows.

        Raises:
            UsageError: if there is none, or it cannot be read.
        """
        try:
            rows = list(self.rows.take(count))
        except Exception as error:  # files are damaged in many ways
            raise UsageError(f"the train split of data set {self.name!r} cannot be read: {error}") from error
        if not rows:
            raise UsageError(f"the train split of data set {self.name!r} is empty")
        return rows

    def passes(self, rank: int, processes: int) -> Iterator[Iterator[dict[str, Any]]]:
        """One iterator over the rows of a process for each pass, without end."""
        from datasets.distributed import split_dataset_by_node

        rows = self.rows.shuffle(seed=self.seed, buffer_size=self.buffer) if self.buffer else self.rows
        if processes > 1:
            rows = split_dataset_by_node(rows, rank, processes)
        for number in itertools.count():
            rows.set_epoch(number)
            yield iter(rows)


class StreamedSamples(IterableDataset[dict[str, Any]]):
    """The training samples of one process.

    Args:
        stream: the rows.
        samples: makes samples of the rows of a pass, whose number it is told.
        training_args: tell which process this is.
        sha256: over the first rows, by which the stream is known.
    """

    def __init__(
        self,
        stream: Stream,
        samples: Callable[[Iterator[dict[str, Any]], int], Iterator[dict[str, Any]]],
        training_args: "TrainingArguments",
        sha256: str,
    ) -> None:
        self._stream, self._samples = stream, samples
        self.fingerprint = {"streamed": True, "sha256": sha256}
        self._share = training_args.process_index, training_args.world_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        idle = 0
        for number, rows in enumerate(self._stream.passes(*self._share)):
            idle += 1
            for sample in self._samples(rows, number):
                idle = 0
                yield sample
            if idle > MOST_IDLE:
                raise UsageError(
                    f"the train split of data set {self._stream.name!r} has no sample for process {self._share[0]} of "
                    f"{self._share[1]}"
                )


class Blocks:
    """Blocks of tokens, which overlap by one, from lines; what is left of a pass begins the next one.

    Args:
        lines: the lines of a row's text.
        encode: token ids of some lines, a list each.
        block_size: at least 2.
        first_token: stands before each pass.
        ignored: the label of what is not predicted.
    """

    def __init__(
        self,
        lines: Callable[[dict[str, Any]], str | None],
        encode: Callable[[list[str]], list[list[int]]],
        block_size: int,
        first_token: int,
        ignored: int,
    ) -> None:
        self._lines, self._encode, self._block_size = lines, encode, block_size
        self._first_token, self._ignored = first_token, ignored

    def __call__(self, rows: Iterator[dict[str, Any]], number: int) -> Iterator[dict[str, torch.Tensor]]:
        if number == 0:
            self._waiting: list[int] = []
        self._waiting.append(self._first_token)
        texts = (text for row in rows if (text := self._lines(row)) is not None)
        while chunk := list(itertools.islice(texts, FIRST_ROWS)):
            for ids in self._encode(chunk):
                self._waiting += ids
            while len(self._waiting) >= self._block_size:
                block = torch.tensor(self._waiting[: self._block_size])
                del self._waiting[: self._block_size - 1]
                labels = block.clone()
                labels[0] = self._ignored
                yield {"input_ids": block, "labels": labels}
