"""The estimator against its peers, on BERT-mini and a twin with the same weights from stock layers.

    python -m benchmarks.peers                # seconds in turn, peak memory in own processes
    python -m benchmarks.peers --memory NAME  # what those processes run

Given the same reduction (random signs, n = 32, m = 1), ours in bf16 autocast. Neither torch.func's
transforms nor BackPACK work under autocast, so the peers get a twin that is bf16 throughout, which
is no slower:

``ours``           ``mat.ntk.estimate``
``vmap(grad)``     torch.func per-sample gradients of reduced outputs, sliced by unit, multiplied
``ntk tutorial``   the empirical NTK of torch.func's tutorial (``jacrev`` per sample, then einsum)
``BackPACK``       per-sample gradients by ``BatchGrad``, sliced by unit, multiplied

Without a reduction the exact kernel has n k = 2.5 million rows: no peer can form it, and what is
left is an iterative eigensolver over Jacobian products. ``curvlinops`` gives them
(``JacobianLinearOperator``); scipy's ``eigsh`` works on a unit's parameters (J^T J, the smaller
side). It is timed on a few units, times the number of units. A peer that is not installed is left
out.
"""

import argparse
import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from benchmarks.fidelity import compare
from benchmarks.harness import (
    DEVICE,
    TOY,
    Row,
    autocast,
    in_process,
    medians,
    peak_bytes,
    row,
    seconds,
    write,
)
from benchmarks.peers_twin import Twin, exact, kernels_of, of_unit, sliced
from benchmarks.subjects import TEXT, Subject, encoder, gates_of, tokens
from mat import ntk
from mat.reduction import Reducer
from mat.suite.config import BertConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.models.bert import MaskedEncoder

MINI = BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "rotary", "pre")
VOCABULARY, LENGTH, SAMPLES, SEED = 4096, 128, 32, 0
if TOY:
    MINI = BertConfig("bert_mini", "bert", 1, 24, 2, 24, 2, "rotary", "pre")
    VOCABULARY, LENGTH, SAMPLES = 32, 16, 4
EIGEN_UNITS = 3  # units that the eigensolver is timed on
MANY = 32  # projections that stand for the truth
Kernels = Callable[[], Tensor]


