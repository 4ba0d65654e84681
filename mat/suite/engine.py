"""The engine: one training run, from a validated configuration to a complete run folder.

Length, schedule, evaluations and selections are all measured in executed FLOPs (the paper's
figure), so that methods are compared at equal cost: a run spends ``method.budget`` x
``train.pflops`` PFLOPs, overhead included and never more, its learning rate warms up and decays
over that budget, and a method that makes steps cheaper makes more of them.
"""

import hashlib
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import pandas as pd
import torch

from mat import flops, ntk
from mat.adapters import find_units
from mat.flops import Flops, Ledger
from mat.gates import attach_
from mat.policy import MATConfig
from mat.reduction import Reduction
from mat.suite import analysis, checkpoint
from mat.suite import data as datasets
from mat.suite.allocator import keep_freed_memory
from mat.suite.config import Config
from mat.suite.errors import Interrupted, RunFailed, UserError
from mat.suite.files import say
from mat.suite.interface import Batch
from mat.suite.memory import check_memory
from mat.suite.methods import Method
from mat.suite.models import build, build_optimiser
from mat.suite.precision import autocast, batch_in, machine_precision
from mat.suite.runs import RunFolder, check_matched
from mat.suite.schedule import evaluation_points, learning_rate
from mat.suite.stepper import Stepper
from mat.suite.tracking import Progress, open_mirror
from mat.units import FloatArray

PFLOP = 1e15
# What torch would use; an earlier run of a sweep may have set another number.
THREADS = torch.get_num_threads()
COSTS = 16  # steps whose cost is remembered
STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def run(config: Config, folder: Path) -> dict[str, Any] | None:
    """Train, or go on training, or do nothing if the run is complete.

    Args:
        config: The validated configuration.
        folder: The run folder.

    Returns:
        The run's summary, or None if it was interrupted.

    Raises:
        RunFailed: If training diverged; ``failure.json`` says why and the last good checkpoint
            stays.
        UserError: If the data or the folder cannot be used.
    """
    keep_freed_memory()
    training: Training | None = None
    with RunFolder(folder, config) as files:
        summary = files.complete()
        if summary is not None:
            return summary
        try:
            training = Training(config, files)
            summary = training.train()
        except Interrupted:
            pass
        except (RunFailed, UserError) as failure:
            files.write_failure(str(failure))
            raise
        finally:
            if training is not None:
                training.close(summary)
    return summary


def settled(config: Config, begun: dict[str, Any] | None) -> Config:
    """The configuration, precision and threads decided: a begun run goes on with its own."""
    hardware = config.hardware
    threads, precision = hardware.threads or THREADS, hardware.precision
    if begun is not None:
        threads, precision = begun["environment"]["threads"], begun["environment"]["precision"]
        if hardware.threads not in (None, threads):
            say(
                f"hardware.threads={hardware.threads} would change the numbers: "
                f"the run goes on with {threads}."
            )
        hardware = replace(hardware, threads=begun["config"]["hardware"]["threads"])
    elif precision == "auto":
        precision = machine_precision(hardware.device)
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    return replace(config, hardware=replace(hardware, precision=precision))


