//! JSON shapes that the engine and the proxy share: errors, header names, the body scanner.
#![forbid(unsafe_code)]

mod error;
pub mod headers;
pub mod scan;
pub mod splice;

pub use error::{ApiError, ErrorBody, ErrorInfo};
