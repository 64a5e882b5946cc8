# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.17", "datasets", "safetensors"]
# ///
"""
Refuses bad input early and all at once, starts ranks, keeps MLflow's one run, draws the curves.

Optional beside run_summarization.py, run_clm_instruct.py and run_generation.py: they compute the same without it. In
the order in which a run meets them: read_arguments, check_training or check_generation, start_ranks, start_run,
start_tracking, write_reports, run_and_exit.
"""

import argparse
import atexit
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path

import datasets
import jinja2
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments
from transformers.models.auto import modeling_auto as known_models

checkpoints = portable_checkpoints = None
with suppress(ModuleNotFoundError):
    import checkpoints
with suppress(ModuleNotFoundError):
    import portable_checkpoints

NOT_BESIDE = {
    "checkpoints.py": "a killed run goes on only with --resume_from_checkpoint, and what differs is not said",
    "portable_checkpoints.py": "a run goes on only with the ranks and the ZeRO stage of its checkpoint, and loading "
    "one of DeepSpeed's can run code",
}

# Flags of older versions, transformers' and ours, and what says the same today.
REPLACED_FLAGS = {
    "--overwrite_output_dir": "nothing is overwritten: name another --output_dir or remove the old folder",
    "--evaluation_strategy": "use --eval_strategy",
    "--group_by_length": "use --train_sampling_strategy group_by_length",
    "--warmup_ratio": "use --warmup_steps with a value below 1, e.g. --warmup_steps 0.1",
    "--logging_dir": "set the environment variable TENSORBOARD_LOGGING_DIR",
    "--no_cuda": "use --use_cpu",
    "--use_auth_token": "use --token, or log in with `hf auth login`",
    "--per_gpu_train_batch_size": "use --per_device_train_batch_size",
    "--per_gpu_eval_batch_size": "use --per_device_eval_batch_size",
    "--encoder_name_or_path": "join the two by tools/join_models.py and give its folder as --model_name_or_path",
    "--decoder_name_or_path": "join the two by tools/join_models.py and give its folder as --model_name_or_path",
    "--lora_rank": "use --lora_r",
    "--no_packing": "use --packing false",
    "--resize_position_embeddings": "give a --max_source_length within the model's positions",
    "--train_on_prompt": "use --assistant_only_loss false",
    "--measure_latency": "benchmarks/latency.py times rows one by one",
}

# Columns of other kinds of data for chat models: left out, they would change what is learned.
FOREIGN_COLUMNS = ("chosen", "rejected", "label", "history", "image", "images", "audio", "audios", "video", "videos")

# The least that a number may be; None, where a flag has it, says all of them.
LEAST = dict.fromkeys(("max_source_length", "max_target_length", "val_max_target_length", "num_beams"), 1)
LEAST |= dict.fromkeys(("max_train_samples", "max_eval_samples", "max_predict_samples", "max_new_tokens"), 1)
LEAST |= {"preprocessing_num_workers": 1, "max_seq_length": 8}

# T5's activations leave fp16's range: the loss turns NaN (https://github.com/huggingface/transformers/issues/4586).
# Of AutoModelForSeq2SeqLM's types (5.23), those that run_summarization.py refuses.
NOT_TRAINED = {"fsmt": "a batch's padding changes their losses (5.23)"}
NOT_TRAINED["nllb-moe"] = "its experts drop what is too much for them of a batch, so that losses depend on the batch"
NOT_TRAINED |= dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), "they generate by a language that is no flag here")
HEAR = "audioflamingo3 glmasr granite_speech granite_speech_plus moss_transcribe_diarize musicflamingo nemo_speechlm "
HEAR += "qwen2_audio qwen3_asr vibevoice_asr voxtral voxtral_realtime"
NOT_TRAINED |= dict.fromkeys(HEAR.split(), "they read sound, not text alone")
FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop")

ENCODER = "is an encoder, which writes no text; give another, or make an encoder-decoder of it (tools/join_models.py)"

