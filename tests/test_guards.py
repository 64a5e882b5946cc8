# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Every mistake gets one clear message that names the flag or the file, the value and the way out."""

import json
import logging
import sys
from types import SimpleNamespace

import pytest
from transformers import AutoModelForSeq2SeqLM

import flag_checks
import guards
import run_summarization as script
from conftest import ROOT, run, run_warm

ARGUMENTS = (script.SUMMARIZATION_ARGUMENTS, script.find_columns, script.find_companion_problems)


@pytest.fixture
def arguments(work, tmp_path):
    """A function from flags to the message that parse_arguments raises for them on top of a sound command line."""

    def message(*flags, train=None, **changed) -> str:
        sound = {"--model_name_or_path": work / "tiny-t5", "--output_dir": tmp_path / "out"}
        sound["--train_file"] = train or work / "train.csv"
        sound |= {f"--{name}": value for name, value in changed.items()}
        argv = [str(part) for pair in sound.items() for part in pair] + ["--do_train", *map(str, flags)]
        with pytest.raises(script.UsageError) as caught:
            script.parse_arguments(argv, *ARGUMENTS)
        return str(caught.value)

    return message


def test_a_missing_file_is_named(arguments):
    assert "--train_file nowhere.csv: there is no such file" in arguments(train="nowhere.csv")


def test_an_unknown_ending_is_named_with_the_known_ones(arguments, tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    assert "unknown ending; known are .csv, .tsv, .json, .jsonl, .parquet, .txt" in arguments(
        train=tmp_path / "a.xlsx"
    )


def test_a_missing_column_is_named_with_those_there_are(arguments):
    message = arguments("--text_column", "body")
    assert "no column 'body' (--text_column)" in message and "review_body, review_headline, product_id" in message


@pytest.mark.parametrize("content, claim", [("", "the file is empty"), ("a,b\n", "the file holds no rows")])
def test_an_empty_file_is_named(arguments, tmp_path, content, claim):
    (tmp_path / "a.csv").write_text(content)
    assert claim in arguments(train=tmp_path / "a.csv")


def test_bytes_that_are_not_utf8_are_named_with_their_line(arguments, tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,summary\nfine,ok\ncaf\xe9,ok\n")
    message = arguments(train=tmp_path / "a.csv")
    assert "a.csv:3: not UTF-8 (byte 0xe9)" in message and "iconv" in message


def test_a_malformed_jsonl_line_is_named(arguments, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "summary": "b"}\n{"text": "a", \n')
    assert "a.jsonl:2: malformed JSON" in arguments(train=tmp_path / "a.jsonl")


def test_a_csv_row_with_too_many_fields_is_named(arguments, tmp_path):
    (tmp_path / "a.csv").write_text("text,summary\na,b\na,b,c\n")
    assert "a.csv:3: 3 fields where the header has 2" in arguments(train=tmp_path / "a.csv")


def test_a_deepspeed_file_that_is_not_json_is_named(arguments, tmp_path):
    (tmp_path / "ds.json").write_text("{")
    assert "ds.json: not JSON" in arguments("--deepspeed", tmp_path / "ds.json")


def test_a_deepspeed_file_that_contradicts_a_flag_is_named(arguments, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}))
    message = arguments("--deepspeed", tmp_path / "ds.json", "--per_device_train_batch_size", 16)
    assert "train_micro_batch_size_per_gpu is 4 but --per_device_train_batch_size is 16" in message
    assert "bf16.enabled is true but --bf16 is False" in message


def test_a_deepspeed_file_with_an_optimizer_of_its_own_contradicts_optim(arguments, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}}))
    message = arguments("--deepspeed", tmp_path / "ds.json", "--optim", "adafactor")
    assert "its optimizer block overrules --optim" in message


def test_adafactor_with_its_state_on_nvme_is_refused(arguments, tmp_path):
    offload = {"device": "nvme", "nvme_path": "/tmp"}
    zero = {"stage": 3, "offload_optimizer": offload}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False}))
    message = arguments("--deepspeed", tmp_path / "ds.json", "--optim", "adafactor")
    assert "offload_optimizer on nvme" in message and 'write "device": "cpu"' in message


