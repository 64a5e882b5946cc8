# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""run_clm_instruct.py run as a user runs it; a test's name is its claim. Labels are tested in test_clm_labels.py."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, MixtralConfig, pipeline

import model_checks
import run_clm_instruct as script
from conftest import ROOT, make_instructions, run, run_warm, write_jsonl
from test_run_summarization import KILL_IN_SAVE, history, read_predictions

SCRIPT = ROOT / "run_clm_instruct.py"


def command(place: Path, *flags, start=SCRIPT) -> list:
    sound = ["--model_name_or_path", place / "tiny-llama", "--train_file", place / "train.jsonl"]
    return [start, *sound, "--max_seq_length", "256", *flags]


# --------------------------------------------------------------------------------------------- learns and stops


@pytest.fixture(scope="module")
def overfitted(place) -> Path:
    """The script with fast_batches.py and reports.py beside it, packed, with pad = EOS: the folder that it wrote."""
    alone = place / "alone"
    alone.mkdir()
    for name in ("run_clm_instruct.py", "fast_batches.py", "reports.py"):
        shutil.copy(ROOT / name, alone)
    shutil.copytree(place / "tiny-llama", alone / "no-pad")
    settings = json.loads((alone / "no-pad/tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (alone / "no-pad/tokenizer_config.json").write_text(json.dumps(settings))
    flags = ["--do_train", "--do_predict", "--test_file", place / "train.jsonl", "--packing", "--skip_audit"]
    flags += ["--model_name_or_path", alone / "no-pad", *OVERFIT, "--output_dir", "out"]
    done = run([sys.executable, *command(place, *flags, start="run_clm_instruct.py")], cwd=alone)
    (alone / "printed.txt").write_text(done.stdout)
    return alone / "out"


OVERFIT = ["--predict_with_generate", "--learning_rate", "3e-3", "--num_train_epochs", "60", "--save_strategy", "no"]
OVERFIT += ["--per_device_train_batch_size", "2", "--max_new_tokens", "64", "--logging_steps", "50"]


def all_answers_right(out: Path, rows: list[dict]) -> None:
    answers = read_predictions(out)
    assert [row["reference"] for row in answers] == [row["response"] for row in rows]
    assert [row["prediction"] for row in answers] == [row["response"] for row in rows]
    assert json.loads((out / "all_results.json").read_text())["predict_stopped"] == 1.0


def test_overfitted_on_packed_rows_with_pad_equal_to_eos_it_gives_all_answers_and_stops(overfitted):
    all_answers_right(overfitted, make_instructions(64, 1))
    tokenizer = AutoTokenizer.from_pretrained(overfitted)
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.slow
def test_overfitted_on_single_rows_it_gives_all_answers_and_stops(place, tmp_path):
    flags = ["--do_train", "--do_predict", "--test_file", place / "train.jsonl", "--skip_audit", *OVERFIT]
    flags += ["--output_dir", tmp_path / "out"]
    run_warm(*command(place, *flags), cwd=tmp_path)
    all_answers_right(tmp_path / "out", make_instructions(64, 1))


def test_the_saved_template_and_stop_token_let_a_pipeline_give_the_same_answers(overfitted):
    generate = pipeline("text-generation", model=str(overfitted), device="cpu")
    for row in make_instructions(64, 1)[:6]:
        message = {"role": "user", "content": row["instruction"]}
        message |= {"context": row["context"]} if row["context"] else {}
        reply = generate([message], max_new_tokens=64, do_sample=False)[0]["generated_text"][-1]["content"]
        assert reply.strip() == row["response"]


def test_what_it_prints_says_what_it_trains_on(overfitted):
    printed = (overfitted / "../printed.txt").read_text()
    for said in (
        "data format: dolly (instruction, context, response); prompt template: dolly",
        "packing: 64 examples in",
        "packed or alone the same logits",
        f"{'  share of answers':<34}{'100.0%':>14}",
        "effective batch 2 = 2 rows x 1 processes x 1 accumulation steps",
        "adamw_torch",
    ):
        assert said in printed, said


# ------------------------------------------------------------------------- one loss however the batch is cut


WAYS = ["4x4", "2 ranks 8x1 ZeRO-2", "2 ranks 4x2 ZeRO-3"]


@pytest.fixture(scope="module")
def four_ways(place) -> dict[str, Path]:
    """The same 58 rows in global batches of 16 (the last of 10), cut in four ways; plain SGD, fp32."""
    flags = ["--do_train", "--do_eval", "--validation_file", place / "validation.jsonl", "--optim", "sgd"]
    flags += ["--max_train_samples", "58", "--learning_rate", "0.1", "--num_train_epochs", "1", "--logging_steps", "1"]
    flags += ["--predict_with_generate", "--max_new_tokens", "16", "--per_device_eval_batch_size", "4", "--skip_audit"]
    ways = {  # rows a rank, steps, DeepSpeed config
        "16x1": (16, 1, None),
        "4x4": (4, 4, None),
        "2 ranks 8x1 ZeRO-2": (8, 1, "zero2.json"),
        "2 ranks 4x2 ZeRO-3": (4, 2, "zero3.json"),
    }
    outs = {}
    for name, (rows, steps, config) in ways.items():
        out = place / name.replace(" ", "_")
        cut = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps, "--output_dir", out]
        zero = ["--deepspeed", ROOT / "ds_configs" / config] if config else []
        words = command(place, *flags, *cut, *zero, "--save_strategy", "no")
        run_warm(*words, cwd=place, ranks=2 if config else 0, port=29575)
        outs[name] = out
    return outs


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_are_equal_however_the_global_batch_is_cut(four_ways, way):
    for key in ("loss", "grad_norm"):
        reference = history(four_ways["16x1"], key)
        assert len(reference) == 4
        assert history(four_ways[way], key) == pytest.approx(reference, rel=1e-4), key


@pytest.mark.parametrize("way", WAYS)
def test_evaluation_and_answers_are_equal_at_any_number_of_ranks(four_ways, way):
    reference = json.loads((four_ways["16x1"] / "eval_results.json").read_text())
    results = json.loads((four_ways[way] / "eval_results.json").read_text())
    for key in ("eval_loss", "eval_perplexity", "eval_token_accuracy", "eval_rouge1", "eval_stopped", "eval_samples"):
        assert results[key] == pytest.approx(reference[key], rel=1e-4), key
    assert read_predictions(four_ways[way]) == read_predictions(four_ways["16x1"])


def test_evaluation_loss_and_accuracy_are_means_over_all_answer_tokens(four_ways):
    out = four_ways["16x1"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    total, right, count = 0.0, 0, 0
    for row in read_predictions(out):
        prompt = tokenizer(row["source"], add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["reference"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        right += (logits.argmax(-1) == torch.tensor(answer)).sum().item()
        count += len(answer)
    results = json.loads((out / "eval_results.json").read_text())
    assert results["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    assert results["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-3)
    assert results["eval_token_accuracy"] == pytest.approx(right / count)


# ------------------------------------------------------------------------------------------------ packing


def test_packed_and_single_rows_give_the_same_losses_and_gradient_norms(place, tmp_path):
    # One global batch holds all 16 examples, packed or not.
    flags = ["--do_train", "--max_train_samples", "16", "--optim", "sgd", "--learning_rate", "0.1"]
    flags += ["--num_train_epochs", "5", "--logging_steps", "1", "--per_device_train_batch_size", "16"]
    flags += ["--lr_scheduler_type", "constant", "--save_strategy", "no", "--output_dir"]
    run_warm(*command(place, *flags, tmp_path / "single"), cwd=tmp_path)
    run_warm(*command(place, *flags, tmp_path / "sdpa", "--packing"), cwd=tmp_path)
    run_warm(*command(place, *flags, tmp_path / "eager", "--packing", "--attn_implementation", "eager"), cwd=tmp_path)
    for key in ("loss", "grad_norm"):
        expected = history(tmp_path / "single", key)
        assert len(expected) == 5
        for name in ("sdpa", "eager"):
            assert history(tmp_path / name, key) == pytest.approx(expected, rel=1e-5), (name, key)


# ------------------------------------------------------------------------------------------------ LoRA, resume


def test_adapters_alone_are_trained_and_the_merged_folder_is_the_same_model(place, tmp_path):
    flags = ["--do_train", "--lora_r", "4", "--merge_lora", "--learning_rate", "1e-2", "--max_steps", "20"]
    flags += ["--gradient_checkpointing", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    run_warm(*command(place, *flags), cwd=tmp_path)
    assert not (tmp_path / "out/model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(place / "tiny-llama").eval()
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()  # by adapter_config.json
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out/merged").eval()
    stops = {name: GenerationConfig.from_pretrained(tmp_path / name).eos_token_id for name in ("out", "out/merged")}
    assert stops["out"] == stops["out/merged"] == merged.generation_config.eos_token_id
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out/merged")
    ids = tokenizer("How do I clean a lens?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = [model(ids).logits for model in (base, adapted, merged)]
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert torch.allclose(logits[1], logits[2], atol=1e-4)
    assert tokenizer.chat_template == script.PROMPT_TEMPLATES["dolly"]


def test_a_packed_lora_run_killed_while_saving_resumes_and_ends_bit_equal(place, tmp_path):
    flags = [
        "--do_train",
        "--packing",
        "--lora_r",
        "4",
        "--lora_dropout",
        "0.1",
        "--max_steps",
        "8",
        "--save_steps",
    ]
    flags += ["3", "--per_device_train_batch_size", "2", "--seed", "7", "--output_dir"]
    run_warm(*command(place, *flags, tmp_path / "whole"), cwd=tmp_path)
    (tmp_path / "killed.py").write_text(KILL_IN_SAVE.replace("run_summarization", "run_clm_instruct"))
    words = command(place, *flags, tmp_path / "killed", start=tmp_path / "killed.py")
    assert run_warm(*words, cwd=tmp_path, check=False).returncode == -9
    resumed = run_warm(*command(place, *flags, tmp_path / "killed"), cwd=tmp_path).stdout
    assert "Passing over" in resumed and f"going on from {tmp_path / 'killed/checkpoint-3'}" in resumed
    name = "adapter_model.safetensors"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ------------------------------------------------------------------------------------------------ other data


def test_a_text_file_is_trained_on_whole_and_its_end_is_the_validation(place, tmp_path):
    text = "\n\n".join(f"{row['instruction']}\n{row['response']}" for row in make_instructions(300, 3))
    (tmp_path / "play.txt").write_text(text)
    flags = ["--train_file", tmp_path / "play.txt", "--do_train", "--do_eval", "--max_seq_length", "64"]
    flags += ["--validation_split_percentage", "10", "--max_steps", "60", "--learning_rate", "1e-2"]
    flags += ["--logging_steps", "10", "--save_strategy", "no", "--output_dir", tmp_path / "out"]
    printed = run_warm(*command(place, *flags), cwd=tmp_path).stdout
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    losses = history(tmp_path / "out", "loss")
    assert losses[-1] < losses[0] / 2 and results["eval_loss"] < losses[0] / 2
    assert "data format: text (text); prompt template: none" in printed
    tokens = len(AutoTokenizer.from_pretrained(place / "tiny-llama")(text)["input_ids"]) + 1  # and EOS
    blocks = math.ceil(tokens / 64)
    assert results["train_samples"] + results["eval_samples"] == blocks
    assert results["eval_samples"] == blocks - math.ceil(blocks * 0.9)


def test_without_validation_data_prompts_are_split_and_none_is_on_both_sides(place, tmp_path):
    rows = make_instructions(200, 4)
    rows += [row | {"response": "Another answer."} for row in rows[:60]]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = ["--train_file", tmp_path / "rows.jsonl", "--do_eval", "--do_train", "--output_dir", tmp_path / "out"]
    flags += ["--validation_split_percentage", "20", "--audit_only"]
    printed = run_warm(*command(place, *flags), cwd=tmp_path).stdout
    table = {line[:34].strip(): line[34:].split() for line in printed.splitlines() if line[:5] not in ("", "---")}
    train, validation = map(int, table["rows read"])
    assert train + validation == 260 and 26 <= validation <= 80
    assert table["prompts also in train"][1] == "0"
    assert not (tmp_path / "out").exists()


def test_chats_train_on_every_answer_and_the_odd_rows_are_named(place, tmp_path):
    chats = [{"messages": [{"role": "system", "content": "Be short."}, *turns(i, 1 + i % 3)]} for i in range(40)]
    chats.append({"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]})
    write_jsonl(tmp_path / "chats.jsonl", chats)
    flags = ["--train_file", tmp_path / "chats.jsonl", "--prompt_template", "llama2", "--audit_only"]
    printed = run_warm(*command(place, *flags), cwd=tmp_path).stdout
    assert "left out 1 x unknown role 'robot'" in printed
    assert f"{'answers':<34}{sum(1 + i % 3 for i in range(40)):>14}" in printed
    assert f"{'  share of answers':<34}{'100.0%':>14}" in printed


def turns(seed: int, count: int) -> list[dict]:
    pairs = make_instructions(count, seed)
    return [
        message
        for row in pairs
        for message in (
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["response"]},
        )
    ]


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def arguments(place, tmp_path):
    """The message that changed arguments lead to; a value of None leaves the flag out."""

    def message(**changed) -> str:
        sound = {"model_name_or_path": place / "tiny-llama", "train_file": place / "train.jsonl"}
        sound |= {"output_dir": tmp_path / "out", "max_seq_length": "256"} | changed
        pairs = [[f"--{name}", str(value)] for name, value in sound.items() if value is not None]
        argv = [part for pair in pairs for part in pair if part != "True"] + ["--do_train"]
        with pytest.raises(script.UsageError) as caught:
            script.parse_arguments(argv, script.INSTRUCT_ARGUMENTS, script.find_format, script.find_instruct_problems)
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"train_file": "nowhere.jsonl"}, "--train_file nowhere.jsonl: there is no such file"),
        ({"data_format": "qa"}, "--data_format qa: must be one of dolly, alpaca, chat, prompt, text"),
        ({"data_format": "chat"}, "needs the columns messages (chat); it has instruction, context, response"),
        ({"text_column": "body"}, "has no column 'body' (--text_column); it has instruction"),
        ({"prompt_template": "dolphin"}, "--prompt_template dolphin: neither one of dolly, plain, alpaca"),
        ({"max_seq_length": "9000"}, "--max_seq_length 9000: the model has 512 positions; give 512"),
        ({"max_new_tokens": "0"}, "--max_new_tokens 0: must be 1 or more"),
        ({"generation_config": "x.json"}, "--generation_config x.json: would overrule the flags' lengths and beams"),
        ({"lora_r": "-1"}, "--lora_r -1: must be 0 or more"),
        ({"merge_lora": True}, "--merge_lora: there is nothing to merge without --lora_r"),
        ({"merge_dtype": "int8"}, "--merge_dtype int8: must be one of float32, bfloat16, float16"),
        ({"use_liger_kernel": True}, "--use_liger_kernel: needs a GPU and liger-kernel"),
        ({"text_column": "context", "packing": True}, "--packing: not for plain text"),
        ({"model_name_or_path": "./nowhere"}, "--model_name_or_path ./nowhere: there is no such folder"),
        ({"validation_split_percentage": "0"}, "--validation_split_percentage 0.0: must lie in 0 to 100"),
        ({"optim": "adamw_torch", "pure_bf16": True}, "only --optim adafactor rounds"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(arguments, changed, said):
    assert said in arguments(**changed)


def test_all_problems_come_at_once(arguments):
    message = arguments(max_new_tokens="0", prompt_template="x.jinja", lora_r="-2", data_format="qa")
    assert message.count("\n") >= 3


def test_a_broken_jinja_file_is_refused_before_anything_is_loaded(arguments, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }")
    assert "not a Jinja template" in arguments(prompt_template=tmp_path / "t.jinja")


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--prompt_template", "chat"], "--prompt_template chat: the tokenizer has no chat template"),
        (["--max_seq_length", "20", "--prompt_template", "plain"], "46 of 64 rows are longer than --max_seq_length"),
        (
            ["--max_seq_length", "8", "--prompt_template", "plain"],
            "none of the 64 rows can be used: 64 x longer than --max_seq_length",
        ),
        (["--validation_file", "TRAIN", "--do_eval"], "prompts are in the training data"),
    ],
)
def test_what_only_the_data_shows_ends_with_code_2_and_no_traceback(place, tmp_path, flags, said):
    flags = [place / "train.jsonl" if flag == "TRAIN" else flag for flag in flags]
    done = run_warm(*command(place, "--do_train", "--output_dir", "out", *flags), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert f"{said}" in done.stdout.split("error: ")[1]


def test_a_template_that_raises_is_named_with_its_message(place, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ raise_exception('no such talk') }}")
    flags = ["--prompt_template", tmp_path / "t.jinja", "--do_train", "--output_dir", "out"]
    done = run_warm(*command(place, *flags), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "64 x the template says: no such talk" in done.stdout


def test_the_router_loss_of_a_mixture_counts_and_reaches_the_router_however_the_batch_is_cut():
    config = MixtralConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=50
    )
    config.update({"num_key_value_heads": 1, "num_local_experts": 4, "output_router_logits": True})
    config.router_aux_loss_coef = 0.5
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    training_args = SimpleNamespace(do_train=True, label_smoothing_factor=0.0, use_liger_kernel=False, use_cpu=True)
    *_, loss = script.choose_rows(model, {"train": None}, 9, None, SimpleNamespace(packing=False), training_args)
    ids = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    outputs = model(input_ids=ids)
    whole, plain = loss(outputs, ids), script.compute_next_token_loss(outputs, ids)
    assert whole.item() == pytest.approx(plain.item() + 0.5 * outputs.aux_loss.item(), rel=1e-5)
    parts = [loss(model(input_ids=part), part, num_items_in_batch=32) for part in ids.split(2)]
    aux = [model(input_ids=part).aux_loss.item() for part in ids.split(2)]
    assert sum(parts).item() == pytest.approx(plain.item() + 0.5 * sum(aux) / 2, rel=1e-5)
    whole.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n.endswith("gate.weight"))


def test_a_gated_model_says_where_to_accept_the_licence():
    error = OSError("You are trying to access a gated repo.\nMake sure to have access to it")
    said = model_checks.explain_load_error("model_name_or_path", "meta-llama/Llama-2-7b-hf", error)
    assert "https://huggingface.co/meta-llama/Llama-2-7b-hf" in said and "hf auth login" in said and "--token" in said
