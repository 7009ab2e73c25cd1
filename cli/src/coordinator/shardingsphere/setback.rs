//! Why a try did not give a point, in words.

use std::fmt;

use agent_api::{ApiError, ErrorKind};

use super::told::State;
use crate::coordinator::obstacle::{Obstacle, printable};

/// Why a try did not give a point.
#[derive(Debug, Clone)]
pub(super) enum Setback {
    /// The nodes did not prove it.
    Nodes(Obstacle),
    /// The cluster is locked, and not by us.
    Foreign {
        /// Who says so.
        proxy: String,
        /// Its words.
        said: String,
    },
    /// No proxy can be reached.
    NoProxy {
        /// Each with the reason.
        proxies: Vec<(String, String)>,
    },
    /// A proxy refused `LOCK CLUSTER`.
    Refused {
        /// Which.
        proxy: String,
        /// Its words.
        said: String,
    },
    /// Nobody knows whether `LOCK CLUSTER` locked.
    Unheard {
        /// Who was asked.
        proxy: String,
        /// Why there is no answer.
        why: String,
    },
    /// The cluster is said to be locked, and writes pass.
    NotFollowed {
        /// Through these.
        proxies: Vec<String>,
    },
    /// Time was up.
    Late {
        /// In this state.
        state: State,
        /// What was waited for there.
        obstacle: Option<Obstacle>,
    },
    /// An agent did not become a watchdog, or does not rest.
    Watchdog {
        /// Which.
        agent: String,
        /// Why.
        error: ApiError,
    },
    /// The locked time of this hour is used up.
    Budget {
        /// The cap, in milliseconds an hour.
        cap_ms: u64,
    },
    /// Somebody asked for it to stop.
    Cancelled,
}

impl Setback {
    /// What kind of failure it is, if it is the end.
    pub(super) fn kind(&self) -> ErrorKind {
        match self {
            Self::Nodes(Obstacle::Failed { error, .. } | Obstacle::Lost { error, .. })
            | Self::Watchdog { error, .. } => error.kind,
            Self::Late { obstacle: None, .. } => ErrorKind::Timeout,
            Self::Nodes(_) | Self::Foreign { .. } | Self::Budget { .. } | Self::Late { .. } => {
                ErrorKind::Conflict
            }
            Self::NoProxy { .. }
            | Self::Refused { .. }
            | Self::Unheard { .. }
            | Self::NotFollowed { .. } => ErrorKind::Database,
            Self::Cancelled => ErrorKind::Cancelled,
        }
    }

    /// Whether trying again would be of no use.
    pub(super) fn is_final(&self) -> bool {
        matches!(
            self,
            Self::Cancelled | Self::Refused { .. } | Self::Nodes(Obstacle::Lost { .. })
        ) || matches!(
            self.kind(),
            ErrorKind::Certificate | ErrorKind::Usage | ErrorKind::Incompatible
        )
    }

    /// The node it is on, if it is on one only.
    pub(super) fn node(&self) -> Option<&str> {
        match self {
            Self::Nodes(obstacle)
            | Self::Late {
                obstacle: Some(obstacle),
                ..
            } => obstacle.node(),
            Self::Foreign { proxy, .. }
            | Self::Refused { proxy, .. }
            | Self::Unheard { proxy, .. } => Some(proxy),
            Self::Watchdog { agent, .. } => Some(agent),
            Self::NoProxy { .. }
            | Self::NotFollowed { .. }
            | Self::Late { obstacle: None, .. }
            | Self::Budget { .. }
            | Self::Cancelled => None,
        }
    }

    /// What the operator can do about it.
    pub(super) fn next(&self) -> &'static str {
        match self {
            Self::Nodes(obstacle)
            | Self::Late {
                obstacle: Some(obstacle),
                ..
            } if obstacle.has_prepared() => {
                "end these transactions, or give `--accept-in-doubt` to have those listed that nobody ends"
            }
            Self::Nodes(Obstacle::Lost { .. }) => {
                "look at the agent's log on that host, then run the command again"
            }
            Self::Nodes(obstacle) if obstacle.is_for_long() => {
                "end what is in the way, then run the command again"
            }
            Self::Nodes(_) => {
                "run the command when there is less work, or with a longer `--point-timeout`"
            }
            Self::Late { .. } => {
                "end what is in the way, or give the lock more time with `--lock-timeout`"
            }
            Self::Foreign { .. } => {
                "wait until it is released; if nobody holds it any more: gs_pitr unlock"
            }
            Self::NoProxy { .. } => "check `--host`, `--port` and that the proxies run",
            Self::Refused { .. } => "see what the proxy says, or use `--lock never`",
            Self::Unheard { .. } => "look at that proxy, then run the command again",
            Self::NotFollowed { .. } => {
                "see whether these proxies have lost the cluster's shared state (ZooKeeper), and restart or stop them"
            }
            Self::Watchdog { .. } => "look at that agent, then run the command again",
            Self::Budget { .. } => {
                "run the command later, or with a greater `--lock-budget`, or with `--lock never`"
            }
            Self::Cancelled => "run the command again",
        }
    }
}

impl From<Obstacle> for Setback {
    fn from(obstacle: Obstacle) -> Self {
        Self::Nodes(obstacle)
    }
}

impl fmt::Display for Setback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nodes(obstacle) => obstacle.fmt(f),
            Self::Foreign { proxy, said } => write!(
                f,
                "the cluster is locked already, and not by this command ({proxy}: {})",
                printable(said)
            ),
            Self::NoProxy { proxies } => {
                f.write_str("no proxy can be reached")?;
                for (place, (proxy, why)) in proxies.iter().enumerate() {
                    let before = if place == 0 { ": " } else { "; " };
                    write!(f, "{before}{proxy}: {}", printable(why))?;
                }
                Ok(())
            }
            Self::Refused { proxy, said } => {
                write!(f, "{proxy} refused LOCK CLUSTER: {}", printable(said))
            }
            Self::Unheard { proxy, why } => write!(
                f,
                "nobody knows whether LOCK CLUSTER locked: {proxy}: {}",
                printable(why)
            ),
            Self::NotFollowed { proxies } => write!(
                f,
                "writes went on under the lock through {}",
                proxies.join(", ")
            ),
            Self::Late { state, obstacle } => {
                write!(f, "the lock's time was up at `{}`", state.name())?;
                match obstacle {
                    None => Ok(()),
                    Some(obstacle) => write!(f, ": {obstacle}"),
                }
            }
            Self::Watchdog { agent, error } => {
                write!(f, "the watchdog of the agent at {agent}: {error}")
            }
            Self::Budget { cap_ms } => write!(
                f,
                "the cluster has been locked for as long as it may be within an hour ({cap_ms} ms)"
            ),
            Self::Cancelled => f.write_str("cancelled on request"),
        }
    }
}
