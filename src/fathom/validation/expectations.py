"""The only place that talks to Great Expectations: run checks on a batch, write Data Docs.

Contexts live in memory; nothing is sent and nothing is written but the site that is asked for.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.files import replacing
from fathom.validation.checks import Check

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

#: COMPLETE is the format whose index list is not cut. Index columns stay unnamed, since naming
#: them costs a Python loop over rows; the query would repeat the list as text.
_RESULT_FORMAT = {
    "result_format": "COMPLETE",
    "return_unexpected_index_query": False,
    "partial_unexpected_count": 5,
}
#: Those that name every copy, and would quarantine the first one too.
_UNIQUENESS = {
    "expect_column_values_to_be_unique",
    "expect_compound_columns_to_be_unique",
}
_SITE = "validation"


class RuleError(ValueError):
    """Rules of ``params:validation`` cannot be applied; the message lists every fault."""

    def __init__(self, table: str, faults: list[str]) -> None:
        self.table, self.faults = table, faults
        lines = "\n".join(f"  - {fault}" for fault in faults)
        super().__init__(f"validation rules of {table}:\n{lines}")


@dataclass(frozen=True)
class Outcome:
    """What one expectation found.

    Args:
        check: the expectation.
        success: whether it holds.
        rows: positions in the batch of the rows that break it, rising; None for an expectation
            about the table as a whole.
        observed: what an expectation about the whole table saw.
    """

    check: Check
    success: bool
    rows: NDArray[np.int64] | None
    observed: str = ""


def evaluate(
    frame: pd.DataFrame, checks: Sequence[Check], table: str, moment: datetime
) -> tuple[list[Outcome], dict[str, Any]]:
    """Run expectations on a batch.

    Args:
        frame: the columns that the checks read, with an unnamed RangeIndex.
        checks: in the order in which the outcomes are wanted.
        table: names the suite.
        moment: time of the run, which Great Expectations stamps on its result.

    Returns:
        An outcome for each different check, and Great Expectations' own result as JSON types,
        without its lists of rows.

    Raises:
        RuleError: with all checks that are unknown, have wrong arguments, or fail to run.
    """
    import great_expectations as gx

    expectations = _expectations(checks, table)
    with _context() as context:
        asset = context.data_sources.add_pandas("raw").add_dataframe_asset(table)
        definition = asset.add_batch_definition_whole_dataframe("whole")
        batch = definition.get_batch({"dataframe": frame})
        suite = gx.ExpectationSuite(name=table, expectations=expectations)
        result = batch.validate(suite, result_format=_RESULT_FORMAT)
    outcomes, faults = {}, []
    for found in result.results:
        number = found.expectation_config.meta["check"]
        fault = _exception(found.exception_info)
        if fault:
            faults.append(f"{checks[number].type}: {fault}")
        else:
            outcomes[number] = _outcome(found, checks[number])
    if faults:
        raise RuleError(table, faults)
    # Without the time at which the frame was loaded: the same rows give the same result.
    result.meta = {
        "great_expectations_version": gx.__version__,
        "run_id": {"run_name": table, "run_time": moment.isoformat()},
    }
    result.results.sort(key=lambda found: found.expectation_config.meta["check"])
    return [outcomes[number] for number in sorted(outcomes)], result.to_json_dict()


def write_data_docs(results: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write Great Expectations' site about several batches to a folder, atomically.

    The site loads its style sheets from the network; `render_html` writes a page that does not.

    Args:
        results: as given by `evaluate`, one per table.
        folder: replaced as a whole; open its ``index.html``.
    """
    import great_expectations as gx
    from great_expectations.core.expectation_validation_result import (
        ExpectationSuiteValidationResultSchema,
    )
    from great_expectations.core.run_identifier import RunIdentifier
    from great_expectations.data_context.types.resource_identifiers import (
        ExpectationSuiteIdentifier,
        ValidationResultIdentifier,
    )
    from great_expectations.expectations.registry import get_expectation_impl

    with replacing(folder) as temporary, _context(site=temporary) as context:
        for raw in results:
            result = ExpectationSuiteValidationResultSchema().load(_escaped(raw))
            table = result.suite_name
            run = result.meta["run_id"]
            expectations = [
                get_expectation_impl(config.type)(**_arguments(config.kwargs), meta=config.meta)
                for config in (found.expectation_config for found in result.results)
            ]
            context.suites.add(gx.ExpectationSuite(name=table, expectations=expectations))
            key = ValidationResultIdentifier(
                ExpectationSuiteIdentifier(table),
                RunIdentifier(run["run_name"], datetime.fromisoformat(run["run_time"])),
                table,
            )
            context.validation_results_store.set(key, result)
        context.build_data_docs()


