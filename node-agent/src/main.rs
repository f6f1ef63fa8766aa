//! `weftd`: reads the settings, starts the log and the runtime, and reports how it ended.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use weft_agent::config::{Invocation, from_process};
use weft_agent::{app, log};

fn main() -> ExitCode {
    let config = match from_process() {
        Ok(Invocation::Run(config)) => *config,
        Ok(Invocation::Print(text)) => {
            #[expect(clippy::print_stdout, reason = "--help and --version were asked for")]
            {
                print!("{text}");
            }
            return ExitCode::SUCCESS;
        }
        Err(error) => {
            eprintln!("weftd: {error}");
            return ExitCode::from(2);
        }
    };
    log::start(&config);
    // One thread serves everything but what blocks (netlink, SQLite): the agent idles at a few megabytes.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.map_err(anyhow::Error::from).and_then(|runtime| {
        runtime.block_on(async {
            let stop = CancellationToken::new();
            tokio::spawn(stop_on_signal(stop.clone()));
            app::run(config, stop).await
        })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("weftd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The first SIGTERM or SIGINT asks everything to end; the second ends the process at once.
async fn stop_on_signal(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals cannot be received: stop weftd with SIGKILL");
        return;
    };
    for _ in 0..2 {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        if stop.is_cancelled() {
            std::process::exit(1);
        }
        stop.cancel();
    }
}
