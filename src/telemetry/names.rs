//! The name of every metric, in one place. Label values are bounded: worker names, paths, outcomes; never a request id.
