"""Where the parts of a model are: blocks, streams, heads, norms, embeddings, found by structure and behaviour."""

from geoedit.anatomy.find import anatomy
from geoedit.anatomy.parts import STREAMS, Anatomy, Block, Location, Stack

__all__ = ["STREAMS", "Anatomy", "Block", "Location", "Stack", "anatomy"]
