# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Chats learned by heart through every kind of template: run_generation.py gives each answer, and stops by itself."""

import json
import re

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from conftest import ROOT, run_warm, write_jsonl
from test_chat_turns import FRAMES, KINDS, RESULT, ROLE_NAMES, TOOLS, answer, expect, make_template, user
from test_run_summarization import read_predictions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FRAME_TEXT = " ".join(part or "" for frame in FRAMES.values() for part in frame)
SPECIALS = sorted(
    {token.replace("ROLE", role) for token in re.findall(r"<\|/?\w+\|>", FRAME_TEXT) for role in ROLE_NAMES}
)

# Each answer follows only from the whole prompt: a question stands there under two system turns, after two earlier
# questions, over two contexts.
CHATS = [
    ([user("What is a lens?"), answer("A piece of glass.")], None),
    ([user("Count to three."), answer("1. one\n2. two\n3. three")], None),
    ([{"role": "system", "content": "Be short."}, user("What is a lens?"), answer("Glass.")], None),
    ([{"role": "system", "content": "Be rude."}, user("What is a lens?"), answer("Look it up!")], None),
    ([user("My bag is red."), answer("I see."), user("Which colour?"), answer("Red it is.")], None),
    ([user("My bag is blue."), answer("Nice."), user("Which colour?"), answer("It is blue.")], None),
    ([user("Old or new?", context="The strap is old."), answer("Old.")], None),
    ([user("Old or new?", context="The flash is new."), answer("It is new, I think.")], None),
    ([user("Which is heavier?"), answer("The tripod.", "A tripod has legs.")], None),
    ([user("How warm is it?"), answer("", city="Rome"), RESULT, answer("20 degrees.")], TOOLS),
    ([user("Ask for Oslo."), answer("", city="Oslo")], TOOLS),
]
FEWEST = 8  # chats that every kind of template takes


@pytest.mark.parametrize("kind", KINDS, ids=" / ".join)
def test_every_chat_learned_by_heart_is_answered_exactly_and_the_answer_ends(place, tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer.chat_template = make_template(*kind)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    chats = [(messages, tools) for messages, tools in CHATS if not expect(kind, messages, tools)[1]]
    chats = [(messages, tools) for messages, tools in chats if kind[2] != "none" or not tools]
    assert len(chats) >= FEWEST
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": messages, "tools": tools} for messages, tools in chats])
    asked = [{"messages": messages[:-1], "tools": tools} for messages, tools in chats]
    write_jsonl(tmp_path / "asked.jsonl", asked)
    run_warm(
        *[ROOT / "run_clm_instruct.py", "--model_name_or_path", place / "tiny-llama", "--tokenizer_name", "tokenizer"]
        + ["--prompt_template", "chat", "--do_train", "--train_file", "chats.jsonl", "--do_predict", "--test_file"]
        + ["chats.jsonl", "--predict_with_generate", "--skip_audit", "--per_device_train_batch_size", "16"]
        + ["--max_steps", "120", "--learning_rate", "5e-3", "--warmup_steps", "10", "--max_new_tokens", "100"]
        + ["--save_strategy", "no", "--logging_steps", "40", "--output_dir", "out"],
        cwd=tmp_path,
    )
    run_warm(
        *[ROOT / "run_generation.py", "--model_name_or_path", "out", "--input_file", "asked.jsonl"]
        + ["--output_file", "answers.jsonl", "--dtype", "float32", "--max_new_tokens", "100"],
        cwd=tmp_path,
    )
    written = re.compile("|".join(map(re.escape, [*SPECIALS, "</s>"])))
    wanted = [written.sub("", expect(kind, messages, tools)[0][-1]).strip() for messages, tools in chats]
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == wanted
    assert [row["prediction"] for row in read_predictions(tmp_path / "out")] == wanted
    assert json.loads((tmp_path / "out/all_results.json").read_text())["predict_stopped"] == 1.0
