"""Drawn shapes whose every attribute is known, and two small text-to-image pipelines that draw them."""

from geoedit.testbeds.shapes.digits import digits
from geoedit.testbeds.shapes.render import render
from geoedit.testbeds.shapes.world import ATTRIBUTES, CLASSES, Attribute, caption, sample

__all__ = ["ATTRIBUTES", "CLASSES", "Attribute", "caption", "digits", "render", "sample"]
