"""Access to the hub: every failure has its own message, only safetensors are read, every large file is verified."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
import transformers
from encoder_cases import SIGLIP, code, edit_config, fault, save_hf, save_tokenizer
from huggingface_hub import errors as hub_errors
from safetensors.torch import save_file

from mopefuse.core import hub as _hub
from mopefuse.core.error_codes import EncoderCode
from mopefuse.encoders.base import create_encoder
from mopefuse.errors import CheckpointError, EncoderError, ResourceError
from mopefuse.testing import check_encoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for kind in ("bert",):
        save_hf(kind, root / kind)
    return root


@pytest.fixture
def bert(folders: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    for file in (folders / "bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def response(status: int) -> Any:
    return SimpleNamespace(status_code=status, headers={}, request=None)


HUB = [
    (hub_errors.GatedRepoError("x", response=response(403)), EncoderCode.GATED, "accept its terms"),
    (hub_errors.RepositoryNotFoundError("x", response=response(401)), EncoderCode.NOT_VISIBLE, "private"),
    (hub_errors.RepositoryNotFoundError("x", response=response(404)), EncoderCode.NOT_FOUND, "your token has no access"),
    (hub_errors.RevisionNotFoundError("x", response=response(404)), EncoderCode.NO_REVISION, "'v9'"),
    (hub_errors.HfHubHTTPError("x", response=response(401)), EncoderCode.BAD_TOKEN, "renew HF_TOKEN"),
    (hub_errors.HfHubHTTPError("x", response=response(403)), EncoderCode.FORBIDDEN, "no permission to read"),
    (hub_errors.HfHubHTTPError("x", response=response(503)), EncoderCode.HUB_FAILED, "503"),
    (hub_errors.OfflineModeIsEnabled("x"), EncoderCode.OFFLINE, "HF_HUB_OFFLINE=1"),
    (ConnectionError("x"), EncoderCode.UNREACHABLE, "connected machine"),
]


@pytest.mark.parametrize(("error", "number", "message"), HUB, ids=[str(number) for _, number, _ in HUB])
@pytest.mark.parametrize("spec", ["hf:org/name@v9", "timm:vit_base", "open_clip:vit-b-32"])
def test_every_hub_failure_has_its_own_message(
    spec: str, error: Exception, number: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked on the terminal"))
    found = fault(spec)
    assert found.code == code(number) and found.exit_code == 5
    assert message.replace("v9", "v9" if spec.startswith("hf") else "main") in str(found), str(found)


def test_a_misspelt_alias_gets_a_suggestion_before_the_hub_is_contacted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("x")

    monkeypatch.setattr(_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", fail)
    assert "fix: did you mean hf:bert-base, hf:roberta-base? Otherwise create it once" in str(fault("hf:bert-bsae"))
    assert "did you mean" not in str(fault("hf:org/bert-bsae"))


def test_offline_mode_fails_quickly_and_says_what_to_do(tmp_path: Path) -> None:
    """In a separate process, because huggingface_hub reads the variables when it is imported."""
    program = (
        "import time; from mopefuse.core import hub as _hub; from mopefuse.errors import EncoderError; t = time.time()\n"
        "try: _hub.fetch('google-bert/bert-base-uncased', 'config.json', where='hf:bert-base')\n"
        "except EncoderError as error: print(error.code, time.time() - t < 1, error)"
    )
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    ran = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.startswith(f"{code(EncoderCode.OFFLINE)} True"), ran.stdout
    assert "local folder" in ran.stdout and "?pretrained=false" in ran.stdout


def serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Patch the hub so that it serves the files in `folder`."""
    requests: list[str] = []

    def fetch(repo: str, filename: str, revision: str | None = None, *, where: str) -> Path | None:
        requests.append(f"{repo}@{revision}/{filename}")
        return folder / filename if (folder / filename).is_file() else None

    monkeypatch.setattr(_hub, "fetch", fetch)
    return requests


def test_a_transformers_repository_loads(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / COMMIT
    snapshot.symlink_to(folders / "bert")
    requests = serve(snapshot, monkeypatch)
    encoder = create_encoder("hf:org/small@v1")
    assert encoder.revision == COMMIT
    assert encoder.fingerprint() == create_encoder(f"hf:{folders / 'bert'}").fingerprint()
    assert requests[:2] == ["org/small@v1/config.json", "org/small@v1/model.safetensors"]


def test_no_weights_are_downloaded_for_a_refused_configuration(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_config(bert, model_type="t5", is_encoder_decoder=True)
    requests = serve(bert, monkeypatch)
    assert fault("hf:org/decoder").code == code(EncoderCode.UNSUITABLE)
    assert requests == ["org/decoder@None/config.json"]


def test_sharded_weights_load_and_pickles_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = create_encoder(f"hf:{bert}").fingerprint()
    model = transformers.AutoModel.from_pretrained(bert)
    (bert / "model.safetensors").unlink()
    model.save_pretrained(bert, max_shard_size="20KB")
    assert len(list(bert.glob("model-*.safetensors"))) > 1
    serve(bert, monkeypatch)
    assert create_encoder("hf:org/parts").fingerprint() == whole
    (bert / "model.safetensors.index.json").unlink()
    assert fault("hf:org/pickles").code == code(EncoderCode.NO_SAFETENSORS)
    assert fault("timm:vit_base").code == code(EncoderCode.NO_SAFETENSORS)
    assert fault("open_clip:vit-b-32").code == code(EncoderCode.NO_SAFETENSORS)


def test_pretrained_timm_weights_are_read_from_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", depth=1)
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    save_file(model.state_dict(), snapshot / "model.safetensors")
    requests = serve(snapshot, monkeypatch)
    encoder = create_encoder("timm:vit_tiny?depth=1")
    assert requests == ["timm/vit_tiny_patch16_224.augreg_in21k@None/model.safetensors"]
    assert (encoder.spec.name, encoder.revision) == ("vit_tiny_patch16_224.augreg_in21k", COMMIT)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name.removeprefix("backbone.")])
    torch.save(model.state_dict(), snapshot / "model.safetensors")
    assert fault("timm:vit_tiny?depth=1", CheckpointError).code == "MF-CKPT-06"


