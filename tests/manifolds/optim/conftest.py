"""Problems whose minimum is known, and the loop that runs an optimizer on them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def descend() -> Callable[..., list[float]]:
    """Runs an optimizer on a loss for some steps; the losses before each step."""

    def run(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], steps: int) -> list[float]:
        seen = []
        for _ in range(steps):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            seen.append(float(value))
        return seen

    return run
