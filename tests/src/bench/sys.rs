//! The system calls without a safe wrapper fit for a generator's inner loop: many datagrams in one call (sendmmsg(2),
//! recvmmsg(2)), and a TUN device (Linux Documentation/networking/tuntap.rst).
#![expect(
    unsafe_code,
    reason = "sendmmsg, recvmmsg and TUNSETIFF; nix's wrappers rebuild their lists per call"
)]

use std::fs::File;
use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::ptr;

use nix::libc::{self, c_int, iovec, mmsghdr};

/// Datagrams that go out or come in together, on a connected socket.
#[derive(Debug)]
pub(super) struct Batch {
    buffers: Vec<u8>,
    stride: usize,
    lengths: Vec<usize>,
}

/// Enough for what the loads use; the lists lie on the stack.
const MOST: usize = 64;

impl Batch {
    /// At most 64 datagrams of at most `size` bytes.
    pub(super) fn new(count: usize, size: usize) -> Self {
        let count = count.min(MOST);
        Self { buffers: vec![0; count * size], stride: size, lengths: vec![size; count] }
    }

    pub(super) fn len(&self) -> usize {
        self.lengths.len()
    }

    pub(super) fn datagram_mut(&mut self, index: usize) -> &mut [u8] {
        &mut self.buffers[index * self.stride..][..self.stride]
    }

    /// The datagrams of the last [`Batch::receive`].
    pub(super) fn received(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        let slots = self.buffers.chunks(self.stride).zip(&self.lengths).take(count);
        slots.map(|(slot, length)| &slot[..*length])
    }

    /// All of them, each as long as a slot; how many the kernel took.
    pub(super) fn send(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(|messages, count| {
            // SAFETY: `messages` holds `count` headers, whose lists and buffers outlive the call.
            unsafe { libc::sendmmsg(socket.as_raw_fd(), messages, count, 0) }
        })
    }

    /// Waits for one, takes what is there.
    pub(super) fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.call(|messages, count| {
            // SAFETY: as above; the buffers are ours to write, and the kernel is told their size.
            unsafe {
                libc::recvmmsg(
                    socket.as_raw_fd(),
                    messages,
                    count,
                    libc::MSG_WAITFORONE as _,
                    ptr::null_mut(),
                )
            }
        })
    }

    fn call(&mut self, f: impl FnOnce(*mut mmsghdr, u32) -> c_int) -> io::Result<usize> {
        // SAFETY: zeroes are valid values of these plain C structures.
        let (mut slices, mut messages): ([iovec; MOST], [mmsghdr; MOST]) = unsafe { (zeroed(), zeroed()) };
        let slots = self.buffers.chunks_mut(self.stride);
        for ((slot, slice), message) in slots.zip(&mut slices).zip(&mut messages) {
            slice.iov_base = slot.as_mut_ptr().cast();
            slice.iov_len = slot.len();
            message.msg_hdr.msg_iov = slice;
            message.msg_hdr.msg_iovlen = 1;
        }
        let done = f(messages.as_mut_ptr(), self.lengths.len() as u32);
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        for (length, message) in self.lengths.iter_mut().zip(&messages).take(done as usize) {
            *length = message.msg_len as usize;
        }
        Ok(done as usize)
    }
}

/// A TUN device of that name in this thread's network namespace, which goes with the file. Reads and writes never wait.
pub(super) fn tun(name: &str) -> io::Result<File> {
    let file = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: zeroes are a valid value of this plain C structure.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.is_empty() || name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("interface name {name:?}")));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } {
        0 => Ok(file),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn a_batch_arrives_as_it_was_sent() -> io::Result<()> {
        let (to, from) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
        from.connect(to.local_addr()?)?;
        let mut out = Batch::new(3, 100);
        for index in 0..out.len() {
            out.datagram_mut(index).fill(index as u8 + 1);
        }
        assert_eq!(out.send(from.as_fd())?, 3);
        from.send(b"short")?;
        let mut arrived: Vec<Vec<u8>> = Vec::new();
        let mut batch = Batch::new(64, 2048);
        while arrived.len() < 4 {
            let count = batch.receive(to.as_fd())?;
            arrived.extend(batch.received(count).map(<[u8]>::to_vec));
        }
        assert_eq!(arrived, [vec![1; 100], vec![2; 100], vec![3; 100], b"short".to_vec()]);
        Ok(())
    }

    #[test]
    fn a_name_that_no_device_can_have_is_refused() {
        for name in ["", "sixteen-letters-"] {
            let error = tun(name).expect_err("no such device");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
