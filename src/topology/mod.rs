//! Configuration to plan: workers, GPUs, ports, command lines.
#![forbid(unsafe_code)]
