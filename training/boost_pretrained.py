"""Put a filter into the last layers of a trained model of texts: what moves, and what a short fine-tune makes of it.

    python training/boost_pretrained.py PATH_OR_HUB_NAME --preset twicing --layers -2 -1
    python training/boost_pretrained.py PATH_OR_HUB_NAME --finetune --steps 60
    python training/boost_pretrained.py PATH_OR_HUB_NAME --quantised

First, for each block, how alike the tokens of a text are (mean cosine between two of them) without and with the
filter, and how far the filter moves them. Then what comes out: for an encoder the likeness of sentences, for a
language model its next words. With ``--finetune`` an encoder learns to tell topics of Python's manual apart, stock and
filtered, on the same batches, with several seeds. With ``--quantised`` a language model reads the texts with a cache
whose numbers are rounded.
"""

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_imgproc_attn.errors import (
    OneLineParser,
    UsageError,
    broken_files,
    exit_code,
    plain_message,
    refuse_missing_path,
)
from hf_imgproc_attn.markdown_tables import table_text
from hf_imgproc_attn.models.spec_fields import PRESETS

if TYPE_CHECKING:
    import torch

SENTENCES = (
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "A woman is slicing onions.",
    "The stock market fell sharply today.",
    "Shares lost much of their value this morning.",
    "It has been raining since dawn.",
)
PAIRS = ((0, 1), (3, 4), (0, 2), (0, 3), (4, 5))
"""Two pairs that mean the same, then three that do not."""
TEXTS, LENGTH = 16, 64
"""Texts that a language model without a tokenizer writes for itself, and their tokens."""
MOST_READ = 128
"""Tokens that are read one by one."""
STOCK = "stock"


def load(name: str) -> tuple[Any, Any]:
    """A model and its tokenizer, or None in place of a tokenizer that is missing or knows no word.

    Raises:
        UsageError: for what is neither a causal language model nor an encoder of texts.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    refuse_missing_path("model", name)
    try:
        config = AutoConfig.from_pretrained(name)
        writes = any(
            "CausalLM" in architecture or "LMHead" in architecture for architecture in config.architectures or ()
        )
        model = (AutoModelForCausalLM if writes else AutoModel).from_pretrained(name).eval()
    except broken_files() as error:
        raise UsageError(f"model must be a model of texts, got {name!r}: {plain_message(error)}") from error
    of_images_too = not model.can_generate() and config.get_text_config() is not config
    if model.main_input_name != "input_ids" or config.is_encoder_decoder or of_images_too:
        raise UsageError(
            f"model must be a causal language model or an encoder of texts, got {name!r} of type {config.model_type}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return model, None
    # Without its vocabulary Transformers makes one that takes every word for the unknown one.
    return model, tokenizer if len(tokenizer) > len(set(tokenizer.all_special_ids)) else None


def put_filter(model: Any, preset: str, layers: Sequence[int] | None) -> Any:
    """A copy of a model with a filter.

    Raises:
        UsageError: for a preset that the model cannot have, or layers that it has not.
    """
    from hf_imgproc_attn import apply_filter

    try:
        return apply_filter(copy.deepcopy(model), preset, layers=layers)
    except ValueError as error:
        raise UsageError(f"preset: {plain_message(error)}") from error


def given_texts(model: Any, tokenizer: Any) -> dict[str, "torch.Tensor"]:
    """The sentences as tokens; without a tokenizer texts that the model writes.

    Raises:
        UsageError: for an encoder without a tokenizer.
    """
    import torch

    from hf_imgproc_attn.conversion_probe import sample_texts

    if tokenizer is not None and tokenizer(SENTENCES[0]).input_ids:
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.unk_token
        encoded = tokenizer(list(SENTENCES), padding=True, return_tensors="pt", return_token_type_ids=False)
        return dict(encoded)
    if not model.can_generate():
        raise UsageError("model must come with a tokenizer, or be a language model, which writes its own texts")
    ids = sample_texts(model, torch.Generator().manual_seed(0), LENGTH, TEXTS)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def likeness(states: "torch.Tensor", mask: "torch.Tensor") -> float:
    """Mean cosine between two tokens of a text: 1 where all are the same.

    Args:
        states: ``[texts, tokens, width]``.
        mask: ``[texts, tokens]``, 0 for padding.
    """
    import torch

    unit = torch.nn.functional.normalize(states.double(), dim=-1) * mask.unsqueeze(-1)
    pairs = mask.sum(-1) * (mask.sum(-1) - 1)
    return float(((unit.sum(1).square().sum(-1) - mask.sum(-1)) / pairs).mean())


def what_moves(stock: Any, filtered: Any, given: dict[str, "torch.Tensor"]) -> list[tuple[str, ...]]:
    """A row for each block: likeness of tokens without and with the filter, and the relative change of its output."""
    import torch

    mask = given["attention_mask"]
    with torch.no_grad():
        before, after = (model(**given, output_hidden_states=True).hidden_states for model in (stock, filtered))
    rows: list[tuple[str, ...]] = [("block", "tokens alike", "with the filter", "moved by")]
    for block, (one, other) in enumerate(zip(before, after, strict=True)):
        shown = mask.bool()
        moved = float((other - one)[shown].norm() / one[shown].norm())
        rows.append((str(block or "in"), f"{likeness(one, mask):.3f}", f"{likeness(other, mask):.3f}", f"{moved:.3f}"))
    return rows


def sentences(models: Sequence[Any], given: dict[str, "torch.Tensor"]) -> list[tuple[str, ...]]:
    """Cosine between the mean tokens of two sentences, for each pair and model."""
    import torch

    weights = given["attention_mask"].unsqueeze(-1)
    columns = []
    with torch.no_grad():
        for model in models:
            states = model(**given).last_hidden_state
            means = torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
            columns.append([f"{float(means[one] @ means[other]):.3f}" for one, other in PAIRS])
    rows: list[tuple[str, ...]] = [("sentences", "alike", "with the filter")]
    return rows + [
        (f"{SENTENCES[one]} / {SENTENCES[other]}", *cells)
        for (one, other), cells in zip(PAIRS, zip(*columns, strict=True), strict=True)
    ]


def next_words(stock: Any, filtered: Any, given: dict[str, "torch.Tensor"]) -> list[tuple[str, ...]]:
    """What the filter does to a language model's predictions, in nats a token and share of changed best tokens."""
    import torch

    shown = given["attention_mask"].bool()
    with torch.no_grad():
        one, other = (
            model(**given, use_cache=False).logits[shown].double().log_softmax(-1) for model in (stock, filtered)
        )
    divergence = float((one.exp() * (one - other)).sum(-1).mean())
    changed = float((one.argmax(-1) != other.argmax(-1)).double().mean())
    return [
        ("next words", ""),
        ("divergence from the stock model, nats a token", f"{divergence:.3f}"),
        ("tokens whose best next word is another", f"{100 * changed:.0f} %"),
    ]


