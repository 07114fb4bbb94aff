//! Every setting: its unit, its default, what it costs.
#![forbid(unsafe_code)]

mod kv;
mod proxy;
mod reference;

pub use kv::{DigestPolicy, KvConfig, LoadFailurePolicy, Path};
pub use proxy::{Dispatch, Policy, ProxyConfig};
pub use reference::{ReferenceConfig, ReferenceLayout};
