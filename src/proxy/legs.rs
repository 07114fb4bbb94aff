//! The legs of a request: prefill, then decode, on one pair after another until one answers (PX-2).
//!
//! ```text
//! pick decode, pick prefill ──► prefill leg ──► decode leg ──► first byte ──► the client
//!        ▲                          │ refused (4xx): the client's answer   │
//!        └── failed: another pair ◄─┴──────────────────────────────────────┘
//! ```
//!
//! With concurrent dispatch both legs go out at once, decode's with parameters of our own making, and both are waited for: the
//! first that fails takes the other with it. A decode leg that fails may have failed of prefill; so prefill's word is waited
//! for a moment, and its failure is the one that counts.
//!
//! Everything that must be undone when this is left half-way (by a failure, or by the client, whose leaving drops this
//! future) undoes itself: a leg's socket closes, a worker's load is given back, an open transfer is aborted.

use std::borrow::Cow;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use tokio::time::{Instant, timeout};

use super::abort::Transfer;
use super::dialect::{self, Connector, pair_headers};
use super::failure::{Blamed, Failure, Pair, unreadable, unusable};
use super::flight::Flight;
use super::merge;
use super::metrics::Leg;
use super::plan::{Alone, Plan, expects_params};
use super::pool::Hints;
use super::shared::Lane;
use super::trace;
use super::upstream::{Deadline, Exchange, Outgoing, exchange};
use super::worker::{Load, Worker};
use crate::config::Dispatch;
use crate::control::{EarlyParams, Role, TransferId};
use crate::openai::ApiError;
use crate::openai::scan::Kind;
use crate::openai::splice::{Field, RequestBody, Spliced};
use crate::telemetry::traces::Span;

/// How long prefill may take to say why decode has failed.
const CAUSE_WAIT: Duration = Duration::from_millis(200);
/// Most of a refusal or failure that is read and passed on.
const REFUSAL_BYTES_MAX: usize = 1 << 20;

/// What the client is to get.
#[derive(Debug)]
pub(crate) enum Answer {
    /// A worker's answer, its first part read already.
    Flowing {
        exchange: Exchange,
        first: Option<Bytes>,
    },
    Held(Held),
}

impl Answer {
    fn is_success(&self) -> bool {
        match self {
            Self::Flowing { exchange, .. } => exchange.head.status.is_success(),
            Self::Held(held) => held.status.is_success(),
        }
    }
}

/// A worker's answer that was read whole.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

/// One request on its way through the legs.
pub(crate) struct Job<'a> {
    pub(crate) lane: &'a Arc<Lane>,
    pub(crate) flight: &'a mut Flight,
    pub(crate) method: &'a http::Method,
    /// Path and query at the worker.
    pub(crate) path: &'a str,
    /// The client's header lines, as both legs have them.
    pub(crate) common: &'a [u8],
    pub(crate) session: Option<&'a [u8]>,
    pub(crate) prefixes: &'a [u64],
    /// The request as a whole ends here.
    pub(crate) whole: Deadline,
}

/// What prefill gave.
struct Prefilled {
    params: Option<Bytes>,
    prompt_logprobs: Option<Bytes>,
}

