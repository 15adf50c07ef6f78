"""Heads, backbones, tokenizers and data sources of users: known by name, in every command, and to nobody else."""

import importlib.metadata
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.configs import QUICK, make_digits

import marjax
from marjax import config as config_lib
from marjax import registry
from marjax.assembly import assemble
from marjax.errors import UserError
from marjax.heads.regression import RegressionHead
from marjax.models import generator as generator_lib
from marjax.models.encoder_decoder import EncoderDecoder
from marjax.workdir import claim_workdir, read_workdir


def forget(monkeypatch):
    """As in a process that has just begun."""
    monkeypatch.setattr(registry, "_registered", {kind: {} for kind in registry.KINDS})
    monkeypatch.setattr(registry, "_loaded", set())


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    forget(monkeypatch)
    monkeypatch.delenv(registry.PLUGINS, raising=False)


class Scaled(RegressionHead):
    """The regression head with a setting of its own, and nothing that counts FLOPs."""

    factor: float = 1.0
    loss_flops = None
    sample_flops = None

    @classmethod
    def from_config(cls, model, token_dim, num_codes):
        return cls(
            token_dim=token_dim,
            cond_width=model.width,
            dtype=jnp.dtype(model.dtype),
            factor=config_lib.parse_arg(model.extra, factor=1.0).factor,
        )

    def __call__(self, z_BxLxW, tokens_BxLxD, noise, weight_BxL):
        loss, weight = super().__call__(z_BxLxW, tokens_BxLxD, noise, weight_BxL)["loss"]
        return {"loss": (self.factor * loss, weight)}


class Doubling(EncoderDecoder):
    many = True
    any_next = True


class Tripled:
    """A tokenizer without weights that halves the grid and scales by 1/3."""

    stride, params, checksum, scale = 2, {}, "abc", 1 / 3

    @classmethod
    def from_config(cls, tokenizer):
        return cls()

    @staticmethod
    def latent_channels(channels):
        return 4 * channels

    def encode(self, params, image, key):
        b, h, w, c = image.shape
        return (
            image.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c) / 3
        )

    def decode(self, params, latent):
        b, h, w, c = latent.shape
        return 3 * latent.reshape(b, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * h, 2 * w, c // 4)

    def codebook(self, params):
        return None


def test_a_run_with_parts_of_ones_own(tmp_path):
    """All kinds together, with sampling and resuming: `test_docs_extending.py`."""
    marjax.register("head", "scaled", Scaled)
    marjax.register("tokenizer", "tripled", Tripled)
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    marjax.register("source", "noise", lambda data: (images, np.arange(40) % 3))
    config = make_digits(
        **QUICK
        | dict(
            model__head="scaled",
            model__extra="factor=2e6",
            tokenizer__name="tripled",
            tokenizer__patch_size=1,
            data__source="noise:any",
            data__num_classes=None,
            data__num_examples=None,
            train__steps=1,
        )
    )
    marjax.train(config, tmp_path)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["train/loss"] > 1e4  # of tokens in [-1/3, 1/3], by the factor
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["data"]["num_classes"] == 3 and written["tokenizer"]["checksum"] == "abc"
    images[0] += 1
    with pytest.raises(UserError, match="data.fingerprint"):
        marjax.train(config, tmp_path)


PLUGIN = """
import marjax
from marjax.heads.regression import RegressionHead
class Mine(RegressionHead):
    pass
marjax.register("head", "mine", Mine)
"""


def test_a_strangers_work_directory_imports_nothing_but_what_the_user_lists(tmp_path, monkeypatch):
    plugin = tmp_path / "plugin.py"
    plugin.write_text(PLUGIN)
    monkeypatch.setenv(registry.PLUGINS, str(plugin))
    claim_workdir(tmp_path / "run", config_lib.resolve(make_digits(model__head="mine")))
    forget(monkeypatch)
    config = read_workdir(tmp_path / "run")
    assert type(assemble(config).generator.head).__name__ == "Mine"
    forget(monkeypatch)
    monkeypatch.delenv(registry.PLUGINS)
    with pytest.raises(UserError, match="model.head.*'mine'.*marjax.register"):
        marjax.sample(tmp_path / "run", [1])
    # A name that is a module, a path or an attribute is a name that is not registered, and no more.
    for name in ("os:system", str(plugin), "plugin", "../plugin.py", "x" * 5000):
        for field in ("model.head", "model.variant", "tokenizer.name", "data.source"):
            if len(name) < 4000:
                config = config_lib.apply_overrides(make_digits(data__num_classes=None), {field: name})
                with pytest.raises(UserError, match=field.replace(".", "[.]")):
                    config_lib.resolve(config)
    assert "plugin" not in sys.modules


def test_a_plugin_that_cannot_be_imported_is_reported_every_time(tmp_path, monkeypatch):
    plugin = tmp_path / "broken.py"
    plugin.write_text("import no_such_module_at_all")
    forget(monkeypatch)
    monkeypatch.setenv(registry.PLUGINS, str(plugin))
    for _ in range(2):
        with pytest.raises(UserError, match="broken.py.*no_such_module_at_all"):
            registry.find("head", "mine")
    plugin.write_text("")
    assert registry.find("head", "mine") is None


def test_an_installed_package_brings_a_head_by_an_entry_point(monkeypatch):
    def points(group):
        return (
            [
                importlib.metadata.EntryPoint("installed", f"{__name__}:Scaled", group),
                importlib.metadata.EntryPoint("broken", f"{__name__}:Nothing", group),
            ]
            if group == "marjax.heads"
            else []
        )

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points(group))
    assert config_lib.resolve(make_digits(model__head="installed")).train.schedule == "constant"
    with pytest.raises(UserError, match="'broken'"):
        config_lib.resolve(make_digits(model__head="broken"))
    with pytest.raises(UserError, match="installed"):
        config_lib.resolve(make_digits(model__head="instaled"))


