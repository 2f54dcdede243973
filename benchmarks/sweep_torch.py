"""The runs of ``benchmarks.sweep`` as one would write them in PyTorch: data in memory, a loop.

    python -m benchmarks.sweep_torch --data=FILE.npz --threads=1 --share=0/2 --core=0

trains its share of the grid, one run after the other, and prints one JSON object: the seconds of
each run, and its test accuracy. Nothing here comes from bnresearch.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn


def net() -> nn.Module:
    """Hidden layers of 100 with BatchNorm between the linear map and relu."""
    layers: list[nn.Module] = []
    for features in (64, 100, 100):
        layers += [nn.Linear(features, 100, bias=False), nn.BatchNorm1d(100), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def train(
    parts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    rate: float,
    seed: int,
    steps: int,
    batch: int,
) -> float:
    """Momentum SGD with a cosine schedule, evaluated five times on validation, and at the end on
    test, whose accuracy it returns."""
    torch.manual_seed(seed)
    model, loss_of = net(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    images, labels = parts["train"]
    per_epoch = len(images) // batch
    total = torch.zeros(())
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(images))
        index = order[step % per_epoch * batch :][:batch]
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss = loss_of(model(images[index]), labels[index])
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if (step + 1) % (steps // 5) == 0:
            evaluate(model, *parts["validation"])
    return evaluate(model, *parts["test"])


@torch.no_grad()
def evaluate(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The accuracy; the model goes back to training mode."""
    model.eval()
    correct = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return correct


def main(argv: Sequence[str] | None = None) -> None:
    """Train a share of the grid."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="arrays of the parts, and the grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", default="0/1", help="I/N: every Nth run from the Ith")
    parser.add_argument("--core", type=int, default=-1, help="run on this core only")
    options = parser.parse_args(argv)
    if options.core >= 0:
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(options.threads)
    first, every = map(int, options.share.split("/"))
    with np.load(options.data) as data:
        parts = {
            part: (torch.tensor(data[f"{part}_image"]), torch.tensor(data[f"{part}_label"]))
            for part in ("train", "validation", "test")
        }
        grid = [(float(rate), int(seed)) for rate, seed in data["grid"]]
        steps, batch = int(data["steps"]), int(data["batch"])
    seconds, accuracy = [], []
    for rate, seed in grid[first::every]:
        start = time.perf_counter()
        accuracy.append(train(parts, rate, seed, steps, batch))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "accuracy": accuracy}))


if __name__ == "__main__":
    main()
