"""The table of backbones: every name exists, agrees with what travels, and no other file has a list of its own."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

import hf_imgproc_attn
from hf_imgproc_attn import backbones
from hf_imgproc_attn.backbone_row import Attention, Backbone, check_row
from hf_imgproc_attn.backbones import BACKBONES, OF_MODEL_TYPE
from hf_imgproc_attn.shipped_files import shipped_file

PACKAGE = Path(backbones.__file__).parent
ROWS = pytest.mark.parametrize("row", BACKBONES.values(), ids=BACKBONES)


@ROWS
def test_a_row_and_the_code_that_travels_say_the_same(row: Backbone) -> None:
    config = row.our_class(row.config)
    assert config.model_type == row.model_type
    assert issubclass(config, row.stock_class(row.stock_config))
    assert config.needs_positions == row.needs_positions
    wanted = {head.auto_class: f"modeling_{row.model_type}.{head.variant}" for head in row.heads}
    wanted["AutoConfig"] = f"configuration_{row.model_type}.{row.config}"
    assert row.our_class(row.heads[0].variant).auto_map == wanted
    for head in row.heads:
        ours, stock = row.our_class(head.variant), row.stock_class(head.stock or "PreTrainedModel")
        assert issubclass(ours, stock)
        assert ours.config_class is config
        assert ours._auto_class == head.auto_class, "it could not be saved with its code"
        assert getattr(transformers, head.auto_class)._model_mapping[config] is ours
    for name in (row.config, *(head.variant for head in row.heads)):
        assert name in hf_imgproc_attn.__all__


@ROWS
def test_tasks_have_a_script_a_recipe_and_a_model_to_teach(row: Backbone) -> None:
    for task in row.tasks:
        script = shipped_file(f"training/{task.script}.py")
        assert f'begin_run("{task.name}"' in script.read_text(encoding="utf-8")
        assert task.recipe is None or (script.parent / "configs" / task.recipe[1]).is_file()
        assert row.head(task.auto_class).variant


@pytest.mark.parametrize(
    ("field", "value", "missing"),
    [
        ("config", "ImgProcGPT2Configuration", "ImgProcGPT2Configuration"),
        ("stock_config", "GPT2Configuration", "GPT2Configuration"),
        ("tokenizer", "GPT2Tokeniser", "GPT2Tokeniser"),
        ("heads", {"variant": "ImgProcGPT2ForPoetry"}, "ImgProcGPT2ForPoetry"),
        ("heads", {"stock": "GPT2ForPoetry"}, "GPT2ForPoetry"),
        ("name", "gpt3", "configuration_imgproc_gpt3.py"),
    ],
)
def test_a_row_with_a_class_that_does_not_exist_is_refused(field: str, value: object, missing: str) -> None:
    row = BACKBONES["gpt2"]
    if isinstance(value, dict):
        value = (dataclasses.replace(row.heads[0], **value), *row.heads[1:])
    with pytest.raises(ValueError, match=re.escape(missing)):
        check_row(dataclasses.replace(row, **{field: value}))


def test_importing_the_table_checks_it() -> None:
    source = Path(backbones.__file__).read_text(encoding="utf-8").replace('"GPT2LMHeadModel"', '"GPT2PoetryModel"')
    place = {"__package__": "hf_imgproc_attn", "__file__": backbones.__file__}
    namespace = {"__name__": "hf_imgproc_attn.backbones", **place}
    with pytest.raises(ValueError, match="'gpt2' names the class GPT2PoetryModel, which modeling_gpt2.py does not"):
        exec(compile(source, backbones.__file__, "exec"), namespace)


def test_the_norm_of_a_layer_that_reads_the_layer_before() -> None:
    places = Attention("f.{}", "layer.{before}.norm", "q.{}", "k.{}", first_norm="embeddings.norm")
    assert [places.norm_of(layer) for layer in (0, 1, 2)] == ["embeddings.norm", "layer.0.norm", "layer.1.norm"]
    assert Attention("f.{}", "h.{}.ln", "q.{}", "k.{}").norm_of(0) == "h.0.ln"


def _constants(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The strings of a file, without those that stand alone as its documentation."""
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.lineno, node.value


def test_no_other_file_knows_the_model_types() -> None:
    names = {*BACKBONES, *OF_MODEL_TYPE}
    own = {f"{kind}_{model_type}.py" for kind in ("configuration", "modeling") for model_type in OF_MODEL_TYPE}
    files = [path for folder in (PACKAGE, shipped_file("training/demo.py").parent) for path in folder.rglob("*.py")]
    found = []
    for path in sorted({path for path in files if path.name not in {*own, "backbones.py"}}):
        source = path.read_text(encoding="utf-8")
        if not any(name in source for name in BACKBONES):
            continue
        for line, text in _constants(ast.parse(source)):
            if text in names or any(f"imgproc_{name}" in text for name in BACKBONES):
                found.append(f"{path.name}:{line}: {text!r}")
    assert not found, "a list of backbones of its own"


def _statements(path: Path, *, signatures: bool = True) -> list[str]:
    """The lines of a file that are code, without their indentation; blank lines and documentation are left out."""
    source = path.read_text(encoding="utf-8")
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            left_out |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef) and not signatures:
            left_out |= set(range(node.lineno, node.body[0].lineno))
    lines = enumerate(source.splitlines(), start=1)
    return [line.strip() for number, line in lines if line.strip() and number not in left_out]


def test_no_six_lines_stand_twice_in_the_modelling_files() -> None:
    places: dict[tuple[str, ...], set[str]] = {}
    for path in sorted((PACKAGE / "models").glob("modeling_*.py")):
        # Arguments and their order are those of the stock function.
        code = _statements(path, signatures=False)
        lines = [line for line in code if not line.startswith(("import ", "from ", "#"))]
        for start in range(len(lines) - 5):
            places.setdefault(tuple(lines[start : start + 6]), set()).add(f"{path.name}:{start}")
    assert not {lines: found for lines, found in places.items() if len(found) > 1}


def test_the_modelling_code_of_the_third_backbone_is_short() -> None:
    """What a new backbone costs: a modelling file of 120 lines of code at most, and a row."""
    assert 50 < len(_statements(PACKAGE / "models" / "modeling_imgproc_bert.py")) <= 120
