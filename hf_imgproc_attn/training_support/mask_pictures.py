"""What a segmentation model says, as a picture: image, mask and prediction side by side, and the classes' colours.

The colours are those of Okabe and Ito (2008), which people with colour-blindness tell apart, then lighter and darker
ones of other hues; class 0 is black. With more than eleven classes colours come again. Pixels that do not count are
hatched in grey.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_imgproc_attn.output_paths import write_or_keep
from hf_imgproc_attn.training_support.image_pixels import channel_statistics
from hf_imgproc_attn.training_support.mask_pixels import MaskedPixels

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

PREDICTIONS = "predictions.png"
COLOURS = (
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0),
    (204, 121, 167), (255, 255, 255), (153, 153, 153), (136, 34, 85),
)  # fmt: skip
"""Red, green, blue of the classes from 0 on."""
_LEAST_SIDE, _GAP, _LINE = 128, 6, 16
_MOST_NAMES = 22


def draw_run(folder: str, splits: Mapping[str, MaskedPixels], number: int) -> None:
    """Write ``predictions.png`` beside a run's checkpoint, of the first images of its test or validation split.

    Args:
        folder: of the run.
        splits: its data.
        number: of images; 0 writes nothing.
    """
    from transformers import AutoModelForSemanticSegmentation
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    split = next((name for name in ("test", "validation") if name in splits), None)
    if split is None or number == 0 or (Path(folder) / "adapter_config.json").is_file():  # adapters are no model
        return
    model = AutoModelForSemanticSegmentation.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    picture = predictions_picture(model, processor, splits[split], number)
    write_or_keep(Path(folder) / PREDICTIONS, lambda file: picture.save(file, format="PNG"), "output_dir")
    print(f"{PREDICTIONS}: image, mask and prediction of the {split} split")


@torch.no_grad()
def predictions_picture(model: Any, processor: Any, dataset: MaskedPixels, number: int) -> "Picture":
    """A row for each of the first images: image, mask, prediction; below them the colours of the classes that occur.

    Args:
        model: in evaluation mode.
        processor: its image processor.
        dataset: a split that is not augmented.
        number: of images.
    """
    mean, std = channel_statistics(processor)
    rows, shown = [], set[int]()
    for index in range(min(number, len(dataset))):
        item = dataset[index]
        pixels = item["pixel_values"]
        logits = model(pixel_values=((pixels.float() / 255 - mean) / std)[None].to(model.device)).logits
        size = tuple(item["labels"].shape)
        full = torch.nn.functional.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        mask, predicted = item["labels"].numpy(), full[0].argmax(0).cpu().numpy()
        classes = {int(label) for label in np.unique(np.stack((mask, predicted)))}
        shown |= classes & set(range(model.config.num_labels))
        image = pixels.expand(3, -1, -1).numpy().transpose(1, 2, 0)
        counted = model.config.num_labels
        rows.append([image, coloured(mask, counted), coloured(predicted, counted)])
    return _sheet(rows, [(label, str(model.config.id2label[label])) for label in sorted(shown)])


def coloured(labels: NDArray[Any], classes: int) -> NDArray[np.uint8]:
    """Labels ``[height, width]`` as colours ``[height, width, 3]``; what is no class is hatched."""
    counted = (labels >= 0) & (labels < classes)
    found = np.array(COLOURS, dtype=np.uint8)[np.where(counted, labels, 0) % len(COLOURS)]
    rows, columns = np.indices(labels.shape)
    hatched = np.where((rows + columns) % 4 < 2, 96, 48).astype(np.uint8)
    return np.where(counted[..., None], found, hatched[..., None])


def _sheet(rows: Sequence[Sequence[NDArray[np.uint8]]], names: Sequence[tuple[int, str]]) -> "Picture":
    """Pictures in rows, enlarged so that their pixels can be seen, with titles and a legend."""
    from PIL import Image, ImageDraw

    height, width = rows[0][0].shape[:2]
    factor = max(1, -(-_LEAST_SIDE // max(height, width)))
    height, width = factor * height, factor * width
    shown = names[:_MOST_NAMES]
    columns = max(1, (3 * (width + _GAP)) // 130)
    legend = -(-len(shown) // columns) + (len(names) > len(shown))
    sheet = Image.new("RGB", (3 * (width + _GAP) + _GAP, _LINE + len(rows) * (height + _GAP) + legend * _LINE + _GAP),
                      "white")  # fmt: skip
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("image", "mask", "prediction")):
        draw.text((_GAP + column * (width + _GAP), 2), title, fill="black")
    for row, pictures in enumerate(rows):
        for column, pixels in enumerate(pictures):
            enlarged = np.repeat(np.repeat(pixels, factor, 0), factor, 1)
            place = (_GAP + column * (width + _GAP), _LINE + row * (height + _GAP))
            sheet.paste(Image.fromarray(enlarged), place)
    top = _LINE + len(rows) * (height + _GAP)
    for number, (label, name) in enumerate(shown):
        x, y = _GAP + number % columns * 130, top + number // columns * _LINE
        draw.rectangle((x, y + 2, x + 10, y + 12), fill=COLOURS[label % len(COLOURS)], outline="black")
        draw.text((x + 15, y + 1), name[:18], fill="black")
    if len(names) > len(shown):
        draw.text((_GAP, top + (legend - 1) * _LINE), f"and {len(names) - len(shown)} more classes", fill="black")
    return sheet
