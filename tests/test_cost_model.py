"""The cost model: its figures against PyTorch's own, its formulas, and what it chooses."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autoshard
from autoshard import fused_ops, ops
from autoshard.capture import skeleton
from autoshard.cost_model import formulas
from autoshard.cost_model.formulas import constants, seconds
from autoshard.cost_model.hardware import Hardware, load
from autoshard.cost_model.model import CostModel
from autoshard.cost_model.operators import BY_WEIGHT, LOSS, Operand, Operator, work_of
from autoshard.cost_model.work import (
    B,
    Collective,
    D,
    Product,
    S,
    SideBySide,
    Traffic,
    Without,
    one_after_other,
)  # fmt: skip
from autoshard.cost_model.work import again as repeated
from autoshard.errors import PlanError
from autoshard.inputs import normalized_inputs
from autoshard.passes.fuse import LINEARS
from autoshard.pipeline import analyse, rewrite
from autoshard.planning import Costs
from autoshard.products import side_by_side
from benchmarks.models import Mixed, Shape, build, tokens
from tests.models import nanogpt
from tests.models.huggingface import case

GPT = Shape("gpt", 64, 4, 3, 16, 2, vocabulary=256, fused=False)
LLAMA = Shape("llama", 64, 8, 2, 16, 2, vocabulary=256, kv_heads=2)
SHAPES = {"gpt": GPT, "llama": LLAMA, "fused": replace(GPT, fused=True)}


@lru_cache
def planned(name: str, tp: int, **options: Any) -> autoshard.Plan:
    """A plan at the largest degrees, for a batch and a sequence that nothing was traced with."""
    shape = SHAPES[name]
    options = {"degree": "max", "hardware": "h200", "batch": 6, "sequence": 14} | options
    return autoshard.plan(build(shape), tp, tokens(shape.vocabulary, 2, 10), **options)


def model_of(plan: autoshard.Plan) -> CostModel:
    """The plan's cost model."""
    assert isinstance(plan.costs, Costs)
    return plan.costs.model


# Against PyTorch


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_pytorch_counts(name: str) -> None:
    """Forward and backward of the whole model, at another batch and sequence than were traced."""
    model, shape = build(SHAPES[name]), SHAPES[name]
    batch = tokens(shape.vocabulary, 6, 14)
    with FlopCounterMode(display=False) as counter:
        model(**batch).backward()
    predicted = planned(name, 1).predicted.flops_per_rank
    if name == "gpt":  # every product is counted by both
        assert predicted == counter.get_total_flops()
    else:  # the fused kernel's scores are computed again in its backward, on a GPU
        assert counter.get_total_flops() <= predicted < 1.05 * counter.get_total_flops()


@pytest.mark.parametrize(("name", "tp"), [("gpt", 2), ("gpt", 4), ("llama", 8)])
def test_a_rank_does_its_share_of_the_flops(name: str, tp: int) -> None:
    """Everything is split, so a rank does 1/tp; few key/value heads are shared, their products too."""
    whole = planned(name, 1).predicted.flops_per_rank
    found = planned(name, tp).predicted.flops_per_rank
    if name == "gpt":
        assert found == pytest.approx(whole / tp, rel=1e-12)
    else:
        assert whole / tp < found < 1.2 * whole / tp


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tp", [1, 2, 8])
def test_memory_of_parameters(name: str, tp: int) -> None:
    """Elements on a rank, with gradients and AdamW's two states, in float32."""
    plan = planned(name, tp)
    found = plan.predicted
    assert found.parameter_memory == 4 * plan.parameter_numel_per_rank
    assert found.gradient_memory == found.parameter_memory
    assert found.optimizer_memory == 2 * found.parameter_memory
    parts = found.gradient_memory + found.optimizer_memory + found.activation_memory
    assert found.memory_per_rank == pytest.approx(found.parameter_memory + parts)


