"""Arguments, overrides, derived fields, and the copy in the work directory."""

import dataclasses
import json
import os
import re
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from support.configs import dotted
from support.paths import ROOT

import marjax
from marjax import cli, sharding
from marjax import config as config_lib
from marjax.assembly import assemble
from marjax.config.migrations import FORMAT
from marjax.config.resolve import frozen
from marjax.errors import UserError
from marjax.tokenizers import Pixels, token_shape
from marjax.tokenizers.codebook import Codebook
from marjax.training.step import make_train_step
from marjax.workdir import claim_workdir, read_workdir

FORMS = [
    "digits.py",
    "digits.py:debug",
    "imagenet256.py",
    "imagenet256.py:debug",
    "imagenet256.py:model=mar_large",
    "imagenet256.py:model=mar_huge,debug=false",
    "imagenet256.py:variant=ar",
    "imagenet256.py:variant=ar,debug",
    "mnist.py",
    "mnist.py:variant=ar,model=medium",
    "mnist.py:variant=random_ar,head=categorical",
    "mnist.py:head=categorical,debug",
    "mnist.py:head=regression,model=large",
    "mnist.py:tokenizer=kl",
    "mnist.py:tokenizer=vq,head=categorical,debug",
    "mnist.py:tokenizer=vq,debug",
    "folder.py:debug",
    "folder.py:size=128,variant=random_ar,debug",
]


def load(form):
    return config_lib.load(str(ROOT / "configs" / form))


def test_the_batch_of_own_pictures_follows_from_model_and_tokens():
    def size(**arguments):
        form = ",".join(f"{key}={value}" for key, value in {"name": "a", **arguments}.items())
        return load(f"folder.py:{form}").train.batch_size

    assert load("folder.py:name=a").model == load("folder.py:name=a,model=tiny,size=32").model
    assert size(model="tiny") <= 64 and size(model="tiny", size=256) == size(model="tiny")
    for model in ("small", *config_lib.MODEL_SIZES):
        assert size(model=model, size=32) == 4 * size(model=model, size=64) or size(model=model, size=32) == 256
        sizes = {size(model=model, size=64), size(model=model, size=256), size(model=model, size=256, tokenizer="kl16")}
        assert len(sizes) == 1
    assert size(model="mar_base", size=256) == 2 * size(model="mar_large", size=256)
    assert load("folder.py:name=a,model=tiny").model.dtype == "float32"
    patch = load("folder.py:name=a,model=small,size=64").tokenizer
    assert (patch.patch_size, patch.autoencoder.scale) == (4, pytest.approx(0.3))


