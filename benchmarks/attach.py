"""Training steps of attached transformers models, a third of the units active in ``cut``.

    python -m benchmarks.attach [case ...]   # those named are measured again, the others' stay

The dense step is that of the model before attaching, with torch's fused AdamW. FLOPs are those of
the whole step, heads and vocabulary included.
"""

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import mat
from benchmarks.harness import DEVICE, Action, Row, autocast, medians, row, write
from mat.flops import Ledger
from mat.suite.precision import machine_precision

RATE = 1e-4
REPEATS = 7
SHARE = 1 / 3
BATCH, LENGTH = 8, 128
ALL_ACTIVE, THIRD, GUARDED = 1.02, 1.12, 1.20  # wanted at most


@dataclass
class Case:
    """A model with a batch; the model gives the batch's loss.

    Attributes:
        make: Makes the model.
        batch: Makes the batch.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]


def bert() -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return transformers.BertForMaskedLM(config)


def llama() -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=512, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=1376, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def vit() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def tokens() -> dict[str, Tensor]:
    """Random tokens, all of them labels."""
    ids = torch.randint(5, 30000, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def images() -> dict[str, Tensor]:
    """Random images of 197 tokens each."""
    return {"pixel_values": torch.randn(BATCH, 3, 224, 224), "labels": torch.zeros(BATCH).long()}


CASES = {"bert": Case(bert, tokens), "vit_s": Case(vit, images), "llama": Case(llama, tokens)}


def step(model: Any, batch: dict[str, Tensor], optimiser: Any, bfloat16: bool) -> Action:
    """A training step without clipping."""

    def run() -> None:
        with autocast(bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    return run


def attached(
    case: nn.Module, batch: dict[str, Tensor], way: str, bfloat16: bool
) -> tuple[mat.Gates, Action]:
    """A copy of a model, attached, with the step of one of the ways to update it."""
    model = copy.deepcopy(case)
    gates = mat.attach_(model, mat.MATConfig(mode="cut", log=False))
    if way == "torch's AdamW, guarded":
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
        gates.guard(optimiser)
    else:
        optimiser = mat.AdamW(model.parameters(), RATE, compact=way.endswith("compact"))
    return gates, step(model, batch, optimiser, bfloat16)


WAYS = {"mat.AdamW, compact": THIRD, "mat.AdamW": THIRD, "torch's AdamW, guarded": GUARDED}


def third(gates: mat.Gates) -> None:
    """A third of every layer's units active, spread evenly over it."""
    active = np.zeros(len(gates.units), bool)
    for layer, rows in gates.units.slices():
        wanted = round(SHARE * layer.n_units)
        active[rows.start + np.arange(wanted) * layer.n_units // wanted] = True
    gates.set_active(active)


def measure(name: str, case: Case, bfloat16: bool) -> list[Row]:
    """All ways with all and with a third active, each beside the dense step."""
    torch.manual_seed(0)
    model = case.make().to(DEVICE).train()
    batch = {key: value.to(DEVICE) for key, value in case.batch().items()}
    optimiser = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    label = f"{name}{', bfloat16' if bfloat16 else ''}"
    rows = []
    for way, wanted in WAYS.items():
        gates, action = attached(model, batch, way, bfloat16)
        dense = step(model, batch, optimiser, bfloat16)
        spent, whole = medians([action, dense], REPEATS)
        rows.append(row(f"{label}: {way}, all active against the untouched model", spent, whole,
                        ALL_ACTIVE))  # fmt: skip
        ledger = Ledger(gates.model, partial(_loss, gates.model, batch))
        work = 1 / ledger.step().everything
        third(gates)
        work *= ledger.step().everything
        spent, whole = medians([action, dense], REPEATS)
        rows.append(row(f"{label}: {way}, a third active, step against dense", spent, whole, None))
        rows.append(row(f"{label}: {way}, a third active, time ratio over FLOPs ratio",
                        spent / whole, work, wanted, "of dense"))  # fmt: skip
    return rows


def _loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def main() -> None:
    """Measure the cases named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], metavar="CASE")
    for name in parser.parse_args().cases or CASES:
        for bfloat16 in (False, True) if machine_precision(DEVICE.type) == "bfloat16" else (False,):
            write("attach", measure(name, CASES[name], bfloat16), merge=True)


if __name__ == "__main__":
    main()
