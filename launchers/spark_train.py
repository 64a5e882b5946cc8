#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["pyspark[ml]>=4.0", "torch>=2.8"]
# ///
"""
Run a training script, unchanged, as the processes of a Spark job: here, or on the workers of a cluster.

Two processes beside a Spark on this machine:
    python launchers/spark_train.py --master 'local[2]' --num_processes 2 run_summarization.py \
        --model_name_or_path t5-small --do_train --train_file data/train.csv --output_dir out/t5-small

Eight GPUs of a standalone cluster, ZeRO-2; one task and one executor a GPU:
    python launchers/spark_train.py --master spark://head:7077 --num_processes 8 --use_gpu run_summarization.py \
        --deepspeed ds_configs/zero2.json --model_name_or_path t5-large --do_train --train_file data/train.csv ...

All processes on the driver's machine, which has the GPUs; the cluster is only asked for the session:
    python launchers/spark_train.py --master spark://head:7077 --num_processes 4 --use_gpu --local_mode \
        run_summarization.py ...

The launcher's flags come before the script, the script's own after it. Relative paths among these are made absolute,
and every worker must see them there (NFS, or the same folders on every machine): that is looked at before training.

It runs over TorchDistributor and not DeepspeedTorchDistributor, though `--deepspeed FILE` goes with it. The latter
appends a bare `--deepspeed --deepspeed_config FILE` to every script, which transformers' own parser refuses, and when
its Spark task is killed its torchrun stays, with all training processes. TorchDistributor's own way to start torchrun
ends with 0 whatever the script ended with: Spark then calls a failed run a success, and the other tasks hang (all seen
on pyspark 4.3.0). So torchrun is started here, by run_torchrun, in its place.
"""

import argparse
import atexit
import contextlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

# ------------------------------------------------------------------------------------------------ constants

OLDEST_JAVA = 17  # Spark 4

# What an executor does not inherit from the driver's shell and a training script reads. No secrets (HF_TOKEN,
# WANDB_API_KEY): Spark keeps its settings in logs and pages; log in on the workers' home instead.
SECRET = re.compile("TOKEN$|KEY|SECRET|PASSWORD")
SECRET_ADDRESS = re.compile("//[^/]*@")  # https://user:password@host
PASSED_ON = ("HF_", "TRANSFORMERS_", "TOKENIZERS_", "MLFLOW_", "WANDB_", "OMP_", "NCCL_", "GLOO_", "TORCH_", "DS_")

# Flags of the scripts that name a file or folder. Those of the second kind may name something on the hub instead.
PATH_FLAG = re.compile(r"--[a-z_]*(?:_file|_dir|deepspeed|deepspeed_config)")
PATH_OR_NAME_FLAG = re.compile(r"--(?:[a-z_]*_name_or_path|[a-z_]+_name|resume_from_checkpoint)")
# Folders that are made where they are missing.
MADE_FLAG = re.compile(r"--(?:output_dir|logging_dir|cache_dir)")

# What Spark asks of a "discovery script": {"name": "gpu", "addresses": ["0", "1"]}.
LIST_GPUS = """#!/bin/sh
found=$(nvidia-smi --query-gpu=index --format=csv,noheader | sed 's/.*/"&"/' | paste -s -d ,)
echo "{\\"name\\": \\"gpu\\", \\"addresses\\": [$found]}"
"""

# torchrun, ended with its Spark task: the kernel sends it SIGTERM (15) when its parent is gone (PR_SET_PDEATHSIG: 1).
TORCHRUN = """import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)
os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", *sys.argv[1:]])
"""


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


