# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The tier on a real, pretrained model, SmolLM2-135M-Instruct: `make test-real`, minutes on two cores.

tools/real_model.py makes its folder out of the Python registry; PLAINTUNE_REAL_MODEL names one that is there. Each run
is made once and shared by the tests of it.
"""

import json
import os
import re
import shutil
import sys
from itertools import groupby
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import merge_lora
import run_clm_instruct as script
import run_generation
from conftest import ROOT, make_instructions, run, run_warm, write_jsonl
from test_run_clm_instruct import SCRIPT
from test_run_summarization import history

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 8 and 64 instructions to train on and 16 to evaluate on; the weights in it go at the end."""
    folder = tmp_path_factory.mktemp("real")
    write_jsonl(folder / "eight.jsonl", make_instructions(8, 1))
    write_jsonl(folder / "train.jsonl", make_instructions(64, 1))
    write_jsonl(folder / "validation.jsonl", make_instructions(16, 2))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(place) -> Path:
    """The model's folder as tools/real_model.py writes it, in bf16."""
    if given := os.environ.get("PLAINTUNE_REAL_MODEL"):
        return Path(given).resolve()
    done = run([sys.executable, ROOT / "tools/real_model.py", "--output_dir", "smollm2"], cwd=place, timeout=600)
    assert "answers as transformers reads the file" in done.stdout
    return place / "smollm2"


def train(place: Path, model: Path, name: str, *flags, ranks: int = 0, start=SCRIPT, check: bool = True):
    """Run run_clm_instruct.py, or `start`, on the model with the output folder `name`; the finished process."""
    words = ["--model_name_or_path", model, "--do_train", "--max_seq_length", "256", "--logging_steps", "1"]
    words += ["--lr_scheduler_type", "constant", "--output_dir", name, *flags]
    return run_warm(start, *words, cwd=place, ranks=ranks, port=29577, check=check)


# ------------------------------------------------------------------------------------- one loss, however it is cut

# Three steps, each on the same eight rows, of 47 to 79 tokens.
FULL = ["--train_file", "eight.jsonl", "--optim", "sgd", "--learning_rate", "0.01", "--max_steps", "3"]
WAYS = {  # ranks, rows a rank, accumulation steps, other flags
    "2x4": (0, 2, 4),
    "2 ranks 2x2": (2, 2, 2),
    "2 ranks 4x1 ZeRO-3": (2, 4, 1, "--deepspeed", ROOT / "ds_configs/zero3.json"),
    "8x1 packed": (0, 8, 1, "--packing"),
}


def train_full(place: Path, model: Path, name: str, rows: int, steps: int, *flags, **how):
    cut = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", steps]
    return train(place, model, name, *FULL, *cut, *flags, **how)


@pytest.fixture(scope="module")
def whole(place, model) -> Path:
    """All parameters on the eight rows at once: the folder that the run wrote."""
    train_full(place, model, "whole", 8, 1, "--save_steps", "2")
    return place / "whole"


@pytest.mark.parametrize("way", WAYS)
def test_losses_and_gradient_norms_of_a_real_model_are_equal_however_the_rows_are_cut(place, model, whole, way):
    ranks, rows, steps, *flags = WAYS[way]
    out = place / way.replace(" ", "_")
    printed = train_full(place, model, out, rows, steps, *flags, "--save_strategy", "no", ranks=ranks).stdout
    if "--packing" in flags:
        packed = re.search(r"packing: 8 examples in (\d+) rows", printed)
        assert packed and int(packed[1]) <= 4
    else:
        assert f"effective batch 8 = {rows} rows x {max(ranks, 1)} processes x {steps} accumulation" in printed
    # Measured on 2026-11-25: losses 1e-6, under ZeRO-3 5.9e-6; norms 6e-7, under ZeRO-3 3.7e-5: DeepSpeed sums the
    # squares in fp64, torch in fp32, which on one thread is 2.5e-5 off for a model of this size, and both clip by it.
    for key, most in (("loss", 1e-5), ("grad_norm", 1e-4)):
        expected = history(whole, key)
        assert len(expected) == 3 and expected[2] < expected[0] * 0.9
        assert history(out, key) == pytest.approx(expected, rel=most), key
    shutil.rmtree(out)


# ------------------------------------------------------------------------------------- killed and resumed

# Dies after the first pass backward of a step, before the weights are moved.
KILL_IN_STEP = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import run_clm_instruct
step = run_clm_instruct.InstructTrainer.training_step
def die(trainer, *args, **kwargs):
    loss = step(trainer, *args, **kwargs)
    if trainer.state.global_step == STEPS:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss
run_clm_instruct.InstructTrainer.training_step = die
run_clm_instruct.main()
"""


def read_steps(out: Path) -> list[dict]:
    """What was logged of each step, but for times."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    names = ("step", "epoch", "loss", "grad_norm", "learning_rate")
    return [{name: entry[name] for name in names} for entry in entries if "loss" in entry]


def resume(place: Path, steps: int, checkpoint: int, train_again) -> Path:
    """The folder of a run killed in the step after `steps`, then resumed by the same command."""
    (place / "killed.py").write_text(KILL_IN_STEP.replace("STEPS", str(steps)))
    out = place / "killed"
    shutil.rmtree(out, ignore_errors=True)
    assert train_again(out, start=place / "killed.py", check=False).returncode == -9
    assert not (out / "trainer_state.json").exists()
    assert f"going on from {out / f'checkpoint-{checkpoint}'}" in train_again(out).stdout
    return out


def test_all_parameters_killed_right_after_a_checkpoint_and_resumed_end_bit_equal(place, model, whole):
    def train_again(out, **how):
        return train_full(place, model, out, 8, 1, "--save_steps", "2", **how)

    killed = resume(place, 2, 2, train_again)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(read_steps(whole)) == 3 and read_steps(killed) == read_steps(whole)


# LoRA with AdamW and dropout, packed, in two micro-batches: states of the optimizer and of chance count.
ADAPTERS = ["--train_file", "train.jsonl", "--do_eval", "--validation_file", "validation.jsonl", "--packing"]
ADAPTERS += ["--lora_r", "8", "--learning_rate", "2e-3", "--lora_dropout", "0.05", "--max_steps", "6"]
ADAPTERS += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2", "--save_steps", "3"]
ADAPTERS += ["--eval_on_start"]  # which draws from the generator of the dropout


@pytest.fixture(scope="module")
def adapters(place, model) -> Path:
    """Six steps of LoRA, evaluated before and after, and merged: the folder that the run wrote."""
    train(place, model, "adapters", *ADAPTERS, "--merge_lora")
    return place / "adapters"


def test_adapters_killed_in_the_middle_of_a_later_step_and_resumed_end_bit_equal(place, model, adapters):
    def train_again(out, **how):
        return train(place, model, out, *ADAPTERS, **how)

    killed = resume(place, 4, 3, train_again)
    name = "adapter_model.safetensors"
    assert (killed / name).read_bytes() == (adapters / name).read_bytes()
    assert len(read_steps(adapters)) == 6 and read_steps(killed) == read_steps(adapters)
    assert history(killed, "eval_loss")[-1] == history(adapters, "eval_loss")[-1]


def test_the_evaluation_loss_of_a_real_model_falls_on_held_out_instructions(adapters):
    before, after = history(adapters, "eval_loss")
    assert after < before / 4  # 2.13 and 0.16 on 2026-11-25


# ------------------------------------------------------------------------------------- answers

CHATS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {
            "role": "user",
            "content": "Name three things that a good camera needs, and say why each matters.",
        }
    ],
    [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Which is larger, 3 or 5?"}],
    [
        {"role": "user", "content": "My name is Ada and I like trains."},
        {"role": "assistant", "content": "Hello Ada! Trains are a fine thing to like."},
        {"role": "user", "content": "What do I like?"},
    ],
    [{"role": "user", "content": f"Sum up: {' '.join(row['response'] for row in make_instructions(8, 3))}"}],
    [{"role": "user", "content": "Hi"}],
]
NEW_TOKENS = 24


def answer_alone(folder: Path) -> list[list[int]]:
    """The greedy answers to CHATS in fp32 by transformers alone, one by one: the new ids with the stop token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for chat in CHATS:
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = model.generate(**prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
        answers.append(ids[0, prompt["input_ids"].shape[1] :].tolist())
    return answers


def answer_together(folder: Path, place: Path, monkeypatch) -> list[list[int]]:
    """The new ids that run_generation.py makes of CHATS, all in one batch; the table that it writes says the same."""
    batches, generate = [], run_generation.generate_batch

    def record(generator, prompts, rows):
        batches.append((rows, generate(generator, prompts, rows)))
        return batches[-1][1]

    monkeypatch.setattr(run_generation, "generate_batch", record)
    table = write_jsonl(place / "chats.jsonl", [{"messages": chat} for chat in CHATS])
    output = place / f"answers-{folder.name}.jsonl"
    words = ["--model_name_or_path", folder, "--input_file", table, "--output_file", output, "--dtype", "float32"]
    words += ["--max_new_tokens", NEW_TOKENS, "--max_tokens_per_batch", 8192, "--use_cpu"]
    run_generation.main([str(word) for word in words])
    ((rows, answers),) = batches
    assert sorted(rows) == list(range(len(CHATS)))
    answers = [answers[rows.index(i)] for i in range(len(CHATS))]
    written = [json.loads(line)["prediction"] for line in output.read_text("utf-8").splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert written == [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
    return answers


def test_one_batch_of_chats_gets_the_tokens_that_generate_gives_them_one_by_one(place, model, monkeypatch):
    expected = answer_alone(model)
    assert {answer[-1] == 2 for answer in expected} == {True, False}  # <|im_end|>: some end by themselves
    assert answer_together(model, place, monkeypatch) == expected


@torch.no_grad()
def compute_logits(folder: Path, answers: list[list[int]]) -> torch.Tensor:
    """The logits in fp32 of all tokens of CHATS with these answers."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in CHATS]
    pairs = zip(prompts, answers, strict=True)
    return torch.cat([model(torch.tensor([prompt + answer])).logits[0] for prompt, answer in pairs])