@pytest.mark.parametrize("form", FORMS)
def test_every_config_traces(form):
    config = config_lib.resolve(load(form))
    mesh = sharding.make_mesh(1)
    assembly = assemble(config, mesh)
    shape, abstract = assembly.tokens, assembly.state
    tokenizer = Pixels()
    if shape.num_codes:
        tokenizer = Codebook(np.zeros((shape.num_codes, shape.token_dim), np.float32), shape.patch, shape.channels)
    step = make_train_step(assembly.replace(tokenizer=tokenizer))
    size = config.train.batch_size
    image = jax.ShapeDtypeStruct((size, shape.height * shape.patch, shape.width * shape.patch, shape.channels), "uint8")
    new, metrics = jax.eval_shape(
        step, abstract, {"image": image, "label": jax.ShapeDtypeStruct((size,), "int32")}, tokenizer.params
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    own = {
        "diffusion": {"train/mse", "train/vb", "train/loss_t_quarter4"},
        "categorical": {"train/accuracy"},
        "regression": set(),
    }
    assert {"train/loss", "train/lr"} | own[config.model.head] <= metrics.keys()


def test_what_follows_from_variant_and_head():
    config = config_lib.resolve(load("mnist.py:variant=ar"))
    assert config.sample.num_iter == 49 and config.train.schedule == "constant"
    config = config_lib.resolve(load("mnist.py:head=categorical"))
    assert config.sample.num_iter == 16 and config.train.schedule == "cosine"
    assert config_lib.tokens_of(config).num_codes == 512
    one_by_one = config_lib.resolve(config_lib.apply_overrides(config, {"sample.num_iter": 49}))
    assert one_by_one.sample.num_iter == 49
    assert config_lib.resolve(config_lib.apply_overrides(config, {"train.schedule": "constant"})).train.schedule == (
        "constant"
    )


@pytest.mark.parametrize(
    "form, overrides, says",
    [
        ("mnist.py:variant=ar", {"sample.num_iter": 16}, "num_iter is 16.*'ar'"),
        ("mnist.py", {"model.head": "categorical"}, "config.tokenizer.name=pixels"),
        ("mnist.py", {"sample.confidence_order": True}, "needs a head that ranks.*not diffusion with mar"),
        ("mnist.py:variant=random_ar,head=categorical", {"sample.confidence_order": True}, "with random_ar"),
        ("mnist.py:head=categorical", {"sample.choice_temperature": -1.0}, "choice_temperature is -1.0"),
        ("mnist.py:head=categorical", {"tokenizer.num_codes": 0}, "num_codes is 0"),
        ("mnist.py", {"model.variant": "rar"}, "give one of ar, random_ar, mar"),
    ],
)
def test_combinations_that_mean_nothing(form, overrides, says):
    with pytest.raises(UserError, match=says):
        config_lib.resolve(config_lib.apply_overrides(load(form), overrides))


def test_the_papers_recipe():
    config = config_lib.resolve(load("imagenet256.py"))
    assert (config.train.steps, config.train.warmup_steps) == (400 * 625, 100 * 625)
    assert config.train.lr == pytest.approx(8e-4)
    assert config == config_lib.resolve(config)
    shape = token_shape("kl16", image_size=256, channels=3, patch_size=1)
    assert (shape.num_tokens, shape.token_dim) == (256, 16)


def test_derived_fields_follow_overrides_and_give_way_to_them():
    config = config_lib.apply_overrides(load("imagenet256.py"), {"train.batch_size": "512", "train.steps": "7"})
    resolved = config_lib.resolve(config)
    assert resolved.train.lr == pytest.approx(2e-4) and resolved.train.steps == 7
    assert resolved.train.warmup_steps == 100 * (1_281_167 // 512)
    assert config_lib.resolve(config_lib.apply_overrides(config, {"train.lr": "3"})).train.lr == 3.0


@pytest.mark.parametrize(
    "form, says",
    [
        ("imagenet256.py:modle=mar_base", "unknown config argument 'modle'; the closest is 'model'"),
        ("imagenet256.py:model=mar_giant", "one of mar_base, mar_large, mar_huge"),
        ("imagenet256.py:model", "needs a value"),
        ("digits.py:debug=maybe", "expected bool"),
        ("nothing.py", "does not exist"),
    ],
)
def test_bad_arguments(form, says):
    with pytest.raises(UserError, match=says):
        load(form)


def test_a_file_is_taken_as_it_is(tmp_path, monkeypatch):
    """Though Python keeps what it compiled, and finds no change in a file of the same size and second."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file, got = tmp_path / "points.py", []
    for seed in (1, 2):
        file.write_text(f"def get_sweep():\n    return {seed}, __file__\n")
        os.utime(file, (1e9, 1e9))
        got.append(config_lib.load_function(str(file), "sweep", "get_sweep")())
    assert got == [(1, str(file)), (2, str(file))] and os.listdir(tmp_path) == ["points.py"]
    with pytest.raises(UserError, match="is not a Python file"):
        config_lib.load_function(str(file.rename(tmp_path / "points.txt")), "sweep", "get_sweep")


@pytest.mark.parametrize(
    "key, value, says",
    [
        ("train.lrr", "1", "unknown config key 'train.lrr'; the closest is 'train.lr'"),
        ("lr", "1", "the closest is 'train.lr'"),
        ("mdel.width", "1", "the closest is 'model.width'"),
        ("train", "1", "is a section"),
        ("train.steps", "many", "expected int"),
        ("train.steps", "1.5", "expected int"),
        ("train.steps", "1,000", "expected int"),
        ("train.steps", "1e-3", "expected int"),
        ("train.steps", "15e-1", "expected int"),
        ("train.steps", "1e999", "expected int"),
        ("train.steps", "", "expected int"),
        ("train.lr", "1/256", "expected float"),
        ("train.lr", "inf", "train.lr"),
        ("train.lr", "nan", "train.lr"),
        ("seed", "none", "expected int"),
        ("tokenizer.autoencoder.channel_mults", "(1, 2", "channel_mults"),
        ("tokenizer.autoencoder.channel_mults", "1,,2", "channel_mults"),
        ("data.flip", "2", "expected bool"),
        ("model.width", 1.5, "expected int"),
        ("model.width", "130", "not divisible by num_heads"),
        ("data.image_size", "9", "multiple of 2"),
        ("sample.num_iter", "17", "num_iter is 17"),
        ("sample.num_sampling_steps", "0", "num_sampling_steps.*1000"),
        ("sample.cfg_schedule", "cosine", "one of linear, constant"),
        ("model.dtype", "float16", "one of float32, bfloat16"),
        ("train.batch_size", "0", "batch_size is 0"),
        ("train.accumulate", "3", "not divisible by train.accumulate"),
        ("tokenizer.name", "vae", "one of codebook, kl, kl16, kl8, pixels, vq, vq16"),
        ("train.steps", "0", "at least 1"),
    ],
)
def test_bad_overrides(key, value, says):
    with pytest.raises(UserError, match=says):
        config_lib.resolve(config_lib.apply_overrides(load("digits.py"), {key: value}))


@pytest.mark.parametrize(
    "key, text, value",
    [
        ("train.steps", "1e3", 1000),
        ("train.steps", " 1_000 ", 1000),
        ("train.steps", "1.5E+3", 1500),
        ("train.steps", "none", None),
        ("train.epochs", "NULL", None),
        ("train.clip", " None", None),
        ("train.lr", ".5", 0.5),
        ("train.lr", "1e-3 ", 1e-3),
        ("train.lr", "1", 1.0),
        *(("data.flip", text, True) for text in ("yes", "On", "TRUE", "1", " true ")),
        *(("data.flip", text, False) for text in ("no", "off", "False", "0")),
        *(
            ("tokenizer.autoencoder.channel_mults", text, (1, 2, 4))
            for text in ("1,2,4", "(1, 2, 4)", "[1,2,4]", " 1, 2, 4 ", "(1,2,4,)")
        ),
        ("tokenizer.autoencoder.channel_mults", "(3,)", (3,)),
        ("tokenizer.autoencoder.channel_mults", "()", ()),
        ("model.variant", "'ar'", "ar"),
        ("model.variant", ' "ar" ', "ar"),
        ("model.variant", "“ar”", "ar"),
        ("sample.num_sampling_steps", " ddim5", "ddim5"),
        ("tokenizer.checksum", "none", None),
        ("tokenizer.path", " a 'b' ", " a 'b' "),
    ],
)
def test_values_as_people_write_them(key, text, value):
    found = config_lib.flatten(config_lib.apply_overrides(config_lib.base(), {key: text}))[key]
    assert found == value and type(found) is type(value)


def test_arguments_of_config_files_as_people_write_them():
    spec = dict(model=("small", "large"), size=64, rate=0.5, debug=False, name="")
    found = config_lib.parse_arg(" model = large, size=1e2 ,rate=.25, debug=Yes, name='x',", **spec)
    assert found.to_dict() == dict(model="large", size=100, rate=0.25, debug=True, name="x")
    with pytest.raises(UserError, match="model.*closest is 'large'"):
        config_lib.parse_arg("model=lrage", **spec)


CONFIG_FILE = """from ml_collections import ConfigDict
from marjax import config as config_lib

def get_config(arg=None):
    config = config_lib.load({digits!r})
    {line}
    return config
"""


@pytest.mark.parametrize(
    "line, says",
    [
        ("config.train.stpes = 10", "line 6: unknown config key 'train.stpes'; the closest is 'train.steps'"),
        ("config.trian.steps = 10", "line 6: unknown config key 'trian'; the closest is 'train'"),
        ("config.trian = dict(steps=10)", "'trian'; the closest is 'train'"),
        ("config['train']['stpes'] = 10", "'train.stpes'; the closest is 'train.steps'"),
        ("config.update(train=dict(stpes=10))", "'train.stpes'; the closest is 'train.steps'"),
        ("config.tokenizer.train.disc.update(wieght=1.0)", "the closest is 'tokenizer.train.disc.weight'"),
        ("config.train = dict(stpes=10)", "'train.stpes'; the closest is 'train.steps'"),
        ("config.train = dict(steps=10)", "config.train.* is missing"),
        ("config.unlock(); config.train.stpes = 10", "'train.stpes'; the closest is 'train.steps'"),
        ("config.unlock(); config.trian = dict()", "'trian'; the closest is 'train'"),
        ("config.unlock(); del config.train.steps", "config.train.steps is missing"),
        ("config.unlock(); del config.train", "config.train is missing"),
        ("config = ConfigDict(dict(train=dict(steps=10)))", "is missing"),
        ("config = ConfigDict(config.to_dict() | dict(trian=1))", "'trian'; the closest is 'train'"),
        ("config = ConfigDict(config.to_dict() | dict(train=1))", "config.train is 1"),
        ("config = ConfigDict(config.to_dict() | dict(seed=dict(a=1)))", "config.seed is"),
        ("config = ConfigDict(config.to_dict() | dict(seed='1'))", "config.seed is '1'"),
        ("config.train.steps = '10'", "config.train.steps"),
        ("config.train.steps = True", "config.train.steps is True"),
        ("config.tokenizer.autoencoder.channel_mults = (1, 'a')", "channel_mults is .*"),
        ("config.data.data_dir = 'a' + chr(0)", "config.data.data_dir"),
        ("config.data.data_dir = None", "config.data.data_dir is None"),
        ("config.train.lr = 10**400", "config.train.lr"),
        ("return 3", "returned int"),
        ("1 / 0", "line 6: ZeroDivisionError"),
        ("raise SystemExit", "line 6: SystemExit"),
        ("import nothing_of_this_name", "line 6: ModuleNotFoundError"),
        (")", "line 6: SyntaxError"),
    ],
)
def test_a_config_file_cannot_hold_what_no_config_has(tmp_path, line, says):
    file = tmp_path / "own.py"
    file.write_text(CONFIG_FILE.format(digits=f"{ROOT}/configs/digits.py", line=line))
    with pytest.raises(UserError, match=says) as raised:
        config_lib.resolve(config_lib.load(str(file)))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("overrides", [None, ["train.lr=1"], "train.lr=1", 3])
def test_fields_to_set_are_a_dict(overrides):
    with pytest.raises(UserError, match="train.lr"):
        config_lib.apply_overrides(load("digits.py"), overrides)


@pytest.mark.parametrize("profile", ["x", "1", "2:1", "0:1", "1:1e30", "1:2:3", "nan:2"])
def test_steps_to_profile(tmp_path, capsys, profile):
    assert (
        cli.main(
            [
                "train",
                "--config",
                f"{ROOT}/configs/digits.py:debug",
                "--workdir",
                str(tmp_path / "run"),
                f"--profile={profile}",
            ]
        )
        == 2
    )
    assert f"--profile '{profile}'" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_hand_made_config_with_all_fields_is_as_good():
    given = ConfigDict(load("digits.py:debug").to_dict())
    assert config_lib.resolve(given) == config_lib.resolve(load("digits.py:debug"))
    assert config_lib.apply_overrides(given, {"train.lr": "1"}).train.lr == 1.0
    given.trian = 1
    for call in (
        config_lib.resolve,
        lambda config: config_lib.apply_overrides(config, {}),
        lambda config: marjax.train(config, "/proc/nothing"),
    ):
        with pytest.raises(UserError, match="'trian'; the closest is 'train'"):
            call(given)
        with pytest.raises(UserError, match="config is None"):
            call(None)


def test_what_none_turns_off():
    config = load("digits.py")
    for text, clip in (("none", None), ("0", None), ("2", 2.0)):
        resolved = config_lib.resolve(config_lib.apply_overrides(config, {"train.clip": text}))
        assert resolved.train.clip == clip
    assert config_lib.apply_overrides(config, {"train.schedule": "none"}).train.schedule is None
    with pytest.raises(UserError, match="train.b1"):
        config_lib.apply_overrides(config, {"train.b1": "none"})


def test_workdir_keeps_its_config(tmp_path):
    config = config_lib.resolve(load("digits.py"))
    claim_workdir(tmp_path / "run", config)
    claim_workdir(tmp_path / "run", config)
    assert read_workdir(tmp_path / "run") == config

    def start(**fields):
        claim_workdir(tmp_path / "run", config_lib.resolve(config_lib.apply_overrides(config, dotted(fields))))

    with pytest.raises(UserError, match=r"seed \(was 0, now 1\), train.lr \(was 0.002, now 0.003\)"):
        start(train__lr=0.003, seed=1)
    with pytest.raises(UserError, match=r"train.steps \(was 450, now 7\)"):
        start(train__steps=7)
    with pytest.raises(UserError, match="train.schedule"):
        start(train__schedule="cosine", train__steps=9000)
    assert read_workdir(tmp_path / "run") == config
    start(train__steps=9000, log__every=3, mesh__data=1, model__remat="full")
    assert read_workdir(tmp_path / "run").train.steps == 9000


@pytest.fixture
def workdir(tmp_path):
    """Writes the config.json of a work directory, DIGITS with what `change` does to it, and returns the folder."""

    def write(change=lambda content: None, stamped=True):
        run = tmp_path / "run"
        (run / "config.json").unlink(missing_ok=True)
        claim_workdir(run, trained_on_digits())
        content = json.loads((run / "config.json").read_text())
        if not stamped:
            del content["format"]
        change(content)
        (run / "config.json").write_text(json.dumps(content))
        return run

    return write


def trained_on_digits(**fields):
    """The config that `train` writes, with the checksum of a tokenizer without weights."""
    return config_lib.resolve(
        config_lib.apply_overrides(load("digits.py:debug"), {"tokenizer.checksum": ""} | dotted(fields))
    )


def test_configs_of_older_formats_are_migrated(workdir):
    """Those that do not say their format: as it was when it had a part of today's fields, and as it was last."""

    def first(content):
        del content["eval"], content["data"]["cache"], content["mesh"]["replicate_below"]
        content["model"]["mask_ratio"]["per"] = "batch"
        del content["model"]["mask_ratio_per"]
        for key in ("checksum", "path", "posterior", "autoencoder", "train", "num_codes"):
            del content["tokenizer"][key]
        del content["sample"]["choice_temperature"], content["sample"]["confidence_order"]

    assert read_workdir(workdir(first, stamped=False)) == trained_on_digits(
        model__mask_ratio_per="batch", eval__extractor_path="", eval__statistics="", eval__extractor="inception"
    )
    assert read_workdir(workdir(lambda content: [content.update(format=1), content.pop("init")])) == trained_on_digits()
    for older in (lambda content: None, lambda content: content.pop("eval")):
        run = workdir(older, stamped=False)
        claim_workdir(run, trained_on_digits())  # resumed
        assert read_workdir(run) == trained_on_digits()
        assert "format" in json.loads((run / "config.json").read_text())


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda content: content.update(format=FORMAT + 1), f"format {FORMAT + 1}.*newer"),
        (lambda content: content.update(format=10**15), "format 1000000000000000.*newer"),
        (lambda content: content.update(format=-1), "format is -1"),
        (lambda content: content.update(format="1"), "format is '1'"),
        (lambda content: content.update(format=True), "format is True"),
        (lambda content: content["train"].update(stpes=1), "'train.stpes'; the closest is 'train.steps'"),
        (lambda content: content.update(trian={}), "'trian'; the closest is 'train'"),
        (lambda content: content["train"].pop("b1"), "config.train.b1 is missing"),
        (lambda content: content.pop("eval"), "config.eval is missing"),
        (lambda content: content.update(train=[1]), r"config.train is \[1\]"),
        (lambda content: content.update(train=None), "config.train is None"),
        (lambda content: content.update(tokenizer=3), "config.tokenizer is 3"),
        (lambda content: content["train"].update(steps="many"), "config.train.steps is 'many'"),
        (lambda content: content["train"].update(steps=1.5), "config.train.steps is 1.5"),
        (lambda content: content["train"].update(lr=float("nan")), "NaN"),
        (lambda content: content["train"].update(lr=None, base_lr=True), "config.train.base_lr is True"),
        (lambda content: content["train"].update(steps=10**30), "integer"),
        (lambda content: content["model"].update(dtype=["float32"]), "config.model.dtype"),
        (lambda content: content["tokenizer"].update(path="a\0b"), "config.tokenizer.path"),
        (lambda content: content["tokenizer"].update(path="\ud800"), "surrogate"),
        (lambda content: content["tokenizer"].update(path={"a": 1}), "config.tokenizer.path"),
        (lambda content: content["tokenizer"].update(path="a" * 10**5), "config.tokenizer.path has 100000 characters"),
        (lambda content: content["tokenizer"].update(name="a" * 4000), "tokenizer.name is"),
        (lambda content: content["train"].update({"stpes" * 10**5: 1}), "unknown config key 'train.stpes"),
    ],
)
@pytest.mark.parametrize("stamped", [True, False])
def test_configs_that_no_work_directory_has(workdir, change, says, stamped):
    if "eval is missing" in says and not stamped:
        return  # as it may be in an older format
    run = workdir(change, stamped)
    before = (run / "config.json").read_bytes()
    for call in (read_workdir, lambda run: claim_workdir(run, config_lib.resolve(load("digits.py:debug")))):
        with pytest.raises(UserError, match=says) as raised:
            call(run)
        assert "config.json" in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 600
    assert (run / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"train":' * 100_000, "\ud800", "1" + "0" * 5000, "[1]", "null", '"x"'],
    ids=range(9),
)
def test_config_files_that_are_no_json(workdir, text):
    run = workdir()
    (run / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError, match="config.json"):
        read_workdir(run)


