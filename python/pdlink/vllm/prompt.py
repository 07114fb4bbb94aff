"""The fingerprint of a prompt: KV computed for one prompt must never be decoded under another."""

from __future__ import annotations

import hashlib
from array import array
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.request import Request

_SEPARATOR = "#"


def fingerprint(request: Request) -> str:
    """16 hex digits over all that KV depends on besides the model: token ids, media, adapter."""
    digest = hashlib.sha256(array("q", request.prompt_token_ids or []).tobytes())
    for feature in getattr(request, "mm_features", None) or ():
        digest.update(f"media {feature.identifier} at {feature.mm_position.offset}".encode())
    adapter = getattr(request, "lora_request", None)
    if adapter is not None:
        digest.update(f"adapter {adapter.lora_name}".encode())
    return digest.hexdigest()[:16]


def number(request: Request) -> int:
    """The fingerprint as the runtime has it."""
    return int(fingerprint(request), 16)


def label(request: Request) -> str:
    """The request's name in the sealed parameters: for people who read logs, and for `differs`."""
    return f"{request.request_id}{_SEPARATOR}{fingerprint(request)}"


def differs(label: str, request: Request) -> bool:
    """Whether the KV under `label` was computed for another prompt than the request's."""
    return label.rpartition(_SEPARATOR)[2] != fingerprint(request)
