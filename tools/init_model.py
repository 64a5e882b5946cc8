# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.6", "transformers>=5.0", "tokenizers>=0.22", "safetensors", "polars"]
# ///
"""Make a from-scratch model folder: random weights of a known shape and a tokenizer trained on your own text.

For machines without a hub, for tests and for benchmarks of speed and memory. The weights are random: the model
knows nothing until it is trained.

A tiny T5 for a CPU, from the text columns of a table:

    python tools/init_model.py --architecture t5 --preset tiny \
        --train_file data/reviews/train.csv --output_dir models/tiny-t5

T5-base in its published shape (222.9M parameters), vocabulary from two columns:

    python tools/init_model.py --architecture t5 --preset t5-base --text_columns text summary \
        --train_file data/reviews/train.csv --output_dir models/t5-base-scratch

Llama 3 8B in its published shape, bfloat16, 16 GB of memory and of disk:

    python tools/init_model.py --architecture llama --preset llama3-8b --dtype bfloat16 \
        --train_file data/chat/train.jsonl --output_dir models/llama3-8b-scratch
"""

import argparse
import csv
import gzip
import json
import logging
import math
import sys
import zlib
from collections import Counter
from pathlib import Path

import polars
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5TokenizerFast,
    set_seed,
)

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "data_prep"))
from whole_files import Output, describe_command

logger = logging.getLogger("init_model")

# ---------------------------------------------------------------------------------------------------------------------
# Constants

# The shapes of T5 v1.0, https://arxiv.org/abs/1910.10683. vocab_size counts the tokenizer's entries, the
# sentinels included: 32,000 pieces + 100 sentinels; rounded up to 128 that is the published embedding of 32,128 rows.
T5_PRESETS = {
    "tiny": dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=1000, extra_ids=0),
    "t5-small": dict(d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, vocab_size=32100, extra_ids=100),
    "t5-base": dict(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, vocab_size=32100, extra_ids=100),
    "t5-large": dict(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32100, extra_ids=100),
    "t5-3b": dict(d_model=1024, d_kv=128, d_ff=16384, num_layers=24, num_heads=32, vocab_size=32100, extra_ids=100),
    "t5-11b": dict(d_model=1024, d_kv=128, d_ff=65536, num_layers=24, num_heads=128, vocab_size=32100, extra_ids=100),
}
# Columns: hidden size, feed-forward size, layers, heads, key-value heads, positions, RoPE base, vocabulary.
# llama-60m is the shape of https://arxiv.org/abs/2403.03507 (GaLore); the others are Meta's.
LLAMA_COLUMNS = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
LLAMA_COLUMNS += ["max_position_embeddings", "rope_theta", "vocab_size"]
LLAMA_PRESETS = {
    "tiny": (64, 176, 2, 4, 2, 512, 10000.0, 1000),
    "llama-60m": (512, 1376, 8, 8, 8, 1024, 10000.0, 32000),
    "llama2-7b": (4096, 11008, 32, 32, 32, 4096, 10000.0, 32000),
    "llama2-13b": (5120, 13824, 40, 40, 40, 4096, 10000.0, 32000),
    "llama3-8b": (4096, 14336, 32, 32, 8, 8192, 500000.0, 128256),
}
PRESETS = {"t5": T5_PRESETS, "llama": LLAMA_PRESETS}

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".txt", ".parquet")
EMBEDDING_MULTIPLE = 128  # tensor cores want 64; 128 turns 32,100 into T5's own 32,128 and leaves 32,000 and 128,256
T5_SPECIAL_TOKENS = ["<pad>", "</s>", "<unk>"]  # ids 0, 1, 2, as in the published T5
LLAMA_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # ids 0 to 3; Llama has no pad token of its own
T5_MAX_LENGTH = 512
T5_MIN_PIECES = 100  # an alphabet in two cases, digits and punctuation
MAX_PIECE_LENGTH = 16  # characters, SentencePiece's default


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; argparse itself ends the program with exit code 2 on an unknown flag."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--architecture", choices=sorted(PRESETS), default="t5", help="Family of the model.")
    parser.add_argument(
        "--preset",
        default="tiny",
        help="; ".join(f"for {name}: {', '.join(presets)}" for name, presets in PRESETS.items()) + ".",
    )
    parser.add_argument(
        "--train_file",
        nargs="+",
        required=True,
        help=f"Files to train the tokenizer on: {', '.join(ENDINGS)}; the text ones may end in .gz.",
    )
    parser.add_argument(
        "--text_columns", nargs="+", default=None, help="Columns to read. None: every column that holds text."
    )
    parser.add_argument(
        "--vocab_size",
        type=int,
        default=None,
        help="Most entries the tokenizer may have, special tokens included. None: the preset's.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to make; must be absent or empty.")
    parser.add_argument("--seed", type=int, default=42, help="Seed of the random weights.")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="Type of the weights, made and saved."
    )
    return parser.parse_args(argv)


