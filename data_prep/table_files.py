# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the tools of this folder share: tables read row by row, so that an error names its line, and stable samples.

Text is UTF-8, gzipped or not. A file is never read whole, but a .json that is one array.
"""

import csv
import gzip
import hashlib
import itertools
import json
import sys
import time
import zlib
from pathlib import Path

import polars as pl
import pyarrow.parquet

KEYS_FROM_LINES = 100  # a JSON object may leave a key out, so the columns are those of the first 100 together


# ---------------------------------------------------------------------------------------------------------------------
# Paths and messages


def ending(name):
    """Return a file name's ending in lower case, a final .gz left out: 'a/Train.CSV.gz' gives '.csv'."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def find_path_problems(flag, path, endings):
    """Return why a file cannot be read, judged by its name alone, as a list of one sentence or none."""
    if not Path(path).is_file():
        return [f"--{flag} {path}: {'a folder; name its files' if Path(path).exists() else 'no such file'}"]
    if ending(path) not in endings or path.lower().endswith(".parquet.gz"):
        return [f"--{flag} {path}: unknown ending; known are {', '.join(endings)} (the text ones also .gz)"]
    return []


def refuse(program, problems):
    """Print every problem under the program's name; returns its exit code."""
    print(f"{program}: error:\n" + "\n".join(f"  - {p}" for p in problems), file=sys.stderr, flush=True)
    return 2


def say(started, message):
    """Print a step with the seconds since the start."""
    print(f"[{time.perf_counter() - started:6.1f} s] {message}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_lines(path):
    """Yield the lines of a UTF-8 file, gzipped or not, line ends kept. ValueError names the file and the line."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {number} ({error})") from error


def parse_json(text, where):
    """Return the value of a JSON text; ValueError says where it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def read_tsv(path):
    """Yield (line number, cells) of a tab-separated file, header first. No quoting: a quote is a character."""
    for number, line in enumerate(read_lines(path), start=1):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def read_csv(path):
    """Yield (number of the record's first line, cells) of a CSV file, header first; a cell may hold line ends."""
    # A review longer than Python's 131,072 characters a field is still a review.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(path), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {start}: the record that starts here is not CSV ({error}); mend it") from error


def read_jsonl(path):
    """Yield (line number, object) of a file with one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        row = parse_json(line, f"{path}: line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: not a JSON object but {type(row).__name__}; one object a line")
        yield number, row


def read_json(path):
    """Yield (row number, object) of a JSON array, read whole; a .json with one object a line is read as lines.

    An element that is itself a list stands for its messages.
    """
    first = next((line for line in read_lines(path) if not line.isspace()), "")
    if first.lstrip().startswith("{"):
        yield from read_jsonl(path)
        return
    rows = parse_json("".join(read_lines(path)), path) if first else []
    if not isinstance(rows, list):
        raise ValueError(f"{path}: not an array of rows but {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        row = {"messages": row} if isinstance(row, list) else row
        if not isinstance(row, dict):
            raise ValueError(f"{path}: row {number}: not a JSON object but {type(row).__name__}; mend it")
        yield number, row


READERS = {".tsv": read_tsv, ".csv": read_csv, ".jsonl": read_jsonl, ".json": read_json}


def read_columns(flag, path, endings):
    """Return the names of a file's columns; ValueError if it holds none or cannot be read. A .txt has one, `text`."""
    for problem in find_path_problems(flag, path, endings):
        raise ValueError(problem)
    kind = ending(path)
    if kind == ".parquet":
        try:
            columns = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    elif kind == ".txt":
        columns = ["text"] if any(not line.isspace() for line in read_lines(path)) else []
    elif kind in (".csv", ".tsv"):
        columns = next(READERS[kind](path), (1, []))[1]
    else:
        head = itertools.islice(READERS[kind](path), KEYS_FROM_LINES)
        columns = list(dict.fromkeys(key for _, row in head for key in row))
    if not columns:
        raise ValueError(f"--{flag} {path}: the file is empty; leave it out or get it again")
    return columns


def read_rows(path, columns):
    """Yield (line or row number, {column: value}) of a table; in place of a row that cannot be parsed, why not."""
    kind = ending(path)
    if kind == ".parquet":
        try:
            batches = pyarrow.parquet.ParquetFile(path).iter_batches(10_000, columns=list(columns))
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from error
    elif kind in (".csv", ".tsv"):
        reader = READERS[kind](path)
        header = next(reader)[1]
        places = {name: header.index(name) for name in columns}
        for number, cells in reader:
            if len(cells) == len(header):
                yield number, {name: cells[place] for name, place in places.items()}
            else:
                yield number, f"{len(cells)} fields, the header has {len(header)}"
    else:
        yield from READERS[kind](path)


# ---------------------------------------------------------------------------------------------------------------------
# Samples that are the same with every version of every library


def stable_hash(texts, purpose, seed):
    """Return a 64-bit hash of each text. hashlib's, since polars' own hash may change from version to version."""
    start = hashlib.blake2b(f"{purpose} {seed}\n".encode(), digest_size=8)
    numbers = []
    for text in texts:
        digest = start.copy()
        digest.update(text.encode("utf-8"))
        numbers.append(int.from_bytes(digest.digest(), "big"))
    return pl.Series(numbers, dtype=pl.UInt64)


def pick_share(hashes, share):
    """Return a mask of about `share` of the rows: those with the lowest hashes. Equal hashes are never parted.

    At least one hash is in and, where there are two or more, at least one is out.
    """
    groups = hashes.rename("hash").value_counts().sort("hash")
    totals = groups["count"].cast(pl.Int64).cum_sum()
    nearest = (totals - share * len(hashes)).abs().arg_min()
    return hashes <= groups["hash"][min(nearest, max(groups.height - 2, 0))]


def take_sample(table, fraction, counts):
    """Return a share of the rows in the order of their hash: shuffled, so that the first rows are a fair sample."""
    kept = table.filter(pick_share(table["row_hash"], fraction)) if fraction < 1 and table.height > 1 else table
    counts["not sampled"] += table.height - kept.height
    return kept.sort("row_hash")
