"""The project around the code: configuration, lock file, telemetry, layout, start-up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from kedro.config import OmegaConfigLoader
from kedro.framework.cli.utils import find_run_command
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fathom
from fathom.cli import run
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS
from fathom.spec import FeatureSpec

ROOT = Path(__file__).resolve().parents[1]

#: Every environment by its path under conf. Whoever adds a deployment adds it here.
ENVIRONMENTS = [
    "autoint_movielens",
    "base",
    "criteo_x1",
    "frappe_x1",
    "leave_one_out",
    "movielens",
    "prod",
    "redis",
    "test",
]

#: Seconds each to import, so that a plain `kedro` command must do without them.
HEAVY = ["evidently", "feast", "great_expectations", "sklearn", "torch"]

PRIVACY = {
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "KEDRO_DISABLE_TELEMETRY": "1",
    "GX_ANALYTICS_ENABLED": "false",
}


def environments() -> list[str]:
    """Every folder at any depth under conf that holds YAML, but for conf/local."""
    conf = ROOT / CONF_SOURCE
    folders = {path.parent.relative_to(conf) for path in conf.rglob("*.yml")} - {Path()}
    return sorted(folder.as_posix() for folder in folders if folder.parts[0] != "local")


def load(environment: str) -> OmegaConfigLoader:
    """The configuration that ``kedro run --env ENVIRONMENT`` sees."""
    return OmegaConfigLoader(
        conf_source=str(ROOT / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS
    )


def locked() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): pinned for name, pinned in pins}


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_environment_is_listed_here() -> None:
    assert environments() == ENVIRONMENTS
    assert len(ENVIRONMENTS) == 9


@pytest.mark.parametrize("environment", environments())
def test_an_environment_loads_and_its_spec_is_sound(environment: str) -> None:
    configuration = load(environment)
    assert FeatureSpec.model_validate(configuration["parameters"]["features"])
    assert configuration["catalog"]


def test_an_environment_changes_one_key_and_keeps_its_neighbours(tmp_path: Path) -> None:
    for folder, text in {
        "base": "training: {epochs: 3, seed: 1}",
        "test": "training: {epochs: 1}",
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "parameters_training.yml").write_text(text)
    loader = OmegaConfigLoader(conf_source=str(tmp_path), env="test", **CONFIG_LOADER_ARGS)
    assert loader["parameters"] == {"training": {"epochs": 1, "seed": 1}}


def test_kedro_telemetry_is_off_without_help_from_the_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kedro_telemetry.plugin import _check_for_telemetry_consent

    for name in PRIVACY:
        monkeypatch.delenv(name)
    assert _check_for_telemetry_consent(ROOT) is False


def test_make_turns_every_telemetry_off_and_keeps_bentos_here() -> None:
    exported = dict(re.findall(r"^export (\w+) := (.*)$", (ROOT / "Makefile").read_text(), re.M))
    assert PRIVACY.items() <= exported.items()
    assert exported["BENTOML_HOME"] == "$(CURDIR)/data/06_models/bentoml"


def test_a_kedro_command_changes_no_file_and_lists_the_pipelines() -> None:
    # Without the variables that make exports: kedro-telemetry would add an id to pyproject.toml.
    shell = {name: value for name, value in os.environ.items() if name not in PRIVACY}
    before = (ROOT / "pyproject.toml").read_bytes()
    answer = subprocess.run(
        [sys.executable, "-m", "kedro", "registry", "list"],
        cwd=ROOT,
        env=shell,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert "__default__" in yaml.safe_load(answer.stdout)
    assert (ROOT / "pyproject.toml").read_bytes() == before


def test_a_kedro_command_pays_for_no_heavy_library() -> None:
    script = (
        "import sys\n"
        "from kedro.framework.startup import bootstrap_project\n"
        f"bootstrap_project({str(ROOT)!r})\n"
        "from kedro.framework.project import pipelines\n"
        "assert pipelines['__default__'].nodes\n"
        f"print(sorted(set(sys.modules) & set({HEAVY!r})))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == "[]"


def test_kedro_run_skips_what_is_up_to_date_unless_told_otherwise() -> None:
    def runner(*arguments: str) -> str:
        found: str = run.make_context("run", list(arguments)).params["runner"]
        return found

    assert runner() == "fathom.runner.UpToDateRunner"
    assert runner("--env", "test", "--tags", "training") == "fathom.runner.UpToDateRunner"
    assert runner("--runner", "SequentialRunner") == "SequentialRunner"
    assert find_run_command("fathom") is run  # `python -m fathom` runs it, too


def test_the_lock_pins_every_declared_dependency(project: dict[str, Any]) -> None:
    pins = locked()
    declared = project["project"]["dependencies"]
    declared += project["project"]["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        pinned = pins.get(canonicalize_name(requirement.name))
        assert pinned is not None, f"{requirement.name} is not in the lock: make lock"
        assert requirement.specifier.contains(pinned), f"{requirement} against {pinned}: make lock"
    assert pins["torch"] == "2.13.0"


def test_the_lock_ties_nobody_to_a_build_or_a_registry() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pins = [line for line in text.splitlines() if not line.startswith("#")]
    for line in pins:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
        assert not line.startswith(("nvidia-", "cuda-", "triton=="))
    assert "://" not in text


def test_the_version_is_the_same_everywhere(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == fathom.__version__ == version("fathom")
    assert f"## [{fathom.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_top_level_is_as_the_readme_says() -> None:
    expected = {
        "src", "conf", "data", "notebooks", "tests", "benchmarks", "docs", "deploy",
        "bentofile.yaml", "pyproject.toml", "requirements.lock", "README.md", "CHANGELOG.md",
        "LICENSE", "Makefile",
    }  # fmt: skip
    assert sorted(expected - {path.name for path in ROOT.iterdir()}) == []


def test_ci_and_the_hooks_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repository["repo"] for repository in hooks] == ["local"]
