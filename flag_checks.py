# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""
Whether flags are spelt right and have values of their types: all that are not, said at once, with the nearest name.

Optional beside guards.py and the run_*.py. In the order in which a run meets them: answer_unknown_flags (before the
libraries are loaded, which is why none is imported here), find_flag_problems, find_value_problems.
"""

import argparse
import difflib
import json
import os
import sys

try:
    import flag_help
except ModuleNotFoundError:  # then argparse itself answers --help, and later
    flag_help = None

# Flags of older versions, transformers' and ours, and of tools, and what says the same today.
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
    "--compare_decoding": "python tools/compare_decoding.py compares ways to decode, with the other flags as they are",
}
MOST_SENTENCES = 5

# Flags that hold a JSON object: in a file of arguments it may be one.
JSON_FLAGS = "lr_scheduler_kwargs activation_checkpointing_kwargs gradient_checkpointing_kwargs accelerator_config "
JSON_FLAGS += "fsdp_config liger_kernel_config"


def suggest(name: str, known, mark: str = "") -> str:
    """ ", did you mean NAME?" of the nearest name, or nothing."""
    near = difflib.get_close_matches(name, list(known), 1, 0.7)
    return f"; did you mean {mark}{near[0]}?" if near else ""


def answer_unknown_flags(name: str, script: str, argv: list[str]) -> None:
    """End a script that runs as `name` where a flag is none (exit code 2) or asks for help, without the libraries."""
    if name != "__main__" or flag_help is None:
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's remarks, a rank each; read when torch is loaded
    flag_help.answer_help(script, argv)
    known = flag_help.list_flags(script) | {"--deepspeed_config"}
    problems = find_unknown_flags(argv, known | {f"--no_{flag[2:]}" for flag in known})
    if problems:
        if int(os.environ.get("RANK", 0)) == 0:
            print("".join(f"\nerror: {line}" for line in problems), file=sys.stderr, flush=True)
        sys.exit(2)


def is_flag(word: str) -> bool:
    return word.startswith("--") and len(word) > 2 and " " not in word.split("=")[0]


def find_unknown_flags(argv: list[str], known: set[str]) -> list[str]:
    """A sentence for each flag that another replaces or that begins none of the known ones."""
    flags = {word.split("=")[0].replace("-", "_").replace("__", "--", 1): None for word in argv if is_flag(word)}
    problems = [f"{flag} is no flag: {REPLACED_FLAGS[flag]}" for flag in flags if flag in REPLACED_FLAGS]
    unknown = [f for f in flags if f not in REPLACED_FLAGS and not any(name.startswith(f) for name in known)]
    names = [name[2:] for name in known if not name.startswith("--no_")]
    problems += [f"{f}: no such flag{suggest(f[2:], names, '--') or '; --help lists all'}" for f in unknown]
    more = len(problems) - MOST_SENTENCES
    return problems[:MOST_SENTENCES] + ([f"and {more} more flags that are none"] if more > 0 else [])


def find_flag_problems(parser: argparse.ArgumentParser, argv: list[str]) -> list[str]:
    """Flags that are none, that lack a value or have one of another type: all of them, where argparse names one."""
    known, groups = parser._option_string_actions, []
    for word in argv:
        if is_flag(word):
            flag, *value = word.split("=", 1)
            groups.append((flag, value))
        elif groups:
            groups[-1][1].append(word)
    problems = find_unknown_flags(argv, {name for name in known if "-" not in name[2:]} | {"--deepspeed_config"})
    for flag, values in groups:
        matches = {id(a): a for name, a in known.items() if name == flag} or {
            id(a): a for name, a in known.items() if name.startswith(flag)
        }
        if len(matches) != 1:
            continue
        action = next(iter(matches.values()))
        if not values and action.nargs in (None, "+"):
            problems.append(f"{flag}: needs a value,{describe_type(action)}")
        if len(values) > 1 and action.nargs in (None, "?"):
            problems.append(f"{flag} {' '.join(values)}: takes one value; put quotes around one with spaces")
        for value in values[: 1 if action.nargs != "+" else None]:
            if value == "" and action.dest not in ("source_prefix", "fsdp"):
                problems.append(f"{flag} '': is empty; give a value or leave the flag out")
            elif not fits(action, value):
                problems.append(f"{flag} {value}: must be{describe_type(action, value)}")
    return problems


def fits(action: argparse.Action, value) -> bool:
    """Whether a value, of a command line or of a JSON file, is of an action's type."""
    if value is None:
        return action.default is None
    kind, name = action.type, getattr(action.type, "__name__", "")
    if isinstance(value, str):
        try:
            value = value if kind is None else kind(value)
            return action.choices is None or value in action.choices
        except (ValueError, TypeError, AttributeError, argparse.ArgumentTypeError):
            return False
    if name == "parse_value":
        return True
    if isinstance(value, list):
        is_list = action.nargs == "+" or action.dest in ("report_to", "debug", "optim_target_modules")
        return is_list and all(isinstance(item, str) and fits(action, item) for item in value)
    if isinstance(value, dict):
        return action.dest in JSON_FLAGS.split()
    if isinstance(value, bool):
        return name == "string_to_bool" or kind is None
    return kind is float or kind is int and isinstance(value, int)


def describe_type(action: argparse.Action, value: str = "") -> str:
    """What an action's value must be, after a space."""
    known = {int: " a whole number", float: " a number", str: " a text"}
    if action.type in known:
        return ("" if action.nargs != "+" else " a list, each") + known[action.type]
    if getattr(action.type, "__name__", "") == "string_to_bool":
        return " true or false"
    choices = list_choices(action)
    if choices:
        near = suggest(str(value), choices)
        return f" one of {', '.join(choices)}{near}" if len(choices) < 20 else f" one that the library knows{near}"
    return f" a {getattr(action.type, '__name__', 'value')}, which no command line can give; leave it out"


def list_choices(action: argparse.Action) -> list[str]:
    """What an action's value is chosen from: its own list, or the members of an enumeration."""
    members = getattr(action.type, "__members__", {}).values()
    return [str(choice) for choice in action.choices or (member.value for member in members)]


def find_value_problems(parser: argparse.ArgumentParser, values, path: str) -> list[str]:
    """What is wrong with the content of a .json file of arguments."""
    if not isinstance(values, dict):
        return [f"{path}: not a JSON object of arguments but a {type(values).__name__}"]
    actions = {action.dest: action for action in reversed(parser._actions)}
    unknown = [name for name in values if name not in actions]
    problems = [f"{path}: no such argument: {name}{suggest(name, actions)}" for name in unknown]
    wrong = [n for n, value in values.items() if n in actions and not fits(actions[n], value)]
    return problems + [f"{path}: {n} is {json.dumps(values[n])}: must be{describe_type(actions[n])}" for n in wrong]
