//! Permission for a peer to write into our regions, and its end.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Names a grant to the peer that may use it. Drawn at random, so that a pusher cannot guess another's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GrantToken(pub [u8; 16]);

impl GrantToken {
    /// A token nobody can guess.
    pub fn random() -> Self {
        Self(rand::random())
    }
}

/// What is known once a grant is revoked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// No write under the grant lands any more.
    Fenced,
    /// The path cannot hold a peer back (`shm`: the peer writes our memory itself). The blocks are free once the peer
    /// has said that the transfer is over, or once [`super::Link::peer_gone`].
    AskPeer,
}

/// An end of one path's bookkeeping: makes the grant invalid and waits out the write in progress, which is bounded.
pub(super) type Revoke = Box<dyn FnOnce() + Send>;

/// A peer's permission to push. Revoked when dropped (KV-7).
#[must_use = "dropping a grant revokes it"]
pub struct Grant {
    token: GrantToken,
    fence: Fence,
    revoke: Option<Revoke>,
}

impl Grant {
    /// A grant that `revoke` takes back for certain.
    pub(super) fn fenced(token: GrantToken, revoke: Revoke) -> Self {
        Self { token, fence: Fence::Fenced, revoke: Some(revoke) }
    }

    /// A grant on a path that cannot hold the peer back.
    pub(super) fn unenforced(token: GrantToken) -> Self {
        Self { token, fence: Fence::AskPeer, revoke: None }
    }

    /// The same where some of a peer's writes pass this process by: taking it back ends those that do not.
    pub(super) fn asking_the_peer(mut self) -> Self {
        self.fence = Fence::AskPeer;
        self
    }

    /// What the pusher cites.
    pub fn token(&self) -> GrantToken {
        self.token
    }

    /// What [`Grant::revoke`] will answer: known from the start, as it depends on the path alone.
    pub fn fence(&self) -> Fence {
        self.fence
    }

    /// Takes the permission back. With [`Fence::Fenced`] no write of the peer lands once this has returned.
    pub fn revoke(self) -> Fence {
        self.fence
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        if let Some(revoke) = self.revoke.take() {
            revoke();
        }
    }
}

impl std::fmt::Debug for Grant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grant").field("fence", &self.fence).finish_non_exhaustive()
    }
}
