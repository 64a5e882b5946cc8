# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""
The flags of a script, read from its source and the library's: --help in a line a flag, --help_all with all the rest.

Optional beside flag_checks.py, which calls it before the libraries are loaded (hence ast, and no import of theirs).
"""

import ast
import importlib.util
import os
import re
import shutil
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

Flag = namedtuple("Flag", "name kind default help")

# Where the library has the flags of what a script's source names.
SOURCES = {"Seq2SeqTrainingArguments": ("training_args.py", "training_args_seq2seq.py")}
SOURCES["GenerationConfig"] = ("generation/configuration_utils.py",)

# Of the library's flags, those that --help shows.
COMMON = """
output_dir do_train do_eval do_predict num_train_epochs max_steps per_device_train_batch_size
per_device_eval_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type warmup_steps optim weight_decay
label_smoothing_factor bf16 activation_checkpointing deepspeed eval_strategy eval_steps eval_on_start logging_steps
save_strategy save_steps save_total_limit load_best_model_at_end metric_for_best_model predict_with_generate seed
report_to run_name resume_from_checkpoint train_sampling_strategy dataloader_num_workers use_cpu
num_beams max_new_tokens min_new_tokens do_sample temperature top_k top_p min_p repetition_penalty
no_repeat_ngram_size length_penalty early_stopping
""".split()

# What the scripts make of a flag of the library's.
REWORDED = {"logging_steps": "Steps from a loss to the next. Default: so many that there are fifty, ten at most."}
REWORDED["bf16"] = "Compute in bf16. Default: where the device is fast at it."


def answer_help(script: str, argv: list[str]) -> None:
    """Print the help that is asked for, on the first rank, and end."""
    asked = {"-h", "--help", "--help_all"} & set(argv)
    if asked:
        try:
            if int(os.environ.get("RANK", 0)) == 0:
                print(write_help(script, "--help_all" in asked), flush=True)
        except BrokenPipeError:  # into head, or a pager that was left
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)


def write_help(script: str, whole: bool = False) -> str:
    """What a script is for and its flags by groups, its own first; each flag once."""
    groups, width = read_groups(script), shutil.get_terminal_size((119, 0)).columns
    doc = ast.get_docstring(ast.parse(Path(script).read_text(encoding="utf-8")))
    lines, seen = [doc.split("\n")[0], "", f"python {Path(script).name} [ARGUMENTS.json] --flag value ..."], set()
    for title, flags, is_own in groups:
        shown = [flag for flag in flags if (whole or is_own or flag.name in COMMON) and flag.name not in seen]
        seen |= {flag.name for flag in shown}
        lines += ["", title, *(line for flag in shown for line in describe_flag(flag, width, whole))] if shown else []
    rest = sum(flag.name not in seen for _, flags, _ in groups for flag in flags)
    return "\n".join([*lines, "", f"--help_all has {rest} more flags, and all in full."] if not whole else lines)


def describe_flag(flag: Flag, width: int, whole: bool) -> list[str]:
    """A flag in one line as wide as the terminal, or with all that its help says."""
    head = f"  --{flag.name} {flag.kind}".ljust(36)
    default = f" (default: {flag.default})" if flag.default and "efault" not in flag.help else ""
    text = " ".join(f"{flag.help}{default}".replace("`", "").split())
    if whole:
        return textwrap.wrap(f"{head}  {text}", width, subsequent_indent=" " * 8, break_on_hyphens=False)
    room = width - len(head) - 2
    return [f"{head}  {text if len(text) <= room else text[: room - 2].rsplit(' ', 1)[0] + ' …'}".rstrip()]


# ------------------------------------------------------------------------------------------------ read from source


def read_groups(script: str) -> list[tuple[str, list[Flag], bool]]:
    """(title, flags, whether they are the script's own) of each dataclass and of the library's that it takes."""
    text = Path(script).read_text(encoding="utf-8")
    found = importlib.util.find_spec("transformers")
    if found is None:
        sys.exit(
            f"error: transformers is not installed for {sys.executable}: pip install -r requirements.txt, in its order"
        )
    library = Path(found.origin).parent
    own = [(ast.get_docstring(node), read_class(node), True) for node in find_classes(text)]
    groups = [group for group in own if group[1]]
    for word, paths in SOURCES.items():
        sources = [(library / path).read_text(encoding="utf-8") for path in paths if word in text]
        read = read_generation if word == "GenerationConfig" else read_fields
        if flags := [flag for source in sources for flag in read(source, text)]:
            groups.append((f"The library's {word}.", flags, False))
    return groups


def find_classes(text: str) -> list[ast.ClassDef]:
    """The dataclasses of arguments in a source."""
    nodes = (node for node in ast.parse(text).body if isinstance(node, ast.ClassDef))
    return [node for node in nodes if node.name.endswith("Arguments")]


def read_fields(source: str, script: str) -> list[Flag]:
    return [flag for node in find_classes(source) for flag in read_class(node)]


def read_class(node: ast.ClassDef) -> list[Flag]:
    """The flags that a dataclass's fields are."""
    flags = []
    for field in (part for part in node.body if isinstance(part, ast.AnnAssign)):
        given = {word.arg: word.value for word in getattr(field.value, "keywords", ())}
        metadata = given.get("metadata")
        pairs = zip(metadata.keys, metadata.values, strict=True) if isinstance(metadata, ast.Dict) else ()
        given |= {key.value: value for key, value in pairs if isinstance(key, ast.Constant)}
        if "init" not in given and not field.target.id.startswith("_"):
            name, default, kind = field.target.id, given.get("default"), name_kind(ast.unparse(field.annotation))
            is_switch = kind == "[true|false]" and getattr(default, "value", None) is False
            text = REWORDED.get(name) or read_value(given.get("help"))
            flags.append(Flag(name, "" if is_switch else kind, read_value(default), text))
    return flags


def read_value(node: ast.expr | None) -> str:
    """A constant as text; nothing of None, False, and what is no constant."""
    value = getattr(node, "value", None) if isinstance(node, ast.Constant) else None
    if isinstance(node, ast.UnaryOp):
        return ast.unparse(node)
    return "" if value is None or value is False else str(value)


def name_kind(annotation: str) -> str:
    """What a flag takes, in a word."""
    for part, kind in (("list[", "TEXT ..."), ("bool", "[true|false]"), ("int", "N"), ("float", "X")):
        if re.search(rf"(?<!\w){re.escape(part)}", annotation) and (part != "int" or "float" not in annotation):
            return kind
    return "JSON" if "dict" in annotation and "str" not in annotation else "TEXT"


def read_generation(source: str, script: str) -> list[Flag]:
    """The fields that GenerationConfig takes, with what its docstring says of each, but for the script's NOT_FLAGS."""
    left_out = set(re.findall(r'"(\w+)"', "".join(re.findall(r"^NOT_FLAGS.*$", script, re.MULTILINE))))
    names = dict.fromkeys(re.findall(r"^        self\.(\w+) = kwargs\.pop", source, re.MULTILINE))
    told = re.findall(r"^        (\w+):? \(([^)]*)\).*?:\n((?:^ {12}.*\n|^\n)+)", source, re.MULTILINE)
    texts = {name: (kind.replace("`", "").split(",")[0], text) for name, kind, text in told}
    found = ((name, *texts.get(name, ("str", ""))) for name in names if name not in left_out)
    return [Flag(name, name_kind(kind), "", text) for name, kind, text in found]


def list_flags(script: str) -> set[str]:
    """The names of all flags of a script, with two dashes."""
    return {f"--{flag.name}" for _, flags, _ in read_groups(script) for flag in flags}
