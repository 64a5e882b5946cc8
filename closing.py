# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib", "rouge-score", "nltk"]
# ///
"""
What a run leaves to read: curves, a model card, and last lines with scores, places and commands.

Optional beside guards.py, which calls write, and describe_end when all is written.
"""

import json
import os
import shlex
import sys
from pathlib import Path

from model_card import make_command, read_results, write_card

HERE = Path(__file__).resolve().parent
PANELS = {
    "loss": ("loss", "eval_loss"),
    "ROUGE (validation)": ("eval_rouge1", "eval_rouge2", "eval_rougeL"),
    "token accuracy": ("token_accuracy", "eval_token_accuracy"),
    "learning rate": ("learning_rate",),
    "gradient norm": ("grad_norm",),
}
MANY = 0.1  # of texts that run into the limit


def write(trainer, task: str, model_args, data_args) -> None:
    """training_curves.png and, after training, README.md, a model card."""
    folder, history = Path(trainer.args.output_dir), trainer.state.log_history
    if history:
        draw_curves(history, folder / "training_curves.png")
    if trainer.args.do_train:
        aside = folder / ".README.md.unfinished"
        aside.write_text(write_card(trainer, task, model_args, data_args), encoding="utf-8")
        aside.replace(folder / "README.md")


# ------------------------------------------------------------------------------------------------ the last lines


def describe_end(trainer, task: str, model_args, data_args, columns: tuple) -> str:
    """How many texts ended, their scores beside others', where all lies, and commands to go on with."""
    folder, results = Path(trainer.args.output_dir), read_results(trainer)
    part = "predict" if data_args.test_file and "predict_loss" in results else "eval"
    lines = []
    if f"{part}_stopped" in results:
        lines.append(describe_texts(folder, results, part, trainer.state.log_history, task, data_args))
    names = [
        "README.md",
        "training_curves.png",
        "generated_predictions.jsonl",
        "all_results.json",
        "run.log",
        "merged",
    ]
    there = [name for name in names if (folder / name).exists()]
    what = "model" if trainer.args.do_train else "results"
    lines.append(f"{what}: {folder} (with {', '.join(there)})")
    report = HERE / "tools/evaluation_report.py"
    if "generated_predictions.jsonl" in there and report.exists():
        words = ["python", shorten_path(report), "--output_dir", str(folder)]
        words += ["--rouge_language", data_args.rouge_language] * (data_args.rouge_language != "en")
        lines.append(f"read it:   {shlex.join(words)}")
    if trainer.args.do_train:
        lines += describe_next(folder, trainer, model_args, data_args, columns)
    return "\n".join(lines)


def describe_texts(folder: Path, results: dict, part: str, history: list, task: str, data_args) -> str:
    """How many texts ended by themselves, and their ROUGE beside the lead's and the untuned model's where known."""
    with open(folder / "generated_predictions.jsonl", encoding="utf-8") as stream:  # splitlines() breaks at U+2028 too
        rows = [json.loads(line) for line in stream]
    ended = round(results[f"{part}_stopped"] * len(rows))
    said = f"texts: {len(rows)}, {ended} ended by themselves, {len(rows) - ended} ran into the limit"
    if len(rows) - ended > MANY * len(rows):
        flag = "--max_new_tokens" if task == "text-generation" else "--val_max_target_length"
        said += f" (many: raise {flag}, or train longer)"
    beside = {"": {k: results.get(f"{part}_{k}") for k in ("rouge1", "rouge2", "rougeL")}}
    reports = sys.modules.get("reports")  # the script's, if it lies beside it
    if task == "summarization" and reports:
        count = max(1, round(sum(len(row["reference"].split()) for row in rows) / len(rows)))
        leads = [" ".join(row["source"].split()[:count]) for row in rows]
        scores = reports.compute_rouge(leads, [row["reference"] for row in rows], data_args.rouge_language)
        beside[f"; of the source's first {count} word{'s' * (count > 1)} "] = scores
    before = next((entry for entry in history if entry["step"] == 0 and "eval_rouge1" in entry), None)
    if before and part == "eval" and history[-1]["step"] > 0:
        beside["; before training "] = {k: before[f"eval_{k}"] for k in ("rouge1", "rouge2", "rougeL")}
    figures = (f"{title}{s['rouge1']:.1f}/{s['rouge2']:.1f}/{s['rougeL']:.1f}" for title, s in beside.items())
    return f"{said}; ROUGE-1/2/L {''.join(figures)}"


def describe_next(folder: Path, trainer, model_args, data_args, columns: tuple) -> list[str]:
    """Commands that try the model and that go on training it."""
    table, lines = data_args.test_file or data_args.validation_file or data_args.train_file, []
    generate = HERE / "run_generation.py"
    if table and generate.exists() and not table.endswith(".txt"):
        model = folder / "merged" if (folder / "merged").is_dir() else folder
        suffix = ".csv" if ".csv" in table or ".tsv" in table else ".jsonl"
        words = ["python", shorten_path(generate), "--model_name_or_path", str(model), "--input_file", table]
        words += ["--text_column", columns[0]] + ["--trust_remote_code"] * model_args.trust_remote_code
        for flag in ("delimiter", "file_encoding"):
            words += [f"--{flag}", getattr(data_args, flag)] if getattr(data_args, flag) else []
        words += ["--output_file", f"{str(folder).rstrip('/')}_texts{suffix}"]
        if hasattr(data_args, "max_new_tokens"):
            words += ["--max_new_tokens", str(data_args.max_new_tokens)]
        lines.append(f"try it:    {shlex.join(words)}")
    if (
        (HERE / "launchers/mlflow_model.py").exists()
        and Path.cwd() == HERE
        and trainer.model.config.is_encoder_decoder
    ):
        lines.append(f"serve it:  make serve MODEL={folder}")
    args = trainer.args
    longer = (
        {"max_steps": 2 * args.max_steps}
        if args.max_steps > 0
        else {"num_train_epochs": f"{args.num_train_epochs + 1:g}"}
    )
    same = "the same command with " + " ".join(f"--{flag} {value}" for flag, value in longer.items())
    own = Path(sys.argv[0]).name.startswith("run_") and os.environ.get("CROSS_SIZE", "1") == "1"
    lines.append(f"train on:  {make_command(**longer) if own else same}")
    return lines


def shorten_path(path: Path) -> str:
    """A path as one would write it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


# ------------------------------------------------------------------------------------------------ curves


def draw_curves(history: list[dict], path: Path) -> None:
    """Loss, ROUGE, learning rate and gradient norm over the steps, from the trainer's log history, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {title: names for title, names in PANELS.items() if any(n in entry for entry in history for n in names)}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
