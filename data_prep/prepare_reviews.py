# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["polars>=1.0", "pyarrow"]
# ///
"""Turn product reviews into train.csv and validation.csv with the columns review_body, review_headline, product_id.

The body is the text to summarize, the headline its summary. HTML goes out, long texts are cut at the end of a
sentence, empty rows and duplicates are dropped, and no body stands in both files. What is dropped is counted.

The classic Amazon Customer Reviews TSV, gzipped or not:

    python data_prep/prepare_reviews.py --input_file amazon_reviews_us_Camera_v1_00.tsv.gz --output_dir data/reviews \
        --drop_star_headlines

Amazon Reviews 2023, a tenth of two categories:

    python data_prep/prepare_reviews.py --input_file Electronics.jsonl.gz Appliances.jsonl.gz \
        --output_dir data/reviews --drop_star_headlines --sample_fraction 0.1

Any other table:

    python data_prep/prepare_reviews.py --input_file mine.csv --output_dir data/mine \
        --body_column comment --headline_column title --product_column sku

Cleaned on a Spark cluster, written as Parquet; the rows are those of the other engines, in the same order:

    python data_prep/prepare_reviews.py --input_file /nfs/Electronics.jsonl.gz /nfs/Appliances.jsonl.gz \
        --output_dir data/reviews --engine spark --engine_address spark://head:7077 --output_format parquet

Cleaning is what takes the time, and each row's is its own: an engine spreads that over its workers. Spark reads there
as well, a task a file, so that its workers must see the files; with Ray this process reads. Duplicates, sample and
split are decided here, on the cleaned and cut rows, by the same code, whatever the engine. On one machine the default
is the fastest by far: Spark takes longer to start than polars for 500,000 rows.
"""

import argparse
import contextlib
import html
import importlib.util
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import Counter, deque
from html.entities import html5
from pathlib import Path

import polars as pl

import table_files
from brief_parser import BriefParser
from table_files import ending, pick_share, read_columns, read_rows, refuse, say, stable_hash, take_sample
from whole_files import Output, describe_command, find_folder_problems

# ---------------------------------------------------------------------------------------------------------------------
# Constants

OUTPUT_COLUMNS = ["review_body", "review_headline", "product_id"]
OUTPUT_STEMS = ("train", "validation")
OUTPUT_FORMATS = ("csv", "parquet")
KNOWN_ENDINGS = (".tsv", ".csv", ".jsonl", ".parquet")
COLUMN_FLAGS = ("--body_column", "--headline_column", "--product_column")
# Body, headline and product column of the layouts known by their columns.
LAYOUTS = (
    ("review_body", "review_headline", "product_id"),  # Amazon Customer Reviews, and what this script writes
    ("text", "title", "parent_asin"),  # Amazon Reviews 2023, https://amazon-reviews-2023.github.io
)
BATCH_ROWS = 100_000  # raw text held at a time; what is kept of a batch is already cleaned and cut
# Of another engine than polars: the library, and the rows that are sent to a worker at a time.
ENGINES = {"spark": "pyspark", "ray": "ray"}
SENT_ROWS = 10_000
START_SECONDS = 180  # longest wait for a cluster
PLACE_STEP = 2**32  # batches of a file are numbered from its number times this
READ = "place long, packed binary, faults string, num_faults long, error string"
CLEANED = "place long, packed binary, counts string, faults string, error string"
NAMED_ROWS = 5  # rows that could not be parsed which are named; all of them are counted

