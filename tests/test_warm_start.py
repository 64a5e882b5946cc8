# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""run_summarization.py joins a BERT and a GPT-2, or two BERTs, made on the spot; a test's name is its claim."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
)

import run_generation
import run_summarization as script
from conftest import ROOT, make_rows, run, write_csv

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LENGTHS = ["--max_source_length", "30", "--max_target_length", "20"]


def make_bert(folder: Path, texts: list[str]) -> None:
    """96 positions, no dropout; its tokenizer knows [CLS] and [SEP] but neither bos nor eos."""
    words = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL))
    folder.mkdir()
    words.model.save(str(folder))
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=96, **sizes, **dropout)).save_pretrained(
        folder
    )


def make_gpt2(folder: Path, texts: list[str]) -> None:
    """32 positions, no dropout, another width than BERT; its tokenizer knows <|endoftext|> and no padding."""
    parts = Tokenizer(models.BPE())
    parts.pre_tokenizer, parts.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": ["<|endoftext|>"], "initial_alphabet": alphabet, "show_progress": False}
    parts.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, **settings))
    folder.mkdir()
    parts.model.save(str(folder))
    tokenizer = GPT2TokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes, **ends)).save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with bert, gpt2, many.csv (800 rows), train.csv (90) and validation.csv (13)."""
    folder = tmp_path_factory.mktemp("warm")
    rows = make_rows(800, 3)
    for name, part in (("many", rows), ("train", make_rows(90, 1)), ("validation", make_rows(13, 2))):
        write_csv(folder / f"{name}.csv", part)
    torch.manual_seed(0)
    for make, name in ((make_bert, "bert"), (make_gpt2, "gpt2")):
        make(folder / name, [text for row in rows for text in row[:2]])
    return folder


def tune(place: Path, out: str, *flags, train: str = "many.csv") -> Path:
    """Train and evaluate in this process; returns the folder written."""
    argv = ["--do_train", "--do_eval", "--train_file", place / train, "--validation_file", place / "validation.csv"]
    argv += ["--output_dir", place / out, "--predict_with_generate", "--save_strategy", "no", *LENGTHS, *flags]
    script.main([str(part) for part in argv])
    return place / out


def pair(place: Path, encoder: str, decoder: str) -> list:
    return ["--encoder_name_or_path", place / encoder, "--decoder_name_or_path", place / decoder]


@pytest.fixture(scope="module")
def bert_gpt2(place) -> Path:
    learning = ["--learning_rate", "6e-3", "--max_steps", "100", "--per_device_train_batch_size", "32"]
    return tune(place, "a", *pair(place, "bert", "gpt2"), *learning, "--logging_steps", "10", "--eval_on_start")


@pytest.fixture(scope="module")
def bert_bert(place) -> Path:
    learning = ["--learning_rate", "5e-3", "--max_steps", "100", "--per_device_train_batch_size", "32"]
    return tune(place, "b", *pair(place, "bert", "bert"), *learning, "--logging_steps", "10", "--eval_on_start")


def history(out: Path, key: str) -> list[float]:
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry and "train_runtime" not in entry]


def read_predictions(out: Path, name: str = "generated_predictions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text("utf-8").splitlines()]


def load(out: Path):
    """The written folder as anyone loads it: (model, tokenizer of sources, tokenizer of targets)."""
    tokenizers = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(out / "decoder_tokenizer")
    return EncoderDecoderModel.from_pretrained(out).eval(), *tokenizers


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["bert_gpt2", "bert_bert"])
def test_a_warm_started_model_learns(name, request):
    out = request.getfixturevalue(name)
    losses, rouge = history(out, "loss"), history(out, "eval_rouge1")
    assert losses[-1] < losses[0] / 2 and rouge[-1] > rouge[0] + 30


@pytest.mark.parametrize("name", ["bert_gpt2", "bert_bert"])
def test_the_written_folder_generates_the_same_text_in_a_fresh_load(name, request):
    out = request.getfixturevalue(name)
    model, reader, writer = load(out)
    rows = read_predictions(out)
    assert len(rows) == 13 and len({row["prediction"] for row in rows}) > 3
    for row in rows:
        ids = model.generate(**reader(row["source"], return_tensors="pt", truncation=True, max_length=30))
        assert writer.decode(ids[0], skip_special_tokens=True).strip() == row["prediction"]
        if len(ids[0]) < 20:
            assert ids[0][0] == writer.bos_token_id and ids[0][-1] == writer.eos_token_id


def test_run_generation_writes_the_same_texts(bert_gpt2, place):
    cut = ["--max_source_length", "30", "--text_column", "review_body", "--output_file", place / "texts.jsonl"]
    argv = ["--model_name_or_path", bert_gpt2, "--input_file", place / "validation.csv", "--dtype", "float32", *cut]
    run_generation.main([str(part) for part in argv])
    texts = [row["prediction"] for row in read_predictions(place, "texts.jsonl")]
    assert texts == [row["prediction"] for row in read_predictions(bert_gpt2)]


def test_evaluation_loss_is_the_mean_over_all_target_tokens_and_the_end(bert_gpt2):
    model, reader, writer = load(bert_gpt2)
    total, count = 0.0, 0
    for row in read_predictions(bert_gpt2):
        labels = torch.tensor([writer(row["reference"])["input_ids"] + [writer.eos_token_id]])
        source = reader(row["source"], return_tensors="pt", truncation=True, max_length=30)
        # labels= would mask the start where it is the padding too (transformers 5.23), and generate() does not.
        shifted = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), labels[:, :-1]], dim=1)
        with torch.no_grad():
            logits = model(**source, decoder_input_ids=shifted).logits
        total += torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum").item()
        count += labels.numel()
    results = json.loads((bert_gpt2 / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-4)


SGD = ["--optim", "sgd", "--learning_rate", "1e-3", "--logging_steps", "1", "--num_train_epochs", "1"]


@pytest.fixture(scope="module")
def at_once(bert_gpt2, place) -> Path:
    """An epoch of 16 rows a step, from the folder that a warm start wrote."""
    flags = ["--model_name_or_path", bert_gpt2, *SGD, "--per_device_train_batch_size", "16"]
    return tune(place, "16x1", *flags, train="train.csv")


def assert_same_course(found: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "eval_rouge1"):
        values = history(expected, key)
        assert values and history(found, key) == pytest.approx(values, rel=1e-4), key


def test_losses_and_gradients_are_equal_however_the_batch_is_cut(at_once, bert_gpt2, place):
    cut = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    out = tune(place, "4x4", "--model_name_or_path", bert_gpt2, *SGD, *cut, train="train.csv")
    assert_same_course(out, at_once)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_losses_and_gradients_are_equal_on_two_ranks_of_zero(at_once, bert_gpt2, place, stage):
    argv = ["--do_train", "--do_eval", "--train_file", "train.csv", "--validation_file", "validation.csv", *LENGTHS]
    argv += ["--predict_with_generate", "--save_strategy", "no", "--per_device_train_batch_size", "4", *SGD]
    argv += ["--model_name_or_path", bert_gpt2, "--gradient_accumulation_steps", "2", "--output_dir", f"zero{stage}"]
    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", "29581", ROOT / "run_summarization.py"]
    run([*ranks, *argv, "--deepspeed", ROOT / f"ds_configs/zero{stage}.json"], cwd=place)
    assert_same_course(place / f"zero{stage}", at_once)
    assert read_predictions(place / f"zero{stage}") == read_predictions(at_once)
    assert (place / f"zero{stage}/decoder_tokenizer/tokenizer.json").is_file()


def test_a_run_goes_on_from_its_checkpoint_to_the_same_weights(place):
    flags = [*pair(place, "bert", "gpt2"), "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    whole = tune(place, "whole", *flags, train="train.csv")
    assert (whole / "checkpoint-3/decoder_tokenizer").is_dir()
    shutil.copytree(whole / "checkpoint-3", place / "resumed/checkpoint-3")
    resumed = tune(place, "resumed", *flags, train="train.csv")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_labels_are_the_targets_tokens_and_one_end_without_a_start(place, decoder, padded):
    arguments = [str(part) for part in [*pair(place, "bert", decoder), *LENGTHS, "--do_train", "--output_dir", "x"]]
    arguments += ["--train_file", str(place / "train.csv")]
    parsed = script.parse_arguments(arguments, script.SUMMARIZATION_ARGUMENTS, script.find_argument_problems)
    reader, writer, model = script.load_model(*parsed)
    rows = {"t": ["The lens is great and small", "ok"], "s": ["great lens and a great strap", "weak"]}
    limits = {"max_source_length": 5, "max_target_length": 4, "pad_to_max_length": padded}
    limits["ignore_pad_token_for_loss"] = True
    out = script.tokenize_rows(rows, reader, "t", "s", "", limits, writer)
    end, bare = writer.eos_token_id, [writer(text, add_special_tokens=False)["input_ids"] for text in rows["s"]]
    expected = [[*bare[0][:3], end], [*bare[1][:3], end]]
    assert len(bare[0]) > 3 and out["target_cut"][0] and out["target_cut"][1] == (len(bare[1]) > 3)
    assert out["labels"] == [row + [-100] * (4 - len(row)) if padded else row for row in expected]
    assert out["input_ids"][0][0] == reader.cls_token_id and out["input_ids"][0][-1] == reader.sep_token_id
    assert model.config.decoder_start_token_id == (writer.cls_token_id if decoder == "bert" else end)
    assert model.generation_config.eos_token_id == end == (writer.sep_token_id if decoder == "bert" else end)

    # Collated, the end stays a label also where it is the padding (GPT-2), and the padding is none.
    features = [{k: out[k][i] for k in ("input_ids", "attention_mask", "labels")} for i in range(2)]
    batch = script.DataCollatorForSeq2Seq(reader, model=model)(features)
    assert (batch["labels"] == end).sum() == 2
    assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 2
    assert batch["decoder_input_ids"][0, 1:].tolist() == bare[0][:3]


# ------------------------------------------------------------------------------------------------ messages


def message(place: Path, *flags) -> str:
    argv = ["--do_train", "--train_file", place / "train.csv", "--output_dir", place / "new", *flags]
    with pytest.raises(script.UsageError) as caught:
        script.main([str(part) for part in argv])
    return str(caught.value)


def test_one_model_or_both_halves_are_asked_for(place):
    both = pair(place, "bert", "gpt2")
    claim = "give --model_name_or_path, or --encoder_name_or_path and --decoder_name_or_path; this has "
    assert message(place) == claim + "none of them"
    assert message(place, *both[:2]) == claim + "--encoder_name_or_path"
    assert message(place, *both[2:]) == claim + "--decoder_name_or_path"
    assert "this has --model_name_or_path and --encoder" in message(place, "--model_name_or_path", "t5-small", *both)
    assert "--config_name: goes with --model_name_or_path" in message(place, *both, "--config_name", "x")


def test_a_half_that_is_no_model_folder_is_named(place):
    told = message(place, *pair(place, "nowhere", "."))
    assert f"--encoder_name_or_path {place}/nowhere: there is no such folder" in told
    assert f"--decoder_name_or_path {place}: the folder has no config.json" in told


def test_lengths_beyond_a_halfs_positions_are_refused(place):
    both = pair(place, "bert", "gpt2")
    told = message(place, *both)
    assert told == "--max_source_length 1024: the encoder has positions for 96 tokens; give --max_source_length 96"
    told = message(place, *both, "--max_source_length", "96")
    assert told == "--max_target_length 128: the decoder has positions for 32 tokens; give --max_target_length 32"
    told = message(place, *both, *LENGTHS, "--generation_max_length", "33")
    assert told.startswith("--generation_max_length 33: the decoder has positions for 32 tokens")


def test_a_decoder_that_cannot_look_at_an_encoder_is_refused(place):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shutil.copytree(place / "gpt2", place / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(place / "llama")
    told = message(place, *pair(place, "bert", "llama"), *LENGTHS)
    assert f"--decoder_name_or_path {place}/llama: is no encoder-decoder" in told
