# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""encode_labels.py on small files with known answers."""

import csv
import gzip
import json
import sys

import polars
import pytest

import encode_labels as tool
from conftest import ROOT, run

ROWS = [("spam", "win a prize"), ("ham", "see you at 5"), (" ham ", "ok"), ("", "nobody knows"), ("spam", "call, now")]


def write_table(path, rows, header=("label", "text")):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows] if header else rows)
    return str(path)


def test_labels_become_integers_in_sorted_order_and_rows_without_one_are_counted(tmp_path, capsys):
    source = write_table(tmp_path / "in.csv", ROWS)
    assert tool.main(["--input_file", source, "--output_dir", str(tmp_path / "out")]) == 0
    table = polars.read_parquet(tmp_path / "out/train.parquet")
    assert table.rows() == [(1, "win a prize"), (0, "see you at 5"), (0, "ok"), (1, "call, now")]
    maps = json.loads((tmp_path / "out/labels.json").read_text())
    assert maps == {"id2label": {"0": "ham", "1": "spam"}, "label2id": {"ham": 0, "spam": 1}}
    printed = capsys.readouterr().out
    assert "train: 4 rows written, 1 without a label left out" in printed
    assert [line.split() for line in printed.splitlines()[1:3]] == [
        ["0", "ham", "2", "50.0%"],
        ["1", "spam", "2", "50.0%"],
    ]


def test_the_maps_go_into_a_model_configuration_as_they_are(tmp_path):
    from transformers import BertConfig

    config = BertConfig(**tool.make_maps(["b", "a", "c"]))
    assert config.num_labels == 3 and config.id2label == {0: "a", 1: "b", 2: "c"} and config.label2id["c"] == 2


def test_numbers_are_sorted_as_numbers_and_an_order_can_be_given():
    assert list(tool.make_maps(["10", "9", "-1"])["label2id"]) == ["-1", "9", "10"]
    assert tool.make_maps(["b", "a"], ["b", "a", "z"])["label2id"] == {"b": 0, "a": 1, "z": 2}
    with pytest.raises(ValueError, match="leaves out c"):
        tool.make_maps(["a", "c"], ["a"])


def test_headerless_tsv_jsonl_and_gz_give_the_same(tmp_path):
    with gzip.open(tmp_path / "in.tsv.gz", "wt", encoding="utf-8") as stream:
        stream.write("".join(f"{label}\t{text}\n" for label, text in ROWS))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"label": x, "text": t}) + "\n" for x, t in ROWS))
    names = ["--column_names", "label", "text"]
    assert tool.main(["--input_file", str(tmp_path / "in.tsv.gz"), *names, "--output_dir", str(tmp_path / "a")]) == 0
    assert tool.main(["--input_file", str(tmp_path / "in.jsonl"), "--output_dir", str(tmp_path / "b")]) == 0
    assert (tmp_path / "a/labels.json").read_bytes() == (tmp_path / "b/labels.json").read_bytes()
    assert polars.read_parquet(tmp_path / "a/train.parquet").equals(polars.read_parquet(tmp_path / "b/train.parquet"))


def test_a_label_that_only_the_validation_has_is_refused_and_nothing_is_written(tmp_path, capsys):
    train = write_table(tmp_path / "a.csv", ROWS)
    validation = write_table(tmp_path / "b.csv", [("ham", "x"), ("eggs", "y"), ("eggs", "z")])
    arguments = ["--input_file", train, "--validation_file", validation, "--output_dir", str(tmp_path / "out")]
    assert tool.main(arguments) == 2
    assert "'eggs' (2 rows)" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--input_file", "no.csv"], "--input_file no.csv: no such file"),
        (["--label_column", "class"], "has no column 'class' (--label_column); it has label, text"),
        (["--column_names", "a", "b", "c"], "--column_names: 3 names for 2 columns"),
        (["--label_order", "ham", "ham"], "--label_order ham ham: names a label twice"),
        (["--output_dir", "."], "--output_dir .: not empty, nothing is overwritten"),
    ],
)
def test_a_wrong_argument_is_named_with_exit_code_2(tmp_path, flags, said):
    source = write_table(tmp_path / "in.csv", ROWS)
    sound = ["--input_file", source, "--output_dir", "out"]
    done = run([sys.executable, ROOT / "data_prep/encode_labels.py", *sound, *flags], cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in done.stdout and "Traceback" not in done.stdout


def test_a_single_label_is_refused(tmp_path, capsys):
    source = write_table(tmp_path / "in.csv", [("ham", "x")])
    assert tool.main(["--input_file", source, "--output_dir", str(tmp_path / "out")]) == 2
    assert "has 1 labels; there must be two or more" in capsys.readouterr().err
