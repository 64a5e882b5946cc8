# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["transformers>=5.17", "polars>=1.0", "pyarrow", "numpy", "matplotlib", "jinja2", "tqdm", "py3langid"]
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

The file is read three times: to check it, to measure it, and to fetch the rows that are shown. Of a row only numbers
stay in memory: a million reviews took 1.4 GB, and 5 minutes on two cores that had other work too.
"""

import argparse
import base64
import csv
import gzip
import io
import itertools
import json
import math
import os
import random
import shlex
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
import pyarrow.parquet
from tqdm.auto import tqdm

# ---------------------------------------------------------------------------------------------------------------------
# Constants

DATA_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
KEYS_FROM_LINES = 100  # a JSON object may leave a key out, so the columns are those of the first 100 together
# Columns of texts and summaries in well-known datasets, tried in this order when the flags name none.
SUMMARY_COLUMNS = (
    ("review_body", "review_headline"),
    ("text", "title"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
)
TASK_PARTS = {
    "summarization": ("source", "target"),
    "instruction": ("prompt", "answer", "example"),
    "chat": ("prompt", "answer", "example"),
    "text": ("example",),
}
ROWS_AT_A_TIME = 10_000  # rows in memory at a time
NAMED_LINES = 5  # odd rows that are named for each reason; all of them are counted

CUT_CANDIDATES = (32, 64, 128, 256, 512, 1024, 2048)
# Recommended lengths are multiples of these: matrix products come in tiles.
LENGTH_STEP, SEQUENCE_STEP = 8, 64
TEXT_LENGTH = 1024  # rows that plain text is cut into
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

# The prompt that run_clm_instruct.py makes for a tokenizer without a template of its own.
DOLLY_INTRO = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
CONTEXT_MARK = "\n\nInput:\n"

THEMES = {
    "light": {"ink": "#1f2430", "soft": "#6b7280", "grid": "#e5e7eb", "main": "#2563eb", "mark": "#c2410c"},
    "dark": {"ink": "#e5e7eb", "soft": "#9aa3b2", "grid": "#333a46", "main": "#7aa2f7", "mark": "#f0a060"},
}


class RowFault(Exception):
    """Raised with the reason why a row cannot be measured; rows are counted by it."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--train_file", required=True, help=f"Training data: {', '.join(DATA_ENDINGS)}; the text ones also .gz.")
    add("--validation_file", default=None, help="Validation data; its overlap with the training data is measured.")
    add("--output_dir", required=True, help="Folder for report.html, measures.json, PNGs; must be absent or empty.")
    add("--model_name_or_path", default=None, help="Model whose tokenizer counts the tokens: a folder or hub name.")
    add("--tokenizer_name", default=None, help="Tokenizer, if not the model's own.")
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
    folder = Path(args.output_dir)
    nearest = nearest_folder(folder)
    if not nearest.is_dir():
        problems.append(f"--output_dir {folder}: {nearest} is a file, not a folder; name another --output_dir")
    elif not os.access(nearest, os.W_OK):
        problems.append(f"--output_dir {folder}: {nearest} may not be written to; name another --output_dir")
    elif nearest == folder and any(folder.iterdir()):
        problems.append(f"--output_dir {folder}: not empty, nothing is overwritten; empty it or name another")
    return problems


def nearest_folder(path):
    """Return the path itself if it exists, else the nearest of its parents that does."""
    return next((parent for parent in (path, *path.parents) if os.path.lexists(parent)), Path("."))


def load_fast_tokenizer(args):
    """Return the tokenizer; ValueError if there is none."""
    from transformers import AutoTokenizer

    name = args.tokenizer_name or args.model_name_or_path
    flag = "--tokenizer_name" if args.tokenizer_name else "--model_name_or_path"
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"{flag} {name}: no tokenizer could be loaded ({str(error).splitlines()[0]})") from error


def read_config(args):
    """Return the model's configuration as a dict; an empty one if no model is named or it has none."""
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(args.model_name_or_path)[0] if args.model_name_or_path else {}
    except OSError:
        return {}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def ending(name):
    """Return a file name's ending in lower case, a final .gz left out: 'a/Train.CSV.gz' gives '.csv'."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_lines(path):
    """Yield the lines of a UTF-8 file, gzipped or not, line ends kept. ValueError names the file and the line."""
    opener = gzip.open if str(path).lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read after line {number} ({error})") from error


def parse_json(text, where):
    """Return the value of a JSON text; ValueError says where it is broken."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error


def read_tsv(path):
    """Yield (line number, cells) of a tab-separated file, header first. No quoting: a quote is a character."""
    for number, line in enumerate(read_lines(path), start=1):
        line = line.rstrip("\r\n")
        if line:
            yield number, line.split("\t")


def read_csv(path):
    """Yield (number of the record's first line, cells) of a CSV file, header first; a cell may hold line ends."""
    # A review longer than Python's 131,072 characters a field is still a review.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(read_lines(path), strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:
                yield start, cells
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: line {start}: the record that starts here is not CSV ({error}); mend it") from error


