#!/usr/bin/env python
# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["ray[train]==2.60.0", "torch>=2.8", "transformers>=5.23"]
# ///
"""
Run a training script, with its own arguments, on the workers of a Ray cluster (Ray Train's TorchTrainer).

Two processes on this machine, a Ray of their own that ends with them:
    python launchers/ray_train.py --num_workers 2 run_summarization.py --model_name_or_path tiny-t5 --do_train ...

Eight GPUs of a running cluster; a worker that dies is replaced, up to twice:
    python launchers/ray_train.py --address auto --num_workers 8 --use_gpu --max_failures 2 \
        --storage_path /shared/ray run_summarization.py --deepspeed ds_configs/zero3.json --output_dir /shared/out ...

The workers run main(argv) of the script in the folder this was started in, so on several machines that folder, the
data and --output_dir lie on a file system that all of them see. After a death every rank starts again, and the
script itself goes on from the newest complete checkpoint in --output_dir. Ray's result gets the metrics and a copy of
each checkpoint as it is saved, and in the end the exported model; only the newest copy is kept (--num_to_keep).
"""

import argparse
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import threading
from pathlib import Path

# Ray reads these when it is imported. A worker's lines come as they were printed, and nothing is sent home.
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # Ray Train's workers are started fresh anyway

try:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
except ModuleNotFoundError as missing:
    if (missing.name or "").partition(".")[0] != "ray":
        raise
    print("error: ray is not installed here: pip install -r requirements-launchers.txt", file=sys.stderr)
    sys.exit(2)

# What goes along to a cluster's workers, which do not inherit it: variables that the script's libraries read. No
# secrets (HF_TOKEN, WANDB_API_KEY): Ray shows them to everybody on the cluster; log in on the workers' home instead.
SECRET = r"TOKEN$|KEY|SECRET|PASSWORD"
PASSED_ON = r"(HF|TRANSFORMERS|DATASETS|TOKENIZERS|NCCL|GLOO|DS|MLFLOW|TENSORBOARD|WANDB|OMP)_\w+|CUDA_HOME"


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


def parse_launcher_arguments(argv: list[str]) -> argparse.Namespace:
    """The launcher's flags, then the script, then everything that is the script's."""
    parser = argparse.ArgumentParser(description="Run a training script on the workers of a Ray cluster.")
    parser.add_argument("--num_workers", type=int, default=1, help="Processes (ranks).")
    parser.add_argument("--use_gpu", action="store_true", help="One GPU for each worker. Default: CPU only.")
    parser.add_argument("--cpus_per_worker", type=float, default=1, help="CPUs that Ray reserves for each worker.")
    parser.add_argument("--address", default="local", help="host:port, auto, or local (default): a Ray of its own.")
    parser.add_argument("--storage_path", help="Where Ray keeps its result; a folder or URI. Default: OUTPUT_DIR.ray")
    parser.add_argument("--max_failures", type=int, default=0, help="How often dead workers are replaced.")
    parser.add_argument("--num_to_keep", type=int, default=1, help="Checkpoints kept in Ray's result.")
    parser.add_argument("--start_timeout", type=int, default=120, help="Seconds to wait for Ray and for free slots.")
    parser.add_argument("--collective_timeout", type=int, default=1800, help="Seconds a rank may wait for another.")
    parser.add_argument("script", help="The script to run: a file with main(argv).")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="The script's own arguments.")
    args = parser.parse_args(argv)
    problems = [
        f"--{flag} {getattr(args, flag)}: must be {least} or more"
        for flag, least in (("num_workers", 1), ("max_failures", 0), ("num_to_keep", 1), ("start_timeout", 1))
        if getattr(args, flag) < least
    ]
    if not Path(args.script).is_file():
        problems.append(f"{args.script}: there is no such script; give the path of e.g. run_summarization.py")
    if problems:
        raise UsageError("\n".join(problems))
    return args


def find_output_dir(arguments: list[str]) -> str | None:
    """The script's --output_dir as an absolute path, None where it has none."""
    for i, word in enumerate(arguments):
        if word.startswith("--output_dir="):
            return str(Path(word.partition("=")[2]).resolve())
        if word == "--output_dir" and i + 1 < len(arguments):
            return str(Path(arguments[i + 1]).resolve())
    return None


def find_storage(args: argparse.Namespace) -> str | None:
    """--storage_path, else a folder beside the script's --output_dir, else None: Ray's own choice."""
    if args.storage_path is not None:
        return args.storage_path if "://" in args.storage_path else str(Path(args.storage_path).resolve())
    output_dir = find_output_dir(args.arguments)
    return None if output_dir is None else f"{output_dir}.ray"


# ------------------------------------------------------------------------------------------------ cluster


