#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "rouge-score", "nltk", "matplotlib",
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
import itertools
import json
import os
import re
import sys
import unicodedata
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

with suppress(ModuleNotFoundError):  # before the libraries are loaded: a misspelt flag is answered at once
    import flag_checks

    flag_checks.answer_unknown_flags(__name__, __file__, sys.argv[1:])

import datasets
import numpy as np
import regex
import torch
import transformers
from transformers import HfArgumentParser, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from transformers.hf_argparser import HfArg
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_pt_utils import get_length_grouped_indices

# The companions beside this script. Without them it trains to the same losses and weights; ABSENT says what is lost.
guards = tables = model_checks = reports = fast_batches = cpu_dropout = zero_adafactor = None
with suppress(ModuleNotFoundError):
    import guards
with suppress(ModuleNotFoundError):
    import tables
with suppress(ModuleNotFoundError):
    import model_checks
with suppress(ModuleNotFoundError):
    import reports
with suppress(ModuleNotFoundError):
    import fast_batches
with suppress(ModuleNotFoundError):
    import cpu_dropout
with suppress(ModuleNotFoundError):
    import zero_adafactor
UsageError = guards.UsageError if guards else ValueError

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
ABSENT |= {"cpu_dropout.py": "on the CPU torch draws T5's dropout masks: a step takes about a third longer"}

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

COLUMNS = ("source", "reference")  # what the two columns are called from then on

# ------------------------------------------------------------------------------------------------ arguments


@dataclass
class ModelArguments:
    """Which model, configuration and tokenizer to fine-tune from."""

    model_name_or_path: str = HfArg(help="A model's folder, or its name on the hub.")
    config_name: str | None = HfArg(default=None, help="Configuration, if not the model's own.")
    tokenizer_name: str | None = HfArg(default=None, help="Tokenizer, if not the model's own.")
    cache_dir: str | None = HfArg(default=None, help="Where downloads are kept.")
    use_fast_tokenizer: bool = HfArg(default=True, help="Use a tokenizer of the tokenizers library.")
    model_revision: str = HfArg(default="main", help="Branch, tag or commit of the model on the hub.")
    token: str | None = HfArg(default=None, help="Hub token for private and gated models; never logged.")
    trust_remote_code: bool = HfArg(default=False, help="Run a hub model's own code. Only for code you have read.")
    rank_timeout: float = HfArg(default=30.0, help="Seconds without a sign of another rank, after which a run ends.")
    pure_bf16: bool = HfArg(
        default=False,
        help="Weights, gradients and arithmetic in bf16 with stochastic rounding: 4 bytes a parameter in all. With "
        "--optim adafactor and zero_adafactor.py, without --deepspeed. `--optim_args step_in_backward=true` frees "
        "each gradient at once: near 2 bytes; one process, no accumulation, --max_grad_norm 0.",
    )