# Only real tag names: people write "<3", "<sarcasm>" and "a < b", and that is text. Inline tags may stand inside a
# word or before a comma and leave nothing behind; the others part two words and leave a space.
INLINE_TAGS = "a|abbr|b|big|em|font|i|mark|s|small|span|strike|strong|sub|sup|tt|u"
BLOCK_TAGS = "article|audio|blockquote|body|br|button|center|cite|code|div|dl|dd|dt|embed|figure|footer|form|h[1-6]"
BLOCK_TAGS += "|head|header|hr|html|iframe|img|input|label|li|link|meta|nav|object|ol|option|p|pre|q|script|section"
BLOCK_TAGS += "|select|source|style|table|tbody|td|textarea|th|thead|title|tr|ul|video"
TAG_END = r"(?:\s[^<>]*)?/?>"
INLINE = rf"(?i)</?(?:{INLINE_TAGS}){TAG_END}"
BLOCK = rf"(?is)<(?:script|style)\b[^>]*>.*?</(?:script|style)\s*>|</?(?:{BLOCK_TAGS}){TAG_END}|<!--.*?-->"
# Amazon's own marks: [[VIDEOID:9754c]] is no text, [[ASIN:B000ZEXKJE GumDrop Pacifier]] stands for its title.
VIDEO_MARK = r"(?i)\[\[VIDEOID:[^\]]*\]\]"
ASIN_MARK = r"(?i)\[\[ASIN:\w+ ?([^\]]*)\]\]"
# With the semicolon: without it html.unescape would turn "fish&notes" into "fish¬es".
ENTITY = r"&(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
DECODE_ROUNDS = 3  # "&amp;amp;#34;" is a quote escaped twice over
BLANKS = r"[\s\p{Z}\p{Cc}\x{FEFF}\x{200B}&&[^ ]]+"  # any white space or control character but the plain space

# A sentence ends with one of these and its closing quotes. Before a full stop stand two characters that are none, so
# that "e.g." and "U.S." end nothing.
SENTENCES = r"^(.*(?:[!?…]|[^\s.]{2}\.|\.\.)[\"'”’)\]*]*)(?: |$)"
TITLES = r"\b((?i:mr|mrs|ms|dr|st|jr|sr|vs|approx))\."  # their full stop ends no sentence
HELD_STOP = "\x01"  # stands in for that full stop; control characters have been cleaned out by then

NUMBER = r"(?:zero|half|one|two|three|four|five|six|seven|eight|nine|ten|[0-9]+(?:[.,][0-9]+)?)"
# "Five Stars", "4 stars!", "a 5-star rating", "4 1/2 stars", "4 out of 5 stars", "10+ stars", "5*", "★★★★★"
PARTS = rf"(?: ?(?:/|out of|of) ?{NUMBER}|(?: and)? [0-9]/[0-9]|(?: and)? ?[¼½¾]| and an? half|\+)?"
STAR_HEADLINE = (
    rf"(?i)^(?:[\W_]|\x{{FE0F}})*(?:an? )?(?:{NUMBER}{PARTS}[ -]*(?:stars?\b|[*★☆⭐]+)|[*★☆⭐][*★☆⭐ ]*)"
    r"(?: ?(?:rating|review)s?)?(?:[\W_]|\x{FE0F})*$"  # FE0F follows many an emoji and counts as a letter
)

# Rows of the table at the end, in order. The reasons are tried in this order: a row counts for the first that holds.
DROP_REASONS = (
    "could not be parsed",
    "empty body",
    "empty headline",
    "star headline",
    "duplicate",
    "not sampled",
)


# ---------------------------------------------------------------------------------------------------------------------
# Arguments


