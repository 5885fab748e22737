"""What `serve` says of itself: the OpenAPI document of its paths, and one page for a person to try it. Constants only."""

from __future__ import annotations

from typing import Any

from edge_runtime.version import software

PATHS = ("/", "/health", "/metrics", "/openapi.json", "/predict", "/predict/batch")
PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>edge-runtime</title>
<style>body{font:1rem/1.5 sans-serif;max-width:40rem;margin:2rem auto;padding:0 1rem}textarea{width:100%;font:inherit}
td{padding:.1rem 1rem .1rem 0}</style>
<h1>edge-runtime</h1>
<form><label>A text<textarea name="text" rows="4"></textarea></label><button>Classify</button></form>
<p id="said" role="status"></p><table id="all"></table>
<p><a href="health">health</a> &middot; <a href="metrics">metrics</a> &middot; <a href="openapi.json">openapi.json</a></p>
<script>
const said = document.getElementById("said"), all = document.getElementById("all");
document.querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  all.replaceChildren();
  try {
    const body = JSON.stringify({text: event.target.text.value});
    const answer = await fetch("predict", {method: "POST", headers: {"content-type": "application/json"}, body});
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    said.textContent = found.label + (found.model_version ? " (model " + found.model_version + ")" : "");
    const sorted = Object.entries(found.probabilities).sort((a, b) => b[1] - a[1]).slice(0, 10);
    for (const [label, share] of sorted) {
      const row = all.insertRow();
      row.insertCell().textContent = label;
      row.insertCell().textContent = (100 * share).toFixed(1) + " %";
    }
  } catch (error) { said.textContent = error.message; }
});
</script></html>
"""


def openapi(max_texts: int) -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    text = {"type": "string"}
    number = {"type": "integer"}
    version = {"type": ["integer", "null"], "description": "of the fleet's model; null for a model of no fleet"}
    share = {"type": "number", "minimum": 0, "maximum": 1}
    schemas = {
        "Text": _object({"text": text}),
        "Texts": _object({"texts": {"type": "array", "items": text, "maxItems": max_texts}}),
        "Prediction": _object(
            {
                "label": text,
                "probability": share,
                "probabilities": {"type": "object", "additionalProperties": share},
                "model_version": version,
                "truncated": {"type": "boolean", "description": "the text has more tokens than were read"},
            }
        ),
        "Predictions": _object({"predictions": {"type": "array", "items": _schema("Prediction")}}),
        "Health": _object(
            {
                "status": {"enum": ["ok", "degraded"], "description": "degraded: a version on the device was refused"},
                "model_version": version,
                "pinned": {"type": "boolean"},
                "labels": {"type": "array", "items": text},
                "max_length": number,
                "loaded_at": {"type": "number", "description": "Unix seconds"},
                "swaps": number,
                "refused": {"type": "array", "items": _object({"model_version": number, "reason": text})},
            }
        ),
        "Error": _object({"error": _object({"status": number, "message": text})}),
    }
    paths = {
        "/predict": {"post": _operation("Classify one text.", "Prediction", "Text")},
        "/predict/batch": {"post": _operation("Classify texts, all by one version.", "Predictions", "Texts")},
        "/health": {"get": _operation("Which version answers, and what was refused.", "Health")},
        "/metrics": {"get": _plain("Counters for Prometheus.", "text/plain")},
        "/openapi.json": {"get": _plain("This document.", "application/json")},
        "/": {"get": _plain("A page to try it.", "text/html")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "edge-runtime", "version": software()},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _schema(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _json(description: str, name: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": _schema(name)}}}


def _operation(summary: str, answer: str, body: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {"200": _json("done", answer), "default": _json("refused, and why", "Error")},
    }
    if body:
        found["requestBody"] = {"required": True, "content": {"application/json": {"schema": _schema(body)}}}
    return found


def _plain(summary: str, kind: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "done", "content": {kind: {}}}}}
