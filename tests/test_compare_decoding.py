# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/compare_decoding.py: each way's texts are run_generation.py's, and what cannot be compared is a sentence."""

import csv
from pathlib import Path

import pytest

import compare_decoding as tool
import run_generation
from conftest import make_rows, write_csv

WORDS = ["--use_cpu", "--dtype", "float32", "--max_new_tokens", "9"]


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture
def table(tmp_path) -> Path:
    return write_csv(tmp_path / "in.csv", make_rows(6, 7))


def test_each_way_has_the_texts_of_run_generation_and_the_page_their_figures(trained, table, tmp_path, capsys):
    words = ["--model_name_or_path", str(trained), "--input_file", str(table), *WORDS]
    more = ["--reference_column", "review_headline", "--num_beams", "3", "--temperature", "0.9", "--top_p", "0.8"]
    assert tool.main([*words, *more, "--output_file", str(tmp_path / "out.csv")]) == 0
    rows, page = read_csv(tmp_path / "out.csv"), (tmp_path / "out.html").read_text()
    assert list(rows[0]) == ["source", "reference", "greedy", "beam search", "top-k", "top-p", "min-p"]
    assert [row["reference"] for row in rows] == [headline for _, headline, _ in make_rows(6, 7)]
    ways = {
        "greedy": [],
        "beam search": ["--num_beams", "3"],
        "top-p": ["--do_sample", "--top_k", "0", "--top_p", "0.8", "--temperature", "0.9"],
    }
    for way, flags in ways.items():
        path = tmp_path / f"{way.replace(' ', '_')}.csv"
        run_generation.main([*words, *flags, "--output_file", str(path)])
        assert [row[way] for row in rows] == [row["prediction"] for row in read_csv(path)], way
    greedy = tool.reports.compute_rouge([row["greedy"] for row in rows], [row["reference"] for row in rows], "en")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("greedy ")]
    assert line.split()[1] == f"{greedy['rouge1']:.1f}" and f"{greedy['rouge1']:.1f}" in page
    assert "top_p=0.8" in page and "num_beams=3" in page and all(row["greedy"] in page for row in rows)


def test_flags_count_in_the_ways_that_use_them():
    given = {"num_beams": 6, "temperature": 0.5, "top_p": 0.7, "length_penalty": 2.0, "max_new_tokens": 5}
    chosen = {way: tool.set_way(way, given) for way in tool.METHODS}
    assert chosen["greedy"] == {"do_sample": False, "num_beams": 1, "max_new_tokens": 5}
    beams = {"do_sample": False, "num_beams": 6, "length_penalty": 2.0, "max_new_tokens": 5}
    assert chosen["beam search"] == beams
    assert chosen["top-p"] == tool.SAMPLED | {"top_p": 0.7, "temperature": 0.5, "max_new_tokens": 5}
    assert chosen["min-p"] == tool.SAMPLED | {"min_p": 0.1, "temperature": 0.5, "max_new_tokens": 5}


def test_repetition_is_the_share_of_3_grams_that_stood_there_before():
    assert tool.find_repetition(["a b c d", "a b c d"]) == 0  # in different texts
    assert tool.find_repetition(["a b a b a b", ""]) == 2 / 4
    assert tool.find_repetition(["a b"]) == 0


def test_what_cannot_be_compared_is_said_at_once_and_nothing_is_overwritten(trained, table, tmp_path, capsys):
    words = ["--model_name_or_path", str(trained), "--input_file", str(table), *WORDS]
    (tmp_path / "out.html").write_text("mine")
    more = ["--do_sample", "--group_by", "product_id", "--output_file", str(tmp_path / "out.csv")]
    assert tool.main([*words, *more]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: --") for line in said)
    assert "leave it out" in said[0] and "leave it out" in said[1] and "is kept" in said[2]
    assert tool.main([*words, "--reference_column", "title", "--output_file", str(tmp_path / "b.csv")]) == 2
    assert "--reference_column title: no such column; there are review_body" in capsys.readouterr().err
    assert tool.main([*words, "--top_p", "7", "--output_file", str(tmp_path / "no/b.txt")]) == 2
    said = capsys.readouterr().err
    assert "--top_p 7" in said and "must end in .csv" in said and "there is no folder" in said
    assert (tmp_path / "out.html").read_text() == "mine" and not (tmp_path / "b.csv").exists()


def test_the_script_names_the_tool():
    problems = run_generation.flag_checks.find_unknown_flags(["--compare_decoding"], {"--num_beams"})
    assert len(problems) == 1 and "python tools/compare_decoding.py" in problems[0]
