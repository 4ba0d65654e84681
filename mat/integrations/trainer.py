"""A callback for the Trainer of transformers: selections, guarded optimiser, resume, numbers.

The state of the gates rides in the Trainer's checkpoint. ``trainer_state.json``, which the Trainer
reads from the checkpoint that it resumes, has all but the probe; ``gates.pt`` beside it has the
probe, too. Neither needs ``restore_callback_states_from_checkpoint``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from mat.gates import Gates

FILE = "gates.pt"


class MATCallback(TrainerCallback, ExportableState):
    """Selects at step beginnings, guards the optimiser, saves and restores the gates.

    Args:
        gates: Of the attached model. A Trainer that restores callbacks makes one without.
        probe: Batch that scores are measured on; not needed for ``reduction="online"``.
        output: From the model's output to the tensor whose Jacobian is measured; its logits when
            None.
        loss: Mean loss from the model's output and the probe, for ``score="gradnorm"``; the
            output's own when None.
    """

    def __init__(
        self,
        gates: Gates | None = None,
        probe: Any = None,
        output: Callable[[Any], Tensor] | None = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        self.gates, self.probe, self.loss = gates, probe, loss
        self.output = output or logits
        if gates is not None:
            gates.callback = self  # for the one that a restoring Trainer puts in this one's place

    def state(self) -> dict[str, Any]:
        """What ``trainer_state.json`` keeps."""
        assert self.gates is not None
        saved = self.gates.state_dict() | {"probe": None}
        return {"args": {}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Take the optimiser under guard; restore the gates of a checkpoint, or start anew.

        Raises:
            ValueError: If the optimiser is compact, or the checkpoint has no state of gates.
        """
        if self.gates is None:
            self.gates = gates_of(named["model"])
            given = self.gates.callback
            self.probe, self.output, self.loss = given.probe, given.output, given.loss
        optimiser = getattr(named["optimizer"], "optimizer", named["optimizer"])
        if getattr(optimiser, "compact", False):
            raise ValueError(
                "the Trainer clips and clears full gradients: make its optimiser with compact=False"
            )
        self.gates.guard(optimiser)
        if not state.global_step:
            self.gates.reset()
            return
        states: Any = state.stateful_callbacks or {}
        kept = states.get(type(self).__name__)
        if not isinstance(kept, dict):
            raise ValueError(
                f"the checkpoint of step {state.global_step} has no state of MATCallback"
            )
        saved = kept["attributes"]["saved"]
        self.gates.load_state_dict(saved | {"probe": probe_beside(saved, args, state)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """End a reading that no step will complete."""
        assert self.gates is not None
        self.gates.stop_reading()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Select, if a selection is due."""
        assert self.gates is not None
        self.gates.maybe_select(state.global_step, self.probe, self.output, self.loss)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **named: Any,
    ) -> None:
        """Add the gates' numbers to the Trainer's history, and to what later callbacks log.

        Trackers named in ``report_to`` stand before it in ``trainer.callback_handler.callbacks``.
        """
        assert self.gates is not None and logs is not None
        numbers = self.gates.log_numbers()
        logs.update(numbers)
        state.log_history[-1].update(numbers)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Write the file of the gates into the checkpoint."""
        if state.is_world_process_zero and self.gates is not None:
            torch.save(self.gates.state_dict(), folder(args, state) / FILE)


def folder(args: TrainingArguments, state: TrainerState) -> Path:
    """The Trainer's checkpoint of the present step."""
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def probe_beside(saved: dict[str, Any], args: TrainingArguments, state: TrainerState) -> Any:
    """The probe of the gates' state of a checkpoint; None if its file is not found.

    The Trainer does not tell a callback which folder it resumes: a file of another state is left.
    """
    given = args.resume_from_checkpoint
    for place in (Path(given) if isinstance(given, str) else None, folder(args, state)):
        if place is not None and (place / FILE).exists():
            whole = torch.load(place / FILE, weights_only=False)
            if without_probe(whole) == without_probe(saved):
                return whole["probe"]
    return None


def without_probe(saved: dict[str, Any]) -> str:
    """A state of gates as text: numbers that are no number are equal there."""
    return json.dumps(saved | {"probe": None}, sort_keys=True)


def gates_of(model: nn.Module) -> Gates:
    """The gates of a model that is attached, or holds one that is.

    Raises:
        ValueError: If it is not attached.
    """
    for module in model.modules():
        gates = getattr(module, "_gates", None)
        if isinstance(gates, Gates):
            return gates
    raise ValueError("MAT is not attached to the Trainer's model: MATCallback(mat.attach_(model))")


def logits(output: Any) -> Tensor:
    """The logits of a model of transformers."""
    scores: Tensor = output.logits
    return scores
