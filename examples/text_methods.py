"""Ways to fine-tune a BERT for less than the FLOPs of training all of it.

MAT and its controls are configurations of the library; what is no policy of it sets the gates by
hand; training the top layers and LoRA need no gates.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import mat

SHARE = 1 / 3  # of the units, layers or sub-layers that train
EVERY = 20  # steps between selections
RATES = 1e-4, 2e-4, 4e-4, 8e-4


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        about: What it trains.
        whole: Whether it may spend the FLOPs of full fine-tuning.
        config: Of the gates, if it has any.
        drawn: What is drawn at random, if the gates are set by hand.
        every: Steps between draws.
        plain: How it trains less without gates.
        rates: Learning rates that are tried on the validation documents.
    """

    about: str
    whole: bool = False
    config: mat.MATConfig | None = None
    drawn: Literal["layers", "sub-layers"] | None = None
    every: int = EVERY
    plain: Literal["top layers", "lora"] | None = None
    rates: tuple[float, ...] = RATES


def mat_config(**choices: Any) -> mat.MATConfig:
    """Scores read off training steps unless said otherwise."""
    defaults: dict[str, Any] = {"every": EVERY, "reduction": "online", "log": False}
    return mat.MATConfig(**defaults | choices)


METHODS = {
    "full": Method("all parameters", whole=True),
    "fitted": Method("all parameters, the schedule fitted to fewer FLOPs"),
    "mat-alpha": Method("MAT, alpha = 0.1", config=mat_config(alpha=0.1)),
    "mat-share": Method("MAT, a third of the units", config=mat_config(share=SHARE)),
    "mat-probe": Method(
        "MAT, a third of the units, scores from a probe",
        config=mat_config(share=SHARE, reduction="random"),
    ),
    "static": Method(
        "MAT's first set of a third, kept", config=mat_config(rule="static", share=SHARE)
    ),
    "random-units": Method(
        "a random third of the units", config=mat_config(rule="random", share=SHARE)
    ),
    "random-layers": Method(
        "a random third of the layers, the gradient flows through the others (as LISA)",
        config=mat_config(rule="all", mode="exact"),
        drawn="layers",
    ),
    "random-sublayers": Method(
        "a random third of the sub-layers, drawn at every step (as DropBP)",
        config=mat_config(rule="all"),
        drawn="sub-layers",
        every=1,
    ),
    "top-layers": Method("the top third of the layers", plain="top layers"),
    "lora": Method(
        "LoRA of rank 8 on queries and values", plain="lora", rates=tuple(10 * r for r in RATES)
    ),
}


def prepared(
    method: Method, model: Any, probe: Any, seed: int
) -> tuple[Any, mat.Gates | None, list[TrainerCallback]]:
    """A model that trains as the method says.

    Args:
        method: The method.
        model: For classification, of the BERT family.
        probe: Batch that scores are measured on, if the method does.
        seed: Of random choices.

    Returns:
        The model, its gates if it has any, and the Trainer's callbacks.
    """
    if method.plain == "top layers":
        train_top_layers(model)
    if method.plain == "lora":
        return with_lora(model), None, []
    if method.config is None:
        return model, None, []
    config = mat.MATConfig(**vars(method.config) | {"seed": seed})
    gates = mat.attach_(model, config)
    if method.drawn is None:
        return model, gates, [mat.MATCallback(gates, probe)]
    groups = gates.units.layer
    if method.drawn == "sub-layers":
        kinds = np.unique(gates.units.kind, return_inverse=True)[1]
        groups = groups * (kinds.max() + 1) + kinds
    return model, gates, [Draw(gates, groups, method.every, seed)]


class Draw(TrainerCallback):
    """Sets the gates by hand: the units of a third of some groups, drawn at random, train.

    Args:
        gates: Of the attached model.
        groups: (N,) number of each unit's group.
        every: Steps between draws.
        seed: Of the draws.
    """

    def __init__(self, gates: mat.Gates, groups: NDArray[np.int64], every: int, seed: int) -> None:
        self.gates, self.groups, self.every = gates, groups, every
        self.random = np.random.default_rng(seed)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Draw, if a draw is due."""
        if state.global_step % self.every == 0:
            groups = np.unique(self.groups)
            drawn = self.random.permutation(groups)[: max(1, round(SHARE * len(groups)))]
            self.gates.set_active(np.isin(self.groups, drawn))


def train_top_layers(model: Any) -> None:
    """Freeze the embeddings and all but the top third of the layers; the head trains."""
    layers = model.base_model.encoder.layer
    below = [model.base_model.embeddings, *layers[: -max(1, round(SHARE * len(layers)))]]
    for module in below:
        module.requires_grad_(False)


def with_lora(model: Any) -> Any:
    """The model with LoRA of rank 8 on queries and values; the head trains as it is."""
    import peft

    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.1,
        target_modules=["query", "value"], modules_to_save=["pooler", "classifier"],
    )  # fmt: skip
    return peft.get_peft_model(model, config)


def optimiser_of(model: Any, gates: mat.Gates | None, rate: float) -> torch.optim.Optimizer:
    """AdamW: of the library for a gated model, else torch's."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if gates is not None:
        return mat.AdamW(parameters, lr=rate)
    return torch.optim.AdamW(parameters, lr=rate, fused=True)
