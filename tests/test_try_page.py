# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""tools/try_model.py gives the texts of run_generation.py; its page, by Streamlit's AppTest and in a real browser."""

import csv
import dataclasses
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

import run_generation
import try_model as tool
from conftest import ROOT, make_environment, make_once, make_rows, run_warm, write_csv, write_jsonl

CPU = ["--use_cpu", "--dtype", "float32"]
DECODINGS = {
    "greedy": {"num_beams": 1, "do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False, "max_new_tokens": 7},
    "sampling": {"do_sample": True, "num_beams": 1, "temperature": 0.9, "top_p": 0.8, "max_new_tokens": 7},
}


@pytest.fixture(scope="session")
def chat(tmp_path_factory, place) -> Path:
    """A tiny Llama with random weights that takes chats."""
    return make_once(tmp_path_factory, "chat", lambda folder: make_chat_model(folder, place / "tiny-llama"))


def make_chat_model(folder: Path, model: Path) -> None:
    shutil.copytree(model, folder, dirs_exist_ok=True)
    shutil.copy(ROOT / "prompt_templates/chatml.jinja", folder / "chat_template.jinja")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))


def load(folder: Path, **decoding):
    return tool.set_decoding(tool.load_once(str(folder), "float32", True), decoding, 42)


def read_csv(data: bytes) -> list[dict]:
    return list(csv.DictReader(io.StringIO(data.decode(), newline="")))


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


# ------------------------------------------------------------------------------------------------ the same texts


@pytest.mark.parametrize("way", DECODINGS)
def test_a_column_gets_the_texts_that_run_generation_writes(way, trained, tmp_path):
    table = write_csv(tmp_path / "in.csv", [*make_rows(9, 4), ("", "no text", "P1")])
    flags = [word for name, value in DECODINGS[way].items() for word in (f"--{name}", str(value))]
    words = ["--model_name_or_path", trained, "--input_file", table, "--output_file", "out.csv", *CPU, *flags]
    run_warm(ROOT / "run_generation.py", *words, cwd=tmp_path)
    expected = [row["prediction"] for row in read_csv((tmp_path / "out.csv").read_bytes())]
    rows, finished = tool.read_upload("in.csv", table.read_bytes()), []
    texts, note = tool.answer_column(load(trained, **DECODINGS[way]), rows, "review_body", finished.append)
    assert texts == expected and len(set(expected)) > 2
    assert finished[-1] == 9 and note.startswith("10 rows in ") and ", 1 without a text" in note


@pytest.mark.parametrize("way", DECODINGS)
@pytest.mark.parametrize("kind", ["trained", "chat"])
def test_one_answer_is_that_of_the_first_row_and_is_shown_as_it_grows(kind, way, request):
    generator, shown = load(request.getfixturevalue(kind), **DECODINGS[way], min_new_tokens=5), []
    is_chat = kind == "chat"
    prompt = run_generation.read_prompt({"text": "The strap is weak. The lens is great."}, "text", is_chat)
    answer = tool.answer_one(generator, prompt, shown.append)
    (expected,), _ = tool.answer_column(generator, {"text": ["The strap is weak. The lens is great."]}, "text", str)
    assert answer.text == expected
    assert all(answer.text.startswith(text) for text in shown)
    assert (shown[-1:] == [answer.text] and len(shown) > 2) or way == "beams"
    assert answer.num_tokens >= 5 and f"num_beams={generator.config.num_beams}" in answer.settings


def test_what_show_raises_ends_the_generation(chat):
    class Stopped(BaseException):
        pass

    shown = []

    def show(text):
        shown.append(text)
        raise Stopped

    with pytest.raises(Stopped):
        tool.answer_one(load(chat, max_new_tokens=100, min_new_tokens=100), "lens", show)
    assert len(shown) == 1 and not tool.LOCK._is_owned()


def test_the_prompt_shown_is_the_one_read_with_template_and_prefix(trained, chat):
    prompt = tool.make_chat([{"question": "How?", "context": "", "answers": {}}], "m", "Be kind.")
    answer = tool.answer_one(load(chat, max_new_tokens=2), prompt, str)
    generator = load(chat)
    assert answer.prompt == generator.prompts.render(prompt) and "Be kind." in answer.prompt
    assert "cut off at max_new_tokens" in answer.describe()
    answer = tool.answer_one(load(trained), "The lens is great.", str)
    assert answer.prompt.startswith("summarize") and answer.prompt.endswith("great.</s>")


