"""The claims of the papers that a study of this package has something to say about, and those that none has yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Claim:
    """Something that a paper says of filters.

    Attributes:
        title: in a few words.
        text: what is claimed, by whom, and on what.
        study: the study whose ledger is read.
        families: kinds of conditions that it is about, as ``clean``.
        variants: of the study, that it is about.
        against: baselines that these are compared with.
    """

    title: str
    text: str
    study: str
    families: tuple[str, ...]
    variants: tuple[str, ...]
    against: tuple[str, ...] = ("softmax",)


@dataclass(frozen=True)
class Untested:
    """A claim that nothing here tests, and why."""

    title: str
    why: str


_TWICING = ("twicing", "twicing_last_two", "learned_twicing")
_BILATERAL = ("bilateral", "bilateral_gaussian")
_LARGER = ("softmax_as_large", "softmax_as_costly")

CLAIMS = (
    Claim(
        "Twicing raises clean accuracy",
        "Abdullaev and Nguyen (ICLR 2025) report more accurate image classifiers and language models than softmax; on "
        "ImageNet, DeiT-tiny, 72.60 instead of 72.00 %, one seed.",
        "digits",
        ("clean",),
        _TWICING,
    ),
    Claim(
        "Twicing withstands noise and attacks better",
        "The same paper reports the larger gains under FGSM, PGD and on corrupted images.",
        "digits",
        ("noise", "attack"),
        _TWICING,
    ),
    Claim(
        "Separate kernels for content and position raise clean accuracy",
        "Abdullaev, Tkachenko and Nguyen (arXiv 2506.10371) drop the cross terms of content and position and report "
        "gains on images and texts.",
        "digits",
        ("clean",),
        (*_BILATERAL, "bilateral_twicing"),
    ),
    Claim(
        "Separate kernels withstand noise and attacks better",
        "The same paper tests corrupted and attacked images.",
        "digits",
        ("noise", "attack"),
        (*_BILATERAL, "bilateral_twicing"),
    ),
    Claim(
        "Feedback of early values (NeuTRENO) raises clean accuracy",
        "Nguyen, Nguyen and Baraniuk (NeurIPS 2023) add a part of the first layer's values against over-smoothing.",
        "digits",
        ("clean", "noise", "attack"),
        ("neutreno",),
    ),
    Claim(
        "Other boosters (SOS, gradient boosting) raise clean accuracy",
        "SOS is Romano and Elad's booster of image denoisers (2015); a second attention that corrects the first is of "
        "arXiv 2604.03190.",
        "digits",
        ("clean",),
        ("sos", "gradient_boosted"),
    ),
    Claim(
        "A filter is worth more than a larger stock model",
        "In the one published table with a wider baseline (10M tokens of WikiText-103, two seeds) wider stock "
        "attention is better than twicing (perplexity 69.02 and 69.64), and gradient boosting better than both "
        "(67.88). Here softmax_as_large has at least the parameters of bilateral_twicing, softmax_as_costly at "
        "least the operations of gradient_boosted.",
        "digits",
        ("clean",),
        (*_BILATERAL, *_TWICING, "bilateral_twicing", "neutreno", "sos", "gradient_boosted"),
        _LARGER,
    ),
)

UNTESTED = (
    Untested(
        "At the size of the papers (ImageNet, WikiText-103, ADE20K, Long Range Arena)",
        "Days of GPUs. The recipes are in `training/configs/full_scale`; `cifar10.yaml` and `wikitext2.yaml` in "
        "`training/configs/studies` are the next larger studies, for a machine with a GPU or a cluster.",
    ),
    Untested(
        "Language models: perplexity, and under word swap",
        "`wikitext2.yaml` has not been run: three hours of a core for each of its 36 runs.",
    ),
    Untested(
        "Over-smoothing: that the tokens of deep layers stay more different",
        "`imgproc-attn lens` measures it of a model; no study with seeds and intervals has been made.",
    ),
    Untested(
        "Long sequences",
        "The generators and recipes are there (`train-sequences`, `train-recall`); their presets have not been "
        "compared with several seeds.",
    ),
    Untested(
        "Where untied position logits should start",
        "`digits_start.yaml` asks it on the validation split and has not been run; no default was changed.",
    ),
    Untested(
        "Whether a recipe tuned for a filter helps it",
        "The recipe of the digits was chosen for softmax. `bilateral_gaussian`, far behind with it, may need another.",
    ),
    Untested(
        "Corruptions and AutoAttack",
        "`imgproc-attn robustness` measures them of one checkpoint; the study of the digits leaves them out. Its "
        "images of 8 x 8 pixels are too small for most of the published corruptions, and AutoAttack on every "
        "checkpoint would cost more than was at hand.",
    ),
)
