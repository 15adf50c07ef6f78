"""Thousands of damaged and hostile files against every reader of foreign files; support/fuzz.py has the rules.

MARJAX_FUZZ_COUNT and MARJAX_FUZZ_SEED make it a campaign; support/fuzz_targets.py repeats one mutant.
"""

import json
import random
import shutil

import pytest
from support import fuzz, mutators
from support.fuzz_targets import COUNT, TARGETS, make_sound_files
from support.processes import run_program


def test_readers_of_foreign_files(autoencoders, tmp_path):
    root = tmp_path / "sound"
    root.mkdir()
    make_sound_files(root, autoencoders)
    for target in TARGETS:  # as they are, all are read
        shutil.copytree(root / target.name, tmp_path / "copy" / target.name)
        assert fuzz.outcome_of(target, tmp_path / "copy" / target.name) == "works"
    # A process that has touched no device, so that it can fork.
    settings = {"PYTHONDONTWRITEBYTECODE": "1", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    run_program("support.fuzz_targets", root, tmp_path / "report.json", **settings)
    report = json.loads((tmp_path / "report.json").read_text())
    print(fuzz.summary(report))
    assert not any(made["failures"] for made in report.values()), f"{root}\n{fuzz.summary(report)}"
    for name, made in report.items():  # the mutants do reach the readers
        assert made["refused"] > 0 or name in ("metrics", "shard_records"), name
        assert made["works"] + made["refused"] == fuzz.counts(TARGETS, COUNT)[name]


def test_the_runner_notices_what_is_not_allowed(tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x").write_bytes(b"\0")
    made = json.loads(run_program("support.programs.fuzz_misbehaving", tmp_path).stdout)["bad"]
    words = ("os.system", "KeyError", "MemoryError", "SIGABRT", "writes", "no line")
    assert {next(word for word in words if word in each["what"]) for each in made["failures"]} == set(words)
    assert made["works"] > 0 and made["works"] + len(made["failures"]) == 40


@pytest.mark.parametrize(
    "mutate, data",
    [
        (mutators.mutate_bytes, b"abcdef" * 9),
        (mutators.mutate_json, b'{"a": [1, {"b": "x"}], "c": null}'),
        (mutators.mutate_lines, b'{"step": 1}\n{"step": 2}\n'),
    ],
)
def test_a_mutant_is_a_function_of_its_seed(mutate, data):
    made = [[mutate(data, random.Random(seed)) for seed in range(20)] for _ in range(2)]
    assert made[0] == made[1] and len(set(made[0])) > 10 and sum(each != data for each in made[0]) > 15
