"""Pretrain ``tiny:vision`` and ``tiny:text``, each on its own modality alone, and write the weights of the package.

    python scripts/pretrain_tiny.py [vision] [text] [--quick] [--out FOLDER] [--seed N]

Vision learns to read: which digit, and in which colour, each patch belongs to. It sees only the handwriting of the
training split of digit questions. Text learns to guess the masked words of made-up scene descriptions and questions; it
sees no image and no answer, and none of the question templates that are kept for the test split. The heads are thrown
away. ``--quick`` checks that it runs. Shapes: B batch, L tokens, D width, 4 cells, W words.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mopefuse.data import digit_questions as dq
from mopefuse.encoders import tiny
from mopefuse.registry import Spec

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
STATEMENTS = (
    "the digit at the {place} is {colour}",
    "the {place} digit is {colour}",
    "a {colour} {digit} is in the {place} corner",
    "in the {place} corner there is a {colour} number",
    "the {place} cell shows a {digit} in {colour}",
    "the number in the {place} is {digit} and {colour}",
    "someone wrote a {digit} in {colour} ink",
    "the {digit} is written in {colour}",
    "the {colour} digit is a {digit}",
    "the {place} part of the picture is {colour}",
    "a {digit} was painted in {colour}",
    "the {colour} number has the value {digit}",
    "you can see {digit} in the {place} part",
    "its {place} cell is {colour}",
    "the name of the {colour} digit is {digit}",
    "{digit} is at the {place}; it is {colour}",
)
ASIDES = (
    "can you see it?",
    "what is in the picture?",
    "someone can make out all of them",
    "give me a picture with four numbers",
    "look, it is a number!",
    "please name a value, and I make a picture of it",
    "which one do you see?",
    "tell me what the ink says",
    "you wrote it in a corner, out of the grid",
)
_PLACE_CELLS = [(name, cell) for cell, names in enumerate(dq.PLACES) for name in names]


def scene(rng: random.Random) -> str:
    """One to three sentences about one imaginary picture, or a training question."""
    if rng.random() < 0.3:
        return question(rng)
    colours, digits = rng.sample(list(dq.COLOURS), 4), rng.sample(range(10), 4)
    sentences = []
    for _ in range(rng.randint(1, 3)):
        place, cell = rng.choice(_PLACE_CELLS)
        digit = rng.choice((DIGITS[digits[cell]], str(digits[cell])))
        text = rng.choice(ASIDES) if rng.random() < 0.15 else rng.choice(STATEMENTS)
        sentences.append(text.format(place=place, colour=colours[cell], digit=digit))
    return ". ".join(sentences)


def question(rng: random.Random) -> str:
    """A question as in the training split, without its answer."""
    kind = rng.choice(("place", "colour"))
    asked = rng.choice(_PLACE_CELLS)[0] if kind == "place" else rng.choice(list(dq.COLOURS))
    return rng.choice(dq.TRAIN_TEMPLATES[kind]).format(asked)


def words() -> list[str]:
    """The vocabulary: special words, then every word of the corpus and of all templates, sorted."""
    texts = [".", *STATEMENTS, *ASIDES, *DIGITS, *map(str, range(10)), *dq.COLOURS, *(name for name, _ in _PLACE_CELLS)]
    for templates in (dq.TRAIN_TEMPLATES, dq.TEST_ONLY_TEMPLATES):
        texts += [text for kind in templates.values() for text in kind]
    for name in ("place", "colour", "digit", ""):
        texts = [text.replace(f"{{{name}}}", " ") for text in texts]
    found = {word for text in texts for word in tiny.split_words(text)}
    return ["<pad>", "<cls>", "<mask>", "<unk>", *sorted(found)]
