import copy

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertModel

import geoedit
from geoedit import Concept, EditError, LinearSteer, Site, SwapMeans, Template, diagnose, run_with
from geoedit.activations.inputs import read_inputs
from geoedit.anatomy import anatomy
from geoedit.diagnosis import Diagnosis
from geoedit.diagnosis.derivatives import answer_place, derive
from geoedit.diagnosis.observe import observe
from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR, plan_edits
from tests.conftest import build_gpt2

MONTHS = ("january", "february", "march", "april", "may", "june")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
SITES = [Site(stream="embedding", token="value"), Site(1, token="value"), Site(2, "mlp_out", "last")]


def cycle(values=MONTHS, **changes):
    after = [*values[1:], values[0]]
    templates = [Template("after {value} comes", after), Template("the month after {value} is", after)]
    return Concept(**{"name": "months", "values": values, "templates": templates, "kind": "cycle", **changes})


def last_word(values, kind="categorical"):
    """Templates that end on the value and are answered by it."""
    return Concept("word", values, [Template(f"{word} {{value}}", values) for word in ("the", "a")], kind)


def set_by_hand(model, tokenizer, values, embeddings, heads, biases):
    """Blocks that add next to nothing: the next word is then linear in the last token's embedding."""
    with torch.no_grad():
        for block in model.transformer.h:
            for part in (block.attn.c_proj, block.mlp.c_proj):
                part.weight.mul_(1e-9)
                part.bias.zero_()
        model.transformer.wpe.weight.zero_()
        model.transformer.ln_f = nn.Identity()
        width = model.config.n_embd
        model.transformer.wte.weight.zero_()
        model.lm_head = nn.Linear(width, len(tokenizer), bias=False)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, -1] = -100.0
        for value, embedding, head, bias in zip(values, embeddings, heads, biases, strict=True):
            token = tokenizer.convert_tokens_to_ids(value)
            model.transformer.wte.weight[token, : len(embedding)] = torch.tensor(
                embedding, dtype=torch.float32
            )
            model.transformer.wte.weight[token, -1] = 1.0
            model.lm_head.weight[token, : len(head)] = torch.tensor(head, dtype=torch.float32)
            model.lm_head.weight[token, -1] = bias
    return model.requires_grad_(False).eval()


def test_the_function_is_at_the_top():
    assert callable(geoedit.diagnose) and geoedit.Diagnosis is Diagnosis


# gradients and edits against the model itself


def test_gradients_agree_with_finite_differences(tiny_model, tiny_tokenizer):
    places = {site: anatomy(tiny_model).locate(site) for site in SITES}
    model = tiny_model.double()
    prompts = cycle().prompts(values=MONTHS[:3])
    source = read_inputs(model, tiny_tokenizer, prompts)
    ids = torch.tensor([5, 9])
    found = derive(
        model,
        source,
        range(len(prompts)),
        places,
        lambda logits, rows: logits.log_softmax(1)[:, ids],
        batch_size=4,
    )
    states = geoedit.collect(model, tiny_tokenizer, prompts, SITES, progress=False)
    plain = run_with(model, tiny_tokenizer, prompts, {}, progress=False).log_softmax(1)[:, ids]
    torch.testing.assert_close(found.outputs, plain)
    for number, site in enumerate(SITES):
        generator = torch.Generator().manual_seed(number)
        step = 1e-3 * torch.randn(states[site].shape, generator=generator, dtype=torch.float64)
        up, down = (
            run_with(model, tiny_tokenizer, prompts, {site: states[site] + sign * step}, progress=False)
            for sign in (1, -1)
        )
        change = (up.log_softmax(1) - down.log_softmax(1))[:, ids] / 2
        expected = torch.einsum("nkd,nd->nk", found.gradients[site], step)
        torch.testing.assert_close(expected, change, rtol=5e-3, atol=1e-6)


