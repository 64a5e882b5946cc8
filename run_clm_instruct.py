#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "rouge-score", "nltk", "matplotlib",
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
"""

import argparse
import hashlib
import itertools
import json
import os
import re
import sys
from collections import namedtuple
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

with suppress(ModuleNotFoundError):  # before the libraries are loaded: a misspelt flag is answered at once
    import flag_checks

    flag_checks.answer_unknown_flags(__name__, __file__, sys.argv[1:])

import datasets
import jinja2
import numpy as np
import torch
import transformers
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import get_length_grouped_indices

# The companions beside this script. Without them it trains to the same losses and weights; ABSENT says what is lost.
guards = tables = model_checks = chat_turns = reports = fast_batches = zero_adafactor = lora = None
with suppress(ModuleNotFoundError):
    import guards
with suppress(ModuleNotFoundError):
    import tables
with suppress(ModuleNotFoundError):
    import model_checks
with suppress(ModuleNotFoundError):
    import chat_turns
with suppress(ModuleNotFoundError):
    import reports
with suppress(ModuleNotFoundError):
    import fast_batches
with suppress(ModuleNotFoundError):
    import zero_adafactor
with suppress(ModuleNotFoundError):
    import lora
UsageError = guards.UsageError if guards else ValueError
RowError = chat_turns.RowError if chat_turns else ValueError  # why a row is left out; rows are counted by it

ABSENT = {
    "guards.py": "bad input ends late, in a traceback; a killed run goes on only with --resume_from_checkpoint; no "
    "curves or model card, and two runs in MLflow",
    "tables.py": "data as .csv, .json, .jsonl, .parquet or .txt only, and columns are not checked to be text",
    "model_checks.py": "a model that lacks weights, or has another's tokenizer, is trained all the same",
    "reports.py": "no audit of labels, no samples, no list of decisions",
    "fast_batches.py": "batches are padded and all logits made: the same losses, about twice the time, more memory",
    "zero_adafactor.py": "under ZeRO --optim adafactor is the library's, which does not factor there: 4 bytes of "
    "state a parameter, and updates that depend on the number of ranks",
}
ABSENT |= {"chat_turns.py": "rows with tools, tool calls, reasoning or weights are left out"}

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Formats by their columns, tried in this order: (question[, context], answer), or one column of turns or of text.
KNOWN_FORMATS = (
    *(("dolly", ("instruction", "context", "response")), ("alpaca", ("instruction", "input", "output"))),
    *(("chat", ("messages",)), ("prompt", ("prompt", "completion")), ("prompt", ("prompt", "response"))),
    *(("prompt", ("question", "answer")), ("prompt", ("question", "response"))),
    *(("dolly", ("instruction", "response")), ("alpaca", ("instruction", "output")), ("text", ("text",))),
)
CHAT_COLUMNS = ("tools", "system", "system_prompt")  # which belong to a row's chat, whatever its format
DEFAULT_MAX_SEQ_LENGTH = 1024

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
    pure_bf16: bool = HfArg(default=False, help="All in bf16, rounded stochastically; with --optim adafactor.")
    lora_r: int = HfArg(default=0, help="Train low-rank adapters of this rank. 0: all parameters.")
    lora_alpha: float = HfArg(default=32.0, help="Adapters are scaled by alpha / r.")
    lora_dropout: float = HfArg(default=0.05, help="Dropout before the adapters.")
    lora_target_modules: list[str] | None = HfArg(default=None, help="Modules with adapters. Default: all linear.")
    merge_lora: bool = HfArg(default=False, help="Then write base and adapters as one model to OUTPUT_DIR/merged.")
    merge_dtype: str = HfArg(default="float32", help="Type of the merged weights: float32, bfloat16, float16.")
    rank_timeout: float = HfArg(default=30.0, help="Seconds without a sign of another rank, after which a run ends.")


@dataclass
class InstructDataArguments:
    """Which data to train and evaluate on, how prompts are made of it, and how it is cut and scored."""

    dataset_name: str | None = HfArg(default=None, help="A dataset's name on the hub, or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that dataset.")
    train_file: str | None = HfArg(default=None, help="Training data: .json, .jsonl, .csv, .parquet; .txt for text.")
    validation_file: str | None = HfArg(default=None, help="Validation data, same formats.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, same formats.")
    delimiter: str | None = HfArg(default=None, help="What separates a .csv's fields, if not a comma.")
    file_encoding: str | None = HfArg(default=None, help="Encoding of text files, if not UTF-8, e.g. cp1252.")
    validation_split_percentage: float = HfArg(default=5.0, help="Share of training prompts kept where there is none.")
    data_format: str | None = HfArg(default=None, help="dolly, alpaca, prompt, chat, text; else by columns.")
    text_column: str | None = HfArg(default=None, help="Column of plain text to train on whole.")
    drop_keys: list[str] | None = HfArg(default=None, help="Columns, or keys of turns, to do without if refused.")
    prompt_template: str | None = HfArg(default=None, help="chat (the tokenizer's), dolly, plain ..., or a file.")
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
    if tables:
        problems += tables.find_problems(args, ["train_file", "validation_file", "test_file"], find_columns)
    if guards:
        guards.check_training(args, problems)
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
    problems = [p for module in (zero_adafactor, lora) if module for p in module.find_problems(args)]
    pure = args.pure_bf16 or "step_in_backward" in str(args.optim_args)
    for given, there, flag, name in (
        (args.packing, fast_batches, "--packing", "fast_batches.py"),
        (pure, zero_adafactor, "--pure_bf16, step_in_backward", "zero_adafactor.py"),
        (args.lora_r, lora, "--lora_r", "lora.py"),
        (args.audit_only, reports, "--audit_only", "reports.py"),
        (args.predict_with_generate, reports, "--predict_with_generate", "reports.py"),
    ):
        if given and not there:
            problems.append(f"{flag}: needs {name}; copy it beside this script")
    return problems + (guards.find_format_problems(args, KNOWN_FORMATS, PROMPT_TEMPLATES) if guards else [])


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


def load_raw_datasets(data_args, model_args):
    """A DatasetDict with `train`, `validation` and `test` as far as they were given, from files or the hub."""
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if data_args.dataset_name is not None:
        return datasets.load_dataset(data_args.dataset_name, data_args.dataset_config_name, **hub)
    files = {split: getattr(data_args, f"{split}_file") for split in ("train", "validation", "test")}
    args = argparse.Namespace(**vars(data_args), **vars(model_args))
    load = partial(tables.read_table, args=args) if tables else load_file
    return datasets.DatasetDict({split: load(path) for split, path in files.items() if path is not None})


def load_file(path: str):
    """A file by the datasets library; a .txt is one text."""
    options = {".txt": {"sample_by": "document"}, ".csv": {"keep_default_na": False}}.get(Path(path).suffix, {})
    return datasets.load_dataset(FILE_TYPES.get(Path(path).suffix, "text"), data_files=path, split="train", **options)


def find_format(columns: list[str], args) -> tuple[str, tuple[str, ...]]:
    """The data's format and its columns: as --data_format or --text_column say, else by the column names."""
    known = [(name, needed) for name, needed in KNOWN_FORMATS if args.data_format in (None, name)]
    known = known if args.text_column is None else [("text", (args.text_column,))]
    found = next((pair for pair in known if set(pair[1]) <= set(columns)), None)
    if guards:
        guards.check_format(columns, args, known, found)
    return found


