# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23", "datasets", "safetensors"]
# ///
"""
Refuses bad input early and all at once, starts ranks, keeps MLflow's one run, has its companions report.

Optional beside run_summarization.py, run_clm_instruct.py and run_generation.py: they compute the same without it. In
the order in which a run meets them: read_arguments, check_training or check_generation, start_ranks, start_run,
start_tracking, write_reports, run_and_exit.
"""

import argparse
import atexit
import importlib.util
import json
import logging
import math
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
from transformers import TrainerCallback
from transformers.models.auto import modeling_auto as known_models

# Its own companions. Without them fewer mistakes are found early; start_run says so.
checkpoints = portable_checkpoints = rank_watch = flag_checks = value_checks = deepspeed_checks = None
console = closing = None
with suppress(ModuleNotFoundError):
    import checkpoints
with suppress(ModuleNotFoundError):
    import portable_checkpoints
with suppress(ModuleNotFoundError):
    import rank_watch
with suppress(ModuleNotFoundError):
    import flag_checks
with suppress(ModuleNotFoundError):
    import value_checks
with suppress(ModuleNotFoundError):
    import deepspeed_checks
with suppress(ModuleNotFoundError):
    import console
with suppress(ModuleNotFoundError):
    import closing

COSTS = {
    "checkpoints.py": "a killed run goes on only with --resume_from_checkpoint, and what differs is not said",
    "portable_checkpoints.py": "a run goes on only with the ranks and the ZeRO stage of its checkpoint, and loading "
    "one of DeepSpeed's can run code",
    "rank_watch.py": "a rank that is stopped or killed is noticed after half an hour, or in tracebacks",
    "flag_checks.py": "misspelt flags and values of another type end in argparse's own words, one at a time",
    "value_checks.py": "numbers out of range, nan and inf are taken as they are",
    "deepspeed_checks.py": "a wrong DeepSpeed file ends late, in a traceback",
    "console.py": "the libraries' own lines, and a loss every 500 steps",
    "closing.py": "no curves, no model card, no word on what to do next",
}

# Columns of other kinds of data for chat models: left out, they would change what is learned.
FOREIGN_COLUMNS = ("chosen", "rejected", "label", "history", "image", "images", "audio", "audios", "video", "videos")

# The least that a number may be; None, where a flag has it, says all of them.
LEAST = dict.fromkeys(("max_source_length", "max_target_length", "val_max_target_length", "num_beams"), 1)
LEAST |= dict.fromkeys(("max_train_samples", "max_eval_samples", "max_predict_samples", "max_new_tokens"), 1)
LEAST |= {"preprocessing_num_workers": 1, "max_seq_length": 8}

# Of AutoModelForSeq2SeqLM's types (5.23), those that run_summarization.py refuses.
NOT_TRAINED = {"fsmt": "a batch's padding changes their losses (5.23)"}
NOT_TRAINED["nllb-moe"] = "its experts drop what is too much for them of a batch, so that losses depend on the batch"
NOT_TRAINED |= dict.fromkeys(("seamless_m4t", "seamless_m4t_v2"), "they generate by a language that is no flag here")
HEAR = "audioflamingo3 glmasr granite_speech granite_speech_plus moss_transcribe_diarize musicflamingo nemo_speechlm "
HEAR += "qwen2_audio qwen3_asr vibevoice_asr voxtral voxtral_realtime"
NOT_TRAINED |= dict.fromkeys(HEAR.split(), "they read sound, not text alone")

# T5's activations leave fp16's range: the loss turns NaN (https://github.com/huggingface/transformers/issues/4586).
FP16_OVERFLOWS = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct", "udop")

ENCODER = "is an encoder, which writes no text; give another, or make an encoder-decoder of it (tools/join_models.py)"

