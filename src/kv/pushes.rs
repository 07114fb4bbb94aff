//! Prefill's own copies: started once their link is there, cancelled, ended. One at a time for each reader: the whole, or
//! (concurrent dispatch) part after part.

use std::sync::Arc;
use std::time::Instant;

use super::channel::SendEvent;
use super::clients::PushPath;
use super::core::{Core, Event};
use super::messages::Place;
use super::parts::{Cut, Sent};
use super::producer::Sending;
use super::run_list::by_group;
use super::{Extent, LayoutError, PairPlan, TransferFailure};
use crate::control::TransferId;
use crate::telemetry::Side;
use crate::transport::{Copied, Direction, RunList, TransferRequest, TransportError};

impl Sending {
    /// What a reader is to be sent now.
    fn next_runs(
        &mut self,
        reader: usize,
        place: &Place,
        plan: &PairPlan,
        part_bytes_min: u64,
    ) -> Result<Next, LayoutError> {
        let is_ready = self.machine.is_ready();
        let computed = self.begun.as_ref().map(|begun| &begun.computed).filter(|_| plan.has_parts());
        let blocks = match computed {
            Some(computed) if !is_ready => &*computed.blocks,
            _ if !is_ready => return Ok(Next::Later),
            _ => &self.offer.blocks,
        };
        let (src_blocks, dst_blocks) = (by_group(blocks), by_group(&place.blocks));
        let (first_token, tokens) = (place.first_token, self.offer.tokens);
        let extent = Extent { src_blocks: &src_blocks, dst_blocks: &dst_blocks, first_token, tokens };
        let Some(computed) = computed else { return plan.runs(extent).map(Next::Runs) };
        let sent = &mut self.readers[reader].sent;
        let sent = sent.get_or_insert_with(|| Sent::nothing(plan.layers(), first_token.min(tokens), tokens));
        let parts = match is_ready {
            true => sent.rest(),
            false => sent.next(computed, Cut { granule: plan.granule(), row_bytes: plan.row_bytes(), part_bytes_min }),
        };
        if is_ready && sent.is_untouched() {
            let runs = plan.runs(extent)?;
            sent.start(&parts);
            return Ok(Next::Runs(runs));
        }
        if parts.is_empty() {
            return Ok(if is_ready { Next::Nothing } else { Next::Later });
        }
        let mut runs = RunList::default();
        for part in &parts {
            runs.segments.extend(plan.part(extent, part)?.segments);
        }
        sent.start(&parts);
        Ok(Next::Runs(runs))
    }
}

/// What is to be done for a reader.
enum Next {
    Runs(RunList),
    /// There is not enough of it yet.
    Later,
    /// All of it has arrived.
    Nothing,
}

impl Core {
    /// Submits the push, or what can be pushed of it now, or waits for its link.
    pub(super) fn start_push(&mut self, transfer_id: TransferId, reader: usize) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let of_reader = &sending.readers[reader];
        let (Some(client), Some(place)) = (of_reader.client, of_reader.place.clone()) else { return };
        if of_reader.push.is_some() || sending.machine.state(reader) != "pushing" {
            return;
        }
        let (link, plan) = match self.push_path(client, place.path, transfer_id, reader) {
            PushPath::Ready(link, plan) => (link, plan),
            PushPath::Waiting => return,
            PushPath::Impossible(why) => return self.push_impossible(transfer_id, reader, why),
        };
        let Some(sending) = self.sending.get_mut(&transfer_id) else { return };
        let runs = match sending.next_runs(reader, &place, &plan, self.kv.part_bytes_min) {
            Ok(Next::Runs(runs)) => runs,
            Ok(Next::Later) => return,
            Ok(Next::Nothing) => {
                return self.drive_sending(transfer_id, reader, SendEvent::CopyDone { result: Ok(()), fenced: true });
            }
            Err(error) => return self.push_impossible(transfer_id, reader, error.to_string()),
        };
        sending.record.path = Some(place.path);
        let serial = sending.serial;
        let of_reader = &mut sending.readers[reader];
        of_reader.moved.runs += runs.runs() as u64;
        let (events, shared) = (self.events.clone(), Arc::clone(&self.shared));
        if let Some(pushes) = &shared.pushes {
            pushes.enter();
        }
        let request = TransferRequest {
            direction: Direction::Push,
            runs,
            grant: Some(place.grant),
            deadline: Instant::now() + self.kv.transfer_timeout,
        };
        // Every transfer completes once (TR-1), so whatever entered the gate leaves it.
        let done = move |result| {
            if let Some(pushes) = &shared.pushes {
                pushes.leave();
            }
            let _ = events.send(Event::Copied { side: Side::Prefill, transfer_id, part: reader, serial, result });
        };
        let ticket = link.submit(request, Box::new(done));
        of_reader.push = Some((link, ticket));
    }

    pub(super) fn push_done(
        &mut self,
        transfer_id: TransferId,
        serial: u64,
        reader: usize,
        result: Result<Copied, TransportError>,
    ) {
        let Some(sending) = self.sending.get_mut(&transfer_id).filter(|sending| sending.serial == serial) else {
            return;
        };
        let (path, of_reader) = (sending.record.path, &mut sending.readers[reader]);
        of_reader.push = None;
        of_reader.moved.finished = Some(Instant::now());
        let fenced = result.as_ref().map_or_else(TransportError::fenced, |_| true);
        let result = match result {
            Ok(copied) => {
                of_reader.moved.note(&copied);
                if let Some(sent) = &mut of_reader.sent {
                    sent.arrived();
                    let is_over = sent.is_complete() && sending.machine.is_ready();
                    if !is_over && sending.machine.state(reader) == "pushing" {
                        return self.start_push(transfer_id, reader);
                    }
                }
                Ok(())
            }
            Err(error) => {
                let path = path.map_or("no path", |path| path.name()).to_owned();
                Err(TransferFailure::Copy { peer: self.shared.engine_id.clone(), path, why: error.to_string() })
            }
        };
        self.drive_sending(transfer_id, reader, SendEvent::CopyDone { result, fenced });
    }

    /// A push that never began: nothing of it can land.
    pub(super) fn push_impossible(&mut self, transfer_id: TransferId, reader: usize, why: String) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        let place = sending.readers[reader].place.as_ref();
        let path = place.map_or("no path", |place| place.path.name()).to_owned();
        let result = Err(TransferFailure::Copy { peer: self.shared.engine_id.clone(), path, why });
        self.drive_sending(transfer_id, reader, SendEvent::CopyDone { result, fenced: true });
    }

    pub(super) fn cancel_push(&mut self, transfer_id: TransferId, reader: usize) {
        let Some(sending) = self.sending.get(&transfer_id) else { return };
        match &sending.readers[reader].push {
            Some((link, ticket)) => link.cancel(*ticket),
            None => self.push_impossible(transfer_id, reader, "stopped before it began".to_owned()),
        }
    }
}
