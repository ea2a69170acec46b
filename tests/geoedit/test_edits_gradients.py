"""Edits where torch does more than run forward: gradients, checkpoints, transforms, inference, placement."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from geoedit.edits import ActivationEdit, LinearSteer, Patch, Selected, SwapMeans
from geoedit.errors import EditError
from geoedit.hooks import intercept
from geoedit.site import Site

WIDTH = 32
IDS = torch.tensor([[11, 12, 13, 14], [21, 22, 23, 24], [31, 32, 33, 34]])
SHORT = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loss_of(model: nn.Module, real: Tensor | None = None, ids: Tensor = IDS) -> Tensor:
    device = next(model.parameters()).device
    logits = model(input_ids=ids.to(device), attention_mask=None if real is None else real.to(device)).logits
    return logits[:, -1].log_softmax(-1)[:, 5].sum()


@pytest.mark.parametrize("token", ["last", "all", 1])
def test_the_gradient_of_a_direction_against_finite_differences(token, shared_model, device) -> None:
    model = shared_model.to(device=device, dtype=torch.float64)
    start, step, tolerance = draw(WIDTH).double(), 1e-5, 1e-6
    if type(model).__name__.startswith("Llama"):  # its norms and rotations work in float32 always
        step, tolerance = 1e-2, 2e-3

    def loss(direction: Tensor) -> Tensor:
        with LinearSteer(Site(1, token=token), direction, scale=0.7).on(model):
            return loss_of(model)

    direction = start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(direction), direction)
    for feature in (0, 7, 31):
        by = torch.zeros(WIDTH).double()
        by[feature] = step
        with torch.no_grad():
            expected = (loss(start + by) - loss(start - by)) / (2 * step)
        torch.testing.assert_close(gradient[feature].cpu(), expected.cpu(), rtol=tolerance, atol=tolerance)
    assert gradient.abs().max() > 20 * tolerance


def test_gradients_reach_scales_means_and_patches(shared_gpt2) -> None:
    model = shared_gpt2.to(torch.float64)
    vectors = [draw(WIDTH, seed=seed).double().requires_grad_() for seed in range(3)]
    scales = torch.tensor([0.5, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    rows = draw(3, WIDTH, seed=7).double().requires_grad_()
    edit = (
        LinearSteer(Site(0), vectors[0], scale=scales)
        + SwapMeans(Site(1), vectors[1], vectors[2])
        + Patch(Site(0, "mlp_out", 1), rows, scale=0.5)
    )

    def loss(*values: Tensor) -> Tensor:
        first, second, third = edit.edits
        new = (
            LinearSteer(first.site, values[0], scale=values[3])
            + SwapMeans(second.site, values[1], values[2])
            + Patch(third.site, values[4], scale=0.5)
        )
        with new.on(model):
            return loss_of(model)

    assert torch.autograd.gradcheck(loss, (*vectors, scales, rows), fast_mode=True)


def test_gradients_reach_the_weights_below_an_edit(shared_gpt2) -> None:
    """Writing must not cut the graph nor change in place what the backward pass needs."""
    model = shared_gpt2.requires_grad_(True)
    with LinearSteer(Site(1), 3 * draw(WIDTH)).on(model):
        loss_of(model).backward()
    with_edit = model.transformer.wte.weight.grad.clone()

    def add(module: nn.Module, args: tuple, output: object) -> object:
        states = output[0] if isinstance(output, tuple) else output
        by = torch.zeros_like(states)
        by[:, -1] = 3 * draw(WIDTH)
        new = states + by
        return (new, *output[1:]) if isinstance(output, tuple) else new

    model.zero_grad()
    handle = model.transformer.h[1].register_forward_hook(add)
    loss_of(model).backward()
    handle.remove()
    torch.testing.assert_close(with_edit, model.transformer.wte.weight.grad)


SITES = [Site(1, token="last"), Site(1, "attention_out", 1), Site(2, "heads", -1)]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", SITES, ids=str)
def test_checkpoints_recompute_the_same_edit(site, reentrant, tiny_model) -> None:
    """Two batches with other padding wait for one backward pass; each is recomputed with its own tokens."""
    model = tiny_model.requires_grad_(True).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    direction = (3 * draw(WIDTH)).requires_grad_()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        direction.grad = None
        with LinearSteer(site, direction).on(model):
            (loss_of(model, SHORT) + 2 * loss_of(model, SHORT.flip(0), IDS.flip(1))).backward()
        return [direction.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = gradients()
    model.disable_input_require_grads()
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_hooked_module(reentrant) -> None:
    """Here the block itself is called anew, hooks and all."""

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(40, 8)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
            self.checkpointed = False

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            states = self.embed(input_ids)
            for one in (self.first, self.second):
                states = (
                    checkpoint(one, states, use_reentrant=reentrant) if self.checkpointed else one(states)
                )
                states = states.tanh()
            return states

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Small()
    direction = draw(8).requires_grad_()

    def gradients() -> list[Tensor]:
        model.zero_grad()
        direction.grad = None
        with LinearSteer(Site(module="first"), direction).on(model):
            one, two = model(IDS, SHORT), model(IDS.flip(1), SHORT.flip(0))
            (one[:, -1].square().sum() + 2 * two.sum()).backward()
        return [direction.grad.clone(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients()
    model.checkpointed = True
    for one, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_that_outlives_its_forward_is_named(tiny_gpt2) -> None:
    model = tiny_gpt2.requires_grad_(True).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = loss_of(model)
    edit = LinearSteer(Site(1, "attention_out"), draw(WIDTH))
    with pytest.raises(EditError, match="before this was attached"), edit.on(model):
        loss.backward()


@dataclass(frozen=True, eq=False)
class Stretch(ActivationEdit):
    """Its gradient needs the factor, as that of an addition would not."""

    factor: Tensor

    def change(self, states: Tensor, at: Selected) -> Tensor:
        return states * self.factor


def test_inference_mode_does_not_spoil_later_gradients(shared_gpt2) -> None:
    edit = Stretch(Site(1), draw(WIDTH).double())  # moved to float32 at its first use
    model = shared_gpt2.requires_grad_(True)
    with edit.on(model):
        with torch.inference_mode():
            inside = loss_of(model)
        with torch.no_grad():
            outside = loss_of(model)
        loss = loss_of(model)
        loss.backward()
    assert inside.item() == outside.item() == loss.item()
    assert bool(model.transformer.wte.weight.grad.any())


def test_transforms_of_torch_func(tiny_gpt2) -> None:
    """jvp, vjp and vmap pass through an edit, and what it counted can still be read afterwards."""
    model = tiny_gpt2.to(torch.float64)
    model.set_attn_implementation("eager")  # fused attention has no forward derivative
    direction, tangent = draw(WIDTH).double(), draw(WIDTH, seed=2).double()

    def states_to_loss(added: Tensor) -> Tensor:
        def put(states: Tensor, selected: Tensor, this_pass: object) -> Tensor:
            return states + selected[..., None] * added

        with intercept(model, Site(0), put):
            return loss_of(model)

    with LinearSteer(Site(1), direction).on(model):
        _, slope = torch.func.jvp(states_to_loss, (direction,), (tangent,))
        _, pull = torch.func.vjp(states_to_loss, direction)
        (gradient,) = pull(torch.ones((), dtype=torch.float64))
        many = torch.func.vmap(states_to_loss)(torch.stack([direction, tangent]))
        singly = torch.stack([states_to_loss(direction), states_to_loss(tangent)])
    torch.testing.assert_close(slope, gradient @ tangent)
    torch.testing.assert_close(many, singly)


def test_weights_that_accelerate_brings_in_for_each_module(tiny_model) -> None:
    accelerate = pytest.importorskip("accelerate")
    ids, edit = (
        IDS,
        LinearSteer(Site(1), 3 * draw(WIDTH)) + LinearSteer(Site(2, "attention_out", 0), draw(WIDTH)),
    )
    marked = edit.edits[0].for_model(tiny_model)
    with torch.no_grad(), edit.on(tiny_model):
        expected = tiny_model(ids).logits
    model = accelerate.cpu_offload(tiny_model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        with edit.on(model):
            assert torch.equal(model(ids).logits, expected)
        with marked.on(model):  # its embedding is not in memory; the sizes agree
            model(ids)


def test_a_direction_on_the_cpu_meets_states_elsewhere(shared_gpt2, device) -> None:
    model, direction = shared_gpt2.to(device), draw(WIDTH)
    with torch.no_grad(), LinearSteer(Site(1), direction).on(model):
        found = model(IDS.to(device)).logits
    with torch.no_grad(), LinearSteer(Site(1), direction.to(device)).on(model):
        assert torch.equal(model(IDS.to(device)).logits, found)
