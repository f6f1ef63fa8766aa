//! NetworkPolicies that nobody enforces. A node whose packet filter shows an enforcer asks nobody anything. Any other
//! asks the apiserver now and then for one policy: a watch of all of them would be a second stream in every agent of the
//! cluster, for something that is looked at by people. What two looks that could tell have found is said aloud: in
//! the moment between a node's start and its enforcer's it is true, and no news.

use crate::firewall::enforcers::Enforcers;
use crate::status::{NetworkPolicyState, NetworkPolicyStatus};

/// What the apiserver has said of NetworkPolicies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Asked {
    /// There has been no occasion, or no answer.
    #[default]
    NotYet,
    Count(u64),
    Refused(String),
}

/// What that means here, with what the last look at this node has found; `None` where nobody has looked.
pub fn judge(asked: &Asked, here: Option<&Enforcers>) -> NetworkPolicyStatus {
    let found = here.map(|here| here.found.clone()).unwrap_or_default();
    let count = match asked {
        Asked::Count(count) => Some(*count),
        Asked::NotYet | Asked::Refused(_) => None,
    };
    let (state, problem) = match (asked, here) {
        _ if !found.is_empty() => (NetworkPolicyState::Enforced, None),
        (Asked::Count(0), _) => (NetworkPolicyState::None, None),
        (_, None) => (
            NetworkPolicyState::Unknown,
            Some("this node's packet filter has not been looked at yet".to_owned()),
        ),
        (Asked::NotYet, _) => (
            NetworkPolicyState::Unknown,
            Some("the apiserver has not said yet whether there are any".to_owned()),
        ),
        (Asked::Refused(reason), _) => (
            NetworkPolicyState::Unknown,
            Some(format!(
                "{reason}. Grant list of networkpolicies as conf/kubernetes/weft.yaml does, or set \
                 --network-policy-check=0"
            )),
        ),
        (Asked::Count(count), Some(Enforcers { unseen: Some(why), .. })) => (
            NetworkPolicyState::Unknown,
            Some(format!("there are {count}, and whether anything here enforces them cannot be told: {why}")),
        ),
        (Asked::Count(_), Some(_)) => (NetworkPolicyState::Unenforced, None),
    };
    let enforcers = found.iter().map(|(name, sign)| format!("{name} ({sign})")).collect();
    NetworkPolicyStatus { state, count, enforcers, problem }
}

#[cfg(feature = "kube")]
pub use watch::keep;

#[cfg(feature = "kube")]
mod watch {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::time::sleep;
    use tokio_util::sync::CancellationToken;
    use tracing::{debug, info, warn};

    use super::Asked;
    use crate::lease::backoff::jittered;
    use crate::lease::{KubeStore, StoreError};
    use crate::node::Node;
    use crate::status::{NetworkPolicyState, NetworkPolicyStatus};

    /// Looks, with none between them that found an enforcer or no policy.
    const ENOUGH: u32 = 2;

    /// Asks and tells until `stop`.
    pub async fn keep(store: KubeStore, period: Duration, node: Arc<Node>, stop: CancellationToken) {
        let looking = async {
            let mut reports = node.reconcile.reports();
            if reports.wait_for(|report| report.at.is_some()).await.is_err() {
                return;
            }
            let mut teller = Teller::default();
            loop {
                ask(&store, &node).await;
                tell(&store, &node, &mut teller).await;
                sleep(jittered(period)).await;
            }
        };
        tokio::select! {
            () = looking => {}
            () = stop.cancelled() => {}
        }
    }

    async fn ask(store: &KubeStore, node: &Node) {
        let is_enforced = !node.reconcile.reports().borrow().enforcers.found.is_empty();
        let asked = match is_enforced {
            true => Asked::NotYet,
            false => match store.network_policies().await {
                Ok(count) => Asked::Count(count),
                Err(StoreError::Refused { reason, .. }) => Asked::Refused(reason),
                // That it is away is said where it matters; what it said last holds.
                Err(error) => return debug!(%error, "not known whether there are NetworkPolicies"),
            },
        };
        let news = node.set_network_policies(asked.clone());
        if let (Asked::Refused(reason), true) = (&asked, news) {
            warn!(%reason, "whether there are NetworkPolicies that nobody enforces is not known");
        }
    }

    async fn tell(store: &KubeStore, node: &Node, teller: &mut Teller) {
        let Some(status) = node.network_policies() else { return };
        match (teller.hear(status.state), status.warning()) {
            (Some(News::Unenforced), Some(warning)) => warn!(node = %node.name, "{warning}"),
            (Some(News::Over), _) => info!("no NetworkPolicy goes without an enforcer any more"),
            _ => {}
        }
        let Some(note) = teller.event_owed(&node.name, &status) else { return };
        match store.tell_of_network_policies(&note).await {
            Ok(()) => teller.event_written = true,
            Err(error @ StoreError::Refused { .. }) => {
                warn!(%error, "no Event can be written of NetworkPolicies that nobody enforces");
                teller.event_written = true;
            }
            // At the next look.
            Err(_) => {}
        }
    }

    /// What has been said of the present state, so that it is said once.
    #[derive(Debug, Default)]
    pub(super) struct Teller {
        unenforced_looks: u32,
        pub(super) event_written: bool,
    }

