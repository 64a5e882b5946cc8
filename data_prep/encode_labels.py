# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["polars>=1.0", "pyarrow"]
# ///
"""Turn string labels into integers for text classification, with the maps that from_pretrained takes.

    python data_prep/encode_labels.py --input_file sms.tsv --column_names label text --output_dir data/sms

    python data_prep/encode_labels.py --input_file train.csv --validation_file validation.csv \
        --label_column category --output_dir data/categories

Writes train.parquet (and validation.parquet) with integers in the label column, and labels.json, whose two maps go to
a model as they are:

    AutoModelForSequenceClassification.from_pretrained(name, **json.load(open("labels.json")))

For a Spark table call encode_spark(table, "label", label2id): the same integers.
"""

import json
import sys
from pathlib import Path

import polars

from brief_parser import BriefParser
from table_files import ending, find_path_problems, refuse
from whole_files import Output, describe_command, find_folder_problems

TABLE_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--input_file", required=True, help=f"Table to learn the labels from: {', '.join(TABLE_ENDINGS)}."
    )
    parser.add_argument("--validation_file", help="Second table; a label that the first does not have is refused.")
    parser.add_argument("--label_column", default="label", help="Column of the labels. Default: label.")
    parser.add_argument("--column_names", nargs="+", help="Names of the columns of a .csv or .tsv without a header.")
    parser.add_argument("--label_order", nargs="+", help="The labels in the order of their integers. Default: sorted.")
    parser.add_argument("--output_dir", required=True, help="Folder to make; must be absent or empty.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences; nothing but file names is looked at."""
    problems = []
    for flag in ("input_file", "validation_file"):
        path = getattr(args, flag)
        problems += find_path_problems(flag, path, TABLE_ENDINGS) if path is not None else []
    problems += find_folder_problems(Path(args.output_dir))
    if args.label_order and len(set(args.label_order)) < len(args.label_order):
        problems.append(f"--label_order {' '.join(args.label_order)}: names a label twice")
    return problems


def read_table(path, column_names):
    """Return a table as a polars.DataFrame, columns of text files as text; raises ValueError if it is malformed."""
    kind = ending(path)
    try:
        if kind == ".parquet":
            return polars.read_parquet(path)
        if kind == ".jsonl":
            return polars.read_ndjson(path, infer_schema_length=None)
        quote = {"quote_char": None} if kind == ".tsv" else {}
        separator = "\t" if kind == ".tsv" else ","
        table = polars.read_csv(
            path,
            separator=separator,
            has_header=not column_names,
            infer_schema=False,
            **quote,
        )
    except (polars.exceptions.PolarsError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as {kind}: {error}") from None
    if column_names and len(column_names) != table.width:
        raise ValueError(f"--column_names: {len(column_names)} names for {table.width} columns of {path}")
    return table.rename(dict(zip(table.columns, column_names, strict=True))) if column_names else table


def clean_labels(table, column, path):
    """Return the table with stripped text labels, and how many rows without one were left out."""
    if column not in table.columns:
        raise ValueError(f"{path}: has no column {column!r} (--label_column); it has {', '.join(table.columns)}")
    labels = table[column].cast(polars.String).str.strip_chars()
    table = table.with_columns(labels.alias(column))
    kept = table.filter(labels.is_not_null() & (labels != ""))
    return kept, len(table) - len(kept)


def make_maps(labels, order=None):
    """
    Return {"id2label": {"0": ...}, "label2id": {...}}: in the order given, else sorted, numbers as numbers.

    Raises ValueError if the order leaves a label out.
    """
    found = set(labels)
    if order is not None and found - set(order):
        raise ValueError(f"--label_order leaves out {', '.join(sorted(found - set(order)))}")
    try:
        ordered = sorted(found, key=float)
    except ValueError:
        ordered = sorted(found)
    ordered = order or ordered
    return {"id2label": {str(i): x for i, x in enumerate(ordered)}, "label2id": {x: i for i, x in enumerate(ordered)}}


def encode(table, column, label2id):
    """Return the table with integers (Int64) for labels; raises ValueError that counts the labels not in label2id."""
    unseen = table.filter(~polars.col(column).is_in(list(label2id)))[column].value_counts(sort=True)
    if len(unseen):
        named = ", ".join(f"{label!r} ({count} rows)" for label, count in unseen.head(5).iter_rows())
        raise ValueError(f"labels that the training table does not have: {named}; remove the rows or add them there")
    return table.with_columns(polars.col(column).replace_strict(label2id, return_dtype=polars.Int64))


def encode_spark(table, column, label2id):
    """Return a Spark DataFrame with integers for labels; raises ValueError that counts the labels not in label2id."""
    from pyspark.sql import functions as F

    labels = F.trim(F.col(column).cast("string"))
    unseen = table.where(labels.isNull() | ~labels.isin(list(label2id))).groupBy(labels.alias("label")).count().head(5)
    if unseen:
        named = ", ".join(f"{row['label']!r} ({row['count']} rows)" for row in unseen)
        raise ValueError(f"labels that the training table does not have: {named}; remove the rows or add them there")
    pairs = [F.lit(part) for pair in label2id.items() for part in pair]
    return table.withColumn(column, F.create_map(*pairs)[labels].cast("bigint"))


def format_classes(maps, tables, column):
    """Return a line for each class: its integer, label, and rows and share in each table."""
    lines = [f"{'id':>4}  {'label':<24}" + "".join(f"{name:>20}" for name in tables)]
    for label, number in maps["label2id"].items():
        cells = ""
        for table in tables.values():
            count = table.filter(polars.col(column) == number).height
            cells += f"{count:>12} {count / max(len(table), 1):>6.1%}"
        lines.append(f"{number:>4}  {label[:24]:<24}{cells}")
    return "\n".join(lines)


def write_encoded(folder, tables, maps):
    """Write the tables and the maps into a folder."""
    for name, table in tables.items():
        table.write_parquet(folder / f"{name}.parquet")
    (folder / "labels.json").write_text(json.dumps(maps, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv=None):
    args = parse_args(argv)
    output = Output(args.output_dir, "encode_labels", describe_command(args, args.input_file, args.validation_file))
    if output.is_finished():
        return 0
    problems = check_args(args)
    tables, left_out = {}, {}
    if not problems:
        try:
            for name, path in (("train", args.input_file), ("validation", args.validation_file)):
                if path is not None:
                    table = read_table(path, args.column_names)
                    tables[name], left_out[name] = clean_labels(table, args.label_column, path)
            maps = make_maps(tables["train"][args.label_column], args.label_order)
            tables = {name: encode(table, args.label_column, maps["label2id"]) for name, table in tables.items()}
        except ValueError as error:
            problems.append(str(error))
    if not problems and len(maps["label2id"]) < 2:
        problems.append(
            f"--input_file {args.input_file}: has {len(maps['label2id'])} labels; there must be two or more"
        )
    if not problems:
        try:
            output.write(lambda folder: write_encoded(folder, tables, maps))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        return refuse("encode_labels.py", problems)
    print(format_classes(maps, tables, args.label_column))
    for name, count in left_out.items():
        print(f"{name}: {len(tables[name])} rows written, {count} without a label left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
