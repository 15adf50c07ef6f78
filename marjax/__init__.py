"""Autoregressive image generation with continuous tokens, in JAX.

`train(config, workdir)` and `sample(workdir, labels)` are what the commands of the same names call.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from marjax.generation.sample import sample
    from marjax.training.loop import train

__all__ = ["sample", "train"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported on first use: a config file or `--help` should not have to wait for JAX.
    if name == "train":
        from marjax.training.loop import train

        return train
    if name == "sample":
        from marjax.generation.sample import sample

        return sample
    raise AttributeError(f"module 'marjax' has no attribute {name!r}")
