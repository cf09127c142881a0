"""The size and pixels that an image encoder gets: those that its image processor declares, or those set with ``?size=``.

`HUB` has the fields of ``config.json`` that matter here and the whole of ``preprocessor_config.json`` of popular
repositories; widths and depths are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pytest
import timm
import torch
import transformers
from conftest import call, make_pairs
from encoder_cases import add_open_clip_models, edit_config, fault
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_model_data_config

from mopefuse.core.error_codes import EncoderCode
from mopefuse.encoders.base import create_encoder
from mopefuse.errors import EncoderError
from mopefuse.testing import check_encoder

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [2, 2, 2, 2], "patch_size": 4}


def statistics(values: tuple[tuple[float, ...], tuple[float, ...]]) -> dict[str, Any]:
    return {"image_mean": list(values[0]), "image_std": list(values[1])}


class Hub(NamedTuple):
    """A repository: its model type, configuration and image processor, and the expected preprocessing."""

    kind: str
    config: dict[str, Any]
    processor: dict[str, Any]
    size: int
    resize: int | tuple[int, int]
    statistics: tuple[tuple[float, ...], tuple[float, ...]]
    interpolation: str
    tokens: int


HUB = {
    "facebook/dinov2-small": Hub(
        "dinov2",
        {**VIT, "image_size": 518, "patch_size": 14},
        {
            "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
            "do_rescale": True, "do_resize": True, **statistics(IMAGENET), "image_processor_type": "BitImageProcessor",
            "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
        },
        224, 256, IMAGENET, "bicubic", 257,
    ),
    "facebook/dinov2-with-registers-small": Hub(
        "dinov2_with_registers",
        {**VIT, "image_size": 518, "patch_size": 14, "num_register_tokens": 4},
        {
            "crop_size": {"height": 224, "width": 224}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
            "do_rescale": True, "do_resize": True, **statistics(IMAGENET), "image_processor_type": "BitImageProcessor",
            "resample": 3, "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 256},
        },
        224, 256, IMAGENET, "bicubic", 261,
    ),
    "facebook/dinov3-vits16-pretrain-lvd1689m": Hub(
        "dinov3_vit",
        {**VIT, "image_size": 224, "patch_size": 16, "num_register_tokens": 4},
        {
            "crop_size": None, "data_format": "channels_first", "default_to_square": True, "do_center_crop": None,
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, **statistics(IMAGENET),
            "image_processor_type": "DINOv3ViTImageProcessorFast", "resample": 2, "rescale_factor": 0.00392156862745098,
            "size": {"height": 224, "width": 224},
        },
        224, (224, 224), IMAGENET, "bilinear", 201,
    ),
    "google/siglip2-base-patch16-224": Hub(
        "siglip_vision_model",
        {**VIT, "image_size": 224, "patch_size": 16},
        {
            "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, **statistics(HALF),
            "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 2,
            "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
        },
        224, (224, 224), HALF, "bilinear", 196,
    ),
    "openai/clip-vit-base-patch32": Hub(
        "clip_vision_model",
        {**VIT, "image_size": 224, "patch_size": 32},
        {
            "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor", **statistics(CLIP), "resample": 3, "size": 224,
        },
        224, 224, CLIP, "bicubic", 50,
    ),
    "google/vit-base-patch16-224": Hub(
        "vit",
        {**VIT, "image_size": 224, "patch_size": 16},
        {
            "do_normalize": True, "do_resize": True, **statistics(HALF), "size": 224,
        },
        224, (224, 224), HALF, "bilinear", 197,
    ),
    "google/vit-base-patch16-224-in21k": Hub(
        "vit",
        {**VIT, "image_size": 224, "patch_size": 16},
        {
            "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", **statistics(HALF),
            "resample": 2, "size": 224,
        },
        224, (224, 224), HALF, "bilinear", 197,
    ),
    "microsoft/beit-base-patch16-224": Hub(
        "beit",
        {**VIT, "image_size": 224, "patch_size": 16, "use_relative_position_bias": True},
        {
            "crop_size": 224, "do_center_crop": False, "do_normalize": True, "do_resize": True,
            "feature_extractor_type": "BeitFeatureExtractor", **statistics(HALF), "resample": 2, "size": 224,
        },
        224, (224, 224), HALF, "bilinear", 197,
    ),
    "microsoft/swinv2-tiny-patch4-window8-256": Hub(
        "swinv2",
        {**SWIN, "image_size": 256, "window_size": 8},
        {
            "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor", **statistics(IMAGENET),
            "resample": 3, "size": 256,
        },
        256, (256, 256), IMAGENET, "bicubic", 64,
    ),
    "facebook/convnext-tiny-224": Hub(
        "convnext",
        {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "image_size": 224},
        {
            "crop_pct": 0.875, "do_normalize": True, "do_resize": True, "feature_extractor_type": "ConvNextFeatureExtractor",
            **statistics(IMAGENET), "resample": 3, "size": 224,
        },
        224, 256, IMAGENET, "bicubic", 49,
    ),
}  # fmt: skip


def save(folder: Path, name: str) -> str:
    """Save the repository with a small model and return its spec."""
    hub = HUB[name]
    config = transformers.AutoConfig.for_model(hub.kind, **hub.config)
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(hub.processor))
    return f"hf:{folder}"


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture with edges, so that resizing has an effect."""
    x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 7, height))
    channels = [np.sin(x) * np.cos(y), np.sin(x + y), np.where(x > y, 0.8, -0.8)]
    return Image.fromarray(np.stack([127 + 120 * channel for channel in channels], axis=-1).astype(np.uint8))


