"""Concept sliders: LoRAs that move one attribute of what a model draws or says, up and down."""

from geoedit.sliders.slider import ModuleChange, Scaled, Slider

__all__ = ["ModuleChange", "Scaled", "Slider"]
