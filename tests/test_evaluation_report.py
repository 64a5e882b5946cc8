# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/evaluation_report.py: a page of a finished folder whose figures are the run's own."""

import html
import json
import re
import shutil
from pathlib import Path

import pytest

import evaluation_report as tool
from conftest import write_jsonl


def write_page(folder: Path, *flags: str) -> str:
    """The page's text without its tags."""
    assert tool.main(["--output_dir", str(folder), *flags]) == 0
    page = (folder / "evaluation_report.html").read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.S)))


def make_texts(folder: Path, count: int = 40, **changed) -> Path:
    """A folder with predictions alone; prediction i has i right words of count."""
    rows = []
    for i in range(count):
        right, source = [f"word{n}" for n in range(count)], "long " * (1 + i // 10)
        prediction = " ".join(right[:i] + ["wrong"] * (count - i))
        rows.append({"row": i, "source": source, "reference": " ".join(right), "prediction": prediction} | changed)
    write_jsonl(folder / "generated_predictions.jsonl", rows)
    return folder


def test_the_page_of_a_run_has_the_run_s_own_scores_and_every_curve(trained, tmp_path):
    folder = Path(shutil.copytree(trained, tmp_path / "out"))
    text = write_page(folder)
    results = json.loads((folder / "all_results.json").read_text())
    assert (
        "13 rows; ROUGE-1 {eval_rouge1:.1f}, ROUGE-2 {eval_rouge2:.1f}, ROUGE-L {eval_rougeL:.1f}".format(**results)
        in text
    )
    assert tool.RESULTS not in text and "The 6 worst" in text and "The 6 best" in text
    for title in ("loss", "ROUGE (validation)", "learning rate", "gradient norm"):
        assert f" {title} " in text
    last = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert f"eval_loss, last {[e['eval_loss'] for e in last if 'eval_loss' in e][-1]:.4g}" in text
    assert not list(folder.glob(".evaluation*"))


def test_worst_and_best_are_by_score_and_the_groups_by_length_hold_all_rows(tmp_path):
    rows = tool.score_rows(tool.read_predictions(make_texts(tmp_path) / "generated_predictions.jsonl"), "en")
    worst, best = tool.choose_rows(rows)
    assert [row["row"] for row in worst] == list(range(10)) and [row["row"] for row in best] == list(range(39, 29, -1))
    assert [row["rougeL"] for row in rows[::10]] == [0, 25, 50, 75]
    groups = tool.group_by_length(rows)
    assert [(group["words"], group["rows"]) for group in groups] == [("1", 10), ("2", 10), ("3", 10), ("4", 10)]
    assert groups[0]["rougeL"] == pytest.approx(100 * 4.5 / 40)
    assert [part["heights"] for part in tool.count_lengths(rows)][0] == [0, 10, 10, 10, 10]


def test_texts_of_any_kind_are_shown_as_text(tmp_path):
    strange = "<b>bold</b> & \u2028 {{ row }} </dl>\x85"
    text = write_page(
        make_texts(tmp_path, 1, prediction=strange, source="長い文" * 300, reference="文"), "--rouge_language", "ja"
    )
    assert "<b>bold</b> & {{ row }} </dl>" in text and "…" in text and "it holds an evaluation alone" in text


def test_figures_that_differ_from_the_run_s_are_said_and_torn_ones_are_not_needed(tmp_path, capsys):
    folder = make_texts(tmp_path)
    (folder / "all_results.json").write_text(json.dumps({f"eval_{name}": 12.0 for name in tool.SCORES}))
    (folder / "trainer_state.json").write_text('{"log_history": [{"step": 1, "loss": NaN}]}')
    assert "all_results.json has ROUGE 12.0/12.0/12.0" in write_page(folder)
    assert "all_results.json has ROUGE" in capsys.readouterr().out
    (folder / "all_results.json").write_text("{")
    assert "all_results.json" not in write_page(folder)


def test_a_folder_without_predictions_and_a_page_of_others_are_one_sentence(tmp_path, capsys):
    assert tool.main(["--output_dir", str(tmp_path / "none")]) == 2
    assert tool.main(["--output_dir", str(tmp_path)]) == 2
    texts = make_texts(tmp_path, 2) / "generated_predictions.jsonl"
    texts.write_text(texts.read_text() + '{"row": 2}\n')
    assert tool.main(["--output_dir", str(tmp_path)]) == 2
    make_texts(tmp_path, 2)
    (tmp_path / "evaluation_report.html").write_text("mine")
    assert tool.main(["--output_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 4 and all(line.startswith("error: ") for line in said)
    assert "no such folder" in said[0] and "evaluate with --predict_with_generate" in said[1]
    assert "line 3 is no row" in said[2] and "is kept" in said[3]
    assert (tmp_path / "evaluation_report.html").read_text() == "mine"
