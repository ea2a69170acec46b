"""Pipelines seen through their denoiser, whatever their family."""

from __future__ import annotations

from typing import Any

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bases.flux import FluxBase
from geoedit.sliders.bases.joint import JointBase
from geoedit.sliders.bases.sdxl import SDXLBase
from geoedit.sliders.bases.unet import UNetBase

__all__ = ["Base", "Conditioning", "base_of"]


def base_of(pipe: Any) -> Base:
    """Find a pipeline's family by its parts and their configs, never by its name.

    A base is read once: its scheduler is the pipeline's at this moment.

    Raises:
        EditError: no denoiser or no scheduler is there, or the denoiser wants input that sliders do not know
            (a mask, an image, a class); the message says which.
    """
    if isinstance(pipe, Base):
        return pipe
    if getattr(pipe, "scheduler", None) is None:
        raise EditError(
            f"{type(pipe).__name__} has no scheduler: a base is a whole pipeline (denoiser, scheduler, and "
            "what encodes words and pixels)"
        )
    transformer = getattr(pipe, "transformer", None)
    unet = getattr(pipe, "unet", None)
    if transformer is not None:
        config = transformer.config
        if "joint_attention_dim" in config and "pooled_projection_dim" in config:
            return FluxBase(pipe) if "axes_dims_rope" in config else JointBase(pipe)
        raise EditError(
            f"a transformer ({type(transformer).__name__}) whose config lacks joint_attention_dim or "
            "pooled_projection_dim: known are Stable Diffusion 3's and Flux's kinds"
        )
    if unet is not None:
        return SDXLBase(pipe) if unet.config.get("addition_embed_type") == "text_time" else UNetBase(pipe)
    raise EditError(f"{type(pipe).__name__} has neither a unet nor a transformer: there is nothing to slide")