def saved_bytes(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """What autograd keeps for the backward: each storage once, parameters and inputs not."""
    skipped = {p.untyped_storage().data_ptr() for p in model.parameters()}
    skipped |= {t.untyped_storage().data_ptr() for t in batch.values()}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skipped and tensor.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch)
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", SHAPES)
def test_memory_of_activations(name: str) -> None:
    """Within a tenth of what autograd keeps, and the gradient of the logits."""
    shape = SHAPES[name]
    measured = saved_bytes(build(shape), tokens(shape.vocabulary, 6, 14))
    logits = 4 * 6 * 14 * shape.vocabulary
    found = planned(name, 1).predicted.activation_memory
    assert found == pytest.approx(measured + logits, rel=0.1)


def test_checkpointing_trades_memory_for_time() -> None:
    """Layers keep their input and their sums; their forward is computed again without collectives."""
    kept, again = planned("gpt", 2), planned("gpt", 2, checkpoint="layer")
    assert again.predicted.activation_memory < kept.predicted.activation_memory
    model = model_of(kept)
    layers = [u.work[2] for u in model.workload.units if u.work[2].in_layer]
    layers += [w for w in model.workload.rest if w.in_layer]
    extra = sum(model.evaluate(formulas.phase_time(repeated(w.forward), False), 2) for w in layers)
    assert again.predicted.step_time == pytest.approx(kept.predicted.step_time + extra)
    communication = again.predicted.exposed_communication_time
    assert communication == pytest.approx(kept.predicted.exposed_communication_time)


# Formulas


def test_items_by_hand() -> None:
    """Each formula's number, worked out by hand."""
    hardware = replace(
        load("h200"), flops={"bfloat16": 1e12}, fill=(10.0, 20.0, 30.0), bandwidth=1e9, kernel=1e-6,
        passes={**load("h200").passes, "gelu": (2.0, 3.0)},
    )  # fmt: skip
    numbers = constants(hardware, 2) | {"latency": 1e-5, "bus": 1e9, "d": 2}

    def value(item: Any) -> float:
        formula = sympy.sympify(seconds(item))
        return float(formula.subs({s: numbers[s.name] for s in formula.free_symbols}))

    wide = Product(1, 1000, 2000, 3000, "bfloat16")
    assert value(wide) == pytest.approx(12e-3 * (1 + 0.01 + 0.01 + 0.01) + 22e-3 * 0 + 1e-6, rel=0.9)
    moved = 2 * (1000 * 3000 + 3000 * 2000 + 1000 * 2000) / 1e9
    assert value(wide) == pytest.approx(max(12e-3 * 1.03, moved) + 1e-6)
    assert value(Traffic(10**6)) == pytest.approx(1e-3 + 1e-6)
    assert value(Traffic(10**6, "gelu", True)) == pytest.approx(3e-3 + 1e-6)
    assert value(Collective("all_reduce", 10**6, D)) == pytest.approx(1e-5 + 1e-3)
    assert value(Collective("all_gather", 10**6, D)) == pytest.approx(1e-5 + 0.5e-3)
    four = numbers | {"d": 4}
    formula = seconds(Collective("all_reduce", 10**6, D))
    assert float(formula.subs({s: four[s.name] for s in formula.free_symbols})) == pytest.approx(
        2e-5 + 1.5e-3
    )


@pytest.mark.parametrize("dims", [(B, 1000), (B, 1000, S), (1000,)])
def test_a_split_loss_reduces_scalars_of_every_token(dims: tuple[Any, ...]) -> None:
    """The maximum, then three sums: 4 and 12 bytes a token, whatever the logits' shape."""
    logits, target = Operand("self", dims, 2, True), Operand("target", (B,), 8, False)
    loss = Operator("cross_entropy_loss", (logits, target), (), 2, "bfloat16", (), False, True)
    reduced = [i for i in work_of(loss, LOSS).forward.items if isinstance(i, Collective)]
    count = math.prod(d for i, d in enumerate(dims) if i != (len(dims) > 1))
    assert [sympy.simplify(c.bytes - n * count) for c, n in zip(reduced, (4, 12), strict=True)] == [
        0, 0
    ]  # fmt: skip


