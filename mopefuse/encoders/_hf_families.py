"""What is known of transformers' model families, as plain data: how each sums its input up, and who is refused.

Where a model can be prompted is not written here: `_probe` finds it. A family needs a row only where the defaults do not fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mopefuse.core import error_numbers as _numbers
from mopefuse.errors import EncoderError


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        modality: what it reads.
        pool: the family's own summary, one of `pools`; ``cls`` is the first token, ``last`` the last one of a text. ``pooler``
            is possible as well where a model's constructor asks whether to have one.
        filled: texts are padded to the one length that the model was trained with, and padding is attended to.
        insertable: tokens can go ahead of the first layer: of texts read in both directions, with one mask for all layers.
        statistics: of images, a key of `_hf_images.STATISTICS`, used with random weights only.
        model: its class in transformers, where `AutoModel` does not know it.
        part: attribute of the model that is the encoder, where it has a decoder as well.
    """

    modality: str
    pool: str
    pools: tuple[str, ...]
    filled: bool = False
    insertable: bool = False
    statistics: str = "half"
    model: str = ""
    part: str = ""


_TEXTS = ("cls", "mean", "last")
_IMAGES = ("pooler", "cls", "mean")
TEXT, DECODER, IMAGE = Family("text", "cls", _TEXTS), Family("text", "last", _TEXTS), Family("image", "pooler", _IMAGES)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "distilbert", "electra"), Family("text", "cls", _TEXTS, insertable=True)
    ),
    "clip_text_model": Family("text", "eot", ("eot", "mean")),
    "siglip_text_model": Family("text", "pooler", ("pooler", "mean"), filled=True, model="SiglipTextModel"),
    "vit": Family("image", "cls", _IMAGES),
    "deit": Family("image", "cls", _IMAGES, statistics="imagenet"),
    "swin": Family("image", "pooler", _IMAGES, statistics="imagenet"),
    "dinov2": Family("image", "pooler", _IMAGES, statistics="imagenet"),
    "clip_vision_model": Family("image", "pooler", _IMAGES, statistics="clip"),
    "siglip_vision_model": Family("image", "pooler", _IMAGES),
}
TOWERS: dict[str, dict[str, str]] = {
    "clip": {"text": "clip_text_model", "vision": "clip_vision_model"},
    "siglip": {"text": "siglip_text_model", "vision": "siglip_vision_model"},
}
"""Models of two towers, and the model type of each, by the part of a spec that names it."""


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


def refuse_unsuitable(config: Mapping[str, Any], parted: Collection[str], where: str) -> None:
    """Refuse, from ``config.json`` alone, what brings code of its own or is an encoder with a decoder.

    Args:
        parted: model types whose encoder can be had without the decoder.

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
    if (config.get("is_encoder_decoder") and kind not in parted) or config.get("is_decoder"):
        what = f"a {kind} model is an encoder with a decoder" if config.get("is_encoder_decoder") else (
            f"this {kind} model is set up as the decoder of another"
        )
        raise EncoderError(
            _numbers.UNSUITABLE, what, where=where, fix="use an encoder or a language model, for example hf:bert-base"
        )
