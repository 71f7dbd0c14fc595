"""Bad input: one clear error that names the place, both numbers and the fix; nothing half-done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate

import autoshard
from autoshard.errors import AutoshardError, CaptureError, PlanError, UnknownOperatorError
from tests.distributed import run_distributed
from tests.models import nanogpt

GPT, BATCH = nanogpt.GPT, {"idx": torch.arange(30).view(3, 10)}


class MLP(nn.Module):
    """Two linears around a function."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.gelu, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(8, width)
        self.down = nn.Linear(width, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.function(self.up(x)))
        return out


INPUT = (torch.randn(3, 8, generator=torch.Generator().manual_seed(0)) * 3,)

# Numbers of ranks


@pytest.mark.parametrize("tp", [0, -2, 2.0, True, "2"])
@pytest.mark.parametrize("call", [autoshard.plan, autoshard.parallelize])
def test_tp_is_a_positive_number(call: Callable[..., Any], tp: Any) -> None:
    """Before anything else is looked at."""
    with pytest.raises(ValueError, match=f"tp={tp!r} must be a positive number of ranks"):
        call(MLP(), tp, INPUT)


@pytest.mark.parametrize(
    ("tp", "world", "message"),
    [
        (2, None, "tp=2 needs 2 processes, but this is 1 .*torchrun --nproc-per-node 2"),
        (8, 4, "tp=8 is more than the world of 4 processes.*--nproc-per-node 8"),
        (3, 4, "tp=3 does not divide the world of 4 processes.*a multiple of 3, or pass tp=1, 2"),
    ],
)
def test_tp_fits_the_world(
    monkeypatch: pytest.MonkeyPatch, tp: int, world: int | None, message: str
) -> None:
    """Both numbers and the fix; no process group is left behind."""
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        autoshard.parallelize(MLP(), tp, INPUT, degree="max")
    assert not dist.is_initialized()


# The model


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.LayerNorm(7), (torch.ones(3, 7),), "no matmuls"),
        (nn.Linear(7, 7), (torch.ones(3, 7),), "7"),
        (
            nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.LayerNorm(7)),
            (torch.ones(3, 7),),
            "1",
        ),
    ],
)
@pytest.mark.parametrize("call", [autoshard.plan, autoshard.parallelize])
def test_no_region_can_be_split(
    monkeypatch: pytest.MonkeyPatch,
    call: Callable[..., Any],
    model: nn.Module,
    inputs: Any,
    message: str,
) -> None:
    """Neither a model without matmuls nor one of sizes that no rank count divides."""
    monkeypatch.setattr("autoshard.api.init_mesh", lambda *args: None)
    with pytest.raises(PlanError, match=rf"no region of this model .* tp=2 .*{message}"):
        call(model, 2, inputs)


class Branching(MLP):
    """Branches on a value."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        if y.sum() > 0:  # the source line
            y = -y
        out: Tensor = self.down(y)
        return out


class Outer(nn.Module):
    """Holds the branching one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MLP()
        self.second = Branching()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x))
        return out


def test_control_flow_on_data_names_layer_and_line() -> None:
    """The class or path of the layer, file and line, and what to do instead."""
    source = Path(__file__).read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if text.endswith("# the source line"))
    with pytest.raises(CaptureError) as raised:
        autoshard.plan(Outer(), 2, INPUT, degree="max")
    message = str(raised.value)
    assert "test_errors.py" in message and str(line) in message
    assert "torch.where" in message
    assert "second" in message or "Branching" in message


def test_missing_and_unknown_arguments_are_named() -> None:
    """Example inputs that forward does not take, or too few, are no fault of the model's."""
    model = GPT(nanogpt.GPTConfig(n_layer=1))
    for inputs in ({"ids": BATCH["idx"]}, {}):
        with pytest.raises((AutoshardError, ValueError)) as raised:
            autoshard.plan(model, 2, inputs, degree="max")
        assert "idx" in str(raised.value)
        assert "data cannot be captured" not in str(raised.value)


def test_example_inputs_that_cannot_be_found() -> None:
    """The model's class and forward's arguments, and where to pass them."""
    with pytest.raises(ValueError, match=r"of MLP could not be found.*example_inputs=.*\(x\)"):
        autoshard.plan(MLP(), 2, degree="max")
    with pytest.raises(ValueError, match=r"tuple or a dict of forward's arguments, is .*int"):
        autoshard.plan(MLP(), 2, 3, degree="max")