def read_jsonl(path):
    """Yield (line number, object) of a file with one JSON object a line; blank lines are skipped."""
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        row = parse_json(line, f"{path}: line {number}")
        if not isinstance(row, dict):
            raise ValueError(f"{path}: line {number}: not a JSON object but {type(row).__name__}; one object a line")
        yield number, row


def read_header(flag, path):
    """Return the names of a file's columns; ValueError if it holds none or cannot be read."""
    kind = ending(path)
    if kind not in DATA_ENDINGS or path.lower().endswith(".parquet.gz"):
        raise ValueError(
            f"--{flag} {path}: unknown ending; known are {', '.join(DATA_ENDINGS)} (the text ones .gz too)"
        )
    if not Path(path).is_file():
        raise ValueError(f"--{flag} {path}: {'a folder; name a file' if Path(path).exists() else 'no such file'}")
    if kind == ".parquet":
        try:
            columns = pyarrow.parquet.read_schema(path).names
        except Exception as error:  # pyarrow raises several kinds
            raise ValueError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error
    elif kind == ".jsonl":
        columns = list(
            dict.fromkeys(key for _, row in itertools.islice(read_jsonl(path), KEYS_FROM_LINES) for key in row)
        )
    else:
        columns = next(read_tsv(path) if kind == ".tsv" else read_csv(path), (1, []))[1]
    if not columns:
        raise ValueError(f"--{flag} {path}: the file is empty; leave it out or get it again")
    return columns


def choose_task(path, columns, args):
    """Return {"task", "columns", "label"}: what the rows are, which columns hold it, and the label's or None."""
    listed = f"it has {', '.join(columns)}"
    twice = [name for name, count in Counter(columns).items() if count > 1]
    if twice:
        raise ValueError(f"{path}: the header names {', '.join(twice)} more than once; rename one")
    asked = {f: getattr(args, f) for f in ("text_column", "summary_column", "label_column") if getattr(args, f)}
    missing = [f"--{flag} {name}" for flag, name in asked.items() if name not in columns]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: no such column in {path}; {listed}")
    label = args.label_column or next((name for name in ("category", "label") if name in columns), None)
    if args.summary_column and not args.text_column:
        raise ValueError(f"--summary_column {args.summary_column}: name the texts' column too, by --text_column")
    known = next((list(names) for names in SUMMARY_COLUMNS if set(names) <= set(columns)), None)
    if args.text_column:
        names = [args.text_column] + ([args.summary_column] if args.summary_column else [])
        task = "summarization" if args.summary_column else "text"
    elif {"instruction", "response"} <= set(columns):
        task, names = "instruction", [name for name in ("instruction", "context", "response") if name in columns]
    elif "messages" in columns:
        task, names = "chat", ["messages"]
    elif known:
        task, names = "summarization", known
    elif "text" in columns:
        task, names = "text", ["text"]
    else:
        raise ValueError(
            f"{path}: neither instructions (instruction, response), chats (messages) nor known texts and summaries; "
            f"{listed}. Name the columns by --text_column and --summary_column, or run prepare_instruct.py first"
        )
    return {"task": task, "columns": names, "label": label}


def choose_tasks(args):
    """Return ({split: (path, task)}, problems); only the head of a file is read."""
    chosen, problems = {}, []
    for split in ("train", "validation"):
        path = getattr(args, f"{split}_file")
        if path is None:
            continue
        try:
            chosen[split] = (path, choose_task(path, read_header(f"{split}_file", path), args))
        except ValueError as error:
            problems.append(str(error))
    if len({task["task"] for _, task in chosen.values()}) > 1:
        kinds = " and ".join(f"{path} holds {task['task']}" for path, task in chosen.values())
        problems.append(f"--train_file and --validation_file: {kinds}; give two files of one kind")
    return chosen, problems


def read_dicts(path, columns):
    """Yield (line or row number, {column: value}) of a file; in place of a row that cannot be parsed, why not."""
    kind = ending(path)
    if kind == ".parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(ROWS_AT_A_TIME, columns=columns)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    elif kind == ".jsonl":
        yield from read_jsonl(path)
    else:
        reader = read_tsv(path) if kind == ".tsv" else read_csv(path)
        header = next(reader)[1]
        places = {name: header.index(name) for name in columns}
        for number, cells in reader:
            if len(cells) == len(header):
                yield number, {name: cells[place] for name, place in places.items()}
            else:
                yield number, "another number of fields than the header"


