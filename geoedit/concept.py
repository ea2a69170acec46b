"""Concepts: the values of one thing (months, sizes, capitals), sentences that show them, and their answers.

A concept holds plain text only. `Concept.check` meets it with a tokenizer; `geoedit.collect` meets it with a
model.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geoedit.concept_yaml import read_concept, write_concept
from geoedit.errors import EditError
from geoedit.spans import encode, encode_with_offsets, tokens_in_span

SLOT = "{value}"
KINDS = ("binary", "categorical", "cycle", "grid", "line", "map", "tree")
BUILT_IN = Path(__file__).parent / "concepts"


@dataclass(frozen=True)
class Prompt:
    """One sentence that shows one value.

    `span` is the half-open range of characters that the value (or the form of it that stands here) takes in
    `text`. `answer` is what should follow, without the space before it, or None where nothing particular
    should.
    """

    text: str
    value: str
    answer: str | None = None
    template_index: int = 0
    span: tuple[int, int] | None = None

    @property
    def surface(self) -> str:
        """The words that stand for the value in this sentence: the value itself, or one of its forms."""
        return self.value if self.span is None else self.text[self.span[0] : self.span[1]]

    @property
    def continuation(self) -> str:
        """The answer with the space before it that the text needs (none before a space or punctuation)."""
        if not self.answer:
            raise EditError(
                f"the prompt {self.text!r} has no answer; give its template `answers`, or ask a template "
                "that has them."
            )
        joined = self.answer[0].isspace() or self.answer[0] in ".,;:!?)'" or self.text[-1:].isspace()
        return self.answer if joined else " " + self.answer

    def answer_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Token ids of the answer as they follow this very text (no special tokens).

        Raises:
            EditError: the prompt has no answer, or the answer melts into the last token of the text.
        """
        before = encode(tokenizer, self.text)
        whole = encode(tokenizer, self.text + self.continuation)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise EditError(
                f"the answer {self.answer!r} does not stand in tokens of its own after {self.text!r}: "
                "end the template's text on a whole word, with no space after it."
            )
        return tuple(whole[len(before) :])

    def value_ids(self, tokenizer: Any) -> tuple[int, ...]:
        """Token ids that overlap the value as it stands in this text (no special tokens).

        Raises:
            EditError: the prompt has no span, or the tokenizer can't tell which characters a token covers.
        """
        if self.span is None:
            raise EditError(
                f"the prompt {self.text!r} does not say where its value {self.value!r} stands: set `span`."
            )
        ids, offsets = encode_with_offsets(tokenizer, self.text)
        return tuple(ids[i] for i in tokens_in_span(offsets, self.span))


@dataclass(frozen=True)
class Template:
    """A sentence with one `{value}` in it, and for each value of its concept the word that should follow.

    Raises:
        EditError: the text has no `{value}`, or more than one.
    """

    text: str
    answers: Sequence[str | None] | None = None

    def __post_init__(self) -> None:
        count = self.text.count(SLOT)
        if count != 1:
            raise EditError(
                f"the template {self.text!r} holds {SLOT} {count} times: it must stand there once, "
                "so that it is clear which token carries the value."
            )
        if self.answers is not None:
            if isinstance(self.answers, str):
                raise EditError(
                    f"answers of {self.text!r} is one text: give a list with an answer for every value."
                )
            if any(answer is not None and not answer.strip() for answer in self.answers):
                raise EditError(
                    f"answers of {self.text!r} hold an empty text: write None where there is no answer."
                )
            if self.text != self.text.rstrip():
                raise EditError(
                    f"the template {self.text!r} ends in a space and has answers: most tokenizers keep that "
                    "space "
                    "in the answer's first token, so drop it from the text."
                )
            object.__setattr__(self, "answers", tuple(self.answers))

    def fill(self, surface: str) -> tuple[str, tuple[int, int]]:
        """The sentence with `surface` in its slot, and the characters that it takes there."""
        start = self.text.index(SLOT)
        return self.text.replace(SLOT, surface), (start, start + len(surface))


