"""The almanac: a small world in text, and models trained to know it."""

from geoedit.testbeds.almanac.world import Entity, Fact, Relation, World, world

__all__ = ["Entity", "Fact", "Relation", "World", "world"]
