"""The tokenizer of a language model: loaded, or trained at run time in the form that is saved with a checkpoint."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import UsageError
from hf_imgproc_attn.training_support.arguments import TextDataArguments, TokenizedDataArguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"


def choose_tokenizer(
    args: TextDataArguments, model_name_or_path: str | None, lines: list[str]
) -> "PreTrainedTokenizerBase":
    """The tokenizer named by the options, else the start checkpoint's, else one trained on the training text.

    Args:
        args: the data options.
        model_name_or_path: checkpoint that the run starts from.
        lines: the training text.

    Raises:
        UsageError: if a tokenizer cannot be loaded.
    """
    name = args.tokenizer_name or model_name_or_path
    return train_tokenizer(lines, args.tokenizer_vocab_size) if name is None else load_tokenizer(name)


def choose_classifier_tokenizer(
    args: TokenizedDataArguments, model_name_or_path: str | None, lines: Iterable[str]
) -> "PreTrainedTokenizerBase":
    """As :func:`choose_tokenizer`, for texts between a first token, which a classifier reads, and a last one.

    Raises:
        UsageError: if a tokenizer cannot be loaded, or has no padding token.
    """
    name = args.tokenizer_name or model_name_or_path
    if name is None:
        return train_tokenizer(lines, args.tokenizer_vocab_size, for_classifier=True)
    tokenizer = _load(name)
    if tokenizer.pad_token_id is None:
        raise UsageError(f"tokenizer_name must be a tokenizer with a padding token, got {name!r} without one")
    return tokenizer


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """Load a tokenizer; one without a padding token, as GPT-2's, pads with its end-of-text token.

    Args:
        name: a path or Hub name.

    Raises:
        UsageError: if there is none, or it has no end-of-text token.
    """
    tokenizer = _load(name)
    if tokenizer.eos_token_id is None:
        raise UsageError(f"tokenizer_name must be a tokenizer with an end-of-text token, got {name!r} without one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"tokenizer_name {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    # The library makes an empty one up where there is none, and every word would be unknown.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise UsageError(
            f"tokenizer_name must be a tokenizer with a vocabulary, got {name!r} without one: give the "
            "checkpoint's own"
        )
    return tokenizer


def train_tokenizer(
    lines: Iterable[str], vocab_size: int, *, for_classifier: bool = False
) -> "PreTrainedTokenizerFast":
    """Train GPT-2's kind of tokenizer: BPE over bytes, so that every text can be encoded and nothing is unknown.

    Args:
        lines: the training text; never validation or test text.
        vocab_size: number of entries, at least 256 bytes and the special tokens.
        for_classifier: whether every text gets a first and a last token, as BERT's does; the special tokens are then
            four, as BERT names them, in place of end of text and padding.

    Returns:
        The tokenizer, with its beginning, end and padding tokens set. Text too small for ``vocab_size`` entries gives
        fewer of them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special.values()) if for_classifier else [END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    if for_classifier:
        first, last = (special[name] for name in ("cls_token", "sep_token"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}",
            pair=f"{first} $A {last} $B:1 {last}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (first, last)],
        )
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
