"""Compiling for slices that are not there: names, estimates, advice, the search; one real compile where libtpu is."""

import importlib.util
import json
import os
import pickle
import re
import resource
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from support.configs import make_autoencoder, make_digits
from support.paths import DIGITS

from marjax import cli, sharding
from marjax import config as config_lib
from marjax.compile import hlo, process, programs, report, roofline, run, search, topology
from marjax.errors import UserError
from marjax.perf import chips

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: marjax[tpu]")


@pytest.mark.parametrize(
    "name, kind, shape",
    [
        ("v5e:8x8", "v5e", (8, 8)),
        ("v5e-64", "v5e", (8, 8)),
        ("v5litepod-256", "v5e", (16, 16)),
        ("v4-32", "v4", (2, 2, 4)),
        ("v5e-1", "v5e", (1, 1)),
        ("v6e-1", "v6e", (1, 1)),
        ("v5p-32", "v5p", (2, 2, 4)),
        ("v6e-8", "v6e", (2, 4)),
        ("v4:4x4x4", "v4", (4, 4, 4)),
    ],
)
def test_slices_are_named_as_google_does(name, kind, shape):
    assert topology._parse(name) == (kind, shape)


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5e-63", "1, 4, 8, 16"),
        ("v4-24", "8, 16, 32"),
        ("v9:2x2", "no chip 'v9'"),
        ("h100:8", "no chip 'h100'"),
        ("tpu", "give CHIP:SHAPE"),
        ("", "give CHIP:SHAPE"),
    ],
)
def test_other_names_are_told(name, message):
    with pytest.raises(UserError, match=message):
        topology._parse(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["compile", "--topology", "v5e:2x2", "--config", f"{DIGITS}:debug"]) == 2
    assert "pip install 'marjax[tpu]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message", [(["--search", "--programs", "train"], "--search"), (["--programs", "train,sing"], "'sing'")]
)
def test_other_slips_are_told(arguments, message, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["compile", "--topology", "v5e:2x2", "--config", f"{DIGITS}:debug", *arguments]) == 2
    assert message in capsys.readouterr().err


