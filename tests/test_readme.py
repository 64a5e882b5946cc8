# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What README.md and docs/ say holds: their commands parse, and are those of make; what they name exists."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import HfArgumentParser

import dataset_size
import deepspeed_checks
import guards
import init_model
import measure_dataset
import plan_run
import prepare_reviews
import run_clm_instruct
import run_generation
import run_summarization
from conftest import ROOT

sys.path[:0] = [str(ROOT / "launchers"), str(ROOT / "benchmarks")]

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def find_blocks(text: str, language: str = "") -> list[list[str]]:
    """The lines of every code block of a language, those that end in a backslash joined; of none: commands."""
    parts = re.split(r"^```(\w*)\n", text, flags=re.M)  # text, language, block, "", text, language, ...
    blocks = [block for name, block in zip(parts[1::4], parts[2::4], strict=True) if name == language]
    return [block.replace("\\\n", " ").splitlines() for block in blocks]


BLOCKS = [block for text in TEXTS.values() for block in find_blocks(text)]
COMMANDS = [command for block in BLOCKS for command in block]


def find_words(script: str) -> list[list[str]]:
    """What stands after a script, in each command that starts it."""
    found = []
    for words in map(shlex.split, COMMANDS):
        places = [i for i, word in enumerate(words) if Path(word).name == script and words[i - 1] != "--script"]
        found += [words[i + 1 :] for i in places]
    return found


# ------------------------------------------------------------------------------------------------ size


def test_the_readme_is_one_page():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 180 and len(text.split()) <= 1700


def test_every_page_of_docs_is_linked_in_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", TEXTS["README.md"]))
    assert linked == set(PAGES) - {"README.md"}


# ------------------------------------------------------------------------------------------------ commands

# Checked below, one test each.
SCRIPTS = {"run_summarization.py", "run_clm_instruct.py", "run_generation.py"}
PROOF = {"check_run.py"}
LAUNCHERS = {"spark_train.py", "spark_generate.py", "ray_train.py", "ray_generate.py", "mlflow_model.py"}
TOOLS = {path.name for folder in ("tools", "data_prep") for path in (ROOT / folder).glob("*.py")}
BENCHMARKS = {path.name for path in (ROOT / "benchmarks").glob("*.py")}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_starts_something_that_is_there_and_tested(command):
    words = shlex.split(command)
    scripts = [word for word in words if word.endswith(".py")]
    if words[0] in ("python", "deepspeed", "torchrun"):
        assert scripts and all((ROOT / script).is_file() for script in scripts)
        assert {Path(script).name for script in scripts} <= SCRIPTS | PROOF | LAUNCHERS | TOOLS | BENCHMARKS
    else:
        assert words[0] in ("make", "curl") or words[:3] == ["pip", "install", "-r"] and (ROOT / words[3]).is_file()


TRAINING = {
    "run_summarization.py": (run_summarization.SUMMARIZATION_ARGUMENTS, run_summarization.find_companion_problems),
    "run_clm_instruct.py": (run_clm_instruct.INSTRUCT_ARGUMENTS, run_clm_instruct.find_instruct_problems),
}


@pytest.mark.parametrize("name, words", [(name, words) for name in TRAINING for words in find_words(name)])
def test_every_training_command_parses_and_its_files_agree_with_its_flags(name, words):
    classes, find_problems = TRAINING[name]
    parser = HfArgumentParser(classes)
    args = parser.parse_args(guards.read_arguments(parser, words))
    assert find_problems(args) == deepspeed_checks.find_problems(args) == []


@pytest.mark.parametrize("words", find_words("run_generation.py") + find_words("spark_generate.py"))
def test_every_generation_command_parses_and_its_decoding_flags_agree(words):
    args, _ = run_generation.make_parser().parse_known_args(words)
    names = {name for cls in run_generation.GENERATION_ARGUMENTS for name in cls.__dataclass_fields__}
    decoding = {name: value for name, value in vars(args).items() if name not in names}
    assert guards.find_decoding_problems(decoding) == []
    assert deepspeed_checks.find_zero3_problems(args) == []


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"(python|torchrun [-\w ]+) run_|deepspeed ", c)])
def test_a_deepspeed_file_is_given_to_the_runner_of_deepspeed(command):
    words = shlex.split(command)
    assert ("--deepspeed" in words) == (words[0] == "deepspeed")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("deepspeed ")])
