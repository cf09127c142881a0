"""Audio encoders: ``audio:facebook/wav2vec2-base``, ``audio:/folder/with/hubert``, ``audio:openai/whisper-tiny``.

wav2vec 2.0, HuBERT, WavLM and the encoder of Whisper, read through transformers; all but WavLM, which implements
its own attention, can be prompted. Clips are mixed to one channel, resampled by soxr and cut to ``?seconds=``.

Encoders that normalise their first features over time (``feat_extract_norm`` ``group``) would be affected by padding;
they get all clips padded to one length. So does Whisper, as in its training. The others take any length and a mask.

Shapes: B batch, T samples of audio, L frames, M bands of a mel spectrogram, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import soxr
import torch
import transformers
from mopefuse_audio_clips import Clip, Samples, clip_of
from torch import Tensor

from mopefuse.core.registry import Spec
from mopefuse.encoders import BuiltIn, EncoderOutput, Family, Inputs, Source, TransformersEncoder, mean_of
from mopefuse.errors import EncoderError

_SECONDS = 10.0


class AudioEncoder(TransformersEncoder):
    """An audio encoder. ``encode`` takes ``{"audio", "mask": (B, T)}``, Whisper's ``{"mel": (B, M, 2 L), "mask": (B, L)}``.

    Raises (on construction):
        EncoderError: no such folder or repository, no usable encoder in it, or an unknown option.
        CheckpointError: its weights are damaged, a pickle, incomplete, or do not fit.
    """

    families: ClassVar[Mapping[str, Family]] = {
        **dict.fromkeys(("wav2vec2", "hubert", "wavlm"), Family("audio", "mean", ("mean",))),
        "whisper": Family("audio", "mean", ("mean",), part="encoder"),
    }
    built_in: ClassVar[Mapping[str, BuiltIn]] = {
        "facebook/wav2vec2-base": BuiltIn("wav2vec2"),
        "facebook/hubert-base-ls960": BuiltIn("hubert"),
        "microsoft/wavlm-base": BuiltIn("wavlm"),
        "openai/whisper-tiny": BuiltIn(
            "whisper",
            {
                "d_model": 384, "encoder_layers": 4, "encoder_attention_heads": 6, "encoder_ffn_dim": 1536,
                "decoder_layers": 4, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536,
            },
        ),
    }  # fmt: skip
    own_options = ("pretrained", "weights", "pool", "seconds")
    libraries = ("transformers", "soxr")

    def _preprocess(self, source: Source) -> Waveform | LogMel:
        values = self._extractor(source)
        rate = int(values.get("sampling_rate", 16000))
        if self.model_config.model_type == "whisper":
            if "seconds" in self.spec.options:
                raise EncoderError(22, "Whisper takes clips of one length", where=str(self.spec), fix="remove ?seconds=")
            hop = int(values.get("hop_length", 160))
            length = int(self.model_config.max_source_positions) * 2 * hop
            return LogMel(rate, length, hop, int(self.model_config.num_mel_bins), int(values.get("n_fft", 400)))
        config = self.model_config
        config.apply_spec_augment, config.layerdrop = False, 0.0
        least = 1  # samples of one frame
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            least = (least - 1) * stride + kernel
        most = max(least, round(rate * _seconds(self.spec)))
        group = config.feat_extract_norm == "group"
        return Waveform(rate, most, least, bool(values.get("do_normalize", True)), most if group else None)

    def _extractor(self, source: Source) -> dict[str, Any]:
        if source.folder is None or not (source.folder / "preprocessor_config.json").is_file():
            return {}
        extractor = transformers.AutoFeatureExtractor.from_pretrained(
            source.folder, trust_remote_code=False, local_files_only=True
        )
        values: dict[str, Any] = extractor.to_dict()
        return values

    def _example_inputs(self) -> Inputs:
        noise = np.random.default_rng(0).standard_normal((2, 8000)).astype(np.float32)
        return self.preprocess.batch([self.preprocess.item((clip, 16000)) for clip in noise])

    def _run(self, inputs: Inputs) -> EncoderOutput:
        if "mel" in inputs:
            self._call.mask_BL = inputs["mask"]
            tokens_BLD: Tensor = self.backbone(inputs["mel"]).last_hidden_state
            return EncoderOutput(mean_of(tokens_BLD, inputs["mask"]), tokens_BLD, inputs["mask"])
        mask_BT = inputs["mask"]
        frames_B = self.backbone._get_feat_extract_output_lengths(mask_BT.sum(dim=1))
        count = int(self.backbone._get_feat_extract_output_lengths(mask_BT.shape[1]))
        mask_BL = self._call.mask_BL = torch.arange(count, device=mask_BT.device)[None] < frames_B[:, None]
        fixed = self.preprocess.length is not None  # type: ignore[attr-defined]
        out = self.backbone(inputs["audio"], attention_mask=None if fixed else mask_BT.long())
        return EncoderOutput(mean_of(out.last_hidden_state, mask_BL), out.last_hidden_state, mask_BL)


@dataclass(frozen=True)
class _Clips:
    """Clips of one rate, in Hz, with a maximum length. Values are those that `mopefuse_audio_clips.Audio` reads or accepts."""

    rate: int
    most: int

    def reduce(self, value: Any) -> Samples:
        """Mix a clip to one channel, resample it to the encoder's rate, and cut it."""
        if isinstance(value, str | Path):
            value = clip_of(value)
        clip, rate = value.start(self.most / self.rate) if isinstance(value, Clip) else value
        samples = np.asarray(clip, dtype=np.float32)
        mono = samples.mean(axis=1) if samples.ndim == 2 else samples
        mono = mono[: math.ceil(self.most * rate / self.rate)]
        out: Samples = soxr.resample(mono, rate, self.rate)[: self.most]
        return out

    def item(self, value: Any) -> Any:
        """Prepare a clip for a batch."""
        return self.ready(self.reduce(value))

    def ready(self, reduced: Samples) -> Any:
        """Prepare a reduced clip after augmentation."""
        raise NotImplementedError

    def finish(self, inputs: Mapping[str, Tensor]) -> Inputs:
        """Return the inputs unchanged."""
        return dict(inputs)


