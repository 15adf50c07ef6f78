"""The file of an autoencoder, what a config asks of it, and training on its latents."""

import json
import struct

import numpy as np
import pytest
from safetensors import numpy as safetensors
from support.configs import TINY_AUTOENCODER, make_autoencoder

from marjax import config as config_lib
from marjax import sample, train
from marjax.errors import UserError
from marjax.tokenizers import autoencoder_file, open_tokenizer
from marjax.tokenizers.autoencoder_names import to_state_dict
from marjax.tokenizers.spec import AUTOENCODERS
from marjax.workdir import read_workdir


def resolve(name, path="", **overrides):
    return config_lib.resolve(make_autoencoder(name, path, **overrides))


def test_file_round_trip(autoencoders, tmp_path):
    path = tmp_path / "copy.safetensors"
    for kind in ("kl", "vq"):
        stored = autoencoder_file.read(autoencoders / f"{kind}.safetensors")
        assert stored.spec.kind == kind and stored.scale == {"kl": 0.5, "vq": None}[kind]
        checksum = autoencoder_file.write(path, stored.spec, stored.params, stored.scale)
        assert checksum == stored.checksum and len(checksum) == 64
        assert path.read_bytes() == (autoencoders / f"{kind}.safetensors").read_bytes()
        # Others read it under the reference's names and layouts.
        tensors = safetensors.load_file(path)
        assert {
            "encoder.down.0.block.0.norm1.weight",
            "decoder.mid.attn_1.q.weight",
            "decoder.up.1.upsample.conv.bias",
            "post_quant_conv.weight",
        } <= tensors.keys()
        assert ("quantize.embedding.weight" in tensors) == (kind == "vq")
        assert tensors["encoder.conv_in.weight"].shape == (32, 1, 3, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["copy.safetensors"]
    with pytest.raises(UserError, match="cannot be written"):
        autoencoder_file.write(tmp_path / "no" / "a.safetensors", stored.spec, stored.params, None)


def test_checksum_is_of_names_shapes_values_and_scale():
    one = {"a": np.arange(4, dtype=np.float32), "b": np.zeros((2, 2), np.float32)}
    bit = {**one, "a": np.array([0, 1, 2, np.nextafter(np.float32(3), np.float32(9))], np.float32)}
    others = [bit, {"c": one["a"], "b": one["b"]}, {**one, "a": one["a"].reshape(2, 2)}]
    checksums = {autoencoder_file.checksum(each, None) for each in (one, *others)}
    assert len(checksums | {autoencoder_file.checksum(one, 0.5)}) == 5
    assert autoencoder_file.checksum({"b": one["b"], "a": one["a"]}, None) in checksums


def test_what_a_free_network_is(autoencoders):
    config = resolve("kl", autoencoders / "kl.safetensors")
    section = config.tokenizer.autoencoder
    assert section.channel_mults == (1, 1) and section.embed_dim == 4 and section.in_channels == 1
    tokens = config_lib.tokens_of(config)
    assert (tokens.num_tokens, tokens.token_dim, tokens.num_codes) == (16, 4, 0)
    assert config_lib.tokens_of(resolve("vq")).num_codes == 16
    assert config_lib.tokens_of(resolve("vq_continuous")).num_codes == 0
    assert config_lib.resolve(config) == config
    assert open_tokenizer(config_lib.tokenizer_config(config)).scale == 0.5  # the file's own
    config = resolve("kl", autoencoders / "kl.safetensors", tokenizer__autoencoder__scale="0.25")
    assert open_tokenizer(config_lib.tokenizer_config(config)).scale == 0.25
    assert open_tokenizer(config_lib.tokenizer_config(resolve("vq", autoencoders / "vq.safetensors"))).scale == 1.0


def test_a_preset_fills_the_section():
    def preset(name, **overrides):
        return config_lib.resolve(
            config_lib.apply_overrides(
                config_lib.base(),
                {
                    "tokenizer.name": name,
                    "data.image_size": 256,
                    "data.channels": 3,
                    "train.steps": 1,
                    "train.warmup_steps": 0,
                    **overrides,
                },
            )
        )

    config = preset("kl16")
    assert config.tokenizer.autoencoder.encoder_attn_resolutions == (16,) and config.tokenizer.num_codes is None
    assert config_lib.resolve(config) == config
    config = preset("vq16", **{"model.head": "categorical"})
    assert config.tokenizer.num_codes == 16384 == config_lib.tokens_of(config).num_codes
    for name, overrides, says in (
        ("kl16", {"tokenizer.autoencoder.width": 64}, "width is 64, but kl16 has 128.*tokenizer.name=kl$"),
        ("kl8", {"tokenizer.autoencoder.channel_mults": "1,2"}, r"channel_mults is \(1, 2\), but kl8 has"),
        ("vq16", {"tokenizer.num_codes": 512}, "tokenizer.num_codes is 512, but vq16 has 16384.*name=vq$"),
        ("kl16", {"data.channels": 1}, "data.channels is 1, but tokenizer kl16 takes 3"),
        ("kl16", {"data.image_size": 200}, "image size 200 is not divisible"),
        ("kl16", {"model.head": "categorical"}, "tokens of config.tokenizer.name=kl16 are continuous"),
    ):
        with pytest.raises(UserError, match=says):
            preset(name, **overrides)


@pytest.mark.parametrize(
    "name, overrides, says",
    [
        ("kl", {"autoencoder.width": "48"}, "multiple of 32"),
        ("kl", {"autoencoder.channel_mults": "1,x"}, "channel_mults='1,x'"),
        ("kl", {"autoencoder.channel_mults": "1,0"}, "channel_mults"),
        ("kl", {"autoencoder.encoder_attn_resolutions": "16"}, "has 16, but the levels .* are 256, 128"),
        ("kl", {"autoencoder.scale": "0"}, "scale is 0.0"),
        ("kl", {"autoencoder.scale": "nan"}, "scale is nan"),
        ("kl", {"autoencoder.dtype": "float16"}, "one of float32, bfloat16"),
        ("kl", {"autoencoder.in_channels": "3"}, "data.channels is 1, but tokenizer kl takes 3"),
        ("vq", {"autoencoder.scale": "0.5"}, "scale is 0.5"),
        ("vq", {"num_codes": "0"}, "num_codes is 0"),
        ("vq", {"patch_size": "2"}, "patch_size is 2"),
    ],
)
def test_bad_fields(name, overrides, says):
    config = make_autoencoder(name, "")
    with pytest.raises(UserError, match=says):
        config_lib.resolve(config_lib.apply_overrides(config, {f"tokenizer.{k}": v for k, v in overrides.items()}))


@pytest.mark.parametrize(
    "name, overrides, says",
    [
        ("kl", dict(path=""), "path is empty.*marjax convert"),
        ("kl", dict(path="nowhere"), "nowhere does not exist.*marjax convert"),
        ("kl", dict(path="."), "is a folder"),
        ("kl", dict(autoencoder__width=64), "kl.safetensors .* width 32 instead of 64"),
        (
            "kl",
            dict(autoencoder__channel_mults=(1, 2), autoencoder__num_res_blocks=2),
            r"channel_mults \(1, 1\) instead of \(1, 2\); num_res_blocks 1 instead of 2",
        ),
        (
            "kl",
            dict(autoencoder__decoder_attn_resolutions=(128,)),
            r"decoder attention at levels \[\] instead of \[1\]",
        ),
        ("vq", {}, "kl.safetensors .*config.tokenizer.name=vq"),
        ("kl", dict(checksum="0" * 64), "kl.safetensors .* 000000000000"),
    ],
)
def test_another_network_than_the_config_asks_for(autoencoders, name, overrides, says):
    given = {f"tokenizer__{key}": value for key, value in overrides.items()}
    config = resolve(name, **{"path": autoencoders / "kl.safetensors", **given})
    with pytest.raises(UserError, match=says) as caught:
        open_tokenizer(config_lib.tokenizer_config(config))
    assert "\n" not in str(caught.value)


def test_official_files_are_named():
    config = config_lib.base()
    for name, file in (("kl16", "kl16.ckpt"), ("kl8", "kl-f8"), ("vq16", "vq-f16")):
        config.tokenizer.name = name
        with pytest.raises(UserError, match=f"marjax convert makes it from .*{file}"):
            open_tokenizer(config_lib.tokenizer_config(config))


def test_latents_before_quantisation_need_a_scale(autoencoders):
    config = resolve("vq_continuous", autoencoders / "vq.safetensors")
    with pytest.raises(UserError, match="autoencoder.scale .*marjax tokenizer check"):
        open_tokenizer(config_lib.tokenizer_config(config))
    # A preset knows its scale, unless the file says otherwise.
    assert (AUTOENCODERS["kl16"].scale, AUTOENCODERS["kl8"].scale) == (0.2325, 0.18215)


def rewritten(path, out, change_tensors=None, change_meta=None):
    tensors = safetensors.load_file(path)
    data = path.read_bytes()
    meta = json.loads(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["marjax"])
    if change_tensors:
        change_tensors(tensors)
    text = json.dumps(meta if change_meta is None else change_meta(meta))
    safetensors.save_file(tensors, out, {"marjax": text})


def test_damaged_files_are_told(autoencoders, tmp_path):
    path, out = autoencoders / "vq.safetensors", tmp_path / "damaged.safetensors"
    tokenizer = config_lib.tokenizer_config(resolve("vq", out))
    data = path.read_bytes()
    bias = "decoder.conv_out.bias"

    def refused(says):
        with pytest.raises(UserError, match=says) as caught:
            open_tokenizer(tokenizer)
        assert "\n" not in str(caught.value) and "damaged.safetensors" in str(caught.value)

    for content in (data[: len(data) // 2], b"", b"text", data[:8], b"\xff" * 100):
        out.write_bytes(content)
        refused("is not a valid safetensors file")
    safetensors.save_file({"a": np.zeros(1)}, out)
    refused("'marjax' .*marjax convert")
    for change in (
        lambda meta: [],
        lambda meta: {},
        lambda meta: {**meta, "kind": "kl"},
        lambda meta: {**meta, "scale": -1},
        lambda meta: {**meta, "scale": "a"},
        lambda meta: {**meta, "spec": {"depth": 3}},
        lambda meta: {**meta, "spec": {**meta["spec"], "width": "32"}},
        lambda meta: {**meta, "spec": {**meta["spec"], "channel_mults": [1.5]}},
    ):
        rewritten(path, out, change_meta=change)
        refused("the metadata of")
    for change, says in (
        (lambda t: t.pop(bias), f"1 tensors .*{bias} is missing"),
        (lambda t: t.update(extra=np.zeros(1, np.float32)), "extra is not used"),
        (lambda t: t.update({bias: t[bias].astype(np.float64)}), f"{bias} is float64"),
        (lambda t: t.update({bias: t[bias] * np.float32("nan")}), f"{bias} is not finite"),
        (
            lambda t: t.update({"quantize.embedding.weight": np.zeros((15, 4), np.float32)}),
            r"weight has shape \(15, 4\) instead of \(16, 4\)",
        ),
    ):
        rewritten(path, out, change_tensors=change)
        refused(says)
    # Networks that would be traced for ever, by what the file says and by names; deep JSON; more bytes than it has.
    for change in ({"num_res_blocks": 10**6}, {"num_res_blocks": 60_000}, {"channel_mults": [1] * 12}):
        rewritten(
            path,
            out,
            change_meta=lambda meta, change=change: {**meta, "spec": {**meta["spec"], "resolution": 2048, **change}},
        )
        refused("the metadata of|do not fit a VQ autoencoder of [0-9]+ blocks")
    rewritten(path, out, change_meta=lambda meta: {**meta, "spec": {**meta["spec"], "channel_mults": [1] * 10**5}})
    refused("the metadata of")
    head, again = struct.pack("<Q", 13), "without 'marjax' in its metadata"
    for content, says in (
        (head + b'{"a": [1, 2]}', "a is an array"),
        (head + b"[1,2,3,4,5,6]", "an array, expected"),
        (struct.pack("<Q", 99_999) + b"[" * 99_999, "nested deeper"),
        (head + b"{" + b" " * 11 + b"}", again),
        (struct.pack("<Q", 1 << 60) + b"{}", "10 bytes"),
    ):
        out.write_bytes(content)
        refused(says)
    deep = {"marjax": "[" * 100_000}
    safetensors.save_file({"a": np.zeros(1, np.float32)}, out, deep)
    refused("nested deeper")
    rewritten(path, out)
    with out.open("ab") as file:
        file.truncate(1 << 36)
    refused(f"{1 << 36} bytes")
    rewritten(path, out)
    stored = autoencoder_file.read(out)
    assert open_tokenizer(tokenizer).checksum == stored.checksum
    assert to_state_dict(stored.spec, stored.params).keys() == safetensors.load_file(out).keys()


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("kl", {}),
        pytest.param("vq", dict(model__head="categorical"), marks=pytest.mark.slow),
        pytest.param("vq_continuous", dict(tokenizer__autoencoder__scale=0.25), marks=pytest.mark.slow),
    ],
)
def test_training_and_sampling(autoencoders, tmp_path, name, overrides):
    path = tmp_path / "tokenizer.safetensors"
    path.write_bytes((autoencoders / f"{name[:2]}.safetensors").read_bytes())
    config = make_autoencoder(
        name,
        path,
        train__steps=2,
        sample__num_iter=3,
        sample__num_sampling_steps="ddim4",
        sample__max_stages=1,
        sample__batch_size=4,
        **overrides,
    )
    config.train.schedule = None
    assert int(train(config, tmp_path / "run").step) == 2
    saved = read_workdir(tmp_path / "run")
    checksum = autoencoder_file.read(path).checksum
    assert saved.tokenizer.checksum == checksum and saved.tokenizer.autoencoder.channel_mults == (1, 1)
    moved = path.rename(tmp_path / "moved.safetensors")
    with pytest.raises(UserError, match=r"tokenizer.safetensors does not exist.*--tokenizer_path"):
        sample(tmp_path / "run", [0])
    images = sample(tmp_path / "run", [0, 1, 2, 3], tokenizer_path=str(moved))
    assert images.shape == (4, 8, 8, 1) and len({image.tobytes() for image in images}) == 4
    rewritten(moved, path, change_meta=lambda meta: {**meta, "scale": 0.75})
    with pytest.raises(UserError, match="tokenizer.safetensors has checksum"):
        sample(tmp_path / "run", [0])


def test_tiny_is_what_the_fixture_has(autoencoders):
    spec = autoencoder_file.read(autoencoders / "kl.safetensors").spec
    assert {key: getattr(spec, key) for key in TINY_AUTOENCODER} == TINY_AUTOENCODER
