"""What is done once at each start, between the infrastructure and our own processes. Each step may be done again: it finds its work done.

Rule: a deployment does the same by `paystream migrate`, `paystream topics apply` and `paystream schemas register`, and by registering the webhook
endpoint in the gateway's dashboard.
"""

from __future__ import annotations

import http.client
import json
from typing import Any, Final
from urllib.parse import urlencode

from infra.local import postgres
from infra.local.environment import DATABASE, database_url, local, real_gateway, settings
from infra.local.home import Home
from infra.local.process import StackError

_ENDPOINTS: Final = "/v1/webhook_endpoints"
_ROUTE: Final = "/api/v1/webhooks/stripe"
FOLLOWED_EVENTS: Final = tuple(
    f"payment_intent.{event}" for event in ("succeeded", "payment_failed", "requires_action", "amount_capturable_updated", "canceled", "processing")
)


def migrate(home: Home) -> None:
    from infra.database.migrations.run import migrate

    postgres.create_database(home, DATABASE)
    migrate(database_url(home, DATABASE))


def apply_topics(home: Home) -> None:
    from infra import kafka_admin

    kafka_admin.apply(settings(home), "development")


def register_schemas(home: Home) -> None:
    from infra.schema_registry import register

    register(settings(home))


def register_webhook(home: Home) -> None:
    """Tell the sandbox where webhooks go, keep the secret that it signs them with, and let it forget where the API was before."""
    if real_gateway():
        return
    url = local(home, "api") + _ROUTE
    for endpoint in _ask_sandbox(home, "GET", _ENDPOINTS)["data"]:
        if endpoint["url"].endswith(_ROUTE) and endpoint["url"] != url:
            _ask_sandbox(home, "DELETE", f"{_ENDPOINTS}/{endpoint['id']}")
    form = urlencode([("url", url), *(("enabled_events[]", event) for event in FOLLOWED_EVENTS)])
    home.keep_secret("webhook_secret", _ask_sandbox(home, "POST", _ENDPOINTS, form)["secret"])


def _ask_sandbox(home: Home, method: str, path: str, form: str | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", home.ports["sandbox"], timeout=10)
    headers = {"Authorization": f"Bearer {home.secrets['stripe_api_key']}", "Content-Type": "application/x-www-form-urlencoded"}
    try:
        connection.request(method, path, form, headers)
        answer = connection.getresponse()
        body = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200:
        raise StackError(f"the sandbox refuses {method} {path}: {body}")
    return body
