//! A node of its own for each plugin, with one pod that stays: a bridge without a port has no carrier, and a plugin's first
//! call on a node does what no other does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use serde_json::{Value, json};

use super::attachment::{Attachment, Took, Verb};
use super::choice::{HostPorts, Load, Plugin};
use super::floor::{self, Given};
use super::result::{Batch, Executable, Sample};
use crate::bed::Bed;
use crate::bench::pair::{UNDERLAY, agent_flags};
use crate::binaries::Binaries;
use crate::cluster::READY;
use crate::conform::subject::reference_dir;
use crate::kernel::indexes;
use crate::netns::Netns;
use crate::node::Node;
use crate::plugin::{Call, IFNAME, NETWORK};
use crate::traffic::echo::ping;
use crate::underlay::{NodeNet, NodeNumber, Underlay};

const VERSION: &str = "1.1.0";
const BRIDGE: &str = "cni0";
const OVERLAY: &str = "10.5.0.0/16";
/// Room for thousands of pods: an address that was given back rests before it is given again.
const PREFIX: u8 = 20;
const FLOOR_GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 5, 32, 1);
const REFERENCE_SUBNET: &str = "10.5.48.0/20";
/// The first pod's port on the node.
const FIRST_HOST_PORT: usize = 20_000;
/// What is to go goes within.
const GONE: Duration = Duration::from_secs(30);
const GLANCE: Duration = Duration::from_millis(1);
const REST: Duration = Duration::from_secs(2);
/// An agent that works for less than a twentieth of this rests.
const RESTING: Duration = Duration::from_millis(20);

/// Fields drop in order: the agent ends before the bed that holds its namespace.
#[derive(Debug)]
pub(super) struct Stand {
    pub(super) plugin: Plugin,
    node: Option<Node>,
    netns: Netns,
    dir: PathBuf,
    binaries: Binaries,
    bridge: u32,
    /// Interfaces of the node that stay.
    links: BTreeSet<String>,
    serial: AtomicUsize,
}

impl Stand {
    /// With a pod that reaches its gateway.
    pub(super) fn start(bed: &Bed, binaries: &Binaries, plugin: Plugin) -> Result<Self> {
        let netns = match plugin {
            Plugin::Weft => {
                Underlay::create(bed)?.attach_host(bed, plugin.name(), NodeNumber(1).address())?
            }
            Plugin::Floor | Plugin::Reference => bed.netns(plugin.name())?,
        };
        let mut stand = Self {
            plugin,
            node: None,
            dir: bed.dir_in_memory(plugin.name())?,
            netns,
            binaries: binaries.clone(),
            bridge: 0,
            links: BTreeSet::new(),
            serial: AtomicUsize::new(0),
        };
        match plugin {
            Plugin::Weft => stand.node = Some(stand.agent(bed)?),
            Plugin::Floor => {
                stand.netns.ip(&format!("link add {BRIDGE} type bridge forward_delay 0"))?;
                stand.netns.ip(&format!("address add {FLOOR_GATEWAY}/{PREFIX} dev {BRIDGE}"))?;
                stand.netns.ip(&format!("link set {BRIDGE} up"))?;
                let indexes = indexes(&stand.netns)?;
                let bridge = indexes.iter().find(|(name, _)| name == BRIDGE).context("the bridge")?;
                stand.bridge = bridge.1 as u32;
            }
            Plugin::Reference => {}
        }
        let pod = bed.netns(&format!("{}-stays", plugin.name()))?;
        let mut stays = stand.attachment(0, HostPorts::None, &pod)?;
        stand.netns.enter(|| stays.run(Verb::Add)).with_context(|| stand.explain())?;
        ping(&pod, gateway(&pod)?, 10, Duration::from_secs(1)).context("the pod that stays")?;
        stand.links = links(&stand.netns)?;
        Ok(stand)
    }

    /// What the agent says, where there is one.
    pub(super) fn explain(&self) -> String {
        self.node.iter().map(|node| node.agent.explain()).collect()
    }

    /// ADD for `pods`, then DEL, in the way of the load, and nothing left.
    pub(super) fn measure(&self, host_ports: HostPorts, load: Load, pods: &[Netns]) -> Result<Sample> {
        let attachments =
            pods.iter().enumerate().map(|(place, pod)| self.attachment(place + 1, host_ports, pod));
        let mut attachments: Vec<_> = attachments.collect::<Result<_>>()?;
        let before = self.agent_cpu()?;
        let add = self.batch(Verb::Add, load, &mut attachments);
        if add.is_err() {
            // What others of the batch have made must not cost the next one.
            for attachment in &mut attachments {
                let _ = self.netns.enter(|| attachment.run(Verb::Del));
            }
            self.wait_gone()?;
        }
        let (mut add, _) = add?;
        let between = self.agent_cpu()?;
        let (mut del, begin) = self.batch(Verb::Del, load, &mut attachments)?;
        let gone = self.wait_gone()?;
        let after = self.agent_rests()?;
        let each = |time: Duration| milliseconds(time / pods.len() as u32);
        add.agent_cpu_ms = each(between.saturating_sub(before));
        del.agent_cpu_ms = each(after.saturating_sub(between));
        Ok(Sample { add, del, gone_ms: milliseconds(gone - begin) })
    }