def connect(address: str, seconds: int) -> None:
    """Join or start Ray within so many seconds. Raises UsageError."""
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(seconds, 10)).close()
        except OSError as error:
            raise UsageError(
                f"--address {address}: nobody answers there ({error}); is `ray start --head` running, and the port "
                "open? Leave the flag out for a Ray on this machine only"
            ) from None

    def give_up():  # a port that answers but is no Ray would be waited for
        print(f"\nerror: --address {address}: Ray did not answer in {seconds} s (--start_timeout)", file=sys.stderr)
        sys.stderr.flush()
        os._exit(2)

    watch = threading.Timer(seconds, give_up)
    watch.daemon = True
    watch.start()
    variables = {k: v for k, v in os.environ.items() if re.fullmatch(PASSED_ON, k) and not re.search(SECRET, k)}
    for name in [name for name, value in variables.items() if re.search("//[^/]*@", value)]:  # user:password@host
        print(f"{name} holds a password, so workers are not given it; set it on their machines", flush=True)
        del variables[name]
    options = {} if address == "local" else {"runtime_env": {"env_vars": variables}}
    try:
        ray.init(address=address, logging_level="warning", **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "a cluster that asks for a token wants RAY_AUTH_MODE=token and the head's ~/.ray/auth_token here"
        raise UsageError(f"--address {address}: Ray cannot be joined: {error}\n{hint}") from None
    finally:
        watch.cancel()


def check_slots(args: argparse.Namespace) -> None:
    """Raise UsageError where the cluster as a whole is too small: Ray itself would wait for ever."""
    there = ray.cluster_resources()
    wanted = {"CPU": args.num_workers * args.cpus_per_worker}
    if args.use_gpu:
        wanted["GPU"] = args.num_workers
    for name, count in wanted.items():
        if count > there.get(name, 0):
            flag = f"--num_workers {args.num_workers}" + (" --use_gpu" if name == "GPU" else "")
            way_out = "leave --use_gpu out, or join GPU machines" if name == "GPU" else "use fewer, or join machines"
            raise UsageError(
                f"{flag}: needs {count:g} {name}s, the Ray cluster has {there.get(name, 0):g}; {way_out} by "
                "`ray start --address`"
            )


# ------------------------------------------------------------------------------------------------ on a worker


def train_loop(config: dict) -> dict:
    """What each worker runs: the script's main(argv), with checkpoints and results reported to Ray."""
    for path in (config["folder"], config["script"]):
        if not os.path.exists(path):
            raise UsageError(f"{path}: the worker on {socket.gethostname()} does not see it; use a shared file system")
    for name in list(logging.root.manager.loggerDict):  # they would repeat the metrics on every rank
        if name == "ray.train" or name.endswith("execution/context.py"):  # named by its file in 2.60
            logging.getLogger(name).setLevel(logging.WARNING)
    os.chdir(config["folder"])  # Ray moves its workers into the result's folder
    sys.argv = [config["script"], *config["arguments"]]
    argparse.ArgumentParser.error = raise_usage_error  # else the reason is lost with the worker's exit
    script = import_script(config["script"])
    report_checkpoints()
    try:
        results = script.main(config["arguments"])
    except SystemExit as stop:  # --help
        return {"exit_code": stop.code}
    except Exception as error:
        is_usage = type(error).__name__ == "UsageError"  # of the script, whose classes Ray's controller cannot import
        is_collateral = re.search(r"gloo|NCCL|Connection (reset|closed)", str(error))
        if not is_usage and not is_collateral:
            raise
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)  # a traceback here would bury the reason
        raise UsageError(str(error)) if is_usage else RuntimeError(f"lost another rank: {error}") from None
    report_export(results or {}, config["output_dir"])
    return results


def raise_usage_error(parser: argparse.ArgumentParser, message: str) -> None:
    raise UsageError(message)


