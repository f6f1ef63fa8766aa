//! Kernel settings below `/proc/sys`, of the network namespace the agent lives in: whoever asks decides whose they are
//! (sysctl_net.c), not who has mounted them. In a container `/proc/sys` can be read, and is read-only; the host's own,
//! mounted at another place, can be written to.

use std::fs;
use std::io;
use std::path::Path;

use weft_shared::names::SYSCTL_DIR;

use super::KernelError;

/// `None`: this kernel has no such setting (IPv6 switched off, device gone).
pub(super) fn read(path: &str) -> Result<Option<String>, KernelError> {
    match fs::read_to_string(Path::new(SYSCTL_DIR).join(path)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(KernelError::Sysctl { path: path.into(), reason: e.to_string() }),
    }
}

/// Below `dir`. A setting that this kernel does not have is left alone.
pub(super) fn write(dir: &Path, path: &str, value: &str) -> Result<(), KernelError> {
    match fs::write(dir.join(path), value) {
        Err(e) if e.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let reason = format!("{e}: in a container, --sysctl-dir says where the host's can be written to");
            Err(KernelError::Sysctl { path: path.into(), reason })
        }
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Sysctl { path: path.into(), reason: e.to_string() })
        }
        _ => Ok(()),
    }
}
