"""The paper's table 1 in small, on MNIST: `marjax sweep launch/table1_small.py --root runs/table1_small --jobs 2`.

Every variant with the diffusion head on patches and with cross-entropy on the same patches quantised, equal backbones
and equal steps; beside them the regression head, and the diffusion head on the quantised patches, with cross-entropy's
learning rate and with a wider denoiser. Temperature and guidance are tuned for each row on the same grid, with one
seed, and measured with another. The folder report/ below the root gets the table and the pictures of
docs/table1_small.md (needs matplotlib).
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np

from marjax import config as config_lib
from marjax import numerics
from marjax.sweep import Point, Sweep
from marjax.sweep.rows import write_text
from marjax.workdir import read_workdir

TEMPERATURES = (0.6, 0.8, 1.0)
SCALES = (1.5, 3.0, 5.0)
TUNED_ON, MEASURED_ON = 100, 500  # images
TUNING_SEED, SEED = 1, 0
ONE_BY_ONE = 49  # generation steps of the rows /1: as many as there are tokens
CODEBOOK = "mnist:head=categorical"


@dataclasses.dataclass(frozen=True)
class Paper:
    """FID on ImageNet 256 without and with guidance (table 1 of the paper)."""

    plain: float
    guided: float


# Row -> (order, attention, tokens a step, head) and the paper's numbers where it has that row.
ROWS: dict[str, tuple[tuple[str, str, str, str], Paper | None]] = {
    "ar": (("raster", "causal", "1", "diffusion"), Paper(19.23, 4.69)),
    "ar_ce": (("raster", "causal", "1", "categorical"), Paper(19.58, 4.92)),
    "random_ar": (("random", "causal", "1", "diffusion"), Paper(13.07, 4.07)),
    "random_ar_ce": (("random", "causal", "1", "categorical"), Paper(16.22, 4.36)),
    "mar/1": (("random", "bidirectional", "1", "diffusion"), Paper(3.43, 1.84)),
    "mar_ce/1": (("random", "bidirectional", "1", "categorical"), Paper(8.75, 3.50)),
    "mar": (("random", "bidirectional", "> 1", "diffusion"), Paper(3.50, 1.98)),
    "mar_ce": (("random", "bidirectional", "> 1", "categorical"), Paper(8.79, 3.69)),
    "mar_l2": (("random", "bidirectional", "> 1", "regression"), None),
    "mar_quantised": (("random", "bidirectional", "> 1", "diffusion on the quantised patches"), None),
    "mar_cosine": (("random", "bidirectional", "> 1", "diffusion, cosine learning rate"), None),
    "mar_wide": (("random", "bidirectional", "> 1", "diffusion, denoiser twice as wide"), None),
}


def get_sweep() -> Sweep:
    points = [
        Point(f"{variant}{suffix}", f"mnist:variant={variant},head={head}")
        for variant in ("mar", "random_ar", "ar")
        for head, suffix in (("diffusion", ""), ("categorical", "_ce"))
    ]
    points += [
        Point("mar_l2", "mnist:head=regression"),
        Point("mar_quantised", "mnist:head=diffusion", {"tokenizer.name": "codebook"}),
        # In search of what holds the diffusion head back at this scale.
        Point("mar_cosine", "mnist:head=diffusion", {"train.schedule": "cosine"}),
        Point("mar_wide", "mnist:head=diffusion", {"model.denoiser.width": 128}),
    ]
    return Sweep(points, measure=measure, prepare=prepare, report=report)


def real_images() -> tuple[np.ndarray, np.ndarray]:
    """All 5000, uint8 (N, 28, 28, 1), and their classes."""
    from marjax.data.sources import open_source

    source = open_source(config_lib.load(CODEBOOK).data)
    elements = [source[i] for i in range(len(source))]
    return np.stack([e["image"] for e in elements]), np.array([e["label"] for e in elements])


def prepare(root: pathlib.Path) -> None:
    """The codebook, the classifier and what the distances mean: root/classifier.npz, root/reference.json."""
    import jax

    from marjax.evaluation.metrics.frechet import frechet_distance, gaussian
    from marjax.evaluation.networks.classifier import train_classifier
    from marjax.tokenizer_training.codebook import train_codebook
    from marjax.tokenizers.codebook import open_codebook, read

    config = config_lib.resolve(config_lib.load(CODEBOOK))
    path = pathlib.Path(config.tokenizer.path)
    if not path.exists():
        train_codebook(config, path)
    if (root / "reference.json").exists():  # written last
        return
    images, labels = real_images()
    classifier = train_classifier(images[:4000], labels[:4000], 10)
    classifier.save(root / "classifier.npz")
    tokenizer = open_codebook(config.tokenizer)
    quantise = jax.jit(lambda x: tokenizer.encode(tokenizer.params, x / 127.5 - 1.0, numerics.key(0)))
    quantised = np.asarray(quantise(images[:MEASURED_ON].astype(np.float32)))
    quantised = np.clip(np.round((quantised + 1.0) * 127.5), 0, 255).astype(np.uint8)
    # As many real images as there are samples in a row, against all others.
    rest = gaussian(classifier.extract(images[MEASURED_ON:]).features)
    write_text(
        root / "reference.json",
        json.dumps(
            {
                "accuracy": classifier.accuracy(images[4000:], labels[4000:]),
                "distance_of_real": frechet_distance(gaussian(classifier.extract(images[:MEASURED_ON]).features), rest),
                "distance_of_quantised": frechet_distance(gaussian(classifier.extract(quantised).features), rest),
                "codes": config.tokenizer.num_codes,
                "psnr": read(path)[1].psnr,
            },
            indent=2,
        )
        + "\n",
    )


def measure(workdir: pathlib.Path, root: pathlib.Path) -> list[dict[str, Any]]:
    """One row for each way to sample that ROWS has of this training."""
    own = read_workdir(workdir).sample.num_iter
    names = [name for name in ROWS if name.partition("/")[0] == workdir.name]
    judge = Judge(root)
    return [measure_row(workdir, root, judge, ONE_BY_ONE if name.endswith("/1") else own, name) for name in names]


class Judge:
    """What samples are measured with: the classifier, and the real images' features."""

    def __init__(self, root: pathlib.Path) -> None:
        from marjax.evaluation.metrics.frechet import gaussian
        from marjax.evaluation.networks.classifier import Classifier

        self.classifier = Classifier.load(root / "classifier.npz")
        self.real = gaussian(self.classifier.extract(real_images()[0]).features)

    def __call__(self, images: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
        """Frechet distance to the real images, and the share recognised as their label."""
        from marjax.evaluation.metrics.frechet import frechet_distance, gaussian

        found = self.classifier.extract(images)
        return frechet_distance(gaussian(found.features), self.real), float((found.logits.argmax(1) == labels).mean())


def draw(
    sampler: Any, params: Any, sample: Any, scale: float, temperature: float, seed: int, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """n images, equally many of each class, and their labels."""
    sample = sample.copy_and_resolve_references()
    with sample.unlocked():
        sample.update(cfg=scale, temperature=temperature)
    labels = np.arange(n) % 10
    return sampler.with_settings(sample)(params, labels, seed, batch_size=100), labels


def measure_row(workdir: pathlib.Path, root: pathlib.Path, judge: Judge, num_iter: int, name: str) -> dict[str, Any]:
    """Tuned on the grid without guidance and with, then measured on other samples."""
    from marjax.generation.sample import open_sampler
    from marjax.images import grid, write_png

    row: dict[str, Any] = {"row": name}
    sample = read_workdir(workdir).sample
    with sample.unlocked():
        sample.num_iter = num_iter
    kept = workdir / f"tuning_{num_iter}.json"
    terms = {"steps": read_workdir(workdir).train.steps, "samples": TUNED_ON, "seed": TUNING_SEED}
    tried: dict[tuple[float, float], float] = {}
    if kept.exists() and (found := json.loads(kept.read_text("utf-8")))["terms"] == terms:  # resumed
        tried = {(scale, temperature): distance for scale, temperature, distance in found["tried"]}
    for kind, scales in (("plain", (1.0,)), ("guided", SCALES)):
        sampler, params, *_ = open_sampler(workdir, num_iter=num_iter, cfg=scales[0])
        for key in itertools.product(scales, TEMPERATURES):
            if key not in tried:
                tried[key] = judge(*draw(sampler, params, sample, *key, TUNING_SEED, TUNED_ON))[0]
                write_text(kept, json.dumps({"terms": terms, "tried": [[*k, d] for k, d in tried.items()]}))
        scale, temperature = min(itertools.product(scales, TEMPERATURES), key=lambda key: tried[key])
        images, labels = draw(sampler, params, sample, scale, temperature, SEED, MEASURED_ON)
        distance, accuracy = judge(images, labels)
        row |= {
            f"{kind}_distance": distance,
            f"{kind}_accuracy": accuracy,
            f"{kind}_temperature": temperature,
            f"{kind}_scale": scale,
        }
        (root / "pictures").mkdir(exist_ok=True)
        write_png(root / "pictures" / f"{name.replace('/', '_')}_{kind}.png", grid(images[:60], 10))
    return row


def report(root: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """root/report/: the table beside the paper's numbers, the curves, the samples of every row."""
    import matplotlib

    matplotlib.use("Agg")

    folder = root / "report"
    folder.mkdir(exist_ok=True)
    done = {row["row"]: row for row in rows if row.get("status") == "done"}
    reference = json.loads((root / "reference.json").read_text("utf-8"))
    head = (
        f"Classifier: {reference['accuracy']:.1%} right on 1000 real digits it was not trained on. Distance of "
        f"{MEASURED_ON} real digits to the others: {reference['distance_of_real']:.2f}; of the same digits "
        f"quantised by {reference['codes']} codes ({reference['psnr']:.1f} dB): "
        f"{reference['distance_of_quantised']:.2f}.\n\n"
    )
    (folder / "table.md").write_text(head + table_of(done), "utf-8")
    draw_curves(root, done, folder / "curves.png")
    draw_samples(root, done, folder / "samples.png")


def table_of(done: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| order | attention | tokens a step | head | distance | accuracy | T | guided: distance | accuracy | T | "
        "scale | paper's FID | guided |",
        "|---|---|---|---|" + "---:|" * 9,
    ]
    for name, (choices, paper) in ROWS.items():
        if name not in done:
            continue
        row = done[name]
        plain_t, guided_t = (
            "-" if choices[3] == "regression" else f"{row[f'{kind}_temperature']:g}" for kind in ("plain", "guided")
        )  # a mean has no temperature
        values = [
            f"{row['plain_distance']:.1f}",
            f"{row['plain_accuracy']:.1%}",
            plain_t,
            f"{row['guided_distance']:.1f}",
            f"{row['guided_accuracy']:.1%}",
            guided_t,
            f"{row['guided_scale']:g}",
            *((f"{paper.plain}", f"{paper.guided}") if paper else ("", "")),
        ]
        lines.append("| " + " | ".join((*choices, *values)) + " |")
    return "\n".join(lines) + "\n"


def draw_curves(root: pathlib.Path, done: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Training losses by step, and the distance of the tuning samples by guidance scale (best temperature).

    A colour for each training; cross-entropy is dashed, one token at a time by a masked model dotted.
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    colours = {point.name: f"C{i}" for i, point in enumerate(get_sweep().points)}
    for point in get_sweep().points:
        log = root / point.name / "metrics.jsonl"
        if log.exists():
            values = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
            axis = axes[1 if point.name.endswith("_ce") else 0]
            axis.plot(
                [v["step"] for v in values],
                [v["train/loss"] for v in values],
                label=point.name,
                color=colours[point.name],
            )
    for axis, title in zip(axes, ("diffusion loss (and L2)", "cross-entropy, nats a token"), strict=False):
        axis.set(title=title, xlabel="step", yscale="log")
    for name in done:
        point, _, one = name.partition("/")
        steps = read_workdir(root / point).sample.num_iter
        kept = root / point / f"tuning_{ONE_BY_ONE if one else steps}.json"
        tried = np.array(json.loads(kept.read_text("utf-8"))["tried"])
        scales = np.unique(tried[:, 0])
        best = [tried[tried[:, 0] == scale, 2].min() for scale in scales]
        style = "o:" if one else "o--" if "_ce" in name else "o-"
        axes[2].plot(scales, best, style, color=colours[point], label=name, markersize=3)
    axes[2].set(title=f"distance of {TUNED_ON} samples", xlabel="guidance scale (linear schedule)", yscale="log")
    for axis in axes:  # below, where they hide no curve
        axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_samples(root: pathlib.Path, done: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Sixty samples of every row, without guidance and with."""
    import matplotlib.pyplot as plt

    names = [name for name in ROWS if name in done]
    figure, axes = plt.subplots(len(names), 2, figsize=(7.4, 2.4 * len(names)), layout="constrained", squeeze=False)
    for name, pair in zip(names, axes, strict=True):
        for kind, axis in zip(("plain", "guided"), pair, strict=True):
            axis.imshow(plt.imread(root / "pictures" / f"{name.replace('/', '_')}_{kind}.png"), cmap="gray")
            axis.set_title(f"{name}, {kind}", fontsize=8)
            axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    print(__doc__)  # `marjax sweep` runs this file
