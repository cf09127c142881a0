"""What is known of transformers' model families, as plain data: which can be prompted and how, and who is refused.

To add a promptable family, add a row to `FAMILIES` and a case to ``tests/test_encoders.py``. A row says which class of
module is a layer and which norm it applies ahead of its attention; projections are found by their names
(`PROJECTIONS`), as is the attention that holds them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mopefuse.encoders import _numbers
from mopefuse.errors import EncoderError

PROJECTIONS = (("key", "value"), ("k_proj", "v_proj"), ("k_lin", "v_lin"))  # names that transformers uses
QUERY = {"key": "query", "k_proj": "q_proj", "k_lin": "q_lin"}


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        model: class in transformers.
        layer: class name of its layers, in order of execution among ``modules()``.
        norm: attribute of a layer, applied ahead of attention; None in post-norm layers.
        pool: the family's own summary, one of `pools`.
        prefix: tokens ahead of the patches.
        optional_pooler: the model's constructor takes ``add_pooling_layer``.
        statistics: of images, a key of `_hf_images.STATISTICS`, used with random weights only.
    """

    modality: str
    model: str
    layer: str
    norm: str | None = None
    pool: str = "cls"
    pools: tuple[str, ...] = ("cls", "mean", "pooler")
    prefix: int = 0
    optional_pooler: bool = True
    statistics: str = "half"

    @property
    def insertable(self) -> bool:
        """Whether tokens can go ahead of the first layer: of texts read in both directions, with one mask for all layers."""
        return self.model in ("BertModel", "RobertaModel", "XLMRobertaModel", "DistilBertModel", "ElectraModel")


FAMILIES: dict[str, Family] = {
    "bert": Family("text", "BertModel", "BertLayer"),
    "roberta": Family("text", "RobertaModel", "RobertaLayer"),
    "xlm-roberta": Family("text", "XLMRobertaModel", "XLMRobertaLayer"),
    "distilbert": Family("text", "DistilBertModel", "TransformerBlock", None, "cls", ("cls", "mean"), 0, False),
    "electra": Family("text", "ElectraModel", "ElectraLayer", None, "cls", ("cls", "mean"), 0, False),
    "clip_text_model": Family(
        "text", "CLIPTextModel", "CLIPEncoderLayer", "layer_norm1", "eot", ("eot", "mean"), 0, False
    ),
    "vit": Family("image", "ViTModel", "ViTLayer", "layernorm_before", prefix=1),
    "deit": Family("image", "DeiTModel", "DeiTLayer", "layernorm_before", prefix=2, statistics="imagenet"),
    "swin": Family(
        "image", "SwinModel", "SwinLayer", "layernorm_before", "pooler", ("pooler", "mean"), 0, False, "imagenet"
    ),
    "clip_vision_model": Family(
        "image", "CLIPVisionModel", "CLIPEncoderLayer", "layer_norm1", "pooler", ("pooler", "cls", "mean"), 1, False, "clip"
    ),
}
UNKNOWN = {  # families that have no row above: never prompted
    "text": Family("text", "AutoModel", "", pools=("cls", "mean"), optional_pooler=False),
    "image": Family("image", "AutoModel", "", pool="pooler", pools=("pooler", "cls", "mean"), optional_pooler=False),
}


@dataclass(frozen=True)
class BuiltIn:
    """The configuration of a well-known repository, for random weights without a network."""

    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    pool: str = ""


BUILT_IN: dict[str, BuiltIn] = {
    "google-bert/bert-base-uncased": BuiltIn("bert"),
    "google-bert/bert-large-uncased": BuiltIn(
        "bert", {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    ),
    "FacebookAI/roberta-base": BuiltIn(
        "roberta",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "distilbert/distilbert-base-uncased": BuiltIn("distilbert"),
    "sentence-transformers/all-MiniLM-L6-v2": BuiltIn(
        "bert",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
        pool="mean",
    ),
    "google/vit-base-patch16-224-in21k": BuiltIn("vit"),
    "facebook/deit-base-patch16-224": BuiltIn("deit"),
    "microsoft/swin-base-patch4-window7-224": BuiltIn(
        "swin", {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]}
    ),
    "openai/clip-vit-base-patch32#text": BuiltIn("clip_text_model"),
    "openai/clip-vit-base-patch32#vision": BuiltIn("clip_vision_model"),
}


def refuse_unsuitable(config: Mapping[str, Any], causal_only: Collection[str], where: str) -> None:
    """Refuse, from ``config.json`` alone, what brings code of its own or is no encoder.

    Args:
        causal_only: model types that generate text left to right and have no masked-language form.

    Raises:
        EncoderError: naming what it is.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise EncoderError(
            _numbers.BAD_CONFIG, "config.json names no model_type", where=where, fix="use a transformers model"
        )
    if config.get("auto_map"):
        raise EncoderError(
            _numbers.REMOTE_CODE,
            f"config.json asks to run code of its own (auto_map: {', '.join(map(str, config['auto_map']))})",
            where=where,
            fix="use a model that is part of transformers",
        )
    if config.get("is_encoder_decoder"):
        what = f"a {kind} model is an encoder with a decoder"
    elif config.get("is_decoder") or kind in causal_only:
        what = f"a {kind} model is a decoder: it reads left to right and has no pooled feature"
    else:
        return
    raise EncoderError(
        _numbers.UNSUITABLE, what, where=where, fix=f"use an encoder, for example {', '.join(sorted(FAMILIES))}"
    )


def attention_of(layer: nn.Module) -> tuple[Any, str, str]:
    """The module below `layer` that projects keys and values, and the names of the two projections."""
    for module in layer.modules():
        for key, value in PROJECTIONS:
            if hasattr(module, key) and hasattr(module, value):
                return module, key, value
    raise AssertionError(f"{type(layer).__name__} has no key and value projections")
