"""Weights as training programs leave them: which of a file's tensors they are, and by what names."""

import numpy as np
import pytest
from support.compare import parity
from support.paths import PARITY

from marjax.errors import UserError
from marjax.interop import convert, weights_file
from marjax.interop.pytorch import Foreign, Tensor
from marjax.interop.weights_file import WeightsFile
from marjax.interop.wrappers import check_size, choose

NAMES = ("a.weight", "blocks.0.bias", "blocks.1.bias", "z_proj.weight")
ANCHORS = ("z_proj.weight",)


def tensor(values, dtype=np.float32):
    array = np.asarray(values, dtype)
    return Tensor(array.shape, array.dtype, lambda: array)


def weights(start, prefix="", change=lambda name: name):
    """Different numbers for every name, from `start`."""
    return {prefix + change(name): tensor([start + i] * (i + 1)) for i, name in enumerate(NAMES)}


def which(content, asked=None):
    """(whether it is the average, the number that its weights start with)."""
    chosen = choose(WeightsFile(content, None), ANCHORS, "x.pth", weights=asked)
    assert set(chosen.tensors) - {"table"} == set(NAMES)
    first = float(np.asarray(chosen.tensors[NAMES[0]])[0])
    for i, name in enumerate(NAMES):
        np.testing.assert_array_equal(chosen.tensors[name], np.float32([first + i] * (i + 1)))
    return chosen.is_ema, first


