//! What two runtimes say to each other, in the bodies of control notices.
//!
//! Decode opens the connection. Its hello and prefill's carry a [`PeerInfo`] each. Then, for one transfer:
//!
//! ```text
//! pull (GET)                                   push (PUT, PUT_ASYNC)
//!   decode: Claim ──►    ◄── Granted             decode: Claim ──►    ◄── Granted
//!   decode copies (Copying ──►, if a digest       decode: Place ──►    prefill copies
//!           is wanted: prefill begins its own)    ◄── Pushed           decode checks
//!   decode: Landed ──►   ◄── Confirmed            decode: Accepted ──►
//! ```
//!
//! Where decode can look at prefill's memory, the grant names a word there that stands for as long as the blocks are held. Then
//! decode looks at it after its copy, and waits for no `Confirmed`; what the word does not say is asked.
//!
//! A decode runtime says this to every prefill runtime that it reads. One that nobody reads gets `Ended` at once, from one
//! decode runtime, and no claim.
//!
//! With concurrent dispatch (push only) the claim may come while prefill computes. Prefill then answers `Begun`, decode
//! says `Place` at once, prefill pushes part after part, and `Granted` follows when prefill has ended.
//!
//! `Renew` goes out for all claimed transfers at once. `Ended` may come from decode at any time, `Refused` and `Over` from
//! prefill.

use serde::{Deserialize, Serialize};

use super::{BlockId, Geometry, Layout, LayoutError, MemoryMap, TransferFailure};
use crate::config::{KvSendType, Path};
use crate::control::{TransferId, WireError, from_body};
use crate::transport::{BoardAt, GrantToken, Offer, Word};

/// What a runtime tells its peers of itself, in the hello.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PeerInfo {
    pub geometry: Geometry,
    pub map: MemoryMap,
    /// The paths that reach its memory.
    pub offers: Vec<Offer>,
    pub send_type: KvSendType,
    /// Prefill: where the words of its grants are.
    pub board: Option<BoardAt>,
}

/// From decode to prefill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPrefill {
    Claim(Claim),
    /// Keeps the leases of these transfers up.
    Renew(Vec<TransferId>),
    /// Pull: the copy has begun, and a digest of the tokens from here on, for each KV group, will be wanted.
    Copying {
        transfer_id: TransferId,
        from: Vec<u32>,
    },
    /// Pull: the copy is done. Were the blocks held throughout? (KV-3)
    Landed {
        transfer_id: TransferId,
        from: Vec<u32>,
        digest: Option<u64>,
    },
    /// Push: write here.
    Place(Place),
    /// Push: what was pushed is right. Prefill may free its blocks.
    Accepted(TransferId),
    /// Decode wants no more of it.
    Ended {
        transfer_id: TransferId,
        how: Ending,
    },
}

/// Decode's claim: everything that its parameters say, to be held against what was offered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    pub transfer_id: TransferId,
    pub basis: Basis,
    /// Of decode itself.
    pub decode_weight_version: u64,
    pub tokens: u32,
}

/// What a claim is made by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Basis {
    /// Prefill's own parameters, and what they say.
    Params { incarnation: u64, geometry_digest: u64, weight_version: Option<u64> },
    /// The router's word that prefill is at it (concurrent dispatch), and the fingerprint of decode's own prompt.
    Early { fingerprint: u64 },
}

/// Where prefill is to write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    pub transfer_id: TransferId,
    /// Decode's blocks, up to the last token, for each KV group.
    pub blocks: Vec<Vec<BlockId>>,
    pub first_token: u32,
    /// For each KV group the first token that moves.
    pub from: Vec<u32>,
    pub path: Path,
    pub grant: GrantToken,
    /// Whether prefill is to send a digest along (KV-4).
    pub digest: bool,
}

/// Why decode wants no more of a transfer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// It has the KV already.
    Released,
    /// The client left.
    Aborted,
    Failed(TransferFailure),
}

