//! The control connection: frames, handshake, liveness, request and answer.
#![forbid(unsafe_code)]