def test_pretrained_open_clip_weights_are_read_from_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    config["vision_cfg"] |= {"width": 64, "layers": 1}
    config["text_cfg"] |= {"width": 64, "layers": 1}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config)
    model = open_clip.CLIP(**json.loads(json.dumps(config)))  # published files are of this class
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    serve(tmp_path, monkeypatch)
    encoder = create_encoder("open_clip:ViT-B-32/openai#text")
    assert torch.equal(encoder.state_dict()["backbone.text_projection"], model.state_dict()["text_projection"])
    assert "QuickGELU" in {type(module).__name__ for module in encoder.modules()}, "as the weights were trained"


@pytest.fixture
def siglip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a small model and a tokenizer."""
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(SIGLIP)))
    model = open_clip.CustomTextCLIP(**SIGLIP)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    save_tokenizer(tmp_path)
    (tmp_path / "config.json").unlink()
    return tmp_path


def test_siglip_gets_the_tokenizer_that_open_clip_uses(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = serve(siglip, monkeypatch)
    encoder = create_encoder("open_clip:ViT-B-16-SigLIP/webli#text")
    assert requests[:2] == ["timm/ViT-B-16-SigLIP@None/open_clip_model.safetensors", "org/siglip@None/tokenizer.json"]
    texts = ["The quick,  brown_fox!", "", "no " * 40]
    inputs = encoder.preprocess.batch([encoder.preprocess.item(text) for text in texts])
    cleaned, tokenizer = ["the quick brown fox", "", "no " * 39 + "no"], transformers.AutoTokenizer.from_pretrained(siglip)
    assert inputs["ids"].tolist() == tokenizer(cleaned, max_length=20, padding="max_length", truncation=True)["input_ids"]
    assert inputs["mask"].sum(dim=1).tolist() == [6, 2, 20]
    assert encoder.preprocess.describe() == {"modality": "text", "tokenizer": "org/siglip", "max_tokens": 20}
    check_encoder(encoder)


def test_siglip_weights_without_their_tokenizer_are_refused(siglip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights do not need it; weights from a file do."""
    create_encoder("open_clip:ViT-B-16-SigLIP#text?pretrained=false")
    spec = f"open_clip:ViT-B-16-SigLIP#text?weights={siglip / 'open_clip_model.safetensors'}"

    def offline(*args: Any, **kwargs: Any) -> None:
        raise hub_errors.OfflineModeIsEnabled("x")

    monkeypatch.setattr(_hub, "get_hf_file_metadata", offline)
    error = fault(spec)
    assert error.code == code(EncoderCode.OFFLINE) and "org/siglip is not in the local cache" in str(error)
    (siglip / "tokenizer.json").write_text("{")
    serve(siglip, monkeypatch)
    assert fault(spec).code == code(EncoderCode.NO_TOKENIZER)
    (siglip / "tokenizer.json").unlink()
    assert fault(spec).code == code(EncoderCode.NO_TOKENIZER)


def test_a_download_is_checked_against_the_sha256_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = tmp_path / "model.safetensors"
    right = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # of b"hello"
    monkeypatch.setattr(_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", lambda *args, **kwargs: SimpleNamespace(etag=right))
    monkeypatch.setattr(_hub, "hf_hub_download", lambda *args, **kwargs: str(arrived))
    arrived.write_bytes(b"hello")
    assert _hub.fetch("org/name", "model.safetensors", where="x") == arrived
    arrived.write_bytes(b"hullo")
    with pytest.raises(EncoderError, match="sha256") as caught:
        _hub.fetch("org/name", "model.safetensors", where="x")
    assert caught.value.code == code(EncoderCode.BROKEN_DOWNLOAD) and not arrived.exists()


def test_a_cache_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device", "/full/disk/blob")

    monkeypatch.setattr(_hub, "try_to_load_from_cache", lambda *args, **kwargs: None)
    monkeypatch.setattr(_hub, "get_hf_file_metadata", lambda *args, **kwargs: SimpleNamespace(etag=None))
    monkeypatch.setattr(_hub, "hf_hub_download", full)
    error = fault("hf:bert-base", ResourceError)
    assert error.exit_code == 7 and "/full/disk/blob" in str(error) and "HF_HOME" in str(error)