@pytest.mark.parametrize("name", ["tfds:evil", "digits"])
def test_a_work_directory_opens_nothing_but_itself(workdir, monkeypatch, name):
    def opened(*args, **kwargs):
        raise AssertionError("opened")

    monkeypatch.setattr("marjax.data.sources.open_source", opened)
    monkeypatch.setattr("marjax.data.latent_cache.read.read_manifest", opened)

    def change(content):
        content["data"].update(source=name, data_dir="evil", cache="evil", num_examples=None)
        content["eval"].update(every=1, statistics="evil", extractor_path="evil")

    assert read_workdir(workdir(change)).data.source == name
    for missing in ({"num_classes": None}, {"num_classes": None, "cache": ""}):
        with pytest.raises(UserError, match="config.data.num_classes"):
            read_workdir(workdir(lambda content, missing=missing: change(content) or content["data"].update(missing)))
    with pytest.raises(UserError, match="train.steps"):
        read_workdir(workdir(lambda content: change(content) or content["train"].update(steps=None, epochs=1.0)))
    with pytest.raises(AssertionError, match="opened"):  # where the data is the user's own
        config_lib.resolve(config_lib.apply_overrides(load("digits.py"), {"data.num_classes": None, "data.cache": ""}))


BYSTANDERS = [
    ".gitkeep",
    ".DS_Store",
    "._run",
    ".nfs0000001",
    "Thumbs.db",
    "desktop.ini",
    "nohup.out",
    "slurm-123_4.out",
    "slurm-123.err",
    "train.log",
    "train.log.1",
    "log.txt",
    "out.txt",
    "stdout",
    "job.o4711",
    "run.sbatch",
    "run.pid",
    "config.py",
]


