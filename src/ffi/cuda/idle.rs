//! What takes the driver milliseconds to make, kept when nobody needs it any more for who needs the next.
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use super::driver::CudaError;

/// Most that lie idle. Those of one sender or receiver of weights, twice.
const IDLE_MAX: usize = 16;

/// A shelf of things of one kind.
pub(super) struct Idle<T: 'static>(Mutex<Vec<T>>);

impl<T> Idle<T> {
    pub(super) const fn new() -> Self {
        Self(Mutex::new(Vec::new()))
    }

    /// One that `fits`, or a new one.
    pub(super) fn take(
        &'static self,
        fits: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T, CudaError>,
    ) -> Result<Lent<T>, CudaError> {
        let found = {
            let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            idle.iter().position(fits).map(|at| idle.swap_remove(at))
        };
        Ok(Lent { item: Some(found.map_or_else(make, Ok)?), shelf: self })
    }

    fn put(&self, item: T) {
        let mut idle = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_MAX {
            return idle.push(item);
        }
        drop(idle);
        drop(item);
    }
}

/// One in use. Goes back to its shelf when dropped.
pub(super) struct Lent<T: 'static> {
    /// There until it is dropped.
    item: Option<T>,
    shelf: &'static Idle<T>,
}

impl<T> Lent<T> {
    /// It has failed, and is not for others. Not to be used afterwards.
    pub(super) fn discard(&mut self) {
        self.item = None;
    }
}

impl<T> Deref for Lent<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.item.as_ref().expect("there until it is dropped")
    }
}

impl<T> DerefMut for Lent<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.item.as_mut().expect("there until it is dropped")
    }
}

impl<T> Drop for Lent<T> {
    fn drop(&mut self) {
        if let Some(item) = self.item.take() {
            self.shelf.put(item);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(number: u32) -> Result<u32, CudaError> {
        Ok(number)
    }

    #[test]
    fn what_was_lent_is_lent_again_to_whom_it_fits() {
        static IDLE: Idle<u32> = Idle::new();
        drop(IDLE.take(|_| true, || made(7)).unwrap());
        assert_eq!(*IDLE.take(|item| *item == 8, || made(8)).unwrap(), 8, "another one lies there");
        let (one, other) =
            (IDLE.take(|item| *item == 7, || made(0)).unwrap(), IDLE.take(|_| true, || made(0)).unwrap());
        assert_eq!((*one, *other), (7, 8));
        assert_eq!(*IDLE.take(|_| true, || made(9)).unwrap(), 9, "both are in use");
    }

    #[test]
    fn what_failed_is_for_nobody_and_no_more_than_some_are_kept() {
        static IDLE: Idle<u32> = Idle::new();
        let mut failed = IDLE.take(|_| true, || made(1)).unwrap();
        failed.discard();
        drop(failed);
        let many: Vec<_> = (0..40).map(|number| IDLE.take(|_| false, || made(number)).unwrap()).collect();
        drop(many);
        assert_eq!(IDLE.0.lock().unwrap().len(), IDLE_MAX);
        assert!(IDLE.take(|_| true, || Err(CudaError::Kernel("none is made".to_owned()))).is_ok());
        assert!(IDLE.take(|_| false, || Err(CudaError::Kernel("none is made".to_owned()))).is_err());
    }
}
