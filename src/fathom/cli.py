"""Project commands: ``kedro serve``, ``champion``, ``promote`` and ``rollback``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fathom.registry import Registry

_env = click.option("--env", "-e", default=None, help="The deployment, as for kedro run.")


@click.group(name="fathom")
def cli() -> None:
    """Fathom's own commands."""


@cli.command()
@_env
@click.option("--port", default=3000, show_default=True, help="Where to listen.")
def serve(env: str | None, port: int) -> None:
    """Serve the champion over HTTP until interrupted."""
    from fathom import packaging
    from fathom.feature_store import FeatureRepo, FeatureStoreConfig

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
    packaging.serve(bento, port, repo=FeatureRepo(config, Path.cwd()))


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
    _registry(_parameters(env)).promote(version, reason, by="operator")
    click.echo(f"champion: {version}")


@cli.command()
@_env
@click.option("--reason", default="rolled back by hand", show_default=True)
def rollback(env: str | None, reason: str) -> None:
    """Put the champion's predecessor back in charge."""
    click.echo(f"champion: {_registry(_parameters(env)).rollback(reason)}")


def _parameters(env: str | None) -> dict[str, Any]:
    from kedro.framework.session import KedroSession

    with KedroSession.create(Path.cwd(), env=env) as session:
        assert isinstance(session, KedroSession)
        parameters: dict[str, Any] = session.load_context().params
    return parameters


def _registry(parameters: dict[str, Any]) -> Registry:
    from fathom.registry import Registry

    return Registry(Path(parameters["registry"]))
