"""The class that vLLM adds to its workers' bases; its methods are what `/collective_rpc` calls on every rank."""

from __future__ import annotations

from typing import Any

from . import rank, settings


class WeightsExtension:
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """The one moment that every version has in which a worker is made: none of vLLM's classes has a `__new__`."""
        worker = super().__new__(cls)
        rank_number = int(kwargs.get("rank", 0))
        told = settings.read(kwargs["vllm_config"], rank_number, int(kwargs.get("local_rank", rank_number)))
        if told is not None:
            rank.open(told)
        return worker

    def pdlink_take_weights(self, update: str, version: int) -> dict[str, Any]:
        """Loads what this rank has staged for the update. What is wrong is in `error`: an exception would end the engine."""
        return rank.of_process().take(self, int(update), version)

    def pdlink_let_go_of_kv(self) -> dict[str, Any]:
        """What is still on its way between prefill and decode holds the engine up, and is given up."""
        return rank.of_process().let_go_of_kv()

    def pdlink_settle_weights(self, update: str, failure: str | None) -> dict[str, Any]:
        """All ranks have loaded; or one has not, and the weights from before are loaded again."""
        return rank.of_process().settle(self, int(update), failure)
