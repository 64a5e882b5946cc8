#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "sentencepiece", "jinja2"]
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
import copy
import datetime
import json
import os
import re
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

with suppress(ModuleNotFoundError):  # before the libraries are loaded: a misspelt flag is answered at once
    import flag_checks

    flag_checks.answer_unknown_flags(__name__, __file__, sys.argv[1:])

import datasets
import jinja2
import numpy as np
import torch
import transformers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig
from transformers.generation import GenerationMode, LogitsProcessor
from transformers.hf_argparser import HfArg, HfArgumentParser
from transformers.integrations import HfDeepSpeedConfig

# The companions beside this script. Without them the texts are the same; WITHOUT says what is lost.
guards = tables = model_checks = chat_turns = lora = generation_store = None
with suppress(ModuleNotFoundError):
    import guards
with suppress(ModuleNotFoundError):
    import tables
with suppress(ModuleNotFoundError):
    import model_checks
with suppress(ModuleNotFoundError):
    import chat_turns
with suppress(ModuleNotFoundError):
    import lora
with suppress(ModuleNotFoundError):
    import generation_store
UsageError = guards.UsageError if guards else ValueError
RowError = chat_turns.RowError if chat_turns else ValueError  # why there is no prompt of a row

WITHOUT = {
    "guards.py": "bad input ends late, in a traceback; an --output_file that is there is overwritten",
    "generation_store.py": "a run that is killed begins again",
    "chat_turns.py": "chats with tools, tool calls or reasoning are refused",
    "model_checks.py": "a model that lacks weights, or has another's tokenizer, generates all the same",
    "lora.py": "folders of adapters are refused",
    "tables.py": "a table is .csv, .json, .jsonl or .parquet, and its columns are not checked to be text",
}

FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# Text columns of well-known data sets, tried in this order; `messages` and `instruction` make chat prompts, and of
# `instruction` a column `context` or `input` is part.
TEXT_COLUMNS = ("messages", "instruction", "prompt", "question", "review_body", "article", "document", "dialogue")
TEXT_COLUMNS += ("text",)
CHAT_COLUMNS = ("tools", "system", "system_prompt")  # which belong to a row's chat, whatever its format

# Fields of GenerationConfig that change what generate() returns, or that this script sets itself.
NOT_FLAGS = {"output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"}
NOT_FLAGS |= {"num_return_sequences", "max_length", "min_length"}
NOT_FLAGS |= {"transformers_version", "_from_model_config", "is_assistant"}

# These read the prompt, and padding on the left would be part of it.
READS_PROMPT = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "sequence_bias": None}

# What generate() does to the scores before it samples (5.23), in its order, and the value that changes nothing.
WARPERS = {
    "temperature": (transformers.TemperatureLogitsWarper, 1.0),
    "top_h": (transformers.TopHLogitsWarper, None),
    "top_k": (transformers.TopKLogitsWarper, 0),
    "top_p": (transformers.TopPLogitsWarper, 1.0),
    "min_p": (transformers.MinPLogitsWarper, None),
    "typical_p": (transformers.TypicalLogitsWarper, 1.0),
    "epsilon_cutoff": (transformers.EpsilonLogitsWarper, 0.0),
    "eta_cutoff": (transformers.EtaLogitsWarper, 0.0),
}

DEFAULT_MAX_SOURCE_LENGTH, DEFAULT_MAX_NEW_TOKENS = 1024, 128

# Rows that are tokenised and sorted by length together.
WINDOW = 16_384
ENDED, CUT_OFF = "ended by themselves", "at --max_new_tokens"  # as the texts are counted

# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class GenerationModelArguments:
    """Which model generates, and where."""

    model_name_or_path: str = HfArg(help="A folder with a model, or a model's name on the hub.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, if not the model's own.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the hub.")
    token: str | None = HfArg(default=None, help="Hub token for private and gated models; never logged.")
    trust_remote_code: bool = HfArg(default=False, help="Run a hub model's own code. Only for code you have read.")
    dtype: str = HfArg(default="auto", help="float32, bfloat16 or float16; auto: bfloat16 where that is fast.")
    attn_implementation: str | None = HfArg(default=None, help="sdpa, eager, flash_attention_2; else the library's.")
    assistant_model_name_or_path: str | None = HfArg(default=None, help="A small model that drafts, row by row.")
    use_cpu: bool = HfArg(default=False, help="Use the CPU although there is an accelerator.")
    deepspeed: str | None = HfArg(default=None, help="ZeRO-3 file, for a model larger than a card, under `deepspeed`.")
    local_rank: int = HfArg(default=-1, help="Set by the launcher.")


