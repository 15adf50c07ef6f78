"""Measures how much context models of table 1 in small use: `python docs/table1_small_probe.py ROOT`, a sweep's root.

Some patches of real digits are given, and the head draws every other patch once. The share of patches drawn correctly,
as background or stroke, measures the information in z without accumulated errors of earlier steps.
"""

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from marjax import config as config_lib
from marjax import numerics
from marjax.data.sources import open_source
from marjax.generation.sample import open_sampler
from marjax.generation.sampler import draw_randomness
from marjax.models.generator import Classes
from marjax.workdir import read_workdir

NUM_IMAGES = 1000


def is_background(tokens: np.ndarray) -> np.ndarray:
    """bool (B, L): no pixel of the patch is brighter than 32 of 255."""
    return tokens.max(-1) <= 32 / 127.5 - 1.0


def probe(workdir: pathlib.Path, step: int, known: float, temperature: float = 1.0) -> tuple[float, float, float]:
    """Shares of the unknown patches: real background, drawn background, drawn correctly (background or stroke)."""
    config = read_workdir(workdir)
    sampler, params, *_ = open_sampler(workdir, step=step, cfg=1.0)
    tokenizer, tokens = sampler.tokenizer, sampler.tokens
    generator = sampler.generator.with_codebook(tokenizer.codebook(tokenizer.params))
    source = open_source(config_lib.data_config(config))
    images = np.stack([source[i]["image"] for i in range(NUM_IMAGES)]).astype(np.float32) / 127.5 - 1.0
    labels = jnp.array([source[i]["label"] for i in range(NUM_IMAGES)])
    rand = draw_randomness(generator, 0, jnp.arange(NUM_IMAGES), "ddim25")
    num_known = jnp.full(NUM_IMAGES, int(known * tokens.num_tokens))

    @jax.jit
    def draw(params: Any) -> tuple[jax.Array, jax.Array]:
        latent = tokenizer.encode(tokenizer.params, images, numerics.key(0))
        real = tokens.patchify(latent)
        z = generator.apply(
            {"params": params},
            real,
            Classes(labels, jnp.zeros(NUM_IMAGES, bool)),
            rand.order,
            num_known,
            method="backbone_output",
        )
        head: Any = generator.bind({"params": params}).head
        return real, head.sample(z, rand.head, None, num_sampling_steps="ddim25", temperature=temperature)

    real, drawn = (is_background(np.asarray(x)) for x in draw(params))
    unknown = np.argsort(np.asarray(rand.order), axis=1) >= np.asarray(num_known)[:, None]
    return float(real[unknown].mean()), float(drawn[unknown].mean()), float((real == drawn)[unknown].mean())


def main() -> None:
    root = pathlib.Path(sys.argv[1])
    for known, steps in ((0.0, [5000]), (0.3, range(1000, 5001, 1000))):
        for name in ("mar", "mar_ce", "mar_quantised", "mar_cosine", "mar_wide", "random_ar", "random_ar_ce"):
            for step in steps if name in ("mar", "mar_ce") else [5000]:
                real, drawn, right = probe(root / name, step, known)
                print(
                    f"{known:.0%} known, {name}, step {step}: background {real:.1%} real, {drawn:.1%} drawn; "
                    f"{right:.1%} drawn correctly",
                    flush=True,
                )


if __name__ == "__main__":
    main()
