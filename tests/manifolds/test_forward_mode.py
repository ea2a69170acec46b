"""Second derivatives through norm layers, where torch's own forward rules are wrong: against differences."""

import pytest
import torch
from torch import nn
from torch.func import jvp

from manifolds import ManifoldError, Pullback
from manifolds.forward_mode import WrittenOut

NORMS = {
    "layer norm": nn.LayerNorm((3, 4)),
    "layer norm without weights": nn.LayerNorm(4, elementwise_affine=False),
    "instance norm": nn.InstanceNorm1d(3, affine=True),
    "instance norm with statistics": nn.InstanceNorm1d(3, track_running_stats=True).eval(),
    "group norm": nn.GroupNorm(3, 3),
    "batch norm": nn.BatchNorm1d(3).eval(),
}


@pytest.mark.parametrize("name", NORMS)
def test_values_and_second_derivatives(name, device):
    norm = NORMS[name].double().to(device)
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 3, 4, dtype=torch.float64, generator=generator).to(device) for _ in range(2))

    def run(point):
        with WrittenOut():
            return norm(point**2)

    torch.testing.assert_close(run(x), norm(x**2))
    found = jvp(lambda point: jvp(run, (point,), (v,))[1], (x,), (v,))[1]
    step = 1e-4
    expected = (norm((x + step * v) ** 2) - 2 * norm(x**2) + norm((x - step * v) ** 2)) / step**2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_in_training_mode_is_refused():
    with pytest.raises(ManifoldError, match="training mode"), WrittenOut():
        nn.BatchNorm1d(3)(torch.randn(2, 3))


def test_the_curvature_of_a_network_with_a_layer_norm(device):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 6)).double().to(device)
    x, v = torch.randn(2, 3, dtype=torch.float64).to(device)
    step = 1e-4
    bend = (net(x + step * v) - 2 * net(x) + net(x - step * v)) / step**2
    jacobian = torch.autograd.functional.jacobian(net, x)
    along = torch.linalg.lstsq(jacobian, bend[:, None]).solution[:, 0]
    normal = bend - jacobian @ along
    pullback = Pullback(net)
    expected = normal.norm() / (jacobian @ v).norm() ** 2
    torch.testing.assert_close(pullback.curvature(x, v).detach(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pullback.christoffel(x, v, v).detach(), along.detach(), rtol=1e-5, atol=1e-5)
