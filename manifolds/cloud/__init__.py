"""Manifolds learned from samples: neighbours, local charts, and what is built on them."""
