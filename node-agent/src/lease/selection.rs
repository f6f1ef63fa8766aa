//! Which subnet a node takes, given everything in the store: the rules of flannel's `tryAcquireLease`, for every store
//! alike. Pure; stores turn the answer into one transaction.

use std::net::Ipv4Addr;

use weft_shared::lease::{BadLeaseKey, Lease, LeaseAttrs, LeaseKey};

use super::allocator::allocate;
use super::{AcquireRequest, Malformed, Released, StoreError};

/// An entry of a store, as far as choosing and proving ownership need it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub key: LeaseKey,
    /// `false`: the store spells the key in another way, so there may be a well spelt entry beside it.
    pub well_spelt: bool,
    /// `None` when the value cannot be read: the subnet is taken all the same, by somebody.
    pub attrs: Option<LeaseAttrs>,
    pub create_revision: u64,
    pub mod_revision: u64,
    /// The store's lease object behind it; 0 for none.
    pub lease_id: i64,
    /// Never expires: an operator's reservation.
    pub reserved: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// Own entries that the configuration no longer admits, to be removed with the same stroke.
    pub stale: Vec<Entry>,
    pub action: Action,
    /// A subnet is taken that this node did not have before.
    pub is_new: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The own lease, or a reservation made for this node.
    Reuse(Entry),
    Create(LeaseKey),
}

/// The own lease again if it is usable, else the previous subnet if it is free, else a free one, best none of those that
/// were `freed` lately.
pub fn select(
    entries: &[Entry],
    want: &AcquireRequest,
    freed: &[LeaseKey],
    random: u64,
) -> Result<Selection, StoreError> {
    let previous =
        want.previous.map(|key| LeaseKey { v6: key.v6.filter(|_| want.config.v6.is_some()), ..key });
    let (usable, unusable): (Vec<_>, Vec<_>) = entries
        .iter()
        .filter(|entry| is_ours(entry, want, previous))
        .partition(|entry| want.config.admits(&entry.key) && !has_elder(entry, entries, want));
    // A reservation is the operator's, right or wrong.
    let stale: Vec<Entry> = unusable.into_iter().filter(|entry| !entry.reserved).cloned().collect();

    let own = usable.iter().find(|entry| Some(entry.key) == previous).or_else(|| usable.first());
    if let Some(entry) = own {
        return Ok(Selection { stale, action: Action::Reuse((*entry).clone()), is_new: false });
    }
    let taken = entries.iter().filter(|entry| !stale.contains(entry)).map(|entry| &entry.key);
    // One key `0.0.0.0-0` must not keep every node from joining: no node uses it.
    let taken = taken.filter(|key| want.config.v4.network.covers(key.v4));
    let free = |key: &LeaseKey| !taken.clone().any(|taken| taken.overlaps(key));
    let key = match previous.filter(|key| want.config.admits(key)).filter(free) {
        Some(previous) => previous,
        None => allocate(&want.config, taken, freed, random)?,
    };
    Ok(Selection { stale, action: Action::Create(key), is_new: Some(key) != previous })
}

/// By public IP, as flannel; or a reservation of the previous subnet that names no node.
fn is_ours(entry: &Entry, want: &AcquireRequest, previous: Option<LeaseKey>) -> bool {
    entry.attrs.as_ref().is_some_and(|attrs| {
        attrs.public_ip == want.attrs.public_ip
            || (entry.reserved && attrs.public_ip.is_unspecified() && Some(entry.key) == previous)
    })
}

/// Whether an older lease of another node, inside Network, holds some of the same addresses.
fn has_elder(entry: &Entry, entries: &[Entry], want: &AcquireRequest) -> bool {
    entries.iter().any(|other| {
        let foreign = other.attrs.as_ref().is_none_or(|a| a.public_ip != want.attrs.public_ip);
        let elder = other.create_revision < entry.create_revision && other.key.overlaps(&entry.key);
        foreign && elder && want.config.v4.network.covers(other.key.v4)
    })
}

