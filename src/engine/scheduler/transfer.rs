//! What the scheduler asks of the link, and what it does with the link's reports.

use super::super::request::Source;
use super::super::sequence::{Load, Sequence};
use super::{Filling, Key, Scheduler};
use crate::config::LoadFailurePolicy;
use crate::kv::{Begin, End, KvError, Prompt, Report, TransferId};
use crate::openai::ApiError;
use crate::telemetry::Side;

impl Scheduler {
    /// Claims the transfer that a new sequence names, if it names one.
    pub(super) fn claim(&mut self, source: &Source, sequence: &Sequence) -> Result<Load, ApiError> {
        let link = &self.parts.link;
        let params = match source {
            Source::Local => return Ok(Load::Local),
            Source::Early(params) => {
                let handle = link.expect_early(params, sequence.prompt()).map_err(|error| refused(&error))?;
                return Ok(Load::Claimed { handle });
            }
            Source::Remote(params) => params,
        };
        let handle = link.expect(params).map_err(|error| refused(&error))?;
        let tokens = params.remote_num_tokens as usize;
        if tokens != sequence.prompt_len() {
            link.abort(handle.transfer_id);
            let prompt = sequence.prompt_len();
            let message = format!("the KV to load is of {tokens} tokens, the prompt has {prompt}: not the same prompt");
            return Err(ApiError::bad_param("kv_transfer_params", message));
        }
        Ok(Load::Claimed { handle })
    }

    /// Prefill: says that a prompt is going to be computed, if decode may claim it meanwhile.
    pub(super) fn begin(&self, sequence: &Sequence) -> Result<(), ApiError> {
        let Some(transfer_id) = sequence.early() else { return Ok(()) };
        let begin = Begin { transfer_id, request_id: sequence.request_id.clone(), prompt: sequence.prompt() };
        self.parts.link.begin(begin).map_err(|error| refused(&error))
    }

    /// Prefill: a sequence ends before its prompt was offered. Decode must not wait for it.
    pub(super) fn give_up(&self, sequence: &Sequence) {
        if let Some(transfer_id) = sequence.early() {
            self.parts.link.abort(transfer_id);
        }
    }

    /// Tells prefill that nobody will come.
    pub(super) fn decline(&mut self, source: &Source) {
        let link = &self.parts.link;
        let claimed = match source {
            Source::Local => return,
            Source::Remote(params) => link.expect(params),
            // The prompt was not even read: what it says of it does not matter.
            Source::Early(params) => link.expect_early(params, Prompt { tokens: 0, fingerprint: 0 }),
        };
        if let Ok(handle) = claimed {
            link.abort(handle.transfer_id);
        }
    }

    /// A waiting sequence goes: its claim goes with it.
    pub(super) fn let_go(&mut self, sequence: &Sequence) {
        if let Load::Claimed { handle } = sequence.load {
            self.parts.link.abort(handle.transfer_id);
        }
    }

    /// The link's one report on a transfer (KV-1).
    pub(super) fn report(&mut self, report: Report) {
        let id = report.transfer_id;
        match report.side {
            Side::Prefill => {
                if let Some(held) = self.held.remove(&id) {
                    self.parts.blocks.give_back(held.blocks);
                }
            }
            Side::Decode => {
                if let Some((key, sequence)) = self.loading.remove(&id) {
                    self.loaded(key, sequence, report.end);
                } else if let Some(filling) = self.leaving.remove(&id) {
                    self.put_away(filling, &report.end);
                } else {
                    self.failed_while_waiting(id, &report.end);
                }
            }
        }
    }