@dataclass
class GenerationDataArguments:
    """Which table to read and write, and how it is cut into batches."""

    output_file: str | None = HfArg(default=None, help="The table to write: .csv, .jsonl or .parquet.")
    input_file: str | None = HfArg(default=None, help="The table: .csv, .tsv, .json, .jsonl or .parquet.")
    delimiter: str | None = HfArg(default=None, help="What separates a .csv's fields, if not a comma.")
    file_encoding: str | None = HfArg(default=None, help="Encoding of text files, if not UTF-8, e.g. cp1252.")
    dataset_name: str | None = HfArg(default=None, help="A dataset's name on the hub, or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that dataset.")
    dataset_split: str = HfArg(default="test", help="Split of that dataset.")
    text_column: str | None = HfArg(default=None, help="Texts or chat messages. Default: a name of TEXT_COLUMNS.")
    drop_keys: list[str] | None = HfArg(default=None, help="Columns, or keys of turns, to do without if refused.")
    output_column: str = HfArg(default="prediction", help="Name of the new column.")
    source_prefix: str | None = HfArg(default=None, help="Text put before every text. Default: as in training.")
    max_source_length: int | None = HfArg(default=None, help="Longest prompt in tokens. Default: 1024 or the model's.")
    group_by: str | None = HfArg(default=None, help="Column; texts with the same value are summarised into one.")
    min_group_size: int = HfArg(default=1, help="Leave groups of fewer texts out.")
    max_samples: int | None = HfArg(default=None, help="Use only the first rows, this many.")
    max_tokens_per_batch: int | None = HfArg(
        default=None, help="Most rows x longest prompt x beams in a batch. Default: 16384 on a GPU, 8192 on a CPU."
    )
    seed: int = HfArg(default=42, help="Seed of sampling.")


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


def split_flags(args: argparse.Namespace) -> tuple[dict, dict]:
    """The parsed flags in two: the fields of the two dataclasses, and those of GenerationConfig that were given."""
    names = {name for cls in GENERATION_ARGUMENTS for name in cls.__dataclass_fields__}
    values = {name: value for name, value in vars(args).items() if name in names}
    return values, {name: value for name, value in vars(args).items() if name not in names}


def parse_generation_arguments(argv: list[str]):
    """The two dataclasses and a dict of the decoding flags given; raises UsageError with everything that is wrong."""
    parser = make_parser()
    args = parser.parse_args(guards.read_arguments(parser, argv) if guards else argv)
    args.use_cpu = args.use_cpu or not torch.accelerator.is_available()
    args.local_rank = int(os.environ.get("LOCAL_RANK", args.local_rank))
    args.max_tokens_per_batch = args.max_tokens_per_batch or (8192 if args.use_cpu else 16384)
    values, decoding = split_flags(args)
    problems = tables.find_problems(args, ["input_file"], find_text_column) if tables else []
    if guards:
        guards.check_generation(args, decoding, problems, generation_store is not None)
        guards.start_ranks(args)
    return *parser.parse_dict(values), decoding


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether the device has instructions for bf16 matrices; elsewhere they take twice as long as fp32."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def join_ranks(model_args) -> None:
    """Join the other processes and take this one's GPU; ZeRO-3 partitions the model while it is loaded."""
    patience = datetime.timedelta(days=7)  # a rank may wait long for the last batch of another
    if not model_args.use_cpu and torch.cuda.is_available():
        torch.cuda.set_device(max(model_args.local_rank, 0))
    if model_args.deepspeed is not None:
        os.environ |= {"DS_ACCELERATOR": "cpu"} if model_args.use_cpu else {}
        import deepspeed

        if model_args.use_cpu:  # gloo's collectives: DeepSpeed's own would be compiled first (50 s, a lock if killed)
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo" if model_args.use_cpu else None, timeout=patience)
    elif int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=patience)


# ------------------------------------------------------------------------------------------------ table


