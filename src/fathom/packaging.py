"""From a registered version to a Bento, and a dry run of the Bento before it may be promoted.

A version's files are copied into BentoML's model store under a pinned tag and verified there; the
Bento is built from ``bentofile.yaml`` with that one model; the dry run starts the Bento as a real
process and asks it the golden requests. Every step can be repeated: what is whole is kept, what a
crash left half-written is replaced.

BentoML's stores are where ``BENTOML_HOME`` says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from fathom import api, files
from fathom.artifact import MANIFEST, ArtifactError, verify
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    import httpx

    from fathom.feature_store import FeatureRepo
    from fathom.serving import ServingConfig

MODEL = "fathom_ranker"
BENTOFILE = "bentofile.yaml"
START_SECONDS = 60.0
STOP_SECONDS = 10.0
_REQUEST_ROWS = 1_000
#: Requests before the clock runs, and those that it times.
_WARM_UP = 20
_TIMED = 200
_LOG_CHARACTERS = 4_000
_PRIVACY = {"BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1"}
#: BentoML's command line, which ends when its parent does: its standard input is a pipe from it.
_LAUNCH = """
import os, runpy, signal, threading, time

def watch():
    os.read(0, 1)
    while True:  # a signal that comes while the server starts is lost
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

threading.Thread(target=watch, daemon=True).start()
runpy.run_module("bentoml", run_name="__main__", alter_sys=True)
"""

log = logging.getLogger(__name__)


class PackagingError(RuntimeError):
    """A model or a Bento cannot be made; the message says what is missing."""


class DryRunError(RuntimeError):
    """A Bento did not start, did not answer, or did not return its golden probabilities."""


@dataclass(frozen=True)
class DryRun:
    """What a dry run found.

    Args:
        max_difference: the largest of a golden probability.
        seconds: that all of it took, the start included.
        rows: that each timed request holds, as many as fit into one.
        p50_ms, p99_ms: how long a timed request took, over one connection and one at a time.
    """

    max_difference: float
    seconds: float
    rows: int
    p50_ms: float
    p99_ms: float


# -- building ------------------------------------------------------------------------------------


def import_ranker(folder: Path, version: str) -> str:
    """Copy a registered version into BentoML's model store.

    Args:
        folder: the version's files and their manifest.
        version: its name, which becomes the model's.

    Returns:
        The model's tag, ``fathom_ranker:<version>``.

    Raises:
        ArtifactError: the files, or their copies, are not those of the manifest.
        PackagingError: the folder holds another version, or ``BENTOML_HOME`` is not set.
    """
    found = verify(folder)
    if found != version:
        raise PackagingError(f"{folder} holds version {found!r}, not {version!r}")
    tag = f"{MODEL}:{version}"
    target = _home() / "models" / MODEL / version
    bentoml = _bentoml()
    if _is_whole(target, lambda: bentoml.models.get(tag)):
        return tag
    shutil.rmtree(target, ignore_errors=True)
    with bentoml.models.create(tag, metadata={"version": version}) as model:
        shutil.copytree(folder, model.path, dirs_exist_ok=True)
    verify(target)
    return tag


def build_bento(tag: str, project_root: Path) -> str:
    """Build the Bento of one model from ``bentofile.yaml``.

    Its version is the ranker's and a hash of the code, so that the same content is built once.

    Args:
        tag: of the model, from `import_ranker`.

    Returns:
        The Bento's tag.

    Raises:
        PackagingError: ``bentofile.yaml`` is missing, or files that it includes, or uv.
    """
    if importlib.util.find_spec("uv") is None and shutil.which("uv") is None:
        raise PackagingError("uv is not installed, and BentoML would download it: pip install uv")
    bentofile = project_root / BENTOFILE
    if not bentofile.is_file():
        raise PackagingError(f"{project_root} has no {BENTOFILE}; give the project's folder")
    options = yaml.safe_load(bentofile.read_text(encoding="utf-8"))
    ranker_version = tag.partition(":")[2]
    version = f"{ranker_version}-{_code_hash(project_root, options['include'])}"
    bento_tag = f"{options['name']}:{version}"
    target = _home() / "bentos" / options["name"] / version
    bentoml = _bentoml()
    if _is_whole(target, lambda: bentoml.get(bento_tag)):
        return bento_tag
    shutil.rmtree(target, ignore_errors=True)
    options["models"] = [{**options["models"][0], "tag": tag}]
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / BENTOFILE
        pinned.write_text(yaml.safe_dump(options), encoding="utf-8")
        bentoml.bentos.build_bentofile(
            str(pinned),
            version=version,
            labels={"ranker": ranker_version},
            build_ctx=str(project_root),
        )
    _seal(target, version)
    return bento_tag


def _code_hash(project_root: Path, include: Sequence[str]) -> str:
    """8 digits of the hash of what goes into a Bento beside the model."""
    found = {pattern: sorted(project_root.glob(pattern)) for pattern in include}
    if absent := [pattern for pattern, paths in found.items() if not paths]:
        raise PackagingError(f"{BENTOFILE} includes {absent}, which {project_root} does not have")
    digest = hashlib.sha256(files.sha256(project_root / BENTOFILE).encode())
    for path in sorted(path for paths in found.values() for path in paths):
        digest.update(f"{path.relative_to(project_root)} {files.sha256(path)}\n".encode())
    return digest.hexdigest()[:8]


def _seal(target: Path, version: str) -> None:
    """Write the manifest of a finished Bento; one without it, or unlike it, is half-written."""
    paths = sorted(path for path in target.rglob("*") if path.is_file())
    hashes = {str(path.relative_to(target)): files.sha256(path) for path in paths}
    files.write_json(target / MANIFEST, {"version": version, "files": hashes})


def _is_whole(target: Path, find: Callable[[], Any]) -> bool:
    """Whether a store's item is complete. BentoML makes its folder before it fills it."""
    if not target.exists():
        return False
    try:
        verify(target)
        find()
    except ArtifactError as error:
        log.warning("replacing a damaged copy: %s", error)
        return False
    except Exception as error:  # whatever half a file makes of BentoML's own reader
        log.warning("replacing %s, which BentoML cannot read: %s", target, error)
        return False
    return True