/// An entry as a store keeps it.
#[derive(Debug, Clone, Copy)]
pub struct Stored<'a> {
    pub name: &'a str,
    pub value: &'a [u8],
    pub create_revision: u64,
    pub mod_revision: u64,
    pub lease_id: i64,
    pub reserved: bool,
}

impl Stored<'_> {
    /// A subnet is taken by its key alone; what cannot be read, key or value, is also malformed.
    pub fn parse(&self) -> (Option<Entry>, Option<Malformed>) {
        let attrs = serde_json::from_slice(self.value).map_err(|e| {
            format!("value: {e}: expected a lease such as {{\"PublicIP\":\"192.0.2.1\",\"PublicIPv6\":null}}")
        });
        let (key, well_spelt, attrs) = match key_named(self.name) {
            Ok(key) => (Some(key), true, attrs),
            Err(bad) => (bad.means, false, Err(bad.reason)),
        };
        let (attrs, reason) = attrs.map_or_else(|reason| (None, Some(reason)), |attrs| (Some(attrs), None));
        let entry = key.map(|key| Entry {
            key,
            well_spelt,
            attrs,
            create_revision: self.create_revision,
            mod_revision: self.mod_revision,
            lease_id: self.lease_id,
            reserved: self.reserved,
        });
        let malformed = |reason: String| Malformed { key: self.name.to_owned(), reason: brief(&reason) };
        (entry, reason.map(malformed))
    }
}

/// The subnet that a key names, if it is written as flannel writes it: another spelling (10.5.1.7-24) takes the
/// subnet, but would not be found again under its own name.
pub fn key_named(name: &str) -> Result<LeaseKey, BadName> {
    let key: LeaseKey =
        name.parse().map_err(|e: BadLeaseKey| BadName { reason: e.to_string(), means: None })?;
    if key.to_string() == name {
        Ok(key)
    } else {
        let reason = format!("lease key {name:?}: expected it to be written {key}");
        Err(BadName { reason, means: Some(key) })
    }
}

