"""Eight devices agree with one, for every kind of mesh. They are CPU devices of a process of their own."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from support.configs import MODELS, make_digits, make_model
from support.paths import ROOT
from support.processes import run_program

from marjax import config as config_lib
from marjax import sharding
from marjax.assembly import assemble
from marjax.errors import UserError
from marjax.models.init import init_params

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
OTHERS = [model for model in MODELS[1:] if model != ("ar", "diffusion")]  # whose halves the first and the last have


def fields(config):
    given = config_lib.flatten(
        config_lib.apply_overrides(
            config,
            {
                "model.attn_dropout": 0.1,
                "model.proj_dropout": 0.1,
                "train.warmup_steps": 0,
                "train.batch_size": 32,
                "train.clip": 1e9,
                "sample.num_sampling_steps": "ddim4",
                "sample.max_stages": 1,
            },
        )
    )
    return {key: value for key, value in given.items() if value is not None}


@pytest.fixture(scope="module")
def report_of(once, codebook):
    """The program's report on a model: the first on all meshes, the others on one with all axes."""

    def get(model):
        config = make_digits(sample__num_iter=3) if model == MODELS[0] else make_model(*model, codebook)
        meshes = MESHES if model == MODELS[0] else [(2, 2, 2)]

        def make(folder):
            done = run_program("support.programs.sharding", json.dumps(fields(config)), json.dumps(meshes), devices=8)
            (folder / "report.json").write_text(done.stdout.splitlines()[-1])

        return json.loads((once(f"sharding-{'-'.join(model)}", make) / "report.json").read_text())

    return get


@pytest.fixture(scope="module")
def report(report_of):
    return report_of(MODELS[0])


def assert_agrees(row, distinct=12):
    assert row["metrics"] < 1e-4 and row["grads"] < 1e-3 and row["params"] < 1e-3 and row["ema"] < 1e-3
    assert row["images"] <= 1 and row["distinct"] == distinct


@pytest.mark.parametrize("shape", MESHES)
def test_meshes_agree_with_one_device(report, shape):
    assert_agrees(report[str(shape)])


@pytest.mark.slow
@pytest.mark.parametrize("variant, head", OTHERS)
def test_variants_and_heads_agree_with_one_device(report_of, variant, head):
    rows = report_of((variant, head))
    # Means in raster order know nothing but the class: 12 samples of 10 classes.
    assert_agrees(rows["(2, 2, 2)"], distinct=10 if (variant, head) == ("ar", "regression") else 12)
    assert rows["(2, 2, 2)"]["sharded"] and rows["(2, 2, 2)"]["collectives"]


def test_parameters_are_sharded_and_devices_communicate(report):
    assert report["one"] == {"sharded": 0, "collectives": 0}
    assert report["(8, 1, 1)"]["sharded"] == 0 < report["(2, 4, 1)"]["sharded"] < report["(2, 2, 2)"]["sharded"]
    assert all(report[str(shape)]["collectives"] for shape in MESHES)


def test_mesh_sizes():
    one = jax.devices()[:1]
    assert sharding.make_mesh(devices=one).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    assert sharding.make_mesh(-1, -1, devices=one).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    for sizes in ((2, 1, 1), (-1, 1, -1), (0, 1, 1), (-1, 2, 1)):
        with pytest.raises(UserError, match="mesh"):
            sharding.make_mesh(*sizes, devices=one)


@pytest.fixture(scope="module")
def large():
    """The 60 parameters of MAR-L with their logical names, as shapes."""
    config = config_lib.resolve(config_lib.load(str(ROOT / "configs" / "imagenet256.py") + ":model=mar_large"))
    generator = assemble(config).generator
    return jax.eval_shape(lambda: init_params(generator, jax.random.key(0)))


def abstract_mesh(data, fsdp, tensor):
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


def specs(tree):
    return {path: leaf.sharding.spec for path, leaf in sharding._named(tree)}


def test_small_tensors_are_replicated_however_many_layers(large):
    mesh = abstract_mesh(1, 16, 1)
    every, most, none = (
        specs(sharding.parameters(large, mesh, below)) for below in (0, sharding.REPLICATE_BELOW, 10**9)
    )
    bias, kernel = "backbone/encoder/blocks/mlp/fc2/bias", "backbone/encoder/blocks/mlp/fc2/kernel"
    assert every[bias] == PartitionSpec(None, "fsdp") and most[bias] == PartitionSpec()  # 16 layers of 1024
    assert every[kernel] == most[kernel] == PartitionSpec(None, "tensor", "fsdp") and not any(map(any, none.values()))
    # What stays whole by default is next to nothing of the state.
    tree = sharding.parameters(large, mesh)
    whole = sum(leaf.size for leaf in jax.tree.leaves(tree) if leaf.sharding.is_fully_replicated)
    assert 0 < whole < 0.01 * sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_denoiser_is_not_sharded_over_tensor(large):
    found = specs(sharding.parameters(large, abstract_mesh(1, 1, 4)))
    cut = {path.split("/")[0] for path, spec in found.items() if "tensor" in spec}
    assert cut == {"backbone"}


def test_overview_lists_shardings_and_bytes_per_device(large):
    tree = sharding.parameters(large, abstract_mesh(2, 4, 2))
    lines = sharding.overview(tree).splitlines()
    (row,) = (line for line in lines if line.startswith("backbone/decoder/blocks/attn/qkv/kernel"))
    assert "16 x 1024 x 3 x 16 x 64" in row and "layers embed>fsdp - heads>tensor kv" in row
    # 192 MiB of float32, in 8 parts, and three as large beside it.
    assert row.split()[-4:] == ["192.00", "MiB", "96.00", "MiB"] and "warning" not in lines[-1]
    state = sum(4 * 4 * np.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
    assert lines[-1].endswith(f" {state / 2**20:,.2f} MiB") and lines[-1].startswith("all 60 ")
    assert "tensors, replicated" in lines[-2]


def test_overview_warns_of_unused_mesh_axes(large):
    lines = sharding.overview(sharding.parameters(large, abstract_mesh(1, 3, 5))).splitlines()
    assert [line for line in lines if line.startswith("warning")] == sharding.warnings(
        sharding.parameters(large, abstract_mesh(1, 3, 5))
    )
    text = " ".join(lines[-2:])
    assert "mesh axis fsdp=3" in text and "mesh axis tensor=5" in text and "with embed=" in text
    assert not sharding.warnings(sharding.parameters(large, abstract_mesh(1, 1, 1)))


class Device:
    """What a mesh asks of a device."""

    def __init__(self, id, process_index):
        self.id, self.process_index = id, process_index


def test_tensor_groups_stay_within_a_process():
    interleaved = [Device(i, i % 2) for i in range(8)]
    grid = sharding._within_processes(interleaved, (1, 2, 4))
    assert [[device.process_index for device in group] for group in grid[0]] == [[0] * 4, [1] * 4]
    assert sharding._spans_processes(np.array(interleaved, object).reshape(1, 2, 4))
    assert not sharding._spans_processes(grid)
    with pytest.raises(UserError, match="config.mesh.tensor=8 .* 4 devices"):
        sharding._within_processes(interleaved, (1, 1, 8))


def test_batch_size_must_be_divisible_by_the_mesh():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    sharding.check_batch(mesh, 6, 2)
    with pytest.raises(UserError, match="not divisible"):
        sharding.check_batch(mesh, 6, 4)
