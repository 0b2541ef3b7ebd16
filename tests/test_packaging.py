"""From an artifact to a Bento that runs: what is carried, what is replaced, what is refused."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import bentoml
import httpx
import psutil
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from canary import NAMES, bait
from fathom import api, packaging
from fathom.packaging import DryRunError, PackagingError, build_bento, dry_run, import_ranker
from fathom.ranker import TOLERANCE, ArtifactError, verify
from ports import free_port
from small_ranker import Artifact, feature_store, register

HOME = Path(os.environ["BENTOML_HOME"])
#: What reads pickles; BentoML's modules by framework do, and torch unless it is told not to.
PICKLE = re.compile(
    r"(pickle|cloudpickle|dill|joblib|shelve|marshal|sklearn\.externals)\b|torch\.load$"
    r"|bentoml\.(pytorch|sklearn|picklable_model|torchscript)\b|(pd|pandas)\.read_pickle$"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return register(tmp_path_factory.mktemp("ranker"))


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a Bento is built from, among things that must stay out of it."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(root / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("bentofile.yaml", ".bentoignore", "requirements.lock"):
        shutil.copy(root / name, project)
    for name in (
        *(".env", "conf/local/credentials.yml", "src/fathom/credentials.json", "data/raw.csv"),
        *("tests/test_x.py", "src/fathom/models/notes.txt", "src/fathom/models/weights.pkl"),
    ):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("SECRET")
    return project


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> str:
    return import_ranker(artifact.folder, artifact.version)


@pytest.fixture(scope="module")
def bento(model: str, project: Path) -> str:
    return build_bento(model, project)


def stored(tag: str, kind: str) -> Path:
    """Where BentoML keeps a model or a Bento."""
    return HOME / kind / Path(*tag.split(":"))


def files_of(folder: Path) -> dict[str, int]:
    """Path → time of the last change of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


# -- the model -----------------------------------------------------------------------------------


def test_a_model_has_a_pinned_tag_and_the_files_of_its_version(
    model: str, artifact: Artifact
) -> None:
    assert model == f"fathom_ranker:{artifact.version}"
    assert verify(stored(model, "models")) == artifact.version
    assert Path(bentoml.models.get(model).path) == stored(model, "models")
    assert not Path.home().joinpath("bentoml").exists()


def test_importing_again_changes_nothing(model: str, artifact: Artifact) -> None:
    before = files_of(stored(model, "models"))
    assert import_ranker(artifact.folder, artifact.version) == model
    assert files_of(stored(model, "models")) == before


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.safetensors", None),
        ("weights.safetensors", b"half"),
        ("manifest.json", None),
        ("model.yaml", None),
        ("model.yaml", b"name: fathom_ra"),
    ],
)
def test_a_model_that_a_crash_left_half_written_is_replaced(
    model: str, artifact: Artifact, name: str, content: bytes | None
) -> None:
    path = stored(model, "models") / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert import_ranker(artifact.folder, artifact.version) == model
    assert verify(stored(model, "models")) == artifact.version
    assert bentoml.models.get(model).tag.version == artifact.version


