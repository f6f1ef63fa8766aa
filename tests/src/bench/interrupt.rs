//! Ctrl-C: a run that is asked to end writes what it has and takes away what it made.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Result, bail};
use nix::sys::signal::{SigSet, Signal};

#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on the signals that end a program are noted instead. To be called before any other thread is started;
    /// child processes inherit the mask, so a Ctrl-C at the terminal leaves them to us.
    pub fn watch() -> Result<Self> {
        let interrupt = Self::default();
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block()?;
        let noted = interrupt.clone();
        thread::spawn(move || {
            while signals.wait().is_ok() {
                noted.0.store(true, Ordering::Relaxed);
            }
        });
        Ok(interrupt)
    }

    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub fn check(&self) -> Result<()> {
        if self.is_asked() { bail!("interrupted") } else { Ok(()) }
    }
}
