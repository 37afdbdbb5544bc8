"""The backbones: one row each, and everything that differs between them outside their modelling files.

Registration, conversion, cards, publishing, the command line, training, benchmark and the GPU check read this table;
none of them has a list of model types of its own. What travels with a checkpoint (``models/``) cannot read it: a
modelling file holds what its checkpoints need, and a test compares the two.

Importing this file is cheap: classes are names here and are imported when they are asked for. That every name exists
is checked all the same, in the text of the files that should define it, when the table is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .backbone_row import Attention, Backbone, Head, Task, check_row

GPT2 = Backbone(
    name="gpt2",
    title="GPT-2",
    card_title="A language model of the GPT-2 architecture",
    config="ImgProcGPT2Config",
    stock_config="GPT2Config",
    heads=(
        Head(
            "AutoModelForSequenceClassification",
            "ImgProcGPT2ForSequenceClassification",
            "GPT2ForSequenceClassification",
            (r"^score\.weight$",),
            "predictions",
        ),
        Head(
            "AutoModelForTokenClassification",
            "ImgProcGPT2ForTokenClassification",
            "GPT2ForTokenClassification",
            (r"^classifier\.weight$",),
            "predictions",
        ),
        # The head is the token table, which is stored once; the body has a prefix of its own.
        Head(
            "AutoModelForCausalLM",
            "ImgProcGPT2LMHeadModel",
            "GPT2LMHeadModel",
            (r"^transformer\.|^lm_head\.weight$",),
            "cross_entropy",
        ),
        Head("AutoModel", "ImgProcGPT2Model", "GPT2Model"),
    ),
    refused={"GPT2DoubleHeadsModel": (r"^multiple_choice_head\.",)},
    input="text",
    processor_files=("tokenizer_config.json", "tokenizer.json"),
    tokenizer="GPT2Tokenizer",
    attention=Attention(
        filter="h.{}.attn.filter", norm="h.{}.ln_1", query="h.{}.attn.c_attn.weight", key="h.{}.attn.c_attn.weight"
    ),
    tasks=(
        Task(
            name="causal-lm",
            pipeline="text-generation",
            command="train-lm",
            script="train_causal_lm",
            help="a causal language model",
            auto_class="AutoModelForCausalLM",
            metric="word_perplexity",
            disturbances=("word swap",),
            rows="lines",
            recipe=("gpt2_pydoc", "pydoc_gpt2.yaml"),
        ),
        Task(
            name="recall",
            pipeline="text-generation",
            command="train-recall",
            script="train_recall",
            help="a model that recalls from its context (MQAR, noisy recall, selective copying)",
            auto_class="AutoModelForCausalLM",
            metric="accuracy",
            disturbances=(),
            rows="sequences",
            recipe=None,
        ),
    ),
    new_model={"n_embd": 128, "n_layer": 4, "n_head": 4, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    no_dropout=dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
)

VIT = Backbone(
    name="vit",
    title="ViT",
    card_title="A Vision Transformer",
    config="ImgProcViTConfig",
    stock_config="ViTConfig",
    heads=(
        Head(
            "AutoModelForImageClassification",
            "ImgProcViTForImageClassification",
            "ViTForImageClassification",
            (r"^classifier\.weight$",),
            "predictions",
        ),
        Head(
            "AutoModelForMaskedImageModeling",
            "ImgProcViTForMaskedImageModeling",
            "ViTForMaskedImageModeling",
            (r"^decoder\.0\.weight$",),
        ),
        Head(
            "AutoModelForSemanticSegmentation",
            "ImgProcViTForSemanticSegmentation",
            None,
            (r"^decode_head\.",),
            "predictions",
        ),
        Head("AutoModel", "ImgProcViTModel", "ViTModel", has_parts=True),
        Head("AutoBackbone", "ImgProcViTBackbone", None),
    ),
    input="images",
    processor_files=("preprocessor_config.json", "processor_config.json"),
    attention=Attention(
        filter="layers.{}.attention.filter",
        norm="layers.{}.layernorm_before",
        query="layers.{}.attention.q_proj.weight",
        key="layers.{}.attention.k_proj.weight",
    ),
    tasks=(
        Task(
            name="image-classification",
            pipeline="image-classification",
            command="train-image",
            script="train_image_classification",
            help="an image classifier",
            auto_class="AutoModelForImageClassification",
            metric="accuracy",
            disturbances=("noise", "attack", "corruption"),
            rows="images",
            recipe=("vit_digits", "digits_vit.yaml"),
        ),
        Task(
            name="semantic-segmentation",
            pipeline="image-segmentation",
            command="train-segmentation",
            script="train_semantic_segmentation",
            help="a model that gives every pixel a class",
            auto_class="AutoModelForSemanticSegmentation",
            metric="mean_iou",
            disturbances=("noise", "attack"),
            rows="images",
            recipe=None,
        ),
    ),
    new_model={"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256},
    no_dropout=dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    # The checkpoints of DINO have no pooler; a configuration does not say so.
    optional_parts={"add_pooling_layer": "pooler.", "use_mask_token": "mask_token"},
)

BERT = Backbone(
    name="bert",
    title="BERT",
    card_title="A text encoder of the BERT architecture",
    config="ImgProcBertConfig",
    stock_config="BertConfig",
    heads=(
        Head(
            "AutoModelForMaskedLM",
            "ImgProcBertForMaskedLM",
            "BertForMaskedLM",
            (r"^cls\.predictions\.transform\.",),
            "predictions",
        ),
        Head(
            "AutoModelForSequenceClassification",
            "ImgProcBertForSequenceClassification",
            "BertForSequenceClassification",
            (r"^classifier\.weight$", r"^bert\.pooler\."),
            "predictions",
        ),
        Head(
            "AutoModelForTokenClassification",
            "ImgProcBertForTokenClassification",
            "BertForTokenClassification",
            (r"^classifier\.weight$",),
            "predictions",
        ),
        Head("AutoModel", "ImgProcBertModel", "BertModel", has_parts=True),
    ),
    refused={
        "BertForPreTraining": (r"^cls\.seq_relationship\.", r"^cls\.predictions\."),
        "BertForNextSentencePrediction": (r"^cls\.seq_relationship\.",),
        "BertForQuestionAnswering": (r"^qa_outputs\.",),
    },
    input="text",
    processor_files=("tokenizer_config.json", "tokenizer.json"),
    tokenizer="BertTokenizer",
    attention=Attention(
        filter="encoder.layer.{}.attention.self.filter",
        norm="encoder.layer.{before}.output.LayerNorm",
        first_norm="embeddings.LayerNorm",
        query="encoder.layer.{}.attention.self.query.weight",
        key="encoder.layer.{}.attention.self.key.weight",
    ),
    tasks=(
        Task(
            name="text-classification",
            pipeline="text-classification",
            command="train-text-classification",
            script="train_text_classification",
            help="a text classifier",
            auto_class="AutoModelForSequenceClassification",
            metric="accuracy",
            disturbances=("word swap",),
            rows="texts",
            recipe=("bert_topics", "topics_bert.yaml"),
        ),
        Task(
            name="sequence-classification",
            pipeline="text-classification",
            command="train-sequences",
            script="train_sequence_classification",
            help="a classifier of long sequences (ListOps, pixels) or of pairs of texts",
            auto_class="AutoModelForSequenceClassification",
            metric="accuracy",
            disturbances=(),
            rows="sequences",
            recipe=None,
        ),
    ),
    new_model={
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    no_dropout=dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    needs_positions=True,
    in_gpu_check=False,
    optional_parts={"add_pooling_layer": "pooler."},
)

BACKBONES: dict[str, Backbone] = {row.name: row for row in (GPT2, VIT, BERT)}
"""Name of the stock model type -> row."""

OF_MODEL_TYPE: dict[str, Backbone] = {row.model_type: row for row in BACKBONES.values()}
"""Our model type -> row."""

FILTERED_MODEL_TYPE = "imgproc_filtered"
"""The type of filtered models of any other type, whose configuration says which."""

SAVED_MODEL_TYPES = (*OF_MODEL_TYPE, FILTERED_MODEL_TYPE)
"""Every model type that a checkpoint of this package may have."""

TASKS: dict[str, Task] = {task.name: task for row in BACKBONES.values() for task in row.tasks}
"""Name in ``run.json`` -> task."""

OF_TASK: dict[str, Backbone] = {task.name: row for row in BACKBONES.values() for task in row.tasks}
"""Name of a task -> the backbone that it is taught to."""


def in_words(joint: str = "and", rows: Iterable[Backbone] = BACKBONES.values()) -> str:
    """Backbones as people write them: ``"GPT-2, ViT and BERT"``."""
    *others, last = [row.title for row in rows]
    return f"{', '.join(others)} {joint} {last}" if others else last


def of_config(config: Any) -> Backbone:
    """The row of a configuration, stock or ours.

    Raises:
        ValueError: for a model type that is no row's.
    """
    model_type = str(getattr(config, "model_type", None))
    row = BACKBONES.get(model_type.removeprefix("imgproc_"))
    if row is None:
        known = ", ".join([*BACKBONES, *OF_MODEL_TYPE])
        raise ValueError(f"model_type must be one of {known}, got {model_type!r}")
    return row


for _row in BACKBONES.values():
    check_row(_row)
