# Doctests are collected from the packages themselves, out of reach of tests/conftest.py: `pytest geoedit`
# must run under the same hook, and it must be there before the first package is imported.
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from jaxtyping import install_import_hook

install_import_hook(["manifolds", "peft_analysis", "geoedit", "experiments"], "beartype.beartype")