# What must agree between the DeepSpeed file and the flags: the file's keys, the flag, the trainer's field.
DEEPSPEED_TWINS = (
    (("train_micro_batch_size_per_gpu",), "per_device_train_batch_size"),
    (("gradient_accumulation_steps",), "gradient_accumulation_steps"),
    (("gradient_clipping",), "max_grad_norm"),
    (("bf16", "enabled"), "bf16"),
    (("fp16", "enabled"), "fp16"),
)

# What --report_to needs, the first name being what to install.
TRACKERS = {"mlflow": ("mlflow",), "tensorboard": ("tensorboardX", "tensorboard")}


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


def read_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """
    The flags of a command line for `parser`, whose defaults are the values of a .json file given first.

    DeepSpeed's own spelling of its flag is understood. Raises UsageError at flags of older versions, with what says
    the same today, and at keys of the file that are no flags.
    """
    argv = join_deepspeed_flags(argv)
    replaced = [f"{a} is gone: {REPLACED_FLAGS[f]}" for a in argv if (f := a.split("=")[0]) in REPLACED_FLAGS]
    if replaced:
        raise UsageError("\n".join(replaced))
    if argv and argv[0].endswith(".json"):
        take_defaults_from_json(parser, argv[0])
        return argv[1:]
    return argv


def join_deepspeed_flags(argv: list[str]) -> list[str]:
    """`--deepspeed --deepspeed_config PATH`, DeepSpeed's own spelling (and Spark's distributor's), as one flag."""
    bare = [
        i for i, flag in enumerate(argv) if flag == "--deepspeed" and "".join(argv[i + 1 : i + 2])[:2] in ("", "--")
    ]
    if "--deepspeed_config" in argv:
        argv = [flag for i, flag in enumerate(argv) if i not in bare]
    return ["--deepspeed" if flag == "--deepspeed_config" else flag for flag in argv]


def take_defaults_from_json(parser: argparse.ArgumentParser, path: str) -> None:
    """Make the values of a .json argument file the parser's defaults, so that flags after it still count."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a JSON file of arguments: {error}") from None
    unknown = sorted(set(values) - {action.dest for action in parser._actions})
    if unknown:
        raise UsageError(f"{path}: no such argument: {', '.join(unknown)}. `--help` lists all.")
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    parser.set_defaults(**values)


# ------------------------------------------------------------------------------------------------ checks


def check_training(args: argparse.Namespace, problems=()) -> None:
    """
    Raise everything wrong with a training script's arguments as one UsageError; nothing is downloaded or loaded.

    problems: what the script found itself. The trainer's arguments are not built before this: that would start the
    process group.
    """
    problems, audit_only = list(problems), getattr(args, "audit_only", False)
    if not (args.do_train or args.do_eval or args.do_predict or audit_only):
        problems.append("nothing to do: give --do_train, --do_eval or --do_predict")
    if args.output_dir is None and not audit_only:
        problems.append("--output_dir is missing: where the model and the results go")
    splits = {"do_train": "train", "do_eval": "validation", "do_predict": "test", "audit_only": "train"}
    if (args.do_train or audit_only) and hasattr(args, "validation_split_percentage"):
        splits.pop("do_eval")  # there a share of the training data can be kept for it
    for task, split in splits.items():
        if getattr(args, task, False) and args.dataset_name is None and getattr(args, f"{split}_file") is None:
            problems.append(f"--{task} needs --{split}_file or --dataset_name")
    for flag, least in LEAST.items():
        value = getattr(args, flag, None)
        if value is not None and value < least:
            problems.append(f"--{flag} {value}: must be {least} or more")
    if getattr(args, "hub_token", None) is not None:
        problems.append("--hub_token: would lie readable in training_args.bin; log in with `hf auth login` instead")
    if args.generation_config is not None:  # the trainer puts it in the place of all that flags and template said
        problems.append(
            f"--generation_config {args.generation_config}: would overrule the flags' lengths and beams and the stop "
            "tokens; copy it as generation_config.json into the model's folder, where flags rule"
        )
    problems += find_model_problems(args)
    problems += find_deepspeed_problems(args)
    problems += find_tracking_problems(args)
    if args.output_dir is not None and not audit_only and checkpoints:
        problems += checkpoints.find_problems(args)
    if problems:
        raise UsageError("\n".join(problems))


def read_model_config(flag: str, name: str) -> dict | None:
    """config.json of a model folder, None for a name on the hub. Raises UsageError."""
    folder = Path(name)
    if not (folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        return None
    if not (folder / "config.json").is_file():
        what = "the folder has no config.json" if folder.is_dir() else "there is no such folder"
        raise UsageError(f"{flag} {name}: {what}; give a model folder or a name on the hub")
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{flag} {name}: config.json is not JSON: {error}") from None


def find_model_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the model folder, the script for its kind, a length beyond its positions, --fp16 with T5."""
    if args.model_name_or_path is None:
        return ["--model_name_or_path is missing: a model folder or a name on the hub"]
    named = f"--model_name_or_path {args.model_name_or_path}"
    try:
        config = read_model_config("--model_name_or_path", args.model_name_or_path)
    except UsageError as error:
        return [str(error)]
    problems, is_causal = [], hasattr(args, "max_seq_length")
    model_type = (config or {}).get("model_type", "")
    is_seq2seq = model_type in known_models.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if is_encoder(config):
        problems.append(f"{named}: {ENCODER}")
    elif model_type and is_causal == is_seq2seq:
        what = "an encoder-decoder; run_summarization.py" if is_seq2seq else "no encoder-decoder; run_clm_instruct.py"
        problems.append(f"{named}: is {what} trains those")
    if reason := NOT_TRAINED.get(model_type):
        problems.append(f"{named}: {model_type} models are not trained: {reason}")
    limit = (config or {}).get("max_position_embeddings")
    if is_causal and limit and args.max_seq_length and args.max_seq_length > limit:
        problems.append(f"--max_seq_length {args.max_seq_length}: the model has {limit} positions; give {limit}")
    hub_t5 = config is None and re.search(r"(^|[/_-])(m|um|long|flan-)?t5", args.model_name_or_path.lower())
    if args.fp16 and (hub_t5 or model_type in FP16_OVERFLOWS):
        problems.append("--fp16: T5 overflows in fp16 and the loss turns NaN; use --bf16")
    return problems


