//! Kernel settings below `/proc/sys`, of the network namespace the agent lives in.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::KernelError;

/// `None`: this kernel has no such setting (IPv6 switched off, device gone).
pub(super) fn read(path: &str) -> Result<Option<String>, KernelError> {
    match fs::read_to_string(full(path)) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(KernelError::Sysctl { path: path.into(), reason: e.to_string() }),
    }
}

/// A setting that this kernel does not have is left alone.
pub(super) fn write(path: &str, value: &str) -> Result<(), KernelError> {
    match fs::write(full(path), value) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(KernelError::Sysctl { path: path.into(), reason: e.to_string() })
        }
        _ => Ok(()),
    }
}

fn full(path: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(path)
}