def test_a_model_parallelized_twice() -> None:
    """The parallel module is refused, and so is a model whose parameters are DTensors."""
    model = autoshard.parallelize(MLP(), 1, INPUT, degree="max")
    for call in (autoshard.plan, autoshard.parallelize):
        with pytest.raises(AutoshardError, match="already split over 1 ranks; pass the plain model"):
            call(model, 1, INPUT)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, is int"):
        autoshard.plan(3, 2, degree="max")  # type: ignore[arg-type]


def test_a_model_on_the_meta_device() -> None:
    """plan works; so does parallelize, but a call names the first parameter without a value."""
    with torch.device("meta"):
        model = MLP()
    assert autoshard.plan(model, 2, INPUT, degree="max").sharded_fraction == 1.0
    tp_model = autoshard.parallelize(model, 1, INPUT, degree="max")
    with pytest.raises(AutoshardError, match=r"down\.bias and 3 other parameters .* meta device"):
        tp_model(*INPUT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degree": 3}, 'degree=3 must be "auto", "max" or a divisor of tp=4'),
        ({"degree": 0}, "degree=0"),
        ({"degree": True}, "degree=True"),
        ({"degree": "most"}, "degree='most'"),
    ],
)
def test_degrees_that_are_none(options: dict[str, Any], message: str) -> None:
    """What can be asked for is said."""
    with pytest.raises(ValueError, match=message):
        autoshard.plan(MLP(), 4, INPUT, **options)


def test_a_word_for_logits_that_is_none() -> None:
    """The three that exist are said."""
    with pytest.raises(ValueError, match="logits='split' must be one of auto, whole, sharded"):
        autoshard.parallelize(MLP(), 1, INPUT, logits="split", degree="max")


# Operators without a rule


@torch.library.custom_op("autoshard_tests::double_up", mutates_args=())
def double_up(x: Tensor) -> Tensor:
    """An operator that nobody knows."""
    return x * 2


@double_up.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


double_up.register_autograd(lambda ctx, grad: grad * 2)


def unknown(x: Tensor) -> Tensor:
    """The operator in a function, which unlike the operator can be copied."""
    out: Tensor = double_up(x)
    return out


def test_an_unknown_operator_keeps_its_operands_whole() -> None:
    """It is reported with layer and source line; what it does not touch is split; all is right."""
    model = nn.Sequential(MLP(), MLP(unknown))
    plan = autoshard.plan(model, 2, INPUT, degree="max")
    assert len(plan.unknown) == 1
    assert "autoshard_tests.double_up" in plan.unknown[0]
    assert "test_errors.py" in plan.unknown[0] and " 1" in plan.unknown[0]
    assert plan.region("0").degree == 2
    shares = {p.name: p for p in plan.parameters}
    assert shares["1.up.bias"].degree == 1
    assert shares["1.up.weight"].dim == 1  # its result is a sum over the ranks, and whole
    report = autoshard.verify(model, 2, INPUT)
    assert report.ok, report


@pytest.mark.parametrize("call", [autoshard.plan, autoshard.parallelize])
def test_strict_refuses_unknown_operators(call: Callable[..., Any]) -> None:
    """The same words as an error."""
    with pytest.raises(UnknownOperatorError, match=r"1 operators? .*double_up.*test_errors\.py"):
        call(MLP(unknown), 1, INPUT, strict=True)


# What stands under no_grad


