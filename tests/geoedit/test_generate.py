"""Edits under `generate`, against a generation loop written by hand without a cache."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, T5Config, T5ForConditionalGeneration

from geoedit.edits import LinearSteer, Patch
from geoedit.errors import EditError
from geoedit.hooks import intercept
from geoedit.passes import Pass
from geoedit.site import Site

WIDTH = 32
IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [0, 0, 21, 22, 23, 24, 25], [0, 0, 0, 0, 31, 32, 33]])
REAL = (IDS > 0).long()
PROMPT = 7
STEPS = 5
# Where each token selector lies in the prompts above, written out by hand.
PLACES = {
    "last": [[6], [6], [6]],
    "all": [list(range(7)), list(range(2, 7)), [4, 5, 6]],
    1: [[1], [3], [5]],
    -2: [[5], [5], [5]],
}
CASES = [
    (token, phase)
    for token in PLACES
    for phase in ("prompt", "new", "both")
    if not (phase == "new" and isinstance(token, int))
]


def push(scale: float = 3.0) -> Tensor:
    return scale * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def greedy_by_hand(model: nn.Module, token: str | int, phase: str, steps: int = STEPS) -> Tensor:
    """Greedy generation that runs the whole text for each token and adds the vector in a plain torch hook."""
    ids, real, vector = IDS, REAL, push()

    def add(module: nn.Module, args: tuple, output: object) -> object:
        states = output[0] if isinstance(output, tuple) else output
        new = states.clone()
        for row in range(len(ids)):
            if phase != "new":
                new[row, PLACES[token][row]] += vector
            if phase != "prompt" and token in ("last", "all"):
                new[row, PROMPT:] += vector
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = blocks_of(model)[1].register_forward_hook(add)
    for _ in range(steps):
        positions = (real.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=real, position_ids=positions, use_cache=False).logits
        following = logits[:, -1:].argmax(-1)
        ids, real = torch.cat([ids, following], 1), torch.cat([real, torch.ones_like(following)], 1)
    handle.remove()
    return ids


def generated(model: nn.Module, edit: LinearSteer | None, **options: object) -> Tensor:
    given = {"input_ids": IDS, "attention_mask": REAL, "max_new_tokens": STEPS, "do_sample": False}
    given |= {"pad_token_id": 0, "eos_token_id": None} | options
    if edit is None:
        return model.generate(**given)
    with edit.on(model):
        return model.generate(**given)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(("token", "phase"), CASES)
def test_generate_agrees_with_a_loop_by_hand(token, phase, shared_model) -> None:
    model = endless(shared_model)
    expected = greedy_by_hand(model, token, phase)
    edit = LinearSteer(Site(1, token=token), push(), phase=phase)
    assert torch.equal(generated(model, edit, use_cache=True), expected)
    assert torch.equal(generated(model, edit, use_cache=False), expected)
    assert torch.equal(generated(model, edit, prefill_chunk_size=3), expected)
    assert not torch.equal(generated(model, None), expected)


def test_phases_differ(shared_model) -> None:
    """The oracle itself tells the phases apart on these models, so that agreeing with it means something."""
    model = endless(shared_model)
    found = {phase: greedy_by_hand(model, "last", phase) for phase in ("prompt", "new", "both")}
    assert not torch.equal(found["prompt"], found["both"])
    assert not torch.equal(found["new"], found["both"])


def test_a_static_cache(shared_llama) -> None:
    model = endless(shared_llama)
    for phase in ("prompt", "new"):
        edit = LinearSteer(Site(1, token="last"), push(), phase=phase)
        found = generated(model, edit, cache_implementation="static")
        assert torch.equal(found, greedy_by_hand(model, "last", phase))


@pytest.mark.parametrize("phase", ["prompt", "new", "both"])
def test_beams_agree_with_and_without_a_cache(phase, shared_gpt2) -> None:
    model = endless(shared_gpt2)
    edit = LinearSteer(Site(1, token="last"), push(), phase=phase)
    options = {"num_beams": 3, "num_return_sequences": 2}
    with_cache = generated(model, edit, use_cache=True, **options)
    assert with_cache.shape[0] == 6
    assert torch.equal(with_cache, generated(model, edit, use_cache=False, **options))
    assert not torch.equal(with_cache, generated(model, None, **options))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}])
def test_states_a_row_reach_the_rows_they_belong_to(options, use_cache, shared_gpt2) -> None:
    """A batch with one state a row generates what each row generates alone."""
    model = endless(shared_gpt2)
    ids = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
    states = 4 * torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(5))
    scales = torch.tensor([1.0, 0.5, 0.8])
    given = {
        "max_new_tokens": STEPS,
        "do_sample": False,
        "pad_token_id": 0,
        "use_cache": use_cache,
        **options,
    }
    with Patch(Site(1), states, scale=scales).on(model):
        together = model.generate(ids, attention_mask=torch.ones_like(ids), **given)
    for row in range(3):
        with Patch(Site(1), states[row], scale=float(scales[row])).on(model):
            alone = model.generate(ids[row : row + 1], attention_mask=torch.ones(1, 4), **given)
        assert torch.equal(together[row], alone[0])


def test_prompt_lookup_agrees_with_greedy(shared_gpt2) -> None:
    """Candidates are checked several at a time; each is a new token."""
    model = endless(shared_gpt2)
    ids = torch.tensor([[11, 12, 13, 11, 12, 13, 11, 12]])
    given = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
    }
    for phase in ("prompt", "new", "both"):
        edit = LinearSteer(Site(1, token="last"), push(), phase=phase)
        with edit.on(model):
            expected = model.generate(ids, **given)
        with edit.on(model):
            assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=2, **given), expected)


def test_embeddings_as_the_prompt(shared_model) -> None:
    model = endless(shared_model)
    embeddings = model.get_input_embeddings()(IDS)
    for phase in ("prompt", "new", "both"):
        edit = LinearSteer(Site(1, token="last"), push(), phase=phase)
        found = generated(model, edit, input_ids=None, inputs_embeds=embeddings)
        assert torch.equal(found, greedy_by_hand(model, "last", phase)[:, PROMPT:])


@pytest.mark.parametrize("phase", ["prompt", "new", "both"])
def test_a_conversation_that_goes_on_from_its_cache(phase, shared_llama) -> None:
    """The second call gets the whole text and the cache of its first part: what is cached stays unedited."""
    model = endless(shared_llama)
    ids = torch.tensor([[11, 12, 13, 14, 15, 16]])
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
    seen: list[tuple[int, list]] = []

    def note(states: Tensor, chosen: Tensor, this_pass: Pass) -> None:
        seen.append((this_pass.past_length, chosen.tolist()))

    with intercept(model, Site(0, token="all"), note, phase=phase):
        model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, pad_token_id=0
        )
    prompt, new = phase != "new", phase != "prompt"
    assert seen == [(3, [[prompt] * 3]), (6, [[new]])]


@functools.cache
def t5() -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=60, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None, initializer_factor=3.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return T5ForConditionalGeneration(config).eval().requires_grad_(False)


def changed_by_hook(module: nn.Module, change: Callable[[Tensor], Tensor]):
    def hook(module: nn.Module, args: tuple, output: object) -> object:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return module.register_forward_hook(hook)


@pytest.mark.parametrize("use_cache", [True, False])
def test_an_encoder_that_generate_calls_by_itself(use_cache) -> None:
    model, vector = t5(), push(20.0)
    right, real = IDS.flip(1), REAL.flip(1)

    def change(states: Tensor) -> Tensor:
        new = states.clone()
        for row, place in enumerate([6, 4, 2]):
            new[row, place] += vector
        return new

    given = {"attention_mask": real, "max_new_tokens": STEPS, "do_sample": False, "use_cache": use_cache}
    plain = model.generate(right, **given)
    handle = changed_by_hook(model.encoder.block[0], change)
    expected = model.generate(right, **given)
    handle.remove()
    with LinearSteer(Site(0, stack="encoder"), vector).on(model):
        found = model.generate(right, **given)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("phase", ["prompt", "new", "both"])
def test_a_decoder_of_two_stacks(phase) -> None:
    model, vector = t5(), push(20.0)
    start = {"prompt": (0, 1), "new": (1, None), "both": (0, None)}[phase]
    given = {"attention_mask": REAL, "max_new_tokens": STEPS, "do_sample": False}

    def change(states: Tensor) -> Tensor:
        new = states.clone()
        new[:, slice(*start)] += vector
        return new

    handle = changed_by_hook(model.decoder.block[0], change)
    expected = model.generate(IDS, use_cache=False, **given)
    handle.remove()
    edit = LinearSteer(Site(0, stack="decoder"), vector, phase=phase)
    for use_cache in (True, False):
        with edit.on(model):
            assert torch.equal(model.generate(IDS, use_cache=use_cache, **given), expected)
    assert not torch.equal(model.generate(IDS, **given), expected)


@pytest.mark.parametrize("phase", ["prompt", "new", "both"])
def test_a_cache_that_does_not_count_its_tokens(phase) -> None:
    config = MambaConfig(
        vocab_size=60, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, initializer_range=0.5,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MambaForCausalLM(config).eval()
    ids = torch.tensor([[11, 12, 13, 14, 15]])
    given = {"max_new_tokens": STEPS, "do_sample": False}
    start = {"prompt": (4, 5), "new": (5, None), "both": (4, None)}[phase]

    def change(states: Tensor) -> Tensor:
        new = states.clone()
        new[:, slice(*start)] += push(300.0)
        return new

    handle = changed_by_hook(model.backbone.layers[1], change)
    expected = model.generate(ids, use_cache=False, **given)
    handle.remove()
    for use_cache in (True, False):
        with LinearSteer(Site(1), push(300.0), phase=phase).on(model):
            assert torch.equal(model.generate(ids, use_cache=use_cache, **given), expected)
    assert not torch.equal(model.generate(ids, **given), expected)


def test_an_adapter_around_the_model(tiny_model) -> None:
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if hasattr(tiny_model, "transformer") else ["q_proj", "v_proj"]
    wrapped = peft.get_peft_model(
        endless(tiny_model), peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM")
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    wrapped.eval()
    inner = wrapped.get_base_model()
    for phase in ("prompt", "new", "both"):
        expected = greedy_by_hand(inner, "last", phase)
        edit = LinearSteer(Site(1, token="last"), push(), phase=phase)
        for use_cache in (True, False):
            assert torch.equal(generated(wrapped, edit, use_cache=use_cache), expected)
    with torch.no_grad(), LinearSteer(Site(1), push()).on(wrapped):
        through = wrapped(input_ids=IDS, attention_mask=REAL).logits
    with torch.no_grad(), LinearSteer(Site(1), push()).on(inner):
        assert torch.equal(inner(input_ids=IDS, attention_mask=REAL).logits, through)
    assert all("generate" not in module.__dict__ for module in wrapped.modules())


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_in_front(kind, tiny_gpt2) -> None:
    peft = pytest.importorskip("peft")
    settings = {
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    }[kind]()
    wrapped = peft.get_peft_model(endless(tiny_gpt2), settings).eval()
    extra = 4 if kind == "prompt" else 0
    seen: list[Tensor] = []
    with torch.no_grad(), intercept(wrapped, Site(1, token=-2), lambda s, c, p: seen.append(c)):
        wrapped(input_ids=IDS, attention_mask=REAL)
    assert seen[0].nonzero().tolist() == [[row, 5 + extra] for row in range(3)]
    seen.clear()
    with intercept(wrapped, Site(1), lambda s, c, p: seen.append(c), phase="prompt"):
        wrapped.generate(
            input_ids=IDS, attention_mask=REAL, max_new_tokens=2, do_sample=False, pad_token_id=0
        )
    assert seen[0].nonzero().tolist() == [[row, 6 + extra] for row in range(3)]
    assert not bool(seen[1].any())


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 2.0},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"assistant_early_exit": 1},
        {"token_healing": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_ways_to_generate_that_could_not_be_right_are_refused(options, shared_gpt2) -> None:
    edit = LinearSteer(Site(1), push())
    with pytest.raises(EditError, match=next(iter(options))):
        generated(shared_gpt2, edit, **options)
    assert "generate" not in shared_gpt2.__dict__


def test_generate_is_put_back_whatever_happens(tiny_gpt2) -> None:
    model = tiny_gpt2
    first, second = LinearSteer(Site(0), push()), LinearSteer(Site(2), push())
    one, two = first.attach(model), second.attach(model)
    one.remove()
    assert "generate" in model.__dict__
    two.remove()
    assert "generate" not in model.__dict__
    model.__dict__["generate"] = mine = lambda *args, **kwargs: "mine"
    with first.on(model, must_change=False):
        assert model.generate(input_ids=IDS) == "mine"
    assert model.__dict__["generate"] is mine
    with pytest.raises(ZeroDivisionError), first.on(model):
        _ = 1 / 0
    assert model.__dict__["generate"] is mine


def test_no_new_token_was_ever_computed(shared_gpt2) -> None:
    """With one new token, generate runs the prompt only."""
    edit = LinearSteer(Site(1), push(), phase="new")
    with pytest.raises(EditError, match="no token was selected"):
        generated(shared_gpt2, edit, max_new_tokens=1)
