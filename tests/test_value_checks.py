# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Flags, values, DeepSpeed files and models that cannot be are refused in a sentence each; a run stays finite."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

import deepspeed_checks
import flag_checks
import guards
import run_clm_instruct
import run_generation
import run_summarization
from conftest import ROOT, run, run_warm
from test_guards import arguments  # noqa: F401  a fixture


@pytest.mark.parametrize("module", [run_summarization, run_clm_instruct, run_generation])
def test_every_flag_of_a_script_is_known_before_the_libraries_are_loaded(module, capsys):
    classes = getattr(module, "SUMMARIZATION_ARGUMENTS", None) or getattr(module, "INSTRUCT_ARGUMENTS", None)
    parser = HfArgumentParser(classes) if classes else module.make_parser()
    flags = [name for name in parser._option_string_actions if name.startswith("--") and name != "--help"]
    assert len(flags) > 100
    flag_checks.answer_unknown_flags("__main__", module.__file__, flags)  # would raise SystemExit


def test_missing_values_and_wrong_types_are_all_named(arguments):  # noqa: F811
    message = arguments("--learning_rate", "--weight_decay", "abc", "--num_beams", "1.5", "--bf16", "maybe", "--seed")
    assert message.splitlines() == [
        "--learning_rate: needs a value, a number",
        "--weight_decay abc: must be a number",
        "--num_beams 1.5: must be a whole number",
        "--bf16 maybe: must be true or false",
        "--seed: needs a value, a whole number",
    ]
    message = arguments("--optim", "adamw_troch", "--eval_strategy", "epochs", "--run_name", "a", "b")
    assert "--optim adamw_troch: must be one that the library knows; did you mean adamw_torch?" in message
    assert "--eval_strategy epochs: must be one of no, steps, epoch; did you mean epoch?" in message
    assert "--run_name a b: takes one value" in message


