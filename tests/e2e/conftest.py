"""One whole run of the `test` environment, in a project folder of its own."""

from __future__ import annotations

import pytest

from projects import make_project


@pytest.fixture(scope="session")
def run(root, tmp_path_factory):
    """The project after one undisturbed `kedro run --env test`, and what it printed."""
    project = make_project(root, tmp_path_factory.mktemp("project"))
    done = project.kedro("run", "--env", "test", check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return project, done