def described(shape, chip="v5e"):
    """A slice of that shape, its devices in order of their coordinates, four a host."""
    points = list(np.ndindex(*shape))
    devices = [types.SimpleNamespace(id=i, coords=point, process_index=i // 4) for i, point in enumerate(points)]
    found = next(each for each in chips.CHIPS if each.name == chip)
    return topology.Slice(f"{chip}:{shape}", found, shape, tuple(devices))


def test_links_count_along_the_directions_of_a_ring():
    small, pod = described((4, 4)), described((16, 16))
    link = small.chip.link_bandwidth
    row = [device for device in small.devices if device.coords[0] == 0]
    assert small.link_bandwidth(row) == link and small.link_bandwidth(list(small.devices)) == 2 * link
    # A pod's rows and columns close into rings; half a row does not.
    row = [device for device in pod.devices if device.coords[0] == 0]
    assert pod.link_bandwidth(row) == 2 * link and pod.link_bandwidth(list(pod.devices)) == 4 * link
    assert pod.link_bandwidth(row[:8]) == link
    cube = described((4, 4, 4), "v4")
    assert cube.link_bandwidth(list(cube.devices)) == 6 * cube.chip.link_bandwidth
    assert described((2, 2, 4), "v4").link_bandwidth(list(described((2, 2, 4)).devices)) == 3 * cube.chip.link_bandwidth
    assert cube.link_bandwidth([]) == cube.chip.link_bandwidth


def test_an_estimate_adds_up_what_binds_each_instruction():
    there = described((2, 4))
    mesh = types.SimpleNamespace(devices=np.array(there.devices, object).reshape(2, 4, 1), size=8)

    def operation(passes, moved, times, cycles=0, overlapped=False):
        return hlo.Operation("x", "fusion", passes, passes, moved, cycles, times, "", overlapped)

    def collective(sent, group, overlapped, kind="all-reduce"):
        return hlo.Collective(kind, "f32", group, sent, 1, "", overlapped)

    chip = there.chip
    program = hlo.Program(
        (collective(50e9 * 0.5, 4, False), collective(100e9 * 0.25, 8, True), collective(1e20, 1, False)),
        (operation(chip.flops, 1.0, 2, cycles=int(chip.clock)), operation(1.0, chip.hbm_bandwidth, 3)),
        (),
    )
    found = roofline.estimate(program, 8 * chip.flops, there, mesh)
    assert found.products == pytest.approx(2) and found.memory == pytest.approx(3)
    assert found.collectives == pytest.approx(0.5) and found.overlapped == pytest.approx(0.25)
    assert found.seconds == pytest.approx(5.5) and found.bound == "HBM"
    assert found.mfu == pytest.approx(1 / 5.5) and found.compiler == pytest.approx(2.5)
    # What cannot be hidden is waited for: beside 2 s of products and 3 s of traffic, or 2 s by the compiler's cycles.
    slow = roofline.estimate(hlo.Program((collective(100e9 * 9, 8, True),), program.operations, ()), 1.0, there, mesh)
    assert slow.collectives == pytest.approx(9 - 5) and slow.compiler == pytest.approx(9)
    # What one device passes on to another takes one link, however many take part.
    passed = hlo.Program((collective(50e9, 8, False, "collective-permute"),), program.operations, ())
    assert roofline.estimate(passed, 1.0, there, mesh).collectives == pytest.approx(1)


def test_copies_that_start_ahead_are_waited_for_only_where_hbm_has_no_time():
    there = described((2, 4))
    mesh = types.SimpleNamespace(devices=np.array(there.devices, object).reshape(2, 4, 1), size=8)
    rate = there.chip.hbm_bandwidth

    def estimate(ahead):
        operations = (
            hlo.Operation("a", "fusion", 0, 4 * there.chip.flops, rate, 0, 1, ""),
            hlo.Operation("b", "fusion", 0, 0, 2 * rate, 0, 1, ""),
            hlo.Operation("c", "copy-start", 0, 0, ahead * rate, 0, 1, "", True),
        )
        return roofline.estimate(hlo.Program((), operations, ()), 1.0, there, mesh)

    # Four seconds of products leave HBM three.
    found = estimate(3)
    assert found.seconds == pytest.approx(6) and found.memory == pytest.approx(2) and found.ahead == pytest.approx(3)
    assert estimate(5).seconds == pytest.approx(8) and estimate(5).memory == pytest.approx(4)


def test_out_of_memory_is_read_from_the_compiler_s_message():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (19.89G) exceeds available HBM (15.75G). HLO module: jit_step."
    )
    assert programs.out_of_memory(message) == (19.89 * 2**30, 15.75 * 2**30)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded hbm "
        "capacity by 768.00M. HLO module: jit_step."
    )
    assert programs.out_of_memory(message) == (16.5 * 2**30, 15.75 * 2**30)
    with pytest.raises(programs.CompilerError, match="gave up: INTERNAL: something"):
        programs.out_of_memory("INTERNAL: something\nelse")


@pytest.mark.parametrize(
    "shape, data, fsdp",
    [
        ((16, 1, 1), -1, 16),
        ((8, 1, 2), -1, 8),
        ((4, 1, 4), -1, 4),
        ((4, 2, 2), 4, None),
        ((1, 16, 1), -1, None),
        ((1, 64, 1), -1, None),
        ((2, 8, 4), 2, None),
        ((8, 1, 1), 8, None),
    ],
)
def test_the_state_is_cut_over_what_the_tensor_groups_and_a_given_data_axis_leave(shape, data, fsdp):
    config = config_lib.load("configs/imagenet256.py:model=mar_huge")
    config = config_lib.resolve(config_lib.apply_overrides(config, {"mesh.data": data}))
    mesh = types.SimpleNamespace(shape=dict(zip(sharding.AXES, shape, strict=True)), size=int(np.prod(shape)))
    lowered = programs.Lowered("train", 2048, 1.0, lambda: None, state_bytes=14 * 2**30)
    compiled = programs.Compiled(lowered, 1.0, programs.Memory(20 * 2**30), None, 15.75 * 2**30)
    advised = [tip for tip in report.advice(compiled, config, mesh) if "mesh.fsdp" in tip]
    assert advised == ([] if fsdp is None else [f"shard the state over more devices: --config.mesh.fsdp={fsdp}"])


