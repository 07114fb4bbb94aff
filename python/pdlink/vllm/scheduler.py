"""The scheduler's side: which request is handed over, which is loaded, and what each worker is told about it.

There is no runtime in this process. A request meets one of two lives here:

- *prefill*: it is announced as soon as vLLM knows of it, where decode may claim it meanwhile (concurrent dispatch), and what
  each step computes of it is told; its blocks are held when the step that completes its prompt has been made, before the answer with the
  parameters can reach anybody, so that decode never comes too early;
- *decode*: it is announced to the workers as soon as vLLM knows of it, which keeps prefill's lease alive while it waits for
  blocks; then claimed as an asynchronous load. Parameters that are no good in any way are claimed too, and fail as a load:
  vLLM's own `kv_load_failure_policy` then answers an error or computes the prompt here, and no token comes of foreign KV.

Nothing is keyed on vLLM's request ids beyond this engine: the transfer id travels in the parameters.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.logger import init_logger

from .. import _native
from . import prompt
from .config import LinkConfig
from .geometry import transfer_group_ids
from .metrics import PdlinkStats
from .protocol import Begin, Blocks, Card, Early, Fetch, Hold, StepMeta, WorkerMeta
from .tally import Tally

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = init_logger("vllm.pdlink.scheduler")

# Any other end means that there is no prompt to hand over, or nobody who wants it.
HANDED_OVER = {"FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"}

# The block that stands for no block in every table of vLLM's.
NULL_BLOCK = 0


@dataclass
class _Load:
    """Decode: one request whose KV is to come from prefill."""

    started: bool = False
    ended: bool = False
    gone: bool = False
    """The request has ended, its load not yet."""
    blocks: list[int] = field(default_factory=list)


@dataclass
class _Prefill:
    """Prefill: one request whose KV is to be handed over."""

    request: Request
    transfer_id: str
    early: bool = False
    """Decode may claim it while it is computed."""
    blocks: Blocks = field(default_factory=list)
    held: bool = False


class SchedulerSide:
    def __init__(self, config: LinkConfig, kv_cache_config: Any):
        self._config = config
        self._groups = transfer_group_ids(kv_cache_config)
        self._block_sizes = [kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size for group in self._groups]
        self._maker: _native.ParamsMaker | None = None
        self._pool: Any = None
        self._loads: dict[str, _Load] = {}
        self._prefills: dict[str, _Prefill] = {}
        # Requests whose parameters ask for nothing that is done here.
        self._plain: set[str] = set()
        # Requests that no rank loads any more, and how many ranks have yet to say so.
        self._dropping: Counter[str] = Counter()
        self._meta = StepMeta()
        self._tally = Tally(config.tp_size)

    # ---------------------------------------------------------------- what the engine binds

    def set_cards(self, cards: dict[int, Card]) -> None:
        texts = [cards[rank].text for rank in sorted(cards)]
        self._maker = _native.ParamsMaker(texts, self._config.secret_file)

    def bind_pool(self, pool: Any) -> None:
        self._pool = pool

    # ---------------------------------------------------------------- requests

    def meet(self, request: Request) -> None:
        """A request is new, or was new to us before hooks for that existed."""
        request_id, params = request.request_id, request.kv_transfer_params
        if not params or any(request_id in known for known in (self._loads, self._prefills, self._plain)):
            return
        try:
            self._sort(request, params)
        except _native.PdlinkError as error:
            # Whatever asks for a load is answered as a load: the policy decides what its failure means.
            if isinstance(params, dict) and not params.get("do_remote_prefill"):
                logger.warning("request %s is not handed over: %s", request_id, error)
                self._plain.add(request_id)
            else:
                self._loads[request_id] = _Load()
                self._meta.refusals.append((request_id, str(error)))

    def _sort(self, request: Request, params: Any) -> None:
        if _wants_hold_from_us(params):
            self._note_prefill(request, _native.new_transfer_id())
            return
        text = json.dumps(params)
        asked = _native.parse_request(text)
        if asked.kind == "prefill":
            self._note_prefill(request, asked.transfer_id, asked.early)
        elif asked.kind == "early":
            self._note_early(request, asked, text)
        elif asked.kind == "decode":
            self._note_load(request, asked, text)
        else:
            self._plain.add(request.request_id)

    def _note_prefill(self, request: Request, transfer_id: str, early: bool = False) -> None:
        if not self._config.prefills:
            raise _native.WrongRoleError("holding KV for others: this worker only does decode")
        if request.prompt_token_ids is None:
            raise _native.MalformedParamsError("a prompt given as embeddings cannot be told from another")
        self._prefills[request.request_id] = _Prefill(request, transfer_id, early)
        if early:
            begin = Begin(transfer_id, prompt.label(request), request.num_prompt_tokens, prompt.number(request))
            self._meta.begins.append(begin)

    def _note_load(self, request: Request, asked: _native.KvRequest, text: str) -> None:
        label = asked.remote_request_id or ""
        if asked.tokens != request.num_prompt_tokens:
            raise _native.MalformedParamsError(
                f"transfer {asked.transfer_id} holds KV of {asked.tokens} tokens, the prompt has {request.num_prompt_tokens}"
            )
        if prompt.differs(label, request):
            raise _native.MalformedParamsError(
                f"transfer {asked.transfer_id} holds KV of another prompt ({label}) than that of request {request.request_id}"
            )
        self._loads[request.request_id] = _Load()
        self._meta.expects.append((request.request_id, asked.transfer_id or "", text))

    def _note_early(self, request: Request, asked: _native.KvRequest, text: str) -> None:
        """Whether it is the same prompt is for the two workers to see: prefill has not told of it yet."""
        self._loads[request.request_id] = _Load()
        tokens, fingerprint = request.num_prompt_tokens, prompt.number(request)
        self._meta.earlies.append(Early(request.request_id, asked.transfer_id or "", text, tokens, fingerprint))

    # ---------------------------------------------------------------- decode: loading

    def matched_tokens(self, request: Request, computed: int) -> tuple[int, bool]:
        self.meet(request)
        load = self._loads.get(request.request_id)
        # Loaded, failed or dropped before: preempted and recomputed requests are computed here.
        if load is None or load.started:
            return 0, False
        # Prompt logprobs need the prompt to be computed here. vLLM sees to it by itself since 0.31.
        if getattr(request, "skip_reading_prefix_cache", False):
            return 0, False
        missing = request.num_prompt_tokens - computed
        return (missing, True) if missing > 0 else (0, False)

    def allocated(self, request: Request, blocks: Any, external: int) -> None:
        load = self._loads.get(request.request_id)
        if load is None or load.started:
            return
        load.started = True
        if external <= 0:
            # vLLM computes the prompt here, for prompt logprobs say: prefill need not wait for us.
            load.ended = True
            self._drop(request.request_id)
            return
        first_token = request.num_prompt_tokens - external
        ids = blocks.get_block_ids()
        needed = self._cut([list(ids[group]) for group in self._groups], first_token, request.num_prompt_tokens)
        load.blocks = [block for group in needed for block in group]
        self._meta.fetches.append(Fetch(request.request_id, needed, first_token, request.num_prompt_tokens))

    def _cut(self, blocks: Blocks, first_token: int, tokens: int) -> Blocks:
        """The blocks of tokens `first_token..tokens`: those before hold valid KV, those behind are for tokens to come."""
        sizes = zip(blocks, self._block_sizes)
        cut = [group[first_token // size : -(-tokens // size)] for group, size in sizes]
        # Blocks that a sliding window has left behind are the null block, at the front.
        return [list(dropwhile(lambda block: block == NULL_BLOCK, group)) for group in cut]

    # ---------------------------------------------------------------- steps

    def step_meta(self, scheduler_output: SchedulerOutput) -> StepMeta:
        if self._prefills:
            self._hold_completed(scheduler_output)
        meta, self._meta = self._meta, StepMeta()
        return meta

    def _hold_completed(self, scheduler_output: SchedulerOutput) -> None:
        scheduled = scheduler_output.num_scheduled_tokens
        for request_id, new_blocks, resumed in yield_req_data(scheduler_output):
            prefill = self._prefills.get(request_id)
            if prefill is None:
                continue
            self._collect(prefill, new_blocks, resumed)
            request = prefill.request
            end = request.num_computed_tokens + scheduled.get(request_id, 0)
            self._tell_chunk(prefill, end, resumed)
            # With one token to come no later step can take the blocks away. Otherwise they are held when it ends.
            if request.max_tokens == 1 and not prefill.held and end >= request.num_prompt_tokens:
                self._hold(prefill)

    def _tell_chunk(self, prefill: _Prefill, end: int, resumed: bool) -> None:
        """What this step computes of a prompt that decode may have claimed."""
        if not prefill.early or prefill.held:
            return
        if resumed:
            self._meta.restarts.append(prefill.transfer_id)
        tokens = min(end, prefill.request.num_prompt_tokens)
        # A cache of several block tables is pushed when all of it is there.
        if prefill.request.num_computed_tokens < tokens and len(self._groups) == 1:
            self._meta.chunks.append((prefill.transfer_id, self._cut(prefill.blocks, 0, tokens), tokens))

    def _collect(self, prefill: _Prefill, new_blocks: Any, resumed: bool) -> None:
        # What was offered stays as it was offered: `finished` compares.
        if new_blocks is None or prefill.held:
            return
        ours = [list(new_blocks[group]) for group in self._groups]
        if resumed or not prefill.blocks:
            prefill.blocks = ours
        else:
            for known, new in zip(prefill.blocks, ours):
                known.extend(new)

    def _hold(self, prefill: _Prefill) -> None:
        request = prefill.request
        tokens = request.num_prompt_tokens
        prefill.held = True
        prefill.blocks = self._cut(prefill.blocks, 0, tokens)
        hold = Hold(request.request_id, prefill.transfer_id, prompt.label(request), prefill.blocks, tokens)
        self._meta.holds.append(hold)

    @property
    def needs_steps(self) -> bool:
        """Whether steps are needed for what no request of vLLM's stands for: orders to tell, drops under way."""
        return bool(self._meta or self._dropping)

    def ends(self, output: Any) -> None:
        """What the workers reported, before vLLM acts on it."""
        for request_id in output.finished_recving or ():
            if load := self._loads.get(request_id):
                load.ended = True
        meta = output.kv_connector_worker_meta
        if isinstance(meta, WorkerMeta):
            self._dropping -= meta.dropped  # What comes to nothing is gone.
            for request_id in meta.unfenced:
                self._quarantine(request_id)
        for request_id in output.finished_recving or ():
            load = self._loads.get(request_id)
            if load is not None and load.gone:
                del self._loads[request_id]
        if isinstance(stats := output.kv_connector_stats, PdlinkStats):
            # In place: vLLM passes this very object on.
            self._tally.fold(stats)

    def _quarantine(self, request_id: str) -> None:
        """Keeps blocks out of use for good: one more user than vLLM counts never lets go of them (KV-7)."""
        load = self._loads.get(request_id)
        if load is None or self._pool is None:
            return
        self._pool.touch([self._pool.blocks[block] for block in load.blocks])
        logger.error(
            "request %s: a lost prefill worker may still write into %d blocks; they stay out of use until this worker restarts",
            request_id,
            len(load.blocks),
        )

    # ---------------------------------------------------------------- ends

    def finished(self, request: Request, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        self._plain.discard(request.request_id)
        self._end_load(request.request_id)
        prefill = self._prefills.pop(request.request_id, None)
        if prefill is None:
            return False, None
        complete = request.status.name in HANDED_OVER and request.num_computed_tokens >= request.num_prompt_tokens
        ours = self._cut([list(block_ids[group]) for group in self._groups], 0, request.num_prompt_tokens)
        if not prefill.held:
            if not complete:
                if prefill.early:
                    self._meta.withdrawals.append(prefill.transfer_id)
                return False, None
            prefill.blocks = ours
            self._hold(prefill)
        # Preempted between its last step and its end: it was computed again, into other blocks than were offered.
        complete = complete and prefill.blocks == ours
        params = self._params(prefill) if complete else None
        # From here on the blocks are ours until the worker reports them, also when nobody will come for them.
        self._meta.closes.append((request.request_id, params is None))
        return True, params

    def _end_load(self, request_id: str) -> None:
        load = self._loads.get(request_id)
        if load is None:
            return
        if not load.started:
            self._drop(request_id)
        elif not load.ended:
            # Remembered until its report: blocks that a lost peer can still write to are found through it.
            self._meta.aborts.append(request_id)
            load.gone = True
            return
        del self._loads[request_id]

    def _drop(self, request_id: str) -> None:
        self._meta.drops.append(request_id)
        self._dropping[request_id] = self._config.tp_size

    def _params(self, prefill: _Prefill) -> dict[str, Any] | None:
        if self._maker is None:
            logger.error("transfer %s: no worker has told its KV address; nothing can be handed over", prefill.transfer_id)
            return None
        request = prefill.request
        tokens, label = request.num_prompt_tokens, prompt.label(request)
        return json.loads(self._maker.params(prefill.transfer_id, label, prefill.blocks, tokens))


def _wants_hold_from_us(params: Any) -> bool:
    """NIXL's form of the prefill leg: the router gave no transfer id, so we draw one."""
    is_prefill = isinstance(params, dict) and params.get("do_remote_decode") is True
    return is_prefill and not params.get("do_remote_prefill") and params.get("pdlink") is None
