# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "datasets", "accelerate", "sentencepiece", "jinja2"]
# ///
"""Which size of a model is worth it on your data: ROUGE, latency, memory, time and price in one table.

Every size is trained by run_summarization.py with the flags that stand after the --, and then measured:

    python tools/size_table.py --sizes t5-small t5-base --output_dir out/sizes --price_per_hour 2.5 -- \
        --do_train --do_eval --train_file data/train.csv --validation_file data/validation.csv \
        --predict_with_generate --optim adafactor --max_source_length 256 --max_target_length 64

A size may be the folder of a run that has ended: it is taken as it is. The table is in size_table.html, with a
picture, and in size_table.md. Killed, the same command goes on: what each size measured lies in a .json of its own.
"""

import argparse
import contextlib
import ctypes
import datetime
import difflib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import jinja2

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data_prep"))
from brief_parser import BriefParser
from whole_files import describe_command, find_folder_problems

ROOT = Path(__file__).resolve().parents[1]
TRAIN, LATENCY, PAGE = ROOT / "run_summarization.py", ROOT / "benchmarks/latency.py", "size_table.html.jinja"
TABLES = ("size_table.html", "size_table.md")
MADE_BY = "made by tools/size_table.py"  # stands in both: a file without it is someone else's
KNOWN = ("t5-small", "t5-base", "t5-large", "t5-3b", "t5-11b", "google/flan-t5-small", "google/flan-t5-base")
KNOWN += ("google/flan-t5-large", "google/mt5-small", "google/mt5-base", "facebook/bart-base", "facebook/bart-large")
BATCH = 32
MORE_IS_BETTER = ("ROUGE", "rows/s")
STEP = re.compile(r"step +\d+/\d+ .*  (\d+\.\d+) GB  ")  # as console.py prints a step

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line, what stands after -- as args.training_flags."""
    words = sys.argv[1:] if argv is None else [str(word) for word in argv]
    cut = words.index("--") if "--" in words else len(words)
    parser = BriefParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--sizes", nargs="+", required=True, help="Models on the hub, their folders, or folders of runs that ended.")
    add("--output_dir", required=True, help="Where the table, what was measured, and the trained models go.")
    add("--input_file", help="Table whose texts are timed. Default: --validation_file of the training flags.")
    add("--text_column", help="Its column. Default: as in training, or a known name.")
    add("--price_per_hour", type=float, help="Price of this machine for an hour, in your money. None: no costs.")
    add("--num_batches", type=int, default=50, help=f"Batches of one and of {BATCH} rows that are timed.")
    args = parser.parse_args(words[:cut])
    args.training_flags = words[cut + 1 :]
    args.input_file = args.input_file or find_value(args.training_flags, "--validation_file")
    args.text_column = args.text_column or find_value(args.training_flags, "--text_column")
    args.output_dir = Path(args.output_dir)
    return args


def find_value(words, flag):
    """Return what a flag was given last, as argparse has it, else None."""
    found = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    found += [value for word, value in zip(words, words[1:], strict=False) if word == flag]
    return found[-1] if found else None


def check_args(args):
    """Return every problem with the arguments as a list of sentences."""
    problems = find_folder_problems(args.output_dir, must_be_empty=False)
    if args.price_per_hour is not None and not (args.price_per_hour >= 0 and math.isfinite(args.price_per_hour)):
        problems.append(f"--price_per_hour {args.price_per_hour}: must be a number, 0 or more")
    if args.num_batches < 1:
        problems.append(f"--num_batches {args.num_batches}: must be 1 or more")
    if args.input_file is None:
        problems.append(
            "--input_file: name a table of texts to time, or give --validation_file among the flags after --"
        )
    elif not Path(args.input_file).is_file():
        problems.append(f"--input_file {args.input_file}: there is no such file; it holds the texts that are timed")
    for flag in ("--model_name_or_path", "--output_dir"):
        if any(word.split("=")[0] == flag for word in args.training_flags):
            problems.append(f"{flag} after --: is set for each size; leave it out")
    names = [name_size(size) for size in args.sizes]
    if twice := sorted({size for size in args.sizes if names.count(name_size(size)) > 1}):
        problems.append(f"--sizes {' '.join(twice)}: given twice; name each once")
    problems += [f"--sizes {size}: {why}" for size in dict.fromkeys(args.sizes) if (why := explain_unknown(size))]
    new = [size for size in args.sizes if not is_finished_run(Path(size))]
    if new and not args.training_flags:
        problems.append(
            f"--sizes {' '.join(new)}: no finished run; say after -- how to train, as run_summarization.py"
        )
    for path in [args.output_dir / name for name in TABLES]:
        if path.exists() and MADE_BY not in path.read_text(encoding="utf-8", errors="replace"):
            problems.append(
                f"--output_dir {args.output_dir}: {path.name} there is not of this tool; name another folder"
            )
    return problems


def explain_unknown(size):
    """Return why a size names no model, or None. Of a model on the hub the configuration is read."""
    if Path(size).is_dir():
        found = (Path(size) / "config.json").is_file()
        return None if found else "a folder without config.json: no model lies there, and no run has ended there"
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(size, local_files_only=not finds_hub())
    except (OSError, ValueError):
        near = difflib.get_close_matches(size, KNOWN, 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(KNOWN[:5])}, ..."
        hint = "without the hub, give its folder" if size in KNOWN else hint
        return f"neither a folder nor a model that the hub, or its cache here, has; {hint}"
    return None


def finds_hub():
    """Return whether the hub's address resolves, or a proxy may do that; without, the library tries for 25 s."""
    try:
        host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
        return bool(urllib.request.getproxies() or socket.getaddrinfo(host, None))
    except OSError:
        return False


