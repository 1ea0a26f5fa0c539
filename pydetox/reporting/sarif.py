"""Findings as SARIF 2.1.0, which code hosts and security dashboards read.

Source: OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0". Results are
findings only; what could not be scanned is a notification of the invocation, which then has not
been successful.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from .values import clean_text, number

SARIF_VERSION = "2.1.0"
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json"
_FINGERPRINT = "pydetox/v1"

#: Rules: identifier, level, what it says. Identifiers stay as they are for ever.
_RULES = {
    "backdoored": (
        "PYDETOX001",
        "Backdoor",
        "error",
        "A trigger was reconstructed that is far smaller than any that clean references have.",
    ),
    "suspicious": (
        "PYDETOX002",
        "SuspectedBackdoor",
        "warning",
        "A trigger was reconstructed that is smaller than those of most clean references.",
    ),
    "unsafe": (
        "PYDETOX003",
        "UnsafeFile",
        "error",
        "The file is built to run code when it is loaded, or to exhaust memory.",
    ),
    "odd": (
        "PYDETOX004",
        "OddFile",
        "warning",
        "Something about the file is odd, and does not keep it from being read.",
    ),
}


def to_sarif(document: Mapping[str, Any], *, version: str) -> dict[str, Any]:
    """Return a SARIF log. document: see `run_document`. version: of pydetox."""
    order = list(_RULES)
    findings = [(kind, r) for r in document["results"] if (kind := _finding(r)) is not None]
    notes = [
        {
            "level": "error" if result["verdict"] == "error" else "warning",
            "message": {"text": clean_text(_said(result))},
            "locations": [_location(result["name"])],
        }
        for result in document["results"]
        if result["verdict"] in ("error", "inconclusive", "skipped")
    ]
    notes += [
        {
            "level": "error",
            "message": {"text": clean_text(f"{name}: not reached; the run was interrupted")},
            "locations": [_location(name)],
        }
        for name in document["not_reached"]
    ]
    return {
        "$schema": _SCHEMA,
        "version": SARIF_VERSION,
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "pydetox",
                        "version": version,
                        "rules": [
                            {
                                "id": identifier,
                                "name": name,
                                "shortDescription": {"text": description},
                                "defaultConfiguration": {"level": level},
                            }
                            for identifier, name, level, description in _RULES.values()
                        ],
                    }
                },
                "invocations": [
                    {
                        "executionSuccessful": not notes,
                        "exitCode": document["exit_code"],
                        "toolExecutionNotifications": notes,
                    }
                ],
                "results": [
                    *(_result(kind, order.index(kind), r) for kind, r in findings),
                    *(
                        _odd(order.index("odd"), r, one)
                        for r in document["results"]
                        for one in r.get("findings", ())
                    ),
                ],
                "columnKind": "unicodeCodePoints",
            }
        ],
    }


def _said(result: Mapping[str, Any]) -> str:
    """Name and reason; the reason of an error names the file itself."""
    name, reason = str(result["name"]), str(result["reason"])
    return reason if reason.startswith(f"{name}: ") else f"{name}: {reason}"


def _finding(result: Mapping[str, Any]) -> str | None:
    if result["verdict"] in ("backdoored", "suspicious"):
        return str(result["verdict"])
    return "unsafe" if result.get("error_kind") == "unsafe" else None


def _result(kind: str, index: int, result: Mapping[str, Any]) -> dict[str, Any]:
    identifier, _, level, _ = _RULES[kind]
    text = _said(result)
    if result.get("target"):
        text += f"; target class {result['target']}"
    # The same file with the same finding is the same alert tomorrow, wherever it lies then.
    content = result.get("sha256") or result["name"]
    fingerprint = f"{identifier}:{content}:{result.get('target')}".encode("utf-8", "replace")
    properties = {
        key: number(result[key])
        for key in ("p_l1", "threshold", "score", "p_value")
        if result.get(key) is not None
    }
    return {
        "ruleId": identifier,
        "ruleIndex": index,
        "level": level,
        "message": {"text": clean_text(text)},
        "locations": [_location(result["name"])],
        "partialFingerprints": {_FINGERPRINT: hashlib.sha256(fingerprint).hexdigest()},
        "properties": properties,
    }


def _odd(index: int, result: Mapping[str, Any], finding: Mapping[str, str]) -> dict[str, Any]:
    """A finding about a file."""
    identifier, _, level, _ = _RULES["odd"]
    content = result.get("sha256") or result["name"]
    said = f"{identifier}:{content}:{finding['rule']}:{finding['message']}"
    return {
        "ruleId": identifier,
        "ruleIndex": index,
        "level": level,
        "message": {"text": clean_text(f"{result['name']}: {finding['message']}")},
        "locations": [_location(result["name"])],
        "partialFingerprints": {
            _FINGERPRINT: hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()
        },
        "properties": {"rule": finding["rule"]},
    }


def _location(name: str) -> dict[str, Any]:
    return {"physicalLocation": {"artifactLocation": {"uri": _uri(name)}}}


def _uri(name: str) -> str:
    """A valid URI reference, whatever the name holds."""
    try:
        raw = name.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "backslashreplace")
    if name.startswith("/"):
        return "file://" + quote(raw, safe="/")
    return quote(raw, safe="/")
