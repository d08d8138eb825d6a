"""Taking secrets out of what is written: strings that look like a key, and values of the environment's secret variables.

Takes any value that JSON can hold; gives the same shape with each secret replaced by "***". The forms are those that the issuers
document; a value is also taken out when the name beside it says that it is a secret. Environment values are read only to be removed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "***"
_SHORTEST_VALUE = 8  # characters; a shorter environment value would take ordinary words out

_SPECIAL = "".join(f"(?<!{kind}_)" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask"))  # a tokenizer's tokens are no secrets
_NAME = (
    rf"(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?(?:access[_-]?)?key)?|{_SPECIAL}token|passw(?:or)?d|passphrase"
    r"|credentials?|private[_-]?key|signature|sig)"
)
_SECRET_NAME = re.compile(rf"(?:^|[^a-z]|(?<=[a-z])(?=[A-Z])){_NAME}$|^authorization$", re.IGNORECASE)

_FORMS = [
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}"),  # Hugging Face
    re.compile(r"\b(?:sk|pk|rk)[-_][A-Za-z0-9][A-Za-z0-9_-]{14,}"),  # OpenAI, Anthropic, OpenRouter, Stripe
    re.compile(r"\b(?:AKIA|ASIA|AROA|AIDA)[A-Z0-9]{16}\b"),  # AWS key ids
    re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,})"),
    re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),  # Slack
    re.compile(r"\bAIza[A-Za-z0-9_-]{30,}|\bya29\.[A-Za-z0-9_-]{16,}"),  # Google
    re.compile(r"\b(?:npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,}|gsk_[A-Za-z0-9]{20,}|nvapi-[A-Za-z0-9_-]{20,}|r8_[A-Za-z0-9]{20,})"),
    re.compile(r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*"),  # JSON Web Token
]
_BEARER = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9+/._~=-]{8,}", re.IGNORECASE)
_URL_CREDENTIALS = re.compile(r"(?<=://)[^/\s@?#]*(?=@)")
_ASSIGNMENT = re.compile(rf"({_NAME}[\"']?\s*=\s*[\"']?)[^\s&\"',;]{{6,}}", re.IGNORECASE)
_MENTION = re.compile(rf"({_NAME}[\"']?\s*:\s*[\"']?)(?=[^\s&\"',;]*[0-9])[^\s&\"',;]{{8,}}", re.IGNORECASE)


def redact(value: Any) -> Any:
    """The value with every secret in it, in keys as well, replaced by "***"; the value itself is not changed.

    >>> redact({"api_key": "0123", "url": "https://me:pw@host/x", "max_new_tokens": 64})
    {'api_key': '***', 'url': 'https://***@host/x', 'max_new_tokens': 64}
    """
    return _redact(value, _environment_secrets())


def _redact(value: Any, known: list[str]) -> Any:
    if isinstance(value, str):
        return _redact_text(value, known)
    if isinstance(value, Mapping):
        result: dict[Any, Any] = {}
        for key, item in value.items():
            name = _redact_text(key, known) if isinstance(key, str) else key
            while name in result:  # two keys that differ in their secret only: neither may vanish
                name += "'"
            secret = isinstance(key, str) and isinstance(item, str) and item and _SECRET_NAME.search(key)
            result[name] = REDACTED if secret else _redact(item, known)
        return result
    if isinstance(value, list | tuple):
        return [_redact(item, known) for item in value]
    return value


def _redact_text(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, REDACTED)
    for form in _FORMS:
        text = form.sub(REDACTED, text)
    text = _BEARER.sub(rf"\1 {REDACTED}", text)
    text = _URL_CREDENTIALS.sub(REDACTED, text)
    text = _ASSIGNMENT.sub(rf"\1{REDACTED}", text)
    return _MENTION.sub(rf"\1{REDACTED}", text)


def _environment_secrets() -> list[str]:
    """Values of variables with a secret's name, the longest first so that none is cut by a shorter one."""
    values = {value for name, value in os.environ.items() if len(value) >= _SHORTEST_VALUE and _SECRET_NAME.search(name)}
    return sorted(values, key=len, reverse=True)