class Contenders:
    """Everybody's way to the kernels of all units, given the same model, probe and signs.

    Args:
        model: The model.
        batch: The probe.
        bfloat16: Compute in bf16; else in the model's own precision.
    """

    def __init__(self, model: MaskedEncoder, batch: MaskedBatch, bfloat16: bool = True) -> None:
        self.model, self.batch, self.bfloat16 = model, batch, bfloat16
        self.config = model.config
        self.twin = Twin(model).eval().to(batch.inputs.device)
        if bfloat16:
            self.twin.bfloat16()
        self.positions = batch.positions.view(batch.samples, -1) % batch.length
        wanted = {name for group in sliced(self.config) for name, _, _ in group}
        for name, parameter in self.twin.named_parameters():
            parameter.requires_grad_(name in wanted)
        self.extended = copy.deepcopy(self.twin)  # BackPACK's, whose hooks torch.func cannot trace
        self.gated = {
            name: p.detach() for name, p in self.twin.named_parameters() if name in wanted
        }
        pieces = len(model.tokens.weight)
        outputs = torch.empty(self.positions.numel(), pieces, device=batch.inputs.device)
        reducer = Reducer("random", 1, SEED, batch.samples)
        (signs, _), *_ = reducer.cotangents(outputs, batch, outputs, 0, batch.samples)
        self.signs = signs.view(batch.samples, -1, pieces).to(self.twin.rotary.dtype)

    def all(self) -> dict[str, Kernels]:
        """By name, ours first."""
        found = {
            "ours": self.ours, "vmap(grad)": self.vmap_grad, "ntk tutorial": self.tutorial,
        }  # fmt: skip
        return found | ({"BackPACK": self.backpack} if "BackPACK" in METHODS else {})

    def ours(self) -> Tensor:
        """The estimator."""
        with autocast(self.bfloat16):
            kernels = ntk.estimate(self.model, self.batch, seed=SEED, kernels=True).kernels
        assert kernels is not None
        return kernels

    def _reduced(
        self, parameters: dict[str, Tensor], tokens: Tensor, positions: Tensor, signs: Tensor
    ) -> Tensor:
        outputs = functional_call(self.twin, parameters, (tokens[None], positions[None]))[0]
        return (outputs * signs).sum()

    def vmap_grad(self) -> Tensor:
        """torch.func: per-sample gradients in one vmap."""
        samples = (self.batch.inputs, self.positions, self.signs)
        gradients = vmap(grad(self._reduced), (None, 0, 0, 0))(self.gated, *samples)
        return kernels_of(gradients, self.config)

    def tutorial(self) -> Tensor:
        """torch.func's tutorial on NTKs, method 1: Jacobian contraction, here unit by unit."""
        samples = (self.batch.inputs, self.positions, self.signs)
        jacobian = vmap(jacrev(self._reduced), (None, 0, 0, 0))(self.gated, *samples)
        kernels = []
        for group in sliced(self.config):
            for u in range(group[0][2]):
                slices = [of_unit(jacobian[name], axis, units, u) for name, axis, units in group]
                parts = map(exact, slices)
                kernels.append(sum(torch.einsum("Nf,Mf->NM", part, part) for part in parts))
        return torch.stack(kernels)

    def backpack(self) -> Tensor:
        """BackPACK's BatchGrad; its hooks sit on the linear layers, which hold all wanted."""
        from backpack import backpack, extend
        from backpack.extensions import BatchGrad

        for module in self.extended.modules():
            if isinstance(module, nn.Linear) and module.weight.requires_grad:
                extend(module)
        loss = (self.extended(self.batch.inputs, self.positions) * self.signs).sum()
        with backpack(BatchGrad()):
            loss.backward()
        gradients = {}
        for name, parameter in self.extended.named_parameters():
            if name in self.gated:
                gradients[name] = parameter.grad_batch  # type: ignore[attr-defined]
                del parameter.grad_batch  # type: ignore[attr-defined]
                parameter.grad = None
        return kernels_of(gradients, self.config)

    def curvlinops(self, number: int, tolerance: float) -> tuple[float, int]:
        """lambda_max of one unit without a reduction, and the Jacobian products that it took."""
        from curvlinops import JacobianLinearOperator
        from scipy.sparse.linalg import LinearOperator, eigsh

        flat = [(group, u) for group in sliced(self.config) for u in range(group[0][2])]
        group, u = flat[number]
        names = [name for name, _, _ in group]
        parameters = [dict(self.twin.named_parameters())[name] for name in names]
        both = torch.cat([self.batch.inputs, self.positions], 1)
        length = self.batch.length

        class OneTensor(nn.Module):
            def forward(module, x: Tensor) -> Tensor:
                return self.twin(x[:, :length], x[:, length:]).flatten(1)

        wrapper = OneTensor()
        wrapper.twin = self.twin
        jacobian = JacobianLinearOperator(
            wrapper, parameters, [(both, self.signs)], check_deterministic=False
        )  # fmt: skip
        masks = []
        for p, (_, axis, units) in zip(parameters, group, strict=True):
            masks.append(torch.zeros_like(p))
            masks[-1].chunk(units, axis)[u].fill_(1)
        mask = torch.cat([each.flatten() for each in masks])
        inside = mask.nonzero().flatten()
        products = 0

        def multiply(vector: Any) -> Any:
            nonlocal products
            products += 1
            full = torch.zeros_like(mask)
            full[inside] = torch.from_numpy(np.asarray(vector)).to(mask).flatten()
            product = (jacobian.adjoint() @ (jacobian @ full))[inside]
            return product.detach().to("cpu", torch.float64).numpy()

        operator = LinearOperator((len(inside),) * 2, matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(0).normal(size=len(inside))
        top = eigsh(operator, k=1, tol=tolerance, v0=start, return_eigenvectors=False)
        return float(top[0]), products


def contenders(samples: int = SAMPLES) -> Contenders:
    """On BERT-mini at initialisation."""
    torch.manual_seed(0)
    model = encoder(MINI, VOCABULARY, LENGTH)
    gates_of(model)
    return Contenders(model, tokens(VOCABULARY, samples, LENGTH))


def peak(name: str) -> int:
    """Peak memory of one call, behind a small one."""
    contenders(2).all()[name]()
    return peak_bytes(contenders().all()[name])


def installed(*names: str) -> bool:
    """Whether packages can be imported."""
    return all(importlib.util.find_spec(name) is not None for name in names)


METHODS = ["ours", "vmap(grad)", "ntk tutorial"] + ["BackPACK"] * installed("backpack")


def main() -> None:
    """Measure all."""
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", choices=METHODS)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.memory:
        print(json.dumps(peak(arguments.memory)))
        return
    prepared = contenders()
    kernels = {name: action() for name, action in prepared.all().items()}
    for name, kernel in kernels.items():
        error = float((kernel - kernels["ours"]).abs().amax() / kernels["ours"].abs().amax())
        print(f"{name}: differs from ours by {error:.1e} of the largest entry", flush=True)
    batch = tokens(VOCABULARY, 64, LENGTH)
    dense = Subject(copy.deepcopy(prepared.model), batch, TEXT).step()
    plain = Contenders(prepared.model, prepared.batch, bfloat16=False).vmap_grad
    actions = {**prepared.all(), "vmap(grad) in float32": plain, "a dense step of 64": dense}
    times = medians(list(actions.values()), arguments.repeats)
    timed = dict(zip(actions, times, strict=True))
    wanted = {"a dense step of 64": 0.7, "vmap(grad) in float32": None}
    rows = []
    for name in list(actions)[1:]:
        label = f"mini, n=32 m=1: ours against {name}"
        rows.append(row(label, timed["ours"], timed[name], wanted.get(name, 1 / 3)))
    by = {name: 1 for name in METHODS} if TOY else {}
    peaks = by or {name: in_process("peers", "--memory", name) for name in METHODS}
    best = min(METHODS[1:], key=lambda name: timed[name])
    for name in METHODS[1:]:
        label = f"mini, n=32 m=1: peak memory, ours against {name}"
        quarter = 0.25 if name == best else None
        rows.append(row(label, peaks["ours"], peaks[name], quarter, "byte"))
    if not installed("curvlinops", "scipy"):
        print("no eigensolver here: install curvlinops-for-pytorch and scipy")
        write("peers", rows)
        return
    last, eigensolver = without_reduction(prepared)
    write("peers", [*rows, last], eigensolver=eigensolver)


def without_reduction(prepared: Contenders) -> tuple[Row, dict[str, Any]]:
    """The smallest m whose top third agrees with that of many, against the eigensolver.

    The solver works on exact outputs, on a twin in bf16 (CPU) and on one in float32; the faster one
    counts. Beside the comparison: of both the seconds, Jacobian products and ratio of exact lambda
    to that of many projections, for every unit timed.
    """
    model, batch = prepared.model, prepared.batch
    units = gates_of(model).units

    def ours(m: int) -> Any:
        with autocast():
            return ntk.estimate(model, batch, projections=m, seed=SEED + 1).lambda_max

    with autocast():
        truth = ntk.estimate(model, batch, projections=MANY, seed=SEED + 2).lambda_max
    overlap = {m: compare(ours(m), truth, units.kind)["overlap"] for m in (1, 2, 4, 8, 16)}
    enough = min([m for m, value in overlap.items() if value >= 0.9], default=16)
    print(f"top-third overlap with m = {MANY} by m: {overlap}", flush=True)
    spent = seconds(lambda: ours(enough))
    numbers = np.linspace(0, len(units) - 1, EIGEN_UNITS).round().astype(int)
    found: dict[str, Any] = {}
    contenders = {"bf16": prepared, "float32": Contenders(model, batch, bfloat16=False)}
    if DEVICE.type == "cuda":  # its products mix float32 with bf16 there
        del contenders["bf16"]
    for precision, contender in contenders.items():
        solved: list[tuple[float, int]] = []

        def solve(unit: int, by: Contenders = contender, into: Any = solved) -> None:
            into.append(by.curvlinops(unit, 1e-2))

        times = [seconds(partial(solve, int(i))) for i in numbers]
        ratios = [value / float(truth[i]) for (value, _), i in zip(solved, numbers, strict=True)]
        found[precision] = {"seconds": times, "products": [n for _, n in solved]}
        found[precision]["lambda_exact_over_ours"] = ratios
        print(f"curvlinops in {precision}: {found[precision]}", flush=True)
    theirs = min(float(np.mean(solver["seconds"])) for solver in found.values()) * len(units)
    name = f"no reduction, top-third overlap {overlap[enough]:.2f}: ours with m={enough}"
    return row(f"{name} against curvlinops, all units", spent, theirs, 1 / 20), found


if __name__ == "__main__":
    main()
