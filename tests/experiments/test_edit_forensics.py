"""The stand-ins of the editors keep what their papers' equations say; the study's parts hold together."""

import json

import pytest
import torch

import geoedit
from experiments.edit_forensics.controls import control
from experiments.edit_forensics.editors import (
    Editing,
    Editor,
    alphaedit,
    covariances,
    memit,
    null_space,
    rome,
    texts_of,
)
from experiments.edit_forensics.figures import draw
from experiments.edit_forensics.measure import changed, stored
from experiments.edit_forensics.page import page
from experiments.edit_forensics.requests import draw_requests, tokens_of
from experiments.edit_forensics.settings import Settings

QUICK = Editing(steps=2, layers=(0, 1))


@pytest.fixture(scope="module", params=["almanac-gpt2", "almanac-llama"])
def almanac(request):
    model, tokenizer, world = geoedit.testbeds.load(request.param)
    model.requires_grad_(False)
    return model, tokenizer, world, covariances(model, tokenizer, texts_of(world, 0, 60), (0, 1))


def changes_of(model, editor):
    """ΔW (out, in) by block."""
    found = changed(model, editor.model)
    turned = "gpt2" in type(model).__name__.lower()
    return {
        layer: (value.mT if turned else value).double()
        for layer in (0, 1)
        if (value := found.get(editor.name(layer))) is not None
    }


def test_rome_stores_its_value_at_its_key_and_nowhere_else_that_c_sees(almanac):
    model, tokenizer, world, moments = almanac
    requests = draw_requests(world, 1, 5)
    editor = Editor(model, tokenizer, moments, QUICK)
    wanted, key = editor.targets(requests, 0)[0].double(), editor.keys(requests, 0)[0].double()
    rome(editor, requests)
    change = changes_of(model, editor)[0]
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) == 1
    torch.testing.assert_close(change @ key, wanted, rtol=1e-4, atol=1e-4)
    # the least-squares optimum: ΔW C is along the key, so that C-orthogonal keys are left alone
    rows = change @ editor.covariances[0].double()
    along = (rows @ key) / key.norm() / rows.norm()
    torch.testing.assert_close(along.norm(), torch.tensor(1.0, dtype=torch.float64), rtol=1e-3, atol=0)


def test_memit_satisfies_its_normal_equations(almanac):
    model, tokenizer, world, moments = almanac
    requests = draw_requests(world, 3, 6)
    editor = Editor(model, tokenizer, moments, Editing(steps=2, layers=(0,)))
    keys, wanted = editor.keys(requests, 0).double(), editor.targets(requests, 0)
    memit(editor, requests, wanted)
    change = changes_of(model, editor)[0]
    normal = 100.0 * editor.covariances[0].double() + keys.mT @ keys
    torch.testing.assert_close(change @ normal, wanted.double().mT @ keys, rtol=2e-3, atol=2e-3)


def test_alphaedit_leaves_what_c_holds(almanac):
    model, tokenizer, world, moments = almanac
    requests = draw_requests(world, 3, 7)
    editor = Editor(model, tokenizer, moments, QUICK)
    alphaedit(editor, requests)
    for layer, change in changes_of(model, editor).items():
        projector = null_space(moments[layer], QUICK.null_share).double()
        torch.testing.assert_close(projector @ projector, projector, rtol=1e-4, atol=1e-5)
        assert (change - change @ projector).norm() < 1e-3 * change.norm()


def test_a_target_makes_the_object_likelier(almanac):
    model, tokenizer, world, moments = almanac
    requests = draw_requests(world, 2, 8)
    editor = Editor(model, tokenizer, moments, Editing(prefixes=("",), steps=8))
    asked = tokens_of(tokenizer, [("", requests[0].template, requests[0].subject, "")], editor.device)
    wanted = tokenizer(requests[0].object)["input_ids"][-len(requests[0].object.split())]

    def likely():
        logits = editor.model(input_ids=asked.ids, attention_mask=asked.mask).logits
        return logits[0, -1].log_softmax(-1)[wanted]

    before = likely()
    rome(editor, requests[:1])
    assert likely() > before + 2.0


def test_places_of_subjects_agree_with_the_words(almanac):
    _, tokenizer, world, _ = almanac
    person = next(one.name for one in world.entities if len(one.name.split()) == 3)
    prompts = tokens_of(
        tokenizer, [("people say that", "{x} was born in", person, "x y")], torch.device("cpu")
    )
    words = tokenizer.convert_ids_to_tokens(prompts.ids[0].tolist())
    assert words[int(prompts.subject[0])] == person.split()[-1]
    assert (prompts.labels >= 0).sum() == 2


def test_requests_and_texts_are_drawn_apart():
    world = geoedit.testbeds.world()
    requests = draw_requests(world, 100, 1)
    assert len({one.subject for one in requests}) == 100
    assert all(world.fact(one.subject, one.relation).answer == one.was != one.object for one in requests)
    assert requests == draw_requests(world, 100, 1) != draw_requests(world, 100, 2)
    assert not set(texts_of(world, 0, 200)) & set(texts_of(world, 1, 200))
    with pytest.raises(ValueError, match="999 edits"):
        draw_requests(world, 999, 1)


def test_controls_change_what_they_say(almanac):
    model, tokenizer, world, _ = almanac
    texts = texts_of(world, 2, 40)
    one = changed(model, control("LoRA, one matrix", model, tokenizer, texts, 0, 2, 0))
    assert len(one) == 1
    (change,) = one.values()
    assert int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 8
    assert len(changed(model, control("fine-tune, one matrix", model, tokenizer, texts, 0, 2, 0))) == 1
    assert len(changed(model, control("fine-tune", model, tokenizer, texts, 0, 1, 0))) > 20
    base, edited = stored(model, {next(iter(one)): change}, torch.bfloat16)
    assert next(edited.parameters()).dtype == torch.bfloat16 and len(changed(base, edited)) == 1


def test_page_and_picture_come_from_the_records(tmp_path):
    case = {
        "model": "almanac-gpt2", "method": "ROME", "edits": 10, "set": 0, "dtype": "float32", "success": 0.9,
        "kept": 0.95, "subject_recall": 1.0, "found": 10, "found_right": 9, "false": 1, "unedited": 218,
        "object_recall": 0.8, "object_lens": 0.1, "relation_recall": 0.7, "rank": [10, 10, 12],
        "method_found": "ROME or MEMIT", "undone_to": 1e-7,
    }  # fmt: skip
    alarm = {
        "control": "LoRA", "method_found": "adapter", "found": 0, "found_everywhere": 1, "below": 0.04,
    }  # fmt: skip
    about = dict.fromkeys(("machine", "date", "torch", "transformers"), "x") | {"seconds": 1}
    found = {"settings": Settings().to_dict(), "edits": [case], "controls": [alarm], "about": about}
    found = json.loads(json.dumps(found))
    text = page(found)
    assert "recall 0.80 to 0.80 (aim 0.95: met in 0 of 1)" in text and "1 of 218" in text
    assert "in 0% of the control" in text.replace("\n", " ") and "in 100% when" in text.replace("\n", " ")
    draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000
