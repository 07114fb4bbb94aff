//! Digests of transfers (KV-4), made for both sides beside the runtime's thread.

use std::sync::Arc;

use super::BlockId;
use super::core::{Core, Event};
use super::digest::{Span, digest_of};
use super::run_list::by_group;
use super::shares::Scope;
use crate::control::TransferId;
use crate::telemetry::Side;

/// KV of at most this many bytes is digested on the runtime's own thread: waking another would take longer.
const DIGEST_HERE_BYTES_MAX: u64 = 256 * 1024;

/// What is to be digested, and for whom.
pub(super) struct Work {
    pub(super) side: Side,
    pub(super) transfer_id: TransferId,
    /// Which part, or which reader.
    pub(super) part: usize,
    pub(super) serial: u64,
    pub(super) blocks: Vec<Vec<BlockId>>,
    pub(super) from: Vec<u32>,
    pub(super) tokens: u32,
    pub(super) scope: Arc<Scope>,
}

impl Core {
    /// Digests here if it is little, beside the loop if it is much.
    pub(super) fn start_digest(&mut self, work: Work) {
        let (shared, events) = (Arc::clone(&self.shared), self.events.clone());
        let groups = &shared.layout.geometry().groups;
        let tokens = |from: &u32| u64::from(work.tokens.saturating_sub(*from));
        let bytes: u64 = groups.iter().zip(&work.from).map(|(group, from)| tokens(from) * group.token_bytes()).sum();
        let digest = move || {
            let Work { side, transfer_id, part, serial, blocks, from, tokens, scope } = work;
            let span = Span { blocks: &by_group(&blocks), from: &from, tokens };
            // Blocks and tokens were checked when the transfer began. If they are wrong all the same, the digest is too.
            let digest = digest_of(&shared.layout, &shared.regions, span, &scope, shared.gpu_digests());
            let digest = digest.unwrap_or_else(|error| {
                tracing::error!(%transfer_id, %error, "cannot digest");
                serial
            });
            let _ = events.send(Event::Digested { side, transfer_id, part, serial, digest });
        };
        if bytes <= DIGEST_HERE_BYTES_MAX {
            digest();
        } else {
            self.reap();
            self.tasks.spawn_blocking(digest);
        }
    }
}
