//! The HTTP front: OpenAI requests in, both legs out, the worker's bytes back.
//!
//! A request comes in at `server`, straight to `hot` if it generates, else to `routes`. `plan` reads off its body what is
//! to be done, `legs` does it on workers that `pool` picks, in the words of `dialect`, over `upstream`; `stream` carries
//! the answer back. `flight` is the account of one request, `abort` what happens to KV that nobody will fetch. `probe` and
//! `health` know which workers serve, `watch` shows all of it to people. `weights` gives new weights to all of them at once.
//!
//! What is promised (docs/architecture.md): PX-1 in `openai::splice`, PX-2 in `legs` and `health`, PX-3 wherever something
//! waits, PX-4 in `flight`, `stream` and `link`, PX-5 in `legs`, KV-9 in `abort`.
#![forbid(unsafe_code)]

mod abort;
mod access;
mod admin;
mod affinity;
mod ask;
mod body;
mod dialect;
mod doubt;
mod failure;
mod fleet_metrics;
mod flight;
mod front;
mod handover;
mod health;
mod hot;
mod legs;
mod link;
mod merge;
mod metrics;
mod plan;
mod pool;
mod probe;
mod rendezvous;
mod routes;
mod server;
mod shared;
mod stream;
mod trace;
mod upstream;
mod watch;
mod weights;
mod worker;

pub use dialect::{Connector, REQUEST_IDS_LAST};
pub use front::{Drained, FILES_OF_OTHERS, Mode, ProxyError, ProxyHandle, ProxySetup, serve};
pub use worker::WorkerAddress;