@dataclass
class DataTrainingArguments:
    """Which data to train and evaluate on, and how it is cut and scored."""

    lang: str | None = HfArg(default=None, help="Language id for mBART-like tokenizers, e.g. en_XX.")
    dataset_name: str | None = HfArg(default=None, help="A dataset's name on the hub, or a folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of that dataset.")
    text_column: str | None = HfArg(default=None, help="Column of the texts. Default: a known name.")
    summary_column: str | None = HfArg(default=None, help="Column of the summaries. Default: a known name.")
    train_file: str | None = HfArg(default=None, help="Training data: .csv, .json, .jsonl or .parquet.")
    validation_file: str | None = HfArg(default=None, help="Validation data, same formats.")
    test_file: str | None = HfArg(default=None, help="Data for --do_predict, same formats.")
    delimiter: str | None = HfArg(default=None, help="What separates a .csv's fields, if not a comma.")
    file_encoding: str | None = HfArg(default=None, help="Encoding of text files, if not UTF-8, e.g. cp1252.")
    overwrite_cache: bool = HfArg(default=False, help="Tokenise again instead of using the cache.")
    preprocessing_num_workers: int | None = HfArg(default=None, help="Processes for tokenisation.")
    max_source_length: int = HfArg(default=1024, help="Longest source in tokens; the rest is cut.")
    max_target_length: int = HfArg(default=128, help="Longest target in tokens; the rest is cut.")
    val_max_target_length: int | None = HfArg(
        default=None, help="The same in evaluation, and the length generated. Default: --max_target_length."
    )
    pad_to_max_length: bool = HfArg(default=False, help="Pad to the maximum lengths, not to the batch's longest row.")
    packing: bool | None = HfArg(
        default=None,
        metadata={"nargs": "?", "const": True},
        help="Train on a batch's rows end to end instead of padded: the same batches, losses and gradients in about "
        "half the time. Default: where the model can (docs/summarization.md) and fast_batches.py is here.",
    )
    max_train_samples: int | None = HfArg(default=None, help="Use only this many training rows.")
    max_eval_samples: int | None = HfArg(default=None, help="Use only this many validation rows.")
    max_predict_samples: int | None = HfArg(default=None, help="Use only this many test rows.")
    num_beams: int | None = HfArg(default=None, help="Beams when generating. Default: the model's own setting.")
    ignore_pad_token_for_loss: bool = HfArg(default=True, help="Leave padding out of the loss.")
    source_prefix: str | None = HfArg(default=None, help='Text put before every source; T5 knows "summarize: ".')
    forced_bos_token: str | None = HfArg(default=None, help="First token generated: mBART's target language.")
    rouge_language: str = HfArg(default="en", help="en: ROUGE as rouge_score has it, ASCII only; else Unicode words.")

    def __post_init__(self):
        if self.val_max_target_length is None:
            self.val_max_target_length = self.max_target_length


SUMMARIZATION_ARGUMENTS = (ModelArguments, DataTrainingArguments, Seq2SeqTrainingArguments)


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


def has_fast_bf16(use_cpu: bool) -> bool:
    """Whether the device has instructions for bf16 matrices; elsewhere they take twice as long as fp32."""
    if not use_cpu:
        return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def find_companion_problems(args: argparse.Namespace) -> list[str]:
    """Flags that need a file that is not beside this script, or that contradict what it does."""
    pure = args.pure_bf16 or "step_in_backward" in str(args.optim_args)
    needed = {"--packing": (args.packing, fast_batches, "fast_batches.py")}
    needed["--pure_bf16, step_in_backward"] = (pure, zero_adafactor, "zero_adafactor.py")
    problems = zero_adafactor.find_problems(args) if zero_adafactor else []
    absent = [(flag, name) for flag, (given, module, name) in needed.items() if given and module is None]
    return problems + [f"{flag}: needs {name}; copy it beside this script" for flag, name in absent]


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


def find_columns(columns: list[str], args) -> tuple[str, str]:
    """The source and the summary column: as --text_column and --summary_column say, else a pair of KNOWN_COLUMNS."""
    there = f"it has {', '.join(columns)}"
    for flag in ("text_column", "summary_column"):
        name = getattr(args, flag)
        if name is not None and name not in columns:
            raise UsageError(f"has no column {name!r} (--{flag}); {there}")
    known = next((pair for pair in KNOWN_COLUMNS if set(pair) <= set(columns)), (None, None))
    source, summary = args.text_column or known[0], args.summary_column or known[1]
    if source is None or summary is None or source == summary:
        raise UsageError(f"which are the texts, which the summaries? Give --text_column and --summary_column; {there}")
    return source, summary