def load_table(data_args, model_args):
    """The input as a datasets.Dataset; of a CSV every column as text, so that it comes out as it went in."""
    hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
    if data_args.dataset_name is not None:
        name, config, split = data_args.dataset_name, data_args.dataset_config_name, data_args.dataset_split
        table = datasets.load_dataset(name, config, split=split, **hub)
    else:
        args = argparse.Namespace(**vars(data_args), **vars(model_args))
        read = partial(tables.read_table, args=args, typed=True) if tables else load_file
        table = read(data_args.input_file)
    return table.select(range(min(data_args.max_samples or len(table), len(table))))


def load_file(path: str):
    """A file by the datasets library; a .txt is one text."""
    options = {".txt": {"sample_by": "document"}, ".csv": {"keep_default_na": False}}.get(Path(path).suffix, {})
    return datasets.load_dataset(FILE_TYPES.get(Path(path).suffix, "text"), data_files=path, split="train", **options)


def find_text_column(columns: list[str], args) -> str:
    """The column of the texts: as named, else a known name. Raises UsageError where a column is missing or taken."""
    for flag in ("text_column", "group_by"):
        name = getattr(args, flag)
        if name is not None and name not in columns:
            raise UsageError(f"has no column {name!r} (--{flag}); it has {', '.join(columns)}")
    if args.output_column in columns:
        raise UsageError(f"already has a column {args.output_column!r}; name another by --output_column")
    known = args.text_column or next((name for name in TEXT_COLUMNS if name in columns), None)
    if known is None:
        raise UsageError(f"which column holds the texts? Name it by --text_column: {', '.join(columns)}")
    return known


def list_columns(columns: list[str], text_column: str) -> list[str]:
    """The text column and those of its prompt: the context of an instruction, a chat's tools and system text."""
    more = (*(("context", "input") if text_column == "instruction" else ()), *CHAT_COLUMNS)
    return [name for name in (text_column, *more) if name in columns]


def read_texts(table, text_column: str, is_chat: bool, drop_keys=()) -> list:
    """read_prompt() of every row; raises UsageError with the number of a row, from 0, that cannot be one."""
    names, texts = [n for n in list_columns(table.column_names, text_column) if n not in drop_keys], []
    for row, cells in enumerate(zip(*(table[name] for name in names), strict=True)):
        try:
            texts.append(read_prompt(dict(zip(names, cells, strict=True)), text_column, is_chat, drop_keys))
        except RowError as error:
            raise UsageError(f"--text_column {text_column}: row {row}: {error}") from None
    return texts


def read_prompt(cells: dict, text_column: str, is_chat: bool, drop_keys=()):
    """A row's text, its chat messages, or with tools {"messages", "tools"}; None where there is none."""
    text = parse_turns(cells[text_column])
    context = next((cells[n] for n in ("context", "input") if str(cells.get(n) or "").strip()), None)
    if not str(text if text or text == 0 else "").strip():
        return None
    if not isinstance(text, list) and not is_chat:
        return "\n\n".join(str(part) for part in (text, context) if part is not None)
    turns = [{"role": "system", "content": cells[name]} for name in CHAT_COLUMNS[1:] if cells.get(name)]
    tools = chat_turns.read_tools(cells.get("tools")) if chat_turns else cells.get("tools")
    if not isinstance(text, list) and not (turns or tools or context):
        return str(text)
    turns += text if isinstance(text, list) else [{"role": "user", "content": str(text), "context": context}]
    messages = [to_message(turn, drop_keys) for turn in turns]
    while len(messages) > 1 and messages[-1]["role"] == "assistant":
        messages.pop()  # the answer that is to be generated
    return {"messages": messages, "tools": tools} if tools else messages


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


