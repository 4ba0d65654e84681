"""VGG with batch norm (Simonyan and Zisserman 2015), as an ordinary module.

``features`` is that of ``torchvision.models.vgg16_bn`` under the same names, and takes its state
dict; one linear classifier follows. A stage ends in a 2 x 2 max pool, which is left out where the
map is 1 x 1 already, so images of any size go in: 32 x 32 ends at 1 x 1, and so does 8 x 8.

Shapes: N images, C filters, I input channels, S x S maps.
"""

from typing import cast

import torch
from torch import Tensor, nn

from mat.suite.config import VggConfig
from mat.suite.interface import Batch, Model


def convolution(inputs: int, filters: int) -> nn.Conv2d:
    """A 3 x 3 convolution with Kaiming's initial weights (C, I, 3, 3), channels last in memory."""
    weight = torch.empty(filters, inputs, 3, 3)
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    layer = nn.Conv2d(inputs, filters, 3, padding=1, device="meta")  # draws no random numbers
    layer.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last))
    layer.bias = nn.Parameter(torch.zeros(filters))
    return layer


class Vgg(Model):
    """Stages of convolutions, and one linear classifier.

    Args:
        config: The model's configuration.
        classes: Number of classes.
        channels: Channels of the images.
        size: Their height and width.
    """

    best_by = "accuracy"

    def __init__(self, config: VggConfig, classes: int, channels: int, size: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for stage in config.stages:
            for filters in stage:
                layers += (
                    convolution(inputs, filters),
                    nn.BatchNorm2d(filters),
                    nn.ReLU(inplace=True),
                )
                inputs = filters
            layers.append(nn.MaxPool2d(2) if size > 1 else nn.Identity())
            size = max(1, size // 2)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(inputs, classes)
        nn.init.normal_(self.classifier.weight, 0.0, 0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, batch: Batch) -> Tensor:
        """Images (N, channels, size, size) to logits (N, classes)."""
        maps = self.features(batch.inputs.contiguous(memory_format=torch.channels_last))
        return cast(Tensor, self.classifier(maps.mean((2, 3))))

    def metrics(self, outputs: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Accuracy."""
        return {"accuracy": (outputs.argmax(1) == batch.targets).float().mean()}
