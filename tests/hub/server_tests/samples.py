"""What the tests of the Hub server publish, and how they ask without the client."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub.errors import HfHubHTTPError

from tests.hub.server import HubServer

WEIGHTS = bytes(range(256)) * 10
CARD = """---
license: apache-2.0
tags: [image-filtering]
datasets: cifar10
pipeline_tag: image-classification
model-index:
- name: tiny
  results:
  - task: {type: image-classification}
    dataset: {type: cifar10, name: CIFAR-10}
    metrics: [{type: accuracy, value: 0.5}]
---
# Tiny
"""
ID = "ann/vit"


def outcome(function: Callable[[], Any]) -> int:
    """The status of the client's error; 200 where there is none."""
    try:
        function()
    except HfHubHTTPError as error:
        return error.response.status_code
    return 200


def raw(
    hub: HubServer, method: str, path: str, body: Any = None, token: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """A request without the client; a path may be a whole address."""
    address = urlsplit(path if path.startswith("http") else hub.url + path)
    connection = http.client.HTTPConnection(address.netloc, timeout=20)
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    content = json.dumps(body).encode() if isinstance(body, dict) else body
    try:
        connection.request(method, f"{address.path}?{address.query}".rstrip("?"), content, headers)
        reply = connection.getresponse()
        return reply.status, {key.lower(): value for key, value in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def lines(*operations: tuple[str, dict[str, Any]]) -> bytes:
    """The body of a commit."""
    header = {"key": "header", "value": {"summary": "raw", "description": ""}}
    return b"\n".join(json.dumps(line).encode() for line in [header, *({"key": k, "value": v} for k, v in operations)])