# A model's shape in config.json: whole numbers from 1 on, or a list of them, one a layer; and shares.
SHAPE = """
num_layers num_hidden_layers n_layer num_decoder_layers encoder_layers decoder_layers num_heads num_attention_heads
n_head encoder_attention_heads decoder_attention_heads num_key_value_heads hidden_size d_model d_kv d_ff n_embd
intermediate_size vocab_size max_position_embeddings n_positions head_dim encoder_ffn_dim decoder_ffn_dim
""".split()
DROPOUTS = "dropout dropout_rate attention_dropout activation_dropout hidden_dropout_prob embd_pdrop resid_pdrop "
DROPOUTS += "attn_pdrop attention_probs_dropout_prob hidden_dropout"

RANK_TIMEOUT = 30  # seconds, of a script without the flag

# What --report_to needs, the first name being what to install.
TRACKERS = {"mlflow": ("mlflow",), "tensorboard": ("tensorboardX", "tensorboard")}


class UsageError(ValueError):
    """What the user can mend: printed as one message without a traceback, exit code 2."""


# ------------------------------------------------------------------------------------------------ arguments


def read_arguments(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """
    The flags of a command line for `parser`, whose defaults are the values of a .json file given first.

    DeepSpeed's own spelling of its flag is understood. Raises UsageError at flags and keys of the file that are none,
    or whose values are of another type.
    """
    argv = join_deepspeed_flags(argv)
    is_file = bool(argv) and argv[0].endswith(".json")
    parser.error = raise_usage_error
    if console:
        console.set_log_defaults(parser)
    problems = flag_checks.find_flag_problems(parser, argv[is_file:]) if flag_checks else []
    if is_file:
        problems += take_defaults_from_json(parser, argv[0])
    if problems:
        raise UsageError("\n".join(problems))
    return argv[is_file:]


def raise_usage_error(message: str) -> None:
    """In the place of argparse's error(), which prints the usage of all flags first."""
    raise UsageError(f"{message}; --help lists all flags")


def join_deepspeed_flags(argv: list[str]) -> list[str]:
    """`--deepspeed --deepspeed_config PATH`, DeepSpeed's own spelling (and Spark's distributor's), as one flag."""
    bare = [
        i for i, flag in enumerate(argv) if flag == "--deepspeed" and "".join(argv[i + 1 : i + 2])[:2] in ("", "--")
    ]
    if "--deepspeed_config" in argv:
        argv = [flag for i, flag in enumerate(argv) if i not in bare]
    return ["--deepspeed" if flag == "--deepspeed_config" else flag for flag in argv]


def take_defaults_from_json(parser: argparse.ArgumentParser, path: str) -> list[str]:
    """Make the values of a .json argument file the parser's defaults, so that flags after it count; or say why not."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return [f"{path}: cannot be read as a JSON file of arguments: {error}"]
    if problems := flag_checks.find_value_problems(parser, values, path) if flag_checks else []:
        return problems
    for action in parser._actions:
        action.required = action.required and action.dest not in values
    parser.set_defaults(**values)
    return []


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
    if value_checks:
        problems += value_checks.find_training_problems(args)
    if deepspeed_checks:
        problems += deepspeed_checks.find_problems(args)
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
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{flag} {name}: config.json is not JSON: {error}") from None
    if problems := find_config_problems(f"{flag} {name}", config):
        raise UsageError("\n".join(problems))
    return config


def find_config_problems(named: str, config) -> list[str]:
    """What cannot be a model's in the content of a config.json, its parts' too; the library takes much in silence."""
    if not isinstance(config, dict):
        return [f"{named}: config.json is no JSON object but a {type(config).__name__}"]
    if not isinstance(config.get("model_type", ""), str):
        return [f"{named}: config.json says model_type {config['model_type']!r}; must be a name"]
    problems = []
    for part in [config] + [part for part in config.values() if isinstance(part, dict) and "model_type" in part]:
        values = {name: part[name] for name in SHAPE if part.get(name) is not None}
        each = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
        wrong = [n for n, v in each.items() if not all(type(x) is int and x >= 1 for x in v)]
        problems += [f"{named}: config.json says {n} {values[n]!r}; must be a whole number from 1 on" for n in wrong]
        shares = {name: part[name] for name in DROPOUTS.split() if part.get(name) is not None}
        wrong = [name for name, value in shares.items() if not (type(value) in (int, float) and 0 <= value <= 1)]
        problems += [f"{named}: config.json says {n} {shares[n]!r}; must be a number in 0 to 1" for n in wrong]
    return problems


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
    if rank_watch:
        rank_watch.watch(getattr(args, "rank_timeout", RANK_TIMEOUT))
    if console:
        console.quiet_libraries(args)
    if args.use_cpu:
        # Left to itself each rank starts a thread a core; two ranks of ZeRO-3 on two cores are then 3 times slower.
        # (deepspeed says LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE)
        ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = max(1, (os.cpu_count() or 1) // ranks)
        threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(threads)))
        torch.set_num_threads(threads)
        os.environ["DS_ACCELERATOR"] = "cpu"  # or DeepSpeed, where accelerate looks for it, warns on every rank
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"No accelerator in use: running on the CPU (--use_cpu), {threads} threads a process.", flush=True)


def set_up_logging(training_args) -> None:
    """Log at the level the arguments ask for; ranks other than the first only warn, and show no progress."""
    style = {"format": "%(asctime)s - %(levelname)s - %(name)s - %(message)s", "datefmt": "%m/%d/%Y %H:%M:%S"}
    logging.basicConfig(**style, handlers=[logging.StreamHandler(sys.stdout)])  # console.py has its own
    if training_args.process_index > 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.WARNING)
    transformers.utils.logging.set_verbosity(training_args.get_process_log_level())
    # DeepSpeed 0.19 calls torch 2.13 by names it has renamed: thousands of lines in a short run under ZeRO.
    warnings.filterwarnings("ignore", "`torch.distributed.* is deprecated", FutureWarning)


# ------------------------------------------------------------------------------------------------ checkpoints


def start_run(model_args, data_args, training_args) -> tuple[str | None, dict | None]:
    """Sets up logging, and returns the checkpoint to go on from, and the results of a run that is finished."""
    set_up_logging(training_args)
    for name, cost in COSTS.items():
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


class FiniteRun(TrainerCallback):
    """
    Ends a run whose loss or weights are no longer finite, before a checkpoint of it is written.

    A step costs one addition on the device: the trainer's sum of losses stays nan from the step on that made it so,
    and is read where it is logged anyway. Weights are looked at where they are to be saved, on all ranks.
    """

    def __init__(self, trainer):
        self.trainer, self.finite, self.logged = trainer, None, trainer.state.global_step
        trainer.args.logging_nan_inf_filter = False  # it would hide the loss, at the price of reading it every step

    def on_train_begin(self, args, state, control, **kwargs):
        self.finite, self.logged = torch.zeros((), dtype=torch.long, device=args.device), state.global_step
        self.skipped = getattr(self.trainer.model_wrapped, "skipped_steps", 0)

    def on_step_end(self, args, state, control, **kwargs):
        # DeepSpeed passes over a step whose gradients are not finite, in any precision (0.19.8); fp16 lives by that.
        if getattr(self.trainer.model_wrapped, "skipped_steps", 0) > self.skipped and not args.fp16:
            self.end(args, f"step {state.global_step}: the gradients are no longer finite numbers")
        self.finite += torch.isfinite(self.trainer._tr_loss)
        if control.should_save or state.global_step >= state.max_steps:
            self.check_loss(args, state)
            weights = [getattr(p, "ds_tensor", p) for p in self.trainer.model.parameters() if p.requires_grad]
            bad = torch.stack([~torch.isfinite(weight.detach()).all() for weight in weights]).any().long()
            if self.find_extreme(bad, torch.distributed.ReduceOp.MAX):
                self.end(args, f"step {state.global_step}: the weights are no longer finite numbers")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        self.check_loss(args, state)
        if not math.isfinite(logs.get("grad_norm", 0.0)) and not args.fp16:  # fp16 passes over such steps
            self.end(args, f"step {state.global_step}: the gradients are no longer finite ({logs['grad_norm']})")
        self.finite.zero_()
        self.logged = state.global_step

    def check_loss(self, args, state) -> None:
        step = self.logged + self.find_extreme(self.finite, torch.distributed.ReduceOp.MIN) + 1
        if step <= state.global_step:
            self.end(args, f"step {step}: the loss is no longer a finite number")

    def find_extreme(self, number: torch.Tensor, what) -> int:
        """The largest or smallest of all ranks' numbers."""
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(number, op=what)
        return int(number)

    def end(self, args, said: str) -> None:
        saved = sorted(Path(args.output_dir).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        kept = f"{saved[-1]} is from before" if saved else "no checkpoint was written"
        way = f"lower --learning_rate (it is {args.learning_rate:g}) or give --warmup_steps"
        raise UsageError(f"{said}; {kept}; {way}{', or --bf16 false' if args.bf16 else ''}; nothing was saved of it")


def start_tracking(trainer, *arguments) -> None:
    """
    Add callbacks and, with --report_to mlflow, begin the one run of training, evaluation and prediction.

    arguments: the script's dataclasses, logged but for the token. The trainer's callback ends the run it starts itself
    when training ends, and what is evaluated later would begin a second one (transformers 5.23). A run it finds it
    goes on with and leaves open, for write_reports.
    """
    args = trainer.args
    own = [WholeRunLoss(), FiniteRun(trainer)]
    if checkpoints:
        own.append(checkpoints.RunFolder(trainer, arguments))
    own += [console.show_steps(trainer)] if console else []
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


def write_reports(trainer, task: str, model_args, data_args, columns: tuple) -> None:
    """Curves, model card, MLflow's end, where all lies; on the first rank. columns: the data's, the texts' first."""
    if not trainer.is_world_process_zero():
        return
    folder = Path(trainer.args.output_dir)
    if closing:
        closing.write(trainer, task, model_args, data_args)
    if "mlflow" in trainer.args.report_to:
        end_tracking(folder)
    if checkpoints:
        checkpoints.finish(folder)
    if closing:
        print(closing.describe_end(trainer, task, model_args, data_args, columns), flush=True)


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
        if rank_watch:
            rank_watch.sign_off()  # or the others would name this rank dead
        if int(os.environ.get("RANK", 0)) == 0:
            lines = str(error).split("\n")
            print("".join(f"\nerror: {line}" for line in lines), file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the launcher ends every rank when the first is gone: let rank 0 speak
        os._exit(2)
    except Exception as error:
        if sentence := rank_watch and rank_watch.explain_failure(error):
            print(f"\nerror: {sentence}; start the same command again", file=sys.stderr, flush=True)
            os._exit(3)
        raise
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank_watch:
        rank_watch.sign_off()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


# ------------------------------------------------------------------------------------------------ generation


def check_generation(args: argparse.Namespace, decoding: dict, problems=(), knows_its_own: bool = False) -> None:
    """
    Raise everything wrong with run_generation.py's arguments as one UsageError; nothing is downloaded or loaded.

    decoding: the flags of GenerationConfig that were given; problems: what the script found itself; knows_its_own:
    whether an output that a marker lies beside is looked at later, by generation_store.py.
    """
    problems = list(problems)
    if (args.input_file is None) == (args.dataset_name is None):
        problems.append("give either --input_file or --dataset_name")
    if args.output_file is None:
        problems.append("--output_file is missing: where the table goes")
    if args.output_file is not None and not args.output_file.lower().endswith((".csv", ".jsonl", ".parquet")):
        problems.append(f"--output_file {args.output_file}: unknown ending; known are .csv, .jsonl, .parquet")
    path = Path(args.output_file or ".")
    marked = knows_its_own and (path.parent / f".{path.name}.complete.json").exists()
    if args.output_file is not None and path.exists() and not marked:
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
    if deepspeed_checks:
        problems += deepspeed_checks.find_zero3_problems(args)
    if value_checks:
        problems += value_checks.find_generation_problems(args)
    known = value_checks.find_vocabulary(args.model_name_or_path) if value_checks else None
    problems += find_decoding_problems(decoding, known)
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


def find_decoding_problems(decoding: dict, vocabulary: int | None = None) -> list[str]:
    """Decoding flags outside their range, or that contradict each other, in transformers' own words."""
    if problems := value_checks.find_wrong_decoding(decoding, vocabulary) if value_checks else []:
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
