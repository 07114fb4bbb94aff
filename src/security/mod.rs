//! The run's secret, and how two processes prove that they know it.
//!
//! The launcher makes one [`Secret`] per run and hands it to its children by a 0600 file. It keys the mutual challenge of
//! every control connection ([`prove`], [`proves`]), the seal on transfer parameters, and nothing that leaves in the clear.
#![forbid(unsafe_code)]

mod challenge;
mod secret;
mod token;

pub use challenge::{NONCE_BYTES, Nonce, PROOF_BYTES, Proof, is_sealed, nonce, prove, proves, seal};
pub use secret::{SECRET_FILE_ENV, Secret, SecretError};
pub use token::tokens_equal;
