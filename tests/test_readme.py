# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the README says holds: its commands parse, its files and make targets exist."""

import re
import shlex
import subprocess
import sys

import pytest
from transformers import HfArgumentParser

import dataset_size
import init_model
import measure_dataset
import plan_run
import prepare_reviews
import run_clm_instruct
import run_generation
import run_summarization
import spark_dataset
from conftest import ROOT

sys.path.insert(0, str(ROOT / "launchers"))
import spark_generate  # noqa: E402
import spark_train  # noqa: E402

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]


ARGUMENTS = {
    "run_summarization.py": run_summarization.SUMMARIZATION_ARGUMENTS,
    "run_clm_instruct.py": run_clm_instruct.INSTRUCT_ARGUMENTS,
}
TRAINING = [(name, c) for c in COMMANDS for name in ARGUMENTS if f"{name} --" in c]


@pytest.mark.parametrize("name, command", TRAINING)
def test_every_training_command_parses_and_its_config_exists(name, command):
    words = shlex.split(command)
    namespace = HfArgumentParser(ARGUMENTS[name]).parse_args(words[words.index(name) + 1 :])
    assert (words[0] == "deepspeed") == (namespace.deepspeed is not None) or "launchers/" in command
    assert run_summarization.find_deepspeed_problems(namespace) == []
    if name == "run_clm_instruct.py":
        assert run_clm_instruct.find_template_problems(namespace) == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if "run_generation.py --" in c])
def test_every_generation_command_parses_and_its_decoding_flags_agree(command):
    words = shlex.split(command)
    namespace = run_generation.make_parser().parse_args(words[words.index("run_generation.py") + 1 :])
    names = {name for cls in run_generation.GENERATION_ARGUMENTS for name in cls.__dataclass_fields__}
    decoding = {name: value for name, value in vars(namespace).items() if name not in names}
    assert run_generation.find_decoding_problems(decoding) == []
    assert run_generation.find_zero3_problems(namespace.deepspeed) == []
    assert (words[0] == "deepspeed") == (namespace.deepspeed is not None)


def words_after(script: str) -> list[str]:
    """What stands after a script in the README's one command with it."""
    (command,) = [c for c in COMMANDS if f"{script} --" in c]
    return shlex.split(command.partition(f"{script} ")[2])


def test_the_commands_on_spark_parse():
    for words in [shlex.split(c.partition("spark_train.py")[2]) for c in COMMANDS if "spark_train.py" in c]:
        args = spark_train.parse_launch_arguments(words)
        assert args.script == "run_summarization.py" and args.script_args[0].startswith("--")
    _, flags = spark_generate.parse_spark_arguments(words_after("spark_generate.py"))
    assert "--num_beams" in flags
    assert spark_dataset.parse_args(words_after("spark_dataset.py")).output_file == "data/train.parquet"
    assert prepare_reviews.parse_args(words_after("prepare_reviews.py")).engine == "spark"


@pytest.mark.parametrize("command", [c for c in COMMANDS if "plan_run.py --" in c])
def test_every_planning_command_parses(command):
    args = plan_run.parse_args(shlex.split(command.partition("plan_run.py ")[2]))
    assert args.model in init_model.T5_PRESETS | init_model.LLAMA_PRESETS


MEASURING = {"dataset_size.py": dataset_size, "measure_dataset.py": measure_dataset}


@pytest.mark.parametrize("name, command", [(name, c) for c in COMMANDS for name in MEASURING if f"{name} --" in c])
def test_every_command_that_looks_at_data_parses(name, command):
    words = shlex.split(command.partition(f"{name} ")[2])
    args = MEASURING[name].parse_args(words)
    if name == "measure_dataset.py":
        assert measure_dataset.check_args(args) == []
        assert args.train_file.startswith("data/") and args.output_dir.startswith("reports/")


def test_the_readme_shows_how_to_look_at_data():
    counts = {name: sum(f"{name} --" in c for c in COMMANDS) for name in MEASURING}
    assert counts["dataset_size.py"] == counts["measure_dataset.py"] == 2


def test_every_decoding_flag_named_is_one():
    flags = re.findall(r"`--([a-z_]+)[^`]*`", README.split("- **Decoding**")[1].split("- **Batches**")[0])
    known = {action.dest for action in run_generation.make_parser()._actions}
    assert len(flags) >= 6 and set(flags) <= known


def test_every_make_target_named_exists():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert {"demo", "test", "prep-reviews", "train-t5-small", "train-t5-large", "train-t5-11b"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_make_targets_run_the_commands_that_stand_below_them():
    for name in ("t5-small", "t5-large", "t5-11b", "llama2-7b", "llama3-8b"):
        made = subprocess.run(["make", "-n", f"train-{name}"], cwd=ROOT, capture_output=True, text=True).stdout
        made = made.replace("\\\n", " ")
        stated = next(c for c in COMMANDS if f"--output_dir out/{name} " in c)
        flags = "deepspeed|optim|per_device_train_batch_size|num_train_epochs|output_dir|model_name_or_path|lora_rank"
        flags += "|prompt_template|max_seq_length|learning_rate"
        for pair in re.findall(rf"--(?:{flags}) \S+", stated):
            assert pair in made, (name, pair)


def test_every_file_named_exists():
    for path in re.findall(r"(?:ds_configs|launchers|data_prep)/\w+\.\w+", README):
        assert (ROOT / path).is_file(), path
    block = README.split("## Files")[1]
    for line in re.findall(r"```\n(.*?)```", block, re.S)[0].splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_the_init_model_command_parses():
    command = next(c for c in COMMANDS if "init_model.py" in c)
    assert "--preset t5-small" in command and "t5-small" in str(init_model.__dict__)
