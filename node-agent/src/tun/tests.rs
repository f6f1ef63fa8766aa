//! Against the kernel, each in a network namespace of its own; root is needed, and a refusal is a failure.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::process::Command;
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use weft_shared::IfName;

use super::*;

fn in_namespace(test: impl FnOnce() + Send) {
    let run = move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of its own needs root");
        test();
    };
    if let Err(panic) = thread::scope(|scope| scope.spawn(run).join()) {
        std::panic::resume_unwind(panic);
    }
}

fn ip(args: &str) -> String {
    let output = Command::new("ip").args(args.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn name(text: &str) -> IfName {
    text.parse().expect(text)
}

#[test]
fn a_device_stays_without_a_process_and_keeps_address_and_route() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        ip("address add 10.5.1.0/32 dev flannel0");
        ip("link set flannel0 up");
        ip("route add 10.5.0.0/16 dev flannel0");
        drop(Queue::attach(&dev, true).expect("attached"));
        let queue = Queue::attach(&dev, true).expect("attached again");
        assert!(ip("route show dev flannel0").contains("10.5.0.0/16"));
        assert!(ip("address show dev flannel0").contains("10.5.1.0/32"));
        drop(queue);
        let details = ip("-d link show flannel0");
        for flag in ["type tun", "multi_queue", "vnet_hdr", "persist on", "pi off"] {
            assert!(details.contains(flag), "{flag} in {details}");
        }
    });
}

#[test]
fn creation_leaves_alone_what_has_the_name() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        assert_eq!(create(&dev).map_err(|error| error.kind()), Err(ErrorKind::ResourceBusy));
        ip("link add flannel1 type bridge");
        assert!(create(&name("flannel1")).is_err());
        assert_eq!(create(&name("flannel%d")).map_err(|error| error.kind()), Err(ErrorKind::InvalidInput));
    });
}

#[test]
fn attaching_never_makes_a_device_nor_takes_anothers() {
    in_namespace(|| {
        let dev = name("flannel0");
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::Absent(_))));
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::Absent(_))), "and none was made");
        ip("tuntap add flannel0 mode tun");
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::WrongKind(_))), "a single queue");
        ip("link del flannel0");
        ip("link add flannel0 type bridge");
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::WrongKind(_))), "a bridge");
    });
}

#[test]
fn the_virtio_header_is_the_first_queues_choice_and_a_second_of_another_mode_is_refused() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        let plain = Queue::attach(&dev, false).expect("without the header");
        assert!(!ip("-d link show flannel0").contains("vnet_hdr on"));
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::InUse(_))));
        drop(plain);
        let _with = Queue::attach(&dev, true).expect("with the header again");
        assert!(ip("-d link show flannel0").contains("vnet_hdr on"));
        assert!(matches!(Queue::attach(&dev, false), Err(AttachError::InUse(_))));
    });
}

#[test]
fn a_device_that_goes_with_its_program_is_not_attached_to() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        let _others = Queue::attach(&dev, true).expect("attached");
        // What is left is a device that lives as long as that queue: a running flanneld's.
        ip("tuntap del flannel0 mode tun multi_queue");
        assert!(matches!(Queue::attach(&dev, true), Err(AttachError::NotOurs(_))));
    });
}

/// With and without reads that wait by themselves, which this kernel may not have.
#[test]
fn a_deleted_device_says_so_on_its_queue_also_to_a_read_that_waits() {
    in_namespace(|| {
        let dev = name("flannel0");
        for in_reads in [false, true] {
            create(&dev).expect("created, also anew while the old queue is open");
            let mut queue = Queue::attach(&dev, true).expect("attached");
            if in_reads {
                let _ = queue.wait_in_reads();
            }
            assert_eq!(queue.read_now(&mut [0; 2048]), Err(Errno::EAGAIN));
            let ended = thread::scope(|scope| {
                let waiting = scope.spawn(|| queue.read(&mut [0; 2048]));
                ip("link del flannel0");
                waiting.join().expect("no panic")
            });
            assert!(matches!(ended, Err(Errno::EBADFD | Errno::EFAULT)), "{ended:?}");
            assert_eq!(queue.read_now(&mut [0; 2048]), Err(Errno::EBADFD));
        }
    });
}

#[test]
fn a_packet_ends_the_wait_and_what_must_not_wait_finds_nothing_behind_it() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        ip("link set flannel0 addrgenmode none");
        ip("address add 10.5.1.0/32 dev flannel0");
        ip("link set flannel0 up");
        ip("route add 10.5.0.0/16 dev flannel0");
        for in_reads in [false, true] {
            let mut queue = Queue::attach(&dev, true).expect("attached");
            if in_reads {
                let _ = queue.wait_in_reads();
            }
            let socket = UdpSocket::bind("10.5.1.0:0").expect("bind");
            let read = thread::scope(|scope| {
                let waiting = scope.spawn(|| queue.read(&mut [0; 2048]));
                // A device just attached to lets packets through only when the kernel has noticed its carrier.
                while !waiting.is_finished() {
                    socket.send_to(&[0; 100], "10.5.2.1:9").expect("sent");
                    thread::yield_now();
                }
                waiting.join().expect("no panic")
            });
            assert_eq!(read, Ok(VNET_HDR_LEN + 128));
            while queue.read_now(&mut [0; 2048]).is_ok() {}
            assert_eq!(queue.read_now(&mut [0; 2048]), Err(Errno::EAGAIN));
        }
    });
}

#[test]
fn descriptors_are_closed_on_exec() {
    in_namespace(|| {
        let dev = name("flannel0");
        create(&dev).expect("created");
        let queue = Queue::attach(&dev, true).expect("attached");
        let flags = nix::fcntl::fcntl(&queue, nix::fcntl::FcntlArg::F_GETFD).expect("flags");
        assert_eq!(flags & nix::libc::FD_CLOEXEC, nix::libc::FD_CLOEXEC);
    });
}
