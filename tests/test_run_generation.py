# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""run_generation.py run as a user runs it; a test's name is its claim."""

import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, GenerationConfig

import generation_store
import run_clm_instruct as clm
import run_generation as script
from conftest import ROOT, make_instructions, make_rows, run, run_warm, write_csv, write_jsonl
from test_chat_turns import KINDS, SHAPES, make_case
from test_clm_labels import CHAT, IM_TOKENS, QUESTIONS, make_simple

SCRIPT = ROOT / "run_generation.py"
MARKER = ".out.csv.complete.json"


def read_csv(path: Path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def command(model: Path, table: Path, output: Path, *flags, start=SCRIPT) -> list:
    words = [start, "--model_name_or_path", model, "--input_file", table]
    return [*words, "--output_file", output, "--dtype", "float32", "--max_new_tokens", "12", *flags]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama trained for a few steps on questions, so that its answers end at different lengths."""
    folder = tmp_path_factory.mktemp("llama")
    write_jsonl(folder / "train.jsonl", make_instructions(200, 1))
    words = ["--architecture", "llama", "--preset", "tiny", "--train_file", "train.jsonl", "--vocab_size", "600"]
    run_warm(ROOT / "tools/init_model.py", *words, "--output_dir", "tiny-llama", cwd=folder)
    run_warm(
        *[ROOT / "run_clm_instruct.py", "--model_name_or_path", "tiny-llama", "--do_train"]
        + ["--train_file", "train.jsonl", "--prompt_template", "plain", "--max_steps", "80", "--learning_rate", "5e-3"]
        + ["--save_strategy", "no", "--output_dir", "out"],
        cwd=folder,
    )
    return folder / "out"


def make_generator(model_folder, data_folder, **decoding):
    """A Generator over a folder's model, as main() makes it."""
    table = write_csv(data_folder / "rows.csv", make_rows(3, 1))
    flags = [f"--{name}={json.dumps(value)}" for name, value in decoding.items()]
    argv = [str(w) for w in command(model_folder, table, data_folder / "never.csv", *flags)[1:]]
    return script.load_generator(*script.parse_generation_arguments(argv))


def make_odd_texts(count: int) -> list[str]:
    """Reviews with their words shuffled or missing, so that outputs end at different lengths."""
    dice, texts = random.Random(3), []
    for body, _, _ in make_rows(count, 9):
        words = body.split()
        texts.append(" ".join(dice.sample(words, dice.randint(1, len(words)))) if len(texts) % 3 else body)
    return texts


def generate_all(generator, texts: list) -> list[list[int]]:
    ids, _ = generator.prompts.encode(texts)
    outputs = {}
    for batch in script.plan_rows(generator, ids):
        outputs |= zip(batch, script.generate_batch(generator, [ids[i] for i in batch], batch), strict=True)
    return [outputs[i] for i in range(len(texts))]


def generate_alone(generator, texts: list) -> list[list[int]]:
    """transformers' own generate() on one row at a time."""
    model, results = generator.model, []
    for ids in generator.prompts.encode(texts)[0]:
        prompt = torch.tensor([ids])
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=generator.config
        )
        results.append(output[0, 1 if model.config.is_encoder_decoder else len(ids) :].tolist())
    return results


# ------------------------------------------------------------------------------------------------ same as one by one