def is_encoder(config: dict | None) -> bool:
    """Whether a config.json is that of an encoder such as BERT, by whose name the library would load a decoder too."""
    kind, architectures = (config or {}).get("model_type"), (config or {}).get("architectures") or [""]
    if kind not in known_models.MODEL_FOR_MASKED_LM_MAPPING_NAMES or config.get("is_decoder"):
        return False
    is_seq2seq = kind in known_models.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return not is_seq2seq and known_models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) not in architectures


def find_format_problems(args: argparse.Namespace, known_formats: tuple, templates: dict) -> list[str]:
    """What is wrong with the flags of run_clm_instruct.py. known_formats: (name, columns) each; templates: by name."""
    formats = list(dict.fromkeys(name for name, _ in known_formats))
    share, template = args.validation_split_percentage, args.prompt_template
    is_text = args.text_column is not None or args.data_format == "text" or str(args.train_file).endswith(".txt")
    checks = {
        "--use_liger_kernel: needs a GPU and liger-kernel: pip install liger-kernel": args.use_liger_kernel
        and not importlib.util.find_spec("liger_kernel"),
        "--packing: not for plain text, it is cut into full rows anyway; leave it out": args.packing and is_text,
        "--predict_with_generate: not for plain text, it has no answers to generate; leave it out": is_text
        and args.predict_with_generate,
        f"--validation_split_percentage {share}: must lie in 0 to 100": not 0 < share < 100,
        f"--data_format {args.data_format}: must be one of {', '.join(formats)}": args.data_format
        not in (None, *formats),
    }
    problems = [problem for problem, holds in checks.items() if holds]
    if template not in (None, "chat", *templates):
        try:
            source = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", Path(template).read_text(encoding="utf-8"))
            jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        except OSError:
            known = ", ".join([*templates, "chat"])
            problems.append(f"--prompt_template {template}: neither one of {known} nor a file that can be read")
        except (jinja2.TemplateError, UnicodeDecodeError) as error:
            problems.append(f"--prompt_template {template}: not a Jinja template: {error}")
    return problems