@pytest.mark.parametrize(
    "flag, value, words",
    [
        ("learning_rate", "nan", "0 or more"),
        ("learning_rate", "inf", "0 or more"),
        ("learning_rate", "-1", "0 or more"),
        ("weight_decay", "nan", "0 to 1000"),
        ("label_smoothing_factor", "nan", "0 to 1, 1 left out"),
        ("adam_beta1", "1", "0 to 1, 1 left out"),
        ("adam_epsilon", "0", "above 0 to 1"),
        ("adam_epsilon", "1e30", "above 0 to 1"),
        ("warmup_steps", "1e20", "0 to 1e12"),
        ("num_train_epochs", "0", "above 0"),
        ("max_steps", "-5", "-1 (by epochs) or 1 or more"),
        ("gradient_accumulation_steps", "-1", "1 or more"),
        ("logging_steps", "nan", "above 0, whole from 1 on"),
        ("save_steps", "nan", "above 0, whole from 1 on"),
        ("eval_steps", "-1", "above 0, whole from 1 on"),
        ("seed", "4294967296", "0 to 2**32 - 1"),
        ("save_total_limit", "0", "1 or more"),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(arguments, flag, value, words):  # noqa: F811
    message = arguments(f"--{flag}={value}")
    assert re.fullmatch(rf"--{flag} [-+\w.]+: must be {re.escape(words)}", message)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--lr_scheduler_kwargs", "nonsense"], "--lr_scheduler_kwargs nonsense: must be a JSON object"),
        (["--lr_scheduler_kwargs", '{"zork": 1}'], "not for --lr_scheduler_type linear"),
        (["--accelerator_config", "nowhere.json"], "must be a JSON object, or a file with one"),
        (["--activation_checkpointing_kwargs", "[1]"], "must be a JSON object"),
        (["--optim_args", "zork=1"], "zork is unknown to --optim adamw_torch_fused; it takes none"),
        (["--optim", "sgd", "--optim_args", "momentun=1"], "did you mean momentum?"),
        (["--optim", "sgd", "--optim_args", "momentum=abc"], "could not convert string to float"),
        (["--predict_with_generate", "--prediction_loss_only"], "--prediction_loss_only: leaves ROUGE"),
        (["--predict_with_generate", "--eval_do_concat_batches", "false"], "ROUGE needs all"),
        (["--use_liger_kernel"], "--use_liger_kernel: needs liger-kernel"),
        (["--load_best_model_at_end"], "needs --eval_strategy as --save_strategy"),
        (["--metric_for_best_model", "eval_rogue1"], "--metric_for_best_model rogue1: not among the metrics"),
        (["--push_to_hub"], "--push_to_hub: needs the hub"),
        (["--tokenizer_name", "/nope"], "--tokenizer_name /nope: there is no such folder"),
        (
            ["--accelerator_config", '{"split_batch": true}'],
            "split_batch is unknown to it; did you mean split_batches?",
        ),
        (["--delimiter", "abc"], "--delimiter 'abc': must be one character that separates"),
        (["--delimiter", '"'], "must be one character that separates"),
        (["--dataset_config_name", "en"], "--dataset_config_name: needs --dataset_name"),
        (["--label_names", "summary"], "--label_names: these scripts call them labels"),
        (["--include_for_metrics", "input"], "--include_for_metrics: knows inputs and loss"),
        (["--optim_target_modules", "q"], "--optim_target_modules: is for --optim galore"),
        (["--torch_compile_backend", "inductr"], "--torch_compile_backend: is unknown to torch"),
        (["--dataloader_persistent_workers"], "--dataloader_persistent_workers: is idle"),
        (["--torch_compile_mode", "fast"], "--torch_compile_mode: is none of torch.compile's"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(arguments, flags, said):  # noqa: F811
    assert said in arguments(*flags)


# ------------------------------------------------------------------------------------------------ DeepSpeed


@pytest.mark.parametrize(
    "content, said",
    [
        ({"optimizr": {}}, "no such key: optimizr; did you mean optimizer?"),
        ({"zero_optimization": {"stage": 9}}, "zero_optimization.stage is 9"),
        ({"zero_optimization": {"stag": 2}}, "no such key: zero_optimization.stag; did you mean stage?"),
        (
            {"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}},
            "offload_optimizer.devise; did you mean dev",
        ),
        ({"zero_optimization": []}, "zero_optimization is []; must be an object"),
        ({"bf16": {"enabeld": True}}, "no such key: bf16.enabeld; did you mean enabled?"),
        ({"fp16": {"enabled": "maybe"}}, 'fp16.enabled is "maybe"'),
        ({"train_batch_size": "13"}, 'train_batch_size is "13"; must be a whole number'),
        ({"train_batch_size": 13}, "train_batch_size is 13 but --per_device_train_batch_size x"),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.01}}}, "is 0.01 but --weight_decay is 0.0"),
        ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, "no such key: optimizer.params.lrr"),
        ({"scheduler": {"type": "WarmupXY"}}, "scheduler.type WarmupXY: must be one of LRRangeTest"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1}}}, "is 1 but --learning_rate is 5e-05"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_step": 1}}}, "did you mean warmup_num_steps?"),
        ({"gradient_clipping": "x"}, 'gradient_clipping is "x"; must be a number'),
        ({"zero_optimization": {"overlap_comm": True}}, "zero_optimization has no stage; write 0 to 3"),
        ({"zero_optimization": "auto"}, 'zero_optimization is "auto"; must be an object'),
        ({"bf16": {"enabeld": "auto"}}, "the trainer does not fill in; did you mean enabled?"),
        (
            {"zero_optimization": {"stage": 2, "overlap_comm": "auto"}},
            'overlap_comm is "auto", which the trainer does',
        ),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 9}}, "allgather_bucket_size is 9; must be even"),
        ({"zero_optimization": 0}, "zero_optimization is 0; must be an object"),
        ({"zero_optimization": None}, "zero_optimization is null; must be an object"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_siz": "auto"}}, "did you mean reduce_bucket_size?"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": True}},
            "reduce_bucket_size is true; must be a number",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"weight_decy": "auto"}}}, "did you mean weight_decay?"),
    ],
)
def test_a_deepspeed_file_is_checked_by_key_type_and_value(arguments, tmp_path, content, said):  # noqa: F811
    (tmp_path / "ds.json").write_text(json.dumps(content))
    message = arguments("--deepspeed", tmp_path / "ds.json", "--use_cpu")
    assert said in message and message.startswith(f"--deepspeed {tmp_path}/ds.json: ")


