# Doctests are collected from the packages themselves, out of reach of tests/conftest.py: `pytest geoedit`
# must run under the same hook, and it must be there before the first package is imported.
import inspect
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import torch


class OffWhileCompiling(type(jaxtyping.config)):
    """The checks of shapes stand aside while `torch.compile` traces: it cannot look into them."""

    jaxtyping_disable = property(lambda self: torch.compiler.is_compiling())


def unwrap_rules(cls: type[torch.autograd.Function]) -> None:
    """`torch.compile` gets at the rules of an autograd function where it cannot look through a wrapper."""
    for name in {"forward", "setup_context", "backward", "jvp", "vmap"} & vars(cls).keys():
        setattr(cls, name, staticmethod(inspect.unwrap(getattr(cls, name))))


torch.autograd.Function.__init_subclass__ = classmethod(unwrap_rules)
jaxtyping.config.__class__ = OffWhileCompiling
jaxtyping.install_import_hook(["manifolds", "peft_analysis", "geoedit", "experiments"], "beartype.beartype")