def check_format(columns: list[str], args, known: list, found: tuple | None) -> None:
    """Raise UsageError where a file has none of the known formats, or columns of another kind of data besides."""
    there, foreign = f"it has {', '.join(columns)}", [name for name in columns if name in FOREIGN_COLUMNS]
    foreign = [name for name in foreign if name not in (getattr(args, "drop_keys", None) or ())]
    if found is None and args.text_column is not None:
        raise UsageError(f"has no column {args.text_column!r} (--text_column); {there}")
    if found is None:
        wanted = "; or ".join(f"{', '.join(needed)} ({name})" for name, needed in known)
        hint = "; data_prep/prepare_instruct.py makes messages of conversations" * ("conversations" in columns)
        raise UsageError(
            f"needs the columns {wanted}; {there}. Rename them, or name plain text by --text_column{hint}"
        )
    if foreign and found[0] != "text":
        what = "of preferences, pictures or earlier turns, from which this script does not learn"
        raise UsageError(f"has columns {what}: {', '.join(foreign)}; --drop_keys {' '.join(foreign)} goes without")


def check_causal_tokenizer(tokenizer, limit: int, positions: int, model_args) -> None:
    """Raise UsageError where a tokenizer cannot end an answer or place its tokens, or the limit is too high."""
    if limit > positions:
        raise UsageError(f"--max_seq_length {limit}: the model has {positions} positions")
    flag = "model_name_or_path" if model_args.tokenizer_name is None else "tokenizer_name"
    lacking = "EOS token to stop with" if tokenizer.eos_token is None else "fast tokenizer (tokenizer.json)"
    if tokenizer.eos_token is None or not tokenizer.is_fast:
        raise UsageError(f"--{flag} {getattr(model_args, flag)}: has no {lacking}")


def find_deepspeed_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the DeepSpeed file, and where it contradicts a flag."""
    path = args.deepspeed
    if path is None:
        return []
    if not os.path.isfile(path):
        return [f"--deepspeed {path}: there is no such file"]
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        return [f"--deepspeed {path}: not JSON: {error}"]
    if not isinstance(config, dict):
        return [f"--deepspeed {path}: not a JSON object"]
    problems = []
    for keys, flag in DEEPSPEED_TWINS:
        value = config
        for key in keys:
            value = value.get(key, "auto") if isinstance(value, dict) else "auto"
        if value != "auto" and value != getattr(args, flag):
            problems.append(
                f"--deepspeed {path}: {'.'.join(keys)} is {json.dumps(value)} but --{flag} is {getattr(args, flag)}; "
                f'make them equal or write "auto"'
            )
    if "optimizer" in config and args.optim != TrainingArguments.__dataclass_fields__["optim"].default:
        problems.append(f"--deepspeed {path}: its optimizer block overrules --optim; remove one of the two")
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    if "optimizer" not in config and offload != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        problems.append(
            f"--deepspeed {path}: offload_optimizer with --optim {args.optim} needs "
            '"zero_force_ds_cpu_optimizer": false'
        )
    if offload == "nvme" and args.optim == "adafactor":
        problems.append(
            f"--deepspeed {path}: offload_optimizer on nvme swaps state as large as the weights, which Adafactor's "
            'factors are not; there is next to none: write "device": "cpu"'
        )
    return problems


def find_tracking_problems(args: argparse.Namespace) -> list[str]:
    """A tracker that is not installed, and a folder as MLflow's address."""
    names = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    problems = [
        f"--report_to {name}: {packages[0]} is not installed; `pip install {packages[0]}`, or leave the flag out"
        for name, packages in TRACKERS.items()
        if name in names and not any(importlib.util.find_spec(package) for package in packages)
    ]
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if "mlflow" in names and uri.startswith(("file:", "/", ".")) and not os.environ.get("MLFLOW_ALLOW_FILE_STORE"):
        problems.append(
            f"MLFLOW_TRACKING_URI={hide_secrets(uri)}: MLflow 3 no longer writes into a folder; give "
            "sqlite:///mlflow.db, a server's URL, or leave it out"
        )
    return problems


# ------------------------------------------------------------------------------------------------ ranks


