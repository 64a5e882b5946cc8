#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.17", "datasets", "evaluate", "accelerate", "rouge-score", "nltk", "matplotlib",
#   "sentencepiece",
# ]
# ///
"""
Fine-tune T5, or any other encoder-decoder, on summarization, and read the summaries it writes.

One GPU:
    python run_summarization.py --model_name_or_path t5-small --do_train --do_eval --train_file train.csv \
        --validation_file validation.csv --source_prefix "summarize: " --output_dir out --optim adafactor \
        --num_train_epochs 8 --bf16 --per_device_train_batch_size 64 --predict_with_generate

Several GPUs:
    deepspeed run_summarization.py --deepspeed ds_configs/zero2.json --model_name_or_path t5-large ... --bf16

A smoke run on the CPU, under a minute (no flag says CPU: where there is no accelerator, the script says so itself):
    python run_summarization.py --model_name_or_path tiny-t5 --do_train --do_eval --train_file train.csv \
        --validation_file validation.csv --output_dir out --max_steps 20 --max_eval_samples 50 --predict_with_generate
"""

import argparse
import atexit
import csv
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
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import transformers
from datasets import load_dataset
from transformers import (
    Adafactor,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EncoderDecoderModel,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled

try:  # the optional companion beside this script
    import zero_adafactor
except ModuleNotFoundError:
    zero_adafactor = None

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ constants

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Source and summary column of well-known data sets, by their column names, tried in this order.
KNOWN_COLUMNS = (
    ("review_body", "review_headline"),
    ("review_body", "review_title"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "summary"),
    ("text", "summary"),
    ("description", "abstract"),
    ("document", "title"),
    ("text", "title"),
)

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

# T5's activations leave fp16's range: the loss turns NaN (https://github.com/huggingface/transformers/issues/4586).
FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop")

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

# One model, or the two that a warm start joins.
MODEL_FLAGS = ("model_name_or_path", "encoder_name_or_path", "decoder_name_or_path")


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer to fine-tune from."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model's folder, or its name on the hub."}
    )
    encoder_name_or_path: str | None = field(
        default=None, metadata={"help": "Instead, a warm start: the encoder, a BERT-like model (folder or hub name)."}
    )
    decoder_name_or_path: str | None = field(
        default=None, metadata={"help": "Its decoder, GPT-2- or BERT-like; the cross attention starts random."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration, if not the model's own."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    use_fast_tokenizer: bool = field(default=True, metadata={"help": "Use a tokenizer of the tokenizers library."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token for private and gated models; never logged. Default: the login's."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a hub model. Only for code you have read."}
    )
    pure_bf16: bool = field(
        default=False,
        metadata={
            "help": "Weights, gradients and arithmetic in bf16 with stochastic rounding: 4 bytes a parameter in all. "
            "With --optim adafactor and zero_adafactor.py, without --deepspeed. `--optim_args step_in_backward=true` "
            "frees each gradient at once: near 2 bytes; one process, no accumulation, --max_grad_norm 0."
        },
    )
    resize_position_embeddings: bool | None = field(
        default=None,
        metadata={"help": "Resize learned position embeddings where --max_source_length exceeds them (not for T5)."},
    )


