"""Gates: attach MAT to a model in place, choose what trains, and take it off again.

The active set is one boolean vector over the table of units (``Gates.active``); every layer's gate
holds a view of its part. It changes between optimiser steps only. Parameters, names, hooks and
``requires_grad`` stay as they are.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mat.adapters import find_units
from mat.guard import guard
from mat.layers.gate import Gate, GatedPart
from mat.layers.site import Site
from mat.policy import MATConfig, Policy
from mat.probe import copied
from mat.tables import active_by_kind, gates_table, skipped_numbers
from mat.units import BoolArray, FloatArray, Unit, Units


class Gates:
    """The gates of an attached model; made by :func:`attach_`.

    Args:
        model: The model.
        units: Its units.
        config: How they are chosen, and the backward mode.

    Attributes:
        units: The table of units.
        layers: The gate of every layer.
        policy: Chooses at selections.
        probe: The batch that scores are measured on: a copy of the first one given.
        calls: How often :meth:`maybe_select` was called: training steps, over all epochs.
        due: Call from which on the next selection is made.
        pending: Scores that were read off a training step and await the next call.
    """

    def __init__(self, model: nn.Module, units: Units, config: MATConfig) -> None:
        self.model, self.units, self.config = model, units, config
        self._active: BoolArray = np.ones(len(units), bool)
        self.policy = Policy(config, units)
        self.probe: Any = None
        self.ledger: Any = None  # what a backward pass on the probe costs, once it was asked
        self.calls = self.due = 0
        self.callback: Any = None  # the Trainer's, see mat.integrations
        self.pending: FloatArray | None = None
        self._online: Any = None  # reads scores off the training step under way
        self.layers: list[Gate] = []
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for layer, rows in units.slices():
            gate = Gate(layer.kind, layer.name, self._active[rows], config.mode)
            self.layers.append(gate)
            for part in layer.parts:
                gate.add(parameters[part.parameter], part)
        gates = {gate.name: gate for gate in self.layers}
        self.sites: list[Site] = []
        for layer in units.layers:
            for path, make in layer.sites:
                self.sites.append(make(model.get_submodule(path), gates.get))
        for site in self.sites:
            site.attach()
        model._gates = self  # type: ignore[assignment]

    def __repr__(self) -> str:
        return gates_table(self)

    @property
    def active(self) -> BoolArray:
        """(N,) boolean, read-only: which units train now; :meth:`set_active` changes it."""
        view = self._active.view()
        view.flags.writeable = False
        return view

    def parts(self) -> Iterator[GatedPart]:
        """Every gated part of a parameter."""
        for gate in self.layers:
            yield from gate.parts.values()

    def set_active(self, active: BoolArray | Sequence[bool]) -> None:
        """Choose the units that train from now on.

        Args:
            active: (N,) boolean. None active and all active are both fine.

        Raises:
            ValueError: If the shape is not (N,).
            RuntimeError: If gradients are pending: they belong to the present set.
        """
        wanted = np.asarray(active, bool)
        if wanted.shape != self.active.shape:
            raise ValueError(f"active set of shape {wanted.shape} for {len(self.active)} units")
        if (wanted == self.active).all():
            return
        for part in self.parts():
            pending = part.gradient()
            if pending is not None and bool(pending.any()):
                raise RuntimeError(
                    f"gradients of {part.part.parameter} are pending and the active set changes "
                    "between optimiser steps: call optimizer.step() and zero_grad() first"
                )
        for gate, (_, rows) in zip(self.layers, self.units.slices(), strict=True):
            if (wanted[rows] != self.active[rows]).any():
                self._active[rows] = wanted[rows]
                gate.update()

    def indices(self) -> list[Tensor]:
        """Every tensor of row numbers in use: a CUDA graph reads them as long as it lives."""
        every = (index for gate in self.layers for index in gate.indices())
        return [index for index in every if isinstance(index, Tensor)]

    def maybe_select(
        self,
        step: int | None = None,
        batch: Any = None,
        output: Callable[[Any], Tensor] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> bool:
        """Select at every ``config.every``-th call; call it before each training step.

        The first call is selection t = 0, which leaves all units active. With data-parallel
        training the scores of rank 0 count on every rank.

        Args:
            step: The training step that comes next, for the log; it may start anew in each epoch.
            batch: The probe, if scores are measured on one; the first is kept for good.
            output: From the model's output to the tensor (samples, ...) whose Jacobian is measured.
            loss: Mean loss from the model's output and the probe, for ``score="gradnorm"``; the
                output's own ``loss`` when None.

        Returns:
            Whether a selection was made.

        Raises:
            ValueError: If scores are needed and no probe was given.
        """
        self._read_online()
        call, self.calls = self.calls, self.calls + 1
        if self.pending is not None:
            self.select(self.pending, step)
            self.pending = None
            return True
        if call < self.due or self.policy.done:
            return False
        self.due = call + self.config.every
        if not self.policy.needs_score:
            self.select(None, step)
            return True
        from mat import ntk

        if self.config.reduction == "online":
            self.set_active(np.ones_like(self.active))
            self._online = ntk.Online(self.model, self.units).__enter__()
            return False
        if self.probe is None:
            if batch is None:
                raise ValueError("scores are measured on a probe: maybe_select(step, batch)")
            self.probe = copied(batch)
        gradnorm = self.config.score == "gradnorm"
        with self.transparent():
            result = ntk.estimate(
                self.model,
                copied(self.probe, next(self.model.parameters()).device),
                self.units,
                output=output,
                loss=loss,
                reduction="loss" if gradnorm else self.config.reduction,
                projections=self.config.projections,
                normalize=self.config.normalize,
                seed=self.config.seed,
            )
        self.select(self._score(result), step)
        return True

    def select(self, scores: FloatArray | None = None, step: int | None = None) -> None:
        """The next selection t = 0, 1, 2, ... from given scores (eqs. (4) to (7)).

        Args:
            scores: (N,) finite scores, if the rule needs them.
            step: The training step, for the log.

        Raises:
            ValueError: If scores are missing, of another shape, or not finite.
            RuntimeError: If gradients are pending; nothing is selected then.
        """
        distributed = dist.is_available() and dist.is_initialized()
        if distributed:  # every rank trains the same units
            shared = [scores]
            dist.broadcast_object_list(shared, 0)
            scores = shared[0]
        if scores is not None:
            scores = np.asarray(scores, np.float64)
            if scores.shape != self.active.shape:
                raise ValueError(f"scores of shape {scores.shape} for {len(self.active)} units")
            if not np.isfinite(scores).all():
                worst = self.units.name(int(np.flatnonzero(~np.isfinite(scores))[0]))
                raise ValueError(f"the score of {worst} is not finite")
        elif self.policy.needs_score:
            raise ValueError(f"rule={self.config.rule!r} needs a score per unit: select(scores)")
        before = self.policy.state_dict()
        state = self.policy.select(scores)
        try:
            self.set_active(state.active)
        except RuntimeError:
            self.policy.load_state_dict(before)
            raise
        if self.config.log and (not distributed or dist.get_rank() == 0):
            when = "" if step is None else f" at step {step}"
            print(f"MAT: selection {state.t}{when}: {active_by_kind(self)}")

    def log_numbers(self) -> dict[str, float]:
        """Numbers for a tracker: shares of 1, and each kind's threshold (mean of its scopes)."""
        state = self.policy.state
        numbers = {
            "mat/active": float(self.active.mean()),
            "mat/stopped": float(state.stopped.mean()),
        } | skipped_numbers(self)
        for kind in sorted(set(self.units.kind.tolist())):
            level = state.threshold[self.units.kind == kind]
            if np.isfinite(level).any():
                numbers[f"mat/threshold/{kind}"] = float(level[np.isfinite(level)].mean())
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Active and stopped sets, scores, t, probe, and what they belong to; for ``torch.save``.

        Call it between training steps.
        """
        self._read_online()
        return {
            "layers": self._partition(),
            "active": self.active.tolist(),
            "policy": self.policy.state_dict(),
            "calls": self.calls,
            "due": self.due,
            "pending": None if self.pending is None else self.pending.tolist(),
            "probe": self.probe,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a saved state.

        Args:
            saved: What :meth:`state_dict` gave.

        Raises:
            ValueError: If it belongs to another model or another partition of it.
            RuntimeError: If gradients are pending.
        """
        mine, theirs = self._partition(), saved["layers"]
        for name in [*mine, *(name for name in theirs if name not in mine)]:
            if name not in theirs or name not in mine:
                where = "this model" if name in mine else "the saved state"
                raise ValueError(f"units of {name} are in {where} alone: attach the same model")
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"units of {name} are {mine[name]} here and {theirs[name]} in the saved state: "
                    "attach the same model with the same groups, head_output and units"
                )
        self.set_active(saved["active"])
        self.policy.load_state_dict(saved["policy"])
        self.calls, self.due, self.probe = saved["calls"], saved["due"], saved["probe"]
        self.ledger = None
        self.pending = None if saved["pending"] is None else np.array(saved["pending"])

    def _partition(self) -> dict[str, str]:
        """What the units of every layer own, in words that are equal for equal divisions."""
        described = {}
        for layer in self.units.layers:
            parts = []
            for part in layer.parts:
                shape = "x".join(map(str, self.model.get_parameter(part.parameter).shape))
                owners = f"axis {part.dim} owners {part.fingerprint()}"
                parts.append(f"{part.parameter} {shape} {owners}")
            described[layer.name] = f"{layer.n_units} {layer.kind} ({'; '.join(parts)})"
        return described

    def _read_online(self) -> None:
        """Turn what a training step showed into pending scores."""
        if self._online is not None:
            online, self._online = self._online, None
            online.__exit__(None, None, None)
            self.pending = self._score(online.result())

    def _score(self, result: Any) -> FloatArray:
        """The units' scores of an estimate."""
        if self.config.score == "gradnorm":
            return np.sqrt(np.asarray(result.squared_norm, np.float64))
        return np.asarray(result.lambda_max, np.float64)

    @contextmanager
    def transparent(self) -> Iterator[None]:
        """Within, every layer runs as if nothing were gated."""
        for gate in self.layers:
            gate.transparent = True
        try:
            yield
        finally:
            for gate in self.layers:
                gate.transparent = False

    def guard(self, optimiser: torch.optim.Optimizer) -> None:
        """Keep frozen slices and their optimiser state bit-identical, see :func:`mat.guard.guard`.

        Args:
            optimiser: Of the model's parameters, or what accelerate made of one.

        Raises:
            ValueError: If it has no parameter of units, or the model has others now, as with FSDP.
        """
        guard(getattr(optimiser, "optimizer", optimiser), self.model, list(self.parts()))

    def reset(self) -> None:
        """Start anew for another training run: no selection made, all units active, no probe."""
        self.stop_reading()
        self.set_active(np.ones_like(self.active))
        self.policy = Policy(self.config, self.units)
        self.probe, self.pending, self.ledger = None, None, None
        self.calls = self.due = 0

    def stop_reading(self) -> None:
        """Read no scores off the training step under way, if it was going to."""
        if self._online is not None:
            self._online.__exit__(None, None, None)
            self._online = None

    def detach(self) -> None:
        """Give every module its own forward back."""
        self.stop_reading()
        for site in reversed(self.sites):
            site.detach()
        for part in self.parts():
            vars(part.parameter).pop("_gated", None)
        del self.model._gates

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle: without what only attaching needs, and no file can hold."""
        units = copy.copy(self.units)
        units.layers = [copy.copy(layer) for layer in units.layers]
        for layer in units.layers:
            layer.sites = []
        return self.__dict__ | {"units": units, "callback": None, "_online": None, "ledger": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for gate, (_, rows) in zip(self.layers, self.units.slices(), strict=True):
            gate.active = self._active[rows]  # views of the copy's own vector


def attach_(
    model: nn.Module, config: MATConfig | None = None, units: Sequence[Unit] | Units | None = None
) -> Gates:
    """Attach MAT to a model, in place.

    Args:
        model: Any model, see :func:`mat.find_units`.
        config: How units are chosen, and the backward mode.
        units: Units named by hand, or a table of them; what is found when None.

    Returns:
        The gates; all units are active.

    Raises:
        ValueError: If nothing is found, the model is attached already, or ``rule="multirate"``:
            its frozen units move, and change places, by steps that are not the gates'.
    """
    config = config or MATConfig()
    if config.rule == "multirate":
        raise ValueError(
            'rule="multirate" cannot be attached: its slow units move in every step and train in '
            "some, so set_active in turn and call mat.AdamW(...).drift() after each step"
        )
    if any(hasattr(module, "_gates") for module in model.modules()):
        raise ValueError("MAT is attached to this model already: mat.detach_(model) first")
    if not isinstance(units, Units):
        units = find_units(model, units=units, groups=config.groups, head_output=config.head_output)
    if config.units is not None:
        units = units.of_kinds(config.units)
    if config.log and units.left_out:
        print(f"MAT: left out {units.left_out_in_words()}")
    return Gates(model, units, config)


def detach_(model: nn.Module) -> None:
    """Make ordinary modules of an attached model again.

    Raises:
        ValueError: If it is not attached.
    """
    gates = getattr(model, "_gates", None)
    if gates is None:
        raise ValueError("MAT is not attached to this model")
    cast(Gates, gates).detach()
