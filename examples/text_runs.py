"""One run of fine-tuning: a method, a learning rate and a seed, until its FLOPs are spent."""

import json
import math
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import mat
from examples.meter import Meter, now, peak_memory, schedule
from examples.text_data import Split, read
from examples.text_methods import METHODS, optimiser_of, prepared

CLIP = 1.0


@dataclass(frozen=True)
class Settings:
    """What all runs of a table have in common.

    Attributes:
        model: Name or folder of the pretrained model.
        data: Folder with the documents.
        length: Tokens of a document.
        epochs: Of full fine-tuning.
        flops: Share of its FLOPs that the other methods spend.
        batch: Documents of a step.
        precision: ``float32``, ``tf32`` or ``bfloat16`` (autocast).
        device: ``cpu`` or ``cuda``.
    """

    model: str
    data: str
    length: int
    epochs: float
    flops: float
    batch: int
    precision: str
    device: str


@dataclass(frozen=True)
class Task:
    """A run: a method with a learning rate and a seed, in a folder of its kind."""

    method: str
    rate: float
    seed: int

    def path(self, folder: Path) -> Path:
        """Its result."""
        return folder / f"{self.method}-lr{self.rate:g}-seed{self.seed}.json"


class Spending(TrainerCallback):
    """Counts FLOPs and seconds of training and selecting, and stops when the FLOPs are spent.

    Comes behind the callback that selects. Seconds leave out what counting takes.

    Args:
        meter: Knows what a step costs.
        budget: FLOPs of the run.
    """

    def __init__(self, meter: Meter, budget: float) -> None:
        self.meter, self.budget = meter, budget
        self.spent = self.steps = self.selections = 0
        self.active = self.seconds = 0.0

    def rate(self, _: int) -> float:
        """Factor of the learning rate: linear warm-up and decay over the FLOPs."""
        return schedule(self.spent / self.budget)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self.seconds -= now()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count a selection that was just made."""
        gates = self.meter.gates
        if gates is not None and gates.policy.state.t >= self.selections:
            self.selections += 1
            self.spent += self.meter.selection

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Count the step, before the schedule reads what is spent."""
        start = time.perf_counter()
        self.spent += self.meter.step()
        gates = self.meter.gates
        self.active += 1.0 if gates is None else float(gates.active.mean())
        self.seconds -= time.perf_counter() - start

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop, if that was the last one."""
        self.steps += 1
        control.should_training_stop = self.spent >= self.budget

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop the clock."""
        self.seconds += now()


def run(task: Task, settings: Settings, cache: Path, folder: Path) -> None:
    """Fine-tune once and write what came of it, unless it is there."""
    path = task.path(folder)
    if path.is_file():
        result_of(path, settings)
        return
    quiet()
    documents = read(Path(settings.data), settings.model, settings.length, cache)
    transformers.set_seed(task.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        settings.model, num_labels=documents.classes, dtype=torch.float32
    ).to(settings.device)
    method = METHODS[task.method]
    batch = documents.train.batch(slice(settings.batch), settings.device)

    def loss() -> Tensor:
        return model(**batch).loss

    dense = Meter(model, loss).step()
    whole = dense * settings.epochs * (len(documents.train) // settings.batch)
    budget = whole * (1.0 if method.whole else settings.flops)
    probe = {name: batch[name] for name in batch if name != "labels"}
    model, gates, callbacks = prepared(method, model, probe, task.seed)
    online = gates is None or gates.config.reduction == "online"
    meter = Meter(model, loss, gates, batch if online else probe)
    spending = Spending(meter, budget)
    optimiser = optimiser_of(model, gates, task.rate)
    trainer = Trainer(
        model,
        arguments_of(settings, task.seed, math.ceil(3 * budget / dense), folder),
        data_collator=lambda batch: batch,
        train_dataset=documents.train,
        callbacks=[*callbacks, spending],
        optimizers=(optimiser, LambdaLR(optimiser, spending.rate)),
    )
    trainer.remove_callback(PrinterCallback)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    memory = peak_memory(settings.device)
    if gates is not None:
        mat.detach_(model)
    validation = scores(model, documents.validation, settings.device)
    test = scores(model, documents.test, settings.device)
    result = {
        **asdict(task), "settings": asdict(settings), "accuracy": test[0],
        "validation_accuracy": validation[0], "validation_loss": validation[1],
        "flops": spending.spent, "flops_of_full": whole, "steps": spending.steps,
        "selections": spending.selections, "active": spending.active / spending.steps,
        "seconds": spending.seconds, "peak_memory": memory, "machine": machine(settings.device),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".part").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".part").rename(path)
    words = (
        f"validation {validation[0]:.4f}, test {test[0]:.4f}, {spending.spent / whole:.3f} FLOPs"
    )
    print(f"{path.stem}: {words}, {spending.steps} steps, {spending.seconds:.1f} s", flush=True)


def result_of(path: Path, settings: Settings) -> dict[str, Any]:
    """A finished run.

    Raises:
        SystemExit: If it was made with other settings.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    for name, value in asdict(settings).items():
        earlier = result["settings"][name]
        if Path(str(earlier)).name != Path(str(value)).name:  # folders may have moved
            raise SystemExit(
                f"{path}: made with {name}={earlier}, not {value}: choose another --out"
            )
    return result


def arguments_of(settings: Settings, seed: int, most: int, folder: Path) -> TrainingArguments:
    """Arguments of a Trainer in whose steps nothing waits for the device.

    Args:
        settings: Of all runs.
        seed: Of order and dropout.
        folder: Of the results; the Trainer saves nothing.
        most: Steps that no method reaches: a forward pass is at least a third of a dense step.
    """
    cpu = settings.device == "cpu"
    return TrainingArguments(
        output_dir=str(folder), max_steps=most, per_device_train_batch_size=settings.batch,
        dataloader_drop_last=True, seed=seed, max_grad_norm=CLIP, use_cpu=cpu,
        bf16=settings.precision == "bfloat16",
        tf32=None if cpu else settings.precision != "float32",
        save_strategy="no", logging_strategy="no", report_to="none", disable_tqdm=True,
        remove_unused_columns=False, logging_nan_inf_filter=False,
    )  # fmt: skip


@torch.no_grad()
def scores(model: Any, split: Split, device: str, batch: int = 256) -> tuple[float, float]:
    """Accuracy and mean loss of a split."""
    model.eval()
    right = torch.zeros((), device=device)
    loss = torch.zeros((), device=device)
    for first in range(0, len(split), batch):
        documents = split.batch(slice(first, first + batch), device)
        labels = documents.pop("labels")
        logits = model(**documents).logits.float()
        right += (logits.argmax(-1) == labels).sum()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return float(right) / len(split), float(loss) / len(split)


def quiet() -> None:
    """Keep transformers from telling about every model it loads."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def machine(device: str) -> dict[str, Any]:
    """What the run ran on."""
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    return {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