def test_what_stands_before_the_script_is_the_runner_s_of_deepspeed(command):
    from deepspeed.launcher import runner

    args = runner.parse_args(shlex.split(command)[1:])
    assert args.user_script in SCRIPTS and args.num_gpus == -1
    if "--hostfile" in command:
        assert (ROOT / args.hostfile).is_file()
        assert args.node_rank < len(runner.fetch_hostfile(str(ROOT / args.hostfile)))


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("torchrun ")])
def test_what_stands_before_the_script_is_torchrun_s(command):
    from torch.distributed.run import parse_args

    assert parse_args(shlex.split(command)[1:]).training_script in SCRIPTS


@pytest.mark.parametrize("words", find_words("spark_train.py"))
def test_every_training_command_on_spark_parses(words):
    args = importlib.import_module("spark_train").parse_launch_arguments(words)
    assert args.script == "run_summarization.py" and args.script_args[0].startswith("--")


@pytest.mark.parametrize("words", find_words("spark_generate.py"))
def test_every_generation_command_on_spark_parses(words):
    _, rest = importlib.import_module("spark_generate").parse_spark_arguments(words)
    run_generation.make_parser().parse_args(rest)
    assert "--num_beams" in rest


@pytest.mark.parametrize("name", ["ray_train", "ray_generate"])
def test_every_command_on_ray_parses(name):
    pytest.importorskip("ray")
    for words in find_words(f"{name}.py"):
        args = importlib.import_module(name).parse_launcher_arguments(words)
        assert args.script in SCRIPTS and args.arguments


def test_the_commands_on_spark_and_ray_are_there():
    counts = {name: len(find_words(name)) for name in LAUNCHERS}
    assert all(counts.values()) and counts["spark_train.py"] == 2
    assert any(prepare_reviews.parse_args(words).engine == "spark" for words in find_words("prepare_reviews.py"))


@pytest.mark.parametrize("name, words", [(name, words) for name in sorted(TOOLS) for words in find_words(name)])
def test_every_tool_s_command_parses(name, words):
    args = importlib.import_module(Path(name).stem).parse_args(words)
    for flag in ("input_file", "train_file", "input_table"):  # no path of one's own machine
        assert not str(getattr(args, flag, None)).startswith("/")


def test_the_command_that_logs_a_model_parses(monkeypatch):
    module = importlib.import_module("mlflow_model")
    monkeypatch.setattr(module, "find_problems", lambda args: [])  # there is no model here, perhaps no mlflow
    (words,) = find_words("mlflow_model.py")
    assert module.parse_args(words).name == "summarizer"


