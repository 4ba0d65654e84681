"""The estimator against its peers, on BERT-mini and a twin with the same weights built from stock layers.

    python -m benchmarks.peers                  # seconds in turn, peak memory in a process of its own per contender
    python -m benchmarks.peers --memory NAME    # what those processes run

Given the same reduction (random signs, n = 32, m = 1), ours in bf16 autocast. Neither torch.func's transforms nor
BackPACK work under autocast, so the peers get a twin that is bf16 throughout, which is no slower:

``ours``           ``mat.suite.ntk.estimate``
``vmap(grad)``     torch.func per-sample gradients of the reduced outputs, sliced by unit, multiplied
``ntk tutorial``   the empirical NTK of torch.func's tutorial (``jacrev`` per sample, contraction by einsum) per unit
``BackPACK``       per-sample gradients by ``BatchGrad``, sliced by unit, multiplied

Without a reduction the exact kernel has n k = 2.5 million rows: no peer can form it, and what is left is an iterative
eigensolver over Jacobian products. ``curvlinops`` gives them (``JacobianLinearOperator``); scipy's ``eigsh`` works on
a unit's parameters (J^T J, the smaller side). It is timed on a few units, times the number of units.
"""

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.fidelity import compare
from benchmarks.harness import (
    DEVICE,
    Row,
    Subject,
    autocast,
    in_process,
    medians,
    peak_bytes,
    row,
    seconds,
    write,
)
from benchmarks.step import RECIPE, batch_of
from mat.suite import ntk
from mat.suite.attention import rotary_table
from mat.suite.bert import Bert
from mat.suite.config import BertConfig
from mat.suite.data.masking import MaskedBatch
from mat.suite.units import UnitIndex, unit_layers

MINI = BertConfig("bert_mini", "bert", 4, 128, 4, 512, 8, "rotary", "pre")
VOCABULARY, LENGTH, SAMPLES, SEED = 4096, 128, 32, 0
EIGEN_UNITS = 3  # units that the eigensolver is timed on
MANY = 32  # projections that stand for the truth
Kernels = Callable[[], Tensor]


class TwinBlock(nn.Module):
    """One pre-norm block of stock layers."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.attention_norm, self.ffn_norm = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, config.ffn_hidden), nn.Linear(config.ffn_hidden, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(n, T, D) to (n, T, D)."""

        def rotate(y: Tensor) -> Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

        z = self.attention_norm(x)
        q, k, v = (f(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2) for f in (self.query, self.key, self.value))
        with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no batching rule and no forward-mode derivative
            context = F.scaled_dot_product_attention(rotate(q).to(v.dtype), rotate(k).to(v.dtype), v)
        x = x + self.out(context.transpose(-3, -2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.ffn_norm(x))))


