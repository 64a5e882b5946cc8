# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pyarrow"]
# ///
"""
Reads every table in the same way: text is text, and what is none is refused by its column, type and row.

Optional beside the run_*.py, which without it read .csv, .json, .jsonl, .parquet and .txt by the datasets library.
In the order in which a run meets them: find_problems, read_table, check_split. Tables are .csv, .tsv, .jsonl, .json
(an array, or rows under one key) and .parquet; a .txt is one text. All but .parquet may be gzipped.
"""

import csv
import gzip
import hashlib
import itertools
import json
import os
import re
import sys
import zlib
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError

ENDINGS = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")
NESTED = ("messages", "conversations", "prompt", "completion", "tools")  # columns that may hold lists
BATCH = 5_000  # rows in memory at a time

# ------------------------------------------------------------------------------------------------ checks


def find_problems(args, flags: list[str], find_columns) -> list[str]:
    """
    What is wrong with the files of some flags, as `--flag path[:line]: what, and the way out`.

    find_columns(columns, args) returns the names needed of a file and raises UsageError where they do not serve. Those
    of the first file, the training data, are asked of every other. Each file is read into the cache of convert.
    """
    problems, wanted, first = [], None, None
    if len(mark := getattr(args, "delimiter", None) or ",") != 1 or mark in '"\r\n':
        return [f"--delimiter {mark!r}: must be one character that separates: ';', '|', $'\\t'"]
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:  # the first rank of a host says it, and fills the cache
        return []
    for flag in flags:
        if (path := getattr(args, flag, None)) is None:
            continue
        try:
            table, odd = convert(path, args)
            if table.num_rows == 0:
                raise UsageError(f"{path}: the file holds no rows")
            if wanted is None:
                wanted, first = list_names(find_columns(table.column_names, args)), flag
            if lost := [name for name in wanted if name not in (there := table.column_names)]:
                raise UsageError(f"{path}: has no column {lost[0]!r}, which --{first} has; it has {', '.join(there)}")
            check_text(path, odd, wanted)
        except UsageError as error:
            said = str(error)
            problems.append(f"--{flag} {said}" if said.startswith(str(path)) else f"--{flag} {path}: {said}")
    return problems


def list_names(columns) -> list[str]:
    """The column names in what find_columns returns: one name, several, or (format, several)."""
    if isinstance(columns, str):
        return [columns]
    return list(columns[1] if isinstance(columns[1], tuple) else columns)


def check_text(path: str, odd: dict, columns: list[str]) -> None:
    """Raise UsageError where one of the columns holds something that is not text. odd: as convert returns it."""
    for name in columns:
        kind, row = odd.get(name, (None, None))
        if kind is not None and not (kind == "list" and name in NESTED):
            raise UsageError(f"{path}: column {name!r} holds {kind}, not text, first in row {row}; write it as text")


def check_split(raw, split: str, columns: tuple, data_args) -> None:
    """Raise UsageError where a split is not there, or lacks a column of the training data, or one is not text."""
    if split not in raw:
        raise UsageError(f"--dataset_name {data_args.dataset_name}: has no split {split!r}; it has {', '.join(raw)}")
    if lost := [name for name in columns if name not in raw[split].column_names]:
        there = ", ".join(raw[split].column_names)
        raise UsageError(f"{split}: has no column {lost[0]!r}, which the training data has; it has {there}")
    if data_args.dataset_name is not None:
        check_dataset(raw[split], f"--dataset_name {data_args.dataset_name}: {split}", columns)


def check_dataset(rows: datasets.Dataset, path: str, columns) -> None:
    """check_text() of a data set, where the first cell of a column has the type of all; path: what to call it."""
    odd = {}
    for name in columns:
        for row, cell in enumerate(rows[name]):
            if to_text(cell, name, row, odd) is not None:
                break
    check_text(path, odd, columns)


# ------------------------------------------------------------------------------------------------ the cache


def read_table(path: str, args, typed: bool = False) -> datasets.Dataset:
    """
    A table with every column as text, memory-mapped from the cache; what is not text is JSON there.

    typed: numbers, lists and the like as they are in the file, where a column has one kind of them.
    """
    if typed and find_ending(path) == ".parquet":
        return datasets.load_dataset("parquet", data_files=path, split="train", cache_dir=args.cache_dir)
    table, odd = convert(path, args)
    for name in odd if typed else ():
        try:
            cells = pa.array([None if cell is None else json.loads(cell) for cell in table[name].to_pylist()])
            table = table.set_column(table.column_names.index(name), name, cells)
        except (pa.ArrowException, TypeError, ValueError):
            continue  # of several kinds: JSON, then
    return datasets.Dataset(table)


