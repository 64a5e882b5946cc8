# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.8", "transformers>=5.23"]
# ///
"""
Whether every value is one: numbers in range, JSON of the right type, and decoding flags.

Optional beside guards.py, which calls it; each find_* returns sentences. In the order in which a run meets them:
find_training_problems or find_wrong_decoding.
"""

import argparse
import difflib
import inspect
import json
import re
from importlib.util import find_spec
from pathlib import Path

import huggingface_hub
import torch
import transformers
from transformers import trainer_optimizer
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import SchedulerType

# What numbers must be: the words, the test, the flags. None, where a flag has it, is no number and passes.
NUMBERS = (
    ("0 or more", lambda x: x >= 0, "learning_rate max_grad_norm eval_delay neftune_noise_alpha"),
    ("0 to 1000", lambda x: 0 <= x <= 1000, "weight_decay"),
    ("0 to 1e12", lambda x: 0 <= x <= 1e12, "warmup_steps rank_timeout"),
    ("0 to 4096", lambda x: 0 <= x <= 4096, "dataloader_num_workers preprocessing_num_workers"),
    ("1 or more", lambda x: x >= 1, "per_device_train_batch_size per_device_eval_batch_size"),
    ("1 or more", lambda x: x >= 1, "gradient_accumulation_steps eval_accumulation_steps save_total_limit"),
    ("1 or more", lambda x: x >= 1, "dataloader_prefetch_factor torch_empty_cache_steps ddp_timeout"),
    ("1 or more", lambda x: x >= 1, "generation_max_length generation_num_beams ddp_bucket_cap_mb"),
    ("above 0", lambda x: x > 0, "num_train_epochs"),
    ("above 0 to 1", lambda x: 0 < x <= 1, "adam_epsilon"),
    ("above 0, whole from 1 on", lambda x: 0 < x < 1 or x >= 1 and x == int(x), "logging_steps save_steps eval_steps"),
    ("0 to 1, 1 left out", lambda x: 0 <= x < 1, "adam_beta1 adam_beta2 label_smoothing_factor"),
    ("-1 (by epochs) or 1 or more", lambda x: x == -1 or x >= 1, "max_steps"),
    ("0 to 2**32 - 1", lambda x: 0 <= x < 2**32, "seed data_seed"),
)

