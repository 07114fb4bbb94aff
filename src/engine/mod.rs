//! The reference engine: a worker with no model whose every token depends on every byte of KV.
//!
//! `model.rs` says what KV is and which token follows from it, `kv_cache.rs` keeps it in paged blocks of real memory,
//! `scheduler/` owns all requests and blocks, `server/` is the OpenAI front. Equal prompts get equal answers whatever the
//! layout, block size and tensor parallelism, and whether the KV was computed here, found in the prefix cache or loaded
//! from a prefill worker: anything else is a bug in what moved the bytes.
#![forbid(unsafe_code)]

mod block_pool;
mod blocks;
mod chat;
mod front;
mod kv_cache;
mod layout;
mod metrics;
mod model;
mod output;
mod prefix_cache;
mod request;
mod scheduler;
mod sequence;
mod server;
mod tokenizer;
mod weights;
mod worker;

pub use layout::CacheError;
pub use worker::{Engine, EngineError, EngineSetup, WrapPath};
