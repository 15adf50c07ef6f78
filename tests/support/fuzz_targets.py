"""What test_fuzz.py reads: every reader of foreign files, with sound files.

`python -m support.fuzz_targets TARGET INDEX SEED ROOT` reads one mutant again, in this process.
"""

import functools
import itertools
import json
import os
import pathlib
import shutil
import sys
import tarfile
from typing import Any

import jax
import numpy as np
from support import fuzz, mutators
from support.configs import make_digits
from support.fuzz import Target
from support.paths import DIGITS

from marjax import class_names
from marjax import config as config_lib
from marjax.checkpoints.manager import Checkpoints
from marjax.data.latent_cache.read import Latents, Manifest, pack, read_manifest
from marjax.data.prepare.imagenet import list_imagenet
from marjax.data.prepare.pictures import UnreadableError, storable
from marjax.data.prepare.shards import Record, Shard, read_record
from marjax.data.sources import open_source
from marjax.evaluation.evaluate import table as evaluation_table
from marjax.evaluation.networks.classifier import Classifier
from marjax.evaluation.record import Record as EvaluationRecord
from marjax.evaluation.samples import SampleSet, SampleSpec
from marjax.evaluation.statistics import read_statistics
from marjax.interop import weights_file, wrappers
from marjax.metrics import MetricWriter
from marjax.plots.curves import curves
from marjax.plots.runs import read_runs
from marjax.sweep import engines, jobs
from marjax.sweep.points import SweepRun
from marjax.tokenizers import autoencoder_file, codebook
from marjax.workdir import first_start, read_workdir

COUNT = int(os.environ.get("MARJAX_FUZZ_COUNT", "3000"))
SEED = int(os.environ.get("MARJAX_FUZZ_SEED", "17"))
SWEEP = f"""
CONFIG = {DIGITS + ":debug"!r}
def get_sweep():
    yield "a", {{"seed": 1}}
    yield "b", {{"seed": 2}}
"""
PLAN = SampleSpec(
    num_images=8, seed=0, num_classes=10, settings={}, weights="ema", step=1, digest="d", tokenizer="", batch_size=4
)
MANIFEST = Manifest("c", "digits", "train", "f", 8, 1, "center", 6, 10, True, (2, 2, 4), "float32", "float32", 3)
CLASS = "n01440764"


# --- Readers ---------------------------------------------------------------------------------------------------------


def read_metrics(folder: pathlib.Path) -> None:
    with MetricWriter(folder, start_step=3, total_steps=9, tensorboard=False, progress=False) as writer:
        writer.scalars(4, {"train/loss": 1.0})
    (run,) = read_runs([folder])
    run.series("train/loss")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line)


def read_evaluation(folder: pathlib.Path) -> None:
    evaluation_table(EvaluationRecord(folder / "evaluation.json").results)
    (run,) = read_runs([folder])
    curves(run.results, "cfg", ("fid",))


def read_run(folder: pathlib.Path) -> None:
    class_names.read(folder, read_workdir(folder).data.num_classes)
    first_start(folder, write=True)


@functools.cache
def sweep_plan(path: pathlib.Path) -> SweepRun:
    return SweepRun.open(path, path.parent)


def read_sweep(folder: pathlib.Path) -> None:
    given = sweep_plan(folder / "sweep_file.py")
    jobs.read(given, list(given.configs))
    engines.write(given)


def read_statistics_files(folder: pathlib.Path) -> None:
    for path in sorted(folder.iterdir()):
        found = read_statistics(path)
        if found.images is not None:
            for _ in found.images.batches(3):
                pass


def read_samples(folder: pathlib.Path) -> None:
    made = SampleSet(folder, PLAN, image_shape=(8, 8, 1))
    made.missing()
    for _ in made.batches():
        pass
    made.seconds_per_image()


def read_weights(folder: pathlib.Path) -> None:
    for path in sorted(folder.glob("*[!r]")):  # not the shards of an index
        file = weights_file.read(path)
        chosen = wrappers.choose(file, ("mask_token",), path)
        for tensor in itertools.islice(chosen.tensors.values(), 50):
            np.asarray(tensor)


