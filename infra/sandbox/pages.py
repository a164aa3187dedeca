"""The pages that a person sees: 3-D Secure, where the customer says yes or no, and a receipt.

Rule: a page's address is its key (it holds a secret that only the intent's owner was given); what is shown is escaped; no scripts; fit for phones.
"""

from __future__ import annotations

from hmac import compare_digest
from html import escape
from string import Template
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from aiohttp import web

from infra.sandbox.account import Account, Caller
from infra.sandbox.api import base_url, guarded
from infra.sandbox.errors import missing
from infra.sandbox.intents import Intent, Status
from infra.sandbox.storage import Storage

_PAGE: Final = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
  :root { color-scheme: light dark; font: 1.1rem/1.5 system-ui, sans-serif; }
  body { margin: 0 auto; max-width: 26rem; padding: 1.5rem; }
  .amount { font-size: 2rem; font-weight: 600; margin: .5rem 0; }
  .note { opacity: .7; font-size: .9rem; }
  button { display: block; width: 100%; min-height: 3.25rem; margin: .75rem 0; border: 1px solid; border-radius: .6rem; font: inherit; }
  .approve { background: #0a7d33; border-color: #0a7d33; color: #fff; }
  .decline { background: transparent; color: inherit; }
</style>
</head>
<body>
<main>
<h1>$title</h1>
$content
<p class="note">This is the Paystream sandbox: no real money moves.</p>
</main>
</body>
</html>
""")
_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}
# Decimals of an amount as Stripe takes it, where they are not two.
_PLACES: Final = {
    **dict.fromkeys(("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "vnd", "vuv", "xaf", "xof", "xpf"), 0),
    **dict.fromkeys(("bhd", "jod", "kwd", "omr", "tnd"), 3),
}


class Pages:
    def __init__(self, account: Account, storage: Storage) -> None:
        self._account = account
        self._storage = storage

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/3ds/{id}/{challenge}", guarded(self._ask, self._storage)),
            web.post("/3ds/{id}/{challenge}", guarded(self._decide, self._storage)),
            web.get("/receipts/{id}", guarded(self._receipt, self._storage)),
        ]

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        intent = self._challenged(request)
        if intent is None:
            return _page("Nothing to confirm", "<p>This payment does not wait for you (any more). You can close this page.</p>")
        return _page(
            "Confirm your payment",
            f"<p>{escape(intent.description or 'Your bank wants to know that it is you who pays.')}</p>"
            f'<p class="amount">{_amount(intent.amount, intent.currency)}</p>'
            '<form method="post"><button class="approve" name="outcome" value="success">Approve</button>'
            '<button class="decline" name="outcome" value="failure">Decline</button></form>',
        )

    async def _decide(self, request: web.Request) -> web.StreamResponse:
        intent = self._challenged(request)
        outcome = dict(parse_qsl((await request.read()).decode("utf-8", "replace"), max_num_fields=10)).get("outcome")
        if intent is None or outcome not in ("success", "failure"):
            return await self._ask(request)
        decided = self._account.authenticate(intent.id, Caller(base_url=base_url(request)), passed=outcome == "success")
        paid = decided.status in (Status.SUCCEEDED, Status.REQUIRES_CAPTURE)
        if decided.return_url is not None:
            return web.Response(status=303, headers={**_HEADERS, "Location": _back(decided.return_url, decided, paid=paid)})
        return _page("Payment approved" if paid else "Payment declined", "<p>You can close this page.</p>")

    def _challenged(self, request: web.Request) -> Intent | None:
        """The intent that waits at this address, None where it waits no more."""
        intent = self._account.intent(request.match_info["id"])
        if intent.challenge is None or not compare_digest(intent.challenge.encode(), request.match_info["challenge"].encode()):
            return None
        return intent

    async def _receipt(self, request: web.Request) -> web.StreamResponse:
        charge = self._account.charge(request.match_info["id"])
        if charge.status != "succeeded":
            raise missing("receipt", charge.id, param="id")
        word = "Paid" if charge.captured else "Authorised"
        return _page(
            "Receipt",
            f"<p>{escape(charge.description or 'Payment')}</p>"
            f'<p class="amount">{_amount(charge.amount_captured if charge.captured else charge.amount, charge.currency)}</p>'
            f"<p>{word}. Reference: {escape(charge.id)}</p>",
        )


def _page(title: str, content: str) -> web.Response:
    return web.Response(text=_PAGE.substitute(title=escape(title), content=content), content_type="text/html", headers=_HEADERS)


def _amount(minor: int, currency: str) -> str:
    places = _PLACES.get(currency, 2)
    digits = f"{minor:0{places + 1}d}"
    return f"{digits[:-places] + '.' + digits[-places:] if places else digits} {escape(currency.upper())}"


def _back(return_url: str, intent: Intent, *, paid: bool) -> str:
    """Where the customer goes next, with the parameters that Stripe adds."""
    parts = urlsplit(return_url)
    added = {
        "payment_intent": intent.id,
        "payment_intent_client_secret": intent.client_secret,
        "redirect_status": "succeeded" if paid else "failed",
    }
    return urlunsplit(parts._replace(query=urlencode([*parse_qsl(parts.query, keep_blank_values=True), *added.items()])))
