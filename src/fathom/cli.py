"""Commands: ``kedro run``, ``watch``, ``serve``, and those of the registry, as ``promote``."""

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
    """Show the champion, who challenges it, and all versions."""
    versions = _registry(_parameters(env))
    current, challenge = versions.champion(), versions.challenger()
    for version in versions.versions():
        tried = challenge is not None and challenge.version == version
        mark = "*" if version == current else "?" if tried else " "
        about = f"  {challenge.mode} of {challenge.share:.1%}" if challenge and tried else ""
        click.echo(f"{mark} {version}{about}")
    if current is None:
        click.echo("no champion yet")


@cli.command()
@_env
@click.option("--last", default=20, show_default=True, help="How many changes to show.")
def history(env: str | None, last: int) -> None:
    """Show who changed the champion or its challenger, when and why."""
    for entry in _registry(_parameters(env)).history()[-last:]:
        at, action, version = entry["at"], entry["action"], entry["version"]
        click.echo(f"{at}  {action:<9}  {version}  by {entry['by']}: {entry['reason']}")


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
@click.argument("version")
@_env
@click.option("--shadow", is_flag=True, help="Score what the champion answers, answer nothing.")
@click.option("--share", type=float, help="Of the users, above 0 and at most 1.")
@click.option("--reason", default="challenged by hand", show_default=True)
def challenge(
    version: str, env: str | None, shadow: bool, share: float | None, reason: str
) -> None:
    """Try VERSION beside the champion: as a canary for 5 % of the users, or as a shadow of all."""
    versions = _registry(_parameters(env))
    share = (1.0 if shadow else 0.05) if share is None else share
    found = versions.challenge(version, "shadow" if shadow else "canary", share, reason)
    click.echo(f"challenger: {found.version}, {found.mode} of {found.share:.1%} of the users")


@cli.command()
@_env
@click.option("--reason", default="withdrawn by hand", show_default=True)
def withdraw(env: str | None, reason: str) -> None:
    """End the challenge."""
    click.echo(f"withdrawn: {_registry(_parameters(env)).withdraw(reason)}")


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