def read_latents(folder: pathlib.Path) -> None:
    latents = Latents(folder, read_manifest(folder), flip=True)
    for index in sorted({0, len(latents) // 2, len(latents) - 1}):
        latents.read(index, np.random.default_rng(index))


def read_tfds(folder: pathlib.Path) -> None:
    config = config_lib.base()
    config.data.source, config.data.data_dir, config.data.split = "tfds:plain", str(folder), "train"
    with config.unlocked():
        config.data.num_classes = None
    source = open_source(config_lib.data_config(config))
    for index in range(min(3, len(source))):
        source[index]


def read_shard_record(folder: pathlib.Path) -> None:
    read_record(Shard("", str(folder / "record.json"), [], True, 0))


def read_pictures(folder: pathlib.Path) -> None:
    for path in sorted(folder.iterdir()):
        storable(path.read_bytes())


def read_checkpoint(folder: pathlib.Path) -> None:
    with Checkpoints(folder, read_only=True) as checkpoints:
        checkpoints.trees()
        checkpoints.restore({"params": {"w": jax.ShapeDtypeStruct((100,), np.float32)}})


npz, pth = mutators.mutate_zip(mutators.mutate_npy), mutators.mutate_zip(mutators.mutate_pickle)
TARGETS = [
    Target("metrics", ("metrics.jsonl",), mutators.mutate_lines, read_metrics, 1.5),
    Target("evaluation", ("evaluation.json",), mutators.mutate_json, read_evaluation),
    Target("workdir", ("*.json",), mutators.mutate_json, read_run),
    Target("sweep", ("*/*.json",), mutators.mutate_json, read_sweep),
    Target(
        "checkpoint",
        ("1/**/*",),
        lambda data, rng: (mutators.mutate_json if data[:1] == b"{" else mutators.mutate_bytes)(data, rng),
        read_checkpoint,
        0.4,
    ),
    Target("statistics", ("*.npz",), npz, read_statistics_files, 1.5, alone=True),
    Target("samples", ("*/*.npy",), mutators.mutate_npy, read_samples),
    Target("sample_plans", ("*/*.json",), mutators.mutate_json, read_samples, 0.5),
    Target("classifier", ("*.npz",), npz, lambda folder: Classifier.load(folder / "classifier.npz")),
    Target("codebook", ("*.npz",), npz, lambda folder: codebook.read(folder / "codebook.npz")),
    Target(
        "tokenizer",
        ("*.safetensors",),
        mutators.mutate_safetensors,
        lambda folder: autoencoder_file.read(folder / "kl.safetensors"),
    ),
    Target("pth", ("*.pth",), pth, read_weights, 2),
    Target("legacy_pth", ("*.pth",), mutators.mutate_pickle, read_weights),
    Target("safetensors", ("*.safetensors",), mutators.mutate_safetensors, read_weights),
    Target("sharded", ("*.json",), mutators.mutate_json, read_weights, 0.5),
    Target("latents", ("manifest.json",), mutators.mutate_json, read_latents),
    Target("latent_shards", ("*.array_record*",), mutators.mutate_bytes, read_latents, 0.5),
    Target("tfds", ("*/*/*.json",), mutators.mutate_json, read_tfds, 0.7),
    Target("tfds_shards", ("*/*/*.array_record*",), mutators.mutate_bytes, read_tfds, 0.5),
    Target("shard_records", ("*.json",), mutators.mutate_json, read_shard_record, 0.5),
    Target("pictures", ("*",), mutators.mutate_picture, read_pictures, 1.5, refusals=(UnreadableError,), alone=True),
    Target("tars", ("*.tar",), mutators.mutate_tar, lambda folder: list_imagenet([str(folder)], progress=False)),
]


# --- Sound files -----------------------------------------------------------------------------------------------------


def make_sound_files(root: pathlib.Path, autoencoders: pathlib.Path) -> None:
    from support.pytorch_files import Call, Global, storage, tensor, write_legacy, write_zip
    from support.tfds_files import as_file, picture, write_tfds

    for target in TARGETS:
        (root / target.name).mkdir()
    rng = np.random.default_rng(0)
    lines = [{"step": step, "train/loss": step / 3, "perf/mfu": 0.5} for step in range(1, 6)]
    (root / "metrics" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    network = {"name": "classifier", "checksum": "ab" * 32}
    entries = [
        {
            "identity": f"{cfg}",
            "settings": {"cfg": cfg, "num_images": 8, "weights": "ema"},
            "metrics": {"fid": 3.0 + cfg},
            "seconds_per_image": 0.1,
            "samples": None,
            "extractor": network,
            "reference": network,
        }
        for cfg in (1.0, 2.0)
    ]
    (root / "evaluation" / "evaluation.json").write_text(json.dumps({"format": 1, "results": entries}))

    from marjax.workdir import claim_workdir

    config = config_lib.resolve(make_digits())
    claim_workdir(root / "workdir", config, names=("cat", None, "Ж"))
    first_start(root / "workdir", write=True)

    (root / "sweep" / "sweep_file.py").write_text(SWEEP)
    sweep_run = SweepRun.open(root / "sweep" / "sweep_file.py", root / "sweep")
    for name in ("a", "jobs", "logs"):
        (root / "sweep" / name).mkdir()
    sweep_run.finish("a", [{"weights": "ema", "fid": 3.5, "n": 2}], 3.0)
    sweep_run.fail("b", "ValueError: no", 2.0)
    jobs.write(sweep_run, "a", jobs.Job("slurm", "5_0", ("--clusters=c",)))

    with Checkpoints(root / "checkpoint") as checkpoints:
        checkpoints.save(1, params={"w": jax.numpy.arange(100.0)}, meta={"images": 3})

    gaussian: dict[str, Any] = {"mu": np.zeros(4), "sigma": np.eye(4)}
    images = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
    meta = json.dumps({"format": 1, "count": 9, "source": "x", "extractor": network})
    np.savez(root / "statistics" / "ours.npz", **gaussian, meta=meta, features=np.ones((3, 4), np.float32))
    np.savez_compressed(root / "statistics" / "adm.npz", **gaussian, mu_s=np.zeros(3), sigma_s=np.eye(3), arr_0=images)
    for name in ("samples", "sample_plans"):
        folder = root / name / PLAN.name
        folder.mkdir()
        (folder / "plan.json").write_text(json.dumps({"batch_size": 4}))
        (folder / "timing-0.json").write_text(json.dumps({"images": 4, "seconds": 0.5}))
        for batch in range(2):
            np.save(folder / f"batch-{batch:06d}.npy", rng.integers(0, 256, (4, 8, 8, 1), np.uint8))
    from marjax.evaluation.networks.classifier import train_classifier

    train_classifier(rng.integers(0, 256, (8, 8, 8, 1), np.uint8), np.arange(8), 8, steps=1, batch_size=2).save(
        root / "classifier" / "classifier.npz"
    )
    made = codebook.Codebook(rng.standard_normal((16, 4)).astype(np.float32), 2, 1)
    arrays: dict[str, Any] = codebook.arrays_of(made, codebook.Fit(0.1, 10.0, 5, 0, "x"))
    np.savez(root / "codebook" / "codebook.npz", **arrays)
    shutil.copy(autoencoders / "kl.safetensors", root / "tokenizer")

    data = rng.standard_normal(12).astype(np.float32)
    weights = {
        "mask_token": tensor(storage("FloatStorage", "0", 12), 0, (3, 4), (4, 1)),
        "encoder.bias": tensor(storage("FloatStorage", "0", 12), 4, (2,), (1,)),
    }
    ordered = Call(Global("collections", "OrderedDict"), (list(weights.items()),))
    checkpoint = {"model": weights, "model_ema": ordered, "epoch": 3, "args": {"lr": 0.5, "names": ["a", "b"]}}
    write_zip(root / "pth" / "a.pth", checkpoint, [data.tobytes()])
    write_legacy(root / "legacy_pth" / "a.pth", weights, [data])
    from safetensors.numpy import save_file

    tensors = {"mask_token": data.reshape(3, 4), "encoder.bias": data[:2].copy()}
    save_file(tensors, root / "safetensors" / "a.safetensors", {"format": "pt", "weights": "ema", "step": "3"})
    save_file(tensors, root / "sharded" / "model-00001.safetensor")
    (root / "sharded" / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 56}, "weight_map": dict.fromkeys(tensors, "model-00001.safetensor")})
    )

    from array_record.python.array_record_module import ArrayRecordWriter

    for name in ("latents", "latent_shards"):
        (root / name / "manifest.json").write_text(MANIFEST.to_json())
        for shard in range(MANIFEST.num_shards):
            writer = ArrayRecordWriter(str(root / name / MANIFEST.shard_file(shard)), "group_size:1,uncompressed")
            for index in MANIFEST.examples_of(shard):
                for _ in range(2):
                    writer.write(pack(rng.standard_normal((2, 2, 4)).astype(np.float32), index))
            writer.close()
    examples = [{"image": as_file(picture(i)), "label": i} for i in range(5)]
    write_tfds(root / "tfds", "plain", examples)
    shutil.copytree(root / "tfds", root / "tfds_shards", dirs_exist_ok=True)
    (root / "shard_records" / "record.json").write_text(
        json.dumps(Record(3, 99, {"JPEG": 2, "palette": 1}, [("a.png", "empty")], [], True)._asdict())
    )

    for kind, mode in (
        ("png", "RGB"),
        ("png", "P"),
        ("png", "LA"),
        ("png", "I;16"),
        ("jpeg", "RGB"),
        ("jpeg", "CMYK"),
        ("bmp", "RGB"),
        ("gif", "P"),
        ("tiff", "RGB"),
        ("webp", "RGB"),
        ("ppm", "RGB"),
    ):
        image = picture(1, "L" if mode == "I;16" else mode, side=9)
        (root / "pictures" / f"{mode.replace(';', '')}.{kind}").write_bytes(
            as_file(
                image.convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else image, kind
            )
        )
    jpeg = as_file(picture(2), "jpeg")
    for name, members in (
        ("ILSVRC2012_img_val.tar", ["ILSVRC2012_val_00000001.JPEG", "ILSVRC2012_val_00000002.JPEG"]),
        (f"{CLASS}.tar", [f"{CLASS}_1.JPEG", f"{CLASS}_2.JPEG"]),
    ):
        (root / "files").mkdir(exist_ok=True)
        with tarfile.open(root / "tars" / name, "w", format=tarfile.GNU_FORMAT) as archive:
            for member in members:
                (root / "files" / member).write_bytes(jpeg)
                archive.add(root / "files" / member, member)
    with tarfile.open(root / "tars" / "ILSVRC2012_img_train.tar", "w", format=tarfile.GNU_FORMAT) as archive:
        archive.add(root / "tars" / f"{CLASS}.tar", f"{CLASS}.tar")
    (root / "tars" / f"{CLASS}.tar").unlink()
    shutil.rmtree(root / "files")


if __name__ == "__main__":
    given, *rest = sys.argv[1:]
    if given in (by_name := {target.name: target for target in TARGETS}):
        index, seed, root = int(rest[0]), int(rest[1]), pathlib.Path(rest[2])
        print(fuzz.mutant(by_name[given], root, seed, index, pathlib.Path("mutant")), "in the folder mutant")
        print(fuzz.outcome_of(by_name[given], pathlib.Path("mutant")))
    else:
        pathlib.Path(rest[0]).write_text(json.dumps(fuzz.run(TARGETS, pathlib.Path(given), COUNT, SEED)))
