# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "huggingface_hub", "polars>=1.0", "pyarrow", "tqdm"]
# ///
"""Say what a dataset will download, unpack to and hold in rows, and whether the cache folder's disk has room for it.

A dataset on the hub, from its card; nothing is downloaded but the card:

    python data_prep/dataset_size.py --dataset_name cnn_dailymail --dataset_config_name 3.0.0

A folder as load_dataset would take it:

    python data_prep/dataset_size.py --dataset_name data/reviews

Files; text is read through to count its rows, Parquet is not:

    python data_prep/dataset_size.py --input_file data/train.csv data/more.jsonl.gz data/old.parquet

Each figure says how it is known: declared by the card, listed by the hub, measured, or estimated. What nobody says is
"not provided". Exit code 0: it fits, or nothing is known; 1: it does not fit; 2: an argument is wrong.
"""

import argparse
import csv
import gzip
import json
import os
import random
import shutil
import sys
import zlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
from tqdm.auto import tqdm

from brief_parser import BriefParser
from table_files import ending, find_path_problems, refuse
from whole_files import nearest_folder

SIZED_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet")
SAMPLE_ROWS = 4_000  # of a file, whose size in Arrow stands for that of all: at random, of Parquet the first
LINES_A_STEP = 10_000  # between two looks at how far the file has been read
NOT_PROVIDED = "not provided"


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--dataset_name", default=None, help="A dataset's name on the hub, or a folder.")
    add("--dataset_config_name", default=None, help="Configuration of that dataset. None: the only one it has.")
    add("--input_file", nargs="+", default=None, help=f"Files of {', '.join(SIZED_ENDINGS)}; text ones also .gz.")
    add("--cache_dir", default=None, help="Where datasets are unpacked to. None: HF_DATASETS_CACHE.")
    add("--token", default=None, help="Hub token for private datasets; never printed. None: the login's.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = []
    if (args.dataset_name is None) == (args.input_file is None):
        problems.append("give either --dataset_name or --input_file: what is to be measured")
    if args.dataset_config_name and not args.dataset_name:
        problems.append(f"--dataset_config_name {args.dataset_config_name}: goes with --dataset_name; leave it out")
    for path in args.input_file or ():
        problems += find_path_problems("input_file", path, SIZED_ENDINGS)
    if args.cache_dir and not nearest_folder(Path(args.cache_dir)).is_dir():
        problems.append(
            f"--cache_dir {args.cache_dir}: {nearest_folder(Path(args.cache_dir))} is a file, not a folder"
        )
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Files


def read_lines_with_bar(path, unpacked):
    """Yield the lines of a file, gzipped or not, as bytes; `unpacked` gains their length. A bar shows the way left."""
    with (
        open(path, "rb") as raw,
        tqdm(total=os.path.getsize(path), desc=f"reading {path}", unit="B", unit_scale=True, leave=False) as bar,
    ):
        stream = gzip.open(raw) if path.lower().endswith(".gz") else raw
        for number, line in enumerate(stream):
            unpacked.append(len(line))
            if number % LINES_A_STEP == 0:
                unpacked[:] = [sum(unpacked)]
                bar.update(raw.tell() - bar.n)
            yield line


def read_rows_of_text(path, unpacked):
    """Yield the rows of a text file: objects of .jsonl and .json as bytes or values, cells of .csv and .tsv, lines."""
    lines, kind = read_lines_with_bar(path, unpacked), ending(path)
    if kind == ".csv":
        csv.field_size_limit(2**31 - 1)
        yield from (row for row in csv.reader(line.decode() for line in lines) if row)
    elif kind == ".tsv":
        yield from (line.decode().rstrip("\r\n").split("\t") for line in lines if not line.isspace())
    elif kind == ".txt":
        yield from (line.decode().rstrip("\r\n") for line in lines)
    else:
        first = next((line for line in lines if not line.isspace()), b"")
        if kind == ".json" and first.lstrip()[:1] == b"[":
            yield from json.loads(first + b"".join(lines))
            return
        yield first
        yield from (line for line in lines if not line.isspace())


def count_rows_of_text(path):
    """Return (rows, bytes unpacked, a sample of the rows as objects); raises ValueError if the file is broken."""
    unpacked, sample, rows, header, dice = [], [], 0, None, random.Random(0)
    has_header = ending(path) in (".csv", ".tsv")
    try:
        for row in read_rows_of_text(path, unpacked):
            if has_header and header is None:
                header = row
                continue
            if row == b"":
                continue
            rows += 1
            if len(sample) < SAMPLE_ROWS:
                sample.append(row)
            elif (place := dice.randrange(rows)) < SAMPLE_ROWS:
                sample[place] = row
        sample = [json.loads(row) if isinstance(row, bytes) else row for row in sample]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: row {rows + 1} is not UTF-8 ({error.reason}); convert the file first") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a row is not JSON ({error})") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read after row {rows} ({error})") from error
    if has_header:
        sample = [dict(zip(header, cells, strict=False)) for cells in sample]
    return rows, sum(unpacked), [row if isinstance(row, dict) else {"text": row} for row in sample]


