//! `weftctl docker-opts`: dockerd's options for the leased subnet, as flannel's dist/mk-docker-opts.sh writes them; same
//! options, same file, byte for byte. Asks no weftd: all it needs is in subnet.env.
//!
//! It differs where the script goes on with nothing: a subnet.env that is missing, broken or without subnet or MTU is an
//! error, and then nothing is written, for dockerd would start on a subnet of its own choice.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use ipnetwork::Ipv4Network;
use weft_shared::names::SUBNET_FILE;
use weft_shared::replace::{Survive, replace_file};

const DOCKER_FILE: &str = "/run/docker_opts.env";
/// A variable of that name is one more option.
const OPTION_PREFIX: &str = "DOCKER_OPT_";
const ROUTES: &str = "/proc/net/route";

/// What is read of subnet.env.
const SUBNET: &str = "FLANNEL_SUBNET";
const MTU: &str = "FLANNEL_MTU";
const IP_MASQ: &str = "FLANNEL_IPMASQ";

#[derive(Debug, Args)]
pub(super) struct DockerOpts {
    /// What weftd has written of its lease
    #[arg(short = 'f', value_name = "FLANNEL-ENV-FILE", default_value = SUBNET_FILE)]
    subnet_file: PathBuf,
    /// The file to write
    #[arg(short = 'd', value_name = "DOCKER-ENV-FILE", default_value = DOCKER_FILE)]
    docker_file: PathBuf,
    /// Only a variable for each option, such as DOCKER_OPT_MTU
    #[arg(short = 'i')]
    individual: bool,
    /// Only the variable with all options
    #[arg(short = 'c')]
    combined: bool,
    /// The name of the variable with all options
    #[arg(short = 'k', value_name = "COMBINED-KEY", default_value = "DOCKER_OPTS")]
    key: String,
    /// Leave --ip-masq out
    #[arg(short = 'm')]
    no_masquerade: bool,
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error("-k {0:?}: expected the name of a variable: letters, digits and _, no digit first")]
    Key(String),
    #[error("{0}: {1}; weftd writes it once it has a lease")]
    Unreadable(PathBuf, std::io::Error),
    #[error("{0}: no {1}: expected what weftd writes once it has a lease")]
    Missing(PathBuf, String),
    #[error("{file}: {key} = {value:?}: expected {expected}")]
    Value { file: PathBuf, key: &'static str, value: String, expected: &'static str },
    #[error("{0} cannot be written: {1}")]
    Write(PathBuf, std::io::Error),
    #[error("Your routing table already contains the subnet: {0}")]
    Routed(String),
    #[error("--{0} means nothing here: docker-opts writes a file, and asks no weftd")]
    Meaningless(&'static str),
}

impl DockerOpts {
    pub(super) fn run(&self, json: bool, socket: Option<&Path>) -> ExitCode {
        let done = refuse(json, socket).and_then(|()| self.carry_out());
        let Err(wrong) = done else { return ExitCode::SUCCESS };
        super::write_err(&format!("weftctl docker-opts: {wrong}"));
        ExitCode::from(if matches!(wrong, Wrong::Key(_) | Wrong::Meaningless(_)) { 2 } else { 1 })
    }

    fn carry_out(&self) -> Result<(), Wrong> {
        let env = std::fs::read_to_string(&self.subnet_file)
            .map_err(|error| Wrong::Unreadable(self.subnet_file.clone(), error))?;
        let lease = Lease::parse(&env, &self.subnet_file)?;
        // What is no UTF-8 is none of these.
        let variables = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        let text = self.text(&lease, &variables)?;
        replace_file(&self.docker_file, text.as_bytes(), 0o644, Survive::Crash)
            .map_err(|error| Wrong::Write(self.docker_file.clone(), error))?;
        // Like the script, after the file is written: dockerd would start, and its containers would not be reached.
        let routes = std::fs::read_to_string(ROUTES).unwrap_or_default();
        match routed(&routes, lease.subnet) {
            Some(route) => Err(Wrong::Routed(route)),
            None => Ok(()),
        }
    }

