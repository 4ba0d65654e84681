"""AdamW and SGD that know units, against a float64 loop over single rows."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mat
from mat.units import Part, UnitLayer, Units

UNITS, STEPS = 4, 12
SETS = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 1, 1, 0]], bool)  # three steps each


def layer() -> tuple[nn.Sequential, mat.Gates]:
    """Two matrices: rows of the first and columns of the second belong to units, unevenly."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).double()
    owner = np.array([0, 0, 1, 2, 2, 3, -1, 0, 3])
    parts = [Part("0.weight", 0, owner), Part("0.bias", 0, owner), Part("2.weight", 1, owner)]
    units = Units([UnitLayer("ffn", "net", UNITS, parts)])
    return net, mat.attach_(net, mat.MATConfig(), units)


def gradients(net: nn.Module, step: int) -> dict[str, Tensor]:
    """Dense gradients that every variant is given."""
    random = torch.Generator().manual_seed(step)
    return {
        n: torch.randn(p.shape, generator=random, dtype=p.dtype) for n, p in net.named_parameters()
    }


def hand_over(net: nn.Module, gates: mat.Gates, dense: dict[str, Tensor], compact: bool) -> None:
    """Put gradients where the layers would."""
    for name, parameter in net.named_parameters():
        part = getattr(parameter, "_gated", None)
        if part is None:
            parameter.grad = dense[name].clone()
            continue
        part.compact = compact
        rows = dense[name].transpose(0, part.dim)
        index = part.active
        block = rows if index is None else rows[index]
        home = part.home(parameter)
        home.grad = part.deliver(block.contiguous(), home).contiguous()


