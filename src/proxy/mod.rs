//! The HTTP front: routes, pools, both legs, streaming, admin.
#![forbid(unsafe_code)]
