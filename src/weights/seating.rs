//! A source's side of a group: who is in it, and its own part in every broadcast.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use super::casts::{Held, chosen, is_same, seats};
use super::messages::{Group, Said, Wish};
use super::paths::Paths;
use crate::control::{Answerer, to_body};
use crate::memory::Region;
use crate::transport::{Caster, Ended, NcclSetup, Seat, group_name};

/// Where a source is with its group.
enum State {
    /// Receivers come, and say what they bring.
    Gathering,
    Making(Held),
    Casting(Held),
    /// There is none: everybody pulls.
    Off,
}

pub(super) struct Seating {
    paths: Paths,
    setup: NcclSetup,
    region: Arc<Region>,
    state: State,
    wishes: BTreeMap<u32, Wish>,
    waiting: BTreeMap<u32, Answerer>,
    /// Buckets that were posted.
    posted: u64,
}

impl Seating {
    /// For buckets in `region`, if a group can be had with it.
    pub(super) fn new(paths: &Paths, region: &Arc<Region>) -> Option<Self> {
        let setup = paths.nccl(region.device())?;
        let (paths, region) = (paths.clone(), Arc::clone(region));
        let (wishes, waiting) = (BTreeMap::new(), BTreeMap::new());
        Some(Self { paths, setup, region, state: State::Gathering, wishes, waiting, posted: 0 })
    }

    /// A receiver asks for a seat.
    pub(super) fn asked(&mut self, receiver: u32, wish: Wish, answerer: Answerer) {
        if !matches!(self.state, State::Gathering) {
            return answerer.answer(to_body(&Said::Seated(None)));
        }
        self.wishes.insert(receiver, wish);
        self.waiting.insert(receiver, answerer);
    }

    /// Decides, once as many have said what they bring as there are receivers, or pull. `made` is told when the group is there.
    pub(super) fn decide(&mut self, expected: Option<u32>, pulling: usize, made: impl FnOnce() -> Ended) {
        let all = expected.is_some_and(|expected| self.wishes.len() + pulling >= expected as usize);
        if !all || !matches!(self.state, State::Gathering) {
            return;
        }
        let own = self.region.device().and_then(|device| device.uuid().ok());
        let members = chosen(&self.wishes, own);
        let held = self.paths.casts.take_any();
        let (state, told) = match held.filter(|held| is_same(held, &members)) {
            _ if members.is_empty() => (State::Off, BTreeMap::new()),
            Some(held) => {
                let told = seats(&members, held.token, &[]);
                (State::Casting(held), told)
            }
            None => match self.make(&members, made()) {
                Ok((held, told)) => (State::Making(held), told),
                Err(error) => {
                    tracing::warn!(%error, "weights are pulled: there is no group to broadcast them to");
                    (State::Off, BTreeMap::new())
                }
            },
        };
        self.state = state;
        for (receiver, answerer) in std::mem::take(&mut self.waiting) {
            answerer.answer(to_body(&Said::Seated(told.get(&receiver).cloned())));
        }
    }

    fn make(
        &self,
        members: &[(u32, Wish)],
        made: Ended,
    ) -> Result<(Held, BTreeMap<u32, Group>), crate::transport::TransportError> {
        let (token, name) = (rand::random(), group_name(&self.setup)?);
        let told = seats(members, token, &name);
        let ranks = u32::try_from(members.len() + 1).unwrap_or(u32::MAX);
        let seat = Seat { name, rank: 0, ranks, device: self.region.device().cloned(), greets: false };
        let caster = Arc::new(Caster::start(&self.setup, seat, made)?);
        tracing::info!(ranks, "a group for weights is being made");
        Ok((Held { token, caster, members: members.iter().map(|(_, wish)| wish.process).collect() }, told))
    }

    pub(super) fn made(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Off) {
            State::Making(held) => State::Casting(held),
            other => other,
        };
    }

    /// Something went wrong: the group is ended.
    pub(super) fn broke(&mut self) {
        self.state = State::Off;
    }

    /// Posts what is packed and was not posted: bucket, where it lies, its bytes.
    pub(super) fn post(&mut self, packed: u64, place: impl Fn(u64) -> (u64, u64), ended: impl Fn() -> Ended) {
        let State::Casting(held) = &self.state else { return };
        while self.posted < packed {
            let (at, len) = place(self.posted);
            let deadline = Instant::now() + self.paths.stall_max();
            if len > 0 {
                held.caster.cast(&self.region, at, len, deadline, ended());
            }
            self.posted += 1;
        }
    }

    /// All have everything: the group is there for the next time.
    pub(super) fn keep(&mut self) {
        if let State::Casting(held) = std::mem::replace(&mut self.state, State::Off) {
            self.paths.casts.put(held);
        }
    }
}
