"""A rank's part in an update and rank 0's conversation with its API server, without an engine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fakes import vllm_config
from pdlink import PdlinkError
from pdlink.vllm.weights import lead as lead_module
from pdlink.vllm.weights import load, rank, settings
from pdlink.vllm.weights.lead import Lead
from vllm.config import VllmConfig

NEVER_S = 20
Answers = Callable[[str, Any], tuple[int, Any]]


class Api:
    """What is called of a worker's API server, and what it answers."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.answer: Answers = lambda path, body: (200, {})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                body = json.loads(text or b"null")
                outer.calls.append(f"{self.path} {body['method']}" if body else self.path)
                status, said = outer.answer(self.path, body)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.server.shutdown()


class Order:
    """Stands in for the native one."""

    def __init__(self, kind: str, in_flight: str | None = None, update: int = 0, version: int = 0):
        self.kind, self.in_flight, self.update, self.version = kind, in_flight, update, version
        self.ended = threading.Event()
        self.error: str | None = None

    def done(self, error: str | None = None) -> None:
        if not self.ended.is_set():
            self.error = error
            self.ended.set()

    streams = False

    def memory(self) -> None:
        return None


RESET = "/reset_prefix_cache?reset_running_requests=true&reset_external=true"


def pause_of(mode: str) -> str:
    return f"/pause?mode={mode}&clear_cache=true"


def until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + NEVER_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize(("in_flight", "mode"), [("continue", "keep"), ("restart", "abort"), ("finish", "wait")])
def test_a_pause_leaves_no_cache_of_the_old_weights(api: Api, in_flight: str, mode: str) -> None:
    order = Order("pause", in_flight)
    lead = Lead(api.url, True)
    lead.carry_out(order)
    assert order.ended.wait(NEVER_S)
    lead.carry_out(Order("resume"))
    assert api.calls == [pause_of(mode), RESET, "/resume"]


def test_while_blocks_are_held_the_engine_goes_on_and_is_paused_again(api: Api) -> None:
    held = iter([(500, {}), (200, {"success": False})])
    api.answer = lambda path, body: next(held, (200, {"success": True})) if path == RESET else (200, {})
    order = Order("pause", "continue")
    Lead(api.url, True).carry_out(order)
    assert order.ended.wait(NEVER_S)
    once = [pause_of("keep"), RESET, "/resume"]
    assert api.calls == [*once, *once, *once[:2]]


def test_a_pause_that_comes_too_late_is_taken_back(api: Api) -> None:
    """WT-1: an update that was given up while the engine finished its answers leaves nobody paused."""
    finished = threading.Event()

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if path == pause_of("wait"):
            finished.wait(NEVER_S)
        return 200, {}

    api.answer = answer
    lead = Lead(api.url, True)
    given_up = Order("pause", "finish")
    lead.carry_out(given_up)
    until(lambda: api.calls == [pause_of("wait")])
    lead.carry_out(Order("resume"))
    assert api.calls[-1] == "/resume"
    again = Order("pause", "continue")
    lead.carry_out(again)
    finished.set()
    assert again.ended.wait(NEVER_S)
    # The late one first, taken back; then the next update's.
    assert api.calls[2:] == [RESET, "/resume", pause_of("keep"), RESET]
    assert not given_up.ended.is_set()


def test_what_holds_a_pause_up_is_given_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lead_module, "LET_GO_S", 0.1)
    given_up = threading.Event()

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if path == pause_of("keep"):
            given_up.wait(NEVER_S)
        elif body is not None and body["method"] == "pdlink_let_go_of_kv":
            given_up.set()
        return 200, {"results": []}

    api.answer = answer
    order = Order("pause", "continue")
    Lead(api.url, True).carry_out(order)
    assert order.ended.wait(NEVER_S)
    calls = len(api.calls)
    assert api.calls[:2] == [pause_of("keep"), "/collective_rpc pdlink_let_go_of_kv"]
    time.sleep(0.3)
    assert len(api.calls) == calls, "nothing is given up once it is paused"