    /// Size of each executable, and the peak of its memory over an ADD and a DEL.
    pub(super) fn executables(
        &self,
        host_ports: HostPorts,
        pod: &Netns,
    ) -> Result<BTreeMap<String, Executable>> {
        let mut attachment = self.attachment(1, host_ports, pod)?;
        let peaks = self.netns.enter(|| {
            let mut peaks = attachment.peaks(Verb::Add)?;
            peaks.extend(attachment.peaks(Verb::Del)?);
            Ok(peaks)
        })?;
        self.wait_gone()?;
        let mut files: Vec<PathBuf> = attachment.chain.iter().map(|call| call.binary.clone()).collect();
        if self.plugin == Plugin::Reference {
            files.push(reference_dir()?.join("host-local"));
        }
        let mut executables = BTreeMap::new();
        for file in files {
            let name = file.file_name().context("a file name")?.to_string_lossy().into_owned();
            let of_it = peaks.iter().filter(|(program, _)| *program == name);
            let peak = of_it.map(|(_, peak)| *peak).max_by_key(|peak| peak.kib);
            let bytes = fs::metadata(&file).with_context(|| file.display().to_string())?.len();
            executables.insert(name, Executable { bytes, peak });
        }
        Ok(executables)
    }

    /// And when its first call began.
    fn batch(&self, verb: Verb, load: Load, attachments: &mut [Attachment]) -> Result<(Batch, Instant)> {
        let took = self.netns.enter(|| match load {
            Load::Alone => attachments.iter_mut().map(|attachment| attachment.run(verb)).collect(),
            _ => at_once(verb, attachments),
        })?;
        let begin = took.iter().map(|took| took.from).min().context("a batch of nothing")?;
        let end = took.iter().map(|took| took.to).max().context("a batch of nothing")?;
        let cpu: Duration = took.iter().map(|took| took.cpu).sum();
        let batch = Batch {
            plugin_cpu_ms: milliseconds(cpu / took.len() as u32),
            agent_cpu_ms: 0.0,
            wall_ms: milliseconds(end - begin),
            times_ms: took.iter().map(|took| milliseconds(took.time)).collect(),
        };
        Ok((batch, begin))
    }

    /// Its time once it has nothing more to do: what it does after a verb's end belongs to that verb, and must not cost
    /// whoever has the next turn. One that never rests is left to its work.
    #[expect(clippy::disallowed_methods, reason = "time itself is meant")]
    fn agent_rests(&self) -> Result<Duration> {
        let deadline = Instant::now() + REST;
        let mut cpu = self.agent_cpu()?;
        while self.node.is_some() && Instant::now() < deadline {
            thread::sleep(RESTING);
            let before = std::mem::replace(&mut cpu, self.agent_cpu()?);
            if cpu - before < RESTING / 20 {
                break;
            }
        }
        Ok(cpu)
    }

    /// All threads' time in user and kernel mode so far, to the nanosecond: /proc/PID/stat counts steps of 10 ms.
    fn agent_cpu(&self) -> Result<Duration> {
        let Some(node) = &self.node else { return Ok(Duration::ZERO) };
        let clock: ClockId = clock_getcpuclockid(node.agent.pid()?)?;
        Ok(clock_gettime(clock)?.into())
    }