def select_rows(raw, split: str, columns: tuple[str, str], max_samples: int | None, data_args):
    """
    The rows of a split that have a text and a summary, as columns `row`, `source` and `reference`; a sentence on them.

    columns: those of the training data. Raises UsageError if no row can be used.
    """
    if tables:
        tables.check_split(raw, split, columns, data_args)
    rows = raw[split].select_columns(list(columns)).rename_columns(dict(zip(columns, COLUMNS, strict=True)))
    rows = rows.select(range(min(max_samples or len(rows), len(rows))))
    pairs = enumerate(zip(*(rows[name][:] for name in COLUMNS), strict=True))
    bad = [i for i, pair in pairs if not all(value is not None and str(value).strip() for value in pair)]
    kept = rows.add_column("row", range(len(rows))).select(sorted(set(range(len(rows))) - set(bad)))
    if len(kept) == 0:
        raise UsageError(f"{split}: none of the {len(rows)} rows has a text and a summary")
    named = f": rows {', '.join(map(str, bad[:5]))}{' ...' if len(bad) > 5 else ''}" if bad else ""
    story = f"{split}: {len(rows)} rows read, {len(kept)} used ({' -> '.join(columns)}), "
    return kept, f"{story}{len(bad)} without a text or a summary left out{named}"


# ------------------------------------------------------------------------------------------------ model


def fetch(auto, model_args, flag: str = "model_name_or_path", **settings):
    """auto.from_pretrained() of what a flag names, else the model; by model_checks.py all weights are its file's."""
    flag = flag if getattr(model_args, flag) else "model_name_or_path"
    hub = {name: getattr(model_args, name) for name in ("cache_dir", "token", "trust_remote_code")}
    name, settings = getattr(model_args, flag), {"revision": model_args.model_revision, **hub, **settings}
    return model_checks.load(auto, name, flag, **settings) if model_checks else auto.from_pretrained(name, **settings)


def load_model(model_args, data_args, training_args):
    """
    (tokenizer of the sources, tokenizer of the targets, model), with evaluation's generation settings in the model.

    The tokenizers are one object but for a pair joined by tools/join_models.py.
    """
    name = model_args.model_name_or_path
    fast = {"use_fast": model_args.use_fast_tokenizer}
    config = fetch(transformers.AutoConfig, model_args, "config_name")
    tokenizer = target_tokenizer = fetch(transformers.AutoTokenizer, model_args, "tokenizer_name", **fast)
    if (Path(name) / "decoder_tokenizer").is_dir():
        target_tokenizer = transformers.AutoTokenizer.from_pretrained(Path(name) / "decoder_tokenizer", **fast)
    # fp32 here: transformers 5 would keep a bf16 file in bf16, where small updates are lost unless they are rounded
    # stochastically. Under DeepSpeed the bf16 copy is made from these weights.
    how = {"config": config, "dtype": torch.bfloat16 if model_args.pure_bf16 else torch.float32}
    model = fetch(transformers.AutoModelForSeq2SeqLM, model_args, **how)
    if target_tokenizer is tokenizer and len(tokenizer) > model.get_input_embeddings().num_embeddings:
        if training_args.process_index == 0:
            print(f"the tokenizer has more tokens than the model: embeddings grow to {len(tokenizer)}", flush=True)
        model.resize_token_embeddings(len(tokenizer))
    # Gemma's pads on the left, which would set a target apart from its start, and count positions from elsewhere.
    tokenizer.padding_side = target_tokenizer.padding_side = "right"
    if target_tokenizer.eos_token_id not in target_tokenizer(text_target="a")["input_ids"][-2:]:
        raise UsageError(f"--model_name_or_path {name}: its tokenizer ends no target: targets would have no end")
    for parameter_name, parameter in model.named_parameters():
        if re.search(r"\.(pooler|vision_tower|multi_modal_projector)\.", parameter_name):
            parameter.requires_grad_(False)  # BERT's, T5Gemma2's: nothing reads them, and DDP would wait for gradients
    set_generation_defaults(model, target_tokenizer, data_args, training_args)
    check_positions(model, tokenizer, target_tokenizer, data_args, training_args)
    return tokenizer, target_tokenizer, model


