"""Gaussian diffusion of tokens: noise schedule, per-token loss and ancestral sampler, as pure functions.

Follows improved DDPM (Nichol and Dhariwal 2021, arXiv 2102.09672: cosine schedule, learned interpolated variance,
hybrid loss, respaced steps), applied to each token (paper, section 3). The denoising network is an argument.

Shapes: `...` leading axes of tokens, D token dimension, K timesteps of a chain.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from marjax.heads import cfg

# Maps original timesteps, int32 (n,), to a function (x float32 (..., D), i int32 ()) -> (..., 2 D): the predicted noise
# and interpolation of the log variance at the i-th of them.
MakeDenoise = Callable[[jax.Array], Callable[[jax.Array, jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """A (possibly respaced) chain: betas and derived tables, float64 (K,), and original timesteps, int64 (K,)."""

    timestep_map: np.ndarray
    betas: np.ndarray

    @functools.cached_property
    def alphas_cumprod(self) -> np.ndarray:
        return np.cumprod(1.0 - self.betas)

    @functools.cached_property
    def alphas_cumprod_prev(self) -> np.ndarray:
        return np.append(1.0, self.alphas_cumprod[:-1])

    @functools.cached_property
    def posterior_log_variance_clipped(self) -> np.ndarray:
        """Log variance of q(x_{t-1} | x_t, x_0); at t = 0, where it is -inf, the value at t = 1."""
        variance = self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        logs: np.ndarray = np.log(self.betas if len(variance) == 1 else np.append(variance[1], variance[1:]))
        return logs

    @functools.cached_property
    def posterior_mean_coef1(self) -> np.ndarray:
        """Weight of x_0 in the posterior mean."""
        weight: np.ndarray = self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)
        return weight

    @functools.cached_property
    def posterior_mean_coef2(self) -> np.ndarray:
        """Weight of x_t in the posterior mean."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @functools.cached_property
    def tables(self) -> dict[str, np.ndarray]:
        """The tables that loss and sampler index by timestep, float32 (K,) each."""
        tables = dict(
            sqrt_alphas_cumprod=np.sqrt(self.alphas_cumprod),
            sqrt_one_minus_alphas_cumprod=np.sqrt(1.0 - self.alphas_cumprod),
            sqrt_recip_alphas_cumprod=np.sqrt(1.0 / self.alphas_cumprod),
            sqrt_recipm1_alphas_cumprod=np.sqrt(1.0 / self.alphas_cumprod - 1.0),
            posterior_mean_coef1=self.posterior_mean_coef1,
            posterior_mean_coef2=self.posterior_mean_coef2,
            min_log_variance=self.posterior_log_variance_clipped,
            max_log_variance=np.log(self.betas),
        )
        return {name: table.astype(np.float32) for name, table in tables.items()}


