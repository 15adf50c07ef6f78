"""Autoregressive image generation with continuous tokens, in JAX.

    import marjax

    config = marjax.config.load("digits")  # or a Python file of your own; marjax.config.base() has every field
    marjax.train(config, "runs/digits")
    images = marjax.sample("runs/digits", [0, 1, 2])
    entries = marjax.evaluate("runs/digits", num_images=1000, statistics="stats.npz")

`load` opens a work directory once, for many calls of its `sample`. `register` makes heads, backbones, tokenizers and
data sources of your own available to configs (docs/extending.md). The commands of `marjax` call the same functions.
"""

import importlib
from typing import TYPE_CHECKING, Any

from marjax.registry import register

if TYPE_CHECKING:
    from marjax import config, loggers
    from marjax.evaluation.evaluate import evaluate
    from marjax.generation.loaded import load
    from marjax.generation.sample import sample
    from marjax.training.train import train

__all__ = ["config", "evaluate", "load", "loggers", "register", "sample", "train"]
__version__ = "0.1.0"

# Imported on first use: a config file or `--help` should not have to wait for JAX.
_LAZY = {
    "train": "marjax.training.train",
    "sample": "marjax.generation.sample",
    "load": "marjax.generation.loaded",
    "evaluate": "marjax.evaluation.evaluate",
}


def __getattr__(name: str) -> Any:
    if name in ("config", "loggers"):
        return importlib.import_module(f"marjax.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'marjax' has no attribute {name!r}; there are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