def test_a_product_is_done_in_whole_tiles_and_waves() -> None:
    """One column more than the tiles hold costs a tile; one tile more than processors a wave."""
    hardware = replace(load("v100"), fill=(0.0, 0.0, 0.0), kernel=0.0, bandwidth=1e30)
    numbers = constants(hardware, 1)

    def value(m: int, n: int) -> float:
        formula = seconds(Product(1, m, n, 1024, "float16"))
        return float(formula.subs({s: numbers[s.name] for s in formula.free_symbols}))

    assert value(1024, 1280) == value(1023, 1279)  # 8 x 10 tiles on 80 processors: one wave
    assert value(1024, 1281) == pytest.approx(2 * value(1024, 1280))


@pytest.mark.parametrize(
    ("name", "checkpoint"),
    [
        ("gpt", "layer"),
        pytest.param("llama", None, marks=pytest.mark.slow),
        pytest.param("fused", None, marks=pytest.mark.slow),
    ],
)
def test_symbolic_at_numbers_is_numeric(name: str, checkpoint: str | None) -> None:
    """Each region's formula, evaluated by sympy at every degree, is what the plan adds up."""
    plan = planned(name, 4, checkpoint=checkpoint)
    model = model_of(plan)
    different = {id(unit.work[4]): unit for unit in model.workload.units}
    for unit in different.values():
        formula = plan.cost_formula(unit.name)
        assert {s.name for s in formula.free_symbols} >= {"B", "S", "d"}
        for degree in unit.work:
            numbers = constants(model.setting.hardware, degree) | {"B": 6, "S": 14, "d": degree}
            exact = formula.xreplace({s: sympy.Float(numbers[s.name]) for s in formula.free_symbols})
            assert float(exact) == pytest.approx(plan.costs.alternative(unit.name, degree).step_time)


def test_a_plan_is_the_sum_of_its_parts() -> None:
    """Step time, by region and by kind of cost."""
    plan = planned("gpt", 4)
    found, model = plan.predicted, model_of(plan)
    regions = sum(plan.costs.alternative(r.name, r.degree).step_time for r in plan.regions)
    assert found.step_time == pytest.approx(regions + model.rest.step_time)
    kinds = found.compute_time + found.memory_traffic_time + found.exposed_communication_time
    assert found.step_time == pytest.approx(kinds + found.launch_time)
    assert found.exposed_communication_time > 0 and found.launch_time >= 0
    assert planned("gpt", 1).predicted.exposed_communication_time == 0


def test_equal_layers_are_costed_once() -> None:
    """Their work is one object."""
    units = {u.name: u for u in model_of(planned("gpt", 4)).workload.units}
    for kind in ("attention", "mlp"):
        works = {id(units[f"layers.{i}.{kind}"].work[4]) for i in range(3)}
        assert len(works) == 1


def test_collectives_are_those_of_the_plan() -> None:
    """Bytes of each all-reduce: activations of [B, S, hidden], scalars of the loss."""
    model = model_of(planned("gpt", 2))
    unit = next(u for u in model.workload.units if u.name == "layers.0.mlp")
    found = [
        i for phase in (unit.work[2].forward, unit.work[2].backward) for i in phase.items
        if isinstance(i, Collective)
    ]  # fmt: skip
    assert [sympy.simplify(c.bytes - 4 * B * S * 64) for c in found] == [0, 0]


