# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Training, generation and data on a real Spark, local and standalone with two workers; a test's name is its claim."""

import importlib.util
import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, make_rows, run, write_csv
from launch_places import find_port, needs_java, wait_for

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(600), needs_java]
LAUNCHER, SCRIPT = ROOT / "launchers/spark_train.py", ROOT / "run_summarization.py"
sys.path.insert(0, str(ROOT / "launchers"))

# No network, no GPU and no model in these: what a process is given, and how it ends.
# One write a process: print's pieces, unbuffered, mix with the other's.
SHOW = """import os, sys
words = ["rank", os.environ["RANK"], "gpu", os.environ["CUDA_VISIBLE_DEVICES"], *sys.argv[1:]]
os.write(1, (" ".join(words) + "\\n").encode())
"""
FAIL = """import os, sys, time
if os.environ["RANK"] == "0":
    print("error: --optim none: there is no such optimizer", file=sys.stderr)
    sys.exit(7)
time.sleep(300)
"""
SLEEP = "import os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(300)\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> Path:
    """A folder with small scripts and a program that tells Spark of two GPUs which are none."""
    folder = tmp_path_factory.mktemp("spark")
    for name, text in (("show.py", SHOW), ("fail.py", FAIL), ("sleep.py", SLEEP)):
        (folder / name).write_text(text)
    (folder / "gpus.sh").write_text('#!/bin/sh\necho \'{"name": "gpu", "addresses": ["0", "1"]}\'\n')
    (folder / "gpus.sh").chmod(0o700)
    return folder


def launch(folder: Path, master: str, *words, processes: int = 2, check: bool = True):
    command = [sys.executable, LAUNCHER, "--master", master, "--num_processes", processes]
    command += ["--conf", "spark.driver.host=127.0.0.1"] if master.startswith("spark:") else []
    return run([*command, *words], cwd=folder, check=check)


def errors_of(done) -> list[str]:
    """The lines of error; exit code 2 and no traceback."""
    assert done.returncode == 2 and "Traceback" not in done.stdout, done.stdout[-4000:]
    return [line.removeprefix("error: ") for line in done.stdout.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------------------------ ends and errors


@pytest.mark.parametrize("where", ["local mode", "cluster"])
def test_a_failing_script_ends_the_launcher_with_its_exit_code_and_its_message(places, where, request):
    local = where == "local mode"
    place = ("local[1]", "--local_mode") if local else (request.getfixturevalue("master"),)
    done = launch(places, *place, "fail.py", check=False)  # within 280 s: the other process sleeps for 300
    assert done.returncode == 7, done.stdout[-4000:]
    end = done.stdout[done.stdout.index("error: fail.py failed with exit code 7") :]
    assert "error: --optim none: there is no such optimizer" in end and "Traceback" not in end


def test_a_killed_launcher_leaves_no_process_behind(places):
    command = [sys.executable, LAUNCHER, "--master", "local[2]", "--num_processes", "2", "sleep.py"]
    with open(places / "sleep.log", "w") as log:
        launcher = subprocess.Popen(command, cwd=places, stdout=log, stderr=subprocess.STDOUT)

    def read_pids() -> list[str]:
        lines = (places / "sleep.log").read_text().splitlines()
        pids = [line.split()[1] for line in lines if line.startswith("pid ")]
        assert len(pids) == 2, lines
        return pids

    try:
        pids = wait_for(read_pids, 150)
    finally:
        launcher.kill()
        launcher.wait()

    def check_gone() -> None:
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]

    wait_for(check_gone, 60)


# ------------------------------------------------------------------------------------------------ one clear error


def test_a_port_where_nobody_listens_is_one_error(places):
    (error,) = errors_of(launch(places, f"spark://127.0.0.1:{find_port()}", "show.py", check=False))
    assert "cannot be reached" in error and "is it running" in error


def test_a_master_that_does_not_answer_is_one_error_after_the_time_limit(places):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"spark://127.0.0.1:{mute.getsockname()[1]}"
        (error,) = errors_of(launch(places, address, "--timeout", "8", "show.py", check=False))
    assert error == f"--master {address}: Spark did not start (--timeout 8)"


