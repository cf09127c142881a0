"""Sources of encoders: names, options, folders, weight files, the hub; and the error for each problem."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from conftest import thinned
from encoder_cases import HF, OPEN_CLIP, TIMM, code, edit_config, fault, save_hf, save_tokenizer
from PIL import Image
from safetensors.torch import save_file

from mopefuse.core import hub as _hub
from mopefuse.core.error_codes import EncoderCode
from mopefuse.encoders.base import create_encoder
from mopefuse.errors import CheckpointError
from mopefuse.testing import check_encoder

VIT = f"timm:{TIMM['vit']}"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and a hub that cannot be reached."""

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", unreachable)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for kind in ("bert", "vit"):
        save_hf(kind, root / kind)
    return root


@pytest.fixture
def bert(folders: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for file in (folders / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


# names and options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "number", "message"),
    [
        ("timm:vit_bse", EncoderCode.UNKNOWN_MODEL, "vit_base"),
        ("timm:vit_base_patch16_224.augreg_in21", EncoderCode.UNKNOWN_MODEL, "did you mean augreg_in21k"),
        ("open_clip:ViT-B-3/openai#text", EncoderCode.UNKNOWN_MODEL, "ViT-B-32"),
        ("open_clip:ViT-B-32/laion2b_s34b_b79#text", EncoderCode.UNKNOWN_MODEL, "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32/openai", EncoderCode.TOWER_NOT_NAMED, "ViT-B-32/openai#visual"),
        ("open_clip:roberta-ViT-B-32#text?pretrained=false", EncoderCode.UNSUITABLE, "hf:"),
        ("open_clip:ViT-L-14-CLIPA#text?pretrained=false", EncoderCode.UNSUITABLE, "bert-base-uncased"),
        pytest.param(
            "open_clip:ViT-L-14-worldwide#text?pretrained=false", EncoderCode.UNSUITABLE, "mt5",
            marks=pytest.mark.skipif("ViT-L-14-worldwide" not in open_clip.list_models(), reason="needs open_clip_torch 3.1"),
        ),
        ("open_clip:coca_ViT-B-32#text?pretrained=false", EncoderCode.UNSUITABLE, "decoder"),
        ("hf:/no/such/folder", EncoderCode.NO_FOLDER, "/no/such/folder"),
        ("hf:not a name/x", EncoderCode.NOT_FOUND, "organisation/name"),
        ("hf:bert-base#left", EncoderCode.TOWER_NOT_NAMED, "#text or #vision"),
        ("hf:org/unknown?pretrained=false", EncoderCode.NO_BUILT_IN_CONFIG, "pretrained=false does not use the network"),
        (f"{VIT}&dpeth=3", EncoderCode.UNKNOWN_OPTION, "did you mean depth"),
        (f"{VIT}&num_classes=3", EncoderCode.UNKNOWN_OPTION, "num_classes"),
        (f"{VIT}&pool=max", EncoderCode.BAD_OPTION, "use own or token or avg or token+avg"),
        (f"{VIT}&mean=0.1,0.2", EncoderCode.BAD_OPTION, "mean=0.5"),
        ("timm:vit_tiny_patch16_224?pretrained=false&depth=many", EncoderCode.CANNOT_BUILD, "depth"),
        ("hf:bert-base?pretrained=false&num_layers=3", EncoderCode.UNKNOWN_OPTION, "did you mean num_hidden_layers"),
        ("hf:bert-base?pretrained=false&hidden_size=30", EncoderCode.CANNOT_BUILD, "multiple"),
        ("hf:vit-base?pretrained=false&max_tokens=3&num_hidden_layers=1", EncoderCode.UNKNOWN_OPTION, "max_tokens"),
        ("open_clip:ViT-S-32#visual?pretrained=false&max_tokens=7", EncoderCode.UNKNOWN_OPTION, "max_tokens"),
        ("open_clip:ViT-S-32#text?pretrained=false&max_tokens=78", EncoderCode.BAD_OPTION, "2 to 77"),
        ("open_clip:ViT-S-32#text?pretrained=false&force_image_size=64", EncoderCode.UNKNOWN_OPTION, "force_image_size"),
    ],
)
def test_wrong_names_and_options_are_errors(spec: str, number: int, message: str) -> None:
    error = fault(spec)
    assert error.code == code(number) and message in str(error), str(error)


def test_an_option_value_of_the_wrong_type_is_an_error() -> None:
    """Rejected by the configuration or by the constructor, depending on the version of transformers."""
    error = fault("hf:bert-base?pretrained=false&hidden_size=big&num_hidden_layers=1")
    assert error.code in (code(EncoderCode.BAD_OPTION), code(EncoderCode.CANNOT_BUILD))


def test_options_are_passed_to_the_library_and_the_preprocessing() -> None:
    encoder = create_encoder(f"{VIT}&mean=0.4,0.5,0.6&std=0.25&pool=avg")
    described = encoder.preprocess.describe()
    assert len(encoder.widths) == 3 and described["size"] == [32, 32]
    assert described["mean"] == [0.4, 0.5, 0.6] and described["std"] == [0.25] * 3
    pixels = torch.randn(2, 3, 32, 32)
    out = encoder.encode({"pixels": pixels})
    torch.testing.assert_close(out.pooled_BC, out.tokens_BLD[:, 1:].mean(dim=1))


@pytest.mark.parametrize(
    ("spec", "special"),
    [
        (f"{VIT}&pool=token+avg", 1),
        ("timm:resnet10t?pretrained=false&pool=avg", 0),
        ("hf:vit-base?pretrained=false&num_hidden_layers=1&pool=cls+mean", 1),
        ("hf:bert-base?pretrained=false&num_hidden_layers=1&pool=cls+mean", 0),
        ("tiny:text?pool=cls+mean", 0),
    ],
)
def test_the_first_token_and_the_mean_can_be_pooled_side_by_side(spec: str, special: int) -> None:
    """The mean is over the patches without the class token, or over all tokens of a text without padding."""
    encoder = create_encoder(spec)
    values = ["a", "a longer text"] if encoder.modality == "text" else [Image.new("RGB", (40, 40), c) for c in ("red", "blue")]
    out = encoder.encode(encoder.preprocess.batch([encoder.preprocess.item(value) for value in values]))
    assert out.pooled_BC.shape[1] == encoder.feature_width
    for i in range(2):
        tokens_LD = out.tokens_BLD[i] if out.mask_BL is None else out.tokens_BLD[i][out.mask_BL[i]]
        mean_D = tokens_LD[special:].mean(dim=0)
        expected = torch.cat([tokens_LD[0], mean_D]) if "+" in spec else mean_D
        torch.testing.assert_close(out.pooled_BC[i], expected)


# random weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alias", "small"),
    thinned(
        [
            ("bert-base", "num_hidden_layers=1&max_tokens=9"),
            ("roberta-base", "num_hidden_layers=1"),
            ("distilbert-base", "n_layers=1"),
            ("minilm", "num_hidden_layers=1"),
            ("vit-base", "num_hidden_layers=1&image_size=32"),
            ("deit-base", "num_hidden_layers=1&image_size=32"),
            ("swin-base", "depths=1,1&num_heads=4,8&image_size=56"),
            ("clip-text", "num_hidden_layers=1"),
            ("clip-vision", "num_hidden_layers=1&image_size=64"),
        ],
        step=5,
    ),
)
def test_aliases_have_a_configuration_without_a_network(alias: str, small: str, no_network: None) -> None:
    encoder = check_encoder(f"hf:{alias}?pretrained=false&{small}")
    width = {"minilm": 384, "swin-base": 256, "clip-text": 512}.get(alias, 768)
    assert encoder.feature_width == width
    assert encoder.spec.name.count("/") == 1, "a run records the full name"


