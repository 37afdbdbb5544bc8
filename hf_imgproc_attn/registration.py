"""Registration of the model types with Transformers' Auto classes, at the moment Transformers is imported.

Two wishes conflict. ``import hf_imgproc_attn`` must be enough for the Auto classes to know our model types, whatever
is imported first; and it must cost nothing, because every ``imgproc-attn … --help`` does it, while registering needs
the model classes and so torch. Therefore: where Transformers is there already, the types are registered at once; where
it is not, a finder on ``sys.meta_path`` waits for it and goes away when the work is done.

The finder also watches the modules of :mod:`hf_imgproc_attn.models`. If one of *them* is what imports Transformers, it
is only half executed at that moment and its classes do not exist yet: registration waits for the outermost watched
import.
"""

from __future__ import annotations

import importlib.abc
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

_OUR_MODULES = f"{__package__}.models."


class _WatchedImports(threading.local):
    """How many watched imports, one inside the other, this thread is executing."""

    depth = 0


_watched = _WatchedImports()


class _RegistrationFinder(importlib.abc.MetaPathFinder):
    """Lets the other finders find a watched module, and makes its execution end in `register`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith(_OUR_MODULES):
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None:
                break
        if spec is not None and spec.loader is not None:
            # The loader stays what it is (inspect and importlib.resources ask it things); only this call is wrapped.
            execute = partial(_execute_then_register, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def _execute_then_register(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    _watched.depth += 1
    try:
        execute(module)
        if _watched.depth == 1 and "transformers" in sys.modules:
            register()
    finally:
        _watched.depth -= 1


def register_with_transformers() -> None:
    """Register now if Transformers has been imported, else as soon as it is. Calling it again changes nothing."""
    if "transformers" in sys.modules:
        register()
    elif not any(isinstance(finder, _RegistrationFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistrationFinder())


def register() -> None:
    """Register configurations, models, tokenizers and image processors of every backbone.

    Imports torch and the model code. It may run more than once, also in two threads: it always writes the same
    entries.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import is_torchvision_available, is_vision_available

    from . import gpu as _gpu  # noqa: F401  # its back-ends register themselves
    from .backbones import BACKBONES
    from .hub.travelling_code import report_differing_code
    from .models.configuration_imgproc_filtered import ImgProcFilteredConfig
    from .models.modeling_imgproc_filtered import DOORS
    from .models.modeling_shared import FilterPreTrainedMixin

    FilterPreTrainedMixin.load_listeners = [report_differing_code]
    of_images = []
    # What Transformers looks up by a class's name is entered by `models/modeling_names.py`, where the classes are.
    for row in BACKBONES.values():
        config = row.our_class(row.config)
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for head in row.heads:
            getattr(transformers, head.auto_class).register(config, row.our_class(head.variant), exist_ok=True)
        if row.tokenizer is not None:
            AutoTokenizer.register(config, tokenizer_class=row.stock_class(row.tokenizer), exist_ok=True)
        if row.input == "images":
            of_images.append(config)
    AutoConfig.register(ImgProcFilteredConfig.model_type, ImgProcFilteredConfig, exist_ok=True)
    for auto_class, door in DOORS.items():
        getattr(transformers, auto_class).register(ImgProcFilteredConfig, door, exist_ok=True)
    # Neither Pillow nor torchvision is a requirement; asking for a processor whose library is missing warns or fails.
    image_processors: dict[str, type] = {}
    if is_vision_available():
        from transformers import ViTImageProcessorPil

        image_processors["pil"] = ViTImageProcessorPil
    if is_torchvision_available():
        from transformers import ViTImageProcessor

        image_processors["torchvision"] = ViTImageProcessor
    if image_processors:
        # Not from the top: Transformers 5.17 hands out a stand-in there where torchvision is missing.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        for config in of_images:
            AutoImageProcessor.register(config, image_processor_classes=image_processors, exist_ok=True)
    if is_vision_available():
        from .models.image_processing_imgproc import ImgProcGreyImageProcessor
        from .models.image_processing_imgproc_segmentation import ImgProcSegmentationImageProcessor

        # Under keys of their own: they are found by the name in a checkpoint, never by the type of the model.
        for processor in (ImgProcGreyImageProcessor, ImgProcSegmentationImageProcessor):
            AutoImageProcessor.register(processor, image_processor_classes={"pil": processor}, exist_ok=True)

    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _RegistrationFinder)]