def test_each_model_has_its_own_answers_before_it_and_a_new_one_only_the_questions_it_answered():
    answers = {name: tool.Answer(f"{name} says", 1, 1, "", "", 1, False, "") for name in "ab"}
    turns = [{"question": "1", "context": "c", "answers": {"a": answers["a"]}}]
    turns += [{"question": "2", "context": "", "answers": answers}, {"question": "3", "context": "", "answers": {}}]
    contents = lambda name: [message["content"] for message in tool.make_chat(turns, name)]  # noqa: E731
    assert contents("a") == ["1", "a says", "2", "a says", "3"]
    assert contents("b") == ["2", "b says", "3"]
    assert tool.make_chat(turns, "a", "Be kind.")[0] == {"role": "system", "content": "Be kind."}
    assert tool.make_chat(turns, "a")[0]["context"] == "c"


# ------------------------------------------------------------------------------------------------ files


def test_a_table_comes_back_as_it_went_in_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [("00123", 'a "quoted", text\nin two lines', "P1"), ("", "漢字", "P2")]
    table = tool.read_upload("in.csv", write_csv(tmp_path / "in.csv", rows).read_bytes())
    assert [tuple(row) for row in zip(*table.values(), strict=True)] == rows
    assert not (tmp_path / "cache").exists()
    again = read_csv(tool.make_csv([dict(zip(table, row, strict=True)) for row in rows]))
    assert [tuple(row.values()) for row in again] == rows
    messages = [{"role": "user", "content": "q"}]
    read = tool.read_upload("in.jsonl", write_jsonl(tmp_path / "in.jsonl", [{"messages": messages}]).read_bytes())
    assert read == {"messages": [messages]}
    assert read_csv(tool.make_csv([read | {"messages": messages}])) == [
        {"messages": '[{"role": "user", "content": "q"}]'}
    ]


def test_a_file_that_is_no_table_is_named_without_the_folder_it_lay_in():
    for name, data, said in (
        ("a.pdf", b"%PDF", "unknown ending"),
        ("a.csv", b"", "empty"),
        ("a.csv", b"x,y\n", "rows"),
    ):
        with pytest.raises(run_generation.UsageError, match=said) as error:
            tool.read_upload(name, data)
        assert str(error.value).startswith(f"{name}: ")


# ------------------------------------------------------------------------------------------------ bad input


def test_everything_that_stands_in_the_way_of_a_start_is_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "streamlit", None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert tool.main(["--model_dir", str(tmp_path), f"{tmp_path}/no/way", "--port", str(port)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: streamlit is not installed here: `pip install -r requirements-try.txt`",
        f"error: --model_dir {tmp_path}: the folder has no config.json; give a model folder or a name on the hub",
        f"error: --model_dir {tmp_path}/no/way: there is no such folder; give a training run's --output_dir",
        f"error: --port {port}: address already in use; name another, `make try PORT={port + 1}`",
    ]
    assert tool.find_port_problems(0) == ["--port 0: must be 1 to 65535"]


def test_a_model_that_does_not_load_ends_the_start_in_a_sentence_each(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tool, "find_start_problems", lambda args: [])
    monkeypatch.setattr(tool, "serve", lambda *args: pytest.fail("the page was started"))
    torn, bare = tear(trained, tmp_path / "torn"), tmp_path / "bare"
    shutil.copytree(trained, bare)
    (bare / "model.safetensors").unlink()
    assert tool.main(["--model_dir", str(trained), str(torn), str(bare), *CPU]) == 2
    captured = capsys.readouterr()
    first, second = captured.err.splitlines()
    assert first.startswith(f"error: --model_dir {torn}: cannot be loaded: ")
    assert second.endswith("the folder has no weights (*.safetensors); did the training end?")
    assert f"{trained}: T5ForConditionalGeneration, " in captured.out and "prefix 'summarize: '" in captured.out


def tear(model: Path, folder: Path) -> Path:
    """A copy of a model with half of its weights' file."""
    shutil.copytree(model, folder)
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2)
    return folder


def test_settings_that_do_not_go_together_are_a_sentence(trained):
    with pytest.raises(run_generation.UsageError, match="--min_new_tokens 9 is more than --max_new_tokens 3"):
        load(trained, min_new_tokens=9, max_new_tokens=3)
    generator = tool.set_decoding(load(trained), {}, 1, max_source_length=5)
    answer = tool.answer_one(generator, "The lens is great. " * 9, str)
    assert answer.prompt_is_cut and answer.num_prompt_tokens == 5


# ------------------------------------------------------------------------------------------------ the page's logic