def min_vocab_size(architecture, preset):
    """Return the smallest --vocab_size that leaves the tokenizer able to spell."""
    if architecture == "llama":
        return len(LLAMA_SPECIAL_TOKENS) + 256  # one entry for each byte
    return len(T5_SPECIAL_TOKENS) + T5_PRESETS[preset]["extra_ids"] + T5_MIN_PIECES


def check_args(args):
    """Return every problem with the arguments as a list of sentences; nothing but file names is looked at."""
    problems = []
    presets = PRESETS[args.architecture]
    if args.preset not in presets:
        problems.append(f"--preset {args.preset} is not a {args.architecture} preset; those are: {', '.join(presets)}")
    elif args.vocab_size is not None and args.vocab_size < min_vocab_size(args.architecture, args.preset):
        least = min_vocab_size(args.architecture, args.preset)
        problems.append(f"--vocab_size {args.vocab_size} is too small: {args.preset} needs {least} or more")
    for name in args.train_file:
        if ending(name) not in ENDINGS or (ending(name) == ".parquet" and name.endswith(".gz")):
            problems.append(
                f"--train_file {name}: unknown ending; known are {', '.join(ENDINGS)} (text ones also .gz)"
            )
        elif not Path(name).is_file():
            problems.append(f"--train_file {name}: no such file")
    output_dir = Path(args.output_dir)
    if output_dir.is_file():
        problems.append(f"--output_dir {output_dir} is a file; name a folder")
    held = output_dir.iterdir() if output_dir.is_dir() else ()
    if not all(path.match(".*.unfinished") or path.match(".*.complete.json") for path in held):  # left by a kill
        problems.append(f"--output_dir {output_dir} is not empty; nothing is overwritten, name another or empty it")
    blocker = next((parent for parent in output_dir.parents if parent.exists() and not parent.is_dir()), None)
    if blocker:
        problems.append(f"--output_dir {output_dir}: {blocker} is a file, not a folder")
    return problems


# ---------------------------------------------------------------------------------------------------------------------
# Reading text


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


def load_rows(path):
    """Return a file's rows as a list of dicts; a .txt has one column, 'text'. ValueError on anything unreadable."""
    kind = ending(str(path))
    if kind == ".txt":
        return [{"text": line} for line in read_lines(path)]
    if kind in (".csv", ".tsv"):
        # A review longer than Python's 131,072 characters a field is still a review.
        csv.field_size_limit(2**31 - 1)
        # The Amazon TSVs escape nothing: a quote is a character of the text.
        style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if kind == ".tsv" else {}
        try:
            return list(csv.DictReader(read_lines(path), restkey="", restval="", **style))
        except csv.Error as error:
            raise ValueError(f"{path}: {error}") from error
    if kind == ".parquet":
        try:
            return polars.read_parquet(path).to_dicts()
        except (polars.exceptions.PolarsError, OSError) as error:
            raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from error
    if kind == ".jsonl":
        lines = enumerate(read_lines(path), start=1)
        rows = [parse_json(line, f"{path}: line {number}") for number, line in lines if line.strip()]
    else:
        rows = parse_json("".join(read_lines(path)), path)
        rows = rows.get("data") if isinstance(rows, dict) else rows  # the datasets library nests rows under a field
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path}: expected objects, one a line (.jsonl), or a list of them, bare or as 'data' (.json)"
        )
    return rows