def test_what_a_sum_runs_under() -> None:
    """The products of the gradients of the weights that the value was multiplied by, local ones."""
    for family, name, widths in (
        ("gpt", "layers.0.mlp", [256]),
        ("gpt", "layers.0.attention", [3 * 64]),  # q, k and v in one weight
        ("llama", "layers.0.attention", [64, 16, 16]),  # apart: 8 heads of 8, 2 for keys and values
    ):
        model = model_of(planned(family, 2))
        unit = next(u for u in model.workload.units if u.name == name)
        (found,) = [i for i in unit.work[2].backward.items if isinstance(i, Collective)]
        expected = [2 * B * S * 64 * width / D for width in widths]
        pairs = zip(found.under, expected, strict=True)
        assert [sympy.simplify(p.flops - flops) for p, flops in pairs] == [0] * len(widths)
    assert not any(
        i.under for u in model.workload.units for i in u.work[2].forward.items
        if isinstance(i, Collective)
    )  # fmt: skip


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_runs_under_products_is_hidden_in_part(share: float) -> None:
    """c - overlap min(c, t), for a sum that is longer than the product, and one that is shorter."""
    machine = replace(load("h200"), overlap=share, lanes=())
    values = constants(machine, 2) | {"d": 2}

    def number(item: Any) -> float:
        formula = seconds(item)
        return float(formula.xreplace({s: sympy.Float(values[s.name]) for s in formula.free_symbols}))

    for size in (2**12, 2**30):
        product = Product(1, 2048, 2048, 2048, "bfloat16")
        alone, beside = Collective("all_reduce", size, D), Collective("all_reduce", size, D, (product,))
        hidden = share * min(number(alone), number(product))
        assert number(beside) == pytest.approx(number(alone) - hidden)


def test_what_overlaps_is_what_is_fused() -> None:
    """The cost model knows no graph, so it has the names of the matmuls that the pass fuses."""
    assert {target._schema.name.removeprefix("aten::") for target in LINEARS} == BY_WEIGHT


@pytest.mark.parametrize("share", [-1.0, 0.5])
def test_overlap_is_a_choice_of_the_plan(share: float, tmp_path: Any) -> None:
    """Taken where it is predicted to win, with both times; kept in a file; and followed."""
    machine = replace(load("h200"), overlap=share, lanes=())
    shape = Shape("gpt", 4096, 32, 2, 128, 2, vocabulary=256)
    with torch.device("meta"):
        model = build(shape)
    batch = tokens(256, 2, 128)
    options: dict[str, Any] = {"hardware": machine, "batch": 8, "sequence": 1024}
    plan = autoshard.plan(model, 2, batch, **options)
    assert max(plan.degrees.values()) == 2
    assert plan.overlap == (share > 0)  # below 0: they disturb each other
    times = []
    full = model_of(autoshard.plan(model, 2, batch, degree="max", **options))
    for workload in (full.workload, one_after_other(full.workload)):
        times.append(CostModel(workload, full.setting, 2).predict(plan.degrees))
    assert (times[0].step_time < times[1].step_time) == plan.overlap
    for time in times:
        assert f"{time.step_time * 1e3:.2f} ms" in plan.overlap_reason
    assert ("before" if share < 0 else "under") + " the weights' gradients" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert autoshard.Plan.load(tmp_path / "plan.json").overlap == plan.overlap
    again = autoshard.plan(model, 2, batch, plan=tmp_path / "plan.json", **options)
    assert again.overlap == plan.overlap
    assert again.predicted.step_time == pytest.approx(plan.predicted.step_time)
    elsewhere = options | {"hardware": "h200"}  # where it would win: the file says how it runs
    again = autoshard.plan(model, 2, batch, plan=tmp_path / "plan.json", **elsewhere)
    assert again.overlap == plan.overlap
    if not plan.overlap:
        assert again.predicted.step_time == pytest.approx(times[1].step_time)
    small = build(replace(shape, hidden=64, heads=4))
    program = analyse(skeleton(small), *normalized_inputs(small, tokens(256, 2, 16)), 2)
    sharded = rewrite(program, 2, "max", overlap=plan.overlap)[1]
    assert sharded.fused is not None
    called = {n.target for body in sharded.fused.bodies.values() for n in body.nodes}
    assert (fused_ops.column_linear in called) == plan.overlap
    assert (ops.copy in called) != plan.overlap
    assert fused_ops.row_linear in called


