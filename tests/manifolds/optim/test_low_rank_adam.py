"""LowRankAdam: which pairs it finds, what a step of W is, and what it leaves to AdamW."""

import copy
import io

import peft
import pytest
import torch
from torch import Tensor, nn

import manifolds
from manifolds.optim import LowRankAdam
from manifolds.optim.lora_pairs import lora_pairs


class Pair(nn.Module):
    """A LoRA pair of attributes: W = scaling · B A, with B = 0 unless given."""

    def __init__(self, out, inside, rank, scaling=2.0, seed=0, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.lora_A = nn.Parameter(
            torch.randn(rank, inside, generator=generator, dtype=torch.float64).to(dtype)
        )
        self.lora_B = nn.Parameter(torch.zeros(out, rank, dtype=dtype))
        self.scaling = scaling

    def product(self) -> Tensor:
        return self.scaling * self.lora_B @ self.lora_A


def target(out=9, inside=7, rank=3, seed=1, condition=100.0):
    torch.manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in (out, inside))
    return u * torch.logspace(0, -torch.tensor(condition).log10().item(), rank, dtype=torch.float64) @ v.mT


def descend(optimizer, module, goal, steps, rate=None):
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 - step / steps) if rate else group["lr"]
        optimizer.zero_grad()
        loss = ((module.product() - goal) ** 2).sum() / 2
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_it_reaches_an_ill_conditioned_target_from_rank_zero():
    module = Pair(9, 7, 3)
    losses = descend(LowRankAdam(module), module, target(), 100, rate=0.1)
    assert losses[-1] < 1e-6 * losses[0]


def test_the_best_low_rank_approximation_is_found():
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(9, 7, dtype=torch.float64), full_matrices=False)
    goal = u * torch.tensor([3.0, 2, 1, 0.2, 0.1, 0.1, 0.0]) @ vt
    module = Pair(9, 7, 3)
    descend(LowRankAdam(module), module, goal, 150, rate=0.3)
    assert torch.allclose(module.product(), u[:, :3] * torch.tensor([3.0, 2, 1]) @ vt[:3], atol=1e-3)


def dense_steps(w, rows, goal, rate, steps, betas=(0.9, 0.999), decay=0.0):
    """What the docstring says, with m × n matrices, projectors and whole SVDs; `rows` are A's at W = 0."""
    (m, n), rank = w.shape, rows.shape[0]
    moment, square = torch.zeros_like(w), 0.0
    for step in range(1, steps + 1):
        left = torch.linalg.svd(w)[0][:, :rank] if w.any() else torch.zeros(m, rank, dtype=w.dtype)
        right = torch.linalg.svd(w)[2][:rank].mT if w.any() else torch.linalg.svd(rows)[2][:rank].mT
        on_left, on_right = left @ left.mT, right @ right.mT

        def project(z, on_left=on_left, on_right=on_right):
            return z @ on_right + on_left @ z - on_left @ z @ on_right

        gradient, dimension = project(w - goal), (m + n - rank) * rank
        moment = betas[0] * project(moment) + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient.square().sum() / dimension
        ahead = betas[0] * moment + (1 - betas[0]) * gradient
        u, values, vt = torch.linalg.svd(ahead, full_matrices=False)
        kept = values > 1e-9 * values[0]
        way = project(u[:, kept] @ vt[kept])
        size = (
            moment.norm() / (1 - betas[0] ** step) / ((square / (1 - betas[1] ** step)) ** 0.5 * way.norm())
        )
        u, values, vt = torch.linalg.svd((1 - rate * decay) * w - rate * size * way, full_matrices=False)
        w = u[:, :rank] * values[:rank] @ vt[:rank]
    return w


