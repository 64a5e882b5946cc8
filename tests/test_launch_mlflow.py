# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""--report_to mlflow and tensorboard, and launchers/mlflow_model.py with MLflow's own server; a name is its claim."""

import importlib.util
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import guards
import run_clm_instruct
import run_generation
import run_summarization
from conftest import ROOT, make_instructions, make_rows, run, write_csv, write_jsonl

pytestmark = pytest.mark.launchers

# Tests run where there is no network, and MLflow would report its use over it.
os.environ.update(DO_NOT_TRACK="true", MLFLOW_DISABLE_TELEMETRY="true")
TINY = ["--save_strategy", "no", "--logging_steps", "20", "--predict_with_generate"]


@pytest.fixture(scope="module")
def launcher():
    """launchers/mlflow_model.py as a module."""
    spec = importlib.util.spec_from_file_location("mlflow_model", ROOT / "launchers/mlflow_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_runs(uri: str) -> dict[str, list]:
    """All runs at a tracking URI, by their experiment's name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    found = {e.name: list(client.search_runs([e.experiment_id])) for e in client.search_experiments()}
    return {name: runs for name, runs in found.items() if runs}


def read_artifact(uri: str, run_id: str, name: str) -> str:
    from mlflow import MlflowClient

    return Path(MlflowClient(uri).download_artifacts(run_id, name)).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------------ tracking


@pytest.fixture(scope="module")
def tracked(work, tmp_path_factory) -> Path:
    """Two ranks of ZeRO-2 with --report_to mlflow and no address given: the folder they ran in."""
    folder = tmp_path_factory.mktemp("tracked")
    done = run(
        ["env", "-u", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME=reviews", "MLFLOW_FLATTEN_PARAMS=true"]
        + ["torchrun", "--nproc_per_node", "2", "--master_port", "29731", ROOT / "run_summarization.py"]
        + ["--deepspeed", ROOT / "ds_configs/zero2.json", "--model_name_or_path", work / "tiny-t5", "--do_train"]
        + ["--train_file", work / "many.csv", "--validation_file", work / "validation.csv", "--do_eval"]
        + ["--do_predict", "--test_file", work / "validation.csv", "--source_prefix", "summarize: ", *TINY]
        + ["--per_device_train_batch_size", "16", "--max_steps", "60", "--max_target_length", "12", "--num_beams", "2"]
        + ["--optim", "adafactor", "--learning_rate", "2e-2", "--lr_scheduler_type", "constant", "--output_dir", "out"]
        + ["--token", "hf_secret", "--report_to", "mlflow", "--run_name", "tiny-two-ranks"],
        cwd=folder,
    )
    (folder / "printed.txt").write_text(done.stdout)
    return folder


def test_two_ranks_make_one_finished_run_of_the_name_and_experiment_given(tracked):
    runs = find_runs(f"sqlite:///{tracked}/mlflow.db")
    assert list(runs) == ["reviews"] and len(runs["reviews"]) == 1
    info = runs["reviews"][0].info
    assert (info.run_name, info.status) == ("tiny-two-ranks", "FINISHED")
    said = f"MLflow run tiny-two-ranks ({info.run_id}) in sqlite:///mlflow.db"
    assert (tracked / "printed.txt").read_text().count(said) == 1
    assert not (tracked / "mlruns/0").exists()


def test_its_parameters_are_the_flags_of_script_and_trainer_and_the_model_s_and_no_token(tracked):
    params = find_runs(f"sqlite:///{tracked}/mlflow.db")["reviews"][0].data.params
    wanted = {"max_steps": "60", "per_device_train_batch_size": "16", "run_name": "tiny-two-ranks", "d_model": "64"}
    wanted |= {"source_prefix": "summarize: ", "max_target_length": "12", "num_beams": "2"}
    wanted |= {"task_specific_params.summarization.prefix": "summarize: "}  # MLFLOW_FLATTEN_PARAMS
    assert {name: params.get(name) for name in wanted} == wanted
    assert params["train_file"].endswith("many.csv") and params["model_name_or_path"].endswith("tiny-t5")
    assert "hf_secret" not in params.values() and "token" not in params


def test_its_metrics_are_the_curve_and_the_scores_after_training(tracked):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tracked}/mlflow.db"
    (found,) = find_runs(uri)["reviews"]
    results = json.loads((tracked / "out/all_results.json").read_text())
    for name in ("eval_rouge1", "eval_loss", "predict_rouge1", "predict_loss", "eval_samples"):
        assert found.data.metrics[name] == pytest.approx(results[name]), name
    state = json.loads((tracked / "out/trainer_state.json").read_text())
    curve = [(row["step"], row["loss"]) for row in state["log_history"] if "loss" in row]
    logged = [(m.step, m.value) for m in MlflowClient(uri).get_metric_history(found.info.run_id, "loss")]
    assert len(curve) == 3 and [step for step, _ in logged] == [step for step, _ in curve]
    assert [value for _, value in logged] == pytest.approx([value for _, value in curve])


def test_its_artifacts_are_the_deepspeed_file_the_results_the_curves_and_the_texts_as_a_table(tracked):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tracked}/mlflow.db"
    run_id = find_runs(uri)["reviews"][0].info.run_id
    names = {artifact.path for artifact in MlflowClient(uri).list_artifacts(run_id)}
    texts = {"generated_predictions.jsonl", "generated_predictions.json"}
    assert names == {"zero2.json", "all_results.json", "training_curves.png", *texts}
    assert read_artifact(uri, run_id, "zero2.json") == (ROOT / "ds_configs/zero2.json").read_text()
    table = json.loads(read_artifact(uri, run_id, "generated_predictions.json"))
    rows = [json.loads(line) for line in (tracked / "out/generated_predictions.jsonl").read_text().splitlines()]
    assert table["columns"] == ["row", "source", "reference", "prediction"]
    assert table["data"] == [list(row.values()) for row in rows] and len(rows) == 13


@pytest.fixture(scope="module")
def answering(tmp_path_factory) -> Path:
    """
    A tiny chat Llama trained in this process with both trackers, then evaluated alone: the folder.

    The trackers' addresses are tracked.db and events/ in it.
    """
    folder = tmp_path_factory.mktemp("answering")
    write_jsonl(folder / "train.jsonl", make_instructions(200, 1))
    write_jsonl(folder / "validation.jsonl", [row | {"context": "Held out."} for row in make_instructions(5, 2)])
    run(
        [sys.executable, ROOT / "tools/init_model.py", "--architecture", "llama", "--preset", "tiny"]
        + ["--train_file", "train.jsonl", "--vocab_size", "600", "--output_dir", "tiny-llama"],
        cwd=folder,
    )
    settings = {"report_to": ["mlflow", "tensorboard"], "model_name_or_path": "tiny-llama", "prompt_template": "plain"}
    settings |= {"train_file": "train.jsonl", "validation_file": "validation.jsonl", "max_new_tokens": 12}
    (folder / "both.json").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/tracked.db")
        patch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
        train = ["--do_train", "--do_eval", "--max_steps", "60", "--learning_rate", "5e-3", "--output_dir", "out"]
        run_clm_instruct.main(["both.json", *train, "--run_name", "answers", *TINY])
        only = ["--do_eval", "--model_name_or_path", "out", "--output_dir", "again", "--run_name", "evaluation"]
        run_clm_instruct.main(["both.json", *only, "--predict_with_generate"])
    return folder


def test_each_run_of_the_instruction_script_is_one_run_with_or_without_training(answering):
    (runs,) = find_runs(f"sqlite:///{answering}/tracked.db").values()
    found = {each.info.run_name: each for each in runs}
    assert sorted(found) == ["answers", "evaluation"] and len(runs) == 2
    for name, folder in (("answers", "out"), ("evaluation", "again")):
        results = json.loads((answering / folder / "all_results.json").read_text())
        for metric in ("eval_loss", "eval_perplexity", "eval_rouge1"):
            assert found[name].data.metrics[metric] == pytest.approx(results[metric])
        assert found[name].info.status == "FINISHED"
    assert "loss" in found["answers"].data.metrics and "loss" not in found["evaluation"].data.metrics


def test_tensorboard_s_event_files_lie_in_the_folder_of_its_variable(answering):
    from tensorboardX.proto.event_pb2 import Event

    tags = {}
    for path in (answering / "events").glob("events.out.tfevents.*"):
        for record in read_records(path.read_bytes()):
            tags |= {value.tag: value.simple_value for value in Event.FromString(record).summary.value}
    results = json.loads((answering / "again/all_results.json").read_text())
    assert tags["eval/rouge1"] == pytest.approx(results["eval_rouge1"], rel=1e-5) and "train/loss" in tags
    assert not list(answering.glob("runs*"))


def test_trackio_holds_the_curve_under_the_runs_name(work, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    words = [
        "--model_name_or_path",
        work / "tiny-t5",
        "--do_train",
        "--train_file",
        work / "train.csv",
        "--max_steps",
        3,
    ]
    words += ["--logging_steps", 1, "--report_to", "trackio", "--run_name", "short", "--output_dir", tmp_path / "out"]
    run([sys.executable, ROOT / "run_summarization.py", *words], cwd=tmp_path)
    (path,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select metrics from metrics where run_name = 'short' order by step").fetchall()
    found = [json.loads(metrics)["train/loss"] for (metrics,) in rows if "train/loss" in json.loads(metrics)]
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert found == pytest.approx([entry["loss"] for entry in history if "loss" in entry]) and len(found) == 3


def read_records(data: bytes) -> list[bytes]:
    """The records of a TFRecord file: eight bytes of length and four of check before each, four after."""
    records = []
    while data:
        length = int.from_bytes(data[:8], "little")
        records.append(data[12 : 12 + length])
        data = data[16 + length :]
    return records


@pytest.mark.parametrize("tracker", ["mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_among_the_argument_problems(work, tmp_path, monkeypatch, tracker):
    hidden = ("mlflow", "tensorboard", "tensorboardX")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    flags = ["--model_name_or_path", str(work / "tiny-t5"), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    with pytest.raises(run_summarization.UsageError) as error:
        run_summarization.main([*flags, "--do_train", "--report_to", tracker])
    package = {"mlflow": "mlflow", "tensorboard": "tensorboardX"}[tracker]
    assert f"--report_to {tracker}: {package} is not installed; `pip install {package}`" in str(error.value)
    assert "--do_train needs --train_file" in str(error.value)


def test_a_folder_as_mlflow_s_address_is_refused_before_anything_is_loaded(work, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    flags = ["--do_train", "--train_file", str(work / "train.csv"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(run_summarization.UsageError, match="MLFLOW_TRACKING_URI=.*mlruns: MLflow 3 .*sqlite:///"):
        run_summarization.main(["--model_name_or_path", str(work / "tiny-t5"), *flags, "--report_to", "mlflow"])


def test_a_run_that_fails_is_marked_as_failed_at_exit(tmp_path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    at_exit = []
    monkeypatch.setattr(guards.atexit, "register", lambda *call: at_exit.append(call))
    args = SimpleNamespace(report_to=["mlflow"], run_name="broken", deepspeed=None, output_dir=str(tmp_path))
    args.disable_tqdm = True
    model = SimpleNamespace(config=SimpleNamespace(num_beams=4, is_encoder_decoder=True))
    handler = SimpleNamespace(callbacks=[])
    trainer = SimpleNamespace(args=args, model=model, callback_handler=handler, is_world_process_zero=lambda: True)
    for name in (
        "_load_optimizer_and_scheduler",
        "_load_rng_state",
        "_load_from_checkpoint",
        "_load_best_model",
        "compute_loss",
    ):
        setattr(trainer, name, None)
    trainer.state = SimpleNamespace(global_step=0)
    own = SimpleNamespace(num_beams=2, train_file="a.csv", token="hf_secret")
    guards.start_tracking(trainer, own, SimpleNamespace())
    mlflow.flush_async_logging()
    for function, *values in at_exit:
        if function is mlflow.end_run:
            function(*values)
    ((found,),) = find_runs(f"sqlite:///{tmp_path}/mlflow.db").values()
    assert (found.info.run_name, found.info.status) == ("broken", "FAILED")
    # num_beams is also a name of this model's configuration, which the trainer logs
    assert found.data.params == {"flag.num_beams": "2", "train_file": "a.csv"}


# ------------------------------------------------------------------------------------------------ the logged model


def generate(model: Path, table: Path, output: Path, *flags: str) -> list[str]:
    """The texts run_generation.py writes."""
    words = ["--model_name_or_path", model, "--input_file", table, "--output_file", output, *flags]
    run_generation.main([str(word) for word in words])
    return [json.loads(line)["prediction"] for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tuned(tracked) -> Path:
    """The T5 that the two ranks wrote."""
    return tracked / "out"


@pytest.fixture(scope="module")
def reviews(tuned) -> Path:
    """Reviews that the model has not seen, enough for texts of many kinds; the fourth has no text."""
    rows = make_rows(24, 5)
    rows[3] = ("", *rows[3][1:])
    return write_csv(tuned.parent / "reviews.csv", rows)


@pytest.fixture(scope="module")
def logged(tuned, launcher) -> tuple[str, str]:
    """The tuned T5 logged by the launcher: (tracking URI, model URI)."""
    (tuned / "checkpoint-7").mkdir()
    (tuned / "checkpoint-7/model.safetensors").write_text("not to be carried")
    uri = f"sqlite:///{tuned.parent}/models.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tuned.parent)  # where the artifacts go
        flags = ["--name", "summarizer", "--registered_model_name", "summarizer", "--tracking_uri", uri]
        return uri, launcher.main(["--model_dir", str(tuned), *flags])


def load(uri: str, model: str):
    import mlflow

    mlflow.set_tracking_uri(uri)
    return mlflow.pyfunc.load_model(model)


def read_texts(path: Path) -> list[str]:
    return [
        row["review_body"] for row in run_generation.datasets.load_dataset("csv", data_files=str(path), split="train")
    ]


def test_the_logged_encoder_decoder_gives_the_texts_of_run_generation(tuned, reviews, logged, tmp_path):
    import pandas as pd

    model = load(*logged)
    table = pd.DataFrame({"text": [text or "" for text in read_texts(reviews)]})
    for at, flags in enumerate(({}, {"num_beams": 3, "max_new_tokens": 5}, {"do_sample": True, "temperature": 2.0})):
        words = [f"--{name}={json.dumps(value)}" for name, value in flags.items()]
        expected = generate(tuned, reviews, tmp_path / f"{at}.jsonl", *words)
        answer = model.predict(table, params=flags)
        assert list(answer.columns) == ["prediction"] and answer.prediction.tolist() == expected
        assert expected[3] == "" and len(set(expected)) > 3
    other = model.predict(table, params={"do_sample": True, "temperature": 2.0, "seed": 7}).prediction.tolist()
    assert other != expected


def test_the_logged_model_is_code_and_safetensors_with_signature_and_example(logged):
    import mlflow

    mlflow.set_tracking_uri(logged[0])
    info = mlflow.models.get_model_info(logged[1])
    folder = Path(mlflow.artifacts.download_artifacts(logged[1]))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"mlflow_model.py", "code/run_generation.py", "code/guards.py", "input_example.json"} <= files
    assert {f"code/{name}" for name in run_generation.WITHOUT} <= files
    assert "artifacts/model.safetensors" in files
    kept_out = (".bin", ".pkl", ".pt", "predictions.jsonl", "_results.json", "trainer_state.json")
    assert not [name for name in files if name.endswith(kept_out) or "checkpoint-" in name]
    assert info.signature.inputs.input_names() == ["text"] and info.signature.outputs.input_names() == ["prediction"]
    assert {"max_new_tokens", "num_beams", "do_sample"} <= {param.name for param in info.signature.params}


def test_a_chat_model_takes_messages_instructions_and_texts(answering, launcher, tmp_path, monkeypatch):
    import pandas as pd

    monkeypatch.chdir(answering)
    uri = f"sqlite:///{answering}/tracked.db"
    training = next(r for r in find_runs(uri)["Default"] if r.info.run_name == "answers").info.run_id
    model_uri = launcher.main(["--model_dir", "out", "--name", "chat", "--tracking_uri", uri, "--run_id", training])
    model = load(uri, model_uri)
    assert model.metadata.run_id == training
    rows = make_instructions(6, 9)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = generate(Path("out"), tmp_path / "rows.jsonl", tmp_path / "a.jsonl", "--max_new_tokens", "12")
    assert len(set(expected)) > 3
    params = {"max_new_tokens": 12}
    users = [{"role": "user", "content": row["instruction"], "context": row["context"]} for row in rows]
    pairs = pd.DataFrame([{k: row[k] for k in ("instruction", "context")} for row in rows])
    assert model.predict(pairs, params=params).prediction.tolist() == expected
    chats = pd.DataFrame({"messages": [[user] for user in users]})
    assert model.predict(chats, params=params).prediction.tolist() == expected
    bare = [i for i, row in enumerate(rows) if not row["context"]]
    texts = pd.DataFrame({"text": [rows[i]["instruction"] for i in bare]})
    assert model.predict(texts, params=params).prediction.tolist() == [expected[i] for i in bare]


@pytest.mark.parametrize(
    "params, said",
    [({"num_beams": 0}, "num_beams 0: must be 1 to 10000"), ({"top_p": 3.0}, "top_p")],
)
def test_what_a_request_may_not_ask_for_is_named(logged, params, said):
    import mlflow

    with pytest.raises(mlflow.MlflowException, match=said):
        load(*logged).predict({"text": ["The lens is great."]}, params=params)


# ------------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def server(tuned, logged):
    """MLflow's server as the launcher says to start it, in a process group of its own: its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["mlflow", "models", "serve", "--env-manager", "local", "-h", "127.0.0.1", "-p", port, "-m", logged[1]]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment["MLFLOW_TRACKING_URI"] = logged[0]
    with open(tuned.parent / "server.txt", "w") as log:
        process = subprocess.Popen(
            [str(word) for word in words],
            env=environment,
            cwd=tuned.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        limit = time.monotonic() + 150
        while ask(port, "ping")[0] != 200:
            assert process.poll() is None and time.monotonic() < limit, Path(log.name).read_text()[-4000:]
            time.sleep(0.5)
        yield port
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def ask(port: int, path: str, body: dict | None = None) -> tuple[int, str]:
    """What curl gets: (status, text); status 0 where nobody listens."""
    words = ["curl", "-s", "--noproxy", "*", "-m", "60", "-w", "\n%{http_code}", f"http://127.0.0.1:{port}/{path}"]
    if body is not None:
        words += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
    text, _, status = subprocess.run(words, capture_output=True, text=True, timeout=70).stdout.rpartition("\n")
    return int(status), text


def test_curl_gets_the_texts_of_run_generation_from_the_server(server, tuned, reviews, tmp_path):
    flags = {"num_beams": 4, "max_new_tokens": 6}
    expected = generate(tuned, reviews, tmp_path / "a.jsonl", *(f"--{k}={v}" for k, v in flags.items()))
    rows = [{"text": text or ""} for text in read_texts(reviews)]
    status, text = ask(server, "invocations", {"dataframe_records": rows, "params": flags})
    assert status == 200, text
    assert [row["prediction"] for row in json.loads(text)["predictions"]] == expected
    status, text = ask(server, "invocations", {"dataframe_records": rows[:1], "params": {"num_beams": 0}})
    assert status == 400 and "num_beams 0: must be" in text


def test_the_server_listens_on_loopback_only(server):
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    addresses = [words[1] for words in lines if words[3] == "0A" and words[1].endswith(f":{server:04X}")]
    assert addresses == [f"0100007F:{server:04X}"]


# ------------------------------------------------------------------------------------------------ clear errors


def test_what_cannot_be_logged_is_named_with_the_way_out_all_at_once(launcher, tuned, tmp_path, monkeypatch):
    def message(*flags) -> str:
        with pytest.raises(run_generation.UsageError) as error:
            launcher.parse_args([str(flag) for flag in flags])
        return str(error.value)

    assert "there is no such folder" in message("--model_dir", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    assert "the folder has no weights (*.safetensors)" in message("--model_dir", tmp_path)
    (tmp_path / "pytorch_model.bin").write_text("")
    assert "weights are pickled" in message("--model_dir", tmp_path)
    both = message("--model_dir", tuned, "--name", "a/b", "--tracking_uri", tmp_path / "mlruns")
    assert "--name a/b" in both and "sqlite:///mlflow.db" in both
    monkeypatch.setattr(launcher, "mlflow", None)
    assert "`pip install -r requirements-launchers.txt`" in message("--model_dir", tuned)