def strings_in(value):
    """Yield the strings in a value, those inside lists and dicts too, so that chat messages count as text."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings_in(part)


def is_number(text):
    """Return whether a string reads as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_texts(path, text_columns):
    """Return a file's non-empty texts. text_columns None: every column with a string that is not a number.

    ValueError when a wanted column is missing; it lists those there are.
    """
    rows = load_rows(path)
    columns = list(dict.fromkeys(name for row in rows for name in row if name))
    missing = [name for name in text_columns or [] if name not in columns]
    if missing and rows:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are: {', '.join(columns)}")
    texts = []
    for name in text_columns or columns:
        found = [text for row in rows for text in strings_in(row.get(name)) if text.strip()]
        # A CSV knows no types: prices and ids would fill the vocabulary with digits.
        if text_columns or not all(is_number(text) for text in found):
            texts += found
    return texts


def read_all(files, text_columns):
    """Return the texts of all files and a list of problems; every file is read before the first is reported."""
    texts, problems = [], []
    for name in files:
        try:
            found = read_texts(name, text_columns)
        except ValueError as error:
            problems.append(str(error))
            continue
        logger.info("%s: %s texts", name, f"{len(found):,}")
        texts += found
    if not texts and not problems:
        problems.append(f"--train_file {' '.join(files)}: no text in there, nothing to train a tokenizer on")
    return texts, problems


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers
#
# Both learn their pieces by BPE: it gives the same bytes for the same text. The Unigram trainer does not (tokenizers
# 0.23.3: three runs on one text gave three different tokenizer.json).


def split_alphabet(word_counts, limit):
    """Return the set of the rarest characters, those beyond the `limit` most frequent; ties go by code point."""
    characters = Counter()
    for word, count in word_counts.items():
        for character in word:
            characters[character] += count
    return set(sorted(characters, key=lambda c: (-characters[c], c))[limit:])


