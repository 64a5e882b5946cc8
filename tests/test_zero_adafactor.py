# Copyright 2026 The plaintune authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""ZeroAdafactor against transformers.Adafactor in one process: the same weights, whoever holds which piece."""

import argparse
import copy
import json

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor, Trainer, TrainingArguments

import adafactor_worker as worker
import zero_adafactor
from conftest import ROOT, run_warm
from zero_adafactor import Fragment, ZeroAdafactor, round_stochastically

SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]
CPU = {"device": "cpu"}
SMALL = {"sub_group_size": 300, "stage3_param_persistence_threshold": 50}
FLAVOURS = {
    "given learning rate": {},
    "first moment": {"beta1": 0.9},
    "scaled by the weights": {"scale_parameter": True},
    "relative step": {"lr": None, "scale_parameter": True, "relative_step": True, "warmup_init": True},
    "other constants": {"decay_rate": -0.5, "clip_threshold": 0.3, "eps": [1e-20, 1e-2], "weight_decay": 0.1},
}


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in the same order as the ranks have them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def deviation(expected: dict, found: dict) -> float:
    """The largest relative difference of any one tensor, in the 2-norm."""
    pairs = [(a.double(), found[name].double()) for name, a in expected.items()]
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def launch(ranks: int, folder, cases: list[dict], port: int) -> dict[str, dict]:
    """Run the cases one after the other on that many ranks; their results by name."""
    words = [ROOT / "tests/adafactor_worker.py", folder, *map(json.dumps, cases)]
    run_warm(*words, cwd=folder, ranks=ranks, port=port)
    return {case["name"]: torch.load(folder / f"{case['name']}.pt") for case in cases}


# ------------------------------------------------------------------------------------------- plain parameters


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_on_plain_parameters_it_is_transformers_adafactor(flavour):
    case = {"steps": 50, "optimizer": FLAVOURS[flavour], "clip": 1.0}
    expected, found = worker.run_plain(case, Adafactor), worker.run_plain(case, ZeroAdafactor)
    assert deviation(expected["weights"], found["weights"]) < 1e-6
    assert found["losses"][-1] < found["losses"][0] - 0.1 or flavour == "relative step"


def test_arguments_and_their_refusals_are_those_of_transformers():
    parameters = [torch.nn.Parameter(torch.ones(2, 2))]
    assert ZeroAdafactor(parameters).defaults == Adafactor(parameters).defaults
    with pytest.raises(ValueError, match="relative_step"):
        ZeroAdafactor(parameters, lr=1e-3)