    fn text(&self, lease: &Lease, variables: &BTreeMap<String, String>) -> Result<String, Wrong> {
        let name = self.key.as_bytes();
        let word = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
        if !name.first().is_some_and(|b| word(b) && !b.is_ascii_digit()) || !name.iter().all(word) {
            return Err(Wrong::Key(self.key.clone()));
        }
        let mut options: BTreeMap<String, String> = variables
            .iter()
            .filter(|(name, _)| name.starts_with(OPTION_PREFIX))
            .map(|(name, value)| (name.clone(), value.clone()))
            .collect();
        let mut add = |name: &str, option: Option<String>| {
            options.extend(option.map(|option| (format!("{OPTION_PREFIX}{name}"), option)));
        };
        add("BIP", Some(format!("--bip={}", lease.subnet)));
        add("MTU", Some(format!("--mtu={}", lease.mtu)));
        // One of the two masquerades.
        let masquerade = lease.ip_masq.filter(|_| !self.no_masquerade);
        add("IPMASQ", masquerade.map(|by_weft| format!("--ip-masq={}", !by_weft)));

        let both = self.individual == self.combined;
        let mut text = String::new();
        if both || self.individual {
            for (name, option) in &options {
                let _ = writeln!(text, "{name}=\"{option}\"");
            }
        }
        if both || self.combined {
            let before = variables.get(&self.key).filter(|value| !value.is_empty());
            let mut all = before.map(|value| format!("{value} ")).unwrap_or_default();
            for option in options.values() {
                let _ = write!(all, " {option}");
            }
            let _ = writeln!(text, "{}=\"{all}\"", self.key);
        }
        Ok(text)
    }
}

fn refuse(json: bool, socket: Option<&Path>) -> Result<(), Wrong> {
    match (json, socket) {
        (true, _) => Err(Wrong::Meaningless("json")),
        (_, Some(_)) => Err(Wrong::Meaningless("socket")),
        _ => Ok(()),
    }
}

/// What subnet.env says.
#[derive(Debug, PartialEq, Eq)]
struct Lease {
    /// With the gateway's address, as it stands there.
    subnet: Ipv4Network,
    mtu: u32,
    /// If it is not there, it is an option less.
    ip_masq: Option<bool>,
}

impl Lease {
    fn parse(text: &str, file: &Path) -> Result<Self, Wrong> {
        let value = |key: &'static str| {
            let mut values = text.lines().filter_map(|line| line.trim().strip_prefix(key)?.strip_prefix('='));
            values.next_back().map(|value| value.trim_matches(['"', '\''])).filter(|value| !value.is_empty())
        };
        let wrong = |key, value: &str, expected| Wrong::Value {
            file: file.to_owned(),
            key,
            value: value.to_owned(),
            expected,
        };
        let subnet = value(SUBNET)
            .map(|v| {
                let parsed = v.parse().ok().filter(|_| v.contains('/'));
                parsed.ok_or_else(|| wrong(SUBNET, v, "one address with its prefix length"))
            })
            .transpose()?;
        let mtu =
            value(MTU).map(|v| v.parse().map_err(|_| wrong(MTU, v, "a number of bytes"))).transpose()?;
        let ip_masq =
            value(IP_MASQ).map(|v| v.parse().map_err(|_| wrong(IP_MASQ, v, "true or false"))).transpose()?;
        match (subnet, mtu) {
            (Some(subnet), Some(mtu)) => Ok(Self { subnet, mtu, ip_masq }),
            (subnet, mtu) => {
                let missing = [(SUBNET, subnet.is_none()), (MTU, mtu.is_none())];
                let names = missing.into_iter().filter_map(|(name, is)| is.then_some(name));
                Err(Wrong::Missing(file.to_owned(), names.collect::<Vec<_>>().join(", no ")))
            }
        }
    }
}

