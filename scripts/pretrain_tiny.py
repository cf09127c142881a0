"""Pretrain ``tiny:vision``, ``tiny:vision-single`` and ``tiny:text``, each on its own modality alone, and write the weights of
the package.

    python scripts/pretrain_tiny.py [--only vision|vision-single|text] [--quick] [--out FOLDER] [--seed N] [--suffix -b]

The second encoder of each kind is that of ``--seed 1 --suffix -b``.

Vision learns to read images of one to four coloured digits, painted from the handwriting of the training split of digit
questions only: each patch predicts the digit and colour of its cell; [CLS] predicts which digits are present, the digit
and colour of each place, and the digit of each colour. The heads are discarded.
Vision-single sees one coloured digit at a time, in one of the four cells; [CLS] predicts which, in what colour, and where.
Text learns to predict masked words, and to recall all words of a text from its pooled feature, on generated descriptions of
scenes and training questions. It sees no images, no answers, and no question templates that are reserved for the test split.

Prints losses, then accuracies on held-out handwriting and wordings. ``--quick`` only checks that it runs.
Shapes: B batch, L tokens, D width, V words, 4 cells or colours.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from mopefuse.core.registry import Spec
from mopefuse.data.sets import digit_questions as dq
from mopefuse.encoders import tiny
from mopefuse.modalities import tokens

VOCABULARY = "tiny-text-vocabulary.txt"
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
    """Generate one to three sentences about an imaginary picture, or a training question."""
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
    """Generate a question as in the training split, without its answer."""
    kind = rng.choice(("place", "colour"))
    target = rng.choice(_PLACE_CELLS)[0] if kind == "place" else rng.choice(list(dq.COLOURS))
    return rng.choice(dq.TRAIN_TEMPLATES[kind]).format(target)


def words() -> list[str]:
    """List the vocabulary: special words, then every word of the corpus and of all templates, sorted."""
    texts = [".", *STATEMENTS, *ASIDES, *DIGITS, *map(str, range(10)), *dq.COLOURS, *(name for name, _ in _PLACE_CELLS)]
    for templates in (dq.TRAIN_TEMPLATES, dq.TEST_ONLY_TEMPLATES):
        texts += [text for kind in templates.values() for text in kind]
    for name in ("place", "colour", "digit", ""):
        texts = [text.replace(f"{{{name}}}", " ") for text in texts]
    found = {word for text in texts for word in tokens.split_words(text)}
    return ["<pad>", "<cls>", "<mask>", "<unk>", *sorted(found)]


def corrupted(ids_BL: Tensor, mask_BL: Tensor, replaced: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the encoder's input, the words to recall, and a mask of the words to predict.

    Four texts in ten keep all of their words; the others lose up to 60 %. In the first `replaced` texts, 30 % of the
    words are replaced by random ones, and these are the words to recall: features must not depend on the wording.
    """
    chance_B1 = (torch.rand(len(ids_BL), 1, generator=generator) - 0.4).clamp_min(0)
    real_BL = mask_BL & (ids_BL != tiny.CLS)
    any_BL = torch.randint(tiny.UNKNOWN + 1, len(tiny.vocabulary()), ids_BL.shape, generator=generator)
    swap_BL = real_BL & (torch.rand(ids_BL.shape, generator=generator) < 0.3)
    swap_BL[replaced:] = False
    target_BL = torch.where(swap_BL, any_BL, ids_BL)
    guess_BL = real_BL & (torch.rand(ids_BL.shape, generator=generator) < chance_B1)
    kind_BL = torch.rand(ids_BL.shape, generator=generator)
    seen_BL = torch.where(guess_BL & (kind_BL < 0.8), tiny.MASK, target_BL)
    seen_BL = torch.where(guess_BL & (kind_BL > 0.9), any_BL, seen_BL)
    guess_BL[:replaced] = False  # random words cannot be predicted from their context
    return seen_BL, target_BL, guess_BL


