"""Sequences for the training scripts: generated tasks, pixels of images, pairs of texts, and their tokenizers."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.sequences import FORMAT, SEQUENCE_TASKS, SequenceSplit, generate
from hf_imgproc_attn.sequences.table import with_settings
from hf_imgproc_attn.training_support.data_loading import refuse_config_name
from hf_imgproc_attn.training_support.sequence_arguments import (
    DEFAULT_PAIR_LENGTH,
    GeneratedDataArguments,
    SequenceDataArguments,
)
from hf_imgproc_attn.training_support.text_data import IGNORED_LABEL

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from hf_imgproc_attn.training_support.text_pairs import PairRows, PairSplit

PADDING, UNKNOWN, FIRST = "[PAD]", "[UNK]", "[CLS]"
GREY_LEVELS = 256


class SequenceData:
    """All splits of a data set of sequences.

    Attributes:
        splits: ``train`` and, where there are any, ``validation`` and ``test``; sequences, or pairs of texts.
        vocabulary: token id -> the word that it is written as; empty for pairs, whose tokens are bytes.
        longest: tokens of the longest sequence, without the first one of a classifier.
        label_names: class index -> name; empty where the answers are tokens.
    """

    def __init__(
        self,
        splits: dict[str, Any],
        vocabulary: tuple[str, ...],
        longest: int,
        label_names: list[str],
    ) -> None:
        self.splits, self.vocabulary, self.longest, self.label_names = splits, vocabulary, longest, label_names

    def tokenizer(self, *, for_classifier: bool) -> "PreTrainedTokenizerFast":
        """The one that is saved with a checkpoint, see :func:`sequence_tokenizer`."""
        if self.vocabulary:
            return sequence_tokenizer(self.vocabulary, for_classifier=for_classifier)
        from hf_imgproc_attn.training_support.text_pairs import byte_tokenizer

        return byte_tokenizer()


def load_sequences(args: GeneratedDataArguments) -> SequenceData:
    """Generate the sequences of a task, read images as sequences of pixels, or pairs of texts.

    Raises:
        UsageError: for settings that the task does not have, or images that cannot be loaded.
    """
    if isinstance(args, SequenceDataArguments) and args.is_pairs:
        from hf_imgproc_attn.training_support.text_pairs import load_pairs

        pairs, names = load_pairs(args)
        return SequenceData(pairs, (), (args.max_length or DEFAULT_PAIR_LENGTH) - 1, names)
    if not args.is_generated and isinstance(args, SequenceDataArguments):
        return pixel_sequences(args)
    columns = ("image_column_name", "label_column_name") if isinstance(args, SequenceDataArguments) else ()
    refuse_config_name(args, *columns)
    task, settings = SEQUENCE_TASKS[args.dataset_name], parse_settings(args.sequence_settings)
    sizes = dict(task.sizes)
    if args.validation_fraction == 0:
        sizes["validation"] = 0
    for split, size in sizes.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        sizes[split] = size if limit is None else min(size, limit)
    rules = with_settings(task.rules, settings)
    splits = generate(args.dataset_name, seed=args.sequence_seed, sizes=sizes, settings=settings)
    return SequenceData(splits, rules.vocabulary, rules.longest, list(rules.classes or ()))


def pixel_sequences(args: SequenceDataArguments) -> SequenceData:
    """The grey values, 0 to 255, of images, row by row: for CIFAR-10 the image task of the Long Range Arena.

    Tay et al. 2020 (arXiv 2011.04006), section 2.2.3. Images of other sizes than the first one are resized to it.

    Raises:
        UsageError: for data that cannot be loaded, damaged images, or missing columns.
    """
    from hf_imgproc_attn.training_support.image_data import load_image_splits

    images = load_image_splits(args)
    height, width = images.image_size
    splits = {}
    for split, rows in images.rows.items():
        tokens = _grey_pixels(rows, images.image_column, (width, height), split)
        origin = {"task": "pixels", "format": FORMAT, "settings": {"height": height, "width": width}}
        splits[split] = SequenceSplit(list(tokens), images.labels[split], origin)
    return SequenceData(splits, tuple(map(str, range(GREY_LEVELS))), height * width, images.label_names)


def _grey_pixels(rows: "Dataset", column: str, size: tuple[int, int], split: str) -> np.ndarray:
    """``[rows, height * width]``, int16."""
    from PIL import Image

    from hf_imgproc_attn.training_support.image_pixels import eight_bits

    found = np.empty((len(rows), size[0] * size[1]), dtype=np.int16)
    for index in range(len(rows)):
        try:
            image = eight_bits(rows[index][column]).convert("L")
        except Exception as error:  # damaged in one of many ways
            raise UsageError(f"image {index} of the {split} split cannot be used: {error}") from error
        if image.size != size:
            image = image.resize(size, Image.Resampling.BILINEAR)
        found[index] = np.asarray(image).ravel()
    return found


def sequence_tokenizer(vocabulary: tuple[str, ...], *, for_classifier: bool) -> "PreTrainedTokenizerFast":
    """The tokenizer that is saved with a checkpoint: words, between white space, are tokens.

    Args:
        vocabulary: token id of a sequence -> word; the special tokens come before them.
        for_classifier: whether a sequence begins with a special token.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PADDING, UNKNOWN, *([FIRST] if for_classifier else [])]
    words = {word: index for index, word in enumerate([*special, *vocabulary])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": PADDING, "unk_token": UNKNOWN}
    if for_classifier:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{FIRST} $A", pair=f"{FIRST} $A $B:1", special_tokens=[(FIRST, words[FIRST])]
        )
        names["cls_token"] = FIRST
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


