#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.17", "datasets", "evaluate", "accelerate", "rouge-score", "nltk", "matplotlib",
#   "sentencepiece", "jinja2", "peft",
# ]
# ///
"""
Fine-tune Llama, or any other causal language model, on instructions and chats, and read the answers it gives.

One GPU, LoRA:
    python run_clm_instruct.py --model_name_or_path meta-llama/Llama-2-7b-chat-hf --do_train --do_eval --bf16 \
        --train_file data/train.jsonl --validation_file data/validation.jsonl --prompt_template dolly --packing \
        --max_seq_length 1024 --lora_rank 16 --learning_rate 2e-4 --output_dir out --predict_with_generate

Several GPUs, every parameter:
    deepspeed run_clm_instruct.py --deepspeed ds_configs/zero3_offload_adamw.json --model_name_or_path ... --bf16

A smoke run on the CPU, under a minute (where there is no accelerator the script says so itself):
    python run_clm_instruct.py --model_name_or_path tiny-llama --do_train --do_eval --train_file train.jsonl \
        --output_dir out --max_seq_length 256 --max_steps 20 --max_eval_samples 20 --predict_with_generate
"""

import argparse
import atexit
import bisect
import csv
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import re
import socket
import sys
import time
import warnings
import zipfile
from collections import Counter, namedtuple
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import jinja2
import numpy as np
import pyarrow.compute as pc
import torch
import transformers
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import (
    deepspeed_load_checkpoint,
    is_deepspeed_zero3_enabled,
    unset_hf_deepspeed_config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:  # the optional companion beside this script
    import zero_adafactor
except ModuleNotFoundError:
    zero_adafactor = None

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ constants

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Formats by their columns, tried in this order: (question[, context], answer), or one column of turns or of text.
KNOWN_FORMATS = (
    ("dolly", ("instruction", "context", "response")),
    ("alpaca", ("instruction", "input", "output")),
    ("chat", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("prompt", ("prompt", "completion")),
    ("prompt", ("prompt", "response")),
    ("prompt", ("question", "answer")),
    ("dolly", ("instruction", "response")),
    ("alpaca", ("instruction", "output")),
    ("text", ("text",)),
)

# What data sets call the roles, and the role that chat templates know.
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"},
}

# Chat templates, so that they are saved with the tokenizer and every later generation uses the one of the training.
# `context` is a key of ours in a user's message; where a template does not know it, it follows the content.
DOLLY_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
PROMPT_TEMPLATES = {
    # https://github.com/databrickslabs/dolly training/consts.py, with the tokenizer's EOS for its "### End"
    "dolly": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}"
    + DOLLY_INTRO
    + r"{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
    r"{{ '\n\n### Instruction:\n' + message.content }}"
    r"{% if message.context %}{{ '\n\nInput:\n' + message.context }}{% endif %}"
    r"{% elif message.role == 'assistant' %}{{ '\n\n### Response:\n' + message.content + eos_token }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:\n' }}{% endif %}",
    # https://github.com/tatsu-lab/stanford_alpaca train.py
    "alpaca": "{{ bos_token }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "{% elif messages | selectattr('context') | list %}Below is an instruction that describes a task, paired with an "
    "input that provides further context. Write a response that appropriately completes the request."
    "{% else %}" + DOLLY_INTRO + r"{% endif %}{% for message in messages %}{% if message.role == 'user' %}"
    r"{{ '\n\n### Instruction:\n' + message.content }}"
    r"{% if message.context %}{{ '\n\n### Input:\n' + message.context }}{% endif %}"
    r"{% elif message.role == 'assistant' %}{{ '\n\n### Response:' + message.content + eos_token }}{% endif %}"
    r"{% endfor %}{% if add_generation_prompt %}{{ '\n\n### Response:' }}{% endif %}",
    # https://github.com/meta-llama/llama llama/generation.py
    "llama2": r"{% set has_system = messages[0].role == 'system' %}{% for message in messages[has_system | int:] %}"
    r"{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    r"{{ raise_exception('roles must alternate: user, assistant, user, ...') }}{% endif %}"
    r"{% if message.role == 'user' %}{{ bos_token }}{{ '[INST] ' }}"
    r"{% if loop.first and has_system %}{{ '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' }}{% endif %}"
    r"{{ message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}"
    r"{% endfor %}",
    # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md; for tokenizers that know its two tokens
    "chatml": r"{% for message in messages %}"
    r"{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "plain": r"{{ bos_token }}{% for message in messages %}{{ message.content }}"
    r"{{ eos_token if message.role == 'assistant' else '\n' }}{% endfor %}",
}
DEFAULT_TEMPLATES = {"dolly": "dolly", "alpaca": "alpaca", "prompt": "plain"}

DEFAULT_MAX_SEQ_LENGTH = 1024

# Where the audit stops a run: shares of the rows, of the answers, and of the validation rows.
MAX_LEFT_OUT, MAX_UNSTOPPED, MAX_OVERLAP = 0.05, 0.10, 0.01

# What a chat template can raise.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError)

# First of the private-use characters that stand for the parts of a chat while the template's own text is found out.
FIRST_MARK = 0xF0000

# Flags of older transformers versions and what says the same today.
REPLACED_FLAGS = {
    "--overwrite_output_dir": "nothing is overwritten: name another --output_dir or remove the old folder",
    "--evaluation_strategy": "use --eval_strategy",
    "--group_by_length": "use --train_sampling_strategy group_by_length",
    "--warmup_ratio": "use --warmup_steps with a value below 1, e.g. --warmup_steps 0.1",
    "--logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "--no_cuda": "use --use_cpu",
    "--use_auth_token": "use --token, or log in with `hf auth login`",
    "--per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
}

# What must agree between the DeepSpeed file and the flags: the file's keys, the flag, the trainer's field.
DEEPSPEED_TWINS = (
    (("train_micro_batch_size_per_gpu",), "per_device_train_batch_size"),
    (("gradient_accumulation_steps",), "gradient_accumulation_steps"),
    (("gradient_clipping",), "max_grad_norm"),
    (("bf16", "enabled"), "bf16"),
    (("fp16", "enabled"), "fp16"),
)

# Letters that are written without spaces between words: kana, CJK ideographs, Thai, Lao, Khmer, Burmese.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f"

# What --report_to needs, the first name being what to install.
TRACKERS = {"mlflow": ("mlflow",), "tensorboard": ("tensorboardX", "tensorboard")}

SHOWN_SAMPLES = 5


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


class RowError(ValueError):
    """Why a row cannot be trained on; rows are counted by it."""


# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class CausalModelArguments:
    """Which model, configuration and tokenizer to fine-tune from, and which parameters."""

    model_name_or_path: str = field(metadata={"help": "A folder with a model, or a model's name on the hub."})
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token for private and gated models; never logged. Default: the login's."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a hub model. Only for code you have read."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "sdpa, eager, flash_attention_2, flex_attention. Default: the library's choice."},
    )
    pure_bf16: bool = field(
        default=False,
        metadata={
            "help": "Weights, gradients and arithmetic in bf16 with stochastic rounding: 4 bytes a parameter in all. "
            "With --optim adafactor and zero_adafactor.py, without --deepspeed. `--optim_args step_in_backward=true` "
            "frees each gradient at once: near 2 bytes; one process, no accumulation, --max_grad_norm 0."
        },
    )
    lora_rank: int = field(default=0, metadata={"help": "Train low-rank adapters of this rank. 0: all parameters."})
    lora_alpha: float = field(default=32.0, metadata={"help": "Adapters are scaled by alpha / rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Module names with adapters, e.g. q_proj v_proj. Default: all linear ones."}
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "After training write base and adapters as one model to OUTPUT_DIR/merged."}
    )


