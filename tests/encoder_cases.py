"""Small random encoders of every family, each with the unmodified library model that it must match."""

from __future__ import annotations

import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from timm.models.eva import Eva
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from mopefuse.encoders.base import Encoder, Inputs, create_encoder
from mopefuse.errors import EncoderError, MopefuseError

WORDS = "a an and both brown cats dog dogs fox friend jumps keep lazy no of on over photo quick sleeping the then two".split()
TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 64}
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, **SPECIAL, "max_position_embeddings": 40}
HF: dict[str, dict[str, Any]] = {
    "bert": TEXT,
    "roberta": {**TEXT, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "xlm-roberta": {**TEXT, "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "distilbert": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64},
    "electra": {**TEXT, "embedding_size": 16},
    "albert": {**TEXT, "embedding_size": 16},
    "modernbert": {
        **TEXT, **SPECIAL, "cls_token_id": 1, "sep_token_id": 2, "max_position_embeddings": 40, "local_attention": 6,
        "global_attn_every_n_layers": 2,
    },
    "clip_text_model": {**TEXT, **SPECIAL, "eos_token_id": 3, "max_position_embeddings": 40},
    "siglip_text_model": {**TEXT, **SPECIAL, "max_position_embeddings": 20, "projection_size": 32},
    "llama": {**DECODER, "num_key_value_heads": 2},
    "mistral": {**DECODER, "num_key_value_heads": 2, "sliding_window": 4},
    "qwen2": {**DECODER, "num_key_value_heads": 2},
    "qwen3": {**DECODER, "num_key_value_heads": 1, "head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40, "vocab_size": 64, **SPECIAL},
    "vit": IMAGE,
    "deit": IMAGE,
    "swin": {
        "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 3, "image_size": 32, "patch_size": 4
    },
    "clip_vision_model": IMAGE,
    "siglip_vision_model": IMAGE,
    "beit": {**IMAGE, "use_relative_position_bias": True},
    "dinov2": IMAGE,
    "dinov2_with_registers": {**IMAGE, "num_register_tokens": 3},
    "dinov3_vit": {**IMAGE, "num_register_tokens": 2},
}  # fmt: skip
LAST = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
POOLER = (
    "swin", "clip_text_model", "clip_vision_model", "siglip_text_model", "siglip_vision_model", "beit", "dinov2",
    "dinov2_with_registers", "dinov3_vit",
)  # fmt: skip
TEXTS = [name for name, config in HF.items() if "vocab_size" in config]
SMALL = "depth=2&embed_dim=48&num_heads=3&pretrained=false"
TIMM = {
    "vit": "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=3&pretrained=false",
    "vit-qk-norm": "vit_tiny_patch16_224?img_size=32&patch_size=8&depth=2&qk_norm=true&embed_dim=48&pretrained=false",
    "deit-distilled": "deit_tiny_distilled_patch16_224?img_size=32,48&depth=2&pretrained=false",
    "swin-padded": "swin_tiny_patch4_window7_224?img_size=56&window_size=4&depths=2,2&num_heads=2,4&embed_dim=16"
    "&pretrained=false",
    "dinov2": f"vit_small_patch14_reg4_dinov2?img_size=28,42&init_values=0.5&{SMALL}",
    "vit-post-norm": f"vit_base_patch16_rpn_224?img_size=32,48&init_values=0.5&{SMALL}",
    "beit": f"beit_base_patch16_224?img_size=32&patch_size=8&{SMALL}",
    "beit-shared": f"beit_base_patch16_224?img_size=32,48&use_shared_rel_pos_bias=true&{SMALL}",
    "eva02": f"eva02_tiny_patch14_224?img_size=28,42&{SMALL}",
    "eva02-apart": f"eva02_base_patch14_224?img_size=42&scale_attn_inner=true&{SMALL}",
    "eva02-post-norm": f"eva02_enormous_patch14_clip_224?img_size=42&mlp_ratio=2&{SMALL}",
    "dinov3": f"vit_small_patch16_dinov3?img_size=32,48&init_values=0.5&{SMALL}",
    "rope-mixed": f"vit_small_patch16_rope_mixed_224?img_size=32&patch_size=8&init_values=0.5&{SMALL}",
    "rope-grouped": "vit_pe_core_tiny_patch16_384?img_size=48&depth=2&embed_dim=64&num_heads=4&qkv_fused=false"
    "&num_kv_heads=2&qk_norm=true&pretrained=false",
    "swinv2": "swinv2_tiny_window8_256?img_size=64&window_size=4&depths=2,2&num_heads=2,4&embed_dim=16&pretrained=false",
    "swinv2-padded": "swinv2_tiny_window8_256?img_size=56&window_size=4&depths=2,2&num_heads=2,4&embed_dim=16"
    "&pretrained=false",
}
MISSING_TIMM: set[str] = set()  # what the installed timm cannot build
if "num_kv_heads" not in inspect.signature(Eva).parameters:  # as in timm 1.0.20
    MISSING_TIMM = {"rope-grouped", "eva02-post-norm", "swinv2-padded"}
    TIMM = {name: spec for name, spec in TIMM.items() if name not in MISSING_TIMM}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "patch_size": 8, "head_width": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 24, "heads": 3, "layers": 3},
}
SIGLIP = {
    "embed_dim": 32,
    "vision_cfg": {
        "image_size": 32, "timm_model_name": "vit_mopefuse_siglip", "timm_model_pretrained": False, "timm_pool": "map",
        "timm_proj": "none",
    },
    "text_cfg": {
        "context_length": 20, "vocab_size": 64, "width": 24, "heads": 3, "layers": 3, "hf_tokenizer_name": "org/siglip",
        "tokenizer_kwargs": {"clean": "canonicalize"}, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
    },
}  # fmt: skip
TOWERS = {"": OPEN_CLIP, "siglip-": SIGLIP}


@timm.models.register_model
def vit_mopefuse_siglip(pretrained: bool = False, **options: Any) -> nn.Module:
    """A small version of timm's SigLIP tower; open_clip builds it by name, without options."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    named = {key: options[key] for key in ("num_classes", "global_pool")}
    return timm.create_model("vit_base_patch16_siglip_224", pretrained=False, **size, **named)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A spec, an unmodified model for an encoder of it, and that model's own pooled feature and tokens."""

    spec: str
    plain: Callable[[Encoder], nn.Module]
    call: Callable[[Any, Inputs], tuple[Tensor, Tensor]]


def sharpen(model: nn.Module, seed: int = 0) -> None:
    """Enlarge the weights of a new model, so that attention is not uniform and differences show."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                width = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=random) * min(0.5, 1.5 * width**-0.5))
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=random))


def save_tokenizer(folder: Path) -> None:
    """Save a word-level tokenizer with [PAD] 0, [CLS] 1, [SEP] 2, end of text 3, [UNK] 4."""
    clip = json.loads((folder / "config.json").read_text())["model_type"] in ("clip", "clip_text_model")
    names = ["[PAD]", "[CLS]", "[SEP]", "<end>", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    end = "<end>" if clip else "[SEP]"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {end}", special_tokens=[("[CLS]", 1), (end, names.index(end))]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token=end
    ).save_pretrained(folder)


def save_hf(kind: str, folder: Path) -> None:
    """Save a folder as `save_pretrained` does: weights, configuration, tokenizer or image processor."""
    config = {**HF, **REFUSED}[kind]
    values = transformers.AutoConfig.for_model(kind, **config)
    model = transformers.SiglipTextModel(values) if kind == "siglip_text_model" else transformers.AutoModel.from_config(values)
    sharpen(model)
    model.save_pretrained(folder)
    if "vocab_size" in config:
        save_tokenizer(folder)
    else:
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)


def hf_case(folder: Path, options: str = "") -> Case:
    kind = json.loads((folder / "config.json").read_text())["model_type"]

    def call(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if kind in TEXTS:
            seen = None if kind == "siglip_text_model" else inputs["mask"].long()
            out = model(input_ids=inputs["ids"], attention_mask=seen)
        else:
            out = model(pixel_values=inputs["pixels"])
        if kind in LAST:
            last = inputs["mask"].sum(dim=1) - 1
            return out.last_hidden_state[torch.arange(len(last)), last], out.last_hidden_state
        return out.pooler_output if kind in POOLER else out.last_hidden_state[:, 0], out.last_hidden_state

    auto = transformers.SiglipTextModel if kind == "siglip_text_model" else transformers.AutoModel
    return Case(f"hf:{folder}{options}", lambda encoder: auto.from_pretrained(folder).eval(), call)


def timm_case(name: str) -> Case:
    spec = f"timm:{TIMM[name]}"

    def plain(encoder: Encoder) -> nn.Module:
        options = {
            key: json.loads(f"[{value}]" if "," in value else value)
            for key, value in encoder.spec.options.items()
            if key not in ("pretrained", "pool")
        }
        model = timm.create_model(encoder.spec.name, pretrained=False, num_classes=0, **options)
        model.load_state_dict(encoder.backbone.state_dict())  # type: ignore[union-attr, operator]
        return model.eval()

    def call(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        features = model.forward_features(inputs["pixels"])
        return model.forward_head(features, pre_logits=True), features.flatten(1, -2)

    return Case(spec, plain, call)


def open_clip_case(tower: str, kind: str = "") -> Case:
    def plain(encoder: Encoder) -> nn.Module:
        model = getattr(open_clip.CustomTextCLIP(**json.loads(json.dumps(TOWERS[kind]))), tower)
        model.load_state_dict(encoder.backbone.state_dict())  # type: ignore[union-attr, operator]
        model.output_tokens = True
        return model.eval()

    def call(model: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
        if hasattr(model, "trunk"):  # which gives its pooled feature alone
            tokens: list[Tensor] = []
            hook = model.trunk.norm.register_forward_hook(lambda module, args, out: tokens.append(out))
            pooled = model(inputs["pixels"])
            hook.remove()
            return pooled, tokens[0]
        pooled, last = model(inputs["ids" if tower == "text" else "pixels"])
        return pooled, last

    return Case(f"open_clip:mopefuse-{kind}tiny#{tower}?pretrained=false", plain, call)


def add_open_clip_models(folder: Path) -> None:
    """Register the small models with open_clip."""
    for kind, config in TOWERS.items():
        file = folder / f"mopefuse-{kind}tiny.json"
        file.write_text(json.dumps(config))
        open_clip.add_model_config(file)


REFUSED: dict[str, dict[str, Any]] = {
    "mpnet": {**TEXT, **SPECIAL, "max_position_embeddings": 40},
    "deberta-v2": {**TEXT, "max_position_embeddings": 40},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "swinv2": {"embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "image_size": 32, "patch_size": 4},
}
"""Families of transformers that cannot be prompted."""


def every_spec(root: Path) -> dict[str, str]:
    """Return a spec of every family, by name; models of transformers are saved below `root`."""
    for kind in (*HF, *REFUSED):
        save_hf(kind, root / kind)
    add_open_clip_models(root)
    return {
        **{f"hf: {kind}": f"hf:{root / kind}" for kind in (*HF, *REFUSED)},
        **{f"timm: {name}": f"timm:{spec}" for name, spec in TIMM.items()},
        "timm: resnet": "timm:resnet18?pretrained=false",
        **{
            f"open_clip: {kind}{tower} tower": open_clip_case(tower, kind).spec
            for kind in TOWERS
            for tower in ("visual", "text")
        },
        "open_clip: ResNet": "open_clip:RN50#visual?pretrained=false&force_image_size=64",
        "tiny: vision": "tiny:vision",
        "tiny: text": "tiny:text",
    }


def fault(spec: str, kind: type[MopefuseError] = EncoderError) -> MopefuseError:
    started = time.monotonic()
    with pytest.raises(kind) as caught:
        create_encoder(spec)
    assert time.monotonic() - started < 4
    assert caught.value.fix, "an error states the fix"
    return caught.value


def code(number: int) -> str:
    return f"MF-ENC-{number}"


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
