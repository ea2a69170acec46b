"""Sliders of language models: odds against single passes, what is refused, what one does to the almanac."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from transformers import BertConfig, BertForMaskedLM

from geoedit.errors import EditError
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import Adapters, row_scales
from geoedit.sliders.training.continuations import Rows, Speaker
from geoedit.sliders.training.language import LanguageTask
from geoedit.sliders.training.run import train
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.targets import target_paths
from geoedit.sliders.training.task import Batch

PROMPTS = {"target": "the {x} is", "positive": "the large {x} day is", "negative": "small {x} is"}
SPEC = SliderSpec(
    name="large", kind="language", preserve={"x": ["red", "green city"]}, unrelated=["one two"], **PROMPTS
)
SETTINGS = TrainSettings(cache=6, trajectory_steps=3, refresh=2, guidance=1.5, preserve=3.0)


def begin(model, tokenizer, spec=SPEC, settings=SETTINGS, seed=0, batch_size=6) -> LanguageTask:
    """A task that is ready, with an adapter whose second factors are not zero."""
    task = LanguageTask(model, tokenizer, spec, batch_size=batch_size)
    generator = torch.Generator().manual_seed(seed)
    adapters = Adapters(task.components, {"model": target_paths(model, "attn")}, rank=2, generator=generator)
    for name, parameter in adapters.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    task.adapters = adapters
    task.prepare(settings, generator)
    return task


def next_odds(model, tokenizer, prompt: str, drawn: list[int], scale: float) -> torch.Tensor:
    """Log-probabilities of each token of a continuation: one pass a token, one row, no padding."""
    ids, found = tokenizer(prompt).input_ids, []
    device = next(model.parameters()).device
    for token in drawn:
        with torch.no_grad(), row_scales(model, torch.tensor([scale], device=device)):
            found.append(model(torch.tensor([ids], device=device)).logits[0, -1].double().log_softmax(-1))
        ids = [*ids, token]
    return torch.stack(found)


def test_the_loss_is_the_divergence_from_the_wanted_odds(tiny_model, tiny_tokenizer, device) -> None:
    model = tiny_model.double().to(device)
    task = begin(model, tiny_tokenizer)
    task.load_state(task.state() | {"context": torch.tensor([0, 1, 2, 0, 1, 2])})
    scale = torch.tensor([0.4, 1.0, 0.7], device=device)
    losses = task.loss(Batch({"entry": torch.arange(3, device=device), "scale": scale}))
    contexts = [*SPEC.contexts()]
    for row in range(3):
        which, drawn = int(task.state()["context"][row]), task.state()["drawn"][row].tolist()
        if which < len(contexts):
            prompts, weight = contexts[which], 1.0
            texts = (prompts.target, prompts.neutral, prompts.positive, prompts.negative)
        else:
            texts, weight = ("one two",) * 4, SETTINGS.preserve
        ended = [i for i, token in enumerate(drawn) if token == tiny_tokenizer.eos_token_id]
        drawn = drawn[: ended[0] + 1] if ended else drawn
        neutral, high, low = (next_odds(model, tiny_tokenizer, text, drawn, 0.0) for text in texts[1:])
        likely = torch.zeros_like(high, dtype=torch.bool)
        for odds in (neutral, high, low):
            likely |= odds.exp() > 0.1 * odds.exp().max(-1, keepdim=True).values
        wanted = []
        for sign in (1, -1):
            own = next_odds(model, tiny_tokenizer, texts[0], drawn, sign * float(scale[row]))
            push = sign * float(scale[row]) * 1.5 * torch.where(likely, high - low, 0.0)
            wanted.append(kl_divergence(Categorical(logits=neutral + push), Categorical(logits=own)).mean())
        torch.testing.assert_close(
            losses[row].detach(), weight * torch.stack(wanted).mean(), rtol=1e-6, atol=1e-9
        )


def test_an_erasing_spec_is_the_opposite_one(tiny_gpt2, tiny_tokenizer) -> None:
    swapped = SPEC.to_dict() | {"positive": PROMPTS["negative"], "negative": PROMPTS["positive"]}
    state, found = None, []
    for fields in (SPEC.to_dict() | {"action": "erase"}, swapped, SPEC.to_dict()):
        task = begin(tiny_gpt2, tiny_tokenizer, SliderSpec.from_dict(fields))
        state = state or task.state()
        task.load_state(state)
        found.append(task.loss(task.draw(0, torch.Generator().manual_seed(1))).detach())
        task.adapters.remove()
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[2], rtol=1e-2)


def test_draws_follow_the_models_odds(tiny_gpt2, tiny_tokenizer, device) -> None:
    speaker = Speaker.of(tiny_gpt2.to(device), tiny_tokenizer)
    rows = speaker.rows(["the red", "one two three is"], room=2)
    many = rows.take(torch.tensor([0, 1], device=device).repeat_interleave(400))
    drawn = speaker.continued(many, 2, torch.Generator().manual_seed(0)).cpu()
    for row, text in enumerate(["the red", "one two three is"]):
        ids = torch.tensor([tiny_tokenizer(text).input_ids], device=device)
        with torch.no_grad():
            odds = tiny_gpt2(ids).logits[0, -1].softmax(-1).cpu()
        counts = torch.bincount(drawn[400 * row : 400 * (row + 1), 0], minlength=len(odds))
        expected = 400 * odds
        likely = expected > 5
        chi = ((counts - expected).square() / expected)[likely].sum()
        freedom = int(likely.sum())
        assert freedom > 3 and chi < freedom + 4 * (2 * freedom) ** 0.5


def test_padding_changes_no_odds_and_stops_end_a_text(tiny_model, tiny_tokenizer) -> None:
    speaker = Speaker.of(tiny_model.double(), tiny_tokenizer)
    rows = speaker.rows(["the red city of rome is", "two"], room=3)
    drawn = torch.tensor([[5, 9, 4], [7, 2, 8]])
    together = speaker.logits(rows.followed(drawn), 3)
    for row, text in enumerate(["the red city of rome is", "two"]):
        alone = Rows(torch.tensor([tiny_tokenizer(text).input_ids]), rows.lengths[row : row + 1])
        torch.testing.assert_close(
            together[row], speaker.logits(alone.followed(drawn[row : row + 1]), 3)[0], rtol=1e-9, atol=1e-10
        )
    assert speaker.alive(drawn).tolist() == [[1, 1, 1], [1, 1, 0]]


def test_frozen_odds_that_are_too_large_to_keep_give_the_same_loss(
    tiny_llama, tiny_tokenizer, monkeypatch
) -> None:
    task = begin(tiny_llama, tiny_tokenizer)
    batch = task.draw(0, torch.Generator().manual_seed(2))
    kept = task.loss(batch).detach()
    monkeypatch.setattr("geoedit.sliders.training.language.KEPT_BYTES", 0)
    task.load_state(task.state())
    assert task._frozen is None
    torch.testing.assert_close(task.loss(batch).detach(), kept, rtol=1e-4, atol=1e-6)


def test_a_refresh_replaces_a_part_and_leaves_the_old_state_alone(tiny_gpt2, tiny_tokenizer) -> None:
    task = begin(tiny_gpt2, tiny_tokenizer)
    before = task.state()
    copies = {name: tensor.clone() for name, tensor in before.items()}
    task.draw(1, torch.Generator().manual_seed(3))
    assert all(torch.equal(task.state()[name], copies[name]) for name in copies)
    task.draw(2, torch.Generator().manual_seed(3))
    assert all(torch.equal(before[name], copies[name]) for name in copies)
    changed = (task.state()["drawn"] != before["drawn"]).any(-1)
    assert 1 <= int(changed.sum()) <= 2
    with pytest.raises(EditError, match="kept continuations"):
        task.load_state({"context": before["context"]})


def test_what_a_language_slider_cannot_be(tiny_gpt2, tiny_tokenizer) -> None:
    bert = BertForMaskedLM(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    ).eval()  # fmt: skip
    with pytest.raises(EditError, match="depends on the tokens behind it"):
        LanguageTask(bert, tiny_tokenizer, SPEC)
    with pytest.raises(EditError, match="gives no logits"):
        LanguageTask(torch.nn.Linear(2, 2), tiny_tokenizer, SPEC)
    with pytest.raises(EditError, match="tokenizer"):
        LanguageTask(tiny_gpt2, None, SPEC)
    with pytest.raises(EditError, match="kind: language"):
        LanguageTask(tiny_gpt2, tiny_tokenizer, SliderSpec(**PROMPTS, preserve={"x": ["red"]}))
    with pytest.raises(EditError, match="batch_size is 0"):
        LanguageTask(tiny_gpt2, tiny_tokenizer, SPEC, batch_size=0)
    task = LanguageTask(tiny_gpt2, tiny_tokenizer, SPEC)
    with pytest.raises(EditError, match=r"has \d tokens; 62 more would be beyond the 64"):
        task.prepare(TrainSettings(trajectory_steps=62), torch.Generator())


def test_a_nan_names_the_prompt(tiny_gpt2, tiny_tokenizer) -> None:
    def spoil(module, inputs, output):
        output.logits = output.logits * float("nan")
        return output

    task = LanguageTask(tiny_gpt2, tiny_tokenizer, SPEC, batch_size=4)
    prepared = task.prepare
    task.prepare = lambda *given: (prepared(*given), tiny_gpt2.register_forward_hook(spoil))
    with pytest.raises(EditError, match=r"step 0: row \d \(scale ±[\d.]+, prompt '"):
        train(tiny_gpt2, SPEC, task=task, steps=2, cache=4, trajectory_steps=2, show=False)


@pytest.fixture(scope="module")
def almanac():
    """The almanac's GPT-2, a slider between adding one and adding nine, and what it said before."""
    from geoedit.testbeds import load

    model, tokenizer, _ = load("almanac-gpt2")
    spec = SliderSpec(
        name="more",
        kind="language",
        target="{x} plus 5 is",
        positive="{x} plus 9 is",
        negative="{x} plus 1 is",
        preserve={"x": [str(n) for n in range(12, 80, 5)]},
        unrelated=["the opposite of big is", "one day after Monday is", "one month after March is"],
    )
    before = model(torch.tensor([tokenizer("14 plus 5 is").input_ids])).logits.detach()
    slider = train(
        model, spec, tokenizer=tokenizer, steps=50, batch_size=4, cache=40, trajectory_steps=2, guidance=1.5,
        learning_rate=4e-3, show=False, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return model, tokenizer, slider, before


def test_a_slider_of_the_almanac_adds_less_and_more(almanac) -> None:
    model, tokenizer, slider, before = almanac
    assert torch.equal(model(torch.tensor([tokenizer("14 plus 5 is").input_ids])).logits.detach(), before)
    numbers = torch.tensor([tokenizer(str(n)).input_ids[-1] for n in range(100)])
    held_out = [n for n in range(12, 80) if n % 5 != 2][::6]
    added, unrelated = [], []
    for scale in (-1.0, -0.5, 0.0, 0.5, 1.0):
        with slider.at(model, scale), torch.no_grad():
            ids = torch.tensor([tokenizer(f"{n} plus 5 is").input_ids for n in held_out])
            odds = model(ids).logits[:, -1, numbers].softmax(-1)
            ids = torch.tensor([tokenizer("one month after June is").input_ids])
            unrelated.append(model(ids).logits[:, -1].log_softmax(-1))
        added.append(float((odds @ torch.arange(100.0) - torch.tensor(held_out)).mean()))
    assert added == sorted(added)
    assert added[0] < added[2] - 0.5 and added[-1] > added[2] + 0.5
    kept = [float(kl_divergence(Categorical(logits=unrelated[2]), Categorical(logits=u))) for u in unrelated]
    assert max(kept) < 0.05