def _home() -> Path:
    try:
        return Path(os.environ["BENTOML_HOME"]).absolute()
    except KeyError:
        raise PackagingError(
            "BENTOML_HOME is not set, and BentoML would write to the home folder; "
            "use make, or set it to data/06_models/bentoml"
        ) from None


def _bentoml() -> Any:
    """BentoML, told to report its use to nobody."""
    os.environ.update(_PRIVACY)
    import bentoml

    return bentoml


# -- dry run -------------------------------------------------------------------------------------


def dry_run(bento_tag: str, golden: Mapping[str, Sequence[Any]]) -> DryRun:
    """Start a built Bento as a process, compare what it answers with what was recorded, time it.

    Args:
        golden: ``rows``, N rows as ``/predict`` takes them, and ``probabilities``, the N that
            training recorded for them.

    Raises:
        DryRunError: with the end of the process's log if it did not start or answer, else with
            the rows that differ by more than `fathom.ranker.TOLERANCE`.
    """
    import httpx

    started = time.monotonic()
    rows, recorded = list(golden["rows"]), list(golden["probabilities"])
    if not rows or len(rows) != len(recorded):
        raise DryRunError(
            f"golden has {len(rows)} rows and {len(recorded)} probabilities; it needs as many of "
            "each, and at least one"
        )
    expected = bento_tag.partition(":")[2].rpartition("-")[0]
    with _running(bento_tag) as (url, tail), httpx.Client(trust_env=False, timeout=30) as client:

        def ask(start: int) -> list[float]:
            body = {"rows": rows[start : start + _REQUEST_ROWS]}
            try:
                response = client.post(f"{url}/predict", json=body)
            except httpx.HTTPError as error:
                raise DryRunError(f"{bento_tag} did not answer: {error}\n{tail()}") from error
            return _probabilities(bento_tag, response, expected)

        served = [p for start in range(0, len(rows), _REQUEST_ROWS) for p in ask(start)]
        difference = _compare(bento_tag, served, recorded)
        p50, p99 = latency(lambda: ask(0))
    seconds = time.monotonic() - started
    return DryRun(difference, seconds, min(len(rows), _REQUEST_ROWS), p50, p99)