def test_fewer_slots_than_processes_is_one_error(places, master):
    (error,) = errors_of(launch(places, "local[2]", "show.py", processes=3, check=False))
    assert error.startswith("--num_processes 3: --master local[2] has 2 task slots") and "'local[3]'" in error
    (error,) = errors_of(launch(places, master, "--timeout", "60", "show.py", processes=3, check=False))
    assert "give 2 task slots" in error and "--num_processes 3" in error


def test_a_path_that_the_workers_do_not_see_is_one_error_each(places, master):
    # Of the driver's own folder; a worker's own is another one.
    done = launch(places, master, "/proc/self/cwd/show.py", "--train_file=/proc/self/cwd/fail.py", check=False)
    errors = errors_of(done)
    assert [error.split(":")[0] for error in errors] == ["/proc/self/cwd/show.py", "/proc/self/cwd/fail.py"]
    assert all("does not see it" in error for error in errors)


def test_a_script_that_is_not_there_and_other_mistakes_are_named_together(places):
    done = launch(places, "local[2]", "--conf", "a", "gone.py", processes=0, check=False)
    said = errors_of(done)
    assert [line.split(":")[0] for line in said] == ["--num_processes 0", "gone.py", "--conf a"]


TOOLS = {
    "launchers/spark_train.py": ["--num_processes", "1", "show.py"],
    "launchers/spark_generate.py": ["--model_name_or_path", "t5-small", "--input_file", "rows.csv"]
    + ["--output_file", "new.csv"],
    "data_prep/prepare_reviews.py": ["--input_file", "rows.csv", "--output_dir", "new", "--engine", "spark"],
    "data_prep/spark_dataset.py": ["--input_table", "rows.csv", "--output_file", "new.parquet"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_missing_java_is_one_error(places, tool, monkeypatch):
    write_csv(places / "rows.csv", make_rows(3, 1))
    monkeypatch.setenv("PATH", str(places))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    done = run([sys.executable, ROOT / tool, *TOOLS[tool]], cwd=places, check=False)
    assert done.returncode == 2 and done.stdout.lower().count("java_home is not set") == 1, done.stdout
    assert "Traceback" not in done.stdout
    monkeypatch.setenv("JAVA_HOME", str(places / "jdk"))
    done = run([sys.executable, ROOT / tool, *TOOLS[tool]], cwd=places, check=False)
    assert done.returncode == 2 and f"JAVA_HOME={places / 'jdk'}" in done.stdout


def test_a_missing_library_is_named_with_the_way_to_install_it(monkeypatch, places):
    import spark_train

    import prepare_reviews

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install pyspark" in prepare_reviews.check_engine("spark", None)[0]
    assert "pip install ray" in prepare_reviews.check_engine("ray", None)[0]
    args = spark_train.parse_launch_arguments(["--num_processes", "1", str(places / "show.py")])
    assert "requirements-launchers.txt" in spark_train.find_launch_problems(args)[0]


# ------------------------------------------------------------------------------------------------ arguments


def test_relative_paths_among_the_scripts_arguments_become_absolute_and_nothing_else(places, monkeypatch):
    import spark_train

    monkeypatch.chdir(places)
    (places / "model").mkdir(exist_ok=True)
    words = ["args.json", "--train_file", "a.csv", "--output_dir=out", "--deepspeed", "z.json", "--optim", "model"]
    words += [
        "--model_name_or_path",
        "model",
        "--tokenizer_name",
        "google/t5",
        "--source_prefix",
        "show.py: ",
        "--bf16",
    ]
    here = str(places)
    assert spark_train.make_absolute(words) == (
        [f"{here}/args.json", "--train_file", f"{here}/a.csv", f"--output_dir={here}/out", "--deepspeed"]
        + [f"{here}/z.json", "--optim", "model", "--model_name_or_path", f"{here}/model", "--tokenizer_name"]
        + ["google/t5", "--source_prefix", "show.py: ", "--bf16"]
    )


def find_cards(done) -> dict[str, tuple[str, str]]:
    """By rank the cards and the argument it was shown; Java may write into the lines, so not by line."""
    return {rank: (cards, word) for rank, cards, word in re.findall(r"rank (\d) gpu ([\d,]*) ?(--x|)", done.stdout)}


def test_the_processes_see_the_gpus_that_spark_found_and_none_without_use_gpu(places):
    gpus = ["--use_gpu", "--conf", f"spark.driver.resource.gpu.discoveryScript={places / 'gpus.sh'}"]
    done = launch(places, "local[2]", *gpus, "show.py", "--x")
    shown = find_cards(done)
    # TorchDistributor draws the cards' order (random.sample), one order for all processes.
    assert set(shown) == {"0", "1"} and len(set(shown.values())) == 1, done.stdout[-3000:]
    cards, word = shown["0"]
    assert sorted(cards.split(",")) == ["0", "1"] and word == "--x", done.stdout[-3000:]
    done = launch(places, "local[1]", "--local_mode", "show.py")
    assert find_cards(done) == {"0": ("", ""), "1": ("", "")}, done.stdout[-3000:]


# ------------------------------------------------------------------------------------------------ one session


@pytest.fixture(scope="module")
def session():
    """One local Spark with two slots for all that follows."""
    import spark_train

    settings = {"spark.master": "local[2]", "spark.ui.enabled": "false", "spark.log.level": "ERROR"}
    settings["spark.ui.showConsoleProgress"] = "false"
    spark = spark_train.start_spark(settings)
    yield spark
    spark.stop()


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """Reviews in three layouts: clean, dirty, empty, doubled in and across files, and some that cannot be parsed."""
    import polars as pl

    folder = tmp_path_factory.mktemp("reviews")
    run(
        [
            sys.executable,
            ROOT / "data_prep/make_sample_reviews.py",
            "--num_reviews",
            "25000",
            "--output_file",
            "a.tsv",
        ],
        cwd=folder,
    )
    lines = (folder / "a.tsv").read_text(encoding="utf-8").split("\n")
    lines[17] = "torn\tline"
    (folder / "a.tsv").write_text("\n".join(lines), encoding="utf-8")
    odd = {"text": ["Nice &amp; warm <br> coat.", None, "Other body", "  "] * 3, "title": ["A", "B", "", "C"] * 3}
    pl.DataFrame({**odd, "parent_asin": range(12)}).write_parquet(folder / "b.parquet")
    rows = [{"text": f"Body {i % 50} é“ \x01", "title": f"T{i % 70}", "parent_asin": str(i)} for i in range(300)]
    rows.append({"text": None, "title": "x", "parent_asin": "1"})
    (folder / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepare(engine: str, output_format: str) -> list:
    words = ["--input_file", "a.tsv", "b.parquet", "c.jsonl", "--drop_star_headlines", "--sample_fraction", "0.7"]
    return [*words, "--output_dir", f"{engine}_{output_format}", "--engine", engine, "--output_format", output_format]


@pytest.mark.parametrize("engine, output_format", [("spark", "parquet"), ("ray", "csv")])
def test_every_engine_writes_the_same_files_to_the_byte(reviews, session, engine, output_format, monkeypatch, capsys):
    import prepare_reviews

    monkeypatch.chdir(reviews)
    prepare_reviews.main(prepare("polars", output_format))
    expected = capsys.readouterr().out
    if engine == "spark":
        prepare_reviews.main(prepare(engine, output_format))
        said = capsys.readouterr().out
    else:  # as a program
        said = run(
            [sys.executable, ROOT / "data_prep/prepare_reviews.py", *prepare(engine, output_format)], reviews
        ).stdout
    for name in ("train", "validation"):
        file = f"{name}.{output_format}"
        ours = (reviews / f"{engine}_{output_format}" / file).read_bytes()
        assert len(ours) > 10_000 and ours == (reviews / f"polars_{output_format}" / file).read_bytes()
    counts = [line for line in expected.splitlines() if line.startswith(("rows ", "  ", "could not"))]
    assert len(counts) > 12 and all(line in said.splitlines() for line in counts)


def test_parquet_holds_the_rows_of_csv(reviews):
    import polars as pl

    csv, parquet = (reviews / f"polars_{kind}" / f"train.{kind}" for kind in ("csv", "parquet"))
    assert pl.read_csv(csv, schema=pl.read_parquet_schema(parquet)).equals(pl.read_parquet(parquet))


def test_a_file_that_cannot_be_read_is_the_same_error_on_spark(tmp_path, session, monkeypatch, capsys):
    import prepare_reviews

    monkeypatch.chdir(tmp_path)
    said = []
    good = "text,title,parent_asin\nfine,yes,1\n"
    Path("x.csv").write_bytes(good.encode() + b"caf\xe9,no,2\n")
    for engine in ("polars", "spark"):
        with pytest.raises(SystemExit) as stop:
            prepare_reviews.main(["--input_file", "x.csv", "--output_dir", "out", "--engine", engine])
        assert stop.value.code == 2
        said.append(capsys.readouterr().err)
    assert said[0] in said[1] and "x.csv: line 3 is not UTF-8" in said[1]


def test_a_parquet_overwritten_in_place_gives_its_new_rows(tmp_path, session):
    import pyarrow as pa
    import pyarrow.parquet

    from spark_dataset import to_dataset

    table = tmp_path / "table"
    old = {"body": ["a", None, "c"], "stars": [1, 2, None]}
    new = {"body": ["A", "B", "C"], "stars": [4, 5, 6]}
    table.mkdir()
    pa.parquet.write_table(pa.table(old), table / "part-0.parquet")
    first = to_dataset(session.read.parquet(str(table)), tmp_path / "work")
    pa.parquet.write_table(pa.table(new), table / "part-0.parquet")
    second = to_dataset(session.read.parquet(str(table)), tmp_path / "work")
    assert second[:] == new and first[:] == old
    assert not list((tmp_path / "work").rglob("*.parquet"))


def test_delta_json_and_csv_are_read_and_delta_is_written(tmp_path, session, monkeypatch, capsys):
    import datasets
    import pyarrow as pa
    from deltalake import DeltaTable, write_deltalake

    import spark_dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spark_dataset, "start_spark", lambda master: session)
    old, new = {"body": ["a", "b"], "stars": ["1", "2"]}, {"body": ['say "c",\nd', "e", "é"], "stars": ["4", "5", "4"]}
    write_deltalake("table", pa.table(old), partition_by=["stars"])
    write_deltalake("table", pa.table(new), mode="overwrite", partition_by=["stars"])  # the old files stay there
    datasets.Dataset.from_dict(new).to_json("rows.jsonl")
    datasets.Dataset.from_dict(new).to_csv("rows.csv")

    def convert(name: str, made: str) -> list[tuple[str, str]]:
        spark_dataset.main(["--input_table", name, "--output_file", made])
        table = DeltaTable(made).to_pyarrow_table() if made.endswith(".delta") else pa.parquet.read_table(made)
        return sorted(zip(table["body"].to_pylist(), map(str, table["stars"].to_pylist()), strict=True))

    rows = sorted(zip(*new.values(), strict=True))
    for name, made in (("table", "a.parquet"), ("rows.jsonl", "b.parquet"), ("rows.csv", "c.parquet")):
        assert convert(name, made) == rows, name
    assert convert("a.parquet", "d.delta") == rows
    capsys.readouterr()
    spark_dataset.main(["--input_table", "a.parquet", "--output_file", "d.delta"])  # again: it knows its own
    assert "finished" in capsys.readouterr().out
    (tmp_path / "table/_delta_log/00000000000000000001.json").write_text("{broken")
    with pytest.raises(SystemExit):
        spark_dataset.main(["--input_table", "table", "--output_file", "e.parquet"])
    assert "--input_table table: its Delta log cannot be read: " in capsys.readouterr().err


def test_from_spark_still_returns_the_old_rows(tmp_path, session):
    """The trap that spark_dataset.py is there for; when this fails, Dataset.from_spark will do."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet

    found = []
    for value in ("old", "new"):
        pa.parquet.write_table(pa.table({"body": [value]}), tmp_path / "t.parquet")
        frame = session.read.parquet(str(tmp_path / "t.parquet"))
        found += datasets.Dataset.from_spark(frame, cache_dir=str(tmp_path / "cache"))["body"]
    assert found == ["old", "old"]


# ------------------------------------------------------------------------------------------------ generation


@pytest.fixture(scope="module")
def table(trained, tmp_path_factory) -> Path:
    """Forty rows as CSV, as Parquet, and as a folder of three Parquet files, the largest in the middle."""
    import pyarrow as pa
    import pyarrow.parquet

    folder = tmp_path_factory.mktemp("table")
    rows = make_rows(40, 5)
    rows[3], rows[7] = (" ", *rows[3][1:]), ('He said "well,\nnot good", then  left', *rows[7][1:])
    write_csv(folder / "rows.csv", rows)
    bodies, _, products = zip(*rows, strict=True)
    numbers = pa.array([None if i == 4 else i for i in range(40)], "int32")
    bodies = [None if body == " " else body for body in bodies]
    whole = pa.table({"review_body": bodies, "number": numbers, "product_id": products})
    pa.parquet.write_table(whole, folder / "rows.parquet")
    (folder / "parts").mkdir()
    for name, start, length in (("a", 0, 5), ("b", 5, 30), ("c", 35, 5)):
        pa.parquet.write_table(whole.slice(start, length), folder / f"parts/{name}.parquet")
    return folder


WAYS = {
    "beams, CSV": ("rows.csv", "rows.csv", "out.csv", ["--num_beams", "2"]),
    "samples, Parquet": ("rows.parquet", "parts", "folder", ["--do_sample", "--seed", "3"]),
    "a product": ("rows.parquet", "parts", "out.jsonl", ["--group_by", "product_id", "--min_group_size", "6"]),
}


@pytest.mark.parametrize("way", WAYS)
def test_spark_generates_the_texts_and_columns_of_run_generation(table, trained, session, way, monkeypatch):
    import datasets
    import spark_generate

    import run_generation

    here, there, output, flags = WAYS[way]
    (table / way).mkdir()
    monkeypatch.chdir(table)
    common = ["--model_name_or_path", str(trained), "--dtype", "float32", "--max_new_tokens", "12", *flags]
    common += ["--max_source_length", "96", "--source_prefix", "summarize: "]
    single = f"{way}/one.{'csv' if output == 'out.csv' else 'jsonl'}"
    run_generation.main([*common, "--input_file", here, "--output_file", single, "--use_cpu"])
    argv = [*common, "--input_file", there, "--output_file", f"{way}/{output}", "--num_partitions", "3"]
    if output == "out.csv":  # as a program, whose workers' words can be seen
        done = run([sys.executable, ROOT / "launchers/spark_generate.py", "--master", "local[2]", *argv], cwd=table)
        loads = [line for line in done.stdout.splitlines() if line.endswith("model loaded on cpu")]
        assert 1 <= len(set(loads)) == len(loads) <= 2, loads  # once in each of two workers, for three tasks
    else:
        spark_generate.main(argv)
    if output == "folder":
        files = sorted(str(path) for path in (table / way / output).glob("*.parquet"))
        result = datasets.Dataset.from_parquet(files, cache_dir=str(table / way / "cache"))
        assert result.to_list() == [json.loads(line) for line in Path(single).read_text("utf-8").splitlines()]
        assert result["number"][3:6] == [3, None, 5] and result["prediction"][3] == ""
    else:
        assert Path(way, output).read_bytes() == Path(single).read_bytes()


def test_a_notebook_gets_a_table_from_a_table(table, trained, session):
    import spark_generate

    flags = spark_generate.read_flags(
        ["--model_name_or_path", str(trained), "--text_column", "review_body", "--max_new_tokens", "4"]
    )
    frame = session.read.parquet(str(table / "rows.parquet")).limit(6)
    result = spark_generate.generate_table(frame, flags, 2)
    assert result.columns == ["review_body", "number", "product_id", "prediction"]
    rows = result.collect()
    assert [row.number for row in rows] == [0, 1, 2, 3, None, 5] and rows[3].prediction == "" != rows[0].prediction


def test_tokens_and_keys_are_not_put_into_sparks_settings(monkeypatch):
    import spark_train

    for name in ("HF_TOKEN", "WANDB_API_KEY", "HF_HOME"):
        monkeypatch.setenv(name, f"value-of-{name}")
    args = spark_train.parse_launch_arguments(["--num_processes", "2", "run_summarization.py"])
    settings = spark_train.make_spark_settings(args)
    assert settings["spark.executorEnv.HF_HOME"] == "value-of-HF_HOME"
    assert not [name for name, value in settings.items() if value in ("value-of-HF_TOKEN", "value-of-WANDB_API_KEY")]
