# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["polars>=1.0", "pyarrow"]
# ///
"""Turn instructions, chats or plain text into one clean pair, train.jsonl and validation.jsonl.

Rows are {"instruction", "context", "response"} with a "category" where the input has one, {"messages": [{"role",
"content"}]} or {"text"}. Rows without an answer and duplicates are dropped and counted, and no prompt stands in both
files. The layouts dolly, alpaca, prompt (also question/answer), chat, sharegpt and text are known by their columns.

Databricks Dolly:

    python data_prep/prepare_instruct.py --input_file databricks-dolly-15k.jsonl.gz --output_dir data/dolly

Chats of two sources, a tenth held out:

    python data_prep/prepare_instruct.py --input_file chats.json.gz sharegpt.jsonl --output_dir data/chat \
        --validation_fraction 0.1

A plain text, cut at blank lines into pieces of about 4,000 characters:

    python data_prep/prepare_instruct.py --input_file book.txt.gz --output_dir data/book --text_chars 4000
"""

import argparse
import itertools
import json
import tempfile
import time
import unicodedata
from collections import Counter
from pathlib import Path

import polars as pl

from brief_parser import BriefParser
from table_files import ending, pick_share, read_columns, read_lines, read_rows, refuse, say, stable_hash, take_sample
from whole_files import Output, describe_command, explain_disk_fault, find_folder_problems, nearest_folder

# ---------------------------------------------------------------------------------------------------------------------
# Constants

SPLIT_NAMES = ("train.jsonl", "validation.jsonl")
INPUT_ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
# {what it becomes: column}. The first one whose columns are there is taken, in the order of run_clm_instruct.py, which
# knows most of them; a test holds the two together. A context and a category are taken where there is one.
FORMATS = (
    ("dolly", {"instruction": "instruction", "context": "context", "response": "response"}),
    ("alpaca", {"instruction": "instruction", "context": "input", "response": "output"}),
    ("chat", {"messages": "messages"}),
    ("prompt", {"instruction": "prompt", "response": "completion"}),
    ("prompt", {"instruction": "prompt", "response": "response"}),
    ("prompt", {"instruction": "question", "response": "answer"}),
    ("prompt", {"instruction": "question", "response": "response"}),
    ("dolly", {"instruction": "instruction", "response": "response"}),
    ("alpaca", {"instruction": "instruction", "response": "output"}),
    ("text", {"text": "text"}),
    ("sharegpt", {"messages": "conversations"}),
    ("sharegpt", {"messages": "conversation"}),
)
OPTIONAL_FIELDS = {"context": "context", "category": "category"}
CHAT_FIELDS = {"tools": "tools", "system": "system"}  # taken along with chats as they are
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")}
ROLES |= {"human": "user"} | dict.fromkeys(("gpt", "chatgpt", "bot", "model"), "assistant")
HELD_ROWS = 20_000  # rows in memory at a time; the clean ones wait in a temporary file beside the output
NAMED_PER_REASON = 5  # dropped rows that are named for each reason; all of them are counted
# Asked for 5 %, from 2.5 to 7.5 % is near enough, and so are five rows more or less.
SPLIT_TOLERANCE, SPLIT_TOLERANCE_ROWS = 0.5, 5


