"""The training loop: steps, validations, checkpoints.

Everything random in a step (dropout, router noise) is a function of (seed, step, process); order and augmentation are
functions of (seed, epoch, index). So a resumed run needs no generator state to equal an uninterrupted one to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import device as devices
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json, read_tensors, write_atomically, write_tensors
from mopefuse.data.base import Batch, DataSet
from mopefuse.data.collate import Key, epoch_batches, seed_of, share
from mopefuse.errors import Interrupted, NumericError
from mopefuse.evaluation.answers import Evaluation, judge, judge_tuned
from mopefuse.evaluation.split import answers_to, prepared
from mopefuse.fusion.base import Fusion, Output
from mopefuse.metrics import classification as metrics
from mopefuse.metrics.gates import selected_metric
from mopefuse.prompts.experts import importance_loss
from mopefuse.prompts.usage import statistics
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import thresholds_of
from mopefuse.training.losses import balanced_weights, classification_loss
from mopefuse.training.optim import factor, load_optimizer_state, make_optimizer, optimizer_state, set_learning_rate
from mopefuse.training.stop_request import StopRequest

_COLLAPSED = 0.75  # share of unused experts that is worth a warning


@dataclass
class Progress:
    """Where training stands: what a checkpoint holds beside tensors."""

    step: int = 0
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # validations since the best
    seconds: float = 0.0
    thresholds: list[float] | None = None  # tuned at the last validation
    validated: int | None = None  # step of the last validation


class Start(NamedTuple):
    """Where training begins if not from scratch: a swapped model.

    state: of the model's own. fresh: names of parameters that nothing was learned for; with `warm_up`, only they learn in
    the first epochs, so many.
    """

    state: dict[str, Tensor]
    fresh: tuple[str, ...] = ()
    warm_up: int = 0


class Listener:
    """What training tells whoever watches. Nothing here prints."""

    def notice(self, text: str) -> None:
        """Something worth a line."""

    def rows(self, counts: dict[str, int]) -> None:
        """The data were read: how many rows each split has."""

    def reading(self, what: str, done: int, total: int) -> None:
        """So much is done of something that is computed once and kept."""

    def step(self, progress: Progress, total: int, loss: float, lr: float) -> None:
        """An optimiser step was made."""

    def evaluated(self, progress: Progress, found: dict[str, float], *, best: bool) -> None:
        """A validation was made."""


class Trainer:
    """One training run in one process (of possibly several).

    Args:
        model: on `device`. run: prepared and started; only the main process writes to it.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSet,
        model: Fusion,
        run: RunFolder,
        device: torch.device,
        listener: Listener,
    ) -> None:
        self.config, self.data, self.model, self.run, self.device, self.listener = (
            config, data, model, run, device, listener,
        )  # fmt: skip
        told: dict[str, Any] = {"notice": listener.notice, "reading": listener.reading}
        self.train_samples = prepared(model, data, "train", config, device, training=True, **told)
        self.val_samples = prepared(model, data, "val", config, device, **told)
        self.weights: Tensor | None = None
        if config.train.class_weights == "balanced":
            counts_N = data.sparse_targets("train").counts()
            weights = balanced_weights(counts_N, len(self.train_samples), multi_label=data.multi_label)
            self.weights = weights.to(device)
        self.per_epoch = math.ceil(len(self.train_samples) / config.train.batch_size)
        steps = min(config.train.epochs * self.per_epoch, config.train.max_steps or 10**18)
        self.total = 0 if model.closed_form else steps
        self.eval_at = _evaluation_steps(self.total, self.per_epoch, config.train.evals_per_epoch)
        self.names = {id(parameter): name for name, parameter in model.ours().items()}
        self.optimizer = make_optimizer(model, config.train)
        self.progress = Progress()
        self.metric = selected_metric(multi_label=data.multi_label)
        self._forward: Any = devices.compiled(model) if config.train.compile else model
        self._collapse_told = False
        self._alone: tuple[frozenset[str], int] | None = None

    # -- resume and start

    def warm_up(self, names: Iterable[str], epochs: int) -> None:
        """Let only these parameters learn in the first epochs."""
        self._alone = (frozenset(names), epochs * self.per_epoch) if epochs else None

    def begin(self, state: Mapping[str, Tensor]) -> None:
        """Start from a model's own state instead of from scratch; it is validated and published as step 0."""
        self.model.load_own_state(state, where="step 0")
        self._validate()

    def restore(self) -> bool:
        """Continue from the newest whole checkpoint; False if there is none."""
        found = distributed.on_main(self.run.latest)
        if found is None:
            return False
        path, manifest = found
        if manifest["step"] < self.run.steps()[-1]:
            self.listener.notice(f"the checkpoint step-{self.run.steps()[-1]} is damaged; step-{manifest['step']} is used")
        self.model.load_own_state(read_tensors(path / "weights.safetensors"), where=str(path))
        load_optimizer_state(self.optimizer, self.names, read_tensors(path / "optimizer.safetensors"), where=str(path))
        self.progress = Progress(**manifest["progress"])
        step = self.progress.step
        validated = manifest["progress"].get("validated", step) == step  # earlier versions do not say

        def rewind() -> None:
            self.run.rewind_log(step, validated=validated)
            if self.progress.best is not None:
                self.run.set_best(self.progress.best_step)

        distributed.on_main(rewind)
        return True

    def save(self, *, best: bool = False) -> None:
        """Publish a checkpoint of this step, and name it the best if it is."""

        def write(folder: Path) -> None:
            write_tensors(folder / "weights.safetensors", self.model.own_state())
            write_tensors(folder / "optimizer.safetensors", optimizer_state(self.optimizer, self.names))

        def publish() -> None:
            self.run.save(self.progress.step, write, {"progress": asdict(self.progress)})
            if best:
                self.run.set_best(self.progress.step)

        distributed.on_main(publish)

    # -- the loop

    def fit(self, stop: StopRequest) -> None:
        """Train until the last step, the end of patience, or a request to stop; where it ends, the model is validated.

        Raises:
            Interrupted: asked to stop; a checkpoint of the last step is published.
            NumericError: a loss or gradient is not finite; nothing of that step was applied.
        """
        started = time.perf_counter() - self.progress.seconds
        loader = self.train_samples.batches(_Keys(self), pin=self.device.type == "cuda")
        for epoch, global_batch in self._schedule():
            if self._out_of_patience():
                break
            self.model.train()
            batch = next(loader).to(self.device)
            loss, lr = self._step(batch, global_batch)
            self.progress.step += 1
            self.progress.seconds = time.perf_counter() - started
            self.listener.step(self.progress, self.total, loss, lr)
            self._log_step(epoch, loss, lr)
            if self.progress.step in self.eval_at:
                self._validate()
            elif self.config.train.checkpoint_every and self.progress.step % self.config.train.checkpoint_every == 0:
                self.save()
            signal_number = distributed.largest(stop.signal_number, self.device)
            if signal_number:
                self.save()
                raise Interrupted(
                    signal_number,
                    f"at step {self.progress.step} of {self.total}, its checkpoint is published",
                    fix="continue with --resume",
                )
        if self.progress.validated != self.progress.step:
            self._validate()

    def _schedule(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, global batch) of each step still to make."""
        step = self.progress.step
        while step < self.total:
            epoch, first = divmod(step, self.per_epoch)
            batches = epoch_batches(self.config.seed, epoch, len(self.train_samples), self.config.train.batch_size)
            for global_batch in batches[first : first + self.total - step]:
                yield epoch, global_batch
                step += 1

    def _step(self, batch: Batch, global_batch: list[int]) -> tuple[float, float]:
        config = self.config
        scale = factor(config.train, self.progress.step, self.total)
        set_learning_rate(self.optimizer, scale)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(seed_of(config.seed, self.progress.step, distributed.rank()))
        # A process without a share of a small last batch computes a sample of it that counts for nothing.
        counts = 1.0 if share(global_batch, distributed.rank(), distributed.world_size()) else 0.0
        count = min(config.train.accumulate, max(1, len(global_batch) // distributed.world_size()))
        parts = [batch.part(number, count) for number in range(count)] if count > 1 else [batch]
        whole_LK = self._whole_load(parts, counts) if count > 1 else None
        loss = torch.zeros((), device=self.device)
        for part in parts:
            with devices.autocast(config.train.precision, self.device):
                output = self._forward(part)
            loss_of_part = classification_loss(output, part, multi_label=self.data.multi_label, weights=self.weights)
            task = counts * loss_of_part / len(global_batch)
            balance = self._balance(output, counts, whole_LK)
            (task + balance).backward()
            loss += task.detach() + balance.detach() / (len(parts) * distributed.world_size())
        ours = self.model.ours()
        if self._alone is not None and self.progress.step < self._alone[1]:
            for name in ours.keys() - self._alone[0]:
                ours[name].grad = None
        distributed.sum_gradients(ours.values())
        norm = torch.nn.utils.clip_grad_norm_(ours.values(), config.train.clip)
        value = float(distributed.total(loss))
        lr = float(self.optimizer.param_groups[0]["lr"])
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            self._refuse_step(value, float(norm), lr, global_batch)
        self.optimizer.step()
        return value, lr

    @torch.no_grad()
    def _whole_load(self, parts: list[Batch], counts: float) -> Tensor | None:
        """Routing summed over the global batch, before its parts are computed one by one with gradients."""
        loads = []
        for part in parts if self.config.router.importance_weight else ():
            with devices.autocast(self.config.train.precision, self.device):
                load_LK = self._forward(part).load_LK
            if load_LK is None:
                return None
            loads.append(load_LK)
        return distributed.summed(counts * torch.stack(loads).sum(dim=0)) if loads else None

    def _balance(self, output: Output, counts: float, whole_LK: Tensor | None) -> Tensor:
        """Weighted importance loss over the global batch.

        Args:
            whole_LK: load of the global batch, where `output` is of a part of this process's share only; the loss is
                that of the whole, its gradient that of the part.
        """
        if output.load_LK is None or not self.config.router.importance_weight:
            return torch.zeros((), device=self.device)
        load_LK = counts * output.load_LK
        load_LK = distributed.total(load_LK) if whole_LK is None else whole_LK + load_LK - load_LK.detach()
        return self.config.router.importance_weight * importance_loss(load_LK, self.config.router.importance_threshold)

    def _refuse_step(self, loss: float, norm: float, lr: float, global_batch: list[int]) -> None:
        rows = self.data.splits["train"].rows
        ids = [rows[index].id for index in global_batch]
        step = self.progress.step + 1
        if distributed.is_main():
            facts = {"step": step, "loss": loss, "gradient_norm": norm, "lr": lr, "ids": ids}
            write_atomically(self.run.path / "nonfinite.json", dump_json(facts))
        shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
        raise NumericError(
            1,
            f"loss is {loss}, gradient norm {norm} at step {step} (lr {lr:g}, batch ids {shown})",
            where=str(self.run.path / "nonfinite.json"),
            fix="lower train.lr, or look at those samples",
        )

    def _log_step(self, epoch: int, loss: float, lr: float) -> None:
        if distributed.is_main() and (self.progress.step % self.config.train.log_every == 0 or self.progress.step == 1):
            self.run.log({"step": self.progress.step, "epoch": epoch, "loss": loss, "lr": lr})

    # -- validation

    def _validate(self) -> None:
        answers = answers_to(self.model, self.data, "val", self.config, self.device, samples=self.val_samples)
        if self.data.multi_label and self.config.train.threshold == "tuned":
            judged, self.progress.thresholds = judge_tuned(answers, self.data, "val", self.run.path)
        else:
            threshold = self.config.train.threshold
            judged = judge(answers, self.data, "val", metrics.THRESHOLD if threshold == "tuned" else threshold)
        found = judged.metrics
        routing = statistics(judged.load_LK) if judged.load_LK is not None else None
        value = found[self.metric]
        best = not math.isnan(value) and (self.progress.best is None or value > self.progress.best)
        self.progress.waited = 0 if best else self.progress.waited + 1
        if best:
            self.progress.best, self.progress.best_step = value, self.progress.step
        self.progress.validated = self.progress.step
        line = {"step": self.progress.step, "val": found, **({"routing": routing} if routing else {})}
        distributed.on_main(lambda: self.run.log(line))
        self.save(best=best)
        if routing and routing["unused_share"] > _COLLAPSED and not self._collapse_told:
            self._collapse_told = True
            self.listener.notice(
                f"router collapse: {100 * routing['unused_share']:.0f} % of the experts are unused, "
                f"entropy {routing['entropy']:.2f} of 1"
            )
        self.listener.evaluated(self.progress, found, best=best)

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.progress.waited >= patience

    def _selected(self) -> tuple[Path, dict[str, Any]]:
        """The selected checkpoint, verified, with its manifest; the same in all processes."""
        found: tuple[Path, dict[str, Any]] = distributed.on_main(lambda: self.run.checkpoint(self.config.train.select))
        return found

    def thresholds(self) -> metrics.Thresholds:
        """Those of the selected checkpoint."""
        return thresholds_of(self._selected()[1], self.config)

    def test(self) -> Evaluation | None:
        """Load the selected checkpoint and evaluate it on the test split, if there is one; predictions are written."""
        path, _ = self._selected()
        self.model.load_own_state(read_tensors(path / "weights.safetensors"), where=str(path))
        if "test" not in self.data.splits:
            return None
        samples = prepared(self.model, self.data, "test", self.config, self.device, reading=self.listener.reading)
        answers = answers_to(self.model, self.data, "test", self.config, self.device, samples=samples)
        return judge(answers, self.data, "test", self.thresholds(), predictions=self.run.predictions_file)


class _Keys:
    """The samples of this process for each step still to make; the loader walks through it once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.total - self._trainer.progress.step

    def __iter__(self) -> Iterator[list[Key]]:
        rank, world = distributed.rank(), distributed.world_size()
        for epoch, global_batch in self._trainer._schedule():
            mine = share(global_batch, rank, world) or global_batch[:1]
            yield [(epoch, index) for index in mine]


def _evaluation_steps(total: int, per_epoch: int, per_epoch_evaluations: int) -> set[int]:
    """Steps after which to validate: evenly within each epoch, and after the last step."""
    epochs = math.ceil(total / per_epoch)
    at = {
        epoch * per_epoch + math.ceil(per_epoch * (k + 1) / per_epoch_evaluations)
        for epoch in range(epochs)
        for k in range(per_epoch_evaluations)
    }
    return {step for step in at if step <= total} | ({total} if total else set())
