//! Scenarios, statistics, tables.
#![forbid(unsafe_code)]