def name_size(size):
    """Return the name of a size's files: google/flan-t5-small is google--flan-t5-small, as in the hub's cache."""
    return os.path.normpath(size).strip("/.").replace("/", "--")


def is_finished_run(folder):
    """Return whether a folder is that of a training run that has ended."""
    return (folder / "complete.json").is_file() and (folder / "all_results.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Training and measuring


class RunError(Exception):
    """Why a size is not in the table."""


def measure_size(size, args):
    """Return a size's figures: those of its .json, if the model and all that was asked for are the same, else new."""
    trains = not is_finished_run(Path(size))
    folder = args.output_dir / name_size(size) if trains else Path(size)
    target, log = (args.output_dir / f"{name_size(size)}.{suffix}" for suffix in ("json", "log"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        known = json.loads(target.read_text(encoding="utf-8"))
        if known.get("request") == describe_request(size, folder, trains, args):
            return known
    if trains:
        words = ["--model_name_or_path", size, "--output_dir", str(folder), *args.training_flags]
        run_logged([sys.executable, str(TRAIN), *words], log)
    figures = read_scores(folder)
    figures["seconds"] += sum_earlier_seconds(log) if trains else 0
    figures["training_gb"] = (
        max(map(float, STEP.findall(log.read_text(encoding="utf-8"))), default=None) if trains else None
    )
    figures |= {"one": time_batches(folder, 1, args, log), "many": time_batches(folder, BATCH, args, log)}
    figures = {"size": size, "request": describe_request(size, folder, trains, args), **figures}
    write_whole(target, json.dumps(figures, indent=2) + "\n")
    return figures


def describe_request(size, folder, trains, args):
    """Return a checksum of what decides a size's figures: flags, tables, and the trained model's own checksums."""
    flags = args.training_flags if trains else []
    asked = argparse.Namespace(size=size, flags=flags, num_batches=args.num_batches, text_column=args.text_column)
    files = [find_value(flags, flag) for flag in ("--train_file", "--validation_file")]
    return describe_command(asked, args.input_file, *files, folder / "complete.json")


def end_with_parent():
    """Have the kernel end a process when its parent is killed (Linux): nothing trains on unseen."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def run_logged(words, log):
    """Run a command, its lines with their time into a log; RunError with its last error where it fails."""
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    said = []
    with open(log, "a", encoding="utf-8", buffering=1) as stream:
        print(f"{time.time():.1f} $ {' '.join(words)}", file=stream)
        process = subprocess.Popen(words, env=environ, preexec_fn=end_with_parent, **pipes)
        try:
            for line in process.stdout:
                print(f"{time.time():.1f} {line}", end="", file=stream)
                said.append(line.strip())
        except BaseException:  # Ctrl-C, SIGTERM, a full disk
            process.terminate()
            raise
        finally:
            code = process.wait()
    if code:
        errors = [line for line in said if re.match(r"(\w+\.py: )?error: |\w*Error: ", line)] or [*filter(None, said)]
        why = re.sub(r"^(\w+\.py: )?error: ", "", errors[-1]) if errors else "it said nothing"
        raise RunError(f"{Path(words[1]).name} ended with code {code}: {why} (all it said: {log})")


def read_scores(folder):
    """Return a finished run's ROUGE, evaluated rows and seconds of training; RunError where there is no ROUGE."""
    try:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
        scores = {name: float(results[f"eval_{name}"]) for name in ("rouge1", "rouge2", "rougeL")}
    except (OSError, ValueError, LookupError, TypeError):
        raise RunError(
            f"{folder}: all_results.json has no ROUGE; train with --do_eval --predict_with_generate"
        ) from None
    return scores | {"eval_rows": results.get("eval_samples"), "seconds": results.get("train_runtime", 0)}


def sum_earlier_seconds(log):
    """Return the seconds of the parts of a training before the one of all_results.json, their start-up included."""
    parts = []  # begun, ended, whether there were steps, whether it came to the last one
    for line in log.read_text(encoding="utf-8").splitlines():
        stamp, _, said = line.partition(" ")
        if said.startswith("$ "):
            parts.append([float(stamp), float(stamp), False, False])
        elif parts and not parts[-1][3]:
            parts[-1][1:] = float(stamp), parts[-1][2] or bool(STEP.match(said)), said.startswith("trained to step")
    last = max((number for number, part in enumerate(parts) if part[3]), default=0)
    return sum(ended - begun for begun, ended, steps, _ in parts[:last] if steps)


def time_batches(folder, batch_size, args, log):
    """Return benchmarks/latency.py's figures of a model, in a process of its own: its memory is not the others'."""
    try:
        settings = json.loads((folder / "run.json").read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, LookupError):
        settings = {}
    with tempfile.TemporaryDirectory() as scratch:
        words = ["--model_name_or_path", str(folder), "--input_file", args.input_file, "--json", f"{scratch}/t.json"]
        words += ["--num_rows", str(args.num_batches * batch_size), "--batch_size", str(batch_size)]
        for flag, value in (
            ("text_column", args.text_column),
            ("max_source_length", settings.get("max_source_length")),
        ):
            words += [f"--{flag}", str(value)] if value else []
        run_logged([sys.executable, str(LATENCY), *words], log)
        return json.loads(Path(scratch, "t.json").read_text(encoding="utf-8"))


def write_whole(path, text):
    """Write a file aside and rename it."""
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def list_figures(row, price):
    """Return {title: (number or None, text)} of a size."""
    one, many, hours = row["one"], row["many"], row["seconds"] / 3600
    figures = {"parameters": (one["parameters"] / 1e6, "{:,.1f} M")}
    figures |= {f"ROUGE-{name[5:]}": (row[name], "{:.1f}") for name in ("rouge1", "rouge2", "rougeL")}
    for rows, timed in (("one row", one), (f"{BATCH} rows", many)):
        figures |= {f"{rows}, {q} (ms)": (timed[f"{q}_ms"], "{:,.0f}") for q in ("p50", "p95")}
    figures[f"rows/s, {BATCH} at a time"] = many["rows_per_second"], "{:,.1f}"
    figures[f"memory, {BATCH} rows (GB)"] = many["peak_memory_gb"], "{:.2f}"
    figures["memory, training (GB)"] = row["training_gb"], "{:.2f}"
    figures["time, training"] = hours, describe_seconds(row["seconds"])
    if price is not None:
        figures["cost, training"] = price * hours, "{:,.2f}"
        figures["cost, 1,000 rows"] = price / 3.6 / many["rows_per_second"], "{:,.4f}"
    return {title: (value, "–" if value is None else text.format(value)) for title, (value, text) in figures.items()}


def describe_seconds(seconds):
    """Return seconds as hours, minutes and seconds."""
    return str(datetime.timedelta(seconds=round(seconds)))


def find_best(texts, title):
    """Return the text of the best of [(number or None, text)]; None where all are alike."""
    known = [(number, text) for number, text in texts if number is not None]
    if len({text for _, text in known}) < 2:
        return None
    return (max if title.startswith(MORE_IS_BETTER) else min)(known)[1]


def place_points(rows, width=640, height=300, left=50, bottom=50):
    """Return where the picture's points, bars to p95, labels and ticks are: ROUGE-L over log(milliseconds)."""
    times = [row["one"][q] for row in rows for q in ("p50_ms", "p95_ms")]
    scores = [row["rougeL"] for row in rows]
    low, high = math.log10(min(times)) - 0.15, math.log10(max(times)) + 0.15
    room = max(0.15 * (max(scores) - min(scores)), 0.5)
    floor, top = min(scores) - room, max(scores) + 1.5 * room

    def x(value):
        return round(left + (math.log10(value) - low) / (high - low) * (width - left - 10), 1)

    def y(value):
        return round((top - value) / (top - floor) * (height - bottom), 1)

    points, taken = [], []
    for row in sorted(rows, key=lambda row: row["rougeL"]):
        at, end, up = x(row["one"]["p50_ms"]), x(row["one"]["p95_ms"]), y(row["rougeL"])
        near = [other for place, other in taken if abs(place - at) < 110]
        label = next(spot for spot in range(int(up) - 9, -9999, -1) if all(abs(spot - other) > 13 for other in near))
        taken.append((at, label))
        points.append({"name": name_shortly(row["size"]), "x": at, "end": end, "y": up, "label": label})
    step = 10 ** math.floor(math.log10(top - floor)) / 2
    step *= 1 if (top - floor) / step < 8 else 4
    heights = [step * i for i in range(math.ceil(floor / step), math.floor(top / step) + 1)]
    decades = range(math.floor(low), math.ceil(high) + 1)
    for digits in ((1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        widths = [digit * 10.0**power for power in decades for digit in digits]
        widths = [value for value in widths if low <= math.log10(value) <= high]
        if len(widths) > 2:
            break
    ticks = {"ys": [(y(v), f"{v:g}") for v in heights], "xs": [(x(v), f"{v:,.6g}") for v in widths]}
    return {"points": points, **ticks, "width": width, "height": height, "left": left, "bottom": height - bottom}


def name_shortly(size):
    """Return a folder's last part; a name on the hub as it is."""
    return Path(size).resolve().name if Path(size).is_dir() else size


def list_notes(rows, faults):
    """Return what a reader of the table must know besides: sizes that are missing, figures that do not compare."""
    notes = [f"{fault.partition(': ')[0]} is missing: {fault.partition(': ')[2]}" for fault in faults]
    if len(devices := sorted({describe_device(row) for row in rows})) > 1:
        notes.append(f"the sizes were timed on different machines: {'; '.join(devices)}")
    if len(counts := sorted({str(row["eval_rows"]) for row in rows})) > 1:
        notes.append(f"ROUGE is of different rows: {', '.join(counts)} were evaluated on")
    return notes


def describe_device(row):
    """Return on what a size was timed."""
    return f"{row['one']['device']}, {row['one']['dtype']}"


def write_tables(rows, faults, args):
    """Write size_table.md and size_table.html into the output folder: a row a figure, a column a size."""
    columns, names = [list_figures(row, args.price_per_hour) for row in rows], [name_shortly(r["size"]) for r in rows]
    table = [(title, [column[title] for column in columns]) for title in columns[0]]
    table = [(title, [text for _, text in texts], find_best(texts, title)) for title, texts in table]
    head = (
        f"Timed: {args.num_batches} batches of one and of {BATCH} rows of {args.input_file}, decoded as in evaluation "
    )
    head += f"({describe_device(rows[0])}). ROUGE: {rows[0]['eval_rows']} rows."
    head += "" if args.price_per_hour is None else f" Costs: at {args.price_per_hour:g} an hour."
    notes = list_notes(rows, faults)
    cells = [["", *names], ["---", *["--:"] * len(rows)], *([title, *texts] for title, texts, _ in table)]
    lines = [head, "", *(f"| {' | '.join(line)} |" for line in cells), "", *(f"- {note}" for note in notes)]
    write_whole(args.output_dir / TABLES[1], "\n".join([*lines, f"<!-- {MADE_BY} -->", ""]))
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(PAGE)
    shown = {"names": names, "table": table, "notes": notes, "head": head, "made_by": MADE_BY}
    write_whole(args.output_dir / TABLES[0], page.render(**shown, picture=place_points(rows)))


def main(argv=None):
    args = parse_args(argv)
    if problems := check_args(args):
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    if args.price_per_hour is None:
        print("no --price_per_hour: the table is without costs", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as by Ctrl-C, what was started is ended too
    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows, faults = [], []
    for number, size in enumerate(args.sizes, 1):
        print(f"{number}/{len(args.sizes)} {size}: ", end="", flush=True)
        try:
            row = measure_size(size, args)
        except RunError as error:
            faults.append(f"{size}: {error}")
            print("left out", flush=True)
            continue
        rows.append(row)
        scores = "/".join(f"{row[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
        print(
            f"ROUGE-1/2/L {scores}, trained in {describe_seconds(row['seconds'])}, one row "
            f"{row['one']['p50_ms']:.0f} ms, {row['many']['rows_per_second']:.1f} rows/s",
            flush=True,
        )
    print("".join(f"error: {fault}\n" for fault in faults), end="", file=sys.stderr)
    if rows:
        write_tables(rows, faults, args)
        print(f"table: {' and '.join(str(args.output_dir / name) for name in TABLES)}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