@pytest.mark.parametrize(("out", "inside", "rank"), [(9, 7, 3), (12, 15, 4), (8, 8, 1), (1, 1, 1), (2, 5, 2)])
@pytest.mark.parametrize("from_zero", [True, False])
def test_steps_are_those_of_the_formula_with_dense_matrices(out, inside, rank, from_zero):
    module = Pair(out, inside, rank)
    goal = torch.randn(out, inside, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    if not from_zero:
        with torch.no_grad():
            module.lora_B.copy_(torch.randn(out, rank, generator=torch.Generator().manual_seed(4)))
    expected = dense_steps(
        module.product().detach(), module.lora_A.detach().clone(), goal, 0.03, 6, decay=0.2
    )
    descend(LowRankAdam(module, lr=0.03, weight_decay=0.2), module, goal, 6)
    assert torch.allclose(module.product(), expected, atol=1e-7)


def test_steps_do_not_depend_on_how_w_is_split():
    torch.manual_seed(0)
    one, other = Pair(9, 7, 3), Pair(9, 7, 3)
    mix = torch.randn(3, 3, dtype=torch.float64) + 3 * torch.eye(3)
    with torch.no_grad():
        one.lora_B.copy_(torch.randn(9, 3))
        other.lora_B.copy_(one.lora_B @ mix / 5)
        other.lora_A.copy_(torch.linalg.solve(mix, one.lora_A))
    other.scaling = 10.0
    for module in (one, other):
        descend(LowRankAdam(module, lr=0.01), module, target(), 12)
    assert torch.allclose(one.product(), other.product(), atol=1e-7)


def test_the_first_step_from_rank_zero_is_orthogonal_in_the_row_space():
    module = Pair(9, 7, 3)
    rows = module.lora_A.detach().clone()
    projector = torch.linalg.pinv(rows) @ rows
    goal = target(condition=3.0)
    descend(LowRankAdam(module, lr=0.1), module, goal, 1)
    step = module.product().detach()
    assert torch.allclose(step @ projector, step, atol=1e-9)
    u, _, vt = torch.linalg.svd(goal @ projector)
    dimension = (9 + 7 - 3) * 3
    length = 0.1 * dimension**0.5
    assert torch.allclose(step, length / 3**0.5 * u[:, :3] @ vt[:3], atol=1e-7)


def test_a_small_step_is_tangent_to_the_manifold_of_fixed_rank():
    torch.manual_seed(0)
    module = Pair(9, 7, 3)
    with torch.no_grad():
        module.lora_B.copy_(torch.randn(9, 3))
    before, lefts, rights = (
        module.product().detach(),
        module.lora_B.detach().clone(),
        module.lora_A.detach().clone(),
    )
    descend(LowRankAdam(module, lr=1e-6), module, target(), 1)
    change = (module.product().detach() - before) / 1e-6
    outside_left = torch.eye(9) - lefts @ torch.linalg.pinv(lefts)
    outside_right = torch.eye(7) - torch.linalg.pinv(rights) @ rights
    assert float((outside_left @ change @ outside_right).abs().max()) < 1e-4
    assert float(change.abs().max()) > 0.3


def test_dead_rank_comes_back():
    module = Pair(9, 7, 3)
    goal = target(condition=2.0)
    optimizer = LowRankAdam(module)
    descend(optimizer, module, goal[:, :1] @ goal[:1], 5, rate=0.05)
    assert descend(optimizer, module, goal, 80, rate=0.1)[-1] < 1e-4


def test_zero_gradients_change_nothing_and_give_no_nan():
    module = Pair(9, 7, 3)
    optimizer = LowRankAdam(module, lr=0.1)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(module.product(), torch.zeros(9, 7, dtype=torch.float64))
    assert all(p.isfinite().all() for p in module.parameters())


def test_rank_and_shape_extremes():
    for out, inside, rank in ((1, 1, 1), (3, 2, 2), (2, 3, 2), (5, 1, 1)):
        module = Pair(out, inside, rank)
        goal = torch.ones(out, inside, dtype=torch.float64)
        assert descend(LowRankAdam(module), module, goal, 100, rate=0.2)[-1] < 1e-3


def test_foreach_gives_what_one_by_one_gives():
    ends = []
    for foreach in (True, False):
        module = nn.ModuleList([Pair(9, 7, 3, seed=i) for i in range(3)] + [Pair(5, 7, 2)])
        optimizer = LowRankAdam(module, lr=0.01, foreach=foreach)
        for _ in range(10):
            optimizer.zero_grad()
            sum(
                ((p.product() - target(*p.product().shape, rank=2, seed=i)) ** 2).sum()
                for i, p in enumerate(module)
            ).backward()
            optimizer.step()
        ends.append([p.product().detach() for p in module])
    for a, b in zip(*ends, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_state_goes_on_to_the_bit_through_a_file_also_in_half_precision():
    for dtype in (torch.float32, torch.bfloat16):
        one, goal = Pair(9, 7, 3, dtype=dtype), target().to(torch.float32)
        optimizer = LowRankAdam(one, lr=0.01)
        descend(optimizer, one, goal, 4)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(one)
        again = LowRankAdam(other, lr=0.5)
        again.load_state_dict(torch.load(file, weights_only=True))
        for module, best in ((one, optimizer), (other, again)):
            descend(best, module, goal, 4)
        assert torch.equal(one.lora_A, other.lora_A) and torch.equal(one.lora_B, other.lora_B)


def test_half_precision_keeps_what_is_too_small_to_see():
    goal = target().float()
    half, full = Pair(9, 7, 3, dtype=torch.bfloat16), Pair(9, 7, 3, dtype=torch.float32)
    for module in (half, full):
        with torch.no_grad():
            module.lora_A.copy_(half.lora_A)
        descend(LowRankAdam(module), module, goal, 50, rate=0.05)
    assert half.lora_A.dtype == torch.bfloat16
    assert float((half.product().detach().float() - goal).norm()) < 0.1 * float(goal.norm())


def test_clipping_bounds_the_gradient_of_w():
    module = Pair(9, 7, 3)
    optimizer = LowRankAdam(module, lr=0.01, max_norm=1e-3, betas=(0.0, 0.0))
    with torch.no_grad():
        module.lora_B.copy_(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)))
    descend(optimizer, module, target(), 1)
    x = optimizer.state[module.lora_B]["exp_avg"]
    y = optimizer.state[module.lora_A]["exp_avg"]
    u = optimizer.state[module.lora_B]["frame"]
    size = x.square().sum() + y.square().sum() - (u.mT @ x).square().sum()
    assert float(size.sqrt()) == pytest.approx(1e-3, rel=1e-6)