@pytest.fixture
def open_page(monkeypatch):
    """Run tools/try_page.py for some models: Streamlit's AppTest, which has no browser."""
    testing = pytest.importorskip("streamlit.testing.v1")

    def open_it(*models):
        monkeypatch.setattr(sys, "argv", ["try_page.py", "--model_dir", *map(str, models), *CPU])
        page = testing.AppTest.from_file(str(tool.PAGE), default_timeout=60).run()
        assert not page.exception
        return page

    return open_it


def press(page, label: str):
    """Press the button of that name; the page after it."""
    (button,) = [button for button in page.button if button.label == label]
    page = button.click().run()
    assert not page.exception
    return page


@pytest.mark.try_page
def test_a_text_is_answered_by_every_model_side_by_side(open_page, trained, chat):
    page = open_page(trained, chat)
    page.text_area[0].input("The strap is weak. It costs $5 and $6.")
    page = press(page, "Generate")
    expected = tool.answer_one(load(trained), "The strap is weak. It costs $5 and $6.", str).text
    assert len(page.text) == 2 and page.text[0].value == expected
    assert sum("tokens in" in caption.value for caption in page.caption) == 2
    assert page.code[0].value.startswith("summarize") and "<|im_start|>user\nThe strap" in page.code[1].value
    page = press(page, "Generate")
    assert page.text_area[0].value == "The strap is weak. It costs $5 and $6."


@pytest.mark.try_page
def test_a_chat_goes_on_and_begins_anew(open_page, chat):
    page = open_page(chat)
    for question in ("How do I clean a lens?", "And a strap?"):
        page = page.chat_input[0].set_value(question).run()
        assert not page.exception
    texts = [text.value for text in page.text]
    assert texts[0::2] == ["How do I clean a lens?", "And a strap?"]
    assert f"<|im_start|>assistant\n{texts[1]}<|im_end|>" in page.code[1].value
    assert not press(page, "New conversation").text


@pytest.mark.try_page
def test_the_settings_on_the_page_are_those_that_are_used(open_page, trained):
    page = open_page(trained)
    page.selectbox[0].select("sampling").run()
    next(field for field in page.number_input if field.label == "max_new_tokens").set_value(4)
    next(field for field in page.number_input if field.label == "seed").set_value(7)
    page.text_area[0].input("The strap is weak.")
    page = press(page, "Generate")
    decoding = {"do_sample": True, "num_beams": 1, "temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_new_tokens": 4}
    generator = dataclasses.replace(load(trained, **decoding), seed=7)
    assert page.text[0].value == tool.answer_one(generator, "The strap is weak.", str).text
    next(field for field in page.number_input if field.label == "min_new_tokens").set_value(9)
    (error,) = page.run().error
    assert "min\\_new\\_tokens 9 is more than max\\_new\\_tokens 4" in error.value


@pytest.mark.try_page
def test_a_folder_that_does_not_load_is_a_sentence_on_the_page_and_the_others_go_on(open_page, trained, tmp_path):
    page = open_page(trained, tear(trained, tmp_path / "torn"))
    (error,) = page.error
    assert "torn: cannot be loaded" in error.value.replace("\\", "") and "Traceback" not in error.value
    (field,) = page.text_input
    field.input(str(tmp_path / "nowhere"))
    page = press(page, "Add")
    assert any("there is no such folder" in error.value for error in page.error)
    page.text_area[0].input("The strap is weak.")
    assert len(press(page, "Generate").text) == 1


# ------------------------------------------------------------------------------------------------ a real browser


@pytest.fixture(scope="module")
def served(trained, chat, tmp_path_factory) -> str:
    """The page of two models as a user starts it: its address."""
    pytest.importorskip("streamlit")
    port, folder = find_free_port(), tmp_path_factory.mktemp("served")
    words = [sys.executable, ROOT / "tools/try_model.py", "--model_dir", trained, chat, "--port", port, *CPU]
    with open(folder / "printed.txt", "w") as log:
        process = subprocess.Popen(
            [str(word) for word in words], env=make_environment(), stdout=log, stderr=subprocess.STDOUT
        )
    try:
        limit = time.monotonic() + 120
        while f"http://127.0.0.1:{port}" not in (printed := Path(log.name).read_text()):
            assert process.poll() is None and time.monotonic() < limit, printed
            time.sleep(0.3)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert "Traceback" not in Path(log.name).read_text()


