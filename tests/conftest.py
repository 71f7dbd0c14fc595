"""What every test shares: one thread, a fixed seed, no network; and --update-golden."""

import os

# Before torch and transformers are imported; processes that a test starts inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if not os.path.exists("/dev/nvidiactl"):  # without a GPU kernels are run in Python
    os.environ.setdefault("TRITON_INTERPRET", "1")

import hypothesis
import pytest
import torch

torch.set_num_threads(1)


class _TorchRandom:
    """torch's generator, for hypothesis to seed: an example draws the same alone and in a run."""

    def seed(self, value: int) -> None:
        torch.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)


_TORCH_RANDOM = _TorchRandom()  # hypothesis keeps only a weak reference
hypothesis.register_random(_TORCH_RANDOM)

hypothesis.settings.register_profile(
    "autoshard",
    deadline=None,  # an example may compile a model
    derandomize=bool(os.environ.get("CI")),
    database=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("autoshard")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="write the golden files from what the compiler emits now, instead of comparing",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: left out of `make test-fast`")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Tables that tests recorded are printed, in whichever process they ran."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                for name, text in report.user_properties:
                    if name == "table":
                        terminalreporter.write_line(f"\n{report.nodeid}\n{text}")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """True where the golden files are to be written, not compared."""
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state."""
    torch.manual_seed(0)
