//! What a receiver of weights and their source say to each other, over a control connection that the receiver opens.
//!
//! ```text
//! receiver                               source
//!   Join              ──►       ◄──        Head: how many tensors and buckets, over which paths
//!   Tensors(from)     ──►       ◄──        Tensors: the manifest, in parts
//!   Seat              ──►       ◄──        Seated: whether it gets the buckets together with others, over nccl
//!   Bucket(k)         ──►       ◄──        Ready: where it lies, and the digests of the tensors that end in it
//!      (pulls the bytes over the path, or takes part in their broadcast)
//!   Taken(k)          ──►                  (the source may use the bucket's memory again)
//! ```
//!
//! The last word is Ended, answered by Ended. All but `Taken` are requests: the answer to `Bucket` comes once the bucket is there.

use serde::{Deserialize, Serialize};

use super::digest::TensorDigest;
use super::manifest::Tensor;
use crate::transport::Offer;

/// Tensors in one part of a manifest. With names of the longest kind that is just half a frame.
pub(super) const PART_TENSORS: usize = 2048;

/// From a receiver, as a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Ask {
    Join(Join),
    /// The manifest, from this tensor on.
    Tensors(u32),
    /// Whether this receiver gets its buckets together with others. Answered once all receivers have come.
    Seat(Wish),
    Bucket(Bucket),
    /// Everything is here and right. Answered, so that all that was said before has come too.
    Ended,
}

/// What a receiver brings to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wish {
    pub(super) process: u64,
    pub(super) gpu: [u8; 16],
    /// The group that it is in still.
    pub(super) holds: Option<u64>,
}

/// A seat in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Group {
    pub(super) token: u64,
    /// NCCL's, of a group that is to be made; empty: it is there.
    pub(super) name: Vec<u8>,
    pub(super) rank: u32,
    pub(super) ranks: u32,
}

/// A bucket that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Bucket {
    pub(super) number: u64,
    /// The chosen path moves host memory, whatever the source packs in.
    pub(super) on_host: bool,
}

/// Who wants what.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Join {
    pub(super) version: u64,
    /// Which of how many.
    pub(super) receiver: u32,
    pub(super) receivers: u32,
}

/// From a receiver, as a notice: the bytes of this bucket are with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Taken(pub(super) u64);

/// From a source, as an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Said {
    Head(Head),
    Tensors(Vec<Tensor>),
    /// `None`: it pulls.
    Seated(Option<Group>),
    Ready(Ready),
    Ended,
    Refused(String),
}

/// What the source has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    pub(super) version: u64,
    pub(super) tensors: u32,
    pub(super) bucket_bytes: u64,
    pub(super) offers: Vec<Offer>,
}

/// A bucket that can be pulled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ready {
    /// Where it begins in the source's one region.
    pub(super) at: u64,
    /// Of the tensors that end in it, in order.
    pub(super) digests: Vec<TensorDigest>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::manifest::{Dtype, Manifest};
    use super::*;
    use crate::control::{FRAME_BYTES_MAX, from_body, to_body};

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let _ = from_body::<Ask>(&bytes);
            let _ = from_body::<Taken>(&bytes);
            if let Ok(Said::Tensors(tensors)) = from_body::<Said>(&bytes) {
                let _ = Manifest::new(tensors);
            }
        }

        #[test]
        fn damaged_manifests_never_panic(
            sizes in prop::collection::vec(any::<u64>(), 1..6), at in any::<prop::sample::Index>(), to in any::<u8>()
        ) {
            let tensor = |(at, &size): (usize, &u64)| {
                Tensor { name: format!("layer.{at}"), dtype: Dtype::BF16, shape: vec![size, 3] }
            };
            let said = Said::Tensors(sizes.iter().enumerate().map(tensor).collect());
            let mut bytes = to_body(&said).to_vec();
            prop_assert_eq!(from_body::<Said>(&bytes), Ok(said));
            let at = at.index(bytes.len());
            bytes[at] = to;
            if let Ok(Said::Tensors(tensors)) = from_body::<Said>(&bytes) {
                let _ = Manifest::new(tensors);
            }
        }
    }

    #[test]
    fn a_part_with_the_longest_names_fits_a_frame() {
        let name = "n".repeat(super::super::manifest::NAME_BYTES_MAX);
        let tensor = Tensor { name, dtype: Dtype::U64, shape: vec![u64::MAX; super::super::manifest::DIMENSIONS_MAX] };
        let body = to_body(&Said::Tensors(vec![tensor; PART_TENSORS]));
        assert!(body.len() < FRAME_BYTES_MAX, "{} bytes", body.len());
    }
}
