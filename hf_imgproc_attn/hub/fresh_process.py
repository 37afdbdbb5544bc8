"""What a stranger gets: downloads a commit into an empty cache, loads it without this package, compares the outputs.

Runs as a script of its own, ``python -I fresh_process.py REPO_ID COMMIT RUN_FOLDER``, in an environment that has an
empty ``HF_HOME``; prints one line of JSON. It imports nothing of this package, and makes that impossible.
"""

from __future__ import annotations

import json
import sys
from typing import Any

PACKAGE = "hf_imgproc_attn"


def probe(config: Any) -> dict[str, Any]:
    """Two inputs that any model of the configuration takes, the same at every call: images, or token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "patch_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator)}
    length = min(config.n_positions, 32)
    return {"input_ids": torch.randint(config.vocab_size, (2, length), generator=generator)}


def outputs(name: str, **options: Any) -> tuple[Any, type]:
    """The logits of a checkpoint on the probe, and its class, through the Auto class that it was saved with."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True, **options)
    (architecture,) = config.architectures
    auto_class = next(key for key, value in config.auto_map.items() if value.endswith(f".{architecture}"))
    model = getattr(transformers, auto_class).from_pretrained(
        name, trust_remote_code=True, dtype=torch.float32, **options
    )
    with torch.no_grad():
        result = model.eval()(**probe(config))
    return result.logits, type(model)


def check(repo_id: str, commit: str, folder: str) -> dict[str, Any]:
    """Download, compare checksums, load, compare outputs.

    Returns:
        ``class``, ``module`` and ``max_difference`` on success; ``error``, and ``again`` (whether another attempt may
        help), otherwise.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        snapshot_download(repo_id, revision=commit)
        found = HfApi().verify_repo_checksums(repo_id, revision=commit)
    except Exception as error:  # whatever it is, the parent process words it
        return {"error": f"the download failed: {type(error).__name__}: {error}", "again": True}
    wrong = [item["path"] for item in found.mismatches] + found.missing_paths
    if wrong:
        return {"error": f"the download differs from the Hub's checksums in {', '.join(wrong)}", "again": True}
    downloaded, model_class = outputs(repo_id, revision=commit)
    local, _ = outputs(folder)
    difference = (downloaded - local).abs().max().item()
    if not difference <= 1e-5 * max(1.0, local.abs().max().item()):
        return {"error": f"the outputs on a probe differ by {difference:.3g}", "again": False}
    if not model_class.__module__.startswith("transformers_modules."):
        return {"error": f"the model came from {model_class.__module__}, not from the published code", "again": False}
    return {"class": model_class.__name__, "module": model_class.__module__, "max_difference": difference}


if __name__ == "__main__":
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # every import of it fails from here on
    print(json.dumps(check(*sys.argv[1:])))