class Twin(nn.Module):
    """A pre-norm rotary ``mat.suite.bert.Bert`` from stock layers, with its weights.

    Args:
        model: The model to copy.
    """

    def __init__(self, model: Bert) -> None:
        super().__init__()
        config = model.config
        width, vocabulary = config.width, model.tokens.shape[0]
        dtype = model.tokens.dtype
        self.tokens = nn.Embedding(vocabulary, width)
        self.embedding_norm, self.final_norm, self.transform_norm = (nn.LayerNorm(width, eps=1e-12) for _ in range(3))
        self.blocks = nn.ModuleList(TwinBlock(config) for _ in range(config.layers))
        self.transform, self.vocabulary = nn.Linear(width, width), nn.Linear(width, vocabulary)
        self.to(dtype)
        self.register_buffer("rotary", rotary_table(LENGTH, width // config.heads).to(dtype))
        with torch.no_grad():
            self.tokens.weight.copy_(model.tokens)
            self.vocabulary.weight.copy_(model.tokens)
            self.vocabulary.bias.copy_(model.vocabulary_bias)
            self.transform.weight.copy_(model.transform_weight)
            self.transform.bias.copy_(model.transform_bias)
            for name in ("embedding_norm", "final_norm", "transform_norm"):
                getattr(self, name).load_state_dict(getattr(model, name).state_dict())
            for theirs, ours in zip(self.blocks, model.blocks, strict=True):
                attention, ffn = ours.attention, ours.ffn
                linears = (theirs.query, theirs.key, theirs.value)
                weights, biases = attention.qkv_weight.chunk(3, 1), attention.qkv_bias.chunk(3, 1)
                for linear, weight, bias in zip(linears, weights, biases, strict=True):
                    linear.weight.copy_(weight.flatten(0, 1))
                    linear.bias.copy_(bias.flatten())
                theirs.out.weight.copy_(attention.out_weight.flatten(0, 1).T)
                theirs.out.bias.copy_(ours.attention_bias)
                theirs.up.weight.copy_(ffn.in_weight.flatten(0, 1))
                theirs.up.bias.copy_(ffn.in_bias.flatten())
                theirs.down.weight.copy_(ffn.out_weight.flatten(0, 1).T)
                theirs.down.bias.copy_(ours.ffn_bias)
                for name in ("attention_norm", "ffn_norm"):
                    getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Tokens (n, T) and masked positions (n, M) to logits (n, M, V)."""
        x = self.embedding_norm(self.tokens(tokens))
        cos, sin = self.rotary[:, : tokens.shape[-1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        x = torch.take_along_dim(self.final_norm(x), positions[..., None], -2)
        return self.vocabulary(self.transform_norm(F.gelu(self.transform(x))))


def sliced(config: BertConfig) -> list[tuple[str, int, int]]:
    """(parameter, its axis that is split, number of units) for every layer, grouped by layer in ``UnitIndex`` order."""
    groups: list[Any] = []
    for i in range(config.layers):
        names = [f"blocks.{i}.{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
        groups.append([*((name, 0, config.heads) for name in names), (f"blocks.{i}.out.weight", 1, config.heads)])
        ffn = [(f"blocks.{i}.up.weight", 0), (f"blocks.{i}.up.bias", 0), (f"blocks.{i}.down.weight", 1)]
        groups.append([(name, axis, config.ffn_groups) for name, axis in ffn])
    return groups


def of_unit(tensor: Tensor, axis: int, units: int, u: int) -> Tensor:
    """One unit's slice of (rows, *parameter.shape), as (rows, entries)."""
    return tensor.chunk(units, axis + 1)[u].flatten(1)


def exact(gradients: Tensor) -> Tensor:
    """Gram products are float32 at least, as ours."""
    return gradients.to(torch.promote_types(gradients.dtype, torch.float32))


def kernels_of(gradients: dict[str, Tensor], config: BertConfig) -> Tensor:
    """(units, n, n) of per-sample gradients (n, *parameter.shape)."""
    kernels = []
    for group in sliced(config):
        for u in range(group[0][2]):
            parts = [of_unit(gradients[name], axis, units, u) for name, axis, units in group]
            kernels.append(sum(part @ part.T for part in map(exact, parts)))
    return torch.stack(kernels)


class Contenders:
    """Everybody's way to the kernels of all units, given the same model, probe and signs.

    Args:
        model: The model.
        batch: The probe.
        bfloat16: Compute in bf16; else in the model's own precision.
    """

    def __init__(self, model: Bert, batch: MaskedBatch, bfloat16: bool = True) -> None:
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
        self.gated = {name: p.detach() for name, p in self.twin.named_parameters() if name in wanted}
        outputs = torch.empty(self.positions.numel(), model.tokens.shape[0], device=batch.inputs.device)
        reducer = ntk.Reducer("random", 1, SEED, batch.samples)
        (signs, _), *_ = reducer.cotangents(model, batch, outputs, 0)
        self.signs = signs.view(batch.samples, -1, outputs.shape[1]).to(self.twin.rotary.dtype)

    def all(self) -> dict[str, Kernels]:
        """By name, ours first."""
        return {
            "ours": self.ours, "vmap(grad)": self.vmap_grad, "ntk tutorial": self.tutorial, "BackPACK": self.backpack,
        }  # fmt: skip

    def ours(self) -> Tensor:
        """The estimator."""
        with autocast(self.bfloat16):
            kernels = ntk.estimate(self.model, self.batch, seed=SEED, kernels=True).kernels
        assert kernels is not None
        return kernels

    def _reduced(self, parameters: dict[str, Tensor], tokens: Tensor, positions: Tensor, signs: Tensor) -> Tensor:
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
                parts = [of_unit(jacobian[name], axis, units, u) for name, axis, units in group]
                kernels.append(sum(torch.einsum("Nf,Mf->NM", part, part) for part in map(exact, parts)))
        return torch.stack(kernels)

    def backpack(self) -> Tensor:
        """BackPACK's BatchGrad; its hooks sit on the linear layers alone, which hold all that is wanted."""
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
        jacobian = JacobianLinearOperator(wrapper, parameters, [(both, self.signs)], check_deterministic=False)
        mask = torch.cat([
            torch.zeros_like(p).chunk(units, axis)[0].new_zeros(p.shape).index_fill_(
                axis, torch.arange(p.shape[axis] // units, device=p.device) + u * (p.shape[axis] // units), 1
            ).flatten()
            for p, (_, axis, units) in zip(parameters, group, strict=True)
        ])  # fmt: skip
        inside = mask.nonzero().flatten()
        products = 0

        def multiply(vector: Any) -> Any:
            nonlocal products
            products += 1
            full = torch.zeros_like(mask)
            full[inside] = torch.from_numpy(np.asarray(vector)).to(mask).flatten()
            return (jacobian.adjoint() @ (jacobian @ full))[inside].detach().to("cpu", torch.float64).numpy()

        operator = LinearOperator((len(inside),) * 2, matvec=multiply, dtype=np.float64)
        start = np.random.default_rng(0).normal(size=len(inside))
        top = eigsh(operator, k=1, tol=tolerance, v0=start, return_eigenvectors=False)
        return float(top[0]), products


def contenders(samples: int = SAMPLES) -> Contenders:
    """On BERT-mini at initialisation."""
    torch.manual_seed(0)
    return Contenders(Bert(MINI, VOCABULARY, LENGTH).to(DEVICE), batch_of(VOCABULARY, samples, LENGTH))


def peak(name: str) -> int:
    """Peak memory of one call, behind a small one."""
    contenders(2).all()[name]()
    return peak_bytes(contenders().all()[name])


METHODS = ("ours", "vmap(grad)", "ntk tutorial", "BackPACK")


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
    dense = Subject(copy.deepcopy(prepared.model), batch_of(VOCABULARY, 64, LENGTH), RECIPE).step()
    plain = Contenders(prepared.model, prepared.batch, bfloat16=False).vmap_grad
    actions = {**prepared.all(), "vmap(grad) in float32": plain, "a dense step of 64": dense}
    timed = dict(zip(actions, medians(list(actions.values()), arguments.repeats), strict=True))
    wanted = {"a dense step of 64": 0.7, "vmap(grad) in float32": None}
    rows = [
        row(f"mini, n=32 m=1: ours against {name}", timed["ours"], timed[name], wanted.get(name, 1 / 3))
        for name in list(actions)[1:]
    ]
    peaks = {name: in_process("peers", "--memory", name) for name in METHODS}
    best = min(METHODS[1:], key=lambda name: timed[name])
    for name in METHODS[1:]:
        label, quarter = f"mini, n=32 m=1: peak memory, ours against {name}", 0.25 if name == best else None
        rows.append(row(label, peaks["ours"], peaks[name], quarter, "byte"))
    exact, eigensolver = without_reduction(prepared)
    write("peers", [*rows, exact], eigensolver=eigensolver)


def without_reduction(prepared: Contenders) -> tuple[Row, dict[str, Any]]:
    """The smallest m whose top third agrees with that of many projections, against the eigensolver on exact outputs.

    The solver works on a twin in bf16 (CPU) and on one in float32; the faster one counts. Beside the comparison: of
    both the seconds, Jacobian products and ratio of exact lambda to that of many projections, for every unit timed.
    """
    model, batch = prepared.model, prepared.batch
    index = UnitIndex(unit_layers(model))

    def ours(m: int) -> Any:
        with autocast():
            return ntk.estimate(model, batch, index, projections=m, seed=SEED + 1).lambda_max

    with autocast():
        truth = ntk.estimate(model, batch, index, projections=MANY, seed=SEED + 2).lambda_max
    overlap = {m: compare(ours(m), truth, index.kind)["overlap"] for m in (1, 2, 4, 8, 16)}
    enough = min([m for m, value in overlap.items() if value >= 0.9], default=16)
    print(f"top-third overlap with m = {MANY} by m: {overlap}", flush=True)
    spent = seconds(lambda: ours(enough))
    numbers = np.linspace(0, len(index) - 1, EIGEN_UNITS).round().astype(int)
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
        found[precision] = {"seconds": times, "products": [n for _, n in solved], "lambda_exact_over_ours": ratios}
        print(f"curvlinops in {precision}: {found[precision]}", flush=True)
    theirs = min(float(np.mean(solver["seconds"])) for solver in found.values()) * len(index)
    name = f"no reduction, top-third overlap {overlap[enough]:.2f}: ours with m={enough} against curvlinops, all units"
    return row(name, spent, theirs, 1 / 20), found


if __name__ == "__main__":
    main()
