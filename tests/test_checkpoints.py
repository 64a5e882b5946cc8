# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""checkpoints.py: what is whole, what a run was asked for, and who works in its folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

import checkpoints
import run_clm_instruct
import run_summarization
from conftest import ROOT, make_environment, run_warm

SCRIPT = ROOT / "run_summarization.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, work) -> Path:
    """A folder `out` of a run of six steps with checkpoints at 2, 4 and 6, and beside it `flags.json`, its flags."""
    folder = tmp_path_factory.mktemp("finished")
    run_warm(SCRIPT, *make_flags(work), "--output_dir", folder / "out", cwd=folder)
    return folder


def make_flags(work: Path) -> list:
    flags = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--do_eval", "--train_file", work / "train.csv"]
    flags += ["--validation_file", work / "validation.csv", "--max_steps", "6", "--save_steps", "2", "--logging_steps"]
    flags += ["2", "--optim", "adafactor", "--learning_rate", "1e-2", "--per_device_train_batch_size", "16"]
    return [*flags, "--lr_scheduler_type", "constant", "--max_target_length", "12", "--predict_with_generate"]


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path / "out"


def start(work: Path, out: Path, *more, script=SCRIPT, **how):
    return run_warm(script, *make_flags(work), "--output_dir", out, *more, cwd=out.parent, **how)


def read_results(folder: Path) -> dict:
    """What must be equal between two runs: weights, texts, and the history but for its times."""
    state = json.loads((folder / "trainer_state.json").read_text())
    timed = ("_runtime", "_per_second", "total_flos")
    history = [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in state["log_history"]]
    names = ("model.safetensors", "generated_predictions.jsonl", "generation_config.json", "config.json")
    return {"history": history, "step": state["global_step"]} | {n: (folder / n).read_bytes() for n in names}


# ------------------------------------------------------------------------------------------------ what is whole


