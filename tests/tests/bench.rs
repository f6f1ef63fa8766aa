//! The bench as it is used: what it measures with, what it leaves, and what becomes of a run that goes wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result, ensure};
use e2e::bench::choice::{Configuration, Load, Setting};
use e2e::bench::cni::{self, Verb};
use e2e::bench::result::{Cell, Figure, Results};
use e2e::binaries::Binaries;
use e2e::capture::Capture;
use e2e::cluster::READY;
use e2e::host::{HostSnapshot, marked_processes};
use e2e::netns::Netns;
use e2e::packet::Ethernet;
use e2e::wait::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ROOT: &str = "/run/weft-bench";

/// There is one bench on a machine: one test at a time.
struct Bench {
    _turn: MutexGuard<'static, ()>,
    binaries: Binaries,
    mark: String,
    before: HostSnapshot,
    out: tempfile::TempDir,
}

impl Bench {
    fn new() -> Result<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        ensure!(!Path::new(ROOT).exists(), "{ROOT} exists: a bench is running, or one was killed");
        let mark = format!("WEFT_BENCH_TEST={}", std::process::id());
        let out = tempfile::tempdir()?;
        Ok(Self { _turn: turn, binaries: Binaries::find()?, mark, before: HostSnapshot::take()?, out })
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bench"));
        command.args(arguments.split_whitespace()).arg("--out").arg(self.out.path());
        if let Some((name, value)) = self.mark.split_once('=') {
            command.env(name, value);
        }
        command.env("WEFT_BIN_DIR", &self.binaries.dir).env("WEFT_COMMIT", "of the test");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Started, and until the namespace of that name is there.
    fn start(&self, arguments: &str, netns: &str) -> Result<(Child, Netns)> {
        let mut bench = self.command(arguments).spawn()?;
        let netns = Netns::at(&PathBuf::from(ROOT).join("netns").join(netns));
        eventually("a namespace of the bench", READY, || {
            ensure!(bench.try_wait()?.is_none(), "the bench has ended");
            // The file is there before what is mounted on it.
            netns.enter(|| Ok(true))
        })?;
        Ok((bench, netns))
    }

    fn file(&self, name: &str) -> Result<String> {
        fs::read_to_string(self.out.path().join(name)).with_context(|| name.to_owned())
    }

    fn results(&self) -> Result<Results> {
        Results::load(&self.out.path().join("dataplane.json"))
    }

    /// The host must be what it was before.
    fn is_gone(&self) -> Result<()> {
        ensure!(!Path::new(ROOT).exists(), "{ROOT} is left");
        let left = marked_processes(&self.mark)?;
        ensure!(left.is_empty(), "left running: {left:?}");
        let difference = self.before.difference(&HostSnapshot::take()?);
        ensure!(difference.is_empty(), "the host changed:\n{difference}");
        Ok(())
    }
}

