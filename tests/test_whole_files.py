# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""whole_files.py: output that appears whole, once, and is known again. The tools of tools/ use it too."""

import argparse
import os

import pytest

from whole_files import Output, describe_command

NAMES = ("a.txt", "deep/b.txt")


def write(folder):
    (folder / "deep").mkdir()
    for name in NAMES:
        (folder / name).write_text(name)
        (folder / name).chmod(0o600)  # as safetensors does


@pytest.fixture
def made(tmp_path):
    Output(tmp_path / "out", "tool", "command").write(write)
    return tmp_path / "out"


def list_names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_files_have_the_modes_that_the_umask_says(tmp_path):
    old = os.umask(0o027)
    try:
        Output(tmp_path, "tool", "command").write(write)
    finally:
        os.umask(old)
    assert {oct((tmp_path / name).stat().st_mode & 0o777) for name in NAMES} == {"0o640"}


def test_what_a_training_says_of_itself_beside_its_model_decides_nothing(tmp_path):
    args = argparse.Namespace(dtype="float32", output_dir="a")
    for name in ("adapter_model.safetensors", "trainer_state.json", "complete.json", "all_results.json", "curves.png"):
        (tmp_path / name).write_text("1")
    before = describe_command(args, tmp_path)
    for name in ("trainer_state.json", "complete.json", "all_results.json", "curves.png"):
        (tmp_path / name).write_text("2")
    assert describe_command(args, tmp_path) == before
    (tmp_path / "adapter_model.safetensors").write_text("2")
    assert describe_command(args, tmp_path) != before


def test_only_the_command_that_made_it_knows_an_output_and_only_unchanged(made):
    assert list_names(made) == [".tool.complete.json", *NAMES]
    assert Output(made, "tool", "command").is_finished()
    assert not Output(made, "tool", "another").is_finished()
    assert not Output(made, "other", "command").is_finished()
    (made / "deep/b.txt").write_text("mine")
    assert not Output(made, "tool", "command").is_finished()


@pytest.mark.parametrize("moved", [[], ["a.txt"]])
def test_what_was_killed_before_its_renames_is_renamed(made, moved):
    files = made / ".tool.unfinished/files"
    (files / "deep").mkdir(parents=True)
    for name in {*NAMES} - {*moved}:
        (made / name).rename(files / name)
    assert Output(made, "tool", "command").is_finished()
    assert list_names(made) == [".tool.complete.json", *NAMES]
    assert [(made / name).read_text() for name in NAMES] == [*NAMES]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 1, "command": "command"}', '{"files": {"x": 1}}'])
def test_a_marker_that_is_torn_or_odd_vouches_for_nothing(made, content):
    (made / ".tool.complete.json").write_text(content)
    assert not Output(made, "tool", "command").is_finished()


def test_what_is_not_its_own_is_never_overwritten_and_a_failure_leaves_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="a.txt appeared meanwhile"):
        Output(tmp_path, "tool", "command").write(write)
    assert list_names(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "mine"
    with pytest.raises(ZeroDivisionError):
        Output(tmp_path, "tool", "command").write(lambda folder: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_second_run_is_refused_while_the_first_writes(tmp_path):
    def write_meanwhile(folder):
        write(folder)
        with pytest.raises(ValueError, match="another run writes there"):
            Output(tmp_path, "tool", "command").write(write)

    Output(tmp_path, "tool", "command").write(write_meanwhile)
    assert list_names(tmp_path) == [".tool.complete.json", *NAMES]


def test_a_command_is_its_flags_and_its_inputs_content_and_not_where_it_writes(tmp_path):
    def describe(seed=1, output_dir="a") -> str:
        args = argparse.Namespace(seed=seed, output_dir=output_dir, token="secret")
        return describe_command(args, tmp_path / "in.csv", tmp_path / "model", None, "name/on-the-hub")

    (tmp_path / "in.csv").write_text("text\n")
    (tmp_path / "model").mkdir()
    first = describe()
    assert describe(output_dir="b") == first != describe(seed=2)
    (tmp_path / "model/model.safetensors").write_text("w")
    second = describe()
    (tmp_path / "in.csv").write_text("texts\n")
    assert len({first, second, describe()}) == 3