def test_what_runs_together_is_counted_so() -> None:
    """Gradients of q, k and v at numbers, by hand; each way where it moves less memory."""
    for rows, size, wide, narrow in ((8192, 4096, 8192, 128), (64, 64, 64, 64), (8192, 4096, 128, 128)):
        widths = (wide, narrow, narrow)
        of_input = tuple(Product(1, rows, size, n, "bfloat16") for n in widths)
        of_weights = tuple(Product(1, size, n, rows, "bfloat16") for n in widths)
        item = SideBySide(of_input, of_weights)
        dys = [torch.empty(rows, n, device="meta") for n in widths]
        weights = [torch.empty(n, size, device="meta") for n in widths]
        runs = len(side_by_side(dys, weights, False)[0]) == 1
        columns = sum(widths)
        assert bool(formulas.moves_less(item)) == runs
        assert runs == (columns * (rows + size) < 2 * rows * size)
        values = constants(load("h100"), 2)

        def number(found: Any, values: dict[str, float] = values) -> float:
            symbols = found.free_symbols
            return float(found.xreplace({s: sympy.Float(values[s.name]) for s in symbols}))

        one = [Product(1, rows, size, columns, "bfloat16")]
        one += [Product(1, size, columns, rows, "bfloat16")]
        laid = Traffic(4 * columns * rows), Traffic(4 * columns * size)
        read = 2 * 2 * rows * size / values["bandwidth"]
        ways = [
            sum(number(seconds(i)) for i in (*of_input, *of_weights)) + read,
            sum(number(seconds(i)) for i in (*one, *laid)),
        ]
        assert number(seconds(item)) == pytest.approx(ways[runs])
        assert number(seconds(Without(one[0]))) == -number(seconds(one[0]))


def test_one_call_in_place_of_several_takes_less() -> None:
    """Of the whole step: what is counted by operators goes, what runs in its place comes."""
    shape = Shape("llama", 4096, 32, 2, 16, 2, vocabulary=256, kv_heads=8)
    with torch.device("meta"):
        model = build(shape)
    batch, options = tokens(256, 2, 16), {"hardware": "h100", "batch": 4, "sequence": 2048}
    plan = autoshard.plan(model, 8, batch, degree="max", **options)
    costs = model_of(plan)
    unit = next(u for u in costs.workload.units if u.name == "layers.0.attention")
    items = unit.work[8].backward.items
    (item,) = [i for i in items if isinstance(i, SideBySide)]
    assert [i.item for i in items if isinstance(i, Without) and isinstance(i.item, Product)] == [
        *item.of_input, *item.of_weights
    ]  # fmt: skip
    adds = [i.item for i in items if isinstance(i, Without) and isinstance(i.item, Traffic)]
    assert len(adds) == 2  # of three gradients
    norm = [i for work in costs.workload.rest for i in work.backward.items if i == adds[0]]
    assert len(norm) >= 2 * shape.layers
    assert min(costs.evaluate(seconds(i), 8) for i in (item, *item.of_input)) > 0
    apart = CostModel(one_after_other(costs.workload), costs.setting, 8)
    assert costs.predict(plan.degrees).step_time < apart.predict(plan.degrees).step_time
    assert costs.predict(plan.degrees).flops_per_rank == apart.predict(plan.degrees).flops_per_rank
    for part in ("compute_time", "memory_traffic_time"):
        assert getattr(costs.predict(plan.degrees), part) > 0
    assert "one product in layers.{0..1}.attention" in str(plan)
    short = autoshard.plan(model, 8, batch, degree="max", hardware="h100", batch=1, sequence=64)
    assert "one product in" not in str(short)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize(
    "name", ["gptj", "gpt-neox", "llama-kv2", "gpt2", "bert", "bloom", "falcon-new", "t5", "phi3-kv2"]
)
def test_as_many_all_reduces_as_run(name: str, tp: int) -> None:
    """Of every value once: what is fused, added up before the sum, or shared by two regions."""
    one = case(name)
    model = one.build("eager", dropout=0.0)
    inputs = one.inputs(model)
    plan = autoshard.plan(model, tp, inputs, degree="max", hardware="h100")
    units = model_of(plan).workload.units
    shared = {
        (value, s.backward)
        for u in units for (value, d), s in u.shared.items() if d == plan.degrees[u.name]
    }  # fmt: skip
    found = [sum(back == way for _, back in shared) for way in (False, True)]
    for unit in units:
        work = unit.work[plan.degrees[unit.name]]
        for way, phase in enumerate((work.forward, work.backward)):
            found[way] += sum(isinstance(i, Collective) for i in phase.items)
    sharded = rewrite(analyse(skeleton(model), *normalized_inputs(model, inputs), tp), tp, "max")[1]
    ran = sharded.fused or sharded.unfused
    graphs = [ran.graph, *ran.bodies.values()]
    called = Counter(n.target for g in graphs for n in g.nodes)
    forward = called[fused_ops.row_linear] + called[ops.reduce]
    losses = sum(count for target, count in called.items() if "cross_entropy" in str(target))
    assert found == [forward + 2 * losses, called[fused_ops.column_linear] + called[ops.copy]]
    if name in ("gptj", "gpt-neox"):  # attention and MLP side by side
        assert "summed over the ranks once" in str(plan)