def cosine_schedule(num_steps: int = 1000) -> Schedule:
    """The cosine schedule with betas capped at 0.999 (improved DDPM, equation 17)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - alpha_bar((i + 1) / num_steps) / alpha_bar(i / num_steps), 0.999) for i in range(num_steps)]
    return Schedule(np.arange(num_steps), np.array(betas))


def respaced_timesteps(num_steps: int, spacing: int | str) -> np.ndarray:
    """The original timesteps kept by a shorter chain: int64 (K,), increasing.

    An integer K keeps K evenly spaced steps, both ends included; "ddimK" keeps K steps at a fixed integer stride.

    Raises:
      ValueError: not a positive integer or "ddimK", K exceeds `num_steps`, or no integer stride gives K steps.
    """
    text = str(spacing)
    digits = text.removeprefix("ddim")
    if not digits.isdecimal() or not 1 <= int(digits) <= num_steps:
        raise ValueError(
            f"num_sampling_steps={spacing!r} is invalid; use 1 to {num_steps}, or 'ddimK' such as 'ddim50'"
        )
    count = int(digits)
    if text.startswith("ddim"):
        for stride in range(1, num_steps + 1):
            if len(range(0, num_steps, stride)) == count:
                return np.arange(0, num_steps, stride)
        raise ValueError(f"num_sampling_steps={spacing!r}: no integer stride keeps {count} of {num_steps} steps")
    stride_ = (num_steps - 1) / (count - 1) if count > 1 else 1.0
    position, steps = 0.0, []
    for _ in range(count):  # accumulated as in the reference, so that ties round alike
        steps.append(round(position))
        position += stride_
    return np.array(steps)


@functools.lru_cache(maxsize=32)
def respace(num_steps: int, spacing: int | str) -> Schedule:
    """The schedule of the chain restricted to `respaced_timesteps`, with the same marginals."""
    base = cosine_schedule(num_steps)
    kept = respaced_timesteps(num_steps, spacing)
    marginals = base.alphas_cumprod[kept]
    return Schedule(kept, 1.0 - marginals / np.append(1.0, marginals[:-1]))


class LossNoise(NamedTuple):
    """The randomness of the loss: `t` int32 (...) in [0, K), `noise` float32 (..., D)."""

    t: jax.Array
    noise: jax.Array


def draw_loss_noise(key: jax.Array, shape: tuple[int, ...], num_steps: int) -> LossNoise:
    """Draws a timestep and noise per token of `shape` (..., D)."""
    key_t, key_noise = jax.random.split(key)
    return LossNoise(jax.random.randint(key_t, shape[:-1], 0, num_steps), jax.random.normal(key_noise, shape))


def add_noise(schedule: Schedule, tokens: jax.Array, rand: LossNoise) -> jax.Array:
    """Samples q(x_t | x_0) with the given noise: float32 (..., D); `tokens` broadcast against the noise."""
    signal = _at(schedule, "sqrt_alphas_cumprod", rand.t)
    return signal * tokens + _at(schedule, "sqrt_one_minus_alphas_cumprod", rand.t) * rand.noise


def loss_terms(
    schedule: Schedule, tokens: jax.Array, noised: jax.Array, rand: LossNoise, prediction: jax.Array
) -> dict[str, jax.Array]:
    """The hybrid loss per token and timestep, `mse` and `vb` (bits per dimension), float32 (...).

    The variational term `vb` trains only the variance: its mean is detached.

    Args:
      schedule: the full chain.
      tokens: x_0, float32, broadcastable to (..., D).
      noised: x_t, float32 (..., D), from `add_noise`.
      rand: the randomness passed to `add_noise`.
      prediction: the denoiser's output, (..., 2 D): noise, then the interpolation of the log variance in [-1, 1].
    """
    prediction = prediction.astype(jnp.float32)
    eps, interpolation = jnp.split(prediction, 2, axis=-1)
    mse = jnp.mean(jnp.square(rand.noise - eps), axis=-1)

    true_mean = _posterior_mean(schedule, tokens, noised, rand.t)
    true_log_variance = _at(schedule, "min_log_variance", rand.t)
    mean, log_variance = predicted_gaussian(schedule, noised, rand.t, jax.lax.stop_gradient(eps), interpolation)
    kl = 0.5 * (
        -1.0
        + log_variance
        - true_log_variance
        + jnp.exp(true_log_variance - log_variance)
        + jnp.square(true_mean - mean) * jnp.exp(-log_variance)
    )
    likelihood = discretised_log_likelihood(tokens, mean, 0.5 * log_variance)
    vb = jnp.where(rand.t == 0, -jnp.mean(likelihood, axis=-1), jnp.mean(kl, axis=-1)) / math.log(2.0)
    return {"mse": mse, "vb": vb}


def predicted_gaussian(
    schedule: Schedule, x: jax.Array, t: jax.Array, eps: jax.Array, interpolation: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and log variance of p(x_{t-1} | x_t), (..., D) each, from the predicted noise and interpolation."""
    x0 = _at(schedule, "sqrt_recip_alphas_cumprod", t) * x - _at(schedule, "sqrt_recipm1_alphas_cumprod", t) * eps
    share = 0.5 * (interpolation + 1.0)
    low, high = _at(schedule, "min_log_variance", t), _at(schedule, "max_log_variance", t)
    return _posterior_mean(schedule, x0, x, t), share * high + (1.0 - share) * low


