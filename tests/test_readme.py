# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the README says holds: its commands parse, its files and make targets exist."""

import re
import shlex
import subprocess

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

import init_model
import run_summarization as script
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]


@pytest.mark.parametrize("command", [c for c in COMMANDS if "run_summarization.py --" in c])
def test_every_training_command_parses_and_its_config_exists(command):
    words = shlex.split(command)
    arguments = words[words.index("run_summarization.py") + 1 :]
    parser = HfArgumentParser((script.ModelArguments, script.DataTrainingArguments, Seq2SeqTrainingArguments))
    namespace = parser.parse_args(arguments)
    assert (words[0] == "deepspeed") == (namespace.deepspeed is not None)
    assert script.find_deepspeed_problems(namespace) == []


def test_every_make_target_named_exists():
    targets = {c.split()[1] for c in COMMANDS if c.startswith("make ")}
    assert {"demo", "test", "prep-reviews", "train-t5-small", "train-t5-large", "train-t5-11b"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_make_targets_run_the_commands_that_stand_below_them():
    for name in ("t5-small", "t5-large", "t5-11b"):
        made = subprocess.run(["make", "-n", f"train-{name}"], cwd=ROOT, capture_output=True, text=True).stdout
        made = made.replace("\\\n", " ")
        stated = next(c for c in COMMANDS if f"--model_name_or_path {name} " in c)
        for pair in re.findall(
            r"--(?:deepspeed|optim|per_device_train_batch_size|num_train_epochs|output_dir) \S+", stated
        ):
            assert pair in made, (name, pair)


def test_every_file_named_exists():
    for path in re.findall(r"(?:ds_configs|data_prep)/\w+\.\w+", README):
        assert (ROOT / path).is_file(), path
    block = README.split("## Files")[1]
    for line in re.findall(r"```\n(.*?)```", block, re.S)[0].splitlines():
        assert (ROOT / line.split()[0]).exists(), line


def test_the_init_model_command_parses():
    command = next(c for c in COMMANDS if "init_model.py" in c)
    assert "--preset t5-small" in command and "t5-small" in str(init_model.__dict__)
