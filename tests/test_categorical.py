"""The categorical head: cross-entropy, temperature, cfg and orders by confidence."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.models import make_generator, perturbed_params

from marjax.generation.plan import generation_plan, group_stages
from marjax.generation.sampler import draw_randomness, generate
from marjax.heads import categorical, cfg
from marjax.models.generator import Classes

K, L, D = 24, 16, 4
CODEBOOK = jax.random.normal(jax.random.key(9), (K, D))


def test_loss_of_uniform_model_is_log_v():
    generator = make_generator(head="categorical").with_codebook(CODEBOOK)
    params = jax.tree.map(jnp.zeros_like, perturbed_params(generator))
    tokens = CODEBOOK[jax.random.randint(jax.random.key(1), (3, L), 0, K)]
    rand = generator.draw_loss_randomness(jax.random.key(2), 3)
    terms = generator.apply({"params": params}, tokens, jnp.arange(3), rand, True)
    np.testing.assert_allclose(terms["loss"][0], np.full((3, L), math.log(K)), rtol=1e-6)


def test_target_is_the_code_of_the_token():
    """Raising the bias of one code lowers the loss of its tokens and raises the loss of all others."""
    generator = make_generator(head="categorical").with_codebook(CODEBOOK)
    params = perturbed_params(generator)
    index = jax.random.randint(jax.random.key(1), (3, L), 0, K).at[:, 5].set(7)
    rand = generator.draw_loss_randomness(jax.random.key(2), 3)

    def loss(params):
        return generator.apply({"params": params}, CODEBOOK[index], jnp.arange(3), rand, True)["loss"][0]

    before = loss(params)
    params["head"]["logits"]["bias"] = params["head"]["logits"]["bias"].at[7].add(0.5)
    change = loss(params) - before
    assert (change[index == 7] < 0).all() and (change[index != 7] > 0).all() and (index != 7).any()


def test_cross_entropy():
    logits = np.random.default_rng(0).standard_normal((5, K)).astype(np.float32) * 3
    target = np.arange(5)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(categorical.cross_entropy(logits, target), -np.log(p[target, target]), rtol=1e-5)


def test_temperature_towards_zero_is_the_argmax():
    logits = jax.random.normal(jax.random.key(0), (1000, K))
    noise = categorical.gumbel(jax.random.key_data(jax.random.split(jax.random.key(1), 1000)), K)
    best = jnp.argmax(logits, -1)
    agree = [float((categorical.sample_codes(logits, noise, t) == best).mean()) for t in (1.0, 0.3, 0.1, 1e-6, 0.0)]
    assert agree == sorted(agree) and agree[0] < 0.5 and agree[-2:] == [1.0, 1.0]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_follow_the_softmax_of_logits_over_temperature(temperature):
    logits, n = jnp.array([0.0, 1.0, 2.0, -1.0]), 40_000
    noise = categorical.gumbel(jax.random.key_data(jax.random.split(jax.random.key(1), n)), 4)
    drawn = categorical.sample_codes(jnp.broadcast_to(logits, (n, 4)), noise, temperature)
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, jax.nn.softmax(logits / temperature), atol=0.01)


def test_keys_differ_per_token():
    generator = make_generator(head="categorical").with_codebook(CODEBOOK)
    noise = draw_randomness(generator, 0, jnp.arange(5), "4").head
    assert len({tuple(key) for key in noise.reshape(-1, 2).tolist()}) == 5 * L


def test_cfg():
    both = jax.random.normal(jax.random.key(0), (6, 2, K))
    conditional, unconditional = both[:3], both[3:]
    np.testing.assert_allclose(cfg.apply_cfg(both, 1.0), conditional, atol=1e-6)
    np.testing.assert_allclose(cfg.apply_cfg(both, 0.0), unconditional, atol=1e-6)
    np.testing.assert_allclose(cfg.apply_cfg(both, 2.5), 2.5 * conditional - 1.5 * unconditional, atol=1e-5)


def run(generator, params, num_iter, *, choice=None, seed=0, temperature=0.7, cfg_n=None):
    rand = draw_randomness(generator, seed, jnp.arange(4), "4")
    plan = generation_plan(L, num_iter)
    stages = group_stages(plan, 2, lambda known, new: 1.0 + known + new, all_unknown=choice is not None)
    choices = None if choice is None else jnp.full(num_iter, choice)
    return jax.jit(
        lambda params: generate(
            generator,
            params,
            jnp.array([0, 1, 2, -1]),
            rand,
            cfg_n,
            jnp.float32(temperature),
            choices,
            stages=stages,
            num_sampling_steps="4",
        )
    )(params)


@pytest.fixture(scope="module")
def mar():
    generator = make_generator(head="categorical").with_codebook(CODEBOOK)
    return generator, perturbed_params(generator)


def test_samples_are_codes(mar):
    tokens = run(*mar, 5)
    distance = jnp.linalg.norm(tokens[:, :, None] - CODEBOOK, axis=-1)
    np.testing.assert_array_equal(distance.min(-1), np.zeros((4, L)))
    assert len(set(np.asarray(distance.argmin(-1)).ravel().tolist())) > 3


def test_confidence_order_generates_most_confident_first(mar):
    """Compares one token per step, without randomness, with a loop over explicit choices."""
    generator, params = mar
    got = run(generator, params, L, choice=0.0, temperature=0.0)
    labels, drop = jnp.array([0, 1, 2, 0]), jnp.array([False, False, False, True])
    net = generator.bind({"params": params})
    tokens, known = np.zeros((4, L, D), np.float32), [[] for _ in range(4)]
    look = jax.jit(
        lambda tokens, order, n: net.head.logits(
            net.backbone_output(tokens, Classes(labels, drop), order, jnp.full(4, n), slots=L)
        )
    )
    for n in range(L):
        order = jnp.asarray([k + [p for p in range(L) if p not in k] for k in known])
        log_p = jax.nn.log_softmax(look(jnp.asarray(tokens), order, n), -1)
        for b in range(4):
            sure = {p: float(log_p[b, p].max()) for p in range(L) if p not in known[b]}
            surest = max(sure, key=sure.get)
            tokens[b, surest] = CODEBOOK[int(log_p[b, surest].argmax())]
            known[b].append(surest)
    np.testing.assert_array_equal(got, tokens)
    assert (got != run(generator, params, L, temperature=0.0)).any()  # unlike the random order
    assert len({tuple(k) for k in known}) == 4


def test_choice_temperature_randomises_the_order(mar):
    generator, params = mar
    still = [run(generator, params, 6, choice=0.0, temperature=0.0, seed=s) for s in (0, 1)]
    moved = [run(generator, params, 6, choice=50.0, temperature=0.0, seed=s) for s in (0, 1)]
    np.testing.assert_array_equal(*still)
    assert (moved[0] != moved[1]).any()


def test_confidence_order_with_cfg_generates_every_token(mar):
    tokens = run(*mar, 6, choice=2.0, cfg_n=jnp.linspace(1, 3, 6))
    assert jnp.abs(tokens).max(-1).min() > 0
    assert (tokens != run(*mar, 6, choice=2.0)).any()


def test_missing_codebook(mar):
    generator, params = make_generator(head="categorical"), mar[1]
    rand = generator.draw_loss_randomness(jax.random.key(2), 3)
    with pytest.raises(ValueError, match="codebook"):
        without = generator.clone(head=generator.head.clone(codebook=None))
        without.apply({"params": params}, jnp.zeros((3, L, D)), jnp.arange(3), rand, True)
