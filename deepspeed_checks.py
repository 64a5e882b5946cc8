# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "deepspeed"]
# ///
"""
Whether a DeepSpeed file is one: its keys, types and values as the installed version knows them, and as the flags say.
Optional beside guards.py, which calls find_problems. DeepSpeed itself is imported only where a file is given.
"""

import argparse
import difflib
import importlib.util
import inspect
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import TrainingArguments

# What must agree between the file and the flags (as transformers' HfTrainerDeepSpeedConfig has it): keys, flag, value.
TWINS = (
    ("train_micro_batch_size_per_gpu", "per_device_train_batch_size", lambda a: a.per_device_train_batch_size),
    ("gradient_accumulation_steps", "gradient_accumulation_steps", lambda a: a.gradient_accumulation_steps),
    ("gradient_clipping", "max_grad_norm", lambda a: a.max_grad_norm),
    ("bf16.enabled", "bf16", lambda a: a.bf16 or a.bf16_full_eval),
    ("fp16.enabled", "fp16", lambda a: a.fp16 or a.fp16_full_eval),
    ("optimizer.params.lr", "learning_rate", lambda a: a.learning_rate),
    ("optimizer.params.betas", "adam_beta1, --adam_beta2", lambda a: [a.adam_beta1, a.adam_beta2]),
    ("optimizer.params.eps", "adam_epsilon", lambda a: a.adam_epsilon),
    ("optimizer.params.weight_decay", "weight_decay", lambda a: a.weight_decay),
    ("scheduler.params.warmup_max_lr", "learning_rate", lambda a: a.learning_rate),
)

# A DeepSpeed file's keys that are read elsewhere than at its start (0.19.8), whole numbers, and sections' keys.
FURTHER_KEYS = ("autotuning", "elasticity", "sequence_parallel_size", "vocabulary_size", "compression_training")
WHOLE = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
SECTIONS = {
    "optimizer": "type params legacy_fusion",
    "scheduler": "type params",
    "activation_checkpointing": "partition_activations contiguous_memory_optimization cpu_checkpointing "
    "number_checkpoints synchronize_checkpoint_boundary profile",
}
BLOCKS = (*SECTIONS, "zero_optimization", "bf16")
ADAM = "lr betas eps weight_decay bias_correction adam_w_mode torch_adam amsgrad fp32_optimizer_states"  # params
NUMERIC = "lr eps weight_decay warmup_min_lr warmup_max_lr warmup_num_steps total_num_steps"
FILLED = "enabled reduce_bucket_size stage3_prefetch_bucket_size stage3_param_persistence_threshold".split()
FILLED += ["stage3_gather_16bit_weights_on_model_save"]  # "auto" of these the trainer fills in (accelerate 1.15)
NAMES = {bool: "true or false", int: "a whole number from 1 on", float: "a number", dict: "an object", str: "a text"}


def find_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the file that --deepspeed names, and where it contradicts a flag of a training."""
    if args.deepspeed is None:
        return []
    config, problems = read_and_check(args)
    return problems or find_contradictions(args.deepspeed, config, args)


def find_zero3_problems(args: argparse.Namespace) -> list[str]:
    """The same for a generation: it spreads a model's weights, which only stage 3 does."""
    if args.deepspeed is None:
        return []
    config, problems = read_and_check(args)
    stage = str(look_up(config, "zero_optimization.stage")).replace("auto", "none")
    wrong = f"--deepspeed {args.deepspeed}: has stage {stage}; only stage 3 spreads a model's weights"
    return problems or ([] if stage == "3" else [wrong])


def read_and_check(args: argparse.Namespace) -> tuple[dict, list[str]]:
    """The content of the file that --deepspeed names, and what is wrong with it."""
    path, config, said = args.deepspeed, None, "not a JSON object"
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        said = "there is no such file"
    except OSError as error:
        said = f"cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        said = f"not JSON: {error}"
    wrong = [] if isinstance(config, dict) else [f"--deepspeed {path}: {said}"]
    return config, wrong or find_file_problems(path, config, args.use_cpu)


def look_up(config: dict, keys: str):
    """The value under keys with dots between them, "auto" where there is none."""
    for key in keys.split("."):
        config = config.get(key, "auto") if isinstance(config, dict) else "auto"
    return config


