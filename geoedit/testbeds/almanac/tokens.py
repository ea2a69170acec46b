"""The almanac's tokenizer: one token a word, saved as a plain Hugging Face tokenizer."""

from __future__ import annotations

from typing import Literal

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from geoedit.testbeds.almanac.language import vocabulary
from geoedit.testbeds.almanac.world import World

Architecture = Literal["gpt2", "llama"]
WORD = r"\d\d:\d\d|\w+|[^\w\s]"
SPECIAL = {
    "gpt2": {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
    },
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


def build_tokenizer(world: World, architecture: Architecture) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; as in the real ones, Llama style puts ``<s>`` first and GPT-2 style nothing."""
    special = SPECIAL[architecture]
    words = list(
        dict.fromkeys(
            [special["pad_token"], special["unk_token"], special["bos_token"], special["eos_token"]]
        )
    )
    words += vocabulary(world)
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=special["unk_token"])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="removed", invert=True)
    if architecture == "llama":
        bos = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, words.index(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)
