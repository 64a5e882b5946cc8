# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/init_model.py: what it makes loads everywhere, is the same each time, and bad input is refused early."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

SCRIPT = Path(__file__).parents[1] / "tools" / "init_model.py"
spec = importlib.util.spec_from_file_location("init_model", SCRIPT)
init_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(init_model)

SENTENCES = [f"The camera number {i} takes sharp pictures, and its battery lasts {i * 7} hours." for i in range(200)]


@pytest.fixture(scope="module")
def train_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "train.csv"
    rows = [f'{i},"{sentence}",good camera' for i, sentence in enumerate(SENTENCES)]
    path.write_text("id,text,summary\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folders(train_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for architecture in ("t5", "llama"):
        init_model.main(["--architecture", architecture, "--train_file", str(train_file)] + out(root / architecture))
    return root


def out(folder):
    return ["--output_dir", str(folder)]


def refused(argv, capsys):
    """Run main on argv, assert exit code 2 and return what went to stderr."""
    with pytest.raises(SystemExit) as stop:
        init_model.main([str(part) for part in argv])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_t5_tokenizer_comes_back_and_ends_with_one_eos(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "t5")
    ids = tokenizer("The camera takes sharp pictures.").input_ids
    assert tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<unk>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert ids[-1] == 1 and ids.count(1) == 1 and 2 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "The camera takes sharp pictures."
    assert tokenizer.model_max_length == 512
    assert len(ids) < 25  # pieces, not characters


def test_llama_tokenizer_comes_back_with_one_bos_and_no_eos(folders):
    tokenizer = AutoTokenizer.from_pretrained(folders / "llama")
    text = "The camera\ttakes  ☃ pictures.\nIndeed"
    ids = tokenizer(text).input_ids
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids and 0 not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.model_max_length == 512


def test_t5_model_loads_and_its_first_loss_is_that_of_a_guess(folders):
    model = AutoModelForSeq2SeqLM.from_pretrained(folders / "t5").eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / "t5")
    batch = tokenizer(SENTENCES[:8], padding=True, return_tensors="pt")
    loss = model(**batch, labels=batch.input_ids).loss.item()
    assert 5 < loss < 9  # log(1,024) = 6.9; the tied matrix at a wrong scale gives tens
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    generation = GenerationConfig.from_pretrained(folders / "t5")
    assert (generation.decoder_start_token_id, generation.pad_token_id, generation.eos_token_id) == (0, 0, 1)