def train(optimizer, model, steps) -> None:
    for step in steps:
        model(*worker.make_batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("first, second", [(Adafactor, ZeroAdafactor), (ZeroAdafactor, Adafactor)])
def test_either_goes_on_from_the_others_saved_state(first, second, tmp_path):
    options = {**worker.STOCK, "beta1": 0.9}
    whole, model = worker.make_model(), worker.make_model()
    train(Adafactor(worker.make_groups(whole), **options), whole, range(12))
    optimizer = first(worker.make_groups(model), **options)
    train(optimizer, model, range(6))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    optimizer = second(worker.make_groups(model), **options)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(optimizer, model, range(6, 12))
    assert deviation(dict(whole.named_parameters()), dict(model.named_parameters())) < 1e-6


def test_state_of_another_model_is_refused():
    model = worker.make_model()
    optimizer = ZeroAdafactor(worker.make_groups(model), **worker.STOCK)
    train(optimizer, model, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="other parameter groups"):
        ZeroAdafactor([torch.nn.Parameter(torch.ones(2, 2))]).load_state_dict(state)
    state["state"][0]["exp_avg_sq_row"] = torch.ones(3)
    with pytest.raises(ValueError, match="does not fit|not of"):
        ZeroAdafactor(worker.make_groups(model), **worker.STOCK).load_state_dict(state)


@pytest.mark.parametrize("shape", [(7,), (5, 6), (3, 4, 5), (2, 3, 4, 5), (1, 1), (6, 1), (1, 6)])
def test_blocks_cover_any_piece_of_any_shape_once(shape, monkeypatch):
    monkeypatch.setattr(zero_adafactor, "CHUNK", 8)
    whole = torch.arange(float(torch.Size(shape).numel()))
    for start in range(len(whole)):
        for end in range(start, len(whole) + 1):
            fragment = Fragment(None, shape, start, whole[start:end], whole[start:end], False)
            seen = torch.zeros(len(whole) // fragment.width, fragment.width)
            for taken, rows, columns in fragment.blocks():
                piece = fragment.data[taken].view(rows.stop - rows.start, -1)
                assert torch.equal(piece, whole.view(seen.shape)[rows, columns])
                seen[rows, columns] += 1
            assert torch.equal(seen.flatten(), ((whole >= start) & (whole < end)).float())


def test_state_at_the_t5_large_shape_is_at_most_a_fiftieth_of_a_byte_a_parameter():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=1024, d_kv=64, d_ff=4096, num_layers=24, num_heads=16, vocab_size=32128)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    optimizer = ZeroAdafactor(model.parameters(), **worker.STOCK)
    for parameter in model.parameters():
        flat = torch.empty(parameter.numel(), device="meta")
        fragment = Fragment(parameter, tuple(parameter.shape), 0, flat, flat, True)
        optimizer._get_state(optimizer.param_groups[0], fragment)
    count = sum(p.numel() for p in model.parameters())
    assert 7.3e8 < count < 7.4e8
    assert 0 < worker.state_bytes(optimizer) / count <= 0.02


class LargestNewTensor(TorchDispatchMode):
    """Notes the most elements of any tensor made while it is on; views of the known storages are not new."""

    def __init__(self, known):
        super().__init__()
        self.known, self.largest = {t.untyped_storage().data_ptr() for t in known}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_allocates_no_more_than_a_chunk_at_a_time(dtype, monkeypatch):
    monkeypatch.setattr(zero_adafactor, "CHUNK", 4096)
    parameter = torch.nn.Parameter(torch.randn(700, 300).to(dtype))
    parameter.grad = torch.randn(700, 300).to(dtype)
    optimizer = ZeroAdafactor([parameter], **worker.STOCK)
    with LargestNewTensor([parameter.data, parameter.grad]) as seen:
        optimizer.step()
    assert 700 < seen.largest <= 4096


# ------------------------------------------------------------------------------------------------- under ZeRO


@pytest.fixture(scope="module")
def reference():
    torch.set_num_threads(1)
    return worker.run_plain({"steps": 50, "clip": 1.0}, Adafactor)


ZERO_CASES = {
    "stage 0": {"stage": 0},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3},
    "stage 1, optimizer offloaded": {"stage": 1, "zero": {"offload_optimizer": CPU}},
    "stage 2, optimizer offloaded, accumulation": {"stage": 2, "accumulation": 2, "zero": {"offload_optimizer": CPU}},
    "stage 3, all offloaded, sub-groups": {
        "stage": 3,
        "zero": {"offload_optimizer": CPU, "offload_param": CPU, **SMALL},
    },
    "stage 3, nothing persistent, accumulation": {
        "stage": 3,
        "accumulation": 2,
        "zero": {"stage3_param_persistence_threshold": 0},
    },
}


@pytest.mark.parametrize("ranks", [2] + [pytest.param(ranks, marks=SLOW) for ranks in (1, 3, 4)])
def test_weights_after_50_steps_are_those_of_one_process_without_deepspeed(ranks, reference, tmp_path):
    cases = [{"name": name, "steps": 50, "clip": 1.0, **case} for name, case in ZERO_CASES.items()]
    for name, result in launch(ranks, tmp_path, cases, 29600 + ranks).items():
        assert deviation(reference["weights"], result["weights"]) <= 1e-6, name
        assert result["state_bytes"] <= reference["state_bytes"], name
        if name in ("stage 1", "stage 2", "stage 3"):
            assert result["calls"] == 50 * 2 * 2, name  # steps x groups x (sums, squared updates)


def test_in_half_precision_it_is_no_further_from_float64_than_one_process_with_stock_adafactor_in_bf16(tmp_path):
    # Without clipping: at stage 0 in fp16 DeepSpeed 0.19.8 divides the gradient norm by the loss scale twice, so that
    # it never clips.
    exact = worker.run_plain({"steps": 50, "dtype": "float64"}, Adafactor)["losses"]
    stock = worker.run_plain({"steps": 50, "dtype": "bf16"}, Adafactor)["losses"]
    kinds = [("bf16", stage) for stage in (0, 1, 2, 3)] + [("fp16", stage) for stage in (0, 2, 3)]
    cases = [{"name": f"{d} {s}", "dtype": d, "stage": s, "steps": 50} for d, s in kinds]
    allowed = max(abs(a - b) for a, b in zip(exact, stock, strict=True))
    for name, result in launch(2, tmp_path, cases, 29610).items():
        furthest = max(abs(a - b) for a, b in zip(exact, result["losses"], strict=True))
        assert 1e-4 < furthest <= 2 * allowed, name


# ------------------------------------------------------------------------------------------------ checkpoints


