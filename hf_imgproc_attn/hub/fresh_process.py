"""What a stranger gets: loads a checkpoint in a process without this package, and compares its outputs with a run's.

Runs as a script of its own, and prints one line of JSON. It imports nothing of this package, and makes that
impossible.

- ``python -I fresh_process.py FOLDER`` loads the files that are to be published, before anything is sent.
- ``python -I fresh_process.py REPO_ID COMMIT FOLDER``, in an environment with an empty ``HF_HOME``, downloads the
  published commit, compares it with the Hub's checksums, and its outputs with the folder's.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

PACKAGE = "hf_imgproc_attn"
FILTERED = "imgproc_filtered"
"""The type of filtered models, whose class is a stock one."""
TRAVELLED = "transformers_modules."
"""Before the names of modules that came with a checkpoint."""


class WrongCheckpointError(Exception):
    """What is wrong with a checkpoint that loads."""


def probe(config: Any) -> dict[str, Any]:
    """Two inputs that any model of the configuration takes, the same at every call: images, or token ids."""
    import torch

    generator = torch.Generator().manual_seed(0)
    if hasattr(config, "patch_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(2, config.num_channels, height, width, generator=generator)}
    length = min(getattr(config, "max_position_embeddings", None) or 32, 32)
    shape = (2, 2, length) if getattr(config, "classifier_pairs", False) else (2, length)
    return {"input_ids": torch.randint(config.vocab_size, shape, generator=generator)}


def class_names(auto_class: str, config_class: type) -> list[str]:
    """The stock classes that an Auto class has for a configuration."""
    import transformers

    mapping = getattr(getattr(transformers, auto_class), "_model_mapping", {})  # AutoConfig has none
    found = mapping.get(config_class, None)
    return [kind.__name__ for kind in (found if isinstance(found, (tuple, list)) else (found,)) if kind is not None]


def outputs(name: str, **options: Any) -> tuple[Any, Any]:
    """The logits of a checkpoint on the probe, and the model, through the Auto class that it was saved with.

    Raises:
        WrongCheckpointError: if weights and configuration do not belong together, which Transformers only logs.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=True, **options)
    (architecture,) = config.architectures
    if config.model_type == FILTERED:  # its classes are named after the Auto classes
        base = type(config.base())
        auto_class = next((key for key in config.auto_map if architecture in class_names(key, base)), None)
    else:
        auto_class = next((key for key, value in config.auto_map.items() if value.endswith(f".{architecture}")), None)
    if auto_class is None:
        raise WrongCheckpointError(f"the architecture {architecture} is none of the classes in auto_map")
    model, info = getattr(transformers, auto_class).from_pretrained(
        name, trust_remote_code=True, dtype=torch.float32, output_loading_info=True, **options
    )
    wrong = {kind: sorted(map(str, info[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
    if any(wrong.values()):
        found = "; ".join(f"{kind}: {', '.join(keys)}" for kind, keys in wrong.items() if keys)
        raise WrongCheckpointError(f"the weights are not those of the configuration ({found})")
    with torch.no_grad():
        result = model.eval()(**probe(config))
    return result.logits, model


def code_of(model: Any) -> str:
    """The module of a model's class; of a stock class with filters that travelled the filters' module."""
    modules = [type(model).__module__, *(type(part).__module__ for part in model.modules())]
    return next((module for module in modules if module.startswith(TRAVELLED)), modules[0])


def check_folder(folder: str) -> dict[str, Any]:
    """Load model and processor from a folder.

    Returns:
        ``class`` on success; ``error`` otherwise.
    """
    import transformers

    logits, model = outputs(folder)
    if not logits.isfinite().all():
        raise WrongCheckpointError("the outputs on a probe are not finite numbers")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    if hasattr(config, "patch_size"):
        if os.path.isfile(os.path.join(folder, "preprocessor_config.json")):
            # Not from the top: Transformers 5.17 hands out a stand-in there where torchvision is missing.
            from transformers.models.auto.image_processing_auto import AutoImageProcessor

            AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    elif os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
        # By name of a file: without one AutoTokenizer makes up an empty tokenizer.
        tokens = len(transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True))
        if tokens > config.vocab_size:
            raise WrongCheckpointError(f"the tokenizer has {tokens} tokens, the model {config.vocab_size}")
    return {"class": type(model).__name__}


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
    downloaded, model = outputs(repo_id, revision=commit)
    local, _ = outputs(folder)
    difference = (downloaded - local).abs().max().item()
    if not difference <= 1e-5 * max(1.0, local.abs().max().item()):
        return {"error": f"the outputs on a probe differ by {difference:.3g}", "again": False}
    if not (module := code_of(model)).startswith(TRAVELLED):
        return {"error": f"the model came from {module}, not from the published code", "again": False}
    return {"class": type(model).__name__, "module": module, "max_difference": difference}


def main(arguments: list[str]) -> dict[str, Any]:
    """One of the two checks, by the number of arguments; an error of it in words."""
    try:
        return check_folder(*arguments) if len(arguments) == 1 else check(*arguments)
    except WrongCheckpointError as error:
        return {"error": str(error)}
    except Exception as error:  # a broken checkpoint can raise anything
        return {"error": f"it cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}"}


if __name__ == "__main__":
    sys.modules[PACKAGE] = None  # type: ignore[assignment]  # every import of it fails from here on
    print(json.dumps(main(sys.argv[1:])))
