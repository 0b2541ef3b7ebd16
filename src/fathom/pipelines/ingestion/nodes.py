"""Nodes of the ingestion pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.sources import SourceConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any  # Kedro resolves the hints of nodes when it lists them; Ibis takes 0.5 s to import

Partitions = dict[str, Table]


def fingerprint_source(source: SourceConfig) -> dict[str, str]:
    """SHA-256 of every file of the configured source, by path."""
    from fathom import sources

    return sources.fingerprint(source)


def read_source(
    source: SourceConfig, source_files: dict[str, str]
) -> tuple[Partitions, Partitions, Partitions, Partitions]:
    """Read the configured source.

    Args:
        source_files: what there is to read; a change of it is a reason to read again.

    Returns:
        Partitions of exposures and interactions (none if the source has none), users and items.
    """
    from fathom import sources

    tables = sources.read(source)
    return (
        _partitions(tables.exposures),
        {} if tables.interactions is None else _partitions(tables.interactions),
        {"users": tables.users},
        {"items": tables.items},
    )


def _partitions(table: Table) -> Partitions:
    names = table.select("partition").distinct().to_pyarrow()["partition"].to_pylist()
    return {name: table.filter(table.partition == name).drop("partition") for name in sorted(names)}