@contextmanager
def _context(site: Path | None = None) -> Iterator[Any]:
    """A Great Expectations context in memory, quiet and without telemetry."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import (
        DataContextConfig,
        InMemoryStoreBackendDefaults,
        ProgressBarsConfig,
    )

    sites = {
        _SITE: {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": {
                "class_name": "TupleFilesystemStoreBackend",
                "base_directory": str(site and site.resolve()),
            },
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
    }
    config = DataContextConfig(
        analytics_enabled=False,
        progress_bars=ProgressBarsConfig(globally=False),
        store_backend_defaults=InMemoryStoreBackendDefaults(),
        data_docs_sites=sites if site else {},
    )
    logger = logging.getLogger("great_expectations")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield gx.get_context(mode="ephemeral", project_config=config)
    finally:
        logger.setLevel(level)


def _expectations(checks: Sequence[Check], table: str) -> list[Any]:
    """Checks as Great Expectations' objects, or all of their faults."""
    from great_expectations.exceptions.exceptions import ExpectationNotFoundError
    from great_expectations.expectations.registry import (
        get_expectation_impl,
        list_registered_expectation_implementations,
    )

    expectations, faults = [], []
    for number, check in enumerate(checks):
        if check.type in _UNIQUENESS:
            faults.append(
                f"{check.type}: would quarantine every copy; list the columns under "
                "'duplicates', which keeps the first"
            )
            continue
        if "mostly" in check.kwargs:
            faults.append(
                f"{check.type}: 'mostly' {check.kwargs['mostly']} has no effect on "
                "single rows; set 'max_quarantined_share' instead"
            )
            continue
        meta = {"check": number, "reason": check.reason}
        try:
            expectations.append(get_expectation_impl(check.type)(**check.kwargs, meta=meta))
        except ExpectationNotFoundError:
            known = list_registered_expectation_implementations()
            near = get_close_matches(check.type, known, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            faults.append(f"{check.type}: no expectation has this name{hint}")
        except ValueError as error:  # pydantic's own among them
            faults.append(f"{check.type} {check.kwargs}: {' '.join(str(error).split())}")
    if faults:
        raise RuleError(table, faults)
    return expectations


def _outcome(found: Any, check: Check) -> Outcome:
    """Read one result, and take its lists of rows out of it."""
    rows = found.result.pop("unexpected_index_list", None)
    for name in ("unexpected_list", "partial_unexpected_index_list", "partial_unexpected_counts"):
        found.result.pop(name, None)
    if rows is None and "element_count" not in found.result:
        return Outcome(check, bool(found.success), None, str(found.result.get("observed_value")))
    positions = np.unique(np.asarray(rows or [], dtype=np.int64))
    return Outcome(check, bool(found.success), positions)


def _exception(info: Any) -> str:
    """The message of an exception inside an expectation, or nothing."""
    if not info or info.get("raised_exception") is False:
        return ""
    if "exception_message" in info:
        return str(info["exception_message"])
    return "; ".join(str(entry["exception_message"]) for entry in info.values())


def _escaped(value: Any) -> Any:
    """Data Docs put raw values into their pages as they are."""
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return html.escape(value) if isinstance(value, str) else value


def _arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name != "batch_id"}