METHODS = {
    "greedy": {},
    "beams": {"num_beams": 4},
    "beams that stop early": {"num_beams": 3, "early_stopping": True},
    "beams that never stop early, longer": {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    "beams without repeats": {
        "num_beams": 2,
        "no_repeat_ngram_size": 2,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    },
    "greedy without repeats": {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_decoder_writes_in_batches_what_it_writes_row_by_row(trained, tmp_path, method):
    generator = make_generator(trained, tmp_path, **METHODS[method])
    generator.max_tokens_per_batch = 2000
    texts = make_odd_texts(60)
    outputs = generate_all(generator, texts)
    assert outputs == generate_alone(generator, texts)
    if "repeats" not in method:
        assert len({len(row) for row in outputs}) > 1  # so some rows end while others of their batch go on


@pytest.mark.parametrize("method", METHODS)
def test_a_causal_model_writes_in_batches_what_it_writes_row_by_row(llama, tmp_path, method):
    generator = make_generator(llama, tmp_path, **METHODS[method], max_new_tokens=24)
    generator.max_tokens_per_batch = 3000
    texts = [row["instruction"] * (1 + i % 3) for i, row in enumerate(make_instructions(40, 9))]
    outputs = generate_all(generator, texts)
    assert outputs == generate_alone(generator, texts)
    assert len({len(row) for row in outputs}) > 1


def test_an_assistant_model_changes_no_greedy_output(llama, tmp_path):
    generator = make_generator(llama, tmp_path)
    texts = [row["instruction"] for row in make_instructions(12, 9)]
    expected = generate_all(generator, texts)
    generator.assistant = AutoModelForCausalLM.from_pretrained(llama).eval()
    assert generate_all(generator, texts) == expected


SAMPLING = {
    "temperature": {"do_sample": True, "temperature": 0.7},
    "top-p": {"do_sample": True, "top_p": 0.8, "top_k": 0},
    "min-p": {"do_sample": True, "min_p": 0.1},
    "typical": {"do_sample": True, "typical_p": 0.9},
    "beams": {"do_sample": True, "num_beams": 2},
}


@pytest.mark.parametrize("method", SAMPLING)
def test_a_sample_belongs_to_its_row_and_seed_and_not_to_its_batch(trained, tmp_path, method):
    generator = make_generator(trained, tmp_path, **SAMPLING[method])
    texts = [body for body, _, _ in make_rows(40, 9)]
    whole = generate_all(generator, texts)
    generator.max_tokens_per_batch = 300
    assert generate_all(generator, texts) == whole
    generator.seed = 43
    assert generate_all(generator, texts) != whole


def test_samples_have_the_probabilities_that_the_model_gives(trained, tmp_path):
    generator = make_generator(trained, tmp_path, do_sample=True, max_new_tokens=1, top_k=0)
    ids = generator.prompts.encode(["The lens is great."])[0]
    drawn = script.generate_batch(generator, ids * 4000, list(range(4000)))
    with torch.no_grad():
        start = torch.tensor([[generator.model.config.decoder_start_token_id]])
        logits = generator.model(input_ids=torch.tensor(ids), decoder_input_ids=start).logits[0, -1]
    expected = logits.softmax(-1)
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=len(expected)) / 4000
    assert (found - expected).abs().max() < 0.03  # four standard errors at most


WARPED = {"temperature": 0.7, "top_h": 0.5, "top_k": 9, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.8}
WARPED |= {"epsilon_cutoff": 0.01, "eta_cutoff": 0.02}


@pytest.mark.parametrize("given", [{}, *({name: value} for name, value in WARPED.items()), WARPED], ids=str)
def test_a_sample_is_drawn_from_the_scores_that_generate_would_draw_from(trained, tmp_path, given):
    generator = make_generator(trained, tmp_path, do_sample=True, **given)
    (ids,), _ = generator.prompts.encode(["The lens is great."])
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "max_new_tokens": 1}
    expected = generator.model.generate(torch.tensor([ids]), do_sample=True, **given, **how)
    (scores,), warpers = expected.logits, script.RowSampling(generator.config, [0], 1, "cpu").warpers
    for warp in warpers:
        scores = warp(None, scores)
    assert torch.equal(scores, expected.scores[0])
    assert len(warpers) == len({"top_k": 50, **given})


def test_no_flag_of_sampling_is_left_out():
    flags = set()
    for name in vars(GenerationConfig()):
        try:
            GenerationConfig(**{"do_sample": False, name: 0.5}).validate(strict=True)
        except Exception as error:  # some fields take no number at all
            flags |= {name} if f"`{name}`: `do_sample` is not set" in str(error) else set()
    assert {"temperature", "min_p"} <= flags <= set(script.WARPERS)


def test_the_models_own_settings_count_unless_a_flag_asks_for_another_method(trained, tmp_path):
    generator = make_generator(trained, tmp_path)
    generator.model.generation_config.update(do_sample=True, temperature=0.7, top_k=5, length_penalty=None)

    def choose(**decoding) -> tuple:
        config = script.make_generation_config(generator.model, generator.prompts.tokenizer, decoding)
        return config.do_sample, config.temperature, config.top_k, config.num_beams

    assert choose() == choose(do_sample=True) == (True, 0.7, 5, 1)
    assert choose(do_sample=True, top_k=9) == (True, 0.7, 9, 1)
    assert choose(num_beams=2) == (False, None, None, 2)
    generator.config = script.make_generation_config(generator.model, generator.prompts.tokenizer, {"num_beams": 2})
    texts = make_odd_texts(6)
    first = generate_all(generator, texts)
    generator.seed = 7
    assert generate_all(generator, texts) == first  # beams that drew would differ


# ------------------------------------------------------------------------------------------------ the table


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    """150 rows with a leading-zero number, a comma, a newline, nulls and one very long text."""
    folder = tmp_path_factory.mktemp("table")
    rows = make_rows(150, 5)
    rows[3], rows[40] = ("", *rows[3][1:]), ("   ", *rows[40][1:])
    rows[7] = (" ".join(body for body, _, _ in rows[50:120]), 'a "quoted", headline\nin two lines', "007")
    return write_csv(folder / "rows.csv", rows)


def test_every_column_and_the_order_are_kept_and_one_column_is_new(trained, table, tmp_path):
    (tmp_path / "run_generation.py").write_text(SCRIPT.read_text())  # alone in an empty folder
    words = command(trained, table, "out.csv", "--max_source_length", "96", start="run_generation.py")
    done = run([sys.executable, *words], cwd=tmp_path)
    assert "guards.py is not beside this script: bad input ends late" in done.stdout
    before, after = read_csv(table), read_csv(tmp_path / "out.csv")
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in after] == before
    assert list(after[0]) == ["review_body", "review_headline", "product_id", "prediction"]
    assert [i for i, row in enumerate(after) if not row["prediction"]] == [3, 40]
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(trained), AutoTokenizer.from_pretrained(trained)
    for i in (0, 7, 149):
        ids = tokenizer("summarize: " + before[i]["review_body"], truncation=True, max_length=96, return_tensors="pt")
        ids = model.generate(**ids, generation_config=GenerationConfig(max_new_tokens=12, num_beams=1))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == after[i]["prediction"]
    counts = read_counts(done.stdout)
    assert (counts["without a text"], counts["cut"], counts["rows"]) == (2, 1, 150)
    assert counts["ended by themselves"] + counts["at --max_new_tokens"] == 148
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "run_generation.py"]