def estimate_arrow(sample, rows, unpacked, is_table):
    """Return the bytes that load_dataset will write for all rows, judged by some; unpacked text if it cannot."""
    if not sample:
        return 0
    # Seen on datasets 5.2: .csv comes through pandas, whose texts have offsets of 8 bytes in place of 4.
    text = pyarrow.large_string() if is_table else None
    try:
        keys = dict.fromkeys(key for row in sample for key in row)
        table = pyarrow.table({key: pyarrow.array([row.get(key) for row in sample], text) for key in keys})
    except pyarrow.ArrowException:  # one key with values of several types
        return unpacked
    return round(table.nbytes / len(sample) * rows)


def size_file(path):
    """Return {"path", "disk", "unpacked", "rows", "arrow", "how"} of a file; ValueError if it is broken."""
    disk = os.path.getsize(path)
    if ending(path) != ".parquet":
        rows, unpacked, sample = count_rows_of_text(path)
        arrow = estimate_arrow(sample, rows, unpacked, ending(path) in (".csv", ".tsv"))
        how = "read through"
    else:
        try:
            file = pyarrow.parquet.ParquetFile(path)
            rows, how = file.metadata.num_rows, "Parquet metadata"
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            unpacked = sum(group.total_byte_size for group in groups)
            first = next(file.iter_batches(SAMPLE_ROWS), None)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from error
        arrow = round(first.nbytes / first.num_rows * rows) if rows else 0
    return {"path": path, "disk": disk, "unpacked": unpacked, "rows": rows, "arrow": arrow, "how": how}


def size_files(paths):
    """Return (sizes, problems) of files; what is broken is named, and the others are measured all the same."""
    sizes, problems = [], []
    for path in dict.fromkeys(paths):
        try:
            sizes.append(size_file(path))
        except ValueError as error:
            problems.append(str(error))
    return sizes, problems


# ---------------------------------------------------------------------------------------------------------------------
# Datasets by name


def load_builder(args):
    """Return the builder of a dataset, which knows what its card says; ValueError if there is none."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset_builder(
            args.dataset_name, args.dataset_config_name, cache_dir=args.cache_dir, token=args.token
        )
    except Exception as error:  # the libraries raise many kinds
        hint = "; without the hub only folders and --input_file can be measured" if is_unreachable(error) else ""
        config = f" --dataset_config_name {args.dataset_config_name}" if args.dataset_config_name else ""
        said = " ".join(str(error).split())
        raise ValueError(f"--dataset_name {args.dataset_name}{config}: {said}{hint}") from error


def is_unreachable(error):
    """Whether an error says that the hub was not reached."""
    return isinstance(error, ConnectionError) or "offline" in str(error).lower()


def list_files(data_files, token=None):
    """Return (paths, bytes in all or None): of local files from the disk, of the hub's from its listing."""
    paths = [str(path) for files in (data_files or {}).values() for path in files]
    if all(os.path.isfile(path) for path in paths):
        return paths, sum(map(os.path.getsize, paths))
    try:
        from huggingface_hub import HfFileSystem

        hub = HfFileSystem(token=token)
        return paths, sum(hub.info(path)["size"] for path in paths)
    except Exception:  # no listing is no error: the figure is not provided then
        return paths, None


def describe_builder(builder, token=None):
    """Return {"figures": [(name, value, unit, how)], "download", "arrow", "local"} of a dataset by its card."""
    info = builder.info
    paths, listed = list_files(builder.config.data_files, token)
    local = bool(paths) and all(os.path.isfile(path) for path in paths)
    download = (info.download_size, "declared") if info.download_size is not None else (listed, "listed by the hub")
    if local:
        download = (0, "the files are here")
    rows = sum(split.num_examples for split in info.splits.values()) if info.splits else None
    figures = [
        ("files", len(paths) or None, "", "measured" if local else "listed by the hub"),
        ("files on disk", listed if local else None, "B", "measured"),
        ("download", download[0], "B", download[1]),
        ("unpacked, as Arrow", info.dataset_size, "B", "declared"),
        ("rows", rows, "", "declared"),
    ]
    for name, split in (info.splits or {}).items():
        figures += [(f"  {name}: rows", split.num_examples, "", "declared")]
        figures += [(f"  {name}: unpacked", split.num_bytes, "B", "declared")]
    figures = [figure for figure in figures if figure[0] != "files on disk" or local]
    return {"figures": figures, "download": download[0], "arrow": info.dataset_size, "local": paths if local else []}


