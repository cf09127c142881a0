"""Tone questions: digit questions that are half spoken. An image has four handwritten digits in four colours, one in each
cell; a text states whether a place or a colour is meant, and a tone selects one of the four. The label is that digit.

No two of the three are enough: the image alone leaves four of ten answers likely; without the tone there are still four,
without the text two, and without the image ten.

Shapes: N images, 4 cells or colours.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers
from PIL import Image

from mopefuse.data.sets import digit_questions as digits
from mopefuse.encoders import create_encoder

RATE = 16000
TONES = (300.0, 700.0, 1500.0, 3100.0)  # Hz, of each place or colour in their order
_SECONDS = 0.4
TEXTS = {
    "place": ("name the digit in the corner", "what does the cell say?", "read the number in the cell"),
    "colour": ("read the number written in it", "which digit is painted so?", "name the digit in that ink"),
}


def make(folder: Path, *, train: int = 4000, val: int = 400, test: int = 600, seed: int = 0) -> Path:
    """Write the data set; four rows share an image."""
    for split, rows in {"train": train, "val": val, "test": test}.items():
        _write(folder, split, rows, seed)
    return folder


def _write(folder: Path, split: str, rows: int, seed: int) -> None:
    content = digits.compose(split, rows, seed)
    random = np.random.default_rng([seed, digits.SPLITS.index(split), 1])
    for kind in ("images", "tones"):
        (folder / kind / split).mkdir(parents=True)
    lines = []
    for image, pixels in enumerate(digits.paint(_values()[content.samples_N4], content.colours_N4)):
        Image.fromarray(pixels).save(folder / "images" / split / f"{image:06d}.png")
        for kind in random.permutation(8)[:4]:
            kind_of, number = ("place", int(kind)) if kind < 4 else ("colour", int(kind) - 4)
            cell = number if kind_of == "place" else int(np.flatnonzero(content.colours_N4[image] == number)[0])
            name = f"tones/{split}/{len(lines):06d}.wav"
            soundfile.write(folder / name, tone(number, random), RATE)
            row = {"id": f"{split}-{len(lines):06d}", "img": f"images/{split}/{image:06d}.png", "audio": name}
            values = {"text": str(random.choice(TEXTS[kind_of])), "label": str(content.digits_N4[image, cell])}
            lines.append(json.dumps(row | values))
    (folder / f"{split}.jsonl").write_text("\n".join(lines[:rows]) + "\n", encoding="utf-8")


def tone(number: int, random: np.random.Generator) -> np.ndarray:
    """One of `TONES` with its own pitch, phase and loudness, and with noise."""
    time = np.arange(round(RATE * _SECONDS)) / RATE
    pitch, phase, loud = TONES[number] * random.uniform(0.95, 1.05), random.uniform(0, 2 * np.pi), random.uniform(0.2, 0.6)
    return loud * np.sin(2 * np.pi * pitch * time + phase) + 0.02 * random.standard_normal(len(time))


def _values() -> np.ndarray:
    return digits._uci()[0]


WHISPER = {
    "d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_layers": 1,
    "decoder_attention_heads": 4, "decoder_ffn_dim": 16, "num_mel_bins": 32, "max_source_positions": 25, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip


def pretrain(folder: Path, *, steps: int = 80, batch: int = 64) -> Path:
    """Train a small Whisper whose encoder distinguishes the tones but not the task; saved as by transformers."""
    torch.manual_seed(0)
    model = transformers.WhisperModel(transformers.WhisperConfig(**WHISPER))
    model.save_pretrained(folder)
    preprocess = create_encoder(f"audio:{folder}").preprocess
    head = torch.nn.Linear(WHISPER["d_model"], len(TONES))
    optimizer = torch.optim.AdamW([*model.encoder.parameters(), *head.parameters()], lr=2e-3)
    random = np.random.default_rng(1)
    for _ in range(steps):
        numbers = random.integers(len(TONES), size=batch)
        clips = [preprocess.item((tone(int(number), random).astype(np.float32), RATE)) for number in numbers]
        hidden_BLD = model.encoder(preprocess.finish(preprocess.batch(clips))["mel"]).last_hidden_state
        loss = torch.nn.functional.cross_entropy(head(hidden_BLD.mean(dim=1)), torch.from_numpy(numbers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder
