# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""data_prep/prepare_instruct.py: every layout gives canonical rows, no prompt in both files, every drop counted."""

import argparse
import csv
import functools
import gzip
import importlib.util
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

import chat_turns
import run_clm_instruct

SCRIPT = Path(__file__).parents[1] / "data_prep" / "prepare_instruct.py"
spec = importlib.util.spec_from_file_location("prepare_instruct", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

ANSWERS = [{"instruction": f"Question {i}?", "context": f"Fact {i}.", "response": f"Answer {i}."} for i in range(20)]
NAMES = {
    "dolly": ("instruction", "context", "response"),
    "alpaca": ("instruction", "input", "output"),
}
PROMPTS = [("prompt", "completion"), ("prompt", "response"), ("question", "answer")]


def make_chat(number, roles=("user", "assistant")):
    return [{"role": role, "content": f"{role} {number}.{turn}"} for turn, role in enumerate(roles)]


def pack(path, text):
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_jsonl(path, rows):
    return pack(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_table(path, rows):
    """Write dict rows in the way the ending of the path says."""
    if ".parquet" in path.name:
        pl.DataFrame(rows).write_parquet(path)
    elif ".jsonl" in path.name:
        write_jsonl(path, rows)
    elif ".json" in path.name:
        pack(path, json.dumps(rows, indent=1))
    else:
        text = io.StringIO()
        style = dict(delimiter="\t", quoting=csv.QUOTE_NONE) if ".tsv" in path.name else {}
        csv.writer(text, **style).writerows([list(rows[0]), *(list(row.values()) for row in rows)])
        pack(path, text.getvalue())
    return path


def run(files, output_dir, *flags):
    files = files if isinstance(files, list) else [files]
    prepare.main(["--input_file", *map(str, files), "--output_dir", str(output_dir), *map(str, flags)])
    assert sorted(path.name for path in output_dir.glob("[!.]*")) == ["train.jsonl", "validation.jsonl"]
    return [read_output(output_dir / name) for name in ("train.jsonl", "validation.jsonl")]


def read_output(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def same_rows(found, expected):
    return sorted(json.dumps(row) for row in found) == sorted(json.dumps(row) for row in expected)


def refusal(capsys, files, output_dir, *flags):
    """Return the message of a run that must end with exit code 2 and leave no file behind."""
    before = sorted(Path(output_dir).glob("*")) if Path(output_dir).is_dir() else None
    with pytest.raises(SystemExit) as error:
        run(files, output_dir, *flags)
    assert error.value.code == 2
    assert (sorted(Path(output_dir).glob("*")) if Path(output_dir).is_dir() else None) == before
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def printed_counts(text):
    """Return {title: number} of the table of counts."""
    pairs = (line.rsplit(maxsplit=1) for line in text.splitlines() if line.startswith(("rows", "  ")))
    return {title.strip().removeprefix("dropped: "): int(number.replace(",", "")) for title, number in pairs}


# ---------------------------------------------------------------------------------------------------------------------
# Layouts and endings


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz"])
@pytest.mark.parametrize("layout", NAMES)
def test_dolly_and_alpaca_are_recognised_in_every_text_file(tmp_path, layout, ending):
    rows = [dict(zip(NAMES[layout], row.values(), strict=True)) for row in ANSWERS]
    train, validation = run(write_table(tmp_path / f"a{ending}", rows), tmp_path / "out")
    assert same_rows(train + validation, ANSWERS) and len(validation) == 1


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("names", PROMPTS)
def test_prompt_layouts_are_recognised_and_have_an_empty_context(tmp_path, names, ending):
    rows = [dict(zip(names, (row["instruction"], row["response"]), strict=True)) for row in ANSWERS]
    train, validation = run(write_table(tmp_path / f"a{ending}", rows), tmp_path / "out")
    assert same_rows(train + validation, [row | {"context": ""} for row in ANSWERS])


def test_category_is_kept_and_an_absent_or_null_one_left_out(tmp_path):
    rows = [ANSWERS[0] | {"category": "open_qa"}, ANSWERS[1] | {"category": None}, ANSWERS[2]]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert same_rows(train + validation, [rows[0], ANSWERS[1], ANSWERS[2]])


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".json.gz", ".parquet"])
def test_chats_are_recognised_and_all_four_roles_kept(tmp_path, ending):
    chats = [make_chat(i, ("system", "user", "assistant", "tool", "assistant", "user", "user")) for i in range(9)]
    rows = [{"label": True, "messages": chat} for chat in chats]
    train, validation = run(write_table(tmp_path / f"a{ending}", rows), tmp_path / "out")
    assert same_rows(train + validation, [{"messages": chat} for chat in chats])


def test_a_json_array_of_bare_message_lists_is_read(tmp_path):
    chats = [make_chat(i) for i in range(9)]
    train, validation = run(write_table(tmp_path / "a.json", chats), tmp_path / "out")
    assert same_rows(train + validation, [{"messages": chat} for chat in chats])


def test_chats_in_a_csv_cell_are_read_as_json(tmp_path):
    chats = [make_chat(i) for i in range(9)]
    path = write_table(tmp_path / "a.csv", [{"messages": json.dumps(chat)} for chat in chats])
    train, validation = run(path, tmp_path / "out")
    assert same_rows(train + validation, [{"messages": chat} for chat in chats])


def test_sharegpt_is_recognised_and_its_roles_renamed(tmp_path):
    turns = [("system", "Be kind."), ("human", "Hi {}"), ("gpt", "a"), ("User", "b"), ("bot", "c"), ("model", "d")]
    rows = [{"conversations": [{"from": r, "value": v.format(i)} for r, v in turns]} for i in range(5)]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    for row in train + validation:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "assistant"]
        assert row["messages"][0] == {"role": "system", "content": "Be kind."}