def test_merged_in_fp32_the_answers_are_those_of_the_adapters(place, model, adapters, monkeypatch):
    merged = adapters / "merged"
    answers = answer_together(adapters, place, monkeypatch)
    monkeypatch.undo()
    assert answer_together(merged, place, monkeypatch) == answers
    base, adapted, whole = (compute_logits(folder, answers) for folder in (model, adapters, merged))
    assert (base - adapted).abs().max() > 10  # 31 on 2026-11-25
    assert (adapted - whole).abs().max() < 2e-4  # 7.9e-5 on 2026-11-25, of logits of some tens


def test_merged_into_bf16_it_is_the_fp32_sum_rounded_once(place, adapters):
    words = ["--adapter_dir", adapters, "--output_dir", place / "merged16", "--merge_dtype", "bfloat16"]
    assert merge_lora.main([str(word) for word in words]) == 0
    sums, rounded = (load_file(folder / "model.safetensors") for folder in (adapters / "merged", place / "merged16"))
    assert sums.keys() == rounded.keys() and {t.dtype for t in rounded.values()} == {torch.bfloat16}
    assert {t.dtype for t in sums.values()} == {torch.float32}
    assert all(torch.equal(sums[name].to(torch.bfloat16), rounded[name]) for name in sums)


# ------------------------------------------------------------------------------------- labels of its own template


def test_of_a_chat_exactly_the_answers_with_their_stop_tokens_are_supervised(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": "And 2 + 2? Write\n\ntwo lines."},
        {"role": "assistant", "content": "It is 4.\n  Yes, four."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": "You are welcome!"},
    ]
    pieces = [  # text, and whether it is trained on
        ("<|im_start|>system\nBe brief.<|im_end|>\n", False),
        ("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("Paris.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd 2 + 2? Write\n\ntwo lines.<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("It is 4.\n  Yes, four.<|im_end|>", True),
        ("\n<|im_start|>user\nThanks<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("You are welcome!<|im_end|>", True),
    ]
    columns = script.encode_chats({"messages": [chat]}, [0], tokenizer, "chat", ("messages",), 1024)
    ((ids,), (labels,)) = columns["input_ids"], columns["labels"]
    assert columns["problem"] == [""] and columns["answers"] == columns["answers_with_stop"] == [3]
    assert tokenizer.decode(ids) == "".join(text for text, _ in pieces)
    found = [
        (trained, tokenizer.decode([ids[i] for i in places]))
        for trained, places in groupby(range(len(ids)), key=lambda i: labels[i] != -100)
    ]
    wanted = [
        (trained, "".join(text for text, _ in group)) for trained, group in groupby(pieces, key=lambda piece: piece[1])
    ]
    assert found == wanted
    assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
    whole = tokenizer.apply_chat_template(chat)["input_ids"]  # ends with the line break after the last stop token
    assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]) == "\n"


# ------------------------------------------------------------------------------------------------ check_run.py


def test_all_checks_hold_on_the_real_model_with_its_own_weights(place, model, tmp_path):
    words = ["--keep_weights", "--batch", "2", "--steps", "2", SCRIPT, "--model_name_or_path", model, "--do_train"]
    words += ["--do_eval", "--train_file", place / "train.jsonl", "--validation_file", place / "validation.jsonl"]
    words += ["--max_seq_length", "256", "--bf16", "--output_dir", tmp_path / "none"]
    run_warm(ROOT / "check_run.py", *words, cwd=tmp_path, timeout=900)  # its exit code is 1 where a check fails
    checks = {one["name"]: one["status"] for one in json.loads((tmp_path / "check_run.json").read_text())["checks"]}
    left = {"packing", "ranks under DeepSpeed"}
    assert {name for name, status in checks.items() if status != "holds"} == left and len(checks) == 18
    assert not (tmp_path / "none").exists()