def test_pure_bf16_names_everything_it_excludes(arguments, monkeypatch):
    monkeypatch.setattr(script, "zero_adafactor", None)
    message = arguments("--pure_bf16", "--deepspeed", ROOT / "ds_configs/zero2.json")
    assert "--pure_bf16, step_in_backward: needs zero_adafactor.py" in message
    monkeypatch.undo()
    message = arguments("--pure_bf16", "--deepspeed", ROOT / "ds_configs/zero2.json")
    for claim in ("only --optim adafactor", "not under --deepspeed"):
        assert f"--pure_bf16: {claim}" in message


def test_stepping_in_the_backward_pass_names_everything_it_excludes(arguments, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    flags = ["--optim", "adafactor", "--optim_args", "step_in_backward=true", "--gradient_accumulation_steps", 2]
    message = arguments(*flags)
    for claim in ("--gradient_accumulation_steps 2", "--max_grad_norm 1.0", "one process only"):
        assert claim in message


def test_an_output_folder_that_holds_something_else_is_refused(arguments, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.tex").write_text("x")
    message = arguments(output_dir=tmp_path / "other")
    assert "holds something else (thesis.tex)" in message and (tmp_path / "other/thesis.tex").read_text() == "x"


def test_fp16_with_t5_is_refused_in_favour_of_bf16(arguments):
    assert "--fp16: T5 overflows in fp16" in arguments("--fp16") and "use --bf16" in arguments("--fp16")


def test_a_model_folder_without_config_is_refused(arguments, tmp_path):
    assert "the folder has no config.json" in arguments(model_name_or_path=tmp_path)


def test_a_causal_model_is_sent_to_its_own_script(arguments, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    message = arguments(model_name_or_path=tmp_path)
    assert "is no encoder-decoder; run_clm_instruct.py trains those" in message


BERT = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}


@pytest.mark.parametrize(
    "config, is_encoder",
    [
        (BERT, True),
        ({"model_type": "bert", "architectures": ["BertModel"]}, True),
        ({"model_type": "roberta"}, True),
        ({"model_type": "albert", "architectures": ["AlbertForSequenceClassification"]}, True),
        ({"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]}, True),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"], "is_decoder": True}, False),
        ({"model_type": "bert", "architectures": ["BertLMHeadModel"]}, False),
        ({"model_type": "encoder-decoder", "architectures": ["EncoderDecoderModel"]}, False),
        ({"model_type": "bart", "architectures": ["BartModel"]}, False),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, False),
        ({"model_type": "of_the_users_own"}, False),
        ({}, False),
        (None, False),
    ],
)
def test_an_encoder_is_known_by_its_config(config, is_encoder):
    assert guards.is_encoder(config) == is_encoder


