"""State, loss and jitted step of the training of a KL or VQ autoencoder (Esser et al. 2021; Rombach et al. 2022).

The loss of an image is the mean of |x - x'|, optionally LPIPS, the bottleneck's term, and optionally an adversarial
term with an adaptive weight. The randomness of a step is a function of (seed, step), drawn for the global batch.

Legend: B global batch, S pixels per side, h x w latents of D values, K codes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from marjax import numerics, sharding
from marjax.config.resolve import frozen
from marjax.tokenizer_training import lpips
from marjax.tokenizer_training.discriminator import Discriminator, adaptive_weight, hinge
from marjax.tokenizers import kl
from marjax.tokenizers.autoencoder import Autoencoder, init_params
from marjax.tokenizers.nearest_code import nearest
from marjax.tokenizers.spec import Spec
from marjax.training.ema import ema_decay, update_ema
from marjax.training.loop import Metrics
from marjax.training.optimizer import clipping

_USAGE_STEPS = 100  # over which the usage of codes is averaged


@flax.struct.dataclass
class AutoencoderState:
    """`step` int32 () counts finished steps; `params` and `ema` are float32 trees of the same structure.

    `rest` has "opt_state"; for VQ "usage", float32 (K,), the recent share of each code times K; with a discriminator
    "disc", its "params" and "opt_state".
    """

    step: jax.Array
    params: Any
    ema: Any
    rest: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DiscConfig:
    """`config.tokenizer.train.disc`."""

    weight: float
    start: int
    width: int
    layers: int


@dataclasses.dataclass(frozen=True)
class LpipsConfig:
    """`config.tokenizer.train.lpips`."""

    weight: float
    vgg: str
    linear: str


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The fields of `config.tokenizer.train` that a step needs; `config/schema.py` describes them."""

    lr: float
    warmup_steps: int
    b1: float
    b2: float
    clip: float | None
    ema_decay: float
    ema_warmup: bool
    kl_weight: float
    codebook_weight: float
    commitment: float
    restart_below: float
    disc: DiscConfig
    lpips: LpipsConfig
    remat: bool


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The constants of a step.

    Attributes:
      spec: the network.
      train: how to train it.
      network: the autoencoder.
      discriminator: None for no adversarial loss.
      lpips: weights of LPIPS, or None.
      seed: of all randomness.
    """

    spec: Spec
    train: TrainConfig
    network: Autoencoder
    discriminator: Discriminator | None
    lpips: Any
    seed: int

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict, spec: Spec) -> "Trainer":
        """From a resolved config. Raises UserError: invalid files of LPIPS."""
        train, dtype = frozen(config.tokenizer.train, TrainConfig), jnp.dtype(config.tokenizer.autoencoder.dtype)
        disc = Discriminator(train.disc.width, train.disc.layers, dtype) if train.disc.weight else None
        perceptual = lpips.read(train.lpips.vgg, train.lpips.linear) if train.lpips.weight else None
        return cls(spec, train, Autoencoder(spec, dtype, train.remat), disc, perceptual, config.seed)

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with linear warmup and clipping by the global norm; each network has its own state."""
        return optax.chain(clipping(self.train.clip), optax.adam(self.learning_rate, self.train.b1, self.train.b2))

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """The learning rate at a step, float32."""
        return self.train.lr * jnp.minimum(1.0, (step + 1.0) / max(1, self.train.warmup_steps))

    def init(self, key: jax.Array) -> AutoencoderState:
        """The state at step 0; the EMA starts as a copy of the parameters."""
        key_network, key_disc = jax.random.split(key)
        params, optimizer = init_params(self.spec, key_network), self.optimizer()
        rest = {"opt_state": optimizer.init(params)}
        if self.spec.num_codes:
            rest["usage"] = jnp.full(self.spec.num_codes, -1.0)  # so that the first step moves them all
        if self.discriminator is not None:
            image = jnp.zeros((1, 64, 64, self.spec.in_channels))
            disc = self.discriminator.init(key_disc, image)["params"]
            rest["disc"] = {"params": disc, "opt_state": optimizer.init(disc)}
        return AutoencoderState(
            step=jnp.zeros((), jnp.int32), params=params, ema=jax.tree.map(jnp.copy, params), rest=rest
        )

    def forward(self, params: Any, image: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Encodes and decodes.

        Args:
          params: of the network.
          image: float32 (B, S, S, C) in [-1, 1].
          key: of the draw from the posterior.

        Returns:
          (reconstruction (B, S, S, C), bottleneck loss ()), (its parts by name, encoder output, codes or None).
        """
        train = self.train
        before: Any = self.network.apply({"params": params}, image, method="encode")
        codes = None
        if self.spec.num_codes:
            book = params["codebook"]
            codes = nearest(jax.lax.stop_gradient(before), jax.lax.stop_gradient(book))
            chosen = book[codes]
            towards = jnp.mean(jnp.square(chosen - jax.lax.stop_gradient(before)))  # moves codes to latents
            commitment = jnp.mean(jnp.square(jax.lax.stop_gradient(chosen) - before))
            term, parts = train.codebook_weight * (towards + train.commitment * commitment), {"codebook": towards}
            latent = before + jax.lax.stop_gradient(chosen - before)  # straight-through gradient
        else:
            mean, logvar = kl.split(before)
            divergence = 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, (1, 2, 3))
            # LDM adds sums over values and over latents; dividing both by the number of values keeps their ratio.
            term = train.kl_weight * jnp.mean(divergence) / (image.size / image.shape[0])
            parts = {"kl": jnp.mean(divergence)}
            latent = kl.sample(before, key)
        made: Any = self.network.apply({"params": params}, latent, method="decode")
        return (made, term), (parts, before, codes)

    def step(self, state: AutoencoderState, batch: Any) -> tuple[AutoencoderState, Metrics]:
        """One step of both networks; see `make_step`."""
        train, rest = self.train, dict(state.rest)
        image = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        key_posterior, key_codes = jax.random.split(jax.random.fold_in(numerics.key(self.seed), state.step))
        (made, term), backward, (parts, before, codes) = jax.vjp(
            lambda params: self.forward(params, image, key_posterior), state.params, has_aux=True
        )
        (distance, l1), towards = jax.value_and_grad(lambda made: self._distance(made, image), has_aux=True)(made)
        metrics = {"train/loss": distance + term, "train/l1": l1, "train/psnr": _psnr(made, image)}
        if self.discriminator is not None:
            adversarial, metrics_disc, rest["disc"] = self._adversarial(state, image, made, towards, backward)
            towards, metrics = towards + adversarial, metrics | metrics_disc
        (grads,) = backward((towards, jnp.ones(())))
        optimizer = self.optimizer()
        updates, rest["opt_state"] = optimizer.update(grads, rest["opt_state"], state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay(train.ema_decay, train.ema_warmup, state.step))
        if codes is not None:
            params, ema, rest["usage"], used = self._restart(params, ema, rest["usage"], before, codes, key_codes)
            metrics |= {"train/codes_used": used}
        metrics |= {f"train/{name}": value for name, value in parts.items()}
        metrics |= {
            "train/grad_norm": optax.tree.norm(grads),
            "train/param_norm": optax.tree.norm(params),
            "train/lr": self.learning_rate(state.step),
        }
        finite = [jnp.isfinite(metrics[f"train/{name}"]) for name in ("loss", "grad_norm", "param_norm")]
        new = AutoencoderState(step=state.step + 1, params=params, ema=ema, rest=rest)
        return new, metrics | {"finite": jnp.all(jnp.stack(finite)).astype(jnp.float32)}

    def _distance(self, made: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The reconstruction loss, and its part |x - x'|."""
        l1 = jnp.mean(jnp.abs(made - image))
        if self.lpips is None:
            return l1, l1
        return l1 + self.train.lpips.weight * jnp.mean(lpips.distance(self.lpips, made, image)), l1

    def _adversarial(
        self,
        state: AutoencoderState,
        image: jax.Array,
        made: jax.Array,
        towards: jax.Array,
        backward: Callable[[Any], Any],
    ) -> tuple[jax.Array, Metrics, dict[str, Any]]:
        """Returns the weighted gradient with respect to `made`, metrics, and the updated discriminator."""
        assert self.discriminator is not None
        apply, disc = self.discriminator.apply, state.rest["disc"]

        def looks(made: jax.Array) -> jax.Array:
            fake: Any = apply({"params": disc["params"]}, made)
            return -jnp.mean(fake)

        def judge(params: Any) -> jax.Array:
            both: Any = apply({"params": params}, jnp.concatenate([image, made]))
            return jnp.mean(hinge(*jnp.split(both, 2)))

        started = (state.step >= self.train.disc.start).astype(jnp.float32)
        generator_loss, pull = jax.value_and_grad(looks)(made)
        # XLA computes only the part of these backward passes that the last layer needs.
        last = [
            backward((towards_or_pull, jnp.zeros(())))[0]["decoder"]["conv_out"]["kernel"]
            for towards_or_pull in (towards, pull)
        ]
        weight = started * self.train.disc.weight * adaptive_weight(*last)
        disc_loss, grads = jax.value_and_grad(judge)(disc["params"])
        optimizer = self.optimizer()
        grads = jax.tree.map(lambda grad: started * grad, grads)
        updates, opt_state = optimizer.update(grads, disc["opt_state"], disc["params"])
        new = {"params": optax.apply_updates(disc["params"], updates), "opt_state": opt_state}
        return (
            weight * pull,
            {"train/disc_loss": disc_loss, "train/gen_loss": generator_loss, "train/disc_weight": weight},
            new,
        )

    def _restart(
        self, params: Any, ema: Any, usage: jax.Array, before: jax.Array, codes: jax.Array, key: jax.Array
    ) -> tuple[Any, Any, jax.Array, jax.Array]:
        """Moves rarely used codes to random latents (Dhariwal et al. 2020, Jukebox).

        Step 0 moves all codes, which initialises them. Returns parameters, EMA, usage, and the number of codes in use.
        """
        num_codes, rows = self.spec.num_codes, before.reshape(-1, before.shape[-1])
        share = jnp.bincount(codes.ravel(), length=num_codes) * (num_codes / codes.size)
        usage = usage + (share - usage) / _USAGE_STEPS
        idle = usage < self.train.restart_below
        places = rows[jax.random.randint(key, (num_codes,), 0, len(rows))]
        params, ema = (
            {**tree, "codebook": jnp.where(idle[:, None], places, tree["codebook"])} for tree in (params, ema)
        )
        return params, ema, jnp.where(idle, 1.0, usage), jnp.sum(share > 0).astype(jnp.float32)


def make_step(trainer: Trainer, abstract: AutoencoderState, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted step (state, batch) -> (state, metrics); the state is donated and replicated.

    The batch has "image", uint8 (B, S, S, C), sharded along B. Metrics are float32 scalars by their final names;
    "finite" is 1 if loss, gradient and updated parameters are.
    """
    replicated = sharding.replicated(mesh)
    shardings = jax.tree.map(lambda _: replicated, abstract), replicated
    return jax.jit(trainer.step, donate_argnums=0, out_shardings=shardings)


def _psnr(made: jax.Array, image: jax.Array) -> jax.Array:
    """PSNR of the global batch in dB, peak to peak 2."""
    return 10.0 * jnp.log10(4.0 / jnp.mean(jnp.square(jnp.clip(made, -1.0, 1.0) - image)))