def test_t5_model_learns_without_instability(folders):
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_pretrained(folders / "t5")
    batch = AutoTokenizer.from_pretrained(folders / "t5")(SENTENCES[:8], padding=True, return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        losses.append(model(**batch, labels=batch.input_ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] / 2


def test_llama_model_loads_and_its_first_loss_is_that_of_a_guess(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "llama").eval()
    ids = AutoTokenizer.from_pretrained(folders / "llama")(SENTENCES[0], return_tensors="pt").input_ids
    assert 6 < model(input_ids=ids, labels=ids).loss.item() < 8
    generation = GenerationConfig.from_pretrained(folders / "llama")
    assert (generation.bos_token_id, generation.pad_token_id, generation.eos_token_id) == (1, 3, 2)


@pytest.mark.parametrize("architecture", ["t5", "llama"])
def test_same_input_gives_the_same_bytes(architecture, folders, train_file, tmp_path):
    init_model.main(["--architecture", architecture, "--train_file", str(train_file)] + out(tmp_path / "again"))
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == sorted(path.name for path in (folders / architecture).iterdir())
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (folders / architecture / name).read_bytes(), name


def test_another_seed_gives_other_weights_and_the_same_tokenizer(folders, train_file, tmp_path):
    init_model.main(["--train_file", str(train_file), "--seed", "1"] + out(tmp_path / "m"))
    read = [lambda name, root=root: (root / name).read_bytes() for root in (tmp_path / "m", folders / "t5")]
    assert read[0]("tokenizer.json") == read[1]("tokenizer.json")
    assert read[0]("model.safetensors") != read[1]("model.safetensors")


@pytest.mark.parametrize(
    ("architecture", "preset", "millions"),
    [
        ("t5", "t5-small", 60.5),
        ("t5", "t5-base", 222.9),
        ("t5", "t5-large", 737.7),
        ("t5", "t5-3b", 2851.6),
        ("t5", "t5-11b", 11307.3),
        ("llama", "llama-60m", 58.1),
        ("llama", "llama2-7b", 6738.4),
        ("llama", "llama2-13b", 13015.9),
        ("llama", "llama3-8b", 8030.3),
    ],
)
def test_preset_has_the_published_number_of_parameters(architecture, preset, millions):
    with torch.device("meta"):
        model = init_model.make_model(init_model.make_config(architecture, preset), "bfloat16")
    assert round(model.num_parameters() / 1e6, 1) == millions


def test_t5_embedding_has_the_published_32128_rows():
    assert init_model.make_config("t5", "t5-base").vocab_size == 32128


def test_sentinels_are_the_last_entries_and_count_down_and_come_back(tmp_path):
    init_model.train_t5_tokenizer(SENTENCES, vocab_size=500, extra_ids=100).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    last = len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids(["<extra_id_0>", "<extra_id_99>"]) == [last, last - 99]
    assert tokenizer("<extra_id_0>").input_ids[-2:] == [last, 1]


def test_report_names_parameters_vocabulary_files_and_random_weights(train_file, tmp_path, capsys):
    init_model.main(["--train_file", str(train_file), "--dtype", "bfloat16"] + out(tmp_path / "m"))
    said = capsys.readouterr().out
    for part in ("parameters", "vocabulary", "model.safetensors", "the weights are random: train before use"):
        assert part in said
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").dtype == torch.bfloat16


def test_short_text_gives_a_smaller_tokenizer_and_says_so(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one small text\n")
    init_model.main(["--train_file", str(tmp_path / "a.txt"), "--vocab_size", "800"] + out(tmp_path / "m"))
    assert "not the 800 asked for; the embedding keeps 896 rows" in capsys.readouterr().out
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m").config.vocab_size == 896


def test_rare_characters_do_not_fill_the_t5_vocabulary():
    chinese = "".join(chr(0x4E00 + i) for i in range(3000))
    tokenizer = init_model.train_t5_tokenizer(SENTENCES + [chinese], vocab_size=300, extra_ids=0)
    assert len(tokenizer) <= 300
    assert "▁camera" in tokenizer.get_vocab()


def test_every_kind_of_file_gives_the_same_texts(tmp_path):
    import polars

    rows = [{"text": "a good camera", "price": 12.5}, {"text": 'so "so"', "price": 3.0}]
    polars.DataFrame(rows).write_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text('\ufefftext,price\na good camera,12.5\n"so ""so""",3\n', encoding="utf-8")
    (tmp_path / "a.tsv").write_text('text\tprice\na good camera\t12.5\nso "so"\t3\n')
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    (tmp_path / "a.txt").write_text('a good camera\nso "so"\n')
    for path in tmp_path.iterdir():
        texts = [text.strip() for text in init_model.read_texts(path, None)]
        assert texts == ["a good camera", 'so "so"'], path.name


def test_chat_messages_count_as_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    assert init_model.read_texts(tmp_path / "a.jsonl", ["messages"]) == ["user", "hello"]


def test_wrong_arguments_are_reported_together(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    argv = ["--preset", "llama2-7b", "--train_file", tmp_path / "no.csv", "a.docx"] + out(tmp_path / "full")
    said = refused(argv, capsys)
    assert "llama2-7b is not a t5 preset; those are: tiny, t5-small" in said
    assert "no.csv: no such file" in said
    assert "a.docx: unknown ending" in said
    assert "is not empty; nothing is overwritten" in said
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["kept"]


@pytest.mark.parametrize(("architecture", "least"), [("t5", 103), ("llama", 260)])
def test_too_small_a_vocabulary_is_refused_with_the_least(architecture, least, train_file, tmp_path, capsys):
    argv = ["--architecture", architecture, "--train_file", train_file, "--vocab_size", least - 1]
    assert f"needs {least} or more" in refused(argv + out(tmp_path / "m"), capsys)


def test_missing_column_is_refused_and_those_there_are_listed(train_file, tmp_path, capsys):
    argv = ["--train_file", train_file, "--text_columns", "body"] + out(tmp_path / "m")
    assert "no column body; there are: id, text, summary" in refused(argv, capsys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text in there"),
        ("a.csv", b"text\n  \n", "no text in there"),
        ("a.txt", b"fine\nnot \xff fine\n", "line 2 is not UTF-8"),
        ("a.csv", b"text\nfine\nnot \xe9 fine\n", "line 3 is not UTF-8"),
        ("a.jsonl", b'{"a": "b"}\n{"a": \n', "line 2: not JSON"),
        ("a.json", b"[1, 2]", "expected objects"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.parquet", b"not parquet", "not a parquet file"),
    ],
)
def test_unreadable_text_is_refused_by_name(name, content, message, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    said = refused(["--train_file", tmp_path / name] + out(tmp_path / "m"), capsys)
    assert message in said and name in said
    assert not (tmp_path / "m").exists()
