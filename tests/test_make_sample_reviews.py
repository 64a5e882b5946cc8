# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""data_prep/make_sample_reviews.py: the classic layout, the same bytes each time, and a task worth learning."""

import csv
import importlib.util
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "data_prep" / "make_sample_reviews.py"
spec = importlib.util.spec_from_file_location("make_sample_reviews", SCRIPT)
make_sample_reviews = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_sample_reviews)


@pytest.fixture(scope="module")
def rows():
    return make_sample_reviews.make_rows(3000, seed=42)


def test_file_has_the_15_columns_and_the_rows_asked_for(tmp_path, capsys):
    path = tmp_path / "new" / "reviews.tsv"
    make_sample_reviews.main(["--num_reviews", "300", "--output_file", str(path)])
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert tuple(lines[0]) == tuple(make_sample_reviews.COLUMNS) and len(lines[0]) == 15
    assert len(lines) == 301 and {len(line) for line in lines} == {15}
    assert "SYNTHETIC" in capsys.readouterr().out


def test_same_seed_gives_the_same_rows_and_another_seed_others():
    make = make_sample_reviews.make_rows
    assert make(50, seed=1) == make(50, seed=1) != make(50, seed=2)


def test_review_ids_are_unique_and_say_synthetic(rows):
    assert len({row["review_id"] for row in rows}) == len(rows)
    assert all(row["review_id"].startswith("RSYN") for row in rows)


def test_some_products_have_ten_reviews_and_some_only_a_few(rows):
    counts = Counter(row["product_id"] for row in rows).values()
    assert sum(count >= 10 for count in counts) > 50
    assert min(counts) < 6


def test_every_kind_of_dirt_is_there_in_a_small_share(rows):
    bodies = Counter(row["review_body"] for row in rows if row["review_body"])
    dirt = {
        "html": sum("<br />" in row["review_body"] for row in rows),
        "entity": sum("&#34;" in row["review_body"] for row in rows),
        "stars": sum(row["review_headline"] in make_sample_reviews.STARS.values() for row in rows),
        "empty body": sum(not row["review_body"] for row in rows),
        "empty headline": sum(not row["review_headline"] for row in rows),
        "duplicate": sum(count - 1 for count in bodies.values()),
    }
    assert all(count > 0 for count in dirt.values()), dirt
    assert sum(dirt.values()) < len(rows) / 4, dirt


def test_headline_says_the_opinions_and_not_the_first_words():
    headline = make_sample_reviews.make_headline([(False, "dies too fast"), (True, "great pictures")])
    assert headline == "Great pictures but dies too fast"
    assert make_sample_reviews.make_headline([(True, "good value")]) == "Good value"


def test_copying_the_first_words_scores_badly(rows):
    shared = []
    for row in rows:
        headline = row["review_headline"].lower().split()
        lead = set(row["review_body"].lower().split()[: len(headline)])
        shared.append(sum(word in lead for word in headline) / max(1, len(headline)))
    assert sum(shared) / len(shared) < 0.05


def test_ratings_follow_the_opinions(rows):
    liked = [int(row["star_rating"]) for row in rows if row["review_headline"] == "Good value"]
    disliked = [int(row["star_rating"]) for row in rows if row["review_headline"] == "Overpriced"]
    assert min(liked) >= 4 and max(disliked) <= 2


def test_every_aspect_of_every_kind_can_be_written_about():
    for aspects in make_sample_reviews.KINDS.values():
        assert set(aspects) <= set(make_sample_reviews.OPINIONS)


def test_wrong_arguments_are_reported_together_and_nothing_is_overwritten(tmp_path, capsys):
    path = tmp_path / "reviews.csv"
    path.write_text("mine")
    with pytest.raises(SystemExit) as stop:
        make_sample_reviews.main(["--num_reviews", "0", "--output_file", str(path)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and path.read_text() == "mine"
    for part in ("at least 1", "must end in .tsv", "exists; nothing is overwritten"):
        assert part in said


def test_a_file_in_place_of_the_folder_is_refused(tmp_path, capsys):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(SystemExit) as stop:
        make_sample_reviews.main(["--output_file", str(tmp_path / "taken" / "a.tsv")])
    assert stop.value.code == 2 and "is a file, not a folder" in capsys.readouterr().err
