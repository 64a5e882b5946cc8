#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "datasets", "accelerate", "sentencepiece", "jinja2"]
# ///
"""
Generate with a tuned model, encoder-decoder or causal: a table in, the same table with one more column out.

One process (a GPU where there is one, else the CPU):
    python run_generation.py --model_name_or_path out/t5-small --input_file reviews.csv --output_file summaries.csv \
        --text_column review_body --num_beams 4 --max_new_tokens 24

Several GPUs, and one summary a product:
    torchrun --nproc_per_node 4 run_generation.py --model_name_or_path out/t5-large --input_file reviews.parquet \
        --output_file products.parquet --text_column review_body --group_by product_id --min_group_size 10

A model larger than a GPU:
    deepspeed run_generation.py --deepspeed ds_configs/zero3_inference.json --model_name_or_path out/t5-11b ...
"""

import argparse
import atexit
import csv
import datetime
import hashlib
import json
import logging
import os
import resource
import socket
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from datasets import load_dataset
from tqdm.auto import tqdm
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    HfArgumentParser,
)
from transformers.generation import GenerationMode
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------ constants

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Text columns of well-known data sets, tried in this order; `messages` and `instruction` make chat prompts.
TEXT_COLUMNS = ("messages", "instruction", "prompt", "review_body", "article", "document", "dialogue", "text")

# Flags of GenerationConfig that change what generate() returns, or that this script sets itself.
NOT_FLAGS = {
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *(
        "num_return_sequences",
        "transformers_version",
        "_from_model_config",
        "is_assistant",
        "max_length",
        "min_length",
    ),
}

DEFAULT_MAX_SOURCE_LENGTH = 1024
DEFAULT_MAX_NEW_TOKENS = 128

NEVER = -1.0e9  # the score of what cannot be chosen, transformers' own
LEAVING = 8  # finished rows leave their batch when they are one in so many
# What these settings build looks at the encoder's input or keeps state by row: it cannot follow rows that leave.
BATCH_BOUND = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1.0}
BATCH_BOUND |= {"watermarking_config": None, "cache_implementation": None, "prefill_chunk_size": None}
BATCH_BOUND |= {"constraints": None, "low_memory": None, "token_healing": False}
# These read the prompt, and padding on the left would be part of it.
READS_PROMPT = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None}

# Rows that are tokenised and sorted together, while the rows before them generate.
WINDOW = 16_384


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class GenerationModelArguments:
    """Which model generates, and where."""

    model_name_or_path: str = field(metadata={"help": "A folder with a model, or a model's name on the hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of the model on the hub."})
    token: str | None = field(
        default=None, metadata={"help": "Hub token for private and gated models; never logged. Default: the login's."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with a hub model. Only for code you have read."}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "float32, bfloat16, float16, or auto: bfloat16 where the hardware multiplies it fast."},
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2. Default: the library's choice."}
    )
    assistant_model_name_or_path: str | None = field(
        default=None, metadata={"help": "A small model of the same tokenizer that drafts tokens; row by row."}
    )
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU although there is an accelerator."})
    deepspeed: str | None = field(
        default=None, metadata={"help": "A ZeRO-3 file for a model larger than one card, under `deepspeed`."}
    )
    local_rank: int = field(default=-1, metadata={"help": "Set by the launcher."})


@dataclass
class GenerationDataArguments:
    """Which table to read and write, and how it is cut into batches."""

    output_file: str | None = field(default=None, metadata={"help": "The table to write: .csv, .jsonl or .parquet."})
    input_file: str | None = field(default=None, metadata={"help": "The table: .csv, .json, .jsonl or .parquet."})
    dataset_name: str | None = field(default=None, metadata={"help": "A dataset's name on the hub, or a folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    dataset_split: str = field(default="test", metadata={"help": "Split of that dataset."})
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the texts, or of chat messages. Default: a known name. With `instruction`, a column "
            "`context` or `input` goes along."
        },
    )
    output_column: str = field(default="prediction", metadata={"help": "Name of the new column."})
    source_prefix: str | None = field(
        default=None, metadata={"help": "Text put before every text. Default: the one the model was trained with."}
    )
    max_source_length: int | None = field(
        default=None,
        metadata={
            "help": f"Longest prompt in tokens; the rest of its text is cut. Default: {DEFAULT_MAX_SOURCE_LENGTH}, "
            "or what the model takes if that is less."
        },
    )
    group_by: str | None = field(
        default=None, metadata={"help": "Summarise all texts with the same value in this column into one."}
    )
    min_group_size: int = field(default=1, metadata={"help": "Leave groups of fewer texts out."})
    max_samples: int | None = field(default=None, metadata={"help": "Use only the first rows, this many."})
    max_tokens_per_batch: int | None = field(
        default=None,
        metadata={
            "help": "Prompts are batched by length so that rows x longest prompt x beams stay below this. Default: "
            "16384 on a GPU, 8192 on a CPU."
        },
    )
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})
    measure_latency: int = field(
        default=0, metadata={"help": "Generate for this many rows one at a time and print a table of times instead."}
    )


GENERATION_ARGUMENTS = (GenerationModelArguments, GenerationDataArguments)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the two dataclasses and of all that GenerationConfig takes."""
    parser = HfArgumentParser(GENERATION_ARGUMENTS)
    group = parser.add_argument_group("decoding", "All fields of transformers' GenerationConfig; values as in JSON.")
    for name in vars(GenerationConfig()):
        if name not in NOT_FLAGS:
            group.add_argument(f"--{name}", type=parse_value, nargs="?", const=True, default=argparse.SUPPRESS)
    return parser


def parse_value(text: str):
    """A flag's value as JSON would have it (12, 0.7, true, [[3, 4]]), else the text itself."""
    try:
        return json.loads(text.lower() if text in ("True", "False", "None") else text)
    except ValueError:
        return text