@pytest.mark.parametrize("vocabulary", [2048, 2050, 2047, 257])
def test_a_padded_head_is_summed_behind_its_products(vocabulary: int) -> None:
    """Its weight is computed, so that nothing is fused; as in what runs.

    Ranks whose shares are unequal would choose lanes by other columns, and communicators with them.
    """
    shape = Shape("gpt", 64, 4, 1, 16, 2, vocabulary=vocabulary)
    model, batch = build(shape), tokens(256, 2, 16)
    plan = autoshard.plan(model, 2, batch, degree="max", hardware="h100")
    units = model_of(plan).workload.units
    items = [i for u in units for i in u.work[2].backward.items if isinstance(i, Collective)]
    sharded = rewrite(analyse(skeleton(model), *normalized_inputs(model, batch), 2), 2, "max")[1]
    assert sharded.fused is not None
    graphs = [sharded.fused.graph, *sharded.fused.bodies.values()]
    called = Counter(n.target for g in graphs for n in g.nodes)
    assert sum(bool(i.under) for i in items) == called[fused_ops.column_linear]
    assert sum(not i.under for i in items) == called[ops.copy] == int(vocabulary != 2048)
    assert ("beside them in loss" in str(plan)) == (vocabulary == 2048)


def test_one_copy_for_two_regions_is_paid_once() -> None:
    """GPT-J's attention and MLP read one value: its gradient is one all-reduce at equal degrees."""
    one = case("gptj")
    model = one.build("eager", dropout=0.0)
    made = autoshard.plan(model, 4, one.inputs(model), degree="max", hardware="h200")
    block = next(r.name for r in made.regions if r.kind == "mlp").rpartition(".")[0]
    names = [r.name for r in made.regions if r.name.startswith(block)]
    assert len(names) == 2
    costs = made.costs
    alone = [costs.predict(made.degrees | dict.fromkeys(names, 1) | {n: 4}) for n in names]
    neither = costs.predict(made.degrees | dict.fromkeys(names, 1))
    both = costs.predict(made.degrees)
    apart = [a.exposed_communication_time - neither.exposed_communication_time for a in alone]
    together = both.exposed_communication_time - neither.exposed_communication_time
    assert together < sum(apart)
    mixed = costs.predict(made.degrees | {names[0]: 2})
    assert mixed.exposed_communication_time > both.exposed_communication_time


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "xlnet", "llama-kv2", "falcon-new", "phi3", "bloom"])
def test_any_model_has_its_flops_and_formulas(name: str) -> None:
    """Einsums, sizes with floor division, fused kernels, shared heads: counted as PyTorch counts."""
    one = case(name)
    model = one.build(one.attention[-1], dropout=0.0)
    inputs = one.inputs(model)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    plan = autoshard.plan(model, 4, inputs, degree="max", hardware="h200")
    whole = plan.costs.predict(dict.fromkeys(plan.degrees, 1))
    assert whole.flops_per_rank == pytest.approx(counter.get_total_flops(), rel=0.05)
    for region in plan.regions:
        assert plan.cost_formula(region.name).free_symbols
    chosen = autoshard.plan(model, 4, inputs, hardware="h200")
    assert chosen.predicted.step_time <= plan.predicted.step_time * (1 + 1e-9)


