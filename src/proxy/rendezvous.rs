//! Where the runtimes of a prefill worker listen, which decode must be told before prefill can say so (concurrent dispatch).
//!
//! A worker says it in every answer of a prefill leg. So the first request to a worker goes sequentially, and those after it
//! concurrently; after a failure it is asked anew in the same way, since it may have moved.

use std::sync::{Arc, Mutex, PoisonError};

use serde::Deserialize;

/// What one prefill worker was last heard to say.
#[derive(Debug, Default)]
pub(crate) struct Rendezvous(Mutex<Option<Arc<[String]>>>);

/// The part of `kv_transfer_params` that is read here; all the rest is decode's business.
#[derive(Deserialize)]
struct Params {
    pdlink: Pdlink,
}

#[derive(Deserialize)]
struct Pdlink {
    ranks: Vec<Rank>,
}

#[derive(Deserialize)]
struct Rank {
    endpoint: String,
}

impl Rendezvous {
    /// `host:port` of the runtime of each rank, if the worker has been heard.
    pub(crate) fn known(&self) -> Option<Arc<[String]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes in what a prefill leg answered.
    pub(crate) fn learn(&self, params: &[u8]) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if known.is_none()
            && let Ok(Params { pdlink: Pdlink { ranks } }) = serde_json::from_slice(params)
            && !ranks.is_empty()
        {
            *known = Some(ranks.into_iter().map(|rank| rank.endpoint).collect());
        }
    }

    pub(crate) fn forget(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_taken_at_its_first_word_until_it_is_forgotten() {
        let rendezvous = Rendezvous::default();
        rendezvous.learn(br#"{"remote_host":"a"}"#);
        rendezvous.learn(br#"{"pdlink":{"ranks":[]}}"#);
        assert!(rendezvous.known().is_none());
        rendezvous
            .learn(br#"{"pdlink":{"version":2,"ranks":[{"endpoint":"a:1","incarnation":"0"},{"endpoint":"a:2"}]}}"#);
        rendezvous.learn(br#"{"pdlink":{"ranks":[{"endpoint":"b:1"}]}}"#);
        assert_eq!(rendezvous.known().as_deref(), Some(&["a:1".to_owned(), "a:2".to_owned()][..]));
        rendezvous.forget();
        assert!(rendezvous.known().is_none());
    }
}