def parse_launch_arguments(argv: list[str]) -> argparse.Namespace:
    """The launcher's flags, the script, and what is the script's."""
    parser = argparse.ArgumentParser(
        description=__doc__.strip().split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--master", default="local[*]", help="local[N], spark://host:port, or what else Spark takes as a master.")
    add("--num_processes", type=int, required=True, help="Training processes: one a GPU, or one a task slot.")
    add("--local_mode", action="store_true", help="Start all processes on the driver's machine, none on the workers.")
    add("--use_gpu", action="store_true", help="Give each process a GPU. Without it they see none.")
    add("--timeout", type=int, default=180, help="Longest wait in seconds for Java, the master, workers and slots.")
    add("--conf", action="append", default=[], metavar="KEY=VALUE", help="A setting of Spark; may be repeated.")
    add("script", help="The training script, such as run_summarization.py.")
    add("script_args", nargs=argparse.REMAINDER, help="The script's own arguments, as under `python`.")
    return parser.parse_args(argv)


def find_launch_problems(args: argparse.Namespace) -> list[str]:
    """Everything wrong that can be seen before Java is started, as one message each."""
    problems = []
    if args.num_processes < 1:
        problems.append(f"--num_processes {args.num_processes}: must be 1 or more")
    if args.timeout < 1:
        problems.append(f"--timeout {args.timeout}: must be 1 second or more")
    if not Path(args.script).is_file():
        problems.append(f"{args.script}: there is no such script; name it after the launcher's flags, before its own")
    problems += [f"--conf {pair}: must be KEY=VALUE" for pair in args.conf if "=" not in pair]
    if importlib.util.find_spec("pyspark") is None:
        problems.append("pyspark is not installed: `pip install -r requirements-launchers.txt`")
    slots = count_local_slots(args.master)
    if slots is not None and not args.local_mode and slots < args.num_processes:
        problems.append(
            f"--num_processes {args.num_processes}: --master {args.master} has {slots} task slot{'s'[: slots > 1]}; "
            f"give --master 'local[{args.num_processes}]', or --local_mode"
        )
    if args.use_gpu and (slots is not None or args.local_mode) and "discoveryScript" not in " ".join(args.conf):
        problems += find_gpu_problems(args.num_processes)
    return problems + find_java_problems(args.timeout)


def count_local_slots(master: str) -> int | None:
    """Task slots of a local master, such as 2 of local[2]; None if the master is none."""
    match = re.fullmatch(r"local(?:\[(\d+|\*)(?:,\s*\d+)?\])?", master)
    if match is None:
        return None
    return os.cpu_count() or 1 if match[1] == "*" else int(match[1] or 1)


def find_gpu_problems(wanted: int) -> list[str]:
    """What keeps this machine from giving a GPU to each process."""
    if shutil.which("nvidia-smi") is None:
        return ["--use_gpu: there is no nvidia-smi on the PATH, so no GPU; leave the flag out to train on the CPU"]
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    found = listed.count("GPU ")
    return [] if found >= wanted else [f"--num_processes {wanted} with --use_gpu: this machine has {found} GPUs"]


def find_java_problems(timeout: int) -> list[str]:
    """Whether the java that Spark would start is there and new enough."""
    home = os.environ.get("JAVA_HOME")
    java = shutil.which(os.path.join(home, "bin", "java") if home else "java")
    way_out = f"install Java {OLDEST_JAVA} or later (openjdk-{OLDEST_JAVA}-jre-headless), or set JAVA_HOME"
    if java is None:
        where = f"JAVA_HOME={home} has no bin/java" if home else "no java on the PATH, and JAVA_HOME is not set"
        return [f"Spark needs Java: {where}; {way_out}"]
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=timeout).stderr
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"Spark needs Java: {java} does not answer ({error}); {way_out}"]
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version is None or int(version[1]) < OLDEST_JAVA:
        return [f"Spark needs Java {OLDEST_JAVA}: {java} is {said.splitlines()[0] if said else 'silent'}; {way_out}"]
    return []


def find_master_problems(master: str, timeout: int) -> list[str]:
    """Whether anyone listens at spark://host:port[,host:port]; Spark itself would try for a minute and then crash."""
    if not master.startswith("spark://"):
        return []
    reasons = []
    for place in master.removeprefix("spark://").split(","):
        host, _, port = place.rpartition(":")
        try:
            socket.create_connection((host, int(port)), min(timeout, 10)).close()
            return []
        except (OSError, ValueError, OverflowError) as error:
            reasons.append(str(error))
    return [f"--master {master}: cannot be reached ({'; '.join(reasons)}); is it running, and is the port right?"]


# ------------------------------------------------------------------------------------------------ its arguments


def make_absolute(words: list[str]) -> list[str]:
    """The script's arguments with every relative path made absolute: workers start in folders of their own."""
    result, flag = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            result.append(f"{name}={make_path_absolute(name, value)}")
        else:
            result.append(word if word.startswith("--") else make_path_absolute(flag, word))
        flag = "" if equals and word.startswith("--") else word if word.startswith("--") else flag
    return result


def make_path_absolute(flag: str, value: str) -> str:
    """The value of a flag, absolute if it is a path; the first argument may be a .json file of arguments."""
    is_path = PATH_FLAG.fullmatch(flag) or not flag and value.endswith(".json")
    if is_path or PATH_OR_NAME_FLAG.fullmatch(flag) and os.path.exists(value):
        return os.path.abspath(os.path.expanduser(value))
    return value


def list_needed_paths(script: str, words: list[str]) -> list[str]:
    """The script with what it imports from beside it and what its arguments name: every worker must see it too."""
    needed, flag = [script], ""
    for path in needed:  # and what that imports: it grows
        source = Path(path).read_text(encoding="utf-8") if os.path.isfile(path) else ""
        names = re.findall(r"^\s*import (\w+)$", source, re.MULTILINE)
        beside = (os.path.join(os.path.dirname(script), f"{name}.py") for name in names)
        needed += [path for path in beside if os.path.exists(path) and path not in needed]
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
        else:
            value = word
        if os.path.isabs(value) and os.path.exists(value) and not MADE_FLAG.fullmatch(flag):
            needed.append(value)
    return needed


