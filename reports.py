# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "matplotlib", "rouge-score", "nltk"]
# ///
"""
What a run tells: an audit of the labels, the decisions taken, samples, answers and their scores.

Optional beside run_summarization.py and run_clm_instruct.py: they train the same without it. In the order in which a
run meets them: audit, choose_generation, show_answers or show_summaries, describe_run, score_answers, write_answers.
"""

import itertools
import json
import logging
import re
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import regex
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

logger = logging.getLogger(__name__)

try:
    from guards import UsageError
except ModuleNotFoundError:
    UsageError = ValueError
try:
    import model_checks
except ModuleNotFoundError:
    model_checks = None

# Where the audit stops a run: shares of the rows, of those that are too long, of the answers, of the validation rows.
MAX_LEFT_OUT, MAX_TOO_LONG, MAX_UNSTOPPED, MAX_OVERLAP = 0.05, 0.50, 0.10, 0.20
TOO_LONG = "longer than --max_seq_length"
SHOWN_SAMPLES = 3

# What a row counts of itself, summed in the audit's table.
COUNTED = ("cut_exchanges", "tokens", "supervised_tokens", "answers", "answers_with_stop", "answers_unsupervised")
COUNTED += ("special_tokens_in_text",)

# ------------------------------------------------------------------------------------------------ the audit


def audit(splits: dict, tokenizer, writes_bos: bool, skip: bool = False, only: bool = False, rank: int = 0) -> dict:
    """
    Count, show and judge what would be trained on. Returns the counts by split.

    splits: datasets.Dataset by name, as run_clm_instruct.py's Row has their columns. writes_bos: whether the tokenizer
    by itself puts BOS before a text. Raises UsageError where a limit is broken, unless skip or only is set, and
    always where a split has no usable row.
    """
    # Blocks of plain text begin anywhere.
    expects_bos = writes_bos and any(any(encoded["answers"]) for encoded in splits.values())
    counts = {split: count_split(encoded, expects_bos) for split, encoded in splits.items()}
    trained = set(splits["train"]["prompt_hash"][:]) if "train" in splits else set()
    for split in set(splits) - {"train"}:
        seen = [h and h in trained for h in splits[split]["prompt_hash"][:]]
        counts[split]["overlap"] = list(itertools.compress(splits[split]["row"][:], seen))
    problems, unusable = find_audit_problems(counts), any(c["used"] == 0 for c in counts.values())
    if rank == 0:
        first = next(iter(splits.values()))
        usable = itertools.islice((i for i, problem in enumerate(first["problem"][:]) if not problem), 2)
        shown = (show_tokens(first[i]["input_ids"], first[i]["labels"], tokenizer) for i in usable)
        oddities = model_checks.find_template_oddities(tokenizer, first["source"][:]) if model_checks else []
        oddities = [f"audit: {line}" for line in oddities]
        story = "\n".join([format_audit(counts), *shown, *oddities, *(f"audit: {line}" for line in problems)])
        logger.info(story)
        short = "\n".join([*outline(counts), *list_overlap(counts), *oddities])
        print(story if only or problems else short, flush=True)
    if problems and (unusable or not (skip or only)):
        raise UsageError("\n".join(problems if unusable else [*problems, "--skip_audit trains all the same"]))
    return counts


def count_split(encoded, expects_bos: bool) -> dict:
    """What the audit says of one split: tokens and rows as numbers, `reasons` as {why left out: the rows' numbers}."""
    usable, reasons = encoded.select([i for i, problem in enumerate(encoded["problem"][:]) if not problem]), {}
    for row, problem in zip(encoded["row"][:], encoded["problem"][:], strict=True):
        reasons.setdefault(problem, []).append(row)
    reasons.pop("", None)
    leading = usable["leading_bos"][:]
    return {
        "rows": len(encoded),
        "used": len(usable),
        "left_out": len(encoded) - len(usable),
        **{name: sum(usable[name][:]) for name in COUNTED},
        "rows_without_bos": leading.count(0) if expects_bos else 0,
        "rows_with_two_bos": sum(count > 1 for count in leading),
        "duplicates": len(usable) - len(set(usable["row_hash"][:])),
        "reasons": dict(sorted(reasons.items(), key=lambda item: -len(item[1]))),
    }


