"""Completion in a real bash."""

import os
import subprocess

import pytest

from marjax import cli, commands, completion

# What bash does when Tab is pressed after the last word.
TAB = """
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMP_LINE="$*" COMP_POINT=${#COMP_LINE}
function=$(complete -p marjax | sed -E 's/.* -F ([^ ]+) .*/\\1/')
compopt() { :; }
"$function" marjax "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script():
    return completion.script(cli._parser(), "bash")


@pytest.fixture
def complete(script, tmp_path):
    """Completes a line in a folder with a file and a folder, without marjax or Python on the PATH."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "recipe.py").touch()
    (tmp_path / "script").write_text(f"{script}\n{TAB}")

    def press(*words):
        printed = subprocess.run(
            ["bash", "script", "marjax", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": os.environ["PATH"]},
        )
        assert not printed.stderr
        return {each.strip() for each in printed.stdout.splitlines() if each.strip()}

    return press


def test_commands_and_flags(complete):
    assert complete("tr") == {"train", "train-tokenizer", "train-classifier"}
    assert complete("") >= set(commands.NAMES) and not complete("") & set(commands.HIDDEN)
    assert complete("sample", "--work") == {"--workdir"}
    assert complete("sample", "--workdir", "x", "--num_s") == {"--num_sampling_steps"}
    assert {"--workdir", "--config"} <= complete("train", "--")


def test_values(complete):
    assert complete("sample", "--workdir", "r") == {"runs"}
    assert complete("train", "--config", "d") == {"digits"}
    assert complete("train", "--config", "r") == {"recipe.py", "runs"}
    assert complete("sample", "--weights", "") == {"ema", "raw"}
    assert complete("benchmark", "tr") == {"train"}


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_the_script(capsys, shell):
    with pytest.raises(SystemExit) as end:
        cli.main(["--print-completion", shell])
    printed = capsys.readouterr().out
    assert not end.value.code and "marjax" in printed and "cache-latents" in printed