@pytest.mark.parametrize(
    "fixed, each, start, most",
    [
        (3.0, 0.1, 32, 3),
        (3.0, 0.1, 128, 4),
        (3.0, 0.1, 1, 6),
        (3.0, 0.1, 1024, 4),
        (0.0, 0.012, 8, 5),
        (14.0, 1.5, 64, 4),
    ],
)
def test_the_search_finds_the_largest_power_that_fits(fixed, each, start, most):
    compiles = []

    def trial(batch):  # not quite even growth
        needed = fixed + each * batch + 0.001 * batch**1.1
        return search.Trial(needed, 16.0, needed <= 16.0, batch)

    def compile_at(batch):
        compiles.append(batch)
        return trial(batch)

    found = search.largest_batch("full", compile_at, start, fixed)
    assert found.batch == found.result == max(batch for batch in (2**i for i in range(11)) if trial(batch).fits)
    assert len(compiles) == len(set(compiles)) <= most
    assert "full" in search.table([found])


def test_the_search_says_when_nothing_fits():
    # The compiler's word counts, not the sum: here one image would fit by numbers.
    found = search.largest_batch("none", lambda batch: search.Trial(14.0 + batch, 16.0, False), 32, 14.0)
    assert found.batch == 0 and found.needed == 15.0 and np.isnan(found.more)
    (line,) = search.table([found]).splitlines()[1:]
    assert line.split()[:5] == ["none", "none", "one", "needs", "0.00"]
    made = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert made["hbm_bytes"] == 15.0 and made["hbm_bytes_of_twice_as_many"] is None
    failed = search.Found("dots", 0, np.nan, 16.0, np.nan, error="the compiler gave up: why")
    assert "gave up: why" in search.table([failed]) and failed.to_json() == {"remat": "dots", "error": failed.error}


@pytest.fixture
def one_device(monkeypatch):
    """A slice of one device, which is this machine's, and no compiler: what a program needs is given by its images."""
    there = topology.Slice("v5e:1x1", chips.of_kind("TPU v5e"), (1, 1), tuple(jax.devices()[:1]))
    monkeypatch.setattr(process, "describe", lambda name: there)

    def use(compile_images):
        monkeypatch.setattr(run, "compile_program", lambda lowered, *_, **__: compile_images(lowered))

    return use


def pretended(lowered, each=2**20):
    needed, usable = lowered.state_bytes + each * lowered.images, 15.75 * 2**30
    program = hlo.Program((), (hlo.Operation("a", "fusion", 1, 1, 1, 0, 1, ""),), ()) if needed < usable else None
    return programs.Compiled(lowered, 1.0, programs.Memory(needed), program, usable)


def test_the_search_serves_configs_that_do_not_run_as_they_are(one_device):
    one_device(pretended)
    # Batches of the search are larger than the data set, and the parts that accumulate may be as many as images.
    config = config_lib.apply_overrides(
        make_digits(),
        {
            "data.num_examples": 100,
            "train.batch_size": 64,
            "train.steps": None,
            "train.epochs": 2,
            "train.accumulate": 64,
        },
    )
    said = []
    found = run.search_batch(config, "v5e:1x1", policies=("none", "full"), log=said.append)
    assert [each.batch for each in found] == [1024, 1024] and "1024" in said[-1]


def test_what_compiled_is_kept_when_the_compiler_gives_up_on_another(one_device, monkeypatch, capsys):
    def some(lowered):
        if lowered.name == "train":
            raise programs.CompilerError("the compiler gave up: INTERNAL: why")
        return pretended(lowered)

    one_device(some)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["compile", "--topology", "v5e:1x1", "--config", f"{DIGITS}:debug", "--json"]) == 2
    told = capsys.readouterr()
    first, second = json.loads(told.out)["programs"]
    assert first == {"program": "train", "error": "the compiler gave up: INTERNAL: why"}
    assert second["program"] == "sample" and second["fits"] and "1 of 2 did not compile" in told.err
    assert cli.main(["compile", "--topology", "v5e:1x1", "--config", f"{DIGITS}:debug", "--search"]) == 2
    told = capsys.readouterr()
    assert "dots   the compiler gave up" in told.out and "3 of 3 did not compile" in told.err