def latency(
    ask: Callable[[], object], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, float]:
    """Milliseconds that half, and 99 in 100, of 200 requests in a row take, after 20 for warmth.

    Args:
        ask: waits for one request.
        clock: tells seconds.
    """
    for _ in range(_WARM_UP):
        ask()
    taken = []
    for _ in range(_TIMED):
        started = clock()
        ask()
        taken.append(1_000 * (clock() - started))
    taken.sort()
    # The smallest time that at least so many requests kept within.
    return taken[_TIMED // 2 - 1], taken[_TIMED * 99 // 100 - 1]


def _probabilities(bento_tag: str, response: httpx.Response, version: str) -> list[float]:
    if response.status_code != 200:
        text = response.text[:_LOG_CHARACTERS]
        raise DryRunError(f"{bento_tag} answered {response.status_code} to golden rows: {text}")
    answer = response.json()
    if answer["version"] != version:
        raise DryRunError(f"{bento_tag} serves version {answer['version']!r}, not {version!r}")
    return [float(value) for value in answer["probabilities"]]


def _compare(bento_tag: str, served: Sequence[float], recorded: Sequence[float]) -> float:
    """The largest difference, which is within the tolerance."""
    from fathom.ranker import TOLERANCE

    differences = [abs(a - b) for a, b in zip(served, recorded, strict=True)]
    # Written so that NaN, which is not within anything, counts as different.
    wrong = [i for i, difference in enumerate(differences) if not difference <= TOLERANCE]
    if wrong:
        shown = "; ".join(
            f"row {i}: served {served[i]!r}, recorded {recorded[i]!r}" for i in wrong[:5]
        )
        raise DryRunError(
            f"{bento_tag}: {len(wrong)} of {len(served)} golden probabilities differ by more than "
            f"{TOLERANCE}: {shown}"
        )
    return max(differences)


@contextmanager
def _running(bento_tag: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """A Bento served on a free port until the block ends; gives its URL and its log's end."""
    with tempfile.TemporaryDirectory(prefix="fathom-dry-run-") as folder:
        log_path = Path(folder) / "log"

        def tail() -> str:
            return log_path.read_text(encoding="utf-8", errors="replace")[-_LOG_CHARACTERS:]

        port = _free_port()
        arguments = ["serve", bento_tag, "--host", "127.0.0.1", "--port", str(port)]
        with open(log_path, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", _LAUNCH, *arguments],
                cwd=folder,
                env=_environment(Path(folder)),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, bento_tag, tail)
            yield url, tail
        finally:
            _stop(process)


def _environment(folder: Path) -> dict[str, str]:
    """What the process may know: no proxies, no other service's settings.

    It gets a BentoML home of its own that links to the stores, because a starting server empties
    its home's metrics, which would be those of the champion that is being served.
    """
    hidden = ("FATHOM_", "BENTOML_", "PROMETHEUS_")
    home = folder / "home"
    home.mkdir()
    for store in ("bentos", "models"):
        (home / store).symlink_to(_home() / store)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(hidden) and "proxy" not in name.lower()
    }
    return {**kept, **_PRIVACY, "BENTOML_HOME": str(home)}


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, bento_tag: str, tail: Callable[[], str]
) -> None:
    import httpx

    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DryRunError(
                f"{bento_tag} ended with exit code {process.returncode} before it was ready:\n"
                f"{tail()}"
            )
        # The socket accepts before anything answers, hence the short time-out.
        with suppress(httpx.HTTPError):
            if httpx.get(f"{url}/readyz", timeout=1, trust_env=False).status_code == 200:
                return
        time.sleep(0.05)
    raise DryRunError(f"{bento_tag} was not ready after {START_SECONDS:.0f} s:\n{tail()}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and its workers, which have sessions of their own."""
    import psutil

    family: list[Any] = []
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for child in family:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    if process.stdin is not None:
        process.stdin.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- serving -------------------------------------------------------------------------------------


def serve(
    bento_tag: str,
    port: int = 3000,
    repo: FeatureRepo | None = None,
    host: str = "127.0.0.1",
    serving: ServingConfig | None = None,
) -> NoReturn:
    """Become the process that serves a Bento, after printing where and an example to try.

    Args:
        repo: where ``/rank`` finds features; without one it answers 503.
        serving: settings of the service; paths are relative to the current folder.

    Raises:
        PackagingError: there is no such Bento, or ``BENTOML_HOME`` is not set.
    """
    environment = {**os.environ, **_PRIVACY, "BENTOML_HOME": str(_home())}
    if repo is not None:
        from fathom.service import FEATURE_STORE

        settings = {"root": str(repo.root), **repo.config.model_dump()}
        environment[FEATURE_STORE] = json.dumps(settings)
    if serving is not None:
        from fathom.service import SERVING

        # BentoML serves from another folder.
        environment[SERVING] = serving.absolute.model_dump_json()
    url = f"http://{host}:{port}"
    example = _example(bento_tag)
    sys.stdout.write(
        f"{bento_tag} at {url} (documentation {url}/, metrics {url}/metrics)\n"
        f"Ready when curl -f {url}/readyz says so. Then try:\n\n"
        f"  curl {url}/rank -d '{json.dumps(example)}'\n\n"
    )
    sys.stdout.flush()
    arguments = ["-m", "bentoml", "serve", bento_tag, "--host", host, "--port", str(port)]
    os.execve(sys.executable, [sys.executable, *arguments], environment)


def _example(bento_tag: str) -> dict[str, Any]:
    """A request to ``/rank`` that the Bento's ranker can answer."""
    bentoml = _bentoml()
    try:
        model = bentoml.models.get(bentoml.get(bento_tag).info.all_models[0].tag)
    except bentoml.exceptions.NotFound as error:
        raise PackagingError(f"{bento_tag} cannot be served: {error}; make run builds it") from None
    spec = FeatureSpec.from_json(Path(model.path_of("spec.json")).read_text(encoding="utf-8"))
    golden = api.golden(Path(model.path))
    rows = golden.rows[:5] or [api.example_row(spec)]
    return api.example_rank(spec, rows, golden.timestamp)
