# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A misspelt flag and --help are answered in few lines, each flag once, and without loading the libraries."""

import re
import shutil
import subprocess
import sys

import pytest
from transformers import HfArgumentParser

import flag_help
import run_clm_instruct
import run_generation
import run_summarization
from conftest import ROOT, make_environment

SCRIPTS = ("run_summarization.py", "run_clm_instruct.py", "run_generation.py")
HEAVY = {"torch", "transformers", "datasets", "numpy", "deepspeed", "accelerate"}
TOOLS = ["dataset_size", "encode_labels", "make_sample_reviews", "measure_dataset", "prepare_instruct"]
TOOLS += ["prepare_reviews", "spark_dataset"]


def start(script, *words, cwd) -> tuple[subprocess.CompletedProcess, set[str]]:
    """What a script answers, and the packages that it loaded for it."""
    command = [sys.executable, "-X", "importtime", script, *words]
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=make_environment(), capture_output=True, text=True
    )
    loaded = set(re.findall(r"^import time: .*\| +(\w+)\S*$", done.stderr, re.M))
    done.stderr = "".join(line for line in done.stderr.splitlines(True) if not line.startswith("import time: "))
    return done, loaded


@pytest.mark.parametrize("script", SCRIPTS)
def test_misspelt_flags_are_answered_in_a_line_each_without_the_libraries(script, tmp_path):
    flag, meant = ("--imput_file", "--input_file") if "generation" in script else ("--train_flie", "--train_file")
    done, loaded = start(ROOT / script, flag, "a.csv", "--zork", "1", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.split("\n")[1:3] == [
        f"error: {flag}: no such flag; did you mean {meant}?",
        "error: --zork: no such flag; --help lists all",
    ]
    assert len(done.stderr.strip().splitlines()) == 2 and "argparse" in loaded and not loaded & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_many_misspelt_flags_are_at_most_six_lines(script, tmp_path):
    done, _ = start(ROOT / script, *(f"--zork{i}" for i in range(20)), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 6
    assert done.stderr.strip().endswith("and 15 more flags that are none")


@pytest.mark.parametrize("flag", ["--help", "-h", "--help_all"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_printed_without_the_libraries(script, flag, tmp_path):
    done, loaded = start(ROOT / script, flag, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "" and not loaded & HEAVY
    lines = done.stdout.splitlines()
    flags = [line.split()[0] for line in lines if line.startswith("  --")]
    assert len(flags) == len(set(flags)) > 40  # each once
    ours = [f"--{name}" for name in ("model_name_or_path", "token")]
    theirs = "--num_beams" if "generation" in script else "--learning_rate"
    assert all(flags.index(name) < flags.index(theirs) for name in ours)  # our own first
    if flag != "--help_all":
        assert len(lines) < 100 and all(len(line) <= 119 for line in lines)
        assert re.fullmatch(r"--help_all has \d+ more flags, and all in full\.", lines[-1])


def make_parser(name: str):
    module = {"run_summarization.py": run_summarization, "run_clm_instruct.py": run_clm_instruct}.get(name)
    if module is None:
        return run_generation.make_parser()
    return HfArgumentParser(getattr(module, "SUMMARIZATION_ARGUMENTS", None) or module.INSTRUCT_ARGUMENTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flags_of_help_all_are_those_of_the_parser(script):
    assert flag_help.list_flags(ROOT / script) == {f"--{a.dest}" for a in make_parser(script)._actions} - {"--help"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_defaults_of_help_are_those_of_the_parser(script):
    parser = make_parser(script)
    for flag in (flag for _, flags, is_own in flag_help.read_groups(ROOT / script) if is_own for flag in flags):
        default = parser.get_default(flag.name)
        assert flag.default == ("" if default is None or default is False else str(default)), flag.name


def test_the_librarys_common_flags_are_still_the_librarys():
    known = {flag for script in SCRIPTS for flag in flag_help.list_flags(ROOT / script)}
    assert {f"--{name}" for name in (*flag_help.COMMON, *flag_help.REWORDED)} <= known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_help_shows_says_what_it_is(script):
    flags = [flag for _, flags, is_own in flag_help.read_groups(ROOT / script) for flag in flags if flag.name]
    assert all(flag.help.strip() for flag in flags if flag.name in flag_help.COMMON or "generation" not in script)


def test_without_flag_help_argparse_answers(tmp_path):
    for name in ("run_generation.py", "flag_checks.py"):
        shutil.copy(ROOT / name, tmp_path)
    done, _ = start(tmp_path / "run_generation.py", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "usage: run_generation.py" in done.stdout


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_of_data_prep_names_every_misspelt_flag_in_a_line(tool, tmp_path):
    done, loaded = start(ROOT / f"data_prep/{tool}.py", "--ouput_dirr", "a", "--ouput_filee=b", "--zork", cwd=tmp_path)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 3
    assert tool == "measure_dataset" or "torch" not in loaded  # its figures come from a training script
    assert lines[0].startswith(f"{tool}.py: error: --ouput_dirr: no such flag; ")
    assert "did you mean --" in done.stderr and lines[2] == "  --zork: no such flag; --help lists all"


@pytest.mark.parametrize("tool", ["prepare_reviews", "encode_labels"])
def test_what_a_tool_of_data_prep_lacks_is_said_without_its_usage(tool, tmp_path):
    done, _ = start(ROOT / f"data_prep/{tool}.py", cwd=tmp_path)
    assert done.returncode == 2 and re.fullmatch(rf"{tool}.py: error: the following .* required: .*\n", done.stderr)


def test_help_into_a_reader_that_stops_early_is_no_traceback():
    command = f"{sys.executable} {ROOT / 'run_summarization.py'} --help_all | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout.startswith("Fine-tune T5") and done.stderr == ""


def test_without_transformers_it_says_so_in_a_sentence(tmp_path):
    command = [sys.executable, "-S", ROOT / "run_summarization.py", "--do_train"]  # -S: no site-packages
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("error: transformers is not installed for ")
    assert done.stderr.count("\n") == 1
