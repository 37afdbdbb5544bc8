"""Models over several devices: device maps, offloading, FSDP2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import accelerate
import pytest
import torch

from hf_imgproc_attn.models.modeling_imgproc_gpt2 import ImgProcGPT2Block
from hf_imgproc_attn.models.modeling_imgproc_vit import (
    ImgProcViTEmbeddings,
    ImgProcViTLayer,
)
from tests.helpers import ROOT, prepared_python, run_command
from tests.models.ecosystem_cases import BACKBONES, CLASSES, build, inputs_of, real_logits
from tests.models.fsdp_worker import FILTERS, ONLY_FULL, SHARDED
from tests.models.variants import (
    VARIANTS,
    made_once,
)

pytestmark = pytest.mark.filterwarnings(
    # The newest versions have another name for it, the oldest supported ones do not; PEFT asks by the old one.
    "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"
)

# One worker waits for the two processes, for all tests that look at them.
once = pytest.mark.xdist_group("sharded")


@pytest.mark.sampled
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_device_map_auto(backbone: str, variant: str, tmp_path: Path) -> None:
    model = build(backbone, variant).eval()
    model.save_pretrained(tmp_path)
    loaded = CLASSES[backbone].from_pretrained(tmp_path, device_map="auto")
    inputs = inputs_of(backbone)
    torch.testing.assert_close(
        real_logits(backbone, loaded(**inputs).logits), real_logits(backbone, model(**inputs).logits)
    )


@pytest.mark.parametrize("variant", ["softmax", "shared", "mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_blocks_are_never_split_over_devices(backbone: str, variant: str) -> None:
    """However little fits on the first devices."""
    model = build(backbone, variant)
    blocks = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (ImgProcGPT2Block, ImgProcViTLayer, ImgProcViTEmbeddings))
    ]
    assert {type(model.get_submodule(name)).__name__ for name in blocks} <= set(model._no_split_modules)
    size = sum(value.numel() * 4 for value in model.parameters())
    splits = set()
    for part in range(2, 12):
        device_map = accelerate.infer_auto_device_map(
            model,
            max_memory={0: size * part // 14, 1: size * part // 14, "cpu": 10 * size},
            no_split_module_classes=model._no_split_modules,
        )
        splits.add(len(set(device_map.values())))
        for name in device_map:
            assert not any(name.startswith(f"{block}.") for block in blocks), name
    assert max(splits) > 1


@pytest.mark.both_back_ends
@pytest.mark.parametrize("variant", ["softmax", "shared", "mixed"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_offloaded_blocks_give_the_same(backbone: str, variant: str, tmp_path: Path) -> None:
    """Blocks on disk come back for each forward, scalars with them."""
    model = build(backbone, variant).eval()
    model.save_pretrained(tmp_path / "model")
    names = [name for name, module in model.named_modules() if isinstance(module, (ImgProcGPT2Block, ImgProcViTLayer))]
    base = model.base_model
    rest = [f"{model.base_model_prefix}.{name}" for name, _ in base.named_children()]
    rest += [name for name, _ in model.named_children() if name != model.base_model_prefix]
    device_map = {name: "cpu" for name in rest if not any(block.startswith(f"{name}.") for block in names)}
    device_map.update({names[0]: "disk", names[1]: "disk", names[2]: "cpu"})
    if backbone == "vit":
        device_map["vit.embeddings"] = "disk"
    loaded = CLASSES[backbone].from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert any(value.device.type == "meta" for value in loaded.parameters())
    inputs = inputs_of(backbone)
    with torch.no_grad():
        got, wanted = (real_logits(backbone, item(**inputs).logits) for item in (loaded, model))
    torch.testing.assert_close(got, wanted)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> list[dict[str, str]]:
    """What two processes of `fsdp_worker.py` report."""
    words = ["--full"] if pytestconfig.getoption("--full") else []
    folder = made_once(tmp_path_factory, "sharded", lambda place: run_sharded(place, words))
    return [json.loads((folder / f"report_{rank}.json").read_text()) for rank in range(2)]


def run_sharded(folder: Path, words: list[str]) -> None:
    """Start the two processes."""
    command = [prepared_python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = run_command(
        [*command, str(Path(__file__).with_name("fsdp_worker.py")), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-4000:]


@once
@pytest.mark.parametrize(
    ("backbone", "variant"),
    [pytest.param(*case, marks=pytest.mark.full if case in ONLY_FULL else ()) for case in SHARDED]
    + [("gpt2", "policy"), ("vit", "policy")],
)
def test_fully_sharded_models_give_the_same_gradients(
    backbone: str, variant: str, sharded: list[dict[str, str]]
) -> None:
    """FSDP2 over two processes, sharded by the classes that the model names; in bfloat16 the gradients are finite."""
    assert [report[f"{backbone} {variant}"] for report in sharded] == ["ok", "ok"]


@once
@pytest.mark.parametrize("preset", FILTERS)
def test_fully_sharded_models_of_another_type_give_the_same_gradients(
    preset: str, sharded: list[dict[str, str]]
) -> None:
    """With and without gradient checkpointing, as the others."""
    assert [report[f"llama {preset}"] for report in sharded] == ["ok", "ok"]


@once
@pytest.mark.parametrize("backbone", [*BACKBONES, "llama"])
def test_half_precision_weights_are_sharded_beside_numbers_in_float32(
    backbone: str, sharded: list[dict[str, str]]
) -> None:
    """FSDP2 wants one dtype a unit: the filters' numbers are units of their own. Gradients as in one process."""
    assert [report[f"{backbone} half"] for report in sharded] == ["ok", "ok"]


@once
def test_parts_that_each_process_saves_are_loaded_whole(sharded: list[dict[str, str]]) -> None:
    """And what one process saves is loaded in parts."""
    assert [report["saved in parts"] for report in sharded] == ["ok", "ok"]


@once
def test_sharding_does_not_round_positions(sharded: list[dict[str, str]]) -> None:
    assert [report["gpt2 far"] for report in sharded] == ["ok", "ok"]
