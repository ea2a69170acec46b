"""Traces of edits whose subjects, maps and ranks are known, on random tiny models of both architectures."""

import copy

import pytest
import torch

from manifolds import LowRank
from peft_analysis import UpdateError, Weights, WeightUpdate
from peft_analysis.forensics import EditTrace, trace
from peft_analysis.forensics.keys import around, owners, prompt, second_moments, subject_keys
from peft_analysis.forensics.places import places

FIRST = ["alice", "bob", "carol", "paris", "rome", "berlin"]
LAST = ["smith", "jones", "york", "red", "green", "blue"]
NAMES = [f"{first} {last}" for first in FIRST for last in LAST]
CANDIDATES, DECOYS = NAMES[::2] + NAMES[1::6], [n for i, n in enumerate(NAMES) if i % 2 and i % 6 != 1]
DECOYS += [f"{month} {colour}" for month in ("may", "june", "july", "april") for colour in LAST[:4]]
RELATIONS = {"born": ["{} was born in", "the day {} was born in"], "city": ["the city of {x} is"]}


def matrix(model, block=1):
    """The parameter that editors change, and whether it is stored (in, out)."""
    if hasattr(model, "transformer"):
        return f"transformer.h.{block}.mlp.c_proj.weight", True
    return f"model.layers.{block}.mlp.down_proj.weight", False


def add(model, name, change, turned):
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.get_parameter(name).add_(change.mT if turned else change)
    return edited


def keys_by_hand(model, tokenizer, name, texts):
    """The last token's input of the matrix, one text at a time, by a hook that is the test's own."""
    seen = []
    owner = model.get_submodule(name.rpartition(".")[0])
    handle = owner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0, -1].clone()))
    device = next(model.parameters()).device
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]], device=device))
    handle.remove()
    return torch.stack(seen)


KNOWN: dict[tuple, torch.Tensor] = {}


def moments_by_hand(model, tokenizer, name, texts):
    """C over texts; the fixtures make the same models again and again, so that it is kept."""
    key = (name, len(texts), model.device, float(sum(value.double().sum() for value in model.parameters())))
    if key not in KNOWN:
        KNOWN[key] = _moments_by_hand(model, tokenizer, name, texts)
    return KNOWN[key]


def _moments_by_hand(model, tokenizer, name, texts):
    rows = []
    owner = model.get_submodule(name.rpartition(".")[0])
    handle = owner.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0][0].clone()))
    device = next(model.parameters()).device
    for text in texts:
        model(input_ids=torch.tensor([tokenizer(text)["input_ids"]], device=device))
    handle.remove()
    all_rows = torch.cat(rows)
    return all_rows.mT @ all_rows / len(all_rows)


TEXTS = [f"{n} was born in {c} and the city of {n} is {c}" for n in NAMES[::3] for c in ("paris", "rome")]


def edited_by(model, tokenizer, subjects, *, kind="inverse", size=0.5, seed=0, block=1):
    """Rank-one edits of some subjects with random values, by the formulas; and C."""
    name, turned = matrix(model, block)
    C = moments_by_hand(model, tokenizer, name, TEXTS).double()
    eye = torch.eye(len(C), dtype=C.dtype, device=C.device)
    C = C + 1e-3 * C.diagonal().mean() * eye
    keys = keys_by_hand(model, tokenizer, name, subjects).double()
    if kind == "inverse":
        right = torch.linalg.solve(C, keys.mT).mT
    elif kind == "identity":
        right = keys
    else:
        values, vectors = torch.linalg.eigh(C)
        kept = vectors[:, : round(0.5 * len(values))]
        right = keys @ kept @ kept.mT
    right = right / (right * keys).sum(1, keepdim=True)
    out = model.get_parameter(name).shape[1 if turned else 0]
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(out, len(subjects), generator=generator, dtype=torch.float64).to(C.device)
    change = (size * left @ right).float()
    return add(model, name, change, turned), change, C.float(), name


