"""The libraries that ours is compared with; optional, so that nothing else needs them."""

import importlib
from typing import Any


def require(name: str) -> Any:
    """The peer's module, or an error that says how to get it."""
    try:
        module = importlib.import_module(name)
        if name == "pymanopt":
            importlib.import_module("pymanopt.manifolds.fixed_rank")
        return module
    except ImportError as missing:
        raise ImportError(f"this benchmark compares with {name}: pip install 'geoedit[bench]'") from missing
