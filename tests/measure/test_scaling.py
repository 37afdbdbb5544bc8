"""The formulas of docs/scaling.md against bytes and operations that are counted, and the page against them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode

from hf_imgproc_attn import ImgProcGPT2Config, ImgProcGPT2LMHeadModel, filter_attention
from hf_imgproc_attn.context_parallel import context_parallel
from hf_imgproc_attn.measure import scaling
from tests.helpers import ROOT

DEVICES = 4


def model(preset: str) -> ImgProcGPT2LMHeadModel:
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    return ImgProcGPT2LMHeadModel(ImgProcGPT2Config.from_preset(preset, **size, bos_token_id=0, eos_token_id=0))


def state_bytes(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients and moments that this process holds."""
    total = 0
    for parameter in network.parameters():
        held = [parameter, parameter.grad, *(v for v in optimizer.state[parameter].values() if v.ndim)]
        total += sum((x.to_local() if hasattr(x, "to_local") else x).nbytes for x in held)
    return total


def step(network: torch.nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(network.parameters(), foreach=False)
    ids = torch.arange(16)[None] % 32
    network(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def four_devices() -> Iterator[Any]:
    """One process of four that answer by themselves: sizes are real, numbers are not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=DEVICES)
    yield init_device_mesh("cpu", (DEVICES,))
    dist.destroy_process_group()
    gc.collect()


@pytest.mark.parametrize("preset", ["softmax", "bilateral_twicing"])
def test_state_of_a_copy(preset: str) -> None:
    network = model(preset)
    assert state_bytes(network, step(network)) == scaling.ddp_state_bytes(network.num_parameters())


@pytest.mark.parametrize("preset", ["softmax", "twicing"])
def test_state_and_traffic_of_shards(preset: str, four_devices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter of this model has a first axis that four devices share without a rest."""
    network = model(preset)
    total = network.num_parameters()
    moved: list[int] = []

    def counted(function: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:  # the larger one of two tensors is the whole
            moved.append(max(x.nbytes for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)))
            return function(*args, **kwargs)

        return run

    # Newer versions of torch have new names, which the old ones call.
    for names in (("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")):
        name = next(name for name in names if hasattr(dist, name))
        monkeypatch.setattr(dist, name, counted(getattr(dist, name)))
    for block in network.transformer.h:
        fully_shard(block, mesh=four_devices)
    fully_shard(network, mesh=four_devices, reshard_after_forward=True)
    optimizer = step(network)
    assert state_bytes(network, optimizer) == scaling.fsdp_state_bytes(total, DEVICES)
    assert sum(moved) * (DEVICES - 1) / DEVICES == scaling.fsdp_sent_bytes(total, DEVICES)


@pytest.mark.parametrize(("boosting", "passes"), [("none", 1), ("twicing", 2)])
def test_operations_of_attention(boosting: str, passes: int) -> None:
    """As torch's counter counts them, without a causal mask."""
    query, key, value = (torch.randn(1, 2, 32, 8) for _ in range(3))
    with FlopCounterMode(display=False) as counter:
        filter_attention(query, key, value, boosting=boosting, backend="blocked")
    assert counter.get_total_flops() == scaling.attention_products(32, 16, passes, causal=False)


@pytest.mark.parametrize(
    ("preset", "fields", "rows"),
    [
        *((preset, {}, scaling.gathered_rows(preset)) for preset in scaling.PRESETS),
        ("twicing", {"boosting_steps": 3}, 4),
    ],
)
def test_traffic_of_shared_tokens(
    preset: str, fields: dict[str, Any], rows: int, four_devices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one of four processes gathers, and sums backward, in a layer of two heads of 8 features, in float32."""
    moved: dict[str, list[int]] = {"all_gather": [], "reduce_scatter": []}

    def count(name: str, parts_are: int) -> None:
        function = getattr(dist, name)

        def counted(*args: Any, **options: Any) -> Any:
            parts = args[parts_are]
            if parts[0].shape[-1] > 1:  # rows of features; not the places of tokens, or which of them are padding
                moved[name].append(sum(part.nbytes for part in parts) if parts[0].ndim == 4 else 0)
            return function(*args, **options)

        monkeypatch.setattr(dist, name, counted)

    count("all_gather", 0)
    count("reduce_scatter", 1)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 32, "n_positions": 16, "attn_pdrop": 0.0}
    config = ImgProcGPT2Config.from_preset(preset, **size, **fields, bos_token_id=0, eos_token_id=0)
    network = ImgProcGPT2LMHeadModel(config)
    with context_parallel(network):
        network(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()
    received = scaling.context_received_bytes(16, 16, rows, DEVICES, bytes_each=4)
    for sizes in moved.values():
        assert sum(sizes) * (DEVICES - 1) / DEVICES == received


def test_the_page_shows_the_tables() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for table in scaling.tables().strip().split("\n\n"):
        assert table in page
    assert {preset: scaling.passes(preset) for preset in ("softmax", "twicing")} == {"softmax": 1, "twicing": 2}
