//! Whether the store answers: published for status and readiness, logged once per change and not per attempt.

use tokio::sync::watch;
use tracing::{info, warn};

use super::{LeaseStore, StoreError, StoreHealth};

pub(super) fn connected(health: &watch::Sender<StoreHealth>, store: &impl LeaseStore) {
    health.send_if_modified(|health| {
        let changed = !health.connected;
        if changed {
            info!(store = %store.location(), "store connected");
        }
        health.connected = true;
        health.problem = None;
        changed
    });
}

pub(super) fn disconnected(health: &watch::Sender<StoreHealth>, store: &impl LeaseStore, error: &StoreError) {
    health.send_if_modified(|health| {
        let problem = Some(error.to_string());
        let changed = health.connected || health.problem != problem;
        if health.connected || health.problem.is_none() {
            warn!(store = %store.location(), %error, "store away, the last known leases stay in use");
        }
        health.connected = false;
        health.problem = problem;
        changed
    });
}