def test_weight_decay_shrinks_w():
    module = Pair(9, 7, 3)
    with torch.no_grad():
        module.lora_B.copy_(torch.ones(9, 3).cumsum(0))
    before = module.product().detach()
    optimizer = LowRankAdam(module, lr=0.1, weight_decay=0.5)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(module.product(), 0.95 * before, atol=1e-9)


def test_bad_gradients_raise_with_the_pair_named_and_change_nothing():
    module = nn.ModuleDict({"layer": Pair(9, 7, 3)})
    optimizer = LowRankAdam(module)
    module["layer"].product().sum().backward()
    module["layer"].lora_B.grad[0, 0] = torch.nan
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(manifolds.ManifoldError, match=r"layer\.B is not finite"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"betas": (1.0, 0.9)},
        {"amsgrad": True},
        {"stabilize": 3},
        {"fused": True},
    ],
)
def test_options_that_mean_nothing_raise(options):
    if "amsgrad" in options:
        optimizer = LowRankAdam(Pair(9, 7, 3))
        with pytest.raises(manifolds.ManifoldError, match="amsgrad"):
            optimizer._check_options({**optimizer.param_groups[0], "amsgrad": True})
        return
    with pytest.raises(manifolds.ManifoldError):
        LowRankAdam(Pair(9, 7, 3), **options)


# PEFT models


def lora(model, **options):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"], "fan_in_fan_out": True, **options}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def run(model, optimizer, steps=4):
    ids = torch.arange(12).reshape(2, 6) + 3
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def covered(model, optimizer):
    """Every trainable parameter is in exactly one group."""
    ours = [id(p) for group in optimizer.param_groups for p in group["params"]]
    return sorted(ours) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_peft_model_is_trained_and_saves_as_before(tiny_gpt2, tmp_path):
    model = lora(tiny_gpt2)
    optimizer = LowRankAdam(model, lr=1e-2)
    assert len(lora_pairs(model)) == 3 and covered(model, optimizer) and len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0]["scalings"] == (2.0, 2.0, 2.0)
    losses = run(model, optimizer, 8)
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)


