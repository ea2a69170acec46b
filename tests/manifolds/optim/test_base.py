"""What all the optimizers share: the torch interface, the checks, stacking, saving to the bit."""

import copy
import io
import pickle

import geoopt
import pytest
import torch
from torch import Tensor

import manifolds
from manifolds.optim import RiemannianAdam, RiemannianMuon, RiemannianSGD, clip_grad_norm_

KINDS = {
    "adam": lambda p, **o: RiemannianAdam(p, **{"lr": 0.05, "weight_decay": 0.1, "amsgrad": True, **o}),
    "sgd": lambda p, **o: RiemannianSGD(p, **{"lr": 0.05, "momentum": 0.9, "nesterov": True, **o}),
    "muon": lambda p, **o: RiemannianMuon(p, **{"lr": 0.05, **o}),
}


@pytest.fixture(params=list(KINDS))
def make(request):
    return KINDS[request.param]


def stiefel_parameters(count=3, dtype=torch.float32, device="cpu", seed=0):
    """Points of equal shape on one Stiefel manifold of geoopt, one larger, and a plain matrix."""
    generator = torch.Generator().manual_seed(seed)

    def point(*shape):
        q = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))[0]
        return geoopt.ManifoldParameter(q.to(device, dtype), manifold=geoopt.EuclideanStiefel())

    flat = torch.randn(4, 5, generator=generator, dtype=torch.float64).to(device, dtype)
    return [*(point(6, 3) for _ in range(count)), point(2, 7, 2), torch.nn.Parameter(flat)]


