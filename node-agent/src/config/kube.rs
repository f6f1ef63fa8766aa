//! The settings of the Kubernetes store.

use std::path::PathBuf;
use std::time::Duration;

use super::settings::Settings;
use super::values::{absolute, api_url, duration, node_name};
use super::{Source, UsageError, clash};
use crate::lease::KubeConfig;
use crate::lease::kube::{NodeIdentity, Prefix};

/// Of the look for NetworkPolicies that nobody enforces.
const SHORTEST_CHECK: Duration = Duration::from_secs(1);
const LONGEST_CHECK: Duration = Duration::from_secs(7 * 86_400);

pub(super) fn config(settings: &Settings) -> Result<KubeConfig, UsageError> {
    Ok(KubeConfig {
        kubeconfig: settings.text("kubeconfig-file").map(PathBuf::from),
        api_url: settings.parse("kube-api-url", "a URL such as https://10.0.0.1:6443", api_url)?,
        prefix: settings.required("kube-annotation-prefix", Prefix::EXPECTED, Prefix::parse)?,
        net_config: settings.required("net-config-path", "an absolute path", absolute)?,
        node: identity(settings)?,
        set_network_available: settings.switch("set-node-network-unavailable")?,
        policy_check: settings
            .required("network-policy-check", "0, or a duration from 1s to 168h such as 10m", |text| {
                duration(text).filter(|d| d.is_zero() || (SHORTEST_CHECK..=LONGEST_CHECK).contains(d))
            })
            .map(|period| (!period.is_zero()).then_some(period))?,
    })
}

/// flannel's order, behind the option that says it outright. A host's name need not be the Node's, so it is not taken
/// unasked.
fn identity(settings: &Settings) -> Result<NodeIdentity, UsageError> {
    let name = settings.text("node-name").or_else(|| settings.of_pod("NODE_NAME"));
    if let Some(name) = name {
        let bad = || UsageError::Value {
            given: Source::Variable("NODE_NAME".to_owned()),
            value: name.to_owned(),
            expected: "a Node's name".to_owned(),
        };
        return node_name(name).map(NodeIdentity::Name).ok_or_else(bad);
    }
    match (settings.of_pod("POD_NAMESPACE"), settings.of_pod("POD_NAME")) {
        (Some(namespace), Some(name)) => {
            Ok(NodeIdentity::OfPod { namespace: namespace.to_owned(), name: name.to_owned() })
        }
        _ => {
            let given = settings.source("kube-subnet-mgr").cloned();
            let given = given.unwrap_or_else(|| Source::Flag("kube-subnet-mgr".to_owned()));
            let why = "which Node is this? Set the variable NODE_NAME, or POD_NAME and POD_NAMESPACE, or give --node-name";
            Err(clash(&given, why))
        }
    }
}
