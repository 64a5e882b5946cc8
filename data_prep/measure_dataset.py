# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.23", "datasets", "accelerate", "peft", "rouge-score", "nltk", "sentencepiece",
#   "polars>=1.0", "pyarrow", "numpy", "matplotlib", "jinja2", "tqdm", "py3langid",
# ]
# ///
"""Measure a dataset before fine-tuning on it: report.html to read, measures.json, PNGs, and the flags to train with.

Token lengths and what each maximum cuts, padding of random, like-length and packed batches, vocabulary, duplicates and
near-duplicates, train/validation overlap, repeated and copied targets, other languages, labels, rows worth reading.

Texts and summaries, for run_summarization.py:

    python data_prep/measure_dataset.py --train_file data/reviews/train.csv \
        --validation_file data/reviews/validation.csv --text_column review_body --summary_column review_headline \
        --model_name_or_path t5-small --source_prefix "summarize: " --output_dir reports/reviews

Instructions or chats as prepare_instruct.py writes them, for run_clm_instruct.py:

    python data_prep/measure_dataset.py --train_file data/dolly/train.jsonl \
        --validation_file data/dolly/validation.jsonl --label_column category \
        --model_name_or_path meta-llama/Llama-2-7b-hf --per_device_train_batch_size 16 --output_dir reports/dolly

Columns, prompt templates, labels and packing are those of the training scripts, which are imported for it.

The file is read three times: to check it, to measure it, and to fetch the rows that are shown. Of a row only numbers
stay in memory: a million reviews took 1.4 GB, and 5 minutes on two cores that had other work too.
"""

import argparse
import base64
import itertools
import json
import random
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the training scripts are

from brief_parser import BriefParser
from fast_batches import PACKABLE, pack_examples, pack_lengths
from report_figures import draw_figures
from run_clm_instruct import (
    DEFAULT_MAX_SEQ_LENGTH,
    DEFAULT_TEMPLATES,
    KNOWN_FORMATS,
    RowError,
    encode_chats,
    find_format,
    set_prompt_template,
    to_messages,
)
from run_summarization import KNOWN_COLUMNS, find_columns
from table_files import read_columns, read_rows, refuse
from whole_files import Output, describe_command, find_folder_problems

# ---------------------------------------------------------------------------------------------------------------------
# Constants

DATA_ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
TASK_PARTS = {
    "summarization": ("source", "target"),
    "instruction": ("prompt", "answer", "example"),
    "chat": ("prompt", "answer", "example"),
    "text": ("example",),
}
ROWS_AT_A_TIME = 2_000  # rows in memory at a time
NAMED_LINES = 5  # odd rows that are named for each reason; all of them are counted

CONTEXT_MARK = "\n\nInput:\n"  # stands before a context where rows are shown

CUT_CANDIDATES = (32, 64, 128, 256, 512, 1024, 2048)
# Recommended lengths are multiples of these: matrix products come in tiles.
LENGTH_STEP, SEQUENCE_STEP = 8, 64
WORTH_IT = 1.05  # a way of batching is recommended if it computes 5 % fewer positions than the simpler one
PACKED_BATCHES = 200  # random batches that are packed as run_summarization.py packs them, to measure what that saves
WAYS = {"random": "random batches", "like_length": "batches of like length", "packing": "packing"}

