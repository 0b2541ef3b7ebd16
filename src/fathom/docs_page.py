"""The page at ``/``, which shows the OpenAPI document.

In place of BentoML's own page, which asks the network for a tag manager. The Swagger UI comes with
BentoML, under ``/static_content``. The page's security policy lets the browser ask no other host,
whatever these scripts may want; only the one inline script of this page runs, by its hash.
"""

from __future__ import annotations

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import HTMLResponse

# `validatorUrl: null`: else the document's address would be sent to a validator on the network.
_SCRIPT = """
window.ui = SwaggerUIBundle({
  url: "./docs.json", dom_id: "#swagger-ui", deepLinking: true, validatorUrl: null,
  tryItOutEnabled: true, displayRequestDuration: true,
});
"""
PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fathom</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="./static_content/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This needs JavaScript; the document is <a href="./docs.json">docs.json</a>.</noscript>
<script src="./static_content/swagger-ui-bundle.js"></script>
<script>{_SCRIPT}</script>
</body>
</html>
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
    # Swagger UI styles its elements inline.
    f"style-src 'self' 'unsafe-inline'; script-src 'self' 'sha256-{_HASH}'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


async def show(_: Request) -> HTMLResponse:
    """The page, and the policy that keeps it offline."""
    return HTMLResponse(
        PAGE, headers={"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    )
