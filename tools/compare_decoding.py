# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch>=2.8", "transformers>=5.17", "datasets", "accelerate", "sentencepiece", "jinja2", "rouge-score", "nltk",
# ]
# ///
"""Ways to decode, side by side: greedy, beam search, sampling with top-k, top-p and min-p, as a page and a CSV.

    python tools/compare_decoding.py --model_name_or_path out/t5-small --input_file data/validation.csv \
        --reference_column review_headline --max_samples 100 --max_new_tokens 24 --output_file out/decoding.csv

All other flags are run_generation.py's, whose functions generate. Those of one way of decoding (--num_beams, --top_p,
...) count in the ways that use them. One process; out/decoding.html lies beside the table.
"""

import argparse
import csv
import dataclasses
import os
import sys
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))
import jinja2
import numpy as np
from transformers import GenerationMixin
from transformers.utils import logging as transformers_logging

import reports
import run_generation as rg

SAMPLED = {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 1.0}  # of all words, as the model weighs them
METHODS = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "beam search": {"do_sample": False, "num_beams": 4},
    "top-k": SAMPLED | {"top_k": 50},
    "top-p": SAMPLED | {"top_p": 0.9},
    "min-p": SAMPLED | {"min_p": 0.1},
}
if hasattr(GenerationMixin, "_contrastive_search"):  # gone from transformers 5
    METHODS["contrastive"] = {"do_sample": False, "num_beams": 1, "penalty_alpha": 0.6, "top_k": 4}
OWN = {"beam search": "num_beams", "top-k": "top_k", "top-p": "top_p", "min-p": "min_p"}  # the flag that sets each
OF_BEAMS = {"num_beams", "length_penalty", "early_stopping"}
OF_SAMPLING = {*rg.WARPERS} - {*OWN.values()}
NGRAM = 3
SHOWN = 100  # rows of the page; the table has all

# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return (the flags of this tool, run_generation.py's flags as words)."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--output_file", default="decoding.csv", help="The table to write, .csv; a page .html beside it.")
    add("--reference_column", help="Column of the texts to compare with by ROUGE.")
    add("--rouge_language", default="en", help="en: ROUGE as rouge_score has it, ASCII only; else Unicode words.")
    args, words = parser.parse_known_args(argv)
    return args, [*words, "--output_file", args.output_file]


def read_request(args, words):
    """Return run_generation.py's arguments by its flags. Raises UsageError with all that is wrong with them."""
    problems, request = [], None
    try:  # as if both were asked for, so that the flags of sampling and of beams go together
        request = rg.parse_generation_arguments(["--do_sample", "true", "--num_beams", "4", *words])
    except rg.UsageError as error:
        problems += str(error).split("\n")
    if request is not None:
        model_args, data_args, given = request
        for flag, value, why in (
            ("do_sample", any(word.startswith("--do_sample") for word in words), "some ways sample and some do not"),
            ("group_by", data_args.group_by, "texts of groups are not compared"),
            ("deepspeed", model_args.deepspeed, "one process compares"),
            ("assistant_model_name_or_path", model_args.assistant_model_name_or_path, "it changes the time alone"),
            ("num_beams", given.get("num_beams") == 1, "1 is greedy, which is compared anyway"),
        ):
            problems += [f"--{flag}: {why}; leave it out"] if value else []
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        problems.append("start it without a launcher: one process compares")
    path = Path(args.output_file)
    if path.suffix != ".csv":
        problems.append(f"--output_file {path}: must end in .csv; the page gets the same name with .html")
    for name in (path, path.with_suffix(".html")):
        if name.exists() and not any(f"--output_file {name}: exists" in line for line in problems):
            problems.append(f"--output_file {path}: {name} exists and is kept; remove it first, or name another")
    if not path.absolute().parent.is_dir():
        problems.append(f"--output_file {path}: there is no folder {path.parent}; make it first")
    if problems:
        raise rg.UsageError("\n".join(problems))
    return request


def set_way(way, given):
    """Return the decoding settings of one way, with the flags that were given where they concern it."""
    settings, own = METHODS[way], OWN.get(way)
    uses = {own} | (OF_SAMPLING if settings["do_sample"] else set()) | (OF_BEAMS if own == "num_beams" else set())
    others = {"do_sample", *OF_BEAMS, *OF_SAMPLING, *OWN.values()} - uses
    return {**settings, **{name: value for name, value in given.items() if name not in others}}


# ---------------------------------------------------------------------------------------------------------------------
# Texts and figures


def generate_texts(generator, texts, way):
    """Return (a text a row, rows cut off at --max_new_tokens, seconds)."""
    store, started = rg.MemoryStore(), time.perf_counter()
    outputs, _ = rg.generate_round(generator, store, texts, 0, way)
    return outputs, {row for _, row in store.cut_off}, time.perf_counter() - started