def find_audit_problems(counts: dict[str, dict]) -> list[str]:
    """Which limits the splits break, with the way out."""
    problems = []
    for split, c in counts.items():
        reasons, unstopped = "; ".join(describe_reasons(c["reasons"])[:5]), c["answers"] - c["answers_with_stop"]
        too_long, overlap = len(c["reasons"].get(TOO_LONG, ())), c.get("overlap", ())
        found = [f"none of the {c['rows']} rows can be used: {reasons}"] if c["used"] == 0 else []
        if c["left_out"] - too_long > MAX_LEFT_OUT * c["rows"]:
            found.append(f"{c['left_out']} of {c['rows']} rows are left out: {reasons}; mend or remove them")
        if too_long > MAX_TOO_LONG * c["rows"]:
            found.append(f"{too_long} of {c['rows']} rows are {TOO_LONG}; raise it, or shorten them")
        for name in ("rows_without_bos", "rows_with_two_bos"):
            if c[name]:
                found.append(f"{c[name]} {name.replace('_', ' ')}: --prompt_template writes a wrong BOS")
        if unstopped > MAX_UNSTOPPED * c["answers"]:
            why = "so the model would not learn to stop: raise --max_seq_length, or mend --prompt_template"
            found.append(f"{unstopped} of {c['answers']} answers have no stop token, {why}")
        if len(overlap) > MAX_OVERLAP * max(c["used"], 1):
            found.append(f"{len(overlap)} of {c['used']} prompts are in the training data; remove them")
        problems += [f"{split}: {problem}" for problem in found]
    return problems


def describe_reasons(reasons: dict) -> list[str]:
    """`count x why (rows ...)`, with the first rows' numbers, from 0."""
    return [f"{len(rows)} x {why} (rows {name_rows(rows)})" for why, rows in reasons.items()]


def name_rows(rows: list[int]) -> str:
    return ", ".join(map(str, rows[:5])) + " ..." * (len(rows) > 5)


def format_audit(counts: dict[str, dict]) -> str:
    """The audit as a table with a column for each split, and below it the rows left out and those seen in training."""
    names = dict.fromkeys(name for c in counts.values() for name in c if name not in ("reasons", "overlap"))
    titles = {"rows": "rows read", "special_tokens_in_text": "rows with special tokens in text"}
    table = {titles.get(name, name.replace("_", " ")): [c.get(name, "-") for c in counts.values()] for name in names}
    shares = [f"{c['answers_with_stop'] / c['answers']:.1%}" if c["answers"] else "-" for c in counts.values()]
    table |= {
        "  share of answers": shares,
        "prompts also in train": [len(c.get("overlap", ())) for c in counts.values()],
    }
    lines = [
        f"{title:<34}" + "".join(f"{c:>14}" for c in cells) for title, cells in ({"audit": [*counts]} | table).items()
    ]
    reasons = [f"{split}: left out {why}" for split, c in counts.items() for why in describe_reasons(c["reasons"])]
    return "\n".join(["", *lines, *reasons, *list_overlap(counts), ""])


def outline(counts: dict[str, dict]) -> list[str]:
    """The audit in a line a split, with why rows are left out."""
    return [
        f"{split}: {c['used']} of {c['rows']} rows used, {c['supervised_tokens']:,} of {c['tokens']:,} tokens "
        f"supervised, {c['answers_with_stop']} of {c['answers']} answers end with a stop token"
        + "".join(f"; left out {why}" for why in describe_reasons(c["reasons"]))
        for split, c in counts.items()
    ]


def list_overlap(counts: dict[str, dict]) -> list[str]:
    """Which prompts are in the training data too."""
    found = {split: c["overlap"] for split, c in counts.items() if c.get("overlap")}
    told = "prompts are in the training data too"
    return [f"{split}: {len(rows)} {told} (rows {name_rows(rows)})" for split, rows in found.items()]


