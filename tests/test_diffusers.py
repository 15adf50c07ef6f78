"""Autoencoders as diffusers saves them: the same network as under LDM's names, and its numbers."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.compare import relative_error
from support.paths import PARITY

from marjax.cli import main
from marjax.errors import UserError
from marjax.interop import weights_file
from marjax.interop.convert_tokenizer import read_autoencoder
from marjax.tokenizers.autoencoder import Autoencoder

OLD = PARITY / "diffusers_kl" / "old_names"
LDM = PARITY / "checkpoints" / "kl_small.ckpt"
NAME = "diffusion_pytorch_model.safetensors"
NEW = (
    (".down.0.block.", ".down_blocks.0.resnets."),
    (".down.1.block.", ".down_blocks.1.resnets."),
    (".down.0.downsample.", ".down_blocks.0.downsamplers.0."),
    (".up.1.block.", ".up_blocks.0.resnets."),
    (".up.0.block.", ".up_blocks.1.resnets."),
    (".up.1.upsample.", ".up_blocks.0.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".mid.attn_1.norm.", ".mid_block.attentions.0.group_norm."),
    (".mid.attn_1.q.", ".mid_block.attentions.0.to_q."),
    (".mid.attn_1.k.", ".mid_block.attentions.0.to_k."),
    (".mid.attn_1.v.", ".mid_block.attentions.0.to_v."),
    (".mid.attn_1.proj_out.", ".mid_block.attentions.0.to_out.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
)


@pytest.fixture
def folder(tmp_path):
    """The small autoencoder of LDM under today's names of diffusers, with the config of one like it."""
    tensors = {}
    for name, tensor in weights_file.read(LDM).content["model"].items():
        for ours, theirs in NEW:
            name = name.replace(ours, theirs)
        array = np.asarray(tensor)
        tensors[name] = array[..., 0, 0] if ".attentions." in name and array.ndim == 4 else array
    save_file(tensors, tmp_path / NAME)
    config = json.loads((OLD / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.13025, "shift_factor": None}))
    return tmp_path


def test_the_numbers_of_diffusers():
    """Old names of attention, and a config that does not say the scale."""
    numbers, found = np.load(OLD / "numbers.npz"), read_autoencoder(OLD)
    assert (found.name, found.scale) == ("kl", 0.18215)
    network = Autoencoder(found.spec)
    images = jnp.asarray(numbers["in/images"]).transpose(0, 2, 3, 1)
    moments = jax.jit(functools.partial(network.apply, method=Autoencoder.encode))({"params": found.params}, images)
    moments = moments.transpose(0, 3, 1, 2)
    assert relative_error(moments[:, :4], numbers["out/mean"]) < 1e-4
    latents = jnp.asarray(numbers["out/latents"]).transpose(0, 2, 3, 1) / found.scale
    decoded = jax.jit(functools.partial(network.apply, method=Autoencoder.decode))({"params": found.params}, latents)
    assert relative_error(decoded.transpose(0, 3, 1, 2), numbers["out/decoded"]) < 1e-4


def test_the_same_as_under_ldms_names(folder, tmp_path):
    expected = read_autoencoder(LDM)
    assert expected.scale is None
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    shutil.copytree(folder, pipeline / "vae", ignore=shutil.ignore_patterns("pipeline"))
    for path in (folder, folder / NAME, pipeline):
        found = read_autoencoder(path)
        assert found.spec == expected.spec and found.scale == 0.13025
        jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    (folder / "config.json").unlink()
    assert read_autoencoder(folder).scale is None
    assert main(["convert", "--tokenizer", str(pipeline), "--out", str(tmp_path / "x.safetensors")]) == 0
    jax.tree.map(np.testing.assert_array_equal, read_autoencoder(tmp_path / "x.safetensors").params, expected.params)


def test_other_networks_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    for change, text in (
        ({"shift_factor": 0.1159}, "config.json has shift_factor 0.1159"),
        ({"norm_num_groups": 8}, "config.json has norm_num_groups 8"),
        ({"use_quant_conv": False}, "config.json has use_quant_conv False"),
        ({"_class_name": "AutoencoderDC"}, "config.json is of a AutoencoderDC"),
        ({"scaling_factor": "x"}, 'config.json: scaling_factor is "x"'),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(UserError, match=text):
            read_autoencoder(folder)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / NAME)
    for change, text in (
        ({"decoder.up_blocks.5000.resnets.0.x": np.zeros(1)}, "layer 5000 "),
        ({"encoder.mid_block.attentions.0.query.bias": np.zeros(1)}, "mixes old and new names"),
        ({"encoder.mid_block.attentions.0.more": np.zeros(1)}, "attn_1.more is not used"),
    ):
        save_file(tensors | change, folder / NAME)
        with pytest.raises(UserError, match=f"{folder}.*{text}"):
            read_autoencoder(folder)