@dataclass
class DataTrainingArguments:
    """Which data to train and evaluate on, and how it is cut and scored."""

    lang: str | None = field(default=None, metadata={"help": "Language id for mBART-like tokenizers, e.g. en_XX."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset's name on the hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_column: str | None = field(
        default=None, metadata={"help": "Column of the full texts. Default: a known name, else the first column."}
    )
    summary_column: str | None = field(
        default=None, metadata={"help": "Column of the summaries. Default: a known name, else the second column."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training data: .csv, .json, .jsonl or .parquet."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Data for --do_predict, same formats."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenise again instead of using the cache."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes for tokenisation."})
    max_source_length: int = field(default=1024, metadata={"help": "Longest source in tokens; the rest is cut."})
    max_target_length: int = field(default=128, metadata={"help": "Longest target in tokens; the rest is cut."})
    val_max_target_length: int | None = field(
        default=None,
        metadata={"help": "The same in evaluation, and the length generated. Default: --max_target_length."},
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad to the maximum lengths rather than to the longest row of the batch."}
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Train on a batch's rows end to end instead of padded: the same batches, losses and gradients in "
            "about half the time. T5 and mT5 only; other models are padded."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only this many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only this many validation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use only this many test rows."})
    num_beams: int = field(default=1, metadata={"help": "Beams when generating in evaluation and prediction."})
    ignore_pad_token_for_loss: bool = field(default=True, metadata={"help": "Leave padding out of the loss."})
    source_prefix: str | None = field(
        default=None, metadata={"help": 'Text put before every source; T5 was trained with "summarize: ".'}
    )
    forced_bos_token: str | None = field(
        default=None, metadata={"help": "First generated token, for mBART-like models: the target language."}
    )
    rouge_language: str = field(
        default="en",
        metadata={
            "help": "Language ROUGE counts words in: `en` stems as rouge_score does and knows only ASCII; any other "
            "code counts Unicode words, and single letters of unspaced scripts (Japanese, Chinese, Thai)."
        },
    )

    def __post_init__(self):
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


SUMMARIZATION_ARGUMENTS = (ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments)


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


def find_argument_problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong with the arguments as one message each, found without a download or a model."""
    problems = []
    if not (args.do_train or args.do_eval or args.do_predict):
        problems.append("nothing to do: give --do_train, --do_eval or --do_predict")
    if args.output_dir is None:
        problems.append("--output_dir is missing: where the model and the results go")
    for task, split in (("do_train", "train"), ("do_eval", "validation"), ("do_predict", "test")):
        if getattr(args, task) and args.dataset_name is None and getattr(args, f"{split}_file") is None:
            problems.append(f"--{task} needs --{split}_file or --dataset_name")
    for flag in ("train_file", "validation_file", "test_file"):
        if getattr(args, flag) is not None:
            problems += [f"--{flag} {p}" for p in find_file_problems(getattr(args, flag), args)]
    for flag in ("max_source_length", "max_target_length", "num_beams"):
        if getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    for flag in ("max_train_samples", "max_eval_samples", "max_predict_samples", "preprocessing_num_workers"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more; leave the flag out for all")
    problems += find_model_problems(args)
    problems += find_deepspeed_problems(args)
    problems += find_optimizer_problems(args)
    problems += find_tracking_problems(args)
    if args.output_dir is not None:
        problems += find_output_problems(args)
    return problems


def find_file_problems(path: str, args: argparse.Namespace) -> list[str]:
    """What is wrong with one data file, as `path[:line]: what, and the way out`; reads it once, line by line."""
    file_type = FILE_TYPES.get(Path(path).suffix.lower())
    if not os.path.isfile(path):
        return [f"{path}: there is no such file"]
    if file_type is None:
        return [f"{path}: unknown ending; known are {', '.join(FILE_TYPES)}"]
    if os.path.getsize(path) == 0:
        return [f"{path}: the file is empty"]
    try:
        columns, num_rows = {"csv": scan_csv, "json": scan_json, "parquet": scan_parquet}[file_type](path)
    except UsageError as error:
        return [str(error)]
    if num_rows == 0:
        return [f"{path}: the file holds no rows"]
    problems = []
    for flag in ("text_column", "summary_column"):
        name = getattr(args, flag)
        if name is not None and name not in columns:
            problems.append(f"{path}: has no column {name!r} (--{flag}); it has {', '.join(columns)}")
    if len(columns) < 2:
        problems.append(f"{path}: needs a column of texts and one of summaries; it has only {', '.join(columns)}")
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


def find_model_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the model folders, and --fp16 with a model that overflows in it."""
    flags = tuple(flag for flag in MODEL_FLAGS if getattr(args, flag) is not None)
    if flags not in (MODEL_FLAGS[:1], MODEL_FLAGS[1:]):
        given = " and ".join(f"--{flag}" for flag in flags) or "none of them"
        return [f"give --model_name_or_path, or --encoder_name_or_path and --decoder_name_or_path; this has {given}"]
    problems = [p for flag in flags for p in find_problems_of_one(flag, getattr(args, flag), args.fp16)]
    if len(flags) == 2 and args.config_name is not None:
        problems.append("--config_name: goes with --model_name_or_path; leave it out")
    return problems


def find_problems_of_one(flag: str, name: str, fp16: bool) -> list[str]:
    """What is wrong with the model `name` that --flag gave."""
    folder = Path(name)
    looks_local = folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not (folder / "config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        return [f"--{flag} {name}: {what}; give a model folder or a name on the hub"]
    model_type = name.lower()
    if looks_local:
        try:
            model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
        except ValueError as error:
            return [f"--{flag} {name}: config.json is not JSON: {error}"]
    is_t5 = model_type in FP16_OVERFLOWS if looks_local else re.search(r"(^|[/_-])(m|um|long|flan-)?t5", model_type)
    if fp16 and is_t5:
        return ["--fp16: T5 overflows in fp16 and the loss turns NaN; use --bf16"]
    return []


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


# ------------------------------------------------------------------------------------------------ data


def load_raw_datasets(data_args, model_args):
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
            file_type = FILE_TYPES[Path(path).suffix.lower()]
            # Without this pandas reads the headlines "None" and "NA" as missing.
            options = {"keep_default_na": False} if file_type == "csv" else {}
            try:
                raw[split] = load_dataset(
                    file_type, data_files={split: path}, split=split, cache_dir=model_args.cache_dir, **options
                )
            except datasets.exceptions.DatasetGenerationError as error:
                raise UsageError(f"{path}: cannot be read as {file_type}: {error.__cause__ or error}") from error
    return raw


def find_columns(columns: list[str], text_column: str | None, summary_column: str | None) -> tuple[str, str]:
    """The source and the summary column: as named, else a known pair, else the first two."""
    for flag, name in (("--text_column", text_column), ("--summary_column", summary_column)):
        if name is not None and name not in columns:
            raise UsageError(f"{flag} {name}: no such column; there are {', '.join(columns)}")
    known = next((pair for pair in KNOWN_COLUMNS if set(pair) <= set(columns)), tuple(columns[:2]))
    if len(known) < 2:
        raise UsageError(f"a column of texts and one of summaries are needed; there is only {', '.join(columns)}")
    return text_column or known[0], summary_column or known[1]


def find_unusable_rows(texts: list, summaries: list) -> list[int]:
    """Indices of the rows whose text or summary is missing or only white space."""
    pairs = enumerate(zip(texts, summaries, strict=True))
    return [i for i, pair in pairs if not all(value is not None and str(value).strip() for value in pair)]


def tokenize_rows(
    rows: dict, tokenizer, text_column: str, summary_column: str, prefix: str, limits: dict, writer=None
) -> dict:
    """
    Tokenise a batch of rows: `input_ids`, `attention_mask` and `labels`, lists of ints, cut to `limits`.

    Also `source_cut` and `target_cut`, whether a row lost tokens. limits: max_source_length, max_target_length (in
    tokens), pad_to_max_length, ignore_pad_token_for_loss. writer: tokenizer of a warm-started decoder's targets.
    """
    padding = "max_length" if limits["pad_to_max_length"] else False
    sources = [prefix + str(text) for text in rows[text_column]]
    targets = [str(text) for text in rows[summary_column]]
    features = tokenizer(sources, max_length=limits["max_source_length"], truncation=True, padding=padding)
    labels, target_cut = tokenize_targets(targets, tokenizer, writer, limits["max_target_length"])
    if padding:
        pad = -100 if limits["ignore_pad_token_for_loss"] else (writer or tokenizer).pad_token_id
        labels = [row + [pad] * (limits["max_target_length"] - len(row)) for row in labels]
    result = {"input_ids": features["input_ids"], "attention_mask": features["attention_mask"], "labels": labels}
    result["source_cut"] = find_cut(result["input_ids"], limits["max_source_length"], sources, tokenizer, "text")
    return result | {"target_cut": target_cut}


def tokenize_targets(texts: list[str], tokenizer, writer, limit: int) -> tuple[list[list[int]], list[bool]]:
    """
    Labels of at most `limit` tokens, and whether a row lost some: what the model's tokenizer makes of a target.

    A warm-started decoder's (`writer`) was made for inputs: BERT's puts CLS in front, which the decoder is given as
    its start, and GPT-2's no end behind. So labels are the bare tokens and one end token.
    """
    if writer is None:
        labels = tokenizer(text_target=texts, max_length=limit, truncation=True)["input_ids"]
        return labels, find_cut(labels, limit, texts, tokenizer, "text_target")
    whole = writer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [row[: limit - 1] + [writer.eos_token_id] for row in whole], [len(row) >= limit for row in whole]


def find_cut(ids: list[list[int]], limit: int, texts: list[str], tokenizer, argument: str) -> list[bool]:
    """Which texts are longer than `limit` tokens; only rows that fill the limit are tokenised again."""
    full = [i for i, row in enumerate(ids) if len(row) >= limit]
    whole = tokenizer(**{argument: [texts[i] for i in full]})["input_ids"] if full else []
    cut = {i for i, row in zip(full, whole, strict=True) if len(row) > limit}
    return [i in cut for i in range(len(ids))]


def prepare_split(raw, split: str, max_samples: int | None, tokenizer, writer, data_args, training_args):
    """
    Tokenise one split and say what was kept, cut and left out. Returns (raw rows kept, tokenised rows).

    Raises UsageError if the split is missing or has no usable row.
    """
    if split not in raw:
        raise UsageError(f"--dataset_name {data_args.dataset_name}: has no split {split!r}; it has {', '.join(raw)}")
    rows = raw[split]
    text_column, summary_column = find_columns(rows.column_names, data_args.text_column, data_args.summary_column)
    rows = rows.select_columns([text_column, summary_column])
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    bad = find_unusable_rows(rows[text_column][:], rows[summary_column][:])
    kept = rows.select(sorted(set(range(len(rows))) - set(bad))) if bad else rows
    if len(kept) == 0:
        raise UsageError(f"{split}: none of the {len(rows)} rows has a text and a summary")
    limits = {
        "max_source_length": data_args.max_source_length,
        "max_target_length": data_args.max_target_length if split == "train" else data_args.val_max_target_length,
        "pad_to_max_length": data_args.pad_to_max_length,
        "ignore_pad_token_for_loss": data_args.ignore_pad_token_for_loss,
    }
    settings = {"tokenizer": tokenizer, "prefix": data_args.source_prefix or "", "limits": limits}
    settings["writer"] = None if writer is tokenizer else writer
    with training_args.main_process_first(desc=f"tokenising {split}"):
        tokenized = kept.map(
            tokenize_rows,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=kept.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            fn_kwargs={"text_column": text_column, "summary_column": summary_column, **settings},
            desc=f"Tokenising {split}",
        )
    if training_args.process_index == 0:
        report_split(split, rows, tokenized, bad)
    kept = kept.rename_columns({text_column: "source", summary_column: "reference"})
    return kept, tokenized.remove_columns(["source_cut", "target_cut"])


def report_split(split: str, rows, tokenized, bad: list[int]) -> None:
    """Print what was read, used, cut and left out, and the first rows left out by their index from 0."""
    named = f": rows {', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''}" if bad else ""
    print(
        f"{split}: {len(rows)} rows read, {len(tokenized)} used ({' -> '.join(rows.column_names)}), "
        f"{sum(tokenized['source_cut'][:])} sources and {sum(tokenized['target_cut'][:])} targets cut, "
        f"{len(bad)} without a text or a summary left out{named}",
        flush=True,
    )


# ------------------------------------------------------------------------------------------------ model


def load_model(model_args, data_args, training_args):
    """
    (tokenizer of the sources, tokenizer of the targets, model), with evaluation's generation settings in the model.

    The tokenizers are one object but for a warm-started model.
    """
    named = " ".join(f"--{flag} {getattr(model_args, flag)}" for flag in MODEL_FLAGS if getattr(model_args, flag))
    try:
        tokenizer, writer, model = load_parts(model_args)
    except OSError as error:
        raise UsageError(f"{named}: cannot be loaded: {error}") from None
    except ValueError as error:
        if "Unrecognized" in str(error) or "is not prepared" in str(error):
            raise UsageError(f"{named}: is no encoder-decoder: {str(error)[:200]}") from None
        raise
    halves = [(model, tokenizer)] if writer is tokenizer else [(model.encoder, tokenizer), (model.decoder, writer)]
    for half, known in halves:
        if len(known) > half.get_input_embeddings().num_embeddings:
            logger.warning("the tokenizer has more tokens than the model: the embeddings grow to %d", len(known))
            half.resize_token_embeddings(len(known))
    set_generation_defaults(model, writer, data_args, training_args)
    resize_positions(model, model_args, data_args)
    if writer is not tokenizer:
        check_positions(*halves, data_args, training_args)
    return tokenizer, writer, model


def load_parts(model_args):
    """Tokenizers and model as they are, from a folder or the hub, or joined from two."""
    hub = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    whole, encoder, decoder = (getattr(model_args, flag) for flag in MODEL_FLAGS)
    fast = {"use_fast": model_args.use_fast_tokenizer, **hub}
    tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or whole or encoder, **fast)
    config = AutoConfig.from_pretrained(model_args.config_name or whole or decoder, **hub)
    # fp32 here: transformers 5 would keep a bf16 file in bf16, where small updates are lost unless they are
    # rounded stochastically. Under DeepSpeed the bf16 copy is made from these weights.
    dtype = torch.bfloat16 if model_args.pure_bf16 else torch.float32
    if whole:
        model = AutoModelForSeq2SeqLM.from_pretrained(whole, config=config, dtype=dtype, **hub)
    else:
        reader = AutoModel.from_pretrained(encoder, dtype=dtype, **hub)
        if reader.config.is_encoder_decoder:
            raise UsageError(f"--encoder_name_or_path {encoder}: is an encoder-decoder; use --model_name_or_path")
        config.is_decoder = config.add_cross_attention = True  # from_pretrained makes what the decoder lacks
        speaker = AutoModelForCausalLM.from_pretrained(decoder, config=config, dtype=dtype, **hub)
        model = EncoderDecoderModel(encoder=reader, decoder=speaker).to(dtype)
        model.config._name_or_path = encoder  # the model card has room for one name
    if model.config.model_type != "encoder-decoder":
        return tokenizer, tokenizer, model
    saved = Path(whole or "") / "decoder_tokenizer"
    writer = AutoTokenizer.from_pretrained(decoder or (saved if saved.is_dir() else whole), **fast)
    set_up_pair(model, tokenizer, writer)
    return tokenizer, writer, model


def set_up_pair(model, tokenizer, writer) -> None:
    """Give an encoder and a decoder that never met the special tokens and the size that other models have."""
    for half in (tokenizer, writer):  # BERT's ends are named CLS and SEP, GPT-2 has no padding
        half.bos_token = half.bos_token or half.cls_token
        half.eos_token = half.eos_token or half.sep_token
        half.pad_token = half.pad_token or half.eos_token
    for settings in (model.config, model.config.decoder, model.generation_config):
        settings.decoder_start_token_id = settings.bos_token_id = writer.bos_token_id
        settings.eos_token_id, settings.pad_token_id = writer.eos_token_id, writer.pad_token_id
    model.config.hidden_size = model.config.decoder.hidden_size  # "auto" in a ZeRO-3 file is counted from it
    if getattr(model.encoder, "pooler", None) is not None:
        model.encoder.pooler.requires_grad_(False)  # nothing reads it, and DDP would wait for its gradient


def check_positions(encoder: tuple, decoder: tuple, data_args, training_args) -> None:
    """Raises UsageError where a length exceeds the positions of a half, given as (model, tokenizer)."""
    for what, (half, known), flag, length in (
        ("encoder", encoder, "max_source_length", data_args.max_source_length),
        ("decoder", decoder, "max_target_length", data_args.max_target_length),
        ("decoder", decoder, "val_max_target_length", data_args.val_max_target_length),
        ("decoder", decoder, "generation_max_length", training_args.generation_max_length),
    ):
        # RoBERTa's first positions are never used: its tokenizer knows how many are left.
        limit = min(getattr(half.config, "max_position_embeddings", length), known.model_max_length)
        if length > limit:
            raise UsageError(f"--{flag} {length}: the {what} has positions for {limit} tokens; give --{flag} {limit}")


def set_generation_defaults(model, tokenizer, data_args, training_args) -> None:
    """Write the settings used for generating into the model, so that the exported folder generates the same."""
    generation = model.generation_config
    generation.max_length = training_args.generation_max_length or data_args.val_max_target_length
    generation.num_beams = training_args.generation_num_beams or data_args.num_beams
    training_args.generation_max_length, training_args.generation_num_beams = (
        generation.max_length,
        generation.num_beams,
    )
    if data_args.lang is not None:  # mBART and its like
        tokenizer.src_lang = tokenizer.tgt_lang = data_args.lang
        model.config.decoder_start_token_id = tokenizer.convert_tokens_to_ids(data_args.lang)
        generation.decoder_start_token_id = model.config.decoder_start_token_id
    if data_args.forced_bos_token is not None:
        generation.forced_bos_token_id = tokenizer.convert_tokens_to_ids(data_args.forced_bos_token)
    if generation.decoder_start_token_id is None and model.config.decoder_start_token_id is None:
        raise UsageError("the model's config has no decoder_start_token_id: it cannot start a summary")
    if data_args.source_prefix:
        model.config.task_specific_params = {"summarization": {"prefix": data_args.source_prefix}}


def resize_positions(model, model_args, data_args) -> None:
    """Models with learned positions (BART, Pegasus) take no longer source than those; T5 has none and takes any."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None or limit >= data_args.max_source_length:
        return
    if not model_args.resize_position_embeddings:
        raise UsageError(
            f"--max_source_length {data_args.max_source_length}: the model has positions for {limit} tokens; give "
            f"--max_source_length {limit} or --resize_position_embeddings true"
        )
    model.resize_position_embeddings(data_args.max_source_length)


# ------------------------------------------------------------------------------------------------ packing


# Encoder-decoders whose positions are distances, so that examples can stand anywhere in a row, and whose last step is
# the output layer alone.
PACKABLE = ("t5", "mt5", "umt5")


def spread_examples(sizes: np.ndarray, count: int) -> np.ndarray:
    """
    Distribute examples over so many rows that the longest row is short; returns each example's row.

    sizes: (examples, 2) tokens of source and target. The longest first into the emptiest row (LPT, Graham 1969), where
    a row is as full as the fuller of its two sides; then examples are swapped for as long as the fullest row shrinks.
    """
    share = sizes / (sizes.sum(axis=0) / count)  # 1: a row's even share
    rows, loads = np.zeros(len(sizes), dtype=int), np.zeros((count, 2))
    for i in np.argsort(-share.max(axis=1), kind="stable"):
        rows[i] = (loads + share[i]).max(axis=1).argmin()
        loads[rows[i]] += share[i]
    for _ in range(2 * len(sizes)):
        full = loads.max(axis=1).argmax()
        mine, others = np.flatnonzero(rows == full), np.flatnonzero(rows != full)
        if len(others) == 0:
            break
        moved = share[mine][:, None] - share[others][None]
        after = np.maximum((loads[full] - moved).max(axis=2), (loads[rows[others]] + moved).max(axis=2))
        i, j = np.unravel_index(after.argmin(), after.shape)
        if after[i, j] >= loads[full].max() - 1e-9:
            break
        loads[full] -= moved[i, j]
        loads[rows[others[j]]] += moved[i, j]
        rows[mine[i]], rows[others[j]] = rows[others[j]], full
    return rows


def pack_examples(sizes: np.ndarray) -> list[list[int]]:
    """The examples of each packed row, for the number of rows that costs least. sizes: (examples, 2) of tokens."""
    most = math.ceil(sizes[:, 0].sum() / sizes[:, 0].max())
    choices = []
    for count in sorted({max(1, round(most * share)) for share in (1.0, 0.8, 0.65, 0.5, 0.4)}):
        rows = spread_examples(sizes, count)
        source, target = (np.bincount(rows, sizes[:, side], count).max() for side in (0, 1))
        # Positions computed; attention makes one dearer with the length of its row, by a tenth at 128 in t5-small.
        choices.append((count * (source * (1 + source / 1024) + 1.5 * target), count, rows))
    _, count, rows = min(choices, key=lambda choice: choice[:2])
    return [np.flatnonzero(rows == row).tolist() for row in range(count)]


class PackingCollator:
    """
    Put a batch's rows end to end, so that few positions are padding; the batch stays what it was.

    Returns int64 input_ids, decoder_input_ids (packed rows, tokens) and labels (-100: nothing asked), and as int32 the
    number, from 1, of the example that a position belongs to (0: padding): attention_mask, decoder_attention_mask.
    """

    def __init__(self, pad_token_id: int, start_token_id: int, multiple: int | None):
        self.pad_token_id, self.start_token_id, self.multiple = pad_token_id, start_token_id, multiple or 1

    def __call__(self, features: list[dict]) -> dict[str, torch.Tensor]:
        sizes = np.array([(len(row["input_ids"]), len(row["labels"])) for row in features])
        packed = [[features[i] for i in row] for row in pack_examples(sizes)]
        starts = [[[self.start_token_id] + row["labels"][:-1] for row in rows] for rows in packed]
        starts = [[[max(token, self.pad_token_id) for token in ids] for ids in rows] for rows in starts]
        sources, labels = ([[row[name] for row in rows] for rows in packed] for name in ("input_ids", "labels"))
        return {
            "input_ids": self.join(sources, self.pad_token_id),
            "attention_mask": self.join(number_examples(sources), 0).int(),
            "decoder_input_ids": self.join(starts, self.pad_token_id),
            "decoder_attention_mask": self.join(number_examples(labels), 0).int(),
            "labels": self.join(labels, -100),
        }

    def join(self, rows: list[list[list[int]]], filler: int) -> torch.Tensor:
        """Each row's lists end to end, filled up to the longest row."""
        rows = [list(itertools.chain.from_iterable(row)) for row in rows]
        longest = -(-max(map(len, rows)) // self.multiple) * self.multiple
        return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])


def number_examples(rows: list[list[list[int]]]) -> list[list[list[int]]]:
    """In the place of every token the number of its example in the row, from 1."""
    return [[[number] * len(ids) for number, ids in enumerate(row, start=1)] for row in rows]


def keep_examples_apart(model) -> None:
    """Let encoder and decoder read the masks of PackingCollator: attention within an example only (hooks)."""
    model.get_encoder().register_forward_pre_hook(separate_sources, with_kwargs=True)
    model.get_decoder().register_forward_pre_hook(separate_targets, with_kwargs=True)


def separate_sources(encoder, args, kwargs):
    """Forward pre-hook: example numbers (rows, tokens) become an additive mask (rows, 1, tokens, tokens)."""
    numbers = kwargs.get("attention_mask")
    if numbers is not None and numbers.dtype == torch.int32:  # a plain mask is int64
        kwargs["attention_mask"] = make_additive(numbers[:, None, :, None] == numbers[:, None, None, :], encoder.dtype)
    return args, kwargs


def separate_targets(decoder, args, kwargs):
    """The same for the decoder, causal, and for its look at the sources."""
    numbers, sources = kwargs.get("attention_mask"), kwargs.get("encoder_attention_mask")
    if numbers is not None and numbers.dtype == torch.int32:
        same = numbers[:, None, :, None] == numbers[:, None, None, :]
        kwargs["attention_mask"] = make_additive(same.tril(), decoder.dtype)
        across = numbers[:, None, :, None] == sources[:, None, None, :]
        kwargs["encoder_attention_mask"] = make_additive(across, decoder.dtype)
    return args, kwargs


def make_additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """0 where attention is allowed, else the lowest number: a boolean mask is wrong under eager attention (5.23)."""
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


class CpuDropout(torch.autograd.Function):
    """
    Dropout whose mask is drawn as 16 random bits an element, and kept as a byte.

    torch draws a mask at 12 ns an element on one thread, whatever the number of threads (2.13, x86), and keeps it in
    fp32: a quarter of a packed T5 step on two cores. Four elements of one 64-bit number take 2 ns. p is rounded to
    1/65536; the seed is torch's own generator's.
    """

    @staticmethod
    def forward(ctx, values, p):
        count = values.numel()
        bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
        keep = bits.view(torch.int16)[:count].view(values.shape) >= round(p * 2**16) - 2**15
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return torch.where(keep, values * ctx.scale, 0)

    @staticmethod
    def backward(ctx, gradient):
        return torch.where(ctx.saved_tensors[0], gradient * ctx.scale, 0), None


def drop_on_cpu(values: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """torch.nn.functional.dropout by CpuDropout; everything dropped, as in torch, where p is 1."""
    if not training or p == 0:
        return values
    return values * 0 if p == 1 else CpuDropout.apply(values, p)


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


class SummarizationTrainer(TokenMeanTrainer):
    """TokenMeanTrainer that generates from the encoder's input in evaluation."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Returns (token-mean loss of the batch, generated ids or None, labels or None), all on this rank."""
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        # One row each, so that gather_for_metrics can take the rows away that only fill the last batch.
        sums = torch.stack([token_loss_sum(row, target) for row, target in zip(logits, labels, strict=True)])
        sums = torch.stack([sums.double(), labels.ne(-100).sum(dim=1).double()], dim=1)
        self.row_sums.append(self.accelerator.gather_for_metrics(sums))
        del logits
        loss = sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        prompt = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
        generated = self.model.generate(**prompt, synced_gpus=is_deepspeed_zero3_enabled(), **gen_kwargs)
        return loss, generated, labels

    def _save(self, output_dir=None, state_dict=None):
        """The stock one with the sources' tokenizer; a warm-started decoder's goes into decoder_tokenizer/."""
        writer, reader = self.processing_class, self.data_collator.tokenizer
        self.processing_class = reader
        super()._save(output_dir, state_dict)
        self.processing_class = writer
        if writer is not reader and self.args.should_save:
            writer.save_pretrained(Path(output_dir or self.args.output_dir) / "decoder_tokenizer")


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


def make_loss(label_smoothing: float):
    """
    The training loss: cross-entropy summed over the batch's tokens, over the tokens of the whole global batch.

    T5's own loss is a mean over the batch it sees, but the Trainer believes it is normalised by num_items_in_batch
    (its forward takes **kwargs) and so multiplies it by the number of processes and does not divide it by the
    accumulation steps: loss and gradients grow with both (transformers 5.23). A compute_loss_func that does
    normalise by num_items_in_batch is scaled rightly.
    """

    def loss(outputs, labels, num_items_in_batch=None):
        items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
        fused = outputs.logits.dim() == 0  # by fuse_loss_into_head
        return (outputs.logits if fused else token_loss_sum(outputs.logits, labels, label_smoothing)) / items

    return loss


class SampleCallback(TrainerCallback):
    """Prints a few validation rows with the summaries the model writes, before and after training."""

    def __init__(self, trainer, rows, features):
        self.trainer, self.rows, self.features = trainer, rows, features

    def show(self, when: str) -> None:
        """Every rank generates (ZeRO-3 needs them all), the first one prints."""
        trainer = self.trainer
        batch = trainer.data_collator(
            [{k: row[k] for k in ("input_ids", "attention_mask", "labels")} for row in self.features]
        )
        batch = trainer._prepare_inputs({k: batch[k] for k in ("input_ids", "attention_mask")})
        model = trainer.model
        model.eval()
        with torch.no_grad():
            ids = model.generate(**batch, synced_gpus=is_deepspeed_zero3_enabled())
        if trainer.args.process_index == 0:
            summaries = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
            print(f"\n=== {len(summaries)} validation rows {when} training ===")
            for row, summary in zip(self.rows, summaries, strict=True):
                print(f"source:    {shorten(row['source'])}")
                print(f"reference: {shorten(row['reference'])}")
                print(f"summary:   {shorten(summary)}\n")
            sys.stdout.flush()

    def on_train_begin(self, args, state, control, **kwargs):
        self.show("before")

    def on_train_end(self, args, state, control, **kwargs):
        self.show("after")


def shorten(text: str, width: int = 160) -> str:
    """Text on one line of at most `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 4] + " ..."


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


# ------------------------------------------------------------------------------------------------ scores


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


def decode(ids: np.ndarray, tokenizer) -> list[str]:
    """Texts of an array of token ids (rows, tokens) in which -100 is padding."""
    texts = tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
    return [text.strip() for text in texts]


def compute_rouge(predictions: list[str], references: list[str], language: str) -> dict[str, float]:
    """ROUGE of decoded texts, in percent."""
    return Rouge().compute(
        predictions=[split_sentences(t) for t in predictions],
        references=[split_sentences(t) for t in references],
        language=language,
    )


def make_metrics(tokenizer, language: str):
    """compute_metrics for the trainer: ROUGE and the mean generated length, computed on the first rank alone."""

    def compute_metrics(output) -> dict[str, float]:
        metrics = [None]
        if int(os.environ.get("RANK", 0)) == 0:
            ids = np.where(output.predictions == -100, tokenizer.pad_token_id, output.predictions)
            metrics[0] = compute_rouge(decode(ids, tokenizer), decode(output.label_ids, tokenizer), language)
            metrics[0]["gen_len"] = float(np.mean((ids != tokenizer.pad_token_id).sum(axis=1)))
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(metrics, src=0)
        return metrics[0]

    return compute_metrics


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


def score_split(trainer, rows, features, prefix: str) -> list[str] | None:
    """Evaluate on one split, log and save the metrics under `prefix`; returns the generated texts, if any."""
    output = trainer.predict(features, metric_key_prefix=prefix)
    metrics = {**output.metrics, f"{prefix}_samples": len(rows)}
    trainer.log({k: v for k, v in metrics.items() if k.startswith(prefix)})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if not trainer.args.predict_with_generate:
        return None
    return decode(output.predictions, trainer.processing_class)


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


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune, evaluate and predict as the arguments say; returns the metrics of all_results.json."""
    # Arguments first: ZeRO-3 partitions the model while it is loaded, and knows that from training_args being alive.
    model_args, data_args, training_args = parse_arguments(
        sys.argv[1:] if argv is None else argv, SUMMARIZATION_ARGUMENTS, find_argument_problems
    )
    set_up_logging(training_args)
    last_checkpoint = find_resume_checkpoint(training_args) if training_args.do_train else None
    set_seed(training_args.seed)

    # Tokenizer, model and data
    raw = load_raw_datasets(data_args, model_args)
    tokenizer, writer, model = load_model(model_args, data_args, training_args)
    splits = {}
    for wanted, split, limit in (
        (training_args.do_train, "train", data_args.max_train_samples),
        (training_args.do_eval, "validation", data_args.max_eval_samples),
        (training_args.do_predict, "test", data_args.max_predict_samples),
    ):
        if wanted:
            splits[split] = prepare_split(raw, split, limit, tokenizer, writer, data_args, training_args)

    # Trainer
    trainer = SummarizationTrainer(
        model=model,
        args=training_args,
        train_dataset=FilledRows(splits["train"][1], tokenizer.eos_token_id) if "train" in splits else None,
        eval_dataset=splits["validation"][1] if "validation" in splits else None,
        processing_class=writer,  # the trainer sets the model's start, end and padding by it
        data_collator=DataCollatorForSeq2Seq(
            tokenizer,
            model=model,
            label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else writer.pad_token_id,
            pad_to_multiple_of=8 if training_args.bf16 or training_args.fp16 or model_args.pure_bf16 else None,
        ),
        compute_metrics=make_metrics(writer, data_args.rouge_language)
        if training_args.predict_with_generate
        else None,
        compute_loss_func=make_loss(training_args.label_smoothing_factor),
    )
    use_fast_path(trainer, data_args)
    start_tracking(trainer, model_args, data_args)

    # Train
    if training_args.do_train:
        if "validation" in splits and training_args.predict_with_generate:
            rows, features = (part.select(range(min(SHOWN_SAMPLES, len(part)))) for part in splits["validation"])
            trainer.add_callback(SampleCallback(trainer, rows, features))
        if trainer.is_world_process_zero():
            print(describe_optimizer(model, training_args), describe_batch(training_args), sep="\n", flush=True)
            print(
                f"going on from {last_checkpoint}" if last_checkpoint else "starting from the model's own weights",
                flush=True,
            )
        transformers.trainer.deepspeed_load_checkpoint = load_deepspeed_checkpoint
        metrics = trainer.train(resume_from_checkpoint=last_checkpoint).metrics
        metrics["train_samples"] = len(splits["train"][0])
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)

    # Evaluate and predict: generated_predictions.jsonl holds the test rows, or the validation rows without a test
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        if split in splits:
            predictions = score_split(trainer, *splits[split], prefix)
            if predictions is not None and trainer.is_world_process_zero():
                write_predictions(
                    Path(training_args.output_dir) / "generated_predictions.jsonl", splits[split][0], predictions
                )
    trainer.save_state()
    write_reports(trainer, model_args, data_args, training_args, "summarization")
    end_tracking(trainer)
    results = Path(training_args.output_dir) / "all_results.json"
    return json.loads(results.read_text()) if trainer.is_world_process_zero() else {}


def use_fast_path(trainer, data_args) -> None:
    """Pack the training rows and make the loss without logits where the model allows it; say what is done."""
    model, training_args = trainer.model, trainer.args
    if not training_args.do_train:
        return
    known = model.config.model_type in PACKABLE
    if known and fuse_loss_into_head(model.get_output_embeddings(), training_args.label_smoothing_factor):
        trainer.loss_head = model.get_output_embeddings()
    if known and training_args.use_cpu:
        torch.nn.functional.dropout = drop_on_cpu
        model.set_attn_implementation("eager")  # as fast for T5 there, and its dropout is the one above
    packing = known and data_args.packing and data_args.ignore_pad_token_for_loss and not data_args.pad_to_max_length
    if packing:
        collator = trainer.data_collator
        keep_examples_apart(model)
        trainer.train_collator = PackingCollator(
            collator.tokenizer.pad_token_id, model.config.decoder_start_token_id, collator.pad_to_multiple_of
        )
    if trainer.is_world_process_zero():
        padded = "batches are padded" + ("" if known else f": {model.config.model_type} models cannot be packed")
        print("packing: a batch's rows stand end to end (--no_packing pads them)" if packing else padded, flush=True)


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
