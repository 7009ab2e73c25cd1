//! Whether clients are kept out, by a lock of the whole cluster, while databases are switched.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::coordinator::shardingsphere::Switch;
use crate::failure::{Failure, Result};

/// How long it is tried to lock the cluster. The copies were hours of work, and watchdogs of a program that has died rest after a minute
/// and the longest `--lock-timeout`.
pub(crate) const PATIENCE: Duration = Duration::from_mins(7);

/// Whether the cluster is locked, as the command line has it.
#[derive(Debug, Clone, Copy, Args)]
pub(crate) struct LockArgs {
    /// Whether writes through the proxies are refused while the databases are stopped, replaced and opened [default: with a
    /// proxy `always`, without one `never`]
    #[arg(long, value_name = "WHEN", value_enum)]
    lock: Option<When>,
    /// Unlock when the agents have not heard of this program for so long: it is dead, or cut off
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(15..=300))]
    lock_timeout: u16,
}

/// `--lock`
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum When {
    /// With the lock
    Always,
    /// Without
    Never,
}

/// Why clients are kept out by nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Open {
    /// `--lock never`
    AsAsked,
    /// There is no proxy to ask for it.
    NoProxy,
    /// The databases that clients use are not touched.
    Beside,
    /// They are stopped from the beginning on.
    Stopped,
}

/// What becomes of clients meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Clients {
    /// These proxies refuse their writes.
    KeptOut(Vec<String>),
    /// Nobody keeps them out.
    Open(Open),
}

impl LockArgs {
    /// Refuses what goes against itself.
    ///
    /// # Errors
    /// For a lock without a proxy: nobody else has one.
    pub(crate) fn check(self, has_proxy: bool) -> Result<()> {
        if self.lock == Some(When::Always) && !has_proxy {
            let message = "`--lock always` needs a proxy that locks the cluster, and none is given";
            return Err(Failure::usage(message).next("give `--host`, or leave `--lock` away"));
        }
        Ok(())
    }

    /// `--lock-timeout`
    pub(crate) fn silence(self) -> Duration {
        Duration::from_secs(self.lock_timeout.into())
    }

    /// Whether it is not to be locked.
    pub(crate) fn is_never(self) -> bool {
        self.lock == Some(When::Never)
    }
}

impl Open {
    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::AsAsked => {
                "clients are not kept out (--lock never): keep them away until it has ended"
            }
            Self::NoProxy => {
                "no proxy is given, so clients are not kept out by a lock: keep them away until it has ended"
            }
            Self::Beside => "clients are not kept out: nothing that the proxies use is replaced",
            Self::Stopped => {
                "no lock is taken, because the databases are stopped from the beginning on: keep clients away until it has ended"
            }
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::AsAsked => "as-asked",
            Self::NoProxy => "no-proxy",
            Self::Beside => "beside",
            Self::Stopped => "stopped",
        }
    }
}

impl Clients {
    /// For the plan.
    pub(crate) fn words(&self) -> String {
        match self {
            Self::KeptOut(proxies) => format!(
                "while databases are stopped, replaced and opened, the cluster is locked: writes through {} are refused, and through every other proxy that is listed",
                proxies.join(", ")
            ),
            Self::Open(why) => why.words().to_owned(),
        }
    }

    /// For machines.
    pub(crate) fn fields(&self) -> Value {
        match self {
            Self::KeptOut(proxies) => json!({"locked": true, "proxies": proxies}),
            Self::Open(why) => json!({"locked": false, "why": why.name()}),
        }
    }
}

/// What becomes of clients; seen before anything is changed, so that hours of copying are not for nothing.
///
/// # Errors
/// Why the cluster could not be locked.
pub(crate) async fn clients(
    switch: std::result::Result<&Switch<'_>, Open>,
    cancel: &CancellationToken,
) -> Result<Clients> {
    match switch {
        Ok(switch) => switch.possible(cancel).await.map(Clients::KeptOut),
        Err(why) => Ok(Clients::Open(why)),
    }
}