def convert(path: str, args) -> tuple[datasets.table.Table, dict]:
    """
    A table with every column as text, and of those that are none {name: [type, first row from 0]}, as JSON.

    Kept as an Arrow file in the cache, by path, size, time and how it is read. Raises UsageError with the line.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{path}: {'a folder; name its files' if os.path.isdir(path) else 'there is no such file'}")
    if find_ending(path) not in ENDINGS or str(path).lower().endswith(".parquet.gz"):
        raise UsageError(f"{path}: unknown ending; known are {', '.join(ENDINGS)}, the text ones also .gz")
    status, how = os.stat(path), (getattr(args, "delimiter", None), getattr(args, "file_encoding", None))
    if status.st_size == 0:
        raise UsageError(f"{path}: the file is empty")
    digest = hashlib.sha256(repr((os.path.abspath(path), status.st_size, status.st_mtime_ns, how)).encode())
    folder = Path(getattr(args, "cache_dir", None) or datasets.config.HF_DATASETS_CACHE) / "tables"
    target = folder / f"{digest.hexdigest()[:32]}.arrow"
    names = target.with_suffix(".json")
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows, kinds = (file.with_suffix(f"{file.suffix}.{os.getpid()}") for file in (target, names))
        try:
            kinds.write_text(json.dumps(write_arrow(path, rows, *how)))
            os.replace(kinds, names)
            os.replace(rows, target)  # last: where it is, both are whole
        finally:
            rows.unlink(missing_ok=True)
            kinds.unlink(missing_ok=True)
    return datasets.table.MemoryMappedTable.from_file(str(target)), json.loads(names.read_text())


def write_arrow(path: str, target: Path, delimiter: str | None, encoding: str | None) -> dict:
    """Write a table's rows as text, BATCH at a time; returns what is none, as convert does."""
    read = READERS[find_ending(path)]
    rows = read(path, delimiter, encoding)
    columns = next(rows)
    while True:
        odd, fresh, number, schema = {}, {}, 0, pa.schema([(name, pa.string()) for name in columns])
        with pa.OSFile(str(target), "wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
            while batch := list(itertools.islice(rows, BATCH)):
                fresh |= dict.fromkeys(name for row in batch for name in row if name not in columns)
                cells = {n: [to_text(row.get(n), n, i, odd) for i, row in enumerate(batch, number)] for n in columns}
                try:
                    writer.write_table(pa.table(cells, schema))
                except UnicodeEncodeError:
                    where = f"rows {number} to {number + len(batch)}"
                    raise UsageError(f"{path}: {where}: half of a surrogate pair, which is no text") from None
                number += len(batch)
        if not fresh:
            return odd
        columns, rows = [*columns, *fresh], read(path, delimiter, encoding)  # later rows have more: once more
        next(rows)


def to_text(cell, name: str, row: int, odd: dict) -> str | None:
    """A cell as text; in `odd` the first of a column that is none is noted."""
    if cell is None or isinstance(cell, str):
        return cell
    odd.setdefault(name, [type(cell).__name__, row])
    return json.dumps(cell, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------ readers
# Each yields the names of the columns, as far as they are known from the start, and then the rows as dicts.


def find_ending(path: str) -> str:
    """A file name's ending in lower case, a final .gz left out: `a/Train.CSV.gz` gives `.csv`."""
    name = Path(str(path).lower())
    return name.with_suffix("").suffix if name.suffix == ".gz" else name.suffix


def read_lines(path: str, encoding: str | None = None):
    """Yield the lines of a file, gzipped or not, line ends kept; UsageError names the one that cannot be read."""
    opener, number = gzip.open if str(path).lower().endswith(".gz") else open, 0
    try:
        if encoding is not None:
            with opener(path, "rt", encoding=encoding, newline="") as stream:
                yield from stream
            return
        with opener(path, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    raise UsageError(f"{path}: UTF-16, not UTF-8; give --file_encoding utf-16")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield from re.split(r"(?<=\r)(?!\n)", text) if "\r" in text[:-2] else [text]  # old Macs' line ends
    except LookupError:
        raise UsageError(f"{path}: --file_encoding {encoding}: not known; utf-8, utf-16 and cp1252 are") from None
    except UnicodeDecodeError as error:
        if encoding is not None:
            raise UsageError(f"{path}: not {encoding} ({error.reason}); give another --file_encoding") from None
        byte = f"{line[error.start]:#04x}"
        raise UsageError(
            f"{path}:{number}: not UTF-8 (byte {byte}); give --file_encoding, e.g. cp1252, or convert it with iconv"
        ) from None
    except (OSError, EOFError, zlib.error, UnicodeError) as error:
        raise UsageError(f"{path}: cannot be read after line {number}: {error}") from None


def read_csv(path: str, delimiter: str | None, encoding: str | None):
    """Comma-separated, or tab-separated (.tsv, where quotes may be letters), or as --delimiter says."""
    csv.field_size_limit(sys.maxsize)  # a long review is still a review
    is_tsv = find_ending(path) == ".tsv"
    how = {"delimiter": delimiter or ("\t" if is_tsv else ","), "strict": True}
    if is_tsv and not is_quoted(path, how, encoding):
        how |= {"quoting": csv.QUOTE_NONE}
    reader, start = csv.reader(read_lines(path, encoding), **how), 1
    try:
        header = next(reader, [])
        check_header(path, header, how["delimiter"])
        yield header
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) > len(header):
                raise UsageError(
                    f"{path}:{reader.line_num}: {len(cells)} fields where the header has {len(header)}; put quotes "
                    f"around a field that holds the separator {how['delimiter']!r}"
                )
            if cells:
                yield dict(zip(header, cells, strict=False))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(f"{path}:{start}: the row that starts here is not CSV: {error}; mend its quotes") from None


def is_quoted(path: str, how: dict, encoding: str | None) -> bool:
    """Whether a file can be read with quotes around fields."""
    try:
        return all(True for _ in csv.reader(read_lines(path, encoding), **how))
    except csv.Error:
        return False


def check_header(path: str, header: list[str], delimiter: str) -> None:
    """Raise UsageError where a header names a column twice, is a row of JSONL or has another separator."""
    line = delimiter.join(header)
    if twice := [name for name in header if header.count(name) > 1]:
        raise UsageError(f"{path}: the column {twice[0]!r} stands twice in the header; rename one")
    if line.startswith("{"):
        raise UsageError(f"{path}: JSON, not CSV; rename it to .jsonl")
    if len(header) == 1 and (other := next((mark for mark in ";\t|," if mark in line), None)):
        raise UsageError(f"{path}: one column, {line!r}; if {other!r} separates its fields give --delimiter {other!r}")


def read_json(path: str, delimiter: str | None, encoding: str | None):
    """One object a line; else an array of them, or one object with the rows under one of its keys."""
    lines = (line for line in read_lines(path, encoding) if not line.isspace())
    first, second = next(lines, ""), next(lines, None)
    lines.close()
    if is_object(first) and (second is not None or find_ending(path) == ".jsonl"):
        yield list(json.loads(first))
        for number, line in enumerate(read_lines(path, encoding), 1):
            if not line.isspace():
                yield parse_object(line, f"{path}:{number}")
        return
    if find_ending(path) == ".jsonl" and not first.startswith("["):
        parse_object(first, f"{path}:1")
    try:
        value = json.loads("".join(read_lines(path, encoding)))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not JSON: {error}") from None
    rows = find_rows(path, value)
    yield list(rows[0]) if rows else []
    yield from rows


def is_object(line: str) -> bool:
    """Whether a line is a whole JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def parse_object(line: str, where: str) -> dict:
    """One line of JSONL; raises UsageError that names `where` if it is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: malformed JSON ({error}); each line must be one object") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not a JSON object but a {type(row).__name__}; each line must be one object")
    return row


def find_rows(path: str, value) -> list[dict]:
    """The rows in a JSON value: an array of objects (or of chats, lists themselves), or the one array of an object."""
    if isinstance(value, dict):
        arrays = {k: v for k, v in value.items() if isinstance(v, list) and v and k not in NESTED}
        tables = [key for key, rows in arrays.items() if all(isinstance(row, dict) for row in rows)]
        if len(tables) > 1 or (arrays and not tables):
            found = ", ".join(map(repr, tables or arrays))
            raise UsageError(
                f"{path}: one object with arrays {found}; write the rows as one array, or an object a line"
            )
        value = value[tables[0]] if tables else [value]
    if not isinstance(value, list):
        raise UsageError(f"{path}: not an array of rows but a {type(value).__name__}")
    rows = [{"messages": row} if isinstance(row, list) else row for row in value]
    if wrong := [i for i, row in enumerate(rows) if not isinstance(row, dict)]:
        raise UsageError(f"{path}: element {wrong[0]} of the array is not an object")
    return rows


def read_parquet(path: str, delimiter: str | None, encoding: str | None):
    """Strings as they are; of every other type what Python makes of it."""
    try:
        file = pq.ParquetFile(path)
        yield file.schema_arrow.names
        for batch in file.iter_batches(BATCH):
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UsageError(f"{path}: cannot be read as Parquet: {str(error).splitlines()[0]}") from None


def read_text(path: str, delimiter: str | None, encoding: str | None):
    """A .txt is one text."""
    text = "".join(read_lines(path, encoding))
    yield ["text"]
    yield from [{"text": text}] * bool(text.strip())


READERS = {".csv": read_csv, ".tsv": read_csv, ".json": read_json, ".jsonl": read_json}
READERS |= {".parquet": read_parquet, ".txt": read_text}