def learn_pieces(words, num_pieces):
    """Return the BPE pieces of an iterable of words, '▁' marking a word's beginning, as a trained Tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(
        vocab_size=num_pieces, max_token_length=MAX_PIECE_LENGTH, initial_alphabet=["▁"], show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer=trainer)
    return tokenizer


def train_t5_tokenizer(texts, vocab_size, extra_ids):
    """Return a T5TokenizerFast (Unigram over BPE's pieces) of at most vocab_size entries, sentinels included."""
    word_counts = Counter(word for text in texts for word in text.split())
    num_pieces = vocab_size - len(T5_SPECIAL_TOKENS) - extra_ids
    # Characters take at most half of the entries, or a text in Chinese would leave none for whole words.
    rare = {ord(character): " " for character in split_alphabet(word_counts, num_pieces // 2)}
    if rare:
        logger.warning("%s rare characters are left out of the vocabulary and will read as <unk>", f"{len(rare):,}")
    bpe = learn_pieces((text.translate(rare) for text in texts), num_pieces)
    counts = Counter(dict.fromkeys(bpe.get_vocab(), 0.5))  # 0.5: a piece that only served a longer one stays possible
    for word, count in word_counts.items():
        for part in word.translate(rare).split():
            for piece in bpe.encode(part).tokens:
                counts[piece] += count
    total = sum(counts.values())
    pieces = sorted(counts, key=lambda piece: (-counts[piece], piece))
    vocab = [(token, 0.0) for token in T5_SPECIAL_TOKENS]
    vocab += [(piece, round(math.log(counts[piece] / total), 6)) for piece in pieces]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(extra_ids))]  # T5 counts its sentinels down
    return T5TokenizerFast(vocab=vocab, extra_ids=extra_ids, model_max_length=T5_MAX_LENGTH)


def train_llama_tokenizer(texts, vocab_size, max_length):
    """Return a byte-level BPE tokenizer of at most vocab_size entries that puts one <s> before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=LLAMA_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models


def preset_vocab_size(architecture, preset):
    """Return the number of tokenizer entries a preset asks for."""
    shape = PRESETS[architecture][preset]
    return shape["vocab_size"] if architecture == "t5" else shape[LLAMA_COLUMNS.index("vocab_size")]


def round_up(number, multiple=EMBEDDING_MULTIPLE):
    """Return the least multiple that is not below the number."""
    return -(-number // multiple) * multiple


def make_config(architecture, preset, vocab_size=None):
    """Return a preset's configuration; the embedding has vocab_size rows (None: the preset's), rounded up to 128."""
    rows = round_up(vocab_size or preset_vocab_size(architecture, preset))
    if architecture == "t5":
        shape = {key: value for key, value in T5_PRESETS[preset].items() if key not in ("vocab_size", "extra_ids")}
        # T5 v1.0: ReLU, and one matrix for the two embeddings and the output, with the output scaled by d_model**-0.5.
        # initializer_factor 1.0 belongs to that scale: the first loss is then near log(vocab_size).
        return T5Config(
            vocab_size=rows,
            feed_forward_proj="relu",
            tie_word_embeddings=True,
            initializer_factor=1.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            n_positions=T5_MAX_LENGTH,
            **shape,
        )
    shape = dict(zip(LLAMA_COLUMNS, LLAMA_PRESETS[preset], strict=True)) | {"vocab_size": rows}
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    return LlamaConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=3, rms_norm_eps=1e-5, rope_parameters=rope, **shape
    )


def make_generation_config(config):
    """Return the generation settings that go with a configuration: only the special tokens, greedy as ever."""
    names = ("decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id")
    known = {name: getattr(config, name, None) for name in names}
    return GenerationConfig(**{name: value for name, value in known.items() if value is not None})


def make_model(config, dtype):
    """Return a model with random weights, made in `dtype` at once: t5-11b takes 23 GB in bfloat16, not 45 first."""
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model = auto_class.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config = make_generation_config(config)
    return model


# ---------------------------------------------------------------------------------------------------------------------


def fail(problems):
    """Print every problem to stderr and end the program with exit code 2."""
    print("init_model.py: error:\n" + "\n".join(f"  - {problem}" for problem in problems), file=sys.stderr)
    raise SystemExit(2)


def main(argv=None):
    # 1. Arguments and text: everything that can be wrong is said before anything is made.
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    output = Output(args.output_dir, "init_model", describe_command(args, *args.train_file))
    if output.is_finished():
        return
    problems = check_args(args)
    if problems:
        fail(problems)
    texts, problems = read_all(args.train_file, args.text_columns)
    if problems:
        fail(problems)

    # 2. Configuration: the shape says how many entries the tokenizer may have.
    vocab_size = args.vocab_size or preset_vocab_size(args.architecture, args.preset)
    config = make_config(args.architecture, args.preset, vocab_size)

    # 3. Tokenizer
    if args.architecture == "t5":
        tokenizer = train_t5_tokenizer(texts, vocab_size, T5_PRESETS[args.preset]["extra_ids"])
    else:
        tokenizer = train_llama_tokenizer(texts, vocab_size, config.max_position_embeddings)
    if len(tokenizer) < vocab_size:
        logger.warning(
            f"the text yields {len(tokenizer):,} tokenizer entries, not the {vocab_size:,} asked for; "
            f"the embedding keeps {config.vocab_size:,} rows, so the rest stays unused"
        )

    # 4. Weights
    set_seed(args.seed)
    model = make_model(config, args.dtype)

    # 5. Save
    try:
        output.write(lambda folder: (tokenizer.save_pretrained(folder), model.save_pretrained(folder)))
    except (ValueError, OSError) as error:
        fail([str(error)])

    # 6. Report
    print(f"{args.output_dir}: {args.architecture} {args.preset}, {args.dtype}, seed {args.seed}")
    print(f"  parameters  {model.num_parameters():,}")
    print(f"  vocabulary  {len(tokenizer):,} tokenizer entries, {config.vocab_size:,} embedding rows")
    for path in sorted(Path(args.output_dir).glob("[!.]*")):
        print(f"  {path.name}  {path.stat().st_size:,} bytes")
    print("the weights are random: train before use")


if __name__ == "__main__":
    main()
