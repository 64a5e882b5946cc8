# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""measure_dataset.py: every figure of the report on small data with known answers."""

import argparse
import contextlib
import csv
import gzip
import io
import json
import random
from types import SimpleNamespace

import numpy as np
import polars
import pytest
import torch

import measure_dataset as tool
import run_clm_instruct
import run_summarization
from conftest import ROOT
from report_figures import THEMES

WORDS = "the a of to camera lens strap is great poor and i it was very bought for my trip with good light".split()
ENGLISH = (
    "i bought this camera for my trip and it was very good in the light of the evening",
    "the strap is poor and it was not what i had hoped for when i read about it",
    "my sister got the same lens with a great strap and she is very happy with it",
)
SPANISH = "la cámara es muy buena pero la correa es demasiado corta para mi hermana y no le gusta nada"


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tokenizer whose tokens are words: known ones, <unk>, and </s> at the end."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "</s>", "<pad>", *WORDS]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("words")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=8
    )
    fast.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def identifier():
    return tool.load_identifier()


@pytest.fixture
def quick(monkeypatch, identifier):
    """main() without what takes its second: the identifier is loaded once, and the PNGs are empty."""
    names = ("cut", "padding", "labels", *(f"{part}_lengths" for parts in tool.TASK_PARTS.values() for part in parts))
    monkeypatch.setattr(tool, "load_identifier", lambda: identifier)
    monkeypatch.setattr(tool, "draw_figures", lambda *_: dict.fromkeys(names, dict.fromkeys(THEMES, b"")))


def write_csv(path, rows, header=("review_body", "review_headline")):
    with open(path, "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sign(texts):
    words, lengths, _ = tool.hash_words(texts)
    return tool.sign_rows(*tool.hash_shingles(words, lengths))


# ------------------------------------------------------------------------------------------------ lengths, padding


def test_lengths_are_described_and_each_maximum_cuts_what_is_longer():
    entry = tool.describe_lengths(np.array([1, 2, 3, 4, 10]), [3, 4, 16])
    assert (entry["mean"], entry["p50"], entry["p90"], entry["p99"]) == (4.0, 3, 10, 10)
    assert (entry["min"], entry["max"], entry["total"]) == (1, 10, 20)
    assert entry["cut"] == [
        {"limit": 3, "rows": 2, "share": 0.4, "tokens_share": 8 / 20},
        {"limit": 4, "rows": 1, "share": 0.2, "tokens_share": 6 / 20},
        {"limit": 16, "rows": 0, "share": 0.0, "tokens_share": 0.0},
    ]


def test_the_recommended_maximum_is_the_smallest_multiple_that_cuts_no_more_than_the_share():
    lengths = np.arange(1, 101)
    assert tool.choose_maximum(lengths, 0.0, 8) == 104
    assert tool.choose_maximum(lengths, 0.01, 1) == 99
    assert tool.choose_maximum(lengths, 0.5, 8) == 56
    assert tool.choose_maximum(lengths, 0.0, 8, most=64) == 64
    for share in (0.01, 0.07, 0.1, 0.29):
        limit = tool.choose_maximum(lengths, share, 1)
        assert (lengths > limit).mean() <= share < (lengths > limit - 1).mean()


def test_positions_are_rows_times_the_longest_of_each_batch():
    lengths = [np.array([1, 4, 2, 3, 5])]
    assert tool.count_positions(np.arange(5), lengths, 2) == 2 * 4 + 2 * 3 + 5
    assert tool.count_positions(np.array([0, 2, 3, 1, 4]), lengths, 2) == 2 * 2 + 2 * 4 + 5
    assert tool.count_positions(np.arange(5), lengths * 2, 5) == 50


def test_batches_of_like_length_are_sorted_in_chunks_as_the_library_does():
    from transformers.trainer_pt_utils import get_length_grouped_indices

    dice = np.random.default_rng(0)
    lengths = dice.integers(1, 300, 4000)
    ours = tool.order_like_length(lengths, 8, dice)
    assert sorted(ours) == list(range(4000))
    theirs = np.array(get_length_grouped_indices(lengths.tolist(), 8))
    real = tool.count_positions(theirs, [lengths], 8)
    assert tool.count_positions(ours, [lengths], 8) == pytest.approx(real, rel=0.01)


def test_packing_and_padding_of_known_lengths():
    lengths = [np.array([8, 6, 2, 4, 4])]  # three rows of 8 when packed, five that are padded
    alone = tool.measure_padding(lengths, 1, seed=0, capacity=8)
    assert (alone["real"], alone["rows"], alone["packed_rows"], alone["default"]) == (24, 5, 3, "random")
    assert {name: way["positions"] for name, way in alone["ways"].items()} == dict.fromkeys(tool.WAYS, 24)
    in_fives = tool.measure_padding(lengths, 5, seed=0, capacity=8)["ways"]
    assert in_fives["random"]["positions"] == 40 and in_fives["random"]["per_real"] == 40 / 24
    assert in_fives["packing"]["positions"] == 24 and in_fives["packing"]["speed"] == 40 / 24
    assert in_fives["random"]["real_share"] == 24 / 40


def test_packed_batches_have_the_positions_that_the_collator_makes_of_them():
    from fast_batches import PackingCollator

    dice = np.random.default_rng(0)
    lengths = [dice.integers(3, 100, 70), dice.integers(2, 20, 70)]
    plain = SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None)
    collate, positions, rows = PackingCollator(plain), 0, 0
    for start in range(0, 70, 16):
        batch = range(start, min(start + 16, 70))
        collate.collator = lambda features: {"decoder_input_ids": torch.ones(len(features), 20)}
        made = collate([{"input_ids": [1] * lengths[0][i], "labels": [1] * lengths[1][i]} for i in batch])
        positions += made["input_ids"].numel() + made["labels"].numel()
        rows += len(made["labels"])
    assert tool.pack_batches(np.arange(70), lengths, 16) == (positions, rows)


