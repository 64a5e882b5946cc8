# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""run_summarization.py run as a user runs it; a test's name is its claim."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import run_summarization as script
from conftest import ROOT, run, run_warm

SCRIPT = ROOT / "run_summarization.py"
PREFIX = "summarize: "


def history(out: Path, key: str) -> list[float]:
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in entries if key in entry and "train_runtime" not in entry]


def read_predictions(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "generated_predictions.jsonl").read_text("utf-8").splitlines()]


# ------------------------------------------------------------------------------------- it trains and learns


def test_the_script_trains_and_learns(trained):
    results = json.loads((trained / "all_results.json").read_text())
    before = history(trained, "eval_rouge1")[0]
    assert results["eval_rouge1"] > before + 20
    assert results["eval_samples"] == 13 and results["train_samples"] == 800
    for name in ("train_results.json", "eval_results.json", "trainer_state.json", "README.md", "training_curves.png"):
        assert (trained / name).stat().st_size > 0, name
    assert (trained / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_hold_every_row_once_in_order(trained, work):
    rows = script.datasets.load_dataset("csv", data_files=str(work / "validation.csv"), split="train")
    predictions = read_predictions(trained)
    assert [p["source"] for p in predictions] == rows["review_body"]
    assert [p["reference"] for p in predictions] == rows["review_headline"]


# ------------------------------------------------------------------------- one loss however the batch is cut


@pytest.fixture(scope="module")
def four_ways(work, trained) -> dict[str, Path]:
    """The same 90 rows in global batches of 16 (the last of 10), cut in four ways; plain SGD, fp32, no dropout."""
    common = ["--model_name_or_path", trained, "--do_train", "--do_eval", "--train_file", work / "train.csv"]
    common += ["--validation_file", work / "validation.csv", "--source_prefix", PREFIX, "--optim", "sgd"]
    common += ["--learning_rate", "1e-3", "--num_train_epochs", "1", "--logging_steps", "1", "--save_strategy", "no"]
    common += ["--predict_with_generate", "--max_target_length", "12", "--per_device_eval_batch_size", "4"]
    ways = {  # rows a rank, steps, DeepSpeed config
        "16x1": (16, 1, None),
        "4x4, padded": (4, 4, None),
        "2 ranks 8x1 ZeRO-2": (8, 1, "zero2.json"),
        "2 ranks 4x2 ZeRO-3": (4, 2, "zero3.json"),
    }
    outs = {}
    for name, (rows, steps, config) in ways.items():
        out = work / name.replace(" ", "_")
        cut = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps, "--output_dir", out]
        more = ["--deepspeed", ROOT / "ds_configs" / config] if config else ["--packing", "false"] * ("padded" in name)
        run_warm(SCRIPT, *common, *cut, *more, cwd=work, ranks=2 if config else 0, port=29571)
        outs[name] = out
    return outs