class Aside(nn.Module):
    """Uses under no_grad a value that it goes on with: converted to its own dtype, or dropout that is
    off, it is itself; a view of it would be another tensor."""

    def __init__(self, passing: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mlp = nn.Linear(8, 8), MLP()
        self.passing = passing

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, 8] -> [n, 8]."""
        x = self.first(x)
        with torch.no_grad():
            same = self.passing(x)
            gate = same.sigmoid()
        out: Tensor = self.mlp(same * gate)
        return out


@pytest.mark.parametrize(
    "passing",
    [
        lambda x: x.to(x.dtype),
        lambda x: F.dropout(x, 0.5, training=False),
        lambda x: F.dropout(x, 0.0, training=True),
    ],
)
def test_an_operand_that_leaves_no_grad_keeps_its_history(passing: Callable[[Tensor], Tensor]) -> None:
    """The gradient flows through ``same``, not through ``gate``; in float32 as in float64."""
    for dtype in (torch.float64, torch.float32):
        report = autoshard.verify(Aside(passing), 2, INPUT, dtype=dtype)
        assert report.ok, report
    model = Aside(passing)
    tp_model = autoshard.parallelize(model, 1, INPUT, degree="max")
    for each in (model, tp_model):
        each(*INPUT).sum().backward()
    expected = model.first.weight.grad
    assert expected is not None and expected.abs().max() > 0
    torch.testing.assert_close(tp_model.first.weight.grad, expected)


# Hooks on gradients


def _in_forward() -> nn.Module:
    def halved(x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda grad: grad / 2)
        return F.gelu(x)

    return MLP(halved)


def _on_module() -> nn.Module:
    model = MLP()
    model.up.register_full_backward_hook(lambda module, grads, _: grads)
    return model


def _on_parameter() -> nn.Module:
    model = MLP()
    model.up.weight.register_hook(lambda grad: grad / 2)
    return model


@pytest.mark.parametrize("build", [_in_forward, _on_module, _on_parameter])
def test_hooks_on_gradients_are_not_dropped(build: Callable[[], nn.Module]) -> None:
    """The capture has the forward alone: the gradients are the model's, or it is refused."""
    model = build()
    try:
        tp_model = autoshard.parallelize(model, 1, INPUT, degree="max")
    except AutoshardError as refused:
        assert "hook" in str(refused)
        return
    for each in (model, tp_model):
        each(*INPUT).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(tp_model.get_parameter(name).grad, parameter.grad)


# Plans


def test_a_plan_of_another_model(tmp_path: Path) -> None:
    """Names and shapes are compared, and tp."""
    path = tmp_path / "plan.json"
    plan = autoshard.plan(MLP(), 4, INPUT, degree="max")
    plan.save(path)
    for given in (plan, path, str(path)):
        with pytest.raises(PlanError, match=r"made for another model .*plan"):
            autoshard.plan(MLP(width=32), 4, INPUT, plan=given)
        with pytest.raises(PlanError, match="the plan is for tp=4, not tp=2"):
            autoshard.plan(MLP(), 2, INPUT, plan=given)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: [d], "autoshard_plan"),
        (lambda d: {**d, "autoshard_plan": 99}, "autoshard_plan"),
        (lambda d: {**d, "tp": "four"}, "tp"),
        (lambda d: {**d, "tp": 0}, "tp"),
        (lambda d: {k: v for k, v in d.items() if k != "tp"}, "tp"),
        (lambda d: {**d, "regions": ["0"]}, "regions"),
        (lambda d: {**d, "regions": {"0": 2}}, "regions.0.degree"),
        (lambda d: {**d, "regions": {"0": {"degree": 3}}}, "regions.0.degree"),
        (lambda d: {**d, "regions": {"0": {"degree": 0}}}, "regions.0.degree"),
        (lambda d: {**d, "regions": {"0": {"degree": "2"}}}, "regions.0.degree"),
        (lambda d: {**d, "regions": {"0": {"degree": True}}}, "regions.0.degree"),
    ],
)
def test_malformed_plans(tmp_path: Path, change: Callable[[Any], Any], field: str) -> None:
    """The file and the field."""
    path = tmp_path / "bad.json"
    autoshard.plan(nn.Sequential(MLP(), MLP()), 4, INPUT, degree="max").save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(PlanError, match=rf"bad\.json.*'{field}'"):
        autoshard.Plan.load(path)


def test_a_file_that_is_no_plan(tmp_path: Path) -> None:
    """Text that is no JSON, bytes that are no text, and no file at all."""
    path = tmp_path / "bad.json"
    path.write_text("{")
    with pytest.raises(PlanError, match=r"bad\.json is no JSON"):
        autoshard.Plan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"bad\.json"):
        autoshard.Plan.load(path)
    with pytest.raises((PlanError, FileNotFoundError), match=r"none\.json"):
        autoshard.Plan.load(tmp_path / "none.json")


def test_regions_that_the_model_does_not_have(tmp_path: Path) -> None:
    """By with_degree, with the nearest names; in a saved plan, with the names that exist."""
    model = nn.Sequential(MLP(), MLP())
    plan = autoshard.plan(model, 2, INPUT, degree="max")
    with pytest.raises(PlanError, match="no region '00' in this plan; the nearest names are 0"):
        plan.with_degree("00", 2)
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    document["regions"]["2"] = {"kind": "mlp", "degree": 2}
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"region '2' that this model does not have; .* 0, 1"):
        autoshard.plan(model, 2, INPUT, plan=path)