def write_table(table, path: Path, vouch=lambda file: None) -> None:
    """Write CSV, JSONL or Parquet by the ending, under another name first; vouch(file): called when it is whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    if path.suffix.lower() == ".csv":
        table.to_csv(unfinished, index=False)
    elif path.suffix.lower() == ".jsonl":
        with open(unfinished, "w", encoding="utf-8") as stream:  # to_json rounds numbers to ten digits
            stream.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in table)
    else:
        table.to_parquet(unfinished)
    vouch(unfinished)
    os.replace(unfinished, path)


# ------------------------------------------------------------------------------------------------ prompts


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


@dataclass
class Prompts:
    """Turns a row's text into a prompt's token ids: prefix or chat template, cut to the limit."""

    tokenizer: object
    is_chat: bool
    prefix: str
    limit: int

    def render(self, text) -> str:
        """The prompt of what read_prompt() returns, as text."""
        chat = text if isinstance(text, dict) else {"messages": text, "tools": None}
        if not self.is_chat:
            return self.prefix + (text if isinstance(text, str) else "\n".join(m["content"] for m in chat["messages"]))
        if isinstance(text, str):
            chat = {"messages": [{"role": "user", "content": f"{self.prefix}{text}".strip()}], "tools": None}
        try:
            return render(chat["messages"], self.tokenizer, chat["tools"], add_generation_prompt=True)
        except RowError as error:
            raise UsageError(f"a chat that begins {str(chat['messages'][0])[:80]!r}: {error}") from None

    def encode(self, texts: list) -> tuple[list[list[int]], list[bool]]:
        """Token ids of each prompt, at most `limit`, and whether it was cut."""
        ids = self.tokenize([self.render(text) for text in texts])
        cut = [len(row) > self.limit for row in ids]
        for i in np.flatnonzero(cut):
            ids[i] = self.cut(texts[i], ids[i])
        return ids, cut

    def tokenize(self, prompts: list[str]) -> list[list[int]]:
        special = not self.is_chat  # a chat template writes them itself
        return self.tokenizer(prompts, add_special_tokens=special, verbose=False)["input_ids"] if prompts else []

    def cut(self, text, ids: list[int]) -> list[int]:
        """The prompt with as much taken from its text's end as fits; what the template adds stays."""
        if not self.is_chat:
            ending = self.tokenizer("", add_special_tokens=True)["input_ids"]
            keep = ending[-1:] if ending[-1:] == [self.tokenizer.eos_token_id] and ids[-1:] == ending[-1:] else []
            return ids[: self.limit - len(keep)] + keep
        chat = copy.deepcopy(text if isinstance(text, dict) else {"messages": text, "tools": None})
        if isinstance(text, str):
            chat["messages"] = [{"role": "user", "content": text}]
        longest, excess = max(chat["messages"], key=lambda m: len(m["content"])), len(ids) - self.limit
        while excess > 0 and longest["content"]:
            words = self.tokenizer(longest["content"], add_special_tokens=False, verbose=False)["input_ids"]
            longest["content"] = self.tokenizer.decode(words[: max(len(words) - excess, 0)], skip_special_tokens=True)
            ids = self.tokenize([self.render(chat)])[0]
            excess = max(len(ids) - self.limit, 0)
        return ids[-self.limit :]


# ------------------------------------------------------------------------------------------------ model


@dataclass
class Generator:
    """Everything that turns prompts into texts."""

    model: torch.nn.Module
    target_tokenizer: object  # of the outputs
    prompts: Prompts
    config: GenerationConfig
    max_tokens_per_batch: int
    seed: int
    assistant: torch.nn.Module | None = None
    synced: bool = False  # under ZeRO-3: all ranks generate together

    def decode(self, tokens: list[int]) -> str:
        return self.target_tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def is_cut_off(self, tokens: list[int]) -> bool:
        """Whether --max_new_tokens ended a text; an end token that the settings force there (BART) is not its own."""
        ends = [] if self.config.forced_eos_token_id else np.atleast_1d(self.config.eos_token_id)
        return len(tokens) >= self.config.max_new_tokens and tokens[-1] not in (*ends, self.config.pad_token_id)