WAYS = ["4x4, padded", "2 ranks 8x1 ZeRO-2", "2 ranks 4x2 ZeRO-3"]


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_are_equal_however_the_global_batch_is_cut(four_ways, way):
    for key in ("loss", "grad_norm"):
        reference = history(four_ways["16x1"], key)
        assert len(reference) == 6
        assert history(four_ways[way], key) == pytest.approx(reference, rel=1e-4), key


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_loss_and_rouge_are_equal_at_any_number_of_ranks(four_ways, way):
    reference = json.loads((four_ways["16x1"] / "eval_results.json").read_text())
    results = json.loads((four_ways[way] / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(reference["eval_loss"], rel=1e-4)
    for key in ("eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_rougeLsum", "eval_gen_len", "eval_samples"):
        assert results[key] == pytest.approx(reference[key]), key


def test_evaluation_loss_is_the_mean_over_all_target_tokens(four_ways, work):
    out = four_ways["16x1"]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    total, count = 0.0, 0
    for row in read_predictions(out):
        labels = tokenizer(text_target=row["reference"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            loss = model(**tokenizer(PREFIX + row["source"], return_tensors="pt"), labels=labels).loss
        total, count = total + loss.item() * labels.numel(), count + labels.numel()
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("way", ["16x1", *WAYS])
def test_the_exported_folder_generates_the_same_text_in_a_fresh_load(four_ways, way):
    out = four_ways[way]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    rows = read_predictions(out)
    assert len(rows) == 13 and len({row["prediction"] for row in rows}) > 3
    for row in rows:
        ids = model.generate(**tokenizer(PREFIX + row["source"], return_tensors="pt"))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == row["prediction"]


# ------------------------------------------------------------------------------------------------ ds_configs


def test_every_deepspeed_config_leaves_the_optimizer_to_the_flags_and_the_rest_on_auto():
    files = [f for f in sorted((ROOT / "ds_configs").glob("*.json")) if "inference" not in f.stem]
    assert [f.stem for f in files] == ["zero2", "zero2_offload", "zero3", "zero3_offload", "zero3_offload_adamw"]
    for file in files:
        config = json.loads(file.read_text())
        for block in ("optimizer", "scheduler"):
            values = config[block]["params"].values() if "adamw" in file.stem else []
            assert (block in config) == ("adamw" in file.stem) and set(values) <= {"auto"}
        assert config["bf16"] == {"enabled": "auto"}
        for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping"):
            assert config[key] == "auto"


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offload_configs_train_a_step_in_bf16_with_adafactor(work, tmp_path, name):
    # zero2.json and zero3.json are run by the four ways above.
    run_warm(  # without a launcher: one rank
        *[SCRIPT, "--model_name_or_path", work / "tiny-t5"]
        + ["--deepspeed", ROOT / f"ds_configs/{name}.json", "--do_train", "--train_file", work / "train.csv"]
        + ["--output_dir", tmp_path / "out", "--optim", "adafactor", "--bf16", "--max_steps", "2"]
        + ["--logging_steps", "1", "--gradient_checkpointing", "--save_strategy", "no"],
        cwd=tmp_path,
    )
    losses = history(tmp_path / "out", "loss")
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)


# ------------------------------------------------------------------------------------------------ resume

KILL_IN_SAVE = f"""
import os, signal, sys
from transformers.trainer_callback import TrainerState
save = TrainerState.save_to_json
def die(state, path):
    if "checkpoint-6" in path:
        os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
TrainerState.save_to_json = die
sys.path.insert(0, {str(ROOT)!r})
import run_summarization
run_summarization.main()
"""


def test_a_run_killed_while_saving_resumes_from_the_whole_checkpoint_and_ends_bit_equal(work, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(work / "tiny-t5", model)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"dropout_rate": 0.0', '"dropout_rate": 0.1'))  # random states count
    arguments = ["--model_name_or_path", model, "--do_train", "--train_file", work / "train.csv", "--max_steps", "8"]
    arguments += ["--optim", "adafactor", "--learning_rate", "1e-2", "--save_steps", "3", "--seed", "7"]
    arguments += ["--per_device_train_batch_size", "16"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_warm(SCRIPT, *arguments, "--output_dir", whole, cwd=tmp_path)

    (tmp_path / "killed.py").write_text(KILL_IN_SAVE)
    done = run_warm(tmp_path / "killed.py", *arguments, "--output_dir", killed, cwd=tmp_path, check=False)
    assert done.returncode == -9
    assert (killed / "checkpoint-6").is_dir() and not (killed / "checkpoint-6/trainer_state.json").exists()
    resumed = run_warm(SCRIPT, *arguments, "--output_dir", killed, cwd=tmp_path)
    assert "Passing over" in resumed.stdout and "checkpoint-6" in resumed.stdout
    assert f"going on from {killed / 'checkpoint-3'}" in resumed.stdout and "missing keys" not in resumed.stdout
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# ------------------------------------------------------------------------------------------------ scores


def test_japanese_is_scored_letter_by_letter_and_english_stemmed():
    same = script.compute_rouge(["とても良いカメラです。"], ["とても良いカメラです。"], "ja")
    assert same["rouge1"] == 100.0 and same["rougeLsum"] == 100.0
    assert 0 < script.compute_rouge(["良いカメラ"], ["悪いカメラ"], "ja")["rouge1"] < 100
    assert script.compute_rouge(["良いカメラ"], ["良いカメラ"], "en")["rouge1"] == 0  # why the flag is there
    assert script.compute_rouge(["great cameras"], ["great camera"], "en")["rouge1"] == 100.0
    assert script.compute_rouge(["schöne Größe"], ["schöne Größe"], "de")["rouge2"] == 100.0


@pytest.mark.parametrize(
    "text, count",
    [
        ("यह किताब की है", 4),
        ("หนังสือดี", 6),
        ("அது ஒரு புத்தகம்", 3),
        ("это книга", 2),
        ("책이 좋다", 2),
        ("良い本ー", 4),
        ("cafe\u0301 no\u0308", 2),
        ("می\u200cروم", 1),
        ("don't 3.5", 4),
    ],
)
def test_words_of_every_script_keep_their_marks(text, count):
    words = script.UnicodeTokenizer().tokenize(text)
    assert len(words) == count and script.compute_rouge([text], [text], "xx")["rouge1"] == 100.0
    joined = "".join(text.split()).replace("'", "").replace(".", "")
    assert "".join(words) == script.unicodedata.normalize("NFC", joined)


def test_words_that_differ_in_a_mark_are_different_words():
    assert script.compute_rouge(["यह किताबें का है"], ["यह किताब की है"], "hi")["rouge1"] == 50.0


def test_references_in_which_english_rouge_sees_no_word_are_said_aloud(capsys):
    script.compute_rouge(["это книга", "a book"], ["это книга", "a book"], "en")
    assert "--rouge_language en sees no word in 1 of 2 references" in capsys.readouterr().out
    script.compute_rouge(["это книга"], ["это книга"], "ru")
    script.compute_rouge(["!", ""], ["?!", ""], "en")
    assert capsys.readouterr().out == ""


def test_rouge_equals_rouge_score_on_known_texts():
    from rouge_score import rouge_scorer

    pairs = [("the cat sat on the mat", "a cat was on the mat"), ("no word shared", "entirely different text")]
    scorer = rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = script.compute_rouge([p for p, _ in pairs], [r for _, r in pairs], "en")
    for name in ("rouge1", "rouge2", "rougeL"):
        expected = sum(scorer.score(r, p)[name].fmeasure for p, r in pairs) / 2 * 100
        assert scores[name] == pytest.approx(expected, abs=1e-3)


# ------------------------------------------------------------------------------------------------ small parts


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_the_filled_sampler_gives_every_row_once_and_the_same_order_at_any_number_of_ranks(strategy):
    rows = script.add_filler([{"input_ids": [0] * (i * 7 % 10 + 1)} for i in range(10)], 1)
    args = {"train_sampling_strategy": strategy, "seed": 3, "data_seed": None, "gradient_accumulation_steps": 2}
    one = SimpleNamespace(**args, per_device_train_batch_size=8, train_batch_size=8, world_size=1)
    four = SimpleNamespace(**args, per_device_train_batch_size=2, train_batch_size=2, world_size=4)
    one, four = script.FilledSampler(rows, one), script.FilledSampler(rows, four)
    assert list(four)[:10] == list(one) and sorted(one) == list(range(10))
    assert list(four)[10:] == [10] * 6 and len(four) == 16 and rows[10]["labels"] == [-100]
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first or strategy != "random"


def test_rows_are_cut_counted_and_prefixed(work):
    tokenizer = AutoTokenizer.from_pretrained(work / "tiny-t5")
    limits = {"max_source_length": 6, "max_target_length": 3, "pad_to_max_length": False}
    limits["ignore_pad_token_for_loss"] = True
    rows = {
        "source": ["The lens is great and more and more of it", "ok"],
        "reference": ["great lens indeed it is", "ok"],
    }
    out = script.tokenize_rows(rows, tokenizer, tokenizer, "summarize: ", limits)
    assert out["source_cut"][0] and out["target_cut"][0]
    assert all(len(row) <= 6 for row in out["input_ids"]) and all(len(row) <= 3 for row in out["labels"])
    assert all(row[-1] == tokenizer.eos_token_id for row in out["input_ids"] + out["labels"])
    limits |= {"max_source_length": 99, "max_target_length": 99}
    whole = script.tokenize_rows(rows, tokenizer, tokenizer, "", limits)
    assert whole["source_cut"] == whole["target_cut"] == [False, False]
    assert tokenizer.decode(whole["labels"][1], skip_special_tokens=True) == "ok"


def test_columns_are_named_or_known_and_never_guessed():
    def find(columns, text_column=None, summary_column=None):
        return script.find_columns(columns, SimpleNamespace(text_column=text_column, summary_column=summary_column))

    assert find(["id", "summary", "document"]) == ("document", "summary")
    assert find(["a", "b", "c"], "c", "a") == ("c", "a")
    assert find(["article", "highlights", "gist"], None, "gist") == ("article", "gist")
    for columns, flags in ((["id", "review", "headline"], ()), (["summary", "review"], ()), (["a", "b"], ("a",))):
        with pytest.raises(script.UsageError, match="Give --text_column and --summary_column; it has"):
            find(columns, *flags)
    with pytest.raises(script.UsageError, match="it has a, b"):
        find(["a", "b"], "nope")


@pytest.fixture(scope="module")
def grouped(work, trained) -> dict[int, Path]:
    """13 rows by length in one step, default logging, evaluated by generating; one process, and two ranks."""
    common = ["--model_name_or_path", trained, "--do_train", "--do_eval", "--train_file", work / "train.csv"]
    common += ["--validation_file", work / "validation.csv", "--source_prefix", PREFIX, "--optim", "sgd"]
    common += ["--train_sampling_strategy", "group_by_length", "--max_train_samples", "13", "--save_strategy", "no"]
    common += ["--num_train_epochs", "1", "--predict_with_generate", "--max_target_length", "12"]
    common += ["--per_device_eval_batch_size", "4", "--learning_rate", "1e-3"]
    outs = {ranks: work / f"grouped_{ranks}" for ranks in (1, 2)}
    for ranks, out in outs.items():
        words = [*common, "--per_device_train_batch_size", 16 // ranks, "--output_dir", out]
        run_warm(SCRIPT, *words, cwd=work, ranks=ranks if ranks > 1 else 0, port=29571)
    return outs


def test_the_training_loss_written_down_is_the_whole_runs_at_any_number_of_ranks_order_and_logging(grouped):
    one, two = (json.loads((out / "all_results.json").read_text()) for out in grouped.values())
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert history(grouped[1], "loss")[-1] == pytest.approx(one["train_loss"])
    entries = json.loads((grouped[2] / "trainer_state.json").read_text())["log_history"]
    assert [e["train_loss"] for e in entries if "train_loss" in e] == [two["train_loss"]]


@pytest.mark.parametrize("ranks", [1, 2])
def test_predictions_stand_beside_their_own_texts_in_whatever_order_they_are_made(grouped, ranks):
    out = grouped[ranks]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    rows = read_predictions(out)
    assert [row["row"] for row in rows] == list(range(13))
    for row in rows:
        ids = model.generate(**tokenizer(PREFIX + row["source"], return_tensors="pt"))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == row["prediction"]


# ------------------------------------------------------------------------------------- Adafactor, however cut


@pytest.fixture(scope="module")
def adafactor_ways(work) -> dict[str, Path]:
    """50 steps of 12 rows with --optim adafactor: one process, and two ranks of ZeRO-3 that save at step 25."""
    # From random weights: a model near its optimum has spikes that blow rounding up by 10 every few steps.
    common = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "many.csv"]
    common += ["--optim", "adafactor", "--learning_rate", "1e-3", "--max_steps", "50", "--logging_steps", "1"]
    zero = ["--deepspeed", ROOT / "ds_configs/zero3.json", "--save_steps", "25", "--per_device_train_batch_size", "6"]
    alone = ["--save_strategy", "no", "--per_device_train_batch_size", "12"]
    outs = {"common": common, "one": work / "adafactor_one", "two": work / "adafactor_two"}
    run_warm(SCRIPT, *common, *alone, "--output_dir", outs["one"], cwd=work)
    ranks = ["deepspeed", "--num_gpus", "2", "--master_port", "29572", SCRIPT]
    outs["printed"] = run([*ranks, *common, *zero, "--output_dir", outs["two"]], cwd=work).stdout
    return outs


def test_adafactor_on_two_ranks_of_zero3_has_the_losses_of_one_process(adafactor_ways):
    expected, found = history(adafactor_ways["one"], "loss"), history(adafactor_ways["two"], "loss")
    assert len(found) == 50 and found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < found[0] / 2
    assert "optimizer: ZeroAdafactor" in adafactor_ways["printed"]
    assert "is deprecated" not in adafactor_ways["printed"]  # torch to DeepSpeed, a line a call


def test_a_checkpoint_of_two_ranks_of_zero3_goes_on_with_one_rank_of_zero2(adafactor_ways, tmp_path):
    shutil.copytree(adafactor_ways["two"] / "checkpoint-25", tmp_path / "out/checkpoint-25")
    zero = ["--deepspeed", ROOT / "ds_configs/zero2.json", "--save_strategy", "no", "--output_dir", "out"]
    rows = ["--per_device_train_batch_size", "12"]
    printed = run_warm(SCRIPT, *adafactor_ways["common"], *zero, *rows, cwd=tmp_path).stdout  # no launcher: one rank
    assert "was saved on 2 processes of ZeRO-3; going on with 1 at stage 2" in printed
    expected, found = history(adafactor_ways["one"], "loss"), history(tmp_path / "out", "loss")
    assert len(found) == 50 and found[25:] == pytest.approx(expected[25:], rel=1e-4)
    assert history(tmp_path / "out", "learning_rate") == pytest.approx(history(adafactor_ways["one"], "learning_rate"))


PURE = ["--pure_bf16", "--per_device_train_batch_size", "12", "--save_strategy", "no", "--output_dir"]


def test_pure_bf16_learns_like_fp32_and_exports_bf16_weights(adafactor_ways, tmp_path):
    run_warm(SCRIPT, *adafactor_ways["common"], *PURE, tmp_path / "out", cwd=tmp_path)
    expected, found = history(adafactor_ways["one"], "loss"), history(tmp_path / "out", "loss")
    assert sum(found[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.05)
    assert AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_stepping_in_the_backward_pass_changes_no_loss(adafactor_ways, tmp_path):
    command = [SCRIPT, *adafactor_ways["common"], "--max_steps", "5", "--max_grad_norm", "0", *PURE]
    run_warm(*command, tmp_path / "after", cwd=tmp_path)
    run_warm(*command, tmp_path / "inside", "--optim_args", "step_in_backward=true", cwd=tmp_path)
    assert history(tmp_path / "inside", "loss") == history(tmp_path / "after", "loss")