def check_text(value, name):
    """Return a text without white space at its ends; RowFault if it is none or empty."""
    if value is None:
        raise RowFault(f"{name} is null or absent")
    if not isinstance(value, str):
        raise RowFault(f"{name} is {type(value).__name__}, not text")
    text = value.strip()
    if not text:
        raise RowFault(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowFault(f"{name} holds half of a surrogate pair") from None
    return text


def read_chat(messages):
    """Return (everything but the answers, the answers, number of answers) of a list of turns."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise RowFault("messages is not a list of turns")
    turns = [(turn.get("role"), check_text(turn.get("content"), f"a turn of {turn.get('role')}")) for turn in messages]
    answers = [text for role, text in turns if role == "assistant"]
    if not answers:
        raise RowFault("no answer in messages")
    return "\n".join(text for role, text in turns if role != "assistant"), "\n".join(answers), len(answers)


def to_example(row, task):
    """Return (source, target, number of answers, label) of a row; RowFault says why there is none."""
    if isinstance(row, str):
        raise RowFault(row)
    label = str(row.get(task["label"])).strip() if row.get(task["label"]) is not None else None
    if task["task"] == "chat":
        return (*read_chat(row.get("messages")), label)
    names = task["columns"]
    source = check_text(row.get(names[0]), names[0])
    if len(names) == 1:
        return source, "", 0, label
    context = row.get(names[1]) if len(names) == 3 else None
    if context is not None and str(context).strip():
        source = f"{source}{CONTEXT_MARK}{check_text(context, names[1])}"
    return source, check_text(row.get(names[-1]), names[-1]), 1, label


def read_examples(path, task, faults=None):
    """Yield (ordinal from 0, line, (source, target, answers, label)); `faults` gains {reason: [lines]} of the rest."""
    names = task["columns"] + ([task["label"]] if task["label"] else [])
    for ordinal, (line, row) in enumerate(read_dicts(path, list(dict.fromkeys(names)))):
        try:
            yield ordinal, line, to_example(row, task)
        except RowFault as fault:
            if faults is not None:
                faults.setdefault(str(fault), []).append(line)


def scan_file(path, task, seed):
    """Return ({"read", "measured", "odd"}, sample): a first pass that finds what is broken, and draws rows fairly."""
    dice, sample, faults, measured = random.Random(seed), [], {}, 0
    examples = read_examples(path, task, faults)
    for measured, (_, _, example) in enumerate(tqdm(examples, f"checking {path}", unit=" rows", unit_scale=True), 1):
        if len(sample) < LANGUAGE_SAMPLE:
            sample.append(example)
        elif (place := dice.randrange(measured)) < LANGUAGE_SAMPLE:
            sample[place] = example
    odd = {reason: {"rows": len(lines), "lines": lines[:NAMED_LINES]} for reason, lines in sorted(faults.items())}
    read = measured + sum(entry["rows"] for entry in odd.values())
    if not measured:
        reasons = "; ".join(f"{reason} ({entry['rows']} rows)" for reason, entry in odd.items()) or "no rows"
        raise ValueError(f"{path}: no row can be measured: {reasons}")
    return {"read": read, "measured": measured, "odd": odd}, sample


# ---------------------------------------------------------------------------------------------------------------------
# Measuring rows: a batch of texts becomes arrays of numbers


def count_tokens(tokenizer, texts, special):
    """Return (all token ids one after the other, how many each text has)."""
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        rows = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=special)]
    else:
        rows = tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
    lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int32, lengths.sum()), lengths


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
    texts = [f"{source} {target}" for source, target, _, _ in sample]
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


def measure_texts(examples, tokenizer, args, task, language, identifier):
    """Return ({name: array with a number a row}, all token ids, {index: language}) of a batch of examples."""
    sources, targets, answers, _ = (list(column) for column in zip(*examples, strict=True))
    special = task == "summarization"
    source_ids, source_lengths = count_tokens(tokenizer, [args.source_prefix + text for text in sources], special)
    target_ids, target_lengths = count_tokens(tokenizer, targets, special and "target" in TASK_PARTS[task])
    both = [f"{source}\n{target}" for source, target in zip(sources, targets, strict=True)]
    words, word_lengths, distinct = hash_words(both)
    table = pl.DataFrame({"source": sources, "target": targets, "both": both})
    unknown = -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id
    columns = {
        "source_tokens": source_lengths.astype(np.int32),
        "target_tokens": target_lengths.astype(np.int32),
        "answers": np.array(answers, np.int32),
        "unknown": sum_rows(source_ids == unknown, source_lengths) + sum_rows(target_ids == unknown, target_lengths),
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
    elsewhere = find_languages(both, words, word_lengths, language, identifier)
    return columns, np.concatenate([source_ids, target_ids]), elsewhere


def measure_file(path, task, rows, tokenizer, args, language, identifier):
    """Return {"columns", "vocabulary", "labels", "languages"} of a file, read in batches."""
    examples, labels, languages, start = read_examples(path, task), Counter(), {}, 0
    # As long as the largest token id: where ids are left out that is more than there are tokens.
    columns, vocabulary = {}, np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    with tqdm(total=rows, desc=f"measuring {path}", unit=" rows", unit_scale=True) as bar:
        while batch := list(itertools.islice(examples, ROWS_AT_A_TIME)):
            texts = [example for _, _, example in batch]
            measured, ids, elsewhere = measure_texts(texts, tokenizer, args, task["task"], language, identifier)
            measured["ordinal"] = np.array([ordinal for ordinal, _, _ in batch])
            for name, values in measured.items():
                if name not in columns:  # at their full size at once: joining batches at the end would take twice that
                    columns[name] = np.empty((rows, *values.shape[1:]), values.dtype)
                columns[name][start : start + len(batch)] = values
            vocabulary += np.bincount(ids, minlength=len(vocabulary))
            labels.update(label for _, _, _, label in texts)
            languages.update({start + index: name for index, name in elsewhere.items()})
            start += len(batch)
            bar.update(len(batch))
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


def count_template(tokenizer, task):
    """Return (tokens that the prompt template adds to a row, to each of its answers, whose template)."""
    if task not in ("instruction", "chat"):
        return (1 if task == "text" else 0), 0, None
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    own = sum(len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in ("one", "two"))
    sizes = []
    for rounds in (1, 2):
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(turns * rounds, tokenize=False)
        else:
            text = DOLLY_INTRO + "\n\n### Instruction:\none\n\n### Response:\ntwo" * rounds
        size = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        sizes.append(size - rounds * own + (0 if tokenizer.chat_template else 1 + rounds))  # BOS, and an EOS an answer
    return 2 * sizes[0] - sizes[1], sizes[1] - sizes[0], "the tokenizer's own" if tokenizer.chat_template else "dolly"


def collect_lengths(columns, task, template):
    """Return {part: token lengths of all rows}: what --max_source_length and so on cut."""
    source, target = columns["source_tokens"], columns["target_tokens"]
    if task == "summarization":
        return {"source": source, "target": target}
    example = source + target + template[0] + template[1] * columns["answers"]
    return {"prompt": source, "answer": target, "example": example} if task != "text" else {"example": example}


def choose_maxima(lengths, args, task, positions):
    """Return {part: (flag, maximum)}: the flag's value if it was given, else the recommended one."""
    maxima = {}
    for part in TASK_PARTS[task] if task == "summarization" else ("example",):
        flag, step = (f"max_{part}_length", LENGTH_STEP) if part != "example" else ("max_seq_length", SEQUENCE_STEP)
        best = choose_maximum(lengths[part], args.max_cut_share, step, positions)
        if task == "text":
            best = min(TEXT_LENGTH, positions or TEXT_LENGTH)  # the training script's own default
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


def recommend(measures, args, tokenizer):
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
    if task in ("instruction", "chat") and not tokenizer.chat_template:
        why = "the tokenizer has no chat template of its own; lengths here count this one"
        flags.append({"flag": "--prompt_template", "value": "dolly", "why": why})
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
    for ordinal, line, (*both, _, label) in itertools.takewhile(lambda row: row[0] <= last, examples):
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


def summarize(measured, scans, args, task, tokenizer, language):
    """Return (measures, rows to show) from the arrays of the files; the texts of the rows are not yet filled in."""
    train, validation = measured["train"], measured.get("validation")
    template = count_template(tokenizer, task["task"])
    lengths = collect_lengths(train["columns"], task["task"], template)
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
        "template": dict(zip(("row", "answer", "name"), template, strict=True)),
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
    measures["recommended"] = recommend(measures, args, tokenizer)
    measures["advice"] = advise(measures, args.max_cut_share)
    tokens = sum(list(lengths.values())[-len(maxima) :])
    shown = choose_shown(train["columns"], tokens, train["languages"], args.shown_rows)
    pairs = pairs[np.unique(pairs[:, 0], return_index=True)[1]]  # of one cluster one pair is enough to see
    return measures, lengths, (shown, pairs[: args.shown_rows].tolist(), often)


# ---------------------------------------------------------------------------------------------------------------------
# The report


def new_figure(colors, across, up="", height=2.6):
    """Return (figure, axes) in a theme's colours with words at the axes; transparent: the page shows through."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    figure.patch.set_alpha(0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colors["soft"])
    axes.tick_params(colors=colors["soft"], length=0, labelsize=9)
    axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(across, color=colors["ink"], fontsize=9)
    axes.set_ylabel(up, color=colors["ink"], fontsize=9)
    return figure, axes


def draw_lengths(colors, lengths, part, limit):
    """Return a histogram of token lengths with the maximum marked; the longest half percent lies beyond its edge."""
    figure, axes = new_figure(colors, f"tokens of the {part}", "rows")
    edge = max(int(np.percentile(lengths, 99.5)), limit or 0, 1) * 1.03
    step = max(round_to(edge / 60, 1), 1)
    bins = np.arange(0, edge + step, step)
    heights, _, _ = axes.hist(np.minimum(lengths, edge), bins, color=colors["main"], rwidth=0.9)
    if lengths.max() > edge:
        top = heights[-1] + 0.02 * axes.get_ylim()[1]
        axes.text(edge + step, top, "longer", color=colors["soft"], ha="right", va="bottom", fontsize=8)
    if limit:
        axes.axvline(limit, color=colors["mark"], linewidth=1.6)
        label = f"maximum {limit:,} "
        axes.text(limit, axes.get_ylim()[1] * 0.98, label, color=colors["mark"], ha="right", va="top", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlim(0, edge + step)
    return figure


def draw_cut(colors, lengths, maxima):
    """Return the share of rows that is cut at each possible maximum, a line for each part."""
    figure, axes = new_figure(colors, "maximum length in tokens (the dot: the one recommended or given)", "rows cut")
    shades = [colors["main"], colors["mark"], colors["soft"]]
    for (part, row), shade in zip(lengths.items(), shades, strict=False):
        limits = np.unique(np.geomspace(4, max(int(row.max()), 8), 200).astype(int))
        share = 1 - np.searchsorted(np.sort(row), limits, side="right") / len(row)
        axes.plot(limits, share, color=shade, linewidth=2, label=part)
        if part in maxima:
            axes.plot(maxima[part][1], (row > maxima[part][1]).mean(), "o", color=shade, markersize=6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.legend(frameon=False, labelcolor=colors["ink"], fontsize=9)
    return figure


def draw_bars(colors, names, values, texts, label):
    """Return horizontal bars, the first on top, each with its value written at its end."""
    figure, axes = new_figure(colors, label, height=0.75 + 0.32 * len(names))
    axes.barh(range(len(names)), values, color=colors["main"], height=0.62)
    for place, (value, text) in enumerate(zip(values, texts, strict=True)):
        axes.text(value, place, f"  {text}", va="center", fontsize=9, color=colors["ink"])
    axes.set_yticks(range(len(names)), names, fontsize=9, color=colors["ink"])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlim(0, max(values) * 1.22)
    axes.xaxis.set_major_formatter("{x:,.10g}")
    return figure


def draw_figures(measures, lengths):
    """Return {name: {theme: PNG bytes}} of every figure of the report."""
    maxima, drawings = measures["maxima"], {}
    for part, row in lengths.items():
        drawings[f"{part}_lengths"] = (draw_lengths, row, part, maxima.get(part, (None, None))[1])
    drawings["cut"] = (draw_cut, lengths, maxima)
    if "padding" in measures:
        values = {WAYS[name]: way["per_real"] for name, way in measures["padding"]["ways"].items()}
        texts = [f"{value:.2f}" for value in values.values()]
        drawings["padding"] = (draw_bars, list(values), list(values.values()), texts, "positions for each real one")
    if measures["labels"]:
        top = measures["labels"][:15]
        names = ["(none)" if entry["label"] is None else entry["label"][:30] for entry in top]
        texts = [f"{entry['rows']:,} ({entry['share']:.1%})" for entry in top]
        drawings["labels"] = (draw_bars, names, [entry["rows"] for entry in top], texts, "rows")
    figures = {}
    for name, (draw, *inputs) in drawings.items():
        figures[name] = {}
        for theme, colors in THEMES.items():
            stream = io.BytesIO()
            draw(colors, *inputs).savefig(stream, format="png")
            figures[name][theme] = stream.getvalue()
    return figures


def format_flags(recommended):
    """Return the recommended flags as one would type them."""
    words = [[f["flag"]] if f["value"] is None else [f["flag"], str(f["value"])] for f in recommended]
    return " \\\n    ".join(map(shlex.join, words))


def make_verdict(measures):
    """Return [(number, what it is, "good" | "look" | "")]: the figures at the top of the report."""
    duplicates, rows = measures["duplicates"], measures["rows"]["train"]
    cards = [(f"{rows['measured']:,}", "training rows", "")]
    for part in TASK_PARTS[measures["task"]][-2:]:
        entry = measures["lengths"][part]
        cards.append((f"{entry['p50']:,} / {entry['p99']:,}", f"tokens of the {part}: median / 99% have at most", ""))
    if "padding" in measures:
        ways, best = measures["padding"]["ways"], choose_way(measures["padding"])
        default = ", the default" if best == measures["padding"]["default"] else ""
        cards.append((f"{ways['random']['real_share']:.0%}", "of padded random batches is text", ""))
        if best != "random":
            cards.append((f"{ways[best]['speed']:.2f}×", f"fewer positions with {WAYS[best]}{default}", "good"))
    near = duplicates["exact_share"] + duplicates["near_share"]
    cards.append((f"{near:.1%}", "exact or near duplicates", "look" if near >= 0.01 else "good"))
    if "overlap" in duplicates:
        both = duplicates["overlap"]["same_source_share"] + duplicates["overlap"]["near_share"]
        cards.append((f"{both:.1%}", "of validation is trained on", "look" if both >= 0.01 else "good"))
    unknown = measures["vocabulary"]["unknown_share"]
    cards.append((f"{unknown:.2%}", "unknown tokens", "look" if unknown > 0.001 else "good"))
    return cards


TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ m.files.train }}: dataset report</title>
<style>
:root { color-scheme: light dark; --page: #fbfbfd; --card: #fff; --ink: #1f2430; --soft: #626977; --line: #e3e6ec;
  --main: #2563eb; --good: #15803d; --look: #c2410c; --code: #f1f3f8; }
@media (prefers-color-scheme: dark) { :root { --page: #14171d; --card: #1b1f27; --ink: #e5e7eb; --soft: #9aa3b2;
  --line: #2e3440; --main: #7aa2f7; --good: #6fcf97; --look: #f0a060; --code: #11141a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 920px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 4px; letter-spacing: -.01em; }
h3 { font-size: 16px; margin: 28px 0 4px; }
p { margin: 6px 0 12px; } .soft { color: var(--soft); font-size: 14px; } code { font: 13px ui-monospace, monospace; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 24px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 25px; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card.good b { color: var(--good); } .card.look b { color: var(--look); }
.card span { color: var(--soft); font-size: 13.5px; line-height: 1.35; display: block; }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: 10px 0 16px; font-size: 14.5px; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; font-size: 13px; } td.n, th.n { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; } td.pick { font-weight: 600; color: var(--main); }
td.t { overflow-wrap: anywhere; } td code { white-space: nowrap; }
  picture img { width: 100%; height: auto; display: block; margin: 8px 0; }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 13.5px/1.6 ui-monospace, "DejaVu Sans Mono", monospace; }
ul { padding-left: 20px; margin: 6px 0; } li { margin: 5px 0; }
.row { border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: 10px 14px; margin: 8px 0;
  font-size: 14px; } .row p { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.row .soft { font-size: 13px; } .row .target { border-left: 3px solid var(--main); padding-left: 10px; }
details summary { cursor: pointer; margin: 10px 0; font-weight: 600; }
</style></head><body><main>
{%- macro figure(name, alt) %}<picture>
<source media="(prefers-color-scheme: dark)" srcset="data:image/png;base64,{{ figures[name].dark }}">
<img alt="{{ alt }}" src="data:image/png;base64,{{ figures[name].light }}"></picture>{% endmacro %}
{%- macro example(row) %}<div class="row"><div class="soft">line {{ row.line }}{% if row.what %} · {{ row.what }}
{%- endif %}{% if row.label %} · {{ row.label }}{% endif %}</div><p>{{ row.source }}</p>
{%- if row.target %}<p class="target">{{ row.target }}</p>{% endif %}</div>{% endmacro %}
{%- macro count(what, rows, share, digits=2) %}<tr><td class="t">{{ what }}<td class="n">{{ n(rows) }}
<td class="n">{% if share is not none %}{{ ("{:." ~ digits ~ "%}").format(share) }}{% endif %}</tr>{% endmacro %}
<h1>{{ m.files.train.split("/")[-2:] | join("/") }}</h1>
<p class="soft">{{ m.task }} · tokens of <code>{{ m.tokenizer }}</code>
{%- if m.template.name %} · lengths of examples count the prompt template ({{ m.template.name }}: {{ m.template.row }}
tokens a row, {{ m.template.answer }} an answer){% endif %} · measured {{ date }}</p>
<div class="cards">{% for number, what, kind in verdict %}<div class="card {{ kind }}"><b>{{ number }}</b>
<span>{{ what }}</span></div>{% endfor %}</div>
{% if m.advice %}<h3>Look at this before training</h3>
<ul>{% for line in m.advice %}<li>{{ line }}</li>{% endfor %}</ul>
{% else %}<p>Nothing in the data stands out as a fault.</p>{% endif %}

<h2>Rows</h2>
<div class="wide"><table><tr><th>file<th class="n">read<th class="n">measured<th class="n">odd</tr>
{% for split, entry in m.rows.items() %}<tr><td class="t">{{ m.files[split] }}<td class="n">{{ n(entry.read) }}
<td class="n">{{ n(entry.measured) }}<td class="n">{{ n(entry.read - entry.measured) }}</tr>{% endfor %}</table></div>
{% for split, entry in m.rows.items() %}{% for reason, odd in entry.odd.items() %}
<p class="soft">{{ split }}: {{ n(odd.rows) }} × {{ reason }}, on line{{ "s" if odd.rows > 1 }}
{{ odd.lines | join(", ") }}{% if odd.rows > odd.lines | length %}, …{% endif %}; left out of all figures.</p>
{% endfor %}{% endfor %}

<h2>Token lengths</h2>
<div class="wide"><table><tr><th>part<th class="n">mean<th class="n">median<th class="n">90%<th class="n">95%
<th class="n">99%<th class="n">longest<th class="n">tokens in all</tr>
{% for part, l in m.lengths.items() %}<tr><td>{{ part }}<td class="n">{{ "%.1f" | format(l.mean) }}
{% for key in ("p50", "p90", "p95", "p99", "max", "total") %}<td class="n">{{ n(l[key]) }}{% endfor %}</tr>{% endfor %}
</table></div>
{% for part in m.lengths %}{{ figure(part ~ "_lengths", "Histogram of the " ~ part ~ "'s tokens") }}{% endfor %}
<h3>What each maximum cuts</h3>
{{ figure("cut", "Share of rows cut at each maximum") }}
{% if m.task == "text" %}<p>Plain text is not cut off but cut up: the script joins the texts and makes rows of the
maximum, so that these are the texts longer than a row.</p>{% endif %}
<div class="wide"><table><tr><th class="n">at most{% for part in m.lengths %}<th class="n">{{ part }}s cut
<th class="n">share{% if part in m.maxima %}<th class="n">of their tokens{% endif %}{% endfor %}</tr>
{% for cells in cut_table %}<tr><td class="n">{{ n(cells[0].limit) }}{% for part in m.lengths %}
{% set c = cells[loop.index0] %}{% set pick = " pick" if part in m.maxima and m.maxima[part][1] == c.limit else "" %}
<td class="n{{ pick }}">{{ n(c.rows) }}<td class="n{{ pick }}">{{ p(c.share) }}{% if part in m.maxima %}
<td class="n{{ pick }}">{{ p(c.tokens_share) }}{% endif %}{% endfor %}</tr>{% endfor %}</table></div>
<p class="soft">In colour: {% for flag, limit in m.maxima.values() %}--{{ flag }} {{ limit }}
{%- if not loop.last %} and {% endif %}{% endfor %}.</p>

{% if m.padding %}<h2>Padding</h2>
<p>A batch is as long as its longest row; what is shorter is filled up and computed all the same. In batches of
{{ m.padding.batch_size }} the {{ n(m.padding.real) }} real positions of an epoch become:</p>
{{ figure("padding", "Positions computed for each real position") }}
<div class="wide"><table><tr><th>way<th class="n">positions<th class="n">a real one<th class="n">real
<th class="n">fewer</tr>{% for name, way in m.padding.ways.items() %}<tr><td>{{ ways[name] }}
<td class="n">{{ n(way.positions) }}<td class="n">{{ "%.2f" | format(way.per_real) }}
<td class="n">{{ p(way.real_share) }}<td class="n">{{ "%.2f" | format(way.speed) }}×</tr>{% endfor %}</table></div>
<p class="soft">Fewer: times fewer positions than random batches, near to the gain in time where a step is all
computation. {% if m.padding.default == "packing" %}Packing is what the script does by itself for T5 and mT5: the rows
of each random batch stand end to end. In a sample of the batches {{ n(m.padding.rows) }} rows became
{{ n(m.padding.packed_rows) }}; --no_packing pads them.{% elif m.padding.rows %}Packing puts {{ n(m.padding.rows) }}
rows into {{ n(m.padding.packed_rows) }}.{% else %}Only T5 and mT5 are packed by the script.{% endif %}</p>
{% endif %}

<h2>Vocabulary</h2>
<div class="wide"><table>
{{ count("tokens in the training rows, without templates", m.vocabulary.tokens, none) }}
{{ count("tokens in the vocabulary", m.vocabulary["size"], none) }}
{{ count("of these used", m.vocabulary.used, m.vocabulary.used_share) }}
{{ count("so many make up 99% of the text", m.vocabulary.cover_99, none) }}
{{ count("unknown tokens" ~ ("" if m.vocabulary.has_unknown_token else " (the tokenizer has none)"),
         m.vocabulary.unknown, m.vocabulary.unknown_share, 3) }}
{{ count("rows with one", m.vocabulary.rows_with_unknown, m.vocabulary.rows_with_unknown / m.rows.train.measured) }}
</table></div>

<h2>Duplicates</h2>
<div class="wide"><table><tr><th>rows one could leave out<th class="n">rows<th class="n">share</tr>
{% with d = m.duplicates, o = m.duplicates.overlap %}
{{ count("exact copies of another row", d.exact, d.exact_share) }}
{{ count("near-duplicates besides these", d.near, d.near_share) }}
{{ count("the same " ~ parts[0] ~ " as another row", d.same_source, d.same_source_share) }}
{% if m.targets %}{{ count("the same " ~ parts[1] ~ " as another row", d.same_target, d.same_target_share) }}
{% endif %}
{% if o %}{{ count("validation rows whose " ~ parts[0] ~ " is trained on", o.same_source, o.same_source_share) }}
{{ count("validation rows that nearly are trained on", o.near, o.near_share) }}{% endif %}{% endwith %}</table></div>
<p class="soft">Near: {{ "%.0f" | format(near * 100) }}% or more of the runs of three words in common, by MinHash,
which finds about 95% of such pairs; case and punctuation do not count.
{%- if m.task in ("instruction", "chat") %} Two questions on one long text are such a pair too.{% endif %}</p>
{% if m.near_pairs %}<details><summary>{{ m.near_pairs | length }} near-duplicate pairs</summary>
{% for a, b in m.near_pairs %}<h3>Pair {{ loop.index }}</h3>{{ example(a) }}{{ example(b) }}{% endfor %}</details>
{% endif %}

{% if m.targets %}<h2>Boilerplate</h2>
<div class="wide"><table><tr><th>{{ parts[1] }}s<th class="n">rows<th class="n">share</tr>
{{ count("the same words in {:,} rows or more, whatever their case".format(m.targets.frequent_limit),
         m.targets.frequent_rows, m.targets.frequent_share) }}
{% for key, words in copied %}
{{ count(words.format(parts[0]), m.targets[key], m.targets[key] / m.rows.train.measured) }}{% endfor %}</table></div>
{% if m.targets.frequent %}<div class="wide"><table><tr><th>most frequent {{ parts[1] }}s<th class="n">rows
<th class="n">share</tr>{% for f in m.targets.frequent %}{{ count(f.text, f.rows, f.share) }}{% endfor %}</table></div>
{% endif %}{% endif %}

<h2>Language</h2>
<p>{% if m.language.main %}Most rows are in <b>{{ m.language.main }}</b>. {{ n(m.language.other_rows) }}
({{ p(m.language.other_share) }}) are surely in another language
{%- if m.language.others %}: {% for name, rows in m.language.others.items() %}{{ name }} {{ n(rows) }}
{%- if not loop.last %}, {% endif %}{% endfor %}{% endif %}.{% else %}No language could be told.{% endif %}</p>
<p class="soft">Rows of {{ language_words }} words or more that hold few of the commonest words of
{{ n(m.language.sample_rows) }} rows drawn at random are shown to a language identifier; it counts what it is 90% sure
of. Shorter rows are not judged.</p>

{% if m.labels %}<h2>Balance of {{ m.label_column }}</h2>{{ figure("labels", "Rows of each label") }}
<div class="wide"><table><tr><th>{{ m.label_column }}<th class="n">rows<th class="n">share</tr>
{% for l in m.labels[:40] %}{{ count("(none)" if l.label is none else l.label, l.rows, l.share) }}{% endfor %}
</table></div>
{% if m.labels | length > 40 %}<p class="soft">and {{ n(m.labels | length - 40) }} more labels</p>{% endif %}
{% endif %}

<h2>Rows to read</h2>{% for title, rows in m.shown.items() %}<details{% if loop.first %} open{% endif %}>
<summary>{{ title }}</summary>{% for row in rows %}{{ example(row) }}{% endfor %}</details>{% endfor %}

<h2>Recommended flags</h2><pre>{{ script }} \\
    {{ flags(m.recommended) }}</pre>
<div class="wide"><table><tr><th>flag<th>why</tr>{% for f in m.recommended %}<tr><td><code>{{ flags([f]) }}</code>
<td>{{ f.why }}</tr>{% endfor %}</table></div>
</main></body></html>
"""

COPIED = (
    ("equal_source", "equal to the {}"),
    ("start_source", "the words the {} starts with"),
    ("inside_source", "elsewhere in the {}, word for word"),
    ("longer_than_source", "longer than the {}, in tokens"),
)


def render_report(measures, figures):
    """Return the report as one HTML page; the template engine escapes every text of the data."""
    environment, task = jinja2.Environment(autoescape=True, trim_blocks=True), measures["task"]
    table = list(zip(*(entry["cut"] for entry in measures["lengths"].values()), strict=True))
    return environment.from_string(TEMPLATE).render(
        m=measures,
        figures={
            name: {theme: base64.b64encode(png).decode() for theme, png in pair.items()}
            for name, pair in figures.items()
        },
        verdict=make_verdict(measures),
        n="{:,}".format,
        p="{:.2%}".format,
        ways=WAYS,
        parts=TASK_PARTS[task],
        cut_table=table[: 1 + sum(any(cell["rows"] for cell in cells) for cells in table)],
        copied=COPIED,
        near=NEAR_SIMILARITY,
        language_words=LANGUAGE_WORDS,
        script="run_summarization.py" if task == "summarization" else "run_clm_instruct.py",
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


def main(argv=None):
    # 1. Arguments, heads of the files and the tokenizer: what can be known to be wrong is said before the work.
    args = parse_args(argv)
    chosen, problems = choose_tasks(args)
    problems = check_args(args) + problems
    try:
        tokenizer = None if problems else load_fast_tokenizer(args)

        # 2. Read everything once: broken files end the program before an hour of tokenisation, not after it.
        scans, samples = {}, {}
        for split, (path, task) in chosen.items() if not problems else ():
            scans[split], samples[split] = scan_file(path, task, args.seed)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    if problems:
        print("measure_dataset.py: error:\n" + "\n".join(f"  - {p}" for p in problems), file=sys.stderr)
        return 2

    # 3. Measure the rows: from here on there are only numbers
    identifier = load_identifier()
    language = learn_language(samples["train"], identifier, args.language)
    measured = {
        split: measure_file(path, task, scans[split]["measured"], tokenizer, args, language, identifier)
        for split, (path, task) in chosen.items()
    }

    # 4. The figures, and the texts of the rows to show
    path, task = chosen["train"]
    measures, lengths, shown = summarize(measured, scans, args, task, tokenizer, language)
    fill_in_rows(measures, measured["train"], shown, path, task)

    # 5. Write and report
    folder, figures = Path(args.output_dir), draw_figures(measures, lengths)
    folder.mkdir(parents=True, exist_ok=True)
    for name, pair in figures.items():
        (folder / f"{name}.png").write_bytes(pair["light"])
    (folder / "measures.json").write_text(json.dumps(measures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(render_report(measures, figures), encoding="utf-8")
    print(format_measures(measures))
    print(f"\n{args.output_dir}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