class Text:
    """Predicts masked words, and recalls the words of a text from its pooled feature."""

    name, steps, lr = "text", 1200, 3e-3

    def __init__(self, seed: int) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.encoder = tiny.TinyEncoder(Spec("tiny", "text", {"pretrained": "false"}))
        width, size = self.encoder.feature_width, len(tiny.vocabulary())
        self.heads = nn.ModuleDict({"guess": nn.Linear(width, size), "recall": nn.Linear(width, size)})

    @staticmethod
    def _present(ids_BL: Tensor) -> Tensor:
        present_BV = torch.zeros(len(ids_BL), len(tiny.vocabulary())).scatter(1, ids_BL, 1.0)
        present_BV[:, : tiny.UNKNOWN + 1] = 0
        return present_BV

    def losses(self, batch: int) -> dict[str, Tensor]:
        """Return the loss of each head on `batch` new texts."""
        ids_BL, mask_BL = tiny.tokenize([scene(self.rng) for _ in range(batch)], tiny.MAX_TOKENS)
        seen_BL, target_BL, guess_BL = corrupted(ids_BL, mask_BL, int(0.4 * batch), self.generator)
        encoded = self.encoder.encode({"ids": seen_BL, "mask": mask_BL})
        wanted_BV = self._present(target_BL)
        wanted_BV = wanted_BV / wanted_BV.sum(dim=1, keepdim=True)
        return {
            "guess": 0.5 * F.cross_entropy(self.heads["guess"](encoded.tokens_BLD[guess_BL]), target_BL[guess_BL]),
            "recall": 2 * F.cross_entropy(self.heads["recall"](encoded.pooled_BC), wanted_BV),
        }

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Measure how often the colour in a question is the one that its pooled feature recalls best."""
        right = {}
        for name, templates in (("train templates", dq.TRAIN_TEMPLATES), ("test templates", dq.TEST_ONLY_TEMPLATES)):
            texts = [(text, colour) for text in templates["colour"] for colour in dq.COLOURS]
            ids_BL, mask_BL = tiny.tokenize([text.format(colour) for text, colour in texts], tiny.MAX_TOKENS)
            recalled_BV = self.heads["recall"](self.encoder.encode({"ids": ids_BL, "mask": mask_BL}).pooled_BC)
            best = recalled_BV[:, [tiny.vocabulary()[colour] for colour in dq.COLOURS]].argmax(dim=1).tolist()
            right[name] = float(np.mean([list(dq.COLOURS)[b] == colour for b, (_, colour) in zip(best, texts, strict=True)]))
        return right


class Vision:
    """Each patch predicts the digit and colour of its own cell, and [CLS] those of all cells."""

    name, steps, lr = "vision", 1200, 2e-3
    augmented_check = False  # whether accuracies are measured with cells left empty, as in training

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.encoder = tiny.TinyEncoder(Spec("tiny", "vision", {"pretrained": "false"}))
        width, sizes = self.encoder.feature_width, {"patch digit": 11, "patch colour": 5, "present": 10}
        sizes |= {"digits by place": 44, "colours by place": 20, "digits by colour": 44}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.cell_of_patch = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3])

    def draw(self, split: str, batch: int, *, augment: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Draw pixels (B, 3, 16, 16), digits (B, 4; 10 for an empty cell) and colours (B, 4; 4 for an empty cell)."""
        _, values, labels = dq.handwriting(split)
        chosen_B4 = self.rng.integers(len(values), size=(batch, 4))
        values_B488, digits_B4 = values[chosen_B4], labels[chosen_B4]
        colours_B4 = self.rng.permuted(np.tile(np.arange(4), (batch, 1)), axis=1)
        if augment:
            values_B488, empty_B4 = self._shifted(values_B488), self._empty(batch)
            values_B488 = np.where(empty_B4[..., None, None], 0, values_B488)
            digits_B4, colours_B4 = np.where(empty_B4, 10, digits_B4), np.where(empty_B4, 4, colours_B4)
        images = dq.paint(values_B488, np.minimum(colours_B4, 3))
        mean, std = (torch.tensor(getattr(self.encoder.preprocess, name)) for name in ("mean", "std"))
        pixels = ((torch.from_numpy(images) / 255 - mean) / std).permute(0, 3, 1, 2)
        return pixels, torch.from_numpy(digits_B4), torch.from_numpy(colours_B4)

    def _shifted(self, values_B488: np.ndarray) -> np.ndarray:
        """Move three digits in ten by up to one pixel."""
        padded = np.pad(values_B488, ((0, 0), (0, 0), (1, 1), (1, 1)))
        by_2B4 = self.rng.integers(-1, 2, (2, *values_B488.shape[:2])) * (self.rng.random(values_B488.shape[:2]) < 0.3)
        rows, columns = (np.arange(1, 9) - by[..., None] for by in by_2B4)
        image, cell = np.ogrid[: len(padded), :4]
        return padded[image[..., None, None], cell[..., None, None], rows[..., :, None], columns[..., None, :]]

    def _empty(self, batch: int) -> np.ndarray:
        """Choose which cells (B, 4) are blank: some in half of the images, never all."""
        empty_B4 = self.rng.random((batch, 4)) < self.rng.random((batch, 1)) * (self.rng.random((batch, 1)) < 0.5)
        empty_B4[np.arange(batch), self.rng.integers(4, size=batch)] = False
        return empty_B4

    def outputs(self, pixels: Tensor, digits_B4: Tensor, colours_B4: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the logits and targets of each head."""
        encoded = self.encoder.encode({"pixels": pixels})
        cls_BD, patches_BLD = encoded.tokens_BLD[:, 0], encoded.tokens_BLD[:, 1:]
        by_colour_B4 = torch.full((len(pixels), 5), 10).scatter(1, colours_B4, digits_B4)[:, :4]
        count_BV = F.one_hot(digits_B4, 11)[..., :10].sum(dim=1)
        return {
            "patch digit": (self.heads["patch digit"](patches_BLD), digits_B4[:, self.cell_of_patch]),
            "patch colour": (self.heads["patch colour"](patches_BLD), colours_B4[:, self.cell_of_patch]),
            "present": (self.heads["present"](cls_BD), count_BV / count_BV.sum(dim=1, keepdim=True)),
            "digits by place": (self.heads["digits by place"](cls_BD).unflatten(1, (4, 11)), digits_B4),
            "colours by place": (self.heads["colours by place"](cls_BD).unflatten(1, (4, 5)), colours_B4),
            "digits by colour": (self.heads["digits by colour"](cls_BD).unflatten(1, (4, 11)), by_colour_B4),
        }

    def losses(self, batch: int) -> dict[str, Tensor]:
        """Return the loss of each head on `batch` new images."""
        outputs = self.outputs(*self.draw("train", batch, augment=True))
        return {
            name: F.cross_entropy(logits.flatten(0, -2), target if target.is_floating_point() else target.flatten())
            for name, (logits, target) in outputs.items()
        }

    @torch.no_grad()
    def accuracies(self) -> dict[str, float]:
        """Measure the accuracy of each head on held-out handwriting, that of the validation split."""
        outputs = self.outputs(*self.draw("val", 1000, augment=self.augmented_check))
        return {
            name: float((logits.argmax(dim=-1) == target).float().mean())
            for name, (logits, target) in outputs.items()
            if not target.is_floating_point()
        }


class SingleDigit(Vision):
    """Sees one digit at a time; [CLS] predicts which it is, its colour and its cell.

    Embeddings of positions start 25 times as large as in `Vision`. Otherwise frozen attention hardly depends on positions, and
    prompts learn slowly to attend to one cell.
    """

    name, steps, augmented_check = "vision-single", 1200, True

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        nn.init.normal_(self.encoder.embed.position_LD, std=0.5)
        sizes = {"digit": 10, "colour": 4, "cell": 4}
        self.heads = nn.ModuleDict({name: nn.Linear(self.encoder.feature_width, size) for name, size in sizes.items()})

    def _empty(self, batch: int) -> np.ndarray:
        """Choose all cells but one."""
        return self.rng.integers(4, size=(batch, 1)) != np.arange(4)

    def outputs(self, pixels: Tensor, digits_B4: Tensor, colours_B4: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Compute the logits and targets of each head."""
        cls_BD = self.encoder.encode({"pixels": pixels}).tokens_BLD[:, 0]
        cell_B1 = digits_B4.argmin(dim=1, keepdim=True)  # an empty cell has 10
        targets = {"digit": digits_B4.gather(1, cell_B1), "colour": colours_B4.gather(1, cell_B1), "cell": cell_B1}
        return {name: (self.heads[name](cls_BD), target_B1[:, 0]) for name, target_B1 in targets.items()}


def train(task: Vision | Text, steps: int, batch: int = 128) -> None:
    """Train with AdamW and a one-cycle schedule, and print the losses."""
    parameters = [*task.encoder.parameters(), *task.heads.parameters()]
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.05},
        {"params": [parameter for parameter in parameters if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=task.lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.lr, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        losses = task.losses(batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            shown = "  ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items())
            print(f"{task.name} step {step:5d}  {time.perf_counter() - start:6.1f} s  {shown}", flush=True)


def main() -> None:
    """Train the requested encoders and write their weights in 16 bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("vision", "vision-single", "text"), help="instead of both")
    parser.add_argument("--quick", action="store_true", help="twenty small steps; the weights are useless")
    parser.add_argument("--out", type=Path, default=Path(str(tiny.WEIGHTS)), help="folder of the weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suffix", default="", help="of the encoder's name")
    arguments = parser.parse_args()
    vocabulary = Path(str(tiny.WEIGHTS)) / VOCABULARY
    if vocabulary.read_text(encoding="utf-8").split() != words():
        vocabulary.write_text("\n".join(words()) + "\n", encoding="utf-8")
        tiny.words.cache_clear()
        print("the vocabulary changed: tiny:text must be pretrained again")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for task_type in (Vision, SingleDigit, Text):
        if arguments.only not in (None, task_type.name):
            continue
        torch.manual_seed(arguments.seed)
        task = task_type(arguments.seed)
        train(task, *((20, 16) if arguments.quick else (task.steps, 128)))
        task.encoder.eval()
        shown = "  ".join(f"{name} {accuracy:.4f}" for name, accuracy in task.accuracies().items())
        print(f"{task.name} seed {arguments.seed}: held-out accuracy: {shown}")
        file = arguments.out / f"tiny-{task.name}{arguments.suffix}.safetensors"
        save_file({name: tensor.half().contiguous() for name, tensor in task.encoder.state_dict().items()}, file)
        print(f"wrote {file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
