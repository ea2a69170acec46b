"""Edits: what they do to states, that they come off to the bit, and that they are never silent."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from geoedit.anatomy import anatomy
from geoedit.edits import ActivationEdit, Compose, Edit, LinearSteer, Patch, Selected, SwapMeans, load_edit
from geoedit.errors import EditError
from geoedit.fingerprint import fingerprint
from geoedit.site import Site

WIDTH = 32
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])


def draw(*shape: int, seed: int = 1, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def read(model: nn.Module, block: int = 1, ids: Tensor = IDS) -> Tensor:
    """The output of a block, through a plain torch hook."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: object) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = blocks_of(model)[block].register_forward_hook(keep)
    with torch.no_grad():
        model(ids.to(next(model.parameters()).device))
    handle.remove()
    return kept[0]


def read_edited(model: nn.Module, edit: Edit, block: int = 1) -> Tensor:
    with edit.on(model):  # its hook stands before the one that reads
        return read(model, block)


V, W = draw(WIDTH), draw(WIDTH, seed=2)
ROWS = draw(3, WIDTH, seed=3)


@pytest.mark.parametrize(
    ("edit", "formula"),
    [
        (LinearSteer(Site(1), V, scale=0.5), lambda x: x + 0.5 * V),
        (LinearSteer(Site(1), V, scale=-2), lambda x: x - 2 * V),
        (
            LinearSteer(Site(1), V, scale=torch.tensor([1.0, 0.0, -1.0])),
            lambda x: x + torch.stack([V, 0 * V, -V]),
        ),
        (SwapMeans(Site(1), V, W, scale=0.7), lambda x: x + 0.7 * (W - V)),
        (Patch(Site(1), V), lambda x: V.expand(3, -1)),
        (Patch(Site(1), ROWS), lambda x: ROWS),
        (Patch(Site(1), ROWS, scale=0.25), lambda x: 0.75 * x + 0.25 * ROWS),
    ],
    ids=["steer", "against", "rows", "swap", "patch", "patch rows", "mixture"],
)
def test_formulas(edit, formula, shared_model, device) -> None:
    model = shared_model.to(device)
    before, after = read(model).cpu(), read_edited(model, edit).cpu()
    torch.testing.assert_close(after[:, -1], formula(before[:, -1]), rtol=0, atol=1e-5)
    assert torch.equal(after[:, :-1], before[:, :-1])  # the other tokens, to the bit


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_rounded_once(dtype, tiny_gpt2, device) -> None:
    model = tiny_gpt2.to(device=device, dtype=dtype)
    before = read(model)[:, -1]
    after = read_edited(model, LinearSteer(Site(1), V, scale=1.3))[:, -1]
    wide = torch.promote_types(dtype, torch.float32)
    expected = before.to(wide) + 1.3 * V.to(device=device, dtype=wide)
    assert after.dtype == dtype
    assert torch.equal(after, expected.to(dtype))