@pytest.mark.parametrize("name", BYSTANDERS)
def test_bystanders_in_a_new_work_directory(tmp_path, capsys, name):
    (tmp_path / name).write_text("x")
    claim_workdir(tmp_path, trained_on_digits())
    assert read_workdir(tmp_path) == trained_on_digits()
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1 and (tmp_path / name).read_text() == "x"
    claim_workdir(tmp_path, trained_on_digits())
    assert not capsys.readouterr().err


def test_many_bystanders_are_counted_and_what_is_ours_is_not(tmp_path, capsys):
    for name in (*BYSTANDERS, "config.json.partial", "marjax.lock"):
        (tmp_path / name).write_text("x")
    for name in ("lost+found", "@eaDir", "logs"):
        (tmp_path / name).mkdir()
    (tmp_path / "whatever").touch()  # that `tee` has opened
    claim_workdir(tmp_path, trained_on_digits())
    assert f"{len(BYSTANDERS) + 4} other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "thesis.tex",
        "1.png",
        "data.npz",
        "metrics.jsonl",
        "checkpoints/",
        "photos/",
        "notes.txt",
        "events.out.tfevents.1.host",
    ],
)
def test_the_work_of_others_is_refused(tmp_path, capsys, name):
    for each in (name, "nohup.out"):
        (tmp_path / each).mkdir() if each.endswith("/") else (tmp_path / each).write_text("x")
    with pytest.raises(UserError, match=rf"config\.json.*{name.rstrip('/')}"):
        claim_workdir(tmp_path, trained_on_digits())
    assert len(list(tmp_path.iterdir())) == 2 and not capsys.readouterr().err