/// A text of the store's as people can read it: there it may have any length.
pub fn brief(text: &str) -> String {
    const SHOWN: usize = 250;
    match text.char_indices().nth(SHOWN) {
        None => text.to_owned(),
        Some((end, _)) => format!("{}... ({} bytes)", &text[..end], text.len()),
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadName {
    pub reason: String,
    /// The subnet that is meant all the same.
    pub means: Option<LeaseKey>,
}

impl Entry {
    /// Whether the node at `attrs` may go on using it.
    pub fn belongs_to(&self, attrs: &LeaseAttrs) -> bool {
        self.attrs.as_ref().is_some_and(|own| own.public_ip == attrs.public_ip)
    }

    /// What is to become of it when the node of this public IP gives its lease back.
    pub fn release(&self, public_ip: Ipv4Addr) -> Released {
        match &self.attrs {
            _ if self.reserved => Released::Reserved,
            Some(attrs) if attrs.public_ip == public_ip => Released::Done,
            _ => Released::Foreign { owner: self.owner() },
        }
    }

    /// Who holds it, for people.
    pub fn owner(&self) -> String {
        match &self.attrs {
            Some(attrs) => attrs.public_ip.to_string(),
            None => "an entry that is no lease".into(),
        }
    }

    pub fn lease(&self) -> Option<Lease> {
        let attrs = self.attrs.clone()?;
        Some(Lease { key: self.key, attrs, create_revision: self.create_revision })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use weft_shared::netconf::NetworkConfig;

    use super::*;

    fn attrs(ip: &str) -> LeaseAttrs {
        serde_json::from_str(&format!(r#"{{"PublicIP":"{ip}","PublicIPv6":null}}"#)).expect(ip)
    }

    fn entry(key: &str, ip: &str, create_revision: u64) -> Entry {
        Entry {
            key: key.parse().expect(key),
            well_spelt: true,
            attrs: Some(attrs(ip)),
            create_revision,
            mod_revision: create_revision,
            lease_id: 7,
            reserved: false,
        }
    }

    fn want(previous: Option<&str>) -> AcquireRequest {
        AcquireRequest {
            config: NetworkConfig::parse(r#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#)
                .expect("config"),
            attrs: attrs("192.0.2.1"),
            previous: previous.map(|key| key.parse().expect(key)),
            ttl: Duration::from_secs(60),
        }
    }

    fn reuse_or_create(entries: &[Entry], previous: Option<&str>) -> (bool, String, usize) {
        let selection = select(entries, &want(previous), &[], 0).expect("a subnet");
        match selection.action {
            Action::Reuse(entry) => (true, entry.key.to_string(), selection.stale.len()),
            Action::Create(key) => (false, key.to_string(), selection.stale.len()),
        }
    }

    #[test]
    fn own_then_previous_then_free() {
        let own = entry("10.5.9.0-24", "192.0.2.1", 5);
        let other = entry("10.5.7.0-24", "192.0.2.2", 4);
        let all = [other.clone(), own.clone()];
        assert_eq!(reuse_or_create(&all, Some("10.5.8.0-24")), (true, "10.5.9.0-24".into(), 0));
        assert_eq!(reuse_or_create(&all[..1], Some("10.5.8.0-24")), (false, "10.5.8.0-24".into(), 0));
        // Taken, or not of this network: a free one.
        for unusable in ["10.5.7.0-24", "10.6.1.0-24", "10.5.8.0-25"] {
            assert_eq!(reuse_or_create(&all[..1], Some(unusable)), (false, "10.5.1.0-24".into(), 0));
        }
        assert_eq!(
            reuse_or_create(&all[..1], Some("10.5.8.0-24&fd00::-64")),
            (false, "10.5.8.0-24".into(), 0)
        );
    }

    #[test]
    fn among_several_of_our_own_the_previous_one() {
        let all = [entry("10.5.3.0-24", "192.0.2.1", 5), entry("10.5.4.0-24", "192.0.2.1", 6)];
        assert_eq!(reuse_or_create(&all, Some("10.5.4.0-24")).1, "10.5.4.0-24");
        assert_eq!(reuse_or_create(&all, None).1, "10.5.3.0-24");
    }

    #[test]
    fn what_the_configuration_no_longer_admits_goes_unless_reserved() {
        let mut old = entry("10.5.0.0-17", "192.0.2.1", 5);
        // It frees the range that it blocked.
        assert_eq!(reuse_or_create(&[old.clone()], None), (false, "10.5.1.0-24".into(), 1));
        old.reserved = true;
        assert_eq!(reuse_or_create(&[old], None), (false, "10.5.128.0-24".into(), 0));
    }

    #[test]
    fn the_younger_of_two_overlapping_gives_way() {
        let elder = entry("10.5.9.0-24&fd00:0:0:a::-64", "192.0.2.2", 4);
        let own = entry("10.5.9.0-24", "192.0.2.1", 5);
        assert_eq!(reuse_or_create(&[own.clone(), elder], None), (false, "10.5.1.0-24".into(), 1));
        let younger = entry("10.5.9.0-24&fd00:0:0:a::-64", "192.0.2.2", 6);
        assert_eq!(reuse_or_create(&[own, younger], None), (true, "10.5.9.0-24".into(), 0));
    }

    #[test]
    fn an_entry_beyond_the_network_takes_nothing() {
        let everything = entry("0.0.0.0-0", "192.0.2.9", 1);
        let own = entry("10.5.9.0-24", "192.0.2.1", 5);
        assert_eq!(
            reuse_or_create(std::slice::from_ref(&everything), None),
            (false, "10.5.1.0-24".into(), 0)
        );
        assert_eq!(
            reuse_or_create(std::slice::from_ref(&everything), Some("10.5.8.0-24")),
            (false, "10.5.8.0-24".into(), 0)
        );
        assert_eq!(reuse_or_create(&[everything, own], None), (true, "10.5.9.0-24".into(), 0));
    }

    #[test]
    fn reservations_by_public_ip_or_for_the_previous_subnet() {
        let reserved = |ip| Entry { reserved: true, lease_id: 0, ..entry("10.5.40.0-24", ip, 3) };
        assert!(reuse_or_create(&[reserved("192.0.2.1")], None).0);
        assert!(reuse_or_create(&[reserved("0.0.0.0")], Some("10.5.40.0-24")).0);
        assert!(!reuse_or_create(&[reserved("0.0.0.0")], None).0);
        assert!(!reuse_or_create(&[reserved("192.0.2.2")], Some("10.5.40.0-24")).0);
    }

    #[test]
    fn entries_of_every_malformed_kind_are_named_and_take_what_their_key_says() {
        let good = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
        let huge = format!("{good}{}", "x".repeat(1 << 20));
        let nested =
            format!(r#"{{"PublicIP":"192.0.2.1","BackendData":{}1{}}}"#, "[".repeat(5000), "]".repeat(5000));
        let long_key = "k".repeat(1 << 16);
        for (name, value, takes, reason) in [
            ("config", good.as_bytes(), None, "lease key \"config\" must look like 10.5.52.0-24"),
            ("", good.as_bytes(), None, "lease key \"\" must look like"),
            ("10.5.1.0-24/lock", good.as_bytes(), None, "must look like"),
            ("10.5.1.0-32", good.as_bytes(), None, "must look like"),
            (&long_key, good.as_bytes(), None, "kkk... (65"),
            ("10.5.1.7-24", good.as_bytes(), Some("10.5.1.0-24"), "expected it to be written 10.5.1.0-24"),
            ("10.5.1.0-024", good.as_bytes(), Some("10.5.1.0-24"), "expected it to be written 10.5.1.0-24"),
            (
                "10.5.1.0-24&FD00::-64",
                good.as_bytes(),
                Some("10.5.1.0-24&fd00::-64"),
                "expected it to be written",
            ),
            ("10.5.1.0-24", b"", Some("10.5.1.0-24"), "value: EOF while parsing"),
            ("10.5.1.0-24", b"\xff\xfe\x00", Some("10.5.1.0-24"), "value: expected value"),
            ("10.5.1.0-24", b"not json", Some("10.5.1.0-24"), "expected a lease such as"),
            ("10.5.1.0-24", b"[]", Some("10.5.1.0-24"), "expected a lease such as"),
            ("10.5.1.0-24", b"null", Some("10.5.1.0-24"), "expected a lease such as"),
            ("10.5.1.0-24", b"{}", Some("10.5.1.0-24"), "missing field `PublicIP`"),
            ("10.5.1.0-24", br#"{"PublicIP":7}"#, Some("10.5.1.0-24"), "invalid type: integer `7`"),
            ("10.5.1.0-24", br#"{"PublicIP":"fd00::1"}"#, Some("10.5.1.0-24"), "invalid IPv4 address"),
            (
                "10.5.1.0-24",
                br#"{"PublicIP":"192.0.2.1","BackendType":1}"#,
                Some("10.5.1.0-24"),
                "invalid type",
            ),
            ("10.5.1.0-24", huge.as_bytes(), Some("10.5.1.0-24"), "trailing characters"),
            ("10.5.1.0-24", nested.as_bytes(), Some("10.5.1.0-24"), "recursion limit"),
        ] {
            let stored =
                Stored { name, value, create_revision: 3, mod_revision: 3, lease_id: 0, reserved: false };
            let (entry, malformed) = stored.parse();
            assert_eq!(entry.map(|entry| entry.key.to_string()).as_deref(), takes, "{name:.40}");
            let malformed = malformed.unwrap_or_else(|| panic!("{name:.40} is no lease"));
            assert!(malformed.reason.contains(reason), "{name:.40}: {}", malformed.reason);
            assert!(malformed.reason.len() < 500 && malformed.key == name);
        }
    }

    #[test]
    fn an_unreadable_value_still_takes_its_subnet() {
        let unreadable = Entry { attrs: None, ..entry("10.5.1.0-24", "0.0.0.0", 3) };
        assert_eq!(reuse_or_create(&[unreadable], Some("10.5.1.0-24")), (false, "10.5.2.0-24".into(), 0));
    }
}