def test_every_file_of_a_checkpoint_is_missed_when_it_is_gone_empty_halved_or_a_bit_is_flipped(copied):
    checkpoint = copied / "checkpoint-6"
    assert checkpoints.explain_incomplete(checkpoint) is None
    paths = [path for path in checkpoint.iterdir() if path.is_file()]
    assert len(paths) > 8
    for path in paths:
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 4
        for damage in (None, b"", whole[: len(whole) // 2], bytes(flipped)):
            path.unlink() if damage is None else path.write_bytes(damage)
            assert checkpoints.explain_incomplete(checkpoint), (path.name, damage and len(damage))
            path.write_bytes(whole)
    assert checkpoints.explain_incomplete(checkpoint) is None


def test_a_saved_model_may_be_read_by_whom_the_umask_lets(finished, tmp_path):
    assert (finished / "out/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~read_umask()
    assert (finished / "out/checkpoint-4/model.safetensors").stat().st_mode & 0o777 == 0o666 & ~read_umask()
    for name, mode in {"a": 0o600, "b": 0o400, "c": 0o644}.items():
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    old = os.umask(0o027)
    try:
        checkpoints.set_modes(tmp_path)
    finally:
        os.umask(old)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in "abc"] == [0o640, 0o400, 0o644]


def read_umask() -> int:
    os.umask(umask := os.umask(0))
    return umask


def test_a_torn_file_shows_in_a_checkpoint_without_a_marker(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    explain = checkpoints.explain_unmarked
    assert "trainer_state.json" in explain(folder)
    (folder / "trainer_state.json").write_text("{}")
    save_file({"a": torch.ones(1000)}, folder / "model.safetensors")
    for name in ("optimizer", "scheduler"):
        assert f"the {name}'s state is missing" in explain(folder)
        torch.save({"a": torch.ones(1000)}, folder / f"{name}.pt")
    assert "the random state is missing" in explain(folder)
    torch.save({"a": torch.ones(1000)}, folder / "rng_state.pth")
    assert explain(folder) is None
    for name in ("optimizer.pt", "model.safetensors"):
        whole = (folder / name).read_bytes()
        for torn in (whole[:-100], b""):
            (folder / name).write_bytes(torn)
            assert f"{name} is torn" in explain(folder)
        (folder / name).write_bytes(whole)


def test_a_damaged_checkpoint_is_passed_over_for_the_older_whole_one_and_the_end_is_the_same(finished, copied, work):
    (copied / "complete.json").unlink()  # killed in the aftermath
    content = bytearray((copied / "checkpoint-6/optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "checkpoint-6/optimizer.pt").write_bytes(content)
    (copied / "checkpoint-4/complete.json").unlink()
    printed = start(work, copied).stdout
    assert f"Passing over {copied}/checkpoint-6: optimizer.pt is damaged" in printed
    assert f"Passing over {copied}/checkpoint-4: complete.json, which is written last, is missing" in printed
    assert f"going on from {copied}/checkpoint-2" in printed
    assert read_results(copied) == read_results(finished / "out")
    assert [p.name for p in checkpoints.list_checkpoints(copied)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert all(checkpoints.explain_incomplete(p) is None for p in [copied, *checkpoints.list_checkpoints(copied)])


# ------------------------------------------------------------------------------------------------ the end


@pytest.mark.parametrize("lost", [["complete.json"], ["complete.json", "model.safetensors", "trainer_state.json"]])
def test_a_run_killed_after_its_last_step_trains_nothing_more(finished, copied, work, lost):
    for name in lost:
        (copied / name).unlink()
    (copied / "all_results.json").write_text('{"torn": ')
    printed = start(work, copied).stdout
    assert f"going on from {copied}/checkpoint-6" in printed
    assert read_results(copied) == read_results(finished / "out")


def test_a_finished_run_started_again_changes_nothing_and_ends_well(finished, copied, work):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file() and path.name != ".lock"}
    printed = start(work, copied, "--logging_steps", "1").stdout
    assert f"{copied} holds this run, finished; more --num_train_epochs or --max_steps go on with it" in printed
    assert {p: p.stat().st_mtime_ns for p in copied.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_more_steps_go_on_with_the_history_kept_and_end_as_if_asked_for_at_once(copied, work):
    printed = start(work, copied, "--max_steps", "9", "--logging_steps", "3").stdout
    assert f"--output_dir {copied}: --max_steps was 6, is 9" in printed
    start(work, copied.with_name("at_once"), "--max_steps", "9")
    weights = [(f / "model.safetensors").read_bytes() for f in (copied, copied.with_name("at_once"))]
    assert weights[0] == weights[1]
    history = json.loads((copied / "trainer_state.json").read_text())["log_history"]
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert steps == [2, 4, 6, 8, 9]  # the new --logging_steps takes effect; all is logged by every checkpoint


def test_another_validation_file_is_evaluated_on_the_finished_weights(copied, work):
    weights = (copied / "model.safetensors").read_bytes()
    start(work, copied, "--validation_file", work / "train.csv")
    assert json.loads((copied / "eval_results.json").read_text())["eval_samples"] == 90
    assert (copied / "model.safetensors").read_bytes() == weights


def test_a_finished_run_without_checkpoints_is_not_gone_on_with(work, tmp_path):
    flags = ("--save_strategy", "no", "--max_steps", "1")
    start(work, tmp_path / "out", *flags)
    assert "holds this run, finished" in start(work, tmp_path / "out", *flags).stdout
    refused = start(work, tmp_path / "out", "--save_strategy", "no", "--max_steps", "2", check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert "holds a finished run and no whole checkpoint to go on from" in refused.stdout


def test_a_mixture_of_experts_goes_on_with_its_experts_and_ends_with_the_best_ones(place, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": len(tokenizer)}
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    MixtralForCausalLM(MixtralConfig(**shape, **tokens)).save_pretrained(tmp_path / "mixtral")
    tokenizer.save_pretrained(tmp_path / "mixtral")
    words = ["--model_name_or_path", tmp_path / "mixtral", "--do_train", "--train_file", place / "train.jsonl"]
    words += ["--validation_file", place / "validation.jsonl", "--do_eval", "--eval_strategy", "steps", "--eval_steps"]
    words += ["2", "--prompt_template", "dolly", "--skip_audit", "--max_seq_length", "256", "--save_steps", "2"]
    words += ["--lr_scheduler_type", "constant", "--per_device_train_batch_size", "4", "--load_best_model_at_end"]
    for name, rate, steps in (
        ("whole", "1e-2", "6"),
        ("cut", "1e-2", "4"),
        ("cut", "1e-2", "6"),
        ("worse", "0.5", "4"),
    ):
        more = ("--learning_rate", rate, "--max_steps", steps, "--output_dir", name)
        printed = run_warm(ROOT / "run_clm_instruct.py", *words, *more, cwd=tmp_path).stdout
        assert "missing keys" not in printed
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert len(whole) > 20 and all(torch.equal(weights, cut[name]) for name, weights in whole.items())
    best = json.loads((tmp_path / "worse/trainer_state.json").read_text())["best_model_checkpoint"]
    assert Path(best).name == "checkpoint-2"
    best, last = (load_file(tmp_path / name / "model.safetensors") for name in (best, "worse"))
    assert all(torch.equal(weights, last[name]) for name, weights in best.items())


# ------------------------------------------------------------------------------------------------ what decides


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--learning_rate", "2e-2"], "learning_rate was 0.01, is 0.02"),
        (["--seed", "7"], "seed was 42, is 7"),
        (["--max_target_length", "9"], "max_target_length was 12, is 9"),
        (["--source_prefix", "x: "], "source_prefix was None, is 'x: '"),
        (["--gradient_accumulation_steps", "2"], "effective batch was 16, is 32"),
        (["--label_smoothing_factor", "0.1"], "label_smoothing_factor was 0.0, is 0.1"),
        (["--optim", "adamw_torch"], "optim was 'adafactor', is 'adamw_torch'"),
        (["--train_file", "VALIDATION"], "the training file's content differs"),
        (["--model_name_or_path", "OUT"], "the model's files differ"),
        (["--tokenizer_name", "OUT"], "the tokenizer's files differ"),
    ],
)
def test_what_decides_the_weights_may_not_change_on_the_way(flags, said, copied, work):
    (copied / "complete.json").unlink()
    places = {"VALIDATION": work / "validation.csv", "OUT": copied}
    refused = start(work, copied, *(places.get(flag, flag) for flag in flags), check=False)
    assert refused.returncode == 2 and "Traceback" not in refused.stdout
    assert f"error: --output_dir {copied}: {said}" in refused.stdout
    assert "give the values of before, or name another --output_dir to begin anew" in refused.stdout


def test_a_batch_cut_otherwise_goes_on_to_the_same_end(finished, copied, work):
    shutil.rmtree(copied / "checkpoint-6")
    (copied / "complete.json").unlink()
    start(work, copied, "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4")
    ours, other = (torch.load(f / "checkpoint-6/optimizer.pt")["state"] for f in (copied, finished / "out"))
    gap = max(float((ours[i][k] - v).abs().max()) for i in other for k, v in other[i].items() if torch.is_tensor(v))
    assert gap < 1e-5
    losses = [[e["loss"] for e in read_results(f)["history"] if "loss" in e] for f in (copied, finished / "out")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_every_flag_is_known_to_decide_or_not():
    """A flag of a later library decides, until it is listed: better refused than silently different."""
    for classes in (run_summarization.SUMMARIZATION_ARGUMENTS, run_clm_instruct.INSTRUCT_ARGUMENTS):
        names = {name for cls in classes for name in cls.__dataclass_fields__}
        free = {n for n in names if n in checkpoints.FREE or n.startswith(checkpoints.FREE_BEGINNINGS)}
        decides = names - free - {*checkpoints.AT_THE_END}
        assert {"learning_rate", "seed", "optim", "bf16", "dataloader_drop_last", "neftune_noise_alpha"} <= decides
        assert {"logging_steps", "save_steps", "eval_steps", "hub_token", "token", "deepspeed"} <= free
    assert {"lora_r", "packing", "max_seq_length", "data_format"} <= decides


def test_damaged_settings_are_as_none_and_a_token_is_never_among_them(copied):
    settings = checkpoints.read_settings(copied)["settings"]
    assert not {"token", "hub_token"} & {*settings}
    path = copied / "run.json"
    path.write_text(path.read_text().replace('"seed": 42', '"seed": 43'))
    assert checkpoints.read_settings(copied) is None


# ------------------------------------------------------------------------------------------------ the folder


def test_a_folder_is_new_or_empty_or_a_trainings_own(tmp_path):
    args = SimpleNamespace(output_dir=tmp_path, do_train=True, resume_from_checkpoint=None)
    (tmp_path / "runs").mkdir()
    assert checkpoints.find_problems(args) == []
    (tmp_path / "all_results.json").write_text("{}")
    assert "holds something else (all_results.json)" in checkpoints.find_problems(args)[0]
    (tmp_path / "checkpoint-3").mkdir()
    assert checkpoints.find_problems(args) == []
    (tmp_path / "trainer_state.json").write_text("{}")  # a run's end, of a version without run.json
    assert "holds a finished run" in checkpoints.find_problems(args)[0]
    (tmp_path / "run.json").write_text("{}")
    assert checkpoints.find_problems(args) == []
    args.output_dir = tmp_path / "run.json" / "out"
    assert "run.json is a file" in checkpoints.find_problems(args)[0]


def test_a_folder_at_work_is_locked_and_the_lock_of_the_dead_is_taken_over(work, tmp_path):
    command = [sys.executable, SCRIPT, *make_flags(work), "--max_steps", "2000", "--output_dir", tmp_path / "out"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": make_environment()}
    process = subprocess.Popen([str(word) for word in command], cwd=tmp_path, **silent)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out/checkpoint-2/complete.json").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        refused = start(work, tmp_path / "out", "--max_steps", "2000", check=False)
        assert refused.returncode == 2
        assert f"another run works in it (process {process.pid} on " in refused.stdout
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    step = int(checkpoints.list_checkpoints(tmp_path / "out")[-1].name.split("-")[-1])
    printed = start(work, tmp_path / "out", "--max_steps", str(step + 1)).stdout
    assert "going on from" in printed


def test_without_it_a_run_trains_the_same_and_says_what_is_lost(finished, work, tmp_path):
    script = tmp_path / SCRIPT.name
    for name in (
        "guards.py",
        "fast_batches.py",
        "cpu_dropout.py",
        "zero_adafactor.py",
        "reports.py",
        "tables.py",
        "model_checks.py",
    ):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copy(SCRIPT, script)
    printed = start(work, tmp_path / "out", script=script).stdout
    assert printed.count("checkpoints.py is not beside guards.py: a killed run goes on only with") == 1
    assert read_results(tmp_path / "out") == read_results(finished / "out")
    assert not (tmp_path / "out/run.json").exists()
