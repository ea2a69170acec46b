"""The parts of a trace against brute force, scipy, autograd and the models' own modules."""

import itertools

import pytest
import scipy.stats
import torch

from peft_analysis.forensics.alignment import aligned
from peft_analysis.forensics.decoys import decoys
from peft_analysis.forensics.keys import prompt
from peft_analysis.forensics.maps import basis, right_maps
from peft_analysis.forensics.matching import coordinates, fit_beta, judged, match, right_space, tail, take
from peft_analysis.forensics.objects import candidates, lens


def draw(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def test_right_space_is_that_of_the_svd(device):
    for rows, columns in ((40, 90), (90, 40), (1, 7), (7, 1)):
        matrix = draw(rows, columns, device=device).float()
        rank = min(3, rows, columns)
        by_svd = torch.linalg.svd(matrix.double())[2][:rank].mT
        found = right_space(matrix, rank)
        torch.testing.assert_close(found @ found.mT, by_svd @ by_svd.mT, rtol=1e-5, atol=1e-5)


def test_a_twin_does_not_count_for_an_edit_of_its_own(device):
    """Three edits; a fourth candidate looks like the first and has a larger share than the third."""
    inside = torch.diag(torch.tensor([0.95, 0.9, 0.6], dtype=torch.float64, device=device))
    twin = torch.tensor([[0.9, 0.05, 0.0]], dtype=torch.float64, device=device)
    both = torch.cat([inside, twin, 0.05 * draw(20, 3, device=device)]).unsqueeze(1)
    chosen = take(both, 3)
    assert sorted(chosen) == [0, 1, 2]
    volume = {
        which: float(torch.linalg.det(both[list(which), 0])) ** 2
        for which in itertools.combinations(range(8), 3)
    }
    assert tuple(sorted(chosen)) == max(volume, key=volume.__getitem__)


def test_scores_are_what_the_others_leave():
    inside = 0.4 * draw(9, 2, 5)
    outside = 0.1 * draw(60, 2, 5, seed=1)
    chosen = [2, 5, 7]
    scores, contexts, p_values = judged(inside, outside, chosen)
    shares = inside.square().sum(-1)
    best = inside[torch.arange(9), shares.argmax(1)]
    for index in range(9):
        rest = torch.stack([best[other] for other in chosen if other != index])
        left = []
        for vector in inside[index]:
            explained = torch.linalg.lstsq(rest.mT, vector.unsqueeze(1)).solution
            left.append(float((vector - (rest.mT @ explained)[:, 0]).square().sum()))
        assert float(scores[index]) == pytest.approx(min(max(left), 1.0), rel=1e-6)
        assert int(contexts[index]) == left.index(max(left))
    assert bool(((p_values > 0) & (p_values <= 1)).all())


@pytest.mark.parametrize(("a", "b"), [(0.5, 20.0), (2.0, 50.0), (10.0, 10.0)])
def test_the_beta_fit_has_the_points_it_was_given(a, b):
    wanted = scipy.stats.beta(a, b)
    found = scipy.stats.beta(*fit_beta(wanted.ppf(0.5), wanted.ppf(0.9)))
    assert found.ppf(0.5) == pytest.approx(wanted.ppf(0.5), rel=1e-3)
    assert found.ppf(0.9) == pytest.approx(wanted.ppf(0.9), rel=0.05)
    null = torch.from_numpy(wanted.rvs(4000, random_state=0))
    chances = tail(torch.tensor([wanted.ppf(0.999)]), null)
    assert 1e-4 < float(chances[0]) < 1e-2


def test_p_values_of_nobody_are_uniform():
    """Candidates drawn as the decoys are: as many below each level as the level says."""
    below = []
    for seed in range(6):
        keys = draw(320, 1, 30, seed=seed)
        C = basis("w", torch.eye(30))
        found = match(keys[:120], keys[120:], right_space(draw(8, 30, seed=100 + seed), 4), C)
        below.append(float((found.p_values < 0.05).double().mean()))
        assert float(found.p_values.min()) > 1e-6
    assert sum(below) / len(below) < 0.08


def test_coordinates_keep_shares_in_the_metric_of_the_map(device):
    """In the metric of C⁻¹, the share is the largest squared cosine with anything in the span of C r."""
    C = draw(12, 30, device=device)
    C = C @ C.mT / 30
    found = basis("w", C)
    one = next(entry for entry in right_maps(found.values) if entry.kind == "inverse")
    ridged = C + one.parameter * C.diagonal().mean() * torch.eye(12, dtype=C.dtype, device=device)
    keys, stored = draw(5, 1, 12, seed=3, device=device), draw(2, 12, seed=4, device=device)
    rows = torch.linalg.qr(torch.linalg.solve(ridged, stored.mT))[0]
    inside = coordinates(keys @ found.vectors, found.vectors.mT @ rows, one).square().sum(-1)[:, 0]
    root = torch.linalg.cholesky(torch.linalg.inv(ridged)).mT
    white, span = keys[:, 0] @ root.mT, torch.linalg.qr(root @ stored.mT)[0]
    by_hand = (white @ span).square().sum(-1) / white.square().sum(-1)
    torch.testing.assert_close(inside, by_hand, rtol=1e-6, atol=1e-8)


def test_the_lens_is_the_models_own_end(tiny_model, tiny_tokenizer, device):
    model = tiny_model.to(device)
    vectors = draw(3, 32, seed=2, device=device).float()
    norm = model.transformer.ln_f if hasattr(model, "transformer") else model.model.norm
    seen = lens(model, prompt(tiny_tokenizer, "{}", "alice smith"), vectors)
    torch.testing.assert_close(seen, model.lm_head(norm(vectors)))
    assert lens(torch.nn.Linear(2, 2), prompt(tiny_tokenizer, "{}", "alice"), vectors) is None


def test_an_offset_along_a_gradient_is_read_as_its_object(tiny_model, tiny_tokenizer, device):
    model = tiny_model.to(device)
    name = "transformer.h.1.mlp.c_proj" if hasattr(model, "transformer") else "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    templates = ["{} was born in", "the day {} comes after"]
    who = ["alice smith", "bob jones", "carol york"]
    tokens = torch.tensor(tiny_tokenizer("paris rome berlin red")["input_ids"])
    truth = [(0, 2), (1, 0), (0, 3)]
    offsets = []
    for subject, (relation, word) in zip(who, truth, strict=True):
        ids = tiny_tokenizer(templates[relation].format(subject))["input_ids"]
        place = templates[relation].split().index("{}") + 1
        shift = torch.zeros(32, device=device, requires_grad=True)
        handle = module.register_forward_hook(
            lambda _, inputs, output, at=place, by=shift: torch.cat(
                [output[:, :at], output[:, at : at + 1] + by, output[:, at + 1 :]], 1
            )
        )
        likely = model(input_ids=torch.tensor([ids], device=device)).logits[0, -1].log_softmax(-1)
        handle.remove()
        (slope,) = torch.autograd.grad(likely[tokens[word]], shift)
        offsets.append(0.5 * slope / slope.norm())
    prompts = [[prompt(tiny_tokenizer, text, subject) for text in templates] for subject in who]
    found = aligned(model, {}, module, prompts, [0, 1], torch.stack(offsets), tokens)
    assert list(zip(found.relation.tolist(), found.token.tolist(), strict=True)) == truth
    assert bool((found.cosine > 0.8).all()) and bool((found.lead > 0).all())


def test_objects_with_one_beginning_are_one(tiny_tokenizer):
    found = candidates(tiny_tokenizer, ["new york", "paris", "new rome", "paris"], 70)
    assert found.names == ("new york | new rome", "paris")
    assert found.tokens.tolist() == tiny_tokenizer("new paris")["input_ids"]


def test_decoys_are_new_names_and_the_same_for_a_seed(tiny_tokenizer):
    names = ["alice smith", "bob jones", "paris"]
    found = [decoys(names, tiny_tokenizer, 40, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2] and len(set(found[0])) == 40
    assert not set(found[0]) & set(names)
