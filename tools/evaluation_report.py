# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "rouge-score", "nltk", "jinja2", "numpy", "regex", "tqdm"]
# ///
"""One page on a finished evaluation: lengths, curves, ROUGE by the source's length, the worst and the best rows.

    python tools/evaluation_report.py --output_dir out/t5-small

Reads generated_predictions.jsonl, all_results.json and trainer_state.json of a run's folder, and writes
evaluation_report.html into it, which needs no other file. Each row's ROUGE is computed as the run computed its own.
"""

import argparse
import contextlib
import io
import json
import math
import os
import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import jinja2
import numpy as np
from tqdm.auto import tqdm

import closing
import reports

TEXTS, RESULTS, STATE = "generated_predictions.jsonl", "all_results.json", "trainer_state.json"
SIDES = ("source", "reference", "prediction")
SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
GROUPS, SHOWN, BARS = 5, 10, 24  # groups of like length, worst and best rows, bars of a histogram
SHORTENED = 400  # characters of a source
NEAR = 0.05  # points of ROUGE by which the mean of the rows and the run's own figure may differ unsaid
REPORT = "evaluation_report.html"
MARK = '<meta name="generator" content="plaintune evaluation_report.py">'  # by which the page knows its own kind

# ---------------------------------------------------------------------------------------------------------------------
# What a run left


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output_dir", required=True, help="The folder of a run with --predict_with_generate.")
    parser.add_argument("--rouge_language", default="en", help="As the run's own flag.")
    return parser.parse_args(argv)


def find_problems(folder):
    """Return why no page can be written of a folder, as a list of one sentence or none."""
    if not folder.is_dir():
        return [f"--output_dir {folder}: there is no such folder; give a training run's --output_dir"]
    if not (folder / TEXTS).is_file():
        return [f"--output_dir {folder}: has no {TEXTS}; evaluate with --predict_with_generate first"]
    page = folder / REPORT
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace")[:1000]:
        return [f"--output_dir {folder}: {REPORT} there is not this tool's and is kept; move it away"]
    return [] if os.access(folder, os.W_OK) else [f"--output_dir {folder}: may not be written to; copy it elsewhere"]


def read_predictions(path):
    """Return the rows of generated_predictions.jsonl. Raises ValueError with the line that is none."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            rows.append({"row": row.get("row", number - 1), **{part: str(row[part]) for part in SIDES}})
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f"{path}: line {number} is no row with {', '.join(SIDES)}; evaluate again") from None
    return rows


def read_figures(path):
    """Return what a JSON file of a run holds, or nothing where it is missing or torn."""
    with contextlib.suppress(OSError, ValueError):
        return dict(json.loads(path.read_text(encoding="utf-8")))
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# What is shown


def score_rows(rows, language):
    """Return the rows, each with its words a part and its scores."""
    count, scored = reports.UnicodeTokenizer().tokenize, []
    with contextlib.redirect_stdout(io.StringIO()):  # --rouge_language en of other scripts is said once, by main
        for row in tqdm(rows, desc="ROUGE of each row", unit="row"):
            scores = reports.compute_rouge([row["prediction"]], [row["reference"]], language)
            scored.append({**row, **scores, "words": {part: len(count(row[part])) for part in SIDES}})
    return scored


def describe_scores(rows, results, language):
    """Return (ROUGE, the rows' mean, what differs from the run's own figures or None)."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in SCORES}
    part = "predict" if "predict_rouge1" in results else "eval"  # as the scripts write their rows
    own = {name: results[f"{part}_{name}"] for name in SCORES if f"{part}_{name}" in results}
    if all(abs(own[name] - means[name]) <= NEAR for name in own):
        return means, None
    figures = "/".join(f"{own[name]:.1f}" for name in own)
    return means, (
        f"{RESULTS} has ROUGE {figures}: there references are cut to the target length and as the tokenizer writes "
        f"them, or --rouge_language was not {language}"
    )


def count_lengths(rows):
    """Return for each part its title, median and longest in words, and a histogram's heights and labels."""
    charts = []
    for part in SIDES:
        words = np.array([row["words"][part] for row in rows])
        step = -(-(int(words.max()) + 1) // BARS)
        heights = np.bincount(words // step).tolist()
        starts = range(0, step * len(heights), step)
        labels = [str(start) if step == 1 else f"{start}–{start + step - 1}" for start in starts]
        figures = {"median": int(np.median(words)), "longest": int(words.max())}
        charts.append({"title": part, "heights": heights, "labels": labels, **figures})
    return charts


def group_by_length(rows):
    """Return groups of about as many rows by the source's words, shortest first, with their mean scores."""
    words, groups = np.array([row["words"]["source"] for row in rows]), []
    bounds = np.unique(np.quantile(words, np.linspace(0, 1, GROUPS + 1)[1:], method="higher"))  # like lengths together
    places = np.searchsorted(bounds, words)
    for place in np.unique(places):
        chosen = np.flatnonzero(places == place)
        least, most = words[chosen].min(), words[chosen].max()
        groups.append({"words": f"{least}–{most}" if least < most else str(least), "rows": len(chosen)})
        groups[-1] |= {name: float(np.mean([rows[i][name] for i in chosen])) for name in SCORES}
    return groups


def make_curves(history):
    """Return {title: {name: [(step, value), ...]}} of the trainer's log history, as training_curves.png has them."""
    panels = {}
    for title, names in closing.PANELS.items():
        lines = {name: [(entry["step"], entry[name]) for entry in history if name in entry] for name in names}
        lines = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in lines.items()}
        panels[title] = {name: points for name, points in lines.items() if points}
    return {title: lines for title, lines in panels.items() if lines}


def choose_rows(rows):
    """Return (worst, best) by ROUGE-L, then ROUGE-1, then the row's number; at most SHOWN each, none in both."""
    order = sorted(rows, key=lambda row: (row["rougeL"], row["rouge1"], row["row"]))
    count = min(SHOWN, max(len(order) // 2, 1))
    return order[:count], order[: -count - 1 : -1]


def save_report(folder, rows, language):
    """Write the page aside and rename it; returns (its path, a remark on the scores or None)."""
    results, state = read_figures(folder / RESULTS), read_figures(folder / STATE)
    means, remark = describe_scores(rows, results, language)
    worst, best = choose_rows(rows)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(f"{REPORT}.jinja").render(
        **{"mark": MARK, "folder": folder, "rows": rows, "scores": SCORES, "means": means, "remark": remark},
        **{"lengths": count_lengths(rows), "groups": group_by_length(rows), "shortened": SHORTENED, "state": STATE},
        **{"curves": make_curves(state.get("log_history", [])), "sides": {"worst": worst, "best": best}},
        stopped=results.get("predict_stopped", results.get("eval_stopped")),
    )
    aside = folder / f".{REPORT}.unfinished"
    aside.write_text(text, encoding="utf-8")
    aside.replace(folder / REPORT)
    return folder / REPORT, remark


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    args = parse_args(argv)
    folder = Path(args.output_dir)
    problems = find_problems(folder)
    try:
        rows = [] if problems else read_predictions(folder / TEXTS)
    except ValueError as error:
        problems = [str(error)]
    if problems:
        print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
        return 2
    if args.rouge_language == "en":
        reports.compute_rouge([""] * len(rows), [row["reference"] for row in rows], "en")  # says what it cannot see
    page, remark = save_report(folder, score_rows(rows, args.rouge_language), args.rouge_language)
    print(f"{remark}\n" * (remark is not None) + f"written: {page} ({len(rows)} rows)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
