"""Feast on a real Redis: what the embedded store returns, and what happens when the server goes."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from kedro.config import OmegaConfigLoader

import small_store
from fathom.feature_store import FeatureRepo, FeatureStoreConfig
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS
from redis_server import RedisServer
from small_store import COLUMNS, USERS, a_spec

if TYPE_CHECKING:
    from feast import FeatureStore

pytestmark = pytest.mark.redis

#: Numbers, texts and lists of a user, and one view by user and item, which is packed.
NAMES = {"user_id", "tier", "age", "hobbies", "item_id"}
NAMES |= {"user_acts", "recent_items", "pair_acts", "pair_recency"}
SPEC = a_spec([column for column in COLUMNS if column["name"] in NAMES], [])
ROOT = Path(__file__).resolve().parents[1]
NOON = datetime(2024, 9, 1, 12, 0, 0, 123_456, tzinfo=timezone.utc)
SECOND = timedelta(seconds=1)
#: Far above what a busy machine adds, far below what redis-py waits by default.
BUDGET_SECONDS = 1.0
SQLITE = {
    "type": "fathom.sqlite_store.WalSqliteOnlineStore",
    "path": "{folder}/online.db",
}


def conf_options() -> str:
    """What conf/redis says after the address."""
    text = (ROOT / CONF_SOURCE / "redis" / "globals.yml").read_text()
    connection: str = yaml.safe_load(text)["online_store"]["connection_string"]
    return connection.split(",", 1)[1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> small_store.Store:
    """The sources of all feature views, neither applied nor materialised."""
    return small_store.written(tmp_path_factory.mktemp("sources"), SPEC, small_store.generated())


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with RedisServer(conf_options()) as running:
        yield running


def a_repo(sources: small_store.Store, root: Path, online_store: dict[str, Any]) -> FeatureRepo:
    """A deployment of its own on a copy of the sources."""
    shutil.copytree(sources.repo.folder, root / "features")
    return FeatureRepo(FeatureStoreConfig(folder="features", online_store=online_store), root)


def filled(sources: small_store.Store, root: Path, online_store: dict[str, Any]) -> FeatureRepo:
    repo = a_repo(sources, root, online_store)
    repo.apply(SPEC)
    repo.materialise(SPEC, sources.until)
    return repo


def online_rows(store: FeatureStore) -> dict[str, Any]:
    """Every feature of every user, two unknown ones among them, by feature view."""
    users = [{"user_id": f"u{u}"} for u in range(USERS + 2)]
    found = {}
    for view in store.list_batch_feature_views():
        if view.online:
            references = [f"{view.name}:{field.name}" for field in view.features]
            found[view.name] = comparable(store.get_online_features(references, users).to_dict())
    return found


def comparable(value: Any) -> Any:
    """The same with NaN equal to itself."""
    if isinstance(value, dict):
        return {name: comparable(part) for name, part in value.items()}
    if isinstance(value, list):
        return [comparable(part) for part in value]
    return "NaN" if value != value else value


def read(store: FeatureStore, user: str = "u0") -> dict[str, Any]:
    """Two attributes of a user."""
    features = ["users:tier", "users:age"]
    found = store.get_online_features(features, [{"user_id": user}]).to_dict()
    return {name: values[0] for name, values in found.items() if name != "user_id"}


def write(store: FeatureStore, *rows: tuple[datetime, str]) -> None:
    """Write u0's tier as of some moments, in one batch."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val="u0")])
    data = [(key, {"tier": Value(string_val=tier)}, moment, None) for moment, tier in rows]
    view = store.get_feature_view("users")
    store._get_provider().online_write_batch(store.config, view, data, None)


# -- the same rows -------------------------------------------------------------------------------