def test_gradients_leave_no_trace(tiny_gpt2, tiny_tokenizer):
    model = tiny_gpt2.train().requires_grad_(True)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    diagnose(model, tiny_tokenizer, cycle(), SITES, apply=True, max_edits=20, progress=False)
    assert model.training and all(part.grad is None for part in model.parameters())
    assert all(torch.equal(before[name], part) for name, part in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("site", SITES, ids=str)
def test_observed_edits_are_those_that_the_edits_make(tiny_model, tiny_tokenizer, site):
    prompts = cycle().prompts()
    source = read_inputs(tiny_model, tiny_tokenizer, prompts)
    generator = torch.Generator().manual_seed(0)
    rows, shift = [0, 3, 7, 3], torch.randn(4, 32, generator=generator)
    wanted = torch.tensor([4, 5, 6, 7])
    found = observe(
        tiny_model, source, site, anatomy(tiny_model).locate(site), rows, shift, wanted, batch_size=3
    )
    for place, row in enumerate(rows):
        inputs = tiny_tokenizer(prompts[row].text, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        position = source.value_tokens[row] if site.token == "value" else -1
        here = site.with_token(position)
        with torch.no_grad():
            with LinearSteer(site=here, direction=shift[place], scale=1.0).on(tiny_model):
                steered = tiny_model(**inputs).logits[0, -1]
            with SwapMeans(site=here, source=torch.zeros(32), target=shift[place]).on(tiny_model):
                swapped = tiny_model(**inputs).logits[0, -1]
        assert found.token[place] == steered.argmax() == swapped.argmax()
        p = steered.double().softmax(0)[wanted[place]]
        assert found.log_odds[place].item() == pytest.approx((p / (1 - p)).log().item(), abs=1e-4)


# worlds in which the outcome is known


def orthogonal(model, tokenizer):
    eye = np.eye(len(MONTHS)) * 3
    return set_by_hand(model, tokenizer, MONTHS, eye, eye, np.zeros(len(MONTHS)))


def on_a_line(model, tokenizer):
    places = np.arange(len(NUMBERS), dtype=float)[:, None]
    # w_k · x + b_k = k x - k^2 / 2 is largest for the k that is nearest to x.
    return set_by_hand(model, tokenizer, NUMBERS, places, places, -(places[:, 0] ** 2) / 2)


def test_a_linear_readout_of_the_last_token_is_moved_and_foreseen(tiny_gpt2, tiny_tokenizer):
    model = orthogonal(tiny_gpt2, tiny_tokenizer)
    sites = [Site(stream="embedding", token="value"), Site(1, token="last")]
    found = diagnose(model, tiny_tokenizer, last_word(MONTHS), sites, apply=True, progress=False)
    assert found.settings["answered_right_unedited"] == 1.0
    assert set(found.table["edit"]) == {MEAN_DIFFERENCE}
    assert bool(found.table["success"].all())
    assert (found.table["landing"] > 0).all() and (found.table["probability"] > 0.5).all()
    # logit 9 for the target, 0 for the others, at the end of an exact move
    assert found.table["landing"].to_numpy() == pytest.approx(9.0, abs=1e-3)
    assert found.table["euclidean"].to_numpy() == pytest.approx(np.sqrt(18), abs=1e-3)
    assert (found.table["answer"] == found.table["target"]).all()


def test_a_token_that_nobody_reads_moves_nothing_and_is_foreseen(tiny_gpt2, tiny_tokenizer):
    model = orthogonal(tiny_gpt2, tiny_tokenizer)
    zero, *ends = tiny_tokenizer.convert_tokens_to_ids(["zero", "is", "of"])
    model.transformer.wte.weight[ends, -1] = 1.0
    model.lm_head.weight[zero, -1] = 5.0
    templates = [Template("{value} is", MONTHS), Template("the {value} of", MONTHS)]
    found = diagnose(
        model,
        tiny_tokenizer,
        Concept("m", MONTHS, templates),
        [Site(1, token="value")],
        apply=True,
        progress=False,
    )
    assert not found.table["success"].any()
    assert found.table["log_odds_change"].abs().max() < 1e-4
    assert set(found.table["answer"]) == {"zero"} and set(found.table["nearest"]) == {"another word"}
    assert found.table["landing"].to_numpy() == pytest.approx(-5.0, abs=1e-3)
    assert (found.table["probability"] < 0.05).all()
    # Plain distance can't know that nobody reads on: it says that every edit arrives.
    assert (found.table["euclidean"] > 1).all()


def test_a_vector_can_be_reused_on_a_line_but_not_between_orthogonal_values(tiny_tokenizer, tiny_gpt2):
    straight = diagnose(
        on_a_line(tiny_gpt2, tiny_tokenizer),
        tiny_tokenizer,
        last_word(NUMBERS, "line"),
        [Site(0, token="last")],
        apply=True,
        progress=False,
    ).table
    reused = straight[straight["edit"] == REUSED_VECTOR]
    assert len(reused) and reused["success"].all() and (reused["landing"] > 0).all()
    crooked = diagnose(
        orthogonal(tiny_gpt2, tiny_tokenizer),
        tiny_tokenizer,
        last_word(MONTHS, "cycle"),
        [Site(0, token="last")],
        apply=True,
        progress=False,
    ).table
    reused = crooked[crooked["edit"] == REUSED_VECTOR]
    shared = reused["to_value"] == reused["source"]  # then x_a + m_a - m_c points even farther along a
    assert len(reused) and not reused["success"].any()
    assert (reused["landing"] < 1e-3).all() and shared.any()


def test_half_a_step_does_not_arrive_and_several_scales_are_judged(tiny_gpt2, tiny_tokenizer):
    found = diagnose(
        orthogonal(tiny_gpt2, tiny_tokenizer),
        tiny_tokenizer,
        last_word(MONTHS),
        [Site(0, token="last")],
        apply=True,
        scale=[0.4, 0.6],
        progress=False,
    )
    by_scale = found.table.groupby("scale")["success"].mean()
    assert by_scale.to_dict() == {0.4: 0.0, 0.6: 1.0}
    # logits 9 (1 - s) of the source and 9 s of the target
    assert found.table.groupby("scale")["landing"].mean().to_numpy() == pytest.approx([-1.8, 1.8], abs=1e-3)
    assert {entry.scale for entry in found.predict("january", "june")} == {0.4, 0.6}


# plans


def test_reused_vectors_come_from_parallel_pairs():
    concept = cycle()
    groups = [MONTHS.index(prompt.answer) for prompt in concept.prompts()]
    plan = plan_edits(concept, concept.prompts(), groups, scales=[1.0], max_edits=10_000, seed=0)
    assert plan.possible == len(plan.edits) == 2 * 2 * 6 * 5
    for edit in plan.edits:
        a, b = (MONTHS.index(concept.prompts()[row].value) for row in (edit.source, edit.target))
        assert (edit.to_value - edit.from_value - b + a) % 6 == 0
        assert ((edit.from_value, edit.to_value) == (a, b)) == (edit.kind == MEAN_DIFFERENCE)


def test_grids_step_by_coordinates_and_lines_do_not_wrap():
    places = ("red", "green", "blue", "small")
    grid = Concept(
        "g", places, [Template("the {value}", places)], "grid", coordinates=[(0, 0), (1, 0), (0, 1), (1, 1)]
    )
    plan = plan_edits(grid, grid.prompts(), range(4), scales=[1.0], max_edits=100, seed=0)
    reused = {(e.source, e.target): (e.from_value, e.to_value) for e in plan.edits if e.kind == REUSED_VECTOR}
    assert reused[0, 1] == (2, 3) and reused[3, 1] == (2, 0) and (0, 3) not in reused
    line = last_word(NUMBERS[:3], "line")
    plan = plan_edits(line, line.prompts(templates=[0]), range(3), scales=[1.0], max_edits=100, seed=0)
    reused = {(e.source, e.target): (e.from_value, e.to_value) for e in plan.edits if e.kind == REUSED_VECTOR}
    assert reused == {(0, 1): (1, 2), (1, 2): (0, 1), (1, 0): (2, 1), (2, 1): (1, 0)}


def test_draws_are_seeded_and_rows_of_one_answer_are_not_paired():
    concept = cycle()
    prompts = concept.prompts()
    groups = [0 if prompt.value in MONTHS[:3] else MONTHS.index(prompt.value) for prompt in prompts]
    plans = [
        plan_edits(concept, prompts, groups, scales=[1.0], max_edits=30, seed=seed) for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2] and len(plans[0].edits) == 30
    assert all(groups[edit.source] != groups[edit.target] for edit in plans[0].edits)
    with pytest.raises(EditError, match="nothing to edit"):
        plan_edits(concept, prompts, [0] * len(prompts), scales=[1.0], max_edits=30, seed=0)


# the result


@pytest.fixture(scope="module")
def result(tiny_tokenizer):
    model = build_gpt2(len(tiny_tokenizer))
    return diagnose(
        model, tiny_tokenizer, cycle(), SITES, apply=True, max_edits=40, progress=False, name="tiny"
    )


def test_the_same_seed_gives_the_same_bits(result, tiny_gpt2, tiny_tokenizer):
    again = diagnose(tiny_gpt2, tiny_tokenizer, cycle(), SITES, apply=True, max_edits=40, progress=False)
    assert result.table.equals(again.table)


def test_json_brings_everything_back(result, tmp_path):
    path = result.to_json(tmp_path / "new" / "d.json")
    again = Diagnosis.from_json(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["d.json"]
    np.testing.assert_allclose(
        result.table[["landing", "fisher", "probability"]], again.table[["landing", "fisher", "probability"]]
    )
    assert result.table["success"].tolist() == again.table["success"].tolist()
    assert result.summary.equals(again.summary)
    assert (again.model, again.concept, again.sites) == ("tiny", result.concept, result.sites)
    source, target = result.table.loc[0, ["source", "target"]]
    for old, new in zip(result.predict(source, target), again.predict(source, target), strict=True):
        assert (old.site, old.nearest, old.observed) == (new.site, new.nearest, new.observed)
        assert old.probability == pytest.approx(new.probability)


def test_summary_has_a_row_for_each_site_and_predictor(result):
    summary = result.summary
    assert set(summary["site"]) == {*map(str, SITES), "all sites"}
    assert set(summary["predictor"]) == {predictor.column for predictor in result.predictors}
    known = summary.dropna()
    assert ((known["low"] <= known["auroc"]) & (known["auroc"] <= known["high"])).all()


def test_predict_speaks_of_one_pair_and_refuses_what_it_was_not_asked(result):
    source, target = result.table.loc[0, ["source", "target"]]
    for entry in result.predict(source, target):
        assert 0 <= entry.probability <= 1 and target in entry.reason and entry.observed in (0.0, 0.5, 1.0)
    with pytest.raises(EditError, match="no value 'octember'"):
        result.predict("octember", "june")
    with pytest.raises(EditError, match="both 'june'"):
        result.predict("june", "june")
    seen = set(zip(result.table["source"], result.table["target"], strict=True))
    left_out = next((a, b) for a in MONTHS for b in MONTHS if a != b and (a, b) not in seen)
    with pytest.raises(EditError, match="raise max_edits"):
        result.predict(*left_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "no diagnosis"),
        ('{"format": "geoedit.diagnosis", "version": 99}', "version 99"),
    ],
)
def test_from_json_refuses_other_files(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(EditError, match=message):
        Diagnosis.from_json(path)
    with pytest.raises(EditError, match="no file"):
        Diagnosis.from_json(tmp_path / "none.json")


def test_without_answers_the_metric_falls_back_and_says_so(tiny_gpt2, tiny_tokenizer):
    concept = Concept("months", MONTHS, [Template("after {value}"), Template("the {value} is")], "cycle")
    found = diagnose(
        tiny_gpt2, tiny_tokenizer, concept, [Site(1, token="value")], max_edits=20, progress=False
    )
    assert [entry.column for entry in found.predictors[:2]] == [
        "odds",
        "fisher_sampled",
    ] and not found.applied
    assert any("no answers" in note for note in found.notes)
    with pytest.raises(EditError, match="no answers"):
        diagnose(tiny_gpt2, tiny_tokenizer, concept, [Site(1, token="value")], apply=True, progress=False)


@pytest.mark.parametrize("head", [False, True], ids=["encoder", "masked"])
def test_encoders_with_and_without_a_head(tiny_tokenizer, head):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (BertForMaskedLM if head else BertModel)(config).eval()
    sites = [Site(0, token="value"), Site(1, token="value")]
    if head:  # it reads both ways and nothing is masked: no place for an answer
        with pytest.raises(EditError, match="no mask token"):
            diagnose(model, tiny_tokenizer, cycle(), sites, max_edits=20, progress=False)
        return
    found = diagnose(model, tiny_tokenizer, cycle(), sites, max_edits=20, progress=False)
    assert [entry.column for entry in found.predictors[:2]] == ["odds", "gaussian"]
    assert np.isfinite(found.table["gaussian"]).all() and not found.applied


def test_a_masked_model_is_judged_where_the_mask_stands(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.mask_token = "zero"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForMaskedLM(config).eval()
    after = [*MONTHS[1:], MONTHS[0]]
    templates = [Template("after {value} comes zero", after), Template("zero comes after {value} .", after)]
    concept = Concept("months", MONTHS, templates, "cycle")
    found = diagnose(model, tokenizer, concept, [Site(0, token="value")], apply=True, progress=False)
    right = 0
    for prompt in concept.prompts():
        ids = tokenizer(prompt.text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, ids[0].tolist().index(tokenizer.mask_token_id)]
        right += tokenizer.decode([int(logits.argmax())]) == prompt.answer
    assert found.settings["answered_right_unedited"] == pytest.approx(right / 12, abs=1e-4)
    assert found.applied and np.isfinite(found.table["landing"].astype(float)).all()


def test_a_masked_answer_is_read_at_the_mask(tiny_gpt2, tiny_tokenizer):
    prompts = ["the february of january", "january is"]
    source = read_inputs(tiny_gpt2, tiny_tokenizer, prompts)
    mask = tiny_tokenizer.convert_tokens_to_ids("february")
    assert answer_place(source.batch([0, 1]), mask).tolist() == [1, 1]
    assert answer_place(source.batch([0, 1]), None).tolist() == [3, 1]


def test_default_sites(tiny_gpt2, tiny_tokenizer):
    found = diagnose(tiny_gpt2, tiny_tokenizer, cycle(), max_edits=4, progress=False)
    assert [site.label for site in found.sites] == [
        "embedding @ value",
        *(f"block {block} residual_out @ {token}" for token in ("value", "last") for block in range(3)),
    ]
    assert not found.applied and found.summary["auroc"].isna().all()


# bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": ("january",), "templates": [Template("{value} is"), Template("a {value}")]}, "one value"),
        ({"templates": [Template("after {value} comes", [*MONTHS[1:], MONTHS[0]])]}, "one sample"),
        (
            {"values": ("january", "xyzzy"), "templates": [Template("{value} is"), Template("a {value}")]},
            "xyzzy",
        ),
    ],
)
def test_concepts_that_do_not_fit(tiny_gpt2, tiny_tokenizer, changes, message):
    with pytest.raises(EditError, match=message):
        diagnose(tiny_gpt2, tiny_tokenizer, cycle(**changes), SITES, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": [Site(9)]}, "9"),
        ({"sites": [Site(1, token="all")]}, "every token"),
        ({"scale": 0.0}, "scale is 0"),
        ({"scale": [float("nan")]}, "scale is nan"),
        ({"scale": []}, "scale is empty"),
        ({"max_edits": 0}, "max_edits is 0"),
    ],
)
def test_arguments_that_make_no_sense(tiny_gpt2, tiny_tokenizer, arguments, message):
    with pytest.raises(EditError, match=message):
        diagnose(tiny_gpt2, tiny_tokenizer, cycle(), **{"progress": False, **arguments})


def test_states_that_are_not_numbers_are_named(tiny_gpt2, tiny_tokenizer):
    with torch.no_grad():
        tiny_gpt2.transformer.h[1].mlp.c_proj.bias.fill_(float("nan"))
    with pytest.raises(EditError, match="NaN"):
        diagnose(tiny_gpt2, tiny_tokenizer, cycle(), [Site(2)], progress=False)


def test_half_precision_is_judged_too(tiny_gpt2, tiny_tokenizer):
    found = diagnose(
        tiny_gpt2.bfloat16(), tiny_tokenizer, cycle(), SITES, apply=True, max_edits=20, progress=False
    )
    assert np.isfinite(found.table[["landing", "fisher", "probability"]].to_numpy(dtype=float)).all()