# Choices


def mixed_plan(**options: Any) -> autoshard.Plan:
    """Small and large layers, on the meta device."""
    with torch.device("meta"):
        model = Mixed(1024, (64, 16384), 512).bfloat16()
    options = {"hardware": "h200", "batch": 8, "sequence": 1024} | options
    return autoshard.plan(model, 4, tokens(512, 2, 16), **options)


def test_small_regions_stay_whole_and_say_why() -> None:
    """An all-reduce costs more than the small MLP saves, and less than the large one does."""
    plan = mixed_plan()
    assert (plan.degrees["layers.0"], plan.degrees["layers.1"]) == (1, 4)
    small, large = plan.region("layers.0").reason, plan.region("layers.1").reason
    assert small.startswith("degree 1: all-reduce ") and " > saved " in small
    assert large.startswith("degree 4: all-reduce ") and " < saved " in large


@pytest.mark.parametrize("share", [None, 0.2, 0.7])
def test_the_choice_is_the_best_of_all_plans(share: float | None) -> None:
    """Every assignment of degrees to regions, predicted one by one; with memory that binds."""
    free = mixed_plan()
    least = mixed_plan(degree="max").predicted.memory_per_rank
    most = free.predicted.memory_per_rank
    memory = None if share is None else least + share * (most - least)
    chosen = mixed_plan(memory=memory)
    best = None
    for degrees in product(*(r.degrees for r in free.regions)):
        found = free.costs.predict(dict(zip(free.degrees, degrees, strict=True)))
        if memory is None or found.memory_per_rank <= memory:
            best = min(best or found.step_time, found.step_time)
    assert best is not None
    assert chosen.predicted.step_time == pytest.approx(best, rel=1e-8)
    if memory is not None:
        assert chosen.predicted.memory_per_rank <= memory < most
        assert any("split to fit in memory" in r.reason for r in chosen.regions)


def test_too_little_memory_names_the_nearest_miss_and_what_helps() -> None:
    """How much there is, how much the smallest takes, three ways out."""
    with pytest.raises(PlanError, match=r"memory=0\.09 GiB.*smallest takes 0\.\d+ GiB") as error:
        mixed_plan(memory=1e8)
    for fix in ("more ranks than tp=4", "checkpoint='layer'", "a batch smaller than 8"):
        assert fix in str(error.value)


def test_uniform_takes_one_and_tp_only() -> None:
    """Where a degree between would be the fastest."""
    links = tuple(
        replace(link, bandwidth=link.bandwidth / (50 if link.ranks > 2 else 1))
        for link in load("h200").links
    )
    slow = replace(load("h200"), links=links)
    assert mixed_plan(hardware=slow).degrees["layers.1"] == 2
    assert set(mixed_plan(hardware=slow, uniform=True).degrees.values()) <= {1, 4}


def test_tied_regions_are_chosen_together() -> None:
    """nanoGPT's embedding and output share a weight."""
    with torch.device("meta"):
        model = nanogpt.GPT(
            nanogpt.GPTConfig(n_embd=1024, n_head=16, vocab_size=50304, block_size=1024)
        )
    batch = {k: torch.zeros((2, 16), dtype=torch.int64) for k in ("idx", "targets")}
    plan = autoshard.plan(model.bfloat16(), 8, batch, hardware="h200", batch=8, sequence=1024)
    assert plan.degrees["transformer.wte"] == plan.degrees["lm_head"] == 8
    assert "2 tied regions" in plan.region("transformer.wte").reason