impl Job<'_> {
    /// Serves a generation request through both legs, or alone where `plan` says so.
    pub(crate) async fn generate(&mut self, plan: Plan, body: &RequestBody) -> Result<Answer, ApiError> {
        let mut avoid = Vec::new();
        let mut left = self.lane.shared.limits.attempts_max;
        loop {
            left -= 1;
            match self.attempt(plan, body, &avoid).await {
                Ok(answer) => return Ok(answer),
                Err(mut failure) if failure.retry && left > 0 => self.again(&mut failure, &mut avoid),
                Err(mut failure) if failure.retry && failure.leg == Leg::prefill && self.may_prefill_locally() => {
                    // The pool is down and nobody has noticed yet: as good a reason as when it is known.
                    self.again(&mut failure, &mut avoid);
                    let shared = Arc::clone(&self.lane.shared);
                    let Some(decode) = self.pick(Role::Decode, &avoid) else { return failure.end(&shared) };
                    let answer = self.alone(Alone::PrefillDown, plan, body, decode).await;
                    return answer.or_else(|failure| failure.end(&shared));
                }
                Err(failure) => return failure.end(&self.lane.shared),
            }
        }
    }

    fn may_prefill_locally(&self) -> bool {
        self.lane.shared.limits.local_prefill
    }

    /// Serves any other request by one decode worker. What it does there is not known, so it is not done twice: only a
    /// request that reached nobody, or one that only reads, is tried again.
    pub(crate) async fn forward(&mut self, body: &[u8]) -> Result<Answer, ApiError> {
        let reads = self.method.is_safe();
        let mut avoid = Vec::new();
        let mut left = self.lane.shared.limits.attempts_max;
        loop {
            left -= 1;
            let headers = pair_headers(self.lane.shared.connector, self.common, &self.flight.request_id, None);
            let answer = match self.pick(Role::Decode, &avoid) {
                Some(decode) => self.decode_leg(decode, &headers, &[body]).await,
                None => Err(Failure::nobody(Leg::decode, "")),
            };
            match answer {
                Ok(answered) => return Ok(self.take(answered)),
                Err(mut failure) if failure.retry && left > 0 && (reads || !failure.reached) => {
                    self.again(&mut failure, &mut avoid);
                }
                Err(failure) => return failure.end(&self.lane.shared),
            }
        }
    }

    /// The weights that decode is going to answer with.
    fn note_weights(&mut self) {
        self.flight.weight_version = self.lane.shared.weights.serves();
    }

    fn again(&mut self, failure: &mut Failure, avoid: &mut Vec<usize>) {
        let pair = failure.blamed.as_ref().and_then(|blamed| blamed.pair.as_ref());
        avoid.extend(pair.map(|pair| pair.prefill.number));
        avoid.extend(failure.worker);
        failure.stand(&self.lane.shared);
        // Dropped while open: prefill is told to free what it holds for the attempt that failed.
        self.flight.transfer = None;
        self.flight.load = None;
        self.lane.shared.metrics.retried(failure.leg);
    }

    /// Prefill's half of a pair that hands KV over.
    fn pair_with(&self, prefill: &Arc<Worker>) -> Pair {
        let shared = &self.lane.shared;
        Pair { prefill: Arc::clone(prefill), prefills: shared.prefill.len(), decodes: shared.decode.len() }
    }

    fn pick(&self, role: Role, avoid: &[usize]) -> Option<Load> {
        let hints = Hints { session: self.session, prefixes: self.prefixes, avoid };
        self.lane.shared.pool(role).pick(hints, std::time::Instant::now())
    }

    async fn attempt(&mut self, plan: Plan, body: &RequestBody, avoid: &[usize]) -> Result<Answer, Failure> {
        let Some(decode) = self.pick(Role::Decode, avoid) else { return Err(Failure::nobody(Leg::decode, "")) };
        if let Some(reason) = plan.alone {
            return self.alone(reason, plan, body, decode).await;
        }
        let Some(prefill) = self.pick(Role::Prefill, avoid) else {
            if self.may_prefill_locally() {
                return self.alone(Alone::PrefillDown, plan, body, decode).await;
            }
            return Err(Failure::nobody(Leg::prefill, "; `[proxy] local_prefill` would let decode prefill by itself"));
        };
        self.pair(plan, body, prefill, decode).await
    }

    /// One decode worker does everything.
    async fn alone(&mut self, reason: Alone, plan: Plan, body: &RequestBody, decode: Load) -> Result<Answer, Failure> {
        self.lane.shared.metrics.alone(reason);
        self.flight.dispatch = None;
        // Not into a pause: what waits there is answered by other weights than are noted.
        drop(self.lane.shared.weights.handoffs.begin().await);
        self.note_weights();
        let plan = Plan { merge_logprobs: false, ..plan };
        let headers = pair_headers(self.lane.shared.connector, self.common, &self.flight.request_id, None);
        let spliced = dialect::decode_body(plan, body, None);
        let answered = self.decode_leg(decode, &headers, &pieces(&spliced)).await?;
        Ok(self.take(answered))
    }

    async fn pair(&mut self, plan: Plan, body: &RequestBody, prefill: Load, decode: Load) -> Result<Answer, Failure> {
        let shared = &self.lane.shared;
        let is_early = shared.limits.dispatch == Dispatch::Concurrent && shared.connector == Connector::Native;
        let met = if is_early { prefill.worker().rendezvous.known() } else { None };
        let dispatch = if met.is_some() { Dispatch::Concurrent } else { Dispatch::Sequential };
        shared.metrics.dispatched(dispatch);
        let id = TransferId::random();
        let pair = Some((&**prefill.worker(), &**decode.worker(), id));
        let headers = pair_headers(shared.connector, self.common, &self.flight.request_id, pair);
        let runtime = met.as_ref().and_then(|met| met.first().cloned());
        self.flight.transfer_id = Some(id);
        self.flight.dispatch = Some(dispatch);
        self.flight.prefill = Some(Arc::clone(prefill.worker()));
        self.flight.transfer = Some(Transfer::open(shared, id, prefill.worker(), runtime));
        let asked = dialect::prefill_body(shared.connector, plan, body, id, dispatch);
        let asked = asked.map_err(|error| unreadable(&error))?;
        match met {
            Some(met) => self.together(plan, body, &asked, (prefill, decode), &headers, (id, &met)).await,
            None => self.in_turn(plan, body, &asked, (prefill, decode), &headers).await,
        }
    }

    /// Prefill, then decode with what prefill answered.
    async fn in_turn(
        &mut self,
        plan: Plan,
        body: &RequestBody,
        asked: &Spliced<'_>,
        (prefill, decode): (Load, Load),
        headers: &[u8],
    ) -> Result<Answer, Failure> {
        let worker = Arc::clone(prefill.worker());
        // While the weights change no hand-off begins (WT-2).
        let handoff = self.lane.shared.weights.handoffs.begin().await;
        let prefilled = self.prefill_leg(plan, asked, prefill, headers).await?;
        drop(handoff);
        if prefilled.params.is_none() && expects_params(self.lane.shared.connector) {
            if let Some(transfer) = &mut self.flight.transfer {
                transfer.close();
            }
            return self.alone(Alone::NothingHeld, plan, body, decode).await;
        }
        if let (Dispatch::Concurrent, Some(params)) = (self.lane.shared.limits.dispatch, &prefilled.params) {
            worker.rendezvous.learn(params);
        }
        if let Some(transfer) = &mut self.flight.transfer {
            transfer.params.clone_from(&prefilled.params);
        }
        self.note_weights();
        let spliced = dialect::decode_body(plan, body, prefilled.params.as_deref());
        let answered = self.decode_leg(decode, headers, &pieces(&spliced)).await;
        let answered = answered.map_err(|failure| failure.of_pair(self.pair_with(&worker)))?;
        handed_over(&worker, &answered);
        self.finish(answered, prefilled).await
    }

    /// Both at once. Decode's first byte needs all of prefill's KV, so waiting for both costs nothing.
    async fn together(
        &mut self,
        plan: Plan,
        body: &RequestBody,
        asked: &Spliced<'_>,
        (prefill, decode): (Load, Load),
        headers: &[u8],
        (id, met): (TransferId, &[String]),
    ) -> Result<Answer, Failure> {
        let worker = Arc::clone(prefill.worker());
        let early = EarlyParams::sealed(id, met.to_vec(), &self.lane.shared.secret).to_json().to_string();
        let spliced = dialect::decode_body(plan, body, Some(early.as_bytes()));
        let pieces = pieces(&spliced);
        let handoff = self.lane.shared.weights.handoffs.begin().await;
        self.note_weights();
        let prefill = async {
            let prefilled = self.prefill_leg(plan, asked, prefill, headers).await;
            drop(handoff);
            prefilled
        };
        let ended = both(prefill, self.decode_leg(decode, headers, &pieces)).await;
        if ended.is_err() {
            // It may listen elsewhere by now. The next request to it finds out.
            worker.rendezvous.forget();
        }
        match ended.map_err(|failure| failure.of_pair(self.pair_with(&worker)))? {
            (Some(Prefilled { params: None, .. }), _) => Err(self.holds_nothing(&worker)),
            (Some(prefilled), answered) => {
                handed_over(&worker, &answered);
                self.finish(answered, prefilled).await
            }
            // Refused by decode. The transfer is open still, and prefill is told to give it up.
            (None, answered) => Ok(self.take(answered)),
        }
    }

    /// Takes the answer for the client, and the worker that gives it.
    fn take(&mut self, (answer, decode): (Answer, Load)) -> Answer {
        if let (Some(transfer), true) = (&mut self.flight.transfer, answer.is_success()) {
            // From here decode's runtime answers for the KV, and tells prefill's if the client leaves.
            transfer.close();
        }
        self.flight.load = Some(decode);
        answer
    }

    async fn finish(&mut self, answered: (Answer, Load), prefilled: Prefilled) -> Result<Answer, Failure> {
        let answer = self.take(answered);
        match prefilled.prompt_logprobs {
            Some(logprobs) => self.merge(answer, &logprobs).await,
            None => Ok(answer),
        }
    }

    /// Begins a leg's span, and puts its line behind the leg's headers.
    fn trace<'h>(&self, leg: Leg, worker: &Worker, headers: &'h [u8]) -> (Option<Span>, Cow<'h, [u8]>) {
        let trace = self.flight.trace.as_ref();
        match trace.and_then(|trace| trace.leg(leg, worker, self.flight.transfer_id)) {
            Some((span, line)) => (Some(span), Cow::Owned([headers, &line].concat())),
            None => (None, Cow::Borrowed(headers)),
        }
    }

    async fn prefill_leg(
        &self,
        plan: Plan,
        asked: &Spliced<'_>,
        prefill: Load,
        headers: &[u8],
    ) -> Result<Prefilled, Failure> {
        let (span, headers) = self.trace(Leg::prefill, prefill.worker(), headers);
        let prefilled = self.ask_prefill(plan, asked, prefill, &headers).await;
        trace::end_leg(span, prefilled.as_ref().err().map(|failure| failure.error.message.as_str()));
        prefilled
    }

    async fn ask_prefill(
        &self,
        plan: Plan,
        asked: &Spliced<'_>,
        mut prefill: Load,
        headers: &[u8],
    ) -> Result<Prefilled, Failure> {
        let shared = &self.lane.shared;
        let started = Instant::now();
        let deadline = Deadline::after(started, shared.limits.prefill).or(self.whole);
        let pieces = pieces(asked);
        let request = Outgoing { method: self.method, path: self.path, headers, body: &pieces };
        let worker = Arc::clone(prefill.worker());
        let asked =
            exchange(&self.lane.sockets, worker.number, &worker.origin, request, shared.limits.connect, deadline);
        let mut answer = match asked.await {
            Ok(answer) => answer,
            Err(error) => return Err(Failure::of(Leg::prefill, prefill, &error)),
        };
        if !answer.head.status.is_success() {
            return Err(self.refused(Leg::prefill, prefill, answer, deadline).await);
        }
        let text = match deadline.bound("whole answer", answer.whole(shared.limits.body_bytes_max)).await {
            Ok(text) => text,
            Err(error) => return Err(Failure::of(Leg::prefill, prefill, &error)),
        };
        self.lane.sockets.finish(worker.number, answer);
        prefill.succeeded();
        shared.metrics.prefill_seconds.observe(started.elapsed().as_secs_f64());
        self.read_prefill(plan, text, &worker)
    }

    /// Takes what decode and the client need out of prefill's answer.
    fn read_prefill(&self, plan: Plan, text: Bytes, worker: &Worker) -> Result<Prefilled, Failure> {
        let shared = &self.lane.shared;
        let answer = RequestBody::scan(text);
        let answer = answer.map_err(|error| unusable(worker, &format!("its answer cannot be read: {error}")))?;
        let params = match answer.raw_bytes(Field::KvTransferParams) {
            // A copy: the answer's own bytes lie in the connection's buffer, which its next request needs.
            Some((params, Kind::Object)) => Some(Bytes::copy_from_slice(&params)),
            _ => None,
        };
        if params.is_none() && expects_params(shared.connector) {
            shared.metrics.prefill_without_params.inc();
            tracing::warn!(worker = worker.name(), "prefill answered without kv_transfer_params: it holds no KV");
            if !self.may_prefill_locally() {
                return Err(self.holds_nothing(worker));
            }
        }
        let prompt_logprobs = if plan.merge_logprobs { merge::logprobs_of(&answer) } else { None };
        Ok(Prefilled { params, prompt_logprobs })
    }

    fn holds_nothing(&self, worker: &Worker) -> Failure {
        let why = "it answered without kv_transfer_params, so it holds no KV; check its --kv-transfer-config, or set `[proxy] \
                   local_prefill`";
        unusable(worker, why)
    }

    /// Sends the leg whose answer the client gets, and waits for the first byte of its body.
    async fn decode_leg(&self, decode: Load, headers: &[u8], body: &[&[u8]]) -> Result<(Answer, Load), Failure> {
        let (span, headers) = self.trace(Leg::decode, decode.worker(), headers);
        let answered = self.ask_decode(decode, &headers, body).await;
        match (&answered, span, &self.flight.trace) {
            (Ok(_), Some(span), Some(trace)) => trace.answers(span),
            (Err(failure), span, _) => trace::end_leg(span, Some(&failure.error.message)),
            _ => {}
        }
        answered
    }

    async fn ask_decode(&self, decode: Load, headers: &[u8], body: &[&[u8]]) -> Result<(Answer, Load), Failure> {
        let shared = &self.lane.shared;
        let started = Instant::now();
        let deadline = Deadline::after(started, shared.limits.first_byte).or(self.whole);
        let request = Outgoing { method: self.method, path: self.path, headers, body };
        let worker = Arc::clone(decode.worker());
        let asked =
            exchange(&self.lane.sockets, worker.number, &worker.origin, request, shared.limits.connect, deadline);
        let mut answer = match asked.await {
            Ok(answer) => answer,
            Err(error) => return Err(Failure::of(Leg::decode, decode, &error)),
        };
        if answer.head.status.is_server_error() {
            return Err(self.refused(Leg::decode, decode, answer, deadline).await);
        }
        let first = match deadline.bound("first byte", answer.data()).await {
            Ok(first) => first,
            Err(error) => return Err(Failure::of(Leg::decode, decode, &error)),
        };
        shared.metrics.first_byte_seconds.observe(started.elapsed().as_secs_f64());
        Ok((Answer::Flowing { exchange: answer, first }, decode))
    }

    /// A worker's refusal or failure. 4xx is the client's business and passed on as it is.
    async fn refused(&self, leg: Leg, mut load: Load, mut answer: Exchange, deadline: Deadline) -> Failure {
        let status = answer.head.status;
        let body = match deadline.bound("whole answer", answer.whole(REFUSAL_BYTES_MAX)).await {
            Ok(body) => body,
            Err(error) => return Failure::of(leg, load, &error),
        };
        let worker = Arc::clone(load.worker());
        let failed = !status.is_client_error();
        // A paused server says 503 to everybody; that is no fault of its own.
        let is_blamed = failed && status != StatusCode::SERVICE_UNAVAILABLE;
        if is_blamed {
            tracing::warn!(worker = worker.name(), status = status.as_u16(), "worker failed a request");
        } else if !failed {
            load.succeeded();
        }
        let headers = answer.head.headers();
        self.lane.sockets.finish(worker.number, answer);
        let message = format!("{} worker {} answered {status}", worker.role.name(), worker.name());
        Failure {
            leg,
            worker: Some(worker.number),
            blamed: is_blamed.then(|| Blamed::alone(load)),
            retry: failed,
            reached: true,
            answer: Some(Box::new(Held { status, headers, body })),
            error: ApiError::new(StatusCode::BAD_GATEWAY, message),
        }
    }

    /// Puts prefill's `prompt_logprobs` into decode's answer.
    async fn merge(&mut self, answer: Answer, logprobs: &[u8]) -> Result<Answer, Failure> {
        let Answer::Flowing { mut exchange, first } = answer else { return Ok(answer) };
        if !exchange.head.status.is_success() {
            return Ok(Answer::Flowing { exchange, first });
        }
        let bytes_max = self.lane.shared.limits.body_bytes_max;
        let rest = Deadline::after(Instant::now(), self.lane.shared.limits.idle).or(self.whole);
        let rest = rest.bound("whole answer", exchange.whole(bytes_max)).await;
        let mut load = self.flight.load.take();
        let rest = match (rest, load.take()) {
            (Ok(rest), answering) => {
                load = answering;
                rest
            }
            (Err(error), Some(load)) => return Err(Failure::of(Leg::decode, load, &error)),
            (Err(_), None) => return Err(Failure::nobody(Leg::decode, "")),
        };
        let text = Bytes::from([first.unwrap_or_default(), rest].concat());
        let (status, mut headers) = (exchange.head.status, exchange.head.headers());
        if let Some(load) = &mut load {
            load.succeeded();
            self.lane.sockets.finish(load.worker().number, exchange);
        }
        self.flight.load = load;
        headers.remove(http::header::CONTENT_LENGTH);
        let body = merge::put_logprobs(&text, logprobs).map_or(text, Bytes::from);
        Ok(Answer::Held(Held { status, headers, body }))
    }
}

