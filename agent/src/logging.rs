//! Logs, on stderr.

use std::io;

use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, LogLevel};

/// Our crates. Those we use log at `warn`: what they say below may show requests with their headers.
const OURS: [&str; 6] = [
    "pitr_agent",
    "pipeline",
    "catalog",
    "agent_api",
    "agent_sql",
    "agent_wal",
];

/// Starts logging; does nothing if it was started before.
pub fn start(level: LogLevel, format: LogFormat) {
    let level = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    let ours = OURS.map(|name| format!("{name}={level}")).join(",");
    let others = if level == "error" { "error" } else { "warn" };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(format!("{others},{ours}")))
        .with_writer(io::stderr)
        .with_ansi(false);
    // An error means that a logger is there already.
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
}
