"""A peer of `benchmarks.training_step` in an environment with torch: answers lines of JSON with seconds.

    PYTHON benchmarks/_training_peer.py

A question names a network and the number of steps to take; the answer is the mean time of one. The networks
are those of `experiments.networks`, the step is SGD with momentum 0.9 and weight decay on the cross-entropy.
"""

import importlib
import itertools
import json
import sys
import time
from typing import Any

torch: Any = importlib.import_module("torch")
nn = torch.nn
VGG_STAGES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)


def _lenet() -> list[Any]:
    return [
        *(nn.Conv2d(3, 6, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(6, 16, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten()),
        *(nn.Dropout(0.5), nn.Linear(400, 120), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)),
    ]


def _alexnet() -> list[Any]:
    layers = [nn.Conv2d(3, 64, 11, stride=4, padding=5), nn.ReLU(), nn.MaxPool2d(2)]
    sizes = ((64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
    for (n1, n2, taps), pooled in zip(sizes, (True, False, False, True), strict=True):
        layers += [nn.Conv2d(n1, n2, taps, padding=taps // 2), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
    return [*layers, nn.Flatten(), nn.Linear(256, 10)]


def _vgg16() -> list[Any]:
    layers, before = [], 3
    for stage in VGG_STAGES:
        for n1, n2 in itertools.pairwise((before, *stage)):
            layers += [nn.Conv2d(n1, n2, 3, padding=1, bias=False), nn.BatchNorm2d(n2), nn.ReLU()]
        before = stage[-1]
        layers.append(nn.MaxPool2d(2))
    hidden = [nn.Dropout(0.5), nn.Linear(512, 512), nn.ReLU()]
    return [*layers, nn.Flatten(), *hidden, *hidden[:1], nn.Linear(512, 512), nn.ReLU(),
            nn.Linear(512, 10)]  # fmt: skip


NETWORKS = {"lenet": _lenet, "alexnet": _alexnet, "vgg16": _vgg16}


class Training:
    """A network, its optimiser and one batch of random images of 32×32×3 pixels."""

    def __init__(self, network: str, batch: int):
        torch.manual_seed(0)
        self.model = nn.Sequential(*NETWORKS[network]())
        settings = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 5e-4}
        self.optimiser = torch.optim.SGD(self.model.parameters(), **settings)
        self.images = torch.randn(batch, 3, 32, 32)
        self.labels = torch.randint(0, 10, (batch,))

    def step(self) -> None:
        """One step."""
        self.optimiser.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        self.optimiser.step()

    def seconds(self, steps: int) -> float:
        """The mean time of some steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps


def main() -> None:
    """Answer questions until there are no more."""
    runs: dict[tuple[str, int], Training] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if question.get("ask") == "version":
            answer: Any = [torch.__version__, torch.get_num_threads()]
        else:
            key = question["network"], question["batch"]
            if key not in runs:
                runs[key] = Training(*key)
            answer = runs[key].seconds(question["steps"])
        print("ANSWER " + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