@pytest.mark.parametrize(
    "code, expected",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"train: .*SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", r"train: .*SIGKILL.*memory"),
        (
            "import sys; sys.stdin.buffer.read(1); print('#0 0x1\\n' * 10**5, file=sys.stderr); sys.exit('fatal: why')",
            r"train: .* 1 \(fatal: why\)",
        ),
        ("import os, sys; os.close(0); sys.exit(3)", r"train: .* 3 \(no message\)"),
    ],
)
def test_a_crash_of_the_compiler_is_one_line_that_names_the_program(code, expected, monkeypatch):
    monkeypatch.setattr(process, "_CHILD", code)
    lowered = programs.Lowered("train", 1, 1.0, None, 1)
    with pytest.raises(programs.CompilerError) as caught:
        process.compile_program(lowered, config_lib.resolve(make_digits()), "v5e:1x1")
    assert re.match(expected, str(caught.value)) and "\n" not in str(caught.value)


def test_the_compiler_s_process_has_a_large_stack_and_nothing_of_the_current_folder(monkeypatch, tmp_path):
    (tmp_path / "difflib.py").write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_STACK)
    monkeypatch.setattr(
        process,
        "_CHILD",
        "import difflib, resource, os, sys\n"
        "sys.exit(f'{resource.getrlimit(resource.RLIMIT_STACK)[0]} '\n"
        "         + os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'])",
    )
    with pytest.raises(programs.CompilerError, match=rf"\({min(process.STACK, before[1] % 2**63)} 1\)"):
        process.compile_program(programs.Lowered("train", 1, 1.0, None, 1), config_lib.base(), "v5e:1x1")
    assert resource.getrlimit(resource.RLIMIT_STACK) == before


def test_the_compiler_s_process_answers_with_user_errors_and_ends_with_its_parent():
    with pytest.raises(UserError, match="no chip 'v9'"):
        process.compile_program(programs.Lowered("train", 1, 1.0, None, 1), make_digits(), "v9:2x2")
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", process._CHILD], stdin=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    child.stdin.write(pickle.dumps((make_digits(), "v5e:2x2", "train", False, False)))
    child.stdin.close()  # as the kernel does for a parent that is killed
    assert child.wait(timeout=120) == 1


@pytest.mark.parametrize("name", ["kl", "vq"])
def test_programs_need_no_weights(name):
    head = {"vq": {"model__head": "categorical"}}.get(name, {})
    config = config_lib.resolve(make_autoencoder(name, "no/such/file", **head))
    mesh = sharding.make_mesh(1)
    made = programs.lowered_programs(config, mesh, cached=True)
    assert [each.name for each in made] == list(programs.NAMES)
    with jax.set_mesh(mesh):
        text = made[0].lower().as_text()
    moments = "tensor<16x4x4xi32>" if name == "vq" else "tensor<16x4x4x8xbf16>"
    assert moments in text and "xui8>" not in text
    assert all(each.model_flops > 0 and each.state_bytes > 0 for each in made)


def test_pixels_have_no_latents_to_cache():
    config = config_lib.resolve(make_digits())
    with pytest.raises(UserError, match="cannot be cached"):
        programs.lowered_programs(config, sharding.make_mesh(1), ("train",), cached=True)
    assert [each.name for each in programs.lowered_programs(config, sharding.make_mesh(1))] == ["train", "sample"]


