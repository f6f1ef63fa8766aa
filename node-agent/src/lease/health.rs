//! Whether the store answers: published for status and readiness, logged once per change and not per attempt.
//!
//! A store that refuses counts as away: nothing can be had from it. One that has no configuration, or a bad one,
//! answers.

use tokio::sync::watch;
use tracing::{info, warn};

use super::{LeaseStore, StoreError, StoreHealth};

/// The store was asked for something, and this is what came of it.
pub fn heard(health: &watch::Sender<StoreHealth>, store: &impl LeaseStore, error: Option<&StoreError>) {
    let away = |e: &&StoreError| matches!(e, StoreError::Unavailable { .. } | StoreError::Refused { .. });
    match error.filter(away) {
        Some(error) => disconnected(health, store, error),
        None => connected(health, store),
    }
}

fn connected(health: &watch::Sender<StoreHealth>, store: &impl LeaseStore) {
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

fn disconnected(health: &watch::Sender<StoreHealth>, store: &impl LeaseStore, error: &StoreError) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::EmbeddedStore;

    #[test]
    fn a_store_that_gives_nothing_is_away_and_one_without_a_configuration_answers() {
        let store = EmbeddedStore::new("/nowhere/leases.db");
        let (location, reason) = (store.location(), "no".to_owned());
        let (health, mut changes) = watch::channel(StoreHealth::default());
        let mut seen = |error: Option<&StoreError>| {
            heard(&health, &store, error);
            let changed = changes.has_changed().expect("sender");
            let health = changes.borrow_and_update();
            (changed, health.connected, health.problem.clone())
        };
        let refused = StoreError::Refused { location: location.clone(), reason: reason.clone() };
        let unavailable = StoreError::Unavailable { location, reason };
        let no_config = StoreError::NoConfig { key: "/config".into(), command: "put".into() };
        assert_eq!(seen(Some(&no_config)), (true, true, None));
        for away in [&unavailable, &refused] {
            assert_eq!(seen(Some(away)), (true, false, Some(away.to_string())));
            assert_eq!(seen(Some(away)), (false, false, Some(away.to_string())), "told once");
        }
        assert_eq!(seen(None), (true, true, None));
    }
}
