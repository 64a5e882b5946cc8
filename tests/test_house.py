# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The house: how long the files are, what stands in two of them, and which import which."""

import ast
import itertools

import pytest

from conftest import ROOT
from fix_copies import copy_into, read_blocks

SCRIPTS = sorted(ROOT.glob("run_*.py"))
COMPANIONS = (
    "guards.py",
    "tables.py",
    "chat_turns.py",
    "reports.py",
    "fast_batches.py",
    "cpu_dropout.py",
    "zero_adafactor.py",
    "lora.py",
    "checkpoints.py",
    "rank_watch.py",
    "generation_store.py",
    "flag_checks.py",
    "value_checks.py",
    "deepspeed_checks.py",
    "portable_checkpoints.py",
    "console.py",
    "step_figures.py",
    "closing.py",
    "model_card.py",
    "flag_help.py",
)
COMPANIONS = [ROOT / name for name in COMPANIONS]
PROOF = [ROOT / "check_run.py", ROOT / "check_run_shim.py"]
TOOLS = sorted([*ROOT.glob("data_prep/*.py"), *ROOT.glob("tools/*.py")])
# Every tool's and companion's own, as main() is, and which companions a script found.
OWN = {"parse_args", "check_args", "find_problems", "guards", "model_checks", "UsageError", "RowError"}

MOST_LINES = {
    "run_summarization.py": 800,
    "run_clm_instruct.py": 950,
    "run_generation.py": 800,
    "guards.py": 700,
    "checkpoints.py": 450,
    "rank_watch.py": 200,
    "flag_checks.py": 170,
    "value_checks.py": 300,
    "deepspeed_checks.py": 250,
    "portable_checkpoints.py": 300,
    "console.py": 200,
    "step_figures.py": 100,
    "closing.py": 170,
    "model_card.py": 120,
    "flag_help.py": 160,
    "tables.py": 350,
    "chat_turns.py": 150,
    "reports.py": 350,
    "lora.py": 100,
    "generation_store.py": 150,
    "model_checks.py": 150,
    "fast_batches.py": 450,
    "cpu_dropout.py": 100,
    "check_run.py": 245,
    "check_run_shim.py": 975,
    "zero_adafactor.py": 500,
    "README.md": 180,
}


def find_functions(path):
    """Every function and method of a file."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def find_imports(path) -> set[str]:
    """The first part of every module's name that a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", MOST_LINES)
def test_a_file_is_no_longer_than_a_person_reads(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MOST_LINES[name]


@pytest.mark.parametrize("path", [*SCRIPTS, *COMPANIONS, *TOOLS, *PROOF], ids=lambda path: path.name)
def test_no_function_is_longer_than_60_lines_but_main_which_has_80(path):
    for node in find_functions(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= (80 if node.name == "main" else 60), f"{node.name} has {length} lines"


PAIRS = [*itertools.combinations([*SCRIPTS, *COMPANIONS], 2), *itertools.combinations(TOOLS, 2)]


@pytest.mark.parametrize("first, second", PAIRS)
def test_what_two_scripts_share_is_the_same_code(first, second):
    ours, theirs = read_blocks(first), read_blocks(second)
    different = {name for name in (set(ours) & set(theirs)) - OWN if ours[name] != theirs[name]}
    assert not different, f"`make fix-copies FROM=...` carries {sorted(different)} over"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_less_than_a_third_of_a_script_stands_in_another(path):
    ours = read_blocks(path)
    elsewhere = {name: block for other in SCRIPTS if other != path for name, block in read_blocks(other).items()}
    shared = sum(len(block.splitlines()) for name, block in ours.items() if elsewhere.get(name) == block)
    assert shared < 0.30 * len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("path", [*SCRIPTS, *COMPANIONS], ids=lambda path: path.name)
def test_no_script_imports_another_and_no_companion_a_script(path):
    local = {other.stem for other in [*SCRIPTS, *COMPANIONS, *TOOLS]}
    allowed = {"guards", "model_checks"} if path in COMPANIONS else {companion.stem for companion in COMPANIONS}
    of_guards = {
        "checkpoints",
        "portable_checkpoints",
        "rank_watch",
        "flag_checks",
        "value_checks",
        "deepspeed_checks",
        "console",
        "closing",
    }
    allowed |= of_guards if path.name == "guards.py" else set()
    theirs = {
        "checkpoints.py": {"portable_checkpoints"},
        "console.py": {"step_figures"},
        "flag_checks.py": {"flag_help"},
    }
    allowed |= (theirs | {"closing.py": {"model_card"}}).get(path.name, set())
    assert find_imports(path) & local <= allowed - {path.stem}


def test_fix_copies_carries_the_good_version_over(tmp_path):
    good, old = tmp_path / "good.py", tmp_path / "old.py"
    good.write_text("A = 1\n\n\n# why\ndef f():\n    return A\n\n\ndef g():\n    pass\n")
    old.write_text('"""Doc."""\n\n\ndef f():\n    return 0\n\n\nA = 2\n\n\ndef main():\n    pass\n')
    assert sorted(copy_into(old, read_blocks(good))) == ["A", "f"]
    assert old.read_text() == '"""Doc."""\n\n\n# why\ndef f():\n    return A\n\n\nA = 1\n\n\ndef main():\n    pass\n'
