# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""dataset_size.py on small files and folders with known sizes; the hub is not reached."""

import csv
import gzip
import json
import os
import shutil
import sys
from collections import namedtuple
from types import SimpleNamespace

import polars
import pytest

import dataset_size as tool
from conftest import ROOT, run

ROWS = [(f"text {i}, with a comma" + "\nand a second line" * (i % 3 == 0), f"title {i}") for i in range(50)]
CARD = """---
dataset_info:
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 3000000
    num_examples: 1200
  - name: validation
    num_bytes: 500000
    num_examples: 200
  download_size: 1000000
  dataset_size: 3500000
---
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(path):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("text", "title"), *ROWS])
    return str(path)


def test_rows_of_every_kind_of_file_are_counted_and_compressed_text_is_measured_unpacked(tmp_path):
    table = write_rows(tmp_path / "a.csv")
    lines = "".join(json.dumps({"text": text, "title": title}) + "\n" for text, title in ROWS) + "\n"
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.json").write_text(json.dumps([{"text": text} for text, _ in ROWS], indent=1))
    (tmp_path / "d.tsv").write_text("text\ttitle\nx\ty\n\nz\tw\n")
    (tmp_path / "e.txt").write_text("one\n\ntwo\n")
    polars.DataFrame(ROWS, schema=["text", "title"], orient="row").write_parquet(tmp_path / "f.parquet")
    sizes, problems = tool.size_files([table, *(str(p) for p in sorted(tmp_path.glob("[b-f].*")))])
    assert not problems
    assert [size["rows"] for size in sizes] == [50, 50, 50, 2, 3, 50]
    assert [size["how"] for size in sizes] == ["read through"] * 5 + ["Parquet metadata"]
    assert sizes[1]["unpacked"] == len(lines.encode()) and sizes[1]["disk"] == os.path.getsize(tmp_path / "b.jsonl.gz")
    assert sizes[0]["unpacked"] == sizes[0]["disk"] == os.path.getsize(table)


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_the_estimate_in_arrow_is_what_the_library_writes_to_within_5_percent(tmp_path, kind):
    from datasets import load_dataset

    rows = [{"text": f"{'word ' * (i % 40)}{i}", "title": f"title {i}"} for i in range(9000)]
    path = str(tmp_path / f"a.{kind}")
    table = polars.DataFrame(rows)
    {"csv": table.write_csv, "json": table.write_ndjson, "parquet": table.write_parquet}[kind](path)
    loaded = load_dataset(kind, data_files=path, cache_dir=str(tmp_path / "made"))["train"]
    written = sum(os.path.getsize(entry["filename"]) for entry in loaded.cache_files)
    assert tool.size_file(path)["arrow"] == pytest.approx(written, rel=0.05)


def test_a_card_is_declared_and_nothing_is_read(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set/train.csv")
    (tmp_path / "set/README.md").write_text(CARD)
    assert tool.main(["--dataset_name", str(tmp_path / "set"), "--cache_dir", str(tmp_path / "cache")]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["rows", "1,400", "declared"] in printed and ["validation:", "rows", "200", "declared"] in printed
    assert ["unpacked,", "as", "Arrow", "3.5", "MB", "declared"] in printed
    assert ["download", "0", "B", "the", "files", "are", "here"] in printed
    assert ["will", "take", "3.5", "MB"] in printed


def test_a_folder_whose_card_says_nothing_is_measured(tmp_path, capsys):
    (tmp_path / "set").mkdir()
    write_rows(tmp_path / "set/train.csv")
    assert tool.main(["--dataset_name", str(tmp_path / "set"), "--cache_dir", str(tmp_path / "cache")]) == 0
    printed = capsys.readouterr().out
    assert "The first row of a .csv or .tsv is taken for its header." in printed
    assert ["rows", "50", "measured"] in [line.split() for line in printed.splitlines()]


def make_builder(**declared):
    info = SimpleNamespace(**{"download_size": None, "dataset_size": None, "splits": None, **declared})
    return SimpleNamespace(info=info, config=SimpleNamespace(data_files={"train": ["hf://datasets/a/b/x.parquet"]}))


def test_of_a_hub_dataset_the_card_is_quoted_and_the_rest_is_not_provided(monkeypatch):
    monkeypatch.setattr(tool, "list_files", lambda files, token=None: (["hf://datasets/a/b/x.parquet"], None))
    described = tool.describe_builder(make_builder(download_size=2_500_000))
    text = tool.format_figures(described, [])
    assert [line.split() for line in text.splitlines()[:4]] == [
        ["files", "1", "listed", "by", "the", "hub"],
        ["download", "2.5", "MB", "declared"],
        ["unpacked,", "as", "Arrow", "not", "provided"],
        ["rows", "not", "provided"],
    ]
    monkeypatch.setattr(tool, "list_files", lambda files, token=None: (["hf://datasets/a/b/x.parquet"], 7000))
    assert ("download", 7000, "B", "listed by the hub") in tool.describe_builder(make_builder())["figures"]


def test_folders_on_one_disk_share_its_room(tmp_path):
    folders = {"download": tmp_path / "hub", "unpacked": tmp_path / "cache"}
    paths = f"{tmp_path}/hub, {tmp_path}/cache"

    def verdict(download, unpacked, free):
        return tool.check_disk({"download": download, "unpacked": unpacked}, folders, lambda folder: free)

    assert verdict(60, 30, 100) == [(paths, 90, 100, "fits")]
    assert verdict(60, 50, 100) == [(paths, 110, 100, "does not fit")]
    assert verdict(60, None, 100) == [(paths, None, 100, "unknown")]
    assert verdict(160, None, 100) == [(paths, 160, 100, "does not fit")]


def test_too_small_a_disk_is_said_with_exit_code_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(10))
    arguments = ["--input_file", write_rows(tmp_path / "a.csv"), "--cache_dir", str(tmp_path / "cache")]
    assert tool.main(arguments) == 1
    assert "does not fit" in capsys.readouterr().out


def test_bytes_read_well():
    values = (None, 0, 999, 1500, 2_340_000, 7_000_000_000, 12_500_000_000_000)
    said = ["not provided", "0 B", "999 B", "1.5 kB", "2.3 MB", "7.0 GB", "12.5 TB"]
    assert [tool.format_value(value, "B") for value in values] == said


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], ["give either --dataset_name or --input_file"]),
        (["--dataset_name", "no/such"], ["--dataset_name no/such: ", "without the hub only folders"]),
        (["--input_file", "no.csv", "."], ["--input_file no.csv: no such file", "--input_file .: a folder"]),
        (["--input_file", "latin.csv", "cut.jsonl.gz"], ["latin.csv: row 2 is not UTF-8", "cut.jsonl.gz: cannot be"]),
        (["--input_file", "fake.parquet", "bad.jsonl"], ["fake.parquet: cannot be read", "bad.jsonl: a row is not"]),
    ],
)
def test_everything_wrong_is_said_at_once_with_exit_code_2(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.csv").write_bytes(b"text\nplain\ncaf\xe9\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(os.urandom(5000))[:3000])
    (tmp_path / "fake.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n{"a": \n')
    assert tool.main(flags) == 2
    printed = capsys.readouterr().err
    assert all(sentence in printed for sentence in said), printed


def test_the_script_runs_by_itself(tmp_path):
    path = write_rows(tmp_path / "a.csv")
    done = run([sys.executable, ROOT / "data_prep/dataset_size.py", "--input_file", path], cwd=tmp_path)
    assert "verdict" in done.stdout and "Traceback" not in done.stdout
