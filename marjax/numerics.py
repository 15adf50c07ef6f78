"""What results depend on besides config and seed: the PRNG, and settings of JAX, Flax and XLA from the environment.

Settings of JAX and Flax that change results or stop a healthy run are pinned only inside marjax's public functions
(`pinned`): a program that imports marjax keeps its own `jax.config`. The command line removes them from its environment
(`clean_environment`). Settings that cannot be pinned, such as XLA_FLAGS, are recorded in every checkpoint and compared
when a run resumes (`recorded`, `differences`).

JAX is imported lazily: the command line calls `clean_environment` before JAX reads the variables.
"""

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

PRNG = "threefry2x32"

# Options of jax.config and flax.config with marjax's values; those that the installed version lacks are skipped. Their
# environment variables have the same names in capitals.
PINNED: dict[str, Any] = {
    # Random draws.
    "jax_default_prng_impl": PRNG,
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_safer_randint": True,  # JAX 0.8; the only behaviour of later versions
    "jax_high_dynamic_range_gumbel": False,
    "jax_legacy_prng_key": "allow",
    "flax_fix_rng_separator": False,
    # Types and precision.
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_numpy_dtype_promotion": "standard",
    "jax_default_matmul_precision": None,
    "jax_allow_f16_reductions": True,
    "jax_softmax_custom_jvp": False,
    # Tracing and compilation: other modes round differently or are incomplete.
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_exec_time_optimization_effort": 0.0,
    "jax_memory_fitting_effort": 0.0,
    "jax_memory_fitting_level": "O2",
    "jax_use_direct_linearize": True,
    "eager_constant_folding": False,
    "jax_scan3": False,
    "jax_remat3": False,
    "jax_custom_vjp3": False,
    # Checks that a healthy run fails: metrics of terms without tokens are NaN, biases are broadcast, small arrays are
    # transferred implicitly. A run itself checks that the loss and parameters are finite.
    "jax_debug_nans": False,
    "jax_debug_infs": False,
    "jax_debug_key_reuse": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
    "jax_check_tracer_leaks": False,
    "jax_check_static_indices": False,
    "jax_numpy_rank_promotion": "allow",
    "jax_transfer_guard": "allow",
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
    "jax_array_garbage_collection_guard": "allow",
    "jax_thread_guard": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_disallow_mesh_context_manager": False,
    # The trees of parameters.
    "flax_return_frozendict": False,
    "flax_preserve_adopted_names": False,
}

_TRUE, _FALSE = ("1", "y", "yes", "t", "true", "on"), ("0", "n", "no", "f", "false", "off")

# Flags of XLA that change no result: other devices on the host, dumps.
_HARMLESS_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump_", "--xla_hlo_profile")
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_lock = threading.RLock()


def key(seed: "int | jax.Array") -> "jax.Array":
    """A typed key () from an integer seed, always with implementation PRNG."""
    import jax

    return jax.random.key(seed, impl=PRNG)


def wrap_key(data: "jax.Array") -> "jax.Array":
    """The typed key () whose `jax.random.key_data` is `data`, uint32 (2,)."""
    import jax

    return jax.random.wrap_key_data(data, impl=PRNG)


@contextlib.contextmanager
def pinned() -> Iterator[None]:
    """A context manager or decorator that applies PINNED, whatever the environment or the caller has set.

    Settings for which JAX has a context manager change in this thread only; the others change for the process and are
    restored.
    """
    import flax
    import jax

    given = jax.config.values
    restored = []
    with contextlib.ExitStack() as stack:
        for name, value in PINNED.items():
            config: Any = flax.config if name.startswith("flax_") else jax.config
            local = getattr(jax, name.removeprefix("jax_"), None)
            if config is jax.config and local is not None and name in given:
                stack.enter_context(local(value))
            elif name in given if config is jax.config else hasattr(config, name):
                with _lock:
                    before = getattr(config, name, given.get(name))
                    if before != value:
                        config.update(name, value)
                        restored.append((config, name, before))
        try:
            yield
        finally:
            for config, name, before in reversed(restored):
                config.update(name, before)


def clean_environment(environment: MutableMapping[str, str]) -> list[str]:
    """Removes the variables of PINNED from an environment, before JAX is imported.

    Returns:
      The names of those that had another value.
    """
    ignored = []
    for name, value in PINNED.items():
        given = environment.pop(name.upper(), None)
        if given is not None and not _means(given, value):
            ignored.append(name.upper())
    return ignored


def _means(text: str, value: Any) -> bool:
    """Whether the text of a variable means `value`."""
    if isinstance(value, bool):
        return text.lower() in (_TRUE if value else _FALSE)
    return text.lower() == ("" if value is None else str(value).lower())


def recorded() -> dict[str, str]:
    """Settings that results depend on and that are not pinned, by name: JAX version, platform, compiler flags."""
    import jax

    settings = {"jax": jax.__version__, "platform": jax.default_backend()}
    for variable in _FLAGS:
        # The last value of a flag counts; the order of flags does not matter.
        flags = dict(_flag(text) for text in os.environ.get(variable, "").split())
        settings |= {
            f"{variable} {name}": value for name, value in flags.items() if not name.startswith(_HARMLESS_FLAGS)
        }
    return settings


def _flag(text: str) -> tuple[str, str]:
    name, has_value, value = text.partition("=")
    return re.sub("^-{0,2}", "--", name, count=1), value if has_value else "true"


def differences(before: Any, now: Mapping[str, str]) -> str:
    """One line that names the differences between `recorded` of a checkpoint and of this process, or "".

    `before` may have any type, as it is read from a file.
    """
    if not isinstance(before, dict) or not before:
        return ""
    changed = [
        f"{name} (was {before.get(name, 'not set')}, now {now.get(name, 'not set')})"
        for name in sorted({*map(str, before), *now})
        if before.get(name) != now.get(name)
    ]
    return f"results will not be bit-identical, since settings have changed: {', '.join(changed)}" if changed else ""