ELSEWHERE = {3: [(1, 2), (4, 3)], 2: [(1, 3), (4, 1)]}  # stage saved on two ranks: (ranks, stage) to go on with


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """Two ranks, stages 2 and 3: a run of 20 steps, one of 10 that saves, one that goes on from it."""
    folder, cases = tmp_path_factory.mktemp("saved"), []
    common = {"clip": 0.5, "optimizer": {"beta1": 0.9, "scale_parameter": True}}
    for stage in (2, 3):
        path = str(folder / f"checkpoint{stage}")
        cases.append({"name": f"whole {stage}", "stage": stage, "steps": 20, **common})
        cases.append({"name": f"half {stage}", "stage": stage, "steps": 10, "save": path, **common})
        cases.append({"name": f"again {stage}", "stage": stage, "steps": 20, "load_same": path, **common})
    return {"folder": folder, "common": common, **launch(2, folder, cases, 29620)}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_goes_on_bit_equal_on_the_same_ranks(saved, stage):
    whole, again = saved[f"whole {stage}"]["weights"], saved[f"again {stage}"]["weights"]
    assert all(torch.equal(a, again[name]) for name, a in whole.items())


@pytest.mark.parametrize(
    "stage, ranks, new_stage",
    [(3, 1, 2)]
    + [pytest.param(stage, *new, marks=SLOW) for stage in (3, 2) for new in ELSEWHERE[stage] if new != (1, 2)],
)
def test_a_checkpoint_goes_on_with_other_ranks_at_another_stage(saved, tmp_path, stage, ranks, new_stage):
    path = str(saved["folder"] / f"checkpoint{stage}")
    case = {"name": "on", "stage": new_stage, "steps": 20, "load": path, **saved["common"]}
    whole, found = saved[f"whole {stage}"], launch(ranks, tmp_path, [case], 29621)["on"]
    assert found["losses"] == pytest.approx(whole["losses"][10:], rel=1e-5)
    assert deviation(whole["weights"], found["weights"]) <= 1e-6


# -------------------------------------------------------------------------------------------------- pure bf16


def test_stochastic_rounding_takes_one_of_two_neighbours_and_keeps_the_mean():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([1.0, 1.001, -0.7003, 3e-5, 0.0]).repeat(20000, 1)
    rounded = round_stochastically(values, generator).double()
    step = torch.tensor([0.0, 2**-7, 2**-8, 2**-23, 0.0], dtype=torch.float64)
    assert ((rounded - values.double()).abs() <= step).all()
    error = (rounded.mean(0) - values[0].double()).abs()
    assert (error <= step / 2 * 5 / 20000**0.5).all()  # five standard errors
    odd = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(round_stochastically(odd, generator).float().nan_to_num(7), odd.nan_to_num(7))


def fit(dtype, steps: int = 1500, **options) -> tuple[float, torch.Tensor]:
    """Linear regression with updates of at most 1e-3, less than half a bf16 step of its weights; (error, weights)."""
    torch.manual_seed(0)
    target = torch.rand(48, 64) + 1
    weight = torch.nn.Parameter((target + 0.3 * torch.randn(48, 64)).to(dtype))
    optimizer = ZeroAdafactor([weight], lr=1e-3, scale_parameter=False, relative_step=False, **options)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        inputs = torch.randn(32, 64)
        (inputs.to(dtype) @ weight.T - (inputs @ target.T).to(dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return (weight.detach().float() - target).square().mean().item(), weight.detach()


def test_plain_rounding_stalls_where_stochastic_rounding_reaches_the_error_of_fp32_weights():
    start, grid = 0.3**2, 2.0**-7  # the mean squared error at the start; the step of bf16 between 1 and 2
    exact, _ = fit(torch.float32)
    stalled, _ = fit(torch.bfloat16, stochastic_rounding=False)
    found, _ = fit(torch.bfloat16)
    assert exact < 0.01 * start and stalled > 0.8 * start
    assert found < exact + 4 * grid**2


def test_stochastic_rounding_depends_on_its_seed_alone():
    first, again, other = (fit(torch.bfloat16, 20, seed=seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def bf16_model():
    return worker.make_model(torch.bfloat16)


def test_pure_bf16_resumes_bit_equal(tmp_path):
    whole, model = bf16_model(), bf16_model()
    train(ZeroAdafactor(worker.make_groups(whole), **worker.STOCK), whole, range(8))
    optimizer = ZeroAdafactor(worker.make_groups(model), **worker.STOCK)
    train(optimizer, model, range(4))
    state = copy.deepcopy(optimizer.state_dict())
    optimizer = ZeroAdafactor(worker.make_groups(model), **worker.STOCK)
    optimizer.load_state_dict(state)
    train(optimizer, model, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))


def test_stepping_in_the_backward_pass_gives_the_same_weights_and_leaves_no_gradient():
    together, inside = bf16_model(), bf16_model()
    train(ZeroAdafactor(worker.make_groups(together), **worker.STOCK), together, range(8))
    optimizer = ZeroAdafactor(worker.make_groups(inside), step_in_backward=True, **worker.STOCK)
    for step in range(8):
        inside(*worker.make_batch(step)).backward()
        assert all(p.grad is None for p in inside.parameters())
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), inside.parameters(), strict=True))


