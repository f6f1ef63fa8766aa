//! `runtimeConfig.portMappings`: what runtimes write of the ports to publish, whichever of them it is. containerd
//! capitalises the keys (Go reads them in any case), kubelet writes `TCP`, podman leaves `hostIP` empty.

use super::{Code, Failure};
use crate::BadValue;
use crate::host_ports::{PortMapping, Protocol, WrongMapping};
use crate::json::{Case, Keys};

const KEY: &str = "portMappings";
const HOST_PORT: &str = "hostPort";
const CONTAINER_PORT: &str = "containerPort";

pub(super) fn parse(runtime: &Keys<'_>) -> Result<Vec<PortMapping>, Failure> {
    let expected = "a list of {\"hostPort\": …, \"containerPort\": …, \"protocol\": …, \"hostIP\": …}";
    let items = runtime.objects(KEY, Case::Ignored, expected)?;
    let ports = items.iter().map(mapping).collect::<Result<Vec<_>, _>>()?;
    let Err(wrong) = PortMapping::check(&ports) else { return Ok(ports) };
    Err(match wrong {
        WrongMapping::TooMany => {
            let msg = format!("{} of {} ports: {wrong}", runtime.path_of(KEY), items.len());
            Failure::new(Code::BadConfiguration, msg)
        }
        WrongMapping::NoHostPort { at } => items[at].bad(HOST_PORT, A_PORT).into(),
        WrongMapping::NoContainerPort { at } => items[at].bad(CONTAINER_PORT, A_PORT).into(),
        WrongMapping::Twice { at } => {
            let expected = format!("another port: {} is in the list already", ports[at]);
            items[at].bad(HOST_PORT, &expected).into()
        }
    })
}

const A_PORT: &str = "a port from 1 to 65535";

fn mapping(keys: &Keys<'_>) -> Result<PortMapping, BadValue> {
    let port = |key| keys.integer::<u16>(key, A_PORT)?.ok_or_else(|| keys.bad(key, A_PORT));
    let protocol = match keys.str("protocol", "tcp, udp or sctp")? {
        None | Some("") => Protocol::Tcp,
        Some(text) => text.parse().map_err(|_| keys.bad("protocol", "tcp, udp or sctp"))?,
    };
    let host_ip = match keys.str("hostIP", "an address of the host")? {
        None | Some("") => None,
        Some(text) => Some(text.parse().map_err(|_| keys.bad("hostIP", "an address of the host"))?),
    };
    let (host_port, container_port) = (port(HOST_PORT)?, port(CONTAINER_PORT)?);
    Ok(PortMapping { protocol, host_ip, host_port, container_port })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn with(mappings: &Value) -> Result<Vec<String>, Failure> {
        let runtime = json!({ "portMappings": mappings });
        let ports = parse(&Keys::top(runtime.as_object().expect("object"), Case::Exact))?;
        Ok(ports.iter().map(|p| format!("{p}>{}", p.container_port)).collect())
    }

    #[test]
    fn what_runtimes_write() {
        let containerd = json!([{ "HostPort": 8080, "ContainerPort": 80, "Protocol": "tcp", "HostIP": "" }]);
        assert_eq!(with(&containerd).expect("containerd"), ["8080/tcp>80"]);
        let several = json!([
            { "hostPort": 53, "containerPort": 5353, "protocol": "UDP", "hostIP": "192.0.2.1" },
            { "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.2" },
            { "hostPort": 53, "containerPort": 53 },
            { "hostPort": 65535, "containerPort": 1, "protocol": "sctp", "hostIP": "::1", "name": "x" },
        ]);
        assert_eq!(
            with(&several).expect("several"),
            ["192.0.2.1:53/udp>5353", "192.0.2.2:53/udp>5353", "53/tcp>53", "[::1]:65535/sctp>1"]
        );
        assert_eq!(with(&Value::Null).expect("absent").len() + with(&json!([])).expect("empty").len(), 0);
    }

    #[test]
    fn what_is_wrong_is_named_by_place_key_and_value() {
        let good = json!({ "hostPort": 1, "containerPort": 1 });
        for (mappings, part) in [
            (json!({}), "portMappings = {}: expected a list"),
            (json!([7]), "portMappings = 7: expected a list of"),
            (json!([{ "containerPort": 80 }]), "portMappings[0].hostPort = null: expected a port"),
            (json!([{ "hostPort": 0, "containerPort": 80 }]), "portMappings[0].hostPort = 0: expected"),
            (
                json!([good, { "hostPort": 2, "containerPort": 65536 }]),
                "portMappings[1].containerPort = 65536",
            ),
            (json!([{ "hostPort": -1, "containerPort": 80 }]), "hostPort = -1: expected a port from 1"),
            (
                json!([{ "hostPort": 1, "containerPort": 1, "protocol": "icmp" }]),
                "protocol = \"icmp\": expected tcp",
            ),
            (
                json!([{ "hostPort": 1, "containerPort": 1, "hostIP": "here" }]),
                "hostIP = \"here\": expected an",
            ),
            (
                json!([good, { "hostPort": 1, "containerPort": 2, "hostIP": "192.0.2.1" }]),
                "portMappings[1].hostPort = 1: expected another port: 192.0.2.1:1/tcp is in the list already",
            ),
        ] {
            let failure = with(&mappings).expect_err(part);
            assert!(failure.is(Code::BadConfiguration) && failure.msg.contains(part), "{part}: {failure}");
        }
        assert!(with(&Value::from(vec![good; 4097])).expect_err("too many").msg.contains("4097 ports"));
    }
}