    fn loaded(&mut self, key: Key, mut sequence: Sequence, end: End) {
        sequence.load = Load::Local;
        let first = sequence.computed;
        if std::mem::take(&mut sequence.outdated) {
            return self.loaded_in_vain(key, sequence, &end);
        }
        if end == End::Received {
            let last = sequence.prompt_len() - 1;
            self.parts.metrics.prompt_loaded.inc_by((last + 1 - first) as u64);
            // The last token is computed here, to know what comes after it.
            sequence.computed = last;
            sequence.cached_tokens.get_or_insert(last);
            self.publish(&mut sequence);
            self.running.insert(key, sequence);
            return;
        }
        let filling = self.filling(&mut sequence);
        self.put_away(filling, &end);
        self.not_loaded(key, sequence, &end);
    }

    /// The KV is of weights that have been replaced meanwhile: the prompt is computed here, whatever became of it (WT-3).
    fn loaded_in_vain(&mut self, key: Key, mut sequence: Sequence, end: &End) {
        let filling = self.filling(&mut sequence);
        self.put_away(filling, end);
        self.parts.metrics.recomputed.inc();
        self.waiting.insert(key, sequence);
    }

    /// Computes the prompt here after all, or ends the request, as `kv.load_failure_policy` says. An abort is somebody's
    /// wish, not a failure: it always ends the request.
    fn not_loaded(&mut self, key: Key, mut sequence: Sequence, end: &End) {
        let cause = cause(end);
        if self.parts.policy == LoadFailurePolicy::Recompute && *end != End::Aborted {
            tracing::warn!(request_id = sequence.request_id, %cause, "KV was not loaded, the prompt is computed here");
            self.parts.metrics.recomputed.inc();
            sequence.load = Load::Local;
            self.waiting.insert(key, sequence);
        } else {
            tracing::warn!(request_id = sequence.request_id, %cause, "KV was not loaded, the request fails");
            self.parts.metrics.load_failed.inc();
            sequence.fail(ApiError::internal(format!("the prompt's KV could not be loaded: {cause}")));
        }
    }

    /// A claim that prefill refused, or that ended before there were blocks.
    fn failed_while_waiting(&mut self, id: TransferId, end: &End) {
        let claimed =
            |sequence: &Sequence| matches!(sequence.load, Load::Claimed { handle } if handle.transfer_id == id);
        let Some(key) = self.waiting.iter().find(|(_, sequence)| claimed(sequence)).map(|(key, _)| *key) else {
            return;
        };
        let Some(sequence) = self.waiting.remove(&key) else { return };
        self.not_loaded(key, sequence, end);
    }

    /// Takes the blocks out of a loading sequence.
    pub(super) fn filling(&self, sequence: &mut Sequence) -> Filling {
        let kept = sequence.computed / self.parts.blocks.cache.block_size();
        Filling { blocks: sequence.reset(), kept }
    }

    /// Frees blocks that a load was to fill, unless a peer may still write into them (KV-7).
    fn put_away(&mut self, filling: Filling, end: &End) {
        let Filling { mut blocks, kept } = filling;
        if matches!(end, End::Failed { fenced: false, .. }) {
            let lost = blocks.split_off(kept);
            tracing::error!(blocks = lost.len(), "a lost peer may still write into blocks: they stay out of use");
            self.parts.blocks.quarantine(lost.len());
        }
        self.parts.blocks.give_back(blocks);
    }

    fn publish(&mut self, sequence: &mut Sequence) {
        for (hash, block) in sequence.newly_full(self.parts.blocks.cache.block_size()) {
            self.parts.blocks.publish(hash, block);
        }
    }
}

/// Parameters that a client made are its own fault; anything else is this worker's.
pub(super) fn refused(error: &KvError) -> ApiError {
    let message = format!("the KV of this request cannot be handed over: {error}");
    match error {
        KvError::Params(_) | KvError::WrongRole { .. } | KvError::Duplicate { .. } | KvError::NotAsync { .. } => {
            ApiError::bad_param("kv_transfer_params", message)
        }
        _ => ApiError::internal(message),
    }
}

fn cause(end: &End) -> String {
    match end {
        End::Failed { failure, .. } => failure.to_string(),
        End::Aborted => "the transfer was aborted".to_owned(),
        other => format!("the transfer ended as {other:?}"),
    }
}
