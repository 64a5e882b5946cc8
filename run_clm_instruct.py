#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.17", "datasets", "accelerate", "rouge-score", "nltk", "matplotlib",
#   "sentencepiece", "jinja2", "peft",
# ]
# ///
"""
Fine-tune Llama, or any other causal language model, on instructions and chats, and read the answers it gives.

One GPU, LoRA:
    python run_clm_instruct.py --model_name_or_path meta-llama/Llama-2-7b-chat-hf --do_train --do_eval --bf16 \
        --train_file data/train.jsonl --validation_file data/validation.jsonl --prompt_template dolly --packing \
        --max_seq_length 1024 --lora_r 16 --learning_rate 2e-4 --output_dir out --predict_with_generate

Several GPUs, every parameter:
    deepspeed run_clm_instruct.py --deepspeed ds_configs/zero3_offload_adamw.json --model_name_or_path ... --bf16

A smoke run on the CPU, under a minute (where there is no accelerator the script says so itself):
    python run_clm_instruct.py --model_name_or_path tiny-llama --do_train --do_eval --train_file train.jsonl \
        --output_dir out --max_seq_length 256 --max_steps 20 --max_eval_samples 20 --predict_with_generate
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import namedtuple
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import datasets
import jinja2
import numpy as np
import torch
import transformers
from datasets import load_dataset
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from transformers.hf_argparser import HfArg

# The companions beside this script. Without them it trains to the same losses and weights; ABSENT says what is lost.
try:
    import guards
    from guards import UsageError
except ModuleNotFoundError:
    guards, UsageError = None, ValueError
try:
    import reports
except ModuleNotFoundError:
    reports = None
try:
    import fast_batches
except ModuleNotFoundError:
    fast_batches = None
try:
    import zero_adafactor
except ModuleNotFoundError:
    zero_adafactor = None

ABSENT = {
    "guards.py": "bad input ends late, in a traceback; a killed run goes on only with --resume_from_checkpoint",
    "reports.py": "no samples, curves, model card or audit of labels, and two runs in MLflow",
    "fast_batches.py": "batches are padded and all logits made: the same losses, about twice the time, more memory",
    "zero_adafactor.py": "under ZeRO --optim adafactor is the library's, which does not factor there: 4 bytes of "
    "state a parameter, and updates that depend on the number of ranks",
}

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
ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")

DEFAULT_MAX_SEQ_LENGTH, SHOWN_SAMPLES = 1024, 5
MERGE_TOOL = Path(__file__).parent / "tools/merge_lora.py"

# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class CausalModelArguments:
    """Which model, configuration and tokenizer to fine-tune from, and which parameters."""

    model_name_or_path: str = HfArg(help="A folder with a model, or a model's name on the hub.")
    config_name: str | None = HfArg(default=None, help="Configuration, if not the model's own.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, if not the model's own.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the hub.")
    token: str | None = HfArg(default=None, help="Hub token for private and gated models; never logged.")
    trust_remote_code: bool = HfArg(default=False, help="Run a hub model's own code. Only for code you have read.")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager, flash_attention_2, flex_attention.")
    pure_bf16: bool = HfArg(
        default=False,
        help="Weights, gradients and arithmetic in bf16, rounded stochastically: 4 bytes a parameter in all. With "
        "--optim adafactor, without --deepspeed. `--optim_args step_in_backward=true`: near 2 bytes; one process.",
    )
    lora_r: int = HfArg(default=0, help="Train low-rank adapters of this rank. 0: all parameters.")
    lora_alpha: float = HfArg(default=32.0, help="Adapters are scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Modules with adapters. Default: all linear.")
    merge_lora: bool = HfArg(default=False, help="Then write base and adapters as one model to OUTPUT_DIR/merged.")

    @property
    def hub(self) -> dict:
        """What every from_pretrained needs to know about the hub."""
        names = ("cache_dir", "token", "trust_remote_code")
        return {"revision": self.model_revision, **{name: getattr(self, name) for name in names}}


@dataclass
class InstructDataArguments:
    """Which data to train and evaluate on, how prompts are made of it, and how it is cut and scored."""

    dataset_name: str | None = HfArg(default=None, help="A dataset's name on the hub, or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that dataset.")
    train_file: str | None = HfArg(default=None, help="Training data: .json, .jsonl, .csv, .parquet; .txt for text.")
    validation_file: str | None = HfArg(default=None, help="Validation data, same formats.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, same formats.")
    validation_split_percentage: float = HfArg(default=5.0, help="Share of training prompts kept where there is none.")
    data_format: str | None = HfArg(default=None, help="dolly, alpaca, prompt, chat, sharegpt, text; else by columns.")
    text_column: str | None = HfArg(default=None, help="Column of plain text to train on whole.")
    prompt_template: str | None = HfArg(
        default=None, help="dolly, alpaca, llama2, chatml, plain, chat (the tokenizer's own; default) or a Jinja file."
    )
    max_seq_length: int | None = HfArg(default=None, help="Longest example in tokens. Default: 1024, or the model's.")
    packing: bool = HfArg(default=False, help="Pack whole examples, apart, into rows of --max_seq_length.")
    assistant_only_loss: bool = HfArg(default=True, help="Loss on the answers only; false: on every token.")
    audit_only: bool = HfArg(default=False, help="Show what would be trained on, and end.")
    skip_audit: bool = HfArg(default=False, help="Train although the audit finds a limit broken.")
    overwrite_cache: bool = HfArg(default=False, help="Tokenise again instead of using the cache.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes for tokenisation.")
    max_train_samples: int | None = HfArg(default=None, help="Use only this many training rows.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only this many validation rows.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only this many test rows.")
    max_new_tokens: int = HfArg(default=256, help="Longest answer generated in evaluation, in tokens.")
    num_beams: int = HfArg(default=1, help="Beams when generating in evaluation and prediction.")
    rouge_language: str = HfArg(default="en", help="en: ROUGE as rouge_score has it, ASCII only; else Unicode words.")


INSTRUCT_ARGUMENTS = (CausalModelArguments, InstructDataArguments, Seq2SeqTrainingArguments)


def parse_arguments(argv: list[str], classes: tuple, find_columns, find_problems, **fixed):
    """
    Turn the command line into the argument dataclasses; raises UsageError with everything that is wrong.

    find_columns(columns, args) raises it where a file's columns do not serve; find_problems(args) lists what else is
    wrong; fixed: values that no flag changes. All checks come before the trainer's arguments are built, because
    building them already reads the DeepSpeed file and starts the process group.
    """
    parser = HfArgumentParser(classes)
    parser.set_defaults(bf16=None)
    args = parser.parse_args(guards.read_arguments(parser, argv) if guards else argv)
    vars(args).update(fixed)
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.bf16 is None or args.pure_bf16:  # of pure bf16 there is nothing left to cast
        args.bf16 = choose_bf16(args)
    problems = find_problems(args)
    if guards:
        guards.check_training(args, find_columns, problems)
        guards.start_ranks(args)
    elif problems:
        raise UsageError("\n".join(problems))
    if args.deepspeed and args.use_cpu:
        join_cpu_ranks()
    try:
        return parser.parse_dict(vars(args))
    except ValueError as error:  # the trainer's own checks speak of its flags
        raise UsageError(str(error)) from error


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether the device has instructions for bf16 matrices; elsewhere they take twice as long as fp32."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def choose_bf16(args: argparse.Namespace) -> bool:
    """bf16 where neither flag nor file says anything about precision and the device multiplies bf16 matrices."""
    if args.fp16 or args.pure_bf16 or "ACCELERATE_MIXED_PRECISION" in os.environ:  # the last by `accelerate launch`
        return False
    if args.deepspeed:
        with suppress(OSError, ValueError, LookupError, TypeError):  # guards.py says what is wrong with the file
            asked = json.loads(Path(args.deepspeed).read_text(encoding="utf-8"))["bf16"]["enabled"]
            return has_fast_bf16(args.use_cpu) if asked == "auto" else asked
        return False
    return has_fast_bf16(args.use_cpu)


def find_instruct_problems(args: argparse.Namespace) -> list[str]:
    """Flags that need a file that is not beside this script, and what guards.py finds wrong with the script's own."""
    problems = zero_adafactor.find_problems(args) if zero_adafactor else []
    pure = args.pure_bf16 or "step_in_backward" in str(args.optim_args)
    for given, there, flag, name in (
        (args.packing, fast_batches, "--packing", "fast_batches.py"),
        (pure, zero_adafactor, "--pure_bf16, step_in_backward", "zero_adafactor.py"),
        (args.merge_lora, MERGE_TOOL.is_file(), "--merge_lora", "tools/merge_lora.py"),
        (args.audit_only, reports, "--audit_only", "reports.py"),
        (args.predict_with_generate, reports, "--predict_with_generate", "reports.py"),
    ):
        if given and not there:
            problems.append(f"{flag}: needs {name}; copy it beside this script")
    formats = list(dict.fromkeys(name for name, _ in KNOWN_FORMATS))
    return problems + (guards.find_format_problems(args, formats, list(PROMPT_TEMPLATES)) if guards else [])