class Training:
    """State and verbs of one run; ``train`` is the loop.

    Args:
        config: The validated configuration.
        files: The run folder.
    """

    def __init__(self, config: Config, files: RunFolder) -> None:
        if config.hardware.device == "cuda" and not torch.cuda.is_available():
            raise UserError("hardware.device=cuda finds no CUDA device: choose hardware=cpu.")
        self.device = torch.device(config.hardware.device)
        begun = files.restore(self.device)
        self.config, self.files = config, files = settled(config, begun), files
        precision = config.hardware.precision
        check_matched(config)
        try:
            self.data = datasets.load(config.dataset, config.seed)
        except KeyboardInterrupt:  # while they are prepared; that leaves nothing half done
            raise Interrupted from None
        check_memory(config, self.data.outputs)
        torch.manual_seed(config.seed)
        self.model = build(config, self.data.outputs).to(self.device)
        if precision == "float64":
            self.model.double()
        train, selection = config.train, config.selection
        units = find_units(self.model, groups=getattr(config.model, "ffn_groups", None))
        self.units = units.of_kinds(selection.units)
        self.gates = attach_(
            self.model, MATConfig(mode=cast(Any, selection.mode), log=False), self.units
        )
        self.optimiser = build_optimiser(self.model, train)
        self.method = Method(config.method, selection, self.units, config.seed)
        self.matched = hashlib.sha256(repr(self.method.policy.counts).encode()).hexdigest()
        probing = self.method.selects or config.analysis
        self.probe = None
        if probing:
            probe = self.data.probe_batch(config.selection.samples).to(self.device)
            self.probe = batch_in(probe, precision)
        self.start = analysis.unit_values(self.gates)  # made again from the seed on resuming
        self.stepper = Stepper(
            self.model,
            self.gates,
            self.optimiser,
            self._autocast,
            train.clip,
            train.accumulation,
            self.method.drifts,
            config.hardware.graphs,
        )
        self.budget = train.pflops * config.method.budget * PFLOP

        self.step = 0
        self.epoch = 0
        self.records = 0  # of the units; one per selection interval, whatever the method
        self.spent = Flops()  # executed
        self.needed = 0  # FLOPs of the figure without padding
        self.seconds = 0.0
        self.seconds_estimator = 0.0
        self.share_sum = 0.0  # of active shares over steps
        self.window: list[float] = []  # training losses since the last logged one
        # Metrics and numbers of samples of the last epoch's worth of steps.
        self.recent: deque[dict[str, float]] = deque(maxlen=self.data.steps_per_epoch(train.batch))
        self.evaluated_at = -1.0  # FLOPs
        self.best: dict[str, Any] = {"loss": math.inf}
        self._interrupt = False
        self._ledgers: dict[object, Ledger] = {}  # by the shapes of a batch
        self._kernels: dict[object, int] = {}  # FLOPs, by the shapes of a batch
        self._estimate_cost: Flops | None = None
        self._costs: dict[tuple[object, ...], Flops] = {}  # of steps, by what they depend on
        # A step's batch and epoch, made ahead.
        self._next: tuple[int, tuple[Batch, int]] | None = None
        self._go_on(begun)
        self.environment = files.begin(config, begun and begun["environment"])
        self.mirror = open_mirror(config, files.path)
        label = f"{config.model.name} {config.method.name} seed={config.seed} {precision}"
        done = self.spent.figure / PFLOP
        self.progress = Progress(self.budget / PFLOP, done, config.tracking.progress, label)

    def train(self) -> dict[str, Any]:
        """The loop: select, evaluate, step, until the budget is spent."""
        train = self.config.train
        points = self._evaluation_points()
        if self.step == 0 and self.records == 0:
            self._event("start", "validation", **self.data.facts())
        with self._stopping_cleanly():
            while True:
                progress = self.spent.figure / self.budget
                began = self.step
                if due := self.method.is_due(progress):
                    if self._online:
                        self.gates.set_active(np.ones(len(self.units), bool))
                    cost = self._selection_cost()
                    after = self.spent.figure + cost.figure
                    self._evaluate_until(after, points)
                    if after > self.budget:
                        break
                    self._select(cost)
                if progress >= self.records * self.config.selection.interval:
                    self._record(due)
                start = time.perf_counter()
                batch = self._train_batch()
                self.gates.set_active(self.method.active_at(self.step))
                cost = self._step_cost(batch)
                self.seconds += time.perf_counter() - start
                after = self.spent.figure + cost.figure
                self._evaluate_until(after, points)
                if after > self.budget or (
                    train.stop_when_settled and bool(self.method.state.stopped.all())
                ):
                    break
                self._train_step(batch, cost)
                every = train.checkpoint_steps
                if self.step // every > began // every:  # online selections step, too
                    self._save()
                if self._interrupt:
                    self._save()
                    raise Interrupted
            return self._finish()

    def close(self, summary: dict[str, Any] | None) -> None:
        """Close the progress bar and the mirror."""
        self.progress.close()
        self.mirror.finish(summary)

    # --- one step

    def _train_batch(self) -> Batch:
        """The coming step's batch."""
        if self._next is None or self._next[0] != self.step:
            self._next = self.step, self._batch_of(self.step)
        _, (batch, self.epoch) = self._next
        return batch

    def _batch_of(self, step: int) -> tuple[Batch, int]:
        batch, epoch = self.data.train_batch(step, self.config.train.batch)
        return batch_in(batch, self.config.hardware.precision), epoch

    def _step_cost(self, batch: Batch, padded: bool = True) -> Flops:
        """What a training step on a batch spends with the gates as they stand."""
        key = *self.stepper.key(batch), padded
        if key not in self._costs:  # a GPU makes a step in the time that this takes
            if len(self._costs) == COSTS:
                self._costs.clear()
            parts = self.config.train.accumulation
            split = [batch] if parts == 1 else batch.split(parts)
            costs = (self._ledger_of(part).step(executed=padded) for part in split)
            self._costs[key] = sum(costs, Flops())
        return self._costs[key]

    def _ledger_of(self, batch: Batch, training: bool = True) -> Ledger:
        """What products a pass over a batch makes; recorded once for every shape."""
        key = training, *(tensor.shape for tensor in vars(batch).values())
        if key not in self._ledgers:
            there = batch.to(self.device)

            def forward() -> torch.Tensor:
                with self._autocast():
                    loss, extra = self.model.loss(there), self.model.auxiliary_loss()
                return loss if extra is None else loss + extra

            self._ledgers[key] = Ledger(self.model, forward, ("decoder",), training)
        return self._ledgers[key]

    def _train_step(self, batch: Batch, cost: Flops, capture: bool = True) -> None:
        start = time.perf_counter()
        lr = learning_rate(self.config.train, (self.spent.figure + cost.figure / 2) / self.budget)
        outcome = self.stepper.step(batch, lr, capture)
        self.needed += self._step_cost(batch, padded=False).figure + cost.overhead
        if self.device.type == "cuda":  # which computes meanwhile
            self._next = self.step + 1, self._batch_of(self.step + 1)
        reading = outcome.read()
        self.seconds += time.perf_counter() - start
        self._refuse_divergence(reading.loss, reading.norm)

        self.step += 1
        self.spent += cost
        active_share = float(self.gates.active.mean())
        self.share_sum += active_share
        self.window.append(reading.loss)
        if reading.metrics:
            self.recent.append({**reading.metrics, "samples": batch.samples})
        if self.step % self.config.train.log_steps == 0:
            mean = float(np.mean(self.window))
            self.window.clear()
            metrics = {**self._running_metrics(), **reading.monitors}
            self._event("train", "train", loss=mean, lr=lr, active_now=active_share, **metrics)
        best = None if math.isinf(self.best["loss"]) else self.best["loss"]
        self.progress.update(self.spent.figure / PFLOP, reading.loss, active_share, best)

    def _running_metrics(self) -> dict[str, float]:
        """Means over the last epoch's worth of samples (Table 3); nothing before there are any."""
        if len(self.recent) < (self.recent.maxlen or 0):
            return {}
        samples = [metrics["samples"] for metrics in self.recent]
        names = [name for name in self.recent[-1] if name != "samples"]
        return {
            name: float(np.average([m[name] for m in self.recent], weights=samples))
            for name in names
        }

    def _refuse_divergence(self, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise RunFailed(
                f"{self.files.path}: training diverged at step {self.step} (loss {loss:.4g}, "
                f"gradient norm {norm:.4g}):"
                " lower train.lr or train.clip; the last good checkpoint is kept."
            )

    # --- selections

    @property
    def _online(self) -> bool:
        """Whether scores come off a training step that the selection makes, all units active."""
        return self.method.needs_score and self.config.selection.reduction == "online"

    def _selection_cost(self) -> Flops:
        """What the coming selection spends; the training step of an online one included."""
        if not self.method.needs_score:
            return Flops()
        assert self.probe is not None
        if self._online:
            batch = self._train_batch()
            return self._step_cost(batch) + Flops(overhead=self._kernel_flops(batch))
        if self._estimate_cost is None:
            reduction = self._reduction()
            count = self.config.selection.projections if reduction == "random" else 1
            if reduction == "full":
                count = self._outputs()
            with self._autocast():
                self._estimate_cost = flops.estimate(
                    self.model,
                    self.probe,
                    self.units,
                    passes=count,
                    samples=self.probe.samples,
                    memory_bytes=self.config.hardware.estimator_bytes,
                    vocabulary=("decoder",),
                )
        return self._estimate_cost

    def _kernel_flops(self, batch: Batch) -> int:
        """FLOPs of all units' kernels on a batch, a row for each sample."""
        key = tuple(tensor.shape for tensor in vars(batch).values())
        if key not in self._kernels:
            there = batch.to(self.device)
            with self._autocast():
                shapes = ntk.kernel_shapes(self.model, there, self.units, samples=batch.samples)
            memory, count = self.config.hardware.estimator_bytes, len(self.units)
            self._kernels[key] = ntk.kernel_flops(shapes, count, batch.samples, memory)
        return self._kernels[key]

    @torch.no_grad()
    def _outputs(self) -> int:
        """Number k of outputs of a probe's sample."""
        assert self.probe is not None
        outputs: torch.Tensor = self.model.eval()(self.probe)
        return outputs.numel() // self.probe.samples

    def _select(self, cost: Flops) -> None:
        start, before = time.perf_counter(), self.seconds
        score = self._score(cost) if self.method.needs_score else None
        if score is not None:
            stepping = self.seconds - before  # of an online selection; that is training
            self.seconds_estimator += time.perf_counter() - start - stepping
        state = self.method.select(score)
        self.seconds = before + time.perf_counter() - start
        self._event("selection", "train", active_now=float(state.active.mean()))

    def _record(self, selected: bool) -> None:
        """Write a row per unit and run the analysis; counted neither in FLOPs nor in seconds.

        Step and distance are the present ones: after an online selection, those behind the step
        that gave its scores.

        Args:
            selected: Whether there was a selection just now; without one there are no scores.
        """
        state = self.method.state
        score = "gradnorm" if self.config.method.score == "gradnorm" else "lambda_max"
        units = {
            "kind": self.units.kind,
            "layer": self.units.layer,
            "unit": self.units.unit,
            score: state.score if selected else np.nan,
            "delta": state.delta if selected else np.nan,
            "threshold": state.threshold if selected else np.nan,
            "active": state.active,
            "stopped": state.stopped,
            "distance": analysis.distances(self.gates, self.start),
        }
        where = {"t": self.records, "step": self.step, "pflops": self.spent.figure / PFLOP}
        self.files.add_rows("units", pd.DataFrame({**where, **units}))
        if self.config.analysis:
            assert self.probe is not None
            selection, memory = self.config.selection, self.config.hardware.estimator_bytes
            scene = analysis.scene(
                self.model, self.units, self.probe, selection.projections, self.config.seed, memory
            )
            for name in self.config.analysis:
                self.files.add_rows(
                    name, pd.DataFrame({**where, **analysis.OBSERVERS[name](scene)})
                )
        self.records += 1

    def _reduction(self) -> Reduction:
        if self.config.method.score == "gradnorm":
            return "loss"
        return cast(Reduction, self.config.selection.reduction)

    def _score(self, cost: Flops) -> FloatArray:
        """Scores of all units, and their cost spent."""
        selection, memory = self.config.selection, self.config.hardware.estimator_bytes
        assert self.probe is not None
        try:
            if self._online:
                batch = self._train_batch()
                with ntk.Online(self.model, self.units) as online:
                    self._train_step(batch, cost, capture=False)
                result = online.result(memory_bytes=memory)
            else:
                with self._autocast():
                    result = ntk.estimate(
                        self.model,
                        self.probe,
                        self.units,
                        samples=self.probe.samples,
                        loss=self.model.loss_of_outputs,
                        reduction=self._reduction(),
                        projections=selection.projections,
                        seed=self.config.seed,
                        memory_bytes=memory,
                    )
                self.spent += cost
                self.needed += cost.figure
        except FloatingPointError as error:
            raise RunFailed(f"{self.files.path}: at step {self.step} {error}") from error
        gradnorm = self.config.method.score == "gradnorm"
        return np.sqrt(result.squared_norm) if gradnorm else result.lambda_max

    # --- evaluation

    def _evaluation_points(self) -> list[float]:
        """FLOPs at which to evaluate from now on."""
        train, budget = self.config.train, self.config.method.budget
        points = evaluation_points(train.pflops, budget, train.eval_interval, train.marks)
        return [point * PFLOP for point in points if point * PFLOP > self.evaluated_at]

    def _evaluate_until(self, after: int, points: list[float]) -> None:
        """Evaluate at the points before ``after`` FLOPs, where the next piece of work ends."""
        while points and after > points[0]:
            self._evaluate(points.pop(0))

    def _evaluate(self, point: float) -> None:
        """Validation scores on fixed samples; not counted in FLOPs or seconds."""
        train = self.config.train
        scores = self._scores_on("validation", train.eval_samples)
        self.evaluated_at = point
        mark = next((m for m in train.marks if m * PFLOP == point), None)
        self._event("evaluation", "validation", **scores, mark=mark)
        if not math.isfinite(scores["loss"]):
            raise RunFailed(
                f"{self.files.path}: the validation loss is {scores['loss']} at step {self.step}: "
                "lower train.lr."
            )
        by, sign = self.model.best_by, 1 if self.model.best_by == "loss" else -1
        if sign * scores[by] < sign * self.best.get(by, sign * math.inf):
            where = {
                "step": self.step,
                "pflops": self.spent.figure / PFLOP,
                "seconds": self.seconds,
            }
            self.best = {**scores, **where}
            state = {"step": self.step, "model": self.model.state_dict()}
            self.best["sha256"] = checkpoint.save(self.files.best_weights(self.best), state)

    @torch.no_grad()
    def _scores_on(self, split: str, samples: int | None) -> dict[str, float]:
        """Loss and metrics, means over a split's targets."""
        self.model.eval()
        total: dict[str, float] = {}
        count = 0
        for given in self.data.evaluation_batches(split, samples, self.config.train.eval_batch):
            if self._interrupt and split == "test":  # the latest checkpoint is of this step
                raise Interrupted
            batch: Batch = batch_in(given.to(self.device), self.config.hardware.precision)
            with self._autocast():
                outputs = self.model(batch)
                loss = self.model.loss_of_outputs(outputs, batch)
            targets = batch.targets.numel()
            for name, value in {"loss": loss, **self.model.metrics(outputs, batch)}.items():
                total[name] = total.get(name, 0.0) + float(value) * targets
            count += targets
        return {name: value / count for name, value in total.items()}

    def _finish(self) -> dict[str, Any]:
        """Test the weights of the best validation and write the summary: the run is complete."""
        if self.step == 0:
            raise UserError(
                f"train.pflops={self.config.train.pflops} is too short for a single step: raise it."
            )
        early = self.evaluated_at < self.spent.figure  # ended before the budget did
        if early or math.isinf(self.best["loss"]):
            self._evaluate(self.spent.figure)
        self._save()
        best = checkpoint.load(self.files.best_weights(self.best), self.device, self.best["sha256"])
        self.model.load_state_dict(best["model"])
        test = self._scores_on("test", None)
        self._event("test", "test", **test)
        summary = {
            "method": self.config.method.name,
            "model": self.config.model.name,
            "mode": self.config.selection.mode,
            "seed": self.config.seed,
            "steps": self.step,
            **self._ledger(),
            "seconds_estimator": self.seconds_estimator,
            **{f"best_validation_{name}": self.best[name] for name in test},
            "best_step": self.best["step"],
            "pflops_to_best": self.best["pflops"],
            "seconds_to_best": self.best["seconds"],
            **{f"test_{name}": value for name, value in test.items()},
            "active_share": self.share_sum / self.step,
            **self.data.facts(),
            "selections": self.method.state.t + 1,
            "parameters": sum(p.numel() for p in self.model.parameters()),
        }
        self.files.write_summary(summary)
        return summary

    # --- records

    def _ledger(self) -> dict[str, float]:
        spent = self.spent
        return {
            "pflops_forward": spent.forward / PFLOP,
            "pflops_input_grad": spent.input_grad / PFLOP,
            "pflops_weight_grad": spent.weight_grad / PFLOP,
            "pflops_overhead": spent.overhead / PFLOP,
            "pflops": spent.figure / PFLOP,
            "pflops_vocabulary": spent.vocabulary / PFLOP,
            "pflops_needed": self.needed / PFLOP,
            "seconds": self.seconds,
        }

    def _event(self, event: str, split: str, **values: Any) -> None:
        share = self.share_sum / self.step if self.step else 1.0
        where = {"event": event, "step": self.step, "epoch": self.epoch, "split": split}
        line = {**where, "loss": None, "active_share": share, **self._ledger(), **values}
        self.files.append(line)
        self.mirror.log(line)

    def _save(self) -> None:
        state = {
            "config": asdict(self.config),
            "environment": self.environment,
            "data": self.data.fingerprint,
            "matched": self.matched,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "method": self.method.policy.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.device.type == "cuda" else None,
            "spent": list(astuple(self.spent)),
            **{name: getattr(self, name) for name in self._SAVED},
            "recent": list(self.recent),  # weights_only reads lists
            **self.files.recorded(),
        }
        self.files.save(state)

    _SAVED = (
        "step", "epoch", "records", "needed", "seconds", "seconds_estimator", "share_sum",
        "window", "evaluated_at", "best",
    )  # fmt: skip

    def _go_on(self, state: dict[str, Any] | None) -> None:
        """Go on from a checkpoint; without one, start."""
        if state is None:
            return
        where = f"{self.files.path} was begun "
        if state["data"] != self.data.fingerprint:
            raise UserError(
                f"{where}on other data: point dataset.root (or MAT_DATA) at the data it was "
                "begun with, or remove that "
                "folder."
            )
        if state["matched"] != self.matched:
            raise UserError(
                f"{where}with another method.matched: name that run, or remove this folder."
            )
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.method.policy.load_state_dict(state["method"])
        torch.set_rng_state(state["random"].cpu())
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"].cpu())
        self.spent = Flops(*state["spent"])
        for name in self._SAVED:
            setattr(self, name, state[name])
        self.recent.extend(state["recent"])

    # --- surroundings

    def _autocast(self) -> torch.autocast:
        return autocast(self.config.hardware.precision, self.device)

    @contextmanager
    def _stopping_cleanly(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP end the run after the present step, with a checkpoint."""

        def ask(number: int, frame: FrameType | None) -> None:
            self._interrupt = True

        if threading.current_thread() is not threading.main_thread():  # only it gets signals
            yield
            return
        handlers = {number: signal.getsignal(number) for number in STOPPING}
        for number, handler in handlers.items():
            if handler is not signal.SIG_IGN:  # nohup
                signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
