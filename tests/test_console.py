# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a run says while it is at work and when it ends: few lines, true ones, and commands that run as printed."""

import json
import logging
import logging.handlers
import re
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import closing
import console
import fast_batches
import model_card
import reports
import run_clm_instruct
import step_figures
from conftest import ROOT, run

LENGTHS = ["--max_source_length", "64", "--max_target_length", "12", "--per_device_train_batch_size", "4"]
TASK = ["--do_train", "--do_eval", "--max_steps", "10", "--predict_with_generate", "--save_strategy", "no"]
STEP = r"step +(\d+)/10  loss (\d+\.\d{4})(  accuracy \d+\.\d%)?  lr \S+  [\d,]+ tokens/s  MFU \S+%  \S+ GB  \S+ left"


def read_lines(printed: str) -> list[str]:
    """The lines of an output, each stand of a progress bar counted as one."""
    return [line for line in printed.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def two_ranks(work, tmp_path_factory):
    """Ten steps of T5 under `deepspeed` on two ranks, as a user starts them: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("two")
    words = ["--model_name_or_path", work / "tiny-t5", "--train_file", work / "train.csv", "--validation_file"]
    words += [work / "validation.csv", *LENGTHS, *TASK, "--gradient_checkpointing", "--output_dir", "out"]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "29641", ROOT / "run_summarization.py"]
    return folder, run([*command, "--deepspeed", ROOT / "ds_configs/zero2.json", *words], cwd=folder).stdout


def test_ten_steps_on_two_ranks_of_deepspeed_are_at_most_40_lines(two_ranks):
    lines = read_lines(two_ranks[1])
    assert len(lines) <= 40, "\n".join(lines)
    assert [int(m[1]) for line in lines if (m := re.fullmatch(STEP, line))] == list(range(1, 11))
    for once in ("No accelerator in use", "effective batch 8", "trained to step 10", "eval at step 10", "texts: 13, "):
        assert sum(line.startswith(once) for line in lines) == 1, once


def test_what_says_nothing_to_a_user_is_in_the_log_and_not_on_the_console(two_ranks):
    folder, printed = two_ranks
    log = (folder / "out/run.log").read_text()
    assert "`gradient_checkpointing` is deprecated" in log and "deprecated" not in printed
    assert "rank 0" in log and "rank 1" in log
    assert log.count("before: ") == 6 and "source: " in log  # three samples whole, of each rank


def test_the_last_lines_name_what_lies_there_and_the_scores_beside_those_of_the_leads(two_ranks):
    folder, printed = two_ranks
    last = printed[printed.index("texts: ") :].splitlines()
    rows = [json.loads(line) for line in (folder / "out/generated_predictions.jsonl").read_text().splitlines()]
    stopped = json.loads((folder / "out/all_results.json").read_text())["eval_stopped"]
    ended = round(stopped * len(rows))
    assert last[0].startswith(f"texts: 13, {ended} ended by themselves, {13 - ended} ran into the limit")
    assert ("raise --val_max_target_length" in last[0]) == (13 - ended > 1)
    assert re.search(r"; ROUGE-1/2/L \S+; of the source's first \d words \d+\.\d/\d+\.\d/\d+\.\d$", last[0])
    named = re.fullmatch(r"model: out \(with (.*)\)", last[1])[1].split(", ")
    assert {"README.md", "training_curves.png", "generated_predictions.jsonl", "run.log"} <= set(named)
    assert all((folder / "out" / name).is_file() for name in named)


def test_the_commands_of_the_last_lines_run_as_they_are_printed(two_ranks):
    folder, printed = two_ranks
    (tried,) = re.findall(r"^try it: +(.*)$", printed, re.M)
    run([sys.executable, *shlex.split(tried)[1:]], cwd=folder)
    assert len((folder / "out_texts.csv").read_text().splitlines()) == 14
    (read,) = re.findall(r"^read it: +(.*)$", printed, re.M)
    run([sys.executable, *shlex.split(read)[1:]], cwd=folder)
    assert (folder / "out/evaluation_report.html").is_file()
    (again,) = re.findall(r"^train on: +(.*)$", printed, re.M)
    words = shlex.split(again)
    assert words[:3] == ["deepspeed", "--num_gpus", "2"] and words[-2:] == ["--max_steps", "20"]
    assert words.count("--max_steps") == 1 and "--local_rank=0" not in words


def test_the_card_is_one_that_a_hub_takes(two_ranks):
    folder = two_ranks[0] / "out"
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model is None and card.data.datasets is None  # a folder and a file are no hub's names
    assert card.data.pipeline_tag == "summarization" and card.data.library_name == "transformers"
    results = json.loads((folder / "all_results.json").read_text())
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert scores["ROUGE-L"] == round(results["eval_rougeL"], 4) and scores["Loss"] == round(results["eval_loss"], 4)
    assert "![Training curves](training_curves.png)" in card.text and "trained on train.csv for 10 steps" in card.text
    assert re.search(r"```bash\ndeepspeed --num_gpus 2 \S+run_summarization.py --deepspeed .*\n```", card.text)


@pytest.mark.parametrize("name", ["t5-small", "google/flan-t5-base", "meta-llama/Llama-2-7b-chat-hf"])
def test_a_card_names_as_its_base_what_a_hub_can_have(name):
    assert model_card.is_hub_name(name)


@pytest.mark.parametrize("name", [None, "/models/t5", "./t5", "a/b/c", "tests", "a b"])
def test_a_card_names_no_path_as_its_base(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert not model_card.is_hub_name(name)


def test_the_command_of_a_card_holds_no_secret(monkeypatch):
    for words in (["--token", "hf_secret"], ["--token=hf_secret"]):
        monkeypatch.setattr(sys, "argv", ["run_summarization.py", *words, "--max_steps", "3"])
        command = model_card.make_command()
        assert "secret" not in command and "--token TOKEN" in command and "--max_steps 3" in command


@pytest.fixture(scope="module")
def instruct(place, tmp_path_factory):
    """Ten steps of Llama under torchrun on two ranks: (folder, what was printed)."""
    folder = tmp_path_factory.mktemp("llama")
    words = ["--model_name_or_path", place / "tiny-llama", "--train_file", place / "train.jsonl", "--validation_file"]
    words += [place / "validation.jsonl", *TASK, "--prompt_template", "dolly", "--max_seq_length", "256"]
    words += ["--max_new_tokens", "8", "--per_device_train_batch_size", "2", "--packing", "--output_dir", "out"]
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", "29642", ROOT / "run_clm_instruct.py"]
    return folder, run([*command, *words], cwd=folder).stdout


def test_ten_steps_of_a_causal_model_are_at_most_40_lines_and_tell_its_accuracy(instruct):
    folder, printed = instruct
    lines = read_lines(printed)
    assert len(lines) <= 40, "\n".join(lines)
    assert all(m[3] for m in map(re.compile(STEP).fullmatch, lines) if m)
    history = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "token_accuracy" in entry] == list(range(1, 11))
    log = (folder / "out/run.log").read_text()
    assert "share of answers" in log and "--- one row: " in log  # the audit in full
    assert "model: out" in printed and "raise --max_new_tokens" in printed
    (again,) = re.findall(r"^train on: +(.*)$", printed, re.M)
    assert again.startswith("torchrun --nproc_per_node 2 ")


# ------------------------------------------------------------------------------------------------ how often


@pytest.mark.parametrize("steps, between", [(3, 1), (99, 1), (100, 2), (450, 9), (500, 10), (100_000, 10)])
def test_a_loss_is_logged_fifty_times_a_run_and_every_ten_steps_at_least(work, steps, between):
    line, args, state = make_line(work), make_arguments(console.OWN_STEPS), SimpleNamespace(max_steps=steps)
    state.global_step = state.logging_steps = 0
    line.on_train_begin(args, state, None, model=line.trainer.model)
    assert state.logging_steps == between and steps // between >= min(50, steps)


def test_where_logging_steps_is_given_it_rules(work):
    line, state = make_line(work), SimpleNamespace(max_steps=1000, global_step=0, logging_steps=25)
    line.on_train_begin(make_arguments(25), state, None, model=line.trainer.model)
    assert state.logging_steps == 25


def test_more_losses_are_no_more_evaluations():
    args = SimpleNamespace(logging_steps=console.OWN_STEPS, eval_steps=None)
    console.quiet_libraries(args)
    assert args.eval_steps == 500
    args = SimpleNamespace(logging_steps=100, eval_steps=None)
    console.quiet_libraries(args)
    assert args.eval_steps is None  # the library's rule, then: as often as it logs


def make_line(work) -> console.RunLines:
    model = AutoModelForSeq2SeqLM.from_pretrained(work / "tiny-t5")
    return console.RunLines(SimpleNamespace(model=model, compute_loss=None))


def make_arguments(logging_steps) -> SimpleNamespace:
    return SimpleNamespace(logging_steps=logging_steps, device=torch.device("cpu"), bf16=False, fp16=False)


# ------------------------------------------------------------------------------------------------ warnings


def test_a_warning_that_a_user_can_act_on_is_said_once_by_the_first_rank_alone():
    record = logging.LogRecord("transformers.trainer", logging.WARNING, "", 0, "lower it", (), None)
    first, second = console.Console(0), console.Console(1)
    assert [first.filter(record), first.filter(record), second.filter(record)] == [True, False, False]


@pytest.mark.parametrize(
    "name, text",
    [
        ("DeepSpeed", "**** You are using ZeRO with an untested optimizer, proceed with caution *****"),
        ("py.warnings", "FutureWarning: `gradient_checkpointing` is deprecated"),
        ("transformers.modeling_utils", "This checkpoint seem corrupted. The tied weights mapping"),
        ("transformers.trainer", "There were missing keys in the checkpoint model loaded: ['lm_head.weight']."),
    ],
)
def test_library_lines_that_alarm_for_nothing_are_not_said(name, text):
    assert not console.Console(0).filter(logging.LogRecord(name, logging.WARNING, "", 0, text, (), None))


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_is_said_whoever_says_it(rank):
    assert console.Console(rank).filter(logging.LogRecord("torch", logging.ERROR, "", 0, "broken", (), None))


def test_what_was_said_before_there_was_a_folder_is_in_its_log(tmp_path, monkeypatch):
    held = logging.handlers.MemoryHandler(100, flushLevel=logging.CRITICAL + 1)
    held.setFormatter(logging.Formatter("%(name)s %(message)s"))
    monkeypatch.setattr(console, "held", held)
    held.handle(logging.LogRecord("early", logging.INFO, "", 0, "one", (), None))
    console.open_log(tmp_path / "absent")
    console.open_log(tmp_path)
    held.handle(logging.LogRecord("late", logging.INFO, "", 0, "two", (), None))
    assert (tmp_path / "run.log").read_text() == "early one\nlate two\n"


# ------------------------------------------------------------------------------------------------ figures


def test_the_tokens_of_padded_and_of_packed_batches_are_the_real_ones():
    rows = [{"input_ids": [1, 5, 6, 2], "labels": [-100, -100, 6, 2]}, {"input_ids": [1, 2], "labels": [-100, 2]}]
    padded = run_clm_instruct.InstructCollator(2, 8)(rows)  # the padding token is the stop token
    assert [int(n) for n in step_figures.count_tokens(padded, 2)] == [6, 3]
    packed = fast_batches.PackedRowsCollator(2, 8)(
        [fast_batches.join_examples(rows), fast_batches.join_examples(rows[:1])]
    )
    assert [int(n) for n in step_figures.count_tokens(packed, 2)] == [10, 5]
    full = fast_batches.PackedRowsCollator(2)([fast_batches.join_examples(rows)])
    assert int(step_figures.count_tokens(full, 2)[0]) == 6


def test_the_work_of_a_token_is_six_a_weight_that_it_meets(place, work):
    llama = AutoModelForCausalLM.from_pretrained(place / "tiny-llama")
    inner = sum(p.numel() for n, p in llama.named_parameters() if "embed" not in n and "lm_head" not in n)
    head = llama.lm_head.weight.numel()
    assert step_figures.count_flop(llama) == (0, 6 * (inner + head))
    llama.requires_grad_(False)
    assert step_figures.count_flop(llama) == (0, 4 * (inner + head))
    t5 = AutoModelForSeq2SeqLM.from_pretrained(work / "tiny-t5")
    sources, targets = step_figures.count_flop(t5)
    blocks = [sum(p.numel() for n, p in half.named_parameters() if "embed_tokens" not in n and "relative" not in n)
              for half in (t5.encoder, t5.decoder)]  # fmt: skip
    assert sources == 6 * blocks[0] and targets == 6 * (blocks[1] + t5.lm_head.weight.numel())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_accuracy_of_a_loss_without_logits_is_that_of_the_logits(place, smoothing):
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-llama")
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said = model(input_ids=ids).logits.argmax(dim=-1)
    labels = torch.where(torch.arange(40) % 3 == 0, said.roll(1, dims=1), ids)  # a third is what it says
    labels[:, :5] = -100
    wanted = int((said[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100].sum())
    loss = fast_batches.fuse_loss(model, smoothing, shift=True)
    with loss.labelled(labels):
        outputs = model(input_ids=ids)
    line = console.RunLines(SimpleNamespace(model=model, compute_loss=None, compute_loss_func=loss))
    assert [int(n) for n in line.judge(outputs, labels)] == [wanted, int(labels[:, 1:].ne(-100).sum())]
    assert wanted >= 20


def test_an_optimizer_and_a_scheduler_of_the_deepspeed_files_own_are_named_as_what_rules(work):
    model = AutoModelForSeq2SeqLM.from_pretrained(work / "tiny-t5")
    model.encoder.requires_grad_(False)
    config = json.loads((ROOT / "ds_configs/zero3_offload_adamw.json").read_text())
    args = {"per_device_train_batch_size": 4, "world_size": 2, "gradient_accumulation_steps": 3, "bf16": False}
    args |= {"fp16": False, "warmup_steps": 5, "lr_scheduler_type": SimpleNamespace(value="cosine")}
    lines = reports.describe_run(model, SimpleNamespace(**args), "optimizer: adamw_torch", None).splitlines()
    assert lines[1] == "optimizer: adamw_torch; scheduler: cosine, --warmup_steps 5"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert lines[0] == (
        f"parameters: {total / 1e6:.2f} M, {trained / 1e6:.2f} M trained ({trained / total:.1%}); precision: float32"
    )
    args["hf_deepspeed_config"] = SimpleNamespace(config=config)
    lines = reports.describe_run(model, SimpleNamespace(**args), "optimizer: adamw_torch", None).splitlines()
    kinds = [f"{config[name]['type']} of the DeepSpeed file" for name in ("optimizer", "scheduler")]
    assert lines[1] == f"optimizer: {kinds[0]}; scheduler: {kinds[1]}"


def test_curves_of_a_short_run_are_curves(tmp_path):
    history = [{"step": i, "loss": 3 - i / 9, "token_accuracy": i / 9, "epoch": 0.1} for i in range(1, 4)]
    closing.draw_curves(history, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_that_tries_a_model_reads_the_column_that_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run_summarization.py", "--num_train_epochs", "2", "--output_dir", "o"])
    monkeypatch.chdir(tmp_path)
    args = SimpleNamespace(max_steps=-1, num_train_epochs=2.0)
    trainer = SimpleNamespace(args=args, model=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)))
    data = SimpleNamespace(test_file=None, validation_file="v.tsv.gz", train_file="t.csv", delimiter=";")
    data.file_encoding = None
    model = SimpleNamespace(trust_remote_code=False)
    (tmp_path / "merged").mkdir()
    tried, again = closing.describe_next(tmp_path, trainer, model, data, ("description", "abstract"))
    words = shlex.split(tried.removeprefix("try it:"))
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    wanted = {"--model_name_or_path": f"{tmp_path}/merged", "--input_file": "v.tsv.gz", "--delimiter": ";"}
    assert flags == wanted | {"--text_column": "description", "--output_file": f"{tmp_path}_texts.csv"}
    assert again.split(maxsplit=2)[2] == "python run_summarization.py --output_dir o --num_train_epochs 3"
    data.validation_file, data.train_file = None, "novel.txt"  # plain text has no rows to generate from
    assert len(closing.describe_next(tmp_path, trainer, model, data, ("text",))) == 1
