"""A trainer's tensors into a fleet: the reference engine needs no model, so that every answer shows which weights made it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import sharded
import torch
from fleet import BIN, ROOT, write_secret
from safetensors.torch import save_file

import pdlink
from pdlink.trainer import PublishError, UnknownOutcomeError, WeightPublisher

CONFIG = """
[inference]
engine = "reference"
[pd_disagg]
enabled = true
prefill_gpu_ids = [0]
decode_gpu_ids = [1]
[weights]
bucket_bytes = 65536
"""


class Fleet:
    """`pdlink up` with two workers."""

    def __init__(self, folder: Path) -> None:
        self.secret = write_secret(folder)
        config = folder / "fleet.toml"
        config.write_text(CONFIG)
        self.program = os.environ.get("PDLINK_BIN", str(BIN / "pdlink"))
        command = [self.program, "up", "@", str(config), "--json", "--security.secret_file", str(self.secret)]
        command += ["--launcher.log_dir", str(folder / "logs")]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = next(line for line in self.process.stdout if '"event":"ready"' in line)
        self.url: str = json.loads(ready)["base_url"]

    def answer(self) -> tuple[int, str]:
        body = {"model": "pdlink-reference", "prompt": "What follows is", "max_tokens": 24, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            version = int(answer.headers["x-pdlink-weight-version"])
            return version, json.load(answer)["choices"][0]["text"]

    def push(self, checkpoint: Path) -> dict[str, object]:
        command = [self.program, "weights", "push", "--json", "--to", self.url, "--checkpoint", str(checkpoint)]
        command += ["--secret-file", str(self.secret)]
        done: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        return done

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path_factory.mktemp("publisher"))
    yield fleet
    fleet.close()


@pytest.fixture
def publisher(fleet: Fleet) -> WeightPublisher:
    kv = {"transfer_timeout_ms": 60_000, "nccl": {"multiprocessors": 8}}
    return WeightPublisher(fleet.url, secret_file=fleet.secret, weights={"bucket_bytes": 65536}, kv=kv)


def module(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(200, 300), torch.nn.LayerNorm(300), torch.nn.Linear(300, 7))
    return layers.to(torch.bfloat16)


def test_a_module_is_published_and_is_what_its_checkpoint_is(
    fleet: Fleet, publisher: WeightPublisher, tmp_path: Path
) -> None:
    before = fleet.answer()
    model = module(1)
    published = publisher.publish(model)
    assert (published.version, published.behind) == (publisher.version(), ())
    after = fleet.answer()
    assert after[0] == published.version and after[1] != before[1]
    # WT-5: the same tensors by another way have the same digest, and answer alike.
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "m.safetensors")
    pushed = fleet.push(tmp_path)
    assert pushed["digest"] == published.digest
    assert fleet.answer() == (published.version + 1, after[1])


def test_tensors_of_every_kind_go_and_views_are_copied(fleet: Fleet, publisher: WeightPublisher) -> None:
    wide = torch.arange(600, dtype=torch.float32).reshape(20, 30)
    tensors = {
        "transposed": wide.T,
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 4),
        "small": torch.ones(3, dtype=torch.uint8),
        "float8": torch.zeros(5).to(torch.float8_e4m3fn),
    }
    first = publisher.publish(tensors)
    # An iterator in another order, with the view made contiguous, is the same set of weights.
    second = publisher.publish((name, tensors[name].contiguous()) for name in sorted(tensors, reverse=True))
    assert second.digest == first.digest
    assert second.version == first.version + 1
    changed = {**tensors, "transposed": wide.T + 1}
    assert publisher.publish(changed).digest != first.digest


def test_what_is_refused_is_an_error_with_its_reason_and_the_old_version_serves(
    fleet: Fleet, publisher: WeightPublisher
) -> None:
    publisher.publish(module(2))
    before = fleet.answer()
    with pytest.raises(PublishError, match="is not newer than version") as refused:
        publisher.publish(module(3), version=before[0])
    assert refused.value.status == 409
    with pytest.raises(TypeError, match="`odd` is of torch.complex64"):
        publisher.publish({"odd": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(pdlink.PdlinkError, match="there are no tensors"):
        publisher.publish({})
    with pytest.raises(pdlink.PdlinkError, match="unknown field `ncll`"):
        WeightPublisher(fleet.url, secret_file=fleet.secret, kv={"ncll": {}}).publish(module(3))
    stranger = WeightPublisher(fleet.url)
    with pytest.raises(PublishError, match="while staging, on worker http://.*secret"):
        stranger.publish(module(3))
    assert fleet.answer() == before


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sharded.Trainer]:
    trainer = sharded.Trainer(tmp_path_factory.mktemp("trainer"))
    yield trainer
    trainer.close()


def test_sharded_tensors_are_gathered_as_they_are_sent_and_are_what_whole_ones_are(
    fleet: Fleet, publisher: WeightPublisher, trainer: sharded.Trainer
) -> None:
    (first, held), (second, _) = trainer.run(sharded.publishes, fleet.url, fleet.secret, 10)
    assert first == second and first["version"] == publisher.version()
    answered = fleet.answer()
    plain = publisher.publish(sharded.values(10))
    assert (plain.digest, plain.bytes) == (first["digest"], first["bytes"])
    assert fleet.answer() == (plain.version, answered[1])
    # Rank 0 holds what overlaps the bucket that is packed, and what begins in the next.
    most = sharded.most_held(sharded.values(10))
    assert held["peak"] <= most < held["all"] / 2, (held, most)


def test_a_module_that_is_fully_sharded_is_cast_on_its_way(
    fleet: Fleet, publisher: WeightPublisher, trainer: sharded.Trainer
) -> None:
    torch.manual_seed(11)
    model = torch.nn.Sequential(torch.nn.Linear(200, 301), torch.nn.LayerNorm(301), torch.nn.Linear(301, 7))
    first, second = trainer.run(sharded.publishes_a_module, fleet.url, fleet.secret, model.state_dict())
    assert first == second
    answered = fleet.answer()
    plain = publisher.publish(model.to(torch.bfloat16))
    assert plain.digest == first["digest"]
    assert fleet.answer() == (plain.version, answered[1])


def test_one_process_casts_as_it_sends(fleet: Fleet, publisher: WeightPublisher) -> None:
    made = sharded.values(12)
    cast = {name: tensor.to(torch.float16) if tensor.is_floating_point() else tensor for name, tensor in made.items()}
    with sharded.tally() as held:
        published = sharded.publisher(fleet.url, fleet.secret, dtype=torch.float16).publish(made)
    assert published.digest == publisher.publish(cast).digest
    most = sharded.most_held(cast)
    assert held["peak"] <= most < held["all"] / 2, (held, most)
    with pytest.raises(ValueError, match="cannot be sent as torch.int8"):
        WeightPublisher(fleet.url, dtype=torch.int8)


@pytest.mark.parametrize(("bad", "nth"), [(0, 1), (1, 1), (0, 20), (1, 20), (1, 36)])
def test_a_rank_that_fails_between_gathers_is_named_on_all_and_the_old_version_serves(
    fleet: Fleet, trainer: sharded.Trainer, bad: int, nth: int
) -> None:
    before = fleet.answer()
    first, second = trainer.run(sharded.publishes_and_fails, fleet.url, fleet.secret, 13, bad, nth)
    assert first == second and first.kind == "PublishError"
    assert first.message == f"rank {bad} of 2 of the trainer failed: RuntimeError: no memory for the cast"
    assert fleet.answer() == before
    # Nothing is under way any more, and the ranks understand each other.
    (done, _), _ = trainer.run(sharded.publishes, fleet.url, fleet.secret, 13)
    assert done["version"] == before[0] + 1


def test_an_update_that_is_refused_or_fails_is_raised_on_every_rank(fleet: Fleet, trainer: sharded.Trainer) -> None:
    before = fleet.answer()
    refused = trainer.run(sharded.publishes, fleet.url, fleet.secret, 14, before[0])
    assert refused[0] == refused[1] and refused[0].status == 409
    assert "is not newer than version" in refused[0].message
    # The workers have another secret: nothing is packed, and rank 0 waits to give the third bucket.
    failed = trainer.run(sharded.publishes, fleet.url, None, 14)
    assert failed[0] == failed[1] and failed[0].kind == "PublishError"
    assert "while staging, on worker http://" in failed[0].message
    assert fleet.answer() == before


def test_ranks_with_different_tensors_are_told_of_the_first_difference(fleet: Fleet, trainer: sharded.Trainer) -> None:
    before = fleet.answer()
    other = {"b.odd.rows": torch.zeros(7, 301)}
    more = {"zz.plain": torch.zeros(2)}
    for changes, said in [
        (other, r"rank 1 of 2 has `b.odd.rows` F32 [7, 301] (Shard(dim=0),) on a mesh of (2,) where rank 0 has `b.odd.rows` F32 [7, 300]"),
        (more, "rank 1 of 2 has `zz.plain` F32 [2] whole where rank 0 has nothing more"),
    ]:
        first, second = trainer.run(sharded.publishes_what_differs, fleet.url, fleet.secret, changes)
        assert first == second and first.kind == "PublishError"
        assert said in first.message
    for raised in trainer.run(sharded.publishes_an_fsdp1_state, fleet.url, fleet.secret):
        assert raised.kind == "TypeError" and "`layer.weight` is a ShardedTensor" in raised.message
    assert fleet.answer() == before


def test_a_group_publishes_together_what_is_whole_on_every_rank(
    fleet: Fleet, publisher: WeightPublisher, trainer: sharded.Trainer
) -> None:
    first, second = trainer.run(sharded.publishes_in_a_group, fleet.url, fleet.secret, sharded.values(15), None)
    assert first == second and first["digest"] == publisher.publish(sharded.values(15)).digest
    raised = trainer.run(sharded.publishes_in_a_group, fleet.url, fleet.secret, sharded.values(15), 1)
    assert raised[0] == raised[1]
    assert raised[0].message == "rank 1 of 2 of the trainer failed: OSError: the file of the adapter is gone"


def test_what_is_gathered_on_a_gpu_is_packed_there(fleet: Fleet, publisher: WeightPublisher, tmp_path: Path) -> None:
    library = tmp_path / "libcuda.so.1"
    source = ROOT / "tests" / "support" / "fake_cuda.c"
    command = ["cc", "-shared", "-fPIC", "-O2", "-pthread", "-Wl,-soname,libcuda.so.1", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    trainer = sharded.Trainer(tmp_path)
    try:
        (first, held), (second, _) = trainer.run(sharded.publishes_from_a_stand_in, fleet.url, fleet.secret, 17, library)
    finally:
        trainer.close()
    assert first == second and first["digest"] == publisher.publish(sharded.values(17)).digest
    assert held["peak"] <= sharded.most_held(sharded.values(17)) < held["all"] / 2


def test_a_rank_that_dies_ends_the_update_and_the_old_version_serves(
    fleet: Fleet, publisher: WeightPublisher, tmp_path: Path
) -> None:
    before = fleet.answer()
    trainer = sharded.Trainer(tmp_path)
    try:
        trainer.tell(sharded.publishes_and_dies, fleet.url, fleet.secret, 16, 20)
        raised = trainer.hear(0)
        assert raised.kind == "PublishError" and "rank 0 of 2 of the trainer cannot speak with the others" in raised.message
        assert fleet.answer() == before
        assert publisher.publish(sharded.values(16)).version == before[0] + 1
    finally:
        trainer.close()


class Proxy:
    """Says what the fleet serves, and does with the order what `end` does: it has the connection, after all of the order has come."""

    def __init__(self, end: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.orders: list[dict[str, object]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self, 200, {"version": 6, "update_max_s": 60.0})

            def do_POST(self) -> None:
                outer.orders.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                end(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def answer(handler: BaseHTTPRequestHandler, status: int, said: object) -> None:
    text = json.dumps(said).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(text)))
    handler.end_headers()
    handler.wfile.write(text)


def ends(handler: BaseHTTPRequestHandler) -> None:
    answer(handler, 503, {"error": {"message": "the proxy is ending"}})


def breaks_off(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def breaks_off_in_the_middle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"status"')


def says_nothing(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read()


@pytest.mark.parametrize("end", [ends, breaks_off, breaks_off_in_the_middle, says_nothing])
def test_an_order_without_an_answer_says_that_it_may_serve_and_where_to_ask(
    end: Callable[[BaseHTTPRequestHandler], None],
) -> None:
    proxy = Proxy(end)
    try:
        patience_s = 0.5 if end is says_nothing else None
        with pytest.raises(UnknownOutcomeError, match="version 7: .*it may serve.*/admin/weights") as unknown:
            WeightPublisher(proxy.url, timeout_s=patience_s).publish({"one": torch.ones(3)})
        assert proxy.orders == [{"peer": unknown.value.peer, "version": 7}] and unknown.value.version == 7
    finally:
        proxy.server.shutdown()


def test_what_never_reached_the_proxy_or_was_refused_has_changed_nothing() -> None:
    proxy = Proxy(lambda handler: answer(handler, 502, {"error": {"message": "the update failed while staging"}}))
    publisher = WeightPublisher(proxy.url)
    with pytest.raises(PublishError, match="failed while staging") as refused:
        publisher.publish({"one": torch.ones(3)})
    proxy.server.shutdown()
    proxy.server.server_close()
    with pytest.raises(PublishError, match="cannot ask http") as unreached:
        publisher.publish({"one": torch.ones(3)})
    for raised in (refused, unreached):
        assert not isinstance(raised.value, UnknownOutcomeError)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://", ""])
def test_what_is_no_address_of_a_proxy_is_refused_at_once(url: str) -> None:
    with pytest.raises(ValueError, match="is no address of a proxy"):
        WeightPublisher(url)
