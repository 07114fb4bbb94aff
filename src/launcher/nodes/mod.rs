//! Several hosts: which node this is, how nodes find each other, and who is there.
//!
//! Every node runs `pdlink up` on the same configuration, and each finds the same workers in it ([`crate::topology::plan()`]).
//! What only a node itself knows, the ports it took and the address of its KV network, it tells node 0 over a control connection:
//!
//! ```text
//! node n                                             node 0
//!   hello (rank, build, the shape of the plan)  ──►
//!                                               ◄──  welcome (ports it had before, if it was here before)
//!   share (where each of its workers listens)   ──►
//!   worker serves | is away, …                  ──►
//!                                               ◄──  ready, end
//!   leaving (asked to end)                      ──►
//!                                               ◄──  drained
//! ```
//!
//! [`membership::Membership`] is the pure machine behind node 0; [`hub`] and [`link`] carry the messages.

pub mod hub;
pub mod interfaces;
pub mod link;
pub mod membership;
pub mod messages;
pub mod ports;
pub mod rank;
pub mod rdma;
pub mod site;