def to_messages(row: dict, data_format: str, columns: tuple[str, ...], drop_keys=()) -> list[dict]:
    """
    One row as chat messages up to its last answer to train on: what to_message returns, a turn each.

    Raises RowError where something needed is missing, or where a turn holds what nobody would learn from.
    """
    first, *context = (parse_turns(row[name]) for name in columns)
    last = context.pop() if context else None
    if data_format == "chat":
        turns = first
    elif isinstance(first, list):  # prompt and completion as lists of messages
        turns = first + (last if isinstance(last, list) else [last])
    else:
        turns = [{"role": "user", "content": first, "context": next(iter(context), None)}]
        turns.append({"role": "assistant", "content": last})
    if not isinstance(turns, list) or not turns:
        raise RowError("no turns")
    system = [{"role": "system", "content": row[name]} for name in CHAT_COLUMNS[1:] if row.get(name)]
    turns = (to_message(turn, drop_keys) for turn in system + turns)
    messages = [message for message in turns if message["content"] or message["role"] != "system"]
    while messages and not (messages[-1]["role"] == "assistant" and messages[-1].get("weight", 1)):
        messages.pop()
    if not messages:
        raise RowError("no answer")
    for message in messages:
        if message["role"] in ("user", "assistant") and not (message["content"] or message.get("tool_calls")):
            raise RowError("empty answer" if message["role"] == "assistant" else "empty instruction")
    return messages


def parse_turns(cell):
    """A list of turns from its JSON, as CSV files and tables.py have it; anything else as it is."""
    with suppress(TypeError, ValueError):
        turns = json.loads(cell)
        return turns if turns and all("role" in dict(turn) for turn in turns) else cell
    return cell


