# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "huggingface_hub"]
# ///
"""
A model card that a hub takes: what the model was made of, its scores, the curves' picture, the command of the run.

Optional beside guards.py, with closing.py, which writes it.
"""

import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch
import transformers
from huggingface_hub import EvalResult, ModelCardData

CARD_METRICS = {  # of all_results.json, as a hub's card has them
    "rouge1": ("rouge", "ROUGE-1"),
    "rouge2": ("rouge", "ROUGE-2"),
    "rougeL": ("rouge", "ROUGE-L"),
    "rougeLsum": ("rouge", "ROUGE-Lsum"),
    "token_accuracy": ("accuracy", "Token accuracy"),
    "perplexity": ("perplexity", "Perplexity"),
    "loss": ("loss", "Loss"),
}
# Settings that a card names.
SHOWN = "learning_rate lr_scheduler_type warmup_steps optim per_device_train_batch_size gradient_accumulation_steps "
SHOWN += "world_size num_train_epochs max_steps bf16 label_smoothing_factor seed"


def write_card(trainer, task: str, model_args, data_args) -> str:
    """A model card: what it was made of, scores, the curves' picture, the command, settings, versions."""
    base, folder, results = model_args.model_name_or_path, Path(trainer.args.output_dir), read_results(trainer)
    data = name_data(data_args)
    scores = {k: results[f"{p}_{k}"] for p in ("eval", "predict") for k in CARD_METRICS if f"{p}_{k}" in results}
    entries = [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            metric_type=kind,
            metric_name=title,
            metric_value=round(scores[key], 4),
        )  # fmt: skip
        for key, (kind, title) in CARD_METRICS.items()
        if key in scores
    ]
    name = folder.resolve().name
    card = ModelCardData(
        base_model=base if is_hub_name(base) else None,
        datasets=[data_args.dataset_name] if is_hub_name(data_args.dataset_name) else None,
        library_name="peft" if (folder / "adapter_config.json").exists() else "transformers",
        pipeline_tag=task,
        tags=["generated_from_trainer"],
        model_name=name if entries else None,
        eval_results=entries or None,
    )
    trained_on = data_args.dataset_name or Path(data_args.train_file).name
    settings = [f"{k}: {getattr(v, 'value', v)}" for k in SHOWN.split() for v in [getattr(trainer.args, k)]]
    curves = "![Training curves](training_curves.png)\n\n" if (folder / "training_curves.png").exists() else ""
    scored = "".join(f"| {CARD_METRICS[key][1]} | {scores[key]:.4f} |\n" for key in CARD_METRICS if key in scores)
    table = f"## Scores on {data}\n\n| metric | value |\n|---|---|\n{scored}\n" if scored else ""
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    return (
        f"---\n{card.to_yaml()}\n---\n\n# {name}\n\n`{base}`, trained on {trained_on} for "
        f"{trainer.state.global_step} steps.\n\n{curves}{table}## How it was trained\n\n"
        f"```bash\n{make_command()}\n```\n\n" + "".join(f"- {line}\n" for line in settings) + f"- {versions}\n"
    )


def is_hub_name(name: str | None) -> bool:
    """Whether it may be a hub's address: a name, or an owner and a name, and nothing here is called so."""
    return name is not None and not Path(name).exists() and bool(re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name))


def name_data(data_args) -> str:
    """The data that the scores are of: the hub's name, or the file's."""
    return (
        data_args.dataset_name or Path(data_args.test_file or data_args.validation_file or data_args.train_file).name
    )


def read_results(trainer) -> dict:
    path = Path(trainer.args.output_dir) / "all_results.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def make_command(**changed) -> str:
    """The command of this run, of its launcher too, with some flags' values changed and no secret."""
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    for flag, value in {
        **dict.fromkeys({"token", "hub_token"} & {word.lstrip("-").split("=")[0] for word in words}, "TOKEN"),
        **changed,
    }.items():
        words = [word for i, word in enumerate(words) if f"--{flag}" not in (word, words[i - 1] if i else "")]
        words = [*(word for word in words if not word.startswith(f"--{flag}=")), f"--{flag}", str(value)]
    launcher, ranks = ["python"], os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = ["torchrun", "--nproc_per_node", ranks]
    elif "LOCAL_SIZE" in os.environ:
        launcher = ["deepspeed", "--num_gpus", os.environ["LOCAL_SIZE"]]
    return shlex.join([*launcher, sys.argv[0], *words])