def found_in(base, edited, tokenizer, name, C, **options) -> EditTrace:
    given = {
        "subjects": CANDIDATES,
        "relations": RELATIONS,
        "covariance": {name: C},
        "decoys": DECOYS,
        "everywhere": False,
        **options,
    }
    return trace(base, edited, None, tokenizer, given.pop("subjects"), given.pop("relations"), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_edit_is_found_with_its_layer_and_rank(tiny_model, tiny_tokenizer, device, dtype):
    base = tiny_model.to(device)
    subject = CANDIDATES[4]
    base.load_state_dict({key: value.to(dtype) for key, value in base.state_dict().items()})
    edited, _, C, name = edited_by(base, tiny_tokenizer, [subject])
    found = found_in(base.to(dtype), edited.to(dtype), tiny_tokenizer, name, C)
    assert found.layers == (name,)
    assert found.edits[1] <= 1 <= found.edits[2] and found.edits[0] == 1
    assert found.candidates["subject"][0] == subject
    assert found.subjects == (subject,)
    assert found.table["p_value"][0] < 1e-3
    assert "C as given" in found.access["subjects"] and "base and edited weights" in found.access["layers"]
    assert "ROME" in str(found.method)


def test_several_edits_are_all_found_and_nobody_else(tiny_model, tiny_tokenizer, device):
    base = tiny_model.to(device)
    wanted = [CANDIDATES[index] for index in (1, 6, 11, 15)]
    edited, _, C, name = edited_by(base, tiny_tokenizer, wanted)
    found = found_in(base, edited, tiny_tokenizer, name, C)
    assert found.edits == (4, 4, 4)
    assert set(found.candidates["subject"][:4]) == set(wanted)
    assert set(found.subjects) <= set(wanted)


def test_the_map_tells_a_null_space_from_an_inverse(tiny_gpt2, tiny_tokenizer):
    wanted = [CANDIDATES[index] for index in (1, 6, 11)]
    for kind, method in (("inverse", "ROME"), ("null space", "AlphaEdit")):
        edited, _, C, name = edited_by(tiny_gpt2, tiny_tokenizer, wanted, kind=kind)
        found = found_in(tiny_gpt2, edited, tiny_tokenizer, name, C)
        assert found.method.name == method, found.method


def test_steps_of_gradient_descent_name_nobody_unless_asked(tiny_gpt2, tiny_tokenizer):
    wanted = [CANDIDATES[index] for index in (1, 6, 11)]
    edited, _, C, name = edited_by(tiny_gpt2, tiny_tokenizer, wanted, kind="identity")
    found = found_in(tiny_gpt2, edited, tiny_tokenizer, name, C)
    assert found.subjects == () and "gradient descent" in found.access["subjects"]
    assert found.method.name == "adapter" and "fine-tune" in found.method.alternatives
    asked = found_in(tiny_gpt2, edited, tiny_tokenizer, name, C, everywhere=True)
    assert asked.subjects and set(asked.subjects) <= set(wanted)


def test_keys_are_those_of_the_last_token(tiny_model, tiny_tokenizer, device):
    model = tiny_model.to(device)
    name, _ = matrix(model)
    prompts = [prompt(tiny_tokenizer, "the day {} was born in", one) for one in CANDIDATES]
    found = subject_keys(model, owners(model, [name]), prompts)[name]
    by_hand = keys_by_hand(model, tiny_tokenizer, name, [f"the day {one}" for one in CANDIDATES])
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    read = [prompt(tiny_tokenizer, "{}", text) for text in TEXTS[:9]]
    C = second_moments(model, owners(model, [name]), read)[name]
    torch.testing.assert_close(
        C, moments_by_hand(model, tiny_tokenizer, name, TEXTS[:9]), rtol=1e-4, atol=1e-5
    )


def test_a_slow_tokenizer_gives_the_same_places(tiny_tokenizer):
    class Slow:
        """A tokenizer without offsets that ends every text with <eos>."""

        is_fast = False
        all_special_ids = (0, 1, 2)

        def __call__(self, text):
            return {"input_ids": [*tiny_tokenizer(text)["input_ids"], 2]}

    for template in ("{}", "the day {} was born in", "{x} was born in"):
        slow, fast = prompt(Slow(), template, "carol jones"), prompt(tiny_tokenizer, template, "carol jones")
        assert slow.place == fast.place and slow.ids[:-1] == fast.ids


def test_training_mode_and_weights_are_left_as_they_were(tiny_model, tiny_tokenizer):
    edited, _, C, name = edited_by(tiny_model, tiny_tokenizer, CANDIDATES[:2])
    tiny_model.train()
    before = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    found_in(tiny_model, edited, tiny_tokenizer, name, C)
    assert all(module.training for module in tiny_model.modules())
    assert all(torch.equal(value, before[key]) for key, value in tiny_model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in tiny_model.modules())


def test_reverse_undoes_all_or_one(tiny_model, tiny_tokenizer):
    wanted = [CANDIDATES[2], CANDIDATES[13]]
    edited, change, C, name = edited_by(tiny_model, tiny_tokenizer, wanted)
    found = found_in(tiny_model, edited, tiny_tokenizer, name, C)
    undone = copy.deepcopy(edited)
    found.reverse().apply(undone)
    base = tiny_model.get_parameter(name)
    torch.testing.assert_close(undone.get_parameter(name), base, rtol=0, atol=1e-6)
    assert set(found.subjects) == set(wanted)
    half = copy.deepcopy(edited)
    found.reverse([wanted[0]]).apply(half)
    left = half.get_parameter(name) - base
    left = left.mT if matrix(tiny_model)[1] else left
    keys = keys_by_hand(tiny_model, tiny_tokenizer, name, wanted)
    ratio = (left @ keys.mT).norm(dim=0) / (change @ keys.mT).norm(dim=0)
    assert ratio[0] < 0.25 and ratio[1] > 0.75
    with pytest.raises(UpdateError, match="no edit of nobody at all"):
        found.reverse(["nobody at all"])


def test_an_update_alone_serves_with_a_model(tiny_llama, tiny_tokenizer):
    edited, change, C, name = edited_by(tiny_llama, tiny_tokenizer, [CANDIDATES[7]])
    update = WeightUpdate.from_tensors({name: LowRank.from_dense(change, rank=1)})
    alone = trace(
        None, update, tiny_llama, tiny_tokenizer, CANDIDATES, RELATIONS, covariance={name: C}, decoys=DECOYS
    )
    paired = found_in(tiny_llama, edited, tiny_tokenizer, name, C)
    assert alone.subjects == paired.subjects == (CANDIDATES[7],)
    assert alone.access["layers"] == "the update itself"
    assert alone.places["relative_norm"].isna().all()


def test_the_model_may_be_the_edited_one(tiny_gpt2, tiny_tokenizer):
    edited, _, C, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[3]])
    options = {"covariance": {name: C}, "decoys": DECOYS}
    one = trace(tiny_gpt2, edited, tiny_gpt2, tiny_tokenizer, CANDIDATES, RELATIONS, **options)
    other = trace(tiny_gpt2, edited, edited, tiny_tokenizer, CANDIDATES, RELATIONS, **options)
    assert one.to_dict() == other.to_dict()


