"""docs/from_the_reference.md lists every flag of the reference, with fields and options that exist."""

import argparse
import re
import shlex

import pytest
from support.paths import ROOT

from marjax import cli
from marjax import config as config_lib

TEXT = (ROOT / "docs" / "from_the_reference.md").read_text()

# The flags of LTH14/mar at fe470ac.
MAIN_MAR = re.findall(
    r"\w+",
    """
    batch_size epochs model img_size vae_path vae_embed_dim vae_stride patch_size num_iter num_images cfg
    cfg_schedule label_drop_prob eval_freq save_last_freq online_eval evaluate eval_bsz weight_decay
    grad_checkpointing lr blr min_lr lr_schedule warmup_epochs ema_rate mask_ratio_min grad_clip
    attn_dropout proj_dropout buffer_size diffloss_d diffloss_w num_sampling_steps diffusion_batch_mul
    temperature data_path class_num output_dir log_dir device seed resume start_epoch num_workers pin_mem
    no_pin_mem world_size local_rank dist_on_itp dist_url use_cached cached_path""",
)
MAIN_CACHE = re.findall(
    r"\w+",
    """
    batch_size img_size vae_path vae_embed_dim data_path device seed num_workers pin_mem no_pin_mem
    world_size local_rank dist_on_itp dist_url cached_path""",
)


def rows(script):
    """Rows of the table below a heading, five cells each."""
    section = TEXT.split(f"\n## {script}\n")[1].split("\n## ")[0]
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("| `")
    ]
    assert all(len(row) == 5 for row in table)
    return table


def options():
    """Defaults of the options of every command: {"train": {"--workdir": default, ...}}."""
    parser = cli._parser()
    commands = next(each for each in parser._actions if isinstance(each, argparse._SubParsersAction)).choices
    return {
        name: {option: action.default for action in sub._actions for option in action.option_strings}
        for name, sub in commands.items()
    }


@pytest.mark.parametrize("script, names", [("main_mar.py", MAIN_MAR), ("main_cache.py", MAIN_CACHE)])
def test_every_flag_and_its_default(script, names):
    table, known = rows(script), options()
    assert [row[0] for row in table] == [f"`--{name}`" for name in names]
    fields = config_lib.flatten(config_lib.base())
    for flag, _, here, default, _ in table:
        if not here or here == "`model=`":
            continue
        target = here.strip("`")
        if target.startswith("marjax "):
            _, command, *option = target.split()
            assert not option or option[0] in known[command], flag
            expected = known[command][option[0]] if option else None
            expected = "" if expected is None else str(expected)
        else:
            expected = str(fields[target]) or '""'
        assert default == expected, (flag, target)


def test_every_field_and_command_named_exists():
    known, fields = options(), config_lib.flatten(config_lib.base())
    sections = "|".join(config_lib.base())
    named = {each.partition("=")[0] for each in re.findall(rf"`((?:{sections})\.[a-z_.]+(?:=\w+)?)`", TEXT)}
    assert len(named) > 40 and named <= fields.keys()
    commands = re.findall(r"`marjax ([a-z-]+)((?: [^`]*)?)`", TEXT)
    assert len(commands) > 10
    for command, rest in commands:
        assert set(re.findall(r"--[a-z_]+", rest)) <= known[command].keys(), command


def test_the_command_of_the_same_run():
    (block,) = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
    given, overrides = cli.parse(shlex.split(block.replace("\\\n", " "))[1:])
    config = config_lib.apply_overrides(config_lib.load(given.config), overrides)
    assert config_lib.resolve(config).train.steps == 400 * (1_281_167 // 2048)
    assert (config.model.width, config.model.denoiser.depth, config.model.diffusion_batch_mul) == (1024, 3, 4)