def test_autocast_leaves_the_arithmetic_alone(shared_gpt2) -> None:
    @dataclass(frozen=True, eq=False)
    class Turn(ActivationEdit):
        matrix: Tensor

        def change(self, states: Tensor, at: Selected) -> Tensor:
            return states @ self.matrix

    matrix = draw(WIDTH, WIDTH, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = read(shared_gpt2)[:, -1]
        after = read_edited(shared_gpt2, Turn(Site(1), matrix))[:, -1]
    assert torch.equal(after, (before.float() @ matrix).to(before.dtype))


def snapshot(model: nn.Module) -> tuple[dict, dict, list, list, Tensor]:
    hooks = [name for name in nn.Module().__dict__ if "hooks" in name]
    return (
        {name: parameter.detach().clone() for name, parameter in model.named_parameters()},
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        [(name, list(getattr(module, name))) for module in model.modules() for name in hooks],
        [sorted(module.__dict__) for module in model.modules()],
        model(IDS).logits.detach(),
    )


def assert_same(one: tuple, other: tuple) -> None:
    for before, after in zip(one[:2], other[:2], strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert one[2:4] == other[2:4]
    assert torch.equal(one[4], other[4])


def test_removal_restores_every_bit(shared_model) -> None:
    before = snapshot(shared_model)
    handles = [
        edit.attach(shared_model)
        for edit in (
            LinearSteer(Site(0), V),
            LinearSteer(Site(0), W),
            SwapMeans(Site(1), V, W) + Patch(Site(2), V),
        )
    ]
    assert not torch.equal(shared_model(IDS).logits, before[4])
    for handle in (handles[1], handles[0], handles[2]):
        handle.remove()
        handle.remove()
        assert not handle.attached
    assert_same(snapshot(shared_model), before)


def test_edits_at_one_site_act_in_their_order(shared_gpt2) -> None:
    steer, patch = LinearSteer(Site(1), V), Patch(Site(1), W)
    after_patch = read_edited(shared_gpt2, patch + steer)[:, -1]
    torch.testing.assert_close(after_patch, (W + V).expand(3, -1), rtol=0, atol=1e-5)
    with steer.on(shared_gpt2), patch.on(shared_gpt2):
        assert torch.equal(read(shared_gpt2)[:, -1], W.expand(3, -1))


def test_composition_is_flat_and_scales_each(shared_gpt2) -> None:
    one, two, three = LinearSteer(Site(1), V), LinearSteer(Site(1), W, scale=2.0), LinearSteer(Site(1), V)
    both = one + two + three
    assert both.edits == (one, two, three)
    before = read(shared_gpt2)[:, -1]
    after = read_edited(shared_gpt2, both.with_scale(0.5))[:, -1]
    torch.testing.assert_close(after, before + 0.5 * V + W + 0.5 * V, rtol=0, atol=1e-5)
    with pytest.raises(EditError, match="at least one"):
        Compose([])


def test_a_composition_that_fails_half_way_leaves_nothing(shared_gpt2) -> None:
    before = snapshot(shared_gpt2)
    with pytest.raises(EditError):
        (LinearSteer(Site(1), V) + LinearSteer(Site(99), V)).attach(shared_gpt2)
    assert_same(snapshot(shared_gpt2), before)


# Silence.


def test_the_model_was_not_called(shared_gpt2) -> None:
    with pytest.raises(EditError, match="was not called"), LinearSteer(Site(1), V).on(shared_gpt2):
        copy.deepcopy(shared_gpt2).transformer.h[0](torch.ones(1, 1, WIDTH))


def test_a_copy_of_a_model_takes_the_edit_with_it(shared_gpt2) -> None:
    plain = shared_gpt2(IDS).logits
    with LinearSteer(Site(1), V).on(shared_gpt2):
        expected = shared_gpt2(IDS).logits
        other = copy.deepcopy(shared_gpt2)
        nn.init.zeros_(other.lm_head.weight)
        assert not bool(other.generate(IDS, max_new_tokens=3, pad_token_id=0)[:, 4:].any())
        assert torch.equal(shared_gpt2(IDS).logits, expected)
    assert torch.equal(shared_gpt2(IDS).logits, plain)


def test_the_site_was_not_reached(tiny_gpt2) -> None:
    class Stop(nn.Module):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            raise InterruptedError

    tiny_gpt2.transformer.h[1] = Stop()
    edit = LinearSteer(Site(module="transformer.h.2"), V)
    with (
        pytest.raises(EditError, match=r"never reached transformer\.h\.2"),
        edit.on(tiny_gpt2),
        pytest.raises(InterruptedError),
    ):
        tiny_gpt2(IDS)


def test_no_token_was_selected(shared_gpt2) -> None:
    edit = LinearSteer(Site(1), V, phase="new")
    with pytest.raises(EditError, match="no token was selected"), edit.on(shared_gpt2):
        shared_gpt2(IDS)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (LinearSteer(Site(1), V, scale=0), "its scale is 0"),
        (LinearSteer(Site(1), V, scale=torch.zeros(3)), "its scale is 0"),
        (LinearSteer(Site(1), 0 * V), "its direction is zero"),
        (SwapMeans(Site(1), V, V), "its source and its target are the same"),
        (LinearSteer(Site(1), 1e-12 * V), "as far as torch.float32 can tell"),
    ],
    ids=["scale", "scales", "direction", "means", "tiny"],
)
def test_nothing_changed(edit, reason, shared_gpt2) -> None:
    with pytest.raises(EditError, match=reason), edit.on(shared_gpt2):
        shared_gpt2(IDS)
    with edit.on(shared_gpt2, must_change=False):
        shared_gpt2(IDS)


def test_a_change_lost_to_rounding(tiny_gpt2) -> None:
    model = tiny_gpt2.to(torch.bfloat16)
    edit = LinearSteer(Site(1), 1e-6 * torch.ones(WIDTH))
    with pytest.raises(EditError, match=r"lost to rounding in torch\.bfloat16"), edit.on(model):
        model(IDS)


