# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/copy_script.py: a script with all that it uses, each in its place, and nothing of the other side's lost."""

import re
import sys
from pathlib import Path

import pytest

import copy_script as tool
from conftest import ROOT, run

OF_GUARDS = ["checkpoints.py", "deepspeed_checks.py", "flag_checks.py"]
OF_GUARDS += ["closing.py", "console.py", "flag_help.py", "model_card.py", "step_figures.py"]
OF_GUARDS += ["portable_checkpoints.py", "rank_watch.py", "value_checks.py"]
COMPANIONS = [*OF_GUARDS, "fast_batches.py", "guards.py", "model_checks.py", "reports.py", "tables.py"]
COMPANIONS += ["zero_adafactor.py"]
GENERATION = [*OF_GUARDS, "chat_turns.py", "generation_store.py", "guards.py", "lora.py", "model_checks.py"]
GENERATION += ["data_prep/whole_files.py", "tables.py", "tools/merge_lora.py"]
SIZE_TABLE = ["benchmarks/generation_speed.py", "benchmarks/latency.py", "cpu_dropout.py", "data_prep/brief_parser.py"]
SIZE_TABLE += ["run_generation.py", "run_summarization.py"]
CHAT = ["chat_turns.py", "data_prep/whole_files.py", "lora.py", "tools/merge_lora.py"]
CHAT += [f"prompt_templates/{name}.jinja" for name in ("alpaca", "chatml", "llama2")]


def copy(script: str, to: Path, *ds_configs: str) -> int:
    flags = ["--ds_configs", *ds_configs] if ds_configs else []
    return tool.main(["--script", script, "--to", str(to), *flags])


def list_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "script, used",
    [
        ("run_summarization.py", ["cpu_dropout.py", *COMPANIONS]),
        ("run_clm_instruct.py", [*COMPANIONS, *CHAT]),
        ("run_generation.py", GENERATION),
        ("check_run.py", ["check_run_page.html.jinja", "check_run_shim.py"]),
        ("guards.py", OF_GUARDS),
        ("tools/try_model.py", ["run_generation.py", "tools/try_page.py", *GENERATION]),
        ("tools/size_table.py", sorted({"tools/size_table.html.jinja", *SIZE_TABLE, *COMPANIONS, *GENERATION})),
        (
            "tools/evaluation_report.py",
            ["reports.py", *OF_GUARDS, "guards.py", "model_checks.py", "tools/evaluation_report.html.jinja"],
        ),
        (
            "tools/compare_decoding.py",
            ["run_generation.py", "reports.py", "tools/compare_decoding.html.jinja", *GENERATION],
        ),
        ("tools/merge_lora.py", ["data_prep/whole_files.py"]),
        ("tools/plan_run.py", ["data_prep/whole_files.py", "tools/init_model.py", "zero_adafactor.py"]),
    ],
)
def test_a_script_comes_with_what_it_uses_and_with_nothing_else(script, used, tmp_path, capsys):
    assert copy(script, tmp_path / "new/mine") == 0
    assert list_files(tmp_path / "new/mine") == sorted([script, *used])
    for name in (script, *used):
        assert (tmp_path / "new/mine" / name).read_bytes() == (ROOT / name).read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{tmp_path}/new/mine/{script}: ") and len(lines) == 1 + len(used)
    known = r"\S+\.py: [A-Z].{30,}\.|\S+\.jinja: (--prompt_template \w+|A report's page)"
    assert all(re.fullmatch(known, line) for line in lines)


def test_the_programs_that_scripts_start_are_known():
    for script in [*sorted(ROOT.glob("run_*.py")), ROOT / "lora.py"]:
        named = re.findall(r"tools/\w+\.py|\"tools\" / \"\w+\.py\"", script.read_text())
        called = {name.replace('" / "', "/").strip('"') for name in named} - {"tools/join_models.py"}  # only spoken of
        assert called == set(tool.STARTED.get(script.name, [])), script.name


def test_ds_configs_come_along_with_their_stage(tmp_path, capsys):
    assert copy("run_summarization.py", tmp_path, "zero2.json", "ds_configs/zero3_offload.json") == 0
    copied = ["ds_configs/zero2.json", "ds_configs/zero3_offload.json"]
    assert [name for name in list_files(tmp_path) if name.endswith("json")] == copied
    lines = capsys.readouterr().out.splitlines()[-2:]
    assert lines[0] == f"{tmp_path}/{copied[0]}: DeepSpeed, ZeRO stage 2"
    assert (
        lines[1]
        == f"{tmp_path}/{copied[1]}: DeepSpeed, ZeRO stage 3, optimizer in host memory, weights in host memory"
    )


def test_equal_files_stay_and_missing_ones_are_added(tmp_path, capsys):
    copy("run_summarization.py", tmp_path)
    (tmp_path / "guards.py").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    capsys.readouterr()
    assert copy("run_summarization.py", tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (
        capsys.readouterr().out.count(" (was there): ") == len(COMPANIONS) + 1 and (tmp_path / "guards.py").is_file()
    )


def test_files_that_differ_are_all_named_and_nothing_is_copied(tmp_path, capsys):
    (tmp_path / "ds_configs").mkdir()
    mine = [tmp_path / name for name in ("guards.py", "ds_configs/zero2.json")]
    for path in mine:
        path.write_text("mine")
    assert copy("run_summarization.py", tmp_path, "zero2.json") == 2
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1 and "holds other versions, kept as they are: guards.py, ds_configs/zero2.json;" in said
    )
    assert list_files(tmp_path) == ["ds_configs/zero2.json", "guards.py"]
    assert [path.read_text() for path in mine] == ["mine", "mine"]


def test_unknown_names_are_told_at_once_with_those_there_are(tmp_path, capsys):
    assert copy("run_sumarization.py", tmp_path / "new", "zero9.json") == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "SCRIPT=run_sumarization.py: no script" in told[0] and "run_summarization.py" in told[0]
    assert "DS_CONFIGS=zero9.json: no such file" in told[1] and "zero2.json, " in told[1]
    (tmp_path / "file").write_text("")
    for to, said in ((tmp_path / "file/in", "/file is a file"), (ROOT, "is this repository"), ("", "TO is empty")):
        assert copy("run_summarization.py", to) == 2
        assert said in capsys.readouterr().err
    assert copy("../etc/x.py", tmp_path) == 2 and not (tmp_path / "new").exists()


def test_make_copy_is_this_tool(tmp_path):
    to = tmp_path / "my project"
    words = [
        "make",
        f"PYTHON={sys.executable}",
        "copy",
        "SCRIPT=run_generation.py",
        f"TO={to}",
        "DS_CONFIGS=zero2.json zero3.json",
    ]
    done = run(words, cwd=ROOT)
    configs = ["ds_configs/zero2.json", "ds_configs/zero3.json"]
    assert list_files(to) == sorted([*configs, *GENERATION, "run_generation.py"])
    assert f"{to}/run_generation.py: " in done.stdout
