# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""On a full disk every script and tool ends with one sentence, and the same command ends well on a larger one."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT, make_environment, run_warm

TRAINING = "--do_train --max_steps 4 --save_steps 2 --disable_tqdm true"
REVIEWS = f"run_summarization.py --model_name_or_path {{work}}/tiny-t5 --train_file {{work}}/train.csv {TRAINING}"
INSTRUCT = (
    f"run_clm_instruct.py --model_name_or_path {{place}}/tiny-llama --train_file {{place}}/train.jsonl {TRAINING}"
)
# Name: (ranks, command, KiB of disks on which it ends early).
CASES = {
    "summarization": (0, f"{REVIEWS} --output_dir out", (100, 1200)),
    "two ranks": (2, f"{REVIEWS} --output_dir out", (1200,)),
    "zero2": (2, f"{REVIEWS} --output_dir out --deepspeed {{root}}/ds_configs/zero2.json", (4000,)),
    "lora": (0, f"{INSTRUCT} --lora_r 4 --prompt_template dolly --output_dir out", (60, 300)),
    "generation": (
        0,
        "run_generation.py --model_name_or_path {work}/tiny-t5 --input_file {work}/many.csv --output_file out.csv"
        " --max_new_tokens 2",
        (4, 40),
    ),
    "prepare_reviews": (0, "data_prep/prepare_reviews.py --input_file {work}/many.csv --output_dir out", (8,)),
    "prepare_instruct": (0, "data_prep/prepare_instruct.py --input_file {place}/train.jsonl --output_dir out", (8,)),
    "encode_labels": (
        0,
        "data_prep/encode_labels.py --input_file {work}/many.csv --label_column product_id --output_dir out",
        (8,),
    ),
    "make_sample_reviews": (0, "data_prep/make_sample_reviews.py --output_file out.tsv", (8, 200)),
    "measure_dataset": (
        0,
        "data_prep/measure_dataset.py --train_file {work}/many.csv --model_name_or_path {work}/tiny-t5"
        " --output_dir out",
        (8,),
    ),
    "init_model": (0, "tools/init_model.py --train_file {work}/train.csv --vocab_size 300 --output_dir out", (8, 300)),
    "copy_script": (0, "tools/copy_script.py --script run_summarization.py --to out", (60,)),
}


@pytest.fixture
def small(tmp_path):
    """(a folder on a disk of its own, a function that makes the disk so many KiB large)."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"no file system may be mounted here: {mount.stderr.strip()}")
    yield folder, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)
    os.chdir("/")
    subprocess.run(["umount", "-l", folder], check=True)


# Under load a rank of ZeRO-2 once ended in a traceback instead (1 of some 40 starts; not seen again).
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "zero2")) for n in CASES])
def test_a_full_disk_is_one_sentence_and_the_same_command_ends_well_once_there_is_room(name, small, work, place):
    folder, resize = small
    ranks, command, sizes = CASES[name]
    script, *words = command.format(work=work, place=place, root=ROOT).split()
    for size in sizes:
        resize(size)
        done = run_warm(ROOT / script, *words, cwd=folder, ranks=ranks, port=29583, check=False)
        assert done.returncode in (2, 3) and "Traceback" not in done.stdout, (size, done.stdout[-3000:])
        said = re.findall(r"^(?:\w+\.py: )?error:.*(?:\n  - .*)?", done.stdout, re.MULTILINE)
        assert len(said) == 1 and ("make room" in said[0] or "what was copied is whole" in said[0]), done.stdout[
            -3000:
        ]
        assert any(word in said[0] for word in ("No space left", "unexpected pos", "StreamWriter"))
    resize(100_000)
    done = run_warm(ROOT / script, *words, cwd=folder, ranks=ranks, port=29583)
    assert not [path for path in Path(folder).rglob("*") if "unfinished" in path.name]


@pytest.mark.parametrize("gone", ["removed", "a file in its place"])
def test_an_output_folder_that_is_gone_ends_the_run_at_its_next_checkpoint_in_one_sentence(gone, tmp_path, work):
    script, *words = REVIEWS.format(work=work).split()
    words += ["--output_dir", "out", "--max_steps", "100000", "--save_steps", "20", "--save_total_limit", "2"]
    command, out = [sys.executable, str(ROOT / script), *words], tmp_path / "out"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, env=make_environment(), **pipes)
    deadline = time.monotonic() + 200
    while not list(out.glob("checkpoint-*/complete.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    out.rename(tmp_path / "elsewhere")
    if gone == "a file in its place":
        out.write_text("mine")
    printed = process.communicate(timeout=100)[0]
    assert process.returncode == 3 and "Traceback" not in printed, printed[-3000:]
    assert printed.count("error: a file cannot be written") == 1
    assert "Stale file: it was removed while the run was at work: 'out'" in printed
    shutil.rmtree(tmp_path / "elsewhere")
