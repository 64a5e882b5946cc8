# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/join_models.py joins a BERT and a GPT-2, or two BERTs; run_summarization.py trains what it wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BertTokenizerFast,
    DataCollatorForSeq2Seq,
    DistilBertConfig,
    DistilBertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2TokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaModel,
)

import join_models as tool
import run_generation
import run_summarization as script
from conftest import ROOT, make_rows, run, run_warm, write_csv

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


def join(place: Path, encoder: str, decoder: str, out: str, *flags) -> Path:
    """Join two folders of `place` in this process; returns the folder written."""
    argv = ["--encoder_name_or_path", place / encoder, "--decoder_name_or_path", place / decoder, *flags]
    assert tool.main([str(part) for part in (*argv, "--output_dir", place / out)]) == 0
    return place / out


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with bert, gpt2, the joined bert2gpt2 and bert2bert, many.csv (800 rows), train.csv, validation.csv."""
    folder = tmp_path_factory.mktemp("join")
    rows = make_rows(800, 3)
    for name, part in (("many", rows), ("train", make_rows(90, 1)), ("validation", make_rows(13, 2))):
        write_csv(folder / f"{name}.csv", part)
    torch.manual_seed(0)
    for make, name in ((make_bert, "bert"), (make_gpt2, "gpt2")):
        make(folder / name, [text for row in rows for text in row[:2]])
        join(folder, "bert", name, f"bert2{name}")
    return folder


def tune(place: Path, model: str, out: str, *flags, train: str = "many.csv") -> Path:
    """Train and evaluate in this process; returns the folder written."""
    argv = ["--model_name_or_path", place / model, "--do_train", "--do_eval", "--train_file", place / train]
    argv += ["--validation_file", place / "validation.csv", "--output_dir", place / out, *LENGTHS]
    argv += ["--predict_with_generate", "--save_strategy", "no", *flags]
    script.main([str(part) for part in argv])
    return place / out


LEARNING = ["--max_steps", "100", "--per_device_train_batch_size", "32", "--logging_steps", "10", "--eval_on_start"]


@pytest.fixture(scope="module")
def bert_gpt2(place) -> Path:
    return tune(place, "bert2gpt2", "a", "--learning_rate", "6e-3", *LEARNING)


@pytest.fixture(scope="module")
def bert_bert(place) -> Path:
    return tune(place, "bert2bert", "b", "--learning_rate", "5e-3", *LEARNING)


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
def test_a_joined_model_learns(name, request):
    out = request.getfixturevalue(name)
    losses, rouge = history(out, "loss"), history(out, "eval_rouge1")
    assert losses[-1] < losses[0] / 2 and rouge[-1] > rouge[0] + 30


@pytest.mark.parametrize("name", ["bert_gpt2", "bert_bert"])
def test_the_written_folder_generates_the_same_text_in_a_fresh_load(name, request):
    out = request.getfixturevalue(name)
    model, tokenizer, target_tokenizer = load(out)
    rows = read_predictions(out)
    assert len(rows) == 13 and len({row["prediction"] for row in rows}) > 3
    for row in rows:
        ids = model.generate(**tokenizer(row["source"], return_tensors="pt", truncation=True, max_length=30))
        assert target_tokenizer.decode(ids[0], skip_special_tokens=True).strip() == row["prediction"]
        if len(ids[0]) < 20:
            assert ids[0][0] == target_tokenizer.bos_token_id and ids[0][-1] == target_tokenizer.eos_token_id


def test_run_generation_writes_the_same_texts(bert_gpt2, place):
    cut = ["--max_source_length", "30", "--text_column", "review_body", "--output_file", place / "texts.jsonl"]
    argv = ["--model_name_or_path", bert_gpt2, "--input_file", place / "validation.csv", "--dtype", "float32", *cut]
    run_generation.main([str(part) for part in argv])
    texts = [row["prediction"] for row in read_predictions(place, "texts.jsonl")]
    assert texts == [row["prediction"] for row in read_predictions(bert_gpt2)]


def test_evaluation_loss_is_the_mean_over_all_target_tokens_and_the_end(bert_gpt2):
    model, tokenizer, target_tokenizer = load(bert_gpt2)
    total, count = 0.0, 0
    for row in read_predictions(bert_gpt2):
        labels = torch.tensor([target_tokenizer(row["reference"])["input_ids"]])
        source = tokenizer(row["source"], return_tensors="pt", truncation=True, max_length=30)
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
    """An epoch of 16 rows a step, from the folder that a training wrote."""
    return tune(place, "a", "16x1", *SGD, "--per_device_train_batch_size", "16", train="train.csv")


def assert_same_course(found: Path, expected: Path) -> None:
    for key in ("loss", "grad_norm", "eval_loss", "eval_rouge1"):
        values = history(expected, key)
        assert values and history(found, key) == pytest.approx(values, rel=1e-4), key


def test_losses_and_gradients_are_equal_however_the_batch_is_cut(at_once, bert_gpt2, place):
    cut = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"]
    out = tune(place, "a", "4x4", *SGD, *cut, train="train.csv")
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
    flags = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    whole = tune(place, "bert2gpt2", "whole", *flags, train="train.csv")
    assert (whole / "checkpoint-3/decoder_tokenizer").is_dir()
    shutil.copytree(whole / "checkpoint-3", place / "resumed/checkpoint-3")
    resumed = tune(place, "bert2gpt2", "resumed", *flags, train="train.csv")
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ the folder


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_the_joined_weights_are_those_of_the_two_models_and_others_come_from_the_seed(place, decoder):
    model, _, _ = load(place / f"bert2{decoder}")
    weights = model.state_dict()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    trunks = {"encoder": "bert", {"bert": "decoder.bert", "gpt2": "decoder.transformer"}[decoder]: decoder}
    known = {f"{trunk}.{key}": value for trunk, name in trunks.items() for key, value in read_weights(place / name)}
    known = {key: value for key, value in known.items() if not key.startswith("decoder.bert.pooler")}  # left out
    assert len(known) > 60 and all(torch.equal(weights[key], value) for key, value in known.items())
    same, other = (join(place, "bert", decoder, f"{decoder}-seed-{seed}", "--seed", seed) for seed in (42, 1))
    first = place / f"bert2{decoder}/model.safetensors"
    assert first.read_bytes() == (same / first.name).read_bytes()
    drawn = {key for key, value in load(other)[0].state_dict().items() if not torch.equal(value, weights[key])}
    assert drawn and not drawn & set(known)


def read_weights(folder: Path):
    return AutoModel.from_pretrained(folder).state_dict().items()


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
def test_the_configuration_has_start_end_padding_and_sizes(place, decoder):
    model, tokenizer, target_tokenizer = load(place / f"bert2{decoder}")
    start, end, pad = ("[CLS]", "[SEP]", "[PAD]") if decoder == "bert" else ("<|endoftext|>",) * 3
    start, end, pad = target_tokenizer.convert_tokens_to_ids([start, end, pad])
    for settings in (model.config, model.config.decoder, model.generation_config):
        assert (settings.decoder_start_token_id, settings.bos_token_id) == (start, start)
        assert (settings.eos_token_id, settings.pad_token_id) == (end, pad)
    assert model.config.hidden_size == model.config.decoder.hidden_size == (64 if decoder == "bert" else 48)
    assert tokenizer.model_max_length == 96
    assert target_tokenizer.model_max_length == (96 if decoder == "bert" else 32)


def test_embeddings_grow_with_added_tokens_and_robertas_first_positions_do_not_count(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "bert")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"pad_token_id": 1, "max_position_embeddings": 34}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer) - 5, **ends, **sizes)).save_pretrained(place / "roberta")
    tokenizer.save_pretrained(place / "roberta")
    model, tokenizer, target_tokenizer = load(join(place, "roberta", "roberta", "roberta2roberta"))
    assert tokenizer.model_max_length == target_tokenizer.model_max_length == 32
    assert model.config.decoder.vocab_size == model.config.encoder.vocab_size == len(tokenizer)
    model(input_ids=torch.full((1, 32), 5), decoder_input_ids=torch.full((1, 32), len(tokenizer) - 1))


# ------------------------------------------------------------------------------------------------ labels


@pytest.mark.parametrize("decoder", ["bert", "gpt2"])
@pytest.mark.parametrize("padded", [False, True])
def test_labels_are_the_targets_tokens_and_one_end_without_a_start(place, decoder, padded):
    model, tokenizer, target_tokenizer = load(place / f"bert2{decoder}")
    rows = {"reference": ["The lens is great and small", "ok"], "source": ["great lens and a great strap", "weak"]}
    limits = {"max_source_length": 5, "max_target_length": 4, "pad_to_max_length": padded}
    limits["ignore_pad_token_for_loss"] = True
    out = script.tokenize_rows(rows, tokenizer, target_tokenizer, "", limits)
    plain = AutoTokenizer.from_pretrained(place / decoder)
    end = target_tokenizer.eos_token_id
    bare = [plain(text, add_special_tokens=False)["input_ids"] for text in rows["reference"]]
    expected = [[*bare[0][:3], end], [*bare[1][:3], end]]
    assert len(bare[0]) > 3 and out["target_cut"][0] and out["target_cut"][1] == (len(bare[1]) > 3)
    assert out["labels"] == [row + [-100] * (4 - len(row)) if padded else row for row in expected]
    assert out["input_ids"][0][0] == tokenizer.cls_token_id and out["input_ids"][0][-1] == tokenizer.sep_token_id
    assert end == (plain.sep_token_id if decoder == "bert" else plain.eos_token_id)
    assert target_tokenizer(rows["reference"])["input_ids"] == [[*ids, end] for ids in bare]
    assert target_tokenizer.decode([*bare[0], end], skip_special_tokens=True) == plain.decode(bare[0])

    # Collated, the end stays a label also where it is the padding (GPT-2), and the padding is none.
    features = [{k: out[k][i] for k in ("input_ids", "attention_mask", "labels")} for i in range(2)]
    batch = DataCollatorForSeq2Seq(tokenizer, model=model)(features)
    assert (batch["labels"] == end).sum() == 2
    assert batch["decoder_input_ids"][:, 0].tolist() == [model.config.decoder_start_token_id] * 2
    assert batch["decoder_input_ids"][0, 1:].tolist() == bare[0][:3]


# ------------------------------------------------------------------------------------------------ messages


def message(place: Path, capsys, encoder: str, decoder: str, out: str = "new") -> list[str]:
    """The lines of a join that is refused with exit code 2 and without a folder."""
    capsys.readouterr()
    argv = ["--encoder_name_or_path", place / encoder, "--decoder_name_or_path", place / decoder]
    assert tool.main([str(part) for part in (*argv, "--output_dir", place / out)]) == 2
    assert not list(place.glob("new*"))
    return capsys.readouterr().err.splitlines()


def test_a_half_that_is_no_model_folder_is_named_and_so_is_an_output_folder_in_use(place, capsys):
    told = message(place, capsys, "nowhere", ".", "gpt2")
    assert len(told) == 3 and f"--output_dir {place}/gpt2: not empty, nothing is overwritten" in told[0]
    assert told[1].startswith(f"error: --encoder_name_or_path {place}/nowhere: there is no such folder")
    assert told[2].startswith(f"error: --decoder_name_or_path {place}: the folder has no config.json")


def test_halves_that_cannot_be_joined_are_refused_at_once_without_loading_weights(place, capsys):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    bart = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    models = {"llama": LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))}
    models["bart"] = BartModel(BartConfig(vocab_size=150, **bart))
    models["distilbert"] = DistilBertModel(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=16))
    for name, model in models.items():
        model.save_pretrained(place / name)
        AutoTokenizer.from_pretrained(place / "gpt2" if name == "llama" else place / "bert").save_pretrained(
            place / name
        )
        (place / name / "model.safetensors").unlink()
    told = message(place, capsys, "bart", "llama")
    way = f"train it as it is: run_summarization.py --model_name_or_path {place}/bart"
    assert told[0] == f"error: --encoder_name_or_path {place}/bart: bart is an encoder-decoder; {way}"
    way = "give a GPT-2- or BERT-like model"
    assert told[1:] == [f"error: --decoder_name_or_path {place}/llama: llama cannot look at an encoder; {way}"]
    told = message(place, capsys, "bert", "distilbert")
    assert told[0].endswith(f": distilbert cannot write text; {way}") and len(told) == 1
    assert "bart is an encoder-decoder" in message(place, capsys, "bert", "bart")[0]


def test_a_folder_without_a_tokenizer_or_without_weights_of_its_own_is_refused(place, capsys):
    shutil.copytree(place / "bert", place / "mute", ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    told = message(place, capsys, "mute", "gpt2")
    assert len(told) == 1 and "its tokenizer's files are missing" in told[0]
    shutil.copytree(place / "bert", place / "deep")
    config = (place / "deep/config.json").read_text()
    (place / "deep/config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    told = message(place, capsys, "deep", "gpt2")
    assert len(told) == 1 and "deep: its files lack 16 weights of a BertModel: encoder.layer.2." in told[0]


def refusal(place: Path, *flags) -> str:
    argv = ["--model_name_or_path", place / "bert2gpt2", "--do_train", "--train_file", place / "train.csv"]
    with pytest.raises(script.UsageError) as caught:
        script.main([str(part) for part in (*argv, "--output_dir", place / "unused", *flags)])
    return str(caught.value)


def test_lengths_beyond_a_halfs_positions_are_refused(place):
    said = "the encoder has positions for 96 tokens; give that or less"
    assert refusal(place) == f"--max_source_length 1024: {said}"
    said = "the decoder has positions for 32 tokens; give that or less"
    assert refusal(place, "--max_source_length", "96") == f"--max_target_length 128: {said}"
    assert refusal(place, *LENGTHS, "--generation_max_length", "33") == f"--generation_max_length 33: {said}"
    assert refusal(place, *LENGTHS, "--val_max_target_length", "33") == f"--val_max_target_length 33: {said}"


def test_a_target_tokenizer_that_ends_no_target_is_refused(place, tmp_path):
    shutil.copytree(place / "bert2gpt2", tmp_path / "old")
    AutoTokenizer.from_pretrained(place / "gpt2").save_pretrained(tmp_path / "old/decoder_tokenizer")
    words = ["--model_name_or_path", tmp_path / "old", "--do_train", "--train_file", place / "train.csv"]
    lengths = ["--max_source_length", "32", "--max_target_length", "12", "--output_dir", tmp_path / "out"]
    done = run_warm(ROOT / "run_summarization.py", *words, *lengths, cwd=tmp_path, check=False)
    assert done.returncode == 2 and "targets would have no end" in done.stdout
    assert "Traceback" not in done.stdout and not (tmp_path / "out").exists()


def test_the_flags_of_the_training_script_that_joined_models_name_this_tool(place):
    told = refusal(place, "--encoder_name_or_path", place / "bert", "--decoder_name_or_path", place / "gpt2")
    assert told.count("tools/join_models.py") == 2


def test_a_join_that_was_killed_leaves_nothing_in_the_way(place):
    left = place / "again/.join_models.unfinished"
    (left / "files").mkdir(parents=True)
    (left / "files/config.json").write_text("torn")
    out = join(place, "bert", "gpt2", "again")
    assert not left.exists()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    join(place, "bert", "gpt2", "again")  # finished: it is known, as long as the seed is the same
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    words = ["--encoder_name_or_path", place / "bert", "--decoder_name_or_path", place / "gpt2", "--seed", "7"]
    assert tool.main([str(word) for word in (*words, "--output_dir", out)]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert (out / "config.json").read_text() == (place / "bert2gpt2/config.json").read_text()
