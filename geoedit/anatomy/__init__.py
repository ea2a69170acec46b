"""Where the parts of any model are: blocks, streams, heads, norms, embeddings."""

from geoedit.anatomy.find import anatomy
from geoedit.anatomy.parts import STREAMS, Anatomy, Block, Location, Stack

__all__ = ["STREAMS", "Anatomy", "Block", "Location", "Stack", "anatomy"]