def parse_generation_arguments(argv: list[str]):
    """
    The two dataclasses and a dict of the decoding flags given.

    Everything wrong that can be seen without loading a model is raised as one UsageError.
    """
    parser = make_parser()
    namespace = parser.parse_args(join_deepspeed_flags(argv))
    names = {name for cls in GENERATION_ARGUMENTS for name in cls.__dataclass_fields__}
    decoding = {name: value for name, value in vars(namespace).items() if name not in names}
    if namespace.use_cpu or not has_accelerator():
        namespace.use_cpu = True
    problems = find_generation_problems(namespace, decoding)
    if problems:
        raise UsageError("\n".join(problems))
    if namespace.deepspeed:
        become_the_only_rank()
    if namespace.use_cpu:
        prepare_cpu(namespace.deepspeed)
    model_args, data_args = parser.parse_dict({k: v for k, v in vars(namespace).items() if k in names})
    if data_args.max_tokens_per_batch is None:
        data_args.max_tokens_per_batch = 8192 if namespace.use_cpu else 16384
    return model_args, data_args, decoding


def join_deepspeed_flags(argv: list[str]) -> list[str]:
    """`--deepspeed --deepspeed_config PATH`, DeepSpeed's own spelling (and Spark's distributor's), as one flag."""
    bare = [
        i for i, flag in enumerate(argv) if flag == "--deepspeed" and "".join(argv[i + 1 : i + 2])[:2] in ("", "--")
    ]
    if "--deepspeed_config" in argv:
        argv = [flag for i, flag in enumerate(argv) if i not in bare]
    return ["--deepspeed" if flag == "--deepspeed_config" else flag for flag in argv]


def has_accelerator() -> bool:
    """Whether torch sees a GPU or another device that the trainer would use."""
    return torch.cuda.is_available() or (hasattr(torch, "accelerator") and torch.accelerator.is_available())


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


