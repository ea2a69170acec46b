"""LoRA layers in training: each row at its own scale, off without a trace, read out as peft merges them."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.training.adapters import ADAPTER, Adapters, adapter_off, checkpointing, row_scales
from geoedit.sliders.training.targets import target_paths


def begun(model: nn.Module, targets: str = "full", seed: int = 0, **options: Any) -> Adapters:
    generator = torch.Generator().manual_seed(seed)
    adapters = Adapters(
        {"unet": model}, {"unet": target_paths(model, targets)}, generator=generator, **options
    )
    for up, _ in adapters.pairs():
        up.data.copy_(0.1 * torch.randn(up.shape, generator=generator))
    return adapters


@pytest.fixture
def unet(fresh_pipe: Callable[..., Any], device: torch.device) -> Iterator[Any]:
    yield fresh_pipe("sd1").unet.to(device)


@pytest.fixture
def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, words = (torch.randn(*size, generator=generator) for size in ((3, 4, 8, 8), (3, 20, 16)))
    return latents.to(device), torch.tensor([1, 500, 900], device=device), words.to(device)


def test_each_row_has_its_own_scale(unet: Any, inputs: Any) -> None:
    latents, times, words = inputs
    with torch.no_grad(), begun(unet) as adapters:
        with row_scales(unet, torch.tensor([1.0, -0.5, 0.0], device=latents.device)):
            together = unet(*inputs).sample
        before = {layer.scaling[ADAPTER] for layer in adapters.layers["unet"].values()}
        assert before == {1.0}
        for row, scale in enumerate([1.0, -0.5, 0.0]):  # peft's own scaling says what a scale is
            for layer in adapters.layers["unet"].values():
                layer.scaling[ADAPTER] = scale
            alone = unet(latents[row : row + 1], times[row], words[row : row + 1]).sample
            torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_halves_of_guidance_take_the_scales_again(unet: Any, inputs: Any) -> None:
    scales = torch.tensor([1.0, -0.5, 0.2], device=inputs[0].device)
    doubled = [torch.cat([part, part]) for part in inputs]
    with torch.no_grad(), begun(unet), row_scales(unet, scales):
        one, two = unet(*doubled).sample.chunk(2)
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, unet(*inputs).sample, rtol=1e-4, atol=1e-5)


def test_off_is_the_base_and_removed_is_the_base_to_the_bit(unet: Any, inputs: Any) -> None:
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    next(unet.parameters()).requires_grad_(True)
    wanted = [parameter.requires_grad for parameter in unet.parameters()]
    with torch.no_grad():
        base = unet(*inputs).sample
    randomness = torch.random.get_rng_state()
    with begun(unet):
        assert torch.equal(torch.random.get_rng_state(), randomness)
        with torch.no_grad():
            assert not torch.equal(unet(*inputs).sample, base)
            with adapter_off(unet):
                assert torch.equal(unet(*inputs).sample, base)
            assert not torch.equal(unet(*inputs).sample, base)
    assert not hasattr(unet, "peft_config")
    after = unet.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert [parameter.requires_grad for parameter in unet.parameters()] == wanted


def test_only_the_factors_learn_and_in_float32(unet: Any) -> None:
    with begun(unet.bfloat16()) as adapters:
        learning = {id(p) for p in unet.parameters() if p.requires_grad}
        assert learning == {id(p) for p in adapters.parameters()}
        assert {p.dtype for p in adapters.parameters()} == {torch.float32}
    unet.float()


def test_changes_are_what_peft_would_merge(unet: Any) -> None:
    with begun(
        unet, rank=2, alpha=3, rank_pattern={r".*attn2\.to_k": 5}, alpha_pattern={r".*attn2\.to_k": 1}
    ) as adapters:
        changes = adapters.changes()["unet"]
        for path, layer in adapters.layers["unet"].items():
            merged = layer.get_delta_weight(ADAPTER)
            found = changes[path].matrix.dense().reshape(merged.shape)
            torch.testing.assert_close(found, merged.detach(), rtol=1e-5, atol=1e-7)
            assert changes[path].kernel == tuple(merged.shape[2:])
            assert changes[path].matrix.rank == (5 if path.endswith("attn2.to_k") else 2)
        before = next(iter(changes.values())).matrix.dense().clone()
        adapters.parameters()[0].data.zero_()
        assert torch.equal(next(iter(changes.values())).matrix.dense(), before)


def test_training_starts_at_the_base_and_from_the_seed(unet: Any, inputs: Any) -> None:
    targets = {"unet": target_paths(unet, "attn")}
    drawn = []
    for seed in (0, 0, 1):
        with Adapters({"unet": unet}, targets, generator=torch.Generator().manual_seed(seed)) as adapters:
            drawn.append(adapters.state())
            with torch.no_grad():
                here = unet(*inputs).sample
                with adapter_off(unet):
                    assert torch.equal(here, unet(*inputs).sample)
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    assert any(not torch.equal(drawn[0][name], drawn[2][name]) for name in drawn[0])


def test_gradient_checkpointing_sees_the_scales_of_its_own_pass(unet: Any, inputs: Any) -> None:
    scales = torch.tensor([1.0, -2.0, 0.5], device=inputs[0].device)

    def gradients() -> list[Tensor]:
        with row_scales(unet, scales):
            loss = unet(*inputs).sample.square().sum()
        return list(torch.autograd.grad(loss, adapters.parameters()))

    with begun(unet, "attn") as adapters:
        plain = gradients()
        with checkpointing(unet):
            assert unet.is_gradient_checkpointing
            kept = gradients()
        assert not unet.is_gradient_checkpointing
    for ours, theirs in zip(kept, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_refusals(unet: Any, inputs: Any) -> None:
    with pytest.raises(EditError, match="no layers"), row_scales(unet, torch.ones(1)):
        pass
    with pytest.raises(EditError, match="rank 0"):
        begun(unet, rank=0)
    with begun(unet, "attn") as adapters:
        with pytest.raises(EditError, match="carries adapters already"):
            begun(unet)
        scales = torch.ones(2, device=inputs[0].device)
        with pytest.raises(EditError, match="2 scales"), row_scales(unet, scales):
            unet(*inputs)
        with pytest.raises(EditError, match="missing"):
            adapters.load_state({})
    with pytest.raises(EditError, match="no gradient checkpointing"), checkpointing(nn.Linear(2, 2)):
        pass


def test_targets_are_found_by_structure(tiny_sd1: Any, tiny_sd3: Any, tiny_flux: Any) -> None:
    unet = tiny_sd1.unet
    layers = {
        name for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)) and name
    }
    words = {name for name in layers if ".attn2." in name}
    pixels = {name for name in layers if ".attn1." in name}
    convolutions = {name for name in layers if isinstance(unet.get_submodule(name), nn.Conv2d)}
    assert words
    assert set(target_paths(unet, "full")) == layers
    assert set(target_paths(unet, "attn")) == words | pixels
    assert set(target_paths(unet, "cross-attn")) == words
    assert set(target_paths(unet, "self-attn")) == pixels
    assert set(target_paths(unet, "no-cross-attn")) == layers - words
    assert set(target_paths(unet, ["conv", "cross-attn"])) == convolutions | words
    some = sorted(pixels)[0]
    assert target_paths(unet, [some]) == [some]
    for pipe in (tiny_sd3, tiny_flux):
        found = target_paths(pipe.transformer, "cross-attn")
        assert found
        assert all("add_" in name for name in found)


def test_targets_that_are_not_there(tiny_sd1: Any, tiny_unconditional: Any) -> None:
    with pytest.raises(EditError, match="'everything' is no layer"):
        target_paths(tiny_sd1.unet, "everything")
    with pytest.raises(EditError, match="no layers that are 'cross-attn'"):
        target_paths(tiny_unconditional.unet, "cross-attn")
