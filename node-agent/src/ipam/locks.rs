//! One lock per host-side veth name: whoever makes or deletes a veth of that name does so alone.
//!
//! Without it a slow deletion, asked for by a DEL, could strike the veth of the next ADD of the same attachment.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;
use weft_shared::IfName;

#[derive(Debug, Default)]
pub(super) struct NameLocks {
    locks: Mutex<BTreeMap<IfName, Arc<tokio::sync::Mutex<()>>>>,
}

/// Held while the veth of this name is this holder's business.
#[derive(Debug)]
pub(super) struct NameGuard<'a> {
    locks: &'a NameLocks,
    name: IfName,
    held: Option<OwnedMutexGuard<()>>,
}

impl NameLocks {
    pub(super) async fn lock(&self, name: &IfName) -> NameGuard<'_> {
        let lock = self.table().entry(name.clone()).or_default().clone();
        // Waiting happens inside the guard's lifetime, so that a waiter that is dropped cleans up as well.
        let mut guard = NameGuard { locks: self, name: name.clone(), held: None };
        guard.held = Some(lock.lock_owned().await);
        guard
    }

    fn table(&self) -> std::sync::MutexGuard<'_, BTreeMap<IfName, Arc<tokio::sync::Mutex<()>>>> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for NameGuard<'_> {
    fn drop(&mut self) {
        let mut table = self.locks.table();
        self.held = None;
        if table.get(&self.name).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            table.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[tokio::test]
    async fn one_holder_per_name_and_nothing_left() {
        let locks = NameLocks::default();
        let (a, b): (IfName, IfName) = ("vetha".parse().expect("name"), "vethb".parse().expect("name"));
        let inside = AtomicBool::new(false);
        let alone = async {
            for _ in 0..20 {
                let _guard = locks.lock(&a).await;
                assert!(!inside.swap(true, Ordering::Relaxed), "two holders");
                tokio::task::yield_now().await;
                inside.store(false, Ordering::Relaxed);
            }
        };
        let other = async {
            let _held = locks.lock(&b).await;
            // A waiter that gives up leaves the holder alone.
            tokio::select! {
                biased;
                _ = locks.lock(&b) => panic!("two holders"),
                () = std::future::ready(()) => {}
            }
            assert!(locks.table().contains_key(&b));
        };
        let again = async {
            for _ in 0..20 {
                let _guard = locks.lock(&a).await;
                assert!(!inside.swap(true, Ordering::Relaxed), "two holders");
                tokio::task::yield_now().await;
                inside.store(false, Ordering::Relaxed);
            }
        };
        tokio::join!(alone, other, again);
        assert!(locks.table().is_empty());
    }
}