def find_generation_problems(args: argparse.Namespace, decoding: dict) -> list[str]:
    """Everything wrong with the arguments as one message each, found without a download or a model."""
    problems = []
    if (args.input_file is None) == (args.dataset_name is None):
        problems.append("give either --input_file or --dataset_name")
    if args.output_file is None and not args.measure_latency:
        problems.append("--output_file is missing: where the table goes")
    if args.output_file is not None:
        ending = Path(args.output_file).suffix.lower()
        if ending not in (".csv", ".jsonl", ".parquet"):
            problems.append(f"--output_file {args.output_file}: unknown ending; known are .csv, .jsonl, .parquet")
        if Path(args.output_file).exists():
            problems.append(f"--output_file {args.output_file}: exists and is kept; remove it first, or name another")
    if args.input_file is not None:
        problems += [f"--input_file {p}" for p in find_table_problems(args.input_file, args)]
    for flag in ("max_source_length", "max_samples", "max_tokens_per_batch", "min_group_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        problems.append(f"--dtype {args.dtype}: must be auto, float32, bfloat16 or float16")
    if args.measure_latency and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problems.append("--measure_latency: times one process; start it with `python`")
    problems += find_folder_problems("--model_name_or_path", args.model_name_or_path)
    if args.assistant_model_name_or_path is not None:
        problems += find_folder_problems("--assistant_model_name_or_path", args.assistant_model_name_or_path)
        if args.deepspeed is not None or decoding.get("num_beams", 1) != 1:
            problems.append("--assistant_model_name_or_path: not with --deepspeed or --num_beams; leave one out")
    problems += find_zero3_problems(args.deepspeed)
    return problems + find_decoding_problems(decoding)


def find_table_problems(path: str, args: argparse.Namespace) -> list[str]:
    """What is wrong with the input table, as `path[:line]: what, and the way out`."""
    ending = Path(path).suffix.lower()
    if not os.path.isfile(path):
        return [f"{path}: there is no such file"]
    if ending not in FILE_TYPES:
        return [f"{path}: unknown ending; known are {', '.join(FILE_TYPES)}"]
    if os.path.getsize(path) == 0:
        return [f"{path}: the file is empty"]
    try:
        columns, num_rows = {"csv": scan_csv, "json": scan_json, "parquet": scan_parquet}[FILE_TYPES[ending]](path)
    except UsageError as error:
        return [str(error)]
    problems = [] if num_rows else [f"{path}: the table holds no rows"]
    try:
        find_text_column(columns, args.text_column)
    except UsageError as error:
        problems.append(f"{path}: {error}")
    if args.group_by is not None and args.group_by not in columns:
        problems.append(f"{path}: has no column {args.group_by!r} (--group_by); it has {', '.join(columns)}")
    if args.output_column in columns:
        problems.append(f"{path}: already has a column {args.output_column!r}; name another by --output_column")
    return problems


def find_text_column(columns: list[str], named: str | None) -> str:
    """The column of the texts: as named, else a known name. Raises UsageError with the columns there are."""
    if named is not None and named not in columns:
        raise UsageError(f"has no column {named!r} (--text_column); it has {', '.join(columns)}")
    known = named or next((name for name in TEXT_COLUMNS if name in columns), None)
    if known is None:
        raise UsageError(f"which column holds the texts? Name it by --text_column: {', '.join(columns)}")
    return known


def find_folder_problems(flag: str, name: str) -> list[str]:
    """A model folder that is none, or that has no weights."""
    folder = Path(name)
    if not (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        return []
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        return [f"{flag} {name}: {what}; give a model folder or a name on the hub"]
    if not any(p.suffix in (".safetensors", ".bin") and "training_args" not in p.name for p in folder.iterdir()):
        return [f"{flag} {name}: the folder has no weights (*.safetensors); did the training end?"]
    return []


def find_zero3_problems(path: str | None) -> list[str]:
    """--deepspeed generates with partitioned weights only: stage 3."""
    if path is None:
        return []
    try:
        stage = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
    except (OSError, ValueError, AttributeError) as error:
        return [f"--deepspeed {path}: cannot be read as a DeepSpeed file: {error}"]
    return [] if stage == 3 else [f"--deepspeed {path}: has stage {stage}; only stage 3 spreads a model's weights"]


def find_decoding_problems(decoding: dict) -> list[str]:
    """Decoding flags that contradict each other, in transformers' own words, and values outside their range."""
    problems = []
    named = {f"--{name} {value}": value for name, value in decoding.items()}
    ranges = {"temperature": 1e-6, "num_beams": 1, "max_new_tokens": 1, "repetition_penalty": 1e-6, "top_k": 0}
    for name, least in ranges.items():
        value = decoding.get(name)
        if value is not None and (isinstance(value, bool | str) or value < least):
            problems.append(f"--{name} {value}: must be a number above {'0' if least < 1 else least - 1}")
    if problems:
        return problems
    if decoding.get("min_new_tokens", 0) > decoding.get("max_new_tokens", sys.maxsize):
        problems.append(
            f"--min_new_tokens {decoding['min_new_tokens']} is more than --max_new_tokens {decoding['max_new_tokens']}"
        )
    if decoding.get("num_beams", 1) > 1 and decoding.get("prompt_lookup_num_tokens"):
        problems.append("--prompt_lookup_num_tokens: goes with greedy decoding or sampling, not with --num_beams")
    try:
        GenerationConfig(**{"num_beams": 1, **decoding}).validate(strict=True)
    except (ValueError, TypeError) as error:
        lines = [line.removeprefix("- ").replace("`", "") for line in str(error).splitlines() if line.startswith("- ")]
        problems += lines or [f"decoding flags {', '.join(named)}: {str(error).splitlines()[0]}"]
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


# ------------------------------------------------------------------------------------------------ table


def load_table(data_args, model_args):
    """The input as a datasets.Dataset; of a CSV every column as text, so that it comes out as it went in."""
    if data_args.dataset_name is not None:
        table = load_dataset(
            data_args.dataset_name,
            data_args.dataset_config_name,
            split=data_args.dataset_split,
            cache_dir=model_args.cache_dir,
            token=model_args.token,
        )
    else:
        file_type = FILE_TYPES[Path(data_args.input_file).suffix.lower()]
        options = {}
        if file_type == "csv":
            columns = next(csv.reader(line for _, line in decode_lines(data_args.input_file)))
            features = datasets.Features({name: datasets.Value("string") for name in columns})
            options = {"features": features, "keep_default_na": False}
        try:
            table = load_dataset(
                file_type, data_files=data_args.input_file, split="train", cache_dir=model_args.cache_dir, **options
            )
        except datasets.exceptions.DatasetGenerationError as error:
            raise UsageError(
                f"--input_file {data_args.input_file}: cannot be read: {error.__cause__ or error}"
            ) from None
    data_args.text_column = find_text_column(table.column_names, data_args.text_column)
    if data_args.max_samples is not None:
        table = table.select(range(min(data_args.max_samples, len(table))))
    return table


def write_table(table, path: Path) -> None:
    """Write CSV, JSONL or Parquet by the ending; under another name first, so that a kill leaves no half file."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix.lower() == ".csv":
        table.to_csv(unfinished, index=False)
    elif path.suffix.lower() == ".jsonl":
        with open(unfinished, "w", encoding="utf-8") as stream:  # to_json rounds numbers to ten digits
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table)
    else:
        table.to_parquet(unfinished)
    os.replace(unfinished, path)


# ------------------------------------------------------------------------------------------------ prompts


class Prompts:
    """Turns a row's text into a prompt's token ids: prefix or chat template, cut to the limit."""

    def __init__(self, tokenizer, is_causal: bool, prefix: str, limit: int):
        self.tokenizer, self.prefix, self.limit = tokenizer, prefix, limit
        self.is_chat = is_causal and tokenizer.chat_template is not None
        self.special = not self.is_chat

    def render(self, text) -> str:
        """The prompt of a text, or of chat messages (a list of dicts), as text."""
        if not self.is_chat:
            return self.prefix + (text if isinstance(text, str) else "\n".join(m["content"] or "" for m in text))
        messages = [{"role": "user", "content": self.prefix + text}] if isinstance(text, str) else text
        while len(messages) > 1 and messages[-1]["role"] == "assistant":
            messages = messages[:-1]  # the answer that is to be generated
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def encode(self, texts: list) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each prompt, at most `limit`, and whether it was cut."""
        ids = self.tokenize([self.render(text) for text in texts])
        cut = [len(row) > self.limit for row in ids]
        for i in np.flatnonzero(cut):
            ids[i] = self.cut(texts[i], ids[i])
        return ids, cut

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        return self.tokenizer(prompts, add_special_tokens=self.special, verbose=False)["input_ids"] if prompts else []

    def cut(self, text, ids: list[int]) -> list[int]:
        """The prompt with as much taken from its text's end as fits; what the template adds stays."""
        if not self.is_chat:
            ending = self.tokenizer("", add_special_tokens=True)["input_ids"]
            keep = ending[-1:] if ending[-1:] == [self.tokenizer.eos_token_id] and ids[-1:] == ending[-1:] else []
            return ids[: self.limit - len(keep)] + keep
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(m) for m in text]
        longest = max(messages, key=lambda m: len(m["content"] or ""))
        excess = len(ids) - self.limit
        while excess > 0 and longest["content"]:
            words = self.tokenizer(longest["content"], add_special_tokens=False, verbose=False)["input_ids"]
            longest["content"] = self.tokenizer.decode(words[: max(len(words) - excess, 0)], skip_special_tokens=True)
            ids = self.tokenize([self.render(messages)])[0]
            excess = max(len(ids) - self.limit, 0)
        return ids[-self.limit :]


def read_texts(table, text_column: str, is_chat: bool) -> list:
    """The text of every row, or its chat messages; None where there is none."""
    columns = [name for name in (text_column, "context", "input") if name in table.column_names]
    if text_column != "instruction":
        columns = [text_column]
    texts = []
    for values in zip(*(table[name] for name in columns), strict=True):
        text, extra = values[0], next((v for v in values[1:] if v and str(v).strip()), None)
        if isinstance(text, list):
            texts.append(text or None)
        elif text is None or not str(text).strip():
            texts.append(None)
        elif extra is not None and is_chat:
            texts.append([{"role": "user", "content": str(text).strip(), "context": str(extra).strip()}])
        else:
            texts.append("\n\n".join(str(part) for part in (text, extra) if part is not None))
    return texts


# ------------------------------------------------------------------------------------------------ model


def load_generator(model_args, data_args, decoding: dict):
    """
    (model, tokenizer, tokenizer of the outputs, prompts, generation settings), on this rank's device.

    The model's own generation settings count where no flag says otherwise. Raises UsageError.
    """
    name = model_args.model_name_or_path
    hub = {
        "cache_dir": model_args.cache_dir,
        "revision": model_args.model_revision,
        "token": model_args.token,
        "trust_remote_code": model_args.trust_remote_code,
    }
    is_adapter = (Path(name) / "adapter_config.json").is_file() and not (Path(name) / "config.json").is_file()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **hub)
        is_causal = is_adapter or not AutoConfig.from_pretrained(name, **hub).is_encoder_decoder
        auto = AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM
        model = auto.from_pretrained(
            name, dtype=choose_dtype(model_args), attn_implementation=model_args.attn_implementation, **hub
        ).eval()
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"--model_name_or_path {name}: cannot be loaded: {str(error)[:400]}") from None
    writer = tokenizer
    if (Path(name) / "decoder_tokenizer").is_dir():  # a warm-started encoder-decoder of two families
        writer = AutoTokenizer.from_pretrained(Path(name) / "decoder_tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    config = make_generation_config(model, tokenizer, decoding)
    prefix = data_args.source_prefix
    if prefix is None:
        prefix = ((getattr(model.config, "task_specific_params", None) or {}).get("summarization") or {}).get(
            "prefix", ""
        )
    prompts = Prompts(tokenizer, is_causal, prefix, find_source_limit(model, tokenizer, data_args, config))
    if data_args.group_by is not None and 2 * config.max_new_tokens > prompts.limit // 2:
        raise UsageError(
            f"--max_new_tokens {config.max_new_tokens} with --group_by: summaries are summarised again, so at least "
            f"four must fit into --max_source_length {prompts.limit}; make the one smaller or the other larger"
        )
    return model, writer, prompts, config


def choose_dtype(model_args) -> torch.dtype:
    """The --dtype; `auto` is bf16 on GPUs and CPUs that have instructions for it."""
    if model_args.dtype != "auto":
        return getattr(torch, model_args.dtype)
    if not model_args.use_cpu:
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if has_cpu_bf16() else torch.float32


def has_cpu_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices in hardware (AMX, AVX-512 BF16); elsewhere bf16 takes twice as long."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("amx_bf16") or known.get("avx512_bf16"))


def make_generation_config(model, tokenizer, decoding: dict) -> GenerationConfig:
    """The model's own settings with the flags over them; settings of another decoding method are left out."""
    own = {k: v for k, v in model.generation_config.to_diff_dict().items() if k not in NOT_FLAGS}
    if "num_beams" in decoding or "do_sample" in decoding:
        # e.g. length_penalty of a model saved with beams, or temperature of one saved with sampling
        own = {k: v for k, v in own.items() if k.endswith("_token_id") or k == "max_new_tokens"}
    longest = model.generation_config.max_length if model.config.is_encoder_decoder else None
    values = {"max_new_tokens": (longest or DEFAULT_MAX_NEW_TOKENS + 1) - 1, **own, **decoding}
    values.setdefault("pad_token_id", tokenizer.pad_token_id)
    values.setdefault("eos_token_id", tokenizer.eos_token_id)
    config = GenerationConfig(**values)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UsageError(f"decoding flags with the model's own settings: {error}") from None
    if config.num_beams is None:
        config.num_beams = 1
    return config


def find_source_limit(model, tokenizer, data_args, config) -> int:
    """Longest prompt in tokens: as asked for and as the model's positions allow, an answer's room left free."""
    positions = getattr(model.config, "max_position_embeddings", None)
    encoder = getattr(model.config, "encoder", None)
    if model.config.is_encoder_decoder and encoder is not None:
        positions = getattr(encoder, "max_position_embeddings", positions)
        if positions is not None:  # RoBERTa never uses its first two: its tokenizer knows
            positions = min(positions, tokenizer.model_max_length)
    room = None if positions is None else positions - (0 if model.config.is_encoder_decoder else config.max_new_tokens)
    if room is not None and room < 1:
        raise UsageError(f"--max_new_tokens {config.max_new_tokens}: the model has {positions} positions in all")
    limit = data_args.max_source_length or min(DEFAULT_MAX_SOURCE_LENGTH, room or DEFAULT_MAX_SOURCE_LENGTH)
    if room is not None and limit > room:
        raise UsageError(
            f"--max_source_length {limit}: the model has {positions} positions"
            + ("" if model.config.is_encoder_decoder else f", {config.max_new_tokens} of them for the answer")
            + f"; give {room} or less"
        )
    return limit


def place_model(model, model_args):
    """The model on this rank's device or, under --deepspeed, partitioned over all ranks."""
    if model_args.deepspeed is None:
        device = torch.device("cpu" if model_args.use_cpu else f"cuda:{max(model_args.local_rank, 0)}")
        return model.to(device)
    import deepspeed

    return deepspeed.initialize(model=model, config_params=read_zero3_config(model_args))[0].module.eval()


def load_assistant(model_args, model):
    """The drafting model, of the model's own kind, device and dtype; None where none is asked for."""
    name = model_args.assistant_model_name_or_path
    if name is None:
        return None
    auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
    try:
        return auto.from_pretrained(name, dtype=model.dtype, cache_dir=model_args.cache_dir).eval().to(model.device)
    except (OSError, ValueError) as error:
        raise UsageError(f"--assistant_model_name_or_path {name}: cannot be loaded: {str(error)[:400]}") from None


def read_zero3_config(model_args) -> dict:
    """The DeepSpeed file with the precision of --dtype in the place of "auto"."""
    config = json.loads(Path(model_args.deepspeed).read_text(encoding="utf-8"))
    dtype = choose_dtype(model_args)
    for name, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        config[name] = {"enabled": dtype == wanted}
    return config


# ------------------------------------------------------------------------------------------------ results on disk


class Store:
    """
    Finished rows on disk: a line of JSON for each batch in OUTPUT_FILE.parts/, a file for each rank and start.

    A line is written at once and synced, so a kill loses at most the batch under way; a torn last line is passed
    over. Batches are planned alike whatever is finished, so a run that goes on ends with the same table.
    """

    def __init__(self, folder: Path, settings: dict, rank: int):
        self.folder, self.rank, self.stream = folder, rank, None
        self.digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.found = {}  # (round, row) -> text

    def open(self) -> None:
        """Read what is finished. Raises UsageError if it belongs to other arguments. All ranks must call it."""
        mark = self.folder / "settings.txt"
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not mark.exists():
                mark.write_text(self.digest, encoding="utf-8")
        wait_for_all()
        if mark.read_text(encoding="utf-8") != self.digest:
            raise UsageError(
                f"{self.folder} holds the rows of a run with other arguments or another input: remove it to begin "
                "again, or name another --output_file"
            )
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").split("\n"):
                try:
                    batch = json.loads(line)
                except ValueError:
                    continue  # empty, or torn by a kill
                self.found.update({(batch["round"], row): text for row, text in batch["rows"]})
        wait_for_all()  # before any rank writes
        self.stream = open(self.folder / f"{time.time_ns()}-{self.rank}.jsonl", "w", encoding="utf-8")

    def add(self, round_number: int, rows: list[tuple[int, str]]) -> None:
        self.stream.write(json.dumps({"round": round_number, "rows": rows}, ensure_ascii=False) + "\n")
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.found.update({(round_number, row): text for row, text in rows})

    def share(self) -> None:
        """Give every rank what the others finished; all ranks must call it."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.found)
            for part in parts:
                self.found.update(part)

    def remove(self) -> None:
        self.stream.close()
        for path in [*self.folder.glob("*.jsonl"), self.folder / "settings.txt"]:
            path.unlink()
        self.folder.rmdir()


def wait_for_all() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


# ------------------------------------------------------------------------------------------------ generating


@dataclass
class Generator:
    """Everything that turns prompts into texts."""

    model: torch.nn.Module
    writer: object  # tokenizer of the outputs
    prompts: Prompts
    config: GenerationConfig
    data_args: GenerationDataArguments
    store: Store | None = None
    synced: bool = False  # under ZeRO-3: all ranks generate together
    counts: Counter = None
    assistant: torch.nn.Module | None = None

    def decode(self, tokens: list[int]) -> str:
        return self.writer.decode(tokens, skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------------------------ batches


def plan_rows(generator: Generator, ids: list[list[int]]) -> list[list[int]]:
    """
    Indices of prompts in batches of like length, longest first: rows x beams x longest stays below the budget.

    With left padding (causal models) the room for the answer counts too, and settings that look at the prompt's own
    tokens get batches of one length, because padding would be part of it. What transformers can only do for one row
    (assisted decoding), and sampling outside our own loop, goes row by row.
    """
    config, is_seq2seq = generator.config, generator.model.config.is_encoder_decoder
    own = can_decode(generator)
    alone = not own and (config.do_sample or config.prompt_lookup_num_tokens or generator.assistant is not None)
    budget = 1 if alone else generator.data_args.max_tokens_per_batch
    extra = 0 if is_seq2seq else config.max_new_tokens
    reads = not is_seq2seq and any(getattr(config, n, None) not in (None, v) for n, v in READS_PROMPT.items())
    batches, room = [], 0
    for row in sorted(range(len(ids)), key=lambda i: -len(ids[i])):
        if not room or (reads and len(ids[row]) != len(ids[batches[-1][0]])):
            batches.append([])
            room = max(1, budget // (config.num_beams * (len(ids[row]) + extra)))
        batches[-1].append(row)
        room -= 1
    return batches


def generate_batch(generator: Generator, prompts: list[list[int]], rows: list[int]) -> list[list[int]]:
    """New token ids for each prompt, ended by the stop token where there was one. rows: numbers that seed sampling."""
    model, config = generator.model, generator.config
    is_seq2seq = model.config.is_encoder_decoder
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), generator.prompts.tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if is_seq2seq else slice(longest - len(prompt), longest)
        ids[i, place] = torch.tensor(prompt)
        mask[i, place] = 1
    inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "generation_config": config}
    seed = generator.data_args.seed
    if can_decode(generator):
        found = dict(model.generate(**inputs, custom_generate=partial(decode_rows, rows=rows, seed=seed)))
        return [found[i] for i in range(len(prompts))]
    torch.manual_seed((seed * 0x9E3779B1 + rows[0]) % 2**32)
    inputs |= {"tokenizer": generator.writer} if config.stop_strings else {}
    inputs |= {"assistant_model": generator.assistant} if generator.assistant is not None else {}
    with torch.no_grad():
        outputs = model.generate(**inputs, synced_gpus=generator.synced)
    ends = torch.tensor(config.eos_token_id).flatten().tolist()
    new = outputs[:, 1 if is_seq2seq else longest :].tolist()
    return [next((row[: n + 1] for n, token in enumerate(row) if token in ends), row) for row in new]


def can_decode(generator: Generator) -> bool:
    """Whether decode_rows does what the settings ask for; what it cannot do, model.generate does."""
    model, config = generator.model, generator.config
    modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )
    plain = all(getattr(config, name, None) in (None, value) for name, value in BATCH_BOUND.items())
    ordinary = not hasattr(model, "_reorder_cache") and model._supports_default_dynamic_cache()
    mode = config.get_generation_mode()
    free = not generator.synced and generator.assistant is None
    return free and mode in modes and plain and ordinary and config.use_cache is not False


# ------------------------------------------------------------------------------------------------ decoding


def attend_by_row(module, query, key, value, attention_mask, **kwargs):
    """
    SDPA in which the beams of a row share one copy of the source's keys and values: they become its queries.

    query: (rows x beams, heads, 1, size); key and value: (rows or rows x beams, heads, tokens, size).
    """
    beams = query.shape[0] // key.shape[0]
    if beams == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    heads, size = query.shape[1], query.shape[3]
    query = query.view(key.shape[0], beams, heads, size).transpose(1, 2)
    kwargs["is_causal"] = False
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return output.reshape(key.shape[0] * beams, 1, heads, size), weights


AttentionInterface.register("sdpa_by_row", attend_by_row)
AttentionMaskInterface.register("sdpa_by_row", sdpa_mask)


def share_sources(generator: Generator) -> None:
    """Let the beams of an encoder-decoder on SDPA share their source's keys and values (attend_by_row)."""
    model = generator.model
    beams = model.config.is_encoder_decoder and generator.config.num_beams > 1 and can_decode(generator)
    if beams and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_by_row")


class Noise:
    """Gumbel noise from one generator a row, so that a sample depends on neither the batch nor the rank."""

    def __init__(self, rows: list[int], seed: int, device):
        # torch's CPU generator uses 32 bits of its seed: one to one in the row for a given seed.
        seeds = [(seed * 0x9E3779B1 + row) % 2**32 for row in rows]
        self.generators = [torch.Generator(device).manual_seed(s) for s in seeds]

    def keep(self, rows: torch.Tensor) -> None:
        self.generators = [self.generators[i] for i in rows.tolist()]

    def add(self, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.uniform_(generator=generator)
        return scores - noise.log_().neg_().log_()


class DecodingBatch:
    """A batch under way: the model with its cache and keyword arguments, `width` beams a row."""

    def __init__(self, model, ids: torch.Tensor, width: int, kwargs: dict):
        self.model, self.kwargs, self.shared = model, kwargs, False
        if width > 1:  # generate() has repeated everything: the first step needs each row once
            self.take(slice(None, None, width))
            ids = ids[::width]
        self.logits = self.step(ids, is_first_iteration=True)
        if width > 1:
            self.shared = model.config._attn_implementation == "sdpa_by_row"
            rows = torch.arange(len(ids), device=ids.device)
            self.logits = self.logits.repeat_interleave(width, dim=0)
            self.reorder(rows.repeat_interleave(width), rows)

    def step(self, ids: torch.Tensor, **kwargs) -> torch.Tensor:
        """Logits (rows, vocabulary) of the next token, fp32."""
        model, length = self.model, None if kwargs else 1
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=length, **kwargs, **self.kwargs)
        outputs = model(**inputs, return_dict=True)
        is_seq2seq = model.config.is_encoder_decoder
        self.kwargs = model._update_model_kwargs_for_generation(outputs, self.kwargs, is_seq2seq)
        return outputs.logits[:, -1].float()

    def take(self, index) -> None:
        for name, value in self.kwargs.items():
            if isinstance(value, torch.Tensor):
                self.kwargs[name] = value[index]
            elif name == "encoder_outputs":
                value.last_hidden_state = value.last_hidden_state[index]

    def reorder(self, beams: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Go on with these beams; `rows` where rows have left."""
        cache = self.kwargs["past_key_values"]
        if not self.shared:
            cache.reorder_cache(beams)
            if rows is not None:
                self.take(beams)
            return
        cache.self_attention_cache.reorder_cache(beams)
        if rows is not None and len(rows) < len(cache.cross_attention_cache.layers[0].keys):
            cache.cross_attention_cache.reorder_cache(rows)
            self.take(rows)


@torch.inference_mode()
def decode_rows(model, ids, logits_processor, stopping_criteria, generation_config, rows, seed, **kwargs):
    """
    A `custom_generate` loop that yields (index in the batch, new tokens) as rows finish, and lets finished rows leave.

    model.generate prepares everything: encoder, cache, processors, stopping criteria. An eighth of the batch leaves
    at a time, because each leaving copies the cache.
    """
    kwargs = {name: value for name, value in kwargs.items() if name not in ("synced_gpus", "streamer")}
    noise = Noise(rows, seed, ids.device) if generation_config.do_sample else None
    loop = decode_beams if generation_config.num_beams > 1 else decode_tokens
    yield from loop(model, ids, logits_processor, stopping_criteria, generation_config, noise, kwargs)


def decode_tokens(model, ids, processors, criteria, config, noise, kwargs):
    """Greedy search and sampling, as transformers' `_sample`."""
    prompt, device = ids.shape[1], ids.device
    batch = DecodingBatch(model, ids, 1, kwargs)
    scores, names = batch.logits, torch.arange(len(ids), device=device)
    done = torch.zeros(len(ids), dtype=torch.bool, device=device)
    while True:
        scores = processors(ids, scores)
        tokens = (noise.add(scores) if noise else scores).argmax(-1)
        ids = torch.cat([ids, tokens[:, None]], dim=1)
        stopped = criteria(ids, None) & ~done
        done |= stopped
        for i in stopped.nonzero().flatten().tolist():
            yield names[i].item(), ids[i, prompt:].tolist()
        if done.all():
            return
        if done.sum() * LEAVING >= len(done):
            left = (~done).nonzero().flatten()
            if noise:
                noise.keep(left)
            names, ids, done = names[left], ids[left], done[left]
            batch.reorder(left, left)
        scores = batch.step(ids)


def pick(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """tensor (rows, n, ...) at index (rows, m)."""
    return tensor.gather(
        1, index.view(*index.shape, *[1] * (tensor.dim() - 2)).expand(*index.shape, *tensor.shape[2:])
    )


def decode_beams(model, ids, processors, criteria, config, noise, kwargs):
    """transformers' `_beam_search` (5.23) step for step; only the end of the loop is decided row by row."""
    width, penalty, early = config.num_beams, config.length_penalty, config.early_stopping
    penalty, early = 1.0 if penalty is None else penalty, False if early is None else early
    eos = config._eos_token_tensor
    keep = max(2, 1 + (0 if eos is None else len(eos))) * width
    count, prompt, device = len(ids) // width, ids.shape[1], ids.device
    batch = DecodingBatch(model, ids, width, kwargs)
    logits, ids = batch.logits, ids.view(count, width, prompt)
    names = torch.arange(count, device=device)
    scores = torch.zeros(count, width, device=device)
    scores[:, 1:] = NEVER
    # A row's best finished sequences, their scores and lengths.
    best, best_scores = ids, torch.full_like(scores, NEVER)
    best_length, finished = torch.zeros_like(scores, dtype=torch.long), torch.zeros_like(scores, dtype=torch.bool)
    improvable = torch.ones(count, 1, dtype=torch.bool, device=device)
    going = torch.ones(count, dtype=torch.bool, device=device)
    while True:
        length = ids.shape[2] + 1
        scored = processors(ids.flatten(0, 1), logits.log_softmax(-1))
        top, token, source = choose_candidates(scored, scores, keep, noise)
        candidates = torch.cat([pick(ids, source), token[:, :, None]], dim=2)
        stop = criteria(candidates.flatten(0, 1), None).view(len(ids), keep)

        scores, index = (top + stop * NEVER).topk(width)
        ids, source = pick(candidates, index), source.gather(1, index)

        just = stop & (torch.arange(keep, device=device) < width)
        top = top / (length - prompt) ** penalty
        if early is True:
            top = top + finished.all(1, keepdim=True) * NEVER
        top = top + ~improvable * NEVER + ~just * NEVER
        best = torch.cat([torch.nn.functional.pad(best, (0, 1)), candidates], dim=1)
        best_scores, index = torch.cat([best_scores, top], dim=1).topk(width)
        best, finished = pick(best, index), torch.cat([finished, just], dim=1).gather(1, index)
        best_length = torch.cat([best_length, torch.full_like(token, length)], dim=1).gather(1, index)

        longest = config.max_length if early == "never" and penalty > 0.0 else length
        hope = scores[:, :1] / (longest - prompt) ** penalty
        worst = torch.where(finished, best_scores.amin(1, keepdim=True), NEVER)
        improvable &= (hope > worst).any(1, keepdim=True)
        still = improvable[:, 0] & ~stop.all(1)
        if early is True:
            still &= ~finished.all(1)
        for i in (going & ~still).nonzero().flatten().tolist():
            yield names[i].item(), best[i, 0, prompt : best_length[i, 0]].tolist()
        going &= still
        if not going.any():
            return
        left = torch.arange(len(ids), device=device)
        if (~going).sum() * LEAVING >= len(going):
            left = going.nonzero().flatten()
            if noise:
                noise.keep(left)
            state = (names, ids, scores, source, best, best_scores, best_length, finished, improvable, going)
            names, ids, scores, source, best, best_scores, best_length, finished, improvable, going = (
                value[left] for value in state
            )
        batch.reorder((left[:, None] * width + source).flatten(), left if len(left) < len(logits) // width else None)
        logits = batch.step(ids.flatten(0, 1))


def choose_candidates(scored, scores, keep: int, noise):
    """The `keep` best next tokens of each row over its beams: their scores, the tokens, and the beams they extend."""
    rows, width = scores.shape
    vocabulary = scored.shape[1]
    if noise:
        scored = (scored.view(rows, width, -1) + scores[:, :, None]).flatten(1)
        index = noise.add(scored).topk(keep)[1]
        return scored.gather(1, index), index % vocabulary, index // vocabulary
    # The best of the beams' best is the best of all, and the vocabulary is read once.
    top, token = scored.topk(keep)
    top, index = (top.view(rows, width, keep) + scores[:, :, None]).flatten(1).topk(keep)
    return top, token.view(rows, -1).gather(1, index), index // keep


# ------------------------------------------------------------------------------------------------ rounds


def generate_round(generator: Generator, texts: list, number: int, title: str) -> list[str]:
    """
    Generate for texts (None gives ""), each rank its share, and return all outputs in order on every rank.

    Windows of texts are tokenised by a thread while the window before generates.
    """
    wanted = [i for i, text in enumerate(texts) if text is not None]
    windows = [wanted[start : start + WINDOW] for start in range(0, len(wanted), WINDOW)]
    store = generator.store
    rank = int(os.environ.get("RANK", 0))
    finished = sum((number, i) in store.found for i in wanted)
    bar = tqdm(total=len(wanted), initial=finished, desc=title, unit="row", disable=rank > 0)
    with ThreadPoolExecutor(1) as tokenising:
        encode = generator.prompts.encode
        coming = tokenising.submit(encode, [texts[i] for i in windows[0]]) if windows else None
        for at, window in enumerate(windows):
            ids, cut = coming.result()
            if at + 1 < len(windows):
                coming = tokenising.submit(encode, [texts[i] for i in windows[at + 1]])
            generator.counts["cut"] += sum(cut)
            generate_window(generator, window, ids, number, bar)
    bar.close()
    store.share()
    return [store.found.get((number, i), "") for i in range(len(texts))]


def generate_window(generator: Generator, rows: list[int], ids: list[list[int]], number: int, bar) -> None:
    """Generate this rank's batches of a window and store each; under ZeRO-3 ranks without one repeat another's."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    plan = plan_rows(generator, ids)
    left = [batch for batch in plan if any((number, rows[i]) not in generator.store.found for i in batch)]
    mine = left[rank::world]
    if generator.synced and left:
        mine += left[:1] * (-(-len(left) // world) - len(mine))
    for turn, batch in enumerate(mine):
        outputs = generate_batch(generator, [ids[i] for i in batch], [rows[i] for i in batch])
        if turn * world + rank < len(left):
            generator.store.add(number, [(rows[i], generator.decode(outputs[n])) for n, i in enumerate(batch)])
        bar.update(sum(len(batch) for batch in left[turn * world : (turn + 1) * world]))


def summarise_groups(generator: Generator, groups: dict[str, list[str]]) -> list[dict]:
    """
    One text of all texts of each group: as many as fit are put together, their summaries again, until it is one.

    Returns for each group `prediction`, `num_texts`, `num_rounds` and `num_cut`, the texts that alone were too long.
    """
    results = {name: {"num_texts": len(texts), "num_rounds": 0, "num_cut": 0} for name, texts in groups.items()}
    open_texts, number = dict(groups), 0
    while open_texts:
        parts = []
        for name, texts in open_texts.items():
            joined, cut = join_texts(texts, generator.prompts)
            results[name]["num_rounds"] += 1
            results[name]["num_cut"] += cut
            parts += [(name, part) for part in joined]
        outputs = generate_round(generator, [part for _, part in parts], number, f"Round {number + 1}")
        summaries = {}
        for (name, _), output in zip(parts, outputs, strict=True):
            summaries.setdefault(name, []).append(output)
        for name, texts in summaries.items():
            if len(texts) == 1:
                results[name]["prediction"] = texts[0]
        open_texts = {name: texts for name, texts in summaries.items() if len(texts) > 1}
        number += 1
    return [results[name] for name in groups]


def join_texts(texts: list[str], prompts: Prompts) -> tuple[list[str], int]:
    """Texts put together, in order, into as few parts as fit the source length; and how many alone do not fit."""
    room = prompts.limit - len(prompts.tokenize([prompts.render("")])[0])
    lengths = [len(ids) + 1 for ids in prompts.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]
    parts, used = [], room + 1
    for text, length in zip(texts, lengths, strict=True):
        if used + length > room:
            parts.append([])
            used = 0
        parts[-1].append(text)
        used += length
    return ["\n".join(part) for part in parts], sum(length - 1 > room for length in lengths)


def measure_latency(generator: Generator, texts: list) -> dict[str, float]:
    """Generate for texts one at a time: milliseconds at the 50th, 95th and 99th percentile, tokens/s, peak memory."""
    ids, _ = generator.prompts.encode([text for text in texts if text is not None])
    generate_batch(generator, ids[:1], [0])  # the first one pays for start-up
    times, tokens = [], 0
    for row, prompt in enumerate(tqdm(ids, desc="One at a time", unit="row")):
        start = time.perf_counter()
        output = generate_batch(generator, [prompt], [row])[0]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
        tokens += len(output)
    on_gpu = generator.model.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    results = {f"p{q}_ms": round(float(np.percentile(times, q)), 1) for q in (50, 95, 99)}
    results |= {"rows": len(times), "tokens_per_second": round(1000 * tokens / sum(times), 1)}
    return results | {"peak_memory_gb": round(peak / 1e9, 3)}


# ------------------------------------------------------------------------------------------------ main


def describe_settings(table, model_args, data_args, decoding) -> dict:
    """What a run that goes on must have in common with the one before: the arguments, the rows, the weights' dates."""
    folder = Path(model_args.model_name_or_path)
    weights = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.glob("*.safetensors"))]
    arguments = {k: v for k, v in vars(model_args).items() if k not in ("token", "local_rank")}
    rows = hashlib.sha256(json.dumps(table[data_args.text_column], default=str).encode()).hexdigest()
    return {"model": arguments, "data": vars(data_args), "decoding": decoding, "weights": weights, "rows": rows}


def start_ranks(model_args) -> None:
    """Join the other processes, if there are any, and take this one's GPU."""
    if int(os.environ.get("LOCAL_RANK", -1)) >= 0:
        model_args.local_rank = int(os.environ["LOCAL_RANK"])
    if not model_args.use_cpu and torch.cuda.is_available():
        torch.cuda.set_device(max(model_args.local_rank, 0))
    patience = datetime.timedelta(days=7)  # a rank may wait long for the last batch of another
    if model_args.deepspeed is not None and not torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed(timeout=patience)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=patience)


def add_outputs(generator: Generator, table, texts: list, column: str):
    """The table with a column of outputs; rows without a text get an empty one."""
    outputs = generate_round(generator, texts, 0, "Generating")
    return table.add_column(column, outputs)


def make_group_table(generator: Generator, table, texts: list, data_args):
    """A table with a row a group: its value, how many texts, rounds and cut texts, and the output."""
    groups = {}
    for value, text in zip(table[data_args.group_by], texts, strict=True):
        if text is not None:
            groups.setdefault(value, []).append(text)
    large = {value: texts for value, texts in groups.items() if len(texts) >= data_args.min_group_size}
    generator.counts["groups left out"] = len(groups) - len(large)
    if not large:
        raise UsageError(f"--min_group_size {data_args.min_group_size}: no group is that large")
    results = summarise_groups(generator, large)
    columns = {data_args.group_by: list(large)}
    columns |= {name: [row[name] for row in results] for name in ("num_texts", "num_rounds", "num_cut", "prediction")}
    columns[data_args.output_column] = columns.pop("prediction")
    return datasets.Dataset.from_dict(columns)


def main(argv: list[str] | None = None) -> dict:
    """Generate as the arguments say; returns the counts, or with --measure_latency the times."""
    model_args, data_args, decoding = parse_generation_arguments(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    # DeepSpeed 0.19 calls torch 2.13 by names it has renamed, a line each time.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)
    start_ranks(model_args)
    started = time.perf_counter()

    # Under ZeRO-3 from_pretrained partitions the model while it loads it, as long as this object lives.
    alive = HfDeepSpeedConfig(read_zero3_config(model_args)) if model_args.deepspeed else None
    table = load_table(data_args, model_args)
    model, writer, prompts, config = load_generator(model_args, data_args, decoding)
    model = place_model(model, model_args)
    texts = read_texts(table, data_args.text_column, prompts.is_chat)
    generator = Generator(model, writer, prompts, config, data_args, synced=alive is not None, counts=Counter())
    generator.assistant = load_assistant(model_args, model)
    generator.counts["without a text"] = sum(text is None for text in texts)
    share_sources(generator)

    rank = int(os.environ.get("RANK", 0))
    if rank == 0:
        print(describe_run(generator, table), flush=True)
    if data_args.measure_latency:
        return report_latency(generator, texts[: data_args.measure_latency], data_args)
    output = Path(data_args.output_file)
    folder = output.with_name(output.name + ".parts")
    generator.store = Store(folder, describe_settings(table, model_args, data_args, decoding), rank)
    generator.store.open()
    if rank == 0 and generator.store.found:
        print(f"going on: {len(generator.store.found)} outputs are in {folder}", flush=True)
    if data_args.group_by is None:
        result = add_outputs(generator, table, texts, data_args.output_column)
    else:
        result = make_group_table(generator, table, texts, data_args)
    wait_for_all()
    if rank == 0:
        write_table(result, output)
        counts = {"rows": len(table), "written": len(result), **generator.counts}
        counts["seconds"] = round(time.perf_counter() - started, 1)
        print("\n".join(f"{name:<20}{value:>12}" for name, value in counts.items()), flush=True)
        print(f"written: {output}", flush=True)
    wait_for_all()
    if rank == 0:
        generator.store.remove()
    return dict(generator.counts)


def describe_run(generator: Generator, table) -> str:
    """The decisions taken, spelt out."""
    kind = (
        "chat prompts by the model's template" if generator.prompts.is_chat else f"prefix {generator.prompts.prefix!r}"
    )
    config = {
        k: v for k, v in generator.config.to_diff_dict().items() if k in vars(GenerationConfig()) and v is not None
    }
    settings = ", ".join(f"{k}={v}" for k, v in config.items() if not k.endswith("_token_id") and k not in NOT_FLAGS)
    return (
        f"{len(table)} rows, column {generator.data_args.text_column!r}, {kind}, prompts of at most "
        f"{generator.prompts.limit} tokens\n{type(generator.model).__name__} in "
        f"{str(generator.model.dtype).removeprefix('torch.')} on {generator.model.device}: {settings}"
    )


def report_latency(generator: Generator, texts: list, data_args) -> dict:
    """Measure, print a table, and write JSON where there is an --output_file."""
    results = measure_latency(generator, texts)
    print("\n".join(f"{name:<20}{value:>12}" for name, value in results.items()), flush=True)
    if data_args.output_file is not None:
        Path(data_args.output_file).with_suffix(".latency.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


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