def discretised_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Elementwise log probability under a Gaussian of the bin of x: width 2/255 on [-1, 1], outer bins open.

    Uses the tanh approximation of the normal distribution function, as in the reference.
    """
    inverse = jnp.exp(-log_scale)
    upper = _normal_cdf(inverse * (x - mean + 1.0 / 255.0))
    lower = _normal_cdf(inverse * (x - mean - 1.0 / 255.0))
    probability = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1.0 - lower, upper - lower))
    return jnp.log(jnp.maximum(probability, 1e-12))


def sample(
    schedule: Schedule,
    make_denoise: MakeDenoise,
    init_noise: jax.Array,
    step_noise: jax.Array,
    temperature: float | jax.Array = 1.0,
    ahead: int = 1,
) -> jax.Array:
    """Ancestral sampling over the whole schedule, float32 (..., D), without clipping.

    Args:
      schedule: the respaced chain, K steps.
      make_denoise: prepares `ahead` steps together.
      init_noise: the start of the chain, (..., D).
      step_noise: (K, ..., D), from the noisiest step on. The last step adds none.
      temperature: scale of `step_noise` (paper, section 3.3), not of `init_noise`.
      ahead: number of steps prepared together; divides K.
    """
    timestep_map = jnp.asarray(schedule.timestep_map, jnp.int32)
    steps = jnp.arange(len(schedule.betas) - 1, -1, -1).reshape(-1, ahead)
    noise = step_noise.astype(jnp.float32).reshape(*steps.shape, *step_noise.shape[1:])

    def stretch(x: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        denoise = make_denoise(timestep_map[inputs[0]])

        def step(x: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            i, t, noise = inputs
            eps, interpolation = jnp.split(denoise(x, i).astype(jnp.float32), 2, axis=-1)
            mean, log_variance = predicted_gaussian(schedule, x, t, eps, interpolation)
            scale = jnp.where(t == 0, 0.0, temperature)
            return mean + scale * jnp.exp(0.5 * log_variance) * noise, None

        return jax.lax.scan(step, x, (jnp.arange(ahead), *inputs))

    return jax.lax.scan(stretch, init_noise.astype(jnp.float32), (steps, noise))[0]


def steps_ahead(num_steps: int, rows: int, enough: int = 256) -> int:
    """The number of steps to prepare together: the largest divisor of `num_steps` with at most `enough` rows in total.

    Below about 240 rows (bfloat16 on TPU v5e, 197 TFLOP/s over 819 GB/s) a matmul is bound by reading its weights;
    above, more steps only need more memory.
    """
    return max(n for n in range(1, num_steps + 1) if num_steps % n == 0 and (n == 1 or n * rows <= enough))


def apply_cfg_to_noise(prediction: jax.Array, scale: jax.Array) -> jax.Array:
    """Applies cfg to the noise, not the variance: (B, ..., 2 D) from (2 B, ..., 2 D), conditional half first."""
    eps, interpolation = jnp.split(prediction, 2, axis=-1)
    return jnp.concatenate([cfg.apply_cfg(eps, scale), interpolation[: len(eps) // 2]], axis=-1)


def _at(schedule: Schedule, name: str, t: jax.Array) -> jax.Array:
    entry = jnp.asarray(schedule.tables[name])[t]
    return entry[..., None] if entry.ndim else entry


def _posterior_mean(schedule: Schedule, x0: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
    return _at(schedule, "posterior_mean_coef1", t) * x0 + _at(schedule, "posterior_mean_coef2", t) * x


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1.0 + jnp.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
