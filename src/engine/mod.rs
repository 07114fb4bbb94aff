//! The reference engine: a worker with no model whose every token depends on every byte of KV.
#![forbid(unsafe_code)]
