"""The encoders of mopefuse-audio satisfy the contract, tested with small random models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers
from mopefuse_audio import AudioEncoder

from mopefuse.encoders import Prompt, create_encoder
from mopefuse.encoders import description as _description
from mopefuse.errors import DataError, EncoderError
from mopefuse.testing import check_encoder

CONV = {"conv_dim": [16, 16], "conv_kernel": [10, 4], "conv_stride": [5, 4], "num_feat_extract_layers": 2}
WAVES = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, **CONV,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    "d_model": 32, "encoder_layers": 3, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_layers": 1,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "num_mel_bins": 16, "max_source_positions": 50, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wav2vec2": ("wav2vec2", WAVES),
    "wav2vec2-layer": ("wav2vec2", {**WAVES, "feat_extract_norm": "layer", "do_stable_layer_norm": True}),
    "hubert": ("hubert", WAVES),
    "wavlm": ("wavlm", WAVES),
    "whisper": ("whisper", WHISPER),
}


def save(root: Path) -> dict[str, Path]:
    """Save a small random model of every family below `root`."""
    torch.manual_seed(0)
    for name, (kind, values) in CASES.items():
        transformers.AutoModel.from_config(transformers.AutoConfig.for_model(kind, **values)).save_pretrained(root / name)
    return {name: root / name for name in CASES}


def spec(name: str, folder: Path) -> str:
    """The spec of an encoder for short clips."""
    return f"audio:{folder}{'' if name == 'whisper' else '?seconds=1'}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save(tmp_path_factory.mktemp("audio"))


@pytest.mark.parametrize("name", CASES)
def test_every_family_satisfies_the_contract(name: str, folders: dict[str, Path]) -> None:
    encoder = check_encoder(spec(name, folders[name]))
    assert encoder.modality == "audio"
    assert len(encoder.widths) == (0 if name == "wavlm" else 3)
    if not encoder.widths:
        assert "transformers has no scaled-dot-product attention for it" in encoder.unpromptable_reason


@pytest.mark.parametrize("name", CASES)
def test_without_prompts_outputs_equal_the_librarys(name: str, folders: dict[str, Path]) -> None:
    encoder = create_encoder(spec(name, folders[name]))
    inputs = encoder.preprocess.batch([encoder.preprocess.item((np.sin(np.arange(12000) / 20), 16000))])
    plain = transformers.AutoModel.from_pretrained(folders[name]).eval()
    with torch.no_grad():
        ours = encoder.encode(inputs)
        if name == "whisper":
            theirs = plain.get_encoder()(inputs["mel"]).last_hidden_state
        else:
            fixed = encoder.preprocess.length is not None  # type: ignore[attr-defined]
            theirs = plain(inputs["audio"], attention_mask=None if fixed else inputs["mask"].long()).last_hidden_state
    assert torch.equal(ours.tokens_BLD, theirs)


@pytest.mark.parametrize("name", [name for name in CASES if name != "wavlm"])
def test_prompts_equal_inserted_tokens(name: str, folders: dict[str, Path]) -> None:
    """Without a gate, a prompt of the last layer has the same effect as tokens inserted before the layer's input tokens."""
    encoder = create_encoder(spec(name, folders[name]))
    inputs = encoder.preprocess.batch([encoder.preprocess.item((np.sin(np.arange(16000) / 20), 16000))] * 2)
    prompt = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    last = len(encoder.widths) - 1
    plain: Any = transformers.AutoModel.from_pretrained(folders[name]).eval()
    plain = plain.get_encoder() if name == "whisper" else plain
    layer = (plain.layers if name == "whisper" else plain.encoder.layers)[last]
    own = layer.forward

    def inserted(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = own(torch.cat([prompt, x], dim=1), None)
        return out[:, 4:] if isinstance(out, torch.Tensor) else (out[0][:, 4:], *out[1:])

    layer.forward = inserted
    with torch.no_grad():
        ours = encoder.encode(inputs, lambda number, tokens, mask: Prompt(prompt) if number == last else None)
        theirs = plain(inputs["mel" if name == "whisper" else "audio"]).last_hidden_state
    torch.testing.assert_close(ours.tokens_BLD, theirs, atol=2e-5, rtol=1e-4)


def test_files_are_mixed_resampled_and_truncated(tmp_path: Path, folders: dict[str, Path]) -> None:
    encoder = create_encoder(f"audio:{folders['wav2vec2-layer']}?seconds=0.5")
    time = np.arange(8000) / 8000
    tone = 0.5 * np.sin(2 * np.pi * 440 * time)
    soundfile.write(tmp_path / "stereo.wav", np.stack([tone, tone], axis=1), 8000, subtype="FLOAT")
    clip = encoder.preprocess.reduce(tmp_path / "stereo.wav")
    assert len(clip) == 8000
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(8000) / 16000)
    np.testing.assert_allclose(clip[500:-500], wanted[500:-500], atol=2e-3)


def test_a_file_that_is_not_audio_is_an_error_that_names_it(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "a.wav").write_bytes(b"no audio at all")
    encoder = create_encoder(spec("hubert", folders["hubert"]))
    for path in (tmp_path / "a.wav", tmp_path / "missing.wav"):
        with pytest.raises(DataError, match=path.name):
            encoder.preprocess.item(path)


@pytest.mark.parametrize("option", ["seconds=abc", "seconds=0", "second=1"])
def test_options_are_checked(option: str, folders: dict[str, Path]) -> None:
    with pytest.raises(EncoderError):
        create_encoder(f"audio:{folders['hubert']}?{option}")


def test_built_in_configurations_need_no_network() -> None:
    for name, built_in in AudioEncoder.built_in.items():
        assert transformers.AutoConfig.for_model(built_in.model_type, **built_in.config), name


@pytest.mark.parametrize(
    ("name", "file", "changes", "message"),
    [
        ("wav2vec2", "config.json", {"hidden_act": "relu"}, "model.hidden_act"),
        ("wav2vec2", "config.json", {"num_attention_heads": 2}, "model.num_attention_heads"),
        ("wav2vec2", "preprocessor_config.json", {"do_normalize": False}, "preprocess.normalise"),
        ("wav2vec2", "preprocessor_config.json", {"sampling_rate": 8000}, "preprocess.rate"),
        ("whisper", "preprocessor_config.json", {"n_fft": 200}, "preprocess.window"),
    ],
)
def test_changes_other_than_weights_change_the_description(
    folders: dict[str, Path], tmp_path: Path, name: str, file: str, changes: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folders[name], tmp_path / "copy")
    kind = "WhisperFeatureExtractor" if name == "whisper" else "Wav2Vec2FeatureExtractor"
    extractor = {"feature_extractor_type": kind, "sampling_rate": 16000, "do_normalize": True, "n_fft": 400, "feature_size": 1}
    (copy / "preprocessor_config.json").write_text(json.dumps(extractor | ({"feature_size": 16} if name == "whisper" else {})))
    before = create_encoder(spec(name, copy))
    assert before.describe() == create_encoder(spec(name, copy)).describe()
    assert str(tmp_path) not in json.dumps(before.describe())
    assert before.describe()["libraries"].keys() >= {"transformers", "soxr", "torch"}
    (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    now = create_encoder(spec(name, copy))
    assert now.fingerprint() == before.fingerprint()
    assert [text for text in _description.differences(before.describe(), now.describe()) if text.startswith(message)]
    assert now.digest() != before.digest()