def load_generator(model_args, data_args, decoding: dict) -> Generator:
    """The model on this rank's device; its own generation settings count where no flag says otherwise."""
    tokenizer, target_tokenizer, model = load_generating_model(model_args)
    config = make_generation_config(model, tokenizer, decoding)
    prefix = data_args.source_prefix
    if prefix is None:
        task = (getattr(model.config, "task_specific_params", None) or {}).get("summarization") or {}
        prefix = task.get("prefix", "")
    is_chat = not model.config.is_encoder_decoder and tokenizer.chat_template is not None
    prompts = Prompts(tokenizer, is_chat, prefix, find_source_limit(model, tokenizer, data_args, config))
    if data_args.group_by is not None and 2 * config.max_new_tokens > prompts.limit // 2:
        raise UsageError(
            f"--max_new_tokens {config.max_new_tokens} with --group_by: summaries are summarised again, so at least "
            f"four must fit into --max_source_length {prompts.limit}; make the one smaller or the other larger"
        )
    assistant = model_args.assistant_model_name_or_path
    if assistant is not None:
        auto = AutoModelForSeq2SeqLM if model.config.is_encoder_decoder else AutoModelForCausalLM
        assistant = fetch(auto, model_args, "assistant_model_name_or_path", dtype=model.dtype, revision="main")
        assistant = assistant.eval().to(model.device)
    limits = {"max_tokens_per_batch": data_args.max_tokens_per_batch, "seed": data_args.seed}
    synced = model_args.deepspeed is not None
    return Generator(model, target_tokenizer, prompts, config, **limits, assistant=assistant, synced=synced)


def load_generating_model(model_args):
    """(tokenizer of the prompts, tokenizer of the outputs, model on its device or, under --deepspeed, in parts)."""
    name = model_args.model_name_or_path
    # Under ZeRO-3 from_pretrained partitions the model while it loads it, as long as this object lives.
    zero3 = HfDeepSpeedConfig(read_zero3_config(model_args)) if model_args.deepspeed else None
    tokenizer = target_tokenizer = fetch(AutoTokenizer, model_args, "tokenizer_name")
    how = {"dtype": choose_dtype(model_args), "attn_implementation": model_args.attn_implementation}
    if (Path(name) / "adapter_config.json").is_file():
        if lora is None:
            raise UsageError(f"--model_name_or_path {name}: adapters need lora.py; copy it beside this script")
        hub = {"cache_dir": model_args.cache_dir, "token": model_args.token}
        model = lora.load_adapted(name, tokenizer, **hub, **how).eval()
    else:
        is_causal = not fetch(AutoConfig, model_args).is_encoder_decoder
        model = fetch(AutoModelForCausalLM if is_causal else AutoModelForSeq2SeqLM, model_args, **how).eval()
    if zero3 is None:
        model = model.to("cpu" if model_args.use_cpu else f"cuda:{max(model_args.local_rank, 0)}")
    else:
        import deepspeed

        model = deepspeed.initialize(model=model, config_params=read_zero3_config(model_args))[0].module.eval()
    if (Path(name) / "decoder_tokenizer").is_dir():  # an encoder-decoder joined of two families
        target_tokenizer = AutoTokenizer.from_pretrained(Path(name) / "decoder_tokenizer")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, target_tokenizer, model


def fetch(auto, model_args, flag: str = "model_name_or_path", **settings):
    """auto.from_pretrained() of what a flag names, else the model; by model_checks.py all weights are its file's."""
    flag = flag if getattr(model_args, flag) else "model_name_or_path"
    hub = {name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    name, settings = getattr(model_args, flag), {"revision": model_args.model_revision, **hub, **settings}
    return model_checks.load(auto, name, flag, **settings) if model_checks else auto.from_pretrained(name, **settings)


def choose_dtype(model_args) -> torch.dtype:
    """The --dtype; `auto` is bf16 on GPUs and CPUs that have instructions for it."""
    fast = "bfloat16" if has_fast_bf16(model_args.use_cpu) else "float32"
    return getattr(torch, fast if model_args.dtype == "auto" else model_args.dtype)


def make_generation_config(model, tokenizer, decoding: dict) -> GenerationConfig:
    """The model's own settings with the flags over them; settings of another decoding method are left out."""
    own = {k: v for k, v in model.generation_config.to_diff_dict().items() if k not in NOT_FLAGS}
    if "num_beams" in decoding or "do_sample" in decoding:
        # e.g. length_penalty of a model saved with beams, or temperature of one saved with sampling
        kept = {"max_new_tokens", *(WARPERS if decoding.get("do_sample") else ())}
        own = {k: v for k, v in own.items() if k.endswith("_token_id") or k in kept}
    longest = model.generation_config.max_length if model.config.is_encoder_decoder else None
    values = {"max_new_tokens": (longest or DEFAULT_MAX_NEW_TOKENS + 1) - 1, "num_beams": 1, "do_sample": False}
    values |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id} | own | decoding
    if values["do_sample"]:
        values.setdefault("top_k", 50)  # generate()'s
    config = GenerationConfig(**values)
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UsageError(f"decoding flags with the model's own settings: {error}") from None
    return config


