"""Models that the tests of one process share, so that their anatomy is taken once."""

import pytest
import torch
from transformers import PreTrainedModel

_kept: dict[str, PreTrainedModel] = {}


def _shared(model: PreTrainedModel) -> PreTrainedModel:
    kept = _kept.setdefault(type(model).__name__, model)
    kept.zero_grad()
    return kept.to(device="cpu", dtype=torch.float32).requires_grad_(False).eval()


@pytest.fixture
def shared_gpt2(tiny_gpt2: PreTrainedModel) -> PreTrainedModel:
    """The tiny GPT-2, the same one for every test: leave its parts and weights alone, move it as you like."""
    return _shared(tiny_gpt2)


@pytest.fixture
def shared_llama(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    """The tiny Llama, the same one for every test: leave its parts and weights alone, move it as you like."""
    return _shared(tiny_llama)


@pytest.fixture
def shared_model(tiny_model: PreTrainedModel) -> PreTrainedModel:
    """Both architectures in turn, each the same one for every test."""
    return _shared(tiny_model)