def describe_files(sizes):
    """Return the same as describe_builder for files that were measured."""
    total = {key: sum(size[key] for size in sizes) for key in ("disk", "unpacked", "rows", "arrow")}
    figures = [
        ("files", len(sizes), "", "measured"),
        ("files on disk", total["disk"], "B", "measured"),
        ("unpacked, as they are", total["unpacked"], "B", "measured"),
        ("unpacked, as Arrow", total["arrow"], "B", "estimated from a sample of each file's rows"),
        ("rows", total["rows"], "", "measured"),
    ]
    return {"figures": figures, "download": 0, "arrow": total["arrow"]}


# ---------------------------------------------------------------------------------------------------------------------
# Disk


def find_folders(cache_dir):
    """Return {what is written: folder}: of downloads and of unpacked data, as the libraries choose them."""
    import datasets
    import huggingface_hub

    return {
        "download": Path(huggingface_hub.constants.HF_HUB_CACHE),
        "unpacked": Path(cache_dir or datasets.config.HF_DATASETS_CACHE),
    }


def check_disk(needs, folders, free=None):
    """
    Return [(disk's folders, bytes needed or None, bytes free, "fits" | "does not fit" | "unknown")], a disk each.

    Folders on the same disk share its room. A part that is not provided counts as nothing for "does not fit", and
    keeps the rest from being called "fits".
    """
    free = free or (lambda folder: shutil.disk_usage(folder).free)
    disks = {}
    for name, folder in folders.items():
        disks.setdefault(os.stat(nearest_folder(folder)).st_dev, []).append(name)
    rows = []
    for names in disks.values():
        known = sum(needs[name] for name in names if needs[name] is not None)
        room = free(nearest_folder(folders[names[0]]))
        verdict = "unknown" if any(needs[name] is None for name in names) else "fits"
        verdict = "does not fit" if known > room else verdict
        paths = ", ".join(dict.fromkeys(str(folders[name]) for name in names))
        rows.append((paths, known if verdict != "unknown" else None, room, verdict))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def format_value(value, unit):
    """Return a count with separators, bytes in the unit that reads well, or "not provided"."""
    if value is None:
        return NOT_PROVIDED
    if unit != "B":
        return f"{value:,}"
    for step in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} B" if step == "B" else f"{value:,.1f} {step}"
        value /= 1000
    return f"{value:,.1f} TB"


def format_sizes(sizes):
    """Return a table with a line for each file."""
    lines = [f"{'rows':>14}{'on disk':>12}{'unpacked':>12}{'as Arrow':>12}  rows known by     file"]
    for size in sizes:
        cells = "".join(f"{format_value(size[key], 'B'):>12}" for key in ("disk", "unpacked", "arrow"))
        lines.append(f"{size['rows']:>14,}{cells}  {size['how']:<16}  {size['path']}")
    return "\n".join(lines)


def format_figures(described, disks):
    """Return the table of figures and, for each disk, whether there is room."""
    lines = []
    for name, value, unit, how in described["figures"]:
        lines.append(f"{name:<28}{format_value(value, unit):>14}  {how if value is not None else ''}".rstrip())
    for paths, need, room, verdict in disks:
        lines.append("")
        lines.append(f"{'cache folders':<28}{paths}")
        lines.append(f"{'  will take':<28}{format_value(need, 'B'):>14}")
        lines.append(f"{'  free':<28}{format_value(room, 'B'):>14}  measured")
        share = f" ({need / room:.1%} of what is free)" if need is not None and room else ""
        lines.append(f"{'  verdict':<28}{verdict:>14}{share}")
    lines.append("")
    lines.append("Tokenising writes files of its own into the same cache, on top of this.")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Arguments
    args = parse_args(argv)
    problems = check_args(args)
    sizes, described = [], {}

    # 2. What the card declares; what it leaves out of local files is measured
    if not problems and args.dataset_name:
        try:
            described = describe_builder(load_builder(args), args.token)
        except ValueError as error:
            problems.append(str(error))
    paths = args.input_file or (described.get("local", []) if described.get("arrow") is None else [])
    unknown = [path for path in paths if ending(path) not in SIZED_ENDINGS]
    if not problems and paths and not unknown:
        sizes, problems = size_files(paths)
        described = describe_files(sizes)
    if problems:
        return refuse("dataset_size.py", problems)

    # 3. Room
    needs = {"download": described["download"], "unpacked": described["arrow"]}
    disks = check_disk(needs, find_folders(args.cache_dir))

    # 4. Report
    if sizes:
        print(format_sizes(sizes))
        if any(ending(size["path"]) in (".csv", ".tsv") for size in sizes):
            print("The first row of a .csv or .tsv is taken for its header.")
        print()
    print(format_figures(described, disks))
    return 1 if any(verdict == "does not fit" for *_, verdict in disks) else 0


if __name__ == "__main__":
    sys.exit(main())
