"""The SARIF log, against the official schema, and the parts of it that pydetox uses and no more."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from pydetox.reporting.run import run_document
from pydetox.reporting.sarif import to_sarif
from tests.reporting.sarif_schema import validate_sarif

jsonschema = pytest.importorskip("jsonschema")

LEVEL = {"enum": ["none", "note", "warning", "error"]}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": required,
        "properties": properties,
        "additionalProperties": False,
    }


def many(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


MESSAGE = closed(["text"], text={"type": "string"})
LOCATION = closed(
    [],
    physicalLocation=closed(
        [],
        artifactLocation=closed([], uri={"type": "string", "pattern": r"^[!-~]*$"}),
    ),
)
SCHEMA = closed(
    ["version", "runs"],
    **{"$schema": {"type": "string", "format": "uri"}},
    version={"const": "2.1.0"},
    runs=many(
        closed(
            ["tool"],
            tool=closed(
                ["driver"],
                driver=closed(
                    ["name"],
                    name={"type": "string"},
                    version={"type": "string"},
                    rules=many(
                        closed(
                            ["id"],
                            id={"type": "string"},
                            name={"type": "string"},
                            shortDescription=MESSAGE,
                            defaultConfiguration=closed([], level=LEVEL),
                        )
                    ),
                ),
            ),
            invocations=many(
                closed(
                    ["executionSuccessful"],
                    executionSuccessful={"type": "boolean"},
                    exitCode={"type": "integer"},
                    toolExecutionNotifications=many(
                        closed(["message"], level=LEVEL, message=MESSAGE, locations=many(LOCATION))
                    ),
                )
            ),
            results=many(
                closed(
                    ["message"],
                    ruleId={"type": "string"},
                    ruleIndex={"type": "integer", "minimum": -1},
                    level=LEVEL,
                    message=MESSAGE,
                    locations=many(LOCATION),
                    partialFingerprints={
                        "type": "object",
                        "additionalProperties": {"type": "string"},
                    },
                    properties={"type": "object"},
                )
            ),
            columnKind={"enum": ["utf16CodeUnits", "unicodeCodePoints"]},
        )
    ),
)


def result(name: str, verdict: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "verdict": verdict, "reason": "because", "sha256": "00", **more}


def log(*results: dict[str, Any], not_reached: tuple[str, ...] = ()) -> dict[str, Any]:
    document = run_document(
        results,
        exit_code=2,
        seed=0,
        images="x",
        calibration=None,
        not_reached=not_reached,
    )
    found = to_sarif(document, version="0.1.0")
    jsonschema.validate(found, SCHEMA)
    validate_sarif(found)
    json.dumps(found, allow_nan=False).encode()
    return found["runs"][0]


def test_findings_are_results_and_all_else_is_not() -> None:
    run = log(
        result("a.pt", "backdoored", target="cat", p_l1=0.01, score=9.0),
        result("b.pt", "suspicious"),
        result("c.pt", "error", error_kind="unsafe"),
        result("d.pt", "error", error_kind="checkpoint"),
        result("e.pt", "inconclusive"),
        result("f.pt", "skipped"),
        result("g.pt", "clean"),
        not_reached=("h.pt",),
    )
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    assert [(r["ruleId"], r["level"]) for r in run["results"]] == [
        ("PYDETOX001", "error"),
        ("PYDETOX002", "warning"),
        ("PYDETOX003", "error"),
    ]
    assert [rules[r["ruleIndex"]] for r in run["results"]] == [r["ruleId"] for r in run["results"]]
    assert "target class cat" in run["results"][0]["message"]["text"]
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"]
    notes = [n["message"]["text"][:4] for n in invocation["toolExecutionNotifications"]]
    assert notes == ["c.pt", "d.pt", "e.pt", "f.pt", "h.pt"]


def test_all_clean_is_a_success_without_results() -> None:
    run = log(result("g.pt", "clean"))
    assert run["results"] == []
    assert run["invocations"][0]["executionSuccessful"]


def test_fingerprints_follow_the_content_not_the_place() -> None:
    def fingerprint(**changes: Any) -> dict[str, str]:
        one = copy.deepcopy(result("a.pt", "backdoored", target="cat")) | changes
        (found,) = log(one)["results"]
        return found["partialFingerprints"]

    assert fingerprint() == fingerprint(name="moved/a.pt", reason="other numbers")
    assert fingerprint() != fingerprint(sha256="01")
    assert fingerprint() != fingerprint(target="dog")
    assert fingerprint() != fingerprint(verdict="suspicious")


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("/a b/ü.pt", "file:///a%20b/%C3%BC.pt"),
        ("a\x1b[31m\n%.pt", "a%1B%5B31m%0A%25.pt"),
        ("lone\udcff.pt", "lone%FF.pt"),
        ("hf-hub:org/repo@main", "hf-hub%3Aorg/repo%40main"),
    ],
)
def test_names_from_outside_are_valid_uris_and_harmless_text(name: str, uri: str) -> None:
    (found,) = log(result(name, "backdoored"))["results"]
    assert found["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri
    assert found["message"]["text"].isprintable()


def test_the_schema_here_refuses_what_the_standard_refuses() -> None:
    good = to_sarif(
        run_document([], exit_code=0, seed=0, images="x", calibration=None), version="1"
    )
    for path, value in {("version",): "2.0.0", ("runs", 0, "columnKind"): "bytes"}.items():
        bad: Any = copy.deepcopy(good)
        place = bad
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, SCHEMA)
        with pytest.raises(jsonschema.ValidationError):
            validate_sarif(bad)


def test_every_finding_of_a_file_is_a_result_of_its_own() -> None:
    findings = [
        {"rule": "unknown-global", "message": "its pickle asks for 'a.b'"},
        {"rule": "duplicate-key", "message": "tensor 'w': is there twice"},
    ]
    run = log(
        result("a.pt", "clean", findings=findings),
        result("b.pt", "error", error_kind="checkpoint", findings=findings[:1]),
    )
    assert [r["ruleId"] for r in run["results"]] == ["PYDETOX004"] * 3
    assert {r["level"] for r in run["results"]} == {"warning"}
    texts = [r["message"]["text"] for r in run["results"]]
    assert texts[0] == "a.pt: its pickle asks for 'a.b'"
    assert [r["properties"]["rule"] for r in run["results"][:2]] == [f["rule"] for f in findings]
    assert len({json.dumps(r["partialFingerprints"]) for r in run["results"][:2]}) == 2