def test_an_overflow_is_named(tiny_gpt2) -> None:
    model = tiny_gpt2.to(torch.float16)
    edit = LinearSteer(Site(1), 1e5 * torch.ones(WIDTH))
    with pytest.raises(EditError, match=r"infinite or NaN ones in torch\.float16"), edit.on(model):
        model(IDS)


def test_a_silent_part_of_a_composition_is_named(shared_gpt2) -> None:
    edit = LinearSteer(Site(1), V) + LinearSteer(Site(2), 0 * V)
    with pytest.raises(EditError, match=r"block 2.*its direction is zero"), edit.on(shared_gpt2):
        shared_gpt2(IDS)


def test_an_error_in_the_block_goes_through(shared_gpt2) -> None:
    before = snapshot(shared_gpt2)
    with pytest.raises(KeyError, match="mine"), LinearSteer(Site(1), V).on(shared_gpt2):
        raise KeyError("mine")
    assert_same(snapshot(shared_gpt2), before)


def test_a_handle_can_be_asked_before_it_is_removed(shared_gpt2) -> None:
    handle = LinearSteer(Site(1), V).attach(shared_gpt2)
    with pytest.raises(EditError, match="was not called"):
        handle.check()
    shared_gpt2(IDS)
    handle.check()
    handle.remove()


# Bad input.


def test_attaching_twice_is_refused(shared_gpt2, shared_llama) -> None:
    edit = LinearSteer(Site(1), V)
    with edit.attach(shared_gpt2), pytest.raises(EditError, match="attached to this GPT2LMHeadModel already"):
        edit.attach(shared_gpt2)
    with edit.attach(shared_gpt2), edit.attach(shared_llama):  # two models are two matters
        pass
    with edit.attach(shared_gpt2), edit.with_scale(2.0).attach(shared_gpt2):
        pass


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearSteer(Site(1), torch.full((WIDTH,), torch.nan)), "32 values that are NaN"),
        (lambda: LinearSteer(Site(1), torch.tensor([1.0, torch.inf])), "1 values that are NaN or infinite"),
        (lambda: LinearSteer(Site(1), torch.arange(WIDTH)), "dtype torch.int64"),
        (lambda: LinearSteer(Site(1), torch.ones(2, WIDTH)), "one vector"),
        (lambda: LinearSteer(Site(1), torch.ones(0)), "is empty"),
        (lambda: LinearSteer(Site(1), V, scale=float("nan")), "finite"),
        (lambda: LinearSteer(Site(1), V, scale=torch.ones(2, 2)), "one a row"),
        (lambda: LinearSteer(Site(1), V, phase="later"), "phases are"),
        (lambda: LinearSteer(Site(1, token=2), V, phase="new"), "prompt"),
        (lambda: LinearSteer(Site(1, token="value"), V), "value_ids"),
        (lambda: SwapMeans(Site(1), V, W[:5]), "one width"),
        (lambda: Patch(Site(1), torch.ones(1, 1, WIDTH)), "one a row"),
    ],
)
def test_impossible_edits_are_refused_when_they_are_made(make, words) -> None:
    with pytest.raises(EditError, match=words):
        make()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (LinearSteer(Site(1), torch.ones(WIDTH + 1)), "width 33.*width 32"),
        (LinearSteer(Site(1, "mlp_hidden"), V), "width 32.*width 128"),
        (LinearSteer(Site(1, "heads", head=0), V), "width 32.*width 8"),
        (LinearSteer(Site(7), V), "7"),
        (LinearSteer(Site(module="transformer.nothing"), V), "nothing"),
    ],
)
def test_edits_that_do_not_fit_are_refused_before_any_forward(edit, words, shared_gpt2, monkeypatch) -> None:
    anatomy(shared_gpt2)
    monkeypatch.setattr(shared_gpt2.transformer.h[0], "forward", None)  # any forward would fail
    with pytest.raises(EditError, match=words):
        edit.attach(shared_gpt2)


def test_rows_must_match_the_batch(shared_gpt2) -> None:
    with (
        pytest.raises(EditError, match="2 rows, but the batch has 3"),
        Patch(Site(1), draw(2, WIDTH)).on(shared_gpt2),
    ):
        shared_gpt2(IDS)
    edit = LinearSteer(Site(1), V, scale=torch.ones(2))
    with pytest.raises(EditError, match="2 rows, but the batch has 3"), edit.on(shared_gpt2):
        shared_gpt2(IDS)
    with Patch(Site(1), draw(1, WIDTH)).on(shared_gpt2):
        shared_gpt2(IDS)


# Which model an edit is of.


