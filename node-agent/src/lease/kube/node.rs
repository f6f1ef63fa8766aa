//! The few fields of a Node that are read. Node objects are large (images, conditions, managed fields) and change with
//! every heartbeat: the rest is skipped while it is parsed and never in memory.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Deserialize;
use weft_shared::Subnet;
use weft_shared::lease::LeaseKey;

use super::annotations::Annotations;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Node {
    pub metadata: Metadata,
    pub spec: Spec,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Metadata {
    pub name: String,
    pub uid: String,
    pub resource_version: String,
    pub creation_timestamp: Option<Time>,
    pub annotations: Option<Annotations>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct Spec {
    #[serde(rename = "podCIDR")]
    pub pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Option<Vec<String>>,
}

/// One page of a list.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct NodeList {
    pub metadata: ListMetadata,
    pub items: Vec<Node>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ListMetadata {
    pub resource_version: String,
    pub r#continue: Option<String>,
}

impl Node {
    pub(super) fn annotations(&self) -> &Annotations {
        static NONE: Annotations = Annotations::new();
        self.metadata.annotations.as_ref().unwrap_or(&NONE)
    }

    /// Seconds since 1970 at which the Node was made, by the apiserver's clock: of two with overlapping ranges the older
    /// wins, on every node alike.
    pub(super) fn created(&self) -> u64 {
        let at = self.metadata.creation_timestamp.as_ref();
        at.map_or(0, |time| u64::try_from(time.0.as_second()).unwrap_or(0))
    }

    /// Versions are compared although clients are not to: those of one apiserver only grow.
    pub(super) fn version(&self) -> Option<u64> {
        self.metadata.resource_version.parse().ok()
    }

    /// The subnet that the cluster has given the Node: the IPv4 one of at most two ranges, one of each family.
    pub(super) fn key(&self) -> Result<LeaseKey, String> {
        let name = &self.metadata.name;
        let single = self.spec.pod_cidr.iter().filter(|cidr| !cidr.is_empty());
        let ranges: Vec<&String> = match &self.spec.pod_cidrs {
            Some(ranges) if !ranges.is_empty() => ranges.iter().collect(),
            _ => single.collect(),
        };
        if ranges.is_empty() {
            return Err(format!(
                "node {name:?} pod cidr not assigned: spec.podCIDR is written by kube-controller-manager with \
                 --allocate-node-cidrs=true and --cluster-cidr, or by the cluster's own allocator of node ranges"
            ));
        }
        let parsed: Option<Vec<Subnet>> = ranges.iter().map(|range| range.parse().ok()).collect();
        let families = |v4: bool| parsed.iter().flatten().filter(|s| s.is_ipv4() == v4).count();
        if ranges.len() > 2 || families(true) > 1 || families(false) > 1 {
            return Err(format!(
                "node {name:?} pod cidrs should be IPv4/IPv6 only or dualstack: it has {ranges:?}"
            ));
        }
        let Some(parsed) = parsed else {
            return Err(format!("spec.podCIDRs = {ranges:?}: expected networks such as 10.244.1.0/24"));
        };
        let v4 = parsed.into_iter().find(Subnet::is_ipv4);
        let v4 =
            v4.ok_or_else(|| format!("spec.podCIDRs = {ranges:?}: expected an IPv4 network among them"))?;
        if !(1..=31).contains(&v4.len()) {
            return Err(format!("spec.podCIDR = {v4}: expected a length from 1 to 31"));
        }
        Ok(LeaseKey { v4, v6: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(spec: &str) -> Result<String, String> {
        let json = format!(r#"{{"metadata":{{"name":"a"}},"spec":{spec},"status":{{"images":[1,2]}}}}"#);
        let node: Node = serde_json::from_str(&json).expect(spec);
        node.key().map(|key| key.to_string())
    }

    #[test]
    fn the_ipv4_range_is_the_subnet() {
        for (spec, expected) in [
            (r#"{"podCIDR":"10.244.1.0/24"}"#, "10.244.1.0-24"),
            (r#"{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24"]}"#, "10.244.1.0-24"),
            (r#"{"podCIDR":"fd00:1::/64","podCIDRs":["fd00:1::/64","10.244.1.0/25"]}"#, "10.244.1.0-25"),
            (r#"{"podCIDR":"10.244.1.0/24","podCIDRs":[]}"#, "10.244.1.0-24"),
        ] {
            assert_eq!(key(spec).as_deref(), Ok(expected), "{spec}");
        }
        for (spec, expected) in [
            ("{}", "kube-controller-manager with --allocate-node-cidrs=true"),
            (r#"{"podCIDR":"","podCIDRs":null}"#, "node \"a\" pod cidr not assigned"),
            (r#"{"podCIDRs":["10.0.1.0/24","10.0.2.0/24"]}"#, "should be IPv4/IPv6 only or dualstack"),
            (r#"{"podCIDRs":["10.0.1.0/24","fd00::/64","fd01::/64"]}"#, "only or dualstack"),
            (r#"{"podCIDR":"fd00::/64"}"#, "expected an IPv4 network among them"),
            (r#"{"podCIDR":"10.0.1.0/33"}"#, "expected networks such as"),
            (r#"{"podCIDR":"10.0.1.1/32"}"#, "expected a length from 1 to 31"),
        ] {
            let error = key(spec).expect_err(spec);
            assert!(error.contains(expected), "{spec}: {error}");
        }
    }

    #[test]
    fn the_age_is_the_apiservers() {
        let node: Node =
            serde_json::from_str(r#"{"metadata":{"name":"a","creationTimestamp":"1970-01-02T00:00:01Z"}}"#)
                .expect("node");
        assert_eq!(node.created(), 86_401);
    }
}