fn both(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// The process of that name in its arguments, by its mark.
fn part(bench: &Bench, role: &str) -> Result<Pid> {
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let read = |name| fs::read(path.join(name)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (Ok(arguments), Ok(environment)) = (read("cmdline"), read("environ")) else { continue };
        if arguments.contains(role) && environment.split('\0').any(|variable| variable == bench.mark) {
            let pid = path.file_name().and_then(|name| name.to_str()?.parse().ok());
            return Ok(Pid::from_raw(pid.context("a process number")?));
        }
    }
    anyhow::bail!("no {role} is running")
}

#[test]
fn every_load_is_measured_in_turns_and_nothing_is_left() -> Result<()> {
    let bench = Bench::new()?;
    let output = bench.command("dataplane --rounds 2 --seconds 0.1 --only node,vxlan,no-seg").output()?;
    let text = both(&output);
    ensure!(output.status.success(), "{}: {text}", output.status);
    let results = bench.results()?;
    for configuration in [Configuration::Node, Configuration::Vxlan] {
        for load in Load::ALL {
            let cell = Cell { setting: Setting::NoSeg, load, configuration };
            let figures: &[Figure] = match load {
                Load::Tcp1 | Load::Tcp4 => &[Figure::Gbps, Figure::CpuPerGb],
                Load::Udp1 | Load::Udp64 => &[Figure::Kpps, Figure::Gbps, Figure::CpuPerGb],
                Load::Exchange1 | Load::Exchange16 => {
                    &[Figure::P50, Figure::P99, Figure::PerSecond, Figure::CpuPerExchange]
                }
            };
            for figure in figures {
                let summary =
                    results.summary(cell, *figure).with_context(|| format!("{cell:?} {figure:?}"))?;
                assert!(summary.n == 2 && summary.median > 0.0, "{cell:?} {figure:?} {summary:?}");
            }
            assert!(results.ratio(cell, Configuration::Node, figures[0]).is_some_and(|ratio| ratio.n == 2));
        }
    }
    assert!(bench.file("dataplane.svg")?.starts_with("<svg "));
    let page = bench.file("dataplane.md")?;
    assert!(
        page.contains("| vxlan | **") && page.contains("weft of the test") && text.contains(&page),
        "{page}"
    );

    let again = bench.out.path().join("dataplane.json");
    let output = bench.command(&format!("render {}", again.display())).output()?;
    assert!(output.status.success() && bench.file("dataplane.md")? == page, "{}", both(&output));
    bench.is_gone()
}

/// Every plugin, every kind of pod, few calls: what they took is this machine's affair.
#[test]
fn plugins_are_measured_in_turns_and_nothing_is_left() -> Result<()> {
    use cni::choice::{HostPorts, Load, Plugin};
    use cni::result::{Cell, Figure, Results};

    let bench = Bench::new()?;
    let output = bench.command("cni --rounds 2 --pods 3 --only alone,10").output()?;
    let text = both(&output);
    ensure!(output.status.success(), "{}: {text}", output.status);
    let results = Results::load(&bench.out.path().join("cni.json"))?;
    for (host_ports, load, plugin) in cni::choice::Selection::of(["alone", "10"])?.cells() {
        let cell = Cell { host_ports, load, plugin };
        let samples = results.samples.get(&cell).with_context(|| format!("{cell:?}"))?;
        assert_eq!(samples.keys().collect::<Vec<_>>(), [&0, &1], "{cell:?}");
        for sample in samples.values() {
            for batch in [&sample.add, &sample.del] {
                let calls = if load == Load::Alone { 3 } else { 10 };
                assert!(
                    batch.times_ms.len() == calls && batch.times_ms.iter().all(|time| *time > 0.0),
                    "{cell:?} {batch:?}"
                );
                let longest = batch.times_ms.iter().copied().fold(0.0, f64::max);
                assert!(batch.wall_ms >= longest && batch.plugin_cpu_ms > 0.0, "{cell:?} {batch:?}");
                assert_eq!(batch.agent_cpu_ms > 0.0, plugin == Plugin::Weft, "{cell:?} {batch:?}");
            }
            assert!(sample.gone_ms >= sample.del.wall_ms, "{cell:?} {sample:?}");
        }
        assert!(results.summary(cell, Figure::Cpu).is_some_and(|cpu| cpu.n == 2));
        assert!(results.of_all_calls(cell, Verb::Add, 0.99) >= results.of_all_calls(cell, Verb::Add, 0.5));
    }
    let weft = Cell { host_ports: HostPorts::None, load: Load::Alone, plugin: Plugin::Weft };
    assert!(results.ratio(weft, Plugin::Floor, Figure::AddP50).is_some_and(|ratio| ratio.n == 2));
    let names: Vec<_> = results.executables.keys().map(String::as_str).collect();
    assert_eq!(names, ["bridge", "host-local", "portmap", "weft"]);
    for (name, executable) in &results.executables {
        assert!(executable.bytes > 100_000, "{name} {executable:?}");
        let peak = executable.peak.map(|peak| peak.kib);
        assert!(
            if name == "host-local" { peak.is_none() } else { peak > Some(100) },
            "{name} {executable:?}"
        );
    }
    assert!(bench.file("cni.svg")?.starts_with("<svg "));
    let page = bench.file("cni.md")?;
    assert!(page.contains("| ADD alone, p50 | the floor program's | ≤ 1.50 |"), "{page}");
    assert!(page.contains("weft of the test") && text.contains(&page), "{page}");

    let again = bench.out.path().join("cni.json");
    let output = bench.command(&format!("render {}", again.display())).output()?;
    assert!(output.status.success() && bench.file("cni.md")? == page, "{}", both(&output));
    bench.is_gone()
}

/// A plugin that fails costs what it was to give, and the next one finds the pods as they were.
#[test]
fn a_plugin_that_fails_costs_its_own_cells_only() -> Result<()> {
    use cni::choice::{HostPorts, Load, Plugin};
    use cni::result::{Cell, Results};

    let bench = Bench::new()?;
    let (run, netns) = bench.start("cni --rounds 20 --pods 10 --only floor,weft,alone,no-port", "pod-9")?;
    let node = Netns::at(&netns.path().with_file_name("floor"));
    eventually("a pod of the floor program", READY, || Ok(node.ip("-o link show")?.contains("floor7")))?;
    node.ip("link delete cni0")?;
    let output = run.wait_with_output()?;
    let text = both(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("## What failed"), "{text}");
    let failure = "floor, alone, pods without a port mapping: ";
    assert!(text.contains("FAILED: round ") && text.contains(failure), "{text}");
    assert!(text.contains("veth pair and bridge port: message 0: "), "the floor program says why: {text}");
    let results = Results::load(&bench.out.path().join("cni.json"))?;
    let rounds = |plugin| {
        let cell = Cell { host_ports: HostPorts::None, load: Load::Alone, plugin };
        results.samples.get(&cell).map_or(0, |samples| samples.len())
    };
    assert!(rounds(Plugin::Floor) < 20 && rounds(Plugin::Weft) == 20, "{text}");
    bench.is_gone()
}

/// The alternative must be what it is said to be: flannel's wire format, one packet per datagram.
#[test]
fn the_naive_forwarder_sends_one_packet_per_datagram() -> Result<()> {
    let bench = Bench::new()?;
    let (mut run, netns) =
        bench.start("dataplane --rounds 1 --seconds 2 --only naive,full,tcp-1", "naive-2")?;
    let capture = Capture::start(&netns)?;
    let length = capture.wait_for("a large datagram of the forwarder", READY, |frame| {
        let outer = Ethernet::parse(&frame.bytes)?.ipv4()?;
        let udp = outer.udp().filter(|udp| udp.source == 8285 && udp.destination == 8285)?;
        let inner = udp.payload;
        let total = u16::from_be_bytes([*inner.get(2)?, *inner.get(3)?]);
        (inner[0] == 0x45 && inner.len() > 1000).then_some((inner.len(), usize::from(total), inner[8]))
    })?;
    drop(capture);
    let output = run.wait()?;
    assert!(output.success(), "{output}");
    assert_eq!(
        length,
        (1472, 1472, 62),
        "datagram, the packet in it, TTL: a hop by the node, one by the forwarder"
    );
    bench.is_gone()
}

#[test]
fn what_fails_costs_its_own_cell_only() -> Result<()> {
    let bench = Bench::new()?;
    let (run, _) =
        bench.start("dataplane --rounds 2 --seconds 1 --only node,naive,full,gro,rr-1", "node-1")?;
    eventually("a measurement", READY, || part(&bench, "ExchangeClient").map(|_| true))?;
    kill(part(&bench, "Naive")?, Signal::SIGKILL)?;
    let output = run.wait_with_output()?;
    let text = both(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAILED: ") && text.contains("## What failed"), "{text}");
    let results = bench.results()?;
    for setting in [Setting::Full, Setting::Gro] {
        let cell = Cell { setting, load: Load::Exchange1, configuration: Configuration::Node };
        assert_eq!(results.summary(cell, Figure::P50).map(|summary| summary.n), Some(2), "{text}");
    }
    // Found out before a measurement that would only wait.
    let left_out = "round 2: naive left out in full: ";
    assert!(results.failures.iter().any(|failure| failure.starts_with(left_out)), "{text}");
    bench.is_gone()
}

#[test]
fn an_interrupted_run_writes_what_it_has_and_leaves_nothing() -> Result<()> {
    let bench = Bench::new()?;
    for (moment, signal) in [("HostGw", Signal::SIGINT), ("ExchangeClient", Signal::SIGTERM)] {
        let (run, _) =
            bench.start("dataplane --rounds 9 --seconds 2 --only node,host-gw,full,rr-16", "host-gw-1")?;
        if moment != "HostGw" {
            eventually("a measurement", READY, || part(&bench, moment).map(|_| true))?;
        }
        kill(Pid::from_raw(run.id() as i32), signal)?;
        let output = run.wait_with_output()?;
        let text = both(&output);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("bench: interrupted"), "{text}");
        bench.is_gone()?;
    }
    Ok(())
}

#[test]
fn bad_input_is_refused_before_anything_is_made() -> Result<()> {
    let bench = Bench::new()?;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/bench");
    for (arguments, expected) in [
        ("dataplane --rounds 0", "1 to 1000"),
        ("dataplane --rounds many", "many"),
        ("dataplane --seconds 0", "0.1 to 10"),
        ("dataplane --seconds 11", "0.1 to 10"),
        ("dataplane --only udp,upd", "\"upd\": expected some of node, host-gw"),
        ("dataplane --colour", "--colour"),
        ("dataplane now", "now"),
        ("cni --rounds 0", "1 to 1000"),
        ("cni --pods 0", "1 to 100"),
        ("cni --pods 101", "101"),
        ("cni --seconds 1", "--seconds"),
        ("cni --only weft,wefd", "\"wefd\": expected some of floor, weft"),
        ("cni --only floor,port", "maps none"),
        ("network", "network"),
        ("render", "dataplane.json"),
        ("render /nonexistent.json", "/nonexistent.json"),
        ("render /etc/hostname", "not the figures of a run"),
        ("render", "cni.json"),
    ] {
        let mut command = Command::new(&script);
        let bin_dir = Path::new(env!("CARGO_BIN_EXE_bench")).parent().context("where bench is")?;
        let output = command.args(arguments.split_whitespace()).env("WEFT_BIN_DIR", bin_dir).output()?;
        let text = both(&output);
        assert!(!output.status.success() && text.contains(expected), "{arguments}: {text}");
    }
    bench.is_gone()
}