def set_generation_defaults(model, tokenizer, data_args, training_args) -> None:
    """Write the settings used for generating into the model, so that the exported folder generates the same."""
    generation = model.generation_config
    generation.max_length = training_args.generation_max_length or data_args.val_max_target_length
    generation.max_new_tokens = None  # where the model has one it would overrule the flag
    generation.num_beams = training_args.generation_num_beams or data_args.num_beams or generation.num_beams
    if generation.num_beams == 1:  # what a model tuned for beams has would not be saved beside one
        generation.early_stopping, generation.length_penalty = False, 1.0
    set_language(model, tokenizer, data_args)
    configs = (generation, model.config, getattr(model.config, "decoder", None))
    starts = [getattr(config, name, None) for name in ("decoder_start_token_id", "bos_token_id") for config in configs]
    generation.decoder_start_token_id = next((start for start in starts if start is not None), None)
    if generation.decoder_start_token_id is None:
        raise UsageError("the model's config has no decoder_start_token_id: it cannot start a summary")
    if data_args.source_prefix:
        model.config.task_specific_params = {"summarization": {"prefix": data_args.source_prefix}}


def set_language(model, tokenizer, data_args) -> None:
    """The language of texts and summaries, where the tokenizer writes its code (mBART, M2M100, NLLB, PLBART)."""
    lang, first, codes = data_args.lang, data_args.forced_bos_token, getattr(tokenizer, "lang_code_to_token", {})
    if hasattr(tokenizer, "src_lang") != (lang is not None):
        raise UsageError(
            f"--lang {lang or 'is missing'}: the tokenizer writes {'no' if lang else 'a'} language's code"
        )
    numbers = {"lang": codes.get(lang) if codes else lang, "forced_bos_token": first}
    numbers = {flag: token and tokenizer.convert_tokens_to_ids(token) for flag, token in numbers.items()}
    for flag in ("lang", "forced_bos_token"):
        if getattr(data_args, flag) is not None and numbers[flag] in (None, tokenizer.unk_token_id):
            raise UsageError(f"--{flag} {getattr(data_args, flag)}: the tokenizer has no such token")
    if lang is not None:
        tokenizer.src_lang = tokenizer.tgt_lang = lang
    if lang is not None and type(tokenizer).__name__.startswith("MBartTokenizer"):
        model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = numbers["lang"]
    elif lang or first:  # all but mBART's first models have it after </s>
        model.generation_config.forced_bos_token_id = numbers["forced_bos_token"] or numbers["lang"]


def check_positions(model, tokenizer, target_tokenizer, data_args, training_args) -> None:
    """Raise UsageError where a length exceeds the positions; of a joined pair the halves' tokenizers know theirs."""
    joined = target_tokenizer is not tokenizer
    lengths = {"max_source_length": data_args.max_source_length, "max_target_length": data_args.max_target_length}
    lengths |= {"val_max_target_length": data_args.val_max_target_length}
    lengths |= {"generation_max_length": training_args.generation_max_length or 0}
    for flag, length in lengths.items():
        half, known = ("encoder", tokenizer) if flag == "max_source_length" else ("decoder", target_tokenizer)
        config = getattr(model.config, half) if joined else model.config
        names = ("max_position_embeddings", f"max_{half}_position_embeddings")  # the latter are LED's
        limits = [getattr(config, name, None) or length for name in names] + [known.model_max_length] * joined
        if length > min(limits):
            raise UsageError(
                f"--{flag} {length}: the {half} has positions for {min(limits)} tokens; give that or less"
            )


