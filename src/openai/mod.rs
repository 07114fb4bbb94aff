//! What the engine's and the proxy's HTTP share: errors, also for heads that hyper refuses; header names; the body scanner.
#![forbid(unsafe_code)]

mod error;
pub mod headers;
mod refusal_io;
pub mod scan;
pub mod splice;

pub use error::{ApiError, ErrorBody, ErrorInfo};
pub use refusal_io::RefusalIo;