    /// Since a DEL may end before the interface has.
    #[expect(
        clippy::disallowed_methods,
        reason = "looking all the time would take the core from what is measured"
    )]
    fn wait_gone(&self) -> Result<Instant> {
        self.netns.enter(|| {
            let deadline = Instant::now() + GONE;
            loop {
                let left: Vec<_> = own_links()?.difference(&self.links).cloned().collect();
                let now = Instant::now();
                match (left.is_empty(), now > deadline) {
                    (true, _) => return Ok(now),
                    (_, true) => {
                        bail!("{} is left by {} after {GONE:?}", left.join(", "), self.plugin.name())
                    }
                    _ => thread::sleep(GLANCE),
                }
            }
        })
    }

    /// A container that was never seen before, in a namespace that has no interface.
    fn attachment(&self, place: usize, host_ports: HostPorts, pod: &Netns) -> Result<Attachment> {
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let call = |binary: PathBuf, args: Option<String>, config: Value| Call {
            binary,
            node: self.netns.clone(),
            container_id: format!("bench-{serial}"),
            netns: Some(pod.path().to_owned()),
            ifname: IFNAME.to_owned(),
            args,
            config,
        };
        let config = |kind: &str| json!({ "cniVersion": VERSION, "name": NETWORK, "type": kind });
        let bridge = |kind: &str| {
            let mut config = config(kind);
            config["bridge"] = json!(BRIDGE);
            config["isDefaultGateway"] = json!(true);
            config["hairpinMode"] = json!(true);
            config
        };
        let mapping =
            json!([{ "hostPort": FIRST_HOST_PORT + place, "containerPort": 80, "protocol": "tcp" }]);
        let publish = |config: &mut Value| {
            config["capabilities"] = json!({ "portMappings": true });
            config["runtimeConfig"] = json!({ "portMappings": mapping });
        };
        match self.plugin {
            Plugin::Floor => {
                let given = Given {
                    host_name: format!("floor{place}"),
                    bridge: self.bridge,
                    address: Ipv4Addr::from_bits(FLOOR_GATEWAY.to_bits() + 1 + place as u32),
                    prefix: PREFIX,
                    gateway: FLOOR_GATEWAY,
                };
                let program = std::env::current_exe()?.with_file_name(floor::PROGRAM);
                let call = call(program, Some(given.to_args()), config("floor"));
                Ok(Attachment::new(vec![call], false))
            }
            Plugin::Weft => {
                let node = self.node.as_ref().context("the agent's node")?;
                let mut config = bridge("weft");
                config["socket"] = json!(node.agent.cni_socket());
                if host_ports == HostPorts::One {
                    publish(&mut config);
                }
                Ok(Attachment::new(vec![call(self.binaries.plugin(), None, config)], true))
            }
            Plugin::Reference => {
                let dir = reference_dir()?;
                let mut first = bridge("bridge");
                let data = self.dir.join("host-local");
                first["ipam"] = json!({
                    "type": "host-local", "ranges": [[{ "subnet": REFERENCE_SUBNET }]], "dataDir": data,
                });
                let mut chain = vec![call(dir.join("bridge"), None, first)];
                if host_ports == HostPorts::One {
                    let mut second = config("portmap");
                    publish(&mut second);
                    chain.push(call(dir.join("portmap"), None, second));
                }
                Ok(Attachment::new(chain, true))
            }
        }
    }

    /// A ready weftd, the only one of its overlay.
    fn agent(&self, bed: &Bed) -> Result<Node> {
        let address = NodeNumber(1).address();
        let name = self.plugin.name().to_owned();
        let net = NodeNet { port: UNDERLAY.to_owned(), name, netns: self.netns.clone(), address };
        let mut node = Node::new(bed.root(), NodeNumber(1), net, &self.binaries)?;
        let config = json!({ "Network": OVERLAY, "SubnetLen": PREFIX, "Backend": { "Type": "host-gw" } });
        node.agent.flags = agent_flags(&node, &bed.root().join("weft.db"), &config)?;
        node.agent.start()?;
        node.agent.wait_ready(READY)?;
        Ok(node)
    }
}

/// Each from a thread of its own, which waits for all others.
fn at_once(verb: Verb, attachments: &mut [Attachment]) -> Result<Vec<Took>> {
    let start = Barrier::new(attachments.len());
    thread::scope(|scope| {
        let run = |attachment| {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                Attachment::run(attachment, verb)
            })
        };
        let threads: Vec<_> = attachments.iter_mut().map(run).collect();
        let ends =
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a panic"))));
        // All of them, whatever became of the first.
        ends.collect::<Vec<_>>().into_iter().collect()
    })
}

fn links(netns: &Netns) -> Result<BTreeSet<String>> {
    netns.enter(own_links)
}

/// Of the calling thread's namespace: without a process, which would be in the way of those that are measured.
fn own_links() -> Result<BTreeSet<String>> {
    let table = fs::read_to_string("/proc/thread-self/net/dev").context("/proc/thread-self/net/dev")?;
    Ok(table
        .lines()
        .skip(2)
        .filter_map(|line| line.split(':').next())
        .map(|name| name.trim().to_owned())
        .collect())
}

fn gateway(pod: &Netns) -> Result<Ipv4Addr> {
    let route = pod.ip("-4 route show default")?;
    let gateway = route.split_whitespace().skip_while(|word| *word != "via").nth(1);
    gateway.and_then(|gateway| gateway.parse().ok()).with_context(|| format!("no default route: {route:?}"))
}

fn milliseconds(time: Duration) -> f64 {
    // To the microsecond: nobody reads more digits.
    (time.as_secs_f64() * 1e6).round() / 1e3
}
