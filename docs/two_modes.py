"""Draws docs/two_modes.png: why a token needs a distribution. `python docs/two_modes.py` (needs matplotlib).

One token of two values; two classes with two modes each. The same backbone is trained with the regression head and with
the diffusion head. The figure compares them with the best single Gaussian per class, the optimum of a network that
predicts a mean and a covariance.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from marjax import config as config_lib
from marjax import numerics
from marjax.assembly import model_config
from marjax.generation.plan import Stage
from marjax.generation.sampler import draw_randomness, generate
from marjax.models import generator as generator_lib
from marjax.models.init import init_unboxed
from marjax.training.step import loss_and_grads

# (class, mode, value): modes are 0.9 to either side of a class's mean.
MEANS = np.array([[0.2, 0.0], [-0.2, 0.3]])
MODES = MEANS[:, None] + 0.9 * np.array([[[1.0, 0.0], [-1.0, 0.0]], [[0.6, 0.8], [-0.6, -0.8]]])
SPREAD = 0.08  # standard deviation of a mode


def draw_data(seed: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens float32 (n, 1, 2) and their classes int32 (n,)."""
    rng = np.random.default_rng(seed)
    labels, mode = rng.integers(0, 2, n), rng.integers(0, 2, n)
    points = MODES[labels, mode] + SPREAD * rng.standard_normal((n, 2))
    return points[:, None].astype(np.float32), labels.astype(np.int32)


def fit_and_sample(head: str, n: int = 1000, steps: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """Trains a model with this head on the data and draws n samples (n, 2); also returns their classes (n,)."""
    config = config_lib.base()
    config.model.update(
        variant="ar",
        head=head,
        width=64,
        encoder_depth=1,
        decoder_depth=1,
        num_heads=2,
        attn_dropout=0.0,
        proj_dropout=0.0,
        dtype="float32",
    )
    config.model.denoiser.update(depth=3, width=64)
    generator = generator_lib.build(model_config(config.model), num_tokens=1, token_dim=2, num_classes=2)
    optimizer = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.0)
    params = jax.jit(lambda key: init_unboxed(generator, key))(numerics.key(0))

    def step(carry, inputs):
        (params, opt_state), (i, tokens, labels) = carry, inputs
        rand = generator.draw_loss_randomness(jax.random.fold_in(numerics.key(1), i), len(labels))
        _, grads = loss_and_grads(generator, params, tokens, labels, rand, numerics.key(2))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    tokens, labels = draw_data(0, 128 * steps)
    batches = jnp.arange(steps), tokens.reshape(steps, 128, 1, 2), labels.reshape(steps, 128)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, optimizer.init(params)))
    labels = jnp.arange(n) % 2

    @jax.jit
    def sample(params):
        rand = draw_randomness(generator, 0, jnp.arange(n), "ddim25")
        return generate(
            generator,
            params,
            labels,
            rand,
            None,
            jnp.float32(1.0),
            stages=(Stage(0, (0,), (1,), 1),),
            num_sampling_steps="ddim25",
        )

    return np.asarray(sample(params)[:, 0]), np.asarray(labels)


def single_gaussian(n: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """Draws n samples (n, 2) from the Gaussians of their classes, fitted to the data; also returns the classes (n,)."""
    tokens, classes = draw_data(0, 20_000)
    labels = np.arange(n) % 2
    rng = np.random.default_rng(1)
    fits = [(tokens[classes == c, 0].mean(0), np.cov(tokens[classes == c, 0].T)) for c in (0, 1)]
    return np.stack([rng.multivariate_normal(*fits[c]) for c in labels]), labels


def near_a_mode(points: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The mode of its class within four standard deviations of a point: 0, 1, or -1 for none."""
    distance = np.linalg.norm(points[:, None] - MODES[labels], axis=-1)
    return np.where(distance.min(1) < 4 * SPREAD, distance.argmin(1), -1)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens, classes = draw_data(7, 1000)
    panels = {
        "data": (tokens[:, 0], classes),
        "regression (L2)": fit_and_sample("regression"),
        "one Gaussian": single_gaussian(),
        "diffusion": fit_and_sample("diffusion"),
    }
    figure, axes = plt.subplots(1, 4, figsize=(11, 3), sharex=True, sharey=True, layout="constrained")
    for axis, (title, (points, labels)) in zip(axes, panels.items(), strict=True):
        for c, colour in enumerate(("tab:blue", "tab:orange")):
            axis.scatter(*points[labels == c].T, s=4, color=colour, alpha=0.6, linewidths=0)
        axis.set_title(f"{title}\n{(near_a_mode(points, labels) >= 0).mean():.0%} near a mode", fontsize=10)
        axis.set_aspect("equal")
    figure.savefig(pathlib.Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