# ------------------------------------------------------------------------------------------- in a Trainer's run


def make_training_args(folder, **flags) -> TrainingArguments:
    return TrainingArguments(str(folder), use_cpu=True, report_to=[], **flags)


def make_tiny_t5(**changes):
    sizes = {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **changes))


def describe_groups(optimizer) -> list[dict]:
    """The settings of each group and how many parameters it has."""
    groups = optimizer.param_groups
    return [{k: len(v) if k == "params" else v for k, v in group.items() if k != "members"} for group in groups]


def test_the_trainer_makes_the_chosen_optimizer_with_the_groups_and_settings_of_the_stock_one(tmp_path):
    arguments = make_training_args(tmp_path, optim="adafactor", learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8)
    model = make_tiny_t5()
    stock = Trainer(model, arguments).create_optimizer()
    assert type(stock) is Adafactor
    chosen = Trainer(model, arguments, optimizer_cls_and_kwargs=zero_adafactor.choose(arguments))
    found = chosen.create_optimizer()
    assert type(found) is ZeroAdafactor
    assert describe_groups(found) == describe_groups(stock)
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]
    for ours, theirs in zip(found.param_groups, stock.param_groups, strict=True):
        assert all(a is b for a, b in zip(ours["params"], theirs["params"], strict=True))


def test_another_optimizer_is_left_to_the_trainer(tmp_path):
    arguments = make_training_args(tmp_path, optim="adamw_torch")
    assert zero_adafactor.choose(arguments) is None
    assert zero_adafactor.describe(arguments, make_tiny_t5()) == "optimizer: adamw_torch"


@pytest.mark.parametrize(
    "optim_args, inside",
    [
        ("step_in_backward=true", True),
        ("step_in_backward = True", True),
        ("step_in_backward=false", False),
        ("", False),
    ],
)
def test_the_trainer_steps_in_the_backward_pass_where_the_flag_says_so(tmp_path, optim_args, inside):
    arguments = make_training_args(tmp_path, optim="adafactor", optim_args=optim_args)
    model = make_tiny_t5(decoder_start_token_id=0)
    Trainer(model, arguments, optimizer_cls_and_kwargs=zero_adafactor.choose(arguments)).create_optimizer()
    ids = torch.tensor([[3, 4, 1]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is None for p in model.parameters()) == inside


def test_the_line_about_the_optimizer_says_how_bf16_weights_are_written(tmp_path):
    arguments, model = make_training_args(tmp_path, optim="adafactor"), make_tiny_t5()
    line = zero_adafactor.describe(arguments, model)
    assert line.startswith("optimizer: ZeroAdafactor") and "bf16" not in line
    assert "bf16 weights rounded stochastically" in zero_adafactor.describe(arguments, model.bfloat16())


def find_problems(**flags) -> str:
    given = {"pure_bf16": False, "optim": "adafactor", "optim_args": None, "deepspeed": None, "fp16": False}
    given |= {"gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    return "\n".join(zero_adafactor.find_problems(argparse.Namespace(**given | flags)))


def test_pure_bf16_names_everything_it_excludes():
    message = find_problems(pure_bf16=True, optim="adamw_torch", deepspeed="zero2.json", fp16=True)
    for claim in ("only --optim adafactor rounds and steps so, not --optim adamw_torch", "not under --deepspeed"):
        assert f"--pure_bf16: {claim}" in message
    assert "--pure_bf16: not with --fp16" in message and message.count("\n") == 2
    assert find_problems(pure_bf16=True) == ""


def test_stepping_in_the_backward_pass_names_everything_it_excludes(monkeypatch):
    inside = {"optim_args": "step_in_backward=true"}
    assert find_problems(**inside, max_grad_norm=0.0) == ""
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = find_problems(**inside, gradient_accumulation_steps=2).split("\n")
    claims = ("--gradient_accumulation_steps 2 needs", "--max_grad_norm 1.0 needs", "works in one process only")
    assert len(lines) == 3
    for line, claim in zip(lines, claims, strict=True):
        assert line.startswith(f"--optim_args step_in_backward: {claim}")


def test_plain_training_excludes_nothing(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_problems(optim="adamw_torch", deepspeed="zero3.json", fp16=True, gradient_accumulation_steps=4) == ""
    assert find_problems(optim_args="step_in_backward=false", gradient_accumulation_steps=4) == ""