class SummaryCollator(transformers.DataCollatorForSeq2Seq):
    """The stock one, with decoder_input_ids also for models that make none of labels (M2M100), and without a cache."""

    def __call__(self, features: list[dict], return_tensors=None) -> dict:
        # A filler asks for nothing; mBART and PLBART take a target's last token for its first, and it has none.
        fillers = torch.tensor([row["labels"] == [-100] for row in features])
        features = [row | {"labels": row["input_ids"]} if row["labels"] == [-100] else row for row in features]
        batch = super().__call__(features, return_tensors)
        batch["labels"][fillers] = -100
        # LED pads to its window by itself: on one rank and not on another, on which ZeRO-3 dies (5.23)
        short = -batch["input_ids"].shape[1] % int(np.max(getattr(self.model.config, "attention_window", 1)))
        for name, value in (("input_ids", self.tokenizer.pad_token_id), ("attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, short), value=value)
        if "decoder_input_ids" not in batch:
            start = self.model.generation_config.decoder_start_token_id
            ids = torch.nn.functional.pad(batch["labels"][:, :-1], (1, 0), value=start)
            batch["decoder_input_ids"] = ids.masked_fill(ids == -100, self.model.config.pad_token_id)
        return {**batch, "use_cache": False}


def tokenize_rows(rows: dict, tokenizer, target_tokenizer, prefix: str, limits: dict) -> dict:
    """
    Tokenise a batch of rows: `input_ids`, `attention_mask` and `labels`, lists of ints, cut to `limits`.

    Also `source_cut` and `target_cut`, whether a row lost tokens. limits: max_source_length, max_target_length (in
    tokens), pad_to_max_length, ignore_pad_token_for_loss.
    """
    padding = "max_length" if limits["pad_to_max_length"] else False
    sources = [prefix + str(text) for text in rows["source"]]
    targets = [str(text) for text in rows["reference"]]
    features = tokenizer(sources, max_length=limits["max_source_length"], truncation=True, padding=padding)
    limit = limits["max_target_length"]
    labels = target_tokenizer(text_target=targets, max_length=limit, truncation=True)["input_ids"]
    target_cut = find_cut(labels, limit, targets, target_tokenizer, "text_target")
    if padding:
        pad = -100 if limits["ignore_pad_token_for_loss"] else target_tokenizer.pad_token_id
        labels = [row + [pad] * (limit - len(row)) for row in labels]
    result = {"input_ids": features["input_ids"], "attention_mask": features["attention_mask"], "labels": labels}
    result["source_cut"] = find_cut(result["input_ids"], limits["max_source_length"], sources, tokenizer, "text")
    return result | {"target_cut": target_cut}


def find_cut(ids: list[list[int]], limit: int, texts: list[str], tokenizer, argument: str) -> list[bool]:
    """Which texts are longer than `limit` tokens; only rows that fill the limit are tokenised again."""
    full = [i for i, row in enumerate(ids) if len(row) >= limit]
    whole = tokenizer(**{argument: [texts[i] for i in full]})["input_ids"] if full else []
    cut = {i for i, row in zip(full, whole, strict=True) if len(row) > limit}
    return [i in cut for i in range(len(ids))]


def prepare_split(raw, split: str, columns, max_samples: int | None, tokenizers: tuple, data_args, training_args):
    """Tokenise one split and say what was kept, cut and left out. Returns (raw rows kept, tokenised rows)."""
    kept, story = select_rows(raw, split, columns, max_samples, data_args)
    limits = {
        "max_source_length": data_args.max_source_length,
        "max_target_length": data_args.max_target_length if split == "train" else data_args.val_max_target_length,
        "pad_to_max_length": data_args.pad_to_max_length,
        "ignore_pad_token_for_loss": data_args.ignore_pad_token_for_loss,
    }
    settings = dict(zip(("tokenizer", "target_tokenizer"), tokenizers, strict=True))
    with training_args.main_process_first(desc=f"tokenising {split}"):
        tokenized = kept.map(
            tokenize_rows,
            batched=True,
            num_proc=data_args.preprocessing_num_workers,
            remove_columns=list(COLUMNS) + ["row"] * (split == "train"),
            load_from_cache_file=not data_args.overwrite_cache,
            fn_kwargs={"prefix": data_args.source_prefix or "", "limits": limits, **settings},
            desc=f"Tokenising {split}",
        )
    for backend in (t.backend_tokenizer for t in tokenizers if t.is_fast):  # what it keeps would be saved with it,
        backend.no_truncation()  # and not where the rows came from the cache
        backend.no_padding()
    if training_args.process_index == 0:
        cuts = (sum(tokenized[name][:]) for name in ("source_cut", "target_cut"))
        print(f"{story}; {next(cuts)} sources and {next(cuts)} targets cut", flush=True)
    return kept, tokenized.remove_columns(["source_cut", "target_cut"])


# ------------------------------------------------------------------------------------------------ training


def choose_batches(model, rows, collator, data_args, training_args) -> tuple:
    """
    (collator of the training batches, callbacks, compute_loss_func); rows: those to train on.

    With fast_batches.py, if the model bears it, rows stand end to end and the loss is made without logits; neither
    changes the batches, losses or gradients. Its callback proves the packing, and says so, before the first step.
    """
    smoothing, packed, checks, fused = training_args.label_smoothing_factor, None, [], None
    plain = data_args.pad_to_max_length or not data_args.ignore_pad_token_for_loss
    if fast_batches and training_args.do_train:
        fused = fast_batches.fuse_loss(model, smoothing)
        if not plain and data_args.packing is not False:
            packed, checks = fast_batches.pack_seq2seq(model, rows, collator)
    if cpu_dropout and training_args.do_train and training_args.use_cpu:
        cpu_dropout.speed_up_cpu(model)
    if data_args.packing and not packed:
        why = "not with padding as asked for" if plain else f"{model.config.model_type} models cannot be packed"
        raise UsageError(f"--packing: {why}; leave the flag out")
    if training_args.do_train and training_args.process_index == 0 and not packed:
        print("batches are padded", flush=True)
    return packed or collator, checks, fused or partial(compute_token_loss, label_smoothing=smoothing)


def token_loss_sum(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Summed cross-entropy in fp32. logits: (..., vocabulary); labels: (...) of ids, -100 where nothing is asked."""
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", label_smoothing=label_smoothing
    )


def compute_token_loss(outputs, labels, num_items_in_batch=None, label_smoothing: float = 0.0) -> torch.Tensor:
    """
    The training loss: cross-entropy summed over the batch's tokens, over the tokens of the whole global batch.

    T5's own loss is a mean over the batch it sees, but the Trainer believes it is normalised by num_items_in_batch
    (its forward takes **kwargs) and so multiplies it by the number of processes and does not divide it by the
    accumulation steps: loss and gradients grow with both (transformers 5.23). A compute_loss_func that does
    normalise by num_items_in_batch is scaled rightly.
    """
    items = labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch
    return token_loss_sum(outputs.logits, labels, label_smoothing) / items


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


class SummarizationTrainer(TokenMeanTrainer):
    """TokenMeanTrainer that generates from the encoder's input in evaluation."""

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Returns (token-mean loss of the batch, generated ids or None, labels or None), all on this rank."""
        inputs = self._prepare_inputs(inputs)
        labels, rows = inputs.pop("labels"), inputs.pop("row")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs).logits
        # One row each, so that gather_for_metrics can take the rows away that only fill the last batch.
        sums = torch.stack([token_loss_sum(row, target) for row, target in zip(logits, labels, strict=True)])
        sums = torch.stack([sums.double(), labels.ne(-100).sum(dim=1).double(), rows.double()], dim=1)
        self.row_sums.append(self.accelerator.gather_for_metrics(sums))
        del logits
        loss = sums[:, 0].sum() / sums[:, 1].sum().clamp(min=1)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        prompt = {k: v for k, v in inputs.items() if k not in ("decoder_input_ids", "use_cache")}
        generated = self.model.generate(**prompt, synced_gpus=is_deepspeed_zero3_enabled(), **gen_kwargs)
        return loss, generated, labels

    def _save(self, output_dir=None, state_dict=None):
        """The stock one with the sources' tokenizer; a joined pair's decoder has its own in decoder_tokenizer/."""
        tokenizer, target_tokenizer = self.data_collator.tokenizer, self.processing_class
        self.processing_class = tokenizer
        super()._save(output_dir, state_dict)
        self.processing_class = target_tokenizer
        if target_tokenizer is not tokenizer and self.args.should_save:
            target_tokenizer.save_pretrained(Path(output_dir or self.args.output_dir) / "decoder_tokenizer")


# Letters that are written without spaces between words, each a word of its own.
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"


class UnicodeTokenizer:
    """Words of any script for rouge_score, whose own tokenizer drops every non-ASCII letter; marks stay with it."""

    pattern = regex.compile(rf"[{UNSPACED}]\p{{M}}*|(?:(?![{UNSPACED}])[^\W_][\p{{M}}\u200c\u200d]*)+")

    def tokenize(self, text: str) -> list[str]:
        return self.pattern.findall(unicodedata.normalize("NFC", text).lower())


def split_sentences(text: str) -> str:
    """One sentence a line, as rougeLsum expects; an untrained Punkt model, so that nothing is downloaded."""
    from nltk.tokenize.punkt import PunktSentenceTokenizer  # here: its 63 MB are for runs that generate

    lines = re.sub(r"([。！？])", r"\1 \n", text.strip()).split("\n")
    return "\n".join(s.strip() for line in lines for s in PunktSentenceTokenizer().tokenize(line) if s.strip())


def compute_rouge(predictions: list[str], references: list[str], language: str) -> dict[str, float]:
    """ROUGE-1/2/L/Lsum F-measures in percent, by rouge_score: `evaluate.load("rouge")` would need the hub."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    unseen = sum(any(map(str.isalpha, text)) and not re.search("[a-zA-Z0-9]", text) for text in references)
    if language == "en" and unseen:
        print(f"ROUGE: --rouge_language en sees no word in {unseen} of {len(references)} references; give another")
    scorer = RougeScorer(names, **({"use_stemmer": True} if language == "en" else {"tokenizer": UnicodeTokenizer()}))
    pairs = zip(map(split_sentences, references), map(split_sentences, predictions), strict=True)
    scores = [scorer.score(*pair) for pair in pairs]
    return {name: round(100 * float(np.mean([s[name].fmeasure for s in scores])), 4) for name in names}


def decode(ids: np.ndarray, tokenizer) -> list[str]:
    """Texts of an array of token ids (rows, tokens) in which -100 is padding."""
    texts = tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
    return [text.strip() for text in texts]


def compute_metrics(output, tokenizer, model, language: str) -> dict[str, float]:
    """ROUGE, mean length and share of the texts that ended by themselves, computed on the first rank alone."""
    metrics = [None]
    if int(os.environ.get("RANK", 0)) == 0:
        ids = np.where(output.predictions == -100, tokenizer.pad_token_id, output.predictions)
        metrics[0] = compute_rouge(decode(ids, tokenizer), decode(output.label_ids, tokenizer), language)
        metrics[0]["gen_len"] = float(np.mean((ids != tokenizer.pad_token_id).sum(axis=1)))
        last = model.generation_config.forced_eos_token_id and model.generation_config.max_length - 1  # BART's
        metrics[0]["stopped"] = float(np.mean((ids[:, 1:last] == tokenizer.eos_token_id).any(axis=1)))
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(metrics, src=0)
    return metrics[0]


def score_split(trainer, rows, features, prefix: str) -> None:
    """Evaluate on one split, log and save the metrics under `prefix`, and write the generated texts, if any."""
    output = trainer.predict(features, metric_key_prefix=prefix)
    metrics = output.metrics | {f"{prefix}_samples": len(rows)}
    trainer.log({k: v for k, v in metrics.items() if k.startswith(prefix)})
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    if trainer.args.predict_with_generate and trainer.is_world_process_zero():
        seen = torch.cat(trainer.row_sums)[:, -1].long().tolist()  # the rows' numbers, in the order of the loader
        texts = dict(zip(seen, decode(output.predictions, trainer.processing_class), strict=True))
        write_predictions(Path(trainer.args.output_dir) / "generated_predictions.jsonl", rows, texts)


def write_predictions(path: Path, rows, predictions: dict[int, str]) -> None:
    """JSONL with `row` (its number in the file, from 0), `source`, `reference` and `prediction` a row."""
    with open(path, "w", encoding="utf-8") as stream:
        for row in rows:
            row = {"row": row["row"], **row, "prediction": predictions[row["row"]]}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def print_absent(training_args) -> None:
    """Say what each absent companion costs."""
    for name, cost in ABSENT.items():
        if globals()[name.removesuffix(".py")] is None and training_args.process_index == 0:
            print(f"{name} is not beside this script: {cost}", flush=True)


def main(argv: list[str] | None = None) -> dict:
    """Fine-tune, evaluate and predict as the arguments say; returns the metrics of all_results.json."""
    # Arguments first: ZeRO-3 partitions the model while it is loaded, and knows that from training_args being alive.
    wanted = (SUMMARIZATION_ARGUMENTS, find_columns, find_companion_problems)
    argv = sys.argv[1:] if argv is None else argv
    model_args, data_args, training_args = parse_arguments(argv, *wanted, remove_unused_columns=False)
    last_checkpoint = training_args.resume_from_checkpoint
    if guards:
        last_checkpoint, results = guards.start_run(model_args, data_args, training_args)
        if results is not None:
            return results
    if training_args.n_gpu > 1:  # DataParallel would scatter the rows but not the token count
        training_args._n_gpu = 1
    print_absent(training_args)
    set_seed(training_args.seed)

    # Data, model, tokens
    raw = load_raw_datasets(data_args, model_args)
    columns = find_columns(next(iter(raw.values())).column_names, data_args)
    *tokenizers, model = load_model(model_args, data_args, training_args)
    tokenizer, target_tokenizer = tokenizers
    splits = {}
    for wanted, split, limit in (
        (training_args.do_train, "train", data_args.max_train_samples),
        (training_args.do_eval, "validation", data_args.max_eval_samples),
        (training_args.do_predict, "test", data_args.max_predict_samples),
    ):
        if wanted:
            splits[split] = prepare_split(raw, split, columns, limit, tokenizers, data_args, training_args)
    if model_checks and splits:
        model_checks.check_model(model, tokenizer, [*splits.values()][0][1][:200]["input_ids"], model_args)

    # Batches, loss, trainer
    collator = SummaryCollator(
        tokenizer,
        model=model,
        label_pad_token_id=-100 if data_args.ignore_pad_token_for_loss else target_tokenizer.pad_token_id,
        pad_to_multiple_of=8 if training_args.bf16 or training_args.fp16 or model_args.pure_bf16 else None,
    )
    train_rows = splits["train"][1] if "train" in splits else None
    train_collator, callbacks, loss = choose_batches(model, train_rows, collator, data_args, training_args)
    show = reports and training_args.do_train and "validation" in splits and training_args.predict_with_generate
    callbacks += [reports.show_summaries(*splits["validation"], collator, target_tokenizer)] if show else []
    metrics = partial(compute_metrics, tokenizer=target_tokenizer, model=model, language=data_args.rouge_language)
    trainer = SummarizationTrainer(
        model=model,
        args=training_args,
        train_dataset=add_filler(train_rows, tokenizer.eos_token_id) if train_rows else None,
        eval_dataset=splits["validation"][1] if "validation" in splits else None,
        processing_class=target_tokenizer,  # the trainer sets the model's start, end and padding by it
        data_collator=collator,
        train_collator=train_collator,
        compute_metrics=metrics if training_args.predict_with_generate else None,
        compute_loss_func=loss,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=zero_adafactor.choose(training_args) if zero_adafactor else None,
    )
    if guards:
        guards.start_tracking(trainer, model_args, data_args)

    # Train
    if training_args.do_train:
        if reports and trainer.is_world_process_zero():
            optimizer = zero_adafactor.describe(training_args, model) if zero_adafactor else training_args.optim.value
            print(reports.describe_run(model, training_args, optimizer, last_checkpoint), flush=True)
        metrics = trainer.train(resume_from_checkpoint=last_checkpoint).metrics
        metrics["train_samples"] = len(splits["train"][0])
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)

    # Evaluate and predict: generated_predictions.jsonl holds the test rows, or the validation rows without a test
    for split, prefix in (("validation", "eval"), ("test", "predict")):
        if split in splits:
            score_split(trainer, *splits[split], prefix)
    trainer.save_state()
    if guards:
        guards.write_reports(trainer, "summarization", model_args, data_args, columns)
    results = Path(training_args.output_dir) / "all_results.json"
    return json.loads(results.read_text()) if trainer.is_world_process_zero() else {}


if __name__ == "__main__":
    guards.run_and_exit(main) if guards else main()
