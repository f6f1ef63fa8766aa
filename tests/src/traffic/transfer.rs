//! A large transfer over one TCP connection, compared by hash.

use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Result, anyhow};
use sha2::{Digest, Sha256};

use crate::netns::Netns;
use crate::random::Random;

const CHUNK: usize = 64 << 10;
/// A transfer that stands still this long has failed.
const PATIENCE: Duration = Duration::from_secs(30);

/// SHA-256 and length of what was sent, and of what arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transfer {
    pub sent: (u64, Vec<u8>),
    pub received: (u64, Vec<u8>),
}

/// Sends `bytes` pseudo-random bytes.
pub fn transfer(from: &Netns, to: &Netns, address: Ipv4Addr, bytes: u64) -> Result<Transfer> {
    let listener = to.enter(|| Ok(TcpListener::bind(SocketAddrV4::new(address, 0))?))?;
    let target = listener.local_addr()?;
    let mut stream = from.enter(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let receiver = thread::spawn(move || -> Result<_> {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        digest(stream)
    });
    let mut random = Random::seeded(bytes);
    let mut hash = Sha256::new();
    let mut left = bytes;
    let mut chunk = vec![0; CHUNK];
    while left > 0 {
        random.fill(&mut chunk);
        let part = &chunk[..CHUNK.min(left as usize)];
        hash.update(part);
        stream.write_all(part)?;
        left -= part.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let received = receiver.join().map_err(|_| anyhow!("the receiver panicked"))??;
    Ok(Transfer { sent: (bytes, hash.finalize().to_vec()), received })
}

fn digest(mut from: impl Read) -> Result<(u64, Vec<u8>)> {
    let mut hash = Sha256::new();
    let mut total = 0;
    let mut chunk = vec![0; CHUNK];
    loop {
        match from.read(&mut chunk)? {
            0 => return Ok((total, hash.finalize().to_vec())),
            len => {
                hash.update(&chunk[..len]);
                total += len as u64;
            }
        }
    }
}
