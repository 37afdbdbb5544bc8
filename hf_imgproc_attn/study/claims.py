"""The claims of the papers that a study of this package has something to say about."""

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


_TWICING = ("twicing", "twicing_last_two", "learned_twicing")
_BILATERAL = ("bilateral", "bilateral_gaussian")
_FILTERS = ("bilateral", "twicing", "bilateral_twicing")
_OF_PHOTOGRAPHS = ("bilateral", "bilateral_gaussian", "twicing", "bilateral_twicing")
_BOOSTED = (*_TWICING, *_BILATERAL, "bilateral_twicing", "neutreno", "sos", "gradient_boosted")
_RIVALS = (
    "inversion", "dynamic_inversion", "exclusive", "gated", "sink", "softpick", "qk_norm", "value_residual",
    "local_linear", "differential", "robust", "sigmoid", "sinkhorn",
)  # fmt: skip
_ON_LISTS = (
    "learned_twicing", "sos", "gradient_boosted", "neutreno", "dynamic_inversion", "exclusive", "local_linear",
    "differential", "robust", "value_residual", "qk_norm", "sink", "softpick", "sigmoid", "sinkhorn",
    "bilateral_gaussian",
)  # fmt: skip
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
        "The same paper reports the larger gains under FGSM, PGD and on corrupted images. *Worst case*: an image is "
        "right if it withstood both attacks.",
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
        "Feedback of early values (NeuTRENO) raises accuracy, clean, noisy and attacked",
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
        "Other changes of softmax attention raise clean accuracy",
        "Presets that change the weights or the values otherwise, each with gains in its own paper: inversion "
        "(arXiv 2507.12006), exclusive (2603.09078), gated (2505.06708), sinks (Miller 2023), softpick (2504.20966), "
        "normalised queries and keys (2010.04245), value_residual (2410.17897), local_linear (2605.29157), "
        "differential (2410.05258), robust (2410.23182), sigmoid (2409.04431), sinkhorn (2110.11773).",
        "digits",
        ("clean",),
        _RIVALS,
    ),
    Claim(
        "Other changes of softmax attention withstand noise and attacks better",
        "A question of this package to the same presets.",
        "digits",
        ("noise", "attack"),
        _RIVALS,
    ),
    Claim(
        "Filters withstand corruptions better",
        "The papers on twicing and on separate kernels test corrupted images of ImageNet-C. Here six corruptions with "
        "the settings of CIFAR-10-C and severities 1, 3 and 5: their mean accuracy, and the mean corruption error "
        "with softmax of the same seed as 100, where lower is better. Images of 8 x 8 pixels are smaller than those "
        "that the settings were made for.",
        "digits",
        ("all corruptions",),
        (*_BOOSTED, *_RIVALS),
    ),
    Claim(
        "Filters smooth less: tokens of deep layers stay more different",
        "The papers on NeuTRENO and twicing explain their gains so. Measured as by the lens: the mean cosine "
        "similarity of two different tokens behind each layer, of test images; lower is the claim's side, and is "
        "called better. The bilateral presets add no positions to their tokens: patches that look alike start alike, "
        "which is a part of what is seen there.",
        "digits",
        ("over-smoothing",),
        (*_BOOSTED, *_RIVALS),
    ),
    Claim(
        "A filter is worth more than a larger stock model",
        "In the one published table with a wider baseline (10M tokens of WikiText-103, two seeds) wider stock "
        "attention is better than twicing (perplexity 69.02 and 69.64), and gradient boosting better than both "
        "(67.88). Here softmax_as_large has at least the parameters of bilateral_twicing, softmax_as_costly at "
        "least the operations of gradient_boosted.",
        "digits",
        ("clean",),
        _BOOSTED,
        _LARGER,
    ),
    Claim(
        "Filters withstand AutoAttack better",
        "AutoAttack is the ensemble that would show masked gradients, here with fewer steps than the published ones.",
        "digits_autoattack",
        ("attack",),
        (*_FILTERS, "neutreno", "robust"),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Untied position logits should not start as small as they do",
        "A question of this package: a smaller `position_bandwidth` h multiplies the position logits, and their "
        "gradients, by 2/h². The default is that of stock attention, and changes only with an interval that leaves "
        "out zero; 0.25 to 1 are worth a try where positions matter. A bandwidth of 8 asks the opposite.",
        "digits_start",
        ("clean",),
        ("bandwidth_quarter", "bandwidth_half", "bandwidth_one", "bandwidth_eight"),
        ("bilateral",),
    ),
    Claim(
        "Filters help on nested lists",
        "Papers of this line report gains on the Long Range Arena, of which ListOps is one task.",
        "listops",
        ("clean",),
        (*_FILTERS, "inversion", "gated"),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Tokens of nested lists stay more different",
        "As of images: the mean cosine similarity of two different tokens behind each of two layers, where lower is "
        "the claim's side.",
        "listops",
        ("over-smoothing",),
        (*_FILTERS, "inversion", "gated"),
    ),
    Claim(
        "Filters help on nested lists, with more seeds",
        "The same question, with enough seeds for a difference of some three points.",
        "listops_seeds",
        ("clean",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Tokens of nested lists stay more different, with more seeds",
        "The same measure as above.",
        "listops_seeds",
        ("over-smoothing",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Other boosters, normalisations and gates help on nested lists",
        "Each paper reports gains of its own on other data.",
        "listops_rivals",
        ("clean", "over-smoothing"),
        _ON_LISTS,
    ),
    Claim(
        "Filters classify small photographs better",
        "As above for images, on photographs instead of digits.",
        "cifar10_small",
        ("clean",),
        _OF_PHOTOGRAPHS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters withstand noise and attacks on photographs better",
        "AutoAttack is the ensemble that would show masked gradients, with fewer steps than the published ones.",
        "cifar10_small",
        ("noise", "attack"),
        _OF_PHOTOGRAPHS,
    ),
    Claim(
        "Filters withstand corrupted photographs better",
        "As on the digits, here eight corruptions of CIFAR-10-C at severities 1, 3 and 5: mean accuracy, and mean "
        "corruption error, where lower is better.",
        "cifar10_small",
        ("all corruptions",),
        _OF_PHOTOGRAPHS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Other changes of softmax attention classify photographs better",
        "As on the digits: learned twicing, inversion, gates, NeuTRENO and robust means, each with gains elsewhere.",
        "cifar10_small",
        ("clean", "noise", "attack", "all corruptions"),
        ("learned_twicing", "inversion", "gated", "neutreno", "robust"),
    ),
    Claim(
        "Other boosters, and twicing in the last layers, classify photographs better",
        "As on the digits: SOS, gradient boosting, and twicing in the last two of four layers.",
        "cifar10_small",
        ("clean", "noise", "attack", "all corruptions"),
        ("twicing_last_two", "sos", "gradient_boosted"),
        ("softmax", "softmax_as_large", "softmax_as_costly"),
    ),
    Claim(
        "Filters smooth photographs less",
        "As on the digits: similarity of tokens behind each of four layers, where lower is the claim's side.",
        "cifar10_small",
        ("over-smoothing",),
        _OF_PHOTOGRAPHS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters classify photographs better, with more of them",
        "As with 4,000 images.",
        "cifar10",
        ("clean",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters withstand noise and attacks on photographs better, with more of them",
        "As with 4,000 images, with the same reduced AutoAttack.",
        "cifar10",
        ("noise", "attack"),
        _FILTERS,
    ),
    Claim(
        "Filters withstand corrupted photographs better, with more of them",
        "As with 4,000 images: mean accuracy under eight corruptions, and mean corruption error, where lower is "
        "better.",
        "cifar10",
        ("all corruptions",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters smooth photographs less, with more of them",
        "As with 4,000 images, here behind each of the layers of the larger model.",
        "cifar10",
        ("over-smoothing",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters make better language models",
        "The twicing paper reports a lower perplexity on WikiText-103; arXiv 2604.03190 does too, on its first 10M "
        "tokens (69.64 after 72.16, two seeds), and a still lower one of gradient boosting (67.88).",
        "wikitext2_small",
        ("clean",),
        (*_FILTERS, "gradient_boosted"),
        ("softmax", "softmax_as_large", "softmax_as_costly"),
    ),
    Claim(
        "Language models with filters withstand swapped words better",
        "The twicing paper swaps words of the test split for AAA, as done here.",
        "wikitext2_small",
        ("word swap",),
        (*_FILTERS, "gradient_boosted"),
    ),
    Claim(
        "Delta, differential and forgetting attention make better language models",
        "The papers on forgetting (arXiv 2503.02130) and differential attention (2410.05258) report so at other "
        "sizes; of delta it is a question of this package.",
        "wikitext2_small",
        ("clean", "word swap"),
        ("delta", "differential", "forgetting"),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters make better language models, with more text",
        "The claim of the study before, with three times the lines and eight times the parameters.",
        "wikitext2_medium",
        ("clean",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Rotary positions make better language models",
        "Not a filter of the papers, but the usual other way to tell positions apart: softmax here adds learned "
        "positions to its tokens.",
        "wikitext2_medium",
        ("clean", "word swap"),
        ("rope",),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters make better language models than rotary positions do",
        "A question of this package: whether `bilateral` gains more than another way to tell positions apart.",
        "wikitext2_medium",
        ("clean", "word swap"),
        _FILTERS,
        ("rope",),
    ),
    Claim(
        "Gates that forget tokens, gates of outputs and feedback make better language models",
        "The papers on forgetting (arXiv 2503.02130), gated attention (2505.06708) and NeuTRENO (2312.00751) report "
        "so at other sizes. Forgetting tells positions apart as well: it is compared with rotary positions too.",
        "wikitext2_medium",
        ("clean", "word swap"),
        ("forgetting", "gated", "neutreno"),
        ("softmax", "softmax_as_large", "rope"),
    ),
    Claim(
        "Language models with filters withstand swapped words better, with more text",
        "Likewise: words of the test split are swapped for AAA.",
        "wikitext2_medium",
        ("word swap",),
        _FILTERS,
    ),
    Claim(
        "Filters segment better",
        "Of the dense tasks of the filter papers (ADE20K) a small stand-in.",
        "segmentation",
        ("clean",),
        _FILTERS,
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Segmentation with filters withstands noise and attacks better",
        "A question of this package, with Gaussian noise and FGSM; mean IoU, and the accuracy of the pixels.",
        "segmentation",
        ("noise", "attack"),
        _FILTERS,
    ),
    Claim(
        "Filters recall pairs among noise better",
        "The paper on differential attention reports gains in finding facts in the context; noise makes it a task for "
        "a denoiser. Softmax answers nearly everything here, so that nothing can be clearly better.",
        "recall",
        ("clean", "noise"),
        ("twicing", "bilateral", "delta", "differential"),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters average over values that are often shown wrongly",
        "A question of this package: a denoiser has to weigh all that was shown of a key, not to copy one. Who "
        "knows the rules is right in 75.8 % of the test answers, with the value shown last in 60.1 %.",
        "corrupted_recall",
        ("clean",),
        ("twicing", "bilateral", "bilateral_twicing", "delta", "differential"),
        ("softmax", "softmax_as_large"),
    ),
    Claim(
        "Filters are still ahead there after three times as many steps",
        "A question of this package: what is better above may only have learned faster. Whoever knows the rules is "
        "right in 75.8 % of the test answers.",
        "corrupted_recall_long",
        ("clean",),
        ("twicing", "bilateral_twicing"),
    ),
)