# ------------------------------------------------------------------------------------------------ spark


@contextlib.contextmanager
def time_limit(seconds: int, message: str):
    """
    End the program with exit code 2 and the message if what is inside takes longer.

    Not by an exception: py4j catches those and goes on waiting. Java ends when this process has.
    """

    def give_up(signum, frame):
        print(f"\nerror: {message} (--timeout {seconds})", file=sys.stderr, flush=True)
        os._exit(2)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def make_spark_settings(args: argparse.Namespace) -> dict[str, str]:
    """Spark's settings for a training job; those of --conf come last and count."""
    settings = {
        "spark.master": args.master,
        "spark.app.name": Path(args.script).stem,
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
        # A script that failed fails again: without these two it is started four times.
        "spark.task.maxFailures": "1",
        "spark.stage.maxConsecutiveAttempts": "1",
        "spark.barrier.sync.timeout": str(args.timeout),
        "spark.cores.max": "1" if args.local_mode else str(args.num_processes),
    }
    passed_on = [name for name in os.environ if name.startswith(PASSED_ON) and not SECRET.search(name)]
    for name in [name for name in passed_on if SECRET_ADDRESS.search(os.environ[name])]:
        print(f"{name} holds a password, so executors are not given it; set it on the workers", flush=True)
        passed_on.remove(name)
    settings |= {f"spark.executorEnv.{name}": os.environ[name] for name in passed_on}
    if args.use_gpu and args.local_mode:
        finder = Path(tempfile.mkdtemp()) / "list_gpus.sh"
        atexit.register(shutil.rmtree, finder.parent)
        finder.write_text(LIST_GPUS)
        finder.chmod(0o700)
        settings["spark.driver.resource.gpu.amount"] = str(args.num_processes)
        settings["spark.driver.resource.gpu.discoveryScript"] = str(finder)
    elif args.use_gpu:
        # An executor a process; the workers say by spark.worker.resource.gpu.* what they have.
        settings |= {"spark.executor.cores": "1", "spark.executor.resource.gpu.amount": "1"}
        settings["spark.task.resource.gpu.amount"] = "1"
    return settings | dict(pair.split("=", 1) for pair in args.conf)


def hide_tokens(words: list[str]) -> str:
    """A command line to be shown, without the values of --token and --hub_token."""
    hidden = [re.sub("^(--(?:hub_)?token)=.*", r"\1=***", word, flags=re.DOTALL) for word in words]
    pairs = zip(["", *words], hidden, strict=False)
    return shlex.join("***" if before in ("--token", "--hub_token") else word for before, word in pairs)


def start_spark(settings: dict[str, str]):
    """A Spark session whose workers start this very Python."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    os.environ.setdefault("PYSPARK_DRIVER_PYTHON", sys.executable)
    if settings["spark.master"].startswith("local"):
        os.environ.setdefault("SPARK_LOCAL_IP", "127.0.0.1")  # nothing here needs to be seen from outside
    warnings.filterwarnings("ignore", "PySpark does not yet fully support pandas")
    builder = SparkSession.builder
    for name, value in settings.items():
        builder = builder.config(name, value)
    try:
        return builder.getOrCreate()
    except Exception as error:  # py4j, Spark and Java each raise their own
        raise UsageError(f"--master {settings['spark.master']}: Spark did not start: {first_lines(error)}") from None


def first_lines(error: Exception) -> str:
    """What an error of Spark's says, without Java's stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("at ", "...", "File ", "Traceback", "Driver stacktrace"))]
    return " ".join(kept[:4])[:600]


def wait_for_slots(spark, wanted: int, timeout: int) -> None:
    """Wait until that many tasks can run at once. Spark itself would look every 15 seconds, 40 times."""
    context = spark.sparkContext._jsc.sc()
    profile = context.resourceProfileManager().defaultResourceProfile()
    end = time.monotonic() + timeout
    while (slots := context.maxNumConcurrentTasks(profile)) < wanted:
        if time.monotonic() > end:
            raise UsageError(
                f"--num_processes {wanted}: after {timeout} s (--timeout) the workers of {spark.sparkContext.master} "
                f"give {slots} task slots; start more workers, free some cores, or ask for fewer processes"
            )
        time.sleep(0.2)