def test_foreign_folders(tmp_path):
    config = config_lib.resolve(load("digits.py"))
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"config\.json"):
        claim_workdir(tmp_path, config)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="does not exist"):
        read_workdir(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_workdir(tmp_path)
    for content in ("{", "[1]", json.dumps({"model": {"width": 3}})):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_workdir(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        claim_workdir("/proc/nothing", config)


def test_older_names_of_fields_set_the_new_ones(tmp_path, workdir):
    """Files, overrides and work directories of before config format 3."""
    file = tmp_path / "older.py"
    line = 'config.eval.update(reference="stats.npz")\n    config.model.diffusion.batch_mul = 2'
    source = CONFIG_FILE.format(digits=f"{ROOT}/configs/digits.py", line=line)
    file.write_text(source)
    with pytest.raises(UserError, match=r"'eval\.statistics'"):
        config_lib.load(str(file))
    file.write_text(re.sub(r"config_lib.load.*", "config_lib.base()", source))
    config = config_lib.load(str(file))
    assert config.eval.statistics == "stats.npz" and config.model.diffusion_batch_mul == 2
    assert "reference" not in config.eval and "batch_mul" not in config.model.diffusion
    config = config_lib.apply_overrides(config, {"eval.reference": "s.npz", "model.diffusion.batch_mul": "3"})
    assert config.eval.statistics == "s.npz" and config.model.diffusion_batch_mul == 3

    def older(content):
        content.update(format=2)
        content["eval"]["reference"] = content["eval"].pop("statistics")
        content["model"]["diffusion"]["batch_mul"] = 7
        del content["model"]["diffusion_batch_mul"]

    assert read_workdir(workdir(older)) == trained_on_digits(model__diffusion_batch_mul=7)


def test_frozen_takes_the_fields_of_a_dataclass_from_a_section():
    @dataclasses.dataclass(frozen=True)
    class Disc:
        width: int

    @dataclasses.dataclass(frozen=True)
    class Train:
        disc: Disc
        clip: float | None
        seed: int = 1

    config = config_lib.base()
    config.tokenizer.train.disc.width = 96
    assert frozen(config.tokenizer.train, Train, seed=7) == Train(Disc(96), 1.0, 7)


def test_the_data_room_gets_every_field_of_its_section():
    """Registered sources may read any of them."""
    config = config_lib.base()
    assert dataclasses.asdict(config_lib.data_config(config)) == config.data.to_dict()
    given = {key: value for key, value in config.tokenizer.to_dict().items() if key != "train"}
    assert dataclasses.asdict(config_lib.tokenizer_config(config)) == given
