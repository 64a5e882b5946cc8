# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""data_prep/prepare_reviews.py: clean rows, no body in both files, every dropped row counted, no bad input unnamed."""

import csv
import gzip
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

SCRIPT = Path(__file__).parents[1] / "data_prep" / "prepare_reviews.py"
spec = importlib.util.spec_from_file_location("prepare_reviews", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

AMAZON = (
    "marketplace customer_id review_id product_id product_parent product_title product_category star_rating "
    "helpful_votes total_votes vine verified_purchase review_headline review_body review_date"
).split()


def clean(text):
    return prepare.clean_texts(pl.Series([text]))[0]


def cut(text, words):
    texts, was_cut = prepare.cut_texts(pl.Series([text]), words)
    return texts[0], was_cut[0]


def is_star(headline):
    return pl.Series([headline]).str.contains(prepare.STAR_HEADLINE)[0]


def make_reviews(count):
    return [(f"Review {i} says it works. It is number {i}.", f"Headline {i}", f"B{i % 7}") for i in range(count)]


def write_tsv(path, reviews):
    rows = [
        dict.fromkeys(AMAZON, "x") | {"review_body": body, "review_headline": headline, "product_id": product}
        for body, headline, product in reviews
    ]
    lines = ["\t".join(AMAZON)] + ["\t".join(row.values()) for row in rows]
    text = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def run(files, output_dir, *flags):
    files = files if isinstance(files, list) else [files]
    prepare.main(["--input_file", *map(str, files), "--output_dir", str(output_dir), *map(str, flags)])
    return [read_output(output_dir / name) for name in ("train.csv", "validation.csv")]


def read_output(path):
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["review_body", "review_headline", "product_id"]
    return rows


def refusal(capsys, files, output_dir, *flags):
    """Return the message of a run that must end with exit code 2 and leave no file behind."""
    before = sorted(Path(output_dir).glob("*")) if Path(output_dir).is_dir() else []
    with pytest.raises(SystemExit) as error:
        run(files, output_dir, *flags)
    assert error.value.code == 2
    assert (sorted(Path(output_dir).glob("*")) if Path(output_dir).is_dir() else []) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def printed_counts(text):
    """Return {title: number} of the table of counts."""
    pairs = (line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith(("rows", "  ")))
    return {title.strip().removeprefix("dropped: "): int(number.replace(",", "")) for title, number in pairs}


def test_training_knows_the_columns_that_are_read_and_written():
    from run_summarization import KNOWN_COLUMNS

    assert tuple(prepare.OUTPUT_COLUMNS[:2]) in KNOWN_COLUMNS
    assert {layout[:2] for layout in prepare.LAYOUTS} <= set(KNOWN_COLUMNS)


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning


@pytest.mark.parametrize(
    "dirty, expected",
    [
        ("Great.<br /><br />Buy it.<BR>Now", "Great. Buy it. Now"),
        ("so <b>very</b>, <i class='x'>very</i> good", "so very, very good"),
        ("they call it &#34;pro&#34; &amp; smile &#x2764;", 'they call it "pro" & smile ❤'),
        ("twice escaped: &amp;#34;hi&amp;#34;", 'twice escaped: "hi"'),
        ("a disguised &lt;br /&gt;tag", "a disguised tag"),
        ("<a href='x&quot;y&gt;z'>link</a> text", "link text"),
        ("white\tspace \u00a0 folded\r\n  &nbsp; here ", "white space folded here"),
        ("I &lt;3 it, 5 < 6 and <sarcasm>", "I <3 it, 5 < 6 and <sarcasm>"),
        ("fish&notes at AT&T, &unknown; too", "fish&notes at AT&T, &unknown; too"),
        ("[[VIDEOID:9754c0]] A video of [[ASIN:B000ZEXKJE GumDrop Pacifier]].", "A video of GumDrop Pacifier ."),
        ("one<!-- no text -->two", "one two"),
        (" <br/> &nbsp; ", ""),
    ],
)
def test_tags_and_entities_go_and_text_stays(dirty, expected):
    assert clean(dirty) == expected


@pytest.mark.parametrize(
    "text, words, expected",
    [
        ("One two. Three four five.", 5, "One two. Three four five."),
        ("One two. Three four five.", 4, "One two."),
        ("One two three four five.", 4, "One two three four"),
        ('He said "it works!" and went away.', 5, 'He said "it works!"'),
        ("It fits. Ask Dr. Smith about it.", 5, "It fits."),
        ("It fits e.g. the red one.", 4, "It fits e.g. the"),
        ("no full stops here at all", 3, "no full stops"),
    ],
)
def test_long_texts_end_at_a_sentence_or_else_at_a_word(text, words, expected):
    assert cut(text, words) == (expected, expected != text)


STAR_HEADLINES = ["Five Stars", "five stars", "4 stars", "1 star", "One Star!", "5-star", "a five star rating", "5*"]
STAR_HEADLINES += ["4 1/2 stars", "4 and 3/4 stars", "4.5 stars", "4 out of 5 stars", "5/5 stars", "10+ stars"]
STAR_HEADLINES += ["★★★★★", "⭐️ Five Stars ⭐️"]


@pytest.mark.parametrize("headline", STAR_HEADLINES)
def test_star_headlines_are_recognised(headline):
    assert is_star(headline)


@pytest.mark.parametrize("headline", ["five star pump!", "Junk, zero stars", "the star was the best part", "5 starts"])
def test_headlines_that_say_more_than_stars_are_not(headline):
    assert not is_star(headline)


# ---------------------------------------------------------------------------------------------------------------------
# Readers


@pytest.mark.parametrize("name", ["a.tsv", "a.tsv.gz"])
def test_amazon_tsv_is_recognised_and_quotes_and_na_are_text(tmp_path, name):
    odd = [('A 5" lens, he said "wow', "NA", "B1"), ("None", 'say "null', "007")]
    train, validation = run(write_tsv(tmp_path / name, odd + make_reviews(20)), tmp_path / "out")
    assert sorted(map(tuple, train + validation)) == sorted(odd + make_reviews(20))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_amazon_2023_jsonl_is_recognised(tmp_path, name):
    lines = [json.dumps(dict(rating=5.0, title=h, text=b, parent_asin=p)) for b, h, p in make_reviews(20)]
    text = "\n\n".join(lines).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    train, validation = run(tmp_path / name, tmp_path / "out")
    assert sorted(map(tuple, train + validation)) == sorted(make_reviews(20))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_any_table_is_read_by_the_columns_named(tmp_path, name):
    frame = pl.DataFrame(make_reviews(20), schema=["comment", "summary", "sku"], orient="row")
    frame = frame.with_columns(other=pl.lit('with "quotes",\nand a line end'))
    path = tmp_path / name
    if name == "a.parquet":
        frame.write_parquet(path)
    else:
        text = (frame.write_ndjson() if name == "a.jsonl" else frame.write_csv()).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    flags = ["--body_column", "comment", "--headline_column", "summary", "--product_column", "sku"]
    train, validation = run(path, tmp_path / "out", *flags)
    assert sorted(map(tuple, train + validation)) == sorted(make_reviews(20))


def test_several_files_of_different_kinds_are_read_together(tmp_path):
    reviews = make_reviews(30)
    tsv = write_tsv(tmp_path / "a.tsv", reviews[:15])
    frame = pl.DataFrame(reviews[15:], schema=["text", "title", "parent_asin"], orient="row")
    frame.write_parquet(tmp_path / "b.parquet")
    train, validation = run([tsv, tmp_path / "b.parquet"], tmp_path / "out")
    assert sorted(map(tuple, train + validation)) == sorted(reviews)


def test_a_byte_order_mark_and_windows_line_ends_are_no_text(tmp_path):
    text = write_tsv(tmp_path / "a.tsv", make_reviews(20)).read_bytes()
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    train, validation = run(tmp_path / "a.tsv", tmp_path / "out")
    assert sorted(map(tuple, train + validation)) == sorted(make_reviews(20))


def test_batches_give_the_same_rows_as_one_read(tmp_path, monkeypatch):
    path = write_tsv(tmp_path / "a.tsv", make_reviews(50) * 2)
    whole = run(path, tmp_path / "whole")
    monkeypatch.setattr(prepare, "BATCH_ROWS", 7)
    assert run(path, tmp_path / "batches") == whole


# ---------------------------------------------------------------------------------------------------------------------
# Split, sample, bytes


def test_no_body_stands_in_both_files_whatever_its_case(tmp_path):
    bodies = [f"Text number {i % 40}" for i in range(400)]
    reviews = [(b.upper() if i % 3 else b, f"Headline {i}", "B1") for i, b in enumerate(bodies)]
    train, validation = run(write_tsv(tmp_path / "a.tsv", reviews), tmp_path / "out", "--validation_fraction", 0.25)
    assert len(train) == 300 and len(validation) == 100
    assert not {row[0].lower() for row in train} & {row[0].lower() for row in validation}


def test_bodies_that_are_equal_only_after_the_cut_stay_together(tmp_path):
    reviews = [(f"Body {i % 20} ends. Then it goes on {i} more words.", f"Headline {i}", "B1") for i in range(200)]
    flags = ["--max_source_words", 4, "--validation_fraction", 0.3]
    train, validation = run(write_tsv(tmp_path / "a.tsv", reviews), tmp_path / "out", *flags)
    assert {row[0] for row in train + validation} == {f"Body {i} ends." for i in range(20)}
    assert not {row[0] for row in train} & {row[0] for row in validation}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_validation_is_as_large_as_asked(tmp_path, fraction):
    _, validation = run(
        write_tsv(tmp_path / "a.tsv", make_reviews(1000)), tmp_path / "out", "--validation_fraction", fraction
    )
    assert len(validation) == 1000 * fraction


def test_two_reviews_are_enough_for_a_split(tmp_path):
    train, validation = run(write_tsv(tmp_path / "a.tsv", make_reviews(2)), tmp_path / "out")
    assert len(train) == len(validation) == 1


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    path = write_tsv(tmp_path / "a.tsv", make_reviews(300))
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed, threads in zip(folders, (1, 1, 2), ("1", "2", "2"), strict=True):
        command = [sys.executable, SCRIPT, "--input_file", path, "--output_dir", folder]
        command += ["--seed", str(seed), "--sample_fraction", "0.5"]
        subprocess.run(command, check=True, env=os.environ | {"POLARS_MAX_THREADS": threads}, capture_output=True)
    first, second, other = [[(f / n).read_bytes() for n in ("train.csv", "validation.csv")] for f in folders]
    assert first == second
    assert first[0] != other[0] and first[1] != other[1]


def test_a_stable_hash_stays_what_it_was():
    assert prepare.stable_hash(["Great!"], "split", 42).to_list() == [1226887780945936572]


# ---------------------------------------------------------------------------------------------------------------------
# Counts


def test_every_row_read_is_in_the_table(tmp_path, capsys):
    reviews = make_reviews(100)
    reviews += [("<br />", "a headline", "B1"), ("a body", "&nbsp;", "B1"), ("a body", "Five Stars", "B1")] * 2
    reviews += [("Review 3 says it works.<br/>It is number 3.", "Headline 3", "B9")]
    reviews += [("One two three. " * 40, "word " * 50, "B1")]
    path = write_tsv(tmp_path / "a.tsv", reviews)
    with open(path, "a", encoding="utf-8") as file:
        file.write("only\tthree\tfields\n")
    train, validation = run(path, tmp_path / "out", "--drop_star_headlines", "--sample_fraction", 0.5)
    out = capsys.readouterr().out
    counts = printed_counts(out)
    drops = ("could not be parsed", "empty body", "empty headline", "star headline", "duplicate", "not sampled")
    assert counts["rows read"] == 109 == sum(counts[name] for name in (*drops, "train", "validation"))
    assert [counts[name] for name in drops] == [1, 2, 2, 2, 1, 51]  # of 101 clean rows 50 are nearest to a half
    assert (counts["train"], counts["validation"]) == (len(train), len(validation)) == (45, 5)
    assert f"{path}: line 110: 3 fields, the header has 15" in out
    assert str(tmp_path / "out" / "train.csv") in out and str(tmp_path / "out" / "validation.csv") in out


def test_cut_bodies_and_headlines_are_counted(tmp_path, capsys):
    reviews = make_reviews(10) + [("One two three. " * 40, "word " * 50, "B1"), ("Few.", "word " * 50, "B1")]
    train, validation = run(write_tsv(tmp_path / "a.tsv", reviews), tmp_path / "out")
    counts = printed_counts(capsys.readouterr().out)
    assert (counts["bodies cut"], counts["headlines cut"]) == (1, 2)
    assert max(len(row[0].split()) for row in train + validation) == 99  # 33 sentences of 3 words
    assert max(len(row[1].split()) for row in train + validation) == 40


def test_rows_with_null_or_odd_fields_are_counted_and_the_first_are_named(tmp_path, capsys):
    good = [json.dumps(dict(text=b, title=h, parent_asin=p)) for b, h, p in make_reviews(5)]
    bad = ['{"text": null, "title": "t", "parent_asin": "B1"}', '{"text": "b", "parent_asin": "B1"}']
    bad += [
        '{"text": ["b"], "title": "t", "parent_asin": "B1"}',
        r'{"text": "\ud83d", "title": "t", "parent_asin": 1}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(good + bad * 2) + "\n")
    run(tmp_path / "a.jsonl", tmp_path / "out")
    out = capsys.readouterr().out
    assert printed_counts(out)["could not be parsed"] == 8
    assert "a.jsonl: line 6: text is null or absent" in out
    assert "a.jsonl: line 7: title is null or absent" in out
    assert "a.jsonl: line 8: text is list, not text" in out
    assert "a.jsonl: line 9: text holds half of a surrogate pair" in out
    assert "3 more" in out


def test_nulls_in_parquet_are_named_by_row(tmp_path, capsys):
    frame = pl.DataFrame(make_reviews(9) + [(None, "t", "B1")], schema=["text", "title", "parent_asin"], orient="row")
    frame.write_parquet(tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out")
    assert "a.parquet: row 10: text is null or absent" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_all_mistakes_are_said_at_once(tmp_path, capsys):
    (tmp_path / "a.docx").write_text("x")
    flags = ["--sample_fraction", 1.5, "--validation_fraction", 1, "--max_source_words", 0, "--max_target_words", -1]
    flags += ["--body_column", "x", "--headline_column", "x"]
    message = refusal(capsys, [tmp_path / "none.tsv", tmp_path / "a.docx", tmp_path], tmp_path / "out", *flags)
    assert "none.tsv: no such file" in message
    assert "a.docx: unknown ending; known are .tsv, .csv, .jsonl, .parquet" in message
    assert "--sample_fraction 1.5: must be above 0 and at most 1" in message
    assert "--validation_fraction 1.0: must be above 0 and below 1" in message
    assert "--max_source_words 0" in message and "--max_target_words -1" in message
    assert "x is named more than once" in message
    assert not (tmp_path / "out").exists()


def test_missing_columns_are_named_with_those_there_are(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("comment,stars\nnice,5\n")
    message = refusal(capsys, tmp_path / "a.csv", tmp_path / "out")
    assert "a.csv" in message and "it has: comment, stars" in message and "--headline_column" in message
    message = refusal(capsys, tmp_path / "a.csv", tmp_path / "out", "--body_column", "remark")
    assert "--body_column remark: no such column in" in message and "it has: comment, stars" in message


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_an_empty_file_is_refused(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"")
    assert name in refusal(capsys, tmp_path / name, tmp_path / "out")


def test_a_file_with_a_header_alone_is_refused(tmp_path, capsys):
    assert "no rows below the header" in refusal(capsys, write_tsv(tmp_path / "a.tsv", []), tmp_path / "out")


def test_bytes_that_are_not_utf8_are_named_by_file_and_line(tmp_path, capsys):
    path = write_tsv(tmp_path / "a.tsv", make_reviews(3))
    path.write_bytes(path.read_bytes().replace(b"Review 1 ", b"Revi\xe9w 1 "))
    assert "a.tsv: line 3 is not UTF-8" in refusal(capsys, path, tmp_path / "out")


@pytest.mark.parametrize("broken", ['{"text": "b", "title"', "[1, 2]", "{} {}"])
def test_a_malformed_jsonl_line_is_named_by_file_and_line(tmp_path, capsys, broken):
    line = '{"text": "b", "title": "t", "parent_asin": "B1"}\n'
    (tmp_path / "a.jsonl").write_text(line * 200 + broken + "\n")
    assert "a.jsonl: line 201: not " in refusal(capsys, tmp_path / "a.jsonl", tmp_path / "out")


def test_a_quote_that_never_closes_is_named_by_file_and_line(tmp_path, capsys):
    (tmp_path / "a.csv").write_text('text,title,parent_asin\nb,t,B1\nb,"t,B1\nb,t,B1\n')
    assert "a.csv: line 3: the record that starts here is not CSV" in refusal(
        capsys, tmp_path / "a.csv", tmp_path / "out"
    )


def test_gzip_that_is_broken_off_or_none_is_refused(tmp_path, capsys):
    path = write_tsv(tmp_path / "a.tsv.gz", make_reviews(500))
    path.write_bytes(path.read_bytes()[:-200])
    assert "a.tsv.gz: cannot be read after line" in refusal(capsys, path, tmp_path / "out")
    path.write_bytes(b"plain text\n")
    assert "a.tsv.gz: cannot be read after line 0" in refusal(capsys, path, tmp_path / "out")


def test_a_parquet_file_that_is_none_is_refused(tmp_path, capsys):
    (tmp_path / "a.parquet").write_bytes(b"this is not parquet at all")
    assert "not a Parquet file" in refusal(capsys, tmp_path / "a.parquet", tmp_path / "out")


@pytest.mark.parametrize("name", ["train.csv", "validation.csv"])
def test_existing_output_is_never_overwritten(tmp_path, capsys, name):
    (tmp_path / name).write_text("precious")
    message = refusal(capsys, write_tsv(tmp_path / "a.tsv", make_reviews(9)), tmp_path)
    assert f"{name} exists already; remove them or name another --output_dir" in message
    assert (tmp_path / name).read_text() == "precious"


def test_an_output_dir_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "out").write_text("x")
    message = refusal(capsys, write_tsv(tmp_path / "a.tsv", make_reviews(9)), tmp_path / "out" / "deeper")
    assert "is a file, not a folder" in message


def test_nothing_left_to_split_is_said_with_the_counts(tmp_path, capsys):
    path = write_tsv(tmp_path / "a.tsv", [("same", "a", "B1"), ("Same", "b", "B1"), ("", "c", "B1")])
    with pytest.raises(SystemExit) as error:
        run(path, tmp_path / "out")
    out, err = capsys.readouterr()
    assert error.value.code == 2 and "2 rows with 1 different bodies are left" in err
    assert printed_counts(out)["empty body"] == 1 and not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_no_file(tmp_path, capsys, monkeypatch):
    def full(self, path):
        Path(path).write_text("half a fi")
        raise OSError("No space left on device")

    monkeypatch.setattr(pl.DataFrame, "write_csv", full)
    path = write_tsv(tmp_path / "a.tsv", make_reviews(9))
    assert "No space left" in refusal(capsys, path, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_the_script_alone_says_its_errors_without_a_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--input_file", "none.tsv", "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--input_file none.tsv: no such file" in result.stderr
    assert "Traceback" not in result.stderr
