"""The train step of every variant and head.

Its randomness depends on (seed, step) alone and is drawn for the global batch, hence independent of devices and hosts.
Shapes: B global batch, L tokens, D token dimension.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from marjax import numerics, sharding
from marjax.assembly import Assembly
from marjax.config.resolve import frozen
from marjax.models.generator import Generator, LossRandomness
from marjax.tokenizers import Cacheable
from marjax.training.ema import ema_decay, update_ema
from marjax.training.loop import Metrics
from marjax.training.optimizer import OptimizerConfig, learning_rate
from marjax.training.state import TrainState
from marjax.trees import PyTree


def step_keys(seed: int, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The keys of a step for tokenizer, loss and dropout."""
    key_tokenizer, key_loss, key_dropout = jax.random.split(jax.random.fold_in(numerics.key(seed), step), 3)
    return key_tokenizer, key_loss, key_dropout


def loss_and_grads(
    generator: Generator,
    params: PyTree,
    tokens_BxLxD: jax.Array,
    labels_B: jax.Array,
    rand: LossRandomness,
    key_dropout: jax.Array,
    accumulate: int = 1,
) -> tuple[Metrics, PyTree]:
    """Computes the batch means of the head's terms and the gradient of "loss".

    Args:
      generator: the network.
      params: its parameters.
      tokens_BxLxD: float32.
      labels_B: int32.
      rand: randomness of the loss for the global batch.
      key_dropout: folded with the index of the microbatch.
      accumulate: number of microbatches, a divisor of B; changes memory, not results.

    Returns:
      Means, float32 scalars (NaN if all weights of a term are 0), and the gradient tree.
    """

    def sums(
        params: PyTree, tokens: jax.Array, labels: jax.Array, rand: LossRandomness, key: jax.Array
    ) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array]]]:
        terms: Any = generator.apply({"params": params}, tokens, labels, rand, rngs={"dropout": key})
        totals = {name: (jnp.sum(value * weight), jnp.sum(weight)) for name, (value, weight) in terms.items()}
        return totals["loss"][0], totals

    value_and_grad = jax.value_and_grad(sums, has_aux=True)
    if accumulate == 1:
        (_, totals), grads = value_and_grad(params, tokens_BxLxD, labels_B, rand, key_dropout)
    else:
        # Microbatches take strided rows, so that each device keeps its own rows.
        micro = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, accumulate, *x.shape[1:]), 0, 1), (tokens_BxLxD, labels_B, rand)
        )

        def body(carry: PyTree, inputs: PyTree) -> tuple[PyTree, None]:
            index, (tokens, labels, rand) = inputs
            (_, totals), grads = value_and_grad(params, tokens, labels, rand, jax.random.fold_in(key_dropout, index))
            return jax.tree.map(jnp.add, carry, (totals, grads)), None

        shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], micro), key_dropout)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes[0][1], shapes[1]))
        (totals, grads), _ = jax.lax.scan(body, zeros, (jnp.arange(accumulate), micro))
    means = {name: total / weight for name, (total, weight) in totals.items()}
    return means, jax.tree.map(lambda grad: grad / totals["loss"][1], grads)


def update(state: TrainState, grads: PyTree, optimizer: optax.GradientTransformation, decay: jax.Array) -> TrainState:
    """Applies one optimizer update and one EMA update."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, decay)
    return TrainState(step=state.step + 1, params=params, ema=ema, opt_state=opt_state)


def make_train_step(assembly: Assembly) -> jax.stages.Wrapped:
    """Builds the jitted step (state, batch, tokenizer params) -> (state, metrics), which donates the state.

    The batch has "label", int32 (B,), and "image", uint8 (B, H, W, C), or "moments" of a `tokenizers.Cacheable`,
    (B, ...), sharded along B. Metrics are float32 scalars by name; "finite" is 1 if loss, gradient and updated
    parameters are finite.
    """
    generator, tokenizer, mesh = assembly.generator, assembly.tokenizer, assembly.mesh
    seed, train = assembly.config.seed, assembly.config.train
    schedule = learning_rate(frozen(train, OptimizerConfig))

    def step(state: TrainState, batch: PyTree, tokenizer_params: PyTree) -> tuple[TrainState, Metrics]:
        key_tokenizer, key_loss, key_dropout = step_keys(seed, state.step)
        if "moments" in batch:  # from a latent cache
            assert isinstance(tokenizer, Cacheable)
            latent = tokenizer.latents(tokenizer_params, batch["moments"], key_tokenizer)
        else:
            latent = tokenizer.encode(tokenizer_params, batch["image"].astype(jnp.float32) / 127.5 - 1.0, key_tokenizer)
        tokens_BxLxD = assembly.tokens.patchify(latent)
        rand = generator.draw_loss_randomness(key_loss, latent.shape[0])
        rand = jax.lax.with_sharding_constraint(rand, jax.tree.map(lambda _: sharding.batch_sharding(mesh), rand))
        with sharding.logical_rules(mesh):
            means, grads = loss_and_grads(
                generator.with_codebook(tokenizer.codebook(tokenizer_params)),
                state.params,
                tokens_BxLxD,
                batch["label"],
                rand,
                key_dropout,
                train.accumulate,
            )
        new = update(state, grads, assembly.optimizer, ema_decay(train.ema_decay, train.ema_warmup, state.step))
        metrics = {f"train/{name}": value for name, value in means.items()}
        metrics |= {
            "train/grad_norm": optax.tree.norm(grads),
            "train/param_norm": optax.tree.norm(new.params),
            "train/lr": schedule(state.step),
        }
        finite = [jnp.isfinite(metrics[f"train/{name}"]) for name in ("loss", "grad_norm", "param_norm")]
        return new, metrics | {"finite": jnp.all(jnp.stack(finite)).astype(jnp.float32)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, assembly.state)
    # Batch and tokenizer weights carry their own shardings.
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
