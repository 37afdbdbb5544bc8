"""The lens as a Space: the README beside this file says how to make one."""

import os

from hf_imgproc_attn.lens.app import serve

MODELS = (
    "openai-community/gpt2",
    "google-bert/bert-base-uncased",
    "google/vit-base-patch16-224",
    "facebook/dinov2-small",
)

# Names that the Space offers instead, separated by commas: a variable in its settings.
chosen = [name.strip() for name in os.environ.get("LENS_MODELS", "").split(",") if name.strip()]
serve({name: name for name in chosen or MODELS}, paths=False)