def read_counts(printed: str) -> dict[str, int]:
    return {name.strip(): int(number) for name, number in re.findall(r"^(\S.{23}) *(\d+)$", printed, re.M)}


def test_texts_that_ran_into_the_limit_are_counted_and_above_a_tenth_warned_of(trained, table, tmp_path):
    printed = []
    for name, most in (("short", "2"), ("long", "40")):
        words = command(trained, table, tmp_path / f"{name}.jsonl", "--max_new_tokens", most)
        printed.append(run_warm(*words, cwd=tmp_path).stdout)
    short, long = map(read_counts, printed)
    assert (short["ended by themselves"], short["at --max_new_tokens"]) == (0, 148)
    assert "148 texts did not end within --max_new_tokens: raise it" in printed[0]
    cut_off = long["at --max_new_tokens"]
    assert cut_off < 30 and long["ended by themselves"] == 148 - cut_off
    assert ("did not end within" in printed[1]) == (cut_off > 14)  # a tenth


def test_an_end_that_the_settings_force_at_the_limit_is_not_the_texts_own():
    config = GenerationConfig(max_new_tokens=3, eos_token_id=[2, 7], pad_token_id=0, num_beams=1)
    generator = script.Generator(None, None, None, config, 100, 0)
    texts = ([5, 5, 2], [5, 7], [5, 5, 5], [5, 0, 0])  # the last ended by a stop string, and was padded in its batch
    assert [generator.is_cut_off(tokens) for tokens in texts] == [False, False, True, False]
    config.forced_eos_token_id = 2
    assert [generator.is_cut_off(tokens) for tokens in texts] == [True, False, True, False]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_typed_columns_and_lists_come_out_as_they_went_in(trained, tmp_path, ending):
    rows = [
        {"text": body, "stars": i, "tags": ["a", str(i)], "score": i / 3}
        for i, (body, _, _) in enumerate(make_rows(9, 2))
    ]
    rows[4]["text"] = None
    source = tmp_path / f"in.{ending}"
    datasets.Dataset.from_list(rows).to_parquet(source) if ending == "parquet" else write_jsonl(source, rows)
    out = tmp_path / f"out.{ending}"
    run_warm(*command(trained, source, out), cwd=tmp_path)
    read = datasets.load_dataset("parquet" if ending == "parquet" else "json", data_files=str(out), split="train")
    assert [{k: v for k, v in row.items() if k != "prediction"} for row in read] == rows
    assert read[4]["prediction"] == "" and all(read[i]["prediction"] for i in (0, 8))


