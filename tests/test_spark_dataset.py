# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""spark_dataset.py refuses before Spark starts; that it converts is tested with Spark, in test_launch_spark.py."""

import spark_dataset as tool


def test_a_table_that_is_missing_or_holds_nothing_known_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, claim in (
        ("nowhere", "no such file or folder"),
        ("empty", "holds no .parquet, .json, .jsonl, .csv file"),
    ):
        words = ["--input_table", str(tmp_path / name), "--output_file", str(tmp_path / "new.txt")]
        problems = tool.check_args(tool.parse_args(words))
        assert problems[0].startswith(f"--input_table {tmp_path / name}: {claim}")
        assert problems[1].endswith("new.txt: the name must end in .parquet or .delta")


def test_delta_without_its_package_is_one_sentence_for_each_flag(tmp_path, monkeypatch):
    (tmp_path / "in/_delta_log").mkdir(parents=True)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    words = ["--input_table", str(tmp_path / "in"), "--output_file", str(tmp_path / "out.delta")]
    problems = tool.check_args(tool.parse_args(words))
    assert (
        "is a Delta table, for which deltalake is not installed: pip install -r requirements-delta.txt" in problems[0]
    )
    assert problems[1].endswith("out.delta: needs deltalake: pip install -r requirements-delta.txt")
