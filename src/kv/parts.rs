//! Concurrent dispatch: what of a begun transfer is computed, and what of that each reader has been sent.
//!
//! Both are frontiers, a token for each layer: layers are final up to it, or have been pushed up to it. One part is on its
//! way at a time, and takes all that has become final meanwhile; so parts grow where the path is slower than prefill. No
//! part is smaller than half a layer of the whole transfer, which bounds the posts of a request by twice its layers.

use std::sync::Arc;

use super::run_list::Part;
use super::{BlockId, Progress};

/// What prefill has computed of one transfer.
#[derive(Debug, Default)]
pub(super) struct Computed {
    /// For each layer the token that it is final up to.
    to: Vec<u32>,
    pub(super) blocks: Arc<Vec<Vec<BlockId>>>,
}

impl Computed {
    pub(super) fn note(&mut self, progress: Progress) {
        let end = progress.layers.end as usize;
        if self.to.len() < end {
            self.to.resize(end, 0);
        }
        for to in &mut self.to[progress.layers.start.min(progress.layers.end) as usize..end] {
            *to = progress.tokens.max(*to);
        }
        self.blocks = progress.blocks;
    }

    /// The request was preempted: nothing is final any more.
    pub(super) fn void(&mut self) {
        *self = Self::default();
    }
}

/// What one reader has been sent, or is being sent.
#[derive(Debug)]
pub(super) struct Sent {
    /// The first token that moves.
    first: u32,
    tokens: u32,
    to: Vec<u32>,
    /// The frontiers once the part on its way has arrived; `None` for one that does not count any more.
    on_way: Option<Option<Vec<u32>>>,
}

/// How parts are cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    pub(super) granule: u32,
    /// Bytes of one token in one layer.
    pub(super) row_bytes: u64,
    pub(super) part_bytes_min: u64,
}

impl Sent {
    pub(super) fn nothing(layers: u32, first: u32, tokens: u32) -> Self {
        Self { first, tokens, to: vec![first; layers as usize], on_way: None }
    }

    /// Whether no byte of it counts as sent.
    pub(super) fn is_untouched(&self) -> bool {
        self.to.iter().all(|to| *to == self.first)
    }

    pub(super) fn is_complete(&self) -> bool {
        self.to.iter().all(|to| *to >= self.tokens)
    }

    /// What is to be sent next of what has been computed, if it is worth a post.
    pub(super) fn next(&self, computed: &Computed, cut: Cut) -> Vec<Part> {
        let final_to = |layer: usize| computed.to.get(layer).map_or(0, |to| (*to).min(self.tokens));
        let whole = |to: u32| to / cut.granule * cut.granule;
        let parts = self.parts_up_to(|layer| whole(final_to(layer)));
        let rows: u64 = parts.iter().map(rows_of).sum();
        let least = u64::from(self.tokens - self.first).div_ceil(2);
        if rows < least || rows * cut.row_bytes < cut.part_bytes_min { Vec::new() } else { parts }
    }

    /// All that is left, once prefill has ended.
    pub(super) fn rest(&self) -> Vec<Part> {
        self.parts_up_to(|_| self.tokens)
    }

    /// Neighbouring layers that lack the same tokens are one part.
    fn parts_up_to(&self, target: impl Fn(usize) -> u32) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for (layer, from) in self.to.iter().enumerate() {
            let (tokens, number) = (*from..target(layer), u32::try_from(layer).unwrap_or(u32::MAX));
            match parts.last_mut() {
                _ if tokens.is_empty() => {}
                Some(last) if last.layers.end == number && last.tokens == tokens => last.layers.end += 1,
                _ => parts.push(Part { layers: number..number + 1, tokens }),
            }
        }
        parts
    }

    /// These parts are on their way.
    pub(super) fn start(&mut self, parts: &[Part]) {
        let mut to = self.to.clone();
        for part in parts {
            to[part.layers.start as usize..part.layers.end as usize].fill(part.tokens.end);
        }
        self.on_way = Some(Some(to));
    }

    /// What was on its way has arrived.
    pub(super) fn arrived(&mut self) {
        if let Some(Some(to)) = self.on_way.take() {
            self.to = to;
        }
    }

    /// Everything is to be sent again, and what is on its way does not count.
    pub(super) fn void(&mut self) {
        self.to.fill(self.first);
        self.on_way = self.on_way.take().map(|_| None);
    }
}

