//! How to reach the cluster and which of its Nodes is this one, as checked as it can be without asking anybody.

use std::path::PathBuf;
use std::time::Duration;

use super::annotations::Prefix;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubeConfig {
    /// `None`: the service account of the pod that this runs in, else what kubectl would take.
    pub kubeconfig: Option<PathBuf>,
    /// In place of the server that the kubeconfig names.
    pub api_url: Option<String>,
    pub prefix: Prefix,
    /// The file that holds the network configuration.
    pub net_config: PathBuf,
    pub node: NodeIdentity,
    /// Whether to write the condition NetworkUnavailable=False.
    pub set_network_available: bool,
    /// How often to ask whether there are NetworkPolicies that nobody enforces; `None`: never.
    pub policy_check: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeIdentity {
    Name(String),
    /// The Node that this pod runs on: `POD_NAME` in `POD_NAMESPACE`.
    OfPod {
        namespace: String,
        name: String,
    },
}

impl KubeConfig {
    pub(super) fn speaks_without_credentials(&self) -> bool {
        self.api_url.is_some() && self.kubeconfig.is_none()
    }

    /// Where it is, for people.
    pub(super) fn location(&self) -> String {
        match (&self.api_url, &self.kubeconfig) {
            (Some(url), _) => format!("Kubernetes at {url} (--kube-api-url)"),
            (None, Some(file)) => format!("Kubernetes by {} (--kubeconfig-file)", file.display()),
            (None, None) => "Kubernetes, by this pod's service account".to_owned(),
        }
    }
}
