# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The contract of every launcher: the same argument list gives the same losses, step by step."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run
from launch_places import OVER_TWO_HOSTS, find_port, needs_java, why_no_hosts

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(600)]
SCRIPT = ROOT / "run_summarization.py"
LAUNCHERS = ROOT / "launchers"
ON_LOOPBACK = ["--conf", "spark.driver.host=127.0.0.1"]
WAYS = {
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "PORT"],
    "deepspeed over two hosts": OVER_TWO_HOSTS,
    "spark local": [sys.executable, LAUNCHERS / "spark_train.py", "--master", "local[2]", "--num_processes", "2"],
    "spark standalone": [sys.executable, LAUNCHERS / "spark_train.py", "--master", "MASTER", "--num_processes", "2"],
    "spark notebook": ["DeepspeedTorchDistributor"],
    "ray": [sys.executable, LAUNCHERS / "ray_train.py", "--num_workers", "2"],
}
# What a notebook would say; Spark's own distributor appends `--deepspeed --deepspeed_config FILE` to the list.
NOTEBOOK = """import sys
from pyspark.sql import SparkSession
from pyspark.ml.deepspeed.deepspeed_distributor import DeepspeedTorchDistributor
SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
config, script, *words = sys.argv[1:]
DeepspeedTorchDistributor(
    numGpus=2, nnodes=1, localMode=True, useGpu=False, deepspeedConfig=config
).run(script, *words)
"""


def read_steps(out: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm, a line each."""
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]


def make_arguments(work: Path, rows: int) -> list:
    """Plain SGD in fp32 under ZeRO-2, no dropout, six steps; one list for every way but --output_dir."""
    words = ["--model_name_or_path", work / "tiny-t5", "--do_train", "--train_file", work / "train.csv"]
    words += ["--source_prefix", "summarize: ", "--optim", "sgd", "--learning_rate", "1e-3", "--max_steps", "6"]
    words += ["--logging_steps", "1", "--save_strategy", "no", "--max_target_length", "12"]
    return [*words, "--per_device_train_batch_size", rows]


@pytest.fixture(scope="module")
def by_python(work) -> list[tuple[int, float, float]]:
    """`python`: one process, so the rows of both."""
    zero = ["--deepspeed", ROOT / "ds_configs/zero2.json"]
    run([sys.executable, SCRIPT, *make_arguments(work, 16), *zero, "--output_dir", "by_python"], cwd=work)
    return read_steps(work / "by_python")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[needs_java] if "spark" in way else []) for way in WAYS])
def test_the_same_argument_list_gives_the_losses_of_python(work, by_python, way, request, tmp_path):
    if way == "deepspeed over two hosts" and (reason := why_no_hosts()):
        pytest.skip(reason)
    words = WAYS[way]
    if "MASTER" in words:
        words = [request.getfixturevalue("master") if word == "MASTER" else word for word in words] + ON_LOOPBACK
    if "PORT" in words:
        words = [find_port() if word == "PORT" else word for word in words]
    arguments = [*make_arguments(work, 8), "--output_dir", tmp_path / "out"]
    config = ROOT / "ds_configs/zero2.json"
    if way == "spark notebook":
        (tmp_path / "notebook.py").write_text(NOTEBOOK)
        done = run([sys.executable, "notebook.py", config, SCRIPT, *arguments], cwd=tmp_path)
    else:
        done = run([*words, SCRIPT, *arguments, "--deepspeed", config], cwd=tmp_path)
    found = read_steps(tmp_path / "out")
    assert len(by_python) == 6 and [step for step, _, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in by_python], rel=1e-5)
    assert [norm for _, _, norm in found] == pytest.approx([norm for _, _, norm in by_python], rel=1e-4)
    assert "effective batch 16 = 8 rows x 2 processes x 1" in done.stdout


@needs_java
def test_in_a_notebook_on_spark_the_sentence_is_in_the_exception(work, tmp_path):
    (tmp_path / "notebook.py").write_text(NOTEBOOK)
    arguments = [*make_arguments(work, 8), "--output_dir", "out"]
    arguments[arguments.index("--train_file") + 1] = "nowhere.csv"
    done = run(
        [sys.executable, "notebook.py", ROOT / "ds_configs/zero2.json", SCRIPT, *arguments], cwd=tmp_path, check=False
    )
    exception = done.stdout.rpartition("RuntimeError: Command ")[2]
    assert done.returncode and "error: --train_file nowhere.csv: there is no such file" in exception


def test_two_hosts_leave_nothing_behind(tmp_path):
    if reason := why_no_hosts():
        pytest.skip(reason)
    before = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    (tmp_path / "show.py").write_text("import os\nprint(f\"rank {os.environ['RANK']} {os.getpid()}\")\n")
    done = run([*OVER_TWO_HOSTS, "show.py"], cwd=tmp_path)
    assert "rank 0" in done.stdout and "rank 1" in (tmp_path / "second_host.txt").read_text()
    assert subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout == before
    left = subprocess.run(["pgrep", "-f", "10.77.0.1"], capture_output=True, text=True).stdout
    assert left == ""


def test_the_documented_commands_on_ray_parse(monkeypatch):
    monkeypatch.syspath_prepend(str(LAUNCHERS))
    monkeypatch.chdir(ROOT)  # the launchers look for the script
    import ray_generate
    import ray_train

    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages).replace("\\\n", " ")
    for module, script in ((ray_train, "run_summarization.py"), (ray_generate, "run_generation.py")):
        (command,) = re.findall(rf"^python launchers/{module.__name__}.py (.*)", text, re.M)
        args = module.parse_launcher_arguments(shlex.split(command))
        assert args.script == script and "--model_name_or_path" in args.arguments