def test_c_comes_from_texts_or_from_the_candidates(tiny_gpt2, tiny_tokenizer):
    edited, _, _, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[5]])
    texts = found_in(tiny_gpt2, edited, tiny_tokenizer, name, None, covariance=None, texts=TEXTS)
    assert texts.subjects == (CANDIDATES[5],) and f"C from {len(TEXTS)} texts" in texts.access["subjects"]
    none = found_in(tiny_gpt2, edited, tiny_tokenizer, name, None, covariance=None)
    assert "no C" in none.access["subjects"] and none.candidates["subject"][0] == CANDIDATES[5]


def test_without_candidates_or_a_model_the_places_are_told(tiny_gpt2, tiny_tokenizer):
    edited, _, _, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[5]])
    update = trace(tiny_gpt2, edited)
    assert update.layers == (name,) and update.edits == (1, 1, 1) and update.subjects == ()
    assert update.method.name == "edit" and not update.method.clear
    assert update.access["subjects"].startswith("no answer")
    guess = trace(tiny_gpt2, edited, tokenizer=tiny_tokenizer)
    assert len(guess.objects) == 1 and "guess" in guess.access["objects"]


def test_nothing_changed(tiny_model, tiny_tokenizer):
    found = trace(tiny_model, copy.deepcopy(tiny_model), None, tiny_tokenizer, CANDIDATES, RELATIONS)
    assert found.method.name == "none" and found.edits == (0, 0, 0)
    assert found.subjects == found.layers == () and len(found.candidates) == len(CANDIDATES)
    assert not found.candidates["found"].any()
    assert found.reverse() is not None and "none" in str(found)