@pytest.mark.parametrize("name, words", [(name, words) for name in sorted(BENCHMARKS) for words in find_words(name)])
def test_every_benchmark_s_command_parses(name, words, monkeypatch):
    module = importlib.import_module(Path(name).stem)
    if name == "start_up.py":  # a script and its arguments
        assert words[0] in SCRIPTS and (ROOT / words[0]).is_file()
    elif hasattr(module, "parse_arguments"):
        monkeypatch.setattr(sys, "argv", [name, *words])
        module.parse_arguments()
    else:
        known = set(re.findall(r'"(--\w+)"', (ROOT / "benchmarks" / name).read_text(encoding="utf-8")))
        if name == "latency.py":  # all other flags are the script's
            known |= {flag for action in run_generation.make_parser()._actions for flag in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("words", find_words("plan_run.py"))
def test_every_planning_command_names_a_preset(words):
    assert plan_run.parse_args(words).model in init_model.T5_PRESETS | init_model.LLAMA_PRESETS


def test_the_pages_show_how_to_look_at_data():
    assert len(find_words("dataset_size.py")) == 2 and len(find_words("measure_dataset.py")) == 3
    for words in find_words("measure_dataset.py"):
        args = measure_dataset.parse_args(words)
        assert measure_dataset.check_args(args) == []
        assert args.train_file.startswith("data/") and args.output_dir.startswith("reports/") or "ja.csv" in words
    assert all(dataset_size.parse_args(words) for words in find_words("dataset_size.py"))


def test_the_model_from_scratch_has_a_known_shape():
    japanese, words = find_words("init_model.py")
    assert init_model.parse_args(words).preset == "t5-small"
    assert init_model.parse_args(japanese).train_file == ["ja.csv"]


def test_the_request_to_a_served_model_is_one():
    (command,) = [c for c in COMMANDS if c.startswith("curl ")]
    words = shlex.split(command)
    request = json.loads(words[words.index("-d") + 1])
    assert request["dataframe_records"] == [{"text": "The lens is great."}]
    assert request["params"].keys() <= importlib.import_module("mlflow_model").PARAMS.keys()
    (port,) = re.findall(r"^PORT \?= (\d+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert f"http://127.0.0.1:{port}/invocations" in words


# ------------------------------------------------------------------------------------------------ make


def dry_run(command: str) -> list[list[str]]:
    """
    The commands that a make target runs, as words, as if the environment were there and active.

    `.venv/bin/python` counts as `python`, and what puts the environment in front of PATH is left out.
    """
    installed = [word for name in (".core", ".dev", ".launchers", ".try") for word in ("-o", f".venv/{name}")]
    make = ["make", "-n", *installed, "VENV=.venv", "PYTHON=python", *shlex.split(command)[1:]]
    # The tests may run under `make test`: a make below it would say which folder it enters, and take its flags.
    outer = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}
    env = {name: value for name, value in os.environ.items() if name not in outer}
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").replace(".venv/bin/python ", "python ").splitlines()
    return [shlex.split(re.sub(r'^PATH="[^"]*" ', "", line)) for line in lines]


MADE = sorted({command for command in COMMANDS if command.startswith("make ")})
# A target, and the commands that stand below it in its block.
SHOWN = [
    (target, [shlex.split(command) for command in rest.splitlines()])
    for block in BLOCKS
    for target, rest in re.findall(r"^(make .*)\n((?:(?!make ).+\n)+)", "\n".join(block) + "\n", re.M)
]


@pytest.mark.parametrize("command", MADE)
def test_every_make_target_named_exists(command):
    assert dry_run(command)


def test_every_target_of_a_recipe_is_shown_with_its_command():
    named = {target.split()[1] for target, _ in SHOWN}
    ladder = {"train-t5-small", "train-t5-large", "train-t5-11b", "train-llama2-7b", "train-llama3-8b"}
    assert ladder | {"prep-reviews", "prep-instruct", "generate", "summarize-products", "copy", "bench-gpu"} <= named
    assert {"make demo", "make test"} <= set(MADE)


@pytest.mark.parametrize("target, commands", SHOWN)
def test_a_make_target_runs_the_command_that_stands_below_it(target, commands):
    assert dry_run(target) == commands


def test_every_target_is_phony_on_a_line_of_its_group():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = [line.split()[1:] for line in re.findall(r"^\.PHONY: .*$", makefile, re.M)]
    targets = re.findall(r"^([a-z][a-z0-9-]*):(?! \w+ =)", makefile, re.M)
    assert len(phony) > 1 and sorted(sum(phony, [])) == sorted(targets)


# ------------------------------------------------------------------------------------------------ names in the text


def test_the_readme_says_what_each_companion_costs_with_the_words_of_the_scripts():
    costs = {
        "guards.py": "bad input ends late, in a traceback; a killed run goes on only with --resume_from_checkpoint; "
        "no curves or model card, and two runs in MLflow",
        "tables.py": "data as .csv, .json, .jsonl, .parquet or .txt only, and columns are not checked to be text",
        "model_checks.py": "a model that lacks weights, or has another's tokenizer, is trained all the same",
        "reports.py": "no audit of labels, no samples, no list of decisions",
        "fast_batches.py": "about twice the time, more memory",
        "zero_adafactor.py": "4 bytes of state a parameter, updates that depend on the number of ranks",
    }
    dropout = {"cpu_dropout.py": "torch draws T5's dropout masks: a step takes about a third longer"}
    rows = dict(re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", TEXTS["README.md"].replace("`--", "--"), re.M))
    chats = {"chat_turns.py": "rows with tools, tool calls, reasoning or weights are left out"}
    store = {"generation_store.py": "a run that is killed begins again"}
    assert rows.keys() == {*costs, *chats, *dropout, *store, "lora.py"}
    for found, wanted in (
        (run_summarization.ABSENT, costs | dropout),
        (run_clm_instruct.ABSENT, costs | chats),
        ({name: run_generation.WITHOUT[name] for name in store}, store),
    ):
        assert found.keys() == wanted.keys()
        for name, cost in wanted.items():
            assert cost in rows[name].replace("`", "") and cost.split(", ")[-1] in found[name]


def find_known_flags() -> set[str]:
    """Every flag of a script, a tool, a launcher, a benchmark, and of the two runners."""
    parsers = [HfArgumentParser(classes) for classes, _ in TRAINING.values()] + [run_generation.make_parser()]
    known = {flag for parser in parsers for action in parser._actions for flag in action.option_strings}
    for folder in ("tools", "data_prep", "launchers", "benchmarks"):
        for path in (ROOT / folder).glob("*.py"):
            known |= set(re.findall(r'"(--\w+)"', path.read_text(encoding="utf-8")))
    known |= set(re.findall(r'"(--\w+)"', (ROOT / "check_run.py").read_text(encoding="utf-8")))
    return known | {"--help_all", "--hostfile", "--master_addr", "--no_ssh", "--node_rank", "--master_port"}


@pytest.mark.parametrize("page", TEXTS)
def test_every_flag_named_is_one(page):
    spans = re.findall(r"`([^`\n]+)`", "".join(re.split(r"^```\w*\n", TEXTS[page], flags=re.M)[::2]))
    flags = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z]\w*", span)}
    assert flags <= find_known_flags()


def test_every_decoding_flag_named_is_one():
    (paragraph,) = re.findall(r"^- \*\*Decoding\*\*(.*?)^- ", TEXTS["docs/generation.md"], re.S | re.M)
    flags = re.findall(r"`--([a-z_]+)[^`]*`", paragraph)
    known = {action.dest for action in run_generation.make_parser()._actions}
    assert len(flags) >= 6 and set(flags) <= known


@pytest.mark.parametrize("name", TRAINING)
def test_the_defaults_named_are_those_of_the_script(name):
    page = {"run_summarization.py": "docs/summarization.md", "run_clm_instruct.py": "docs/instruct.md"}[name]
    parser = HfArgumentParser(TRAINING[name][0])
    named = re.findall(r"^\| `--(\w+)` \| ([\w.]+) \|", TEXTS[page], re.M)
    defaults = {"none": "None", "off": "False"}
    for flag, default in named:
        assert str(parser.get_default(flag)) == defaults.get(default, default), flag
    assert named


FOLDERS = "ds_configs|launchers|data_prep|tools|docs|benchmarks|tests"


@pytest.mark.parametrize("page", [*TEXTS, "RESULTS.md"])
def test_every_file_named_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(rf"\b(?:{FOLDERS})/\w+(?:\.\w+)+", TEXTS.get(page, "")):  # results name files of their day
        assert (ROOT / path).is_file(), path
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles], link


def test_every_file_of_the_list_exists_and_every_script_is_in_it():
    (lines,) = find_blocks(TEXTS["docs/files.md"], "text")
    named = {line.split()[0] for line in lines}
    for name in named:
        assert (ROOT / name).exists(), name
    for pattern in ("*.py", "data_prep/*.py", "tools/*.py"):
        assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)} <= named


# ------------------------------------------------------------------------------------------------ results


def test_results_are_dated_sections_without_crowded_tables():
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    titles = [title for title in re.findall(r"^## (.*)$", text, re.M) if title != "Contents"]
    assert len(titles) > 20 and all(re.match(r"2\d{3}-\d\d-\d\d: \w", title) for title in titles)
    assert all(len(cell) <= 120 for line in text.splitlines() if line.startswith("|") for cell in line.split("|"))
