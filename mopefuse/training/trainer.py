"""The training loop: steps, validations, checkpoints.

Everything random in a step (dropout, router noise) depends only on (seed, step, process); sample order and augmentation
depend only on (seed, epoch, index). A resumed run therefore needs no generator state to match an uninterrupted one bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mopefuse.config.schema import RunConfig
from mopefuse.core import distributed
from mopefuse.core.artifact import dump_json
from mopefuse.core.atomic_files import write_atomically
from mopefuse.core.error_codes import ConfigCode, NumericCode
from mopefuse.core.stop_request import StopRequest
from mopefuse.core.tensor_files import read_tensors, write_tensors
from mopefuse.data.base import Batch, DataSet
from mopefuse.data.collate import Key, derive_seed, epoch_batches, process_share
from mopefuse.errors import ConfigError, Interrupted, NumericError
from mopefuse.evaluation.scoring import Evaluation, score, score_tuned
from mopefuse.evaluation.split import model_outputs, prepare_samples
from mopefuse.fusion.base import Fusion
from mopefuse.metrics.names import LOWER_IS_BETTER
from mopefuse.metrics.significance import LASTING, difference_in_errors, exceeds_noise
from mopefuse.metrics.thresholds import THRESHOLD, Thresholds
from mopefuse.prompts.usage import statistics
from mopefuse.runs.folder import RunFolder
from mopefuse.runs.load import get_thresholds
from mopefuse.tasks.classification import Classification
from mopefuse.training.duration import Duration, evaluation_steps
from mopefuse.training.listener import Listener, Progress
from mopefuse.training.optimizer import (
    compute_lr_factor,
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    set_learning_rate,
)
from mopefuse.training.start_layer import SPLITS, PrefixTables
from mopefuse.training.step import Backward

_WEIGHTS, _OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
_START_SCORES, _TRAIN_FROM = "start-scores.safetensors", "train-from.safetensors"
_LESS = 0.999  # factor by which a loss must fall to count as an improvement
_COLLAPSED = 0.75  # share of unused experts above which to warn of a router collapse


class Start(NamedTuple):
    """Initial weights of a run that does not start from scratch.

    Args:
        state: the trainable state of the model.
        fresh: names of the parameters that are new, not taken from a trained model.
        warm_up: number of initial epochs in which only `fresh` parameters are trained.
        train_from: tensors whose training starts from these values instead of those in `state`, which is step 0.
        is_baseline: whether a later step must exceed step 0 on validation by more than noise to be selected.
    """

    state: dict[str, Tensor]
    fresh: tuple[str, ...] = ()
    warm_up: int = 0
    train_from: Mapping[str, Tensor] = {}
    is_baseline: bool = False


class WarmUp(NamedTuple):
    """The parameters that learn in the first steps, while all others stay unchanged."""

    names: frozenset[str]
    steps: int


class Trainer:
    """The training loop of a run on one process of possibly several.

    Args:
        model: on `device`.
        run: a started run folder; only the main process writes to it.
        prefixes: outputs of early layers from which training and its validation start.
    """

    def __init__(
        self,
        config: RunConfig,
        data: DataSet,
        model: Fusion,
        run: RunFolder,
        device: torch.device,
        listener: Listener,
        prefixes: PrefixTables | None = None,
    ) -> None:
        self.config, self.data, self.model = config, data, model
        self.run, self.device, self.listener = run, device, listener
        # 1. Samples, with features of frozen encoders computed or read from the cache.
        callbacks: dict[str, Any] = {"notice": listener.on_notice, "reading": listener.on_data_progress}
        train, val = ((prefixes or {}).get(split) for split in SPLITS)
        self.train_samples = prepare_samples(model, data, "train", config, device, training=True, prefixes=train, **callbacks)
        self.val_samples = prepare_samples(model, data, "val", config, device, prefixes=val, **callbacks)
        # 2. How long to train, and when to validate.
        self.duration = Duration.from_config(config.train, len(self.train_samples))
        self.per_epoch = self.duration.per_epoch
        self.total = 0 if model.closed_form else self.duration.total
        self.eval_at = evaluation_steps(self.total, self.per_epoch, config.train.evals_per_epoch)
        # 3. Loss, gradients and optimizer.
        self.class_weights = self._class_weights()
        self._backward = Backward(model, config, device, task=data.task, weights=self.class_weights)
        # collected once, because collecting them takes as long as a training step of a small head
        self._parameters = model.named_trainable_parameters()
        self.names = {id(parameter): name for name, parameter in self._parameters.items()}
        self.optimizer = make_optimizer(model, config.train)
        # 4. The state of training.
        self.progress = Progress()
        self.metric = data.task.selecting_metric(config.train.select_by)
        self._sign = -1 if self.metric in LOWER_IS_BETTER else 1
        self._warned_of_collapse = False
        self._start_S: Tensor | None = None  # after a warm start: score of each validation sample at step 0
        self._train_from: dict[str, Tensor] = {}
        self._warm_up: WarmUp | None = None

    def _class_weights(self) -> Tensor | None:
        if self.config.train.class_weights != "balanced":
            return None
        task, counts_N = self.data.task, self.data.sparse_targets("train").counts()
        assert isinstance(task, Classification), "other tasks refuse the setting"
        return task.class_weights(counts_N, len(self.train_samples)).to(self.device)

    # -- start and resume

    def warm_up(self, names: Iterable[str], epochs: int) -> None:
        """Train only these parameters in the first epochs."""
        self._warm_up = WarmUp(frozenset(names), epochs * self.per_epoch) if epochs else None

    def begin(self, start: Start) -> None:
        """Validate and publish initial weights as step 0."""
        self.model.load_trainable_state_dict(start.state, where="step 0")
        self._train_from = dict(start.train_from)
        self._validate(baseline=start.is_baseline)
        self._leave_step_0()

    def _leave_step_0(self) -> None:
        """Load the weights from which training starts, if they are not those of step 0."""
        if self._train_from:
            self.model.load_trainable_state_dict(self.model.trainable_state_dict() | self._train_from, where="step 0")
            self._train_from = {}

    def restore(self) -> bool:
        """Continue from the newest undamaged checkpoint; False if there are no checkpoints."""
        found = distributed.run_on_main(self._read_latest)
        if found is None:
            return False
        path, manifest, newest, tensors = found
        if manifest["step"] < newest:
            self.listener.on_notice(f"the checkpoint step-{newest} is damaged; step-{manifest['step']} is used")
        self.model.load_trainable_state_dict(tensors[_WEIGHTS], where=str(path))
        load_optimizer_state(self.optimizer, self.names, tensors[_OPTIMIZER], where=str(path))
        if _START_SCORES in tensors:
            self._start_S = tensors[_START_SCORES]["score_S"]
        if _TRAIN_FROM in tensors:
            self._train_from = tensors[_TRAIN_FROM]
            self._leave_step_0()
        self.progress = Progress(**manifest["progress"])
        step = self.progress.step
        validated = self.progress.validated == step

        def rewind() -> None:
            self.run.rewind_log(step, validated=validated)
            if self.progress.best is not None:
                self.run.set_best(self.progress.best_step)

        distributed.run_on_main(rewind)
        return True

    def _read_latest(self) -> tuple[Path, dict[str, Any], int, dict[str, dict[str, Tensor]]] | None:
        """The newest undamaged checkpoint: folder, manifest, step of the newest of all, and tensors by file."""
        found = self.run.latest()
        if found is None:
            return None
        files = [found[0] / name for name in (_WEIGHTS, _OPTIMIZER, _START_SCORES, _TRAIN_FROM)]
        return *found, self.run.steps()[-1], {file.name: read_tensors(file) for file in files if file.exists()}

    def save(self, *, best: bool = False) -> None:
        """Publish a checkpoint of this step, and record whether it is the best."""

        def write(folder: Path) -> None:
            write_tensors(folder / _WEIGHTS, self.model.trainable_state_dict())
            write_tensors(folder / _OPTIMIZER, optimizer_state(self.optimizer, self.names))
            if self._start_S is not None:
                write_tensors(folder / _START_SCORES, {"score_S": self._start_S})
            if self._train_from:
                write_tensors(folder / _TRAIN_FROM, self._train_from)

        def publish() -> None:
            self.run.save(self.progress.step, write, {"progress": asdict(self.progress)})
            if best:
                self.run.set_best(self.progress.step)

        distributed.run_on_main(publish)

    # -- the loop

    def fit(self, stop: StopRequest) -> None:
        """Train until the last step, early stopping or a stop request, and validate the last step.

        Raises:
            Interrupted: a stop was requested; a checkpoint of the last step was published.
            NumericError: the loss or a gradient is not finite; that step was not applied.
        """
        started = time.perf_counter() - self.progress.seconds
        loader = self.train_samples.batches(_Keys(self), pin=self.device.type == "cuda")
        for epoch, global_batch in self._schedule():
            if self._out_of_patience():
                break
            if not self.model.training:  # for large encoders, `train()` takes as long as a training step of a small head
                self.model.train()
            batch = next(loader).to(self.device)
            loss, lr = self._step(batch, global_batch)
            self.progress.step += 1
            self.progress.seconds = time.perf_counter() - started
            self.listener.on_step(self.progress, self.total, loss, lr)
            self._log_step(epoch, loss, lr)
            if self.progress.step in self.eval_at:
                self._validate()
            elif self.config.train.checkpoint_every and self.progress.step % self.config.train.checkpoint_every == 0:
                self.save()
            signal_number = distributed.max_over_processes(stop.signal_number, self.device)
            if signal_number:
                self.save()
                raise Interrupted(
                    signal_number,
                    f"at step {self.progress.step} of {self.total}, its checkpoint has been saved",
                    fix="continue with --resume",
                )
            if distributed.max_over_processes(int(self.listener.should_stop(self.progress, self.total)), self.device):
                break
        if self.progress.validated != self.progress.step:
            self._validate()

    def _schedule(self) -> Iterator[tuple[int, list[int]]]:
        """(epoch, indices of the global batch) of each remaining step."""
        step = self.progress.step
        while step < self.total:
            epoch, first = divmod(step, self.per_epoch)
            batches = epoch_batches(self.config.seed, epoch, len(self.train_samples), self.config.train.batch_size)
            for global_batch in batches[first : first + self.total - step]:
                yield epoch, global_batch
                step += 1

    def _step(self, batch: Batch, global_batch: list[int]) -> tuple[float, float]:
        """One optimizer step; returns the loss of the global batch and the learning rate."""
        config, step = self.config, self.progress.step
        set_learning_rate(self.optimizer, compute_lr_factor(config.train, step, self.total))
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(derive_seed(config.seed, step, distributed.rank()))
        has_share = bool(process_share(global_batch, distributed.rank(), distributed.world_size()))
        loss = self._backward(batch, len(global_batch), has_share=has_share)
        parameters = self._parameters
        if self._warm_up is not None and step < self._warm_up.steps:
            for name in parameters.keys() - self._warm_up.names:
                parameters[name].grad = None
        distributed.sum_gradients(parameters.values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.train.clip))
        value = float(distributed.sum_with_gradient(loss))
        lr = float(self.optimizer.param_groups[0]["lr"])
        if not (math.isfinite(value) and math.isfinite(norm)):
            self._refuse_step(value, norm, lr, global_batch)
        self.optimizer.step()
        return value, lr

    def _refuse_step(self, loss: float, norm: float, lr: float, global_batch: list[int]) -> None:
        rows = self.data.splits["train"].rows
        ids = [rows[index].id for index in global_batch]
        step = self.progress.step + 1
        if distributed.is_main():
            facts = {"step": step, "loss": loss, "gradient_norm": norm, "lr": lr, "ids": ids}
            write_atomically(self.run.path / "nonfinite.json", dump_json(facts))
        first = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
        raise NumericError(
            NumericCode.LOSS_NOT_FINITE,
            f"loss is {loss}, gradient norm {norm} at step {step} (lr {lr:g}, batch ids {first})",
            where=str(self.run.path / "nonfinite.json"),
            fix="train again with a lower --lr, or inspect those samples",
        )

    def _log_step(self, epoch: int, loss: float, lr: float) -> None:
        if distributed.is_main() and (self.progress.step % self.config.train.log_every == 0 or self.progress.step == 1):
            self.run.log({"step": self.progress.step, "epoch": epoch, "loss": loss, "lr": lr})

    # -- validation

    def _validate(self, *, baseline: bool = False) -> None:
        outputs = model_outputs(self.model, self.data, "val", self.config, self.device, samples=self.val_samples)
        if self.data.task.uses_thresholds and self.config.train.threshold == "tuned":
            evaluation, self.progress.thresholds = score_tuned(outputs, self.data, "val", self.run.path)
        else:
            threshold = self.config.train.threshold
            evaluation = score(outputs, self.data, "val", THRESHOLD if threshold == "tuned" else threshold)
        found = evaluation.metrics
        routing = statistics(evaluation.load_LK) if evaluation.load_LK is not None else None
        value = self._value_of(found)
        best = not math.isnan(value) and (self.progress.best is None or value > self._sign * self.progress.best)
        if baseline:
            self._start_S = evaluation.score_S
        elif self._start_S is not None:
            difference = difference_in_errors(evaluation.score_S, self._start_S)
            self.progress.over_start = [*self.progress.over_start, difference][-LASTING:]
            best = best and exceeds_noise(self.progress.over_start)
        self.progress.waited = 0 if baseline or self._improves(value, found["loss"]) else self.progress.waited + 1
        if best:
            self.progress.best, self.progress.best_step = self._sign * value, self.progress.step
        self.progress.validated = self.progress.step
        line = {"step": self.progress.step, "val": found, **({"routing": routing} if routing else {})}
        distributed.run_on_main(lambda: self.run.log(line))
        self.save(best=best)
        if routing and routing["unused_share"] > _COLLAPSED and not self._warned_of_collapse:
            self._warned_of_collapse = True
            self.listener.on_notice(
                f"router collapse: {100 * routing['unused_share']:.0f} % of the experts are unused, "
                f"entropy {routing['entropy']:.2f} of 1"
            )
        self.listener.on_validation(self.progress, {self.metric: found[self.metric], **found}, best=best)

    def _value_of(self, found: Mapping[str, float]) -> float:
        """What selects the best checkpoint; larger is better."""
        if self.metric not in found:
            what = f"{self.metric} is not computed for so many samples and labels"
            raise ConfigError(ConfigCode.UNKNOWN_METRIC, what, where="--select", fix="select by a different metric")
        return self._sign * found[self.metric]

    def _improves(self, value: float, loss: float) -> bool:
        """Whether a validation has a higher score, or a loss lower by 0.1 %, than all others since training began.

        Step 0 of a warm start does not count: prompts that have begun to learn may be far below it.
        """
        progress, nothing = self.progress, math.inf
        higher = value > (-nothing if progress.highest is None else progress.highest)
        lower = loss < _LESS * (nothing if progress.lowest_loss is None else progress.lowest_loss)
        if higher:
            progress.highest = value
        if lower:
            progress.lowest_loss = loss
        return higher or lower

    def _out_of_patience(self) -> bool:
        patience = self.config.train.patience
        return patience is not None and self.progress.waited >= patience

    def _selected(self) -> tuple[Path, dict[str, Any]]:
        """The verified folder of the selected checkpoint and its manifest, the same on all processes."""
        found: tuple[Path, dict[str, Any]] = distributed.run_on_main(lambda: self.run.checkpoint(self.config.train.select))
        return found

    def thresholds(self) -> Thresholds:
        """The decision thresholds of the selected checkpoint."""
        return get_thresholds(self._selected()[1], self.config)

    def test(self) -> Evaluation | None:
        """Load the selected checkpoint, evaluate it on the test split if there is one, and write its predictions."""
        path, _ = self._selected()
        tensors = distributed.run_on_main(lambda: read_tensors(path / _WEIGHTS))
        self.model.load_trainable_state_dict(tensors, where=str(path))
        if "test" not in self.data.splits:
            return None
        progress = self.listener.on_data_progress
        samples = prepare_samples(self.model, self.data, "test", self.config, self.device, reading=progress)
        outputs = model_outputs(self.model, self.data, "test", self.config, self.device, samples=samples)
        return score(outputs, self.data, "test", self.thresholds(), predictions=self.run.predictions_file)


class _Keys:
    """This process's samples for each remaining step; the loader iterates over it once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __len__(self) -> int:
        return self._trainer.total - self._trainer.progress.step

    def __iter__(self) -> Iterator[list[Key]]:
        rank, world = distributed.rank(), distributed.world_size()
        for epoch, global_batch in self._trainer._schedule():
            mine = process_share(global_batch, rank, world) or global_batch[:1]
            yield [(epoch, index) for index in mine]