def find_repetition(texts):
    """Return the share of the texts' 3-grams of words that stood in the same text before."""
    count, repeated = 0, 0
    for text in texts:
        words = reports.UnicodeTokenizer().tokenize(text)
        ngrams = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
        count += len(ngrams)
        repeated += len(ngrams) - len(set(ngrams))
    return repeated / max(count, 1)


def compare_ways(generators, texts, references, language):
    """Return {way: {"texts", "settings", "figures"}}; references may be None."""
    wanted, results = [i for i, text in enumerate(texts) if text is not None], {}
    first = next(iter(generators.values()))
    rg.generate_batch(first, first.prompts.encode([texts[wanted[0]]])[0], [0])  # the first one pays for start-up
    for way, generator in generators.items():
        outputs, cut_off, seconds = generate_texts(generator, texts, way)
        chosen = [outputs[i] for i in wanted]
        figures = {}
        if references is not None:
            scores = reports.compute_rouge(chosen, [references[i] for i in wanted], language)
            figures = {f"ROUGE-{name}": scores[f"rouge{name}"] for name in "12L"}
        figures |= {
            "words": float(np.mean([len(reports.UnicodeTokenizer().tokenize(text)) for text in chosen])),
            "repeated 3-grams %": 100 * find_repetition(chosen),
            "ended %": 100 * (1 - len(cut_off) / len(wanted)),
            "seconds": seconds,
        }
        settings = describe_settings(generator.config)
        results[way] = {"texts": outputs, "settings": settings, "figures": figures}
    return results


def describe_settings(config):
    """Return the decoding settings in effect."""
    given = {name: value for name, value in config.to_diff_dict().items() if name not in rg.NOT_FLAGS}
    return ", ".join(f"{name}={value}" for name, value in given.items() if not name.endswith("_token_id"))


# ---------------------------------------------------------------------------------------------------------------------
# What is written


def write_csv(path, sources, references, results):
    """Write a row a text: its source, its reference where there is one, and every way's text."""
    columns = {"source": sources} | ({"reference": references} if references is not None else {})
    columns |= {way: result["texts"] for way, result in results.items()}
    aside = path.with_name(f".{path.name}.unfinished")
    with open(aside, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    aside.replace(path)


def write_page(path, sources, references, results, model):
    """Write the figures, and the first rows' texts side by side."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template("compare_decoding.html.jinja").render(
        **{"model": model, "sources": sources, "references": references, "results": results, "shown": SHOWN}
    )
    aside = path.with_name(f".{path.name}.unfinished")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def print_figures(results):
    """Print a line a way."""
    names = list(next(iter(results.values()))["figures"])
    print(f"{'':12}" + "".join(f"{name:>20}" for name in names))
    for way, result in results.items():
        print(f"{way:12}" + "".join(f"{result['figures'][name]:20.1f}" for name in names))


# ---------------------------------------------------------------------------------------------------------------------


def read_input(args, model_args, data_args):
    """Return (the table, the sources to show, references or None). Raises UsageError."""
    table, references = rg.load_table(data_args, model_args), None
    column = rg.find_text_column(table.column_names, data_args)
    if args.reference_column is not None:
        if args.reference_column not in table.column_names:
            names = ", ".join(table.column_names)
            raise rg.UsageError(f"--reference_column {args.reference_column}: no such column; there are {names}")
        references = list(map(show_cell, table[args.reference_column]))
    return table, list(map(show_cell, table[column])), references


def show_cell(cell):
    """Return a cell as text: nothing where there is none."""
    return "" if cell is None else str(cell)


def read_prompts(table, data_args, is_chat):
    """Return what rg.read_texts() makes of the rows. Raises UsageError where no row has a text."""
    column = rg.find_text_column(table.column_names, data_args)
    texts = rg.read_texts(table, column, is_chat, data_args.drop_keys or ())
    if all(text is None for text in texts):
        raise rg.UsageError(f"--text_column {column}: no row has a text")
    return texts


def main(argv=None):
    args, words = parse_args(argv)
    try:
        model_args, data_args, given = read_request(args, words)
        table, sources, references = read_input(args, model_args, data_args)
        transformers_logging.set_verbosity_error()
        generator = rg.load_generator(model_args, data_args, set_way("greedy", given))
        model, tokenizer = generator.model, generator.prompts.tokenizer
        texts = read_prompts(table, data_args, generator.prompts.is_chat)
        if rg.model_checks:
            rg.model_checks.check_model(model, tokenizer, [], model_args)
        configs = {way: rg.make_generation_config(model, tokenizer, set_way(way, given)) for way in METHODS}
        generators = {way: dataclasses.replace(generator, config=config) for way, config in configs.items()}
        results = compare_ways(generators, texts, references, args.rouge_language)
    except rg.UsageError as error:
        print("".join(f"error: {line}\n" for line in str(error).split("\n")), end="", file=sys.stderr)
        return 2
    path = Path(args.output_file)
    write_csv(path, sources, references, results)
    write_page(path.with_suffix(".html"), sources, references, results, model_args.model_name_or_path)
    print_figures(results)
    print(f"written: {path} and {path.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