def find_source_limit(model, tokenizer, data_args, config) -> int:
    """Longest prompt in tokens: as asked for and as the model's positions allow, an answer's room left free."""
    positions, answer = getattr(model.config, "max_position_embeddings", None), config.max_new_tokens
    if model.config.is_encoder_decoder:
        positions, answer = getattr(getattr(model.config, "encoder", None), "max_position_embeddings", positions), 0
        if hasattr(model.config, "encoder") and positions is not None:
            positions = min(positions, tokenizer.model_max_length)  # RoBERTa never uses its first two
    room = sys.maxsize if positions is None else positions - answer
    limit = data_args.max_source_length or min(DEFAULT_MAX_SOURCE_LENGTH, max(room, 1))
    if limit > room:
        flags = f"--max_source_length {limit}" + (f" and --max_new_tokens {answer}" if answer else "")
        raise UsageError(f"{flags}: the model has {positions} positions in all; ask for less")
    return limit


def read_zero3_config(model_args) -> dict:
    """The DeepSpeed file with the precision of --dtype in the place of "auto"."""
    config = json.loads(Path(model_args.deepspeed).read_text(encoding="utf-8"))
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return config | {name: {"enabled": choose_dtype(model_args) == dtype} for name, dtype in dtypes.items()}


# ------------------------------------------------------------------------------------------------ results


class MemoryStore:
    """Finished rows in memory; generation_store.py's has them on disk too, and the result of a run that has ended."""

    open = vouch = remove = lambda self, *arguments: None

    def __init__(self):
        self.found, self.cut_off, self.result = {}, set(), None  # (round, row) -> text; those cut by --max_new_tokens

    def add(self, round_number: int, rows: list[tuple[int, str]], cut_off: list[int] = ()) -> None:
        self.found.update({(round_number, row): text for row, text in rows})
        self.cut_off.update((round_number, row) for row in cut_off)


def make_store(table, model_args, data_args, decoding: dict):
    """generation_store.py's store of the output file, else one in memory; all ranks must call it."""
    if generation_store is None:
        return MemoryStore()
    settings = generation_store.describe_request(table, model_args, data_args, decoding)
    return generation_store.Store(MemoryStore(), data_args.output_file, settings)


