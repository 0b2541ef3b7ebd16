"""Commands: ``kedro run``, ``watch``, ``serve``, ``champion``, ``promote`` and ``rollback``."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from kedro.framework.cli.project import run as kedro_run

if TYPE_CHECKING:
    from fathom.registry import Registry

_env = click.option("--env", "-e", default=None, help="The deployment, as for kedro run.")


@click.group(name="fathom")
def cli() -> None:
    """Fathom's own commands."""


# Kedro's own command, but for the runner that it takes by default.
run = copy.copy(kedro_run)
run.context_settings = {"default_map": {"runner": "fathom.runner.UpToDateRunner"}}
run.epilog = (
    "Nodes are skipped where what they read, their parameters and the code are as they were and "
    "what they wrote is still there. To run every node: kedro run --runner SequentialRunner"
)
cli.add_command(run)


@cli.command()
@_env
@click.option("--port", default=3000, show_default=True, help="Where to listen.")
@click.option("--feature-log", help="Folder for the features of all that is ranked, to replay.")
def serve(env: str | None, port: int, feature_log: str | None) -> None:
    """Serve the champion over HTTP until interrupted."""
    from fathom import packaging
    from fathom.feature_store import FeatureRepo, FeatureStoreConfig
    from fathom.serving import ServingConfig

    parameters = _parameters(env)
    versions = _registry(parameters)
    version = versions.champion()
    if version is None:
        raise click.ClickException(
            f"there is no champion in {versions.folder}; run the pipelines first: kedro run"
        )
    tag = packaging.import_ranker(versions.path(version), version)
    bento = packaging.build_bento(tag, Path.cwd())
    config = FeatureStoreConfig.model_validate(parameters["feature_store"])
    serving = ServingConfig.model_validate(parameters.get("serving", {}))
    if feature_log:
        serving = serving.model_copy(update={"feature_log": feature_log})
    packaging.serve(bento, port, repo=FeatureRepo(config, Path.cwd()), serving=serving)


@cli.command()
@_env
def champion(env: str | None) -> None:
    """Show the champion and all versions."""
    versions = _registry(_parameters(env))
    current = versions.champion()
    for version in versions.versions():
        click.echo(f"{'*' if version == current else ' '} {version}")
    if current is None:
        click.echo("no champion yet")


@cli.command()
@click.argument("version")
@_env
@click.option("--reason", default="promoted by hand", show_default=True)
def promote(version: str, env: str | None, reason: str) -> None:
    """Make VERSION the champion."""
    parameters = _parameters(env)
    versions = _registry(parameters)
    _publish(parameters, versions, version)
    versions.promote(version, reason, by="operator")
    click.echo(f"champion: {version}")


@cli.command()
@_env
@click.option("--reason", default="rolled back by hand", show_default=True)
def rollback(env: str | None, reason: str) -> None:
    """Put the champion's predecessor back in charge."""
    parameters = _parameters(env)
    versions = _registry(parameters)
    champions = versions.champions()
    if len(champions) > 1:
        _publish(parameters, versions, champions[-2])
    click.echo(f"champion: {versions.rollback(reason)}")


@cli.command()
@_env
@click.option("--params", help="For each kedro run, as its --params.")
@click.option("--once", is_flag=True, help="Look once. Exit status 3: something needs a person.")
@click.option("--interval", type=float, help="Seconds between two looks (conf: watch).")
@click.option("--from", "replay", metavar="PARTITION", help="Handle this and all later ones again.")
@click.option("--dismiss", multiple=True, metavar="PARTITION", help="Its trouble was looked at.")
def watch(
    env: str | None,
    params: str | None,
    once: bool,
    interval: float | None,
    replay: str | None,
    dismiss: tuple[str, ...],
) -> None:
    """Take each new raw partition through the loop: validate, monitor, retrain if need be."""
    from fathom.arrivals import ArrivalError
    from fathom.watch import Watch, WatchConfig

    parameters = _parameters(env)
    config = WatchConfig.model_validate(parameters["watch"])
    watcher = Watch(
        config, _registry(parameters), ["--env", env] if env else [], params, click.echo
    )
    seconds = None if once else interval or config.interval_seconds
    try:
        sys.exit(watcher.run(seconds, replay, dismiss))
    except ArrivalError as error:
        raise click.ClickException(str(error)) from error


def _publish(parameters: dict[str, Any], versions: Registry, version: str) -> None:
    """See to it that a coming champion's embeddings are in the feature store, as a run would."""
    from fathom.feature_store import FeatureRepo, FeatureStoreConfig

    repo = FeatureRepo(FeatureStoreConfig.model_validate(parameters["feature_store"]), Path.cwd())
    if not repo.has_embeddings(version):
        tables = versions.load(version).published_embeddings()
        repo.publish_embeddings(version, tables, keep=versions.champions())


def _parameters(env: str | None) -> dict[str, Any]:
    from kedro.framework.session import KedroSession

    with KedroSession.create(Path.cwd(), env=env) as session:
        assert isinstance(session, KedroSession)
        parameters: dict[str, Any] = session.load_context().params
    return parameters


def _registry(parameters: dict[str, Any]) -> Registry:
    from fathom.registry import Registry

    return Registry(Path(parameters["registry"]))
