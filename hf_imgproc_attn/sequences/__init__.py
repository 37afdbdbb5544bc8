"""Long-sequence tasks, made from a seed: each a generator by published rules, the same bytes wherever it runs.

    from hf_imgproc_attn.sequences import generate
    splits = generate("listops_short", sizes={"train": 100})

:mod:`.table` lists the tasks, :mod:`.splits` says how their splits are drawn; a file each has the rules.
"""

from hf_imgproc_attn.sequences.splits import FORMAT, SequenceSplit
from hf_imgproc_attn.sequences.table import SEQUENCE_TASKS, SequenceTask, generate

__all__ = ["FORMAT", "SEQUENCE_TASKS", "SequenceSplit", "SequenceTask", "generate"]