def join_cpu_ranks() -> None:
    """
    Bring DeepSpeed's ranks together on the CPU: ZeRO-3 partitions the model while it is loaded (deepspeed 0.19.8).

    gloo's collectives in the place of its own, which would be compiled first (50 s; a lock, if killed meanwhile).
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")


# ------------------------------------------------------------------------------------------------ data


class RowError(ValueError):
    """Why a row cannot be trained on; rows are counted by it."""


def load_raw_datasets(data_args, model_args):
    """A DatasetDict with `train`, `validation` and `test` as far as they were given, from files or the hub."""
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if data_args.dataset_name is not None:
        return load_dataset(data_args.dataset_name, data_args.dataset_config_name, **hub)
    files = {"train": data_args.train_file, "validation": data_args.validation_file, "test": data_args.test_file}
    raw = datasets.DatasetDict()
    for split, path in files.items():
        if path is not None:
            file_type = FILE_TYPES.get(Path(path).suffix.lower(), "text")
            # A .txt is one text, not one a line; without keep_default_na pandas reads the answer "None" as missing.
            options = {"text": {"sample_by": "document"}, "csv": {"keep_default_na": False}}.get(file_type, {})
            try:
                raw[split] = load_dataset(file_type, data_files={split: path}, split=split, **hub, **options)
            except datasets.exceptions.DatasetGenerationError as error:
                raise UsageError(f"{path}: cannot be read as {file_type}: {error.__cause__ or error}") from error
    return raw


def find_format(columns: list[str], args) -> tuple[str, tuple[str, ...]]:
    """The data's format and its columns: as --data_format or --text_column say, else by the column names."""
    there = f"it has {', '.join(columns)}"
    if args.text_column is not None:
        if args.text_column not in columns:
            raise UsageError(f"has no column {args.text_column!r} (--text_column); {there}")
        return "text", (args.text_column,)
    known = [(name, needed) for name, needed in KNOWN_FORMATS if args.data_format in (None, name)]
    if found := next((pair for pair in known if set(pair[1]) <= set(columns)), None):
        return found
    wanted = "; or ".join(f"{', '.join(needed)} ({name})" for name, needed in known)
    raise UsageError(f"needs the columns {wanted}; {there}. Rename them, or name plain text by --text_column")


