//! The decode workers that are connected to this prefill worker.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use super::core::{Core, Event};
use super::messages::{CheckedInfo, PeerInfo, ToDecode, ToPrefill};
use super::shares::{Scope, Split};
use super::{Layout, PairPlan, TransferFailure};
use crate::config::Path;
use crate::control::{Connection, ControlError, Hello, Inbound, TransferId, from_body, to_body};
use crate::telemetry::Side;
use crate::transport::{Export, Link, Offer, TransportError};

/// One decode worker.
pub(super) struct Client {
    pub(super) connection: Connection,
    pub(super) engine_id: String,
    /// Its memory, or why the two workers do not fit (KV-6).
    pub(super) fit: Result<Fit, String>,
    /// Transfers that it has claimed.
    pub(super) transfers: HashSet<TransferId>,
    links: HashMap<Path, PushLink>,
}

/// A decode worker's memory.
pub(super) struct Fit {
    layout: Arc<Layout>,
    offers: Vec<Offer>,
    /// How its worker spreads ranks over runtimes, and which of them it is.
    pub(super) split: Split,
    pub(super) part: u32,
    /// What it reads here.
    pub(super) scope: Arc<Scope>,
}

/// How to push to a decode worker over one path.
enum PushLink {
    /// Being made; these transfers wait for it.
    Connecting(Vec<(TransferId, usize)>),
    Ready(Arc<dyn Link>, Arc<PairPlan>),
}

impl Client {
    /// Says who it is in failures and logs.
    pub(super) fn name(&self) -> String {
        format!("{} ({})", self.engine_id, self.connection.peer())
    }

    pub(super) fn tell(&self, message: &ToDecode) {
        // A connection that has ended says so by itself.
        let _ = self.connection.notify(to_body(message));
    }
}

/// What a push needs, if it is there yet.
pub(super) enum PushPath {
    Ready(Arc<dyn Link>, Arc<PairPlan>),
    Waiting,
    Impossible(String),
}

impl Core {
    pub(super) fn client_up(&mut self, client: u64, hello: &Hello, connection: Connection) {
        self.reap();
        let fit = PeerInfo::read(&hello.payload).map_err(|error| error.to_string()).and_then(|info| {
            let CheckedInfo { layout, offers, .. } = info;
            self.shared.layout.check_feeds(&layout).map_err(|error| error.to_string())?;
            let split = Split::of(&layout);
            let part = split.part_of(layout.held().start);
            let scope = Arc::new(Scope::given(&self.shared.layout, &layout));
            Ok(Fit { layout: Arc::new(layout), offers, split, part, scope })
        });
        let engine_id = hello.engine_id.clone();
        match &fit {
            Ok(_) => tracing::info!(peer = connection.peer(), %engine_id, "decode worker connected"),
            Err(why) => tracing::warn!(peer = connection.peer(), %engine_id, why, "decode worker does not fit"),
        }
        let links = HashMap::new();
        self.clients.insert(client, Client { connection, engine_id, fit, transfers: HashSet::new(), links });
        self.shared.metrics.peers(Side::Prefill, self.clients.len());
    }

    pub(super) fn client_says(&mut self, client: u64, inbound: Inbound) {
        let message = match inbound {
            Inbound::Notice(message) => message,
            Inbound::Request(..) => return self.reject_client(client, "a request where notices are due"),
            Inbound::Closed(error) => return self.client_down(client, &error),
        };
        match from_body::<ToPrefill>(&message.body) {
            Ok(message) => self.hear_client(client, message),
            Err(error) => self.reject_client(client, &error.to_string()),
        }
    }

    fn reject_client(&mut self, client: u64, why: &str) {
        if let Some(client) = self.clients.get(&client) {
            let peer = client.connection.peer().to_owned();
            client.connection.close(ControlError::Malformed { peer, why: why.to_owned() });
        }
    }

    /// KV-8: whatever the decode worker had claimed fails at once, and its memory is let go of.
    fn client_down(&mut self, client: u64, error: &ControlError) {
        let Some(gone) = self.clients.remove(&client) else { return };
        tracing::info!(engine_id = %gone.engine_id, %error, transfers = gone.transfers.len(), "decode worker gone");
        self.shared.metrics.peers(Side::Prefill, self.clients.len());
        self.shared.metrics.peer_failed(reason(error));
        let failure = TransferFailure::PeerLost { peer: gone.name(), why: error.to_string() };
        for transfer_id in gone.transfers {
            self.sending_peer_lost(transfer_id, client, &failure);
        }
        for link in gone.links.into_values() {
            if let PushLink::Ready(link, _) = link {
                self.close_link(link);
            }
        }
    }