# Letters that are written without spaces between words count as a word each.
WORD = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]|[\w'’]+"
SHINGLE_WORDS = 3
# 16 bands of 8 find 95 % of the pairs of similarity 0.8 and 99.99 % of those of 0.9; 128 values estimate the
# similarity to within 0.035.
NUM_HASHES, NUM_BANDS, NEAR_SIMILARITY = 128, 16, 0.8

FREQUENT_SHARE, FREQUENT_ROWS = 0.001, 5  # a target is boilerplate from this share of the rows, and so many, on
COPIED_WORDS = 4  # a target of fewer words stands in its source by chance
# A row goes to the language identifier, the slow step, if few of its words are among the language's commonest.
LANGUAGE_SAMPLE, COMMON_WORDS, COMMON_SHARE, LANGUAGE_WORDS, LANGUAGE_SURE = 2000, 300, 0.3, 5, 0.9

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--train_file", required=True, help=f"Training data: {', '.join(DATA_ENDINGS)}; the text ones also .gz.")
    add("--validation_file", default=None, help="Validation data; its overlap with the training data is measured.")
    add("--output_dir", required=True, help="Folder for report.html, measures.json, PNGs; must be absent or empty.")
    add("--model_name_or_path", default=None, help="Model whose tokenizer counts the tokens: a folder or hub name.")
    add("--tokenizer_name", default=None, help="Tokenizer, if not the model's own.")
    add("--prompt_template", default=None, help="As in run_clm_instruct.py. None: as there, else dolly.")
    add("--data_format", default=None, help="As in run_clm_instruct.py. None: known by the columns.")
    add("--text_column", default=None, help="Column of the texts to summarize, or of plain text. None: known names.")
    add("--summary_column", default=None, help="Column of the summaries. None: recognised from the columns.")
    add("--label_column", default=None, help="Column whose balance is shown. None: category or label, if there.")
    add("--source_prefix", default="", help='Text put before every source, such as "summarize: "; it is counted.')
    add("--per_device_train_batch_size", type=int, default=8, help="Rows a batch, for the padding.")
    add("--max_source_length", type=int, default=None, help="Longest source in tokens. None: as recommended.")
    add("--max_target_length", type=int, default=None, help="Longest target in tokens. None: as recommended.")
    add("--max_seq_length", type=int, default=None, help="Longest example in tokens. None: as recommended.")
    add("--max_cut_share", type=float, default=0.01, help="Share of rows that a recommended maximum may cut.")
    add("--language", default=None, help="Language that rows should be in, such as en. None: that of most rows.")
    add("--shown_rows", type=int, default=5, help="Rows shown of each kind: longest, most repetitive, ...")
    add("--seed", type=int, default=42, help="Seed of the batches and of the sample for the language.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences; choose_columns looks at the files."""
    problems = []
    for flag in ("per_device_train_batch_size", "max_source_length", "max_target_length", "max_seq_length"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if args.shown_rows < 0:
        problems.append(f"--shown_rows {args.shown_rows}: must be 0 or more")
    if not 0 <= args.max_cut_share < 1:
        problems.append(f"--max_cut_share {args.max_cut_share}: must be 0 or more and below 1, such as 0.01")
    if not (args.model_name_or_path or args.tokenizer_name):
        problems.append("--model_name_or_path or --tokenizer_name is missing: lengths are counted in its tokens")
    return problems + find_folder_problems(Path(args.output_dir))


def load_tokenizer(args, task):
    """Return (tokenizer, name of the prompt template that it has or is given; None: no chats); ValueError if none."""
    name = args.tokenizer_name or args.model_name_or_path
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{flag} {name}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from error
    if task["task"] not in ("instruction", "chat"):
        return tokenizer, None
    if args.prompt_template or tokenizer.chat_template or DEFAULT_TEMPLATES.get(task["format"], "chat") != "chat":
        return tokenizer, set_prompt_template(tokenizer, args, task["format"])
    return tokenizer, set_prompt_template(tokenizer, argparse.Namespace(prompt_template="dolly"), task["format"])


def read_config(args):
    """Return the model's configuration as a dict; an empty one if no model is named or it has none."""
    try:
        return PreTrainedConfig.get_config_dict(args.model_name_or_path)[0] if args.model_name_or_path else {}
    except OSError:
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def choose_task(path, columns, args):
    """Return {"task", "format", "columns", "label"}: what the rows are, as the training scripts find it out."""
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: the header names {', '.join(twice)} more than once; rename one")
    if args.label_column and args.label_column not in columns:
        raise ValueError(f"{path}: has no column {args.label_column!r} (--label_column); it has {', '.join(columns)}")
    has_pair = any(set(pair) <= set(columns) for pair in KNOWN_COLUMNS)
    has_chats = any(set(needed) <= set(columns) for name, needed in KNOWN_FORMATS if name != "text")
    is_pair = args.summary_column or has_pair and not (has_chats or args.text_column or args.data_format)
    try:
        data_format, names = ("pair", find_columns(columns, args)) if is_pair else find_format(columns, args)
    except ValueError as error:
        hint = "" if is_pair else "; of texts and summaries name both columns, by --text_column and --summary_column"
        raise ValueError(f"{path}: {error}{hint}") from error
    if args.source_prefix and not is_pair:
        raise ValueError(f"--source_prefix {args.source_prefix!r}: goes with texts and summaries, {path} has none")
    label = args.label_column or next((name for name in ("category", "label") if name in columns), None)
    task = {"pair": "summarization", "chat": "chat", "text": "text"}.get(data_format, "instruction")
    return {"task": task, "format": data_format, "columns": names, "label": label}


def choose_tasks(args):
    """Return ({split: (path, task)}, problems); only the head of a file is read."""
    chosen, problems = {}, []
    for split in ("train", "validation"):
        path = getattr(args, f"{split}_file")
        if path is None:
            continue
        try:
            chosen[split] = (path, choose_task(path, read_columns(f"{split}_file", path, DATA_ENDINGS), args))
        except ValueError as error:
            problems.append(str(error))
    if len({task["task"] for _, task in chosen.values()}) > 1:
        kinds = " and ".join(f"{path} holds {task['task']}" for path, task in chosen.values())
        problems.append(f"--train_file and --validation_file: {kinds}; give two files of one kind")
    return chosen, problems


def check_text(value, name):
    """Return a text without white space at its ends; RowError if it is none or empty."""
    if value is None:
        raise RowError(f"{name} is null or absent")
    if not isinstance(value, str):
        raise RowError(f"{name} is {type(value).__name__}, not text")
    if not value.strip():
        raise RowError(f"{name} is empty")
    return value.strip()


def to_example(row, task):
    """Return (source, target, label) of a row, of a chat all that is no answer and the answers; RowError if none."""
    if isinstance(row, str):
        raise RowError("another number of fields than the header")
    label = str(row[task["label"]]).strip() if row.get(task["label"]) is not None else None
    names = task["columns"]
    if task["task"] in ("summarization", "text"):
        source, target = (*(check_text(row.get(name), name) for name in names), "")[:2]
    else:
        turns = to_messages({name: row.get(name) for name in names}, task["format"], names)
        texts = {True: [], False: []}
        for turn in turns:
            text = CONTEXT_MARK.join(filter(None, (turn["content"], turn.get("context"))))
            texts[turn["role"] == "assistant"].append(text)
        source, target = "\n".join(texts[False]), "\n".join(texts[True])
    try:
        f"{source}{target}".encode()
    except UnicodeEncodeError:
        raise RowError("holds half of a surrogate pair") from None
    return source, target, label


def read_examples(path, task, faults=None):
    """Yield (ordinal from 0, line, row, (source, target, label)); `faults` gains {reason: [lines]} of the rest."""
    names = [*task["columns"], *([task["label"]] if task["label"] else [])]
    for ordinal, (line, row) in enumerate(read_rows(path, dict.fromkeys(names))):
        try:
            yield ordinal, line, row, to_example(row, task)
        except RowError as fault:
            if faults is not None:
                faults.setdefault(str(fault), []).append(line)


def scan_file(path, task, seed):
    """Return ({"read", "measured", "odd"}, sample): a first pass that finds what is broken, and draws rows fairly."""
    dice, sample, faults, measured = random.Random(seed), [], {}, 0
    examples = read_examples(path, task, faults)
    for measured, (*_, example) in enumerate(tqdm(examples, f"checking {path}", unit=" rows", unit_scale=True), 1):
        if len(sample) < LANGUAGE_SAMPLE:
            sample.append(example)
        elif (place := dice.randrange(measured)) < LANGUAGE_SAMPLE:
            sample[place] = example
    read = measured + sum(map(len, faults.values()))
    scan = {"read": read, "measured": read, "odd": {}}
    return count_faults(path, scan, faults), sample


def count_faults(path, scan, faults):
    """Move rows of {reason: [lines]} from a scan's measured to its odd ones; ValueError if no row is left."""
    odd = {reason: {"rows": len(lines), "lines": lines[:NAMED_LINES]} for reason, lines in faults.items()}
    scan["odd"] = dict(sorted({**scan["odd"], **odd}.items()))
    scan["measured"] -= sum(entry["rows"] for entry in odd.values())
    if not scan["measured"]:
        reasons = "; ".join(f"{reason} ({entry['rows']} rows)" for reason, entry in scan["odd"].items()) or "no rows"
        raise ValueError(f"{path}: no row can be measured: {reasons}")
    return scan


# ---------------------------------------------------------------------------------------------------------------------
# Measuring rows: a batch of texts becomes arrays of numbers


def flatten(rows):
    """Return (the numbers of all rows one after the other, how many each row has)."""
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum()), lengths


def tokenize(tokenizer, texts):
    """Return flatten() of the texts' token ids, with the special tokens that the tokenizer puts around a text."""
    if not tokenizer.is_fast:
        return flatten(tokenizer(texts, verbose=False)["input_ids"])
    backend = tokenizer.backend_tokenizer  # without masks, offsets and Python lists of them, twice as fast
    backend.no_truncation()
    backend.no_padding()
    return flatten([encoding.ids for encoding in backend.encode_batch_fast(texts)])


def count_tokens(rows, task, tokenizer, prefix):
    """
    Return (all token ids, each row's tokens of source and of target, unknown ones, why it cannot be trained on).

    Of a chat the training script's encoder says what is target: what the model learns to write. All else is source.
    """
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    if task["task"] in ("instruction", "chat"):
        columns = {name: [row.get(name) for row in rows] for name in task["columns"]}
        encoded = encode_chats(
            columns, range(len(rows)), tokenizer, task["format"], task["columns"], limit=sys.maxsize
        )
        (ids, lengths), learned = flatten(encoded["input_ids"]), np.array(encoded["supervised_tokens"])
        return ids, lengths - learned, learned, sum_rows(ids == unknown, lengths), encoded["problem"]
    ids, lengths = tokenize(tokenizer, [prefix + row[task["columns"][0]] for row in rows])
    unknowns, problems = sum_rows(ids == unknown, lengths), [""] * len(rows)
    if task["task"] == "text":  # the script ends each text with EOS where the tokenizer does not
        return ids, lengths + (ids[np.cumsum(lengths) - 1] != tokenizer.eos_token_id), 0 * lengths, unknowns, problems
    target_ids, target_lengths = tokenize(tokenizer, [row[task["columns"][1]] for row in rows])
    unknowns += sum_rows(target_ids == unknown, target_lengths)
    return np.concatenate([ids, target_ids]), lengths, target_lengths, unknowns, problems


def sum_rows(values, lengths):
    """Return the sum of each row of a flat array; an empty row has 0."""
    totals = np.concatenate([[0], np.cumsum(values)])
    ends = np.cumsum(lengths)
    return totals[ends] - totals[ends - lengths]


def hash_words(texts):
    """Return (64-bit hashes of all lower-cased words one after the other, how many each text has, how many differ)."""
    words = pl.Series(texts, dtype=pl.String).str.to_lowercase().str.extract_all(WORD)
    counts = (words.list.len(), words.list.n_unique())
    return words.explode(empty_as_null=False).hash(seed=1).to_numpy(), *(n.to_numpy().astype(np.int64) for n in counts)


def hash_shingles(words, lengths):
    """Return (hashes of every three words in a row, how many each row has); a shorter row is one shingle."""
    mixed, count = words.copy(), SHINGLE_WORDS
    for step in range(1, count):
        mixed[:-step] = mixed[:-step] * np.uint64(0x9E3779B97F4A7C15) + words[step:] if len(words) > step else 0
    inside = np.arange(len(words)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    left = np.repeat(lengths, lengths) - inside
    return mixed[(left >= count) | (inside == 0)], np.maximum(np.minimum(lengths, 1), lengths - count + 1)


def sign_rows(shingles, lengths, seed=1):
    """Return the MinHash signatures, uint16 [rows, NUM_HASHES]: the share of equal values estimates the similarity."""
    dice = np.random.default_rng(seed)
    factors = dice.integers(1, 2**32, NUM_HASHES, dtype=np.uint32) | np.uint32(1)
    shifts = dice.integers(0, 2**32, NUM_HASHES, dtype=np.uint32)
    hashes = (shingles >> np.uint64(32)).astype(np.uint32)
    signatures = np.zeros((len(lengths), NUM_HASHES), np.uint16)
    filled = lengths > 0
    starts = (np.cumsum(lengths) - lengths)[filled]
    for column, (factor, shift) in enumerate(zip(factors, shifts, strict=True)):
        if len(starts):
            # Of a minimum the low half is the random one.
            signatures[filled, column] = np.minimum.reduceat(hashes * factor + shift, starts).astype(np.uint16)
    return signatures


def fold_texts(texts):
    """Return a Series of texts in lower case, their words parted by single spaces; one without words stays."""
    folded = texts.str.to_lowercase().str.replace_all(r"[^\p{L}\p{N}\p{M}]+", " ").str.strip_chars()
    return folded.zip_with(folded != "", texts)


def find_copies(sources, targets):
    """Return 0, or 1 where the target is the source, 2 where it starts it, 3 where it stands in it word for word."""
    table = pl.DataFrame({"source": sources, "target": targets}).with_columns(pl.all().str.to_lowercase())
    source, target = pl.col("source"), pl.col("target")
    long = target.str.count_matches(WORD) >= COPIED_WORDS
    kinds = (source == target, long & source.str.starts_with(target), long & source.str.contains(target, literal=True))
    first = pl.coalesce([pl.when(kind).then(number) for number, kind in enumerate(kinds, start=1)] + [pl.lit(0)])
    return table.select(first.cast(pl.UInt8)).to_series().to_numpy()


def learn_language(sample, identifier, language=None):
    """Return {"main", "sample", "common"}: the language of most rows, the sample's count, hashes of common words."""
    texts = [f"{source} {target}" for source, target, _ in sample]
    found = [name_language(text, identifier) for text in texts]
    counts = Counter(name for name in found if name)
    main = language or (counts.most_common(1)[0][0] if counts else None)
    words, _, _ = hash_words([text for text, name in zip(texts, found, strict=True) if name == main])
    names, times = np.unique(words, return_counts=True)
    common = names[np.argsort(-times, kind="stable")[:COMMON_WORDS]]
    return {"main": main, "sample": dict(counts.most_common()), "sample_rows": len(texts), "common": common}


def name_language(text, identifier):
    """Return a text's language, or None where the identifier is not sure."""
    name, sure = identifier.classify(text)
    if sure < LANGUAGE_SURE:
        return None
    return "no language" if name == "zxx" else name


def load_identifier():
    """Return py3langid's identifier with probabilities; its model comes with the package."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def find_languages(texts, words, lengths, language, identifier):
    """Return {index: language} of the rows in another language than the main one, as far as the identifier is sure."""
    shares = sum_rows(np.isin(words, language["common"]), lengths) / np.maximum(lengths, 1)
    suspects = np.flatnonzero((lengths >= LANGUAGE_WORDS) & (shares < COMMON_SHARE))
    named = {int(index): name_language(texts[index], identifier) for index in suspects}
    return {index: name for index, name in named.items() if name not in (None, language["main"])}


def measure_texts(examples, language, identifier):
    """Return ({name: array with a number a row}, {index: language}) of a batch of examples."""
    sources, targets, _ = (list(column) for column in zip(*examples, strict=True))
    both = [f"{source}\n{target}" for source, target in zip(sources, targets, strict=True)]
    words, word_lengths, distinct = hash_words(both)
    table = pl.DataFrame({"source": sources, "target": targets, "both": both})
    columns = {
        "words": word_lengths.astype(np.int32),
        "distinct_words": distinct.astype(np.int32),
        "chars": table["both"].str.count_matches(r"\S").to_numpy().astype(np.int32),
        "letters": table["both"].str.count_matches(r"\p{L}|\p{M}").to_numpy().astype(np.int32),
        "source_hash": table["source"].hash(seed=1).to_numpy(),
        "target_hash": table["target"].hash(seed=1).to_numpy(),
        "folded_hash": fold_texts(table["target"]).hash(seed=1).to_numpy(),
        "row_hash": table["both"].hash(seed=1).to_numpy(),
        "copied": find_copies(sources, targets),
        "signature": sign_rows(*hash_shingles(words, word_lengths)),
    }
    return columns, find_languages(both, words, word_lengths, language, identifier)


def measure_file(path, task, scan, tokenizer, args, language, identifier):
    """Return {"columns", "vocabulary", "labels", "languages"} of a file; `scan` gains the rows no template takes."""
    faults, labels, languages, start = {}, Counter(), {}, 0
    # As long as the largest token id: where ids are left out that is more than there are tokens.
    columns, vocabulary = {}, np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    examples = read_examples(path, task)
    examples = iter(tqdm(examples, f"measuring {path}", scan["measured"], unit=" rows", unit_scale=True))
    while batch := list(itertools.islice(examples, ROWS_AT_A_TIME)):
        ordinals, lines, rows, texts = zip(*batch, strict=True)
        ids, source_tokens, target_tokens, unknown, problems = count_tokens(rows, task, tokenizer, args.source_prefix)
        kept = np.array([not problem for problem in problems])
        for line, problem in zip(lines, problems, strict=True):
            if problem:
                faults.setdefault(problem, []).append(line)
        if not kept.any():
            continue
        texts = list(itertools.compress(texts, kept))
        measured, elsewhere = measure_texts(texts, language, identifier)
        measured |= {"ordinal": np.array(ordinals)[kept], "unknown": unknown[kept]}
        measured |= {"source_tokens": source_tokens[kept], "target_tokens": target_tokens[kept]}
        end = start + len(texts)
        for name, values in measured.items():
            if name not in columns:  # at their full size at once: joining batches at the end would take twice that
                columns[name] = np.empty((scan["measured"], *values.shape[1:]), values.dtype)
            columns[name][start:end] = values
        vocabulary += np.bincount(ids, minlength=len(vocabulary))
        labels.update(label for *_, label in texts)
        languages.update({start + index: name for index, name in elsewhere.items()})
        start = end
    count_faults(path, scan, faults)
    columns = {name: values[:start] for name, values in columns.items()}
    return {"columns": columns, "vocabulary": vocabulary, "labels": labels, "languages": languages}


# ---------------------------------------------------------------------------------------------------------------------
# Figures: pure functions of those arrays


def round_to(number, step):
    """Return the number rounded up to a multiple of step."""
    return -(-int(number) // step) * step


def choose_maximum(lengths, cut_share, step, most=None):
    """Return the smallest multiple of step that cuts at most the share of rows; never more than `most`."""
    kept = np.sort(lengths)[min(len(lengths) - 1, int(np.ceil(len(lengths) * (1 - cut_share))) - 1)]
    return min(max(round_to(kept, step), step), most or sys.maxsize)


def describe_lengths(lengths, candidates):
    """Return mean, percentiles, sum, and what each candidate maximum cuts: rows and tokens."""
    quantiles = {f"p{q}": int(np.percentile(lengths, q, method="inverted_cdf")) for q in (50, 90, 95, 99)}
    cut = [
        {
            "limit": int(limit),
            "rows": int((lengths > limit).sum()),
            "share": float((lengths > limit).mean()),
            "tokens_share": float(np.maximum(lengths - limit, 0).sum() / max(lengths.sum(), 1)),
        }
        for limit in sorted(set(candidates))
    ]
    ends = {"min": int(lengths.min()), "max": int(lengths.max()), "total": int(lengths.sum())}
    return {"mean": float(lengths.mean()), **quantiles, **ends, "cut": cut}


def count_positions(order, lengths, batch_size):
    """Return how many positions batches of rows in this order compute: rows times the longest one, batch by batch."""
    starts = np.arange(0, len(order), batch_size)
    counts = np.diff([*starts, len(order)])
    return sum(int((np.maximum.reduceat(row[order], starts).astype(np.int64) * counts).sum()) for row in lengths)


def order_like_length(lengths, batch_size, dice):
    """Return the order of --train_sampling_strategy group_by_length: shuffled, then sorted in chunks of 50 batches."""
    chunk = batch_size * max(min(len(lengths) // (batch_size * 4), 50), 1)
    order = dice.permutation(len(lengths))
    return order[np.lexsort((-lengths[order], np.arange(len(order)) // chunk))]


def pack_batches(order, lengths, batch_size):
    """Return (positions, packed rows) of batches of these rows, each packed as run_summarization.py packs it."""
    positions = rows = 0
    for start in range(0, len(order), batch_size):
        sizes = np.stack([row[order[start : start + batch_size]] for row in lengths], axis=1)
        packed = pack_examples(sizes)
        positions += sum(len(packed) * max(int(side[row].sum()) for row in packed) for side in sizes.T)
        rows += len(packed)
    return positions, rows


def measure_padding(lengths, batch_size, seed, capacity=None, packs_batches=False):
    """
    Return the positions that each way of batching computes, in all and per real position.

    `lengths` are the rows' lengths as cut, one array for each sequence that is padded by itself; rows are sorted by
    the first. Packing: of all rows into rows of `capacity`, or of each random batch, or none.
    """
    dice, first, real = np.random.default_rng(seed), lengths[0], int(sum(row.sum() for row in lengths))
    order = dice.permutation(len(first))
    positions = {
        "random": count_positions(order, lengths, batch_size),
        "like_length": count_positions(order_like_length(first, batch_size, dice), lengths, batch_size),
    }
    measured = {"batch_size": batch_size, "real": real, "default": "packing" if packs_batches else "random"}
    if packs_batches:  # a sample: how full packed rows are hardly differs from batch to batch
        sample = order[: PACKED_BATCHES * batch_size]
        packed, rows = pack_batches(sample, lengths, batch_size)
        positions["packing"] = round(real * packed / sum(int(row[sample].sum()) for row in lengths))
        measured |= {"rows": len(sample), "packed_rows": rows}
    elif capacity:
        bins = pack_lengths(first.tolist(), capacity)
        packed = np.array([first[chosen].sum() for chosen in bins])
        positions["packing"] = count_positions(dice.permutation(len(bins)), [packed], batch_size)
        measured |= {"rows": len(first), "packed_rows": len(bins)}
    measured["ways"] = {
        name: {"positions": n, "per_real": n / real, "real_share": real / n, "speed": positions["random"] / n}
        for name, n in positions.items()
    }
    return measured


def measure_vocabulary(counts, size, unknown_id, unknown_rows):
    """Return how much of the vocabulary the data uses, in how many tokens lie 99 % of it, and the unknown share."""
    total, falling = int(counts.sum()), np.sort(counts)[::-1]
    unknown = int(counts[unknown_id]) if unknown_id is not None else 0
    return {
        "size": size,
        "used": int((counts > 0).sum()),
        "used_share": float((counts > 0).sum() / size),
        "cover_99": int(np.searchsorted(np.cumsum(falling), 0.99 * total) + 1),
        "tokens": total,
        "unknown": unknown,
        "unknown_share": unknown / max(total, 1),
        "rows_with_unknown": int((unknown_rows > 0).sum()),
        "has_unknown_token": unknown_id is not None,
    }


def find_near_pairs(signatures):
    """Return pairs [n, 2] of rows whose estimated similarity is NEAR_SIMILARITY or more: banded, then compared."""
    keys = np.ascontiguousarray(signatures).view(np.uint64)
    width, count = keys.shape[1] // NUM_BANDS, np.int64(len(keys))
    found = np.empty(0, np.int64)  # a pair is one number, so that a million of them take 8 MB
    for band in tqdm(range(NUM_BANDS), desc="near-duplicates", unit=" bands", leave=False):
        key = keys[:, band * width].copy()
        for column in range(band * width + 1, (band + 1) * width):
            key = key * np.uint64(0x9E3779B97F4A7C15) ^ keys[:, column]
        order = np.argsort(key, kind="stable")
        key = key[order]
        follows = np.flatnonzero(key[1:] == key[:-1]) + 1
        starts = np.arange(len(key))
        starts[follows] = 0
        starts = np.maximum.accumulate(starts)
        # Each row of a bucket against its first and against the one before it, not all against all.
        for other in (order[starts[follows]], order[follows - 1]):
            low, high = np.minimum(other, order[follows]), np.maximum(other, order[follows])
            found = np.union1d(found, low * count + high)
    kept = []
    for chunk in np.array_split(found, len(found) // 50_000 + 1):
        first, second = chunk // count, chunk % count
        near = (signatures[first] == signatures[second]).mean(axis=1) >= NEAR_SIMILARITY
        kept.append(np.stack([first[near], second[near]], axis=1))
    return np.concatenate(kept)


def join_pairs(pairs, count):
    """Return for each row the smallest row that pairs connect it to, over any number of steps."""
    labels = np.arange(count)
    while len(pairs):
        least = labels.copy()
        np.minimum.at(least, pairs[:, 0], labels[pairs[:, 1]])
        np.minimum.at(least, pairs[:, 1], labels[pairs[:, 0]])
        least = least[least]
        if (least == labels).all():
            break
        labels = least
    return labels


def measure_duplicates(train, validation=None):
    """Return (counts of rows one could leave out: exact copies, near ones besides; the overlap), some near pairs."""
    rows, firsts = len(train["row_hash"]), np.unique(train["row_hash"], return_index=True)[1]
    signatures = np.empty((len(firsts) + (len(validation["row_hash"]) if validation else 0), NUM_HASHES), np.uint16)
    np.take(train["signature"], firsts, axis=0, out=signatures[: len(firsts)])
    if validation:
        signatures[len(firsts) :] = validation["signature"]
    pairs = find_near_pairs(signatures)
    pairs_inside = pairs[(pairs < len(firsts)).all(axis=1)]
    near = len(firsts) - len(np.unique(join_pairs(pairs_inside, len(firsts))))
    counts = {"rows": rows, "exact": rows - len(firsts), "near": near}
    for part in ("source", "target"):
        counts[f"same_{part}"] = rows - len(np.unique(train[f"{part}_hash"]))
    counts |= {f"{name}_share": counts[name] / rows for name in ("exact", "near", "same_source", "same_target")}
    if validation:
        same = np.isin(validation["source_hash"], train["source_hash"])
        close = np.zeros(len(same), bool)
        close[pairs[(pairs[:, 0] < len(firsts)) & (pairs[:, 1] >= len(firsts)), 1] - len(firsts)] = True
        close &= ~same
        counts["overlap"] = {"rows": len(same), "same_source": int(same.sum()), "near": int(close.sum())}
        counts["overlap"] |= {"same_source_share": float(same.mean()), "near_share": float(close.mean())}
    return counts, firsts[pairs_inside]


def measure_targets(columns):
    """Return (counts of boilerplate and copied targets, [(index, rows)] of the most frequent targets)."""
    rows = len(columns["folded_hash"])
    _, firsts, counts = np.unique(columns["folded_hash"], return_index=True, return_counts=True)
    limit = max(FREQUENT_ROWS, FREQUENT_SHARE * rows)
    often = [(int(firsts[i]), int(counts[i])) for i in np.argsort(-counts, kind="stable")[:10] if counts[i] >= limit]
    copied = np.bincount(columns["copied"], minlength=4)
    measured = {
        "frequent_limit": int(np.ceil(limit)),
        "frequent_rows": int(counts[counts >= limit].sum()),
        "frequent_share": float(counts[counts >= limit].sum() / rows),
        "equal_source": int(copied[1]),
        "start_source": int(copied[2]),
        "inside_source": int(copied[3]),
        "copied_share": float(copied[1:].sum() / rows),
        "longer_than_source": int((columns["target_tokens"] > columns["source_tokens"]).sum()),
    }
    return measured, often


def choose_shown(columns, tokens, languages, count):
    """Return {title: [(index, what is odd about it)]}: rows to read."""
    words, chars = np.maximum(columns["words"], 1), np.maximum(columns["chars"], 1)
    # A short row is soon extreme, so only rows of some length compete.
    some = columns["chars"] >= min(40, np.median(columns["chars"]))
    scales = {
        "Longest": (tokens, "{:,.0f} tokens", True),
        "Fewest letters": (1 - columns["letters"] / chars, "{:.0%} other characters", some),
        "Most repetitive": (words / np.maximum(columns["distinct_words"], 1), "each word {:.1f} times", some),
        "Most tokens a character": (tokens / chars, "{:.2f} tokens a character", some),
        "Most unknown tokens": (columns["unknown"], "{:,.0f} unknown tokens", columns["unknown"] > 0),
        "Shortest source": (-columns["source_tokens"], "{:,.0f} tokens", True),
    }
    shown = {}
    for title, (scale, words_for_it, among) in scales.items():
        ranked = np.argsort(-np.where(among, scale, -np.inf), kind="stable")[:count]
        kept = [int(index) for index in ranked if np.broadcast_to(among, scale.shape)[index]]
        shown[title] = [(index, words_for_it.format(abs(scale[index]))) for index in kept]
    shown["In another language"] = [(index, name) for index, name in sorted(languages.items())[:count]]
    return {title: rows for title, rows in shown.items() if rows}


# ---------------------------------------------------------------------------------------------------------------------
# From the arrays to measures.json


def collect_lengths(columns, task):
    """Return {part: token lengths of all rows}: what --max_source_length and so on cut."""
    source, target = columns["source_tokens"], columns["target_tokens"]
    if task == "text":
        return {"example": source}
    names = TASK_PARTS[task]
    return dict(zip(names, (source, target, source + target), strict=False))


def choose_maxima(lengths, args, task, positions):
    """Return {part: (flag, maximum)}: the flag's value if it was given, else the recommended one."""
    maxima = {}
    for part in TASK_PARTS[task] if task == "summarization" else ("example",):
        flag, step = (f"max_{part}_length", LENGTH_STEP) if part != "example" else ("max_seq_length", SEQUENCE_STEP)
        best = choose_maximum(lengths[part], args.max_cut_share, step, positions)
        if task == "text":
            best = min(DEFAULT_MAX_SEQ_LENGTH, positions or DEFAULT_MAX_SEQ_LENGTH)
        maxima[part] = (flag, getattr(args, flag) or best)
    return maxima


def find_cut(measures, part):
    """Return what a part's maximum cuts, or None where it has none."""
    limit = measures["maxima"].get(part, (None, None))[1]
    return next((entry for entry in measures["lengths"][part]["cut"] if entry["limit"] == limit), None)


def choose_way(padding):
    """Return the way of batching to recommend: the simplest that a more involved one does not beat by WORTH_IT."""
    ways, best = padding["ways"], padding["default"]
    for way in ways if best == "random" else ():
        best = way if ways[way]["speed"] >= WORTH_IT * ways[best]["speed"] else best
    return best


def recommend(measures, args):
    """Return [{"flag", "value", "why"}] in the order of a command line; value None: a flag without one."""
    flags, task = [], measures["task"]
    if task == "text":
        limit = measures["maxima"]["example"][1]
        rows = -(-measures["lengths"]["example"]["total"] // limit)
        why = f"texts are joined and cut into rows of this length, about {rows:,}: none is lost, none is padded"
        return [{"flag": "--max_seq_length", "value": limit, "why": why}]
    for part, (flag, limit) in measures["maxima"].items():
        entry = find_cut(measures, part)
        cut = f"{entry['rows']:,} {part}s ({entry['share']:.2%})" if entry["rows"] else f"no {part}"
        why = f"cuts {cut}; the longest has {measures['lengths'][part]['max']:,} tokens"
        if limit == measures["max_positions"] and entry["share"] > args.max_cut_share:
            why += "; the model has no more positions"
        flags.append({"flag": f"--{flag}", "value": limit, "why": why})
    if args.source_prefix:
        flags.append({"flag": "--source_prefix", "value": args.source_prefix, "why": "counted in every source here"})
    if measures["template"] not in (None, "chat"):
        why = "lengths here count this one" + ("" if args.prompt_template else "; the tokenizer has none of its own")
        flags.append({"flag": "--prompt_template", "value": measures["template"], "why": why})
    padding = measures["padding"]
    way, ways, size = choose_way(padding), padding["ways"], "the padding was measured at this one"
    fewer = f"{ways[way]['speed']:.2f} times fewer positions than random batches"
    if way == padding["default"] == "packing":
        size += f"; nothing else to set: the script packs its rows, {fewer} that are padded"
    elif way == "packing":
        fewer += f" ({ways['like_length']['speed']:.2f} by like length); a packed row holds "
        fewer += f"{padding['rows'] / padding['packed_rows']:.1f} examples, so divide the batch size by that to keep "
        flags.append({"flag": "--packing", "value": None, "why": f"{fewer}the steps alike"})
    elif way == "like_length":
        fewer += "; T5 and mT5 need it not, their batches are packed" if task == "summarization" else ""
        flags.append({"flag": "--train_sampling_strategy", "value": "group_by_length", "why": fewer})
    flags.append({"flag": "--per_device_train_batch_size", "value": padding["batch_size"], "why": size})
    return flags


def advise(measures, cut_share):
    """Return [sentence]: what to look at in the data before training on it."""
    found, duplicates, parts = [], measures["duplicates"], TASK_PARTS[measures["task"]]
    for part, (flag, limit) in measures["maxima"].items() if measures["task"] != "text" else ():
        entry = find_cut(measures, part)
        if entry["share"] > cut_share:
            room = ", all that the model has room for" if limit == measures["max_positions"] else ""
            found.append(f"--{flag} {limit}{room}, cuts {entry['rows']:,} {part}s ({entry['share']:.1%}).")
    if duplicates["exact"]:
        found.append(f"{duplicates['exact']:,} rows are exact copies of others: they count double. Drop them.")
    if duplicates["near_share"] >= 0.01:
        found.append(f"{duplicates['near']:,} rows nearly repeat another: read the pairs below before dropping any.")
    overlap = duplicates.get("overlap", {"same_source": 0, "near": 0})
    if both := overlap["same_source"] + overlap["near"]:
        said = f"{both:,} validation rows are trained on too ({overlap['near']:,} of them nearly): their scores are"
        found.append(f"{said} too good. Drop them from the training file.")
    if (unknown := measures["vocabulary"]["unknown_share"]) > 0.001:
        said = f"{unknown:.2%} of all tokens are unknown to this tokenizer: the model cannot read or write them. "
        found.append(f"{said}Clean the characters, or take a tokenizer that falls back to bytes.")
    frequent, copied = (measures.get("targets", {}).get(f"{name}_share", 0) for name in ("frequent", "copied"))
    if frequent >= 0.01:
        found.append(f"{frequent:.1%} of the {parts[1]}s are the same few phrases: the model learns those.")
    if copied >= 0.01:
        found.append(f"{copied:.1%} of the {parts[1]}s are copied from the {parts[0]} word for word.")
    if other := measures["language"]["other_rows"]:
        found.append(f"{other:,} rows are not in {measures['language']['main']}.")
    if odd := sum(entry["rows"] for entry in measures["rows"]["train"]["odd"].values()):
        found.append(f"{odd:,} rows cannot be trained on; they are named below.")
    labels = measures["labels"]
    if len(labels) > 1 and labels[0]["rows"] >= 10 * labels[-1]["rows"]:
        found.append(f"the rarest label has {labels[-1]['rows']:,} rows, the most frequent {labels[0]['rows']:,}.")
    return found


def fill_in_rows(measures, train, chosen, path, task):
    """Read the file once more for the texts of the rows that are shown: odd ones, near pairs, frequent targets."""
    (shown, pairs, often), signatures = chosen, train["columns"]["signature"]
    indices = [i for rows in shown.values() for i, _ in rows] + [i for pair in pairs for i in pair]
    places = {int(train["columns"]["ordinal"][i]): i for i in (*indices, *(i for i, _ in often))}
    texts, last = {}, max(places, default=-1)
    examples = tqdm(read_examples(path, task), "fetching rows to show", unit=" rows", unit_scale=True)
    for ordinal, line, _, (*both, label) in itertools.takewhile(lambda row: row[0] <= last, examples):
        if ordinal in places:
            source, target = (text if len(text) <= 600 else f"{text[:400]} […] {text[-200:]}" for text in both)
            texts[places[ordinal]] = {"line": line, "source": source, "target": target, "label": label}
    alike = [f"about {(signatures[a] == signatures[b]).mean():.0%} alike" for a, b in pairs]
    measures["shown"] = {title: [{**texts[i], "what": what} for i, what in rows] for title, rows in shown.items()}
    measures["near_pairs"] = [
        [{**texts[i], "what": what} for i in pair] for pair, what in zip(pairs, alike, strict=True)
    ]
    if "targets" in measures:
        total = measures["rows"]["train"]["measured"]
        frequent = [{"text": texts[i]["target"], "rows": rows, "share": rows / total} for i, rows in often]
        measures["targets"]["frequent"] = frequent


def summarize(measured, scans, args, task, tokenizer, template, language):
    """Return (measures, rows to show) from the arrays of the files; the texts of the rows are not yet filled in."""
    train, validation = measured["train"], measured.get("validation")
    lengths = collect_lengths(train["columns"], task["task"])
    config = read_config(args)
    positions = config.get("max_position_embeddings")
    maxima = choose_maxima(lengths, args, task["task"], positions)
    candidates = [*CUT_CANDIDATES, *(limit for _, limit in maxima.values())]
    duplicates, pairs = measure_duplicates(train["columns"], validation["columns"] if validation else None)
    unknown = tokenizer.unk_token_id
    measures = {
        "task": task["task"],
        "files": {split: str(getattr(args, f"{split}_file")) for split in measured},
        "tokenizer": str(args.tokenizer_name or args.model_name_or_path),
        "template": template,
        "rows": scans,
        "maxima": maxima,
        "max_positions": positions,
        "lengths": {part: describe_lengths(row, candidates) for part, row in lengths.items()},
        "vocabulary": measure_vocabulary(train["vocabulary"], len(tokenizer), unknown, train["columns"]["unknown"]),
        "duplicates": duplicates,
        "language": {
            **{name: language[name] for name in ("main", "sample_rows", "sample")},
            "other_rows": len(train["languages"]),
            "other_share": len(train["languages"]) / scans["train"]["measured"],
            "others": dict(Counter(train["languages"].values()).most_common()),
        },
        "labels": [
            {"label": name, "rows": rows, "share": rows / scans["train"]["measured"]}
            for name, rows in (train["labels"].most_common() if task["label"] else ())
        ],
        "label_column": task["label"],
    }
    often = []
    if task["task"] != "text":
        cut = [np.minimum(lengths[part], limit) for part, (_, limit) in maxima.items()]
        packing = {"capacity": maxima["example"][1]} if "example" in maxima else {}
        packing["packs_batches"] = task["task"] == "summarization" and config.get("model_type") in PACKABLE
        measures["padding"] = measure_padding(cut, args.per_device_train_batch_size, args.seed, **packing)
        measures["targets"], often = measure_targets(train["columns"])
    measures["recommended"] = recommend(measures, args)
    measures["advice"] = advise(measures, args.max_cut_share)
    tokens = sum(list(lengths.values())[-len(maxima) :])
    shown = choose_shown(train["columns"], tokens, train["languages"], args.shown_rows)
    pairs = pairs[np.unique(pairs[:, 0], return_index=True)[1]]  # of one cluster one pair is enough to see
    return measures, lengths, (shown, pairs[: args.shown_rows].tolist(), often)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def format_flags(recommended):
    """Return the recommended flags as one would type them."""
    words = [[f["flag"]] if f["value"] is None else [f["flag"], str(f["value"])] for f in recommended]
    return " \\\n    ".join(map(shlex.join, words))


def render_report(measures, figures):
    """Return the report as one HTML page; the template engine escapes every text of the data."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True).get_template("report.html.jinja")
    table = list(zip(*(entry["cut"] for entry in measures["lengths"].values()), strict=True))
    return template.render(
        m=measures,
        figures={
            name: {theme: base64.b64encode(png).decode() for theme, png in pair.items()}
            for name, pair in figures.items()
        },
        n="{:,}".format,
        p="{:.2%}".format,
        ways=WAYS,
        best=choose_way(measures["padding"]) if "padding" in measures else None,
        parts=TASK_PARTS[measures["task"]],
        cut_table=table[: 1 + sum(any(cell["rows"] for cell in cells) for cells in table)],
        near=NEAR_SIMILARITY,
        language_words=LANGUAGE_WORDS,
        flags=format_flags,
        date=time.strftime("%Y-%m-%d"),
    )


def format_measures(measures):
    """Return the table that ends the program's output."""
    lines = [("", "mean", "median", "95%", "99%", "longest", "cut at", "rows cut")]
    for part, entry in measures["lengths"].items():
        cut = find_cut(measures, part)
        cells = (f"{cut['limit']:,}", f"{cut['share']:.2%}" if measures["task"] != "text" else "") if cut else ()
        numbers = [f"{entry[key]:,}" for key in ("p50", "p95", "p99", "max")]
        lines.append((f"{part} tokens", f"{entry['mean']:.1f}", *numbers, *cells))
    text = [f"{name:<16}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in lines]
    for name, way in measures.get("padding", {"ways": {}})["ways"].items():
        fewer = f", {way['speed']:.2f} times fewer" if name != "random" else ""
        default = ", the default" if name == measures["padding"]["default"] else ""
        text.append(f"{WAYS[name]:<23}{way['per_real']:>5.2f} positions a real one{fewer}{default}")
    duplicates, vocabulary = measures["duplicates"], measures["vocabulary"]
    for name, count, share in (
        ("exact copies", duplicates["exact"], duplicates["exact_share"]),
        ("near copies", duplicates["near"], duplicates["near_share"]),
        ("unknown tokens", vocabulary["unknown"], vocabulary["unknown_share"]),
        ("other languages", measures["language"]["other_rows"], measures["language"]["other_share"]),
    ):
        text.append(f"{name:<16}{count:>9,}{share:>9.2%}")
    if o := duplicates.get("overlap"):
        said = f"{o['same_source']:>9,} of {o['rows']:,} validation rows, and nearly {o['near']:,}"
        text.append(f"trained on      {said}")
    for split, entry in measures["rows"].items():
        for reason, odd in entry["odd"].items():
            named = ", ".join(map(str, odd["lines"])) + (", ..." if odd["rows"] > len(odd["lines"]) else "")
            text.append(f"{split}: {odd['rows']:,} rows left out, {reason}: line {named}")
    text += [f"- {line}" for line in measures["advice"]]
    return "\n".join([*text, "", "Recommended:", f"    {format_flags(measures['recommended'])}"])


# ---------------------------------------------------------------------------------------------------------------------


def write_report(folder, measures, figures):
    """Write report.html, measures.json and the PNGs into a folder."""
    for name, pair in figures.items():
        (folder / f"{name}.png").write_bytes(pair["light"])
    (folder / "measures.json").write_text(json.dumps(measures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(measures, figures), encoding="utf-8")


def main(argv=None):
    # 1. Arguments, heads of the files and the tokenizer: what can be known to be wrong is said before the work.
    args = parse_args(argv)
    inputs = (args.train_file, args.validation_file, args.tokenizer_name or args.model_name_or_path)
    output = Output(args.output_dir, "measure_dataset", describe_command(args, *inputs))
    if output.is_finished():
        return 0
    chosen, problems = choose_tasks(args)
    problems = check_args(args) + problems
    if problems:
        return refuse("measure_dataset.py", problems)
    path, task = chosen["train"]
    try:
        tokenizer, template = load_tokenizer(args, task)

        # 2. Read everything once: broken files end the program before an hour of tokenisation, not after it.
        scans, samples = {}, {}
        for split, source in chosen.items():
            scans[split], samples[split] = scan_file(*source, args.seed)

        # 3. Measure the rows: from here on there are only numbers
        identifier = load_identifier()
        language = learn_language(samples["train"], identifier, args.language)
        measured = {
            split: measure_file(*source, scans[split], tokenizer, args, language, identifier)
            for split, source in chosen.items()
        }
    except (ValueError, OSError) as error:
        return refuse("measure_dataset.py", [str(error)])

    # 4. The figures, and the texts of the rows to show
    measures, lengths, shown = summarize(measured, scans, args, task, tokenizer, template, language)
    fill_in_rows(measures, measured["train"], shown, path, task)

    # 5. Write and report
    figures = draw_figures(measures, lengths, WAYS)
    try:
        output.write(lambda folder: write_report(folder, measures, figures))
    except (ValueError, OSError) as error:
        return refuse("measure_dataset.py", [str(error)])
    print(format_measures(measures))
    print(f"\n{args.output_dir}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
