//! vLLM's KV memory as regions: the one place of this crate that has unsafe code.

use std::ptr::NonNull;
use std::sync::Arc;

use pdlink::memory::Region;
use pyo3::prelude::*;

use crate::errors;

/// One stretch of host memory: its address, its length in bytes, and the Python object that owns it.
pub(crate) type Memory = (usize, usize, Py<PyAny>);

/// Borrows each stretch for as long as its region lives.
pub(crate) fn borrow(memory: Vec<Memory>) -> PyResult<Vec<Arc<Region>>> {
    memory.into_iter().map(one).collect()
}

fn one((address, len, owner): Memory) -> PyResult<Arc<Region>> {
    let ptr = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(address))
        .filter(|_| len > 0)
        .ok_or_else(|| errors::settings("a region", &"it has no bytes"))?;
    // SAFETY: the caller takes address and length from one torch storage in host memory and passes that storage as the
    // owner. The region holds a reference to it, and torch never moves or shrinks a storage that is referenced: the
    // connector lets go of the link before vLLM's sleep mode takes the pages away. No Rust code makes a reference into it.
    Ok(unsafe { Region::borrowed(ptr, len, Box::new(owner)) })
}