def test_packing_of_a_sample_stands_for_all_batches(monkeypatch):
    dice = np.random.default_rng(1)
    lengths = [dice.integers(3, 100, 8000), dice.integers(2, 20, 8000)]
    monkeypatch.setattr(tool, "PACKED_BATCHES", 10**6)
    whole = tool.measure_padding(lengths, 16, seed=0, packs_batches=True)
    assert whole["rows"] == 8000 and whole["default"] == "packing"
    assert whole["real"] <= whole["ways"]["packing"]["positions"] < whole["ways"]["random"]["positions"]
    monkeypatch.setattr(tool, "PACKED_BATCHES", 50)
    sample = tool.measure_padding(lengths, 16, seed=0, packs_batches=True)
    assert sample["rows"] == 800 and sample == tool.measure_padding(lengths, 16, seed=0, packs_batches=True)
    assert sample["ways"]["packing"]["speed"] == pytest.approx(whole["ways"]["packing"]["speed"], rel=0.01)
    assert "packing" not in tool.measure_padding(lengths, 16, seed=0)["ways"]


# -------------------------------------------------------------------------------------------- vocabulary, duplicates


def test_vocabulary_in_use_and_unknown_share():
    measured = tool.measure_vocabulary(np.array([5, 90, 4, 1, 0]), 5, 0, np.array([0, 5, 0]))
    assert (measured["size"], measured["used"], measured["used_share"]) == (5, 4, 0.8)
    assert (measured["unknown"], measured["unknown_share"], measured["rows_with_unknown"]) == (5, 0.05, 1)
    assert measured["cover_99"] == 3  # 90 + 5 + 4 of 100
    assert tool.measure_vocabulary(np.array([1]), 1, None, np.array([0]))["has_unknown_token"] is False


def test_words_ignore_case_and_punctuation_and_unspaced_scripts_count_letters():
    flat, lengths, distinct = tool.hash_words(["The lens, THE LENS!", "", "ok 猫が好き"])
    assert (lengths.tolist(), distinct.tolist()) == ([4, 0, 5], [2, 0, 5])
    assert flat[0] == flat[2] and flat[1] == flat[3] and flat[0] != flat[1]


