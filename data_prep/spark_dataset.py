# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyspark[sql]>=4.0", "datasets>=4.0", "polars>=1.0", "pyarrow"]
# ///
"""From a Spark table to a datasets.Dataset with the rows that the table has now.

In a notebook or a program:

    from spark_dataset import to_dataset
    train = to_dataset(spark.table("reviews").where("stars > 1"), "/nfs/work")

From a folder of Parquet, JSON or CSV files, or a Delta table, to the one file that run_summarization.py --train_file
takes, and back to a Delta table:

    python data_prep/spark_dataset.py --input_table data/reviews_parquet --output_file data/train.parquet
    python data_prep/spark_dataset.py --input_table data/train.parquet --output_file data/reviews.delta

On a cluster, where all machines see /nfs:

    python data_prep/spark_dataset.py --input_table /nfs/reviews --output_file /nfs/train.parquet \
        --master spark://head:7077

Of a Delta table the deltalake package says which Parquet files are its newest version (Spark itself would want a jar);
Spark reads those.

Dataset.from_spark would do it in one call, with two traps (datasets 5.2.0). Its cache is keyed by the table's plan,
which names the files and not what is in them: when they are overwritten in place it returns the old rows, in silence.
And its working_dir=, which a cluster needs, ends in a NameError. So Spark writes Parquet into a folder that is new in
every call, and that is read into a cache inside the same folder. The Parquet is removed then; the cache stays for as
long as the Dataset is used, and is the caller's to remove. Rows come in the order of Spark's partitions.
"""

import argparse
import importlib.util
import os
import shutil
import uuid
from pathlib import Path

import datasets

from brief_parser import BriefParser
from prepare_reviews import find_java_problem, start_spark
from table_files import refuse
from whole_files import Output, describe_command

READ_BY_SPARK = (".parquet", ".json", ".jsonl", ".csv")

# ---------------------------------------------------------------------------------------------------------------------
# Spark


def to_dataset(table, work_dir):
    """Return a Dataset of a Spark table, or of a path's file or folder, kept in a new folder of work_dir.

    dataset.cache_files names the folder; the driver and all workers must see work_dir.
    """
    if isinstance(table, str | os.PathLike):
        table = read_with_spark(start_spark(None), os.path.abspath(table))
    folder = Path(work_dir).absolute() / f"spark_dataset-{uuid.uuid4().hex}"
    written = folder / "parquet"
    table.write.parquet(str(written))
    files = sorted(str(path) for path in written.glob("*.parquet"))
    if not files:
        raise ValueError(
            f"{written}: the workers wrote nothing that is seen here; name a work_dir that all machines see"
        )
    dataset = datasets.Dataset.from_parquet(files, cache_dir=str(folder / "cache"))
    shutil.rmtree(written)
    return dataset


def read_with_spark(spark, path):
    """Return a Spark table of a file or folder: Delta by its log, else by the first ending found; CSV as text."""
    if is_delta(path):
        from deltalake import DeltaTable

        return spark.read.option("basePath", path).parquet(*DeltaTable(path).file_uris())
    kind = find_kind(path)
    if kind == ".csv":
        return spark.read.csv(path, header=True, multiLine=True, escape='"')
    return spark.read.json(path) if kind in (".json", ".jsonl") else spark.read.parquet(path)


def is_delta(path):
    return (Path(path) / "_delta_log").is_dir()


def find_kind(path):
    """Return the ending of the file, or of the folder's files; '' where it holds none that is known."""
    found = [Path(path), *sorted(Path(path).rglob("*"))]
    return next((file.suffix for file in found if file.is_file() and file.suffix in READ_BY_SPARK), "")


def find_delta_problem(path):
    """Return what keeps a Delta table from being read, or None."""
    if importlib.util.find_spec("deltalake") is None:
        return "is a Delta table, for which deltalake is not installed: pip install -r requirements-delta.txt"
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    try:
        features = set(DeltaTable(path).protocol().reader_features or [])
    except DeltaError as error:
        return f"its Delta log cannot be read: {' '.join(str(error).split())[:200]}"
    unknown = features & {"deletionVectors", "columnMapping"}
    return f"uses {', '.join(sorted(unknown))}, which is not read here: rewrite it without" if unknown else None


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add(
        "--input_table", required=True, help="A .parquet, .json, .jsonl or .csv file, a folder of them, a Delta table."
    )
    add("--output_file", required=True, help="The .parquet file, or .delta folder, to make; it may not exist yet.")
    add("--work_dir", default=None, help="Where Spark writes meanwhile; all machines see it. None: beside the output.")
    add("--master", default=None, help="Spark's master, such as spark://head:7077. None: this machine.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    if not Path(args.input_table).exists():
        problems.append(f"--input_table {args.input_table}: no such file or folder")
    elif is_delta(args.input_table):
        problem = find_delta_problem(args.input_table)
        problems += [f"--input_table {args.input_table}: {problem}"] if problem else []
    elif not find_kind(args.input_table):
        problems.append(
            f"--input_table {args.input_table}: holds no {', '.join(READ_BY_SPARK)} file and no Delta table"
        )
    if Path(args.output_file).suffix not in (".parquet", ".delta"):
        problems.append(f"--output_file {args.output_file}: the name must end in .parquet or .delta")
    elif Path(args.output_file).suffix == ".delta" and importlib.util.find_spec("deltalake") is None:
        problems.append(f"--output_file {args.output_file}: needs deltalake: pip install -r requirements-delta.txt")
    if Path(args.output_file).exists():
        problems.append(f"--output_file {args.output_file}: exists already; remove it or name another")
    if importlib.util.find_spec("pyspark") is None:
        problems.append("pyspark is not installed: pip install -r requirements-launchers.txt")
    if problem := find_java_problem():
        problems.append(f"Spark needs Java: {problem}; install Java 17 or later")
    return problems


def write_parquet(args, path):
    """Write the Spark table as one Parquet file, or as a Delta table."""
    work_dir = Path(args.work_dir or path.parent.parent) / f".{path.name}.spark"
    shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
    dataset = to_dataset(read_with_spark(start_spark(args.master), os.path.abspath(args.input_table)), work_dir)
    if path.suffix == ".delta":
        from deltalake import write_deltalake

        write_deltalake(path, dataset.with_format("arrow")[:])
    else:
        dataset.to_parquet(path)
    shutil.rmtree(work_dir)
    print(f"{args.output_file}: {len(dataset)} rows, columns {', '.join(dataset.column_names)}")


def main(argv=None):
    args = parse_args(argv)
    path, inputs = Path(args.output_file).absolute(), sorted(Path(args.input_table).rglob("*.*"))
    inputs = [file for file in inputs if file.is_file()]
    output = Output(path.parent, path.name, describe_command(args, args.input_table, *inputs))
    if output.is_finished():
        return
    problems = check_args(args)
    if not problems:
        try:
            output.write(lambda folder: write_parquet(args, folder / path.name))
        except (ValueError, OSError) as error:
            problems = [str(error)]
    if problems:
        raise SystemExit(refuse("spark_dataset.py", problems))


if __name__ == "__main__":
    main()
