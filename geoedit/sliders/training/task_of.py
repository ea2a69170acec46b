"""Which task a spec means: one of words, pictures, directions or language."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.task import Task


def make_task(
    pipe: Any, spec: SliderSpec, *, batch_size: int, settings: TrainSettings, tokenizer: Any = None
) -> Task:
    """The task that a spec means for a pipeline or a language model.

    Raises:
        EditError: the spec's kind does not fit what is to be trained.
    """
    if isinstance(pipe, nn.Module):
        from geoedit.sliders.training.language import LanguageTask

        if spec.kind not in ("text", "language"):
            raise EditError(f"a {spec.kind} slider needs a pipeline; {type(pipe).__name__} is a model")
        if tokenizer is None:
            raise EditError(f"a slider of a {type(pipe).__name__} needs its tokenizer: pass tokenizer=…")
        return LanguageTask(pipe, tokenizer, replace(spec, kind="language"), batch_size=batch_size)
    base = base_of(pipe)
    # Guidance has two halves, and a slider that is in one of them only is multiplied by it.
    prompts = tuple(dict.fromkeys([*([spec.target] if spec.target else []), *spec.unrelated, ""]))
    if spec.kind == "pairs":
        from geoedit.sliders.training.pairs import PairTask, read_pairs

        pairs = read_pairs(spec.pairs, base)
        return PairTask(base, pairs, prompts=prompts, batch_size=batch_size, name=spec.name)
    if spec.kind == "direction":
        from geoedit.sliders.training.direction import DirectionTask

        return DirectionTask(base, spec.direction, prompts=prompts, batch_size=batch_size, name=spec.name)
    if spec.kind == "language":
        raise EditError(
            f"spec {spec.name!r} is for a language model; {type(base.pipe).__name__} is a pipeline"
        )
    if settings.published:
        from geoedit.sliders.training.published import PublishedTask

        return PublishedTask(base, spec, batch_size=batch_size)
    from geoedit.sliders.training.text import TextTask

    return TextTask(base, spec, batch_size=batch_size)
