//! The run's secret, and how two processes prove that they know it.
#![forbid(unsafe_code)]