def pixels_of(encoder: Any, image: Image.Image) -> torch.Tensor:
    found: torch.Tensor = encoder.preprocess.finish(encoder.preprocess.batch([encoder.preprocess.item(image)]))["pixels"]
    return found


@pytest.mark.parametrize("name", HUB)
def test_images_have_the_size_that_the_image_processor_declares(tmp_path: Path, name: str) -> None:
    hub, encoder = HUB[name], create_encoder(save(tmp_path, name))
    found = encoder.preprocess.describe()
    assert found["size"] == [hub.size, hub.size]
    assert found["resize"] == (hub.resize if isinstance(hub.resize, int) else list(hub.resize))
    assert (found["mean"], found["std"]) == (pytest.approx(hub.statistics[0]), pytest.approx(hub.statistics[1]))
    assert found["interpolation"] == hub.interpolation
    assert encoder.count_tokens() == hub.tokens


@pytest.mark.parametrize("name", HUB)
def test_pixels_match_the_librarys_image_processor(tmp_path: Path, name: str) -> None:
    encoder = create_encoder(save(tmp_path, name))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    step = 1 / 255 / min(HUB[name].statistics[1])  # one of 256 levels
    for image in (photo(400, 300), photo(300, 420), photo(224, 224), photo(90, 120)):
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        ours = pixels_of(encoder, image)
        assert ours.shape == theirs.shape
        difference = (ours - theirs).abs()
        assert difference.mean() < 0.5 * step, "on average less than half a level: libraries round differently"
        assert difference.quantile(0.999) < 4 * step


def test_positions_are_interpolated_as_by_the_library(tmp_path: Path) -> None:
    encoder = create_encoder(save(tmp_path, "facebook/dinov2-small"))
    model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    inputs = pixels_of(encoder, photo(300, 300))
    with torch.no_grad():
        expected = model(pixel_values=inputs)
    found = encoder.encode({"pixels": inputs})
    torch.testing.assert_close(found.tokens_BLD, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.pooled_BC, expected.pooler_output, atol=1e-5, rtol=0)


def test_if_processor_and_model_sizes_differ_the_processor_decides(tmp_path: Path) -> None:
    spec = save(tmp_path, "google/vit-base-patch16-224")
    changed = {**HUB["google/vit-base-patch16-224"].processor, "size": {"height": 96, "width": 96}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))
    encoder = create_encoder(spec)
    assert (encoder.preprocess.describe()["size"], encoder.count_tokens()) == ([96, 96], 37)


