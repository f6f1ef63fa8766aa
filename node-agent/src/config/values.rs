//! The values that options take: each reader returns `None` for a text it does not accept.

use std::path::PathBuf;
use std::time::Duration;

use regex::bytes::{Regex, RegexBuilder};

pub(super) fn absolute(text: &str) -> Option<PathBuf> {
    Some(PathBuf::from(text)).filter(|path| path.is_absolute())
}

/// `sun_path` of unix(7) holds 108 bytes, the terminating zero included.
pub(super) fn socket_path(text: &str) -> Option<PathBuf> {
    absolute(text).filter(|_| text.len() <= 107)
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

/// A key without doubled or trailing slashes, as Go's path.Join leaves it. `..` has no meaning in a key.
pub(super) fn clean_key(text: &str) -> Option<String> {
    let parts: Vec<&str> = text.split('/').filter(|part| !part.is_empty()).collect();
    if parts.iter().any(|part| *part == "." || *part == "..") {
        return None;
    }
    Some(format!("{}{}", if text.starts_with('/') && !parts.is_empty() { "/" } else { "" }, parts.join("/")))
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