def test_the_hashing_tokenizer_spares_special_ids() -> None:
    encoder = create_encoder("hf:bert-base?pretrained=false&num_hidden_layers=1&vocab_size=8&max_tokens=6")
    inputs = encoder.preprocess.batch(["One two, ONE two three four five six"])
    ids = inputs["ids"][0].tolist()
    assert len(ids) == 6 and (ids[0], ids[-1]) == (6, 7) and not {0, 6, 7} & set(ids[1:-1])
    assert ids[1] == encoder.preprocess.batch(["one"])["ids"][0, 1]


# files of weights -------------------------------------------------------------------------------------------------


def test_weights_load_from_a_file(tmp_path: Path) -> None:
    """Half precision is converted, a classifier in the file is ignored, and the fingerprint depends on the values."""
    original = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3)
    path = tmp_path / "half.safetensors"
    save_file({name: tensor.half() for name, tensor in original.state_dict().items()}, path)
    encoder = create_encoder(f"{VIT}&weights={path}")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    loaded = encoder.state_dict()
    assert not [name for name in loaded if name.startswith("backbone.head.")]
    for name, tensor in loaded.items():
        assert torch.equal(tensor, original.state_dict()[name.removeprefix("backbone.")].half().float())
    assert encoder.fingerprint() == create_encoder(f"{VIT}&weights={path}").fingerprint()
    assert encoder.fingerprint() != create_encoder(VIT).fingerprint()