class RowDropped(Exception):
    """Raised with the reason, which is counted, and a detail for the rows that are named; it may be empty."""


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    formats = ["auto", *dict.fromkeys(name for name, _ in FORMATS)]
    add("--input_file", nargs="+", required=True, help=f"Files of {', '.join(INPUT_ENDINGS)}; text ones also .gz.")
    add("--output_dir", required=True, help="Folder for train.jsonl and validation.jsonl; must be absent or empty.")
    add("--format", choices=formats, default="auto", help="Layout of all the files. auto: known by its columns.")
    add("--text_column", default=None, help="Column of plain text. None: text, where no other layout fits.")
    add("--text_chars", type=int, default=4000, help="A .txt is cut at the first blank line after so many characters.")
    add("--sample_fraction", type=float, default=1.0, help="Share of the clean rows to keep, above 0, at most 1.")
    add("--validation_fraction", type=float, default=0.05, help="Share of the kept rows for validation, in (0, 1).")
    add("--seed", type=int, default=42, help="Seed of sample, split and order; the same seed gives the same bytes.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences; choose_layouts looks at the files."""
    problems = []
    if args.text_chars < 1:
        problems.append(f"--text_chars {args.text_chars}: at least 1 is needed, such as 4000")
    if args.text_column and args.format not in ("auto", "text"):
        problems.append(f"--text_column {args.text_column}: not with --format {args.format}; leave one of them out")
    if not 0 < args.sample_fraction <= 1:
        problems.append(f"--sample_fraction {args.sample_fraction}: must be above 0 and at most 1 (1: all rows)")
    if not 0 < args.validation_fraction < 1:
        problems.append(f"--validation_fraction {args.validation_fraction}: must be above 0 and below 1, such as 0.05")
    return problems + find_folder_problems(Path(args.output_dir))


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def choose_layout(path, columns, args):
    """Return (format, {field: column}) of a file: the first of FORMATS, or of --format, whose columns are there."""
    layouts = [(name, fields) for name, fields in FORMATS if args.format in ("auto", name)]
    if args.text_column and ending(path) != ".txt":
        layouts = [("text", {"text": args.text_column})]
    asked = f"--text_column {args.text_column}" if args.text_column else f"--format {args.format}"
    for name, fields in layouts:
        if all(columns.count(column) == 1 for column in fields.values()):
            extra = OPTIONAL_FIELDS if "instruction" in fields else CHAT_FIELDS if "messages" in fields else {}
            return name, fields | {f: c for f, c in extra.items() if f not in fields and columns.count(c) == 1}
    known = [list(fields.values()) for _, fields in layouts]
    raise ValueError(
        f"--input_file {path}: {asked} looks for the columns ({') or ('.join(', '.join(names) for names in known)}), "
        f"the file has: {', '.join(columns)}; rename them, or name the one with plain text by --text_column"
    )


def choose_layouts(args):
    """Return ({path: (format, {field: column}, columns left out)}, problems); only the head of a file is read."""
    chosen, kinds, problems = {}, {}, []
    for path in dict.fromkeys(args.input_file):
        try:
            columns = read_columns("input_file", path, INPUT_ENDINGS)
            name, fields = choose_layout(path, columns, args)
        except ValueError as error:
            problems.append(str(error))
            continue
        chosen[path] = (name, fields, [column for column in columns if column not in fields.values()])
        kinds.setdefault("instructions" if "instruction" in fields else next(iter(fields)), path)
    if len(kinds) > 1:
        examples = ", ".join(f"{path} holds {kind}" for kind, path in kinds.items())
        problems.append(f"--input_file: {examples}; run once for each kind, with an --output_dir of its own")
    return chosen, problems


def cut_pieces(lines, chars):
    """Yield (number of its first line, piece) of a text; blank lines at the borders are left out, nothing else is.

    A piece ends at the first blank line after `chars` characters, or at the end of a line after twice as many.
    """
    piece, size, start = [], 0, 1
    for number, line in enumerate(lines, start=1):
        is_blank = line.isspace()
        if piece and (size >= chars and is_blank or size >= 2 * chars):
            yield start, "".join(piece)
            piece, size = [], 0
        if not piece and is_blank:
            continue
        start = start if piece else number
        piece.append(line)
        size += len(line)
    if piece:
        yield start, "".join(piece)


def read_records(path, fields, text_chars):
    """Yield (place, row) of a file; a row that could not be parsed is a string that says why."""
    if ending(path) == ".txt":
        rows, unit = ((number, {"text": piece}) for number, piece in cut_pieces(read_lines(path), text_chars)), "line"
    else:
        rows = read_rows(path, fields.values())
        unit = "row" if ending(path) in (".parquet", ".json") else "line"
    for number, row in rows:
        yield f"{path}: {unit} {number}", row


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning


def clean_text(value, name, reason="could not be parsed", keep_indent=False):
    """Return a text stripped, in NFC, with \\n as its line end; None is an empty one. RowDropped if it is no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowDropped(reason, f"{name} is {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowDropped(reason, f"{name} holds half of a surrogate pair") from None
    text = unicodedata.normalize("NFC", value.replace("\r\n", "\n").replace("\r", "\n"))
    return text.strip("\n").rstrip() if keep_indent else text.strip()


def clean_message(message):
    """
    Return a message with "role" and "content", whose keys may also be from and value; RowDropped says what is off.

    Whatever else it holds (tool_calls, reasoning, weight, ...) goes along: the training script knows it or refuses it.
    """
    if not isinstance(message, dict):
        raise RowDropped("malformed message", f"{type(message).__name__}, not an object")
    role = message.get("role") or message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    extra = {
        k: v
        for k, v in message.items()
        if k not in ("role", "from", "content", "value") and v not in (None, "", [], {})
    }
    content = "" if content is None and "tool_calls" in extra else content
    if not isinstance(role, str) or content is None:
        raise RowDropped("malformed message", f"no {'content' if isinstance(role, str) else 'role'}")
    role = clean_text(role, "role", "malformed message")
    if role.lower() not in ROLES:
        raise RowDropped(f"unknown role {role[:20]!r}", "")
    return {"role": ROLES[role.lower()], "content": clean_text(content, "content", "malformed message"), **extra}


def clean_messages(messages, counts):
    """Return a chat's clean messages; an empty system message says nothing, so it is left out and counted."""
    if isinstance(messages, str):  # a table's cell holds the list as JSON
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise RowDropped("not a list of messages", "text that is not JSON") from None
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else "absent" if messages is None else type(messages).__name__
        raise RowDropped("not a list of messages", kind)
    messages = [clean_message(message) for message in messages]
    for role, reason in (("user", "empty instruction"), ("assistant", "empty answer")):
        if any(m["role"] == role and not (m["content"] or m.get("tool_calls")) for m in messages):
            raise RowDropped(reason, "")
        if not any(message["role"] == role for message in messages):
            raise RowDropped(f"no {role} turn", "")
    kept = [message for message in messages if message["content"] or message["role"] != "system"]
    counts["empty system messages"] += len(messages) - len(kept)
    return kept


def clean_row(row, fields, counts):
    """Return a row in its canonical form; RowDropped says why there is none."""
    if isinstance(row, str):
        raise RowDropped("could not be parsed", row)
    values = {field: row.get(column) for field, column in fields.items()}
    if "messages" in fields:
        extra = {field: values[field] for field in CHAT_FIELDS if values.get(field)}
        return {"messages": clean_messages(values["messages"], counts), **extra}
    if isinstance(values.get("instruction"), list):  # a prompt and its completion as lists of messages
        answer = values["response"] if isinstance(values["response"], list) else [values["response"]]
        return {"messages": clean_messages([*values["instruction"], *answer], counts)}
    clean = {field: clean_text(value, fields[field], keep_indent=field == "text") for field, value in values.items()}
    if "text" in fields:
        needed = {"text": "empty text"}
    else:
        clean = {"instruction": clean["instruction"], "context": clean.get("context", "")} | clean
        needed = {"instruction": "empty instruction", "response": "empty answer"}
        if not clean.get("category"):
            clean.pop("category", None)
    for field, reason in needed.items():
        if not clean[field]:
            raise RowDropped(reason, "")
    return clean


def find_prompts(row):
    """Return (what must not stand in both files, all of the prompt): the first user turn and what leads to an answer.

    Case-folded: "What is AI?" in train and "what is ai?" in validation would be a leak too.
    """
    if "messages" in row:
        messages = row["messages"]
        first = next(message["content"] for message in messages if message["role"] == "user")
        lead = itertools.takewhile(lambda message: message["role"] != "assistant", messages)
        whole = "\n".join([*(message["content"] for message in lead), first])
    elif "text" in row:
        first = whole = row["text"]
    else:
        first, whole = row["instruction"], f"{row['instruction']}\n{row['context']}"
    return first.casefold(), whole.casefold()


def drop_row(place, reason, detail, counts, named):
    """Count a dropped row and remember the first few of each reason."""
    counts[f"dropped: {reason}"] += 1
    if counts[f"dropped: {reason}"] <= NAMED_PER_REASON:
        named.setdefault(f"dropped: {reason}", []).append(f"{place} ({detail})" if detail else place)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and splitting


def read_and_spool(chosen, args, spool, counts, named, started):
    """Write the clean rows of all files to `spool`; return a table with each one's hashes and its place in there."""
    seen, tables = set(), []
    for path, (name, fields, left_out) in chosen.items():
        columns = ", ".join(fields.values()) + (f"; left out: {', '.join(left_out)}" if left_out else "")
        say(started, f"reading {path} as {name}: {columns}")
        records = read_records(path, fields, args.text_chars)
        while batch := list(itertools.islice(records, HELD_ROWS)):
            counts["read"] += len(batch)
            clean = []
            for place, row in batch:
                try:
                    clean.append((place, clean_row(row, fields, counts)))
                except RowDropped as dropped:
                    drop_row(place, *dropped.args, counts, named)
            tables.append(spool_batch(clean, args.seed, spool, seen, counts, named))
            say(started, f"{counts['read']:,} rows read, {len(seen):,} clean and different")
    if not counts["read"]:
        raise ValueError(f"no rows in {', '.join(chosen)}; name other files")
    return pl.concat(tables)


def spool_batch(batch, seed, spool, seen, counts, named):
    """Write (place, clean row) pairs that are new to `spool`; return their hashes and offsets as a table."""
    keys = ({field: value for field, value in row.items() if field != "category"} for _, row in batch)
    # 64 bits: among ten million rows the chance that two different ones pass for duplicates is 3 in a million.
    hashes = stable_hash((json.dumps(key) for key in keys), "row", seed).to_list()
    rows, row_hashes, offsets = [], [], []
    for (place, row), row_hash in zip(batch, hashes, strict=True):
        if row_hash in seen:
            drop_row(place, "duplicate", "", counts, named)
            continue
        seen.add(row_hash)
        offsets.append(spool.tell())
        spool.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        rows.append(row)
        row_hashes.append(row_hash)
    prompts = [find_prompts(row) for row in rows]
    return pl.DataFrame(
        {
            "row_hash": pl.Series(row_hashes, dtype=pl.UInt64),
            "split_hash": stable_hash((first for first, _ in prompts), "split", seed),
            "prompt_hash": stable_hash((whole for _, whole in prompts), "split", seed),
            "offset": pl.Series(offsets, dtype=pl.UInt64),
        }
    )


def split_rows(table, fraction, started):
    """Return (train, validation). An instruction or first user turn is in one of them only.

    Few instructions over many contexts cannot be parted so and give the share asked for. Then it is instruction and
    context, or all turns before the first answer, that stand in one file only.
    """
    for key in ("split_hash", "prompt_hash"):
        distinct = table[key].n_unique()
        in_validation = (
            pick_share(table[key], fraction) if distinct > 1 else pl.repeat(False, table.height, eager=True)
        )
        missed = abs(in_validation.sum() - table.height * fraction)
        if distinct > 1 and missed <= max(SPLIT_TOLERANCE * table.height * fraction, SPLIT_TOLERANCE_ROWS):
            break
        if key == "split_hash" and table["prompt_hash"].n_unique() > distinct:
            say(
                started,
                f"WARNING: only {distinct:,} different instructions or first turns in {table.height:,} rows, "
                f"too few for --validation_fraction {fraction}: one may stand in both files, with another context",
            )
    if distinct < 2:
        raise ValueError(
            f"{table.height} rows with {distinct} different prompts are left, two are needed for a split; see the "
            "counts above, then name more files, a larger --sample_fraction or, for a .txt, a smaller --text_chars"
        )
    return table.filter(~in_validation), table.filter(in_validation)


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reporting


def write_pair(folder, tables, spool):
    """Copy each table's rows out of `spool` under SPLIT_NAMES."""
    for name, table in zip(SPLIT_NAMES, tables, strict=True):
        with open(folder / name, "wb") as file:
            for offset in table["offset"]:
                spool.seek(offset)
                file.write(spool.readline())


def show_counts(counts, named):
    """Print the first rows dropped for each reason and the table of counts; dropped and kept add up to read."""
    reasons = sorted(name for name in counts if name.startswith("dropped: "))
    for reason in (reason for reason in reasons if reason in named):
        more = counts[reason] - len(named[reason])
        print(f"{reason}: {', '.join(named[reason])}" + (f" and {more:,} more" if more else ""))
    lines = [("rows read", counts["read"]), *((f"  {reason}", counts[reason]) for reason in reasons)]
    lines += [("  not sampled", counts["not sampled"]), ("rows kept", counts["train"] + counts["validation"])]
    lines += [(f"  {name}", counts[name]) for name in ("train", "validation", "with a prompt seen before")]
    lines += [("  empty system messages left out", counts["empty system messages"])]
    print("\n".join(f"{title:<40}{count:>12,}" for title, count in lines))


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Arguments and the heads of the files: what can be known to be wrong is said before the work.
    started = time.perf_counter()
    args = parse_args(argv)
    output = Output(args.output_dir, "prepare_instruct", describe_command(args, *args.input_file))
    if output.is_finished():
        return
    chosen, problems = choose_layouts(args)
    problems = check_args(args) + problems
    if problems:
        raise SystemExit(refuse("prepare_instruct.py", problems))

    counts, named, output_dir = Counter(), {}, Path(args.output_dir)
    try:
        # Without a name, so that nothing of it stays behind; beside the output, since /tmp is often small.
        with tempfile.TemporaryFile(dir=nearest_folder(output_dir)) as spool:
            # 2. Read, clean, drop duplicates
            table = read_and_spool(chosen, args, spool, counts, named, started)

            # 3. Sample and split. A plain text keeps its order; all else is shuffled by hash.
            table = take_sample(table, args.sample_fraction, counts)
            if any("text" in fields for _, fields, _ in chosen.values()):
                table = table.sort("offset")
            counts["train"] = table.height  # should the split fail, the table still adds up
            counts["with a prompt seen before"] = table.height - table["split_hash"].n_unique()
            train, validation = split_rows(table, args.validation_fraction, started)
            counts.update(validation=validation.height, train=-validation.height)

            # 4. Write
            output.write(lambda folder: write_pair(folder, (train, validation), spool))
            say(started, "written")
    except (ValueError, OSError) as error:
        if counts["read"]:
            show_counts(counts, named)
        problem = explain_disk_fault(error, output_dir) or str(error)
        raise SystemExit(refuse("prepare_instruct.py", [problem])) from None

    # 5. Report
    show_counts(counts, named)
    for path in (output_dir / name for name in SPLIT_NAMES):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