def parse_args(argv=None):
    """Return the parsed command line; BriefParser ends the program with exit code 2 on an unknown flag."""
    parser = BriefParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--input_file", nargs="+", required=True, help=f"Files of {', '.join(KNOWN_ENDINGS)}; text ones also .gz.")
    add("--output_dir", required=True, help="Folder for train and validation; neither may exist yet.")
    add("--output_format", choices=OUTPUT_FORMATS, default="csv", help="train.csv or train.parquet, and so on.")
    add("--engine", choices=("polars", *ENGINES), default="polars", help="Where rows are cleaned; the rows are equal.")
    add("--engine_address", default=None, help="Of the cluster: spark://host:port, or Ray's. None: this machine.")
    add("--body_column", default=None, help="Column with the text to summarize. None: recognised from the columns.")
    add("--headline_column", default=None, help="Column with the summary. None: recognised from the columns.")
    add("--product_column", default=None, help="Column with the product's id. None: recognised from the columns.")
    add("--max_source_words", type=int, default=100, help="Longer bodies are cut at the last end of a sentence.")
    add("--max_target_words", type=int, default=40, help="Longer headlines are cut at the last end of a sentence.")
    add("--drop_star_headlines", action="store_true", help='Drop headlines like "Five Stars": they say no more.')
    add("--sample_fraction", type=float, default=1.0, help="Share of the clean rows to keep, above 0, at most 1.")
    add("--validation_fraction", type=float, default=0.1, help="Share of the kept rows for validation, in (0, 1).")
    add("--seed", type=int, default=42, help="Seed of sample, split and order; the same seed gives the same bytes.")
    return parser.parse_args(argv)


def check_args(args):
    """Return every problem with the arguments as a list of sentences; check_inputs looks at the files."""
    problems = []
    for flag in ("max_source_words", "max_target_words"):
        if getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: at least 1 is needed")
    if not 0 < args.sample_fraction <= 1:
        problems.append(f"--sample_fraction {args.sample_fraction}: must be above 0 and at most 1 (1: all rows)")
    if not 0 < args.validation_fraction < 1:
        problems.append(f"--validation_fraction {args.validation_fraction}: must be above 0 and below 1, such as 0.1")
    wanted = Counter(name for name in (args.body_column, args.headline_column, args.product_column) if name)
    for name in (name for name, count in wanted.items() if count > 1):
        problems.append(f"{', '.join(COLUMN_FLAGS)}: {name} is named more than once; name another column for each")
    return problems + check_engine(args.engine, args.engine_address) + check_output(name_outputs(args))


def check_engine(engine, address):
    """Return what keeps an engine from starting as a list of sentences."""
    if engine == "polars":
        return ["--engine_address: goes with --engine spark or ray; leave it out"] if address else []
    library = ENGINES[engine]
    if importlib.util.find_spec(library) is None:
        return [f"--engine {engine}: {library} is not installed; pip install {library}, or leave --engine out"]
    if engine == "spark" and (problem := find_java_problem()):
        return [f"--engine spark: {problem}; install Java 17 or later, or leave --engine out"]
    return []


def find_java_problem():
    """Return where Spark would look for Java in vain; None if it is there."""
    home = os.environ.get("JAVA_HOME")
    if shutil.which(os.path.join(home, "bin", "java") if home else "java"):
        return None
    return f"there is no java {f'in JAVA_HOME={home}' if home else 'on the PATH, and JAVA_HOME is not set'}"


def name_outputs(args):
    """Return the paths of the two files."""
    return [Path(args.output_dir) / f"{stem}.{args.output_format}" for stem in OUTPUT_STEMS]


def check_output(paths):
    """Return every reason why the two files cannot be made in their folder as a list of sentences."""
    found = [str(path) for path in paths if os.path.lexists(path)]
    there = f"{' and '.join(found)} exist{'s' if len(found) == 1 else ''} already"
    problems = [f"--output_dir {paths[0].parent}: {there}; remove them or name another --output_dir"] if found else []
    return problems + find_folder_problems(paths[0].parent, must_be_empty=False)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def choose_columns(path, columns, asked):
    """Return the body, headline and product column of a file: those `asked` for, the others as the layouts say."""
    listed = ", ".join(columns)
    missing = [
        f"{flag} {name}" for flag, name in zip(COLUMN_FLAGS, asked, strict=True) if name and name not in columns
    ]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: no such column in {path}; it has: {listed}")
    for layout in LAYOUTS:
        names = [want or known for want, known in zip(asked, layout, strict=True)]
        if all(columns.count(name) == 1 for name in names) and len(set(names)) == 3:
            return names
    layouts = " or ".join(f"({', '.join(layout)})" for layout in LAYOUTS)
    raise ValueError(
        f"--input_file {path}: the columns are none of the known layouts {layouts}; it has: {listed}. "
        f"Name the three with {', '.join(COLUMN_FLAGS)}"
    )


