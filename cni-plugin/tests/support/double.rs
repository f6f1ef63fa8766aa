//! The agent's side of the socket with the smallest books that can be right: it speaks the real protocol, hands out
//! addresses of 10.77.0.0/24 and fd77::/64, undoes what was not committed, and misbehaves when told to.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use ipnetwork::IpNetwork;
use weft_shared::names::host_ifname;
use weft_shared::protocol::{
    Attachment, Failure, PodAddress, Reply, Request, Reservation, read_frame, write_frame,
};

use super::Namespace;

#[derive(Debug, Clone, Default)]
pub(crate) struct Behaviour {
    /// Answer this instead of serving.
    pub(crate) refuse: Option<Failure>,
    /// Answer this to Commit.
    pub(crate) refuse_commit: Option<Failure>,
    /// Hang up instead of answering Commit.
    pub(crate) close_at_commit: bool,
    /// Take requests and say nothing.
    pub(crate) mute: bool,
    /// Say this instead of an answer, and go on listening: to everything, or to Commit alone.
    pub(crate) says: Option<Vec<u8>>,
    pub(crate) says_at_commit: Option<Vec<u8>>,
    /// Leave a veth alone that is in the way of a reservation or of an undone one.
    pub(crate) spare_orphans: bool,
    /// As an agent of before there were host ports and bandwidth.
    pub(crate) is_old: bool,
    pub(crate) dual_stack: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Record {
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) committed: bool,
}

#[derive(Default)]
pub(crate) struct Books {
    pub(crate) behaviour: Behaviour,
    pub(crate) records: BTreeMap<Attachment, Record>,
    pub(crate) requests: Vec<Request>,
    next: u8,
}

pub(crate) struct Double {
    books: Arc<Mutex<Books>>,
    socket: PathBuf,
    stop: Arc<AtomicBool>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct Host {
    namespace: String,
    bridge_ifindex: u32,
    bridge_mac: String,
}

impl Double {
    pub(crate) fn listen(socket: &Path, node: &Namespace) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).expect("bind");
        let bridge = node.link("cni0");
        let host = Host {
            namespace: node.0.clone(),
            bridge_ifindex: bridge["ifindex"].as_u64().expect("bridge") as u32,
            bridge_mac: bridge["address"].as_str().expect("bridge").to_owned(),
        };
        let (books, stop) = (Arc::new(Mutex::new(Books { next: 9, ..Books::default() })), Arc::default());
        let (accepting, stopping) = (Arc::clone(&books), Arc::clone(&stop));
        let acceptor = thread::spawn(move || accept(&listener, &accepting, &stopping, &host));
        Self { books, socket: socket.to_owned(), stop, acceptor: Some(acceptor) }
    }

    pub(crate) fn behaving(self, behaviour: Behaviour) -> Self {
        self.books().behaviour = behaviour;
        self
    }

    pub(crate) fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("no handler panicked")
    }

    pub(crate) fn last_request(&self) -> Request {
        self.books().requests.last().expect("a request").clone()
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        let woken = UnixStream::connect(&self.socket).is_ok();
        let _ = std::fs::remove_file(&self.socket);
        // A test that has failed may have taken the node away before, and with it the socket.
        if let Some(acceptor) = self.acceptor.take().filter(|_| woken) {
            let _ = acceptor.join();
        }
    }
}

fn accept(listener: &UnixListener, books: &Arc<Mutex<Books>>, stop: &AtomicBool, host: &Host) {
    while let Ok((stream, _)) = listener.accept() {
        if stop.load(Ordering::SeqCst) {
            return;
        }
        let (books, host) = (Arc::clone(books), host.clone());
        thread::spawn(move || serve(stream, &books, &host));
    }
}

fn serve(mut stream: UnixStream, books: &Mutex<Books>, host: &Host) {
    let mut open = None;
    while let Ok(request) = read_frame::<Request>(&mut stream) {
        let reply = {
            let mut books = books.lock().expect("books");
            books.requests.push(request.clone());
            if let Request::Reserve(reserve) = &request {
                open = Some(reserve.attachment.clone());
            }
            let Behaviour { says, says_at_commit, .. } = &books.behaviour;
            let at_commit = says_at_commit.as_ref().filter(|_| matches!(request, Request::Commit(_)));
            if let Some(bytes) = says.as_ref().or(at_commit) {
                // Whoever hears nonsense may hang up at once.
                let _ = stream.write_all(bytes);
                continue;
            }
            answer(&mut books, host, request)
        };
        match reply {
            Some(reply) => {
                if write_frame(&mut stream, &reply).is_err() {
                    break;
                }
            }
            None => break,
        }
    }
    let mut books = books.lock().expect("books");
    if let Some(attachment) = open
        && books.records.get(&attachment).is_some_and(|r| !r.committed)
    {
        if !books.behaviour.spare_orphans {
            host.delete_veth(&attachment);
        }
        books.records.remove(&attachment);
    }
}

