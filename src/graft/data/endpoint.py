"""One request to an endpoint with OpenAI's interface: what is sent, what is an answer, and what is tried again."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import json
import os
import time
from dataclasses import dataclass
from typing import Any

import httpx2

from graft.data.recipe import GenerateSettings
from graft.errors import ConfigError, DataError

LARGEST_BODY = 8 * 2**20
"""Bytes of a response; an answer is text, so more is garbage."""
AGAIN = (408, 409, 425, 429)
"""Status codes, beside 5xx, after which the same request may succeed."""
LONGEST_WAIT = 600.0
"""Seconds that a Retry-After may ask for; a longer one is a quota, and the command ends."""
EMPTY = {"length": "no text within max_tokens", "content_filter": "stopped by the endpoint's filter"}
"""Why an answer has no text, by its finish_reason, where another try would cost the same and end the same."""
BROKEN_OFF = ("error", "abort")
"""finish_reason of an answer that the endpoint could not end (OpenRouter, vLLM)."""


class Again(Exception):
    """The request may succeed if it is tried again.

    Attributes:
        why: in a few words, the same for all failures of its kind, so that they can be counted.
        wait: seconds that the endpoint asks to wait, if it does.
        paid: the endpoint may have worked and charge for it.
        usage: tokens that it says it used.
        final: it may succeed in a later start, but not now.
    """

    def __init__(
        self,
        why: str,
        *,
        wait: float | None = None,
        paid: bool = False,
        usage: dict[str, int] | None = None,
        final: bool = False,
    ) -> None:
        super().__init__(why)
        self.why, self.wait, self.paid, self.usage, self.final = why, wait, paid, usage or {}, final


@dataclass(frozen=True)
class Answer:
    """What the endpoint said."""

    text: str
    model: str | None
    finish_reason: str | None
    """As the endpoint calls it; "refusal" if the text is what OpenAI's interface gives as one."""
    usage: dict[str, int]
    """prompt and completion tokens; empty if it does not say."""
    request_id: str | None


def address(settings: GenerateSettings) -> str:
    """The full address of the interface."""
    path = "/chat/completions" if settings.api == "chat" else "/completions"
    bare = settings.endpoint.rstrip("/")
    return bare if bare.endswith(path) else bare + path


def body(settings: GenerateSettings, prompt: str, system: str | None = None) -> dict[str, Any]:
    """The request's JSON; `system` is the row's own message, for settings without one."""
    found: dict[str, Any] = {"model": settings.model, "max_tokens": settings.max_tokens, **settings.extra}
    for name in ("temperature", "top_p"):
        if getattr(settings, name) is not None:
            found[name] = getattr(settings, name)
    if settings.stop:
        found["stop"] = settings.stop
    if settings.api == "completions":
        return found | {"prompt": prompt}
    system = settings.system if settings.system is not None else system
    first = [] if system is None else [{"role": "system", "content": system}]
    return found | {"messages": [*first, {"role": "user", "content": prompt}]}