def check_workers(spark, num_processes: int, paths: list[str]) -> None:
    """Raise UsageError if a worker does not see one of the paths or lacks torch; asked on every slot at once."""

    def look(_):
        missing = [path for path in paths if not os.path.exists(path)]
        yield socket.gethostname(), missing, importlib.util.find_spec("torch") is not None

    try:
        tasks = spark.sparkContext.parallelize(range(num_processes), num_processes)
        answers = tasks.barrier().mapPartitions(look).collect()
    except Exception as error:
        raise UsageError(
            f"the workers cannot run Python ({os.environ['PYSPARK_PYTHON']}; PYSPARK_PYTHON names another): "
            f"{first_lines(error)}"
        ) from None
    problems = []
    for host, missing, has_torch in sorted(set((host, tuple(missing), torch) for host, missing, torch in answers)):
        problems += [
            f"{path}: is here, but the worker {host} does not see it; put it where all do" for path in missing
        ]
        if not has_torch:
            problems.append(f"the worker {host} has no torch for {os.environ['PYSPARK_PYTHON']}; install it there")
    if problems:
        raise UsageError("\n".join(problems))


# ------------------------------------------------------------------------------------------------ training


def run_torchrun(input_params: dict, script: str, *words: str) -> None:
    """What every Spark task does; in place of TorchDistributor._run_training_on_pytorch_file, which hides failures."""
    from pyspark.ml.torch.distributor import TorchDistributor

    command = TorchDistributor._create_torchrun_command(input_params, script, *words)
    assert command[1:3] == ["-m", "pyspark.ml.torch.torch_run_process_wrapper"]
    command[1:3] = ["-c", TORCHRUN]
    TorchDistributor._execute_command(command, log_streaming_client=input_params.get("log_streaming_client"))


def train(args: argparse.Namespace, words: list[str]) -> int:
    """Run the script in its processes and return the exit code of the first that failed, or 0."""
    from pyspark.ml.torch.distributor import TorchDistributor

    distributor = TorchDistributor(args.num_processes, local_mode=args.local_mode, use_gpu=args.use_gpu)
    try:
        # What the tasks print comes to this process's stderr; of a script one expects it on stdout.
        with contextlib.redirect_stderr(sys.stdout):
            distributor._run(args.script, run_torchrun, *words)
    except Exception as error:  # RuntimeError of the process, or what Spark makes of it
        code = find_exit_code(str(error))
        name = Path(args.script).name
        print(f"\nerror: {name} failed with exit code {code}; its last words:", file=sys.stderr)
        print(find_last_words(str(error)), file=sys.stderr, flush=True)
        return code
    return 0


def find_exit_code(report: str) -> int:
    """The exit code of the first process that failed, from torchrun's report; 128 + n for signal n, 1 if unknown."""
    code = re.search(r"Root Cause.*?exitcode\s*:\s*(-?\d+)", report, re.S) or re.search(r"exitcode: (-?\d+)", report)
    value = int(code[1]) if code else 1
    return 128 - value if value < 0 else value or 1


def find_last_words(report: str, count: int = 12) -> str:
    """The script's own last lines: what stands before torchrun's report of the failure."""
    said = report.partition("included below:")[2] or report
    said = re.split(r"\n[EW]\d{4} \d\d:\d\d|\nTraceback \(most recent call last\):\s+File \"<frozen runpy>", said)[0]
    lines = [line.rstrip() for line in said.strip().splitlines() if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-count:])


# ------------------------------------------------------------------------------------------------ main


def main(argv: list[str] | None = None) -> int:
    """Launch as the arguments say; returns the script's exit code."""
    args = parse_launch_arguments(sys.argv[1:] if argv is None else argv)
    problems = find_launch_problems(args) or find_master_problems(args.master, args.timeout)
    if problems:
        raise UsageError("\n".join(problems))
    # Tasks of a local Spark know of no GPUs, and what they print comes twice; its processes are started directly.
    args.local_mode = args.local_mode or count_local_slots(args.master) is not None
    args.script = os.path.abspath(args.script)
    words = make_absolute(args.script_args)
    if not args.use_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    with time_limit(args.timeout, f"--master {args.master}: Spark did not start"):
        spark = start_spark(make_spark_settings(args))
    if not args.local_mode:
        wait_for_slots(spark, args.num_processes, args.timeout)
        with time_limit(args.timeout, f"--master {args.master}: the workers did not answer"):
            check_workers(spark, args.num_processes, list_needed_paths(args.script, words))
    where = "this machine" if args.local_mode else args.master
    print(f"{args.num_processes} processes on {where}: {hide_tokens([args.script, *words])}", flush=True)
    return train(args, words)


def run_and_exit() -> None:
    """Run main() and leave with the script's exit code, or with 2 after a message the user can act on."""
    # An exception in the middle of an answer of Java's would break py4j: leave at once. Java ends when this process
    # has, and with Java the tasks.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    try:
        code = main()
    except UsageError as error:
        print("".join(f"\nerror: {line}" for line in str(error).split("\n")), file=sys.stderr, flush=True)
        code = 2
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no waiting for py4j's threads


if __name__ == "__main__":
    run_and_exit()