@pytest.fixture(params=["light", "dark"])
def browser(request, tmp_path):
    """A headless Chromium whose system is light or dark, and that keeps downloads in tmp_path."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1300,1000"):
        options.add_argument(flag)
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    media = [{"name": "prefers-color-scheme", "value": request.param}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    yield Browser(driver, request.param, tmp_path)
    driver.quit()


@dataclasses.dataclass
class Browser:
    """What a person does on the page."""

    driver: object
    scheme: str
    downloads: Path

    def wait(self, found, seconds: int = 60):
        limit = time.monotonic() + seconds
        while not (value := found()):
            assert time.monotonic() < limit, self.read()
            time.sleep(0.1)
        return value

    def read(self) -> str:
        return self.driver.execute_script("return document.body.innerText")

    def type(self, css: str, text: str) -> None:
        """Write into a field, looked for again where the page replaced it meanwhile."""
        from selenium.common.exceptions import StaleElementReferenceException

        def attempt():
            try:
                return [field.send_keys(text) for field in self.driver.find_elements("css selector", css)[:1]]
            except StaleElementReferenceException:
                return []

        self.wait(attempt)

    def click(self, text: str) -> None:
        find = "const found = [...document.querySelectorAll('button')].find(b => b.innerText.trim() === arguments[0]);"
        self.wait(lambda: self.driver.execute_script(f"{find} found?.click(); return !!found", text))

    def ask(self, question: str) -> None:
        self.type('textarea[data-testid="stChatInputTextArea"]', f"{question}\n")

    def download(self) -> list[dict]:
        self.click("Download CSV")
        (path,) = self.wait(lambda: list(self.downloads.glob("*.csv")))
        return read_csv(path.read_bytes())


@pytest.mark.try_page
def test_in_a_browser_a_text_is_answered_and_downloaded_light_and_dark(served, browser, trained, chat):
    browser.driver.get(served)
    browser.type("textarea[aria-label=Text]", "The strap is weak. It costs $5 and *more* $6.")
    browser.click("Generate")
    rows = browser.download()
    assert [row["model"] for row in rows] == [str(trained), str(chat)]
    prompt = "The strap is weak. It costs $5 and *more* $6."
    assert rows[0]["text"] == prompt
    assert rows[0]["prediction"] == tool.answer_one(load(trained), prompt, str).text
    assert rows[0]["prediction"] in browser.read() and "Prompt and settings" in browser.read()
    color = browser.driver.execute_script("return getComputedStyle(document.querySelector('.stApp')).backgroundColor")
    red = int(color.split("(")[1].split(",")[0])
    assert red < 60 if browser.scheme == "dark" else red > 200
    assert not [entry for entry in browser.driver.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.mark.try_page
def test_in_a_browser_a_table_gets_a_column_of_each_model_and_a_torn_model_a_sentence(
    served, browser, trained, chat, tmp_path
):
    table = write_csv(tmp_path / "in.CSV", make_rows(5, 6)).rename(tmp_path / "IN.CSV")  # as Windows has them
    browser.driver.get(served)
    browser.click("Table")
    browser.type("input[type=file]", str(table))
    browser.click("Generate")
    rows = browser.download()
    assert [row["review_body"] for row in rows] == [body for body, _, _ in make_rows(5, 6)]
    expected, _ = tool.answer_column(load(trained), {"t": [row["review_body"] for row in rows]}, "t", str)
    assert [row[f"prediction by {trained}"] for row in rows] == expected and f"prediction by {chat}" in rows[0]
    browser.type('input[aria-label="Another model folder"]', str(tear(trained, tmp_path / "torn")))
    browser.click("Add")
    browser.wait(lambda: "cannot be loaded" in browser.read())


@pytest.mark.try_page
def test_in_a_browser_an_answer_grows_until_it_is_stopped_and_the_chat_goes_on(served, browser, trained):
    browser.driver.get(served)
    browser.click(str(trained))  # the chat model remains
    browser.type("input[aria-label=max_new_tokens]", "6000\n")
    browser.ask("How do I clean a lens?")
    seen = set()
    browser.wait(lambda: ("Stop" in (text := browser.read()) and seen.add(text)) or len(seen) > 5)
    browser.click("Stop")
    browser.wait(lambda: "no answer" in browser.read() and "New conversation" in browser.read())
    browser.type("input[aria-label=max_new_tokens]", "\b\b\n")  # 60
    browser.ask("And a strap?")
    browser.wait(lambda: "tokens in" in browser.read())
    assert "How do I clean a lens?" in browser.read()


@pytest.mark.try_page
def test_the_page_is_reached_from_this_machine_only(served):
    port = int(served.rsplit(":", 1)[1])
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    addresses = [words[1] for words in lines if words[3] == "0A" and words[1].endswith(f":{port:04X}")]
    assert addresses == [f"0100007F:{port:04X}"]
