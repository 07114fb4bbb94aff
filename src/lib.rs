//! pdlink, in layer order. Each module may use the rows above it in `docs/architecture.md`'s table only; `tests/tidy.rs`
//! holds that.

// Test support is written against the public names, and shared with `tests/`.
#[cfg(test)]
extern crate self as pdlink;

// Layer 0: plain data and words that everything shares.
pub mod config;
pub mod ffi;
pub mod openai;
pub mod security;
pub mod telemetry;

// Layer 1: how two processes of ours talk.
pub mod control;

// The data plane: bytes, paths, KV channels, the reference engine.
pub mod engine;
pub mod kv;
pub mod memory;
pub mod transport;
pub mod weights;

// The control plane: what runs where, and the front door.
pub mod launcher;
pub mod proxy;
pub mod topology;

// Top: what a person runs.
pub mod bench;
pub mod cli;
pub mod doctor;
pub mod render;
