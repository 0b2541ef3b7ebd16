"""What every test stands on: no telemetry, no store outside the tests, repeatable examples."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from running_service import Running

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that spin while they wait would take the cores from the other workers. torch,
    # scikit-learn and Arrow read this once, on import; what tests start inherits it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: One whole run serves all of these.
TOGETHER = ("tests/e2e/",)
LONGEST = (*TOGETHER, "tests/faults/")

#: Set before any vendor is imported, since several read these once, on import.
os.environ.update(
    DO_NOT_TRACK="1",
    BENTOML_DO_NOT_TRACK="True",
    KEDRO_DISABLE_TELEMETRY="1",
    GX_ANALYTICS_ENABLED="false",
    # Not the project's own store: no test may touch the models somebody trained.
    BENTOML_HOME=tempfile.mkdtemp(prefix="fathom-bentoml-"),
)

# The same examples on every run and no time limit per example: on a loaded machine a slow example
# is no fault. `HYPOTHESIS_PROFILE=explore` looks for new ones.
settings.register_profile(
    "fathom",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fathom"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The small shop's service, one process for all tests that only ask it."""
    from fathom.serving import ServingConfig
    from running_service import running

    with running(tmp_path_factory.mktemp("service"), ServingConfig(log_format="json")) as service:
        yield service


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A worker takes whole files, so that what the tests of a file share is made once.

    The tests of a folder in `TOGETHER` share more, and go to one worker.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return next((folder for folder in TOGETHER if file.startswith(folder)), file)

    config.option.loadscopereorder = False  # the order below, not the number of tests
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker is left alone with them at the end.

    What this machine lacks is skipped; each check is paid for only where a test asks for it.
    """
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
    for marker, (lacks, reason) in _NEEDS.items():
        marked = [item for item in items if marker in item.keywords]
        if marked and lacks():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)


def _lacks_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()


def _lacks_redis() -> bool:
    return shutil.which("redis-server") is None


def _lacks_spark() -> bool:
    import importlib.util

    return importlib.util.find_spec("pyspark") is None or shutil.which("java") is None


_NEEDS = {
    "gpu": (_lacks_gpu, "no CUDA device"),
    "redis": (_lacks_redis, "no redis-server on the path"),
    "spark": (_lacks_spark, "no pyspark or no Java"),
}