def share(store) -> None:
    """Give every rank what the others finished; all ranks must call it."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, (store.found, store.cut_off))
        for found, cut_off in parts:
            store.found.update(found)
            store.cut_off.update(cut_off)


# ------------------------------------------------------------------------------------------------ batches


class RowSampling(LogitsProcessor):
    """Sampling with a random generator a row (Gumbel noise on the scores), the same in any batch and on any rank."""

    def __init__(self, config: GenerationConfig, rows: list[int], seed: int, device):
        values = {name: getattr(config, name) for name in WARPERS}
        self.warpers = [make(values[n]) for n, (make, neutral) in WARPERS.items() if values[n] not in (None, neutral)]
        # torch's CPU generator uses 32 bits of its seed: one to one in the row for a given seed.
        self.generators = [torch.Generator(device).manual_seed((seed * 0x9E3779B1 + row) % 2**32) for row in rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for warp in self.warpers:
            scores = warp(input_ids, scores)
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.uniform_(generator=generator)
        return scores - noise.log_().neg_().log_()


def samples_by_row(generator: Generator) -> bool:
    """Whether the settings ask for plain sampling; a watermark, which generate() lays on last, would see one draw."""
    config = generator.config
    return config.get_generation_mode(generator.assistant) == GenerationMode.SAMPLE and not config.watermarking_config


def plan_rows(generator: Generator, ids: list[list[int]]) -> list[list[int]]:
    """
    Indices of prompts in batches of like length, longest first: rows x beams x longest stays below the budget.

    With left padding the room for the answer counts too; settings that look at the prompt's own tokens get batches of
    one length. Assisted decoding and beams that sample go row by row.
    """
    config, is_seq2seq = generator.config, generator.model.config.is_encoder_decoder
    mode = config.get_generation_mode(generator.assistant)
    together = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH) or samples_by_row(generator)
    budget = generator.max_tokens_per_batch if together else 1
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


@torch.no_grad()
def generate_batch(generator: Generator, prompts: list[list[int]], rows: list[int]) -> list[list[int]]:
    """New token ids for each prompt, ended by the stop token where there was one. rows: numbers that seed sampling."""
    model, config, is_seq2seq = generator.model, generator.config, generator.model.config.is_encoder_decoder
    side = {"padding_side": "right" if is_seq2seq else "left", "return_attention_mask": True}
    inputs = generator.prompts.tokenizer.pad({"input_ids": prompts}, return_tensors="pt", **side).to(model.device)
    if samples_by_row(generator):
        config = copy.deepcopy(config)
        config.do_sample = False
        inputs["logits_processor"] = [RowSampling(config, rows, generator.seed, model.device)]
    torch.manual_seed((generator.seed * 0x9E3779B1 + rows[0]) % 2**32)  # of what goes row by row
    inputs |= {"tokenizer": generator.target_tokenizer} if config.stop_strings else {}
    inputs |= {"assistant_model": generator.assistant} if generator.assistant is not None else {}
    try:
        outputs = model.generate(**inputs, generation_config=config, synced_gpus=generator.synced)
    except (ValueError, TypeError) as error:
        raise UsageError(f"decoding flags that do not go together, or with this model: {error}") from error
    ends = torch.tensor(config.eos_token_id).flatten().tolist()
    new = outputs[:, 1 if is_seq2seq else inputs["input_ids"].shape[1] :].tolist()
    return [next((row[: n + 1] for n, token in enumerate(row) if token in ends), row) for row in new]


# ------------------------------------------------------------------------------------------------ rounds


def generate_round(generator: Generator, store, texts: list, number: int, title: str) -> tuple[list[str], int]:
    """
    Generate for texts (None gives ""), each rank its share; all outputs in order, and how many prompts were cut.

    Each batch is stored as it is finished. Under ZeRO-3 ranks without one repeat another's.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    wanted, num_cut = [i for i, text in enumerate(texts) if text is not None], 0
    finished = sum((number, i) in store.found for i in wanted)
    bar = tqdm(total=len(wanted), initial=finished, desc=title, unit="row", disable=rank > 0)
    for start in range(0, len(wanted), WINDOW):
        rows = wanted[start : start + WINDOW]
        ids, cut = generator.prompts.encode([texts[i] for i in rows])
        num_cut += sum(cut)
        plan = plan_rows(generator, ids)
        left = [batch for batch in plan if any((number, rows[i]) not in store.found for i in batch)]
        mine = left[rank::world]
        if generator.synced and left:
            mine += left[:1] * (-(-len(left) // world) - len(mine))
        for turn, batch in enumerate(mine):
            outputs = generate_batch(generator, [ids[i] for i in batch], [rows[i] for i in batch])
            if turn * world + rank < len(left):
                texts_of = [(rows[i], generator.decode(outputs[n])) for n, i in enumerate(batch)]
                cut_off = [rows[i] for n, i in enumerate(batch) if generator.is_cut_off(outputs[n])]
                store.add(number, texts_of, cut_off)
            bar.update(sum(len(batch) for batch in left[turn * world : (turn + 1) * world]))
    bar.close()
    share(store)
    return [store.found.get((number, i), "") for i in range(len(texts))], num_cut


def summarise_groups(generator: Generator, store, groups: dict[str, list[str]]) -> list[dict]:
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
        outputs, _ = generate_round(generator, store, [part for _, part in parts], number, f"Round {number + 1}")
        summaries = {}
        for (name, _), output in zip(parts, outputs, strict=True):
            summaries.setdefault(name, []).append(output)
        for name, texts in summaries.items():
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


def find_groups(table, texts: list, data_args) -> tuple[dict, int]:
    """The texts of each group that is large enough, and how many groups are not. Raises UsageError if none is."""
    groups = {}
    for value, text in zip(table[data_args.group_by], texts, strict=True):
        if text is not None:
            groups.setdefault(value, []).append(text)
    large = {value: texts for value, texts in groups.items() if len(texts) >= data_args.min_group_size}
    if not large:
        raise UsageError(f"--min_group_size {data_args.min_group_size}: no group is that large")
    return large, len(groups) - len(large)


def make_group_table(generator: Generator, store, groups: dict[str, list[str]], data_args):
    """(a table with a row a group: its value, how many texts, rounds and cut texts, and the output; texts cut)."""
    results = summarise_groups(generator, store, groups)
    columns = {data_args.group_by: list(groups)}
    columns |= {name: [row[name] for row in results] for name in ("num_texts", "num_rounds", "num_cut", "prediction")}
    columns[data_args.output_column] = columns.pop("prediction")
    return datasets.Dataset.from_dict(columns), sum(columns["num_cut"])


# ------------------------------------------------------------------------------------------------ main


def describe_generation(generator: Generator, table, text_column: str) -> str:
    """The decisions taken, spelt out, and what an absent companion costs."""
    prompts, model = generator.prompts, generator.model
    kind = "chat prompts by the model's template" if prompts.is_chat else f"prefix {prompts.prefix!r}"
    known = set(vars(GenerationConfig())) - NOT_FLAGS
    given = {k: v for k, v in generator.config.to_diff_dict().items() if k in known and v is not None}
    settings = ", ".join(f"{k}={v}" for k, v in given.items() if not k.endswith("_token_id"))
    lines = [f"{n} is not beside this script: {WITHOUT[n]}" for n in WITHOUT if not globals()[n.removesuffix(".py")]]
    lines.append(f"{len(table)} rows, column {text_column!r}, {kind}, prompts of at most {prompts.limit} tokens")
    return "\n".join([*lines, f"{type(model).__name__} in {str(model.dtype)[6:]} on {model.device}: {settings}"])


def print_counts(counts: dict) -> None:
    """The counts as a table, and what to do where many texts are cut off."""
    print("\n".join(f"{name:<24}{value:>12}" for name, value in counts.items()), flush=True)
    if counts.get(CUT_OFF, 0) > counts.get(ENDED, 0) / 9:  # above a tenth
        print(f"{counts[CUT_OFF]} texts did not end within --max_new_tokens: raise it, or the model does not stop")


def main(argv: list[str] | None = None) -> dict:
    """Generate as the arguments say; returns the counts."""
    model_args, data_args, decoding = parse_generation_arguments(sys.argv[1:] if argv is None else argv)
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed 0.19's calls
    join_ranks(model_args)
    rank, started = int(os.environ.get("RANK", 0)), time.perf_counter()

    # Table and model
    table = load_table(data_args, model_args)
    text_column = find_text_column(table.column_names, data_args)
    if tables and data_args.dataset_name is not None:
        tables.check_dataset(table, f"--dataset_name {data_args.dataset_name}", [text_column])
    store = make_store(table, model_args, data_args, decoding)
    if store.result is not None:
        return store.result
    generator = load_generator(model_args, data_args, decoding)
    texts = read_texts(table, text_column, generator.prompts.is_chat, data_args.drop_keys or ())
    if model_checks:
        sample, _ = generator.prompts.encode([text for text in texts[:200] if text is not None])
        model_checks.check_model(generator.model, generator.prompts.tokenizer, sample, model_args)
    if rank == 0:
        print(describe_generation(generator, table, text_column), flush=True)

    # In batches, from where a killed run ended
    counts = {"rows": len(table), "written": 0, "without a text": texts.count(None)}
    if data_args.group_by is not None:
        groups, counts["groups left out"] = find_groups(table, texts, data_args)
    store.open()
    if data_args.group_by is None:
        outputs, counts["cut"] = generate_round(generator, store, texts, 0, "Generating")
        result = table.add_column(data_args.output_column, outputs)
    else:
        result, counts["cut"] = make_group_table(generator, store, groups, data_args)
    counts |= {"written": len(result), ENDED: len(store.found) - len(store.cut_off), CUT_OFF: len(store.cut_off)}
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    if rank == 0:
        write_table(result, Path(data_args.output_file), partial(store.vouch, counts))
        print_counts({**counts, "seconds": round(time.perf_counter() - started, 1)})
        print(f"written: {data_args.output_file}", flush=True)
        store.remove()
    return counts


if __name__ == "__main__":
    guards.run_and_exit(main) if guards else main()
