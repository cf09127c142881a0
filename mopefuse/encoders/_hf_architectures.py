"""Facts about transformers' model families: modality, pooling, statistics, and checks of a configuration.

Promptable layers are not listed here but found by `probe`. A family needs an entry only if the defaults do not fit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from mopefuse.core.error_codes import EncoderCode
from mopefuse.errors import EncoderError


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        modality: modality of its input.
        pool: the family's default pooling, one of `pools`: ``cls`` is the first token, ``last`` the last token of a text,
            ``cls+mean`` the first token and the mean side by side.
            ``pooler`` is also available if the model's constructor has an option for it.
        filled: whether texts are padded to the fixed length of pretraining, and padding is attended to.
        supports_inserted_tokens: whether tokens can be inserted before the first layer, which needs bidirectional attention
            with the same mask in all layers.
        statistics: statistics of images, a key of `_hf_images.STATISTICS`, used with random weights only.
        model: class in transformers if `AutoModel` does not know the family.
        part: attribute of the model that is the encoder if it also has a decoder.
        max_tokens: default limit of a text's length, unless its folder declares one; 0 for all positions.
    """

    modality: str
    pool: str
    pools: tuple[str, ...]
    filled: bool = False
    supports_inserted_tokens: bool = False
    statistics: str = "half"
    model: str = ""
    part: str = ""
    max_tokens: int = 0


_TEXTS = ("cls", "mean", "cls+mean", "last")
_IMAGES = ("pooler", "cls", "mean", "cls+mean")
TEXT, IMAGE = Family("text", "cls", _TEXTS), Family("image", "pooler", _IMAGES)
DECODER = Family("text", "last", ("last", "mean"), max_tokens=512)  # its first token sees no other
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "distilbert", "electra"),
        Family("text", "cls", _TEXTS, supports_inserted_tokens=True),
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
"""Model types of the towers of two-tower models, by the part of a spec that names the tower."""


@dataclass(frozen=True)
class BuiltIn:
    """Configuration of a well-known repository, for random weights without a network."""

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


def check_config(config: Mapping[str, Any], parted: Collection[str], where: str) -> None:
    """Check by ``config.json`` alone that a model needs no code of its repository and is not an encoder-decoder.

    Args:
        parted: model types whose encoder can be used without the decoder.

    Raises:
        EncoderError: the model is unsuitable, with the reason.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise EncoderError(
            EncoderCode.BAD_CONFIG, "config.json has no model_type", where=where, fix="use a transformers model"
        )
    if config.get("auto_map"):
        raise EncoderError(
            EncoderCode.REMOTE_CODE,
            f"config.json requires code of the repository (auto_map: {', '.join(map(str, config['auto_map']))})",
            where=where,
            fix="use a model that is part of transformers",
        )
    if (config.get("is_encoder_decoder") and kind not in parted) or config.get("is_decoder"):
        what = f"a {kind} model is an encoder with a decoder" if config.get("is_encoder_decoder") else (
            f"this {kind} model is configured as the decoder of another model"
        )
        raise EncoderError(
            EncoderCode.UNSUITABLE, what, where=where, fix="use an encoder or a language model, for example hf:bert-base"
        )