def test_a_model_that_cannot_take_the_declared_size_uses_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = save(tmp_path, "google/vit-base-patch16-224")
    changed = {**HUB["google/vit-base-patch16-224"].processor, "size": {"height": 96, "width": 96}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(changed))

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("only one size")

    embeddings = "transformers.models.vit.modeling_vit.ViTEmbeddings.interpolate_pos_encoding"
    monkeypatch.setattr(embeddings, refuse)
    encoder = create_encoder(spec)
    assert encoder.preprocess.describe()["size"] == [224, 224]
    assert encoder.preprocess.describe()["resize"] == [224, 224]
    error = fault(f"{spec}?size=112")
    assert "only one size" in error.what and error.fix == "remove size= from the spec"


SIZED = {
    "facebook/dinov2-small": ("56", 17, 64),
    "facebook/dinov3-vits16-pretrain-lvd1689m": ("48", 14, [48, 48]),
    "google/siglip2-base-patch16-224": ("48,64", 12, [48, 64]),
    "openai/clip-vit-base-patch32": ("96", 10, 96),
    "google/vit-base-patch16-224": ("64", 17, [64, 64]),
    "microsoft/beit-base-patch16-224": ("64", 17, [64, 64]),
    "microsoft/swinv2-tiny-patch4-window8-256": ("128", 16, [128, 128]),
    "facebook/convnext-tiny-224": ("64", 4, 73),
}


@pytest.mark.parametrize("name", SIZED)
def test_the_size_option_overrides_the_size_and_the_contract_holds(tmp_path: Path, name: str) -> None:
    size, tokens, resize = SIZED[name]
    spec = f"{save(tmp_path, name)}?size={size}"
    encoder = create_encoder(spec)
    sides = [int(side) for side in size.split(",")] * (1 if "," in size else 2)
    assert encoder.preprocess.describe()["size"] == sides
    assert encoder.preprocess.describe()["resize"] == resize
    assert encoder.count_tokens() == tokens
    assert bool(encoder.widths) == (HUB[name].kind not in ("swinv2", "convnext"))
    check_encoder(encoder)


TIMM = {
    "timm:vit_tiny_patch16_224?pretrained=false&depth=2": ("64", 17),
    "timm:vit_small_patch14_dinov2?pretrained=false&depth=1": ("70", 26),
    "timm:eva02_tiny_patch14_224?pretrained=false&depth=2": ("56", 17),
    "timm:eva02_tiny_patch14_224?pretrained=false&depth=1": ("56", 17),
    "timm:beit_base_patch16_224?pretrained=false&depth=1": ("64", 17),
    "timm:swin_tiny_patch4_window7_224?pretrained=false&depths=1,1,1,1": ("448", 112 * 112),
    "timm:resnet18?pretrained=false": ("64", 4),
}


@pytest.mark.matrix
@pytest.mark.parametrize("spec", TIMM)
def test_the_size_option_overrides_the_size_of_timm_models(spec: str) -> None:
    size, tokens = TIMM[spec]
    encoder = create_encoder(f"{spec}&size={size}")
    assert encoder.preprocess.describe()["size"] == [int(size)] * 2
    assert encoder.count_tokens() == tokens
    if "resnet" not in spec and "swin" not in spec:
        check_encoder(encoder)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224.mim_in22k", "vit_small_patch14_dinov2.lvd142m", "resnet18.a1_in1k"])
def test_pixels_match_timm_at_its_own_size_and_at_another(name: str) -> None:
    model = timm.create_model(name.partition(".")[0], pretrained=False)
    config = resolve_model_data_config(model)
    encoder = create_encoder(f"timm:{name.partition('.')[0]}?pretrained=false")
    image = photo(400, 300)
    theirs = create_transform(**config, is_training=False)(image)[None]
    ours = pixels_of(encoder, image)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-4