def to_message(turn: dict, drop_keys=()) -> dict:
    """A turn as a message: role, content and perhaps context, stripped; chat_turns.py knows what else it may hold."""
    if chat_turns:
        return chat_turns.read_turn(turn, drop_keys)
    if not isinstance(turn, dict) or any(turn[key] for key in {*turn} - {"role", "content", "context", *drop_keys}):
        raise RowError("a turn of more than role and content needs chat_turns.py beside this script")
    message = {key: str(turn[key]).strip() for key in ("role", "content", "context") if turn.get(key)}
    return {"content": "", **{key: text for key, text in message.items() if text}}


def fetch(auto, model_args, flag: str = "model_name_or_path", **settings):
    """auto.from_pretrained() of what a flag names, else the model; by model_checks.py all weights are its file's."""
    flag = flag if getattr(model_args, flag) else "model_name_or_path"
    hub = {name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    name, settings = getattr(model_args, flag), {"revision": model_args.model_revision, **hub, **settings}
    return model_checks.load(auto, name, flag, **settings) if model_checks else auto.from_pretrained(name, **settings)


def load_tokenizer(model_args, data_args):
    """Configuration, tokenizer (with a pad token) and the longest example in tokens."""
    config = fetch(transformers.AutoConfig, model_args, "config_name")
    tokenizer = fetch(transformers.AutoTokenizer, model_args, "tokenizer_name")
    positions = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_SEQ_LENGTH
    limit = data_args.max_seq_length or min(DEFAULT_MAX_SEQ_LENGTH, positions)
    if guards:
        guards.check_causal_tokenizer(tokenizer, limit, positions, model_args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding has no loss by position, EOS keeps its
    return config, tokenizer, limit


# Chat templates, saved with the tokenizer; more are in prompt_templates/. `context` is a key of ours in a user's turn.
PROMPT_TEMPLATES = {
    # https://github.com/databrickslabs/dolly training/consts.py, with the tokenizer's EOS for its "### End"
    "dolly": r"""
{{- bos_token }}{{ messages[0].content if messages[0].role == 'system' else 'Below is an instruction that describes ' +
    'a task. Write a response that appropriately completes the request.' }}
{%- for message in messages %}
{{- '\n\n### Instruction:\n' + message.content if message.role == 'user' }}
{{- '\n\nInput:\n' + message.context if message.role == 'user' and message.context }}
{{- '\n\n### Response:\n' + message.content + eos_token if message.role == 'assistant' }}
{%- endfor %}
{{- '\n\n### Response:\n' if add_generation_prompt }}""",
    "plain": r"""
{{- bos_token }}
{%- for message in messages %}
{{- message.content + (eos_token if message.role == 'assistant' else '\n') }}
{%- endfor %}""",
}
PROMPT_TEMPLATES |= {path.stem: path.read_text() for path in Path(__file__).parent.glob("prompt_templates/*.jinja")}
DEFAULT_TEMPLATES = {"dolly": "dolly", "alpaca": "alpaca", "prompt": "plain", "chat": "chat"}


def set_prompt_template(tokenizer, data_args, data_format: str) -> str:
    """Give the tokenizer the chat template of the prompts, so that it is saved with the model; returns its name."""
    name = data_args.prompt_template or ("chat" if tokenizer.chat_template else DEFAULT_TEMPLATES[data_format])
    if name != "chat":
        if name not in PROMPT_TEMPLATES and not Path(name).is_file():
            raise UsageError(f"--prompt_template {name}: needs prompt_templates/{name}.jinja beside this script")
        tokenizer.chat_template = PROMPT_TEMPLATES.get(name) or Path(name).read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        asked, known = data_args.prompt_template or "(not given)", ", ".join(PROMPT_TEMPLATES)
        raise UsageError(f"--prompt_template {asked}: the tokenizer has no chat template; give one of {known}, a file")
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


def render(messages: list[dict], tokenizer, tools: list | None = None, add_generation_prompt: bool = False) -> str:
    """The chat as the template writes it; raises RowError with the template's own message."""
    takes_context = re.search(r"\.context\b|['\"]context['\"]", str(tokenizer.chat_template))
    if not takes_context and any("context" in m for m in messages):
        texts = ["\n\n".join(filter(None, (m["content"], m.get("context")))) for m in messages]
        messages = [{**m, "content": text, "context": ""} for m, text in zip(messages, texts, strict=True)]
    write = tokenizer.apply_chat_template
    write = partial(chat_turns.write_chat, write) if chat_turns else write
    try:
        return write(messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (jinja2.TemplateError, TypeError, ValueError) as error:  # what a template can raise
        raise RowError(f"the template says: {error}") from None


# Private-use characters; one stands for what a turn says while the template's own text around it is found out.
MARKS = [chr(code) for code in range(0xF0000, 0xF0100)]

# The text of a chat and where its answers are in it; borders: places up to where the text must keep its tokens.
Chat = namedtuple("Chat", "messages text answers borders unsupervised")
Answer = namedtuple("Answer", "turn start end closed")  # closed: a stop token ends it


def lay_out(messages: list[dict], tokenizer, tools: list | None = None) -> Chat:
    """
    A chat as the template writes it, and the answers in it, each from where a generation would start.

    From the end of the conversation before it, with the generation prompt, an answer is supervised through all closing
    tokens (EOS, if there are none). Where the text does not begin so, it is not, and at the last one RowError raised.
    """
    write, stops = partial(render, tokenizer=tokenizer, tools=tools), find_stop_tokens(tokenizer)
    text, answers, final = write(messages).rstrip(), [], messages[-1]
    if chat_turns:
        text = chat_turns.add_empty_thought(text, messages, write, split_at_turn, stops)
    if chat_turns and chat_turns.find_hidden({"tools": tools}, text):
        raise RowError("the template leaves out the tools (--drop_keys tools goes without)")
    for turn, message in enumerate(messages):
        trained = message["role"] == "assistant" and message.get("weight", 1)
        start = find_start(messages, turn, text, write) if trained else None
        end = len(text) if start is None or message is final else find_end(messages, turn, text, write, stops)
        check_shown(messages, turn, text[start:end], write)
        if start is not None:
            answers.append(Answer(turn, start, end, text[:end].endswith(stops)))
    # The stop token at the end may also be what the answer says.
    open_end = text.endswith(final["content"]) and not split_at_turn(messages, len(messages) - 1, write)[1]
    if open_end or not answers[-1].closed:
        text += tokenizer.eos_token
        answers[-1] = answers[-1]._replace(end=len(text), closed=True)
    # Stop tokens are cut out of a text before the rest is tokenised: they are safe borders.
    borders = [a.start for a in answers] + [a.end for a in answers if not a.closed]
    return Chat(messages, text, answers, borders, sum(m["role"] == "assistant" for m in messages) - len(answers))


def check_shown(messages: list[dict], turn: int, text: str, write) -> None:
    """Raise RowError where the text of an answer, or of the chat, lacks something that a turn says."""
    said = messages[turn]["content"]
    hidden = chat_turns.find_hidden(messages[turn], text) if chat_turns else None if said in text else "content"
    if hidden == "content":
        split_at_turn(messages, turn, write)  # says so if the turn is left out
        raise RowError("the template changes what the turns say")
    if hidden is not None:
        raise RowError(f"the template leaves out {hidden} (--drop_keys {hidden} goes without)")


def find_start(messages: list[dict], turn: int, text: str, write) -> int | None:
    """Where an answer begins for a generation, None if the template writes an earlier prompt otherwise in the text."""
    try:
        prompt = write(messages[:turn], add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        trained = split_at_turn(messages, turn, write)[0]
        same = len(os.path.commonprefix([prompt, trained]))
        found = f"{prompt[same:][-40:]!r} where the text before an answer has {trained[same:][-40:]!r}"
        raise RowError(f"the template's generation prompt has {found}")
    except RowError:
        if turn == len(messages) - 1:
            raise
        return None


def find_end(messages: list[dict], turn: int, text: str, write, stops: tuple) -> int:
    """Where an earlier answer with its closing tokens ends: where the conversation ends that ends with it."""
    alone = write(messages[: turn + 1]).rstrip()
    if text.startswith(alone):
        return len(alone)
    # Written otherwise there (with reasoning, another closing token): a plain turn in the answer's place shows what
    # follows it; what closes the last one closes it, or else the next stop token.
    after = split_at_turn(messages, turn, write)[1]
    if not text.endswith(after):
        raise RowError("the template changes what earlier turns say")
    closing = split_at_turn(messages[: turn + 1], turn, write)[1]
    if not closing or not after.startswith(closing):
        found = re.match(rf"\s*(?:{'|'.join(map(re.escape, stops))})", after)
        closing = found.group() if found else ""
    return len(text) - len(after) + len(closing)


def split_at_turn(messages: list[dict], turn: int, write) -> tuple[str, str]:
    """What the template writes before and after a plain turn in a turn's place; RowError where it leaves it out."""
    mark = next(mark for mark in MARKS if mark not in str(messages))
    plain = {"role": messages[turn]["role"], "content": mark}
    before, found, after = write([*messages[:turn], plain, *messages[turn + 1 :]]).rstrip().partition(mark)
    if not found:
        raise RowError(f"the template leaves out the {plain['role']} turn")
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


def drop_exchanges(chat: Chat, places: list, excess: int) -> list[dict] | None:
    """
    The messages without exchanges at the front that have so many tokens; None if there is only one.

    The system turn and the last exchange stay: no answer is trained on whose question is gone.
    """
    messages = chat.messages
    first = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    starts = [i for i in range(first + 1, len(messages)) if messages[i]["role"] == "user" != messages[i - 1]["role"]]
    if not starts:
        return None
    # At most so many tokens go with the turns before one (the system turn's stay).
    ends = [(answer.turn, end) for answer, (_, end) in zip(chat.answers, places, strict=True)]
    enough = (i for i in starts if max((end for turn, end in ends if turn < i), default=0) >= excess)
    return [*messages[:first], *messages[next(enough, starts[-1]) :]]


# A row, encoded: what is trained on (labels: -100 where nothing is), the last answer and its prompt, and what the
# audit counts; or its problem. `row`: its number in the file or data set, from 0.
ROW = {"row": 0, "input_ids": [], "labels": [], "source": "", "reference": "", "problem": ""}
ROW |= dict.fromkeys(("prompt_hash", "row_hash", "tokens", "supervised_tokens", "cut_exchanges", "answers"), 0)
ROW |= dict.fromkeys(("answers_with_stop", "answers_unsupervised", "special_tokens_in_text", "leading_bos"), 0)
TOO_LONG = "longer than --max_seq_length"


def to_columns(rows: list[dict]) -> dict[str, list]:
    return {name: [row.get(name, default) for row in rows] for name, default in ROW.items()}


def hash_text(text: str) -> int:
    """A stable 63-bit number of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


def encode_chats(rows, index, tokenizer, data_format, columns, limit, assistant_only_loss=True, drop_keys=()) -> dict:
    """A batch of rows, columns by name, as columns of ROW; what is too long goes round again, with fewer exchanges."""
    encoded, todo = [{"row": number} for number in index], []
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    for i, row in enumerate(encoded):
        cells = {name: rows[name][i] for name in (*columns, *CHAT_COLUMNS) if name in rows and name not in drop_keys}
        try:
            messages, tools = to_messages(cells, data_format, columns, drop_keys), cells.get("tools")
            tools = chat_turns.read_tools(tools) if chat_turns else tools or None
        except RowError as error:
            row["problem"] = str(error)
            continue
        turns = ["\0".join(filter(None, (m["content"], m.get("context")))) for m in messages]
        prompts = [turn for turn, message in zip(turns, messages, strict=True) if message["role"] == "user"]
        row |= {"prompt_hash": hash_text("\0".join(prompts)), "row_hash": hash_text(json.dumps([messages, tools]))}
        row["special_tokens_in_text"] = int(any(map(special.search, turns)))
        todo.append((row, messages, tools))
    while todo:
        todo = encode_round(todo, tokenizer, limit, assistant_only_loss)
    return to_columns([{"row": r["row"], "problem": r["problem"]} if r.get("problem") else r for r in encoded])


def encode_round(todo: list, tokenizer, limit: int, assistant_only_loss: bool) -> list:
    """Encode chats, given as (row, messages, tools); returns those that are too long, shortened, in the same way."""
    chats, too_long = [], []
    for row, messages, tools in todo:
        try:
            chats.append((row, lay_out(messages, tokenizer, tools), tools))
        except RowError as error:
            row["problem"] = str(error)
    encodings = iter(tokenize([c.text[:place] for _, c, _ in chats for place in (len(c.text), *c.borders)], tokenizer))
    for row, chat, tools in chats:
        whole, *heads = itertools.islice(encodings, 1 + len(chat.borders))
        ids, places = place_answers(chat, whole, heads, tokenizer)
        if len(ids) <= limit:
            row |= label_chat(chat, ids, places, tokenizer, assistant_only_loss)
        elif messages := drop_exchanges(chat, places, len(ids) - limit):
            row["cut_exchanges"] = 1
            too_long.append((row, messages, tools))
        else:
            row["problem"] = TOO_LONG
    return too_long


def label_chat(chat: Chat, ids: list[int], places: list, tokenizer, assistant_only_loss: bool) -> dict:
    """What ROW says of a chat whose answers are at these (first, end) of its token ids."""
    labels, last = [-100] * len(ids), chat.answers[-1]
    for first, end in places if assistant_only_loss else [(1, len(ids))]:
        labels[first:end] = ids[first:end]
    labels[0] = -100
    called = tokenizer.decode(ids[slice(*places[-1])], skip_special_tokens=True).strip()  # as an answer is decoded
    reference = chat.messages[last.turn]["content"] or called
    row = {"input_ids": ids, "labels": labels, "source": chat.text[: last.start], "reference": reference}
    row |= {"tokens": len(ids), "supervised_tokens": sum(label != -100 for label in labels), "answers": len(places)}
    row |= {"answers_with_stop": sum(a.closed for a in chat.answers), "answers_unsupervised": chat.unsupervised}
    return row | {"leading_bos": next((i for i, t in enumerate(ids) if t != tokenizer.bos_token_id), len(ids))}


def encode_texts(rows: dict, numbers, tokenizer, column: str, limit: int) -> dict:
    """Plain texts, each ended by EOS, one after the other and cut into rows of `limit` tokens; all are supervised."""
    texts = [text for text in rows[column] if text and text.strip()]
    eos, ids = tokenizer.eos_token_id, []
    for text in texts:
        tokens = tokenizer(text, verbose=False)["input_ids"]
        ids += tokens + [eos] * (tokens[-1:] != [eos])  # some tokenizers end texts themselves
    encoded = []
    for block in (ids[start : start + limit] for start in range(0, len(ids), limit)):
        if len(block) > 1:
            counts = {"tokens": len(block), "supervised_tokens": len(block) - 1, "row_hash": hash_text(str(block))}
            encoded.append({"row": numbers[0], "input_ids": block, "labels": [-100, *block[1:]], **counts})
    return to_columns(encoded + [{"problem": "empty text"}] * (len(rows[column]) - len(texts)))


def encode_splits(raw, data_format: str, columns: tuple, tokenizer, limit: int, data_args, training_args) -> dict:
    """The splits asked for, encoded; without validation data a share of the training prompts (of a text: its end)."""
    encode, settings = encode_texts, {"tokenizer": tokenizer, "column": columns[0], "limit": limit}
    if data_format != "text":
        settings = {"tokenizer": tokenizer, "data_format": data_format, "columns": columns, "limit": limit}
        settings |= {"assistant_only_loss": data_args.assistant_only_loss, "drop_keys": data_args.drop_keys or ()}
        encode = encode_chats
    how = {"with_indices": True, "batched": True, "fn_kwargs": settings}
    how |= {"num_proc": data_args.preprocessing_num_workers, "load_from_cache_file": not data_args.overwrite_cache}
    wanted = {
        "train": (training_args.do_train or data_args.audit_only, data_args.max_train_samples),
        "validation": (training_args.do_eval, data_args.max_eval_samples),
        "test": (training_args.do_predict, data_args.max_predict_samples),
    }
    carve, splits = training_args.do_eval and "validation" not in raw and wanted["train"][0], {}
    for split, (needed, most) in wanted.items():
        if not needed or (carve and split == "validation"):
            continue
        if tables:
            tables.check_split(raw, split, columns, data_args)
        rows, most = raw[split], None if carve and split == "train" else most
        rows = rows.select(range(min(most or len(rows), len(rows))))
        with training_args.main_process_first(desc=f"tokenising {split}"):
            splits[split] = rows.map(encode, remove_columns=rows.column_names, desc=f"Tokenising {split}", **how)
    if carve:
        encoded, share = splits["train"], data_args.validation_split_percentage / 100
        chosen = np.array(encoded["prompt_hash"][:], dtype=np.uint64) % 10_000 < share * 10_000
        chosen &= np.array(encoded["problem"][:]) == ""
        if data_format == "text":
            chosen = np.arange(len(encoded)) >= len(encoded) * (1 - share)
        for split, mask in (("train", ~chosen), ("validation", chosen)):
            splits[split] = encoded.select(np.flatnonzero(mask)[: wanted[split][1]])
    return splits


# ------------------------------------------------------------------------------------------------ model


def load_causal_model(config, tokenizer, model_args, training_args):
    """The model, with adapters if asked for, and with the template's stop tokens in its generation settings."""
    # fp32 here: transformers 5 would keep a bf16 file in bf16, where small updates are lost unless they are rounded
    # stochastically. Frozen weights under adapters are not updated and may stay in bf16.
    low = model_args.pure_bf16 or (model_args.lora_r and training_args.bf16)
    how = {"dtype": torch.bfloat16 if low else torch.float32, "attn_implementation": model_args.attn_implementation}
    model = fetch(transformers.AutoModelForCausalLM, model_args, config=config, **how)
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        print(f"the tokenizer has more tokens than the model: the embeddings grow to {len(tokenizer)}", flush=True)
        model.resize_token_embeddings(len(tokenizer))
    stops = find_stop_ids(tokenizer, model.generation_config)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return lora.add_adapters(model, known, model_args, training_args) if model_args.lora_r else model


def find_stop_ids(tokenizer, generation_config) -> list[int]:
    """Ids that end an answer: the last of the template's closing tokens, EOS, and what the model came with."""
    ids = [tokenizer.eos_token_id, *np.atleast_1d(generation_config.eos_token_id).tolist()]
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with suppress(RowError):  # no template, or one that wants more than a question and an answer
        ids = tokenize([lay_out(chat, tokenizer).text], tokenizer)[0].ids[-1:] + ids
    return [i for i in dict.fromkeys(ids) if i is not None]


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


def compute_next_token_loss(outputs, labels, num_items_in_batch=None, label_smoothing=0.0, router=0.0) -> torch.Tensor:
    """The training loss: cross-entropy of each next token, summed, over the tokens of the whole global batch."""
    labels = shift_labels(labels)
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    loss = token_loss_sum(outputs.logits, labels, label_smoothing)
    if getattr(outputs, "aux_loss", None) is not None:  # a mixture's router loss, by the share of tokens that are here
        loss = loss + router * outputs.aux_loss * labels.ne(-100).sum()
    return loss / items


def choose_rows(model, splits: dict, limit: int, collator, data_args, training_args) -> tuple:
    """(rows to train on, their collator, callbacks, compute_loss_func): packed if asked for, and without logits."""
    if not training_args.do_train:
        return None, collator, [], None
    router = getattr(model.config, "router_aux_loss_coef", 0.0)
    loss = partial(compute_next_token_loss, label_smoothing=training_args.label_smoothing_factor, router=router)
    if training_args.use_liger_kernel:  # it fuses the loss into the last matrix product, over num_items_in_batch too
        loss = None
    elif fast_batches:
        loss = fast_batches.fuse_loss(model, training_args.label_smoothing_factor, shift=True) or loss
    if not data_args.packing:
        return splits["train"], collator, [], loss
    rows, collator, check = fast_batches.pack_causal(model, splits["train"], limit, collator, training_args.use_cpu)
    return rows, collator, [check], loss


def add_filler(rows, token: int):
    """The rows, and after them a filler that asks for no token and so has no loss."""
    filler = {"input_ids": [token], "attention_mask": [1], "labels": [-100]}
    return torch.utils.data.ConcatDataset([rows, [filler]])


class FilledSampler(torch.utils.data.Sampler):
    """
    Rows in the order of --train_sampling_strategy, then the last one, a filler, until every rank's last batch is full.

    Left to itself accelerate fills it with rows from the front, which are trained on twice. One order on any ranks.
    """

    def __init__(self, rows, args):
        self.rows, self.args, self.count, self.epoch = rows, args, len(rows) - 1, 0
        self.fill = -self.count % (args.per_device_train_batch_size * args.world_size) if args.world_size > 1 else 0

    def __len__(self) -> int:
        return self.count + self.fill

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        order, generator = range(self.count), torch.Generator().manual_seed(seed * 1_000_003 + self.epoch)
        if self.args.train_sampling_strategy == "random":
            order = torch.randperm(self.count, generator=generator).tolist()
        elif self.args.train_sampling_strategy == "group_by_length":
            lengths = [len(self.rows[i]["input_ids"]) for i in order]
            whole = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
            order = get_length_grouped_indices(lengths, whole, generator=generator)
        return itertools.chain(order, [self.count] * self.fill)


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
        loader = super().get_train_dataloader()
        self.data_collator = plain
        return loader

    def compute_loss(self, model, inputs, *args, **kwargs):
        """The stock one; a loss that is made inside the output layer is given the labels there."""
        labelled = getattr(self.compute_loss_func, "labelled", nullcontext)
        with labelled(inputs["labels"]):
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        """FilledSampler's order; --dataloader_drop_last as in the library."""
        filled = FilledSampler(self.train_dataset, self.args)
        return super()._get_train_sampler() if self.args.dataloader_drop_last else filled

    def _run_epoch(self, *args, **kwargs):
        """The stock one, if a step is left: a run killed after its last one would train another (5.23)."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

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

    def __init__(self, *args, generate=None, rouge_language: str = "en", **kwargs):
        super().__init__(*args, **kwargs)
        self.generate, self.rouge_language = generate, rouge_language  # the former from reports.choose_generation

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
        scores = {"perplexity": float(np.exp(min(loss / tokens, 700))), "token_accuracy": right / tokens}
        if self.args.predict_with_generate:
            self.answers = self.generate(self.model, self.args, dataloader.dataset)
            scores |= reports.score_answers(self.answers, dataloader.dataset["reference"][:], self.rouge_language)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in scores.items()})
        return output


def evaluate_split(trainer, rows, prefix: str) -> None:
    """Evaluate on one split, log and save the metrics under `prefix`, and write the answers, if any."""
    metrics = trainer.predict(rows, metric_key_prefix=prefix).metrics | {f"{prefix}_samples": len(rows)}
    trainer.log({k: v for k, v in metrics.items() if k.startswith(prefix)})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if trainer.args.predict_with_generate and trainer.is_world_process_zero():
        reports.write_answers(trainer.args.output_dir, rows, trainer.answers)


def print_absent(training_args) -> None:
    """Say what each absent companion costs."""
    for name, cost in ABSENT.items():
        if globals()[name.removesuffix(".py")] is None and training_args.process_index == 0:
            print(f"{name} is not beside this script: {cost}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune, evaluate and predict as the arguments say; returns the metrics of all_results.json."""
    # Arguments first: ZeRO-3 partitions the model while it is loaded, and knows that from training_args being alive.
    argv, wanted = sys.argv[1:] if argv is None else argv, (INSTRUCT_ARGUMENTS, find_format, find_instruct_problems)
    model_args, data_args, training_args = parse_arguments(argv, *wanted, remove_unused_columns=False)  # for answers
    last_checkpoint = training_args.resume_from_checkpoint
    if guards:
        last_checkpoint, results = guards.start_run(model_args, data_args, training_args)
        if results is not None:
            return results
    if training_args.n_gpu > 1:  # DataParallel would scatter the rows but not the token count
        training_args._n_gpu = 1
    print_absent(training_args)
    set_seed(training_args.seed)

    # Data, tokenizer, prompts and labels; the audit before the model is loaded
    raw = load_raw_datasets(data_args, model_args)
    data_format, columns = find_format(next(iter(raw.values())).column_names, data_args)
    config, tokenizer, limit = load_tokenizer(model_args, data_args)
    template = set_prompt_template(tokenizer, data_args, data_format) if data_format != "text" else "none"
    splits = encode_splits(raw, data_format, columns, tokenizer, limit, data_args, training_args)
    if training_args.process_index == 0:
        print(f"data format: {data_format} ({', '.join(columns)}); prompt template: {template}", flush=True)
    if reports:
        judge = {"skip": data_args.skip_audit, "only": data_args.audit_only, "rank": training_args.process_index}
        counts = reports.audit(splits, tokenizer, starts_with_bos(tokenizer), **judge)
    if data_args.audit_only:
        return counts
    splits = {split: rows.select(np.flatnonzero(np.array(rows["problem"][:]) == "")) for split, rows in splits.items()}

    # Model, batches, loss, trainer
    model = load_causal_model(config, tokenizer, model_args, training_args)
    if model_checks:
        model_checks.check_model(model, tokenizer, [*splits.values()][0][:200]["input_ids"], model_args)
    multiple = 8 if training_args.bf16 or training_args.fp16 or model.dtype == torch.bfloat16 else 1
    collator = InstructCollator(tokenizer.pad_token_id, multiple)
    train_rows, train_collator, callbacks, loss = choose_rows(model, splits, limit, collator, data_args, training_args)
    generate = reports.choose_generation(model, tokenizer, data_args, training_args) if reports else None
    if training_args.do_train and training_args.predict_with_generate and "validation" in splits:
        callbacks.append(reports.show_answers(generate, splits["validation"]))
    trainer = InstructTrainer(
        model=model,
        args=training_args,
        train_dataset=add_filler(train_rows, tokenizer.eos_token_id) if training_args.do_train else None,
        eval_dataset=splits.get("validation"),
        processing_class=tokenizer,
        data_collator=collator,
        train_collator=train_collator,
        compute_loss_func=loss,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=zero_adafactor.choose(training_args) if zero_adafactor else None,
        generate=generate,
        rouge_language=data_args.rouge_language,
    )
    if guards:
        guards.start_tracking(trainer, model_args, data_args)
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
    if model_args.merge_lora and training_args.do_train and trainer.is_world_process_zero():
        lora.merge(model_args, training_args.output_dir)
    if guards:
        guards.write_reports(trainer, "text-generation", model_args, data_args, columns)
    results = Path(training_args.output_dir, "all_results.json")
    return json.loads(results.read_text()) if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    guards.run_and_exit(main) if guards else main()
