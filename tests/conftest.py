"""Fixtures that every test may use; and the import hook that checks shapes and types of all four packages.

Small models have random weights: they show that the machinery is right, never that a model knows something.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook(["manifolds", "peft_analysis", "geoedit", "experiments"], "beartype.beartype")

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]

TEXT = """
monday tuesday wednesday thursday friday saturday sunday january february march april may june
july august september october november december red green blue small large old new york paris
rome berlin alice bob carol smith jones one two three four five six seven eight nine ten zero
the a is was of in after before comes day month city capital born true false plus minus . , ?
"""
WORDS = TEXT.split()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that is there: the CPU, and CUDA where torch finds it."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word, one token, over `WORDS`; pads on the right; <pad> is 0, <unk> 1, <eos> 2. Keep it as is."""
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<eos>",
        padding_side="right",
    )


def build_gpt2(vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A GPT-2 of 3 blocks, width 32, 4 heads; weights large enough that prompts differ in their outputs."""
    config = GPT2Config(
        vocab_size=vocab_size, n_positions=64, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2,
        pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config).eval().requires_grad_(False)


def build_llama(vocab_size: int, seed: int = 0) -> PreTrainedModel:
    """A Llama of 3 blocks, width 32, 4 heads that share 2 key-value heads, gated MLP of width 48."""
    config = LlamaConfig(
        vocab_size=vocab_size, max_position_embeddings=64, hidden_size=32, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture
def tiny_gpt2(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh random-weight GPT-2 on the CPU; each test may change it."""
    return build_gpt2(len(tiny_tokenizer))


@pytest.fixture
def tiny_llama(tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh random-weight Llama on the CPU; each test may change it."""
    return build_llama(len(tiny_tokenizer))


@pytest.fixture(params=["gpt2", "llama"])
def tiny_model(request: pytest.FixtureRequest, tiny_tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Both architectures in turn: what holds for one must hold for the other."""
    build = {"gpt2": build_gpt2, "llama": build_llama}[request.param]
    return build(len(tiny_tokenizer))
