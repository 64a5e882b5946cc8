# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The launchers over Ray against the same command without it; workers killed under Ray and under deepspeed."""

import json
import re
import sys
from pathlib import Path

import pytest

from conftest import ROOT, run

pytestmark = [pytest.mark.launchers, pytest.mark.timeout(600)]
SCRIPT, TRAIN = ROOT / "run_summarization.py", ROOT / "launchers/ray_train.py"
SIX_STEPS = ["--do_train", "--max_steps", "6", "--save_steps", "3", "--logging_steps", "1", "--optim", "sgd"]
SIX_STEPS += ["--learning_rate", "1e-3", "--source_prefix", "summarize: "]

# run_summarization.py whose second rank is killed once, in its fifth step, after checkpoint-3.
DIES_ONCE = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import transformers
from guards import run_and_exit
from run_summarization import main

class Die(transformers.TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        mark = Path(args.output_dir + ".died")
        if state.global_step == 4 and os.environ["RANK"] == "1" and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

transformers.trainer.DEFAULT_CALLBACKS.append(Die)
if __name__ == "__main__":
    run_and_exit(main)
"""


def losses(out: Path) -> list[float]:
    entries = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in entries if "loss" in entry]


@pytest.fixture(scope="module")
def common(work) -> list:
    (work / "dies_once.py").write_text(DIES_ONCE)
    return [*SIX_STEPS, "--model_name_or_path", work / "tiny-t5", "--train_file", work / "train.csv"]


@pytest.fixture(scope="module")
def alone(work, common) -> Path:
    """Six steps of 16 rows by `python`: what every other way must come to."""
    if (work / "ray_alone").exists():  # test_launch_hosts.py was first
        return work / "ray_alone"
    command = [sys.executable, SCRIPT, *common, "--per_device_train_batch_size", "16", "--output_dir", "ray_alone"]
    run(command, cwd=work)
    return work / "ray_alone"


@pytest.fixture(scope="module")
def launchers(cluster):
    """Both launchers as modules, whose main() ends by leaving the cluster."""
    sys.path.insert(0, str(ROOT / "launchers"))
    import ray
    import ray_generate
    import ray_train

    for module in (ray_train, ray_generate):
        ray.cloudpickle.register_pickle_by_value(module)  # as a file that is run would be
    yield {"train": ray_train, "generate": ray_generate}
    sys.path.remove(str(ROOT / "launchers"))


# ------------------------------------------------------------------------------------------------ training


def read_result(printed: str) -> tuple[dict, Path]:
    metrics = json.loads(re.search(r"^metrics: (.*)", printed, re.M)[1])
    return metrics, Path(re.search(r"^checkpoint: (.*)", printed, re.M)[1])


def test_two_workers_have_the_losses_of_python_and_ray_has_the_metrics_and_the_model(work, common, alone):
    mine = ["--per_device_train_batch_size", "8", "--output_dir", "ray_out"]  # relative: workers run where we are
    done = run([sys.executable, TRAIN, "--num_workers", "2", SCRIPT, *common, *mine], cwd=work)
    assert "effective batch 16 = 8 rows x 2 processes" in done.stdout
    assert losses(work / "ray_out") == pytest.approx(losses(alone), rel=1e-5)
    metrics, checkpoint = read_result(done.stdout)
    assert metrics["train_samples"] == 90 and metrics["train_loss"] > 0
    assert checkpoint.is_relative_to(work / "ray_out.ray")
    assert (checkpoint / "model.safetensors").read_bytes() == (work / "ray_out/model.safetensors").read_bytes()
    assert not list(checkpoint.glob("checkpoint-*"))
    assert list(checkpoint.parent.glob("checkpoint_*/")) == [checkpoint]  # of three: --num_to_keep 1
    assert "Reporting training result" not in done.stdout


def test_a_killed_worker_is_replaced_and_zero3_ends_with_the_losses_of_an_undisturbed_run(
    work, common, alone, cluster
):
    mine = ["--deepspeed", ROOT / "ds_configs/zero3.json", "--per_device_train_batch_size", "8"]
    mine += ["--output_dir", work / "ray_killed"]
    ray = ["--address", cluster, "--num_workers", "2", "--max_failures", "1", "--storage_path", work / "storage"]
    done = run([sys.executable, TRAIN, *ray, "dies_once.py", *common, *mine], cwd=work, timeout=400)
    assert "the worker of rank 1 died: killed, or out of memory" in done.stdout
    assert "Ray replaces it (0 of --max_failures left)" in done.stdout
    assert f"going on from {work / 'ray_killed/checkpoint-3'}" in done.stdout
    assert losses(work / "ray_killed") == pytest.approx(losses(alone), rel=1e-5)
    checkpoint = read_result(done.stdout)[1]
    assert checkpoint.is_relative_to(work / "storage")
    assert list(checkpoint.parent.glob("checkpoint_*/")) == [checkpoint]
    assert done.stdout.count("Traceback") == 0, done.stdout[-6000:]


def test_deepspeed_ends_when_a_rank_is_killed_and_the_same_command_goes_on(work, common, alone):
    mine = ["--deepspeed", ROOT / "ds_configs/zero2.json", "--per_device_train_batch_size", "8"]
    command = ["deepspeed", "--num_gpus", "2", "--master_port", "29581", "dies_once.py", *common, *mine]
    command += ["--output_dir", "deepspeed_killed"]
    killed = run(command, cwd=work, check=False)
    assert killed.returncode != 0 and "exits with return code = -9" in killed.stdout
    assert "going on from deepspeed_killed/checkpoint-3" in run(command, cwd=work).stdout
    assert losses(work / "deepspeed_killed") == pytest.approx(losses(alone), rel=1e-5)


# ------------------------------------------------------------------------------------------------ generating


def test_generation_over_two_actors_writes_the_table_of_run_generation(
    work, alone, cluster, launchers, monkeypatch, capfd
):
    import ray

    import run_generation

    rows = (work / "many.csv").read_text().splitlines()[:80]
    (work / "gaps.csv").write_text("\n".join([*rows, '" ",nothing to read,P0']) + "\n")
    monkeypatch.chdir(work)
    command = ["--model_name_or_path", str(alone), "--input_file", "gaps.csv", "--num_beams", "2", "--max_new_tokens"]
    command += ["8", "--max_source_length", "24", "--source_prefix", "summarize: "]
    run_generation.main([*command, "--output_file", "one.csv"])
    one = capfd.readouterr().out
    argv = ["--address", cluster, "--num_workers", "2", str(ROOT / "run_generation.py"), *command]
    try:
        assert launchers["generate"].main([*argv, "--output_file", "two.csv"]) == 0
    finally:
        ray.shutdown()
    two = capfd.readouterr().out
    assert (work / "two.csv").read_bytes() == (work / "one.csv").read_bytes()
    for count in ("cut", "without a text", "written"):
        pattern = rf"^{count} +(\d+)$"
        assert re.search(pattern, two, re.M)[1] == re.search(pattern, one, re.M)[1] != "0", count
    assert not list(work.glob("*.parts"))


# ------------------------------------------------------------------------------------------------ clear errors


@pytest.mark.parametrize(
    ("which", "arguments", "message"),
    [
        ("train", ["--num_workers", "0", "gone.py"], "--num_workers 0: must be 1 or more"),
        ("train", ["--num_workers", "2", "gone.py"], "gone.py: there is no such script"),
        ("train", ["--address", "127.0.0.1:1", SCRIPT], "--address 127.0.0.1:1: nobody answers there"),
        ("train", ["--address", "CLUSTER", "--num_workers", "9", SCRIPT], "needs 9 CPUs, the Ray cluster has 2"),
        ("train", ["--address", "CLUSTER", "--use_gpu", SCRIPT], "needs 1 GPUs, the Ray cluster has 0"),
        (
            "train",
            ["--address", "CLUSTER", "--max_failures", "2", SCRIPT, "--model_name_or_path", "t5-small", "--do_train"],
            "--output_dir is missing",
        ),
        ("generate", ["--num_workers", "2", "gone.py"], "gone.py: there is no such script"),
        (
            "generate",
            ["--address", "CLUSTER", "--num_workers", "2", "--cpus_per_worker", "1", "GENERATION"],
            "no row would ever move",
        ),
        ("generate", ["GENERATION", "--group_by", "product_id"], "--group_by: only with run_generation.py itself"),
    ],
)
def test_what_the_user_can_mend_is_one_message_and_exit_code_2(
    work, tmp_path, cluster, launchers, capfd, which, arguments, message
):
    import ray

    words = {"CLUSTER": [cluster], "GENERATION": [str(ROOT / "run_generation.py")]}
    argv = [part for word in arguments for part in words.get(word, [str(word)])]
    if "GENERATION" in arguments:
        argv += ["--model_name_or_path", str(work / "tiny-t5"), "--input_file", str(work / "many.csv")]
        argv += ["--output_file", str(tmp_path / "never.csv")]
    try:
        assert launchers[which].main(argv) == 2
    finally:
        ray.shutdown()
    printed = capfd.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_without_ray_the_launcher_says_what_to_install(tmp_path):
    hide = "import sys, runpy; sys.modules['ray'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    done = run([sys.executable, "-c", hide, TRAIN], cwd=tmp_path, check=False)
    assert done.returncode == 2 and done.stdout.startswith("error: ray is not installed here: pip install")
