"""What a slider is asked to be: prompts, image pairs or a direction, and what must stay as it is."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any, Literal, get_args

from geoedit.errors import EditError

Kind = Literal["text", "pairs", "direction", "language"]
Action = Literal["enhance", "erase"]
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class Prompts:
    """One set of prompts that a text slider learns from.

    The slider at scale s is to turn the prediction for `target` into
    ``ε(neutral) ± s η (ε(positive) − ε(negative))``, plus for "enhance", minus for "erase".

    Attributes:
        target: the prompt that the slider is trained on.
        positive: its upper end.
        negative: its lower end ("unconditional" in the published files).
        neutral: where the target starts from; the published files may take another than the target.
        action: "enhance", or "erase" for a slider that points the other way.
        guidance: η, or None for that of the settings.
        resolution: side of the images in pixels; None for the pipeline's own.
        dynamic_resolution: whether sides are drawn from half of the resolution upwards.
        batch_size: images in a step of the published trainer.
    """

    target: str
    positive: str
    negative: str
    neutral: str
    action: str = "enhance"
    guidance: float | int | None = None
    resolution: int | None = None
    dynamic_resolution: bool = False
    batch_size: int = 1

    def filled(self, words: Mapping[str, str]) -> Prompts:
        """The same prompts in a context: a word for each attribute that must stay (see `fill`)."""
        return replace(
            self,
            target=fill(self.target, words),
            positive=fill(self.positive, words),
            negative=fill(self.negative, words),
            neutral=fill(self.neutral, words),
        )


@dataclass(frozen=True, kw_only=True)
class SliderSpec:
    """What a slider is asked to be.

    A text slider needs `positive` and `negative` and a `target` (or `neutral`) to change. Words that must
    stay as they are go to `preserve`: each is given in all four prompts at once, so that their difference
    has none of it. A prompt says where they stand, ``"a {hue} {shape}"``; where it does not, they follow the
    article, or come first.

    Attributes:
        name: what the slider moves; file-name friendly.
        kind: "text", "pairs", "direction" or "language"; found from what is given.
        target: the prompt that the slider is trained on; `neutral` if None.
        positive: the upper end.
        negative: the lower end.
        neutral: what the ends are compared with; `target` if None.
        action: "enhance", or "erase" for a slider that points the other way.
        guidance: how far scale 1 goes along the difference of the ends; that of the settings if None.
        resolution: side of the images in pixels; the pipeline's own if None.
        preserve: words by the attribute that must stay, such as ``{"hue": ["red", "blue"]}``; a plain list is
            one attribute. The empty word leaves the attribute unsaid.
        unrelated: prompts that the slider must leave alone.
        more: further sets of prompts; steps take one set or the other.
        pairs: for image pairs: what H's `PairTask` reads, such as folders by level.
        direction: for a latent direction: what `DirectionTask` reads.
        train: settings of the training run that belong to the spec (fields of `TrainSettings`, and "steps",
            "batch_size"); what the caller gives to `train` goes before them.
        published: read by the published trainer's rules, under which a prompt may be empty.

    Raises:
        EditError: a prompt is missing or empty, both ends are the same, a placeholder has no words, ….

    Example:
        >>> spec = SliderSpec(
        ...     target="a {hue} shape",
        ...     positive="a large {hue} shape",
        ...     negative="a small {hue} shape",
        ...     preserve={"hue": ["red", "blue"]},
        ... )
        >>> [prompts.positive for prompts in spec.contexts()]
        ['a large red shape', 'a large blue shape']
    """

    name: str = ""
    kind: str | None = None
    target: str | None = None
    positive: str | None = None
    negative: str | None = None
    neutral: str | None = None
    action: str = "enhance"
    guidance: float | int | None = None
    resolution: int | None = None
    preserve: Mapping[str, Sequence[str]] | Sequence[str] = field(default_factory=dict)
    unrelated: Sequence[str] = ()
    more: Sequence[Prompts] = ()
    pairs: Any = None
    direction: Any = None
    train: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False

    def __post_init__(self) -> None:
        given = {"pairs": self.pairs is not None, "direction": self.direction is not None}
        found = next((kind for kind, there in given.items() if there), "text")
        self._set(kind=self.kind or found)
        if self.kind not in get_args(Kind):
            raise EditError(f"spec {self.name!r}: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if self.action not in get_args(Action):
            raise EditError(f"spec {self.name!r}: action is {self.action!r}; it is 'enhance' or 'erase'")
        preserve = self.preserve
        if isinstance(preserve, str):
            raise EditError(f"spec {self.name!r}: preserve is the text {preserve!r}; give a list of words")
        if not isinstance(preserve, Mapping):
            preserve = {"": tuple(preserve)} if preserve else {}
        self._set(
            preserve={
                key: _texts(words, f"preserve {key!r}", self, empty=False) for key, words in preserve.items()
            }
        )
        self._set(unrelated=_texts(self.unrelated, "unrelated", self), more=tuple(self.more))
        if self.kind in ("text", "language"):
            self._complete_prompts()
        if not self.name:
            self._set(name=_name(self.positive or self.target or self.kind or "slider"))

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _complete_prompts(self) -> None:
        """Fill the prompts that follow from others, and refuse what cannot be learned from."""
        self._set(target=self.target if self.target is not None else self.neutral)
        self._set(neutral=self.neutral if self.neutral is not None else self.target)
        for name in ("target", "positive", "negative", "neutral"):
            value = getattr(self, name)
            if value is None:
                raise EditError(f"spec {self.name!r}: {name!r} is missing; a {self.kind} slider needs it")
            if not isinstance(value, str):
                raise EditError(f"spec {self.name!r}: {name!r} is {value!r}; it is a text")
        for prompts in self.prompts:
            for name in ("target", "positive", "negative", "neutral"):
                if not self.published and not getattr(prompts, name).strip():
                    raise EditError(
                        f"spec {self.name!r}: {name!r} is an empty prompt; say what is drawn, or leave it "
                        "out where it follows from the others"
                    )
            if prompts.positive == prompts.negative:
                raise EditError(
                    f"spec {self.name!r}: positive and negative are both {prompts.positive!r}; "
                    "a slider needs two different ends"
                )
            if prompts.guidance is not None and not abs(prompts.guidance) > 0:
                raise EditError(f"spec {self.name!r}: guidance is {prompts.guidance}; it must not be 0")
            known = set(self.preserve)
            for name in ("target", "positive", "negative", "neutral"):
                missing = _named(getattr(prompts, name)) - known
                if missing:
                    raise EditError(
                        f"spec {self.name!r}: {name!r} has the placeholder {{{min(missing)}}}, for which "
                        "'preserve' gives no words"
                    )

    @property
    def prompts(self) -> tuple[Prompts, ...]:
        """All sets of prompts, with their placeholders.

        Raises:
            EditError: the spec has none, being of another kind.
        """
        if None in (self.target, self.positive, self.negative, self.neutral):
            raise EditError(f"spec {self.name!r} is of kind {self.kind!r} and has no prompts")
        first = Prompts(
            str(self.target),
            str(self.positive),
            str(self.negative),
            str(self.neutral),
            self.action,
            self.guidance,
            self.resolution,
        )
        return (first, *self.more)

    def contexts(self) -> Iterator[Prompts]:
        """Every set of prompts in every context: all combinations of the words that must stay."""
        preserve: Mapping[str, Sequence[str]] = self.preserve  # type: ignore[assignment]
        for prompts in self.prompts:
            for words in itertools.product(*preserve.values()):
                yield prompts.filled(dict(zip(preserve, words, strict=True)))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SliderSpec:
        """Read a spec from YAML: ours, or the prompts or config file of the published trainer, unchanged.

        Raises:
            EditError: naming the file, the key and its line.
        """
        from geoedit.sliders.spec_yaml import read_spec

        return read_spec(path)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the spec as YAML that `load` reads back as an equal one."""
        from geoedit.sliders.spec_yaml import write_spec

        write_spec(self, path)

    def to_dict(self) -> dict[str, Any]:
        """Every field that is not at its default, as plain JSON values.

        Raises:
            EditError: a field holds what a file cannot, such as images in memory.
        """
        from geoedit.sliders.spec_yaml import plain

        return {
            item.name: plain(value, f"spec {self.name!r}: {item.name}")
            for item in fields(self)
            if (value := getattr(self, item.name)) is not None and value not in ("", (), {}, [], False)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SliderSpec:
        """Rebuild from `to_dict`.

        Raises:
            EditError: a key is unknown.
        """
        known = {item.name for item in fields(cls)}
        for key in values:
            if key not in known:
                raise EditError(f"spec: key {key!r} is unknown; the keys are {', '.join(sorted(known))}")
        more = [Prompts(**item) if isinstance(item, Mapping) else item for item in values.get("more", ())]
        return cls(**{**values, "more": more})


def fill(prompt: str, words: Mapping[str, str]) -> str:
    """Put words into a prompt: at their placeholders, else after the article, else first.

    >>> fill("a large {hue} shape", {"hue": "red"}), fill("a large shape", {"hue": "orange"})
    ('a large red shape', 'an orange large shape')
    >>> fill("person, smiling", {"": "old"})
    'old person, smiling'
    """
    if not words:
        return prompt
    named = _named(prompt)
    for name in named:
        prompt = prompt.replace(f"{{{name}}}", words.get(name, ""))
    loose = [word for name, word in words.items() if name not in named and word]
    first, *rest = prompt.split() or [""]
    if first.lower() in _ARTICLES and rest:
        rest = [*loose, *rest]
        if first in ("a", "an"):
            first = "an" if rest[0][0] in "aeiou" else "a"
        return " ".join([first, *rest])
    return " ".join([*loose, first, *rest]).strip()


def _named(prompt: str) -> set[str]:
    """The names of a prompt's placeholders; "" for a bare pair of braces."""
    return set(re.findall(r"\{(\w*)\}", prompt))


def _texts(words: Any, what: str, spec: SliderSpec, *, empty: bool = True) -> tuple[str, ...]:
    """A tuple of texts, without repeats."""
    if isinstance(words, str) or not all(isinstance(word, str) for word in words):
        raise EditError(f"spec {spec.name!r}: {what} is {words!r}; give a list of texts")
    if not words and not empty:
        raise EditError(f"spec {spec.name!r}: {what} has no words; leave the attribute out")
    return tuple(dict.fromkeys(words))


def _name(text: str) -> str:
    """A name for files from a prompt."""
    return re.sub(r"[^\w]+", "-", text.lower()).strip("-")[:40] or "slider"