    #[derive(Debug, PartialEq, Eq)]
    pub(super) enum News {
        Unenforced,
        Over,
    }

    impl Teller {
        /// What one look has found.
        pub(super) fn hear(&mut self, state: NetworkPolicyState) -> Option<News> {
            match state {
                NetworkPolicyState::Unenforced => {
                    self.unenforced_looks = self.unenforced_looks.saturating_add(1);
                    (self.unenforced_looks == ENOUGH).then_some(News::Unenforced)
                }
                NetworkPolicyState::Unknown => None,
                NetworkPolicyState::Enforced | NetworkPolicyState::None => {
                    let was = std::mem::take(self);
                    (was.unenforced_looks >= ENOUGH).then_some(News::Over)
                }
            }
        }

        /// The Event's words. A look that could tell nothing leaves it owed, but there is nothing to say.
        pub(super) fn event_owed(&self, node: &str, status: &NetworkPolicyStatus) -> Option<String> {
            let is_owed = self.unenforced_looks >= ENOUGH && !self.event_written;
            let warning = status.warning().filter(|_| is_owed)?;
            Some(format!(
                "node {node}: {warning}. Any other node that lacks an enforcer says so by weftctl status and by the \
                 metric weft_network_policies_unenforced"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_and_what_is_seen_make_a_verdict() {
        let nobody = Enforcers::default();
        let calico =
            Enforcers { found: [("Calico", "chain x".to_owned())].into(), unseen: Some("legacy".into()) };
        let blind =
            Enforcers { unseen: Some("iptables-legacy cannot be read".into()), ..Enforcers::default() };
        let of = |asked: &Asked, here: Option<&Enforcers>| {
            let status = judge(asked, here);
            (status.state, status.count, status.enforcers.join(", "), status.problem.unwrap_or_default())
        };
        let plain = |state, count, who: &str| (state, count, who.to_owned(), String::new());
        let (none, some) = (Asked::Count(0), Asked::Count(3));
        assert_eq!(of(&some, Some(&nobody)), plain(NetworkPolicyState::Unenforced, Some(3), ""));
        assert_eq!(
            of(&some, Some(&calico)),
            plain(NetworkPolicyState::Enforced, Some(3), "Calico (chain x)")
        );
        assert_eq!(
            of(&Asked::NotYet, Some(&calico)),
            plain(NetworkPolicyState::Enforced, None, "Calico (chain x)")
        );
        assert_eq!(of(&none, Some(&nobody)), plain(NetworkPolicyState::None, Some(0), ""));
        assert_eq!(of(&none, Some(&blind)), plain(NetworkPolicyState::None, Some(0), ""));
        for (asked, here, why) in [
            (&Asked::NotYet, Some(&nobody), "has not said yet"),
            (&some, None, "not been looked at yet"),
            (
                &some,
                Some(&blind),
                "there are 3, and whether anything here enforces them cannot be told: iptables-",
            ),
            (&Asked::Refused("may not".into()), Some(&nobody), "may not. Grant list of networkpolicies"),
        ] {
            let (state, _, who, problem) = of(asked, here);
            assert_eq!((state, who.as_str()), (NetworkPolicyState::Unknown, ""), "{asked:?} {here:?}");
            assert!(problem.contains(why), "{problem}");
        }
    }

    #[cfg(feature = "kube")]
    #[test]
    fn what_lasts_is_said_once_and_again_after_it_was_over() {
        use super::watch::{News, Teller};
        let mut teller = Teller::default();
        let nobody = Enforcers::default();
        let unenforced = judge(&Asked::Count(1), Some(&nobody));
        let unknown = judge(&Asked::Refused("may not".into()), Some(&nobody));
        let none = judge(&Asked::Count(0), Some(&nobody));
        let calico = Enforcers { found: [("Calico", "chain x".to_owned())].into(), unseen: None };
        let enforced = judge(&Asked::NotYet, Some(&calico));
        // What is news, and whether there is an Event to write.
        let look = |teller: &mut Teller, status: &NetworkPolicyStatus| {
            (teller.hear(status.state), teller.event_owed("n1", status).is_some())
        };
        for round in 0..2 {
            assert_eq!(look(&mut teller, &unenforced), (None, false), "{round}: a moment's");
            assert_eq!(look(&mut teller, &unknown), (None, false));
            assert_eq!(look(&mut teller, &unenforced), (Some(News::Unenforced), true));
            // Owed until it is written, and nothing is written of what cannot be told.
            assert_eq!(look(&mut teller, &unknown), (None, false));
            assert_eq!(look(&mut teller, &unenforced), (None, true));
            let note = teller.event_owed("n1", &unenforced).unwrap_or_default();
            let expected =
                "node n1: 1 NetworkPolicy exists, and nothing that weft knows enforces it on this node. Any";
            assert!(note.starts_with(expected), "{note}");
            teller.event_written = true;
            assert_eq!(look(&mut teller, &unenforced), (None, false));
            assert_eq!(look(&mut teller, &unknown), (None, false));
            let over = if round == 0 { &enforced } else { &none };
            assert_eq!(look(&mut teller, over), (Some(News::Over), false));
            assert_eq!(look(&mut teller, over), (None, false));
        }
        let heard = (teller.hear(unenforced.state), teller.hear(enforced.state));
        assert_eq!(heard, (None, None), "it had not been said");
    }
}