def test_with_degree_predicts_anew() -> None:
    """Another degree, another time; the reason is the request."""
    plan = mixed_plan()
    changed = plan.with_degree("layers.0", 4)
    assert changed.predicted.step_time > plan.predicted.step_time
    assert "by request" in changed.notes[-1]
    before = {p.name: p.local_numel for p in plan.parameters}
    shares = {p.name: p for p in changed.parameters if p.name.startswith("layers.0.")}
    assert any(p.local_numel < before[p.name] for p in shares.values())
    assert all(p.degree == 4 for p in shares.values() if p.local_numel < before[p.name])


def test_an_automatic_plan_is_kept_and_followed(tmp_path: Any) -> None:
    """Saved, loaded, and taken by plan() as it is."""
    plan = mixed_plan()
    plan.save(tmp_path / "plan.json")
    again = mixed_plan(plan=tmp_path / "plan.json")
    assert again.degrees == plan.degrees
    with pytest.raises(PlanError, match="knows no costs"):
        _ = autoshard.Plan.load(tmp_path / "plan.json").predicted


def test_parallelize_follows_the_cost_model() -> None:
    """By default; in one process it has nothing to choose."""
    model = build(GPT)
    tp_model = autoshard.parallelize(model, 1, tokens(256, 2, 16))
    assert set(tp_model.plan.degrees.values()) == {1}
    assert tp_model.plan.predicted.step_time > 0


# What is planned for


def test_defaults() -> None:
    """The GPU at hand, else h100; the size of given inputs; else 8 and the longest sequence."""
    shape = replace(GPT, sequence=48)
    given = autoshard.plan(build(shape), 2, tokens(256, 3, 12))
    setting = model_of(given).setting
    expected = "h100" if not torch.cuda.is_available() else setting.hardware.name
    assert (setting.hardware.name, setting.batch, setting.sequence) == (expected, 3, 12)
    one = case("gpt2")
    found = model_of(autoshard.plan(one.build("sdpa"), 2)).setting
    assert (found.batch, found.sequence) == (8, one.build("sdpa").config.n_positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hardware": "v1000"}, "a100, cpu, h100, h200"),
        ({"batch": 0}, "batch=0 must be a positive number"),
        ({"sequence": -4}, "sequence=-4 must be a positive number"),
        ({"batch": True}, "batch=True"),
        ({"memory": 0}, "memory=0 must be a positive number of bytes"),
        ({"memory": -1.0}, "memory=-1.0"),
        ({"optimizer": "adam"}, "optimizer='adam' must be one of none, sgd"),
        ({"checkpoint": "block"}, "checkpoint='block'"),
    ],
)
def test_arguments_that_are_none(options: dict[str, Any], message: str) -> None:
    """A ValueError with what there is; before anything is captured."""
    with pytest.raises(ValueError, match=message):
        autoshard.plan(build(GPT), 2, tokens(256, 2, 16), **options)


def test_a_fixed_batch_cannot_be_planned_for_another() -> None:
    """The capture fixes a batch of one; silently wrong times would follow."""
    with pytest.raises(PlanError, match="batch of 1 only, and batch=8"):
        _ = autoshard.plan(build(GPT), 2, tokens(256, 1, 16), batch=8, degree="max").predicted


def test_hardware_given_as_an_object() -> None:
    """A Hardware is taken as it is."""
    fast: Hardware = replace(load("h200"), flops={"float32": 1e18, "bfloat16": 1e18})
    slow = planned("gpt", 2).predicted.compute_time
    assert planned.__wrapped__("gpt", 2, hardware=fast).predicted.compute_time < slow