/// `None` hangs up.
fn answer(books: &mut Books, host: &Host, request: Request) -> Option<Reply> {
    let behaviour = books.behaviour.clone();
    if behaviour.mute {
        thread::park();
    }
    if let Some(failure) = behaviour.refuse {
        return Some(Reply::Failed(failure));
    }
    Some(match request {
        Request::Reserve(reserve) => {
            if books.records.get(&reserve.attachment).is_some_and(|r| r.committed) {
                return Some(failed(100, "attachment exists"));
            }
            if !behaviour.spare_orphans {
                host.delete_veth(&reserve.attachment);
            }
            let addresses = books.allocate(&reserve.requested, behaviour.dual_stack);
            let record =
                Record { addresses: addresses.iter().map(|a| a.address.ip()).collect(), committed: false };
            books.records.insert(reserve.attachment.clone(), record);
            let options = Some(reserve.bridge.clone());
            Reply::Reserved(Reservation {
                addresses,
                overlay: ["10.76.0.0/15", "fd00::/8"].map(|o| o.parse().expect("subnet")).to_vec(),
                mtu: reserve.bridge.mtu.unwrap_or(1450),
                bridge: reserve.bridge.name,
                bridge_ifindex: host.bridge_ifindex,
                bridge_mac: host.bridge_mac.parse().expect("mac"),
                host_ifname: host_ifname(&reserve.attachment),
                host_ports: if behaviour.is_old { vec![] } else { reserve.host_ports },
                bandwidth: if behaviour.is_old { Default::default() } else { reserve.bandwidth },
                options: options.filter(|_| !behaviour.is_old),
            })
        }
        Request::Commit(_) if behaviour.close_at_commit => return None,
        Request::Commit(commit) => match (behaviour.refuse_commit, books.records.get_mut(&commit.attachment))
        {
            (Some(failure), _) => Reply::Failed(failure),
            (None, Some(record)) => {
                record.committed = true;
                Reply::Done
            }
            (None, None) => failed(11, "aborted"),
        },
        Request::Release { attachment } => {
            host.delete_veth(&attachment);
            books.records.remove(&attachment);
            Reply::Done
        }
        Request::Check { attachment, addresses } => match books.records.get(&attachment) {
            Some(record) if record.committed && record.addresses == addresses => Reply::Done,
            _ => failed(104, "no such attachment"),
        },
        Request::Gc { network, valid } => {
            let gone: Vec<_> = books
                .records
                .keys()
                .filter(|a| a.network == network && !valid.contains(a))
                .cloned()
                .collect();
            for attachment in gone {
                host.delete_veth(&attachment);
                books.records.remove(&attachment);
            }
            Reply::Done
        }
        Request::Status => Reply::Done,
    })
}

impl Books {
    fn allocate(&mut self, requested: &[IpAddr], dual_stack: bool) -> Vec<PodAddress> {
        let addresses = if requested.is_empty() {
            self.next += 1;
            let v4 = IpAddr::from([10, 77, 0, self.next]);
            let v6 = format!("fd77::{:x}", self.next).parse().expect("address");
            if dual_stack { vec![v4, v6] } else { vec![v4] }
        } else {
            requested.to_vec()
        };
        let with_gateway = |ip: IpAddr| {
            let (len, gateway) = if ip.is_ipv4() { (24, "10.77.0.1") } else { (64, "fd77::1") };
            let address = IpNetwork::new(ip, len).expect("address");
            PodAddress { address, gateway: gateway.parse().expect("gateway") }
        };
        addresses.into_iter().map(with_gateway).collect()
    }
}

impl Host {
    fn delete_veth(&self, attachment: &Attachment) {
        let name = host_ifname(attachment);
        let _ = Command::new("ip")
            .args(["-n", &self.namespace, "link", "del", name.as_str()])
            .stderr(Stdio::null())
            .status();
    }
}

pub(crate) fn failed(code: u32, msg: &str) -> Reply {
    Reply::Failed(failure(code, msg))
}

pub(crate) fn failure(code: u32, msg: &str) -> Failure {
    Failure { code, msg: msg.into(), details: String::new() }
}
