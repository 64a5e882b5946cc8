# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/size_table.py: trains or takes each size, measures it once, and says in a sentence why one is left out."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

import size_table as tool
from conftest import ROOT, make_once, run

FLAGS = "--do_train --do_eval --source_prefix summarize: --max_source_length 64 --max_target_length 8".split()
FLAGS += "--predict_with_generate --optim adafactor --max_steps 3 --save_strategy no --use_cpu".split()


def call(folder: Path, sizes: list, *words, training=(), check=True):
    command = [sys.executable, ROOT / "tools/size_table.py", "--output_dir", folder, "--num_batches", "1"]
    command += ["--sizes", *sizes, *words]
    return run([*command, "--", *training] if training else command, cwd=folder.parent, check=check)


@pytest.fixture(scope="module")
def table(tmp_path_factory, work, trained) -> Path:
    """A folder in which three sizes were tabled: one that is trained, a finished run, and one that does not train."""
    return make_once(tmp_path_factory, "sizes", lambda folder: make_table(folder, work, trained)) / "out"


def make_table(folder: Path, work: Path, trained: Path) -> None:
    shutil.copytree(work / "tiny-t5", folder / "tiny")
    shutil.copytree(work / "tiny-t5", folder / "broken")
    (folder / "broken/model.safetensors").write_bytes(b"torn")
    tables = ["--train_file", work / "train.csv", "--validation_file", work / "validation.csv"]
    words = ["--price_per_hour", "36"]
    training = [*FLAGS, *tables]
    done = call(folder / "out", ["tiny", trained, "broken"], *words, training=training, check=False)
    assert done.returncode == 1, done.stdout
    (folder / "said.txt").write_text(done.stdout)
    (folder / "training.json").write_text(json.dumps([str(word) for word in training]))


def read(folder: Path) -> tuple[str, dict]:
    """What was said, and {title: cells} of size_table.md."""
    lines = (folder / "size_table.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return (folder.parent / "said.txt").read_text(), {title: texts for title, *texts in cells}


def test_a_size_is_trained_and_a_finished_run_is_taken_as_it_is(table, trained):
    said, cells = read(table)
    assert cells[""] == ["tiny", trained.name]
    assert (table / "tiny/complete.json").is_file() and not (table / trained.name).exists()
    lines = [line for line in said.splitlines() if re.match(r"\d/3 ", line)]
    assert [line.split(":")[0] for line in lines] == ["1/3 tiny", f"2/3 {trained}", "3/3 broken"]


def test_the_figures_are_those_of_the_run_and_the_costs_follow_from_them(table, trained):
    _, cells = read(table)
    results = json.loads((trained / "all_results.json").read_text())
    assert [cells[f"ROUGE-{k}"][1] for k in "12L"] == [f"{results[f'eval_rouge{k}']:.1f}" for k in "12L"]
    (mine,) = (json.loads(path.read_text()) for path in table.glob("tiny.json"))
    assert mine["many"]["rows"] == 32 and mine["one"]["rows"] == 1
    assert float(cells["cost, 1,000 rows"][0]) == pytest.approx(10 / mine["many"]["rows_per_second"], abs=1e-4)
    assert float(cells["cost, training"][0]) == pytest.approx(0.01 * mine["seconds"], abs=0.006)
    assert mine["training_gb"] > 0.1 and cells["memory, training (GB)"][1] == "–"


def test_a_training_that_fails_is_one_sentence_and_a_note_in_the_table(table):
    said, _ = read(table)
    (sentence,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert sentence.startswith("error: broken: run_summarization.py ended with code ") and "broken.log" in sentence
    assert "Traceback" not in said
    for name in tool.TABLES:
        assert "broken is missing: " in (table / name).read_text()


def test_the_page_shows_every_size_in_the_table_and_in_the_picture(table, trained):
    page = (table / "size_table.html").read_text()
    assert page.count("<circle") == 2 and "prefers-color-scheme: dark" in page
    assert all(f"<th>{name}" in page and f">{name}</text>" in page for name in ("tiny", trained.name))


def test_what_is_measured_is_not_measured_again_and_another_price_only_changes_costs(table, trained):
    training = json.loads((table.parent / "training.json").read_text())
    logs = [(path, path.read_text()) for path in table.glob("*.log")]
    again = call(table, ["tiny", trained], training=training)
    assert len(logs) == 3 and all(path.read_text() == text for path, text in logs)
    assert again.stdout.count("without costs") == 1 and "cost, training" not in read(table)[1]


def test_all_problems_are_said_at_once_and_nothing_is_written(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    words = ["--sizes", "t5-smal", "empty", "t5-base", "t5-base", "--output_dir", "out", "--price_per_hour", "-1"]
    assert tool.main([*words, "--num_batches", "0"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in said) and not (tmp_path / "out").exists()
    wanted = [
        "t5-smal: neither",
        "did you mean t5-small?",
        "empty: a folder without config.json",
        "t5-base: given twice",
    ]
    wanted += ["t5-base: neither", "give its folder", "--price_per_hour -1", "--num_batches 0", "--input_file: name"]
    wanted += ["no finished run; say after --"]
    for part in wanted:
        assert sum(part in line for line in said) >= 1, part


def test_another_s_table_is_not_overwritten(tmp_path, capsys, work):
    (tmp_path / "size_table.md").write_text("mine")
    words = ["--sizes", work / "tiny-t5", "--output_dir", tmp_path, "--input_file", work / "validation.csv"]
    assert tool.main([*words, "--", "--do_train", "--output_dir=x"]) == 2
    said = capsys.readouterr().err
    assert "size_table.md there is not of this tool" in said and "--output_dir after --: is set" in said
    assert (tmp_path / "size_table.md").read_text() == "mine"


def test_parts_of_a_training_that_were_killed_count(tmp_path):
    step, end = (
        "step  2/9  loss 1.0  lr 1e-3  5 tokens/s  MFU 1.0%  1.50 GB  0:00:01 left",
        "trained to step 9 in 0:00:02",
    )
    parts = [
        ["$ python", "loading"],
        ["$ python", step, step],
        ["$ python", step, end, "eval"],
        ["$ python", "is done"],
    ]
    lines = [f"{100 * i + 10 * j}.0 {line}" for i, part in enumerate(parts) for j, line in enumerate(part)]
    (tmp_path / "t.log").write_text("\n".join(lines))
    assert tool.sum_earlier_seconds(tmp_path / "t.log") == 20  # the second; the third is in all_results.json


def test_labels_of_the_picture_do_not_cover_each_other():
    rows = [{"size": str(i), "one": {"p50_ms": 20.0, "p95_ms": 21.0 + i}, "rougeL": 30 + i / 100} for i in range(5)]
    picture = tool.place_points(rows)
    labels = sorted(point["label"] for point in picture["points"])
    assert min(b - a for a, b in zip(labels, labels[1:], strict=False)) > 13
    assert all(picture["left"] <= p["x"] <= p["end"] <= picture["width"] for p in picture["points"])
    assert len(picture["xs"]) >= 1 and 2 <= len(picture["ys"]) <= 12