def train(make, compact: bool) -> dict[str, Tensor]:
    """Parameters after twelve steps with changing sets."""
    net, gates = layer()
    optimiser = make(net.parameters(), compact)
    for step in range(STEPS):
        gates.set_active(SETS[step // 3])
        hand_over(net, gates, gradients(net, step), compact)
        optimiser.step()
        optimiser.zero_grad()
    return {n: p.detach() for n, p in net.named_parameters()}


def naive(rule: str) -> dict[str, Tensor]:
    """The same, number by number: an element that does not train is left alone, counts included."""
    net, gates = layer()
    values = {n: p.detach().clone() for n, p in net.named_parameters()}
    owners = {p.part.parameter: p.part for p in gates.parts()}
    m, v, t = ({n: torch.zeros_like(p) for n, p in values.items()} for _ in range(3))
    for step in range(STEPS):
        active = SETS[step // 3]
        for name, g in gradients(net, step).items():
            trains = torch.ones_like(g, dtype=torch.bool)
            if name in owners:
                owner = owners[name].owner
                mask = torch.from_numpy((owner == -1) | active[owner])
                trains = mask.view(
                    [-1 if d == owners[name].dim else 1 for d in range(g.dim())]
                ).expand(g.shape)
            for i in zip(*torch.nonzero(trains, as_tuple=True), strict=True):
                p = values[name][i]
                if rule == "sgd":
                    m[name][i] = 0.9 * m[name][i] + g[i] + 0.1 * p
                    values[name][i] = p - 0.05 * m[name][i]
                    continue
                t[name][i] += 1
                m[name][i] = 0.8 * m[name][i] + 0.2 * g[i]
                v[name][i] = 0.9 * v[name][i] + 0.1 * g[i] ** 2
                first, second = 1 - 0.8 ** t[name][i], 1 - 0.9 ** t[name][i]
                moved = (m[name][i] / first) / ((v[name][i] / second).sqrt() + 1e-6)
                values[name][i] = p * (1 - 0.05 * 0.1) - 0.05 * moved
    return values


MAKERS = {
    "adamw": lambda p, compact: mat.AdamW(p, 0.05, (0.8, 0.9), 1e-6, 0.1, compact=compact),
    "sgd": lambda p, compact: mat.SGD(p, 0.05, 0.9, 0.1, compact=compact),
}


@pytest.mark.parametrize("rule", MAKERS)
@pytest.mark.parametrize("compact", [False, True], ids=["full", "compact"])
def test_updates_equal_a_loop_over_single_numbers(rule, compact):
    ours, reference = train(MAKERS[rule], compact), naive(rule)
    for name, value in reference.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", MAKERS)
def test_frozen_rows_and_state_stay_bit_identical(rule):
    net, gates = layer()
    optimiser = MAKERS[rule](net.parameters(), True)

    def steps(active: list[bool], count: int) -> None:
        gates.set_active(active)
        for step in range(count):
            hand_over(net, gates, gradients(net, step), compact=True)
            optimiser.step()
            optimiser.zero_grad()

    def frozen() -> list[Tensor]:
        owner = torch.from_numpy(next(gates.parts()).part.owner)
        rows = torch.isin(owner, torch.tensor([0, 2]))
        found = []
        for part in gates.parts():
            tensors = [part.parameter, *optimiser.state[part.parameter].values()]
            for t in (t for t in tensors if t.shape == part.parameter.shape):
                found.append(t.detach().transpose(0, part.dim)[rows].clone())
        return found

    steps([True] * 4, 3)
    gates.set_active([False, True, False, True])
    before = frozen()
    steps([False, True, False, True], 50)
    assert all(torch.equal(a, b) for a, b in zip(before, frozen(), strict=True))


def test_untouched_model_trains_as_with_torch():
    results = []
    for make in (torch.optim.AdamW, mat.AdamW):
        torch.manual_seed(0)
        net = nn.Linear(4, 3).double()
        optimiser = make(net.parameters(), lr=0.1, weight_decay=0.1)
        for step in range(5):
            for parameter, g in zip(net.parameters(), gradients(net, step).values(), strict=True):
                parameter.grad = g
            optimiser.step()
        results.append(net.weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=0)


def test_clipping_sees_active_gradients_alone():
    net, gates = layer()
    optimiser = mat.AdamW(net.parameters(), compact=True)
    gates.set_active([False, True, False, False])
    dense = gradients(net, 0)
    hand_over(net, gates, dense, compact=True)
    norm = optimiser.clip_grad_norm_(0.5)
    expected = sum(g.square().sum() for g in optimiser.gradients()).sqrt()
    rows = [2, 6]  # unit 1, and the row of no unit
    wanted = sum(
        t.square().sum()
        for t in (
            dense["0.weight"][rows],
            dense["0.bias"][rows],
            dense["2.weight"][:, rows],
            dense["2.bias"],
        )
    ).sqrt()
    torch.testing.assert_close(norm, wanted)
    torch.testing.assert_close(expected, torch.tensor(0.5, dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rule", MAKERS)
def test_drifting_rows_repeat_their_last_direction(rule):
    net, gates = layer()
    optimiser = MAKERS[rule](net.parameters(), True)
    hand_over(net, gates, gradients(net, 0), compact=True)
    optimiser.step()
    optimiser.zero_grad()
    gates.set_active([False, True, True, True])
    before = net[0].weight.detach().clone()
    optimiser.drift()
    moved = net[0].weight.detach() - before
    g, p = gradients(net, 0)["0.weight"], before
    if (
        rule == "sgd"
    ):  # its momentum holds the decay of the value before the step: p = q - lr (g + 0.1 q)
        q = (p + 0.05 * g) / (1 - 0.05 * 0.1)
        wanted = -0.05 * (g + 0.1 * q)
    else:
        wanted = -0.05 * 0.1 * p - 0.05 * g / (g.abs() + 1e-6)
    rows = torch.tensor([0, 1, 7])
    # step counts are float32, as the fused kernel wants them, and so is the bias correction
    torch.testing.assert_close(moved[rows], wanted[rows], rtol=1e-6, atol=1e-12)
    others = torch.tensor([2, 3, 4, 5, 6, 8])
    assert not moved[others].any()


def test_state_survives_saving_and_loading():
    runs = []
    for interrupted in (False, True):
        net, gates = layer()
        optimiser = MAKERS["adamw"](net.parameters(), False)
        for step in range(STEPS):
            if interrupted and step == 7:
                saved = optimiser.state_dict()
                optimiser = MAKERS["adamw"](net.parameters(), False)
                optimiser.load_state_dict(saved)
            gates.set_active(SETS[step // 3])
            hand_over(net, gates, gradients(net, step), compact=False)
            optimiser.step()
            optimiser.zero_grad()
        runs.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def images() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3))
    return net.to(memory_format=torch.channels_last)


def matrices() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight = nn.Parameter(net[0].weight.detach().T.contiguous().T)
    return net


@pytest.mark.parametrize("some", [False, True], ids=["all active", "some"])
@pytest.mark.parametrize("build", [images, matrices])
def test_memory_layout_changes_no_update(build, some):
    results = []
    for make in (torch.optim.AdamW, mat.AdamW):
        torch.manual_seed(0)
        net = build().double()
        gates = mat.attach_(net, mat.MATConfig(mode="exact", groups=4, log=False))
        active = np.arange(len(gates.units)) % 3 > 0 if some else np.ones(len(gates.units), bool)
        gates.set_active(active)
        optimiser = make(net.parameters(), lr=0.1, weight_decay=0.1)
        gates.guard(optimiser)
        for step in range(3):
            for parameter, g in zip(net.parameters(), gradients(net, step).values(), strict=True):
                parameter.grad = torch.empty_like(parameter).copy_(g)
            optimiser.step()
        results.append([p.detach() for p in net.parameters()])
    for ours, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(rule, copied):
    net, gates = layer()
    pair = net, MAKERS[rule](net.parameters(), True)
    runs = []
    for net, optimiser in (pair, copied(pair)):
        gates = net._gates
        gates.set_active(SETS[1])
        for step in range(2):
            hand_over(net, gates, gradients(net, step), compact=True)
            optimiser.step()
            optimiser.zero_grad()
        assert optimiser.compact
        runs.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_another_division_goes_on_with_the_largest_step_count():
    net, gates = layer()
    optimiser = MAKERS["adamw"](net.parameters(), False)
    hand_over(net, gates, gradients(net, 0), compact=False)
    optimiser.step()
    mat.detach_(net)
    mat.attach_(net, mat.MATConfig(groups=3, log=False))
    optimiser.step()
    assert optimiser.state[net[0].weight]["step"].tolist() == [2, 2, 2]


@pytest.mark.parametrize("rule", MAKERS)
def test_a_block_of_an_earlier_step_is_not_added_to(rule):
    net, gates = layer()
    optimiser = MAKERS[rule](net.parameters(), True)
    gates.set_active(SETS[1])
    hand_over(net, gates, gradients(net, 0), compact=True)
    part = next(gates.parts())
    assert part.home(net[0].weight).grad is not None  # accumulation before a step is fine
    optimiser.step()
    net.zero_grad()
    with pytest.raises(RuntimeError, match=r"0.weight .* clear gradients with optimizer.zero_grad"):
        part.home(net[0].weight)
    optimiser.zero_grad()
    assert part.home(net[0].weight).grad is None


@pytest.mark.parametrize("compact", [False, True])
def test_channels_last_kernels_train_as_contiguous_ones(compact):
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).double()
        net = net.to(memory_format=layout)
        gates = mat.attach_(net, mat.MATConfig(log=False))
        optimiser = mat.AdamW(net.parameters(), lr=0.1, compact=compact)
        images = torch.randn(2, 3, 7, 7, dtype=torch.float64)
        for step in range(3):
            gates.set_active(np.arange(12) % (step + 1) == step)  # all, then fewer
            net(images).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        results.append([p.detach().contiguous() for p in net.parameters()])
    for contiguous, last in zip(*results, strict=True):
        torch.testing.assert_close(last, contiguous, rtol=1e-9, atol=1e-12)


def test_runs_with_equal_counts_are_updated_as_one():
    """All active: no rows are gathered, and torch's own AdamW gives the same."""
    net, gates = layer()
    optimiser = mat.AdamW(net.parameters(), 0.05, compact=True)
    twin, _ = layer()
    mat.detach_(twin)
    reference = torch.optim.AdamW(twin.parameters(), 0.05, weight_decay=1e-2)
    for step in range(3):
        hand_over(net, gates, gradients(net, step), compact=True)
        optimiser.step()
        optimiser.zero_grad()
        for parameter, g in zip(twin.parameters(), gradients(twin, step).values(), strict=True):
            parameter.grad = g
        reference.step()
    assert not optimiser._views, "views of single runs were made"
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    counts = optimiser.state[net[0].weight]["step"]
    assert counts.tolist() == [3.0] * len(counts)
