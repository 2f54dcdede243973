"""The nets and the training loop that one would write in PyTorch; nothing here comes from
bnresearch.

Convolutions are in the channels_last layout, which is the fast one, and initialised as torch does.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.measure import LeftOut
from benchmarks.sweep_torch import net as mlp


class Normed(nn.Sequential):
    """A convolution without bias, and its norm."""

    def __init__(self, given: int, features: int, size: int, stride: int = 1):
        conv = nn.Conv2d(given, features, size, stride, size // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(features))


class Block(nn.Module):
    """relu(shortcut + branch); the branch has a relu after every norm but the last."""

    def __init__(self, branch: list[nn.Module], shortcut: Callable[[Any], Any]):
        super().__init__()
        self.branch, self.shortcut = nn.ModuleList(branch), shortcut

    def forward(self, x: Any) -> Any:
        y = x
        for part in self.branch[:-1]:
            y = functional.relu(part(y))
        return functional.relu(self.shortcut(x) + self.branch[-1](y))


class Padded(nn.Module):
    """Every stride-th position, and channels of zeros."""

    def __init__(self, missing: int, stride: int):
        super().__init__()
        self.missing, self.stride = missing, stride

    def forward(self, x: Any) -> Any:
        if not self.missing and self.stride == 1:
            return x
        return functional.pad(x[:, :, :: self.stride, :: self.stride], (0,) * 5 + (self.missing,))


class Mean(nn.Module):
    """Over positions."""

    def forward(self, x: Any) -> Any:
        return x.mean((2, 3))


def resnet(depth: int, channels: int) -> nn.Module:
    """He et al. (2016), section 4.2."""
    layers: list[nn.Module] = [Normed(channels, 16, 3), nn.ReLU()]
    given = 16
    for features in (16, 32, 64):
        for block in range((depth - 2) // 6):
            stride = 2 if block == 0 and features > 16 else 1
            branch = [Normed(given, features, 3, stride), Normed(features, features, 3)]
            layers.append(Block(branch, Padded(features - given, stride)))
            given = features
    return nn.Sequential(*layers, Mean(), nn.Linear(given, 10))


def resnet50() -> nn.Module:
    """He et al. (2016), table 1."""
    layers: list[nn.Module] = [Normed(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    given = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        features = 64 * 2**stage
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 0 else 1
            branch = [Normed(given, features, 1), Normed(features, features, 3, stride)]
            branch.append(Normed(features, 4 * features, 1))
            first = Normed(given, 4 * features, 1, stride) if block == 0 else nn.Identity()
            layers.append(Block(branch, first))
            given = 4 * features
    return nn.Sequential(*layers, Mean(), nn.Linear(given, 1000))


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "resnet8": lambda: resnet(8, 1),
    "resnet20": lambda: resnet(20, 3),
    "resnet50": resnet50,
}


def make_steps(
    net: str,
    image: np.ndarray,
    label: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    batch: int,
    rate: float,
    momentum: float,
    weight_decay: float,
    compiled: bool,
    autocast: bool,
) -> Callable[[int], None]:
    """``(count)``: so many steps of SGD on a set held on the device, shuffled for every epoch.

    Args:
      net: a key of NETS.
      image: uint8 ``[N, H, W, C]``; label: int ``[N]``; mean, std: ``[C]``.

    Raises:
      LeftOut: torch.compile finds no compiler.
    """
    place = "cuda" if torch.cuda.is_available() else "cpu"
    if compiled and place == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise LeftOut("torch.compile needs a C++ compiler")
    dense = net == "mlp"
    torch.set_num_threads(1 if dense else len(os.sched_getaffinity(0)))
    images, labels = torch.tensor(image, device=place), torch.tensor(label, device=place).long()
    shift, factor = (torch.tensor(x, dtype=torch.float32, device=place) for x in (mean, std))
    model = NETS[net]().to(place, memory_format=torch.preserve_format)
    model = model if dense else model.to(memory_format=torch.channels_last)
    call = torch.compile(model) if compiled else model
    sgd = torch.optim.SGD(model.parameters(), rate, momentum, weight_decay=weight_decay)
    order, total, done = torch.empty(0, dtype=torch.long), torch.zeros((), device=place), 0

    def step(index: Any) -> None:
        x = (images[index].float() - shift) / factor
        x = x.flatten(1) if dense else x.permute(0, 3, 1, 2)
        sgd.zero_grad()
        with torch.autocast(place, torch.bfloat16, enabled=autocast):
            loss = functional.cross_entropy(call(x).float(), labels[index])
        loss.backward()
        sgd.step()
        total.add_(loss.detach())

    def work(count: int) -> None:
        nonlocal order, done
        torch.set_num_threads(1 if dense else len(os.sched_getaffinity(0)))
        for _ in range(count):
            if len(order) - done < batch:
                order, done = torch.randperm(len(images), device=place), 0
            step(order[done : done + batch])
            done += batch
        total.item()  # waits for a GPU

    return work
