//! The underlay at run time: kept while it is there, chosen anew when it is not.
//!
//! Sticky on purpose: a second default route, an address added or an interface that matches better must not move a
//! node that works. Pure, like the choice itself.

use std::net::IpAddr;

use weft_shared::netconf::{BackendConfig, NetworkConfig, VxlanConfig};

use super::{HostIface, HostNetwork, NoUnderlay, Underlay, UnderlayChoice, choose_underlay};

/// The underlay in use if its interface still has its address, under whatever name or index; else what the settings
/// choose now.
pub fn follow_underlay(
    choice: &UnderlayChoice,
    host: &HostNetwork,
    current: &Underlay,
) -> Result<Underlay, NoUnderlay> {
    let has_address =
        |iface: &&HostIface| iface.addrs.iter().any(|a| a.addr.ip() == IpAddr::V4(current.addr));
    let mut same: Vec<&HostIface> = host
        .ifaces
        .iter()
        .filter(|iface| iface.index == current.index || iface.name == current.iface)
        .filter(has_address)
        .collect();
    // A name that another interface has taken over is worth less than the interface itself.
    same.sort_by_key(|iface| iface.index != current.index);
    match same.first() {
        Some(iface) if iface.mtu == 0 => Err(NoUnderlay::NoMtu(iface.name.clone())),
        Some(iface) => {
            Ok(Underlay { iface: iface.name.clone(), index: iface.index, mtu: iface.mtu, ..current.clone() })
        }
        None => choose_underlay(choice, host),
    }
}

/// Whether the overlay can stand on this underlay; else why not.
pub fn fits(network: &NetworkConfig, underlay: &Underlay) -> Result<(), String> {
    let (overlay, iface, addr, mtu) = (network.v4.network, &underlay.iface, underlay.addr, underlay.mtu);
    if overlay.contains(addr.into()) {
        return Err(format!(
            "underlay {iface} has {addr}, which lies in the overlay's Network {overlay}: expected an interface of \
             the network between the nodes (--iface), or another Network"
        ));
    }
    match &network.backend {
        BackendConfig::Vxlan(VxlanConfig { mtu: Some(wanted), .. }) if *wanted > mtu => {
            Err(format!("Backend.MTU = {wanted}: expected at most {mtu}, the MTU of {iface}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{AddrScope, HostAddr};
    use super::*;

    fn underlay(iface: &str, index: u32, addr: &str) -> Underlay {
        Underlay {
            iface: iface.parse().expect(iface),
            index,
            addr: addr.parse().expect(addr),
            mtu: 1500,
            public_ip: addr.parse().expect(addr),
            chosen_by: "default route".into(),
        }
    }

    fn iface(index: u32, name: &str, addrs: &[&str]) -> HostIface {
        let addr = |text: &&str| HostAddr {
            addr: text.parse().expect(text),
            scope: AddrScope::Global,
            deprecated: false,
            dynamic: false,
            temporary: false,
        };
        let addrs = addrs.iter().map(addr).collect();
        HostIface { index, name: name.parse().expect(name), mtu: 1400, up: true, of_weft: false, addrs }
    }

    #[test]
    fn kept_while_the_interface_has_the_address_and_chosen_anew_when_not() {
        let current = underlay("eth0", 2, "192.0.2.1");
        let eth1 = || iface(3, "eth1", &["198.51.100.7/24"]);
        let cases: &[(Vec<HostIface>, &str)] = &[
            // The default route has moved to eth1, an address came in front, the link is down: nothing changes.
            (vec![iface(2, "eth0", &["192.0.2.9/24", "192.0.2.1/24"]), eth1()], "eth0 2 192.0.2.1"),
            (
                vec![HostIface { up: false, ..iface(2, "eth0", &["192.0.2.1/24"]) }, eth1()],
                "eth0 2 192.0.2.1",
            ),
            // Renamed; removed and back; renamed while another took its name.
            (vec![iface(2, "lan0", &["192.0.2.1/24"]), eth1()], "lan0 2 192.0.2.1"),
            (vec![iface(9, "eth0", &["192.0.2.1/24"]), eth1()], "eth0 9 192.0.2.1"),
            (
                vec![iface(9, "eth0", &["192.0.2.1/24"]), iface(2, "lan0", &["192.0.2.1/24"]), eth1()],
                "lan0 2 192.0.2.1",
            ),
            // The address is elsewhere, or nowhere: by the default route, which is eth1's.
            (vec![iface(2, "eth0", &["192.0.2.9/24"]), eth1()], "eth1 3 198.51.100.7"),
            (
                vec![iface(2, "eth0", &[]), iface(3, "eth1", &["198.51.100.7/24", "192.0.2.1/24"])],
                "eth1 3 198.51.100.7",
            ),
            (vec![eth1()], "eth1 3 198.51.100.7"),
        ];
        for (ifaces, expected) in cases {
            let host = HostNetwork { ifaces: ifaces.clone(), default_route: Some(3), reach: None };
            let found = follow_underlay(&UnderlayChoice::default(), &host, &current).expect(expected);
            assert_eq!(format!("{} {} {}", found.iface, found.index, found.addr), *expected);
            assert_eq!(found.mtu, 1400, "as it is now");
        }
        let nowhere = HostNetwork { ifaces: vec![iface(2, "eth0", &[])], ..HostNetwork::default() };
        let error = follow_underlay(&UnderlayChoice::default(), &nowhere, &current).expect_err("no route");
        assert!(matches!(error, NoUnderlay::NoDefaultRoute { .. }), "{error}");
    }

    #[test]
    fn a_public_ip_that_is_not_the_interfaces_stays() {
        let current =
            Underlay { public_ip: "203.0.113.5".parse().expect("ip"), ..underlay("eth0", 2, "192.0.2.1") };
        let host =
            HostNetwork { ifaces: vec![iface(2, "lan0", &["192.0.2.1/24"])], ..HostNetwork::default() };
        let found = follow_underlay(&UnderlayChoice::default(), &host, &current).expect("kept");
        assert_eq!((found.public_ip, found.iface.as_str()), (current.public_ip, "lan0"));
    }

    #[test]
    fn an_overlay_that_cannot_stand_on_its_underlay_is_refused() {
        let config = |mtu: &str| {
            let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"vxlan"{mtu}}}}}"#);
            NetworkConfig::parse(&json).expect("valid")
        };
        assert!(fits(&config(""), &underlay("eth0", 3, "192.0.2.1")).is_ok());
        assert!(fits(&config(r#","MTU":1500"#), &underlay("eth0", 3, "192.0.2.1")).is_ok());
        for (mtu, addr, expected) in [
            ("", "10.5.3.1", "eth0 has 10.5.3.1, which lies in the overlay's Network 10.5.0.0/16"),
            (r#","MTU":1501"#, "192.0.2.1", "Backend.MTU = 1501: expected at most 1500, the MTU of eth0"),
        ] {
            let error = fits(&config(mtu), &underlay("eth0", 3, addr)).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}
