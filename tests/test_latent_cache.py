"""The latent cache: what training gets from it, what a kill or another number of hosts leaves, what is refused."""

import dataclasses
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from support.configs import make_autoencoder
from support.processes import Run

from marjax import config as config_lib
from marjax import distributed, train
from marjax.config import resolve
from marjax.data.latent_cache.read import Latents, Manifest, pack, read_manifest, runs, unpack
from marjax.data.pipeline import Batches
from marjax.errors import UserError
from marjax.tokenizers import open_tokenizer
from marjax.training.latent_cache import cache_latents, open_fitting


def make(autoencoders, name="kl", **overrides):
    """Digits under a tiny autoencoder, 100 of them, mirrored half of the time."""
    kind = "kl" if name == "kl" else "vq"
    scale = {"tokenizer__autoencoder__scale": 0.5} if name == "vq_continuous" else {}
    given = {"data__flip": True, "data__split": "train[:100]", "data__num_examples": 100, **scale, **overrides}
    return make_autoencoder(name, autoencoders / f"{kind}.safetensors", **given)


@pytest.fixture(scope="module")
def cache(autoencoders, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "float32"
    made = cache_latents(make(autoencoders), folder, dtype="float32", batch_size=16, shard_examples=30)
    assert made.encoded == 100 and made.manifest.num_shards == 4 and made.manifest.shape == (4, 4, 8)
    assert sorted(os.listdir(folder)) == sorted(
        ["manifest.json", *(f"latents.array_record-{i:05d}-of-00004" for i in range(4))]
    )
    return folder


def files(folder):
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    return np.array([[row["train/loss"], row["train/grad_norm"]] for row in rows])


@pytest.mark.slow
def test_training_from_the_cache_is_training_online(autoencoders, cache, tmp_path):
    config = make(autoencoders, train__steps=3, train__lr=1e-2)
    runs = {
        "online": {},
        "cached": {"data.cache": str(cache)},
        "unflipped": {"data.cache": str(cache), "data.flip": False},
    }
    for name, changes in runs.items():
        train(config_lib.apply_overrides(config, changes), tmp_path / name)
    online, cached, unflipped = (losses(tmp_path / name) for name in runs)
    np.testing.assert_allclose(cached, online, rtol=1e-5)
    # Whether images are mirrored shows in the gradient, so the cache has mirrored the same ones.
    assert np.abs(unflipped[:, 1] / online[:, 1] - 1).min() > 2e-4


@pytest.mark.parametrize(
    "name, posterior", [("kl", "sample"), ("kl", "mean"), ("vq", "sample"), ("vq_continuous", "sample")]
)
def test_latents_of_a_cached_batch_are_those_of_its_images(autoencoders, tmp_path, name, posterior):
    config = config_lib.resolve(make(autoencoders, name, tokenizer__posterior=posterior))
    manifest = cache_latents(config, tmp_path / "cache", dtype="float32").manifest
    assert manifest.dtype == ("int32" if name == "vq" else "float32")
    tokenizer, data = open_tokenizer(config_lib.tokenizer_config(config)), config_lib.data_config(config)
    key = jax.random.key(5)
    with (
        Batches(data, 32, 3) as images,
        Batches(data, 32, 3, examples=Latents(tmp_path / "cache", manifest, flip=True)) as cached,
    ):
        for online, ahead in itertools.islice(zip(images, cached, strict=True), 5):  # more than an epoch
            np.testing.assert_array_equal(ahead["label"], online["label"])
            wanted = tokenizer.encode(tokenizer.params, online["image"].astype(np.float32) / 127.5 - 1.0, key)
            got = tokenizer.latents(tokenizer.params, ahead["moments"], key)
            np.testing.assert_allclose(got, wanted, atol=1e-4)
            again = tokenizer.latents(tokenizer.params, ahead["moments"], jax.random.key(6))
            assert (name, posterior) == ("kl", "sample") or (again == got).all()
            assert (name, posterior) != ("kl", "sample") or (again != got).any()


def test_bfloat16_is_the_rounded_float32(autoencoders, cache, tmp_path):
    cache_latents(make(autoencoders), tmp_path / "half")
    manifest, exact = read_manifest(tmp_path / "half"), read_manifest(cache)
    assert manifest.dtype == "bfloat16" and manifest.num_shards == 50  # as many files as there can be up to 64
    half, whole = Latents(tmp_path / "half", manifest, flip=False), Latents(cache, exact, flip=False)
    rng = np.random.default_rng(0)
    for index in (0, 57, 99):
        (a, label_a), (b, label_b) = half.read(index, rng), whole.read(index, rng)
        assert label_a == label_b and a.dtype == "bfloat16" and (np.asarray(a, np.float32) != b).any()
        np.testing.assert_allclose(np.asarray(a, np.float32), b, rtol=2**-8)


def test_cached_batches_do_not_depend_on_hosts_or_workers(cache, autoencoders):
    data = config_lib.data_config(config_lib.resolve(make(autoencoders)))
    examples = Latents(cache, read_manifest(cache), flip=True)

    def take(data=data, **more):
        with Batches(data, 24, 1, start_step=2, examples=examples, **more) as batches:
            return list(itertools.islice(batches, 6))

    whole = take()
    parts = [take(rows=rows) for rows in np.split(np.arange(24), 2)]
    for step, batch in enumerate(whole):
        for key in ("moments", "label"):
            np.testing.assert_array_equal(np.concatenate([part[step][key] for part in parts]), batch[key])
    for one, other in zip(whole, take(dataclasses.replace(data, workers=1)), strict=True):
        np.testing.assert_array_equal(one["moments"], other["moments"])


def test_a_second_call_makes_only_what_is_missing(autoencoders, cache, tmp_path):
    folder, config = tmp_path / "cache", make(autoencoders)
    cache_latents(config, folder, dtype="float32", batch_size=16, shard_examples=30)
    before = files(folder)
    assert before == files(cache)
    assert cache_latents(config, folder, dtype="float32", batch_size=16).encoded == 0 and files(folder) == before
    for shard in (0, 2):
        (folder / f"latents.array_record-{shard:05d}-of-00004").unlink()
    with pytest.raises(UserError, match="lacks 2 of 4 files"):
        Latents(folder, read_manifest(folder), flip=True)
    # Other batches than at first, but the same files' worth.
    assert cache_latents(config, folder, dtype="float32", batch_size=16).encoded == 60
    assert files(folder).keys() == before.keys()
    again, first = (Latents(each, read_manifest(each), flip=False) for each in (folder, cache))
    rng = np.random.default_rng(0)
    for index in range(100):
        (a, label_a), (b, label_b) = again.read(index, rng), first.read(index, rng)
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert label_a == label_b


def encode(autoencoders, out, batch_size):
    """In a process of its own, or in one of several."""
    distributed.start()
    made = cache_latents(make(autoencoders), out, dtype="float32", batch_size=batch_size, shard_examples=10)
    print("encoded", made.encoded)
    return distributed.end(0, None)


def test_a_killed_run_is_gone_on_with(autoencoders, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    cache_latents(make(autoencoders), whole, dtype="float32", batch_size=1, shard_examples=10)
    with Run(tmp_path, encode, autoencoders, killed, 1) as run:
        run.wait_for(lambda: list(killed.glob("*-00003-of-00010")))
        run.processes[0].kill()
        assert run.wait() == [-signal.SIGKILL], run.said()
    if not (killed / "manifest.json").exists():  # else it was quicker than the kill
        with pytest.raises(UserError, match="not finished"):
            read_manifest(killed)
    done = len(list(killed.glob("*-of-00010")))
    made = cache_latents(make(autoencoders), killed, dtype="float32", batch_size=1)
    assert done >= 4 and made.encoded == 100 - 10 * done
    assert files(killed) == files(whole)


def test_two_processes_with_two_devices_each_make_what_one_makes(autoencoders, cache, tmp_path):
    with Run(tmp_path, encode, autoencoders, tmp_path / "two", 8, count=2, devices=2) as run:
        assert run.wait() == [0, 0], run.said()
        assert all("encoded 50" in log.read_text() for log in run.logs), run.said()
    two, one = (Latents(folder, read_manifest(folder), flip=False) for folder in (tmp_path / "two", cache))
    assert len(list((tmp_path / "two").iterdir())) == 11
    rng = np.random.default_rng(0)
    for index in range(100):
        (a, label_a), (b, label_b) = two.read(index, rng), one.read(index, rng)
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert label_a == label_b


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"data__split": "train[:101]", "data__num_examples": 101}, "split 'train[:100]' instead of 'train[:101]'"),
        ({"data__image_size": 16}, "image_size 8 instead of 16"),
        ({"data__source": "mnist"}, "source 'digits' instead of 'mnist'"),
        ({"data__num_examples": 99}, "num_examples 100 instead of 99"),
        ({"data__num_classes": 9}, "num_classes 10 instead of 9"),
    ],
)
def test_a_cache_of_other_images_is_refused(autoencoders, cache, tmp_path, changes, said):
    with pytest.raises(UserError) as caught:
        train(make(autoencoders, data__cache=str(cache), **changes), tmp_path / "run")
    assert said in str(caught.value) and not (tmp_path / "run").exists()