# Flags that hold a JSON object; those that may name a file with one instead.
OBJECTS = ("lr_scheduler_kwargs", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
OBJECTS_OR_FILES = ("accelerator_config", "fsdp_config")

# Decoding flags as NUMBERS has them; then those that are no numbers, by type.
DECODING = (
    ("1 to 10000", lambda x: 1 <= x <= 10_000 and x == int(x), "num_beams"),
    ("1 or more", lambda x: x >= 1 and x == int(x), "max_new_tokens prompt_lookup_num_tokens max_matching_ngram_size"),
    ("1 or more", lambda x: x >= 1 and x == int(x), "num_assistant_tokens assistant_early_exit assistant_lookbehind"),
    ("1 or more", lambda x: x >= 1 and x == int(x), "max_cache_len prefill_chunk_size target_lookbehind"),
    ("0 or more", lambda x: x >= 0 and x == int(x), "top_k min_new_tokens no_repeat_ngram_size"),
    ("0 or more", lambda x: x >= 0 and x == int(x), "encoder_no_repeat_ngram_size"),
    ("a number above 0", lambda x: x > 0, "temperature repetition_penalty encoder_repetition_penalty max_time"),
    ("a number", lambda x: True, "length_penalty guidance_scale assistant_ensemble_weight"),
    ("above 0 to 1", lambda x: 0 < x <= 1, "top_p typical_p top_h"),
    ("0 to 1", lambda x: 0 <= x <= 1, "min_p assistant_confidence_threshold"),
    ("0 to 1, 1 left out", lambda x: 0 <= x < 1, "epsilon_cutoff eta_cutoff"),
)
BOOLEANS = "do_sample use_cache renormalize_logits remove_invalid_values token_healing disable_compile use_mtp"
TOKENS = "eos_token_id pad_token_id bos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id "
TOKENS += "suppress_tokens begin_suppress_tokens bad_words_ids"
ONE_TOKEN = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
OF_OBJECTS = "watermarking_config compile_config cache_config continuous_batching_config"
MODES = (None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
SCHEDULES = ("constant", "heuristic", "heuristic_transient")
# Methods that transformers 5 has moved to code on the hub, which these scripts do not run.
MOVED = "low_memory penalty_alpha dola_layers diversity_penalty num_beam_groups constraints force_words_ids"

# What run_summarization.py's evaluation hands out (run_clm_instruct.py has three more), ROUGE where it generates.
METRICS = "loss runtime samples_per_second steps_per_second perplexity token_accuracy stopped gen_len".split()
METRICS += ["rouge1", "rouge2", "rougeL", "rougeLsum"]

# What ends in a traceback, or cannot do what it says (5.23): flag, when, and why.
UNWORKABLE = (
    ("eval_do_concat_batches false", lambda a: is_scored(a) and not a.eval_do_concat_batches, "ROUGE needs all"),
    ("prediction_loss_only", lambda a: is_scored(a) and a.prediction_loss_only, "leaves ROUGE without texts"),
    ("batch_eval_metrics", lambda a: is_scored(a) and a.batch_eval_metrics, "ROUGE is taken over all rows at once"),
    ("use_liger_kernel", lambda a: a.use_liger_kernel and not find_spec("liger_kernel"), "needs liger-kernel"),
    ("load_best_model_at_end", lambda a: not saves_what_it_evaluates(a), "needs --eval_strategy as --save_strategy"),
    ("push_to_hub", lambda a: a.push_to_hub and not can_push(a), "needs the hub, and --token or `hf auth login`"),
    ("parallelism_config", lambda a: a.parallelism_config, "cannot be given on a command line"),
    ("fp16, --bf16", lambda a: a.fp16 and a.bf16, "one of the two"),
    ("label_names", lambda a: a.label_names not in (None, ["labels"]), "these scripts call them labels"),
    ("include_for_metrics", lambda a: {*a.include_for_metrics} - {"inputs", "loss"}, "knows inputs and loss"),
    ("optim_target_modules", lambda a: not takes_modules(a), "is for --optim galore_... and apollo_..."),
    ("dataloader_persistent_workers", lambda a: a.dataloader_num_workers < a.dataloader_persistent_workers, "is idle"),
    ("torch_compile_backend", lambda a: a.torch_compile_backend not in list_backends(a), "is unknown to torch"),
    ("torch_compile_mode", lambda a: a.torch_compile_mode not in MODES, "is none of torch.compile's"),
)


def is_scored(args: argparse.Namespace) -> bool:
    return args.predict_with_generate and hasattr(args, "source_prefix")  # run_summarization.py scores in the trainer


def saves_what_it_evaluates(args: argparse.Namespace) -> bool:
    save, evaluate = (getattr(way, "value", way) for way in (args.save_strategy, args.eval_strategy))
    return not args.load_best_model_at_end or save in ("best", evaluate)


def takes_modules(args: argparse.Namespace) -> bool:
    return not args.optim_target_modules or bool(re.search("galore|apollo", str(args.optim), re.IGNORECASE))


def list_backends(args: argparse.Namespace) -> list:
    return torch._dynamo.list_backends(()) if args.torch_compile_backend else [None]  # a second's import


def can_push(args: argparse.Namespace) -> bool:
    return (args.token or huggingface_hub.get_token()) is not None and not huggingface_hub.constants.HF_HUB_OFFLINE


def is_number(value) -> bool:
    """Whether a value is a finite number, and fits into 64 bits if it is whole."""
    largest = 2**63 - 1 if isinstance(value, int) else 1e38
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= largest


def suggest(name: str, known, mark: str = "") -> str:
    """ ", did you mean NAME?" of the nearest name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {mark}{near[0]}?" if near else ""


def find_range_problems(values: dict, table: tuple) -> list[str]:
    """Which values break their line of NUMBERS or DECODING, nan and inf first of all."""
    return [
        f"--{flag} {values[flag]}: must be {words}"
        for words, test, flags in table
        for flag in flags.split()
        if values[flag] is not None and not (is_number(values[flag]) and test(values[flag]))
    ]


def find_unusable_numbers(values: dict) -> list[str]:
    """Numbers that are nan, infinite or of more than 64 bits, of the flags that NUMBERS does not have."""
    known = {flag for _, _, flags in NUMBERS for flag in flags.split()}
    numbers = {flag: x for flag, x in values.items() if isinstance(x, int | float) and not isinstance(x, bool)}
    numbers = {flag: x for flag, x in numbers.items() if flag not in known and not is_number(x)}
    return [f"--{flag} {x}: must be a finite number" for flag, x in numbers.items()]


def find_misnamed(args: argparse.Namespace) -> list[str]:
    """Flags that name a folder which is not there, where the library would speak of something else, and the like."""
    given = {flag: getattr(args, flag, None) or "" for flag in ("tokenizer_name", "config_name")}
    local = {flag: name for flag, name in given.items() if name.startswith((".", "/", "~")) or name.count("/") > 1}
    said = "there is no such folder; give a folder or a name on the hub"
    problems = [f"--{flag} {name}: {said}" for flag, name in local.items() if not Path(name).exists()]
    lonely = args.dataset_config_name and not args.dataset_name
    return problems + ["--dataset_config_name: needs --dataset_name"] * bool(lonely)


# ------------------------------------------------------------------------------------------------ training


def find_training_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the values of a training script's flags, one by one and together."""
    values = vars(args)
    problems = find_range_problems(values, NUMBERS) + find_unusable_numbers(values) + find_misnamed(args)
    for flag in (*OBJECTS, *OBJECTS_OR_FILES):
        problems += find_object_problems(flag, values[flag])
    if problems:
        return problems
    problems += find_scheduler_problems(args) + find_optimizer_problems(args)
    metric = (args.metric_for_best_model or "loss").removeprefix("eval_")
    known = METRICS if args.predict_with_generate else METRICS[:-6]
    if metric not in known:
        problems.append(f"--metric_for_best_model {metric}: not among the metrics{suggest(metric, known)}")
    return problems + [f"--{flag}: {words}; leave it out" for flag, holds, words in UNWORKABLE if holds(args)]


def find_object_problems(flag: str, value) -> list[str]:
    """A flag that must be a JSON object, or of OBJECTS_OR_FILES a file with one."""
    if value is None or isinstance(value, dict):
        return []
    kind = "a JSON object" + (", or a file with one" if flag in OBJECTS_OR_FILES else "")
    try:
        is_file = flag in OBJECTS_OR_FILES and not value.startswith("{")
        content = json.loads(Path(value).read_text(encoding="utf-8") if is_file else value)
    except (OSError, ValueError) as error:
        return [f"--{flag} {value}: must be {kind}: {error}"]
    if not isinstance(content, dict):
        return [f"--{flag} {value}: must be {kind}"]
    known = set(inspect.signature(AcceleratorConfig).parameters) if flag == "accelerator_config" else content
    return [f"--{flag}: {key} is unknown to it{suggest(key, known)}" for key in content if key not in known]


def find_scheduler_problems(args: argparse.Namespace) -> list[str]:
    """--lr_scheduler_kwargs that the scheduler does not take, by making one."""
    given = json.loads(g) if isinstance(g := args.lr_scheduler_kwargs, str) else g
    if not given:
        return []
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kind, takes_none = SchedulerType(args.lr_scheduler_type), ("constant", "constant_with_warmup")
    try:
        if kind.value in takes_none:
            raise TypeError("it takes none")
        schedule = transformers.get_scheduler(kind, optimizer, 1, 10, given)
        getattr(schedule, "lr_lambdas", [int])[0](5)  # values of a wrong type fail in use
    except Exception as error:  # whatever the schedules raise
        return [f"--lr_scheduler_kwargs {json.dumps(given)}: not for --lr_scheduler_type {kind.value}: {error}"]
    return []


def find_optimizer_problems(args: argparse.Namespace) -> list[str]:
    """--optim that is not installed, and --optim_args that it does not know, by the library's own code."""
    flag = f"--optim_args {args.optim_args}"
    try:
        given = trainer_optimizer._parse_optim_args(args.optim_args)
    except ValueError:
        return [f"{flag}: must be KEY=VALUE, with commas between them"]
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    context = {"args": args, "model": None, "optimizer_kwargs": {}, "adam_kwargs": adam, "optim_args": dict(given)}
    make = trainer_optimizer._OPTIMIZER_HANDLERS[transformers.training_args.OptimizerNames(args.optim)]
    try:
        make(trainer_optimizer.OptimizerContext(**context))
    except ImportError as error:
        return [f"--optim {args.optim}: {' '.join(str(error).split())}"]
    except (ValueError, AttributeError, TypeError) as error:
        if not given or "model" in str(error):  # some look at the model first
            return [] if "model" in str(error) else [f"--optim {args.optim}: {error}"]
        return [f"{flag}: {error}"]
    source = inspect.getsource(make)
    known = set(re.findall(r'"(\w+)"', source)) if "optim_args" in source else set()
    known |= {"step_in_backward"} if args.optim == "adafactor" else set()
    lists = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
    unknown = [key for key in given if key not in known]
    return [f"{flag}: {key} is unknown to --optim {args.optim}; {lists}{suggest(key, known)}" for key in unknown]


# ------------------------------------------------------------------------------------------------ generation


def find_generation_problems(args: argparse.Namespace) -> list[str]:
    """What is wrong with the values of run_generation.py's own flags."""
    problems = find_unusable_numbers(vars(args)) + find_misnamed(args)
    problems += [] if args.output_column.strip() else [f"--output_column {args.output_column!r}: must be a name"]
    if not 0 <= args.seed < 2**32:
        problems.append(f"--seed {args.seed}: must be 0 to 2**32 - 1")
    return problems


def find_vocabulary(name: str) -> int | None:
    """How many tokens a model's folder says that it writes, where it says so."""
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        parts = [config] + [config[key] for key in ("decoder", "text_config") if key in config]
        return next((part["vocab_size"] for part in parts if isinstance(part.get("vocab_size"), int)), None)
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def find_wrong_decoding(decoding: dict, vocabulary: int | None) -> list[str]:
    """Decoding flags out of range or of another type, and tokens beyond the vocabulary, where its size is known."""
    values = dict.fromkeys(name for _, _, flags in DECODING for name in flags.split()) | decoding
    problems = find_range_problems(values, DECODING)
    given = {name: value for name, value in decoding.items() if value is not None}
    for name, value in given.items():
        said = None
        if name in MOVED.split():
            said = "is no longer part of transformers; leave it out"
        elif name in BOOLEANS.split() and not isinstance(value, bool):
            said = "must be true or false"
        elif name == "early_stopping" and value not in (True, False, "never"):
            said = "must be true, false or never"
        elif name == "num_assistant_tokens_schedule" and value not in SCHEDULES:
            said = f"must be one of {', '.join(SCHEDULES)}"
        elif name == "stop_strings" and not all(s and isinstance(s, str) for s in as_list(value)):
            said = 'must be a text, or a list of texts: ["###", "End"]'
        elif name in TOKENS.split():
            said = explain_tokens(name, value, vocabulary)
        elif name in OF_OBJECTS.split() and not isinstance(value, dict):
            said = "must be a JSON object"
        elif name == "exponential_decay_length_penalty" and [is_number(x) for x in as_list(value)] != [True, True]:
            said = "must be a start and a factor: [8, 1.1]"
        if said:
            problems.append(f"--{name} {json.dumps(value)}: {said}")
    return problems


def as_list(value) -> list:
    return value if isinstance(value, list) and value else [value]


def explain_tokens(name: str, value, vocabulary: int | None) -> str | None:
    """Why a value is no token's number, list of them, or for bad_words_ids list of lists of them; None if it is."""
    rows = as_list(value) if name == "bad_words_ids" else [value]
    if isinstance(value, list) and name in ONE_TOKEN or name == "bad_words_ids" and not isinstance(rows[0], list):
        return "must be a token's number" if name in ONE_TOKEN else "must be lists of token numbers: [[3, 4], [7]]"
    for token in (token for row in rows for token in as_list(row)):
        if isinstance(token, bool) or not isinstance(token, int):
            return "must be a token's number" + "" if name in ONE_TOKEN else "must be token numbers: 3 or [3, 4]"
        if token < 0 or vocabulary and token >= vocabulary:
            return f"the model has no token {token}; they go from 0 to {vocabulary - 1 if vocabulary else '...'}"
    return None