def test_names_that_are_taken():
    marjax.register("head", "scaled", Scaled)
    marjax.register("head", "scaled", Scaled)
    marjax.register("backbone", "scaled", Doubling)  # another kind
    again = type("Scaled", (Scaled,), {"__module__": Scaled.__module__})  # a cell that was run again
    marjax.register("head", "scaled", again)
    assert generator_lib.HEADS["scaled"] is again
    other = type("Other", (RegressionHead,), {"__module__": "elsewhere"})
    for kind, name in (
        ("head", "scaled"),
        ("head", "diffusion"),
        ("backbone", "mar"),
        ("backbone", "causal"),
        ("tokenizer", "kl16"),
        ("source", "tfds"),
        ("source", "python"),
        ("head", "a:b"),
        ("head", ""),
        ("haed", "x"),
    ):
        with pytest.raises(UserError, match="register"):
            marjax.register(kind, name, {"backbone": Doubling, "tokenizer": Tripled}.get(kind, other))


class Wrong(Scaled):
    kind = "shape"

    def sample(self, z, noise, guidance, **settings):
        return super().sample(z, noise, guidance, **settings)[..., :1]


class NoLoss(Scaled):
    def __call__(self, z_BxLxW, *rest, **settings):
        return {"mse": super().__call__(z_BxLxW, *rest, **settings)["loss"]}


@pytest.mark.parametrize("head, told", [(Wrong, "sample"), (NoLoss, "'loss'")])
def test_a_head_that_breaks_its_contract_is_found_before_anything_is_written(tmp_path, head, told):
    marjax.register("head", "wrong", head)
    with pytest.raises(UserError, match=f"config.model.head=wrong.*{told}"):
        marjax.train(make_digits(model__head="wrong", model__variant="ar", sample__num_iter=16), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "kind, thing, told",
    [
        ("head", type("Half", (), {"from_config": 1, "sample": 1}), "draw_loss_noise"),
        ("head", Scaled(4, 8), "a class"),
        ("backbone", type("Odd", (Doubling,), {"order": "spiral"}), "spiral"),
        ("tokenizer", Scaled, "stride"),
        ("source", 3, "int"),
    ],
)
def test_objects_that_lack_what_their_kind_needs(kind, thing, told):
    with pytest.raises(UserError, match=told):
        marjax.register(kind, "mine", thing)


def test_settings_of_a_head(tmp_path):
    with pytest.raises(UserError, match="config.model.extra"):
        config_lib.resolve(make_digits(model__extra="factor=2"))
    marjax.register("head", "scaled", Scaled)
    config = config_lib.resolve(make_digits(model__head="scaled", model__extra="fator=2"))
    with pytest.raises(UserError, match="config.model.extra.*'fator'"):
        marjax.train(config, tmp_path / "run")
    assert jax.process_count() == 1 and not (tmp_path / "run").exists()