class TokenSequences(TorchDataset[dict[str, Any]]):
    """Items are ``input_ids``, as the tokenizer writes them, and ``labels``: a class, or answers at their places.

    Args:
        split: the sequences.
        tokenizer: from :func:`sequence_tokenizer`.
    """

    def __init__(self, split: SequenceSplit, tokenizer: "PreTrainedTokenizerFast") -> None:
        self.split, self._first = split, tokenizer.cls_token_id
        self._special = len(tokenizer.all_special_tokens)

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(self.split.tokens[index].astype(np.int64)) + self._special
        labels = torch.as_tensor(self.split.labels[index])
        if labels.ndim:
            return {"input_ids": ids, "labels": torch.where(labels == IGNORED_LABEL, labels, labels + self._special)}
        if self._first is not None:
            ids = torch.nn.functional.pad(ids, (1, 0), value=self._first)
        return {"input_ids": ids, "labels": labels}


def classified_rows(
    split: "SequenceSplit | PairSplit", tokenizer: "PreTrainedTokenizerFast"
) -> tuple["TokenSequences | PairRows", Any]:
    """What a classifier reads, and what makes a batch of it: ``[batch, length]``, of pairs ``[batch, 2, length]``.

    Args:
        split: of :class:`SequenceData`.
        tokenizer: its tokenizer.
    """
    from transformers import DataCollatorForMultipleChoice, DataCollatorWithPadding

    from hf_imgproc_attn.training_support.text_pairs import PairRows, PairSplit

    if isinstance(split, PairSplit):
        return PairRows(split, tokenizer), DataCollatorForMultipleChoice(tokenizer)
    return TokenSequences(split, tokenizer), DataCollatorWithPadding(tokenizer)


def parse_settings(words: list[str]) -> Mapping[str, Any]:
    """``["length=64"]`` -> ``{"length": 64}``.

    Raises:
        UsageError: for a word that is not ``key=value``.
    """
    import yaml

    found = {}
    for word in words:
        name, separator, text = word.partition("=")
        if not separator:
            raise UsageError(f"sequence_settings must be key=value, got {word!r}")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UsageError(f"sequence_settings must have values in YAML, got {word!r}") from error
    return found