def check_inputs(paths, asked):
    """Return ({path: its three columns}, problems); only the head of each file is read."""
    chosen, problems = {}, []
    for path in dict.fromkeys(paths):
        try:
            chosen[path] = choose_columns(path, read_columns("input_file", path, KNOWN_ENDINGS), asked)
        except ValueError as error:
            problems.append(str(error))
    return chosen, problems


def find_fault(fields, names):
    """Return why a row's three fields cannot be used, None if they can: each must be text that UTF-8 can hold."""
    for field, name in zip(fields, names, strict=True):
        if field is None:
            return f"{name} is null or absent"
        if not isinstance(field, str):
            return f"{name} is {type(field).__name__}, not text"
        try:
            field.encode("utf-8")
        except UnicodeEncodeError:
            return f"{name} holds half of a surrogate pair"
    return None


def read_rows_of(path, names):
    """Yield (place, fields, fault) for every row of a file; fault is None, or says why fields is of no use."""
    unit = "row" if ending(path) == ".parquet" else "line"
    for number, row in read_rows(path, names):
        fields, fault = None, row
        if not isinstance(row, str):
            fields = [row.get(name) for name in names]
            if isinstance(fields[2], int | float):  # some shops number their products
                fields[2] = str(fields[2])
            fault = find_fault(fields, names)
        yield f"{path}: {unit} {number}", fields, fault


def read_batches(path, names):
    """Yield (table with the three output columns, [faults]) for every BATCH_ROWS rows of a file."""
    rows = read_rows_of(path, names)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        faults = [f"{place}: {fault}" for place, _, fault in batch if fault]
        good = [fields for _, fields, fault in batch if not fault]
        columns = zip(*good, strict=True) if good else ([], [], [])
        data = {name: list(column) for name, column in zip(OUTPUT_COLUMNS, columns, strict=True)}
        yield pl.DataFrame(data, schema=dict.fromkeys(OUTPUT_COLUMNS, pl.String)), faults


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning


def strip_markup(texts):
    """Return a Series of texts without HTML tags, comments and Amazon's double-bracket marks."""
    texts = texts.str.replace_all(INLINE, "").str.replace_all(BLOCK, " ")
    return texts.str.replace_all(VIDEO_MARK, " ").str.replace_all(ASIN_MARK, " $1 ")


def decode_entity(entity):
    """Return the character of '&quot;' or '&#34;'; a name that HTML does not know stays as it is."""
    return html.unescape(entity) if entity[1] == "#" or entity[1:] in html5 else entity


def clean_texts(texts):
    """Return a Series of texts without tags and entities, white space folded to single spaces.

    Tags go before the entities are decoded, since an attribute may hold a decoded '>', and once more after that,
    since '&lt;br&gt;' is a tag in disguise.
    """
    for _ in range(DECODE_ROUNDS):
        texts = strip_markup(texts)
        # The distinct entities of a batch are a few dozen, so Python decodes those and never a row.
        found = texts.filter(texts.str.contains(ENTITY)).str.extract_all(ENTITY).explode().drop_nulls().unique()
        decoded = {entity: decode_entity(entity) for entity in sorted(found.to_list())}
        if all(entity == text for entity, text in decoded.items()):
            break
        texts = texts.str.replace_many(list(decoded), list(decoded.values()))
    texts = strip_markup(texts)
    return texts.str.replace_all(BLANKS, " ").str.replace_all(r" {2,}", " ").str.strip_chars(" ")