def test_an_edit_knows_its_model(shared_gpt2, shared_llama) -> None:
    edit = LinearSteer(Site(1), V).for_model(shared_gpt2)
    with edit.on(shared_gpt2):
        shared_gpt2(IDS)
    with pytest.raises(EditError, match="another model: it is a gpt2 and the model is a llama"):
        edit.attach(shared_llama)
    with edit.on(shared_llama, allow_other_model=True):
        shared_llama(IDS)
    other = copy.deepcopy(shared_gpt2)
    nn.init.normal_(other.transformer.wte.weight, generator=torch.Generator().manual_seed(8))
    with pytest.raises(EditError, match="weights of the embedding differ"):
        edit.attach(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_precision_and_wrapping_do_not_make_another_model(dtype, shared_model) -> None:
    mark = fingerprint(shared_model)
    assert mark.difference(fingerprint(copy.deepcopy(shared_model).to(dtype))) is None
    body = shared_model.transformer if hasattr(shared_model, "transformer") else shared_model.model
    assert mark.difference(fingerprint(body)) is None
    assert type(mark).from_dict(mark.to_dict()) == mark


def test_a_model_on_the_meta_device_is_told_by_its_sizes(shared_gpt2) -> None:
    mark = fingerprint(shared_gpt2)
    assert mark.difference(fingerprint(copy.deepcopy(shared_gpt2).to("meta"))) is None


# Means by value.


def test_between_takes_means_from_a_mapping() -> None:
    edit = SwapMeans.between({"may": V, "june": W}, "may", "june", site=Site(1), scale=0.5)
    assert torch.equal(edit.source, V) and torch.equal(edit.target, W) and edit.scale == 0.5
    with pytest.raises(EditError, match=r"no mean for 'july'.*june.*may"):
        SwapMeans.between({"may": V, "june": W}, "may", "july", site=Site(1))


def test_between_takes_means_from_statistics_and_activations(shared_gpt2, tiny_tokenizer) -> None:
    activations = pytest.importorskip("geoedit.activations")
    prompts = ["one day in may", "a day of may", "one day in june", "a day of june"]
    labels, site = ["may", "may", "june", "june"], Site(1)
    states = read(shared_gpt2, 1, tiny_tokenizer(prompts, return_tensors="pt").input_ids)[:, -1]
    expected = (states[:2].double().mean(0), states[2:].double().mean(0))
    found = activations.statistics(shared_gpt2, tiny_tokenizer, prompts, [site], labels)
    edit = SwapMeans.between(found, "may", "june", site=site)
    torch.testing.assert_close((edit.source, edit.target), expected, rtol=0, atol=1e-5)
    assert edit.fingerprint == fingerprint(shared_gpt2)
    with pytest.raises(EditError):
        SwapMeans.between(found, "may", "july", site=site)
    acts = activations.collect(shared_gpt2, tiny_tokenizer, prompts, [site], values=labels)
    edit = SwapMeans.between(acts, "may", "june", site=site)
    torch.testing.assert_close((edit.source.double(), edit.target.double()), expected, rtol=0, atol=1e-5)


# A new kind of edit.


@dataclass(frozen=True, eq=False)
class Shrink(ActivationEdit, kind="test-shrink"):
    """Divide by a factor, a feature at a time: a whole edit in three lines."""

    factor: Tensor
    floor: float = 0.0

    def change(self, states: Tensor, at: Selected) -> Tensor:
        return (states / self.factor).clamp(min=self.floor)


def test_a_new_edit_needs_only_its_fields_and_change(shared_gpt2, tmp_path) -> None:
    edit = Shrink(Site(1), 1 + draw(WIDTH).abs(), floor=-0.5)
    before, after = read(shared_gpt2)[:, -1], read_edited(shared_gpt2, edit)[:, -1]
    torch.testing.assert_close(after, (before / edit.factor).clamp(min=-0.5))
    edit.save(tmp_path / "shrink.safetensors")
    again = load_edit(tmp_path / "shrink.safetensors")
    assert isinstance(again, Shrink) and again.floor == -0.5 and torch.equal(again.factor, edit.factor)
    with pytest.raises(EditError, match="width 3"):
        Shrink(Site(1), torch.ones(3)).attach(shared_gpt2)


def test_a_change_that_loses_the_shape_is_named(shared_gpt2: PreTrainedModel) -> None:
    @dataclass(frozen=True, eq=False)
    class Wrong(ActivationEdit):
        def change(self, states: Tensor, at: Selected) -> Tensor:
            return states[:, :1]

    with pytest.raises(EditError, match=r"returned shape \(3, 1\)"), Wrong(Site(1)).on(shared_gpt2):
        shared_gpt2(IDS)