def test_everything_else_that_trains_is_moved_by_adamw(tiny_gpt2):
    model = lora(tiny_gpt2, use_dora=True, modules_to_save=["ln_f"], bias="lora_only")
    optimizer = LowRankAdam(model, lr=1e-2)
    assert covered(model, optimizer) and len(optimizer.param_groups) == 2
    others = optimizer.param_groups[1]["params"]
    names = [n for n, p in model.named_parameters() if any(p is q for q in others)]
    assert any("magnitude" in n for n in names) and any("ln_f" in n for n in names)
    twins = [nn.Parameter(p.detach().clone()) for p in others]
    peer = torch.optim.AdamW(twins, lr=1e-3, weight_decay=0.0, betas=(0.9, 0.999))
    for _ in range(3):
        run(model, optimizer, 1)
        for p, q in zip(others, twins, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        peer.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(others, twins, strict=True))


def test_embeddings_and_convolutions_are_pairs(tiny_gpt2):
    model = lora(tiny_gpt2, target_modules=["wte", "c_attn"])
    pairs = lora_pairs(model)
    assert len(pairs) == 4 and {p.left.shape[1] for p in pairs} == {4}
    optimizer = LowRankAdam(model, lr=1e-2)
    losses = run(model, optimizer, 6)
    assert losses[-1] < losses[0] and covered(model, optimizer)

    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x):
            return self.conv(x)

    convolution = peft.get_peft_model(Convolution(), peft.LoraConfig(r=2, target_modules=["conv"]))
    (pair,) = lora_pairs(convolution)
    assert pair.right.shape == (2, 3, 3, 3)
    optimizer = LowRankAdam(convolution, lr=1e-2)
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (convolution(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] and pair.left.shape == (5, 2, 1, 1)


@pytest.mark.parametrize(
    ("options", "scaling"), [({"use_rslora": True}, 4.0), ({"use_dora": True}, 2.0), ({}, 2.0)]
)
def test_the_scaling_that_the_layer_uses_is_the_one_of_w(tiny_gpt2, options, scaling):
    """The change of what a fresh adapter computes, after one step, is that of scaling · B A."""
    model = lora(tiny_gpt2, **options)
    optimizer = LowRankAdam(model, lr=1e-2)
    assert optimizer.param_groups[0]["scalings"] == (scaling,) * 3
    run(model, optimizer, 1)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    pair = lora_pairs(model)[0]
    assert torch.allclose(layer.get_delta_weight("default").mT, scaling * pair.left @ pair.right, atol=1e-6)
    rank, (out, inside) = 4, (pair.left.shape[0], pair.right.shape[1])
    length = 1e-2 * ((out + inside - rank) * rank) ** 0.5
    assert float((scaling * pair.left @ pair.right).norm()) == pytest.approx(length, rel=1e-3)


def test_adapters_by_name_and_frozen_ones(tiny_gpt2):
    model = lora(tiny_gpt2)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    assert len(lora_pairs(model)) == 3
    model.set_adapter("second")
    assert {p.left.shape[1] for p in lora_pairs(model)} == {2}
    assert not lora_pairs(model, "default")
    with pytest.raises(manifolds.ManifoldError, match="'default'"):
        LowRankAdam(model, adapter="default")
    factor = lora_pairs(model)[0].right
    factor.requires_grad_(False)
    optimizer = LowRankAdam(model)
    assert len(optimizer.param_groups[1]["params"]) == 1 and covered(model, optimizer)


def test_no_pairs_say_what_was_looked_for(tiny_gpt2):
    with pytest.raises(manifolds.ManifoldError, match=r"lora_A and lora_B.*\(r, in\)"):
        LowRankAdam(tiny_gpt2)