def test_going_on_is_asked_for_until_it_works(api: Api) -> None:
    """WT-1."""
    failing = iter([(500, {}), (503, {})])
    api.answer = lambda path, body: next(failing, (200, {}))
    Lead(api.url, True).carry_out(Order("resume"))
    assert api.calls == ["/resume"] * 3


def commit(lead: Lead, api: Api, results: dict[str, list[Any]]) -> Order:
    order = Order("commit", update=2**63 + 1, version=4)
    said: list[Any] = []

    def answer(path: str, body: Any) -> tuple[int, Any]:
        said.append(body["args"])
        return 200, {"results": [{"rank": at, "error": error} for at, error in enumerate(results[body["method"]])]}

    api.answer = answer
    lead.carry_out(order)
    assert said[0] == [str(2**63 + 1), 4]
    return order


TAKE, SETTLE = "pdlink_take_weights", "pdlink_settle_weights"


def test_a_commit_is_settled_on_all_ranks_or_taken_back_on_all(api: Api) -> None:
    lead = Lead(api.url, True)
    both = [f"/collective_rpc {TAKE}", f"/collective_rpc {SETTLE}"]
    for taken, settled in (([None, None], [None, None]), ([None, "no memory"], [None, None])):
        api.calls.clear()
        order = commit(lead, api, {TAKE: taken, SETTLE: settled})
        assert api.calls == both
        # The ranks themselves say how it ended.
        assert not order.ended.is_set()