def test_a_cache_of_other_images_of_the_same_name_is_refused(autoencoders, cache, tmp_path, monkeypatch):
    """Other contents under the same source, split and number: told by a sample of what is stored."""
    import marjax.data.sources as sources

    own = sources._digits()
    other = (255 - own[0], own[1])
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    (copy / "latents.array_record-00002-of-00004").unlink()
    monkeypatch.setattr(sources, "_digits", lambda: other)
    with pytest.raises(UserError, match="fingerprint '.*' instead of"):
        train(make(autoencoders, data__cache=str(cache)), tmp_path / "run")
    with pytest.raises(UserError, match="another latent cache .it has fingerprint"):
        cache_latents(make(autoencoders), copy, dtype="float32", batch_size=16)
    assert not (tmp_path / "run").exists() and len(list(copy.glob("latents*"))) == 3

    # Where the images are gone, the cache stands for itself.
    def gone(data):
        raise UserError("gone")

    monkeypatch.setattr("marjax.data.latent_cache.write.open_source", gone)
    config = resolve(make(autoencoders, data__cache=str(cache)))
    assert open_fitting(config, open_tokenizer(config_lib.tokenizer_config(config))).num_examples == 100


@pytest.mark.parametrize("text", ["[1, 2]", "null", "3", '{"checksum": "c"}', "[" * 100_000, "\0"])
def test_a_manifest_that_is_none(autoencoders, cache, tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_manifest(tmp_path)
    with pytest.raises(UserError, match=r"a manifest\.json that cannot be read"):
        cache_latents(make(autoencoders), tmp_path)


@pytest.mark.parametrize(
    "name, value",
    [
        ("num_examples", 0),
        ("num_examples", 10**15),
        ("num_examples", 1e3),
        ("shard_examples", 0),
        ("shape", []),
        ("shape", [4, -4, 8]),
        ("shape", [1 << 20] * 3),
        ("shape", [1] * 40),
        ("shape", 4),
        ("flips", 1),
        ("format", 2),
        ("dtype", "float64"),
        ("dtype", []),
        ("num_classes", True),
        ("checksum", None),
        ("split", "a\nb"),
    ],
)
def test_a_field_that_cannot_be_is_named(cache, tmp_path, name, value):
    fields = json.loads((cache / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {name: value}))
    with pytest.raises(UserError, match=rf"manifest\.json: {name}.* is "):
        read_manifest(tmp_path)


def test_sizes_that_the_files_do_not_have(cache, tmp_path):
    """10^12 examples: the list of their files alone would fill the memory."""
    fields = json.loads((cache / "manifest.json").read_text())
    for path in cache.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for changes in (
        {"num_examples": 10**12},
        {"num_examples": 10**12, "shard_examples": 1},
        {"num_examples": 119},
        {"shard_examples": 10**12},
    ):
        (tmp_path / "manifest.json").write_text(json.dumps(fields | changes))
        with pytest.raises(UserError, match=str(tmp_path)):
            Latents(tmp_path, read_manifest(tmp_path), flip=False)
    (tmp_path / "manifest.json").write_text(json.dumps(fields | {"num_classes": 1}))
    latents = Latents(tmp_path, read_manifest(tmp_path), flip=False)
    with pytest.raises(UserError, match="label"):
        [latents.read(index, np.random.default_rng(0)) for index in range(len(latents))]


def test_a_file_of_a_cache_that_is_none(cache, tmp_path):
    for file, content in files(cache).items():
        (tmp_path / file).write_bytes(content)
    shard = tmp_path / "latents.array_record-00001-of-00004"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(UserError, match=f"{shard.name}"):
        Latents(tmp_path, read_manifest(tmp_path), flip=True)
    shard.unlink()
    shard.write_bytes(b"")
    os.truncate(shard, 8 << 30)
    with pytest.raises(UserError, match=f"{shard.name} (is damaged|has .* records)"):
        Latents(tmp_path, read_manifest(tmp_path), flip=True)


def test_a_cache_of_another_tokenizer_is_refused(autoencoders, cache, tmp_path):
    with pytest.raises(UserError, match=r"checksum .* instead of .*shape \(4, 4, 8\) instead of \(4, 4\).*dtype"):
        train(make(autoencoders, "vq", data__cache=str(cache)), tmp_path / "run")
    with pytest.raises(UserError, match=r"data\.cache.*'pixels'"):
        train(make(autoencoders, data__cache=str(cache), tokenizer__name="pixels"), tmp_path / "run")
    with pytest.raises(UserError, match=r"tokenizer\.name=pixels"):
        cache_latents(make(autoencoders, tokenizer__name="pixels"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_cache_without_flips_is_refused_where_images_are_mirrored(autoencoders, cache, tmp_path):
    cache_latents(make(autoencoders, data__flip=False), tmp_path / "plain", dtype="float32")
    config = make(autoencoders, data__cache=str(tmp_path / "plain"))
    with pytest.raises(UserError, match=r"config\.data\.flip"):
        train(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.data\.flip"):
        Latents(tmp_path / "plain", read_manifest(tmp_path / "plain"), flip=True)


def test_the_cache_says_how_many_examples_and_classes_there_are(autoencoders, cache):
    # The source itself need not be on the machine that trains.
    config = make(autoencoders, data__cache=str(cache), data__source="tfds:elsewhere")
    config = config_lib.apply_overrides(config, {"train.steps": None, "train.warmup_steps": None})
    config.data.update(num_examples=None, num_classes=None)
    config.train.update(epochs=2.0, warmup_epochs=0.0)
    config = config_lib.resolve(config)
    assert (config.data.num_examples, config.data.num_classes) == (100, 10)
    assert config.train.steps == 2 * (100 // config.train.batch_size)


def test_damage_is_told(autoencoders, cache, tmp_path):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files(cache).items():
            (folder / file).write_bytes(content)
        return folder

    shard = "latents.array_record-00001-of-00004"
    cut = copy("cut")
    (cut / shard).write_bytes((cut / shard).read_bytes()[:-70_000])
    with pytest.raises(UserError, match=rf"{shard} (is damaged|has \d+ records).*remove it"):
        Latents(cut, read_manifest(cut), flip=True)
    short = copy("short")
    (short / shard).write_bytes((short / "latents.array_record-00003-of-00004").read_bytes())
    with pytest.raises(UserError, match=f"{shard} has 20 records instead of 60"):
        Latents(short, read_manifest(short), flip=True)
    for text in ("{}", "nonsense", (cache / "manifest.json").read_text().replace("float32", "float64")):
        (short / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(short)
    with pytest.raises(UserError, match=r"nowhere .*manifest\.json"):
        read_manifest(tmp_path / "nowhere")


def test_a_folder_of_something_else_is_left_alone(autoencoders, tmp_path):
    config, folder = make(autoencoders), tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"has other files, such as thesis\.txt"):
            cache_latents(config, folder, overwrite=overwrite)
    assert os.listdir(folder) == ["thesis.txt"]
    cache_latents(config, tmp_path / "cache", dtype="float32")
    before = files(tmp_path / "cache")
    with pytest.raises(UserError, match="holds another latent cache .*dtype 'float32' instead of 'bfloat16'"):
        cache_latents(config, tmp_path / "cache")
    assert files(tmp_path / "cache") == before
    assert cache_latents(config, tmp_path / "cache", overwrite=True).encoded == 100
    assert read_manifest(tmp_path / "cache").dtype == "bfloat16"


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_examples": 0}, "shard_examples is 0"),
        ({"out": "gs://bucket/cache"}, "not on this machine"),
    ],
)
def test_arguments_out_of_range_are_refused(autoencoders, tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        cache_latents(make(autoencoders), **{"out": tmp_path / "out", **changes})
    assert not list(tmp_path.iterdir())


def test_records_and_runs():
    manifest = Manifest("c", "s", "train", "f", 8, 1, "center", 5, 10, True, (2, 3), "bfloat16", "float32", 2)
    moments = np.arange(6, dtype=np.float32).reshape(2, 3).astype("bfloat16")
    record = pack(moments, 7)
    assert len(record) == manifest.record_bytes == 16
    back, label = unpack(record, manifest)
    assert label == 7 and (back == moments).all()
    with pytest.raises(ValueError, match="15 bytes, expected 16"):
        unpack(record[:-1], manifest)
    assert [manifest.examples_of(shard) for shard in range(manifest.num_shards)] == [range(2), range(2, 4), range(4, 5)]
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert runs([0, 1, 4]) == [range(2), range(4, 5)] and runs([]) == []
