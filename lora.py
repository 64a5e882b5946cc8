# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "peft"]
# ///
"""
Low-rank adapters for run_clm_instruct.py's --lora_r, by peft: put on, and merged with their base at the end.

In the order in which a run meets them: find_problems, add_adapters, merge. load_adapted is for run_generation.py.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError
try:
    import model_checks
except ModuleNotFoundError:
    model_checks = None

MERGE_TOOL, MERGE_DTYPES = Path(__file__).parent / "tools/merge_lora.py", ("float32", "bfloat16", "float16")


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags of the adapters."""
    checks = {
        f"--lora_r {args.lora_r}: must be 0 or more": args.lora_r < 0,
        f"--lora_r {args.lora_r}: needs peft: pip install peft": args.lora_r and not importlib.util.find_spec("peft"),
        f"--lora_dropout {args.lora_dropout}: must lie in 0 to 1, 1 left out": not 0 <= args.lora_dropout < 1,
        f"--lora_alpha {args.lora_alpha}: must be above 0": not 0 < args.lora_alpha < float("inf"),
        "--merge_lora: there is nothing to merge without --lora_r": args.merge_lora and not args.lora_r,
        f"--merge_dtype {args.merge_dtype}: must be one of {', '.join(MERGE_DTYPES)}": args.merge_dtype
        not in MERGE_DTYPES,
        "--merge_lora: needs tools/merge_lora.py and data_prep/whole_files.py; copy them along": args.merge_lora
        and not (MERGE_TOOL.is_file() and (MERGE_TOOL.parents[1] / "data_prep/whole_files.py").is_file()),
    }
    return [problem for problem, holds in checks.items() if holds]


def add_adapters(model, known: int, model_args, training_args):
    """
    LoRA adapters on the model (https://arxiv.org/abs/2106.09685) by peft; everything else is frozen.

    known: tokens that the model came with. The rows of those that the tokenizer has more are trained too: they would
    stay as they were drawn.
    """
    import peft

    targets = model_args.lora_target_modules or "all-linear"
    settings = {"r": model_args.lora_r, "lora_alpha": model_args.lora_alpha, "lora_dropout": model_args.lora_dropout}
    if added := list(range(known, model.get_input_embeddings().num_embeddings)):
        tables = [model.get_input_embeddings()]
        tables += [] if model.config.tie_word_embeddings else [model.get_output_embeddings()]
        names = [name.split(".")[-1] for name, module in model.named_modules() if any(module is t for t in tables)]
        settings["trainable_token_indices"] = dict.fromkeys(names, added)
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()  # else no gradient enters the first checkpointed block
    try:
        return peft.get_peft_model(model, peft.LoraConfig(**settings, target_modules=targets, task_type="CAUSAL_LM"))
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {targets}: {error}") from None


def load_adapted(folder: str, tokenizer, **settings):
    """The base that an adapter folder names, of the kind that its task_type says, with the adapters on it."""
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
    base = str(config.get("base_model_name_or_path"))
    auto = AutoModelForSeq2SeqLM if config.get("task_type") == "SEQ_2_SEQ_LM" else AutoModelForCausalLM
    try:
        model = model_checks.load(auto, base, **settings) if model_checks else auto.from_pretrained(base, **settings)
    except (OSError, ValueError) as error:
        raise UsageError(f"--model_name_or_path {folder}: adapters of {base}, which is needed too: {error}") from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return peft.PeftModel.from_pretrained(model, folder)


def merge(model_args, folder: str) -> None:
    """Write base and adapters as one plain model to `folder`/merged, in a process that DeepSpeed has not touched."""
    flags = {"--adapter_dir": folder, "--output_dir": f"{folder}/merged", "--cache_dir": model_args.cache_dir}
    flags |= {"--model_name_or_path": model_args.model_name_or_path, "--model_revision": model_args.model_revision}
    flags["--merge_dtype"] = model_args.merge_dtype
    command = [sys.executable, str(MERGE_TOOL), *(part for flag in flags.items() if flag[1] for part in flag)]
    command += ["--trust_remote_code"] * model_args.trust_remote_code
    token = {"HF_TOKEN": model_args.token} if model_args.token else {}
    shutil.rmtree(f"{folder}/merged", ignore_errors=True)  # of a run that was killed after it
    if subprocess.run(command, env=os.environ | token).returncode != 0:
        raise UsageError(f"--merge_lora: {MERGE_TOOL.name} failed; the adapters themselves are in {folder}")
