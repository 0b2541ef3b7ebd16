"""One whole run of the `test` environment, in a project folder of its own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from projects import make_project


@pytest.fixture(scope="session")
def run(root, tmp_path_factory):
    """The project after one undisturbed `kedro run --env test`, and what it printed."""
    project = make_project(root, tmp_path_factory.mktemp("project"))
    done = project.kedro("run", "--env", "test", check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return project, done


@dataclass(frozen=True)
class Visit:
    """A household and twenty products of its store, a day after the newest features.

    Args:
        request: to ``/rank``.
        frame: the same exposures, with the features that Feast's history has.
    """

    request: dict[str, Any]
    products: list[str]
    frame: dict[str, Any]


@pytest.fixture(scope="session")
def visit(run):
    from fathom.feature_store import FeatureRepo, FeatureStoreConfig, frame_of
    from fathom.registry import Registry

    project, _ = run
    table = pq.read_table(project.folder / "data/test/05_model_input/training_frame.parquet")
    last = table.slice(len(table) - 1).to_pylist()[0]
    same = table.filter(pa.compute.equal(table["store_id"], last["store_id"]))
    products = list(dict.fromkeys(same["product_id"].to_pylist()))[-20:]
    until = datetime.fromisoformat(project.json("04_feature/state.json")["until"])
    moment = until.replace(tzinfo=timezone.utc)
    context = {name: last[name] for name in ("store_id", "display", "mailer")}
    spine = pa.table(
        {
            "basket_id": ["b"] * len(products),
            "household_id": [last["household_id"]] * len(products),
            "product_id": products,
            "event_timestamp": pa.array([moment] * len(products), pa.timestamp("us", "UTC")),
            **{name: [value] * len(products) for name, value in context.items()},
        }
    )
    versions = Registry(project.folder / "data/test/06_models/registry")
    repo = FeatureRepo(FeatureStoreConfig(folder="data/test/04_feature"), project.folder)
    request = {
        "user": last["household_id"],
        "context": context,
        "candidates": products,
        "timestamp": moment.isoformat(),
    }
    frame = frame_of(repo.training_frame(spine, versions.load(versions.champion()).spec))
    return Visit(request, products, frame)