TURNS = [("human", " Hi {}\n"), ("chatgpt", "a"), ("User", "b"), ("bot", "c"), ("model", "d")]


def make_row(columns, number):
    """A row of a layout that run_clm_instruct.py knows."""
    if columns == ("messages",):
        roles = ("user", "assistant") * 2
        return {
            "messages": [
                {"role": r, "content": text.format(number)} for r, (_, text) in zip(roles, TURNS, strict=False)
            ]
        }
    return {column: f" {column} {number}\n" for column in columns}


@pytest.mark.parametrize("data_format, columns", run_clm_instruct.KNOWN_FORMATS)
def test_every_layout_that_training_knows_is_read_and_means_the_same_to_it_afterwards(tmp_path, data_format, columns):
    rows = [make_row(columns, i) for i in range(20)]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    if data_format == "text":
        assert same_rows([row["text"].strip() for row in train + validation], [row["text"].strip() for row in rows])
        return
    given = argparse.Namespace(text_column=None, data_format=None)
    written = run_clm_instruct.find_format(list(train[0]), given)
    assert written[0] == (data_format if data_format == "chat" else "dolly")
    before = [run_clm_instruct.to_messages(row, data_format, columns) for row in rows]
    assert same_rows([run_clm_instruct.to_messages(row, *written) for row in train + validation], before)


@pytest.mark.parametrize("first", run_clm_instruct.KNOWN_FORMATS)
def test_of_a_file_with_two_layouts_the_one_is_read_that_training_would_take(first):
    args = argparse.Namespace(text_column=None, data_format=None, format="auto")
    for second in run_clm_instruct.KNOWN_FORMATS:
        columns = sorted({*first[1], *second[1]})
        name, fields = prepare.choose_layout("a.jsonl", columns, args)
        known, needed = run_clm_instruct.find_format(columns, args)
        assert name == known and {*needed} == {*fields.values()} - ({"context"} - {*needed})


def test_the_roles_are_those_that_training_knows():
    assert set(prepare.ROLES.values()) == set(chat_turns.ROLES)