@pytest.mark.parametrize("name", ["run_summarization", "run_clm_instruct", "run_generation"])
def test_every_script_refuses_an_encoder_by_what_it_is_before_its_weights_are_loaded(name, work, place, tmp_path):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text(json.dumps(BERT))
    (tmp_path / "bert/model.safetensors").write_text("never read")
    words = ["--do_train", "--output_dir", "out", "--train_file", work / "train.csv"]
    if name == "run_clm_instruct":
        words[-1] = place / "train.jsonl"
    if name == "run_generation":
        words = ["--input_file", work / "train.csv", "--output_file", "out.csv"]
    done = run_warm(ROOT / f"{name}.py", "--model_name_or_path", "./bert", *words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout.count("error: ") == 1
    assert f"error: --model_name_or_path ./bert: {guards.ENCODER}" in done.stdout


@pytest.mark.parametrize("name", [None, "words"])
def test_a_tokenizer_without_eos_is_named_by_the_flag_that_was_given(name):
    model_args = SimpleNamespace(model_name_or_path="model", tokenizer_name=name)
    tokenizer = SimpleNamespace(eos_token=None, is_fast=True)
    with pytest.raises(guards.UsageError) as caught:
        guards.check_causal_tokenizer(tokenizer, 8, 8, model_args)
    flag = "--model_name_or_path model" if name is None else "--tokenizer_name words"
    assert str(caught.value) == f"{flag}: has no EOS token to stop with"


def test_a_file_that_would_overrule_the_flags_of_generation_is_refused(arguments):
    message = arguments("--generation_config", "settings.json", "--val_max_target_length", "9", "--num_beams", "2")
    assert message.startswith("--generation_config settings.json: would overrule the flags' lengths and beams")
    assert "\n" not in message


@pytest.mark.parametrize("flag", flag_checks.REPLACED_FLAGS)
def test_a_flag_that_is_gone_says_what_to_do(arguments, flag):
    assert arguments(flag, 1) == f"{flag} is no flag: {flag_checks.REPLACED_FLAGS[flag]}"


def test_packing_of_a_model_that_cannot_be_packed_is_refused(monkeypatch):
    model = SimpleNamespace(config=SimpleNamespace(model_type="led"), get_output_embeddings=lambda: None)
    data_args = SimpleNamespace(packing=True, pad_to_max_length=False, ignore_pad_token_for_loss=True)
    training_args = SimpleNamespace(label_smoothing_factor=0.0, do_train=True, use_cpu=True, process_index=0)
    with pytest.raises(script.UsageError, match="--packing: led models cannot be packed"):
        script.choose_batches(model, [], None, data_args, training_args)
    data_args.packing = None
    assert script.choose_batches(model, [], "collator", data_args, training_args)[0] == "collator"


def test_a_flag_that_transformers_5_dropped_says_what_replaced_it(arguments):
    assert "--train_sampling_strategy group_by_length" in arguments("--group_by_length")


def test_several_mistakes_are_reported_together_with_exit_code_2_and_no_traceback(tmp_path):
    (tmp_path / "a.jsonl").write_text("nonsense\n")
    done = run(
        [sys.executable, ROOT / "run_summarization.py", "--model_name_or_path", "./nothing", "--do_train", "--do_eval"]
        + ["--train_file", "a.jsonl", "--output_dir", "out", "--num_beams", "0"],
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stdout
    for claim in ("a.jsonl:1: malformed", "--do_eval needs --validation_file", "--num_beams 0", "./nothing"):
        assert claim in done.stdout


def test_a_mistake_under_the_deepspeed_runner_is_reported_once_and_fails(tmp_path, work):
    done = run(
        ["deepspeed", "--num_gpus", "2", "--master_port", "29574", ROOT / "run_summarization.py", "--do_train"]
        + ["--deepspeed", ROOT / "ds_configs/zero2.json", "--model_name_or_path", work / "tiny-t5"]
        + ["--train_file", "nowhere.csv", "--output_dir", "out"],
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode != 0 and done.stdout.count("error: --train_file nowhere.csv") == 1


def test_rows_without_text_or_summary_are_counted_and_named(work, tmp_path):
    (tmp_path / "a.csv").write_text('text,summary\ngood,fine\n,"no text"\n"no summary",""\nNA,None\n')
    done = run_warm(
        *[ROOT / "run_summarization.py", "--model_name_or_path", work / "tiny-t5", "--do_train"]
        + ["--train_file", "a.csv", "--output_dir", "out", "--max_steps", "1", "--save_strategy", "no"],
        cwd=tmp_path,
    )
    assert "4 rows read, 2 used (text -> summary)" in done.stdout
    assert "2 without a text or a summary left out: rows 1, 2" in done.stdout


def test_an_argument_file_works_and_its_unknown_keys_are_named(work, tmp_path):
    values = {"model_name_or_path": str(work / "tiny-t5"), "do_train": True, "output_dir": str(tmp_path / "out")}
    values |= {"train_file": str(work / "train.csv"), "num_beams": 3}
    (tmp_path / "args.json").write_text(json.dumps(values))
    model_args, data_args, training_args = script.parse_arguments(
        [str(tmp_path / "args.json"), "--seed", "5"], *ARGUMENTS
    )
    assert data_args.num_beams == 3 and training_args.seed == 5 and training_args.do_train
    (tmp_path / "args.json").write_text(json.dumps({**values, "colour": "red"}))
    with pytest.raises(script.UsageError, match="no such argument: colour"):
        script.parse_arguments([str(tmp_path / "args.json")], *ARGUMENTS)


def test_deepspeeds_own_spelling_of_its_file_is_understood():
    join = guards.join_deepspeed_flags
    assert join(["--a", "1", "--deepspeed", "--deepspeed_config", "z.json"]) == ["--a", "1", "--deepspeed", "z.json"]
    assert join(["--deepspeed_config", "z.json", "--a", "1", "--deepspeed"]) == ["--deepspeed", "z.json", "--a", "1"]
    assert join(["--deepspeed", "z.json", "--a"]) == ["--deepspeed", "z.json", "--a"]


def test_bf16_is_the_default_where_the_hardware_has_it_and_nothing_else_rules(work, tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    argv = ["--model_name_or_path", work / "tiny-t5", "--output_dir", tmp_path / "out", "--do_train", "--train_file"]
    argv = [*map(str, [*argv, work / "train.csv"]), "--use_cpu"]

    def has_bf16(*flags) -> bool:
        return script.parse_arguments([*argv, *flags], *ARGUMENTS)[2].bf16

    monkeypatch.setattr(script, "has_fast_bf16", lambda use_cpu: False)
    assert not has_bf16() and has_bf16("--bf16")
    monkeypatch.setattr(script, "has_fast_bf16", lambda use_cpu: True)
    assert has_bf16() and not has_bf16("--bf16", "false")
    assert not has_bf16("--pure_bf16", "--optim", "adafactor")
    choose = script.choose_bf16
    for content, chosen in (
        ('{"bf16": {"enabled": "auto"}}', True),
        ('{"bf16": {"enabled": false}}', False),
        ("{}", False),
    ):
        (tmp_path / "ds.json").write_text(content)
        args = SimpleNamespace(fp16=False, pure_bf16=False, use_cpu=True, deepspeed=tmp_path / "ds.json")
        assert choose(args) == chosen
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not has_bf16()


def test_only_tied_weights_that_a_checkpoint_lacks_go_unsaid(work, monkeypatch):
    logger = logging.getLogger("transformers.trainer")
    monkeypatch.setattr(logger, "filters", [])
    guards.hide_tied_weights(AutoModelForSeq2SeqLM.from_pretrained(work / "tiny-t5"))
    line = "There were missing keys in the checkpoint model loaded: {}."
    said = [line.format(["shared.weight"]), line.format(["lm_head.weight", "decoder.final_layer_norm.weight"]), "else"]
    logged = [line.format(["encoder.embed_tokens.weight", "lm_head.weight"]), *said]
    assert [text for text in logged if logger.filter(logging.makeLogRecord({"msg": text}))] == said


def test_no_secret_is_kept_or_shown(work, tmp_path):
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    words += ["--output_dir", tmp_path / "out", "--hub_token", "hf_secret"]
    with pytest.raises(guards.UsageError, match="--hub_token: would lie readable") as refused:
        script.main([str(word) for word in words])
    assert "hf_secret" not in str(refused.value)
    for address in ("https://me:pass@host/x", "https://pass@host/x?password=pass", "https://host/x"):
        assert guards.hide_secrets(address) == "https://host/x"
    assert guards.hide_secrets("sqlite:///mlflow.db") == "sqlite:///mlflow.db"


def test_the_spark_launcher_neither_prints_nor_passes_on_secrets(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "launchers"))
    import spark_train

    shown = spark_train.hide_tokens(["a.py", "--token", "hf_secret x", "--hub_token=hf_secret", "--seed", "1"])
    assert shown == "a.py --token '***' '--hub_token=***' --seed 1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hf_secret@host")
    monkeypatch.setenv("HF_HOME", "/home/me")
    arguments = spark_train.parse_launch_arguments(["--num_processes", "2", "run_summarization.py"])
    settings = spark_train.make_spark_settings(arguments)
    assert settings["spark.executorEnv.HF_HOME"] == "/home/me" and "hf_secret" not in str(settings)
    assert capsys.readouterr().out.startswith("MLFLOW_TRACKING_URI holds a password, so executors are not given it")


def test_what_is_not_beside_it_is_said_with_what_that_costs(monkeypatch, capsys):
    monkeypatch.setattr(guards, "checkpoints", None)
    monkeypatch.setattr(guards, "portable_checkpoints", None)
    arguments = SimpleNamespace(process_index=0, get_process_log_level=lambda: 30, resume_from_checkpoint="there")
    assert guards.start_run(None, None, arguments) == ("there", None)
    printed = capsys.readouterr().out
    assert printed.count("checkpoints.py is not beside guards.py: a killed run goes on only with") == 1
    assert printed.count("portable_checkpoints.py is not beside guards.py: a run goes on only with the ranks") == 1
