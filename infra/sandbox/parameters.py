"""What a request asks for: form-encoded bracket notation (`metadata[order_id]=o1`, `expand[]=latest_charge`) read into typed, checked requests.

Rule: whoever reads a parameter says what it must be; what nobody read is unknown, and refused by name, so that a typing error is not overlooked.
Nothing is executed before all parameters were read: an `ApiError` from here is never saved under an idempotency key.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

from infra.sandbox.errors import invalid

_MAX_FIELDS: Final = 200
_MAX_AMOUNT: Final = 99_999_999
_MAX_TEXT: Final = 1000
_PART: Final = re.compile(r"\[([^\[\]]*)\]")
_EXPANDABLE: Final = frozenset({"latest_charge", "payment_method"})
_CURRENCIES: Final = frozenset(
    """
    aed afn all amd ang aoa ars aud awg azn bam bbd bdt bgn bhd bif bmd bnd bob brl bsd bwp byn bzd cad cdf chf clp cny cop crc cve czk djf dkk dop
    dzd egp etb eur fjd fkp gbp gel gip gmd gnf gtq gyd hkd hnl htg huf idr ils inr isk jmd jod jpy kes kgs khr kmf krw kwd kyd kzt lak lbp lkr lrd
    lsl mad mdl mga mkd mmk mnt mop mur mvr mwk mxn myr mzn nad ngn nio nok npr nzd omr pab pen pgk php pkr pln pyg qar ron rsd rub rwf sar sbd scr
    sek sgd shp sle sos srd std szl thb tjs tnd top try ttd twd tzs uah ugx usd uyu uzs vnd vuv wst xaf xcd xof xpf yer zar zmw
    """.split()  # noqa: SIM905 - a few lines to read instead of a page
)
# Amounts that Stripe takes in steps: 10 in three-decimal currencies, 100 in those that lost their decimals (docs.stripe.com/currencies).
_STEPS: Final[Mapping[str, int]] = {"bhd": 10, "jod": 10, "kwd": 10, "omr": 10, "tnd": 10, "isk": 100, "ugx": 100}
# Parameters of Stripe's that this subset takes and makes nothing of.
_WITHOUT_EFFECT: Final = (
    "application_fee_amount", "confirmation_method", "customer", "error_on_requires_action", "mandate_data", "off_session", "payment_method_options",
    "receipt_email", "setup_future_usage", "shipping", "statement_descriptor", "statement_descriptor_suffix", "use_stripe_sdk",
)  # fmt: skip

Pairs = list[tuple[str, str]]


def pairs_of(text: bytes) -> Pairs:
    """The fields of a form or a query, as they came. Raises ApiError where it is none."""
    try:
        return parse_qsl(text.decode(), keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except (UnicodeDecodeError, ValueError):
        raise invalid(f"The request is no form-encoded text of at most {_MAX_FIELDS} fields.") from None


class Form:
    """The parameters of one request. Reading one takes it out; `finish` refuses what is left."""

    def __init__(self, pairs: Pairs) -> None:
        self._fields: dict[str, Any] = {}
        for name, value in pairs:
            head, bracket, _ = name.partition("[")
            parts = _PART.findall(name[len(head) :]) if bracket else []
            if bracket and (not head or not parts or len(parts) > 3 or head + "".join(f"[{part}]" for part in parts) != name):
                raise invalid(f"Received unknown parameter: {name[:100]}", param=name[:100], code="parameter_unknown")
            _put(self._fields, head, parts, value)

    def text(self, name: str, *, longest: int = _MAX_TEXT) -> str | None:
        """None where it is not given or empty, which is Stripe's way to unset."""
        value = self._fields.pop(name, None)
        if value is not None and not isinstance(value, str):
            raise invalid(f"Invalid string: {name}", param=name)
        if value is not None and len(value) > longest:
            raise invalid(f"Invalid string: {name} must be at most {longest} characters", param=name)
        return value or None

    def required(self, name: str) -> str:
        value = self.text(name)
        if value is None:
            raise invalid(f"Missing required param: {name}.", param=name, code="parameter_missing")
        return value

    def integer(self, name: str, *, least: int = 0, most: int = 2**62) -> int | None:
        value = self.text(name)
        if value is None:
            return None
        if not re.fullmatch(r"-?\d{1,18}", value):
            raise invalid(f"Invalid integer: {value[:100]}", param=name, code="parameter_invalid_integer")
        if not least <= int(value) <= most:
            raise invalid(f"Invalid integer: {name} must be between {least} and {most}", param=name, code="parameter_invalid_integer")
        return int(value)

    def flag(self, name: str) -> bool:
        value = self.text(name)
        if value not in (None, "true", "false"):
            raise invalid(f"Invalid boolean: {name} must be true or false", param=name)
        return value == "true"

    def choice(self, name: str, options: Collection[str]) -> str | None:
        value = self.text(name)
        if value is not None and value not in options:
            raise invalid(f"Invalid {name}: must be one of {', '.join(options)}", param=name)
        return value

    def url(self, name: str) -> str | None:
        value = self.text(name, longest=2048)
        if value is not None and not is_web_address(value):
            raise invalid(f"Invalid URL: {name} must begin with http:// or https://", param=name, code="url_invalid")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A list, as `name[]=a` or `name[0]=a`."""
        value = self._fields.pop(name, None)
        if value is None:
            return ()
        if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
            raise invalid(f"Invalid array: {name}", param=name)
        return tuple(value.values())

    def group(self, name: str) -> Form | None:
        """What is in brackets behind this name."""
        value = self._fields.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(f"Invalid object: {name}", param=name)
        form = Form([])
        form._fields = value
        return form

    def metadata(self) -> dict[str, str]:
        """Up to 50 names of 40 characters, with values of 500."""
        value = self._fields.pop("metadata", None) or {}
        if not isinstance(value, dict) or len(value) > 50:
            raise invalid("Invalid metadata: up to 50 keys are allowed", param="metadata")
        for name, item in value.items():
            if not isinstance(item, str) or len(name) > 40 or len(item) > 500:
                raise invalid("Metadata keys can have up to 40 characters, and values up to 500.", param=f"metadata[{name[:40]}]")
        return {name: item for name, item in value.items() if item}

    def expand(self) -> frozenset[str]:
        """Which references are shown as whole objects; a list names them with `data.` before."""
        wanted = frozenset(name.removeprefix("data.") for name in self.texts("expand"))
        for name in wanted - _EXPANDABLE:
            raise invalid(f"This property cannot be expanded ({name[:100]}).", param="expand")
        return wanted

    def ignore(self, names: Collection[str]) -> None:
        for name in names:
            self._fields.pop(name, None)

    def finish(self) -> None:
        for name in self._fields:
            raise invalid(f"Received unknown parameter: {name[:100]}", param=name[:100], code="parameter_unknown")


def _put(fields: dict[str, Any], head: str, parts: list[str], value: str) -> None:
    names = [head, *parts]
    for name in names[:-1]:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise invalid(f"Invalid object: {head}", param=head)
    fields[names[-1] or str(len(fields))] = value


def is_web_address(value: str) -> bool:
    try:
        parts = urlsplit(value)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    payment_method: str | None
    return_url: str | None
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Creation:
    """`confirmation` is None unless the money shall be tried for at once."""

    amount: int
    currency: str
    payment_method: str | None
    capture_method: str
    allow_redirects: str | None
    payment_method_types: tuple[str, ...]
    metadata: Mapping[str, str]
    description: str | None
    confirmation: Confirmation | None
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    amount: int | None
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancellation:
    reason: str | None
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrieval:
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    limit: int
    after: str | None
    created_from: int
    expand: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """`number` is shown by no repr and kept by nobody."""

    number: str = field(repr=False)
    exp_month: int
    exp_year: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    url: str
    enabled_events: tuple[str, ...]
    description: str | None
    metadata: dict[str, str]


def read_creation(form: Form) -> Creation:
    form.ignore(_WITHOUT_EFFECT)
    amount = _amount(form)
    currency = form.required("currency").lower()
    if currency not in _CURRENCIES:
        raise invalid(f"Invalid currency: {currency[:20]}.", param="currency")
    if amount % _STEPS.get(currency, 1):
        raise invalid(f"Invalid amount: in {currency} it must be a multiple of {_STEPS[currency]}.", param="amount")
    types = form.texts("payment_method_types")
    automatic = form.group("automatic_payment_methods")
    allow_redirects = None if types else "always"
    if automatic is not None:
        if automatic.flag("enabled") and types:
            raise invalid(
                "You may only specify one of these parameters: automatic_payment_methods, payment_method_types.", param="payment_method_types"
            )
        allow_redirects = automatic.choice("allow_redirects", ("always", "never")) or allow_redirects
        automatic.finish()
    confirm = form.flag("confirm")
    method, return_url, expand = form.text("payment_method"), form.url("return_url"), form.expand()
    if return_url is not None and not confirm:
        raise invalid("`return_url` can only be used with `confirm=true`: give it when the PaymentIntent is confirmed.", param="return_url")
    creation = Creation(
        amount=amount,
        currency=currency,
        payment_method=method,
        capture_method=form.choice("capture_method", ("automatic", "automatic_async", "manual")) or "automatic",
        allow_redirects=allow_redirects,
        payment_method_types=types or ("card",),
        metadata=form.metadata(),
        description=form.text("description"),
        confirmation=Confirmation(payment_method=method, return_url=return_url, expand=expand) if confirm else None,
        expand=expand,
    )
    form.finish()
    return creation


def _amount(form: Form) -> int:
    amount = form.integer("amount", least=-(10**17))
    if amount is None:
        raise invalid("Missing required param: amount.", param="amount", code="parameter_missing")
    if amount < 1:
        raise invalid("This value must be greater than or equal to 1.", param="amount", code="parameter_invalid_integer")
    if amount > _MAX_AMOUNT:
        raise invalid(f"Amount must be no more than {_MAX_AMOUNT}", param="amount", code="amount_too_large")
    return amount


def read_confirmation(form: Form) -> Confirmation:
    form.ignore(_WITHOUT_EFFECT)
    confirmation = Confirmation(payment_method=form.text("payment_method"), return_url=form.url("return_url"), expand=form.expand())
    form.finish()
    return confirmation


def read_capture(form: Form) -> Capture:
    form.ignore(_WITHOUT_EFFECT)
    capture = Capture(amount=form.integer("amount_to_capture", least=1, most=_MAX_AMOUNT), expand=form.expand())
    form.finish()
    return capture


def read_cancellation(form: Form) -> Cancellation:
    reasons = ("duplicate", "fraudulent", "requested_by_customer", "abandoned")
    cancellation = Cancellation(reason=form.choice("cancellation_reason", reasons), expand=form.expand())
    form.finish()
    return cancellation


def read_retrieval(form: Form) -> Retrieval:
    form.ignore(("client_secret",))
    retrieval = Retrieval(expand=form.expand())
    form.finish()
    return retrieval


def read_page(form: Form) -> Page:
    created = form.group("created")
    created_from = 0
    if created is not None:
        created_from = created.integer("gte") or 0
        created.finish()
    page = Page(
        limit=form.integer("limit", least=1, most=100) or 10, after=form.text("starting_after"), created_from=created_from, expand=form.expand()
    )
    form.finish()
    return page


def read_card(form: Form) -> Card:
    """A new payment method: `type=card` and `card[number, exp_month, exp_year, cvc]`."""
    form.ignore(("billing_details", "metadata", "allow_redisplay"))
    if form.required("type") != "card":
        raise invalid("Invalid type: the sandbox makes payment methods of type card.", param="type")
    card = form.group("card")
    if card is None:
        raise invalid("Missing required param: card.", param="card", code="parameter_missing")
    number = card.text("number", longest=40)
    exp_month, exp_year = card.integer("exp_month", least=1, most=12), card.integer("exp_year", least=2000, most=2100)
    if number is None or exp_month is None or exp_year is None:
        name = "number" if number is None else "exp_month" if exp_month is None else "exp_year"
        raise invalid(f"Missing required param: card[{name}].", param=f"card[{name}]", code="parameter_missing")
    card.ignore(("cvc",))
    card.finish()
    form.finish()
    return Card(number=number, exp_month=exp_month, exp_year=exp_year)


def read_registration(form: Form) -> Registration:
    form.ignore(("api_version", "connect"))
    url = form.url("url")
    if url is None:
        raise invalid("Missing required param: url.", param="url", code="parameter_missing")
    events = form.texts("enabled_events")
    if not events:
        raise invalid("Missing required param: enabled_events.", param="enabled_events", code="parameter_missing")
    registration = Registration(url=url, enabled_events=events, description=form.text("description"), metadata=form.metadata())
    form.finish()
    return registration
