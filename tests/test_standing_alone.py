# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A script copied alone trains to the losses and weights that it has with its companions, and says what it lacks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, run_warm

COMPANIONS = (
    "guards.py",
    "tables.py",
    "model_checks.py",
    "chat_turns.py",
    "reports.py",
    "fast_batches.py",
    "cpu_dropout.py",
    "zero_adafactor.py",
)
OF_GUARDS = (
    "checkpoints.py",
    "portable_checkpoints.py",
    "rank_watch.py",
    "flag_checks.py",
    "value_checks.py",
    "deepspeed_checks.py",
    "console.py",
    "step_figures.py",
    "closing.py",
    "model_card.py",
    "flag_help.py",
)
SGD = ["--do_train", "--max_steps", "12", "--logging_steps", "1", "--optim", "sgd", "--learning_rate", "0.1"]
SGD += ["--lr_scheduler_type", "constant", "--save_strategy", "no", "--disable_tqdm", "true"]
WAYS = {  # rows a rank, accumulation steps, DeepSpeed file: 16 rows a step
    "one process": (16, 1, None),
    "ZeRO-2": (4, 2, "zero2.json"),
    "ZeRO-3": (4, 2, "zero3.json"),
}
SENTENCES = {
    "guards.py": "guards.py is not beside this script: bad input ends late",
    "tables.py": "tables.py is not beside this script: data as .csv, .json",
    "model_checks.py": "model_checks.py is not beside this script: a model that lacks weights",
    "reports.py": "reports.py is not beside this script: no audit of labels",
    "fast_batches.py": "fast_batches.py is not beside this script: batches are padded",
    "cpu_dropout.py": "cpu_dropout.py is not beside this script: on the CPU torch draws",
    "zero_adafactor.py": "zero_adafactor.py is not beside this script: under ZeRO",
    "chat_turns.py": "chat_turns.py is not beside this script: rows with tools",
}
# Companions of one script only.
ONE_SCRIPTS = {"chat_turns.py": "run_clm_instruct.py", "cpu_dropout.py": "run_summarization.py"}


@pytest.fixture(scope="module")
def commands(work, place) -> dict[str, list]:
    """Each training script's data and model."""
    lengths = ["--max_source_length", "64", "--max_target_length", "12"]
    rows = ["--train_file", place / "train.jsonl", "--prompt_template", "dolly", "--max_seq_length", "256"]
    return {
        "run_summarization.py": [
            "--model_name_or_path",
            work / "tiny-t5",
            "--train_file",
            work / "train.csv",
            *lengths,
        ],
        "run_clm_instruct.py": ["--model_name_or_path", place / "tiny-llama", *rows],
    }


def copy(name: str, folder: Path, without: tuple = COMPANIONS) -> Path:
    """The script in a folder with its companions but for those left out."""
    folder.mkdir(exist_ok=True)
    there = [companion for companion in COMPANIONS if companion not in without]
    for part in (name, *there, *(OF_GUARDS if "guards.py" in there else [])):
        shutil.copy(ROOT / part, folder)
    return folder / name


def train(script: Path, words: list, out: Path, way: str = "one process") -> tuple[list[float], str]:
    """The loss of every step, and what was printed."""
    rows, steps, config = WAYS[way]
    cut = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps, "--output_dir", out]
    zero = ["--deepspeed", ROOT / "ds_configs" / config] if config else []
    done = run_warm(script, *SGD, *words, *cut, *zero, cwd=out.parent, ranks=2 if config else 0, port=29585)
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], done.stdout


@pytest.fixture(scope="module", params=["run_summarization.py", "run_clm_instruct.py"])
def together(request, commands, tmp_path_factory) -> dict:
    """A script in its place, with all companions, on one process and padded."""
    folder = tmp_path_factory.mktemp("together")
    words = commands[request.param]
    losses, printed = train(ROOT / request.param, [*words, "--packing", "false"], folder / "out")
    return {"name": request.param, "words": words, "losses": losses, "printed": printed, "out": folder / "out"}


@pytest.mark.parametrize("way", WAYS)
def test_alone_in_an_empty_folder_it_has_the_losses_and_weights_of_the_script_with_all_companions(
    together, tmp_path, way
):
    losses, printed = train(copy(together["name"], tmp_path), together["words"], tmp_path / "out", way)
    assert len(losses) == 12 and losses[-1] < losses[0]
    assert losses == pytest.approx(together["losses"], rel=1e-6)
    for companion, sentence in SENTENCES.items():
        assert printed.count(sentence) == (ONE_SCRIPTS.get(companion, together["name"]) == together["name"])
        assert sentence not in together["printed"]
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "out", together["out"]))
    assert set(theirs) <= set(ours)  # under ZeRO tied weights are saved once for each of their names
    for name, weights in theirs.items():
        torch.testing.assert_close(ours[name], weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("absent", COMPANIONS)
def test_each_absence_is_one_sentence_and_changes_no_loss(together, tmp_path, absent):
    if ONE_SCRIPTS.get(absent, together["name"]) != together["name"]:
        pytest.skip(f"{together['name']} does not use {absent}")
    words = [*together["words"], "--max_steps", "3"]
    losses, printed = train(copy(together["name"], tmp_path, (absent,)), words, tmp_path / "out")
    assert losses == pytest.approx(together["losses"][:3], rel=1e-6)
    for companion, sentence in SENTENCES.items():
        assert printed.count(sentence) == (companion == absent)
    assert (tmp_path / "out/training_curves.png").exists() == (absent != "guards.py")


@pytest.mark.parametrize(
    "flags, absent",
    [
        (["--packing"], "fast_batches.py"),
        (["--pure_bf16", "--optim", "adafactor"], "zero_adafactor.py"),
        (["--optim", "adafactor", "--optim_args", "step_in_backward=true"], "zero_adafactor.py"),
    ],
)
def test_a_flag_that_needs_an_absent_companion_is_refused_with_the_files_name(together, tmp_path, flags, absent):
    script = copy(together["name"], tmp_path, (absent,))
    words = ["--do_train", "--output_dir", tmp_path / "out", *together["words"], *flags]
    done = run_warm(script, *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and f"needs {absent}; copy it beside this script" in done.stdout
    assert "Traceback" not in done.stdout and not (tmp_path / "out").exists()