def test_positions_from_a_weights_file_are_interpolated_to_another_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    spec = f"timm:vit_tiny_patch16_224?depth=1&weights={tmp_path / 'vit.safetensors'}"
    encoder = create_encoder(f"{spec}&size=96")
    model.set_input_size(img_size=(96, 96))
    inputs = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode({"pixels": inputs}).pooled_BC, model.eval()(inputs))

    add_open_clip_models(tmp_path)
    tower = open_clip.CustomTextCLIP(**open_clip.get_model_config("mopefuse-tiny")).visual
    save_file({name: tensor.contiguous() for name, tensor in tower.state_dict().items()}, tmp_path / "clip.safetensors")
    spec = f"open_clip:mopefuse-tiny#visual?weights={tmp_path / 'clip.safetensors'}"
    encoder = create_encoder(f"{spec}&size=48")
    own = encoder.backbone.positional_embedding  # type: ignore[union-attr]
    assert len(own) == 37  # type: ignore[arg-type]
    torch.testing.assert_close(own[0], tower.positional_embedding[0])  # type: ignore[index]


def test_open_clip_at_another_size_satisfies_the_contract(tmp_path: Path) -> None:
    add_open_clip_models(tmp_path)
    encoder = create_encoder("open_clip:mopefuse-tiny#visual?pretrained=false&size=48")
    assert (encoder.preprocess.describe()["size"], encoder.count_tokens()) == ([48, 48], 37)
    check_encoder(encoder)


@pytest.mark.parametrize(
    ("spec", "message", "fix"),
    [
        ("hf:vit-base?pretrained=false&num_hidden_layers=1&size=100", "not a multiple of the patch size, 16", "use size=96"),
        ("hf:vit-base?pretrained=false&num_hidden_layers=1&size=big", "not a number of pixels", "write size=224"),
        ("timm:vit_tiny_patch16_224?pretrained=false&depth=1&size=100", "not a multiple of the patch size, 16", "use size=96"),
        ("timm:vit_tiny_patch16_224?pretrained=false&depth=1&size=0", "not a number of pixels", "write size=224"),
        ("open_clip:ViT-B-32#visual?pretrained=false&size=100", "not a multiple of the patch size, 32", "use size=96"),
    ],
)
def test_an_impossible_size_is_refused(spec: str, message: str, fix: str) -> None:
    error = fault(spec)
    assert error.number == EncoderCode.BAD_OPTION
    assert message in error.what and fix in error.fix


@pytest.mark.parametrize(
    "spec", ["hf:bert-base?pretrained=false&size=64", "tiny:vision?size=32", "open_clip:ViT-B-32#text?pretrained=false&size=64"]
)
def test_encoders_without_a_variable_size_refuse_the_size_option(spec: str) -> None:
    with pytest.raises(EncoderError, match=r"no option 'size'"):
        create_encoder(spec)


@pytest.mark.matrix
def test_inspect_and_training_use_the_declared_size(tmp_path: Path) -> None:
    spec = save(tmp_path / "dinov2", "facebook/dinov2-small")
    done = call("encoders", "inspect", spec)
    assert done.returncode == 0, done.stderr
    assert "tokens         257 per image" in done.stdout
    assert json.loads(call("encoders", "inspect", spec, "--json").stdout)["tokens"] == 257
    edit_config(tmp_path / "dinov2", image_size=518)
    data = make_pairs(tmp_path / "pairs")
    arguments = ("--comp", "tiny:text", "--device", "cpu", "--experts", "2", "--batch", "4", "--steps", "1")
    done = call("train", "--main", f"{spec}?size=56", *arguments, "--data", data, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert call("eval", tmp_path / "run", "--device", "cpu").returncode == 0
    done = call("export", tmp_path / "run", "-o", tmp_path / "bundle")  # compares the graph's outputs with the model's
    assert done.returncode == 0, done.stderr