@needs_libtpu
@pytest.mark.slow
def test_a_train_step_compiles_for_tpus_that_are_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    before = jax.config.jax_enable_compilation_cache
    assert (
        cli.main(
            [
                "compile",
                "--topology",
                "v5e-4",
                "--config",
                f"{DIGITS}:debug",
                "--programs",
                "train",
                "--json",
                "--hlo",
                str(tmp_path),
                "--config.model.dtype=bfloat16",
            ]
        )
        == 0
    )
    assert jax.config.jax_enable_compilation_cache == before
    made = json.loads(capsys.readouterr().out)
    (step,) = made["programs"]
    assert made["topology"] == "v5e:2x2" and made["mesh"] == {"data": 4, "fsdp": 1, "tensor": 1}
    assert step["fits"] and 0 < step["hbm_bytes"]["state"] < step["hbm_bytes"]["needed"] < step["hbm_bytes"]["usable"]
    assert step["roofline"]["seconds"] > 0 and step["roofline"]["compiler"] > step["roofline"]["seconds"] / 2
    assert 0 < step["roofline"]["mfu"] < 1 and step["steps"] == 20
    # Products in bfloat16 as asked for, but for the class table's gradient.
    assert step["flops_by_dtype"]["bf16"] > 0.98 * step["flops"] > 0.98 * step["model_flops_all_devices"] / 4
    assert set(step["collective_bytes"]) == {"all-reduce"}
    program = hlo.read((tmp_path / "train.txt").read_text(), 4)
    assert program.flops == step["flops"]


@needs_libtpu
def test_a_described_mesh_keeps_tensor_groups_on_a_host():
    there = topology.describe("v5e:4x4")
    mesh = sharding.make_mesh(-1, 2, 4, there.devices)
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    assert mesh.shape == {"data": 2, "fsdp": 2, "tensor": 4} and (hosts == hosts[..., :1]).all()
    assert len({device.id for device in mesh.devices.flat}) == 16
    with pytest.raises(UserError, match="config.mesh.tensor=8"):
        sharding.make_mesh(-1, 1, 8, there.devices)
    assert isinstance(mesh, Mesh) and mesh.axis_types == (AxisType.Auto,) * 3


@needs_libtpu
@pytest.mark.parametrize(
    "name, hosts",
    [("v5e-1", 1), ("v6e-1", 1), ("v5e-4", 1), ("v5litepod-8", 1), ("v6e-8", 1), ("v5e-16", 4), ("v4-16", 2)],
)
def test_machines_of_a_slice(name, hosts):
    """Eight chips of v5e or v6e are one machine, so that a tensor group may span them."""
    there = topology.describe(name)
    assert len({device.process_index for device in there.devices}) == hosts
    if len(there.devices) == 8 and hosts == 1:
        assert sharding.make_mesh(-1, 1, 8, there.devices).shape["tensor"] == 8


@needs_libtpu
def test_a_shape_that_libtpu_refuses_is_told():
    with pytest.raises(UserError, match="v5e:3x3"):
        topology.describe("v5e:3x3")


@needs_libtpu
@pytest.mark.parametrize("name", ["v6e-64", "v5e-64", "v4-32"])
def test_a_mesh_axis_may_span_part_of_a_side(name):
    """16 is no product of the sides 8 x 8, where jax.make_mesh gives up."""
    there = topology.describe(name)
    mesh = sharding.make_mesh(-1, 16, 1, there.devices)
    assert mesh.shape["fsdp"] == 16 and len({device.id for device in mesh.devices.flat}) == len(there.devices)
    mesh = sharding.make_mesh(-1, -1, 2, there.devices)  # data as it is by default
    assert mesh.shape == {"data": 1, "fsdp": len(there.devices) // 2, "tensor": 2}


def test_a_program_that_jax_cannot_read_back_is_read_from_the_compiler_s_dump(tmp_path):
    class Unreadable:
        def as_text(self):
            raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update")

    with pytest.raises(UserError, match="cannot be read: INTERNAL: RET_CHECK"):
        programs._text_of(Unreadable(), tmp_path)
    (tmp_path / "module_0000.jit_step.after_optimizations.txt").write_text("HloModule step")
    (tmp_path / "module_0000.jit_step.before_optimizations.txt").write_text("HloModule other, which is longer")
    assert programs._text_of(Unreadable(), tmp_path) == "HloModule step"
