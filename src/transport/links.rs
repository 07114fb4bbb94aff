//! The links that a path has given out, so that closing the path closes them.
#![forbid(unsafe_code)]

use std::sync::{Arc, Mutex, Weak};

use super::Link;
use super::flight::locked;

/// Known by weak references: a link that nobody holds has closed itself.
pub(super) struct Links<L>(Mutex<Vec<Weak<L>>>);

impl<L> Default for Links<L> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<L: Link> Links<L> {
    /// Remembers a link.
    pub(super) fn keep(&self, link: &Arc<L>) {
        let mut links = locked(&self.0);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(link));
    }

    /// Closes all of them.
    pub(super) fn close(&self) {
        let links = std::mem::take(&mut *locked(&self.0));
        links.iter().filter_map(Weak::upgrade).for_each(|link| link.close());
    }
}
