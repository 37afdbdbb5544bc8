"""What the studies of this package are of, in words, and the claims that none of them tests yet."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """What a study trains on what, for readers who have not seen its file.

    Attributes:
        title: of its part of the page.
        text: data, model and recipe, and how the recipe was chosen.
        smaller: the study of the same data, fewer of them, whose results it asks for again.
    """

    title: str
    text: str
    smaller: str | None = None


@dataclass(frozen=True)
class Untested:
    """A claim that nothing here tests, and why."""

    title: str
    why: str


SUBJECTS = {
    "digits": Subject(
        "Small images: scikit-learn's digits",
        "A ViT of 0.14M parameters, 16 patches, on the 1,259 training images of 8 x 8 pixels; accuracy on the 359 "
        "test images, where one image is 0.28 points. Learning rate and length were chosen for softmax on the "
        "validation split (`digits_recipe.yaml`): what the filters lack in tuning counts against them.",
    ),
    "digits_autoattack": Subject(
        "AutoAttack on the digits",
        "The images and the recipe above, trained again; FGSM, PGD and AutoAttack on 100 test images, where one image "
        "is a point.",
    ),
    "digits_start": Subject(
        "Where untied position logits start",
        "The same images and recipe, on the validation split, whose 179 images make steps of 0.56 points; the test "
        "split was not read. The baseline is `bilateral` with the default bandwidth, h = (4 head_dim)^(1/4) = 2.83. "
        "Before training, position logits vary over pairs of patches with a standard deviation of 0.21 / h²: 0.003 "
        "with h = 8, 0.026 with the default, 0.21 with 1, 0.84 with 0.5 and 3.4 with 0.25.",
    ),
    "listops": Subject(
        "Long sequences: ListOps, made short",
        "A BERT of two layers and width 64 that averages over its tokens, on 10,000 nested lists of 9 to 31 tokens, "
        "two epochs; ten classes, accuracy on 2,000 test sequences. Lengths and epochs were chosen with softmax on "
        "the validation split so that it neither fails nor is perfect.",
    ),
    "listops_seeds": Subject(
        "ListOps, made short, with twelve more seeds",
        "The lists, the model and the recipe of the study above, whose three seeds could not tell anything apart; "
        "other seeds.",
    ),
    "listops_rivals": Subject(
        "More filters and rivals on ListOps, made short",
        "The lists, the model and the recipe of the first study of lists, which was made without them; softmax ran "
        "again, with three seeds.",
    ),
    "cifar10_small": Subject(
        "CIFAR-10, 4,000 training images",
        "A ViT of 0.15M parameters on patches of 8 x 8 pixels, five epochs; accuracy on 500 test images, "
        "attacks on 100 of them. The recipe was not tuned.",
    ),
    "cifar10": Subject(
        "CIFAR-10, 20,000 training images",
        "The default small ViT, 0.8 to 1.0M parameters on patches of 4 x 4 pixels, five epochs; accuracy on 2,000 "
        "test images, attacks on 100 of them. The recipe was not tuned. The study with 4,000 images has another "
        "model, other patches and other test images: where the two differ, that may be the reason.",
        smaller="cifar10_small",
    ),
    "wikitext2_small": Subject(
        "Language models: WikiText-2, its first lines",
        "A GPT-2 of two layers and width 64 on the first 6,000 lines with a vocabulary of 1,024, far from converged; "
        "perplexity a word on the first 600 test lines, where lower is better. The recipe is the "
        "better of two tries with softmax.",
    ),
    "wikitext2_medium": Subject(
        "Language models: WikiText-2, half of it",
        "A GPT-2 of four layers and width 128, 1.3 to 1.5M parameters, on the first 18,000 lines with a vocabulary of "
        "4,096, one epoch; perplexity a word on the first 2,000 test lines, where lower is better. The recipe was not "
        "tuned. The study of fewer lines has another vocabulary, model, learning rate and other test lines.",
        smaller="wikitext2_small",
    ),
    "segmentation": Subject(
        "A class for every pixel: digits on photographs",
        "A ViT of three layers and width 64 with the upsampling head, 1,600 composed pictures of 32 x 32 pixels, ten "
        "epochs; mean IoU over 11 classes on 400 test pictures, whose photographs and digits are others than those of "
        "training. The recipe is the best of three tries with softmax, one seed, by the validation split (15.5 %; "
        "all background is about 8 %): far from converged.",
    ),
    "recall": Subject(
        "Recall of pairs among noise",
        "A GPT-2 of two layers, four heads and width 64 on 12,800 sequences of 32 tokens: pairs of four keys and four "
        "values, a fifth of them replaced by noise tokens, 1,800 steps. Where a key comes again its value is asked; "
        "accuracy of the answers in 400 test sequences, also with 30 to 60 % noise. The setting was looked for with "
        "softmax and one seed, on fresh sequences and on the validation split, until it learned: weights start with a "
        "standard deviation of 0.15. With 16 symbols and as many noise tokens it stayed where it only knows which "
        "values occur. The study then found softmax at 100 %: the task has no room above it, and can only show "
        "what fails to learn.",
    ),
    "corrupted_recall": Subject(
        "Recall of values that are often shown wrongly",
        "The same small GPT-2 on 12,800 sequences of 64 tokens, without noise tokens: four keys, each with one of "
        "four values, but 40 % of the values that are shown are another one. Asked is the true value, so that many "
        "observations have to be averaged. 600 steps; accuracy of the answers in 1,280 test sequences. The setting is "
        "the third that was tried with softmax and one seed on the validation split: nearly learned, not quite. With "
        "32 tokens and a fifth of the values wrong, softmax did reach the best answers that are possible: what is "
        "better here may only learn faster: the next study asks.",
    ),
    "corrupted_recall_long": Subject(
        "The same recall, three times as long",
        "The same sequences and model, 1,800 steps instead of 600, with a learning rate that falls as slowly as that "
        "takes. The number of steps was not tuned.",
    ),
}
"""Study -> what it is of, in the order of the page."""

UNTESTED = (
    Untested(
        "At the size of the papers (ImageNet, WikiText-103, ADE20K, Long Range Arena)",
        "Days of GPUs. The recipes are in `training/configs/full_scale`; `wikitext2.yaml` in "
        "`training/configs/studies` is the next larger study, for a machine with a GPU or a cluster.",
    ),
    Untested(
        "A recall that is hard for softmax",
        "Between the setting of the study of pairs among noise, which softmax solves, and those with 16 symbols, "
        "which it did not learn in 1,600 to 2,700 steps, none was looked for.",
    ),
    Untested(
        "Whether a recipe tuned for a filter helps it",
        "Every recipe here was chosen for softmax or for nothing. `bilateral_gaussian`, far behind on the digits, may "
        "need another.",
    ),
    Untested(
        "The other corruptions of ImageNet-C, frost among them",
        "Each costs time, and frost needs photographs of its authors, which this package does not ship "
        "(`imgproc-attn robustness --frost_pictures`).",
    ),
    Untested(
        "The other presets in the other studies",
        "Only the digits and the nested lists have nearly all of them; the tables name those of the other studies.",
    ),
    Untested(
        "Whether a filter makes a trained model better",
        "What trained models with filters learn here is to compute what they did before ([Recovery](recovery.md)): "
        "they can catch up, not gain. Only MiniLM was fine-tuned on a task, too shortly to tell ([In any Transformers "
        "model](any-model.md#real-weights)).",
    ),
    Untested(
        "Over-smoothing of language models and of segmentation",
        "`imgproc-attn lens` measures it of one model; the studies measure it of classifiers.",
    ),
)
