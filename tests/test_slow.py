# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The slow tier: minutes on two cores, run by `make test-slow`."""

import json
import shutil
import sys

import pytest

from conftest import ROOT, run
from test_run_summarization import KILL_IN_SAVE, SCRIPT, history

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RANKS = ["deepspeed", "--num_gpus", "2", "--master_port", "29581"]


def test_the_demo_beats_the_lead_baseline_by_far():
    run([sys.executable, "demo.py"], cwd=ROOT, timeout=800)
    results = json.loads((ROOT / "demo/out/all_results.json").read_text())
    assert results["eval_rougeL"] > 40  # the lead baseline has 0.8, a run on 2026-11-21 had 65.0


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_two_ranks_killed_while_saving_resume_and_end_bit_equal(work, tmp_path, stage):
    arguments = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    arguments += ["--max_steps", "8", "--optim", "adafactor", "--learning_rate", "1e-2", "--save_steps", "3"]
    arguments += ["--per_device_train_batch_size", "8", "--deepspeed", ROOT / f"ds_configs/{stage}.json"]
    (tmp_path / "killed.py").write_text(KILL_IN_SAVE.replace("sys.argv.pop(1)", repr(str(ROOT))))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run([*RANKS, SCRIPT, *arguments, "--output_dir", whole], cwd=tmp_path)
    assert run([*RANKS, "killed.py", *arguments, "--output_dir", killed], cwd=tmp_path, check=False).returncode != 0
    resumed = run([*RANKS, SCRIPT, *arguments, "--output_dir", killed], cwd=tmp_path).stdout
    assert resumed.count("Passing over") == 1 and f"going on from {killed / 'checkpoint-3'}" in resumed
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_ten_two_rank_runs_all_exit_with_0(work, tmp_path):
    arguments = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    arguments += ["--max_steps", "1", "--save_strategy", "no", "--deepspeed", ROOT / "ds_configs/zero2.json"]
    for i in range(10):
        run([*RANKS, SCRIPT, *arguments, "--output_dir", tmp_path / str(i)], cwd=tmp_path)


def test_adafactor_has_the_losses_of_one_process_on_two_three_and_resumed_on_four_ranks(work, tmp_path):
    common = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "many.csv"]
    common += ["--optim", "adafactor", "--learning_rate", "1e-3", "--max_steps", "50", "--logging_steps", "1"]
    ways = {
        "one": (1, None),
        "two2": (2, "zero2"),
        "two3": (2, "zero3"),
        "three3": (3, "zero3"),
        "four3": (4, "zero3"),
    }
    losses = {}
    for name, (ranks, config) in ways.items():
        if name == "four3":
            shutil.copytree(tmp_path / "two3/checkpoint-25", tmp_path / "four3/checkpoint-25")
        start = ["deepspeed", "--num_gpus", ranks, "--master_port", "29581"] if config else [sys.executable]
        zero = ["--deepspeed", ROOT / f"ds_configs/{config}.json"] if config else []
        rows = ["--per_device_train_batch_size", 12 // ranks, "--save_steps", "25"]
        run([*start, SCRIPT, *common, *rows, *zero, "--output_dir", name], tmp_path)
        losses[name] = history(tmp_path / name, "loss")
        assert len(losses[name]) == 50 and losses[name] == pytest.approx(losses["one"], rel=1e-4), name
