"""What is measured: models of the suite in training, and the same sizes from stock layers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import DEVICE, TOY, Action, autocast
from mat.adapters import find_units
from mat.flops import Flops, Ledger
from mat.gates import Gates, attach_
from mat.layers.gate import BackwardMode
from mat.policy import MATConfig
from mat.suite.config import BertConfig, SwitchConfig, TrainConfig, VggConfig
from mat.suite.data.images import ImageBatch
from mat.suite.data.masking import MaskedBatch, mask
from mat.suite.interface import Batch, Model
from mat.suite.models import build_optimiser
from mat.suite.models.bert import Bert, MaskedEncoder
from mat.suite.models.switch import Experts, Switch
from mat.suite.models.vgg import Vgg
from mat.suite.stepper import Stepper

MODES: tuple[BackwardMode, ...] = ("cut", "exact")
TEXT = TrainConfig(pflops=1, batch=16, lr=1e-4)
IMAGES = TrainConfig(
    pflops=1, batch=128, lr=1e-3, optimiser="sgd", weight_decay=5e-4, clip=None
)  # fmt: skip
BASE = BertConfig("bert", "bert", 12, 768, 12, 3072, 12, "learned", "post")
MINI = BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "learned", "post")
BLOCK = SwitchConfig(
    name="switch_block", layers=1, width=768, heads=12, ffn_hidden=3072, ffn_groups=1, experts=8,
    positions="learned", norm="post",
)  # fmt: skip
# Configuration, vocabulary, sequences, tokens. The block has few pieces: itself is measured.
TEXTS: dict[str, tuple[BertConfig, int, int, int]] = {
    "bert_base": (BASE, 30522, 16, 128),
    "bert_mini": (MINI, 4096, 16, 128),
    "switch_block": (BLOCK, 256, 16, 128),
}
STAGES = [[64, 64], [128, 128], [256] * 3, [512] * 3, [512] * 3]
PICTURES = {"vgg16": STAGES, "vgg16_mini": [[width // 2 for width in stage] for stage in STAGES]}
if TOY:
    TEXTS = {
        name: (replace(config, layers=1, width=24, heads=3, ffn_hidden=48, ffn_groups=3), 64, 2, 8)
        for name, (config, *_) in TEXTS.items()
    }
    PICTURES = {name: [[8, 8], [16]] for name in PICTURES}
    IMAGES = replace(IMAGES, batch=4)


def tokens(vocabulary: int, samples: int, length: int) -> MaskedBatch:
    """A masked batch of random tokens."""
    ids = np.random.default_rng(0).integers(5, vocabulary, (samples, length)).astype(np.uint16)
    return mask(ids, 0.15, 4, 5, vocabulary, [0]).to(DEVICE)


def pictures(samples: int) -> ImageBatch:
    """Random images of CIFAR-10's size."""
    images = torch.randn(samples, 3, 32, 32, device=DEVICE)
    images = images.contiguous(memory_format=torch.channels_last)
    return ImageBatch(images, torch.randint(10, (samples,), device=DEVICE))


def encoder(config: BertConfig, vocabulary: int, length: int) -> MaskedEncoder:
    """A model of a configuration, on the device."""
    kind = Switch if isinstance(config, SwitchConfig) else Bert
    return kind(config, vocabulary, length).to(DEVICE)


def subject(name: str) -> "Subject":
    """One of ``TEXTS`` or ``PICTURES`` in training, with random weights and data."""
    if name in PICTURES:
        model = Vgg(VggConfig(name, stages=PICTURES[name]), 10, 3, 32).to(DEVICE)
        return Subject(model, pictures(IMAGES.batch), IMAGES)
    config, vocabulary, samples, length = TEXTS[name]
    return Subject(encoder(config, vocabulary, length), tokens(vocabulary, samples, length), TEXT)


def nothing() -> None:
    """What happens before and after the backward of most steps."""