def import_script(path: str):
    """The script as a module; its folder is searched first, as `python script.py` would."""
    sys.path.insert(0, str(Path(path).parent))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report_checkpoints() -> None:
    """
    Have every transformers.Trainer made after this report to Ray when it saves: metrics, and the checkpoint by rank 0.

    Ray's RayTrainReportCallback does the same, but copies the checkpoint once more, and on every rank.
    """
    import transformers

    class ReportToRay(transformers.TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            metrics = {k: v for entry in state.log_history for k, v in entry.items()}
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            report({**metrics, "step": state.global_step}, folder if folder.is_dir() else None)

    transformers.trainer.DEFAULT_CALLBACKS.append(ReportToRay)


def report(metrics: dict, folder: Path | None) -> None:
    """Give Ray metrics and a folder to copy; every rank must call it, the folder counts on rank 0."""
    is_first = ray.train.get_context().get_world_rank() == 0
    checkpoint = ray.train.Checkpoint.from_directory(folder) if is_first and folder else None
    ray.train.report(metrics, checkpoint=checkpoint)


def report_export(results: dict, output_dir: str | None) -> None:
    """Give Ray the final metrics and the exported model: the files of the output folder without its checkpoints."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for path in Path(output_dir).iterdir() if output_dir else []:
            if not re.fullmatch(r"checkpoint-\d+", path.name):
                Path(folder, path.name).symlink_to(path.resolve())
        report(results, Path(folder) if any(Path(folder).iterdir()) else None)


# ------------------------------------------------------------------------------------------------ failures


class Failures(ray.train.UserCallback):
    """On Ray's controller: says what a death means, and ends the run at once where a retry would meet it again."""

    def __init__(self, max_failures: int):
        self.left = max_failures

    def after_exception(self, run_context, worker_exceptions):
        logging.getLogger("ray.train").setLevel(logging.ERROR)  # it would tell the same three times over
        for error in worker_exceptions.values():
            if type(error).__name__ == "UsageError":
                logging.getLogger("ray.train").setLevel(logging.CRITICAL)
                raise UsageError(str(error))  # Ray does not retry after an error of a callback
        if self.left:
            self.left -= 1
            what = f"Ray replaces it ({self.left} of --max_failures left); all go on from the newest whole checkpoint"
        else:
            what = "--max_failures is used up, so the run ends"
        print(f"{describe_ranks(worker_exceptions)}\n{what}", flush=True)


def describe_ranks(failures: dict[int, Exception]) -> str:
    """A line for each rank that died or raised; ranks that only lost another are left out if there is another."""
    causes = {rank: e for rank, e in failures.items() if not str(e).startswith("lost another rank")} or failures
    lines = []
    for rank, error in sorted(causes.items()):
        if hasattr(error, "health_check_failure"):
            lines.append(f"the worker of rank {rank} died: killed, or out of memory")
        else:
            lines.append(f"rank {rank} raised {type(error).__name__}: {' '.join(str(error).split())[:400]}")
    return "\n".join(lines)


def describe_failure(error: Exception) -> str:
    """The reason, a line each: the script's own message, or which rank died of what, and the way on."""
    cause = getattr(error, "controller_failure", None)
    if type(cause).__name__ == "UsageError":
        return str(cause)
    if cause is not None:
        return f"Ray could not run the workers: {cause}"
    again = "the same command goes on from the newest whole checkpoint; --max_failures N does so by itself"
    return f"{describe_ranks(getattr(error, 'worker_failures', {}))}\n{again}"


# ------------------------------------------------------------------------------------------------ main


def drop_unknown_copies(result) -> None:
    """Remove copies of checkpoints whose worker died before Ray knew of them: Ray leaves them there (2.60)."""
    from pyarrow.fs import FileSelector, FileType

    known = {Path(checkpoint.path).name for checkpoint, _ in result.best_checkpoints or []}
    for entry in result.filesystem.get_file_info(FileSelector(result.path)) if known else []:
        if (
            entry.type == FileType.Directory
            and entry.base_name.startswith("checkpoint_")
            and entry.base_name not in known
        ):
            result.filesystem.delete_dir(entry.path)


class OwnRayTrainer(TorchTrainer):
    """Without the actor that tidies up a shared cluster: where Ray has no dashboard it warns each second (2.60)."""

    def _create_default_callbacks(self):
        return [c for c in super()._create_default_callbacks() if type(c).__name__ != "PlacementGroupCleanerCallback"]


def fit(args: argparse.Namespace):
    """Run the script on the workers; returns Ray's result. Raises UsageError."""
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(args.start_timeout)
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(args.collective_timeout)
    if args.address == "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
    storage = find_storage(args)
    trainer = (OwnRayTrainer if args.address == "local" else TorchTrainer)(
        train_loop,
        train_loop_config={
            "script": str(Path(args.script).resolve()),
            "arguments": args.arguments,
            "folder": os.getcwd(),
            "output_dir": find_output_dir(args.arguments),
        },
        torch_config=TorchConfig(backend="nccl" if args.use_gpu else "gloo", timeout_s=args.collective_timeout),
        scaling_config=ray.train.ScalingConfig(
            num_workers=args.num_workers,
            use_gpu=args.use_gpu,
            resources_per_worker={"CPU": args.cpus_per_worker, **({"GPU": 1} if args.use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=args.num_to_keep),
            failure_config=ray.train.FailureConfig(max_failures=args.max_failures, controller_failure_limit=1),
            callbacks=[Failures(args.max_failures)],
        ),
    )
    return trainer.fit()


def main(argv: list[str] | None = None) -> int:
    """Run the script under Ray and print what Ray's result holds; returns the exit code."""
    try:
        args = parse_launcher_arguments(sys.argv[1:] if argv is None else argv)
        connect(args.address, args.start_timeout)
        check_slots(args)
        result = fit(args)
    except UsageError as error:
        print("".join(f"\nerror: {line}" for line in str(error).split("\n")), file=sys.stderr, flush=True)
        return 2
    except ray.train.TrainingFailedError as error:
        reason = describe_failure(error)
        print("".join(f"\nerror: {line}" for line in reason.split("\n")), file=sys.stderr, flush=True)
        return 2 if type(getattr(error, "controller_failure", None)).__name__ == "UsageError" else 1
    drop_unknown_copies(result)
    metrics = json.dumps(result.metrics, default=str)
    checkpoint = result.checkpoint.path if result.checkpoint else None
    print(f"Ray's result: {result.path}\nmetrics: {metrics}\ncheckpoint: {checkpoint}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
