//! How a point is made, as the command line has it.

use std::time::Duration;

use clap::Args;

use super::proof;
use crate::failure::{Failure, Result};

/// Attempts at the proof alone, where nothing else is said.
const ATTEMPTS: u32 = 500;
/// Locks, where nothing else is said.
const LOCKS: u32 = 20;

/// How a point is made, as the command line has it.
#[derive(Debug, Clone, Args)]
pub(crate) struct PointArgs {
    /// Whether the cluster is locked for its point; `auto`: only if it is not quiet enough without
    /// [default: through a proxy `always` for a backup and `auto` for a point, with `--nodes` `never`]
    #[arg(long, value_name = "WHEN", value_enum)]
    lock: Option<Lock>,
    /// Unlock after so long, whatever has been reached; watchdogs in the agents see to it if this program cannot
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = deadline)]
    lock_timeout: Duration,
    /// Lock the cluster for no longer than this within an hour, all tries and points together
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = clap::value_parser!(u16).range(1..=3600))]
    lock_budget: u16,
    /// Fail if no point of the whole cluster can be proved, rather than make one per node; through a proxy it always does
    #[arg(long)]
    require_cluster: bool,
    /// Prove the point although transactions stay prepared, and list those in it
    #[arg(long)]
    accept_in_doubt: bool,
    /// Try so often again to prove the point, each time under a new name [default: 500, with the lock 20]
    #[arg(long, value_name = "N")]
    point_retries: Option<u32>,
    /// Try to prove the point for so long [default: 30, through a proxy 600 for a backup and 60 for a point]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u16).range(1..=3600))]
    point_timeout: Option<u16>,
}

/// `--lock`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Lock {
    /// With the lock
    Always,
    /// Without at first, then with the lock
    Auto,
    /// Without
    Never,
}

impl Lock {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Auto => "auto",
            Self::Never => "never",
        }
    }
}

/// What a point is made for, and through whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Occasion {
    /// A list of nodes: nothing can be locked.
    Nodes,
    /// A backup through proxies. Its copies were hours of work.
    Backup,
    /// A point alone, through proxies.
    Point,
}

impl Occasion {
    /// The same, as far as there are proxies.
    pub(crate) fn through(self, proxies: bool) -> Self {
        if proxies { self } else { Self::Nodes }
    }
}

fn deadline(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is no number".to_owned())?;
    if (0.2..=60.0).contains(&seconds) {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err("it is not between 0.2 and 60 seconds".to_owned())
}

impl PointArgs {
    /// Refuses what goes against itself.
    ///
    /// # Errors
    /// For a lock without a proxy: nobody else has one; for a budget that no lock fits in.
    pub(crate) fn check(&self, occasion: Occasion) -> Result<()> {
        let lock = self.lock(occasion);
        if occasion == Occasion::Nodes && lock != Lock::Never {
            let message = format!(
                "`--lock {}` needs a proxy that locks the cluster; with `--nodes` there is none",
                lock.name()
            );
            return Err(Failure::usage(message).next("give `--host`, or leave `--lock` away"));
        }
        if self.lock_budget() < self.lock_timeout {
            let message = "`--lock-budget` is shorter than `--lock-timeout`: not one lock fits in";
            return Err(Failure::usage(message));
        }
        Ok(())
    }

    /// `--lock`, or what is usual.
    pub(crate) fn lock(&self, occasion: Occasion) -> Lock {
        self.lock.unwrap_or(match occasion {
            Occasion::Nodes => Lock::Never,
            Occasion::Backup => Lock::Always,
            Occasion::Point => Lock::Auto,
        })
    }

    /// `--lock-timeout`
    pub(crate) fn lock_timeout(&self) -> Duration {
        self.lock_timeout
    }

    /// `--lock-budget`
    pub(crate) fn lock_budget(&self) -> Duration {
        Duration::from_secs(self.lock_budget.into())
    }

    /// `--require-cluster`
    pub(crate) fn requires_cluster(&self) -> bool {
        self.require_cluster
    }

    /// The same, but that a point of the whole cluster is demanded, or is not.
    #[must_use]
    pub(crate) fn requiring_cluster(&self, require_cluster: bool) -> Self {
        Self {
            require_cluster,
            ..self.clone()
        }
    }

    /// Locks after the first one.
    pub(crate) fn locks(&self) -> u32 {
        self.point_retries.unwrap_or(LOCKS)
    }

    /// `--point-timeout`
    pub(crate) fn timeout(&self, occasion: Occasion) -> Duration {
        let usual = match occasion {
            Occasion::Nodes => 30,
            Occasion::Backup => 600,
            Occasion::Point => 60,
        };
        Duration::from_secs(self.point_timeout.unwrap_or(usual).into())
    }

    /// For the proof alone.
    pub(crate) fn rules(&self, occasion: Occasion) -> proof::Rules {
        proof::Rules {
            retries: self.point_retries.unwrap_or(ATTEMPTS),
            timeout: self.timeout(occasion),
            accept_in_doubt: self.accept_in_doubt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Line {
        #[command(flatten)]
        point: PointArgs,
    }

    fn parsed(words: &[&str]) -> PointArgs {
        use clap::Parser as _;
        let words = ["backup"].iter().chain(words);
        Line::try_parse_from(words).unwrap().point
    }

    #[test]
    fn what_is_usual_depends_on_the_occasion() {
        let bare = parsed(&[]);
        let locks = [Occasion::Nodes, Occasion::Backup, Occasion::Point];
        assert_eq!(
            locks.map(|occasion| bare.lock(occasion)),
            [Lock::Never, Lock::Always, Lock::Auto]
        );
        assert_eq!(bare.lock_timeout(), Duration::from_secs(2));
        assert_eq!(bare.rules(Occasion::Nodes).retries, 500);
        let told = parsed(&[
            "--lock",
            "auto",
            "--lock-timeout",
            "0.5",
            "--point-retries",
            "3",
        ]);
        assert_eq!(told.lock(Occasion::Backup), Lock::Auto);
        assert_eq!(told.lock_timeout(), Duration::from_millis(500));
        assert_eq!((told.locks(), told.rules(Occasion::Point).retries), (3, 3));
    }

    #[test]
    fn what_goes_against_itself_is_refused() {
        assert!(parsed(&["--lock", "never"]).check(Occasion::Nodes).is_ok());
        assert!(
            parsed(&["--lock", "always"])
                .check(Occasion::Nodes)
                .is_err()
        );
        let short = ["--lock-budget", "1"];
        assert!(parsed(&short).check(Occasion::Backup).is_err());
        assert!(deadline("0.1").is_err() && deadline("61").is_err() && deadline("x").is_err());
    }
}