def test_an_nvme_path_that_is_not_there_is_named(arguments, tmp_path):  # noqa: F811
    zero = {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nope"}}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
    message = arguments("--deepspeed", tmp_path / "ds.json", "--use_cpu")
    assert message.endswith("offload_param.nvme_path /nope: there is no such folder")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_the_files_of_ds_configs_have_only_keys_and_types_that_deepspeed_knows(path):
    assert deepspeed_checks.find_file_problems(str(path), json.loads(path.read_text()), True) == []


# ------------------------------------------------------------------------------------------------ generation


@pytest.mark.parametrize(
    "name, value",
    [("top_p", 1.5), ("typical_p", 2), ("epsilon_cutoff", 2), ("min_new_tokens", -1), ("no_repeat_ngram_size", -1)]
    + [
        ("max_time", -1),
        ("eos_token_id", 999999),
        ("suppress_tokens", [999999]),
        ("bad_words_ids", [3]),
        ("top_k", 1.5),
    ]
    + [("temperature", True), ("temperature", "hot"), ("min_p", float("nan")), ("num_beams", 1.5), ("do_sample", 3)]
    + [("early_stopping", "maybe"), ("stop_strings", [3]), ("num_beam_groups", 2), ("eos_token_id", True)]
    + [("exponential_decay_length_penalty", 3), ("watermarking_config", 1)],
)
def test_a_decoding_flag_out_of_range_is_refused_with_its_value(name, value):
    (problem,) = guards.find_decoding_problems({name: value}, 300)
    assert problem.startswith(f"--{name} ")


def test_sound_decoding_flags_pass():
    sound = {"top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2], "stop_strings": "the", "bad_words_ids": [[3]]}
    assert guards.find_decoding_problems(sound, 300) == []


def test_stop_strings_end_a_text(trained, tmp_path, work):
    words = ["--model_name_or_path", trained, "--input_file", work / "validation.csv", "--max_samples", "4"]
    run_warm(ROOT / "run_generation.py", *words, "--output_file", "whole.jsonl", cwd=tmp_path)
    whole = [json.loads(line)["prediction"] for line in open(tmp_path / "whole.jsonl")]
    stop = whole[0].split()[0][-2:]
    run_warm(ROOT / "run_generation.py", *words, "--output_file", "cut.jsonl", "--stop_strings", stop, cwd=tmp_path)
    cut = [json.loads(line)["prediction"] for line in open(tmp_path / "cut.jsonl")]
    assert whole[0].startswith(cut[0]) and cut[0].endswith(stop) and len(cut[0]) < len(whole[0])


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    "content, said",
    [
        ({"model_type": "t5", "num_layers": -1}, "num_layers -1; must be a whole number from 1 on"),
        ({"model_type": "t5", "d_model": "64"}, "d_model '64'; must be a whole number"),
        ({"model_type": "t5", "dropout_rate": "a"}, "dropout_rate 'a'; must be a number in 0 to 1"),
        ({"model_type": 5}, "model_type 5; must be a name"),
        ([1], "config.json is no JSON object but a list"),
        ("", "config.json is no JSON object but a str"),
    ],
)
def test_a_config_json_that_cannot_be_a_models_is_named(arguments, tmp_path, content, said):  # noqa: F811
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert said in arguments(model_name_or_path=tmp_path)


@pytest.mark.parametrize(
    "content, said",
    [
        ([], "not a JSON object of arguments but a list"),
        ({"learning_rate": [1]}, "learning_rate is [1]: must be a number"),
        ({"learning_rate": "abc"}, 'learning_rate is "abc": must be a number'),
        ({"num_beams": 1.5}, "num_beams is 1.5: must be a whole number"),
        ({"output_dir": {"a": 1}}, 'output_dir is {"a": 1}: must be a text'),
        ({"seed": None}, "seed is null: must be a whole number"),
        ({"train_flie": "a"}, "no such argument: train_flie; did you mean train_file?"),
    ],
)
def test_an_argument_file_of_other_types_is_named(tmp_path, content, said):
    (tmp_path / "args.json").write_text(json.dumps(content))
    parser = HfArgumentParser(run_summarization.SUMMARIZATION_ARGUMENTS)
    with pytest.raises(guards.UsageError) as caught:
        guards.read_arguments(parser, [str(tmp_path / "args.json")])
    assert said in str(caught.value) and "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ finite runs


@pytest.mark.parametrize("ranks, stage", [(0, None), (2, None), (2, 3)])
def test_a_run_whose_loss_is_no_longer_finite_ends_and_says_where_and_saves_nothing(work, tmp_path, ranks, stage):
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    words += ["--learning_rate", "1e30", "--warmup_steps", "0", "--max_steps", "6", "--logging_steps", "6"]
    words += ["--save_strategy", "no", "--lr_scheduler_type", "constant", "--output_dir", "out"]
    words += ["--deepspeed", ROOT / f"ds_configs/zero{stage}.json"] if stage else []
    done = run_warm(ROOT / "run_summarization.py", *words, cwd=tmp_path, check=False, ranks=ranks, port=29581)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    # DeepSpeed passes over the step of such gradients, where others take it and lose the weights.
    what = "step 2: the gradients are no longer finite numbers" if stage else "step 3: the loss is no longer a finite"
    assert done.stdout.count(f"error: {what}") == done.stdout.count("error: ") == 1
    assert done.stdout.count("Loading weights: 100%") <= 1  # the second rank shows no progress
    assert "lower --learning_rate (it is 1e+30)" in done.stdout
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("bad, logged", [(5, 8), (3, 4), (1, 8)])
def test_the_step_at_which_the_loss_was_lost_is_named_whatever_the_logging(tmp_path, bad, logged):
    args = SimpleNamespace(device="cpu", fp16=False, bf16=True, learning_rate=1.0, output_dir=tmp_path)
    state = SimpleNamespace(global_step=0, max_steps=100)
    trainer = SimpleNamespace(args=args, state=state, _tr_loss=torch.tensor(0.0), model=torch.nn.Linear(2, 2))
    trainer.model_wrapped = trainer.model
    watch, control = guards.FiniteRun(trainer), SimpleNamespace(should_save=False)
    assert args.logging_nan_inf_filter is False
    watch.on_train_begin(args, state, control)
    with pytest.raises(guards.UsageError, match=f"^step {bad}: the loss is no longer a finite number; .*--bf16 false"):
        for state.global_step in range(1, 10):
            trainer._tr_loss += float("nan") if state.global_step == bad else 1.0
            watch.on_step_end(args, state, control)
            if state.global_step in (2, logged):  # as the trainer does: the sum begins anew
                trainer._tr_loss = trainer._tr_loss if bad <= state.global_step else torch.tensor(0.0)
                watch.on_log(args, state, control, {"loss": 1.0})
    assert state.global_step == (2 if bad <= 2 else logged)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    args = SimpleNamespace(device="cpu", fp16=False, bf16=False, learning_rate=1.0, output_dir=tmp_path)
    (tmp_path / "checkpoint-4").mkdir()
    state = SimpleNamespace(global_step=6, max_steps=100)
    trainer = SimpleNamespace(args=args, state=state, _tr_loss=torch.tensor(0.0), model=torch.nn.Linear(2, 2))
    trainer.model_wrapped = trainer.model
    watch, control = guards.FiniteRun(trainer), SimpleNamespace(should_save=True)
    watch.on_train_begin(args, state, control)
    state.global_step = 7
    watch.on_step_end(args, state, control)
    torch.nn.init.constant_(trainer.model.weight, float("inf"))
    state.global_step = 8
    with pytest.raises(guards.UsageError, match="^step 8: the weights are no longer .*checkpoint-4 is from before"):
        watch.on_step_end(args, state, control)


# ------------------------------------------------------------------------------------------------ by the thousand


def try_bad_inputs(count: int, tmp_path) -> None:
    done = run(
        [sys.executable, ROOT / "tests/bad_inputs.py", "--count", count], cwd=tmp_path, timeout=2400, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    counts = dict(re.findall(r"^(\w+) +(\d+)", done.stdout, re.MULTILINE))
    assert int(counts["refused"]) > count / 2 and int(counts["tried"]) == count


def test_sixty_bad_inputs_end_in_a_sentence_or_are_accepted(tmp_path):
    try_bad_inputs(60, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2500)
def test_six_hundred_bad_inputs_end_in_a_sentence_or_are_accepted(tmp_path):
    try_bad_inputs(600, tmp_path)