def test_what_else_a_turn_holds_goes_along_and_so_do_tools(tmp_path):
    call = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    turns = [{"from": "human", "value": "Where {}?"}, {"from": "gpt", "value": None, "tool_calls": call}]
    turns += [
        {"from": "tool", "value": "20"},
        {"from": "gpt", "value": "Rome", "reasoning_content": "so", "weight": 0},
    ]
    turns += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "Warm", "images": None}]
    rows = [
        {
            "conversations": [t | {"value": t["value"] and t["value"].format(i)} for t in turns],
            "tools": [{"name": "f"}],
        }
        for i in range(9)
    ]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert len(train + validation) == 9
    for row in train + validation:
        assert row["tools"] == [{"name": "f"}]
        roles = ["user", "assistant", "tool", "assistant", "user", "assistant"]
        assert [m["role"] for m in row["messages"]] == roles
        assert row["messages"][1] == {"role": "assistant", "content": "", "tool_calls": call}
        assert row["messages"][3] == {"role": "assistant", "content": "Rome", "reasoning_content": "so", "weight": 0}
        assert set(row["messages"][5]) == {"role", "content"}


def test_prompts_and_completions_that_are_lists_of_messages_become_chats(tmp_path):
    chats = [make_chat(i, ("system", "user", "assistant")) for i in range(9)]
    rows = [{"prompt": chat[:2], "completion": chat[2:]} for chat in chats]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert same_rows(train + validation, [{"messages": chat} for chat in chats])


@pytest.mark.parametrize("column, flags", [("text", []), ("body", ["--text_column", "body"])])
def test_a_text_column_is_read_and_keeps_its_order(tmp_path, column, flags):
    rows = [{column: f"    Text {i}\n      is indented."} for i in range(30)]
    train, validation = run(write_table(tmp_path / "a.csv", rows), tmp_path / "out", *flags)
    assert same_rows(train + validation, [{"text": row[column]} for row in rows])
    assert train == [{"text": row[column]} for row in rows if {"text": row[column]} not in validation]


def test_one_object_a_line_is_read_from_a_json_file_too(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS).rename(tmp_path / "a.json")
    train, validation = run(path, tmp_path / "out")
    assert same_rows(train + validation, ANSWERS)


def test_format_overrules_the_columns(tmp_path, capsys):
    rows = [row | {"text": f"Text {i}"} for i, row in enumerate(ANSWERS)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    train, validation = run(path, tmp_path / "auto")
    assert same_rows(train + validation, ANSWERS)
    assert "as dolly: instruction, context, response; left out: text" in capsys.readouterr().out
    train, validation = run(path, tmp_path / "text", "--format", "text")
    assert same_rows(train + validation, [{"text": row["text"]} for row in rows])


def test_files_of_several_layouts_and_one_kind_are_read_together(tmp_path):
    alpaca = [dict(zip(NAMES["alpaca"], row.values(), strict=True)) for row in ANSWERS[10:]]
    files = [write_jsonl(tmp_path / "a.jsonl", ANSWERS[:10]), write_table(tmp_path / "b.csv", alpaca)]
    train, validation = run(files, tmp_path / "out")
    assert same_rows(train + validation, ANSWERS)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("chars", [1, 150, 4000])
def test_nothing_of_a_txt_is_lost(tmp_path, name, chars):
    paragraphs = [f"  Speaker {i}:\n\tLine {i} of é.\n" + f"word{i} " * (i % 40) for i in range(500)]
    text = "\ufeff\n" + "\r\n \r\n".join(paragraphs)
    train, validation = run(pack(tmp_path / name, text), tmp_path / "out", "--text_chars", chars)
    pieces = [row["text"] for row in train + validation]
    pieces.sort(key=lambda piece: text.index(piece.splitlines()[0]))
    expected = [line.rstrip() for paragraph in paragraphs for line in paragraph.split("\n") if line]
    assert [line.rstrip() for piece in pieces for line in piece.split("\n") if line.strip()] == expected
    # A piece is measured before its \r and its last blanks go, and ends at the latest with the line that doubles it.
    assert validation and all(0.9 * chars <= len(piece) < 2 * chars + 400 for piece in pieces[:-1])


def test_a_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i}\n" for i in range(300))
    train, validation = run(pack(tmp_path / "a.txt", text), tmp_path / "out", "--text_chars", 100)
    lengths = [len(row["text"]) + 1 for row in train + validation]
    assert sum(lengths) == len(text) and sum(length < 200 for length in lengths) <= 1 and max(lengths) < 210
    assert sorted("\n".join(row["text"] for row in train + validation).split("\n")) == sorted(text.split("\n")[:-1])


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning and counts