def test_redis_and_the_embedded_store_return_the_same_rows(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    embedded = online_rows(filled(sources, tmp_path / "sqlite", SQLITE).open())
    on_redis = online_rows(filled(sources, tmp_path / "redis", server.settings).open())
    assert len(embedded) == 3
    assert {"gold", None} < set(embedded["users"]["tier"])
    assert on_redis == embedded


@pytest.mark.parametrize("kind", ["embedded", "redis"])
def test_an_older_row_never_replaces_a_newer_one(
    sources: small_store.Store, server: RedisServer, tmp_path: Path, kind: str
) -> None:
    settings = SQLITE if kind == "embedded" else server.settings
    store = filled(sources, tmp_path / kind, settings).open()
    age = read(store)["age"]
    write(store, (NOON, "newer"))
    write(store, (NOON - SECOND, "older"))
    assert read(store) == {"tier": "newer", "age": age}
    # Nor within a batch, whatever its order.
    write(store, (NOON + 2 * SECOND, "newest"), (NOON + SECOND, "between"))
    assert read(store) == {"tier": "newest", "age": age}


def test_redis_keeps_the_first_of_two_rows_of_one_moment(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    """Unlike the embedded store: so Redis must be emptied when a view is computed otherwise."""
    stores = {
        name: filled(sources, tmp_path / name, settings).open()
        for name, settings in {"embedded": SQLITE, "redis": server.settings}.items()
    }
    for store in stores.values():
        write(store, (NOON, "first"))
        write(store, (NOON, "corrected"))
    assert {name: read(store)["tier"] for name, store in stores.items()} == {
        "embedded": "corrected",
        "redis": "first",
    }


# -- a server that goes --------------------------------------------------------------------------


def fails_in_time(store: FeatureStore, error: type[Exception]) -> None:
    for _ in range(3):
        started = time.monotonic()
        with pytest.raises(error):
            read(store)
        assert time.monotonic() - started < BUDGET_SECONDS


def test_a_stopped_server_is_an_error_in_time_and_a_restarted_one_answers_again(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    import redis

    repo = filled(sources, tmp_path, server.settings)
    store = repo.open()
    before = online_rows(store)
    server.stop()
    fails_in_time(store, redis.ConnectionError)
    server.start()
    assert read(store) == {"tier": None, "age": None}  # it answers, and has lost everything
    repo.materialise(SPEC, sources.until)
    assert online_rows(store) == before


def test_a_restart_between_two_reads_is_not_noticed(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    store = filled(sources, tmp_path, server.settings).open()
    assert read(store)["tier"] == "gold"
    server.stop()
    server.start()
    assert read(store)["tier"] is None


def test_a_hanging_server_is_an_error_in_time(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    import redis

    store = filled(sources, tmp_path, server.settings).open()
    before = read(store)
    with server.hanging():
        fails_in_time(store, redis.TimeoutError)
    assert read(store) == before


def test_a_wiped_server_is_filled_again(
    sources: small_store.Store, server: RedisServer, tmp_path: Path
) -> None:
    repo = filled(sources, tmp_path, server.settings)
    store = repo.open()
    before, keys = online_rows(store), server.size()
    assert keys == USERS
    server.wipe()
    assert online_rows(store) != before
    repo.materialise(SPEC, sources.until)
    assert online_rows(store) == before
    assert server.size() == keys


# -- the environment -----------------------------------------------------------------------------


def test_the_redis_environment_uses_redis_and_a_data_folder_of_its_own() -> None:
    configuration = OmegaConfigLoader(
        conf_source=str(ROOT / CONF_SOURCE), env="redis", **CONFIG_LOADER_ARGS
    )
    config = FeatureStoreConfig.model_validate(configuration["parameters"]["feature_store"])
    assert config.online_store == {
        "type": "redis",
        "connection_string": f"localhost:6379,{conf_options()}",
    }
    assert config.folder.startswith("data/redis/")


def test_a_password_comes_from_the_environment_and_is_written_nowhere(
    sources: small_store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    secret = "0c9f5b1f0c9a7d3e"
    with RedisServer(password=secret) as server:
        connection = f"{server.settings['connection_string']},password=$FATHOM_REDIS_PASSWORD"
        settings = server.settings | {"connection_string": connection}
        repo = a_repo(sources, tmp_path, settings)
        monkeypatch.setenv("FATHOM_REDIS_PASSWORD", "wrong")
        with pytest.raises(redis.AuthenticationError):
            write(repo.apply(SPEC), (NOON, "gold"))
        monkeypatch.setenv("FATHOM_REDIS_PASSWORD", secret)
        store = repo.open()
        write(store, (NOON, "gold"))
        assert read(store)["tier"] == "gold"
    kept = (repo.folder / "feature_store.yaml").read_text()
    assert "password=$FATHOM_REDIS_PASSWORD" in kept
    assert secret not in kept