def loss_of(parameters, seed=1) -> Tensor:
    """A smooth loss with a different target for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    for p in parameters:
        target = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        total = total + ((p.double() - target) ** 2 * (1 + target.abs())).sum()
    return total


def run(optimizer, parameters, steps, seed=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(parameters, seed).backward()
        optimizer.step()


def bits(parameters):
    return [p.detach().clone().as_subclass(Tensor) for p in parameters]


def same_bits(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_loss_falls_and_points_stay_on_the_manifold(make, device):
    parameters = stiefel_parameters(device=device)
    before = float(loss_of(parameters))
    run(make(parameters), parameters, 60)
    assert float(loss_of(parameters)) < before - 1
    for p in parameters[:-1]:
        gram = p.detach().mT @ p.detach()
        assert torch.allclose(gram, torch.eye(gram.shape[-1], device=device).expand_as(gram), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_foreach_gives_what_one_by_one_gives(make, dtype, device):
    results = []
    for foreach in (True, False, None):
        parameters = stiefel_parameters(dtype=dtype, device=device)
        run(make(parameters, foreach=foreach), parameters, 20)
        results.append(bits(parameters))
    for a, b, c in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=2e-4 if dtype == torch.float32 else 1e-10, rtol=0)
        assert torch.equal(a, c)


def test_foreach_stacks_equal_parameters_of_separate_but_equal_manifolds():
    parameters = stiefel_parameters(count=4)
    assert len({id(p.manifold) for p in parameters[:4]}) == 4
    optimizer = RiemannianAdam(parameters)
    loss_of(parameters).backward()
    entries = list(optimizer._entries(optimizer.param_groups[0], 0))
    assert sorted(len(batch) for batch in optimizer._batches(entries)) == [1, 1, 4]


def test_foreach_keeps_apart_manifolds_of_other_curvature():
    balls = [geoopt.PoincareBall(c=1.0), geoopt.PoincareBall(c=2.0)]
    parameters = [geoopt.ManifoldParameter(torch.full((3,), 0.1), manifold=ball) for ball in balls]
    optimizer = RiemannianAdam(parameters)
    sum(p.sum() for p in parameters).backward()
    entries = list(optimizer._entries(optimizer.param_groups[0], 0))
    assert [len(batch) for batch in optimizer._batches(entries)] == [1, 1]


@pytest.mark.parametrize("through_file", [False, True])
def test_state_goes_on_to_the_bit(make, through_file, device):
    first = stiefel_parameters(device=device)
    optimizer = make(first)
    run(optimizer, first, 7)
    saved, points = copy.deepcopy(optimizer.state_dict()), bits(first)
    if through_file:
        file = io.BytesIO()
        torch.save(saved, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
    run(optimizer, first, 5)
    second = stiefel_parameters(device=device, seed=9)
    with torch.no_grad():
        for p, value in zip(second, points, strict=True):
            p.copy_(value)
    again = make(second, lr=0.7)
    again.load_state_dict(saved)
    run(again, second, 5)
    assert same_bits(bits(first), bits(second))


def test_half_precision_keeps_states_in_float32_through_loading():
    parameters = stiefel_parameters(dtype=torch.bfloat16)
    optimizer = RiemannianAdam(parameters, lr=0.05)
    run(optimizer, parameters, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0]["exp_avg"].dtype == torch.float32
    other = stiefel_parameters(dtype=torch.bfloat16, seed=4)
    again = RiemannianAdam(other)
    again.load_state_dict(saved)
    for index in saved["state"]:
        state = again.state[other[index]]
        for name, value in saved["state"][index].items():
            if isinstance(value, Tensor):
                assert state[name].dtype == value.dtype and torch.equal(state[name], value)


def test_deepcopy_and_pickle_go_on_to_the_bit(make):
    parameters = stiefel_parameters()
    optimizer = make(parameters)
    run(optimizer, parameters, 4)
    twins, twin = copy.deepcopy((parameters, optimizer))
    sown, thawed = pickle.loads(pickle.dumps((parameters, optimizer)))
    for points, one in ((parameters, optimizer), (twins, twin), (sown, thawed)):
        run(one, points, 4)
    assert same_bits(bits(parameters), bits(twins))
    assert same_bits(bits(parameters), bits(sown))


def test_maximize_climbs_as_descent_of_the_negative(make):
    up, down = stiefel_parameters(), stiefel_parameters()
    climber, faller = make(up, maximize=True, weight_decay=0.0), make(down, weight_decay=0.0)
    for _ in range(5):
        for sign, parameters, optimizer in ((1, up, climber), (-1, down, faller)):
            optimizer.zero_grad()
            (sign * loss_of(parameters)).backward()
            optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(bits(up), bits(down), strict=True))


def test_closure_is_called_with_gradients_and_its_loss_returned(make):
    parameters = stiefel_parameters()
    optimizer = make(parameters)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(parameters)
        loss.backward()
        return loss

    before = bits(parameters)
    with torch.no_grad():
        loss = optimizer.step(closure)
    assert float(loss) == float(loss_of([torch.nn.Parameter(b) for b in before]))
    assert not same_bits(before, bits(parameters))
    with pytest.raises(manifolds.ManifoldError, match=r"shape \(2,\)"):
        optimizer.step(lambda: torch.ones(2))


def test_parameters_without_gradient_are_left_alone(make):
    parameters = stiefel_parameters()
    optimizer = make(parameters)
    before = bits(parameters)
    optimizer.step()
    assert same_bits(before, bits(parameters)) and not optimizer.state
    loss_of(parameters[:1]).backward()
    optimizer.step()
    assert same_bits(before[1:], bits(parameters)[1:])
    assert not torch.equal(before[0], bits(parameters)[0])


def test_a_late_gradient_starts_at_its_own_first_step():
    early, late = stiefel_parameters(count=2)[:2]
    alone = copy.deepcopy(late)
    both = RiemannianAdam([early, late], lr=0.05)
    run(both, [early], 4)
    run(both, [early, late][1:], 3, seed=5)
    run(RiemannianAdam([alone], lr=0.05), [alone], 3, seed=5)
    assert torch.allclose(bits([late])[0], bits([alone])[0], atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(make, value):
    parameters = stiefel_parameters()
    optimizer = make([("first", parameters[0]), *((f"p{i}", p) for i, p in enumerate(parameters[1:]))])
    run(optimizer, parameters, 2)
    loss_of(parameters).backward()
    parameters[2].grad[1, 1] = value
    before, states = bits(parameters), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(manifolds.ManifoldError, match="p1 is not finite"):
        optimizer.step()
    assert same_bits(before, bits(parameters))
    after = optimizer.state_dict()
    for index, state in states["state"].items():
        for name, kept in state.items():
            now = after["state"][index][name]
            assert torch.equal(kept, now) if isinstance(kept, Tensor) else kept == now


def test_skip_leaves_out_the_group_and_takes_the_others(make, caplog):
    parameters = stiefel_parameters()
    optimizer = make([{"params": parameters[:2]}, {"params": parameters[2:]}], nonfinite="skip")
    loss_of(parameters).backward()
    parameters[0].grad[0, 0] = torch.nan
    before = bits(parameters)
    optimizer.step()
    after = bits(parameters)
    assert same_bits(before[:2], after[:2]) and "left out" in caplog.text
    assert not any(torch.equal(a, b) for a, b in zip(before[2:], after[2:], strict=True))


def test_huge_finite_gradients_are_no_defect():
    p = geoopt.ManifoldParameter(torch.tensor([1.0, 0.0]), manifold=manifolds.Sphere())
    optimizer = RiemannianSGD([p], lr=1e-30)
    p.grad = torch.tensor([0.0, 3e30])
    optimizer.step()
    assert p.isfinite().all()


def test_sparse_gradients_are_refused(make):
    p = torch.nn.Parameter(torch.ones(4, 3))
    p.grad = torch.sparse_coo_tensor([[1], [2]], [1.0], (4, 3))
    with pytest.raises(manifolds.ManifoldError, match="sparse"):
        make([p]).step()


def test_complex_and_integer_parameters_are_refused(make):
    with pytest.raises(manifolds.ManifoldError, match="complex64"):
        make([torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])


@pytest.mark.parametrize("bad", [2 * torch.eye(3), torch.full((3, 3), torch.nan)])
def test_a_parameter_off_its_manifold_is_refused_with_the_mend(make, bad):
    p = geoopt.ManifoldParameter(torch.eye(3), manifold=geoopt.EuclideanStiefel())
    with torch.no_grad():
        p.copy_(bad)
    with pytest.raises(manifolds.ManifoldError, match="proj_"):
        make([p])


@pytest.mark.parametrize(
    "options, word",
    [
        ({"lr": -1.0}, "lr"), ({"lr": float("nan")}, "lr"), ({"stabilize": 0}, "stabilize"),
        ({"max_norm": 0.0}, "max_norm"), ({"nonfinite": "ignore"}, "nonfinite"), ({"fused": True}, "fused"),
        ({"capturable": True}, "capturable"), ({"differentiable": True}, "differentiable"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)  # fmt: skip
def test_options_out_of_range_and_impossible_flags_raise(make, options, word):
    with pytest.raises(manifolds.ManifoldError, match=word):
        make(stiefel_parameters(), **options)
    optimizer = make(stiefel_parameters())
    with pytest.raises(manifolds.ManifoldError, match=word):
        optimizer.add_param_group({"params": stiefel_parameters(), **options})
    assert len(optimizer.param_groups) == 1


def test_add_param_group_has_options_of_its_own(make):
    parameters = stiefel_parameters()
    optimizer = make(parameters[:2])
    optimizer.add_param_group({"params": parameters[2:], "lr": 0.0, "weight_decay": 0.0})
    before = bits(parameters)
    run(optimizer, parameters, 2)
    after = bits(parameters)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before[2:], after[2:], strict=True))
    assert not torch.allclose(before[0], after[0], atol=1e-3)


def test_schedulers_change_the_rate_and_the_momentum(make):
    parameters = stiefel_parameters()
    optimizer = make(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    seen = []
    for _ in range(10):
        run(optimizer, parameters, 1)
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group.get("momentum", group.get("betas", (0,))[0])))
        if len(seen) < 10:
            schedule.step()
    assert len({lr for lr, _ in seen}) == 10 and max(lr for lr, _ in seen) == pytest.approx(0.1)
    assert min(m for _, m in seen) == pytest.approx(0.85)


def test_stabilize_mends_what_has_drifted(make):
    p = stiefel_parameters(count=1)[0]
    optimizer = make([p], stabilize=2)
    run(optimizer, [p], 1)
    with torch.no_grad():
        p.mul_(1 + 1e-3)
    run(optimizer, [p], 1)
    gram = p.detach().mT @ p.detach()
    assert torch.allclose(gram, torch.eye(3), atol=1e-5)
    state = optimizer.state[p]
    moment = state[optimizer.tangents[0]]
    inside = p.detach().mT @ moment
    assert torch.allclose(inside, -inside.mT, atol=1e-5)


def test_clipping_a_group_is_clipping_its_gradients_first(make):
    a, b = stiefel_parameters(), stiefel_parameters()
    loss_of(a).backward()
    loss_of(b).backward()
    before = [p.grad.clone() for p in a]
    make(a, max_norm=0.5).step()
    assert same_bits(before, [p.grad for p in a])
    clip_grad_norm_(b, 0.5)
    make(b).step()
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(bits(a), bits(b), strict=True))