def show_tokens(ids: list[int], labels: list[int], tokenizer, width: int = 110, limit: int = 400) -> str:
    """A row token by token, `|` between them, ^ under the supervised ones; the middle of a long row is left out."""
    pieces = [tokenizer.decode([i]).replace("\n", "⏎").replace("\r", "␍").replace("\t", "⇥") for i in ids]
    marked, half = [label != -100 for label in labels], limit // 2
    lines, text, marks = [f"--- one row: {len(ids)} tokens, {sum(marked)} supervised (^)"], "", ""
    if len(ids) > limit:
        pieces[half:-half], marked[half:-half] = [f" ... {len(ids) - limit} tokens ... "], [False]
    for piece, supervised in zip(pieces, marked, strict=True):
        if len(text) + len(piece) + 1 > width and text:
            lines, text, marks = [*lines, text, marks.rstrip()], "", ""
        text, marks = text + piece + "|", marks + ("^" if supervised else " ") * len(piece) + " "
    return "\n".join([*filter(None, [*lines, text, marks.rstrip()]), ""])


# ------------------------------------------------------------------------------------------------ while it runs


def describe_run(model, training_args, optimizer: str, checkpoint: str | None) -> str:
    """What was decided before the first step, a line each."""
    rows, ranks = training_args.per_device_train_batch_size, training_args.world_size
    steps, dtype = training_args.gradient_accumulation_steps, str(model.dtype).removeprefix("torch.")
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, needed in sizes if needed)
    share = "all trained" if trained == total else f"{trained / 1e6:.2f} M trained ({trained / total:.1%})"
    scheduler = f"{training_args.lr_scheduler_type.value}, --warmup_steps {training_args.warmup_steps:g}"
    # What a DeepSpeed file has of its own rules.
    blocks = getattr(getattr(training_args, "hf_deepspeed_config", None), "config", {})
    own = {k: f"{blocks[k]['type']} of the DeepSpeed file" for k in ("optimizer", "scheduler") if k in blocks}
    optimizer = f"optimizer: {own['optimizer']}" if "optimizer" in own else optimizer
    precision = "bf16 autocast (--bf16 false for fp32)" if training_args.bf16 else dtype
    lines = [
        f"parameters: {total / 1e6:.2f} M, {share}; precision: {'fp16' if training_args.fp16 else precision}",
        f"{optimizer}; scheduler: {own.get('scheduler', scheduler)}",
        f"effective batch {rows * ranks * steps} = {rows} rows x {ranks} processes x {steps} accumulation steps; "
        + (f"going on from {checkpoint}" if checkpoint else "starting from the model's own weights"),
    ]
    return "\n".join(lines)


class SampleCallback(TrainerCallback):
    """
    Shows after training what the model writes for a few rows, and wrote before it; whole in the log.

    rows: with `source` and `reference`; generate(model, args) returns a text for each, and runs on every rank.
    """

    def __init__(self, rows, generate):
        self.rows, self.generate, self.before = rows, generate, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = self.generate(model, args)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        for row, before, after in zip(self.rows, self.before, self.generate(model, args), strict=True):
            said = {"reference": row["reference"], "before": before, "after": after}
            logger.info("\n".join(f"{name}: {text}" for name, text in ({"source": row["source"]} | said).items()))
            if args.process_index == 0:
                print("sample: " + "; ".join(f"{k} {shorten(text, 50)!r}" for k, text in said.items()), flush=True)


def shorten(text: str, width: int = 160) -> str:
    """Text on one line of at most `width` characters."""
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width - 4] + " ..."


def show_summaries(rows, features, collator, tokenizer) -> SampleCallback:
    """The first rows' summaries before and after training."""
    rows, features = (list(part.select(range(min(SHOWN_SAMPLES, len(part))))) for part in (rows, features))
    write = partial(write_summaries, batch=collator(features), tokenizer=tokenizer)
    return SampleCallback(rows, write)


