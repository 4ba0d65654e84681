"""MAT under the Trainer of transformers."""

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from zoo import build

import mat
from mat.layers.gate import take

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
ROWS = [
    {"input_ids": torch.arange(6) % 5 + i, "labels": torch.arange(6) % 7 + i} for i in range(12)
]


def trainer_of(folder: Path, *, steps: int = 6, probe: Any = None, **options: Any) -> Any:
    """A Trainer of a tiny BERT whose gates change at every second step."""
    model, _ = build("bert", dtype=torch.float32)
    config = {"rule": "random", "share": 0.5, "every": 2, "log": False}
    config |= {key: options.pop(key) for key in ("rule", "share", "reduction") if key in options}
    gates = mat.attach_(model, mat.MATConfig(**config))
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=steps, save_steps=3, logging_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, learning_rate=0.01, weight_decay=0.1,
        **options,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=ROWS, callbacks=[mat.MATCallback(gates, probe)]
    )


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Six steps with a checkpoint after the third; the folder and its Trainer."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = trainer_of(folder)
    trainer.train()
    return folder, trainer


@pytest.mark.parametrize("case", ["plain", "restoring callbacks", "without the file"])
def test_resumed_run_has_the_uninterrupted_weights(
    uninterrupted: tuple[Path, Any], tmp_path: Path, case: str
) -> None:
    folder, whole = uninterrupted
    checkpoint = folder / "checkpoint-3"
    if case == "without the file":
        checkpoint = tmp_path / "elsewhere"
        shutil.copytree(folder / "checkpoint-3", checkpoint)
        (checkpoint / "gates.pt").unlink()
    options = {"restore_callback_states_from_checkpoint": case == "restoring callbacks"}
    output = tmp_path / "out" if case == "without the file" else folder
    trainer = trainer_of(output, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    gates, wanted = trainer.model._gates, whole.model._gates
    assert (
        gates.active == wanted.active
    ).all() and gates.policy.state.t == wanted.policy.state.t == 2
    ours, theirs = weights(trainer), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_optimiser_of_the_trainer_is_guarded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, steps=4)
    gates = trainer.model._gates
    mask = np.arange(len(gates.units)) % 2 == 0
    gates.maybe_select = lambda *_: gates.set_active(mask)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    for part in gates.parts():
        old, new = before[part.part.parameter], after[part.part.parameter]
        still = take(new, part.frozen, part.dim) == take(old, part.frozen, part.dim)
        assert still.all() and not torch.equal(old, new)


def test_resume_reads_the_checkpoint_that_it_is_given(
    uninterrupted: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = uninterrupted[0]
    other = folder.parent / "other"
    shutil.copytree(folder / "checkpoint-3", other / "checkpoint-3")
    file = other / "checkpoint-3" / "gates.pt"  # another run's, in the output folder
    saved = torch.load(file, weights_only=False)
    saved["active"] = [not active for active in saved["active"]]
    torch.save(saved | {"probe": "another"}, file)
    trainer = trainer_of(other, steps=4)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    assert trainer.model._gates.policy.state.t == 1 and trainer.model._gates.probe is None
    wanted = torch.load(folder / "checkpoint-3" / "gates.pt", weights_only=False)["active"]
    assert trainer.model._gates.active.tolist() == wanted


def test_another_training_selects_anew(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, steps=3)
    gates = trainer.model._gates
    for _ in range(2):
        trainer.train()
        assert gates.policy.state.t == 1 and gates.due == 4


def test_reading_ends_with_the_training(tmp_path: Path) -> None:
    options = {"rule": "threshold", "reduction": "online", "share": None}
    trainer = trainer_of(tmp_path, steps=3, save_strategy="no", **options)
    trainer.train()
    assert trainer.model._gates.policy.state.t == 0
    assert not trainer.model._forward_pre_hooks


def test_probe_comes_from_the_checkpoint(tmp_path: Path) -> None:
    probe = {"input_ids": ROWS[0]["input_ids"][None]}
    options = {"rule": "threshold", "reduction": "sum", "share": None}
    trainer_of(tmp_path, steps=3, probe=probe, **options).train()
    trainer = trainer_of(tmp_path, steps=4, **options)
    trainer.train(resume_from_checkpoint=True)
    assert torch.equal(trainer.model._gates.probe["input_ids"], probe["input_ids"])


def test_model_with_a_lambda_in_its_callback_pickles() -> None:
    model, loss = build("bert")
    gates = mat.attach_(model, mat.MATConfig(log=False))
    mat.MATCallback(gates, output=lambda result: result.logits)
    assert torch.equal(loss(pickle.loads(pickle.dumps(model))), loss(model))


def test_compact_optimiser_is_refused_in_a_sentence(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    trainer.optimizer = mat.SGD(trainer.model.parameters(), lr=0.1, compact=True)
    with pytest.raises(ValueError, match="compact=False"):
        trainer.train()


def test_trackers_get_the_numbers(uninterrupted: tuple[Path, Any]) -> None:
    lines = [line for line in uninterrupted[1].state.log_history if "loss" in line]
    assert lines[-1]["mat/active"] == 0.5 and 0 < lines[-1]["mat/skipped_backward_by_weights"] < 0.5


def test_checkpoint_loads_into_an_ordinary_model(uninterrupted: tuple[Path, Any]) -> None:
    folder, whole = uninterrupted
    plain = transformers.BertForMaskedLM.from_pretrained(folder / "checkpoint-6")
    wanted = weights(whole)
    assert all(torch.equal(p, wanted[name]) for name, p in plain.named_parameters())


def test_model_that_is_not_attached_is_named() -> None:
    from mat.integrations.trainer import gates_of

    with pytest.raises(ValueError, match="not attached to the Trainer's model"):
        gates_of(torch.nn.Linear(2, 2))
