# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tools that are killed at any step of their writing: the same command ends as if nobody had (kill_points.py)."""

import json
import sys

import pytest

from conftest import ROOT, make_instructions, make_rows, run, run_warm, write_csv, write_jsonl

# Script: (its words, words that make it another command, which is refused).
TABLES = {
    "data_prep/make_sample_reviews.py": ("--num_reviews 40 --output_file made/new/a.tsv", "--seed 7"),
    "data_prep/prepare_reviews.py": ("--input_file train.csv --output_dir made/data", "--seed 7"),
    "data_prep/prepare_instruct.py": ("--input_file train.jsonl --output_dir made/data", "--seed 7"),
    "data_prep/encode_labels.py": (
        "--input_file train.csv --validation_file train.csv --label_column product_id --output_dir made/data",
        "--label_column review_headline",
    ),
    "tools/copy_script.py": ("--script data_prep/prepare_instruct.py --to made", ""),
}
MODELS = {
    "data_prep/measure_dataset.py": (
        "--train_file train.csv --model_name_or_path t5 --output_dir made/report --shown_rows 1",
        "--seed 7",
    ),
    "tools/init_model.py": ("--train_file train.csv --vocab_size 300 --output_dir made/model", "--seed 7"),
    "run_generation.py": (
        "--model_name_or_path t5 --input_file train.csv --output_file made/new/out.csv --max_new_tokens 4"
        " --max_tokens_per_batch 300",
        "--num_beams 2",
    ),
}


def make_words(script: str, every: int, words: str, other: str) -> list:
    return [ROOT / "tests/kill_points.py", ROOT / script, every, json.dumps(other.split()), *words.split()]


@pytest.fixture
def folder(tmp_path):
    write_csv(tmp_path / "train.csv", make_rows(40, 1))
    write_jsonl(tmp_path / "train.jsonl", make_instructions(40, 1))
    return tmp_path


@pytest.mark.parametrize("script", TABLES)
def test_a_tool_killed_at_any_step_ends_by_the_same_command(script, folder):
    done = run([sys.executable, *make_words(script, 1, *TABLES[script])], cwd=folder)  # a small process forks faster
    assert int(done.stdout.split()[-2]) >= 10


# run_generation.py at each step; the others, which take seconds a run, at some.
@pytest.mark.parametrize("script, every", zip(MODELS, (9, 6, 1), strict=True))
def test_a_tool_with_a_model_killed_at_a_step_ends_by_the_same_command(script, every, folder, work):
    (folder / "t5").symlink_to(work / "tiny-t5")
    done = run_warm(*make_words(script, every, *MODELS[script]), cwd=folder)
    assert int(done.stdout.split()[-2]) >= (3 if every > 1 else 20)
