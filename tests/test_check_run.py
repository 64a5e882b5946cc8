# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""check_run.py finds what is wrong with a script, by the check that names it, and nothing on one that is right."""

import functools
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import check_run
from conftest import ROOT, make_environment, run, run_warm

CASES = ROOT / "tests/check_run_cases"
DS_CONFIGS = ["zero2.json", "zero2_offload.json", "zero3.json", "zero3_offload.json", "zero3_offload_adamw.json"]
IN_ONE = ("repeatable", "labels", "prompts", "batch cut", "packing", "padding side", "position ids", "evaluation")
IN_ONE += ("dropout and eval mode", "tied weights", "frozen parameters", "gradients", "precision")


def mark_slow_but(quick: str) -> list:
    return [pytest.param(name, marks=[] if name == quick else [pytest.mark.slow]) for name in DS_CONFIGS]


def skip_all_but(*names: str) -> list[str]:
    return ["--skip", ",".join(name for name in check_run.NAMES if name not in names)]


def check(folder: Path, script: Path, *words, flags=(), code: int | None = None) -> dict[str, dict]:
    """The checks by name; folder: an empty one, in which check_run.py runs and writes."""
    done = run_warm(ROOT / "check_run.py", *flags, script, *words, "--output_dir", "mine", cwd=folder, check=False)
    assert code is None or done.returncode == code, done.stdout[-6000:]
    assert sorted(path.name for path in folder.iterdir()) == ["check_run.html", "check_run.json"], done.stdout[-6000:]
    report = json.loads((folder / "check_run.json").read_text())
    assert done.returncode == any(c["status"] == "fails" for c in report["checks"])
    return {one["name"]: one for one in report["checks"]}


def find(checks: dict, status: str) -> list[str]:
    return [name for name, one in checks.items() if one["status"] == status]


@pytest.fixture(scope="module")
def causal(place, tmp_path_factory):
    """causal.py in one of its ways, checked."""

    @functools.cache
    def in_way(way: str, *names: str, seed: int = 0, folder: Path | None = None) -> dict:
        words = ["--model_name_or_path", folder or place / "tiny-llama", "--train_file", place / "train.jsonl"]
        words += ["--way", way]
        flags = [*(skip_all_but(*names) if names else []), "--seed", seed]
        return check(tmp_path_factory.mktemp(way), CASES / "causal.py", *words, flags=flags)

    return in_way


@pytest.fixture(scope="module")
def stock(work, tmp_path_factory) -> dict:
    """A stock T5 script with Adafactor and ZeRO-2, all checks."""
    words = ["--model_name_or_path", work / "tiny-t5", "--train_file", work / "train.csv", "--optim", "adafactor"]
    words += ["--learning_rate", "1e-2", "--deepspeed", ROOT / "ds_configs/zero2.json"]
    return check(tmp_path_factory.mktemp("stock"), CASES / "stock_t5.py", *words)


# ------------------------------------------------------------------------------------------------ what it finds


def test_a_stock_t5s_loss_grows_with_accumulation_and_with_ranks(stock):
    cut, ranks, zero = (stock[name] for name in ("batch cut", "ranks", "ranks under DeepSpeed"))
    assert cut["status"] == ranks["status"] == zero["status"] == "fails"
    assert (
        cut["detail"].startswith("the loss is multiplied by the accumulation steps (3.9")
        and "2×2: loss 2.00×" in (cut["detail"])
    )
    assert "compute_loss_func" in cut["detail"]
    for one in (ranks, zero):
        assert one["detail"].startswith("the loss is multiplied by the number of processes (2.00×)")


def test_a_stock_adafactor_under_zero_2_is_found_to_be_none(stock):
    assert stock["optimizer"]["status"] == "fails"
    assert "is not Adafactor any more: factored states become full" in stock["optimizer"]["detail"]


def test_what_a_stock_t5_does_right_holds(stock):
    right = ("repeatable", "labels", "prompts", "padding side", "gradients", "tied weights", "resume", "precision")
    assert [stock[name]["status"] for name in right] == ["holds"] * len(right)
    assert find(stock, "not tried") == ["packing", "evaluation", "evaluation on ranks"]
    assert stock["dropout and eval mode"]["status"] == "holds"  # seen on rows of training
    assert "no evaluation set" in stock["evaluation"]["detail"]


def test_a_plain_correct_script_holds_in_all_that_can_be_tried(causal):
    checks = causal("plain")
    assert not find(checks, "fails")
    assert find(checks, "not tried") == ["packing", "ranks under DeepSpeed"]
    assert checks["labels"]["data"]["views"] and checks["batch cut"]["data"]["curves"]