def start_ranks(args: argparse.Namespace) -> None:
    """
    Make a run possible without variables from the user: as the only rank under --deepspeed, and on the CPU.

    `python script.py --deepspeed FILE`, without a launcher, is one rank; DeepSpeed would look for MPI and fail.
    """
    if args.deepspeed and "RANK" not in os.environ and "OMPI_COMM_WORLD_SIZE" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if args.use_cpu:
        # Left to itself each rank starts a thread a core; two ranks of ZeRO-3 on two cores are then 3 times slower.
        # (deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE)
        ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = max(1, (os.cpu_count() or 1) // ranks)
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)))
        torch.set_num_threads(threads)
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"No accelerator in use: running on the CPU (--use_cpu), {threads} threads a process.", flush=True)


def set_up_logging(training_args) -> None:
    """Log at the level the arguments ask for; ranks other than the first only warn."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        handlers=[logging.StreamHandler(sys.stdout)],
    )
    datasets.utils.logging.set_verbosity(logging.WARNING)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    # DeepSpeed 0.19 calls torch 2.13 by names it has renamed: thousands of lines in a short run under ZeRO.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)


# ------------------------------------------------------------------------------------------------ checkpoints


def start_run(model_args, data_args, training_args) -> tuple[str | None, dict | None]:
    """Sets up logging, and returns the checkpoint to go on from, and the results of a run that is finished."""
    set_up_logging(training_args)
    for name, cost in NOT_BESIDE.items():
        if globals()[name.removesuffix(".py")] is None and training_args.process_index == 0:
            print(f"{name} is not beside guards.py: {cost}", flush=True)
    if checkpoints is None:
        return training_args.resume_from_checkpoint, None
    try:
        return checkpoints.choose_checkpoint(model_args, data_args, training_args)
    except checkpoints.FolderError as error:
        raise UsageError(str(error)) from None


# ------------------------------------------------------------------------------------------------ tracking


class WholeRunLoss(TrainerCallback):
    """
    Makes train_loss the mean over all steps and ranks, of a run that went on after a kill too.

    The library counts what is not logged by the end as one rank's, and what was before a checkpoint not at all (5.23).
    So all is logged by every checkpoint and by the last step, and the mean is taken of the history.
    """

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save or state.global_step >= state.max_steps

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "train_loss" not in logs:
            return
        steps = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
        if steps:
            parts = zip([0, *(step for step, _ in steps)], steps, strict=False)
            logs["train_loss"] = sum(loss * (step - before) for before, (step, loss) in parts) / steps[-1][0]
            state.log_history[-1]["train_loss"] = logs["train_loss"]


def start_tracking(trainer, *arguments) -> None:
    """
    Add WholeRunLoss and, with --report_to mlflow, begin the one run of training, evaluation and prediction.

    arguments: the script's dataclasses, logged but for the token. The trainer's callback ends the run it starts itself
    when training ends, and what is evaluated later would begin a second one (transformers 5.23). A run it finds it
    goes on with and leaves open, for write_reports.
    """
    args = trainer.args
    own = [WholeRunLoss()]
    if checkpoints:
        own.append(checkpoints.RunFolder(args.output_dir, arguments))
    if portable_checkpoints:
        portable_checkpoints.follow(trainer, UsageError)
    trainer.callback_handler.callbacks[1:1] = own  # after the one that decides what is due, before those that print
    hide_tied_weights(trainer.model)
    if "mlflow" not in args.report_to or not trainer.is_world_process_zero():
        return
    import mlflow

    if not mlflow.is_tracking_uri_set():
        mlflow.set_tracking_uri("sqlite:///mlflow.db")
    run = mlflow.active_run() or mlflow.start_run(run_name=args.run_name)
    atexit.register(mlflow.end_run, "FAILED")  # of a run that write_reports has ended it does nothing
    # The callback logs the trainer's flags and the model's configuration, which may have a name of ours. Asynchronous
    # as there: a run that is gone on with (MLFLOW_RUN_ID) keeps its first values, and no error is raised.
    given = {k: v for part in arguments for k, v in vars(part).items() if k != "token"}
    given = {f"flag.{k}" if hasattr(trainer.model.config, k) else k: v for k, v in given.items()}
    mlflow.log_params(given, synchronous=False)
    if isinstance(args.deepspeed, str):
        mlflow.log_artifact(args.deepspeed)
    print(
        f"MLflow run {run.info.run_name} ({run.info.run_id}) in {hide_secrets(mlflow.get_tracking_uri())}", flush=True
    )


def hide_secrets(uri: str) -> str:
    """An address without user, password and what follows the path."""
    return re.sub(r"(?<=//)[^/]*@", "", uri).split("?")[0]


def hide_tied_weights(model) -> None:
    """Keep the trainer from warning of weights that a checkpoint lacks only because they are tied to others (5.23)."""
    tied = set(getattr(model, "all_tied_weights_keys", ()))

    def is_news(record) -> bool:
        lacking = re.findall(r"'(.+?)'", record.getMessage()) if "missing keys in the checkpoint" in record.msg else ()
        return not lacking or not tied.issuperset(lacking)

    logging.getLogger("transformers.trainer").addFilter(is_news)


def end_tracking(folder: Path) -> None:
    """End the MLflow run with the results' files in it, the generated texts as a table too."""
    import mlflow

    for name in ("all_results.json", "training_curves.png", "generated_predictions.jsonl"):
        if (folder / name).is_file():
            mlflow.log_artifact(folder / name)
    if (folder / "generated_predictions.jsonl").is_file():
        lines = (folder / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        mlflow.log_table({name: [row[name] for row in rows] for name in rows[0]}, "generated_predictions.json")
    mlflow.flush_async_logging()
    mlflow.end_run()


def write_reports(trainer, task: str, model_args, data_args) -> None:
    """Curves, model card, and the end of MLflow's run; on the first rank only."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    if trainer.state.log_history:
        draw_curves(trainer.state.log_history, folder / "training_curves.png")
    if trainer.args.do_train:
        card = {"finetuned_from": model_args.model_name_or_path, "tasks": task}
        if data_args.dataset_name is not None:
            card |= {"dataset_tags": data_args.dataset_name, "dataset": data_args.dataset_name}
        trainer.create_model_card(**card)
    if "mlflow" in trainer.args.report_to:
        end_tracking(folder)
    if checkpoints:
        checkpoints.finish(folder)


def draw_curves(history: list[dict], path: Path) -> None:
    """Loss, ROUGE, learning rate and gradient norm over the steps, from the trainer's log history, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {
        "loss": ("loss", "eval_loss"),
        "ROUGE (validation)": ("eval_rouge1", "eval_rouge2", "eval_rougeL"),
        "token accuracy (validation)": ("eval_token_accuracy",),
        "learning rate": ("learning_rate",),
        "gradient norm": ("grad_norm",),
    }
    panels = {title: names for title, names in panels.items() if any(n in entry for entry in history for n in names)}
    figure = Figure(figsize=(5 * max(len(panels), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            points = [(entry["step"], entry[name]) for entry in history if name in entry]
            if points:
                marker = "o" if len(points) < 30 else None
                axis.plot(*zip(*points, strict=True), marker=marker, markersize=3, label=name)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)


# ------------------------------------------------------------------------------------------------ exit


def run_and_exit(main) -> None:
    """
    Run main() and leave with 0, or with 2 after a message the user can act on.

    Ranks leave together and by os._exit: gloo's threads sometimes abort a finished rank in the interpreter's own
    shutdown ("terminate called without an active exception", exit code 250, in about 1 of 15 two-rank runs on torch
    2.13), and the launcher then reports a failed run. Other libraries' exit handlers run before that.
    """
    try:
        main()
    except UsageError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            lines = str(error).split("\n")
            print("".join(f"\nerror: {line}" for line in lines), file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends every rank when the first is gone: let rank 0 speak
        os._exit(2)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------ generation

# The least that a decoding flag may be; below 1 stands for "above 0".
LEAST_DECODING = {"temperature": 1e-6, "num_beams": 1, "max_new_tokens": 1, "repetition_penalty": 1e-6}
LEAST_DECODING |= {"top_k": 0, "min_new_tokens": 0}


def check_generation(args: argparse.Namespace, decoding: dict, problems=()) -> None:
    """
    Raise everything wrong with run_generation.py's arguments as one UsageError; nothing is downloaded or loaded.

    decoding: the flags of GenerationConfig that were given; problems: what the script found itself.
    """
    problems = list(problems)
    if (args.input_file is None) == (args.dataset_name is None):
        problems.append("give either --input_file or --dataset_name")
    if args.output_file is None:
        problems.append("--output_file is missing: where the table goes")
    if args.output_file is not None and not args.output_file.lower().endswith((".csv", ".jsonl", ".parquet")):
        problems.append(f"--output_file {args.output_file}: unknown ending; known are .csv, .jsonl, .parquet")
    if args.output_file is not None and Path(args.output_file).exists():
        problems.append(f"--output_file {args.output_file}: exists and is kept; remove it first, or name another")
    for flag in ("max_source_length", "max_samples", "max_tokens_per_batch", "min_group_size"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            problems.append(f"--{flag} {getattr(args, flag)}: must be 1 or more")
    if args.dtype not in ("auto", "float32", "bfloat16", "float16"):
        problems.append(f"--dtype {args.dtype}: must be auto, float32, bfloat16 or float16")
    for flag in ("model_name_or_path", "assistant_model_name_or_path"):
        if getattr(args, flag) is not None:
            problems += find_folder_problems(f"--{flag}", getattr(args, flag))
    if args.assistant_model_name_or_path and (args.deepspeed or decoding.get("num_beams", 1) != 1):
        problems.append("--assistant_model_name_or_path: not with --deepspeed or --num_beams; leave one out")
    problems += find_zero3_problems(args.deepspeed) + find_decoding_problems(decoding)
    if problems:
        raise UsageError("\n".join(problems))


def find_folder_problems(flag: str, name: str) -> list[str]:
    """A folder of a model or of adapters that is none, or that has no weights."""
    folder = Path(name)
    try:
        config = None if (folder / "adapter_config.json").is_file() else read_model_config(flag, name)
        if is_encoder(config):
            return [f"{flag} {name}: {ENCODER}"]
        if config is None and not (folder / "adapter_config.json").is_file():
            return []
    except UsageError as error:
        return [str(error)]
    if not any(p.suffix in (".safetensors", ".bin") and "training_args" not in p.name for p in folder.iterdir()):
        return [f"{flag} {name}: the folder has no weights (*.safetensors); did the training end?"]
    return []


def find_zero3_problems(path: str | None) -> list[str]:
    """--deepspeed generates with partitioned weights only: stage 3."""
    if path is None:
        return []
    try:
        stage = json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage")
    except (OSError, ValueError, AttributeError) as error:
        return [f"--deepspeed {path}: cannot be read as a DeepSpeed file: {error}"]
    return [] if stage == 3 else [f"--deepspeed {path}: has stage {stage}; only stage 3 spreads a model's weights"]


def find_decoding_problems(decoding: dict) -> list[str]:
    """Decoding flags outside their range, or that contradict each other, in transformers' own words."""
    problems = []
    for name, least in LEAST_DECODING.items():
        value = decoding.get(name)
        if value is not None and (isinstance(value, bool | str) or value < least):
            problems.append(f"--{name} {value}: must be a number above {'0' if least < 1 else least - 1}")
    if problems:
        return problems
    least, most = (decoding.get(f"{end}_new_tokens") for end in ("min", "max"))
    if least and most and least > most:
        problems.append(f"--min_new_tokens {least} is more than --max_new_tokens {most}")
    if (decoding.get("num_beams") or 1) > 1 and decoding.get("prompt_lookup_num_tokens"):
        problems.append("--prompt_lookup_num_tokens: goes with greedy decoding or sampling, not with --num_beams")
    try:
        transformers.GenerationConfig(**{"num_beams": 1, **decoding}).validate(strict=True)
    except (ValueError, TypeError) as error:
        lines = [line.removeprefix("- ").replace("`", "") for line in str(error).splitlines() if line.startswith("- ")]
        problems += lines or [f"decoding flags {', '.join(decoding)}: {str(error).splitlines()[0]}"]
    return problems
