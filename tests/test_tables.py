# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tables.py: every kind of table gives the same text, and what is not text is refused by column, type and row."""

import datetime
import gzip
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

import run_clm_instruct
import run_generation
import run_summarization
import tables
from conftest import ROOT, run_warm

ROWS = [
    {"text": "007", "summary": "TRUE"},
    {"text": "1.50, a\nline", "summary": '"so" NA'},
    {"text": "", "summary": "é"},
]


@pytest.fixture
def read(tmp_path):
    """Rows of a file with this name and content."""

    def rows(name: str, content, **flags) -> list[dict]:
        args = SimpleNamespace(cache_dir=str(tmp_path / "cache"), **flags)
        path = write(tmp_path / name, content)
        return tables.read_table(str(path), args).to_list()

    return rows


@pytest.fixture
def refusal(read):
    def message(name: str, content, **flags) -> str:
        with pytest.raises(tables.UsageError) as caught:
            read(name, content, **flags)
        return str(caught.value).split(name, 1)[1]

    return message


def write(path, content):
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if path.suffix.lower() == ".gz" else content)
    return path


def write_csv(separator: str = ",", end: str = "\n") -> str:
    cells = [["text", "summary"], *([row["text"], row["summary"]] for row in ROWS)]
    quote = '"{}"'.format
    return end.join(separator.join(quote(cell.replace('"', '""')) for cell in row) for row in cells) + end


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
TABLES = {
    "a.csv": write_csv(),
    "old mac.csv": write_csv(end="\r"),
    "windows.csv": write_csv(end="\r\n"),
    "bom.csv": b"\xef\xbb\xbf" + write_csv().encode(),
    "a.csv.gz": write_csv(),
    "a.tsv": write_csv("\t"),
    "A.TSV.GZ": write_csv("\t"),
    "a.jsonl": LINES,
    "a.jsonl.gz": LINES,
    "array.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "key.json": json.dumps({"version": 1, "data": ROWS}),
    "pretty key.json.gz": json.dumps({"data": ROWS, "licence": "MIT"}, indent=2),
    "lines.json": LINES,
}


@pytest.mark.parametrize("name", TABLES)
def test_every_kind_of_table_gives_the_same_text(read, name):
    assert read(name, TABLES[name]) == ROWS


def test_parquet_gives_the_same_text(read, tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "b.parquet")
    assert read("a.parquet", (tmp_path / "b.parquet").read_bytes()) == ROWS


def test_other_separators_and_encodings_are_named_with_their_flag_and_read_by_it(read, refusal):
    assert "give --delimiter ';'" in refusal("a.csv", write_csv(";").replace('"', "").split("\n", 1)[0] + "\na;b\n")
    assert read("a.csv", write_csv(";"), delimiter=";") == ROWS
    latin = write_csv().encode("cp1252")
    assert ":5: not UTF-8 (byte 0xe9); give --file_encoding" in refusal("a.csv", latin)
    assert read("a.csv", latin, file_encoding="cp1252") == ROWS
    assert "UTF-16, not UTF-8; give --file_encoding utf-16" in refusal("a.csv", write_csv().encode("utf-16"))
    assert read("a.csv", write_csv().encode("utf-16"), file_encoding="utf-16") == ROWS
    assert "--file_encoding utf-99: not known" in refusal("a.csv", latin, file_encoding="utf-99")


