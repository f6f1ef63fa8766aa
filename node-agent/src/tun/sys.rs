//! `/dev/net/tun`: its ioctls, and reads that wait or must not.
#![expect(unsafe_code, reason = "neither the ioctls of TUN devices nor preadv2 have a safe wrapper")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use weft_shared::IfName;

const CLONE_DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr` of linux/virtio_net.h, without `num_buffers`.
pub const VNET_HDR_LEN: usize = 10;

/// `struct ifreq` of linux/if.h as `TUNSETIFF` reads it: a name and flags.
#[repr(C)]
struct IfReq {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

// The kernel copies 40 bytes on 64-bit machines, 32 on others: ours must not be shorter.
const _: () = assert!(size_of::<IfReq>() == 40);

nix::ioctl_write_ptr_bad!(tunsetiff, libc::TUNSETIFF, IfReq);
nix::ioctl_read_bad!(tungetiff, libc::TUNGETIFF, IfReq);
nix::ioctl_write_int_bad!(tunsetpersist, libc::TUNSETPERSIST);
nix::ioctl_write_int_bad!(tunsetoffload, libc::TUNSETOFFLOAD);
nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, libc::TUNSETVNETHDRSZ, libc::c_int);

/// Makes a persistent device in the network namespace of the calling thread. Whatever has the name already is left as
/// it is: `EBUSY`.
pub fn create(name: &IfName) -> io::Result<()> {
    let file = open()?;
    let flags = flags(true) | libc::IFF_TUN_EXCL;
    // SAFETY: TUNSETIFF reads an ifreq from the pointer, which is to one that outlives the call.
    unsafe { tunsetiff(file.as_raw_fd(), &request(name, flags)?) }?;
    // SAFETY: TUNSETPERSIST takes a number and touches no memory of ours.
    unsafe { tunsetpersist(file.as_raw_fd(), 1) }?;
    Ok(())
}

/// What a queue asks its device for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// TCP super-packets and packets without a checksum are read.
    pub tso: bool,
    /// UDP super-packets are read.
    pub uso: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("there is no device {0}")]
    Absent(IfName),
    #[error("device {0} is not persistent: another program made it and may still use it")]
    NotOurs(IfName),
    #[error("device {0} is in use by another process, in another mode")]
    InUse(IfName),
    #[error("device {0} is no multi-queue TUN device")]
    WrongKind(IfName),
    #[error("{0}: {1}")]
    Io(&'static str, #[source] io::Error),
}

/// One queue of a device.
#[derive(Debug)]
pub struct Queue {
    file: File,
    /// The descriptor blocks, and what must not wait says so with each read.
    waits_in_reads: bool,
}

impl Queue {
    /// Attaches to the device of that name in the network namespace of the calling thread; never makes one.
    pub fn attach(name: &IfName, vnet_hdr: bool) -> Result<Self, AttachError> {
        if nix::net::if_::if_nametoindex(name.as_str()).is_err() {
            return Err(AttachError::Absent(name.clone()));
        }
        let file = open().map_err(|error| AttachError::Io(CLONE_DEVICE, error))?;
        let mut request =
            request(name, flags(vnet_hdr)).map_err(|error| AttachError::Io("TUNSETIFF", error))?;
        // SAFETY: TUNSETIFF reads an ifreq from the pointer, which is to one that outlives the call.
        match unsafe { tunsetiff(file.as_raw_fd(), &request) } {
            Ok(_) => {}
            Err(nix::Error::EINVAL) => return Err(AttachError::WrongKind(name.clone())),
            Err(errno) => return Err(AttachError::Io("TUNSETIFF", errno.into())),
        }
        // SAFETY: TUNGETIFF writes an ifreq to the pointer, which is to one that outlives the call.
        unsafe { tungetiff(file.as_raw_fd(), &mut request) }
            .map_err(|errno| AttachError::Io("TUNGETIFF", errno.into()))?;
        let found = libc::c_int::from(request.flags);
        if found & libc::IFF_PERSIST == 0 {
            // Also what is left of a device that went between look and ioctl: a fresh one, which goes with `file`.
            return Err(AttachError::NotOurs(name.clone()));
        }
        let mode = libc::IFF_VNET_HDR | libc::IFF_NO_PI;
        if found & mode != flags(vnet_hdr) & mode {
            return Err(AttachError::InUse(name.clone()));
        }
        let queue = Self { file, waits_in_reads: false };
        if vnet_hdr {
            queue.set_header_length().map_err(|error| AttachError::Io("TUNSETVNETHDRSZ", error))?;
        }
        Ok(queue)
    }

    /// Tells the kernel what may be read from here on; the device keeps it when the queue goes. `EINVAL`: the kernel
    /// does not know one of them (UDP super-packets came with Linux 6.2), and nothing has changed.
    pub fn set_features(&self, features: Features) -> nix::Result<()> {
        let mut offload = 0;
        if features.tso {
            offload |= libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        }
        if features.uso {
            offload |= libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        }
        // SAFETY: TUNSETOFFLOAD takes a number and touches no memory of ours.
        unsafe { tunsetoffload(self.file.as_raw_fd(), offload.cast_signed()) }?;
        Ok(())
    }

    /// Has [`Self::read`] wait by itself, which is a system call less. An error, and nothing has changed, where a read cannot
    /// say that it must not wait: `EOPNOTSUPP` of kernels before 6.5, as far as TUN devices go.
    pub fn wait_in_reads(&mut self) -> nix::Result<()> {
        // A descriptor without a device tells as well, and no packet is lost by asking.
        let apart = open().map_err(|error| Errno::from_raw(error.raw_os_error().unwrap_or_default()))?;
        match read_nowait(apart.as_fd(), &mut [0]) {
            Ok(_) | Err(Errno::EBADFD) => {}
            Err(errno) => return Err(errno),
        }
        fcntl(&self.file, FcntlArg::F_SETFL(OFlag::empty()))?;
        self.waits_in_reads = true;
        Ok(())
    }

    /// Waits for a packet and reads it; `EINTR` when a signal came first, and `EAGAIN` when what came is gone again.
    pub fn read(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        if !self.waits_in_reads {
            let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, PollTimeout::NONE)?;
            // A device that goes says so here first: reads find it empty for a moment longer (tun_chr_poll).
            let gone = PollFlags::POLLERR | PollFlags::POLLNVAL;
            if fds[0].revents().is_some_and(|came| came.intersects(gone)) {
                return Err(Errno::EBADFD);
            }
        }
        nix::unistd::read(self, buffer)
    }

    /// Reads a packet; `EAGAIN` when there is none.
    pub fn read_now(&self, buffer: &mut [u8]) -> nix::Result<usize> {
        if self.waits_in_reads { read_nowait(self.as_fd(), buffer) } else { nix::unistd::read(self, buffer) }
    }

    /// Reads and forgets what is waiting, as long as it may have been waiting when this began.
    pub fn discard(&self) {
        // The queue's length is the device's `txqlen`, which is 500 unless somebody changed it.
        for _ in 0..10_000 {
            if self.read_now(&mut [0; 64]).is_err() {
                return;
            }
        }
    }

    /// Another program may have left the device with a longer one (qemu's has 12 bytes).
    fn set_header_length(&self) -> io::Result<()> {
        let length = VNET_HDR_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int from the pointer, which is to one that outlives the call.
        unsafe { tunsetvnethdrsz(self.file.as_raw_fd(), &raw const length) }?;
        Ok(())
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// preadv2(2), which musl has no function for that takes flags.
fn read_nowait(file: BorrowedFd<'_>, buffer: &mut [u8]) -> nix::Result<usize> {
    let part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel reads one iovec and writes to what it describes, which is `buffer` and borrowed for that long.
    //
    // An offset of -1 is the file's own; the second half of it is zero on 64-bit machines.
    let read = unsafe {
        libc::syscall(
            libc::SYS_preadv2,
            file.as_raw_fd(),
            &raw const part,
            1_usize,
            -1_i64,
            0_usize,
            libc::RWF_NOWAIT,
        )
    };
    Errno::result(read).map(|read| read.unsigned_abs() as usize)
}

fn open() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open(CLONE_DEVICE)
}

fn flags(vnet_hdr: bool) -> libc::c_int {
    libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | if vnet_hdr { libc::IFF_VNET_HDR } else { 0 }
}

fn request(name: &IfName, flags: libc::c_int) -> io::Result<IfReq> {
    // A `%d` would make the kernel choose a name (dev_alloc_name).
    if name.as_str().contains('%') {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is a pattern, no name")));
    }
    let mut request = IfReq { name: [0; libc::IFNAMSIZ], flags: flags as libc::c_short, rest: [0; 22] };
    for (to, from) in request.name.iter_mut().zip(name.as_str().bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from;
    }
    Ok(request)
}
