"""Weights in several files with an index: all of them to the bit, and only if they are the files that it names."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.paths import PARITY

from marjax.errors import UserError
from marjax.interop.weights_file import read
from marjax.interop.wrappers import choose

WHOLE = PARITY / "checkpoints" / "mar_tiny.safetensors"
BIN = PARITY / "sharded" / "mar_bin"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    """The weights in three shards."""
    arrays = load_file(WHOLE)
    places = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(sorted(arrays))}
    for shard in set(places.values()):
        save_file({name: arrays[name] for name, each in places.items() if each == shard}, tmp_path / shard)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return tmp_path


def change(folder, function):
    """Rewrites the index."""
    index = json.loads((folder / INDEX).read_text())
    function(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def test_all_tensors(folder):
    expected = load_file(WHOLE)
    for path in (folder, folder / INDEX, BIN, BIN / "pytorch_model.bin.index.json"):
        file = read(path)
        assert file.metadata is None and file.size > 1e6 and file.content.keys() == expected.keys()
        for name, array in expected.items():
            assert np.asarray(file.content[name]).tobytes() == array.tobytes()
    # A folder with both formats, or with a whole file alone.
    shutil.copy(BIN / "pytorch_model.bin.index.json", folder)
    assert read(folder).content.keys() == expected.keys()
    (folder / "alone").mkdir()
    shutil.copy(WHOLE, folder / "alone" / "diffusion_pytorch_model.safetensors")
    assert read(folder / "alone").content.keys() == expected.keys()


def test_other_files_are_refused(folder):
    def says(text, path=folder):
        with pytest.raises(UserError, match=text) as caught:
            read(path)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)

    good, first, second = (folder / INDEX).read_text(), *sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    for place in ("../x.safetensors", "/etc/passwd", "a/b.bin", "..", ".", "", "..\\x.bin", "\0", INDEX):
        change(folder, lambda places, place=place: places.update({name: place}))
        says("is no file beside it")
    (folder / INDEX).write_text(good)
    change(folder, lambda places: places.update({name: second.name}))
    says(f"{first.name} has the tensor {name}, which is in {second.name}")
    (folder / INDEX).write_text(good)
    change(folder, lambda places: places.pop(name))
    says(f"{first.name} has the tensor {name}, which is in none")
    (folder / INDEX).write_text(good)
    change(folder, lambda places: places.update({"more.weight": first.name}))
    says(f"{first.name} has no tensor more.weight .of 1 that are missing")
    (folder / INDEX).write_text(good)
    second.rename(folder / "aside")
    says(f"1 of 3 shards that are not beside it .{second.name}")
    second.mkdir()
    says(f"{second.name} cannot be read")
    second.rmdir()
    second.write_bytes(b"404: Not Found\n")
    says(f"{second.name} is a text")
    (folder / INDEX).write_text(json.dumps({"weight_map": {f"x{i}": f"{i}.bin" for i in range(300)}}))
    says("names 300 shards")
    for text, problem in (
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": 1}}', "weight_map.a is 1"),
        ("[", "JSON"),
        ('{"weight_map": {}}', "names 0 shards"),
        ("[" * 100_000, "nested deep"),
    ):
        (folder / INDEX).write_text(text)
        says(problem)
    shutil.copy(folder / INDEX, folder / "other.safetensors.index.json")
    says("several indexes")
    with pytest.raises(UserError, match=f"{first} is one of 3 shards"):
        choose(read(first), ["z_proj.weight"], first)
    (folder / "empty").mkdir()
    says("is a folder without an index", folder / "empty")
    (folder / "empty" / "__0_0.distcp").touch()
    says("is a checkpoint of torch.distributed", folder / "empty")
