#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyspark[ml]>=4.0", "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "sentencepiece"]
# ///
"""
Generate with a tuned model on Spark: run_generation.py's flags, texts and columns, in the tasks of a Spark job.

On this machine, two processes:
    python launchers/spark_generate.py --master 'local[2]' --model_name_or_path out/t5-small \
        --input_file reviews.csv --output_file summaries.csv --text_column review_body --num_beams 4

On the GPUs of a standalone cluster, from a folder of Parquet files to a folder of Parquet files:
    python launchers/spark_generate.py --master spark://head:7077 --use_gpu --model_name_or_path /nfs/t5-large \
        --input_file /nfs/reviews --output_file /nfs/summaries --text_column review_body

One summary a product:
    python launchers/spark_generate.py --master spark://head:7077 --model_name_or_path /nfs/t5-large \
        --input_file /nfs/reviews --output_file /nfs/products --text_column review_body \
        --group_by product_id --min_group_size 10

In a notebook, from a table to a table:
    from spark_generate import generate_table, read_flags
    flags = read_flags(["--model_name_or_path", "/nfs/t5-large", "--text_column", "review_body"])
    summaries = generate_table(reviews, flags)

An --output_file of .csv, .jsonl or .parquet is one file that the driver writes, as run_generation.py would have; any
other name is a folder into which the workers write Parquet files, in the rows' order. A Parquet folder is read by the
workers. Other tables are read by the driver, as run_generation.py reads them, and have to fit into its memory.
Workers need the model at the same path; this script, run_generation.py and its companion guards.py are sent to them.
"""

import argparse
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
import pandas as pd
import pyarrow.parquet
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(Path(__file__).resolve().parent), str(ROOT)]  # on a worker Spark has put both beside this file

from spark_train import (  # noqa: E402
    UsageError,
    find_java_problems,
    find_master_problems,
    start_spark,
    time_limit,
    wait_for_slots,
)

import run_generation as script  # noqa: E402

# ------------------------------------------------------------------------------------------------ constants

# Columns on the way; no table has them.
ROW, TEXT, TEXTS, RESULT = "__row", "__text", "__texts", "__result"

FILE_ENDINGS = (".csv", ".jsonl", ".parquet")
# What run_generation.summarise_groups says of a group, as Spark's types.
GROUP_COLUMNS = {"num_texts": "long", "num_rounds": "long", "num_cut": "long", "prediction": "string"}

# A task has enough rows for sorting by length to pay, and a lost one costs little.
ROWS_A_TASK = 4096

# ------------------------------------------------------------------------------------------------ arguments


def parse_spark_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """This launcher's flags, and the words that are run_generation.py's."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="All flags of run_generation.py as well: see its --help.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--master", default="local[*]", help="local[N], spark://host:port, or what else Spark takes as a master.")
    add("--use_gpu", action="store_true", help="Give each task a GPU; the workers must have told Spark of theirs.")
    add("--num_partitions", type=int, default=None, help="Tasks. Default: two a slot, or one for 4096 rows if more.")
    add("--timeout", type=int, default=180, help="Longest wait in seconds for Java and the master.")
    add("--conf", action="append", default=[], metavar="KEY=VALUE", help="A setting of Spark; may be repeated.")
    return parser.parse_known_args(argv)


def read_flags(words: list[str]) -> dict:
    """run_generation.py's flags as they were given; its own checks come in find_generate_problems."""
    namespace = script.make_parser().parse_args(words)
    if os.path.exists(namespace.model_name_or_path):
        namespace.model_name_or_path = os.path.abspath(namespace.model_name_or_path)
    values, decoding = script.split_flags(namespace)
    return {"values": values, "decoding": decoding}


