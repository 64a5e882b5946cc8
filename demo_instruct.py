#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Instruction tuning in a few minutes, offline, on a laptop: `make demo-instruct`.

Questions and answers are made here; data_prep/prepare_instruct.py cleans and splits them, a tiny Llama with random
weights is made, run_clm_instruct.py trains it on packed rows, and the share of held-out questions answered word for
word, and stopped at, is printed. Exit code 1 if that is less than a third.
"""

import itertools
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path("demo_instruct")
COLOURS = ("red", "blue", "green", "black", "white", "grey", "brown", "yellow")
THINGS = ("lens", "strap", "battery", "tripod", "flash", "charger", "bag", "filter")
ASKS = (
    ("Write the words in reverse order.", lambda words: " ".join(reversed(words))),
    ("Write the words in capitals.", lambda words: " ".join(words).upper()),
    ("How many words are there?", lambda words: f"There are {len(words)} words."),
    ("Which word comes first?", lambda words: f"The first word is {words[0]}."),
    ("Which word comes last?", lambda words: f"The last word is {words[-1]}."),
)


def run(*command: str) -> None:
    """Echo a command and run it; ends the demo with its exit code if it fails."""
    print(f"\n$ {' '.join(command)}", flush=True)
    code = subprocess.run(command).returncode
    if code != 0:
        sys.exit(code)


def make_questions(seed: int) -> list[dict]:
    """Rows of instruction, context and response: five tasks on phrases of two to four words."""
    dice, rows = random.Random(seed), []
    for colour, thing, (ask, answer) in itertools.product(COLOURS, THINGS, ASKS):
        for extra in range(3):
            words = [*dice.sample(COLOURS, extra), colour, thing]
            dice.shuffle(words)
            rows.append({"instruction": ask, "context": " ".join(words), "response": answer(words)})
    return rows


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    python, data, model, out = sys.executable, FOLDER / "data", FOLDER / "tiny-llama", FOLDER / "out"
    questions = FOLDER / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in make_questions(1)), encoding="utf-8")
    run(python, "data_prep/prepare_instruct.py", "--input_file", str(questions), "--output_dir", str(data))
    run(python, "tools/init_model.py", "--architecture", "llama", "--preset", "tiny",
        "--train_file", str(data / "train.jsonl"), "--vocab_size", "400", "--output_dir", str(model))  # fmt: skip
    run(python, "run_clm_instruct.py", "--model_name_or_path", str(model), "--do_train", "--do_eval",
        "--train_file", str(data / "train.jsonl"), "--validation_file", str(data / "validation.jsonl"),
        "--prompt_template", "plain", "--max_seq_length", "128", "--packing", "--output_dir", str(out),
        "--learning_rate", "3e-3", "--num_train_epochs", "40", "--per_device_train_batch_size", "8",
        "--per_device_eval_batch_size", "32", "--predict_with_generate", "--max_new_tokens", "32",
        "--logging_steps", "50", "--save_strategy", "no")  # fmt: skip

    rows = [json.loads(line) for line in open(out / "generated_predictions.jsonl", encoding="utf-8")]
    right = sum(row["prediction"] == row["reference"] for row in rows)
    results = json.loads((out / "all_results.json").read_text())
    print(f"\nHeld-out questions: {len(rows)}; answered word for word: {right} ({right / len(rows):.0%}); ")
    print(f"answers that ended by themselves: {results['eval_stopped']:.0%}; curves: {out / 'training_curves.png'}")
    for row in rows[:5]:
        print(f"  {' '.join(row['source'].split())}\n    wanted: {row['reference']}\n    answer: {row['prediction']}")
    if right * 3 < len(rows):
        sys.exit("fewer than a third of the held-out questions are answered")


if __name__ == "__main__":
    main()
