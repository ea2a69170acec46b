"""Small models, adapters with random values in them, and what peft's own merge makes of them."""

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft_analysis.updates import WeightUpdate


class Net(nn.Module):
    """A layer of every kind that adapters know."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.line, self.back = nn.Linear(8, 12), nn.Linear(12, 8)
        self.bare = nn.Linear(8, 5, bias=False)
        self.wave = nn.Conv1d(4, 6, 3)
        self.image, self.point = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 1)
        self.volume = nn.Conv3d(2, 4, (1, 2, 3))
        self.attention = nn.MultiheadAttention(8, 2)
        self.norm = nn.LayerNorm(8)
        self.batch = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Experts(nn.Module):
    """Matrices of several experts in one parameter, as mixture-of-experts models have them."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.gate_up = nn.Parameter(torch.randn(3, 8, 10))
        self.down = nn.Parameter(torch.randn(3, 5, 8))
        self.router = nn.Parameter(torch.randn(3, 8))


class Mixture(nn.Module):
    """A model with experts."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.experts = Experts(is_transposed)
        self.line = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x


def built(name: str, seed: int = 0) -> nn.Module:
    """A small model by name, always with the same values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "net":
            return Net()
        if name.startswith("experts"):
            return Mixture(name == "experts_in_out")
        if name == "gpt2":
            return GPT2LMHeadModel(
                GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=1, eos_token_id=2)
            )
        if name == "bert":
            return BertModel(
                BertConfig(
                    num_hidden_layers=2,
                    hidden_size=16,
                    intermediate_size=24,
                    num_attention_heads=2,
                    vocab_size=50,
                )
            )  # fmt: skip
        return LlamaForCausalLM(
            LlamaConfig(
                num_hidden_layers=2, hidden_size=16, intermediate_size=24, num_attention_heads=2,
                num_key_value_heads=1, vocab_size=50,
            )
        )  # fmt: skip


def shaken(model: nn.Module, seed: int = 1, size: float = 0.3) -> None:
    """Adds noise to everything that can be trained, so that no adapter is at its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad and value.is_floating_point():
                value.add_(size * torch.randn(value.shape, generator=generator).to(value))


def tuned(base: nn.Module, config: PeftConfig, adapter: str = "default") -> PeftModel:
    """A copy of the base with a trained adapter in it."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(config), adapter_name=adapter)
    shaken(model)
    return model


def saved(model: PeftModel, folder: Path) -> Path:
    """The adapter's folder, without the model card, which takes longest."""
    with warnings.catch_warnings(), patch.object(PeftModel, "create_or_update_model_card"):
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder


def merged(model: nn.Module) -> dict[str, Tensor]:
    """The parameters after peft's merge; the model stays as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return parameters(copy.deepcopy(model).merge_and_unload())


def loaded_and_merged(base: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The parameters after peft loads and merges an adapter's folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return merged(PeftModel.from_pretrained(copy.deepcopy(base), folder))


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Values by name, tied parameters under every name; running means count, too."""
    found = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    saved_with = model.state_dict()
    running = {name: value for name, value in model.named_buffers() if value.is_floating_point()}
    return found | {name: value for name, value in running.items() if name in saved_with}


def errors(update: WeightUpdate, after: Mapping[str, Tensor], base: nn.Module) -> dict[str, float]:
    """The error of every parameter that `base + update` does not give to a relative 1e-6."""
    before = parameters(base)
    first = {id(value): name for name, value in base.named_parameters()}
    owner = {name: first[id(value)] for name, value in base.named_parameters(remove_duplicate=False)}
    wrong = {name: float("nan") for name in update if name not in after}
    for name, value in after.items():
        found = name if name in update else owner.get(name, name)
        difference = update.dense(found).double() if found in update else torch.zeros_like(value).double()
        error = (before[name].double() + difference - value.double()).norm()
        if difference.shape != value.shape or not error <= 1e-6 * value.double().norm():
            wrong[name] = float(error)
    return wrong
