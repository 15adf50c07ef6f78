"""launch/colab.ipynb, executed where marjax is installed: what it shows, with and without the official weights."""

import ast
import base64
import importlib.util
import io
import subprocess

import numpy as np
import pytest
from PIL import Image
from support.paths import PARITY, ROOT

nbformat = pytest.importorskip("nbformat", reason="comes with nbclient, of the extra test")
nbclient = pytest.importorskip("nbclient", reason="of the extra test")

FILE = ROOT / "launch" / "colab.ipynb"
FILES = PARITY / "checkpoints"


def tagged(notebook, tag):
    [cell] = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    return cell


def test_it_is_stored_without_outputs():
    notebook = nbformat.read(FILE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.cells.index(tagged(notebook, "install")) < notebook.cells.index(tagged(notebook, "settings"))
    for cell in code:
        ast.parse(cell.source)  # plain Python, which runs in other notebooks than Colab's too
    # The addresses are the README's.
    settings = {}
    exec(tagged(notebook, "settings").source, settings)
    assert settings["CHECKPOINT"] in (ROOT / "README.md").read_text()


def test_the_install_cell_finds_marjax_where_it_is(tmp_path, monkeypatch):
    """Installed, named in the environment, around the notebook, or an uploaded wheel; else it says what to do."""
    cell, asked, there = tagged(nbformat.read(FILE, as_version=4), "install").source, [], []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there or None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command[-1]))
    monkeypatch.delenv("MARJAX_SOURCE", raising=False)

    def installed(folder):
        monkeypatch.chdir(folder)
        asked.clear()
        exec(cell, {})
        return asked[:]

    with pytest.raises(FileNotFoundError, match="upload.*MARJAX_SOURCE"):
        installed(tmp_path)
    wheel = tmp_path / "marjax-0.1.0-py3-none-any.whl"
    wheel.touch()
    assert installed(tmp_path) == [str(wheel)]
    assert installed(ROOT / "launch") == [str(ROOT)]
    monkeypatch.setenv("MARJAX_SOURCE", "git+https://example.org/marjax")
    assert installed(ROOT / "launch") == ["git+https://example.org/marjax"]
    there.append("a spec")
    assert installed(tmp_path) == []


def output_of(cell):
    """(text, pictures)"""
    pictures = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))).convert("RGB"))
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream"), pictures


@pytest.mark.slow
def test_it_trains_samples_and_shows_and_says_whether_the_official_weights_are_there(tmp_path):
    """The whole notebook without a connection, then its last cell again with files that can be reached.

    Those are tiny ones of the same kind, from PyTorch: a MAR, and an autoencoder that fits it.
    """
    notebook = nbformat.read(FILE, as_version=4)
    tagged(notebook, "settings").source += "\n" + "\n".join(
        [
            f"STEPS, WORKDIR, OFFICIAL = 8, {str(tmp_path / 'run')!r}, {str(tmp_path / 'official')!r}",
            "CHECKPOINT = AUTOENCODER = 'http://127.0.0.1:9/nobody-listens'",
        ]
    )
    model, autoencoder = (FILES / "mar_tiny.safetensors").as_uri(), (FILES / "kl_small.ckpt").as_uri()
    again = nbformat.v4.new_code_cell(
        "\n".join(
            [
                f"CHECKPOINT, AUTOENCODER, CLASSES, NUM_ITER = {model!r}, {autoencoder!r}, [1, 2], 4",
                "OVERRIDES = {'model.dtype': 'float32', 'model.num_heads': 4, 'tokenizer.autoencoder.scale': 0.2325,",
                "             'sample.max_stages': 2, 'sample.num_sampling_steps': '5'}",
                notebook.cells[-1].source,
            ]
        )
    )
    notebook.cells.append(again)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output_of(cell) for cell in notebook.cells if cell.cell_type == "code"]
    text, ((curve,), (plain, guided)) = "".join(text for text, _ in outputs), [each for _, each in outputs if each][:2]
    assert "8 steps" in text and "step 8: loss" in text
    assert curve.min() < 128 and len(np.unique(curve)) > 10
    # 5 rows of 10 digits, each enlarged from 8 to 32 pixels, with a gap of 2.
    assert plain.shape == guided.shape == (5 * 34, 10 * 34, 3)
    assert len(np.unique(plain)) > 20 and not np.array_equal(plain, guided)

    (offline, nothing), (reached, (official,)) = outputs[-2:]
    assert "The official weights cannot be reached from here" in offline and not nothing
    assert "official weights: " in reached and "cannot be reached" not in reached
    assert len(np.unique(official)) > 20
    assert not list(tmp_path.glob("*_files/*.partial"))