LIVE, EMA = weights(10), weights(20)
COUNT = tensor(3, np.int64)
INSIDE = {
    "in the middle": lambda name: name.replace("blocks.", "blocks._orig_mod."),
    "before each part": lambda name: name.replace(".", "._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "twice": lambda name: f"module._orig_mod.{name}",
}
ONE_SET = {
    "bare": LIVE,
    "ddp": {"model": weights(10, "module."), "epoch": 3},
    "compile": weights(10, "_orig_mod."),
    **{name: {"state_dict": weights(10, "", change)} for name, change in INSIDE.items()},
    "lightning": {"state_dict": weights(10, "model."), "callbacks": {}},
    "lightning and compile": {"state_dict": weights(10, "model._orig_mod.")},
    "deepspeed": {"module": LIVE, "optimizer": {"state": [{"exp_avg": COUNT}]}},
    "a key": {"optimized_gradio_model": LIVE, "loss": {"z_proj.weight": COUNT}},
    "another prefix": {"net": weights(10, "some.where.")},
    "counters": {"model": LIVE | {"n_averaged": COUNT, "blocks.total_ops": tensor([0.0])}},
    "no tensors beside": LIVE
    | {
        "epoch": 3,
        "blocks._extra_state": Foreign("io.BytesIO", "x.pth"),
        "name": "x",
        "optimizer": Foreign("my.Optimizer", "x.pth"),
        "args": Foreign("my.Args", "x.pth"),
    },
    "settings of an average": {"model": LIVE, "ema_config": Foreign("my.Config", "x.pth")},
}
TWO_SETS = {
    "reference": {"model": LIVE, "model_ema": EMA},
    "other order": {"model_ema": EMA, "model": LIVE},
    **{
        key: {"model": LIVE, key: EMA}
        for key in (
            "ema",
            "ema_state_dict",
            "state_dict_ema",
            "ema_params",
            "params_ema",
            "shadow",
            "ema_0.9999",
            "ema1",
            "averaged_model",
            "EMA",
        )
    },
    "averaged": {"model": LIVE, "ema": weights(20, "module.") | {"n_averaged": COUNT}},
    "ema_pytorch": {"ema": weights(20, "ema_model.") | weights(10, "online_model.") | {"initted": COUNT}},
    "timm": {"state_dict": LIVE, "state_dict_ema": weights(20, "module.")},
    "one dict": weights(10, "model.") | weights(20, "model_ema."),
    "deeper": {"state": {"net": LIVE, "ema": {"decay": 0.999, "shadow": EMA}}},
    "diffusers": {"model": LIVE, "ema": {"shadow_params": list(EMA.values()), "decay": 0.9999}},
    "list": {"model": weights(10, "module."), "ema_params": list(EMA.values()), "optimizer": {}},
    "tuple and buffers": {"model": {"table": COUNT} | LIVE, "model_ema": tuple(EMA.values())},
    "list without buffers": {"model": {"table": tensor([1.0] * 9)} | LIVE, "ema": list(EMA.values())},
    "LitEma": {
        "state_dict": LIVE
        | weights(20, "model_ema.", lambda name: name.replace(".", ""))
        | {"model_ema.decay": tensor(0.9), "model_ema.num_updates": COUNT}
    },
    "LitEma of a part": {
        "state_dict": weights(10, "model.") | weights(20, "model_ema.", lambda name: name.replace(".", ""))
    },
    "several": {"model": LIVE, "emas": [EMA, weights(30)]},
    "losses": {"model": LIVE, "ema": EMA, "ema_losses": [COUNT], "optimizer": {"z_proj.weight": COUNT}},
}


@pytest.mark.parametrize("content", ONE_SET.values(), ids=ONE_SET)
def test_one_set(content):
    assert which(content) == which(content, "raw") == (False, 10)


@pytest.mark.parametrize("content", TWO_SETS.values(), ids=TWO_SETS)
def test_the_average_unless_asked_otherwise(content):
    assert which(content) == which(content, "ema") == (True, 20)
    assert which(content, "raw") == (False, 10)


def test_files_of_others(caplog):
    def says(content, text, asked=None):
        with pytest.raises(UserError, match=f"^x.pth.*{text}"):
            choose(WeightsFile(content, None), ANCHORS, "x.pth", weights=asked)

    says({"model": LIVE}, "no EMA weights, only model: give --weights raw", "ema")
    says({"ema": EMA}, "has only EMA weights", "raw")
    says({"epoch": 3, "list": [1]}, "is not a checkpoint with 'model_ema' .* it holds no weights")
    says({"model": Foreign("mar.MAR", "x.pth")}, "an object of mar.MAR, which is refused: save its state_dict")
    says({"model": {"a.weight": Foreign("my.Tensor", "x.pth")}}, "an object of my.Tensor, which is refused")
    says({"model": LIVE, "ema": Foreign("my.EMA", "x.pth")}, "EMA weights .ema. are an object of my.EMA, .*weights raw")
    assert which({"model": LIVE, "ema": Foreign("my.EMA", "x.pth")}, "raw") == (False, 10)
    says({"model": LIVE | {"b.weight": Foreign("my.Tensor", "x.pth")}}, "weight b.weight is an object of my.Tensor")
    says({"model": LIVE, "ema": list(EMA.values())[::-1]}, "list of 4 tensors .ema., which do not match the 4 of mod")
    says({"ema": list(EMA.values())}, "holds no weights")
    says(weights(10, "module.") | {"a.weight": COUNT}, "module.a.weight and a.weight are one name")
    huge = WeightsFile(LIVE | {"huge": Tensor((1 << 20, 1 << 10), np.dtype("f4"), lambda: None)}, None, 900)
    with pytest.raises(UserError, match="x.pth says that its weights have 429[0-9]+ bytes, but it has 900"):
        check_size(choose(huge, ANCHORS, "x.pth"), huge, "x.pth")
    holes = WeightsFile(LIVE | {"huge": Tensor((1 << 40,), np.dtype("f2"), lambda: None)}, None, 1 << 42)
    with pytest.raises(UserError, match="x.pth has weights of 4[0-9]+ bytes in float32, and this machine"):
        check_size(choose(holes, ANCHORS, "x.pth"), holes, "x.pth")
    two = {"ema1": EMA, "ema2": weights(30), "model": LIVE}
    assert which(two) == (True, 20) and "several sets of these weights, ema1, ema2: took the first" in caplog.text


def test_work_is_bounded():
    """Lists in each other a thousand times, and a prefix for every tensor."""
    node = [tensor(1)]
    for _ in range(20):
        node = [node] * 1000
    assert which({"model": LIVE, "x": node}) == (False, 10)
    names = {f"p{i}.z_proj.weight": COUNT for i in range(5000)}
    assert which({"model": LIVE, "other": names}) == (False, 10)


def test_files_that_wrappers_wrote():
    """Of PyTorch's AveragedModel and of ema_pytorch; the averages are the weights of the recorded generation."""
    arrays, _ = parity("mar_sample_cfg_linear")
    expected = {name.removeprefix("params/"): arrays[name] for name in arrays.files if name.startswith("params/")}
    for kind in ("averaged", "ema_pytorch"):
        path = PARITY / "checkpoints" / f"mar_tiny_{kind}.pth"
        file = weights_file.read(path)
        found = {asked: choose(file, convert.ANCHORS, path, weights=asked) for asked in (None, "raw")}
        assert found[None].is_ema and not found["raw"].is_ema
        for chosen in found.values():
            assert chosen.tensors.keys() == expected.keys()
        differing = {
            asked: sum(
                np.asarray(chosen.tensors[name]).tobytes() != array.tobytes() for name, array in expected.items()
            )
            for asked, chosen in found.items()
        }
        assert differing == {None: 0, "raw": 58}