/// From prefill to decode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDecode {
    /// The claim fits, and the prompt is being computed. Decode may name its blocks; the grant follows.
    Begun {
        transfer_id: TransferId,
        weight_version: u64,
    },
    Granted(Granted),
    /// The claim, or a later message, is refused; nothing is held for decode.
    Refused {
        transfer_id: TransferId,
        failure: TransferFailure,
    },
    /// Pull: the blocks were held throughout.
    Confirmed {
        transfer_id: TransferId,
        digest: Option<u64>,
    },
    /// Push: all is written, from blocks that were held throughout.
    Pushed {
        transfer_id: TransferId,
        digest: Option<u64>,
    },
    /// Push: it failed or was stopped. Unless `fenced`, only decode's own grant keeps late writes out.
    Over {
        transfer_id: TransferId,
        how: Ending,
        fenced: bool,
    },
    /// Prefill holds the blocks no more: its lease ended or its side was aborted.
    Ended {
        transfer_id: TransferId,
        how: Ending,
    },
}

/// What prefill grants: from here on decode believes this, and nothing of the parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Granted {
    pub transfer_id: TransferId,
    /// Prefill's blocks, up to the last token, for each KV group.
    pub blocks: Vec<Vec<BlockId>>,
    pub tokens: u32,
    pub weight_version: u64,
    pub lease_ms: u64,
    /// Pull: there for as long as the blocks are held (KV-3).
    pub word: Option<Word>,
}

impl ToPrefill {
    /// Which transfer it is about; `None` for renewals.
    pub fn transfer_id(&self) -> Option<TransferId> {
        match self {
            Self::Claim(Claim { transfer_id, .. })
            | Self::Place(Place { transfer_id, .. })
            | Self::Copying { transfer_id, .. }
            | Self::Landed { transfer_id, .. }
            | Self::Accepted(transfer_id)
            | Self::Ended { transfer_id, .. } => Some(*transfer_id),
            Self::Renew(_) => None,
        }
    }
}

impl ToDecode {
    pub fn transfer_id(&self) -> TransferId {
        match self {
            Self::Granted(Granted { transfer_id, .. })
            | Self::Begun { transfer_id, .. }
            | Self::Refused { transfer_id, .. }
            | Self::Confirmed { transfer_id, .. }
            | Self::Pushed { transfer_id, .. }
            | Self::Over { transfer_id, .. }
            | Self::Ended { transfer_id, .. } => *transfer_id,
        }
    }
}

/// Why a peer's description of itself was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    #[error("its description cannot be read: {0}")]
    Wire(#[from] WireError),
    #[error("its KV cache is described wrongly: {0}")]
    Layout(#[from] LayoutError),
}

/// What a peer said of itself, checked.
#[derive(Debug)]
pub struct CheckedInfo {
    pub layout: Layout,
    pub offers: Vec<Offer>,
    pub send_type: KvSendType,
    pub board: Option<BoardAt>,
}

impl PeerInfo {
    /// Reads what a peer said of itself, and checks every number of it.
    pub fn read(payload: &[u8]) -> Result<CheckedInfo, InfoError> {
        let Self { geometry, map, offers, send_type, board } = from_body(payload)?;
        Ok(CheckedInfo { layout: Layout::new(geometry, map)?, offers, send_type, board })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::testing::{Arrangement, Shape};
    use super::*;
    use crate::control::to_body;

    proptest! {
        #[test]
        fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = from_body::<ToPrefill>(&bytes);
            let _ = from_body::<ToDecode>(&bytes);
            let _ = PeerInfo::read(&bytes);
        }

        #[test]
        fn damaged_descriptions_never_panic(at in any::<prop::sample::Index>(), to in any::<u8>(), cut in any::<prop::sample::Index>()) {
            let (geometry, map) = Shape::default().describe(Arrangement::SplitKv);
            let info = PeerInfo { geometry, map, offers: Vec::new(), send_type: KvSendType::Get, board: None };
            let mut bytes = to_body(&info).to_vec();
            let at = at.index(bytes.len());
            bytes[at] = to;
            let _ = PeerInfo::read(&bytes);
            let _ = PeerInfo::read(&bytes[..cut.index(bytes.len())]);
        }
    }
}
