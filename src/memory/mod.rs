//! Bytes with an owner.
