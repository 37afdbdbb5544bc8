"""The Triton kernels without a GPU: in Triton's interpreter, and compiled for a GPU that is not there.

Both in processes of their own, which report in JSON: whether Triton interprets is decided when it is first imported.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.gradient_cases import REFUSED, VALUES
from tests.helpers import ROOT, RunPython, run_command

# The workers run once, for all tests of this file.
pytestmark = pytest.mark.xdist_group("triton")

SHARED_MEMORY = 227 * 1024
"""What a block of threads can have on compute capability 9.0, in bytes."""


def run_worker(name: str, folder: Path, *arguments: str, **environment: str) -> Any:
    result = run_command(
        [sys.executable, str(Path(__file__).with_name(name)), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder), **environment},
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def every_case(config: pytest.Config) -> tuple[str, ...]:
    """The workers run few of the composed cases but under ``--full``."""
    return ("--full",) if config.getoption("--full") else ()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Any:
    folder = tmp_path_factory.mktemp("triton")
    return run_worker("interpreter_worker.py", folder, *every_case(pytestconfig), TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def without_gpu(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Any:
    folder = tmp_path_factory.mktemp("triton")
    return run_worker("compile_worker.py", folder, *every_case(pytestconfig), TRITON_INTERPRET="0")


def test_outputs_and_gradients_are_those_of_the_formula(found: Any) -> None:
    """Against float64: odd lengths, widths 16 to 128, causal or not, hidden keys, rows that see nothing, shared keys.

    With position kernels, also the gradients of their parameters, and of bandwidths so narrow that padded queries,
    which do not see themselves, would drown them in noise if their distances were not taken from the nearest key.
    """
    cases = [case for case in found["cases"] if case["dtype"] == "float32"]
    assert {case["algorithm"] for case in cases} == {"general", "short", "single_pass", "wavefront"}
    assert {case["positions"].partition(" ")[0] for case in cases} == {"", "gaussian", "alibi", "relative_buckets"}
    for case in cases:
        assert len(case["errors"]) == 4 + bool(case["positions"]) + ("patches" in case["positions"])
    assert not [case for case in cases if max(case["errors"][:5]) > 5e-6]
    # Of three scalars, which sums over all queries or keys leave small.
    assert not [case for case in cases if max(case["errors"][5:], default=0.0) > 5e-5]


def test_half_precision_is_no_worse_than_two_calls_of_attention(found: Any) -> None:
    """At most twice two calls, and five times plain attention: |2I - A| is up to 3, and two passes round.

    Positions leave that so, and their parameters' gradients keep to the queries' bound.
    """
    cases = [case for case in found["cases"] if case["dtype"] != "float32"]
    assert {case["dtype"] for case in cases} == {"bfloat16", "float16"}
    for case in cases:
        for mine, twice, once in zip(case["errors"], case["sdpa_2_errors"], case["sdpa_1_errors"], strict=False):
            assert mine <= 2.0 * twice, case
            assert mine <= 5.0 * once, case
        assert max(case["errors"][4:], default=0.0) <= 5.0 * case["sdpa_1_errors"][1], case


def test_joining_heads_copies_nothing(found: Any) -> None:
    assert all(case["strides_follow"] for case in found["cases"])


@pytest.mark.parametrize("algorithm", ["general", "single_pass", "wavefront"])
def test_causal_outputs_do_not_see_later_tokens(found: Any, algorithm: str) -> None:
    earlier, later = found["causality"][algorithm]
    assert earlier == 0.0
    assert later > 1e-3


def test_any_backward_can_follow_any_forward(found: Any) -> None:
    assert found["saved_tensors"].keys() == {"single_pass", "short", "wavefront"}
    assert max(found["saved_tensors"].values()) < 1e-5


def test_programs_of_the_wavefront_wait_for_one_another(found: Any) -> None:
    """In threads, few and all at once, the first one late, over rows of NaN: as one after another, but for rounding.

    The same programs, told that everything is finished, read the NaN: it is the waiting that makes the result right.
    """
    schedules = found["schedules"]
    assert schedules["programs"] == [8] * 4
    assert schedules["differences"].keys() == {"1", "8"}
    assert max(schedules["differences"].values()) < 2e-6
    assert schedules["without_waiting"] == "inf"


def test_decoding_is_that_of_all_tokens_at_once(found: Any) -> None:
    """Output and the streams' new rows, against float64: one token or several, chunks, groups, masks over NaN, places.

    Streams in half precision were rounded once when they were cached, and once more here.
    """
    for dtype, *errors in found["decoding"]["errors"].values():
        assert max(errors) < {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1.5e-3}[dtype]
    assert len(found["decoding"]["calls"]) == 3 + 4
    assert max(found["decoding"]["calls"]) < 2e-6
    *errors, times = found["decoding"]["model"]
    assert max(errors) < 2e-6
    assert times == 2
    assert set(found["decoding"]["operator"].values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gradient", "decoding has no gradient: no tensor may require one"),
        ("bandwidth", "decoding has no gradient: no tensor may require one"),
        ("booster", "boosting must be one of none, twicing, learned, diffusion, sos, got 'exclusive'"),
        ("steps", "steps must be <= 4, got 5"),
        ("streams", "2 streams of the cached tokens must fit each other, got (1, 4, 1, 16), (1, 2, 9, 16)"),
        ("dtype", "must have one dtype, got torch.float32, torch.float32, torch.float32, torch.float16"),
        ("shape", "1 streams of the cached tokens must fit each other"),
        ("tokens", "new tokens must be at most 16"),
        ("width", "widths at most 256, got (1, 1, 1, 264)"),
    ],
)
def test_decoding_refuses_by_name(found: Any, name: str, message: str) -> None:
    assert message in found["decoding"]["refused"][name]


def test_kernel_of_the_hub_computes_the_same(found: Any) -> None:
    """Beside the package, in one process: twicing with its gradients, then a token and its row of the stream."""
    assert found["hub_kernel"]["differences"] == [0.0] * 6
    assert found["hub_kernel"]["operator"].startswith("_imgproc_attention_cuda_")


def test_operators_pass_the_checks_of_torch_library(found: Any) -> None:
    checks = found["operator_checks"]
    assert {"test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"} <= set(checks)
    assert set(checks.values()) == {"SUCCESS"}


def test_compiles_in_one_graph_for_all_lengths(found: Any) -> None:
    assert max(found["compiled"]["differences"]) < 1e-6
    assert found["compiled"]["graphs"] <= 2


def test_queries_without_keys_give_zero(found: Any) -> None:
    assert found["edges"]["hidden"] == [0.0, 0.0]
    assert found["edges"]["empty"] == [0, 2, 5, 16]


def test_algorithm_is_chosen_by_shape(found: Any) -> None:
    assert found["edges"]["chosen"] == ["short", "general", "general"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "fewer heads of key and value, got (2, 2, 19, 16), (2, 2, 18, 16)"),
        ("heads", "heads of query must be a multiple of those of key, got 3, 2"),
        ("dtype", "must be all float16, bfloat16 or float32, got torch.float64"),
        ("width", "head_dim must be <= 128, got 136"),
        ("mask", "key_mask must be boolean [batch, length] = (2, 19), got torch.float32"),
        ("algorithm", "algorithm must be one of auto, general, short, single_pass, wavefront, got 'fast'"),
        ("short", "needs is_causal=False, length <= 256 and head_dim <= 64, got is_causal=True"),
        ("single_pass", "needs is_causal=True, got is_causal=False"),
        ("wavefront", "algorithm='wavefront' needs is_causal=True, got is_causal=False"),
        ("key_bias", "key_bias must be float32 [batch, heads, length] = (2, 2, 19), got torch.float32 (2, 1, 19)"),
        ("places", "positions.coordinates must have shape [2 or 1, 19, axes], got (1, 18, 2)"),
        ("unboosted", "algorithm='short' needs boosting='twicing', got boosting='none'"),
        ("boosting", "boosting must be 'twicing' or 'none', got 'sos'"),
        ("forward mode", "the kernel has derivatives in backward mode alone, and serves neither forward mode nor"),
        ("transform", "nor the transforms of torch.func; choose another back-end, such as 'blocked', for them"),
        ("twice", "the Triton kernels have first derivatives alone: for derivatives of derivatives choose another"),
    ],
)
def test_misuse_is_refused_by_name(found: Any, name: str, message: str) -> None:
    assert message in found["edges"]["refused"][name]


def test_requests_of_the_dispatch_table(found: Any) -> None:
    assert len(found["dispatch"]["served"]) == 4
    assert max(found["dispatch"]["served"]) < 5e-6


def test_gaussian_contents_are_served_with_their_gradients(found: Any) -> None:
    """Output, queries, keys, values and bandwidths; then those of positions and class tokens."""
    beside_positions, alone = found["dispatch"]["contents"]
    assert (len(beside_positions), len(alone)) == (7, 5)
    assert max(beside_positions[:6] + alone) < 5e-6
    assert beside_positions[6] < 5e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mask", "takes masks of padded keys, the same for all heads, only, got one of pairs of tokens"),
        ("float mask", "takes masks of padded keys, the same for all heads, only, got numbers to be added"),
        ("mask of heads", "takes masks of padded keys, the same for all heads, only, got one of 2 heads"),
        (
            "bias",
            "takes positions as feature columns, or one term by place (gaussian, alibi, relative_buckets), got Bias",
        ),
        ("dtype", "needs float16 or bfloat16, got torch.float64"),
        ("width", "needs widths <= 256, columns included, got 264 of queries, 264 of values"),
        ("columns", "needs widths <= 256, columns included, got 272 of queries, 16 of values"),
        ("tangent of query", "has derivatives in backward mode alone, and serves neither forward mode nor"),
        ("tangent of sinks", "has derivatives in backward mode alone, and serves neither forward mode nor"),
    ],
)
def test_reasons_for_refusing(found: Any, name: str, reason: str) -> None:
    assert reason in found["dispatch"]["reasons"][name]


def test_composed_boosters_are_exact(found: Any) -> None:
    """Against float64, over pairs of widths, groups, masks, positions, causality, fewer queries, dropout and boosters.

    Outputs, the gradients of queries, keys, values, gains, positions, sinks and gates, and the streams that a cache is
    given; other normalisations than softmax in company of all of them.
    """
    cases = [case for case in found["composed"]["cases"] if case["dtype"] == "float32"]
    rivals = {word for case in cases for word in case["rival"].split()}
    assert rivals == {"sink", "forget", "sinkhorn", "sigmoid", "softpick"}
    assert {case["booster"].partition(" ")[0] for case in cases} >= {"none", "twicing", "learned", "sos", "diffusion"}
    assert not [case for case in cases if max(case["errors"][:4]) > 5e-6]
    # Of few numbers, which sums over all pairs leave small.
    assert not [case for case in cases if max(case["errors"][4:], default=0.0) > 2e-5]


def test_composed_boosters_round_as_the_steps_of_sdpa_do(found: Any) -> None:
    cases = [case for case in found["composed"]["cases"] if case["dtype"] != "float32"]
    assert {case["dtype"] for case in cases} == {"bfloat16", "float16"}
    for case in cases:
        for mine, theirs in zip(case["errors"], case["sdpa_errors"], strict=True):
            assert mine <= 2.0 * theirs + 1e-4, case


def test_the_filter_applied_once_is_a_good_operator(found: Any) -> None:
    assert set(found["composed"]["operator_checks"].values()) == {"SUCCESS"}


def test_whole_models_train_and_decode_on_the_kernels(found: Any) -> None:
    """GPT-2 with columns, kernels by place, three steps, gains: gradients; a padded prompt in chunks by a cache."""
    models = found["models"]
    assert len(models["trained"]) > 15
    assert max(models["trained"]) < 2e-5
    assert max(models["decoded"]) < 2e-6


@pytest.mark.parametrize("name", [name for name in VALUES if name not in REFUSED["triton"]])
def test_each_value_of_the_axes_has_exact_gradients(found: Any, name: str) -> None:
    """One layer, in single precision: what tests/test_gradients.py holds against finite differences elsewhere."""
    errors = found["models"]["layers"][name]
    assert len(errors) >= 5
    assert max(errors) < 5e-6


@pytest.mark.parametrize("name", ["sink", "forget", "sigmoid", "softpick", "elliptical", "sinkhorn"])
def test_whole_models_of_rivals_train_on_the_kernels(found: Any, name: str) -> None:
    """With gates, a value residual and boosters of one pass on top; padded texts; logits and all gradients."""
    errors = found["models"]["rivals"][name]
    assert len(errors) > 10
    assert max(errors) < 2e-5


@pytest.mark.parametrize("name", ["sink", "forget", "sigmoid", "softpick"])
def test_whole_models_of_rivals_decode_on_the_kernels(found: Any, name: str) -> None:
    assert max(found["models"]["steps"][name]) < 2e-6


def test_gates_that_add_up_keep_their_digits(found: Any) -> None:
    """In float32, whatever the products round to; bfloat16 tells 512 from 514."""
    errors = found["composed"]["forgetting"]
    assert errors["float32"] < 5e-5
    assert errors["bfloat16"] < 1e-2


def test_checkpointed_layers_drop_the_same_weights_again(found: Any) -> None:
    assert found["models"]["dropped"]["checkpointed"] < 1e-6
    assert found["models"]["dropped"]["another seed"] > 0.1


def test_sinks_may_be_infinite_or_the_largest_numbers(found: Any) -> None:
    """-inf is no sink at all, also in the first block of rows, which sees no key; with the largest nothing is left."""
    assert len(found["composed"]["extreme_sinks"]) == 5
    assert max(found["composed"]["extreme_sinks"]) < 5e-6


def test_the_filter_applied_once_compiles_in_one_graph_for_all_lengths(found: Any) -> None:
    assert max(found["composed"]["compiled"]["differences"]) < 1e-6
    assert found["composed"]["compiled"]["graphs"] <= 2


def test_lengths_say_what_a_mask_says(found: Any) -> None:
    assert found["composed"]["lengths"] == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("axes", "must have 4 axes"),
        ("shape", "key must have the query's batch and width, x the key's batch and length"),
        ("length", "x the key's batch and length"),
        ("heads", "both a divisor of the query's heads, got (2, 2, 5, 16), (2, 3, 7, 16)"),
        ("width", "widths must be <= 256"),
        ("dtype", "must be all float16, bfloat16 or float32, got torch.float32, torch.float32, torch.float16"),
        (
            "mask",
            "key_mask must be boolean [batch, key_length] = (2, 7) or int32 [batch] = (2,), got torch.bool (2, 5)",
        ),
        ("bias", "key_bias must be float32 [batch, heads, key_length] = (2, 2, 7), got torch.float32 (2, 1, 7)"),
        ("query bias", "query_bias must stand beside a key_bias, got None"),
        ("sinks", "sinks must be float32 [heads] = (2,), got torch.float32 (2, 1)"),
        ("normalisation", "normalisation must be one of softmax, sigmoid, softpick, got 'sinkhorn'"),
        ("sinks of sigmoid", "normalisation must be softmax beside sinks, got 'sigmoid'"),
        ("dropout", "dropout must be in [0, 1), got 1.0"),
        ("seed", "seed must be int64 of shape (1,) where dropout > 0, got None"),
        ("forward mode", "the kernel has derivatives in backward mode alone, and serves neither forward mode nor"),
        ("twice", "the Triton kernels have first derivatives alone: for derivatives of derivatives choose another"),
    ],
)
def test_misuse_of_the_filter_applied_once_is_refused(found: Any, name: str, message: str) -> None:
    assert message in found["composed"]["refused"][name]


def test_kernels_compile_for_a_gpu_that_is_not_there(without_gpu: Any) -> None:
    """Every kernel, with its largest blocks: on the fast instructions, and within a device's shared memory.

    The sixteen rows of decoding are too few for a group of warps.
    """
    binaries = without_gpu["binaries"]
    assert len({binary["kernel"] for binary in binaries if binary["products"]}) == 15
    for binary in binaries:
        assert binary["bytes"] > 0
        instructions = "warp_products" if binary["case"] == "decoding" else "warp_group_products"
        assert binary[instructions] >= binary["products"], binary
        assert binary["shared_memory"] <= SHARED_MEMORY, binary


def test_compiled_programs_of_the_wavefront_read_after_they_have_waited(without_gpu: Any) -> None:
    """The number of finished blocks is read with an acquire and written with a release, by the whole GPU's order."""
    found = {binary["kernel"]: binary for binary in without_gpu["binaries"] if "wavefront" in binary["kernel"]}
    assert found.keys() == {"wavefront_forward_kernel", "wavefront_backward_kernel"}
    for binary in found.values():
        assert (binary["acquires"], binary["releases"]) == (2, 1)


def test_without_triton_the_package_imports_and_says_so(run_python: RunPython) -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "sys.modules['triton'] = None\n"
        "import torch\n"
        "from hf_imgproc_attn.gpu import supports\n"
        "from hf_imgproc_attn.models.backend_table import BACKENDS\n"
        "q = torch.zeros(1, 1, 2, 16)\n"
        "print(list(BACKENDS), supports(q, q, q))\n"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    hint = 'needs the package triton: pip install ".[kernels]" in a checkout of this package'
    assert result.stdout == f"['reference', 'sdpa', 'blocked', 'chunked', 'flex'] {hint}\n"


def test_without_a_gpu_calls_are_refused_in_words(without_gpu: Any) -> None:
    assert without_gpu["refused"] == [
        "needs tensors on a CUDA device, got cpu",
        "False",
        "the Triton kernels need tensors on a GPU, got cpu",
    ]