def find_generate_problems(args: argparse.Namespace, flags: dict) -> list[str]:
    """Everything wrong that can be seen before Java is started, as one message each."""
    values = dict(flags["values"])
    problems = [f"--conf {pair}: must be KEY=VALUE" for pair in args.conf if "=" not in pair]
    if args.num_partitions is not None and args.num_partitions < 1:
        problems.append(f"--num_partitions {args.num_partitions}: must be 1 or more")
    for flag in ("deepspeed", "use_cpu"):
        if values[flag] and (flag != "use_cpu" or args.use_gpu):
            problems.append(
                f"--{flag}: does not go with {'--use_gpu' if flag == 'use_cpu' else 'Spark'}; leave it out"
            )
    if values["input_file"] is not None and Path(values["input_file"]).is_dir():
        files = list_parquet(values["input_file"])
        if not files:
            return [*problems, f"--input_file {values['input_file']}: the folder holds no *.parquet"]
        values["input_file"] = str(files[0])
    if values["output_file"] is not None and not values["output_file"].endswith(FILE_ENDINGS):
        if Path(values["output_file"]).exists():
            problems.append(f"--output_file {values['output_file']}: exists and is kept; remove it, or name another")
        values["output_file"] = os.path.join(values["output_file"], "part.parquet")
    values["deepspeed"] = None
    if script.guards:
        given = argparse.Namespace(**values)
        found = script.tables.find_problems(given, ["input_file"], script.find_text_column) if script.tables else []
        try:
            script.guards.check_generation(given, flags["decoding"], found)
        except script.UsageError as error:
            problems += str(error).split("\n")
    return problems + find_java_problems(args.timeout) + find_master_problems(args.master, args.timeout)


def list_parquet(folder: str) -> list[Path]:
    """The Parquet files of a folder in order; those with a leading _ or . are marks, not data."""
    return sorted(path for path in Path(folder).glob("*.parquet") if path.name[0] not in "._")


def make_spark_settings(args: argparse.Namespace) -> dict[str, str]:
    """Spark's settings; those of --conf come last and count."""
    settings = {
        "spark.master": args.master,
        "spark.app.name": "spark_generate",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        # Texts are sorted by length and batched within this many rows, as in run_generation.py.
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(script.WINDOW),
    }
    passed_on = [name for name in os.environ if name.startswith(("HF_", "TRANSFORMERS_")) and name != "HF_TOKEN"]
    settings |= {f"spark.executorEnv.{name}": os.environ[name] for name in passed_on}
    if args.use_gpu:
        settings |= {"spark.task.resource.gpu.amount": "1", "spark.executor.resource.gpu.amount": "1"}
        settings["spark.executor.cores"] = "1"
    return settings | dict(pair.split("=", 1) for pair in args.conf)


# ------------------------------------------------------------------------------------------------ on the workers


class Columns(dict):
    """A batch of rows as run_generation.read_texts wants its table."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


@functools.lru_cache(1)
def load_once(frozen: str):
    """The generator of these flags (JSON). Spark's worker processes live on, so each loads the model once."""
    flags = json.loads(frozen)
    take_gpu()
    values = flags["values"]
    name = values["model_name_or_path"]
    if os.path.isabs(name) and not os.path.isdir(name):
        raise UsageError(f"--model_name_or_path {name}: the worker {os.uname().nodename} does not see this folder")
    values["use_cpu"] = values["use_cpu"] or not script.torch.accelerator.is_available()
    if values["max_tokens_per_batch"] is None:
        values["max_tokens_per_batch"] = 8192 if values["use_cpu"] else 16384
    model_args, data_args = make_arguments(values)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bar = script.tqdm
    script.tqdm = lambda *args, **settings: bar(*args, **{**settings, "disable": True})
    generator = script.load_generator(model_args, data_args, flags["decoding"])
    where = f"process {os.getpid()} of {os.uname().nodename}"
    print(f"{where}: model loaded on {generator.model.device}", file=sys.stderr, flush=True)
    return generator


def make_arguments(values: dict):
    """run_generation.py's two argument dataclasses."""
    model = script.GenerationModelArguments.__dataclass_fields__
    return (
        script.GenerationModelArguments(**{name: value for name, value in values.items() if name in model}),
        script.GenerationDataArguments(**{name: value for name, value in values.items() if name not in model}),
    )


def take_gpu() -> None:
    """Show this process the GPU that Spark gave its task; without one, none where the cluster shares its GPUs out."""
    from pyspark import TaskContext

    context = TaskContext.get()
    given = context.resources().get("gpu") if context is not None else None
    if given is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(given.addresses)


def read_batch(columns: dict, names: list[str], is_chat: bool, drop_keys=()) -> list:
    """The texts of a batch: None where there is none. Under pandas 3 a null string arrives as NaN."""
    table = Columns({name: [plain(value) for value in columns[name]] for name in names})
    return script.read_texts(table, names[0], is_chat, drop_keys)


