"""Ranks that must agree: fingerprints, the inputs of a call, and what ranks hold alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import autoshard
from autoshard.agreement import CALLS, fingerprint
from autoshard.errors import RanksDifferError
from tests.distributed import run_distributed
from tests.models import nanogpt

# Fingerprints


@given(st.data())
def test_a_fingerprint_depends_on_every_bit(data: st.DataObject) -> None:
    """Any bit of any element of any dtype, and its place."""
    dtype = data.draw(
        st.sampled_from([torch.int64, torch.float32, torch.bfloat16, torch.bool, torch.complex64])
    )
    size = data.draw(st.integers(1, 33))
    tensor = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    before = int(fingerprint(tensor))
    assert int(fingerprint(tensor.clone())) == before
    bits = tensor.clone().view(torch.uint8)
    byte = data.draw(st.integers(0, bits.numel() - 1))
    bits[byte] ^= 1 << data.draw(st.integers(0, 7))
    assert int(fingerprint(bits.view(dtype))) != before


def test_a_fingerprint_depends_on_order_not_on_memory() -> None:
    """Rows swapped, a shift, two signs at once: another one. Strides and offsets: the same."""
    x = torch.randn(6, 5)
    rows = torch.cat([x[1:2], x[:1], x[2:]])
    signs = x.clone()
    signs[0, 0], signs[3, 2] = -signs[0, 0], -signs[3, 2]
    changed = [rows, x.roll(1), signs, x + 1, x.flip(0), x.t()]
    different = [x, *changed, torch.zeros(6, 5), torch.zeros(7, 5)]
    assert len({int(fingerprint(t)) for t in different}) == len(different)
    assert int(fingerprint(x.t().contiguous().t())) == int(fingerprint(x))
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(6, 5)
    assert shifted.storage_offset() == 1
    assert int(fingerprint(shifted)) == int(fingerprint(x))
    assert int(fingerprint(torch.tensor(3))) != int(fingerprint(torch.tensor(4)))
    assert int(fingerprint(torch.zeros(0))) == 0


def test_a_fingerprint_of_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashed in parts or at once: the same."""
    x = torch.randn(1001)
    whole = int(fingerprint(x))
    monkeypatch.setattr("autoshard.agreement._PART", 64)
    assert int(fingerprint(x)) == whole


# Inputs