def test_chats_and_instructions_are_answered_by_the_saved_template(llama, tmp_path):
    rows = make_instructions(12, 9)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    chats = []
    for row in rows:
        user = {"role": "user", "content": row["instruction"], "context": row["context"]}
        chats.append({"messages": [user, {"role": "assistant", "content": "to be replaced", "context": ""}]})
    write_jsonl(tmp_path / "chats.jsonl", chats)
    run_warm(*command(llama, tmp_path / "rows.jsonl", tmp_path / "a.jsonl"), cwd=tmp_path)
    run_warm(*command(llama, tmp_path / "chats.jsonl", tmp_path / "b.jsonl"), cwd=tmp_path)
    answers = [json.loads(line)["prediction"] for line in open(tmp_path / "a.jsonl")]
    assert answers == [json.loads(line)["prediction"] for line in open(tmp_path / "b.jsonl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llama), AutoTokenizer.from_pretrained(llama)
    for row, answer in zip(rows, answers, strict=True):
        # The template `plain` knows no context: it follows the instruction, as it did in the training.
        user = {"role": "user", "content": "\n\n".join(filter(None, (row["instruction"], row["context"])))}
        ids = tokenizer.apply_chat_template([user], add_generation_prompt=True, return_tensors="pt")
        new = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert tokenizer.decode(new, skip_special_tokens=True).strip() == answer


@pytest.mark.parametrize("template", ["plain", "dolly", "chatml", "llama2"])
def test_the_prompt_of_every_row_is_the_one_that_was_trained_on(template, tmp_path):
    tokenizer = make_simple(template, **IM_TOKENS)
    prompts = script.Prompts(tokenizer, True, "", 10_000)
    layouts = {"dolly": ("instruction", "context", "response"), "alpaca": ("instruction", "input", "output")}
    for data_format, names in layouts.items():
        rows = [dict(zip(names, row.values(), strict=True)) for row in QUESTIONS]
        cells = {name: [row[name] for row in rows] for name in names}
        trained = clm.encode_chats(cells, range(len(rows)), tokenizer, data_format, names, 10_000)
        assert not any(trained["problem"])
        texts = [script.read_prompt({n: row[n] for n in names[:2]}, "instruction", True) for row in rows]
        assert [prompts.render(text) for text in texts] == trained["source"]


def test_the_prompt_of_a_chat_with_tools_is_the_one_that_was_trained_on():
    for kind in KINDS:
        for name in ("two calls", "thought, call, thought", "system", "weight 0 first"):
            messages, tools = SHAPES[name]
            tokenizer = make_case(kind)
            encoded = clm.encode_chats({"messages": [messages], "tools": [tools]}, [0], tokenizer, *CHAT, 10_000)
            if encoded["problem"][0]:
                continue
            text = script.read_prompt({"messages": json.dumps(messages), "tools": tools}, "messages", True)
            assert script.Prompts(tokenizer, True, "", 10_000).render(text) == encoded["source"][0]


def test_a_chat_that_would_lose_something_is_refused_with_its_row(tmp_path):
    table = datasets.Dataset.from_dict({"messages": [json.dumps([{"role": "user", "content": "q", "images": ["a"]}])]})
    with pytest.raises(script.UsageError, match="row 0: a turn's 'images' would be lost"):
        script.read_texts(table, "messages", True)
    assert script.read_texts(table, "messages", True, ["images"]) == [[{"role": "user", "content": "q"}]]


def test_a_long_chat_prompt_loses_text_and_keeps_what_the_template_adds(llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.chat_template = "{{ bos_token }}Q: {{ messages[0].content }}\nA:"
    prompts = script.Prompts(tokenizer, True, "", 20)
    (ids,), (cut,) = prompts.encode(["clean the lens " * 30])
    text = tokenizer.decode(ids)
    assert cut and len(ids) <= 20 and text.startswith("<s>Q: clean") and text.endswith("\nA:")


# ------------------------------------------------------------------------------------------------ several processes


@pytest.fixture(scope="module")
def one_process(trained, table, tmp_path_factory) -> dict[str, list[dict]]:
    folder = tmp_path_factory.mktemp("one")
    outs = {}
    for name, flags in WAYS.items():
        run_warm(*command(trained, table, folder / f"{name}.csv", *CUT, *flags), cwd=folder)
        outs[name] = read_csv(folder / f"{name}.csv")
    return outs


CUT = ["--max_source_length", "96", "--max_tokens_per_batch", "400"]
WAYS = {"beams": ["--num_beams", "2"], "samples": ["--do_sample", "--temperature", "0.8"]}


@pytest.mark.parametrize("name", WAYS)
def test_two_ranks_write_the_table_of_one(trained, table, one_process, tmp_path, name):
    run_warm(*command(trained, table, tmp_path / "out.csv", *CUT, *WAYS[name]), cwd=tmp_path, ranks=2, port=29591)
    assert read_csv(tmp_path / "out.csv") == one_process[name]


def test_zero3_on_two_ranks_writes_the_table_of_one_process(trained, table, one_process, tmp_path):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29592"]
    zero = ["--deepspeed", ROOT / "ds_configs/zero3_inference.json", *WAYS["beams"]]
    run([*start, *command(trained, table, tmp_path / "out.csv", *CUT, *zero)], cwd=tmp_path)
    assert read_csv(tmp_path / "out.csv") == one_process["beams"]


# ------------------------------------------------------------------------------------------------ kills


def test_a_run_killed_twice_goes_on_and_ends_with_the_same_file(trained, tmp_path):
    source = write_csv(tmp_path / "rows.csv", make_rows(600, 6))
    flags = ["--num_beams", "4", "--max_tokens_per_batch", "600"]
    counts = read_counts(run_warm(*command(trained, source, tmp_path / "whole.csv", *flags), cwd=tmp_path).stdout)
    words = [str(word) for word in command(trained, source, tmp_path / "out.csv", *flags)]
    parts = tmp_path / "out.csv.parts"
    for least in (5, 25):
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([sys.executable, *words], cwd=tmp_path, **silent)
        while count_lines(parts) < least and process.poll() is None:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out.csv").exists() and count_lines(parts) >= least
    newest = max(parts.glob("*.jsonl"), key=lambda path: path.name)
    newest.write_bytes(newest.read_bytes()[:-20])  # torn in the middle of its last line
    printed = run_warm(*words, cwd=tmp_path).stdout
    assert "going on: " in printed and read_counts(printed) == counts
    assert (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not parts.exists()


def count_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")) if folder.exists() else 0


def test_rows_of_other_arguments_are_not_mixed_in(trained, table, tmp_path):
    store = generation_store.Store(script.MemoryStore(), tmp_path / "out.csv", {"num_beams": 4})
    store.open()
    store.add(0, [(0, "a text of four beams")])
    done = run_warm(*command(trained, table, tmp_path / "out.csv", "--num_beams", "1"), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "another run works on it" in done.stdout
    store.lock.close()
    done = run_warm(*command(trained, table, tmp_path / "out.csv", "--num_beams", "1"), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert "holds the rows of another run: " in done.stdout and "remove it" in done.stdout
    assert "num_beams was 4, is 1; " in done.stdout


def make_store(output: Path, **settings) -> generation_store.Store:
    store = generation_store.Store(script.MemoryStore(), output, settings)
    store.open()
    return store


def test_a_row_torn_in_a_letter_or_with_a_flipped_bit_is_generated_again(tmp_path):
    rows = {(0, n): f"Gerät {n}: größer als gedacht" for n in range(4)}
    store = make_store(tmp_path / "out.csv")
    for (number, row), text in rows.items():
        store.add(number, [(row, text)], [row])
    store.stream.close()
    store.lock.close()
    (path,) = store.folder.glob("*.jsonl")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert make_store(tmp_path / "out.csv").found == rows
    path.write_bytes(b"".join(lines[:3]) + lines[3][: lines[3].index("ä".encode()) + 1])  # half of the letter
    again = make_store(tmp_path / "out.csv")
    assert again.found == {key: rows[key] for key in rows if key != (0, 3)} and again.cut_off == {*again.found}
    for bit in range(8 * len(lines[1])):
        flipped = bytearray(whole)
        flipped[len(lines[0]) + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        again.found.clear()
        again.read()
        assert again.found.items() <= rows.items() and {(0, 0), (0, 3)} <= {*again.found}
        # A bit that makes a line end of the last byte's takes the line behind it along.
        assert (0, 1) not in again.found


def test_settings_that_a_kill_tore_are_begun_again(tmp_path):
    make_store(tmp_path / "out.csv", num_beams=4).lock.close()
    settings = tmp_path / "out.csv.parts/settings.json"
    settings.write_text(settings.read_text()[:9])
    make_store(tmp_path / "out.csv", num_beams=1)
    assert json.loads(settings.read_text()) == {"num_beams": 1}


def test_settings_without_a_finished_row_bind_nobody(tmp_path):
    make_store(tmp_path / "out.csv", num_beams=4).lock.close()
    store = make_store(tmp_path / "out.csv", num_beams=1)
    store.add(0, [(0, "text")])
    store.lock.close()
    with pytest.raises(script.UsageError, match="num_beams was 1, is 2; remove it"):
        make_store(tmp_path / "out.csv", num_beams=2)


def test_a_model_is_known_by_its_content_and_an_input_by_all_its_columns(tmp_path):
    def describe(**changed) -> dict:
        rows = {"text": ["a", "b"], "context": ["c", "d"]} | changed
        table = datasets.Dataset.from_dict(rows)
        model_args = script.GenerationModelArguments(model_name_or_path=str(tmp_path))
        return generation_store.describe_request(table, model_args, script.GenerationDataArguments(), {})

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = describe()
    os.utime(tmp_path / "model.safetensors", (1, 1))
    assert describe() == first
    assert generation_store.compare_runs(first, describe(context=["c", "e"])).startswith("the input's was ")
    (tmp_path / "trainer_state.json").write_text("a training's figures, with times")
    assert describe() == first
    (tmp_path / "model.safetensors").write_bytes(b"weighty")
    assert generation_store.compare_runs(first, describe()).startswith("the model's checksum was ")
    (tmp_path / "base").mkdir()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "base")}))
    adapted = describe()
    (tmp_path / "base/model.safetensors").write_bytes(b"weights")
    assert generation_store.compare_runs(adapted, describe()).startswith("the model's checksum was ")


def test_two_ranks_know_their_finished_table_and_refuse_another_run(trained, table, tmp_path):
    words = command(trained, table, tmp_path / "out.csv")
    ranks = {"cwd": tmp_path, "ranks": 2, "check": False}
    run_warm(*words, cwd=tmp_path)
    (tmp_path / "out.csv").rename(tmp_path / ".out.csv.unfinished")  # as a kill before the last step leaves it
    written = (tmp_path / ".out.csv.unfinished").read_bytes()
    done = run_warm(*words, port=29731, **ranks)
    assert done.returncode == 0 and done.stdout.count("holds this run's table, finished") == 1
    assert (tmp_path / "out.csv").read_bytes() == written
    assert [p.name for p in tmp_path.iterdir() if "out.csv" in p.name and p.name[0] == "."] == [MARKER]
    done = run_warm(*words, "--num_beams", "3", port=29732, **ranks)
    assert done.returncode == 2 and "num_beams was None, is 3" in done.stdout and "Traceback" not in done.stdout
    (tmp_path / "out.csv").write_bytes(written + b"mine\n")
    done = run_warm(*words, port=29733, **ranks)
    assert done.returncode == 2 and "exists and is kept: not as a run left it" in done.stdout
    assert (tmp_path / "out.csv").read_bytes() == written + b"mine\n"


# ------------------------------------------------------------------------------------------------ groups


def test_all_texts_of_a_product_become_one_summary_in_rounds(trained, tmp_path):
    rows = make_rows(120, 8)
    source = write_csv(tmp_path / "rows.csv", [*rows, ("Alone.", "alone", "P99"), ("", "empty", "P0")])
    flags = ["--group_by", "product_id", "--min_group_size", "5", "--max_source_length", "96"]
    run_warm(*command(trained, source, tmp_path / "out.csv", *flags, "--max_new_tokens", "8"), cwd=tmp_path)
    sizes = Counter(product for _, _, product in rows)
    products = read_csv(tmp_path / "out.csv")
    assert {row["product_id"]: int(row["num_texts"]) for row in products} == dict(sizes)
    assert list(products[0]) == ["product_id", "num_texts", "num_rounds", "num_cut", "prediction"]
    assert all(row["prediction"] and int(row["num_rounds"]) >= 2 and row["num_cut"] == "0" for row in products)


def test_a_group_is_joined_in_order_into_as_few_parts_as_fit(trained):
    prompts = script.Prompts(AutoTokenizer.from_pretrained(trained), False, "summarize: ", 60)
    texts = [body for body, _, _ in make_rows(30, 4)]
    parts, cut = script.join_texts(texts, prompts)
    assert "\n".join(parts) == "\n".join(texts) and cut == 0 and 1 < len(parts) < 30
    ids, was_cut = prompts.encode(parts)
    assert not any(was_cut)
    for left, right in zip(parts, parts[1:], strict=False):
        assert len(prompts.tokenize([prompts.render(left + "\n" + right.split("\n")[0])])[0]) > 58
    assert script.join_texts(["word " * 200, "short"], prompts)[1] == 1


def test_a_group_of_one_text_takes_one_round_with_the_output_of_the_text_alone(trained, tmp_path):
    generator = make_generator(trained, tmp_path, max_new_tokens=8)
    store = generation_store.Store(script.MemoryStore(), tmp_path / "out.csv", {})
    store.open()
    (result,) = script.summarise_groups(generator, store, {"P1": ["The lens is great."]})
    alone = generator.decode(generate_alone(generator, ["The lens is great."])[0])
    assert result == {"num_texts": 1, "num_rounds": 1, "num_cut": 0, "prediction": alone}


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture
def refused(trained, table, tmp_path):
    def message(*flags, **changed) -> str:
        sound = {"model_name_or_path": trained, "input_file": table, "output_file": tmp_path / "out.csv"} | changed
        argv = [word for name, value in sound.items() if value is not None for word in (f"--{name}", str(value))]
        with pytest.raises(script.UsageError) as caught:
            script.parse_generation_arguments([*argv, *flags])
        return str(caught.value)

    return message


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--text_column", "body"], "has no column 'body' (--text_column); it has review_body, review_headline"),
        (["--group_by", "asin"], "has no column 'asin' (--group_by)"),
        (["--output_column", "product_id"], "already has a column 'product_id'; name another by --output_column"),
        (["--temperature", "0.7"], "temperature: do_sample is not set to True"),
        (["--length_penalty", "2.0"], "num_beams is set to 1"),
        (["--do_sample", "--temperature", "0"], "--temperature 0: must be a number above 0"),
        (["--num_beams", "0"], "--num_beams 0: must be 1 to 10000"),
        (["--min_new_tokens", "9", "--max_new_tokens", "5"], "--min_new_tokens 9 is more than --max_new_tokens 5"),
        (["--num_beams", "4", "--prompt_lookup_num_tokens", "3"], "--prompt_lookup_num_tokens: goes with greedy"),
        (["--max_source_length", "0"], "--max_source_length 0: must be 1 or more"),
        (["--dtype", "int8"], "--dtype int8: must be auto, float32"),
        (["--deepspeed", str(ROOT / "ds_configs/zero2.json")], "has stage 2; only stage 3"),
        (["--num_assistant_tokens_schedule", "fast"], "must be one of constant, heuristic, heuristic_transient"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(refused, flags, said):
    assert said in refused(*flags)


def test_decoding_that_the_library_refuses_for_a_model_is_one_sentence(trained, table, tmp_path):
    words = ["--model_name_or_path", trained, "--input_file", table, "--output_file", tmp_path / "out.csv"]
    done = run_warm(SCRIPT, *words, "--guidance_scale", "1.5", cwd=tmp_path, check=False)  # not for encoder-decoders
    assert done.returncode == 2 and "Traceback" not in done.stdout
    assert done.stdout.count("error: decoding flags that do not go together, or with this model: ") == 1


def test_a_deepspeed_file_without_a_stage_is_not_for_generation(refused, tmp_path):
    (tmp_path / "ds.json").write_text("{}")
    assert "has stage none; only stage 3" in refused("--deepspeed", str(tmp_path / "ds.json"))


def test_wrong_files_are_named_with_the_way_out(refused, trained, tmp_path):
    (tmp_path / "there.csv").write_text("a\n")
    assert "exists and is kept; remove it first" in refused(output_file=tmp_path / "there.csv")
    (tmp_path / "empty.csv").write_text("")
    assert "the file is empty" in refused(input_file=tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("text\n")
    assert "the file holds no rows" in refused(input_file=tmp_path / "header.csv")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((trained / "config.json").read_text())
    assert "the folder has no weights" in refused(model_name_or_path=tmp_path / "model")
    assert refused(input_file="no.csv", output_file="out.txt", model_name_or_path="./no").count("\n") == 2


def test_groups_that_are_all_too_small_are_refused_and_leave_nothing_behind(trained, table, tmp_path):
    flags = ["--group_by", "product_id", "--min_group_size", "500"]
    done = run_warm(*command(trained, table, tmp_path / "out.csv", *flags), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "--min_group_size 500: no group is that large" in done.stdout
    assert not list(tmp_path.glob("out.csv*"))


def test_summaries_too_long_to_be_summarised_again_are_refused(trained, table, tmp_path):
    flags = ["--group_by", "product_id", "--max_source_length", "40", "--max_new_tokens", "20"]
    done = run_warm(*command(trained, table, tmp_path / "out.csv", *flags), cwd=tmp_path, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stdout and "summarised again" in done.stdout