def plain(value):
    """A cell as run_generation.py would have read it: None for NaN, lists of dicts for chat messages."""
    if isinstance(value, str):
        return value
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [row if isinstance(row, dict) else row.asDict() for row in value]
    return None if value is None or value != value else value


def generate_rows(generator, texts: list, numbers: list[int]) -> list[str]:
    """Outputs of texts, "" where there is none. `numbers` are the rows in the whole table: they seed sampling."""
    wanted = [i for i, text in enumerate(texts) if text is not None]
    ids, _ = generator.prompts.encode([texts[i] for i in wanted])
    results = [""] * len(texts)
    for batch in script.plan_rows(generator, ids):
        rows = [numbers[wanted[i]] for i in batch]
        outputs = script.generate_batch(generator, [ids[i] for i in batch], rows)
        for i, tokens in zip(batch, outputs, strict=True):
            results[wanted[i]] = generator.decode(tokens)
    return results


def make_row_function(frozen: str, names: list[str]):
    """For a UDF: batches of (row number, text columns) in, batches of outputs out."""

    drop_keys = json.loads(frozen)["values"]["drop_keys"] or ()

    def generate(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        for numbers, *columns in batches:
            generator = load_once(frozen)
            texts = read_batch(dict(zip(names, columns, strict=True)), names, generator.prompts.is_chat, drop_keys)
            yield pd.Series(generate_rows(generator, texts, numbers.tolist()), dtype=object)

    return generate


def make_group_function(frozen: str):
    """For a UDF: batches of lists of texts in; for each list a row of GROUP_COLUMNS out."""

    def generate(batches: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        for lists in batches:
            generator = load_once(frozen)
            results = script.summarise_groups(
                generator, script.MemoryStore(), {i: list(texts) for i, texts in enumerate(lists)}
            )
            yield pd.DataFrame(results, columns=list(GROUP_COLUMNS))

    return generate


def make_text_function(names: list[str]):
    """For a UDF: batches of text columns in, batches of texts out, null where there is none."""

    def read(batches: Iterator[tuple[pd.Series, ...]]) -> Iterator[pd.Series]:
        for columns in batches:
            columns = columns if isinstance(columns, tuple) else (columns,)  # of one column: the bare series
            yield pd.Series(read_batch(dict(zip(names, columns, strict=True)), names, False), dtype=object)

    return read


# ------------------------------------------------------------------------------------------------ tables


def read_table(spark, values: dict):
    """(the input as a Spark table with the rows' numbers in ROW, its number of rows)."""
    if values["input_file"] is not None and Path(values["input_file"]).is_dir():
        return read_folder(spark, list_parquet(os.path.abspath(values["input_file"])), values["max_samples"])
    model_args, data_args = make_arguments(values)
    table = script.load_table(data_args, model_args).with_format("arrow")[:]
    return spark.createDataFrame(table.append_column(ROW, pyarrow.array(range(len(table)), "int64"))), len(table)


def read_folder(spark, files: list[Path], max_samples: int | None):
    """Read Parquet files, their rows numbered in order: Spark reads them in an order of its own, by size."""
    from pyspark.sql import functions as F

    first, pairs = 0, []
    for path in files:
        pairs += [F.lit(path.name), F.lit(first)]
        first += pyarrow.parquet.read_metadata(path).num_rows
    start = F.create_map(*pairs)[F.col("_metadata.file_name")]
    table = spark.read.parquet(*map(str, files))
    table = table.select("*", (start + F.col("_metadata.row_index")).cast("long").alias(ROW))
    return table if max_samples is None else table.where(F.col(ROW) < max_samples), min(first, max_samples or first)


def generate_table(table, flags: dict, num_partitions: int | None = None):
    """
    The Spark table with a column more, or with --group_by a table with a row a group; rows stay in their order.

    flags: of read_flags. Sampling gives run_generation.py's texts if a column ROW numbers the rows (not with groups).
    """
    from pyspark.sql import functions as F

    context = table.sparkSession.sparkContext
    companions = [getattr(script, name.removesuffix(".py")) for name in script.WITHOUT]
    if script.guards:
        companions += [getattr(script.guards, name.removesuffix(".py")) for name in script.guards.COSTS]
    for module in (sys.modules["spark_train"], script, *companions):
        if module:
            context.addPyFile(module.__file__)
    context.addPyFile(__file__)
    values = dict(flags["values"])
    if ROW not in table.columns:
        table = table.withColumn(ROW, F.monotonically_increasing_id())
    values["text_column"] = script.find_text_column(table.columns, argparse.Namespace(**values))
    names = script.list_columns(table.columns, values["text_column"])
    frozen = json.dumps({"values": values, "decoding": flags["decoding"]}, sort_keys=True)
    parts = num_partitions or 2 * context.defaultParallelism
    if values["group_by"] is not None:
        return summarise_table(table, names, values, frozen, parts)
    generate = F.pandas_udf(make_row_function(frozen, names), "string").asNondeterministic()  # never twice
    # Sorted before and not after: to sort Spark looks at a sample, and would generate it first.
    table = table.repartitionByRange(parts, ROW).sortWithinPartitions(ROW)
    return table.withColumn(values["output_column"], generate(ROW, *names)).drop(ROW)


def summarise_table(table, names: list[str], values: dict, frozen: str, parts: int):
    """A table with a row a group, in the order of the groups' first texts, as run_generation.make_group_table's."""
    from pyspark.sql import functions as F

    group, least = values["group_by"], values["min_group_size"]
    read = F.pandas_udf(make_text_function(names), "string")
    texts = table.select(group, ROW, read(*names).alias(TEXT)).where(F.col(TEXT).isNotNull())
    pairs = F.sort_array(F.collect_list(F.struct(ROW, TEXT)))
    groups = texts.groupBy(group).agg(pairs.alias(TEXTS), F.min(ROW).alias(ROW)).where(F.size(TEXTS) >= least)
    groups = groups.select(group, ROW, F.col(f"{TEXTS}.{TEXT}").alias(TEXTS)).persist()
    if groups.isEmpty():
        raise UsageError(f"--min_group_size {least}: no group is that large")
    schema = ", ".join(f"{name} {kind}" for name, kind in GROUP_COLUMNS.items())
    summarise = F.pandas_udf(make_group_function(frozen), schema).asNondeterministic()
    groups = groups.repartitionByRange(parts, ROW).sortWithinPartitions(ROW).withColumn(RESULT, summarise(TEXTS))
    columns = [F.col(f"{RESULT}.{name}") for name in list(GROUP_COLUMNS)[:-1]]
    return groups.select(group, *columns, F.col(f"{RESULT}.prediction").alias(values["output_column"]))


def write_result(result, output: str) -> None:
    """One file, written by the driver as run_generation.py would, or a folder that the workers write."""
    if output.endswith(FILE_ENDINGS):
        script.write_table(datasets.Dataset(result.toArrow()), Path(output))
    else:
        result.write.parquet(os.path.abspath(output))


# ------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> None:
    """Generate as the arguments say."""
    args, words = parse_spark_arguments(sys.argv[1:] if argv is None else argv)
    flags = read_flags(words)
    problems = find_generate_problems(args, flags)
    if problems:
        raise UsageError("\n".join(problems))
    started = time.perf_counter()
    with time_limit(args.timeout, f"--master {args.master}: Spark did not start"):
        spark = start_spark(make_spark_settings(args))
    wait_for_slots(spark, 1, args.timeout)
    datasets.disable_progress_bars()
    values = flags["values"]
    table, rows = read_table(spark, values)
    slots = spark.sparkContext.defaultParallelism
    parts = args.num_partitions or max(1, min(rows, max(2 * slots, -(-rows // ROWS_A_TASK))))
    print(f"{rows} rows in {parts} tasks, {slots} at a time", flush=True)
    try:
        write_result(generate_table(table, flags, parts), values["output_file"])
    except Exception as error:
        said = re.search(r"UsageError: (.*)", str(error))
        if said is None:  # not one of a worker's, or none
            raise
        raise UsageError(said[1]) from None
    print(f"written: {values['output_file']} in {time.perf_counter() - started:.1f} s", flush=True)


def run_and_exit() -> None:
    """Run main() and leave with 0, or with 2 after a message the user can act on."""
    try:
        main()
    except (UsageError, script.UsageError) as error:
        print("".join(f"\nerror: {line}" for line in str(error).split("\n")), file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    from spark_generate import run_and_exit  # by its name, under which the workers know it

    run_and_exit()