def test_a_fine_tune_names_nobody(tiny_model, tiny_tokenizer):
    tuned = copy.deepcopy(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.get_submodule(
            "transformer.h.1" if hasattr(tuned, "transformer") else "model.layers.1"
        ).parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
    found = trace(tiny_model, tuned, None, tiny_tokenizer, CANDIDATES, RELATIONS, decoys=DECOYS)
    assert found.method.name == "fine-tune" and found.subjects == ()
    assert "vectors were changed" in found.access["subjects"]


def test_random_updates_of_rank_one_seldom_name_anybody(tiny_gpt2, tiny_tokenizer):
    """A direction that belongs to nobody: at a level of 5 % a few alarms in 40 are too many."""
    name, turned = matrix(tiny_gpt2)
    C = moments_by_hand(tiny_gpt2, tiny_tokenizer, name, TEXTS)
    generator = torch.Generator().manual_seed(3)
    rows, columns = tiny_gpt2.get_parameter(name).mT.shape
    alarms = 0
    for _ in range(6):
        left = torch.randn(rows, 1, generator=generator)
        change = 0.1 * left @ torch.randn(1, columns, generator=generator)
        edited = add(tiny_gpt2, name, change, turned)
        found = found_in(tiny_gpt2, edited, tiny_tokenizer, name, C, relations=["{} was born in"])
        alarms += bool(found.subjects)
    assert alarms <= 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subjects": "alice smith"}, "lists"),
        ({"subjects": []}, "subjects is empty"),
        ({"objects": []}, "objects is empty"),
        ({"false_alarm": 0.0}, "false_alarm"),
        ({"false_alarm": float("nan")}, "false_alarm"),
        ({"decoys": 3}, "fewer than 20"),
        ({"decoys": ["a"] * 40}, "1 decoys"),
        ({"relations": ["no field"]}, "0 fields"),
        ({"relations": ["{} and {}"]}, "2 fields"),
        ({"relations": {"empty": []}}, "no template"),
        ({"relations": ["{"]}, "cannot be read"),
        ({"subjects": ["alice smith", " "]}, "no token"),
        ({"covariance": {}}, "shape none"),
        ({"covariance": "narrow"}, r"shape \(3, 3\)"),
        ({"covariance": "nan"}, "not finite"),
        ({"covariance": "zero"}, "is zero"),
        ({"covariance": "negative"}, "eigenvalue"),
        ({"covariance": "skew"}, "not symmetric"),
    ],
)
def test_bad_arguments(tiny_gpt2, tiny_tokenizer, options, words):
    edited, _, C, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[0]])
    skew = torch.eye(len(C))
    skew[0, 1] = 0.5
    broken = {
        "narrow": torch.eye(3), "nan": C * float("nan"), "zero": 0 * C, "negative": -C, "skew": skew,
    }  # fmt: skip
    if isinstance(options.get("covariance"), str):
        options = {**options, "covariance": {name: broken[options["covariance"]]}}
    with pytest.raises(UpdateError, match=words):
        found_in(tiny_gpt2, edited, tiny_tokenizer, name, C, **options)


def test_a_model_with_other_names_is_refused(tiny_gpt2, tiny_llama, tiny_tokenizer):
    edited, change, _, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[0]])
    with pytest.raises(UpdateError, match="no parameter transformer"):
        trace(tiny_gpt2, edited, tiny_llama, tiny_tokenizer, CANDIDATES, RELATIONS, decoys=DECOYS)
    with pytest.raises(UpdateError, match="tokenizer"):
        trace(tiny_gpt2, edited, tiny_gpt2, None, CANDIDATES)
    weights = Weights.of_module(tiny_gpt2)
    update = WeightUpdate.from_tensors({name: change.mT}, base=weights)
    assert trace(tiny_gpt2, update).layers == (name,)


def test_templates_split_at_their_field():
    assert around("{x} is {{so}}") == ("", " is {so}")
    assert around("a {} b") == ("a ", " b")


def test_a_trace_is_plain_data(tiny_gpt2, tiny_tokenizer):
    import json

    edited, _, C, name = edited_by(tiny_gpt2, tiny_tokenizer, [CANDIDATES[0]])
    found = found_in(tiny_gpt2, edited, tiny_tokenizer, name, C, objects=["paris", "rome", "red"])
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["table"][0]["subject"] == CANDIDATES[0] and plain["table"][0]["relation"] in RELATIONS
    assert plain["edits"] == [1, 1, 1] and CANDIDATES[0] in str(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_square_matrices_that_were_merged(dtype):
    """Rounding of a square matrix has one tiny singular value by itself; it is no end of the spectrum."""
    generator = torch.Generator().manual_seed(2)
    base, left, right = (torch.randn(size, generator=generator) for size in ((96, 96), (96, 3), (3, 96)))
    base = base.to(dtype)
    change = (base.float() + 0.1 * left @ right).to(dtype).float() - base.float()
    weights = Weights.of_module(torch.nn.ParameterDict({"square": base}))
    update = WeightUpdate.from_tensors({"square": change}, base=weights, rounded=dtype, base_rounded=dtype)
    (place,) = places(update)
    assert (place.rank.rank, place.rank.low) == (3, 3)


def test_rounding_alone_is_called_so(tiny_llama, tiny_tokenizer):
    rounded = copy.deepcopy(tiny_llama).bfloat16().float()
    for name, value in tiny_llama.named_parameters():
        if "block" not in name and "layers.1.mlp" not in name:
            rounded.get_parameter(name).data.copy_(value)
    found = trace(tiny_llama, rounded, None, tiny_tokenizer, CANDIDATES, RELATIONS, decoys=DECOYS)
    assert found.method.name == "rounding" and found.edits[:2] == (0, 0) and found.subjects == ()