def test_quotes_in_a_tab_separated_file_are_letters_where_they_do_not_enclose_fields(read):
    assert read("a.tsv", 'text\tsummary\n"Great" lens\tgood\n5" screen\tbad\n') == [
        {"text": '"Great" lens', "summary": "good"},
        {"text": '5" screen', "summary": "bad"},
    ]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "text,text\na,b\n", ": the column 'text' stands twice in the header; rename one"),
        ("a.csv", '{"text": "a", "summary": "b"}\n', ": JSON, not CSV; rename it to .jsonl"),
        ("a.csv", 'text,summary\n"a,b\nc,d\n', ":2: the row that starts here is not CSV"),
        ("a.csv", "text,summary\na,b,c\n", ":2: 3 fields where the header has 2"),
        ("a.csv.gz", b"", ": the file is empty"),
        ("a.json", "[1, 2]", ": element 0 of the array is not an object"),
        ("a.json", "7", ": not an array of rows but a int"),
        ("a.json", "[" * 100_000, ": not JSON: "),
        ("a.json", '{"text": ["a", "b"], "summary": ["c", "d"]}', ": one object with arrays 'text', 'summary'"),
        ("a.json", '{"train": [{"text": "a"}], "test": [{"text": "b"}]}', ": one object with arrays 'train', 'test'"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": \n', ":3: malformed JSON"),
        ("a.jsonl", '{"text": "a"}\n7\n', ":2: not a JSON object but a int"),
        ("a.jsonl", '{"text": "\\ud800"}\n', ": rows 0 to 1: half of a surrogate pair"),
        ("a.parquet", "text", ": cannot be read as Parquet"),
        ("a.xlsx", "text", ": unknown ending; known are .csv, .tsv"),
        ("a.parquet.gz", "text", ": unknown ending"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(refusal, tmp_path, name, content, said):
    if content == b"":
        (tmp_path / "none.csv.gz").write_bytes(b"")
        with pytest.raises(tables.UsageError, match="the file is empty"):
            tables.convert(str(tmp_path / "none.csv.gz"), SimpleNamespace())
    else:
        assert refusal(name, content).startswith(said)


def test_a_torn_gz_is_refused(tmp_path):
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * 10_000)[:60])
    with pytest.raises(tables.UsageError, match="cannot be read after line"):
        tables.convert(str(tmp_path / "a.csv.gz"), SimpleNamespace(cache_dir=str(tmp_path)))


def find(tmp_path, rows: list[dict], kind: str = "jsonl", columns=("text", "summary")) -> list[str]:
    """find_problems() of a file with the rows."""
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(train_file=str(path), cache_dir=str(tmp_path / "cache"))
    return tables.find_problems(args, ["train_file", "test_file"], lambda there, args: columns)


@pytest.mark.parametrize(
    "cell, kind",
    [(7, "int"), (1.5, "float"), (True, "bool"), (["a"], "list"), ({"a": "b"}, "dict")],
)
def test_a_column_that_is_not_text_is_refused_by_name_type_and_first_row(tmp_path, cell, kind):
    rows = [{"text": "a", "summary": "b", "id": 7}] * 3 + [{"text": cell, "summary": "b", "id": 8}]
    (problem,) = find(tmp_path, rows)
    assert problem.endswith(f"a.jsonl: column 'text' holds {kind}, not text, first in row 3; write it as text")


@pytest.mark.parametrize("cell, kind", [(b"a", "bytes"), (datetime.date(2026, 1, 2), "date")])
def test_a_parquet_column_that_is_not_text_is_refused(tmp_path, cell, kind):
    (problem,) = find(tmp_path, [{"text": cell, "summary": "b"}], "parquet")
    assert f"column 'text' holds {kind}, not text, first in row 0" in problem


def test_dates_written_as_text_stay_as_they_are(read):
    assert read("a.jsonl", '{"text": "2020-01-01"}\n') == [{"text": "2020-01-01"}]


def test_columns_that_come_late_are_there_from_the_first_row_on(read, monkeypatch):
    monkeypatch.setattr(tables, "BATCH", 2)
    rows = [{"text": str(i)} for i in range(5)] + [{"text": "x", "summary": "late"}]
    found = read("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert found == [{"summary": None} | row for row in rows]


def test_chats_may_be_lists_and_are_json(tmp_path, read):
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [{"a": 1}]}]
    assert find(tmp_path, [{"messages": chat}], columns=("chat", ("messages",))) == []
    assert json.loads(read("a.jsonl", json.dumps({"messages": chat}) + "\n")[0]["messages"]) == chat
    assert read("chats.json", json.dumps([chat])) == [{"messages": json.dumps(chat)}]
    one = json.dumps({"messages": chat})
    assert read("one.json", one) == read("one.jsonl", one) == [{"messages": json.dumps(chat)}]