/// The route by a gateway that the kernel has for the very subnet (proc_net(5): hexadecimal, in the byte order of the
/// machine).
fn routed(routes: &str, subnet: Ipv4Network) -> Option<String> {
    let address = |hex: &str| Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()));
    routes.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (device, destination, gateway) =
            (fields.first()?, address(fields.get(1)?)?, address(fields.get(2)?)?);
        let same = destination == subnet.network() && address(fields.get(7)?)? == subnet.mask();
        (same && !gateway.is_unspecified())
            .then(|| format!("{destination}/{} via {gateway} dev {device}", subnet.prefix()))
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::{Cli, Verb};
    use super::*;

    const ENV: &str =
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";

    fn parsed(args: &[&str]) -> DockerOpts {
        let cli = Cli::try_parse_from(["weftctl", "docker-opts"].iter().chain(args)).expect("usage");
        match cli.verb {
            Verb::DockerOpts(opts) => opts,
            other => panic!("{other:?}"),
        }
    }

    fn text(args: &[&str], env: &str, variables: &[(&str, &str)]) -> Result<String, String> {
        let variables = variables.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        let lease = Lease::parse(env, Path::new("subnet.env")).map_err(|e| e.to_string())?;
        parsed(args).text(&lease, &variables).map_err(|e| e.to_string())
    }

    /// The outputs of flannel's script (commit 74b5e50) for its own sample file.
    #[test]
    fn the_same_options_give_the_same_text_as_flannels_script() {
        let individual = "DOCKER_OPT_BIP=\"--bip=10.1.74.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
        let all = "\" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472\"\n";
        for (args, expected) in [
            (&[][..], format!("{individual}DOCKER_OPTS={all}")),
            (&["-i", "-c"], format!("{individual}DOCKER_OPTS={all}")),
            (&["-i"], individual.to_owned()),
            (&["-c"], format!("DOCKER_OPTS={all}")),
            (&["-k", "CUSTOM"], format!("{individual}CUSTOM={all}")),
            (&["-cm"], "DOCKER_OPTS=\" --bip=10.1.74.1/24 --mtu=1472\"\n".to_owned()),
        ] {
            assert_eq!(text(args, ENV, &[]).as_deref(), Ok(expected.as_str()), "{args:?}");
        }
        let masquerades = ENV.replace("=false", "=true");
        assert_eq!(
            text(&["-c"], &masquerades, &[]).as_deref(),
            Ok("DOCKER_OPTS=\" --bip=10.1.74.1/24 --ip-masq=false --mtu=1472\"\n")
        );
    }

    #[test]
    fn options_that_the_environment_has_come_along() {
        let variables = [("DOCKER_OPTS", "-D"), ("DOCKER_OPT_DNS", "--dns=10.1.1.1"), ("DOCKER_HOST", "x")];
        assert_eq!(
            text(&["-c"], ENV, &variables).as_deref(),
            Ok("DOCKER_OPTS=\"-D  --bip=10.1.74.1/24 --dns=10.1.1.1 --ip-masq=true --mtu=1472\"\n")
        );
        let short = "FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\n";
        let expected = "OTHER=\" --bip=10.1.74.1/24 --mtu=1472\"\n";
        assert_eq!(text(&["-c", "-k", "OTHER"], short, &[]).as_deref(), Ok(expected));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let error = |args: &[&str], env: &str| text(args, env, &[]).expect_err("wrong");
        assert!(
            error(&[], "FLANNEL_IPMASQ=yes").contains("FLANNEL_IPMASQ = \"yes\": expected true or false")
        );
        assert!(
            error(&[], "FLANNEL_SUBNET=10.1.2.1").contains("expected one address with its prefix length")
        );
        assert!(error(&[], "FLANNEL_SUBNET=10.1.2.1/24,10.1.3.1/24").contains("FLANNEL_SUBNET"));
        assert!(error(&[], "FLANNEL_MTU=big").contains("expected a number of bytes"));
        for (env, missing) in [
            ("", "subnet.env: no FLANNEL_SUBNET, no FLANNEL_MTU: expected what weftd writes"),
            ("FLANNEL_SUBNET=\nFLANNEL_MTU=1450\n", "subnet.env: no FLANNEL_SUBNET: expected"),
            ("FLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_IPMASQ=true\n", "subnet.env: no FLANNEL_MTU: expected"),
        ] {
            assert!(error(&[], env).contains(missing), "{missing}: {}", error(&[], env));
        }
        for key in ["", "1A", "A B", "A;rm", "Ä"] {
            assert!(error(&["-k", key], ENV).contains("expected the name of a variable"), "{key}");
        }
        assert!(refuse(true, None).is_err() && refuse(false, Some(Path::new("/x"))).is_err());
        let dir = tempfile::tempdir().expect("tempdir");
        let (missing, target) = (dir.path().join("subnet.env"), dir.path().join("docker.env"));
        let opts = parsed(&["-f", missing.to_str().expect("UTF-8"), "-d", target.to_str().expect("UTF-8")]);
        let error = opts.carry_out().expect_err("no lease yet").to_string();
        assert!(error.contains("once it has a lease") && !target.exists(), "{error}");
    }

    #[test]
    fn a_route_to_the_subnet_by_a_gateway_is_found() {
        let [net, mask, gateway] = ["10.1.74.0", "255.255.255.0", "192.168.77.1"].map(|text| {
            let address: Ipv4Addr = text.parse().expect("address");
            format!("{:08X}", u32::from_ne_bytes(address.octets()))
        });
        let table = |gateway: &str| {
            format!(
                "Iface\tDestination\tGateway\t...\ndocker0\t{net}\t{gateway}\t0003\t0\t0\t0\t{mask}\t0\t0\t0\n"
            )
        };
        let subnet = "10.1.74.1/24".parse().expect("subnet");
        assert_eq!(
            routed(&table(&gateway), subnet).as_deref(),
            Some("10.1.74.0/24 via 192.168.77.1 dev docker0")
        );
        assert_eq!(routed(&table("00000000"), subnet), None, "docker0's own");
        assert_eq!(routed(&table(&gateway), "10.1.74.1/25".parse().expect("subnet")), None);
    }
}
