"""A class that a user derives elsewhere: what is saved loads in a process without the package, or says that it cannot.

The user's program runs in a process of its own, where its classes are in ``__main__`` as in a notebook.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTPreTrainedModel
from tests.helpers import RunPython, prepared_python, run_command

START = """
import json, logging, sys
import torch
from transformers.utils import logging as transformers_logging
transformers_logging.set_verbosity_warning()
from hf_imgproc_attn import ImgProcViTConfig, ImgProcViTForImageClassification
from hf_imgproc_attn.models.modeling_imgproc_vit import ImgProcViTPreTrainedModel
torch.manual_seed(0)
SIZE = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=8, intermediate_size=8, image_size=8, patch_size=4)
"""
FINISH = """
model.eval().save_pretrained(folder)
assert type(model) is Mine
with torch.no_grad():
    logits = model(pixel_values=torch.ones(1, 3, 8, 8)).logits
again = Mine.from_pretrained(folder)
assert type(again) is Mine
print(json.dumps(logits.tolist()))
"""
LOSS = """
class Mine(ImgProcViTForImageClassification):
    def forward(self, pixel_values=None, labels=None, **options):
        out = super().forward(pixel_values, **options)
        if labels is not None:
            out.loss = torch.nn.functional.cross_entropy(out.logits, labels, weight=torch.ones(2))
        return out
"""
CONFIG = """
class MyConfig(ImgProcViTConfig):
    pass
class Mine(ImgProcViTForImageClassification):
    config_class = MyConfig
"""
MODULE = """
import torch
from hf_imgproc_attn import ImgProcViTForImageClassification
class Mine(ImgProcViTForImageClassification):
    pass
"""
HEAD = """
class Mine(ImgProcViTPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.vit = torch.nn.Linear(2, 2)
        self.post_init()
"""
ELSEWHERE = """
import json, sys
sys.modules["hf_imgproc_attn"] = None  # every import of it fails
import torch, transformers
model = transformers.AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    print(json.dumps([type(model).__name__, model(pixel_values=torch.ones(1, 3, 8, 8)).logits.tolist()]))
"""


def saved_by(run_python: RunPython, program: str, folder: Path) -> tuple[dict[str, Any], str, str]:
    """The configuration that the program saved, what it printed and what it was told."""
    done = run_python("-c", START + program, str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "config.json").read_text(encoding="utf-8")), done.stdout, done.stderr


def files_named(config: dict[str, Any]) -> set[str]:
    return {f"{reference.rpartition('.')[0]}.py" for reference in config["auto_map"].values()}


def elsewhere(folder: Path, home: Path) -> Any:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = run_command(
        [prepared_python(), "-I", "-c", ELSEWHERE, str(folder)],
        env={**environment, "HF_HOME": str(home)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("definition", "config_class", "module"),
    [(LOSS, "ImgProcViTConfig", "__main__"), (CONFIG, "MyConfig", "__main__"), (MODULE, "ImgProcViTConfig", "mine")],
    ids=["loss in a notebook", "configuration in a notebook", "module"],
)
def test_a_class_that_cannot_travel_is_saved_as_what_it_derives_from(
    run_python: RunPython, tmp_path: Path, definition: str, config_class: str, module: str
) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    program = definition
    if module != "__main__":
        (tmp_path / f"{module}.py").write_text(definition, encoding="utf-8")
        program = f"sys.path.insert(0, {str(tmp_path)!r})\nfrom {module} import Mine\n"
    build = f"model = Mine({config_class}.from_preset('bilateral', **SIZE))\nfolder = sys.argv[1]\n"
    config, printed, told = saved_by(run_python, program + build + FINISH, folder)
    assert files_named(config) <= {path.name for path in folder.iterdir()}
    assert not (folder / "mine.py").exists()
    assert config["architectures"] == ["ImgProcViTForImageClassification"]
    assert config["auto_map"].keys() == ImgProcViTPreTrainedModel.auto_map.keys()
    message = f"Mine is defined in {module}, which does not travel with the checkpoint: an Auto class loads "
    assert message + "ImgProcViTForImageClassification, without what it changes" in told
    name, logits = elsewhere(folder, tmp_path / "home")
    assert name == "ImgProcViTForImageClassification"
    assert logits[0] == pytest.approx(json.loads(printed)[0], abs=1e-6)


def test_a_class_that_its_module_registers_travels_as_it_is(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    registered = MODULE + 'Mine.register_for_auto_class("AutoModelForImageClassification")\n'
    (tmp_path / "mine.py").write_text(registered, encoding="utf-8")
    program = f"sys.path.insert(0, {str(tmp_path)!r})\nfrom mine import Mine\nfolder = sys.argv[1]\n"
    program += "model = Mine(ImgProcViTConfig.from_preset('twicing', **SIZE))\n" + FINISH
    config, _, told = saved_by(run_python, program, folder)
    assert config["auto_map"] == {
        "AutoConfig": "configuration_imgproc_vit.ImgProcViTConfig",
        "AutoModelForImageClassification": "mine.Mine",
    }
    assert files_named(config) <= {path.name for path in folder.iterdir()}
    assert "does not travel" not in told


def test_a_head_of_the_users_own_names_no_file_that_is_not_there(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    program = HEAD + "Mine(ImgProcViTConfig.from_preset('twicing', **SIZE)).save_pretrained(sys.argv[1])\n"
    config, _, told = saved_by(run_python, program, folder)
    assert config["auto_map"] == {"AutoConfig": "configuration_imgproc_vit.ImgProcViTConfig"}
    assert files_named(config) <= {path.name for path in folder.iterdir()}
    assert "Mine is defined in __main__, which does not travel with the checkpoint: no Auto class loads it" in told


def test_classes_of_the_package_say_nothing(run_python: RunPython, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    folder.mkdir()
    program = "ImgProcViTForImageClassification(ImgProcViTConfig(**SIZE)).save_pretrained(sys.argv[1])\n"
    config, _, told = saved_by(run_python, program, folder)
    assert config["auto_map"].keys() == ImgProcViTPreTrainedModel.auto_map.keys()
    assert "does not travel" not in told


SHARDED = """
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
model = ImgProcViTForImageClassification(ImgProcViTConfig.from_preset("bilateral", **SIZE))
state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
model.save_pretrained(sys.argv[1], state_dict=state)
assert type(model).__name__ == "FSDPImgProcViTForImageClassification"
dist.destroy_process_group()
"""


def test_a_class_that_sharding_derives_is_saved_as_ours(run_python: RunPython, tmp_path: Path) -> None:
    """FSDP2 derives a class in a module of torch's, whose files would be saved with the checkpoint."""
    folder = tmp_path / "saved"
    folder.mkdir()
    config, _, told = saved_by(run_python, SHARDED, folder)
    names = {path.name for path in folder.iterdir()}
    assert files_named(config) <= names
    assert not {name for name in names if "fsdp" in name}
    assert "does not travel" not in told
    assert elsewhere(folder, tmp_path / "home")[0] == "ImgProcViTForImageClassification"