    /// Closing waits for the piece in hand to be written, so it is done beside the loop.
    pub(super) fn close_link(&mut self, link: Arc<dyn Link>) {
        self.tasks.spawn_blocking(move || link.close());
    }

    /// Closes a link unless a transfer still needs it: to be told when its copy has ended, or that the peer's process
    /// has. The last of them closes it.
    pub(super) fn let_go(&mut self, link: Arc<dyn Link>) {
        if Arc::strong_count(&link) == 1 {
            self.close_link(link);
        }
    }

    /// The link and plan to push over, once they are there; `transfer_id` is woken then.
    pub(super) fn push_path(&mut self, client: u64, path: Path, transfer_id: TransferId, reader: usize) -> PushPath {
        let Some(entry) = self.clients.get_mut(&client) else {
            return PushPath::Impossible("the decode worker is gone".to_owned());
        };
        let fit = match &entry.fit {
            Ok(fit) => fit,
            Err(why) => return PushPath::Impossible(why.clone()),
        };
        match entry.links.get_mut(&path) {
            Some(PushLink::Ready(link, plan)) if link.usable() => {
                return PushPath::Ready(Arc::clone(link), Arc::clone(plan));
            }
            Some(PushLink::Connecting(waiting)) => {
                if !waiting.contains(&(transfer_id, reader)) {
                    waiting.push((transfer_id, reader));
                }
                return PushPath::Waiting;
            }
            Some(PushLink::Ready(..)) | None => {}
        }
        let offer = fit.offers.iter().find(|offer| offer.path == path);
        let transport = self.transports.iter().find(|transport| transport.path() == path);
        let (Some(offer), Some(transport)) = (offer, transport) else {
            return PushPath::Impossible(format!("{} is not offered by both sides", path.name()));
        };
        let (transport, layout) = (Arc::clone(transport), Arc::clone(&fit.layout));
        let export: Export = offer.export.clone();
        entry.links.insert(path, PushLink::Connecting(vec![(transfer_id, reader)]));
        let deadline = Instant::now() + self.kv.connect_timeout;
        let (events, ours) = (self.events.clone(), Arc::clone(&self.shared.layout));
        self.tasks.spawn_blocking(move || {
            let result = transport.connect(&export, deadline).map(|link| (link, PairPlan::new(&ours, &layout)));
            let result = match result {
                Ok((link, Ok(plan))) => Ok((link, Arc::new(plan))),
                // The two were found to fit when the worker connected.
                Ok((_, Err(error))) => Err(TransportError::BadExport { path: path.name(), reason: error.to_string() }),
                Err(error) => Err(error),
            };
            let _ = events.send(Event::ClientLink { client, path, result });
        });
        PushPath::Waiting
    }

    pub(super) fn client_link(
        &mut self,
        client: u64,
        path: Path,
        result: Result<(Arc<dyn Link>, Arc<PairPlan>), TransportError>,
    ) {
        self.reap();
        let Some(entry) = self.clients.get_mut(&client) else {
            if let Ok((link, _)) = result {
                self.close_link(link);
            }
            return;
        };
        let Some(PushLink::Connecting(waiting)) = entry.links.remove(&path) else { return };
        let failure = result.as_ref().err().map(ToString::to_string);
        match result {
            Ok((link, plan)) => {
                tracing::info!(peer = %entry.name(), path = path.name(), "path to push over chosen");
                entry.links.insert(path, PushLink::Ready(link, plan));
            }
            Err(error) => tracing::warn!(peer = %entry.name(), path = path.name(), %error, "cannot push"),
        }
        for (transfer_id, reader) in waiting {
            match &failure {
                None => self.start_push(transfer_id, reader),
                Some(why) => self.push_impossible(transfer_id, reader, why.clone()),
            }
        }
    }
}

/// A bounded name for what ended a connection.
pub(super) fn reason(error: &ControlError) -> &'static str {
    match error {
        ControlError::Connect { .. } | ControlError::TimedOut { .. } => "unreachable",
        ControlError::BadMagic { .. } | ControlError::Version { .. } | ControlError::WrongSecret { .. } => "handshake",
        ControlError::HungUp { .. } | ControlError::Closed { .. } => "closed",
        ControlError::Silent { .. } => "silent",
        ControlError::Oversize { .. } | ControlError::Malformed { .. } => "malformed",
        ControlError::Backlog { .. } | ControlError::Refused { .. } => "refused",
    }
}
