//! KV that a GPU is still writing: what is told of it waits for a mark in the engine's stream.
//!
//! The engine goes on while its kernels run, and must not wait for them; the runtime's thread must not either. So orders of
//! begun transfers pass through a thread that waits for each one's mark, and keeps them in order. Where the KV is in host
//! memory there is no such thread: what is told is there.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::core::{Command, Event};
use crate::control::TransferId;
use crate::transport::StreamMark;

/// One order, and what it waits for.
struct Order {
    mark: Option<StreamMark>,
    command: Command,
    /// What is given up if the GPU fails.
    transfers: Vec<TransferId>,
}

/// The thread, and the way to it.
pub(super) struct Marks {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<()>>,
}

impl Marks {
    pub(super) fn start(events: tokio::sync::mpsc::UnboundedSender<Event>) -> std::io::Result<Self> {
        let (orders, queue) = channel();
        let thread =
            std::thread::Builder::new().name("pdlink-kv-marks".to_owned()).spawn(move || run(&queue, &events))?;
        Ok(Self { orders: Some(orders), thread: Some(thread) })
    }

    /// Passes `command` on once the GPU has come to `mark`. False if the thread is gone.
    pub(super) fn tell(&self, mark: Option<StreamMark>, transfers: Vec<TransferId>, command: Command) -> bool {
        self.orders.as_ref().is_some_and(|orders| orders.send(Order { mark, command, transfers }).is_ok())
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        self.orders = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that waits for the GPU panicked");
        }
    }
}

fn run(queue: &Receiver<Order>, events: &tokio::sync::mpsc::UnboundedSender<Event>) {
    while let Ok(Order { mark, command, transfers }) = queue.recv() {
        let Some(Err(error)) = mark.as_ref().map(StreamMark::wait) else {
            let _ = events.send(Event::Command(command));
            continue;
        };
        tracing::error!(%error, "the GPU failed while it computed KV");
        for transfer_id in transfers {
            let _ = events.send(Event::Command(Command::Abort(transfer_id)));
        }
        // What the engine hands over it hears of again, whatever has become of it (KV-1).
        if matches!(command, Command::Offer { .. }) {
            let _ = events.send(Event::Command(command));
        }
    }
}
