"""What `publish` raises."""

from __future__ import annotations

from .._native import PdlinkError


class PublishError(PdlinkError):
    """The weights were not taken; the message names the phase and the worker, or the rank of the trainer. The old version serves on."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnknownOutcomeError(PublishError):
    """The proxy had the order, and its answer did not come: the update may have been made, may still be made, or come to nothing.

    `GET /admin/weights` of the proxy says which: `under_way` while it goes on; then `version` is this one's and `source` names `peer`
    if it serves, and if not, `last_failure` says why.
    """

    def __init__(self, status: int, message: str, version: int, peer: str) -> None:
        super().__init__(status, message)
        self.version = version
        self.peer = peer