def test_fields_are_stripped_and_in_one_unicode_form(tmp_path):
    rows = [{"instruction": " Cafe\u0301?\r\n", "context": "a\r\nb\rc", "response": "\n yes\t"}, ANSWERS[0]]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    expected = {"instruction": "Caf\u00e9?", "context": "a\nb\nc", "response": "yes"}
    assert same_rows(train + validation, [expected, ANSWERS[0]])


def test_every_dropped_instruction_is_counted_and_named(tmp_path, capsys):
    bad = [{"instruction": " ", "response": "a"}, {"instruction": "b", "response": None}, {"instruction": "c"}]
    bad += [{"instruction": "d", "response": ["e"]}, {"instruction": "\ud83d", "response": "f"}]
    bad += [ANSWERS[3], {**ANSWERS[4], "category": "x"}, ANSWERS[5] | {"response": " Answer 5.\r\n"}]
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS + bad + [{"instruction": None, "response": "a"}] * 7)
    train, validation = run(path, tmp_path / "out")
    out = capsys.readouterr().out
    counts = printed_counts(out)
    assert same_rows(train + validation, ANSWERS)
    drops = {"empty instruction": 8, "empty answer": 2, "could not be parsed": 2, "duplicate": 3}
    assert {reason: counts[reason] for reason in drops} == drops and counts["rows read"] == 35
    assert (counts["rows kept"], counts["train"], counts["validation"]) == (20, 19, 1)
    assert f"empty instruction: {path}: line 21, {path}: line 29, {path}: line 30" in out
    assert f"{path}: line 32 and 3 more" in out and "line 33" not in out
    assert f"{path}: line 24 (response is list, not text)" in out
    assert f"{path}: line 25 (instruction holds half of a surrogate pair)" in out


def test_every_dropped_chat_is_counted_and_named(tmp_path, capsys):
    user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    bad = {
        "not a list of messages": [None, [], "no list", {"role": "user"}],
        "malformed message": [["Hi", answer], [user, {"role": "assistant"}], [{"content": "Hi"}, answer]],
        "unknown role 'narrator'": [[user, answer, {"role": "narrator", "content": "They met."}]],
        "empty instruction": [[{"role": "user", "content": " "}, answer]],
        "empty answer": [[user, {"role": "assistant", "content": ""}]],
        "no user turn": [[answer]],
        "no assistant turn": [[user], [user, user]],
        "duplicate": [make_chat(3), make_chat(3)],
    }
    bad["malformed message"] += [[user, {"role": "assistant", "content": 5}], [user, {"role": 1, "content": "a"}]]
    rows = [{"messages": chat} for chat in [make_chat(i) for i in range(9)] + [c for cs in bad.values() for c in cs]]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    out = capsys.readouterr().out
    counts = printed_counts(out)
    assert {reason: counts[reason] for reason in bad} == {reason: len(chats) for reason, chats in bad.items()}
    assert counts["rows read"] == len(rows) == sum(counts[name] for name in (*bad, "train", "validation"))
    assert same_rows(train + validation, rows[:9])
    assert f"no assistant turn: {tmp_path / 'a.jsonl'}: line 23, {tmp_path / 'a.jsonl'}: line 24" in out


