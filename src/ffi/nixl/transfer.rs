//! A peer that an agent knows, and copies between its memory and ours.

use std::ffi::{CString, c_int};
use std::ptr;
use std::rc::Rc;

use super::agent::{MemoryType, Shared, Span, to_usize};
use super::library::{Handle, IN_PROGRESS, Library, NixlError, SUCCESS};

/// Which way the bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the peer's memory into ours.
    Read,
    /// From our memory into the peer's.
    Write,
}

/// How far a transfer has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    Moving,
    /// All bytes are there, at either end.
    Done,
}

/// A peer that an agent knows. When the last that holds it is dropped, it is forgotten and can be loaded anew.
pub struct Remote {
    pub(super) shared: Rc<Shared>,
    pub(super) name: CString,
}

/// One request that was started. Dropping one that is not done abandons it: until its [`super::Agent`] is gone too, its bytes
/// may still land.
pub struct Transfer {
    request: Handle,
    // Dropped after the request, which the library would otherwise free by itself when asked about.
    remote: Rc<Remote>,
}

/// A descriptor list, while a request is made from it.
struct Descriptors<'a> {
    library: &'a Library,
    list: Handle,
}

impl Remote {
    /// The agent's name, by its metadata.
    pub fn name(&self) -> std::borrow::Cow<'_, str> {
        self.name.to_string_lossy()
    }

    /// Starts copying each of `pairs`, (ours, theirs). Refused where ours is not registered or theirs was not told.
    pub fn start(
        self: &Rc<Self>,
        direction: Direction,
        ours: MemoryType,
        theirs: MemoryType,
        pairs: &[(Span, Span)],
    ) -> Result<(Transfer, Progress), NixlError> {
        let Shared { library, agent, .. } = *self.shared;
        let local = Descriptors::of(library, ours, pairs.iter().map(|(ours, _)| *ours))?;
        let remote = Descriptors::of(library, theirs, pairs.iter().map(|(_, theirs)| *theirs))?;
        let operation: c_int = match direction {
            Direction::Read => 0,
            Direction::Write => 1,
        };
        let mut request: Handle = ptr::null_mut();
        let (name, none) = (self.name.as_ptr(), ptr::null_mut());
        // SAFETY: agent and lists are live, the name is terminated; writes one handle. The library holds every descriptor
        // against the memory that was registered here and told by the peer, and copies what it keeps of the lists.
        let code = unsafe {
            (library.create_request)(agent, operation, local.list, remote.list, name, &raw mut request, none)
        };
        Library::check("nixl_capi_create_xfer_req", code)?;
        // From here on dropping it releases the request.
        let transfer = Transfer { request, remote: self.clone() };
        // SAFETY: both are live, the peer is still known, and the request is posted once. Our memory stays registered, and so
        // kept alive, until the agent is gone, which the transfer holds.
        let code = unsafe { (library.post_request)(agent, request, none) };
        progress("nixl_capi_post_xfer_req", code).map(|progress| (transfer, progress))
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // SAFETY: the agent is live and the name terminated. Every request to this peer held `self`, so none is left. A peer
        // that the backend forgot by itself is answered with a status, and is what was wanted.
        unsafe { (self.shared.library.invalidate_remote)(self.shared.agent, self.name.as_ptr()) };
    }
}

impl Transfer {
    /// Whether it is done. An error is final: nothing more is asked of it then.
    pub fn poll(&mut self) -> Result<Progress, NixlError> {
        let Shared { library, agent, .. } = *self.remote.shared;
        // SAFETY: both are live, and the peer is still known, because the transfer holds it.
        let code = unsafe { (library.request_status)(agent, self.request) };
        progress("nixl_capi_get_xfer_status", code)
    }
}

impl Drop for Transfer {
    fn drop(&mut self) {
        let Shared { library, agent, .. } = *self.remote.shared;
        // SAFETY: both are live; the request's own part is freed here, whatever its state.
        unsafe { (library.release_request)(agent, self.request) };
        // SAFETY: frees the handle, or, where the library would not release the request, refuses and leaves both to it.
        unsafe { (library.destroy_request)(self.request) };
    }
}

fn progress(call: &'static str, code: c_int) -> Result<Progress, NixlError> {
    match code {
        SUCCESS => Ok(Progress::Done),
        IN_PROGRESS => Ok(Progress::Moving),
        code => Err(NixlError::Call { call, code }),
    }
}

impl<'a> Descriptors<'a> {
    fn of(library: &'a Library, kind: MemoryType, spans: impl Iterator<Item = Span>) -> Result<Self, NixlError> {
        let mut list: Handle = ptr::null_mut();
        // SAFETY: writes one handle.
        let code = unsafe { (library.create_descriptors)(kind.code(), &raw mut list) };
        Library::check("nixl_capi_create_xfer_dlist", code)?;
        let descriptors = Self { library, list };
        for Span { address, len, device } in spans {
            // SAFETY: the list is live; numbers only.
            let code = unsafe { (library.descriptors_add)(list, to_usize(address), to_usize(len), device) };
            Library::check("nixl_capi_xfer_dlist_add_desc", code)?;
        }
        Ok(descriptors)
    }
}

impl Drop for Descriptors<'_> {
    fn drop(&mut self) {
        // SAFETY: live, and nobody else has it.
        unsafe { (self.library.destroy_descriptors)(self.list) };
    }
}