@pytest.fixture
def of_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A rank whose loading is recorded; loading `bad` fails."""
    loaded: list[Any] = []

    def fake(worker: Any, order: Any) -> None:
        loaded.append(order.version if order is not None else 0)
        if order is not None and order.version in bad:
            raise ValueError("no such parameter")

    bad: set[int] = set()
    monkeypatch.setattr(rank, "load", fake)
    monkeypatch.setattr(rank, "TOLD_WITHIN_S", 0.3)
    receiver = {
        "version": 0,
        "weights": {},
        "kv": {},
        "bind_host": "127.0.0.1",
        "advertise_host": "127.0.0.1",
        "port": 0,
        "secret_file": None,
        "base": None,
        "ranks": [],
    }
    told = settings.Settings(1, 2, "http://127.0.0.1:1", json.dumps(receiver), False, "info", False)
    made = rank.Rank(told, None)
    yield SimpleNamespace(rank=made, loaded=loaded, bad=bad)
    made.native.close()


class Link:
    version = 0

    def now_of_weights(self, version: int) -> None:
        self.version = version

    def let_go(self) -> None:
        self.version = -1


def test_a_rank_changes_only_when_all_have_loaded(of_rank: Any) -> None:
    """WT-1, KV-5."""
    one, link = of_rank.rank, Link()
    one.join(link)
    first = Order("commit", update=1, version=1)
    one._one(first)
    assert one.take(None, 1, 1) == {"rank": 1, "error": None}
    assert not first.ended.is_set() and link.version == 0
    assert one.settle(None, 1, None) == {"rank": 1, "error": None}
    assert first.ended.is_set() and first.error is None and (one.version, link.version) == (1, 1)
    # Another rank has no memory for the next one.
    second = Order("commit", update=2, version=2)
    one._one(second)
    one.take(None, 2, 2)
    assert one.settle(None, 2, "rank 0: no memory")["error"] is None
    assert second.error == "rank 0: no memory" and (one.version, link.version) == (1, 1)
    assert of_rank.loaded == [1, 2, 1]


def test_a_rank_that_cannot_load_says_so_and_has_the_old_weights_again(of_rank: Any) -> None:
    of_rank.bad.add(3)
    order = Order("commit", update=3, version=3)
    of_rank.rank._one(order)
    assert "no such parameter" in of_rank.rank.take(None, 3, 3)["error"]
    assert of_rank.rank.settle(None, 3, "rank 1: no such parameter")["error"] is None
    assert order.error == "rank 1: no such parameter" and of_rank.loaded == [3, 0]


def test_a_rank_that_does_not_get_its_weights_back_never_says_that_it_serves(of_rank: Any) -> None:
    order = Order("commit", update=1, version=1)
    of_rank.rank._one(order)
    of_rank.rank.take(None, 1, 1)
    of_rank.rank.settle(None, 1, None)
    of_rank.bad |= {1, 2}
    broken = Order("commit", update=2, version=2)
    of_rank.rank._one(broken)
    of_rank.rank.take(None, 2, 2)
    assert "no such parameter" in of_rank.rank.settle(None, 2, "rank 1")["error"]
    assert not broken.ended.is_set()


def test_a_rank_that_is_told_too_late_gives_up_too(of_rank: Any) -> None:
    """WT-4: a word from the coordinator that is missing is an error, not a wait."""
    assert "was not told to commit" in of_rank.rank.take(None, 7, 1)["error"]
    assert of_rank.rank.settle(None, 7, "rank 1: was not told")["error"] is None
    assert of_rank.loaded == []
    late = Order("commit", update=7, version=1)
    of_rank.rank._one(late)
    assert late.error is not None


def test_a_rank_answers_at_a_door_of_its_own(of_rank: Any) -> None:
    assert of_rank.rank.native.port > 0
    with pytest.raises(PdlinkError, match="name a free port for each rank"):
        taken = {**json.loads(of_rank.rank.settings.receiver), "port": of_rank.rank.native.port}
        rank._native.WeightReceiver(json.dumps(taken))


def parallel(device: str = "cpu", **sizes: int) -> SimpleNamespace:
    known = {"pipeline_parallel_size": 1, "data_parallel_size": 1, "tensor_parallel_size": 1, **sizes}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**known, data_parallel_index=0),
        kv_transfer_config=None,
        model_config=SimpleNamespace(model="name/on-a-hub"),
        device_config=SimpleNamespace(device_type=device),
    )


def test_a_worker_is_told_where_it_is_by_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"http": "http://127.0.0.1:8100/", "ports": [7001, 7002], "weights": {"keep": False}}
    monkeypatch.setenv("PDLINK_WEIGHTS", json.dumps(told))
    given = settings.read(parallel(tensor_parallel_size=2), 1)
    assert given is not None and given.http == "http://127.0.0.1:8100" and not given.has_connector
    receiver = json.loads(given.receiver)
    assert receiver["ranks"] == ["127.0.0.1:7001", "127.0.0.1:7002"] and receiver["port"] == 7002
    assert receiver["weights"] == {"keep": False} and receiver["base"] is None and receiver["kv"] == {}
    assert receiver["gpu"] is None
    on_gpu = settings.read(parallel("cuda", tensor_parallel_size=2), 1, 5)
    assert on_gpu is not None and json.loads(on_gpu.receiver)["gpu"] == 5, "the rank's number on its host"
    monkeypatch.setenv("PDLINK_WEIGHTS", json.dumps({**told, "gpus": [3, 4]}))
    named = settings.read(parallel("cuda", tensor_parallel_size=2), 1, 5)
    assert named is not None and json.loads(named.receiver)["gpu"] == 4
    with pytest.raises(PdlinkError, match="lists 2 ports, and each of 3 ranks"):
        settings.read(parallel(tensor_parallel_size=3), 0)
    assert settings.read(parallel(pipeline_parallel_size=2), 0) is None
    assert settings.read(parallel(data_parallel_size=2), 0) is None
    for text, why in (("{", "holds no JSON"), ("[1]", "does not know"), ('{"prots": []}', "does not know: prots")):
        monkeypatch.setenv("PDLINK_WEIGHTS", text)
        with pytest.raises(PdlinkError, match=why):
            settings.read(parallel(), 0)


def with_link(**extra: Any) -> SimpleNamespace:
    linked = vllm_config("kv_consumer", **extra)
    linked.kv_transfer_config.kv_connector_module_path = "pdlink.vllm"
    linked.device_config = SimpleNamespace(device_type="cpu")
    return linked


def test_paths_of_weights_are_told_what_kv_says_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PDLINK_WEIGHTS", raising=False)
    linked = with_link(kv={"transfer_timeout_ms": 5000, "nccl": {"multiprocessors": 3}})

    def told() -> dict[str, Any]:
        given = settings.read(linked, 0)
        assert given is not None
        return json.loads(given.receiver)["kv"]

    assert told() == {"transfer_timeout_ms": 5000, "nccl": {"multiprocessors": 3}}
    monkeypatch.setenv("PDLINK_WEIGHTS", json.dumps({"kv": {"nccl": {"multiprocessors": 9}}}))
    assert told() == {"transfer_timeout_ms": 5000, "nccl": {"multiprocessors": 9}}
    bad = {**json.loads(settings.read(linked, 0).receiver), "port": 0, "kv": {"ncll": {}}}
    with pytest.raises(PdlinkError, match="unknown field `ncll`"):
        rank._native.WeightReceiver(json.dumps(bad))


@pytest.mark.parametrize(
    ("own", "links", "is_json"), [("text", "json", False), ("json", "text", True), (None, "json", True), (None, None, False)]
)
def test_the_variables_own_format_of_the_log_wins(
    monkeypatch: pytest.MonkeyPatch, own: str | None, links: str | None, is_json: bool
) -> None:
    linked = with_link(log_format=links)
    monkeypatch.setenv("PDLINK_WEIGHTS", json.dumps({"log_format": own}))
    given = settings.read(linked, 0)
    assert given is not None and given.log_json is is_json


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2, 2))

    def load_weights(self, weights: Any) -> set[str]:
        given = dict(weights)
        with torch.no_grad():
            for name, tensor in given.items():
                self.get_parameter(name).copy_(tensor)
        return set(given)


class Worker:
    """As much of vLLM's worker as loading looks at."""

    def __init__(self) -> None:
        self.model = Model()
        self.from_disk = 0
        config = SimpleNamespace(quantization=None)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model, model_config=config)
        self.device, self.vllm_config = torch.device("cpu"), VllmConfig()

    def reload_weights(self, weights_iterator: Any = None, is_checkpoint_format: bool = True) -> None:
        assert is_checkpoint_format
        if weights_iterator is None:
            self.from_disk += 1
        else:
            self.model.load_weights(weights_iterator)