@dataclass
class InstructDataArguments:
    """Which data to train and evaluate on, how prompts are made of it, and how it is cut and scored."""

    dataset_name: str | None = field(default=None, metadata={"help": "A dataset's name on the hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    train_file: str | None = field(
        default=None, metadata={"help": "Training data: .json, .jsonl, .csv, .parquet, or .txt for plain text."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Data for --do_predict, same formats."})
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Percent of the training data kept for validation where there is none; by prompt."},
    )
    data_format: str | None = field(
        default=None, metadata={"help": "dolly, alpaca, prompt, chat, sharegpt or text. Default: by the columns."}
    )
    text_column: str | None = field(default=None, metadata={"help": "Column of plain text to train on whole."})
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": f"{', '.join(PROMPT_TEMPLATES)}, chat (the tokenizer's own) or a Jinja file; saved with the "
            "model. Default: the tokenizer's own, else the one of the data's format."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest example in tokens; of more, context goes first, then prompt, then the answer's tail. "
            f"Default: {DEFAULT_MAX_SEQ_LENGTH}, or what the model takes if that is less."
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Pack whole examples into rows of --max_seq_length; they do not see each other."},
    )
    train_on_prompt: bool = field(default=False, metadata={"help": "Loss on every token, not on the answers only."})
    audit_only: bool = field(default=False, metadata={"help": "Show what would be trained on, and end."})
    skip_audit: bool = field(default=False, metadata={"help": "Train although the audit finds a limit broken."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again instead of using the cache."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenisation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only this many validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only this many test rows."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer generated in evaluation, in tokens."})
    num_beams: int = field(default=1, metadata={"help": "Beams when generating in evaluation and prediction."})
    rouge_language: str = field(
        default="en",
        metadata={
            "help": "Language ROUGE counts words in: `en` stems as rouge_score does and knows only ASCII; any other "
            "code counts Unicode words, and single letters of unspaced scripts (Japanese, Chinese, Thai)."
        },
    )


INSTRUCT_ARGUMENTS = (CausalModelArguments, InstructDataArguments, Seq2SeqTrainingArguments)


def parse_arguments(argv: list[str], classes: tuple, find_problems):
    """
    Turn the command line, or a .json file and flags after it, into the argument dataclasses.

    Everything find_problems(namespace) says is raised as one UsageError before the trainer's arguments are built,
    because building them already reads the DeepSpeed file and starts the process group.
    """
    parser = HfArgumentParser(classes)
    argv = join_deepspeed_flags(argv)
    replaced = [
        f"{a} is gone in transformers 5: {REPLACED_FLAGS[f]}" for a in argv if (f := a.split("=")[0]) in REPLACED_FLAGS
    ]
    if replaced:
        raise UsageError("\n".join(replaced))
    parser.set_defaults(bf16=None)
    if argv and argv[0].endswith(".json"):
        take_defaults_from_json(parser, argv.pop(0))
    namespace = parser.parse_args(argv)
    on_cpu = namespace.use_cpu or not has_accelerator()
    if on_cpu:
        namespace.use_cpu = True
    if namespace.pure_bf16:
        namespace.bf16 = False  # there is nothing left to cast
    if namespace.bf16 is None:
        namespace.bf16 = choose_bf16(namespace)
    problems = find_problems(namespace)
    if problems:
        raise UsageError("\n".join(problems))
    if namespace.deepspeed:
        become_the_only_rank()
    if on_cpu:
        prepare_cpu(namespace.deepspeed)
    try:
        return parser.parse_dict(vars(namespace))
    except ValueError as error:  # the trainer's own checks speak of its flags
        raise UsageError(str(error)) from error


def join_deepspeed_flags(argv: list[str]) -> list[str]:
    """`--deepspeed --deepspeed_config PATH`, DeepSpeed's own spelling (and Spark's distributor's), as one flag."""
    bare = [
        i for i, flag in enumerate(argv) if flag == "--deepspeed" and "".join(argv[i + 1 : i + 2])[:2] in ("", "--")
    ]
    if "--deepspeed_config" in argv:
        argv = [flag for i, flag in enumerate(argv) if i not in bare]
    return ["--deepspeed" if flag == "--deepspeed_config" else flag for flag in argv]


def take_defaults_from_json(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the values of a .json argument file the parser's defaults, so that flags after it still count."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a JSON file of arguments: {error}") from None
    unknown = sorted(set(values) - {action.dest for action in parser._actions})
    if unknown:
        raise UsageError(f"{path}: no such argument: {', '.join(unknown)}. `--help` lists all.")
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    parser.set_defaults(**values)


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another device that the trainer would use."""
    return torch.cuda.is_available() or (hasattr(torch, "accelerator") and torch.accelerator.is_available())


def choose_bf16(args: argparse.Namespace) -> bool:
    """bf16 where neither flag nor file says anything about precision and the hardware has instructions for it."""
    if args.fp16 or "ACCELERATE_MIXED_PRECISION" in os.environ:  # the latter is set by `accelerate launch`
        return False
    if args.deepspeed:
        try:
            if json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))["bf16"]["enabled"] != "auto":
                return False
        except (OSError, ValueError, LookupError, TypeError):  # find_deepspeed_problems says what is wrong with it
            return False
    if args.use_cpu:
        known = has_cpu_bf16()
    else:
        known = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    if known and int(os.environ.get("RANK", 0)) == 0:
        print("bf16: this hardware has it (--bf16 false for fp32).", flush=True)
    return known


def has_cpu_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX, AVX-512 BF16); elsewhere bf16 takes twice as long."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def become_the_only_rank() -> None:
    """`python script.py --deepspeed FILE`, without a launcher, is one rank; DeepSpeed would look for MPI and fail."""
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def prepare_cpu(deepspeed_config: str | None) -> None:
    """
    Make DeepSpeed run on the CPU without variables from the user. Every rank must call it before the model is made.

    ZeRO-3 partitions the model while it is loaded, so the process group has to stand by then (seen on deepspeed
    0.19.8: without it `train_batch_size 16 != 8 * 1 * 1`). Its shared-memory collectives are switched off in favour
    of gloo's: they would be compiled on first use (50 s and a compiler), and a process killed meanwhile leaves a
    lock on which later runs wait in silence.
    """
    # Left to itself each rank starts a thread a core; two ranks of ZeRO-3 on two cores are then 3 times slower.
    # (deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE)
    ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    threads = max(1, (os.cpu_count() or 1) // ranks)
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)))
    torch.set_num_threads(threads)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"No accelerator in use: running on the CPU (--use_cpu), {threads} threads a process.", flush=True)
    if deepspeed_config:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")


# ------------------------------------------------------------------------------------------------ checks


def find_instruct_problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments as one message each, found without a download or a model."""
    problems = []
    if not (args.do_train or args.do_eval or args.do_predict or args.audit_only):
        problems.append("nothing to do: give --do_train, --do_eval, --do_predict or --audit_only")
    if args.output_dir is None and not args.audit_only:
        problems.append("--output_dir is missing: where the model and the results go")
    has_train = args.dataset_name is not None or args.train_file is not None
    for task, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
        given = args.dataset_name is not None or getattr(args, f"{split}_file") is not None
        if getattr(args, task) and not given and not (split == "validation" and has_train and args.do_train):
            problems.append(f"--{task} needs --{split}_file or --dataset_name")
    if args.audit_only and not has_train:
        problems.append("--audit_only needs --train_file or --dataset_name")
    for flag in ("train_file", "validation_file", "test_file"):
        if getattr(args, flag) is not None:
            problems += [f"--{flag} {p}" for p in find_instruct_file_problems(getattr(args, flag), args)]
    problems += find_number_problems(args)
    problems += find_template_problems(args)
    problems += find_causal_model_problems(args)
    problems += find_lora_problems(args)
    problems += find_deepspeed_problems(args)
    problems += find_optimizer_problems(args)
    problems += find_tracking_problems(args)
    if args.output_dir is not None and not args.audit_only:
        problems += find_output_problems(args)
    return problems


def find_number_problems(args: argparse.Namespace) -> list[str]:
    """Numbers outside their range."""
    problems = []
    for flag in ("max_new_tokens", "num_beams"):
        if getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more; leave the flag out for all")
    if args.max_seq_length is not None and args.max_seq_length < 8:
        problems.append(f"--max_seq_length {args.max_seq_length}: must be 8 or more")
    if not 0 < args.validation_split_percentage < 100:
        problems.append(f"--validation_split_percentage {args.validation_split_percentage}: must lie in 0 to 100")
    return problems


def find_instruct_file_problems(path: str, args: argparse.Namespace) -> list[str]:
    """What is wrong with one data file, as `path[:line]: what, and the way out`; reads it once, line by line."""
    ending = Path(path).suffix.lower()
    if not os.path.isfile(path):
        return [f"{path}: there is no such file"]
    if ending not in FILE_TYPES and ending != ".txt":
        return [f"{path}: unknown ending; known are {', '.join(FILE_TYPES)}, .txt"]
    if os.path.getsize(path) == 0:
        return [f"{path}: the file is empty"]
    try:
        if ending == ".txt":
            columns, num_rows = ["text"], sum(bool(line.strip()) for _, line in decode_lines(path))
        else:
            columns, num_rows = {"csv": scan_csv, "json": scan_json, "parquet": scan_parquet}[FILE_TYPES[ending]](path)
        if num_rows == 0:
            return [f"{path}: the file holds no rows"]
        find_format(columns, args)
    except UsageError as error:
        return [str(error) if str(error).startswith(path) else f"{path}: {error}"]
    return []


def find_format(columns: list[str], args) -> tuple[str, tuple[str, ...]]:
    """
    The data's format and its columns: as named by --data_format or --text_column, else by the column names.

    Raises UsageError with the columns there are.
    """
    there = f"it has {', '.join(columns)}"
    if args.text_column is not None:
        if args.text_column not in columns:
            raise UsageError(f"has no column {args.text_column!r} (--text_column); {there}")
        return "text", (args.text_column,)
    known = [(name, needed) for name, needed in KNOWN_FORMATS if args.data_format in (None, name)]
    for name, needed in known:
        if set(needed) <= set(columns):
            return name, needed
    wanted = "; or ".join(f"{', '.join(needed)} ({name})" for name, needed in known)
    raise UsageError(f"needs the columns {wanted}; {there}. Rename them, or name plain text by --text_column")


def find_template_problems(args: argparse.Namespace) -> list[str]:
    """An unknown format, an unknown or broken template, and flags that make no sense for plain text."""
    problems = []
    formats = list(dict.fromkeys(name for name, _ in KNOWN_FORMATS))
    if args.data_format is not None and args.data_format not in formats:
        problems.append(f"--data_format {args.data_format}: must be one of {', '.join(formats)}")
    name = args.prompt_template
    if name is not None and name != "chat" and name not in PROMPT_TEMPLATES:
        try:
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", Path(name).read_text(encoding="utf-8"))
            )
        except OSError:
            known = ", ".join([*PROMPT_TEMPLATES, "chat"])
            problems.append(f"--prompt_template {name}: neither one of {known} nor a file that can be read")
        except (jinja2.TemplateError, UnicodeDecodeError) as error:
            problems.append(f"--prompt_template {name}: not a Jinja template: {error}")
    is_text = args.text_column is not None or args.data_format == "text" or str(args.train_file).endswith(".txt")
    if is_text:
        for flag in ("packing", "predict_with_generate"):
            if getattr(args, flag):
                why = "it is cut into full rows anyway" if flag == "packing" else "it has no answers to generate"
                problems.append(f"--{flag}: not for plain text, {why}; leave it out")
    return problems


def find_causal_model_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the model folder, and a sequence length beyond its positions."""
    name = args.model_name_or_path
    folder = Path(name)
    if not (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        return []
    if not (folder / "config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        return [f"--model_name_or_path {name}: {what}; give a model folder or a name on the hub"]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"--model_name_or_path {name}: config.json is not JSON: {error}"]
    if config.get("is_encoder_decoder"):
        return [f"--model_name_or_path {name}: is an encoder-decoder; run_summarization.py trains those"]
    limit = config.get("max_position_embeddings")
    if limit and args.max_seq_length and args.max_seq_length > limit:
        return [f"--max_seq_length {args.max_seq_length}: the model has {limit} positions; give {limit} or less"]
    return []


def find_lora_problems(args: argparse.Namespace) -> list[str]:
    """What the LoRA and kernel flags need."""
    problems = []
    if args.lora_rank < 0:
        problems.append(f"--lora_rank {args.lora_rank}: must be 1 or more, or 0 for all parameters")
    if args.lora_rank and importlib.util.find_spec("peft") is None:
        problems.append(f"--lora_rank {args.lora_rank}: needs peft: pip install peft")
    if not args.lora_rank and args.merge_lora:
        problems.append("--merge_lora: there is nothing to merge without --lora_rank")
    if args.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        problems.append("--use_liger_kernel: needs a GPU and liger-kernel: pip install liger-kernel")
    return problems


def decode_lines(path: str):
    """Yield (line number from 1, text) of a UTF-8 file; raises UsageError at the first line that is not UTF-8."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise UsageError(
                    f"{path}:{number}: not UTF-8 (byte {line[error.start]:#04x}); convert it, "
                    f"e.g. `iconv -f latin1 -t utf-8 {path}`"
                ) from None


def scan_csv(path: str) -> tuple[list[str], int]:
    """Column names and number of rows of a CSV file; raises UsageError where a row has more fields than columns."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(line for _, line in decode_lines(path))
    columns = next(reader, [])
    rows = 0
    for row in reader:
        rows += bool(row)
        if len(row) > len(columns):
            raise UsageError(
                f"{path}:{reader.line_num}: {len(row)} fields where the header has {len(columns)}; "
                "put quotes around a field that holds a comma"
            )
    return columns, rows


def scan_json(path: str) -> tuple[list[str], int]:
    """Column names and number of rows of a JSONL file or a JSON array of objects; raises UsageError if malformed."""
    columns, rows, lines = {}, 0, []
    is_array = None
    for number, line in decode_lines(path):
        if is_array is None and line.strip():
            is_array = line.lstrip().startswith("[")
        if is_array:
            lines.append(line)
        elif line.strip():
            columns.update(dict.fromkeys(parse_json_object(line, f"{path}:{number}")))
            rows += 1
    if is_array:
        try:
            array = json.loads("".join(lines))
        except ValueError as error:
            raise UsageError(f"{path}: not a JSON array: {error}") from None
        for i, row in enumerate(array):
            if not isinstance(row, dict):
                raise UsageError(f"{path}: element {i} of the array is not an object")
            columns.update(dict.fromkeys(row))
        rows = len(array)
    return list(columns), rows


def parse_json_object(line: str, where: str) -> dict:
    """One line of JSONL; raises UsageError that names `where` if it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where}: malformed JSON ({error}); each line must be one object") from None
    if not isinstance(row, dict):
        raise UsageError(f"{where}: not a JSON object but a {type(row).__name__}; each line must be one object")
    return row


def scan_parquet(path: str) -> tuple[list[str], int]:
    """Column names and number of rows of a Parquet file; raises UsageError if it is none."""
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
    except Exception as error:  # pyarrow raises several kinds
        raise UsageError(f"{path}: cannot be read as Parquet: {error}") from None
    return metadata.schema.to_arrow_schema().names, metadata.num_rows


def find_deepspeed_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the DeepSpeed file, and where it contradicts a flag."""
    path = args.deepspeed
    if path is None:
        return []
    if not os.path.isfile(path):
        return [f"--deepspeed {path}: there is no such file"]
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"--deepspeed {path}: not JSON: {error}"]
    if not isinstance(config, dict):
        return [f"--deepspeed {path}: not a JSON object"]
    problems = []
    for keys, flag in DEEPSPEED_TWINS:
        value = config
        for key in keys:
            value = value.get(key, "auto") if isinstance(value, dict) else "auto"
        if value != "auto" and value != getattr(args, flag):
            problems.append(
                f"--deepspeed {path}: {'.'.join(keys)} is {json.dumps(value)} but --{flag} is {getattr(args, flag)}; "
                f'make them equal or write "auto"'
            )
    if "optimizer" in config and args.optim != Seq2SeqTrainingArguments.__dataclass_fields__["optim"].default:
        problems.append(f"--deepspeed {path}: its optimizer block overrules --optim; remove one of the two")
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if "optimizer" not in config and offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        problems.append(
            f"--deepspeed {path}: offload_optimizer with --optim {args.optim} needs "
            '"zero_force_ds_cpu_optimizer": false'
        )
    if offload == "nvme" and args.optim == "adafactor":
        problems.append(
            f"--deepspeed {path}: offload_optimizer on nvme swaps state as large as the weights, which Adafactor's "
            'factors are not; there is next to none: write "device": "cpu"'
        )
    return problems


def find_optimizer_problems(args: argparse.Namespace) -> list[str]:
    """What --pure_bf16 and stepping in the backward pass ask for and exclude."""
    problems = []
    in_backward = "step_in_backward" in str(args.optim_args)
    needs = "--optim_args step_in_backward" if in_backward else "--pure_bf16"
    if args.pure_bf16 or in_backward:
        if args.optim != "adafactor":
            problems.append(f"{needs}: only --optim adafactor rounds and steps so, not --optim {args.optim}")
        if zero_adafactor is None:
            problems.append(f"{needs}: needs zero_adafactor.py; copy it beside this script")
        if args.deepspeed is not None:
            problems.append(f"{needs}: not under --deepspeed, which keeps fp32 weights; use torchrun or one process")
        if args.fp16:
            problems.append(f"{needs}: not with --fp16; leave it out")
    if in_backward:
        if args.gradient_accumulation_steps > 1:
            problems.append(
                f"{needs}: --gradient_accumulation_steps {args.gradient_accumulation_steps} needs "
                "the gradients of several passes; use a larger --per_device_train_batch_size or leave one out"
            )
        if args.max_grad_norm > 0:
            problems.append(
                f"{needs}: --max_grad_norm {args.max_grad_norm} needs all gradients at once; give "
                "--max_grad_norm 0 (Adafactor clips each update itself)"
            )
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            problems.append(f"{needs}: works in one process only; start it with `python`")
    return problems


def find_tracking_problems(args: argparse.Namespace) -> list[str]:
    """A tracker that is not installed, and a folder as MLflow's address."""
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    problems = [
        f"--report_to {name}: {packages[0]} is not installed; `pip install {packages[0]}`, or leave the flag out"
        for name, packages in TRACKERS.items()
        if name in names and not any(importlib.util.find_spec(package) for package in packages)
    ]
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "mlflow" in names and uri.startswith(("file:", "/", ".")) and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
        problems.append(
            f"MLFLOW_TRACKING_URI={uri}: MLflow 3 no longer writes into a folder; give sqlite:///mlflow.db, "
            "a server's URL, or leave it out"
        )
    return problems


def find_output_problems(args: argparse.Namespace) -> list[str]:
    """An output folder may be new, empty, or one whose run goes on from a checkpoint; nothing is overwritten."""
    folder = Path(args.output_dir)
    if folder.exists() and not folder.is_dir():
        return [f"--output_dir {folder}: is a file"]
    # runs/ holds TensorBoard's curves, which an attempt writes from its first second on.
    held = sorted(entry.name for entry in folder.iterdir() if entry.name != "runs") if folder.exists() else []
    if args.do_train:
        # The last file of a run; all_results.json is there before the last evaluation, which a kill may end.
        if "trainer_state.json" in held and args.resume_from_checkpoint is None:
            return [
                f"--output_dir {folder}: holds a finished run; name another folder, or go on from it with "
                "--resume_from_checkpoint CHECKPOINT"
            ]
        if held and not any(name.startswith("checkpoint-") for name in held) and args.resume_from_checkpoint is None:
            return [
                f"--output_dir {folder}: holds something else ({', '.join(held[:5])}) and no checkpoint to go on "
                "from; name another folder or empty it"
            ]
        return []
    results = [name for name in held if name in ("all_results.json", "generated_predictions.jsonl")]
    if results:
        return [f"--output_dir {folder}: already holds {', '.join(results)}; name another folder"]
    return []


# ------------------------------------------------------------------------------------------------ checkpoints


def find_resume_checkpoint(training_args) -> str | None:
    """The checkpoint to go on from: the one named, else the newest complete one in the output folder, else None."""
    named = training_args.resume_from_checkpoint
    if named is not None and named.lower() not in ("true", "false"):
        missing = explain_incomplete(named)
        if missing:
            raise UsageError(f"--resume_from_checkpoint {named}: {missing}")
        return named
    folder = Path(training_args.output_dir)
    checkpoints = [p for p in folder.glob("checkpoint-*") if p.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda p: int(p.name.split("-")[-1]), reverse=True):
        missing = explain_incomplete(path)
        if missing is None:
            return str(path)
        if training_args.process_index == 0:
            print(f"Passing over {path}: {missing}. The process was probably killed while saving.", flush=True)
    return None


def explain_incomplete(checkpoint: str | Path) -> str | None:
    """
    Why a checkpoint folder cannot be resumed from, or None if it is whole.

    The trainer writes weights, optimizer, random states and then trainer_state.json; a kill in between leaves the
    folder behind, and transformers' get_last_checkpoint picks it (seen on 5.23). torch's files are zip archives,
    whose directory stands at the end, so a torn one is told apart without reading it.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or torn"
    for path in folder.rglob("*"):
        if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
            return f"{path.relative_to(folder)} is torn"
        if path.suffix == ".safetensors" and not is_whole_safetensors(path):
            return f"{path.relative_to(folder)} is torn"
        if path.name.endswith(".index.json"):
            shards = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
            if lost := [s for s in sorted(shards) if not (folder / s).is_file()]:
                return f"{lost[0]} is missing"
    if not any((folder / name).exists() for name in ("optimizer.pt", "optimizer.bin", "latest")):
        return "the optimizer's state is missing"
    if (folder / "latest").exists():
        tag = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        ranks, states = len(list(folder.glob("rng_state*.pth"))), len(list(tag.glob("*_optim_states.pt")))
        if ranks != states or states == 0:
            return f"{states} optimizer states and {ranks} random states: not one of each for every rank"
    return None


def is_whole_safetensors(path: Path) -> bool:
    """Whether the file is as long as its header says (header: 8 bytes of length, then JSON with data offsets)."""
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


# ------------------------------------------------------------------------------------------------ chats


def to_messages(row: dict, data_format: str, columns: tuple[str, ...]) -> list[dict]:
    """
    One row of any format as chat messages: dicts of `role`, `content` and, in a user's, perhaps `context`; stripped.

    Turns after the last answer are left off. Raises RowError where something needed is missing.
    """
    if data_format in ("chat", "sharegpt"):
        turns = row[columns[0]]
    elif isinstance(row[columns[0]], list):  # prompt and completion as lists of messages
        turns = [*row[columns[0]], *(row[columns[-1]] or [])]
    else:
        context = row[columns[1]] if len(columns) == 3 else None
        user = {"role": "user", "content": row[columns[0]], "context": context}
        turns = [user, {"role": "assistant", "content": row[columns[-1]]}]
    if not isinstance(turns, list) or not turns:
        raise RowError("no turns")
    messages = [message for turn in turns if (message := read_turn(turn))["content"] or message["role"] != "system"]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()
    if not messages:
        raise RowError("no answer")
    empty = next((message["role"] for message in messages if not message["content"]), None)
    if empty is not None:
        raise RowError({"assistant": "empty answer", "user": "empty instruction"}.get(empty, f"empty {empty} turn"))
    return messages


def read_turn(turn: dict) -> dict:
    """One turn as a message; takes `role` and `content` as well as ShareGPT's `from` and `value`."""
    if not isinstance(turn, dict):
        raise RowError("a turn is not an object")
    role = turn.get("role") or turn.get("from")
    if str(role).lower() not in ROLES:
        raise RowError(f"unknown role {role!r}")
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    if isinstance(content, list | dict):
        raise RowError("a turn's content is not text")
    message = {"role": ROLES[str(role).lower()], "content": "" if content is None else str(content).strip()}
    if message["role"] == "user" and turn.get("context") and str(turn["context"]).strip():
        message["context"] = str(turn["context"]).strip()
    return message


def set_prompt_template(tokenizer, data_args, data_format: str) -> str:
    """
    Give the tokenizer the chat template that prompts are made with, so that it is saved with the model.

    Where the tokenizer starts its texts with BOS and the template does not, BOS is put in front of the template:
    transformers tokenises rendered chats without special tokens. Returns the template's name.
    """
    name = data_args.prompt_template
    if name is None:
        name = "chat" if tokenizer.chat_template else DEFAULT_TEMPLATES.get(data_format, "chat")
    if name != "chat":
        built_in = PROMPT_TEMPLATES.get(name)
        tokenizer.chat_template = built_in or Path(name).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise UsageError(
            f"--prompt_template {data_args.prompt_template or '(not given)'}: the tokenizer has no chat template; "
            f"give one of {', '.join(PROMPT_TEMPLATES)} or a Jinja file"
        )
    if starts_with_bos(tokenizer) and not writes_bos(tokenizer):
        tokenizer.chat_template = "{{ bos_token }}" + tokenizer.get_chat_template()
    if gap := find_prompt_gap(tokenizer):
        logger.warning("the chat template's prompts end differently: %s; the model is not trained on the latter", gap)
    return name


def find_prompt_gap(tokenizer) -> str | None:
    """
    What a generation's prompt ends with where that is not what stands before the answers trained on, else None.

    Some templates of reasoning models put an empty <think> block into one of the two only.
    """
    try:
        prompt = render([{"role": "user", "content": "?"}], tokenizer, add_generation_prompt=True)
        answer = [{"role": "user", "content": "?"}, {"role": "assistant", "content": chr(FIRST_MARK)}]
        trained = render(answer, tokenizer).split(chr(FIRST_MARK))[0]
    except RowError:
        return None
    same = len(os.path.commonprefix([prompt, trained]))
    return None if prompt.strip() == trained.strip() else f"{trained[same:]!r} in training, {prompt[same:]!r} later"


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer by itself puts BOS before a text."""
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def writes_bos(tokenizer) -> bool:
    """Whether the chat template puts BOS first; of one that cannot take a single question, whether it names BOS."""
    try:
        return render([{"role": "user", "content": "?"}], tokenizer).startswith(tokenizer.bos_token)
    except RowError:
        return "bos_token" in tokenizer.get_chat_template()


def takes_context(tokenizer) -> bool:
    """Whether the chat template writes a user message's `context`."""
    probe = [{"role": "user", "content": "?", "context": chr(FIRST_MARK)}]
    try:
        return chr(FIRST_MARK) in tokenizer.apply_chat_template(probe, tokenize=False)
    except TEMPLATE_ERRORS:
        return False


def render(messages: list[dict], tokenizer, add_generation_prompt: bool = False) -> str:
    """The chat as the template writes it; raises RowError with the template's own message."""
    if any("context" in message for message in messages) and not takes_context(tokenizer):
        messages = [
            {"role": m["role"], "content": "\n\n".join(filter(None, (m["content"], m.get("context"))))}
            for m in messages
        ]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the template says: {error}") from None


Segment = namedtuple("Segment", "text kind supervised")


def lay_out(structure: tuple, tokenizer) -> list[Segment]:
    """
    Where the template puts the parts of a chat, and which of it the model has to write.

    structure: (role, whether there is a context) of every message. The chat is rendered with a private-use character
    in the place of each part; what remains is the template's own text. An answer is supervised from where a
    generation would start (the prompt with add_generation_prompt, if only white space lies between) to the special
    token after it; where the last answer has none, the tokenizer's EOS is put there. So {% generation %} is not
    needed. Returns segments whose text is the template's, or the mark of a part; raises RowError.
    """
    marks = (chr(code) for code in itertools.count(FIRST_MARK))
    messages = [
        {"role": role, "content": next(marks), **({"context": next(marks)} if has_context else {})}
        for role, has_context in structure
    ]
    kinds = {m["content"]: {"user": "prompt", "assistant": "answer"}.get(m["role"], "template") for m in messages}
    kinds |= {m["context"]: "context" for m in messages if "context" in m}
    text = render(messages, tokenizer)
    for message in messages:
        if not (message["content"] in text and message.get("context", "") in text):
            raise RowError(f"the template leaves out the {message['role']} turn")
    stop = find_stop_pattern(tokenizer)
    spans = []  # (start, position of the answer, end) of what the model writes
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        at = text.index(message["content"])
        prompt = render(messages[:turn], tokenizer, add_generation_prompt=True) if turn else ""
        start = len(prompt) if text.startswith(prompt) and not text[len(prompt) : at].strip() else at
        found = stop.match(text, at + 1)
        spans.append((start, at, found.end() if found else at + 1))
    if spans[-1][2] == spans[-1][1] + 1:
        text = text[: spans[-1][2]] + tokenizer.eos_token
        spans[-1] = (*spans[-1][:2], len(text))
    segments, done = [], 0
    for start, at, end in spans:
        segments += split_at_marks(text[done:start], kinds, False)
        segments += split_at_marks(text[start : at + 1], kinds, True)
        segments += [Segment(text[at + 1 : end], "stop", True)] * (end > at + 1)
        done = end
    return segments


def find_stop_pattern(tokenizer) -> re.Pattern:
    """Matches one of the tokenizer's special tokens, but BOS, after any white space."""
    tokens = set(tokenizer.get_added_vocab()) - ({tokenizer.bos_token} - {tokenizer.eos_token})
    tokens = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return re.compile(rf"\s*({'|'.join(map(re.escape, tokens))})")


def split_at_marks(text: str, kinds: dict[str, str], supervised: bool) -> list[Segment]:
    """Segments of a piece of marked text: the template's own and the marks, in their order."""
    pieces = re.split(f"([{''.join(kinds)}])", text)
    return [Segment(piece, kinds.get(piece, "template"), supervised) for piece in pieces if piece]


def fill_in(layout: list[Segment], messages: list[dict], tokenizer) -> list[Segment]:
    """
    The layout with the parts of one chat in the place of their marks.

    Raises RowError if that is not what the template makes of this chat (it may change or drop what parts say).
    """
    parts = [part for m in messages for part in (m["content"], m.get("context")) if part is not None]
    segments = [
        s._replace(text=parts[ord(s.text) - FIRST_MARK])
        if FIRST_MARK <= ord(s.text[0]) < FIRST_MARK + len(parts)
        else s
        for s in layout
    ]
    text = "".join(s.text for s in segments)
    rendered = render(messages, tokenizer)
    if not (rendered.startswith(text) or rendered.startswith(text.removesuffix(tokenizer.eos_token))):
        raise RowError("the template changes what the turns say")
    return segments


# ------------------------------------------------------------------------------------------------ tokens


class Tokens(dict):
    """
    Text to its token ids and their (start, end) in the text; the texts given are tokenised at once, on all cores.

    On two cores a thousand texts at once take half the time of one after the other.
    """

    def __init__(self, tokenizer, texts: list[str]):
        self.settings = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
        self.tokenizer, texts = tokenizer, list(dict.fromkeys(texts))
        batch = tokenizer(texts, **self.settings) if texts else {"input_ids": [], "offset_mapping": []}
        self.update(zip(texts, zip(batch["input_ids"], batch["offset_mapping"], strict=True), strict=True))

    def __missing__(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.tokenizer(text, **self.settings)
        return encoding["input_ids"], encoding["offset_mapping"]


def find_answers(segments: list[Segment]) -> list[int]:
    """Where something supervised follows something that is not."""
    return [i for i, s in enumerate(segments) if i and s.supervised and not segments[i - 1].supervised]


def list_texts(segments: list[Segment]) -> list[str]:
    """What tokenize_segments asks for: the chat, and each prompt before an answer."""
    return ["".join(s.text for s in segments[:end]) for end in (len(segments), *find_answers(segments))]


def tokenize_chunks(chunks: list[list[Segment]], tokens: Tokens) -> tuple[list[int], np.ndarray]:
    """Token ids of segments, a chunk at a time, and (tokens, 2): the first and last segment that each token is of."""
    ids, owners, before = [], [], 0
    for chunk in chunks:
        ends = np.cumsum([len(s.text) for s in chunk])
        chunk_ids, spans = tokens["".join(s.text for s in chunk)]
        ids, spans = ids + chunk_ids, np.array(spans).reshape(-1, 2)
        letters = np.stack([spans[:, 0], np.maximum(spans[:, 1] - 1, spans[:, 0])], axis=1)  # first and last
        owners.append(before + np.searchsorted(ends, letters, side="right").clip(max=len(chunk) - 1))
        before += len(chunk)
    return ids, np.concatenate(owners)


def tokenize_segments(segments: list[Segment], tokens: Tokens) -> tuple[list[int], list[list[int]]]:
    """
    Token ids of a chat and, for each, the first and the last segment it is of.

    The chat is tokenised in one piece where each prompt then gets the tokens it will have when an answer to it is
    generated, and in pieces, prompt by answer, where it would not (GPT-2's "\\n\\n" before an answer, a token that
    holds the end of the prompt and the start of the answer).
    """
    ids, owners = tokenize_chunks([segments], tokens)
    supervised = np.array([s.supervised for s in segments])
    stop = np.array([s.kind == "stop" for s in segments])
    # A stop token may swallow the white space after it (Phi-3's <|end|>).
    alike = (stop[owners[:, 0]] | (supervised[owners[:, 0]] == supervised[owners[:, 1]])).all()
    for i, prompt in zip(find_answers(segments), list_texts(segments)[1:], strict=True):
        alike = alike and tokens[prompt][0] == ids[: np.searchsorted(owners[:, 0], i)]
    if not alike:
        chunks = [list(chunk) for _, chunk in itertools.groupby(segments, key=lambda s: s.supervised)]
        ids, owners = tokenize_chunks(chunks, tokens)
    return ids, owners.tolist()


def choose_tokens(kinds: list[str], owners: list[int], limit: int) -> tuple[list[int], str]:
    """
    Which tokens of a chat to keep, and what was cut: "", "context", "prompt" or "answer".

    What is too long loses context (from its end, oldest turn first), then prompt, then the tail.
    """
    excess, dropped, cut = len(kinds) - limit, set(), ""
    for kind in ("context", "prompt"):
        if excess > len(dropped):
            cut = kind if kind in kinds else cut
            of_kind = sorted((i for i, k in enumerate(kinds) if k == kind), key=lambda i: (owners[i], -i))
            dropped.update(of_kind[: excess - len(dropped)])
    kept = [i for i in range(len(kinds)) if i not in dropped]
    return kept[:limit], "answer" if len(kept) > limit else cut


def cut_into_segments(messages: list[dict], tokenizer, layouts: dict) -> list[Segment]:
    """One chat as segments; layouts: cache of lay_out by structure. Raises RowError."""
    structure = tuple((m["role"], "context" in m) for m in messages)
    if structure not in layouts:
        try:
            layouts[structure] = lay_out(structure, tokenizer)
        except RowError as error:
            layouts[structure] = error
    if isinstance(layouts[structure], RowError):
        raise layouts[structure]
    return fill_in(layouts[structure], messages, tokenizer)


def encode_chat(segments: list[Segment], tokens: Tokens, limit: int, train_on_prompt: bool) -> dict:
    """
    One chat as `input_ids` and `labels` (-100 where nothing is asked), and what the audit and the evaluation need.

    Raises RowError where no supervised token is left.
    """
    tokenizer = tokens.tokenizer
    ids, owners = tokenize_segments(segments, tokens)
    # A token that is also of the template's text is never cut.
    kinds = [segments[a].kind if segments[a].kind == segments[b].kind else "template" for a, b in owners]
    owners = [first for first, _ in owners]
    kept, cut = choose_tokens(kinds, owners, limit)
    asked = [train_on_prompt or segments[owners[i]].supervised for i in kept]
    input_ids = [ids[i] for i in kept]
    labels = [-100] + [t if a else -100 for t, a in zip(input_ids[1:], asked[1:], strict=True)]
    if all(label == -100 for label in labels):
        raise RowError("no room for an answer in --max_seq_length")
    stops = {bisect.bisect_right(owners, n) - 1 for n, s in enumerate(segments) if s.kind == "stop"}
    starts = [0] * segments[0].supervised + find_answers(segments)
    answers = max(bisect.bisect_right(starts, owners[kept[-1]]), 1)  # of which something is left
    last = starts[answers - 1]
    parts = [s.text for s in segments if s.kind in ("prompt", "context", "answer")]
    prompts = "\0".join(s.text for s in segments if s.kind in ("prompt", "context"))
    return {
        "input_ids": input_ids,
        "labels": labels,
        "prompt_length": sum(owners[i] < last for i in kept),
        "source": "".join(s.text for s in segments[:last]),
        "reference": next(s.text for s in segments[last:] if s.kind == "answer"),
        "cut": cut,
        "answers": answers,
        "answers_lost": len(starts) - answers,
        "stops": len(stops & set(kept)),
        "leading_bos": count_leading(input_ids, tokenizer.bos_token_id),
        "prompt_hash": hash_text(prompts),
        "row_hash": hash_text("\0".join(s.text for s in segments)),
        "special": any(token in part for token in tokenizer.all_special_tokens for part in parts),
        "problem": "",
    }


def count_leading(ids: list[int], token: int | None) -> int:
    """How often `token` stands at the front."""
    return next((i for i, other in enumerate(ids) if other != token), len(ids))


def hash_text(text: str) -> int:
    """A stable 63-bit number of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


EMPTY_ROW = {"input_ids": [], "labels": [], "prompt_length": 0, "source": "", "reference": "", "cut": ""}
EMPTY_ROW |= {
    "answers": 0,
    "answers_lost": 0,
    "stops": 0,
    "leading_bos": 0,
    "prompt_hash": 0,
    "row_hash": 0,
    "special": False,
    "problem": "",
}


def encode_chats(rows: dict, tokenizer, data_format: str, columns: tuple, limit: int, train_on_prompt: bool) -> dict:
    """A batch of rows through encode_chat; rows that cannot be used are empty and say why in `problem`."""
    layouts, chats, encoded = {}, [], []
    for values in zip(*(rows[name] for name in columns), strict=True):
        try:
            messages = to_messages(dict(zip(columns, values, strict=True)), data_format, columns)
            chats.append(cut_into_segments(messages, tokenizer, layouts))
        except RowError as error:
            chats.append(error)
    tokens = Tokens(tokenizer, [t for chat in chats if not isinstance(chat, RowError) for t in list_texts(chat)])
    for chat in chats:
        try:
            if isinstance(chat, RowError):
                raise chat
            encoded.append(encode_chat(chat, tokens, limit, train_on_prompt))
        except RowError as error:
            encoded.append({**EMPTY_ROW, "problem": str(error)})
    return {name: [row[name] for row in encoded] for name in EMPTY_ROW}


def encode_texts(rows: dict, tokenizer, column: str, limit: int) -> dict:
    """Plain texts, each ended by EOS, one after the other and cut into rows of `limit` tokens; all are supervised."""
    texts = [text for text in rows[column] if text and text.strip()]
    eos, ids = tokenizer.eos_token_id, []
    for text in texts:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        ids += tokens + [eos] * (tokens[-1:] != [eos])  # some tokenizers end texts themselves
    blocks = [ids[start : start + limit] for start in range(0, len(ids), limit)]
    encoded = [
        {**EMPTY_ROW, "input_ids": block, "labels": [-100, *block[1:]], "row_hash": hash_text(str(block))}
        for block in blocks
        if len(block) > 1
    ]
    encoded += [{**EMPTY_ROW, "problem": "empty text"}] * (len(rows[column]) - len(texts))
    return {name: [row[name] for row in encoded] for name in EMPTY_ROW}


# ------------------------------------------------------------------------------------------------ data


def load_instruct_datasets(data_args, model_args):
    """A DatasetDict with `train`, `validation` and `test` as far as they were given, from files or the hub."""
    if data_args.dataset_name is not None:
        return load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw = datasets.DatasetDict()
    for split, path in files.items():
        if path is not None:
            file_type = FILE_TYPES.get(Path(path).suffix.lower(), "text")
            # A .txt is one text, not one a line; without keep_default_na pandas reads the answer "None" as missing.
            options = {"text": {"sample_by": "document"}, "csv": {"keep_default_na": False}}.get(file_type, {})
            try:
                raw[split] = load_dataset(
                    file_type, data_files={split: path}, split=split, cache_dir=model_args.cache_dir, **options
                )
            except datasets.exceptions.DatasetGenerationError as error:
                raise UsageError(f"{path}: cannot be read as {file_type}: {error.__cause__ or error}") from error
    return raw


def encode_split(rows, split: str, max_samples: int | None, tokenizer, data_args, training_args):
    """All rows of a split, encoded, those that cannot be used included (see encode_chats)."""
    data_format, columns = find_format(rows.column_names, data_args)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    settings = {"tokenizer": tokenizer, "limit": data_args.max_seq_length}
    if data_format == "text":
        settings["column"] = columns[0]
    else:
        settings |= {"data_format": data_format, "columns": columns, "train_on_prompt": data_args.train_on_prompt}
    with training_args.main_process_first(desc=f"tokenising {split}"):
        return rows.map(
            encode_texts if data_format == "text" else encode_chats,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=rows.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            fn_kwargs=settings,
            desc=f"Tokenising {split}",
        )


def encode_splits(raw, tokenizer, data_args, training_args) -> dict:
    """
    The splits asked for, encoded. Where there is no validation data a share of the training prompts becomes it.

    Rows of the same prompt go the same way, so that no validation prompt is trained on; plain text gives its end.
    """
    wanted = {
        "train": (training_args.do_train or data_args.audit_only, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    splits = {}
    for split, (needed, limit) in wanted.items():
        if needed and split in raw:
            carve = split == "train" and training_args.do_eval and "validation" not in raw
            splits[split] = encode_split(
                raw[split], split, None if carve else limit, tokenizer, data_args, training_args
            )
        elif needed and split != "validation":
            raise UsageError(
                f"--dataset_name {data_args.dataset_name}: has no split {split!r}; it has {', '.join(raw)}"
            )
    if training_args.do_eval and "validation" not in splits:
        encoded, share = splits["train"], data_args.validation_split_percentage / 100
        if find_format(raw["train"].column_names, data_args)[0] == "text":
            chosen = np.arange(len(encoded)) >= len(encoded) * (1 - share)
        else:
            chosen = np.array(encoded["prompt_hash"][:], dtype=np.uint64) % 10_000 < share * 10_000
            chosen &= np.array(encoded["problem"][:]) == ""
        for split, mask in (("train", ~chosen), ("validation", chosen)):
            limit = wanted[split][1]
            splits[split] = encoded.select(np.flatnonzero(mask)[:limit])
    return splits


# ------------------------------------------------------------------------------------------------ audit


def count_split(encoded, expected_bos: bool) -> dict:
    """What the audit says of one split; tokens and rows as numbers, `reasons` as a Counter."""
    usable = encoded.select(find_usable(encoded))
    reasons = Counter(problem for problem in encoded["problem"][:] if problem)
    cuts = Counter(usable["cut"][:])
    tokens, supervised = count_tokens(usable)
    bos = usable["leading_bos"][:]
    return {
        "rows": len(encoded),
        "used": len(usable),
        "left_out": len(encoded) - len(usable),
        "cut_context": cuts["context"],
        "cut_prompt": cuts["prompt"],
        "cut_answer": cuts["answer"],
        "tokens": tokens,
        "supervised_tokens": supervised,
        "answers_cut_off_whole": sum(usable["answers_lost"][:]),
        "answers": sum(usable["answers"][:]),
        "answers_with_stop": sum(usable["stops"][:]),
        "rows_without_bos": sum(count == 0 for count in bos) if expected_bos else 0,
        "rows_with_two_bos": sum(count > 1 for count in bos),
        "rows_with_special_tokens_in_text": sum(usable["special"][:]),
        "duplicates": len(usable) - len(set(usable["row_hash"][:])),
        "reasons": reasons,
    }


def read_column(rows, column: str):
    """The column as pyarrow arrays of a thousand rows: ten times as fast as row by row, and never all in memory."""
    return (batch[column] for batch in rows.select_columns(column).with_format("arrow").iter(batch_size=1000))


def count_tokens(rows) -> tuple[int, int]:
    """Tokens of the rows, and those that are asked for."""
    tokens = supervised = 0
    for labels in map(pc.list_flatten, read_column(rows, "labels")):
        tokens += len(labels)
        supervised += pc.sum(pc.not_equal(labels, -100)).as_py() or 0
    return tokens, supervised


def find_usable(encoded) -> list[int]:
    """Indices of the rows without a problem."""
    return [i for i, problem in enumerate(encoded["problem"][:]) if not problem]


def find_audit_problems(counts: dict[str, dict]) -> list[str]:
    """Which limits the splits break, with the way out."""
    problems = []
    for split, c in counts.items():
        if c["used"] == 0:
            problems.append(f"{split}: none of the {c['rows']} rows can be used: {describe_reasons(c['reasons'])}")
        if c["left_out"] > MAX_LEFT_OUT * c["rows"]:
            reasons = describe_reasons(c["reasons"])
            problems.append(
                f"{split}: {c['left_out']} of {c['rows']} rows are left out: {reasons}; mend or remove them"
            )
        for name in ("rows_without_bos", "rows_with_two_bos"):
            if c[name]:
                problems.append(f"{split}: {c[name]} {name.replace('_', ' ')}: --prompt_template writes a wrong BOS")
        if c["answers"] - c["answers_with_stop"] > MAX_UNSTOPPED * c["answers"]:
            problems.append(
                f"{split}: {c['answers'] - c['answers_with_stop']} of {c['answers']} answers have no stop token, so "
                "the model would not learn to stop: raise --max_seq_length, or mend --prompt_template"
            )
        if c.get("overlap", 0) > MAX_OVERLAP * max(c["used"], 1):
            problems.append(f"{split}: {c['overlap']} of {c['used']} prompts are in the training data; remove them")
    return problems


def describe_reasons(reasons: Counter) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))


def audit(splits: dict, tokenizer, data_args, training_args) -> dict[str, dict]:
    """
    Count, show and judge what would be trained on. Returns the counts by split.

    Raises UsageError where a limit is broken, unless --skip_audit is given.
    """
    # Blocks of plain text begin anywhere.
    expected_bos = starts_with_bos(tokenizer) and any(any(encoded["answers"]) for encoded in splits.values())
    counts = {split: count_split(encoded, expected_bos) for split, encoded in splits.items()}
    trained = set(splits["train"]["prompt_hash"][:]) if "train" in splits else set()
    for split in set(splits) - {"train"}:
        counts[split]["overlap"] = sum(h in trained for h in splits[split]["prompt_hash"][:] if h)
    if training_args.process_index == 0:
        print(format_audit(counts), flush=True)
        first = next(iter(splits.values()))
        for index in find_usable(first)[:2]:
            print(show_tokens(first[index]["input_ids"], first[index]["labels"], tokenizer), flush=True)
    problems = find_audit_problems(counts)
    unusable = any(c["used"] == 0 for c in counts.values())
    if problems and (unusable or not (data_args.skip_audit or data_args.audit_only)):
        raise UsageError("\n".join([*problems, "--skip_audit trains all the same"] if not unusable else problems))
    for problem in problems:
        logger.warning("audit: %s", problem)
    return counts


def format_audit(counts: dict[str, dict]) -> str:
    """The audit as a table with a column for each split, and the reasons of rows left out below."""
    names = list(dict.fromkeys(name for c in counts.values() for name in c if name != "reasons"))
    titles = {"overlap": "prompts also in train", "rows": "rows read"}
    lines = [f"{'audit':<34}" + "".join(f"{split:>14}" for split in counts)]
    for name in names:
        cells = "".join(f"{c[name] if name in c else '-':>14}" for c in counts.values())
        lines.append(f"{titles.get(name, name.replace('_', ' ')):<34}{cells}")
        if name == "answers_with_stop":
            shares = [f"{c[name] / c['answers']:.1%}" if c["answers"] else "-" for c in counts.values()]
            shares = "".join(f"{share:>14}" for share in shares)
            lines.append(f"{'  share of answers':<34}{shares}")
    lines += [f"{split}: left out {describe_reasons(c['reasons'])}" for split, c in counts.items() if c["reasons"]]
    return "\n".join(["", *lines, ""])


def show_tokens(ids: list[int], labels: list[int], tokenizer, width: int = 110, limit: int = 400) -> str:
    """A row token by token, `|` between them, ^ under the supervised ones; the middle of a long row is left out."""
    pieces = [tokenizer.decode([i]).replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥") for i in ids]
    marked = [label != -100 for label in labels]
    if len(ids) > limit:
        half = limit // 2
        pieces = [*pieces[:half], f" ... {len(ids) - limit} tokens ... ", *pieces[-half:]]
        marked = [*marked[:half], False, *marked[-half:]]
    lines, text, marks = [], "", ""
    for piece, supervised in zip(pieces, marked, strict=True):
        if len(text) + len(piece) + 1 > width and text:
            lines += [text, marks.rstrip()]
            text = marks = ""
        text, marks = text + piece + "|", marks + ("^" if supervised else " ") * len(piece) + " "
    lines = [line for line in [*lines, text, marks.rstrip()] if line]
    asked = sum(label != -100 for label in labels)
    return "\n".join([f"--- one row: {len(ids)} tokens, {asked} supervised (^)", *lines, ""])


# ------------------------------------------------------------------------------------------------ model


def load_tokenizer(model_args, data_args):
    """Configuration and tokenizer; sets --max_seq_length where it was not given, and a pad token if there is none."""
    name, hub = model_args.model_name_or_path, hub_options(model_args)
    try:
        config = AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, use_fast=True, **hub)
    except OSError as error:
        raise UsageError(explain_load_error(name, error)) from None
    if not tokenizer.is_fast:
        raise UsageError(
            f"--tokenizer_name {model_args.tokenizer_name or name}: has no fast tokenizer (tokenizer.json)"
        )
    if tokenizer.eos_token is None:
        raise UsageError(f"--tokenizer_name {model_args.tokenizer_name or name}: has no EOS token to stop with")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is left out of the loss by position, EOS stays in it
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LENGTH
    if data_args.max_seq_length is None:
        data_args.max_seq_length = min(DEFAULT_MAX_SEQ_LENGTH, positions)
    if data_args.max_seq_length > positions:
        raise UsageError(f"--max_seq_length {data_args.max_seq_length}: the model has {positions} positions")
    return config, tokenizer


def hub_options(model_args) -> dict:
    """What every from_pretrained needs to know about the hub."""
    return {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }


def explain_load_error(name: str, error: Exception) -> str:
    """What to do when a model cannot be loaded; gated models need a licence accepted and a login."""
    if "gated" in str(error).lower():
        return (
            f"--model_name_or_path {name}: is a gated model. Accept its licence at https://huggingface.co/{name}, "
            "then log in with `hf auth login` or give --token; a local folder with the model needs neither"
        )
    return f"--model_name_or_path {name}: cannot be loaded: {error}"


def load_causal_model(config, tokenizer, model_args, training_args):
    """The model, with adapters if asked for, and with the template's stop tokens in its generation settings."""
    name = model_args.model_name_or_path
    # fp32 here: transformers 5 would keep a bf16 file in bf16, where small updates are lost unless they are rounded
    # stochastically. Frozen weights under adapters are not updated and may stay in bf16.
    low = model_args.pure_bf16 or (model_args.lora_rank and training_args.bf16)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype=torch.bfloat16 if low else torch.float32,
            attn_implementation=model_args.attn_implementation,
            **hub_options(model_args),
        )
    except (OSError, ImportError) as error:
        raise UsageError(explain_load_error(name, error)) from None
    except ValueError as error:
        if "Unrecognized" in str(error) or "attn" in str(error).lower() or "attention" in str(error).lower():
            raise UsageError(f"--model_name_or_path {name}: {str(error)[:300]}") from None
        raise
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        logger.warning("the tokenizer has more tokens than the model: the embeddings grow to %d", len(tokenizer))
        model.resize_token_embeddings(len(tokenizer))
    stops = find_stop_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if model_args.lora_rank:
        model = add_adapters(model, model_args, training_args)
    return model


def find_stop_ids(tokenizer, generation_config) -> list[int]:
    """Ids that end an answer: the template's stop token first, the tokenizer's EOS, and what the model came with."""
    known = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    if tokenizer.chat_template:
        try:
            last = lay_out((("user", False), ("assistant", False)), tokenizer)[-1]
            ids = tokenizer(last.text.strip(), add_special_tokens=False)["input_ids"][-1:] + ids
        except RowError:  # a template that wants more than a question and an answer
            pass
    return [i for i in dict.fromkeys(ids) if i is not None]


def add_adapters(model, model_args, training_args):
    """LoRA adapters on the model (https://arxiv.org/abs/2106.09685) by peft; everything else is frozen."""
    import peft

    settings = peft.LoraConfig(
        r=model_args.lora_rank,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()  # else no gradient enters the first checkpointed block
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {' '.join(model_args.lora_target_modules or [])}: {error}") from None


def merge_adapters(trainer, model_args) -> None:
    """
    Write base and adapters as one plain model to OUTPUT_DIR/merged, in the base's own dtype; on the first rank alone.

    The base is loaded afresh: the trained one may be partitioned (ZeRO-3). Summed in fp32.
    """
    if not trainer.is_world_process_zero():
        return
    import peft

    unset_hf_deepspeed_config()  # else from_pretrained would partition and wait for the other ranks
    name, folder = model_args.model_name_or_path, Path(trainer.args.output_dir)
    hub = hub_options(model_args)
    stored = AutoConfig.from_pretrained(name, **hub).dtype or torch.float32
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **hub)
    if len(trainer.processing_class) > base.get_input_embeddings().num_embeddings:
        base.resize_token_embeddings(len(trainer.processing_class))
    merged = peft.PeftModel.from_pretrained(base, folder).merge_and_unload().to(stored)
    merged.generation_config = trainer.model.generation_config
    merged.save_pretrained(folder / "merged")
    trainer.processing_class.save_pretrained(folder / "merged")
    print(f"base and adapters as one model: {folder / 'merged'}", flush=True)


# ------------------------------------------------------------------------------------------------ packing


def pack_lengths(lengths: list[int], capacity: int) -> list[list[int]]:
    """
    Best-fit decreasing: indices of `lengths` in bins that hold at most `capacity`; no length is split.

    A bit mask of the room that bins have left finds the tightest fit in one step, so a million lengths take seconds.
    """
    bins, by_room, rooms = [], [[] for _ in range(capacity + 1)], 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            chosen = by_room[room].pop()
            rooms ^= (not by_room[room]) << room
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        by_room[room - length].append(chosen)
        rooms |= 1 << (room - length)
    return bins


class PackedRows(torch.utils.data.Dataset):
    """Whole examples in rows of at most `capacity` tokens; position_ids restart at 0 with each."""

    def __init__(self, rows, capacity: int):
        self.rows = rows
        lengths = [n for ids in read_column(rows, "input_ids") for n in pc.list_value_length(ids).to_pylist()]
        self.bins, self.tokens = pack_lengths(lengths, capacity), sum(lengths)

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict:
        rows = [self.rows[i] for i in self.bins[index]]
        return {
            "input_ids": [token for row in rows for token in row["input_ids"]],
            "labels": [label for row in rows for label in row["labels"]],
            "position_ids": [position for row in rows for position in range(len(row["input_ids"]))],
        }


@dataclass
class InstructCollator:
    """
    Pads rows on the right: labels with -100, and use_cache off.

    Packed rows get position_ids and no attention_mask: from positions that restart, and only without a cache, the
    library makes a block-diagonal mask itself (measured on SDPA and eager, transformers 5.23; a boolean 4-D mask is
    silently wrong on eager). `flatten`: all in one row, which FlashAttention's variable-length kernel wants.
    `by_example`: with cu_seq_lens_q for attend_by_example.
    """

    pad_token_id: int
    packed: bool = False
    flatten: bool = False
    multiple: int = 1
    by_example: bool = False

    def __call__(self, rows: list[dict]) -> dict:
        rows = [{k: row[k] for k in ("input_ids", "labels", "position_ids") if k in row} for row in rows]
        for row in rows:
            row.setdefault("position_ids", range(len(row["input_ids"])))
        if self.flatten:
            rows = [{k: [x for row in rows for x in row[k]] for k in rows[0]}]
        longest = max(len(row["input_ids"]) for row in rows)
        longest += -longest % self.multiple
        spare = [longest - len(row["input_ids"]) for row in rows]
        pairs = list(zip(rows, spare, strict=True))
        batch = {
            "input_ids": torch.tensor([[*row["input_ids"], *[self.pad_token_id] * n] for row, n in pairs]),
            "labels": torch.tensor([[*row["labels"], *[-100] * n] for row, n in pairs]),
            "use_cache": False,
        }
        if self.packed:
            batch["position_ids"] = torch.tensor([[*row["position_ids"], *range(n)] for row, n in pairs])
            if self.by_example:
                starts = batch["position_ids"].eq(0).flatten().nonzero().flatten()
                batch["cu_seq_lens_q"] = torch.nn.functional.pad(starts, (0, 1), value=longest * len(rows))
        else:
            batch["attention_mask"] = torch.tensor([[1] * (longest - n) + [0] * n for n in spare])
        return batch


def attend_by_example(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
    """
    In the place of the library's SDPA: of packed rows each example by itself; cu_seq_lens_q says where they begin.

    A mask computes first what it then hides: on two cores a step of 2,048 tokens a row takes 1.6 times as long, one of
    512 tokens 1.05 times. query: (rows, heads, tokens, width); key, value: alike, with their own heads; cu_seq_lens_q:
    (examples + 1,), in the rows laid end to end. Returns (rows, tokens, heads, width) and, as the library does, None.
    """
    if cu_seq_lens_q is None or kwargs.get("sliding_window"):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = cu_seq_lens_q.diff().tolist()
    flat = (states.transpose(1, 2).flatten(0, 1).split(lengths) for states in (query, key, value))
    parts = [
        sdpa_attention_forward(module, *(part.transpose(0, 1)[None] for part in example), None, **kwargs)[0][0]
        for example in zip(*flat, strict=True)
    ]
    return torch.cat(parts).unflatten(0, (len(query), -1)), None


def attends_by_example(trainer) -> bool:
    """Switch attend_by_example on where it is sound and faster: for SDPA on the CPU. True if it is on."""
    config, device = trainer.model.config, trainer.args.device
    if config.model_type not in FUSABLE or config._attn_implementation != "sdpa" or device.type != "cpu":
        return False
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend_by_example
    return True


def use_packing(trainer, data_args) -> None:
    """Let the trainer train on packed rows, after a check that its attention keeps the examples apart."""
    packed = PackedRows(trainer.train_dataset.rows, data_args.max_seq_length)
    filler = trainer.processing_class.eos_token_id
    flash = "flash" in (trainer.model.config._attn_implementation or "")
    trainer.train_dataset = FilledRows(packed, filler)
    collator = trainer.data_collator
    multiple = 1 if flash else collator.multiple
    apart = attends_by_example(trainer)
    trainer.train_collator = InstructCollator(collator.pad_token_id, True, flash, multiple, apart)
    trainer.add_callback(PackingCheck(trainer))
    if trainer.is_world_process_zero():
        print(
            f"packing: {len(packed.rows)} examples in {len(packed)} rows of {data_args.max_seq_length}, "
            f"{packed.tokens / len(packed) / data_args.max_seq_length:.1%} full",
            flush=True,
        )


class PackingCheck(TrainerCallback):
    """Compares packed with single examples before the first step, and refuses where the attention mixes them."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        gap = measure_packing(self.trainer)
        # bf16 keeps 8 bits; an attention that mixes examples moves logits by as much as they are large
        limit = 3e-2 if args.bf16 or self.trainer.model.dtype == torch.bfloat16 else 1e-3
        if gap > limit:
            raise UsageError(
                f"--packing: the attention in use ({self.trainer.model.config._attn_implementation}) lets packed "
                f"examples see each other (logits off by {gap:.2g}); use --attn_implementation sdpa, or no --packing"
            )
        if args.process_index == 0:
            print(f"packing: examples packed or alone give the same logits (to {gap:.1e} of the largest)", flush=True)


def measure_packing(trainer) -> float:
    """Largest difference of the logits of two packed examples from those of each alone, over the largest logit."""
    packed = trainer.train_dataset.rows
    chosen = next((b for b in packed.bins if len(b) > 1), None)
    if chosen is None:
        return 0.0
    rows = [{k: packed.rows[i][k][:64] for k in ("input_ids", "labels")} for i in chosen[:2]]
    positions = [position for row in rows for position in range(len(row["input_ids"]))]
    both = {k: rows[0][k] + rows[1][k] for k in rows[0]} | {"position_ids": positions}
    model = trainer.model.eval()
    logits = []
    for batch in ([both], rows[:1], rows[1:]):
        collator = trainer.train_collator if batch == [both] else trainer.data_collator
        inputs = trainer._prepare_inputs(collator(batch))
        length = sum(len(row["input_ids"]) for row in batch)
        inputs.pop("labels")
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits.append(model(**inputs).logits[0, :length].float())
    alone = torch.cat(logits[1:])
    return ((logits[0] - alone).abs().max() / alone.abs().max()).item()


# ------------------------------------------------------------------------------------------------ training


class FilledRows(torch.utils.data.Dataset):
    """Rows of a tokenised dataset by index, and at index -1 a filler that asks for no token and so has no loss."""

    def __init__(self, rows, filler_token: int):
        self.rows = rows
        self.filler = {"input_ids": [filler_token], "attention_mask": [1], "labels": [-100]}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.filler if index < 0 else self.rows[index]


class FilledSampler(torch.utils.data.Sampler):
    """
    Random order, seeded by seed and epoch, then -1 until the last batch of every rank is full.

    Left to itself accelerate fills the last batches with rows from the front, which are then trained on twice, and
    how many there are depends on the number of ranks.
    """

    def __init__(self, num_rows: int, multiple: int, seed: int):
        self.num_rows, self.fill, self.seed, self.epoch = num_rows, -num_rows % multiple, seed, 0

    def __len__(self) -> int:
        return self.num_rows + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.num_rows, generator=generator).tolist()
        yield from [-1] * self.fill


class TokenMeanTrainer(Seq2SeqTrainer):
    """
    Seq2SeqTrainer whose losses are means over target tokens, in training (a compute_loss_func) and in evaluation.

    The stock evaluation averages batch means and, at several ranks, counts the rows that fill the last batch twice.
    A subclass's prediction_step appends to self.row_sums what it gathered: float64 (rows, 2 or more) of summed loss,
    number of tokens and what else it counts.
    """

    train_collator = None  # of the training rows, where they are packed
    loss_head = None  # the output layer, where it makes the loss itself (fuse_loss_into_head)

    def get_train_dataloader(self):
        """The stock one; packed rows have a collator of their own."""
        plain = self.data_collator
        self.data_collator = self.train_collator or plain
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(self, model, inputs, *args, **kwargs):
        """The stock one, with the labels at hand where the output layer makes the loss."""
        if self.loss_head is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self.loss_head.labels = inputs["labels"]
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.loss_head.labels = None

    def _get_train_sampler(self, train_dataset=None):
        """The seeded random order of FilledSampler; other strategies and --dataloader_drop_last as in the library."""
        if self.args.train_sampling_strategy != "random" or self.args.dataloader_drop_last:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        multiple = self.args.per_device_train_batch_size * self.args.world_size if self.args.world_size > 1 else 1
        return FilledSampler(len(self.train_dataset), multiple, seed)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """The stock choice, with ZeroAdafactor in the place of Adafactor where zero_adafactor.py is at hand."""
        optimizer_class, kwargs = Seq2SeqTrainer.get_optimizer_cls_and_kwargs(args, model)
        if optimizer_class is Adafactor and zero_adafactor is not None:
            optimizer_class = zero_adafactor.ZeroAdafactor
        return optimizer_class, kwargs

    def create_optimizer(self, model=None):
        """The stock one; with `--optim_args step_in_backward=true` it steps inside the backward pass."""
        made = self.optimizer is not None
        super().create_optimizer(model)
        if not made and "step_in_backward" in str(self.args.optim_args):
            self.optimizer.step_in_backward()
        return self.optimizer

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """The stock loop, with every row gathered once and the loss taken over the tokens of the whole set."""
        self.row_sums = []
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.sums = torch.cat(self.row_sums).sum(dim=0).tolist()
        output.metrics[f"{metric_key_prefix}_loss"] = self.sums[0] / self.sums[1]
        return output


class InstructTrainer(TokenMeanTrainer):
    """TokenMeanTrainer for causal models: token accuracy and perplexity, and with predict_with_generate answers."""

    answer_config: GenerationConfig | None = None
    rouge_language = "en"

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Returns (token-mean loss of the batch, None, None); answers are generated in evaluation_loop."""
        inputs = self._prepare_inputs(inputs)
        labels = shift_labels(inputs.pop("labels"))
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        # One row each, so that gather_for_metrics can take the rows away that only fill the last batch.
        sums = torch.stack([token_loss_sum(row, target) for row, target in zip(logits, labels, strict=True)])
        right = (logits.argmax(dim=-1) == labels).sum(dim=1)
        sums = torch.stack([sums.double(), labels.ne(-100).sum(dim=1).double(), right.double()], dim=1)
        self.row_sums.append(self.accelerator.gather_for_metrics(sums))
        return sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1), None, None

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """Adds perplexity and token accuracy and, with predict_with_generate, ROUGE and the share of ended answers."""
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        loss, tokens, right = self.sums
        scores = {"perplexity": math.exp(min(loss / tokens, 700)), "token_accuracy": right / tokens}
        if self.args.predict_with_generate:
            self.answers = generate_answers(self, dataloader.dataset)
            scores |= score_answers(self.answers, dataloader.dataset["reference"], self.rouge_language)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


# Causal models whose attention is plain and whose last step is the output layer alone (others cap or scale, or add
# losses of their own).
FUSABLE = ("gemma", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels (rows, tokens) moved one to the left: what each position has to predict; -100 at the end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


LOSS_PIECE = 1024  # tokens whose logits stand in memory at once: 131 MB of fp32 at 32,000 words


class HeadLoss(torch.autograd.Function):
    """
    Summed cross-entropy of an output layer's logits, which are made and dropped a piece at a time.

    hidden: (tokens, width); weight: (vocabulary, width); labels: (tokens,) of ids. The gradients are made in the
    forward pass, while the piece is there (Liger's fused linear cross-entropy, Hsu et al. 2024, arXiv 2410.10989);
    softmax and sums are in fp32, products in autocast's dtype or the hidden states'.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, label_smoothing):
        device, count = hidden.device.type, weight.shape[0]
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        matrix, total = weight.to(dtype), hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for piece, target, grad in zip(
            *(part.split(LOSS_PIECE) for part in (hidden, labels, hidden_grad)), strict=True
        ):
            piece, target = piece.to(dtype), target[:, None]
            logits = (piece @ matrix.T).float()
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += norm.sum() - (1 - label_smoothing) * logits.gather(1, target).sum()
            if label_smoothing:
                total -= label_smoothing * logits.mean(dim=1).sum()
            slope = logits.sub_(norm).exp_().sub_(label_smoothing / count)
            slope.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=torch.float32))
            slope = slope.to(dtype)
            grad.copy_(slope @ matrix)
            if weight_grad is not None and weight_grad.dtype == dtype:
                weight_grad.addmm_(slope.T, piece)  # in place: no second matrix of this size
            elif weight_grad is not None:
                weight_grad += slope.T @ piece
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, scale):
        hidden_grad, weight_grad = ctx.saved_tensors
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(ctx.weight_dtype)
        return (hidden_grad * scale).to(hidden_grad.dtype), weight_grad, None, None


def fuse_loss_into_head(head: torch.nn.Module, label_smoothing: float, place_labels=lambda labels: labels) -> bool:
    """
    Make the output layer return, while head.labels is set, their summed loss in the place of logits.

    place_labels moves labels to the positions that predict them. Positions that ask for nothing are left out, and
    tokens x vocabulary never stands in memory at once. False where the layer is more than a matrix.
    """
    if type(head) is not torch.nn.Linear or head.bias is not None:
        return False
    make_logits, head.labels = head.forward, None

    def forward(hidden):
        if head.labels is None:
            return make_logits(hidden)
        labels = place_labels(head.labels)
        asked = labels.ne(-100)
        return HeadLoss.apply(hidden[asked], head.weight, labels[asked], label_smoothing)

    head.forward = forward
    return True


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy in fp32. logits: (..., vocabulary); labels: (...) of ids, -100 where nothing is asked."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )


def make_shifted_loss(label_smoothing: float):
    """The training loss: cross-entropy of each next token, summed, over the tokens of the whole global batch."""

    def loss(outputs, labels, num_items_in_batch=None):
        labels = shift_labels(labels)
        items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        fused = outputs.logits.dim() == 0  # by fuse_loss_into_head
        return (outputs.logits if fused else token_loss_sum(outputs.logits, labels, label_smoothing)) / items

    return loss


def describe_optimizer(model, training_args) -> str:
    """Which optimizer it is; under ZeRO, what the stock Adafactor costs there."""
    if training_args.optim != "adafactor":
        return f"optimizer: {training_args.optim.value}"
    if zero_adafactor is not None:
        return "optimizer: ZeroAdafactor of zero_adafactor.py: factored and the same on any number of ranks"
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    if training_args.deepspeed is None:
        return "optimizer: Adafactor of transformers (zero_adafactor.py is not beside this script)"
    return (
        "WARNING: zero_adafactor.py is not beside this script, and under ZeRO the Adafactor of transformers does not "
        f"factor: {4 * count / 1e9:.2f} GB of state (4 bytes a parameter), updates that depend on the number of ranks"
    )


def load_deepspeed_checkpoint(engine, checkpoint_path: str, load_module_strict: bool = True) -> None:
    """
    In the place of the trainer's function of that use: also loads what other ranks or another ZeRO stage saved.

    Raises UsageError where the optimizer is not ZeroAdafactor, whose state alone can follow.
    """
    saved = list((Path(checkpoint_path) / (Path(checkpoint_path) / "latest").read_text().strip()).glob("*.pt"))
    ranks = sum(path.name.endswith("_optim_states.pt") for path in saved)
    partitioned = any("zero_pp_rank" in path.name for path in saved if path.name.endswith("_model_states.pt"))
    if (ranks, partitioned) == (engine.dp_world_size, engine.zero_optimization_stage() == 3):
        return deepspeed_load_checkpoint(engine, checkpoint_path, load_module_strict)
    if zero_adafactor is None or not isinstance(engine.basic_optimizer, zero_adafactor.ZeroAdafactor):
        raise UsageError(
            f"{checkpoint_path} was saved on {ranks} processes at ZeRO stage {'3' if partitioned else '1 or 2'}: go "
            "on like that, or use --optim adafactor with zero_adafactor.py, whose checkpoints go on anywhere"
        )
    if engine.global_rank == 0:
        print(f"{checkpoint_path} was saved on {ranks} processes; going on with {engine.dp_world_size}", flush=True)
    zero_adafactor.load_zero_checkpoint(engine, checkpoint_path)


def describe_batch(training_args) -> str:
    """The effective batch, spelt out."""
    per, ranks, steps = (
        training_args.per_device_train_batch_size,
        training_args.world_size,
        training_args.gradient_accumulation_steps,
    )
    return f"effective batch {per * ranks * steps} = {per} rows x {ranks} processes x {steps} accumulation steps"


# ------------------------------------------------------------------------------------------------ answers


def generate_answers(trainer, rows) -> list[tuple[str, bool, int]]:
    """
    An answer to the last prompt of every row: (text, whether it ended by itself, tokens), on every rank.

    Longest prompts first, so that a lack of memory shows at once. Ranks take equal shares, the last rows repeated,
    because under ZeRO-3 all must generate together.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    prompts = [row["input_ids"][: row["prompt_length"]] for row in rows.select_columns(["input_ids", "prompt_length"])]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    share = args.per_device_eval_batch_size
    order += order[-1:] * (-len(order) % (share * args.world_size))
    answers = {}
    model = trainer.model.eval()
    starts = range(args.process_index * share, len(order), share * args.world_size)
    for start in tqdm(starts, desc="Generating", disable=args.disable_tqdm or args.process_index > 0):
        chosen = order[start : start + share]
        longest = max(len(prompts[i]) for i in chosen)
        spare = [longest - len(prompts[i]) for i in chosen]
        pad = tokenizer.pad_token_id
        batch = {
            "input_ids": torch.tensor([[pad] * n + prompts[i] for i, n in zip(chosen, spare, strict=True)]),
            "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in spare]),
        }
        with torch.no_grad(), trainer.compute_loss_context_manager():
            ids = model.generate(
                **trainer._prepare_inputs(batch),
                generation_config=trainer.answer_config,
                synced_gpus=is_deepspeed_zero3_enabled(),
            )
        for i, tokens in zip(chosen, ids[:, longest:].tolist(), strict=True):
            answers[i] = cut_at_stop(tokens, tokenizer, trainer.answer_config.eos_token_id)
    if args.world_size > 1:
        parts = [None] * args.world_size
        torch.distributed.all_gather_object(parts, answers)
        answers = {i: answer for part in parts for i, answer in part.items()}
    return [answers[i] for i in range(len(prompts))]


def cut_at_stop(tokens: list[int], tokenizer, stops: list[int]) -> tuple[str, bool, int]:
    """(text up to the first stop token, whether there was one, number of tokens before it)"""
    end = next((n for n, token in enumerate(tokens) if token in stops), None)
    text = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
    return text, end is not None, len(tokens) if end is None else end


def score_answers(answers: list[tuple], references: list[str], language: str) -> dict[str, float]:
    """ROUGE of the answers in percent, the share that ended by itself, and the mean length in tokens."""
    scores = compute_rouge([text for text, _, _ in answers], list(references), language)
    scores["stopped"] = float(np.mean([stopped for _, stopped, _ in answers]))
    return scores | {"gen_len": float(np.mean([length for _, _, length in answers]))}


class AnswerCallback(TrainerCallback):
    """Prints the answers to a few validation prompts, before and after training."""

    def __init__(self, trainer, rows):
        self.trainer, self.rows = trainer, rows

    def show(self, when: str) -> None:
        answers = generate_answers(self.trainer, self.rows)
        if self.trainer.args.process_index == 0:
            print(f"\n=== {len(answers)} validation prompts {when} training ===")
            for row, (text, stopped, _) in zip(self.rows, answers, strict=True):
                print(f"prompt:    {shorten(row['source'], 400)}")
                print(f"reference: {shorten(row['reference'])}")
                print(f"answer:    {shorten(text)} [{'ended' if stopped else 'did not end'}]\n")
            sys.stdout.flush()

    def on_train_begin(self, args, state, control, **kwargs):
        self.show("before")

    def on_train_end(self, args, state, control, **kwargs):
        self.show("after")


def shorten(text: str, width: int = 160) -> str:
    """Text on one line of at most `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 4] + " ..."


class UnicodeTokenizer:
    """Words of any script for rouge_score, whose own tokenizer drops every non-ASCII letter; lower-cased."""

    pattern = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(text.lower())


class Rouge(evaluate.Metric):
    """ROUGE-1/2/L/Lsum F-measures in percent. `evaluate.load("rouge")` would download its script from the hub."""

    def _info(self):
        features = datasets.Features({"predictions": datasets.Value("string"), "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="ROUGE by rouge_score", citation="Lin 2004", features=features)

    def _compute(self, predictions, references, language="en"):
        from rouge_score import rouge_scorer

        names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
        words = {"use_stemmer": True} if language == "en" else {"tokenizer": UnicodeTokenizer()}
        scorer = rouge_scorer.RougeScorer(names, **words)
        scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
        return {name: round(100 * float(np.mean([s[name].fmeasure for s in scores])), 4) for name in names}


def split_sentences(text: str) -> str:
    """One sentence a line, as rougeLsum expects; an untrained Punkt model, so that nothing is downloaded."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    text = re.sub(r"([。！？])", r"\1 \n", text.strip())
    return "\n".join(
        s.strip() for line in text.split("\n") for s in PunktSentenceTokenizer().tokenize(line) if s.strip()
    )


def compute_rouge(predictions: list[str], references: list[str], language: str) -> dict[str, float]:
    """ROUGE of decoded texts, in percent."""
    return Rouge().compute(
        predictions=[split_sentences(t) for t in predictions],
        references=[split_sentences(t) for t in references],
        language=language,
    )


# ------------------------------------------------------------------------------------------------ results


def write_predictions(path: Path, rows, predictions: list[str]) -> None:
    """JSONL with `source`, `reference` and `prediction` a row."""
    with open(path, "w", encoding="utf-8") as stream:
        for row, prediction in zip(rows, predictions, strict=True):
            record = {"source": row["source"], "reference": row["reference"], "prediction": prediction}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def draw_curves(history: list[dict], path: Path) -> None:
    """Loss, ROUGE, learning rate and gradient norm over the steps, from the trainer's log history, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "loss": ("loss", "eval_loss"),
        "ROUGE (validation)": ("eval_rouge1", "eval_rouge2", "eval_rougeL"),
        "token accuracy (validation)": ("eval_token_accuracy",),
        "learning rate": ("learning_rate",),
        "gradient norm": ("grad_norm",),
    }
    panels = {title: names for title, names in panels.items() if any(n in entry for entry in history for n in names)}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, names) in zip(
        np.atleast_1d(figure.subplots(1, max(len(panels), 1))), panels.items(), strict=False
    ):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                axis.plot(
                    *zip(*points, strict=True), marker="o" if len(points) < 30 else None, markersize=3, label=name
                )
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


def evaluate_split(trainer, rows, prefix: str) -> None:
    """Evaluate on one split, log and save the metrics under `prefix`, and write the answers, if any."""
    metrics = trainer.predict(rows, metric_key_prefix=prefix).metrics
    metrics[f"{prefix}_samples"] = len(rows)
    trainer.log({k: v for k, v in metrics.items() if k.startswith(prefix)})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if trainer.args.predict_with_generate and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "generated_predictions.jsonl"
        write_predictions(path, rows, [text for text, _, _ in trainer.answers])


def write_reports(trainer, model_args, data_args, training_args, task: str) -> None:
    """Curves and model card; on the first rank only."""
    if not trainer.is_world_process_zero():
        return
    if trainer.state.log_history:
        draw_curves(trainer.state.log_history, Path(training_args.output_dir) / "training_curves.png")
    card = {"finetuned_from": model_args.model_name_or_path, "tasks": task}
    if data_args.dataset_name is not None:
        card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
    if training_args.do_train:
        trainer.create_model_card(**card)


# ------------------------------------------------------------------------------------------------ tracking


def start_tracking(trainer, model_args, data_args) -> None:
    """
    With --report_to mlflow, begin the one run of training, evaluation and prediction; on the first rank only.

    The trainer's callback ends the run it starts itself when training ends, and what is evaluated later would begin a
    second one (transformers 5.23). A run it finds it goes on with and leaves open, for end_tracking.
    """
    args = trainer.args
    if "mlflow" not in args.report_to or not trainer.is_world_process_zero():
        return
    import mlflow

    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
    run = mlflow.active_run() or mlflow.start_run(run_name=args.run_name)
    atexit.register(mlflow.end_run, "FAILED")  # of a run that end_tracking has ended it does nothing
    # The callback logs the trainer's flags and the model's configuration, which may have a name of ours. Asynchronous
    # as there: a run that is gone on with (MLFLOW_RUN_ID) keeps its first values, and no error is raised.
    given = {k: v for part in (model_args, data_args) for k, v in vars(part).items() if k != "token"}
    given = {f"flag.{k}" if hasattr(trainer.model.config, k) else k: v for k, v in given.items()}
    mlflow.log_params(given, synchronous=False)
    if isinstance(args.deepspeed, str):
        mlflow.log_artifact(args.deepspeed)
    print(f"MLflow run {run.info.run_name} ({run.info.run_id}) in {mlflow.get_tracking_uri()}", flush=True)


def end_tracking(trainer) -> None:
    """End the MLflow run with the results' files in it, the generated texts as a table too; on the first rank only."""
    if "mlflow" not in trainer.args.report_to or not trainer.is_world_process_zero():
        return
    import mlflow

    folder = Path(trainer.args.output_dir)
    for name in ("all_results.json", "training_curves.png", "generated_predictions.jsonl"):
        if (folder / name).is_file():
            mlflow.log_artifact(folder / name)
    if (folder / "generated_predictions.jsonl").is_file():
        rows = [json.loads(row) for _, row in decode_lines(folder / "generated_predictions.jsonl")]
        mlflow.log_table({name: [row[name] for row in rows] for name in rows[0]}, "generated_predictions.json")
    mlflow.flush_async_logging()
    mlflow.end_run()


# ------------------------------------------------------------------------------------------------ main


def make_trainer(model, tokenizer, splits: dict, data_args, training_args) -> InstructTrainer:
    """The trainer over the usable rows of the splits; these are kept as its `usable`."""
    usable = {split: encoded.select(find_usable(encoded)) for split, encoded in splits.items()}
    half = training_args.bf16 or training_args.fp16 or model.dtype == torch.bfloat16
    training_args.remove_unused_columns = False  # evaluation needs prompt_length; the collator takes what it needs
    trainer = InstructTrainer(
        model=model,
        args=training_args,
        train_dataset=FilledRows(usable["train"], tokenizer.eos_token_id) if training_args.do_train else None,
        eval_dataset=usable.get("validation"),
        processing_class=tokenizer,
        data_collator=InstructCollator(tokenizer.pad_token_id, multiple=8 if half else 1),
        # Liger's kernel fuses the loss into the last matrix product; its loss, too, is over num_items_in_batch.
        compute_loss_func=None
        if training_args.use_liger_kernel
        else make_shifted_loss(training_args.label_smoothing_factor),
    )
    if model.config.model_type in FUSABLE and not training_args.use_liger_kernel:
        head = model.get_output_embeddings()
        if fuse_loss_into_head(head, training_args.label_smoothing_factor, shift_labels):
            trainer.loss_head = head
    stops = find_stop_ids(tokenizer, model.generation_config)
    trainer.answer_config = GenerationConfig(
        max_new_tokens=data_args.max_new_tokens,
        num_beams=training_args.generation_num_beams or data_args.num_beams,
        eos_token_id=stops,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    trainer.rouge_language = data_args.rouge_language
    trainer.usable = usable
    return trainer


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune, evaluate and predict as the arguments say; returns the metrics of all_results.json."""
    # Arguments first: ZeRO-3 partitions the model while it is loaded, and knows that from training_args being alive.
    model_args, data_args, training_args = parse_arguments(
        sys.argv[1:] if argv is None else argv, INSTRUCT_ARGUMENTS, find_instruct_problems
    )
    set_up_logging(training_args)
    last_checkpoint = find_resume_checkpoint(training_args) if training_args.do_train else None
    set_seed(training_args.seed)

    # Data, tokenizer, prompts and labels; the audit before the model is loaded
    raw = load_instruct_datasets(data_args, model_args)
    data_format, columns = find_format(next(iter(raw.values())).column_names, data_args)
    config, tokenizer = load_tokenizer(model_args, data_args)
    template = set_prompt_template(tokenizer, data_args, data_format) if data_format != "text" else "none"
    splits = encode_splits(raw, tokenizer, data_args, training_args)
    if training_args.process_index == 0:
        print(f"data format: {data_format} ({', '.join(columns)}); prompt template: {template}", flush=True)
    counts = audit(splits, tokenizer, data_args, training_args)
    if data_args.audit_only:
        return counts

    # Model and trainer
    model = load_causal_model(config, tokenizer, model_args, training_args)
    trainer = make_trainer(model, tokenizer, splits, data_args, training_args)
    usable = trainer.usable
    start_tracking(trainer, model_args, data_args)

    # Train
    if training_args.do_train:
        if data_args.packing:
            use_packing(trainer, data_args)
        if "validation" in usable and training_args.predict_with_generate:
            rows = usable["validation"]
            trainer.add_callback(AnswerCallback(trainer, rows.select(range(min(SHOWN_SAMPLES, len(rows))))))
        if trainer.is_world_process_zero():
            print(describe_optimizer(model, training_args), describe_batch(training_args), sep="\n", flush=True)
            print(
                f"going on from {last_checkpoint}" if last_checkpoint else "starting from the model's own weights",
                flush=True,
            )
        transformers.trainer.deepspeed_load_checkpoint = load_deepspeed_checkpoint
        metrics = trainer.train(resume_from_checkpoint=last_checkpoint).metrics
        metrics |= {"train_samples": len(usable["train"]), "train_rows": len(trainer.train_dataset)}
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)

    # Evaluate and predict: generated_predictions.jsonl holds the test rows, or the validation rows without a test
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        if split in usable:
            evaluate_split(trainer, usable[split], prefix)
    trainer.save_state()
    write_reports(trainer, model_args, data_args, training_args, "text-generation")
    end_tracking(trainer)
    results = Path(training_args.output_dir) / "all_results.json"
    metrics = json.loads(results.read_text()) if trainer.is_world_process_zero() else {}
    if model_args.merge_lora and training_args.do_train:
        merge_adapters(trainer, model_args)
    return metrics


def set_up_logging(training_args) -> None:
    """Log at the level the arguments ask for; ranks other than the first only warn."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    level = training_args.get_process_log_level()
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(logging.WARNING)
    transformers.utils.logging.set_verbosity(level)
    # DeepSpeed 0.19 calls torch 2.13 by names it has renamed: thousands of lines in a short run under ZeRO.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    if training_args.n_gpu > 1:
        # DataParallel would scatter the rows but not the token count; one process a GPU is also much faster.
        logger.warning("%d GPUs here, one used: start with `deepspeed` or `torchrun` to use all", training_args.n_gpu)
        training_args._n_gpu = 1


def run_and_exit() -> None:
    """
    Run main() and leave with 0, or with 2 after a message the user can act on.

    Ranks leave together and by os._exit: gloo's threads sometimes abort a finished rank in the interpreter's own
    shutdown ("terminate called without an active exception", exit code 250, in about 1 of 15 two-rank runs on torch
    2.13), and the launcher then reports a failed run. Other libraries' exit handlers run before that.
    """
    try:
        main()
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            lines = str(error).split("\n")
            print("".join(f"\nerror: {line}" for line in lines), file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends every rank when the first is gone: let rank 0 speak
        os._exit(2)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    run_and_exit()
