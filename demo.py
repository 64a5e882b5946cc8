#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The whole road in a few minutes, offline, on a laptop: `make demo`.

Synthetic reviews (made here, not real ones) are cleaned and split, a tiny T5 with random weights is made, `deepspeed`
trains it with ds_configs/zero3.json on the GPUs that are there or on two CPU processes, and ROUGE before and after is
printed next to the lead baseline: the review's first words. Exit code 1 if the trained model does not beat it.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from run_summarization import compute_rouge

FOLDER = Path("demo")
NAMES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def run(*command: str) -> None:
    """Echo a command and run it; ends the demo with its exit code if it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    code = subprocess.run(command).returncode
    if code != 0:
        sys.exit(code)


def score_lead(rows: list[dict]) -> dict[str, float]:
    """ROUGE of the review's first words, as many as a mean headline has, against the headline."""
    words = round(sum(len(row["reference"].split()) for row in rows) / len(rows))
    leads = [" ".join(row["source"].split()[:words]) for row in rows]
    return compute_rouge(leads, [row["reference"] for row in rows], "en")


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    python, data, model, out = sys.executable, FOLDER / "data", FOLDER / "tiny-t5", FOLDER / "out"
    reviews = FOLDER / "synthetic_reviews.tsv"
    run(python, "data_prep/make_sample_reviews.py", "--num_reviews", "4000", "--output_file", str(reviews))
    run(python, "data_prep/prepare_reviews.py", "--input_file", str(reviews), "--output_dir", str(data),
        "--drop_star_headlines", "--validation_fraction", "0.05")  # fmt: skip
    run(python, "tools/init_model.py", "--preset", "tiny", "--train_file", str(data / "train.csv"),
        "--text_columns", "review_body", "review_headline", "--output_dir", str(model))  # fmt: skip
    on_gpu = torch.cuda.is_available()
    ranks = [] if on_gpu else ["--num_gpus", "2"]  # the launcher's word for processes
    bf16 = ["--bf16"] if on_gpu else []  # matrices this small gain nothing from it on a CPU
    run("deepspeed", *ranks, "run_summarization.py", "--deepspeed", "ds_configs/zero3.json",
        "--model_name_or_path", str(model), "--do_train", "--do_eval",
        "--train_file", str(data / "train.csv"), "--validation_file", str(data / "validation.csv"),
        "--source_prefix", "summarize: ", "--output_dir", str(out), "--optim", "adafactor", "--learning_rate", "3e-3",
        *bf16, "--max_steps", "300", "--logging_steps", "10", "--eval_on_start", "--predict_with_generate",
        "--per_device_train_batch_size", "16", "--per_device_eval_batch_size", "64",
        "--max_source_length", "96", "--max_target_length", "24", "--save_strategy", "no")  # fmt: skip

    rows = [json.loads(line) for line in open(out / "generated_predictions.jsonl", encoding="utf-8")]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    before = next(entry for entry in history if "eval_rouge1" in entry)
    after = json.loads((out / "all_results.json").read_text())
    lead = score_lead(rows)
    print("\nSynthetic reviews, tiny T5 from random weights:")
    print(f"{'':>22}" + "".join(f"{name:>11}" for name in NAMES))
    for title, scores in (("model before training", {n: before[f"eval_{n}"] for n in NAMES}), ("lead baseline", lead),
                          ("model after training", {n: after[f"eval_{n}"] for n in NAMES})):  # fmt: skip
        print(f"{title:>22}" + "".join(f"{scores[name]:>11.2f}" for name in NAMES))
    print("\nFive summaries:")
    for row in rows[:5]:
        print(f"  review:   {row['source'][:110]}\n  headline: {row['reference']}\n  summary:  {row['prediction']}\n")
    print(f"curves: {out / 'training_curves.png'}   all summaries: {out / 'generated_predictions.jsonl'}")
    if after["eval_rougeL"] <= lead["rougeL"]:
        sys.exit("the trained model does not beat the lead baseline")


if __name__ == "__main__":
    main()