class Staged(Order):
    """Tensors in memory of this process, each on a boundary of 256 bytes."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__("commit")
        self.bytes = torch.zeros(256 * len(tensors) + 256, dtype=torch.uint8)
        self.told = []
        for number, (name, tensor) in enumerate(tensors.items()):
            raw = tensor.contiguous().view(torch.uint8).flatten()
            self.bytes[256 * number : 256 * number + len(raw)] = raw
            place = (0, 256 * number, 256 * number + len(raw))
            self.told.append((name, {torch.float32: "F32", torch.int64: "I64"}[tensor.dtype], list(tensor.shape), *place))

    def memory(self) -> Any:
        return SimpleNamespace(address=self.bytes.data_ptr(), bytes=len(self.bytes), gpu=None, held=self.bytes)

    def tensors(self) -> Any:
        return self.told


def test_tensors_are_views_of_what_was_staged() -> None:
    tensors = {"one": torch.tensor([1.0, 2.0, 3.0]), "two": torch.arange(4.0).view(2, 2), "empty": torch.zeros(0, 4)}
    staged = Staged(tensors)
    (lying,) = load.coming(Worker(), staged)
    seen = dict(load.views(lying))
    assert all(torch.equal(seen[name], tensor) for name, tensor in tensors.items())
    assert seen["two"].data_ptr() == staged.bytes.data_ptr() + 256


def test_weights_that_leave_a_parameter_out_are_refused() -> None:
    worker = Worker()
    load.load(worker, Staged({"one": torch.ones(3), "two": torch.ones(2, 2)}))
    assert worker.model.two.sum() == 4
    with pytest.raises(ValueError, match="nothing for 1 of the model's parameters, such as two"):
        load.load(worker, Staged({"one": torch.ones(3)}))
    assert "load_weights" not in vars(worker.model)
    load.load(worker, None)
    assert worker.from_disk == 1