@dataclass(frozen=True)
class Waveform(_Clips):
    """Unchanged samples, or samples normalised to mean 0 and variance 1.

    Args:
        least: minimum number of samples of a clip. length: length to which all are padded; None for the longest of a batch.
    """

    least: int
    normalise: bool
    length: int | None

    def ready(self, reduced: Samples) -> Samples:
        """Normalise a clip, and append silence if it is shorter than one frame."""
        clip = reduced
        if self.normalise and len(clip):
            clip = (clip - clip.mean()) / np.sqrt(clip.var() + 1e-7)
        return np.pad(clip, (0, max(0, self.least - len(clip))))

    def batch(self, items: Sequence[Samples]) -> Inputs:
        """``{"audio": (B, T), "mask": (B, T)}``."""
        longest = self.length or max(len(clip) for clip in items)
        audio_BT, mask_BT = torch.zeros(len(items), longest), torch.zeros(len(items), longest, dtype=torch.bool)
        for number, clip in enumerate(items):
            audio_BT[number, : len(clip)] = torch.from_numpy(clip)
            mask_BT[number, : len(clip)] = True
        return {"audio": audio_BT, "mask": mask_BT}

    def describe(self) -> dict[str, Any]:
        """Rate in Hz and seconds."""
        return {"modality": "audio", "rate": self.rate, "seconds": self.most / self.rate, "normalise": self.normalise}


@dataclass(frozen=True)
class LogMel(_Clips):
    """Whisper's log-mel spectrogram of a clip of one length.

    Args:
        hop: samples from one column to the next. bands: M. window: samples of a Fourier transform.
    """

    hop: int
    bands: int
    window: int

    @property
    def length(self) -> int:
        """Samples to which all clips are padded."""
        return self.most

    def ready(self, reduced: Samples) -> tuple[Samples, int]:
        """The spectrogram (M, 2 L), and how many of its frames L are of the clip."""
        extractor = transformers.WhisperFeatureExtractor(
            feature_size=self.bands, sampling_rate=self.rate, hop_length=self.hop, n_fft=self.window,
            chunk_length=math.ceil(self.length / self.rate),
        )  # fmt: skip
        clip = np.pad(reduced, (0, self.length - len(reduced)))
        mel = extractor(clip, sampling_rate=self.rate, padding=False, return_tensors="np")["input_features"][0]
        return mel[:, : self.length // self.hop], max(1, math.ceil(len(reduced) / (2 * self.hop)))

    def batch(self, items: Sequence[tuple[Samples, int]]) -> Inputs:
        """``{"mel": (B, M, 2 L), "mask": (B, L)}``."""
        mel_BML = torch.from_numpy(np.stack([mel for mel, _ in items])).float()
        real_B = torch.tensor([real for _, real in items])
        return {"mel": mel_BML, "mask": torch.arange(mel_BML.shape[2] // 2)[None] < real_B[:, None]}

    def describe(self) -> dict[str, Any]:
        """Rate in Hz, seconds and bands."""
        return {"modality": "audio", "rate": self.rate, "seconds": self.length / self.rate, "bands": self.bands}


def _seconds(spec: Spec) -> float:
    text = spec.options.get("seconds", str(_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 600:
        raise EncoderError(22, f"seconds={text} is not a number from 0.1 to 600", where=str(spec), fix="write ?seconds=10")
    return seconds