/// Decode answered with KV that prefill had: both halves are well.
fn handed_over(prefill: &Worker, (answer, decode): &(Answer, Load)) {
    if answer.is_success() {
        prefill.handovers.succeeded();
        decode.worker().handovers.succeeded();
    }
}

/// Waits for both legs. Where decode refuses the request there is nothing of prefill.
async fn both(
    prefill: impl Future<Output = Result<Prefilled, Failure>>,
    decode: impl Future<Output = Result<(Answer, Load), Failure>>,
) -> Result<(Option<Prefilled>, (Answer, Load)), Failure> {
    let (mut prefill, mut decode) = (pin!(prefill), pin!(decode));
    tokio::select! {
        prefilled = &mut prefill => {
            let prefilled = prefilled?;
            Ok((Some(prefilled), decode.await?))
        }
        answered = &mut decode => match answered {
            Ok(answered) if answered.0.is_success() => Ok((Some(prefill.await?), answered)),
            Ok(answered) => Ok((None, answered)),
            Err(failure) => match timeout(CAUSE_WAIT, prefill).await {
                Ok(Err(cause)) => Err(cause),
                _ => Err(failure),
            },
        },
    }
}

/// The parts of a body as they are written.
fn pieces<'a>(spliced: &'a Spliced<'a>) -> Vec<&'a [u8]> {
    let mut pieces = Vec::with_capacity(spliced.kept.len() + 1);
    if !spliced.head.is_empty() {
        pieces.push(spliced.head.as_slice());
    }
    pieces.extend_from_slice(&spliced.kept);
    pieces
}
