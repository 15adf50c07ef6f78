"""The noise schedule against the reference, and loss and sampler against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.compare import parity

from marjax.heads import gaussian_diffusion
from marjax.heads.gaussian_diffusion import apply_cfg_to_noise


@pytest.mark.parametrize("spacing", ["1000", "100", "25", "7", "ddim50"])
def test_tables_agree_with_the_reference(spacing):
    theirs, _ = parity("diffusion_tables")
    schedule = gaussian_diffusion.respace(1000, spacing)
    np.testing.assert_array_equal(schedule.timestep_map, theirs[f"{spacing}/timestep_map"])
    for name in (
        "betas",
        "alphas_cumprod",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
    ):
        np.testing.assert_allclose(getattr(schedule, name), theirs[f"{spacing}/{name}"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("spacing", [0, 1001, "ddim0", "ddim999", "x", "", -3, "2.5"])
def test_invalid_spacing(spacing):
    with pytest.raises(ValueError, match="num_sampling_steps"):
        gaussian_diffusion.respaced_timesteps(1000, spacing)


def test_one_step_chain():
    assert list(gaussian_diffusion.respaced_timesteps(1000, 1)) == [0]
    assert np.isfinite(list(gaussian_diffusion.respace(1000, 1).tables.values())).all()


def ideal(schedule, variance):
    """The optimal denoiser of normal tokens with mean 0.3 and the given variance."""
    a = schedule.alphas_cumprod

    def make_denoise(t):
        scales, noises = jnp.asarray(np.sqrt(a), jnp.float32)[t], jnp.asarray(np.sqrt(1 - a), jnp.float32)[t]

        def denoise(x, i):
            scale, noise = scales[i], noises[i]
            eps = noise * (x - scale * 0.3) / (scale**2 * variance + noise**2)
            return jnp.concatenate([eps, -jnp.ones_like(eps)], axis=-1)

        return denoise

    return make_denoise


@pytest.mark.parametrize("variance", [0.01, 1.0])
def test_sampler_recovers_a_gaussian(variance):
    full = gaussian_diffusion.respace(1000, 1000)
    schedule = full
    key_init, key_step = jax.random.split(jax.random.key(0))
    x = gaussian_diffusion.sample(
        schedule,
        ideal(full, variance),
        jax.random.normal(key_init, (4000, 2)),
        jax.random.normal(key_step, (1000, 4000, 2)),
    )
    assert abs(float(x.mean()) - 0.3) < 0.02 * max(1.0, variance**0.5 * 3)
    assert abs(float(x.std()) - variance**0.5) < 0.05 * variance**0.5


def test_chain_does_not_depend_on_steps_ahead():
    schedule, full = gaussian_diffusion.respace(1000, "24"), gaussian_diffusion.respace(1000, 1000)
    init = jax.random.normal(jax.random.key(0), (5, 2))
    noise = jax.random.normal(jax.random.key(1), (24, 5, 2))
    one = gaussian_diffusion.sample(schedule, ideal(full, 0.5), init, noise)
    for ahead in (4, 24):
        np.testing.assert_allclose(
            gaussian_diffusion.sample(schedule, ideal(full, 0.5), init, noise, ahead=ahead), one, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("steps, rows, ahead", [(100, 16, 10), (100, 10, 25), (100, 1, 100), (25, 300, 1), (7, 40, 1)])
def test_steps_ahead(steps, rows, ahead):
    assert gaussian_diffusion.steps_ahead(steps, rows) == ahead


def test_temperature_scales_only_the_step_noise():
    schedule, full = gaussian_diffusion.respace(1000, "25"), gaussian_diffusion.respace(1000, 1000)
    init = jax.random.normal(jax.random.key(0), (500, 2))
    noise = jax.random.normal(jax.random.key(1), (25, 500, 2))

    def run(temperature, step_noise):
        return gaussian_diffusion.sample(schedule, ideal(full, 1.0), init, step_noise, temperature)

    np.testing.assert_allclose(run(0.5, noise), run(1.0, 0.5 * noise), atol=1e-5)
    np.testing.assert_array_equal(run(0.0, noise), run(1.0, 0.0 * noise))
    assert run(0.0, noise).std() < 0.9 * run(1.0, noise).std()
    # The last step adds no noise.
    np.testing.assert_array_equal(run(1.0, noise), run(1.0, noise.at[-1].add(5.0)))


def test_variational_term_trains_only_the_variance():
    schedule = gaussian_diffusion.respace(1000, 1000)
    tokens = jax.random.normal(jax.random.key(0), (64, 3))
    rand = gaussian_diffusion.draw_loss_noise(jax.random.key(1), (64, 3), 1000)
    noised = gaussian_diffusion.add_noise(schedule, tokens, rand)
    prediction = jnp.concatenate([0.9 * rand.noise, jnp.zeros_like(tokens)], axis=-1)

    def grad(name):
        return jax.grad(lambda p: gaussian_diffusion.loss_terms(schedule, tokens, noised, rand, p)[name].sum())(
            prediction
        )

    assert not grad("vb")[:, :3].any() and grad("vb")[:, 3:].any()
    assert grad("mse")[:, :3].any() and not grad("mse")[:, 3:].any()


def test_discretised_likelihood_sums_to_one_over_all_bins():
    bins = jnp.linspace(-1.0, 1.0, 256)
    for mean, scale in ((0.0, 0.3), (-1.2, 0.05), (0.9, 2.0)):
        log_p = gaussian_diffusion.discretised_log_likelihood(bins, jnp.full(256, mean), jnp.full(256, np.log(scale)))
        assert abs(float(jnp.exp(log_p).sum()) - 1.0) < 1e-3


def test_cfg_one_is_conditional_and_zero_unconditional():
    prediction = jax.random.normal(jax.random.key(0), (4, 5, 6))
    np.testing.assert_allclose(apply_cfg_to_noise(prediction, 1.0), prediction[:2], atol=1e-6)
    np.testing.assert_allclose(apply_cfg_to_noise(prediction, 0.0)[..., :3], prediction[2:, :, :3], atol=1e-6)
    np.testing.assert_array_equal(apply_cfg_to_noise(prediction, 3.0)[..., 3:], prediction[:2, :, 3:])
