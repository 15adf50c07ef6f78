"""What a run compiles, lowered for described devices: the train step, the sampler, the tokenizer both ways.

No arrays are made: states, batches and the tokenizer's weights are shapes with shardings, and the programs are those
that training and sampling run.
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

from marjax import config as config_lib
from marjax import numerics, sharding
from marjax.assembly import Assembly, assemble
from marjax.compile import hlo
from marjax.errors import UserError
from marjax.generation.plan import generation_plan
from marjax.generation.sampler import Sampler
from marjax.memory import held_by, needed_and_usable
from marjax.perf import flops
from marjax.tokenizers import Cacheable, described_tokenizer
from marjax.training.step import make_train_step

NAMES = ("train", "sample", "encode", "decode")
_OTHERS_FLAGS = ("--xla_cpu_", "--xla_gpu_", "--xla_backend_")


class CompilerError(UserError):
    """The compiler gave up, and not for want of memory."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A program ready to compile.

    Attributes:
      name: one of NAMES.
      images: that one run takes or makes, on all devices.
      model_flops: of one run on all devices, as `flops` counts them: no padding, no recomputation.
      lower: traces and lowers it; None where it came from another process.
      state_bytes: of what a device holds from run to run: parameters, EMA, optimizer; or parameters alone.
    """

    name: str
    images: int
    model_flops: float
    lower: Callable[[], jax.stages.Lowered] | None
    state_bytes: int


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's HBM that a program needs, in all (`peak`) and by what for; -1 where it is not known.

    Temporaries have one block of memory, gaps included: what is alive at one time is less.
    """

    peak: float
    arguments: float = -1
    temporaries: float = -1
    code: float = -1


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came of compiling one: `program` is None where memory did not suffice, `usable` is then what there was."""

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
    """The programs of these names, for a resolved config.

    A tokenizer without a network has no "encode" and "decode" worth compiling: they are left out.

    Args:
      config: resolved.
      mesh: of real or described devices.
      names: of NAMES.
      cached: the train step's batches are of a latent cache, as with `config.data.cache`.

    Raises:
      UserError: the batch does not divide over the mesh, or the tokenizer's latents cannot be cached.
    """
    assembly = assemble(config, mesh)
    tokenizer = described_tokenizer(config_lib.tokenizer_settings(config), assembly.tokens)
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
    """Compiles it; memory that does not suffice is a result, not an error.

    Args:
      lowered: from `lowered_programs`, with that mesh.
      mesh: what it was lowered for.
      usable: bytes of HBM on a device, where they are known.
      keep_text: keep the program's HLO text.

    Raises:
      CompilerError: the compiler gave up for another reason, or its program cannot be read.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as dump:
        assert lowered.lower is not None
        traced = lowered.lower()
        try:
            with _compiler_alone():
                compiled = traced.compile(compiler_options=_dumping(dump) if _is_tpu(mesh) else None)
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


def _dumping(folder: str) -> dict[str, Any]:
    """Compiler options that leave a program's text in a folder."""
    return {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}


def _text_of(compiled: jax.stages.Compiled, dump: str) -> str:
    """Its HLO text; from the compiler's own dump where JAX 0.10 cannot read the program back (v5p and v6e).

    Raises:
      CompilerError: there is neither.
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
    """Without a persistent cache, which programs for absent devices would only fill, and flags of other compilers.

    libtpu ends the process when it meets a flag in XLA_FLAGS that it does not know, such as those for CPUs.
    """
    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009 - the type does not tell of it
    given = os.environ.get("XLA_FLAGS")
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # or JAX, once it has used the cache, would not look at the setting
    if given is not None:
        os.environ["XLA_FLAGS"] = " ".join(flag for flag in given.split() if not flag.startswith(_OTHERS_FLAGS))
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()
        if given is not None:
            os.environ["XLA_FLAGS"] = given


def out_of_memory(message: str) -> tuple[float, float]:
    """Bytes needed and bytes there are, from the compiler's message.

    Raises:
      CompilerError: another message.
    """
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
                f"latents of tokenizer {config.tokenizer.name!r} cannot be cached: leave out --cached and "
                f"config.data.cache"
            )
        one = jax.eval_shape(tokenizer.moments, tokenizer.params, _images(config, 1, mesh, jnp.float32))
        dtype = one.dtype if jnp.issubdtype(one.dtype, jnp.integer) else jnp.bfloat16  # as marjax cache-latents has it
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
        each += flops.autoencoder_flops(tokenizer_spec(tokenizer), config.data.image_size)[1]
    inputs = sampler.described_arguments(assembly.params, size)
    return Lowered("sample", size, each * size, lambda: sampler.program.lower(*inputs), held_by(assembly.params))


def _tokenizer(name: str, config: ml_collections.ConfigDict, mesh: Mesh, tokenizer: Cacheable) -> Lowered:
    """As `marjax cache-latents` and the sampler run it: 32 images a device."""
    size = 32 * mesh.size
    encode, decode = flops.autoencoder_flops(tokenizer_spec(tokenizer), config.data.image_size)
    image = _images(config, size, mesh, jnp.float32)
    if name == "encode":
        program, given, each = jax.jit(tokenizer.moments), image, encode
    else:
        latent = jax.eval_shape(tokenizer.encode, tokenizer.params, image, numerics.key(0))
        program, given, each = jax.jit(tokenizer.decode), _rows(latent.shape, latent.dtype, mesh), decode
    return Lowered(name, size, each * size, lambda: program.lower(tokenizer.params, given), held_by(tokenizer.params))


def tokenizer_spec(tokenizer: Any) -> Any:
    """The network of a tokenizer that has one."""
    return tokenizer.spec


def _images(config: ml_collections.ConfigDict, size: int, mesh: Mesh, dtype: Any) -> jax.ShapeDtypeStruct:
    data = config.data
    return _rows((size, data.image_size, data.image_size, data.channels), dtype, mesh)


def _rows(shape: tuple[int, ...], dtype: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