def test_a_damaged_or_misnamed_version_is_not_imported(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artifact.folder, folder)
    with pytest.raises(PackagingError, match=f"holds version '{artifact.version}', not 'other'"):
        import_ranker(folder, "other")
    (folder / "vocabularies.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"vocabularies.json does not have the SHA-256"):
        import_ranker(folder, artifact.version)


def test_nothing_is_written_to_the_home_folder(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("BENTOML_HOME")
    with pytest.raises(PackagingError, match=r"BENTOML_HOME is not set.*data/06_models/bentoml"):
        import_ranker(artifact.folder, artifact.version)


# -- the Bento -----------------------------------------------------------------------------------


def test_a_bento_names_one_exact_model_and_not_the_newest(
    bento: str, model: str, artifact: Artifact, project: Path, tmp_path: Path
) -> None:
    with bentoml.models.create("fathom_ranker:20991231-newer"):
        pass
    try:
        shutil.rmtree(stored(bento, "bentos"))
        assert build_bento(model, project) == bento
        info = bentoml.get(bento).info
    finally:
        bentoml.models.delete("fathom_ranker:20991231-newer")
    assert [(str(m.tag), m.alias) for m in info.all_models] == [(model, "ranker")]
    assert info.labels["ranker"] == artifact.version
    assert bento.startswith(f"fathom:{artifact.version}-")


def test_a_bento_carries_the_serving_code_and_nothing_else(bento: str, project: Path) -> None:
    folder = stored(bento, "bentos")
    sources = {path for path in files_of(folder) if path.startswith("src/")}
    include = yaml.safe_load((project / "bentofile.yaml").read_text())["include"]
    expected = {p.relative_to(project).as_posix() for i in include for p in project.glob(i)}
    expected = {f"src/{path.removeprefix('src/')}" for path in expected}
    assert sources == {"src/bentofile.yaml"} | expected
    content = {path: (folder / path).read_bytes() for path in files_of(folder)}
    assert [path for path, text in content.items() if b"SECRET" in text] == []


def test_the_serving_code_imports_only_what_the_bento_carries(root: Path) -> None:
    """Else the service would start here, where all of fathom is installed, and nowhere else."""
    include = yaml.safe_load((root / "bentofile.yaml").read_text())["include"]
    paths = [path for pattern in include for path in root.glob(pattern) if path.suffix == ".py"]
    carried = {".".join(path.relative_to(root / "src").with_suffix("").parts) for path in paths}
    carried |= {name.removesuffix(".__init__") for name in carried}
    wanted = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {(alias.name, alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                wanted |= {(node.module, f"{node.module}.{alias.name}") for alias in node.names}
    ours = {either for either in wanted if either[0].split(".")[0] == "fathom"}
    assert len(ours) > 20
    assert [either for either in ours if not set(either) & (carried - {"fathom"})] == []


def test_the_bento_asks_for_what_the_project_is_tested_with(root: Path) -> None:
    wanted = yaml.safe_load((root / "bentofile.yaml").read_text())["python"]["packages"]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = project["dependencies"] + project["optional-dependencies"]["dev"]
    assert {str(Requirement(line)) for line in wanted} <= {
        str(Requirement(line)) for line in declared
    }


def test_what_the_bento_asks_for_brings_nothing_of_the_pipelines(root: Path) -> None:
    """Not even through what it asks for: the closure, as installed here from the lock."""
    wanted = yaml.safe_load((root / "bentofile.yaml").read_text())["python"]["packages"]
    found = closure(wanted)
    assert {"bentoml", "feast", "torch", "redis", "sqlalchemy", "starlette"} <= found
    # (Captum, for `/rank` with `attribute`, brings matplotlib.)
    heavy = {"evidently", "great-expectations", "kedro", "scikit-learn", "scipy"}
    assert heavy & found == set()
    assert [name for name in found if name.startswith(("kedro", "jupyter", "pytest"))] == []
    # An image installs the versions of the lock, so all of them must be in it, but for what
    # `make lock` takes for a part of one build of torch.
    lines = (root / "requirements.lock").read_text().splitlines()
    pinned = {canonicalize_name(line.partition("==")[0]) for line in lines}
    assert found - pinned <= {"nvidia-ml-py"}


def closure(wanted: list[str]) -> set[str]:
    """The names of what some requirements install, by the metadata of what is installed."""
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(line) for line in wanted]
    while left:
        requirement = left.pop()
        name, extras = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, extras) not in seen:
            seen.add((name, extras))
            asked = [Requirement(line) for line in requires(name) or []]
            left += [
                found
                for found in asked
                if found.marker is None
                or any(found.marker.evaluate({"extra": extra}) for extra in extras | {""})
            ]
    return {name for name, _ in seen}


def test_an_image_is_small_and_installs_what_was_tested(bento: str) -> None:
    """As far as its Dockerfile says; no Docker runs in the tests."""
    text = (stored(bento, "bentos") / "env/docker/Dockerfile").read_text()
    assert re.findall(r"^FROM (.*)$", text, re.M) == ["python:3.11-slim-bookworm AS base-container"]
    assert "uv venv --python 3.11 " in text
    # No package manager of the system runs: no compilers, no git.
    assert "apt-get" not in text
    assert "ARG UV_TORCH_BACKEND=cpu" in text
    constraint = re.search(r"^ARG UV_CONSTRAINT=(.*)$", text, re.M)
    home = re.search(r"^ARG BENTO_PATH=(.*)$", text, re.M)
    assert constraint
    assert home
    assert constraint[1] == f"{home[1]}/src/requirements.lock"
    assert (stored(bento, "bentos") / "src/requirements.lock").is_file()
    copied = text.index("COPY --chown=bentoml:bentoml ./src/requirements.lock")
    assert copied < text.index("uv --directory") < text.index("USER bentoml")


def test_the_same_content_is_built_once_and_other_code_is_another_bento(
    bento: str, model: str, project: Path
) -> None:
    before = files_of(stored(bento, "bentos"))
    assert build_bento(model, project) == bento
    assert files_of(stored(bento, "bentos")) == before
    source = project / "src/fathom/api.py"
    text = source.read_text()
    try:
        source.write_text(text + "\n# changed\n")
        changed = build_bento(model, project)
    finally:
        source.write_text(text)
    assert changed != bento
    assert changed.rpartition("-")[0] == bento.rpartition("-")[0]


@pytest.mark.parametrize("name", ["manifest.json", "bento.yaml", "src/fathom/ranker.py"])
def test_a_bento_that_a_crash_left_half_written_is_built_again(
    bento: str, model: str, project: Path, name: str
) -> None:
    (stored(bento, "bentos") / name).unlink()
    assert build_bento(model, project) == bento
    assert (stored(bento, "bentos") / name).exists()
    assert bentoml.get(bento)


def test_a_project_without_its_files_is_refused(model: str, project: Path, tmp_path: Path) -> None:
    with pytest.raises(PackagingError, match=r"has no bentofile.yaml"):
        build_bento(model, tmp_path)
    shutil.copy(project / "bentofile.yaml", tmp_path)
    with pytest.raises(PackagingError, match=r"includes \[.*src/fathom/ranker.py"):
        build_bento(model, tmp_path)


@pytest.mark.e2e
def test_bentoml_build_by_hand_works_and_pins_a_version_too(
    model: str, project: Path, root: Path
) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "bentoml", "build", "--version", "by-hand", "--output", "tag"],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "fathom:by-hand" in built.stdout
    assert [str(found.tag) for found in bentoml.get("fathom:by-hand").info.all_models] == [model]
    dockerfile = (stored("fathom:by-hand", "bentos") / "env/docker/Dockerfile").read_text()
    assert "ARG BENTOML_DO_NOT_TRACK=True" in dockerfile


# -- the dry run ---------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_built_bento_returns_the_probabilities_of_training_and_leaves_nothing(
    bento: str, artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = psutil.Process().children(recursive=True)
    # What surrounds the process must not reach it.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("FATHOM_FEATURE_STORE", "not even JSON")
    metrics = HOME / "prometheus_multiproc_dir"
    metrics.mkdir()
    (metrics / "of_another_server.db").touch()
    found = dry_run(bento, {"rows": artifact.rows, "probabilities": artifact.probabilities})
    assert found.max_difference <= TOLERANCE
    assert 0 < found.seconds < packaging.START_SECONDS
    assert found.rows == len(artifact.rows)
    assert 0 < found.p50_ms <= found.p99_ms
    assert (metrics / "of_another_server.db").exists()
    shutil.rmtree(metrics)
    assert set(psutil.Process().children(recursive=True)) <= set(before)
    assert verify(stored(bento, "bentos"))


@pytest.mark.e2e
def test_a_pickle_in_bentomls_store_is_never_read(
    bento: str, model: str, artifact: Artifact, tmp_path: Path
) -> None:
    payload = bait(tmp_path / "canary")
    folders = [stored(model, "models"), *(stored(bento, "bentos") / f for f in ("", "src"))]
    baits = [folder / name for folder in folders for name in NAMES]
    try:
        for path in baits:
            path.write_bytes(payload)
        dry_run(bento, {"rows": artifact.rows, "probabilities": artifact.probabilities})
    finally:
        for path in baits:
            path.unlink()
    assert not (tmp_path / "canary").exists()


def test_no_code_reads_pickles(root: Path) -> None:
    """Nor asks a vendor to: what torch and numpy load is told that it is plain."""
    found = []
    for path in sorted((root / "src/fathom").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Call):
                keywords = {word.arg: ast.unparse(word.value) for word in node.keywords}
                plain = keywords.get("weights_only") == "True"
                names = [] if plain else [ast.unparse(node.func)]
                names += ["pickle"] if keywords.get("allow_pickle", "False") != "False" else []
            found += [f"{path.relative_to(root)}: {name}" for name in names if PICKLE.match(name)]
    assert found == []


@pytest.mark.e2e
def test_a_damaged_model_does_not_start_and_the_log_says_why(
    bento: str, model: str, artifact: Artifact
) -> None:
    weights = stored(model, "models") / "weights.safetensors"
    content = weights.read_bytes()
    flipped = bytearray(content)
    flipped[-1] ^= 1
    try:
        weights.write_bytes(flipped)
        with pytest.raises(DryRunError) as refusal:
            dry_run(bento, {"rows": artifact.rows, "probabilities": artifact.probabilities})
    finally:
        weights.write_bytes(content)
    assert "ended with exit code 1 before it was ready" in str(refusal.value)
    assert "ArtifactError" in str(refusal.value)
    assert "weights.safetensors does not have the SHA-256 of the manifest" in str(refusal.value)


@pytest.mark.parametrize(
    ("served", "recorded", "message"),
    [
        ([0.5, 0.25], [0.5, 0.75], "1 of 2 golden .* row 1: served 0.25, recorded 0.75"),
        ([0.5], [float("nan")], "1 of 1 golden probabilities differ"),
        ([0.5], [0.5 + 2e-6], "differ by more than 1e-06: row 0"),
    ],
)
def test_a_difference_is_named_by_row(
    served: list[float], recorded: list[float], message: str
) -> None:
    with pytest.raises(DryRunError, match=message):
        packaging._compare("fathom:x", served, recorded)
    assert packaging._compare("fathom:x", [0.5, 0.25], [0.5, 0.25 + 5e-7]) == pytest.approx(5e-7)


def test_the_latency_is_of_requests_in_a_row_after_some_for_warmth() -> None:
    """By a clock set by hand: request 21, the first that is timed, takes 1 ms, the next 2."""
    asked, now = [], [0.0]

    def ask() -> None:
        asked.append(None)
        now[0] += 9.0 if len(asked) <= 20 else (len(asked) - 20) / 1_000

    p50, p99 = packaging.latency(ask, lambda: now[0])
    assert len(asked) == 220
    assert (p50, p99) == (pytest.approx(100), pytest.approx(198))


def test_a_version_other_than_the_bentos_is_refused() -> None:
    answer = httpx.Response(200, json={"version": "b", "probabilities": [0.5]})
    with pytest.raises(DryRunError, match="fathom:a-1 serves version 'b', not 'a'"):
        packaging._probabilities("fathom:a-1", answer, "a")
    refusal = httpx.Response(400, json={"error": "1 fault in the request"})
    with pytest.raises(DryRunError, match=r"answered 400 to golden rows: .*1 fault"):
        packaging._probabilities("fathom:a-1", refusal, "a")


@pytest.mark.parametrize("golden", [([], []), ([{}], [0.5, 0.5])])
def test_golden_requests_that_prove_nothing_are_refused(golden: tuple[Any, Any]) -> None:
    with pytest.raises(DryRunError, match="as many of each, and at least one"):
        dry_run("fathom:x", {"rows": golden[0], "probabilities": golden[1]})


@pytest.mark.e2e
def test_the_server_ends_with_the_process_that_started_it(bento: str, tmp_path: Path) -> None:
    """However that process ends: a killed run leaves no server behind."""
    port = free_port()
    arguments = ["serve", bento, "--host", "127.0.0.1", "--port", str(port)]
    server = psutil.Popen(
        [sys.executable, "-c", packaging._LAUNCH, *arguments],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not (family := server.children(recursive=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(family) >= 1
    server.stdin.close()  # as the kernel does when a process is killed
    _, alive = psutil.wait_procs([server, *family], timeout=60)
    for process in alive:
        process.kill()
    assert alive == []


# -- serving -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(
    bento: str, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    """The Bento with its feature store, as ``kedro serve`` runs it: its URL, what it printed."""
    store = tmp_path_factory.mktemp("store")
    feature_store(store)
    port = free_port()
    script = (
        "from pathlib import Path\n"
        "from fathom import packaging\n"
        "from fathom.feature_store import FeatureRepo, FeatureStoreConfig\n"
        f"repo = FeatureRepo(FeatureStoreConfig(folder='features'), Path({str(store)!r}))\n"
        f"packaging.serve({bento!r}, {port}, repo)\n"
    )
    log = store / "log"
    with open(log, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": str(root / "src")},
            cwd=store,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        ready = False
        while not ready and time.monotonic() < deadline and process.poll() is None:
            try:
                ready = httpx.get(f"{url}/readyz", trust_env=False, timeout=1).status_code == 200
            except httpx.HTTPError:
                time.sleep(0.1)
        assert ready, log.read_text()
        yield url, log.read_text()
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(20)
        _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []


@pytest.mark.e2e
def test_the_printed_request_works_and_predict_agrees(
    served: tuple[str, str], artifact: Artifact
) -> None:
    url, printed = served
    command = re.search(rf"curl {url}/rank -d '(.*)'", printed)
    assert command, printed
    with httpx.Client(base_url=url, trust_env=False) as client:
        answer = client.post("/rank", content=command.group(1))
        assert answer.status_code == 200, answer.text
        ranked = api.RankAnswer.model_validate_json(answer.text)
        assert (ranked.version, ranked.user_known) == (artifact.version, True)
        assert {item.item for item in ranked.items} <= {f"i{i}" for i in range(40)}
        predicted = client.post("/predict", json={"rows": artifact.rows}).json()["probabilities"]
    assert predicted == pytest.approx(artifact.probabilities, abs=TOLERANCE)


@pytest.mark.e2e
def test_unknown_users_and_items_are_counted_in_the_metrics(served: tuple[str, str]) -> None:
    url, printed = served
    command = re.search(r"/rank -d '(.*)'", printed)
    assert command
    request = json.loads(command.group(1)) | {"user": "nobody", "candidates": ["a", "b", "i1"]}
    with httpx.Client(base_url=url, trust_env=False) as client:
        before = client.get("/metrics").text
        answer = client.post("/rank", json=request).json()
        after = client.get("/metrics").text
    assert (answer["user_known"], answer["unknown_items"]) == (False, 2)

    def count(text: str, name: str) -> float:
        found = re.search(rf"^{name}_total (\S+)$", text, re.M)
        return float(found.group(1)) if found else 0.0

    for name, more in (("unknown_users", 1), ("unknown_items", 2), ("ranked_items", 3)):
        assert count(after, f"fathom_{name}") - count(before, f"fathom_{name}") == more


@pytest.mark.e2e
def test_a_body_of_100_megabytes_is_refused_before_it_is_sent(served: tuple[str, str]) -> None:
    host, port = served[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 104857600\r\n\r\n"
        connection.sendall(head.encode())
        answer = b""
        while chunk := connection.recv(4096):  # until the service closes the connection
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"at most 16777216 are allowed" in answer


def test_a_bento_that_is_not_there_cannot_be_served() -> None:
    with pytest.raises(PackagingError, match=r"fathom:none cannot be served: .*make run builds it"):
        packaging.serve("fathom:none")
