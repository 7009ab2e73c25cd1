//! The program `proxy-stand-in`: a farm of proxies for a person to try.

use std::io::{self, Write as _};
use std::process::ExitCode;

use super::{ProxyFarm, ProxyFarmOptions};

const USAGE: &str = "usage: proxy-stand-in OPTIONS.json

A stand-in for ShardingSphere-Proxy over real PostgreSQL nodes, for trying things out. OPTIONS.json:
  {\"proxies\": 2, \"ports\": [3307, 3308], \"frontend\": \"PostgresMd5\", \"database\": \"bank\",
   \"users\": [{\"name\": \"root\", \"password\": \"root\"}], \"delays\": \"Measured\", \"transaction\": \"Local\", \"clock\": \"TsoRedis\",
   \"nodes\": [{\"host\": \"127.0.0.1\", \"port\": 5432, \"user\": \"postgres\", \"password\": \"\", \"database\": \"postgres\"}]}
It runs until SIGINT or SIGTERM.
";

/// Runs it.
pub fn main(arguments: &[String]) -> ExitCode {
    let [_, path] = arguments else {
        let _ = io::stderr().write_all(USAGE.as_bytes());
        return ExitCode::from(2);
    };
    match run(path) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "proxy-stand-in: {path}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(path: &str) -> io::Result<()> {
    let options: ProxyFarmOptions = serde_json::from_slice(&std::fs::read(path)?)?;
    let farm = ProxyFarm::start(options);
    let mut out = io::stdout().lock();
    for i in 0..farm.proxies() {
        writeln!(out, "proxy {i}: 127.0.0.1:{}", farm.port(i))?;
    }
    out.flush()?;
    drop(out);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        Ok(())
    })
}
