# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmarks run and their tables say what they measured; no time is asserted."""

import json
import sys

import pytest

from conftest import ROOT, run, run_warm


@pytest.mark.slow
def test_the_memory_table_has_factored_state_for_zero_adafactor_alone(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/adafactor_memory.py", "--shape", "tiny", "--ranks", "2"]
    printed = run([*command, "--stages", "2", "--steps", "3"], cwd=tmp_path).stdout
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("| ")
    ]
    rows = {row[0]: row[1:] for row in cells[1:]}
    assert rows["Adafactor"][2] == "4.000" and rows["AdamW"][2] == "8.000"
    assert float(rows["ZeroAdafactor"][2]) < 0.3
    assert float(rows["ZeroAdafactor"][5]) < 1e-6 < 1e-3 < float(rows["Adafactor"][5])


@pytest.mark.slow
def test_the_generation_table_has_both_sides_with_the_same_texts(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/generation_speed.py", "--preset", "tiny", "--num_rows", "24"]
    printed = run([*command, "--rounds", "1", "--max_new_tokens", "6"], cwd=tmp_path).stdout
    ratios = json.loads(printed.splitlines()[-1])
    assert ratios["by eights, fp32"] == 1.0 and ratios["run_generation, fp32"] > 0
    line = next(line for line in printed.splitlines() if line.startswith("run_generation, fp32"))
    assert line.split()[-1] == "100.0%"


@pytest.mark.slow
def test_the_fit_runs_all_three_optimizers(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/adafactor_memory.py", "--fit", "tiny", "--rows", "1", "--steps", "2"]
    lines = run(command, cwd=tmp_path).stdout.splitlines()
    results = [json.loads(line[line.index("{") :]) for line in lines if "peak GB" in line]
    assert len(results) == 3 and all(result["step s"] > 0 for result in results)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_table_has_less_padding_and_the_loss_of_stock(tmp_path):
    command = [sys.executable, ROOT / "benchmarks/training_speed.py", "--preset", "tiny", "--rounds", "1"]
    command += ["--steps", "40", "--precisions", "fp32"]
    results = json.loads(run(command, cwd=tmp_path, timeout=880).stdout.splitlines()[-1])
    assert results["ours, fp32"]["real source"] > 0.9 > results["stock, fp32"]["real source"]
    assert results["ours, fp32"]["loss"] == pytest.approx(results["stock, fp32"]["loss"], rel=0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_training_table_says_what_each_side_ran_in_and_compares_with_another_checkout(work, tmp_path):
    command = [sys.executable, ROOT / "benchmarks/training_speed.py", "--rounds", "1", "--steps", "3"]
    command += ["--train_file", work / "train.csv", "--validation_file", work / "validation.csv"]
    command += ["--model_name_or_path", work / "tiny-t5", "--sides", "before", "ours", "--before", ROOT]
    results = json.loads(run(command, cwd=tmp_path, timeout=880).stdout.splitlines()[-1])
    assert list(results) == [f"{side}, {p}" for p in ("defaults", "fp32", "bf16") for side in ("before", "ours")]
    by_default = "fp32"  # conftest.py sets ACCELERATE_MIXED_PRECISION
    assert [line["ran in"] for line in results.values()] == [by_default] * 2 + ["fp32"] * 2 + ["bf16"] * 2
    assert results["ours, fp32"]["loss"] == results["before, fp32"]["loss"] != results["ours, bf16"]["loss"]


@pytest.mark.slow
def test_the_instruct_table_has_full_rows(tmp_path):
    rows = [{"instruction": f"Say {i}.", "context": "", "response": f"{i} " * (1 + i % 7)} for i in range(400)]
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, ROOT / "benchmarks/instruct_speed.py", "--preset", "tiny", "--rounds", "1"]
    command += ["--train_file", "train.jsonl", "--validation_file", "validation.jsonl", "--sides", "trainer", "ours"]
    command += ["--steps", "3", "--max_seq_length", "128", "--precisions", "fp32"]
    results = json.loads(run(command, cwd=tmp_path).stdout.splitlines()[-1])
    assert results["ours, fp32"]["real"] > 0.9 > results["trainer, fp32"]["real"]


def test_the_start_up_table_names_what_main_calls_and_ends_after_the_first_step(work, tmp_path):
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    words = [ROOT / "run_summarization.py", *words, "--output_dir", tmp_path / "out"]
    printed = run_warm(ROOT / "benchmarks/start_up.py", *words, cwd=tmp_path).stdout
    rows = [line.rsplit(maxsplit=3) for line in printed.splitlines() if line.endswith("%") and " s " in line]
    seconds = {name.strip(): float(value) for name, value, _, _ in rows}
    assert {"import torch", "load_model", "prepare_split", "first step", "all"} < set(seconds)
    assert "find_companion_problems" not in seconds  # called by parse_arguments, and counted there
    assert -0.05 < seconds["the rest"] < seconds["all"]  # nothing is counted twice
    assert not (tmp_path / "out/model.safetensors").exists()


def test_what_vouching_for_checkpoints_costs_is_told_in_five_lines(work, tmp_path):
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    words = [ROOT / "run_summarization.py", *words, "--max_steps", "2", "--save_steps", "1", "--output_dir", "out"]
    printed = run_warm(ROOT / "benchmarks/checkpoint_cost.py", *words, cwd=tmp_path).stdout
    found = dict(line.removesuffix(" s").rsplit(maxsplit=1) for line in printed.splitlines()[-5:])
    saving, added = float(found["the trainer saves one"]), float(found["checkpoints.py adds"])
    assert found["checkpoints"] == "2" and added > 0 and float(found["at the start checkpoints.py takes"]) > 0
    assert float(found["ratio"]) == pytest.approx(1 + added / saving, rel=0.1)


def test_latency_is_measured_row_by_row(trained, work, tmp_path):
    words = ["--model_name_or_path", trained, "--input_file", work / "validation.csv", "--max_new_tokens", "4"]
    done = run_warm(ROOT / "benchmarks/latency.py", *words, "--num_rows", "6", "--json", "t.json", cwd=tmp_path)
    results = json.loads((tmp_path / "t.json").read_text())
    assert results["rows"] == 6 and 0 < results["p50_ms"] <= results["p95_ms"] <= results["p99_ms"]
    assert results["tokens_per_second"] > 0 and 0.1 < results["peak_memory_gb"] < 20
    assert ["p50_ms", str(results["p50_ms"])] in [line.split() for line in done.stdout.splitlines()]
    words = ["--model_name_or_path", trained, "--input_file", "none.csv"]
    refused = run_warm(ROOT / "benchmarks/latency.py", *words, cwd=tmp_path, check=False)
    assert refused.returncode == 1 and "Traceback" not in refused.stdout
