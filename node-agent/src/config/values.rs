//! The values that options take: each reader returns `None` for a text it does not accept.

use std::path::PathBuf;
use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};
use weft_shared::Subnet;
use weft_shared::names::MAX_SOCKET_PATH;

use crate::udp::Offload;

pub(super) fn absolute(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|path| path.is_absolute())
}

pub(super) fn socket_path(text: &str) -> Option<PathBuf> {
    absolute(text).filter(|_| text.len() <= MAX_SOCKET_PATH)
}

pub(super) fn node_name(text: &str) -> Option<String> {
    let fits = text.len() <= 253 && !text.chars().any(|c| c.is_whitespace() || c.is_control());
    fits.then(|| text.to_owned())
}

/// Go's regular expressions are RE2's; without Unicode classes this crate's are the same and need no tables.
pub(super) fn regex(text: &str) -> Option<Regex> {
    RegexBuilder::new(text).unicode(false).build().ok()
}

/// `http://HOST:PORT`, with the scheme added where it is left out, as etcd's own client allows.
pub(super) fn endpoint(url: &str, scheme: &str) -> Option<String> {
    let url = if url.contains("://") { url.to_owned() } else { format!("{scheme}://{url}") };
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"))?;
    let (host, port) = rest.trim_end_matches('/').rsplit_once(':')?;
    let host_fits = !host.is_empty() && !host.contains(['/', '@', '?', '#', ' ']);
    let port_fits = port.parse::<u16>().is_ok_and(|p| p > 0);
    (host_fits && port_fits).then(|| url.trim_end_matches('/').to_owned())
}

/// `http://` or `https://` with a host, and perhaps a path in front of the API's.
#[cfg(feature = "kube")]
pub(super) fn api_url(text: &str) -> Option<String> {
    let rest = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://"))?;
    let host = rest.split('/').next().filter(|host| !host.is_empty() && !host.contains('@'))?;
    let url = text.parse::<http::Uri>().ok().filter(|url| url.query().is_none())?;
    url.authority()
        .filter(|authority| authority.as_str() == host)
        .map(|_| text.trim_end_matches('/').to_owned())
}

/// A key without doubled or trailing slashes, as Go's path.Join leaves it. `..` has no meaning in a key.
pub(super) fn clean_key(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| *part == "." || *part == "..") {
        return None;
    }
    Some(format!("{}{}", if text.starts_with('/') { "/" } else { "" }, parts.join("/")))
}

/// A network of IPv4 unicast addresses, not all of them, and without host bits: a slip of the pen that would otherwise
/// exempt more, or other, addresses than were meant.
pub(super) fn network(text: &str) -> Option<Subnet> {
    let subnet: Subnet = text.parse().ok()?;
    let exact = text.split_once('/').and_then(|(addr, _)| addr.parse().ok()) == Some(subnet.addr());
    Some(subnet).filter(|s| s.is_ipv4() && s.len() > 0 && exact)
}

pub(super) fn offload(text: &str) -> Option<Offload> {
    Offload::ALL.into_iter().find(|offload| offload.name() == text)
}

/// Go's durations (time.ParseDuration) without the units nobody sets: `24h`, `1h30m`, `500ms`; a bare number is seconds.
pub(super) fn duration(text: &str) -> Option<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds).ok();
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit()).unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let seconds = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return None,
        };
        let part = Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()?;
        total = total.checked_add(part)?;
        rest = tail;
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_re2s() {
        let digit = regex(r"^(?i)ETH\d$").expect("valid");
        assert!(digit.is_match(b"eth0"));
        assert!(!digit.is_match("eth٣".as_bytes()), "RE2's classes are ASCII");
        assert!(regex(r"eth(?=0)").is_none(), "RE2 has no look-ahead");
    }

    #[test]
    fn networks() {
        for good in ["172.16.0.0/12", "10.0.0.1/32"] {
            assert_eq!(network(good).map(|n| n.to_string()).as_deref(), Some(good));
        }
        for bad in ["", "10.0.0.0", "10.0.0.1/8", "0.0.0.0/0", "fd00::/8", "10.0.0.0/33", "10.0.0.0/x"] {
            assert_eq!(network(bad), None, "{bad}");
        }
    }

    #[test]
    fn durations() {
        for (text, millis) in
            [("10", 10_000), ("0.25", 250), ("1h30m", 5_400_000), ("1.5s", 1_500), ("20ms", 20)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(millis)), "{text}");
        }
        for bad in ["-1", "1d", "h", "1h2", "inf", "nan", "1 s", "s1", "1e30"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn keys_are_joined_as_go_joins_paths() {
        for (text, key) in [("/a//b/", "/a/b"), ("a/b", "a/b"), ("//", "/")] {
            assert_eq!(clean_key(text).as_deref(), Some(key));
        }
        assert_eq!(clean_key("/a/./b"), None);
    }

    #[test]
    fn endpoints_with_and_without_scheme() {
        for (text, url) in [
            ("a:2379", "https://a:2379"),
            ("http://10.0.0.1:2379/", "http://10.0.0.1:2379"),
            ("http://[fd00::1]:2379", "http://[fd00::1]:2379"),
        ] {
            assert_eq!(endpoint(text, "https").as_deref(), Some(url));
        }
        for bad in ["", "a", "unix:///x", "http://:1", "http://a:0", "http://a/b:1", "http://u:p@a:1"] {
            assert_eq!(endpoint(bad, "http"), None, "{bad}");
        }
    }
}