def write_summaries(model, args, batch: dict, tokenizer) -> list[str]:
    """The summaries of a collated batch; every rank generates, because ZeRO-3 needs them all."""
    inputs = {name: batch[name].to(args.device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ids = model.eval().generate(**inputs, synced_gpus=is_deepspeed_zero3_enabled())
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------ answers


def generate_answers(model, args, rows, tokenizer, config) -> list[tuple[str, bool, int]]:
    """
    An answer to every row's `source`: (text, whether it ended by itself, tokens), on every rank.

    args: the trainer's; config: a GenerationConfig with a list of stop ids. Longest prompts first, so that a lack of
    memory shows at once. Ranks take equal shares, the last rows repeated: under ZeRO-3 all must generate together.
    """
    prompts = tokenizer(rows["source"][:], add_special_tokens=False, verbose=False)["input_ids"]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    share, answers = args.per_device_eval_batch_size, {}
    order += order[-1:] * (-len(order) % (share * args.world_size))
    starts = range(args.process_index * share, len(order), share * args.world_size)
    settings = {"generation_config": config, "synced_gpus": is_deepspeed_zero3_enabled()}
    model.eval()
    for start in tqdm(starts, desc="Generating", disable=args.disable_tqdm or args.process_index > 0):
        chosen = order[start : start + share]
        longest = max(len(prompts[i]) for i in chosen)
        ids = [[tokenizer.pad_token_id] * (longest - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        ids, mask = (torch.tensor(values, device=args.device) for values in (ids, mask))
        with torch.no_grad():  # where there is autocast, it is in the model's forward
            ids = model.generate(input_ids=ids, attention_mask=mask, **settings)
        for i, tokens in zip(chosen, ids[:, longest:].tolist(), strict=True):
            end = next((n for n, token in enumerate(tokens) if token in config.eos_token_id), len(tokens))
            text = tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
            answers[i] = text, end < len(tokens), end
    if args.world_size > 1:
        parts = [None] * args.world_size
        torch.distributed.all_gather_object(parts, answers)
        answers = {i: answer for part in parts for i, answer in part.items()}
    return [answers[i] for i in range(len(prompts))]


def choose_generation(model, tokenizer, data_args, training_args):
    """generate_answers(model, args, rows) with the flags' length and beams, and the model's stop tokens as a list."""
    config = GenerationConfig(
        max_new_tokens=data_args.max_new_tokens,
        num_beams=training_args.generation_num_beams or data_args.num_beams,
        eos_token_id=[*np.atleast_1d(model.generation_config.eos_token_id).tolist()],
        pad_token_id=tokenizer.pad_token_id,
    )
    return partial(generate_answers, tokenizer=tokenizer, config=config)


def show_answers(generate, rows) -> SampleCallback:
    """The first rows' answers before and after training. generate: from choose_generation."""
    shown = rows.select(range(min(SHOWN_SAMPLES, len(rows))))
    return SampleCallback(shown, lambda model, args: [text for text, *_ in generate(model, args, rows=shown)])


def write_answers(folder: str, rows, answers: list[tuple]) -> None:
    """generated_predictions.jsonl: `row` (its number in the file, from 0), `source`, `reference` and `prediction`."""
    with open(Path(folder) / "generated_predictions.jsonl", "w", encoding="utf-8") as stream:
        for row, (text, *_) in zip(rows.select_columns(["row", "source", "reference"]), answers, strict=True):
            stream.write(json.dumps(row | {"prediction": text}, ensure_ascii=False) + "\n")


def score_answers(answers: list[tuple], references: list[str], language: str) -> dict[str, float]:
    """ROUGE of the answers in percent, the share that ended by itself, and the mean length in tokens."""
    texts, stopped, lengths = zip(*answers, strict=True)
    means = {"stopped": float(np.mean(stopped)), "gen_len": float(np.mean(lengths))}
    return compute_rouge(texts, references, language) | means


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