def cut_texts(texts, max_words):
    """Return (texts of at most max_words words, which were cut): at the end of a sentence, or else of a word."""
    is_long = texts.str.count_matches(" ", literal=True) >= max_words
    if not is_long.any():
        return texts, is_long
    heads = texts.filter(is_long).str.split(" ").list.head(max_words).list.join(" ")
    sentences = heads.str.replace_all(TITLES, f"${{1}}{HELD_STOP}").str.extract(SENTENCES, 1)
    sentences = sentences.str.replace_all(HELD_STOP, ".", literal=True)
    cut = sentences.zip_with(sentences.is_not_null(), heads)
    return texts.scatter(is_long.arg_true(), cut), is_long


def clean_batch(table, args, counts):
    """Return the rows of a batch worth keeping, cleaned, cut and hashed; `counts` gains what was dropped and why."""
    table = table.with_columns(
        review_body=clean_texts(table["review_body"]),
        review_headline=clean_texts(table["review_headline"]),
        product_id=table["product_id"].str.strip_chars(),
    )
    tests = {"empty body": pl.col("review_body") == "", "empty headline": pl.col("review_headline") == ""}
    if args.drop_star_headlines:
        tests["star headline"] = pl.col("review_headline").str.contains(STAR_HEADLINE)
    for reason, test in tests.items():
        kept = table.filter(~test)
        counts[reason] += table.height - kept.height
        table = kept
    bodies, body_cut = cut_texts(table["review_body"], args.max_source_words)
    headlines, headline_cut = cut_texts(table["review_headline"], args.max_target_words)
    # Case-folded: "GREAT!" in train and "Great!" in validation would be a leak too.
    split_hash = stable_hash((body.casefold() for body in bodies), "split", args.seed)
    row_hash = stable_hash((f"{b}\n{h}" for b, h in zip(bodies, headlines, strict=True)), "row", args.seed)
    return table.with_columns(
        review_body=bodies,
        review_headline=headlines,
        body_cut=body_cut,
        headline_cut=headline_cut,
        split_hash=split_hash,
        row_hash=row_hash,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Engines: each yields (table of cleaned rows, first faults, counts) for every batch, in the order of the files


def clean_here(chosen, args):
    """Clean in this process, as many rows at a time as are read."""
    for path, names in chosen.items():
        for table, faults in read_batches(path, names):
            counts = Counter({"read": table.height + len(faults), "could not be parsed": len(faults)})
            yield clean_batch(table, args, counts), faults, counts


def send_batches(path, names):
    """Yield (rows as Arrow bytes, first faults as JSON, their number) for every SENT_ROWS rows of a file."""
    for table, faults in read_batches(path, names):
        for part in table.iter_slices(SENT_ROWS) if table.height else [table]:
            yield pack(part), json.dumps(faults[:NAMED_ROWS]), len(faults)
            faults = []


def pack(table):
    """Return a table as bytes: so it travels as it is, nulls, empty texts and unsigned numbers included."""
    stream = io.BytesIO()
    table.write_ipc(stream)
    return stream.getvalue()


def clean_packed(packed, num_faults, args):
    """Return (packed table of the cleaned rows, counts as JSON) of a packed batch."""
    table = pl.read_ipc(io.BytesIO(packed))
    counts = Counter({"read": table.height + num_faults, "could not be parsed": num_faults})
    cleaned = clean_batch(table, args, counts)
    return pack(cleaned), json.dumps(counts)


def unpack(packed, counts, faults):
    """Return (table, faults, counts) of a batch that came back."""
    return pl.read_ipc(io.BytesIO(packed)), json.loads(faults), json.loads(counts)


def send_by_value(cloudpickle):
    """Have the functions of this file sent to the workers, who do not have it, whoever imported it here."""
    cloudpickle.register_pickle_by_value(table_files)
    if __name__ != "__main__":  # of a program they are anyway
        cloudpickle.register_pickle_by_value(sys.modules[__name__])


@contextlib.contextmanager
def start_limit(what):
    """End the program with exit code 2 if a cluster has not answered in START_SECONDS: py4j and Ray go on waiting."""

    def give_up(signum, frame):
        os._exit(refuse(Path(sys.argv[0]).name, [f"{what} did not start in {START_SECONDS} s"]))

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(START_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def start_spark(address):
    """Return a Spark session at this master (None: this machine) whose workers start this very Python."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if address is None:
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # nothing here needs to be seen from outside
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
    builder = SparkSession.builder.master(address or "local[*]").config("spark.log.level", "ERROR")
    builder = builder.config("spark.ui.enabled", "false").config("spark.ui.showConsoleProgress", "false")
    try:
        with start_limit(f"Spark at {address or 'local[*]'}"):
            return builder.config("spark.driver.maxResultSize", "0").getOrCreate()
    except Exception as error:  # py4j, Spark and Java each raise their own
        raise ValueError(f"Spark at {address or 'local[*]'} did not start: {str(error).splitlines()[0]}") from error


def read_for_spark(tables):
    """Yield a table of one packed batch (READ) for every batch of the files that are rows of `tables`."""
    for table in tables:
        for number, path, absolute, names in table.itertuples(index=False):
            start = number * PLACE_STEP
            try:
                for place, (packed, faults, num_faults) in enumerate(send_batches(absolute, list(names)), start):
                    faults = faults.replace(json.dumps(absolute)[1:-1], json.dumps(path)[1:-1])
                    yield type(table)([(place, packed, faults, num_faults, "")])
            except ValueError as error:
                yield type(table)([(start, b"", "[]", 0, str(error).replace(absolute, path))])


def clean_on_spark(chosen, args):
    """Read in a task a file and clean in as many tasks as there are slots; ValueError as when reading here."""
    from pyspark import cloudpickle

    send_by_value(cloudpickle)
    spark = start_spark(args.engine_address)

    def clean(tables):
        for table in tables:
            for place, packed, faults, num_faults, error in table.itertuples(index=False):
                cleaned = (b"", "{}") if error else clean_packed(packed, num_faults, args)
                yield type(table)([(place, *cleaned, faults, error)])

    files = [(number, path, os.path.abspath(path), chosen[path]) for number, path in enumerate(chosen)]
    files = spark.createDataFrame(files, "number long, path string, absolute string, names array<string>")
    read = files.repartition(len(chosen), "number").mapInPandas(read_for_spark, READ)
    tasks = 4 * max(spark.sparkContext.defaultParallelism, 1)
    rows = read.repartition(tasks).mapInPandas(clean, CLEANED).collect()
    for _, packed, counts, faults, error in sorted(rows):
        if error:
            raise ValueError(error)
        yield unpack(packed, counts, faults)


def clean_on_ray(chosen, args):
    """Read here and clean in Ray's tasks, a few batches ahead."""
    import ray

    send_by_value(ray.cloudpickle)
    if not ray.is_initialized():
        address = args.engine_address or "local"  # without one Ray looks for a cluster that someone left running
        try:
            with start_limit(f"Ray at {address}"):
                ray.init(address=address, logging_level="ERROR")
        except Exception as error:  # Ray raises several kinds
            raise ValueError(f"Ray at {address} did not start: {str(error).splitlines()[0]}") from error
    clean = ray.remote(num_returns=2)(clean_packed)
    ahead = 2 * int(ray.cluster_resources().get("CPU", 1))
    waiting = deque()
    for path, names in chosen.items():
        for packed, faults, num_faults in send_batches(path, names):
            waiting.append([*clean.remote(packed, num_faults, args), faults])
            if len(waiting) > ahead:
                *references, faults = waiting.popleft()
                yield unpack(*ray.get(references), faults)
    for *references, faults in waiting:
        yield unpack(*ray.get(references), faults)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling and splitting


def drop_duplicates(table, counts):
    """Return the table without the rows whose body and headline, as cleaned and cut, stood in it before."""
    kept = table.unique(subset=["review_body", "review_headline"], keep="first", maintain_order=True)
    counts["duplicate"] += table.height - kept.height
    return kept


def split_table(table, fraction):
    """Return (train, validation); rows whose bodies differ in nothing but case go the same way."""
    if table["split_hash"].n_unique() < 2:
        raise ValueError(
            f"{table.height} rows with {table['split_hash'].n_unique()} different bodies are left, two are needed for "
            "a split; see the counts above, then name more files or a larger --sample_fraction"
        )
    in_validation = pick_share(table["split_hash"], fraction)
    return table.filter(~in_validation), table.filter(in_validation)


# ---------------------------------------------------------------------------------------------------------------------
# Writing and reporting


def write_splits(folder, names, tables):
    """Write the tables into a folder, CSV or Parquet."""
    for name, table in zip(names, tables, strict=True):
        table = table.select(OUTPUT_COLUMNS)
        table.write_parquet(folder / name) if name.endswith(".parquet") else table.write_csv(folder / name)


def format_counts(counts):
    """Return the table of counts as text; what was dropped and what was kept add up to what was read."""
    lines = [("rows read", counts["read"])]
    lines += [(f"  dropped: {reason}", counts[reason]) for reason in DROP_REASONS]
    lines += [("rows kept", counts["train"] + counts["validation"])]
    lines += [(f"  {name}", counts[name]) for name in ("train", "validation")]
    lines += [("  bodies cut", counts["body_cut"]), ("  headlines cut", counts["headline_cut"])]
    return "\n".join(f"{title:<32}{count:>12,}" for title, count in lines)


def read_and_clean(chosen, args, counts, started):
    """Return (one table of the cleaned rows of all files, the first faults); `counts` gains what was seen."""
    tables, faults = [], []
    for path, names in chosen.items():
        say(started, f"input {path}: {', '.join(names)}")
    clean = {"polars": clean_here, "spark": clean_on_spark, "ray": clean_on_ray}[args.engine]
    for table, faulty, dropped in clean(chosen, args):
        counts.update(dropped)
        faults += faulty[: NAMED_ROWS - len(faults)]
        tables.append(table)
        say(started, f"{counts['read']:,} rows read and cleaned")
    if not tables:
        raise ValueError(f"no rows below the header in {', '.join(chosen)}; name other files")
    return pl.concat(tables), faults


# ---------------------------------------------------------------------------------------------------------------------


def main(argv=None):
    # 1. Arguments and the heads of the files: what can be known to be wrong is said before the work.
    started = time.perf_counter()
    args = parse_args(argv)
    output = Output(args.output_dir, f"reviews.{args.output_format}", describe_command(args, *args.input_file))
    if output.is_finished():
        return
    chosen, problems = check_inputs(args.input_file, (args.body_column, args.headline_column, args.product_column))
    problems = check_args(args) + problems
    if problems:
        raise SystemExit(refuse("prepare_reviews.py", problems))

    counts = Counter()
    try:
        # 2. Read, clean and cut, a batch at a time
        table, faults = read_and_clean(chosen, args, counts, started)
        for fault in faults:
            print(f"could not be parsed: {fault}")
        if counts["could not be parsed"] > len(faults):
            print(f"could not be parsed: {counts['could not be parsed'] - len(faults):,} more")

        # 3. Duplicates, sample, split
        table = take_sample(drop_duplicates(table, counts), args.sample_fraction, counts)
        counts.update(body_cut=table["body_cut"].sum(), headline_cut=table["headline_cut"].sum())
        counts["train"] = table.height  # should the split fail, the table still adds up
        say(started, "duplicates dropped, sample taken")
        train, validation = split_table(table, args.validation_fraction)
        counts.update(validation=validation.height, train=-validation.height)

        # 4. Write
        paths = name_outputs(args)
        output.write(lambda folder: write_splits(folder, [path.name for path in paths], (train, validation)))
        say(started, "written")
    except (ValueError, OSError) as error:
        if counts["read"]:
            print(format_counts(counts))
        raise SystemExit(refuse("prepare_reviews.py", [str(error)])) from None

    # 5. Report
    print(format_counts(counts))
    for path in paths:
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
