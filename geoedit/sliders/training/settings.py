"""How a slider is trained: every number that decides the result, in one value."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from geoedit.errors import EditError


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Every number that decides what a training run gives.

    Attributes:
        rank: rank of the LoRA.
        alpha: the change is alpha / rank · B A; the rank if None.
        targets: which layers: one name or several to be joined.
        rank_pattern: ranks by regular expression on a layer's path, as in peft.
        alpha_pattern: alphas, likewise.
        learning_rate: peak rate; that of `geometry.LEARNING_RATES` for the optimizer if None.
        warmup: steps of the linear rise.
        decay: the rate afterwards: "constant"; "root", falling as 1/√step, which does not depend on how many
            steps there will be; or "cosine", down to a tenth at the last step.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        optimizer: "adamw" on the factors, or "low_rank_adam" on the fixed-rank manifold (see `geometry`).
        average: decay of the running mean of the factors, which is what is kept; 0 keeps the last ones.
        guidance: how far the target goes beyond the difference of the prompts: η in ε(neutral) + s η Δε.
        scale_max: scales in training are drawn up to this size.
        scale_law: "uniform" draws each scale's size, "ends" trains at the largest size only.
        bipolar: each drawn latent is trained at both signs.
        rescale: a target is brought to the norm of the neutral prediction.
        min_snr: γ of the weight min(SNR, γ) / SNR; infinity weighs all times alike.
        preserve: weight of the rows in which the slider should change nothing (unrelated prompts).
        preserve_rows: share of such rows in a batch.
        on_policy: share of trajectories in the cache that are drawn with the slider at work.
        cache: trajectories in the cache.
        refresh: steps after which a part of the cache is drawn anew; 0 never.
        refresh_share: share of the cache that one refresh draws anew.
        trajectory_steps: sampling steps of a trajectory.
        kept: latents that are kept of each trajectory.
        trajectory_guidance: guidance of a trajectory.
        accumulate: parts in which a batch goes through the model, one after another.
        autocast: "bfloat16" for the student's pass; None computes in the model's own type.
        checkpointing: recompute activations in the backward pass.
        compile: compile the denoiser.
        published: use the published trainer's loss and step (see `published`).
        published_timestep: "off" evaluates at the published code's timestep, "own" at that of the latent.
        project: keep of the slider's effect what is tangent to the image manifold (see `geometry`).
    """

    rank: int = 4
    alpha: float | int | None = None
    targets: str | Sequence[str] = "full"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = field(default_factory=dict)
    learning_rate: float | int | None = None
    warmup: int = 10
    decay: Literal["constant", "root", "cosine"] = "root"
    weight_decay: float | int = 0.0
    clip: float | int = 1.0
    optimizer: Literal["adamw", "low_rank_adam"] = "adamw"
    average: float | int = 0.0
    guidance: float | int = 1.0
    scale_max: float | int = 1.0
    scale_law: Literal["uniform", "ends"] = "uniform"
    bipolar: bool = True
    rescale: bool = True
    min_snr: float | int = 5.0
    preserve: float | int = 1.0
    preserve_rows: float | int = 0.25
    on_policy: float | int = 0.5
    cache: int = 16
    refresh: int = 50
    refresh_share: float | int = 0.25
    trajectory_steps: int = 20
    kept: int = 10
    trajectory_guidance: float | int = 3.0
    accumulate: int = 1
    autocast: Literal["bfloat16"] | None = None
    checkpointing: bool = False
    compile: bool = False
    published: bool = False
    published_timestep: Literal["off", "own"] = "off"
    project: bool = False

    def __post_init__(self) -> None:
        positive = ("rank", "clip", "scale_max", "min_snr", "cache", "trajectory_steps", "kept")
        for name in (*positive, "accumulate"):
            if not getattr(self, name) > 0:
                raise EditError(f"TrainSettings: {name} is {getattr(self, name)}; it must be above 0")
        for name in ("warmup", "weight_decay", "preserve", "refresh"):
            if not getattr(self, name) >= 0:
                raise EditError(f"TrainSettings: {name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("average", "preserve_rows", "on_policy", "refresh_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise EditError(f"TrainSettings: {name} is {getattr(self, name)}; it is a share from 0 to 1")
        if not math.isfinite(self.guidance) or self.guidance == 0:
            raise EditError(f"TrainSettings: guidance is {self.guidance}; it must be a number that is not 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {
            name: (None if value == math.inf else list(value) if isinstance(value, tuple) else value)
            for name, value in dataclasses.asdict(self).items()
        }

    def digest(self) -> str:
        """A hash of all fields, by which a resumed run knows its own."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
