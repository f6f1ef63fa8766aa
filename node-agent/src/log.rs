//! Where log lines go: standard error, as text or as one JSON object each.

use std::io::IsTerminal;

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::config::{Config, LogFormat};

/// `--log-level` is for weft's own lines; libraries speak from WARN on.
pub fn start(config: &Config) {
    let ours = LevelFilter::from_level(config.log_level);
    let filter = Targets::new()
        .with_default(LevelFilter::WARN)
        // It calls every refused connection an error; the store says it once, and why.
        .with_target("kube_client", LevelFilter::OFF)
        .with_target("weftd", ours)
        .with_target("weft_agent", ours);
    let layer = fmt::layer().with_writer(std::io::stderr).with_target(false);
    let layer = match config.log_format {
        LogFormat::Text => layer.with_ansi(std::io::stderr().is_terminal()).boxed(),
        LogFormat::Json => layer.json().boxed(),
    };
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
}