class Pair(nn.Module):
    """Tensors, a number, a nested input, and a mode that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, factor: float = 1.0, more: dict[str, Tensor] | None = None) -> Tensor:
        y = self.up(x)
        if more is not None:
            y = y + more["bias"]
        out: Tensor = self.dropout(self.down(torch.relu(y))) * factor
        return out


def _x(rows: int = 3) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))


def _told(call: Callable[[], Any]) -> str:
    """What the call raises on this rank; "" for nothing."""
    try:
        call()
    except RanksDifferError as error:
        return str(error)
    return ""


def _parallel(model: nn.Module | None = None, tp: int = 2, **options: Any) -> autoshard.ParallelModule:
    torch.manual_seed(0)
    given = {"example_inputs": (_x(),), "degree": "max"} | options
    return autoshard.parallelize(Pair() if model is None else model, tp, **given)


def inputs_that_differ() -> dict[str, str]:
    """What each way to call ranks differently gives, on this rank. The second rank is the odd one."""
    odd = dist.get_rank() == 1
    tp_model = _parallel(check_inputs=True)
    found = {"same": _told(lambda: tp_model(_x()))}
    one = _x()
    one[2, 7] += 1e-6 * odd
    found["values"] = _told(lambda: tp_model(one))
    found["order"] = _told(lambda: tp_model(_x().flip(0) if odd else _x()))
    found["shape"] = _told(lambda: tp_model(_x(4 if odd else 3)))
    found["dtype"] = _told(lambda: tp_model(_x().double() if odd else _x()))
    found["number"] = _told(lambda: tp_model(_x(), factor=2.0 if odd else 1.0))
    found["missing"] = _told(lambda: tp_model(_x(), **({} if odd else {"factor": 2.0})))
    more = {"bias": torch.ones(16) + odd}
    found["nested"] = _told(lambda: tp_model(_x(), more=more))
    tp_model.train(not odd)
    found["mode"] = _told(lambda: tp_model(_x()))
    tp_model.train()
    with torch.set_grad_enabled(odd):
        found["grad"] = _told(lambda: tp_model(_x()))
    with torch.autocast("cpu", torch.bfloat16, enabled=odd):
        found["autocast"] = _told(lambda: tp_model(_x()))
    found["by name"] = _told(lambda: tp_model(x=_x()) if odd else tp_model(_x()))
    found["again"] = _told(lambda: tp_model(_x()))
    return found


def on_two_ranks() -> tuple[dict[str, str], dict[str, list[bool]], list[bool]]:
    """All that two ranks are asked for."""
    return inputs_that_differ(), when_inputs_are_compared(), the_first_calls_pass()


@pytest.fixture(scope="module")
def two() -> list[Any]:
    """What each of two ranks found."""
    return run_distributed(on_two_ranks, 2)


@pytest.mark.slow
def test_every_rank_raises_where_inputs_differ(two: list[Any]) -> None:
    """The input, both sides and the fix, the same on both ranks; and the group goes on after it."""
    first, second = dict(two[0][0]), two[1][0]
    assert first == second
    assert first.pop("same") == first.pop("again") == first.pop("by name") == ""
    expected = {
        "values": "x: other values on rank 1 than on rank 0 (float32 (3, 8) on all)",
        "order": "x: other values on rank 1 than on rank 0",
        "shape": "x: float32 (3, 8) on rank 0, float32 (4, 8) on rank 1",
        "dtype": "x: float32 (3, 8) on rank 0, float64 (3, 8) on rank 1",
        "number": "factor: 1.0 on rank 0, 2.0 on rank 1",
        "missing": "factor: 2.0 on rank 0, not given on rank 1",
        "nested": "more['bias']: other values on rank 1",
        "mode": "train or eval mode: train on rank 0, eval on rank 1",
        "grad": "gradient mode: off on rank 0, on on rank 1",
        "autocast": "autocast: off on rank 0, bfloat16 on rank 1",
    }
    assert first.keys() == expected.keys()
    for what, line in expected.items():
        assert line in first[what], what
        assert first[what].count("\n  ") == 1, what
        assert "num_replicas=1, rank=0" in first[what]


def when_inputs_are_compared() -> dict[str, list[bool]]:
    """By mode, which of a sequence of calls were compared: same graph, new shape, new signature."""
    found = {}
    for mode in ("first", True, False):
        tp_model = _parallel(check_inputs=mode).eval()
        raised = []
        for call in range(8):
            # Two signatures; the second one, from call 5, has to be captured.
            more = {"factor": 3.0} if call >= 5 else {}
            raised.append(bool(_told(partial(tp_model, _x() + dist.get_rank(), **more))))
        found[str(mode)] = raised
    return found


@pytest.mark.slow
def test_the_first_calls_are_compared(two: list[Any]) -> None:
    """Three of a graph by default, also of one that is captured later; all or none where asked."""
    assert CALLS == 3
    for _, found, _ in two:
        assert found["True"] == [True] * 8
        assert found["False"] == [False] * 8
        # eval is another signature than the example's: it is never captured while the inputs differ
        assert found["first"] == [True] * 8


def the_first_calls_pass() -> list[bool]:
    """Equal inputs four times, then others: not compared any more. Then another signature."""
    tp_model = _parallel()
    raised = [bool(_told(lambda: tp_model(_x()))) for _ in range(CALLS)]
    other = _x() + dist.get_rank()
    raised.append(bool(_told(lambda: tp_model(other))))
    raised.append(bool(_told(lambda: tp_model(other, factor=2.0))))
    raised += [bool(_told(lambda: tp_model(_x(), factor=2.0))) for _ in range(CALLS + 1)]
    raised.append(bool(_told(lambda: tp_model(other, factor=2.0))))
    return raised


@pytest.mark.slow
def test_the_first_calls_of_every_graph_are_compared(two: list[Any]) -> None:
    """After three calls a graph is trusted; one that has to be captured starts anew."""
    expected = [False] * CALLS + [False, True] + [False] * (CALLS + 1) + [False]
    assert [passed for _, _, passed in two] == [expected, expected]


def replicas_may_differ() -> str:
    """dp x tp = 2 x 2: each tp group has its own batch, then rank 3 another than rank 2."""
    tp_model = _parallel(check_inputs=True)
    rank = dist.get_rank()
    assert _told(lambda: tp_model(_x() + rank // 2)) == ""
    return _told(lambda: tp_model(_x() + (rank == 3)))


@pytest.mark.slow
def test_data_parallel_groups_may_differ() -> None:
    """Only the group with the odd rank raises, with the coordinate that a sampler needs."""
    found = run_distributed(replicas_may_differ, 4)
    assert found[:2] == ["", ""]
    assert found[2] == found[3]
    assert "the ranks 2, 3 of one" in found[2] and "on rank 3 than on rank 2" in found[2]
    assert "num_replicas=2, rank=1" in found[2]


@pytest.mark.parametrize("wrong", ["always", 1.5, None])
def test_check_inputs_has_three_values(wrong: Any) -> None:
    """Before anything else is done."""
    with pytest.raises(ValueError, match=r'check_inputs=.* must be True, False or "first"'):
        autoshard.parallelize(Pair(), 1, (_x(),), check_inputs=wrong)


# Replicas


def drifted() -> dict[str, Any]:
    """A model whose degrees are 4, 2 (twins) and 1, with heads that ranks share; spoilt, repaired."""
    config = nanogpt.GPTConfig(n_layer=1, n_head=4, n_embd=32, dropout=0.1)
    torch.manual_seed(0)
    model = nanogpt.GPT(config)
    model.register_buffer("steps", torch.zeros(3))
    batch = nanogpt.inputs(model)
    plan = autoshard.plan(model, 4, batch, degree="max").with_degree("transformer.h.0.attn", 2)
    tp_model = autoshard.parallelize(model, 4, batch, plan=plan)
    rank = dist.get_rank()
    tp_model(**batch)
    found: dict[str, Any] = {"clean": _told(tp_model.check_replicas)}
    parameters = dict(tp_model.named_parameters())

    def spoil() -> None:
        with torch.no_grad():
            if rank == 3:  # replicated
                parameters["transformer.ln_f.weight"].to_local()[5] += 0.25
            if rank == 2:  # one of the twins 0 and 2 of the attention's split in two
                parameters["transformer.h.0.attn.c_attn.weight"].to_local()[0, 0] -= 2.0
            if rank == 1:  # its own: nobody else holds this share
                parameters["transformer.h.0.mlp.c_fc.weight"].to_local()[0, 0] += 1.0
            if rank == 0:
                tp_model.get_buffer("steps")[1] = 7.0

    spoil()
    found["drifted"] = _told(tp_model.check_replicas)
    found["repaired"] = tp_model.check_replicas(repair=True)
    found["buffer"] = tp_model.get_buffer("steps").tolist()
    found["after"] = _told(tp_model.check_replicas)
    mesh = tp_model.__dict__["_mesh"]
    if rank == 1:
        mesh.group(1).stream.run(torch.rand, 2)
        mesh.group(2).stream.manual_seed(5)
    found["streams"] = _told(tp_model.check_replicas)
    tp_model.check_replicas(repair=True)
    found["drawn"] = [mesh.group(d).stream.run(torch.rand, 1).item() for d in (1, 2)]
    found["at last"] = _told(tp_model.check_replicas)
    return found


@pytest.mark.slow
def test_replicas_that_drift_are_named_and_repaired() -> None:
    """Replicated parameters, twins, buffers and streams: who, from whom, and how far."""
    ranks = run_distributed(drifted, 4, timeout=240)
    for found in ranks:
        assert found["clean"] == found["after"] == found["at last"] == ""
        lines = found["drifted"].splitlines()[1:-1]
        assert [line.strip() for line in lines] == list(found["repaired"])
        assert sorted(found["repaired"]) == [
            "steps: rank 1, 2, 3 differs from rank 0, by at most 7",
            "transformer.h.0.attn.c_attn.weight: rank 2 differs from rank 0, by at most 2",
            "transformer.ln_f.weight: rank 3 differs from rank 0, by at most 0.25",
        ]
        assert found["buffer"] == [0.0, 7.0, 0.0]
        assert "the random stream of what is not split: rank 1 differs from rank 0" in found["streams"]
        assert "the random stream of degree 2: rank 3 differs from rank 1" in found["streams"]
        assert found["drifted"] == ranks[0]["drifted"] and found["streams"] == ranks[0]["streams"]
    drawn = [found["drawn"] for found in ranks]
    assert len({d[0] for d in drawn}) == 1
    assert drawn[0][1] == drawn[2][1] != drawn[1][1] == drawn[3][1]


def test_one_rank_has_no_replicas() -> None:
    """tp=1 in a plain script."""
    assert _parallel(tp=1).check_replicas() == ()
