"""The programs of a run, lowered for described devices: train step, sampler, tokenizer encoder and decoder.

They are the programs that training and sampling run. No arrays are created: states, batches and the tokenizer's weights
are shapes with shardings.
"""

import contextlib
import dataclasses
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from marjax import numerics, sharding
from marjax.assembly import Assembly, assemble
from marjax.compile import hlo
from marjax.config import tokenizer_config
from marjax.errors import UserError
from marjax.generation.plan import generation_plan
from marjax.generation.sampler import Sampler
from marjax.memory import held_by, needed_and_usable
from marjax.perf import flops
from marjax.tokenizers import Cacheable, described_tokenizer
from marjax.training.step import make_train_step

NAMES = ("train", "sample", "encode", "decode")
_FLAGS_OF_OTHER_COMPILERS = ("--xla_cpu_", "--xla_gpu_", "--xla_backend_")


class CompilerError(UserError):
    """The compiler failed for another reason than memory."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program ready to compile.

    Attributes:
      name: one of NAMES.
      images: images per run, on all devices.
      model_flops: FLOPs per run on all devices, as in `perf.flops`: without padding and recomputation.
      lower: traces and lowers the program; None if it comes from another process.
      state_bytes: bytes that stay on a device between runs: parameters, EMA and optimizer, or only parameters.
    """

    name: str
    images: int
    model_flops: float
    lower: Callable[[], jax.stages.Lowered] | None
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """HBM that a program needs on a device, in bytes: in total (`peak`) and by use; -1 if unknown.

    Temporaries are one block of memory, including gaps between those alive at one time.
    """

    peak: float
    arguments: float = -1
    temporaries: float = -1
    code: float = -1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled program; `program` is None if it needs more than the `usable` bytes of HBM."""

    lowered: Lowered
    seconds: float
    memory: Memory
    program: hlo.Program | None
    usable: float
    text: str = ""


@numerics.pinned()
def lowered_programs(
    config: ml_collections.ConfigDict, mesh: Mesh, names: Sequence[str] = NAMES, cached: bool = False
) -> list[Lowered]:
    """Returns the programs of these names, without "encode" and "decode" if the tokenizer has no network.

    Args:
      config: resolved.
      mesh: mesh of real or described devices.
      names: among NAMES.
      cached: the train step reads a latent cache, as with `config.data.cache`.

    Raises:
      UserError: the batch size is not divisible by the mesh, or the tokenizer's latents cannot be cached.
    """
    assembly = assemble(config, mesh)
    tokenizer = described_tokenizer(tokenizer_config(config), assembly.tokens)
    tokenizer.params = sharding.put_replicated(tokenizer.params, mesh)
    assembly = assembly.replace(tokenizer=tokenizer)
    made = []
    for name in names:
        if name == "train":
            made.append(_train(assembly, cached or bool(config.data.cache)))
        elif name == "sample":
            made.append(_sample(assembly))
        elif isinstance(tokenizer, Cacheable):
            made.append(_tokenizer(name, config, mesh, tokenizer))
    return made


@numerics.pinned()
def compile_program(lowered: Lowered, mesh: Mesh, usable: float = 0.0, keep_text: bool = False) -> Compiled:
    """Compiles a program; running out of memory is a result, not an error.

    Args:
      lowered: from `lowered_programs` with this mesh.
      mesh: the mesh it is lowered for.
      usable: bytes of HBM on a device, if known.
      keep_text: keep the program's HLO text.

    Raises:
      CompilerError: the compiler failed for another reason, or the program cannot be read.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        assert lowered.lower is not None
        traced = lowered.lower()
        try:
            with _compiler_alone():
                options: dict[str, str | bool] = {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
                compiled = traced.compile(compiler_options=options if _is_tpu(mesh) else None)
            text = _text_of(compiled, dump)
        except jax.errors.JaxRuntimeError as error:
            needed, limit = out_of_memory(str(error))
            memory = Memory(peak=needed, arguments=lowered.state_bytes)
            return Compiled(lowered, time.perf_counter() - start, memory, None, limit)
    seconds = time.perf_counter() - start
    found = compiled.memory_analysis()
    assert found is not None
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    fresh = found.output_size_in_bytes - found.alias_size_in_bytes
    peak = max(getattr(found, "peak_memory_in_bytes", 0), arguments + fresh + temporaries)
    memory = Memory(
        peak + found.generated_code_size_in_bytes,
        arguments,
        max(0, peak - arguments),
        found.generated_code_size_in_bytes,
    )
    return Compiled(lowered, seconds, memory, hlo.read(text, mesh.size), usable, text if keep_text else "")


def _is_tpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def _text_of(compiled: jax.stages.Compiled, dump: str) -> str:
    """Returns the HLO text; from the compiler's dump if JAX 0.10 cannot read the program back (v5p and v6e).

    Raises:
      CompilerError: neither is available.
    """
    try:
        text = compiled.as_text()
        assert text is not None
        return text
    except jax.errors.JaxRuntimeError as error:
        files = sorted(pathlib.Path(dump).glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
        if not files:
            raise CompilerError(f"the compiled program cannot be read: {str(error).splitlines()[0][:300]}") from None
        return files[-1].read_text()


@contextlib.contextmanager
def _compiler_alone() -> Iterator[None]:
    """Disables the persistent cache, which described devices cannot use, and hides flags of other compilers.

    libtpu ends the process at an unknown flag in XLA_FLAGS, such as those for CPUs.
    """
    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009 - missing from the type
    given = os.environ.get("XLA_FLAGS")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX reads the setting only before it first uses the cache
    if given is not None:
        os.environ["XLA_FLAGS"] = " ".join(
            flag for flag in given.split() if not flag.startswith(_FLAGS_OF_OTHER_COMPILERS)
        )
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def out_of_memory(message: str) -> tuple[float, float]:
    """Returns needed and usable bytes from the compiler's message. Raises CompilerError: another message."""
    if (found := needed_and_usable(message)) is None:
        raise CompilerError(f"the compiler gave up: {message.strip().splitlines()[0][:400]}")
    return found


def _train(assembly: Assembly, cached: bool) -> Lowered:
    config, mesh, tokenizer, state = assembly.config, assembly.mesh, assembly.tokenizer, assembly.state
    sharding.check_batch(mesh, config.train.batch_size, config.train.accumulate)
    step = make_train_step(assembly)
    size = config.train.batch_size
    batch = {"label": _rows((size,), jnp.int32, mesh)}
    if cached:
        if not isinstance(tokenizer, Cacheable):
            raise UserError(
                f"latents of tokenizer {config.tokenizer.name!r} cannot be cached; omit --cached and config.data.cache"
            )
        one = jax.eval_shape(tokenizer.moments, tokenizer.params, _images(config, 1, mesh, jnp.float32))
        dtype = (
            one.dtype if jnp.issubdtype(one.dtype, jnp.integer) else jnp.bfloat16
        )  # as marjax cache-latents writes them
        batch["moments"] = _rows((size, *one.shape[1:]), dtype, mesh)
    else:
        batch["image"] = _images(config, size, mesh, jnp.uint8)
    return Lowered(
        "train",
        size,
        flops.train_flops(assembly.generator) * size,
        lambda: step.lower(state, batch, tokenizer.params),
        held_by(state),
    )


def _sample(assembly: Assembly) -> Lowered:
    config, generator, tokenizer = assembly.config, assembly.generator, assembly.tokenizer
    sampler = Sampler(assembly)
    settings, size = sampler.settings, sampler.fitting(config.sample.batch_size)
    plan = generation_plan(generator.num_tokens, config.sample.num_iter)
    each = flops.sample_flops(
        generator, plan, settings.num_sampling_steps, settings.cfg is not None, settings.choice is not None
    )
    if isinstance(tokenizer, Cacheable):
        each += flops.autoencoder_flops(_spec(tokenizer), config.data.image_size)[1]
    inputs = sampler.described_arguments(assembly.params, size)
    return Lowered("sample", size, each * size, lambda: sampler.program.lower(*inputs), held_by(assembly.params))


def _tokenizer(name: str, config: ml_collections.ConfigDict, mesh: Mesh, tokenizer: Cacheable) -> Lowered:
    """Encoder or decoder with 32 images per device, as in `marjax cache-latents`."""
    size = 32 * mesh.size
    encode, decode = flops.autoencoder_flops(_spec(tokenizer), config.data.image_size)
    image = _images(config, size, mesh, jnp.float32)
    if name == "encode":
        program, given, each = jax.jit(tokenizer.moments), image, encode
    else:
        latent = jax.eval_shape(tokenizer.encode, tokenizer.params, image, numerics.key(0))
        program, given, each = jax.jit(tokenizer.decode), _rows(latent.shape, latent.dtype, mesh), decode
    return Lowered(name, size, each * size, lambda: program.lower(tokenizer.params, given), held_by(tokenizer.params))


def _spec(tokenizer: Any) -> Any:
    """The `Spec` of a tokenizer with a network."""
    return tokenizer.spec


def _images(config: ml_collections.ConfigDict, size: int, mesh: Mesh, dtype: Any) -> jax.ShapeDtypeStruct:
    data = config.data
    return _rows((size, data.image_size, data.image_size, data.channels), dtype, mesh)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
