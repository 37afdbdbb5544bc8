"""A client process of `test_server.py`, with the Hub's address and token in its environment.

Usage: client_worker.py upload|train|load ARGUMENTS…; what it found is printed as one line of JSON, the last.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def upload(folder: str) -> dict[str, Any]:
    """One upload of a folder to ann/vit."""
    from huggingface_hub import upload_folder

    return {"commit": upload_folder(repo_id="ann/vit", folder_path=folder).oid}


def train(folder: str) -> dict[str, Any]:
    """A step of Trainer with its push, and a push of the model alone to a branch of another repository."""
    import torch
    from transformers import Trainer, TrainingArguments, ViTImageProcessorPil

    from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTForImageClassification
    from tests.models.helpers import sharpen_, tiny_vit_config

    torch.manual_seed(0)
    config = tiny_vit_config(
        "bilateral_twicing", image_size=12, num_channels=3, id2label={0: "cat", 1: "dog", 2: "eel"}
    )
    model = sharpen_(ImgProcViTForImageClassification(config)).eval()
    data = [{"pixel_values": torch.randn(3, 12, 12), "labels": label} for label in (0, 1)]
    arguments = TrainingArguments(
        folder,
        max_steps=1,
        push_to_hub=True,
        hub_model_id="ann/trained",
        hub_private_repo=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_steps=1,
    )
    processor = ViTImageProcessorPil(size={"height": 12, "width": 12})
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=processor)
    trainer.train()
    pushed = trainer.push_to_hub()
    model.push_to_hub("ann/bare", revision="draft", commit_message="bare")
    with torch.no_grad():
        logits = model.eval()(pixel_values=data[0]["pixel_values"][None]).logits
    Path(folder, "probe.json").write_text(json.dumps(data[0]["pixel_values"].tolist()))
    return {"commit": pushed.oid, "logits": logits.tolist()}


def load(folder: str, revision: str) -> dict[str, Any]:
    """The trained model by its id and revision, with the code that travelled with it."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageClassification, pipeline

    chosen: dict[str, Any] = {"trust_remote_code": True, "revision": revision}
    model = AutoModelForImageClassification.from_pretrained("ann/trained", **chosen).eval()
    pixels = torch.tensor(json.loads(Path(folder, "probe.json").read_text()))[None]
    with torch.no_grad():
        logits = model(pixel_values=pixels).logits
    classify = pipeline("image-classification", model="ann/trained", **chosen)
    labels = [found["label"] for found in classify(Image.new("RGB", (12, 12), (10, 200, 90)))]
    return {"home": type(model).__module__, "logits": logits.tolist(), "labels": labels}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
