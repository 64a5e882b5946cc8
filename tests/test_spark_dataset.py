# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""spark_dataset.py refuses before Spark starts; that it converts is tested with Spark, in test_launch_spark.py."""

import spark_dataset as tool


def test_a_table_that_is_missing_or_holds_no_parquet_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, claim in (("nowhere", "no such file or folder"), ("empty", "the folder holds no .parquet file")):
        words = ["--input_table", str(tmp_path / name), "--output_file", str(tmp_path / "new.parquet")]
        assert f"--input_table {tmp_path / name}: {claim}" in tool.check_args(tool.parse_args(words))