def digest(value: Any) -> str:
    """A short hash of plain data."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def key(settings: GenerateSettings) -> str | None:
    """The key, from the environment.

    Raises:
        ConfigError: the variable is not set, or holds what no header can.
    """
    if settings.key_env is None:
        return None
    found = os.environ.get(settings.key_env, "").strip()
    if not found:
        raise ConfigError(
            f"generate.key_env: the environment has no {settings.key_env}; export it, or leave key_env out"
        )
    if not (found.isascii() and found.isprintable()):
        raise ConfigError(f"generate.key_env: {settings.key_env} holds characters that no key has; set it anew")
    return found


class Endpoint:
    """A connection to an endpoint; `async with`."""

    def __init__(self, settings: GenerateSettings) -> None:
        self.settings, self.url, self._key = settings, address(settings), key(settings)
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limits = httpx2.Limits(max_connections=settings.concurrency, max_keepalive_connections=settings.concurrency)
        self._client = httpx2.AsyncClient(headers=headers, timeout=None, limits=limits)

    async def __aenter__(self) -> Endpoint:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._client.__aexit__(*error)

    async def ask(self, request: dict[str, Any]) -> Answer:
        """One try of a request with this `body`.

        Raises:
            Again: busy, broken, too late, or garbage.
            DataError: it refuses for good.
        """
        try:
            async with asyncio.timeout(self.settings.timeout):
                return await self._ask(request)
        except TimeoutError:
            raise Again(f"no answer within {self.settings.timeout:g} s", paid=True) from None
        except (httpx2.ConnectError, httpx2.UnsupportedProtocol):
            raise Again("no connection") from None
        except httpx2.InvalidURL as error:
            raise ConfigError(f"generate.endpoint: not an address ({error})") from None
        except httpx2.HTTPError as error:
            raise Again(f"the connection broke ({type(error).__name__})", paid=True) from None

    async def _ask(self, request: dict[str, Any]) -> Answer:
        async with self._client.stream("POST", self.url, json=request) as response:
            content = bytearray()
            async for chunk in response.aiter_bytes():
                content += chunk
                if len(content) > LARGEST_BODY:
                    raise Again(f"garbage: more than {LARGEST_BODY >> 20} MiB", paid=True)
        if response.status_code in AGAIN or response.status_code >= 500:
            wait = retry_after(response.headers.get("retry-after"))
            if wait is not None and wait > LONGEST_WAIT:
                raise DataError(
                    f"{self.url}: status {response.status_code}, it asks to wait {wait:.0f} s; give the same command "
                    "again after that"
                )
            raise Again(f"status {response.status_code}", wait=wait)
        if response.status_code != 200:
            raise DataError(
                f"{self.url}: status {response.status_code}, {self._said(bytes(content))}; {_advice(response)}"
            )
        return parse(bytes(content), self.settings.api, response.headers.get("x-request-id"))

    def _said(self, content: bytes) -> str:
        """The endpoint's own words on an error, in one line and without the key."""
        text = content.decode("utf-8", "replace")
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        if self._key is not None:
            text = text.replace(self._key, "***")
        text = " ".join("".join(each if each.isprintable() else " " for each in text).split())
        return f"'{text[:200]}'" if text else "without a word"


def parse(content: bytes, api: str, request_id: str | None = None) -> Answer:
    """The answer in a response's body.

    Raises:
        Again: it is not JSON, has another shape, or an answer that is empty or broken off.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        raise Again("garbage: not JSON", paid=True) from None
    usage = _usage(found)
    try:
        choice = found["choices"][0]
        said = choice["message"] if api == "chat" else choice
        text, refusal = said.get("content" if api == "chat" else "text"), said.get("refusal")
        reason = _text(choice.get("finish_reason"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Again("garbage: JSON without an answer", paid=True, usage=usage) from None
    if reason in BROKEN_OFF:
        raise Again(f"the answer broke off (finish_reason {reason})", paid=True, usage=usage)
    if not text and isinstance(refusal, str) and refusal:
        text, reason = refusal, "refusal"
    if text is None or (isinstance(text, str) and not text.strip()):
        why = EMPTY.get(reason or "")
        raise Again(why or "empty answer", paid=True, usage=usage, final=why is not None)
    if not isinstance(text, str):
        raise Again(f"garbage: the answer is a {type(text).__name__}, not text", paid=True, usage=usage)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise Again("garbage: the answer is no Unicode text", paid=True, usage=usage) from None
    return Answer(text, _text(found.get("model")), reason, usage, request_id or _text(found.get("id")))


def retry_after(header: str | None, now: float | None = None) -> float | None:
    """Seconds that a Retry-After header asks to wait, a number or a date; None without one that makes sense."""
    if header is None:
        return None
    if header.strip().isascii() and header.strip().replace(".", "", 1).isdecimal():
        return float(header)
    try:
        date = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def _usage(found: Any) -> dict[str, int]:
    """Tokens by the endpoint's own count, where it has one that makes sense."""
    said = found.get("usage") if isinstance(found, dict) else None
    said = said if isinstance(said, dict) else {}
    counts = {name: said.get(f"{name}_tokens") for name in ("prompt", "completion")}
    if all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts.values()):
        return {name: int(count or 0) for name, count in counts.items()}
    return {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _advice(response: httpx2.Response) -> str:
    if response.status_code in (401, 403):
        return "check the key that generate.key_env names"
    if response.status_code == 404:
        return "check generate.endpoint, generate.api and generate.model"
    if response.is_redirect:
        return "it moved; give the new address as generate.endpoint"
    return "check the settings of generate"