def to_messages(row: dict, data_format: str, columns: tuple[str, ...]) -> list[dict]:
    """
    One row as chat messages up to its last answer: dicts of `role`, `content` and perhaps `context`, all stripped.

    Raises RowError where something needed is missing.
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


# ------------------------------------------------------------------------------------------------ prompts


def load_tokenizer(model_args, data_args):
    """Configuration, tokenizer (with a pad token) and the longest example in tokens."""
    name, hub = model_args.model_name_or_path, model_args.hub
    try:
        config = transformers.AutoConfig.from_pretrained(model_args.config_name or name, **hub)
        tokenizer = transformers.AutoTokenizer.from_pretrained(model_args.tokenizer_name or name, **hub)
    except OSError as error:
        raise UsageError(guards.explain_load_error(name, error) if guards else str(error)) from None
    lacking = "EOS token to stop with" if tokenizer.eos_token is None else "fast tokenizer (tokenizer.json)"
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise UsageError(f"--tokenizer_name {model_args.tokenizer_name or name}: has no {lacking}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is left out of the loss by position, EOS stays in it
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LENGTH
    limit = data_args.max_seq_length or min(DEFAULT_MAX_SEQ_LENGTH, positions)
    if limit > positions:
        raise UsageError(f"--max_seq_length {limit}: the model has {positions} positions")
    return config, tokenizer, limit


# Chat templates, so that they are saved with the tokenizer and every later generation uses the one of the training.
# `context` is a key of ours in a user's message; where a template does not know it, it follows the content.
DOLLY_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
ALPACA_INTRO = DOLLY_INTRO.replace("task.", "task, paired with an input that provides further context.")
PROMPT_TEMPLATES = {
    # https://github.com/databrickslabs/dolly training/consts.py, with the tokenizer's EOS for its "### End"
    "dolly": r"""
{{- bos_token }}{{ messages[0].content if messages[0].role == 'system' else 'INTRO' }}
{%- for message in messages %}
{{- '\n\n### Instruction:\n' + message.content if message.role == 'user' }}
{{- '\n\nInput:\n' + message.context if message.role == 'user' and message.context }}
{{- '\n\n### Response:\n' + message.content + eos_token if message.role == 'assistant' }}
{%- endfor %}
{{- '\n\n### Response:\n' if add_generation_prompt }}""".replace("INTRO", DOLLY_INTRO),
    # https://github.com/tatsu-lab/stanford_alpaca train.py
    "alpaca": r"""
{%- set intro = 'WITH' if messages | selectattr('context') | list else 'INTRO' %}
{{- bos_token }}{{ messages[0].content if messages[0].role == 'system' else intro }}
{%- for message in messages %}
{{- '\n\n### Instruction:\n' + message.content if message.role == 'user' }}
{{- '\n\n### Input:\n' + message.context if message.role == 'user' and message.context }}
{{- '\n\n### Response:' + message.content + eos_token if message.role == 'assistant' }}
{%- endfor %}
{{- '\n\n### Response:' if add_generation_prompt }}""".replace("WITH", ALPACA_INTRO).replace("INTRO", DOLLY_INTRO),
    # https://github.com/meta-llama/llama llama/generation.py
    "llama2": r"""
{%- set has_system = messages[0].role == 'system' %}
{%- for message in messages[has_system | int:] %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate: user, assistant, user, ...') }}
{%- endif %}
{{- (bos_token or '') + '[INST] ' if message.role == 'user' }}
{{- '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' if loop.first and has_system }}
{{- message.content + ' [/INST]' if message.role == 'user' else ' ' + message.content + ' ' + eos_token }}
{%- endfor %}""",
    # https://github.com/openai/openai-python/blob/v0.28.1/chatml.md; for tokenizers that know its two tokens
    "chatml": r"""
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{{- '<|im_start|>assistant\n' if add_generation_prompt }}""",
    "plain": r"""
{{- bos_token }}
{%- for message in messages %}
{{- message.content + (eos_token if message.role == 'assistant' else '\n') }}
{%- endfor %}""",
}
DEFAULT_TEMPLATES = {"dolly": "dolly", "alpaca": "alpaca", "prompt": "plain"}
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError)  # what a chat template can raise


def set_prompt_template(tokenizer, data_args, data_format: str) -> str:
    """Give the tokenizer the chat template of the prompts, so that it is saved with the model; returns its name."""
    default = "chat" if tokenizer.chat_template else DEFAULT_TEMPLATES.get(data_format, "chat")
    name = data_args.prompt_template or default
    if name != "chat":
        tokenizer.chat_template = PROMPT_TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        known = f"has no chat template; give one of {', '.join(PROMPT_TEMPLATES)} or a Jinja file"
        raise UsageError(f"--prompt_template {data_args.prompt_template or '(not given)'}: the tokenizer {known}")
    # transformers tokenises rendered chats without special tokens: a BOS that the tokenizer would write goes in front.
    if starts_with_bos(tokenizer):
        written = "bos_token" in tokenizer.get_chat_template()
        with suppress(RowError):  # a template that cannot take a single question
            written = render([{"role": "user", "content": "?"}], tokenizer).startswith(tokenizer.bos_token)
        if not written:
            tokenizer.chat_template = "{{ bos_token }}" + tokenizer.get_chat_template()
    return name


def starts_with_bos(tokenizer) -> bool:
    """Whether the tokenizer by itself puts BOS before a text."""
    return tokenizer.bos_token is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def render(messages: list[dict], tokenizer, add_generation_prompt: bool = False) -> str:
    """The chat as the template writes it; raises RowError with the template's own message."""
    if any("context" in m for m in messages) and not takes_context(tokenizer, tokenizer.get_chat_template()):
        texts = ["\n\n".join(filter(None, (m["content"], m.get("context")))) for m in messages]
        messages = [{"role": m["role"], "content": text} for m, text in zip(messages, texts, strict=True)]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TEMPLATE_ERRORS as error:
        raise RowError(f"the template says: {error}") from None


@lru_cache
def takes_context(tokenizer, template: str) -> bool:
    """Whether a chat template writes a user message's `context`."""
    probe = [{"role": "user", "content": "?", "context": MARKS[0]}]
    try:
        return MARKS[0] in tokenizer.apply_chat_template(probe, chat_template=template, tokenize=False)
    except TEMPLATE_ERRORS:
        return False


# ------------------------------------------------------------------------------------------------ labels

# Private-use characters; one stands for what a turn says while the template's own text around it is found out.
MARKS = [chr(code) for code in range(0xF0000, 0xF0100)]

# The text of a chat and where its answers are in it; borders: places up to where the text must keep its tokens.
Chat = namedtuple("Chat", "messages text answers borders unsupervised")
Answer = namedtuple("Answer", "turn start end closed")  # closed: a stop token ends it


def lay_out(messages: list[dict], tokenizer) -> Chat:
    """
    A chat as the template writes it, and the answers in it, each from where a generation would start.

    From the end of the conversation before it, with the generation prompt, an answer is supervised through all closing
    tokens (EOS, if there are none). Where the text does not begin so, it is not, and at the last one RowError raised.
    """
    text, stops, answers, final = render(messages, tokenizer).rstrip(), find_stop_tokens(tokenizer), [], messages[-1]
    for turn, message in enumerate(messages):
        start = find_start(messages, turn, text, tokenizer) if message["role"] == "assistant" else None
        end = len(text) if start is None or message is final else find_end(messages, turn, text, tokenizer)
        if not (message["content"] in text[start:end] and message.get("context", "") in text):
            split_at_turn(messages, turn, tokenizer)  # says so if the turn is left out
            raise RowError("the template changes what the turns say")
        if start is not None:
            answers.append(Answer(turn, start, end, text[:end].endswith(stops)))
    # The stop token at the end may also be what the answer says.
    open_end = text.endswith(final["content"]) and not split_at_turn(messages, len(messages) - 1, tokenizer)[1]
    if open_end or not answers[-1].closed:
        text += tokenizer.eos_token
        answers[-1] = answers[-1]._replace(end=len(text), closed=True)
    # Stop tokens are cut out of a text before the rest is tokenised: they are safe borders.
    borders = [a.start for a in answers] + [a.end for a in answers if not a.closed]
    unsupervised = sum(message["role"] == "assistant" for message in messages) - len(answers)
    return Chat(messages, text, answers, borders, unsupervised)


def find_start(messages: list[dict], turn: int, text: str, tokenizer) -> int | None:
    """Where an answer begins for a generation, None if the template writes an earlier prompt otherwise in the text."""
    try:
        prompt = render(messages[:turn], tokenizer, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        trained = split_at_turn(messages, turn, tokenizer)[0]
        same = len(os.path.commonprefix([prompt, trained]))
        prompt, trained = (repr(ending[same:][-40:]) for ending in (prompt, trained))
        raise RowError(f"the template's generation prompt has {prompt} where the text before an answer has {trained}")
    except RowError:
        if turn == len(messages) - 1:
            raise
        return None


def find_end(messages: list[dict], turn: int, text: str, tokenizer) -> int:
    """Where an earlier answer with its closing tokens ends: where the conversation ends that ends with it."""
    alone = render(messages[: turn + 1], tokenizer).rstrip()
    if text.startswith(alone):
        return len(alone)
    # Written otherwise there (with reasoning, another closing token): a mark in the answer's place shows where it is;
    # what closes the last one closes it, or else the next stop token.
    before, after = split_at_turn(messages, turn, tokenizer)
    if before + messages[turn]["content"] + after != text:
        raise RowError("the template changes what earlier turns say")
    closing = split_at_turn(messages[: turn + 1], turn, tokenizer)[1]
    if not closing or not after.startswith(closing):
        stops = "|".join(map(re.escape, find_stop_tokens(tokenizer)))
        closing = found.group() if (found := re.match(rf"\s*(?:{stops})", after)) else ""
    return len(text) - len(after) + len(closing)


def split_at_turn(messages: list[dict], turn: int, tokenizer) -> tuple[str, str]:
    """What the template writes before and after what a turn says; raises RowError where it leaves the turn out."""
    mark = next(mark for mark in MARKS if not any(mark in text for m in messages for text in m.values()))
    marked = [*messages[:turn], messages[turn] | {"content": mark}, *messages[turn + 1 :]]
    before, found, after = render(marked, tokenizer).rstrip().partition(mark)
    if not found:
        raise RowError(f"the template leaves out the {messages[turn]['role']} turn")
    return before, after


@lru_cache
def find_stop_tokens(tokenizer) -> tuple[str, ...]:
    """The tokens that can end an answer: all added ones but white space, and BOS where it is not EOS too."""
    tokens = set(tokenizer.get_added_vocab()) - ({tokenizer.bos_token} - {tokenizer.eos_token})
    return tuple(sorted((token for token in tokens if token.strip()), key=len, reverse=True))


def tokenize(texts: list[str], tokenizer) -> list:
    """An Encoding for each text, all at once: on two cores a thousand texts take half the time of one by one."""
    return tokenizer(texts, add_special_tokens=False, verbose=False).encodings if texts else []


def place_answers(chat: Chat, whole, heads: list, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """
    Token ids of a chat, and the (first, end) of each answer. whole, heads: Encodings of the text, up to its borders.

    In one piece where each prompt then has the tokens that a generation has, else in pieces, prompt by answer.
    """
    ids, counts = whole.ids, {border: len(head) for border, head in zip(chat.borders, heads, strict=True)}
    if all(ids[: len(head)] == head.ids for head in heads):
        counts |= {a.end: whole.char_to_token(a.end - 1) + 1 for a in chat.answers if a.closed}
        return ids, [(counts[answer.start], counts[answer.end]) for answer in chat.answers]
    places = [0, *(place for answer in chat.answers for place in (answer.start, answer.end))]
    pieces = [piece.ids for piece in tokenize([chat.text[a:b] for a, b in itertools.pairwise(places)], tokenizer)]
    counts = list(itertools.accumulate(map(len, pieces)))
    return sum(pieces, []), list(zip(counts[::2], counts[1::2], strict=True))


def shorten_chat(chat: Chat, places: list, excess: int, tokenizer) -> tuple[list[dict], str] | None:
    """
    The messages with less in them: exchanges at the front go, else the context's end, else nothing (None).

    The system turn and the last exchange stay: no answer is trained on whose question is gone.
    """
    messages = chat.messages
    first = next(i for i, message in enumerate(messages) if message["role"] != "system")
    starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user" != messages[i - 1]["role"]]
    if starts:
        # At most so many tokens go with the turns before one (the system turn's stay).
        ends = [(answer.turn, end) for answer, (_, end) in zip(chat.answers, places, strict=True)]
        enough = (i for i in starts if max((end for turn, end in ends if turn < i), default=0) >= excess)
        return [*messages[:first], *messages[next(enough, starts[-1]) :]], "cut_exchanges"
    for turn, message in enumerate(messages):
        if context := message.get("context"):
            starts = [start for start, _ in tokenize([context], tokenizer)[0].offsets]
            left = context[: starts[-excess]].rstrip() if excess < len(starts) else ""
            message = {name: text for name, text in (message | {"context": left}).items() if text}
            return [*messages[:turn], message, *messages[turn + 1 :]], "cut_context"
    return None


@dataclass
class Row:
    """What is trained on of a row (labels: -100 where none), and what audit and evaluation need; or its `problem`."""

    input_ids: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    source: str = ""  # the last answer's prompt
    reference: str = ""  # the last answer
    cut_exchanges: bool = False
    cut_context: bool = False
    cut_answer: bool = False
    tokens: int = 0
    supervised_tokens: int = 0
    answers_cut_off_whole: int = 0
    answers_unsupervised: int = 0
    answers: int = 0
    answers_with_stop: int = 0
    rows_with_special_tokens_in_text: bool = False
    leading_bos: int = 0
    prompt_hash: int = 0
    row_hash: int = 0
    problem: str = ""


def to_columns(rows: list[Row]) -> dict[str, list]:
    return {name: [getattr(row, name) for row in rows] for name in Row.__dataclass_fields__}


def hash_text(text: str) -> int:
    """A stable 63-bit number of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


def encode_chats(
    rows: dict, tokenizer, data_format: str, columns: tuple, limit: int, assistant_only_loss: bool = True
) -> dict:
    """A batch of rows as columns of Row; what is too long goes round again, shortened, until it fits."""
    encoded, todo = [], []
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    for values in zip(*(rows[name] for name in columns), strict=True):
        encoded.append(row := Row())
        try:
            messages = to_messages(dict(zip(columns, values, strict=True)), data_format, columns)
        except RowError as error:
            row.problem = str(error)
            continue
        turns = ["\0".join(filter(None, (m["content"], m.get("context")))) for m in messages]
        prompts = [turn for turn, message in zip(turns, messages, strict=True) if message["role"] == "user"]
        row.prompt_hash, row.row_hash = hash_text("\0".join(prompts)), hash_text("\0".join(turns))
        row.rows_with_special_tokens_in_text = any(map(special.search, turns))
        todo.append((row, messages))
    while todo:
        todo = encode_round(todo, tokenizer, limit, assistant_only_loss)
    return to_columns([Row(problem=row.problem) if row.problem else row for row in encoded])


def encode_round(todo: list, tokenizer, limit: int, assistant_only_loss: bool) -> list:
    """Encode chats, given as (Row, messages); returns those that are too long, shortened, in the same way."""
    chats, too_long = [], []
    for row, messages in todo:
        try:
            chats.append((row, lay_out(messages, tokenizer)))
        except RowError as error:
            row.problem = str(error)
    texts = [chat.text[:place] for _, chat in chats for place in (len(chat.text), *chat.borders)]
    encodings = iter(tokenize(texts, tokenizer))
    for row, chat in chats:
        whole, *heads = itertools.islice(encodings, 1 + len(chat.borders))
        ids, places = place_answers(chat, whole, heads, tokenizer)
        if len(ids) > limit and (shorter := shorten_chat(chat, places, len(ids) - limit, tokenizer)):
            messages, what = shorter
            setattr(row, what, True)
            too_long.append((row, messages))
        elif places[0][0] >= limit:
            row.problem = "no room for an answer in --max_seq_length"
        else:
            fill_row(row, chat, ids, places, limit, tokenizer.bos_token_id, assistant_only_loss)
    return too_long


def fill_row(row: Row, chat: Chat, ids: list[int], places: list, limit: int, bos: int, assistant_only_loss: bool):
    """Put a chat that can be no shorter into its Row; of more than `limit` tokens the last answer's end goes."""
    labels = [-100] * len(ids)
    for first, end in places if assistant_only_loss else [(0, len(ids))]:
        labels[first:end] = ids[first:end]
    row.input_ids, row.labels, row.cut_answer = ids[:limit], [-100, *labels[1:limit]], len(ids) > limit
    row.tokens, row.supervised_tokens = len(row.labels), sum(label != -100 for label in row.labels)
    kept = [answer for answer, (first, _) in zip(chat.answers, places, strict=True) if first < limit]
    row.source, row.reference = chat.text[: kept[-1].start], chat.messages[kept[-1].turn]["content"]
    row.answers, row.answers_cut_off_whole = len(kept), len(places) - len(kept)
    row.answers_unsupervised = chat.unsupervised
    ends = [end for answer, (_, end) in zip(chat.answers, places, strict=True) if answer.closed]
    row.answers_with_stop = sum(end <= limit for end in ends)
    row.leading_bos = next((i for i, token in enumerate(ids) if token != bos), len(ids))


def encode_texts(rows: dict, tokenizer, column: str, limit: int) -> dict:
    """Plain texts, each ended by EOS, one after the other and cut into rows of `limit` tokens; all are supervised."""
    texts = [text for text in rows[column] if text and text.strip()]
    eos, ids = tokenizer.eos_token_id, []
    for text in texts:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        ids += tokens + [eos] * (tokens[-1:] != [eos])  # some tokenizers end texts themselves
    blocks = [ids[start : start + limit] for start in range(0, len(ids), limit)]
    counts = [{"tokens": len(b), "supervised_tokens": len(b) - 1, "row_hash": hash_text(str(b))} for b in blocks]
    encoded = [Row(b, [-100, *b[1:]], **count) for b, count in zip(blocks, counts, strict=True) if len(b) > 1]
    return to_columns(encoded + [Row(problem="empty text")] * (len(rows[column]) - len(texts)))


def encode_split(rows, split: str, max_samples: int | None, tokenizer, limit: int, data_args, training_args):
    """All rows of a split, encoded, those that cannot be used included (see Row)."""
    data_format, columns = find_format(rows.column_names, data_args)
    rows = rows.select(range(min(max_samples or len(rows), len(rows))))
    settings = {"data_format": data_format, "columns": columns, "assistant_only_loss": data_args.assistant_only_loss}
    settings = {"column": columns[0]} if data_format == "text" else settings
    with training_args.main_process_first(desc=f"tokenising {split}"):
        return rows.map(
            encode_texts if data_format == "text" else encode_chats,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=rows.column_names,
            load_from_cache_file=not data_args.overwrite_cache,
            fn_kwargs={"tokenizer": tokenizer, "limit": limit, **settings},
            desc=f"Tokenising {split}",
        )


def encode_splits(raw, tokenizer, limit: int, data_args, training_args) -> dict:
    """The splits asked for, encoded; without validation data a share of the training prompts (of a text: its end)."""
    wanted = {
        "train": (training_args.do_train or data_args.audit_only, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    carve, splits = training_args.do_eval and "validation" not in raw and wanted["train"][0], {}
    for split, (needed, most) in wanted.items():
        if needed and split in raw:
            most = None if carve and split == "train" else most
            splits[split] = encode_split(raw[split], split, most, tokenizer, limit, data_args, training_args)
        elif needed and not (carve and split == "validation"):
            named = f"--dataset_name {data_args.dataset_name}"
            raise UsageError(f"{named}: has no split {split!r}; it has {', '.join(raw)}")
    if carve:
        encoded, share = splits["train"], data_args.validation_split_percentage / 100
        chosen = np.array(encoded["prompt_hash"][:], dtype=np.uint64) % 10_000 < share * 10_000
        chosen &= np.array(encoded["problem"][:]) == ""
        if find_format(raw["train"].column_names, data_args)[0] == "text":
            chosen = np.arange(len(encoded)) >= len(encoded) * (1 - share)
        for split, mask in (("train", ~chosen), ("validation", chosen)):
            splits[split] = encoded.select(np.flatnonzero(mask)[: wanted[split][1]])
    return splits


def find_usable(encoded) -> list[int]:
    """Indices of the rows without a problem."""
    return [i for i, problem in enumerate(encoded["problem"][:]) if not problem]


# ------------------------------------------------------------------------------------------------ model


def load_causal_model(config, tokenizer, model_args, training_args):
    """The model, with adapters if asked for, and with the template's stop tokens in its generation settings."""
    # fp32 here: transformers 5 would keep a bf16 file in bf16, where small updates are lost unless they are rounded
    # stochastically. Frozen weights under adapters are not updated and may stay in bf16.
    low = model_args.pure_bf16 or (model_args.lora_r and training_args.bf16)
    settings = {"config": config, "dtype": torch.bfloat16 if low else torch.float32, **model_args.hub}
    settings["attn_implementation"], name = model_args.attn_implementation, model_args.model_name_or_path
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **settings)
    except (OSError, ImportError, ValueError) as error:
        raise UsageError(guards.explain_load_error(name, error) if guards else str(error)) from None
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        print(f"the tokenizer has more tokens than the model: the embeddings grow to {len(tokenizer)}", flush=True)
        model.resize_token_embeddings(len(tokenizer))
    stops = find_stop_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return add_adapters(model, model_args, training_args) if model_args.lora_r else model


def find_stop_ids(tokenizer, generation_config) -> list[int]:
    """Ids that end an answer: the last of the template's closing tokens, EOS, and what the model came with."""
    known = generation_config.eos_token_id
    ids = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with suppress(RowError):  # no template, or one that wants more than a question and an answer
        ids = tokenize([lay_out(chat, tokenizer).text], tokenizer)[0].ids[-1:] + ids
    return [i for i in dict.fromkeys(ids) if i is not None]


def make_answer_config(model, tokenizer, data_args, training_args) -> transformers.GenerationConfig:
    """How answers are generated in evaluation; the stop tokens as a list."""
    return transformers.GenerationConfig(
        max_new_tokens=data_args.max_new_tokens,
        num_beams=training_args.generation_num_beams or data_args.num_beams,
        eos_token_id=find_stop_ids(tokenizer, model.generation_config),
        pad_token_id=tokenizer.pad_token_id,
    )


def add_adapters(model, model_args, training_args):
    """LoRA adapters on the model (https://arxiv.org/abs/2106.09685) by peft; everything else is frozen."""
    import peft

    targets = model_args.lora_target_modules or "all-linear"
    settings = {"r": model_args.lora_r, "lora_alpha": model_args.lora_alpha, "lora_dropout": model_args.lora_dropout}
    if training_args.gradient_checkpointing:
        model.enable_input_require_grads()  # else no gradient enters the first checkpointed block
    try:
        config = peft.LoraConfig(**settings, target_modules=targets, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(f"--lora_target_modules {targets}: {error}") from None


# ------------------------------------------------------------------------------------------------ training


@dataclass
class InstructCollator:
    """Pads rows on the right to a multiple of so many tokens, labels with -100."""

    pad_token_id: int
    multiple: int = 1

    def __call__(self, rows: list[dict]) -> dict:
        longest = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        pads = {"input_ids": self.pad_token_id, "labels": -100, "attention_mask": 0}
        batch = {k: torch.tensor([[*r[k], *[pad] * (longest - len(r[k]))] for r in rows]) for k, pad in pads.items()}
        return batch | {"use_cache": False}


def shift_labels(labels: torch.Tensor) -> torch.Tensor:
    """Labels (rows, tokens) moved one to the left: what each position has to predict; -100 at the end."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy in fp32. logits: (..., vocabulary); labels: (...) of ids, -100 where nothing is asked."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )


def compute_next_token_loss(outputs, labels, num_items_in_batch=None, label_smoothing: float = 0.0) -> torch.Tensor:
    """The training loss: cross-entropy of each next token, summed, over the tokens of the whole global batch."""
    labels = shift_labels(labels)
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return token_loss_sum(outputs.logits, labels, label_smoothing) / items


def choose_rows(model, rows, limit: int, collator, data_args, training_args) -> tuple:
    """(rows to train on, their collator, callbacks, compute_loss_func): packed if asked for, and without logits."""
    loss = partial(compute_next_token_loss, label_smoothing=training_args.label_smoothing_factor)
    if training_args.use_liger_kernel:  # it fuses the loss into the last matrix product, over num_items_in_batch too
        loss = None
    elif fast_batches:
        loss = fast_batches.fuse_loss(model, training_args.label_smoothing_factor, shift=True) or loss
    if not data_args.packing:
        return rows, collator, [], loss
    rows, collator, check = fast_batches.pack_causal(model, rows, limit, collator, training_args.use_cpu)
    if training_args.process_index == 0:
        print(f"packing: {rows}", flush=True)
    return rows, collator, [check], loss


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
    number of tokens and what else it counts. train_collator: of the training rows, where they are packed.
    """

    def __init__(self, *args, train_collator=None, optimizer_cls_and_kwargs=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.train_collator = train_collator or self.data_collator
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs  # Trainer's, which Seq2SeqTrainer's own lacks (5.23)

    def get_train_dataloader(self):
        """The stock one with the training rows' collator."""
        plain, self.data_collator = self.data_collator, self.train_collator
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def compute_loss(self, model, inputs, *args, **kwargs):
        """The stock one; a loss that is made inside the output layer is given the labels there."""
        labelled = getattr(self.compute_loss_func, "labelled", nullcontext)
        with labelled(inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """The seeded random order of FilledSampler; other strategies and --dataloader_drop_last as in the library."""
        if self.args.train_sampling_strategy != "random" or self.args.dataloader_drop_last:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        multiple = self.args.per_device_train_batch_size * self.args.world_size if self.args.world_size > 1 else 1
        return FilledSampler(len(self.train_dataset), multiple, seed)

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

    def __init__(self, *args, answer_config: transformers.GenerationConfig, rouge_language: str = "en", **kwargs):
        super().__init__(*args, **kwargs)
        self.answer_config, self.rouge_language = answer_config, rouge_language

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
            rows, tokenizer = dataloader.dataset, self.processing_class
            self.answers = reports.generate_answers(self.model, self.args, rows, tokenizer, self.answer_config)
            scores |= reports.score_answers(self.answers, rows["reference"][:], self.rouge_language)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


# ------------------------------------------------------------------------------------------------ results


def evaluate_split(trainer, rows, prefix: str) -> None:
    """Evaluate on one split, log and save the metrics under `prefix`, and write the answers, if any."""
    metrics = trainer.predict(rows, metric_key_prefix=prefix).metrics | {f"{prefix}_samples": len(rows)}
    trainer.log({k: v for k, v in metrics.items() if k.startswith(prefix)})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if trainer.args.predict_with_generate and trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "generated_predictions.jsonl"
        write_predictions(path, rows, [text for text, _, _ in trainer.answers])


def write_predictions(path: Path, rows, predictions: list[str]) -> None:
    """JSONL with `source`, `reference` and `prediction` a row."""
    with open(path, "w", encoding="utf-8") as stream:
        for row, prediction in zip(rows, predictions, strict=True):
            record = {"source": row["source"], "reference": row["reference"], "prediction": prediction}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def merge_adapters(model_args, folder: str) -> None:
    """Write base and adapters as one plain model to `folder`/merged, in a process that DeepSpeed has not touched."""
    flags = {"--adapter_dir": folder, "--output_dir": f"{folder}/merged", "--cache_dir": model_args.cache_dir}
    flags |= {"--model_name_or_path": model_args.model_name_or_path, "--model_revision": model_args.model_revision}
    command = [sys.executable, str(MERGE_TOOL), *(part for flag in flags.items() if flag[1] for part in flag)]
    command += ["--trust_remote_code"] * model_args.trust_remote_code
    token = {"HF_TOKEN": model_args.token} if model_args.token else {}
    if subprocess.run(command, env=os.environ | token).returncode != 0:
        raise UsageError(f"--merge_lora: {MERGE_TOOL.name} failed; the adapters themselves are in {folder}")


# ------------------------------------------------------------------------------------------------ main


def print_absent(training_args) -> None:
    """Say what each absent companion costs."""
    companions = zip(ABSENT.items(), (guards, reports, fast_batches, zero_adafactor), strict=True)
    for (name, cost), module in companions:
        if module is None and training_args.process_index == 0:
            print(f"{name} is not beside this script: {cost}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune, evaluate and predict as the arguments say; returns the metrics of all_results.json."""
    # Arguments first: ZeRO-3 partitions the model while it is loaded, and knows that from training_args being alive.
    argv, wanted = sys.argv[1:] if argv is None else argv, (INSTRUCT_ARGUMENTS, find_format, find_instruct_problems)
    model_args, data_args, training_args = parse_arguments(argv, *wanted, remove_unused_columns=False)  # for answers
    last_checkpoint = training_args.resume_from_checkpoint
    if guards:
        guards.set_up_logging(training_args)
        last_checkpoint = guards.find_checkpoint(training_args)
    if training_args.n_gpu > 1:  # DataParallel would scatter the rows but not the token count
        training_args._n_gpu = 1
    print_absent(training_args)
    set_seed(training_args.seed)

    # Data, tokenizer, prompts and labels; the audit before the model is loaded
    raw = load_raw_datasets(data_args, model_args)
    data_format, columns = find_format(next(iter(raw.values())).column_names, data_args)
    config, tokenizer, limit = load_tokenizer(model_args, data_args)
    template = set_prompt_template(tokenizer, data_args, data_format) if data_format != "text" else "none"
    splits = encode_splits(raw, tokenizer, limit, data_args, training_args)
    if training_args.process_index == 0:
        print(f"data format: {data_format} ({', '.join(columns)}); prompt template: {template}", flush=True)
    if reports:
        judge = {"skip": data_args.skip_audit, "only": data_args.audit_only, "rank": training_args.process_index}
        counts = reports.audit(splits, tokenizer, starts_with_bos(tokenizer), **judge)
    if data_args.audit_only:
        return counts
    splits = {split: encoded.select(find_usable(encoded)) for split, encoded in splits.items()}

    # Model, batches, loss, trainer
    model = load_causal_model(config, tokenizer, model_args, training_args)
    half = training_args.bf16 or training_args.fp16 or model.dtype == torch.bfloat16
    collator = train_collator = InstructCollator(tokenizer.pad_token_id, multiple=8 if half else 1)
    train_rows, loss, callbacks = None, None, []
    if training_args.do_train:
        settings = (splits["train"], limit, collator, data_args, training_args)
        train_rows, train_collator, callbacks, loss = choose_rows(model, *settings)
    answer_config = make_answer_config(model, tokenizer, data_args, training_args)
    if training_args.do_train and training_args.predict_with_generate and "validation" in splits:
        shown = splits["validation"].select(range(min(SHOWN_SAMPLES, len(splits["validation"]))))
        write = partial(reports.write_answers, rows=shown, tokenizer=tokenizer, config=answer_config)
        callbacks.append(reports.SampleCallback(shown, write))
    trainer = InstructTrainer(
        model=model,
        args=training_args,
        train_dataset=FilledRows(train_rows, tokenizer.eos_token_id) if training_args.do_train else None,
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
        train_collator=train_collator,
        compute_loss_func=loss,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=zero_adafactor.choose(training_args) if zero_adafactor else None,
        answer_config=answer_config,
        rouge_language=data_args.rouge_language,
    )
    if reports:
        reports.start_tracking(trainer, model_args, data_args)
    if training_args.do_train:
        if reports and trainer.is_world_process_zero():
            optimizer = zero_adafactor.describe(training_args, model) if zero_adafactor else training_args.optim.value
            print(reports.describe_run(model, training_args, optimizer, last_checkpoint), flush=True)
        metrics = trainer.train(resume_from_checkpoint=last_checkpoint).metrics
        trainer.save_model()
        if trainer.is_world_process_zero():  # the library leaves it out beside adapters
            model.generation_config.save_pretrained(training_args.output_dir)
        trainer.save_metrics("train", metrics | {"train_samples": len(splits["train"]), "train_rows": len(train_rows)})
        trainer.log_metrics("train", metrics)

    # Evaluate and predict: generated_predictions.jsonl holds the test rows, or the validation rows without a test
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        if split in splits:
            evaluate_split(trainer, splits[split], prefix)
    trainer.save_state()
    if reports:
        reports.write_reports(trainer, "text-generation", model_args, data_args)
    if model_args.merge_lora and training_args.do_train and trainer.is_world_process_zero():
        merge_adapters(model_args, training_args.output_dir)
    results = f"{training_args.output_dir}/all_results.json"
    return json.loads(Path(results).read_text()) if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    guards.run_and_exit(main) if guards else main()
