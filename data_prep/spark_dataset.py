# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyspark[sql]>=4.0", "datasets>=4.0", "polars>=1.0", "pyarrow"]
# ///
"""From a Spark table to a datasets.Dataset with the rows that the table has now.

In a notebook or a program:

    from spark_dataset import to_dataset
    train = to_dataset(spark.table("reviews").where("stars > 1"), "/nfs/work")

From a folder of Parquet files to the one file that run_summarization.py --train_file takes:

    python data_prep/spark_dataset.py --input_table data/reviews_parquet --output_file data/train.parquet

On a cluster, where all machines see /nfs:

    python data_prep/spark_dataset.py --input_table /nfs/reviews --output_file /nfs/train.parquet \
        --master spark://head:7077

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

# ---------------------------------------------------------------------------------------------------------------------
# Spark


def to_dataset(table, work_dir):
    """Return a Dataset of a Spark table, or of the Parquet file or folder at a path, kept in a new folder of work_dir.

    dataset.cache_files names the folder; the driver and all workers must see work_dir.
    """
    if isinstance(table, str | os.PathLike):
        table = start_spark(None).read.parquet(os.path.abspath(table))
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


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--input_table", required=True, help="A Parquet file, or a folder of them as Spark writes it.")
    add("--output_file", required=True, help="The .parquet file to make; it may not exist yet.")
    add("--work_dir", default=None, help="Where Spark writes meanwhile; all machines see it. None: beside the output.")
    add("--master", default=None, help="Spark's master, such as spark://head:7077. None: this machine.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    if not Path(args.input_table).exists():
        problems.append(f"--input_table {args.input_table}: no such file or folder")
    elif Path(args.input_table).is_dir() and not any(Path(args.input_table).rglob("*.parquet")):
        problems.append(f"--input_table {args.input_table}: the folder holds no .parquet file")
    if Path(args.output_file).suffix != ".parquet":
        problems.append(f"--output_file {args.output_file}: the name must end in .parquet")
    if Path(args.output_file).exists():
        problems.append(f"--output_file {args.output_file}: exists already; remove it or name another")
    if importlib.util.find_spec("pyspark") is None:
        problems.append("pyspark is not installed: pip install -r requirements-launchers.txt")
    if problem := find_java_problem():
        problems.append(f"Spark needs Java: {problem}; install Java 17 or later")
    return problems


def write_parquet(args, path):
    """Write the Spark table as one Parquet file."""
    work_dir = Path(args.work_dir or path.parent.parent) / f".{path.name}.spark"
    shutil.rmtree(work_dir, ignore_errors=True)  # of a run that was killed
    dataset = to_dataset(start_spark(args.master).read.parquet(os.path.abspath(args.input_table)), work_dir)
    dataset.to_parquet(path)
    shutil.rmtree(work_dir)
    print(f"{args.output_file}: {len(dataset)} rows, columns {', '.join(dataset.column_names)}")


def main(argv=None):
    args = parse_args(argv)
    path, inputs = Path(args.output_file).absolute(), sorted(Path(args.input_table).rglob("*.parquet"))
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
