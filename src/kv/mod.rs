//! Prefill-to-decode channels.
#![forbid(unsafe_code)]