def test_degrees_that_a_region_cannot_take(tmp_path: Path) -> None:
    """Name, sizes and the degrees that it takes; by with_degree and in a saved plan."""
    model = GPT(nanogpt.GPTConfig(n_layer=1, n_head=6, n_embd=48))
    plan = autoshard.plan(model, 4, BATCH, degree="max")
    region = plan.region("transformer.h.0.attn")
    assert (region.degree, region.degrees) == (2, (1, 2))
    with pytest.raises(PlanError, match=r"over 4 ranks at tp=4: .* 6, .* 1, 2"):
        plan.with_degree(region.name, 4)
    path = tmp_path / "plan.json"
    plan.save(path)
    document = json.loads(path.read_text())
    document["regions"][region.name]["degree"] = 4
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=rf"{region.name} cannot be split over 4 ranks .* 1, 2"):
        autoshard.plan(model, 4, BATCH, plan=path)


def test_tied_regions_of_different_degree(tmp_path: Path) -> None:
    """A table that is embedding and output has one degree: both names and both numbers."""
    model = GPT(nanogpt.GPTConfig(n_layer=1))
    path = tmp_path / "plan.json"
    autoshard.plan(model, 4, BATCH, degree="max").save(path)
    document = json.loads(path.read_text())
    document["regions"]["lm_head"]["degree"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(PlanError, match=r"transformer\.wte: 4, lm_head: 2"):
        autoshard.plan(model, 4, BATCH, plan=path)


# Ranks that differ


def _refusal(model: nn.Module, tp: int, inputs: Any, **options: Any) -> str:
    """What parallelize says on this rank."""
    try:
        autoshard.parallelize(model, tp, inputs, **({"degree": "max"} | options))
    except PlanError as error:
        return str(error)
    return ""


def different_models() -> dict[str, Any]:
    """The second rank builds another model, or asks for something else."""
    rank = dist.get_rank()
    config = nanogpt.GPTConfig(n_layer=1, dropout=0.0)
    heads = nanogpt.GPTConfig(n_layer=1, dropout=0.0, n_head=4 if rank else 8)
    model = MLP(width=32 if rank else 16)
    before = [p.clone() for p in model.parameters()]
    found = {
        "ffn": _refusal(model, 2, INPUT),
        "heads": _refusal(GPT(heads), 2, BATCH),
        "degree": _refusal(GPT(config), 2, BATCH, degree=1 + rank),
        "function": _refusal(MLP(F.relu if rank else F.gelu), 2, INPUT),
        "mode": _refusal(GPT(nanogpt.GPTConfig(n_layer=1)).train(bool(rank)), 2, BATCH),
    }
    distributed = MLP()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    weight = DTensor.from_local(distributed.up.weight.detach(), mesh, [Replicate()])
    distributed.up.weight = nn.Parameter(weight)
    try:
        autoshard.parallelize(distributed, 2, INPUT, degree="max")
    except AutoshardError as error:
        found["DTensor"] = str(error)
    found["same"] = _refusal(MLP(), 2, INPUT)
    found["untouched"] = all(map(torch.equal, before, model.parameters()))
    return found


@pytest.mark.slow
def test_ranks_with_different_plans() -> None:
    """Sizes, heads, degrees, code and mode: every rank raises, and no weight was touched."""
    for found in run_distributed(different_models, 2, timeout=120):
        assert found.pop("same") == ""
        assert found.pop("untouched")
        assert "up.weight is a DTensor already" in found.pop("DTensor")
        for what, message in found.items():
            assert "rank(s) 1 computed another plan than rank 0" in message, what
            assert "the same model" in message


def different_replicas() -> list[str]:
    """One rank of a world of 4 at tp=2 builds another model: first the first, then the last."""
    found = []
    for odd in (0, 3):
        found.append(_refusal(MLP(width=32 if dist.get_rank() == odd else 16), 2, INPUT))
        dist.barrier()
    return found


@pytest.mark.slow
def test_replicas_with_different_plans() -> None:
    """Also ranks that share no group with the odd one raise, and none waits for another."""
    for first, last in run_distributed(different_replicas, 4):
        assert "rank(s) 1, 2, 3 computed another plan than rank 0" in first
        assert "rank(s) 3 computed another plan than rank 0" in last
