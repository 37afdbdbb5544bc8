"""The embedded data of semantic segmentation: scikit-learn's digits on photographs of scikit-image, with exact masks.

An image has 32 x 32 pixels in colour: a piece of a photograph, and on it one or two handwritten digits, enlarged
from 8 x 8 pixels and inked in a colour that is darker or brighter than what is below. The class of a pixel is that of
the last digit whose ink covers at least half of it, else background. Everything is drawn from one seed; digits and
photographs of the three splits are different ones.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_imgproc_attn.errors import require_extras
from hf_imgproc_attn.training_support.labelled_data import stratified_split

if TYPE_CHECKING:
    from datasets import Dataset

SIDE = 32
LABEL_NAMES = ["background", *(str(digit) for digit in range(10))]
ROWS = {"train": 1600, "validation": 200, "test": 400}
"""Images of each split."""
PHOTOGRAPHS = {
    "train": ("astronaut", "camera", "chelsea", "coffee", "brick", "grass"),
    "validation": ("coins", "rocket"),
    "test": ("gravel", "moon", "clock", "motorcycle_left"),
}
"""Files of ``skimage.data``, all in its wheel, so that none is downloaded."""
_FILES = {"rocket": "rocket.jpg", "clock": "clock_motion.png"}
_SEEDS = {"train": 0, "validation": 1, "test": 2}
# Below this difference of grey values between ink and paper people cannot read the digits either.
_LEAST_CONTRAST = 60


class Composed(NamedTuple):
    """Images of a split.

    pixels: ``[images, 32, 32, 3]``, 8 bits.
    masks: ``[images, 32, 32]``, 0 where there is no digit, else the digit and one.
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.uint8]


def compose(split: str, rows: int | None = None) -> Composed:
    """Draw the images of a split; the first ones are the same however many are drawn.

    Args:
        split: a key of :data:`ROWS`.
        rows: how many; None: as many as the split has.

    Raises:
        UsageError: if scikit-image is not installed.
    """
    require_extras("filters")
    rows = ROWS[split] if rows is None else rows
    photographs, (digits, labels) = _photographs(split), _digits(split)
    pixels = np.empty((rows, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.zeros((rows, SIDE, SIDE), dtype=np.uint8)
    for row in range(rows):
        # A generator an image, whose stream is frozen: an image depends on nothing but its split and number.
        generator = np.random.RandomState(10_000 * _SEEDS[split] + row)
        image = _piece(photographs[generator.randint(len(photographs))], generator)
        for _ in range(generator.randint(1, 3)):
            chosen = generator.randint(len(digits))
            _ink(image, masks[row], digits[chosen], int(labels[chosen]), generator)
        pixels[row] = np.rint(image)
    return Composed(pixels, masks)


def composed_splits() -> dict[str, "Dataset"]:
    """Train, validation and test as data sets with the columns ``image`` and ``mask``."""
    import datasets
    from PIL import Image

    features = datasets.Features(image=datasets.Image(), mask=datasets.Image())
    splits = {}
    for split in ROWS:
        drawn = compose(split)
        columns = {
            "image": [Image.fromarray(image) for image in drawn.pixels],
            "mask": [Image.fromarray(mask) for mask in drawn.masks],
        }
        splits[split] = datasets.Dataset.from_dict(columns, features=features)
    return splits


def _photographs(split: str) -> list[NDArray[np.float64]]:
    """The photographs of a split in colour, from 0 to 255, at half of their size: more is seen in a piece."""
    from pathlib import Path

    import skimage.data
    from PIL import Image

    folder = Path(skimage.data.__file__).parent
    found = []
    for name in PHOTOGRAPHS[split]:
        with Image.open(folder / _FILES.get(name, f"{name}.png")) as image:
            colour = image.convert("RGB")
        found.append(np.asarray(colour.reduce(2), dtype=np.float64))
    return found


def _digits(split: str) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Digits ``[digits, 8, 8]`` as ink from 0 to 1, and what they are: 70, 10 and 20 % of each of the ten."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    rest, test = stratified_split(labels, 0.2)
    train, validation = stratified_split(labels[rest], 0.125)
    rows = {"train": rest[train], "validation": rest[validation], "test": test}[split]
    return images[rows].reshape(-1, 8, 8) / 16, labels[rows]


def _piece(photograph: NDArray[np.float64], generator: np.random.RandomState) -> NDArray[np.float64]:
    top, left = (generator.randint(side - SIDE + 1) for side in photograph.shape[:2])
    return photograph[top : top + SIDE, left : left + SIDE].copy()


def _ink(
    image: NDArray[np.float64],
    mask: NDArray[np.uint8],
    digit: NDArray[np.float64],
    label: int,
    generator: np.random.RandomState,
) -> None:
    """Draw a digit of 14 to 20 pixels at a random place, into image and mask."""
    from PIL import Image

    side = int(generator.randint(14, 21))
    enlarged = Image.fromarray(digit.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
    cover = np.clip(np.asarray(enlarged, dtype=np.float64), 0, 1)[..., None]
    top, left = generator.randint(SIDE - side + 1, size=2)
    place = np.s_[top : top + side, left : left + side]
    below = image[place].mean()
    darker, brighter = (0.0, below - _LEAST_CONTRAST), (below + _LEAST_CONTRAST, 255.0)
    low, high = darker if below > 127 else brighter
    ink = generator.uniform(low, high, size=3)
    image[place] = (1 - cover) * image[place] + cover * ink
    mask[place][cover[..., 0] >= 0.5] = label + 1