def test_an_empty_system_message_is_left_out_and_counted(tmp_path, capsys):
    chats = [[{"role": "system", "content": " "}, *make_chat(i)] for i in range(4)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    train, validation = run(path, tmp_path / "out")
    assert same_rows(train + validation, [{"messages": make_chat(i)} for i in range(4)])
    assert printed_counts(capsys.readouterr().out)["empty system messages left out"] == 4


def test_a_csv_row_with_a_field_too_many_is_counted(tmp_path, capsys):
    path = write_table(tmp_path / "a.csv", [{"question": f"q{i}", "answer": "a"} for i in range(4)])
    path.write_text(path.read_text() + "one,two,three\n")
    run(path, tmp_path / "out")
    assert f"{path}: line 6 (3 fields, the header has 2)" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Split, sample, bytes


def test_no_prompt_stands_in_both_files_whatever_its_answer_context_or_case(tmp_path, capsys):
    rows = [
        {"instruction": f"{'PROMPT' if i % 3 else 'Prompt'} {i % 100}", "context": f"{i // 200}", "response": f"{i}"}
        for i in range(1000)
    ]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", "--validation_fraction", 0.2)
    assert (len(train), len(validation)) == (800, 200)
    assert not {row["instruction"].lower() for row in train} & {row["instruction"].lower() for row in validation}
    assert printed_counts(capsys.readouterr().out)["with a prompt seen before"] == 900


def test_chats_that_begin_with_the_same_user_turn_stay_together(tmp_path):
    chats = [
        [{"role": "system", "content": f"{i}"}, *make_chat(i % 20), {"role": "user", "content": f"{i}"}]
        for i in range(200)
    ]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    train, validation = run(path, tmp_path / "out", "--validation_fraction", 0.25)
    first = [{row["messages"][1]["content"] for row in rows} for rows in (train, validation)]
    assert not first[0] & first[1] and (len(first[0]), len(first[1])) == (15, 5)


def test_one_instruction_over_many_contexts_is_split_by_context_and_said(tmp_path, capsys):
    rows = [{"instruction": "Summarize.", "context": f"Text {i % 100}", "response": f"{i}"} for i in range(200)]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    assert (len(train), len(validation)) == (190, 10)
    assert not {row["context"] for row in train} & {row["context"] for row in validation}
    assert "WARNING: only 1 different instructions or first turns in 200 rows" in capsys.readouterr().out


def test_the_sample_is_as_large_as_asked(tmp_path, capsys):
    rows = [{"prompt": f"p{i}", "completion": "c"} for i in range(1000)]
    flags = ["--sample_fraction", 0.5, "--validation_fraction", 0.1]
    train, validation = run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out", *flags)
    assert (len(train), len(validation)) == (450, 50)
    assert printed_counts(capsys.readouterr().out)["not sampled"] == 500


def test_the_order_of_files_and_the_batches_change_no_byte(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i % 90}", "completion": f"c{i % 180}"} for i in range(300)]
    files = [write_jsonl(tmp_path / f"{i}.jsonl", rows[i * 100 :][:100]) for i in range(3)]
    run(files, tmp_path / "forth")
    monkeypatch.setattr(prepare, "HELD_ROWS", 7)
    run(files[::-1], tmp_path / "back")
    for name in ("train.jsonl", "validation.jsonl"):
        assert (tmp_path / "forth" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(300)])
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder, seed, hash_seed in zip(folders, (1, 1, 2), ("1", "2", "3"), strict=True):
        command = [sys.executable, SCRIPT, "--input_file", path, "--output_dir", folder, "--seed", str(seed)]
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "POLARS_MAX_THREADS": hash_seed}
        subprocess.run(command, check=True, env=environment, capture_output=True)
    first, second, other = [[(f / n).read_bytes() for n in ("train.jsonl", "validation.jsonl")] for f in folders]
    assert first == second
    assert first[0] != other[0] and first[1] != other[1]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_all_mistakes_are_said_at_once(tmp_path, capsys):
    (tmp_path / "a.docx").write_text("x")
    flags = ["--sample_fraction", 1.5, "--validation_fraction", 1, "--text_chars", 0]
    flags += ["--format", "chat", "--text_column", "body"]
    message = refusal(capsys, [tmp_path / "none.jsonl", tmp_path / "a.docx", tmp_path], tmp_path / "out", *flags)
    assert "none.jsonl: no such file" in message
    assert "a.docx: unknown ending; known are .jsonl, .json, .csv, .tsv, .parquet, .txt" in message
    assert "--sample_fraction 1.5: must be above 0 and at most 1" in message
    assert "--validation_fraction 1.0: must be above 0 and below 1" in message
    assert "--text_chars 0: at least 1 is needed" in message
    assert "--text_column body: not with --format chat" in message