def test_with_their_types_numbers_and_lists_come_out_as_they_went_in(tmp_path):
    rows = [{"text": "a", "n": 7, "tags": ["x"]}, {"text": "b", "n": None, "tags": []}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(cache_dir=str(tmp_path / "cache"))
    assert tables.read_table(str(path), args, typed=True).to_list() == rows
    mixed = write(tmp_path / "b.jsonl", '{"text": "a", "n": 7}\n{"text": "b", "n": [1]}\n')
    assert tables.read_table(str(mixed), args, typed=True)[1]["n"] == "[1]"


def test_the_training_columns_rule_for_every_file(tmp_path):
    (tmp_path / "train.csv").write_text("review,headline\na,b\n")
    (tmp_path / "test.csv").write_text("id,review,title\n1,a,b\n")
    args = SimpleNamespace(train_file=str(tmp_path / "train.csv"), test_file=str(tmp_path / "test.csv"))
    args.cache_dir = str(tmp_path)
    (problem,) = tables.find_problems(args, ["train_file", "test_file"], lambda there, args: ("review", "headline"))
    assert problem.endswith("test.csv: has no column 'headline', which --train_file has; it has id, review, title")


def test_a_file_that_changes_is_read_again(tmp_path, read):
    assert read("a.jsonl", '{"text": "old"}\n') == [{"text": "old"}]
    assert read("a.jsonl", '{"text": "newer"}\n') == [{"text": "newer"}]


# ------------------------------------------------------------------------------------------------ data sets

CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ODD = {"int": 7, "list": ["a"], "dict": {"a": "b"}, "bytes": b"a", "datetime": datetime.datetime(2026, 1, 2)}


def make_dataset(folder, split: str, rows: list[dict]) -> str:
    """A data set of Parquet files in a folder, as the hub has them."""
    (folder / "set/data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"set/data/{split}-00000-of-00001.parquet")
    return str(folder / "set")


def load_by_each_script(folder: str, tmp_path, split: str, columns: tuple) -> list[str]:
    """What each script says of a column of a data set: nothing where it takes it."""
    data_args = SimpleNamespace(dataset_name=folder, dataset_config_name=None, dataset_split=split, max_samples=None)
    model_args, said = SimpleNamespace(cache_dir=str(tmp_path / "cache"), token=None), []
    for script in (run_summarization, run_clm_instruct):
        raw = script.load_raw_datasets(data_args, model_args)
        said.append(explain(script.tables.check_split, raw, split, columns, data_args))
    table = run_generation.load_table(data_args, model_args)
    return [*said, explain(tables.check_dataset, table, f"--dataset_name {folder}", columns[-1:])]


def explain(check, *arguments) -> str:
    try:
        check(*arguments)
    except tables.UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ODD)
def test_a_data_sets_column_that_is_not_text_is_refused_by_every_script(tmp_path, kind):
    rows = [{"text": "a", "summary": None, "id": 7}, {"text": "b", "summary": ODD[kind], "id": 8}]
    folder = make_dataset(tmp_path, "test", rows)
    end = f"column 'summary' holds {kind}, not text, first in row 1; write it as text"
    first, second, third = load_by_each_script(folder, tmp_path, "test", ("text", "summary"))
    assert first == second == f"--dataset_name {folder}: test: {end}" and third == f"--dataset_name {folder}: {end}"


def test_a_data_sets_texts_chats_and_columns_that_are_not_used_are_taken(tmp_path):
    rows = [{"id": 7, "text": None, "messages": CHAT}, {"id": 8, "text": "a", "messages": CHAT}]
    folder = make_dataset(tmp_path, "train", rows)
    assert load_by_each_script(folder, tmp_path, "train", ("text", "messages")) == ["", "", ""]


def test_a_data_set_without_the_split_or_the_column_is_named(tmp_path):
    raw = {"train": Dataset.from_dict({"text": ["a"]})}
    args = SimpleNamespace(dataset_name="name")
    assert (
        explain(tables.check_split, raw, "test", (), args) == "--dataset_name name: has no split 'test'; it has train"
    )
    lost = explain(tables.check_split, raw, "train", ("text", "summary"), args)
    assert lost == "train: has no column 'summary', which the training data has; it has text"


@pytest.mark.parametrize("name", ["run_summarization", "run_clm_instruct", "run_generation"])
def test_a_script_ends_with_code_2_at_a_data_set_that_is_not_text(name, work, place, tmp_path):
    columns = ("instruction", "response") if name == "run_clm_instruct" else ("text", "summary")
    folder = make_dataset(tmp_path, "train", [dict(zip(columns, (7, 8), strict=True))])
    model = place / "tiny-llama" if name == "run_clm_instruct" else work / "tiny-t5"
    words = ["--do_train", "--output_dir", "out"]
    if name == "run_generation":
        words = ["--dataset_split", "train", "--output_file", "out.csv"]
    words += ["--model_name_or_path", model, "--dataset_name", folder]
    done = run_warm(ROOT / f"{name}.py", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert f"column {columns[0]!r} holds int, not text, first in row 0; write it as text" in done.stdout