@pytest.mark.parametrize("tower", ["text", "visual"])
def test_weights_of_one_tower_or_both_load_from_a_file(tower: str, tmp_path: Path) -> None:
    (tmp_path / "mopefuse-whole.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(tmp_path / "mopefuse-whole.json")
    model = open_clip.CustomTextCLIP(**json.loads(json.dumps(OPEN_CLIP)))
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "both.safetensors")
    save_file(getattr(model, tower).state_dict(), tmp_path / "one.safetensors")
    prints = {
        create_encoder(f"open_clip:mopefuse-whole#{tower}?weights={tmp_path / name}.safetensors").fingerprint()
        for name in ("both", "one")
    }
    assert len(prints) == 1


def test_a_weights_file_replaces_the_weights_of_a_folder(folders: Path) -> None:
    path = folders / "bert"
    model = transformers.AutoModel.from_pretrained(path, add_pooling_layer=False)
    save_file(model.state_dict(), path / "other.safetensors")
    theirs, ours = create_encoder(f"hf:{path}?weights={path / 'other.safetensors'}"), create_encoder(f"hf:{path}")
    (path / "other.safetensors").unlink()
    assert theirs.fingerprint() == ours.fingerprint()


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    state = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=3, num_classes=0).state_dict()
    state["pos_embed"] = torch.zeros(1, 5, 192)
    state["extra.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "other.safetensors")
    error = fault(f"{VIT}&weights={tmp_path / 'other.safetensors'}", CheckpointError)
    assert error.code == "MF-CKPT-42"
    for part in ("missing: norm.weight", "unexpected: extra.weight", "pos_embed (1x5x192, expected 1x17x192)"):
        assert part in str(error)


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_whatever_its_name(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "a.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    torch.save({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    for name in ("a", "b"):
        error = fault(f"{VIT}&weights={tmp_path / name}.safetensors", CheckpointError)
        assert error.code == "MF-CKPT-06" and not canary.exists()
    with (tmp_path / "a.safetensors").open("rb") as file:
        pickle.load(file)  # noqa: S301
    assert canary.exists(), "the canary does run when it is unpickled"


@pytest.mark.parametrize("keep", [0, 5, 40, -7])
def test_a_damaged_weights_file_is_an_error(keep: int, tmp_path: Path, bert: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert fault(f"{VIT}&weights={path}", CheckpointError).code == "MF-CKPT-02"
    weights = bert / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    assert fault(f"hf:{bert}", CheckpointError).code == "MF-CKPT-02"


def test_a_missing_weights_file_is_an_error() -> None:
    assert fault(f"{VIT}&weights=/no/such.safetensors", CheckpointError).code == "MF-CKPT-04"


# folders ----------------------------------------------------------------------------------------------------------


def test_a_masked_language_model_loads_as_an_encoder(tmp_path: Path) -> None:
    model = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**HF["bert"]))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = create_encoder(f"hf:{tmp_path}")
    assert torch.equal(
        encoder.state_dict()["backbone.encoder.layer.0.output.dense.weight"],
        model.state_dict()["bert.encoder.layer.0.output.dense.weight"],
    )
    error = fault(f"hf:{tmp_path}?pool=pooler", CheckpointError)  # a masked-language model has no pooler
    assert error.code == "MF-CKPT-42" and "pooler" in str(error)


def test_both_towers_of_a_clip_folder_load(tmp_path: Path) -> None:
    text = {**HF["clip_text_model"], "max_position_embeddings": 20}
    config = transformers.CLIPConfig(text_config=text, vision_config=HF["clip_vision_model"], projection_dim=16)
    model = transformers.CLIPModel(config)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        tmp_path
    )
    assert fault(f"hf:{tmp_path}").code == code(EncoderCode.TOWER_NOT_NAMED)
    words, images = check_encoder(f"hf:{tmp_path}#text"), check_encoder(f"hf:{tmp_path}#vision")
    assert (words.preprocess.describe()["max_tokens"], images.preprocess.describe()["resize"]) == (20, 32)
    for encoder, part in ((words, "text_model."), (images, "vision_model.")):
        theirs = {name.removeprefix(part): t for name, t in model.state_dict().items() if name.startswith(part)}
        ours = {name.removeprefix("backbone.").removeprefix(part): t for name, t in encoder.state_dict().items()}
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
def test_a_sentence_transformers_folder_pools_as_it_declares(pooling: dict[str, bool], expected: str, bert: Path) -> None:
    (bert / "1_Pooling").mkdir()
    (bert / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}]))
    off = {"pooling_mode_max_tokens": False, "word_embedding_dimension": 32}
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({**off, **pooling}))
    (bert / "sentence_bert_config.json").write_text('{"max_seq_length": 7}')
    encoder = create_encoder(f"hf:{bert}")
    assert encoder.preprocess.describe()["max_tokens"] == 7
    inputs = encoder.preprocess.batch(["no", "the lazy dog"])
    out = encoder.encode(inputs)
    by_hand = {"mean": out.tokens_BLD[0, :3].mean(dim=0), "cls": out.tokens_BLD[0, 0], "last": out.tokens_BLD[0, 2]}
    torch.testing.assert_close(out.pooled_BC[0], by_hand[expected])
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    assert "max_tokens" in str(fault(f"hf:{bert}"))


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, EncoderCode.REMOTE_CODE, "AutoModel"),
        ({"is_encoder_decoder": True, "model_type": "t5"}, EncoderCode.UNSUITABLE, "decoder"),
        ({"is_decoder": True}, EncoderCode.UNSUITABLE, "the decoder of another"),
        ({"model_type": "wav2vec2"}, EncoderCode.UNSUITABLE, "accepts neither text nor images alone"),
        ({"model_type": "made-up"}, EncoderCode.UNSUITABLE, "made-up"),
        ({"model_type": None}, EncoderCode.BAD_CONFIG, "model_type"),
    ],
)
def test_unsuitable_models_are_refused_by_their_configuration_alone(
    changes: dict[str, Any], number: int, message: str, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    edit_config(bert, **changes)
    error = fault(f"hf:{bert}")
    assert error.code == code(number) and message in str(error), str(error)


def test_an_incomplete_folder_is_an_error(bert: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (bert / "tokenizer.json").unlink()
    assert fault(f"hf:{bert}").code == code(EncoderCode.NO_TOKENIZER)
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    error = fault(f"hf:{bert}")
    assert error.code == code(EncoderCode.NO_SAFETENSORS) and "pickle" in str(error)
    (bert / "config.json").write_text("{")
    assert fault(f"hf:{bert}").code == code(EncoderCode.BAD_CONFIG)
    (bert / "config.json").unlink()
    assert fault(f"hf:{bert}").code == code(EncoderCode.BAD_CONFIG)
    images = tmp_path_factory.mktemp("images")
    for name in ("config.json", "model.safetensors"):
        (images / name).write_bytes((folders / "vit" / name).read_bytes())
    assert fault(f"hf:{images}").code == code(EncoderCode.NO_IMAGE_CONFIG)