fn rows_of(part: &Part) -> u64 {
    let count = |range: &std::ops::Range<u32>| u64::from(range.end - range.start);
    count(&part.layers) * count(&part.tokens)
}

#[cfg(test)]
mod tests {
    use super::super::TransferId;
    use super::*;

    const CUT: Cut = Cut { granule: 4, row_bytes: 100, part_bytes_min: 0 };

    fn progress(layers: std::ops::Range<u32>, tokens: u32) -> Progress {
        Progress { transfer_id: TransferId([1; 16]), blocks: Arc::default(), layers, tokens }
    }

    fn send(sent: &mut Sent, parts: &[Part]) {
        sent.start(parts);
        sent.arrived();
    }

    fn part(layers: std::ops::Range<u32>, tokens: std::ops::Range<u32>) -> Part {
        Part { layers, tokens }
    }

    #[test]
    fn each_layer_goes_out_once_it_is_final_and_the_last_granule_in_the_end() {
        let (mut computed, mut sent) = (Computed::default(), Sent::nothing(3, 8, 30));
        assert_eq!(sent.next(&computed, CUT), []);
        computed.note(progress(0..1, 30));
        assert_eq!(sent.next(&computed, CUT), [part(0..1, 8..28)]);
        send(&mut sent, &[part(0..1, 8..28)]);
        computed.note(progress(1..3, 30));
        assert_eq!(sent.next(&computed, CUT), [part(1..3, 8..28)], "what came meanwhile goes together");
        send(&mut sent, &[part(1..3, 8..28)]);
        assert_eq!(sent.next(&computed, CUT), []);
        assert_eq!(sent.rest(), [part(0..3, 28..30)]);
        let rest = sent.rest();
        send(&mut sent, &rest);
        assert!(sent.is_complete());
    }

    #[test]
    fn posts_are_bounded_by_the_layers_however_small_the_steps() {
        let (mut computed, mut sent, mut posts) = (Computed::default(), Sent::nothing(16, 0, 1000), 0);
        for tokens in (10..=1000).step_by(10) {
            for layer in 0..16 {
                computed.note(progress(layer..layer + 1, tokens));
                let parts = sent.next(&computed, CUT);
                if !parts.is_empty() {
                    send(&mut sent, &parts);
                    posts += 1;
                }
            }
        }
        assert!((16..=32).contains(&posts), "{posts}");
    }

    #[test]
    fn what_is_less_than_a_part_waits_for_more() {
        let (mut computed, sent) = (Computed::default(), Sent::nothing(2, 0, 100));
        let cut = Cut { part_bytes_min: 15_000, ..CUT };
        computed.note(progress(0..1, 100));
        assert_eq!(sent.next(&computed, cut), []);
        computed.note(progress(1..2, 100));
        assert_eq!(sent.next(&computed, cut), [part(0..2, 0..100)]);
    }

    #[test]
    fn what_was_preempted_is_sent_again_and_a_late_arrival_does_not_count() {
        let (mut computed, mut sent) = (Computed::default(), Sent::nothing(1, 0, 20));
        computed.note(progress(0..1, 12));
        sent.start(&sent.next(&computed, CUT));
        computed.void();
        sent.void();
        sent.arrived();
        assert!(sent.is_untouched());
        computed.note(progress(0..1, 20));
        assert_eq!(sent.next(&computed, CUT), [part(0..1, 0..20)]);
    }
}