def find_contradictions(path: str, config: dict, args: argparse.Namespace) -> list[str]:
    """Values that the file fixes and a flag says otherwise, and what of it does not go with --optim."""
    problems, named = [], f"--deepspeed {path}"
    pairs = [(keys, f"--{flag}", value(args)) for keys, flag, value in TWINS]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * ranks
    pairs.append(("train_batch_size", "--per_device_train_batch_size x --gradient_accumulation_steps x ranks", rows))
    if args.warmup_steps == 0 or args.warmup_steps >= 1:  # a share depends on the data
        pairs.append(("scheduler.params.warmup_num_steps", "--warmup_steps", max(1, math.ceil(args.warmup_steps))))
    pairs.append(("scheduler.params.total_num_steps", "--max_steps", max(0, args.max_steps) or "not given"))
    for keys, flag, wanted in pairs:
        value = look_up(config, keys)
        if value != "auto" and value != wanted:
            differ = f"{keys} is {json.dumps(value)} but {flag} is {wanted}"
            problems.append(f'{named}: {differ}; make them equal or write "auto"')
    if "optimizer" in config and args.optim != TrainingArguments.__dataclass_fields__["optim"].default:
        problems.append(f"{named}: its optimizer block overrules --optim; remove one of the two")
    offload = look_up(config, "zero_optimization.offload_optimizer.device")
    offloaded, named = offload not in ("auto", "none"), f"{named}: offload_optimizer"
    if "optimizer" not in config and offloaded and config.get("zero_force_ds_cpu_optimizer", True):
        problems.append(f'{named} with --optim {args.optim} needs "zero_force_ds_cpu_optimizer": false')
    if offload == "nvme" and args.optim == "adafactor":
        why = "swaps state as large as the weights, which Adafactor's factors are not; there is next to none"
        problems.append(f'{named} on nvme {why}: write "device": "cpu"')
    return problems


def is_number(value) -> bool:
    """Whether a value is a finite number, and fits into 64 bits if it is whole."""
    largest = 2**63 - 1 if isinstance(value, int) else 1e38
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def suggest(name: str, known, mark: str = "") -> str:
    """ ", did you mean NAME?" of the nearest name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {mark}{near[0]}?" if near else ""


class Asked(dict):
    """A dict that remembers which keys were asked for, and with which default: those that a library knows."""

    def __init__(self, *args):
        super().__init__(*args)
        self.known = {}

    def get(self, key, default=None):
        self.known.setdefault(key, default)
        return super().get(key, default)

    def __contains__(self, key) -> bool:
        self.known.setdefault(key)
        return super().__contains__(key)

    def keys(self):
        return self


def find_file_problems(path: str, config: dict, use_cpu: bool) -> list[str]:
    """A DeepSpeed file's keys, types and values that the installed version does not take, in its own words."""
    if not importlib.util.find_spec("deepspeed"):
        return [f"--deepspeed {path}: deepspeed is not installed; `pip install deepspeed`"]
    if use_cpu:  # deepspeed chooses once, when it is imported
        os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime import config as library
    from deepspeed.runtime import lr_schedules

    named, values, models = f"--deepspeed {path}", drop_auto(config), library.DeepSpeedConfigModel.__subclasses__()
    fields = {n: f.annotation for m in models for name, f in m.model_fields.items() for n in (name, f.alias or name)}
    asked, problems = Asked(), []
    library.DeepSpeedConfig._initialize_params(SimpleNamespace(), asked)
    known = {**asked.known, **dict.fromkeys(FURTHER_KEYS)}
    problems += [f"{named}: no such key: {key}{suggest(key, known)}" for key in config if key not in known]
    for section, keys in SECTIONS.items():
        if isinstance(config.get(section), dict):
            unknown, absent = set(config[section]) - {*keys.split()}, f"{named}: no such key: {section}."
            problems += [f"{absent}{key}{suggest(key, keys.split())}" for key in sorted(unknown)]
    for key, value in (values | {k: "auto" for k in BLOCKS if config.get(k) == "auto"}).items():
        kind = int if key in WHOLE else type(known.get(key))
        kind = dict if key in BLOCKS else kind
        good = {float: is_number(value), int: is_number(value) and value == int(value) and value >= 1}
        if key in known and known[key] is not None or kind in (int, dict):
            if not good.get(kind, isinstance(value, kind)) and key not in ("pipeline", "communication_data_type"):
                problems.append(f"{named}: {key} is {json.dumps(value)}; must be {NAMES.get(kind, kind.__name__)}")
    for name in ("offload_param", "offload_optimizer"):
        part = look_up(config, f"zero_optimization.{name}")
        if isinstance(part, dict) and part.get("device") == "nvme" and not Path(str(part.get("nvme_path"))).is_dir():
            problems.append(f"{named}: {name}.nvme_path {part.get('nvme_path')}: there is no such folder")
    problems += find_nested_problems(named, {k: v for k, v in config.items() if k not in SECTIONS}, fields)
    problems += find_block_problems(named, config, library.DEEPSPEED_OPTIMIZERS, lr_schedules)
    stage = look_up(config, "zero_optimization.stage") if "zero_optimization" in config else 0
    none = [f"{named}: zero_optimization has no stage; write 0 to 3"] * (stage == "auto")
    return problems or find_library_problems(named, values, library, fields) or none


