"""What each process of the data-parallel test does; it imports little, to start fast."""

import numpy as np
import torch
from torch import Tensor, nn

import mat
from mat.gates import Gates


def run(rank: int, folder: str) -> None:
    """Four steps on half of the batch, with a new set at each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    model, x = network()
    gates = mat.attach_(model, mat.MATConfig(groups=3, log=False))
    train(gates, nn.parallel.DistributedDataParallel(model), x.chunk(2)[rank])
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(6, 3, 12, 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2))
    return model.double(), torch.randn(4, 3, 6).double()


def train(gates: Gates, model: nn.Module, x: Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    gates.guard(optimiser)
    sets = np.random.default_rng(0).random((4, len(gates.units))) < 0.4
    sets[1], sets[2] = False, True
    for active in sets:
        optimiser.zero_grad()
        gates.set_active(active)
        model(x).square().mean().backward()
        optimiser.step()
