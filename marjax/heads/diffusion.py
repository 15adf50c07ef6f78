"""The diffusion head: the denoiser with the loss and the sampler of `heads/gaussian_diffusion.py` (paper, section 3.2).

Shapes: B batch, L tokens, M tokens predicted in one step, D token dimension, W backbone width, K timesteps: of a chain
in the sampler, drawn per token (`diffusion_batch_mul`) in the loss.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from marjax.heads import gaussian_diffusion
from marjax.heads.denoiser import Denoiser
from marjax.heads.protocol import Terms
from marjax.model_config import ModelConfig


class SampleNoise(NamedTuple):
    """The randomness of sampling, by position: `init` float32 (..., L, D), `step` float32 (..., L, K, D)."""

    init: jax.Array
    step: jax.Array


class DiffusionHead(nn.Module):
    """Models a token given z by denoising diffusion.

    `batch_shards` is the number of devices that the sampler's batch is sharded over. It determines the rows per device,
    and so how many steps are prepared together (`gaussian_diffusion.steps_ahead`).
    """

    token_dim: int
    depth: int
    width: int
    cond_width: int
    num_steps: int = 1000
    diffusion_batch_mul: int = 4
    remat: str = "none"
    batch_shards: int = 1
    dtype: DTypeLike = jnp.float32

    @classmethod
    def from_config(cls, model: ModelConfig, token_dim: int, num_codes: int) -> "DiffusionHead":
        """See `Head.from_config`."""
        return cls(
            token_dim=token_dim,
            depth=model.denoiser.depth,
            width=model.denoiser.width,
            cond_width=model.width,
            num_steps=model.diffusion.num_steps,
            diffusion_batch_mul=model.diffusion_batch_mul,
            remat=model.denoiser.remat,
            dtype=jnp.dtype(model.dtype),
        )

    def setup(self) -> None:
        self.denoiser = Denoiser(
            self.token_dim, self.depth, self.width, self.cond_width, self.num_steps, self.remat, self.dtype
        )

    @nn.nowrap
    def draw_loss_noise(self, key: jax.Array, batch: int, num_tokens: int) -> gaussian_diffusion.LossNoise:
        """Timesteps, int32 (B, K, L), and noise, float32 (B, K, L, D)."""
        return gaussian_diffusion.draw_loss_noise(
            key, (batch, self.diffusion_batch_mul, num_tokens, self.token_dim), self.num_steps
        )

    def __call__(
        self, z_BxLxW: jax.Array, tokens_BxLxD: jax.Array, noise: gaussian_diffusion.LossNoise, weight_BxL: jax.Array
    ) -> Terms:
        """The loss, its parts and the loss by quarter of the timesteps, float32 (B, K, L); see `Head.__call__`."""
        schedule = gaussian_diffusion.respace(self.num_steps, self.num_steps)
        tokens = tokens_BxLxD[:, None].astype(jnp.float32)
        noised = gaussian_diffusion.add_noise(schedule, tokens, noise)
        # The denoiser treats tokens independently, so the "tensor" axis shards tokens and replicates weights: only the
        # gradient of z is communicated, where sharded weights communicate B x K x L activations in every block.
        noised = nn.with_logical_constraint(noised, ("batch", None, "tokens", None))
        z_BxLxW = nn.with_logical_constraint(z_BxLxW, ("batch", "tokens", None))
        prediction = self.denoiser(noised, noise.t, z_BxLxW[:, None])
        terms = gaussian_diffusion.loss_terms(schedule, tokens, noised, noise, prediction)
        loss = terms["mse"] + terms["vb"]
        weight = jnp.broadcast_to(weight_BxL[:, None], loss.shape)
        quarter = noise.t // (self.num_steps // 4)
        out = {"loss": (loss, weight), "mse": (terms["mse"], weight), "vb": (terms["vb"], weight)}
        for i in range(4):
            out[f"loss_t_quarter{i + 1}"] = (loss, weight * (quarter == i))
        return out

    @nn.nowrap
    def draw_sample_noise(self, key: jax.Array, num_tokens: int, num_sampling_steps: int | str) -> SampleNoise:
        """The noise of sampling one image, without the batch axis."""
        steps = len(gaussian_diffusion.respaced_timesteps(self.num_steps, num_sampling_steps))
        key_init, key_step = jax.random.split(key)
        return SampleNoise(
            jax.random.normal(key_init, (num_tokens, self.token_dim)),
            jax.random.normal(key_step, (num_tokens, steps, self.token_dim)),
        )

    def sample(
        self,
        z: jax.Array,
        noise: SampleNoise,
        cfg_scale: jax.Array | None,
        *,
        num_sampling_steps: int | str,
        temperature: float | jax.Array,
    ) -> jax.Array:
        """See `Head.sample`; `temperature` scales the noise added by the steps (paper, section 3.3)."""
        schedule = gaussian_diffusion.respace(self.num_steps, num_sampling_steps)
        z_embed = self.denoiser.embed_z(z)

        def make_denoise(t_K: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
            modulation = self.denoiser.modulate(t_K, z_embed)

            def denoise(x: jax.Array, i: jax.Array) -> jax.Array:
                if cfg_scale is None:
                    return self.denoiser.predict(x, modulation, i)
                prediction = self.denoiser.predict(jnp.concatenate([x, x]), modulation, i)
                return gaussian_diffusion.apply_cfg_to_noise(prediction.astype(jnp.float32), cfg_scale)

            return denoise

        rows = -(-z.shape[0] * z.shape[1] // self.batch_shards)
        ahead = gaussian_diffusion.steps_ahead(len(schedule.betas), rows)
        return gaussian_diffusion.sample(
            schedule, make_denoise, noise.init, jnp.moveaxis(noise.step, 2, 0), temperature, ahead
        )

    @nn.nowrap
    def denoiser_flops(self) -> tuple[float, float]:
        """FLOPs of the denoiser per token: once per z, and per timestep."""
        each = 3 * self.token_dim * self.width + (5 * self.depth + 2) * self.width**2
        return 2 * self.cond_width * self.width, 2 * each

    @nn.nowrap
    def loss_flops(self) -> float:
        """FLOPs of the forward pass per token in training."""
        once, each = self.denoiser_flops()
        return once + self.diffusion_batch_mul * each

    @nn.nowrap
    def sample_flops(self, num_sampling_steps: int | str) -> float:
        """FLOPs of sampling one token, without cfg."""
        once, each = self.denoiser_flops()
        return once + len(gaussian_diffusion.respaced_timesteps(self.num_steps, num_sampling_steps)) * each
