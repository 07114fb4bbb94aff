//! Processes: hold ports, spawn, ready, watch, restart, drain.
#![forbid(unsafe_code)]
