"""Hardware: a machine as data. Presets with their sources, and profiles that ``calibrate`` wrote.

Units: seconds, bytes, FLOP/s, bytes/s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

PROFILES = Path(__file__).resolve().parent / "profiles"


MOST_LANES = 2  # that a profile may have
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}  # of an element
ATTENTION_KERNELS = ("causal", "full", "masked")
# What a kernel that was not measured by name costs, in times that the result crosses the memory:
# what it reads and writes at the least.
LEAST_PASSES = {
    "layer_norm": (2.0, 4.0), "rms_norm": (2.0, 4.0), "softmax": (2.0, 3.0), "dropout": (2.5, 2.5),
    "gelu": (2.0, 3.0), "cross_entropy": (3.0, 3.0), "vocab_cross_entropy": (4.0, 4.0),
    "embedding": (2.0, 1.5), "broadcast": (2.0, 3.0),
}  # fmt: skip


class HardwareError(ValueError):
    """An unknown name, or a profile with a field that is missing or wrong."""


@dataclass(frozen=True)
class Link:
    """All-reduces among so many neighbouring ranks.

    Attributes:
        ranks: the largest group inside this level (8: one node).
        latency: seconds of an all-reduce of nothing over two ranks; log2(d) times that over d.
        bandwidth: bytes/s per rank and direction that a large ring all-reduce reaches:
            time = latency log2(d) + 2 (d-1)/d bytes / bandwidth.
    """

    ranks: int
    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Lane:
    """How an all-reduce and products share a device: some multiprocessors are the collective's own.

    Matmuls for Hopper put one block on every multiprocessor that they see, each with its share of the
    result. Where a collective holds some of them, the blocks that find no place run after all others:
    as if nothing had run at once. So matmuls are told to leave some.

    Attributes:
        multiprocessors: that the collective takes.
        left: that products leave alone: a few more, as blocks come in pairs of neighbours.
        slower: how much longer products take on the others.
        share: of the link's bandwidth that the collective reaches beside products.
    """

    multiprocessors: int
    left: int
    slower: float
    share: float


@dataclass(frozen=True)
class Hardware:
    """What the formulas need to know of a machine.

    Attributes:
        name, device: of the profile, and as the driver calls the device.
        memory: bytes of one device.
        flops: dtype -> FLOP/s that a large product reaches.
        fill: (m0, n0, k0): a product of [m, k] and [k, n] reaches 1 / (1 + m0/m + n0/n + k0/k) of it.
        tile, processors: a product is worked out in whole tiles of the result, one per processor and
            wave; 1 where ``fill`` says it all.
        bandwidth: bytes/s of memory that a large copy reaches.
        kernel: seconds that the smallest kernel takes on the device.
        attention: kernel -> (forward, backward) FLOP/s, counted as if nothing were masked.
        passes: operator -> (forward, backward) times that the result's bytes cross the memory.
        host: node kind -> (forward, backward) seconds of Python and launch; 0 where not given (one
            process has no collectives, and no parameters that are DTensors).
        links: levels of the network, from the inside out.
        overlap: how much of the shorter one is hidden where a product and an all-reduce of the group
            run side by side, at most 1; below 0 where they disturb each other.
        multiprocessors: of the device.
        lanes: ways in which products leave room for an all-reduce beside them, the widest first, which
            a collective takes by itself; none: they leave no room.
        source: where the numbers come from; date, versions and fit_error of a measured profile.
    """

    name: str
    device: str
    memory: float
    flops: Mapping[str, float]
    fill: tuple[float, float, float]
    bandwidth: float
    kernel: float
    attention: Mapping[str, tuple[float, float]]
    passes: Mapping[str, tuple[float, float]]
    host: Mapping[str, tuple[float, float]]
    links: tuple[Link, ...]
    tile: tuple[int, int] = (1, 1)
    processors: int = 1
    overlap: float = 0.0
    multiprocessors: int = 0
    lanes: tuple[Lane, ...] = ()
    source: str = ""
    date: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    fit_error: Mapping[str, float] = field(default_factory=dict)

    def rate(self, dtype: str) -> float:
        """FLOP/s for a dtype; of the nearest wider one that is known."""
        for known in (dtype, *{"float16": ("bfloat16",), "bfloat16": ("float16",)}.get(dtype, ())):
            if known in self.flops:
                return self.flops[known]
        if dtype == "float64" and "float32" in self.flops:
            return self.flops["float32"] / 2
        return min(self.flops.values())

    def link(self, degree: int) -> Link:
        """The level that a group of so many neighbouring ranks spans."""
        for link in self.links:
            if degree <= link.ranks:
                return link
        if not self.links:
            raise HardwareError(
                f"the profile {self.name!r} was measured on one device and knows no link; calibrate "
                "under torchrun with as many processes as tp, or name a preset"
            )
        return self.links[-1]

    def save(self, path: str | Path) -> None:
        """Write the profile as JSON."""
        Path(path).write_text(json.dumps({"autoshard_hardware": 1} | asdict(self), indent=1) + "\n")


def presets() -> tuple[str, ...]:
    """The names that ``hardware=`` knows."""
    return tuple(sorted(path.stem for path in PROFILES.glob("*.json")))


def load(hardware: str | Path | Hardware) -> Hardware:
    """A preset by name, a profile by path, or a ``Hardware`` as it is.

    Raises:
        HardwareError: an unknown name (lists the known), or a malformed profile (names the field).
    """
    if isinstance(hardware, Hardware):
        return hardware
    path = PROFILES / f"{hardware}.json"
    if not path.exists():
        path = Path(hardware)
    if not path.is_file():
        raise HardwareError(
            f"hardware={str(hardware)!r} is neither a known name ({', '.join(presets())}) nor a file"
        )
    return _read(path)


@lru_cache(maxsize=64)
def _read(path: Path) -> Hardware:
    try:
        document: Any = json.loads(path.read_text())
    except ValueError as error:
        raise HardwareError(f"{path} is no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("autoshard_hardware") != 1:
        raise HardwareError(f"{path} is no hardware profile: field 'autoshard_hardware' must be 1")

    def number(name: str, value: Any, least: float = 0.0) -> float:
        sound = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not sound or not math.isfinite(value) or value < least:
            raise HardwareError(f"{path}: field {name!r} must be a number >= {least}, is {value!r}")
        return float(value)

    def positive(name: str, value: Any) -> float:
        if number(name, value) == 0:
            raise HardwareError(f"{path}: field {name!r} must be positive, is {value!r}")
        return float(value)

    def table(name: str) -> dict[str, Any]:
        found = document.get(name)
        if not isinstance(found, dict):
            raise HardwareError(f"{path}: field {name!r} must be an object, is {found!r}")
        return found

    def pairs(name: str) -> dict[str, tuple[float, float]]:
        found = {}
        for key, value in table(name).items():
            if not isinstance(value, list) or len(value) != 2:
                raise HardwareError(f"{path}: field '{name}.{key}' must be two numbers, is {value!r}")
            found[key] = (number(f"{name}.{key}", value[0]), number(f"{name}.{key}", value[1]))
        return found

    fill, links, lanes = document.get("fill"), document.get("links"), document.get("lanes", [])
    tile, processors = document.get("tile", [1, 1]), document.get("processors", 1)
    if not isinstance(tile, list) or len(tile) != 2:
        raise HardwareError(f"{path}: field 'tile' must be two numbers, is {tile!r}")
    if not isinstance(fill, list) or len(fill) != 3:
        raise HardwareError(f"{path}: field 'fill' must be three numbers, is {fill!r}")
    if not isinstance(links, list) or not all(isinstance(link, dict) for link in links):
        raise HardwareError(f"{path}: field 'links' must be a list of objects, is {links!r}")
    if not isinstance(lanes, list) or not all(isinstance(lane, dict) for lane in lanes):
        raise HardwareError(f"{path}: field 'lanes' must be a list of objects, is {lanes!r}")
    device_has = int(number("multiprocessors", document.get("multiprocessors", 0)))
    for i, lane in enumerate(lanes):
        if positive(f"lanes.{i}.left", lane.get("left")) >= device_has:
            raise HardwareError(
                f"{path}: field 'lanes.{i}.left' must be less than the {device_has} multiprocessors of "
                f"the device, is {lane['left']}"
            )
    if len(lanes) > MOST_LANES:
        raise HardwareError(f"{path}: field 'lanes' must be at most {MOST_LANES}, are {len(lanes)}")
    for kernel in ATTENTION_KERNELS:
        if kernel not in table("attention"):
            raise HardwareError(f"{path}: field 'attention.{kernel}' is missing")
    flops = {k: positive(f"flops.{k}", v) for k, v in table("flops").items()}
    if not flops:
        raise HardwareError(f"{path}: field 'flops' names no dtype")
    return Hardware(
        name=str(document.get("name", path.stem)),
        device=str(document.get("device", "")),
        memory=positive("memory", document.get("memory")),
        flops=flops,
        fill=(number("fill", fill[0]), number("fill", fill[1]), number("fill", fill[2])),
        bandwidth=positive("bandwidth", document.get("bandwidth")),
        kernel=number("kernel", document.get("kernel")),
        attention={k: _rates(path, k, v) for k, v in pairs("attention").items()},
        passes=LEAST_PASSES | pairs("passes"),
        host=pairs("host"),
        links=tuple(
            Link(
                int(positive(f"links.{i}.ranks", link.get("ranks"))),
                number(f"links.{i}.latency", link.get("latency")),
                positive(f"links.{i}.bandwidth", link.get("bandwidth")),
            )
            for i, link in enumerate(links)
        ),
        tile=(int(positive("tile", tile[0])), int(positive("tile", tile[1]))),
        processors=int(positive("processors", processors)),
        overlap=min(1.0, number("overlap", document.get("overlap", 0.0), -math.inf)),
        multiprocessors=device_has,
        lanes=tuple(
            Lane(
                int(positive(f"lanes.{i}.multiprocessors", lane.get("multiprocessors"))),
                int(lane["left"]),
                number(f"lanes.{i}.slower", lane.get("slower"), 1.0),
                positive(f"lanes.{i}.share", lane.get("share")),
            )
            for i, lane in enumerate(lanes)
        ),
        source=str(document.get("source", "")),
        date=str(document.get("date", "")),
        versions=dict(document.get("versions", {})),
        fit_error=dict(document.get("fit_error", {})),
    )


def _rates(path: Path, kernel: str, pair: tuple[float, float]) -> tuple[float, float]:
    if not min(pair) > 0:
        raise HardwareError(f"{path}: field 'attention.{kernel}' must be positive, is {list(pair)}")
    return pair


def at_hand() -> Hardware:
    """The profile of the GPU at hand, else ``h100``."""
    import torch

    found = preset_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return found or load("h100")


def preset_of(device: str) -> Hardware | None:
    """The preset of a device, by what its driver calls it."""
    return next((load(preset) for preset in presets() if preset in device.lower()), None)