def test_columns_of_no_known_layout_are_named(tmp_path, capsys):
    path = write_table(tmp_path / "a.csv", [{"comment": "nice", "stars": "5"}])
    message = refusal(capsys, path, tmp_path / "out")
    assert "a.csv: --format auto looks for" in message and "the file has: comment, stars" in message
    assert "(messages) or (prompt, completion) or (prompt, response)" in message and "--text_column" in message
    message = refusal(capsys, path, tmp_path / "out", "--format", "alpaca")
    assert "looks for the columns (instruction, input, output) or (instruction, output), the file has" in message
    message = refusal(capsys, path, tmp_path / "out", "--text_column", "remark")
    assert "--text_column remark looks for the columns (remark), the file has: comment, stars" in message


def test_two_kinds_in_one_run_are_refused(tmp_path, capsys):
    files = [write_jsonl(tmp_path / "a.jsonl", ANSWERS), pack(tmp_path / "b.txt", "text\n")]
    message = refusal(capsys, files, tmp_path / "out")
    assert "a.jsonl holds instructions" in message and "b.txt holds text; run once for each kind" in message


@pytest.mark.parametrize("broken", ['{"prompt": "b", "comple', "[1, 2]", "{} {}"])
def test_a_malformed_jsonl_line_is_named_by_file_and_line(tmp_path, capsys, broken):
    line = '{"prompt": "b", "completion": "c"}\n'
    path = pack(tmp_path / "a.jsonl", line * 200 + broken + "\n")
    assert f"{path}: line 201: not " in refusal(capsys, path, tmp_path / "out")


@pytest.mark.parametrize("text", ['[{"prompt": "b"', '"prompt"', '[{"prompt": "b", "completion": "c"}, 3]'])
def test_a_json_file_that_is_no_array_of_objects_is_refused(tmp_path, capsys, text):
    assert f"{tmp_path / 'a.json'}: " in refusal(capsys, pack(tmp_path / "a.json", text), tmp_path / "out")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".jsonl.gz"])
def test_an_empty_file_is_refused(tmp_path, capsys, ending):
    (tmp_path / f"a{ending}").write_bytes(b"")
    assert f"a{ending}: " in refusal(capsys, tmp_path / f"a{ending}", tmp_path / "out")


def test_a_file_with_a_header_alone_is_refused(tmp_path, capsys):
    path = pack(tmp_path / "a.csv", "prompt,completion\n")
    assert f"no rows in {path}" in refusal(capsys, path, tmp_path / "out")


def test_gzip_that_is_broken_off_and_bytes_that_are_not_utf8_are_refused(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl.gz", ANSWERS)
    path.write_bytes(path.read_bytes()[:-20])
    assert "a.jsonl.gz: cannot be read after line" in refusal(capsys, path, tmp_path / "out")
    (tmp_path / "a.txt").write_bytes(b"fine\n\xe9\n")
    assert "a.txt: line 2 is not UTF-8" in refusal(capsys, tmp_path / "a.txt", tmp_path / "out")


def test_an_output_dir_that_is_not_empty_or_a_file_is_refused(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", ANSWERS)
    assert f"--output_dir {tmp_path}: not empty, nothing is overwritten" in refusal(capsys, path, tmp_path)
    assert "is a file, not a folder" in refusal(capsys, path, path / "deeper")
    (tmp_path / "empty").mkdir()
    run(path, tmp_path / "empty")


def test_nothing_left_to_split_is_said_with_the_counts(tmp_path, capsys):
    rows = [{"prompt": "same", "completion": "a"}, {"prompt": "Same", "completion": "b"}, {"completion": "c"}]
    with pytest.raises(SystemExit) as error:
        run(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path / "out")
    out, err = capsys.readouterr()
    assert error.value.code == 2 and "2 rows with 1 different prompts are left" in err
    assert printed_counts(out)["empty instruction"] == 1 and not (tmp_path / "out").exists()


def test_a_disk_that_is_full_leaves_no_file(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"p{i}", "completion": "c" * 100} for i in range(900)])
    command = [sys.executable, SCRIPT, "--input_file", path, "--output_dir", tmp_path / "out"]
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (40_000, 40_000))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, env=environment)
    assert result.returncode == 2 and "File too large" in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_the_script_alone_says_its_errors_without_a_traceback(tmp_path):
    command = [sys.executable, SCRIPT, "--input_file", "none.txt", "--output_dir", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "--input_file none.txt: no such file" in result.stderr
    assert "Traceback" not in result.stderr