def test_minhash_estimates_the_share_of_common_shingles():
    dice, exact, estimated = random.Random(3), [], []
    for _ in range(150):
        first = [f"w{dice.randrange(10_000)}" for _ in range(60)]
        second = list(first)
        for _ in range(dice.randrange(12)):
            second[dice.randrange(60)] = f"v{dice.randrange(10_000)}"
        sets = [{tuple(row[i : i + 3]) for i in range(58)} for row in (first, second)]
        exact.append(len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
        a, b = sign([" ".join(first), " ".join(second)])
        estimated.append((a == b).mean())
    assert np.abs(np.array(exact) - estimated).mean() < 0.04
    assert abs(np.mean(exact) - np.mean(estimated)) < 0.015


def test_near_pairs_are_found_and_strangers_are_not():
    dice = random.Random(1)
    texts = [" ".join(f"w{dice.randrange(300)}" for _ in range(80)) for _ in range(400)]
    near = [text.replace(text.split()[40], "changed", 1) for text in texts[:100]]  # similarity 0.93 or so
    pairs = tool.find_near_pairs(sign(texts + near))
    assert {tuple(pair) for pair in pairs.tolist()} == {(i, 400 + i) for i in range(100)}


def test_pairs_are_joined_over_any_number_of_steps():
    assert tool.join_pairs(np.array([[4, 5], [3, 4], [5, 6], [0, 1]]), 8).tolist() == [0, 0, 2, 3, 3, 3, 3, 7]
    assert tool.join_pairs(np.empty((0, 2), int), 3).tolist() == [0, 1, 2]


def make_columns(rows):
    both = [" ".join(row) for row in rows]
    columns = {"row_hash": polars.Series(both).hash().to_numpy(), "signature": sign(both)}
    for i, part in enumerate(("source", "target")):
        columns[f"{part}_hash"] = polars.Series([row[i] for row in rows]).hash().to_numpy()
    return columns


def test_duplicates_near_duplicates_and_overlap_are_counted():
    dice = random.Random(2)
    bodies = [" ".join(f"w{dice.randrange(500)}" for _ in range(60)) for _ in range(6)]
    a, b, c, d, e, f = bodies
    near_a, near_e = a + " end", "start " + e
    train = [(a, "x"), (a, "x"), (a, "x"), (near_a, "x"), (b, "x"), (b, "y"), (c, "z"), (e, "z")]
    validation = [(c, "other"), (near_e, "z"), (d, "z"), (f, "q")]
    counts, pairs = tool.measure_duplicates(make_columns(train), make_columns(validation))
    assert (counts["rows"], counts["exact"], counts["same_source"], counts["same_target"]) == (8, 2, 3, 5)
    assert counts["near"] == 2  # near_a of a, and b with another target
    assert sorted(map(sorted, pairs.tolist())) == [[0, 3], [4, 5]]
    assert counts["overlap"] == {
        **{"rows": 4, "same_source": 1, "near": 1},
        **{"same_source_share": 0.25, "near_share": 0.25},
    }
    assert "overlap" not in tool.measure_duplicates(make_columns(train))[0]


# ------------------------------------------------------------------------------------------------ targets, language


def test_copied_targets_are_told_by_how_they_stand_in_the_source():
    cases = [
        ("Great lens", "great lens", 1),
        ("I love this lens. It is sharp.", "I love this lens", 2),
        ("Well. I love this lens!", "i love this lens", 3),
        ("I love it", "love", 0),
        ("I love it", "a fine lens for me", 0),
    ]
    sources, targets, kinds = (list(column) for column in zip(*cases, strict=True))
    assert tool.find_copies(sources, targets).tolist() == kinds


def test_targets_are_the_same_whatever_their_case_and_punctuation():
    texts = polars.Series(["Love it!", "love  it", "LOVE IT :)", ":)", "猫 が"])
    assert tool.fold_texts(texts).to_list() == ["love it", "love it", "love it", ":)", "猫 が"]


def test_frequent_targets_are_boilerplate():
    hashes = np.array([7] * 6 + [8] * 5 + list(range(100, 189)), np.uint64)
    copied = np.array([1, 2, 2, 3] + [0] * 96, np.uint8)
    tokens = {"target_tokens": np.array([5] * 2 + [1] * 98), "source_tokens": np.full(100, 3)}
    measured, often = tool.measure_targets({"folded_hash": hashes, "copied": copied, **tokens})
    assert often == [(0, 6), (6, 5)]
    assert (measured["frequent_limit"], measured["frequent_rows"], measured["frequent_share"]) == (5, 11, 0.11)
    kinds = ("equal_source", "start_source", "inside_source", "longer_than_source")
    assert [measured[kind] for kind in kinds] == [1, 2, 1, 2] and measured["copied_share"] == 0.04


def test_rows_in_another_language_are_found_and_short_ones_are_not_judged(identifier):
    sample = [(text, "great", None) for text in ENGLISH * 20]
    language = tool.learn_language(sample, identifier)
    assert language["main"] == "en" and language["sample"] == {"en": 60}
    texts = [*ENGLISH, SPANISH, "Perfecto!", "12 34 56 78 90 11"]
    words, lengths, _ = tool.hash_words(texts)
    found = tool.find_languages(texts, words, lengths, language, identifier)
    assert {i: name for i, name in found.items() if name != "no language"} == {3: "es"}
    assert tool.learn_language(sample, identifier, "fr")["main"] == "fr"


def test_the_rows_to_read_are_the_extreme_ones():
    columns = {
        "words": np.array([10, 10, 10, 10]),
        "distinct_words": np.array([10, 2, 10, 10]),
        "chars": np.array([50, 50, 50, 60]),
        "letters": np.array([45, 45, 5, 55]),
        "unknown": np.array([0, 0, 0, 4]),
        "source_tokens": np.array([12, 13, 14, 11]),
    }
    shown = tool.choose_shown(columns, np.array([20, 10, 10, 10]), {2: "es"}, 1)
    assert shown == {
        "Longest": [(0, "20 tokens")],
        "Fewest letters": [(2, "90% other characters")],
        "Most repetitive": [(1, "each word 5.0 times")],
        "Most tokens a character": [(0, "0.40 tokens a character")],
        "Most unknown tokens": [(3, "4 unknown tokens")],
        "Shortest source": [(3, "11 tokens")],
        "In another language": [(2, "es")],
    }


# ------------------------------------------------------------------------------------------------ template


NO_FLAGS = argparse.Namespace(text_column=None, summary_column=None, data_format=None, prompt_template=None)


def choose(tmp_path, columns, *flags):
    """What the report takes a file with these columns for."""
    path = write_csv(tmp_path / "columns.csv", [["x"] * len(columns)], columns)
    chosen, problems = tool.choose_tasks(tool.parse_args(["--train_file", path, "--output_dir", "out", *flags]))
    assert not problems
    return chosen["train"][1]


@pytest.mark.parametrize("first", run_summarization.KNOWN_COLUMNS)
def test_texts_and_summaries_are_the_columns_that_training_takes(tmp_path, first):
    for second in run_summarization.KNOWN_COLUMNS:
        columns = sorted({*first, *second, "id"})
        task = choose(tmp_path, columns)
        assert (task["task"], task["columns"]) == ("summarization", run_summarization.find_columns(columns, NO_FLAGS))


def test_the_columns_named_by_flags_are_those_that_training_takes(tmp_path):
    for flags in (["--summary_column", "title"], ["--summary_column", "text", "--text_column", "title"]):
        given = argparse.Namespace(
            **{"text_column": None, **{flags[i][2:]: flags[i + 1] for i in range(0, len(flags), 2)}}
        )
        columns = ["article", "highlights", "text", "title"]
        assert choose(tmp_path, columns, *flags)["columns"] == run_summarization.find_columns(columns, given)


@pytest.mark.parametrize("first", run_clm_instruct.KNOWN_FORMATS)
def test_instructions_chats_and_text_are_the_columns_that_training_takes(tmp_path, first):
    for second in run_clm_instruct.KNOWN_FORMATS:
        columns = sorted({*first[1], *second[1], "id"})
        task = choose(tmp_path, columns)
        assert (task["format"], task["columns"]) == run_clm_instruct.find_format(columns, NO_FLAGS)


def make_chats(count):
    dice = random.Random(6)
    for _ in range(count):
        yield [" ".join(dice.choices(WORDS, k=dice.randrange(1, 40))) for _ in range(4)]


LAYOUTS = {
    "dolly": lambda a, b, c, d: {"instruction": a, "context": c if len(c) > 60 else "", "response": b},
    "alpaca": lambda a, b, c, d: {"instruction": a, "input": c if len(c) > 60 else None, "output": b},
    "prompt": lambda a, b, c, d: {"question": a, "answer": b},
    "chat": lambda a, b, c, d: {
        "messages": [{"role": r, "content": t} for r, t in zip(("user", "assistant") * 2, (a, b, c, d), strict=True)]
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_counted_as_the_training_script_encodes_the_rows(quick, words, tmp_path, layout, monkeypatch):
    from transformers import AutoTokenizer

    rows = [LAYOUTS[layout](*texts) for texts in make_chats(50)]
    flags = ["--prompt_template", "alpaca"] if layout == "chat" else []
    arguments = ["--train_file", write_jsonl(tmp_path / "a.jsonl", rows), "--tokenizer_name", words, *flags]
    monkeypatch.setattr(tool, "ROWS_AT_A_TIME", 7)
    assert tool.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    measures = json.loads((tmp_path / "out/measures.json").read_text())
    names = {"chat": "alpaca", "prompt": "plain"}  # for chats training wants a template named
    template = names.get(layout, layout)
    assert measures["template"] == template
    assert ("--prompt_template", template) in [(flag["flag"], flag["value"]) for flag in measures["recommended"]]

    tokenizer = AutoTokenizer.from_pretrained(words)
    data_format, columns = run_clm_instruct.find_format(list(rows[0]), NO_FLAGS)
    run_clm_instruct.set_prompt_template(tokenizer, argparse.Namespace(prompt_template=template), data_format)
    batch = {name: [row[name] for row in rows] for name in columns}
    encoded = run_clm_instruct.encode_chats(batch, range(len(rows)), tokenizer, data_format, columns, 10**6)
    assert not any(encoded["problem"])
    answers = np.array([sum(label != -100 for label in labels) for labels in encoded["labels"]])
    whole = np.array([len(ids) for ids in encoded["input_ids"]])
    limit = measures["maxima"]["example"][1]
    for part, lengths in (("prompt", whole - answers), ("answer", answers), ("example", whole)):
        assert measures["lengths"][part] == tool.describe_lengths(lengths, [*tool.CUT_CANDIDATES, limit])
    assert measures["vocabulary"]["tokens"] == whole.sum()


def test_tokens_of_texts_and_summaries_are_counted_as_the_training_script_tokenizes_the_rows(quick, words, tmp_path):
    from transformers import AutoTokenizer

    rows = [(f" {a} ", b) for a, b, _, _ in make_chats(50)]
    arguments = ["--train_file", write_csv(tmp_path / "a.csv", rows), "--tokenizer_name", words]
    assert tool.main([*arguments, "--source_prefix", "it is: ", "--output_dir", str(tmp_path / "out")]) == 0
    measures = json.loads((tmp_path / "out/measures.json").read_text())
    limits = {"max_source_length": 999, "max_target_length": 999, "pad_to_max_length": False}
    tokenizer = AutoTokenizer.from_pretrained(words)
    batch = {"source": [source for source, _ in rows], "reference": [target for _, target in rows]}
    encoded = run_summarization.tokenize_rows(batch, tokenizer, tokenizer, "it is: ", limits)
    for part, name in (("source", "input_ids"), ("target", "labels")):
        candidates = [*tool.CUT_CANDIDATES, *(limit for _, limit in measures["maxima"].values())]
        lengths = np.array([len(ids) for ids in encoded[name]])
        assert measures["lengths"][part] == tool.describe_lengths(lengths, candidates)


def test_rows_that_the_template_refuses_are_odd(quick, words, tmp_path, capsys):
    alternating = [{"role": role, "content": "it is"} for role in ("user", "assistant")]
    rows = [{"messages": alternating}] * 9
    rows.insert(4, {"messages": alternating[:1] + alternating})
    template = "{% for message in messages %}{% if message.role == 'user' and not loop.last "
    template += "and loop.nextitem.role == 'user' %}{{ raise_exception('two questions') }}{% endif %}"
    (tmp_path / "own.jinja").write_text(template + "{{ message.content + ' ' }}{% endfor %}")
    arguments = ["--train_file", write_jsonl(tmp_path / "a.jsonl", rows), "--tokenizer_name", words]
    arguments += ["--prompt_template", str(tmp_path / "own.jinja"), "--output_dir"]
    assert tool.main([*arguments, str(tmp_path / "out")]) == 0
    entry = json.loads((tmp_path / "out/measures.json").read_text())["rows"]["train"]
    reason = "the template says: two questions"
    assert entry == {"read": 10, "measured": 9, "odd": {reason: {"rows": 1, "lines": [5]}}}
    write_jsonl(tmp_path / "a.jsonl", rows[4:5])
    assert tool.main([*arguments, str(tmp_path / "none")]) == 2
    assert f"no row can be measured: {reason} (1 rows)" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- from files to a report


def numbers_in(value):
    if isinstance(value, dict):
        return [number for part in value.values() for number in numbers_in(part)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


@pytest.fixture(scope="module")
def report(words, tmp_path_factory):
    """(measures, HTML, folder, printed) of 40 reviews: 3 odd ones, 2 copies, one Spanish, one with HTML in it."""
    folder = tmp_path_factory.mktemp("report")
    dice = random.Random(5)
    rows = [(f"{dice.choice(ENGLISH)} {' '.join(dice.choices(WORDS, k=i))}", "great lens") for i in range(30)]
    rows += [rows[0], rows[1], (SPANISH, "muy buena")]
    rows += [("the camera is great and i bought it for my trip", f"the camera is {w}") for w in ("great", "<b>x</b>")]
    rows += [("<script>alert(1)</script> i bought the strap", "& poor"), ("", "empty"), ("no summary", " "), ("x",)]
    rows += [("the light is good", "very good light")]
    train = write_csv(folder / "train.csv", rows)
    validation = write_csv(folder / "validation.csv", [(rows[5][0], "other"), (rows[31][0][::-1], "x")])
    arguments = ["--train_file", train, "--validation_file", validation, "--tokenizer_name", words]
    arguments += ["--source_prefix", "it is: ", "--per_device_train_batch_size", "4", "--max_cut_share", "0.1"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert tool.main([*arguments, "--output_dir", str(folder / "out")]) == 0
    measures = json.loads((folder / "out/measures.json").read_text())
    return measures, (folder / "out/report.html").read_text(), folder / "out", printed.getvalue()


def test_odd_rows_are_counted_named_and_left_out(report):
    measures, html, _, printed = report
    assert measures["rows"]["train"] == {
        "read": 40,
        "measured": 37,
        "odd": {
            "another number of fields than the header": {"rows": 1, "lines": [40]},
            "review_body is empty": {"rows": 1, "lines": [38]},
            "review_headline is empty": {"rows": 1, "lines": [39]},
        },
    }
    assert "train: 1 rows left out, review_body is empty: line 38" in printed
    assert "1 × review_body is empty, on line\n38" in html


def test_the_figures_of_the_report_are_those_of_the_rows(report):
    measures, _, _, _ = report
    # "it is: " and </s> are counted; rows 30 and 31 repeat rows 0 and 1.
    texts = [row for row in csv.reader(open(report[2].parent / "train.csv")) if len(row) == 2][1:]
    texts = [(a, b) for a, b in texts if a.strip() and b.strip()]
    source = [2 + len(a.split()) + 1 for a, _ in texts]
    target = [len(b.split()) + 1 for _, b in texts]
    for part, lengths in (("source", source), ("target", target)):
        limit = measures["maxima"][part][1]
        entry = next(entry for entry in measures["lengths"][part]["cut"] if entry["limit"] == limit)
        assert measures["lengths"][part]["total"] == sum(lengths) and measures["lengths"][part]["max"] == max(lengths)
        assert limit % 8 == 0 and entry["rows"] == sum(n > limit for n in lengths)
    cut = [min(n, measures["maxima"]["source"][1]) for n in source]
    assert measures["padding"]["real"] == sum(cut) + sum(target)
    known = {"</s>", *WORDS}
    tokens = [token for a, b in texts for token in f"it is: {a} </s> {b} </s>".split()]
    assert measures["vocabulary"]["tokens"] == len(tokens)
    assert measures["vocabulary"]["unknown"] == sum(token not in known for token in tokens)
    assert measures["vocabulary"]["used"] == len({token if token in known else "<unk>" for token in tokens})
    assert measures["duplicates"]["exact"] == 2 and measures["duplicates"]["overlap"]["same_source"] == 1
    assert measures["targets"]["frequent"] == [{"text": "great lens", "rows": 32, "share": 32 / 37}]
    assert measures["targets"]["start_source"] == 1
    assert measures["language"]["others"] == {"es": 1} and measures["language"]["other_share"] == 1 / 37
    assert measures["shown"]["In another language"][0]["source"] == SPANISH


def test_the_page_shows_the_figures_of_the_json_in_one_file(report):
    measures, html, folder, _ = report
    for part in ("duplicates", "vocabulary", "padding", "targets"):
        for number in numbers_in(measures[part]):
            assert f"{number:,}" in html, (part, number)
    for entry in measures["lengths"].values():
        assert f"{entry['mean']:.1f}" in html and f"{entry['total']:,}" in html
    for way in measures["padding"]["ways"].values():
        assert (
            f"{way['per_real']:.2f}" in html and f"{way['speed']:.2f}×" in html and f"{way['real_share']:.2%}" in html
        )
    assert html.count("data:image/png;base64,") == 2 * len(list(folder.glob("*.png"))) == 8
    assert "http://" not in html and "https://" not in html
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))
    for flag in measures["recommended"]:
        assert flag["flag"] in html and flag["why"].split(";")[0] in html


def test_texts_of_the_data_are_escaped(report):
    _, html, _, _ = report
    assert "<script>" not in html and "&lt;script&gt;alert(1)&lt;/script&gt;" in html and "&amp; poor" in html


def test_the_recommended_flags_are_those_of_the_training_scripts(quick, report, words, tmp_path):
    rows = [{"instruction": f"{'the lens ' * i}", "response": "good " * (1 + i % 7)} for i in range(1, 60)]
    rows = [row | ({"category": "ab"[i % 3 > 0]} if i else {}) for i, row in enumerate(rows)]
    arguments = ["--train_file", write_jsonl(tmp_path / "a.jsonl", rows), "--tokenizer_name", words]
    assert tool.main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    measures = json.loads((tmp_path / "out/measures.json").read_text())
    trainer = {"--per_device_train_batch_size", "--train_sampling_strategy"}
    for script, flags in (("run_summarization.py", report[0]), ("run_clm_instruct.py", measures)):
        source = (ROOT / script).read_text()
        for flag in flags["recommended"]:
            assert flag["flag"] in trainer or f"    {flag['flag'][2:]}: " in source, flag
    assert [flag["flag"] for flag in measures["recommended"]][:2] == ["--max_seq_length", "--prompt_template"]
    template = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    assert measures["lengths"]["prompt"]["max"] == 118 + len(f"{template} ### Instruction: ### Response:".split())
    assert measures["lengths"]["answer"]["max"] == 7 + 1  # </s>
    assert measures["labels"] == [
        {"label": label, "rows": rows, "share": rows / 59} for label, rows in (("b", 39), ("a", 19), (None, 1))
    ]


def test_a_maximum_that_cuts_more_than_asked_for_is_said_first(quick, words, tmp_path):
    rows = [{"instruction": "the lens " * i, "response": "good"} for i in range(1, 41)]
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 64}')
    arguments = ["--train_file", write_jsonl(tmp_path / "a.jsonl", rows), "--tokenizer_name", words]
    assert tool.main([*arguments, "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    measures = json.loads((tmp_path / "out/measures.json").read_text())
    template = measures["lengths"]["example"]["max"] - (2 * 40 + 1)  # of the longest row
    over = sum(2 * i + 1 + template > 64 for i in range(1, 41))
    assert measures["maxima"] == {"example": ["max_seq_length", 64]} and over > 1
    said = f"--max_seq_length 64, all that the model has room for, cuts {over} examples ({over / 40:.1%})."
    assert measures["advice"][0] == said and "the model has no more positions" in measures["recommended"][0]["why"]


def test_packing_is_recommended_where_it_beats_like_length_by_5_percent():
    def choose(default="random", **speeds):
        return tool.choose_way({"default": default, "ways": {name: {"speed": n} for name, n in speeds.items()}})

    assert choose(random=1.0, like_length=1.5, packing=1.56) == "like_length"
    assert choose(random=1.0, like_length=1.5, packing=1.6) == "packing"
    assert choose(random=1.0, like_length=1.01, packing=1.04) == "random"
    assert choose("packing", random=1.0, like_length=1.9, packing=1.5) == "packing"


@pytest.mark.parametrize("kind", ["t5", "led"])
def test_t5_packs_by_itself_and_other_encoder_decoders_are_told_to_group_by_length(
    quick, words, tmp_path, capsys, kind
):
    dice = random.Random(4)
    rows = [(" ".join(dice.choices(WORDS, k=dice.randrange(1, 60))), dice.choice(WORDS)) for _ in range(200)]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    arguments = ["--train_file", write_csv(tmp_path / "a.csv", rows), "--tokenizer_name", words]
    assert tool.main([*arguments, "--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "out")]) == 0
    measures, html = (
        json.loads((tmp_path / "out/measures.json").read_text()),
        (tmp_path / "out/report.html").read_text(),
    )
    flags, said = {f["flag"]: f for f in measures["recommended"]}, capsys.readouterr().out
    ways, size = measures["padding"]["ways"], flags["--per_device_train_batch_size"]
    assert "--packing" not in flags and ("--train_sampling_strategy" in flags) == (kind == "led")
    assert list(ways) == ["random", "like_length"] + ["packing"] * (kind == "t5")
    if kind == "t5":
        fewer = f"{ways['packing']['speed']:.2f} times fewer positions than random batches"
        assert f"nothing else to set: the script packs its rows, {fewer}" in size["why"] and fewer in html
        assert "fewer positions with packing, the default" in html and "times fewer, the default" in said
    else:
        assert "T5 and mT5 need it not" in flags["--train_sampling_strategy"]["why"] and "nothing else" not in html


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "tsv"])
def test_every_kind_of_file_gives_the_same_measures(words, tmp_path, kind, report):
    rows = [{"text": f"the lens is {w}", "title": f"great {w}", "label": w} for w in WORDS]
    table, path = polars.DataFrame(rows), tmp_path / f"a.{kind}"
    if kind == "parquet":
        table.write_parquet(path)
    elif kind == "tsv":
        table.write_csv(path, separator="\t")
    else:
        opener = gzip.open if kind.endswith("gz") else open
        with opener(path, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    chosen, problems = tool.choose_tasks(tool.parse_args(["--train_file", str(path), "--output_dir", "out"]))
    assert (
        not problems and chosen["train"][1]["columns"] == ("text", "title") and chosen["train"][1]["label"] == "label"
    )
    examples = [example for *_, example in tool.read_examples(*chosen["train"])]
    assert examples == [(row["text"], row["title"], row["label"]) for row in rows]


def test_chats_and_plain_text_are_read_as_prepare_instruct_writes_them():
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "why"), ("assistant", "so")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    chat = {"task": "chat", "format": "chat", "columns": ("messages",), "label": None}
    assert tool.to_example(row, chat) == ("be kind\nhi\nwhy", "hello\nso", None)
    with pytest.raises(tool.RowError, match="no answer"):
        tool.to_example({"messages": row["messages"][:2]}, chat)
    text = {"task": "text", "format": "text", "columns": ("text",), "label": None}
    assert tool.to_example({"text": "all"}, text) == ("all", "", None)
    dolly = {
        "task": "instruction",
        "format": "dolly",
        "columns": ("instruction", "context", "response"),
        "label": None,
    }
    row = {"instruction": "why", "context": "it rains", "response": "so"}
    assert tool.to_example(row, dolly) == ("why\n\nInput:\nit rains", "so", None)


def test_plain_text_has_lengths_and_no_targets(quick, words, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{text} {i}"} for i, text in enumerate(ENGLISH * 3)])
    arguments = ["--train_file", path, "--tokenizer_name", words, "--output_dir", str(tmp_path / "out")]
    assert tool.main(arguments) == 0
    measures = json.loads((tmp_path / "out/measures.json").read_text())
    assert "targets" not in measures and "padding" not in measures and list(measures["lengths"]) == ["example"]
    assert [(flag["flag"], flag["value"]) for flag in measures["recommended"]] == [("--max_seq_length", 1024)]
    assert "about 1: none is lost" in measures["recommended"][0]["why"]


# ------------------------------------------------------------------------------------------------ bad input


def test_every_problem_is_said_at_once_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/kept").write_text("mine")
    train = write_csv(tmp_path / "a.csv", [("x", "y")], ("one", "two"))
    arguments = ["--train_file", train, "--validation_file", "no.csv", "--output_dir", str(tmp_path / "full")]
    assert tool.main([*arguments, "--per_device_train_batch_size", "0", "--max_cut_share", "2"]) == 2
    said = capsys.readouterr().err
    for sentence in (
        "--per_device_train_batch_size 0: must be 1 or more",
        "--max_cut_share 2.0: must be 0 or more and below 1",
        "--model_name_or_path or --tokenizer_name is missing",
        "not empty, nothing is overwritten",
        "needs the columns instruction, context, response (dolly); or",
        "of texts and summaries name both columns, by --text_column and --summary_column",
        "--validation_file no.csv: no such file",
    ):
        assert sentence in said, said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]


@pytest.mark.parametrize(
    "content, flags, said",
    [
        ("text,title\na,b\n", ["--text_column", "body"], "has no column 'body' (--text_column); it has text, title"),
        ("text,text\na,b\n", [], "the header names text more than once"),
        ('text,title\n"a,b\n', [], "the record that starts here is not CSV"),
        ("text,title\n,b\n,c\n", [], "no row can be measured: text is empty (2 rows)"),
        ("text,title\n", [], "no row can be measured: no rows"),
        (
            "text,title\na,b\n",
            ["--tokenizer_name", "nowhere"],
            "--tokenizer_name nowhere: no tokenizer could be loaded",
        ),
        ("", [], "the file is empty"),
    ],
)
def test_broken_data_ends_in_one_clear_error(words, tmp_path, capsys, content, flags, said):
    (tmp_path / "a.csv").write_text(content)
    arguments = ["--train_file", str(tmp_path / "a.csv"), "--tokenizer_name", words]
    assert tool.main([*arguments, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