class Subject:
    """A model in training; its steps share the optimiser and the gates.

    Args:
        model: The model, on ``DEVICE``, attached or not.
        batch: The batch of every step, there too.
        recipe: Optimiser, learning rate and clipping.
        bfloat16: Autocast; else the model's own precision.
        forward: Runs in place of the model in :meth:`launched` steps, such as its compiled form.
    """

    def __init__(
        self, model: Model, batch: Batch, recipe: TrainConfig, bfloat16: bool = True,
        forward: Callable[[Any], Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.recipe = model, batch, recipe
        self.context = partial(autocast, bfloat16)
        self.forward = forward or model
        self.gates = gates_of(model)
        self.optimiser = build_optimiser(model, recipe)

    def backward(self) -> None:
        """Forward and backward, gates as they stand."""
        self.model.train()
        self.optimiser.zero_grad()
        self.loss(self.forward).backward()

    def loss(self, forward: Callable[[Any], Any]) -> Tensor:
        """What a step differentiates."""
        with self.context():
            loss = self.model.loss_of_outputs(forward(self.batch), self.batch)
            extra = self.model.auxiliary_loss()
        return loss if extra is None else loss + extra

    def step(self, share: float = 1.0, mode: BackwardMode = "cut") -> Action:
        """A training step as in a run, a share of the units active.

        On CUDA it is a graph of its own, from the third call.
        """
        graphs = DEVICE.type == "cuda"
        stepper = Stepper(
            self.model, self.gates, self.optimiser, self.context, self.recipe.clip, graphs=graphs
        )

        def run() -> None:
            set_share(self.gates, share, mode)
            stepper.step(self.batch, self.recipe.lr)

        return run

    def launched(
        self, share: float = 1.0, before: Action = nothing, after: Action = nothing
    ) -> Action:
        """The same in ``cut``, every kernel launched by itself.

        Args:
            share: Of the units.
            before: Runs before its forward.
            after: Runs behind its backward.
        """

        def run() -> None:
            set_share(self.gates, share, "cut")
            before()
            self.backward()
            after()
            self.optimiser.clip_grad_norm_(self.recipe.clip)
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.lr
            self.optimiser.step()
            self.optimiser.zero_grad()  # the set may change now

        return run

    def flops(self, share: float, mode: BackwardMode) -> Flops:
        """What a step spends."""
        set_share(self.gates, share, mode)
        ledger = Ledger(self.model, lambda: self.loss(self.model), ("decoder",))
        return ledger.step()


def gates_of(model: nn.Module) -> Gates:
    """The gates of a model of the suite; it is attached if it is not."""
    if not hasattr(model, "_gates"):
        groups = getattr(getattr(model, "config", None), "ffn_groups", None)
        attach_(model, MATConfig(log=False), find_units(model, groups=groups))
    return cast(Gates, model._gates)


def set_share(gates: Gates, share: float, mode: BackwardMode) -> None:
    """``share`` of every layer's units active, spread evenly over it."""
    active = np.zeros(len(gates.units), bool)
    for gate, (layer, rows) in zip(gates.layers, gates.units.slices(), strict=True):
        gate.mode = mode
        wanted = round(share * layer.n_units)
        active[rows.start + np.arange(wanted) * layer.n_units // max(1, wanted)] = True
    gates.set_active(active)


# --- stock layers


def stock_step(model: nn.Module, loss: Callable[[], Tensor], recipe: TrainConfig) -> Action:
    """A step as a plain loop makes it, with torch's own optimiser."""
    optimiser: torch.optim.Optimizer
    lr, decay = recipe.lr, recipe.weight_decay
    if recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(model.parameters(), lr, recipe.momentum, weight_decay=decay)
    else:
        betas = recipe.betas[0], recipe.betas[1]
        optimiser = torch.optim.AdamW(model.parameters(), lr, betas, recipe.eps, decay, fused=True)

    def run() -> None:
        model.train()
        optimiser.zero_grad()
        with autocast():
            value = loss()
        value.backward()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimiser.step()

    return run


def stock_twin(subject: Subject) -> Action:
    """The step of a twin from stock layers with products of the same sizes.

    transformers' BERT, in the Switch block with the sparse MLP of its Switch; torchvision's VGG.
    """
    if isinstance(subject.model, Vgg):
        return _stock_vgg(subject)
    theirs = stock_encoder(cast(MaskedEncoder, subject.model))
    return stock_step(theirs, by_position(theirs, cast(MaskedBatch, subject.batch)), TEXT)


def _stock_vgg(subject: Subject) -> Action:
    """The layers of torchvision, channels-last, with a CIFAR head."""
    from torchvision.models.vgg import make_layers

    features = cast(nn.Sequential, subject.model.features)
    widths = [m.out_channels if isinstance(m, nn.Conv2d) else "M" for m in features
              if isinstance(m, nn.Conv2d | nn.MaxPool2d)]  # fmt: skip
    plan: list[Any] = list(widths)
    side = 32 // 2 ** plan.count("M")
    head = nn.Linear(max(w for w in plan if w != "M") * side * side, 10)
    model = nn.Sequential(make_layers(plan, batch_norm=True), nn.Flatten(), head)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    batch = subject.batch

    def loss() -> Tensor:
        return F.cross_entropy(model(batch.inputs).float(), batch.targets)

    return stock_step(model, loss, IMAGES)


def stock_encoder(model: MaskedEncoder) -> Any:
    """``transformers.BertForMaskedLM`` of a model's size."""
    import transformers

    config, (vocabulary, width) = model.config, model.tokens.weight.shape
    theirs = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=config.layers,
            num_attention_heads=config.heads, intermediate_size=config.ffn_hidden,
            max_position_embeddings=cast(nn.Embedding, model.positions).num_embeddings,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    for layer, block in zip(theirs.bert.encoder.layer, model.blocks, strict=True):
        if isinstance(block.ffn, Experts):
            layer.intermediate, layer.output.dense = stock_experts(block.ffn), nn.Identity()
    return theirs.to(DEVICE)


def stock_experts(ours: Experts) -> nn.Module:
    """The sparse MLP of transformers' Switch, with the router of ours."""
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    config = SwitchTransformersConfig(
        d_model=ours.config.width, d_ff=ours.config.ffn_hidden, num_experts=ours.experts,
        expert_capacity=10**9, dense_act_fn="gelu", dropout_rate=0.0, router_jitter_noise=0.0,
    )  # fmt: skip
    theirs: Any = SwitchTransformersSparseMLP(config)
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router.weight)
    module: nn.Module = theirs.to(DEVICE).train()
    return module


def by_label(theirs: Any, batch: MaskedBatch) -> Callable[[], Tensor]:
    """The loss as transformers offers it: logits everywhere, label -100 where nothing is masked."""
    labels = torch.full((batch.inputs.numel(),), -100, device=DEVICE)
    labels[batch.positions] = batch.targets
    labels = labels.view_as(batch.inputs)
    return lambda: theirs(input_ids=batch.inputs, labels=labels).loss


def by_position(theirs: Any, batch: MaskedBatch) -> Callable[[], Tensor]:
    """The loss with logits at the masked positions only, as ours: equal products."""

    def loss() -> Tensor:
        hidden = theirs.bert(input_ids=batch.inputs).last_hidden_state.flatten(0, 1)
        chosen = hidden.index_select(0, batch.positions)  # (P, D)
        return F.cross_entropy(theirs.cls(chosen).float(), batch.targets)

    return loss