def find_nested_problems(named: str, config: dict, fields: dict, inside: bool = False) -> list[str]:
    """What deepspeed's own look leaves out: unknown keys that are "auto", and true or false for a number."""
    problems = []
    for key, value in config.items():
        if isinstance(value, dict):
            problems += find_nested_problems(named, value, fields, inside=True)
        elif inside and value == "auto" and key not in FILLED:
            problems.append(f'{named}: {key} is "auto", which the trainer does not fill in{suggest(key, FILLED)}')
        elif key == "allgather_bucket_size" and is_number(value) and value % 2:
            problems.append(f"{named}: {key} is {value}; must be even")
        elif inside and isinstance(value, bool) and "int" in (kind := str(fields.get(key))) and "bool" not in kind:
            problems.append(f"{named}: {key} is {json.dumps(value)}; must be a number")
    return problems


def find_block_problems(named: str, values: dict, optimizers: list[str], lr_schedules) -> list[str]:
    """Types and parameters of the optimizer and the scheduler block that there are not."""
    problems = []
    for block in ("optimizer", "scheduler"):
        part = values.get(block, {})
        kind, params = (part.get("type"), part.get("params", {})) if isinstance(part, dict) else (None, {})
        if kind is None or not isinstance(params, dict):
            problems += [f"{named}: {block} must have a type, and params as an object"] if block in values else []
            continue
        names = optimizers if block == "optimizer" else lr_schedules.VALID_LR_SCHEDULES
        known = ADAM.split() if str(kind).lower() in ("adam", "adamw") else params
        if block == "scheduler" and kind in names:
            known = [*inspect.signature(getattr(lr_schedules, kind)).parameters][1:]
        elif block == "scheduler" or str(kind).lower() not in names and not hasattr(torch.optim, str(kind)):
            said = f"must be one of {', '.join(names)}{suggest(str(kind), names)}"
            problems.append(f"{named}: {block}.type {kind}: {said}")
        absent = f"{named}: no such key: {block}.params."
        problems += [f"{absent}{key}{suggest(key, known)}" for key in params if key not in known]
        wrong = [k for k, v in params.items() if k in NUMERIC.split() and v != "auto" and not is_number(v)]
        problems += [f"{named}: {block}.params.{k} is {json.dumps(params[k])}; must be a number" for k in wrong]
    return problems


def drop_auto(value):
    """A DeepSpeed file's content without what the trainer fills in."""
    if not isinstance(value, dict):
        return value
    return {key: drop_auto(part) for key, part in value.items() if part != "auto"}


def find_library_problems(named: str, values: dict, library, fields: dict) -> list[str]:
    """What deepspeed itself says of a file: by field where it is one of its models, else in one sentence."""
    try:
        library._reject_removed_config_keys(values)
        library.DeepSpeedConfig._initialize_params(SimpleNamespace(), values)
    except Exception as error:  # whatever it raises
        said = []
        for one in getattr(error, "errors", list)():
            key, first = str(one["loc"][-1]), one["loc"][0]
            section = [name for name, part in values.items() if isinstance(part, dict) and first in part][:1]
            where = ".".join(map(str, [*section, *one["loc"]]))
            wrong = f"no such key: {where}{suggest(key, fields)}"
            words = f"{where} is {json.dumps(one['input'], default=str)}: {one['msg']}"
            said.append(f"{named}: {wrong if one['type'] == 'extra_forbidden' else words}")
        return said or [f"{named}: {' '.join(str(error).split()) or type(error).__name__}"]
    return []
