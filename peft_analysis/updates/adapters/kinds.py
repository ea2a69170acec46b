"""The kinds of adapters: which have a formula here, which peft merges, which are no change of weights."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import adalora, dora, ia3, loha, lokr, lora, vera
from peft_analysis.updates.adapters.change import Change
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part

Family = Callable[[Part, Foundation], Iterator[Change]]
FAMILIES: dict[str, tuple[Family, frozenset[str]]] = {
    "LORA": (lora.changes, lora.ROLES),
    "DORA": (dora.changes, dora.ROLES),
    "ADALORA": (adalora.changes, adalora.ROLES),
    "VERA": (vera.changes, vera.ROLES),
    "LOHA": (loha.changes, loha.ROLES),
    "LOKR": (lokr.changes, lokr.ROLES),
    "IA3": (ia3.changes, ia3.ROLES),
}
WHOLE = ("LN_TUNING", "TRAINABLE_TOKENS")
"""Kinds that are nothing but values stored whole."""
TOKENS_BEFORE = "it puts trained states before the tokens of a text"
NO_WEIGHTS = {
    "PROMPT_TUNING": TOKENS_BEFORE,
    "MULTITASK_PROMPT_TUNING": TOKENS_BEFORE,
    "P_TUNING": TOKENS_BEFORE,
    "PREFIX_TUNING": TOKENS_BEFORE,
    "CPT": TOKENS_BEFORE,
    "CARTRIDGE": TOKENS_BEFORE,
    "ADAPTION_PROMPT": "it adds attention to trained prompts",
    "LILY": "it mixes its factors anew for every input",
    "XLORA": "it mixes adapters anew for every token",
    "POLY": "it mixes adapters by task",
    "SHADOW": "it runs a second network beside the model",
}
VARIANTS = {
    "arrow_config": "Arrow chooses among adapters anew for every token",
    "alora_invocation_tokens": "an activated LoRA acts only from its invocation tokens on",
    "use_qalora": "QA-LoRA acts on inputs averaged in groups, for a quantised base",
    "layer_replication": "its layers are copies of the base's layers, which do not exist in the base",
}
THROUGH_PEFT = ("use_bdlora", "kasa_config")
"""Settings of LoRAs whose factors are not B and A alone."""


def kind_of(settings: Mapping[str, Any]) -> str:
    """The kind of an adapter: peft's name, "DORA" for a LoRA with magnitudes.

    Raises:
        UpdateError: for a kind that is no change of weights, with the reason.
    """
    kind = str(getattr(settings.get("peft_type"), "value", settings.get("peft_type"))).upper()
    if kind in NO_WEIGHTS:
        raise UpdateError(f"{kind} is no change of weights: {NO_WEIGHTS[kind]}")
    for setting, why in VARIANTS.items():
        if settings.get(setting):
            raise UpdateError(f"{kind} with {setting} is no change of the base's weights: {why}")
    if kind == "LORA":
        return "DORA" if settings.get("use_dora") else kind
    return kind


def has_formula(kind: str, settings: Mapping[str, Any]) -> bool:
    """Whether a kind is worked out here; the others go through peft's own layers."""
    return (kind in FAMILIES or kind in WHOLE) and not any(settings.get(name) for name in THROUGH_PEFT)


IGNORED = ("lora_velora", "lora_monteclora")
"""Starts of names of what serves training alone and is not merged."""
