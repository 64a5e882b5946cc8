# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""docs/japanese.md: its program and its commands run, and its figures of ROUGE are those that are computed."""

import json
import re
import shlex
from collections import Counter

import pytest

import run_summarization
from conftest import ROOT, run, run_warm

README, TRANSLATED = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.ja.md"))
PAGE = (ROOT / "docs/japanese.md").read_text(encoding="utf-8")


def test_the_pages_figures_of_rouge_are_those_that_are_computed(capsys):
    pair = re.search(r"(\w+) against (\w+):\n", PAGE).groups()
    for language, *figures in re.findall(r"^\| (en|ja) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", PAGE, re.M):
        scores = run_summarization.compute_rouge([pair[0]], [pair[1]], language)
        assert [scores[name] for name in ("rouge1", "rouge2", "rougeL")] == pytest.approx(
            [float(figure) for figure in figures], abs=0.005
        )
    assert "sees no word in 1 of 1 references; give another" in capsys.readouterr().out


@pytest.mark.parametrize(
    "pattern",
    [
        r"```.*?\n```",
        r"\]\((\S+\.md)\)",
        r"^\| (?:`(\w+\.py)`|\[\w+\])",
        r"^(#+) ",
        r"`(--\w+|make [\w-]+)`",
        r"\b[\de.-]+\d\b",
    ],
    ids=["commands", "links", "tables", "headings", "flags and targets", "figures"],
)
def test_the_japanese_readme_has_what_the_english_one_has(pattern):
    found = [re.findall(pattern, text, re.M | re.S) for text in (README, TRANSLATED)]
    if pattern.startswith("\\b"):  # figures are written otherwise, in ten thousands, and stand in other places
        found = [
            set(numbers) - {"60", "738", "11.3", "135", "000", "6000", "7", "3800", "113", "3500", "1", "3"}
            for numbers in found
        ]
    elif not pattern.startswith("`"):
        found = [[link for link in links if "README" not in link] for links in found]
    else:
        found = [Counter(found) for found in found]
    assert found[0] == found[1] and found[0]


@pytest.mark.slow
def test_the_pages_program_and_commands_run_and_learn(tmp_path):
    (tmp_path / "make.py").write_text(re.search(r"```python\n(.*?)```", PAGE, re.S)[1], encoding="utf-8")
    run(["python", "make.py"], cwd=tmp_path)
    assert len((tmp_path / "ja.csv").read_text(encoding="utf-8").splitlines()) == 321
    for command in re.findall(r"```\n(python .*?)```", PAGE, re.S):
        _, script, *words = shlex.split(command.replace("\\\n", " "))
        run_warm(ROOT / script, *words, cwd=tmp_path)
    assert json.loads((tmp_path / "out/ja/eval_results.json").read_text())["eval_rouge1"] > 50
    assert (tmp_path / "ja-report/report.html").is_file()