def quantised(stock: Any, filtered: Any, given: dict[str, "torch.Tensor"]) -> list[tuple[str, ...]]:
    """Errors of the logits with a quantised cache, the texts one after another; see ``measure/quantised_cache.py``.

    Raises:
        UsageError: for a model whose heads cannot be cut into groups.
    """
    from hf_imgproc_attn.measure.quantised_cache import GROUP, errors

    text = given["input_ids"][given["attention_mask"].bool()][None, :MOST_READ]
    print(f"\n{text.shape[1]} tokens, relative error of the logits:")
    try:
        return errors(stock, filtered, text)
    except RuntimeError as error:
        raise UsageError(f"quantised needs heads of a width that {GROUP} divides: {plain_message(error)}") from error


def finetune(name: str, tokenizer: Any, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Classify paragraphs of Python's manual by topic: test accuracy in percent, stock and filtered.

    Args:
        name: the encoder.
        tokenizer: its tokenizer.
        options: ``variants``, presets, beside which the stock model comes by itself; ``layers`` that get the filter;
            ``steps`` of AdamW with learning rate 1e-4, ``batch`` paragraphs each, cut to ``length`` tokens; ``seeds``
            of the new classification layer, the batches and dropout, the same for all variants.

    Returns:
        A row for each variant: mean accuracy, that of every seed, and the mean difference from the stock model with
        its interval of 95 % (Student's t, paired by seed).
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    from hf_imgproc_attn.training_support.arguments import LabelledTextDataArguments
    from hf_imgproc_attn.training_support.labelled_text import load_labelled_texts

    splits, labels = load_labelled_texts(LabelledTextDataArguments())
    batches = {
        split: (
            tokenizer(
                part.texts, truncation=True, max_length=options.length, padding="max_length", return_tensors="pt"
            ),
            torch.as_tensor(part.labels),
        )
        for split, part in splits.items()
    }
    found: dict[str, list[float]] = {}
    for seed in options.seeds:
        for variant in (STOCK, *options.variants):
            torch.manual_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=len(labels))
            if variant != STOCK:
                model = put_filter(model, variant, options.layers)
            trained = _trained(model, *batches["train"], options, seed)
            found.setdefault(variant, []).append(_accuracy(trained, *batches["test"]))
            print(f"seed {seed}, {variant}: {found[variant][-1]:.1f} %", flush=True)
    rows: list[tuple[str, ...]] = [("variant", "test accuracy", "of each seed", "beside the stock model")]
    for variant, values in found.items():
        beside = [mine - theirs for mine, theirs in zip(values, found[STOCK], strict=True)]
        difference = "–" if variant == STOCK else _interval(beside)
        each = " ".join(f"{value:.1f}" for value in values)
        rows.append((variant, f"{sum(values) / len(values):.1f} %", each, difference))
    return rows


def _trained(model: Any, encoded: Any, labels: "torch.Tensor", options: argparse.Namespace, seed: int) -> Any:
    import torch

    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
    for _ in range(options.steps):
        rows = torch.randint(len(labels), (options.batch,), generator=generator)
        batch = {name: values[rows] for name, values in encoded.items()}
        optimizer.zero_grad()
        model(**batch, labels=labels[rows]).loss.backward()
        optimizer.step()
    return model.eval()


def _accuracy(model: Any, encoded: Any, labels: "torch.Tensor") -> float:
    import torch

    right = 0
    with torch.no_grad():
        for start in range(0, len(labels), 64):
            part = {name: values[start : start + 64] for name, values in encoded.items()}
            right += int((model(**part).logits.argmax(-1) == labels[start : start + 64]).sum())
    return 100 * right / len(labels)


def _interval(values: Sequence[float]) -> str:
    from statistics import fmean, stdev

    from scipy.stats import t

    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return f"{fmean(values):+.1f} ({fmean(values) - half:+.1f} to {fmean(values) + half:+.1f})"


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows, the first of them the head, as Markdown."""
    return table_text(rows[0], rows[1:])


def _build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("model", help="an encoder of texts or a causal language model, a folder or Hub name")
    parser.add_argument("--preset", choices=PRESETS, default="twicing", help="(default: %(default)s)")
    parser.add_argument("--layers", nargs="+", type=int, default=[-2, -1], help="(default: the last two)")
    parser.add_argument("--finetune", action="store_true", help="fine-tune an encoder too, stock and filtered")
    parser.add_argument("--quantised", action="store_true", help="errors of a language model with a quantised cache")
    parser.add_argument("--variants", nargs="+", choices=PRESETS, default=["twicing", "learned_twicing"])
    for name, default, meaning in (
        ("steps", 60, "of fine-tuning"),
        ("batch", 16, "paragraphs of a step"),
        ("length", 64, "tokens of a paragraph that are read"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning} (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of fine-tuning, two or more")
    return parser


def _run(argv: Sequence[str] | None) -> None:
    options = _build_parser().parse_args(argv)
    for name, least in (("steps", 1), ("batch", 1), ("length", 3)):
        if getattr(options, name) < least:
            raise UsageError(f"{name} must be an integer >= {least}, got {getattr(options, name)}")
    if len(set(options.seeds)) != len(options.seeds) or len(options.seeds) < 2:
        raise UsageError(f"seeds must be two or more different integers, got {options.seeds}")
    model, tokenizer = load(options.model)
    if options.finetune and (tokenizer is None or model.can_generate()):
        raise UsageError("finetune needs an encoder of texts with its tokenizer; see finetune_real.py for others")
    if options.quantised and not model.can_generate():
        raise UsageError("quantised needs a causal language model: an encoder has no cache")
    filtered = put_filter(model, options.preset, options.layers)
    given = given_texts(model, tokenizer)
    print(table(what_moves(model, filtered, given)) + "\n")
    if model.can_generate():
        print(table(next_words(model, filtered, given)))
    else:
        print(table(sentences((model, filtered), given)))
    if options.quantised:
        print("\n" + table(quantised(model, filtered, given)))
    if options.finetune:
        print("\n" + table(finetune(options.model, tokenizer, options)))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return exit_code(lambda: _run(argv))


if __name__ == "__main__":
    sys.exit(main())