@dataclass(frozen=True)
class Concept:
    """The values of one thing, the sentences that show them, and how the values lie to one another.

    `kind` says how: "categorical" (no order), "binary", "line" and "cycle" (in the order of `values`), "grid"
    and "map" (at `coordinates`, one tuple of numbers for each value), "tree". `forms` lists, for a value that
    is a class rather than a word, the words that stand for it (sentiment: "positive" is shown as "superb").

    Raises:
        EditError: no values or templates, a value twice, answers or coordinates of another length, an unknown
            kind, forms of a value that is not there.

    Example:
        >>> opposite = Template("The opposite of {value} is", ["large", "small"])
        >>> size = Concept("size", ["small", "large"], [opposite])
        >>> size.prompts(values=["small"])[0].text
        'The opposite of small is'
        >>> size.prompts(values=["small"])[0].answer
        'large'
    """

    name: str
    values: Sequence[str]
    templates: Sequence[Template]
    kind: str = "categorical"
    description: str = ""
    forms: Mapping[str, Sequence[str]] | None = None
    coordinates: Sequence[Sequence[int | float]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.values, str) or not self.values:
            raise EditError(
                f"concept {self.name!r}: values is {self.values!r}; give a list with at least one text."
            )
        if not self.templates:
            raise EditError(
                f"concept {self.name!r} has no templates; give at least one text with {SLOT} in it."
            )
        if not self.name.strip():
            raise EditError("a concept needs a name.")
        if self.kind not in KINDS:
            raise EditError(
                f"concept {self.name!r}: kind is {self.kind!r}; it must be one of {', '.join(KINDS)}."
            )
        object.__setattr__(self, "values", tuple(self.values))
        object.__setattr__(self, "templates", tuple(self.templates))
        self._check_values()
        self._check_lengths()

    def _check_values(self) -> None:
        blank = [value for value in self.values if not value.strip()]
        if blank:
            raise EditError(
                f"concept {self.name!r}: values hold an empty text; every value needs words to show it."
            )
        twice = sorted({value for value in self.values if list(self.values).count(value) > 1})
        if twice:
            raise EditError(f"concept {self.name!r}: values hold {twice} more than once; drop the repeats.")
        if self.forms is None:
            return
        frozen: dict[str, tuple[str, ...]] = {}
        for value, forms in self.forms.items():
            if value not in self.values:
                raise EditError(f"concept {self.name!r}: forms of {value!r}, which is none of its values.")
            if isinstance(forms, str) or not forms or any(not form.strip() for form in forms):
                raise EditError(
                    f"concept {self.name!r}: forms of {value!r} is {forms!r}; give a list of texts."
                )
            frozen[value] = tuple(forms)
        seen: dict[str, str] = {}
        for value in self.values:
            for form in frozen.get(value, (value,)):
                if form in seen:
                    raise EditError(
                        f"concept {self.name!r}: {form!r} stands for {seen[form]!r} and for {value!r}; keep "
                        "one of them."
                    )
                seen[form] = value
        object.__setattr__(self, "forms", frozen)

    def _check_lengths(self) -> None:
        for index, template in enumerate(self.templates):
            if template.answers is not None and len(template.answers) != len(self.values):
                raise EditError(
                    f"concept {self.name!r}: template {index} ({template.text!r}) has "
                    f"{len(template.answers)} answers "
                    f"for {len(self.values)} values; give one for every value, None where there is none."
                )
        if self.coordinates is None:
            return
        object.__setattr__(self, "coordinates", tuple(tuple(point) for point in self.coordinates))
        if len(self.coordinates) != len(self.values) or len({len(point) for point in self.coordinates}) != 1:
            raise EditError(
                f"concept {self.name!r}: coordinates must hold one tuple of the same length for each of the "
                f"{len(self.values)} values; there are {len(self.coordinates)}."
            )

    def surfaces(self, value: str) -> tuple[str, ...]:
        """The words that stand for a value: its forms, or itself.

        Raises:
            EditError: the concept has no such value.
        """
        self.index(value)
        return tuple((self.forms or {}).get(value, (value,)))

    def index(self, value: str) -> int:
        """The place of a value among the values.

        Raises:
            EditError: the concept has no such value.
        """
        if value not in self.values:
            raise EditError(f"concept {self.name!r} has no value {value!r}.{_close(value, self.values)}")
        return list(self.values).index(value)

    def prompts(
        self, values: Iterable[str] | None = None, templates: Iterable[int] | None = None
    ) -> list[Prompt]:
        """Every sentence of the concept, value by value: for each of its forms, each template.

        Args:
            values: only these values, in this order.
            templates: only the templates at these places (negative ones count from the end).

        Raises:
            EditError: a value or a template that the concept does not have.
        """
        chosen_values = list(self.values) if values is None else list(values)
        chosen = range(len(self.templates)) if templates is None else [self._template(i) for i in templates]
        found = []
        for value in chosen_values:
            place = self.index(value)
            for surface, index in itertools.product(self.surfaces(value), chosen):
                template = self.templates[index]
                text, span = template.fill(surface)
                answer = None if template.answers is None else template.answers[place]
                found.append(Prompt(text=text, value=value, answer=answer, template_index=index, span=span))
        return found

    def _template(self, index: int) -> int:
        if not -len(self.templates) <= index < len(self.templates):
            raise EditError(
                f"concept {self.name!r} has no template {index}; it has {len(self.templates)}, counted from "
                "0."
            )
        return index % len(self.templates)

    def check(self, tokenizer: Any, *, answers: bool = True) -> None:
        """Raise unless this tokenizer can show every value and tell every answer apart by its first token.

        Two values may share an answer (many to one); two *different* answers of one template may not begin
        with the same token, since the first token is what a model is scored on. `answers=False` leaves
        answers out (encoders).

        Raises:
            EditError: naming the value and the template.
        """
        unknown = getattr(tokenizer, "unk_token_id", None)
        for prompt in self.prompts():
            ids = prompt.value_ids(tokenizer)
            what = f"concept {self.name!r}: {prompt.surface!r} in {prompt.text!r}"
            if not ids:
                raise EditError(f"{what} tokenises to nothing; drop the value or write it in other words.")
            if unknown is not None and all(token == unknown for token in ids):
                raise EditError(
                    f"{what} is unknown to this tokenizer (only {tokenizer.unk_token!r}); "
                    "drop the value or write it in words that the tokenizer knows."
                )
        if answers:
            self._check_answers(tokenizer, unknown)

    def _check_answers(self, tokenizer: Any, unknown: int | None) -> None:
        for index, template in enumerate(self.templates):
            first: dict[int, str] = {}
            for prompt in self.prompts(templates=[index]) if template.answers is not None else []:
                if prompt.answer is None:
                    continue
                token = prompt.answer_ids(tokenizer)[0]
                what = (
                    f"concept {self.name!r}, {template.text!r} of {prompt.value!r}: answer {prompt.answer!r}"
                )
                if token == unknown:
                    raise EditError(
                        f"{what} opens with a token that this tokenizer does not know; reword it."
                    )
                if first.setdefault(token, prompt.answer) != prompt.answer:
                    raise EditError(
                        f"{what} opens with the same token as {first[token]!r}, so its first "
                        "token can't tell them apart; reword one, write None (null) for one, or drop the "
                        "value."
                    )

    @classmethod
    def from_yaml(cls, path: str | Path) -> Concept:
        """Read a concept from a YAML file.

        Keys: name, kind, description, values (or only forms), forms, coordinates, templates. A template is a
        text, or a mapping with `text` and `answers`; answers are a list in the order of the values or a
        mapping from value to answer. Only plain data is read: no YAML tag makes an object.

        Raises:
            EditError: naming the file, the key and the mend.
        """
        path = Path(path)
        data = read_concept(path)
        values = data["values"]
        try:
            templates = []
            for text, answers in data.pop("templates"):
                if isinstance(answers, dict):
                    strange = [value for value in answers if value not in values]
                    if strange:
                        raise EditError(
                            f"answers of {text!r} name {strange[0]!r}.{_close(strange[0], values)}"
                        )
                    answers = [answers.get(value) for value in values]
                templates.append(Template(text, answers))
            return cls(templates=templates, **data)
        except EditError as error:
            raise EditError(f"{path}: {error}") from error

    def to_yaml(self, path: str | Path) -> None:
        """Write the concept to a YAML file that `from_yaml` reads back as an equal concept."""
        write_concept(
            Path(path),
            name=self.name,
            kind=self.kind,
            description=self.description,
            values=list(self.values),
            forms=None if self.forms is None else {value: list(forms) for value, forms in self.forms.items()},
            coordinates=None if self.coordinates is None else [list(point) for point in self.coordinates],
            templates=[(template.text, template.answers) for template in self.templates],
        )


def concepts() -> list[str]:
    """Names of the built-in English concepts."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def concept(name: str) -> Concept:
    """A built-in English concept by its name.

    Raises:
        EditError: no such concept; says which names come close.
    """
    if name not in concepts():
        raise EditError(
            f"there is no built-in concept {name!r}.{_close(name, concepts())} "
            "Read one of your own with Concept.from_yaml(path)."
        )
    return Concept.from_yaml(BUILT_IN / f"{name}.yaml")


def _close(word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(map(repr, close))}?"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f" There are: {shown}."
