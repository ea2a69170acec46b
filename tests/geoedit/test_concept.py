import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from geoedit.concept import Concept, Prompt, Template, concept, concepts
from geoedit.errors import EditError
from geoedit.spans import tokens_in_span

CITIES = Concept(
    "cities",
    ["new york", "paris"],
    [Template("city of {value} is", ["large", "old"]), Template("the {value} month")],
)


def byte_tokenizer(texts: list[str], vocab_size: int = 600) -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer (byte pairs, the space belongs to the word after it), trained on `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<e>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")


def metaspace_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """SentencePiece's kind: a ▁ before every word, also before the first."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def test_prompts_are_the_filled_sentences_with_their_spans() -> None:
    prompts = CITIES.prompts()
    assert [prompt.text for prompt in prompts] == [
        "city of new york is",
        "the new york month",
        "city of paris is",
        "the paris month",
    ]
    assert [prompt.answer for prompt in prompts] == ["large", None, "old", None]
    assert [prompt.template_index for prompt in prompts] == [0, 1, 0, 1]
    assert prompts[0].span == (8, 16)
    assert all(prompt.surface == prompt.value for prompt in prompts)


def test_values_and_templates_choose_and_order() -> None:
    chosen = CITIES.prompts(values=["paris", "new york"], templates=[-1])
    assert [prompt.text for prompt in chosen] == ["the paris month", "the new york month"]
    assert {prompt.template_index for prompt in chosen} == {1}
    with pytest.raises(EditError, match=r"no value 'pariss'.*Did you mean 'paris'"):
        CITIES.prompts(values=["pariss"])
    with pytest.raises(EditError, match=r"no template 2; it has 2"):
        CITIES.prompts(templates=[2])


def test_other_braces_stay_as_they_are() -> None:
    text, span = Template('{"key": "{value}", {}}').fill("a{b}")
    assert text == '{"key": "a{b}", {}}'
    assert text[span[0] : span[1]] == "a{b}"


def test_forms_stand_for_their_value() -> None:
    tense = Concept("t", ["past", "future"], [Template("she {value} home")], forms={"past": ["ran", "rode"]})
    prompts = tense.prompts()
    assert [(p.value, p.surface, p.text) for p in prompts] == [
        ("past", "ran", "she ran home"),
        ("past", "rode", "she rode home"),
        ("future", "future", "she future home"),
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": []}, "at least one"),
        ({"values": ["a", "b", "a"]}, "'a'.*more than once"),
        ({"values": ["a", " "]}, "empty text"),
        ({"templates": []}, "no templates"),
        ({"kind": "cycel"}, "must be one of"),
        ({"name": " "}, "needs a name"),
        ({"templates": [Template("{value} is", ["x"])]}, "1 answers for 2 values"),
        ({"coordinates": [[0.0, 1.0]]}, "there are 1"),
        ({"coordinates": [[0.0, 1.0], [2.0]]}, "same length"),
        ({"forms": {"c": ["d"]}}, "none of its values"),
        ({"forms": {"a": ["b"]}}, "'b' stands for 'a' and for 'b'"),
        ({"forms": {"a": []}}, "give a list"),
    ],
)
def test_a_concept_that_does_not_fit_is_refused(fields: dict, message: str) -> None:
    whole = Concept("letters", ["a", "b"], [Template("{value} is")])
    with pytest.raises(EditError, match=message):
        replace(whole, **fields)


@pytest.mark.parametrize(
    ("text", "answers", "message"),
    [
        ("no slot", None, "holds {value} 0 times"),
        ("{value} and {value}", None, "holds {value} 2 times"),
        ("{value} is ", ["a"], "ends in a space"),
        ("{value} is", ["a", ""], "empty text"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(text: str, answers: list | None, message: str) -> None:
    with pytest.raises(EditError, match=message):
        Template(text, answers)


def test_yaml_gives_back_an_equal_concept(tmp_path: Path) -> None:
    whole = Concept(
        "größe: 'odd'",
        ["no", "1", "New\nYork", "null"],
        [Template("{value} ist: #", ["yes", None, "~", "07"]), Template("- {value}")],
        kind="grid",
        description="words: that YAML would read as something else",
        forms={"no": ["off", "2026-11-22"]},
        coordinates=[[0, 1], [0.1, -2], [1e-3, 4], [5, 6]],
    )
    whole.to_yaml(tmp_path / "c.yaml")
    assert Concept.from_yaml(tmp_path / "c.yaml") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]


def test_yaml_answers_may_map_value_to_answer(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: c\nvalues: [x, z]\ntemplates: [{text: '{value} is', answers: {z: last}}]\n")
    assert Concept.from_yaml(path).templates[0].answers == (None, "last")


GOOD = {"name": "c", "values": ["x"], "templates": ["{value}"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({**GOOD, "values": ["x", 5]}), r"key 'values\[1\]' holds 5.*quotes"),
        ("name: c\nvalues: [x, no]\ntemplates: ['{value}']", r"key 'values\[1\]' holds False.*quotes"),
        (json.dumps({**GOOD, "value": ["x"]}), "key 'value' is unknown"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "templates"}), "key 'templates' is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "values"}), "key 'values' is missing"),
        (json.dumps({**GOOD, "templates": [{"txt": "{value}"}]}), r"key 'templates\[0\]'"),
        (json.dumps({**GOOD, "templates": ["{wert}"]}), "holds {value} 0 times"),
        (json.dumps({**GOOD, "templates": [{"text": "{value}", "answers": {"y": "z"}}]}), "name 'y'"),
        (json.dumps({**GOOD, "templates": "{value}"}), "key 'templates' must be a list"),
        (json.dumps({**GOOD, "coordinates": [["a"]]}), "key 'coordinates'"),
        ("name: c\nname: d\nvalues: [x]\ntemplates: ['{value}']", "'name' stands there twice"),
        ("name: !!python/object/apply:os.system ['true']", "not plain YAML"),
        ("[1, 2", "not plain YAML"),
        ("just text", "must hold the keys"),
    ],
)
def test_yaml_errors_name_file_key_and_mend(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(EditError, match=message) as caught:
        Concept.from_yaml(path)
    assert "broken.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"nowhere.yaml.*can't be read"):
        Concept.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", concepts())
def test_built_in_concepts_load_and_hold_together(name: str) -> None:
    loaded = concept(name)
    assert loaded.name == name
    assert loaded.description
    for prompt in loaded.prompts():
        assert prompt.span is not None
        assert prompt.text[prompt.span[0] : prompt.span[1]] == prompt.surface
    texts = [prompt.text for prompt in loaded.prompts()]
    assert len(set(texts)) == len(texts)


def test_built_in_concepts_cover_what_was_promised() -> None:
    promised = {
        "weekdays",
        "months",
        "numbers",
        "colours",
        "sizes",
        "countries",
        "tense",
        "sentiment",
        "truth",
    }
    assert promised <= set(concepts())


@pytest.mark.parametrize("name", ["weekdays", "months", "seasons", "hours"])
def test_answers_of_cycles_are_shifts_of_the_values(name: str) -> None:
    loaded = concept(name)
    size = len(loaded.values)
    steps = set()
    for template in loaded.templates:
        if template.answers is not None:
            shifts = {(loaded.index(a) - i) % size for i, a in enumerate(template.answers) if a is not None}
            assert len(shifts) == 1, template.text
            steps |= shifts
    assert {1, size - 1} <= steps


def test_true_statements_have_a_false_twin_of_equal_number() -> None:
    truth = concept("truth")
    assert len(truth.surfaces("true")) == len(truth.surfaces("false"))


def test_an_unknown_name_gets_close_matches() -> None:
    with pytest.raises(EditError, match=r"'month'.*Did you mean 'months'"):
        concept("month")


def test_check_passes_where_all_can_be_told_apart(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    CITIES.check(tiny_tokenizer)


def test_check_refuses_unknown_values_and_answers(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(EditError, match=r"'tokyo'.*unknown to this tokenizer"):
        replace(CITIES, values=["paris", "tokyo"]).check(tiny_tokenizer)
    with pytest.raises(EditError, match=r"answer 'huge'.*does not know"):
        replace(CITIES, templates=[Template("the {value} is", ["huge", "old"])]).check(tiny_tokenizer)


def test_check_refuses_a_value_without_tokens() -> None:
    tokenizer = byte_tokenizer(["a b"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wide = Concept("c", ["\u200b"], [Template("a {value} b")])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(EditError, match=r"tokenises to nothing"):
        wide.check(tokenizer)


def test_check_refuses_answers_that_open_alike(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    alike = replace(CITIES, templates=[Template("the {value} is", ["new york", "new month"])])
    with pytest.raises(EditError, match=r"'new month'.*same token as 'new york'"):
        alike.check(tiny_tokenizer)
    alike.check(tiny_tokenizer, answers=False)
    replace(CITIES, templates=[Template("the {value} is", ["new york", "new york"])]).check(tiny_tokenizer)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(EditError, match=r"Slow does not say.*fast tokenizer"):
        CITIES.check(Slow())


def test_answer_and_value_ids_as_they_stand_in_the_text() -> None:
    tokenizer = byte_tokenizer(["The month after January is February"] * 4 + ["March April"])
    prompt = concept("months").prompts(values=["January"], templates=[0])[0]
    assert tokenizer.decode(prompt.answer_ids(tokenizer)) == " February"
    assert tokenizer.decode(prompt.value_ids(tokenizer)) == " January"
    assert prompt.continuation == " February"
    assert Prompt("Well", "v", ", yes").continuation == ", yes"


def test_an_answer_that_melts_into_the_text_is_refused() -> None:
    tokenizer = byte_tokenizer(["ab"] * 9)
    with pytest.raises(EditError, match=r"does not stand in tokens of its own"):
        Prompt("a", "a", "b").answer_ids(_Glue(tokenizer))
    with pytest.raises(EditError, match=r"no answer"):
        Prompt("a", "a").answer_ids(tokenizer)


class _Glue:
    """A tokenizer that drops spaces, so that a word after the text joins its last token."""

    def __init__(self, inner: PreTrainedTokenizerFast) -> None:
        self.inner = inner

    def __call__(self, text: str, **options: object) -> object:
        return self.inner(text.replace(" ", ""), **options)


@pytest.mark.parametrize("build", [byte_tokenizer, metaspace_tokenizer])
@pytest.mark.parametrize("name", ["months", "countries"])
def test_value_ids_spell_the_value_under_both_kinds_of_space(build, name: str) -> None:
    texts = [prompt.text for prompt in concept(name).prompts()]
    tokenizer = build(texts)
    for prompt in concept(name).prompts():
        pieces = "".join(tokenizer.convert_ids_to_tokens(list(prompt.value_ids(tokenizer))))
        assert pieces.replace("Ġ", " ").replace("▁", " ").strip() == prompt.value


def test_tokens_in_span_needs_a_shared_character() -> None:
    offsets = [(0, 0), (0, 3), (3, 8), (8, 9), (9, 9), (9, 12)]
    assert tokens_in_span(offsets, (4, 8)) == [2]
    assert tokens_in_span(offsets, (2, 9)) == [1, 2, 3]
    assert tokens_in_span(offsets, (12, 13)) == []