def test_pad_as_eos_with_the_stock_collator_masks_the_stop(causal):
    checks = causal("eos", *IN_ONE)
    assert find(checks, "fails") == ["labels", "prompts"]
    assert checks["labels"]["detail"].startswith("the stop token has no label in 56 of 56 examples (rows 0, 1, 2")


def test_packing_on_sdpa_without_boundaries_leaks(causal):
    checks = causal("blocks", *IN_ONE)
    assert find(checks, "fails") == ["packing"]
    assert "packed examples see each other" in checks["packing"]["detail"] and checks["packing"]["figure"] > 0.1


def test_a_resume_that_reshuffles_is_found_with_its_step_and_row(causal):
    checks = causal("shuffle", "repeatable", "resume")
    assert find(checks, "fails") == ["resume"]
    assert re.search("trains on other rows, first at step 3, row [0-3] of its batch", checks["resume"]["detail"])


def test_a_fault_that_no_check_names_shows_as_a_difference(causal):
    checks = causal("unnamed", *IN_ONE)
    assert find(checks, "fails") == ["batch cut"]
    assert "the logged loss agrees, what is trained does not" in checks["batch cut"]["detail"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, names, failing, said",
    [
        ("forget", ["resume"], "resume", "the same rows, but the weights differ by "),
        ("means", ["batch cut"], "batch cut", "multiplied by the accumulation steps (4.00×); compute_loss_func is to"),
        ("shifted", IN_ONE, "labels", "are not their tokens: the model shifts them itself"),
        ("padded", ["labels"], "labels", "padding is trained on in rows 2, 5, "),
        ("cut", IN_ONE, "labels", "rows 15, 35, 55 have no prompt, or train on it, where the others do not"),
        ("left", ["padding side"], "padding side", "padding on the left changes a row's losses"),
        ("frozen", IN_ONE, "frozen parameters", "1 parameters are frozen and not trained: model.embed_tokens.weight"),
        ("unused", IN_ONE, "gradients", "1 parameters get no gradient in two steps: unused"),
        ("still", IN_ONE, "dropout and eval mode", "trains in eval mode: no dropout"),
        ("coarse", IN_ONE, "precision", "of an update arrives: the rest is rounded away"),
        ("swapped", ["evaluation on ranks", "evaluation"], "evaluation on ranks", "6 of 7 predictions are others'"),
    ],
)
def test_each_fault_is_found_by_the_check_that_names_it(way, names, failing, said, causal, folders):
    checks = causal(way, *names, folder=folders("gpt2") if way == "left" else None)
    assert said in checks[failing]["detail"]
    # a mean of batches' means, which is stock, is reported beside the predictions
    assert find(checks, "fails") == ["evaluation"] * (way == "swapped") + [failing]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    "words, said",
    [
        (["crash"], "crashes before it trains: RuntimeError: the moon is full"),
        (["input"], "asks for input, and nobody is there to answer"),
        (["nothing"], "uses no transformers.Trainer"),
        (["untrained"], "ends without calling Trainer.train(): it does not train"),
        (["flags", "--output_dir", "mine"], "takes no --output_dir: leave the flag out"),
        (["unshrinkable"], "OddConfig cannot be shrunk: "),
        (["sleep"], "over the time limit of 2 s"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_checked_is_one_sentence_with_the_last_lines_beneath(words, said, tmp_path):
    flags = ["--time_limit", 2] if words == ["sleep"] else []
    done = run_warm(ROOT / "check_run.py", *flags, CASES / "bad.py", *words, cwd=tmp_path, check=False)
    first, *lines = done.stdout.splitlines()
    assert done.returncode == 2 and first.startswith(f"error: {CASES}/bad.py {said}")
    assert len(lines) <= check_run.LAST_LINES and all(line.startswith("    ") for line in lines)
    if words == ["crash"]:
        assert lines[-1].endswith("RuntimeError: the moon is full")
    assert not list(tmp_path.iterdir())


def test_wrong_flags_are_all_named_at_once(tmp_path):
    words = ["--skip", "lables", "--steps", "3", "nowhere.py", "--any"]
    done = run_warm(ROOT / "check_run.py", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout.count("error: ") == 3
    assert "--skip lables: no such check" in done.stdout and "nowhere.py: no such file" in done.stdout


@pytest.mark.slow
def test_a_killed_check_takes_its_children_along_and_copied_alone_it_runs(tmp_path):
    for name in ("check_run.py", "check_run_shim.py"):
        shutil.copy(ROOT / name, tmp_path)
    words = [sys.executable, tmp_path / "check_run.py", CASES / "bad.py", "sleep"]
    started = subprocess.Popen([str(word) for word in words], cwd=tmp_path, env=make_environment())
    time.sleep(60)
    started.kill()
    started.wait()
    time.sleep(1)
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in processes
    done = run([sys.executable, tmp_path / "check_run.py", CASES / "bad.py", "crash"], cwd=tmp_path, check=False)
    assert done.returncode == 2 and "the moon is full" in done.stdout


# ------------------------------------------------------------------------------------------------ no false alarm


@pytest.mark.parametrize("name", mark_slow_but("zero3.json"))
def test_all_checks_hold_on_run_summarization(name, work, tmp_path):
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--do_eval", "--train_file", work / "train.csv"]
    words += ["--validation_file", work / "validation.csv", "--source_prefix", "summarize: "]
    words += ["--max_source_length", 64, "--max_target_length", 12, "--predict_with_generate", "--bf16"]
    words += [] if "adamw" in name else ["--optim", "adafactor"]
    checks = check(tmp_path, ROOT / "run_summarization.py", *words, "--deepspeed", ROOT / "ds_configs" / name, code=0)
    assert find(checks, "not tried") == []


@pytest.mark.parametrize("name", mark_slow_but("zero2.json"))
def test_all_checks_hold_on_run_clm_instruct(name, place, tmp_path):
    words = ["--model_name_or_path", place / "tiny-llama", "--do_train", "--do_eval", "--packing", "--bf16"]
    words += ["--train_file", place / "train.jsonl", "--validation_file", place / "validation.jsonl"]
    words += ["--prompt_template", "dolly", "--max_seq_length", 256, "--learning_rate", "1e-3"]
    words += [] if "adamw" in name else ["--optim", "adafactor"]
    checks = check(tmp_path, ROOT / "run_clm_instruct.py", *words, "--deepspeed", ROOT / "ds_configs" / name, code=0)
    assert find(checks, "not tried") == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_no_seed_gives_a_false_alarm(seed, causal):
    assert not find(causal("plain", seed=seed), "fails")


CAUSAL = ("llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral", "mixtral", "gpt2", "phi3", "olmo2")
SEQ2SEQ = ("t5", "bart", "mbart", "pegasus")


@pytest.fixture(scope="module")
def folders(work, place, tmp_path_factory):
    """A folder with a full-sized configuration of a type, without weights, and a tiny tokenizer."""

    def make(kind: str) -> Path:
        from transformers import CONFIG_MAPPING, AutoTokenizer

        folder = tmp_path_factory.mktemp(kind)
        tokenizer = AutoTokenizer.from_pretrained(work / "tiny-t5" if kind in SEQ2SEQ else place / "tiny-llama")
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        ids |= {"decoder_start_token_id": tokenizer.pad_token_id} if kind in SEQ2SEQ else {}
        CONFIG_MAPPING[kind](vocab_size=len(tokenizer), **ids).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAUSAL)
def test_no_causal_type_gives_a_false_alarm(kind, folders, place, tmp_path):
    words = ["--model_name_or_path", folders(kind), "--train_file", place / "train.jsonl"]
    checks = check(tmp_path, CASES / "causal.py", *words)
    assert find(checks, "not tried") == ["packing", "ranks under DeepSpeed"]
    if kind == "mixtral":  # true: the Trainer resumes without its experts (transformers 5.23)
        assert find(checks, "fails") == ["resume"] and "which are not loaded, with" in checks["resume"]["detail"]
    else:
        assert not find(checks, "fails")


@pytest.mark.slow
@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_no_encoder_decoder_type_gives_a_false_alarm(kind, folders, work, tmp_path):
    words = ["--model_name_or_path", folders(kind), "--do_train", "--train_file", work / "train.csv"]
    words += ["--max_source_length", 64, "--max_target_length", 12, "--do_eval", "--predict_with_generate"]
    words += ["--validation_file", work / "validation.csv"]
    # Without companions, which would check the weights.
    alone = shutil.copy(ROOT / "run_summarization.py", tmp_path.parent / f"{kind}.py")
    assert not find(check(tmp_path, Path(alone), *words), "fails")


@pytest.mark.slow
def test_of_a_script_of_trl_only_the_evaluation_depends_on_batches_and_ranks(place, tmp_path):
    words = ["--model_name_or_path", place / "tiny-llama", "--train_file", place / "train.jsonl"]
    checks = check(tmp_path, CASES / "trl_sft.py", *words, "--learning_rate", "1e-3")
    assert find(checks, "fails") == ["evaluation", "evaluation on ranks"]  # eval_loss is a mean of the batches' means
    assert find(checks, "not tried") == ["packing", "ranks under DeepSpeed"]
