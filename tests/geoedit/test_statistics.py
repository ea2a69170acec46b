"""Streamed means and covariances against numpy in float64."""

import numpy as np
import pytest
import torch

from geoedit.activations import Moments, Statistics, collect, statistics
from geoedit.concept import Concept, Template
from geoedit.errors import EditError
from geoedit.site import Site

CONCEPT = Concept(
    "months",
    ["may", "june", "july"],
    [Template(text) for text in ("the {value} is", "in {value}", "a day in {value} of the month", "{value}")],
)
SITES = [Site(0), Site(1, "mlp_hidden", "value"), Site(2, token="all")]


def test_moments_are_those_of_numpy(tiny_model, tiny_tokenizer, device) -> None:
    model = tiny_model.to(device)
    prompts = CONCEPT.prompts()
    found = statistics(model, tiny_tokenizer, prompts, SITES, covariance=True, batch_size=5)
    states = collect(model, tiny_tokenizer, prompts, SITES)
    labels = np.array([prompt.value for prompt in prompts])
    assert found.labels == ("may", "june", "july")
    for site in SITES:
        rows, owners = states[site].double().numpy(), states.rows(site).numpy()
        for label in (None, *found.labels):
            chosen = rows if label is None else rows[labels[owners] == label]
            assert found.count(site, label) == len(chosen)
            np.testing.assert_allclose(found.mean(site, label), chosen.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(found.covariance(site, label), np.cov(chosen.T), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                found.variance(site, label), chosen.var(0, ddof=1), rtol=1e-5, atol=1e-6
            )
        within = sum((found.count(site, v) - 1) * np.cov(rows[labels[owners] == v].T) for v in found.labels)
        np.testing.assert_allclose(found.within(site), within / (len(rows) - 3), rtol=1e-5, atol=1e-6)
        assert found.means(site).shape == (3, rows.shape[1])
        assert found.mean(site).dtype == torch.float64


def test_moments_in_float64_are_exact_to_rounding(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model.double()
    rows = collect(model, tiny_tokenizer, CONCEPT.prompts(), SITES[:1])[SITES[0]].numpy()
    found = statistics(model, tiny_tokenizer, CONCEPT.prompts(), SITES[:1], covariance=True, batch_size=1)
    np.testing.assert_allclose(found.mean(SITES[0]), rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(SITES[0]), np.cov(rows.T), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("full", [True, False])
def test_the_merge_keeps_its_digits_far_from_zero(full: bool, device: torch.device) -> None:
    """Sums of squares around zero would lose them: 1e9 squared leaves no digit for a spread of 1e-2."""
    generator = torch.Generator().manual_seed(0)
    rows = 1e9 + 1e-2 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    parts = [Moments.of(part.to(device), full=full) for part in rows.split(7)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    exact = rows - 1e9
    wanted = np.cov(exact.numpy().T) if full else exact.numpy().var(0, ddof=1)
    assert merged.count == 1000
    np.testing.assert_allclose(merged.scatter.cpu() / 999, wanted, rtol=1e-4, atol=1e-9)
    naive = (rows.square().sum(0) - rows.sum(0).square() / 1000) / 999
    assert (naive - exact.var(0)).abs().max() > 1e-2


def test_moments_of_different_widths_do_not_merge() -> None:
    one, two = Moments.of(torch.ones(2, 3), full=False), Moments.of(torch.ones(2, 4), full=False)
    with pytest.raises(EditError, match=r"width 3 and 4"):
        one + two
    with pytest.raises(EditError, match=r"do not merge"):
        one + Moments.of(torch.ones(2, 3), full=True)


def test_statistics_of_two_halves_add_up(tiny_model, tiny_tokenizer) -> None:
    prompts = CONCEPT.prompts()
    halves = [
        statistics(tiny_model, tiny_tokenizer, part, SITES, covariance=True)
        for part in (prompts[:5], prompts[5:])
    ]
    whole = statistics(tiny_model, tiny_tokenizer, prompts, SITES, covariance=True)
    both = halves[0] + halves[1]
    for site in SITES:
        for label in (None, "may", "june", "july"):
            assert both.count(site, label) == whole.count(site, label)
            torch.testing.assert_close(both.mean(site, label), whole.mean(site, label), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(
                both.covariance(site, label), whole.covariance(site, label), rtol=1e-5, atol=1e-6
            )
    other = statistics(tiny_model, tiny_tokenizer, prompts, SITES[:1])
    with pytest.raises(EditError, match=r"different sites"):
        whole + other


def test_statistics_of_two_models_do_not_add_up(tiny_gpt2, tiny_llama, tiny_tokenizer) -> None:
    one, two = (statistics(model, tiny_tokenizer, ["may"], [Site(0)]) for model in (tiny_gpt2, tiny_llama))
    with pytest.raises(EditError, match=r"two models"):
        one + two


def test_all_sites_share_one_pass_and_no_state_is_kept(tiny_model, tiny_tokenizer) -> None:
    calls = []
    tiny_model.register_forward_pre_hook(lambda *_: calls.append(1))
    statistics(tiny_model, tiny_tokenizer, CONCEPT.prompts(), [Site(0)], batch_size=4)
    first = len(calls)
    found = statistics(tiny_model, tiny_tokenizer, CONCEPT.prompts(), SITES, batch_size=4)
    assert len(calls) - first == 3
    kept = [part for by_label in found.moments.values() for part in by_label.values()]
    assert all(part.mean.shape == part.scatter.shape for part in kept)


def test_labels_of_ones_own(tiny_model, tiny_tokenizer) -> None:
    prompts = ["may", "june", "the day", "a month"]
    found = statistics(tiny_model, tiny_tokenizer, prompts, [Site(0)], labels=["x", "y", "x", "y"])
    rows = collect(tiny_model, tiny_tokenizer, prompts, [Site(0)])[Site(0)].double()
    assert found.labels == ("x", "y")
    torch.testing.assert_close(found.mean(Site(0), "x"), rows[[0, 2]].mean(0), rtol=1e-5, atol=1e-6)
    assert statistics(tiny_model, tiny_tokenizer, prompts, [Site(0)]).labels == ("all",)


def test_half_precision_states_are_summed_in_float64(tiny_model, tiny_tokenizer) -> None:
    model = tiny_model.bfloat16()
    prompts = CONCEPT.prompts()
    found = statistics(model, tiny_tokenizer, prompts, [Site(1)], batch_size=3)
    rows = collect(model, tiny_tokenizer, prompts, [Site(1)], batch_size=3)[Site(1)]
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(found.mean(Site(1)), rows.double().mean(0), rtol=1e-12, atol=1e-14)


def test_errors_name_what_is_missing(tiny_model, tiny_tokenizer) -> None:
    found = statistics(tiny_model, tiny_tokenizer, ["may", "june"], [Site(0)], labels=["x", "y"])
    assert isinstance(found, Statistics)
    with pytest.raises(EditError, match=r"one row at block 0 .* 'x'"):
        found.variance(Site(0), "x")
    with pytest.raises(EditError, match=r"covariance=True"):
        found.covariance(Site(0))
    with pytest.raises(EditError, match=r"label 'z'; there are: x, y"):
        found.mean(Site(0), "z")
    with pytest.raises(EditError, match=r"block 1 .* was not read"):
        found.mean(Site(1))
    with pytest.raises(EditError, match=r"1 labels for 2 prompts"):
        statistics(tiny_model, tiny_tokenizer, ["may", "june"], [Site(0)], labels=["x"])
    full = statistics(
        tiny_model, tiny_tokenizer, ["may", "june"], [Site(0)], labels=["x", "y"], covariance=True
    )
    with pytest.raises(EditError, match=r"every label has one row"):
        full.within(Site(0))
