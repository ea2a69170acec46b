"""Sliders in files: LoRAs as diffusers, kohya's scripts and peft write them, and what of them is read."""

from geoedit.sliders.files.read import load
from geoedit.sliders.files.write import save

__all__ = ["load", "save"]
