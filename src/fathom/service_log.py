"""What the service logs: text or one JSON object a line, and nothing of whom it serves.

Messages are written so that they name no user, item or value of a request. What others raise may:
an error's text can quote what it could not convert. So of an error in a request, or in a vendor's
code around it, only the types and the places in the code are logged, unless ``log_personal`` is
set.
"""

from __future__ import annotations

import json
import logging
import traceback
from datetime import datetime, timezone
from typing import Any

#: A child of BentoML's logger, which is the one that its server formats and prints.
log = logging.getLogger("bentoml.fathom")
#: A line for each request; printed as JSON only.
access = logging.getLogger("bentoml.fathom.access")

#: Whose errors may be quoted, where they are not of a request.
_OURS = ("bentoml.fathom", "fathom")


def configure(log_format: str, log_personal: bool = False) -> None:
    """Set up the handlers that BentoML's server has made in this process."""
    for handler in logging.getLogger("bentoml").handlers:
        if log_format == "json":
            handler.setFormatter(JsonFormatter())
        if not log_personal and not any(isinstance(old, Discreet) for old in handler.filters):
            handler.addFilter(Discreet())
    # BentoML's own line of a request has the client's address and whatever path it asked for.
    logging.getLogger("bentoml.access").disabled = not log_personal
    access.setLevel(logging.INFO if log_format == "json" else logging.WARNING)
    # What Python and libraries warn of is a line like the others.
    logging.captureWarnings(log_format == "json")


def about(request_id: str | None, **fields: Any) -> dict[str, dict[str, Any]]:
    """``extra`` of a record that is of a request: its id and what else its JSON is to name."""
    return {"fields": {"request_id": request_id, **fields}}


class Discreet(logging.Filter):
    """Leaves out of a record what may be personal."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, without the text of errors that may quote a request."""
        ours = record.name.startswith(_OURS) and "request_id" not in _fields(record)
        if record.exc_info and record.exc_info[1] and not ours:
            record.exc_text = types_and_places(record.exc_info[1])
        if record.name == "asyncio":  # its further lines represent tasks with their errors
            record.msg, record.args = record.getMessage().partition("\n")[0], ()
        return True


def types_and_places(error: BaseException) -> str:
    """An error's traceback, its causes first, without the texts of either."""
    parts: list[str] = []
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        places = "".join(traceback.format_tb(found.__traceback__))
        parts.append(f"{places}{type(found).__qualname__} (its text is not logged)")
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)
    return "\n\nwhich led to:\n\n".join(reversed(parts))


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, and the event's.

    Every record has the ``version`` that serves, as soon as there is one.
    """

    #: Of the ranker that serves.
    version: str | None = None

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "version": JsonFormatter.version,
            **_fields(record),
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps({k: v for k, v in line.items() if v is not None}, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found: dict[str, Any] = getattr(record, "fields", {})
    return found
